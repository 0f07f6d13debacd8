"""Measures the path from the engine's arrays to a durable shard on one core: tokens a second at k = 64, on real scores.

    python -m benchmarks.host_path

The scores are SmolLM2-135M's over text of Python's documentation, packed as the engine returns them. The time covers
unpacking, building the rows, encoding, compressing, writing, flushing to the disk, and the receipt.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.codec import NUM_TOKENS_PER_SAMPLE, make_row, use_one_core
from benchmarks.real_text import RealRows, real_rows
from common.shards.score_shard import write_shard
from precompute.config import EngineConfig
from precompute.engine.row_request import pack_row_scores, unpack_row_scores
from precompute.engine.row_scores import RowScores
from precompute.engine.score_conversion import scores_from_rows
from precompute.scorer import ScorerSettings
from tests.support.builders import make_manifest

TOP_K = 64
NUM_TOKENS = 16_384
NUM_REPEATS = 9


def main() -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        real = real_rows(root, NUM_TOKENS, TOP_K)
        use_one_core()
        records = list(_records(real))
        seconds, num_bytes = [], 0
        for repeat in range(NUM_REPEATS + 1):
            started = time.perf_counter()
            num_bytes = _write(root, repeat, records, real.vocab_size)
            seconds.append(time.perf_counter() - started)
    # The first run warms the caches.
    median = statistics.median(seconds[1:])
    result = {"tokens_per_s_core": round(NUM_TOKENS / median), "bytes_per_token": round(num_bytes / NUM_TOKENS, 1)}
    print(json.dumps(result))


def _records(real: RealRows) -> Any:
    """Yields, for each conversation, the ids of its response and their packed scores as the engine returns them."""
    for start in range(0, NUM_TOKENS, NUM_TOKENS_PER_SAMPLE):
        rows = slice(start, start + NUM_TOKENS_PER_SAMPLE)
        yield (
            real.ids[rows],
            pack_row_scores(RowScores(**{name: part[rows] for name, part in vars(real.scores).items()})),
        )


def _write(root: Path, number: int, records: list[Any], vocab_size: int) -> int:
    settings = ScorerSettings(
        model_dir=root,
        engine=EngineConfig(),
        max_tokens=2048,
        max_images=0,
        top_k=TOP_K,
        top_p=None,
        min_k=1,
        num_draws=None,
        seed=0,
        generate=None,
        node_rank=0,
        vocab_size=vocab_size,
        output_vocab_size=vocab_size,
    )
    rows = []
    for index, (ids, record) in enumerate(records):
        scores = scores_from_rows(unpack_row_scores(record), settings, "benchmark")
        rows.append(make_row(index, ids, scores))
    return write_shard(root, number, make_manifest(precision="q8"), rows, ()).num_bytes


if __name__ == "__main__":
    main()
