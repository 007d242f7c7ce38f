"""NAME.test.inter with whole histories, as LLMRank published Amazon games. See `raw.Raw`.

RecBole's sequential benchmark files in github.com/RUCAIBox/LLMRank (Hou et al., ECIR 2024),
llmrank/dataset/Games-6k. A row of NAME.test.inter is a user, the items before the last one, oldest
first and separated by spaces, and the last one:

    user_id:token   item_id_list:token_seq   item_id:token

So a row is a user's whole sequence, cut by its authors to the last 50 items; NAME.valid.inter holds
the same without the last item, and is not read. NAME.item has the titles.
"""

from __future__ import annotations

from slgr_jax.config import PrepareConfig
from slgr_jax.data.ingest import recbole, s3rec, tables
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.raw import Raw, nothing
from slgr_jax.errors import InputError

_ENDING = ".test.inter"
_HEADER = ("user_id:token", "item_id_list:token_seq", "item_id:token")


def sequences(config: PrepareConfig) -> Raw:
    """The sequences of NAME.test.inter, and the titles of NAME.item beside it.

    Raises:
      InputError: the file is empty, damaged, or of another form.
      ConfigError: a split that compares the times of different users.
    """
    s3rec.check_knobs(config)
    files = Files(config.input)
    name = files.choose(lambda n: n.endswith(_ENDING), f"NAME{_ENDING}", config.name)
    count = LineCount(files.where(name))
    text, count.note = files.text(name, config.encoding)
    rows = _rows(text, count, drop=tables.drops(config))
    stem = name.removesuffix(_ENDING)
    return Raw(
        (s3rec.piece_of(rows, count),),
        (files,),
        lambda _: recbole.items(files, f"{stem}.item", config),
        nothing,
        name=stem.rsplit("/", 1)[-1],
    )


def _rows(text: str, count: LineCount, *, drop: bool) -> list[tuple[str, list[str]]]:
    """The user and the items of each row; counts every line."""
    header, *lines = text.removesuffix("\n").split("\n")
    count.lines = 1 + len(lines)
    count.header = 1
    if tuple(header.rstrip("\r").split("\t")) != _HEADER:
        raise InputError(
            f"{count.where} begins {header[:80]!r}; --source=llmrank reads files with the header "
            f"{' '.join(_HEADER)} between tabs; other .inter files: --source=recbole"
        )
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 2):
        fields = line.rstrip("\r").split("\t")
        if fields == [""]:
            count.blank += 1
            continue
        reason = ""
        if len(fields) != len(_HEADER) or not (fields[0] and fields[2]):
            reason = f"{len(fields)} fields, expected a user, a history and an item"
        elif fields[0] in rows:
            reason = f"user {fields[0]!r} has a line before; a user's sequence is one line"
        if not reason:
            rows[fields[0]] = [*fields[1].split(), fields[2]]
            count.rows += 1
            continue
        message = f"{count.where}, line {number}: {reason}"
        if not drop:
            raise InputError(f"{message}; --bad_rows=drop leaves out rows that cannot be used")
        count.drop(message)
    return list(rows.items())
