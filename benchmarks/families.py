"""Shows, family by family, that capture, training and export are exact, on tiny random models.

    python -m benchmarks.families [--out DIR] [--markdown] [FAMILY ...]

Each family runs in a process of its own, with the real vLLM and DeepSpeed, on eight samples with none, one and two
images of different sizes. What is done already in DIR is not done again. One JSON line has for each family:

teacher        largest difference of own log-probs, vLLM's capture against transformers in float32
alignment      True: vLLM's ids of the first samples with images are the processor's, id by id
plan_tokens    True: the numbers of image tokens that `plan` counts from headers are those of the processed images
student_step   KL(teacher || student) at the first step, the student being the teacher
packed         largest difference of a step's loss, packed against padded, three steps
zero3          the same, ZeRO 3 on two ranks against ZeRO 0 on one
sparse         largest difference of logits, the upcycled against the dense student
export         largest difference of own log-probs, vLLM against transformers, of the trained student, which is the
               sparse one if there is one
refused        the message, by what was refused

With --markdown the table of docs/models.md follows. Students train the language model and, if they take images, the
adapter.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.families import FAMILIES, TEXT_FAMILIES, build_model, build_text_model

TEXTS = ["user\nWhat is in the picture?", "assistant\nA red circle left of a blue square.", "system\nBe brief."] * 20
SIZES = ((60, 40), (30, 100), (90, 90), (28, 28), (200, 133))
STEPS = 3
# A run that compiles or hangs should not hold up the others.
_TIMEOUT_S = 600

Metrics = list[dict[str, float]]


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="all, if none is named; text models are named text/NAME")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "decant-families")
    parser.add_argument("--markdown", action="store_true", help="also print a table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.families or [*FAMILIES, *(f"text/{name}" for name in TEXT_FAMILIES)]
    if options.one:
        _measure(names[0], options.out / names[0])
        return
    found = {}
    for name in names:
        result = options.out / name / "result.json"
        if not result.is_file():
            command = [sys.executable, "-m", "benchmarks.families", name, "--one", "--out", str(options.out)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=_TIMEOUT_S)
        found[name] = json.loads(result.read_text()) if result.is_file() else {"refused": {"all": "the process died"}}
        print(name, json.dumps(found[name]), file=sys.stderr)
    print(json.dumps(found))
    if options.markdown:
        print(to_markdown(found))


def to_markdown(found: dict[str, dict[str, Any]]) -> str:
    """Returns the results as a table."""
    columns = ("teacher", "plan_tokens", "student_step", "packed", "zero3", "sparse", "export")
    lines = [f"| family | {' | '.join(columns)} |", f"| --- {'| ---: ' * len(columns)}|"]
    for name, result in found.items():
        refused = result.get("refused", {})
        cells = [
            _cell(result[column]) if column in result else "refused" if column in refused else "" for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: bool | float) -> str:
    if isinstance(value, bool):
        return "equal" if value else "differs"
    return f"{abs(value):.0e}" if value else "0"


def _measure(name: str, out: Path) -> None:
    """Measures one family and writes `out`/result.json."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    out.mkdir(parents=True, exist_ok=True)
    is_text = name.startswith("text/")
    if is_text:
        build_text_model(name.removeprefix("text/"), out / "model", TEXTS, seed=0)
    else:
        build_model(FAMILIES[name], out / "model", TEXTS, seed=0)
    write_dataset(out / "data", with_images=not is_text)
    result: dict[str, Any] = {"refused": {}}

    def measure(what: str, function: Callable[[], Any]) -> None:
        try:
            result[what] = function()
        except Exception as error:  # noqa: BLE001 - whatever a library raises is this family's result
            result["refused"][what] = f"{type(error).__name__}: {error}"[:1000]

    measure("teacher", lambda: _capture_and_recompute(out, "model", "scores", is_text))
    if not is_text:
        # The capture begins with this check, and ends with an error if it fails.
        measure("plan_tokens", lambda: _plan_is_exact(out))
        result["alignment"] = "teacher" in result
    if "teacher" in result:
        measure("student_step", lambda: _train(out, "padded")[0]["distillation"])
        measure("packed", lambda: _loss_difference(_train(out, "padded"), _train(out, "packed", packed=True)))
        measure("zero3", lambda: _loss_difference(_train(out, "padded"), _train(out, "zero3", num_ranks=2)))
    config = json.loads((out / "model/config.json").read_text())
    text = config.get("text_config", config)
    if not (text.get("num_experts") or text.get("num_local_experts")):
        measure("sparse", lambda: _in_new_process(_upcycle, out))
    if "sparse" in result:
        measure("trained_sparse", lambda: _train(out, "sparse-run", model="sparse")[-1]["loss"])
    trained = next((each for each in ("sparse-run", "padded") if (out / each / "final").is_dir()), None)
    if trained:
        measure("export", lambda: _capture_and_recompute(out, f"{trained}/final", "export", is_text))
    if not result["refused"]:
        del result["refused"]
    (out / "result.json").write_text(json.dumps(result) + "\n")


