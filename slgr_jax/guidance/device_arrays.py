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


def resident_teacher(
    run: config.RunConfig,
    dataset: Dataset,
    members: Sequence[tuple[AnyBackbone, Scoring]] = (),
) -> arrays.TeacherLists | arrays.TeacherPairs | None:
    """The teacher's preferences as host arrays to draw from; None without guidance.

    Args:
      members: the runs of --ensemble, as of the end of training.

    Raises:
      ManifestError, ShardError: the product does not fit or is damaged.
      ConfigError: lists that rivals cannot complete.
      InputError: it states no preference at all.
    """
    guidance = run.guidance
    if guidance.guidance == "none":
        return None
    teacher = preferences.load(dataset, guidance.teacher, verify=run.train.verify_checksums)
    if run.rivals:
        kernels = run.train.kernels
        found_rivals = hard_negatives.find(dataset, teacher, members, run.rivals, kernels=kernels)
        teacher = hard_negatives.complete(teacher, found_rivals)
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


def resident_known(
    run: config.RunConfig,
    dataset: Dataset,
    teacher: arrays.TeacherLists | arrays.TeacherPairs | None,
    backbone: AnyBackbone,
) -> tuple[arrays.Known | None, Csr | None]:
    """What a taught gate learns from, as host arrays, and the interactions left out for it.

    Raises:
      ConfigError: hidden training items that there are not, or that this backbone would see.
      InputError: there is no known answer.
    """
    gate = run.gate
    if not run.gated or not gate.taught or teacher is None:
        return None, None
    path = preferences.product_path(run.data, run.guidance.teacher)
    manifest = schema.read_teacher_manifest(path)
    hides = manifest.training_items == "hidden"
    # A window of a history, or a graph, shows the recommender what it should not learn from. Runs
    # of an ensemble have learned from it: they agree on what a user chose, and a gate would see it.
    blind = not isinstance(backbone, SequenceBackbone) and GRAPH not in backbone.reads
    able = blind and not run.ensemble
    if gate.known_answers == "hidden" and not (hides and able):
        why = (
            f"teacher {run.guidance.teacher} was not asked about hidden training items (its "
            f"manifest says training_items={manifest.training_items})"
        )
        if hides and not blind:
            why = f"--backbone={run.model.backbone} would still see them in histories or its graph"
        elif hides:
            why = "the runs of --ensemble were trained on them"
        raise ConfigError(f"--known_answers=hidden: {why}; use --known_answers=validation")

    def answers(source: str, hidden: Csr | None) -> arrays.Known:
        chosen = labelled_preferences.make_chosen(dataset, source, hidden)
        if gate.gate == "meta":
            return arrays.Known(chosen, None)
        return labelled_preferences.make_known(dataset, teacher, chosen)

    source, left_out, found = "valid", None, answers("valid", None)
    if hides and able and gate.known_answers != "validation":
        hidden = labelled_preferences.hidden_positives(dataset, *_asked(teacher))
        asked = answers("hidden", hidden)
        if gate.known_answers == "hidden" or asked.count > found.count:
            source, left_out, found = "hidden", hidden, asked
    if not found.count:
        what = "hidden training items" if source == "hidden" else "validation interactions"
        raise InputError(
            f"--gate={gate.gate} learns where the answer is known, and the teacher "
            f"{run.guidance.teacher} has no word on any of the {found.chosen.items.shape[0]} "
            f"{what}; use another --gate, or have the teacher asked about them (launch/teach.py "
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
