"""Nothing of others is overwritten: each command refuses an output that is not its own, and leaves every byte."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import ConfigError
from common.storage.output_check import OutputKind, check_output
from precompute.config import PrecomputeConfig
from precompute.inspection.collect import inspect_output
from precompute.inspection.html_document import check_page_destination
from precompute.inspection.html_page import render_page
from precompute.logits.run import run_capture
from precompute.merge import merge_outputs
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.inspect_outputs import write_known_output
from tests.support.training import stage
from train.config import TrainConfig
from train.run.training_output import check_training_output

KIND = OutputKind("make-it", {"mark.json": lambda found: found == {"ours": 1}}, lambda name: name == "part.bin")


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Returns the bytes and the time of change of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("files", "foreign"),
    [
        ({}, None),
        ({".lock": "", ".x.partial": "", ".DS_Store": ""}, None),
        ({"part.bin": ""}, None),
        ({"mark.json": '{"ours": 1}', "notes.txt": ""}, None),
        ({"mark.json": '{"ours": 2}'}, "mark.json"),
        ({"mark.json": "no json"}, "mark.json"),
        ({"part.bin": "", "weights.bin": ""}, "weights.bin"),
        ({"weights.bin": "", "a[x].txt": ""}, r"a\[x\].txt, weights.bin"),
    ],
)
def test_an_output_is_new_empty_or_recognisably_ours(
    tmp_path: Path, files: dict[str, str], foreign: str | None
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = snapshot(tmp_path)
    if foreign is None:
        check_output(tmp_path, KIND, {})
    else:
        with pytest.raises(ConfigError, match=f"holds {foreign}, which make-it did not write; nothing was changed"):
            check_output(tmp_path, KIND, {})
    assert snapshot(tmp_path) == before


def test_an_output_is_not_where_an_input_lies(tmp_path: Path) -> None:
    check_output(tmp_path / "new", KIND, {"dataset": tmp_path / "data.json", "teacher": None})
    for location in (tmp_path, tmp_path / "a" / "data.json", tmp_path / "b" / ".." / "a"):
        with pytest.raises(ConfigError, match=r"is where dataset lies .* choose an output of its own"):
            check_output(tmp_path, KIND, {"dataset": location})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, expected a directory"):
        check_output(tmp_path / "file", KIND, {})


def test_a_capture_refuses_what_is_not_a_capture(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 3))
    teacher = tmp_path / "teacher"
    shutil.copytree(llava_dir, teacher)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_bytes(config.dataset.read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for changes, found in (
        ({"output": teacher, "teacher": teacher}, "is where teacher lies"),
        ({"output": home, "dataset": home / "config.json"}, "is where dataset lies"),
        ({"output": home}, "holds config.json"),
        ({"output": teacher}, "holds .*config.json"),
        ({"output": other}, "holds thesis.tex"),
    ):
        with pytest.raises(ConfigError, match=found):
            run_capture(config.model_copy(update=changes), progress=False, start_teacher=FakeTeacher)
        assert snapshot(tmp_path) == before
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert isinstance(config.output, Path)
    (config.output / "README.md").write_text("a card")
    assert run_capture(config, progress=False, start_teacher=FakeTeacher).num_new_shards == 0
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"holds thesis\.tex"):
        merge_outputs([config.output], other, progress=False)
    assert snapshot(tmp_path) == before


def test_a_page_replaces_nothing_but_an_earlier_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page_destination(page)
    write_known_output(tmp_path / "out")
    page.write_text(render_page(inspect_output(tmp_path / "out", progress=False)))
    check_page_destination(page)
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path / "thesis.tex", tmp_path / "out"):
        with pytest.raises(ConfigError, match="exists and is no page of this program"):
            check_page_destination(path)


def _model(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama", "architectures": ["X"]}')
    (directory / "model.safetensors").write_bytes(b"weights")


def _run(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"config": {}, "data_sha256": "x"}')
    (directory / "starts.json").write_text("[]")


def _checkpoint(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "complete.json").write_text("{}")


def _stop(out: Path) -> None:
    _run(out)
    _checkpoint(out / "checkpoints" / "checkpoint-5")


def _finish(out: Path) -> None:
    _stop(out)
    _model(out / "final")


def _write(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("x")


Step = Callable[[Path], None]
TRAINING: dict[str, tuple[list[Step], str | None]] = {
    "new": ([], None),
    "begun": ([_run], None),
    "with the lock of another": ([lambda out: _write(out, ".train.lock")], None),
    "with a checkpoint": ([_stop], None),
    "finished": ([_finish], None),
    "a model": ([_model], "holds config.json, which train did not write"),
    "files of others": ([lambda out: _write(out, "a.txt")], "holds a.txt"),
    "finished without checkpoints": ([_run, lambda out: _model(out / "final")], "no checkpoint to continue from"),
    "notes in final": ([_finish, lambda out: _write(out, "final/notes.txt")], "final: holds notes.txt"),
    "named like a checkpoint": (
        [_run, lambda out: _write(out, "checkpoints/checkpoint-best/x")],
        "holds checkpoint-best, without the complete.json",
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_refuses_what_is_not_its_own_run(tmp_path: Path, name: str) -> None:
    prepare, refused = TRAINING[name]
    settings = stage(tmp_path / "run", tmp_path / "model", data={"dataset": "data.json"}, loss={"cross_entropy": 1.0})
    for step in prepare:
        step(tmp_path / "run")
    before = snapshot(tmp_path)
    if refused is None:
        check_training_output(TrainConfig.model_validate(settings))
    else:
        with pytest.raises(ConfigError, match=refused):
            check_training_output(TrainConfig.model_validate(settings))
    assert snapshot(tmp_path) == before


def test_training_refuses_its_model_and_its_data_as_output(tmp_path: Path) -> None:
    _model(tmp_path / "model")
    for model, dataset, found in (
        (tmp_path / "model", tmp_path / "data.json", "is where model.path lies"),
        (tmp_path / "model" / "final", tmp_path / "data.json", "is where model.path lies"),
        (tmp_path / "other", tmp_path / "model" / "config.json", "is where data set 1 lies"),
    ):
        settings = stage(tmp_path / "model", model, data={"dataset": str(dataset)}, loss={"cross_entropy": 1.0})
        with pytest.raises(ConfigError, match=found):
            check_training_output(TrainConfig.model_validate(settings))


@pytest.mark.parametrize("value", ["", ".", '""'])
def test_an_empty_output_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "capture.toml").write_text('teacher = "t"\ndataset = "d.json"\noutput = "out"\n')
    text = 'stage = "sft"\noutput = "out"\nmodel.path = "m"\ndata.dataset = "d.json"\n'
    (tmp_path / "train.toml").write_text(text + "loss.cross_entropy = 1.0\noptim.learning_rate = 1e-3\n")
    for name, schema in (("capture", PrecomputeConfig), ("train", TrainConfig)):
        load_config(schema, tmp_path / f"{name}.toml", ["output=elsewhere"])
        with pytest.raises(ConfigError, match="output: "):
            load_config(schema, tmp_path / f"{name}.toml", [f"output={value}"])
