"""Parquet and Arrow files, alone, in folders, and as Hugging Face `datasets` saves them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa

from slgr_jax import progress
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
    layout = _Layout.of(files, names, wanted, required)
    tables = list(layout.batches())
    whole = pa.concat_tables([layout.common.empty_table(), *tables])
    layout.count.lines = layout.count.rows = whole.num_rows
    return layout.chosen, FileRows(layout.roles(whole), layout.count)


def stream(
    files: Files, names: Sequence[str], wanted: Mapping[str, str], *, required: Collection[str]
) -> tuple[dict[str, str], tuple[LineCount, Iterator[FileRows]]]:
    """`read`, some rows at a time.

    Returns:
      Role -> column name; the lines so far, and the rows.
    """
    layout = _Layout.of(files, names, wanted, required)
    count = layout.count

    def batches() -> Iterator[FileRows]:
        for table in layout.batches():
            count.lines += table.num_rows
            count.rows += table.num_rows
            yield FileRows(layout.roles(table), count)

    return layout.chosen, (count, batches())


def rows_in(files: Files, names: Sequence[str]) -> int:
    """How many rows some files have; of Arrow streams about, which do not say it.

    Raises:
      InputError: a file is empty or damaged.
    """
    total = 0
    for name in names:
        with _refusing(files.where(name)):
            total += shards.rows_in(files.path_of(name))
    return total


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Files that are read as one table.

    Attributes:
      chosen: role -> column name.
      common: the columns that are read, of types that hold those of every file.
    """

    files: Files
    names: Sequence[str]
    chosen: dict[str, str]
    common: pa.Schema
    count: LineCount

    @classmethod
    def of(
        cls,
        files: Files,
        names: Sequence[str],
        wanted: Mapping[str, str],
        required: Collection[str],
    ) -> _Layout:
        """Look at the columns of all files."""
        layouts: list[pa.Schema] = []
        chosen: dict[str, str] = {}
        for name in names:
            where, path = files.where(name), files.path_of(name)
            files.open(name).close()
            with _refusing(where):
                layout = shards.schema_of(path)
                selected = pick(layout.names, wanted, where, required=required)
            if layouts and selected != chosen:
                raise InputError(
                    f"{where} has the columns {listing(selected.values())}, the files before it "
                    f"{listing(chosen.values())}; make them alike"
                )
            chosen = selected
            columns = dict.fromkeys(selected.values())
            layouts.append(pa.schema([layout.field(c).remove_metadata() for c in columns]))
        with reading(str(files.path)):
            common = pa.unify_schemas(layouts, promote_options="permissive")
        where = files.where(names[0]) if len(names) == 1 else str(files.path)
        return cls(files, names, chosen, common, LineCount(where))

    def batches(self) -> Iterator[pa.Table]:
        """The rows of all files; a bar says how far they have been read."""
        total = rows_in(self.files, self.names)
        with progress.bar(total, "row", label="read", scale=True) as bar:
            for name in self.names:
                tables = shards.stream_table(
                    self.files.path_of(name), columns=list(self.common.names)
                )
                while True:
                    with _refusing(self.files.where(name)):
                        table = next(tables, None)
                        if table is None:
                            break
                        table = table.cast(self.common)
                    bar.update(table.num_rows)
                    yield table

    def roles(self, table: pa.Table) -> dict[str, pa.ChunkedArray]:
        """Role -> column."""
        return {role: table.column(name) for role, name in self.chosen.items()}


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what a damaged file raises into an `InputError`."""
    with reading(where):
        try:
            yield
        except ShardError as error:
            raise InputError(str(error)) from error
