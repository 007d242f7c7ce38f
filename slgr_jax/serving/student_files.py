"""What a run knows, as files that an LLM learns from: the downward half of LLMD4Rec (2505.18120).

    DIR/lists.parquet          user, item, rank, score of the N best items of each user
    DIR/users.parquet          user, log_sum, tail: of  p_j = exp(s_j / T - log_sum)  over the items
                               outside the user's training items, `tail` is what is not listed
    DIR/interactions.parquet   user, item, rank of every training interaction among itself and the
                               items outside of training
    DIR/manifest.json          what they hold, of which run and split; their checksums

All of it is as of the end of training: validation and test are not in it, and user and item are
ids of the raw data. With r_c the rank of an interaction here and r_l its rank by the LLM, LLMD4Rec
weighs what the LLM learns of it by w1 = min(2, r_l / r_c) where r_l > r_c, else
max(0, 2 - r_c / r_l). T comes before the cut, since the sum over the catalogue cannot be had from
a list.

Shape letters: U users, I items, N listed items, n training interactions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from slgr_jax import __version__, json_files
from slgr_jax.data import shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import full_ranking
from slgr_jax.evaluation.ranking_metrics import Ranking
from slgr_jax.files import write_atomically
from slgr_jax.serving.run_teacher import built_from
from slgr_jax.serving.trained_run import TrainedRun

FILES = ("lists.parquet", "users.parquet", "interactions.parquet")


@dataclasses.dataclass(frozen=True)
class StudentKnowledge:
    """What a run says of every user.

    Attributes:
      items, scores: the best items, best first, -1 and -inf past the last.
      log_sums: log sum_j exp(s_j / T) over the items outside training.
      trained: training items of each user; ranks: [n] of each, from 1.
    """

    items: Int[np.ndarray, "U N"]
    scores: Float[np.ndarray, "U N"]
    log_sums: Float[np.ndarray, "U"]
    trained: Csr
    ranks: Int[np.ndarray, "n"]

    def tails(self, temperature: float) -> Float[np.ndarray, "U"]:
        """[U] what the softmax has outside each list, 0 where the list is the catalogue."""
        shares = np.exp(self.scores / temperature - self.log_sums[:, None], dtype=np.float64)
        return np.clip(1.0 - shares.sum(axis=1), 0.0, 1.0).astype(np.float32)


def knowledge(run: TrainedRun, *, listed: int, temperature: float) -> StudentKnowledge:
    """What a run says of every user, as of the end of training.

    Raises:
      NonFiniteError: a score is NaN or infinite.
    """
    restored, data = run.whole.restored, run.dataset
    scoring, trained = restored.scoring("valid"), data.positives(("train",))
    common: dict[str, Any] = {"mesh": restored.mesh, "kernels": run.config.train.kernels}
    users = np.arange(data.n_users, dtype=np.int32)
    asked = (restored.score_users, scoring)
    top = full_ranking.top_k(*asked, users, trained, data.n_items, k=listed, **common)
    log_sums = full_ranking.log_sums(
        *asked, users, trained, data.n_items, temperature=temperature, **common
    )
    ranking = full_ranking.rank(
        *asked, trained, Csr.empty(data.n_users), data.n_items, top_k=0, pooled_auc=False, **common
    )
    return StudentKnowledge(top.items, top.scores, log_sums, trained, _alone(ranking))


def _alone(ranking: Ranking) -> Int[np.ndarray, "n"]:
    """[n] the rank of each relevant item among itself and the items that are not relevant."""
    best_first = np.lexsort((ranking.ranks, ranking.rows))
    above = np.arange(best_first.size) - np.repeat(ranking.offsets[:-1], ranking.counts)
    alone = np.empty_like(ranking.ranks)
    alone[best_first] = ranking.ranks[best_first] - above
    return alone


def write(
    run: TrainedRun, out: str | os.PathLike[str], *, listed: int, temperature: float, wanted: str
) -> pathlib.Path:
    """Write the directory `out`, which appears when it is whole.

    Args:
      wanted: the product that what the LLM learns is to become.

    Raises:
      ConfigError: a refit, which has learned validation.
      InputError: `out` is there.
    """
    if run.config.train.refit:
        raise ConfigError(
            f"{run.workdir} learned from validation, too, and would tell it to the LLM; name the "
            f"run that it refits, {run.config.train.refit}"
        )
    data = run.dataset
    known = knowledge(run, listed=listed, temperature=temperature)
    tables = dict(zip(FILES, _tables(data, known, temperature), strict=True))
    with shards.atomic_directory(out) as root:
        for name, table in tables.items():
            pq.write_table(table, root / name)
        manifest = {
            "version": __version__,
            "run": os.path.abspath(run.workdir),
            "backbone": run.config.model.backbone,
            "dataset": data.manifest.name,
            "split_hash": data.manifest.split_hash,
            "id_map_hash": data.manifest.id_map_hash,
            "built_from": built_from(run),
            "temperature": temperature,
            "listed": int(known.items.shape[1]),
            "training_items": "none",
            "wanted": wanted,
            "files": {name: shards.sha256_of(root / name) for name in FILES},
            "rows": {name: table.num_rows for name, table in tables.items()},
        }
        text = json.dumps(json_files.sealed(manifest), indent=2) + "\n"
        write_atomically(root / MANIFEST, text, durable=True)
    return pathlib.Path(out)


def _tables(data: Dataset, known: StudentKnowledge, temperature: float) -> list[pa.Table]:
    """Those of `FILES`, with ids of the raw data."""
    user_ids, item_ids = data.user_ids, data.items.column("item_id").combine_chunks()

    def rows(users: np.ndarray, items: np.ndarray, **columns: np.ndarray) -> pa.Table:
        ids = {"user": user_ids.take(pa.array(users)), "item": item_ids.take(pa.array(items))}
        return pa.table({**ids, **columns})

    listed = known.items >= 0
    places = np.broadcast_to(np.arange(1, listed.shape[1] + 1, dtype=np.int32), listed.shape)
    return [
        rows(
            np.repeat(np.arange(data.n_users), listed.sum(axis=1)),
            known.items[listed],
            rank=places[listed],
            score=known.scores[listed],
        ),
        pa.table({"user": user_ids, "log_sum": known.log_sums, "tail": known.tails(temperature)}),
        rows(
            known.trained.owners(),
            known.trained.indices,
            rank=known.ranks.astype(np.int32),
        ),
    ]
