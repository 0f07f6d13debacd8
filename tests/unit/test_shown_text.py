"""All commands that show something, with markup, control characters and HTML in every string that others wrote."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest

import cli
import common.console
import precompute.logits.run
from common.data.samples import Role, Turn
from common.shards.manifest import read_manifest
from common.shards.score_shard import write_shard
from precompute.logits.run import run_capture
from precompute.verify.recompute_features import RecomputedFeatures
from tests.support.fake_teacher import FakeTeacher, conversation_records
from tests.support.outputs import flip_bit, read_rows, replace_sample
from tests.support.real_weights import write_jsonl

Run = Callable[..., tuple[int, str, str]]

# A closing tag without an opening one makes rich raise; the others are dropped or obeyed. U+202E reverses what follows.
MARKUP = "v[/2] [red] :cat:"
CONTROL = "\x1b[31m\x07\u202eé猫"
HOSTILE = f"{MARKUP} {CONTROL}<script>\nx"
# A path is split at the `/`: it has a directory `v[`.
SPELLED_OUT = "\\x1b[31m\\x07\\u202eé猫<script>"


@pytest.fixture
def decant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        # Wide enough that no path is folded.
        monkeypatch.setenv("COLUMNS", "2000")
        monkeypatch.setattr(sys, "argv", ["decant", *map(str, arguments)])
        monkeypatch.setattr(precompute.logits.run, "run_capture", partial(run_capture, start_teacher=FakeTeacher))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        for stream in captured:
            assert not set(stream) & {"\x1b", "\x07", "\u202e"}
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    """Makes a directory with a hostile name: a teacher, a dataset with hostile ids and images, a configuration."""
    root = tmp_path_factory.mktemp("shown") / HOSTILE
    shutil.copytree(llava_dir, root / "teacher")
    records = conversation_records(root, 6)
    for number, record in enumerate(records):
        record["id"] = f"{HOSTILE}{number}"
    image = Path(records[1]["image"])
    records[1]["image"] = f"{HOSTILE}.png"
    (root / f"{HOSTILE}.png").parent.mkdir(parents=True)
    (root / image).rename(root / f"{HOSTILE}.png")
    records[5]["image"] = f"missing {HOSTILE}.png"
    write_jsonl(root / "data.jsonl", records)
    settings = {
        "teacher": root / "teacher",
        "dataset": root / "data.jsonl",
        "image_root": root,
        "output": root / "out",
        "top_k": 8,
        "samples_per_shard": 4,
        "max_tokens": 512,
        "on_bad_sample": "skip",
        "max_skipped": 1,
    }
    lines = [
        f"{key} = {json.dumps(value if isinstance(value, int) else str(value))}" for key, value in settings.items()
    ]
    (root / "capture.toml").write_text("\n".join(lines))
    return root


@pytest.fixture
def root(_made: Path, tmp_path: Path) -> Path:
    """Returns a copy of the directory that a test may change."""
    shutil.copytree(_made, tmp_path / HOSTILE)
    text = (tmp_path / HOSTILE / "capture.toml").read_text()
    old, new = json.dumps(str(_made))[1:-1], json.dumps(str(tmp_path / HOSTILE))[1:-1]
    (tmp_path / HOSTILE / "capture.toml").write_text(text.replace(old, new))
    return tmp_path / HOSTILE


@pytest.fixture
def output(root: Path, decant: Run) -> Path:
    code, shown, log = decant("precompute-logits", "--config", root / "capture.toml")
    assert code == 0, log
    assert_is_shown(shown)
    assert f"skipped {HOSTILE + '5'!r}" in shown
    return root / "out"


def assert_is_shown(text: str) -> None:
    """Checks that a path below the hostile directory is in the text as it is, but for its control characters."""
    for part in (MARKUP, SPELLED_OUT):
        assert part in text


def test_verification_and_repair(decant: Run, output: Path, root: Path) -> None:
    code, shown, _ = decant("verify-shards", output, "--dataset", root / "data.jsonl")
    assert code == 0
    assert_is_shown(shown)
    records = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    write_jsonl(root / "newer.jsonl", records[1:])
    code, shown, _ = decant("verify-shards", output, "--against", root / "newer.jsonl")
    assert code == 1
    assert_is_shown(shown)
    assert f"removed: {HOSTILE + '0'!r}" in shown
    flip_bit(output / "shard-00000.parquet", 2000)
    code, shown, log = decant("verify-shards", output, "--repair", "--against", root / "newer.jsonl")
    assert code == 1
    assert_is_shown(shown[shown.index("moved shards 0") :])
    assert_is_shown(log)


def test_inspection(decant: Run, output: Path, root: Path) -> None:
    # A role is one of three in a dataset, and anything in a shard of others.
    manifest, rows = read_manifest(output), read_rows(output, 0)
    turns = (Turn(cast(Role, f"user{HOSTILE}"), HOSTILE), Turn("assistant", HOSTILE))
    rows[1] = replace_sample(rows[1], conversations=(turns,))
    write_shard(output, 0, manifest, rows, [])
    page = root / f"{HOSTILE}.html"
    arguments = ("--sample", f"{HOSTILE}1", "--tokenizer", root / "teacher")
    code, shown, log = decant("inspect-shards", output, *arguments, "--html", page, "--unpack", root / "lists")
    assert code == 0, log
    for where in ("sample ", "image ", "user"):
        assert f"{where}{MARKUP} {SPELLED_OUT}" in shown
    assert log.count(SPELLED_OUT) >= 2
    text = page.read_text("utf-8")
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert _Tags.of(text).isdisjoint({"script", "red"})
    assert f"<b>user{MARKUP} \\x1b[31m\\x07\\u202eé猫&lt;script&gt;" in text
    code, shown, _ = decant("inspect-shards", output, *arguments, "--json")
    assert code == 0
    assert json.loads(shown)["path"] == str(output)
    assert json.loads(shown)["samples"][0]["sample_id"] == f"{HOSTILE}1"


def test_what_cannot_be_read_is_shown(decant: Run, output: Path, root: Path) -> None:
    flip_bit(output / "shard-00000.parquet", 2000)
    (output / "shard-00001.parquet").write_bytes(b"no shard")
    code, shown, _ = decant("inspect-shards", output, "--html", root / "page.html")
    assert code == 1
    assert_is_shown(shown[shown.rindex("shard-00001") - 400 :])
    assert _Tags.of((root / "page.html").read_text("utf-8")).isdisjoint({"script", "red"})


def test_merging(decant: Run, output: Path, root: Path) -> None:
    code, shown, log = decant("merge-shards", output, "--out", root / "merged")
    assert code == 0, log
    assert_is_shown(shown)
    code, _, log = decant("merge-shards", output, root / "nothing", "--out", root / "merged")
    assert code == 1
    assert_is_shown(log)


def test_features(decant: Run, root: Path) -> None:
    records = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    write_jsonl(root / "data.jsonl", records[:5])
    options = ("--dataset", root / "data.jsonl", "--image-root", root, "--output", root / "features")
    code, shown, log = decant("precompute-features", "--model", root / "teacher", *options)
    assert code == 0, log
    assert_is_shown(shown)
    (root / f"{HOSTILE}.png").write_bytes(b"no image")
    code, shown, _ = decant("verify-shards", root / "features", "--image-root", root)
    assert code == 1
    assert shown.count(SPELLED_OUT) >= 2


def test_recomputed_features(capsys: pytest.CaptureFixture[str]) -> None:
    common.console.show(RecomputedFeatures(2, 1, 0.5, 1.0, worst=HOSTILE).render())
    assert_is_shown(capsys.readouterr().out)


def test_planning(decant: Run, root: Path) -> None:
    code, shown, log = decant("plan", "--config", root / "capture.toml", "--student", root / "teacher")
    assert code == 0, log
    assert_is_shown(shown)


def test_errors_keep_their_lines(decant: Run, root: Path) -> None:
    code, _, log = decant(
        "precompute-logits", "--config", root / "capture.toml", "--set", f"nonsense={HOSTILE}", "--set", "top_k=-1"
    )
    assert code == 1
    assert_is_shown(log)
    assert "2 setting(s) are wrong\n  " in log


def test_a_path_that_is_not_utf_8_is_shown(decant: Run, tmp_path: Path) -> None:
    code, _, log = decant("verify-shards", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert code == 1
    assert "\\udcff" in log


class _Tags(HTMLParser):
    """Collects the names of a page's tags."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002 - the parser passes both
        self.names.add(tag)

    @classmethod
    def of(cls, text: str) -> set[str]:
        parser = cls()
        parser.feed(text)
        return parser.names
