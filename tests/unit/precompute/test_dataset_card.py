"""A complete output has a dataset card; the library datasets opens the output by it, whole and streamed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from common.shards.manifest import read_manifest, read_receipts
from precompute.dataset_card import render_card
from precompute.logits.run import run_capture
from precompute.merge import merge_outputs
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.models import tiny_llava


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    config = make_config(root, tiny_llava(root / "llava"), conversation_records(root, 9), top_k=4, samples_per_shard=4)
    capture(config, num_nodes=2)
    assert not (config.output / "README.md").exists()
    capture(config, num_nodes=1)
    assert isinstance(config.output, Path)
    return config.output


def capture(config: Any, num_nodes: int) -> None:
    run_capture(config.model_copy(update={"num_nodes": num_nodes}), progress=False, start_teacher=FakeTeacher)


def test_datasets_opens_the_output_by_its_card(output: Path, tmp_path: Path) -> None:
    for streaming in (False, True):
        rows = load_dataset(str(output), split="train", streaming=streaming, cache_dir=str(tmp_path))
        found = list(rows)
        assert [row["index"] for row in found] == list(range(9))
        assert abs(sum(found[0]["own_logprobs"]) - found[0]["logprob_sum"]) < 1e-4


def test_the_card_says_what_the_manifest_says_and_no_directory(output: Path) -> None:
    text = (output / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": "shard-*.parquet"}]
    assert header["size_categories"] == ["n<1K"]
    manifest = read_manifest(output)
    for fact in (manifest.dataset.name, "the 4 best entries", manifest.engine.version, "9 rows", "`topk_counts`"):
        assert fact in text
    assert str(output.parent) not in text
    assert verify_logits(output, None, progress=False).ok


def test_other_captures_are_described(output: Path) -> None:
    manifest = read_manifest(output)
    receipts = read_receipts(output, manifest)
    drawn = {"top_k": 0, "num_draws": 37, "precision": None, "seed": 1}
    changed = manifest.model_copy(update={"kind": "dpo", "capture": manifest.capture.model_copy(update=drawn)})
    text = render_card(changed, receipts)
    assert "37 draws from the distribution" in text
    assert "preference pairs" in text
    assert "| `chosen_own_logprobs` | the teacher's log-prob" in text
    shorter = manifest.capture.model_copy(update={"top_p": 0.9, "min_k": 2})
    text = render_card(manifest.model_copy(update={"capture": shorter}), receipts)
    assert "the 4 best entries or fewer, down to 2, that hold 0.9" in text


def test_a_card_that_is_there_stays_and_a_merged_output_has_one(output: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_outputs([output], merged, samples_per_shard=9, progress=False)
    assert "the 4 best entries" in (merged / "README.md").read_text()
    (merged / "README.md").write_text("mine")
    merge_outputs([output], merged, samples_per_shard=9, progress=False)
    assert (merged / "README.md").read_text() == "mine"
