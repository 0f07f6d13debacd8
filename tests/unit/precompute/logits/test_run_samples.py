"""Samples, datasets and teachers that cannot be used: reported before the start, or skipped by choice and listed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, DataError, ModelError, ProvenanceError
from common.shards.manifest import published_shards
from precompute.config import PrecomputeConfig
from precompute.logits.job import check_samples, open_inputs, prepare_job
from precompute.logits.run import run_capture
from precompute.planning.workload import measure_workload
from precompute.verify.logits import verify_logits
from tests.support.captures import NUM_SAMPLES, no_teacher, score, shard_bytes
from tests.support.fake_teacher import conversation_records, make_config
from tests.support.models import CHAT_TEMPLATE, tiny_llava
from tests.support.outputs import read_all_rows
from tests.support.real_weights import write_jsonl


def damage(records: list[dict[str, Any]], how: str, root: Path) -> None:
    record = records[7]
    if how == "missing image":
        record["image"] = "nowhere.png"
    elif how == "image outside":
        record["image"] = "../secret.png"
    elif how == "no picture":
        (root / "7-0.png").write_bytes(b"not a picture")
    elif how == "unreadable image":
        data = (root / "7-0.png").read_bytes()
        (root / "7-0.png").write_bytes(data[: len(data) // 2])
    elif how == "no assistant turn":
        record["conversations"] = record["conversations"][:1]
    elif how == "too long":
        record["conversations"][1]["value"] = "x" * 600


BAD_SAMPLES = {
    "missing image": r"'s7'.*nowhere\.png does not exist; check image_root",
    "image outside": r"'s7'.*lies outside image_root",
    "no picture": r"'s7'.*7-0\.png cannot be decoded",
    "unreadable image": r"'s7'.*7-0\.png cannot be decoded",
    "no assistant turn": r"'s7'.*no assistant turn",
    "too long": r"'s7' .*: needs \d+ tokens, images expanded; the limit is 512",
}


@pytest.mark.parametrize("how", BAD_SAMPLES)
def test_a_bad_sample_stops_the_run_and_is_named(
    tmp_path: Path, llava_dir: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    damage(records, how, tmp_path)
    config = make_config(tmp_path, llava_dir, records)
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)
    with pytest.raises(DataError, match=BAD_SAMPLES[how]):
        score(config, batch_size=1)
    # Pixels are decoded when they are needed; every other problem is found before anything is scored.
    assert published_shards(config.output) == ((0,) if how == "unreadable image" else ())


@pytest.mark.slow
@pytest.mark.parametrize("how", BAD_SAMPLES)
def test_a_bad_sample_is_skipped_by_choice_and_listed(tmp_path: Path, llava_dir: Path, how: str) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    damage(records, how, tmp_path)
    config = make_config(tmp_path, llava_dir, records, on_bad_sample="skip")
    summary = score(config)
    assert [(skipped.index, skipped.id) for skipped in summary.skipped] == [(7, "s7")]
    assert [row.index for row in read_all_rows(config.output)] == [i for i in range(NUM_SAMPLES) if i != 7]
    assert verify_logits(config.output, config.dataset, progress=False).ok
    assert run_capture(config, progress=False, start_teacher=no_teacher).skipped == summary.skipped


@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_a_template_that_refuses_every_sample_is_a_wrong_setting(
    tmp_path: Path, llava_dir: Path, on_bad_sample: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE.replace("message['content']", "message['content'].replace('<image>', '')"))
    records = [record for record in conversation_records(tmp_path, 6) if record.get("image")]
    config = make_config(tmp_path, llava_dir, records, chat_template=template, on_bad_sample=on_bad_sample)
    job = prepare_job(config.model_copy(update={"max_skipped": 1.0}))
    with pytest.raises(ConfigError, match=r"the chat template refuses every sample, such as: .*drops or repeats some"):
        check_samples(job, range(len(records)))
    with pytest.raises(ConfigError, match="the chat template refuses every sample"):
        measure_workload(open_inputs(config), progress=False)
    # A continuation may have just one left to score that the template refuses.
    if on_bad_sample == "skip":
        check_samples(job, [0])
    else:
        with pytest.raises(DataError, match="drops or repeats some"):
            check_samples(job, [0])


def test_all_bad_samples_are_found_at_once(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    records[1]["image"] = "gone.png"
    records[4]["conversations"][1]["value"] = ""
    records[4]["conversations"][1]["from"] = "human"
    with pytest.raises(DataError, match=r"2 samples cannot be used\n.*'s1'.*\n.*'s4'") as caught:
        score(make_config(tmp_path, llava_dir, records))
    assert "gone.png" in str(caught.value)


def test_without_preflight_complete_shards_survive_a_bad_sample(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 1)
    monkeypatch.setattr("precompute.logits.pipeline._DECODED_AHEAD", 1)
    records = conversation_records(tmp_path, NUM_SAMPLES)
    damage(records, "missing image", tmp_path)
    config = make_config(tmp_path, llava_dir, records, preflight=False)
    with pytest.raises(DataError, match=r"1 shard\(s\) were written in this run and are safe"):
        score(config)
    assert published_shards(config.output) == (0,)


def test_images_for_a_teacher_without_a_vision_tower_are_refused(tmp_path: Path, text_dir: Path) -> None:
    records = conversation_records(tmp_path, 2)
    with pytest.raises(DataError, match=r"'s1'.*the teacher has no vision tower"):
        score(make_config(tmp_path, text_dir, records))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the dataset is empty"),
        ('{"id": "a"}\n{"id": \n', "line 2, column 8: broken JSON"),
        ('{"id": "a"}\n{"id": "a"}\n', "id 'a' stands at line 1 and again at line 2"),
        ('{"conversations": []}\n', 'no "id"'),
    ],
)
def test_a_broken_dataset_is_refused_before_anything_starts(
    tmp_path: Path, llava_dir: Path, content: str, message: str
) -> None:
    config = make_config(tmp_path, llava_dir, [], ids="strict")
    config.dataset.write_text(content)
    with pytest.raises(DataError, match=message):
        run_capture(config, progress=False, start_teacher=no_teacher)
    assert not config.output.exists()


def test_an_output_begun_by_another_teacher_or_dataset_is_refused(
    config: PrecomputeConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    score(config)
    before = shard_bytes(config.output)
    teacher = tiny_llava(tmp_path_factory.mktemp("other"), seed=1)
    dataset = write_jsonl(tmp_path / "other.jsonl", conversation_records(tmp_path, 3))
    other = config.model_copy(update={"teacher": teacher, "dataset": dataset, "top_k": 9})
    with pytest.raises(ProvenanceError) as caught:
        run_capture(other, progress=False, start_teacher=no_teacher)
    for difference in ("teacher.weights_sha256", "dataset.sha256", "dataset.num_samples", "capture.top_k"):
        assert difference in str(caught.value)
    assert shard_bytes(config.output) == before


def test_a_teacher_without_safetensors_is_refused(config: PrecomputeConfig, tmp_path: Path, llava_dir: Path) -> None:
    bare = shutil.copytree(llava_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        score(config.model_copy(update={"teacher": bare}))


def test_a_teacher_that_is_not_there_is_named(config: PrecomputeConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        score(config.model_copy(update={"teacher": tmp_path / "nowhere"}))
