"""A conversation in the terminal: what a model is asked, what is printed, kept and saved, and what an error leaves."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from common.data.dataset import Dataset
from common.data.samples import Turn
from common.errors import DataError
from use.chat import Conversation, ask_once, run_chat
from use.chat_model import Sampling


class Echo:
    """Answers with the number of turns and images that it was asked with; an escape sequence is in each answer."""

    def __init__(self, path: Path, *, takes_images: bool = True) -> None:
        self.path = path
        self.takes_images = takes_images
        self.asked: list[tuple[list[Turn], list[Path]]] = []

    def answer(self, turns: Sequence[Turn], images: Sequence[Path], sampling: Sampling) -> Iterator[str]:
        if turns[-1].content == "break":
            raise DataError("the model broke")
        self.asked.append((list(turns), list(images)))
        yield from (f"{len(turns)} turns, ", f"{len(images)} images", "\x1b[31m", f", up to {sampling.max_new_tokens}")


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *models: Echo, images: Sequence[Path] = ()) -> list[Conversation]:
    conversations = [Conversation(model, Sampling(7)) for model in models]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    run_chat(conversations, images)
    return conversations


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_history_and_images_are_kept_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    model = Echo(picture.parent / "model")
    lines = f"What?\n\n/image {picture}\nAnd now?\n/reset\nAgain\n"
    chat(monkeypatch, lines, model, images=[picture])
    assert capsys.readouterr().out.splitlines() == [
        "1 turns, 1 images\\x1b[31m, up to 7",
        "3 turns, 2 images\\x1b[31m, up to 7",
        "1 turns, 0 images\\x1b[31m, up to 7",
    ]
    turns, images = model.asked[1]
    assert [(turn.role, turn.content[:12]) for turn in turns] == [
        ("user", "<image>\nWhat"),
        ("assistant", "1 turns, 1 i"),
        ("user", "<image>\nAnd "),
    ]
    assert images == [picture, picture]


def test_an_error_ends_a_question_and_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = "/image /nowhere.png\n/image\n/save\n/save x.json\n/draw\nbreak\nstill there?\n/quit\nnever\n"
    monkeypatch.chdir(tmp_path)
    (conversation,) = chat(monkeypatch, lines, Echo(tmp_path))
    shown = capsys.readouterr()
    assert shown.out.startswith("1 turns, 0 images")
    for message in (
        "/nowhere.png: no such image file",
        "/image needs a file",
        "/save needs a file",
        "there is no conversation to save yet",
        "there is no command /draw",
        "the model broke",
    ):
        assert f"error: {message}" in shown.err
    assert len(conversation.turns) == 2
    assert not list(tmp_path.iterdir())
    chat(monkeypatch, "/image a.png\n", Echo(tmp_path, takes_images=False))
    (tmp_path / "a.png").touch()
    chat(monkeypatch, "/image a.png\n", Echo(tmp_path, takes_images=False))
    assert f"error: {tmp_path}: takes no images; ask without one" in capsys.readouterr().err


def test_a_saved_conversation_is_a_dataset(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    saved = picture.parent / "saved.json"
    models = [Echo(picture.parent / name) for name in ("a", "b")]
    chat(monkeypatch, f"/image {picture}\nWhat?\n/save {saved}\n/save {saved}\n", *models)
    dataset = Dataset.open(saved, "kd")
    assert [dataset[n].id for n in range(len(dataset))] == ["conversation-0", "conversation-1"]
    (turns,) = dataset[0].conversations
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert dataset.images(0)[0].path == str(picture)
    assert len(json.loads(saved.read_text())) == 2


def test_two_models_stand_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models = [Echo(tmp_path / name) for name in ("one", "other")]
    ask_once([Conversation(model, Sampling(7)) for model in models], "What?", [])
    shown = capsys.readouterr().out
    assert shown.count("1 turns, 0 images") == 2
    assert "\x1b[31m" not in shown


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    conversation = Conversation(Echo(tmp_path), Sampling())
    pieces = conversation.ask("What?")
    assert next(pieces) == "1 turns, "
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.turns[-1] == Turn("assistant", "1 turns, ")
