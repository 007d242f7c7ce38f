"""Hyperparameters by validation, with Optuna: `slgr tune`. The test part is never read.

OUT/study.journal            the study; Optuna's own tools read it
OUT/trials/0007/seed0        a run, as slgr train writes it; checkpoints are kept of the best trial
OUT/best.toml                settings of the best trial, for slgr train --config

A trial is a function of (--sampler_seed, how many were drawn before it, what these came to): with
one job, a study that was killed and called again is the study that was not. The trial that was
running is marked as failed and tried again; its run goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import numpy as np

from slgr_jax import config, progress
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import pool, results, sampler, search_space
from slgr_jax.experiments.pool import LOGGER
from slgr_jax.experiments.search_space import SearchSpace
from slgr_jax.experiments.study_results import TrialResult, TuneResult, shown_settings
from slgr_jax.files import write_atomically

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial
    from tqdm import tqdm

    from slgr_jax.training.training_log import TrainingProgress

STORE, BEST, TRIALS, NAME = "study.journal", "best.toml", "trials", "slgr_jax"
_TRIES = 3  # of a trial whose process does not live to its end


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """What is searched, and how.

    Attributes:
      data: dataset directory.
      out: directory of the study.
      space: what may vary between trials.
      fixed: knobs that are given, by flag name.
      options: the search's own knobs.
    """

    data: str
    out: pathlib.Path
    space: SearchSpace
    fixed: Mapping[str, Any]
    options: config.TuneConfig

    def runs(self, settings: Mapping[str, Any], directory: str = "") -> list[config.RunConfig]:
        """A trial's runs, which differ in their seed."""
        knobs = {**self.fixed, **settings}
        first, root = knobs.pop("seed", 0), self.out.absolute() / TRIALS / directory
        return [
            config.make_run(self.data, str(root / f"seed{i}"), seed=first + i, **knobs)
            for i in range(self.options.seeds)
        ]

    @property
    def metric(self) -> str:
        """What is maximised, of validation."""
        return self.runs(search_space.corners(self.space)[0])[0].train.early_stop_metric


# --------------------------------------------------------------------- the whole


def make_plan(
    data: str,
    out: pathlib.Path,
    search: Mapping[str, Any],
    fixed: Mapping[str, Any],
    options: config.TuneConfig,
) -> StudyPlan:
    """A plan in which every value is one that its knob can have.

    Raises:
      ConfigError: a knob or a value that there is not, settings that contradict each other, or
        no validation part.
    """
    from slgr_jax.data import schema

    if fixed.get("restart"):
        raise ConfigError(f"--restart is for one run; remove {out} to search anew")
    if fixed.get("refit"):
        raise ConfigError("--refit is of a run that was tuned; tune first, then slgr train --refit")
    plan = StudyPlan(data, out, search_space.make_space(search, fixed), fixed, options)
    for settings in search_space.corners(plan.space):
        plan.runs(settings)
    if not sum(file.rows for file in schema.read_dataset_manifest(data).files["valid"]):
        raise ConfigError(f"{data} has no validation part: nothing to tune on")
    return plan


def tune(plan: StudyPlan) -> TuneResult:
    """Run the trials that are missing; write best.toml.

    Raises:
      UserError: OUT holds another study, every trial diverged, or what ends a run for a reason
        that other settings would not mend; the study goes on when called again.
    """
    from slgr_jax.data import shards

    plan.out.mkdir(parents=True, exist_ok=True)
    with shards.locked(plan.out):  # a second search would train over the runs of the first
        study = _opened(plan)
        _retry_unfinished(plan, study)
        jobs = pool.workers(plan.options.jobs)
        before, of = sum(map(_has_ended, study.trials)), plan.options.trials
        with progress.bar(of, "trial", initial=before) as bar:
            for trial in _trials(plan, _draws(plan, study), jobs, bar):
                _show(plan, study, trial)
                _keep_best_checkpoint(plan, study)
        return _result(plan, study)


def _draws(plan: StudyPlan, study: Study) -> Iterator[int]:
    """One number for each trial to begin: how many were drawn before it."""
    begin, trials = time.monotonic(), study.trials
    waiting = sum(trial.state.name == "WAITING" for trial in trials)
    drawn = sum("params" not in t.user_attrs and set(t.params) == set(plan.space) for t in trials)
    ended = sum(map(_has_ended, trials))
    for place in range(plan.options.trials - ended):
        if 0 < plan.options.timeout <= time.monotonic() - begin:
            LOGGER.info("--timeout: no more trial begins; the same command goes on")
            return
        yield drawn + max(0, place - waiting)


