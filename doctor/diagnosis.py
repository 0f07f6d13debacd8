"""Says from the facts what each half can do here, what it lacks, and what to do about it. Runs nothing."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from doctor.facts import Facts, Probe, Unmet

Half = Literal["precompute", "train"]
# "failed" keeps a half from running; "optional" is not there, and is needed for an extra alone.
Verdict = Literal["ok", "warning", "failed", "optional"]

HALVES: tuple[Half, ...] = ("precompute", "train")
PACKAGES: dict[Half, tuple[str, ...]] = {
    "precompute": ("torch", "transformers", "vllm", "flash_attn"),
    "train": ("torch", "transformers", "accelerate", "deepspeed", "flash_attn"),
}
COMMANDS: dict[Half, str] = {"precompute": "precompute-logits", "train": "train"}

_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "optional": "dim"}
_MIN_FREE_DISK_BYTES = 10 * 2**30
_MIN_SHM_BYTES = 2**30
_FLASH_ATTN = "pip install --no-build-isolation '.[flash-attn]'"
_TITLES = {
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vLLM",
    "accelerate": "accelerate",
    "deepspeed": "DeepSpeed",
    "flash_attn": "flash-attn",
}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `to_do` is "" if there is nothing to do; `needed_by` are the halves that it concerns."""

    what: str
    found: str
    verdict: Verdict
    to_do: str = ""
    needed_by: tuple[Half, ...] = HALVES


@dataclass(frozen=True)
class Diagnosis:
    """All findings about `halves`."""

    halves: tuple[Half, ...]
    findings: tuple[Finding, ...]

    def find_failures(self, half: Half) -> list[Finding]:
        """Returns what keeps the half from running."""
        return [each for each in self.findings if each.verdict == "failed" and half in each.needed_by]

    @property
    def ok(self) -> bool:
        """True if one of the halves can run."""
        return any(not self.find_failures(half) for half in self.halves)

    def to_json(self) -> str:
        """Returns everything as one JSON object."""
        halves = {}
        for half in self.halves:
            failures = [each.what for each in self.find_failures(half)]
            halves[half] = {"can_run": not failures, "failed": failures}
        return json.dumps(
            {"ok": self.ok, "halves": halves, "findings": [asdict(each) for each in self.findings]}, indent=1
        )

    def render(self) -> RenderableType:
        """Returns a table of the findings, with a line for each half below it."""
        table = Table(show_lines=False)
        for title in ("what", "found", "verdict", "what to do"):
            table.add_column(title, overflow="fold")
        for each in self.findings:
            style = _STYLES[each.verdict]
            table.add_row(Text(each.what), Text(each.found), Text(each.verdict, style), Text(each.to_do))
        return Group(table, *(self._render_half(half) for half in self.halves))

    def _render_half(self, half: Half) -> Text:
        if failures := self.find_failures(half):
            return Text(f"{COMMANDS[half]} cannot run: {', '.join(each.what for each in failures)}", "bold red")
        return Text(f"{COMMANDS[half]} can run", "green")


def diagnose(facts: Facts, halves: tuple[Half, ...] = HALVES) -> Diagnosis:
    """Judges the facts. A finding that concerns none of `halves` is left out."""
    findings = [*_judge_python(facts), *_judge_gpus(facts), *_judge_packages(facts), *_judge_machine(facts)]
    findings += _judge_extras(facts)
    return Diagnosis(halves, tuple(each for each in findings if set(each.needed_by) & set(halves)))


def _judge_python(facts: Facts) -> Iterator[Finding]:
    major, minor = map(int, facts.python.split(".")[:2])
    old = (major, minor) < (3, 11)
    yield Finding("Python", facts.python, "failed" if old else "ok", "install Python 3.11 or later" if old else "")
    unmet = facts.unmet.get("", ())
    yield Finding("Decant's own packages", _describe_unmet(unmet), _verdict_on(unmet), "pip install ." if unmet else "")


def _judge_gpus(facts: Facts) -> Iterator[Finding]:
    gpus = facts.nvidia_gpus
    if gpus:
        yield Finding("NVIDIA driver", gpus[0].driver, "ok")
    else:
        yield Finding("NVIDIA driver", "none: nvidia-smi is not there, or lists no GPU", "optional")
    torch = facts.probes["torch"].values
    listed = _describe_gpus((gpu.name, gpu.memory_bytes) for gpu in gpus or ())
    if usable := torch.get("gpus"):
        yield Finding("GPUs", _describe_gpus((gpu["name"], gpu["memory_bytes"]) for gpu in usable), "ok")
    elif not gpus:
        yield Finding("GPUs", "none", "warning", "everything runs on the CPU, which is for trials alone")
    elif not torch:
        yield Finding("GPUs", f"{listed}; no torch says whether it can use them", "warning", "install torch, see below")
    elif not torch["cuda"]:
        to_do = "a torch for CUDA: pip install --force-reinstall torch, from an index that has such builds"
        yield Finding("GPUs", f"{listed}; this torch is built for the CPU", "warning", to_do)
    else:
        problem = torch["cuda_error"] or "it finds no GPU"
        to_do = f"a driver for CUDA {torch['cuda']}, or a torch for an older CUDA; see also CUDA_VISIBLE_DEVICES"
        yield Finding("GPUs", f"{listed}; torch cannot use them: {problem}", "failed", to_do)


