"""Rounds of a recommender and what stands for an LLM: another recommender that learns from it."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import worlds

from slgr_jax import api
from slgr_jax.config import ExchangeConfig, TeachConfig
from slgr_jax.errors import ConfigError, ManifestError
from slgr_jax.experiments import exchange
from slgr_jax.serving import load, run_teacher, student_files
from slgr_jax.teacher.products import preferences

SMALL = {"dim": 8, "batch_size": 32, "epochs": 2, "eval_every": 1, "lists_per_step": 8}
SMALL |= {"list_kl_places": 5, "list_kl_samples": 5}


@pytest.fixture(autouse=True)
def _on_one_device(one_device):
    pass


@pytest.fixture
def dataset(tmp_path):
    return worlds.random_dataset(tmp_path / "d", n_users=20)


def _plan(dataset, tmp_path, **more) -> exchange.ExchangePlan:
    options = ExchangeConfig(listed=6, student_temperature=0.5, **more)
    return exchange.ExchangePlan(str(dataset.path), tmp_path / "x", "llm", SMALL, options)


def _other_learns(dataset, tmp_path: pathlib.Path, student: pathlib.Path, name: str) -> None:
    """In the LLM's place: a wider recommender learns the student's lists, and states its own."""
    stated = preferences.Provenance(unlisted="below")
    preferences.import_scores(
        dataset, student / "lists.parquet", f"of_{name}", provenance=stated, names={}
    )
    workdir = tmp_path / f"other_{name}"
    knobs = {**SMALL, "dim": 16, "lambda": 0.5}
    api.train(dataset.path, workdir, guidance="list_kl", teacher=f"of_{name}", **knobs)
    run_teacher.from_run(dataset, TeachConfig(name=name), str(workdir), 8)


def test_two_recommenders_teach_each_other(dataset, tmp_path):
    plan = _plan(dataset, tmp_path, rounds=2)
    first = exchange.exchange(plan)
    assert (first.awaited, [row["round"] for row in first.rounds]) == (1, [0])
    assert f"awaiting what the LLM says in round 1: let it learn from {tmp_path}/x/round_0" in (
        first.render()
    )
    again = exchange.exchange(plan)  # nothing is trained twice
    assert again.rounds == first.rounds

    for number in (1, 2):
        student = plan.directory(number - 1) / exchange.STUDENT
        _other_learns(dataset, tmp_path, student, plan.product(number))
        result = exchange.exchange(plan)
        assert result.awaited == (2 if number == 1 else None)
        run = load(str(plan.directory(number))).config
        assert run.train.init_from == str(plan.directory(number - 1))
        assert (run.guidance.guidance, run.guidance.teacher) == ("list_kl", f"llm_{number}")
    assert not (plan.directory(2) / exchange.STUDENT).exists()  # nobody learns from the last
    record = json.loads((tmp_path / "x" / exchange.RECORD).read_text())
    assert [row["teacher"] for row in record["rounds"]] == ["", "llm_1", "llm_2"]
    values = [row["valid"] for row in result.rounds]
    assert f"best on validation: {plan.directory(int(np.argmax(values)))}" in result.render()
    # More rounds go on; other settings do not.
    assert exchange.exchange(_plan(dataset, tmp_path, rounds=3)).awaited == 3
    with pytest.raises(ConfigError, match=r"another exchange|other settings \(student_temp"):
        exchange.exchange(
            exchange.ExchangePlan(
                str(dataset.path), tmp_path / "x", "llm", SMALL, ExchangeConfig(listed=6)
            )
        )


def test_a_student_says_what_its_scores_say(dataset, tmp_path):
    """Lists, tails and ranks beside NumPy on the scores of all items."""
    plan = _plan(dataset, tmp_path)
    exchange.exchange(plan)
    student = plan.directory(0) / exchange.STUDENT
    run = load(str(plan.directory(0)))
    scores = np.asarray(run.restored.score_users(run.restored.scoring("valid"), np.arange(20)))
    scores = scores.astype(np.float64)
    trained = dataset.positives(("train",))
    lists, users, interactions = (
        pq.read_table(student / name).to_pylist() for name in student_files.FILES
    )
    for user in range(20):
        own = trained.row(user)
        outside = np.setdiff1d(np.arange(30), own)
        best = outside[np.argsort(-scores[user, outside], kind="stable")][:6]
        rows = [row for row in lists if row["user"] == f"u{user}"]
        assert [row["item"] for row in rows] == [f"i{item}" for item in best]
        assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose([row["score"] for row in rows], scores[user, best], rtol=1e-5)
        parts = np.exp(scores[user] / 0.5)
        whole = parts[outside].sum()
        said = next(row for row in users if row["user"] == f"u{user}")
        assert said["log_sum"] == pytest.approx(np.log(whole), rel=1e-5)
        assert said["tail"] == pytest.approx(1 - parts[best].sum() / whole, abs=1e-5)
        ranks = {row["item"]: row["rank"] for row in interactions if row["user"] == f"u{user}"}
        assert ranks == {
            f"i{item}": 1 + int((scores[user, outside] > scores[user, item]).sum()) for item in own
        }
    manifest = json.loads((student / "manifest.json").read_text())
    assert manifest["split_hash"] == dataset.manifest.split_hash
    assert (manifest["temperature"], manifest["wanted"]) == (0.5, "llm_1")


def test_what_is_no_exchange_is_refused(dataset, tmp_path):
    options = ExchangeConfig()
    for guidance in ("none", "auto", "hint"):
        with pytest.raises(ConfigError, match=f"--guidance={guidance}: rounds learn from"):
            exchange.ExchangePlan("d", tmp_path, "llm", {"guidance": guidance}, options)
    with pytest.raises(ConfigError, match=r"'a/b_1' cannot name a teacher product"):
        exchange.ExchangePlan("d", tmp_path, "a/b", {}, options)
    with pytest.raises(
        ManifestError, match=r"nowhere is not a directory; make it with slgr prepare"
    ):
        exchange.exchange(exchange.ExchangePlan("nowhere", tmp_path / "x", "llm", {}, options))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match=r"--mask_probability=0.5 is not used"):
        exchange.ExchangePlan("d", tmp_path, "llm", {"mask_probability": 0.5}, options)
