"""Writes docs/results.md and its picture from results.json: no figure of the page is typed here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results.verdict import (
    CLAIMS,
    Claim,
    Comparison,
    Verdict,
    differences,
    evaluate_comparison,
    stdev,
    values,
)

Results = Mapping[str, Any]

NAMES = {
    "full": "full",
    "top-64": "top 64",
    "top-8": "top 8",
    "top-p": "top-p",
    "sampled": "sampled",
    "more-draws": "sampled",
    "ce": "CE alone",
    "init": "student, after init",
    "start": "student, untrained",
    "all-tokens": "full, all tokens",
    "dense": "dense, trained on",
    "sparse": "mixture of experts",
    "preference": "after preference",
    "teacher": "teacher",
}
TARGETS = {
    "demo": ("full", "top-64", "top-8", "top-p", "sampled", "more-draws", "ce"),
    "text": ("full", "top-64", "top-8", "top-p", "sampled", "ce"),
}
# Title, factor, digits, and unit that follows a value.
METRICS: dict[str, tuple[str, float, int, str]] = {
    "kl": ("KL to teacher", 1, 4, ""),
    "nll": ("NLL", 1, 4, ""),
    "accuracy": ("accuracy", 100, 1, "%"),
    "wrong": ("wrong digit", 100, 1, "%"),
    "top1": ("accuracy", 100, 1, "%"),
    "ece": ("calibration error", 100, 2, "%"),
}
_COLUMNS = {"demo": ("kl", "nll", "accuracy", "ece"), "text": ("kl", "nll", "top1", "ece")}
_POINTS = {"%": " points", "": ""}


def write_page(results: Results, path: Path) -> None:
    """Writes the page to `path`, and the picture beside it."""
    plot(results, path.with_suffix(".png"))
    path.write_text(render(results, path.with_suffix(".png").name), "utf-8")


def render(results: Results, picture: str) -> str:
    """Returns the page as Markdown; `picture` is the address of the picture."""
    parts = [
        _introduction(results),
        "## What is measured",
        _setup(results),
        "## What is kept of the teacher's distribution",
        _targets(results),
        f"![KL to the teacher against bytes a token]({picture})",
        "## What LLaVA-MoD finds, and whether it holds here",
        _claims(results),
        "## The runs behind the comparisons",
        _stages(results),
        "## What this does not show",
        _limits(results),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: Results) -> str:
    quick = "**A quick run: its figures mean nothing.** " if results["quick"] else ""
    minutes = " and ".join(f"{value:.0f} minutes ({half})" for half, value in results["minutes"].items())
    machine = results["machine"]
    packages = ", ".join(f"{name} {machine[name]}" for name in machine if name not in ("cpu", "cores"))
    return (
        f"# Results\n\n{quick}What students learn from stored scores, by what was stored. "
        "`python -m benchmarks.results.run OUT` runs everything with the project's own commands and writes this page; "
        "every figure on it, and every verdict, is computed from the runs.\n\n"
        f"Seeds of each run: {results['seeds']}. `±` is the standard deviation over the seeds; differences are taken "
        "seed by seed, between runs that share the seed, the data, their order and the number of steps. "
        f"Machine: {machine['cpu']}, {machine['cores']} cores, no GPU, float32; {minutes}, side by side on one core "
        f"each. Versions: {packages}."
    )


def _setup(results: Results) -> str:
    demo, text = results["demo"], results["text"]
    steps, images = demo["settings"], demo["metrics"]["sizes"]
    sizes, counts = text["settings"], text["metrics"]["sizes"]
    teacher, student = demo["metrics"]["teacher"], demo["metrics"]["full@0"]
    return (
        f"**Digits.** The demo's task, data and configurations ([configs/demo](../configs/demo)): a teacher of "
        f"{_millions(teacher['parameters'])} parameters and a student of {_millions(student['parameters'])} answer "
        f"questions about handwritten digits. The teacher is trained for {steps['teacher_init_steps']} and "
        f"{steps['teacher_steps']} steps and scored once for each target. A student has {images['train_images']} "
        f"images: {steps['init_steps']} steps of init, {steps['dense_steps']} dense under its target, "
        f"{steps['second_steps']} more as a mixture of experts or dense, {steps['preference_steps']} of preference. "
        "The seed is that of the "
        f"adapter, the routers and the order. Measured on {images['held_out_images']} images that no model has seen: "
        "accuracy is the share of questions whose greedy answer names the right digit, *wrong digit* (the "
        "hallucination rate) the share whose answer says something untrue of it; one question is "
        f"{100 / images['held_out_images']:.2f} points.\n\n"
        f"**Text.** The teacher is SmolLM2-135M-Instruct ({_millions(counts['teacher_parameters'])} parameters, "
        f"{counts['teacher_layers']} layers, {counts['vocab_size']:,} tokens). The student keeps its embeddings and "
        f"{counts['student_layers']} of its layers ({', '.join(map(str, sizes['layers']))}; "
        f"{_millions(counts['student_parameters'])} parameters), so that a short training means something. It reads "
        f"{sizes['train_samples']} questions about Python's standard library that are answered by its docstrings, "
        f"{counts['train_tokens']:,} response tokens: {sizes['steps']} steps of {sizes['batch_size']}, at a rate of "
        f"{sizes['learning_rate']:g}. The seed is that of the order. Measured on {sizes['held_out_samples']} questions "
        f"with other docstrings, {counts['held_out_tokens']:,} response tokens; accuracy is the share of them that "
        "the student finds likeliest.\n\n"
        "**Both.** KL(teacher ‖ student) over the whole vocabulary and NLL are nats a response token. Calibration "
        "error: the expected calibration error of the likeliest token at each held-out response token, in "
        f"{results['calibration_bins']} bins of equal width: the mean distance "
        "between how sure the student is and how often it is right."
    )


def _targets(results: Results) -> str:
    introduction = (
        "All students of a table have the same steps, batches and rate; only the target differs. *ids* is the mean "
        "number of entries kept of a distribution, *bytes* the size of the shards a response token (own log-probs, "
        "tokens and text included). CE alone reads the shards of top 64 for their text. The last column is the "
        "difference in KL to the student that had the full distribution."
    )
    blocks = [introduction]
    for half, title in (("demo", "Digits"), ("text", "Text")):
        rows = [
            [_target(results, half, run), *_capture_cells(results, half, run)]
            + [_value(results, half, run, metric) for metric in _COLUMNS[half]]
            + [_difference_to_full(results, half, run)]
            for run in ("teacher", "init" if half == "demo" else "start", *TARGETS[half])
        ]
        titles = ["target", "ids", "bytes", *(METRICS[metric][0] for metric in _COLUMNS[half]), "KL - full's"]
        blocks.append(f"**{title}**\n\n{_table(titles, rows)}")
    return "\n\n".join(blocks)


def _target(results: Results, half: str, run: str) -> str:
    """Returns a target's name with the settings of its capture."""
    kept = results[half]["settings"]["targets"].get(run, {})
    parts = [NAMES[run]]
    if "top_p" in kept:
        parts.append(f"p = {kept['top_p']:g}")
    if "num_draws" in kept:
        parts.append(f"{kept['num_draws']:,} draws")
    return ", ".join(parts)


