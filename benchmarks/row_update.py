"""How should the rows that a batch touches more than once be found? Sort them, or mark a slot?

    python benchmarks/row_update.py

Both ways sum the gradients of equal rows and update each distinct row once with Adagrad:
  sort  argsort the ids, segment-sum the sorted gradients (the usual way)
  slot  write lane numbers into a scratch row, read them back (`embedding_table.update`)
Prints milliseconds per update: median, minimum and maximum over repeats that alternate.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import flags as absl_flags

from slgr_jax.mesh import make_layout
from slgr_jax.models import embedding_table
from slgr_jax.reports import tables as tables_lib

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_integer("repeats", 7, "timed repeats of each way", lower_bound=1)
absl_flags.DEFINE_integer("steps", 50, "updates per timed repeat", lower_bound=1)
WIDTH = 64
SIZES = ((2_600, 6_144), (165_000, 12_288), (165_000, 49_152))  # table rows, touched rows


def by_sort(
    table: jax.Array, ids: jax.Array, grads: jax.Array, optimizer: embedding_table.RowOptimizer
):
    """The update by sorting: returns the new table."""
    order = jnp.argsort(ids)
    ids, grads = ids[order], grads[order]
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    segment = jnp.cumsum(first) - 1
    total = jax.ops.segment_sum(grads, segment, ids.size, indices_are_sorted=True)
    distinct = jnp.full(ids.shape, table.shape[0], jnp.int32).at[segment].set(ids)
    old = table.at[distinct].get(mode="clip")
    values, slots = optimizer.apply(old[:, :WIDTH], old[:, WIDTH:], total)
    new = jnp.concatenate([values, slots], axis=1)
    return table.at[distinct].set(new, mode="drop", indices_are_sorted=True)


def program(way: str, rows: int, touched: int):
    """Jitted (table, slot, first step) -> (table, slot): `--steps` updates of random rows."""
    optimizer, layout = embedding_table.Adagrad(0.05, 1e-8), make_layout(devices=jax.devices()[:1])

    def body(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, slot = carry
        ids = jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (touched,), 0, rows)
        grads = table.at[ids].get(mode="promise_in_bounds")[:, :WIDTH] * 0.1 + 1e-3
        if way == "sort":
            return by_sort(table, ids, grads, optimizer), slot
        return embedding_table.update(table, slot, ids, grads, optimizer, layout)

    def run(table: jax.Array, slot: jax.Array, start: jax.Array):
        return jax.lax.fori_loop(start, start + FLAGS.steps, body, (table, slot))

    return jax.jit(run, donate_argnums=(0, 1))


def main(_: list[str]) -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, width {WIDTH}, adagrad")
    rows_out = []
    for rows, touched in SIZES:
        ways = {way: program(way, rows, touched) for way in ("sort", "slot")}
        states = {
            way: (jnp.full((rows, 2 * WIDTH), 0.1), jnp.zeros(rows, jnp.int32)) for way in ways
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(FLAGS.repeats + 1):  # the first compiles
            for way, run in ways.items():
                begin = time.perf_counter()
                states[way] = jax.block_until_ready(run(*states[way], jnp.int32(repeat)))
                times[way].append((time.perf_counter() - begin) / FLAGS.steps * 1e3)
        ratio = np.median(np.array(times["sort"][1:]) / np.array(times["slot"][1:]))
        for way, measured in times.items():
            kept = measured[1:]
            rows_out.append(
                {
                    "table rows": rows,
                    "touched rows": touched,
                    "way": way,
                    "ms median": float(np.median(kept)),
                    "ms min": min(kept),
                    "ms max": max(kept),
                    "sort / slot": float(ratio) if way == "slot" else None,
                }
            )
    print(tables_lib.markdown_table(rows_out))


if __name__ == "__main__":
    app.run(main)
