"""A job of 2 processes x 2 devices, for real: its start, its votes, what a lost process does."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import worlds
from jobs import Job, by_flags, by_slurm

import slgr_jax as sl
from slgr_jax import cluster
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.mesh import UserShards
from slgr_jax.reports import run_evaluation
from slgr_jax.training import loop

pytestmark = pytest.mark.slow

SMALL = {"dim": 8, "batch_size": 32, "patience": 0, "steps_per_dispatch": 3}
# `slgr train`, where a second has twice its length.
SKEWED = """
import sys, time
real = time.monotonic
time.monotonic = lambda: 2 * real()
from slgr_jax.cli import main
main.main(["slgr", "train", *sys.argv[1:]])
"""


def flags_of(dataset: Dataset, workdir: pathlib.Path | str, **knobs: object) -> list[str]:
    values = {**SMALL, "data": dataset.path, "workdir": workdir, **knobs}
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    world = worlds.random_dataset(tmp_path_factory.mktemp("data") / "d", ratings=True)
    _teach_everybody(world)
    return world


def _teach_everybody(world: Dataset) -> None:
    """A teacher with six items of each of the 40 users."""
    rng = np.random.default_rng(0)
    items = np.concatenate([np.sort(rng.permutation(30)[:6]) for _ in range(40)])
    users = np.repeat(np.arange(40), 6)
    worlds.teach(
        world, users.astype(np.int32), items.astype(np.int32), rng.random(240).astype(np.float32)
    )


def curve(workdir: pathlib.Path) -> np.ndarray:
    """[epochs, numbers] what the log has of each epoch, without what a clock put there."""
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    names = sorted(records[0].keys() - {"time", "triples_per_s"})
    assert any(name.startswith("valid/") for name in names)
    return np.array([[record[name] for name in names] for record in records])


def same_curve(workdir: pathlib.Path, dataset: Dataset, tmp_path: pathlib.Path, **knobs) -> None:
    """The curve of a run is that of one device."""
    with worlds.runs_on(1):
        whole = tmp_path / f"{workdir.name}-whole"
        loop.train(make_run(str(dataset.path), str(whole), **{**SMALL, **knobs}))
    np.testing.assert_allclose(curve(workdir), curve(whole), rtol=2e-4, atol=2e-4)


def test_a_signal_to_one_stops_both_at_a_step_and_one_process_goes_on(dataset, tmp_path):
    """Guided; by flags; process 1 has a clock of its own, and a checkpoint is due all the time."""
    workdir = tmp_path / "run"
    knobs = {"guidance": "pairwise", "teacher": "t", "lambda": 0.5}
    job = Job(
        *flags_of(dataset, workdir, epochs=100_000, checkpoint_every_s=0.2, **knobs),
        each=by_flags(),
        code=("", SKEWED),
    )
    job.wait_for_epochs(workdir, 4)
    job.processes[1].send_signal(signal.SIGTERM)
    first, second = job.end()
    assert (first.status, second.status) == (75, 75), (first, second)
    table = first.out.splitlines()[:3]
    assert table[0].split() == [
        *("process", "host", "PID", "devices", "device", "memory", "host", "memory")
    ]
    assert [line.split()[0] for line in table[1:]] == ["0", "1"]
    assert all("2 x cpu" in line for line in table[1:])
    assert "interrupted after epoch" in first.out
    assert "epoch" not in second.out, "one process speaks for all"

    done = len(curve(workdir))
    with worlds.runs_on(1):
        run = make_run(str(dataset.path), str(workdir), **{**SMALL, **knobs, "epochs": done + 2})
        assert loop.train(run).epoch == done + 2
    same_curve(workdir, dataset, tmp_path, epochs=done + 2, **knobs)


def test_a_killed_process_ends_the_other_and_what_is_left_goes_on(dataset, tmp_path):
    """As Slurm starts it; four devices of one process go on."""
    workdir = tmp_path / "run"
    flags = flags_of(dataset, workdir, epochs=100_000, checkpoint_every_s=0)
    job = Job(*flags, environ=by_slurm())
    job.wait_for_epochs(workdir, 3)
    job.processes[1].kill()
    begin = time.monotonic()
    first, second = job.end()
    assert (first.status, second.status) == (75, -signal.SIGKILL), (first, second)
    assert time.monotonic() - begin < 60, (
        "the heartbeat's time; a closed connection is seen at once"
    )
    assert len(first.errors) == 1, first.err
    assert "error: process 1 (" in first.errors[0]
    assert "the same command goes on from it" in first.errors[0]

    done = len(curve(workdir))
    with worlds.runs_on(4):
        loop.train(make_run(str(dataset.path), str(workdir), **{**SMALL, "epochs": done + 1}))
    same_curve(workdir, dataset, tmp_path, epochs=done + 1)


# Runs of one job, one after another, as a program of one's own would: by name, their knobs.
ADAGRAD = {"table_optimizer": "adagrad"}  # which no lane without an interaction moves
RUNS = {
    "lightgcn": {"backbone": "lightgcn", "table_shards": 4},
    "by_user": {
        "user_shards": 8,
        "guidance": "pairwise",
        "teacher": "t",
        "gate": "calibrated",
        "table_shards": 4,  # devices of both processes rank the same users
    },
    # On data whose users are numbered by eight shards, of which each run's shard has two.
    "by_shard": {"user_shards": 4, "guidance": "pairwise", "teacher": "t"},
    "sasrec": {"backbone": "sasrec", "max_history": 8, "layers": 1, "dropout": 0.0},
    "histories_by_user": {
        "backbone": "sasrec",
        "max_history": 8,
        "layers": 1,
        "user_shards": 8,
        **ADAGRAD,
    },
    "graph_by_user": {"backbone": "lightgcn", "layers": 2, "user_shards": 8, **ADAGRAD},
    "rows_by_user": {
        "backbone": "deepfm",
        "mlp": (8,),
        **ADAGRAD,
        "rows": "rated",
        "rating_threshold": 3.0,
        "user_shards": 8,
    },
    "deepfm": {"backbone": "deepfm", "mlp": (8,), "dropout": 0.0, "rows": "sampled"},
    "begun": {"backbone": "mf"},  # by one device, and gone on with
}
TRAIN = """
import json, sys
import slgr_jax
from slgr_jax.data import own_users, shards
data, out, runs, *job = sys.argv[1:]
read, open_shards, opened = own_users.load, shards.open_shards, []
def load(*args, **more):
    opened.clear()
    dataset = read(*args, **more)
    files = sorted({path for path in opened if path.startswith("train/")})
    print("read", len(dataset.train), *files, flush=True)
    return dataset
