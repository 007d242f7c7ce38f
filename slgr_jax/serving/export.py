"""A trained run as files that other programs read: vectors, an index of them, the scorer.

    DIR/manifest.json            what the files hold, how to score, their checksums
    DIR/users.parquet, items.parquet            columns user or item (id) and vector; or
    DIR/users.npy, items.npy; or vectors.safetensors with tensors `users` and `items`
    DIR/user_ids.json, item_ids.json            ids of rows and indices, if not in Parquet alone
    DIR/items.usearch            a top-K inner product index; keys are rows of the items
    DIR/scorer/{scores,top_k}.stablehlo, weights.npz            see `stablehlo`

The directory appears when it is whole. Vectors are made and written a block at a time. The
processes of a job make them together, each with its part of what is split, and the first of them
writes; an index and the scorer, which take whole tables, are left to one process.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax import __version__, cluster, progress
from slgr_jax.data import shards
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ConfigError, listing
from slgr_jax.files import write_atomically
from slgr_jax.serving import ann_index, blocks
from slgr_jax.serving.ann_index import INSTALL

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

PathLike = str | os.PathLike[str]
FORMATS = ("parquet", "npy", "safetensors", "none")
_BLOCK = 1 << 16  # vectors that are written at once; of Parquet a row group
_FLOAT = np.dtype("<f4")
_Vectors = Mapping[str, Iterator[np.ndarray]]  # user, item -> blocks of their vectors


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
      format: of the vectors: parquet, npy, safetensors; none for no vectors.
      index: of the item vectors: none, or usearch.
      scorer: whether to write the scorer.
      k: length of the scorer's lists, and of those by which the index is judged; None: 10.
    """

    format: str = "parquet"
    index: str = "none"
    scorer: bool = False
    k: int | None = None

    def check(self) -> None:
        """Refuse what cannot be exported, and what does nothing.

        Raises:
          ConfigError: there is such a thing.
        """
        for name, value, choices in (
            ("format", self.format, FORMATS),
            ("index", self.index, ann_index.INDEXES),
        ):
            if value not in choices:
                raise ConfigError(f"--{name}={value!r} is not one of: {listing(choices)}")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"--k={self.k}; it must be at least 1")
        if self.format == "none" and self.index != "none":
            raise ConfigError(
                f"--index={self.index} is an index of vectors, which --format=none leaves out; "
                "give --format=parquet, npy or safetensors"
            )
        if self.format == "none" and not self.scorer:
            raise ConfigError("--format=none without --scorer leaves nothing to export")
        if self.k is not None and self.index == "none" and not self.scorer:
            raise ConfigError(
                f"--k={self.k} is the length of lists, and vectors have none; add --scorer or "
                "--index=usearch, or leave it out"
            )

    def of_one_process(self) -> dict[str, str]:
        """What of the request one process does alone, and why (`agreement.refuse_in_a_job`)."""
        flags = {}
        if self.index != "none":
            flags[f"--index={self.index}"] = "is built from all items' vectors at once"
        if self.scorer:
            flags["--scorer"] = "is a file of whole tables"
        return flags


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export; `print` says what is in it.

    Attributes:
      manifest: as in the file.
    """

    path: pathlib.Path
    manifest: dict[str, Any]

    def __str__(self) -> str:
        parts, manifest = [], self.manifest
        if vectors := manifest.get("vectors"):
            parts.append(
                f"vectors of {manifest['users']:,} users and {manifest['items']:,} items, "
                f"{vectors['width']} wide, {vectors['dtype']}"
            )
        if index := manifest.get("index"):
            parts.append(
                f"an index ({index['library']}) with recall@{index['k']} {index['recall']:.3f} "
                f"against brute force over {index['users_compared']:,} users"
            )
        if scorer := manifest.get("scorer"):
            parts.append(
                f"the scorer ({', '.join(scorer['programs'])}; k = {scorer['k']}) for "
                f"{', '.join(scorer['platforms'])}"
            )
        return f"wrote {self.path}: " + "; ".join(parts)


def export(
    run: TrainedRun, request: ExportRequest, out: PathLike, *, overwrite: bool = False
) -> Exported:
    """Write what is asked for, as of the end of validation, to the directory `out`.

    Raises:
      ConfigError: a request that cannot be met, each with the fix.
      InputError: `out` is there already.
    """
    request.check()
    target, manifest = pathlib.Path(out), _about(run)
    if cluster.is_first():
        with shards.atomic_directory(target, overwrite=overwrite) as folder:
            manifest |= _write(folder, run, request, target)
            text = json.dumps(manifest, indent=2) + "\n"
            write_atomically(folder / MANIFEST, text, durable=True)
    else:
        for vectors in _vectors(run, target).values():
            collections.deque(vectors, maxlen=0)
    return Exported(target, json.loads(cluster.first(json.dumps(manifest))))


def _write(
    folder: pathlib.Path, run: TrainedRun, request: ExportRequest, out: pathlib.Path
) -> dict[str, Any]:
    """Write what is asked for; what the manifest says of it."""
    k = min(10 if request.k is None else request.k, run.dataset.n_items)
    written: dict[str, Any] = {}
    if request.format != "none":
        written["vectors"] = _write_vectors(folder, request.format, run, out)
        if request.index != "none":
            written["index"] = _write_index(folder, run, k)
    if request.scorer:
        written["scorer"] = _write_scorer(folder, run, k)
    if request.scorer or request.format != "parquet":
        written["ids"] = _write_ids(folder, run)
    written["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": shards.sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return written


def _about(run: TrainedRun) -> dict[str, Any]:
    """What of the manifest is the same for every export."""
    data = run.dataset
    return {
        "format": "slgr_jax.export",
        "version": 1,
        "slgr_jax": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone": run.config.model.backbone,
        "dataset": data.manifest.name,
        "split_hash": data.manifest.split_hash,
        "id_map_hash": data.manifest.id_map_hash,
        "users": data.n_users,
        "items": data.n_items,
        "moment": "the end of validation: training and validation are what is known of users",
    }


# ------------------------------------------------------------------------------- vectors


def _write_vectors(
    folder: pathlib.Path, kind: str, run: TrainedRun, out: pathlib.Path
) -> dict[str, Any]:
    """Write the vectors; what the manifest says of them."""
    with progress.bar(run.dataset.n_users, "user", label="vectors"):
        _WRITERS[kind](folder, run, _vectors(run, out))
    return {
        "format": kind,
        "width": run.run_vectors.width,
        "dtype": str(np.dtype(np.float32)),
        "score": "the inner product of a user's and an item's vector; biases are folded in, do "
        "not normalise",
        "rows": "in the order of the ids",
    }


def _vectors(run: TrainedRun, out: pathlib.Path) -> dict[str, Iterator[np.ndarray]]:
    """The vectors of users and of items, [n, E] block after block, in the order of their ids; to be
    taken in this order, by all processes of a job."""
    vectors = run.run_vectors
    everybody = np.arange(run.dataset.n_users, dtype=np.int32)
    items = np.arange(run.dataset.n_items, dtype=np.int32)
    of_users = blocks.in_order(run, everybody, _BLOCK, lambda some: (vectors.of_users(some),), out)
    return {
        "user": (rows for _, (rows,) in of_users),
        "item": (
            vectors.of_items(items[begin : begin + _BLOCK])
            for begin in range(0, items.size, _BLOCK)
        ),
    }


def _write_parquet(folder: pathlib.Path, run: TrainedRun, vectors: _Vectors) -> None:
    kind = pa.list_(pa.float32(), run.run_vectors.width)
    for name, ids in (("user", run.dataset.user_ids), ("item", run.item_id_array)):
        schema, begin = pa.schema([(name, pa.string()), ("vector", kind)]), 0
        with pq.ParquetWriter(folder / f"{name}s.parquet", schema) as writer:
            for rows in vectors[name]:
                lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
                part = [ids.slice(begin, len(rows)), lists]
                writer.write_table(pa.table(part, schema=schema))
                begin += len(rows)


def _write_npy(folder: pathlib.Path, run: TrainedRun, vectors: _Vectors) -> None:
    for name, shape in _shapes(run).items():
        with open(folder / f"{name}s.npy", "wb") as file:
            about = {"descr": _FLOAT.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            for rows in vectors[name]:
                rows.astype(_FLOAT, copy=False).tofile(file)


def _write_safetensors(folder: pathlib.Path, run: TrainedRun, vectors: _Vectors) -> None:
    """The bytes of a JSON header in 8 bytes, the header, the tensors one after the other. The
    format's own library would take all vectors at once."""
    header, end = {}, 0
    for name, shape in _shapes(run).items():
        begin, end = end, end + math.prod(shape) * _FLOAT.itemsize
        header[f"{name}s"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of their items' size
    with open(folder / "vectors.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _shapes(run):
            for rows in vectors[name]:
                rows.astype(_FLOAT, copy=False).tofile(file)


def _shapes(run: TrainedRun) -> dict[str, tuple[int, int]]:
    """Of the vectors of users and items, in the order in which they are made."""
    width = run.run_vectors.width
    return {"user": (run.dataset.n_users, width), "item": (run.dataset.n_items, width)}


_WRITERS: dict[str, Callable[[pathlib.Path, TrainedRun, _Vectors], None]] = {
    "parquet": _write_parquet,
    "npy": _write_npy,
    "safetensors": _write_safetensors,
}


def _write_ids(folder: pathlib.Path, run: TrainedRun) -> dict[str, str]:
    """Write the ids as JSON lists, which hold any text exactly."""
    files = {"users": "user_ids.json", "items": "item_ids.json"}
    for name, ids in (("users", run.dataset.user_ids), ("items", run.item_id_array)):
        text = json.dumps(ids.to_pylist(), ensure_ascii=False)
        (folder / files[name]).write_text(text, encoding="utf-8")
    return files


# ------------------------------------------------------------------------ index and scorer


def _write_index(folder: pathlib.Path, run: TrainedRun, k: int) -> dict[str, Any]:
    items = run.run_vectors.of_items(np.arange(run.dataset.n_items, dtype=np.int32))
    index = ann_index.build(items)
    ann_index.save(index, folder / "items.usearch")
    asked = run.run_vectors.of_users(ann_index.sample(run.dataset.n_users))
    share, users = ann_index.recall(index, asked, items, k)
    return {
        "library": "usearch",
        "file": "items.usearch",
        "metric": "ip: a distance is 1 - score",
        "keys": "item indices, from 0, in the order of the ids",
        "k": k,
        "recall": share,
        "users_compared": users,
    }


def _write_scorer(folder: pathlib.Path, run: TrainedRun, k: int) -> dict[str, Any]:
    import jax

    from slgr_jax.serving import stablehlo

    try:
        import flatbuffers  # noqa: F401 - what jax.export writes its files with
    except ImportError as error:
        raise ConfigError(f"--scorer needs the extra: {INSTALL}") from error
    scorer = stablehlo.export_scorer(run, k)
    (folder / "scorer").mkdir()
    np.savez(folder / "scorer" / "weights.npz", **scorer.weights)  # type: ignore[arg-type]
    programs = {}
    for name, code in scorer.programs.items():
        file = f"scorer/{name}.stablehlo"
        (folder / file).write_bytes(code)
        programs[name] = {"file": file} | scorer.signatures[name]
    return {
        "platforms": list(stablehlo.PLATFORMS),
        "k": k,
        "call": "jax.export.deserialize(bytearray(file)).call(weights, *inputs)",
        "weights": "scorer/weights.npz, a dictionary of arrays by name",
        "programs": programs,
        "sizes": "n and m may be any number from 1; every new pair of them compiles once",
        "needs": f"jax (written by {jax.__version__}), numpy, flatbuffers",
    }