def _capture_cells(results: Results, half: str, run: str) -> list[str]:
    capture = results[half]["metrics"].get(f"capture-{run}")
    return ["", ""] if capture is None else [f"{capture['ids']:,.1f}", f"{capture['bytes']:,.0f}"]


def _difference_to_full(results: Results, half: str, run: str) -> str:
    if run not in TARGETS[half] or run == "full":
        return ""
    found = differences(results, half, run, "full", "kl")
    return _number(found, "kl", signed=True)


def _claims(results: Results) -> str:
    level = f"{results['confidence']:.0%}"
    rows = []
    for claim in CLAIMS:
        # Only the first row of a claim names it.
        claim_cells = [claim.text, _paper_gain(results, claim)]
        for comparison in claim.comparisons:
            rows.append([*claim_cells, *_comparison_cells(results, comparison)])
            claim_cells = ["", ""]
    titles = ["claim", "paper", "here, measured by", "mean difference", "seeds", "verdict"]
    return (
        "[LLaVA-MoD](https://arxiv.org/abs/2408.15881) reports gains in points of its benchmarks' mean accuracy. Only "
        f"the direction can be compared. A direction *holds* if the {level} interval of the mean paired difference "
        "(Student's t over the seeds) lies on the claim's side of 0, *does not hold* if it lies on the other side, and "
        "is *within noise* if it has 0 in it. *seeds* counts those whose difference has the claimed sign. The interval "
        "knows the noise of training, not that of which questions are held out.\n\n"
        f"{_table(titles, rows)}\n\n" + "\n".join(f"- {_sentence(results, claim)}" for claim in CLAIMS)
    )


def _paper_gain(results: Results, claim: Claim) -> str:
    return f"+{results['paper'][claim.key]:.1f}" if claim.key in results["paper"] else "direction only"


def _comparison_cells(results: Results, comparison: Comparison) -> list[str]:
    found = evaluate_comparison(results, comparison)
    c = comparison
    what = f"{METRICS[c.metric][0]}, {'digits' if c.half == 'demo' else 'text'}: {NAMES[c.better]} - {NAMES[c.worse]}"
    return [what, _difference(found, c), f"{found.num_agreeing} of {found.num_seeds}", found.outcome]


