"""Device arrays: what drawing batches needs, built on the host, kept on the devices.

For each user the set of items that must not be drawn is cut out of the distribution over items
(`Excluded`), so that a draw is one binary search and never a rejection (`negatives.draw_outside`).

Shape letters: U users, I items, n training pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import SamplerConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError
from slgr_jax.sampling.context import Context, host32, interaction_rows

# Keys from one of `Excluded.marks` to the next: a cache line of them (kLine of draws.cc).
MARKED = 16


@struct.dataclass
class Excluded:
    """Per user, a sorted set of items cut out of a distribution over items.

    Attributes:
      offsets: [U + 1] bounds of each user's row.
      keys: [n] mass of the items below the row's k-th item that are not cut out.
      marks: [ceil(n / MARKED)] every MARKED-th of the keys, where the CPU kernels begin a search.
      shifts: [n] mass of the row's items up to and with the k-th; None where every mass is 1,
        when it is k + 1.
      free: [U] mass that is left.
      search_steps: halvings that cover the longest row.
    """

    offsets: Int[Array, "U1"]
    keys: Int[Array, "n"]
    marks: Int[Array, "m"]
    shifts: Int[Array, "n"] | None
    free: Int[Array, "U"]
    search_steps: int = struct.field(pytree_node=False)


@struct.dataclass
class Share:
    """What a shard of users has of all entries that something is drawn from (`user_shards.py`).

    Attributes:
      count: [] the first so many of the shard's array are entries, the rest is padding.
      weight: [] of a lane that is drawn from them: V times their share of all.
    """

    count: Int[Array, ""]
    weight: Float[Array, ""]


def drawable(share: Share | None, entries: jax.Array) -> int | Int[Array, ""]:
    """How many entries there are to draw from; of a shard at least 1, which may be padding."""
    return int(entries.shape[0]) if share is None else jnp.maximum(share.count, 1)


@struct.dataclass
class Facts:
    """What is known of each user and item from training data alone.

    Attributes:
      log_history, log_popularity: log(1 + training interactions) of each user, of each item, with
        mean 0 and standard deviation 1.
      cold, tail: 1 where the user is cold, where the item is tail.
      fold: which half of the users each is in (`gates.folds`), where users are split and known by
        their rows; None: their number says.
    """

    log_history: Float[Array, "U"]
    log_popularity: Float[Array, "I"]
    cold: Float[Array, "U"]
    tail: Float[Array, "I"]
    fold: Int[Array, "U"] | None = None


@struct.dataclass
class PairFacts:
    """`Facts` of the user and of both items of G pairs."""

    log_history: Float[Array, "*G"]
    log_popularity: Float[Array, "*G 2"]
    cold: Float[Array, "*G"]
    tail: Float[Array, "*G 2"]
    fold: Int[Array, "*G"] | None = None


@struct.dataclass
class Targets:
    """Interactions to learn from one by one, where their time or their label counts.

    Attributes:
      users, items: of each; a window's are those of its last event.
      as_of: how many events the user has before it; None where no history is read.
      labels: 1 or 0; None where every interaction is a positive.
      weights: what each counts; None where all count alike, or where histories say it of every
        event of a window (`Histories.weights`).
      interactions: each as `context.interaction_rows` counts it; None where nobody reads its
        features.
    """

    users: Int[Array, "m"]
    items: Int[Array, "m"]
    as_of: Int[Array, "m"] | None
    labels: Float[Array, "m"] | None
    interactions: Int[Array, "m"] | None = None
    weights: Float[Array, "m"] | None = None


@struct.dataclass
class HardNegatives:
    """The pools of --negatives=hard and scored: user u's is `items[offsets[u]:offsets[u + 1]]`."""

    offsets: Int[Array, "U1"]
    items: Int[Array, "m"]


@struct.dataclass
class ScoredItems:
    """An LLM's scores, to be looked up: those of user u lie from offsets[u] to offsets[u + 1], by
    item.

    Attributes:
      search_steps: halvings that cover the longest row.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "m"]
    scores: Float[Array, "m"]
    search_steps: int = struct.field(pytree_node=False)


@struct.dataclass
class Interactions:
    """Training pairs, sorted by user and item, with what drawing triples from them needs.

    Those of a shard of users have its `share` of what is drawn, pairs or targets.
    """

    users: Int[Array, "n"]
    items: Int[Array, "n"]
    negatives: Excluded
    cumulative: Int[Array, "I1"] | None  # mass of items below i; None when every mass is 1
    facts: Facts
    targets: Targets | None = None  # drawn from instead of the pairs
    hard: HardNegatives | None = None
    share: Share | None = None
    scored: ScoredItems | None = None  # what says which losses are hard, and no noise

    @property
    def drawn(self) -> int:
        """How many pairs (or windows) an epoch draws."""
        return int((self if self.targets is None else self.targets).items.shape[0])


@struct.dataclass
class Dealt:
    """Arrays of which each device has those of its own users (`user_shards.py`).

    Attributes:
      own: [V, ...] each, what belongs to the users of each shard, padded; split over the devices.
      whole: the others.
      tree: how one shard's arrays and the others make what they were dealt from.
      is_own: of its leaves, which are of `own`.
    """

    own: tuple[Any, ...]
    whole: tuple[Any, ...]
    tree: Any = struct.field(pytree_node=False)
    is_own: tuple[bool, ...] = struct.field(pytree_node=False)

    def of_shard(self, own: tuple[Any, ...]) -> Any:
        """What was dealt, with a shard's arrays."""
        of_shard, of_all = iter(own), iter(self.whole)
        leaves = [next(of_shard) if is_own else next(of_all) for is_own in self.is_own]
        return jax.tree.unflatten(self.tree, leaves)

    def of_first(self) -> Any:
        """What was dealt, of a device's first shard: for who reads nothing of users."""
        return self.of_shard(tuple(rows[0] for rows in self.own))


