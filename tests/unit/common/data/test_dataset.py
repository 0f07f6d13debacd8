import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from common.data.dataset import Dataset
from common.data.samples import ImageRef, Sample, Turn
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
        source_id="7",
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
        source_id="p",
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
        ({"conversations": [QUESTION, {"from": "gpt", "value": [3]}]}, "content part 3"),
        ({"image": [{"bytes": "x"}]}, "no base64"),
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


MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
NULL_TURNS = [{"from": None, "value": None, **message} for message in MESSAGES]
PLAIN = (Turn("user", "Why?"), Turn("assistant", "So."))
MARKED = (Turn("user", "<image>\nWhy?"), Turn("assistant", "So."))


@pytest.mark.parametrize(
    ("record", "images", "turns"),
    [
        ({"image": "a.jpg", "images": None, "conversations": [QUESTION, ANSWER], "messages": None}, ("a.jpg",), MARKED),
        ({"image": "a.jpg", "images": [], "conversations": [QUESTION, ANSWER]}, ("a.jpg",), MARKED),
        ({"image": None, "images": ["a.jpg"], "conversations": None, "messages": MESSAGES}, ("a.jpg",), MARKED),
        ({"image": [], "images": None, "conversations": [], "messages": MESSAGES}, (), PLAIN),
        ({"messages": NULL_TURNS}, (), PLAIN),
        ({"messages": [{"role": None, "content": None, **turn} for turn in (QUESTION, ANSWER)]}, (), PLAIN),
        ({"messages": [{"value": [], **message} for message in MESSAGES]}, (), PLAIN),
        ({"messages": MESSAGES, "chosen": None, "rejected": None, "system": None, "tools": None}, (), PLAIN),
        ({"messages": MESSAGES, "chosen": [], "rejected": [], "system": "", "tools": []}, (), PLAIN),
        ({"messages": [message | {"tool_calls": None, "name": None} for message in MESSAGES]}, (), PLAIN),
        # Both are given, and mean the same.
        ({"image": "a.jpg", "images": ["a.jpg"], "messages": MESSAGES}, ("a.jpg",), MARKED),
        ({"conversations": [QUESTION, ANSWER], "messages": MESSAGES}, (), PLAIN),
        ({"messages": [{"role": "user", "from": "human", "content": "Why?"}, ANSWER]}, (), PLAIN),
    ],
)
def test_null_and_empty_keys_are_the_same_as_missing_ones(
    tmp_path: Path, record: dict[str, Any], images: tuple[str, ...], turns: tuple[Turn, ...]
) -> None:
    path = write(tmp_path, [{"id": "a"} | record])
    dataset = Dataset.open(path, "kd")
    refs = tuple(map(ImageRef, images))
    assert dataset[0] == Sample(id="a", kind="kd", images=refs, conversations=(turns,), source_id="a")
    assert dataset.images(0) == refs


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image": "a.jpg", "images": ["b.jpg"]}, '"images" and "image" mean the same, but are both given and differ'),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": "No."}]}, '"conversations" and "messages"'),
        ({"conversations": [{"from": "human", "role": "system", "value": "x"}, ANSWER]}, 'turn 0: "from" and "role"'),
        ({"conversations": [QUESTION | {"content": "Who?"}, ANSWER]}, 'turn 0: "value" and "content"'),
        ({"conversations": None}, "expected conversations, messages or chosen/rejected"),
        ({"conversations": [], "messages": None}, "non-empty list"),
        ({"image": ["a.jpg", None]}, "image None; expected a path, bytes"),
    ],
)
def test_alternative_keys_that_differ_are_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    assert found in error_message(tmp_path, GOOD | change)


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


