import json
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from common.data.samples import Dataset, ImageRef, Sample, Turn
from common.errors import DataError

QUESTION = {"from": "human", "value": "Why?"}
ANSWER = {"from": "gpt", "value": "So."}
GOOD = {"id": "a", "conversations": [QUESTION, ANSWER]}


def write(directory: Path, records: list[Any], name: str = "data.jsonl") -> Path:
    path = directory / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    return path


def read_single_sample(directory: Path, record: dict[str, Any], kind: Any = "kd") -> Sample:
    dataset = Dataset.open(write(directory, [record]), kind)
    assert len(dataset) == 1
    return dataset[0]


def error_message(directory: Path, record: dict[str, Any], kind: Any = "kd") -> str:
    with pytest.raises(DataError) as caught:
        read_single_sample(directory, record, kind)
    return str(caught.value)


def test_llava_conversations_become_turns_with_their_markers_in_place(tmp_path: Path) -> None:
    record = {
        "id": 7,
        "image": "coco/1.jpg",
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "What is <image> here?"},
            {"from": "gpt", "value": "Ein Kätzchen 🐈"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes"},
        ],
    }
    assert read_single_sample(tmp_path, record) == Sample(
        id="7",
        kind="kd",
        images=(ImageRef("coco/1.jpg"),),
        conversations=(
            (
                Turn("system", "Be short."),
                Turn("user", "What is <image> here?"),
                Turn("assistant", "Ein Kätzchen 🐈"),
                Turn("user", "Sure?"),
                Turn("assistant", "Yes"),
            ),
        ),
    )


def test_messages_take_list_content_whose_image_parts_become_markers(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "Left "},
        {"type": "image"},
        {"type": "text", "text": " or "},
        {"type": "image"},
    ]
    record = {
        "id": "m",
        "images": [{"path": "l.png"}, "r.png"],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "Left"}]},
        ],
    }
    sample = read_single_sample(tmp_path, record)
    assert sample.images == (ImageRef("l.png"), ImageRef("r.png"))
    assert sample.conversations == ((Turn("user", "Left <image> or <image>"), Turn("assistant", "Left")),)


def test_preference_lists_and_strings_give_the_same_pair(tmp_path: Path) -> None:
    strings = {"id": "p", "image": "i.png", "question": "Why?", "chosen": "Good.", "rejected": "Bad."}
    lists = {
        "id": "p",
        "image": ["i.png"],
        "chosen": [QUESTION, {"from": "gpt", "value": "Good."}],
        "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Bad."}],
    }
    answers_alone = {
        "id": "p",
        "images": ["i.png"],
        "question": "Why?",
        "chosen": [{"from": "gpt", "value": "Good."}],
        "rejected": [{"from": "gpt", "value": "Bad."}],
    }
    expected = Sample(
        id="p",
        kind="dpo",
        images=(ImageRef("i.png"),),
        conversations=tuple((Turn("user", "<image>\nWhy?"), Turn("assistant", text)) for text in ("Good.", "Bad.")),
    )
    for record in (strings, lists, answers_alone):
        assert read_single_sample(tmp_path, record, "dpo") == expected


def test_unmarked_images_go_before_the_first_user_turn(tmp_path: Path) -> None:
    conversation = [{"from": "system", "value": "S"}, QUESTION, ANSWER, QUESTION, ANSWER]
    sample = read_single_sample(tmp_path, {"id": "a", "image": ["1", "2"], "conversations": conversation})
    assert [turn.content for turn in sample.conversations[0]] == ["S", "<image>\n<image>\nWhy?", "So.", "Why?", "So."]


def test_text_alone_needs_no_image_key(tmp_path: Path) -> None:
    extras: tuple[dict[str, Any], ...] = ({}, {"image": None}, {"images": []})
    for extra in extras:
        assert read_single_sample(tmp_path, GOOD | extra).images == ()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image": ["1", "2"], "conversations": [{"from": "human", "value": "<image>"}, ANSWER]}, "1 <image> marker"),
        ({"conversations": [{"from": "human", "value": "<image>"}, ANSWER]}, "but 0 image"),
        ({"conversations": []}, "non-empty list"),
        ({"conversations": "hello"}, "found str"),
        ({"conversations": ["hello"]}, "turn 0: found str"),
        ({"conversations": [QUESTION, {"from": "tool", "value": "x"}]}, "turn 1: role 'tool'"),
        ({"conversations": [QUESTION, {"from": ["gpt"], "value": "x"}]}, "turn 1: role ['gpt']"),
        ({"conversations": [QUESTION, {"from": "gpt"}]}, "turn 1: content is NoneType"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": 3}]}, "content is int"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": [{"type": "video"}]}]}, "'video'"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": [{"type": "text"}]}]}, "content part"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": [{"type": "text", "text": None}]}]}, "content part"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": ["x"]}]}, "content part 'x'"),
        ({"image": ""}, "expected a path"),
        ({"image": [{"bytes": "x"}]}, "expected a path"),
        ({"image": "x", "conversations": [ANSWER]}, "no user turn"),
    ],
)
def test_a_bad_sample_is_refused_by_id_line_and_finding(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    message = error_message(tmp_path, GOOD | change)
    assert all(part in message for part in (str(tmp_path / "data.jsonl"), "'a'", "line 1", found)), message


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"chosen": "x"}, "question"),
        ({"rejected": [QUESTION]}, "rejected: the last turn is user's"),
        ({"chosen": [QUESTION, ANSWER, QUESTION]}, "the last turn is user's"),
        ({"chosen": [{"from": "human", "value": "Other?"}, ANSWER]}, "share every turn but the last"),
    ],
)
def test_a_bad_pair_is_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    pair = {"id": "a", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}
    assert read_single_sample(tmp_path, pair, "dpo")
    assert found in error_message(tmp_path, pair | change, "dpo")


