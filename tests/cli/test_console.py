"""What a command shows of what the library logs: plain lines, above a bar on a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from slgr_jax import progress
from slgr_jax.cli import console
from slgr_jax.training.training_log import TrainingProgress

LOGGER = logging.getLogger("slgr_jax.some.room")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _installed():
    """The console's handler for one test."""
    ours = console.LOGGER
    before = (list(ours.handlers), ours.level, ours.propagate)
    console.install()
    console.install()
    yield
    ours.handlers[:], level, ours.propagate = before
    ours.setLevel(level)


def test_lines_go_to_standard_output_once_and_warnings_to_standard_error(capsys):
    LOGGER.info("a line of %d words", 5)
    LOGGER.debug("not shown")
    LOGGER.warning("look out")
    assert capsys.readouterr() == ("a line of 5 words\n", "warning: look out\n")


def test_a_handler_of_the_root_logger_does_not_show_the_lines_again():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        LOGGER.warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == ""


def test_no_bar_in_a_file(capsys):
    with console.progress_bar() as show:
        show(TrainingProgress("run", 10, 100))
        LOGGER.info("epoch 1")
        show(TrainingProgress("run", 20, 100))
    assert capsys.readouterr() == ("epoch 1\n", "")


def test_on_a_terminal_lines_stand_above_the_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with console.progress_bar() as show:
        show(TrainingProgress("run", 10, 100))
        ((_, bar),) = progress._OPEN
        assert (bar.n, bar.total) == (10, 100)
        LOGGER.info("epoch 1")
        show(TrainingProgress("run", 60, 100))
        assert bar.n == 60
    assert not progress._OPEN
    text = screen.getvalue()
    assert "10/100" in text
    # The line has the screen's line to itself: the bar was cleared before and is drawn again after.
    shown = [line.split("\r")[-1] for line in text.split("\n")]
    assert shown[0] == "epoch 1"
    assert shown[-1].strip() == ""  # the bar is cleared in the end


def test_a_bar_ends_with_what_fails_within_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def fail():
        with console.progress_bar() as show:
            show(TrainingProgress("run", 10, 100))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not progress._OPEN
