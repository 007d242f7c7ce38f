"""Results of an LLM -> the answer log and its quarantine -> a teacher product (`collect`).

A second run over more results adds what is new, whatever a killed run has left: an answer that is
in the log counts as repeated where it says the same, and is quarantined where it does not. A whole
answer replaces one that was cut off.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from slgr_jax import progress
from slgr_jax.config import TEXT_PROMPTS, CollectConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.ask import candidates, prompts, requests
from slgr_jax.teacher.collect import (
    answer_log,
    derive,
    envelopes,
    prose_answers,
    quarantine,
    result_files,
    results,
)
from slgr_jax.teacher.collect.answer_log import AcceptedAnswer, Log
from slgr_jax.teacher.collect.completions import Completion
from slgr_jax.teacher.collect.quarantine import QUARANTINE
from slgr_jax.teacher.collect.refusals import KINDS, Refused
from slgr_jax.teacher.collect.request_index import RequestIndex
from slgr_jax.teacher.collect.result_files import Record, ResultFiles
from slgr_jax.teacher.collect.scales import ScaleTally
from slgr_jax.teacher.collect.shown import Shown
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.titles import TitleIndex


@dataclasses.dataclass
class Tally:
    """What became of the answers read: accepted + replaced + repeated + quarantined = read."""

    read: int = 0
    accepted: int = 0
    replaced: int = 0
    repeated: int = 0
    quarantined: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    details: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    scales: ScaleTally = dataclasses.field(default_factory=ScaleTally)

    def refuse(self, refused: Refused) -> None:
        """Count one that cannot be used."""
        self.quarantined += 1
        self.scales.refuse(refused)
        self.reasons[refused.kind] += 1
        details = self.details.setdefault(refused.kind, collections.Counter())
        if refused.detail in details or len(details) < 1000:
            details[refused.detail] += 1

    def report(self, log: pathlib.Path, states: dict[str, int]) -> str:
        """A few lines for people."""
        why = ", ".join(f"{kind} {count:,}" for kind, count in self.reasons.most_common())
        replaced = f"{self.replaced:,} in place of cut ones, " if self.replaced else ""
        asked = sum(states.values())
        rest = ", ".join(
            f"{states[state]:,} {state}"
            for state in ("cut", "refused", "failed", "missing")
            if states[state]
        )
        lines = [
            f"read {self.read:,} results: {self.accepted:,} accepted, {replaced}"
            f"{self.repeated:,} repeated, {self.quarantined:,} quarantined"
            + (f" ({why}): {log / QUARANTINE}" if self.quarantined else ""),
            *(self._explained(kind) for kind, _ in self.reasons.most_common()),
            f"  {states['complete']:,} of {asked:,} requests are complete"
            + (f"; open: {rest}" if rest else ""),
        ]
        return "\n".join(lines)

    def _explained(self, kind: str) -> str:
        """What to do about a kind, with its commonest detail."""
        ((detail, count),) = self.details[kind].most_common(1)
        seen = " ".join(detail.split())[:120]
        share = "" if count == self.reasons[kind] else "e.g. "
        return f"  {kind}{f' ({share}{seen})' if seen else ''}: {KINDS[kind].advice}"


def collect(
    dataset: Dataset, common: TeachConfig, options: CollectConfig
) -> tuple[schema.TeacherManifest, str]:
    """Add results to the log NAME and derive the product DATA/teacher/NAME from all of it.

    Returns:
      The product's manifest (its counts say how many requests are complete, cut, refused, failed
      and missing), and lines for people about what was read.

    Raises:
      InputError, ManifestError, ShardError: as `gather`.
    """
    gathered = gather(dataset, common, options, preferences.product_path(dataset.path, common.name))
    written = derive.write(
        dataset, common, options, gathered.rows, gathered.log, gathered.ledger, gathered.states
    )
    told = (gathered.told, _unknown_hidden(gathered.log, written))
    return written, "\n".join(filter(None, told))


class Gathered(NamedTuple):
    """An answer log, after results were added to it.

    Attributes:
      rows, log: as of `answer_log.load_log`.
      ledger: what ledger.json holds.
      states: how many requests are complete, cut, refused, failed and missing.
      told: lines for people about what was read.
    """

    rows: pa.Table
    log: schema.AnswerManifest
    ledger: dict[str, Any]
    states: dict[str, int]
    told: str


def gather(
    dataset: Dataset, common: TeachConfig, options: CollectConfig, product: pathlib.Path
) -> Gathered:
    """Add results to the log NAME, from all of which `product` is made.

    Raises:
      InputError: no result could be used, or a product NAME that is not of this log exists.
      ManifestError: requests or log are damaged or of another split.
      ShardError: a file of theirs is damaged.
    """
    if not options.results:
        raise ConfigError("missing --results; see slgr teach collect --help")
    score_range = _score_range(options)
    root = answer_log.log_path(dataset.path, common.name)
    asked = requests.directory(dataset.path, common.name, options.requests)
    source = schema.read_request_manifest(asked)
    candidates.refuse_other_split(dataset, source, f"{asked}")
    files = result_files.choose(options.results, asked)
    if not (root / schema.MANIFEST).is_file():
        shards.check_target(product, overwrite=common.overwrite)

    index = RequestIndex(requests.load_index(asked, source))
    fields = tuple(source.plan["fields"]) if source.prompt in TEXT_PROMPTS else ()
    root.mkdir(parents=True, exist_ok=True)
    with shards.locked(root):
        manifest = _manifest(dataset, common, root, source)
        index.remember(shards.read_shards(root, manifest.files["answered"], schema.ANSWERED))
        log = Log(root, manifest, common.rows_per_shard)
        collector = Collector(
            index,
            log,
            () if fields else item_titles(dataset),
            source.prompt,
            score_range,
            list_size=int(source.options["list_size"]),
            catalogue=TitleIndex.of(dataset) if source.prompt == "free_list" else None,
            subtitles=common.subtitles,
            fields=fields,
        )
        try:
            collector.read(files)
        finally:
            log.close()
        manifest = log.manifest
        answered = shards.read_shards(
            root, manifest.files["answered"], schema.ANSWERED, verify=False
        )
        ledger = log.write_ledger(answered)

    refusals = quarantine.states(quarantine.read(root, manifest.files["quarantine"]))
    states = answer_log.request_counts(manifest, answered, refusals)
    tally = collector.tally
    used = tally.accepted + tally.replaced + tally.repeated
    if not manifest.files["answers"] or (tally.read and not used):
        commonest = [f"{kind}: {KINDS[kind].advice}" for kind, _ in tally.reasons.most_common(1)]
        raise InputError(
            f"none of the {tally.read} results in {listing(map(str, files.paths), 3)} can be used: "
            f"{listing(f'{kind} {count}' for kind, count in tally.reasons.most_common())}; "
            f"see {root / QUARANTINE}" + "".join(f". {advice}" for advice in commonest)
        )
    rows, manifest = answer_log.load_log(dataset, common.name)
    told = "\n".join(filter(None, (tally.report(root, states), files.report())))
    return Gathered(rows, manifest, ledger, states, told)


def _unknown_hidden(log: schema.AnswerManifest, written: schema.TeacherManifest) -> str:
    """A line where prompts hid training items and nobody knows any more which ones."""
    hid = any(source["training_items"] == "hidden" for source in log.sources)
    if not hid or written.training_items == "hidden":
        return ""
    sets = listing(sorted({str(source["candidates"]) for source in log.sources}))
    return (
        f"  the candidate set {sets} is not what was asked with: which training items its prompts "
        "hid is lost, and all answers on training items are dropped"
    )


def _score_range(options: CollectConfig) -> tuple[float, float]:
    if len(options.score_range) != 2 or options.score_range[0] >= options.score_range[1]:
        shown = ",".join(map(str, options.score_range))
        raise ConfigError(f"--score_range={shown} is not a lowest and a highest score, e.g. 0,1")
    return float(options.score_range[0]), float(options.score_range[1])


def _manifest(
    dataset: Dataset, common: TeachConfig, root: pathlib.Path, source: schema.RequestManifest
) -> schema.AnswerManifest:
    """The log's manifest with these requests among its sources, written."""
    about = {
        "fingerprint": source.fingerprint,
        "prompt": source.prompt,
        "template_hash": source.template_hash,
        "model": common.model or source.model,
        "training_items": source.training_items,
        "logprobs": bool(source.options["logprobs"]),
        "candidates": source.candidates,
        "candidates_hash": source.candidates_hash,
        "requests": int(source.plan["requests"]),
        **{key: source.plan[key] for key in ("side", "fields", "shown") if key in source.plan},
    }
    if (root / schema.MANIFEST).is_file():
        manifest = answer_log.read_manifest(dataset, common.name)
        kinds = {_kind(held) for held in manifest.sources}
        if kinds and kinds != {_kind(about)}:
            raise ConfigError(
                f"{root} holds answers to {manifest.sources[0]['prompt']} prompts, which do not "
                f"mix with {source.prompt} ones; choose another --name"
            )
        if any(held["fingerprint"] == source.fingerprint for held in manifest.sources):
            return manifest
        manifest = dataclasses.replace(manifest, sources=(*manifest.sources, about))
    else:
        manifest = schema.AnswerManifest(
            name=common.name,
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            sources=(about,),
            counts={},
            files={"answers": (), "answered": (), "quarantine": ()},
        )
    return schema.write_manifest(root, manifest)


