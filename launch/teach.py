"""Turn offline LLM answers into a teacher product of a dataset: DATA/teacher/NAME.

    python launch/teach.py import --data=DATA --scores=FILE --name=NAME
    python launch/teach.py score --data=DATA --name=NAME
    python launch/teach.py embed --data=DATA --name=NAME [--embedder=MODEL | --vectors=FILE]
    python launch/teach.py nearest --data=DATA --name=NAME [--listed=50] [--embeddings=EMBEDDED]
    python launch/teach.py candidates --data=DATA --name=NAME [--run=WORKDIR]
    python launch/teach.py requests --data=DATA --name=NAME --model=LLM [--dry_run]
    python launch/teach.py ask --data=DATA --name=NAME --base_url=URL [--concurrency=8]
    python launch/teach.py collect --data=DATA --name=NAME --results=FILE_OR_FOLDER[,...]
    python launch/teach.py combine --data=DATA --name=NAME --names=TEACHER,TEACHER[,...]
    python launch/teach.py inspect --data=DATA --name=NAME
    python launch/teach.py report --data=DATA --name=NAME [--out=FOLDER]

import: answers of any LLM, with the ids of the raw data.
score: a local language model scores items by their texts against each user's training history.
embed: vectors of items and users to DATA/embeddings/NAME, of a local model or from a file.
nearest: each user's nearest items by text vectors, as a list over the whole catalogue.
candidates: whom to ask about what, and what it will cost (--price_in, --max_requests, ...).
requests: prompts as batch-API files for any LLM: `vllm run-batch` or a hosted service;
  --open: only what has no whole answer yet.
ask: the same requests to a server that answers now; killed, it goes on.
collect: what came back to an answer log and a product; again over more results, it only adds.
combine: several teachers as one, by ranks or scores; --min_votes: only what so many answered.
inspect: check a product's shards and show what it is.
report: an audit of the teacher: where it is right, and whether the data know that already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def import_(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.products import preferences

    options = flags.section_from_flags(config.ImportConfig)
    if not options.scores:
        raise ConfigError("missing --scores; see --help")
    manifest = preferences.import_scores(
        data,
        options.scores,
        common.name,
        provenance=preferences.Provenance(
            built_from=options.built_from,
            unlisted=options.unlisted,
            training_items=options.training_items,
            model=common.model,
            prompt_hash=options.prompt_hash,
            score_kind=options.score_kind,
        ),
        unknown=options.unknown,
        duplicates=options.duplicates,
        keep_training_items=options.keep_training_items,
        delimiter=common.delimiter,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
        to_existing=options.append,
    )
    print(preferences.report(manifest))


def score(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.local import scorers
    from slgr_jax.teacher.products import preferences

    options = flags.section_from_flags(config.ScoreConfig)
    prompt = flags.section_from_flags(config.RequestConfig)
    scorer = scorers.make(data, options, history_items=prompt.history_items)
    manifest = scorers.score(
        *(data, common, options, flags.section_from_flags(config.CandidateConfig), scorer),
        candidate_set=prompt.candidate_set,
    )
    print(scorers.held_in_report(data, scorer, options))
    print(preferences.report(manifest))


def embed(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.local import embeddings

    options = flags.section_from_flags(config.EmbedConfig)
    stated = flags.section_from_flags(config.ImportConfig)
    if options.text_requests:
        count = embeddings.write_requests(data, options.text_requests, common.model)
        print(f"{count:,} embedding requests in {options.text_requests}")
        return
    manifest = embeddings.embed(
        *(data, common, options),
        llm=flags.section_from_flags(config.ScoreConfig).llm,
        built_from=stated.built_from,
        unknown=stated.unknown,
    )
    print(embeddings.report(manifest))


def candidates(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.data import shards
    from slgr_jax.teacher.ask import asking, prompts
    from slgr_jax.teacher.ask import candidates as sets
    from slgr_jax.teacher.local import scorers

    options = flags.section_from_flags(config.CandidateConfig)
    costs = flags.section_from_flags(config.RequestConfig)
    shards.check_target(sets.set_path(data.path, common.name), overwrite=common.overwrite)
    lines = prompts.item_lines(data)
    try:
        space, spread = scorers.item_vectors(data, scorers.WordLlama()), "the text space"
    except UserError:  # the extra `llm` is not installed
        space, spread = None, "popularity"
    proposed = None
    if options.run:
        from slgr_jax.training import hard_candidates  # JAX: only where a trained run is asked

        proposed = hard_candidates.propose(data, options)
    drawn = sets.draw(data, lines, options, seed=common.seed, space=space, proposed=proposed)
    planned = asking.plan(asking.asker(data, drawn, lines, costs, common.seed))
    print(planned.report())
    if not costs.dry_run:
        manifest = sets.write(
            *(data, common.name, drawn.of_users(planned.users), options),
            seed=common.seed,
            diversity=spread,
            rows_per_shard=common.rows_per_shard,
            overwrite=common.overwrite,
        )
        print(sets.report(manifest))


def requests(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.ask import asking, prompts
    from slgr_jax.teacher.ask import candidates as sets
    from slgr_jax.teacher.ask import requests as files

    options = flags.section_from_flags(config.RequestConfig)
    if options.open:
        root = files.directory(data.path, common.name, options.out)
        factors = _open_requests(data, common, options)
        written = files.write_open(root, files.read_manifest(root), factors)
        print(files.report_open(written, len(factors)))
        return
    drawn, source = sets.load(data, options.candidate_set or common.name)
    score_range = flags.section_from_flags(config.CollectConfig).score_range
    asker = asking.asker(
        data, drawn, prompts.item_lines(data), options, common.seed, score_range=score_range
    )
    planned = asking.plan(asker)
    print(planned.report(), flush=True)
    if not options.dry_run:
        root = files.directory(data.path, common.name, options.out)
        manifest = files.write(
            asker, planned, source, root, model=common.model, overwrite=common.overwrite
        )
        print(files.report(manifest, root))


def _open_requests(
    data: Dataset, common: config.TeachConfig, options: config.RequestConfig
) -> dict[str, int]:
    """custom_ids that lack a whole answer, and how many times the tokens their answers get."""
    from slgr_jax.teacher.collect import open_requests

    factors = {}
    for request in open_requests.open_requests(data, common.name, options.out):
        short = request.state == "cut" or request.reason.startswith(("cut off", "empty answer"))
        factors[request.custom_id] = options.more_tokens if short else 1
    return factors


def ask(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.ask import live, requests

    limits = flags.section_from_flags(config.RequestConfig)
    root = requests.directory(data.path, common.name, limits.out)
    only = _open_requests(data, common, limits) if limits.open else None
    options = flags.section_from_flags(config.AskConfig)
    print(live.ask(root, options, limits, only=only).report())


def collect(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.collect import answer_log as log
    from slgr_jax.teacher.products import preferences

    manifest, told = log.collect(data, common, flags.section_from_flags(config.CollectConfig))
    print(told)
    print(preferences.report(manifest))


def combine(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.products import combine as fusion
    from slgr_jax.teacher.products import preferences

    if flags.section_from_flags(config.ImportConfig).append:
        raise ConfigError(
            "combine cannot --append: more answers change ranks and means; combine all of them "
            "again with --overwrite"
        )
    manifest = fusion.combine(data, common, flags.section_from_flags(config.CombineConfig))
    print(preferences.report(manifest))


def nearest(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.local import nearest as lists
    from slgr_jax.teacher.products import preferences

    manifest = lists.write(data, common, flags.section_from_flags(config.NearestConfig))
    print(preferences.report(manifest))


def inspect(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.teacher.products import preferences

    print(preferences.report(preferences.load(data, common.name).manifest))


def report(data: Dataset, common: config.TeachConfig) -> None:
    from slgr_jax.reports import teacher_audit

    shared = flags.section_from_flags(config.RequestConfig)
    found = teacher_audit.make(
        *(data, common.name, flags.section_from_flags(config.ReportConfig)),
        prices=(shared.price_in, shared.price_out),
        seed=common.seed,
    )
    print(teacher_audit.terminal(found))
    out = shared.out or data.path / "reports" / common.name
    print("wrote " + ", ".join(map(str, teacher_audit.write(found, out))))


COMMANDS: Mapping[str, Callable[[Dataset, config.TeachConfig], None]] = {
    "import": import_,
    "score": score,
    "embed": embed,
    "nearest": nearest,
    "candidates": candidates,
    "requests": requests,
    "ask": ask,
    "collect": collect,
    "combine": combine,
    "inspect": inspect,
    "report": report,
}


def main(args: list[str]) -> None:
    common = flags.section_from_flags(config.TeachConfig)
    from slgr_jax.data import dataset

    COMMANDS[args[0]](dataset.load(common.data), common)


if __name__ == "__main__":
    flags.run(
        main,
        usage=__doc__,
        sections=config.TEACH_SECTIONS,
        required=("data", "name"),
        positional=tuple(COMMANDS),
    )
