"""The benchmark of many samples and shards, with few of them."""

from pathlib import Path

import pytest

from benchmarks import scale


@pytest.mark.slow
def test_each_part_is_measured(tmp_path: Path) -> None:
    scale.write_datasets(tmp_path, 60)
    scale.write_shards(tmp_path / "out", 12)
    counts = {"open_shards": 12, "verify": 12}
    for name, part in scale.PARTS.items():
        assert part(tmp_path) == counts.get(name, 60), name
        assert scale.measure(part, tmp_path)["per_s"] > 0
