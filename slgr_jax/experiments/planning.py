"""What a user asks of a comparison, and the plan that it comes to.

What is asked for is named as on the command line of `slgr compare`, and so are the knobs that
errors name.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax import config
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments import arm_spaces, arms, presets, search_space
from slgr_jax.experiments.arms import ComparisonPlan

DEFAULT_ARMS = ("none", "global", "pointwise", "rule", "paper", "calibrated", arms.AUTO)
# Knobs of a run that a comparison sets itself.
SET_HERE = frozenset(
    {
        *("backbone", "guidance", "teacher", "gate", "alpha", "hard_negatives", "seed", "restart"),
        "refit",
        *("init_item_vectors", "init_user_vectors", "item_vectors", "user_vectors"),
        *("item_rows", "user_rows", "adapter_chunks", "train_only"),
        *(knob.removeprefix("--") for knob in arms.PRODUCT_ARMS),
    }
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for; None is the preset's, or the default.

    Attributes:
      teacher: product under DATA/teacher; without one no guided arm can be measured.
      vectors: product under DATA/embeddings of `arms.VECTOR_ARMS`.
      edits, insert, keep_hard: products of `arms.PRODUCT_ARMS`.
      preset: shape of a published table, one of `presets.PRESETS`; empty: none.
      backbones: recommenders; mf by default.
      guidance: arms; `DEFAULT_ARMS` by default.
      arm: more arms, each NAME:knob=value,knob=value.
      controls: controls besides; all by default, none of them with a preset.
      matched_to: arm that controls copy; empty: `auto` where it is asked for, else the first gated.
      focus: arm that the verdict is about; empty: `matched_to`.
      seeds: runs of an arm, at least 2.
      search: knob -> what it may be, as `search_space` reads it: in place of what is searched of
        every arm that has the knob.
      options: how every arm is searched.
      refit: also train every run once more, on training and validation; the verdict is theirs.
        By default it is so, but not with a preset, whose paper trains on training alone.
      refit_teacher: the same teacher, made anew of training and validation: what refits learn from;
        empty: from `teacher`.
      knobs: of every run, by their command-line names; what is given is not searched.
    """

    teacher: str = ""
    vectors: str = ""
    edits: str = ""
    insert: str = ""
    keep_hard: str = ""
    preset: str = ""
    backbones: Sequence[str] | None = None
    guidance: Sequence[str] | None = None
    arm: Sequence[str] = ()
    controls: Sequence[str] | None = None
    matched_to: str = ""
    focus: str = ""
    seeds: int = 5
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: config.CompareConfig = dataclasses.field(default_factory=config.CompareConfig)
    refit: bool | None = None
    refit_teacher: str = ""
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset and self.preset not in presets.PRESETS:
            raise ConfigError(f"--preset={self.preset} is not one of: {listing(presets.PRESETS)}")
        if self.seeds < 2:
            raise ConfigError(f"--seeds={self.seeds} is below its minimum 2")
        if fixed := sorted(SET_HERE & set(self.knobs)):
            raise ConfigError(
                f"--{fixed[0]}={self.knobs[fixed[0]]} is set by the arms of a comparison; choose "
                "arms with --guidance, --arm and --backbones instead"
            )
        if fixed := sorted(SET_HERE & set(self.search)):
            raise ConfigError(f"--search: {fixed[0]} is set by the arms of a comparison; drop it")


def _check_chunks(data: str, name: str, arm: str) -> None:
    """Refuse a product of one vector a row, which an arm of `CHUNKED` cannot choose among."""
    from slgr_jax.data import schema

    product = pathlib.Path(data) / schema.EMBEDDINGS_DIR / name
    if not schema.read_embedding_manifest(product).fields:
        raise ConfigError(
            f"arm {arm} chooses among a row's chunks, and --vectors={name} has one vector "
            "a row; make chunks (slgr teach embed --chunks=8), which the other arms read the mean "
            "of, or drop the arm"
        )


def _check_refit_teacher(plan: ComparisonPlan) -> None:
    """Refuse a teacher of refits that has not seen validation, or that nothing would learn from."""
    from slgr_jax.data import schema
    from slgr_jax.teacher.products import preferences

    given = f"--refit_teacher={plan.refit_teacher}"
    if not plan.refit or not plan.teacher:
        missing = "no run is refitted (--refit)" if plan.teacher else "no arm learns from a teacher"
        raise ConfigError(f"{given}: {missing}; drop it")
    product = preferences.product_path(plan.data, plan.refit_teacher)
    built_from = schema.read_teacher_manifest(product).built_from
    if built_from != "includes_valid":
        raise ConfigError(
            f"{given}: built_from={built_from}, expected includes_valid: {plan.teacher} made anew "
            "of training and validation (slgr teach nearest --with_validation, for instance)"
        )


