"""Measures what grows with the number of samples and of shards: opening, preflight, listing, verification.

    python -m benchmarks.scale [--samples 1000000] [--shards 10000]

Opens a million conversations as a JSON array, as JSON lines and as Parquet, looks at samples as the preflight does, and
lists, opens and verifies 10,000 shards of one sample. Each measurement is a process of its own; peak memory is counted
from what the process has after its imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.codec import use_one_core
from common.data.dataset import Dataset
from common.shards.manifest import open_output, read_manifest, read_receipts, shard_path
from common.shards.score_shard import ShardFile, write_shard
from precompute.verify.logits import verify_logits
from tests.support.builders import make_manifest, make_rows

NUM_SAMPLES = 1_000_000
NUM_SHARDS = 10_000
# Enough for a rate.
NUM_CHECKED = 5_000

_ROWS_PER_TABLE = 50_000


def main() -> None:
    """Prints one JSON line; with --part, that of one measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--shards", type=int, default=NUM_SHARDS)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    if options.part:
        use_one_core()
        print(json.dumps(measure(PARTS[options.part], options.root)))
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_datasets(root, options.samples)
        write_shards(root / "out", options.shards)
        result: dict[str, Any] = {"num_samples": options.samples, "num_shards": options.shards}
        for part in PARTS:
            command = [sys.executable, "-m", "benchmarks.scale", "--part", part, "--root", str(root)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result[part] = json.loads(found.splitlines()[-1])
    print(json.dumps(result))


def measure(function: Callable[[Path], int], root: Path) -> dict[str, float]:
    """Returns the seconds that a part takes, how many things it does a second, and the peak of its own memory."""
    # Forgets the highest size so far. Not getrusage, which counts what the parent had when it started this process.
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = read_memory("VmRSS")
    started = time.perf_counter()
    count = function(root)
    seconds = time.perf_counter() - started
    peak_mib = (read_memory("VmHWM") - before_kib) / 1024
    return {"seconds": round(seconds, 2), "per_s": round(count / seconds), "peak_mib_above_start": round(peak_mib)}


def read_memory(name: str) -> int:
    """Returns a size of this process, in KiB, by its name in /proc/self/status."""
    return int(Path("/proc/self/status").read_text("utf-8").partition(f"{name}:")[2].split()[0])


def write_datasets(root: Path, num_samples: int) -> None:
    """Writes the same conversations in three forms, with one image for all, and a small model that reads them."""
    # Imported here, because torch would count in the memory of the parts.
    from tests.support.models import tiny_llava

    tiny_llava(root / "model", num_layers=1)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(root / "a.jpg")
    with (root / "data.json").open("w") as array, (root / "data.jsonl").open("w") as lines:
        table: pq.ParquetWriter | None = None
        for start in range(0, num_samples, _ROWS_PER_TABLE):
            records = [_record(number) for number in range(start, min(start + _ROWS_PER_TABLE, num_samples))]
            texts = [json.dumps(record) for record in records]
            array.write(("," if start else "[") + ",\n".join(texts))
            lines.write("".join(f"{text}\n" for text in texts))
            rows = pa.Table.from_pylist(records)
            table = table or pq.ParquetWriter(root / "data.parquet", rows.schema)
            table.write_table(rows, row_group_size=1000)
        array.write("]")
        assert table is not None
        table.close()


def _record(number: int) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\nWhat is shown in picture {number}, and what may happen next?"},
        {
            "from": "gpt",
            "value": "A cat sits on a mat beside a red ball, and will probably begin to play with it. " * 3,
        },
    ]
    return {"id": f"{number:012d}", "image": "a.jpg", "conversations": turns}


def write_shards(output: Path, num_shards: int) -> None:
    """Writes an output whose shards have one sample each."""
    manifest = make_manifest(num_samples=num_shards, samples_per_shard=1)
    open_output(output, manifest)
    row = make_rows("kd", 1)[0]
    for number in range(num_shards):
        sample = replace(row.sample, id=f"s{number}", source_id=f"s{number}")
        write_shard(output, number, manifest, [replace(row, index=number, sample=sample)], ())


def open_dataset(path: Path) -> int:
    """Opens a dataset; returns its number of samples."""
    return len(Dataset.open(path, "kd"))


def check_samples(root: Path) -> int:
    """Looks at samples as the preflight of a capture and of training does: template, tokens, length, image header."""
    # Imported here, because torch would count in the memory of the other parts.
    from common.data.chat_encoding import ChatEncoder
    from train.data.collator import Collator, StudentInputs
    from train.data.image_cache import ImageCache
    from train.data.sources import DatasetSource

    encoder = ChatEncoder.load(root / "model")
    source = DatasetSource(root / "data.jsonl", "kd", encoder)
    student = StudentInputs(ImageCache.load(root / "model", "pad"), encoder.image_token_id, 0)
    collator = Collator(student, kind="kd", image_root=root, max_tokens=2048)
    count = min(NUM_CHECKED, len(source))
    for position in range(count):
        collator.check(source.read_unscored(position))
    return count


def open_shards(root: Path) -> int:
    """Lists the shards, reads their receipts, and opens each."""
    output = root / "out"
    manifest = read_manifest(output)
    receipts = read_receipts(output, manifest)
    for receipt in receipts:
        with closing(ShardFile(shard_path(output, receipt.shard), manifest, receipt.shard)):
            pass
    return len(receipts)


def verify(root: Path) -> int:
    """Verifies all shards."""
    report = verify_logits(root / "out", progress=False)
    assert report.num_shards
    return report.num_shards


PARTS: dict[str, Callable[[Path], int]] = {
    "open_json": lambda root: open_dataset(root / "data.json"),
    "open_jsonl": lambda root: open_dataset(root / "data.jsonl"),
    "open_parquet": lambda root: open_dataset(root / "data.parquet"),
    "preflight": check_samples,
    "open_shards": open_shards,
    "verify": verify,
}


if __name__ == "__main__":
    main()
