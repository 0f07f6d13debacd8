"""Questions, conversations and preference pairs about scikit-learn's handwritten digits.

The images are the 1,797 real digits of `sklearn.datasets.load_digits` (8 x 8 pixels, 17 shades). A fifth of them, the
same share of each digit, is held out: no held-out image occurs in a training file. The choice of held-out images, all
texts, and every byte written are functions of the seed alone.

```
load_digits ── images/*.png
            ├─ training images ─┬─ train_captions.jsonl        a description of each, for a fresh adapter
            │                   ├─ train_conversations.json    what the teacher learns from
            │                   ├─ student_conversations.json  those of some of the images, for the student
            │                   └─ train_preferences.jsonl     the rejected answer names a wrong digit
            └─ held-out images ─── test_conversations.jsonl, test_questions.jsonl, test_preferences.jsonl
```
Images are named relative to the folder that holds the files. Axes: N images, F pixels of an image (64),
K training images.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

IMAGE_SIZE = 56
TEST_SHARE = 0.2
STUDENT_SHARE = 0.3
CONVERSATIONS_PER_IMAGE = 3
# More tokens than the longest answer has.
MAX_NEW_TOKENS = 24

Line = dict[str, Any]

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT = re.compile(rf"\b(?:{'|'.join(_WORDS)}|[0-9])\b")

# Phrasings of each question and of its answer. `_answer` fills in the answers.
_TASKS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "which": (
        (
            "Which digit is this?",
            "What digit do you see?",
            "Name the digit in the image.",
            "What number is written here?",
            "Read the digit.",
        ),
        (
            "This is the digit {n}.",
            "The digit is {w}.",
            "It is {a} {w}.",
            "I see the number {n}.",
            "The number here is {w}.",
        ),
    ),
    "parity": (
        ("Is the digit even or odd?", "Is this number odd?", "Even or odd?"),
        ("It is {even}.", "The digit is {even}.", "The number {n} is {even}."),
    ),
    "larger": (
        ("Is the digit larger than five?", "Is this number more than five?", "Larger than five?"),
        ("{yes}, it is {larger}.", "{yes}, {w} is {larger}.", "{yes}, the digit is {larger}."),
    ),
    "description": (
        ("Describe the image.", "What is in the picture?", "Say what you see."),
        (
            "{A} handwritten {w}.",
            "A small picture of the digit {n}.",
            "The image shows {a} {w}.",
            "Somebody wrote the number {w}.",
        ),
    ),
}


@dataclass(frozen=True)
class DemoData:
    """Paths of the dataset's files, and its numbers of images. Image names are relative to `root`."""

    root: Path
    train_captions: Path
    train_conversations: Path
    student_conversations: Path
    train_preferences: Path
    test_conversations: Path
    test_questions: Path
    test_preferences: Path
    num_train_images: int
    num_student_images: int
    num_test_images: int

    @property
    def files(self) -> tuple[Path, ...]:
        """All seven files of conversations, questions and pairs, training files first."""
        return (
            self.train_captions,
            self.train_conversations,
            self.student_conversations,
            self.train_preferences,
            self.test_conversations,
            self.test_questions,
            self.test_preferences,
        )


def write_dataset(out: Path, *, seed: int) -> DemoData:
    """Writes the images and the seven files into `out`, which is created if absent, and returns their paths.

    Captions, conversations and questions are LLaVA conversations; a question also has the true digit under `"digit"`.
    Preferences are pairs as in RLAIF-V.
    """
    pixels_NF, digits_N = load_digits(return_X_y=True)
    truth = [int(digit) for digit in digits_N]
    test, train = _split(range(len(truth)), truth, TEST_SHARE, random.Random(f"{seed}/test"))
    student, _ = _split(train, truth, STUDENT_SHARE, random.Random(f"{seed}/student"))
    mistakes = _likeliest_mistakes(pixels_NF, digits_N, train)

    (out / "images").mkdir(parents=True, exist_ok=True)
    for index, pixels_F in enumerate(pixels_NF):
        _draw_image(pixels_F).save(out / _image_name(index))

    data = DemoData(
        root=out,
        train_captions=out / "train_captions.jsonl",
        train_conversations=out / "train_conversations.json",
        student_conversations=out / "student_conversations.json",
        train_preferences=out / "train_preferences.jsonl",
        test_conversations=out / "test_conversations.jsonl",
        test_questions=out / "test_questions.jsonl",
        test_preferences=out / "test_preferences.jsonl",
        num_train_images=len(train),
        num_student_images=len(student),
        num_test_images=len(test),
    )
    rounds = range(CONVERSATIONS_PER_IMAGE)
    conversations = {i: [_conversation(i, k, truth[i], seed) for k in rounds] for i in train}
    _write(data.train_captions, [_caption(i, truth[i], seed) for i in train])
    _write(data.train_conversations, [line for i in train for line in conversations[i]])
    _write(data.student_conversations, [line for i in student for line in conversations[i]])
    _write(data.train_preferences, [_preference(i, truth[i], mistakes[i], seed) for i in train])
    _write(data.test_conversations, [_conversation(i, 0, truth[i], seed) for i in test])
    _write(data.test_questions, [_question(i, truth[i], seed) for i in test])
    _write(data.test_preferences, [_preference(i, truth[i], mistakes[i], seed) for i in test])
    return data


