"""benchmarks/speed/throughput.py: bytes, what is counted, rows; no speed is asserted."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import ClassVar

import cases
import numpy as np
import peers
import pytest
import rates_table
import synthetic
import synthetic_dataset
import throughput
import turns
import worker
import worlds

from slgr_jax import config
from slgr_jax.config import knobs
from slgr_jax.models.backbones import reads_of
from slgr_jax.sampling.context import FIELDS, HISTORY
from slgr_jax.training import build
from slgr_jax.training.state import init_state

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"


TINY = synthetic.Size(users=60, items=40, interactions=600, fewest=2)
# What other programs may read out of --json.
KEYS = {
    "size",
    "users",
    "items",
    "interactions",
    "backbone",
    "guidance",
    "dtype",
    "batch_size",
    "table_optimizer",
    "dim",
    "triples_per_s",
    "min",
    "max",
    "repeats",
    "bytes_per_triple",
    "gather_bandwidth",
    "bandwidth_share",
    "compile_s",
    "peak_mb",
    "device_peak_mb",
    "kernels",
    "devices",
    "platform",
    "cores",
    "versions",
    "peer",
    "counted",
    "triples_per_step",
    "rows_per_triple",
    "rows_per_s",
}
PEER_KEYS = {
    "peer_triples_per_s",
    "peer_rows_per_s",
    "peer_min",
    "peer_max",
    "peer_peak_mb",
    "peer_facts",
    "ratio",
    "ratio_min",
    "ratio_max",
}


# --- the model of bytes --------------------------------------------------------------------------


BATCH = 16


def bytes_of_step(tmp_path, backbone, guidance="none", dtype="float32", **given):
    run = cases.Case("tiny", backbone, guidance, dtype, BATCH).config(given, str(tmp_path))
    pairs = synthetic.make(TINY)
    dataset = synthetic_dataset.from_pairs(pairs, tmp_path, reads_of(run.model))
    synthetic_dataset.write_teachers(dataset)
    experiment = build.build(run, dataset)
    trainer = experiment.trainer
    size = worker.row_bytes(trainer, init_state(trainer, 0))
    return worker.bytes_per_step(worker.rows_named(trainer, experiment.arrays), size)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "guidance", "expected"),
    [
        # A triple: 3 rows of 64 values and their slots, read and written.
        ("sgd", "float32", "none", 3 * 2 * 64 * 4),
        ("adagrad", "float32", "none", 3 * 2 * (64 + 64) * 4),
        ("sgd", "bfloat16", "none", 3 * 2 * 64 * 2),
        # As many preferences as triples, 3 rows each.
        ("rowwise_adagrad", "float32", "pairwise", 2 * 3 * 2 * (64 + 1) * 4),
    ],
)
def test_bytes_per_triple_by_hand(tmp_path, optimizer, dtype, guidance, expected):
    of_step = bytes_of_step(tmp_path, "mf", guidance, dtype, table_optimizer=optimizer)
    assert of_step / BATCH == expected


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        # The catalogue; of a window's events every one is in it.
        ("softmax", 40),
        # 5 events before each window's last one, and that; with a negative for each of 5 places.
        ("bce", BATCH * (5 + 1 + 5)),
        ("sampled_softmax", BATCH * (5 + 1) + 24),
    ],
)
def test_bytes_of_a_sequence_step_by_hand(tmp_path, loss, rows):
    given = {"loss": loss, "max_history": 5, "shared_negatives": 24, "table_optimizer": "adagrad"}
    assert bytes_of_step(tmp_path, "sasrec", **given) == rows * 2 * (64 + 64) * 4


def test_bytes_of_a_graph_step_by_hand(tmp_path):
    # Every user and every item: weights of 64 values, two moments of 64, a count.
    assert bytes_of_step(tmp_path, "lightgcn") == (60 + 40) * 2 * (3 * 64 + 1) * 4


def test_bytes_of_a_click_step_by_hand(tmp_path):
    # A row of 64 values and a first-order term for: the user; positive, negative and 5 events;
    # up to 3 categories of each of those 7.
    of_step = bytes_of_step(tmp_path, "deepfm", max_history=5, table_optimizer="sgd")
    assert of_step == BATCH * (1 + 7 + 7 * 3) * 2 * 65 * 4


# --- what is counted -----------------------------------------------------------------------------


def even_pairs():
    """24 users with 6 items each, of 40."""
    users = np.repeat(np.arange(24, dtype=np.int32), 6)
    return synthetic.Pairs(24, 40, users, (users + 5 * np.arange(144) % 30).astype(np.int32) % 40)


@pytest.mark.parametrize(
    ("backbone", "counted", "per_lane", "rows"),
    [("lightgcn", "triples", 1, 0), ("sasrec", "places", 5, 0), ("dcn", "triples", 1, 3)],
)
def test_a_turn_counts_triples_or_predicted_places(tmp_path, backbone, counted, per_lane, rows):
    # The window of a user's last event has the 5 before it; it predicts all but the first of 6.
    case = cases.Case("tiny", backbone, "none", "float32", 8)
    small = {"dim": 4, "layers": 1, "hidden": 4, "mlp": (4,), "max_history": 5}
    run = case.config({**small, "negatives_per_positive": 2}, str(tmp_path))
    dataset = synthetic_dataset.from_pairs(even_pairs(), tmp_path, reads_of(run.model))
    experiment = build.build(run, dataset, worlds.one_device())
    stepper = worker.Stepper(experiment.trainer, experiment.arrays)
    assert stepper.turn(3).triples == 3 * 8 * per_lane
    assert (case.counted, worker.rows_per_triple(experiment.trainer)) == (counted, rows)


def test_what_recbole_trains_on_is_counted_alike():
    masks = {"MASK_INDEX": np.array([[0, 0, 3], [0, 4, 9]])}  # padded with 0
    assert peers.counted("bert4rec", masks, 1) == 3
    assert peers.counted("sasrec", range(20), 1) == 20
    assert peers.counted("lightgcn", range(20), 1) == 20
    assert peers.counted("din", range(20), 1) == 10
    assert peers.counted("deepfm", range(20), 3) == 5


def test_recbole_reads_the_histories_and_categories_that_we_train_on(tmp_path):
    pairs = synthetic.make(TINY)
    dataset = synthetic_dataset.from_pairs(pairs, tmp_path, {HISTORY, FIELDS})
    peers._write_atomic(pairs, tmp_path / "pairs", moments=True, fields=True)
    lines = (tmp_path / "pairs" / "pairs.inter").read_text().splitlines()
    assert lines[0].split("\t") == ["user_id:token", "item_id:token", "timestamp:float"]
    rows = sorted((int(u), int(t), int(i)) for u, i, t in (line.split() for line in lines[1:]))
    part = dataset.train
    ours = zip(*(x.tolist() for x in (part.users, part.timestamps, part.items)), strict=True)
    assert rows == list(ours)  # by user, then time: no two events of a user share a moment
    assert len({(user, moment) for user, moment, _ in rows}) == 600
    lines = (tmp_path / "pairs" / "pairs.item").read_text().splitlines()
    assert lines[0].split("\t") == ["item_id:token", "class:token_seq"]
    theirs = [line.split("\t")[1].split(" ") for line in lines[1:]]
    assert theirs == dataset.items.column("categories").to_pylist()


def test_every_backbone_has_its_namesake_in_recbole():
    assert tuple(sorted(peers.RECBOLE)) == tuple(sorted(config.BACKBONES))
    knobs = cases.peer_knobs(config.make_run("", ""))["knobs"]
    for backbone, (name, settings) in peers.RECBOLE.items():
        assert name.lower() == {"mf": "bpr"}.get(backbone, backbone)
        assert all(value is not None for value in settings(knobs).values())


def test_rows_of_histories_that_do_not_fit_are_refused(tmp_path):
    many = np.zeros(2_000_000, np.int32)
    job = {"backbone": "sasrec", "knobs": {"max_history": 50}}
    with pytest.raises(turns.Refused, match=r"2,000,000 interactions: 1\.2 GB .*=sasrec"):
        peers._check_rows(synthetic.Pairs(1, 1, many, many), job)
    peers._check_rows(synthetic.Pairs(1, 1, many, many), {**job, "knobs": {"max_history": 20}})


# --- rows ----------------------------------------------------------------------------------------

PEER = """
    import time

    class BayesianPersonalizedRanking:
        def __init__(self, **knobs):
            assert knobs["factors"] == 64 and knobs["num_threads"] == 1

        def fit(self, matrix, show_progress, callback):
            for epoch in range(self.iterations):
                time.sleep(0.001)
                callback(epoch, 0.01, 0, 60)  # 600 triples in 10 ms, one in ten skipped