def _products(request: Request, asked: Sequence[str]) -> dict[str, str]:
    """Products of `arms.PRODUCT_ARMS`, by what names them: those that an arm reads.

    Raises:
      ConfigError: one is missing, or is read by no arm.
    """
    given = {
        arms.EDITS: (request.edits, "slgr teach import --edits=FILE"),
        arms.INSERTED: (request.insert, "slgr teach import --interactions=FILE"),
        arms.RATED: (request.keep_hard, "slgr teach import --scores=FILE --keep_training_items"),
    }
    for flag, (name, made_by) in given.items():
        reads = [arm for arm in asked if arm in arms.PRODUCT_ARMS[flag]]
        if reads and not name:
            raise ConfigError(f"missing {flag}=NAME ({made_by}), which arm {reads[0]} reads")
        if name and not reads:
            raise ConfigError(
                f"{flag}={name} is read by no arm; add {arms.PRODUCT_ARMS[flag][0]} to --guidance"
            )
    return {flag: name for flag, (name, _) in given.items() if name}


def make_plan(data: str, out: pathlib.Path, request: Request) -> ComparisonPlan:
    """What is compared on one data set.

    Raises:
      ConfigError: an arm, a control or a knob that there is not, or nothing to tune.
    """
    from slgr_jax.data import schema

    request = _with_preset(request)
    asked = request.guidance or ()
    if not request.teacher and not set(asked) <= set(arms.UNTAUGHT):
        known = ",".join(arms.UNTAUGHT)
        raise ConfigError(f"missing --teacher; without one --guidance is some of: {known}")
    reads_vectors = [arm for arm in asked if arm in arms.VECTOR_ARMS]
    if bool(reads_vectors) != bool(request.vectors):
        fix = (
            f"missing --vectors=NAME (slgr teach embed), which arm {reads_vectors[0]} reads"
            if reads_vectors
            else f"--vectors={request.vectors} is read by no arm; add init, adapter, "
            "rlmrec_con or another of vectors to --guidance"
        )
        raise ConfigError(fix)
    products = _products(request, asked)
    for arm in asked:
        if arm in arms.CHUNKED:
            _check_chunks(data, request.vectors, arm)
    arms_asked = DEFAULT_ARMS if request.guidance is None else request.guidance
    controls = arms.DEFAULT_CONTROLS if request.controls is None else request.controls
    more_arms = dict(map(arms.own_arm, request.arm))
    if not request.teacher:
        arms_asked, controls, more_arms = tuple(request.guidance or ("none",)), (), {}
    chosen, matched, focus = arms.choose(
        arms_asked, controls, request.matched_to, request.focus, more_arms
    )

    backbones, knobs = request.backbones or ("mf",), request.knobs
    search = search_space.make_space(request.search, knobs) if request.search else {}
    counts = schema.read_dataset_manifest(data).counts
    edits = products.get(arms.EDITS)
    edit_range, hows = arm_spaces.edits_of(data, edits) if edits else (None, config.EDIT_HOWS)
    plan = ComparisonPlan(
        data=data,
        out=out,
        knobs=knobs,
        teacher=request.teacher,
        backbones=tuple(dict.fromkeys(backbones)),
        arms=chosen,
        matched=matched,
        focus=focus,
        seeds=request.seeds,
        options=request.options,
        search=search,
        softmax=arm_spaces.softmax_of(counts["items"]),
        variants=arm_spaces.variants_of(data, request.teacher) if arms.AUTO in chosen else (),
        own_arms=more_arms,
        vectors=request.vectors,
        products=products,
        edit_range=edit_range,
        edit_hows=hows,
        refit=not request.preset if request.refit is None else request.refit,
        refit_teacher=request.refit_teacher,
        backbone_knobs=_backbone_knobs(request),
        factors_width=arm_spaces.factors_width(counts, knobs) if request.options.ease_start else 0,
    )
    arm_spaces.check(plan)
    if plan.refit_teacher:
        _check_refit_teacher(plan)
    return plan


def _with_preset(request: Request) -> Request:
    """The request with what its preset says where it says nothing itself."""
    if not request.preset:
        return request
    preset = presets.PRESETS[request.preset]
    arms_asked = request.guidance
    # Whether a teacher is missing depends on what the user asked for, not on the preset.
    if arms_asked is None and request.teacher:
        arms_asked = presets.arms_of(preset, request.vectors)
    return dataclasses.replace(
        request,
        backbones=preset.backbones if request.backbones is None else request.backbones,
        guidance=arms_asked,
        controls=() if request.controls is None else request.controls,
        knobs={**preset.knobs, **request.knobs},
    )


def _backbone_knobs(request: Request) -> Mapping[str, Mapping[str, Any]]:
    """What the preset says of single backbones, but for what is given."""
    if not request.preset:
        return {}
    return {
        backbone: {name: value for name, value in knobs.items() if name not in request.knobs}
        for backbone, knobs in presets.PRESETS[request.preset].backbone_knobs.items()
    }
