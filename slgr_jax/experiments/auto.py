"""Guidance by validation: none, unless a guided run is better by more than noise.

What `slgr train --guidance=auto` does. Candidates, all with the knobs that are given:

    none        no guidance
    global      pairwise, alpha = 1: everything is believed
    calibrated  pairwise, through the gate that learns where the teacher is right
    paper       pairwise, through S-LLMR's gate
and where unlisted items rank below the product's lists (`arms.ARMS`)

    rrd         listed items in their order above the others; rrd_selective: places as a gate says
    hard_negatives   listed items against what `none` would recommend instead

each guided one at every lambda of `LAMBDAS` (of these `FREE_LAMBDAS`), or at the --lambda that is
given.

Which one is kept. The greatest of m noisy validation values is too great even if no guidance helps,
and nearly always a guided one's: m - 1 of them are guided. So a candidate must

1. beat `none` over the users of validation in a paired one-sided test at `LEVEL`, corrected for all
   candidates that were tried by their joint distribution (`significance.max_sign_flip`): if no
   guidance changes anything, one data set in twenty gets that far, whatever m;
2. as the best by validation of those that do, be trained again with the next seed, and beat `none`
   of that seed in the same test of one comparison: users do not tell a lucky start, or a lucky
   epoch of early stopping, from a good guidance.

Otherwise `none` is kept. A rule of one standard error would keep a candidate that is above by one,
which the best of many is by chance more often than not. The price is power: a gain that validation
cannot tell from noise is left. The test part is never read. What is kept is better on validation,
which need not be the teacher's doing: guidance may stand in for a regulariser that was not tuned.

WORKDIR/auto.json         what was asked; then all candidates, what was kept and why
WORKDIR/candidates/NAME   a run each; the checkpoints of `none` alone are kept
WORKDIR                   a copy of the run that is kept, for all other commands
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slgr_jax import config, files
from slgr_jax.config.knobs import flag_name, to_json
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.evaluation import significance
from slgr_jax.experiments import arms, pool, results
from slgr_jax.experiments.pool import LOGGER

if TYPE_CHECKING:
    from slgr_jax.training.loop import Outcome

TABLE, CANDIDATES = "auto.json", "candidates"
GUIDED, FREE_LISTS = arms.VARIANTS[1:], arms.FREE_LISTS
LAMBDAS, FREE_LAMBDAS = (0.1, 1.0), (1.0, 5.0)
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class AutoPlan:
    """What is tried.

    Attributes:
      data: dataset directory.
      workdir: where the run that is kept will be.
      teacher: product under DATA/teacher.
      knobs: of every candidate, by flag name; without guidance, teacher and lambda.
      weight: the --lambda that is given; None: a grid.
      free_lists: unlisted items rank below the product's lists.
    """

    data: str
    workdir: pathlib.Path
    teacher: str
    knobs: Mapping[str, Any]
    weight: float | None
    free_lists: bool

    def candidates(self) -> list[Candidate]:
        """Everything that is tried, `none` first."""
        guided = (*GUIDED, *FREE_LISTS) if self.free_lists else GUIDED
        tried = [Candidate("none")]
        for arm in guided:
            grid = FREE_LAMBDAS if arm in FREE_LISTS else LAMBDAS
            weights = grid if self.weight is None else (self.weight,)
            tried += [Candidate(arm, weight) for weight in weights]
        return tried

    def knobs_of(self, candidate: Candidate) -> dict[str, Any]:
        """The knobs that train a candidate directly."""
        if candidate.arm == "none":  # it does not use what is given for the guided ones
            of_guidance = {flag_name(f) for f in dataclasses.fields(config.GuidanceConfig)}
            knobs = {name: v for name, v in self.knobs.items() if name not in of_guidance}
        else:
            of_teacher = {"teacher": self.teacher, "lambda": candidate.weight}
            of_arm = arms.ARMS[candidate.arm]
            given = arms.used_by(str(of_arm["guidance"]), self.knobs)
            knobs = {**given, **of_arm, **of_teacher}
        if knobs.get("reference_runs") == arms.OF_STRONGEST:  # there is no other without an LLM
            unguided = Candidate("none", again=candidate.again)
            knobs["reference_runs"] = str(self.directory(unguided))
        if candidate.again:
            knobs["seed"] = knobs.get("seed", config.TrainConfig.seed) + 1
        return knobs

    def directory(self, candidate: Candidate) -> pathlib.Path:
        """Where a candidate is trained."""
        return self.workdir / CANDIDATES / candidate.name

    def run(self, candidate: Candidate) -> config.RunConfig:
        """A candidate's run."""
        knobs = self.knobs_of(candidate)
        return config.make_run(self.data, str(self.directory(candidate)), **knobs)

    def command(self, candidate: Candidate) -> str:
        """`slgr train ...` that trains a candidate directly, into RUN."""
        knobs = self.knobs_of(candidate)
        parts = [f"--data={self.data}", "--workdir=RUN"]
        parts += [_as_flag(name, value) for name, value in knobs.items()]
        return shlex.join(["slgr", "train", *parts])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that is tried.

    Attributes:
      arm: of `arms.ARMS`.
      weight: lambda; None of `none`.
      again: with the next seed.
    """

    arm: str
    weight: float | None = None
    again: bool = False

    @property
    def name(self) -> str:
        """Of its directory."""
        weight = "" if self.weight is None else f"_lambda{self.weight:g}"
        return f"{self.arm}{weight}{'_next_seed' if self.again else ''}"


@dataclasses.dataclass(frozen=True)
class AutoResult:
    """What was kept, and why; `print` shows it in three lines.

    Attributes:
      chosen: name of the candidate.
      why: by how much, in words.
      command: what trains it directly.
    """

    chosen: str
    why: str
    command: str

    def __str__(self) -> str:
        return f"kept: {self.chosen}\n{self.why}\ntrain it directly: {self.command}"


@dataclasses.dataclass(frozen=True)
class Tested:
    """A candidate against `none` of its seed.

    Attributes:
      valid: validation metric of the candidate.
      gain: mean difference over users.
      p: one-sided, corrected for the candidates that were tested together.
    """

    candidate: Candidate
    valid: float
    gain: float
    p: float


# --------------------------------------------------------------------- the whole


def make_plan(data: str, workdir: pathlib.Path, knobs: Mapping[str, Any]) -> AutoPlan:
    """A plan in which every candidate is a run that there can be.

    Args:
      knobs: what is given, by flag name, guidance=auto among it.

    Raises:
      UserError: a knob contradicts the search or does nothing, there is no such teacher, or
        nothing to validate on.
    """
    from slgr_jax.data import schema
    from slgr_jax.teacher.products import preferences

    config.check_auto(knobs)
    rest = {name: v for name, v in knobs.items() if name not in ("guidance", "teacher", "lambda")}
    rest.pop("restart", None)
    teacher = knobs["teacher"]
    product = schema.read_teacher_manifest(preferences.product_path(data, teacher))
    free_lists = product.kind == "scores" and product.unlisted == "below"
    plan = AutoPlan(data, workdir, teacher, rest, knobs.get("lambda"), free_lists)
    for candidate in plan.candidates():
        run = plan.run(candidate)
    config.check_used(run, rest)  # a guided one: it reads what the others read, and more
    if not sum(file.rows for file in schema.read_dataset_manifest(data).files["valid"]):
        raise ConfigError(f"{data} has no validation part: nothing to choose a guidance by")
    return plan


def train(plan: AutoPlan, *, workers: int = 0, restart: bool = False) -> Outcome:
    """Train the candidates that are missing, choose, and leave the one that is kept in WORKDIR.

    Args:
      workers: processes on a CPU; 0: one per core.
      restart: delete what is there first.

    Returns:
      How the run that is kept ended; status `interrupted` if a signal stopped the search, which
      the same call goes on with.

    Raises:
      UserError: WORKDIR holds something else, or no candidate can be trained.
    """
    from slgr_jax.training import checkpoint, loop, run_directory

    begin = time.monotonic()
    with run_directory.held(plan.workdir) as may_write:
        if restart:
            run_directory.clear(plan.workdir)
            shutil.rmtree(plan.workdir / CANDIDATES, ignore_errors=True)
            (plan.workdir / TABLE).unlink(missing_ok=True)
        if _begun(plan):
            LOGGER.info("%s: guidance is chosen already, nothing to do", plan.workdir)
        else:
            try:
                _search(plan, pool.workers(workers), may_write)
            except SystemExit:  # how `pool` ends when it is interrupted
                seconds = time.monotonic() - begin
                return loop.Outcome("interrupted", 0, 0, 0, None, seconds)
        progress = checkpoint.Checkpoints(str(plan.workdir), writable=False).progress()
        assert progress is not None
        return loop.outcome("finished", progress, time.monotonic() - begin)


def read(workdir: str | pathlib.Path) -> AutoResult:
    """What a finished search found."""
    table = results.read_json(pathlib.Path(workdir) / TABLE)
    return AutoResult(table["chosen"], table["why"], table["command"])


def _begun(plan: AutoPlan) -> bool:
    """Whether the search in WORKDIR is finished; begins it where there is none.

    Raises:
      ConfigError: there is another search, or a run.
    """
    from slgr_jax.data import schema
    from slgr_jax.training import run_directory

    manifest = schema.read_dataset_manifest(plan.data)
    guided = plan.run(plan.candidates()[-1])
    asked = {"teacher": plan.teacher, "lambda": plan.weight, **plan.knobs}
    asked |= {"split": manifest.split_hash, "ids": manifest.id_map_hash}
    asked |= {"answers": run_directory.teacher_hash(guided)}
    asked = json.loads(json.dumps(asked))

    table = results.read_json(plan.workdir / TABLE)
    fix = "choose another --workdir, or --restart to delete it"
    if table is None:
        if (plan.workdir / run_directory.CONFIG).is_file():
            raise ConfigError(
                f"{plan.workdir} holds a run that --guidance=auto did not begin; {fix}"
            )
        results.write_json(plan.workdir / TABLE, {"asked": asked})
        return False
    was = table["asked"]
    changed = [
        f"{name}: {was.get(name, 'not given')} -> {asked.get(name, 'not given')}"
        for name in sorted({*was, *asked})
        if was.get(name) != asked.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{plan.workdir} holds a choice of guidance with other settings ({listing(changed)}); "
            f"{fix}"
        )
    return "chosen" in table


def _search(plan: AutoPlan, workers: int, may_write: Callable[[], None]) -> None:
    """Train what is missing, choose, and write WORKDIR, which `may_write` says is still held."""
    from slgr_jax.training import checkpoint

    candidates = plan.candidates()
    LOGGER.info("guidance: trying %s", listing([c.name for c in candidates], limit=99))
    failed = _train(plan, candidates, workers)
    tested = _test(plan, [c for c in candidates if c.name not in failed])
    best = choose(tested)
    confirmed = None
    if best is not None:
        repeated = dataclasses.replace(best.candidate, again=True)
        unguided = Candidate("none", again=True)
        LOGGER.info("guidance: %s once more, with the next seed", best.candidate.name)
        if not (broken := _train(plan, [unguided, repeated], workers)):
            (confirmed,) = _test(plan, [unguided, repeated])
        failed |= broken
    passed = confirmed is not None and confirmed.p < LEVEL and confirmed.gain > 0
    kept = best.candidate if best is not None and passed else candidates[0]

    none = _valid(plan.run(candidates[0]))
    metric = plan.run(candidates[0]).train.early_stop_metric
    rows = [{"name": "none", "valid": none}] + [
        {"name": t.candidate.name, "valid": t.valid, "gain": t.gain, "p": t.p} for t in tested
    ]
    table = results.read_json(plan.workdir / TABLE) | {
        "metric": metric,
        "candidates": rows,
        "failed": failed,
        "next_seed": confirmed and {"gain": confirmed.gain, "p": confirmed.p},
        "chosen": kept.name,
        "why": why(metric, none, tested, best, confirmed, failed),
        "command": plan.command(kept),
    }
    may_write()
    _install(plan, kept)
    results.write_json(plan.workdir / TABLE, table)  # last: it says that the rest is there
    for directory in (plan.workdir / CANDIDATES).iterdir():
        if directory.name != "none":
            checkpoint.clear(str(directory))


# --------------------------------------------------------------------- candidates


def _train(plan: AutoPlan, candidates: Sequence[Candidate], workers: int) -> dict[str, str]:
    """Train candidates; name -> why there is nothing to test of it.

    Raises:
      ConfigError: `none` diverged.
    """
    runs = [plan.run(candidate) for candidate in candidates]
    root, refused = plan.workdir / CANDIDATES, {}
    try:
        pool.train_runs(runs, workers=workers, root=root)
    except InputError:
        # This teacher's answers do not do for one of them (no labelled preference, for instance):
        # find out which, the others are known to be finished or go on.
        for candidate, run in zip(candidates, runs, strict=True):
            try:
                pool.train_runs([run], workers=1, root=root)
            except InputError as error:
                if candidate.arm == "none":
                    raise
                refused[candidate.name] = str(error)
    for candidate in candidates:
        outcome = results.outcome(plan.directory(candidate))
        diverged = outcome["error"] if outcome and candidate.name not in refused else None
        if diverged and candidate.arm == "none":
            raise ConfigError(f"without guidance it diverged: {diverged}")
        if diverged:
            refused[candidate.name] = str(diverged)
    return refused


def _valid(run: config.RunConfig) -> float:
    outcome = results.outcome(run.workdir)
    assert outcome is not None
    return float(outcome["best_metric"])


def _test(plan: AutoPlan, candidates: Sequence[Candidate]) -> list[Tested]:
    """The guided candidates against the first one, which is `none`, over users."""
    none, *guided = [_user_values(plan.run(candidate)) for candidate in candidates]
    if not guided:
        return []
    differences = np.stack([values - none for values in guided], axis=1)
    defined = differences[~np.isnan(differences).any(axis=1)]
    p_values = significance.max_sign_flip(defined)
    return [
        Tested(candidate, _valid(plan.run(candidate)), float(defined[:, place].mean()), p)
        for place, (candidate, p) in enumerate(zip(candidates[1:], p_values, strict=True))
    ]


def _user_values(run: config.RunConfig) -> np.ndarray:
    """[n] the metric that the run was stopped by, of each user of validation, by user."""
    from slgr_jax.evaluation import click_metrics
    from slgr_jax.sampling import labelled_rows
    from slgr_jax.serving import load

    trained, metric = load(run.workdir), run.train.early_stop_metric
    if metric.startswith("rows_"):  # a user's AUC is what rows_gauc is the mean of
        rows = labelled_rows.make_rows(trained.dataset, "valid", run.evaluation, run.loss)
        return click_metrics.per_user(rows, trained.row_scores(rows, "valid")).values["auc"]
    ranking, _ = trained.evaluate("valid")
    assert ranking is not None
    return ranking.users["all"].values[metric]


# --------------------------------------------------------------------- what is kept


def choose(tested: Sequence[Tested]) -> Tested | None:
    """The best by validation of those that are above `none` by more than noise, if any is."""
    above = [t for t in tested if t.p < LEVEL and t.gain > 0]
    return max(above, key=lambda t: t.gain, default=None)


def why(
    metric: str,
    none: float,
    tested: Sequence[Tested],
    best: Tested | None,
    confirmed: Tested | None,
    failed: Mapping[str, str],
) -> str:
    """By how much, in one line."""
    if not tested:
        return f"no guided run could be trained: {'; '.join(map(': '.join, failed.items()))}"
    shown = best or max(tested, key=lambda t: t.gain)
    text = f"validation {metric} without guidance {none:.4f}, "
    text += f"{shown.candidate.name} {shown.valid:.4f} ({_relative(shown.gain, none)}, "
    text += f"p {shown.p:.3f} after correction for {len(tested)} tried)"
    if best is None:
        return f"{text}: no more than noise, so no guidance"
    if confirmed is None:
        return f"{text}; with the next seed it failed, so no guidance"
    text += f"; with the next seed {_relative(confirmed.gain, none)}, p {confirmed.p:.3f}"
    passed = confirmed.p < LEVEL and confirmed.gain > 0
    return text if passed else f"{text}: no more than noise, so no guidance"


def _relative(gain: float, of: float) -> str:
    return f"{gain / of:+.1%}" if of > 0 else f"{gain:+.4f}"


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def _install(plan: AutoPlan, kept: Candidate) -> None:
    """Copy a candidate into WORKDIR; its config, which makes it a run, last.

    Raises:
      ConfigError: another run has been trained there meanwhile.
    """
    from slgr_jax.training import run_directory

    run, source = plan.run(kept), plan.directory(kept)
    placed = dataclasses.replace(run, workdir=str(plan.workdir))
    if (plan.workdir / run_directory.CONFIG).is_file() and (
        run_directory.read_config(str(plan.workdir)) != placed
    ):
        raise ConfigError(
            f"{plan.workdir} holds a run that was trained meanwhile; remove what it wrote there, "
            f"{run_directory.CONFIG} and checkpoints, and call again"
        )
    for path in source.iterdir():
        target = plan.workdir / path.name
        if path.name in (results.OUTCOME, run_directory.CONFIG) or path.name.startswith("."):
            continue  # what starts with a dot is a lock
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(path, target)
        else:
            files.atomically(target, functools.partial(shutil.copyfile, path))
    files.write_atomically(plan.workdir / run_directory.CONFIG, to_json(placed))
