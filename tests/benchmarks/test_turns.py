"""Programs that take turns: what they say, how they end, how long a turn is."""

from __future__ import annotations

import pathlib
import sys
import textwrap

import pytest
import turns
import worker

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"


FAKE = """
    import sys
    sys.path.insert(0, {speed!r})
    import turns

    def prepare(job):
        print("a library's chatter")
        if job["do"] == "refuse":
            raise turns.Refused("not today")
        if job["do"] == "break":
            raise KeyError("a defect")
        taken = []

        def turn():
            print("more chatter")
            taken.append(1)
            return turns.Turn(100.0 * len(taken), 2.0)

        return turns.Contestant({{"name": job["do"]}}, turn, lambda: {{"taken": len(taken)}})

    turns.serve(prepare)
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(textwrap.dedent(FAKE.format(speed=str(SPEED))))
    return [sys.executable, str(path)]


def test_a_player_takes_turns_and_stays_alive_between_them(fake):
    with turns.Player(fake, {"do": "work"}) as player:
        assert player.facts == {"name": "work"}
        assert [player.turn().rate for _ in range(3)] == [50.0, 100.0, 150.0]
        facts = player.finish()
    assert facts["taken"] == 3
    assert 5 < facts["peak_mb"] < 200


def test_a_player_that_refuses_says_why(fake):
    with pytest.raises(turns.Refused, match="not today"):
        turns.Player(fake, {"do": "refuse"})


def test_a_player_that_breaks_shows_its_traceback(fake):
    with pytest.raises(RuntimeError, match=r"(?s)status 1.*a defect"):
        turns.Player(fake, {"do": "break"})


def test_a_player_that_is_not_there_is_named():
    with pytest.raises(turns.Refused, match="/no/such/python cannot be run"):
        turns.Player(["/no/such/python"], {})


def test_turns_alternate():
    order = []

    class Named:
        def __init__(self, name):
            self.name = name

        def turn(self):
            order.append(self.name)
            return turns.Turn(1.0, 1.0)

    taken = turns.interleave([Named("a"), Named("b")], 3)
    assert order == ["a", "b"] * 3
    assert [len(of_player) for of_player in taken] == [3, 3]


def test_units_last_as_long_as_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def work(units):
        now[0] += 0.5 + 0.001 * units  # a start, then a millisecond a unit

    assert turns.units_for(0.0, work) == 1
    units = turns.units_for(10.0, work)
    assert 0.7 * 10 < 0.5 + 0.001 * units < 1.1 * 10


@pytest.mark.parametrize(("steps", "whole"), [(1, 64), (64, 64), (65, 128)])
def test_a_turn_is_made_of_whole_dispatches(steps, whole):
    assert worker.whole_dispatches(steps, 64) == whole
