"""Errors of the file system at any call of any command: each ends in a message, and nothing written before is lost."""

import builtins
import errno
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cli
from precompute.logits import run as capture_run
from tests.support.fake_teacher import FakeTeacher, conversation_records
from tests.support.outputs import read_published_files

pytestmark = pytest.mark.slow

CODES = (errno.EIO, errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC, errno.ESTALE)
CALLS = ("stat", "lstat", "open", "listdir", "scandir", "mkdir", "replace", "rename", "unlink", "rmdir")
NUM_ERRORS = 100


@contextmanager
def failing(root: Path, wanted: int, code: int) -> Iterator[Callable[[], int]]:
    """Makes the call number `wanted` that touches a path below `root` fail; yields the number of calls so far."""
    seen = 0

    def wrap(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            path = arguments[0] if arguments else None
            if isinstance(path, str | os.PathLike) and str(root) in os.fspath(path):
                seen += 1
                if seen == wanted:
                    raise OSError(code, os.strerror(code), os.fspath(path))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(io, "open", wrap(io.open))
        patch.setattr(builtins, "open", wrap(builtins.open))
        yield lambda: seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("inject")
    shutil.copytree(llava_dir, root / "teacher")
    records = conversation_records(root / "images", 6)
    (root / "data.json").write_text(json.dumps(records))
    lines = ["top_k = 8", "samples_per_shard = 2", "max_tokens = 512", "store_images = true"]
    paths = {"teacher": "teacher", "dataset": "data.json", "image_root": "images", "output": "out"}
    lines += [f'{key} = "{root / name}"' for key, name in paths.items()]
    (root / "capture.toml").write_text("\n".join(lines))
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["decant", *arguments])
        patch.setattr(capture_run, "_start_vllm", FakeTeacher)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


COMMANDS: dict[str, tuple[str, ...]] = {
    "precompute-logits": ("--config", "{root}/capture.toml", "--set", "output={scratch}/out"),
    "plan": ("--config", "{root}/capture.toml", "--set", "output={scratch}/out"),
    "verify-shards": ("{root}/out", "--dataset", "{root}/data.json", "--against", "{root}/data.json"),
    "verify-shards ": ("{scratch}/copy", "--repair"),
    "inspect-shards": ("{root}/out", "--html", "{scratch}/page.html", "--unpack", "{scratch}/lists", "--all"),
    "merge-shards": ("{root}/out", "--out", "{scratch}/merged"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_of_the_file_system_ends_a_command_with_a_message(
    root: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_counts: Callable[[str], None]
) -> None:
    if not (root / "out" / "manifest.json").exists():
        assert run(capsys, "precompute-logits", "--config", str(root / "capture.toml"))[0] == 0
    before = read_published_files(root / "out")
    scratch = tmp_path / "scratch"

    def start(wanted: int, code: int) -> tuple[int, int, str]:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shutil.copytree(root / "out", scratch / "copy")
        arguments = [text.format(root=root, scratch=scratch) for text in COMMANDS[name]]
        # Both trees lie below the directory of all temporary files.
        with failing(root.parent.parent, wanted, code) as count:
            exit_code, text = run(capsys, name.strip(), *arguments)
            return exit_code, count(), text

    exit_code, num_calls, text = start(-1, 0)
    assert exit_code == 0, text
    rng = random.Random(name)
    counts: Counter[int] = Counter()
    for number in range(NUM_ERRORS):
        code = CODES[number % len(CODES)]
        wanted = rng.randint(1, num_calls)
        exit_code, _, text = start(wanted, code)
        what = f"call {wanted} of {num_calls}, {os.strerror(code)}: {text[-1500:]}"
        assert exit_code in (0, 1), what
        assert "Traceback" not in text, what
        assert "this is a bug" not in text, what
        assert exit_code == 0 or text.strip(), what
        counts[exit_code] += 1
        assert read_published_files(root / "out") == before, what
    record_counts(
        f"{NUM_ERRORS} OSErrors in {num_calls} calls of {name.strip()}: {counts[1]} errors, {counts[0]} without effect"
    )
