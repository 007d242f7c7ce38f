"""Interactions from known tastes, and what a teacher of known reliability states about them.

Shape letters: U users, I items, D width of the latent factors, n interactions or statements.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit, ndtri

from slgr_jax.data import schema
from slgr_jax.data.dataset import Part
from slgr_jax.errors import ConfigError, listing
from slgr_jax.testing.reliabilities import TEACHERS, Reliability

# Every training event is before every validation event, and those before every test event.
START = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
FIRST_DAYS = {"train": 0, "valid": 300, "test": 330}
_DAYS = {"train": 300, "valid": 30, "test": 30}
_MICROSECONDS = 86_400_000_000  # a day

# Cells of a [users, items] block that are in memory at once.
_CELLS = 1 << 20


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What a world is made of. Worlds that differ in the teacher alone have the same interactions.

    Attributes:
      n_users, n_items, dim: U, I, D.
      history_min, history_max, history_exponent: P(l training events) ~ l ** -exponent between.
      valid_per_user, test_per_user: events of each user in those parts.
      popularity_skew: b_i = -skew * log(rank); 0: no item is popular by itself.
      taste: standard deviation of <p, q> / sqrt(D) in s, against Gumbel noise of scale 1; 0: all
        users are alike.
      reliability: r, one of `TEACHERS` or any function of its type.
      open_per_user: open statements on each user.
      open_skew: items of open statements are drawn ~ (popularity + 1) ** skew.
      known_per_valid: known statements on each validation item; 0: none, and validation stays fair
        to a recommender that is guided by the product.
      hidden_per_user: training items of each user (at most their history) that the teacher was not
        shown; a known statement on each.
      known_skew: likewise, the item that a positive is compared with. In the default world 1.3
        makes it the more popular one as often as not (51 to 49): popularity does not give the
        answer away, and r is the Bayes rule for whoever sees history and popularity alone. At 0
        it is so 75 to 25.
      margin_signal: log margin ~ N(+-signal / 2, 1), + where the statement is right; 0: margins
        say nothing.
      seed: of everything.
    """

    n_users: int = 2000
    n_items: int = 1000
    dim: int = 8
    history_min: int = 3
    history_max: int = 200
    history_exponent: float = 1.3
    valid_per_user: int = 2
    test_per_user: int = 2
    popularity_skew: float = 0.7
    taste: float = 2.0
    reliability: Reliability = TEACHERS["smooth"]
    open_per_user: int = 20
    open_skew: float = 0.0
    known_per_valid: int = 2
    hidden_per_user: int = 0
    known_skew: float = 1.3
    margin_signal: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least: dict[str, float] = {"n_users": 1, "dim": 1, "history_min": 1, "valid_per_user": 1}
        least |= {"test_per_user": 1, "open_per_user": 0, "known_per_valid": 0, "seed": 0}
        least |= {"hidden_per_user": 0, "taste": 0.0, "history_max": self.history_min}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}={getattr(self, name)}; need at least {bound}")
        events = self.history_max + self.valid_per_user + self.test_per_user
        if 2 * events > self.n_items:
            raise ConfigError(
                f"a user may have {events} events, more than half of n_items={self.n_items}: too "
                f"few items are left to compare with; lower history_max or take n_items >= "
                f"{2 * events}"
            )


