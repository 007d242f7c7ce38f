"""The teacher's side of a run's resident arrays: its preferences, and what teaches a gate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import hard_negatives
from slgr_jax.models.backbones import AnyBackbone, SequenceBackbone
from slgr_jax.models.scoring import Scoring
from slgr_jax.sampling import arrays, labelled_preferences
from slgr_jax.sampling.context import GRAPH
from slgr_jax.teacher.products import preferences


def teacher_arrays(
    run: config.RunConfig,
    dataset: Dataset,
    members: Sequence[tuple[AnyBackbone, Scoring]] = (),
) -> arrays.TeacherLists | arrays.TeacherPairs | None:
    """The teacher's preferences as host arrays to draw from; None without guidance.

    Args:
      members: the runs of --reference_runs, as of the end of training.

    Raises:
      ManifestError, ShardError: the product does not fit or is damaged.
      ConfigError: lists that hard negatives cannot complete.
      InputError: it states no preference at all.
    """
    guidance = run.guidance
    if guidance.guidance == "none":
        return None
    teacher = preferences.load(dataset, guidance.teacher, verify=run.train.verify_checksums)
    if run.hard_negatives:
        kernels = run.train.kernels
        ranked_highest = hard_negatives.find(
            dataset, teacher, members, run.hard_negatives, kernels=kernels
        )
        teacher = hard_negatives.complete(teacher, ranked_highest)
    found: arrays.TeacherLists | arrays.TeacherPairs
    if teacher.manifest.kind == "preferences":
        # Margins are above 0; a slice of everything is no copy.
        keep = teacher.margin >= guidance.min_gap if guidance.min_gap > 0 else slice(None)
        found = arrays.TeacherPairs(
            users=arrays.host_array(teacher.users[keep], np.int32),
            items=arrays.host_array(
                np.stack([teacher.preferred[keep], teacher.other[keep]], axis=1), np.int32
            ),
            margins=arrays.host_array(teacher.margin[keep], np.float32),
        )
    else:
        found = arrays.teacher_lists(
            teacher.offsets,
            teacher.items,
            teacher.scores,
            guidance,
            unlisted_below=teacher.manifest.unlisted == "below",
            positives=dataset.positives(("train",)),
            n_items=dataset.n_items,
        )
    if not found.stated:
        gap = guidance.min_gap
        why = f" of --min_gap={gap:g} or more" if gap else ": no user has two different scores"
        raise InputError(
            f"teacher {guidance.teacher} states no preference{why}; "
            f"{'lower it, or ' if gap else ''}give more answers"
        )
    return found


def labelled_arrays(
    run: config.RunConfig,
    dataset: Dataset,
    teacher: arrays.TeacherLists | arrays.TeacherPairs | None,
    backbone: AnyBackbone,
) -> tuple[arrays.Known | None, Csr | None]:
    """What a supervised gate learns from, as host arrays, and the interactions left out for it.

    Raises:
      ConfigError: hidden training items that there are not, or that this backbone would see.
      InputError: there is no labelled preference.
    """
    gate = run.gate
    if not run.gated or not gate.supervised or teacher is None:
        return None, None
    path = preferences.product_path(run.data, run.guidance.teacher)
    manifest = schema.read_teacher_manifest(path)
    hides = manifest.training_items == "hidden"
    # A window of a history, or a graph, shows the recommender what it should not learn from. Runs
    # of an ensemble have learned from it: they agree on what a user chose, and a gate would see it.
    blind = not isinstance(backbone, SequenceBackbone) and GRAPH not in backbone.reads
    able = blind and not run.reference_runs
    if gate.labelled_preferences == "hidden" and not (hides and able):
        why = (
            f"teacher {run.guidance.teacher} was not asked about hidden training items (its "
            f"manifest says training_items={manifest.training_items})"
        )
        if hides and not blind:
            why = f"--backbone={run.model.backbone} would still see them in histories or its graph"
        elif hides:
            why = "the runs of --reference_runs were trained on them"
        raise ConfigError(
            f"--labelled_preferences=hidden: {why}; use --labelled_preferences=validation"
        )

    def answers(source: str, hidden: Csr | None) -> arrays.Known:
        chosen = labelled_preferences.make_chosen(dataset, source, hidden)
        if gate.gate == "meta":
            return arrays.Known(chosen, None)
        return labelled_preferences.make_known(dataset, teacher, chosen)

    source, left_out, found = "valid", None, answers("valid", None)
    if hides and able and gate.labelled_preferences != "validation":
        hidden = labelled_preferences.hidden_positives(dataset, *_asked(teacher))
        asked = answers("hidden", hidden)
        if gate.labelled_preferences == "hidden" or asked.count > found.count:
            source, left_out, found = "hidden", hidden, asked
    if not found.count:
        what = "hidden training items" if source == "hidden" else "validation interactions"
        raise InputError(
            f"--gate={gate.gate} learns where the answer is known, and the teacher "
            f"{run.guidance.teacher} has no word on any of the {found.chosen.items.shape[0]} "
            f"{what}; use another --gate, or have the teacher asked about them (slgr teach "
            "candidates)"
        )
    return found, left_out


def _asked(
    teacher: arrays.TeacherLists | arrays.TeacherPairs,
) -> tuple[np.ndarray, np.ndarray]:
    """Users and items that a teacher (host arrays) answered."""
    if isinstance(teacher, arrays.TeacherPairs):
        return np.repeat(teacher.users, 2), np.asarray(teacher.items).ravel()
    counts = np.diff(np.asarray(teacher.offsets))
    return np.repeat(np.arange(counts.size), counts), np.asarray(teacher.items)
