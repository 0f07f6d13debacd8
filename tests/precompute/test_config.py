from pathlib import Path

import pytest

from common.config import load_config
from common.errors import ConfigError
from precompute.config import PrecomputeConfig

MINIMAL = 'teacher = "t"\ndataset = "d.jsonl"\noutput = "out"\n'
SHIPPED = Path(__file__).parents[2] / "configs"


def config_of(tmp_path: Path, text: str, *overrides: str) -> PrecomputeConfig:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL + text)
    return load_config(PrecomputeConfig, path, overrides)


@pytest.mark.parametrize(("kind", "top_k"), [("kd", 64), ("dpo", 0)])
def test_the_kind_decides_how_many_entries_are_kept_by_default(tmp_path: Path, kind: str, top_k: int) -> None:
    assert config_of(tmp_path, f'kind = "{kind}"').top_k == top_k
    assert config_of(tmp_path, f'kind = "{kind}"\ntop_k = 7').top_k == 7
    assert config_of(tmp_path, f'kind = "{kind}"', "top_k=all").top_k == "all"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk = 3", "topk: unknown key"),
        ("[engine]\ndtpye = 'float32'", "engine.dtpye: unknown key"),
        ("top_k = -1", "top_k"),
        ('top_k = "most"', "top_k"),
        ("samples_per_shard = 0", "samples_per_shard"),
        ('kind = "sft"', "kind: Input should be 'kd' or 'dpo' .found 'sft'"),
        ("node = 2\nnum_nodes = 2", "nodes are numbered from 0"),
        ("[engine.options]\nmax_model_len = 5", "max_model_len: set by this program"),
        ("[engine.options]\ndata_parallel_size = 2", "num_nodes and node"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, text)


@pytest.mark.parametrize(("name", "kind"), [("precompute-kd.toml", "kd"), ("precompute-dpo.toml", "dpo")])
def test_the_shipped_files_are_valid(name: str, kind: str) -> None:
    assert load_config(PrecomputeConfig, SHIPPED / name).kind == kind
