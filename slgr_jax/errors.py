"""Errors a user can act on.

Each message is one line that names the thing, the numbers on both sides, the valid
choices and the fix. Launch scripts print the message and exit with status 2; anything
that is not a `UserError` is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, configuration or environment, with the fix in the message."""


class ConfigError(UserError):
    """A knob has a value it cannot have, or two knobs contradict each other."""


class InputError(UserError):
    """A raw file or a row in it cannot be used."""


class ShardError(UserError):
    """A shard is missing, truncated, corrupt or of another schema."""


class ManifestError(UserError):
    """A product was built for another split or id map, or has seen evaluation data."""


class NonFiniteError(UserError):
    """Training produced a NaN or an infinity."""


def printable(text: str) -> str:
    """`text` on one line: what a terminal would act on, and half characters, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listing(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c` with at most `limit` names, then how many were left out."""
    all_names = [printable(str(name)) for name in names]
    shown = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{shown}, ... ({rest} more)" if rest > 0 else shown or "(none)"
