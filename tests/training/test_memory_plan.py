"""What a run is said to take of memory against the arrays it makes and the program it compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import GuidanceConfig, ModelConfig, OptimizerConfig, SamplerConfig, TrainConfig
from slgr_jax.data import own_users
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import make_layout
from slgr_jax.training import build, checkpoint, memory_plan, state, step

USERS, ITEMS = 3000, 1000
SECTIONS = {
    "model": ModelConfig(dim=16),
    "optimizer": OptimizerConfig(table_optimizer="lazy_adam"),
    "sampler": SamplerConfig(batch_size=256),
    "train": TrainConfig(kernels="xla"),
    "guidance": GuidanceConfig(guidance="pairwise", teacher="t"),
}


def _guided(folder):
    """A data set of some size, and a run guided by lists of three items of every user."""
    dataset = worlds.random_dataset(folder / "d", n_users=USERS, n_items=ITEMS, per_user=10)
    return dataset, _guided_on(dataset, folder)


def _guided_on(dataset, folder):
    listed = np.arange(3 * USERS) % dataset.n_items
    scores = np.random.default_rng(0).random(3 * USERS)
    worlds.teach(dataset, np.repeat(np.arange(USERS), 3), listed, scores, unlisted="below")
    return worlds.run_config(dataset, folder / "run", **SECTIONS)


def _by_user(folder):
    """Users are numbered by the run's shards."""
    dataset = worlds.dataset_by_shard(folder, 16, n_users=USERS, n_items=ITEMS)
    run = _guided_on(dataset, folder)
    optimizer = OptimizerConfig(table_optimizer="adagrad")
    train = dataclasses.replace(run.train, user_shards=16)
    return dataset, dataclasses.replace(run, train=train, optimizer=optimizer)


def _histories_by_user(folder):
    """A click model: rows and histories of users."""
    dataset, run = _by_user(folder)
    model = ModelConfig(backbone="deepfm", dim=16, max_history=4, mlp=(8,))
    return dataset, dataclasses.replace(run, model=model)


def _plain(folder):
    dataset = worlds.random_dataset(folder / "d")
    alone = SECTIONS | {"guidance": GuidanceConfig()}
    return dataset, worlds.run_config(dataset, folder / "run", **alone)


def _on_first_device(tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


@pytest.mark.parametrize(
    ("world", "mesh"),
    [(_plain, (2, 1)), (_guided, (8, 4)), (_by_user, (8, 2)), (_histories_by_user, (8, 2))],
)
def test_parts_are_those_of_a_run_within_a_tenth(tmp_path, world, mesh):
    dataset, run = world(tmp_path)
    (plan,) = memory_plan.make_plans(run, dataset, [mesh])
    layout = make_layout(table_shards=mesh[1], devices=jax.devices()[: mesh[0]])
    experiment = build.build(run, dataset, layout)
    begun, arrays = state.init_state(experiment.trainer, 0), experiment.arrays
    serving = state.make_serving_state(experiment.trainer)(begun, arrays.context)
    real = {
        "tables": begun.tables,
        "dense": (begun.params, begun.opt_state, begun.step),
        "interactions": arrays.interactions,
        "looked_up": arrays.context,
        "teacher": arrays.guidance,
    }
    for part, tree in real.items():
        assert getattr(plan, part) == pytest.approx(_on_first_device(tree), rel=0.1), part
    wanted = state.abstract_serving(experiment.trainer)
    restored = jax.device_put(serving, jax.tree.map(lambda leaf: leaf.sharding, wanted))
    assert plan.serving == pytest.approx(_on_first_device((serving, restored)), rel=0.1)
    saved = checkpoint.array_shapes({"state": begun, "best": serving})
    assert plan.checkpoint == pytest.approx(sum(array.bytes for array in saved), rel=0.1)

    if run.train.user_shards:  # one of eight processes has two of the sixteen shards
        users = experiment.trainer.layout.users
        own = own_users.load(dataset.path, lambda history, bounds: users.row < 2 * users.rows)
        held = memory_plan.of_dataset(own) + _on_first_device((arrays, begun, serving))
        assert plan.host_each == pytest.approx(held, rel=0.1)
        assert memory_plan.of_dataset(own) < 0.6 * memory_plan.of_dataset(dataset)

    # What XLA says of the program that the run itself compiles.
    key, count = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = step.make_run_steps(experiment.trainer).lower(begun, arrays, key, count)
    memory = lowered.compile().memory_analysis()
    assert plan.arguments == pytest.approx(memory.argument_size_in_bytes, rel=0.1)
    assert plan.draws + plan.step == pytest.approx(memory.temp_size_in_bytes, rel=0.1)

    if world is _plain:  # a user, two items and a weight of each triple of the steps at once
        assert plan.draws == step.DRAWN_AT_ONCE // 256 * 256 * 4 * 4 // 2
        assert plan.teacher == 0
    assert plan.device == plan.arguments + plan.serving + plan.draws + plan.step
    (row,) = memory_plan.as_rows([plan])
    assert row["tables"] == str(round(plan.tables / 1e6, 1))


def test_sizes_that_cannot_be_split_are_refused(tmp_path):
    dataset, run = _plain(tmp_path)
    odd = dataclasses.replace(run, sampler=SamplerConfig(batch_size=9))
    with pytest.raises(ConfigError, match="--batch_size=9 is not a multiple of the 8 devices"):
        memory_plan.make_plans(odd, dataset, [(8, 1)])
    with pytest.raises(ConfigError, match="9 devices are planned for"):
        memory_plan.make_plans(run, dataset, [(9, 1)])
