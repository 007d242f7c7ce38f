"""Lists from lists of items beside an item: against a dense recomputation; files that are wrong."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from slgr_jax.config import ImportConfig, NearestConfig, SimilarConfig, TeachConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import InputError
from slgr_jax.teacher.local import similar
from slgr_jax.teacher.products import preferences


@pytest.mark.parametrize("at_once", [3, 4096])
def test_lists_are_those_of_a_dense_sum(monkeypatch, at_once):
    monkeypatch.setattr(similar, "_USERS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((20, 20)) < 0.2, rng.normal(size=(20, 20)), 0).astype(np.float32)
    np.fill_diagonal(weights, 0)
    own = np.unique(np.stack([rng.integers(0, 11, 50), rng.integers(0, 20, 50)]), axis=1)
    seen = Csr.from_pairs(own[0], own[1], 11)
    found = similar.lists(seen, scipy.sparse.csr_matrix(weights), 4)
    expected = []
    for u in range(11):
        row = list(seen.row(u))
        if not row:
            continue
        scores = weights[row].sum(axis=0) / len(row)
        named = np.flatnonzero((weights[row] != 0).any(axis=0))
        left = [i for i in named if i not in row]
        expected += [(u, i, scores[i]) for i in sorted(left, key=lambda i: (-scores[i], i))[:4]]
    assert [*zip(found[0].tolist(), found[1].tolist(), strict=True)] == [
        (u, i) for u, i, _ in expected
    ]
    np.testing.assert_allclose(found[2], [s for _, _, s in expected], rtol=1e-5, atol=1e-7)


USER, LIST = ("007", "u,5"), ("01", "1", " x", "café", "10", "电影")


@pytest.fixture
def dataset(make_dataset):
    """The user 007 has 01 and 1, the user u,5 has x."""
    return make_dataset(users=USER, items=LIST, train={0: [0, 1], 1: [2]}, valid={}, test={})


def _made(dataset, path, **reading):
    common = TeachConfig(data=str(dataset.path), name="t", overwrite=True, model="m")
    options = SimilarConfig(similar=str(path))
    similar.write(dataset, common, options, ImportConfig(**reading), NearestConfig(listed=2))
    teacher = preferences.load(dataset, "t")
    users = np.repeat(np.arange(dataset.n_users), np.diff(teacher.offsets))
    rows = zip(users.tolist(), teacher.items.tolist(), teacher.scores.tolist(), strict=True)
    return {(user, item): pytest.approx(score, rel=1e-6) for user, item, score in rows}


def _file(folder, header, *rows):
    path = folder / "i2i.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_scores_ranks_and_neither(dataset, tmp_path):
    rows = ("01,10,.9", "01,1,5", "1,10,.1", "1,café,.4", " x,01,-.5")
    scored = _file(tmp_path, "item,other,score", *rows)
    assert _made(dataset, scored) == {(0, 4): 0.5, (0, 3): 0.2, (1, 0): -0.5}
    ranked = _file(tmp_path, "item,other,rank", "01,10,1", "01,café,2", "1,café,1", " x,01,4")
    assert _made(dataset, ranked) == {(0, 4): 0.5, (0, 3): 0.75, (1, 0): 0.25}
    bare = _file(tmp_path, "item,other", "01,10", "1,10", "1,café", "01,电影", " x,01")
    assert _made(dataset, bare) == {(0, 4): 1.0, (0, 3): 0.5, (1, 0): 1.0}
    manifest = preferences.load(dataset, "t").manifest
    assert (manifest.unlisted, manifest.training_items, manifest.model) == ("below", "none", "m")


def test_numbers_of_ids_and_columns_of_any_order(dataset, tmp_path):
    path = tmp_path / "i2i.parquet"
    pq.write_table(pa.table({"rank": [1, 3], "other": ["10", "café"], "item": [1, 1]}), path)
    assert _made(dataset, path) == {(0, 4): 0.5, (0, 3): pytest.approx(1 / 6)}


def test_unknown_ids_are_refused_or_counted(dataset, tmp_path):
    path = _file(tmp_path, "item,other,score", "1,10,.5", "1,none,.5")
    with pytest.raises(
        InputError, match=r"1 of 2 rows name no item of .*, row 2 'none'; add --unk"
    ):
        _made(dataset, path)
    assert _made(dataset, path, unknown="drop") == {(0, 4): 0.25}
    assert preferences.load(dataset, "t").manifest.counts["dropped_unknown"] == 1
    path = _file(tmp_path, "item,other,score", "none,10,.5")
    with pytest.raises(InputError, match="1 of 1 rows name no item"):
        _made(dataset, path, unknown="drop")


@pytest.mark.parametrize(
    ("header", "rows", "why"),
    [
        ("item,score", ["1,2"], "has columns item, score; expected item, other"),
        ("item,other,score", [], "has no row"),
        ("item,other,score", ["1,10,.5", "1,café,"], "row 2 of 1 such rows has no finite score"),
        ("item,other,score", ["1,10,x"], "a score is no number"),
        ("item,other,rank", ["1,10,0"], "row 1 of 1 such rows has a rank below 1"),
        ("item,other", ["1,10", "1,1"], "row 2 of 1 such rows names an item beside itself"),
        ("item,other", ["1,10", "1,café", "1,10"], "row 3 of 1 such rows repeats a pair"),
        ("item,other", ["10,1"], "none of its 1 pairs begins with a training item"),
        ("item,other", ["1,01"], "leads to another item"),
    ],
)
def test_a_file_that_is_wrong_is_named(dataset, tmp_path, header, rows, why):
    with pytest.raises(InputError, match=why):
        _made(dataset, _file(tmp_path, header, *rows))
    assert not (dataset.path / "teacher" / "t").exists()
