"""`slgr compare --quick` where it is known what a teacher adds."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import worlds
from scipy import stats

from slgr_jax.config import BaselineConfig
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.evaluation import baselines, blending
from slgr_jax.experiments import quick
from slgr_jax.reports import added_value
from slgr_jax.teacher.products import controls, preferences

N_USERS, N_ITEMS = 150, 40
OPTIONS = BaselineConfig(ease_lambdas=(20, 100))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """With lists of half of what half of the users choose next, and of random items."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("world") / "data"
    dataset = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS)
    fresh = ~dataset.positives(("train",)).matrix(N_ITEMS).toarray().astype(bool)
    chosen = dataset.positives(("valid",)).matrix(N_ITEMS).toarray()
    known = chosen * (rng.random(chosen.shape) < 0.5)
    for name, score, asked in (
        ("knows", known + rng.random(chosen.shape), N_USERS // 2),
        ("random", rng.random(chosen.shape), N_USERS),
    ):
        order = np.where(fresh, -score, np.inf).argsort(axis=1)[:asked, :12]
        users = np.repeat(np.arange(asked), 12)
        ranks = np.tile(np.arange(12), asked).astype(np.float32)
        worlds.teach(dataset, users, order.reshape(-1), -ranks, name=name, unlisted="below")
    return dataset


@pytest.fixture(scope="module")
def knows(dataset):
    return quick.compare(str(dataset.path), "knows", OPTIONS)


def test_what_knows_is_above_every_control_and_trained_with(knows, tmp_path):
    overall = [row for row in knows.differences if row.slice == "overall"]
    names = ["shuffled", "consensus", "popularity", "item_item"]
    compared = [f"knows.{name}" for name in names if name != quick._CONTROL_OF[knows.base]]
    assert [row.other for row in overall] == [knows.base, *compared]
    assert all(row.is_more for row in overall)
    assert knows.best == "knows"
    said = quick.said(knows)
    assert "That is more than every control adds, beyond chance." in said
    command = shlex.split(knows.command)
    assert command[:2] == ["slgr", "train"]
    assert "--teacher=knows" in command
    # Half of the users have a list: to ask the others is worth about as much again.
    assert knows.asked == pytest.approx(0.5, abs=0.02)
    assert knows.by_share[0.5] == pytest.approx(knows.by_share[1.0] / 2, rel=0.4)
    rest = next(line for line in said if line.startswith("Half of the users"))
    assert f"asking the others may give about {knows.by_share[1.0]:+.4f} more" in rest
    assert knows.by_length[0] == knows.by_share[1.0]
    assert knows.by_length[5] > 0

    paths = quick.write(knows, tmp_path / "out")
    facts = json.loads(paths[0].read_text())
    assert facts["command"] == knows.command
    assert facts["differences"][0]["gain"] == overall[0].gain
    assert all(f"- {line}\n" in paths[1].read_text() for line in said)


def test_differences_are_paired_and_corrected_within_a_slice(dataset, knows):
    """Against a recomputation from the products that it wrote."""
    _, fitted = quick._best_base(dataset, OPTIONS)
    names = ["knows", *(row.other for row in knows.differences if row.slice == "overall")][2:]
    lists = [blending.lists_of(dataset, preferences.load(dataset, n)) for n in ("knows", *names)]
    tried = blending.try_weights(fitted.score_users, fitted.state, lists, dataset)
    ours = tried[0].cross_fitted()[0]
    others = [tried[0].values[0], *(its.cross_fitted()[0] for its in tried[1:])]
    p = [stats.ttest_rel(ours, theirs).pvalue for theirs in others]
    order = np.argsort(p)
    holm = np.empty(len(p))
    holm[order] = np.maximum.accumulate([p[k] * (len(p) - j) for j, k in enumerate(order)])
    rows = [row for row in knows.differences if row.slice == "overall"]
    for row, theirs, corrected in zip(rows, others, holm, strict=True):
        assert row.gain == pytest.approx(np.mean(ours - theirs))
        assert row.p == pytest.approx(min(corrected, 1.0))


def test_random_lists_are_not_trained_with(dataset):
    verdict = quick.compare(str(dataset.path), "random", OPTIONS)
    assert verdict.best != "random"
    said = quick.said(verdict)
    assert any(line.startswith("It is not told apart from, or below:") for line in said)
    own = controls.control_name("random", quick._CONTROL_OF[verdict.base])
    assert verdict.best in {f"random.{name}" for name in controls.CONTROLS} | {own}
    # What is recommended is there.
    assert verdict.best in preferences.products(dataset.path)


def test_the_base_is_the_best_of_what_costs_nothing(dataset):
    values = {}
    for name in ("popular", "item_item", "ease"):
        tuned = baselines.tune(baselines.make_baseline(name, OPTIONS), dataset)
        values[name] = baselines._ndcg(tuned.fitted, dataset, None, "auto", 1024)
    assert quick._best_base(dataset, OPTIONS)[0] == max(values, key=values.get)


def test_what_cannot_be_compared_is_refused(dataset):
    with pytest.raises(ConfigError, match="--baselines=none leaves nothing"):
        quick.compare(str(dataset.path), "knows", BaselineConfig(baselines="none"))
    with pytest.raises(ManifestError, match="has no teacher 'nobody'"):
        quick.compare(str(dataset.path), "nobody", OPTIONS)
    train = dataset.train
    worlds.teach(dataset, train.users, train.items, np.ones(len(train)), name="echo")
    with pytest.raises(InputError, match="'echo' says nothing but of users' own training items"):
        quick.compare(str(dataset.path), "echo", OPTIONS)
    assert added_value.measure(dataset, preferences.load(dataset, "echo"), OPTIONS) is None
