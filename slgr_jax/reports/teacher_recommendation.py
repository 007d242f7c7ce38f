"""What to do with a teacher, from its audit: the command that trains with it, or leave it.

A teacher is worth training with where, on pairs whose right order is known,

    accuracy > 1/2    and    accuracy > item-item    and    accuracy > popularity

the first two beyond chance: one-sided t-tests over users, the greater p of the two corrected by
Holm for all slices that tell something (`Agreement.tells`). `Agreement.believed` corrects for
nothing: of thirty slices of a teacher that knows nothing, some are believed by chance. One that is
not, but adds to the best recommender that costs nothing when scoring, is held against its controls.
"""

from __future__ import annotations

import shlex

import numpy as np

from slgr_jax.evaluation import significance
from slgr_jax.teacher.audit.accuracy import Agreement, TeacherAudit
from slgr_jax.teacher.audit.added_value import AddedValue

LEVEL = 0.05


def recommend(audit: TeacherAudit) -> list[str]:
    """At most three lines: what to do, why, in numbers, and the command if there is one."""
    rows = [row for row in audit.agreement if row.known == audit.deciding]
    if not rows:
        return [
            "Recommended: let validation decide, which keeps no guidance unless one is better.",
            "Why: no pair whose right order is known tells how good this teacher is.",
            _command(audit),
        ]

    tested = [row for row in rows if row.tells]
    p_values = significance.holm([_p(row) for row in tested])
    knowing = [
        row
        for row, p in zip(tested, p_values, strict=True)
        if p < LEVEL and row.accuracy > row.popularity
    ]
    if not knowing and audit.value is not None and audit.value.best.overall.low > 0:
        return _among_controls(audit, audit.value)
    if not knowing:
        return ["Recommended: leave it.", f"Why: {_shortfall(rows[0], bool(tested))}"]

    first = "Recommended: train with it; what validation cannot tell from noise is not kept."
    if audit.manifest.kind == "scores" and audit.manifest.unlisted == "below":
        first = (
            "Recommended: train with it, against hard negatives too, as its lists are free; what "
            "validation cannot tell from noise is not kept."
        )
    best = max(knowing, key=lambda row: (row.name == "all", row.gain))
    others = f"; on {len(knowing) - 1} more of {len(tested)} slices too" if knowing[1:] else ""
    why = (
        f"Why: on {best.name} it is right on {best.accuracy:.1%} of known pairs, item-item on "
        f"{best.item_item:.1%}, popularity on {best.popularity:.1%} ({best.users:,} users){others}."
    )
    return [first, why, _command(audit)]


def _among_controls(audit: TeacherAudit, value: AddedValue) -> list[str]:
    gain = value.best.overall
    places = [f"--data={audit.data}", f"--teacher={audit.manifest.name}"]
    return [
        "Recommended: see whether its controls add as much; train with it if they do not.",
        "Why: on no slice is it above the data beyond chance, but added to "
        f"{value.best.name} when scoring it gains {gain.gain:+.4f} [{gain.low:+.4f}, "
        f"{gain.high:+.4f}] NDCG@10.",
        shlex.join(["slgr", "compare", "--quick", *places]),
    ]


def _p(row: Agreement) -> float:
    """P of accuracy <= 1/2 or accuracy <= item-item: the greater of both one-sided t-tests."""
    if row.users < 2:
        return 1.0
    # [low, high] is cut to [0, 1]: the longer side is whole.
    half = max(row.accuracy - row.low, row.high - row.accuracy)
    return max(
        _one_sided(row.accuracy - 0.5, half, row.users),
        _one_sided(row.gain, row.gain_high - row.gain, row.users),
    )


def _one_sided(mean: float, half: float, users: int) -> float:
    """P of a mean that is 0 or less, from half of its 95 % interval."""
    from scipy import stats  # as slow to import as JAX

    if not np.isfinite(half) or half == 0:
        return 0.0 if mean > 0 and half == 0 else 1.0
    error = half / stats.t.ppf(0.975, users - 1)
    return float(stats.t.sf(mean / error, users - 1))


def _shortfall(total: Agreement, any_tells: bool) -> str:
    right = f"it is right on {total.accuracy:.1%} of {total.pairs:,} known pairs"
    if not any_tells:
        return f"{right}, too few users ({total.users:,}) to tell that from chance."
    if not total.low > 0.5:
        coin = "worse" if total.high < 0.5 else "no better"
        return f"{right} [{total.low:.1%}, {total.high:.1%}], {coin} than a coin."
    return (
        f"{right}, but the data know that: item-item {total.item_item:.1%}, popularity "
        f"{total.popularity:.1%}; on no slice is it above both beyond chance."
    )


def _command(audit: TeacherAudit) -> str:
    parts = [f"--data={audit.data}", "--workdir=RUN", "--guidance=auto"]
    return shlex.join(["slgr", "train", *parts, f"--teacher={audit.manifest.name}"])
