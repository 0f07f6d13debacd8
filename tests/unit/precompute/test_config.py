"""Defaults and checks of the capture's configuration."""

from pathlib import Path

import pytest

from common.config import load_config
from common.errors import ConfigError
from precompute.config import PrecomputeConfig

MINIMAL = 'teacher = "t"\ndataset = "d.jsonl"\noutput = "out"\n'
SHIPPED = Path(__file__).parents[3] / "configs"


def load_text(tmp_path: Path, text: str, *overrides: str) -> PrecomputeConfig:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL + text)
    return load_config(PrecomputeConfig, path, overrides)


@pytest.mark.parametrize(("kind", "top_k"), [("kd", 64), ("dpo", 0)])
def test_the_kind_decides_how_many_entries_are_kept_by_default(tmp_path: Path, kind: str, top_k: int) -> None:
    assert load_text(tmp_path, f'kind = "{kind}"').top_k == top_k
    assert load_text(tmp_path, f'kind = "{kind}"\ntop_k = 7').top_k == 7
    assert load_text(tmp_path, f'kind = "{kind}"', "top_k=all").top_k == "all"


def test_draws_replace_the_best_entries(tmp_path: Path) -> None:
    config = load_text(tmp_path, "num_draws = 50")
    assert (config.top_k, config.num_draws) == (0, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk = 3", "topk: unknown key"),
        ("[engine]\ndtpye = 'float32'", "engine.dtpye: unknown key"),
        ("top_k = -1", "top_k"),
        ('top_k = "most"', "top_k"),
        ("samples_per_shard = 0", "samples_per_shard"),
        ('kind = "sft"', "kind: expected 'kd' or 'dpo', found 'sft'"),
        ("node_rank = 2\nnum_nodes = 2", "nodes count from 0"),
        ("node = 0", "node: unknown key"),
        ("num_draws = 50\ntop_k = 5", "give one of the two"),
        ("num_draws = 50\ntop_p = 0.9", "give one of the two"),
        ('num_draws = 50\nprecision = "q8"', "which are exact"),
        ("num_draws = 65536", "num_draws"),
        ("top_k = 0\ntop_p = 0.9", "top_p needs top_k"),
        ("min_k = 2", "give top_p as well"),
        ("top_k = 3\ntop_p = 0.9\nmin_k = 4", "min_k = 4 exceeds top_k = 3"),
        ("top_p = 1.5", "top_p"),
        ('kind = "dpo"\n[generate]', 'needs kind = "kd"'),
        ('score = "all"\n[generate]', 'score = "response"'),
        ("[generate]\ntemperature = 0\nnum_samples = 2", "the same response each time"),
        ("[engine.options]\nmax_model_len = 5", "max_model_len: set by this program"),
        ("[engine.options]\ndata_parallel_size = 2", "data_parallel_size: set by this program or by a key"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, text)


@pytest.mark.parametrize(("name", "kind"), [("precompute-kd.toml", "kd"), ("precompute-dpo.toml", "dpo")])
def test_the_shipped_files_are_valid(name: str, kind: str) -> None:
    assert load_config(PrecomputeConfig, SHIPPED / name).kind == kind
