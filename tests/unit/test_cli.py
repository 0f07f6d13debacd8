"""The command line as a user meets it: exit codes, messages, help."""

import importlib.metadata
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cli
from common.console import show
from common.errors import ShardError
from common.shards.manifest import shard_path
from tests.support.models import tiny_llava, tiny_tokenizer
from tests.support.training import LiveTeacher, environment, write_mixed_dataset

COMMANDS = (
    "precompute-logits",
    "precompute-features",
    "verify-shards",
    "inspect-shards",
    "merge-shards",
    "plan",
    "train",
    "init-student",
    "export",
    "demo",
    "doctor",
)

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def decant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, columns: int = 200) -> tuple[int, str]:
        # The default is wide enough that tables are not folded.
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["decant", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    model = tiny_llava(root / "model", num_layers=2)
    dataset = write_mixed_dataset(root / "data", 6)
    LiveTeacher(model, root / "data").write_output(root / "scores", dataset, "kd", top_k=4, shard=4)
    return root


def toml(path: Path, **tables: Any) -> str:
    def value(item: Any) -> str:
        return json.dumps(item)

    lines = [f"{k} = {value(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{k} = {value(v)}" for k, v in table.items())]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_complete(command: str | None) -> None:
    arguments = [sys.executable, "cli.py", *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(cli.__file__).parent, check=True)
    for name in COMMANDS if command is None else ["--help"]:
        assert name in done.stdout
    assert done.stderr == ""


