"""Losses of a batch that count nothing: a share of them by their size, but for those that are hard.

    dropped   the greatest (or least) losses, a share min(step / --drop_steps, --drop_share) of them
    hard      of the greatest, those that an LLM's scores s (0 to 10, `--keep_hard`) say are hard
              and true: these count all the same (LLMHD, arXiv 2409.10343)
                a triple        s(u, i) - s(u, j) < e_pair
                a row, label 1  s(u, i) < e_positive
                a row, label 0  s(u, i) > e_negative
              with thresholds e = max(first - step / --hard_steps, last)
    filter    of the hard only those among the dropped whose own scores vary most from one draw to
              another, a share --hard_variance_share of those with a full ring (`score_rings`); of
              triples those of the positive or of the negative

What lacks a score is not hard. The scores are the LLM's alone, so nothing flows to them; what of a
batch is dropped is decided over all devices.

Shape letters: B triples or rows, C items of one, U users, n scores.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import HardnessConfig, RunConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError
from slgr_jax.mesh import Layout
from slgr_jax.sampling.arrays import ScoredItems
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import host32
from slgr_jax.sampling.negatives import count_not_above
from slgr_jax.teacher.products import preferences
from slgr_jax.training import score_rings
from slgr_jax.training.score_rings import NewScores, Rings

# What a step reports of them; with the filter, also of the dropped those that have too few scores
# of the run's own, and those that the LLM says are hard and the filter leaves out.
METRICS = ("dropped", "dropped_unscored", "kept_hard")
FILTERED = ("dropped_new", "dropped_steady")


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Which losses of a batch are left.

    LLMRec (WSDM'24) prunes "noise" so: its program keeps the hardest 29 % (`easiest`), its text
    means the others (`hardest`, which is also the truncated loss of T-CE, arXiv 2006.04153).

    Attributes:
      share: in (0, 1).
      which: easiest | hardest.
      steps: the share grows by 1 in so many steps, from 0; 0: it is there from the first.
      hardness: what is kept of the hardest; None: nothing.
    """

    share: float
    which: str
    layout: Layout
    steps: int = 0
    hardness: HardnessConfig | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the counts that `weights` gives."""
        if self.hardness is None:
            return ()
        return (*METRICS, *FILTERED) if self.hardness.filters else METRICS

    def share_at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        """The share that is dropped at a step, from 0."""
        if not self.steps:
            return self.share
        return jnp.minimum(step.astype(jnp.float32) / self.steps, self.share)

    def left(
        self, loss: Float[Array, "B"], weights: Float[Array, "B"], step: Int[Array, ""]
    ) -> Float[Array, "B"]:
        """The weights, 0 of what is dropped: floor((1 - share) n) of n that had one are left."""
        size = jax.lax.stop_gradient(loss if self.which == "easiest" else -loss)
        place, there = self._places(-size, weights > 0)  # what is left comes first
        count = jnp.floor((1.0 - self.share_at(step)) * there + 1e-4)
        return jnp.where(place < count, weights, 0.0)

    def _places(
        self, values: Float[Array, "B"], among: Bool[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, ""]]:
        """Of each lane how many of those `among`, of all devices, have a lower value, and how many
        these are; of equals the first lane comes first."""
        every, counted = map(self.layout.gather_over_all, (values, among))
        order = jnp.argsort(jnp.where(counted, every, jnp.inf))
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
        if self.layout.devices > 1:
            own = self.layout.device_index() * values.shape[0]
            place = jax.lax.dynamic_slice_in_dim(place, own, values.shape[0])
        return place, jnp.sum(counted)

    def weights(
        self,
        scores: Float[Array, "B C"],
        loss: Float[Array, "B"],
        batch: Batch,
        scored: ScoredItems | None,
        rings: Rings | None,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "B"], dict[str, Float[Array, ""]], NewScores | None]:
        """What each loss counts, counts of `metrics`, and what `rings` are to remember.

        Args:
          scores: that the losses are of.
          scored: the LLM's scores, where `hardness` says what is kept.
          rings: earlier scores, where it filters.
        """
        left = self.left(loss, batch.weights, step)
        if self.hardness is None:
            return left, {}, None
        assert scored is not None, "build gives a run that keeps what is hard its scores"
        pairs = find(scored, batch.queries.users, batch.items)
        said, known = look_up(scored, pairs)
        hard = is_hard(said, batch.labels, self.hardness, step) & jnp.all(known, axis=1)
        dropped = (batch.weights > 0) & (left == 0)
        counts = [dropped, dropped & ~jnp.all(known, axis=1), dropped & hard]
        new_scores = None
        if rings is not None:
            varies, full = self.varies(rings, pairs, dropped)
            hard, by_llm = hard & varies, hard
            counts[2] = dropped & hard
            counts += [dropped & ~jnp.any(full, axis=1), dropped & by_llm & ~varies]
            drawn = jnp.where((batch.weights > 0)[:, None], pairs, scored.items.shape[0])
            new_scores = NewScores(drawn, scores, dropped)
        named = zip(self.metrics, counts, strict=True)
        return (
            jnp.where(dropped & hard, batch.weights, left),
            {name: jnp.sum(each.astype(jnp.float32)) for name, each in named},
            new_scores,
        )

    def varies(
        self, rings: Rings, pairs: Int[Array, "B C"], dropped: Bool[Array, "B"]
    ) -> tuple[Bool[Array, "B"], Bool[Array, "B C"]]:
        """Which of the dropped losses may count as hard by what their scores were, and whose rings
        are full: of n dropped ones with a full ring the ceil(share n) of the greatest variance, by
        each candidate."""
        assert self.hardness is not None
        variance, full = score_rings.variances(rings, pairs)
        chosen = jnp.zeros_like(dropped)
        for column in range(pairs.shape[1]):
            place, count = self._places(-variance[:, column], dropped & full[:, column])
            most = jnp.ceil(self.hardness.variance_share * count - 1e-4)
            chosen |= dropped & full[:, column] & (place < most)
        return chosen, full


def find(
    scored: ScoredItems, users: Int[Array, "B"], items: Int[Array, "B C"]
) -> Int[Array, "B C"]:
    """Where each (user, item) is among those of `scored`; as many as these are: it is none."""
    low, high = (scored.offsets[users + end][:, None] for end in (0, 1))
    low, high = (jnp.broadcast_to(bound, items.shape) for bound in (low, high))
    rank = count_not_above(scored.items, low, high, items, scored.search_steps)
    at = low + rank - 1
    there = (rank > 0) & (scored.items.at[at].get(mode="clip") == items)
    return jnp.where(there, at, scored.items.shape[0])


def look_up(
    scored: ScoredItems, pairs: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """The score of each pair of `find`, and whether there is one (0 where not)."""
    scores = scored.scores.at[pairs].get(mode="fill", fill_value=jnp.nan)
    known = ~jnp.isnan(scores)
    return jnp.where(known, scores, 0.0), known


def is_hard(
    scores: Float[Array, "B C"],
    labels: Float[Array, "B"] | None,
    hardness: HardnessConfig,
    step: Int[Array, ""],
) -> Bool[Array, "B"]:
    """The test of the module's docstring, of triples (labels None) or rows."""

    def threshold(first: float, last: float) -> float | Float[Array, ""]:
        if not hardness.steps:
            return last
        return jnp.maximum(first - step.astype(jnp.float32) / hardness.steps, last)

    if labels is None:
        pair = threshold(hardness.pair_first, hardness.pair_last)
        return scores[:, 0] - scores[:, 1] < pair
    positive = threshold(hardness.positive_first, hardness.positive_last)
    negative = threshold(hardness.negative_first, hardness.negative_last)
    return jnp.where(labels > 0.5, scores[:, 0] < positive, scores[:, 0] > negative)


