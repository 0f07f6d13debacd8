"""The page of results from made-up runs, its verdicts, and the calibration error."""

import copy
import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp

from benchmarks.results.measures import calibration_error, mean_divergence, token_metrics
from benchmarks.results.page import METRICS, NAMES, TARGETS, render, write_page
from benchmarks.results.steps import StepError, Steps
from benchmarks.results.verdict import CLAIMS, compute_verdict

_RUNS = {
    "demo": ("init", *TARGETS["demo"], "all-tokens", "dense", "sparse", "preference"),
    "text": TARGETS["text"],
}


def make_results(seeds: int = 3) -> dict[str, Any]:
    """Returns results in the form of results.json, in which no two values are equal."""
    rng = np.random.default_rng(0)

    def evaluation() -> dict[str, float]:
        return {
            **{metric: float(rng.uniform(0.1, 0.9)) for metric in METRICS},
            "parameters": float(rng.uniform(1e6, 9e6)),
        }

    def half(name: str) -> dict[str, Any]:
        metrics: dict[str, Any] = {f"{run}@{seed}": evaluation() for run in _RUNS[name] for seed in range(seeds)}
        metrics |= {run: evaluation() for run in ("teacher", "start")}
        metrics |= {
            f"capture-{target}": {"ids": float(rng.uniform(1, 99)), "bytes": float(rng.uniform(1e2, 1e4)), "tokens": 9}
            for target in TARGETS[name]
            if target != "ce"
        }
        return {"metrics": metrics, "settings": {"targets": {"sampled": {"num_draws": int(rng.integers(10, 99))}}}}

    demo, text = half("demo"), half("text")
    demo["metrics"]["sizes"] = {"train_images": 431, "held_out_images": 359}
    stages = ("teacher_init", "teacher", "init", "dense", "second", "preference")
    demo["settings"] |= {f"{stage}_steps": int(rng.integers(10, 999)) for stage in stages}
    text["metrics"]["sizes"] = {
        "train_tokens": 8123,
        "held_out_tokens": 1789,
        "vocab_size": 49152,
        "teacher_parameters": 1.3e8,
        "student_parameters": 5.3e7,
        "teacher_layers": 30,
        "student_layers": 7,
    }
    sizes = {"train_samples": 97, "held_out_samples": 19, "steps": 61, "batch_size": 2, "learning_rate": 0.001}
    text["settings"] |= {**sizes, "layers": [0, 5, 29]}
    return {
        "machine": {"cpu": "A processor", "cores": 2, "torch": "2.0.1"},
        "quick": False,
        "seeds": seeds,
        "confidence": 0.95,
        "calibration_bins": 15,
        "paper": {"distillation": 8.1, "response": 3.1, "sparse": 3.7},
        "minutes": {"demo": 41.0, "text": 43.0},
        "demo": demo,
        "text": text,
    }


def find_rows(page: str, first_cell: str) -> list[list[str]]:
    lines = [line[1:-1].split("|") for line in page.splitlines() if line.startswith("| ")]
    return [cells for cells in ([cell.strip() for cell in line] for line in lines) if cells[0] == first_cell]


@pytest.mark.parametrize(
    ("numbers", "sign", "outcome", "num_agreeing"),
    [
        ([2.0, 2.2, 1.9], 1, "holds", 3),
        ([-2.0, -2.2, -1.9], -1, "holds", 3),
        ([-2.0, -2.2, -1.9], 1, "does not hold", 0),
        ([2.0, 2.2, 1.9], -1, "does not hold", 0),
        ([0.1, 2.2, 0.9], 1, "within noise", 3),
        ([0.0, 0.0, 0.0], 1, "within noise", 0),
        ([0.5, 0.5, 0.5], 1, "holds", 3),
        ([2.0], 1, "one seed", 1),
    ],
)
def test_a_verdict_follows_from_the_interval_over_the_seeds(
    numbers: list[float], sign: Any, outcome: str, num_agreeing: int
) -> None:
    found = compute_verdict(numbers, sign, 0.95)
    assert (found.outcome, found.num_agreeing, found.num_seeds) == (outcome, num_agreeing, len(numbers))
    assert found.mean == pytest.approx(np.mean(numbers))


def test_a_verdict_agrees_with_scipys_t_test() -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        numbers = rng.normal(0.5, 0.5, rng.integers(2, 6)).tolist()
        decided = ttest_1samp(numbers, 0).pvalue < 0.05
        expected = ("holds" if np.mean(numbers) > 0 else "does not hold") if decided else "within noise"
        found = compute_verdict(numbers, 1, 0.95).outcome
        assert found == expected
        seen.add(found)
    assert {"holds", "within noise"} <= seen


@pytest.mark.parametrize(
    ("shift", "verdict", "sentence"),
    [
        (0.1, "holds", "direction holds: 3 of 3 seeds, mean difference in accuracy +10.0 ± 0.1 points"),
        (-0.1, "does not hold", "the opposite does: 0 of 3 seeds, mean difference in accuracy -10.0 ± 0.1 points"),
        (0.0, "within noise", "within noise: 1 of 3 seeds, mean difference in accuracy +0.0 ± 0.1 points"),
    ],
)
def test_the_page_says_whether_a_direction_holds(shift: float, verdict: str, sentence: str) -> None:
    results = make_results()
    metrics = results["demo"]["metrics"]
    for seed, noise in enumerate((-0.001, 0.001, 0.0)):
        metrics[f"ce@{seed}"]["accuracy"] = 0.5
        metrics[f"full@{seed}"]["accuracy"] = 0.5 + shift + noise
    page = render(results, "p.png")
    (row,) = find_rows(page, "Distillation beats cross-entropy alone")
    assert row[1] == "+8.1"
    assert row[-1] == verdict
    assert (
        f"- Distillation beats cross-entropy alone: digits: {'direction ' if verdict != 'within noise' else ''}" in page
    )
    assert sentence in page


