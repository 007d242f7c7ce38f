"""Labelled rows: moments against histories, negatives against plain sets, the paper's counts."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import worlds
from scipy import stats
from sklearn.metrics import roc_auc_score

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import InputError
from slgr_jax.sampling import context, labelled_rows

REAL = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "s3rec_amazon"
PARTS = ("train", "valid", "test")


def sequences(tmp_path: pathlib.Path, lines: str) -> Dataset:
    """Leave-last on S3-Rec lines."""
    (tmp_path / "Tiny.txt").write_text(lines)
    config = PrepareConfig(
        source="s3rec",
        input=str(tmp_path / "Tiny.txt"),
        split="leave_last",
        out=str(tmp_path / "out"),
    )
    prepare.prepare(config)
    return dataset.load(tmp_path / "out")


def cells(rows: labelled_rows.LabelledRows) -> list[tuple[float, ...]]:
    columns = (rows.users, rows.items, rows.as_of, rows.labels)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def everything_of(data: Dataset, user: int) -> set[int]:
    parts = [data.part(name) for name in PARTS]
    return {int(i) for part in parts for i in part.items[part.users == user]}


def test_rows_of_two_users_by_hand(tmp_path: pathlib.Path) -> None:
    # Items are numbered in the order of their ids: a b c d e f g -> 0 .. 6.
    data = sequences(tmp_path, "u f a c b g\nv b a e d\n")
    positives = {
        "train": [(0, 0, 1), (0, 2, 2), (1, 0, 1)],
        "valid": [(0, 1, 3), (1, 4, 2)],
        "test": [(0, 6, 4), (1, 3, 3)],
    }
    for part, expected in positives.items():
        rows = labelled_rows.sampled_rows(data, part, negatives=2, seed=1)
        found = cells(rows)
        assert len(rows) == 3 * len(expected)
        assert found[::3] == [(*row, 1.0) for row in expected]
        for k, (user, _, as_of) in enumerate(expected):
            for negative in found[3 * k + 1 : 3 * k + 3]:
                assert negative[0] == user
                assert negative[1] in ({3, 4} if user == 0 else {2, 5, 6})
                assert negative[2:] == (as_of, 0.0)
    assert rows.interactions is None  # nothing is known of an interaction here
    columns = [getattr(rows, f.name) for f in dataclasses.fields(rows) if f.name != "interactions"]
    dtypes = [np.asarray(column).dtype for column in columns]
    assert dtypes == [np.int32, np.int32, np.int32, np.float32]
    # The first events come with min_history=0, long histories alone with 3.
    first = labelled_rows.sampled_rows(data, "train", negatives=0, min_history=0, seed=1)
    assert cells(first)[::3] == [(0, 5, 0, 1.0), (1, 1, 0, 1.0)]
    long = labelled_rows.sampled_rows(data, "valid", negatives=0, min_history=3, seed=1)
    assert cells(long) == [(0, 1, 3, 1.0)]
    with pytest.raises(InputError, match="none of its 5 train interactions has 3 earlier ones"):
        labelled_rows.sampled_rows(data, "train", min_history=3, seed=1)


def test_a_row_does_not_see_its_target_or_what_follows(tmp_path: pathlib.Path) -> None:
    # Under leave-last, the event at `until` of the history is the row's own, in every part.
    rng = np.random.default_rng(0)
    lines = [
        f"u{u:02} " + " ".join(map(str, rng.permutation(60)[: rng.integers(3, 20)]))
        for u in range(40)
    ]
    data = sequences(tmp_path, "\n".join(lines))
    histories = context.make_context(data, {context.HISTORY}, most_categories=1).histories
    assert histories is not None
    item_ids = data.items["item_id"].to_pylist()
    written = {user: line.split()[1:] for user, line in enumerate(lines)}
    for part in PARTS:
        rows = labelled_rows.sampled_rows(data, part, min_history=0, seed=3)
        assert len(rows) == 2 * len(data.part(part))
        for user, item, as_of, label in cells(rows):
            start = histories.offsets[user]
            seen = [item_ids[i] for i in histories.items[start : start + as_of]]
            assert seen == written[user][:as_of]
            if label:
                assert written[user][as_of] == item_ids[item]
            else:
                assert item_ids[item] not in written[user]


def test_moments_where_users_have_several_evaluation_events(tmp_path: pathlib.Path) -> None:
    data = worlds.random_dataset(tmp_path / "data")
    trained = np.bincount(data.train.users, minlength=data.n_users)
    valid = np.bincount(data.valid.users, minlength=data.n_users)
    assert valid.max() > 1
    np.testing.assert_array_equal(data.moments("valid"), trained[data.valid.users])
    np.testing.assert_array_equal(data.moments("test"), (trained + valid)[data.test.users])
    seen = dict.fromkeys(range(data.n_users), 0)
    for user, as_of in zip(data.train.users, data.moments("train"), strict=True):
        assert as_of == seen[int(user)]
        seen[int(user)] += 1


def test_negatives_are_the_drawn_ranks_of_the_items_left(tmp_path: pathlib.Path) -> None:
    # The r-th item outside, by set difference, for the same words of the generator.
    data = worlds.random_dataset(tmp_path / "data")
    left = [sorted(set(range(data.n_items)) - everything_of(data, u)) for u in range(data.n_users)]
    for code, part in enumerate(PARTS):
        rows = labelled_rows.sampled_rows(data, part, negatives=3, min_history=0, seed=11)
        users = np.repeat(data.part(part).users, 3)
        ranks = np.random.default_rng([11, code]).integers(0, [len(left[u]) for u in users])
        expected = [left[u][r] for u, r in zip(users, ranks, strict=True)]
        np.testing.assert_array_equal(rows.items[rows.labels == 0], expected)
        np.testing.assert_array_equal(rows.items[rows.labels == 1], data.part(part).items)


def test_negatives_are_uniform(tmp_path: pathlib.Path) -> None:
    data = worlds.random_dataset(tmp_path / "data", n_users=3, n_items=25, per_user=10)
    rows = labelled_rows.sampled_rows(data, "train", negatives=5000, min_history=0, seed=0)
    for user in range(3):
        drawn = rows.items[(rows.users == user) & (rows.labels == 0)]
        outside = sorted(set(range(25)) - everything_of(data, user))
        counts = np.bincount(drawn, minlength=25)
        assert counts.sum() == counts[outside].sum()
        assert stats.chisquare(counts[outside]).pvalue > 1e-3


def test_rows_follow_from_the_seed_and_the_part(tmp_path: pathlib.Path) -> None:
    data = worlds.random_dataset(tmp_path / "data")
    a, b = (labelled_rows.sampled_rows(data, "test", seed=5) for _ in range(2))
    assert cells(a) == cells(b)
    c = labelled_rows.sampled_rows(data, "test", seed=6)
    np.testing.assert_array_equal(a.items[::2], c.items[::2])
    assert (a.items[1::2] != c.items[1::2]).mean() > 0.8
    # Valid and test have one shape here; a shared stream would give a user equal negatives.
    same = worlds.write_dataset(
        tmp_path / "same",
        *(np.array([[u, (3 * u + k) % 99] for u in range(200)]) for k in range(3)),
        n_users=200,
        n_items=99,
    )
    valid, test = (labelled_rows.sampled_rows(same, part, seed=5) for part in ("valid", "test"))
    assert (valid.items[1::2] == test.items[1::2]).mean() < 0.1


def test_a_user_with_every_item_has_no_rows(tmp_path: pathlib.Path) -> None:
    full = np.array([[0, i] for i in range(4)])
    more = np.array([[1, 0], [1, 1]])
    data = worlds.write_dataset(
        tmp_path / "data", np.concatenate([full, more]), more, more, n_users=2, n_items=4
    )
    rows = labelled_rows.sampled_rows(data, "train", min_history=0, seed=0)
    assert rows.users.tolist() == [1] * 4
    assert set(rows.items[1::2].tolist()) <= {2, 3}
    alone = worlds.write_dataset(tmp_path / "all", full, full, full, n_users=1, n_items=4)
    with pytest.raises(InputError, match=r"no train rows.* an item left"):
        labelled_rows.sampled_rows(alone, "train", min_history=0, seed=0)


def test_ratings_label_rows(tmp_path: pathlib.Path) -> None:
    base = worlds.random_dataset(tmp_path / "data")
    ratings = (np.arange(len(base.test)) % 5 + 1).astype(np.float32)
    data = dataclasses.replace(base, test=dataclasses.replace(base.test, ratings=ratings))
    rows = labelled_rows.rated_rows(data, "test", threshold=4)
    np.testing.assert_array_equal(rows.users, base.test.users)
    np.testing.assert_array_equal(rows.items, base.test.items)
    np.testing.assert_array_equal(rows.as_of, base.moments("test"))
    assert rows.labels.tolist() == [float(r >= 4) for r in ratings.tolist()]
    with pytest.raises(InputError, match="has no ratings to label rows by"):
        labelled_rows.rated_rows(data, "valid", threshold=4)
    n = len(base.test)
    with pytest.raises(InputError, match=rf"{n} of {n} test .* at least 1 \(ratings are 1 to 5\)"):
        labelled_rows.rated_rows(data, "test", threshold=1)
    with pytest.raises(InputError, match=rf": 0 of {n} test interactions are rated at least 5.5"):
        labelled_rows.rated_rows(data, "test", threshold=5.5)


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/s3rec_amazon is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "users", "train_rows", "cold_rows", "popularity_auc"),
    [
        ("Sports_and_Outdoors", 35_598, 379_086, 190_756, 0.625),
        ("Beauty", 22_363, 262_826, 119_854, 0.625),
        ("Toys_and_Games", 19_412, 218_722, 103_314, 0.583),
    ],
)
def test_the_rows_of_the_paper(
    tmp_path: pathlib.Path,
    name: str,
    users: int,
    train_rows: int,
    cold_rows: int,
    popularity_auc: float,
) -> None:
    out = str(tmp_path / "out")
    options = {"source": "s3rec", "input": str(REAL), "split": "leave_last"}
    prepare.prepare(PrepareConfig(name=name, out=out, **options))
    data = dataset.load(out)
    train = labelled_rows.sampled_rows(data, "train", seed=0)
    # Table 1 of S-LLMR: "reviews" and "cold-start interactions" (arXiv 2512.21526).
    assert len(train) == train_rows
    assert np.count_nonzero(train.as_of <= 3) == cold_rows
    assert int(train.labels.sum()) == train_rows // 2
    for part in ("valid", "test"):
        rows = labelled_rows.sampled_rows(data, part, seed=0)
        assert len(rows) == 2 * users
        assert rows.as_of.min() == (3 if part == "valid" else 4)
    # What popularity alone gives on the test rows, measured without this code.
    found = roc_auc_score(rows.labels, data.popularity[rows.items])
    assert found == pytest.approx(popularity_auc, abs=0.005)
