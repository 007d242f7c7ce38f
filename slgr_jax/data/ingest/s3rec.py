"""S3-Rec sequences: NAME.txt, one user a line, and NAME_item2attributes.json. See `tables.Raw`.

The files of Zhou et al. (CIKM 2020), on which the S-LLMR and LLM-CF click benchmarks are built
(PAPER 4.1): a line is a user id and that user's item ids, oldest first, separated by spaces.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import tables
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.tables import Piece, Raw
from slgr_jax.errors import ConfigError, InputError

# NAME_sample.txt beside the sequences has the same form but holds sampled negatives.
_NEGATIVES = "_sample.txt"
_ATTRIBUTES = "_item2attributes.json"


def sequences(config: PrepareConfig) -> Raw:
    """NAME.txt, and the attributes of items as their categories where they lie beside it.

    Ids stay text. There are no times: an item's place in its line, from 0, stands for one in
    whole seconds. It orders the events of one user and says nothing across users.

    Raises:
      InputError: a file is empty or damaged, a user has no items or has two lines.
      ConfigError: a split that compares the times of different users.
    """
    if config.test_input:
        raise ConfigError(
            "--test_input is not used with --source=s3rec: a line holds a user's whole sequence"
        )
    if config.split == "global_time":
        raise ConfigError(
            f"--split={config.split} compares times across users; --source=s3rec knows only the "
            "order within each user's line: add --split=leave_last"
        )
    files = Files(config.input)
    name = files.choose(
        lambda n: n.endswith(".txt") and not n.endswith(_NEGATIVES), "NAME.txt", config.name
    )
    if name.endswith(_NEGATIVES):
        raise InputError(f"{files.where(name)} holds sampled negatives; give NAME.txt itself")
    stem = name.removesuffix(".txt").rsplit("/", 1)[-1]
    attributes = files.beside(name, f"{stem}{_ATTRIBUTES}")
    return Raw(
        (_read(files, name),),
        (files,),
        tables.nothing if attributes is None else lambda wanted: _items(files, attributes),
        tables.nothing,
        name=stem,
    )


def _read(files: Files, name: str) -> Piece:
    """The interactions in the order of the file."""
    where = files.where(name)
    users: dict[str, int] = {}  # id -> its line
    sequences: list[list[str]] = []
    for number, line in enumerate(files.text(name).split("\n"), 1):
        if not (fields := line.split()):
            continue
        user, items = fields[0], fields[1:]
        if "\0" in line:
            raise InputError(f"{where}, line {number} is not text; is it of another --source?")
        if not items:
            raise InputError(f"{where}, line {number}: user {user!r} has no items")
        if user in users:
            raise InputError(
                f"{where}, line {number}: user {user!r} is also on line {users[user]}; a user's "
                "sequence is one line"
            )
        users[user] = number
        sequences.append(items)
    if not users:
        raise InputError(f"{where} is empty")
    lengths = np.array([len(items) for items in sequences])
    owner = pa.array(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    columns = {
        "user": pa.DictionaryArray.from_arrays(owner, pa.array(list(users), pa.string())),
        "item": pa.array(itertools.chain.from_iterable(sequences), pa.string()),
        "timestamp": pa.array(place),
    }
    return Piece(
        where,
        None,
        {role: pa.chunked_array([column]) for role, column in columns.items()},
        {"user": "1 (user)", "item": "2 and on (items)", "timestamp": "place in the line"},
    )


def _items(files: Files, name: str) -> pa.Table:
    """Rows of `schema.ITEMS` whose categories are the attribute ids as text, in file order."""
    where = files.where(name)
    try:
        found = json.loads(files.text(name))
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is not an object of item id -> list of attribute ids")
    for item, attributes in found.items():
        known = isinstance(attributes, list) and all(
            isinstance(a, int | str) and not isinstance(a, bool) for a in attributes
        )
        if not known:
            shown = json.dumps(attributes)[:80]
            raise InputError(f"{where}: item {item!r} has {shown}, not a list of attribute ids")
    ids, blank = pa.array(list(found), pa.string()), pa.nulls(len(found), pa.string())
    categories = [[str(a) for a in attributes] for attributes in found.values()]
    column = pa.array(categories, pa.list_(pa.string()))
    return pa.table([ids, blank, blank, column], schema=schema.ITEMS)
