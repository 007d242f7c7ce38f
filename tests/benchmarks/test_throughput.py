"""benchmarks/throughput.py and scaling.py: data, bytes, turns, rows; no speed is asserted."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from slgr_jax import config, runs
from slgr_jax.step import init_state

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts there import one another by plain name

import scaling  # noqa: E402
import synthetic  # noqa: E402
import synthetic_dataset  # noqa: E402
import throughput  # noqa: E402
import turns  # noqa: E402
import worker  # noqa: E402

TINY = synthetic.Size(users=60, items=40, interactions=600, fewest=2)
# What other programs may read out of --json.
KEYS = {
    *("size", "users", "items", "interactions", "backbone", "guidance", "dtype", "batch_size"),
    *("table_optimizer", "dim", "triples_per_s", "min", "max", "repeats", "bytes_per_triple"),
    *("gather_bandwidth", "bandwidth_share", "compile_s", "peak_mb", "device_peak_mb", "kernels"),
    *("devices", "platform", "cores", "versions", "peer"),
}
PEER_KEYS = {
    *("peer_triples_per_s", "peer_min", "peer_max", "peer_peak_mb", "peer_facts"),
    *("ratio", "ratio_min", "ratio_max"),
}


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [TINY, synthetic.SIZES["ml100k"]])
def test_pairs_are_distinct_sorted_and_as_many_as_asked_for(size):
    pairs = synthetic.make(size)
    keys = pairs.users.astype(np.int64) * size.items + pairs.items
    assert len(pairs) == size.interactions
    assert (np.diff(keys) > 0).all()
    assert pairs.items.max() < size.items
    assert pairs.counts.size == size.users
    assert pairs.counts.min() >= size.fewest


def test_the_seed_decides_the_pairs():
    other = synthetic.Size(**{**vars(TINY), "seed": 124})
    first, again, changed = (synthetic.make(size) for size in (TINY, TINY, other))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, changed.items)


def test_pairs_survive_saving(tmp_path):
    pairs = synthetic.make(TINY)
    pairs.save(tmp_path)
    found = synthetic.Pairs.load(tmp_path)
    assert (found.n_users, found.n_items) == (60, 40)
    assert np.array_equal(found.users, pairs.users)
    assert np.array_equal(found.items, pairs.items)


def test_activity_is_log_normal():
    size = synthetic.Size(users=50_000, items=1_000_000, interactions=50_000 * 1000, fewest=1)
    logs = np.log(synthetic.activity(np.random.default_rng(0), size))
    assert np.std(logs) == pytest.approx(1.15, rel=0.02)


def test_too_few_interactions_are_refused():
    with pytest.raises(ValueError, match="between 2 and 20"):
        synthetic.make(synthetic.Size(users=60, items=40, interactions=100, fewest=2))


def test_items_follow_the_power_law():
    ranks = np.arange(1000)
    weights = synthetic.weights(1000)
    np.testing.assert_allclose(weights, 1 / (ranks + 20), rtol=3e-4)
    drawn = synthetic._draw(np.random.default_rng(0), 2_000_000, 1000)
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=1000)[:100] / 2e6, (weights / weights.sum())[:100], rtol=0.05
    )


def test_both_ways_to_draw_without_replacement_are_that():
    # P(first a, then b) = w_a / W * w_b / (W - w_a); what counts is the set {a, b}.
    w = synthetic.weights(3) / synthetic.weights(3).sum()
    sets = {(a, b): w[a] * w[b] * (1 / (1 - w[a]) + 1 / (1 - w[b])) for a, b in [(0, 1), (0, 2)]}
    rng, users = np.random.default_rng(0), 40_000
    rejected = np.sort(synthetic._by_rejection(rng, np.full(users, 2), 3)).reshape(users, 2) % 3
    sorted_ = [np.sort(synthetic._by_sorting(rng, 0, 2, 3)) for _ in range(users)]
    for found in (rejected, np.array(sorted_)):
        for pair, chance in sets.items():
            assert (found == pair).all(axis=1).mean() == pytest.approx(chance, abs=0.01)


def test_the_teacher_is_one_that_training_accepts(tmp_path):
    dataset = synthetic_dataset.from_pairs(synthetic.make(TINY), tmp_path)
    synthetic_dataset.write_teacher(dataset)
    run = throughput.Case("tiny", "mf", "selective", "float32", 64)
    trainer, resident = runs.build(run.config(config.RunConfig("", ""), str(tmp_path)), dataset)
    assert trainer.plan.preferences == 64
    assert resident.teacher.items.size == 60 * 20


# --- the model of bytes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "dtype", "guidance", "expected"),
    [
        # A triple: 3 rows of 64 values and their slots, read and written.
        ("sgd", "float32", "none", 3 * 2 * 64 * 4),
        ("adagrad", "float32", "none", 3 * 2 * (64 + 64) * 4),
        ("sgd", "bfloat16", "none", 3 * 2 * 64 * 2),
        # As many preferences as triples, 3 rows each.
        ("rowwise_adagrad", "float32", "selective", 2 * 3 * 2 * (64 + 1) * 4),
    ],
)
def test_bytes_per_triple_by_hand(tmp_path, optimizer, dtype, guidance, expected):
    dataset = synthetic_dataset.from_pairs(synthetic.make(TINY), tmp_path)
    synthetic_dataset.write_teacher(dataset)
    base = config.RunConfig("", "", optimizer=config.OptimizerConfig(table_optimizer=optimizer))
    run = throughput.Case("tiny", "mf", guidance, dtype, 16).config(base, str(tmp_path))
    trainer, _ = runs.build(run, dataset)
    size = worker.row_bytes(trainer, init_state(trainer, 0))
    assert worker.bytes_per_triple(trainer, size) == expected


# --- turns ---------------------------------------------------------------------------------------

FAKE = """
    import sys
    sys.path.insert(0, {benchmarks!r})
    import turns

    def prepare(job):
        print("a library's chatter")
        if job["do"] == "refuse":
            raise turns.Refused("not today")
        if job["do"] == "break":
            raise KeyError("a defect")
        taken = []

        def turn():
            print("more chatter")
            taken.append(1)
            return turns.Turn(100.0 * len(taken), 2.0)

        return turns.Contestant({{"name": job["do"]}}, turn, lambda: {{"taken": len(taken)}})

    turns.serve(prepare)
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(textwrap.dedent(FAKE.format(benchmarks=str(BENCHMARKS))))
    return [sys.executable, str(path)]


