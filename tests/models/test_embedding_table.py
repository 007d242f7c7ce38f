"""Row optimisers against optax, duplicates against a dense gradient, sharded against single;
bfloat16 rows against float32 rows and against their bits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

from slgr_jax.config import TABLE_DTYPES, OptimizerConfig
from slgr_jax.mesh import make_layout
from slgr_jax.models import embedding_table, row_optimizers
from slgr_jax.sampling import random_bits

ROWS, WIDTH = 20, 6
SPEC = embedding_table.TableSpec(ROWS, WIDTH, 1.0)
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
    optimizer = row_optimizers.make_row_optimizer(config)
    table = embedding_table.init_table(
        jax.random.key(0), SPEC, optimizer, layout, config.table_dtype
    )
    slot = jnp.zeros(table.shape[0], jnp.int32)

    def one(table, slot, ids, grads, key):
        generator = embedding_table.rounding(key, ["some"])["some"]
        return embedding_table.update(table, slot, ids, grads, optimizer, layout, generator)

    if layout.devices > 1:
        rows, batch, whole = layout.table_spec, layout.batch_spec, jax.sharding.PartitionSpec()
        one = jax.shard_map(
            one,
            mesh=layout.mesh,
            in_specs=(rows, rows, batch, batch, whole),
            out_specs=(rows, rows),
            check_vma=False,
        )
    one = jax.jit(one)
    start = np.asarray(embedding_table.values_of(table, SPEC))
    for number, (ids, grads) in enumerate(steps):
        key = np.array([8, number], np.uint32)
        table, slot = one(table, slot, jnp.asarray(ids, jnp.int32), jnp.asarray(grads), key)
    return start, np.asarray(embedding_table.values_of(table, SPEC))


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


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_untouched_rows_do_not_move(dtype):
    config = dataclasses.replace(OPTIMIZERS["lazy_adam"][0], table_dtype=dtype)
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


@functools.cache
def _after_four_steps(config, layout):
    return _run(config, layout, _steps(2, count=4, lanes=16))[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in (*OPTIMIZERS, "rowwise_adagrad")),
        *((name, "bfloat16") for name in ("sgd", "adagrad")),
    ],
)
@pytest.mark.parametrize("table_shards", [1, 2, 8])
def test_sharded_equals_single(name, dtype, table_shards):
    config = (
        OPTIMIZERS[name][0] if name in OPTIMIZERS else OptimizerConfig(table_optimizer=name, lr=0.1)
    )
    config = dataclasses.replace(config, table_dtype=dtype)
    alone = _after_four_steps(config, worlds.one_device())
    shared = _after_four_steps(config, make_layout(table_shards=table_shards))
    if dtype == "float32":
        np.testing.assert_allclose(shared, alone, rtol=1e-6, atol=1e-7)
    else:  # the same noise on any mesh; a last bit of float32 seldom decides
        assert (shared != alone).mean() < 0.02


@pytest.mark.parametrize("table_shards", [1, 4, 8])
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_sharded_lookup_reads_the_same_rows(table_shards, dtype):
    layout = make_layout(table_shards=table_shards)
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer="adagrad"))
    spec = embedding_table.TableSpec(1000, 5, 1.0)
    table = embedding_table.init_table(jax.random.key(3), spec, optimizer, layout, dtype)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (16, 2)), jnp.int32)
    read = jax.jit(
        jax.shard_map(
            lambda table, ids: embedding_table.lookup(table, ids, 5, layout),
            mesh=layout.mesh,
            in_specs=(layout.table_spec, layout.batch_spec),
            out_specs=layout.batch_spec,
            check_vma=False,
        )
    )
    values = np.asarray(embedding_table.values_of(table, spec))
    np.testing.assert_array_equal(read(table, ids), values[np.asarray(ids)])


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_initial_values_do_not_depend_on_the_mesh(dtype):
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig())
    alone, shared, exact = (
        embedding_table.values_of(
            embedding_table.init_table(jax.random.key(7), SPEC, optimizer, layout, kind), SPEC
        )
        for layout, kind in (
            (worlds.one_device(), dtype),
            (make_layout(table_shards=8), dtype),
            (worlds.one_device(), "float32"),
        )
    )
    np.testing.assert_array_equal(alone, shared)
    np.testing.assert_array_equal(alone, exact.astype(dtype).astype(jnp.float32))


def test_a_table_is_made_without_a_second_one(users_compiler):
    """Initial values are elementwise in (row, column): no temporary of the table's size."""
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig())
    spec, layout = embedding_table.TableSpec(100_000, 64, 0.1), worlds.one_device()
    make = jax.jit(lambda key: embedding_table.init_table(key, spec, optimizer, layout))
    lowered = make.lower(jax.random.key(0))
    memory = lowered.compile(compiler_options=users_compiler).memory_analysis()
    assert memory.output_size_in_bytes >= 100_000 * 128 * 4
    assert memory.temp_size_in_bytes < 100_000