"""


@pytest.fixture
def fake_implicit(tmp_path, monkeypatch):
    """An `implicit` that does 60,000 triples a second, in the path of child processes."""
    package = tmp_path / "peer" / "implicit" / "cpu"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "bpr.py").write_text(textwrap.dedent(PEER))
    about = tmp_path / "peer" / "implicit-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: implicit\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "peer"), prepend=os.pathsep)


def test_rows_say_everything_and_the_peer_takes_its_turns(fake_implicit):
    case = cases.Case("tiny", "mf", "none", "float32", 32)
    rows = cases.measure(
        [case],
        {},
        synthetic.make(TINY),
        repeats=2,
        seconds=0.02,
        steps=5,
        peers=["implicit"],
        peer_job={"threads": 1, "batch_size": 0},
    )
    (row,) = json.loads(json.dumps(rows))
    assert set(row) >= KEYS | PEER_KEYS
    assert (row["size"], row["users"], row["interactions"]) == ("tiny", 60, 600)
    assert row["min"] <= row["triples_per_s"] <= row["max"]
    assert row["steps_per_turn"] == 5
    assert row["bandwidth_share"] == pytest.approx(
        3072 * row["triples_per_s"] / row["gather_bandwidth"]
    )
    assert row["peer_triples_per_s"] == pytest.approx(60_000)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["ratio_max"] == pytest.approx(row["max"] / 60_000)
    assert row["peer_facts"]["versions"] == {"implicit": "9.9"}
    assert row["peer_facts"]["skipped"] == pytest.approx(0.1)
    text = rates_table.render(rows)
    assert "implicit 9.9 on cpu, 1 threads, sgd, 10% of its triples skipped" in text
    assert "| tiny | mf " in text


def test_the_ratio_is_the_median_over_rounds():
    case = cases.Case("tiny", "mf", "none", "float32", 32)
    ours = [turns.Turn(rate, 1.0) for rate in (10.0, 90.0, 20.0)]
    theirs = [turns.Turn(rate, 1.0) for rate in (5.0, 10.0, 10.0)]
    measured = cases.Measured(
        case, config.RunConfig("", ""), {"rows_per_triple": 0}, ours, {"p": theirs}
    )
    row = cases.peer_row(measured, "p", {"peak_mb": 1.0})
    assert row["peer_rows_per_s"] is None
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (2.0, 2.0, 9.0)


class FakePlayer:
    """A worker that does 100 triples a second without guidance; with it 50, 40, 25, ..."""

    order: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, command, job):
        run = knobs.from_json(config.RunConfig, job["config"], "the job's config")
        self._case = (run.guidance.guidance, run.sampler.batch_size)
        self._rates = iter((100.0,) * 3 if self._case[0] == "none" else (50.0, 40.0, 25.0))
        self.facts = {"rows_per_triple": 0, "bytes_per_triple": 1.0, "gather_bandwidth": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def turn(self):
        self.order.append(self._case)
        return turns.Turn(next(self._rates), 1.0)

    def finish(self):
        return {}


def test_guided_and_plain_steps_take_turns(monkeypatch):
    """The cost of a guided step is a median over rounds, told with its spread."""
    monkeypatch.setattr(cases, "Player", FakePlayer)
    monkeypatch.setattr(FakePlayer, "order", [])
    both = [
        cases.Case("tiny", "mf", guidance, "float32", batch)
        for batch in (32, 64)
        for guidance in ("none", "pairwise")
    ]
    rows = cases.measure(both, {}, synthetic.make(TINY), repeats=3, seconds=0.0)
    rounds = [[("none", batch), ("pairwise", batch)] * 3 for batch in (32, 64)]
    assert FakePlayer.order == [*rounds[0], *rounds[1]]
    assert "plain_steps" not in rows[0]
    for row in (rows[1], rows[3]):
        costs = (row["plain_steps_min"], row["plain_steps"], row["plain_steps_max"])
        assert costs == (2.0, 2.5, 4.0)

    FakePlayer.order.clear()
    (row,) = cases.measure(both[1:2], {}, synthetic.make(TINY), repeats=3, seconds=0.0)
    assert "plain_steps" not in row  # nothing to compare with


def command(script, *arguments):
    line = [sys.executable, str(SPEED / script), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "implicit.py").write_text("raise ModuleNotFoundError('No module named implicit')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = command("throughput.py", "--sizes=ml100k", "--peer=implicit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'slgr_jax[peers]'" in done.stderr


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--peer=nobody", "--peer: nobody"),
        ("--sizes=vast", "--sizes: vast"),
        ("--guidance=none,maybe", "--guidance: maybe"),
        ("--batch_sizes=2k", "--batch_sizes: 2k"),
        ("--loss=softmax", "--loss=softmax"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, text):
    done = command("throughput.py", flag)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {text}")
    assert done.stderr.count("\n") == 1


def test_a_peer_that_does_not_train_the_backbone_is_one_line():
    done = command("throughput.py", "--peer=implicit", "--backbone=sasrec")
    assert done.returncode == 2
    assert "implicit train mf, not sasrec" in done.stderr


@pytest.mark.slow
def test_the_command_measures_lists_of_knobs(tmp_path):
    out = tmp_path / "rows.json"
    done = command(
        "throughput.py",
        "--sizes=ml100k",
        "--batch_size=64",
        "--steps=3",
        "--repeats=1",
        f"--json={out}",
        "--guidance=none,pairwise",
        "--table_dtype=bfloat16",
        "--table_optimizer=sgd",
        "--backbone=mf",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["guidance"] for row in rows] == ["none", "pairwise"]
    assert [row["bytes_per_triple"] for row in rows] == [768, 1536]
    assert rows[1]["plain_steps_min"] == rows[1]["plain_steps"] > 0  # of one round
    assert all(set(row) >= KEYS and row["peer"] is None for row in rows)


PLAN = """
    import sys
    sys.path.insert(0, {speed!r})
    import throughput
    from slgr_jax import config
    from slgr_jax.cli import flags
    for section in config.sections().values():
        if section not in (config.SliceConfig, config.EvaluationConfig):
            flags.define_section(section)
    throughput.define_flags()
    flags.FLAGS(sys.argv)
    for size in ("ml100k", "large"):
        for case in throughput.cases_from_flags(size, flags.FLAGS.peer):
            run = case.config(throughput.given_knobs(), "", compared=bool(flags.FLAGS.peer))
            optimizer, history = run.optimizer.table_optimizer, run.model.history_fields
            print(size, *run.model.backbone.split(), run.sampler.batch_size, case.dtype, optimizer,
                  run.guidance.guidance, history)
