"""Is a run's gate right about its teacher? alpha against labelled preferences that nothing learned
from.

Labelled preferences of the test part (sampling/labelled_preferences.py): pairs of a test item and
an item that the user never chose, on which the teacher has a word. Nothing in training has seen
them, and they are drawn as preferences are, so that the mean of `right` is how often the teacher
is to be believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import ranking_metrics
from slgr_jax.guidance import gates, pairwise
from slgr_jax.guidance.supervision import believed
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.row_access import Candidates
from slgr_jax.models.scoring import Scoring, pair_scores, reference_scores
from slgr_jax.reports import calibration
from slgr_jax.sampling import arrays, labelled_preferences, negatives, preferences, random_bits
from slgr_jax.sampling.context import Queries

# Labelled preferences that are looked at, and how many are drawn for each.
_ANSWERS, _DRAWN = 20_000, 4


def judge(
    run: RunConfig,
    dataset: Dataset,
    backbone: AnyBackbone,
    gate: gates.Gate,
    scoring: Scoring,
    teacher: arrays.TeacherLists | arrays.TeacherPairs,
    *,
    part: str = "test",
    reference_runs: Sequence[tuple[AnyBackbone, Scoring]] = (),
) -> dict[str, Any] | None:
    """alpha of labelled preferences of `part`; None where the teacher has no word on any.

    Args:
      scoring: the trained backbone; its serving state has the gate's parameters.
      teacher: its preferences (host arrays).
      ensemble: the runs whose spread the gate reads, as of the moment before `part`.

    Returns:
      auc, calibration_error: of alpha as a prediction of `right` (reliability.py).
      slices: name -> {alpha: its mean, right: share on which the teacher is right, n}.
      reliability: bins of alpha of equal size: {low, high, alpha, right, n}.
    """
    chosen = labelled_preferences.make_chosen(dataset, part)
    found = labelled_preferences.make_known(dataset, teacher, chosen)
    if not found.count:
        return None
    slices = dataset.slices(run.slices)
    masks = (slices.cold_users, slices.tail_items)
    made = arrays.interactions(dataset, run.sampler, *masks)
    longest = arrays.longest_row(arrays.DeviceArrays(made, teacher, scoring.context, found))
    plan = negatives.Plan(
        *(dataset.n_items, 1, 1, 0, run.sampler, run.guidance),
        search_steps=longest.bit_length(),
        known=_ANSWERS * _DRAWN,
    )
    own = random_bits.generators(jax.random.split(jax.random.key(0), 1))
    placed, resident = jax.device_put((found, teacher))
    drawn = jax.tree.map(
        lambda x: np.asarray(x)[0], preferences.draw_answers(own, placed, resident, plan)
    )
    # Equally many for everything that follows: by weight, with replacement.
    mass = np.asarray(drawn.weights, np.float64)
    if not mass.sum():
        return None
    taken = np.random.default_rng(0).choice(mass.size, size=_ANSWERS, p=mass / mass.sum())
    users, items = drawn.queries.users[taken], drawn.items[taken]
    margins = drawn.margins[taken] / arrays.margin_scale(teacher)
    as_of = drawn.queries.as_of[taken]
    asked = (users, items, margins, as_of)
    alpha = alphas(run, made.facts, backbone, gate, scoring, *asked, reference_runs=reference_runs)
    right = drawn.right[taken] > 0.5
    groups = _groups(run, dataset, users, items)
    return {
        "auc": None if right.all() or not right.any() else calibration.auc(alpha, right),
        "calibration_error": calibration.calibration_error(alpha, right),
        "slices": {
            name: {
                "alpha": float(alpha[mask].mean()),
                "right": float(right[mask].mean()),
                "n": int(mask.sum()),
            }
            for name, mask in groups.items()
            if mask.any()
        },
        "reliability": [
            {"low": b.low, "high": b.high, "alpha": b.alpha, "right": b.right, "n": b.n}
            for b in calibration.reliability_bins(alpha, right)
        ],
    }


def alphas(
    run: RunConfig,
    facts: arrays.Facts,
    backbone: AnyBackbone,
    gate: gates.Gate,
    scoring: Scoring,
    users: np.ndarray,
    items: np.ndarray,
    margins: np.ndarray,
    as_of: np.ndarray | None = None,
    *,
    reference_runs: Sequence[tuple[AnyBackbone, Scoring]] = (),
) -> np.ndarray:
    """[n] alpha of preferences, as a trained run believes them.

    Args:
      facts: of the training data (`arrays.interactions`).
      scoring: the trained backbone; its serving state has the gate's parameters.
      users, items: [n], [n, 2] (preferred, other).
      margins: [n] the teacher's, over a typical one.
      until: [n] the moment of each, for backbones that read histories.
      ensemble: the runs whose spread the gate reads, each at its own moment of the users.
    """
    moments = None if scoring.as_of is None else jnp.asarray(as_of)
    asked = Candidates(Queries(jnp.asarray(users), moments), jnp.asarray(items))

    backbones, members = [b for b, _ in reference_runs], [member for _, member in reference_runs]

    @jax.jit
    def believe(
        scoring: Scoring,
        members: Sequence[Scoring],
        lanes: Candidates,
        margins: jax.Array,
        facts: arrays.Facts,
    ) -> Any:
        def scores(dropout: tuple[float, jax.Array] | None) -> jax.Array:
            return pair_scores(backbone, scoring, lanes, dropout)

        inputs = pairwise.gate_inputs(
            run.gate,
            scores(None),
            lambda key, rate: scores((rate, key)),
            lanes.queries.users,
            margins,
            preferences.pair_facts(facts, lanes.queries.users, lanes.items),
            jax.random.key(1),
            reference_scores(backbones, members, lanes.queries.users, lanes.items)
            if members
            else None,
        )
        return believed(gate, scoring.serving.gate, inputs)[0]

    found = believe(scoring, members, asked, jnp.asarray(margins), jax.device_put(facts))
    return np.asarray(found, np.float64)


def _groups(
    run: RunConfig, dataset: Dataset, users: np.ndarray, items: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Masks over pairs: by the user, by either item being tail, by the preferred item's count."""
    slices = dataset.slices(run.slices)
    cold, tail = slices.cold_users[users], slices.tail_items[items].any(axis=1)
    found = {
        "overall": np.ones(users.size, bool),
        "cold_users": cold,
        "warm_users": ~cold,
        "tail_items": tail,
        "head_items": ~tail,
    }
    for what, values, edges in (
        ("history", dataset.history[users], run.slices.history_bins),
        ("popularity", dataset.popularity[items[:, 0]], run.slices.popularity_bins),
    ):
        for name, low, high in ranking_metrics.bins(what, edges):
            found[name] = (values >= low) & (values <= high)
    return found
