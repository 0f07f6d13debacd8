"""Numerics, speed and memory of what runs on a GPU, in one unattended run of a few minutes and without network.

    python -m benchmarks.gpu [--quick] [--out FILE]

    losses       fused output layer against float64 and against whole logits: values, gradients, time, memory
    row_scores   the capture's scores on the GPU against the CPU's, rows/s, memory
    features     a vision tower's features, computed ahead and live, bit for bit
    training     stages of the real trainer, dense and sparse, padded and packed (needs DeepSpeed)

Prints one JSON object, and writes it to `--out` after each part. A part that raises, or whose figures leave their
bounds, is listed under "failures"; one that lacks a package or time under "skipped". Without CUDA, or with `--quick`,
shapes are small. Memory is the highest that torch allocated, less what it held before; null without CUDA.

Legend: R rows, H hidden size, V vocabulary, K kept entries, D draws.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# transformers imports DeepSpeed, which has to find the GPU, but benchmarks/__init__.py sets the CPU.
if torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cuda"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOP_K = 64
# Nothing new begins after this time, and a stage that is still training is stopped.
DEADLINE_S = 440.0


@dataclass(frozen=True)
class Shape:
    """Output layer of a model, and the tokens that are timed and compared."""

    hidden: int
    vocab_size: int
    num_tokens: int
    num_compared: int


FULL_SHAPES = {"0.5B": Shape(896, 151_936, 4096, 1024), "7B": Shape(3584, 152_064, 4096, 1024)}
QUICK_SHAPES = {"tiny": Shape(64, 8192, 128, 64)}

Result = dict[str, Any]


# Losses


def check_losses(shape: Shape, device: str = DEVICE) -> Result:
    """Compares fused losses and their gradients with float64, beside those of whole bfloat16 logits.

    Errors of values are the largest over rows, in nats; those of gradients are norms relative to the exact gradient's.
    """
    from benchmarks.loss import LossProblem
    from tests.support import reference_unfused as unfused
    from train.loss.functional import distillation_loss

    problem = LossProblem(shape.num_compared, shape.hidden, shape.vocab_size, device)
    exact_operands = tuple(operand.detach().double().requires_grad_() for operand in problem.operands)

    def unfused_loss(name: str, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        logits_RV = hidden_RH @ weight_VH.T
        if name == "cross_entropy":
            return -unfused.own_logprobs(logits_RV, problem.ids_RK[:, 0], vocab_size=shape.vocab_size)
        return unfused.distillation_loss(logits_RV, *problem.kept, vocab_size=shape.vocab_size, **settings[name])

    def fused_loss(name: str) -> Tensor:
        rows = problem.fused_rows()
        if name == "cross_entropy":
            return -rows.own_logprobs
        return distillation_loss(rows, *problem.kept[1:], vocab_size=shape.vocab_size, **settings[name])

    settings: dict[str, Any] = {
        "cross_entropy": {},
        "forward_kl": {},
        "reverse_kl": {"divergence": "reverse_kl"},
        "jensen_shannon": {"divergence": "jensen_shannon"},
        "total_variation": {"divergence": "total_variation"},
        "renormalise": {"tail": "renormalise", "temperature": 2.0},
    }
    errors = {}
    for name in settings:
        exact_R = unfused_loss(name, *exact_operands)
        exact = torch.autograd.grad(exact_R.mean(), exact_operands)
        errors[name] = {
            way: _loss_errors(loss_R, problem.operands, exact_R.detach(), exact)
            for way, loss_R in (("fused", fused_loss(name)), ("unfused", unfused_loss(name, *problem.operands)))
        }
    problems = [
        f"{name}: {key} {each['fused'][key]:.2g} exceeds {bound:.2g}"
        for name, each in errors.items()
        for key, bound in (
            ("max_value_error_nats", 1e-3),
            ("hidden_gradient_error", 1.05 * each["unfused"]["hidden_gradient_error"]),
            ("weight_gradient_error", 1.05 * each["unfused"]["weight_gradient_error"]),
        )
        if not each["fused"][key] <= bound
    ]
    return {"num_tokens": shape.num_compared, "errors": errors, "out_of_bounds": problems}


def _loss_errors(
    loss_R: Tensor, operands: tuple[Tensor, ...], exact_R: Tensor, exact_gradients: tuple[Tensor, ...]
) -> dict[str, float]:
    gradients = torch.autograd.grad(loss_R.mean(), operands)
    hidden, weight = (
        float((found.double() - exact).norm() / exact.norm())
        for found, exact in zip(gradients, exact_gradients, strict=True)
    )
    return {
        "max_value_error_nats": float((loss_R.detach().double() - exact_R).abs().max()),
        "hidden_gradient_error": hidden,
        "weight_gradient_error": weight,
    }


def time_losses(shape: Shape, num_repeats: int) -> Result:
    """Times forward and backward of the loss, fused and from whole logits; the fused one also by ids a chunk.

    Memory includes the gradients of hidden states and weight, whose sizes are given beside it.
    """
    from benchmarks.loss import WAYS, LossProblem

    problem = LossProblem(shape.num_tokens, shape.hidden, shape.vocab_size, DEVICE)

    def backward_of_way(way: str) -> None:
        torch.autograd.grad(problem.loss(way), problem.operands)

    def backward_of_chunks(chunk_ids: int) -> None:
        torch.autograd.grad(problem.fused(chunk_ids).mean(), problem.operands)

    works: dict[str, Callable[[], None]] = {way: partial(backward_of_way, way) for way in WAYS}
    for chunk_ids in (1024, 4096, 16_384, 65_536):
        works[f"fused, {chunk_ids} ids a chunk"] = partial(backward_of_chunks, chunk_ids)
    measured = _measure(works, num_repeats)
    gradients_mib = sum(operand.nbytes for operand in problem.operands) / 2**20
    return {
        "num_tokens": shape.num_tokens,
        "top_k": TOP_K,
        "gradients_mib": round(gradients_mib, 1),
        "speedup_vs_dense": round(measured["dense"]["ms"] / measured["fused"]["ms"], 3),
        "speedup_vs_gather": round(measured["gather"]["ms"] / measured["fused"]["ms"], 3),
        "ways": measured,
    }


# Row scores


def check_row_scores(shape: Shape, device: str = DEVICE) -> Result:
    """Compares scores of one set of float32 logits with a float64 softmax, and scores made on `device` with the CPU's.

    `same_logits` are the logits of `device`, scored there and on the CPU; under `whole` each computes its own logits,
    in float32. Ids may differ where logits tie or nearly do, draws where the two cumulative sums round apart.
    """
    from precompute.engine.row_scores import RowScores, score_rows

    num_rows = shape.num_compared // 4
    hidden_RH, weight_VH, targets_R, uniforms_RD = _scoring_inputs(shape, device, torch.float32, num_rows)

    def score(hidden: Tensor, weight: Tensor, logits: Tensor | None = None) -> RowScores:
        place = hidden.device
        rows = hidden if logits is None else logits
        scores = score_rows(
            rows,
            targets_R.to(place),
            (lambda part: part @ weight.T) if logits is None else (lambda part: part.clone()),
            vocab_size=shape.vocab_size,
            top_k=TOP_K,
            uniforms_RD=uniforms_RD.to(place),
        )
        assert scores is not None
        return RowScores(**{name: part.cpu() for name, part in vars(scores).items()})

    logits_RV = hidden_RH @ weight_VH.T
    exact_RV = logits_RV.double().log_softmax(1).cpu()
    found, on_cpu = score(hidden_RH, weight_VH, logits_RV), score(hidden_RH.cpu(), weight_VH, logits_RV.cpu())
    vs_float64 = {device: _score_errors(found, exact_RV, targets_R), "cpu": _score_errors(on_cpu, exact_RV, targets_R)}
    same_logits = _score_differences(found, on_cpu)
    whole = _score_differences(score(hidden_RH, weight_VH), score(hidden_RH.cpu(), weight_VH.cpu()))
    bounds = [
        *(
            (f"vs_float64, {place}", key, error, error <= 5e-5)
            for place, e in vs_float64.items()
            for key, error in e.items()
        ),
        *(("same_logits", key, value, _is_close(key, value, 5e-5)) for key, value in same_logits.items()),
        *(("whole", key, value, _is_close(key, value, 5e-4)) for key, value in whole.items()),
    ]
    return {
        "num_rows": num_rows,
        "vs_float64": vs_float64,
        "same_logits": same_logits,
        "whole": whole,
        "out_of_bounds": [f"{kind}: {key} {value:.3g}" for kind, key, value, good in bounds if not good],
    }


def time_row_scores(shape: Shape, num_repeats: int) -> Result:
    """Times scores of bfloat16 rows with their logits: best entries, draws, neither; and two ways to the best."""
    from precompute.engine.row_scores import best_entries, score_rows

    hidden_RH, weight_VH, targets_R, uniforms_RD = _scoring_inputs(shape, DEVICE, torch.bfloat16, shape.num_tokens)
    logits_RV = (hidden_RH[:256] @ weight_VH.T).float()

    def score(top_k: int, uniforms: Tensor | None) -> None:
        score_rows(
            hidden_RH,
            targets_R,
            lambda rows: rows @ weight_VH.T,
            vocab_size=shape.vocab_size,
            top_k=top_k,
            uniforms_RD=uniforms,
        )

    rows = {
        f"k = {TOP_K}": lambda: score(TOP_K, None),
        f"{TOP_K} draws": lambda: score(0, uniforms_RD),
        "own token alone": lambda: score(0, None),
    }
    measured = _measure(rows, num_repeats)
    for each in measured.values():
        each["rows_per_s"] = round(shape.num_tokens / each["ms"] * 1000)
    best = {
        "best_entries": lambda: best_entries(logits_RV, TOP_K),
        "torch.topk": lambda: logits_RV.topk(TOP_K),
    }
    return {
        "num_rows": shape.num_tokens,
        "scores": measured,
        f"best {TOP_K} of {len(logits_RV)} rows": _measure(best, num_repeats),
    }


def _scoring_inputs(
    shape: Shape, device: str, dtype: torch.dtype, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns hidden states [R, H], weight [V, H], targets int64 [R] and uniforms float64 [R, D]."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden_RH = normal(num_rows, shape.hidden).to(dtype)
    weight_VH = (normal(shape.vocab_size, shape.hidden) * 3 / shape.hidden**0.5).to(dtype)
    targets_R = torch.randint(shape.vocab_size, (num_rows,), generator=generator, device=device)
    uniforms_RD = torch.rand(num_rows, TOP_K, generator=generator, device=device, dtype=torch.float64)
    return hidden_RH, weight_VH, targets_R, uniforms_RD


def _score_errors(found: Any, exact_RV: Tensor, targets_R: Tensor) -> dict[str, float]:
    """Returns the largest errors of own log-probs, of the K best, and of those at the ids that were found, in nats."""
    own_R = exact_RV.gather(1, targets_R.cpu()[:, None])[:, 0]
    return {
        "max_own_error_nats": float((found.own - own_R).abs().max()),
        "max_topk_error_nats": float((found.logprobs - exact_RV.topk(TOP_K).values).abs().max()),
        "max_error_of_the_ids_nats": float((found.logprobs - exact_RV.gather(1, found.ids.long())).abs().max()),
    }


def _score_differences(found: Any, expected: Any) -> dict[str, float]:
    return {
        "max_own_difference_nats": float((found.own - expected.own).abs().max()),
        "max_topk_difference_nats": float((found.logprobs - expected.logprobs).abs().max()),
        "equal_ids_fraction": float((found.ids == expected.ids).double().mean()),
        "equal_draws_fraction": float((found.drawn == expected.drawn).double().mean()),
    }


def _is_close(key: str, value: float, bound: float) -> bool:
    # A draw falls on another id where rounding moves the border between two ids past its uniform.
    minimum = {"equal_ids_fraction": 0.995, "equal_draws_fraction": 0.97}
    return value >= minimum[key] if key in minimum else value <= bound


# Measuring


def _measure(works: Mapping[str, Callable[[], object]], num_repeats: int) -> dict[str, dict[str, Any]]:
    """Runs the works in turn; returns the median time of each in ms and its peak memory in MiB above what was held."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak_mib: dict[str, float | None] = {}
    for turn in range(num_repeats + 2):
        for name, work in works.items():
            resting = _reset_peak()
            started = time.perf_counter()
            work()
            peak = _peak_mib()
            # The first two turns warm up.
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
            peak_mib[name] = None if peak is None else round(peak - resting, 1)
    return {
        name: {"ms": round(statistics.median(times) * 1000, 3), "peak_mib_above_rest": peak_mib[name]}
        for name, times in seconds.items()
    }


