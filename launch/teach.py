"""Turn offline LLM answers into a teacher product of a dataset: DATA/teacher/NAME.

    python launch/teach.py import --data=DATA --scores=FILE --name=NAME
    python launch/teach.py score --data=DATA --name=NAME
    python launch/teach.py inspect --data=DATA --name=NAME

import: answers of any LLM, with the ids of the raw data.
score: a small local language model scores item texts against each user's training history.
inspect: check a product's shards and show what it is.
"""

from __future__ import annotations

from slgr_jax import config, flags
from slgr_jax.errors import ConfigError


def main(args: list[str]) -> None:
    options = flags.section_from_flags(config.TeachConfig)
    if args[0] == "import" and not options.scores:
        raise ConfigError("missing --scores; see --help")
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher import preferences

    data = dataset_lib.load(options.data)
    if args[0] == "import":
        manifest = preferences.import_scores(
            data,
            options.scores,
            options.name,
            provenance=preferences.Provenance(
                built_from=options.built_from,
                unlisted=options.unlisted,
                model=options.model,
                prompt_hash=options.prompt_hash,
                score_kind=options.score_kind,
            ),
            unknown=options.unknown,
            duplicates=options.duplicates,
            delimiter=options.delimiter,
            rows_per_shard=options.rows_per_shard,
            overwrite=options.overwrite,
        )
    elif args[0] == "score":
        from slgr_jax.teacher import scorers

        manifest = scorers.score(data, options)
        print(scorers.held_in_report(data, scorers.make(options.scorer)))
    else:
        manifest = preferences.load(data, options.name).manifest
    print(preferences.report(manifest))


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=[config.TeachConfig],
        required=("data", "name"),
        positional=("import", "score", "inspect"),
    )
