"""Requests that arrive within a few milliseconds, answered by one call.

    async with Batcher(answer, size=32, wait=0.002, most_waiting=1000) as batcher:
        await batcher.ask(key, [first, second])   # answer(key, [first, second, and others'])

Entries are joined across requests where their keys are equal, in the order of their arrival. The
calls run in a thread of their own, one at a time: what arrives meanwhile is the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from slgr_jax.errors import UserError

Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry")
Answer = TypeVar("Answer")


class QueueFullError(UserError):
    """Too many entries wait already; the same request may be answered a moment later."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting(Generic[Key, Entry, Answer]):
    """An entry, and who waits for its answer."""

    key: Key
    entry: Entry
    answer: asyncio.Future[Answer]
    since: float  # by the loop's clock


class Batcher(Generic[Key, Entry, Answer]):
    """See the module's docstring. One event loop uses it.

    Attributes:
      calls: how often `answer` was called.
      answered: entries that it was called with.
    """

    def __init__(
        self,
        answer: Callable[[Key, list[Entry]], Sequence[Answer]],
        *,
        size: int,
        wait: float,
        most_waiting: int,
    ) -> None:
        """Begin with nothing waiting.

        Args:
          answer: (key, entries) -> an answer each, in their order.
          size: most entries of a call.
          wait: seconds that an entry waits for others while nothing else is under way.
          most_waiting: entries that may wait, beside those of the call under way.
        """
        self._answer, self._size, self._wait = answer, size, wait
        self._most_waiting = most_waiting
        self._waiting: deque[_Waiting[Key, Entry, Answer]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None
        self.calls = self.answered = 0

    async def __aenter__(self) -> Self:
        """Start answering."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Answer no more; the call under way is waited for, entries without one are cancelled."""
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for waiting in self._waiting:
            waiting.answer.cancel()
        self._thread.shutdown()

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(self, key: Key, entries: Sequence[Entry]) -> list[Answer]:
        """The answers to entries, in their order.

        Raises:
          QueueFullError: there is no room for all of them.
        """
        count = len(self._waiting)
        if count + len(entries) > self._most_waiting:
            raise QueueFullError(
                f"{count} users wait already and at most {self._most_waiting} may; this request "
                f"has {len(entries)}: ask again in a moment"
            )
        loop = asyncio.get_running_loop()
        now = loop.time()
        jobs = [_Waiting(key, entry, loop.create_future(), now) for entry in entries]
        self._waiting.extend(jobs)
        self._arrived.set()
        return await asyncio.gather(*(job.answer for job in jobs))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            rest = self._waiting[0].since + self._wait - loop.time()
            if rest > 0 and len(self._waiting) < self._size:
                await asyncio.sleep(rest)

            batch = self._next_batch()
            if batch:
                await loop.run_in_executor(self._thread, self._settle, batch, loop)

    def _next_batch(self) -> list[_Waiting[Key, Entry, Answer]]:
        """The first entry and those that can join it; nobody waits for what was cancelled."""
        key = self._waiting[0].key
        batch: list[_Waiting[Key, Entry, Answer]] = []
        others: deque[_Waiting[Key, Entry, Answer]] = deque()
        for waiting in self._waiting:
            if waiting.answer.done():
                continue
            joins = len(batch) < self._size and waiting.key == key
            (batch if joins else others).append(waiting)
        self._waiting = others
        return batch

    def _settle(
        self, batch: list[_Waiting[Key, Entry, Answer]], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Answer a batch; if it cannot be, each entry alone, so that none suffers for another."""
        self.calls += 1
        try:
            answers = self._answer(batch[0].key, [waiting.entry for waiting in batch])
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._settle([waiting], loop)
                return
            loop.call_soon_threadsafe(_fail, batch[0].answer, error)
            return
        self.answered += len(batch)
        loop.call_soon_threadsafe(_resolve, [waiting.answer for waiting in batch], answers)


def _resolve(waiting: Sequence[asyncio.Future[Answer]], answers: Sequence[Answer]) -> None:
    for future, answer in zip(waiting, answers, strict=True):
        if not future.done():  # whoever asked may have gone
            future.set_result(answer)


def _fail(waiting: asyncio.Future[Answer], error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
