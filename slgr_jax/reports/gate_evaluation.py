"""Is a run's gate right about its teacher? alpha against labels that nothing learned from.

Labelled preferences of the test part (sampling/labelled_preferences.py): pairs of a test item and
an item that the user never chose, on which the teacher has a word. Nothing in training has seen
them, and they are drawn as preferences are, so that the mean of `right` is how often the teacher is
to be believed.

Shape letters: n labelled preferences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from slgr_jax.config import SliceConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import ranking_metrics
from slgr_jax.guidance import teacher_product
from slgr_jax.guidance.base import Sources
from slgr_jax.guidance.interactions import PseudoInteractions
from slgr_jax.reports import calibration
from slgr_jax.sampling import arrays, random_bits
from slgr_jax.sampling import labelled_preferences as labels
from slgr_jax.sampling.context import Histories
from slgr_jax.sampling.teacher_arrays import TeacherLists, TeacherPairs
from slgr_jax.serving import TrainedRun
from slgr_jax.training import restore

# Labelled preferences that are looked at, and how many are drawn for each.
_LABELLED, _DRAWN = 20_000, 4


def evaluate_gate(run: TrainedRun, *, part: str = "test") -> dict[str, Any] | None:
    """alpha of labelled preferences of `part`.

    Returns:
      auc, calibration_error: of alpha as a prediction of `right` (calibration.py).
      slices: name -> {alpha: its mean, right: share on which the teacher is right, n}.
      reliability: bins of alpha of equal size: {low, high, alpha, right, n}.
      None: no guidance, or the teacher has no word on any such pair.

    Raises:
      ConfigError: the run's reference runs are not those that it was trained with.
    """
    if run.guidance is None:
        return None
    # Hard negatives are those of training: histories cut before validation.
    references = restore.as_of(run.reference_runs, "valid")
    sources = Sources(run.config, run.dataset, run.restored.backbone, references)
    if isinstance(run.guidance, PseudoInteractions):  # of lists it reads the first places
        teacher: TeacherLists | TeacherPairs = run.guidance.teacher_arrays(sources)
    else:
        teacher = teacher_product.teacher_arrays(sources, part)
    drawn = draw(run, teacher, part)
    if drawn is None:
        return None

    users, items = np.asarray(drawn.queries.users), np.asarray(drawn.items)
    margins = np.asarray(drawn.margins) / teacher.margin_scale
    as_of = None if drawn.queries.as_of is None else np.asarray(drawn.queries.as_of)
    alpha = run.believe(users, items, margins, part=part, as_of=as_of)
    right = np.asarray(drawn.right) > 0.5
    groups = _groups(run.config.slices, run.dataset, users, items)
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
            dataclasses.asdict(group) for group in calibration.reliability_bins(alpha, right)
        ],
    }


def draw(
    run: TrainedRun, teacher: TeacherLists | TeacherPairs, part: str
) -> labels.LabelledPreferences | None:
    """Labelled preferences [n] of a part, all of equal weight (host arrays); None: there are none.

    Args:
      teacher: its preferences (host arrays).
    """
    dataset, config = run.dataset, run.config
    source = labels.label_source(dataset, teacher, labels.chosen_items(dataset, part))
    if not source.count:
        return None
    slices = dataset.slices(config.slices)
    facts = arrays.make_facts(dataset, slices.cold_users, slices.tail_items)
    rule = dataclasses.replace(
        teacher_product.preference_rule(config, native=False), count=_LABELLED * _DRAWN
    )
    generators = random_bits.generators(jax.random.split(jax.random.key(0), 1))
    histories: Histories | None = run.restored.context.histories
    placed_source, placed_teacher, placed_facts = jax.device_put((source, teacher, facts))
    drawn = labels.draw_labelled(
        generators,
        placed_source,
        placed_teacher,
        placed_facts,
        rule,
        histories=histories is not None,
    )
    host = jax.tree.map(lambda x: np.asarray(x)[0], drawn)

    # Equally many for everything that follows: by weight, with replacement.
    mass = np.asarray(host.weights, np.float64)
    if not mass.sum():
        return None
    taken = np.random.default_rng(0).choice(mass.size, size=_LABELLED, p=mass / mass.sum())
    chosen: labels.LabelledPreferences = jax.tree.map(lambda x: x[taken], host)
    return chosen


def _groups(
    config: SliceConfig, dataset: Dataset, users: np.ndarray, items: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Masks over pairs: by the user, by either item being tail, by the preferred item's count."""
    slices = dataset.slices(config)
    cold, tail = slices.cold_users[users], slices.tail_items[items].any(axis=1)
    groups = {
        "overall": np.ones(users.size, bool),
        "cold_users": cold,
        "warm_users": ~cold,
        "tail_items": tail,
        "head_items": ~tail,
    }
    for axis, values, edges in (
        ("history", dataset.history[users], config.history_bins),
        ("popularity", dataset.popularity[items[:, 0]], config.popularity_bins),
    ):
        for name, low, high in ranking_metrics.bins(axis, edges):
            groups[name] = (values >= low) & (values <= high)
    return groups
