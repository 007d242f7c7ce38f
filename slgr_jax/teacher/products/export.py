"""A product back to a file with external ids, as `slgr teach import` reads it.

Importing the file with what `command` says gives the same rows: scores and margins are written so
that they come back to the bit, and a row without an answer stays one.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from slgr_jax import files
from slgr_jax.data import schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.answers import RANK

PathLike = str | os.PathLike[str]


def export(
    dataset: Dataset, name: str, out: PathLike, *, overwrite: bool = False
) -> tuple[schema.TeacherManifest, pa.Table]:
    """Write the product DATA/teacher/NAME to the file `out`; its ending says the format.

    Columns: user, item, score (empty: not answered); or user, item, rank where the scores are
    ranks that were turned; or user, preferred, other, margin. Rows are by user.

    Returns:
      The product's manifest and the rows that were written.

    Raises:
      ConfigError: an ending that is no format.
      InputError: `out` exists and `overwrite` is not set, or an id cannot be written as CSV.
      ManifestError, ShardError: as `preferences.load`.
    """
    path = pathlib.Path(out)
    if path.suffix not in _WRITERS:
        raise ConfigError(f"--out={out} must end in one of: {listing(_WRITERS)}")
    if path.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another path or add --overwrite")
    stored, manifest = preferences.stored(dataset, name)
    table = _with_ids(stored, dataset, turned=is_ranked(manifest, stored))
    files.atomically(path, lambda partial: _WRITERS[path.suffix](table, partial))
    return manifest, table


def is_ranked(manifest: schema.TeacherManifest, stored: pa.Table) -> bool:
    """Whether the scores are ranks that an import turned: none is above 0."""
    if manifest.kind != "scores" or manifest.score_kind != RANK:
        return False
    return bool(pc.all(pc.less_equal(stored.column("score"), 0)).as_py())


def command(manifest: schema.TeacherManifest, table: pa.Table, out: PathLike, data: str) -> str:
    """The `slgr teach import` that makes the product of its exported rows again."""
    stated = {
        "built_from": manifest.built_from,
        "unlisted": manifest.unlisted,
        "training_items": manifest.training_items,
        "model": manifest.model,
        "prompt_hash": manifest.prompt_hash,
        # Ranks turn themselves, by the name of their column; averaged places are none.
        "score_kind": "" if manifest.score_kind == RANK else manifest.score_kind,
    }
    if manifest.kind == "preferences" and manifest.score_kind == RANK:
        stated["score_kind"] = RANK
    flags = [f"--{name}={value}" for name, value in stated.items() if value]
    if manifest.training_items != "hidden" and manifest.counts.get("train_pairs", 0):
        flags.append("--keep_training_items")
    words = ["slgr", "teach", "import", f"--data={data}", f"--name={manifest.name}"]
    return shlex.join([*words, f"--scores={os.fspath(out)}", *flags])


def _with_ids(stored: pa.Table, dataset: Dataset, *, turned: bool) -> pa.Table:
    """Indices as external ids; turned scores as the ranks that they were."""
    item_ids = dataset.items.column("item_id").combine_chunks()
    columns: dict[str, pa.ChunkedArray] = {}
    for name in stored.column_names:
        column = stored.column(name)
        if name in ("score", "margin"):
            columns["rank" if turned else name] = pc.negate(column) if turned else column
        else:
            ids = dataset.user_ids if name == "user" else item_ids
            columns[name] = pc.take(ids, column)
    return pa.table(columns)


def _write_csv(table: pa.Table, path: pathlib.Path) -> None:
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_string(column.type):
            broken = pc.fill_null(pc.match_substring_regex(column, "[\r\n]"), False)
            if pc.any(broken).as_py():
                example = column.filter(broken)[0].as_py()
                raise InputError(
                    f"{name} id {example!r} has a line break, which a CSV file of answers cannot "
                    "hold; export to .parquet or .jsonl"
                )
    pacsv.write_csv(table, path)


def _write_json_lines(table: pa.Table, path: pathlib.Path) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for batch in table.to_batches(max_chunksize=65_536):
            # float32 as float64: every digit comes back.
            rows = [
                column.to_numpy(zero_copy_only=False).astype(np.float64).tolist()
                if pa.types.is_floating(column.type)
                else column.to_pylist()
                for column in batch.columns
            ]
            for values in zip(*rows, strict=True):
                row = {
                    key: None if value != value else value
                    for key, value in zip(batch.schema.names, values, strict=True)
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


_WRITERS: Mapping[str, Callable[[pa.Table, pathlib.Path], object]] = {
    ".csv": _write_csv,
    ".parquet": pq.write_table,
    ".jsonl": _write_json_lines,
}
