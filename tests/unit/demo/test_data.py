"""Files of the demo's dataset: splits, answers, pairs, and determinism."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from common.data.dataset import Dataset
from demo.data import DemoData, contradicts, named_digit, read_lines, write_dataset

pytestmark = pytest.mark.slow

TRUTH = [int(digit) for digit in load_digits().target]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_dataset(tmp_path_factory.mktemp("data"), seed=3)


def image_names(path: Path) -> set[str]:
    return {line["image"] for line in read_lines(path)}


def true_digit(image: str) -> int:
    return TRUTH[int(Path(image).stem)]


def answers(turns: list[dict[str, str]]) -> list[str]:
    return [turn["value"] for turn in turns if turn["from"] == "gpt"]


def test_no_held_out_image_occurs_in_a_training_file(data: DemoData) -> None:
    held_out = [path for path in data.files if path.stem.startswith("test")]
    test = set().union(*map(image_names, held_out))
    train = set().union(*(image_names(path) for path in data.files if path not in held_out))
    assert not train & test
    assert len(train) == data.num_train_images
    assert len(test) == data.num_test_images
    assert len(train | test) == len(TRUTH)


def test_a_fifth_of_the_images_of_every_digit_is_held_out(data: DemoData) -> None:
    held_out = Counter(true_digit(image) for image in image_names(data.test_questions))
    for digit, total in Counter(TRUTH).items():
        assert abs(held_out[digit] - total / 5) <= 0.5


def test_the_student_sees_some_of_the_teachers_conversations(data: DemoData) -> None:
    student, teacher = read_lines(data.student_conversations), read_lines(data.train_conversations)
    assert all(line in teacher for line in student[:50])
    assert {line["id"] for line in student} < {line["id"] for line in teacher}
    assert len(image_names(data.student_conversations)) == data.num_student_images


@pytest.mark.slow
def test_one_seed_gives_the_same_bytes_and_another_seed_others(data: DemoData, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", seed=3)
    other = write_dataset(tmp_path / "other", seed=4)
    written = sorted(path.relative_to(data.root) for path in data.root.rglob("*") if path.is_file())
    assert len(written) == len(TRUTH) + 7
    for name in written:
        assert (data.root / name).read_bytes() == (again.root / name).read_bytes()
    assert image_names(data.test_questions) != image_names(other.test_questions)


def test_an_image_keeps_the_shades_of_its_digit(data: DemoData) -> None:
    for index in (0, 700, 1796):
        with Image.open(data.root / f"images/{index:04d}.png") as image:
            assert (image.mode, image.size) == ("RGB", (56, 56))
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float) / 255
        assert np.corrcoef(small.ravel(), load_digits().data[index])[0, 1] > 0.97


def test_every_answer_of_every_conversation_is_true(data: DemoData) -> None:
    for path in data.files:
        for line in read_lines(path):
            for answer in answers(line.get("conversations", [])):
                assert not contradicts(answer, true_digit(line["image"])), (line["id"], answer)


def test_answers_state_parity_and_size_correctly(data: DemoData) -> None:
    for line in read_lines(data.train_conversations):
        digit = true_digit(line["image"])
        for answer in answers(line["conversations"]):
            if match := re.search(r"\b(even|odd)\b", answer):
                assert match[1] == ("even", "odd")[digit % 2]
            if "larger" in answer:
                assert answer.startswith("Yes") == ("not larger" not in answer) == (digit > 5)


def test_chosen_names_the_right_digit_and_rejected_a_wrong_one_in_the_same_words(data: DemoData) -> None:
    for path in (data.train_preferences, data.test_preferences):
        for line in read_lines(path):
            digit = true_digit(line["image"])
            (chosen,), (rejected,) = answers(line["chosen"]), answers(line["rejected"])
            wrong = named_digit(rejected)
            assert named_digit(chosen) == digit
            assert wrong is not None
            assert wrong != digit
            assert line["chosen"][0] == line["rejected"][0]
            assert len(chosen.split()) == len(rejected.split())


def test_a_question_has_the_digit_of_its_image_and_names_it_in_the_answer(data: DemoData) -> None:
    lines = read_lines(data.test_questions)
    assert len(lines) == data.num_test_images
    for line in lines:
        assert line["digit"] == true_digit(line["image"])
        assert [named_digit(answer) for answer in answers(line["conversations"])] == [line["digit"]]
    assert len({line["conversations"][0]["value"] for line in lines}) == 5


def test_the_pipeline_reads_every_file_and_finds_every_image(data: DemoData) -> None:
    for path in data.files:
        dataset = Dataset.open(path, "dpo" if "preferences" in path.stem else "kd")
        assert len(dataset) == len(read_lines(path))
        for index in range(0, len(dataset), 97):
            (image,) = dataset[index].images
            assert image.path is not None
            assert (data.root / image.path).is_file()


def test_conversations_have_one_and_two_turns_in_many_wordings(data: DemoData) -> None:
    lines = read_lines(data.train_conversations)
    assert {len(answers(line["conversations"])) for line in lines} == {1, 2}
    assert len({answer for line in lines for answer in answers(line["conversations"])}) > 80
    assert json.loads(data.train_conversations.read_text("utf-8")) == lines


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("A handwritten seven.", 7),
        ("This is the digit 7.", 7),
        ("It is an eight", 8),
        ("No, ZERO is not larger.", 0),
        ("3", 3),
        ("three, the digit 3", 3),
        ("It is even.", None),
        ("It is a 17.", None),
        ("It is a sevenn.", None),
        ("It is a three or a five.", None),
        ("", None),
    ],
)
def test_the_named_digit_is_read_from_word_or_numeral(text: str, digit: int | None) -> None:
    assert named_digit(text) == digit


@pytest.mark.parametrize(
    ("answer", "digit", "untrue"),
    [
        ("It is a three.", 3, False),
        ("It is a three.", 5, True),
        ("It is odd.", 3, False),
        ("It is odd.", 4, True),
        ("Yes, it is larger.", 6, False),
        ("Yes, it is larger.", 5, True),
        ("No, it is not larger.", 5, False),
        ("No, six is not larger.", 6, True),
        ("The number 4 is even.", 6, True),
    ],
)
def test_an_answer_contradicts_a_digit_if_it_is_untrue_of_it(answer: str, digit: int, untrue: bool) -> None:
    assert contradicts(answer, digit) is untrue
