"""What lists add when scoring: worlds in which the answer is known, and the words of the report."""

from __future__ import annotations

import json

import numpy as np
import pytest
import worlds

from slgr_jax.config import BaselineConfig, ReportConfig
from slgr_jax.reports import added_value, teacher_audit
from slgr_jax.teacher.products import preferences

N_USERS, N_ITEMS = 120, 50


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """With lists of what users choose next, random ones, and those of the most popular items."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("world") / "data"
    dataset = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS)
    fresh = ~dataset.positives(("train",)).matrix(N_ITEMS).toarray().astype(bool)
    chosen = dataset.positives(("valid",)).matrix(N_ITEMS).toarray()
    noise = rng.random((N_USERS, N_ITEMS))
    for name, score in (
        ("knows", chosen + noise),
        ("random", noise),
        ("popular", np.broadcast_to(dataset.popularity + noise[0], noise.shape)),
    ):
        order = np.where(fresh, -score, np.inf).argsort(axis=1)[:, :8]
        users = np.repeat(np.arange(0, N_USERS), 8)
        ranks = np.tile(np.arange(8), N_USERS).astype(np.float32)
        worlds.teach(dataset, users, order.reshape(-1), -ranks, name=name, unlisted="below",
                     training_items="none")  # fmt: skip
    return dataset


def measure(dataset, name, **options):
    asked = BaselineConfig(**{"ease_lambdas": (20,)} | options)
    return added_value.measure(dataset, preferences.load(dataset, name), asked)


def test_what_knows_adds_and_what_does_not_adds_nothing(dataset):
    knows, noise, popular = (measure(dataset, name) for name in ("knows", "random", "popular"))
    assert [teacher.name for teacher in knows.free] == ["popular", "item_item", "ease"]
    assert knows.best.overall.low > 0.2
    assert knows.alone["overall"] > 0.99
    assert noise.best.overall.low < 0 < noise.best.overall.high or noise.best.weight == 0
    of_popular = {teacher.name: teacher.overall for teacher in popular.free}["popular"]
    assert of_popular.gain == pytest.approx(0, abs=0.01)
    assert popular.alone["overall"] == pytest.approx(of_popular.alone, abs=0.03)
    # What it is added to does not depend on the teacher.
    assert [t.overall.alone for t in knows.free] == [t.overall.alone for t in noise.free]
    for teacher in knows.free:
        for its in teacher.slices:
            assert its.gain == pytest.approx(its.added - its.alone)
            assert its.low <= its.gain <= its.high
    assert [its.slice for its in knows.best.slices] == [
        "overall", "cold users", "warm users", "tail items",
    ]  # fmt: skip


def test_the_report_says_what_it_is_worth(dataset, tmp_path):
    audit = teacher_audit.make(
        dataset, "knows", ReportConfig(), prices=(0, 0), seed=0, free=BaselineConfig(
            ease_lambdas=(20,))
    )  # fmt: skip
    best = audit.value.best
    said = added_value.said(audit.value)
    assert f"teacher that costs nothing, {best.name}: added when scoring" in said[0]
    assert (
        f"it adds to it (validation NDCG@10, cross-fitted: overall {best.overall.gain:+.4f}"
        in (said[0])
    )
    assert said[1].startswith(f"Its lists alone have NDCG@10 {audit.value.alone['overall']:.4f}")
    paths = teacher_audit.write(audit, tmp_path)
    text, data = paths[0].read_text(), json.loads(paths[1].read_text())
    assert all(f"- {line}\n" in text for line in said)
    assert "## Added when scoring" in text
    assert data["value"]["free"][0]["slices"][0]["gain"] == audit.value.free[0].overall.gain
    assert all(line in teacher_audit.terminal(audit) for line in said)


def test_preferences_and_no_baselines_have_no_such_part(dataset):
    assert measure(dataset, "knows", baselines="none") is None
    assert [t.name for t in measure(dataset, "knows", baselines="popular").free] == ["popular"]
    large = BaselineConfig()
    assert added_value.names(large, 5_001) == ("popular", "item_item")
