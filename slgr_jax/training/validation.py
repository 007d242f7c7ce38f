"""The validation of a state while it trains: full ranking, labelled rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from slgr_jax import cluster
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import click_metrics, full_ranking, ranking_metrics
from slgr_jax.models.scoring import (
    Scoring,
    ServingState,
    moments,
    score_own_rows,
    score_rows,
    score_users,
)
from slgr_jax.sampling import labelled_rows, user_context
from slgr_jax.sampling.context import Context
from slgr_jax.training.state import Learner


class Validation:
    """The overall validation metrics of a state: train items masked, full ranking; rows."""

    def __init__(self, learner: Learner, dataset: Dataset, context: Context) -> None:
        config = learner.config
        self._config, self._kernels = config.evaluation, config.train.kernels
        # What vectors come to is among the rows of a serving state.
        self._context = dataclasses.replace(context, vectors=None)
        self._score = score_users(learner.backbone)
        self._score_rows = score_rows(learner.backbone)
        if learner.layout.users is not None:
            self._score_rows = score_own_rows(
                learner.backbone, learner.layout, split_tables=learner.serves_blocks
            )
        self._relevant = dataset.positives(("valid",))
        self._seen = dataset.positives(("train",))
        self._n_items = dataset.n_items
        self._mesh = learner.layout.mesh if learner.layout.devices > 1 else None
        self._split, self._split_items = learner.layout.users, learner.serves_blocks
        self._ranker: full_ranking.Ranker | None = None
        self._rows, self._slices = None, dataset.slices(config.slices)
        if self.possible and self._config.rows != "none":
            rows = labelled_rows.make_rows(dataset, "valid", self._config, config.loss)
            features = context.features
            if learner.layout.users is not None and features is not None and features.interaction:
                assert rows.interactions is not None, "the dataset has features of them"
                asked = user_context.on_device(
                    rows.interactions, rows.users, dataset, learner.layout
                )
                rows = dataclasses.replace(rows, interactions=asked)
            self._rows = rows

    @property
    def possible(self) -> bool:
        """Whether there is anything to validate on."""
        return self._relevant.indices.size > 0

    def _make_ranker(self) -> full_ranking.Ranker:
        return full_ranking.Ranker(
            self._score,
            self._relevant,
            self._seen,
            self._n_items,
            users_per_chunk=self._config.eval_users_per_chunk,
            top_k=0,
            pooled_auc=False,
            mesh=self._mesh,
            split=self._split,
            split_items=self._split_items,
            kernels=self._kernels,
        )

    def __call__(
        self, serving: ServingState, between_chunks: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Metrics by name, on every process; those that are not defined on this data are left out.

        Args:
          between_chunks: called between two chunks of users or rows; may raise.
        """
        scoring = Scoring(serving, self._context, moments(self._context, "valid"))
        metrics: ranking_metrics.Values = {}
        if self._config.ranking:
            self._ranker = self._ranker or self._make_ranker()
            ranking = self._ranker(scoring, between_chunks)
            per_user = ranking_metrics.per_user(ranking, self._config.ks)
            metrics = ranking_metrics.summarize(per_user)
        if self._rows is not None:
            scores = self._score_rows(scoring, self._rows, between_chunks)
            by_slice = click_metrics.summarize_rows(self._rows, scores, self._slices)
            metrics |= {f"rows_{name}": value for name, value in by_slice["overall"].items()}
        values = {name: float(value) for name, value in metrics.items() if value is not None}
        if cluster.processes() == 1:
            return values
        # Processors may round a mean in their own way, and all must choose the same best state.
        agreed: dict[str, float] = json.loads(cluster.first(json.dumps(values)))
        return agreed
