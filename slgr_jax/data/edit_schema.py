"""The Arrow schema and the manifest of DATA/edits/NAME: training interactions taken for noise."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import pyarrow as pa

from slgr_jax.data import manifest_json, schema
from slgr_jax.data.schema import ShardFile

EDITS_DIR = "edits"
EDITS_FORMAT = "slgr_jax.edits"

# One row per training interaction, by user and `position` (its place among the user's training
# interactions, 0 the oldest); `item` is what training has there, `noise` the probability that it is
# noise, and a null `replacement` means that none was named.
EDITS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("noise", pa.float32(), nullable=False),
        pa.field("replacement", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class EditManifest:
    """What is said of training interactions, by whom, and which dataset it fits."""

    name: str
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    built_from: str
    model: str
    prompt_hash: str
    counts: Mapping[str, int]  # rows, users, replacements, dropped_...
    files: Mapping[str, tuple[ShardFile, ...]]  # edits
    format: str = EDITS_FORMAT
    version: int = schema.VERSION


def read_edit_manifest(directory: str | os.PathLike[str]) -> EditManifest:
    """Read a manifest of edits; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, EditManifest, "slgr teach import --edits")
    where = pathlib.Path(directory)
    return EditManifest(**schema.with_files(raw, ("edits",), where))