def _judge_packages(facts: Facts) -> Iterator[Finding]:
    for name in facts.probes:
        if name == "flash_attn":
            yield _judge_flash_attn(facts)
            continue
        users = tuple(half for half in HALVES if name in PACKAGES[half])
        yield _judge_package(name, facts.probes[name], users)
        if name == "vllm" and facts.probes[name].values:
            yield from _judge_capture(facts.probes[name])


def _judge_package(name: str, probe: Probe, users: tuple[Half, ...]) -> Finding:
    to_do = " or ".join(f"pip install '.[{half}]'" for half in users) + "; without a GPU: make setup"
    if probe.absent:
        return Finding(_TITLES[name], "not installed", "failed", to_do, users)
    if probe.error:
        # pip leaves an installed package as it is.
        to_do = f"pip uninstall {_TITLES[name].lower()}, then {to_do}"
        return Finding(_TITLES[name], f"cannot be imported: {probe.error}", "failed", to_do, users)
    found = str(probe.values["version"])
    if name == "torch":
        found += f", CUDA {probe.values['cuda']}" if probe.values["cuda"] else ", built for the CPU"
    if name == "vllm" and not probe.values["device"]:
        found += ", finds no device that it can run on"
        return Finding(_TITLES[name], found, "failed", "a GPU with its driver; without a GPU: make setup", users)
    return Finding(_TITLES[name], found, "ok", "", users)


def _judge_capture(probe: Probe) -> Iterator[Finding]:
    """Judges whether capture can run inside vLLM. If not, vLLM's own prompt log-probs serve, which are slower."""
    title = "capture inside vLLM"
    problems = [f"{part}: {problem}" for part, problem in probe.values["patch_problems"].items() if problem]
    if problems:
        to_do = "pip install '.[precompute]' brings the vLLM that capture knows; this one is slower (capture = stock)"
        yield Finding(title, "; ".join(problems), "warning", to_do, ("precompute",))
    elif not probe.values["has_plugin"]:
        found = "vLLM's processes do not find Decant's plugin, since Decant is not installed"
        to_do = "pip install --no-deps . (until then capture is slower)"
        yield Finding(title, found, "warning", to_do, ("precompute",))
    else:
        yield Finding(title, "vLLM's functions are those that capture knows", "ok", "", ("precompute",))


def _judge_flash_attn(facts: Facts) -> Finding:
    title, probe = _TITLES["flash_attn"], facts.probes["flash_attn"]
    if probe.absent:
        return Finding(title, "not installed: attention is sdpa", "optional", _FLASH_ATTN)
    if not probe.error:
        return Finding(title, str(probe.values["version"]), "ok")
    # Both halves take it on a GPU when it is installed.
    verdict: Verdict = "failed" if facts.probes["torch"].values.get("gpus") else "warning"
    to_do = f"pip uninstall flash-attn, or build it for the installed torch: {_FLASH_ATTN}"
    return Finding(title, f"cannot be imported: {probe.error}", verdict, to_do)


def _judge_machine(facts: Facts) -> Iterator[Finding]:
    free = facts.free_disk_bytes
    found = f"{_gib(free)} free in {facts.directory}"
    if free < _MIN_FREE_DISK_BYTES:
        yield Finding("disk", found, "warning", "see with `decant plan` what a run writes")
    else:
        yield Finding("disk", found, "ok")
    if facts.shm_bytes is None:
        yield Finding("/dev/shm", "not there", "optional")
    elif facts.shm_bytes < _MIN_SHM_BYTES:
        to_do = "start the container with --shm-size=8g or --ipc=host, or set data.num_workers = 0"
        yield Finding("/dev/shm", _gib(facts.shm_bytes), "warning", to_do)
    else:
        yield Finding("/dev/shm", _gib(facts.shm_bytes), "ok")
    if facts.write_error:
        found = f"{facts.directory} takes no files: {facts.write_error}"
        yield Finding("write access", found, "warning", "give outputs that lie elsewhere, or change the directory")
    else:
        yield Finding("write access", str(facts.directory), "ok")


def _judge_extras(facts: Facts) -> Iterator[Finding]:
    for extra, unmet in facts.unmet.items():
        # flash-attn has a finding of its own; who develops Decant has the environment of `make setup`.
        if extra in ("", "flash-attn", "dev"):
            continue
        users = tuple(half for half in HALVES if half == extra) or HALVES
        verdict: Verdict = "ok"
        if unmet:
            verdict = _verdict_on(unmet) if extra in HALVES else "optional"
        to_do = f"pip install '.[{extra}]'" if unmet else ""
        yield Finding(f"extra {extra}", _describe_unmet(unmet), verdict, to_do, users)


def _verdict_on(unmet: Iterable[Unmet]) -> Verdict:
    """Returns "failed" if a package is not there, "warning" if all are, but not in the versions that were tried."""
    missing = [each.installed is None for each in unmet]
    return "failed" if any(missing) else "warning" if missing else "ok"


def _describe_unmet(unmet: Iterable[Unmet]) -> str:
    parts = [
        f"{each.requirement} is not installed" if each.installed is None else f"{each.requirement}: {each.installed}"
        for each in unmet
    ]
    return "; ".join(parts) or "complete"


def _describe_gpus(gpus: Iterable[tuple[str, int]]) -> str:
    """Returns names and sizes, equal GPUs counted."""
    counts = Counter(f"{name} ({_gib(size)})" if size else name for name, size in gpus)
    return ", ".join(f"{count} x {gpu}" for gpu, count in counts.items())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
