"""New users against scipy's minimum of the same loss, against known users, on a checkerboard."""

from __future__ import annotations

import csv
import dataclasses
import functools

import numpy as np
import pytest
import scipy.optimize
import worlds

import slgr_jax as sl
from slgr_jax import serving
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.serving import fold_in
from slgr_jax.serving.histories import History, events_of, read_histories
from slgr_jax.training import loop, restore

N_USERS, N_ITEMS = 24, 37
# 37 - 5 = 32 items are left to be drawn, which divides every item's share of the draws.
LIST = ["i3", "i20", "i8", "i36", "i11"]


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    """Compiling for eight takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "make_layout", lambda **_: worlds.one_device())
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("fold_in") / "d"
    return worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, timed=True, categories=3)


def _trained(dataset, workdir, which="best", **knobs):
    common = {"dim": 8, "epochs": 2, "batch_size": 16, "patience": 0, "early_stop_metric": "mrr"}
    common |= {"ranking": True, "rows": "none"}
    loop.train(make_run(str(dataset.path), str(workdir), **{**common, **knobs}))
    return serving.load(str(workdir), which)


@pytest.fixture(scope="module")
def run_of(dataset, tmp_path_factory):
    """Backbone -> a run of two epochs, trained once."""

    @functools.cache
    def train(backbone):
        return _trained(dataset, tmp_path_factory.mktemp(backbone) / "r", backbone=backbone)

    return train


@pytest.fixture(scope="module")
def mf(dataset, tmp_path_factory):
    """Trained until its rows hardly move."""
    workdir = tmp_path_factory.mktemp("mf") / "r"
    return _trained(dataset, workdir, "last", epochs=300, eval_every=50)


def _as_if(run, section, **values):
    """The run as if it had been trained with other knobs of a section."""
    config = run.config
    changed = dataclasses.replace(getattr(config, section), **values)
    learner = dataclasses.replace(
        run.restored.learner, config=dataclasses.replace(config, **{section: changed})
    )
    return dataclasses.replace(run, restored=dataclasses.replace(run.restored, learner=learner))


def _loss(x, run, items, weights, name):
    """Of a row of mf, with the mean over every item outside the list, in float64."""
    table = run.vectors().items.astype(np.float64)
    score = table[:, :-1] @ x[:-1] + table[:, -1]
    liked, others = score[items], np.delete(score, items)
    each = {
        "bpr": np.log1p(np.exp(others - liked[:, None])).mean(axis=1),
        "bce": (np.log1p(np.exp(-liked)) + np.log1p(np.exp(others)).mean()) / 2,
        "softmax": np.log(np.exp(score).sum()) - liked,
    }[name]
    l2 = run.config.optimizer.l2
    return (weights * each).sum() / weights.sum() + l2 / 2 * (x**2).sum()


@pytest.mark.parametrize("loss", ["bpr", "bce", "softmax"])
def test_the_row_of_mf_is_the_minimum_of_its_own_loss(run_of, monkeypatch, loss):
    run = _as_if(run_of("mf"), "loss", loss=loss)
    weights = np.array([1.0, 2.0, 1.0, 0.5, 3.0])
    items = run.item_index(LIST)
    arguments = (run, items, weights, loss)
    best = scipy.optimize.minimize(_loss, np.zeros(8), arguments, method="BFGS").x
    monkeypatch.setattr(fold_in, "STEPS", 3000)
    row = run.fold_in({"new": History(LIST, weights=weights)}).vectors().users[0]
    np.testing.assert_allclose(row[:-1], best[:-1], atol=2e-3)
    assert row[-1] == 1.0  # what the item's bias is multiplied by


def test_the_default_steps_are_nearly_enough(mf):
    """The loss is within a twentieth of what there was to gain over the average user."""
    items, weights = mf.item_index(LIST), np.ones(5)
    arguments = (mf, items, weights, "bpr")
    start = np.asarray(mf.restored.serving.values["user"], float).mean(axis=0)
    best = scipy.optimize.minimize(_loss, np.zeros(8), arguments, method="BFGS").fun
    row = mf.fold_in({"new": LIST}).run.restored.serving.values["user"][0]
    reached, begun = (_loss(np.asarray(x, float), *arguments) for x in (row, start))
    assert reached - best < 0.05 * (begun - best)


def test_negatives_follow_the_distribution_without_the_users_items(dataset, run_of):
    run = _as_if(run_of("mf"), "sampler", negatives="popularity", popularity_power=1.0)
    folder = fold_in.Folder(run)
    _, events, _ = events_of(run, {"a": LIST, "b": ["i0", "i1"]}, "refuse")
    ((_, chunk),) = folder._chunks(events, 2)
    cumulative = np.concatenate([[0], np.cumsum(folder._masses)]).astype(np.int32)
    drawn, able = fold_in._negatives(chunk, cumulative, 2048)
    assert able.tolist() == [1.0, 1.0]
    for row, names in zip(np.asarray(drawn), (LIST, ["i0", "i1"]), strict=True):
        mass = dataset.popularity.astype(float)
        mass[run.item_index(names)] = 0.0
        expected = 2048 * mass / mass.sum()
        assert np.abs(np.bincount(row, minlength=N_ITEMS) - expected).max() <= 1.0


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", "deepfm"])
def test_a_new_user_of_the_checkerboard_gets_the_item_withheld(tmp_path, backbone):
    """Somebody who likes every even item but one, or every odd one, is to get that one."""
    board = worlds.checkerboard(tmp_path / "d", size=24)
    knobs = {
        "mf": {"lr": 0.3, "l2": 0.001},
        "lightgcn": {"lr": 0.03, "l2": 0.001, "epochs": 40},
        "deepfm": {"lr": 0.02, "dense_lr": 0.02, "mlp": (16,)},
    }[backbone]
    common = {"epochs": 60, "batch_size": 128, "eval_every": 20, "dropout": 0.0}
    run = _trained(board, tmp_path / "r", backbone=backbone, **{**common, **knobs})
    lists = {f"without {k}": [f"i{i}" for i in range(k % 2, 24, 2) if i != k] for k in (4, 13)}
    listed = run.fold_in(lists).recommend(k=1)
    assert listed.users == ["without 4", "without 13"]
    assert listed.items == [["i4"], ["i13"]]


@pytest.mark.parametrize("backbone", ["sasrec", "gru4rec", "bert4rec"])
def test_a_history_is_all_that_a_sequence_model_knows_of_a_user(dataset, run_of, backbone):
    run = run_of(backbone)
    users, ids = dataset.user_ids.to_pylist(), np.array(run.item_ids)
    histories = {}
    for number, user in enumerate(users):
        events = [dataset.part(part) for part in ("train", "valid")]
        items = [part.items[part.users == number] for part in events]
        histories[user] = ids[np.concatenate(items)].tolist()
    folded, known = run.fold_in(histories).recommend(k=10), run.recommend(k=10)
    assert folded.items == known.items
    np.testing.assert_allclose(folded.scores, known.scores, rtol=1e-6, atol=1e-7)


def test_a_known_users_items_give_about_the_list_that_training_gave(dataset, mf):
    run = mf
    train, ids = dataset.positives(("train",)), np.array(run.item_ids)
    histories = {f"u{u}": ids[train.row(u)].tolist() for u in range(N_USERS)}
    folded = run.fold_in(histories).recommend(k=10, mask_seen=False)
    known = run.recommend(k=10, mask_seen=False)
    same = [len({*a} & {*b}) / 10 for a, b in zip(folded.items, known.items, strict=True)]
    assert np.mean(same) > 0.85


def test_a_new_node_has_the_vector_of_its_neighbourhood(dataset, run_of):
    run = run_of("lightgcn")
    train = dataset.positives(("train",))
    # The identity that it rests on, for the users of the graph: E = A E + (E0 - A^(K+1) E0)/(K+1).
    rng, layers = np.random.default_rng(0), 3
    first = rng.normal(size=(N_USERS + N_ITEMS, 4))
    adjacency = np.zeros((N_USERS + N_ITEMS, N_USERS + N_ITEMS))
    adjacency[train.owners(), N_USERS + train.indices] = 1.0
    adjacency += adjacency.T
    degrees = np.maximum(adjacency.sum(axis=1), 1.0)
    adjacency /= np.sqrt(degrees[:, None] * degrees[None, :])
    powers = [np.linalg.matrix_power(adjacency, k) @ first for k in range(layers + 2)]
    propagated = sum(powers[:-1]) / (layers + 1)
    rest = (first - powers[-1]) / (layers + 1)
    np.testing.assert_allclose(propagated, adjacency @ propagated + rest, atol=1e-12)

    index = run.item_index(LIST)
    items = np.asarray(run.restored.serving.values["item"])
    scale = np.sqrt((dataset.popularity[index] + 1.0) * 5)
    _, events, _ = events_of(run, {"new": LIST}, "refuse")
    ((_, chunk),) = fold_in.Folder(run)._chunks(events, 1)
    np.testing.assert_allclose(chunk.base[0], (items[index] / scale[:, None]).sum(0), rtol=1e-5)


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", "deepfm"])
def test_a_row_is_a_function_of_the_users_events_alone(run_of, backbone):
    run = run_of(backbone)
    times = [50, 10, 40, 20, 30]
    shuffled = np.random.default_rng(1).permutation(5)
    once = run.fold_in({"new": History(LIST, times)})
    row = np.asarray(once.run.restored.serving.values["user"])[0]

    def again(histories, place):
        return np.asarray(run.fold_in(histories).run.restored.serving.values["user"])[place]

    reordered = History([LIST[k] for k in shuffled], [times[k] for k in shuffled])
    repeated = History([*LIST, "i3"], [*times, 60], [1, 2, 2, 2, 2, 1])
    for other in (reordered, repeated):
        np.testing.assert_array_equal(again({"new": other}, 0), row)
    crowd = {f"x{k}": [f"i{i}" for i in range(k + 1)] for k in range(9)}
    crowd = {**crowd, "new": History(LIST, times), "y": LIST[:2]}
    np.testing.assert_allclose(again(crowd, 9), row, rtol=1e-3, atol=1e-5)
    assert run.fold_in(crowd).users[9] == "new"


def test_known_scores_and_users_stay_what_they_are(mf):
    before = mf.recommend(k=5)
    folded = mf.fold_in({"u0": ["i1", "i2"], "new": ["i5"]})
    listed = folded.recommend(["new", "u0"], k=N_ITEMS)
    assert listed.items[0].count(None) == 1
    assert "i5" not in listed.items[0]
    vectors = folded.vectors()
    pairs = folded.scores(["u0", "new"], ["i7", "i9"])
    expected = [vectors.users[0] @ vectors.items[7], vectors.users[1] @ vectors.items[9]]
    np.testing.assert_allclose(pairs, expected, rtol=1e-5)
    assert mf.recommend(k=5).items == before.items


def test_what_cannot_be_folded_in_is_named(mf):
    cases = [
        ({}, r"no histories: give at least one user"),
        ({"a": ["i1"], "b": []}, r"history of user 'b' is empty"),
        ({"a": "i1"}, r"history of user 'a' is the text 'i1'; give a list"),
        ({"a": ["i1", "x"]}, r"unknown item id 'x' \(1 of 2\); the data has 37 ids"),
        ({"a": History(["i1"], [1, 2])}, r"user 'a': 1 items and 2 times"),
        ({"a": History(["i1"], weights=[0])}, r"weights must be finite and > 0, and one is 0"),
        ({"a": History(["i1"], [float("nan")])}, r"times must be finite, and one is nan"),
    ]
    for histories, message in cases:
        with pytest.raises(InputError, match=message):
            mf.fold_in(histories)
    with pytest.raises(ConfigError, match=r"unknown='drop' is not one of: refuse, skip"):
        mf.fold_in({"a": ["i1"]}, unknown="drop")
    with pytest.raises(InputError, match=r"none of the 1 items of 1 users is known"):
        mf.fold_in({"a": ["x"]}, unknown="skip")
    folded = mf.fold_in({"a": ["x"], "b": ["i1", "y", "x"]}, unknown="skip")
    assert folded.users == ["b"]
    assert folded.skipped == {"unknown item": 2, "user without a known item": 1}


def test_runs_that_users_cannot_be_folded_into_are_refused(mf):
    labelled = _as_if(mf, "loss", loss="bce", rating_threshold=3.0)
    with pytest.raises(ConfigError, match=r"--rating_threshold=3: this run learned its users"):
        labelled.fold_in({"a": ["i1"]})


def test_histories_are_read_from_a_file(mf, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("user,item,timestamp\nb,i3,2\na,i9,5\nb,i4,1\n")
    read = read_histories(path)
    assert {name: history.items for name, history in read.items()} == {
        "a": ["i9"],
        "b": ["i3", "i4"],
    }
    assert np.argsort(read["b"].times).tolist() == [1, 0]
    assert mf.fold_in(read).recommend(k=3).users == ["a", "b"]
    path.write_text("user,item\nb,i3\nb,\n")
    with pytest.raises(InputError, match=r"new.csv"):
        read_histories(path)
    with pytest.raises(InputError, match=r"the ending says the layout, one of: .csv, .tsv"):
        read_histories(tmp_path / "new.xls")
    with pytest.raises(InputError, match=r"none.csv is not there"):
        read_histories(tmp_path / "none.csv")


def test_new_users_of_a_file_get_a_file_of_lists(mf, tmp_path):
    events = tmp_path / "new.csv"
    events.write_text("user,item\n" + "".join(f"a,{item}\nb,i2\n" for item in LIST[:2]))
    out = tmp_path / "lists.csv"
    written = sl.recommend(mf.workdir, out=out, histories=events, k=3, checkpoint="last")
    assert (written.users, written.rows) == (2, 6)
    lists = mf.fold_in({"a": LIST[:2], "b": ["i2"]}).recommend(k=3)
    with open(out, encoding="utf-8") as file:
        rows = [(row["user"], row["item"]) for row in csv.DictReader(file)]
    assert rows == [
        (user, item) for user, items in zip("ab", lists.items, strict=True) for item in items
    ]
    for users in ("", "u1"):
        with pytest.raises(ConfigError, match=r"either --users .* or --histories=FILE"):
            sl.recommend(mf.workdir, users, out, histories=events if users else "", overwrite=True)
