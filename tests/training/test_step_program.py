"""What a step does to its tables, read off the program that XLA is given: no clock, no compiler.

Tables get a number of rows that nothing else has. Every operation that reads or makes an array of
so many rows is then one that a step pays for by the catalogue, but for those that look up or write
the rows of a batch, and those that pass a table on.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import CLICK_BACKBONES, LIST_GUIDANCES, make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.training import build, state, step

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
    "dim": 8, "batch_size": 32, "mlp": (8,), "cin": (4,), "attention_mlp": (4,), "hidden": 8,
    "max_history": 4, "layers": 1, "dropout": 0.0, "steps_per_dispatch": 3, "kernels": "xla",
}  # fmt: skip
# They hand an array on and compute nothing of it.
PASSES = {
    "func.func", "func.call", "func.return", "stablehlo.while", "stablehlo.return",
    "stablehlo.optimization_barrier", "sdy.sharding_constraint",
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = worlds.random_dataset(tmp_path_factory.mktemp("program") / "d")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(data.n_users), 8)
    items = [rng.choice(data.n_items, 8, replace=False) for _ in range(data.n_users)]
    worlds.teach(data, users, np.concatenate(items), rng.random(users.size), unlisted="below")
    return data


def _inside(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _inside(inner.operation)


def _shapes(values: Any) -> Iterator[list[str]]:
    for value in values:
        if (name := str(value.type)).startswith("tensor<"):
            yield name[name.index("<") + 1 : -1].split("x")[:-1]


def operations_on_tables(
    dataset: Dataset, **knobs: Any
) -> tuple[dict[str, dict[str, int]], set[str]]:
    """Table -> what is done to it in a dispatch -> how often; and the kinds of all operations.

    "gather rows" is of the table, "gather slots" of what has one number a row.
    """
    config = make_run(str(dataset.path), "run", **{**SMALL, **knobs})
    experiment = build.build(config, dataset, worlds.one_device())
    trainer = experiment.trainer
    specs = trainer.backbone.tables
    for place, (name, spec) in enumerate(specs.items()):
        specs[name] = dataclasses.replace(spec, rows=1_000_003 + 2_000_000 * place)
    return _lowered(trainer, experiment.arrays, {str(s.rows): name for name, s in specs.items()})


def _lowered(
    trainer: step.Trainer, arrays: Any, table_of: dict[str, str]
) -> tuple[dict[str, dict[str, int]], set[str]]:
    """As `operations_on_tables`, of arrays with so many rows each."""
    shapes = jax.eval_shape(lambda: state.init_state(trainer, 0))
    table_of = {str(table.shape[0]): name for name, table in shapes.tables.items()} | table_of
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = step.make_run_steps(trainer).lower(shapes, arrays, key, count)

    done: dict[str, dict[str, int]] = {name: collections.Counter() for name in table_of.values()}
    kinds = set()
    for operation in _inside(lowered.compiler_ir("stablehlo").operation):
        kind = operation.name.removeprefix("stablehlo.")
        kinds.add(kind)
        if operation.name in PASSES:
            continue
        every = [*_shapes(operation.operands), *_shapes(operation.results)]
        of = {
            (table_of[rows], len(rest) > 0)
            for rows, *rest in filter(None, every)
            if rows in table_of
        }
        for name, whole in of:
            done[name][f"{kind} {'rows' if whole else 'slots'}"] += 1
    return {name: dict(counts) for name, counts in done.items()}, kinds


def _expected(done: dict[str, Any], reads: dict[str, int]) -> dict[str, Any]:
    """Reads as given (XLA merges those that are the same); all else is done once to each table."""
    once = ("scatter rows", "gather slots", "scatter slots", "broadcast_in_dim slots")
    return {name: {"gather rows": reads[name], **dict.fromkeys(once, 1)} for name in done}


@pytest.mark.parametrize(
    ("backbone", "loss", "users", "items"),
    [
        ("mf", "bpr", 2, 2),
        ("mf", "sampled_softmax", 2, 3),
        ("sasrec", "bpr", 0, 3),
        ("gru4rec", "bce", 0, 3),
        ("bert4rec", "sampled_softmax", 0, 4),
        *[(name, "bce", 2, 2) for name in CLICK_BACKBONES],
    ],
)
def test_a_step_reads_and_writes_the_rows_of_its_batch(dataset, backbone, loss, users, items):
    """No table is written twice, copied, sorted or looked through."""
    done, kinds = operations_on_tables(dataset, backbone=backbone, loss=loss)
    assert done == _expected(done, {"user": users, "item": items})
    assert "sort" not in kinds


@pytest.mark.parametrize(
    ("backbone", "gate", "users", "items"),
    [
        ("mf", "paper", 2, 2),
        ("mf", "calibrated", 3, 3),  # labelled preferences are scored, and never written
        ("sasrec", "paper", 0, 5),  # each reads a history's items and the candidates
        ("sasrec", "calibrated", 0, 7),
        ("deepfm", "calibrated", 3, 3),
    ],
)
def test_and_so_does_a_guided_one(dataset, backbone, gate, users, items):
    loss = "bce" if backbone == "deepfm" else "bpr"
    guided = {"guidance": "pairwise", "teacher": "t", "gate": gate}
    done, kinds = operations_on_tables(dataset, backbone=backbone, loss=loss, **guided)
    assert done == _expected(done, {"user": users, "item": items})
    assert "sort" not in kinds


@pytest.mark.parametrize(
    ("guidance", "reads"),
    [("kd", 2), ("unkd", 2), *[(name, 3) for name in LIST_GUIDANCES]],  # pairs; lists
)
def test_and_one_that_learns_lists(dataset, guidance, reads):
    """Students' ranks are those among the candidates: none looks at the catalogue."""
    done, _ = operations_on_tables(dataset, backbone="mf", guidance=guidance, teacher="t")
    assert done == _expected(done, {"user": reads, "item": reads})


def test_remembered_scores_are_read_and_written_at_a_batch(dataset):
    """A ring of scores, and two counts, of so many pairs: what a step does is at its batch's."""
    kept = {"keep_hard": "t", "drop_share": 0.5, "drop": "hardest", "hard_pair_last": 0.5}
    kept |= {"negatives": "scored", "hard_variance_share": 0.5}
    config = make_run(str(dataset.path), "run", **SMALL, backbone="mf", loss="bpr", **kept)
    experiment = build.build(config, dataset, worlds.one_device())
    pairs = 3_000_017
    trainer = dataclasses.replace(experiment.trainer, remembered=pairs)
    done, _ = _lowered(trainer, experiment.arrays, {str(pairs): "pairs"})
    once = {"gather rows": 1, "scatter rows": 1, "gather slots": 2, "scatter slots": 2}
    assert done["pairs"] == once


def test_a_softmax_over_the_catalogue_is_seen(dataset):
    """The guard sees what it guards against."""
    done, _ = operations_on_tables(dataset, backbone="mf", loss="softmax")
    assert done["item"]["dot_general rows"] == 2
    assert done["user"].keys() == _expected(done, {"user": 2, "item": 0})["user"].keys()