def _trials(plan: StudyPlan, draws: Iterator[int], jobs: int, bar: tqdm) -> Iterator[TrialResult]:
    """Trials as they end, `jobs` at once; each moves the bar."""
    if jobs == 1:
        for draw in draws:
            trial = run_trial(plan, draw)
            bar.update()
            yield trial
        return
    try:
        with pool.process_pool(jobs) as executor:
            running: set[Future[TrialResult]] = set()
            for draw in draws:
                running.add(executor.submit(pool.in_worker, run_trial, plan, draw))
                if len(running) == jobs:
                    ended, running = progress.first_ended(running, bar)
                    yield from (future.result() for future in ended)
            while running:
                ended, running = progress.first_ended(running, bar)
                yield from (future.result() for future in ended)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"the process of a trial was killed, perhaps for memory: call again with fewer --jobs "
            f"than {jobs}"
        ) from error


def _show(plan: StudyPlan, study: Study, trial: TrialResult) -> None:
    ended = sum(map(_has_ended, study.trials))
    value = trial.state if trial.value is None else f"{trial.value:.4f}"
    LOGGER.info(
        "[%d/%d] trial %d: %s  %s",
        ended,
        plan.options.trials,
        trial.number,
        value,
        shown_settings(trial),
    )


def _keep_best_checkpoint(plan: StudyPlan, study: Study) -> None:
    """Remove the checkpoints of trials that have ended and are not the best."""
    from slgr_jax.training import checkpoint

    ended = [_read(plan, trial) for trial in study.trials if _has_ended(trial)]
    best = max((t for t in ended if t.value is not None), key=_value, default=None)
    for trial in ended:
        if trial != best:
            for workdir in pathlib.Path(trial.directory).glob("seed*"):
                checkpoint.clear(str(workdir))


# --------------------------------------------------------------------- one trial


def run_trial(plan: StudyPlan, draw: int) -> TrialResult:
    """Take the next trial of the study, train its runs, tell the study.

    Args:
      draw: how many trials were drawn before; a trial that waits in the queue is not drawn.

    Raises:
      UserError: of a run, other than that it diverged; the trial stays as running.
    """
    import optuna

    study = _loaded(plan, seed=sampler.seed_of(plan.options.sampler_seed, draw))
    trial = study.ask(sampler.distributions(plan.space))
    directory = trial.user_attrs.get("directory", f"{trial.number:04d}")
    trial.set_user_attr("directory", directory)
    reporter = _Reporter(study, trial, plan.metric)
    try:
        outcomes = _train(
            plan.runs(sampler.settings(plan.space, trial.params), directory), reporter
        )
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        if errors := [outcome["error"] for outcome in outcomes if outcome["error"]]:
            # As pruned, without a value, it counts as worse than any other for the sampler.
            trial.set_user_attr("diverged", errors[0])
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            trial.set_user_attr("epoch", outcomes[0]["best_epoch"])
            study.tell(trial, float(np.mean([outcome["best_metric"] for outcome in outcomes])))
    return _read(plan, study.trials[trial.number])


def _train(runs: list[config.RunConfig], reporter: _Reporter) -> list[dict[str, Any]]:
    """The outcomes of a trial's runs; the first one is reported, and may be pruned."""
    from slgr_jax.training import training_log

    outcomes = []
    for place, run in enumerate(runs):
        if not pool.finished(run):
            if place == 0:
                reporter.prune()
            with training_log.listening(reporter if place == 0 else None):
                pool.fit(run)
        outcome = results.outcome(run.workdir)
        assert outcome is not None, "training ended with an outcome"
        outcomes.append(outcome)
        if outcome["error"]:
            break
    return outcomes


class _Reporter:
    """A progress callback that reports each validation, and raises TrialPruned.

    What the trial that this one repeats has reported is known: its run goes on after it.
    """

    def __init__(self, study: Study, trial: Trial, metric: str) -> None:
        self._trial, self._metric = trial, metric
        first = trial.user_attrs.get("repeats")
        self._known = {} if first is None else study.trials[first].intermediate_values
        for epoch, value in sorted(self._known.items()):
            trial.report(value, epoch)

    def __call__(self, progress: TrainingProgress) -> None:
        epoch, value = progress.metrics.get("epoch"), progress.metrics.get(f"valid/{self._metric}")
        if epoch is None or value is None or epoch in self._known:
            return
        self._trial.report(float(value), int(epoch))
        self.prune()

    def prune(self) -> None:
        """Raise TrialPruned where the pruner says so."""
        import optuna

        if self._trial.should_prune():
            raise optuna.TrialPruned


# --------------------------------------------------------------------- the study


def _storage(plan: StudyPlan) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(plan.out / STORE))
    return optuna.storages.JournalStorage(backend)


