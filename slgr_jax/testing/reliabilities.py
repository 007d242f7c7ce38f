"""How often a simulated teacher is right: r(history of the user, popularity of the two items).

Shape letters: n pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

# (history [n], popularity [n, 2]) -> [n] in [0, 1]: P(the pair is stated in the correct order).
Reliability = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Constant:
    """r = `right` everywhere: 1 is a perfect teacher, 1/2 one that knows nothing, 0 a liar."""

    right: float

    def __call__(self, history: np.ndarray, popularity: np.ndarray) -> np.ndarray:
        return np.full(history.shape, self.right)


@dataclasses.dataclass(frozen=True)
class Region:
    """r = `inside` where the history and the pair's mean popularity are at most these, else
    `outside`."""

    history: float = math.inf
    popularity: float = math.inf
    inside: float = 0.95
    outside: float = 0.5

    def __call__(self, history: np.ndarray, popularity: np.ndarray) -> np.ndarray:
        within = (history <= self.history) & (popularity.mean(axis=1) <= self.popularity)
        return np.where(within, self.inside, self.outside)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """r = low + (high - low) sigmoid(a (x_h - log1p(history)) + b (x_p - log1p(popularity))).

    x_h and x_p are log1p of the centres, log1p(popularity) is a mean over the two items. Slopes
    above 0 make a teacher that is better where there are fewer data, as an LLM with world
    knowledge is.
    """

    low: float = 0.5
    high: float = 0.95
    history_slope: float = 2.0
    history_centre: float = 12.0
    popularity_slope: float = 2.0
    popularity_centre: float = 80.0

    def __call__(self, history: np.ndarray, popularity: np.ndarray) -> np.ndarray:
        logit = self.history_slope * (np.log1p(self.history_centre) - np.log1p(history))
        logit += self.popularity_slope * (
            np.log1p(self.popularity_centre) - np.log1p(popularity).mean(axis=1)
        )
        return self.low + (self.high - self.low) * (0.5 + 0.5 * np.tanh(logit / 2))


TEACHERS: Mapping[str, Reliability] = {
    "perfect": Constant(1.0),
    "shuffled": Constant(0.5),
    "region": Region(history=8),
    "smooth": Logistic(),
}
