"""--init_from: what a run begins with, to the bit; what it refuses; resuming without RUN."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest
import worlds

import slgr_jax
from slgr_jax import config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError, UserError
from slgr_jax.models.embedding_table import RowFormat
from slgr_jax.teacher.products import carry
from slgr_jax.training import agreement, build, loop, multi_seed, programs, restore
from slgr_jax.training import state as state_lib

START = 1_500_000_000
SMALL = {
    "dim": 8,
    "batch_size": 32,
    "epochs": 3,
    "patience": 0,
    "steps_per_dispatch": 3,
    "kernels": "xla",
}


def prepared(root: pathlib.Path, name: str, rows: list[tuple[int, int]], first: int, **knobs):
    path = root / f"{name}.csv"
    lines = [f"u{u:02},i{i:02},{first + 60 * k}" for k, (u, i) in enumerate(rows)]
    path.write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    slgr_jax.prepare(source="csv", input=path, out=root / name, **knobs)
    return dataset_lib.load(root / name)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """A dataset and the one of the next day, with two more users and three more items."""
    root = tmp_path_factory.mktemp("days")
    pairs = worlds.random_pairs(0, 20, 25, 8)
    pairs = np.random.default_rng(1).permutation(pairs)
    old = prepared(root, "day1", pairs.tolist(), START)
    new = [(20, 25), (21, 26), (3, 27), *((u, (5 * u + 1) % 25) for u in range(20))]
    return old, prepared(root, "day2", new, START + 10**6, append=old.path)


def run_of(data, workdir, **knobs) -> config.RunConfig:
    return config.make_run(str(data.path), str(workdir), **{**SMALL, **knobs})


def trained(data, workdir, **knobs) -> config.RunConfig:
    run = run_of(data, workdir, **knobs)
    assert loop.train(run).status == "finished"
    return run


@pytest.fixture(scope="module")
def first(days, tmp_path_factory):
    """A run of matrix factorisation on the first day."""
    return trained(days[0], tmp_path_factory.mktemp("first") / "run")


def begin(data, run: config.RunConfig) -> tuple[build.Experiment, state_lib.TrainState]:
    """What `run` begins with, without a step."""
    experiment = build.build(run, data)
    state = programs.make_programs(experiment).init(np.int32(run.train.seed))
    return experiment, state


KINDS = {
    "mf": {},
    "bfloat16": {"table_optimizer": "lazy_adam", "table_dtype": "bfloat16", "lr": 0.02},
    "lightgcn": {"backbone": "lightgcn"},
    "sasrec": {"backbone": "sasrec", "layers": 1, "hidden": 8, "heads": 2, "max_history": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_old_rows_are_the_runs_and_new_ones_are_fresh(days, tmp_path, kind):
    day1, day2 = days
    source = trained(day1, tmp_path / "run", **{**KINDS[kind], "epochs": 1})
    served = restore.restore_run(source.workdir).serving
    for slots in ("keep", "reset"):
        again = {"init_from": source.workdir, "init_slots": slots, "seed": 5}
        experiment, state = begin(day2, run_of(day2, tmp_path / "next", **KINDS[kind], **again))
        trainer = experiment.trainer
        fresh = jax.jit(lambda t=trainer: state_lib.init_state(t, 5))()

        for name, spec in trainer.backbone.tables.items():
            old = {"user": day1.n_users, "item": day1.n_items}[name]
            row_format = RowFormat.of(state.tables[name], spec.width)
            values, kept = (np.asarray(x) for x in row_format.unpack(state.tables[name]))
            np.testing.assert_array_equal(
                np.asarray(state.tables[name])[old:], np.asarray(fresh.tables[name])[old:]
            )
            if kind != "lightgcn":  # which serves what its rows become
                np.testing.assert_array_equal(values[:old], np.asarray(served.values[name]))
            initial = trainer.row_optimizer.initial(spec.width)
            assert (kept[:old] == np.broadcast_to(initial, kept[:old].shape)).all() == (
                slots == "reset"
            )
        params = (state.params["backbone"], served.params)
        for ours, theirs in zip(*map(jax.tree.leaves, params), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert int(state.step) == 0
        moments = sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(state.opt_state))
        if kind == "sasrec":
            assert (moments == 0) == (slots == "reset")


def test_scores_of_old_users_and_items_are_the_runs_to_the_bit(days, first, tmp_path):
    """Begun and not trained: a step size too small to move anything stands for it."""
    day1, day2 = days
    workdir = tmp_path / "next"
    knobs = {"init_from": first.workdir, "epochs": 1, "lr": 1e-30, "l2": 0.0}
    trained(day2, workdir, **knobs)
    users, items = day1.user_ids.to_pylist(), day1.items["item_id"].to_pylist()
    pairs = [(u, i) for u in users for i in items]
    scores = [slgr_jax.load(w).scores(*zip(*pairs, strict=True)) for w in (first.workdir, workdir)]
    np.testing.assert_array_equal(*scores)
    record = json.loads((workdir / "run.json").read_text())["init_from"]
    assert record["run"] == first.workdir
    assert len(record["checkpoint"]) == 32  # XXH3-128, in hexadecimal
    assert config.knobs.from_json(
        config.RunConfig, (workdir / "config.json").read_text(), "config"
    ).train.init_from == first.workdir  # fmt: skip


def test_the_beginning_is_the_best_where_nothing_beats_it(days, first, tmp_path):
    _, day2 = days
    run = run_of(day2, tmp_path / "next", init_from=first.workdir, lr=1e-30, l2=0.0)
    outcome = loop.train(run)
    records = [json.loads(line) for line in (tmp_path / "next/log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert outcome.best_epoch == 0
    assert outcome.best_metric == records[0]["valid/ndcg@10"] == records[1]["valid/ndcg@10"]


class _StopAfter(threading.Event):
    def __init__(self, asks: int) -> None:
        super().__init__()
        self.left = asks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def _log(workdir: pathlib.Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "triples_per_s")} for r in records]


def test_resuming_does_not_need_the_run_again_and_is_bit_identical(
    days, first, tmp_path, monkeypatch
):
    _, day2 = days
    gone = tmp_path / "gone"
    shutil.copytree(first.workdir, gone)
    trained(day2, tmp_path / "whole", init_from=str(gone))
    split = run_of(day2, tmp_path / "split", init_from=str(gone))
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "stop_on_signal", lambda: contextlib.nullcontext(_StopAfter(4)))
        assert loop.train(split).status == "interrupted"
    before = json.loads((tmp_path / "split/run.json").read_text())["init_from"]
    shutil.rmtree(gone)
    assert loop.train(split).status == "finished"
    assert json.loads((tmp_path / "split/run.json").read_text())["init_from"] == before
    assert _log(tmp_path / "whole") == _log(tmp_path / "split")
    for which in ("best", "last"):
        whole, resumed = (
            restore.restore_run(str(tmp_path / name), which).serving.values
            for name in ("whole", "split")
        )
        for name in whole:
            np.testing.assert_array_equal(np.asarray(whole[name]), np.asarray(resumed[name]))


def test_seeds_together_begin_as_each_alone(days, first, tmp_path, monkeypatch):
    _, day2 = days
    monkeypatch.setattr(restore, "make_layout", lambda **_: worlds.one_device())
    runs = [
        run_of(day2, tmp_path / f"s{seed}", init_from=first.workdir, seed=seed, epochs=1)
        for seed in (0, 1)
    ]
    multi_seed.train_seeds(runs)
    alone = run_of(day2, tmp_path / "alone", init_from=first.workdir, seed=1, epochs=1)
    loop.train(alone)
    together, by_itself = _log(tmp_path / "s1"), _log(tmp_path / "alone")
    assert together[0] == by_itself[0]
    assert together[1]["valid/ndcg@10"] == pytest.approx(by_itself[1]["valid/ndcg@10"], rel=1e-4)
    assert json.loads((tmp_path / "s0/run.json").read_text())["init_from"]["run"] == first.workdir


def test_a_gate_is_copied_where_it_is_the_same(days, tmp_path):
    day1, day2 = days
    users, items = np.divmod(np.arange(20 * 20), 20)
    fresh = ~day1.positives(("train",)).contains(users, items)
    columns = [x[fresh].astype(np.int32) for x in (users, items)]
    worlds.teach(day1, *columns, np.cos(columns[0] * 7.0 + columns[1]).astype(np.float32))
    carry.carry(day2, day1, "t", overwrite=True)
    guided = {"guidance": "pairwise", "teacher": "t", "gate": "paper"}
    source = trained(day1, tmp_path / "run", **guided)
    served = restore.restore_run(source.workdir).serving.guidance
    run = run_of(day2, tmp_path / "next", init_from=source.workdir, **guided)
    _, state = begin(day2, run)
    ours, theirs = jax.tree.leaves(state.params["guidance"]), jax.tree.leaves(served)
    assert theirs
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    plain = run_of(day2, tmp_path / "plain", init_from=source.workdir)
    assert begin(day2, plain)[1].params["guidance"] == {}


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"backbone": "lightgcn"}, "has --backbone=mf, this run --backbone=lightgcn"),
        ({"dim": 16}, r"tables/user \[\d+, 16\] there, \[\d+, 32\] here.*--dim: 8 -> 16"),
        ({"table_optimizer": "sgd"}, "has --table_optimizer=adagrad, this run --table_optim.*=sgd"),
        ({"table_dtype": "bfloat16"}, "has --table_dtype=float32, this run --table_dtype=bfloat16"),
        ({"init_from": "nowhere"}, "nowhere is not a run"),
    ],
)
def test_what_a_run_cannot_begin_from(days, first, tmp_path, knobs, words):
    with pytest.raises(UserError, match=words):
        build.build(
            run_of(days[1], tmp_path / "next", **{"init_from": first.workdir, **knobs}), days[1]
        )


def test_data_that_the_run_does_not_lead_to(days, first, tmp_path):
    day1, day2 = days
    with pytest.raises(ConfigError, match="is --workdir itself"):
        run_of(day2, first.workdir, init_from=first.workdir)
    with pytest.raises(ConfigError, match="init_slots=reset is not used without --init_from"):
        run_of(day2, tmp_path / "next", init_slots="reset")
    build.build(run_of(day1, tmp_path / "next", init_from=first.workdir), day1)

    other = worlds.random_dataset(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is neither that nor made from it.*--append"):
        build.build(run_of(other, tmp_path / "next", init_from=first.workdir), other)
    early = [(u, (u + k) % 25) for u in range(20) for k in range(12)]
    back = prepared(tmp_path, "back", early, START - 10**6, append=day1.path)
    moved = back.manifest.parents[0]["moved"]["train to test"]
    with pytest.raises(ConfigError, match=f"has seen rows that .*{moved} train to test"):
        build.build(run_of(back, tmp_path / "next", init_from=first.workdir), back)


@pytest.mark.parametrize("backbone", ["mf", "deepfm"])
def test_rows_of_features_go_where_their_value_is(tmp_path, backbone):
    """A vocabulary that grows moves those behind it, in one table: each value keeps its row."""
    header = "user,group,band"

    def table(name: str, rows: list[str]) -> pathlib.Path:
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    pairs = np.random.default_rng(1).permutation(worlds.random_pairs(0, 20, 25, 8)).tolist()
    first = table("t1", [f"u{u:02},g{u % 2},b{u % 3}" for u in range(20)])
    knobs = {"users_input": first, "user_features": "group,band", "split": "ratio"}
    day1 = prepared(tmp_path, "day1", pairs, START, **knobs)
    later = table("t2", ["u20,a_group,a_band", "u21,g1,b2"])
    new = [(20, k) for k in range(8)] + [(u, (5 * u + 1) % 25) for u in range(20)] + [(21, 3)]
    day2 = prepared(tmp_path, "day2", new, START + 10**6, append=day1.path, users_input=later)
    values = {feature.name: feature.values for feature in day2.features}
    assert values == {"group": ("g0", "g1", "a_group"), "band": ("b0", "b1", "b2", "a_band")}

    knobs = {"backbone": backbone, "features": "all"}
    source = trained(day1, tmp_path / "run", epochs=1, **knobs)
    _, was = begin(day1, run_of(day1, tmp_path / "same", init_from=source.workdir, **knobs))
    again = {"init_from": source.workdir, "seed": 5}
    experiment, state = begin(day2, run_of(day2, tmp_path / "next", **knobs, **again))
    fresh = jax.jit(lambda: state_lib.init_state(experiment.trainer, 5))()
    rows, old, new_rows = (np.asarray(each.tables["user_feature"]) for each in (state, was, fresh))
    # g0 g1 - b0 b1 b2 - there, g0 g1 a_group - b0 b1 b2 a_band - here
    np.testing.assert_array_equal(rows[[0, 1, 3, 4, 5, 6, 8]], old[:7])
    np.testing.assert_array_equal(rows[[2, 7]], new_rows[[2, 7]])
    with pytest.raises(ConfigError, match=r"user group .categorical.*give it the same --features"):
        build.build(
            run_of(day2, tmp_path / "x", init_from=source.workdir, **knobs | {"features": "band"}),
            day2,
        )
    shutil.rmtree(day1.path)
    with pytest.raises(ConfigError, match="says which row is which value: put it back"):
        build.build(run_of(day2, tmp_path / "x", init_from=source.workdir, **knobs), day2)


def test_rows_of_mf_with_features_are_the_rows_and_not_the_sums(tmp_path):
    """What is served has features added: to begin with that would add them twice."""
    users = tmp_path / "u.csv"
    users.write_text("user,group\n" + "".join(f"u{u:02},g{u % 2}\n" for u in range(20)))
    pairs = np.random.default_rng(1).permutation(worlds.random_pairs(0, 20, 25, 8)).tolist()
    data = prepared(tmp_path, "d", pairs, START, users_input=users, user_features="group")
    source = trained(data, tmp_path / "run", epochs=1, features="group", lr=0.1)
    experiment, state = begin(
        data, run_of(data, tmp_path / "n", features="group", init_from=source.workdir)
    )
    served = state_lib.make_serving_state(experiment.trainer)(state, experiment.arrays.context)
    last = restore.restore_run(source.workdir, "last").serving
    for name in ("user", "item", "user_feature"):
        np.testing.assert_allclose(served.values[name], last.values[name], rtol=1e-5, atol=1e-7)
