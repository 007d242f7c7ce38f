"""The first two guided steps of every backbone, as numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import BACKBONES, make_run
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib

NAMES = ("rec_loss", "accuracy", "guidance_loss", "alpha")
# If a change of drawing, initialisation or arithmetic is meant, print `got` of the test below for
# each backbone and say why in the commit.
GOLDEN = {
    "mf": (0.95932937, 0.28125000, 0.65229052, 0.49973589),
    "lightgcn": (0.68539202, 0.65625000, 0.49801928, 0.49973053),
    "sasrec": (4.08445835, 0.00961538, 0.53556216, 0.49974319),
    "gru4rec": (3.49165154, 0.03846154, 0.42091483, 0.49973267),
    "bert4rec": (3.68627834, 0.03125000, 0.50711858, 0.49975014),
    "deepfm": (0.87422121, 0.56250000, 0.51324207, 0.49974930),
    "xdeepfm": (0.79920101, 0.34375000, 0.45062089, 0.49974024),
    "autoint": (0.74145031, 0.46875000, 0.46926931, 0.49973398),
    "dcn": (0.74844539, 0.25000000, 0.44246963, 0.49973357),
    "dcnv2": (0.70900381, 0.46875000, 0.47814792, 0.49973363),
    "din": (0.70127380, 0.46875000, 0.49492964, 0.49973318),
}


def _first_steps(tmp_path, **knobs):
    dataset = worlds.random_dataset(tmp_path / "d", categories=4)
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.choice(30, 8, replace=False) for _ in range(40)])
    scores = np.sort(rng.random((40, 8)), axis=1).ravel()
    worlds.teach(dataset, np.repeat(np.arange(40), 8), items, scores)
    common = {"dim": 8, "batch_size": 16, "preferences_per_step": 16, "init_std": 1.0, "hidden": 8}
    common |= {"max_history": 4, "mlp": (8,), "cin": (4, 4), "attention_width": 4}
    guided = {"guidance": "pairwise", "teacher": "t", "gate": "paper"}
    run = make_run(str(dataset.path), "w", **{**common, **guided, **knobs})
    experiment = build.build(run, dataset, worlds.one_device())
    key = jax.random.key_data(jax.random.key(1))
    state = state_lib.init_state(experiment.trainer, 0)
    run_steps = step.make_run_steps(experiment.trainer)
    state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(2))
    assert int(health.step) == -1
    assert int(state.step) == 2
    return [float(sums[name]) / 2 for name in NAMES]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_golden_first_steps(tmp_path, backbone):
    got = _first_steps(tmp_path, backbone=backbone)
    assert got == pytest.approx(GOLDEN[backbone], rel=5e-4)
