"""Baselines: EASE against ridge regressions, settings chosen on validation alone, the command."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import worlds
from sklearn import metrics as sklearn_metrics

import slgr_jax as sl
from slgr_jax.config import BaselineConfig, EvaluationConfig, SamplerConfig, TrainConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset, Part
from slgr_jax.errors import ConfigError, ManifestError
from slgr_jax.evaluation import baselines, full_ranking
from slgr_jax.evaluation.baseline_evaluation import evaluate_baselines
from slgr_jax.mesh import make_layout
from slgr_jax.reports import tables
from slgr_jax.sampling import labelled_rows
from slgr_jax.training import loop

LAUNCH = pathlib.Path(__file__).parents[2] / "launch" / "evaluate.py"
GRID = (1, 5, 20, 100, 1000)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Users like items of their own third, with noise; histories longer than a loop step."""
    rng = np.random.default_rng(7)
    n_users, n_items = 50, 60
    weights = np.where(np.arange(n_users)[:, None] % 3 == np.arange(n_items)[None, :] % 3, 4.0, 1.0)
    weights *= 1 / (np.arange(n_items) + 5.0)[None, :]
    pairs = [
        [user, item]
        for user in range(1, n_users)  # user 0 has nothing
        for item in rng.choice(n_items, 30, replace=False, p=weights[user] / weights[user].sum())
    ]
    shuffled = rng.permutation(np.array(pairs))
    path = tmp_path_factory.mktemp("world") / "data"
    parts = (shuffled[400:], shuffled[:200], shuffled[200:400])
    return worlds.write_dataset(path, *parts, n_users=n_users, n_items=n_items)


def _dense(dataset: Dataset, part: str) -> np.ndarray:
    """[U, I] float64: 1 at each pair of a part."""
    x = np.zeros((dataset.n_users, dataset.n_items))
    x[dataset.part(part).users, dataset.part(part).items] = 1
    return x


def _ridge(x: np.ndarray, l2: float) -> np.ndarray:
    """B, a column at a time: a ridge regression of each item on all others."""
    n = x.shape[1]
    b = np.zeros((n, n))
    for j in range(n):
        others = np.delete(np.arange(n), j)
        a = np.concatenate([x[:, others], np.sqrt(l2) * np.eye(n - 1)])
        y = np.concatenate([x[:, j], np.zeros(n - 1)])
        b[others, j] = np.linalg.lstsq(a, y, rcond=None)[0]
    return b


def _ndcg(scores: np.ndarray, dataset: Dataset) -> float:
    """Validation ndcg@10 over users, one user at a time."""
    train, valid = _dense(dataset, "train"), _dense(dataset, "valid")
    values = []
    for u in np.flatnonzero(valid.sum(axis=1)):
        order = sorted(np.flatnonzero(train[u] == 0), key=lambda i: (-scores[u, i], i))[:10]
        gains = [valid[u, item] / np.log2(place + 2) for place, item in enumerate(order)]
        ideal = sum(1 / np.log2(place + 2) for place in range(min(10, int(valid[u].sum()))))
        values.append(sum(gains) / ideal)
    return float(np.mean(values))


def _all_scores(fitted: baselines.Fitted, dataset: Dataset) -> np.ndarray:
    return np.asarray(fitted.score_users(fitted.state, np.arange(dataset.n_users, dtype=np.int32)))


@pytest.mark.parametrize("l2", [0.5, 30.0])
def test_ease_is_a_ridge_regression_of_each_item_on_the_others(dataset, l2):
    ease = baselines.Ease((l2,))
    (fitted,) = ease.fit(dataset, ease.grid)
    x = _dense(dataset, "train")
    assert x.sum(axis=1).max() > baselines._HISTORY_STEP
    expected = _ridge(x, l2)
    weights = fitted.state.weights
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    assert not np.diag(weights).any()
    users = np.array([3, 0, 49, 3], np.int32)
    scores = np.asarray(jax.jit(fitted.score_users)(fitted.state, users))
    np.testing.assert_allclose(scores, (x @ expected)[users], rtol=1e-4, atol=1e-5)
    assert not scores[1].any()  # a user without history


