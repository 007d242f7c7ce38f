"""Bytes that collectives move, counted in programs that move a number known in closed form, and
in the step of a run on eight devices."""

from __future__ import annotations

import collectives
import jax
import jax.numpy as jnp
import pytest
import worlds
from jax.sharding import PartitionSpec

from slgr_jax.config import ModelConfig, SamplerConfig
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import DATA, TABLE, make_layout

WHOLE = (DATA, TABLE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return worlds.random_dataset(tmp_path_factory.mktemp("world") / "d")


def _moved(function):
    """What a program over 2 x 4 devices moves; [512] floats lie on them by 64."""
    layout, whole = make_layout(table_shards=4), PartitionSpec()
    over = PartitionSpec(WHOLE)
    mapped = jax.shard_map(
        function, mesh=layout.mesh, in_specs=(over, whole), out_specs=over, check_vma=False
    )
    arguments = jax.ShapeDtypeStruct((512,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return collectives.moved(jax.jit(mapped).lower(*arguments).compile().as_text())


def _gathered(x, axes):
    return jnp.sin(jax.lax.all_gather(x, axes, tiled=True))


@pytest.mark.parametrize(
    ("kind", "bytes_", "function"),
    [
        ("all-gather", 512 * 4, lambda x, _: _gathered(x, WHOLE)[:64]),
        ("all-gather", 256 * 4, lambda x, _: _gathered(x, TABLE)[:64]),
        ("all-reduce", 2 * 64 * 4, lambda x, _: jax.lax.psum(x, WHOLE)),
        (
            "reduce-scatter",
            64 * 4,
            lambda x, _: jnp.tile(jax.lax.psum_scatter(x, TABLE, tiled=True), 4),
        ),
        ("all-to-all", 64 * 4, lambda x, _: jax.lax.all_to_all(x, TABLE, 0, 0, tiled=True)),
        (
            "collective-permute",
            64 * 4,
            lambda x, _: jax.lax.ppermute(x, TABLE, [(k, (k + 1) % 4) for k in range(4)]),
        ),
    ],
)
def test_one_collective(kind, bytes_, function):
    (moved,) = _moved(function)
    assert moved.least == moved.most == {kind: bytes_}


def test_loops_and_choices():
    """Three trips that are known, trips that are not with a loop of their own, and a choice."""

    def known(_, x):
        return jax.lax.psum(x, WHOLE)

    def outer(_, x):
        x = jax.lax.ppermute(x, TABLE, [(0, 1), (1, 0)])
        return jax.lax.fori_loop(0, 3, lambda _, x: _gathered(x, TABLE)[:64], x)

    def function(x, count):
        x = jax.lax.fori_loop(0, 3, known, x)
        x = jax.lax.fori_loop(0, count, outer, x)
        return jax.lax.cond(
            count > 5,
            lambda x: _gathered(x, WHOLE)[:64],
            lambda x: jax.lax.all_to_all(x, TABLE, 0, 0, tiled=True),
            x,
        )

    once, each = _moved(function)
    assert once.least == {"all-reduce": 3 * 2 * 64 * 4, "all-to-all": 64 * 4}
    assert once.most == {"all-reduce": 3 * 2 * 64 * 4, "all-gather": 512 * 4}
    assert each.least == each.most == {"collective-permute": 64 * 4, "all-gather": 3 * 256 * 4}


def test_draws_of_many_steps_are_shared_by_them():
    text = """HloModule jit_program

%step (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%a), dimensions={0}
}

%draw (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%b), dimensions={0}
  ROOT %w = f32[8]{0} while(%b), condition=%less, body=%step
}

ENTRY %main (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %v = f32[8]{0} while(%c), condition=%less, body=%draw
}
"""
    assert collectives.per_step(text, 4).least == {"all-gather": 64 * 4 + 64 * 4 / 4}


def _step(dataset, shards):
    run = worlds.run_config(
        dataset, "", model=ModelConfig(dim=64), sampler=SamplerConfig(batch_size=8192)
    )
    layout = make_layout(table_shards=shards)
    return collectives.per_step(*collectives.compiled_step(run, dataset, layout))


@pytest.mark.parametrize(("shards", "arrays"), [(1, 1), (8, 2)])
def test_matrix_factorisation_on_eight_devices(dataset, shards, arrays):
    """Three rows of 64 floats a triple, once or twice, and their ids."""
    moved = _step(dataset, shards)
    rows, ids = 3 * 8192 * 64 * 4, 3 * 8192 * 4
    total = sum(moved.least.values())
    assert total == pytest.approx(arrays * (rows + ids), rel=0.01)


@pytest.mark.parametrize("given", [["8"], ["8x0"], []])
def test_a_mesh_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match="--meshes"):
        collectives._parsed(given)


def test_row_is_in_kilobytes():
    moved = collectives.Moved({"all-gather": 2e3}, {"all-gather": 9e3})
    row = collectives.row_of(8, 4, moved)
    assert row == {"devices": 8, "table shards": 4, "kB": 2, "at most": 9, "all-gather": 2}
