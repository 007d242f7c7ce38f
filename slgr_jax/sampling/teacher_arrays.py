"""A teacher's preferences as arrays to draw from, made on the host and kept on the devices.

Shape letters: U users, E entries of the teacher's lists, m entries that can start a preference,
G preferences.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.data.dataset import Csr, beaten
from slgr_jax.sampling.arrays import Excluded, Share, drawable, excluded, host_array
from slgr_jax.sampling.context import host32
from slgr_jax.sampling.moments import Moments


@dataclasses.dataclass(frozen=True)
class PreferenceRule:
    """The static numbers of drawing preferences: they are compiled in.

    Attributes:
      count: G, preferences a step.
      min_gap: least score difference that makes a preference; ties never do.
      unlisted_share: share that puts a listed item over an unlisted one, where these rank below.
      candidates: of so many times G drawn the largest gaps are kept; 1: none is left out.
      together: L, list entries that follow each other and are drawn together.
      native: whether the CPU kernels draw.
    """

    count: int
    min_gap: float = 0.0
    unlisted_share: float = 1.0
    candidates: int = 1
    together: int = 1
    native: bool = False


@struct.dataclass
class TeacherLists:
    """Scored lists: a preference is two entries of one user with scores that differ enough.

    Entries of a user are sorted by score. A row of `starts` is (entry, its user, low, high):
    low:high (positions in the user's row) are the entries too close to it to make a preference
    with it. One array, as the four are looked up together at random places.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "E"]
    scores: Float[Array, "E"]
    starts: Int[Array, "m 4"]  # entries that can start a preference
    unlisted: Excluded | None  # list and positives cut out; None: unlisted means unknown
    floor: float = struct.field(pytree_node=False)  # score that an unlisted item counts with
    ceiling: float = struct.field(pytree_node=False)  # the greatest score
    margin_scale: float = struct.field(pytree_node=False)  # a typical margin: spread of scores
    share: Share | None = None  # of a shard of users

    @property
    def stated(self) -> int | Int[Array, ""]:
        """How many entries there are to start a preference with; of a shard at least 1, padding."""
        return drawable(self.share, self.starts)


@struct.dataclass
class TeacherPairs:
    """Preferences as the teacher stated them, one by one."""

    users: Int[Array, "E"]
    items: Int[Array, "E 2"]
    margins: Float[Array, "E"]
    margin_scale: float = struct.field(pytree_node=False)  # the mean margin
    share: Share | None = None  # of a shard of users

    @property
    def stated(self) -> int | Int[Array, ""]:
        """How many preferences there are to draw from; of a shard at least 1, padding."""
        return drawable(self.share, self.users)


def teacher_pairs(
    users: np.ndarray,
    items: np.ndarray,
    margins: np.ndarray,
    of_all: Moments | None = None,
) -> TeacherPairs:
    """Stated preferences, ready to be drawn from (host arrays).

    Args:
      users, items, margins: [E], [E, 2] (preferred, other), [E].
      of_all: of the margins of all users, where those are of some.
    """
    scale = float(np.mean(margins)) if margins.size else 0.0
    if of_all is not None:
        scale = of_all.mean
    return TeacherPairs(
        host_array(users, np.int32),
        host_array(items, np.int32),
        host_array(margins, np.float32),
        scale or 1.0,
    )


def teacher_lists(
    offsets: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    *,
    min_gap: float,
    unlisted_share: float,
    unlisted_below: bool,
    positives: Csr,
    n_items: int,
    of_all: Moments | None = None,
) -> TeacherLists:
    """Per-user score lists, ready to be drawn from (host arrays).

    Args:
      offsets: [U + 1]; items, scores: [E], each user's entries sorted by score.
      min_gap, unlisted_share: as of `PreferenceRule`.
      unlisted_below: an item outside a user's list ranks below it.
      positives: training pairs, never the unlisted side of a preference.
      of_all: of the scores of all users' lists, where those are of some users.
    """
    counts = np.diff(offsets)
    users = np.repeat(np.arange(counts.size, dtype=np.int32), counts)

    # Scores ascend within a row: what an entry beats comes first, what beats it comes last.
    low = beaten(offsets, scores, min_gap)
    beaten_by = beaten(offsets[-1] - offsets[::-1], -scores[::-1], min_gap)[::-1]
    high = counts[users] - beaten_by
    partners = counts[users] - (high - low)

    use_unlisted = unlisted_below and unlisted_share > 0
    able = np.ones(items.size, bool) if use_unlisted else partners > 0
    cut = None
    if use_unlisted:
        listed_and_positive = Csr.from_pairs(
            np.concatenate([users, positives.owners()]),
            np.concatenate([items, positives.indices]),
            counts.size,
        )
        cut = excluded(listed_and_positive, None, n_items)
        able &= cut.free[users] > 0

    first = np.flatnonzero(able)
    starts = np.empty((first.size, 4), np.int32)  # filled by column: lists can be large
    for column, values in enumerate((first, users[first], low[first], high[first])):
        starts[:, column] = values

    scores = np.asarray(scores, np.float32)
    floor, ceiling = (float(scores.min()), float(scores.max())) if scores.size else (0.0, 0.0)
    scale = float(np.std(scores)) if scores.size else 0.0
    if of_all is not None and of_all.count:
        floor, ceiling, scale = of_all.least, of_all.greatest, of_all.deviation
    return TeacherLists(
        offsets=host32(offsets),
        items=host32(items),
        scores=host_array(scores, np.float32),
        starts=host32(starts),
        unlisted=cut,
        floor=floor,
        ceiling=ceiling,
        margin_scale=scale or 1.0,
    )
