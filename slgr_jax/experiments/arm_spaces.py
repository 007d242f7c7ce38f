"""What is searched of each arm: the ranges that all arms of a backbone share, and an arm's own.

Shared: learning rate, penalty, dropout, width, the recommendation loss, by which power of
popularity negatives are drawn (0: uniformly), and of mf whether rows begin as drawn or with EASE's
factors (`evaluation.factors`), so that what guidance is added to can be as good as EASE. An arm's
own knobs come after these, so that the trials that are drawn at random have the same shared values
in every arm (`sampler.suggest`). Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slgr_jax import config
from slgr_jax.config import CLICK_BACKBONES, LOSSES_OF, SEQUENCE_BACKBONES
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import sampler, search_space
from slgr_jax.experiments.arms import (
    AUTO,
    FREE_LISTS,
    UNTUNED,
    VARIANTS,
    ComparisonPlan,
    Settings,
)
from slgr_jax.experiments.search_space import Choice, Range, SearchSpace

Space = dict[str, Range | Choice]

_ALL: SearchSpace = {"dropout": Range(0.0, 0.5), "dim": Choice((32, 64, 128, 256))}
_SEQUENCE: SearchSpace = {
    "lr": Range(2e-4, 5e-3, log=True),
    "l2": Range(1e-6, 1e-2, log=True),
    **_ALL,
}
_CLICK: SearchSpace = {
    "lr": Range(2e-4, 2e-2, log=True),
    "l2": Range(1e-6, 5e-2, log=True),
    **_ALL,
}
# Numbers that every arm of a backbone searches; the loss and negatives come beside them.
RANGES: Mapping[str, SearchSpace] = {
    "mf": {"lr": Range(0.01, 0.3, log=True), "l2": Range(1e-3, 0.2, log=True), **_ALL},
    "lightgcn": {"lr": Range(5e-4, 0.02, log=True), "l2": Range(1e-5, 0.03, log=True), **_ALL},
    **dict.fromkeys(SEQUENCE_BACKBONES, _SEQUENCE),
    **dict.fromkeys(CLICK_BACKBONES, _CLICK),
}
_POWER: SearchSpace = {"popularity_power": Range(0.0, 1.0)}
_SOFTMAX = ("softmax", "sampled_softmax")
# A softmax over more items than these costs more than all else in a step.
SOFTMAX_ITEMS = 10_000

# How rows of these backbones may begin, and the product of the second way.
STARTS = ("drawn", "ease")
_STARTED = ("mf",)
FACTORS = "ease_factors"
_FACTOR_WIDTH = 512  # most numbers of them; wider rows are drawn behind these
# Scores that begin so small as those of drawn rows would be lost among drawn biases.
_FACTOR_SCALE = 10.0
_FROM_FACTORS: Settings = {
    "init_item_vectors": FACTORS,
    "init_user_vectors": FACTORS,
    "init_how": "leading",
    "init_scale": _FACTOR_SCALE,
}

_LAMBDA = Range(0.01, 10.0, log=True)
# Of losses on vectors, which are larger than the recommendation loss where they are strong; not of
# pad_mmd, whose kernels are at most 1.
_ALIGNED_LAMBDA = Range(1e-4, 0.1, log=True)
# Training interactions of an item that begins with half its vector: from hardly any to nearly all.
_INIT_HALF = Range(0.3, 300.0, log=True)
# Items that are put into a history; of what is dropped, the share that may count as hard (1: all).
_INSERTED = (1, 2, 4)
_VARIANCE_SHARE = Range(0.1, 1.0)
# What is first tried of lambda against hard negatives, where 1 to 10 does best.
_HARD_LAMBDA = 1.0
# Arms that keep the loss and the gate that they are known by.
LITERAL = ("paper", "paper_hard_negatives", "pointwise")
# Losses of pairs that are searched: of a gate whose alpha is a probability, and of others. Where
# alpha says how much and not how likely, a loss that aims at alpha would push against the teacher.
_LOSSES: Mapping[str, tuple[str, ...]] = {"calibrated": ("confidence", "hinge")}
_OTHER_LOSSES = ("hinge", "logistic")
# The gate with a reference among its inputs is also tried without.
_INPUTS = ("reference,history,popularity,teacher", "history,popularity,teacher")
# Temperatures of distillations: from a quarter of their default to four times it.
_TEMPERATURES = (
    *("kd_temperature", "list_kl_temperature", "list_kl_teacher_temperature"),
    *("dllm2rec_temperature", "cd_temperature", "dcd_temperature", "unkd_temperature"),
)
# Knobs of an arm that are where its search begins.
_BEGINS = ("gate_inputs", "init_half", "edit_how")


def softmax_of(n_items: int) -> str:
    """The loss over the catalogue that is searched where it has so many items."""
    return _SOFTMAX[n_items > SOFTMAX_ITEMS]


def factors_width(counts: Mapping[str, int], knobs: Mapping[str, Any]) -> int:
    """Numbers of EASE's factors, 0 where rows do not begin with them: EASE is fitted to catalogues
    as small as those where it is a baseline by default.

    Args:
      counts: of the dataset's users and items.
      knobs: given ones; the width among them or not.
    """
    if counts["items"] > config.EASE_BY_DEFAULT:
        return 0
    return min(int(knobs.get("dim", _FACTOR_WIDTH)), counts["users"], counts["items"])


def edits_of(data: str, name: str) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """The thresholds that are searched of a product of edits, with each of which it edits
    something, and what may become of them: none is replaced where no replacement is named.

    Raises:
      ManifestError, ShardError: there is no such product, or it does not fit.
    """
    import numpy as np

    from slgr_jax.data import dataset
    from slgr_jax.teacher.products import edits

    product = edits.load(dataset.load(data, verify=False), name)
    named = bool(product.manifest.counts["replacements"])
    hows = tuple(how for how in config.EDIT_HOWS if named or how != "replace")
    levels = np.unique(product.noise)
    return (float(levels[0]), float(levels[-2])) if levels.size > 2 else None, hows


def variants_of(data: str, teacher: str) -> tuple[str, ...]:
    """What `auto` chooses among: lists as lists, too, and hard negatives, where unlisted items rank
    below the lists.

    Raises:
      ConfigError: there is no such product.
    """
    from slgr_jax.data import schema
    from slgr_jax.teacher.products import preferences

    if teacher not in (products := preferences.products(data)):
        raise ConfigError(f"{data} has no teacher {teacher!r}; it has: {listing(products)}")
    product = schema.read_teacher_manifest(preferences.product_path(data, teacher))
    free_lists = product.kind == "scores" and product.unlisted == "below"
    return (*VARIANTS, *FREE_LISTS) if free_lists else VARIANTS


class Base(NamedTuple):
    """What a search without guidance came to: where those of all arms begin.

    Attributes:
      space: what was searched, as wide as it was at the end.
      params: of its best trial.
      settings: the same as knobs.
      valid: what that trial came to.
      trials: how many there were.
    """

    space: SearchSpace
    params: Mapping[str, Any]
    settings: Settings
    valid: float
    trials: int


def has_base(plan: ComparisonPlan, backbone: str) -> bool:
    """Whether the searches of a backbone begin at a `Base`: not where there is nothing to search
    without guidance, or nothing else is."""
    alone = plan.tuned_arms == ("none",)
    return plan.options.base and not alone and bool(space_of(plan, backbone, "none"))


def space_of(plan: ComparisonPlan, backbone: str, arm: str, base: Base | None = None) -> Space:
    """What is searched of an arm: what it shares, then its own; nothing that is given.

    Args:
      base: its ranges are those of what is shared.
    """
    of_arm = _knobs_of(plan, arm)
    starts = _starts(plan, backbone, of_arm)
    losses = _losses(plan, backbone, arm)
    space = {**RANGES[backbone], **losses, **_POWER, **starts, **_own(plan, backbone, arm)}
    if {"negatives", "rating_threshold"} & {*of_arm, *plan.knobs, *plan.search}:
        del space["popularity_power"]
    space = {
        name: of
        for name, of in space.items()
        if name not in plan.knobs and (name not in of_arm or name in _BEGINS)
    }
    space |= {name: of for name, of in plan.search.items() if _takes(plan, arm, name)}
    wide = {} if base is None else base.space
    # Choices are the arm's own: not every loss is one that it can have.
    return {
        name: wide[name] if isinstance(wide.get(name), Range) and isinstance(of, Range) else of
        for name, of in space.items()
    }


def at_base(space: SearchSpace, base: Base) -> dict[str, Any]:
    """The parameters of `base` that an arm shares, or what is nearest to them in its space."""
    at = sampler.settings(base.space, base.params)
    return {name: sampler.nearest(of, at[name]) for name, of in space.items() if name in at}


def _knobs_of(plan: ComparisonPlan, arm: str) -> Mapping[str, Any]:
    """The knobs that make the arm; of one that chooses those of none of its variants."""
    return {} if plan.chooses(arm) else plan.knobs_of(arm)


def _variants(plan: ComparisonPlan, arm: str) -> tuple[Settings, ...]:
    """Settings that say a variant, of an arm that chooses; else none."""
    if not plan.chooses(arm):
        return ({},)
    return tuple({"variant": variant} for variant in plan.variants)


def _losses(plan: ComparisonPlan, backbone: str, arm: str) -> Space:
    """The recommendation losses that the backbone takes and the arm can have."""
    if "loss" in plan.knobs:
        return {}
    unwanted = set(_SOFTMAX) - {plan.softmax}
    names = [loss for loss in LOSSES_OF[backbone] if loss not in unwanted]
    names = [loss for loss in names if _is_run(plan, backbone, arm, {"loss": loss})]
    return {"loss": Choice(tuple(names))} if len(names) > 1 else {}


def _starts(plan: ComparisonPlan, backbone: str, of_arm: Mapping[str, Any]) -> Space:
    """How rows may begin, where the arm does not say it itself."""
    said = backbone not in _STARTED or "init_item_vectors" in of_arm
    return {} if said or not plan.factors_width else {"start": Choice(STARTS)}


def _is_run(plan: ComparisonPlan, backbone: str, arm: str, settings: Settings) -> bool:
    try:
        for variant in _variants(plan, arm):
            plan.config(backbone, arm, {**settings, **variant}, plan.out)
    except ConfigError:
        return False
    return True


def _own(plan: ComparisonPlan, backbone: str, arm: str) -> Space:
    """The arm's own knobs; a control has those of the arm that it is matched to."""
    if plan.chooses(arm):
        return {"variant": Choice(plan.variants), "lambda": _LAMBDA}
    knobs = plan.knobs_of(arm)
    if "init_half" in knobs:
        return {"init_half": _INIT_HALF}
    if knobs.get("negatives") == "hard":
        return {"hard_share": Range(0.01, 0.5, log=True)}
    if knobs["guidance"] == "none":
        return _of_products(plan, backbone, arm, knobs)

    aligned = knobs["guidance"] in config.ALIGNMENTS and knobs["guidance"] != "pad_mmd"
    space: Space = {"lambda": _ALIGNED_LAMBDA if aligned else _LAMBDA}
    space |= _temperatures(str(knobs["guidance"]))
    gate = knobs.get("gate", config.GateConfig.gate)
    if gate == "budget":
        space["budget"] = Range(0.1, 0.9)
    if knobs.get("gate_inputs") == _INPUTS[0]:
        space["gate_inputs"] = Choice(_INPUTS)
    elif knobs["guidance"] == "pairwise" and plan.copied(arm) not in LITERAL:
        space["guidance_loss"] = Choice(_LOSSES.get(gate, _OTHER_LOSSES))
    return space


