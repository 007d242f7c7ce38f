"""Row optimisers against optax, duplicates against a dense gradient, sharded against single."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

from slgr_jax import tables
from slgr_jax.config import OptimizerConfig
from slgr_jax.distributed import make_layout

ROWS, WIDTH = 20, 6
SPEC = tables.TableSpec(ROWS, WIDTH, 1.0)
OPTIMIZERS = {
    "sgd": (OptimizerConfig(table_optimizer="sgd", lr=0.1), optax.sgd(0.1)),
    "adagrad": (
        OptimizerConfig(table_optimizer="adagrad", lr=0.1, eps=1e-7),
        optax.adagrad(0.1, initial_accumulator_value=0.1, eps=1e-7),
    ),
    "lazy_adam": (
        OptimizerConfig(table_optimizer="lazy_adam", lr=0.01, adam_b1=0.8, adam_b2=0.99),
        optax.adam(0.01, b1=0.8, b2=0.99),
    ),
}


def _steps(seed: int, count: int, lanes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, ROWS, lanes), rng.normal(size=(lanes, WIDTH)).astype(np.float32))
        for _ in range(count)
    ]


def _run(config: OptimizerConfig, layout, steps):
    optimizer = tables.make_row_optimizer(config)
    table = tables.init_table(jax.random.key(0), SPEC, optimizer, layout)
    slot = jnp.zeros(table.shape[0], jnp.int32)

    def one(table, slot, ids, grads):
        return tables.update(table, slot, ids, grads, optimizer, layout)

    if layout.devices > 1:
        rows, batch = layout.table_spec, layout.batch_spec
        one = jax.shard_map(
            one,
            mesh=layout.mesh,
            in_specs=(rows, rows, batch, batch),
            out_specs=(rows, rows),
            check_vma=False,
        )
    one = jax.jit(one)
    start = np.asarray(tables.values_of(table, SPEC))
    for ids, grads in steps:
        table, slot = one(table, slot, jnp.asarray(ids, jnp.int32), jnp.asarray(grads))
    return start, np.asarray(tables.values_of(table, SPEC))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_follow_optax_over_the_steps_that_touch_them(name):
    """Each row is one optax run fed the row's summed gradient whenever a batch touches it."""
    config, dense = OPTIMIZERS[name]
    steps = _steps(1, count=7, lanes=9)
    start, got = _run(config, worlds.one_device(), steps)
    for row in range(ROWS):
        params = jnp.asarray(start[row])
        state = dense.init(params)
        for ids, grads in steps:
            if not (ids == row).any():
                continue
            total = jnp.asarray(grads[ids == row].sum(axis=0))
            updates, state = dense.update(total, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(got[row], params, rtol=2e-5, atol=1e-6)


def test_untouched_rows_do_not_move():
    config, _ = OPTIMIZERS["lazy_adam"]
    ids = np.array([3, 3, 5])
    start, got = _run(config, worlds.one_device(), [(ids, np.ones((3, WIDTH), np.float32))])
    untouched = np.setdiff1d(np.arange(ROWS), ids)
    np.testing.assert_array_equal(got[untouched], start[untouched])
    assert (got[[3, 5]] != start[[3, 5]]).all()


def test_rowwise_adagrad_closed_form():
    """a = 0.1 + mean(g^2) for the summed g, and then w - lr g / sqrt(a + eps)."""
    config = OptimizerConfig(table_optimizer="rowwise_adagrad", lr=0.5, eps=1e-6)
    grads = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    start, got = _run(config, worlds.one_device(), [(np.array([4, 4]), grads)])
    total = grads.sum(axis=0)
    expected = start[4] - 0.5 * total / np.sqrt(0.1 + np.mean(total**2) + 1e-6)
    np.testing.assert_allclose(got[4], expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "rowwise_adagrad"])
@pytest.mark.parametrize("table_shards", [1, 2, 8])
def test_sharded_equals_single(name, table_shards):
    config = (
        OPTIMIZERS[name][0] if name in OPTIMIZERS else OptimizerConfig(table_optimizer=name, lr=0.1)
    )
    steps = _steps(2, count=4, lanes=16)
    _, alone = _run(config, worlds.one_device(), steps)
    _, shared = _run(config, make_layout(table_shards=table_shards), steps)
    np.testing.assert_allclose(shared, alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("table_shards", [1, 4, 8])
def test_sharded_lookup_reads_the_same_rows(table_shards):
    layout = make_layout(table_shards=table_shards)
    optimizer = tables.make_row_optimizer(OptimizerConfig(table_optimizer="adagrad"))
    spec = tables.TableSpec(1000, 5, 1.0)
    table = tables.init_table(jax.random.key(3), spec, optimizer, layout)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (16, 2)), jnp.int32)
    read = jax.jit(
        jax.shard_map(
            lambda table, ids: tables.lookup(table, ids, 5, layout),
            mesh=layout.mesh,
            in_specs=(layout.table_spec, layout.batch_spec),
            out_specs=layout.batch_spec,
            check_vma=False,
        )
    )
    np.testing.assert_array_equal(read(table, ids), np.asarray(table)[np.asarray(ids), :5])


def test_values_do_not_depend_on_the_mesh():
    optimizer = tables.make_row_optimizer(OptimizerConfig())
    tables_of = [
        tables.values_of(tables.init_table(jax.random.key(7), SPEC, optimizer, layout), SPEC)
        for layout in (worlds.one_device(), make_layout(table_shards=8))
    ]
    np.testing.assert_array_equal(*tables_of)


def test_initial_entries_have_the_stated_spread():
    spec = tables.TableSpec(20_000, 16, 0.5)
    optimizer = tables.make_row_optimizer(OptimizerConfig(table_optimizer="sgd"))
    values = np.asarray(tables.init_table(jax.random.key(0), spec, optimizer, worlds.one_device()))
    assert values.std() == pytest.approx(0.5 / 4.0, rel=0.01)
    assert abs(values.mean()) < 1e-3


def test_update_compiles_without_a_table_sized_temporary():
    """A million rows: what the program allocates beside its donated table stays with the batch."""
    optimizer = tables.make_row_optimizer(OptimizerConfig(table_optimizer="adagrad"))
    rows, width, lanes, layout = 1_000_000, 16, 512, worlds.one_device()

    def step(table, slot, ids, grads):
        return tables.update(table, slot, ids, grads, optimizer, layout)

    shape = jax.ShapeDtypeStruct
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(
            shape((rows, 2 * width), jnp.float32),
            shape((rows,), jnp.int32),
            shape((lanes,), jnp.int32),
            shape((lanes, width), jnp.float32),
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 40 * lanes * width * 4
    assert memory.alias_size_in_bytes >= rows * 2 * width * 4
