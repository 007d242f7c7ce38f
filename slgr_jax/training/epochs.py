"""Where a run stands: its epochs, what an epoch came to, its best validation, its patience."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slgr_jax import config
from slgr_jax.training.checkpoint_manifest import Progress
from slgr_jax.training.step import Trainer


def next_epoch(train: config.TrainConfig, progress: Progress) -> int:
    """The epoch after which the next validation comes."""
    return min((progress.epoch // train.eval_every + 1) * train.eval_every, train.epochs)


def over(train: config.TrainConfig, progress: Progress) -> bool:
    """Epochs or patience are used up."""
    return progress.epoch >= train.epochs or 0 < train.patience <= progress.stale


def add_sums(progress: Progress, sums: Mapping[str, Any]) -> Progress:
    """The progress with a dispatch's sums added to those since the last validation."""
    total = dict(progress.sums)
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + float(value)
    return dataclasses.replace(progress, sums=total)


def close_epoch(
    trainer: Trainer, progress: Progress, metrics: Mapping[str, float] | None, rate: float | None
) -> tuple[Progress, dict[str, float | int], str]:
    """Keep the best validation, count towards the patience.

    Args:
      progress: with the sums of all steps since the last validation.
      metrics: of this validation; None: there is nothing to validate on.
      rate: triples a second; None: a run that was resumed here had trained this epoch before.

    Returns:
      The progress after it, whose `best_epoch` is its `epoch` if this state is the best so far;
      what the log records of it; the line to show.
    """
    sums, train = progress.sums, trainer.config.train
    means = {
        name: value / sums["steps"]
        for name, value in sums.items()
        if name not in ("steps", "triples")
    }
    epoch = next_epoch(train, progress)
    record: dict[str, float | int] = {"epoch": epoch}
    record |= {f"train/{name}": value for name, value in means.items()}
    if rate is not None:
        record["triples_per_s"] = round(rate)

    text = f"epoch {epoch:4d}  loss {means['loss']:.4f}"
    if trainer.guidance is not None:
        text += f"  guidance {means['guidance_loss']:.4f}"
        text += "".join(f"  {name} {means[name]:.3f}" for name in trainer.guidance.metrics[:1])
    value, best = None, progress.best_metric
    if metrics is not None:
        record |= {f"valid/{name}": metric for name, metric in metrics.items()}
        value = metrics[train.early_stop_metric]
        text += f"  valid {train.early_stop_metric} {value:.4f}"

    progress = dataclasses.replace(progress, epoch=epoch, sums={})
    if value is None or best is None or value > best:
        progress = dataclasses.replace(progress, best_metric=value, best_epoch=epoch, stale=0)
        text += "" if value is None else " *"
    else:
        progress = dataclasses.replace(progress, stale=progress.stale + 1)
    return progress, record, text if rate is None else f"{text}  {rate / 1e6:.2f} M triples/s"
