"""--refit: a tuned run trained once more on training and validation, its gate frozen."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading

import jax
import numpy as np
import pytest
import worlds

import slgr_jax
from slgr_jax.config import BaselineConfig, SliceConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines
from slgr_jax.sampling import arrays, context
from slgr_jax.training import build, epochs, loop, multi_seed, refit, restore, run_directory

USERS, ITEMS = 24, 20
SMALL = {"dim": 8, "batch_size": 32, "epochs": 6, "patience": 0, "kernels": "xla", "lr": 0.3}
GUIDED = {"guidance": "pairwise", "teacher": "t", "lambda": 0.5, "gate_lr": 0.1}
REFERENCE = {"gate": "calibrated", "gate_inputs": "history,teacher,reference"}
KINDS = {
    "mf": {},
    "popularity": {"negatives": "popularity", "popularity_power": 0.5},
    "lightgcn": {"backbone": "lightgcn", "lr": 0.01},
    "sasrec": {"backbone": "sasrec", "layers": 1, "hidden": 8, "heads": 2, "max_history": 4},
    "rows": {"backbone": "deepfm", "mlp": (4,), "dropout": 0.0, "max_history": 4},
}


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with worlds.runs_on(1):
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A split with a teacher, and the data set whose training part is its first two."""
    root = tmp_path_factory.mktemp("split")
    pairs = np.random.default_rng(1).permutation(worlds.random_pairs(0, USERS, ITEMS, 8))
    held = len(pairs) // 4
    parts = pairs[2 * held :], pairs[:held], pairs[held : 2 * held]
    # Validation is later than training, so that both data sets order a history alike.
    sizes = {"n_users": USERS, "n_items": ITEMS, "parts_in_time": True}
    once = worlds.write_dataset(root / "split", *parts, **sizes)
    both, nothing = np.concatenate(parts[:2]), np.zeros((0, 2), np.int64)
    union = worlds.write_dataset(root / "union", both, nothing, parts[2], **sizes)
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(USERS), 6)
    listed = np.concatenate([rng.choice(ITEMS, 6, replace=False) for _ in range(USERS)])
    worlds.teach(once, users, listed, rng.random(users.size), unlisted="below")
    return once, union


def tuned_run(data, workdir: pathlib.Path, **knobs):
    slgr_jax.train(data.path, workdir, **{**SMALL, **knobs})
    return workdir


def served(workdir):
    return restore.restore_run(str(workdir)).serving


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_learned_is_the_union_and_what_is_counted_is_training(split):
    once, union = split
    view = once.with_validation()
    np.testing.assert_array_equal(view.train.users, union.train.users)
    np.testing.assert_array_equal(view.train.items, union.train.items)
    assert len(view.valid) == 0
    assert view.test is once.test
    np.testing.assert_array_equal(view.learned_popularity, union.popularity)
    np.testing.assert_array_equal(view.popularity, once.popularity)
    np.testing.assert_array_equal(view.history, once.history)
    slices = SliceConfig()
    for name in ("cold_users", "tail_items"):
        ours, theirs = (getattr(data.slices(slices), name) for data in (view, once))
        np.testing.assert_array_equal(ours, theirs)
    # What a gate reads is what it was taught on.
    facts = [
        arrays.make_facts(data, np.zeros(USERS), np.zeros(ITEMS)) for data in (view, once, union)
    ]
    assert_same(facts[0], facts[1])
    assert not np.allclose(facts[0].log_history, facts[2].log_history)
    ours, theirs = (context.make_histories(data) for data in (view, union))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("mf", "popularity") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_refitting_is_training_on_the_union_to_the_bit(split, tmp_path, kind):
    once, union = split
    run = tuned_run(once, tmp_path / "tuned", **KINDS[kind])
    progress = refit.config_of(str(run), "x").train
    slgr_jax.train(None, tmp_path / "refit", refit=run)
    count = json.loads((tmp_path / "refit/config.json").read_text())["train"]["epochs"]
    assert count == progress.epochs == outcome(run).best_epoch
    knobs = {**SMALL, **KINDS[kind], "epochs": count}
    slgr_jax.train(union.path, tmp_path / "union", **knobs)
    assert_same(served(tmp_path / "refit"), served(tmp_path / "union"))


def outcome(workdir):
    from slgr_jax.training import checkpoint

    saved = checkpoint.Checkpoints(str(workdir), writable=False)
    progress = saved.progress()
    saved.close()
    return progress


@pytest.fixture(scope="module")
def references(split, tmp_path_factory):
    return tuned_run(split[0], tmp_path_factory.mktemp("reference") / "run", seed=3)


