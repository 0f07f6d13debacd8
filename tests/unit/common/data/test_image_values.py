"""Images in records and in content parts: paths, data: URIs, base64, bytes, objects; nothing is downloaded."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from common.data.dataset import Dataset
from common.data.samples import ImageRef, Sample
from common.errors import DataError

# Begins as a PNG does. What follows is not read here.
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(60))
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(80))
ENCODED = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{ENCODED}"
ANSWER = {"role": "assistant", "content": "Red."}


def read(directory: Path, record: dict[str, Any], kind: Any = "kd") -> Sample:
    path = directory / "data.jsonl"
    path.write_text(json.dumps({"id": "a"} | record))
    dataset = Dataset.open(path, kind)
    sample = dataset[0]
    assert dataset.images(0) == sample.images
    return sample


def ask(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("coco/x.jpg", ImageRef("coco/x.jpg")),
        ("a.jpg ", ImageRef("a.jpg ")),
        ("x" * 300 + ".jpg", ImageRef("x" * 300 + ".jpg")),
        ("a/" * 60 + "b", ImageRef("a/" * 60 + "b")),
        ("file:///data/my%20pic.png", ImageRef("/data/my pic.png")),
        ("file://localhost/data/a.png", ImageRef("/data/a.png")),
        (URI, ImageRef(None, PNG)),
        (ENCODED, ImageRef(None, PNG)),
        (base64.encodebytes(JPEG).decode(), ImageRef(None, JPEG)),
        ({"path": "a.jpg", "bytes": None}, ImageRef("a.jpg")),
        ({"path": None, "bytes": ENCODED}, ImageRef(None, PNG)),
        ({"path": "missing.png", "bytes": ENCODED}, ImageRef("missing.png", PNG)),
        ({"url": URI}, ImageRef(None, PNG)),
        (["a.jpg", {"bytes": ENCODED}], (ImageRef("a.jpg"), ImageRef(None, PNG))),
    ],
)
def test_an_image_is_read_in_every_form(tmp_path: Path, value: Any, expected: Any) -> None:
    record = {"conversations": [{"from": "human", "value": "c?"}, {"from": "gpt", "value": "Red."}], "image": value}
    assert read(tmp_path, record).images == (expected if isinstance(expected, tuple) else (expected,))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("https://example.com/x.jpg", "'https://example.com/x.jpg' is on the web, and nothing is downloaded"),
        ({"url": "http://example.com/x.jpg"}, "is on the web"),
        ("data:image/png,abc", "expected data:image/...;base64"),
        ("data:image/png;base64,a$b", "is no base64"),
        ({"bytes": "not base64!"}, "is no base64"),
        ({"path": "a.jpg", "url": "b.jpg"}, "is given twice, and differently"),
        ([None], "image None; expected a path, bytes, base64 or a data: URI"),
        ([{}], "image {}; expected a path"),
        ([7], "image 7; expected a path"),
    ],
)
def test_a_value_that_names_no_image_here_is_refused(tmp_path: Path, value: Any, found: str) -> None:
    with pytest.raises(DataError, match="sample 'a'") as caught:
        read(tmp_path, ask("c?") | {"image": value})
    assert found in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 600


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "image": "a.jpg"}, ImageRef("a.jpg")),
        ({"type": "image", "path": "a.jpg", "text": None}, ImageRef("a.jpg")),
        ({"type": "image", "base64": ENCODED}, ImageRef(None, PNG)),
        ({"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}, ImageRef("a.jpg")),
        ({"type": "image_url", "image_url": {"url": URI}}, ImageRef(None, PNG)),
        ({"type": "input_image", "image_url": URI}, ImageRef(None, PNG)),
    ],
)
def test_a_content_part_may_hold_its_image(tmp_path: Path, part: dict[str, Any], expected: ImageRef) -> None:
    text = {"type": "input_text", "text": "Which colour?"}
    sample = read(tmp_path, ask(text, part))
    assert sample.images == (expected,)
    assert sample.conversations[0][0].content == "Which colour?<image>"
    # The same image beside the turns is no other one.
    if expected.path is not None:
        assert read(tmp_path, ask(text, part) | {"images": [expected.path]}) == sample
    pair = {"prompt": [{"role": "user", "content": [part, text]}], "chosen": "Red.", "rejected": "Blue."}
    assert read(tmp_path, pair, "dpo").images == (expected,)


def test_parts_without_an_image_take_those_of_the_record_in_order(tmp_path: Path) -> None:
    parts = [{"type": "image", "index": 0, "text": None}, "left", {"type": "image"}, {"type": "text", "text": "right"}]
    sample = read(tmp_path, ask(*parts) | {"images": ["l.png", "r.png"]})
    assert sample.images == (ImageRef("l.png"), ImageRef("r.png"))
    assert sample.conversations[0][0].content == "<image>left<image>right"


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (
            ask({"type": "image", "image": "a.jpg"}) | {"images": ["b.jpg"]},
            "beside the turns and in their parts",
        ),
        (ask({"type": "image", "image": "a.jpg"}, {"type": "image"}), "1 of 2 content parts hold their image"),
        (ask({"type": "image_url", "image_url": {"url": "https://x/a.jpg"}}), "is on the web"),
        (ask({"type": "image_url", "image_url": None}), 'expected its address in "image_url"'),
        (ask({"type": "video", "video": "v.mp4"}), "content part {'type': 'video', 'video': 'v.mp4'}"),
        (
            ask({"type": "image"}, "Explain <image> tokens") | {"images": ["a.jpg"]},
            "2 <image> marker(s) but 1 image",
        ),
    ],
)
def test_parts_that_contradict_or_name_no_image_here_are_refused(
    tmp_path: Path, record: dict[str, Any], found: str
) -> None:
    with pytest.raises(DataError, match="sample 'a'") as caught:
        read(tmp_path, record)
    assert found in str(caught.value)


def test_an_empty_path_is_no_image(tmp_path: Path) -> None:
    values: tuple[Any, ...] = ("", None, [])
    for value in values:
        assert read(tmp_path, ask("c?") | {"image": value}).images == ()
    assert read(tmp_path, ask("c?") | {"image": "", "images": ["a.jpg"]}).images == (ImageRef("a.jpg"),)
