"""What a teacher's lists add at scoring time to popular, item-item and EASE, on validation.

An LLM is worth what it adds to the best teacher that costs nothing. Its own lists alone, the
recommenders alone, and both: s_ui + w / r_ui (`evaluation/blending.py`), with the weight of each
user chosen by the other half of the users, so that no user's gain was met by a choice.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from slgr_jax.config import BaselineConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import baselines, blending
from slgr_jax.evaluation.blending import Lists, Tried
from slgr_jax.evaluation.significance import t_interval
from slgr_jax.teacher.audit.added_value import AddedValue, FreeTeacher, SliceValue
from slgr_jax.teacher.products.rows import Teacher


def names(options: BaselineConfig, n_items: int) -> tuple[str, ...]:
    """The recommenders to add to: those that were named, or item_item and those of `auto`."""
    chosen = baselines.chosen(options, n_items)
    if options.baselines != "auto":
        return chosen
    return ("popular", "item_item", *(name for name in chosen if name != "popular"))


def measure(
    dataset: Dataset, teacher: Teacher, options: BaselineConfig, *, seed: int = 0
) -> AddedValue | None:
    """The worth of a teacher's scores; None of preferences, of nothing but users' own training
    items, or without a validation part.

    Args:
      options: which recommenders, and their grids; --baselines=none: None.
      seed: of the halves.

    Raises:
      ConfigError: a recommender that was named cannot be fitted.
    """
    asked = names(options, dataset.n_items)
    if teacher.manifest.kind != "scores" or not len(dataset.valid) or not asked:
        return None
    lists = blending.lists_of(dataset, teacher)
    by_itself = blending.alone(lists, dataset) if lists.rows.indices.size else None
    if by_itself is None or not by_itself.users.size:
        return None
    free = tuple(_free_teacher(dataset, name, options, lists, seed) for name in asked)
    of_slices = blending.by_slice(dataset, by_itself, by_itself.values[0], by_itself.tail[0])
    return AddedValue(
        alone={name: float(values.mean()) for name, values in of_slices},
        listed=float((lists.rows.counts[by_itself.users] > 0).mean()),
        free=free,
        left_out=baselines.left_out(options, dataset.n_items),
    )


def _free_teacher(
    dataset: Dataset, name: str, options: BaselineConfig, lists: Lists, seed: int
) -> FreeTeacher:
    fitted, settings, _ = baselines.tune(baselines.make_baseline(name, options), dataset)
    (tried,) = blending.try_weights(fitted.score_users, fitted.state, [lists], dataset)
    text = ", ".join(f"{key} {value:g}" for key, value in settings.items())
    return FreeTeacher(name, text, tried.weight, slice_values(dataset, tried, seed))


def slice_values(dataset: Dataset, tried: Tried, seed: int = 0) -> tuple[SliceValue, ...]:
    """Each slice without the lists and with them, cross-fitted."""
    alone = dict(blending.by_slice(dataset, tried, tried.values[0], tried.tail[0]))
    added = dict(blending.by_slice(dataset, tried, *tried.cross_fitted(seed)))
    return tuple(_slice_value(name, alone[name], added[name]) for name in alone)


def _slice_value(name: str, alone: np.ndarray, added: np.ndarray) -> SliceValue:
    low, high = t_interval(added - alone)
    return SliceValue(
        slice=name,
        users=int(alone.size),
        alone=float(alone.mean()),
        added=float(added.mean()),
        gain=float((added - alone).mean()),
        low=low,
        high=high,
    )


# --- words and tables ----------------------------------------------------------------------------


def table(value: AddedValue) -> list[dict[str, object]]:
    """A row per recommender and slice, for `text_table` and `markdown_table`."""
    return [
        {"added to": teacher.name, **dataclasses.asdict(its), "w": teacher.weight}
        for teacher in value.free
        for its in teacher.slices
    ]


def said(value: AddedValue) -> list[str]:
    """What the lists are worth, in sentences."""
    best, overall = value.best, value.best.overall
    if overall.low > 0:
        word = "it adds to it"
    elif overall.high < 0:
        word = "it takes away from it"
    else:
        word = "it adds nothing to it that is told from noise"
    shown = "; ".join(
        f"{its.slice} {its.gain:+.4f} [{its.low:+.4f}, {its.high:+.4f}] of {its.alone:.4f}"
        for its in best.slices
        if its.slice in ("overall", "cold users", "tail items")
    )
    others = ", ".join(f"{teacher.name} {teacher.overall.alone:.4f}" for teacher in value.free)
    lines = [
        f"Its worth is what it adds to the best teacher that costs nothing, {best.name}: added "
        f"when scoring, without training, {word} (validation NDCG@10, cross-fitted: {shown}).",
        f"Its lists alone have NDCG@10 {value.alone['overall']:.4f} on validation (of "
        f"{value.listed:.0%} of the users it has a list); {others}.",
    ]
    return [*lines, f"{value.left_out}."] if value.left_out else lines
