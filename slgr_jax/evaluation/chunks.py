"""Users scored a chunk at a time on the device, whoever ranks them there.

Shape letters: U users, I items, B users of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from slgr_jax import progress
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import device_ranking, device_scoring
from slgr_jax.evaluation.device_ranking import DeviceCsr, Listable
from slgr_jax.evaluation.device_scoring import ByVectors, ScoreUsers
from slgr_jax.evaluation.placement import Placement
from slgr_jax.kernels import build as kernel_build
from slgr_jax.kernels import ranks
from slgr_jax.mesh import put
from slgr_jax.sampling.user_shards import ByUser

# Scores of a chunk that a CPU ranks fastest: XLA's programs while they fit the caches, the kernels
# from where the product of the factors runs at its best.
_CPU_CHUNK = {"xla": 1 << 22, "native": 1 << 23}


@functools.partial(jax.jit, static_argnames="where")
def _laid_out(rows: DeviceCsr, *, where: Sharding) -> DeviceCsr:
    """The rows on other devices than they are on."""
    return DeviceCsr(*(jax.lax.with_sharding_constraint(x, where) for x in rows))


@dataclasses.dataclass
class Asked:
    """A state whose users are scored, and what is made of it once for all chunks.

    Attributes:
      state: the argument of `score_users`.
      score: `device_scoring.score_chunk` of it.
      items: where the kernels rank by products, the vectors of items.
      room: where a matrix of scores is written; None until there is one.
    """

    state: Any
    score: functools.partial[jax.Array]
    items: ranks.Items | None
    room: jax.Array | None = None


class ChunkScorer:
    """Scores users a chunk at a time; knows where arrays go. One thread uses it at a time."""

    def __init__(
        self,
        score_users: ScoreUsers,
        n_users: int,
        n_items: int,
        users_per_chunk: int,
        at: Placement,
        kernels: str,
        *,
        products: bool = True,
        filters: bool = False,
    ) -> None:
        """Plan chunks of at most `users_per_chunk` users, no more than `n_users` need.

        Args:
          products: whether what `each` calls takes `ranks.Vectors`, too.
          filters: whether `each` may be told what is `listable`, which takes a matrix of scores.
        """
        self.n_items, self.at, self._score_users = n_items, at, score_users
        size = at.devices
        platform = jax.default_backend() if at.mesh is None else at.mesh.devices.flat[0].platform
        self.native = kernel_build.choose(
            kernels, platform=platform, devices=size, units=kernel_build.RANKING
        )
        self._by_vectors: ByVectors | None = None
        if products and self.native and at.mesh is None and isinstance(score_users, ByVectors):
            self._by_vectors = score_users
        chunk = min(users_per_chunk, 1 << max(n_users - 1, 0).bit_length())
        if platform == "cpu" and (self._by_vectors is None or filters):
            most = _CPU_CHUNK["native" if self.native else "xla"]
            fitting = max(most // max(n_items, 1), 8)
            chunk = min(chunk, (1 << (fitting.bit_length() - 1)) * size)
        self.chunk = -(-chunk // size) * size  # a multiple of the devices
        # An accelerator has its own allocator, and may score a chunk while it ranks the last.
        self._keeps_room = platform == "cpu"

    def ask(self, state: Any) -> Asked:
        """A state, to be scored by `each`."""
        split, columns = self.at.split, self.n_items
        if self.at.split_items:  # with the rows that fill a table up
            by_vectors: Any = self._score_users
            columns = jax.eval_shape(by_vectors.items, state).shape[0]
        leaves = jax.tree.leaves(state) if split is not None and self.at.mesh is not None else []
        score = functools.partial(
            device_scoring.score_chunk,
            score_users=self._score_users,
            n_items=columns,
            at=self.at,
            specs=tuple(leaf.sharding.spec for leaf in leaves),
        )
        items = None
        if self._by_vectors is not None:
            items = device_scoring.items_of(
                state, by_vectors=self._by_vectors, n_items=self.n_items
            )
        return Asked(state, score, items)

    def put(self, tree: Any) -> Any:
        """The arrays, whole, on every device."""
        return put(tree, self.at.everywhere)

    def put_rows(self, csr: Csr) -> DeviceCsr:
        """The ragged rows on every device; or on each those of the users that it ranks."""
        if self.at.split is not None:
            by_user = ByUser(csr.owners(), self.at.split)
            rows = (by_user.bounds(), by_user.entries(csr.indices.astype(np.int32)))
            own = DeviceCsr(*(of_users.put(self.at.with_users) for of_users in rows))
            # Devices that rank the same users get the rows of each other's, from other processes
            # too, which alone have read them.
            return _laid_out(own, where=self.at.by_user) if self.at.split_items else own
        n = int(csr.offsets[-1])
        if n >= 2**31:
            raise ConfigError(f"{n} interactions to mask or find; the limit is 2^31 - 1")
        indices = np.zeros(1 << max(n - 1, 0).bit_length(), np.int32)
        indices[:n] = csr.indices
        return DeviceCsr(self.put(csr.offsets.astype(np.int32)), self.put(indices))

    def arranged(self, users: np.ndarray) -> np.ndarray:
        """Which of the users are ranked when: places in `users`.

        Where they are split, a device's part of each chunk is its own users; -1 fills it up.
        """
        split, size = self.at.split, self.at.devices
        if split is None or size == 1:
            return np.arange(users.size, dtype=np.int32)
        device = split.device_of(users, size)
        share = self.chunk // size
        chunks = -(-int(np.bincount(device, minlength=size).max()) // share)
        by_device = np.argsort(device, kind="stable")
        device = device[by_device]
        place = np.arange(users.size) - np.searchsorted(device, device)  # among its device's users
        arranged = np.full((chunks, size, share), -1, np.int32)
        arranged[place // share, device, place % share] = by_device
        return arranged.reshape(-1)

    def each(
        self,
        asked: Asked,
        users: np.ndarray,
        call: Callable[[ranks.Scores, jax.Array, np.ndarray], Any],
        listable: Listable | None = None,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:
        """(slice of `users`, host copy of `call(scores, chunk, its users)`) for every chunk.

        The device is one chunk ahead of the host.
        """
        with progress.bar(int(np.sum(users >= 0)), "user") as bar:
            for places, result in self._each(asked, users, call, listable, between_chunks):
                yield places, result
                bar.update(int(np.sum(users[places] >= 0)))

    def _each(
        self,
        asked: Asked,
        users: np.ndarray,
        call: Callable[[ranks.Scores, jax.Array, np.ndarray], Any],
        listable: Listable | None,
        between_chunks: Callable[[], None],
    ) -> Iterator[Any]:
        waiting: list[tuple[slice, Any]] = []
        for begin in range(0, users.size, self.chunk):
            between_chunks()
            of_chunk = users[begin : begin + self.chunk]
            padded = np.full(self.chunk, -1, np.int32)
            padded[: of_chunk.size] = of_chunk
            if self.at.split is not None:
                padded = np.where(padded < 0, -1, self.at.split.row[padded])
            chunk = put(padded, None if self.at.mesh is None else self.at.by_user)

            result = call(self._scores(asked, chunk, listable), chunk, of_chunk)
            waiting.append((slice(begin, begin + of_chunk.size), result))
            if len(waiting) == 2:
                places, result = waiting.pop(0)
                yield places, jax.device_get(result)
        for places, result in waiting:
            yield places, jax.device_get(result)

    def _scores(self, asked: Asked, chunk: jax.Array, listable: Listable | None) -> ranks.Scores:
        """The scores of a chunk; a matrix of them is in `asked.room`, and valid until the next."""
        if asked.items is not None and listable is None:
            assert self._by_vectors is not None
            queries = device_scoring.queries_of(asked.state, chunk, by_vectors=self._by_vectors)
            return ranks.Vectors(queries, asked.items)
        room, asked.room = asked.room, None
        if room is None and self._keeps_room:
            columns = asked.score.keywords["n_items"]
            room = device_scoring.score_room(users=self.chunk, n_items=columns, at=self.at)
        scores = asked.score(room, asked.state, chunk)
        if listable is not None:
            scores = device_ranking.keep_listable(scores, chunk, listable, at=self.at)
        if self._keeps_room:
            asked.room = scores
        return scores