def test_samples_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    assert 'kind = "dpo"' in error_message(tmp_path, GOOD, "dpo")
    assert 'kind = "kd"' in error_message(tmp_path, {"id": "a", "question": "q", "chosen": "x", "rejected": "y"}, "kd")
    assert "expected conversations" in error_message(tmp_path, {"id": "a", "text": "x"})


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for record in (
        GOOD | {"conversations": [QUESTION, {"from": "gpt", "value": "cut \ud83d"}]},
        GOOD | {"id": "\udc00"},
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(DataError, match="lone surrogate"):
            Dataset.open(path, "kd")[0]


@pytest.mark.parametrize("bad", ['{"id": "b", }', '{"id": "b"', "b", '{"id": "b"} {}', "[" * 200_000])
def test_broken_json_is_named_with_its_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + bad + "\n" + json.dumps(GOOD | {"id": "c"}) + "\n")
    with pytest.raises(DataError, match=rf"{path}: line 3\b"):
        Dataset.open(path, "kd")


def test_broken_json_in_an_array_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, GOOD | {"id": "b"}], "data.json")
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"b"' in line)
    lines[number] = ' "id": b,'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"line {number + 1}, column 8"):
        Dataset.open(path, "kd")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, [GOOD, GOOD | {"id": "Grün"}], name)
    data = path.read_bytes()
    path.write_bytes(data.replace("ü".encode(), b"\xfc"))
    line = data[: data.index("ü".encode())].count(b"\n") + 1
    with pytest.raises(DataError, match=f"line {line}: not UTF-8"):
        Dataset.open(path, "kd")


@pytest.mark.parametrize(
    ("name", "places"), [("data.jsonl", ("line 1", "line 3")), ("data.json", ("element 0", "element 2"))]
)
def test_duplicate_ids_are_named_with_both_places(tmp_path: Path, name: str, places: tuple[str, str]) -> None:
    path = write(tmp_path, [GOOD | {"id": 1}, GOOD | {"id": "b"}, GOOD | {"id": "1"}], name)
    with pytest.raises(DataError, match=f"{places[0]} and again at {places[1]}"):
        Dataset.open(path, "kd")


@pytest.mark.parametrize("record", [{"conversations": []}, {"id": ""}, {"id": None}, {"id": 1.5}, [1], 3])
def test_a_record_without_an_id_is_refused(tmp_path: Path, record: Any) -> None:
    for name, place in (("data.jsonl", "line 2"), ("data.json", "element 1")):
        with pytest.raises(DataError, match=place):
            Dataset.open(write(tmp_path, [GOOD, record], name), "kd")


@pytest.mark.parametrize(("name", "text"), [("data.jsonl", ""), ("data.jsonl", "\n \r\n"), ("data.json", "[]")])
def test_an_empty_dataset_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="empty"):
        Dataset.open(tmp_path / name, "kd")


def test_a_file_that_is_missing_or_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Dataset.open(tmp_path / "none.jsonl", "kd")
    (tmp_path / "data.json").write_text('{"id": 1}')
    with pytest.raises(DataError, match="expected an array"):
        Dataset.open(tmp_path / "data.json", "kd")


def test_array_lines_windows_lines_and_compressed_lines_hold_the_same_samples(tmp_path: Path) -> None:
    records = [GOOD | {"id": f"ключ {i}", "image": f"図/{i}.png"} for i in range(5)]
    plain = write(tmp_path, records)
    data = plain.read_bytes()
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n").rstrip())
    packed = tmp_path / "packed.jsonl.zst"
    packed.write_bytes(zstandard.compress(data))
    split = tmp_path / "split.jsonl.zst"  # as `cat a.zst b.zst` makes it
    split.write_bytes(zstandard.compress(data[:100]) + zstandard.compress(data[100:]))
    paths = [plain, write(tmp_path, records, "data.json"), windows, packed, split]
    datasets = [Dataset.open(path, "kd") for path in paths]
    for dataset in datasets:
        assert dataset.ids == tuple(record["id"] for record in records)
        assert [dataset[i] for i in range(5)] == [datasets[0][i] for i in range(5)]
    assert datasets[0].sha256 == datasets[3].sha256 == datasets[4].sha256 != datasets[1].sha256


def test_compressed_data_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    data = b"".join(json.dumps(GOOD | {"id": i}).encode() + b"\n" for i in range(20_000))
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    path = tmp_path / "data.jsonl.zst"
    for cut in (len(packed) // 2, len(packed) - 1, 3):
        path.write_bytes(packed[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            Dataset.open(path, "kd")


def test_twenty_thousand_lines_are_indexed_in_well_under_a_second(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD | {"id": i} for i in range(20_000)])
    start = time.process_time()
    dataset = Dataset.open(path, "kd")
    assert time.process_time() - start < 0.8
    assert dataset[19_999].id == "19999"
