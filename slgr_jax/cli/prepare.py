"""Raw interactions to a dataset directory: read, filter, split, index, shard.

    slgr prepare --source=movielens --input=ml-1m.zip --out=DATA
    slgr prepare --source=recbole --input=recbole-1.2.1-py3-none-any.whl --out=DATA
    slgr prepare --source=csv --input=train.csv --test_input=test.csv --out=DATA
    slgr prepare --source=parquet --input=log.parquet --items_input=items.csv --out=DATA
    slgr prepare --source=jsonl --input=reviews.json --item_column=business_id --out=DATA
    slgr prepare --source=csv --input=a.tsv --delimiter=tab --columns=user,item --out=DATA
    slgr prepare --source=parquet --input=log.parquet --user_shards=128 --out=DATA
    slgr prepare --append=DATA --source=csv --input=today.csv --out=DATA2

The default split is by one moment for all users, so that no training interaction is later than
an evaluated one; a folder that Hugging Face `datasets` saved with its splits keeps them. Of a
pair that occurs twice the earliest row is kept (--keep). With --user_shards a process of a run
whose users are split over devices reads files of its own (docs/cluster.md). Ids are exact text.
Every line of every file is accounted for; a bad row is refused, or dropped and counted
(--bad_rows=drop).
"""

from __future__ import annotations

import resource
import sys

from slgr_jax import api
from slgr_jax.cli import flags
from slgr_jax.config import PrepareConfig

USAGE = __doc__ or ""


def main(_: list[str]) -> None:
    """Prepare, and say what was written, what was left out, and the peak memory."""
    knobs = flags.given_knobs(PrepareConfig)
    manifest = api.prepare(**knobs)

    from slgr_jax.data.ingest import prepare

    print(prepare.summary(manifest))
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"  peak memory: {peak_mib:,.0f} MiB")
    print(f"wrote {knobs['out']}")


def run() -> None:
    """`slgr prepare`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr prepare",
        sections=[PrepareConfig],
        required=["source", "input", "out"],
    )