def test_initial_entries_have_the_stated_spread():
    spec = embedding_table.TableSpec(20_000, 16, 0.5)
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer="sgd"))
    values = np.asarray(
        embedding_table.init_table(jax.random.key(0), spec, optimizer, worlds.one_device())
    )
    assert values.std() == pytest.approx(0.5 / 4.0, rel=0.01)
    assert abs(values.mean()) < 1e-3


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_update_compiles_without_a_table_sized_temporary(users_compiler, dtype):
    """A million rows: what the program allocates beside its donated table stays with the batch."""
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer="adagrad"))
    rows, width, lanes, layout = 1_000_000, 16, 512, worlds.one_device()
    spec = embedding_table.TableSpec(rows, width, 1.0)
    table = jax.eval_shape(
        lambda: embedding_table.init_table(jax.random.key(0), spec, optimizer, layout, dtype)
    )
    value_bytes = jnp.dtype(dtype).itemsize
    assert table.size * table.dtype.itemsize == table.shape[0] * width * (value_bytes + 4)

    def step(table, slot, ids, grads, generator):
        return embedding_table.update(table, slot, ids, grads, optimizer, layout, generator)

    shape = jax.ShapeDtypeStruct
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(
            table,
            shape((table.shape[0],), jnp.int32),
            shape((lanes,), jnp.int32),
            shape((lanes, width), jnp.float32),
            shape((2,), jnp.uint32),
        )
        .compile(compiler_options=users_compiler)
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 40 * lanes * width * 4
    assert memory.alias_size_in_bytes >= table.size * table.dtype.itemsize


# --- bfloat16 rows --------------------------------------------------------------------------------

PACKED = embedding_table.RowFormat(WIDTH, 3, "bfloat16")


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers around float32 ones, as bits: towards zero, away from it."""
    towards = values.view(np.uint32) >> 16
    return towards, towards + (values.view(np.uint32) & 0xFFFF != 0)


def _bits(values: jax.Array) -> np.ndarray:
    """The upper half of float32 values that must have no lower one."""
    bits = np.asarray(values).view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    return bits >> 16


def _noise(key: jax.Array, ids: jax.Array | np.ndarray, width: int) -> jax.Array:
    return random_bits.halves_of_rows(
        embedding_table.rounding(key, ["a"])["a"], jnp.asarray(ids), width
    )


@jax.jit
def _round(values: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastically rounded rows 0, 1, 2, ..."""
    rows, width = values.shape
    row_format = embedding_table.RowFormat(width, 0, "bfloat16")
    noise = _noise(key, jnp.arange(rows), width)
    return row_format.unpack(row_format.pack(values, jnp.zeros((rows, 0)), noise))[0]


