"""A report's facts are those of the runs; its samples are those where an independent computation finds most KL."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli import app
from common.data.dataset import Dataset
from common.errors import ConfigError
from common.shards.manifest import read_manifest, shard_path
from common.shards.score_shard import ShardFile
from tests.support.browser import count_colours
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, run_stages, stage, write_mixed_dataset
from train.run.history import read_stage
from use.report.disagreement import find_disagreements
from use.report.line_charts import line_svg, thin
from use.report.stages import Chart, charts_of, collect_stages, difference_rows, metric_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages: captions, then a sparse student on a teacher's scores with held-out samples."""
    root = tmp_path_factory.mktemp("report")
    student = tiny_llava(root / "student", num_layers=2)
    write_mixed_dataset(root / "data", 24)
    teacher = LiveTeacher(tiny_llava(root / "teacher", num_layers=2, seed=7), root / "data")
    teacher.write_output(root / "scores", root / "data" / "kd.json", "kd", top_k=8, shard=64)
    images = {"image_root": str(root / "data")}
    optim = {"max_steps": 6, "global_batch_size": 4}
    first = stage(
        root / "captions",
        student,
        stage="init",
        loss={"cross_entropy": 1.0},
        optim=optim,
        data={"dataset": str(root / "data" / "kd.json"), **images},
    )
    second = stage(
        root / "sparse",
        root / "captions" / "final",
        stage="dense-to-sparse",
        loss={"distillation": 1.0, "balance": 0.01},
        moe={"num_experts": 4, "top_k": 2},
        optim=optim,
        data={"shards": str(root / "scores"), "validation_fraction": 0.25, **images},
        run={"eval_steps": 3},
    )
    run_stages([first], root / "scratch-1")
    run_stages([second], root / "scratch-2")
    return root


def test_a_single_run_brings_the_stages_before_it(runs: Path) -> None:
    assert [each.name for each in collect_stages([runs / "sparse"])] == ["init", "dense-to-sparse"]
    several = collect_stages([runs / "sparse", runs / "captions"])
    assert [each.name for each in several] == ["dense-to-sparse", "init"]
    with pytest.raises(ConfigError, match=r"data: is no output of decant train"):
        collect_stages([runs / "data"])


def test_curves_and_tables_are_those_of_the_log(runs: Path) -> None:
    stages = collect_stages([runs / "sparse"])
    lines = [json.loads(line) for line in (runs / "sparse" / "metrics.jsonl").open()]
    (chart,) = [chart for chart in charts_of(stages[1]) if "distillation" in chart.curves]
    assert chart.curves["distillation"] == [(n["step"], n["distillation"]) for n in lines if "distillation" in n]
    assert [x for x, _ in chart.curves["eval_distillation"]] == [3, 6]
    header, rows = metric_rows(stages)
    assert header == ["last value", "init", "dense-to-sparse"]
    last = [line["eval_distillation"] for line in lines if "eval_distillation" in line][-1]
    assert ["eval_distillation", "", f"{last:.4g}"] in rows
    _, rows = difference_rows(stages)
    assert ["moe.num_experts", "", "4"] in rows
    assert "optim.max_steps" not in {key for key, *_ in rows}