@pytest.mark.parametrize("per_addition", [0, 10**6])
def test_ease_scores_by_a_product_and_by_additions_are_the_same(dataset, per_addition, monkeypatch):
    monkeypatch.setattr(baselines, "_ITEMS_PER_ADDITION", per_addition)
    (fitted,) = baselines.Ease((30.0,)).fit(dataset, [{"lambda": 30.0}])
    x = _dense(dataset, "train")
    users = np.array([3, 0, 49, 3, 7], np.int32)  # the second has no history
    scores = jax.jit(lambda state, users: fitted.score_users(state, users))(fitted.state, users)
    np.testing.assert_allclose(scores, (x @ _ridge(x, 30.0))[users], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_users", "n_items"), [(40, 70), (70, 40)])
@pytest.mark.parametrize("step", [16, 512])
def test_ease_is_the_same_where_users_are_fewer_than_items(n_users, n_items, step, monkeypatch):
    monkeypatch.setattr(baselines, "_EASE_STEP", step)
    x = np.random.default_rng(3).random((n_users, n_items)) < 0.1
    x[:, 5] = False  # an item that nobody has
    sparse = scipy.sparse.csr_matrix(x.astype(np.float32))
    np.testing.assert_allclose(
        baselines._weights_by_users(sparse, 3.0), _ridge(x.astype(float), 3.0), rtol=1e-5, atol=1e-7
    )


def test_ease_refuses_what_the_memory_does_not_hold(dataset):
    many = pa.table({name: [None] * 30_000 for name in schema.ITEMS.names})
    large = dataclasses.replace(dataset, items=many)
    ease = baselines.Ease((400,), gb=16)
    with pytest.raises(ConfigError, match=r"30000 items needs 21\.6 GB, more than --ease_gb=16"):
        next(ease.fit(large, ease.grid))


def test_popular_lists_are_the_training_counts_in_order(dataset):
    tuned = baselines.tune(baselines.Popular(), dataset)
    assert (tuned.settings, tuned.tried) == ({}, [])
    nothing = Csr.from_pairs(np.zeros(0, np.int32), np.zeros(0, np.int32), dataset.n_users)
    users = np.arange(dataset.n_users)
    top = full_ranking.top_k(*tuned.fitted, users, nothing, dataset.n_items, k=12)
    counts = np.bincount(dataset.train.items, minlength=dataset.n_items)
    order = sorted(range(dataset.n_items), key=lambda item: (-counts[item], item))
    assert top.items.tolist() == [order[:12]] * dataset.n_users
    assert top.scores[5].tolist() == counts[order[:12]].tolist()


def test_tuning_keeps_the_best_on_validation(dataset):
    tuned = baselines.tune(baselines.Ease(GRID), dataset)
    x = _dense(dataset, "train")
    values = [_ndcg(x @ _ridge(x, l2), dataset) for l2 in GRID]
    assert [row["lambda"] for row in tuned.tried] == list(GRID)
    assert [row["ndcg@10"] for row in tuned.tried] == pytest.approx(values, abs=1e-9)
    best = int(np.argmax(values))
    assert 0 < best < len(GRID) - 1, values  # a world where the choice matters
    assert tuned.settings == {"lambda": GRID[best]}
    np.testing.assert_allclose(
        tuned.fitted.state.weights, _ridge(x, GRID[best]), rtol=1e-4, atol=1e-6
    )


def test_tuning_sees_validation_and_nothing_of_test(dataset):
    rng = np.random.default_rng(0)

    def replaced(part: str) -> Dataset:
        users = rng.integers(0, dataset.n_users, 300).astype(np.int32)
        items = rng.integers(0, dataset.n_items, 300).astype(np.int32)
        return dataclasses.replace(dataset, **{part: Part(users, items, None, None)})

    ease = baselines.Ease(GRID)
    tuned, poisoned = (baselines.tune(ease, data) for data in (dataset, replaced("test")))
    assert poisoned.tried == tuned.tried
    assert poisoned.settings == tuned.settings
    weights = [result.fitted.state.weights for result in (tuned, poisoned)]
    np.testing.assert_array_equal(*weights)
    assert baselines.tune(ease, replaced("valid")).tried != tuned.tried


def test_without_validation_the_middle_setting_is_kept(dataset):
    nothing = Part(np.zeros(0, np.int32), np.zeros(0, np.int32), None, None)
    tuned = baselines.tune(baselines.Ease(GRID), dataclasses.replace(dataset, valid=nothing))
    assert (tuned.settings, tuned.tried) == ({"lambda": 20}, [])


def test_validation_that_is_all_masked_chooses_the_first(dataset):
    seen = dataclasses.replace(dataset, valid=dataset.train)
    tuned = baselines.tune(baselines.Ease((20, 5)), seen)
    assert tuned.settings == {"lambda": 20}
    assert [row["ndcg@10"] for row in tuned.tried] == [0.0, 0.0]


def test_eight_devices_choose_and_score_as_one(dataset):
    mesh = make_layout().mesh
    assert mesh.size == 8
    single, eight = (
        baselines.tune(baselines.Ease(GRID[:3]), dataset, mesh=m) for m in (None, mesh)
    )
    assert eight.settings == single.settings
    assert len(eight.fitted.state.weights.sharding.device_set) == 8
    values = [[row["ndcg@10"] for row in tuned.tried] for tuned in (single, eight)]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


def test_ials_solves_its_normal_equations(dataset):
    pytest.importorskip("implicit")
    ials = baselines.Ials(dim=4, regularizations=(3,), alphas=(5,), iterations=60)
    (fitted,) = ials.fit(dataset, ials.grid)
    users, items = (np.asarray(factors, np.float64) for factors in fitted.state)
    x = _dense(dataset, "train")
    weight = np.where(x > 0, 5.0, 1.0)
    for i in range(dataset.n_items):
        left = (users * weight[:, i : i + 1]).T @ users + 3 * np.eye(4)
        expected = np.linalg.solve(left, users.T @ (weight[:, i] * x[:, i]))
        np.testing.assert_allclose(items[i], expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(_all_scores(fitted, dataset), users @ items.T, rtol=1e-4, atol=1e-5)


def test_ials_gives_the_package_what_was_asked_for(dataset, monkeypatch):
    asked = []

    class Fake:
        def __init__(self, **options: float) -> None:
            asked.append(options)

        def fit(self, x, show_progress: bool) -> None:
            np.testing.assert_array_equal(x.toarray(), _dense(dataset, "train"))
            good = (asked[-1]["alpha"], asked[-1]["regularization"]) == (10, 1)
            truth = _dense(dataset, "valid").astype(np.float32)
            self.user_factors = truth if good else -truth
            self.item_factors = np.eye(dataset.n_items, dtype=np.float32)

    als = types.SimpleNamespace(AlternatingLeastSquares=Fake)
    for name, module in (("implicit", types.ModuleType("implicit")), ("implicit.cpu.als", als)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "implicit.cpu", types.SimpleNamespace(als=als))
    options = BaselineConfig(ials_dim=60, ials_regularizations=(1, 3), ials_alphas=(2, 10))
    tuned = baselines.tune(baselines.make_baseline("ials", options), dataset)
    assert [(row["regularization"], row["alpha"]) for row in asked] == [
        (1, 2),
        (1, 10),
        (3, 2),
        (3, 10),
    ]
    assert all((row["factors"], row["iterations"]) == (60, 20) for row in asked)
    assert tuned.settings == {"regularization": 1, "alpha": 10}
    assert [row["ndcg@10"] for row in tuned.tried] == pytest.approx([0, 1, 0, 0])


def test_a_missing_package_names_the_extra(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    with pytest.raises(ConfigError, match=r"implicit.*pip install 'slgr_jax\[ials\]'"):
        baselines.tune(baselines.Ials(4, (1,), (1,), 2), dataset)


@pytest.mark.parametrize(
    ("options", "n_items", "names"),
    [
        ({}, 5000, ("popular", "ease")),
        ({}, 5001, ("popular",)),
        ({"ease_gb": 0.5}, 5000, ("popular",)),
        ({"baselines": "none"}, 10, ()),
        ({"baselines": "ials,popular,ials"}, 10**6, ("ials", "popular")),
    ],
)
def test_which_baselines_are_chosen(options, n_items, names):
    assert baselines.chosen(BaselineConfig(**options), n_items) == names


@pytest.mark.parametrize("given", ["knn", "popular,", "auto,ease", ""])
def test_unknown_names_are_refused(given):
    with pytest.raises(ConfigError, match="choose from auto, none, popular, item_item, ease"):
        BaselineConfig(baselines=given)


def test_each_name_makes_its_baseline():
    options = BaselineConfig(ease_lambdas=(7,), ease_gb=2)
    by_name = {name: baselines.make_baseline(name, options) for name in ("popular", "ease", "ials")}
    assert by_name["ease"] == baselines.Ease((7,), 2)
    assert by_name["popular"] == baselines.Popular()
    assert isinstance(by_name["ials"], baselines.Ials)


def test_item_item_is_the_cosine_of_training_users(dataset):
    fitted = baselines.tune(baselines.ItemItem(), dataset).fitted
    x = _dense(dataset, "train")
    norms = np.maximum(np.linalg.norm(x, axis=0), 1)
    cosines = (x.T @ x) / norms[:, None] / norms[None, :]
    np.fill_diagonal(cosines, 0)
    np.testing.assert_allclose(_all_scores(fitted, dataset), x @ cosines, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"item_item over 60 items needs .* --ease_gb=1e-06"):
        next(baselines.ItemItem(1e-6).fit(dataset, [{}]))


@pytest.mark.parametrize(
    ("options", "n_items", "why"),
    [
        ({}, 5000, ""),
        ({"baselines": "popular"}, 10**6, ""),
        ({"baselines": "ease"}, 10**6, ""),
        ({}, 16_859, "cube of the items, of which there are 16,859; --baselines=popular,ease"),
        ({"ease_gb": 0.5}, 5000, "it needs more than --ease_gb"),
    ],
)
def test_ease_that_is_left_out_is_explained(options, n_items, why):
    text = baselines.left_out(BaselineConfig(**options), n_items)
    assert why in text
    assert bool(text) == bool(why)


def test_rows_are_scored_as_the_catalogue_is(dataset, monkeypatch):
    monkeypatch.setattr(baselines, "_ROW_USERS", 7)  # several chunks, the last not full
    fitted = baselines.tune(baselines.Ease((20,)), dataset).fitted
    rows = labelled_rows.sampled_rows(dataset, "test", seed=0)
    expected = _all_scores(fitted, dataset)[rows.users, rows.items]
    np.testing.assert_allclose(baselines.row_scores(fitted, rows), expected, rtol=1e-6)


def test_labelled_rows_choose_a_setting_by_their_auc(dataset):
    rows = labelled_rows.sampled_rows(dataset, "valid", seed=0)
    tuned = baselines.tune(baselines.Ease(GRID), dataset, rows=rows)
    x = _dense(dataset, "train")
    values = [
        sklearn_metrics.roc_auc_score(rows.labels, (x @ _ridge(x, l2))[rows.users, rows.items])
        for l2 in GRID
    ]
    assert [row["rows_auc"] for row in tuned.tried] == pytest.approx(values, abs=1e-4)
    assert tuned.settings == {"lambda": GRID[int(np.argmax(values))]}


def test_baselines_stand_beside_labelled_rows(dataset, tmp_path):
    options = BaselineConfig(baselines="popular,ease", ease_lambdas=(5, 100))
    for ranking, stops_by, tuned_on in (
        (False, "rows_auc", "valid rows_auc"),
        (True, "rows_auc", "valid rows_auc"),
        (True, "ndcg@10", "valid ndcg@10"),
    ):
        evaluation = EvaluationConfig(ranking=ranking, rows="sampled", row_negatives=2)
        train = TrainConfig(early_stop_metric=stops_by)
        run = worlds.run_config(dataset, tmp_path, evaluation=evaluation, train=train)
        popular, ease = evaluate_baselines(options, run, dataset, tmp_path)
        assert (set(ease.parts), set(ease.rows)) == (
            {"valid", "test"} if ranking else set(), {"valid", "test"},
        )  # fmt: skip
        assert ease.baseline["tuned_on"] == tuned_on
        # The very rows of a run.
        rows = labelled_rows.make_rows(dataset, "test", evaluation, run.loss)
        scores = dataset.popularity[rows.items]
        values = popular.rows["test"]["overall"]
        assert values["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(rows.labels, scores))
        assert values["gauc"] > 0.5
        assert (values["log_loss"], values["n"]) == (None, len(rows))
        written = json.loads((tmp_path / "baselines" / "popular" / "metrics.json").read_text())
        assert written["rows"]["test"]["overall"]["auc"] == values["auc"]
        text = tables.render([popular, ease], "rows_auc" if not ranking else "ndcg@10")
        assert "test: labelled rows" in text


def _launch(*flags: str) -> str:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(LAUNCH.parents[1])}
    done = subprocess.run(
        [sys.executable, str(LAUNCH), *flags], capture_output=True, text=True, env=env, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_needs_no_run(dataset, tmp_path):
    """One device in a process of its own gives what eight do here."""
    shown = _launch(f"--data={dataset.path}", f"--out={tmp_path}/out", "--ease_lambdas=5,20,100")
    assert "test: ndcg@10 user by user, each baseline minus popular" in shown
    assert "baseline popular: no settings" in shown
    options = BaselineConfig(ease_lambdas=(5, 20, 100))
    config = worlds.run_config(dataset, tmp_path)
    here = evaluate_baselines(options, config, dataset, tmp_path / "here")
    assert [result.label for result in here] == ["popular", "ease"]
    for result in here:
        name = result.label
        texts = [
            (tmp_path / where / "baselines" / name / "metrics.json").read_text()
            for where in ("here", "out")
        ]
        ours, theirs = map(json.loads, texts)
        assert theirs["baseline"]["settings"] == result.baseline["settings"]
        for part in ("valid", "test"):
            values = [result[part]["overall"] for result in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], abs=1e-6)
            assert values[0]["n"] > 0
    # What was tuned is what the table shows.
    best = max(row["ndcg@10"] for row in theirs["baseline"]["tried"])
    assert theirs["valid"]["overall"]["ndcg@10"] == pytest.approx(best)
    table = pq.read_table(tmp_path / "out" / "baselines" / "ease" / "per_user.parquet")
    assert set(table["part"].to_pylist()) == {"valid", "test"}


def test_a_list_is_added_to_every_ranking(dataset, tmp_path):
    """Test items at the top of every list, half of the validation items too: all gain by it."""
    chosen = _dense(dataset, "test") + _dense(dataset, "valid") * (np.arange(60) % 2)
    users, items = np.nonzero(chosen)
    worlds.teach(dataset, users, items, np.ones(users.size, np.float32), unlisted="below")
    run = tmp_path / "plain"
    loop.train(
        worlds.run_config(
            dataset, run, train=TrainConfig(epochs=1), sampler=SamplerConfig(batch_size=64)
        )
    )
    options = {"baselines": "popular", "blend": "t"}
    evaluation = sl.evaluate([run], **options)
    labels = [result.label for result in evaluation.runs]
    assert labels == ["plain", "plain + t", "popular", "popular + t"]
    plain, blended, popular, other = (result.parts["test"] for result in evaluation.runs)
    for before, after in ((plain, blended), (popular, other)):
        assert after.slices["overall"]["ndcg@10"] > before.slices["overall"]["ndcg@10"] + 0.2
    facts = json.loads((run / "blends" / "plain+t" / "metrics.json").read_text())["blend"]
    assert (facts["run"], facts["teacher"], facts["tuned_on"]) == ("plain", "t", "valid ndcg@10")
    best = max(facts["tried"], key=lambda row: row["ndcg@10"])
    assert facts["weight"] == best["weight"] > 0
    # Chosen on validation and shown there: the same number by two ways of ranking.
    shown = evaluation.runs[1].parts["valid"].slices["overall"]["ndcg@10"]
    assert shown == pytest.approx(best["ndcg@10"], abs=1e-6)
    assert facts["tried"][0]["ndcg@10"] == pytest.approx(
        evaluation.runs[0].parts["valid"].slices["overall"]["ndcg@10"], abs=1e-6
    )
    text = str(evaluation)
    assert "test: ndcg@10 user by user, score + w / rank in the teacher's list minus score" in text
    assert f"plain + t: w {facts['weight']:.4g}" in text
    assert "w was chosen on this part" in text.split("valid: ndcg@10 user by user, score")[1]
    assert "- plain + t (score + w / rank, no training) is better than plain: " in text
    assert evaluation.draw().is_file()
    with pytest.raises(ManifestError, match="has no teacher 'nobody'"):
        sl.evaluate([run], blend="nobody", baselines="none")


@pytest.mark.slow
def test_baselines_stand_beside_a_run(dataset, tmp_path):
    run = tmp_path / "popular"  # a run may have a baseline's name
    config = worlds.run_config(
        dataset,
        run,
        train=TrainConfig(epochs=1, early_stop_metric="ndcg@5"),
        sampler=SamplerConfig(batch_size=64),
        evaluation=EvaluationConfig(ks=(5,)),
    )
    loop.train(config)
    shown = _launch(f"--workdir={run}", "--ease_lambdas=20")
    for text in ("popular (baseline)", "ease"):
        table = shown.split("test: full ranking")[1].split("\n\n")[0]
        assert sum(f" {text} " in line for line in table.splitlines()) >= 4
    assert "test: ndcg@5 user by user, each baseline minus popular\n" in shown
    assert "each run minus" not in shown
    assert sorted(os.listdir(run / "baselines")) == ["ease", "popular"]
    assert "baseline" not in json.loads((run / "metrics.json").read_text())
