"""The Arrow schema and the manifest of DATA/examples/NAME: training rows, an LLM's reasoning."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import pyarrow as pa

from slgr_jax.data import manifest_json, schema
from slgr_jax.data.schema import ShardFile

EXAMPLES_DIR = "examples"
EXAMPLES_FORMAT = "slgr_jax.examples"


def examples(width: int) -> pa.Schema:
    """One row per training row, by user, `position` (how many training interactions of the user lie
    before it) and item; `label` is 1 where the data say clicked; `reasoning` has `width` numbers,
    and is not there where that is 0.
    """
    kinds = {"user": pa.int32(), "position": pa.int32(), "item": pa.int32(), "label": pa.int8()}
    reasoning = {"reasoning": pa.list_(pa.float32(), width)} if width else {}
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in {**kinds, **reasoning}.items()]
    )


@dataclasses.dataclass(frozen=True)
class ExampleManifest:
    """Which training rows, who reasoned about them, and which dataset they fit."""

    name: str
    created: str
    dataset: str
    id_map_hash: str
    split_hash: str
    built_from: str
    model: str
    prompt_hash: str
    width: int  # numbers of a reasoning; 0: rows and labels alone
    threshold: float  # label 1 from this rating on; 0: of an interaction
    counts: Mapping[str, int]  # rows, clicked, users, dropped_...
    files: Mapping[str, tuple[ShardFile, ...]]  # examples
    format: str = EXAMPLES_FORMAT
    version: int = schema.VERSION


def read_example_manifest(directory: str | os.PathLike[str]) -> ExampleManifest:
    """Read a manifest of examples; a missing, foreign or damaged one is a `ManifestError`."""
    raw = manifest_json.read(directory, ExampleManifest, "slgr teach examples")
    where = pathlib.Path(directory)
    return ExampleManifest(**schema.with_files(raw, ("examples",), where))
