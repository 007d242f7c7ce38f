"""Lists by vectors: against a dense recomputation, then as a product that training can read."""

from __future__ import annotations

import numpy as np
import pytest

from slgr_jax.config import EmbedConfig, NearestConfig, TeachConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.local import embeddings, nearest
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import preferences


def _vectors(rng, rows, width, missing=()):
    values = rng.normal(size=(rows, width)).astype(np.float32)
    has = np.ones(rows, bool)
    has[list(missing)] = False
    values[~has] = 0
    return Vectors(values, has)


@pytest.mark.parametrize("scored_bytes", [1, 1 << 28])
def test_lists_are_those_of_a_dense_sort(monkeypatch, scored_bytes):
    monkeypatch.setattr(nearest, "_SCORED_BYTES", scored_bytes)
    rng = np.random.default_rng(0)
    items = _vectors(rng, 30, 6, missing=(4, 9))
    users = _vectors(rng, 11, 6, missing=(3,))
    owner, seen_item = rng.integers(0, 11, 60), rng.integers(0, 30, 60)
    seen = Csr.from_pairs(owner, seen_item, 11)
    found = nearest.nearest(items, users, seen, 7)
    expected = []
    for u in range(11):
        if u == 3:
            continue
        lengths = np.linalg.norm(users.values[u]) * np.linalg.norm(items.values, axis=1)
        with np.errstate(invalid="ignore"):
            cosine = items.values @ users.values[u] / lengths
        left = [i for i in range(30) if i not in (4, 9) and i not in seen.row(u)]
        best = sorted(left, key=lambda i: -cosine[i])[:7]
        expected += [(u, i, cosine[i]) for i in best]
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == [
        (u, i) for u, i, _ in expected
    ]
    np.testing.assert_allclose(found[2], [c for _, _, c in expected], rtol=1e-5, atol=1e-6)


def test_a_user_with_little_left_lists_what_there_is():
    items = Vectors(np.eye(3, dtype=np.float32), np.ones(3, bool))
    users = Vectors(np.array([[1, 2, 3], [1, 0, 0]], np.float32), np.ones(2, bool))
    seen = Csr.from_pairs(np.array([0, 0, 1, 1, 1]), np.array([0, 2, 0, 1, 2]), 2)
    found = nearest.nearest(items, users, seen, 10)
    assert [part.tolist() for part in found[:2]] == [[0], [1]]
    np.testing.assert_allclose(found[2], 2 / np.sqrt(14), rtol=1e-6)


def test_ties_are_listed_by_item():
    """Three kinds of items, in an order that no partition leaves alone."""
    kind = np.random.default_rng(0).integers(0, 3, 300)
    items = Vectors(np.eye(3, dtype=np.float32)[kind], np.ones(300, bool))
    users = Vectors(np.array([[3.0, 2.0, 1.0]], np.float32), np.ones(1, bool))
    none = Csr.from_pairs(np.zeros(0, int), np.zeros(0, int), 1)
    found = nearest.nearest(items, users, none, 300)[1]
    assert found.tolist() == np.lexsort((np.arange(300), kind)).tolist()


def test_product_of_embeddings(make_dataset, tmp_path):
    dataset = make_dataset(
        users=["u", "v"],
        items=list("abcd"),
        titles=list("abcd"),
        train={0: [0], 1: [3]},
        valid={0: [1]},
        test={1: [0]},
    )
    path = tmp_path / "vectors.npz"
    ids = list("abcd")
    values = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
    np.savez(path, ids=np.array(ids), emb=values)
    common = TeachConfig(data=str(dataset.path), name="v", model="mine")
    embeddings.embed(dataset, common, EmbedConfig(vectors=str(path)))
    # User 0 has a. Around the mean of all directions c is less opposite to a than d is: cosines
    # -.9945 and -.9999; as they are 0 and .11. A training item is never listed.
    for centre, expected in ((True, {0: {1, 2}, 1: {2, 1}}), (False, {0: {1, 3}, 1: {2, 1}})):
        made = TeachConfig(data=str(dataset.path), name=f"near{centre}")
        options = NearestConfig(listed=2, embeddings="v", centre=centre)
        manifest = nearest.write(dataset, made, options)
        said = (manifest.model, manifest.unlisted, manifest.training_items)
        assert said == ("mine", "below", "none")
        assert manifest.counts["rows"] == 4
        assert ("centred" in manifest.score_kind) == centre
        teacher = preferences.load(dataset, f"near{centre}")
        listed = {
            u: set(teacher.items[teacher.offsets[u] : teacher.offsets[u + 1]].tolist())
            for u in range(dataset.n_users)
        }
        assert listed == expected


@pytest.mark.parametrize("users_from", ["history", "text"])
def test_a_mean_that_all_vectors_share_is_taken_away(users_from):
    """With it every cosine is near 1; vectors without it are those of a dense recomputation."""
    rng = np.random.default_rng(0)
    shared = 20 * rng.normal(size=6)
    items = _vectors(rng, 40, 6, missing=(4,))
    items = Vectors(np.where(items.has[:, None], items.values + shared, 0), items.has)
    seen = Csr.from_pairs(np.repeat(np.arange(9), 4), rng.permutation(40)[:36], 10)
    users = embeddings.mean_of_history(seen, items)
    if users_from == "text":
        users = _vectors(rng, 10, 6, missing=(9,))
        users = Vectors(np.where(users.has[:, None], users.values + shared, 0), users.has)
    centred = nearest.centred(items, users, seen, users_from=users_from)

    def directions(vectors):
        lengths = np.linalg.norm(vectors.values[vectors.has], axis=1, keepdims=True)
        unit = vectors.values[vectors.has] / lengths
        return unit - unit.mean(axis=0)

    np.testing.assert_allclose(
        centred[0].values[items.has], directions(items), rtol=1e-4, atol=1e-6
    )
    assert centred[0].has.tolist() == items.has.tolist()
    assert centred[1].has.tolist() == users.has.tolist()
    if users_from == "text":
        expected = directions(users)
    else:
        sums = seen.matrix(40).toarray() @ centred[0].values
        expected = (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9))[:9]
    np.testing.assert_allclose(centred[1].values[users.has], expected, rtol=1e-3, atol=1e-6)

    before, after = (
        nearest.nearest(*vectors, Csr.empty(10), 40)[2] for vectors in ((items, users), centred)
    )
    assert before.min() > 0.95
    assert np.abs(after).mean() < 0.6


def test_errors_name_what_is_missing(make_dataset):
    dataset = make_dataset(users=["u", "v"], items=["a", "b"], train={0: [0]}, valid={}, test={})
    common = TeachConfig(data=str(dataset.path), name="near")
    with pytest.raises(ConfigError, match="--nocentre is for --embeddings=NAME"):
        nearest.write(dataset, common, NearestConfig(centre=False))
    with pytest.raises(ManifestError, match="has no embeddings 'nope'"):
        nearest.write(dataset, common, NearestConfig(embeddings="nope"))
    nothing = Vectors(np.zeros((2, 3), np.float32), np.zeros(2, bool))
    told = {"users_from": "history", "built_from": "train_only", "model": "m", "prompt_hash": ""}
    embeddings.write(dataset, "none", nothing, nothing, **told, dtype="float32", counts={})
    with pytest.raises(InputError, match="no user has an item to list: 0 of 2 users and 0 of 2"):
        nearest.write(dataset, common, NearestConfig(embeddings="none"))
