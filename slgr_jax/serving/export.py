"""A trained run as files that other programs read: vectors, an index of them, the scorer.

    DIR/manifest.json            what the files hold, how to score, their checksums
    DIR/users.parquet, items.parquet            columns user or item (id) and vector; or
    DIR/users.npy, items.npy; or vectors.safetensors with tensors `users` and `items`
    DIR/user_ids.json, item_ids.json            ids of rows and indices, if not in Parquet alone
    DIR/items.usearch            a top-K inner product index; keys are rows of the items
    DIR/scorer/{scores,top_k}.stablehlo, weights.npz            see `stablehlo`

The directory appears when it is whole.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slgr_jax import __version__, progress
from slgr_jax.data import shards
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ConfigError, listing
from slgr_jax.files import write_atomically
from slgr_jax.serving import ann_index
from slgr_jax.serving.ann_index import INSTALL

if TYPE_CHECKING:
    from slgr_jax.serving.trained_run import TrainedRun

PathLike = str | os.PathLike[str]
FORMATS = ("parquet", "npy", "safetensors", "none")
_BLOCK = 1 << 16  # vectors that are written at once; of Parquet a row group


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
    k = min(10 if request.k is None else request.k, run.dataset.n_items)
    manifest = _about(run)
    with shards.atomic_directory(out, overwrite=overwrite) as folder:
        if request.format != "none":
            items = run.run_vectors.of_items()
            manifest["vectors"] = _write_vectors(folder, request.format, run, items)
            if request.index != "none":
                manifest["index"] = _write_index(folder, run, items, k)
        if request.scorer:
            manifest["scorer"] = _write_scorer(folder, run, k)
        if request.scorer or request.format != "parquet":
            manifest["ids"] = _write_ids(folder, run)
        manifest["files"] = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": shards.sha256_of(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n", durable=True)
    return Exported(pathlib.Path(out), manifest)


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
    folder: pathlib.Path, kind: str, run: TrainedRun, items: np.ndarray
) -> dict[str, Any]:
    """Write the vectors, of users a block at a time; what the manifest says of them.

    Args:
      items: [I, E].
    """
    with progress.bar(run.dataset.n_users, "user", label="vectors"):
        _WRITERS[kind](folder, run, items)
    return {
        "format": kind,
        "width": int(items.shape[1]),
        "dtype": str(items.dtype),
        "score": "the inner product of a user's and an item's vector; biases are folded in, do "
        "not normalise",
        "rows": "in the order of the ids",
    }


def _blocks(run: TrainedRun) -> Iterator[tuple[int, np.ndarray]]:
    """(first user, vectors of it and those that follow), block after block."""
    for begin in range(0, run.dataset.n_users, _BLOCK):
        end = min(begin + _BLOCK, run.dataset.n_users)
        yield begin, run.run_vectors.of_users(np.arange(begin, end, dtype=np.int32))


def _write_parquet(folder: pathlib.Path, run: TrainedRun, items: np.ndarray) -> None:
    of_items = ((begin, items[begin : begin + _BLOCK]) for begin in range(0, len(items), _BLOCK))
    kind = pa.list_(pa.float32(), items.shape[1])
    for name, ids, blocks in (
        ("user", run.dataset.user_ids, _blocks(run)),
        ("item", run.item_id_array, of_items),
    ):
        schema = pa.schema([(name, pa.string()), ("vector", kind)])
        with pq.ParquetWriter(folder / f"{name}s.parquet", schema) as writer:
            for begin, rows in blocks:
                lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
                part = [ids.slice(begin, len(rows)), lists]
                writer.write_table(pa.table(part, schema=schema))


def _write_npy(folder: pathlib.Path, run: TrainedRun, items: np.ndarray) -> None:
    with open(folder / "users.npy", "wb") as file:
        shape = (run.dataset.n_users, items.shape[1])
        about = {"descr": items.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for _, rows in _blocks(run):
            rows.tofile(file)
    np.save(folder / "items.npy", items)


def _write_safetensors(folder: pathlib.Path, run: TrainedRun, items: np.ndarray) -> None:
    """The one format whose library takes all vectors at once."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ConfigError(
            f"--format=safetensors needs the extra: {INSTALL}; or take --format=parquet or npy"
        ) from error
    everybody = np.arange(run.dataset.n_users, dtype=np.int32)
    # It copies what is not contiguous as it lies in memory.
    tensors = {"users": run.run_vectors.of_users(everybody), "items": np.ascontiguousarray(items)}
    save_file(tensors, folder / "vectors.safetensors")


_WRITERS: dict[str, Callable[[pathlib.Path, TrainedRun, np.ndarray], None]] = {
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


def _write_index(
    folder: pathlib.Path, run: TrainedRun, items: np.ndarray, k: int
) -> dict[str, Any]:
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
