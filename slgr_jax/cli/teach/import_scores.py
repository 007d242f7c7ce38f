"""Answers of any LLM, with the ids of the raw data, from a file of your own.

    slgr teach import --data=DATA --name=my_llm --scores=answers.csv --model=some-llm
    slgr teach import --data=DATA --name=my_lists --scores=lists.parquet --unlisted=below
    slgr teach import --data=DATA --name=my_lists --scores=titles.csv --items_as=titles
    slgr teach import --data=DATA --name=my_lists --scores=FOLDER --items_as=titles
    slgr teach import --data=DATA --name=my_llm --scores=more.csv --append
    slgr teach import --data=DATA --name=taken --interactions=pairs.csv
    slgr teach import --data=DATA --name=noise --edits=noise.csv

The file has user, item, score (an empty score: not answered), or user, item, rank (1 the best), or
user, preferred, other[, margin]. A folder has an answer a user, as the model wrote it: a text file
user_12.txt or user_12_ANYTHING.txt with a list of titles. --interactions: a file with user,
item[, weight] of what users take in the LLM's word, for slgr train --guidance=interactions.
--edits: a file with user, item or position, noise[, replacement] of which training interactions the
LLM takes for noise, for slgr train --edits=NAME.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import api, config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Import, and say what the product is and what it assumes."""
    from slgr_jax.teacher.products import edits, preferences

    knobs = flags.given_knobs(config.TeachConfig, config.ImportConfig)
    if "edits" in knobs:
        api.import_edits(**{**knobs, "data": dataset})
        print(edits.report(edits.load(dataset, common.name)))
        return
    read = api.import_interactions if "interactions" in knobs else api.import_teacher
    print(preferences.report(read(**{**knobs, "data": dataset})))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=api.IMPORT_COMMON,
    sections=(config.ImportConfig,),
    required=("scores",),
    stand_ins={"scores": ("interactions", "edits")},
)
