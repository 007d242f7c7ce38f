"""Request files -> a server that answers now -> results in the batch-API format.

    DATA/requests/NAME/results-FINGERPRINT.jsonl    a line an answer, appended as it comes

Any OpenAI-compatible server is asked (vLLM serve, llama.cpp, Ollama, LM Studio, hosted services),
many requests at once. A request is asked until an answer is whole: a killed run goes on with what
has none, an answer that was cut off is asked for again with twice the tokens. All answers are paid
for, so all of them are kept; `collect` reads the file like that of a batch service.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from slgr_jax import progress
from slgr_jax.config import AskConfig, RequestConfig
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, InputError, UserError
from slgr_jax.teacher.ask import prompts, requests
from slgr_jax.teacher.ask.endpoint import Endpoint, Reply, StoppedError
from slgr_jax.teacher.ask.requests import with_more_tokens
from slgr_jax.teacher.ask.spending import Budget, Pace, Spent

# Requests without an answer, one after another, that end a run: before any answer, and after one.
_FAILURES_AT_FIRST, _FAILURES_IN_A_ROW = 3, 20
_SYNC_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class LiveReport:
    """What a run did, and where it stands.

    Attributes:
      path: the results.
      asked: requests of the directory; whole, cut: of them, answered in full or cut off every time.
      new: answers of this run; failed: requests that this run gave up on.
      spent: on all answers in the file.
      stopped_by: the limit that ended the run; empty: it went through all requests.
    """

    path: pathlib.Path
    asked: int
    whole: int
    cut: int
    new: int
    failed: int
    spent: Spent
    stopped_by: str

    def report(self) -> str:
        """A few lines for people."""
        left = self.asked - self.whole
        lines = [
            f"{self.new:,} answers came: {self.whole:,} of {self.asked:,} requests have a whole "
            f"one, {self.cut:,} only one that was cut off, {self.failed:,} failed; "
            f"{self.spent.tokens:,} tokens"
            + (f", cost {self.spent.cost:,.4f}" if self.spent.cost else ""),
        ]
        if self.stopped_by:
            lines.append(f"  {self.stopped_by} stopped it; the same command with more goes on")
        elif left:
            lines.append(
                "  the same command asks for what is left; slgr teach requests --open "
                "writes it as files"
            )
        asked = f"--requests={self.path.parent} --results={self.path}"
        lines.append(f"  next: slgr teach collect {asked}")
        return "\n".join(lines)


def results_path(root: pathlib.Path, manifest: schema.RequestManifest) -> pathlib.Path:
    """Where the live answers to the requests of a directory are."""
    return root / f"results-{manifest.fingerprint[:8]}.jsonl"


def ask(
    root: pathlib.Path,
    options: AskConfig,
    limits: RequestConfig,
    *,
    only: Mapping[str, int] | None = None,
) -> LiveReport:
    """Ask a server for the answers that the requests at `root` still lack.

    Args:
      root: directory that `requests.write` wrote.
      options: where the server is, how many requests at once, how patient.
      limits: budget and prices.
      only: custom_ids that may be asked, and how many times the tokens their answers get; None:
        all, with the tokens that they state.

    Raises:
      ConfigError: no --base_url, or --max_cost without prices.
      InputError: the requests are not all written, or another process asks them.
      ManifestError, ShardError: requests or results are damaged.
      UserError: the server refuses or fails every request, or the extra `ask` is missing.
    """
    if not options.base_url:
        raise ConfigError("missing --base_url: the server, e.g. http://localhost:8000/v1")
    if limits.max_cost and not (limits.price_in or limits.price_out):
        raise ConfigError("--max_cost needs prices: give --price_in and --price_out")

    manifest = schema.read_request_manifest(root)
    if not manifest.complete:
        raise InputError(f"{root} is not finished: run slgr teach requests again first")
    path = results_path(root, manifest)

    with shards.locked(root):
        history = History.read(path, limits)
        with _Results(path, history.whole_bytes) as results:
            return _Run(options, limits, history, results, only).through(root, manifest)


# --- what is there -----------------------------------------------------------------------------


@dataclasses.dataclass
class History:
    """What a file of results says of its requests.

    Attributes:
      whole: custom_ids that have a whole answer; cuts: how many cut ones the others have.
      spent: on all answers; whole_bytes: of the file, without a line that a kill cut off.
    """

    whole: set[str] = dataclasses.field(default_factory=set)
    cuts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    spent: Spent = dataclasses.field(default_factory=Spent)
    whole_bytes: int = 0

    @classmethod
    def read(cls, path: pathlib.Path, limits: RequestConfig) -> History:
        """Of the file at `path`; of nothing where there is none.

        Raises:
          InputError: a line is no result of `ask`.
        """
        history = cls()
        if not path.exists():
            return history

        prices = Budget(limits, Spent())
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # a kill cut it off
                history.whole_bytes += len(line)
                try:
                    result = json.loads(line)
                    custom_id, response = result["custom_id"], result["response"]
                    if response is not None and response["status_code"] == 200:
                        body = response["body"]
                        prompt_tokens, answer_tokens = _usage(body, 0, 0)
                        spent = prices.cost(prompt_tokens, answer_tokens)
                        history.add(custom_id, body, spent)
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"{path}: line {number} is no result of slgr teach ask; remove the line, "
                        "or the file to ask for everything again"
                    ) from error
        return history

    def add(self, custom_id: str, body: Mapping[str, Any], spent: Spent) -> bool:
        """Take in an answer; whether it is whole."""
        self.spent = self.spent.plus(spent)
        whole = _finish_reason(body) not in ("", "length")
        if whole:
            self.whole.add(custom_id)
        elif _finish_reason(body):
            self.cuts[custom_id] += 1
        return whole


def _finish_reason(body: Mapping[str, Any]) -> str:
    """Why the first answer ended; empty where there is no answer."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return ""
    return str(choices[0].get("finish_reason") or "stop")