def read_lines(path: Path) -> list[Line]:
    """Returns the records of a file that `write_dataset` wrote (a JSON array, or one object a line)."""
    text = path.read_text(encoding="utf-8")
    lines = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return list(lines)


def named_digit(text: str) -> int | None:
    """Returns the digit that `text` names, by word or by numeral; None if it names none, or several."""
    named = _named_digits(text)
    return named.pop() if len(named) == 1 else None


def contradicts(answer: str, digit: int) -> bool:
    """Returns True if `answer` says something untrue of `digit`: another digit, parity, or side of five."""
    words = set(re.findall(r"\w+", answer.lower()))
    wrong_parity = ("odd" if digit % 2 == 0 else "even") in words
    wrong_side_of_five = "larger" in words and ("not" not in words) != (digit > 5)
    return wrong_parity or wrong_side_of_five or bool(_named_digits(answer) - {digit})


def _named_digits(text: str) -> set[int]:
    found = _DIGIT.findall(text.lower())
    return {_WORDS.index(name) if name in _WORDS else int(name) for name in found}


def _split(
    indices: Sequence[int], truth: Sequence[int], share: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Splits `indices` into two sorted lists, with `share` of the images of every digit in the first."""
    taken: set[int] = set()
    for digit in range(10):
        same_digit = [i for i in indices if truth[i] == digit]
        taken.update(rng.sample(same_digit, round(share * len(same_digit))))
    return sorted(taken), [i for i in indices if i not in taken]


def _likeliest_mistakes(pixels_NF: NDArray[np.float64], digits_N: NDArray[np.int64], known: Sequence[int]) -> list[int]:
    """Returns for each image the digit of the nearest `known` image of another digit."""
    known_KF, known_digits_K = pixels_NF[known], digits_N[known]
    # Squared distances but for a constant in each row, which does not change the nearest image.
    distance_NK = (known_KF**2).sum(axis=1) - 2 * pixels_NF @ known_KF.T
    distance_NK[digits_N[:, None] == known_digits_K] = np.inf
    return [int(known_digits_K[nearest]) for nearest in distance_NK.argmin(axis=1)]


def _draw_image(pixels_F: NDArray[np.float64]) -> Image.Image:
    """Returns an RGB image of 64 shades 0..16, enlarged smoothly so that it looks like a scan."""
    shades = np.rint(pixels_F.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    return Image.fromarray(shades).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _image_name(index: int) -> str:
    return f"images/{index:04d}.png"


def _answer(task: str, digit: int, rng: random.Random) -> str:
    article = "an" if digit == 8 else "a"
    return rng.choice(_TASKS[task][1]).format(
        n=digit,
        w=_WORDS[digit],
        a=article,
        A=article.capitalize(),
        even="odd" if digit % 2 else "even",
        yes="Yes" if digit > 5 else "No",
        larger="larger" if digit > 5 else "not larger",
    )


def _turns(tasks: Sequence[str], digit: int, rng: random.Random) -> list[Line]:
    turns = []
    for number, task in enumerate(tasks):
        question = rng.choice(_TASKS[task][0])
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": _answer(task, digit, rng)})
    return turns


def _line(name: str, index: int, turns: list[Line]) -> Line:
    return {"id": name, "image": _image_name(index), "conversations": turns}


def _caption(index: int, digit: int, seed: int) -> Line:
    name = f"caption-{index:04d}"
    return _line(name, index, _turns(["description"], digit, random.Random(f"{seed}/{name}")))


def _question(index: int, digit: int, seed: int) -> Line:
    name = f"question-{index:04d}"
    turns = _turns(["which"], digit, random.Random(f"{seed}/{name}"))
    return {**_line(name, index, turns), "digit": digit}


def _conversation(index: int, number: int, digit: int, seed: int) -> Line:
    """Returns a conversation of one or two questions; two thirds of the conversations have a single one."""
    name = f"conversation-{index:04d}-{number}"
    rng = random.Random(f"{seed}/{name}")
    tasks = rng.sample(list(_TASKS), rng.choice((1, 1, 2)))
    return _line(name, index, _turns(tasks, digit, rng))


def _preference(index: int, digit: int, wrong_digit: int, seed: int) -> Line:
    """Returns a pair of answers in the same words, of which the rejected one names a wrong digit."""
    name = f"preference-{index:04d}"
    task = random.Random(f"{seed}/{name}/task").choice(("which", "which", "description"))
    chosen = _turns([task], digit, random.Random(f"{seed}/{name}"))
    rejected = _turns([task], wrong_digit, random.Random(f"{seed}/{name}"))
    return {"id": name, "image": _image_name(index), "chosen": chosen, "rejected": rejected}


def _write(path: Path, lines: list[Line]) -> None:
    """Writes a JSON array with one element a line (.json), or one object a line (.jsonl)."""
    rows = [json.dumps(line, ensure_ascii=False) for line in lines]
    text = "[\n" + ",\n".join(rows) + "\n]\n" if path.suffix == ".json" else "\n".join(rows) + "\n"
    path.write_text(text, encoding="utf-8")
