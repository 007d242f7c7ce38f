"""The readers by the name of their layout (--source). See `raw.Raw`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from slgr_jax.config import SEQUENCE_SOURCES, SHOWN_SOURCES, SOURCES, PrepareConfig
from slgr_jax.data.ingest import (
    amazon,
    gearrec,
    idgenrec,
    llmrank,
    movielens,
    recbole,
    s3rec,
    sisinf,
    tables,
    text_lines,
)
from slgr_jax.data.ingest.raw import Raw, no_rows
from slgr_jax.errors import ConfigError, listing

_READERS: Mapping[str, Callable[[PrepareConfig], Raw]] = {
    "movielens": movielens.ratings,
    "recbole": recbole.atomic_files,
    "amazon": amazon.reviews,
    "s3rec": s3rec.sequences,
    "idgenrec": idgenrec.sequences,
    "llmrank": llmrank.sequences,
    "sisinf": sisinf.interactions,
    "gearrec": gearrec.interactions,
    "jsonl": tables.named_columns,
}
# Layouts without columns of one's own choice, and those that have item texts beside them.
_NO_SPLIT_COLUMN = ("movielens", "amazon", *SHOWN_SOURCES, *SEQUENCE_SOURCES)
_OWN_TEXTS = ("movielens", "recbole", "idgenrec", "llmrank", *SHOWN_SOURCES)
_STREAMED = ("csv", "parquet")


def _check_tables(config: PrepareConfig) -> None:
    """Refuse knobs of a user table or of features where nothing would read them."""
    named = ("csv", "jsonl", "parquet")
    if config.users_input and config.source not in named:
        raise ConfigError(
            f"--users_input is not used with --source={config.source}; it goes with "
            f"{listing(named)}"
        )
    of_interactions = config.interaction_features
    if of_interactions not in ("", "none") and config.source not in ("recbole", *named):
        raise ConfigError(
            f"--interaction_features is not used with --source={config.source}; it goes with "
            f"recbole, {listing(named)}"
        )
    if config.source in ("movielens", "recbole"):
        return
    readers = {
        "user": (config.user_features, config.users_input, named),
        "item": (config.item_features, config.items_input, (*named, "s3rec")),
    }
    for side, (features, table, layouts) in readers.items():
        if not features or features == "none":
            continue
        if config.source not in layouts:
            raise ConfigError(
                f"--{side}_features is not used with --source={config.source}; it goes with "
                f"movielens, recbole, {listing(layouts)}"
            )
        if not table:
            raise ConfigError(
                f"--{side}_features={features} are columns of a table: add --{side}s_input=FILE"
            )


def read(config: PrepareConfig, *, most_rows: int | None = None) -> Raw:
    """Read the interactions of `config.input` (and of the pre-made parts).

    Args:
      most_rows: more rows than this may be left to be streamed; None: all are read.

    Raises:
      InputError: a file is missing, empty, damaged, or lacks a column.
      ConfigError: knobs that do not fit the source.
    """
    if config.source not in SOURCES:
        raise ConfigError(f"--source={config.source!r} is not one of: {listing(SOURCES)}")
    if config.split_column and config.source in _NO_SPLIT_COLUMN:
        raise ConfigError(f"--split_column is not used with --source={config.source}")
    if config.items_input and config.source in _OWN_TEXTS:
        raise ConfigError(
            f"--items_input is not used with --source={config.source}: item texts are found "
            "beside the interactions"
        )
    _check_tables(config)
    if config.columns and config.source not in ("csv", "amazon"):
        raise ConfigError(
            f"--columns is not used with --source={config.source}: it names the columns of a csv "
            "file without a header line"
        )
    if len(config.decimal) != 1:
        raise ConfigError(f"--decimal={config.decimal!r} must be one character, as . or ,")
    text_lines.check_encoding(config.encoding)
    if config.source in _STREAMED:
        raw = tables.named_columns(config, most_rows)
    else:
        raw = _READERS[config.source](config)
    for piece in raw.pieces:
        if not len(piece):
            raise no_rows(piece)
    return raw
