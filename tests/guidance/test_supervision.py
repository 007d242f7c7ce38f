"""What teaches a gate: look-ahead gains against a real look-ahead, labelled preferences, who
learns."""

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
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling import preferences as preferences_lib
from slgr_jax.sampling import random_bits
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, step


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
            "guidance": guidance or GuidanceConfig(guidance="selective", teacher="t", weight=1.0),
            "gate": gate,
            "train": TrainConfig(kernels="xla"),
        }
        | sections,
    )


def _built(monkeypatch, run, dataset, devices=1):
    monkeypatch.setattr(
        build, "make_layout", lambda **_: make_layout(devices=jax.devices()[:devices])
    )
    trainer, resident = build.build(run, dataset)
    state = step.init_state(trainer, 0)
    return trainer, resident, state


def _steps(trainer, resident, state, count):
    key = jax.random.key_data(jax.random.key(1))
    return step.make_run_steps(trainer)(state, resident, key, jnp.int32(count))


def _batch(trainer, resident):
    keys = jax.random.split(jax.random.key(5), 1)
    return jax.tree.map(lambda x: x[0], batch_lib.draw(keys, resident, trainer.plan))


def test_look_ahead_gains_are_what_a_step_of_descent_gains(tmp_path, monkeypatch):
    """A step of length h down the gradient of one preference, on the user's row alone, lowers the
    held-out loss by h c_g: finite differences in float64."""
    dataset = _dataset(tmp_path / "d")
    run = _config(dataset, tmp_path / "r", GateConfig(gate="meta"))
    run = dataclasses.replace(
        run, guidance=dataclasses.replace(run.guidance, guidance_loss="logistic")
    )
    trainer, resident, state = _built(monkeypatch, run, dataset)
    batch = _batch(trainer, resident)
    seen = trainer.supervision.see(
        *(state.tables, state.params["backbone"], batch, resident.context),
        *(None, jax.random.key(0)),
    )
    user, item = (
        np.asarray(state.tables[name][:, : trainer.backbone.tables[name].width], np.float64)
        for name in ("user", "item")
    )
    raw = []
    for u, (a, b), (i, j), weight in zip(
        *(batch.pref_queries.users, batch.pref_items, batch.held_out.items),
        batch.held_out.weights,
        strict=True,
    ):
        pair, own = item[a] - item[b], item[i] - item[j]
        gradient = -expit(-user[u] @ pair) * pair

        def held_out(step, u=u, own=own, gradient=gradient):
            return np.log1p(np.exp(-(user[u] - step * gradient) @ own))

        raw.append(float(weight) * (held_out(-1e-4) - held_out(1e-4)) / 2e-4)
    raw = np.array(raw)
    expected = raw / np.sqrt((raw[raw != 0] ** 2).mean())
    assert (raw != 0).sum() > 10
    np.testing.assert_allclose(seen.gains, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("gate", ["calibrated", "meta", "budget"])
def test_eight_devices_teach_as_one(tmp_path, monkeypatch, gate):
    dataset = _dataset(tmp_path / "d")
    found = {}
    for devices in (1, 8):
        run = _config(dataset, tmp_path / "r", GateConfig(gate=gate, labelled_per_step=16))
        trainer, resident, state = _built(monkeypatch, run, dataset, devices)
        state, sums, _ = _steps(trainer, resident, state, 6)
        found[devices] = jax.device_get((state.params["gate"], sums))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found[1], found[8]
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1][0]))


def test_a_calibrated_gate_learns_the_share_of_right_answers(tmp_path, monkeypatch):
    """With nothing to go by but a constant input, alpha of each fold becomes the weighted share of
    right answers among the *other* fold's known ones; the gated loss does not move it."""
    dataset = _dataset(tmp_path / "d")
    gate = GateConfig(gate="calibrated", gate_inputs="slices", gate_hidden=0, labelled_per_step=512)
    run = _config(
        dataset,
        tmp_path / "r",
        gate,
        slices=SliceConfig(cold_user_history=0, tail_item_fraction=0.0),
    )
    trainer, resident, _ = _built(monkeypatch, run, dataset)
    params = {}
    for weight in (0.0, 5.0):
        guidance = dataclasses.replace(run.guidance, weight=weight)
        one = dataclasses.replace(trainer, config=dataclasses.replace(run, guidance=guidance))
        end, _, _ = _steps(one, resident, step.init_state(one, 0), 400)
        params[weight] = jax.device_get(end.params["gate"])
    np.testing.assert_array_equal(params[0.0]["alpha"]["bias"], params[5.0]["alpha"]["bias"])
    plan = dataclasses.replace(trainer.plan, known=200_000)
    own = random_bits.generators(jax.random.split(jax.random.key(3), 1))
    drawn = preferences_lib.draw_answers(own, resident.known, resident.teacher, plan)
    fold = np.asarray(gates.folds(drawn.queries.users))
    for half in (0, 1):
        weights = np.asarray(drawn.weights) * (fold == half)
        share = float((weights * np.asarray(drawn.right)).sum() / weights.sum())
        assert expit(params[0.0]["alpha"]["bias"][half]) == pytest.approx(share, abs=0.04)


