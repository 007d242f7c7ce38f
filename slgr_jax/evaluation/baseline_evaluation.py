"""Baselines beside a run: tuned on validation, ranked and scored on rows as the run is, with files.

With a teacher's lists each is also shown with `w / rank` added (`blending.py`).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from slgr_jax.config import BaselineConfig, RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.evaluation import baselines, blending, click_metrics, full_ranking, results
from slgr_jax.evaluation.baselines import TUNED_ON, TUNED_ON_ROWS, Baseline, Fitted
from slgr_jax.evaluation.blending import Lists
from slgr_jax.evaluation.ranking_metrics import PartResult, Values
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.mesh import make_layout
from slgr_jax.sampling import labelled_rows
from slgr_jax.sampling.labelled_rows import LabelledRows


def evaluate_baselines(
    options: BaselineConfig,
    config: RunConfig,
    dataset: Dataset,
    out: str | os.PathLike[str],
    *,
    taken: Sequence[str] = (),
    lists: Lists | None = None,
) -> list[EvaluatedRun]:
    """Tune each baseline and measure it as a run is; write its files to `out`/baselines/NAME.

    Args:
      options: which, and their grids.
      config: the run they stand beside: slices, cut-offs, labelled rows, who ranks. Beside one that
        stops by rows_auc, or that ranks nothing, settings are chosen by the auc of validation rows.
      dataset: what that run was trained on.
      out: directory of results.
      taken: labels that runs have; a baseline of the same name says that it is a baseline.
      lists: of a teacher: each baseline is shown with them added, too, in `out`/blends/NAME.
    """
    layout = make_layout()
    mesh = layout.mesh if layout.devices > 1 else None
    rows = _rows(config, dataset)
    evaluated = []
    for name in baselines.chosen(options, dataset.n_items):
        label = f"{name} (baseline)" if name in taken else name
        baseline = baselines.make_baseline(name, options)
        directory = pathlib.Path(out, "baselines", name)
        result, fitted = _evaluate(name, baseline, config, dataset, directory, label, mesh, rows)
        evaluated.append(result)
        if lists is not None and config.evaluation.ranking:
            scored = dict.fromkeys(("valid", "test"), (fitted.score_users, fitted.state))
            evaluated.append(blend(result, scored, lists, out, mesh=mesh))
    for result in evaluated:
        results.write_run(result)
    return evaluated


def _rows(config: RunConfig, dataset: Dataset) -> dict[str, LabelledRows]:
    """The labelled rows of each part, those of the run; {} with --rows=none."""
    if config.evaluation.rows == "none":
        return {}
    return {
        part: labelled_rows.make_rows(data, part, config.evaluation, config.loss)
        for part, data in (("valid", dataset.as_split or dataset), ("test", dataset))
        if len(data.part(part))
    }


def _evaluate(
    name: str,
    baseline: Baseline,
    config: RunConfig,
    dataset: Dataset,
    directory: pathlib.Path,
    label: str,
    mesh: Mesh | None,
    rows: Mapping[str, LabelledRows],
) -> tuple[EvaluatedRun, Fitted]:
    """Tune one baseline; rank every part and score its rows with it."""
    kernels, evaluation = config.train.kernels, config.evaluation
    by_rows = config.train.early_stop_metric.startswith("rows_") or not evaluation.ranking
    fitted, settings, tried = baselines.tune(
        baseline,
        dataset,
        mesh=mesh,
        kernels=kernels,
        users_per_chunk=evaluation.eval_users_per_chunk,
        rows=rows.get("valid") if by_rows else None,
    )
    measured = ("test",) if dataset.as_split else ("valid", "test")
    parts: dict[str, PartResult] = {}
    if evaluation.ranking:
        parts = full_ranking.evaluate_dataset(
            fitted.score_users,
            fitted.state,
            dataset,
            config.slices,
            evaluation,
            parts=measured,
            mesh=mesh,
            kernels=kernels,
        )
    result = EvaluatedRun(
        workdir=str(directory),
        label=label,
        config=config,
        dataset=dataset,
        checkpoint="none",
        parts=parts,
        rows={
            part: _row_metrics(fitted, config, dataset, its)
            for part, its in rows.items()
            if part in measured
        },
        baseline={
            "name": name,
            "settings": settings,
            "tuned_on": f"valid {TUNED_ON_ROWS if by_rows and 'valid' in rows else TUNED_ON}",
            "tried": tried,
        },
    )
    return result, fitted


def _row_metrics(
    fitted: Fitted, config: RunConfig, dataset: Dataset, rows: LabelledRows
) -> dict[str, Values]:
    """Slice -> auc, gauc; no log loss: the scores of a baseline order rows, but are no logits."""
    slices = dataset.slices(config.slices)
    by_slice = click_metrics.summarize_rows(rows, baselines.row_scores(fitted, rows), slices)
    return {name: values | {"log_loss": None} for name, values in by_slice.items()}


# ------------------------------------------------------------------------ with a list added


def blend(
    run: EvaluatedRun,
    scored: Mapping[str, tuple[Any, Any]],
    lists: Lists,
    out: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
) -> EvaluatedRun:
    """A run, or a baseline, with w / rank of the lists added; w by validation ndcg@10.

    Args:
      run: without the lists.
      scored: part -> (score_users, state) that it is ranked with.
      lists: what is added.
      out: its files go to `out`/blends/LABEL.

    Raises:
      ConfigError: there is no validation part.
    """
    (tried,) = blending.try_weights(*scored["valid"], [lists], run.dataset)
    parts: dict[str, PartResult] = {}
    for part, (score_users, state) in scored.items():
        parts |= full_ranking.evaluate_dataset(
            blending.blended(score_users),
            blending.blend_state(state, lists, tried.weight),
            run.dataset,
            run.config.slices,
            run.config.evaluation,
            parts=(part,),
            mesh=mesh,
            kernels=run.config.train.kernels,
        )
    label = f"{run.label} + {lists.name}"
    return EvaluatedRun(
        workdir=str(pathlib.Path(out, "blends", label.replace("/", "_").replace(" ", ""))),
        label=label,
        config=run.config,
        dataset=run.dataset,
        checkpoint=run.checkpoint,
        parts=parts,
        blend={
            "run": run.label,
            "teacher": lists.name,
            "weight": tried.weight,
            "tuned_on": f"valid {blending.METRIC}",
            "tried": [
                {"weight": float(weight), blending.METRIC: float(np.mean(values))}
                for weight, values in zip(tried.weights, tried.values, strict=True)
            ],
        },
    )
