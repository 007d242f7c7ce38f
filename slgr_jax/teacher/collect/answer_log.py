"""The append-only log of parsed answers.

    DATA/answers/NAME/manifest.json            replaced after every shard, with a checksum of itself
    DATA/answers/NAME/answers-00000.arrow      scores as parsed: schema.ANSWERS
                                               (free lists: titles as written, schema.TITLES;
                                               texts of users or items: schema.WRITTEN)
    DATA/answers/NAME/answered-00000.arrow     a row an accepted answer: schema.ANSWERED
    DATA/answers/NAME/quarantine.jsonl         what could not be used, and why (`quarantine.py`)
    DATA/answers/NAME/ledger.json              what was paid for: tokens

Results are joined with the requests' index by `custom_id` alone. A later whole answer stands in for
one that was cut off: both are in the log, and the last one of a (request, sample) holds.

Shape letters: n rows of the log.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from slgr_jax.config import TEXT_PROMPTS
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ManifestError, ShardError, UserError
from slgr_jax.files import write_atomically
from slgr_jax.teacher.ask import candidates
from slgr_jax.teacher.collect.quarantine import Quarantine
from slgr_jax.teacher.collect.request_index import RequestIndex
from slgr_jax.teacher.products import preferences

PathLike = str | os.PathLike[str]

LEDGER = "ledger.json"
_TOKENS = ("prompt_tokens", "completion_tokens")
# What reading JSON of any shape as a manifest can lead to.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def log_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/answers/NAME; a name that is not one plain directory name is a `ConfigError`."""
    return pathlib.Path(data) / schema.ANSWERS_DIR / preferences.product_path(data, name).name


# --- the manifest ------------------------------------------------------------------------------


def read_manifest(dataset: Dataset, name: str) -> schema.AnswerManifest:
    """The manifest of the log NAME.

    Raises:
      ManifestError: there is none, it is damaged, or it is of another split or id map.
    """
    root = log_path(dataset.path, name)
    path = root / schema.MANIFEST
    try:
        manifest = schema.read_answer_manifest(root)
    except UserError as error:
        if not path.is_file():
            raise
        raise ManifestError(f"{error}: {_fix(path)}") from error
    except _DAMAGE as error:
        raise ManifestError(f"{path} is damaged ({str(error)[:200]}): {_fix(path)}") from error
    candidates.refuse_other_split(dataset, manifest, f"answer log {name!r}")
    return manifest


def _fix(path: pathlib.Path) -> str:
    return (
        f"put back a copy, or remove {path.parent} and run slgr teach collect again over all "
        "results"
    )


# --- reading -----------------------------------------------------------------------------------


def load_log(dataset: Dataset, name: str) -> tuple[pa.Table, schema.AnswerManifest]:
    """Every row of the log NAME that holds, and its manifest.

    The rows are schema.TITLES where the answers are free lists, schema.WRITTEN where they are texts
    about users or items, else schema.ANSWERS.

    Answers that a later one stands in for are left out.

    Raises:
      ManifestError: there is none, it is damaged, or it is of another split or id map.
      ShardError: a shard is missing, truncated or corrupt.
    """
    root = log_path(dataset.path, name)
    manifest = read_manifest(dataset, name)
    rows = shards.read_shards(root, manifest.files["answers"], _columns(manifest))
    answered = shards.read_shards(root, manifest.files["answered"], schema.ANSWERED)

    answer = answer_numbers(rows)
    holds = _last_of_each(answered)
    if holds.size != (int(answer[-1]) + 1 if answer.size else 0):
        raise ShardError(
            f"{root}: the answers and answered shards disagree, on {holds.size} answers; put back "
            f"a copy, or remove {root} and run slgr teach collect again over all results"
        )
    return rows.filter(pa.array(holds[answer])) if answer.size else rows, manifest


def is_free(manifest: schema.AnswerManifest) -> bool:
    """Whether the answers of a log are free lists of titles."""
    return bool(manifest.sources[0]["prompt"] == "free_list")


def _columns(manifest: schema.AnswerManifest) -> pa.Schema:
    if manifest.sources[0]["prompt"] in TEXT_PROMPTS:
        return schema.WRITTEN
    return schema.TITLES if is_free(manifest) else schema.ANSWERS


def answer_numbers(rows: pa.Table) -> np.ndarray:
    """[n] int64: which answer each row of the log is of, from 0; position 0 begins one."""
    return np.cumsum(rows.column("position").to_numpy() == 0) - 1


def _last_of_each(answered: pa.Table) -> np.ndarray:
    """[answers] bool: no later answer of the log is to the same (request, sample)."""
    keys = np.stack(
        [answered.column(name).to_numpy().astype(np.int64) for name in ("request", "sample")]
    )
    holds = np.zeros(answered.num_rows, bool)
    _, last = np.unique(keys[:, ::-1], axis=1, return_index=True)
    holds[answered.num_rows - 1 - last] = True
    return holds


