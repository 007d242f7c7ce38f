"""S3-Rec sequences: NAME.txt, one user a line, and NAME_item2attributes.json. See `raw.Raw`.

The files of Zhou et al. (CIKM 2020), on which the S-LLMR and LLM-CF click benchmarks are built
(arXiv 2512.21526, table 1): a line is a user id and that user's item ids, oldest first,
separated by spaces.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.raw import Piece, Raw, nothing
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import ConfigError, InputError

# NAME_sample.txt beside the sequences has the same form but holds sampled negatives.
_NEGATIVES = "_sample.txt"
_ATTRIBUTES = "_item2attributes.json"


def sequences(config: PrepareConfig) -> Raw:
    """NAME.txt, titles from --items_input, and attributes beside it as categories.

    Ids stay text. There are no times: an item's place in its line, from 0, stands for one in
    whole seconds. It orders the events of one user and says nothing across users.

    Raises:
      InputError: a file is empty or damaged, a user has no items or has two lines.
      ConfigError: a split that compares the times of different users.
    """
    check_knobs(config)
    files = Files(config.input)
    name = files.choose(
        lambda n: n.endswith(".txt") and not n.endswith(_NEGATIVES), "NAME.txt", config.name
    )
    if name.endswith(_NEGATIVES):
        raise InputError(f"{files.where(name)} holds sampled negatives; give NAME.txt itself")
    stem = name.removesuffix(".txt").rsplit("/", 1)[-1]
    attributes = files.beside(name, f"{stem}{_ATTRIBUTES}")
    item_reader = tables.named_items(config)

    def items(wanted: pa.Array | None) -> Texts | None:
        by_attributes = None if attributes is None else _items(files, attributes)
        if item_reader is None:
            return by_attributes
        return _with_categories(item_reader.texts(wanted), by_attributes)

    return Raw(
        (read(files, name, config),),
        (files,) if item_reader is None else (files, item_reader.file),
        items,
        nothing,
        {"item": item_reader.features} if item_reader and item_reader.features else {},
        name=stem,
    )


def check_knobs(config: PrepareConfig) -> None:
    """Refuse what a file of sequences cannot have (`config.SEQUENCE_SOURCES`).

    Raises:
      ConfigError: a test part of its own, or a split that compares the times of different users.
    """
    if config.test_input:
        raise ConfigError(
            f"--test_input is not used with --source={config.source}: a line holds a user's whole "
            "sequence"
        )
    if config.split == "global_time":
        raise ConfigError(
            f"--split={config.split} compares times across users; --source={config.source} knows "
            "only the order within each user's line: add --split=leave_last"
        )


def read(files: Files, name: str, config: PrepareConfig) -> Piece:
    """The interactions of a file of sequences, in its order."""
    count = LineCount(files.where(name))
    text, count.note = files.text(name, config.encoding)
    sequences = _sequences(text, count, drop=tables.drops(config))
    return piece_of(list(sequences.values()), count)


def piece_of(sequences: Sequence[tuple[str, list[str]]], count: LineCount) -> Piece:
    """Sequences of users as interactions; an item's place, from 0, stands for its time.

    Args:
      sequences: a user's id and item ids, oldest first.
      count: the lines of their file.

    Raises:
      InputError: there are none.
    """
    if not sequences:
        dropped = f": {count.examples[0]}" if count.examples else ""
        raise InputError(f"{count.where} is empty{dropped}")
    users = pa.array([user for user, _ in sequences], pa.string())
    lengths = np.array([len(items) for _, items in sequences])
    owner = pa.array(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    all_items = itertools.chain.from_iterable(items for _, items in sequences)
    columns = {
        "user": pa.DictionaryArray.from_arrays(owner, users),
        "item": pa.array(all_items, pa.string()),
        "timestamp": pa.array(place),
    }
    return Piece(
        count.where,
        None,
        {role: pa.chunked_array([column]) for role, column in columns.items()},
        {"user": "1 (user)", "item": "2 and on (items)", "timestamp": "place in the line"},
        count,
    )


def _sequences(text: str, count: LineCount, *, drop: bool) -> dict[int, tuple[str, list[str]]]:
    """Line number -> the user and the items of that line; counts every line."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    sequences: dict[int, tuple[str, list[str]]] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        count.lines += 1
        fields = line.split()
        if not fields:
            count.blank += 1
            continue
        user, items = fields[0], fields[1:]
        reason = ""
        if "\0" in line:
            reason = " is not text; is it of another --source?"
        elif not items:
            reason = f": user {user!r} has no items"
        elif user in line_of:
            reason = (
                f": user {user!r} is also on line {line_of[user]}; a user's sequence is one line"
            )
        if not reason:
            line_of[user] = number
            sequences[number] = (user, items)
            count.rows += 1
            continue
        message = f"{count.where}, line {number}{reason}"
        if not drop:
            raise InputError(message)
        count.drop(message)
    return sequences


def _items(files: Files, name: str) -> Texts | None:
    """Items whose categories are the attribute ids as text, in file order; None without any."""
    count = LineCount(files.where(name))
    text, count.note = files.text(name)
    try:
        attributes_of = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{count.where} is not JSON: {error}") from error
    if not isinstance(attributes_of, Mapping):
        raise InputError(f"{count.where} is not an object of item id -> list of attribute ids")
    rows = []
    for item, attributes in attributes_of.items():
        is_valid = isinstance(attributes, list) and all(
            isinstance(a, int | str) and not isinstance(a, bool) for a in attributes
        )
        if not is_valid:
            shown = json.dumps(attributes)[:80]
            raise InputError(
                f"{count.where}: item {item!r} has {shown}, not a list of attribute ids"
            )
        rows.append({"item_id": item, "categories": [str(a) for a in attributes]})
    # One JSON document: its entries are counted in place of lines.
    count.lines = len(rows)
    return texts.beside(rows, schema.ITEMS, count)


def _with_categories(items: Texts, by_attributes: Texts | None) -> Texts:
    """The item table, with attributes as the categories of items that it gives none."""
    if by_attributes is None or not items.table.num_rows:
        return items
    ids = items.table.column("item_id").combine_chunks()
    extra = by_attributes.table
    rows = pc.index_in(ids, value_set=extra.column("item_id").combine_chunks())
    categories = extra.column("categories").combine_chunks().take(rows)
    place = items.table.schema.get_field_index("categories")
    merged = pc.coalesce(items.table.column(place).combine_chunks(), categories)
    table = items.table.set_column(place, schema.ITEMS.field("categories"), merged)
    return dataclasses.replace(items, table=table)