def open_noted(root, files, *args, **more):
    opened.extend(file.path for file in files)
    return open_shards(root, files, *args, **more)
own_users.load, shards.open_shards = load, open_noted
job = dict(flag[2:].split("=") for flag in job)
job |= {name: int(job[name]) for name in ("processes", "process_id")}
for name, knobs in json.loads(runs).items():
    slgr_jax.train(knobs.pop("data", data), f"{out}/{name}", **knobs, **job)
"""


def test_every_kind_of_backbone_has_the_numbers_of_one_device(dataset, tmp_path):
    """1 x 1 = 2 x 2, and 1 x 4 where rows are scored; a graph's tables are split over both, and
    users over all devices."""
    runs = {name: {**SMALL, "epochs": 2, **knobs} for name, knobs in RUNS.items()}
    by_shard = worlds.dataset_by_shard(tmp_path, 8)
    _teach_everybody(by_shard)
    runs["by_shard"]["data"] = str(by_shard.path)
    with worlds.runs_on(1):
        begun = {**runs["begun"], "epochs": 1}
        loop.train(make_run(str(dataset.path), str(tmp_path / "2x2" / "begun"), **begun))
    job = Job(
        *(str(dataset.path), str(tmp_path / "2x2"), json.dumps(runs)),
        each=by_flags(),
        code=(TRAIN, TRAIN),
    )
    alone = dict.fromkeys(runs, 1) | {"by_shard": 4}
    for name, devices in (*alone.items(), ("deepfm", 4)):
        with worlds.runs_on(devices):
            workdir = tmp_path / f"1x{devices}" / name
            knobs = {**runs[name], "table_shards": 1}
            loop.train(make_run(knobs.pop("data", str(dataset.path)), str(workdir), **knobs))
    ended = job.end()
    assert [x.status for x in ended] == [0, 0], ended
    for name in runs:
        expected = curve(tmp_path / f"1x{alone[name]}" / name)
        assert len(expected) == 2
        for workdir in tmp_path.glob(f"*x*/{name}"):
            np.testing.assert_allclose(curve(workdir), expected, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (tmp_path / "1x4" / "deepfm").is_dir()
    assert all((tmp_path / "2x2" / name).is_dir() for name in runs)
    # Only where users are split, each process reads the interactions of its own alone; and where
    # they are numbered by shards, from files of their own.
    read = [[x.split() for x in end.out.splitlines() if x.startswith("read ")] for end in ended]
    split = [name for name, knobs in runs.items() if "user_shards" in knobs]
    for name, *lines in zip(split, *read, strict=True):
        data = by_shard if name == "by_shard" else dataset
        first, second = (int(count) for _, count, *_ in lines)
        assert first + second == len(data.train)
        assert abs(first - second) < len(data.train) / 8
        every = {file.path for file in data.manifest.files["train"]}
        one, other = (set(files) for _, _, *files in lines)
        assert one | other == every
        assert one & other == (every if data is dataset else set())


# `slgr evaluate`, which says what this process holds of users.
EVALUATE = """
import sys
from slgr_jax.training import restore
read = restore.restore_run
def restore_run(*args, **more):
    run = read(*args, **more)
    histories = run.context.histories
    of_users = run.serving.values["user"] if histories is None else histories.trained
    parts = of_users.addressable_shards
    print("holds", len(run.dataset.train), sum(x.data.shape[0] for x in parts), flush=True)
    return run
