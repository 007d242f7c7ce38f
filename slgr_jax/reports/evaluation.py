"""Runs and baselines evaluated together, and what is shown of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from slgr_jax import cluster, config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baseline_evaluation, baselines, blending, results
from slgr_jax.evaluation.blending import Lists
from slgr_jax.evaluation.results import EvaluatedRun
from slgr_jax.reports import run_evaluation, tables, verdict
from slgr_jax.serving import load
from slgr_jax.teacher.products import preferences
from slgr_jax.training import agreement, run_directory


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """Runs and baselines, ranked; `print` shows their tables.

    Attributes:
      runs: results of each, runs first; `runs[0].parts["test"].slices["overall"]` is a mapping of
        metrics.
      metric: what is tested and drawn.
      out: directory of the picture and of the baselines' files.
      left_out: why a baseline is not there; empty where none is missing.
    """

    runs: tuple[EvaluatedRun, ...]
    metric: str
    out: pathlib.Path
    left_out: str = ""

    def table(self, *, bins: bool = False, definitions: bool = False) -> str:
        """The tables as text, `verdict` last.

        Args:
          bins: with the bins by history and popularity.
          definitions: with those of the metrics.
        """
        whole = tables.render(self.runs, self.metric, bins=bins, definitions=definitions)
        note = f"{self.left_out}\n\n" if self.left_out else ""
        return f"{whole}\n{note}{self.verdict()}"

    def verdict(self) -> str:
        """The small table and what was found, in words."""
        return verdict.render(self.runs, self.metric)

    def write_summary(self) -> list[pathlib.Path]:
        """Write the small table as OUT/summary.md (with the verdict), .csv and .tex."""
        return verdict.write(self.runs, self.metric, self.out)

    def draw(self) -> pathlib.Path:
        """Draw `metric` by slice; the path of the picture, OUT/metrics.png."""
        from slgr_jax.reports import plots  # matplotlib is slow to import

        return plots.draw(self.runs, self.metric, self.out / results.PICTURE)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        labels = ", ".join(run.label for run in self.runs)
        return f"Evaluation({labels}; {self.metric}, out {str(self.out)!r})"


@cluster.session()
def evaluate(
    workdirs: Sequence[str],
    data: str,
    out: str,
    metric: str,
    checkpoint: str,
    options: config.BaselineConfig,
    blend: str = "",
) -> Evaluation:
    """Evaluate runs, and baselines on the first one's data; arguments as of `slgr_jax.evaluate`.

    The processes of a job (`cluster.start`) all call this; the first of them writes.

    Raises:
      UserError: there is no such run, metric or baseline, or nothing to evaluate.
    """
    if checkpoint not in ("best", "last"):
        raise ConfigError(f"--checkpoint={checkpoint!r} is not one of: best, last")
    if not workdirs and not (data and out):
        raise ConfigError(
            "missing --workdir, or --data and --out in its place; see slgr evaluate --help"
        )
    alone = cluster.processes() == 1
    if not alone:
        agreement.refuse_in_a_job("evaluate", _of_one_process(workdirs, options, blend))
        asked = {"--workdir": list(workdirs), "--out": out, "--metric": metric}
        agreement.refuse_unequal({**asked, "--checkpoint": checkpoint})

    labels = tables.labels(workdirs)
    configs = [run_directory.read_config(workdir) for workdir in workdirs]
    configs = configs or [config.RunConfig(data, out)]
    for run in configs:
        metric = tables.choose_metric(metric, run.evaluation)

    evaluated = [
        run_evaluation.evaluate_run(workdir, label, checkpoint, data=data or None)
        for workdir, label in zip(workdirs, labels, strict=True)
    ]
    dataset = evaluated[0].dataset if evaluated else dataset_lib.load(data)
    where = pathlib.Path(out or workdirs[0])
    lists = blending.listed(dataset, preferences.load(dataset, blend)) if blend else None
    if blend and not len(dataset.valid):
        raise ConfigError(
            f"--blend={blend} needs validation interactions to choose the weight by, and there are "
            "none; of a run that has learned them, name the one that it was refitted from"
        )
    beside = []
    if alone:
        beside = baseline_evaluation.evaluate_baselines(
            options, configs[0], dataset, where, taken=labels, lists=lists
        )
    if lists is not None:
        evaluated += [_blended(run, lists, where) for run in evaluated]
    evaluated += beside
    if not evaluated:
        raise ConfigError("--baselines=none without --workdir leaves nothing to evaluate")
    left_out = "Baselines are left out: they are fitted in one process."
    if alone:
        left_out = baselines.left_out(options, dataset.n_items)
    return Evaluation(tuple(evaluated), metric, where, left_out)


def _of_one_process(
    workdirs: Sequence[str], options: config.BaselineConfig, blend: str
) -> dict[str, str]:
    """What of a request one process does alone, and why."""
    flags = {}
    if blend:
        flags[f"--blend={blend}"] = "adds to scores over whole tables"
    if options.baselines not in ("auto", "none"):
        flags[f"--baselines={options.baselines}"] = "are fitted on all interactions"
    if not workdirs:
        flags["--data without --workdir"] = "is of baselines alone"
    return flags


def _blended(run: EvaluatedRun, lists: Lists, out: pathlib.Path) -> EvaluatedRun:
    """A run with a teacher's lists added to its scores; writes its files."""
    if not run.parts:
        raise ConfigError(
            f"--blend={lists.name} adds to the scores of a ranking, and {run.workdir} ranks "
            "nothing (--noranking)"
        )
    trained = load(run.workdir, run.checkpoint, data=str(run.dataset.path)).whole
    scored = {
        part: (trained.score_users, trained.restored.scoring(part)) for part in ("valid", "test")
    }
    blended = baseline_evaluation.blend(run, scored, lists, out, mesh=trained.restored.mesh)
    results.write_run(blended)
    return blended
