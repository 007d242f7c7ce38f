"""Progress bars: on a terminal, of commands that show what they do, after a while."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import worlds

from slgr_jax import progress
from slgr_jax.evaluation import full_ranking

LOGGER = logging.getLogger("slgr_jax")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def a_terminal() -> Iterator[Terminal]:
    """Standard error is a terminal, a command shows its lines, and nobody waits.

    No fixture: pytest sets standard error anew between a fixture and its test.
    """
    stream, level = Terminal(), LOGGER.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(progress, "DELAY", 0.0)
        LOGGER.setLevel(logging.INFO)
        yield stream
    LOGGER.setLevel(level)


def _loop(unit: str = "row") -> None:
    for _ in progress.over(range(3), unit, label="counting"):
        pass


def test_a_terminal_shows_a_bar():
    with a_terminal() as terminal:
        _loop()
    assert "counting" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()


def test_nothing_where_it_is_quiet_or_no_terminal_or_quick(monkeypatch):
    with a_terminal() as terminal:
        LOGGER.setLevel(logging.WARNING)  # --verbosity=-1, and programs that import the package
        _loop()
        LOGGER.setLevel(logging.INFO)
        monkeypatch.setattr(progress, "DELAY", 60.0)
        _loop()
        monkeypatch.setattr(progress, "DELAY", 0.0)
        monkeypatch.setattr(sys, "stderr", file := io.StringIO())
        _loop()
    assert (terminal.getvalue(), file.getvalue()) == ("", "")


def test_of_nested_loops_the_outer_one_is_shown():
    with a_terminal() as terminal:
        with progress.bar(10, "step") as outer:
            _loop("row")
            outer.update(10)
        assert "counting" not in terminal.getvalue()
        with progress.bar(9, "row") as outer:
            _loop("row")
            _loop("row")
            assert outer.n == 6
        _loop()
    assert "counting" in terminal.getvalue()


def test_a_bar_is_drawn_while_other_processes_work(monkeypatch):
    """Its clock goes on; it moves by what has ended."""
    monkeypatch.setattr(progress, "TICK", 0.001)
    first: Future[str] = Future()
    second: Future[str] = Future()
    with a_terminal(), progress.bar(2, "run") as bar:
        drawn = []

        def refresh() -> None:
            drawn.append(bar.n)
            if len(drawn) == 2:
                first.set_result("a")

        monkeypatch.setattr(bar, "refresh", refresh)
        ended, others = progress.first_ended({first, second}, bar)
        assert (ended, others, bar.n) == ({first}, {second}, 1)
        assert drawn[:2] == [0, 0]
        second.set_result("b")
        assert progress.first_ended(others, bar) == ({second}, set())
        assert bar.n == 2


def test_nested_loops_in_a_file_run_without_a_bar():
    with progress.bar(9, "row") as outer:
        _loop("row")
        outer.update(3)
    _loop("row")
    assert not progress._OPEN


def test_an_error_in_a_loop_closes_its_bar():
    with a_terminal() as terminal:
        with pytest.raises(KeyError), progress.bar(3, "row"):
            raise KeyError
        _loop()
    assert "counting" in terminal.getvalue()


def test_ranking_moves_the_bar_of_whoever_asks(tmp_path):
    """A chunk at a time; the last one counts its own users alone."""
    data = worlds.random_dataset(tmp_path / "d")
    scores = np.random.default_rng(0).normal(size=(data.n_users, data.n_items)).astype(np.float32)
    with a_terminal() as terminal, progress.bar(2 * data.n_users, "user", label="lists") as bar:
        for chunk in (16, 64):
            full_ranking.top_k(
                lambda state, users: state[users],
                scores,
                np.arange(data.n_users),
                data.positives(("train",)),
                data.n_items,
                k=3,
                users_per_chunk=chunk,
            )
            assert bar.n % data.n_users == 0
        assert bar.n == 2 * data.n_users
    assert "lists" in terminal.getvalue()
