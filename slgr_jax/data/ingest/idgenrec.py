"""IDGenRec data sets: user_sequence.txt, and keywords of items. See `raw.Raw`.

The folders rec_datasets/{Beauty,Sports,Toys,Yelp} of github.com/agiresearch/IDGenRec (Tan et al.,
SIGIR 2024). A line of user_sequence.txt is a user id and that user's item ids, oldest first,
separated by spaces: the users, items and interactions of S3-Rec with Amazon's own ids. A line of
item_generative_indexing_phase_0.txt is an item id and, after the first space, keywords that a
language model wrote from the item's title, brand, categories and description.
"""

from __future__ import annotations

import pathlib

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import s3rec, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.bad_rows import LineCount
from slgr_jax.data.ingest.raw import Raw, nothing
from slgr_jax.data.ingest.texts import Texts

_SEQUENCES = "user_sequence.txt"
_KEYWORDS = "item_generative_indexing_phase_0.txt"


def sequences(config: PrepareConfig) -> Raw:
    """user_sequence.txt of the folder --name; keywords beside it as the items' texts.

    Raises:
      InputError: a file is empty or damaged, a user has no items or has two lines.
      ConfigError: a split that compares the times of different users.
    """
    s3rec.check_knobs(config)
    files = Files(config.input)
    name = files.choose(lambda n: n == _SEQUENCES, _SEQUENCES, config.name)
    keywords = files.beside(name, _KEYWORDS)
    folder = pathlib.Path(files.where(name)).resolve().parent.name
    return Raw(
        (s3rec.read(files, name, config),),
        (files,),
        lambda _: None if keywords is None else _items(files, keywords, config),
        nothing,
        name=folder,
    )


def _items(files: Files, name: str, config: PrepareConfig) -> Texts | None:
    """Items with their keywords as text."""
    count = LineCount(files.where(name))
    text, count.note = files.text(name, config.encoding)
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for line in lines:
        count.lines += 1
        item, _, keywords = line.strip().partition(" ")
        if not item:
            count.blank += 1
            continue
        # The published Beauty has an item without keywords.
        rows.append({"item_id": item, "text": keywords or None})
    count.rows = len(rows)
    return texts.beside(rows, schema.ITEMS, count)
