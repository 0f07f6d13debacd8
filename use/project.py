"""`decant init`: the configuration files of a whole chain, from capture to export, and the script that runs it.

answers ─> checks (tokenizers, datasets, what can be upcycled) ─> Project ─> files of configs/ with its values
    ─> capture.toml, 1-init.toml, ..., run.sh
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from common.data.chat_encoding import load_tokenizer, tokenizer_sha256
from common.data.dataset import Dataset
from common.data.model_images import LlavaImages, find_model_images
from common.data.samples import IMAGE_MARKER
from common.errors import ConfigError, ModelError
from common.storage.files import Location
from precompute.planning.workload import ModelShape
from train.config import MoEConfig
from train.model.student import load_config
from train.moe.upcycle import check_composition, sparse_config

# Share of a GPU's memory for the teacher's weights; the rest is for the key-value cache and activations.
_WEIGHTS_SHARE = 0.5

_GLOBAL_BATCH, _MICRO_BATCH = 256, 8
# With fewer steps a schedule of 3% warm-up has none.
_MIN_STEPS = 40

_CPU_ENGINE = {"engine.dtype": "float32", "engine.enforce_eager": True, "engine.kv_cache_gib": 4}
_CPU_RUN = {"run.precision": "fp32", "run.zero_stage": 1, "run.activation_checkpointing": False}


@dataclass(frozen=True)
class Answers:
    """What a user says of a project. Without `student` one is composed of `vision` and `language`."""

    teacher: Path
    dataset: Location
    image_root: Location | None
    gpus: int
    gpu_gib: int
    language: Path | None = None
    vision: Path | None = None
    student: Path | None = None
    captions: Location | None = None
    preferences: Location | None = None


@dataclass(frozen=True)
class Project:
    """The answers, and what was found of the models and the data.

    `why_dense` says why there is no sparse stage. With `keeps_aspect_ratio` a LLaVA is trained on images as the teacher
    sees them, not padded to squares.
    """

    answers: Answers
    is_composed: bool
    num_parameters: int
    num_samples: int
    num_pairs: int | None
    why_dense: str | None
    keeps_aspect_ratio: bool = False

    @property
    def tensor_parallel_size(self) -> int:
        """Returns the number of GPUs that hold one copy of the teacher: the least power of two that suffices."""
        wanted = math.ceil(2 * self.num_parameters / (_WEIGHTS_SHARE * self.answers.gpu_gib * 2**30))
        return min(1 << (max(1, wanted) - 1).bit_length(), max(1, self.answers.gpus))


def inspect_project(answers: Answers) -> Project:
    """Checks that the models and the data fit together. Reads no weights.

    Raises:
        ModelError, DataError: a directory or a file cannot be used.
        ConfigError: teacher and student have other tokenizers, or a part of the student is missing.
    """
    shape = ModelShape.load(answers.teacher)
    teacher_images = find_model_images(answers.teacher)
    text_from = answers.student or answers.language
    if text_from is None or (answers.student is not None and answers.language is not None):
        raise ConfigError("give --language, a causal language model, or --student, a whole student directory")
    is_composed = answers.student is None and teacher_images is not None
    if is_composed and answers.vision is None and not isinstance(teacher_images, LlavaImages):
        raise ConfigError(
            f"{answers.teacher}: has no CLIP or SigLIP tower to give a student; name one (--vision), or a whole "
            "student of its family (--student)"
        )
    tokenizers = [load_tokenizer(path) for path in (answers.teacher, text_from)]
    if is_composed:
        # As init-student does.
        tokenizers[1].add_special_tokens({"extra_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
    if tokenizer_sha256(tokenizers[0]) != tokenizer_sha256(tokenizers[1]):
        raise ConfigError(
            f"{answers.teacher} and {text_from} have other tokenizers, so scores of the one mean nothing to the other; "
            "take a student of the teacher's family"
        )
    return Project(
        answers,
        is_composed=is_composed,
        num_parameters=shape.num_parameters,
        num_samples=len(Dataset.open(answers.dataset, "kd")),
        num_pairs=None if answers.preferences is None else len(Dataset.open(answers.preferences, "dpo")),
        why_dense=_find_why_dense(text_from),
        keeps_aspect_ratio=is_composed and not isinstance(teacher_images, LlavaImages),
    )


def write_project(directory: Path, project: Project) -> list[Path]:
    """Writes the files of a project into a new or empty directory; returns them.

    Raises:
        ConfigError: the directory holds something.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: is not empty, and nothing in it was changed; give a new directory")
    stages = _stages(project)
    contents = {"capture.toml": _fill("precompute-kd.toml", _capture_values(project, "dataset", "scores"))}
    if project.answers.preferences is not None:
        values = _capture_values(project, "preferences", "preferences")
        contents["capture-preferences.toml"] = _fill("precompute-dpo.toml", values)
    for name, (template, values) in stages.items():
        contents[f"{name}.toml"] = _fill(template, values)
    contents["run.sh"] = _script(project, list(stages))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in contents.items():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    (directory / "run.sh").chmod(0o755)
    return written


def _find_why_dense(text_from: Path) -> str | None:
    config = load_config(text_from)
    try:
        sparse_config(config.get_text_config(), MoEConfig())
        check_composition(config)
    except ModelError as error:
        return str(error)
    return None


