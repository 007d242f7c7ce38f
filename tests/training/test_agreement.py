"""What stops a run: every signal of a scheduler; votes, which are known one dispatch late."""

from __future__ import annotations

import os
import signal
import threading

import jax
import pytest

from slgr_jax.mesh import make_layout
from slgr_jax.training import agreement


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_signal_means_save_and_leave(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with agreement.stop_on_signal() as stop:
        assert signal.getsignal(number) != before, "or what follows would end this process"
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts_and_what_is_ignored_stays_so():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with agreement.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.fixture
def wanted() -> threading.Event:
    return threading.Event()


def test_one_process_stops_between_the_next_two_chunks(wanted):
    alone = agreement.make_agreement(make_layout(), wanted, lambda: False)
    alone.between_chunks()
    wanted.set()
    with pytest.raises(agreement.InterruptedValidation):
        alone.between_chunks()


def test_votes_are_read_one_dispatch_late(wanted):
    """A wish reaches the sums of all devices; that to save lasts until a checkpoint is written."""
    due = [False]
    votes = agreement.Votes(make_layout(devices=jax.devices()[:4]), wanted, lambda: due[0])
    before = votes.cast()
    wanted.set()
    due[0] = True
    after = votes.cast()
    votes.count(before)
    assert (votes.stop, votes.save) == (False, False)
    votes.count(after)
    assert (votes.stop, votes.save) == (True, True)
    votes.saved()
    votes.count(before)
    assert (votes.stop, votes.save) == (True, False)

    chunks = agreement.Votes(make_layout(devices=jax.devices()[:4]), wanted, lambda: False)
    chunks.between_chunks()  # casts; nothing was cast before it
    with pytest.raises(agreement.InterruptedValidation):
        chunks.between_chunks()
