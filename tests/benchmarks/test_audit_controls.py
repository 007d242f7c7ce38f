"""benchmarks/quality/audit_controls.py: control lists, the joined split, tests, one whole audit."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import worlds
from scipy import stats

from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.ranking_metrics import PartData, PartResult, UserValues
from slgr_jax.teacher.products import preferences

QUALITY = pathlib.Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # scripts there import one another by plain name

import audit_controls  # noqa: E402
import audit_rows  # noqa: E402
import audit_teachers  # noqa: E402

# User: training items; the list that the teacher wrote, best first.
TRAIN = {0: (0, 1), 1: (1, 2), 2: (0, 3), 3: (4,)}
LISTS = {0: (1, 5, 6), 1: (5, 0), 2: (5, 6, 3)}

# Rows of the table in README and BELIEVE.
PRINTED = (
    "none",
    "EASE itself",
    "none_train_valid",
    "EASE, train + validation",
    "training_items",
    "ease",
    "consensus",
    "global",
    "llm",
)


@pytest.fixture(name="dataset")
def _dataset(tmp_path):
    train = np.array([(user, item) for user, items in TRAIN.items() for item in items])
    valid = np.array([(0, 2), (1, 4)])
    test = np.array([(0, 5), (2, 6), (3, 0)])
    dataset = worlds.write_dataset(tmp_path / "data", train, valid, test, n_users=4, n_items=7)
    _write_lists(dataset, LISTS)
    return dataset


def _write_lists(dataset, lists, unlisted="below"):
    rows = [(user, item, 1 / rank) for user in lists for rank, item in enumerate(lists[user], 1)]
    users, items, scores = (np.array(column) for column in zip(*rows, strict=True))
    table = audit_teachers._scores(
        users.astype(np.int32), items.astype(np.int32), scores.astype(np.float32)
    )
    provenance = preferences.Provenance(unlisted=unlisted)
    preferences.write_product(dataset, "llm", table, provenance=provenance)


def _best_first(dataset, control):
    """User -> items of the control's list, best first, ties by item."""
    teacher = preferences.load(dataset, audit_teachers.ensure(dataset, "llm", control))
    lists = {}
    for user in np.flatnonzero(np.diff(teacher.offsets)).tolist():
        rows = slice(teacher.offsets[user], teacher.offsets[user + 1])
        order = np.lexsort((teacher.items[rows], -teacher.scores[rows]))
        lists[user] = tuple(teacher.items[rows][order].tolist())
    return lists


def test_echo_is_what_a_user_interacted_with(dataset):
    assert _best_first(dataset, "no_echo") == {0: (5, 6), 1: (5, 0), 2: (5, 6)}


def test_consensus_counts_votes_and_leaves_training_items_out(dataset):
    # Votes: 5 three, 6 two, 0 and 1 and 3 one each; lists as long as the LLM's without echo.
    assert _best_first(dataset, "consensus") == {0: (5, 6), 1: (5, 6), 2: (5, 6)}


def test_training_items_are_those_of_listed_users(dataset):
    assert _best_first(dataset, "training_items") == {user: TRAIN[user] for user in LISTS}


def test_ease_lists_are_its_best_scores_outside_training(dataset):
    x = np.zeros((4, 7))
    for user, items in TRAIN.items():
        x[user, list(items)] = 1
    lists = _best_first(dataset, "ease")
    ways = []
    for l2 in (10, 50, 100, 200, 400, 1000, 2000):  # the grid that validation chooses from
        inverse = np.linalg.inv(x.T @ x + l2 * np.eye(7))
        weights = -inverse / np.diag(inverse)[None, :]
        np.fill_diagonal(weights, 0)
        scores = np.where(x > 0, -np.inf, x @ weights)
        order = np.argsort(-scores, axis=1, kind="stable")
        ways.append({user: tuple(map(int, order[user, :2])) for user in LISTS})
    assert lists in ways


def test_a_product_of_ratings_is_refused(tmp_path, dataset):
    other = worlds.write_dataset(
        tmp_path / "other", *([np.array([(0, 0), (1, 1)])] * 3), n_users=2, n_items=2
    )
    _write_lists(other, {0: (1,), 1: (0,)}, unlisted="unknown")
    with pytest.raises(ConfigError, match=r"--teacher=llm has unlisted=unknown"):
        audit_teachers.ensure(other, "llm", "ease")


def _pairs(part):
    return set(zip(part.users.tolist(), part.items.tolist(), strict=True))