def _of_products(plan: ComparisonPlan, backbone: str, arm: str, knobs: Mapping[str, Any]) -> Space:
    """What is searched of arms that edit, insert or keep what is hard."""
    space: Space = {}
    if "edits" in knobs:
        hows = [how for how in plan.edit_hows if _is_run(plan, backbone, arm, {"edit_how": how})]
        if plan.edit_range:
            space["edit_threshold"] = Range(*plan.edit_range)
        if len(hows) > 1:
            space["edit_how"] = Choice(tuple(hows))
    if "insert" in knobs:
        space["inserted_per_user"] = Choice(_INSERTED)
    if "keep_hard" in knobs:
        space["hard_variance_share"] = _VARIANCE_SHARE
    return space


def _temperatures(guidance: str) -> Space:
    """The temperatures of a distillation."""
    section = config.method_sections().get(guidance)
    if section is None:
        return {}
    defaults: dict[str, Any] = {
        flag_name(field): field.default for field in dataclasses.fields(section)
    }
    return {
        name: Range(defaults[name] / 4, defaults[name] * 4, log=True)
        for name in _TEMPERATURES
        if name in defaults
    }


def _takes(plan: ComparisonPlan, arm: str, name: str) -> bool:
    """Whether a knob that the user searches does something in an arm."""
    knobs = _knobs_of(plan, arm)
    if name in knobs and name not in _BEGINS:
        return False
    of_method = {
        flag_name(field): method
        for method, section in config.method_sections().items()
        for field in dataclasses.fields(section)
    }
    guidance = knobs.get("guidance", "none")
    if name == "popularity_power":
        negatives = {**plan.knobs, **knobs}.get("negatives", "popularity")
        return negatives == "popularity"
    if name in of_method:
        return of_method[name] == guidance
    if name == "init_half":
        return "init_item_vectors" in knobs
    if name in ("hard_share", "hard_pool"):
        return knobs.get("negatives") == "hard"
    of_guidance = {
        flag_name(field)
        for section in (config.GuidanceConfig, config.GateConfig)
        for field in dataclasses.fields(section)
    }
    if plan.chooses(arm):
        return name not in of_guidance or name == "lambda"
    return name not in of_guidance or guidance != "none"