def test_one_seed_gets_no_verdict_and_no_spread() -> None:
    page = render(make_results(seeds=1), "p.png")
    assert "direction holds" not in page
    assert "| one seed |" in page
    assert not re.search(r"± \d", page)


def test_every_figure_of_the_tables_is_computed_from_the_results() -> None:
    results = make_results()
    page = render(results, "p.png")
    for half, accuracy in (("demo", "accuracy"), ("text", "top1")):
        metrics = results[half]["metrics"]
        for run in ("full", "top-8", "top-p"):
            by_metric = {
                name: [metrics[f"{run}@{s}"][name] for s in range(3)] for name in ("kl", "nll", accuracy, "ece")
            }
            to_full = [metrics[f"{run}@{s}"]["kl"] - metrics[f"full@{s}"]["kl"] for s in range(3)]
            capture = metrics[f"capture-{run}"]
            expected = [f"{capture['ids']:.1f}", f"{capture['bytes']:,.0f}"]
            expected += [f"{np.mean(by_metric[m]):.4f} ± {statistics.stdev(by_metric[m]):.4f}" for m in ("kl", "nll")]
            expected += [
                f"{np.mean(by_metric[m]) * 100:.{d}f} ± {statistics.stdev(by_metric[m]) * 100:.{d}f}%"
                for m, d in ((accuracy, 1), ("ece", 2))
            ]
            expected += [f"{np.mean(to_full):+.4f} ± {statistics.stdev(to_full):.4f}"] if run != "full" else [""]
            assert [NAMES[run], *expected] in find_rows(page, NAMES[run])


def test_every_measured_figure_of_the_page_changes_with_the_results() -> None:
    """Scales all metrics; a figure that stayed the same would have been typed into the page."""
    results = make_results()
    scaled = copy.deepcopy(results)
    for half in ("demo", "text"):
        for found in scaled[half]["metrics"].values():
            for name in found.keys() & METRICS.keys():
                found[name] *= 1.37
    before, after = render(results, "p.png"), render(scaled, "p.png")
    decimals = re.compile(r"[+-]?\d+\.\d{2,}(?![\dM])")
    lines = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0].startswith("| ")]
    figures = [pair for a, b in lines for pair in zip(decimals.findall(a), decimals.findall(b), strict=True)]
    assert len(figures) > 150
    # Differences that are rounded to 0 stay 0.
    assert [pair for pair in figures if pair[0] == pair[1] and float(pair[0])] == []


def test_every_claim_of_the_paper_is_on_the_page_and_the_picture_beside_it(tmp_path: Path) -> None:
    write_page(json.loads(json.dumps(make_results())), tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text("utf-8")
    assert all(f"| {claim.text} |" in page for claim in CLAIMS)
    assert "(results.png)" in page
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.size[0] > 800


def test_calibration_error_of_a_case_by_hand() -> None:
    # Two bins: of {0.2, 0.4} one is right, of {0.9, 0.8, 1.0} two are.
    confidence = np.array([0.2, 0.9, 0.4, 0.8, 1.0])
    correct = np.array([False, True, True, False, True])
    expected = (abs(1 - 0.6) + abs(2 - 2.7)) / 5
    assert calibration_error(confidence, correct, num_bins=2) == pytest.approx(expected)


def test_calibration_error_is_that_of_bins_made_by_masks() -> None:
    rng = np.random.default_rng(2)
    confidence = np.concatenate([rng.uniform(0, 1, 3000), np.arange(1, 16) / 15])
    correct = rng.uniform(0, 1, len(confidence)) < confidence**2
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct) == pytest.approx(total, abs=1e-3)
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0


def test_token_metrics_and_divergence_of_a_case_by_hand() -> None:
    probs_RV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    teacher_RV = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = token_metrics(probs_RV.log(), torch.tensor([0, 2]))
    assert found["nll"] == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert found["top1"] == 0.5
    assert found["ece"] == pytest.approx((0.5 + 0.8) / 2)
    expected = (0.25 * np.log(0.25 / 0.5) + 0.5 * np.log(0.5 / 0.25)) / 2
    assert mean_divergence(teacher_RV.log(), probs_RV.log()) == pytest.approx(expected)


def test_a_finished_measurement_does_not_run_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "demo")
    with pytest.raises(StepError, match="run this half first"):
        steps.settings()
    steps.begin({"steps": 3, "layers": (0, 1)})
    assert steps.measure("full@0", lambda: {"kl": 0.5}) == {"kl": 0.5}
    again = Steps(tmp_path / "demo")
    again.begin({"steps": 3, "layers": (0, 1)})
    assert again.measure("full@0", lambda: {"kl": 0.9}) == {"kl": 0.5}
    assert again.metrics() == {"full@0": {"kl": 0.5}}
    with pytest.raises(StepError, match="other sizes"):
        again.begin({"steps": 4, "layers": (0, 1)})


def test_a_failed_command_names_the_log_and_is_not_marked_as_done(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "text")
    steps.begin({})
    with pytest.raises(StepError, match=r"exit code 1; .*log\.txt"):
        steps.module("absent", "no_such_module_anywhere")
    assert "no_such_module_anywhere" in (tmp_path / "text" / "log.txt").read_text("utf-8")
    assert not (tmp_path / "text" / "done" / "absent.json").exists()
    steps.module("present", "this")
    assert "present" in steps.seconds()
