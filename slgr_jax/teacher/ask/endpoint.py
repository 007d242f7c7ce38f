"""One request to an OpenAI-compatible server, until there is an answer or no hope of one.

A server that is busy, restarting or slow (429, 408, 409, 5xx, no connection, no answer in time, an
answer that breaks off) is asked again, later and later. A request that the server refuses is
reported. What no other request would survive (a wrong key, an unknown model, no credit left) is a
`UserError`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from slgr_jax.config import AskConfig
from slgr_jax.errors import ConfigError, UserError
from slgr_jax.teacher.ask.spending import Pace

_FATAL = {
    401: "set the environment variable {key} to a key of this server",
    403: "set the environment variable {key} to a key that may use this model",
    404: "check --base_url (it ends in /v1 with most servers) and the --model of the requests",
}
_AGAIN = frozenset({408, 409, 425, 429})
_LONGEST_WAIT = 60.0  # seconds between two tries


class Reply(NamedTuple):
    """What became of a request.

    Attributes:
      status: of HTTP; 0 where no answer came.
      body: of the answer, or what the server says of a refusal; empty where there is none.
      problem: why it has no answer; empty where it has one.
    """

    status: int
    body: Mapping[str, Any]
    problem: str


class StoppedError(Exception):
    """Asking ended while this request was waiting."""


class Endpoint:
    """A server, asked by the `openai` client.

    Args:
      options: where it is and how patient to be.
      api_key: of the server; "" where it wants none.
      pace: when requests may start.
      stop: set when nothing more is to be asked.

    Raises:
      ConfigError: --base_url is no address.
      UserError: the extra `ask` is not installed.
    """

    def __init__(self, options: AskConfig, api_key: str, pace: Pace, stop: threading.Event) -> None:
        address = options.base_url.rstrip("/")
        if not address.startswith(("http://", "https://")) or address.endswith("/completions"):
            raise ConfigError(
                f"--base_url={options.base_url!r} is not the address of a server: give the part "
                "before /chat/completions, e.g. http://localhost:8000/v1"
            )

        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"ask needs the package {error.name}: pip install 'slgr_jax[ask]' (from a "
                "checkout: pip install -e '.[ask]')"
            ) from error

        self._openai, self._options, self._pace, self._stop = openai, options, pace, stop
        self._client = openai.OpenAI(
            base_url=address,
            api_key=api_key or "none",
            timeout=options.timeout,
            max_retries=0,  # the pace of all threads decides when to try again
        )

    def call(self, path: str, body: Mapping[str, Any], tokens: int) -> Reply:
        """Send `body` to `path` below the address; `tokens` is its share of the pace.

        Raises:
          StoppedError: `stop` was set while it waited.
          UserError: the server refuses every request.
        """
        problem = ""
        for attempt in range(self._options.retries + 1):
            if not self._pace.wait(tokens, self._stop):
                raise StoppedError
            try:
                answer = self._client.post(path, body=body, cast_to=object)
                if isinstance(answer, dict):
                    return Reply(200, answer, "")
                problem, wait = "the answer is no JSON object", 0.0
            except self._openai.APIStatusError as error:
                if (reply := self._refusal(error)) is not None:
                    return reply
                problem, wait = f"status {error.status_code}", _retry_after(error)
                if error.status_code == 429:
                    self._pace.hold(wait)
            except self._openai.APITimeoutError:
                problem, wait = f"no answer within --timeout={self._options.timeout:g} s", 0.0
            except self._openai.APIConnectionError as error:
                problem, wait = f"no connection ({error.__cause__ or error})"[:200], 0.0
            except ValueError as error:  # the body of the answer
                problem, wait = f"the answer is not JSON ({error})"[:200], 0.0

            if attempt < self._options.retries and self._stop.wait(max(wait, self._wait(attempt))):
                raise StoppedError
        return Reply(0, {}, f"{problem}, after {self._options.retries + 1} tries")

    def _refusal(self, error: Any) -> Reply | None:
        """What to report of an answer that is an error; None: ask again."""
        status, body = int(error.status_code), error.body
        detail = str(body.get("message", body) if isinstance(body, dict) else error.message)[:300]
        no_credit = status == 429 and "insufficient_quota" in (error.code, error.type)
        if status in _FATAL or no_credit:
            fix = _FATAL.get(status, "there is no credit left").format(
                key=self._options.api_key_env
            )
            raise UserError(f"{self._options.base_url} answers {status} ({detail}): {fix}")
        if status in _AGAIN or status >= 500:
            return None
        return Reply(status, {"error": body if body is not None else detail}, detail)

    def _wait(self, attempt: int) -> float:
        """Seconds before the next try: twice as many each time, and not all threads at once."""
        longest = min(_LONGEST_WAIT, self._options.backoff * 2**attempt)
        return longest * random.uniform(0.5, 1)


def _retry_after(error: Any) -> float:
    """Seconds that the server asks for; 0 where it says nothing of use."""
    try:
        return min(max(float(error.response.headers.get("retry-after", 0)), 0.0), 600.0)
    except ValueError:  # a date
        return 0.0
