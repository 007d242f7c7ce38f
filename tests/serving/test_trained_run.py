"""A trained run against its own tables, computed by hand, and against its evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import worlds

from slgr_jax import serving
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.evaluation import ranking_metrics
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.teacher.products import preferences
from slgr_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")

N_USERS, N_ITEMS = 24, 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "d"
    made = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, timed=True, categories=3)
    (path / "scores.csv").write_text(
        "user,item,score\n"
        + "".join(f"u{u},i{i},{(u * i) % 7}\n" for u in range(N_USERS) for i in range(0, 30, 3))
    )
    preferences.import_scores(made, path / "scores.csv", "t", keep_training_items=True)
    return made


def _trained(dataset, workdir, **knobs):
    common = {"dim": 8, "epochs": 2, "batch_size": 16, "patience": 0}
    loop.train(make_run(str(dataset.path), str(workdir), **{**common, **knobs}))
    return serving.load(str(workdir))


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", "sasrec"])
def test_scores_are_inner_products_of_the_vectors(dataset, tmp_path, backbone):
    run = _trained(dataset, tmp_path / "r", backbone=backbone)
    vectors = run.vectors()
    assert vectors.users.shape[0] == N_USERS
    assert vectors.items.shape[0] == N_ITEMS
    users, items = np.divmod(np.arange(N_USERS * N_ITEMS), N_ITEMS)
    scores = run.scores([f"u{u}" for u in users], [f"i{i}" for i in items])
    expected = (vectors.users[users] * vectors.items[items]).sum(axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    if backbone == "mf":  # the item's bias, which multiplying the tables by hand forgets
        assert (vectors.users[:, -1] == 1.0).all()


@pytest.mark.parametrize("backbone", ["mf", "sasrec", "deepfm"])
def test_recommendations_are_the_best_unseen_items_by_score(dataset, tmp_path, backbone):
    run = _trained(dataset, tmp_path / "r", backbone=backbone)
    asked = ["u3", "u17", "u3"]
    listed = run.recommend(asked, k=5)
    assert listed.users == asked
    seen = dataset.positives(("train", "valid"))
    for user, items, scores in zip(asked, listed.items, listed.scores, strict=True):
        every = run.scores([user] * N_ITEMS, [f"i{i}" for i in range(N_ITEMS)])
        masked = every.copy()
        masked[seen.row(int(user[1:]))] = -np.inf
        best = np.argsort(-masked, kind="stable")[:5]
        assert items == [f"i{i}" for i in best]
        np.testing.assert_allclose(scores, every[best], rtol=1e-4, atol=1e-5)
    everything = run.recommend(k=N_ITEMS, mask_seen=False)
    assert len(everything.users) == N_USERS
    assert all(set(row) == {f"i{i}" for i in range(N_ITEMS)} for row in everything.items)


def test_a_user_with_fewer_items_left_gets_those(dataset, tmp_path):
    run = _trained(dataset, tmp_path / "r")
    listed = run.recommend(["u0"], k=N_ITEMS)
    left = N_ITEMS - dataset.positives(("train", "valid")).row(0).size
    assert [item is None for item in listed.items[0]] == [k >= left for k in range(N_ITEMS)]
    assert np.isneginf(listed.scores[0, left:]).all()


def test_evaluation_is_that_of_the_lists_it_recommends(dataset, tmp_path):
    run = _trained(dataset, tmp_path / "r")
    ranking, rows = run.evaluate("test")
    assert rows == {}
    relevant = dataset.positives(("test",))
    users = np.flatnonzero(relevant.counts)
    listed = run.recommend([f"u{u}" for u in users], k=10)
    recalls = [
        len({f"i{i}" for i in relevant.row(u)} & set(items)) / relevant.row(u).size
        for u, items in zip(users, listed.items, strict=True)
    ]
    written = evaluate_run(str(tmp_path / "r"), "r")
    recall = written.parts["test"].slices["overall"]["recall@10"]
    assert recall == pytest.approx(np.mean(recalls), abs=1e-6)
    assert ranking.slices["overall"]["recall@10"] == recall
    assert isinstance(written.parts["valid"], ranking_metrics.PartResult)


def test_alpha_is_what_its_gate_says(dataset, tmp_path):
    guided = {"guidance": "pairwise", "teacher": "t"}
    constant = _trained(dataset, tmp_path / "c", gate="constant", alpha=0.25, **guided)
    request = (["u1", "u2"], ["i3", "i6"], ["i9", "i12"], [1.0, 2.0])
    np.testing.assert_allclose(constant.alpha(*request), 0.25)
    rule = _trained(dataset, tmp_path / "r", gate="rule", **guided)
    slices = dataset.slices(rule.config.slices)
    expected = [
        max(slices.cold_users[u], slices.tail_items[a], slices.tail_items[b])
        for u, a, b in ((1, 3, 9), (2, 6, 12))
    ]
    np.testing.assert_array_equal(rule.alpha(*request), np.array(expected, float))


def test_what_a_run_does_not_have_is_named(dataset, tmp_path):
    run = _trained(dataset, tmp_path / "r", backbone="deepfm")
    with pytest.raises(ConfigError, match=r"--backbone=deepfm scores a user and an item together"):
        run.vectors()
    with pytest.raises(ConfigError, match=r"trained with --guidance=none: it has no gate"):
        run.alpha(["u1"], ["i1"], ["i2"], [1.0])
    with pytest.raises(InputError, match=r"unknown user id 'nobody' \(1 of 2\).*such as 'u0'"):
        run.scores(["nobody", "u1"], ["i1", "i2"])
    with pytest.raises(InputError, match=r"unknown item id 'x'"):
        run.scores(["u1"], ["x"])
    with pytest.raises(InputError, match=r"1 users and 2 items"):
        run.scores(["u1"], ["i1", "i2"])
    with pytest.raises(ConfigError, match=r"which='newest' is not one of: best, last"):
        serving.load(str(tmp_path / "r"), "newest")
    assert "deepfm on world, 24 users x 30 items, guidance none" in repr(run)
    assert run.scores([], []).shape == (0,)


def test_a_moved_dataset_is_found_where_it_is_said_to_be(dataset, tmp_path):
    _trained(dataset, tmp_path / "r")
    moved = tmp_path / "elsewhere"
    moved.symlink_to(dataset.path)
    here = serving.load(str(tmp_path / "r"), data=str(moved))
    assert here.dataset.path == moved
    with pytest.raises(ConfigError, match=r"which is not there"):
        serving.load(str(tmp_path / "r"), data=str(tmp_path / "nowhere"))
    other = worlds.random_dataset(tmp_path / "other", seed=9, n_users=N_USERS, n_items=N_ITEMS)
    with pytest.raises(ConfigError, match=r"trained on another split or id map than .*other"):
        evaluate_run(str(tmp_path / "r"), "r", data=str(other.path))
    moved_run = evaluate_run(str(tmp_path / "r"), "r", data=str(moved))
    assert moved_run.dataset.path == moved
