"""The knobs of slgr prepare."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import WIDTH, Section, knob

# Layouts of which a line is a user's whole sequence: an item's place in it stands for its time.
SEQUENCE_SOURCES = ("s3rec", "idgenrec", "llmrank")
# Layouts with the split of their authors, whose language models were shown all of training.
SHOWN_SOURCES = ("sisinf", "gearrec")
SOURCES = (
    *("movielens", "recbole", "amazon", *SHOWN_SOURCES, *SEQUENCE_SOURCES),
    *("csv", "jsonl", "parquet"),
)
SPLITS = ("auto", "global_time", "leave_last", "ratio", "premade")


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Section):
    """Raw files to a dataset directory."""

    source: str = knob("", "layout of the input", choices=("", *SOURCES))
    input: str = knob("", "file, folder, or zip archive (a .whl is one) with the raw data")
    test_input: str = knob("", "rows of a pre-made test split, same layout as --input")
    valid_input: str = knob("", "rows of a pre-made validation split, same layout as --input")
    out: str = knob("", "dataset directory to write; must not exist")
    append: str = knob(
        "",
        "dataset directory to which --input is added: users and items keep their index, new ones "
        "come after them, settings are that dataset's, and the split is made anew; it stays as it "
        "is, --out is another",
    )
    name: str = knob("", "data set inside --input where it holds several; also the name in reports")
    split: str = knob(
        "auto",
        "split rule; auto = global_time where there are timestamps, else ratio; s3rec, idgenrec "
        "and llmrank need leave_last or ratio; premade = take --test_input/--valid_input or "
        "--split_column as they are",
        choices=SPLITS,
    )
    split_column: str = knob("", "column that says train, valid or test (with --split=premade)")
    valid_fraction: float = knob(
        0.1, "share of interactions for validation (ratio, global_time)", above=0, below=1
    )
    test_fraction: float = knob(
        0.1, "share of interactions for test (ratio, global_time)", above=0, below=1
    )
    valid_from: str = knob(
        "auto",
        "of a pre-made split without a validation part: cut --valid_fraction off the training rows "
        "(train), or take half of each user's test rows (test: where a teacher was shown the whole "
        "training part); auto = test for sisinf and gearrec, else train",
        choices=("auto", "train", "test"),
    )
    ratio_by: str = knob(
        "all", "ratio split: shuffle all rows together, or each user's", choices=("all", "user")
    )
    seed: int = knob(0, "seed of the ratio split, and of --valid_from=test", minimum=0)
    user_core: int = knob(1, "drop users with fewer interactions, repeatedly (k-core)", minimum=1)
    item_core: int = knob(1, "drop items with fewer interactions, repeatedly (k-core)", minimum=1)
    min_rating: float = knob(
        float("-inf"), "drop interactions rated below this; -inf keeps all", flag="min_rating"
    )
    keep: str = knob(
        "first",
        "of a pair that occurs several times: the earliest row, the latest, or the best rated",
        choices=("first", "last", "highest"),
    )
    count_repeats: bool = knob(
        False, "write how often each pair occurs as its rating (play counts); needs no ratings"
    )
    bad_rows: str = knob(
        "refuse",
        "a row that cannot be read or used: stop at the first, or drop all, count them and show "
        "five",
        choices=("refuse", "drop"),
    )
    user_column: str = knob("user", "csv, jsonl, parquet: column with user ids (any text)")
    item_column: str = knob("item", "csv, jsonl, parquet: column with item ids (any text)")
    time_column: str = knob(
        "timestamp",
        "csv, jsonl, parquet: column with times (s, ms, us, ns or dates); used if present",
    )
    rating_column: str = knob("rating", "csv, jsonl, parquet: column with ratings; used if present")
    columns: str = knob(
        "", "csv without a header line: its column names in order, as user,item,rating,timestamp"
    )
    items_input: str = knob(
        "",
        "csv, jsonl, parquet, s3rec: item table (csv, JSON lines, Parquet or Arrow with "
        "--item_column) to attach; amazon: metadata jsonl",
    )
    keep_items: bool = knob(
        False,
        "items of the item table without interactions (or that a filter left none) stay in the "
        "catalogue, behind the others: candidates everywhere, tail; uniform negatives are drawn "
        "from them too, popularity's never",
    )
    title_column: str = knob("title", "--items_input: column with titles; used if present")
    text_column: str = knob("text", "--items_input: column with descriptions; used if present")
    categories_column: str = knob(
        "categories", "--items_input: column with lists, or text split at '|'; used if present"
    )
    items_columns: str = knob("", "--items_input without a header line: its column names in order")
    users_input: str = knob(
        "", "csv, jsonl, parquet: user table (csv, Parquet or Arrow with --user_column) to attach"
    )
    users_columns: str = knob("", "--users_input without a header line: its column names in order")
    user_features: str = knob(
        "",
        "columns of the user table to keep as features, as age:numeric,gender,tags:multi(;): "
        "kinds are categorical, multi (split at '|') and numeric. Empty: of recbole all that its "
        "header types but postal codes, of movielens all, else none; none = none",
    )
    item_features: str = knob(
        "", "likewise of the item table (--items_input); its categories are a feature anyway"
    )
    interaction_features: str = knob(
        "",
        "likewise of the interactions' own columns, as hour:categorical,device (csv, Parquet, "
        "recbole): what holds while a user is asked, never what came of it. Empty: none",
    )
    delimiter: str = knob(",", "csv: column separator; tab is '\\t'")
    quote: str = knob(
        "auto", "csv: character around quoted fields, or none; auto = '\"', none between tabs"
    )
    escape: str = knob("", "csv: character that makes the next one plain, as '\\'; empty = none")
    encoding: str = knob(
        "auto",
        "of text files, as cp1252 or utf-16; auto = UTF-8 (or what a byte order mark says), and "
        "cp1252 for item and user texts that are no UTF-8",
    )
    decimal: str = knob(".", "character before the fraction in ratings and times that are text")
    time_format: str = knob(
        "", "how times are written, as '%d/%m/%Y %H:%M' (Python's strptime; no zone is UTC)"
    )
    user_shards: int = knob(
        0,
        "V parts of the users, each one range of their indices, with files of its own: what a "
        "process of `slgr train --user_shards=V` (or a divisor of it) reads of interactions and "
        "teachers. Indices are others than without it, so products are made anew. 0: users in the "
        "order of their ids",
        minimum=0,
        maximum=WIDTH,
    )
    rows_per_shard: int = knob(4_194_304, "most interactions in one Arrow shard", minimum=1)
    memory: float = knob(
        0.0,
        "csv, parquet: gigabytes (2^30 bytes) for rows that are held at once; a larger input is "
        "sorted in temporary files, to the same dataset. Ids, and 8 to 12 bytes a row while it is "
        "split, come on top. 0: half of what is free now",
        minimum=0,
    )
    temp_dir: str = knob("", "directory for these files, up to 50 bytes a row; empty: beside --out")
    overwrite: bool = knob(False, "replace --out when it exists")
