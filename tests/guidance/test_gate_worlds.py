"""Gates in simulated worlds, where it is known how far the teacher is to be believed."""

from __future__ import annotations

import numpy as np
import pytest

from slgr_jax import config, testing
from slgr_jax.reports import calibration
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.serving import load
from slgr_jax.training import loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

WORLD = {"n_users": 1200, "n_items": 400, "history_max": 100, "known_per_valid": 4, "seed": 3}
RUN = {
    "guidance": "pairwise",
    "teacher": "pairs",
    "gate": "calibrated",
    "gate_inputs": "history,popularity",
    "lambda": 0.3,
    "epochs": 20,
    "eval_every": 10,
    "patience": 0,
    "batch_size": 1024,
    "lr": 0.1,
    "pooled_auc": False,
    "verify_checksums": False,
}


def _world(tmp_path, teacher, **more):
    world = testing.simulate(
        testing.WorldConfig(**WORLD | more, reliability=testing.TEACHERS[teacher])
    )
    return world, testing.write(world, tmp_path / teacher)


def _run(dataset, workdir, **knobs):
    run = config.make_run(str(dataset.path), str(workdir), **RUN | knobs)
    loop.train(run)
    return run


def _alpha(run, said):
    """The trained gate's alpha of statements."""
    return load(run.workdir, "last").believe(said.users, said.items, said.margin)


@pytest.mark.parametrize("teacher", ["smooth", "region"])
def test_a_calibrated_gate_finds_where_the_teacher_is_right(tmp_path, teacher):
    """Calibration error under .05 against the true reliability, AUC over .9 of the Bayes rule's,
    on test items that nothing has seen."""
    world, dataset = _world(tmp_path, teacher)
    run = _run(dataset, tmp_path / "run")
    said = world.judge(np.random.default_rng(0), "test", per_positive=4)
    alpha = _alpha(run, said)
    bayes = calibration.auc(said.reliability, said.right)
    auc = calibration.auc(alpha, said.right)
    assert bayes > 0.6
    assert auc - 0.5 > 0.9 * (bayes - 0.5) - 0.01
    assert auc > 0.9 * bayes
    assert calibration.calibration_error(alpha, said.reliability) < 0.05
    # a constant alpha would be calibrated on the whole, and select nothing
    assert np.corrcoef(alpha, said.reliability)[0, 1] > 0.8


def _ndcg(dataset, workdir, **knobs):
    run = _run(dataset, workdir, **knobs)
    ranking = evaluate_run(run.workdir, "x").parts["test"]
    return ranking.users["all"].values["ndcg@10"]


NONE = {"guidance": "none", "teacher": "", "gate": "paper"}


def test_a_shuffled_teacher_does_no_harm(tmp_path):
    """Test NDCG@10, every user: no drop beyond the metric's standard error, and a tenth at most of
    what believing blindly costs, which is far beyond it."""
    _, dataset = _world(tmp_path, "shuffled")
    none = _ndcg(dataset, tmp_path / "none", **NONE)
    gated = _ndcg(dataset, tmp_path / "gated") - none
    blind = _ndcg(dataset, tmp_path / "blind", gate="constant", guidance_loss="logistic") - none
    error = none.std(ddof=1) / np.sqrt(none.size)
    assert blind.mean() < -4 * error
    assert gated.mean() > max(-error, 0.1 * blind.mean())


HARD_NEGATIVES = {
    "teacher": "lists",
    "hard_negatives": 100,
    "gate_inputs": "reference,history,popularity,teacher",
    "patience": 3,
    "eval_every": 5,
}


@pytest.mark.parametrize(("teacher", "helps"), [("smooth", True), ("shuffled", False)])
def test_lists_against_rivals_help_where_they_add_and_nowhere_else(tmp_path, teacher, helps):
    """Lists of 30, lambda 3: cold users gain by far more than noise from a teacher that knows more
    of them than the data do; one that knows nothing does no harm beyond the standard error."""
    world = testing.simulate(testing.WorldConfig(**WORLD, reliability=testing.TEACHERS[teacher]))
    dataset = testing.write(world, tmp_path / "data", lists=30)
    plain = {k: HARD_NEGATIVES[k] for k in ("patience", "eval_every")}
    none = _ndcg(dataset, tmp_path / "none", **NONE | plain)
    knobs = HARD_NEGATIVES | {"reference_runs": str(tmp_path / "none"), "lambda": 3.0}
    gain = _ndcg(dataset, tmp_path / "hard_negatives", **knobs) - none
    if helps:
        gain = gain[dataset.slices(config.SliceConfig()).cold_users]
        assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(gain.size)
    else:
        assert gain.mean() > -none.std(ddof=1) / np.sqrt(none.size)


def test_a_perfect_teacher_is_used_fully(tmp_path):
    """At least nine tenths of what believing it blindly gains."""
    _, dataset = _world(tmp_path, "perfect")
    none = _ndcg(dataset, tmp_path / "none", **NONE)
    gated = _ndcg(dataset, tmp_path / "gated") - none
    blind = _ndcg(dataset, tmp_path / "blind", gate="constant", guidance_loss="logistic") - none
    assert blind.mean() > 3 * blind.std(ddof=1) / np.sqrt(blind.size)
    assert gated.mean() > 0.9 * blind.mean()
