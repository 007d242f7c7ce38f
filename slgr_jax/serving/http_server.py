"""A small HTTP server of a run's lists: known users, new ones, a page to try it.

    serve(load("RUN"), ServeConfig(port=8080))     # until SIGTERM or SIGINT

    GET  /            a page to try it in a browser
    GET  /health      200 once every program is compiled, 503 before; what is served, and limits
    GET  /recommend   ?users=u1&users=u2&k=5
    POST /recommend   {"users": [...]} or {"histories": {name: [...]}}: see `http_requests`
    GET  /items       ?search=star&limit=20: ids and titles

Requests of a few milliseconds are joined (`batching.py`). Errors are JSON, {"error": "..."}: 404
for an unknown user or address, 405 for another method, 413 over a limit, 422 for what cannot be
understood, 503 while starting, stopping, or with too many waiting. Starlette and uvicorn are the
extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.resources
import json
import logging
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.config import ServeConfig
from slgr_jax.errors import ConfigError, UserError, listing
from slgr_jax.serving import http_requests
from slgr_jax.serving.batching import Batcher, QueueFullError
from slgr_jax.serving.compiled_lists import CompiledLists, Options, UserList, items_class
from slgr_jax.serving.histories import History
from slgr_jax.serving.http_requests import ListRequest, RequestError
from slgr_jax.serving.trained_run import TrainedRun

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ConfigError(
        f"slgr serve needs the extra: pip install 'slgr_jax[serve]' ({error})"
    ) from error

LOGGER = logging.getLogger(__name__)
STOP_SECONDS = 30  # that requests under way have when the server is stopped
MOST_FOUND = 100  # items of a search
# The page holds all that it needs, and talks to its own server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
}


class _Json(Response):
    """JSON in ASCII: half characters, which UTF-8 has none of, are escapes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class Service:
    """What answers the requests.

    Attributes:
      failure: why it cannot be started; None: it can.
    """

    def __init__(self, run: TrainedRun, config: ServeConfig) -> None:
        """Put the run on the device and its ids into dictionaries; compile nothing yet."""
        self._run, self._config = run, config
        self._lists = CompiledLists(run, config)
        self._users = {user: i for i, user in enumerate(run.dataset.user_ids.to_pylist())}
        self._items = {item: i for i, item in enumerate(run.item_ids)}
        self._titles = _titles(run)
        self._requests, self._ready = 0, False
        self._stopping = threading.Event()
        self.failure: Exception | None = None
        batcher = functools.partial(
            Batcher, wait=config.batch_wait_ms / 1000, most_waiting=config.max_queue
        )
        self._known: Batcher[Options, int, UserList] = batcher(
            self._lists.known, size=config.batch_users
        )
        # Of one class of item counts: `compiled_lists` says why.
        self._new: Batcher[tuple[Options, int], History, UserList] = batcher(
            lambda key, histories: self._lists.new(key[0], histories), size=config.batch_new_users
        )

    @contextlib.asynccontextmanager
    async def running(self, failed: Callable[[], None]) -> AsyncIterator[None]:
        """Compile beside the first requests, and answer until the end of the block.

        Args:
          failed: called where compiling fails; `failure` then says why.
        """

        def start() -> None:
            try:
                self._lists.compile(self._stopping.is_set)
            except Exception as error:
                self.failure = error
                failed()
                return
            if not self._stopping.is_set():
                self._ready = True
                LOGGER.info("ready: every program is compiled")

        async with self._known, self._new:
            starting = asyncio.create_task(asyncio.to_thread(start))
            try:
                yield
            finally:
                self._stopping.set()
                await starting

    # ----------------------------------------------------------------------------- answers

    async def page(self, request: Request) -> Response:
        """The page to try it."""
        page = importlib.resources.files("slgr_jax.serving").joinpath("try_page.html")
        return HTMLResponse(page.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """Whether it is ready, what it serves, its limits, and what it has done."""
        run, config = self._run, self._config
        manifest = run.dataset.manifest
        body = {
            "status": "ready" if self._ready else "starting",
            "run": run.workdir,
            "backbone": run.config.model.backbone,
            "data": {
                "name": manifest.name,
                "split_hash": manifest.split_hash,
                "id_map_hash": manifest.id_map_hash,
                "users": len(self._users),
                "items": len(self._items),
                "titles": self._titles is not None,
                "example_user": next(iter(self._users), None),
            },
            "k": config.k,
            "limits": {
                name: getattr(config, name)
                for name in ("max_k", "max_users", "max_items", "max_filter", "max_queue")
            },
            "requests": self._requests,
            "waiting": len(self._known) + len(self._new),
            "known_users": {"listed": self._known.answered, "calls": self._known.calls},
            "new_users": {
                "listed": self._new.answered,
                "calls": self._new.calls,
                "refused": self._lists.refuses_new if self._ready else "",
            },
        }
        return _Json(body, 200 if self._ready else 503)

    async def recommend(self, request: Request) -> Response:
        """Lists of known or new users."""
        if request.method == "POST":
            fields = http_requests.parse_json(await _body(request))
        else:
            fields = http_requests.from_address(request.query_params.multi_items())
        wanted = http_requests.read(fields, self._config)
        self._check_ids(wanted)
        self._check_ready()
        if wanted.users:
            names, lists = wanted.users, await self._of_known(wanted)
        else:
            names, lists = list(wanted.histories), await self._of_new(wanted)
        self._requests += 1
        users = [
            {"user": name, "items": self._shown(found, wanted.k)}
            for name, found in zip(names, lists, strict=True)
        ]
        return _Json({"k": wanted.k, "users": users})

    async def items(self, request: Request) -> Response:
        """Items whose title, or id, holds a text."""
        text = request.query_params.get("search", "")
        limit = request.query_params.get("limit", "20")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST_FOUND):
            raise RequestError(422, f"limit={limit!r} is not a whole number from 1 to {MOST_FOUND}")
        if len(text) > 200:
            raise RequestError(413, f"search has {len(text)} characters; at most 200")
        ids = self._run.item_id_array
        hits = pc.match_substring(ids, text, ignore_case=True)
        if self._titles is not None:
            of_title = pc.match_substring(self._titles, text, ignore_case=True)
            hits = pc.or_(hits, pc.fill_null(of_title, False))
        places = pc.indices_nonzero(hits).to_pylist()
        found = [self._item(place) for place in places[: int(limit)]]
        return _Json({"found": len(places), "items": found})

    async def _of_known(self, wanted: ListRequest) -> list[UserList]:
        return await self._known.ask(wanted.options, [self._users[user] for user in wanted.users])

    async def _of_new(self, wanted: ListRequest) -> list[UserList]:
        by_class: defaultdict[int, list[str]] = defaultdict(list)
        for name, history in wanted.histories.items():
            by_class[items_class(len(history.items))].append(name)
        lists: dict[str, UserList] = {}
        for count, names in by_class.items():
            histories = [wanted.histories[name] for name in names]
            answers = await self._new.ask((wanted.options, count), histories)
            lists |= zip(names, answers, strict=True)
        return [lists[name] for name in wanted.histories]

    def _shown(self, found: UserList, k: int) -> list[dict[str, Any]]:
        scores = found.scores[:k].tolist()
        return [
            self._item(item) | {"score": score}
            for item, score in zip(found.items[:k].tolist(), scores, strict=True)
        ]

    def _item(self, place: int) -> dict[str, Any]:
        named: dict[str, Any] = {"item": self._run.item_ids[place]}
        if self._titles is not None:
            named["title"] = self._titles[place].as_py()
        return named

    # ------------------------------------------------------------------------------ checks

    def _check_ids(self, wanted: ListRequest) -> None:
        unknown = [user for user in wanted.users if user not in self._users]
        if unknown:
            raise RequestError(
                404,
                f"unknown user {_named(unknown)} ({len(unknown)} of {len(wanted.users)}); the run "
                f"knows {len(self._users)} users; send the items of a new one as histories",
            )
        lists: dict[str, Sequence[str]] = {
            "histories": [item for of in wanted.histories.values() for item in of.items],
            "allow": wanted.options.allow or (),
            "deny": wanted.options.deny,
        }
        for field, items in lists.items():
            missing = [item for item in items if item not in self._items]
            if missing:
                raise RequestError(
                    422,
                    f"unknown item {_named(missing)} in {field} ({len(missing)} of {len(items)}); "
                    f"the run knows {len(self._items)} items: /items?search=TEXT finds them",
                )

    def _check_ready(self) -> None:
        if self._stopping.is_set() or not self._ready:
            raise RequestError(
                503, "not ready: its programs are being compiled; /health says when it is"
            )


