"""Lists and vectors that a job of 2 processes x 2 devices writes are those of one process."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import worlds
from jobs import Job, by_flags
from safetensors.numpy import load_file

import slgr_jax as sl
from slgr_jax import cluster
from slgr_jax.config import make_run
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.training import loop

SMALL = {"dim": 8, "batch_size": 32, "patience": 0, "epochs": 1, "layers": 1, "max_history": 4}
# Of --user_shards each process reads what belongs to its own users; but of the last, whose features
# all read.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"table_shards": 2},
    "split": {"user_shards": 8, "table_shards": 4, "item_bias": True},
    "by_shard": {"user_shards": 8},  # whose users are numbered by shards
    "sequence": {"user_shards": 8, "table_shards": 2, "backbone": "sasrec", "hidden": 8},
    "deepfm": {"user_shards": 8, "backbone": "deepfm", "features": "all", "mlp": (8,)},
}
FORMATS = {"whole": "npy", "split": "parquet", "by_shard": "safetensors", "sequence": "parquet"}
# Calls of a program of one's own, one after the other, in blocks of few users; the last one as a
# command.
SERVE = """
import json, sys
import slgr_jax
from slgr_jax.cli import main
from slgr_jax.serving import export, recommendation_files
recommendation_files.ROWS, recommendation_files.BATCH, export._BLOCK = 1, 8, 8
out, calls, *job = sys.argv[1:]
given = dict(flag[2:].split("=") for flag in job)
given |= {name: int(given[name]) for name in ("processes", "process_id")}
for name, workdir, arguments in json.loads(calls):
    print(getattr(slgr_jax, name)(workdir, **arguments, **given), flush=True)
