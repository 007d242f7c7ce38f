"""The world that every recommender must solve, through the whole of training and evaluation."""

from __future__ import annotations

import pytest
import worlds

from slgr_jax.config import BACKBONES, CLICK_BACKBONES, SEQUENCE_BACKBONES, make_run
from slgr_jax.evaluation import full_ranking, ranking_metrics
from slgr_jax.training import loop, restore

pytestmark = pytest.mark.usefixtures("one_device")

_SEQUENCE = {"lr": 0.03, "dense_lr": 0.01, "hidden": 16, "epochs": 80, "batch_size": 24}
_CLICK = {"lr": 0.02, "dense_lr": 0.02, "mlp": (16,), "cin": (8,)}
_EACH = {
    "mf": {"lr": 0.3, "l2": 0.001},
    "lightgcn": {"lr": 0.03, "l2": 0.001, "epochs": 40},
    **dict.fromkeys(SEQUENCE_BACKBONES, _SEQUENCE),
    **dict.fromkeys(CLICK_BACKBONES, _CLICK),
}


def _recall_at_1(tmp_path, **knobs):
    """Training, then full ranking."""
    dataset = worlds.checkerboard(tmp_path / "d", size=24)
    common = {"dim": 8, "epochs": 60, "patience": 0, "dropout": 0.0, "batch_size": 128}
    run = make_run(str(dataset.path), str(tmp_path / "run"), **{**common, **knobs})
    loop.train(run)
    restored = restore.restore_run(run.workdir)
    ranking = full_ranking.rank(
        restored.score_users,
        restored.scoring("test"),
        dataset.positives(("test",)),
        dataset.positives(("train", "valid")),
        dataset.n_items,
        pooled_auc=False,
    )
    return ranking_metrics.summarize(ranking_metrics.per_user(ranking, (1,)))["recall@1"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkerboard_is_solved(tmp_path, backbone):
    """Every user's withheld item of the right colour comes first among the unseen ones."""
    knobs = {"eval_every": 20, "backbone": backbone, **_EACH[backbone]}
    assert _recall_at_1(tmp_path, **knobs) == 1.0


def test_checkerboard_is_solved_by_lazy_adam(tmp_path):
    knobs = {"table_optimizer": "lazy_adam", "lr": 0.02, "l2": 0.001, "eval_every": 60}
    assert _recall_at_1(tmp_path, **knobs) == 1.0
