"""The best items of known users, for one call or for a server.

    recommender = run.recommender(k=10, deny=["i7"], batch_users=64)
    recommender.recommend(["u1", "u2"])            # ids in, ids out
    recommender.top(np.array([0, 1], np.int32))    # indices in, indices out

However many users ask, one program answers, compiled at the first call: users are listed
`batch_users` at a time, and what is missing is filled up. Tables, seen items and filters stay on
the device between calls.

Shape letters: n users of a request, U users, I items, K length of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.evaluation.device_ranking import Listable
from slgr_jax.evaluation.full_ranking import TopLists
from slgr_jax.evaluation.ranking_metrics import TopItems

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

# Ids of items for everybody, or of items by user.
ItemsOf = Sequence[str] | Mapping[str, Sequence[str]]


class Recommendations(NamedTuple):
    """The best items of each user, best first.

    Attributes:
      users: [n] ids, as asked.
      items: [n, K] ids; None where a user has fewer items left.
      scores: [n, K] logits; -inf where there is no item.
    """

    users: list[str]
    items: list[list[str | None]]
    scores: Float[np.ndarray, "n K"]


class ItemFilter(NamedTuple):
    """Which items may be listed, by index.

    Attributes:
      allowed: [I] whether anybody may get an item; None: all.
      only: [U] rows of the items that each user may get; None: all.
      denied: [U] rows of items that each user does not get; None: none.
    """

    allowed: Bool[np.ndarray, "I"] | None = None
    only: Csr | None = None
    denied: Csr | None = None


class Recommender:
    """See the module's docstring. Calls from several threads take turns.

    Attributes:
      k: length of a list: as asked for, or that of the catalogue where it is shorter.
      batch_users: users that one run of the program lists for.
    """

    def __init__(
        self,
        run: TrainedRun,
        k: int = 10,
        *,
        mask_seen: bool = True,
        items: ItemFilter | None = None,
        batch_users: int = 1024,
    ) -> None:
        """Put on the device what recommending needs.

        Args:
          k: length of a list.
          mask_seen: leave out what a user has in training and validation.
          items: which items may be listed (`item_filter`); None: all.
          batch_users: most users listed at once; fewer where a CPU is faster so.

        Raises:
          ConfigError: k or `batch_users` is under 1, or no item is allowed.
        """
        for name, value in (("k", k), ("batch_users", batch_users)):
            if value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1")
        items = items or ItemFilter()
        if items.allowed is not None and not items.allowed.any():
            raise ConfigError("the allowed items less the denied ones leave none to list")
        self.run, self._allowed = run, items.allowed

        dataset = run.dataset
        hidden = run.seen if mask_seen else Csr.empty(dataset.n_users)
        if items.denied is not None:
            hidden = _union(hidden, items.denied)
        # Of several processes each knows what is masked of its own users.
        costs = None if dataset.of_users is None else dataset.history
        self._lists = TopLists(
            run.score_users,
            run.restored.scoring("test"),
            hidden,
            dataset.n_items,
            k=k,
            users_per_chunk=batch_users,
            mesh=run.restored.mesh,
            split=run.restored.split,
            split_items=run.restored.split_items,
            costs=costs,
            kernels=run.config.train.kernels,
        )
        self.k, self.batch_users = self._lists.k, self._lists.chunk
        self._listable = self._lists.put(items.allowed, items.only)

    def top(
        self, users: Int[np.ndarray, "n"], *, allowed: Bool[np.ndarray, "I"] | None = None
    ) -> TopItems:
        """The lists of users by index; -1 and -inf past a user's last item.

        Args:
          allowed: the only items of this call, of those that the recommender lists at all.

        Raises:
          NonFiniteError: a score is NaN or infinite.
        """
        listable = self._listable
        if allowed is not None:
            both = allowed if self._allowed is None else allowed & self._allowed
            narrowed = self._lists.put(both, None)
            assert narrowed is not None
            only = None if listable is None else listable.only
            listable = Listable(narrowed.allowed, only)
        return self._lists(users, listable)

    def recommend(
        self,
        users: Sequence[str],
        *,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
    ) -> Recommendations:
        """The lists of users by id.

        Args:
          allow: the only items of this call, of those that the recommender lists at all.
          deny: items not to list in this call.

        Raises:
          InputError: an unknown id.
          NonFiniteError: a score is NaN or infinite.
        """
        names = [str(user) for user in users]
        allowed = item_filter(self.run, allow, deny).allowed
        top = self.top(self.run.user_index(names), allowed=allowed)
        ids = [*self.run.item_ids, None]  # -1: no item left
        return Recommendations(
            names, [[ids[item] for item in row] for row in top.items], top.scores
        )


def item_filter(run: TrainedRun, allow: ItemsOf | None, deny: ItemsOf | None) -> ItemFilter:
    """The filter of ids as one of indices.

    Args:
      allow: the only items to list; by user: a user who is not among them gets none.
      deny: items not to list.

    Raises:
      InputError: an unknown id.
    """
    allowed, pairs = None, {}
    for name, items in (("only", allow), ("denied", deny)):
        if isinstance(items, str):
            raise InputError(f"{items!r} is text; give a list of item ids, or of items by user")
        if isinstance(items, Mapping):
            users = np.repeat(run.user_index(list(items)), [len(of) for of in items.values()])
            listed = run.item_index([item for of in items.values() for item in of])
            pairs[name] = Csr.from_pairs(users, listed, run.dataset.n_users)
    if allow is not None and "only" not in pairs:
        allowed = np.zeros(run.dataset.n_items, bool)
        allowed[run.item_index(list(allow))] = True
    if deny is not None and "denied" not in pairs:
        allowed = np.ones(run.dataset.n_items, bool) if allowed is None else allowed
        allowed[run.item_index(list(deny))] = False
    return ItemFilter(allowed, pairs.get("only"), pairs.get("denied"))


def _union(first: Csr, second: Csr) -> Csr:
    owners = np.concatenate([first.owners(), second.owners()])
    entries = np.concatenate([first.indices, second.indices])
    return Csr.from_pairs(owners, entries, first.offsets.size - 1)