def test_every_bit_of_a_slot_survives_the_way_through_a_table():
    """Every pattern as either half of a slot: NaNs of any kind, subnormals, -0. Scatter, loop,
    select and gather as in a step."""
    every, rng = np.arange(1 << 16, dtype=np.uint32), np.random.default_rng(0)
    other = rng.integers(0, 1 << 16, every.size, dtype=np.uint32)
    slots = np.concatenate([every << 16 | other, other << 16 | every]).reshape(-1, PACKED.slots - 1)
    slots = np.concatenate([slots, slots[:, :1]], axis=1).view(np.float32)
    values = rng.integers(0, 0x7F80, (len(slots), WIDTH), dtype=np.uint32) << 16
    order = jnp.asarray(rng.permutation(len(slots)))

    @jax.jit
    def there_and_back(values, slots):
        def body(_, table):
            old = table.at[order].get(mode="promise_in_bounds")
            fresh = PACKED.pack(values, slots)[order]
            new = jnp.where((order % 2 == 0)[:, None], fresh, PACKED.pack(*PACKED.unpack(old)))
            return table.at[order].set(new, mode="drop", unique_indices=True)

        # Odd rows hold theirs from the start, and are read and written back.
        table = jax.lax.fori_loop(0, 2, body, PACKED.pack(values, slots))
        return table, *PACKED.unpack(table)

    table, got_values, got_slots = there_and_back(values.view(np.float32), slots)
    assert table.dtype.itemsize * table.shape[1] == 2 * WIDTH + 4 * PACKED.slots
    np.testing.assert_array_equal(np.asarray(got_slots).view(np.uint32), slots.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(got_values).view(np.uint32), values)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """Up (away from zero) as often as the cut-off half says, within 4 standard errors."""
    rng = np.random.default_rng(0)
    row = np.concatenate(
        [
            rng.normal(size=40) * 10.0 ** rng.integers(-30, 30, 40),
            [1e-40, -3e-39, 1.0 + 2**-20, -1.0 - 2**-9, 2.0**100 * (1 + 2**-8), 3.3e38],
        ]
    ).astype(np.float32)
    rows, keys = 512, jax.random.split(jax.random.key(0), 16)
    got = np.stack([_bits(_round(np.tile(row, (rows, 1)), key)) for key in keys])
    towards, away = _neighbours(row)
    assert ((got == towards) | (got == away)).all()
    share = (row.view(np.uint32) & 0xFFFF) / 65536
    error = np.sqrt(share * (1 - share) / (rows * len(keys)))
    up = (got != towards).mean(axis=(0, 1))
    assert (np.abs(up - share) <= 4 * error).all()


def test_rounding_keeps_what_is_on_the_grid_and_what_is_no_number():
    finite = np.arange(1 << 16, dtype=np.uint32)
    finite = finite[finite & 0x7F80 != 0x7F80]
    values = (finite << 16).view(np.float32).reshape(-1, 8)
    for key in jax.random.split(jax.random.key(0), 4):
        np.testing.assert_array_equal(_bits(_round(values, key)).ravel(), finite)
    # A NaN by its lower half alone, and one that noise would carry into -0.
    nans = np.array([0x7F80_0001, 0x7FFF_FFFF, 0xFFFF_FFFF], np.uint32).view(np.float32)
    row = np.concatenate([np.array([np.inf, -np.inf, np.nan], np.float32), nans])
    got = _round(np.tile(row, (1000, 1)), jax.random.key(1))
    np.testing.assert_array_equal(got, np.broadcast_to(row, got.shape))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "rowwise_adagrad"])
def test_an_update_is_the_float32_one_rounded(name):
    """From the same values and slots: slots equal to the bit, values to a neighbour."""
    optimizer = row_optimizers.make_row_optimizer(OptimizerConfig(table_optimizer=name, lr=0.1))
    layout, width, lanes = worlds.one_device(), 8, 64
    spec = embedding_table.TableSpec(100, width, 1.0)
    packed = embedding_table.init_table(jax.random.key(0), spec, optimizer, layout, "bfloat16")
    of_packed = embedding_table.RowFormat.of(packed, width)
    assert of_packed == embedding_table.RowFormat(width, optimizer.slots(width), "bfloat16")
    plain = dataclasses.replace(of_packed, dtype="float32").pack(*of_packed.unpack(packed))
    assert embedding_table.RowFormat.of(plain, width).dtype == "float32"
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, spec.rows, lanes), jnp.int32)
    grads = jnp.asarray(rng.normal(size=(lanes, width)), jnp.float32)

    @jax.jit
    def step(table):
        slot = jnp.zeros(table.shape[0], jnp.int32)
        args = (table, slot, ids, grads, optimizer, layout, jnp.array([2, 5], jnp.uint32))
        return embedding_table.RowFormat.of(table, width).unpack(embedding_table.update(*args)[0])

    values, slots = step(packed)
    exact, exact_slots = step(plain)
    np.testing.assert_array_equal(slots, exact_slots)
    towards, away = _neighbours(np.asarray(exact))
    bits = _bits(values)
    assert ((bits == towards) | (bits == away)).all()
    assert 0.2 < (bits == away)[towards != away].mean() < 0.8  # neither always down nor always up


