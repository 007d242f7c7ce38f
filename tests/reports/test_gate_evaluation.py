"""A gate judged on test pairs: how often the teacher is right, against enumeration."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.guidance.device_arrays import teacher_arrays
from slgr_jax.guidance.gates import make_gate
from slgr_jax.models.scoring import Scoring
from slgr_jax.reports import gate_evaluation
from slgr_jax.sampling.context import Context
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, step


def _dataset(path):
    dataset = worlds.random_dataset(path, n_users=24, n_items=30, per_user=12)
    rng = np.random.default_rng(0)
    lists = [rng.choice(30, 9, replace=False) for _ in range(24)]
    rows = [f"u{u},i{i},{rank}" for u, items in enumerate(lists) for rank, i in enumerate(items)]
    (path / "scores.csv").write_text("user,item,score\n" + "\n".join(rows) + "\n")
    preferences.import_scores(
        *(dataset, path / "scores.csv", "t"),
        provenance=preferences.Provenance(unlisted="below"),
        keep_training_items=True,
    )
    return dataset, lists


def _judged(dataset, workdir, **knobs):
    run = config.make_run(
        str(dataset.path),
        str(workdir),
        **{"guidance": "selective", "teacher": "t", "batch_size": 16} | knobs,
    )
    trainer, _ = build.build(run, dataset)
    state = step.init_state(trainer, 0)
    serving = step.make_serving_state(trainer)(state, Context())
    return gate_evaluation.judge(
        *(run, dataset, trainer.backbone, make_gate(run.gate), Scoring(serving, Context(), None)),
        teacher_arrays(run, dataset),
    )


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(build, "make_layout", lambda **_: worlds.one_device())


def test_right_is_the_share_among_preferences_with_one_chosen_item(tmp_path):
    """Of every (listed, unlisted) pair with exactly one test item, each weighing 1 / N_u."""
    dataset, lists = _dataset(tmp_path / "d")
    found = _judged(dataset, tmp_path / "r", gate="constant", alpha=0.3)
    slices = dataset.slices(config.SliceConfig())
    mass = {"overall": np.zeros(2), "cold_users": np.zeros(2), "tail_items": np.zeros(2)}
    for u, listed in enumerate(lists):
        own = {name: set(dataset.positives((name,)).row(u).tolist()) for name in
               ("train", "valid", "test")}  # fmt: skip
        new = own["test"] - own["train"] - own["valid"]
        everything = set().union(*own.values())
        outside = set(range(30)) - set(listed.tolist()) - everything
        for a in listed.tolist():
            for b in set(range(30)) - set(listed.tolist()):
                right = a in new and b in outside
                if right or (b in new and a not in everything):
                    for name in mass:
                        inside = {
                            "overall": True,
                            "cold_users": slices.cold_users[u],
                            "tail_items": slices.tail_items[a] or slices.tail_items[b],
                        }[name]
                        mass[name][int(right)] += inside / len(outside)
    for name, (wrong, right) in mass.items():
        assert found["slices"][name]["right"] == pytest.approx(right / (wrong + right), abs=0.03)
        assert found["slices"][name]["alpha"] == pytest.approx(0.3)
    assert 0.05 < found["slices"]["overall"]["right"] < 0.95
    assert found["auc"] == 0.5
    assert [b["n"] for b in found["reliability"]] == [found["slices"]["overall"]["n"]]
    gap = abs(0.3 - found["slices"]["overall"]["right"])
    assert found["calibration_error"] == pytest.approx(gap, abs=1e-6)


def test_a_learned_gates_alpha_is_read_from_the_serving_state(tmp_path):
    """Of an untrained calibrated gate: one half; with the margin: the recommender's own belief."""
    dataset, _ = _dataset(tmp_path / "d")
    knobs = {"gate": "calibrated", "labelled_per_step": 8}
    plain = _judged(dataset, tmp_path / "r", **knobs)
    assert {round(x["alpha"], 6) for x in plain["slices"].values()} == {0.5}
    knobs |= {"gate_inputs": "margin", "init_std": 2.0}
    own = _judged(dataset, tmp_path / "r", **knobs)
    assert len(own["reliability"]) > 5
    assert jax.tree.all(jax.tree.map(lambda x: x == x, own["slices"]["overall"]))