USER = {"role": "user", "content": "Why?"}
USER_PARTS = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("record", "shared"),
    [
        ({"prompt": "Why?", "chosen": "Good.", "rejected": "Bad."}, [("user", "Why?")]),
        ({"prompt": [USER], "chosen": "Good.", "rejected": "Bad."}, [("user", "Why?")]),
        ({"prompt": [USER_PARTS], "chosen": _answer("Good."), "rejected": _answer("Bad.")}, [("user", "Why?")]),
        ({"prompt": "Why?", "chosen": _answer("Good."), "rejected": _answer("Bad.")}, [("user", "Why?")]),
        ({"chosen": [USER, *_answer("Good.")], "rejected": [USER, *_answer("Bad.")]}, [("user", "Why?")]),
        # The prompt stands in both answers too, with a system turn or earlier turns before it.
        (
            {
                "prompt": "Why?",
                "chosen": [SYSTEM, USER, *_answer("Good.")],
                "rejected": [SYSTEM, USER, *_answer("Bad.")],
            },
            [("system", "Be brief."), ("user", "Why?")],
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [*EARLIER, USER, *_answer("Good.")],
                "rejected": [*EARLIER, USER, *_answer("Bad.")],
            },
            [("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")],
        ),
        (
            {"prompt": [SYSTEM, *EARLIER, USER], "chosen": _answer("Good."), "rejected": "Bad."},
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")],
        ),
        (
            {"prompt": "Why?", "question": "Why?", "system": "Be brief.", "chosen": "Good.", "rejected": "Bad."},
            [("system", "Be brief."), ("user", "Why?")],
        ),
        ({"prompt": None, "question": "Why?", "chosen": "Good.", "rejected": "Bad."}, [("user", "Why?")]),
        # The conversation of the chosen answer beside it, and the prompt as a conversation with single turns.
        (
            {
                "prompt": "Why?",
                "messages": [USER, *_answer("Good.")],
                "chosen": [USER, *_answer("Good.")],
                "rejected": [USER, *_answer("Bad.")],
            },
            [("user", "Why?")],
        ),
        (
            {"conversations": [QUESTION], "chosen": _answer("Good.")[0], "rejected": {"from": "gpt", "value": "Bad."}},
            [("user", "Why?")],
        ),
    ],
)
def test_preference_columns_are_read_with_their_prompt(
    tmp_path: Path, record: dict[str, Any], shared: list[tuple[Any, str]]
) -> None:
    sample = read_single_sample(tmp_path, {"id": "p"} | record, "dpo")
    prompt = tuple(Turn(role, text) for role, text in shared)
    assert sample.conversations == tuple((*prompt, Turn("assistant", text)) for text in ("Good.", "Bad."))


