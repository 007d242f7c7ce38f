"""The processes of a job tell each other: threads of one process stand in for them."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from slgr_jax.cluster import channel as channel_lib
from slgr_jax.cluster import job
from slgr_jax.cluster.channel import Channel, meet
from slgr_jax.cluster.environment import Place
from slgr_jax.errors import ConfigError, UserError


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, all called at once."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception(30) or future.result() for future in futures]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The lines and statuses with which processes would have ended."""
    ends: list[tuple[str, int]] = []
    monkeypatch.setattr(channel_lib, "leave", lambda line, status: ends.append((line, status)))
    return ends


@pytest.fixture
def channels(left: list[tuple[str, int]]) -> Iterator[list[Channel]]:
    """Those of three processes."""
    places = [Place(f"localhost:{port}", 3, at) for port in [free_port()] for at in range(3)]
    met = at_once(*[lambda place=place: meet(place, 10) for place in places])
    opened = [Channel(p, wires, 2.0) for p, (wires, _) in zip(places, met, strict=True)]
    assert len({address for _, address in met}) == 1
    yield opened
    for channel in opened:
        channel.close()


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not true() and time.monotonic() < limit:
        time.sleep(0.01)
    assert true()


def test_texts_come_in_the_order_of_processes(channels):
    for text in "abc":
        parts = [(channel, f"{text}{channel.place.process_id}") for channel in channels]
        said = at_once(*[lambda c=c, part=part: c.gather(part) for c, part in parts])
        assert said == [[f"{text}{at}" for at in range(3)]] * 3


def test_the_first_failure_is_raised_on_all(channels):
    first, second, third = channels
    errors = at_once(
        lambda: first.gather(""), lambda: second.fail("no disk"), lambda: third.gather("")
    )
    assert [type(error) for error in errors] == [UserError] * 3
    assert {str(error) for error in errors} == {"no disk"}


def test_who_waits_elsewhere_is_ended_by_a_failure(channels, left, monkeypatch):
    monkeypatch.setattr(channel_lib, "GRACE_S", 0.1)
    with pytest.raises(UserError, match="no disk"):
        channels[1].fail("no disk")
    until(lambda: len(left) == 2)
    assert left == [("no disk", 2)] * 2


def test_a_closed_connection_ends_those_at_work(channels, left, monkeypatch):
    monkeypatch.setattr(channel_lib, "GRACE_S", 0.1)
    channels[0].name(["a", "b", "c"])
    with channels[0].working():
        channels[2].close()
        until(lambda: len(left) == 1)
        line, status = left[0]
        assert line.startswith("c ended without a word; the last checkpoint is kept")
        assert status == 75
    # Process 1 hears of it, and is ended as soon as it works with the others again.
    until(lambda: bool(channels[1]._lost))
    with channels[1].working():
        assert left[1:] == [(line, 75)]


def test_silence_is_a_loss_after_the_heartbeats_time(left):
    """A process that hangs keeps its connection open; here it never says a word."""
    place = Place(f"localhost:{free_port()}", 2, 0)

    def silent() -> Any:
        return meet(place._replace(process_id=1), 10)

    (wires, _), (kept, _) = at_once(lambda: meet(place, 10), silent)
    channel = Channel(place, wires, 0.3)
    with channel.working():
        until(lambda: bool(left))
    assert "process 1 was not heard of for 0.3 s" in left[0][0]
    channel.close()
    kept[0].close()


def test_two_that_say_they_are_one_and_other_numbers_of_processes_are_refused():
    for others, text in (
        ([(3, 1), (3, 1)], "two processes say that they are process 1"),
        ([(3, 1), (2, 1)], "was started with --processes=2, process 0 with --processes=3"),
    ):
        address = f"localhost:{free_port()}"
        places = [Place(address, 3, 0), *[Place(address, n, at) for n, at in others]]
        errors = at_once(*[lambda place=place: meet(place, 5) for place in places])
        assert [type(error) for error in errors] == [ConfigError] * 3
        # One that comes when the others have been told already waits for nobody in vain.
        assert sum(text in str(error) for error in errors) >= 2, errors


def test_a_port_that_is_taken_and_strangers(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"localhost:{port}: process 0 cannot listen there"):
            meet(Place(f"localhost:{port}", 2, 0), 1)

    # A scanner of ports comes first; the job starts all the same.
    place = Place(f"localhost:{free_port()}", 2, 0)
    of_first: list[channel_lib.Wire] = []
    waiting = threading.Thread(target=lambda: of_first.extend(meet(place, 10)[0].values()))
    waiting.start()
    time.sleep(0.1)
    with socket.create_connection(place.address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    wires, _ = meet(place._replace(process_id=1), 10)
    waiting.join()
    for wire in (wires[0], *of_first):
        wire.close()


def test_alone_everything_is_as_it_would_be_without():
    assert job.processes() == 1
    assert job.is_first()
    assert job.every("x") == ["x"]
    assert job.together(lambda: 3) == 3
    with pytest.raises(KeyError), job.session():
        job.together(lambda: {}["a"])