flags = [f"--workdir={workdir}", "--users=all", f"--out={out}/command.csv", "--k=3", *job]
main.main(["slgr", "recommend", *flags])
"""
# The same, where a process sees other files.
RECOMMEND = """
import sys
from slgr_jax.cli import main
main.main(["slgr", "recommend", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    hours = np.arange(430) % 5 / 2.0
    feature = features_lib.numeric("hour", "interaction", hours, np.arange(430) < 258)
    path = tmp_path_factory.mktemp("data") / "d"
    return worlds.random_dataset(path, n_users=43, ratings=True, features=[feature])


def _train(dataset: Dataset, workdir: pathlib.Path, **knobs: Any) -> None:
    rows = {"rows": "rated", "rating_threshold": 3.0} if "mlp" in knobs else {}
    run = {**SMALL, **rows, "table_optimizer": "adagrad", "pooled_auc": False, **knobs}
    with worlds.runs_on(4):
        loop.train(make_run(str(dataset.path), str(workdir), **run))


def _calls(root: pathlib.Path, out: pathlib.Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(function, run, arguments) of everything that is compared."""
    filters = {"allow": str(root / "allow.csv"), "deny": str(root / "deny.txt"), "unknown": "skip"}
    some = {"users": str(root / "users.txt"), "k": 4, **filters}
    noon = {"users": "all", "context": {"hour": 1.5}, "out": str(out / "noon.parquet")}
    calls: list[tuple[str, str, dict[str, Any]]] = [("recommend", "deepfm", noon)]
    for name in RUNS:
        lists = {"users": "all", "k": 25, "out": str(out / f"{name}.parquet")}
        calls.append(("recommend", name, lists))
        if name in FORMATS:
            export = {"out": str(out / name), "format": FORMATS[name]}
            calls.append(("export", name, export))
    calls.append(("recommend", "split", {**some, "out": str(out / "some.csv")}))
    seen = {"users": "u3,u17", "mask_seen": False, "checkpoint": "last"}
    calls.append(("recommend", "sequence", {**seen, "out": str(out / "seen.jsonl")}))
    return [(name, str(root / run), arguments) for name, run, arguments in calls]


def _vectors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    if (folder / "vectors.safetensors").exists():
        return load_file(folder / "vectors.safetensors")
    if (folder / "users.npy").exists():
        return {name: np.load(folder / f"{name}.npy") for name in ("users", "items")}
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("users", "items")}
    return {name: np.array(table["vector"].to_pylist(), "f4") for name, table in tables.items()}


def _rows(path: pathlib.Path) -> tuple[list[tuple[str, str, int]], list[float]]:
    """(user, item, rank) of each row, and its score."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        head, *lines = path.read_text().replace('"', "").splitlines()
        rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    keys = [(row["user"], row["item"], int(row["rank"])) for row in rows]
    return keys, [float(row["score"]) for row in rows]


@pytest.mark.slow
def test_two_processes_write_what_one_does(dataset, tmp_path):
    by_shard = worlds.dataset_by_shard(tmp_path / "data", 8)
    for name, knobs in RUNS.items():
        _train(by_shard if name == "by_shard" else dataset, tmp_path / name, **knobs)
    (tmp_path / "users.txt").write_text("u40\nu3\nnobody\nu17\nu3\nu0\n")
    (tmp_path / "deny.txt").write_text("i4\ni7\n")
    pairs = [f"{user},i{item}\n" for user in ("u3", "u17", "u40") for item in range(3, 20)]
    (tmp_path / "allow.csv").write_text("user,item\n" + "".join(pairs))

    alone, together = tmp_path / "alone", tmp_path / "together"
    calls = json.dumps(_calls(tmp_path, together))
    job = Job(str(together), calls, each=by_flags(), code=(SERVE, SERVE))
    with worlds.runs_on(1):
        for name, workdir, arguments in _calls(tmp_path, alone):
            getattr(sl, name)(workdir, **arguments)
        sl.recommend(tmp_path / "sequence", "all", alone / "command.csv", k=3)
    first, second = job.end()
    assert (first.status, second.status) == (0, 0), (first, second)

    lists = sorted(path.name for path in alone.iterdir() if path.is_file())
    assert lists == sorted(path.name for path in together.iterdir() if path.is_file())
    assert len(lists) == len(RUNS) + 4
    for name in lists:
        (rows, scores), (expected, values) = (_rows(folder / name) for folder in (together, alone))
        assert rows == expected, name
        np.testing.assert_allclose(scores, values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert {user for user, *_ in _rows(together / "some.csv")[0]} == {"u3", "u17", "u40"}
    for name in FORMATS:
        for kind, vectors in _vectors(alone / name).items():
            got = _vectors(together / name)[kind]
            np.testing.assert_allclose(got, vectors, rtol=1e-5, atol=1e-6, err_msg=name)
        said = [json.loads((x / name / "manifest.json").read_text()) for x in (alone, together)]
        assert said[0]["vectors"] == said[1]["vectors"]
    lines = [end.out.splitlines() for end in (first, second)]
    said = [[line for line in of_one if line.startswith("wrote ")] for of_one in lines]
    assert said[0][:-1] == said[1], "calls return the same on both; the command speaks on one"
    assert said[0][-1].startswith(f"wrote {together}/command.csv: 43 users, 129 rows")
    assert not list(together.glob(".*")), "no temporary files are left"


@pytest.mark.slow
def test_a_file_that_one_process_sees_otherwise_is_the_same_line_on_both(dataset, tmp_path):
    _train(dataset, tmp_path / "run", user_shards=8)
    deny = tmp_path / "deny.txt"
    deny.write_text("i4\n")
    flags = [f"--workdir={tmp_path / 'run'}", "--users=all", f"--out={tmp_path / 'out.csv'}"]
    places = by_flags()
    each = [[*places[0], f"--deny={deny}"], [*places[1], f"--deny={tmp_path / 'gone.txt'}"]]
    ended = Job(*flags, each=each, code=(RECOMMEND, RECOMMEND)).end()
    assert [x.status for x in ended] == [2, 2], ended
    assert ended[0].errors == ended[1].errors
    assert "process 1 on " in ended[0].errors[0]
    assert "gone.txt is not a file" in ended[0].errors[0]
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("recommend", {"histories": "new.csv"}, r"^--histories=new.csv folds users in, by whole"),
        ("recommend", {"users": "all", "new_items": "x.npz"}, r"^--new_items=x.npz puts items"),
        ("export", {"new_items": "x.npz"}, r"^--new_items=x.npz puts items behind whole tables"),
        ("export", {"index": "usearch"}, r"^--index=usearch is built from all items' vectors"),
        (
            "export",
            {"scorer": True},
            r"^--scorer is a file of whole tables, and this is a job of 2",
        ),
    ],
)
def test_what_takes_whole_tables_is_left_to_one_process(monkeypatch, call, arguments, message):
    monkeypatch.setattr(cluster, "processes", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        getattr(sl, call)("run", out="out.csv", **arguments)