def settings_of(
    plan: ComparisonPlan, backbone: str, arm: str, space: SearchSpace, params: Mapping[str, Any]
) -> Settings:
    """Parameters as knobs of the arm's run, without those that do nothing there."""
    settings = sampler.settings(space, params)
    if settings.get("variant") == "none":
        settings.pop("lambda", None)
    if settings.pop("start", STARTS[0]) != STARTS[0]:
        settings |= _FROM_FACTORS
    power = settings.pop("popularity_power", 0.0)
    if power and plan.config(backbone, arm, settings, plan.out).loss_name != "softmax":
        settings |= {"negatives": "popularity", "popularity_power": power}
    return settings


def first_params(
    plan: ComparisonPlan, backbone: str, arm: str, space: SearchSpace, base: Base | None = None
) -> list[dict[str, Any]]:
    """What is tried first, of each variant: what `base` found, the arm's own knobs at their
    defaults. Without a base the defaults, or what is nearest to them; then, where rows may begin
    with factors, the first of these so, in the widest rows, as a rank is what lies between them and
    EASE, and at the least learning rate: from there more is to be lost."""
    first = []
    for variant in _variants(plan, arm):
        run = plan.config(backbone, arm, variant, plan.out)
        values = {**search_space.values_of(run), **variant}
        values |= {"loss": run.loss_name, "guidance_loss": run.guidance_loss_name}
        values["start"] = STARTS[0]
        if run.sampler.negatives != "popularity":
            values["popularity_power"] = 0.0
        if run.guided and run.hard_negatives:
            values["lambda"] = _HARD_LAMBDA
        params = {name: sampler.nearest(of, values[name]) for name, of in space.items()}
        first.append(params if base is None else params | at_base(space, base))
    if "start" in space and base is None:
        ends = {
            name: search_space.bounds(space[name])[end]
            for name, end in (("dim", 1), ("lr", 0))
            if name in space
        }
        first.append({**first[0], **ends, "start": STARTS[1]})
    return first


