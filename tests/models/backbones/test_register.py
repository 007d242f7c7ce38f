"""A backbone of a user's own: chosen by name, trained, and refused in words where it is none."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest
import worlds

from slgr_jax import config
from slgr_jax.config import ModelConfig, make_run
from slgr_jax.errors import ConfigError
from slgr_jax.models import backbones
from slgr_jax.models.backbones.base import DotBackbone, ItemTableBackbone
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling.context import GRAPH, HISTORY, Sizes
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib


class Toy(ItemTableBackbone):
    """s_ui = p_u . q_i, as somebody outside the package would write it."""

    reads: frozenset[str] = frozenset()
    factor_model = None
    dropout = 0.0

    def __init__(self, sizes: Sizes, dim: int, init_std: float) -> None:
        self.tables: Mapping[str, TableSpec] = {
            "user": TableSpec(sizes.users, dim, init_std),
            "item": TableSpec(sizes.items, dim, init_std),
        }

    def init(self, key):
        return {}

    def query_ids(self, context, queries):
        return {"user": queries.users}

    def query_vectors(self, params, rows, context, queries, *, dropout):
        return rows["user"]


def _make_toy(model: ModelConfig, sizes: Sizes, *, native: bool) -> DotBackbone:
    return Toy(sizes, model.dim, model.init_std)


@pytest.fixture(autouse=True)
def _registered_names_are_forgotten():
    before = list(config.BACKBONES)
    yield
    for name in set(config.BACKBONES) - set(before):
        del config.LOSSES_OF[name], config.BACKBONE_DEFAULTS[name], backbones._ENTRIES[name]


def _two_steps(tmp_path, **knobs):
    """Tables and mean loss after two steps of XLA's programs."""
    dataset = worlds.random_dataset(tmp_path / str(knobs["backbone"]))
    common = {"dim": 8, "batch_size": 16, "init_std": 1.0, "kernels": "xla"}
    run = make_run(str(dataset.path), "w", **common, **knobs)
    experiment = build.build(run, dataset, worlds.one_device())
    key = jax.random.key_data(jax.random.key(1))
    state = state_lib.init_state(experiment.trainer, 0)
    run_steps = step.make_run_steps(experiment.trainer)
    state, sums, _ = run_steps(state, experiment.arrays, key, jnp.int32(2))
    assert int(state.step) == 2
    return jax.device_get(state.tables), float(sums["rec_loss"]) / 2


def test_a_registered_backbone_trains_like_the_one_it_equals(tmp_path):
    backbones.register("toy", _make_toy, losses=("bce", "bpr"), defaults={"lr": 0.1})
    run = make_run("d", "w", backbone="toy")
    assert (run.loss_name, run.optimizer.lr) == ("bce", 0.1)
    assert make_run("d", "w", backbone="toy", lr=0.2).optimizer.lr == 0.2
    tables, loss = _two_steps(tmp_path, backbone="toy")
    expected, expected_loss = _two_steps(
        tmp_path, backbone="mf", item_bias=False, loss="bce", lr=0.1
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, table in expected.items():
        assert tables[name] == pytest.approx(table, rel=1e-4, abs=1e-6)


def test_the_choices_follow(tmp_path):
    with pytest.raises(ConfigError, match=r"--backbone='toy' is not one of: mf, .*, din$"):
        ModelConfig(backbone="toy")
    backbones.register("toy", _make_toy)
    assert ModelConfig(backbone="toy").backbone == "toy"
    with pytest.raises(ConfigError, match=r"--backbone='tay' is not one of: mf, .*, din, toy"):
        ModelConfig(backbone="tay")
    with pytest.raises(ConfigError, match="--loss=softmax makes no sense for --backbone=toy"):
        make_run("d", "w", backbone="toy", loss="softmax")


def test_what_cannot_be_registered_is_named():
    with pytest.raises(ConfigError, match="called 'mf' already: mf, lightgcn"):
        backbones.register("mf", _make_toy)
    with pytest.raises(ConfigError, match=r"losses=\('l2',\) of backbone 'toy': give some of bpr"):
        backbones.register("toy", _make_toy, losses=("l2",))
    with pytest.raises(ConfigError, match="'toy' reads weather; there is only history, fields, f"):
        backbones.register("toy", _make_toy, reads={"weather"})
    assert "toy" not in config.BACKBONES


def test_what_is_no_backbone_is_refused_when_it_is_made():
    sizes = Sizes(3, 4)
    backbones.register("empty", lambda model, sizes, *, native: object())
    with pytest.raises(ConfigError, match="--backbone=empty: object has no dropout, ids, init, "):
        backbones.make_backbone(ModelConfig(backbone="empty"), sizes)
    nearly = type("Nearly", (Toy,), {"query_vectors": property()})
    backbones.register("nearly", lambda model, sizes, *, native: nearly(sizes, 2, 1.0))
    with pytest.raises(ConfigError, match="Nearly has no query_vectors, which"):
        backbones.make_backbone(ModelConfig(backbone="nearly"), sizes)
    reader = type("Reader", (Toy,), {"reads": frozenset({HISTORY, GRAPH})})
    backbones.register(
        "reader", lambda model, sizes, *, native: reader(sizes, 2, 1.0), reads={GRAPH}
    )
    with pytest.raises(ConfigError, match=r"reads history, and was registered with reads=\['gr"):
        backbones.make_backbone(ModelConfig(backbone="reader"), sizes)


def test_a_sequence_backbone_learns_from_windows():
    backbones.register("toy", _make_toy, losses=("softmax", "bce"), reads={HISTORY}, sequence=True)
    assert backbones.reads_of(ModelConfig(backbone="toy")) == {HISTORY}
    with pytest.raises(ConfigError, match="--backbone=toy learns from sequences"):
        make_run("d", "w", backbone="toy", loss="bce", rating_threshold=3.0)
