"""New users without training: what a run makes of somebody from a list of items.

    folded = run.fold_in({"u1": ["i7", "i9"], "u2": History(["i3"], times=[10])})
    folded.recommend(k=10)

Nothing that was trained changes. What is new is what the backbone keeps of a user:

  a history       sasrec, gru4rec, bert4rec: the history itself, nothing else. What follows is
                  exactly what a known user with that history would get; of
                  --user_fusion one who has no vector.
  a row           mf and the click models (which also read the history): the row x that minimises
                  the run's own loss on the user's items i, everything else frozen,

                      L(x) = sum_i w_i / sum w  E_j loss(s_i(x), s_j(x)) + l2/2 |x|^2.

                  For mf it is convex and met to convergence; for a network it is where `STEPS`
                  steps from the average user lead.
  a node          lightgcn: its neighbours' vectors, and a layer-0 row by the same loss
                  (`_neighbourhood`).

E_j is over `NEGATIVES` items drawn from the run's distribution of negatives, the user's items cut
out, at equal distances in mass (systematic sampling), from a place that is a function of (seed,
the user's items). With as many items or fewer it is the expectation. In-batch negatives are items
by how often they are trained. Softmax losses have the whole catalogue. A history-reading backbone
predicts each item from the events before it, as in training, and shares the draws out among them.

A user's row is a function of (run, the user's events): of no order but that of time, and, to
rounding, of nobody else in the request.

Shape letters: n new users, W places for the items of one, M negatives, E events of all, I items,
D width of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
from flax import struct
from jaxtyping import Array, Float, Int, Num, UInt32

from slgr_jax.data.dataset import Csr, Dataset, Part
from slgr_jax.errors import ConfigError, listing
from slgr_jax.models import losses
from slgr_jax.models.backbones import AnyBackbone, DotBackbone
from slgr_jax.models.backbones.base import USER
from slgr_jax.models.backbones.lightgcn import LightGCN
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import Scoring, pair_scores, score_users
from slgr_jax.sampling import arrays
from slgr_jax.sampling.arrays import Excluded, host_array
from slgr_jax.sampling.context import HISTORY, Histories, Queries, host32
from slgr_jax.sampling.negatives import draw_outside
from slgr_jax.serving.histories import Events, History, events_of

if TYPE_CHECKING:
    from slgr_jax.serving.recommender import Recommendations
    from slgr_jax.serving.run_vectors import Vectors
    from slgr_jax.serving.trained_run import TrainedRun

# M of a score that is a dot product and of one that is a network's; powers of two.
NEGATIVES = {"dot": 2048, "network": 256}
STEPS = 50
STEP_SIZE = 0.5  # of the first step, in root mean squares of the trained rows' entries
# Rows of items that one step of the fit looks up: they stay in a CPU's last cache.
_ROWS = 1 << 14


@dataclasses.dataclass(frozen=True)
class FoldedUsers:
    """New users, to be asked for as known ones are.

    Attributes:
      run: the trained run with these users in place of its own.
      skipped: kind -> how many were left out of the request.
    """

    run: TrainedRun
    skipped: Mapping[str, int]

    @property
    def users(self) -> list[str]:
        """[n] their names, in the order of the request."""
        names: list[str] = self.run.dataset.user_ids.to_pylist()
        return names

    def recommend(
        self, users: Sequence[str] | None = None, k: int = 10, **options: Any
    ) -> Recommendations:
        """The k best items of each; see `TrainedRun.recommend`, of which `options` are."""
        return self.run.recommend(users, k, **options)

    def scores(self, users: Sequence[str], items: Sequence[str]) -> Float[np.ndarray, "pairs"]:
        """Logits of pairs; see `TrainedRun.scores`."""
        return self.run.scores(users, items)

    def vectors(self) -> Vectors:
        """Their vectors and those of all items; see `TrainedRun.vectors`."""
        return self.run.vectors()


@struct.dataclass
class _Chunk:
    """Users whose rows are fitted together.

    Attributes:
      items: [n, W] ascending; 0 where there is none.
      weights: [n, W] of each item, sum 1; 0 where there is none.
      place: [n, W] how many events the user has before it.
      base: [n, D] what the user's vector is without a row of its own; 0 but for graphs.
      offset: [n] uint32, where the systematic draw of negatives begins.
      cut: the users' items, out of the distribution of negatives.
      histories: the users' events in order.
    """

    items: Int[Array, "n W"]
    weights: Float[Array, "n W"]
    place: Int[Array, "n W"]
    base: Float[Array, "n D"]
    offset: UInt32[Array, "n"]
    cut: Excluded
    histories: Histories


class Folder:
    """Folds users into one run; keeps what is compiled."""

    def __init__(self, run: TrainedRun) -> None:
        """Refuse a run that new users cannot be folded into.

        Raises:
          ConfigError: why they cannot be.
        """
        self._run, self._backbone = run, run.restored.backbone
        name, tables = run.config.model.backbone, self._backbone.tables
        self._fits = "user" in tables
        odd = sorted(set(tables) - {"user", "item", "category"})
        if odd:
            raise ConfigError(
                f"--backbone={name} has tables {listing(odd)}; folding in knows what the tables "
                "user, item and category hold, and no others: train anew for new users"
            )
        if run.config.vectors.user_vectors and not run.config.vectors.fuses_users:
            raise ConfigError(
                f"--user_vectors={run.config.vectors.user_vectors}: a new user has no vector, and "
                "folding in fits none: train anew for new users"
            )
        if run.config.examples.product:
            raise ConfigError(
                f"--examples={run.config.examples.product} are rows of the users that are known; "
                "folding in fits a row without them: train anew for new users"
            )
        if run.config.vectors.item_side_weight:
            raise ConfigError(
                "--item_side_weight: folding in knows what a graph makes of rows alone; train anew "
                "for new users"
            )
        whole = isinstance(self._backbone, DotBackbone) and self._backbone.whole
        if whole and not isinstance(self._backbone, LightGCN):
            raise ConfigError(
                f"--backbone={name} propagates its tables; folding in knows how lightgcn does "
                "that, and no other: train anew for new users"
            )
        if self._fits and run.config.loss.rating_threshold:
            raise ConfigError(
                f"--rating_threshold={run.config.loss.rating_threshold:g}: this run learned its "
                "users from ratings above and below, and a list of items has none; fold into a run "
                "that takes every interaction as a positive"
            )

    def fold(
        self, histories: Mapping[str, Sequence[str] | History], *, unknown: str = "refuse"
    ) -> FoldedUsers:
        """See `TrainedRun.fold_in`."""
        run = self._run
        names, events, skipped = events_of(run, histories, unknown)
        dataset = _dataset(run.dataset, names, events)
        context = run.restored.context
        if HISTORY in self._backbone.reads:
            context = context.replace(histories=jax.device_put(_histories(events, len(names))))  # type: ignore[attr-defined]
        serving = run.restored.serving
        if self._fits:
            rows = self._rows(events, len(names))
            serving = serving.replace(values={**serving.values, "user": jnp.asarray(rows)})  # type: ignore[attr-defined]
        elif USER in serving.values:  # of vectors beside a history: a new user has none
            nothing = jnp.zeros((len(names), serving.values[USER].shape[1]))
            serving = serving.replace(values={**serving.values, USER: nothing})  # type: ignore[attr-defined]
        restored = dataclasses.replace(
            run.restored, dataset=dataset, serving=serving, context=context
        )
        view = dataclasses.replace(run, restored=restored)
        # Compiled programs are kept with their function: the same ones, whoever the users are.
        vars(view).update({name: getattr(run, name) for name in ("score_users", "_pair_scores")})
        return FoldedUsers(view, skipped)

    # ------------------------------------------------------------------------ fitting rows

    def _rows(self, events: Events, n_users: int) -> Float[np.ndarray, "n D"]:
        """What table `user` holds of the new users."""
        rows = np.zeros((n_users, self._backbone.tables["user"].width), np.float32)
        scoring = dataclasses.replace(self._run.restored.scoring("test"), as_of=None)
        for users, chunk in self._chunks(events, n_users):
            fitted = self._fit(scoring, chunk, self._start, self._scale)
            rows[users] = np.asarray(fitted)[: users.size]
        return rows

    def _chunks(self, events: Events, n_users: int) -> Iterator[tuple[np.ndarray, _Chunk]]:
        """Users with about as many events, in chunks of 2^k; the last user fills a chunk up."""
        counts = np.bincount(events.users, minlength=n_users)
        widths = np.maximum(8, 1 << np.ceil(np.log2(np.maximum(counts, 1))).astype(int))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        for width in np.unique(widths).tolist():
            alike = np.flatnonzero(widths == width)
            size = 1 << max(0, (_ROWS // (width + self._draws(width))).bit_length() - 1)
            size = min(size, 1 << (alike.size - 1).bit_length())
            for begin in range(0, alike.size, size):
                users = alike[begin : begin + size]
                padded = np.pad(users, (0, size - users.size), mode="edge")
                yield users, self._chunk(events, offsets, padded, width)

    def _chunk(self, events: Events, offsets: np.ndarray, users: np.ndarray, width: int) -> _Chunk:
        run, n_items = self._run, self._run.dataset.n_items
        items, place = np.zeros((2, users.size, width), np.int32)
        weights = np.zeros((users.size, width), np.float32)
        starts = np.zeros(users.size, np.uint32)
        history = np.zeros(users.size * width, np.int32)  # of one length: compiled once a width
        counts = (offsets[1:] - offsets[:-1])[users]
        bounds = np.concatenate([[0], np.cumsum(counts)])
        for row, user in enumerate(users):
            of_user = slice(offsets[user], offsets[user + 1])
            history[bounds[row] : bounds[row + 1]] = events.items[of_user]
            by_item = np.argsort(events.items[of_user])
            own = events.items[of_user][by_item]
            items[row, : own.size], place[row, : own.size] = own, by_item
            weight = events.weights[of_user][by_item]
            weight = np.where(by_item >= run.config.loss.min_history, weight, 0.0)
            weights[row, : own.size] = weight / max(weight.sum(), 1e-30)
            starts[row] = zlib.crc32(own.tobytes(), run.config.train.seed)

        owners = np.repeat(np.arange(users.size), counts)
        pairs = Csr.from_pairs(owners, history[: bounds[-1]], users.size)
        base = np.zeros((users.size, self._backbone.tables["user"].width), np.float32)
        if isinstance(self._backbone, LightGCN):
            base = _neighbourhood(run, pairs)
        cut = pairs
        if run.config.sampler.allow_positive_negatives:
            cut = Csr(np.zeros(users.size + 1, np.int64), np.zeros(0, np.int32))
        excluded = arrays.excluded(cut, self._masses, n_items)
        excluded = excluded.replace(  # type: ignore[attr-defined]
            keys=_filled(excluded.keys, history.size),
            shifts=None if excluded.shifts is None else _filled(excluded.shifts, history.size),
            marks=_filled(excluded.marks, 1),  # of the CPU kernels
            search_steps=width.bit_length(),
        )
        return jax.device_put(
            _Chunk(
                host_array(items, np.int32),
                host_array(weights, np.float32),
                host_array(place, np.int32),
                host_array(base, np.float32),
                host_array(starts, np.uint32),
                excluded,
                Histories(host32(bounds), host32(history), host32(counts)),
            )
        )

    def _draws(self, width: int) -> int:
        """M: at least one for each item."""
        kind = "dot" if isinstance(self._backbone, DotBackbone) else "network"
        return max(NEGATIVES[kind], width)

    @functools.cached_property
    def _masses(self) -> np.ndarray | None:
        sampler = self._run.config.sampler
        if sampler.negatives == "in_batch":  # another triple's positive
            sampler = dataclasses.replace(sampler, negatives="popularity", popularity_power=1.0)
        return arrays.item_masses(self._run.dataset.learned_popularity, sampler)

    @functools.cached_property
    def _trained_rows(self) -> Float[np.ndarray, "U D"]:
        values = np.asarray(self._run.restored.serving.values["user"])
        return values[self._run.dataset.positives(("train",)).counts > 0]

    @functools.cached_property
    def _start(self) -> Float[np.ndarray, "D"]:
        """The average user; of a graph, whose rows have become vectors, nothing."""
        if isinstance(self._backbone, LightGCN):
            return np.zeros(self._trained_rows.shape[1], np.float32)
        return self._trained_rows.mean(axis=0)

    @functools.cached_property
    def _scale(self) -> np.float32:
        return np.float32(STEP_SIZE * np.sqrt(np.mean(self._trained_rows**2)))

    @functools.cached_property
    def _fit(self) -> Any:
        """(scoring, chunk, start, step size) -> [n, D] rows of table `user`: base + share x."""
        run, backbone = self._run.config, self._backbone
        share = 1.0 / (run.model.layers + 1) if isinstance(backbone, LightGCN) else 1.0
        masses = self._masses
        cumulative = None if masses is None else host32(np.concatenate([[0], np.cumsum(masses)]))
        loss = functools.partial(
            _loss, name=run.loss_name, negatives=run.loss.negatives_per_positive
        )
        catalogue = run.loss_name in ("softmax", "sampled_softmax")

        @jax.jit
        def fit(scoring: Scoring, chunk: _Chunk, start: jax.Array, size: jax.Array) -> jax.Array:
            context = dataclasses.replace(scoring.context, histories=chunk.histories)
            drawn, able = _negatives(chunk, cumulative, self._draws(chunk.items.shape[1]))

            def total(x: Float[Array, "n D"]) -> Float[Array, ""]:
                values = {**scoring.serving.values, "user": chunk.base + share * x}
                new = Scoring(scoring.serving.replace(values=values), context, None)  # type: ignore[attr-defined]
                if catalogue:
                    everything = score_users(backbone)(new, jnp.arange(x.shape[0]))
                    positive = jnp.take_along_axis(everything, chunk.items, axis=1)
                    each = jax.nn.logsumexp(everything, axis=1)[:, None] - positive
                else:
                    each = loss(*_scored(backbone, new, chunk, drawn)) * able[:, None]
                penalty = 0.5 * run.optimizer.l2 * jnp.sum(jnp.square(x))
                return jnp.sum(chunk.weights * each) + penalty

            optimizer = optax.adam(optax.cosine_decay_schedule(size, STEPS))
            x = jnp.broadcast_to(start, chunk.base.shape)

            def step(_: jax.Array, carry: Any) -> Any:
                x, state = carry
                change, state = optimizer.update(jax.grad(total)(x), state)
                return x + change, state

            x = jax.lax.fori_loop(0, STEPS, step, (x, optimizer.init(x)))[0]
            return chunk.base + share * x

        return fit


def _loss(
    positive: Float[Array, "n W"],
    drawn: Float[Array, "n W k"],
    *,
    name: str,
    negatives: int,
) -> Float[Array, "n W"]:
    """The loss of each positive with its mean negative; see `training.objectives.Triples`."""
    if name == "bpr":
        return jnp.mean(losses.bpr(positive[:, :, None] - drawn), axis=2)
    liked = losses.binary_cross_entropy(positive, jnp.ones_like(positive))
    others = jnp.mean(losses.binary_cross_entropy(drawn, jnp.zeros_like(drawn)), axis=2)
    return (liked + negatives * others) / (1 + negatives)


def _negatives(
    chunk: _Chunk, cumulative: np.ndarray | None, count: int
) -> tuple[Int[Array, "n M"], Float[Array, "n"]]:
    """M items outside each user's, at equal distances in mass; 0 for users who have them all."""
    places = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(2**32 // count)
    bits = (chunk.offset % jnp.uint32(2**32 // count))[:, None] + places[None, :]
    users = jnp.broadcast_to(jnp.arange(bits.shape[0])[:, None], bits.shape)
    total = None if cumulative is None else jnp.asarray(cumulative)
    items, weights = draw_outside(bits, users, chunk.cut, total, native=False)
    return items.astype(jnp.int32), weights[:, 0]


def _scored(
    backbone: AnyBackbone, scoring: Scoring, chunk: _Chunk, drawn: Int[Array, "n M"]
) -> tuple[Float[Array, "n W"], Float[Array, "n W k"]]:
    """Logits of the items, and of each one's share of what is drawn.

    A share is every W-th of the draws: it spans the catalogue.
    """
    n, width = chunk.items.shape
    users = jnp.arange(n, dtype=jnp.int32)
    if HISTORY not in backbone.reads:
        items = jnp.concatenate([chunk.items, drawn], axis=1)
        scores = pair_scores(backbone, scoring, Candidates(Queries(users), items))
        return scores[:, :width], _shares(scores[:, width:], width)

    items = jnp.concatenate([chunk.items[:, :, None], _shares(drawn, width)], axis=2)
    queries = Queries(jnp.repeat(users, width), chunk.place.reshape(-1))
    candidates = Candidates(queries, items.reshape(n * width, -1))
    scores = pair_scores(backbone, scoring, candidates).reshape(n, width, -1)
    return scores[:, :, 0], scores[:, :, 1:]


def _shares(drawn: Num[Array, "n M"], width: int) -> Num[Array, "n W k"]:
    return jnp.swapaxes(drawn.reshape(drawn.shape[0], -1, width), 1, 2)


def _neighbourhood(run: TrainedRun, pairs: Csr) -> Float[np.ndarray, "n D"]:
    """(A E)_u = sum_i e_i / sqrt(d_u d_i) of new nodes u, e_i the items' propagated vectors.

    With E = 1 / (K + 1) sum_k A^k E^(0), A E differs from E by the ends of the two sums alone:

        e_u = (A E)_u + (e_u^(0) - (A^(K+1) E^(0))_u) / (K + 1).

    The first term needs no more than what a checkpoint serves with. The node's own row e_u^(0) is
    fitted; what is left out is the (K+1)-th layer, the smoothest of all, and what the node would
    change of others: the items' vectors stay what they are, their degrees grow by the new edge.
    """
    items = np.asarray(run.restored.serving.values["item"])
    degrees = run.dataset.learned_popularity + 1.0
    scaled = items[pairs.indices] / np.sqrt(degrees[pairs.indices])[:, None]
    sums = np.add.reduceat(scaled, pairs.offsets[:-1], axis=0)
    return (sums / np.sqrt(pairs.counts)[:, None]).astype(np.float32)


def _dataset(dataset: Dataset, names: Sequence[str], events: Events) -> Dataset:
    """The dataset with these users in place of its own: what they have is their training part."""
    nothing = np.zeros(0, np.int32)
    empty = Part(nothing, nothing, None, None)
    return Dataset(
        path=dataset.path,
        manifest=dataset.manifest,
        train=Part(events.users, events.items, events.times, None),
        valid=empty,
        test=empty,
        user_ids=pa.array(names, pa.string()),
        items=dataset.items,
    )


def _histories(events: Events, n_users: int) -> Histories:
    """The events by user; filled up to 2^k, so that few programs are compiled."""
    counts = np.bincount(events.users, minlength=n_users)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    items = _filled(events.items, 1 << (events.items.size - 1).bit_length())
    return Histories(host32(offsets), items, host32(counts))


def _filled(x: Any, size: int) -> Any:
    """[size] of the first entries of x, then 0."""
    out = np.zeros(size, np.int32)
    out[: min(len(x), size)] = x[:size]
    return out
