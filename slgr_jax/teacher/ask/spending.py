"""What live requests may spend, and how fast: shared by the threads that ask."""

from __future__ import annotations

import dataclasses
import threading
import time

from slgr_jax.config import RequestConfig


@dataclasses.dataclass(frozen=True)
class Spent:
    """Requests that were answered, the tokens of their prompts and answers, and the money."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def plus(self, other: Spent) -> Spent:
        """The sum, entry by entry."""
        return Spent(
            self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost
        )

    def minus(self, other: Spent) -> Spent:
        """The difference, entry by entry."""
        return self.plus(Spent(-other.requests, -other.tokens, -other.cost))


class Budget:
    """The most that may be spent: --max_requests, --max_tokens, --max_cost (0: no limit).

    A request reserves the most that it can cost before it is sent, and settles for what it did
    cost: what is spent stays within the limits as long as no answer costs more than was reserved.

    Args:
      options: limits and prices.
      spent: what was spent before.
    """

    def __init__(self, options: RequestConfig, spent: Spent) -> None:
        self._options, self._spent, self._reserved = options, spent, Spent()
        self._changed = threading.Condition()

    @property
    def spent(self) -> Spent:
        """What was spent so far, without what is reserved."""
        return self._spent

    def cost(self, prompt_tokens: int, answer_tokens: int) -> Spent:
        """One request with so many tokens, at the prices of the options."""
        options = self._options
        money = (prompt_tokens * options.price_in + answer_tokens * options.price_out) / 1e6
        return Spent(1, prompt_tokens + answer_tokens, money)

    def reserve(self, most: Spent) -> str | None:
        """Set `most` aside; waits while requests that are under way may still free some of it.

        Returns:
          None, or the name of the limit that `most` does not fit into.
        """
        with self._changed:
            while (limit := self._exceeded(most)) is not None:
                if not self._reserved.requests:
                    return limit
                self._changed.wait()
            self._reserved = self._reserved.plus(most)
            return None

    def settle(self, reserved: Spent, spent: Spent) -> None:
        """Give back what was reserved, and count what was spent."""
        with self._changed:
            self._reserved = self._reserved.minus(reserved)
            self._spent = self._spent.plus(spent)
            self._changed.notify_all()

    def _exceeded(self, most: Spent) -> str | None:
        options, total = self._options, self._spent.plus(self._reserved).plus(most)
        limits = (
            ("max_requests", options.max_requests, total.requests),
            ("max_tokens", options.max_tokens, total.tokens),
            ("max_cost", options.max_cost, total.cost),
        )
        for name, limit, value in limits:
            if limit and value > limit:
                return f"--{name}={limit:g}"
        return None


class Pace:
    """When the next request may start: --requests_per_minute, --tokens_per_minute (0: no limit).

    A request takes the next free moment, and moves it on by its share of a minute. A server that
    says when to come back (`hold`) is heard by all threads.
    """

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int, stop: threading.Event) -> bool:
        """Wait for a moment to start a request of so many tokens; false where `stop` came first."""
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + max(self._per_request, tokens * self._per_token)
        return not stop.wait(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Start nothing for so long."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + seconds)
