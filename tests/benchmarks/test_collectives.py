"""Bytes that collectives move, counted in programs that move a number known in closed form, and
in the step of a run on eight devices."""

from __future__ import annotations

import re

import collectives
import jax
import jax.numpy as jnp
import pytest
import worlds
from jax.sharding import PartitionSpec

from slgr_jax.config import ModelConfig, SamplerConfig
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import DATA, TABLE, make_layout
from slgr_jax.models import row_exchange

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
    assert moved == {kind: bytes_}


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
    assert once == {"all-reduce": 3 * 2 * 64 * 4, "all-gather": 512 * 4}
    assert each == {"collective-permute": 64 * 4, "all-gather": 3 * 256 * 4}


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
    assert collectives.per_step(text, 4) == {"all-gather": 64 * 4 + 64 * 4 / 4}


def _step(dataset, shards):
    """The text of mf's program on eight devices, and what a step of it moves, in bytes."""
    run = worlds.run_config(
        dataset,
        "",
        model=ModelConfig(dim=64),
        sampler=SamplerConfig(batch_size=8192),
    )
    layout = make_layout(table_shards=shards)
    text, together = collectives.compiled_step(run, dataset, layout)
    return text, collectives.per_step(text, together)


def test_tables_on_every_device(dataset):
    """Of a triple three ids and the gradients of two scores go to all devices (those of squares
    are a constant), where the gradients of its rows would be 3 * 64 numbers: 6.4 MB."""
    _, moved = _step(dataset, 1)
    assert sum(moved.values()) == pytest.approx(8192 * (3 + 2) * 4, rel=0.01)


def test_tables_split_over_eight_devices(dataset):
    """Three rows of 64 floats a triple come and their gradients go, with room for 1.5 times as
    many, instead of to and from every device (12.7 MB). No block of a table is copied."""
    text, moved = _step(dataset, 8)
    places = 8 * sum(row_exchange.capacity(ids, 8) for ids in (1024, 2048))
    expected = 2 * places * (64 * 4 + 4)
    assert sum(moved.values()) == pytest.approx(expected, rel=0.01)
    assert expected < 3e6
    block = re.escape(f"f32[{128 // 8},{64 + 64}]")  # values and slots
    assert re.search(rf"= {block}\S* (fusion|scatter)\(", text)
    assert not re.search(rf"= {block}\S* copy\(", text)


@pytest.mark.parametrize("given", [["8"], ["8x0"], []])
def test_a_mesh_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match="--meshes"):
        collectives._parsed(given)


def test_row_is_in_kilobytes():
    row = collectives.row_of(8, 4, {"all-gather": 2e3, "all-reduce": 48.0})
    assert row == {"devices": 8, "table shards": 4, "kB": 2, "all-gather": 2}
