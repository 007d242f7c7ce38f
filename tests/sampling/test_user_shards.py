"""Arrays dealt out to shards of users, and what is drawn from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
import worlds

from slgr_jax.config import make_run
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError
from slgr_jax.mesh import UserShards, make_layout
from slgr_jax.sampling import arrays, labelled_preferences, user_shards
from slgr_jax.sampling.teacher_arrays import teacher_lists, teacher_pairs
from slgr_jax.training import build, shard_draws

PARTS = ("train", "valid", "test")


def _lists(users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, items, scores of the lists of these users, with ties; some have none."""
    rows = [np.random.default_rng(user) for user in users]
    counts = np.where(users % 4 == 3, 0, 6)
    items = [rng.permutation(30)[:n] for rng, n in zip(rows, counts, strict=True)]
    scores = [np.sort(rng.integers(0, 5, n)) for rng, n in zip(rows, counts, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    none = [np.zeros(0, int)]
    flat_items, flat_scores = np.concatenate(items + none), np.concatenate(scores + none)
    return offsets, flat_items.astype(np.int32), flat_scores.astype(np.float32)


def _sources(dataset, users: np.ndarray, *, below: bool, pairs: bool) -> tuple[Any, Any, Any]:
    """Interactions, teacher and labels (host arrays) of a world of these users."""
    cold, tail = np.arange(dataset.n_users) < 2, np.zeros(dataset.n_items)
    interactions = arrays.interactions(dataset, make_run("d", "w").sampler, cold, tail)
    targets = arrays.targets(dataset, window=0, history=True, min_history=1, threshold=0.0)
    pools = Csr.from_pairs(dataset.valid.users, dataset.valid.items, dataset.n_users)
    interactions = dataclasses.replace(
        interactions, targets=targets, hard=arrays.hard_negatives(pools)
    )
    offsets, items, scores = _lists(users)
    if pairs:
        owners = np.repeat(np.arange(users.size), np.diff(offsets))
        both = np.stack([items, (items + 1 + scores.astype(np.int32)) % 30], axis=1)
        teacher: Any = teacher_pairs(owners, both, 1.0 + scores)
    else:
        teacher = teacher_lists(
            offsets,
            items,
            scores,
            min_gap=1.0,
            unlisted_share=0.5,
            unlisted_below=below,
            positives=dataset.positives(("train",)),
            n_items=30,
        )
    chosen = labelled_preferences.chosen_items(dataset, "valid")
    return interactions, teacher, labelled_preferences.label_source(dataset, teacher, chosen)


def _world_of(dataset, path, users: np.ndarray):
    """The same world without other users, counted anew in the order of `users`."""
    parts, number = [], np.zeros(dataset.n_users, np.int32)
    number[users] = np.arange(users.size)
    for name in PARTS:
        part = dataset.part(name)
        keep = np.isin(part.users, users)
        parts.append(np.stack([number[part.users[keep]], part.items[keep]], axis=1))
    return worlds.write_dataset(path, *parts, n_users=users.size, n_items=30)


def _same(dealt: Any, expected: Any, shard: int, name: str) -> None:
    """A shard's array is that of the world of its users, and padding."""
    of_shard = dealt.block(shard, shard + 1)[0]
    padding = expected[-1] if name.endswith("offsets") else 0
    np.testing.assert_array_equal(of_shard[: len(expected)], expected, err_msg=name)
    assert (of_shard[len(expected) :] == padding).all(), name


def _leaves(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


@pytest.mark.parametrize("kind", ["below", "unknown", "pairs"])
def test_a_shard_has_the_arrays_of_a_world_of_its_users(tmp_path, kind):
    """7 shards of 40 users: some have a user more. What the device does not read is left out."""
    dataset = worlds.random_dataset(tmp_path / "d", n_users=40)
    knobs = {"below": kind == "below", "pairs": kind == "pairs"}
    shards = UserShards.deal(dataset.history, 7)
    interactions, teacher, labels = _sources(dataset, np.arange(40), **knobs)
    own = (
        user_shards.deal_interactions(interactions, shards),
        user_shards.deal_teacher(teacher, shards),
        user_shards.deal_labels(labels, teacher, shards),
    )
    for shard in (0, 6):
        users = shards.of_shard(shard)
        world = _world_of(dataset, tmp_path / f"d{shard}", users)
        alone = _leaves(_sources(world, users, **knobs))
        compared = 0
        for name, dealt in _leaves(own).items():
            if "share" in name or "facts" in name:
                continue  # of all users, or of items
            _same(dealt, alone[name], shard, name)
            compared += 1
        assert compared > (15 if kind == "pairs" else 20)


def test_entries_in_any_order_are_found_where_they_were_dealt():
    rng = np.random.default_rng(0)
    owners, values = rng.integers(0, 23, 300), rng.random(300)
    shards = UserShards.deal(np.bincount(owners, minlength=23), 4)
    shard, row = np.divmod(shards.row, shards.rows)
    by_user = user_shards.ByUser(owners, shards)
    local = by_user.local(np.arange(300), owners)
    dealt, bounds = by_user.entries(values).block(0, 4), by_user.bounds().block(0, 4)
    shard, row = shard[owners], row[owners]
    np.testing.assert_array_equal(dealt[shard, local], values)
    assert (bounds[shard, row] <= local).all()
    assert (local < bounds[shard, row + 1]).all()
    assert (np.bincount(shard) == by_user.counts).all()


def test_counts_weights_and_facts_are_those_of_all(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=5)
    shards = UserShards.deal(dataset.history, 8)  # more shards than users
    cold = np.arange(5) % 2
    made = arrays.interactions(
        dataset, make_run("d", "w", negatives="popularity").sampler, cold, np.zeros(30)
    )
    own = user_shards.deal_interactions(made, shards)
    of_user = np.bincount(dataset.positives(("train",)).owners(), minlength=5)
    shard_of, rows = np.divmod(shards.row, shards.rows)
    assert (rows == 0).all()
    expected = np.zeros(8, int)
    expected[shard_of] = of_user
    np.testing.assert_array_equal(own.share.count.block(0, 8), expected)
    np.testing.assert_allclose(own.share.weight.block(0, 8), 8 * expected / of_user.sum())
    for user, shard in enumerate(shard_of.tolist()):
        np.testing.assert_array_equal(own.facts.cold.block(shard, shard + 1)[0], [cold[user], 0])
        row = own.negatives.shifts.block(shard, shard + 1)[0][: of_user[user]]
        begin = of_user[:user].sum()
        np.testing.assert_array_equal(row, made.negatives.shifts[begin : begin + of_user[user]])
    assert own.cumulative is made.cumulative
    with pytest.raises(InputError, match=r"--user_shards=8: 3 of them have nothing to draw"):
        user_shards.refuse_empty_shards(own, shards)


def test_shards_have_as_many_users_and_about_as_many_interactions():
    """Heavy tails, sorted: dealt one after the other, the first shard would have the most."""
    rng = np.random.default_rng(0)
    counts = np.sort(rng.lognormal(3.0, 1.0, 2000)).astype(int)[::-1]
    shards = UserShards.deal(counts, 16)
    load = np.array([counts[shards.of_shard(shard)].sum() for shard in range(16)])
    assert {shards.of_shard(shard).size for shard in range(16)} == {125}
    assert load.max() / load.mean() < 1.05
    assert sorted(shards.by_row[shards.by_row < 2000].tolist()) == list(range(2000))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("n_users", [6, 23])
def test_weighted_draws_are_uniform_over_pairs_and_preferences(tmp_path, n_users, devices):
    """Each pair of each user, and each negative, as often as the other, by weight; U < V too."""
    dataset = worlds.random_dataset(tmp_path / "d", n_users=n_users, per_user=6)
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(n_users), rng.integers(0, 9, n_users) * 2)
    items = np.concatenate([rng.permutation(30)[:n] for n in np.bincount(users, minlength=n_users)])
    worlds.teach(
        dataset,
        users.astype(np.int32),
        items.astype(np.int32),
        rng.permutation(users.size).astype(np.float32),
    )
    run = make_run(
        str(dataset.path), str(tmp_path / "w"), batch_size=64, user_shards=8, triples_per_user=1,
        guidance="pairwise", teacher="t", gate="constant", unlisted_share=0.0,
    )  # fmt: skip
    made = build.build(run, dataset, make_layout(devices=jax.devices()[:devices]))
    trainer = made.trainer
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2000))
    draw = jax.jit(
        lambda keys, arrays: shard_draws.draw_own(
            trainer.layout, trainer.plan, trainer.guidance, keys, arrays
        )
    )
    batch, guided = jax.device_get(draw(keys, made.arrays))

    shards = trainer.layout.users
    whose_row = np.minimum(shards.by_row, n_users - 1)  # nobody's lanes weigh nothing
    by_device = whose_row.reshape(devices, -1)

    def whose(users: np.ndarray) -> np.ndarray:
        """Of lanes, who know users by their row on the device."""
        return by_device[np.repeat(np.arange(devices), 64 // devices), users]

    batch = batch.replace(queries=batch.queries.replace(users=whose(batch.queries.users)))
    pairs = dataset.positives(("train",))
    drawn = batch.queries.users.astype(np.int64) * 30 + batch.items[..., 0]
    real = batch.weights > 0
    _uniform(drawn, batch.weights, pairs.keys(30), shards)
    negatives = batch.items[..., 1][real]
    assert not pairs.contains(batch.queries.users[real], negatives).any()
    one = batch.queries.users[real] == pairs.owners()[0]
    outside = np.setdiff1d(np.arange(30), pairs.row(pairs.owners()[0]))
    assert scipy.stats.chisquare(np.bincount(negatives[one], minlength=30)[outside]).pvalue > 1e-4
    assert batch.weights.sum(axis=1) == pytest.approx(64, rel=1e-5)

    preferences = guided.pairs
    assert preferences.weights.sum(axis=1) == pytest.approx(64, rel=1e-5)
    real = preferences.weights > 0
    assert (preferences.margins[real] > 0).all()
    starts = whose(preferences.queries.users)
    expected = np.bincount(users, minlength=n_users) * 64 * 2000 / users.size
    seen = np.bincount(starts.ravel(), preferences.weights.ravel(), minlength=n_users)[:n_users]
    np.testing.assert_allclose(seen, expected, rtol=0.06)


def _uniform(drawn: np.ndarray, weights: np.ndarray, keys: np.ndarray, shards: UserShards) -> None:
    """Weights of all keys are alike: by chi-square within a shard, whose lanes weigh the same."""
    index = np.searchsorted(keys, np.where(weights > 0, drawn, keys[0]))
    assert (keys[index] == drawn)[weights > 0].all()
    count = np.bincount(index[weights > 0], minlength=keys.size)
    weight = np.bincount(index.ravel(), weights.ravel(), minlength=keys.size)
    shard = shards.row[keys // 30] // shards.rows
    for number in np.unique(shard):
        assert scipy.stats.chisquare(count[shard == number]).pvalue > 1e-4
        mean = weight[shard == number].sum() / (shard == number).sum()
        assert mean == pytest.approx(weights.sum() / keys.size, rel=1e-5)