restore.restore_run = restore_run
from slgr_jax.cli import main
main.main(["slgr", "evaluate", *sys.argv[1:]])
"""


def same_evaluation(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """The files of one evaluation have the numbers of another, to rounding."""

    def read(path: pathlib.Path) -> list[tuple[str, dict[str, object]]]:
        metrics = json.loads((path / "metrics.json").read_text())
        slices = [
            (f"{part} {x}", metrics[part][x]) for part in ("valid", "test") for x in metrics[part]
        ]
        rows = pq.read_table(path / "per_user.parquet").to_pylist()
        return [*slices, *((f"{row['part']} {row['user']}", row) for row in rows)]

    for (name, got), (wanted, values) in zip(read(workdir), read(expected), strict=True):
        assert name == wanted
        for metric, value in values.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
            assert got[metric] == close, (name, metric)


def test_two_processes_evaluate_what_one_does(dataset, tmp_path):
    """Of a run whose users are split each its own, with its part of the tables or of the histories
    alone; of another one all. The first of them writes."""
    sequence = {"backbone": "sasrec", "layers": 1, "max_history": 4, "hidden": 8}
    runs: dict[str, dict[str, object]] = {
        "split": {"user_shards": 8, "table_shards": 4},
        "whole": {},
        "sequence": {"user_shards": 8, "table_shards": 2, **sequence},
    }
    for name, knobs in runs.items():
        with worlds.runs_on(4):
            run = make_run(str(dataset.path), str(tmp_path / name), **SMALL, epochs=1, **knobs)
            loop.train(run)
        shutil.copytree(tmp_path / name, tmp_path / f"alone-{name}")
    places = [f"--workdir={tmp_path / name}" for name in runs]
    job = Job(*places, each=by_flags(), code=(EVALUATE, EVALUATE))
    with worlds.runs_on(1):
        for name in runs:
            run_evaluation.evaluate_run(str(tmp_path / f"alone-{name}"), name)
    first, second = job.end()
    assert (first.status, second.status) == (0, 0), (first, second)
    assert "Baselines are left out" in first.out
    assert "ndcg" not in second.out, "one process speaks for all"
    for name in runs:
        same_evaluation(tmp_path / name, tmp_path / f"alone-{name}")

    said = [[x.split() for x in end.out.splitlines()] for end in (first, second)]
    lines = [[words for words in of_one if words[:1] == ["holds"]] for of_one in said]
    rows = UserShards.deal(dataset.history, 8).table_rows
    (*split, whole, sequence), (*other_split, other_whole, other_sequence) = lines
    for own, other in zip([*split, sequence], [*other_split, other_sequence], strict=True):
        assert int(own[1]) + int(other[1]) == len(dataset.train)
        assert own[2] == other[2] == str(rows // 2)
    assert whole[1] == other_whole[1] == str(len(dataset.train))


def test_what_is_evaluated_in_one_process_alone_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "processes", lambda: 2)
    for knobs, named in (
        ({"baselines": "popular"}, "--baselines=popular are fitted on all interactions"),
        ({"blend": "t"}, "--blend=t adds to scores over whole tables"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}, and this is a job of 2 processes; "):
            sl.evaluate("run", **knobs)


def test_an_error_of_one_is_the_same_line_on_both(dataset, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset.path, damaged)
    shard = next((damaged / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    flags = flags_of(dataset, tmp_path / "run", epochs=1)
    cluster = by_flags()
    ended = Job(*flags, each=(cluster[0], [*cluster[1], f"--data={damaged}"])).end()
    assert [x.status for x in ended] == [2, 2], ended
    assert ended[0].errors == ended[1].errors
    assert "process 1 on " in ended[0].errors[0]
    assert str(shard) in ended[0].errors[0]


def test_a_directory_that_is_not_shared_is_one_line_on_both(dataset, tmp_path):
    cwd = (tmp_path / "a", tmp_path / "b")
    for path in cwd:
        path.mkdir()
    flags = flags_of(dataset, "/proc/self/cwd/run", epochs=1)
    ended = Job(*flags, each=by_flags(), cwd=cwd).end()
    assert [x.status for x in ended] == [2, 2], ended
    assert ended[0].errors == ended[1].errors
    assert "is not the directory that process 0" in ended[0].errors[0]
    assert not any((cwd[0] / "run").glob(".shared*"))


def test_unequal_devices_are_one_line_on_both(dataset, tmp_path):
    flags = flags_of(dataset, tmp_path / "run", epochs=1)
    ended = Job(*flags, each=by_flags(), environ=({}, {"JAX_NUM_CPU_DEVICES": "3"})).end()
    assert [x.status for x in ended] == [2, 2], ended
    assert ended[0].errors == ended[1].errors
    assert "process 0 has 2 devices and process 1" in ended[0].errors[0]
    assert "has 3; give every process as many" in ended[0].errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_never_comes_is_named(dataset, tmp_path, absent):
    flags = flags_of(dataset, tmp_path / "run", epochs=1, start_timeout_s=1)
    cluster = by_flags()
    cluster[absent] = ["--help"]
    ended = Job(*flags, each=cluster).end()[1 - absent]
    assert ended.status == 2, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ("of 2 processes 1 did not come" if absent else "found no process 0") in ended.err
