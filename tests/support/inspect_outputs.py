"""Writes small outputs without a teacher."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from common.data.chat_encoding import EncodedChat
from common.data.samples import ImageRef, Kind, Sample, Turn
from common.shards.manifest import Manifest, SkippedSample, open_output
from common.shards.score_shard import ScoredConversation, ShardRow, write_shard
from common.shards.scores import scores_from_topk
from common.storage.files import Location
from tests.support.builders import make_manifest, make_rows


def run_sql(query: str) -> list[Any]:
    """Returns the rows that DuckDB finds, each as a tuple."""
    relation = duckdb.sql(query)
    assert relation is not None
    return relation.fetchall()


def write_output(
    out: Location,
    kind: Kind = "kd",
    *,
    num_samples: int = 10,
    shard: int = 4,
    num_shards: int | None = None,
    **capture: Any,
) -> Manifest:
    """Writes an output of random rows, or only the first `num_shards` of its shards."""
    manifest = make_manifest(kind, num_samples, shard, **capture)
    open_output(out, manifest)
    rows = make_rows(kind, num_samples, top_k=manifest.capture.top_k, num_draws=manifest.capture.num_draws)
    for number in range(manifest.num_shards if num_shards is None else num_shards):
        write_shard(out, number, manifest, [rows[i] for i in manifest.shard_range(number)], ())
    return manifest


def write_known_output(
    out: Path, *, sample_id: str = "one", answer: str = "An answer.", images: tuple[ImageRef, ...] = (), **other: Any
) -> Manifest:
    """Writes one row of three scored tokens, 7, 8 and 9, with simple probabilities, and two skipped samples.

    Probabilities of ids 7, 8, 5: (1/2, 1/4, 1/8) and a rest of 1/8; (1/4, 1/2, -) and 1/4; (0, 1, 0) and no rest.
    """
    manifest = make_manifest("kd", 3, 4, top_k=3).model_copy(update=other)
    probs_RK = np.array([[1 / 2, 1 / 4, 1 / 8], [1 / 4, 1 / 2, 0], [0, 1, 0]])
    with np.errstate(divide="ignore"):
        logprobs_RK = np.log(probs_RK)
    own = np.log([1 / 2, 1 / 2, 2.0**-20])
    scores = scores_from_topk(own, np.tile([7, 8, 5], (3, 1)), logprobs_RK)
    encoded = EncodedChat(np.array([1, 2, 7, 8, 9], np.int32), np.array([[2, 5]], np.int32), None)
    sample = Sample(sample_id, "kd", images, ((Turn("user", "A question?"), Turn("assistant", answer)),), sample_id)
    skipped = [SkippedSample(index=i, id=f"bad{i}", reason="no image") for i in (1, 2)]
    open_output(out, manifest)
    write_shard(out, 0, manifest, [ShardRow(0, sample, (ScoredConversation(encoded, scores),))], skipped)
    return manifest
