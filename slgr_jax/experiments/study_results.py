"""What a study came to, and how it is shown."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

SHOWN = 10  # trials in the table


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """What a trial came to.

    Attributes:
      number: as Optuna counts.
      state: complete, pruned (stopped early), diverged or failed (its process died every time).
      value: mean over seeds of the best validation; None unless complete.
      epoch: of the first seed's best validation, or at which it was pruned.
      settings: the values of the searched knobs.
      directory: of its runs.
      default: whether these are the defaults.
    """

    number: int
    state: str
    value: float | None
    epoch: int | None
    settings: Mapping[str, Any]
    directory: str
    default: bool = False


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """A study's trials, best first; `print` shows them.

    Attributes:
      metric: what was maximised, of validation.
      trials: all that ended.
      config_file: the best one's settings, for `slgr train --config`.
      ends: what of the best is at the end of its range.
    """

    metric: str
    trials: tuple[TrialResult, ...]
    config_file: pathlib.Path
    ends: tuple[str, ...] = ()

    @property
    def best(self) -> TrialResult:
        """The trial with the greatest value."""
        return self.trials[0]

    def __str__(self) -> str:
        lines = [f"{'trial':>5}  {'valid ' + self.metric:>14}  {'epoch':>5}  settings"]
        for trial in self.trials[:SHOWN]:
            value = trial.state if trial.value is None else f"{trial.value:.4f}"
            mark = "  (the defaults)" if trial.default else ""
            epoch = "" if trial.epoch is None else trial.epoch
            lines.append(
                f"{trial.number:5}  {value:>14}  {epoch:>5}  {shown_settings(trial)}{mark}"
            )
        if (rest := len(self.trials) - SHOWN) > 0:
            lines.append(f"... {rest} more")
        lines += [f"{end}; a wider one may be better" for end in self.ends]
        return "\n".join(
            [
                *lines,
                f"best: trial {self.best.number}, settings in {self.config_file}; train it:",
                f"  slgr train --config={self.config_file} --workdir=RUN",
                "or look at the test part with the run that it has already:",
                f"  slgr evaluate --workdir={pathlib.Path(self.best.directory) / 'seed0'}",
            ]
        )


def shown_settings(trial: TrialResult) -> str:
    """`lr 0.05, dim 64`."""
    return ", ".join(
        f"{name} {format(value, '.4g') if isinstance(value, float) else value}"
        for name, value in trial.settings.items()
    )
