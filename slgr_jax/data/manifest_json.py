"""A manifest's JSON, checked against the fields of the dataclass that it becomes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from slgr_jax import json_files
from slgr_jax.errors import ManifestError, listing

MANIFEST = "manifest.json"
# Annotation of a manifest's field -> its type in JSON; a mapping is an object.
_JSON_TYPES: Mapping[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "tuple[str, ...]": list,
    "tuple[ShardFile, ...]": list,
    "tuple[Mapping[str, Any], ...]": list,
}


def read(
    directory: str | os.PathLike[str], kind: type, maker: str, *, file_name: str = MANIFEST
) -> dict[str, Any]:
    """The fields of a directory's manifest, as JSON has them.

    Args:
      kind: its dataclass, whose fields `format` and `version` have the values that it must have.
      maker: the command that makes it, for errors.

    Raises:
      ManifestError: it is missing, foreign, damaged, or of another version.
    """
    path = pathlib.Path(directory) / file_name
    if not path.parent.is_dir():
        raise ManifestError(f"{directory} is not a directory; make it with {maker}")
    if not path.is_file():
        raise ManifestError(
            f"{directory} holds no {file_name}: it is not a finished product; make it with {maker}"
        )
    try:
        raw = sealed = json_files.loads(path.read_bytes())
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}); make it again with {maker}") from error
    if isinstance(raw, dict):
        raw = {name: value for name, value in raw.items() if name != json_files.CHECKSUM}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    expected, version = fields["format"].default, fields["version"].default
    if not isinstance(raw, dict) or raw.get("format") != expected:
        stored = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ManifestError(f"{path} describes {stored!r}, expected {expected!r}")
    if raw.get("version") != version:
        raise ManifestError(
            f"{path} has version {raw.get('version')}, this code reads {version}; "
            f"make it again with {maker}"
        )
    no_default = dataclasses.MISSING
    needed = {
        name
        for name, field in fields.items()
        if field.default is no_default and field.default_factory is no_default
    }
    missing, unknown = sorted(needed - set(raw)), sorted(set(raw) - set(fields))
    if missing or unknown:
        raise ManifestError(
            f"{path}: missing {listing(missing)}; unknown {listing(unknown)}; "
            f"make it again with {maker}"
        )
    for name, field in fields.items():
        if name in raw and not isinstance(raw[name], _JSON_TYPES.get(str(field.type), dict)):
            raise ManifestError(
                f"{path} is damaged: {name} is {json.dumps(raw[name])[:80]}; "
                f"make it again with {maker}"
            )
    try:
        return json_files.unsealed(sealed)
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}); make it again with {maker}") from error