@dataclasses.dataclass(frozen=True)
class Truth:
    """Utilities, which nobody observes: s_ui = <p_u, q_i> + b_i, with scaled p.

    Attributes:
      user_factors, item_factors, item_bias: [U, D], [I, D], [I] float64.
    """

    user_factors: np.ndarray
    item_factors: np.ndarray
    item_bias: np.ndarray

    def utility(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """[n] float64: s of each (user, item)."""
        inner = np.einsum("nd,nd->n", self.user_factors[users], self.item_factors[items])
        return np.asarray(inner + self.item_bias[items])

    def rows(self, users: np.ndarray | slice) -> np.ndarray:
        """[len(users), I] float64: s of each user over the catalogue."""
        inner = self.user_factors[users] @ self.item_factors.T
        return np.asarray(inner + self.item_bias[None, :])


@dataclasses.dataclass(frozen=True)
class Statements:
    """What the teacher says of n pairs, and what is true of it.

    Attributes:
      users, preferred, other: [n] int32, sorted by user.
      margin: [n] float32, > 0.
      right: [n] bool, the stated order is the correct one.
      reliability: [n] float64, r: the probability that it is, given history and popularity.
      belief: [n] float64, the same given the margin too; r where `margin_signal` is 0.
      known: [n] bool, the answer is in the data: `preferred` or `other` is a positive.
    """

    users: np.ndarray
    preferred: np.ndarray
    other: np.ndarray
    margin: np.ndarray
    right: np.ndarray
    reliability: np.ndarray
    belief: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return int(self.users.size)

    @property
    def items(self) -> np.ndarray:
        """[n, 2] int32: (preferred, other)."""
        return np.stack([self.preferred, self.other], axis=1)

    def where(self, keep: np.ndarray) -> Statements:
        """The rows of a bool mask or an index array, in its order."""
        fields = (field.name for field in dataclasses.fields(self))
        return Statements(**{name: getattr(self, name)[keep] for name in fields})


@dataclasses.dataclass(frozen=True)
class World:
    """Interactions, the truth behind them, and what the teacher states.

    Attributes:
      config: what it was made from.
      truth: utilities.
      train, valid, test: interactions, sorted by user, time, item.
    """

    config: WorldConfig
    truth: Truth = dataclasses.field(repr=False)
    train: Part = dataclasses.field(repr=False)
    valid: Part = dataclasses.field(repr=False)
    test: Part = dataclasses.field(repr=False)

    def part(self, name: str) -> Part:
        """The part called `train`, `valid` or `test`."""
        if name not in schema.PARTS:
            raise ConfigError(f"part {name!r} is not one of: {listing(schema.PARTS)}")
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    @functools.cached_property
    def history(self) -> np.ndarray:
        """[U] int32: training interactions of each user."""
        return np.bincount(self.train.users, minlength=self.config.n_users).astype(np.int32)

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """[I] int32: training interactions of each item."""
        return np.bincount(self.train.items, minlength=self.config.n_items).astype(np.int32)

    @functools.cached_property
    def pairs(self) -> Statements:
        """The teacher product: open statements on every user, known ones on what is to be known.

        No pair is there twice. A function of the config, as everything else.
        """
        return _product(np.random.default_rng(_streams(self.config)["pairs"]), self)

    def true_reliability(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """[n] float64: r of pairs [n, 2] of users [n].

        Raises:
          ConfigError: `config.reliability` leaves [0, 1] or has another shape.
        """
        history, popularity = self.history[users], self.popularity[items]
        reliability = np.asarray(self.config.reliability(history, popularity), np.float64)
        if reliability.shape != users.shape:
            raise ConfigError(
                f"reliability gives shape {reliability.shape} for history of shape {users.shape} "
                f"and popularity of shape {items.shape}; need {users.shape}"
            )
        bad = ~((reliability >= 0) & (reliability <= 1))
        if bad.any():
            raise ConfigError(
                f"reliability gives {reliability[bad][0]}; a probability is in [0, 1]"
            )
        return reliability

    def judge(
        self, rng: np.random.Generator, part: str = "test", per_positive: int = 1
    ) -> Statements:
        """New known statements on every positive of `part`: nothing that any product holds.

        Args:
          rng: draws the other items, the order and the margins.
          part: valid or test.
          per_positive: statements on each positive.
        """
        if part == "train":
            raise ConfigError("part='train' is what a recommender learns from; judge valid or test")
        held = self.part(part)
        users = np.repeat(held.users, per_positive)
        positives = np.repeat(held.items, per_positive)
        others = _draw_outside(rng, self, users, schema.PARTS, self.config.known_skew)
        return _state(rng, self, users, positives, others, np.ones(users.size, bool))

    def oracle(self, statements: Statements) -> np.ndarray:
        """[n] float64: P(right | statement, history, popularity, margin, both utilities).

        Of an open statement 0 or 1. Of a known one sigmoid(logit(belief) + x), x = d s - skew *
        d log(popularity + 1), d being preferred minus other: of two items with odds exp(s) of
        being the positive and (popularity + 1) ** skew of being drawn against one. That leaves
        out that no item is drawn twice; calibration error below 0.01 in the default world.
        """
        users, preferred, other = statements.users, statements.preferred, statements.other
        gap = self.truth.utility(users, preferred) - self.truth.utility(users, other)
        log = np.log1p(self.popularity)
        odds = gap - self.config.known_skew * (log[preferred] - log[other])
        return np.where(statements.known, expit(logit(statements.belief) + odds), gap > 0)

    def lists(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A teacher that writes a scored list of `length` items for each user, none from training.

        Its score of (u, i) is sqrt(2) Phi^-1(r_ui) z_ui + N(0, 1), z_ui the utility standardised
        over the catalogue and r_ui the reliability of a pair of items as popular as i, kept in
        [1e-6, 1 - 1e-6]: two items of one popularity whose utilities differ by one standard
        deviation are in the correct order with probability r. The list is the greatest scores.

        Returns:
          users, items [U * length] int32, sorted by user and item; scores, float32.
        """
        n_users, n_items = self.config.n_users, self.config.n_items
        room = n_items - int(self.history.max())
        if not 1 <= length <= room:
            raise ConfigError(f"length={length}; a user has between 1 and {room} items to list")

        twins = np.repeat(np.arange(n_items)[:, None], 2, axis=1)
        listed, listed_scores = [], []
        for rows in _blocks(self.config):
            s = self.truth.rows(rows)
            z = (s - s.mean(axis=1, keepdims=True)) / s.std(axis=1, keepdims=True)
            users = np.repeat(np.arange(rows.start, rows.stop), n_items)
            r = self.true_reliability(users, np.tile(twins, (len(s), 1)))
            weight = math.sqrt(2) * ndtri(np.clip(r, 1e-6, 1 - 1e-6)).reshape(s.shape)
            scores = weight * z + rng.standard_normal(s.shape)

            # Never an item from training.
            first, end = np.searchsorted(self.train.users, [rows.start, rows.stop])
            seen = self.train.users[first:end] - rows.start, self.train.items[first:end]
            scores[seen] = -np.inf

            top = np.sort(np.argpartition(-scores, length - 1, axis=1)[:, :length], axis=1)
            listed.append(top)
            listed_scores.append(np.take_along_axis(scores, top, axis=1))
        items = np.concatenate(listed).ravel().astype(np.int32)
        values = np.concatenate(listed_scores).ravel().astype(np.float32)
        return np.repeat(np.arange(n_users, dtype=np.int32), length), items, values

    @functools.cached_property
    def _positives(self) -> dict[tuple[str, ...], np.ndarray]:
        """Parts -> sorted u * I + i of their interactions."""
        keys = {
            name: self.part(name).users.astype(np.int64) * self.config.n_items
            + self.part(name).items
            for name in schema.PARTS
        }
        chosen = (("train", "valid"), schema.PARTS)
        return {names: np.sort(np.concatenate([keys[name] for name in names])) for names in chosen}


def simulate(config: WorldConfig) -> World:
    """Make the world of `config`: a function of it alone, bit for bit.

    Each ingredient has a random stream of its own, so that one knob does not stir the others:
    worlds that differ in `reliability` or `margin_signal` have the same interactions and pairs.
    """
    streams = {name: np.random.default_rng(seed) for name, seed in _streams(config).items()}
    rng = streams["truth"]
    scale = config.taste / math.sqrt(config.dim)
    truth = Truth(
        user_factors=scale * rng.standard_normal((config.n_users, config.dim)),
        item_factors=rng.standard_normal((config.n_items, config.dim)),
        item_bias=-config.popularity_skew * np.log1p(rng.permutation(config.n_items)),
    )
    train, valid, test = _interactions(config, truth, streams)
    return World(config, truth, train, valid, test)


def _streams(config: WorldConfig) -> dict[str, np.random.SeedSequence]:
    names = ("truth", "lengths", "noise", "order", "clock", "pairs")
    return dict(zip(names, np.random.SeedSequence(config.seed).spawn(len(names)), strict=True))


def _blocks(config: WorldConfig) -> list[slice]:
    """Runs of users whose rows of the catalogue fit in memory."""
    step = max(1, _CELLS // config.n_items)
    starts = range(0, config.n_users, step)
    return [slice(start, min(start + step, config.n_users)) for start in starts]


def _draw(rng: np.random.Generator, weight: np.ndarray, n: int) -> np.ndarray:
    """[n] indices with probability ~ weight, by inversion."""
    total = np.cumsum(weight)
    return np.minimum(np.searchsorted(total, rng.random(n) * total[-1], "right"), weight.size - 1)


def _interactions(
    config: WorldConfig, truth: Truth, streams: dict[str, np.random.Generator]
) -> tuple[Part, ...]:
    """Every user's events, dealt out to train, valid and test."""
    lengths = np.arange(config.history_min, config.history_max + 1)
    n_train = lengths[_draw(streams["lengths"], lengths**-config.history_exponent, config.n_users)]
    later = config.valid_per_user + config.test_per_user
    events: dict[str, list[np.ndarray]] = {name: [] for name in schema.PARTS}
    for rows in _blocks(config):
        keys = truth.rows(rows)
        keys += streams["noise"].gumbel(size=keys.shape)

        # Each user's items by key, as many as the longest history of the block needs.
        ends = n_train[rows, None] + later
        most = int(ends.max())
        top = np.argpartition(-keys, most - 1, axis=1)[:, :most]
        by_key = np.argsort(-np.take_along_axis(keys, top, axis=1), axis=1)

        # A random order of each user's first items: likes do not fade with time, and the three
        # parts are samples of one distribution.
        place = streams["order"].random(top.shape)
        place[np.arange(most)[None, :] >= ends] = np.inf
        shuffled = np.take_along_axis(by_key, np.argsort(place, axis=1), axis=1)
        top = np.take_along_axis(top, shuffled, axis=1)

        after_train = np.arange(most)[None, :] - n_train[rows, None]
        is_test = (after_train >= config.valid_per_user) & (after_train < later)
        is_valid = (after_train >= 0) & (after_train < config.valid_per_user)
        for name, mask in (("train", after_train < 0), ("valid", is_valid), ("test", is_test)):
            user, column = np.nonzero(mask)
            events[name].append(np.stack([user + rows.start, top[user, column]]))

    parts = []
    for name in schema.PARTS:
        users, items = np.concatenate(events[name], axis=1).astype(np.int32)
        parts.append(_timed(streams["clock"], name, users, items))
    return tuple(parts)


def _timed(rng: np.random.Generator, name: str, users: np.ndarray, items: np.ndarray) -> Part:
    """The events of a part at random moments of its days."""
    first = int(START.timestamp()) * 1_000_000 + FIRST_DAYS[name] * _MICROSECONDS
    times = first + rng.integers(0, _DAYS[name] * _MICROSECONDS, users.size)
    order = np.lexsort((items, times, users))
    return Part(users[order], items[order], times[order], None)


def _draw_outside(
    rng: np.random.Generator, world: World, users: np.ndarray, parts: Sequence[str], skew: float
) -> np.ndarray:
    """[n] int32: an item that is in none of the user's `parts`, ~ (popularity + 1) ** skew."""
    positives = world._positives[tuple(parts)]
    weight = (world.popularity + 1.0) ** skew
    items = np.zeros(users.size, np.int32)
    left = np.arange(users.size)
    while left.size:  # rejection: at least half of the catalogue is outside
        items[left] = _draw(rng, weight, left.size)
        keys = users[left].astype(np.int64) * world.config.n_items + items[left]
        place = np.minimum(np.searchsorted(positives, keys), positives.size - 1)
        left = left[positives[place] == keys]
    return items


def _some_of_each(rng: np.random.Generator, users: np.ndarray, most: int) -> np.ndarray:
    """Rows of `users`, which ascend: at most `most` random ones of each user."""
    order = np.lexsort((rng.random(users.size), users))
    first = np.searchsorted(users, users)
    return np.sort(order[np.arange(users.size) - first < most])


def _product(rng: np.random.Generator, world: World) -> Statements:
    config = world.config
    users = np.repeat(np.arange(config.n_users, dtype=np.int32), config.open_per_user)
    seen = ("train", "valid")

    # Open statements: two items, the better one first.
    a = _draw_outside(rng, world, users, seen, config.open_skew)
    b = _draw_outside(rng, world, users, seen, config.open_skew)
    swap = world.truth.utility(users, a) < world.truth.utility(users, b)
    better, worse = np.where(swap, b, a), np.where(swap, a, b)
    keep = a != b

    # Known statements: a positive, against an item that the user never interacted with.
    hidden = _some_of_each(rng, world.train.users, config.hidden_per_user)
    repeats = config.known_per_valid
    held = np.concatenate([np.repeat(world.valid.users, repeats), world.train.users[hidden]])
    positives = np.concatenate([np.repeat(world.valid.items, repeats), world.train.items[hidden]])
    others = _draw_outside(rng, world, held, schema.PARTS, config.known_skew)

    all_users = np.concatenate([users[keep], held])
    first = np.concatenate([better[keep], positives])
    second = np.concatenate([worse[keep], others])
    known = np.arange(all_users.size) >= np.count_nonzero(keep)
    # A pair has one correct order, so equal rows are all there is of repeats. Sorted by user.
    key = (all_users.astype(np.int64) * config.n_items + first) * config.n_items + second
    _, once = np.unique(key, return_index=True)
    return _state(rng, world, all_users[once], first[once], second[once], known[once])


def _state(
    rng: np.random.Generator,
    world: World,
    users: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    known: np.ndarray,
) -> Statements:
    """What the teacher states about pairs whose correct order is (first, second)."""
    r = world.true_reliability(users, np.stack([first, second], axis=1))
    signal = world.config.margin_signal
    right = rng.random(users.size) < r
    margin = np.exp(rng.standard_normal(users.size) + signal * (right - 0.5)).astype(np.float32)
    # Bayes: at log m, N(+signal / 2, 1) is m ** signal times as likely as N(-signal / 2, 1).
    belief = expit(logit(r) + signal * np.log(margin.astype(np.float64)))
    preferred, other = np.where(right, first, second), np.where(right, second, first)
    return Statements(users, preferred, other, margin, right, r, belief, known)
