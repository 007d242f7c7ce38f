"""JSON of ours, read back: any damage is a ValueError, and text may carry its own checksum.

Standard library only: every other package may use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is none: also what Python words otherwise, as brackets 50,000 deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)[:100]) from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the SHA-256 of the rest of it."""
    return {**values, CHECKSUM: _sha256(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object that `sealed` was given; one without a checksum, of an earlier version, as it is.

    Raises:
      ValueError: it is not what was summed.
    """
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM not in values:
        return rest
    # The first answer logs summed an empty checksum too; what they hold was paid for.
    computed, stated = _sha256(rest), values[CHECKSUM]
    if stated not in (computed, _sha256({**rest, CHECKSUM: ""})):
        raise ValueError(f"its SHA-256 is {computed[:12]}, it states {str(stated)[:12]!a}")
    return rest


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