def write_dataset(directory: Path, *, with_images: bool) -> None:
    """Writes conversations of one and two turns, with none, one and two images of different sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    turns = ["What is in the picture?", "A red circle.", "And left of it?", "A blue square."]
    records = []
    for number in range(8):
        images = [number % 5, (number + 2) % 5][: number % 3] if with_images else []
        texts = turns[: 2 + 2 * (number % 2)]
        if len(texts) > 2 and len(images) > 1:
            texts = [f"Look at <image> here. {texts[0]}", texts[1], f"<image>\n{texts[2]}", texts[3]]
        else:
            texts[0] = "<image>\n" * len(images) + texts[0]
        conversation = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        record: dict[str, Any] = {"id": f"s{number}", "conversations": conversation}
        records.append({**record, "image": [f"{image}.png" for image in images]} if images else record)
    (directory / "data.json").write_text(json.dumps(records))


def _config(out: Path, model: str, scores: str, is_text: bool) -> Any:
    from precompute.config import PrecomputeConfig

    settings: dict[str, Any] = {
        "teacher": str(out / model),
        "dataset": str(out / "data/data.json"),
        "output": str(out / scores),
        "top_k": "all",
        "precision": "fp32",
        "max_tokens": 900,
        "engine": {"dtype": "float32", "enforce_eager": True, "kv_cache_gib": 0.25, "max_num_seqs": 4},
    }
    return PrecomputeConfig.model_validate(settings | ({} if is_text else {"image_root": str(out / "data")}))


def _capture_and_recompute(out: Path, model: str, scores: str, is_text: bool) -> float:
    from precompute.logits.run import run_capture

    run_capture(_config(out, model, scores, is_text), progress=False)
    return _in_new_process(_recompute, out / scores, out / model)


def _recompute(scores: Path, model: Path) -> float:
    from precompute.verify.recompute_logits import recompute_logits

    return recompute_logits(scores, model, 8, progress=False).max_own_difference


def _in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    """Calls a function where vLLM was not imported: where it runs a model of transformers, it changes its layers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _plan_is_exact(out: Path) -> bool:
    from common.data.images import load_image
    from precompute.logits.job import open_inputs

    inputs = open_inputs(_config(out, "model", "plan", is_text=False))
    images = inputs.images
    assert images is not None
    for index in range(len(inputs.dataset)):
        found = inputs.load_encoded(index)
        opened = [
            load_image(ref, out / "data", inputs.aspect_ratio, images.mean_rgb, "") for ref in found.sample.images
        ]
        if found.image_tokens != tuple(len(images.process(image, "").token_ids) for image in opened):
            return False
    return True


def _train(out: Path, run: str, *, model: str = "model", packed: bool = False, num_ranks: int = 1) -> Metrics:
    """Distils `model` for a few steps, under ZeRO 3 if there are several ranks, and returns the metrics of each step.

    A run that is there already is not made again.
    """
    from tests.support.training import launch, stage

    metrics = out / run / "metrics.jsonl"
    if not metrics.is_file():
        config = stage(
            out / run,
            out / model,
            stage="dense-to-dense",
            data={
                "shards": str(out / "scores"),
                "image_root": str(out / "data"),
                "batching": "packed" if packed else "padded",
            },
            loss={"distillation": 1.0, "cross_entropy": 1.0},
            optim={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": STEPS},
            run={"zero_stage": 3 if num_ranks > 1 else 0, "log_steps": 1},
        )
        # In processes of their own, because vLLM and ZeRO-3 both leave traces in a process.
        for code, output in launch([config], out / "ranks" / run, num_ranks, timeout_s=200):
            if code:
                raise RuntimeError(output.strip().splitlines()[-1])
    return [json.loads(line) for line in metrics.read_text().splitlines() if '"loss"' in line]


def _loss_difference(one: Metrics, other: Metrics) -> float:
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))


def _upcycle(out: Path) -> float:
    """Upcycles the model into `out`/sparse and returns the largest difference of its logits from the dense ones."""
    import torch

    from train.config import MoEConfig
    from train.model.student import load_student
    from train.moe.upcycle import upcycle_directory

    dense = load_student(out / "model", dtype=torch.float32)
    upcycle_directory(out / "model", out / "sparse", MoEConfig(num_experts=4, top_k=2), seed=0)
    sparse = load_student(out / "sparse", dtype=torch.float32)
    ids = torch.randint(20, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((dense(input_ids=ids).logits - sparse(input_ids=ids).logits).abs().max())


if __name__ == "__main__":
    main()
