"""What a local model reads of items and users: the dataset's own texts, or what an LLM wrote.

Shape letters: R items or users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slgr_jax.config import EmbedConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError
from slgr_jax.teacher.products import texts as products

# What is read of an item as one text; a part that is missing is left out.
TEXT = "title. category, category. description"
_ITEM_FIELDS = ("title", "categories", "text")  # of which each is cut into chunks


class ReadTexts(NamedTuple):
    """Texts of R rows in index order; empty where a row has none.

    Attributes:
      whole: [R] one text a row.
      by_field: field -> [R] texts of which each is cut into chunks by itself.
      source: what was read, for a hash.
    """

    whole: list[str]
    by_field: Mapping[str, Sequence[str]]
    source: str


def reads_users(options: EmbedConfig) -> bool:
    """Whether users' vectors are of texts, and not means of their items'."""
    return options.users == "text" or bool(options.user_texts)


def read_sides(dataset: Dataset, options: EmbedConfig) -> list[ReadTexts]:
    """The texts that the options name: of items, and of users where theirs are read.

    Raises:
      ConfigError, ManifestError, ShardError: as `products.load`, of --item_texts or --user_texts.
      InputError: users have no texts in the dataset.
    """
    of_items, of_users = options.item_texts, options.user_texts
    sides = [_written(dataset, "item", of_items) if of_items else _of_items(dataset)]
    if reads_users(options):
        sides.append(_written(dataset, "user", of_users) if of_users else _of_users(dataset))
    return sides


def hash_of(*sides: ReadTexts, cuts: str = "") -> str:
    """16 digits that change with what was read, or with how it is cut into chunks."""
    what = "; ".join(filter(None, (*(side.source for side in sides), cuts)))
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _written(dataset: Dataset, side: str, name: str) -> ReadTexts:
    """DATA/texts/NAME; as one text the factors one after the other, each with its name."""
    product = products.load(dataset, name, side)
    rows = dataset.n_items if side == "item" else dataset.n_users
    by_field = product.by_field(rows)
    named = len(by_field) > 1
    whole = [
        "\n".join(
            f"{field}: {text}" if named else text
            for field, text in zip(by_field, of_row, strict=True)
            if text
        )
        for of_row in zip(*by_field.values(), strict=True)
    ]
    return ReadTexts(whole, by_field, schema.files_hash(product.manifest.files["texts"]))


def _of_items(dataset: Dataset) -> ReadTexts:
    columns = {name: dataset.items.column(name).to_pylist() for name in _ITEM_FIELDS}
    columns["categories"] = [
        ", ".join(name for name in names or () if name) for names in columns["categories"]
    ]
    by_field = {name: [text or "" for text in column] for name, column in columns.items()}
    whole = []
    for parts in zip(*by_field.values(), strict=True):
        pieces = (" ".join(part.split()) for part in parts)
        whole.append(". ".join(piece for piece in pieces if piece))
    return ReadTexts(whole, by_field, TEXT)


def _of_users(dataset: Dataset) -> ReadTexts:
    files = dataset.manifest.files["users"]
    table = shards.read_shards(dataset.path, files, schema.USERS)
    whole = [text or "" for text in table.column("text").to_pylist()]
    if not any(whole):
        raise InputError(
            f"{dataset.path} has no user texts; use --users=history or prepare it again with them"
        )
    return ReadTexts(whole, {"text": whole}, "text of users")
