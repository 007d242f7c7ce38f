"""What supervises a gate: labelled preferences, hidden items; who learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy.special import expit

from slgr_jax.config import (
    GateConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SliceConfig,
    TrainConfig,
)
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import gates
from slgr_jax.mesh import make_layout
from slgr_jax.sampling import labelled_preferences, random_bits
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, step
from slgr_jax.training import state as state_lib


def _dataset(path, **more):
    dataset = worlds.random_dataset(path, n_users=24, n_items=30, per_user=12)
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", float(score))
        for user in range(24)
        for item, score in zip(rng.choice(30, 12, replace=False), rng.random(12), strict=True)
    ]
    text = "user,item,score\n" + "".join(f"{u},{i},{s}\n" for u, i, s in rows)
    (path / "scores.csv").write_text(text)
    provenance = preferences.Provenance(**{"unlisted": "below", **more})
    preferences.import_scores(
        dataset, path / "scores.csv", "t", provenance=provenance, keep_training_items=True
    )
    return dataset


def _config(dataset, workdir, gate, guidance=None, **sections):
    return worlds.run_config(
        dataset,
        workdir,
        **{
            "model": ModelConfig(dim=4, init_std=1.0, item_bias=False),
            "optimizer": OptimizerConfig(l2=0.01, lr=0.1),
            "sampler": SamplerConfig(batch_size=32),
            "guidance": guidance or GuidanceConfig(guidance="pairwise", teacher="t", weight=1.0),
            "gate": gate,
            "train": TrainConfig(kernels="xla"),
        }
        | sections,
    )


def _built(run, dataset, devices=1):
    """The trainer of a run, its device arrays and its first state."""
    experiment = build.build(run, dataset, make_layout(devices=jax.devices()[:devices]))
    trainer = experiment.trainer
    return trainer, experiment.arrays, state_lib.init_state(trainer, 0)


def _steps(trainer, arrays, state, count):
    key = jax.random.key_data(jax.random.key(1))
    return step.make_run_steps(trainer)(state, arrays, key, jnp.int32(count))


def test_a_calibrated_gate_learns_the_share_of_right_answers(tmp_path):
    """With nothing to go by but a constant input, alpha of each fold becomes the weighted share of
    right answers among the *other* fold's labelled ones; the gated loss does not move it."""
    dataset = _dataset(tmp_path / "d")
    gate = GateConfig(gate="calibrated", gate_inputs="slices", gate_hidden=0, labelled_per_step=512)
    run = _config(
        dataset,
        tmp_path / "r",
        gate,
        slices=SliceConfig(cold_user_history=0, tail_item_fraction=0.0),
    )
    trainer, arrays, _ = _built(run, dataset)
    params = {}
    for weight in (0.0, 5.0):
        guidance = dataclasses.replace(run.guidance, weight=weight)
        weighed = dataclasses.replace(trainer, config=dataclasses.replace(run, guidance=guidance))
        end, _, _ = _steps(weighed, arrays, state_lib.init_state(weighed, 0), 400)
        params[weight] = jax.device_get(end.params["guidance"])
    np.testing.assert_array_equal(params[0.0]["alpha"]["bias"], params[5.0]["alpha"]["bias"])
    drawn = labelled_preferences.draw_labelled(
        random_bits.generators(jax.random.split(jax.random.key(3), 1)),
        arrays.guidance.gate.labels,
        arrays.guidance.teacher,
        arrays.interactions.facts,
        dataclasses.replace(trainer.guidance.rule, count=200_000),
        histories=False,
    )
    fold = np.asarray(gates.folds(drawn.queries.users))
    for half in (0, 1):
        weights = np.asarray(drawn.weights) * (fold == half)
        share = float((weights * np.asarray(drawn.right)).sum() / weights.sum())
        assert expit(params[0.0]["alpha"]["bias"][half]) == pytest.approx(share, abs=0.04)


def test_hidden_training_items_are_not_trained_on(tmp_path):
    dataset = _dataset(tmp_path / "d", training_items="hidden")
    gate = GateConfig(gate="calibrated", labelled_preferences="hidden")
    run = _config(dataset, tmp_path / "r", gate)
    _, arrays, _ = _built(run, dataset)
    labelled = arrays.guidance.gate.labels.chosen
    chosen = worlds.pairs_of(labelled.users, labelled.items)
    trained = worlds.pairs_of(arrays.interactions.targets.users, arrays.interactions.targets.items)
    train = worlds.pairs_of(dataset.train.users, dataset.train.items)
    assert chosen
    assert chosen | trained == train
    assert not chosen & trained
    # ... unless the labels are taken from validation
    gate = GateConfig(gate="calibrated", labelled_preferences="validation")
    _, arrays, _ = _built(_config(dataset, tmp_path / "r", gate), dataset)
    assert arrays.interactions.targets is None
    valid = worlds.pairs_of(dataset.valid.users, dataset.valid.items)
    labelled = arrays.guidance.gate.labels.chosen
    assert worlds.pairs_of(labelled.users, labelled.items) == valid


def test_labelled_preferences_that_there_are_not_are_named(tmp_path):
    dataset = _dataset(tmp_path / "d")
    gate = GateConfig(gate="calibrated", labelled_preferences="hidden")
    with pytest.raises(
        ConfigError, match=r"training_items=shown.*--labelled_preferences=validation"
    ):
        _built(_config(dataset, tmp_path / "r", gate), dataset)
    pairs = worlds.random_pairs(0, 24, 30, 12)
    empty = pairs[:0]
    alone = worlds.write_dataset(tmp_path / "e", pairs, empty, empty, n_users=24, n_items=30)
    text = (tmp_path / "d" / "scores.csv").read_text()
    (tmp_path / "e" / "scores.csv").write_text(text)
    preferences.import_scores(alone, tmp_path / "e" / "scores.csv", "t", keep_training_items=True)
    with pytest.raises(InputError, match="no word on any of the 0 validation interactions"):
        _built(_config(alone, tmp_path / "r", GateConfig(gate="calibrated")), alone)


def test_pointwise_guidance_learns_the_scaled_scores(tmp_path):
    """With nothing else to learn, sigmoid(score) of listed items becomes the teacher's score."""
    dataset = _dataset(tmp_path / "d", unlisted="unknown")
    guidance = GuidanceConfig(guidance="pointwise", teacher="t", weight=2000.0)
    optimizer = OptimizerConfig(l2=0.0, lr=0.05)
    sections = {"model": ModelConfig(dim=16, init_std=1.0), "optimizer": optimizer}
    run = _config(dataset, tmp_path / "r", GateConfig(gate="constant"), guidance, **sections)
    trainer, arrays, state = _built(run, dataset)
    assert state.params["guidance"] == {}
    state, _, _ = _steps(trainer, arrays, state, 3000)
    values = jax.device_get(state_lib.make_serving_state(trainer)(state, arrays.context).values)
    teacher = preferences.load(dataset, "t")
    users = np.repeat(np.arange(24), np.diff(teacher.offsets))
    user, item = values["user"][users].copy(), values["item"][teacher.items]
    user[:, -1] = 1.0  # the item's bias
    learned = expit((user * item).sum(1))
    low, high = teacher.scores.min(), teacher.scores.max()
    expected = (teacher.scores - low) / (high - low)
    assert np.abs(learned - expected).mean() < 0.1
