"""Files of evaluated runs: metrics.json, the values of each user, and how they are put in place."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import worlds
from evaluated import random_runs

from slgr_jax import files
from slgr_jax.config import SliceConfig
from slgr_jax.evaluation import results
from slgr_jax.evaluation.ranking_metrics import UserValues


def test_metrics_json_is_valid_and_holds_the_contract(tmp_path):
    (run,) = random_runs(tmp_path, ("a",))
    results.write_run(run)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "a" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=refuse)
    assert set(metrics) == {"valid", "test", "thresholds", "definitions"}
    for part in ("valid", "test"):
        assert {"overall", "cold_users", "tail_items"} <= set(metrics[part])
        for values in metrics[part].values():
            names = {"recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr", "auc", "n"}
            assert names <= set(values)
        assert metrics[part]["overall"]["n"] == run.parts[part].slices["overall"]["n"] > 0
    assert metrics["thresholds"]["masked"] == {"valid": ["train"], "test": ["train", "valid"]}
    assert metrics["thresholds"]["n_tail_items"] == 8
    # A slice without users: the metrics are null, n is 0.
    assert metrics["test"]["history<=5"]["n"] == 0
    assert metrics["test"]["history<=5"]["ndcg@10"] is None
    assert sorted(os.listdir(tmp_path / "a")) == ["metrics.json", "per_user.parquet"]


def test_per_user_table_has_external_ids_and_reproduces_the_means(tmp_path):
    (run,) = random_runs(tmp_path, ("a",))
    results.write_run(run)
    table = pq.read_table(tmp_path / "a" / "per_user.parquet").to_pylist()
    slices = run.parts["test"].slices
    for kind, name in (("all", "overall"), ("tail", "tail_items"), ("head", "head_items")):
        rows = [row for row in table if row["part"] == "test" and row["items"] == kind]
        assert len(rows) == slices[name]["n"] > 0
        assert np.mean([row["ndcg@10"] for row in rows]) == pytest.approx(slices[name]["ndcg@10"])
        assert sum(row["n_relevant"] for row in rows) == slices[name]["n_relevant"]
    cold = [row for row in table if row["part"] == "test" and row["items"] == "all" and row["cold"]]
    assert np.mean([row["mrr"] for row in cold]) == pytest.approx(slices["cold_users"]["mrr"])
    history = {f"u{u}": int(n) for u, n in enumerate(run.dataset.history)}
    assert all(history[row["user"]] == row["history"] for row in table)


def test_an_undefined_value_is_null_in_the_table(tmp_path):
    (run,) = random_runs(tmp_path, ("a",))
    users = run.parts["test"].users["all"]
    values = users.values | {"auc": np.where(np.arange(users.users.size) == 2, np.nan, 0.5)}
    result = dataclasses.replace(
        run.parts["test"], users={"all": dataclasses.replace(users, values=values)}
    )
    table = results.user_table(dataclasses.replace(run, parts={"test": result}))
    assert table["auc"].null_count == 1
    assert table["auc"][2].as_py() is None


def test_users_of_labelled_rows_are_written_like_users_of_a_ranking(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "data")
    slices = dataset.slices(SliceConfig())
    users = np.array([3, 0, 7], np.int32)
    every = UserValues(users, np.array([1, 2, 1]), {"auc": np.array([0.5, np.nan, 1.0])})
    tail = UserValues(users[:1], np.array([1]), {"auc": np.array([0.25])})
    path = results.write_row_users(
        tmp_path / "run", dataset, slices, {"test": {"all": every, "tail": tail}}
    )
    assert path == tmp_path / "run" / "rows_per_user.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [(row["items"], row["user"], row["auc"]) for row in rows] == [
        ("all", "u3", 0.5),
        ("all", "u0", None),
        ("all", "u7", 1.0),
        ("tail", "u3", 0.25),
    ]
    assert {row["part"] for row in rows} == {"test"}
    assert [row["n_relevant"] for row in rows] == [1, 2, 1, 1]
    assert [row["cold"] for row in rows[:3]] == slices.cold_users[users].tolist()
    assert [row["history"] for row in rows[:3]] == dataset.history[users].tolist()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail(path: pathlib.Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.atomically(target, fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]
    with target.open() as reader:
        files.atomically(target, lambda path: path.write_text("new"))
        assert reader.read() == "old"  # a reader keeps the file it opened, whole
    assert target.read_text() == "new"