def test_joining_moves_validation_but_for_one_row(tmp_path, dataset):
    joined = audit_teachers.join_validation(dataset, tmp_path / "joined")
    train = {(user, item) for user, items in TRAIN.items() for item in items}
    left = _pairs(joined.valid)
    assert len(left) == 1
    assert left < {(0, 2), (1, 4)}
    assert _pairs(joined.train) == train | {(0, 2), (1, 4)} - left
    assert _pairs(joined.test) == _pairs(dataset.test)
    np.testing.assert_array_equal(joined.user_ids, dataset.user_ids)


def _result(users, values, cold):
    masks = {"cold_users": cold, "warm_users": ~cold}
    data = PartData(*[None] * 6, masks=type("Masks", (), {"users": masks})())
    table = UserValues(users, np.ones_like(users), {"ndcg@10": values})
    means = {
        "overall": {"ndcg@10": float(values.mean())},
        "cold_users": {"ndcg@10": float(values[cold[users]].mean())},
        "tail_items": {"ndcg@10": float(values.mean())},
    }
    return PartResult(means, {"all": table, "tail": table}, data, 0)


def test_differences_are_paired_over_seeds_and_over_users():
    rng = np.random.default_rng(0)
    users, cold = np.array([3, 1, 0]), np.array([True, False, False, True])
    first, second = rng.random((3, 3)), rng.random((3, 3))
    rows = [
        audit_rows.Row(name, "", [_result(users, values, cold) for values in each])
        for name, each in (("llm", first), ("other", second))
    ]
    by_slice = audit_rows.tests(rows, 3)["other"]
    paired = stats.ttest_rel(first.mean(axis=1), second.mean(axis=1))
    over_users = stats.ttest_rel(first.mean(axis=0), second.mean(axis=0))
    assert by_slice["overall"]["difference"] == pytest.approx(first.mean() - second.mean())
    assert by_slice["overall"]["p_seeds"] == pytest.approx(paired.pvalue)
    assert by_slice["overall"]["p_users"] == pytest.approx(over_users.pvalue)
    cold_users = first[:, [0, 2]].mean() - second[:, [0, 2]].mean()
    assert by_slice["cold_users"]["difference"] == pytest.approx(cold_users)
    assert by_slice["overall"]["p_users_holm"] >= by_slice["overall"]["p_users"]


def test_an_unknown_arm_is_named():
    with pytest.raises(ConfigError, match=r"--arms: nothing is not one of: none"):
        _ = audit_controls.AuditConfig(arms="none,nothing").asked


@pytest.mark.parametrize("page", ["README.md", "benchmarks/BELIEVE.md"])
def test_the_printed_table_is_that_of_the_results(page):
    """Row by row, in the order of `PRINTED`: overall / cold / tail to four digits."""
    root = QUALITY.parents[1]
    lines = (root / page).read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if "Last.fm, 27" in line)
    columns = ("lastfm", "books", "ml")
    means = [
        {
            row["arm"]: row["mean"]
            for row in json.loads((root / f"benchmarks/results/audit_{name}.json").read_text())[
                "rows"
            ]
        }
        for name in columns
    ]
    for arm, line in zip(PRINTED, lines[start + 2 :], strict=False):
        printed = [cell.strip() for cell in line.split("|")[2:-1]]
        for cell, by_arm in zip(printed, means, strict=True):
            if arm not in by_arm:
                assert cell == "not run"
                continue
            slices = ("overall", "cold_users", "tail_items")
            assert cell == " / ".join(f"{by_arm[arm][part]:.4f}"[1:] for part in slices), arm


@pytest.mark.slow
def test_a_whole_audit(tmp_path):
    pairs = worlds.random_pairs(0, 10, 10, 8)
    kinds = np.arange(len(pairs)) % 8
    dataset = worlds.write_dataset(
        tmp_path / "data",
        pairs[kinds < 5],
        pairs[kinds == 5],
        pairs[kinds > 5],
        n_users=10,
        n_items=10,
    )
    _write_lists(dataset, {user: (user % 7, (user + 3) % 7) for user in range(10)})
    out = tmp_path / "out"
    command = [sys.executable, str(QUALITY / "audit_controls.py"), f"--data={dataset.path}"]
    command += ["--teacher=llm", f"--out={out}", "--seeds=2", "--epochs=2", "--eval_every=1"]
    arms = ["none", "none_train_valid", "llm", "training_items"]
    command += ["--constant_lambdas=0.1", "--triples=16", f"--arms={','.join(arms)}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads((out / "audit.json").read_text())
    baselines = ["popular", "EASE itself", "EASE, train + validation"]
    assert [row["arm"] for row in facts["rows"]] == [*arms, *baselines]
    assert (out / "audit.md").read_text().count("\n| ") == len(facts["rows"]) + 1