def test_a_player_takes_turns_and_stays_alive_between_them(fake):
    with turns.Player(fake, {"do": "work"}) as player:
        assert player.facts == {"name": "work"}
        assert [player.turn().rate for _ in range(3)] == [50.0, 100.0, 150.0]
        found = player.finish()
    assert found["taken"] == 3
    assert 5 < found["peak_mb"] < 200


def test_a_player_that_refuses_says_why(fake):
    with pytest.raises(turns.Refused, match="not today"):
        turns.Player(fake, {"do": "refuse"})


def test_a_player_that_breaks_shows_its_traceback(fake):
    with pytest.raises(RuntimeError, match=r"(?s)status 1.*a defect"):
        turns.Player(fake, {"do": "break"})


def test_a_player_that_is_not_there_is_named():
    with pytest.raises(turns.Refused, match="/no/such/python cannot be run"):
        turns.Player(["/no/such/python"], {})


def test_turns_alternate():
    order = []

    class Named:
        def __init__(self, name):
            self.name = name

        def turn(self):
            order.append(self.name)
            return turns.Turn(1.0, 1.0)

    taken = turns.interleave([Named("a"), Named("b")], 3)
    assert order == ["a", "b"] * 3
    assert [len(one) for one in taken] == [3, 3]


def test_units_last_as_long_as_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def work(units):
        now[0] += 0.5 + 0.001 * units  # a start, then a millisecond a unit

    assert turns.units_for(0.0, work) == 1
    found = turns.units_for(10.0, work)
    assert 0.7 * 10 < 0.5 + 0.001 * found < 1.1 * 10


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
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "peer"))


