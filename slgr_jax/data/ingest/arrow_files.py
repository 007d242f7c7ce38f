"""Parquet and Arrow files, alone, in folders, and as Hugging Face `datasets` saves them."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa

from slgr_jax.data import shards
from slgr_jax.data.ingest.archive import Files, reading
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.columns import SPLIT_NAMES
from slgr_jax.data.ingest.delimited import FileRows, pick
from slgr_jax.errors import InputError, ShardError, listing

ENDINGS = (".parquet", ".arrow", ".feather", ".ipc")
# What `datasets.save_to_disk` writes beside the data: of one table, and of several splits.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PARTS = ("train", "valid", "test")
# Names of a part, as the Hugging Face hub writes them: train-00000-of-00002.parquet.
_PART_NAME = re.compile(rf"^({'|'.join(SPLIT_NAMES)})(-\d+-of-\d+)?$")


def is_arrow(head: bytes) -> bool:
    """Whether a file begins as Parquet or Arrow, by its first eight bytes."""
    return head[:4] in (b"PAR1", b"\xff\xff\xff\xff") or head[:6] == b"ARROW1"


def parts_of(files: Files) -> dict[str | None, list[str]]:
    """The Parquet and Arrow files of an input by the part that they hold; None: a rule decides.

    A folder with dataset_dict.json holds the splits that it names; one with state.json the
    files that it names. In any other folder files are parts where their names or folders say
    train and test (train-00000-of-00001.parquet, test/0.parquet).

    Raises:
      InputError: no such files; a split of another name; or some files are parts and some not.
    """
    if files.single is not None:
        return {None: [files.single]}
    if files.path.is_file():
        raise InputError(f"{files.path} is a zip archive; unpack it for --source=parquet")
    if _SPLITS in files.names:
        splits = _strings(_json_object(files, _SPLITS).get("splits"), files.where(_SPLITS))
        return _as_parts(files, {name: _saved(files, f"{name}/") for name in splits})
    if _STATE in files.names:
        return {None: _saved(files, "")}

    names = [name for name in files.names if name.endswith(ENDINGS)]
    if not names:
        raise InputError(f"{files.path} holds no file ending in {listing(ENDINGS)}")
    by_name: dict[str | None, list[str]] = {}
    for name in names:
        by_name.setdefault(_part_in(name), []).append(name)
    if len(by_name) < 2 or not {"train", "test"} & set(by_name):
        return {None: names}
    if None in by_name:
        raise InputError(
            f"{files.path} holds files of parts ({listing(n for n in by_name if n)}) and others "
            f"({listing(by_name[None], 3)}); take the others out, or name one file"
        )
    return _as_parts(files, {str(name): held for name, held in by_name.items()})


def _part_in(name: str) -> str | None:
    for piece in pathlib.PurePosixPath(name).parts:
        if match := _PART_NAME.match(piece.split(".")[0].lower()):
            return match.group(1)
    return None


def _as_parts(files: Files, splits: Mapping[str, list[str]]) -> dict[str | None, list[str]]:
    parts: dict[str | None, list[str]] = {}
    for name, held in splits.items():
        code = SPLIT_NAMES.get(name.lower(), len(_PARTS))
        if code >= len(_PARTS):
            raise InputError(
                f"{files.path} holds a split {name!r}; it may hold {listing(SPLIT_NAMES)}: name "
                "the folders of those that are meant (--input, --test_input, --valid_input)"
            )
        parts.setdefault(_PARTS[code], []).extend(held)
    if len(parts) == 1:
        return {None: next(iter(parts.values()))}
    if missing := [part for part in ("train", "test") if part not in parts]:
        raise InputError(
            f"{files.path} holds the splits {listing(splits)} and none for {listing(missing)}; "
            "name one of their folders or files as --input to split it anew"
        )
    return parts


def _saved(files: Files, folder: str) -> list[str]:
    """The files that a state.json names, in its order."""
    state = folder + _STATE
    if state not in files.names:
        names = [n for n in files.names if n.startswith(folder) and n.endswith(ENDINGS)]
        if not names:
            raise InputError(f"{files.where(folder)} holds neither {_STATE} nor data")
        return names
    entries = _json_object(files, state).get("_data_files")
    file_names = [e.get("filename") if isinstance(e, dict) else e for e in _list(entries)]
    names = [folder + name for name in _strings(file_names, files.where(state))]
    if missing := [name for name in names if name not in files.names]:
        raise InputError(f"{files.where(state)} names {listing(missing)}, which is missing")
    if not names:
        raise InputError(f"{files.where(state)} names no data files")
    return names


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _strings(values: object, where: str) -> list[str]:
    names = [value for value in _list(values) if isinstance(value, str)]
    if not isinstance(values, list) or len(names) < len(values):
        raise InputError(f"{where} is damaged: {json.dumps(values)[:80]} is no list of names")
    return names


def _json_object(files: Files, name: str) -> Mapping[str, object]:
    try:
        value = json.loads(files.text(name)[0])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{files.where(name)} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{files.where(name)} is not an object")
    return value


def read(
    files: Files, names: Sequence[str], wanted: Mapping[str, str], *, required: Collection[str]
) -> tuple[dict[str, str], FileRows]:
    """Role -> column name, and the columns, of some files of one layout.

    Raises:
      InputError: a file is empty, damaged, lacks a column or has other columns than the first.
    """
    tables: list[pa.Table] = []
    chosen: dict[str, str] = {}
    count = LineCount(files.where(names[0]) if len(names) == 1 else str(files.path))
    for name in names:
        where, path = files.where(name), files.path_of(name)
        files.open(name).close()
        if path.stat().st_size == 0:
            raise InputError(f"{where} is empty")
        with reading(where):
            try:
                present = shards.column_names(path)
                selected = pick(present, wanted, where, required=required)
                table = shards.read_table(path, columns=list(dict.fromkeys(selected.values())))
            except ShardError as error:
                raise InputError(str(error)) from error
        if tables and selected != chosen:
            raise InputError(
                f"{where} has the columns {listing(selected.values())}, the files before it "
                f"{listing(chosen.values())}; make them alike"
            )
        chosen = selected
        tables.append(table)
    with reading(str(files.path)):
        whole = pa.concat_tables(tables, promote_options="permissive")
    count.lines = count.rows = whole.num_rows
    return chosen, FileRows({role: whole.column(name) for role, name in chosen.items()}, count)
