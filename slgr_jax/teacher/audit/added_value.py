"""What a teacher's lists add to recommenders that cost nothing, at scoring time, on validation.

Data alone; `reports/added_value.py` measures.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SliceValue:
    """NDCG@10 of a slice of validation.

    Attributes:
      slice: overall, cold users, warm users or tail items.
      users: how many.
      alone: of the recommender.
      added: of score + w / rank, each user's w chosen by the other half of the users.
      gain, low, high: added - alone, with its 95 % interval over users.
    """

    slice: str
    users: int
    alone: float
    added: float
    gain: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class FreeTeacher:
    """A recommender that costs nothing, alone and with the lists added.

    Attributes:
      name: of the baseline; settings: as validation chose them, for people.
      weight: w, chosen by all of validation.
      slices: overall first.
    """

    name: str
    settings: str
    weight: float
    slices: tuple[SliceValue, ...]

    @property
    def overall(self) -> SliceValue:
        """Of all users."""
        return self.slices[0]


@dataclasses.dataclass(frozen=True)
class AddedValue:
    """The worth of lists at scoring time.

    Attributes:
      alone: slice -> NDCG@10 of the lists as they are; users without one count 0.
      listed: share of the users with validation items that have a list.
      free: recommenders that cost nothing.
      left_out: why EASE is not among them; empty where it is.
    """

    alone: dict[str, float]
    listed: float
    free: tuple[FreeTeacher, ...]
    left_out: str

    @property
    def best(self) -> FreeTeacher:
        """The best of them without the lists, overall."""
        return max(self.free, key=lambda teacher: teacher.overall.alone)
