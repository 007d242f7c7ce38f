"""MovieLens-1M with Qwen's texts of movies and users, as GEAR-Rec published it. See `raw.Raw`.

github.com/MelanthaWang246/GEAR-Rec, data/ml-1m. A line of train.txt or test.txt is a user and the
user's items, in LightGCN's form; user_map.txt and item_map.txt say which of MovieLens' own ids each
number is (`1193 0`: movie 1193 is 0). llm_response_item.json and llm_response_user.json hold what
Qwen-max wrote, by number; ml1m_extended_movie.csv the titles and genres, by MovieLens' id.

The profiles of users were written from training items. So validation is half of the authors' test
part, user by user, and the other half is test (--valid_from=test).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import pyarrow as pa

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import s3rec, tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.delimited import DelimitedFile
from slgr_jax.data.ingest.raw import Piece, Raw
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import ConfigError, InputError

_MOVIES = "ml1m_extended_movie.csv"
_PROFILES = "llm_response_user.json"


def interactions(config: PrepareConfig) -> Raw:
    """The training and test parts with MovieLens' ids, titles, genres, and Qwen's texts.

    Raises:
      InputError: the folder lacks a file, or one is damaged.
      ConfigError: another split, or parts from elsewhere.
    """
    if config.test_input or config.split not in ("auto", "premade"):
        flag = "--test_input" if config.test_input else f"--split={config.split}"
        raise ConfigError(
            f"{flag} is not used with --source=gearrec: the training part is the authors', which "
            "the LLM was shown; --seed draws another half of their test part as validation"
        )
    files = Files(config.input)
    movies = files.choose(lambda n: n == _MOVIES, _MOVIES, config.name)
    folder = movies.removesuffix(_MOVIES)
    ids = {side: _ids(files, f"{folder}{side}_map.txt") for side in ("user", "item")}
    pieces = (_part(files, folder, part, ids, config) for part in ("train", "test"))
    return Raw(
        tuple(pieces),
        (files,),
        lambda _: _movies(files, movies, _answers(files, folder, "item", ids), config),
        lambda _: _users(_answers(files, folder, "user", ids), files.where(f"{folder}{_PROFILES}")),
        name="ml-1m",
    )


def _ids(files: Files, name: str) -> dict[str, str]:
    """Number -> MovieLens' id."""
    if name not in files.names:
        raise InputError(f"{files.where(name)} is missing")
    text, _ = files.text(name)
    pairs = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{files.where(name)}: a line is not `id number`")
    return {number: original for original, number in pairs}


def _part(
    files: Files,
    folder: str,
    part: str,
    ids: Mapping[str, Mapping[str, str]],
    config: PrepareConfig,
) -> Piece:
    name = f"{folder}{part}.txt"
    if name not in files.names:
        raise InputError(f"{files.where(name)} is missing")
    piece = s3rec.read(files, name, config)
    columns = {}
    for side, known in ids.items():
        column = piece.columns[side].cast(pa.string()).to_pylist()
        if strangers := sorted(set(column) - known.keys()):
            raise InputError(f"{piece.where}: {side} {strangers[0]} is not in {side}_map.txt")
        columns[side] = pa.chunked_array([pa.array([known[number] for number in column])])
    # An item's place in its line is no time here.
    return dataclasses.replace(piece, part=part, columns=columns)


def _answers(
    files: Files, folder: str, side: str, ids: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """MovieLens' id -> what the LLM wrote of it; empty where the file is missing."""
    name = f"{folder}llm_response_{side}.json"
    if name not in files.names:
        return {}
    text, _ = files.text(name)
    try:
        written = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{files.where(name)} is not JSON: {error}") from error
    if not isinstance(written, Mapping):
        raise InputError(f"{files.where(name)} is not an object of number -> text")
    return {ids[side][number]: str(text) for number, text in written.items() if number in ids[side]}


def _movies(
    files: Files, name: str, answers: Mapping[str, str], config: PrepareConfig
) -> Texts | None:
    dialect = tables.dialect_of_texts(files, name, Dialect(), config)
    wanted = {"item": "MovieID", "title": "Title", "categories": "Genres"}
    rows = DelimitedFile(files, name, dialect).read(
        wanted, drop=tables.drops(config), ids=(), is_log=False
    )
    cells = (rows.columns[role].to_pylist() for role in wanted)
    movies = [
        {
            "item_id": item,
            "title": title,
            "text": answers.get(item),
            "categories": (genres or "").split("|"),
        }
        for item, title, genres in zip(*cells, strict=True)
    ]
    return texts.beside(movies, schema.ITEMS, rows.count)


def _users(answers: Mapping[str, str], where: str) -> Texts | None:
    rows = [{"user_id": user, "text": text} for user, text in answers.items()]
    # One JSON document: its entries are counted in place of lines.
    return texts.beside(rows, schema.USERS, LineCount(where, len(rows)))