def test_images_of_a_prompt_stand_where_its_parts_or_markers_are(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]
    record = {
        "id": "p",
        "images": ["i.png"],
        "prompt": [{"role": "user", "content": parts}],
        "chosen": _answer("A cat."),
        "rejected": _answer("A dog."),
    }
    assert read_single_sample(tmp_path, record, "dpo").conversations[1][0] == Turn("user", "What is <image>?")
    marked = {"from": "human", "value": "<image>\nWhat?"}
    record = {
        "id": "p",
        "image": "i.png",
        "question": "What?",
        "chosen": [marked, *_answer("A cat.")],
        "rejected": [marked, *_answer("A dog.")],
    }
    assert read_single_sample(tmp_path, record, "dpo").conversations[0][0] == Turn("user", "<image>\nWhat?")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rejected": None}, '"rejected" is missing or empty'),
        ({"prompt": None}, 'a "prompt" or a "question" is needed'),
        ({"question": "Who?"}, '"prompt" and "question" mean the same'),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt: turn 0: content is int"),
        (
            {"chosen": [{"role": "user", "content": "Who?"}, *_answer("Good.")]},
            "the prompt beside it is not part of it",
        ),
        (
            {"messages": [{"role": "user", "content": "Who?"}]},
            "the prompt and the conversation are both given and differ",
        ),
        ({"messages": [USER, *_answer("Else.")]}, "a conversation is given beside chosen, and is another one"),
    ],
)
def test_preference_columns_that_contradict_each_other_are_refused(
    tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    record = {"id": "p", "prompt": "Why?", "chosen": "Good.", "rejected": "Bad."}
    assert found in error_message(tmp_path, record | change, "dpo")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image_path": "a.jpg"}, '"image_path" is given, but images are read from "image" or "images"; rename'),
        ({"img": "a.jpg"}, '"img" is given'),
        ({"Image": ["a.jpg"]}, '"Image" is given'),
        ({"image-url": "http://x/a.jpg"}, '"image-url" is given'),
        ({"image": "a.jpg", "image_path": "b.jpg"}, '"image_path" is given'),
        ({"video": "a.mp4"}, '"video" is given, but only images and text are read'),
        ({"videos": ["a.mp4"]}, '"videos" is given'),
        ({"audio": {"array": [0.0]}}, '"audio" is given'),
        ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}, ANSWER]}, "turn 0: holds <video>"),
        ({"conversations": [QUESTION | {"images": ["a.jpg"]}, ANSWER]}, 'turn 0: "images" is given in a turn'),
        ({"conversations": [QUESTION | {"video": "a.mp4"}, ANSWER]}, 'turn 0: "video" is given'),
        ({"video": "a.mp4", "audio": "a.mp3"}, '"audio" is given'),
        ({"tools": [{"name": "search"}]}, '"tools" is given, but calls of tools are not supported'),
        ({"conversations": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]}, 'turn 1: "tool_calls" is given'),
        ({"conversations": [QUESTION, ANSWER | {"reasoning_content": "Hm."}]}, 'turn 1: "reasoning_content" is given'),
        ({"conversations": [QUESTION, ANSWER | {"weight": 0.5}]}, 'turn 1: "weight" is 0.5'),
        ({"conversations": [QUESTION, ANSWER | {"weight": 1, "train": False}]}, "contradict each other"),
        ({"weight": 0.1}, '"weight" is 0.1, but every sample counts alike'),
        ({"conversations": [QUESTION, ANSWER | {"mask": True}]}, 'turn 1: "mask" is True'),
        ({"system": ["Be brief."]}, "\"system\" is ['Be brief.']; expected text"),
        (
            {"system": "Be long.", "conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER]},
            '"system" and the first turn are both given and differ',
        ),
    ],
)
def test_a_key_that_changes_the_meaning_is_refused_by_name(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    assert found in error_message(tmp_path, GOOD | change)


def test_another_spelling_of_an_image_key_is_refused_where_only_images_are_read(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path, [GOOD | {"img": "a.jpg"}]), "kd")
    with pytest.raises(DataError, match='"img" is given'):
        dataset.images(0)


@pytest.mark.parametrize(
    "change",
    [
        {"image_path": None, "video": "", "tools": "[]", "reasoning_content": None},
        {"conversations": [QUESTION, ANSWER | {"weight": 1, "train": True, "loss": 1.0, "training": None}]},
        {"conversations": [QUESTION | {"weight": 0}, ANSWER]},
    ],
)
def test_keys_that_change_nothing_are_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read_single_sample(tmp_path, GOOD | change) == read_single_sample(tmp_path, GOOD)


@pytest.mark.parametrize("other", [{"image_path": "a.jpg"}, {"img": ["a.jpg"]}, {"image_url": "https://x/1.jpg"}])
def test_other_image_keys_may_repeat_the_path_or_name_its_source(tmp_path: Path, other: dict[str, Any]) -> None:
    assert read_single_sample(tmp_path, GOOD | {"image": "a.jpg"} | other).images == (ImageRef("a.jpg"),)


def test_texts_about_html_may_hold_media_tags(tmp_path: Path) -> None:
    question = {"from": "human", "value": "Is <video></video> right?"}
    record = GOOD | {"conversations": [question, {"from": "gpt", "value": "Use <audio>."}]}
    assert [turn.content for turn in read_single_sample(tmp_path, record).conversations[0]] == [
        "Is <video></video> right?",
        "Use <audio>.",
    ]


