"""How long does `slgr serve` take to answer, at a stated load?

    python benchmarks/speed/serving.py --workdir=RUN
    python benchmarks/speed/serving.py --world=large

An open loop: requests leave at the times of a Poisson process of --rates requests/s for --seconds
each, whether or not earlier ones are answered, over kept connections; an answer's latency counts
from the time at which its request was due, so that a client or a server that falls behind is seen.
A request asks for the ten best items of one known user, drawn uniformly; with --new_items=N, of a
new user with N items. --world=large serves random factors (width 64, 138,000 users, 27,000 items,
the world of `recommend.py`) from a process of its own; a run is served by `slgr serve`. The client
shares the machine with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app
from absl import flags as absl_flags

from slgr_jax.reports import tables

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_string("workdir", "", "run to serve")
absl_flags.DEFINE_enum("world", "", ["", "ml100k", "large"], "in its place: random factors")
absl_flags.DEFINE_list("rates", ["100", "300"], "requests/s to offer, one after the other")
absl_flags.DEFINE_float("seconds", 10.0, "of each rate", lower_bound=0.1)
absl_flags.DEFINE_integer("new_items", 0, "items of a new user; 0: known users", lower_bound=0)
absl_flags.DEFINE_list("serve", [], "flags of the server without their dashes: batch_wait_ms=0")

HEADERS = "Host: localhost\r\nContent-Type: application/json\r\n"


def serve_world(size: str, port: int, options: dict[str, Any]) -> None:
    """Serve random factors until SIGTERM, in a process of its own."""
    import ranking_peers
    import recommend

    from slgr_jax.config import ServeConfig
    from slgr_jax.serving import http_server

    run, _ = recommend.make_run(ranking_peers.SIZES[size])
    config = ServeConfig(port=port, **options)
    http_server.serve(run, config, http_server.listen(config.host, port))


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server that is ready, and that is stopped at the end."""
    if FLAGS.world:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given = dict(option.split("=", 1) for option in FLAGS.serve)
        options = {name: float(v) if "." in v else int(v) for name, v in given.items()}
        process: Any = multiprocessing.get_context("spawn").Process(
            target=serve_world, args=(FLAGS.world, port, options)
        )
        process.start()
        address = f"http://127.0.0.1:{port}"
    else:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "slgr_jax.cli", "serve", f"--workdir={FLAGS.workdir}"),
                *("--port=0", *(f"--{option}" for option in FLAGS.serve)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        found = re.search(r"at (http://[\d.:]+);", process.stdout.readline())
        assert found, "the server did not start"
        address = found[1]
    try:
        begin = time.perf_counter()
        while not _ready(address):
            alive = process.is_alive() if FLAGS.world else process.poll() is None
            assert alive, "the server ended before it was ready"
            time.sleep(0.2)
        print(f"compiled in {time.perf_counter() - begin:.1f} s", flush=True)
        yield address
    finally:
        process.terminate()
        process.join() if FLAGS.world else process.wait()


def _ready(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def request_bodies(address: str, count: int) -> list[bytes]:
    """`count` requests, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    health = json.load(urllib.request.urlopen(f"{address}/health"))
    data = health["data"]
    if FLAGS.new_items:
        items = json.load(urllib.request.urlopen(f"{address}/items?limit=100"))["items"]
        ids = np.array([item["item"] for item in items], object)
        drawn = [rng.choice(ids, FLAGS.new_items, replace=False).tolist() for _ in range(count)]
        return [json.dumps({"histories": {"new": items}}).encode() for items in drawn]
    if FLAGS.world:
        users = [f"user-{user:07d}" for user in rng.integers(data["users"], size=count)]
    else:
        import slgr_jax as sl

        known = sl.load(FLAGS.workdir).dataset.user_ids.to_pylist()
        users = [known[user] for user in rng.integers(len(known), size=count)]
    return [json.dumps({"users": [user]}).encode() for user in users]


class Client:
    """Kept connections; more are made while all are in use."""

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        self._host, self._port = parts.hostname, parts.port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> int:
        """The status of the answer to a request."""
        head = f"POST /recommend HTTP/1.1\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n"
        answer = ""
        while not answer:
            kept = bool(self._free)
            reader, writer = (
                self._free.pop() if kept else await asyncio.open_connection(self._host, self._port)
            )
            try:
                writer.write(head.encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            except (asyncio.IncompleteReadError, ConnectionError):
                if not kept:  # a server closes connections that nobody used for a while
                    raise
        length = re.search(r"content-length: (\d+)", answer)
        assert length, answer
        await reader.readexactly(int(length[1]))
        self._free.append((reader, writer))
        return int(answer.split()[1])


async def offer(address: str, rate: float, bodies: list[bytes]) -> tuple[np.ndarray, int, float]:
    """(latencies in s of what was answered 200, other answers, seconds until the last answer)."""
    client, loop = Client(address), asyncio.get_running_loop()
    due = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(bodies)))
    begin = loop.time()

    async def one(body: bytes, at: float) -> tuple[int, float]:
        await asyncio.sleep(begin + at - loop.time())
        status = await client.post(body)
        return status, loop.time() - begin - at

    answers = await asyncio.gather(*map(one, bodies, due))
    took = loop.time() - begin
    good = np.array([seconds for status, seconds in answers if status == 200])
    return good, len(answers) - good.size, took


def main(_: list[str]) -> None:
    """Serve, load, print."""
    if bool(FLAGS.workdir) == bool(FLAGS.world):
        raise app.UsageError("give either --workdir=RUN or --world")
    rows = []
    with server() as address:
        bodies = request_bodies(address, 20)
        asyncio.run(offer(address, 20, bodies))  # connections, first touches
        for rate in map(float, FLAGS.rates):
            before = json.load(urllib.request.urlopen(f"{address}/health"))
            bodies = request_bodies(address, int(rate * FLAGS.seconds))
            seconds, refused, took = asyncio.run(offer(address, rate, bodies))
            after = json.load(urllib.request.urlopen(f"{address}/health"))
            kind = "new_users" if FLAGS.new_items else "known_users"
            listed, calls = (after[kind][name] - before[kind][name] for name in ("listed", "calls"))
            p50, p99 = np.percentile(seconds * 1000, [50, 99]) if seconds.size else (np.nan,) * 2
            rows.append(
                {
                    "offered/s": rate,
                    "answered/s": round(seconds.size / took, 1),
                    "p50 ms": round(float(p50), 1),
                    "p99 ms": round(float(p99), 1),
                    "most ms": round(float(seconds.max(initial=0) * 1000), 1),
                    "refused": refused,
                    "users/call": round(listed / max(calls, 1), 1),
                    "load": round(os.getloadavg()[0], 1),
                }
            )
            print(rows[-1], flush=True)
    print(tables.markdown_table(rows))


if __name__ == "__main__":
    app.run(main)
