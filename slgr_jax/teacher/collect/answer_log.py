"""Batch-API results -> an append-only answer log -> a teacher product.

    DATA/answers/NAME/manifest.json            replaced after every shard
    DATA/answers/NAME/answers-00000.arrow      scores as parsed: schema.ANSWERS
    DATA/answers/NAME/answered-00000.arrow     a row an accepted answer: schema.ANSWERED
    DATA/answers/NAME/quarantine.jsonl         what could not be used, and why
    DATA/answers/NAME/ledger.json              what was paid for: tokens

Results are joined with the requests' index by `custom_id` alone. An answer that is already in the
log counts as repeated where it says the same, and is quarantined where it does not; so a second
run over more results adds what is new, whatever a killed run has left.

Shape letters: U users, I items, R requests, n rows of the log.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import tqdm

from slgr_jax.config import CollectConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.ask import candidates, requests
from slgr_jax.teacher.collect import derive, results
from slgr_jax.teacher.collect.results import Answer, Completion, Refused
from slgr_jax.teacher.products import preferences

PathLike = str | os.PathLike[str]

QUARANTINE, LEDGER = "quarantine.jsonl", "ledger.json"
_MOST_SHOWN = 2000  # characters of a line that the quarantine keeps


def log_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/answers/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / schema.ANSWERS_DIR / preferences.product_path(data, name).name


def load_log(dataset: Dataset, name: str) -> tuple[pa.Table, schema.AnswerManifest]:
    """Every row of the log NAME (schema.ANSWERS) and its manifest.

    Raises:
      ManifestError: there is none, or it is of another split or id map.
      ShardError: a shard is missing, truncated or corrupt.
    """
    root = log_path(dataset.path, name)
    manifest = schema.read_answer_manifest(root)
    candidates.refuse_other_split(dataset, manifest, f"answer log {name!r}")
    return shards.read_shards(root, manifest.files["answers"], schema.ANSWERS), manifest


@dataclasses.dataclass
class Tally:
    """What became of the lines that were read: accepted + repeated + quarantined = read."""

    read: int = 0
    accepted: int = 0
    repeated: int = 0
    quarantined: int = 0
    clipped: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def report(self, log: pathlib.Path, answered: int, asked: int) -> str:
        """Two lines for people."""
        why = ", ".join(f"{kind} {count:,}" for kind, count in self.reasons.most_common())
        lines = [
            f"read {self.read:,} results: {self.accepted:,} accepted, {self.repeated:,} repeated, "
            f"{self.quarantined:,} quarantined"
            + (f" ({why}): {log / QUARANTINE}" if self.quarantined else ""),
            f"  {answered:,} of {asked:,} requests are answered",
        ]
        if self.clipped:
            lines.append(f"  {self.clipped:,} scores were outside --score_range and clipped to it")
        return "\n".join(lines)


# --- reading results into the log --------------------------------------------------------------


class _Index:
    """Requests by `custom_id`, and what is known of their answers.

    Attributes:
      requests, users, permutations: [R]; items of request r are
        `items[offsets[r]:offsets[r + 1]]`.
      digests: [R] int64 of the accepted answers; answered: [R] bool.
    """

    def __init__(self, table: pa.Table) -> None:
        ids = [np.array(chunk.to_pylist(), "S") for chunk in table.column("custom_id").chunks]
        names = np.concatenate([np.zeros(0, "S1"), *ids])
        self._order = np.argsort(names, kind="stable")
        self._names = names[self._order]
        table = table.combine_chunks()
        self.requests, self.users, self.permutations = (
            table.column(name).to_numpy() for name in ("request", "user", "permutation")
        )
        lists = [chunk.flatten().to_numpy() for chunk in table.column("items").chunks]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column("items").chunks]
        self.items = np.concatenate([np.zeros(0, np.int32), *lists])
        self.offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        self.digests = np.zeros(self.requests.size, np.int64)
        self.answered = np.zeros(self.requests.size, bool)

    def find(self, custom_id: str) -> int | None:
        """The row of the request with this id."""
        name = custom_id.encode("utf-8", "surrogatepass")
        at = int(np.searchsorted(self._names, np.bytes_(name)))
        if at < self._names.size and self._names[at] == name:
            return int(self._order[at])
        return None

    def remember(self, answered: pa.Table) -> None:
        """Take over what the log already holds of these requests."""
        known, digests = (answered.column(k).to_numpy() for k in ("request", "digest"))
        order = np.argsort(self.requests)
        at = np.searchsorted(self.requests[order], known)
        at = order[np.minimum(at, order.size - 1)] if order.size else at[:0]
        ours = self.requests[at] == known if order.size else np.zeros(0, bool)
        self.digests[at[ours]], self.answered[at[ours]] = digests[ours], True


class _Log:
    """An answer log that is being added to."""

    def __init__(
        self, root: pathlib.Path, manifest: schema.AnswerManifest, rows_per_shard: int
    ) -> None:
        self.root, self.manifest, self._limit = root, manifest, rows_per_shard
        self._answers: list[tuple[np.ndarray, ...]] = []
        self._answered: list[tuple[int, int, int | None, int | None]] = []
        self._rows = self._clipped = 0
        self._quarantine, self._known = _open_quarantine(root / QUARANTINE)

    def add(self, index: _Index, row: int, digest: int, found: Answer, told: Completion) -> None:
        """Take in one accepted answer."""
        items = index.items[index.offsets[row] : index.offsets[row + 1]]
        paired = found.scores.size < items.size
        size = found.scores.size
        self._answers.append(
            (
                np.full(size, index.requests[row]),
                np.full(size, index.users[row]),
                items[:size],
                items[1:2] if paired else np.full(size, -1, np.int32),
                np.arange(size, dtype=np.int32),
                np.full(size, index.permutations[row]),
                found.scores,
            )
        )
        request = int(index.requests[row])
        self._answered.append((request, digest, told.prompt_tokens, told.completion_tokens))
        self._rows += size
        self._clipped += found.clipped
        if self._rows >= self._limit:
            self.flush()

    def quarantine(
        self, line: bytes, refused: Refused, source: str, paid: Completion | None
    ) -> None:
        """Keep a line that cannot be used, once."""
        digest = hashlib.blake2b(line, digest_size=8).hexdigest()
        if digest in self._known:
            return
        self._known.add(digest)
        entry: dict[str, Any] = {
            "custom_id": refused.custom_id,
            "reason": refused.kind,
            "detail": refused.detail,
            "source": source,
            "digest": digest,
            "line": line.decode("utf-8", "replace")[:_MOST_SHOWN],
        }
        if paid is not None:
            entry["prompt_tokens"] = paid.prompt_tokens
            entry["completion_tokens"] = paid.completion_tokens
        self._quarantine.write(json.dumps(entry).encode() + b"\n")

    def flush(self) -> None:
        """Put what was taken in on disk: shards first, then the manifest that lists them."""
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        if not self._answered:
            return
        columns = [np.concatenate(column) for column in zip(*self._answers, strict=True)]
        arrays = [pa.array(column) for column in columns]
        arrays[3] = pa.array(columns[3], mask=columns[3] < 0)
        arrays[6] = pa.array(columns[6], mask=np.isnan(columns[6]))
        files = self.manifest.files
        number = len(files["answers"])
        answered = [list(column) for column in zip(*self._answered, strict=True)]
        made = {
            "answers": pa.table(arrays, schema=schema.ANSWERS),
            "answered": pa.table(answered, schema=schema.ANSWERED),
        }
        counts = dict(self.manifest.counts)
        counts["clipped"] = counts.get("clipped", 0) + self._clipped
        self.manifest = dataclasses.replace(
            self.manifest,
            counts=counts,
            files={
                key: (
                    *files[key],
                    shards.write_shard(self.root, f"{key}-{number:05d}.arrow", table),
                )
                for key, table in made.items()
            },
        )
        schema.write_manifest(self.root, self.manifest)
        self._answers, self._answered, self._rows, self._clipped = [], [], 0, 0

    def close(self) -> None:
        self._quarantine.close()


def _open_quarantine(path: pathlib.Path) -> tuple[BinaryIO, set[str]]:
    """The file to append to, without a line that was cut off, and the digests it holds."""
    known = set()
    whole = 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                known.add(json.loads(line)["digest"])
        os.truncate(path, whole)
    return open(path, "ab"), known


def result_files(given: str, asked: pathlib.Path) -> list[pathlib.Path]:
    """Files named by `--results`: each a file, or a folder of .jsonl files at any depth.

    Request files and quarantines in a folder are passed over.

    Raises:
      InputError: a path does not exist, or there is no file.
    """
    found: list[pathlib.Path] = []
    requested = {path.resolve() for path in asked.glob("requests-*.jsonl")}
    for part in filter(None, map(str.strip, given.split(","))):
        path = pathlib.Path(part)
        if not path.exists():
            raise InputError(f"--results={part} does not exist")
        inside = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        found += [
            one for one in inside if one.resolve() not in requested and one.name != QUARANTINE
        ]
    if not found:
        raise InputError(f"--results={given} names no .jsonl file of results")
    return found


def _read(
    files: list[pathlib.Path],
    index: _Index,
    log: _Log,
    form: str,
    score_range: tuple[float, float],
) -> Tally:
    tally = Tally()
    total = sum(path.stat().st_size for path in files)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for path, number, line in _lines(files):
            bar.update(len(line))
            if not line.strip():
                continue
            tally.read += 1
            told = results.read_line(line)
            refused = told if isinstance(told, Refused) else None
            if isinstance(told, Completion):
                refused = _take(told, index, log, form, score_range, tally)
            if refused is not None:
                tally.quarantined += 1
                tally.reasons[refused.kind] += 1
                paid = told if isinstance(told, Completion) else None
                log.quarantine(line, refused, f"{path.name}:{number}", paid)
    log.flush()
    return tally


def _lines(files: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, int, bytes]]:
    for path in files:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield path, number, line


def _take(
    told: Completion,
    index: _Index,
    log: _Log,
    form: str,
    score_range: tuple[float, float],
    tally: Tally,
) -> Refused | None:
    row = index.find(told.custom_id)
    if row is None:
        return Refused(told.custom_id, "foreign custom_id", "no request of these has it")
    shown = int(index.offsets[row + 1] - index.offsets[row])
    found = results.parse(form, told, shown, score_range)
    if isinstance(found, Refused):
        return found
    digest = hashlib.blake2b(found.scores.tobytes(), digest_size=8).digest()
    value = int.from_bytes(digest, "little", signed=True)
    if index.answered[row]:
        if index.digests[row] == value:
            tally.repeated += 1
            return None
        return Refused(told.custom_id, "another answer", "the request has an answer that differs")
    index.answered[row], index.digests[row] = True, value
    log.add(index, row, value, found, told)
    tally.accepted += 1
    tally.clipped += found.clipped
    return None


# --- the command -------------------------------------------------------------------------------


def collect(
    dataset: Dataset, common: TeachConfig, options: CollectConfig
) -> tuple[schema.TeacherManifest, str]:
    """Add results to the log NAME and derive the product DATA/teacher/NAME from all of it.

    Returns:
      The product's manifest, and lines for people about what was read.

    Raises:
      InputError: no result could be used, or a product NAME that is not of this log exists.
      ManifestError: requests or log are of another split.
    """
    if not options.results:
        raise ConfigError("missing --results; see --help")
    low, high = _score_range(options)
    root = log_path(dataset.path, common.name)
    asked = requests.directory(dataset.path, common.name, options.requests)
    source = schema.read_request_manifest(asked)
    candidates.refuse_other_split(dataset, source, f"{asked}")
    files = result_files(options.results, asked)
    product = preferences.product_path(dataset.path, common.name)
    if not (root / schema.MANIFEST).is_file():
        shards.check_target(product, overwrite=common.overwrite)
    index = _Index(requests.load_index(asked, source))
    root.mkdir(parents=True, exist_ok=True)
    with shards.locked(root):
        manifest = _manifest(dataset, common, root, source)
        known = shards.read_shards(root, manifest.files["answered"], schema.ANSWERED)
        index.remember(known)
        log = _Log(root, manifest, common.rows_per_shard)
        try:
            tally = _read(files, index, log, source.prompt, (low, high))
        finally:
            log.close()
        ledger = _write_ledger(root, log.manifest)
    answered = int(index.answered.sum())
    told = tally.report(root, answered, index.answered.size)
    if not log.manifest.files["answers"] or (tally.read and not tally.accepted + tally.repeated):
        raise InputError(
            f"none of the {tally.read} results in {listing(map(str, files), 3)} can be used: "
            f"{listing(f'{kind} {count}' for kind, count in tally.reasons.most_common())}; "
            f"see {root / QUARANTINE}"
        )
    rows, manifest = load_log(dataset, common.name)
    return derive.write(dataset, common, options, rows, manifest, ledger), told


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
        "requests": int(source.plan["requests"]),
    }
    if (root / schema.MANIFEST).is_file():
        manifest = schema.read_answer_manifest(root)
        candidates.refuse_other_split(dataset, manifest, f"answer log {common.name!r}")
        paired = {one["prompt"] == "pairwise" for one in manifest.sources}
        if paired and paired != {source.prompt == "pairwise"}:
            raise ConfigError(
                f"{root} holds answers to {manifest.sources[0]['prompt']} prompts, which do not "
                f"mix with {source.prompt} ones; choose another --name"
            )
        same = [one for one in manifest.sources if one["fingerprint"] == source.fingerprint]
        sources = manifest.sources if same else (*manifest.sources, about)
        manifest = dataclasses.replace(manifest, sources=sources)
    else:
        manifest = schema.AnswerManifest(
            name=common.name,
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            sources=(about,),
            counts={},
            files={"answers": (), "answered": ()},
        )
    schema.write_manifest(root, manifest)
    return manifest


def _write_ledger(root: pathlib.Path, manifest: schema.AnswerManifest) -> dict[str, Any]:
    answered = shards.read_shards(root, manifest.files["answered"], schema.ANSWERED, verify=False)
    kinds = ("prompt_tokens", "completion_tokens")
    spoiled: collections.Counter[str] = collections.Counter(answers=0, **dict.fromkeys(kinds, 0))
    with open(root / QUARANTINE, "rb") as file:
        for line in file:
            entry = json.loads(line)
            spoiled["answers"] += 1
            spoiled.update({kind: entry.get(kind) or 0 for kind in kinds})
    columns = {kind: answered.column(kind) for kind in kinds}
    ledger = {
        "accepted": {
            "answers": answered.num_rows,
            "without_usage": columns["prompt_tokens"].null_count,
            **{kind: int(np.sum(column.drop_null())) for kind, column in columns.items()},
        },
        "quarantined": dict(spoiled),
        "models": sorted({one["model"] for one in manifest.sources}),
    }
    partial = root / (LEDGER + ".partial")
    partial.write_text(json.dumps(ledger, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, root / LEDGER)
    return ledger
