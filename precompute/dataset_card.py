"""Writes the dataset card of a complete output: README.md, with which datasets and the hub read the shards.

The card names files and models as the manifest does, and no directory.
"""

import json
from collections.abc import Sequence

from common.shards.manifest import Manifest, Receipt
from common.shards.output_files import CARD_NAME
from common.shards.score_shard import score_schema
from common.storage.files import Location, is_file, publish

# Meaning of each column; those of preference pairs have the prefix chosen_ or rejected_.
_COLUMNS = {
    "sample_id": "the sample's id, unique in this dataset",
    "source_id": "the id that the dataset gave it, if it was another one",
    "index": "position in the dataset",
    "images": "path of each image, and its file if it is stored",
    "messages": "role and text of each turn; `<image>` stands for an image",
    "input_ids": "tokens of the conversation, one for each image",
    "response_spans": "ranges of `input_ids` that are scored",
    "logprob_sum": "sum of `own_logprobs`, the reference of a preference loss",
    "own_logprobs": "the teacher's log-prob of each scored token, in nats at temperature 1",
    "rest_mass": "the teacher's probability outside the kept entries, one a scored token",
    "topk_counts": "number of kept entries, one a scored token",
    "topk_tables": "tables that decode the packed columns",
}
_PACKED = "packed kept entries; see below"


def write_card_if_complete(output: Location, manifest: Manifest, receipts: Sequence[Receipt]) -> None:
    """Writes the card of an output whose shards are all there. A card that is there already stays.

    Raises:
        StorageError: the disk or the store refused.
    """
    if len(receipts) < manifest.num_shards or is_file(output / CARD_NAME):
        return
    publish(output / CARD_NAME, render_card(manifest, receipts).encode())


def render_card(manifest: Manifest, receipts: Sequence[Receipt]) -> str:
    """Returns the card as Markdown with a YAML header."""
    capture, teacher, generate = manifest.capture, manifest.teacher, manifest.capture.generate
    num_rows = sum(receipt.num_rows for receipt in receipts)
    num_tokens = sum(receipt.num_scored_tokens for receipt in receipts)
    num_bytes = sum(receipt.num_bytes for receipt in receipts)
    kept = (
        f"{capture.num_draws} draws from the distribution, with replacement"
        if capture.num_draws
        else "no entries, only the log-prob of each token"
        if not capture.top_k
        else f"the {capture.top_k:,} best entries"
        + ("" if capture.top_p is None else f" or fewer, down to {capture.min_k}, that hold {capture.top_p:g}")
    )
    responses = (
        "of the dataset"
        if generate is None
        else f"written by the teacher ({generate.num_samples} a prompt, temperature {generate.temperature:g}, top-p "
        f"{generate.top_p:g})"
    )
    facts = [
        ("teacher", f"{teacher.architecture}, SHA-256 of its weights `{teacher.weights_sha256[:16]}…`"),
        ("dataset", f"`{manifest.dataset.name}`, {manifest.dataset.num_samples:,} samples"),
        ("samples", "preference pairs" if manifest.kind == "dpo" else "conversations"),
        ("responses", responses),
        ("kept of each distribution", kept),
        ("tokenizer", f"{manifest.tokenizer.vocab_size:,} ids, fingerprint `{manifest.tokenizer.sha256[:16]}…`"),
        ("engine", f"{manifest.engine.name} {manifest.engine.version}, {manifest.engine.dtype}"),
        ("size", f"{num_rows:,} rows, {num_tokens:,} scored tokens, {num_bytes:,} bytes"),
    ]
    names = [field.name for field in score_schema(manifest.kind, capture)]
    columns = [(f"`{name}`", _COLUMNS.get(_without_prefix(name), _PACKED)) for name in names]
    header = {
        "configs": [{"config_name": "default", "data_files": "shard-*.parquet"}],
        "tags": ["decant", "knowledge-distillation", "logits"],
        "size_categories": [_size_category(num_rows)],
    }
    # JSON is YAML.
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return f"""---
{lines}
---

# Scores of a teacher, by Decant

What a teacher thought at every response token of a dataset, for distillation without it.

{_table(("", ""), facts)}

## How to read it

```python
from datasets import load_dataset

rows = load_dataset("DIRECTORY OR NAME", split="train", streaming=True)
```

`own_logprobs`, `logprob_sum` and `rest_mass` are numbers. The kept entries are packed; `decant inspect-shards DIRECTORY
--unpack OUT` writes them as lists: `topk_ids` and `topk_logprobs` (of drawn entries also `topk_draws`), with one list
for each scored token. `decant train` reads the shards as they are. `decant verify-shards DIRECTORY` checks them.

## Columns

{_table(("column", "what it holds"), columns)}
"""


def _without_prefix(name: str) -> str:
    return name.removeprefix("chosen_").removeprefix("rejected_")


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows)]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _size_category(num_rows: int) -> str:
    """Returns the hub's name for a number of rows, such as 10K<n<100K."""
    limits = [(1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M"), (10_000_000, "10M")]
    limits += [(100_000_000, "100M"), (1_000_000_000, "1B")]
    lower = "n"
    for limit, name in limits:
        if num_rows < limit:
            return f"n<{name}" if lower == "n" else f"{lower}<n<{name}"
        lower = name
    return "n>1B"
