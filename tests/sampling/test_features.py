"""Slots and what features come to, against plain loops over the values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import ModelConfig
from slgr_jax.data import features as features_lib
from slgr_jax.errors import ConfigError
from slgr_jax.sampling import features
from slgr_jax.sampling.context import Chosen, choose_features

NUMBERS = np.array([1.0, np.nan, 3.0, 5.0])
TAGS = [["b", "a", "b", "c"], [], ["c"], ["a", "c"]]  # of four users
CITY = [["x"], ["y"], [], ["x"]]


def _three() -> list[features_lib.Feature]:
    everybody = np.ones(4, bool)
    return [
        features_lib.numeric("age", "user", NUMBERS, everybody),
        worlds.feature("tags", "user", TAGS),
        worlds.feature("city", "user", CITY),
    ]


def _expected(table: np.ndarray, user: int, most: int) -> list[np.ndarray]:
    """[age, tags, city]: rows 0-1, 2-5 and 6-8 of the table, the last of each for missing."""
    z = (NUMBERS - 3) / np.sqrt(8 / 3)
    age = table[1] if np.isnan(z[user]) else z[user] * table[0]
    kept = list(dict.fromkeys(TAGS[user]))[:most]
    tags = np.mean([table[2 + "abc".index(tag)] for tag in kept] or [table[5]], axis=0)
    city = table[6 + "xy".index(CITY[user][0])] if CITY[user] else table[8]
    return [age, tags, city]


@pytest.mark.parametrize("most", [1, 2, 9])
def test_each_feature_is_its_closed_form(most: int) -> None:
    slots, sizes = features.make_slots(_three(), most)
    assert sizes == features.FeatureSizes(rows=9, features=3)
    assert Chosen(tuple(_three()), most).cut == {1: 3, 2: 1, 9: 0}[most]
    slots = jax.tree.map(jnp.asarray, slots)
    assert slots.widths == (1, min(most, 3), 1)
    table = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    ids = jnp.array([3, 0, 1, 2, 0])
    each = features.each(slots, ids, jnp.asarray(table)[slots.rows[ids]])
    total = features.total(slots, ids, jnp.asarray(table)[slots.rows[ids]])
    expected = np.array([_expected(table, user, most) for user in ids.tolist()])
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, expected.sum(axis=1), rtol=1e-5, atol=1e-6)
    whole = features.total_of_all(slots, jnp.asarray(table))
    np.testing.assert_allclose(whole[ids], total, rtol=1e-5, atol=1e-6)


def test_unused_slots_touch_no_row_of_another_value() -> None:
    slots, _ = features.make_slots(_three(), 9)
    assert slots is not None
    of_tags, used = slots.rows[:, 1:4] - 2, slots.weights[:, 1:4] > 0
    assert used.sum(axis=1).tolist() == [3, 1, 1, 2]  # the second's is missing
    assert of_tags.tolist() == [[1, 0, 2], [3, 3, 3], [2, 2, 2], [0, 2, 2]]


def test_features_are_chosen_by_name(tmp_path) -> None:
    shared = worlds.feature("city", "item", [["x"]] * 30)
    of_users = worlds.feature("city", "user", [["x"]] * 40)
    job = worlds.feature("job", "user", [["y"]] * 40)
    data = worlds.random_dataset(tmp_path / "d", categories=3, features=[of_users, job, shared])

    def chosen(names: str, backbone: str = "mf") -> list[tuple[str, str]]:
        model = ModelConfig(backbone=backbone, features=names)
        return [(f.side, f.name) for f in choose_features(model, data).features]

    city = [("user", "city"), ("item", "city")]
    assert chosen("none") == []
    assert chosen("all") == [*city[:1], ("user", "job"), *city[1:], ("item", "categories")]
    assert chosen("city") == city
    assert chosen("job, categories") == [("user", "job"), ("item", "categories")]
    assert chosen("job,categories", "dcn") == [("user", "job")]  # they are a field of it anyway
    with pytest.raises(ConfigError, match="has no feature 'jobs'; it has city, job, categories"):
        chosen("city,jobs")
    plain = worlds.random_dataset(tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no features; prepare it again with"):
        choose_features(ModelConfig(features="all"), plain)
