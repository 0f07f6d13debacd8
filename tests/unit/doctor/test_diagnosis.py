"""Verdicts on machines that are made up here, and what the command prints of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from doctor.diagnosis import HALVES, PACKAGES, Diagnosis, Finding, Half, diagnose
from doctor.facts import Facts, NvidiaGpu, Probe, Unmet

GIB = 2**30
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 79 * GIB}
TORCH = {"version": "2.13.0", "cuda": "13.0", "cuda_error": "", "gpus": [H100, H100]}
VLLM = {"version": "0.32.0", "device": "cuda", "has_plugin": True, "patch_problems": {"front end": ""}}
GPU_NODE = Facts(
    python="3.12.1",
    probes={
        "torch": Probe(TORCH),
        "transformers": Probe({"version": "5.19.0"}),
        "vllm": Probe(VLLM),
        "accelerate": Probe({"version": "1.15.0"}),
        "deepspeed": Probe({"version": "0.19.8"}),
        "flash_attn": Probe({"version": "2.8.3"}),
    },
    nvidia_gpus=(NvidiaGpu(H100["name"], 79 * GIB, "580.65.06"),) * 2,  # type: ignore[arg-type]
    unmet={"": (), "s3": (), "precompute": (), "train": (), "flash-attn": (), "dev": ()},
    directory=Path("/data"),
    free_disk_bytes=500 * GIB,
    shm_bytes=64 * GIB,
    write_error="",
)
ABSENT = Probe({}, absent=True)


def with_probes(**probes: Probe) -> Facts:
    return dataclasses.replace(GPU_NODE, probes={**GPU_NODE.probes, **probes})


def find(diagnosis: Diagnosis, what: str) -> Finding:
    (found,) = (each for each in diagnosis.findings if each.what == what)
    return found


def failed(diagnosis: Diagnosis) -> dict[Half, list[str]]:
    return {half: [each.what for each in diagnosis.find_failures(half)] for half in diagnosis.halves}


def test_a_complete_node_can_run_both_halves() -> None:
    found = diagnose(GPU_NODE)
    assert {each.verdict for each in found.findings} == {"ok"}
    assert all(not each.to_do for each in found.findings)
    assert find(found, "GPUs").found == "2 x NVIDIA H100 80GB HBM3 (79.0 GiB)"
    assert find(found, "torch").found == "2.13.0, CUDA 13.0"
    assert failed(found) == {"precompute": [], "train": []}
    assert found.ok


@pytest.mark.parametrize("name", ["torch", "transformers", "vllm", "accelerate", "deepspeed"])
@pytest.mark.parametrize("probe", [ABSENT, Probe({}, error="ImportError: libcudart.so.13"), Probe({}, error="SIGILL")])
def test_a_package_fails_the_halves_that_import_it_and_names_the_command(name: str, probe: Probe) -> None:
    found = diagnose(with_probes(**{name: probe}))
    (line,) = (each for each in found.findings if each.verdict == "failed")
    assert line.found == "not installed" if probe.absent else probe.error in line.found
    for half in HALVES:
        needs = name in PACKAGES[half]
        assert bool(found.find_failures(half)) == needs
        assert (f"pip install '.[{half}]'" in line.to_do) == needs


def test_without_for_one_half_that_can_run_is_enough() -> None:
    facts = with_probes(vllm=ABSENT)
    assert diagnose(facts).ok
    assert not diagnose(facts, ("precompute",)).ok
    assert diagnose(facts, ("train",)).ok
    assert not diagnose(with_probes(vllm=ABSENT, deepspeed=ABSENT)).ok


def test_one_half_is_not_told_about_the_other() -> None:
    names = {each.what for each in diagnose(GPU_NODE, ("train",)).findings}
    assert "DeepSpeed" in names
    assert not names & {"vLLM", "capture inside vLLM", "extra precompute"}


def test_a_gpu_that_torch_cannot_use_fails_both_halves() -> None:
    torch = {**TORCH, "gpus": [], "cuda_error": "The NVIDIA driver on your system is too old"}
    found = diagnose(with_probes(torch=Probe(torch)))
    assert failed(found) == {"precompute": ["GPUs"], "train": ["GPUs"]}
    assert "driver on your system is too old" in find(found, "GPUs").found
    assert "CUDA 13.0" in find(found, "GPUs").to_do


def test_a_torch_for_the_cpu_beside_a_gpu_is_a_warning() -> None:
    found = diagnose(with_probes(torch=Probe({**TORCH, "cuda": None, "gpus": []})))
    assert find(found, "GPUs").verdict == "warning"
    assert "built for the CPU" in find(found, "GPUs").found
    assert found.ok


def test_a_machine_without_a_gpu_runs_trials() -> None:
    facts = dataclasses.replace(with_probes(torch=Probe({**TORCH, "cuda": None, "gpus": []})), nvidia_gpus=None)
    assert (find(diagnose(facts), "GPUs").found, find(diagnose(facts), "GPUs").verdict) == ("none", "warning")
    assert diagnose(facts).ok
    # A vLLM for GPUs cannot start there.
    no_device = dataclasses.replace(facts, probes={**facts.probes, "vllm": Probe({**VLLM, "device": ""})})
    assert failed(diagnose(no_device)) == {"precompute": ["vLLM"], "train": []}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_problems": {"front end": "", "first model runner": "f takes (a), expected (b)"}}, "f takes (a)"),
        ({"has_plugin": False}, "do not find Decant's plugin"),
    ],
)
def test_a_vllm_that_captures_slower_is_a_warning(change: dict[str, Any], says: str) -> None:
    found = diagnose(with_probes(vllm=Probe({**VLLM, **change})))
    line = find(found, "capture inside vLLM")
    assert (line.verdict, says in line.found, "slower" in line.to_do) == ("warning", True, True)
    assert found.ok


def test_flash_attn_is_optional_but_a_broken_one_is_taken_on_a_gpu() -> None:
    absent = find(diagnose(with_probes(flash_attn=ABSENT)), "flash-attn")
    assert (absent.verdict, absent.to_do) == ("optional", "pip install --no-build-isolation '.[flash-attn]'")
    assert "sdpa" in absent.found
    broken = with_probes(flash_attn=Probe({}, error="ImportError: undefined symbol"))
    assert failed(diagnose(broken)) == {"precompute": ["flash-attn"], "train": ["flash-attn"]}
    no_gpu = dataclasses.replace(
        broken, probes={**broken.probes, "torch": Probe({**TORCH, "gpus": [], "cuda": None})}, nvidia_gpus=None
    )
    assert find(diagnose(no_gpu), "flash-attn").verdict == "warning"


def test_an_old_python_fails_both_halves() -> None:
    assert failed(diagnose(dataclasses.replace(GPU_NODE, python="3.10.14"))) == {half: ["Python"] for half in HALVES}


def test_unmet_requirements() -> None:
    unmet = {
        "": (),
        "gs": (Unmet("gcsfs>=2025.9", None),),
        "precompute": (Unmet("transformers<5.20,>=5.16.1", "5.20.0"),),
        "train": (Unmet("tensorboard>=2.18", None),),
    }
    found = diagnose(dataclasses.replace(GPU_NODE, unmet=unmet))
    line = find(found, "extra gs")
    assert (line.found, line.verdict, line.to_do) == (
        "gcsfs>=2025.9 is not installed",
        "optional",
        "pip install '.[gs]'",
    )
    # Another version may do; a package that is not there does not.
    assert find(found, "extra precompute").found == "transformers<5.20,>=5.16.1: 5.20.0"
    assert find(found, "extra precompute").verdict == "warning"
    assert failed(found) == {"precompute": [], "train": ["extra train"]}


def test_little_room_and_no_write_access_are_warnings() -> None:
    facts = dataclasses.replace(
        GPU_NODE, free_disk_bytes=GIB, shm_bytes=64 * 2**20, write_error="Read-only file system"
    )
    found = diagnose(facts)
    assert {each.what for each in found.findings if each.verdict == "warning"} == {"disk", "/dev/shm", "write access"}
    assert "--shm-size=8g" in find(found, "/dev/shm").to_do
    assert find(found, "write access").found == "/data takes no files: Read-only file system"
    assert found.ok


def test_json_and_table_say_the_same() -> None:
    found = diagnose(with_probes(deepspeed=ABSENT, vllm=Probe({}, error="OSError: [/x] is [bold]not[/bold] there")))
    read = json.loads(found.to_json())
    assert read["ok"] is False
    assert read["halves"]["train"] == {"can_run": False, "failed": ["DeepSpeed"]}
    assert [Finding(**{**each, "needed_by": tuple(each["needed_by"])}) for each in read["findings"]] == list(
        found.findings
    )
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 - ends with the test
    console.print(found.render())
    shown = console.export_text()
    for each in found.findings:
        assert all(text in shown for text in (each.what, each.found, each.verdict, each.to_do))
    assert "precompute-logits cannot run: vLLM" in shown
    assert "train cannot run: DeepSpeed" in shown