def test_updates_below_half_an_ulp_are_kept_on_average():
    """64 updates of a 16th of an ulp, in two halves each: to nearest, none would be seen."""
    optimizer, layout, rows, width = row_optimizers.Sgd(2.0**-11), worlds.one_device(), 512, 16
    row_format = embedding_table.RowFormat(width, 0, "bfloat16")
    table = row_format.pack(jnp.ones((rows, width)), jnp.zeros((rows, 0)))
    ids = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), 2)
    grads = jnp.full((2 * rows, width), -0.5)

    @jax.jit
    def run(table):
        def body(step, carry):
            generator = embedding_table.rounding(
                jax.random.fold_in(jax.random.key(0), step), ["a"]
            )["a"]
            return embedding_table.update(*carry, ids, grads, optimizer, layout, generator)

        return jax.lax.fori_loop(0, 64, body, (table, jnp.zeros(rows, jnp.int32)))[0]

    values = np.asarray(row_format.unpack(run(table))[0], np.float64)
    error = values.std() / np.sqrt(values.size)
    assert abs(values.mean() - (1 + 64 * 2.0**-11)) < 4 * error
    assert error < 1e-3


def test_noise_depends_on_key_table_row_and_column_alone():
    """Not on where in a batch a row stands; and it repeats in none of the four."""
    key, ids = jax.random.key(3), np.arange(300)
    noise = np.asarray(_noise(key, ids, 50))
    mixed = np.random.default_rng(0).permutation(300)[:77]
    np.testing.assert_array_equal(_noise(key, mixed, 7), noise[mixed, :7])
    others = [np.asarray(_noise(jax.random.key(4), ids, 50))]
    two = embedding_table.rounding(key, ["a", "b"])
    np.testing.assert_array_equal(two["a"], embedding_table.rounding(key, ["a"])["a"])
    others.append(np.asarray(random_bits.halves_of_rows(two["b"], jnp.asarray(ids), 50)))
    for other in others:
        assert (noise == other).mean() < 1e-3
    uniform = noise / 2**16 - 0.5
    near = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:, 16:], noise[:, :-16])]
    for a, b in (*((noise, other) for other in others), *near):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    assert abs(uniform.mean()) < 4 / np.sqrt(12 * uniform.size)


def test_a_bfloat16_update_needs_a_generator():
    table = PACKED.pack(jnp.zeros((4, WIDTH)), jnp.zeros((4, PACKED.slots)))
    with pytest.raises(ValueError, match="with a generator"):
        embedding_table.update(
            *(table, jnp.zeros(4, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((1, WIDTH))),
            *(row_optimizers.RowwiseAdagrad(0.1, 1e-8), worlds.one_device()),
        )


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_all_finite_reads_numbers_not_lanes(dtype):
    row_format = dataclasses.replace(PACKED, dtype=dtype)
    values, slots = np.ones((5, WIDTH), np.float32), np.ones((5, PACKED.slots), np.float32)
    # A number whose lower half alone would be an infinity.
    slots[2, 1] = np.uint32(0x3F80_7F80).view(np.float32)
    fine = jax.jit(lambda *parts: embedding_table.all_finite(row_format.pack(*parts), WIDTH))
    assert fine(values, slots)
    for part in (values, slots):
        for bad in (np.nan, np.inf, -np.inf):
            kept, part[3, -1] = part[3, -1], bad
            assert not fine(values, slots)
            part[3, -1] = kept
