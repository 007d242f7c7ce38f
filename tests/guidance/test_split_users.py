"""What each guidance draws where users are split over the devices: of their own users alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import worlds

from slgr_jax.config import make_run
from slgr_jax.config.guidance import GUIDANCE_BY_USER, LIST_GUIDANCES
from slgr_jax.guidance.unkd import popularity_groups
from slgr_jax.mesh import make_layout
from slgr_jax.sampling.context import Queries
from slgr_jax.training import build, shard_draws

USERS, ITEMS, STEPS, SHARDS = 23, 30, 120, 8
KNOBS: dict[str, dict[str, Any]] = {
    "list_kl": {"list_kl_sample_weights": True, "list_kl_places": 5, "list_kl_samples": 4},
    "rd": {"rd_places": 4},
    "rrd": {"rrd_interesting": 3, "rrd_uninteresting": 3},
    "unkd": {"unkd_groups": 3},
    "interactions": {"interactions_places": 0},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """Lists of 0 to 9 items, of which few are the user's own, with scores that differ."""
    world = worlds.random_dataset(
        tmp_path_factory.mktemp("data") / "d", n_users=USERS, n_items=ITEMS, per_user=6
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 10, USERS)
    users = np.repeat(np.arange(USERS), lengths).astype(np.int32)
    items = np.concatenate([rng.permutation(ITEMS)[:n] for n in lengths]).astype(np.int32)
    scores = rng.permutation(users.size).astype(np.float32) / users.size
    worlds.teach(world, users, items, scores, unlisted="below")
    return world


@pytest.fixture(scope="module")
def drawn_of(dataset):
    """(guidance, devices) -> the trainer, and what its guidance draws for `STEPS` steps."""
    return functools.cache(functools.partial(_drawn, dataset))


def _drawn(dataset, guidance: str, devices: int) -> tuple[Any, Any]:
    run = make_run(
        str(dataset.path), "w", batch_size=64, user_shards=SHARDS, guidance=guidance, teacher="t",
        gate="constant", lists_per_step=16, preferences_per_step=64, triples_per_user=1,
        **KNOBS.get(guidance, {}),
    )  # fmt: skip
    made = build.build(run, dataset, make_layout(devices=jax.devices()[:devices]))
    trainer = made.trainer
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), STEPS))
    draw = jax.jit(
        lambda keys, arrays: shard_draws.draw_own(
            trainer.layout, trainer.plan, trainer.guidance, keys, arrays
        )[1]
    )
    return trainer, jax.device_get(draw(keys, made.arrays))


@pytest.fixture(scope="module")
def lists(dataset) -> list[np.ndarray]:
    """Each user's listed items, the best first."""
    from slgr_jax.teacher.products import preferences

    teacher = preferences.load(dataset, "t")
    bounds = zip(teacher.offsets[:-1], teacher.offsets[1:], strict=True)
    return [teacher.items[begin:end][::-1] for begin, end in bounds]


@pytest.mark.parametrize("guidance", GUIDANCE_BY_USER)
def test_a_shard_draws_of_the_lists_of_its_users(dataset, lists, drawn_of, guidance):
    trainer, drawn = drawn_of(guidance, 1)
    assert trainer.layout.users is not None
    whose = np.minimum(trainer.layout.users.by_row.ravel(), USERS - 1)  # nobody's weigh nothing
    pairs, positives = drawn.pairs, dataset.positives(("train",))
    weights = pairs.weights
    per_step = weights.reshape(STEPS, -1).sum(axis=1)
    np.testing.assert_allclose(per_step, weights[0].size, rtol=1e-5)
    real, users = weights > 0, whose[pairs.queries.users]
    owner, preferred, other = users[real], pairs.items[..., 0][real], pairs.items[..., 1][real]

    def listed(user: int, item: int) -> bool:
        return item in lists[user]

    both = [(listed(u, a), listed(u, b)) for u, a, b in zip(owner, preferred, other, strict=True)]
    expected = [np.size(items) for items in lists]  # of entries; lists are drawn one as another
    if guidance == "unkd":
        assert all(a and b for a, b in both)
        groups = popularity_groups(dataset.popularity, 3)
        assert (groups[preferred] == groups[other]).all()
        by_group = [np.bincount(groups[items], minlength=3) for items in lists]
        expected = [int((counts >= 2).sum()) for counts in by_group]
    else:
        assert all(a and not b for a, b in both)
        assert not positives.contains(owner, other).any()
    if guidance == "interactions":
        assert not positives.contains(owner, preferred).any()
        expected = [np.setdiff1d(items, positives.row(u)).size for u, items in enumerate(lists)]
    if guidance in LIST_GUIDANCES:
        expected = [int(np.size(items) > 0) for items in lists]
    seen = np.bincount(users.ravel(), weights.ravel(), minlength=USERS)
    share = np.array(expected) / sum(expected)
    # Of lanes, at most 4 to a draw of a user and as many as a list has places.
    np.testing.assert_allclose(seen / seen.sum(), share, atol=0.02)


@pytest.mark.parametrize("guidance", LIST_GUIDANCES)
def test_places_of_a_list_are_those_of_its_user(dataset, lists, drawn_of, guidance):
    trainer, drawn = drawn_of(guidance, 1)
    assert trainer.layout.users is not None
    whose = np.minimum(trainer.layout.users.by_row.ravel(), USERS - 1)
    users, places = whose[drawn.queries.users[0]], drawn.listed.shape[-1]
    unlisted = drawn.items[0, :, places : places + trainer.guidance.uninteresting]
    assert drawn.pairs.weights.shape == drawn.listed.shape
    for lane, user in enumerate(users):
        if not drawn.pairs.weights[0, lane, 0]:
            continue
        items = drawn.items[0, lane, :places][drawn.listed[0, lane]]
        if guidance == "rrd":  # any places, in their order
            place = [lists[user].tolist().index(item) for item in items]
            assert place == sorted(set(place))
        else:
            np.testing.assert_array_equal(items, lists[user][:places])
        own = np.union1d(lists[user], dataset.positives(("train",)).row(user))
        assert drawn.unlisted[0, lane] == ITEMS - own.size
        assert not np.isin(unlisted[lane], own).any()
    if guidance == "list_kl":
        interaction, ranks = drawn.items[0, :, -1], drawn.teacher_ranks[0]
        for lane, user in enumerate(users):
            if not drawn.pairs.weights[0, lane, 0]:
                continue
            assert interaction[lane] in dataset.positives(("train",)).row(user)
            place = np.flatnonzero(lists[user] == interaction[lane])
            rank = place[0] + 1 if place.size else lists[user].size + 1
            assert ranks[lane] == rank


def _among_all(drawn: Any, trainer: Any) -> Any:
    """A draw whose users are known by their rows among all, not among those of a device."""
    layout = trainer.layout

    def named(x: Any) -> Any:
        if not isinstance(x, Queries):
            return x
        lanes = x.users.shape[1]
        device = np.arange(lanes) * layout.devices // lanes
        begins = device * (layout.users.table_rows // layout.devices)
        along = (1, lanes, *[1] * (x.users.ndim - 2))
        return dataclasses.replace(x, users=x.users + begins.reshape(along))

    return jax.tree.map(named, drawn, is_leaf=lambda x: isinstance(x, Queries))


@pytest.mark.parametrize("guidance", ["pointwise", "dcd", "unkd", "list_kl"])
def test_draws_do_not_depend_on_the_devices(drawn_of, guidance):
    alone, four = (drawn_of(guidance, devices) for devices in (1, 4))
    jax.tree.map(np.testing.assert_array_equal, alone[1], _among_all(four[1], four[0]))
