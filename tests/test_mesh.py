"""Meshes: what is refused, how rows are padded, and that collectives are there only when needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.errors import ConfigError
from slgr_jax.mesh import make_layout


def test_mesh_shapes():
    layout = make_layout(table_shards=2)
    assert (layout.devices, layout.table_shards) == (8, 2)
    assert dict(layout.mesh.shape) == {"data": 4, "table": 2}


def test_too_few_devices_and_uneven_shards_are_refused():
    with pytest.raises(ConfigError, match=r"--min_devices=16, but JAX sees 8"):
        make_layout(min_devices=16)
    with pytest.raises(ConfigError, match=r"--table_shards=3 does not divide the 8 devices"):
        make_layout(table_shards=3)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000])
def test_padding_is_the_same_on_every_power_of_two(rows):
    """Otherwise a checkpoint could not be read on another topology."""
    padded = {make_layout(table_shards=shards).padded_rows(rows) for shards in (1, 2, 4, 8)}
    assert padded == {-(-rows // 128) * 128}


def test_programs_are_compiled_at_the_second_level_unless_told_otherwise(monkeypatch):
    layout, given = worlds.one_device(), {"xla_backend_optimization_level": 2}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert layout.compiler_options == given
    one = jax.jit(lambda x: x + 1, compiler_options=layout.compiler_options)
    assert float(one(1.0)) == 2.0  # an option that this XLA does not know would be refused
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    assert layout.compiler_options == {}


def test_collectives_only_with_several_devices():
    one, many = worlds.one_device(), make_layout(table_shards=2)

    def total(layout):
        def local(x):
            return layout.sum_over_all(jnp.sum(layout.gather_over_all(x)))

        if layout.devices > 1:
            local = jax.shard_map(
                local,
                mesh=layout.mesh,
                in_specs=layout.batch_spec,
                out_specs=jax.sharding.PartitionSpec(),
                check_vma=False,
            )
        return jax.jit(local)

    x = jnp.arange(16.0)
    assert float(total(one)(x)) == np.arange(16.0).sum()
    assert float(total(many)(x)) == 8 * np.arange(16.0).sum()  # each device gathers all of it
    assert "all-gather" not in total(one).lower(x).compile().as_text()
    assert "all-gather" in total(many).lower(x).compile().as_text()
