"""The server against `run.recommend` and `run.fold_in`: joined requests, limits, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import server_process
from jax import monitoring
from starlette.testclient import TestClient

from slgr_jax.config import ServeConfig
from slgr_jax.errors import ConfigError, NonFiniteError
from slgr_jax.serving import compiled_lists, http_server
from slgr_jax.serving.compiled_lists import Options
from slgr_jax.serving.histories import History
from slgr_jax.serving.http_server import Service, make_app

SMALL = ServeConfig(
    k=3, max_k=8, batch_users=8, batch_new_users=4, max_users=4, max_items=9, max_filter=5
)


@contextlib.contextmanager
def served(run, config: ServeConfig = SMALL):
    """A client of a server that is ready."""
    with TestClient(make_app(Service(run, config)), raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 120
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def client(trained):
    with served(trained("mf")) as client:
        yield client


def _listed(answer) -> dict[str, list[str]]:
    assert answer.status_code == 200, answer.text
    return {u["user"]: [entry["item"] for entry in u["items"]] for u in answer.json()["users"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 8},
        {"k": 1, "mask_seen": False},
        {"allow": ["i3", "i5", "i9"]},
        {"k": 5, "deny": ["i0", "i1"], "mask_seen": False},
    ],
)
def test_known_users_get_the_lists_of_the_run(client, trained, options):
    users = ["u3", "u0", "u3", "u23"]
    expected = trained("mf").recommend(users, **({"k": 3} | options))
    answers = client.post("/recommend", json={"users": users} | options).json()
    assert answers["k"] == options.get("k", 3)
    assert [entry["user"] for entry in answers["users"]] == users
    for answer, items, scores in zip(
        answers["users"], expected.items, expected.scores, strict=True
    ):
        kept = [item for item in items if item is not None]
        assert [entry["item"] for entry in answer["items"]] == kept
        assert [entry["title"] for entry in answer["items"]] == [f"item {i[1:]}" for i in kept]
        got = [entry["score"] for entry in answer["items"]]
        np.testing.assert_array_equal(np.float32(got), scores[: len(kept)])


def test_an_address_asks_as_a_body_does(client):
    address = "/recommend?users=u1&users=u2&k=4&mask_seen=false&deny=i0&deny=i1"
    body = {"users": ["u1", "u2"], "k": 4, "mask_seen": False, "deny": ["i0", "i1"]}
    assert client.get(address).json() == client.post("/recommend", json=body).json()


def test_new_users_are_folded_in_whoever_else_asks(client, trained):
    histories = {"x": ["i2"], "u0": ["i9", "i4", "i9", "i1"], "y": ["i7"], "z": ["i3", "i8", "i0"]}
    answer = client.post("/recommend", json={"histories": histories, "k": 5})
    assert _listed(answer) == {
        name: trained("mf").fold_in({name: items}).recommend(k=5).items[0]
        for name, items in histories.items()
    }
    assert list(_listed(answer)) == list(histories)


@pytest.mark.slow
def test_new_users_of_a_sequence_model_are_their_histories(trained):
    run = trained("sasrec")
    lists = compiled_lists.CompiledLists(run, SMALL)
    histories = {"x": ["i2", "i9", "i4"], "y": ["i4", "i9", "i2"]}
    answers = lists.new(Options(deny=("i1",)), [History(items) for items in histories.values()])
    expected = run.fold_in(histories).recommend(k=8, deny=["i1"])
    for answer, items in zip(answers, expected.items, strict=True):
        assert [run.item_ids[i] for i in answer.items] == items
    assert expected.items[0] != expected.items[1]


def test_requests_are_joined_and_each_gets_its_answer(trained):
    run = trained("mf")
    config = dataclasses.replace(SMALL, batch_wait_ms=300, max_items=1)
    everybody = run.recommend(k=3)
    expected = dict(zip(everybody.users, everybody.items, strict=True))
    unmasked = run.recommend(["u5"], k=3, mask_seen=False).items[0]
    with served(run, config) as client, ThreadPoolExecutor(17) as threads:
        other = threads.submit(client.get, "/recommend?users=u5&mask_seen=false")
        answers = threads.map(lambda user: client.get(f"/recommend?users={user}"), expected)
        for user, answer in zip(expected, answers, strict=True):
            assert _listed(answer) == {user: expected[user]}
        assert _listed(other.result()) == {"u5": unmasked}
        health = client.get("/health").json()
    assert health["requests"] == 25
    assert health["known_users"]["listed"] == 25
    assert 4 <= health["known_users"]["calls"] <= 12  # 24 users by 8, and one apart


def test_nothing_is_compiled_once_it_is_ready(client):
    compiled: list[str] = []
    monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    items = [f"i{i}" for i in range(9)]
    for counts in ([1], [3, 3], [5, 6, 7], [9], [1, 1, 9, 9], [4, 8, 1, 2]):
        body = {"histories": {str(user): items[:count] for user, count in enumerate(counts)}}
        assert client.post("/recommend", json=body).status_code == 200
    for options in ({"deny": ["i1"]}, {"mask_seen": False, "allow": ["i1", "i2"]}):
        for who in ({"users": ["u1"]}, {"histories": {"a": ["i1"], "b": ["i2"]}}):
            assert client.post("/recommend", json=who | options).status_code == 200
    assert compiled == []


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"users": ["u1", "nobody"]}, 404, "unknown user 'nobody' (1 of 2); the run knows 24"),
        ({"histories": {"x": ["i1", "i99"]}}, 422, "unknown item 'i99' in histories (1 of 2)"),
        ({"users": ["u1"], "deny": ["zz"]}, 422, "unknown item 'zz' in deny"),
        ({}, 422, "give either users"),
        ({"users": ["u1"], "histories": {"x": ["i1"]}}, 422, "give either users"),
        ({"users": []}, 422, "users=[]: give a list of at least one id"),
        ({"users": "u1"}, 422, 'users="u1": give a list'),
        ({"users": ["u1", None]}, 422, "users holds null; ids are texts"),
        ({"users": ["u1", "\ud800"]}, 404, r"unknown user '\ud800'"),
        ({"histories": {"x": []}}, 422, 'the history of "x"=[]: give a list'),
        ({"histories": ["i1"]}, 422, "give an object of name -> list of item ids"),
        ({"users": ["u1"], "k": 9}, 422, "k=9 is not a whole number from 1 to 8 (--max_k)"),
        ({"users": ["u1"], "k": True}, 422, "k=true is not"),
        ({"users": ["u1"], "mask_seen": "no"}, 422, 'mask_seen="no" is neither'),
        ({"users": ["u1"], "n": 3}, 422, "unknown field n; fields: users, histories, k,"),
        ({"users": ["u1"] * 5}, 413, "users: 5 of them; this server takes at most 4 (--max_users)"),
        ({"histories": {"x": ["i1"] * 10}}, 413, 'history of "x": 10 of them'),
        ({"users": ["u1"], "deny": ["i1"] * 6}, 413, "deny: 6 of them"),
        ({"users": ["u" * (1 << 20)]}, 413, "the body is over 1048576 bytes"),
        ([1], 422, "the body is [1]; give an object"),
    ],
)
def test_what_is_refused_says_why(client, body, status, text):
    answer = client.post("/recommend", content=json.dumps(body))  # in ASCII
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert text in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "address", "status", "text"),
    [
        ("GET", "/recommend?users=u1&k=x", 422, 'k="x" is not a whole number'),
        ("GET", "/recommend?users=u1&k=1&k=2", 422, "k is given twice"),
        ("GET", "/recommend?histories=i1", 422, "send a POST"),
        ("POST", "/recommend", 422, "the body is not JSON"),
        ("GET", "/recomend", 404, "no such address; there are: /, /health, /recommend, /items"),
        ("DELETE", "/recommend", 405, "DELETE is not answered here"),
        ("GET", "/items?limit=1000", 422, "limit='1000' is not a whole number from 1 to 100"),
    ],
)
def test_an_odd_request_is_refused_in_words(client, method, address, status, text):
    answer = client.request(method, address)
    assert answer.status_code == status
    assert text in answer.json()["error"]


def test_deep_json_is_no_defect(client):
    answer = client.post("/recommend", content=b"[" * 100_000)
    assert answer.status_code == 422


def test_items_are_found_by_title_and_id(client):
    answer = client.get("/items?search=ITEM 1&limit=2").json()
    assert answer["found"] == 11  # 1 and 10 to 19
    assert answer["items"] == [{"item": f"i{i}", "title": f"item {i}"} for i in (1, 10)]
    assert client.get("/items?search=i29").json()["items"] == [{"item": "i29", "title": "item 29"}]


def test_health_says_what_is_served(client, trained):
    health = client.get("/health").json()
    data = trained("mf").dataset
    assert health["status"] == "ready"
    assert health["data"]["split_hash"] == data.manifest.split_hash
    assert (health["data"]["users"], health["data"]["items"]) == (24, 30)
    assert health["limits"]["max_k"] == 8
    assert health["new_users"]["refused"] == ""


def test_a_full_queue_and_a_server_that_is_not_ready_are_503(trained, monkeypatch):
    service = Service(trained("mf"), dataclasses.replace(SMALL, max_queue=2, max_users=2))
    started, going = threading.Event(), threading.Event()
    known = service._lists.known

    def slow(options, users):
        started.set()
        assert going.wait(60)
        return known(options, users)

    monkeypatch.setattr(service._known, "_answer", slow)
    monkeypatch.setattr(service._lists, "compile", lambda stopped: going.wait(60))
    with TestClient(make_app(service)) as client, ThreadPoolExecutor(2) as threads:
        try:
            answer = client.get("/health")
            assert (answer.status_code, answer.json()["status"]) == (503, "starting")
            assert client.get("/recommend?users=u1").status_code == 503
            service._ready = True
            under_way = threads.submit(client.get, "/recommend?users=u1")
            assert started.wait(60)
            waiting = threads.submit(client.get, "/recommend?users=u2&users=u3")
            while client.get("/health").json()["waiting"] < 2:
                time.sleep(0.01)
            full = client.get("/recommend?users=u4")
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert "2 users wait already and at most 2 may" in full.json()["error"]
        finally:
            going.set()
        assert under_way.result().status_code == waiting.result().status_code == 200


def test_one_bad_user_spoils_nobody_elses_answer(trained, monkeypatch):
    service = Service(trained("mf"), dataclasses.replace(SMALL, batch_wait_ms=300))
    known = service._lists.known

    def picky(options, users):
        if 7 in users:
            raise NonFiniteError("the model gives a NaN")
        return known(options, users)

    monkeypatch.setattr(service._known, "_answer", picky)
    monkeypatch.setattr(service._lists, "compile", lambda stopped: None)
    with TestClient(make_app(service)) as client, ThreadPoolExecutor(3) as threads:
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        users = ["u6", "u7", "u8"]
        answers = threads.map(lambda user: client.get(f"/recommend?users={user}"), users)
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "NaN" in client.get("/recommend?users=u7").json()["error"]


def test_a_run_that_cannot_be_served_ends_the_server(trained, monkeypatch):
    def fail(self, stopped):
        raise NonFiniteError("the model gives a NaN")

    monkeypatch.setattr(http_server.CompiledLists, "compile", fail)
    with pytest.raises(NonFiniteError):
        http_server.serve(trained("mf"), SMALL, http_server.listen("127.0.0.1", 0))


def test_a_port_in_use_and_limits_at_odds_are_refused():
    with (
        http_server.listen("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match="Address already in use; choose another --port"),
    ):
        http_server.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"--k=10 is over --max_k=5"):
        ServeConfig(max_k=5)
    with pytest.raises(ConfigError, match=r"--batch_new_users=6 is no power of two; choose 4 or 8"):
        ServeConfig(batch_new_users=6)


def test_the_command_finishes_what_is_under_way_when_it_is_stopped(trained):
    options = ["--max_items=1", "--batch_new_users=1", "--batch_wait_ms=2000"]
    with (
        server_process.started(trained("mf").workdir, *options) as (address, process),
        ThreadPoolExecutor(1) as threads,
    ):
        under_way = threads.submit(
            lambda: urllib.request.urlopen(f"{address}/recommend?users=u1", timeout=60).status
        )
        while b'"waiting": 1' not in urllib.request.urlopen(f"{address}/health").read():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert under_way.result() == 200
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
