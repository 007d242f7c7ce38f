"""Arms as data: which knobs an arm sets, and which of them are tuned.

Knobs are named as on the command line (`config.make_run`). Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax import config
from slgr_jax.config import CLICK_BACKBONES, DISTILLATIONS, SEQUENCE_BACKBONES, RunConfig
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError, listing
from slgr_jax.teacher.products import controls

Settings = Mapping[str, float | str]

# What --reference_runs says in an arm that reads the run of `none` of the same seed.
REFERENCE = "none"
_AGAINST_HARD_NEGATIVES = {
    "guidance": "pairwise",
    "hard_negatives": 100,
    "reference_runs": REFERENCE,
}
# What a knob of an arm says that names the product of --vectors.
VECTORS = "--vectors"
# Knobs of an arm that is no control.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "none": {"guidance": "none"},
    "global": {"guidance": "pairwise", "gate": "constant", "alpha": 1.0},
    "pointwise": {"guidance": "pointwise"},
    "rule": {"guidance": "pairwise", "gate": "rule"},
    "paper": {"guidance": "pairwise", "gate": "paper"},
    "budget": {"guidance": "pairwise", "gate": "budget"},
    "calibrated": {"guidance": "pairwise", "gate": "calibrated"},
    "global_hard_negatives": {**_AGAINST_HARD_NEGATIVES, "gate": "constant", "alpha": 1.0},
    "hard_negatives": {
        **_AGAINST_HARD_NEGATIVES,
        "gate": "calibrated",
        "gate_inputs": "reference,history,popularity,teacher",
    },
    "paper_hard_negatives": {**_AGAINST_HARD_NEGATIVES, "gate": "paper"},
    "hard_own": {"guidance": "none", "negatives": "hard", "reference_runs": REFERENCE},
    # Global distillation of the literature; each selective: a place is believed as the gate says.
    **{name: {"guidance": name} for name in DISTILLATIONS},
    **{f"{name}_selective": {"guidance": name, "gate": "calibrated"} for name in DISTILLATIONS},
    "init": {"guidance": "none", "init_item_vectors": VECTORS},
    "adapter": {"guidance": "none", "item_vectors": VECTORS},
}
# Arms that read a product of vectors, not a teacher's.
VECTOR_ARMS = ("init", "adapter")
# Arms that learn from no teacher.
UNTAUGHT = ("none", "hard_own", *VECTOR_ARMS)
# Arms in which alpha is learned or a rule: what controls can be matched to, first choice first.
GATED = (
    *("hard_negatives", "calibrated", "paper", "budget", "rule", "paper_hard_negatives"),
    *(f"{name}_selective" for name in DISTILLATIONS),
)
# A control takes the knobs of the matched arm. `constant` and `shuffled` take its tuned settings
# too: they change one thing. The others teach something else, and are tuned like any arm.
CONTROLS = ("constant", *controls.CONTROLS)
# iALS needs an extra.
DEFAULT_CONTROLS = tuple(control for control in CONTROLS if control != "ials")
UNTUNED = ("constant", "shuffled")

# Guidance losses that are tried: of a gate whose alpha is a probability, and of others. Where alpha
# says how much and not how likely, a loss that aims at alpha would push against the teacher.
LOSSES: Mapping[str, tuple[str, ...]] = {"calibrated": ("confidence", "hinge")}
OTHER_LOSSES = ("hinge", "logistic")
LITERAL = (
    "paper",
    "paper_hard_negatives",
    "pointwise",
)  # arms that keep the loss they are known by
# What is tried of a gate with a reference, in place of another loss: the gate without it.
BLIND: Mapping[str, str] = {"gate_inputs": "history,popularity,teacher"}

LAMBDAS = (0.03, 0.1, 0.3, 1.0)
# How much of an arm is tried first, where that is not lambda: knob and values.
AMOUNTS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "hard_own": ("hard_share", (0.03, 0.1, 0.3))
}
# What is tuned of each backbone: knob -> values; lambda comes on top for guided arms.
_CLICK = {"lr": (5e-4, 1e-3), "dropout": (0.0, 0.1, 0.2, 0.5)}
_SEQUENCE = {"lr": (5e-4, 1e-3), "dropout": (0.1, 0.2, 0.3, 0.5)}
GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "mf": {"lr": (0.05, 0.1), "l2": (0.005, 0.01, 0.02, 0.05)},
    "lightgcn": {"lr": (1e-3, 3e-3), "l2": (1e-4, 1e-3, 3e-3, 1e-2)},
    **dict.fromkeys(SEQUENCE_BACKBONES, _SEQUENCE),
    **dict.fromkeys(CLICK_BACKBONES, _CLICK),
}
TUNED = ("lr", "l2", "dropout", "lambda")
# What else is tried of `none`, and of arms that read vectors, at its best point, each alone and
# what helps together: a gain over a weak recommender is that recommender's. Guided arms begin where
# `none` ended.
_BASES: tuple[Settings, ...] = (
    {"dim": 256},
    {"negatives": "popularity", "popularity_power": 0.5},
    {"loss": "bce"},
)
BASES: Mapping[str, tuple[Settings, ...]] = dict.fromkeys(("mf", "lightgcn"), _BASES)


def grids(
    backbones: Sequence[str],
    fixed: Mapping[str, Any],
    tried: Mapping[str, tuple[float, ...]],
) -> dict[str, dict[str, tuple[float, ...]]]:
    """What is tuned of each backbone.

    Args:
      backbones: names.
      fixed: knobs that are given: they are not tuned, but are in every setting.
      tried: knob -> values in place of the backbone's own; empty: its own, if it has any.

    Raises:
      ConfigError: an unknown backbone.
    """
    unknown = [name for name in backbones if name not in GRIDS]
    if unknown:
        known = listing(GRIDS, limit=99)
        raise ConfigError(f"--backbones: {listing(unknown)} is not one of: {known}")

    replaced = {name: values for name, values in tried.items() if values}
    for name in TUNED:
        if name in fixed and name != "lambda":
            replaced[name] = (float(fixed[name]),)
    return {backbone: {**GRIDS[backbone], **replaced} for backbone in backbones}


@dataclasses.dataclass(frozen=True)
class ComparisonPlan:
    """What is compared on one data set.

    Attributes:
      data: dataset directory.
      out: directory of the runs and of the report.
      knobs: what the command line says of every run, by name.
      teacher: product under DATA/teacher; empty if no arm is guided.
      vectors: product under DATA/embeddings; empty without `VECTOR_ARMS`.
      backbones, arms: what is compared; `none` is among the arms, controls come last.
      matched: the arm that controls take their knobs from; empty without controls.
      focus: the arm that the verdict is about.
      seeds: runs of an arm.
      grids: backbone -> what is tuned of it.
      lambdas: weights of the guidance that are tried.
      tune_loss: also try what `variants` says of an arm, at its best lambda.
      own_arms: arms beside `ARMS`: name -> knobs.
      tune_runs: most tuning runs of an arm; 0: as many as `none` takes, which are its grid, `bases`
        and what `widen` asks for.
      bases: backbone -> what is tried of `none` at its best point.
      widen: where the best value is an end of what was tried, try one step further, at most twice.
      refit: also train every run once more, on training and validation.
    """

    data: str
    out: pathlib.Path
    knobs: Mapping[str, Any]
    teacher: str
    backbones: tuple[str, ...]
    arms: tuple[str, ...]
    matched: str
    focus: str
    seeds: int
    grids: Mapping[str, Mapping[str, tuple[float, ...]]]
    lambdas: tuple[float, ...]
    tune_loss: bool = True
    own_arms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    tune_runs: int = 0
    vectors: str = ""
    bases: Mapping[str, tuple[Settings, ...]] = dataclasses.field(default_factory=dict)
    widen: bool = False
    refit: bool = False

    @property
    def searched_arms(self) -> tuple[str, ...]:
        """Tuned arms whose settings are points of the backbone's grid, `none` among them: those
        without a teacher or an amount of their own."""
        return tuple(
            arm for arm in self.tuned_arms if not self.teacher_of(arm) and arm not in AMOUNTS
        )

    @property
    def tuned_arms(self) -> tuple[str, ...]:
        """Arms that are tuned themselves."""
        return tuple(arm for arm in self.arms if arm not in UNTUNED)

    def teacher_of(self, arm: str) -> str:
        """The product that `arm` learns from."""
        knobs = {**ARMS, **self.own_arms}.get(arm, {})
        if knobs.get("guidance") == "none":
            return ""
        return (
            controls.control_name(self.teacher, arm) if arm in controls.CONTROLS else self.teacher
        )

    def knobs_of(self, arm: str) -> dict[str, Any]:
        """The knobs that make the arm, its teacher among them."""
        of_arm = {
            name: self.vectors if value == VECTORS else value
            for name, value in {**ARMS, **self.own_arms}[
                self.matched if arm in CONTROLS else arm
            ].items()
        }
        if arm == "constant":  # its alpha is a setting: the matched gate's mean
            knobs = {**self._shared_knobs(of_arm), **of_arm, "teacher": self.teacher}
            matched = config.make_run("", "", **knobs)
            loss = matched.guidance_loss_name
            of_arm["gate"] = "constant"
            if of_arm["guidance"] == "pairwise":
                # `gain` compares alpha with a prior, which a constant gate has not: `confidence` is
                # its counterpart for a gate that compares with 1/2.
                of_arm["guidance_loss"] = {"gain": "confidence"}.get(loss, loss)
        return {**of_arm, "teacher": self.teacher_of(arm)}

    def _shared_knobs(self, of_arm: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs of every run, without those of a guidance that the arm does not have: a run
        refuses what it would not use."""
        unused = {
            flag_name(field)
            for name, section in config.sections().items()
            if name in config.GUIDANCE and name != of_arm["guidance"]
            for field in dataclasses.fields(section)
        }
        return {name: value for name, value in self.knobs.items() if name not in unused}

    def amounts(self, arm: str) -> tuple[Settings, ...]:
        """What is tried first of an arm, at the settings of `none`: the values of lambda."""
        name, values = AMOUNTS.get(arm, ("lambda", self.lambdas))
        values = (self.knobs[name],) if name in self.knobs else values
        return tuple({name: value} for value in values)

    def variants(self, arm: str) -> tuple[Settings, ...]:
        """What is tried beside the arm as it is: its other guidance loss, or its gate without the
        reference."""
        of_arm = self.knobs_of(arm)
        knobs = {**self._shared_knobs(of_arm), **of_arm}
        copied = self.matched if arm in CONTROLS else arm
        if not self.tune_loss or copied in LITERAL or of_arm["guidance"] != "pairwise":
            return ()
        if copied == "hard_negatives":
            return (BLIND,)
        if "guidance_loss" in knobs:
            return ()

        default = config.make_run("", "", **knobs).guidance_loss_name
        losses = LOSSES.get(knobs.get("gate", ""), OTHER_LOSSES)
        return tuple({"guidance_loss": loss} for loss in losses if loss != default)

    def config(
        self,
        backbone: str,
        arm: str,
        settings: Settings,
        workdir: pathlib.Path,
        seed: int = 0,
        *,
        reference: pathlib.Path | None = None,
    ) -> RunConfig:
        """The run of an arm with its settings.

        Args:
          reference: the run of `none` that an arm with one reads.

        Raises:
          ConfigError: a knob has no such value, an arm's gate for instance.
        """
        of_arm = self.knobs_of(arm)
        knobs = {**self._shared_knobs(of_arm), **of_arm, **settings}
        if "negatives" in of_arm:  # what the arm is, whatever suits `none`
            knobs["negatives"] = of_arm["negatives"]
        if knobs.get("reference_runs") == REFERENCE and reference is not None:
            knobs["reference_runs"] = str(reference)
        return config.make_run(self.data, str(workdir), backbone=backbone, seed=seed, **knobs)

    def tune_dir(self, backbone: str, arm: str, settings: Settings) -> pathlib.Path:
        """Where a tuning run is kept."""
        parts = (
            f"{key}{value if isinstance(value, str) else format(value, 'g')}"
            for key, value in settings.items()
        )
        return self._folder(backbone, "tune", arm) / "_".join([arm, *parts])

    def run_dir(self, backbone: str, arm: str, tuned: Mapping[str, Any], seed: int) -> pathlib.Path:
        """Where a run that meets the test part is kept: that of seed 0 is the run that tuning
        trained, where it did.

        Args:
          tuned: what tuning tried and chose of the arm.
        """
        if seed == 0 and tuned["tried"]:
            return self.tune_dir(backbone, arm, tuned["chosen"])
        return self._folder(backbone, "runs", arm) / f"{arm}_seed{seed}"

    def _folder(self, backbone: str, kind: str, arm: str) -> pathlib.Path:
        """Arms that learn from a teacher have a folder of its name: comparisons of several teachers
        share an OUT, and the runs of `none` in it."""
        folder = self.out / backbone / kind
        return folder / self.teacher if self.teacher_of(arm) else folder

    def refit_dir(self, backbone: str, arm: str, seed: int) -> pathlib.Path:
        """Where the refit of a run is kept."""
        return self._folder(backbone, "refit", arm) / f"{arm}_seed{seed}"

    def run(
        self, backbone: str, arm: str, of_arms: Mapping[str, Mapping[str, Any]], seed: int
    ) -> RunConfig:
        """The run of a seed with the settings that tuning chose.

        Args:
          of_arms: arm -> what tuning tried and chose.
        """
        tuned = of_arms[arm]
        workdir = self.run_dir(backbone, arm, tuned, seed)
        reference = self.run_dir(backbone, "none", of_arms["none"], seed)
        return self.config(backbone, arm, tuned["chosen"], workdir, seed, reference=reference)

    def check(self) -> None:
        """Refuse what no run can be made of, before the first one.

        Raises:
          ConfigError: an arm, a backbone or a knob that there is not.
        """
        for backbone in self.backbones:
            for arm in self.arms:
                try:
                    self.config(backbone, arm, {}, self.out)
                except ConfigError as error:
                    raise ConfigError(f"arm {arm} of {backbone}: {error}") from error