def _mend(journal: pathlib.Path) -> None:
    """Remove the lock and the half line that a killed process may leave; this one holds OUT."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.exists():
        whole = journal.read_bytes().rpartition(b"\n")
        os.truncate(journal, len(whole[0]) + len(whole[1]))


def _loaded(plan: StudyPlan, *, seed: int) -> Study:
    """The study with its sampler and pruner."""
    import optuna

    options, pruner = plan.options, optuna.pruners.NopPruner()
    if options.pruner == "median":
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=options.prune_after)
    elif options.pruner == "hyperband":
        most = max(plan.runs(search_space.corners(plan.space)[0])[0].train.epochs, 2)
        least = min(options.prune_after, most - 1)
        pruner = optuna.pruners.HyperbandPruner(min_resource=least, max_resource=most)
    return optuna.load_study(
        study_name=NAME,
        storage=_storage(plan),
        sampler=sampler.make(options.sampler, seed),
        pruner=pruner,
    )


def _opened(plan: StudyPlan) -> Study:
    """The study in OUT, begun with the defaults where there is none.

    Raises:
      ConfigError: it is another study, or Optuna is not installed.
    """
    from slgr_jax.data import schema

    # tomli_w writes best.toml: at the end it would be late to miss it.
    sampler.require("slgr tune", "optuna", "tomli_w")
    import optuna

    fixed = {name: sampler.label(value) for name, value in plan.fixed.items()}
    searched = {f"search {name}": str(of) for name, of in plan.space.items()}
    names = ("seeds", "sampler", "sampler_seed", "pruner", "prune_after")
    options = {name: getattr(plan.options, name) for name in names}
    split = schema.read_dataset_manifest(plan.data).split_hash
    now = json.loads(json.dumps({"split": split, **options, **searched, **fixed}))

    _mend(plan.out / STORE)
    study = optuna.create_study(
        study_name=NAME, storage=_storage(plan), direction="maximize", load_if_exists=True
    )
    was = study.user_attrs.get("settings")
    if was is None:
        if not study.trials and (settings := _defaults(plan)) is not None:
            _enqueue(study, settings, default=True)
        study.set_user_attr("settings", now)
    elif was != now:
        changed = [
            f"{name}: {was.get(name, 'not given')} -> {now.get(name, 'not given')}"
            for name in sorted({*was, *now})
            if was.get(name) != now.get(name)
        ]
        raise ConfigError(
            f"{plan.out} holds a study with other settings ({listing(changed)}); choose another "
            "--out, or remove it"
        )
    return study


def _defaults(plan: StudyPlan) -> dict[str, Any] | None:
    """The values that searched knobs have unless given; None where the space is without them."""
    try:
        run = config.make_run(plan.data, "", **plan.fixed)
    except ConfigError:  # what is fixed needs something that is searched
        return None
    values = search_space.values_of(run)
    if any(values[name] not in of for name, of in plan.space.items()):
        return None
    return {name: sampler.label(values[name]) for name in plan.space}


def _retry_unfinished(plan: StudyPlan, study: Study) -> None:
    """Mark trials that a killed process left running as failed, and put them in the queue."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        attributes = trial.user_attrs
        params = attributes.get("params", trial.params)
        if set(params) != set(plan.space):
            continue  # killed while it was drawn: it will be drawn again
        tries = attributes.get("tries", 1) + 1
        if tries > _TRIES:
            LOGGER.warning("trial %d is given up: it never came to its end", trial.number)
            continue
        kept = {k: v for k, v in attributes.items() if k in ("default", "directory")}
        _enqueue(study, params, repeats=trial.number, tries=tries, **kept)


def _enqueue(study: Study, params: Mapping[str, Any], **attributes: Any) -> None:
    """Let the study's next trial have these parameters; one in the queue counts as none drawn."""
    study.enqueue_trial(dict(params), user_attrs={"params": dict(params), **attributes})


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def _value(trial: TrialResult) -> float:
    return -np.inf if trial.value is None else trial.value


def _read(plan: StudyPlan, trial: FrozenTrial) -> TrialResult:
    attributes = trial.user_attrs
    state = "diverged" if "diverged" in attributes else trial.state.name.lower()
    return TrialResult(
        trial.number,
        state,
        trial.value if state == "complete" else None,
        attributes.get("epoch", trial.last_step),
        sampler.settings(plan.space, trial.params),
        str(plan.out / TRIALS / attributes.get("directory", f"{trial.number:04d}")),
        bool(attributes.get("default")),
    )


def _result(plan: StudyPlan, study: Study) -> TuneResult:
    """All trials, best first; writes best.toml."""
    import tomli_w

    trials = sorted(
        (_read(plan, trial) for trial in study.trials if _has_ended(trial)),
        key=lambda trial: (-_value(trial), trial.number),
    )
    if not trials or trials[0].value is None:
        raise ConfigError(
            f"none of {len(trials)} trials came to a value (diverged or stopped early); narrow "
            "the ranges, or raise --trials"
        )
    best, path = trials[0], plan.out / BEST
    first = plan.runs(best.settings)[0]
    settings = {"data": plan.data, **plan.fixed, **best.settings, "seed": first.train.seed}
    title = f"trial {best.number} of {len(trials)}, valid {plan.metric} {best.value:.6f}"
    command = f"slgr train --config={path} --workdir=RUN"
    write_atomically(path, f"# {title}\n# {command}\n{tomli_w.dumps(settings)}")
    ends = search_space.at_an_end(plan.space, best.settings)
    return TuneResult(plan.metric, tuple(trials), path, tuple(ends))