def _usage(body: Mapping[str, Any], prompt_tokens: int, answer_tokens: int) -> tuple[int, int]:
    """(prompt, answer) tokens that the server counted; those given where it does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return prompt_tokens, answer_tokens
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    given = (prompt_tokens, answer_tokens)
    prompt, answer = (
        count if type(count) is int else estimate
        for count, estimate in zip(counts, given, strict=True)
    )
    return prompt, answer


class _Results:
    """The file of results: appended to by many threads, a whole line at a time."""

    def __init__(self, path: pathlib.Path, whole_bytes: int) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed in __exit__
        self._file.truncate(whole_bytes)
        self._lock, self._synced = threading.Lock(), time.monotonic()

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._file.close()

    def append(self, custom_id: str, reply: Reply) -> None:
        """Keep what came back: a kill after this loses nothing, a power cut two seconds."""
        response = {"status_code": reply.status, "body": reply.body} if reply.status else None
        error = None if reply.status else {"code": "no_answer", "message": reply.problem}
        line = {"custom_id": custom_id, "response": response, "error": error}
        with self._lock:
            self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace"))
            self._file.write(b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


# --- asking ------------------------------------------------------------------------------------


class _Run:
    """Threads that ask, and what they share."""

    def __init__(
        self,
        options: AskConfig,
        limits: RequestConfig,
        history: History,
        results: _Results,
        only: Mapping[str, int] | None,
    ) -> None:
        self._options, self._history, self._results, self._only = options, history, results, only
        self._stop = threading.Event()
        self._pace = Pace(options.requests_per_minute, options.tokens_per_minute)
        key = os.environ.get(options.api_key_env, "")
        self._endpoint = Endpoint(options, key, self._pace, self._stop)
        self._budget = Budget(limits, history.spent)
        self._count_tokens = prompts.token_counter()[1]
        self._lock = threading.Lock()
        self._new = self._failed = self._failures_in_a_row = 0
        self._stopped_by = ""
        self._fatal: BaseException | None = None

    def through(self, root: pathlib.Path, manifest: schema.RequestManifest) -> LiveReport:
        """Ask every request that has no whole answer."""
        n_requests = sum(file.rows for file in manifest.files["requests"])
        free = threading.BoundedSemaphore(self._options.concurrency)
        opened = progress.bar(n_requests, "request", initial=len(self._history.whole))

        def work(line: dict[str, Any]) -> None:
            try:
                self._ask(line)
            except StoppedError:
                pass
            except BaseException as error:
                self._end(error)
            finally:
                free.release()
                with self._lock:
                    bar.n = len(self._history.whole)
                    bar.set_postfix_str(f"cost {self._budget.spent.cost:.4f}", refresh=False)
                    bar.update(0)

        workers = concurrent.futures.ThreadPoolExecutor(self._options.concurrency)
        with opened as bar, workers as pool:
            try:
                for line in self._open(root, manifest):
                    while not free.acquire(timeout=0.1):
                        if self._stop.is_set():
                            break
                    if self._stop.is_set():
                        break
                    pool.submit(work, line)
            except BaseException:
                self._stop.set()
                raise

        if self._fatal is not None:
            raise self._fatal
        cut = sum(custom_id not in self._history.whole for custom_id in self._history.cuts)
        return LiveReport(
            path=self._results.path,
            asked=n_requests,
            whole=len(self._history.whole),
            cut=cut,
            new=self._new,
            failed=self._failed,
            spent=self._budget.spent,
            stopped_by=self._stopped_by,
        )

    def _open(
        self, root: pathlib.Path, manifest: schema.RequestManifest
    ) -> Iterator[dict[str, Any]]:
        for line in requests.read_lines(root, manifest):
            custom_id = line["custom_id"]
            if custom_id in self._history.whole:
                continue
            if self._only is not None and custom_id not in self._only:
                continue
            if self._history.cuts[custom_id] <= self._options.cut_retries:
                yield line

    def _ask(self, line: dict[str, Any]) -> None:
        """Ask one request until its answer is whole, or was cut off too often."""
        custom_id, path = line["custom_id"], str(line["url"]).removeprefix("/v1")
        while self._history.cuts[custom_id] <= self._options.cut_retries:
            factor = 2 ** self._history.cuts[custom_id] * (self._only or {}).get(custom_id, 1)
            body, limit = with_more_tokens(line["body"], factor)
            shown = json.dumps([body.get("messages"), body.get("response_format")])
            prompt_tokens = int(self._count_tokens([shown])[0])
            most = self._budget.cost(prompt_tokens, limit)
            if (stopped_by := self._budget.reserve(most)) is not None:
                self._stopped_by = stopped_by
                self._stop.set()
                return

            spent = Spent()
            try:
                reply = self._endpoint.call(path, body, prompt_tokens + limit)
                if not reply.problem:
                    prompt_used, answer_used = _usage(reply.body, prompt_tokens, limit)
                    spent = self._budget.cost(prompt_used, answer_used)
                self._results.append(custom_id, reply)
            finally:
                self._budget.settle(most, spent)
            if self._take(custom_id, reply, spent):
                return

    def _take(self, custom_id: str, reply: Reply, spent: Spent) -> bool:
        """Count a reply; whether the request is done with."""
        with self._lock:
            if not reply.problem and _finish_reason(reply.body):
                self._new += 1
                self._failures_in_a_row = 0
                return self._history.add(custom_id, reply.body, spent)
            self._failed += 1
            self._failures_in_a_row += 1
            most = _FAILURES_IN_A_ROW if self._new else _FAILURES_AT_FIRST
        if self._failures_in_a_row >= most:
            self._end(UserError(self._refused(reply)))
        return True

    def _refused(self, reply: Reply) -> str:
        hint = "see that the server runs and is not overloaded (--concurrency, --timeout)"
        if reply.status == 200:
            hint = "it answers without choices: is this a chat completions server?"
        elif reply.status:
            hint = (
                "if it does not know a field of the requests, write them anew with "
                "--structured=json_object or none, or --token_limit=max_completion_tokens"
            )
        why = reply.problem or str(dict(reply.body))[:200]
        return (
            f"{self._options.base_url}: {self._failures_in_a_row} requests in a row failed, the "
            f"last one with {f'status {reply.status}: ' if reply.status else ''}{why}; {hint}"
        )

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self._fatal is None:
                self._fatal = error
        self._stop.set()