@struct.dataclass
class DeviceArrays:
    """All that stays on the devices for the whole run.

    Attributes:
      interactions: what batches are drawn from.
      context: what a backbone looks up of users and items.
      guidance: what the guidance draws from and looks up, as it made it; None without one.

    Where users are split, `interactions` and `guidance` are dealt out.
    """

    interactions: Interactions | Dealt
    context: Context = dataclasses.field(default_factory=Context)
    guidance: Any = None


def host_array(x: np.ndarray, dtype: type) -> Any:
    """A contiguous host array, standing in for the device array that `device_put` makes of it."""
    return np.ascontiguousarray(x, dtype)


def item_masses(popularity: np.ndarray, sampler: SamplerConfig) -> np.ndarray | None:
    """[I] int64 masses of the negative distribution; None when all are 1 (uniform, in-batch).

    Popularity masses are counts for power 1, otherwise count^power scaled to integers whose sum
    stays under 2^30; an item never seen in training has mass 0.
    """
    if sampler.negatives != "popularity":
        return None
    if sampler.popularity_power == 1.0 and int(popularity.sum()) < 2**30:
        return popularity.astype(np.int64)
    weights = np.where(popularity > 0, popularity.astype(np.float64), np.nan)
    weights = np.nan_to_num(weights**sampler.popularity_power, nan=0.0)
    scaled = weights * ((2**30 - popularity.size) / weights.sum())
    return np.where(weights > 0, np.maximum(1, scaled.astype(np.int64)), 0)


def excluded(sets: Csr, masses: np.ndarray | None, n_items: int) -> Excluded:
    """Cut the sorted `sets` (user -> items) out of the distribution with `masses` over items."""
    rows = sets.owners()
    mass = np.ones(n_items, np.int64) if masses is None else masses
    below = np.concatenate([[0], np.cumsum(mass)])
    own = np.concatenate([[0], np.cumsum(mass[sets.indices])])
    start = own[sets.offsets[:-1]][rows]
    shifts = None if masses is None else host32(own[1:] - start)  # with the k-th
    keys = below[sets.indices] - (own[:-1] - start)  # without it
    free = below[-1] - (own[sets.offsets[1:]] - own[sets.offsets[:-1]])
    marks = keys[::MARKED]
    search_steps = int(sets.counts.max(initial=0)).bit_length()
    return Excluded(
        host32(sets.offsets), host32(keys), host32(marks), shifts, host32(free), search_steps
    )


def targets(
    dataset: Dataset,
    *,
    window: int,
    history: bool,
    min_history: int,
    threshold: float,
    power: float = 0.0,
    left_out: Csr | None = None,
    features: bool = False,
    weights: np.ndarray | None = None,
) -> Targets:
    """The training interactions to learn from, in the order of the part (user, then time).

    Args:
      window: L of a sequence backbone: a target stands for itself and the L - 1 events before it,
        and every event with one before it is in exactly one window. 0: each interaction.
      history: whether the backbone reads histories.
      min_history: fewest earlier events of the user.
      threshold: label 1 from this rating on; 0: all are positives.
      power: an interaction is there max(1, round(rating^power)) times; 0: once.
      left_out: interactions not to learn from.
      features: whether the backbone reads those of interactions.
      weights: [n] of every training interaction, what it counts; None: all alike.

    Raises:
      InputError: nothing is left, labels without ratings, or labels that are all the same.
    """
    part = dataset.train
    place = dataset.moments("train")
    keep = place >= max(min_history, 1 if window else 0)
    if window:  # counted back from the user's last event
        last = np.bincount(part.users, minlength=dataset.n_users) - 1
        keep &= (last[part.users] - place) % window == 0
    if left_out is not None:
        keep &= ~left_out.contains(part.users, part.items)
    if not keep.any():
        raise InputError(
            f"no user has a training interaction with {max(min_history, 1)} earlier ones; "
            "lower --min_history or use another backbone"
        )
    labels = None
    if threshold:
        if part.ratings is None:
            raise InputError(f"--rating_threshold={threshold:g}: the dataset has no ratings")
        positive = part.ratings[keep] >= threshold
        if positive.all() or not positive.any():
            raise InputError(
                f"--rating_threshold={threshold:g} gives all {positive.size} training rows the "
                f"label {int(positive[0])}; ratings go from {part.ratings.min():g} to "
                f"{part.ratings.max():g}"
            )
    chosen = np.flatnonzero(keep)
    if power:
        chosen = np.repeat(chosen, _times(dataset, chosen, power))
    if threshold and part.ratings is not None:
        labels = host_array(part.ratings[chosen] >= threshold, np.float32)
    as_of = host32(place[chosen]) if history else None
    return Targets(
        host32(part.users[chosen]),
        host32(part.items[chosen]),
        as_of,
        labels,
        host32(interaction_rows(dataset, "train")[chosen]) if features else None,
        None if weights is None or window else host_array(weights[chosen], np.float32),
    )