def request_counts(
    manifest: schema.AnswerManifest,
    answered: pa.Table,
    refusals: dict[int, tuple[str, str]],
) -> dict[str, int]:
    """How many requests of all sources are complete, cut, refused, failed and missing.

    Args:
      manifest: of the log.
      answered: its accepted answers, schema.ANSWERED.
      refusals: request -> (refused or failed, reason) of its last result that was not accepted.
    """
    requests, cut = (answered.column(name).to_numpy() for name in ("request", "cut"))
    some = set(requests.tolist())
    whole = set(requests[~cut.astype(bool)].tolist())
    states = [state for request, (state, _) in refusals.items() if request not in some]
    counts = {
        "complete": len(whole),
        "cut": len(some - whole),
        "refused": states.count("refused"),
        "failed": states.count("failed"),
    }
    asked = sum(int(source["requests"]) for source in manifest.sources)
    return counts | {"missing": asked - sum(counts.values())}


# --- writing -----------------------------------------------------------------------------------


class AcceptedAnswer(NamedTuple):
    """An answer to add.

    Attributes:
      row: of its request in the index; sample: which of the request's answers.
      scores: of the candidates in shown order, NaN where none; of two compared items one number,
        the probability that the first is preferred.
      words: titles of a free list, in order, or texts about a user or item, one a field; then there
        are no scores.
      digest: of scores and words; cut: the answer ended too early.
      prompt_tokens, completion_tokens: None where not told.
    """

    row: int
    sample: int
    scores: np.ndarray
    digest: int
    cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    words: tuple[str, ...] = ()


class Log:
    """An answer log that is being added to."""

    def __init__(
        self, root: pathlib.Path, manifest: schema.AnswerManifest, rows_per_shard: int
    ) -> None:
        """Open the log at `root` behind what `manifest` lists.

        Raises:
          ShardError: the quarantine is damaged.
        """
        self.root, self.manifest, self._limit = root, manifest, rows_per_shard
        self.quarantine = Quarantine(root, manifest.files["quarantine"])
        self._answers: list[tuple[np.ndarray, ...]] = []
        self._answered: list[tuple[int, int, bool, int, int | None, int | None]] = []
        self._rows = 0

    @property
    def full(self) -> bool:
        """As many rows wait as fit into a shard: it is time to flush."""
        return self._rows >= self._limit

    def add(self, index: RequestIndex, answer: AcceptedAnswer) -> None:
        """Take in one accepted answer."""
        row = answer.row
        size = len(answer.words) or answer.scores.size
        request = np.full(size, index.requests[row])
        user = np.full(size, index.about(row))
        position = np.arange(size, dtype=np.int32)
        permutation = np.full(size, index.permutations[row])
        if answer.words:
            words = np.array(answer.words, object)
            self._answers.append((request, user, position, permutation, words))
        else:
            items = index.shown(row)
            second = items[1:2] if size < items.size else np.full(size, -1, np.int32)
            self._answers.append(
                (request, user, items[:size], second, position, permutation, answer.scores)
            )
        self._answered.append(
            (
                int(index.requests[row]),
                answer.sample,
                answer.cut,
                answer.digest,
                answer.prompt_tokens,
                answer.completion_tokens,
            )
        )
        self._rows += size

    def flush(self) -> None:
        """Put what was taken in on disk: shards first, then the manifest that lists them."""
        files = {**self.manifest.files, "quarantine": self.quarantine.flush()}
        if self._answers:
            number = len(files["answers"])
            for key, table in self._tables().items():
                shard = shards.write_shard(self.root, f"{key}-{number:05d}.arrow", table)
                files[key] = (*files[key], shard)
        if files != self.manifest.files:
            self.manifest = schema.write_manifest(
                self.root, dataclasses.replace(self.manifest, files=files)
            )
        self._answers, self._answered, self._rows = [], [], 0

    def _tables(self) -> dict[str, pa.Table]:
        columns = [np.concatenate(column) for column in zip(*self._answers, strict=True)]
        arrays = [pa.array(column) for column in columns]
        answered = pa.table(
            [list(column) for column in zip(*self._answered, strict=True)], schema=schema.ANSWERED
        )
        kind = _columns(self.manifest)
        if kind is not schema.ANSWERS:
            return {"answers": pa.table(arrays, schema=kind), "answered": answered}
        arrays[3] = pa.array(columns[3], mask=columns[3] < 0)
        arrays[6] = pa.array(columns[6], mask=np.isnan(columns[6]))
        return {"answers": pa.table(arrays, schema=kind), "answered": answered}

    def write_ledger(self, answered: pa.Table) -> dict[str, Any]:
        """Write ledger.json from every accepted answer and the quarantine; returns its content."""
        columns = {kind: answered.column(kind) for kind in _TOKENS}
        ledger = {
            "accepted": {
                "answers": answered.num_rows,
                "without_usage": columns["prompt_tokens"].null_count,
                **{kind: int(np.sum(column.drop_null())) for kind, column in columns.items()},
            },
            "quarantined": {"answers": self.quarantine.rows, **self.quarantine.tokens},
            "models": sorted({source["model"] for source in self.manifest.sources}),
        }
        text = json.dumps(ledger, indent=2, sort_keys=True) + "\n"
        write_atomically(self.root / LEDGER, text)
        return ledger

    def close(self) -> None:
        """Let go of the files; what was not flushed is not in the log."""
        self.quarantine.close()
