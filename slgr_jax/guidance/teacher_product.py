"""A teacher product as arrays to draw from: its preferences, and what supervises a gate."""

from __future__ import annotations

import numpy as np

from slgr_jax import cluster
from slgr_jax.config import RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import hard_negatives, vector_teacher
from slgr_jax.guidance.base import Sources
from slgr_jax.models.backbones import SequenceBackbone
from slgr_jax.sampling import labelled_preferences as labels
from slgr_jax.sampling import user_shards
from slgr_jax.sampling.context import GRAPH
from slgr_jax.sampling.moments import Moments
from slgr_jax.sampling.teacher_arrays import (
    PreferenceRule,
    TeacherLists,
    TeacherPairs,
    teacher_lists,
    teacher_pairs,
)
from slgr_jax.teacher.products import own_users, preferences
from slgr_jax.teacher.products.rows import Teacher


def preference_rule(run: RunConfig, *, native: bool) -> PreferenceRule:
    """How a run draws preferences."""
    guidance, pairwise = run.guidance, run.pairwise
    return PreferenceRule(
        count=run.preferences_per_step,
        min_gap=guidance.min_gap,
        unlisted_share=guidance.unlisted_share,
        candidates=pairwise.pair_candidates if pairwise.pair_selection == "largest_gap" else 1,
        together=run.sampler.triples_per_user,
        native=native,
    )


def load(run: RunConfig, dataset: Dataset) -> Teacher:
    """The product that a run names, of the users whose interactions `dataset` has.

    Raises:
      ManifestError, ShardError: it does not fit or is damaged.
    """
    name, verify = run.guidance.teacher, run.train.verify_checksums
    if dataset.of_users is None:
        return preferences.load(dataset, name, verify=verify)
    return own_users.load(dataset, name, pieces=cluster.processes(), verify=verify)


def of_all(run: RunConfig, numbers: np.ndarray) -> Moments | None:
    """What the scores or margins of all processes come to, where a process may have its own users'
    alone: the same on any number of them. None where it has all.

    Args:
      numbers: [n] float32 of this process.
    """
    return Moments.of(numbers).of_job() if run.train.user_shards else None


def teacher_arrays(sources: Sources, part: str = "valid") -> TeacherLists | TeacherPairs:
    """The teacher's preferences as host arrays to draw from.

    Args:
      part: of vectors, on whose items their word is asked (`vector_teacher.lists`).

    Raises:
      ManifestError, ShardError: the product does not fit or is damaged.
      ConfigError: lists that hard negatives cannot complete.
      InputError: it states no preference at all.
    """
    run, dataset, guidance = sources.run, sources.dataset, sources.run.guidance
    if guidance.teacher_vectors and not guidance.teacher:
        return vector_teacher.lists(dataset, guidance.teacher_vectors, part)
    teacher = load(run, dataset)
    if run.hard_negatives:
        ranked_highest = hard_negatives.of_lists(
            dataset,
            teacher,
            sources.reference_runs,
            run.hard_negatives,
            kernels=run.train.kernels,
        )
        teacher = hard_negatives.complete(teacher, ranked_highest)

    arrays: TeacherLists | TeacherPairs
    if teacher.manifest.kind == "preferences":
        # Margins are above 0; a slice of everything is no copy.
        keep = teacher.margin >= guidance.min_gap if guidance.min_gap > 0 else slice(None)
        items = np.stack([teacher.preferred[keep], teacher.other[keep]], axis=1)
        margins = teacher.margin[keep]
        arrays = teacher_pairs(teacher.users[keep], items, margins, of_all(run, margins))
    else:
        arrays = teacher_lists(
            teacher.offsets,
            teacher.items,
            teacher.scores,
            min_gap=guidance.min_gap,
            unlisted_share=guidance.unlisted_share,
            unlisted_below=teacher.manifest.unlisted == "below",
            positives=dataset.positives(("train",)),
            n_items=dataset.n_items,
            of_all=of_all(run, teacher.scores),
        )
    if not user_shards.total(int(arrays.stated), dataset):
        gap = guidance.min_gap
        why = f" of --min_gap={gap:g} or more" if gap else ": no user has two different scores"
        raise InputError(
            f"teacher {guidance.teacher} states no preference{why}; "
            f"{'lower it, or ' if gap else ''}give more answers"
        )
    return arrays


def labelled_arrays(
    sources: Sources, teacher: TeacherLists | TeacherPairs
) -> tuple[labels.LabelSource | None, Csr | None]:
    """What a supervised gate learns from, as host arrays, and the interactions left out for it.

    Raises:
      ConfigError: hidden training items that there are not, or that this backbone would see.
      InputError: there is no labelled preference.
    """
    run, dataset, backbone, gate = sources.run, sources.dataset, sources.backbone, sources.run.gate
    if not run.gate_is_taught:
        return None, None
    training_items = "no question"  # of vectors nobody asks about single items
    if run.guidance.teacher:
        path = preferences.product_path(run.data, run.guidance.teacher)
        training_items = schema.read_teacher_manifest(path).training_items
    hides = training_items == "hidden"
    # A window of a history, or a graph, shows the recommender what it should not learn from.
    # Reference runs have learned from it: they agree on what a user chose, and a gate would see it.
    blind = not isinstance(backbone, SequenceBackbone) and GRAPH not in backbone.reads
    able = blind and not run.reference_runs
    if gate.labelled_preferences == "hidden" and not (hides and able):
        why = (
            f"teacher {run.guided_by} was not asked about hidden training items (its "
            f"manifest says training_items={training_items})"
        )
        if hides and not blind:
            why = f"--backbone={run.model.backbone} would still see them in histories or its graph"
        elif hides:
            why = "the runs of --reference_runs were trained on them"
        raise ConfigError(
            f"--labelled_preferences=hidden: {why}; use --labelled_preferences=validation"
        )

    source, left_out = "valid", None
    arrays = labels.label_source(dataset, teacher, labels.chosen_items(dataset, source))
    count = user_shards.total(int(arrays.count), dataset)
    if hides and able and gate.labelled_preferences != "validation":
        hidden = labels.hidden_positives(dataset, *_asked(teacher))
        of_hidden = labels.label_source(
            dataset, teacher, labels.chosen_items(dataset, "hidden", hidden)
        )
        hidden_count = user_shards.total(int(of_hidden.count), dataset)
        if gate.labelled_preferences == "hidden" or hidden_count > count:
            source, left_out, arrays, count = "hidden", hidden, of_hidden, hidden_count
    if not count:
        where = "hidden training items" if source == "hidden" else "validation interactions"
        raise InputError(
            f"--gate={gate.gate} learns where the answer is known, and the teacher "
            f"{run.guided_by} has no word on any of the {arrays.chosen.items.shape[0]} "
            f"{where}; use another --gate, or have the teacher asked about them (slgr teach "
            "candidates)"
        )
    return arrays, left_out


def _asked(teacher: TeacherLists | TeacherPairs) -> tuple[np.ndarray, np.ndarray]:
    """Users and items that a teacher (host arrays) answered."""
    if isinstance(teacher, TeacherPairs):
        return np.repeat(teacher.users, 2), np.asarray(teacher.items).ravel()
    counts = np.diff(np.asarray(teacher.offsets))
    return np.repeat(np.arange(counts.size), counts), np.asarray(teacher.items)