def _difference(found: Verdict, comparison: Comparison) -> str:
    _, factor, digits, unit = METRICS[comparison.metric]
    shown = f"{round(factor * found.mean, digits) + 0.0:+.{digits}f}"
    return shown + (f" ± {factor * found.stdev:.{digits}f}" if found.num_seeds > 1 else "") + _POINTS[unit]


def _sentence(results: Results, claim: Claim) -> str:
    """Returns the claim in words, by the first comparison of each half, whose metric is closest to the paper's."""
    outcomes = []
    for half in ("demo", "text"):
        first = next((c for c in claim.comparisons if c.half == half), None)
        if first is not None:
            found = evaluate_comparison(results, first)
            outcome = {
                "holds": "direction holds",
                "does not hold": "direction does not hold, the opposite does",
                "within noise": "within noise",
                "one seed": "one seed, whose spread is not known",
            }[found.outcome]
            task = "digits" if half == "demo" else "text"
            outcomes.append(
                f"{task}: {outcome}: {found.num_agreeing} of {found.num_seeds} seeds, "
                f"mean difference in {METRICS[first.metric][0]} {_difference(found, first)}"
            )
    return f"{claim.text}: {'; '.join(outcomes)}."


def _stages(results: Results) -> str:
    columns = ("kl", "nll", "accuracy", "wrong", "ece")
    groups = {
        "Response alone against all tokens, both with the full distribution": ("full", "all-tokens"),
        "From the student of top 64, as a mixture of experts or dense; and preference after that": (
            "top-64",
            "dense",
            "sparse",
            "preference",
        ),
    }
    blocks = []
    for title, runs in groups.items():
        rows = [
            [NAMES[run], _millions(values(results, "demo", run, "parameters")[0])]
            + [_value(results, "demo", run, metric) for metric in columns]
            for run in runs
        ]
        table = _table(["student", "parameters", *(METRICS[metric][0] for metric in columns)], rows)
        blocks.append(f"{title} (digits):\n\n{table}")
    return "\n\n".join(blocks)


def _limits(results: Results) -> str:
    digits, text = results["demo"]["metrics"], results["text"]["metrics"]
    return (
        "- Models and data are small: a student here is trained for minutes. The paper's are thousands of times as "
        "large, and its gains those on general benchmarks.\n"
        f"- On digits the teacher is sure: draws that keep {text['capture-sampled']['ids']:.1f} different ids of "
        f"SmolLM2's distributions keep {digits['capture-sampled']['ids']:.1f} there. A second row has draws for "
        f"{digits['capture-more-draws']['ids']:.1f}. Of its best 64, {digits['capture-top-64']['ids']:.1f} "
        "are kept on average: its output layer has more rows than the tokenizer has ids, and such rows never are.\n"
        "- The mixture of experts has more parameters than the dense student that is trained on for as many steps, "
        "and uses more of them a token. The dense one trains all of its language model, the sparse one experts, "
        "routers and adapter.\n"
        "- Response-only training, the mixture of experts and preference are compared on digits alone.\n"
        "- Every target has the same rate and number of steps, chosen for none of them; at another length of training "
        "the order may be another."
    )


def plot(results: Results, path: Path) -> None:
    """Plots KL to the teacher against bytes a token, with a panel for each task."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, half, title in zip(axes, ("demo", "text"), ("Digits", "Text"), strict=True):
        for run in TARGETS[half]:
            found = values(results, half, run, "kl")
            mean, deviation = sum(found) / len(found), stdev(found)
            if run == "ce":
                axis.axhline(mean, color="grey", linestyle="--", label="CE alone")
                axis.axhspan(mean - deviation, mean + deviation, color="grey", alpha=0.2)
                continue
            num_bytes = results[half]["metrics"][f"capture-{run}"]["bytes"]
            axis.errorbar(num_bytes, mean, deviation, fmt="o", capsize=4, label=_target(results, half, run))
        axis.set(title=title, xscale="log", xlabel="bytes a token in the shards", ylabel="KL to teacher, nats a token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _value(results: Results, half: str, run: str, metric: str) -> str:
    return _number(values(results, half, run, metric), metric)


def _number(numbers: Sequence[float], metric: str, *, signed: bool = False) -> str:
    """Returns mean and standard deviation; adding 0.0 turns a rounded -0.0 into 0.0."""
    _, factor, digits, unit = METRICS[metric]
    mean = round(factor * sum(numbers) / len(numbers), digits) + 0.0
    shown = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return shown + (f" ± {factor * stdev(numbers):.{digits}f}" if len(numbers) > 1 else "") + unit


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number < 10e6 else f"{number / 1e6:.0f}M"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
