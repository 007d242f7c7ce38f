"""What the processes of a job tell each other besides numbers: lines of JSON over TCP.

Process 0 listens at the coordinator's address, each other process keeps one connection to it.

    hello     i -> 0   which process, of how many
    go        0 -> i   all have come; where JAX's own coordinator listens
    text      i -> 0   one process's part of a gather; `all` is 0's answer, every part in order
    failed    i -> 0   a line for all to end with; 0 passes the first one on
    lost      0 -> i   a process went without a word
    beat      both     nothing new

JAX itself notices a lost process, and aborts the others with a stack trace after its own time-out;
one that never came, in the same way. Here a connection that closes, or is silent for `heartbeat_s`,
says which process it was, and ends the job with a status of which a scheduler knows what it means.
There is no authentication, as in JAX's coordinator: the port belongs on a cluster's own network.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from slgr_jax.cluster.environment import Place
from slgr_jax.errors import ConfigError, UserError, listing

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 75
# How long a process may take from hearing that the job failed to saying so itself.
GRACE_S = 5.0
_HELLO_S, _RETRY_S = 5.0, 0.1
Message = dict[str, Any]


class Wire:
    """A connection: messages, each a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file = connection, connection.makefile("rb")
        self._turn = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises: OSError, where the other end is gone."""
        with self._turn:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> Message:
        """The next message.

        Raises:
          OSError: the other end closed the connection, or was silent for so long.
          ValueError: it speaks another language.
        """
        self._socket.settimeout(timeout_s)
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("its connection closed")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def close(self) -> None:
        """Say no more; the other end is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()


def leave(line: str, status: int) -> NoReturn:
    """End the process with a line, from any thread, whatever the others wait for."""
    sys.stdout.flush()
    print("error: " + " ".join(line.split()), file=sys.stderr, flush=True)
    os._exit(status)


# ----------------------------------------------------------------------------------- meeting


def meet(place: Place, timeout_s: float) -> tuple[dict[int, Wire], str]:
    """Wait until all processes of a job have come.

    Returns:
      The connections: process 0's to all others, theirs to process 0; where JAX's coordinator is
      to listen.

    Raises:
      ConfigError: one did not come in time, two say that they are the same, the port is taken.
    """
    return _await_others(place, timeout_s) if place.process_id == 0 else _go_to_0(place, timeout_s)


def _await_others(place: Place, timeout_s: float) -> tuple[dict[int, Wire], str]:
    host, port = place.address
    deadline, wires = time.monotonic() + timeout_s, dict[int, Wire]()
    try:
        server = _listen(port)
    except OSError as error:
        raise ConfigError(
            f"--coordinator={place.coordinator}: process 0 cannot listen there "
            f"({error.strerror}); choose another port"
        ) from error
    try:
        with server:
            while len(wires) < place.processes - 1:
                _let_in(server, place, wires, deadline, timeout_s)
        jax_address = f"{host}:{_free_port()}"
        for wire in wires.values():
            wire.send({"go": jax_address})
    except (ConfigError, OSError) as error:
        for wire in wires.values():
            with contextlib.suppress(OSError):
                wire.send({"failed": str(error)})
            wire.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"a process of the job left while the others came: {error}") from error
    return wires, jax_address


