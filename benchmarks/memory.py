"""Memory of this process, from /proc/self."""

from pathlib import Path


def status_mib(key: str) -> float:
    """Returns a size from /proc/self/status in MiB: VmRSS is resident now, VmHWM is the highest it has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def reset_peak() -> float:
    """Resets VmHWM to VmRSS, and returns VmRSS in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")