def test_help_imports_nothing_that_is_slow_to_import() -> None:
    code = (
        "import sys, cli; print([m for m in ('torch', 'vllm', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_project(decant: Run) -> None:
    project = tomllib.loads(Path(cli.__file__).with_name("pyproject.toml").read_text("utf-8"))["project"]
    assert decant("--version") == (0, f"decant {project['version']}\n")


def test_a_source_tree_that_is_not_installed_knows_its_version(decant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = decant("--version")

    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert decant("--version") == installed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_not_folded_within_a_sentence_at_80_columns(decant: Run, command: str) -> None:
    """The first paragraph is filled to the width; in the others each line of the docstring stays a line."""
    narrow, wide = (
        [line.strip() for line in decant(command, "--help", columns=columns)[1].partition("╭")[0].splitlines()]
        for columns in (80, 200)
    )
    # Usage, the first paragraph, then what has to be the same; an empty line stands before each.
    assert narrow[narrow.index("", 3) :] == wide[wide.index("", 3) :]


class _Panic(BaseException):
    """As a library in Rust raises it."""


def _raise_from_verification(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def verify(*_: object, **__: object) -> None:
        raise error.with_traceback(None)

    monkeypatch.setattr("precompute.verify.logits.verify_logits", verify)
    # So that what --debug sets is undone.
    monkeypatch.setenv("DECANT_DEBUG", "0")


@pytest.mark.parametrize("error", [KeyError("first\x1b[31m\nsecond"), _Panic("first\x1b[31m\nsecond")])
def test_an_unexpected_error_is_one_line_that_asks_for_a_report(
    decant: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    _raise_from_verification(monkeypatch, error)
    code, shown = decant("verify-shards", str(tmp_path))
    assert code == 1
    assert shown.startswith(f"unexpected error: {type(error).__name__}: ")
    assert shown.endswith("; this is a bug: please report it with the details that --debug shows\n")
    assert shown.count("\n") == 1
    assert "\x1b" not in shown


@pytest.mark.parametrize("error", [KeyError("first\x1b[31m"), ShardError("first\x1b[31m")])
def test_debugging_shows_the_traceback_of_any_error(
    decant: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    _raise_from_verification(monkeypatch, error)
    assert "Traceback" not in decant("verify-shards", str(tmp_path))[1]
    code, shown = decant("--debug", "verify-shards", str(tmp_path))
    assert code == 1
    assert shown.startswith("Traceback")
    assert "in verify\n" in shown
    assert "error: " in shown.splitlines()[-1]
    assert "\x1b" not in shown
    monkeypatch.setenv("DECANT_DEBUG", "true")
    assert decant("verify-shards", str(tmp_path)) == (code, shown)


def test_a_long_message_of_an_unexpected_error_is_cut(
    decant: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _raise_from_verification(monkeypatch, ValueError("x" * 10**6))
    assert len(decant("verify-shards", str(tmp_path))[1]) < 1000


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("tried to allocate 80 GiB")])
def test_memory_that_does_not_suffice_is_no_bug(
    decant: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    _raise_from_verification(monkeypatch, error)
    code, shown = decant("verify-shards", str(tmp_path))
    assert code == 1
    assert shown.startswith("error: out of memory: ")


def test_training_logs_the_traceback_and_its_rank(decant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_stage(_: object) -> None:
        raise KeyError("first\x1b[31m")

    monkeypatch.setitem(sys.modules, "train.run.stage", types.SimpleNamespace(train_stage=train_stage))
    monkeypatch.setenv("DECANT_DEBUG", "0")
    monkeypatch.setenv("RANK", "3")
    # Without those of pytest, so that the command line adds its own.
    monkeypatch.setattr(logging.root, "handlers", [])
    code, shown = decant("train", "--config", str(Path(cli.__file__).parent / "configs/llava/pretrain.toml"))
    assert code == 1
    assert shown.startswith("rank 3:\nTraceback")
    assert "in train_stage\n" in shown
    assert shown.splitlines()[-1].startswith("unexpected error: KeyError: ")
    assert "\x1b" not in shown


def test_log_lines_have_no_control_characters(
    decant: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    decant("--version")
    logging.getLogger("precompute").warning("%s: not read", "a\x1b[31m\rb [red]\u202e")
    assert capsys.readouterr().err == "a\\x1b[31m\\x0db [red]\\u202e: not read\n"


def test_stdout_that_cannot_encode_a_character_gets_it_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["decant", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    show("a café")
    stdout.flush()
    assert stdout.buffer.getvalue().splitlines()[-1].rstrip() == b"a caf\\xe9"


def test_warnings_for_developers_are_hidden_and_errors_are_not() -> None:
    code = """
import logging, subprocess, sys, warnings
import cli

def get_accelerator():
    logging.getLogger("DeepSpeed").warning("hidden: no GPU")
    logging.getLogger("DeepSpeed").error("shown: DeepSpeed's error")

warn = "import warnings; warnings.warn('hidden'); warnings.warn('CUDA initialization: shown')"
sys.argv = ["decant", "--version"]
try:
    cli.main()
except SystemExit:
    exec(warn)
    subprocess.run([sys.executable, "-c", warn], check=True)
    get_accelerator()
    logging.getLogger("DeepSpeed").warning("shown: another warning")
    imports = logging.getLogger("transformers.utils.import_utils")
    imports.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back to PIL: hidden")
    imports.warning("shown: a warning on an import")
"""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    assert "hidden" not in done.stderr
    assert done.stderr.count("UserWarning: CUDA initialization: shown") == 2
    for message in ("DeepSpeed's error", "another warning", "a warning on an import"):
        assert f"shown: {message}" in done.stderr


def test_every_option_is_explained(decant: Run) -> None:
    for command in COMMANDS:
        _, shown = decant(command, "--help")
        for line in shown.splitlines():
            if line.startswith("│") and "--" in line.split()[1]:
                assert len(line.strip("│ ").split()) > 2, f"{command}: {line}"


@pytest.mark.parametrize("command", ["precompute-logits", "train"])
def test_an_unknown_key_is_named(decant: Run, tmp_path: Path, command: str) -> None:
    code, shown = decant(command, "--config", toml(tmp_path / "c.toml", outptu="x"))
    assert code == 1
    assert "outptu: unknown key" in shown
    assert "Traceback" not in shown


def test_broken_toml_and_a_missing_file_are_named(decant: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text('a = 1\nb = "\n')
    code, shown = decant("train", "--config", str(tmp_path / "broken.toml"))
    assert code == 1
    assert "line 2" in shown
    code, shown = decant("train", "--config", str(tmp_path / "none.toml"))
    assert code == 1
    assert "none.toml: cannot be read" in shown


def test_a_command_without_its_options_is_wrong_usage(decant: Run) -> None:
    assert decant("train")[0] == 2
    assert decant("nonsense")[0] == 2


def test_verification_passes_and_fails_with_its_exit_code(decant: Run, root: Path, tmp_path: Path) -> None:
    code, shown = decant("verify-shards", str(root / "scores"), "--dataset", str(root / "data" / "kd.json"))
    assert code == 0, shown
    assert "verified" in shown
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (root / "scores").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray(shard_path(copy, 1).read_bytes())
    data[200] ^= 4
    shard_path(copy, 1).write_bytes(bytes(data))
    code, shown = decant("verify-shards", str(copy))
    assert code == 1
    assert "shard-00001.parquet" in shown
    code, shown = decant("verify-shards", str(copy), "--json")
    assert code == 1
    assert json.loads(shown)["verify"]["ok"] is False


def stage_file(root: Path, path: Path, **changes: Any) -> str:
    tables: dict[str, Any] = {
        "stage": "dense-to-dense",
        "output": str(path.parent / "run"),
        "model": {"path": str(root / "model")},
        "data": {"shards": str(root / "scores"), "image_root": str(root / "data"), "num_workers": 0},
        "loss": {"distillation": 1.0},
        "optim": {"learning_rate": 1e-3, "global_batch_size": 2, "micro_batch_size": 2},
        "run": {"precision": "fp32"},
    }
    return toml(
        path, **{k: {**tables.get(k, {}), **v} if isinstance(v, dict) else v for k, v in {**tables, **changes}.items()}
    )


def test_a_student_with_another_tokenizer_is_refused(decant: Run, root: Path, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path / "other", num_layers=1)
    tiny_tokenizer(other, image_token=False)
    code, shown = decant("train", "--config", stage_file(root, tmp_path / "c.toml", model={"path": str(other)}))
    assert code == 1
    assert "these scores do not fit this student" in shown
    assert "tokenizer (SHA-256)" in shown
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_settings_contradict_each_other_is_refused(decant: Run, root: Path, tmp_path: Path) -> None:
    config = stage_file(root, tmp_path / "c.toml")
    for override, message in {
        "loss.distillation=0.0": "every weight is 0",
        "data.dataset=x.json": "exactly one of shards",
        "loss.balance=0.01": "stage dense-to-dense trains a dense one",
        "optim.global_batch_size=3": "not a multiple of micro_batch_size 2",
        "loss.preference=1.0": "preference needs pairs",
        'trainable=["experts"]': "cannot train",
        "run.training_arguments={seed=1}": "seed follow from other settings",
    }.items():
        code, shown = decant("train", "--config", config, "--set", override)
        assert code == 1, override
        assert message in shown, (override, shown)


def test_an_interrupt_says_that_nothing_is_lost(
    decant: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.run.stage.train_stage", interrupted)
    code, shown = decant("train", "--config", stage_file(root, tmp_path / "c.toml"))
    assert code == 130
    assert "the same command continues from there" in shown


def expert_pairs(student: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the three matrices of the first expert in the sparse layer, each with its twin of the second."""
    weights = load_file(student / "model.safetensors")
    names = [name for name in weights if ".mlp.experts.0." in name]
    return [(weights[name], weights[name.replace(".experts.0.", ".experts.1.")]) for name in names]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1,x"], "or a whole number, found [1, 'x']"),
        (["--layers", "1," + "9" * 5000], "or a whole number, found [1, '999"),
        (["--layers", "1,,2"], "or a whole number, found [1, '', 2]"),
        (["--layers", ""], "layers: expected 'every-second', "),
    ],
)
def test_wrong_layers_are_named(decant: Run, root: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, shown = decant("init-student", str(tmp_path / "out"), "--dense", str(root / "model"), *options)
    assert code == 1
    assert message in shown


@pytest.mark.parametrize("option", ["--noise=nan", "--seed=-1", "--seed=4294967296", "--experts=2.5", "--top-k=0"])
def test_a_number_that_init_student_cannot_use_is_wrong_usage(
    decant: Run, root: Path, tmp_path: Path, option: str
) -> None:
    assert decant("init-student", str(tmp_path / "out"), "--dense", str(root / "model"), option)[0] == 2


def test_init_student_composes_or_upcycles_and_refuses_both(decant: Run, root: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert decant("init-student", out)[0] == 2
    assert decant("init-student", out, "--vision", str(root / "model"))[0] == 2
    assert decant("init-student", out, "--dense", str(root / "model"), "--slices", "4")[0] == 2
    code, shown = decant("init-student", out, "--dense", str(root / "model"), "--layers", "9")
    assert code == 1
    assert "indices from 0 to 1" in shown
    code, shown = decant("init-student", out, "--dense", str(root / "model"), "--experts", "2", "--top-k", "1")
    assert code == 0, shown
    assert "2 experts, top 1" in shown
    assert [torch.equal(*pair) for pair in expert_pairs(tmp_path / "out")] == [True] * 3
    noisy = str(tmp_path / "noisy")
    code, shown = decant("init-student", noisy, "--dense", str(root / "model"), "--experts", "2", "--noise", "0.01")
    assert code == 0, shown
    assert [torch.equal(*pair) for pair in expert_pairs(tmp_path / "noisy")] == [False] * 3
    code, shown = decant("init-student", out, "--dense", str(root / "model"))
    assert code == 1
    assert "not empty" in shown
    code, shown = decant("export", out, str(tmp_path / "exported"))
    assert code == 0, shown
    # A checkpoint, whose digests do not fit.
    (tmp_path / "out" / "complete.json").write_text('{"files": {}, "sha256": "0"}')
    code, shown = decant("export", out, str(tmp_path / "again"))
    assert code == 1
    assert "complete.json is damaged" in shown
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [20_000, 1_015_000], ids=["model", "state"])
def test_a_disk_that_fills_during_a_checkpoint_is_reported_and_a_rerun_continues(
    root: Path, tmp_path: Path, limit_bytes: int
) -> None:
    optim = {"max_steps": 4, "global_batch_size": 2, "micro_batch_size": 2}
    run = {"precision": "fp32", "save_steps": 2, "zero_stage": 1}
    config = stage_file(root, tmp_path / "c.toml", optim=optim, run=run)
    command = [sys.executable, "cli.py", "train", "--config", config]
    here, environ = Path(cli.__file__).parent, environment()

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    done = subprocess.run(
        command, cwd=here, env=environ, capture_output=True, text=True, preexec_fn=fill_up, check=False
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "the checkpoint of step 2 could not be written" in done.stderr
    assert "error:" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    done = subprocess.run(command, cwd=here, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
