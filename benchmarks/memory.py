"""This process's memory, as Linux counts it."""

from pathlib import Path


def status_mib(key: str) -> float:
    """A size in /proc/self/status, MiB: VmRSS is resident now, VmHWM is the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def forget_peak() -> float:
    """Sets VmHWM back to VmRSS, and returns that, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")