"""


def planned(*arguments):
    """Of each case: size, backbone, batch size, dtype, optimiser, guidance, history fields."""
    code = textwrap.dedent(PLAN.format(speed=str(SPEED)))
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [tuple(row.split()) for row in done.stdout.splitlines()]


def test_without_arguments_every_backbone_is_measured_by_its_own_defaults():
    rows = planned()
    for size in ("ml100k", "large"):
        of_size = [row for row in rows if row[0] == size]
        left_out = set(throughput.LEFT_OUT) if size == "large" else set()
        assert {row[1] for row in of_size} == set(config.BACKBONES) - left_out
        assert sum(row[1] == "mf" for row in of_size) == 3 * 2 * 2  # batches, dtypes, guidance
        assert len(of_size) == 12 + len(config.BACKBONES) - 1 - len(left_out)
    assert ("ml100k", "sasrec", "128", "float32", "lazy_adam", "none", "True") in rows
    assert ("ml100k", "deepfm", "2048", "float32", "lazy_adam", "none", "True") in rows
    assert ("large", "lightgcn", "65536", "float32", "lazy_adam", "none", "True") in rows
    assert ("large", "mf", "8192", "bfloat16", "adagrad", "pairwise", "True") in rows


def test_a_peer_is_compared_on_what_it_trains():
    rows = planned("--peer=recbole", "--table_optimizer=sgd")
    assert {row[1] for row in rows if row[0] == "ml100k"} == set(config.BACKBONES)
    assert {row[1] for row in rows if row[0] == "large"} == {"mf", "lightgcn"}
    assert {row[3:6] for row in rows} == {("float32", "sgd", "none")}
    # RecBole's click models have no fields of a history; its DIN is made of one.
    history = {row[1]: row[6] for row in rows}
    assert {history[name] for name in config.CLICK_BACKBONES if name != "din"} == {"False"}
    assert history["din"] == "True"
    assert {row[1] for row in planned("--peer=implicit")} == {"mf"}
    given = planned("--peer=recbole", "--backbone=dcn", "--history_fields", "--batch_sizes=64,32")
    assert {(row[0], row[2], row[6]) for row in given} == {
        (size, batch, "True") for size in ("ml100k", "large") for batch in ("64", "32")
    }
