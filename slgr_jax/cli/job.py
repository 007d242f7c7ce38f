"""Commands that several processes carry out together: how one of them ends when something fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from slgr_jax import cluster
from slgr_jax.cli import flags
from slgr_jax.errors import UserError


def guarded(work: Callable[[], None], lost: str) -> None:
    """`work`, where a process of a job that fails ends at once with its line and its status.

    Args:
      lost: what an interrupt from the keyboard leaves behind, for people.
    """
    try:
        work()
    except Exception as error:
        if cluster.processes() == 1:
            raise
        # JAX would wait at this process's end for others, which may be gone.
        if not isinstance(error, UserError):
            traceback.print_exc()
            cluster.leave("a defect, see above", 1)
        cluster.leave(str(error), flags.EXIT_USER_ERROR)
    except KeyboardInterrupt:
        if cluster.processes() == 1:
            raise
        cluster.leave(lost, flags.EXIT_KILLED)
