"""Unpacked shards are read by programs that know nothing of this project."""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.samples import Kind
from common.errors import ConfigError, ShardError, StorageError
from common.shards.manifest import shard_path
from common.shards.score_shard import PREFIXES, ShardFile
from common.storage.files import Location
from precompute.inspection.collect import open_target
from precompute.inspection.unpack import unpack_output
from tests.support.inspect_outputs import run_sql, write_output
from tests.support.outputs import rewrite_receipt


def unpack(output: Location, out: Path) -> Any:
    return unpack_output(open_target(output), out, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_lists_hold_what_the_shards_hold(tmp_path: Path, kind: Kind, drawn: bool) -> None:
    capture = {"top_k": 0, "num_draws": 20} if drawn else {"top_k": 6}
    manifest = write_output(tmp_path / "out", kind, num_samples=150, shard=140, **capture)
    done = unpack(tmp_path / "out", tmp_path / "lists")
    assert done.ok and (done.num_files, done.num_rows) == (2, 150)
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == [
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]
    for number in (0, 1):
        path = shard_path(tmp_path / "out", number)
        unpacked = pq.ParquetFile(shard_path(tmp_path / "lists", number))
        records = unpacked.read().to_pylist()
        shard = ShardFile(path, manifest, number)
        assert unpacked.num_row_groups == shard.num_groups
        rows = list(shard)
        shard.close()
        assert len(records) == len(rows)
        for record, row in zip(records, rows, strict=True):
            for prefix, conversation in zip(PREFIXES[kind], row.conversations, strict=True):
                scores = conversation.scores
                stops = np.cumsum(scores.counts)[:-1]
                assert record[prefix + "topk_ids"] == [part.tolist() for part in np.split(scores.ids, stops)]
                assert record[prefix + "topk_logprobs"] == [p.tolist() for p in np.split(scores.logprobs, stops)]
                assert (prefix + "topk_draws" in record) == drawn
                if scores.draws is not None:
                    assert record[prefix + "topk_draws"] == [p.tolist() for p in np.split(scores.draws, stops)]

        packed = pq.read_table(path)
        kept = [f.name for f in packed.schema if not pa.types.is_binary(f.type)]
        assert "chosen_own_logprobs" in kept or "own_logprobs" in kept
        assert unpacked.read(kept).replace_schema_metadata() == packed.select(kept).replace_schema_metadata()
        own = {k: v for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
        found = {k: v for k, v in unpacked.metadata.metadata.items() if k != b"ARROW:schema"}
        assert found == {**own, b"decant.export": b"unpacked"}


def test_draws_have_a_column_of_their_own(tmp_path: Path) -> None:
    manifest = write_output(tmp_path / "out", num_samples=4, top_k=0, num_draws=20)
    assert unpack(tmp_path / "out", tmp_path / "lists").ok
    (record, *_) = pq.read_table(shard_path(tmp_path / "lists", 0)).to_pylist()
    shard = ShardFile(shard_path(tmp_path / "out", 0), manifest, 0)
    scores = next(iter(shard)).conversations[0].scores
    shard.close()
    assert scores.draws is not None
    assert list(itertools.chain(*record["topk_draws"])) == scores.draws.tolist()
    assert [len(draws) for draws in record["topk_draws"]] == scores.counts.tolist()


def test_duckdb_pandas_and_datasets_open_it(tmp_path: Path) -> None:
    import datasets

    write_output(tmp_path / "out", top_k=3)
    unpack(tmp_path / "out", tmp_path / "lists")
    files = sorted(map(str, (tmp_path / "lists").glob("*.parquet")))
    counts = [len(ids) for record in pq.read_table(files).to_pylist() for ids in record["topk_ids"]]
    (answer,) = run_sql(
        f"select count(*), sum(len(i)) from (select unnest(topk_ids) as i from '{tmp_path}/lists/*.parquet')"
    )
    assert answer == (len(counts), sum(counts))
    frame = pd.concat(map(pd.read_parquet, files))
    assert sum(len(ids) for row in frame["topk_ids"] for ids in row) == sum(counts)
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert [len(ids) for row in loaded["topk_ids"] for ids in row] == counts
    assert str(pq.read_schema(files[0]).field("topk_ids").type) == "list<element: list<element: int32>>"
    assert str(pq.read_schema(files[0]).field("topk_logprobs").type) == "list<element: list<element: float>>"


def test_an_export_is_not_taken_for_a_shard(tmp_path: Path) -> None:
    manifest = write_output(tmp_path / "out")
    unpack(tmp_path / "out", tmp_path / "lists")
    shutil.copy(tmp_path / "out/shard-00000.json", tmp_path / "lists")
    rewrite_receipt(tmp_path / "lists", 0)
    with pytest.raises(ShardError, match="columns are not those"):
        ShardFile(shard_path(tmp_path / "lists", 0), manifest, 0)


def test_a_destination_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    write_output(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = sorted((tmp_path / "out").iterdir())
    for out in ("out", "out/lists", "out/../out/a/b", "link/lists", "full", "full/thesis.txt"):
        with pytest.raises(ConfigError, match="choose a"):
            unpack(tmp_path / "out", tmp_path / out)
    assert sorted((tmp_path / "out").iterdir()) == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert unpack(tmp_path / "out", tmp_path / "empty").ok


def test_a_damaged_shard_leaves_no_file_and_the_others_are_written(tmp_path: Path) -> None:
    write_output(tmp_path / "out", num_samples=200, shard=100, top_k=3)
    path = shard_path(tmp_path / "out", 0)
    # The damage is in the second row group, which is read when the first is already written.
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 0x10
    path.write_bytes(bytes(data))
    done = unpack(tmp_path / "out", tmp_path / "lists")
    assert not done.ok
    assert [problem.path for problem in done.problems] == [str(path)]
    assert [p.name for p in (tmp_path / "lists").iterdir()] == ["shard-00001.parquet"]
    assert str(path) in done.summary


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(tmp_path / "out")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        unpack(tmp_path / "out", tmp_path / "lists")
    assert list((tmp_path / "lists").iterdir()) == []


def test_one_shard_is_unpacked_alone(tmp_path: Path) -> None:
    write_output(tmp_path / "out")
    assert unpack(shard_path(tmp_path / "out", 1), tmp_path / "lists").num_rows == 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """The peak of Arrow's memory is about the same for sixteen row groups as for four."""
    peaks = []
    for name, num_samples in (("four", 256), ("sixteen", 1024)):
        write_output(tmp_path / name, num_samples=num_samples, shard=num_samples, top_k=200)
        target = open_target(tmp_path / name)
        pool = pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(pool)
        try:
            unpack_output(target, tmp_path / f"{name}-lists", progress=False)
        finally:
            pa.set_memory_pool(pa.system_memory_pool())
        peaks.append(pool.max_memory() or 0)
    assert 0 < peaks[1] < 1.5 * peaks[0]
