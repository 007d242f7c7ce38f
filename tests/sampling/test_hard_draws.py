"""--negatives=hard: from whose pool a negative comes, how often, on every path."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.sampling import arrays, batch
from slgr_jax.sampling.negatives import generators
from slgr_jax.training import build, loop, multi_seed, restore

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, POOL = 30, 24, 4
SMALL = {"dim": 4, "batch_size": 64, "epochs": 2, "patience": 0, "steps_per_dispatch": 4}
HARD = {"negatives": "hard", "hard_pool": POOL, "hard_share": 0.3}
KINDS = {
    "triples": {},
    "one by one": {"triples_per_user": 1},
    "several": {"negatives_per_positive": 3, "loss": "bce"},
    "windows": {"backbone": "sasrec", "loss": "bpr", "layers": 1, "hidden": 4, "max_history": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset and a run of matrix factorisation on it."""
    root = tmp_path_factory.mktemp("world")
    dataset = worlds.random_dataset(root / "d", n_users=USERS, n_items=ITEMS, per_user=8)
    with worlds.runs_on(1):
        loop.train(config.make_run(str(dataset.path), str(root / "run"), **SMALL, kernels="xla"))
    return dataset, root / "run"


def made(world, workdir, **knobs):
    dataset, reference = world
    every = {**SMALL, "kernels": "xla", "reference_runs": str(reference), **HARD, **knobs}
    run = config.make_run(str(dataset.path), str(workdir), **every)
    return run, build.build(run, dataset)


def highest(world):
    """[U, POOL] the items outside training that the run scores highest, from its tables."""
    dataset, reference = world
    values = jax.device_get(restore.restore_run(str(reference)).serving.values)
    scores = values["user"][:, :-1] @ values["item"][:, :-1].T + values["item"][:, -1]
    scores[dataset.train.users, dataset.train.items] = -np.inf
    return np.argsort(-scores, axis=1)[:, :POOL]


def drawn(experiment, steps=40):
    keys = jax.random.split(jax.random.key(0), steps)
    words_of = generators(keys)[0]
    plan = experiment.trainer.plan
    made = jax.jit(lambda a: batch.draw(words_of, a, plan))(experiment.arrays.interactions)
    return jax.device_get(made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_comes_from_the_users_own_pool_uniformly(world, tmp_path, kind):
    _, experiment = made(world, tmp_path, **KINDS[kind])
    got = drawn(experiment)
    negatives = got.items[..., 1:]
    users = np.broadcast_to(got.queries.users[..., None], negatives.shape).ravel()
    negatives, pools = negatives.ravel(), highest(world)
    dataset = world[0]
    assert not dataset.positives(("train",)).contains(users, negatives).any()
    hit = (pools[users] == negatives[:, None]).any(axis=1)
    # A uniform draw meets the pool too, 4 of the 24 - n_u items outside training.
    free = ITEMS - dataset.history[users]
    expected = 0.3 + 0.7 * (POOL / free)
    error = np.sqrt(np.sum(expected * (1 - expected))) / users.size
    assert abs(hit.mean() - expected.mean()) < 4 * error
    places = np.argmax(pools[users[hit]] == negatives[hit][:, None], axis=1)
    counts = np.bincount(places, minlength=POOL)
    assert np.all(np.abs(counts - hit.sum() / POOL) < 4 * np.sqrt(hit.sum() / POOL))


def test_a_share_of_one_draws_nothing_else_and_who_has_no_pool_draws_as_before(world, tmp_path):
    _, experiment = made(world, tmp_path, hard_share=1.0)
    got, pools = drawn(experiment, 4), highest(world)
    users, negative = got.queries.users.ravel(), got.items[..., 1].ravel()
    assert (pools[users] == negative[:, None]).any(axis=1).all()

    _, uniform = made(world, tmp_path, negatives="uniform", reference_runs="", hard_share=0.5)
    hard = experiment.arrays.interactions.hard
    offsets = np.asarray(hard.offsets) - np.minimum(np.arange(USERS + 1) * POOL, 2 * POOL)
    few = arrays.HardNegatives(np.maximum(offsets, 0).astype(np.int32), hard.items)
    interactions = dataclasses.replace(experiment.arrays.interactions, hard=few)
    changed = dataclasses.replace(
        experiment, arrays=dataclasses.replace(experiment.arrays, interactions=interactions)
    )
    ours, plain = drawn(changed, 4).items, drawn(uniform, 4).items
    first_two = got.queries.users < 2
    assert first_two.any()
    np.testing.assert_array_equal(ours[first_two], plain[first_two])
    assert (ours[~first_two] != plain[~first_two]).any()


def test_the_kernels_draw_the_same_to_the_bit(world, tmp_path):
    worlds.need_native_kernels()
    ours, theirs = (
        drawn(made(world, tmp_path / kernels, kernels=kernels)[1], 6)
        for kernels in ("native", "xla")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_training_is_the_same_together_and_on_four_devices(world, tmp_path):
    runs = [made(world, tmp_path / f"s{seed}", seed=seed)[0] for seed in (0, 1)]
    multi_seed.train_seeds(runs)
    alone = made(world, tmp_path / "alone", seed=1)[0]
    loop.train(alone)
    with worlds.runs_on(4):
        four = made(world, tmp_path / "four", seed=1, table_shards=2)[0]
        loop.train(four)
    want = restore.restore_run(alone.workdir).serving
    for other in (runs[1], four):
        got = restore.restore_run(other.workdir).serving
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


def test_what_draws_no_negative_of_its_own_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="name one that was trained without them"):
        made(world, tmp_path, reference_runs="")
    for knobs in ({"loss": "softmax"}, {"loss": "sampled_softmax"}):
        with pytest.raises(ConfigError, match=f"{knobs['loss']} draws none of its own"):
            made(world, tmp_path, **knobs)
    with pytest.raises(ConfigError, match="rating_threshold draws none"):
        made(world, tmp_path, loss="bce", rating_threshold=4.0)
    with pytest.raises(InputError, match="no user has an item outside training"):
        arrays.hard_negatives(worlds.Dataset.positives(world[0], ("train",)).empty(3))
    run = made(world, tmp_path)[0]
    config.check_used(run, ["negatives", "hard_share", "reference_runs"])
    plain = config.make_run(run.data, str(tmp_path), hard_share=0.2)
    with pytest.raises(ConfigError, match=r"hard_share=0\.2 is not used with --negatives=uniform"):
        config.check_used(plain, ["hard_share"])
