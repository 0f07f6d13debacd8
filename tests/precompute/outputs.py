"""Looking into outputs and reports."""

from pathlib import Path

from common.manifest import read_manifest, shard_path
from common.shards import ShardFile, ShardRow
from precompute.report import Report


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.problems[0].what for check in report.checks if not check.ok}


def rows_of(output: Path, number: int) -> list[ShardRow]:
    shard = ShardFile(shard_path(output, number), read_manifest(output), number)
    rows = list(shard)
    shard.close()
    return rows
