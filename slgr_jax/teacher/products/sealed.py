"""Manifests that carry a checksum of themselves: damage is named, whatever it makes of the JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import TypeVar

from slgr_jax.data import schema
from slgr_jax.errors import ManifestError, UserError

# What reading JSON of any shape as a manifest can lead to.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

Sealed = TypeVar("Sealed", schema.RequestManifest, schema.AnswerManifest)


def checksum(manifest: schema.AnyManifest) -> str:
    """SHA-256 of a manifest as JSON."""
    text = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(
    path: pathlib.Path,
    load: Callable[[pathlib.Path], Sealed],
    unsealed: Callable[[Sealed], tuple[Sealed, str]],
    fix: str,
) -> Sealed:
    """The manifest in the file `path`, whose checksum agrees.

    Args:
      path: the file; named in errors.
      load: reads the manifest of a directory.
      unsealed: the manifest as it was summed, and the checksum that it carries.
      fix: what to do where it is damaged.

    Raises:
      ManifestError: there is none, or it is damaged.
    """
    try:
        manifest = load(path.parent)
        summed, stated = unsealed(manifest)
        computed = checksum(summed)
    except UserError:
        raise
    except _DAMAGE as error:
        raise ManifestError(f"{path} is damaged ({str(error)[:80]}): {fix}") from error

    if computed != stated:
        raise ManifestError(
            f"{path} is damaged (its SHA-256 is {computed[:12]}, it states {stated[:12]}): {fix}"
        )
    return manifest
