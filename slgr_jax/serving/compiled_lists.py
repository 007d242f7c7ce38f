"""The lists that a server answers with: all that is compiled is compiled before the first answer.

    lists = CompiledLists(run, ServeConfig())
    lists.compile()
    lists.known(Options(), [3, 8])             # users by index
    lists.new(Options(), [History(["i7"])])    # users by what they have

Lists have `max_k` items: a shorter one is the beginning of it, as ties rank by item index. New
users are folded in (`fold_in.py`), one alone or `batch_new_users` together with as many items to
the next power of two (`items_class`): so few shapes exist, and `compile` meets each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from slgr_jax.config import ServeConfig
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation.ranking_metrics import TopItems
from slgr_jax.serving.histories import History
from slgr_jax.serving.recommender import item_filter
from slgr_jax.serving.trained_run import TrainedRun


class Options(NamedTuple):
    """What the users of one call have in common.

    Attributes:
      mask_seen: leave out what a user has.
      allow: ids of the only items to list; None: all.
      deny: ids of items not to list.
    """

    mask_seen: bool = True
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()


class UserList(NamedTuple):
    """A user's items, best first: [n] indices and [n] logits, n <= max_k."""

    items: Int[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]


class CompiledLists:
    """See the module's docstring. `known` and `new` may run at once, each in one thread."""

    def __init__(self, run: TrainedRun, config: ServeConfig) -> None:
        """Put on the device what known users need; compile nothing yet."""
        self._run, self._config = run, config
        self._recommenders = {
            mask_seen: run.recommender(
                config.max_k, mask_seen=mask_seen, batch_users=config.batch_users
            )
            for mask_seen in (True, False)
        }

    @functools.cached_property
    def refuses_new(self) -> str:
        """Why new users cannot be folded into this run; empty: they can be."""
        try:
            self._run.fold_in({"0": self._run.item_ids[:1]})
        except ConfigError as error:
            return str(error)
        return ""

    def compile(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Run every program once.

        Args:
          stopped: asked between programs; true: leave the rest.

        Raises:
          NonFiniteError: a score is NaN or infinite.
        """
        denied = (self._run.item_ids[-1],) if len(self._run.item_ids) > 1 else ()
        variants = [Options(seen, None, deny) for seen in (True, False) for deny in ((), denied)]
        for options in variants:
            if stopped():
                return
            self.known(options, [0])

        if self.refuses_new:
            return
        most = min(self._config.max_items, len(self._run.item_ids))
        counts = [min(1 << power, most) for power in range((most - 1).bit_length() + 1)]
        for users in sorted({1, self._config.batch_new_users}):
            for count in counts:
                # Filters and unmasked lists differ from the others in no more than these programs.
                for options in variants if count == 1 else variants[:1]:
                    if stopped():
                        return
                    self.new(options, [History(self._run.item_ids[:count])] * users)

    def known(self, options: Options, users: Sequence[int]) -> list[UserList]:
        """The lists of users by index."""
        recommender = self._recommenders[options.mask_seen]
        allowed = self._allowed(options)
        return _split(recommender.top(np.asarray(users, np.int32), allowed=allowed))

    def new(self, options: Options, histories: Sequence[History]) -> list[UserList]:
        """The lists of at most `batch_new_users` users who have these items, each once.

        Raises:
          InputError: an unknown item, or none.
          ConfigError: `refuses_new`.
        """
        count = 1 if len(histories) == 1 else self._config.batch_new_users
        filled = [*histories, *[histories[0]] * (count - len(histories))]
        folded = self._run.fold_in({str(place): history for place, history in enumerate(filled)})
        recommender = folded.run.recommender(
            self._config.max_k, mask_seen=options.mask_seen, batch_users=count
        )
        users = np.arange(count, dtype=np.int32)
        return _split(recommender.top(users, allowed=self._allowed(options)))[: len(histories)]

    def _allowed(self, options: Options) -> Bool[np.ndarray, "I"] | None:
        return item_filter(self._run, options.allow, options.deny or None).allowed


def items_class(count: int) -> int:
    """The power of two that new users are folded in under: those of one class share programs."""
    return 1 << (count - 1).bit_length()


def _split(top: TopItems) -> list[UserList]:
    return [
        UserList(items[items >= 0], scores[items >= 0])
        for items, scores in zip(top.items, top.scores, strict=True)
    ]
