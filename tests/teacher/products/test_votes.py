"""Votes against Jain's index by hand, as products keep them and as they lose them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, ShardError
from slgr_jax.reports import inspection
from slgr_jax.teacher.products import combine, preferences, votes

N_ITEMS = 30


def jain(*values):
    """(sum)^2 / (T sum of squares)."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def test_k_of_t_alike_are_k_over_t_and_all_alike_are_one():
    values = np.array([[1, 1, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0], [5, 0, 0, 0], [4, 2, 1, 0.5]])
    found = votes.share_of(values.sum(axis=1), (values**2).sum(axis=1), 4)
    np.testing.assert_allclose(found, [0.5, 1, 1, 0.25, jain(4, 2, 1, 0.5)], rtol=1e-6)


def test_of_answers_scales_and_counts_who_spoke():
    keys = np.array([3, 7, 9, 12])
    place, values = np.array([0, 0, 1, 1, 3]), np.array([-1.0, 3.0, 1.0, 3.0, 3.0])
    rows = votes.of_answers(keys, place, values, 5).to_pylist()
    # From -1 to 3: 0 and 1; 1/2 and 1; nobody; 1 alone.
    expected = {(0, 3): jain(0, 1), (1, 2): jain(0.5, 1), (2, 2): 1.0}
    assert {(row["user"], row["item"]): row["votes"] for row in rows} == pytest.approx(expected)
    assert votes.of_answers(keys, np.array([0, 1]), np.array([1.0, 2.0]), 5) is None


@pytest.fixture
def data(tmp_path):
    """A dataset with two teachers; user 0: items 3 and 4 by `a`, 4 and 5 by `b`; user 1: item 6."""
    dataset = worlds.random_dataset(tmp_path / "d", n_users=4, n_items=N_ITEMS, per_user=6)
    for name, rows in {
        "a": [(0, 3, 2.0), (0, 4, 1.0), (1, 6, 1.0)],
        "b": [(0, 4, 2.0), (0, 5, 1.0), (1, 6, 3.0)],
    }.items():
        users, items, scores = (np.array(column) for column in zip(*rows, strict=True))
        worlds.teach(dataset, users, items, scores, name=name, unlisted="below")
    return dataset


def _combined(dataset, **options):
    common = config.TeachConfig(data=str(dataset.path), name="both")
    combine.combine(dataset, common, config.CombineConfig(names="a,b", **options))
    keys, found = votes.load(dataset, "both")
    pairs = [(int(key) // N_ITEMS, int(key) % N_ITEMS) for key in keys]
    return dict(zip(pairs, found.tolist(), strict=True))


def test_a_combination_keeps_how_far_its_teachers_agree(data):
    found = _combined(data)  # of reciprocal ranks
    expected = {(0, 3): jain(1, 0), (0, 4): jain(0.5, 1), (0, 5): jain(0.5, 0), (1, 6): 1.0}
    assert found == pytest.approx(expected)
    assert inspection._teacher(data, "both").startswith("teacher both")


def test_only_what_is_in_the_product_has_votes(data):
    assert list(_combined(data, min_votes=2)) == [(0, 4), (1, 6)]


def test_one_answer_has_no_votes_and_appended_ones_end_them(data):
    with pytest.raises(ConfigError, match=r"teacher a does not hold .*combine.*or drop votes"):
        votes.load(data, "a")
    table = pa.table([[1], [2], [0.5]], names=["user", "item", "votes"]).cast(schema.TEACHER_VOTES)
    rows = pa.table([[1], [2], [0.5]], names=["user", "item", "score"]).cast(schema.TEACHER_SCORES)
    provenance = preferences.Provenance()
    preferences.write_product(data, "c", rows, provenance=provenance, votes=table)
    assert votes.load(data, "c")[1].tolist() == [0.5]
    more = pa.table([[2], [2], [0.5]], names=["user", "item", "score"]).cast(schema.TEACHER_SCORES)
    assert preferences.append(data, "c", more).votes == ()
    root = preferences.product_path(data.path, "c")
    assert sorted(path.name[:6] for path in root.glob("*.arrow")) == ["append", "part-0"]


def test_a_changed_byte_is_named(data):
    _combined(data)
    (path,) = preferences.product_path(data.path, "both").glob("votes-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=path.name):
        inspection._teacher(data, "both")
