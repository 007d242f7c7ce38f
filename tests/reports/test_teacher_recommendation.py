"""What the report recommends where it is known how far the teacher is to be believed."""

from __future__ import annotations

import dataclasses
import shlex

import numpy as np
import pytest
from scipy import stats

from slgr_jax import testing
from slgr_jax.config import ReportConfig
from slgr_jax.reports import teacher_audit
from slgr_jax.reports.teacher_recommendation import _p, recommend
from slgr_jax.teacher.audit.accuracy import Agreement, interval
from slgr_jax.teacher.products import controls
from slgr_jax.testing import Constant, WorldConfig


def write_world(path, right):
    config = WorldConfig(n_users=300, n_items=120, history_max=20, reliability=Constant(right))
    return testing.write(testing.simulate(config), path, lists=15)


def audit(dataset, name):
    return teacher_audit.make(dataset, name, ReportConfig(), prices=(0.0, 0.0), seed=0)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("right") / "data", 1.0)


def test_a_teacher_that_is_right_is_trained_with(right):
    report = audit(right, "pairs")
    lines = recommend(report)
    assert len(lines) == 3
    assert "train with it" in lines[0]
    assert "hard negatives" not in lines[0]
    total = report.agreement[0]
    assert lines[1].startswith(
        f"Why: on all it is right on 100.0% of known pairs, item-item on {total.item_item:.1%}"
    )
    assert shlex.split(lines[2]) == [
        "slgr", "train", f"--data={right.path}", "--workdir=RUN", "--guidance=auto",
        "--teacher=pairs",
    ]  # fmt: skip
    assert teacher_audit.terminal(report).endswith("\n".join(lines))
    assert teacher_audit.as_json(report)["recommendation"] == lines
    assert all(line in teacher_audit.markdown(report) for line in lines)


def test_free_lists_are_held_against_hard_negatives(right):
    assert "hard negatives" in recommend(audit(right, "lists"))[0]


@pytest.mark.parametrize("control", ["popularity", "item_item"])
@pytest.mark.parametrize("product", ["pairs", "lists"])
def test_an_echo_of_the_data_is_left(right, product, control):
    report = audit(right, controls.ensure(right, product, control))
    lines = recommend(report)
    assert lines[0] == "Recommended: leave it."
    assert len(lines) == 2
    total = report.agreement[0]
    if total.low > 0.5:
        assert f"the data know that: item-item {total.item_item:.1%}" in lines[1]
    else:
        assert "no better than a coin" in lines[1]


def test_a_teacher_that_tosses_a_coin_is_left(tmp_path):
    dataset = write_world(tmp_path / "data", 0.5)
    for product in ("pairs", "lists"):
        lines = recommend(audit(dataset, product))
        assert lines[0] == "Recommended: leave it."
        assert "no better than a coin" in lines[1]


def test_an_unknown_teacher_is_left_to_validation(right):
    unknown = dataclasses.replace(audit(right, "pairs"), agreement=())
    assert "--guidance=auto" in recommend(unknown)[-1]
    assert "no pair whose right order is known" in recommend(unknown)[1]


def test_what_is_no_better_than_the_data_but_adds_to_them_meets_its_controls(right):
    report = dataclasses.replace(audit(right, "lists"), agreement=())
    value = report.value
    assert value.best.overall.low > 0
    row = agreement(np.linspace(0.5, 0.7, 40), np.full(40, 0.9))
    adds = dataclasses.replace(report, agreement=(row,))
    lines = recommend(adds)
    assert "see whether its controls add as much" in lines[0]
    assert f"added to {value.best.name} when scoring it gains" in lines[1]
    assert shlex.split(lines[2]) == [
        "slgr", "compare", "--quick", f"--data={right.path}", "--teacher=lists",
    ]  # fmt: skip
    overall = dataclasses.replace(value.best.overall, low=-0.1)
    best = dataclasses.replace(value.best, slices=(overall,))
    nothing = dataclasses.replace(value, free=(best,))
    assert recommend(dataclasses.replace(adds, value=nothing))[0] == "Recommended: leave it."


def agreement(accuracies, item_item, *, name="all", popularity=0.5):
    users = np.arange(accuracies.size)  # a pair each
    accuracy, low, high = interval(users, accuracies)
    gain, gain_low, gain_high = interval(users, accuracies - item_item)
    return Agreement(
        known="validation", slice=name, matched=False, leans=False, pairs=999,
        users=accuracies.size, accuracy=accuracy, low=max(low, 0.0), high=min(high, 1.0),
        popularity=popularity, item_item=float(item_item.mean()), gain=gain, gain_low=gain_low,
        gain_high=gain_high,
    )  # fmt: skip


def test_p_is_that_of_the_weaker_t_test():
    rng = np.random.default_rng(0)
    accuracies, item_item = rng.random(50) ** 0.1, rng.random(50)
    for other in (item_item, item_item * 0.1, item_item**0.1):
        expected = max(
            stats.ttest_1samp(accuracies - 0.5, 0, alternative="greater").pvalue,
            stats.ttest_rel(accuracies, other, alternative="greater").pvalue,
        )
        assert _p(agreement(accuracies, other)) == pytest.approx(expected, rel=1e-6)
    cut = agreement(np.repeat([0.0, 1.0], [1, 9]), np.zeros(10))  # its interval is past 1
    assert cut.high == 1.0
    assert _p(cut) == pytest.approx(
        stats.ttest_1samp([-0.5] + [0.5] * 9, 0, alternative="greater").pvalue
    )


def test_one_lucky_slice_of_many_is_no_reason(right):
    # Gains of p about .02 in one slice of ten: believed there, but not by who counts the slices.
    values = stats.norm.ppf((np.arange(40) + 0.5) / 40) * 0.1
    lucky = agreement(0.55 + values + 0.034, 0.55 + values[::-1] * 0, name="cold users")
    assert 0.01 < _p(lucky) < 0.04
    assert lucky.believed
    others = [agreement(0.55 + values, np.full(40, 0.55), name=f"s{i}") for i in range(9)]
    report = dataclasses.replace(audit(right, "pairs"), agreement=(*others, lucky))
    assert recommend(report)[0] == "Recommended: leave it."
    alone = dataclasses.replace(report, agreement=(lucky,))
    assert "cold users" in recommend(alone)[1]
    popular = dataclasses.replace(lucky, popularity=0.9)  # popularity knows better
    assert recommend(dataclasses.replace(report, agreement=(popular,)))[0].endswith("leave it.")
