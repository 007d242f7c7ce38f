"""Every backbone and every guidance trains on several devices as on one.

A new name of either has its case here by itself. Dropout, masks and other noise are on, as they are
by default. Four devices are those of 2 processes x 2, which `tests/cluster` starts for real; users
that are split over them: `test_user_shards.py`.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose

from slgr_jax.config import make_run
from slgr_jax.config.backbones import BUILT_IN, CLICK_BACKBONES, SEQUENCE_BACKBONES
from slgr_jax.config.guidance import ALIGNMENTS, BUILT_IN_GUIDANCE, GATES
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.mesh import make_layout
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib

USERS, ITEMS, STEPS = 24, 20, 3
SMALL = {"dim": 4, "batch_size": 16, "init_std": 1.0, "kernels": "xla", "max_history": 4}
SMALL |= {"lists_per_step": 8, "preferences_per_step": 8, "labelled_per_step": 8}
# What a case has beside its guidance: programs take time, so that guidances, backbones, losses and
# tables share them. A guidance that is not here trains `mf`, a backbone that is not here alone.
WITH: dict[str, dict[str, Any]] = {
    "pairwise": {"features": "group,price", "drop_share": 0.6},
    "pointwise": {"backbone": "deepfm"},
    "interactions": {
        "backbone": "lightgcn",
        **{"item_vectors": "text", "user_vectors": "text", "adapter_neighbours": 3},
    },
    "kd": {"backbone": "din"},
    "list_kl": {"loss": "softmax"},
    "rd": {"backbone": "dcn"},
    "dllm2rec": {"loss": "sampled_softmax", "shared_negatives": 16},
    "cd": {"backbone": "dcnv2"},
    "rrd": {"item_vectors": "text", "item_rows": False},
    "dcd": {"backbone": "autoint"},
    "unkd": {"backbone": "xdeepfm"},
    "hint": {
        **{"backbone": "gru4rec", "user_vectors": "text", "user_fusion": "concat"},
        **{"item_vectors": "text", "towers": "three"},
    },
    "htd": {
        "backbone": "bert4rec",
        **{"user_vectors": "chunks", "user_fusion": "attention", "user_fusion_heads": 2},
    },
    "rlmrec_con": {"backbone": "sasrec"},
    "rlmrec_gen": {
        "backbone": "lightgcn",
        **{"item_vectors": "text", "user_vectors": "text"},
        **{"item_side_weight": 0.5, "user_side_weight": 1.0},
    },
    "llm_esr": {
        "llm_esr_views": 0.5,
        **{"backbone": "gru4rec", "dropout": 0.2, "item_vectors": "text", "dual_view": True},
    },
    "ctrl": {"backbone": "dcnv2"},
    "pad_mmd": {"backbone": "sasrec", "item_vectors": "text", "towers": "aligned"},
    "llmemb_rat": {"dim": 6, "item_vectors": "text", "item_rows": False},
}
KNOBS = {
    **{name: {"hidden": 8, "layers": 1} for name in SEQUENCE_BACKBONES},
    **{name: {"mlp": (8,)} for name in CLICK_BACKBONES},
    "lightgcn": {"layers": 1, "dropout": 0.2},
}


def _cases() -> dict[str, dict[str, Any]]:
    """Name -> knobs; gates take turns.

    Tables whole on each device and split in two take turns in a kind of backbone: who reads and
    writes the rows knows of the split, guidances and gates do not.
    """
    cases: dict[str, dict[str, Any]] = {}
    gates = itertools.cycle(GATES)
    shards = collections.defaultdict(lambda: itertools.cycle((1, 2)))
    kinds = dict.fromkeys(SEQUENCE_BACKBONES, "windows") | dict.fromkeys(CLICK_BACKBONES, "clicks")
    for guidance in BUILT_IN_GUIDANCE[1:]:
        product = {"teacher_vectors": "text"} if guidance in ALIGNMENTS else {"teacher": "t"}
        knobs = {"backbone": "mf", "guidance": guidance, "gate": next(gates), "lambda": 1.0}
        knobs |= product | WITH.get(guidance, {})
        backbone = knobs["backbone"]
        knobs["table_shards"] = next(shards[kinds.get(backbone, backbone)])
        cases[f"{backbone}-{guidance}-{knobs['gate']}"] = knobs
    trained = {knobs["backbone"] for knobs in cases.values()}
    alone = {name: {"backbone": name, "table_shards": 2} for name in BUILT_IN}
    return cases | {name: knobs for name, knobs in alone.items() if name not in trained}


CASES = _cases()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """With everything that a case reads: categories, ratings, features, lists, vectors."""
    rng = np.random.default_rng(0)
    world = worlds.random_dataset(
        tmp_path_factory.mktemp("data") / "d",
        n_users=USERS,
        n_items=ITEMS,
        categories=3,
        ratings=True,
        features=[
            worlds.feature("group", "user", [[f"g{u % 3}"] for u in range(USERS)]),
            features_lib.numeric("price", "item", np.arange(ITEMS) / 3.0, np.ones(ITEMS, bool)),
        ],
    )
    lists = [(u, i) for u in range(USERS) for i in rng.choice(ITEMS, 8, replace=False)]
    rows = [
        f"u{u},i{i},{score}" for (u, i), score in zip(lists, rng.random(len(lists)), strict=True)
    ]
    (world.path / "scores.csv").write_text("\n".join(["user,item,score", *rows]) + "\n")
    below = preferences.Provenance(unlisted="below")
    preferences.import_scores(
        world, world.path / "scores.csv", "t", provenance=below, keep_training_items=True
    )
    items, users = (
        Vectors(rng.normal(0.5, 2.0, (rows, 5)).astype(np.float32), np.arange(rows) != 3)
        for rows in (ITEMS, USERS)
    )
    embeddings.write(world, "text", items, users, users_from="file")
    several = (
        Chunks(
            rng.normal(0.5, 2.0, (rows, 3, 5)).astype(np.float16),
            rng.integers(0, 4, (rows, 1)).astype(np.int16),
            {"text": 3},
        )
        for rows in (ITEMS, USERS)
    )
    embeddings.write(world, "chunks", *several, users_from="file")
    return world


def _trained(dataset: Dataset, name: str, layout: Any, begin: Any = None) -> tuple[Any, Any]:
    """What some steps begin with, and what they end with."""
    knobs = CASES[name]
    values = SMALL | KNOBS.get(knobs["backbone"], {}) | knobs
    del values["table_shards"]  # of which `layout` has its own
    made = build.build(make_run(str(dataset.path), "run", **values), dataset, layout)
    trainer = made.trainer
    if begin is None:
        begin = jax.device_get(state_lib.init_state(trainer, 0))
    shardings = jax.tree.map(lambda x: x.sharding, state_lib.abstract_state(trainer))
    state = jax.device_put(begin, shardings)
    key = jax.random.key_data(jax.random.key(1))
    state, sums, health = step.make_run_steps(trainer)(state, made.arrays, key, jnp.int32(STEPS))
    assert int(health.step) == -1
    tables = {
        table: state.tables[table][: spec.rows]  # with their slots
        for table, spec in trainer.backbone.tables.items()
    }
    return begin, jax.device_get((tables, state.params, sums))


@pytest.mark.parametrize("name", CASES)
def test_four_devices_have_the_numbers_of_one(dataset, name):
    begin, expected = _trained(dataset, name, worlds.one_device())
    assert expected[2]["loss"] > 0
    layout = make_layout(table_shards=CASES[name]["table_shards"], devices=jax.devices()[:4])
    _, got = _trained(dataset, name, layout, begin)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, expected)


def test_every_kind_of_backbone_has_its_tables_whole_and_split():
    seen = {(knobs["backbone"], knobs["table_shards"]) for knobs in CASES.values()}
    for kind in (("mf",), ("lightgcn",), SEQUENCE_BACKBONES, CLICK_BACKBONES):
        assert {shards for backbone, shards in seen if backbone in kind} == {1, 2}, kind
    for name in ("gru4rec", "dcnv2"):  # which two guidances share
        assert {(name, 1), (name, 2)} <= seen
