"""One job of several processes: who takes part, what they agree on, what happens when one fails.

`start` joins the job; without one every function here is that of a job of one process, and costs
nothing. `session` is what runs between: in it `together` makes an error of one process the error of
all, and a process that is lost ends the others, with a message, for a scheduler to start them anew.

Imports no JAX.
"""

from slgr_jax.cluster.environment import Place, place
from slgr_jax.cluster.job import (
    EXIT_INTERRUPTED,
    every,
    first,
    is_first,
    leave,
    processes,
    say_first,
    session,
    start,
    together,
)

__all__ = [
    "EXIT_INTERRUPTED",
    "Place",
    "every",
    "first",
    "is_first",
    "leave",
    "place",
    "processes",
    "say_first",
    "session",
    "start",
    "together",
]