def test_a_system_column_is_the_first_turn_once(tmp_path: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    expected = (Turn("system", "Be brief."), *PLAIN)
    for turns in ([QUESTION, ANSWER], [system, QUESTION, ANSWER]):
        record = GOOD | {"system": "Be brief.", "conversations": turns}
        assert read_single_sample(tmp_path, record).conversations == (expected,)


def test_unused_keys_are_logged_once_with_their_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [QUESTION | {"emotion": "glad"}, ANSWER | {"emotion": None}]
    records = [GOOD | {"id": i, "source": "x", "width": 3, "topic": "t", "conversations": turns} for i in range(1200)]
    records[0]["grade"] = 1
    path = write(tmp_path, records)
    with caplog.at_level(logging.INFO, "common"):
        Dataset.open(path, "kd")[0]
        assert caplog.messages == [f"{path}: not used: keys conversations.emotion (1,200), topic (1,200), grade (1)"]
        caplog.clear()
        Dataset.open(write(tmp_path, [GOOD | {"source": "x", "extra": None}]), "kd")
        assert not caplog.messages


@pytest.mark.parametrize(
    "change",
    [
        {"id": "i" * 10**5, "image": [""]},
        {"image": ["a.jpg", {"path": ["b" * 10**5]}]},
        {"conversations": [{"from": "r" * 10**5, "value": "x"}]},
        {"conversations": [{"from": "human", "value": [{"type": "x", "data": "d" * 10**5}]}]},
        {"conversations": None, **{f"key {i}": 1 for i in range(1000)}},
        {"conversations": [ANSWER | {"weight": "w" * 10**5}]},
        {"conversations": [ANSWER | {"mask": ["m"] * 10**5}]},
        {"system": ["s" * 10**5]},
    ],
)
def test_long_values_are_cut_in_messages(tmp_path: Path, change: dict[str, Any]) -> None:
    message = error_message(tmp_path, GOOD | change)
    assert " ..." in message
    assert len(message) < len(str(tmp_path)) + 800


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
def test_strict_ids_are_unique(tmp_path: Path, name: str, places: tuple[str, str]) -> None:
    path = write(tmp_path, [GOOD | {"id": 1}, GOOD | {"id": "b"}, GOOD | {"id": "1"}], name)
    with pytest.raises(DataError, match=f"{places[0]} and again at {places[1]}"):
        Dataset.open(path, "kd", "strict")


@pytest.mark.parametrize("record", [{"conversations": []}, {"id": ""}, {"id": None}, {"id": True}, {"id": ["a"]}])
def test_strict_ids_are_there(tmp_path: Path, record: Any) -> None:
    for name, place in (("data.jsonl", "line 2"), ("data.json", "element 1")):
        with pytest.raises(DataError, match=f'{place}: no "id"'):
            Dataset.open(write(tmp_path, [GOOD, record], name), "kd", "strict")
    with pytest.raises(DataError, match="ids are read from question_id"):
        Dataset.open(write(tmp_path, [GOOD, {"question_id": 3}]), "kd", "strict")


@pytest.mark.parametrize("record", [[1], 3, "a", None])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, record: Any) -> None:
    for name, place in (("data.jsonl", "line 2"), ("data.json", "element 1")):
        with pytest.raises(DataError, match=f"{place}: found {type(record).__name__}, expected a JSON object"):
            Dataset.open(write(tmp_path, [GOOD, record], name), "kd")


def _without_id(**keys: Any) -> dict[str, Any]:
    return {"conversations": [QUESTION, ANSWER], **keys}


