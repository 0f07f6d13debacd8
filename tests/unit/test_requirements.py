"""Extras, and lock files for GPU nodes: each names all that its extra asks for, with hashes, without an address."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cli

ROOT = Path(cli.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def read_lock(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pins = (line.removesuffix(" \\") for line in lines if re.match(r"[a-zA-Z0-9]", line))
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


@pytest.mark.parametrize("extra", ["precompute", "train"])
def test_a_lock_names_every_direct_dependency_of_its_extra(extra: str) -> None:
    pins = read_lock(f"requirements-{extra}.lock")
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


@pytest.mark.parametrize("extra", ["precompute", "train"])
def test_a_lock_has_hashes_the_command_that_made_it_and_no_address(extra: str) -> None:
    text = (ROOT / f"requirements-{extra}.lock").read_text("utf-8")
    assert f"uv pip compile pyproject.toml --extra {extra} " in text.splitlines()[1]
    assert not re.search(r"://|index-url|find-links", text)
    entries = re.split(r"\n(?=[a-zA-Z0-9])", text)[1:]
    assert len(entries) == len(read_lock(f"requirements-{extra}.lock"))
    for entry in entries:
        pin, *hashes = entry.rstrip().split(" \\\n    ")
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin), entry
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), entry


@pytest.mark.parametrize("extra", ["precompute", "train"])
def test_a_lock_has_the_versions_that_the_tests_run_with(extra: str) -> None:
    # apache-tvm-ffi: vLLM for the CPU takes another version than vLLM for GPUs.
    tested, pins = read_lock("requirements-cpu.lock"), read_lock(f"requirements-{extra}.lock")
    others = {name for name in tested.keys() & pins.keys() if tested[name] != pins[name]}
    assert others <= {"apache-tvm-ffi"}


def test_flash_attn_is_in_no_other_extra() -> None:
    """Its build needs an installed torch, so that pip cannot install it together with torch."""
    extras = {
        extra
        for extra, texts in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
        if any(canonicalize_name(Requirement(text).name) == "flash-attn" for text in texts)
    }
    assert extras == {"flash-attn"}


def test_a_new_process_imports_torchvision_beside_a_torch_without_a_gpu() -> None:
    """As vLLM's processes do; the package index has builds for CUDA only, see .ci/torchvision_cpu.py."""
    code = "import torch, torchvision.transforms.v2.functional as f; print(f.resize(torch.ones(3, 4, 4), [2, 2]).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "tensor(12.)\n", done.stderr