def test_samples_are_those_with_most_divergence(runs: Path) -> None:
    """The reference scores each held-out sample with the student's whole distribution, in float64, from the shard."""
    stages = collect_stages([runs / "sparse"])
    found, what = find_disagreements(stages[1], 3)
    manifest = read_manifest(runs / "scores")
    rows = {row.sample.id: row for row in ShardFile(shard_path(runs / "scores", 0), manifest, 0)}
    held_out = {sample.id for sample in find_disagreements(stages[1], 99)[0]}
    assert len(held_out) == 6
    assert what.startswith("of 6 held-out samples, whose mean divergence is ")
    student = LiveTeacher(runs / "sparse" / "final", runs / "data")
    dataset = Dataset.open(runs / "data" / "kd.json", "kd")
    expected = {}
    for name in held_out:
        scores = rows[name].conversations[0].scores
        sample = next(dataset[n] for n in range(len(dataset)) if dataset[n].id == name)
        logprobs_RV = student.logprobs(sample, 0)[1].double().numpy()
        ids_RK, stored_RK = scores.topk()
        teacher_RK = np.exp(stored_RK.astype(np.float64))
        kept_RK = np.take_along_axis(logprobs_RV, ids_RK, 1)
        rest_R = np.log1p(-np.minimum(np.exp(kept_RK).sum(1), 1 - 1e-12))
        tail_R = np.where(
            scores.rest_mass > 0, scores.rest_mass * (np.log(np.maximum(scores.rest_mass, 1e-300)) - rest_R), 0
        )
        expected[name] = float(((teacher_RK * (stored_RK - kept_RK)).sum(1) + tail_R).mean())
    worst = sorted(expected, key=lambda name: -expected[name])[:3]
    assert [sample.id for sample in found] == worst
    for compared in found:
        assert compared.divergence == pytest.approx(expected[compared.id], rel=1e-3)


def test_what_cannot_be_compared_is_said(runs: Path) -> None:
    first = read_stage(runs / "captions")
    assert first is not None
    assert find_disagreements(first, 3) == ([], "init was not trained on a teacher's scores of conversations")


def test_the_command_writes_page_and_markdown_and_replaces_nothing_of_others(runs: Path, tmp_path: Path) -> None:
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    for _ in range(2):
        done = CliRunner().invoke(
            app, ["report", str(runs / "sparse"), "--html", str(page), "--markdown", str(text), "--samples", "2"]
        )
        assert done.exit_code == 0, done.output
    shown = page.read_text()
    assert "<script" not in shown
    assert "default-src 'none'" in shown
    assert shown.count("<article>") == 2
    assert shown.count("<figure>") >= 9
    assert "load of each expert at the end" in shown
    assert "## Metrics at the end" in text.read_text()
    assert text.read_text().count("\n### ") == 2
    for option in ("--html", "--markdown"):
        other = tmp_path / "other"
        other.write_text("mine")
        done = CliRunner().invoke(app, ["report", str(runs / "sparse"), option, str(other)])
        assert isinstance(done.exception, ConfigError)
        assert other.read_text() == "mine"
    assert CliRunner().invoke(app, ["report", str(runs / "sparse")]).exit_code == 2


def test_a_browser_draws_curves_and_tokens(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(runs / "sparse"), "--html", str(page), "--samples", "3"])
    assert done.exit_code == 0, done.output
    found = count_colours(page, tmp_path / "profile", size="1200,4200")
    # The two first colours of curves, and some steps of the scale of tokens.
    assert min(found["#3f6fb5"], found["#c2571a"]) > 200
    scale = dict(re.findall(r"--o(\d+):(#\w{6});", page.read_text().split("@media")[0]))
    assert sum(found[colour] > 30 for colour in scale.values()) >= 6


@pytest.mark.parametrize("is_log", [False, True])
def test_a_chart_reaches_from_its_lowest_to_its_highest_value(is_log: bool) -> None:
    chart = Chart("loss <b>", {"a": [(1, 100.0), (2, 10.0), (3, 1.0)]}, is_log)
    svg = line_svg(chart)
    points = [tuple(map(float, point.split())) for point in svg.split('d="M')[-1].split('"')[0].split("L")]
    assert points[0][1] == 10.0
    assert points[2][1] == 184.0
    middle = 97.0 if is_log else 184.0 - 174.0 * 9 / 99
    assert points[1][1] == pytest.approx(middle, abs=0.1)
    assert "loss &lt;b&gt;" in svg


def test_a_long_curve_is_averaged() -> None:
    curve = [(float(n), float(n % 2)) for n in range(3000)]
    found = thin(curve)
    assert len(found) == 300
    assert {y for _, y in found} == {0.5}


def test_a_constant_curve_and_a_single_point_are_drawn() -> None:
    flat: dict[str, Any] = {"a": [(1.0, 0.0), (5.0, 0.0)]}
    assert "nan" not in line_svg(Chart("x", flat, False))
    assert "<circle" in line_svg(Chart("x", {"a": [(1.0, 2.0)]}, False))
