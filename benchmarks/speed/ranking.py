"""How many users a second does full ranking serve?

    python benchmarks/speed/ranking.py
    python benchmarks/speed/ranking.py --peer=implicit --peer_python=PYTHON

Random factors (width 64), random seen and relevant items; users/s of the top-20 lists, of the
ranks of all relevant items, and of those with the exact pooled AUC, by the native kernels and by
XLA's programs, taking turns. implicit, which only lists, takes its turns in another process.
Median, minimum and maximum over repeats after a warm-up that compiles; `ratio` is the first
row's median over this one's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np
import ranking_peers
import turns
from absl import app
from absl import flags as absl_flags

from slgr_jax.data.dataset import Csr
from slgr_jax.evaluation import full_ranking
from slgr_jax.kernels import build
from slgr_jax.mesh import Layout
from slgr_jax.reports import tables

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_integer("repeats", 5, "timed repeats", lower_bound=1)
absl_flags.DEFINE_multi_enum("size", list(ranking_peers.SIZES), ranking_peers.SIZES, "what to rank")
absl_flags.DEFINE_enum("peer", None, ["implicit"], "also time this library's top-20 lists")
absl_flags.DEFINE_string("peer_python", sys.executable, "the interpreter that has the peer")
PEER = pathlib.Path(__file__).with_name("ranking_peers.py")


State = tuple[jax.Array, jax.Array]  # vectors of users and of items


class Score:
    """Dot products of the users' vectors with all items', which may be asked for themselves."""

    def queries(self, state: State, users: jax.Array) -> jax.Array:
        return state[0][users]

    def own_queries(self, state: State, users: jax.Array, layout: Layout) -> jax.Array:
        raise NotImplementedError("no users are split here")

    def items(self, state: State) -> jax.Array:
        return state[1]

    def __call__(self, state: State, users: jax.Array) -> jax.Array:
        return self.queries(state, users) @ self.items(state).T


score = Score()


class Timed:
    """A call that ranks `users` users, as a player; compiled when made."""

    def __init__(self, users: int, call: Callable[[], object]) -> None:
        self._users, self._call = users, call
        call()

    def turn(self) -> turns.Turn:
        """One repeat."""
        return turns.Turn(self._users, turns.timed(self._call))


def compare(players: Mapping[str, turns.HasTurn]) -> list[dict[str, object]]:
    """A table row for each player."""
    taken = turns.interleave(list(players.values()), FLAGS.repeats)
    rates = {
        name: [turn.rate for turn in of_player]
        for name, of_player in zip(players, taken, strict=True)
    }
    first = float(np.median(next(iter(rates.values()))))
    return [
        {
            "way": name,
            "users/s": round(float(np.median(rates_of))),
            "min": round(min(rates_of)),
            "max": round(max(rates_of)),
            "ratio": round(first / float(np.median(rates_of)), 2),
        }
        for name, rates_of in rates.items()
    ]


def main(_: list[str]) -> None:
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    # For the peer's process: its own threads share the work, and it is slower with more.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    native = build.choose("auto", platform=jax.default_backend(), devices=1)
    ways = ["native", "xla"] if native else ["xla"]
    out = []

    for name in FLAGS.size:
        size = ranking_peers.SIZES[name]
        world = ranking_peers.make(size)
        state = tuple(map(jax.device_put, world.factors))
        seen, relevant = (
            Csr.from_pairs(users, items, size.users)
            for users, items in (world.seen, world.relevant)
        )
        lists = functools.partial(
            full_ranking.top_k, score, state, world.users, seen, size.items, k=ranking_peers.TOP
        )
        ranks = functools.partial(full_ranking.rank, score, state, relevant, seen, size.items)
        calls: dict[str, Callable[..., object]] = {
            "top-20": lists,
            "ranks": functools.partial(ranks, pooled_auc=False),
            "ranks, pooled AUC": ranks,
        }
        for task, call in calls.items():
            players: dict[str, turns.HasTurn] = {
                way: Timed(world.users.size, functools.partial(call, kernels=way)) for way in ways
            }
            with contextlib.ExitStack() as stack:
                if FLAGS.peer and task == "top-20":
                    command = [FLAGS.peer_python, str(PEER)]
                    peer = stack.enter_context(turns.Player(command, {"size": name}))
                    players[f"implicit {peer.facts['version']}"] = peer
                out += [{"size": name, "what": task} | row for row in compare(players)]
    print(tables.markdown_table(out))


if __name__ == "__main__":
    try:
        app.run(main)
    except turns.Refused as refusal:
        sys.exit(str(refusal))
