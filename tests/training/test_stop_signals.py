"""A stop signal and its echoes: what counts as the first signal, and what ends a process at once."""

import os
import signal

import pytest

from llmctl.distributed.ranks import LAUNCHED
from llmctl.training import stop_signals
from llmctl.training.stop_signals import SecondSignalError, watch_signals


def test_a_second_signal_ends_at_once(monkeypatch):
    monkeypatch.delenv(LAUNCHED, raising=False)
    with watch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught.number == signal.SIGTERM
        with pytest.raises(SecondSignalError) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.number == signal.SIGINT


def test_a_signal_that_the_launcher_forwards_late_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setattr(stop_signals, "ECHO_SECONDS", 0.0)
    with watch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught.number == signal.SIGTERM
        with pytest.raises(SecondSignalError):
            os.kill(os.getpid(), signal.SIGTERM)
