"""Full ranking on the device: every user against every item that is not masked.

Shape letters: U users, I items, B users of a chunk, K cut-off, W relevant items a chunk has
room for, N relevant pairs.

A chunk's scores exist only on the device, [B, I] at a time; what comes back is a few numbers
per relevant item. One chunk is one jitted call of fixed shapes: the loops over a user's
relevant and seen items have a dynamic length, so that a chunk costs what its own users need.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slgr_jax.config import EvaluationConfig, SliceConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, NonFiniteError, listing
from slgr_jax.evaluation import device_ranking
from slgr_jax.evaluation.chunks import Asked, ChunkScorer
from slgr_jax.evaluation.device_ranking import (
    PAIR_DTYPES,
    DeviceCsr,
    Listable,
    Pool,
)
from slgr_jax.evaluation.device_scoring import ScoreUsers
from slgr_jax.evaluation.placement import Placement
from slgr_jax.evaluation.ranking_metrics import (
    APART,
    PairOrder,
    PartResult,
    Ranking,
    TopItems,
    part_data,
    pool_tables,
    summarize_part,
)
from slgr_jax.kernels.ranks import Scores
from slgr_jax.mesh import UserShards


def _refuse_nonfinite(users: np.ndarray, bad: np.ndarray) -> None:
    refused = users[bad[: users.size]]
    if refused.size:
        raise NonFiniteError(
            f"the model gives a NaN or infinite score for {refused.size} of {users.size} users "
            f"ranked together, user index {listing(map(str, refused), limit=3)}; "
            "restore an earlier checkpoint or train again with a lower --lr"
        )


def _width(count: int) -> int:
    """Room for `count` relevant items: 1 or 16 * 4^i, so that few programs are compiled."""
    width = 1 if count <= 1 else 16
    while width < count:
        width *= 4
    return width


class TopLists:
    """Lists the best items of users, however many ask: one program, compiled at the first call.

    What it reads stays on the devices between calls. Calls of several threads take turns.

    Attributes:
      k: length of the lists; the catalogue's where that is shorter.
      chunk: users that one call of the program lists for; fewer are filled up.
    """

    def __init__(
        self,
        score_users: ScoreUsers,
        state: Any,
        seen: Csr,
        n_items: int,
        *,
        k: int,
        users_per_chunk: int = 1024,
        mesh: Mesh | None = None,
        split: UserShards | None = None,
        split_items: bool = False,
        costs: np.ndarray | None = None,
        kernels: str = "auto",
        filters: bool = True,
    ) -> None:
        """Arguments and errors: as of `top_k`; `split`, `split_items` as of `rank`.

        Args:
          filters: whether a call may come with `listable`; chunks are larger where none does.
          costs: [U] what users are put together in chunks by, the same in every process; None: how
            many items of each are masked, where every process knows that of all.
        """
        at = Placement(mesh, split, n_items if split_items else 0)
        self._scorer = ChunkScorer(
            score_users, users_per_chunk, n_items, users_per_chunk, at, kernels, filters=filters
        )
        self._asked = self._scorer.ask(state)
        self.k, self.chunk = min(k, n_items), self._scorer.chunk
        self._costs = seen.counts if costs is None else costs
        self._masked, self._turn = self._scorer.put_rows(seen), threading.Lock()
        self._best = functools.partial(
            device_ranking.rank_chunk,
            width=0,
            k=self.k,
            at=at,
            native=self._scorer.native,
        )

    def put(self, allowed: np.ndarray | None, only: Csr | None) -> Listable | None:
        """What may be listed, on the devices, for calls; None where nothing is left out.

        Args:
          allowed: [I] bool, items that anybody may get; None: all.
          only: [U] rows of the items that each user may get; None: all.
        """
        if allowed is None and only is None:
            return None
        return Listable(
            None if allowed is None else self._scorer.put(np.asarray(allowed, bool)),
            None if only is None else self._scorer.put_rows(only),
        )

    def __call__(self, users: np.ndarray, listable: Listable | None = None) -> TopItems:
        """The lists of users [n], who may come in any order and twice.

        Raises:
          NonFiniteError: a score is NaN or infinite.
        """
        users = np.asarray(users, np.int32)
        order = np.argsort(self._costs[users], kind="stable")  # a chunk's users cost the same
        arranged = self._scorer.arranged(users[order])
        asked = np.where(arranged < 0, -1, order[arranged])  # place in `users`, or nobody's
        asking = np.where(asked < 0, -1, users[asked])
        items = np.empty((users.size, self.k), np.int32)
        scores = np.empty(items.shape, np.float32)

        def best(scores: Scores, chunk: jax.Array, _: np.ndarray) -> dict[str, Any]:
            return self._best(scores, chunk, self._masked, None)

        with self._turn:
            for places, ranked in self._scorer.each(self._asked, asking, best, listable):
                rows = asked[places]
                _refuse_nonfinite(asking[places], ranked["bad"])
                real = np.flatnonzero(rows >= 0)
                items[rows[real]] = ranked["top"]["items"][real]
                scores[rows[real]] = ranked["top"]["scores"][real]
        if listable is not None:
            left_out = scores <= device_ranking.LEFT_OUT
            items[left_out], scores[left_out] = -1, -np.inf
        return TopItems(users, items, scores)


def top_k(
    score_users: ScoreUsers,
    state: Any,
    users: np.ndarray,
    seen: Csr,
    n_items: int,
    *,
    k: int,
    users_per_chunk: int = 1024,
    mesh: Mesh | None = None,
    kernels: str = "auto",
) -> TopItems:
    """The `k` best items of each of `users` that are not in the user's row of `seen`.

    Args:
      score_users: pure function (state, users [B] int32) -> [B, I] float32. It is compiled
        once per function object, so pass the same one each time.
      state: pytree of device arrays, passed on to it.
      users: [n] user indices.
      seen: [U] rows of masked items.
      n_items: I.
      k: length of the lists; shorter if the catalogue is.
      users_per_chunk: most users scored at once; bounds the memory.
      mesh: devices to split a chunk's users over; None is the default device.
      kernels: auto, native or xla; see `TrainConfig.kernels`.

    Raises:
      NonFiniteError: a score is NaN or infinite.
      ConfigError: native kernels are wanted where they cannot be had.
    """
    lists = TopLists(
        score_users,
        state,
        seen,
        n_items,
        k=k,
        users_per_chunk=min(users_per_chunk, 1 << max(len(users) - 1, 0).bit_length()),
        mesh=mesh,
        kernels=kernels,
        filters=False,
    )
    return lists(users)


def log_sums(
    score_users: ScoreUsers,
    state: Any,
    users: np.ndarray,
    seen: Csr,
    n_items: int,
    *,
    temperature: float,
    users_per_chunk: int = 1024,
    mesh: Mesh | None = None,
    kernels: str = "auto",
) -> np.ndarray:
    """[n] log sum_j exp(s_uj / T) of each of `users` over the items not in its row of `seen`.

    -inf where there are none. Arguments and errors: as of `top_k`; temperature: T.
    """
    at = Placement(mesh)
    scorer = ChunkScorer(
        score_users, users.size, n_items, users_per_chunk, at, kernels, products=False
    )
    masked = scorer.put_rows(seen)

    def of_chunk(scores: Scores, chunk: jax.Array, _: np.ndarray) -> dict[str, jax.Array]:
        return device_ranking.log_sum_chunk(scores, chunk, masked, temperature, at=at)

    sums = np.empty(users.size, np.float32)
    for places, result in scorer.each(scorer.ask(state), users, of_chunk):
        _refuse_nonfinite(users[places], result["bad"])
        sums[places] = result["log_sums"][: sums[places].size]
    return sums


def rank(
    score_users: ScoreUsers,
    state: Any,
    relevant: Csr,
    seen: Csr,
    n_items: int,
    *,
    users_per_chunk: int = 1024,
    top_k: int = 20,
    pooled_auc: bool = True,
    mesh: Mesh | None = None,
    split: UserShards | None = None,
    split_items: bool = False,
    kernels: str = "auto",
    among: np.ndarray | None = None,
    between_chunks: Callable[[], None] = lambda: None,
) -> Ranking:
    """Rank every user that has relevant items over all items that are not masked.

    The work is about (relevant pairs) x I comparisons; the pooled AUC scores everything once
    more. Equal scores rank by item index, as in `jax.lax.top_k`.

    Args:
      score_users, state, n_items, users_per_chunk, mesh, kernels: as for `top_k`.
      relevant: [U] rows of items to find.
      seen: [U] rows of masked items; a relevant item among them is dropped and counted. Of several
        processes each gives those of its own users, where `split` says which they are.
      top_k: length of `Ranking.top_items`; 0 for none.
      pooled_auc: also compute `Ranking.pooled_auc`.
      split: how the users of `state` are split over `mesh`; each is ranked where it is. None: they
        are not.
      split_items: the tables of items in `state` are split over the mesh's axis `table`, and
        `score_users` is `ByVectors`: each device ranks over its own items.
      among: [I] bool, the only items that are candidates; others are neither relevant nor
        masked. Without lists and pooled AUC. None: all are.
      between_chunks: called between two chunks of users; what it raises ends the ranking.

    Raises:
      NonFiniteError: a score is NaN or infinite.
      ConfigError: as for `top_k`.
    """
    ranker = Ranker(
        score_users,
        relevant,
        seen,
        n_items,
        users_per_chunk=users_per_chunk,
        top_k=top_k,
        pooled_auc=pooled_auc,
        mesh=mesh,
        split=split,
        split_items=split_items,
        kernels=kernels,
        among=among,
    )
    return ranker(state, between_chunks)


class Ranker:
    """`rank` of one state after another; what it reads of the data is made once and kept."""

    def __init__(
        self,
        score_users: ScoreUsers,
        relevant: Csr,
        seen: Csr,
        n_items: int,
        *,
        users_per_chunk: int = 1024,
        top_k: int = 20,
        pooled_auc: bool = True,
        mesh: Mesh | None = None,
        split: UserShards | None = None,
        split_items: bool = False,
        kernels: str = "auto",
        among: np.ndarray | None = None,
    ) -> None:
        """Arguments and errors: as of `rank`."""
        self._n_candidates = n_items
        if among is not None:
            relevant, seen = relevant.among(among), seen.among(among)
            self._n_candidates, top_k, pooled_auc = int(among.sum()), 0, False
        counts = relevant.counts
        users = np.flatnonzero(counts).astype(np.int32)
        order = [counts[users]]
        if split is None or split.here is None:  # processes know what is masked of their own users
            order.insert(0, seen.counts[users])
        users = users[np.lexsort(order)]
        at = Placement(mesh, split, n_items if split_items else 0)
        filters = among is not None
        scorer = ChunkScorer(
            score_users, users.size, n_items, users_per_chunk, at, kernels, filters=filters
        )
        arranged = scorer.arranged(users)
        self._listable = None if among is None else Listable(scorer.put(among), None)
        self._scorer, self._k, self._pooled_auc = scorer, min(top_k, n_items), pooled_auc
        self._users = np.where(arranged < 0, -1, users[arranged])
        self._wants = np.where(self._users < 0, 0, counts[self._users])
        self._masked, self._wanted = scorer.put_rows(seen), scorer.put_rows(relevant)
        self._pairs = PairOrder(self._users[self._users >= 0], relevant)
        self._rank_chunk = functools.partial(
            device_ranking.rank_chunk, k=self._k, at=at, native=scorer.native
        )

    def __call__(self, state: Any, between_chunks: Callable[[], None] = lambda: None) -> Ranking:
        """The ranking of a state; arguments and errors as of `rank`."""
        scorer, users = self._scorer, self._users
        asked, chunks = scorer.ask(state), iter(range(0, users.size, scorer.chunk))

        def dispatch(scores: Scores, chunk: jax.Array, of_chunk: np.ndarray) -> dict[str, Any]:
            begin = next(chunks)
            width = _width(int(self._wants[begin : begin + of_chunk.size].max()))
            return self._rank_chunk(scores, chunk, self._masked, self._wanted, width=width)

        pairs: dict[str, list[np.ndarray]] = {name: [] for name in PAIR_DTYPES}
        top = np.empty((users.size, self._k), np.int32)
        masked_items = np.empty(users.size, np.int32)
        for places, ranks in scorer.each(asked, users, dispatch, self._listable, between_chunks):
            of_chunk = users[places]
            _refuse_nonfinite(of_chunk, ranks["bad"])

            # Each user's row has room for `width` relevant items; the first so many are real.
            width = ranks["pairs"]["score"].shape[1]
            real = np.arange(width)[None, :] < self._wants[places][:, None]
            for name, parts in pairs.items():
                parts.append(ranks["pairs"][name][: of_chunk.size][real])
            masked_items[places] = ranks["masked"][: of_chunk.size]
            if self._k:
                top[places] = ranks["top"]["items"][: of_chunk.size]

        flat = {
            name: np.concatenate([np.zeros(0, dtype), *pairs[name]])
            for name, dtype in PAIR_DTYPES.items()
        }
        real = users >= 0
        ranked = self._pairs.ranking(masked_items[real], self._n_candidates, flat, top[real])
        if not self._pooled_auc:
            return ranked
        auc = _pooled_auc(scorer, asked, users, ranked, self._masked, self._wanted)
        return dataclasses.replace(ranked, pooled_auc=auc)


def _pooled_auc(
    scorer: ChunkScorer,
    asked: Asked,
    users: np.ndarray,
    ranked: Ranking,
    masked: DeviceCsr,
    wanted: DeviceCsr,
) -> float:
    """Exact AUC over all (relevant, non-relevant candidate) pairs of all users.

    Each non-relevant score is looked up among the sorted relevant ones, in a second pass.
    """
    n_relevant = int(ranked.items.size)
    counted = np.isin(users, ranked.users)  # a user may have lost all relevant items
    n_other = int(np.sum(ranked.n_candidates - ranked.counts))
    if not n_relevant or not n_other:
        return float("nan")
    if n_relevant >= 2**30:
        raise ConfigError(f"{n_relevant} relevant pairs; use --nopooled_auc beyond 2^30")

    pool = Pool(**scorer.put(pool_tables(ranked.scores)))
    # A user's count comes in digits of so many bits that a sum of I of them stays in an int32.
    bits, pieces = 32, 2
    if not scorer.native:
        bits = 31 - (scorer.n_items - 1).bit_length()
        pieces = -(-(2 * n_relevant).bit_length() // bits)
    look_up = functools.partial(
        device_ranking.pool_chunk,
        pieces=pieces,
        bits=bits,
        at=scorer.at,
        native=scorer.native,
    )

    total = 0  # a Python integer: pairs x pairs may pass 2^63

    def of_chunk(scores: Scores, chunk: jax.Array, _: np.ndarray) -> jax.Array:
        return look_up(scores, chunk, masked, wanted, pool)

    for places, digits in scorer.each(asked, users, of_chunk):
        chosen = counted[places]
        sums = digits[: chosen.size][chosen].astype(np.int64).sum(axis=0)
        total += sum(int(value) << (bits * i) for i, value in enumerate(sums))
    return total / (2 * n_relevant * n_other)


def evaluate_dataset(
    score_users: ScoreUsers,
    state: Any,
    dataset: Dataset,
    slices: SliceConfig,
    evaluation: EvaluationConfig,
    *,
    parts: Sequence[str] = ("valid", "test"),
    mesh: Mesh | None = None,
    split: UserShards | None = None,
    split_items: bool = False,
    kernels: str = "auto",
) -> dict[str, PartResult]:
    """Every metric of every slice of each of `parts`: valid masks train, test train and valid.

    Args:
      score_users, state, mesh, split, split_items, kernels: as for `rank`.
      dataset: gives relevant and masked items.
      slices: what is cold, tail, and the bins.
      evaluation: cut-offs, users ranked at once, pooled AUC or not.
    """
    out = {}
    for part in parts:
        data = part_data(dataset, part, slices)
        ranked = functools.partial(
            rank,
            score_users,
            state,
            data.relevant,
            data.seen,
            dataset.n_items,
            users_per_chunk=evaluation.eval_users_per_chunk,
            top_k=max(evaluation.ks),
            pooled_auc=evaluation.pooled_auc,
            mesh=mesh,
            split=split,
            split_items=split_items,
            kernels=kernels,
        )
        apart = {
            name: ranked(among=data.masks.items[slice_name])
            for name, slice_name in APART.items()
            if evaluation.rank_apart
        }
        out[part] = summarize_part(ranked(), data, evaluation.ks, apart)
    return out