def _let_in(
    server: socket.socket, place: Place, wires: dict[int, Wire], deadline: float, timeout_s: float
) -> None:
    """Accept one connection; what does not speak as a process of a job is let go."""
    server.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        connection, _ = server.accept()
    except TimeoutError:
        absent = [i for i in range(1, place.processes) if i not in wires]
        raise ConfigError(
            f"of {place.processes} processes {listing(map(str, absent))} did not come to "
            f"{place.coordinator} within {timeout_s:g} s; see what they say, and whether they "
            "reach that address (--start_timeout_s)"
        ) from None
    connection.settimeout(_HELLO_S)
    wire = Wire(connection)
    try:
        hello = wire.receive(_HELLO_S)
        process, processes = int(hello["process"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        wire.close()
        return
    if processes != place.processes:
        line = (
            f"process {process} was started with --processes={processes}, process 0 with "
            f"--processes={place.processes}; give all the same"
        )
    elif process == 0 or process in wires:
        line = f"two processes say that they are process {process}; give each its --process_id"
    else:
        wires[process] = wire
        return
    with contextlib.suppress(OSError):
        wire.send({"failed": line})
    wire.close()
    raise ConfigError(line)


def _go_to_0(place: Place, timeout_s: float) -> tuple[dict[int, Wire], str]:
    deadline, reason = time.monotonic() + timeout_s, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            wire = Wire(socket.create_connection(place.address, timeout=min(left, _HELLO_S)))
        except OSError as error:  # it does not listen yet
            reason = str(error)
            time.sleep(_RETRY_S)
            continue
        try:
            wire.send({"process": place.process_id, "processes": place.processes})
            # Process 0 began to wait later than this one, at worst; it will say who is absent.
            answer = wire.receive(timeout_s + _HELLO_S)
        except (OSError, ValueError) as error:  # another server, or process 0 of a job before
            wire.close()
            reason = str(error)
            time.sleep(_RETRY_S)
            continue
        if "failed" in answer:
            wire.close()
            raise ConfigError(str(answer["failed"]))
        return {0: wire}, str(answer["go"])
    raise ConfigError(
        f"process {place.process_id} of {place.processes} found no process 0 at "
        f"{place.coordinator} within {timeout_s:g} s ({reason}); see what that one says, and "
        "whether this one reaches the address (--start_timeout_s)"
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _free_port() -> int:
    with _listen(0) as server:
        return int(server.getsockname()[1])


# ----------------------------------------------------------------------------------- at work


class Channel:
    """The connections of one process at work.

    Args:
      wires: as of `meet`.
      heartbeat_s: silence after which a process counts as lost.
    """

    def __init__(self, place: Place, wires: Mapping[int, Wire], heartbeat_s: float) -> None:
        self.place, self._wires, self._heartbeat_s = place, dict(wires), heartbeat_s
        self._changed = threading.Condition()
        self._number = 0
        self._parts: dict[int, dict[int, str]] = {}  # of process 0: of each gather, by process
        self._gathered: dict[int, list[str]] = {}
        self.failure: str | None = None  # what the job ends with
        self._failure_raised = False
        self._working, self._lost = False, ""
        self._names = [f"process {process}" for process in range(place.processes)]
        self._listening = [
            threading.Thread(target=self._listen_to, args=(process,), daemon=True)
            for process in self._wires
        ]
        for thread in self._listening:
            thread.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def name(self, names: Sequence[str]) -> None:
        """Say what messages are to call the processes."""
        self._names = list(names)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within, a process that is lost ends this one."""
        with self._changed:
            before, self._working = self._working, True
        if self._lost:
            self.leave(self._lost, EXIT_INTERRUPTED)
        try:
            yield
        finally:
            with self._changed:
                self._working = before

    def gather(self, text: str) -> list[str]:
        """Every process's text, in order; each waits for all.

        Raises:
          UserError: one said that it failed.
        """
        with self._changed:
            number, self._number = self._number, self._number + 1
        if self.place.process_id == 0:
            self._put(number, 0, text)
        else:
            self._send(0, {"text": text, "number": number})
        with self._changed:
            self._changed.wait_for(lambda: number in self._gathered or self.failure is not None)
            if number in self._gathered:
                return self._gathered.pop(number)
        self.raise_failure()

    def fail(self, line: str) -> NoReturn:
        """Have every process end with a line: this one, unless another failed before.

        Raises:
          UserError: with the line.
        """
        if self.place.process_id == 0:
            self._fail_all(line)
        else:
            self._send(0, {"failed": line})
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None)
        self.raise_failure()

    def raise_failure(self) -> NoReturn:
        """Raise what the job ends with."""
        assert self.failure is not None
        self._failure_raised = True
        raise UserError(self.failure)

    def leave(self, line: str, status: int) -> NoReturn:
        """End the process with a line; the first one, which JAX needs, after the others."""
        if self.place.process_id == 0:
            limit = time.monotonic() + GRACE_S + 1
            for thread in self._listening:
                if thread is not threading.current_thread():
                    thread.join(max(limit - time.monotonic(), 0))
        leave(line, status)

    def close(self) -> None:
        """Leave; the others are told that this process is lost."""
        for wire in self._wires.values():
            wire.close()

    def _put(self, number: int, process: int, text: str) -> None:
        """Process 0: a part of a gather has come; the last one completes it."""
        with self._changed:
            parts = self._parts.setdefault(number, {})
            parts[process] = text
            if len(parts) < self.place.processes:
                return
            del self._parts[number]
            texts = [parts[at] for at in range(self.place.processes)]
        for other in self._wires:
            self._send(other, {"all": texts, "number": number})
        with self._changed:
            self._gathered[number] = texts
            self._changed.notify_all()

    def _fail_all(self, line: str) -> None:
        """Process 0: pass the first failure on."""
        if self._heard_failure(line):
            for other in self._wires:
                self._send(other, {"failed": line})

    def _heard_failure(self, line: str) -> bool:
        """End the job with a line; False where it ends with another already."""
        with self._changed:
            if self.failure is not None:
                return False
            self.failure = line
            self._changed.notify_all()

        # The main thread may wait for a process that failed, inside a collective: for ever.
        def end() -> None:
            if not self._failure_raised:
                self.leave(line, EXIT_USER_ERROR)

        timer = threading.Timer(GRACE_S, end)
        timer.daemon = True
        timer.start()
        return True

    def _send(self, process: int, message: Message) -> None:
        with contextlib.suppress(OSError):  # the thread that listens to it says so
            self._wires[process].send(message)

    def _beat(self) -> None:
        while True:
            time.sleep(self._heartbeat_s / 4)
            for process in self._wires:
                self._send(process, {"beat": 1})

    def _listen_to(self, process: int) -> None:
        try:
            while True:
                self._hear(process, self._wires[process].receive(self._heartbeat_s))
        except TimeoutError:
            self._lose(process, f"was not heard of for {self._heartbeat_s:g} s")
        except (OSError, ValueError):
            self._lose(process, "ended without a word")

    def _hear(self, process: int, message: Message) -> None:
        if "text" in message:
            self._put(message["number"], process, message["text"])
        elif "all" in message:
            with self._changed:
                self._gathered[message["number"]] = message["all"]
                self._changed.notify_all()
        elif "failed" in message:
            if self.place.process_id == 0:
                self._fail_all(message["failed"])
            else:
                self._heard_failure(message["failed"])
        elif "lost" in message:
            self._leave(message["lost"])

    def _lose(self, process: int, how: str) -> None:
        line = (
            f"{self._names[process]} {how}; the last checkpoint is kept, and the same command goes "
            "on from it, also with other --processes"
        )
        if self.failure is None:
            for other in self._wires:
                if other != process:
                    self._send(other, {"lost": line})
            self._leave(line)

    def _leave(self, line: str) -> None:
        with self._changed:
            self._lost = line
            working = self._working
        if working:
            self.leave(line, EXIT_INTERRUPTED)