def _reset_peak() -> float:
    """Waits for the GPU, and returns what is allocated, in MiB."""
    if DEVICE == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated()) / 2**20


def _peak_mib() -> float | None:
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated()) / 2**20


# The run


class Report:
    """Results so far; written to `out` after each part, so that a run that is killed leaves its figures."""

    def __init__(self, quick: bool, out: Path | None) -> None:
        self._started = time.monotonic()
        self._out = out
        self.result: Result = {
            "machine": _describe_machine(),
            "quick": quick,
            "parts": {},
            "failures": {},
            "skipped": {},
        }

    @property
    def remaining_s(self) -> float:
        """Returns the seconds until the deadline."""
        return DEADLINE_S - (time.monotonic() - self._started)

    def run(self, name: str, part: Callable[[], Result]) -> None:
        """Runs a part; whatever becomes of it is in the result, and the next one runs."""
        if self.remaining_s <= 0:
            self.result["skipped"][name] = "no time left"
        else:
            started = time.monotonic()
            try:
                found = part()
                self.result["parts"][name] = found | {"seconds": round(time.monotonic() - started, 1)}
                if found.get("out_of_bounds"):
                    self.result["failures"][name] = "; ".join(found["out_of_bounds"])
            except ModuleNotFoundError as error:
                self.result["skipped"][name] = f"not installed: {error.name}"
            except Exception as error:  # noqa: BLE001 - what breaks in one part must not keep the others from running
                self.result["failures"][name] = f"{type(error).__name__}: {error}"[-4000:]
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        self.result["seconds"] = round(DEADLINE_S - self.remaining_s, 1)
        kinds = [kind for kind in ("failures", "skipped", "parts") if name in self.result[kind]]
        line = f"{self.result['seconds']:6.1f} s  {name}, {kinds[0]}: {json.dumps(self.result[kinds[0]][name])}"
        print(line, file=sys.stderr, flush=True)
        if self._out is not None:
            self._out.write_text(json.dumps(self.result, indent=1))