@pytest.fixture(scope="module")
def guided(split, references, tmp_path_factory):
    """A tuned run with a supervised gate that reads a reference run, and its refit."""
    root = tmp_path_factory.mktemp("guided")
    knobs = {**GUIDED, **REFERENCE, "reference_runs": str(references), "hard_negatives": 4}
    run = tuned_run(split[0], root / "tuned", **knobs)
    slgr_jax.train(None, root / "refit", refit=run)
    return run, root / "refit"


def test_the_gate_is_the_runs_best_and_learns_no_more(guided):
    run, again = guided
    assert_same(served(again).guidance, served(run).guidance)
    state = restore.restore_run(str(again), "last").serving
    assert_same(state.guidance, served(run).guidance)
    fresh = build.build(run_directory.read_config(str(run)), dataset_lib.load(run_data(run)))
    trainer = fresh.trainer
    start = trainer.guidance.init(jax.random.key(0), trainer.backbone)
    moved = [np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in zip(
        jax.tree.leaves(start), jax.tree.leaves(served(run).guidance), strict=True)]  # fmt: skip
    assert max(moved) > 0.01  # or the test could not tell a frozen gate from a fresh one


def run_data(workdir):
    return run_directory.read_config(str(workdir)).data


def test_no_validation_item_is_a_negative_and_none_is_labelled(guided):
    run = run_directory.read_config(str(guided[1]))
    data = restore.load_data(run)
    made = build.build(run, data)
    gate, teacher = made.arrays.guidance.gate, made.arrays.guidance.teacher
    assert gate.labels is None
    learned = data.positives(("train",))
    held = data.as_split.positives(("valid",))
    # A list's completed entries are its own and hard negatives; those at the floor are the latter.
    offsets, items = np.asarray(teacher.offsets), np.asarray(teacher.items)
    floor = np.asarray(teacher.scores).min()
    hard = np.asarray(teacher.scores) == floor
    owners = np.repeat(np.arange(USERS), np.diff(offsets))
    assert hard.any()
    assert not learned.contains(owners[hard], items[hard]).any()
    of_run = build.build(
        run_directory.read_config(str(guided[0])), data.as_split
    ).arrays.guidance.teacher
    hard = np.asarray(of_run.scores) == np.asarray(of_run.scores).min()
    owners = np.repeat(np.arange(USERS), np.diff(np.asarray(of_run.offsets)))
    assert held.contains(owners[hard], np.asarray(of_run.items)[hard]).any()


def test_only_test_is_evaluated_and_what_is_seen_is_not_recommended(guided, tmp_path):
    run, again = guided
    evaluation = slgr_jax.evaluate([run, again], out=tmp_path)
    assert set(evaluation.runs[1].parts) == {"test"}
    assert evaluation.runs[1].gate is not None
    text = evaluation.table()
    assert "learned from validation too" in text
    slices = [each.parts["test"].slices for each in evaluation.runs]
    for name in ("overall", "cold_users", "warm_users", "tail_items"):
        assert slices[0][name]["n"] == slices[1][name]["n"]
    written = json.loads((again / "metrics.json").read_text())
    assert "valid" not in written
    assert written["thresholds"]["masked"] == {"test": ["train", "valid"]}
    loaded = slgr_jax.load(again)
    with pytest.raises(ConfigError, match="validation is its training data"):
        loaded.evaluate("valid")

    split_data = dataset_lib.load(run_data(run))
    seen = split_data.positives(("train", "valid"))
    lists = loaded.recommend(k=ITEMS - int(seen.counts.max()))
    for user, ids in zip(lists.users, lists.items, strict=True):
        items = {int(item[1:]) for item in ids}
        assert not items & set(seen.row(int(user[1:])).tolist())
    vectors = loaded.vectors()
    scores = loaded.scores(["u3", "u5"], ["i2", "i7"])
    np.testing.assert_allclose(
        np.sum(vectors.users[[3, 5]] * vectors.items[[2, 7]], axis=1), scores, rtol=1e-5
    )
    found = slgr_jax.inspect(workdir=again)
    assert not found.faults
    assert f"refit of {run}" in str(found)
    with pytest.raises(ConfigError, match="is a refit, which has learned validation"):
        slgr_jax.train(split_data.path, tmp_path / "x", **SMALL, **GUIDED, **REFERENCE,
                       reference_runs=str(again))  # fmt: skip
    with pytest.raises(ConfigError, match="rows of it may be evaluated"):
        slgr_jax.train(split_data.path, tmp_path / "y", **SMALL, init_from=str(again))