def _capture_values(project: Project, data: str, output: str) -> dict[str, Any]:
    answers = project.answers
    values: dict[str, Any] = {
        "teacher": str(answers.teacher.resolve()),
        "dataset": _address(getattr(answers, data)),
        "image_root": _address(answers.image_root),
        "output": output,
        "engine.tensor_parallel_size": project.tensor_parallel_size,
    }
    return values if answers.gpus else values | _CPU_ENGINE


def _stages(project: Project) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the stages by name: the file of configs/ that each begins with, and its values."""
    answers = project.answers
    student = "student" if project.is_composed else str((answers.student or answers.language or Path()).resolve())
    images = {"data.image_root": _address(answers.image_root)}
    if project.keeps_aspect_ratio:
        images["data.image_aspect_ratio"] = "keep"
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(stage: str, num_samples: int, values: Mapping[str, Any]) -> None:
        nonlocal student
        name = f"{len(found) + 1}-{stage}"
        batch = _batch_sizes(num_samples, answers.gpus)
        common = {"output": f"runs/{name}", "model.path": student} | images | batch
        found[name] = (f"llava-mod/{stage}.toml", common | ({} if answers.gpus else _CPU_RUN) | dict(values))
        student = f"runs/{name}/final"

    if project.is_composed:
        captions = answers.captions or answers.dataset
        size = project.num_samples if answers.captions is None else len(Dataset.open(captions, "kd"))
        add("init", size, {"data.dataset": _address(captions)})
    add("dense-to-dense", project.num_samples, {"data.shards": "scores"})
    if project.why_dense is None:
        add("dense-to-sparse", project.num_samples, {"data.shards": "scores"})
    if project.num_pairs is not None:
        balance = {} if project.why_dense is None else {"loss.balance": None}
        add("preference", project.num_pairs, {"data.shards": "preferences"} | balance)
    return found


def _batch_sizes(num_samples: int, gpus: int) -> dict[str, Any]:
    """Returns batches that the GPUs can share and that leave a small dataset some steps."""
    ranks = max(1, gpus)
    wanted = max(1, min(_GLOBAL_BATCH, num_samples // _MIN_STEPS))
    micro = max(1, min(_MICRO_BATCH, wanted // ranks))
    steps = max(1, round(wanted / (micro * ranks)))
    return {"optim.global_batch_size": micro * ranks * steps, "optim.micro_batch_size": micro}


def _address(location: Location | None) -> str | None:
    return None if location is None else str(location.resolve()) if isinstance(location, Path) else str(location)


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """Returns a file of configs/ with other values and the same comments; a value of None leaves the key out.

    Keys of tables have a point, such as engine.dtype. A key that is only a comment there is written out.
    """
    left = dict(values)
    table, lines = "", []
    for line in (files("configs") / template).read_text("utf-8").splitlines():
        if header := re.fullmatch(r"\[([\w.]+)\]", line):
            lines += _missing_lines(left, table)
            table = f"{header[1]}."
        key = re.match(r"(?:# )?(\w+) = ", line)
        name = f"{table}{key[1]}" if key else ""
        if name in left:
            value = left.pop(name)
            if value is None:
                continue
            comment = re.search(r"\s{2,}(#.*)$", line)
            line = f"{key[1]} = {_toml(value)}" + (f"  {comment[1]}" if comment else "")  # type: ignore[index]
        lines.append(line)
    lines += _missing_lines(left, table)
    if unused := [name for name, value in left.items() if value is not None]:
        raise AssertionError(f"{template} has no place for {', '.join(unused)}")
    return "\n".join(lines) + "\n"


def _missing_lines(left: dict[str, Any], table: str) -> list[str]:
    """Returns lines for the keys of a table that its template did not have, and takes them out of `left`."""
    own = [name for name in left if name.rpartition(".")[0] == table.rstrip(".")]
    return [f"{name.rpartition('.')[2]} = {_toml(value)}" for name in own if (value := left.pop(name)) is not None]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A string or a list of strings in JSON is one in TOML.
    return json.dumps(value, ensure_ascii=False)


def _script(project: Project, stages: list[str]) -> str:
    answers = project.answers
    gpus = answers.gpus
    launcher = f"torchrun --standalone --nproc-per-node {gpus} -m cli train" if gpus > 1 else "decant train"
    steps = ["decant plan --config capture.toml"]
    if project.is_composed:
        vision = (answers.vision or answers.teacher).resolve()
        language = (answers.language or Path()).resolve()
        steps.append(
            f"[ -d student ] || decant init-student student --vision {shlex.quote(str(vision))} "
            f"--language {shlex.quote(str(language))}"
        )
    steps += [
        "",
        "# On the inference node. A run that was stopped continues when it is started again.",
        "decant precompute-logits --config capture.toml",
        f"decant verify-shards scores --dataset {shlex.quote(str(_address(answers.dataset)))}",
    ]
    if answers.preferences is not None:
        steps += ["decant precompute-logits --config capture-preferences.toml", "decant verify-shards preferences"]
    steps += ["", "# On the training nodes."]
    steps += [f"[ -d runs/{name}/final ] || {launcher} --config {name}.toml" for name in stages]
    last = stages[-1]
    steps += [
        f"decant report runs/{last} --html report.html",
        f"[ -d exported ] || decant export runs/{last} exported",
        "",
        'echo "talk to it: decant chat $PWD/exported"',
    ]
    why = "" if project.why_dense is None else f"# There is no sparse stage: {' '.join(project.why_dense.split())}\n"
    return f"#!/usr/bin/env bash\n# The whole chain, one command after the other.\n{why}set -euo pipefail\n" + (
        'cd "$(dirname "$0")"\n\n' + "\n".join(steps) + "\n"
    )
