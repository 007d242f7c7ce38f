"""benchmarks/throughput.py and scaling.py: data, bytes, turns, rows; no speed is asserted."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.models.backbones import reads_of
from slgr_jax.sampling.context import FIELDS, HISTORY
from slgr_jax.training import build
from slgr_jax.training.state import init_state

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts there import one another by plain name

import peers  # noqa: E402
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
    *("counted", "triples_per_step", "rows_per_triple", "rows_per_s"),
}
PEER_KEYS = {
    *(
        "peer_triples_per_s",
        "peer_rows_per_s",
        "peer_min",
        "peer_max",
        "peer_peak_mb",
        "peer_facts",
    ),
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
    run = throughput.Case("tiny", "mf", "pairwise", "float32", 64)
    experiment = build.build(run.config({}, str(tmp_path)), dataset)
    assert experiment.trainer.guidance.queries == 64
    assert experiment.arrays.guidance.teacher.items.size == 60 * 20


def test_histories_are_a_shuffle_of_each_users_pairs():
    pairs = synthetic.make(TINY)
    found = synthetic.moments(pairs)
    for user in range(60):
        mine = found[pairs.users == user]
        assert sorted(mine) == list(range(mine.size))
    assert not np.array_equal(found, synthetic.moments(pairs, seed=2))
    # The item of a user's first event is any of theirs: its rank in the row is uniform.
    counts = pairs.counts[pairs.users]
    row = np.arange(600) - np.searchsorted(pairs.users, pairs.users)
    assert (row / counts)[found == 0].mean() == pytest.approx(0.45, abs=0.12)


def test_items_have_one_to_three_distinct_categories():
    offsets, codes = synthetic.categories(3000)
    owners = np.repeat(np.arange(3000), np.diff(offsets))
    assert np.bincount(np.diff(offsets)).tolist() == pytest.approx([0, 1000, 1000, 1000], abs=100)
    assert len(set(zip(owners.tolist(), codes.tolist(), strict=True))) == codes.size
    assert np.bincount(codes).tolist() == pytest.approx([codes.size / 18] * 18, rel=0.25)


# --- the model of bytes --------------------------------------------------------------------------


BATCH = 16


def bytes_of_step(tmp_path, backbone, guidance="none", dtype="float32", **given):
    run = throughput.Case("tiny", backbone, guidance, dtype, BATCH).config(given, str(tmp_path))
    pairs = synthetic.make(TINY)
    dataset = synthetic_dataset.from_pairs(pairs, tmp_path, reads_of(run.model))
    synthetic_dataset.write_teacher(dataset)
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
    found = bytes_of_step(tmp_path, "mf", guidance, dtype, table_optimizer=optimizer)
    assert found / BATCH == expected


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
    own = {"loss": loss, "max_history": 5, "shared_negatives": 24, "table_optimizer": "adagrad"}
    assert bytes_of_step(tmp_path, "sasrec", **own) == rows * 2 * (64 + 64) * 4


def test_bytes_of_a_graph_step_by_hand(tmp_path):
    # Every user and every item: weights of 64 values, two moments of 64, a count.
    assert bytes_of_step(tmp_path, "lightgcn") == (60 + 40) * 2 * (3 * 64 + 1) * 4


def test_bytes_of_a_click_step_by_hand(tmp_path):
    # A row of 64 values and a first-order term for: the user; positive, negative and 5 events;
    # up to 3 categories of each of those 7.
    found = bytes_of_step(tmp_path, "deepfm", max_history=5, table_optimizer="sgd")
    assert found == BATCH * (1 + 7 + 7 * 3) * 2 * 65 * 4


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
    case = throughput.Case("tiny", backbone, "none", "float32", 8)
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
    knobs = throughput.peer_knobs(config.make_run("", ""))["knobs"]
    for backbone, (name, named) in peers.RECBOLE.items():
        assert name.lower() == {"mf": "bpr"}.get(backbone, backbone)
        assert all(value is not None for value in named(knobs).values())


def test_rows_of_histories_that_do_not_fit_are_refused(tmp_path):
    many = np.zeros(2_000_000, np.int32)
    job = {"backbone": "sasrec", "knobs": {"max_history": 50}}
    with pytest.raises(turns.Refused, match=r"2,000,000 interactions: 1\.2 GB .*=sasrec"):
        peers._check_rows(synthetic.Pairs(1, 1, many, many), job)
    peers._check_rows(synthetic.Pairs(1, 1, many, many), {**job, "knobs": {"max_history": 20}})


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
    text = throughput.render(rows)
    assert "implicit 9.9 on cpu, 1 threads, sgd, 10% of its triples skipped" in text
    assert "| tiny | mf " in text


def test_the_ratio_is_the_median_over_rounds():
    case = throughput.Case("tiny", "mf", "none", "float32", 32)
    mine = [turns.Turn(rate, 1.0) for rate in (10.0, 90.0, 20.0)]
    theirs = [turns.Turn(rate, 1.0) for rate in (5.0, 10.0, 10.0)]
    measured = throughput.Measured(
        case, config.RunConfig("", ""), {"rows_per_triple": 0}, mine, {"p": theirs}
    )
    row = throughput.peer_row(measured, "p", {"peak_mb": 1.0})
    assert row["peer_rows_per_s"] is None
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
        ("--guidance=none,maybe", "--guidance: maybe is not one of: none, pairwise"),
        ("--batch_sizes=2k", "--batch_sizes: 2k: expected integers"),
        ("--loss=softmax", "--loss=softmax makes no sense for --backbone=deepfm"),
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
        *("--sizes=ml100k", "--batch_size=64", "--steps=3", "--repeats=1", f"--json={out}"),
        *("--guidance=none,pairwise", "--table_dtype=bfloat16", "--table_optimizer=sgd"),
        "--backbone=mf",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["guidance"] for row in rows] == ["none", "pairwise"]
    assert [row["bytes_per_triple"] for row in rows] == [768, 1536]
    assert all(set(row) >= KEYS and row["peer"] is None for row in rows)


PLAN = """
    import sys
    sys.path.insert(0, {benchmarks!r})
    import throughput
    from slgr_jax import config, flags
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
    code = textwrap.dedent(PLAN.format(benchmarks=str(BENCHMARKS)))
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [tuple(row.split()) for row in done.stdout.splitlines()]


def test_without_arguments_every_backbone_is_measured_by_its_own_defaults():
    rows = planned()
    for size in ("ml100k", "large"):
        mine = [row for row in rows if row[0] == size]
        left_out = set(throughput.LEFT_OUT) if size == "large" else set()
        assert {row[1] for row in mine} == set(config.BACKBONES) - left_out
        assert sum(row[1] == "mf" for row in mine) == 3 * 2 * 2  # batches, dtypes, guidance
        assert len(mine) == 12 + len(config.BACKBONES) - 1 - len(left_out)
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
        *(f"--out={picture}", f"--json={out}", "--table_rows=300,600,100000000", "--vary=users"),
        *("--interactions=2000", "--repeats=1", "--seconds=0", "--table_optimizer=sgd"),
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())
    assert [row["users"] for row in rows] == [300, 600]
    assert [row["stated_bytes_per_row"] for row in rows] == [260, 260]
    assert "100,000,000 users: left out, 26.0 GB > --max_gb" in done.stdout


@pytest.mark.parametrize(("steps", "whole"), [(1, 64), (64, 64), (65, 128)])
def test_a_turn_is_made_of_whole_dispatches(steps, whole):
    assert worker.whole_dispatches(steps, 64) == whole
