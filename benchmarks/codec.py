"""Size, fidelity and speed of the shard format on scores of real text.

    python -m benchmarks.codec

The scores are SmolLM2-135M's over the standard library's docstrings and Python's reference manual, no paragraph twice.
`bytes_per_token` is the size of kept entries and rest mass in the finished Parquet file: their column chunks and the
tables of token classes in the footer. `row_bytes_per_token` is the size of the whole file. `kl` is the generalised KL
divergence of the decoded from the original kept entries, in nats a token: sum p ln(p/q) - p + q. `set_bound` is the
entropy of the set of ids that a row keeps if each id is kept independently with its own frequency: the lower bound for
a code that knows these frequencies alone. Encoding and decoding are timed at k = 64 on one core; writing, flushing and
reading the file are included.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from benchmarks.real_text import RealRows, real_rows
from common.data.chat_encoding import EncodedChat
from common.data.samples import Sample, Turn
from common.shards.manifest import Manifest, shard_path
from common.shards.score_shard import ScoredConversation, ShardFile, ShardRow, write_shard
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from tests.support.builders import make_manifest

# The usual size of a shard. In a smaller one the tables take a larger share.
NUM_TOKENS = 131_072
NUM_TOKENS_PER_SAMPLE = 256
# This number of draws gives 12 different ids a token on average.
NUM_DRAWS = 37
NUM_REPEATS = 9


def main() -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        real = real_rows(root, NUM_TOKENS, top_k=128, num_draws=NUM_DRAWS)
        use_one_core()
        result: dict[str, Any] = {
            "k50": _size(root, real, top_k=50),
            "k128": _size(root, real, top_k=128),
            "sampled12": _size(root, real, top_k=0, num_draws=NUM_DRAWS),
            **_speed(root, real, top_k=64),
        }
    print(json.dumps(result))


def use_one_core() -> None:
    """Keeps all threads of this process, also those that torch has started already, on one core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def make_row(index: int, ids: npt.NDArray[np.int32], scores: TeacherScores) -> ShardRow:
    """Returns a conversation whose response has these tokens, int32 [R], and these scores."""
    encoded = EncodedChat(np.concatenate([ids[:1], ids]), np.array([[1, len(ids) + 1]], np.int32), None)
    turns = (Turn("user", "What is it?"), Turn("assistant", "It is text."))
    return ShardRow(index, Sample(str(index), "kd", (), (turns,)), (ScoredConversation(encoded, scores),))


def _size(root: Path, real: RealRows, **capture: Any) -> dict[str, float]:
    """Measures bytes and divergence of one way to keep entries, at the default precision."""
    manifest, rows = _manifest(real, **capture), _rows(real, **capture)
    num_bytes = write_shard(root, 0, manifest, rows, ()).num_bytes
    path = shard_path(root, 0)
    metadata = pq.read_metadata(path)
    kept = len(metadata.metadata[b"decant.token_classes"])
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.startswith(("topk_", "rest_mass")):
                kept += column.total_compressed_size
    scores = [row.conversations[0].scores for row in rows]
    return {
        "bytes_per_token": round(kept / NUM_TOKENS, 2),
        "row_bytes_per_token": round(num_bytes / NUM_TOKENS, 2),
        "kl": _divergence(scores, [row.conversations[0].scores for row in ShardFile(path, manifest, 0)]),
        "ids_per_token": round(sum(len(each.ids) for each in scores) / NUM_TOKENS, 2),
        "set_bound": round(_set_bound(scores, real.vocab_size), 2),
    }


def _divergence(written: list[TeacherScores], read: list[TeacherScores]) -> float:
    total = 0.0
    for p, q in zip(written, read, strict=True):
        p_N, q_N = _by_id(p), _by_id(q)
        total += float((np.exp(p_N) * (p_N - q_N) - np.exp(p_N) + np.exp(q_N)).sum())
    return float(f"{total / NUM_TOKENS:.3g}")


def _by_id(scores: TeacherScores) -> Any:
    """Returns log-probs float64 [N], sorted by id within each row."""
    rows_N = np.repeat(np.arange(scores.num_rows), scores.counts)
    return scores.logprobs[np.lexsort((scores.ids, rows_N))].astype(np.float64)


def _set_bound(scores: list[TeacherScores], vocab_size: int) -> float:
    """Returns the entropy of V independent coins, each with the frequency of its id, in bytes a token."""
    share_V = np.bincount(np.concatenate([each.ids for each in scores]), minlength=vocab_size) / NUM_TOKENS
    p = share_V[(share_V > 0) & (share_V < 1)]
    return float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum() / 8)


def _speed(root: Path, real: RealRows, top_k: int) -> dict[str, int]:
    manifest, rows = _manifest(real, top_k=top_k), _rows(real, top_k=top_k)

    def decode() -> None:
        assert sum(1 for _ in ShardFile(shard_path(root, 0), manifest, 0)) == len(rows)

    speeds = _time_interleaved(lambda: write_shard(root, 0, manifest, rows, ()), decode)
    return dict(zip(("encode_tps_core", "decode_tps_core"), speeds, strict=True))


def _time_interleaved(*works: Callable[[], Any]) -> list[int]:
    """Runs all works in each round, and returns the median tokens a second of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(NUM_REPEATS + 1):
        for work, times in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    # The first round warms the caches.
    return [round(NUM_TOKENS / statistics.median(times[1:])) for times in seconds]


def _manifest(real: RealRows, **capture: Any) -> Manifest:
    settings: dict[str, Any] = capture if capture.get("num_draws") else {**capture, "precision": "q8"}
    manifest = make_manifest(num_samples=NUM_TOKENS // NUM_TOKENS_PER_SAMPLE, **settings)
    tokenizer = manifest.tokenizer.model_copy(update={"vocab_size": real.vocab_size})
    return manifest.model_copy(update={"tokenizer": tokenizer})


def _rows(real: RealRows, top_k: int, num_draws: int = 0) -> list[ShardRow]:
    parts = {name: part.numpy() for name, part in vars(real.scores).items()}
    rows = []
    for index, start in enumerate(range(0, NUM_TOKENS, NUM_TOKENS_PER_SAMPLE)):
        part = slice(start, start + NUM_TOKENS_PER_SAMPLE)
        if num_draws:
            scores = scores_from_draws(parts["own"][part], parts["drawn"][part])
        else:
            scores = scores_from_topk(parts["own"][part], parts["ids"][part, :top_k], parts["logprobs"][part, :top_k])
        rows.append(make_row(index, real.ids[part], scores))
    return rows


if __name__ == "__main__":
    main()
