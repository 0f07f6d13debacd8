"""Every sample of a run is looked at before its first step; bad ones stop it, or are skipped up to a limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.data.chat_encoding import ChatEncoder
from common.errors import ConfigError, DataError
from precompute.logits.run import run_capture
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.preflight import Ranks, find_bad_samples
from train.data.sources import DatasetSource, ExampleSource, ShardSource

ALONE = Ranks(0, 1, lambda value: [value])


def make_collator(model: Path, root: Path, max_tokens: int = 512) -> Collator:
    encoder = ChatEncoder.load(model)
    student = StudentInputs(ImageCache.load(model, "pad"), encoder.image_token_id, 0)
    return Collator(student, kind="kd", image_root=root, max_tokens=max_tokens)


def write(root: Path, records: list[dict[str, Any]]) -> Path:
    path = root / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_dataset(model: Path, root: Path, damage: Callable[[list[dict[str, Any]]], object]) -> DatasetSource:
    records = conversation_records(root, 8)
    damage(records)
    return DatasetSource(write(root, records), "kd", ChatEncoder.load(model))


def find(source: ExampleSource, collator: Collator, num_workers: int = 0) -> list[tuple[int, str]]:
    bad = find_bad_samples(source, collator, ALONE, num_workers=num_workers, progress=False)
    return [(sample.position, sample.reason) for sample in bad]


DAMAGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "missing image": (lambda records: records[5].update(image=["5-0.png", "gone.png"]), r"gone\.png does not exist"),
    "no assistant turn": (
        lambda records: records[5].update(conversations=records[5]["conversations"][:1]),
        "nothing to score",
    ),
    "too long": (
        lambda records: records[5]["conversations"][1].update(value="x" * 600),
        r"[\d,]+ tokens for this student, images included; data.max_tokens is 512; .*on_bad_sample",
    ),
    "video": (lambda records: records[5].update(video="v.mp4"), '"video" is given'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_sample_is_found_wherever_it_stands(tmp_path: Path, llava_dir: Path, name: str) -> None:
    damage, found = DAMAGES[name]
    ((position, reason),) = find(open_dataset(llava_dir, tmp_path, damage), make_collator(llava_dir, tmp_path))
    assert position == 5
    assert "sample 's5'" in reason
    with pytest.raises(DataError, match=found):
        raise DataError(reason)


def test_an_image_that_is_none_is_found_without_decoding_the_others(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(llava_dir, tmp_path, lambda _: None)
    (tmp_path / "4-0.png").write_bytes(b"no picture")
    monkeypatch.setattr("PIL.Image.Image.load", lambda *_: pytest.fail("pixels were decoded"))
    ((position, reason),) = find(source, make_collator(llava_dir, tmp_path))
    assert position == 4
    assert "4-0.png cannot be decoded" in reason


def test_ranks_share_the_work_and_all_get_the_whole_list(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.preflight._BLOCK", 2)

    def damage(records: list[dict[str, Any]]) -> None:
        for number in (0, 3, 7):
            records[number]["image"] = "gone.png"

    source, collator = open_dataset(llava_dir, tmp_path, damage), make_collator(llava_dir, tmp_path)
    parts: list[Any] = []
    for rank in (0, 1):

        def collect(value: Any) -> list[Any]:
            parts.append(value)
            return [value]

        find_bad_samples(source, collator, Ranks(rank, 2, collect), num_workers=0, progress=False)
    assert [[bad.position for bad in found] for found, _, _ in parts] == [[0], [3, 7]]
    whole = find_bad_samples(source, collator, Ranks(0, 2, lambda _: parts), num_workers=0, progress=False)
    assert [bad.position for bad in whole] == [0, 3, 7]


def test_an_error_of_one_rank_is_raised_on_every_rank(tmp_path: Path, llava_dir: Path) -> None:
    source = open_dataset(llava_dir, tmp_path, lambda _: None)
    failed: tuple[list[Any], int, ConfigError] = ([], 0, ConfigError("shard 3 is damaged"))
    ranks = Ranks(0, 2, lambda value: [value, failed])
    with pytest.raises(ConfigError, match="shard 3 is damaged"):
        find_bad_samples(source, make_collator(llava_dir, tmp_path), ranks, num_workers=0, progress=False)


def test_a_template_that_refuses_every_sample_is_an_error_of_the_configuration(tmp_path: Path, llava_dir: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('never') }}")
    source = DatasetSource(
        write(tmp_path, conversation_records(tmp_path, 3)), "kd", ChatEncoder.load(llava_dir, template)
    )
    with pytest.raises(ConfigError, match=r"refuses every sample, such as: .*never"):
        find(source, make_collator(llava_dir, tmp_path))


def test_shards_are_checked_without_decoding_scores(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 8))
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    (tmp_path / "4-0.png").unlink()
    source = ShardSource(config.output, ChatEncoder.load(llava_dir), "pad")
    monkeypatch.setattr("common.shards.score_shard.unpack", lambda *_: pytest.fail("scores were decoded"))
    ((position, reason),) = find(source, make_collator(llava_dir, tmp_path))
    assert position == 4
    assert "4-0.png does not exist" in reason
    lengths = [len(source.read_unscored(i).conversations[0].input_ids) for i in range(8)]
    monkeypatch.undo()
    assert lengths == [len(source[i].conversations[0].input_ids) for i in range(8)]
    limited = make_collator(llava_dir, tmp_path, max_tokens=30)
    assert len(find(source, limited)) > 1
