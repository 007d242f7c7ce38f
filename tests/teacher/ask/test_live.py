"""Asking a server live: a process of the test's own on loopback, with every fault of a service."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from teacher import written_world

from slgr_jax.config import AskConfig, CandidateConfig, CollectConfig, RequestConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ShardError, UserError
from slgr_jax.teacher.ask import asking, candidates, live, prompts, requests
from slgr_jax.teacher.products import preferences

HERE = pathlib.Path(__file__).parent
REPO = HERE.parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None, reason="the extra 'ask' is not installed"
)


def load_server_module():
    spec = importlib.util.spec_from_file_location("chat_server", HERE / "chat_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat_server = load_server_module()


@contextlib.contextmanager
def serving(log, *, faults="", delay=0.0):
    """A server process on loopback; gives its address."""
    command = [sys.executable, str(HERE / "chat_server.py"), str(log)]
    command += [f"--faults={faults}", f"--delay={delay}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def received(log):
    """What the server read: prompt, status, most tokens of each request, in order."""
    return (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    )


@pytest.fixture
def data(make_dataset):
    """30 users with ten training items each of 60 items with titles."""
    rng = np.random.default_rng(3)
    train = {user: sorted(rng.permutation(60)[:10].tolist()) for user in range(30)}
    return make_dataset(
        users=[f"u{u}" for u in range(30)],
        items=[f"i{i}" for i in range(60)],
        titles=[f"Film {i}" for i in range(60)],
        train=train,
        valid={0: [59]},
        test={1: [58]},
    )


@pytest.fixture
def root(data):
    """The directory of 90 listwise requests of some 4 candidates."""
    lines = prompts.item_lines(data)
    sizes = CandidateConfig(
        candidates=12, cold_candidates=0, tail_users=0, calibration_users=0, popular_pool=60
    )
    candidates.write(
        data, "llm", candidates.draw(data, lines, sizes, seed=0), sizes, seed=0, diversity="-"
    )
    drawn, source = candidates.load(data, "llm")
    asker = asking.asker(data, drawn, lines, RequestConfig(list_size=4), 0)
    directory = requests.directory(data.path, "llm")
    requests.write(asker, asking.plan(asker), source, directory, model="m")
    return directory


def patient(address, **changes):
    settings = {"concurrency": 8, "timeout": 1.0, "backoff": 0.01, "base_url": address}
    return AskConfig(**(settings | changes))


def lines_of(root):
    return list(requests.read_lines(root, schema.read_request_manifest(root)))


def results_of(root):
    path = live.results_path(root, schema.read_request_manifest(root))
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_request_is_answered_once_whatever_the_server_does(root, tmp_path):
    asked, log = lines_of(root), tmp_path / "log"
    with serving(log, faults="429,500,slow,broken,html,none") as address:
        report = live.ask(root, patient(address), RequestConfig(price_in=1.0, price_out=2.0))
    assert (report.asked, report.whole, report.new) == (len(asked), len(asked), len(asked))
    assert (report.cut, report.failed, report.stopped_by) == (0, 0, "")

    seen = received(log)
    faults = collections.Counter(entry["status"] for entry in seen)
    assert min(faults[kind] for kind in (429, 500, "slow", "broken", "html")) > 0
    answered = collections.Counter(entry["prompt"] for entry in seen if entry["status"] == 200)
    expected = [line["body"]["messages"][0]["content"] for line in asked]
    assert answered == collections.Counter(expected)

    tokens = sum(len(prompt) // 4 + chat_server.WORDS for prompt in expected)
    assert report.spent.tokens == tokens
    cost = sum(len(prompt) // 4 * 1e-6 + chat_server.WORDS * 2e-6 for prompt in expected)
    assert report.spent.cost == pytest.approx(cost)
    assert sorted(line["custom_id"] for line in results_of(root)) == sorted(
        line["custom_id"] for line in asked
    )


def test_collect_makes_a_product_of_what_came(data, root, tmp_path):
    with serving(tmp_path / "log") as address:
        report = live.ask(root, patient(address), RequestConfig())
    collect_results(data, report.path)
    teacher = preferences.load(data, "llm")
    index = requests.load_index(root, schema.read_request_manifest(root)).to_pylist()
    expected = {}
    for line, row in zip(lines_of(root), index, strict=True):
        prompt = line["body"]["messages"][0]["content"]
        for place, item in enumerate(row["items"]):
            expected[row["user"], item] = np.float32(chat_server.score(prompt, place))
    owners = np.repeat(np.arange(data.n_users), np.diff(teacher.offsets))
    given = zip(owners.tolist(), teacher.items.tolist(), teacher.scores, strict=True)
    assert {(user, item): score for user, item, score in given} == expected


def collect_results(data, path):
    try:
        from slgr_jax.teacher.collect.collecting import collect
    except ImportError:
        from slgr_jax.teacher.collect.answer_log import collect
    collect(data, TeachConfig(name="llm"), CollectConfig(results=str(path)))


ASK = """
import sys
from slgr_jax.config import AskConfig, RequestConfig
from slgr_jax.teacher.ask import live
root, address = sys.argv[1:]
options = AskConfig(base_url=address, concurrency=4, timeout=5.0)
import pathlib
print(live.ask(pathlib.Path(root), options, RequestConfig()).report())
"""


def test_a_killed_run_goes_on_and_asks_nothing_twice_that_was_answered(root, tmp_path):
    log, asked = tmp_path / "log", lines_of(root)
    command = [sys.executable, "-c", ASK, str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    path = live.results_path(root, schema.read_request_manifest(root))
    with serving(log, delay=0.05) as address:
        for least in (10, 30):
            process = subprocess.Popen([*command, address], env=environment)
            deadline = time.monotonic() + 60
            while not (path.exists() and path.read_bytes().count(b"\n") >= least):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept = path.read_bytes()
            path.write_bytes(kept + b'{"custom_id": "half a li')  # as a kill may leave it
        in_file = {json.loads(line)["custom_id"] for line in kept.splitlines()}
        before = len(received(log))
        done = subprocess.run(
            [*command, address], env=environment, check=True, capture_output=True, text=True
        )
    assert f"{len(asked)} of {len(asked)} requests have a whole one" in done.stdout
    names = {line["body"]["messages"][0]["content"]: line["custom_id"] for line in asked}
    last = [names[entry["prompt"]] for entry in received(log)[before:]]
    assert in_file.isdisjoint(last)
    assert len(received(log)) <= len(asked) + 2 * 4  # what was under way at each kill
    assert [line["custom_id"] for line in results_of(root)].count(asked[0]["custom_id"]) == 1
    assert len(results_of(root)) == len(asked)


def test_cut_answers_are_asked_for_with_twice_the_tokens(root, tmp_path):
    asked, log = lines_of(root), tmp_path / "log"
    (most,) = {line["body"]["max_tokens"] for line in asked if line["body"]["max_tokens"] > 70}
    assert 50 < most <= 100  # the server cuts up to 200: one or two doublings
    tries = next(k for k in range(9) if most * 2**k > 200) + 1
    with serving(log, faults="cut") as address:
        short = live.ask(root, patient(address, cut_retries=0), RequestConfig())
        assert (short.whole, short.cut, short.new) == (0, len(asked), len(asked))
        again = live.ask(root, patient(address, cut_retries=0), RequestConfig())
        assert again.new == 0
        wider = live.ask(root, patient(address, cut_retries=3), RequestConfig())
    assert (wider.whole, wider.cut) == (len(asked), 0)
    prompt = asked[0]["body"]["messages"][0]["content"]
    limits = [entry["most"] for entry in received(log) if entry["prompt"] == prompt]
    stated = asked[0]["body"]["max_tokens"]
    assert limits == [stated * 2**k for k in range(len(limits))]
    assert limits[-1] > 200 >= limits[-2]
    assert max(collections.Counter(entry["prompt"] for entry in received(log)).values()) >= tries


@pytest.mark.parametrize("limit", ["max_requests", "max_tokens", "max_cost"])
def test_a_budget_stops_it_and_more_goes_on(root, tmp_path, limit):
    asked = lines_of(root)
    prices = {"price_in": 3.0, "price_out": 15.0}
    with serving(tmp_path / "log") as address:
        whole = live.ask(root, patient(address), RequestConfig(**prices))
        live.results_path(root, schema.read_request_manifest(root)).unlink()
        total = {
            "max_requests": whole.spent.requests,
            "max_tokens": whole.spent.tokens,
            "max_cost": whole.spent.cost,
        }[limit]
        most = int(total / 2) if limit != "max_cost" else total / 2
        stopped = live.ask(root, patient(address), RequestConfig(**prices, **{limit: most}))
        spent = {
            "max_requests": stopped.spent.requests,
            "max_tokens": stopped.spent.tokens,
            "max_cost": stopped.spent.cost,
        }[limit]
        assert f"--{limit}=" in stopped.stopped_by
        assert 0.75 * most < spent <= most
        assert 0 < stopped.whole < len(asked)
        again = live.ask(root, patient(address), RequestConfig(**prices, **{limit: most}))
        assert again.spent == stopped.spent
        rest = live.ask(root, patient(address), RequestConfig(**prices))
    assert rest.whole == len(asked)
    assert rest.new == len(asked) - stopped.whole
    assert rest.spent.tokens == whole.spent.tokens


def test_rate_limits_space_the_requests(root, tmp_path):
    only = dict.fromkeys([line["custom_id"] for line in lines_of(root)[:6]], 3)
    with serving(tmp_path / "log") as address:
        start = time.monotonic()
        options = patient(address, requests_per_minute=600)
        report = live.ask(root, options, RequestConfig(), only=only)
    assert time.monotonic() - start >= 5 * 0.1  # six requests, a tenth of a second apart
    assert report.new == 6
    by_prompt = {line["body"]["messages"][0]["content"]: line for line in lines_of(root)}
    seen = [(by_prompt[entry["prompt"]], entry["most"]) for entry in received(tmp_path / "log")]
    assert {line["custom_id"] for line, _ in seen} == set(only)
    assert all(most == 3 * line["body"]["max_tokens"] for line, most in seen)


def test_what_every_request_would_meet_ends_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    for faults, words in (
        ("401", "answers 401 (wrong key): set the environment variable SOME_KEY"),
        ("400", "requests in a row failed, the last one with status 400: unknown field "
         "response_format; if it does not know a field"),
        ("empty", "it answers without choices"),
    ):  # fmt: skip
        log = tmp_path / faults
        with serving(log, faults=faults) as address:
            options = patient(address, api_key_env="SOME_KEY", concurrency=1)
            with pytest.raises(UserError, match=re.escape(words)) as error:
                live.ask(root, options, RequestConfig())
        assert "secret" not in str(error.value)
        assert len(received(log)) <= 3
    options = patient("http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError, match=r"in a row failed.*no connection.*see that the server"):
        live.ask(root, options, RequestConfig())


def test_what_cannot_be_asked_is_refused_before_anything_is(root, tmp_path):
    with pytest.raises(ConfigError, match="missing --base_url"):
        live.ask(root, AskConfig(), RequestConfig())
    with pytest.raises(ConfigError, match="give the part before /chat/completions"):
        live.ask(root, AskConfig(base_url="http://h/v1/chat/completions"), RequestConfig())
    with pytest.raises(ConfigError, match="--max_cost needs prices"):
        live.ask(root, AskConfig(base_url="http://h/v1"), RequestConfig(max_cost=1.0))
    path = live.results_path(root, schema.read_request_manifest(root))
    path.write_text('{"custom_id": 5}\n')
    with pytest.raises(InputError, match=r"line 1 is no result of slgr teach ask; remove the line"):
        live.ask(root, AskConfig(base_url="http://h/v1"), RequestConfig())
    path.unlink()
    requests_file = next(root.glob("requests-*.jsonl"))
    requests_file.write_bytes(requests_file.read_bytes().replace(b"Film", b"Tilm", 1))
    with serving(tmp_path / "log") as address, pytest.raises(ShardError, match="SHA-256"):
        live.ask(root, patient(address), RequestConfig())


def test_texts_are_asked_for_in_the_same_way(data, tmp_path):
    asked = {"prompt": "kar_item", "factors": "mood,genre", "answer_tokens": 150}
    root = written_world.ask(data, "facts", **asked)
    with serving(tmp_path / "log", faults="cut,429,none") as address:
        report = live.ask(root, patient(address), RequestConfig())
    assert (report.asked, report.whole) == (60, 60)
    product, told = written_world.gather(data, report.path, name="facts")
    prompts_of = [line["body"]["messages"][0]["content"] for line in lines_of(root)]
    assert written_world.held(product) == {
        (item, factor): str(chat_server.score(prompts_of[item], place))
        for item in range(60)
        for place, factor in enumerate(("mood", "genre"))
    }
    cut = sum(entry["status"] == "cut" for entry in received(tmp_path / "log"))
    assert cut > 0
    assert f"{60 + cut} results: 60 accepted, 0 repeated, {cut} quarantined (cut off {cut})" in told