def make_app(service: Service, failed: Callable[[], None] = lambda: None) -> Starlette:
    """The ASGI application.

    Args:
      failed: called where the service cannot be started.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running(failed):
            yield

    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/recommend", service.recommend, methods=["GET", "POST"]),
        Route("/items", service.items),
    ]
    known = listing(route.path for route in routes)

    async def refused(request: Request, error: Exception) -> Response:
        """An error in its words, with its status."""
        if isinstance(error, HTTPException):
            status, text = error.status_code, str(error.detail)
            if status == 404:
                text = f"no such address; there are: {known}"
            elif status == 405:
                text = f"{request.method} is not answered here; GET is, and POST by /recommend"
            return _Json({"error": text}, status, headers=error.headers)
        if isinstance(error, QueueFullError):
            return _Json({"error": str(error)}, 503, headers={"Retry-After": "1"})
        if isinstance(error, RequestError):
            headers = {"Retry-After": "1"} if error.status == 503 else None
            return _Json({"error": str(error)}, error.status, headers=headers)
        text = str(error) if isinstance(error, UserError) else "a defect of the server; see its log"
        return _Json({"error": text}, 500)

    handlers = dict.fromkeys((HTTPException, UserError, Exception), refused)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      ConfigError: the address cannot be had.
    """
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except (OSError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at --host={host} --port={port}: {why}; choose another --port (0: any "
            "free one) or an address of this machine"
        ) from error
    return listening


class _Server(uvicorn.Server):
    """uvicorn's server, which ends without an error when a signal stops it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        stops = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in stops}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(run: TrainedRun, config: ServeConfig, listening: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT; requests under way are finished, for up to `STOP_SECONDS`.

    Args:
      listening: of `listen`; closed at the end.

    Raises:
      NonFiniteError: the run gives a score that is NaN or infinite.
    """
    service = Service(run, config)

    def stop() -> None:
        server.should_exit = True

    settings = uvicorn.Config(
        make_app(service, stop),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    server = _Server(settings)
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    LOGGER.info("serving %s at %s; a page to try it is there", run.workdir, address)
    if host in ("127.0.0.1", "::1"):
        LOGGER.info("reached from this machine only; no authentication; Ctrl-C stops it")
    else:
        LOGGER.warning("--host=%s: other machines reach it, and it asks nobody who they are", host)
    with listening:
        server.run(sockets=[listening])
    if service.failure is not None:
        raise service.failure
    LOGGER.info("stopped")


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > http_requests.MOST_BYTES:
            raise RequestError(413, f"the body is over {http_requests.MOST_BYTES} bytes")
    return body


def _titles(run: TrainedRun) -> pa.Array | None:
    """[I] titles; None where the dataset has none."""
    columns = run.dataset.items.column_names
    if "title" not in columns:
        return None
    titles = run.dataset.items.column("title").combine_chunks()
    return None if titles.null_count == len(titles) else titles


def _named(ids: Sequence[str]) -> str:
    return listing(map(repr, ids), limit=3)