def test_hidden_training_items_are_not_trained_on(tmp_path, monkeypatch):
    dataset = _dataset(tmp_path / "d", training_items="hidden")
    gate = GateConfig(gate="calibrated", labelled_preferences="hidden")
    run = _config(dataset, tmp_path / "r", gate)
    _, resident, _ = _built(monkeypatch, run, dataset)
    chosen = worlds.pairs_of(resident.known.chosen.users, resident.known.chosen.items)
    trained = worlds.pairs_of(
        resident.interactions.targets.users, resident.interactions.targets.items
    )
    train = worlds.pairs_of(dataset.train.users, dataset.train.items)
    assert chosen
    assert chosen | trained == train
    assert not chosen & trained
    # ... unless the answers are taken from validation
    gate = GateConfig(gate="calibrated", labelled_preferences="validation")
    _, resident, _ = _built(monkeypatch, _config(dataset, tmp_path / "r", gate), dataset)
    assert resident.interactions.targets is None
    valid = worlds.pairs_of(dataset.valid.users, dataset.valid.items)
    assert worlds.pairs_of(resident.known.chosen.users, resident.known.chosen.items) == valid


def test_known_answers_that_there_are_not_are_named(tmp_path, monkeypatch):
    dataset = _dataset(tmp_path / "d")
    gate = GateConfig(gate="calibrated", labelled_preferences="hidden")
    with pytest.raises(
        ConfigError, match=r"training_items=shown.*--labelled_preferences=validation"
    ):
        _built(monkeypatch, _config(dataset, tmp_path / "r", gate), dataset)
    pairs = worlds.random_pairs(0, 24, 30, 12)
    empty = pairs[:0]
    alone = worlds.write_dataset(tmp_path / "e", pairs, empty, empty, n_users=24, n_items=30)
    text = (tmp_path / "d" / "scores.csv").read_text()
    (tmp_path / "e" / "scores.csv").write_text(text)
    preferences.import_scores(alone, tmp_path / "e" / "scores.csv", "t", keep_training_items=True)
    with pytest.raises(InputError, match="no word on any of the 0 validation interactions"):
        _built(monkeypatch, _config(alone, tmp_path / "r", GateConfig(gate="calibrated")), alone)


def test_pointwise_guidance_learns_the_scaled_scores(tmp_path, monkeypatch):
    """With nothing else to learn, sigmoid(score) of listed items becomes the teacher's score."""
    dataset = _dataset(tmp_path / "d", unlisted="unknown")
    guidance = GuidanceConfig(guidance="pointwise", teacher="t", weight=2000.0)
    optimizer = OptimizerConfig(l2=0.0, lr=0.05)
    sections = {"model": ModelConfig(dim=16, init_std=1.0), "optimizer": optimizer}
    run = _config(dataset, tmp_path / "r", GateConfig(), guidance, **sections)
    trainer, resident, state = _built(monkeypatch, run, dataset)
    assert state.params["gate"] == {}
    state, _, _ = _steps(trainer, resident, state, 3000)
    values = jax.device_get(step.make_serving_state(trainer)(state, resident.context).values)
    teacher = preferences.load(dataset, "t")
    users = np.repeat(np.arange(24), np.diff(teacher.offsets))
    user, item = values["user"][users].copy(), values["item"][teacher.items]
    user[:, -1] = 1.0  # the item's bias
    found = expit((user * item).sum(1))
    low, high = teacher.scores.min(), teacher.scores.max()
    expected = (teacher.scores - low) / (high - low)
    assert np.abs(found - expected).mean() < 0.1
