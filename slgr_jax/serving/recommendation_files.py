"""Recommendations to a file: Parquet, CSV or JSON lines by its ending, a block of users at a time.

Long form, a row a listed item: user, item (ids), rank (from 1), score (a logit); users in the
order they were asked for, items best first. The file appears when it is whole. Memory does not
grow with the users: 2^20 rows are held, or those of one batch, and 4 bytes a user.

The processes of a job rank together, each the users of its devices where these are split, and the
first of them writes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from slgr_jax import cluster, progress
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.evaluation.ranking_metrics import TopItems
from slgr_jax.files import atomically
from slgr_jax.serving import blocks, id_files
from slgr_jax.serving.recommender import ItemFilter, Recommender
from slgr_jax.training import agreement

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

PathLike = str | os.PathLike[str]
ROWS = 1 << 20  # of a block
BATCH = 1024  # most users that are listed at once
SCHEMA = pa.schema(
    [("user", pa.string()), ("item", pa.string()), ("rank", pa.int32()), ("score", pa.float32())]
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to recommend to whom, in files and flags of `slgr recommend`.

    Attributes:
      users: a file, `all`, or ids separated by commas.
      allow, deny: files of item ids, or of (user, item); empty for none.
      unknown: ids that the run does not know: refuse, or skip.
      user_column, item_column: names of columns in CSV and Parquet files; empty: user, item.
    """

    users: str
    k: int = 10
    mask_seen: bool = True
    allow: str = ""
    deny: str = ""
    unknown: str = "refuse"
    user_column: str = ""
    item_column: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a request.

    Attributes:
      users: who were asked for and are known.
      rows: of the file.
      short: users with fewer than `k` rows, those without any among them.
      skipped: kind (user, repeated user, item, ...) -> how many were left out of the request.
    """

    path: pathlib.Path
    k: int
    users: int
    rows: int
    short: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        text = f"wrote {self.path}: {self.users:,} users, {self.rows:,} rows"
        if self.short:
            text += f"; {self.short:,} of them have fewer than {self.k} items left"
        skipped = [
            f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in self.skipped.items() if count
        ]
        return text + (f"; left out: {listing(skipped)}" if skipped else "")


def recommend(run: TrainedRun, request: Request, out: PathLike) -> Written:
    """Answer a request in the file `out`, which is replaced where it is there (`check_out`).

    Raises:
      ConfigError: a flag that does nothing, or a value out of its range.
      InputError: a file that cannot be read, or an unknown id.
      NonFiniteError: a score is NaN or infinite.
    """
    path = pathlib.Path(out)
    reader = _RequestReader(run, request)
    users, items = cluster.together(reader.read)
    if cluster.processes() > 1:
        asked = {"--k": request.k, "--mask_seen": request.mask_seen}
        agreement.refuse_unequal({**asked, "ids in files": _digest(users, items)})

    batch = min(BATCH, 1 << max(users.size - 1, 0).bit_length())
    recommender = Recommender(
        run, request.k, mask_seen=request.mask_seen, items=items, batch_users=batch
    )
    rows, short = _write(recommender, users, request.k, path)
    return Written(path, request.k, users.size, rows, short, reader.skipped)


def _digest(users: np.ndarray, items: ItemFilter) -> str:
    """A hash of who is asked about and what they may get."""
    pairs = [x for csr in (items.only, items.denied) if csr for x in (csr.offsets, csr.indices)]
    arrays = [users, *pairs] if items.allowed is None else [users, *pairs, items.allowed]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def check_out(out: PathLike, *, overwrite: bool) -> None:
    """Refuse an `out` whose ending says no format, or that is there.

    Raises:
      ConfigError, InputError: it is refused.
    """
    path = pathlib.Path(out)
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out={path}: the ending says the format, one of: {listing(WRITERS)}")
    if path.is_dir():
        raise InputError(f"--out={path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"--out={path} exists; choose another path or add --overwrite")


class _RequestReader:
    """Turns a request's files and ids into indices, and counts what is left out.

    Attributes:
      skipped: as of `Written`.
    """

    def __init__(self, run: TrainedRun, request: Request) -> None:
        self.skipped: dict[str, int] = {}
        self._run, self._request = run, request
        self._names = {"user": request.user_column or "user", "item": request.item_column or "item"}
        self._read: set[str] = set()  # roles whose columns some file had

    def read(self) -> tuple[np.ndarray, ItemFilter]:
        """([n] users, which items they may get).

        Raises:
          ConfigError, InputError: as of `recommend`.
        """
        users, items = self._users(), self._items()
        self._check_columns_were_read()
        return users, items

    def _users(self) -> np.ndarray:
        """[n] int32 distinct users in the order they are asked for."""
        asked, known = self._request.users, self._run.dataset.user_ids
        if asked == "all":
            return np.arange(len(known), dtype=np.int32)
        if os.path.exists(asked):
            where = f"--users={asked}"
            ids = self._file(asked, {"user": self._names["user"]}, "user")["user"]
        else:
            ids = pa.array([part for part in asked.split(",") if part], pa.string())
            where = "--users"
            if not len(ids):
                raise ConfigError("--users names nobody; give a file, all, or ids: --users=u1,u2")
            if _looks_like_a_path(asked) and not pc.any(pc.is_in(ids, value_set=known)).as_py():
                raise InputError(
                    f"--users={asked} is not there, and no user's id; give a file, all, or ids: "
                    "--users=u1,u2"
                )

        index = self._indices(ids, known, "user", where)
        _, first = np.unique(index, return_index=True)
        self._skip("repeated user", index.size - first.size)
        return index[np.sort(first)]

    def _items(self) -> ItemFilter:
        """What --allow and --deny leave."""
        allowed, only = self._list("allow", self._request.allow)
        denied_everywhere, denied = self._list("deny", self._request.deny)
        if denied_everywhere is not None:
            allowed = ~denied_everywhere if allowed is None else allowed & ~denied_everywhere
        return ItemFilter(allowed, only, denied)

    def _check_columns_were_read(self) -> None:
        """Refuse a flag that named a column of no file, or that had nothing to do.

        Raises:
          ConfigError: there is one.
        """
        request = self._request
        for role, name in (("user", request.user_column), ("item", request.item_column)):
            if name and role not in self._read:
                raise ConfigError(
                    f"--{role}_column={name} names a column of no file: give one in CSV or "
                    "Parquet (text lines have no columns), or leave the flag out"
                )
        if request.unknown == "skip" and request.users == "all" and not self._files_of_items:
            raise ConfigError(
                "--unknown=skip has nothing to skip: --users=all names no ids, and there is "
                "neither --allow nor --deny"
            )

    @property
    def _files_of_items(self) -> bool:
        return bool(self._request.allow or self._request.deny)

    def _list(self, flag: str, path: str) -> tuple[np.ndarray | None, Csr | None]:
        """([I] bool of a file of items, None) or (None, [U] rows of a file of pairs)."""
        if not path:
            return None, None
        columns = self._file(path, self._names, "item")
        dataset, where = self._run.dataset, f"--{flag}={path}"
        items = self._indices(columns["item"], self._run.item_id_array, "item", where, keep=True)
        if "user" not in columns:
            listed = np.zeros(dataset.n_items, bool)
            listed[items[items >= 0]] = True
            return listed, None
        users = self._indices(columns["user"], dataset.user_ids, "user", where, keep=True)
        both = (items >= 0) & (users >= 0)
        return None, Csr.from_pairs(users[both], items[both], dataset.n_users)

    def _file(self, path: str, names: dict[str, str], required: str) -> dict[str, pa.Array]:
        read = id_files.read(path, names, required)
        if read.has_columns:
            self._read |= set(read.columns)
        return read.columns

    def _indices(
        self, ids: pa.Array, known: pa.Array, kind: str, where: str, *, keep: bool = False
    ) -> np.ndarray:
        """Indices of the known ids; with `keep`, also -1 for the others."""
        index = id_files.indices(ids, known, kind, where, unknown=self._request.unknown)
        unknown = index < 0
        self._skip(f"unknown {kind}", len(pc.unique(ids.filter(pa.array(unknown)))))
        return index if keep else index[~unknown]

    def _skip(self, kind: str, count: int) -> None:
        self.skipped[kind] = self.skipped.get(kind, 0) + count


def _looks_like_a_path(text: str) -> bool:
    endings = {*WRITERS, ".tsv", ".txt", ".arrow", ".feather"}
    return os.sep in text or pathlib.PurePath(text).suffix.lower() in endings


# ------------------------------------------------------------------------------- writing


class _TableWriter(Protocol):
    def write_table(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


def _write(
    recommender: Recommender, users: np.ndarray, k: int, path: pathlib.Path
) -> tuple[int, int]:
    """Write the lists of users: how many rows, and how many users with fewer than k of them."""
    size = max(ROWS // recommender.k, recommender.batch_users)
    rows = short = 0

    def listed(some: np.ndarray) -> tuple[np.ndarray, ...]:
        top = recommender.top(some)
        return top.items, top.scores

    def lists() -> Iterator[TopItems]:
        with progress.bar(users.size, "user"):  # ranking moves it
            for block, columns in blocks.in_order(recommender.run, users, size, listed, path):
                yield TopItems(users[block], *columns)

    def write(partial: pathlib.Path) -> None:
        nonlocal rows, short
        writer = WRITERS[path.suffix.lower()](partial)
        try:
            for top in lists():
                counts = (top.items >= 0).sum(axis=1)
                rows += int(counts.sum())
                short += int((counts < k).sum())
                writer.write_table(_long_table(recommender.run, top))
        finally:
            writer.close()

    if cluster.is_first():
        atomically(path, write)
    else:
        collections.deque(lists(), maxlen=0)
    rows, short = json.loads(cluster.first(json.dumps([rows, short])))
    return rows, short


def _long_table(run: TrainedRun, top: TopItems) -> pa.Table:
    """A row a listed item, of `SCHEMA`."""
    real = top.items >= 0
    ranks = np.broadcast_to(np.arange(1, real.shape[1] + 1, dtype=np.int32), real.shape)
    users = np.repeat(top.users, real.sum(axis=1))
    columns = [
        run.dataset.user_ids.take(pa.array(users)),
        run.item_id_array.take(pa.array(top.items[real])),
        pa.array(ranks[real]),
        pa.array(top.scores[real]),
    ]
    return pa.table(columns, schema=SCHEMA)


class _JsonLines:
    """One JSON object a row. Arrow writes none itself: the texts are joined column by column."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it

    def write_table(self, table: pa.Table) -> None:
        user, item = (_json_texts(table.column(name)) for name in ("user", "item"))
        rank, score = (table.column(name).cast(pa.string()) for name in ("rank", "score"))
        parts = ['{"user": ', user, ', "item": ', item, ', "rank": ', rank, ', "score": ', score]
        lines = pc.binary_join_element_wise(*parts, "}\n", "")
        for chunk in lines.chunks:
            self._file.write(b"".join(chunk.cast(pa.binary()).to_pylist()))

    def close(self) -> None:
        self._file.close()


def _json_texts(column: pa.ChunkedArray) -> pa.Array:
    """Each text as JSON has it, in quotes; one conversion a distinct text."""
    coded = column.combine_chunks().dictionary_encode()
    texts = [json.dumps(text, ensure_ascii=False) for text in coded.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(coded.indices)


def _csv_writer(path: pathlib.Path) -> _TableWriter:
    return pacsv.CSVWriter(path, SCHEMA)


def _parquet_writer(path: pathlib.Path) -> _TableWriter:
    return pq.ParquetWriter(path, SCHEMA)


WRITERS: dict[str, Callable[[pathlib.Path], _TableWriter]] = {
    ".parquet": _parquet_writer,
    ".csv": _csv_writer,
    ".jsonl": _JsonLines,
}
