"""What an LLM wrote about users or items, as a product: DATA/texts/NAME.

A text is of one user or item and of one field: `text`, or a factor that the prompt asked about. A
row without one has no line, never a filler. `load` refuses what was made for another split or id
map, or by a maker that has seen evaluation data.

Shape letters: R users or items, n texts.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, ManifestError, ShardError, listing
from slgr_jax.teacher.products import carry as carrying
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.same_split import refuse_leak, refuse_other_split

PathLike = str | os.PathLike[str]

_FACTS = ("rows", "rows_with_text", "texts", "distinct_texts")
_QUANTILES = {"5 %": 0.05, "half": 0.5, "95 %": 0.95, "longest": 1.0}
_EXAMPLE = 300  # characters of a text that a report shows


@dataclasses.dataclass(frozen=True)
class Texts:
    """A product in memory.

    Attributes:
      manifest: what it is.
      table: [n] schema.TEXTS.
    """

    manifest: schema.TextManifest
    table: pa.Table

    def by_field(self, rows: int) -> dict[str, list[str]]:
        """Field -> [R] texts in index order, in the order that the prompt had; empty: none."""
        out = {field: [""] * rows for field in self.manifest.fields}
        columns = (self.table.column(name).to_pylist() for name in ("row", "field", "text"))
        for row, field, text in zip(*columns, strict=True):
            out[field][row] = text
        return out


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/texts/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / schema.TEXTS_DIR / preferences.product_path(data, name).name


def write(
    dataset: Dataset,
    name: str,
    rows: np.ndarray,
    fields: np.ndarray,
    written: list[str],
    *,
    about: Mapping[str, Any],
    counts: Mapping[str, int],
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> Texts:
    """Write texts as a product; all or nothing.

    Args:
      rows, fields, written: [n] of each text the index of its user (item), the number of its field
        and its words; no two are of the same two.
      about: model, prompt, prompt_hash, side, fields and shown of `schema.TextManifest`.
      counts: more counts for the manifest.
    """
    order = np.lexsort((fields, rows))
    names = list(about["fields"])
    ids = _ids(dataset, about["side"])
    table = pa.table(
        [
            pa.array(rows[order], pa.int32()),
            ids.take(pa.array(rows[order], pa.int64())),
            [names[field] for field in fields[order]],
            [written[place] for place in order],
        ],
        schema=schema.TEXTS,
    )
    facts = dict(
        zip(
            _FACTS,
            (len(ids), int(np.unique(rows).size), int(rows.size), len(set(written))),
            strict=True,
        )
    )
    with shards.atomic_directory(product_path(dataset.path, name), overwrite=overwrite) as staging:
        files = shards.write_shards(staging, "part", table, rows_per_shard=rows_per_shard)
        manifest = schema.TextManifest(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            built_from="train_only",
            counts={**facts, **counts},
            files={"texts": files},
            **about,
        )
        schema.write_manifest(staging, manifest)
    return Texts(manifest, table)


def carry(dataset: Dataset, parent: Dataset, name: str, *, overwrite: bool = False) -> Texts:
    """Write PARENT/texts/NAME as DATA/texts/NAME; who is new since then has no text.

    Args:
      dataset: made from `parent` by `slgr prepare --append`.

    Raises:
      ManifestError: as `carrying.check_seen` and `load`.
      ShardError: as `load`.
    """
    carrying.check_seen(dataset, parent)
    held = load(parent, name)
    manifest = held.manifest
    about = ("model", "prompt", "prompt_hash", "side", "fields", "shown")
    number = {field: place for place, field in enumerate(manifest.fields)}
    return write(
        dataset,
        name,
        held.table.column("row").to_numpy(),
        np.array([number[field] for field in held.table.column("field").to_pylist()], int),
        held.table.column("text").to_pylist(),
        about={key: getattr(manifest, key) for key in about},
        counts={key: count for key, count in manifest.counts.items() if key not in _FACTS},
        overwrite=overwrite,
    )


def load(dataset: Dataset, name: str, side: str = "", *, verify: bool = True) -> Texts:
    """Read DATA/texts/NAME, or refuse it.

    Args:
      dataset: what the product must fit: same id map, same split.
      side: user or item, of whom the texts have to be; empty: of either.
      verify: also compare each shard's SHA-256.

    Raises:
      ConfigError: the texts are of the other side.
      ManifestError: no such product, made for another split or id map, or its maker has seen
        evaluation data.
      ShardError: a shard is missing, truncated or corrupt, or names rows or fields that are not.
    """
    root = product_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        available = sorted(path.parent.name for path in root.parent.glob(f"*/{schema.MANIFEST}"))
        raise ManifestError(f"{dataset.path} has no texts {name!r}; it has: {listing(available)}")
    manifest = schema.read_text_manifest(root)
    fix = "ask for them again (slgr teach requests --overwrite)"
    refuse_other_split(dataset, manifest, f"the texts {name!r}", fix)
    from_training = "ask for texts from training interactions only"
    refuse_leak(dataset, manifest.built_from, f"the product of texts {name!r}", from_training)
    if side and manifest.side != side:
        raise ConfigError(
            f"the texts {name!r} are about {manifest.side}s: give them with "
            f"--{manifest.side}_texts={name}"
        )
    table = shards.read_shards(root, manifest.files["texts"], schema.TEXTS, verify=verify)
    rows, count = table.column("row").to_numpy(), len(_ids(dataset, manifest.side))
    if rows.size and (rows.min() < 0 or rows.max() >= count):
        raise ShardError(f"{root} names row {rows.max()} of {count} {manifest.side}s; {fix}")
    others = set(table.column("field").unique().to_pylist()) - set(manifest.fields)
    if others:
        raise ShardError(
            f"{root} has texts of {listing(sorted(others))}, its manifest fields "
            f"{listing(manifest.fields)}; {fix}"
        )
    return Texts(manifest, table)


def _ids(dataset: Dataset, side: str) -> pa.Array:
    """[R] external ids of the users (items)."""
    if side == "user":
        return dataset.user_ids
    return pa.concat_arrays(dataset.items.column("item_id").chunks)


def report(texts: Texts) -> str:
    """A few lines for people: what the product is and covers, lengths of texts, one of them."""
    manifest, counts = texts.manifest, texts.manifest.counts
    lines = [
        f"texts {manifest.name}: {counts['texts']:,} of {counts['rows_with_text']:,} of "
        f"{counts['rows']:,} {manifest.side}s by {manifest.model} ({manifest.prompt}, prompt "
        f"{manifest.prompt_hash[:8]}), for {manifest.dataset} split {manifest.split_hash[:8]}",
        f"  built_from={manifest.built_from}; prompts showed {manifest.shown}",
    ]
    written = texts.table.column("text").to_pylist()
    lengths = np.array([len(text.split()) for text in written])
    if lengths.size:
        told = ", ".join(
            f"{name} {int(np.quantile(lengths, share, method='inverted_cdf'))}"
            for name, share in _QUANTILES.items()
        )
        lines.append(f"  words of a text: {told}; {counts['distinct_texts']:,} texts differ")
    if len(manifest.fields) > 1:
        held = texts.table.column("field").to_pylist()
        shares = ", ".join(f"{field} {held.count(field):,}" for field in manifest.fields)
        lines.append(f"  of each factor: {shares}")
    extra = {key: counts[key] for key in sorted(counts) if counts[key] and key not in _FACTS}
    if extra:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in extra.items()))
    if written:
        first = texts.table.slice(0, 1).to_pylist()[0]
        shown = " ".join(first["text"].split())
        shown = shown if len(shown) <= _EXAMPLE else shown[:_EXAMPLE] + "..."
        lines.append(f"  e.g. {first['field']} of {manifest.side} {first['id']}: {shown}")
    return "\n".join(lines)
