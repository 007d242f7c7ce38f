"""How many users a second does full ranking serve?

    python benchmarks/ranking.py

Random factors (width 64), random seen and relevant items; users/s of the top-20 lists, of the
ranks of all relevant items, and of those with the exact pooled AUC. Median, minimum and maximum
over repeats after a warm-up that compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app
from absl import flags as absl_flags

from slgr_jax import evaluate, report
from slgr_jax.data.dataset import Csr

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_integer("repeats", 3, "timed repeats", lower_bound=1)
WIDTH = 64
SIZES = ((943, 1_682, 85, 10), (20_000, 27_000, 100, 10))  # users, items, seen and relevant a user


def rows(rng: np.random.Generator, n_users: int, n_items: int, per_user: int) -> Csr:
    """About `per_user` random items a user."""
    users = np.repeat(np.arange(n_users), per_user)
    return Csr.from_pairs(users, rng.integers(0, n_items, users.size), n_users)


def score(state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
    """Dot products of the users' vectors with all items'."""
    return state[0][users] @ state[1].T


def timed(call: Callable[[], object]) -> list[float]:
    """Seconds of each repeat after one that compiles."""
    times = []
    for _ in range(FLAGS.repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times[1:]


def main(_: list[str]) -> None:
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    out = []
    for n_users, n_items, n_seen, n_relevant in SIZES:
        rng = np.random.default_rng(0)
        factors = [rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (n_users, n_items)]
        state = tuple(map(jax.device_put, factors))
        relevant = rows(rng, n_users, n_items, n_relevant)
        seen = rows(rng, n_users, n_items, n_seen)
        users = np.arange(n_users, dtype=np.int32)
        whole = (score, state, relevant, seen, n_items)
        ways: dict[str, Callable[[], object]] = {
            "top-20": lambda s=state, u=users, m=seen, n=n_items: evaluate.top_k(
                score, s, u, m, n, k=20
            ),
            "ranks": lambda w=whole: evaluate.rank(*w, pooled_auc=False),
            "ranks, pooled AUC": lambda w=whole: evaluate.rank(*w),
        }
        for name, call in ways.items():
            rates = [n_users / seconds for seconds in timed(call)]
            row = {"users": n_users, "items": n_items, "what": name}
            row |= {"users/s": round(float(np.median(rates)))}
            out.append(row | {"min": round(min(rates)), "max": round(max(rates))})
    print(report.markdown_table(out))


if __name__ == "__main__":
    app.run(main)