def _kind(about: Mapping[str, Any]) -> str:
    """Answers of one kind go into one product."""
    prompt = str(about["prompt"])
    if prompt in TEXT_PROMPTS:
        return f"{prompt}: {', '.join(about['fields'])}"
    return prompt if prompt in ("pairwise", "free_list") else "scores"


# --- reading results into the log --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collector:
    """Reads results into a log.

    Attributes:
      index: the requests that were asked; log: where answers go.
      titles: [I] the texts that stand for each item (`item_titles`).
      form: of the answers, one of `config.PROMPTS` or of `TEXT_PROMPTS`; score_range: lowest and
        highest score.
      list_size: free_list: how many titles were asked for; catalogue, subtitles: what they are
        looked up in, and how.
      fields: of answers that are texts; else there are none.
      tally: what became of what was read.
    """

    index: RequestIndex
    log: Log
    titles: Sequence[tuple[str, ...]]
    form: str
    score_range: tuple[float, float]
    list_size: int = 0
    catalogue: TitleIndex | None = None
    subtitles: bool = False
    fields: tuple[str, ...] = ()
    tally: Tally = dataclasses.field(default_factory=Tally)

    def read(self, files: ResultFiles) -> None:
        """Take in every record of every file; the log is whole on disk afterwards.

        Raises:
          InputError: a file cannot be read, or most scores are on another scale.
        """
        total = sum(path.stat().st_size for path in files.paths)
        with progress.bar(total, "B", scale=True) as bar:
            for path in files.paths:
                for record in result_files.records(path):
                    self._take_record(record)
                bar.update(path.stat().st_size)
        self._flush()

    def _flush(self) -> None:
        self.tally.scales.refuse_other_scale(self.score_range)
        self.log.flush()

    def _take_record(self, record: Record) -> None:
        for sample, told in enumerate(envelopes.read_line(record.line)):
            self.tally.read += 1
            refused = told if isinstance(told, Refused) else self._take(told)
            if refused is None:
                continue
            self.tally.refuse(refused)
            row = self.index.find(refused.custom_id)
            self.log.quarantine.add(
                record.line,
                refused,
                source=record.source,
                request=None if row is None else int(self.index.requests[row]),
                sample=sample,
                paid=told.usage if isinstance(told, Completion) else {},
            )

    def _take(self, told: Completion) -> Refused | None:
        """Accept an answer, or say why not."""
        index, tally = self.index, self.tally
        row = index.find(told.custom_id)
        if row is None:
            asked = f"{told.custom_id!r} is of none of the {index.requests.size:,} requests"
            return Refused(told.custom_id, "foreign custom_id", asked)
        answer = (
            prose_answers.parse(told, self.fields)
            if self.fields
            else results.parse(self.form, told, self._shown(row), self.score_range)
        )
        if isinstance(answer, Refused):
            return answer
        if self.catalogue is not None:
            matches = self.catalogue.match(answer.titles, subtitles=self.subtitles)
            if all(match.item < 0 for match in matches):
                seen = ", ".join(answer.titles[:3])
                return Refused(
                    told.custom_id, "none of the catalogue", f"{len(matches)} titles: {seen}"
                )

        digest = _digest(answer)
        known = index.known(row, told.sample)
        replaces = known is not None and known[1] and not answer.cut
        if known is not None and not replaces:
            if known[0] == digest or answer.cut:  # what is held says the same, or more
                tally.repeated += 1
                return None
            return Refused(
                told.custom_id, "another answer", "the request has an answer that differs"
            )
        index.accept(row, told.sample, digest, cut=answer.cut)
        accepted = AcceptedAnswer(
            row=row,
            sample=told.sample,
            scores=answer.scores,
            digest=digest,
            cut=answer.cut,
            prompt_tokens=told.prompt_tokens,
            completion_tokens=told.completion_tokens,
            words=answer.titles or answer.texts,
        )
        self.log.add(index, accepted)
        tally.replaced += replaces
        tally.accepted += not replaces
        if self.form == "listwise":
            tally.scales.add(answer.scores)
        if self.log.full:
            self._flush()
        return None

    def _shown(self, row: int) -> Shown:
        """What a request showed; of a free list only how many titles it asked for."""
        if self.catalogue is not None:
            return Shown(self.list_size)
        items = self.index.shown(row)
        return Shown(items.size, [self.titles[item] for item in items])


def _digest(answer: results.Answer) -> int:
    words = "\0".join(answer.texts) or "\n".join(answer.titles)
    data = answer.scores.tobytes() + bytes([answer.cut]) + words.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def item_titles(dataset: Dataset) -> list[tuple[str, ...]]:
    """[I] the line that prompts show of each item, and its title alone."""
    titles = dataset.items.column("title").to_pylist()
    lines = prompts.item_lines(dataset)
    return [
        (line, " ".join((title or "").split())) for line, title in zip(lines, titles, strict=True)
    ]