class Scores:
    """The scores that a run reads to keep what is hard.

    Args:
      run: with --keep_hard.
      dataset: as the run learns from it.

    Raises:
      ManifestError, ShardError: the product does not fit, or is damaged.
      InputError: it states no scores, none of training interactions, none of other items where
        triples need them, or scores on which the thresholds tell nothing apart.
    """

    def __init__(self, run: RunConfig, dataset: Dataset) -> None:
        name = run.hardness.product
        self._where, self._run = f"--keep_hard: teacher {name!r}", run
        self._teacher = preferences.load(dataset, name, verify=run.train.verify_checksums)
        if self._teacher.manifest.kind != "scores":
            raise InputError(
                f"{self._where} states {self._teacher.manifest.kind}; what is hard needs a score "
                "of each (user, item): slgr teach import --scores=FILE --keep_training_items"
            )
        counts = np.diff(self._teacher.offsets)
        self._owners = np.repeat(np.arange(counts.size), counts)
        self._all_trained = dataset.positives(("train",))
        self._trained = self._all_trained.contains(self._owners, self._teacher.items)
        self._refuse_useless()

    def _refuse_useless(self) -> None:
        teacher, hardness = self._teacher, self._run.hardness
        if not self._trained.any():
            raise InputError(
                f"{self._where} scores no training interaction; import it with "
                "--keep_training_items, which are dropped otherwise"
            )
        rows = bool(self._run.loss.rating_threshold)
        if not rows and self._trained.all():
            raise InputError(
                f"{self._where} scores training interactions alone, and negatives are drawn from "
                "the other items that it scores; have it score some of these for each user"
            )
        low, high = float(teacher.scores.min()), float(teacher.scores.max())
        all_hard = hardness.pair_last > high - low
        if rows:
            all_hard = hardness.positive_last > high and hardness.negative_last < low
        if all_hard:
            flags = "--hard_positive_last, --hard_negative_last" if rows else "--hard_pair_last"
            raise InputError(
                f"{self._where} has scores from {low:g} to {high:g}, of which all would be hard; "
                f"give thresholds on their scale ({flags} and the others)"
            )

    @property
    def trained(self) -> int:
        """How many training pairs have a score."""
        return int(self._trained.sum())

    def pools(self) -> Csr:
        """The other items that each user has a score of."""
        others = ~self._trained
        users = self._teacher.offsets.size - 1
        return Csr.from_pairs(self._owners[others], self._teacher.items[others], users)

    def pairs(self) -> Pairs:
        """All that has a score; where the run's own scores are remembered, all training pairs."""
        teacher, n_users = self._teacher, self._teacher.offsets.size - 1
        users, items, scores = self._owners, teacher.items, teacher.scores
        if self._run.hardness.filters:
            owners, trained = self._all_trained.owners(), self._all_trained.indices
            missing = ~Csr.from_pairs(users, items, n_users).contains(owners, trained)
            users = np.concatenate([users, owners[missing]])
            items = np.concatenate([items, trained[missing]])
            scores = np.concatenate([scores, np.full(missing.sum(), np.nan, np.float32)])
        order = np.lexsort((items, users))
        return Pairs(users[order], items[order], scores[order])

    def arrays(self) -> ScoredItems:
        """`pairs`, to be looked up by user and item (host arrays)."""
        users, items, stated = self.pairs()
        counts = np.bincount(users, minlength=self._teacher.offsets.size - 1)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        steps = int(counts.max(initial=0)).bit_length()
        scores: Any = np.ascontiguousarray(stated, np.float32)
        return ScoredItems(host32(offsets), host32(items), scores, search_steps=steps)


class Pairs(NamedTuple):
    """Pairs by user, then item, and the LLM's score of each; NaN: none."""

    users: Int[np.ndarray, "n"]
    items: Int[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]