def test_rows_say_everything_and_the_peer_takes_its_turns(fake_implicit):
    case = throughput.Case("tiny", "mf", "none", "float32", 32)
    rows = throughput.measure(
        [case],
        config.RunConfig("", ""),
        synthetic.make(TINY),
        repeats=2,
        seconds=0.02,
        steps=5,
        peers=["implicit"],
        peer_job={"dim": 64, "threads": 1, "batch_size": 0},
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
    text = throughput.render(rows)
    assert "implicit 9.9 on cpu, 1 threads, sgd, 10% of its triples skipped" in text
    assert "| tiny | mf " in text


def test_the_ratio_is_the_median_over_rounds():
    case = throughput.Case("tiny", "mf", "none", "float32", 32)
    mine = [turns.Turn(rate, 1.0) for rate in (10.0, 90.0, 20.0)]
    theirs = [turns.Turn(rate, 1.0) for rate in (5.0, 10.0, 10.0)]
    measured = throughput.Measured(case, config.RunConfig("", ""), {}, mine, {"p": theirs})
    row = throughput.peer_row(measured, "p", {"peak_mb": 1.0})
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (2.0, 2.0, 9.0)


def command(script, *arguments):
    line = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "implicit.py").write_text("raise ModuleNotFoundError('No module named implicit')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = command("throughput.py", "--sizes=ml100k", "--peer=implicit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'slgr_jax[peers]'" in done.stderr


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--peer=nobody", "--peer: nobody is not one of: implicit"),
        ("--sizes=huge", "--sizes: huge is not one of: ml100k, large"),
        ("--guidance=none,maybe", "--guidance: maybe is not one of: none, selective"),
        ("--batch_sizes=2k", "--batch_sizes: 2k: expected integers"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, text):
    done = command("throughput.py", flag)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {text}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_measures_lists_of_knobs(tmp_path):
    out = tmp_path / "rows.json"
    done = command(
        "throughput.py",
        *("--sizes=ml100k", "--batch_size=64", "--steps=3", "--repeats=1", f"--json={out}"),
        *("--guidance=none,selective", "--table_dtype=bfloat16", "--table_optimizer=sgd"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["guidance"] for row in rows] == ["none", "selective"]
    assert [row["bytes_per_triple"] for row in rows] == [768, 1536]
    assert all(set(row) >= KEYS and row["peer"] is None for row in rows)


# --- scaling -------------------------------------------------------------------------------------


def test_one_table_grows_at_a_time():
    users, items = (scaling.size_of(vary, 77, 1000) for vary in ("users", "items"))
    assert (users.users, users.items) == (77, 27_000)
    assert (items.users, items.items) == (138_000, 77)
    assert users.interactions == items.interactions == 1000


def test_memory_of_a_row_is_measured_against_the_smallest_size():
    rows = [
        {"users": users, "items": 5, "state_mb": state_mb, "stated_bytes_per_row": 260}
        for users, state_mb in ((10, 100.0), (10_010, 90.0), (1_000_010, 360.0))
    ]
    found = [row["measured_bytes_per_row"] for row in scaling.with_slopes(rows)]
    assert found == [None, None, pytest.approx(260.0)]  # 2.6 MB more cannot be told from noise


@pytest.mark.slow
def test_scaling_draws_and_prints(tmp_path):
    picture, out = tmp_path / "scaling.png", tmp_path / "rows.json"
    done = command(
        "scaling.py",
        *(f"--out={picture}", f"--json={out}", "--rows=300,600,100000000", "--vary=users"),
        *("--interactions=2000", "--repeats=1", "--seconds=0", "--table_optimizer=sgd"),
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())
    assert [row["users"] for row in rows] == [300, 600]
    assert [row["stated_bytes_per_row"] for row in rows] == [260, 260]
    assert "100,000,000 users: left out, 26.0 GB > --max_gb" in done.stdout
