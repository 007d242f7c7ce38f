"""Vectors of items and users as a product: DATA/embeddings/NAME.

They come from a local model (`embed`), or from files (`vector_files`, `chunk_files`).
Row i is item i; an item without a vector is a null, never a filler. `load` refuses what was made
for another split or id map. A row may have several vectors (`chunks`): `load` gives their mean.

Shape letters: U users, I items, R rows of either, D width of a vector.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from slgr_jax.config import EmbedConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError, listing
from slgr_jax.teacher.local import chunk_files, chunks, likelihood, scorers, texts, vector_files
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors, profiles
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.same_split import refuse_leak, refuse_other_split

PathLike = str | os.PathLike[str]

_SHARD_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A product in memory: vectors in index order, float32."""

    manifest: schema.EmbeddingManifest
    items: Vectors
    users: Vectors


def embed(
    dataset: Dataset,
    common: TeachConfig,
    options: EmbedConfig,
    *,
    llm: str = "",
    built_from: str = "train_only",
    unknown: str = "error",
) -> schema.EmbeddingManifest:
    """Make DATA/embeddings/NAME with a local model, or from the files that `options` names.

    Args:
      dataset: texts, training interactions, ids.
      common, options: what to do.
      llm: the model of --embedder=transformers.
      built_from: what imported vectors saw, one of `schema.BUILT_FROM`.
      unknown: imported vectors of ids that the dataset lacks: error, or drop.

    Raises:
      InputError, ShardError: a file cannot be used, or the dataset has no texts.
    """
    root = product_path(dataset.path, common.name)
    shards.check_target(root, overwrite=common.overwrite)
    if options.chunks:
        with shards.scratch_directory(root) as scratch:
            return _embed_chunks(dataset, common, options, llm, built_from, unknown, scratch)
    counts: dict[str, int] = {}
    if options.vectors:
        items, users, counts = _from_files(dataset, options, unknown)
        model, prompt_hash = common.model, ""
    else:
        built_from = "train_only"
        local = _embedder(options, llm)
        model = local.name
        items, users, prompt_hash = _from_texts(dataset, options, local)

    users_from = "text" if texts.reads_users(options) else "history"
    if options.user_vectors:
        users_from = "file"
    if users is None:
        users, users_from = mean_of_history(dataset.positives(("train",)), items), "history"

    return write(
        dataset,
        common.name,
        items,
        users,
        users_from=users_from,
        built_from=built_from,
        model=model,
        prompt_hash=prompt_hash,
        dtype=options.dtype,
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def _embed_chunks(
    dataset: Dataset,
    common: TeachConfig,
    options: EmbedConfig,
    llm: str,
    built_from: str,
    unknown: str,
    scratch: pathlib.Path,
) -> schema.EmbeddingManifest:
    """`embed` with several vectors a row; numbers are mapped in `scratch` meanwhile."""
    counts: dict[str, int] = {}
    users: Chunks | None = None
    if options.vectors:
        read = functools.partial(
            chunk_files.read_chunks, most=options.chunks, scratch=scratch, unknown=unknown
        )
        model, prompt_hash = common.model, ""
        items, counts = read(options.vectors, dataset, "item")
        if options.user_vectors:
            users, dropped = read(options.user_vectors, dataset, "user")
            counts |= {f"user_{name}": count for name, count in dropped.items()}
        users_from = "file" if options.user_vectors else "history"
    else:
        built_from, users_from = "train_only", "history"
        local = _embedder(options, llm)
        size = options.chunks, options.chunk_words
        sides = texts.read_sides(dataset, options)
        items = chunks.of_texts(local, sides[0].by_field, *size, scratch, "items")
        if texts.reads_users(options):
            users_from = "text"
            users = chunks.of_texts(local, sides[1].by_field, *size, scratch, "users")
        cuts = f"{size[0]} chunks of {size[1]} words"
        model, prompt_hash = local.name, texts.hash_of(*sides, cuts=cuts)
    if users is None:
        users = chunks.of_histories(dataset.positives(("train",)), items, scratch)
    return write(
        dataset,
        common.name,
        items,
        users,
        users_from=users_from,
        built_from=built_from,
        model=model,
        prompt_hash=prompt_hash,
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def mean_of_history(history: Csr, items: Vectors) -> Vectors:
    """Per user the unit mean of the vectors of its items; none without such an item."""
    values = profiles(history, items.values.astype(np.float32))
    return Vectors(values, np.asarray((values != 0).any(axis=1), bool))


def _embedder(options: EmbedConfig, llm: str) -> scorers.Embedder:
    if options.embedder == "wordllama":
        return scorers.WordLlama()
    if not llm:
        raise ConfigError("--embedder=transformers needs --llm=FOLDER or --llm=NAME")
    return likelihood.Transformers(llm)


def _of_texts(model: scorers.Embedder, texts: list[str]) -> Vectors:
    values = model.embed(texts)
    return Vectors(values, np.asarray((values != 0).any(axis=1), bool))


def _from_files(
    dataset: Dataset, options: EmbedConfig, unknown: str
) -> tuple[Vectors, Vectors | None, dict[str, int]]:
    """Vectors of items, of users where a file has them, and counts of what was left out."""
    items, counts = vector_files.read_vectors(options.vectors, dataset, "item", unknown=unknown)
    if not options.user_vectors:
        return items, None, counts
    users, dropped = vector_files.read_vectors(
        options.user_vectors, dataset, "user", unknown=unknown
    )
    return items, users, counts | {f"user_{name}": count for name, count in dropped.items()}


def _from_texts(
    dataset: Dataset, options: EmbedConfig, model: scorers.Embedder
) -> tuple[Vectors, Vectors | None, str]:
    """Vectors of items, and of users where their texts are to be read; a hash of what was read."""
    items, *users = texts.read_sides(dataset, options)
    vectors = _of_texts(model, items.whole)
    if not vectors.has.any():
        raise InputError(
            f"{dataset.path} has no item texts to embed; prepare it again with item titles "
            "(slgr prepare --items_input)"
        )
    of_users = _of_texts(model, users[0].whole) if users else None
    return vectors, of_users, texts.hash_of(items, *users)


def write_requests(dataset: Dataset, options: EmbedConfig, model: str) -> int:
    """Write batch-API embedding requests of the item texts at `options.text_requests`; how many.

    Where users' texts are read (`texts.reads_users`), of theirs too: custom_id tells them apart.

    Raises:
      ConfigError, ManifestError, ShardError: as `texts.read_sides`.
    """
    ids = {
        "item": dataset.items.column("item_id").to_pylist(),
        "user": dataset.user_ids.to_pylist(),
    }
    sides = texts.read_sides(dataset, options)
    count = 0
    with open(options.text_requests, "x", encoding="utf-8") as file:
        for side, read in zip(ids, sides, strict=False):
            for raw_id, text in zip(ids[side], read.whole, strict=True):
                if text:
                    body = {"model": model, "input": text}
                    line = {
                        "custom_id": f"{vector_files.PREFIXES[side]}{raw_id}",
                        **{"method": "POST", "url": "/v1/embeddings", "body": body},
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
    return count


# --- the product -------------------------------------------------------------------------------


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/embeddings/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / schema.EMBEDDINGS_DIR / preferences.product_path(data, name).name


def write(
    dataset: Dataset,
    name: str,
    items: Vectors | Chunks,
    users: Vectors | Chunks,
    *,
    users_from: str,
    built_from: str = "train_only",
    model: str = "",
    prompt_hash: str = "",
    dtype: str = "float32",
    counts: dict[str, int] | None = None,
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.EmbeddingManifest:
    """Write vectors in index order as a product; all or nothing.

    Raises:
      InputError: users and items differ in width or in how many vectors a row has, or a vector is
        not finite as `dtype` (of chunks always float16).
    """
    dim = items.values.shape[-1]
    if users.values.shape[-1] != dim:
        raise InputError(f"item vectors have width {dim}, user vectors {users.values.shape[-1]}")

    if isinstance(items, Chunks) != isinstance(users, Chunks):
        raise InputError("rows of items and of users both have chunks, or both one vector")
    if isinstance(items, Chunks):
        dtype = chunks.DTYPE
    by_table = {"items": items, "users": users}
    facts = {table_name: int(vectors.has.sum()) for table_name, vectors in by_table.items()}
    fields = {}
    for table_name, vectors in by_table.items():
        if isinstance(vectors, Chunks):
            fields[table_name] = dict(vectors.fields)
            facts[f"chunks_of_{table_name}"] = int(vectors.counts.sum())

    def write_table(staging: pathlib.Path, table_name: str) -> tuple[schema.ShardFile, ...]:
        vectors, prefix = by_table[table_name], f"{table_name}/part"
        of_row = int(np.prod(vectors.values.shape[1:])) * np.dtype(dtype).itemsize
        rows = max(1, min(rows_per_shard, _SHARD_BYTES // of_row))
        if isinstance(vectors, Chunks):
            return chunks.write(staging, prefix, vectors, rows)
        table = _table(vectors, dtype, table_name)
        return shards.write_shards(staging, prefix, table, rows_per_shard=rows)

    root = product_path(dataset.path, name)
    with shards.atomic_directory(root, overwrite=overwrite) as staging:
        manifest = schema.EmbeddingManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            built_from=built_from,
            model=model,
            prompt_hash=prompt_hash,
            users_from=users_from,
            dim=dim,
            dtype=dtype,
            counts={**facts, **(counts or {})},
            files={table_name: write_table(staging, table_name) for table_name in by_table},
            fields=fields,
        )
        schema.write_manifest(staging, manifest)
    return manifest


def _table(vectors: Vectors, dtype: str, table_name: str) -> pa.Table:
    values = np.where(vectors.has[:, None], vectors.values, 0)
    with np.errstate(over="ignore"):  # told below
        values = values.astype(dtype)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise InputError(f"the vector of row {row} of {table_name} is not finite as {dtype}")
    dim = values.shape[1]
    flat = pa.array(values.ravel())
    array = pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(~vectors.has))
    return pa.table([array], schema=schema.vectors(dim, dtype))


def load(dataset: Dataset, name: str, *, verify: bool = True) -> Embeddings:
    """Read DATA/embeddings/NAME, or refuse it.

    Args:
      dataset: what the product must fit: same id map, same split.
      name: directory under DATA/embeddings.
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError: no such product, made for another split or id map, or its maker has seen
        evaluation data.
      ShardError: a shard is missing, truncated or corrupt, or holds a vector that is not finite.
    """
    root, manifest = product_path(dataset.path, name), read_manifest(dataset, name)
    sizes = {"items": dataset.n_items, "users": dataset.n_users}
    read = {
        table_name: chunks.means(
            chunks.read(root, manifest, table_name, verify=verify), rows, manifest.dim
        )
        if manifest.fields
        else _read(root, manifest, table_name, rows, verify)
        for table_name, rows in sizes.items()
    }
    return Embeddings(manifest, **read)


def load_chunks(
    dataset: Dataset, name: str, table_name: str, *, verify: bool = True
) -> Iterator[chunks.Block]:
    """The chunks of the items (users) of a product that `read_manifest` says has some.

    Raises:
      ManifestError, ShardError: as `load`.
    """
    root, manifest = product_path(dataset.path, name), read_manifest(dataset, name)
    return chunks.read(root, manifest, table_name, verify=verify)


def width_of(data: PathLike, name: str) -> int:
    """Numbers of a vector of DATA/embeddings/NAME.

    Raises:
      ManifestError: no such product, or a damaged one.
    """
    return schema.read_embedding_manifest(product_path(data, name)).dim


def read_manifest(dataset: Dataset, name: str) -> schema.EmbeddingManifest:
    """The manifest of DATA/embeddings/NAME, which fits `dataset`, or refuse the product.

    Raises:
      ManifestError: as `load`.
    """
    root = product_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        available = sorted(path.parent.name for path in root.parent.glob(f"*/{schema.MANIFEST}"))
        raise ManifestError(
            f"{dataset.path} has no embeddings {name!r}; it has: {listing(available)}"
        )

    manifest = schema.read_embedding_manifest(root)
    fix = "make it again with slgr teach embed --overwrite"
    refuse_other_split(dataset, manifest, f"the embedding product {name!r}", fix)
    from_training = "make them from training interactions only"
    refuse_leak(dataset, manifest.built_from, f"the embedding product {name!r}", from_training)
    if manifest.dtype not in ("float32", "float16"):
        raise ManifestError(f"{root}: dtype {manifest.dtype!r} is not one of: float32, float16")
    for table_name, of_table in manifest.fields.items():
        rows = sum(file.rows for file in manifest.files[table_name])
        expected = {"items": dataset.n_items, "users": dataset.n_users}[table_name]
        if rows != expected:
            raise ShardError(f"{root}/{table_name} has {rows} rows, the id map has {expected}")
        if not of_table or min(of_table.values()) < 1:
            raise ManifestError(f"{root}: fields of {table_name} are {of_table}; {fix}")
    return manifest


def _read(
    root: pathlib.Path, manifest: schema.EmbeddingManifest, table_name: str, rows: int, verify: bool
) -> Vectors:
    expected = schema.vectors(manifest.dim, manifest.dtype)
    table = shards.read_shards(root, manifest.files[table_name], expected, verify=verify)
    if table.num_rows != rows:
        raise ShardError(f"{root}/{table_name} has {table.num_rows} rows, the id map has {rows}")
    values, has = np.zeros((rows, manifest.dim), np.float32), np.zeros(rows, bool)
    start = 0
    for chunk in table.column("vector").chunks:
        part = slice(start, start + len(chunk))
        flat = chunk.values.slice(chunk.offset * manifest.dim, len(chunk) * manifest.dim)
        has[part] = chunk.is_valid().to_numpy(zero_copy_only=False)
        values[part] = flat.to_numpy(zero_copy_only=False).reshape(len(chunk), manifest.dim)
        start += len(chunk)
    values[~has] = 0
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise ShardError(f"{root}/{table_name}: the vector of row {row} is not finite")
    return Vectors(values, has)


def report(manifest: schema.EmbeddingManifest) -> str:
    """Two lines for people: what the product is and covers."""
    counts = manifest.counts
    rows = {
        table_name: sum(file.rows for file in manifest.files[table_name])
        for table_name in ("items", "users")
    }
    extra = {key: count for key, count in counts.items() if count and key not in rows}
    if manifest.fields:
        extra["bytes"] = sum(file.bytes for files in manifest.files.values() for file in files)
    lines = [
        f"embeddings {manifest.name}: {manifest.dim} x {manifest.dtype}"
        + (f" by {manifest.model}" if manifest.model else "")
        + f", for {manifest.dataset} split {manifest.split_hash[:8]}",
        f"  vectors of {counts['items']:,} of {rows['items']:,} items and {counts['users']:,} of "
        f"{rows['users']:,} users (from: {manifest.users_from}); built_from={manifest.built_from}",
    ]
    for table_name, of_table in manifest.fields.items():
        slots = ", ".join(f"{field} {count}" for field, count in of_table.items())
        lines.append(f"  chunks of a row of {table_name}, at most: {slots}")
    if extra:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in extra.items()))
    return "\n".join(lines)
