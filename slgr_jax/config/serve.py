"""The knobs of the HTTP server: where it listens, how requests are joined, what one may ask for."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, Section, knob
from slgr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ServeConfig(Section):
    """Where the server listens, and its limits."""

    host: str = knob(
        "127.0.0.1",
        "address to listen at; the default is reached from this machine only. There is no "
        "authentication: anywhere else belongs behind a proxy that has it",
    )
    port: int = knob(8080, "port to listen at; 0 = any free one", minimum=0, maximum=65535)
    k: int = knob(10, "items a list where a request does not say", minimum=1, maximum=COUNT)
    max_k: int = knob(
        100,
        "most items of a list. Lists of this length are made, and cut to what is asked for",
        minimum=1,
        maximum=COUNT,
    )
    batch_users: int = knob(
        32, "most users that one run of the program lists for", minimum=1, maximum=COUNT
    )
    batch_new_users: int = knob(
        8, "most new users that are folded in together; a power of two", minimum=1, maximum=1024
    )
    batch_wait_ms: float = knob(
        2.0, "how long a request waits for others to join it, in ms", minimum=0, maximum=10_000
    )
    max_queue: int = knob(
        1000,
        "most users that wait for an answer; a request beyond is answered 503",
        minimum=1,
        maximum=COUNT,
    )
    max_users: int = knob(100, "most users of a request, known or new", minimum=1, maximum=COUNT)
    max_items: int = knob(128, "most items that a new user has", minimum=1, maximum=COUNT)
    max_filter: int = knob(10_000, "most items of allow and of deny", minimum=1, maximum=COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.max_k:
            raise ConfigError(
                f"--k={self.k} is over --max_k={self.max_k}; lower the one or raise the other"
            )
        if self.batch_new_users & (self.batch_new_users - 1):
            below = 1 << (self.batch_new_users.bit_length() - 1)
            raise ConfigError(
                f"--batch_new_users={self.batch_new_users} is no power of two; choose {below} or "
                f"{2 * below}"
            )
        if self.max_users > self.max_queue:
            raise ConfigError(
                f"--max_users={self.max_users} is over --max_queue={self.max_queue}: such a "
                "request would never be answered; lower the one or raise the other"
            )