def _times(dataset: Dataset, chosen: np.ndarray, power: float) -> np.ndarray:
    """[m] int64: how often each chosen training interaction is drawn from, by its rating.

    Raises:
      InputError: there are no ratings, some are negative, or all together are too many to draw.
    """
    ratings = dataset.train.ratings
    if ratings is None:
        raise InputError(
            f"--rating_power={power:g}: {dataset.path} has no ratings; slgr prepare "
            "--rating_column or --count_repeats gives them"
        )
    ratings = ratings[chosen].astype(np.float64)
    if ratings.min() < 0:
        raise InputError(
            f"--rating_power={power:g}: ratings go from {ratings.min():g} to {ratings.max():g}; "
            "how often an interaction is drawn cannot be negative"
        )
    times = np.maximum(1.0, np.rint(ratings**power))
    if times.sum() >= 2**31:
        raise InputError(
            f"--rating_power={power:g} makes {times.sum():.3g} interactions of {chosen.size}: "
            f"fewer than {2**31} can be drawn from; lower it"
        )
    return times.astype(np.int64)


def interactions(
    dataset: Dataset,
    sampler: SamplerConfig,
    cold: np.ndarray,
    tail: np.ndarray,
    more: Csr | None = None,
) -> Interactions:
    """The training pairs of `dataset`, ready to be drawn from (host arrays).

    Args:
      more: other items that are no negatives of their user. Draws from pairs, and negatives that
        are other users' items (in_batch), cannot have them: there must be `Targets`.

    Raises:
      InputError: nothing to train on, or counts past what int32 arrays address.
    """
    pairs = dataset.positives(("train",))
    if dataset.train_pairs == 0:
        raise InputError(f"{dataset.path} has no training interactions; check the split")
    if pairs.indices.size >= 2**31 or dataset.n_items >= 2**30:
        raise InputError(
            f"{pairs.indices.size} training pairs and {dataset.n_items} items: device-resident "
            f"arrays hold fewer than {2**31} and {2**30}"
        )
    masses = item_masses(dataset.learned_popularity, sampler)
    cut = pairs
    if more is not None and more.indices.size:
        cut = Csr.from_pairs(
            np.concatenate([pairs.owners(), more.owners()]),
            np.concatenate([pairs.indices, more.indices]),
            dataset.n_users,
        )
    return Interactions(
        users=host32(pairs.owners()),
        items=host32(pairs.indices),
        negatives=excluded(cut, masses, dataset.n_items),
        cumulative=None if masses is None else host32(np.concatenate([[0], np.cumsum(masses)])),
        facts=make_facts(dataset, cold, tail),
    )


def hard_negatives(pools: Csr) -> HardNegatives:
    """Pools of users (host arrays).

    Raises:
      InputError: nobody has one.
    """
    if not pools.indices.size:
        raise InputError(
            "--negatives=hard, scored: no user has an item outside training in a pool; use uniform"
        )
    return HardNegatives(host32(pools.offsets), host32(pools.indices))


def make_facts(dataset: Dataset, cold: np.ndarray, tail: np.ndarray) -> Facts:
    """The facts of `dataset` (host arrays)."""
    return Facts(
        log_history=standardised(dataset.history),
        log_popularity=standardised(dataset.popularity),
        cold=host_array(cold, np.float32),
        tail=host_array(tail, np.float32),
    )


def standardised(counts: np.ndarray) -> Any:
    """log(1 + counts) with mean 0 and standard deviation 1 (a host array)."""
    logs = np.log1p(counts.astype(np.float64))
    return host_array((logs - logs.mean()) / max(float(logs.std()), 1e-6), np.float32)


def every_negative_drawn(interactions: Interactions, sampler: SamplerConfig) -> bool:
    """Whether each user has a negative to draw, so that no lane is ever left out."""
    if sampler.negatives == "in_batch":
        return False
    if sampler.allow_positive_negatives:
        return True
    return bool(np.all(np.asarray(interactions.negatives.free) > 0))
