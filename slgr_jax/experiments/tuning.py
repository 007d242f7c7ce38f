"""Settings by validation: every arm of every backbone is searched alike, with seed 0.

0. With --base a search without guidance, of as many trials as an arm has. What it finds is where
   the searches of all arms begin, that of `none` too: so guidance is added to a base that is tuned,
   and an arm with more knobs, or `auto` with its variants, spends its trials on these.
1. Trials that depend on no other: what the base found, or the defaults (of `auto` with each
   variant); then, until half of --trials, an arm's own knobs and the learning rate at random, at
   the base's other settings.
   Without own knobs or without a base everything is drawn at random, alike in every arm.
2. The other half, drawn by the sampler from what the arm's own trials came to.
3. With --widen two times a quarter of --trials more. Where the best trial is at an end of a range,
   that range is a step wider from there on, and the first trial looks at what is new.

Every arm has the same number of trials; of `auto` those with which each seed chooses among two
finalists count, too. An arm goes on as soon as its own trials have ended, whatever others do; one
that reads another's run begins when its search has ended. What an arm
drew is in its `search.json`: called again, a search goes on with it, and trains no finished trial.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slgr_jax.config import RunConfig
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import arm_spaces, results, sampler, search_space
from slgr_jax.experiments.arms import UNTUNED, ComparisonPlan, Settings, trial_name
from slgr_jax.experiments.pool import Stream

# Trains the runs of all streams, of which there are so many; `pool.train_streams`.
Train = Callable[[Sequence[Stream], int], None]
# {backbone: {arm: {"tried": [...], "chosen": {...}, "trial": ..., ...}}}
Tuned = dict[str, dict[str, dict[str, Any]]]

RECORD = "search.json"
# Share of a range, on its scale, that counts as its end: that of a search of few trials, which
# comes near an end that it is drawn to, and hardly ever to it.
_EDGE = 0.08
# Of a base's draws, in place of a trial's number.
_BASE_NUMBER = 1_000_000


def tune(plan: ComparisonPlan, train: Train) -> Tuned:
    """Search every arm that is tuned; copy settings to those that are matched.

    Raises:
      ConfigError: there is no validation part, every trial of an arm diverged, or OUT holds a
        search with other settings.
    """
    tuned: Tuned = {backbone: {} for backbone in plan.backbones}
    turns: list[_Base | _Turn] = []
    trials = 0
    for backbone in plan.backbones:
        base = _Base(plan, backbone) if arm_spaces.has_base(plan, backbone) else None
        turns += [base] if base is not None else []
        turns += [_Turn(plan, backbone, arm, tuned[backbone], base) for arm in plan.tuned_arms]
        searched = [*plan.tuned_arms, *(["none"] if base is not None else [])]
        trials += sum(sum(arm_spaces.trials_of(plan, arm)) for arm in searched)
    train(turns, trials)
    for backbone in plan.backbones:
        for arm in plan.arms:
            if arm in UNTUNED:
                tuned[backbone][arm] = _matched(plan, backbone, arm, tuned[backbone])
    return {b: {arm: of_arms[arm] for arm in plan.arms} for b, of_arms in tuned.items()}


class _Base:
    """The runs of the search that those of all arms of a backbone begin at.

    Attributes:
      found: what it came to, once it has ended.
    """

    def __init__(self, plan: ComparisonPlan, backbone: str) -> None:
        self._search = Search(plan, backbone, "none", {}, is_base=True)
        self.found: arm_spaces.Base | None = None

    def due(self) -> list[RunConfig]:
        """See `pool.Stream`."""
        numbers = self._search.due()
        if not numbers:
            self.found = self._search.as_base()
            self._search.keep_checkpoints()
        return [self._search.run(number) for number in numbers]

    def tell(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """See `pool.Stream`."""
        for outcome in outcomes:
            self._search.tell(outcome)


class _Turn:
    """The runs of one search, once its base is found and those are tuned that its arm reads a run
    of.

    Args:
      of_arms: arm -> what tuning chose; gets what this search comes to.
      base: what its search begins at; None: at the defaults.
    """

    def __init__(
        self,
        plan: ComparisonPlan,
        backbone: str,
        arm: str,
        of_arms: dict[str, dict[str, Any]],
        base: _Base | None,
    ) -> None:
        self._plan, self._backbone, self._arm, self._of_arms = plan, backbone, arm, of_arms
        self._base = base
        self._search: Search | None = None

    def due(self) -> list[RunConfig] | None:
        """See `pool.Stream`."""
        if self._arm in self._of_arms:
            return []
        if self._search is None:
            if not self._plan.read_before(self._arm) <= self._of_arms.keys():
                return None
            found = None if self._base is None else self._base.found
            if self._base is not None and found is None:
                return None
            self._search = Search(self._plan, self._backbone, self._arm, self._of_arms, base=found)
        numbers = self._search.due()
        if not numbers:
            self._of_arms[self._arm] = self._search.result()
            self._search.keep_checkpoints()
        return [self._search.run(number) for number in numbers]

    def tell(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """See `pool.Stream`."""
        assert self._search is not None, "what was due is told"
        for outcome in outcomes:
            self._search.tell(outcome)


class Search:
    """The trials of one arm: what is due, what it came to.

    Attributes:
      backbone, arm: whose.
      space: what is searched now.

    Args:
      of_arms: what tuning chose of the arms before it.
      base: where it begins; None: at the defaults.
      is_base: it is the search that others begin at.
    """

    def __init__(
        self,
        plan: ComparisonPlan,
        backbone: str,
        arm: str,
        of_arms: Mapping[str, Mapping[str, Any]],
        *,
        base: arm_spaces.Base | None = None,
        is_base: bool = False,
    ) -> None:
        self.backbone, self.arm = backbone, arm
        self.space = arm_spaces.space_of(plan, backbone, arm, base)
        self._plan, self._base = plan, base
        self._asked = self.space  # as it was before it was widened
        self._directory = plan.base_dir(backbone) if is_base else plan.tune_dir(backbone, arm)
        self._sampler_seed = plan.options.sampler_seed
        if is_base:  # `none` is not to draw the same once more
            self._sampler_seed = sampler.seed_of(self._sampler_seed, _BASE_NUMBER)
        self._read: str | None = None
        self._reference: pathlib.Path | None = None
        if plan.reads(arm):
            self._read = plan.reference(arm, of_arms)
            self._reference = plan.run_dir(backbone, self._read, of_arms[self._read], 0)
        self._stages = arm_spaces.trials_of(plan, arm)
        self._startup = max(self._stages[0] // 2, 1)
        self._first = arm_spaces.first_params(plan, backbone, arm, self.space, base)
        self._params: list[dict[str, Any]] = self._recorded()
        self._settings: list[Settings] = []
        self._outcomes: list[dict[str, Any]] = []
        self._looks: dict[int, dict[str, Any]] = {}  # trial -> what is new there
        self._widened: list[str] = []

    def due(self) -> list[int]:
        """The numbers of the trials that can be trained now: those that depend on no other, then
        one at a time; none when all have ended."""
        ended = len(self._outcomes)
        if ended == sum(self._stages):
            return []
        if ended in (sum(self._stages[:1]), sum(self._stages[:2])):
            self._widen(ended)
        together = max(self._startup, len(self._first))
        stop = min(max(together, ended + 1), sum(self._stages))
        for number in range(ended, stop):
            if number == len(self._params):
                self._params.append(self._draw(number))
            settings = arm_spaces.settings_of(
                self._plan, self.backbone, self.arm, self.space, self._params[number]
            )
            self._settings.append(settings)
        self._record()
        return list(range(ended, stop))

    def run(self, number: int) -> RunConfig:
        """A trial's run."""
        workdir = self._directory / trial_name(number)
        settings, reference = self._settings[number], self._reference
        return self._plan.config(self.backbone, self.arm, settings, workdir, reference=reference)

    def tell(self, outcome: dict[str, Any]) -> None:
        """What the next trial came to.

        Raises:
          ConfigError: there is no validation part.
        """
        if outcome["best_metric"] is None and not outcome["error"]:
            raise ConfigError(f"{self._plan.data} has no validation part: nothing to tune on")
        self._outcomes.append(outcome)

    def result(self) -> dict[str, Any]:
        """What report.json holds of it: all trials, the chosen one, the ranges and their ends.

        Raises:
          ConfigError: every trial diverged.
        """
        ranked = self._ranked()
        if not ranked:
            raise ConfigError(
                f"every trial of arm {self.arm} of {self.backbone} diverged; search smaller "
                "learning rates, --search=lr=..."
            )
        best = ranked[0]
        tried = [
            {**settings, "valid": outcome["best_metric"], "epoch": outcome["best_epoch"]}
            for settings, outcome in zip(self._settings, self._outcomes, strict=True)
        ]
        of_arm = {
            "tried": tried,
            "chosen": dict(self._settings[best]),
            "trial": best,
            "ranges": {name: str(of) for name, of in self._asked.items()},
            "widened": self._widened,
            "ends": search_space.at_an_end(self.space, self._settings[best], edge=_EDGE),
        }
        if self._base is not None:
            of_arm["base"] = {
                "settings": dict(self._base.settings),
                "valid": self._base.valid,
                "trials": self._base.trials,
            }
        if self._read is not None:
            of_arm["reference"] = self._read
        if self._plan.chooses(self.arm):
            of_arm["finalists"] = [
                {"chosen": dict(self._settings[number]), "trial": number}
                for number in self._finalists()
            ]
        return of_arm

    def as_base(self) -> arm_spaces.Base:
        """What it came to, for the searches that begin there.

        Raises:
          ConfigError: every trial diverged.
        """
        best, valid = self.result()["trial"], self._outcomes
        return arm_spaces.Base(
            self.space,
            self._params[best],
            self._settings[best],
            valid[best]["best_metric"],
            len(valid),
        )

    def keep_checkpoints(self) -> None:
        """Remove the checkpoints of trials that no later run reads."""
        from slgr_jax.training import checkpoint

        kept = {self._ranked()[0], *self._finalists()}
        for number in range(len(self._outcomes)):
            if number not in kept:
                checkpoint.clear(str(self._directory / trial_name(number)))

    def _ranked(self) -> list[int]:
        """Trials with a value, the greatest first, the earlier of equal ones."""
        values = [outcome["best_metric"] for outcome in self._outcomes]
        numbers = [number for number, value in enumerate(values) if value is not None]
        return sorted(numbers, key=lambda number: -values[number])

    def _finalists(self) -> list[int]:
        """The best trials of the two best variants; without variants the best trial."""
        best: dict[Any, int] = {}
        for number in self._ranked():
            best.setdefault(self._settings[number].get("variant"), number)
        return list(best.values())[:2]

    def _draw(self, number: int) -> dict[str, Any]:
        """The parameters of a trial that was not drawn before."""
        if number < len(self._first):
            return self._first[number]
        options = self._plan.options
        drawn = sampler.suggest(
            self.space,
            [
                (params, outcome["best_metric"])
                for params, outcome in zip(self._params, self._outcomes, strict=False)
            ],
            kind=options.sampler,
            sampler_seed=self._sampler_seed,
            number=number,
            startup=self._startup,
        )
        if number not in self._looks:
            return self._near_base(drawn) if number < self._startup else drawn
        return {**self._params[self._ranked()[0]], **self._looks[number]}

    def _near_base(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """What was drawn of the arm's own knobs and of the learning rate, at what the base found;
        without knobs of its own as drawn."""
        if self._base is None or not self.space.keys() - self._base.space.keys():
            return drawn
        at_base = arm_spaces.at_base(self.space, self._base)
        # How fast rows are to move depends on what else they learn from.
        return drawn | {name: value for name, value in at_base.items() if name != "lr"}

    def _widen(self, ended: int) -> None:
        """One step further where the best of the trials is at an end of a range."""
        ranked = self._ranked()
        if not ranked:
            return
        best, look = self._settings[ranked[0]], dict[str, Any]()
        for name, side in search_space.ends(self.space, best, edge=_EDGE):
            wider = search_space.wider(name, self.space[name], side)
            if wider is None:
                continue
            of, inside = wider
            self._widened.append(f"{name} {self.space[name]} to {of} after {ended} trials")
            self.space = {**self.space, name: of}
            look[name] = inside
        if look:
            self._looks[ended] = look

    def _recorded(self) -> list[dict[str, Any]]:
        """What an earlier call drew.

        Raises:
          ConfigError: of another search.
        """
        record = results.read_json(self._directory / RECORD)
        if record is None:
            return []
        was, now = record["asked"], self._asked_for()
        changed = [
            f"{name}: {was.get(name, 'not given')} -> {now.get(name, 'not given')}"
            for name in sorted({*was, *now})
            if was.get(name) != now.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{self._directory} holds a search with other settings ({listing(changed)}); "
                "choose another --out, or remove it"
            )
        drawn: list[dict[str, Any]] = record["drawn"]
        return drawn

    def _asked_for(self) -> dict[str, Any]:
        options = self._plan.options
        asked = {"sampler": options.sampler, "sampler_seed": options.sampler_seed}
        by_seeds = f" with {self._plan.seeds} seeds" if self._plan.chooses(self.arm) else ""
        asked |= {"trials": " + ".join(map(str, self._stages)) + by_seeds}
        asked |= {f"search {name}": str(of) for name, of in self._asked.items()}
        if self._base is not None:
            asked |= {"begins at": as_text(self._base.settings)}
        return asked

    def _record(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        record = {"asked": self._asked_for(), "drawn": self._params}
        results.write_json(self._directory / RECORD, record)


def _matched(
    plan: ComparisonPlan, backbone: str, arm: str, of_arms: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A control with the settings of the arm that it is matched to."""
    copied = of_arms[plan.matched]
    settings = dict(copied["chosen"])
    if arm == "constant" and settings.get("variant") != "none":
        settings["alpha"] = mean_weight(plan.run_dir(backbone, plan.matched, copied, 0))
    return {"tried": [], "chosen": settings, "trial": None, "settings_of": plan.matched}


def mean_weight(workdir: pathlib.Path) -> float:
    """The mean weight that a run's gate gave a pair in its best epoch, from its log: alpha, or what
    a loss makes of it (`pair_losses.weight`).

    Raises:
      ConfigError: the log has none.
    """
    outcome = results.outcome(workdir) or {}
    for record in results.log(workdir):
        if record.get("epoch") == outcome.get("best_epoch") and "train/alpha" in record:
            weight = record.get("train/weight", record["train/alpha"])
            return min(max(float(weight), 0.0), 1.0)
    raise ConfigError(
        f"{workdir}/log.jsonl has no train/alpha of epoch {outcome.get('best_epoch')}: the control "
        "`constant` needs it; leave it out of --controls"
    )


def as_text(settings: Settings) -> str:
    """`lr 0.1, lambda 0.3`."""
    return ", ".join(
        f"{key} {format(value, '.4g') if isinstance(value, float) else value}"
        for key, value in settings.items()
    )