def _describe_machine() -> Result:
    import transformers

    transformers.logging.disable_progress_bar()
    found: Result = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "cuda": torch.version.cuda, "device": "cpu"}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def main() -> None:
    """Runs every part and prints the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check of what runs on a GPU")
    parser.add_argument("--quick", action="store_true", help="small shapes, as always without CUDA")
    parser.add_argument("--out", type=Path, help="also write the JSON here, part by part")
    options = parser.parse_args()
    quick = options.quick or DEVICE == "cpu"
    report = Report(quick, options.out)
    for name, shape in (QUICK_SHAPES if quick else FULL_SHAPES).items():
        report.run(f"losses {name}, numerics", partial(check_losses, shape))
        report.run(f"losses {name}, speed", partial(time_losses, shape, num_repeats=5))
        report.run(f"row_scores {name}, numerics", partial(check_row_scores, shape))
        report.run(f"row_scores {name}, speed", partial(time_row_scores, shape, num_repeats=5))
    from benchmarks import gpu_stages

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        report.run("features", partial(gpu_stages.check_features, root / "features", quick=quick))
        stages: dict[str, Any] = {}
        report.run("training, data", partial(gpu_stages.write_data, root / "training", stages, quick=quick))
        for name, settings in stages.items():
            train = partial(gpu_stages.train_in_child, settings, timeout_s=max(report.remaining_s, 1))
            report.run(f"training, {name}", train)
    print(json.dumps(report.result))


if __name__ == "__main__":
    main()
