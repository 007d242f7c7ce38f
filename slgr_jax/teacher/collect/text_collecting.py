"""Results of an LLM that wrote about users or items -> the answer log -> DATA/texts/NAME.

The log, its quarantine and what is open are those of `collecting.py`. Of several answers about one
user or item (samples of a request, requests of two templates) the first in the log is its text.
"""

from __future__ import annotations

import numpy as np

from slgr_jax.config import CollectConfig, TeachConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.teacher.collect import answer_log, collecting
from slgr_jax.teacher.products import texts
from slgr_jax.teacher.products.texts import Texts


def collect(dataset: Dataset, common: TeachConfig, options: CollectConfig) -> tuple[Texts, str]:
    """Add results to the log NAME and make the product DATA/texts/NAME from all of it.

    Returns:
      The product (counts of its manifest say how many requests are complete, refused, failed and
      missing), and lines for people about what was read.

    Raises:
      InputError, ManifestError, ShardError: as `collecting.gather`.
    """
    product = texts.product_path(dataset.path, common.name)
    gathered = collecting.gather(dataset, common, options, product)
    sources, ledger = gathered.log.sources, gathered.ledger

    def joined(key: str) -> str:
        return "+".join(dict.fromkeys(str(source[key]) for source in sources))

    rows, fields, written, empty = _first_of_each(gathered)
    counts = {
        **{f"{state}_requests": count for state, count in gathered.states.items()},
        "empty_texts": empty,
        "quarantined": int(ledger["quarantined"]["answers"]),
        "prompt_tokens": int(ledger["accepted"]["prompt_tokens"]),
        "completion_tokens": int(ledger["accepted"]["completion_tokens"]),
    }
    made = texts.write(
        dataset,
        common.name,
        rows,
        fields,
        written,
        about={
            "model": joined("model"),
            "prompt": sources[0]["prompt"],
            "prompt_hash": joined("template_hash"),
            "side": sources[0]["side"],
            "fields": tuple(sources[0]["fields"]),
            "shown": joined("shown"),
        },
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=True,
    )
    return made, gathered.told


def _first_of_each(
    gathered: collecting.Gathered,
) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """Row, field and words of each text of the first answers, and how many texts are empty."""
    table = gathered.rows
    rows, fields = (table.column(name).to_numpy() for name in ("row", "position"))
    answer = answer_log.answer_numbers(table)
    begins = np.flatnonzero(fields == 0)
    first = np.zeros(begins.size, bool)
    first[np.unique(rows[begins], return_index=True)[1]] = True

    written = np.array(table.column("text").to_pylist(), object)
    chosen = first[answer]
    some = chosen & (written != "")
    return rows[some], fields[some], written[some].tolist(), int((chosen & ~some).sum())