def trials_of(plan: ComparisonPlan, arm: str) -> tuple[int, ...]:
    """How many trials come before each look at the ends of ranges, the same sum for every arm.

    An arm that chooses trains a second finalist with each seed but the first: its search has so
    many less.
    """
    options = plan.options
    more = -(-options.trials // 4) if options.widen else 0
    first = options.trials - (plan.seeds - 1 if plan.chooses(arm) else 0)
    return (first, more, more) if more else (first,)


def check(plan: ComparisonPlan) -> None:
    """Refuse what no run can be made of, before the first one.

    Raises:
      ConfigError: an arm, a backbone, a knob or a range that there is not, or too few trials.
    """
    unknown = [name for name in plan.backbones if name not in RANGES]
    if unknown:
        known = listing(RANGES, limit=99)
        raise ConfigError(f"--backbones: {listing(unknown)} is not one of: {known}")
    if AUTO in plan.arms and trials_of(plan, AUTO)[0] < len(plan.variants):
        least = len(plan.variants) + plan.seeds - 1
        raise ConfigError(
            f"--trials={plan.options.trials} is below the {least} that arm auto takes: one of each "
            f"of {listing(plan.variants, 9)}, and a second finalist with every seed but the first; "
            "raise it, or drop auto"
        )
    unused = [n for n in plan.search if not any(_takes(plan, arm, n) for arm in plan.tuned_arms)]
    if unused:
        raise ConfigError(f"--search: no arm has a use for {listing(unused)}; drop it")
    for backbone in plan.backbones:
        for arm in plan.arms:
            try:
                for settings in _corners(plan, backbone, arm):
                    run = plan.config(backbone, arm, settings, pathlib.Path(plan.out))
                    config.check_fits(run.guidance.guidance, backbone)
            except ConfigError as error:
                raise ConfigError(f"arm {arm} of {backbone}: {error}") from error


def _corners(plan: ComparisonPlan, backbone: str, arm: str) -> Sequence[Settings]:
    """Settings in which every end of the arm's ranges occurs."""
    if arm in UNTUNED:
        return _variants(plan, arm)
    if not plan.chooses(arm):
        plan.config(backbone, arm, {}, plan.out)
    space = space_of(plan, backbone, arm)
    if not space:
        if sum(trials_of(plan, arm)) > 1:
            raise ConfigError(
                "every knob is given, nothing is left to search; add --trials=1 --nowiden"
            )
        return [{}]
    corners = [
        {name: sampler.label(value) for name, value in corner.items()}
        for corner in search_space.corners(space)
    ]
    return [settings_of(plan, backbone, arm, space, corner) for corner in corners]