def own_arm(text: str) -> tuple[str, dict[str, Any]]:
    """`wide:gate=calibrated,gate_hidden=8` as a name and knobs; guidance=pairwise goes without
    saying.

    Raises:
      ConfigError: not of this form, or the name is taken.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not all(k and v for k, _, v in pairs):
        raise ConfigError(f"--arm={text}: write NAME:knob=value,knob=value")
    if name in ARMS or name in CONTROLS:
        raise ConfigError(f"--arm={text}: there is an arm {name} already; give another name")
    return name, {"guidance": "pairwise"} | {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)  # a number, true, false
    except json.JSONDecodeError:
        return text


def choose(
    asked: Sequence[str],
    wanted: Sequence[str],
    matched: str,
    focus: str,
    own_arms: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], str, str]:
    """The arms with `none` first and controls last, the matched arm, the arm of the verdict.

    Args:
      asked: arms, controls among them or not.
      wanted: more controls; left out where there is nothing to control.
      matched, focus: arms, or empty: the first of `GATED` among the arms; the focus may be any.
      own_arms: arms beside `ARMS`; they are compared without being asked for.

    Raises:
      ConfigError: an unknown arm, or one that cannot be matched.
    """
    unknown = [arm for arm in asked if arm not in (*ARMS, *CONTROLS)]
    if unknown:
        known = listing((*ARMS, *CONTROLS), limit=99)
        hint = "; slgr train alone takes auto" if config.AUTO in unknown else ""
        raise ConfigError(f"--guidance: {listing(unknown)} is not one of: {known}{hint}")

    unknown = [arm for arm in wanted if arm not in CONTROLS]
    if unknown:
        raise ConfigError(f"--controls: {listing(unknown)} is not one of: {listing(CONTROLS)}")

    plain = [arm for arm in dict.fromkeys(["none", *asked, *own_arms]) if arm not in CONTROLS]
    gated = [arm for arm in GATED if arm in plain]
    gated += [arm for arm, knobs in own_arms.items() if knobs.get("gate", "constant") != "constant"]
    for flag, arm, among in (("matched_to", matched, gated), ("focus", focus, plain[1:])):
        if arm and arm not in among:
            raise ConfigError(f"--{flag}={arm} is not one of the arms: {listing(among)}")

    asked_controls = [arm for arm in asked if arm in CONTROLS]
    if asked_controls and not gated:
        raise ConfigError(
            f"--guidance: the control {asked_controls[0]} copies an arm with a gate; add one of: "
            f"{listing(GATED)}"
        )

    matched = matched or (gated[0] if gated else "")
    kept = dict.fromkeys([*asked_controls, *wanted]) if matched else {}
    focus = focus or matched or plain[-1]
    return (*plain, *kept), matched if kept else "", focus