@pytest.mark.parametrize(
    ("records", "ids", "sources"),
    [
        ([_without_id(id=0), _without_id(id=-7), _without_id(id="x")], ["0", "-7", "x"], ["0", "-7", "x"]),
        ([_without_id(id=1.0), _without_id(id=2.5)], ["1", "2.5"], ["1", "2.5"]),
        ([_without_id(), _without_id(id=None), _without_id(id=True)], ["@0", "@1", "@2"], [None, None, None]),
        ([_without_id(id="a"), _without_id(id="a"), _without_id(id="a")], ["a", "a@1", "a@2"], ["a", "a", "a"]),
        ([_without_id(question_id=3), _without_id(uid="x"), _without_id(idx=0)], ["3", "x", "0"], ["3", "x", "0"]),
        ([_without_id(id=1, idx=5), _without_id(id=None, idx=1)], ["1", "1@1"], ["1", "1"]),
        # The text that would be made is the id of another record.
        ([_without_id(id="a@2"), _without_id(id="a"), _without_id(id="a")], ["a@2", "a", "a@2@"], ["a@2", "a", "a"]),
        ([_without_id(id="@1"), _without_id()], ["@1", "@1@"], ["@1", None]),
        ([_without_id(id="ключ"), _without_id(id="ключ")], ["ключ", "ключ@1"], ["ключ", "ключ"]),
    ],
)
def test_ids_are_made_unique_by_position_and_the_source_is_kept(
    tmp_path: Path, records: list[dict[str, Any]], ids: list[str], sources: list[str | None]
) -> None:
    for name in ("data.jsonl", "data.json"):
        dataset = Dataset.open(write(tmp_path, records, name), "kd")
        samples = [dataset[i] for i in range(len(records))]
        assert [(sample.id, sample.source_id) for sample in samples] == list(zip(ids, sources, strict=True))
        assert list(dataset.ids) == ids


def test_made_ids_are_said_once_with_their_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [_without_id(id="a"), _without_id(id="a"), _without_id(), _without_id(uid="u"), _without_id(id="b")]
    path = write(tmp_path, records)
    with caplog.at_level(logging.INFO, "common"):
        Dataset.open(path, "kd")
    assert caplog.messages == [
        f"{path}: ids are read from uid (1)",
        f"{path}: 1 of 5 records have no id; they are called by their positions, such as @2",
        f"{path}: 1 of 5 records repeat an earlier id; their positions are added, as in a@1",
    ]


def test_a_turn_whose_flag_is_0_is_not_scored(tmp_path: Path) -> None:
    for flag in ({"weight": 0}, {"train": False}, {"loss": 0.0}, {"training": False}, {"mask": 0, "loss": False}):
        record = GOOD | {"conversations": [QUESTION, ANSWER | flag, QUESTION, ANSWER | {"weight": 1}]}
        (turns,) = read_single_sample(tmp_path, record).conversations
        assert [turn.scored for turn in turns] == [True, False, True, True]


@pytest.mark.parametrize(
    ("name", "text"), [("data.jsonl", ""), ("data.json", ""), ("data.jsonl", "\n \r\n"), ("data.json", "[]")]
)
def test_an_empty_dataset_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="empty"):
        Dataset.open(tmp_path / name, "kd")


def test_a_file_that_is_missing_or_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Dataset.open(tmp_path / "none.jsonl", "kd")
    (tmp_path / "data.json").write_text('"id"')
    with pytest.raises(DataError, match="found a JSON str, expected an array of samples, or one sample a line"):
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
    zipped = tmp_path / "zipped.jsonl.gz"
    zipped.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    paths = [plain, write(tmp_path, records, "data.json"), windows, packed, split, zipped]
    datasets = [Dataset.open(path, "kd") for path in paths]
    for dataset in datasets:
        assert tuple(dataset.ids) == tuple(record["id"] for record in records)
        assert [dataset[i] for i in range(5)] == [datasets[0][i] for i in range(5)]
    assert datasets[0].sha256 == datasets[3].sha256 == datasets[4].sha256 == datasets[5].sha256 != datasets[1].sha256


def test_twenty_thousand_lines_are_indexed_in_well_under_a_second(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD | {"id": i} for i in range(20_000)])
    start = time.process_time()
    dataset = Dataset.open(path, "kd")
    assert time.process_time() - start < 0.8
    assert dataset[19_999].id == "19999"