def test_resumed_and_sharded_refits_are_the_same(guided, tmp_path):
    run, again = guided
    config = refit.config_of(str(run), str(tmp_path / "parts"), {"checkpoint_every_s": 0.0})
    stop, real = threading.Event(), epochs.close_epoch

    def after_one(*arguments):
        stop.set()
        return real(*arguments)

    data = restore.load_data(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "close_epoch", after_one)
        with jax.transfer_guard("allow"), run_directory.opened(config, data) as may_write:
            first = loop._train_one(build.build(config, data), stop, may_write)
    assert first.status == "interrupted"
    assert first.epoch == 1
    assert loop.train(config).status == "finished"
    assert_same(served(tmp_path / "parts"), served(again))

    with worlds.runs_on(4):
        sharded = refit.config_of(str(run), str(tmp_path / "four"), {"table_shards": 2})
        loop.train(sharded)
    for a, b in zip(*map(jax.tree.leaves, (served(tmp_path / "four"), served(again))), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.slow
def test_seeds_together_are_each_alone(guided, tmp_path):
    run, again = guided
    group = [refit.config_of(str(run), str(tmp_path / f"s{s}"), {"seed": s}) for s in (0, 1)]
    multi_seed.train_seeds(group)
    alone = dataclasses.replace(group[1], workdir=str(tmp_path / "alone"))
    loop.train(alone)
    for workdir, other in ((tmp_path / "s0", again), (tmp_path / "s1", tmp_path / "alone")):
        for a, b in zip(*map(jax.tree.leaves, (served(workdir), served(other))), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
        assert_same(served(workdir).guidance, served(run).guidance)


def test_what_cannot_be_refitted_is_refused(split, guided, tmp_path):
    once, union = split
    run, again = guided
    with pytest.raises(ConfigError, match=r"keeps the settings of that run \(--lr: 0.3 -> 0.1"):
        slgr_jax.train(None, tmp_path / "a", refit=run, lr=0.1)
    with pytest.raises(ConfigError, match="--epochs=99: a refit has as many"):
        slgr_jax.train(None, tmp_path / "a", refit=run, epochs=99)
    with pytest.raises(ConfigError, match="is a refit itself"):
        slgr_jax.train(None, tmp_path / "a", refit=again)
    with pytest.raises(ConfigError, match="is --workdir itself"):
        slgr_jax.train(None, run, refit=run)
    with pytest.raises(ConfigError, match="is not a run"):
        slgr_jax.train(None, tmp_path / "a", refit=tmp_path / "nowhere")
    bare = tuned_run(union, tmp_path / "bare", epochs=1)
    with pytest.raises(ConfigError, match="had nothing to validate on"):
        slgr_jax.train(None, tmp_path / "a", refit=bare)
    config = refit.config_of(str(run), str(tmp_path / "a"))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=77))
    with pytest.raises(ConfigError, match="--epochs=77"):
        build.build(longer, restore.load_data(longer))
    with pytest.raises(ConfigError, match="missing --data"):
        slgr_jax.train(None, tmp_path / "a")

    # A run that went on is another run: its refit is not gone on with.
    short = tuned_run(once, tmp_path / "short", epochs=1)
    slgr_jax.train(None, tmp_path / "of_short", refit=short)
    tuned_run(once, short, epochs=2)
    with pytest.raises(ConfigError, match=r"--refit: .* was at step"):
        slgr_jax.train(None, tmp_path / "of_short", refit=short)


def test_baselines_beside_a_refit_are_chosen_by_validation_and_fitted_on_both(split, tmp_path):
    once, union = split
    options = BaselineConfig(ease_lambdas=(1.0, 30.0))
    ease = baselines.make_baseline("ease", options)
    plain, again = (baselines.tune(ease, data) for data in (once, once.with_validation()))
    assert plain.settings == again.settings
    assert plain.tried == again.tried
    (direct,) = ease.fit(union, [plain.settings])
    np.testing.assert_allclose(again.fitted.state.weights, direct.state.weights, atol=1e-6)
    popular = baselines.tune(baselines.make_baseline("popular", options), once.with_validation())
    np.testing.assert_array_equal(popular.fitted.state, union.popularity)


def test_features_of_interactions_stay_with_their_interactions(tmp_path):
    """Validation among training in time: the rows of both are put in order, and their features."""
    train = np.array([[0, 1], [0, 2], [1, 3]])
    valid, test = np.array([[0, 3], [1, 1]]), np.array([[1, 2]])
    split = worlds.write_dataset(tmp_path / "d", train, valid, test, n_users=2, n_items=4)
    hours = features_lib.numeric("hour", features_lib.INTERACTION, np.arange(6.0), np.arange(6) < 3)
    view = dataclasses.replace(split, features=(hours,)).with_validation()
    of = {
        (int(u), int(i)): hour
        for part, begin in (("train", 0), ("valid", 3), ("test", 5))
        for hour, (u, i) in enumerate(
            zip(split.part(part).users, split.part(part).items, strict=True), begin
        )
    }
    got = view.features[0].column.to_pylist()
    users = np.concatenate([view.train.users, view.test.users])
    items = np.concatenate([view.train.items, view.test.items])
    assert got == [of[int(u), int(i)] for u, i in zip(users, items, strict=True)]
    assert got != sorted(got)  # user 0's validation comes before user 1's training
