"""Ranks that start within a second, forked from a server that has imported everything; for tests of signals."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["deepspeed", "tests.support.training_worker"])
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


class Ranks:
    """The processes of one start of a run; `output` is the joint output of all of them."""

    def __init__(self, config: dict[str, Any], log: Path, num_ranks: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._log = log
        log.write_bytes(b"")
        self.processes: list[ForkServerProcess] = []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in _SERVER_ENVIRONMENT.items():
                patch.setenv(name, value)
            for rank in range(num_ranks):
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                process = _CONTEXT.Process(target=_run, args=(json.dumps([config]), environment, str(log)))
                process.start()
                self.processes.append(process)

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def wait(self, timeout_s: float = 120) -> list[int | None]:
        """Returns each rank's exit code: negative for a signal that killed it, None if it had to be killed here."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> bool:
        """Returns True if the condition becomes true before the run ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not all(process.is_alive() for process in self.processes):
                return condition()
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.005)
        return True

    def signal(self, signum: int, *ranks: int) -> None:
        """Sends a signal to the given ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signum)


def _run(stages: str, environment: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    from tests.support.training_worker import run

    run(json.loads(stages))


def steps_logged(output: Path) -> list[int]:
    """Returns the steps with a loss in metrics.jsonl, in its order, without a line that is still being written."""
    path = output / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    return [record["step"] for line in lines if "loss" in (record := json.loads(line))]
