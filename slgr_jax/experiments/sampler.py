"""What a search tries next: Optuna's samplers on a `SearchSpace`, for `slgr tune` and `compare`.

`suggest` is a function of what was tried and of a seed: a search that is called again draws what it
would have drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slgr_jax.errors import ConfigError
from slgr_jax.experiments.search_space import Choice, Range, SearchSpace

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

# Parameters, as Optuna has them, and what came of them: greater is better, None where a run
# diverged.
Tried = Sequence[tuple[Mapping[str, Any], float | None]]


def require(command: str, *modules: str) -> None:
    """Refuse, before anything is trained, a command that needs `modules` of the extra tune.

    Raises:
      ConfigError: one of them is not installed.
    """
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{command} needs the extra: pip install 'slgr_jax[tune]' ({error})"
        ) from error


def seed_of(sampler_seed: int, number: int) -> int:
    """The seed of a draw: of the sampler's, and of how many were drawn before."""
    return int(np.random.SeedSequence([sampler_seed, number]).generate_state(1)[0])


def make(kind: str, seed: int, startup: int = 10) -> BaseSampler:
    """A sampler, `tpe` (Bergstra et al. 2011) or `random`.

    Args:
      startup: trials that tpe draws at random before it learns from them.
    """
    from optuna import samplers

    if kind == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed, n_startup_trials=startup)


def suggest(
    space: SearchSpace,
    tried: Tried,
    *,
    kind: str,
    sampler_seed: int,
    number: int,
    startup: int,
) -> dict[str, Any]:
    """The parameters of trial `number`, which is drawn at random where that is below `startup`.

    What is drawn at random depends on the seed, the number and the space up to a knob alone: two
    spaces that begin alike have alike draws.

    Args:
      space: what may be drawn; what was tried lies in it.
      tried: the trials before this one.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = seed_of(sampler_seed, number)
    kinds = distributions(space)
    if number < startup:
        kind, tried = "random", ()
    study = optuna.create_study(direction="maximize", sampler=make(kind, seed, startup))
    for params, value in tried:
        complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
        # As pruned, without a value, what diverged counts as worse than any other.
        state = pruned if value is None else complete
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(params), distributions=kinds, value=value, state=state
            )
        )
    return dict(study.ask(kinds).params)


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """A space as Optuna states it."""
    from optuna import distributions as kinds

    by_knob: dict[str, BaseDistribution] = {}
    for name, of in space.items():
        if isinstance(of, Choice):
            by_knob[name] = kinds.CategoricalDistribution([label(value) for value in of.values])
        elif of.is_whole:
            by_knob[name] = kinds.IntDistribution(int(of.low), int(of.high), log=of.log)
        else:
            by_knob[name] = kinds.FloatDistribution(of.low, of.high, log=of.log)
    return by_knob


def label(value: Any) -> Any:
    """A value as Optuna keeps it: lists are text."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def settings(space: SearchSpace, params: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters are as knobs."""
    values = dict(params)
    for name, of in space.items():
        if isinstance(of, Choice) and name in values:
            values[name] = {label(value): value for value in of.values}[values[name]]
    return values


def nearest(of: Range | Choice, value: Any) -> Any:
    """`value` as a parameter, or what is nearest to it: of choices the first, where it is none."""
    if isinstance(of, Choice):
        return label(value if value in of else of.values[0])
    return min(max(value, of.low), of.high)
