"""Stop signals: what a process does while it trains, and which exit code it has."""

import os
import signal

from train.run.shutdown import GracefulShutdown, TrainingInterrupted


def test_the_first_signal_is_remembered_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulShutdown() as shutdown:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert shutdown.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_interrupted_run_has_the_exit_code_of_its_signal() -> None:
    assert TrainingInterrupted("", signal.SIGTERM).exit_code == 143
    assert TrainingInterrupted("", signal.SIGINT).exit_code == 130
