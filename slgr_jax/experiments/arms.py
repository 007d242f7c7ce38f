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
from slgr_jax.config import ALIGNMENTS, DISTILLATIONS, RunConfig
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError, listing
from slgr_jax.experiments.search_space import SearchSpace
from slgr_jax.teacher.products import controls, edit_controls

Settings = Mapping[str, float | str]

# What --reference_runs says in an arm that reads a run of the same seed: of `none`, or of that arm
# without an LLM's word which tuning found best.
OF_NONE, OF_STRONGEST = "none", "strongest"
_AGAINST_HARD_NEGATIVES = {
    "guidance": "pairwise",
    "hard_negatives": 100,
    "reference_runs": OF_STRONGEST,
}
# What a knob of an arm says that names the product of --vectors.
VECTORS = "--vectors"
# Likewise of products of an LLM's that are neither a teacher's nor vectors, by the knob of a run
# that a comparison gives to these arms alone; and of edits that were drawn at random.
EDITS, INSERTED, RATED = "--edits", "--insert", "--keep_hard"
RANDOM_EDITS = "--edits, at random"
# llmemb_rat reads two products, of texts and of a run; --vectors names one.
_OF_ONE_PRODUCT = tuple(name for name in ALIGNMENTS if name != "llmemb_rat")
_DUAL_VIEW = {"item_vectors": VECTORS, "init_item_vectors": VECTORS, "dual_view": True}
# Knobs of an arm that aligns, beside its guidance; PAD's two views begin as drawn.
_ALIGNED_BY: Mapping[str, Mapping[str, Any]] = {
    **{name: {"teacher_vectors": VECTORS} for name in _OF_ONE_PRODUCT},
    "pad_mmd": {"teacher_vectors": VECTORS, "item_vectors": VECTORS, "dual_view": True},
}
_PRUNED = {"drop_share": 0.71}
_TRUNCATED = {"drop_share": 0.1, "drop": "hardest", "drop_steps": 3000}
_SCORED_NEGATIVES = {"negatives": "scored", "hard_share": 1.0}
_TEXTS_OF_BOTH = {"guidance": "none", "item_vectors": VECTORS, "user_vectors": VECTORS}
_SIDE_FEATURES = {
    **_TEXTS_OF_BOTH,
    "item_side_weight": 0.02,
    "user_side_weight": 2.8,
}
# The arms that need a product of several vectors a row.
CHUNKED = ("kser", "lane")
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
    "hard_own": {"guidance": "none", "negatives": "hard", "reference_runs": OF_NONE},
    "pruned": {"guidance": "none", **_PRUNED},  # LLMRec's, of which no LLM is a part
    # The truncated loss of T-CE against noise, likewise.
    "truncated": {"guidance": "none", **_TRUNCATED},
    # LLM4DSR's edits of training interactions; its control edits as many of the same users.
    "edited": {"guidance": "none", "edits": EDITS},
    "edited_random": {"guidance": "none", "edits": RANDOM_EDITS},
    # Llama4Rec's items in sequences; and what LLMHD keeps of what `truncated` drops.
    "inserted": {"guidance": "none", "insert": INSERTED},
    "kept_hard": {"guidance": "none", "keep_hard": RATED, **_TRUNCATED, **_SCORED_NEGATIVES},
    # What the teacher says that users take, beside what they took.
    "interactions": {"guidance": "interactions"},
    "interactions_selective": {"guidance": "interactions", "gate": "calibrated"},
    # Global distillation of the literature; each selective: a place is believed as the gate says.
    **{name: {"guidance": name} for name in DISTILLATIONS},
    **{f"{name}_selective": {"guidance": name, "gate": "calibrated"} for name in DISTILLATIONS},
    **{name: {"guidance": name, **_ALIGNED_BY[name]} for name in _OF_ONE_PRODUCT},
    **{
        f"{name}_selective": {"guidance": name, **_ALIGNED_BY[name], "gate": "calibrated"}
        for name in _OF_ONE_PRODUCT
    },
    "init": {"guidance": "none", "init_item_vectors": VECTORS},
    "adapter": {"guidance": "none", "item_vectors": VECTORS},
    # Each selective: a row believes its vector as far as its training interactions say.
    "init_selective": {"guidance": "none", "init_item_vectors": VECTORS, "init_half": 10.0},
    "adapter_selective": {"guidance": "none", "item_vectors": VECTORS, "adapter_gate": True},
    "kar": {**_TEXTS_OF_BOTH, "adapter_experts": 5, "event_vectors": False},
    "colakg": {**_TEXTS_OF_BOTH, "adapter_neighbours": 10},
    # LLMRec's side features, and these with its pruning.
    "side": {**_SIDE_FEATURES},
    "llmrec": {**_SIDE_FEATURES, **_PRUNED},
    # LLM-ESR's two views of a history, and these with its self-distillation.
    "dual_view": {"guidance": "none", **_DUAL_VIEW},
    "llm_esr_full": {"guidance": "llm_esr", "teacher_vectors": VECTORS, **_DUAL_VIEW},
    # PAD's second phase, with its network, and its third; rows and encoders begin as drawn.
    "pad_aligned": {
        "guidance": "pad_mmd",
        **{"teacher_vectors": VECTORS, "item_vectors": VECTORS, "towers": "aligned"},
    },
    "pad_towers": {"guidance": "none", "item_vectors": VECTORS, "towers": "three"},
    # LANE's preferences of a user and SLIM's text of one, beside what items' texts come to; the arm
    # `adapter` is both without a user's.
    "lane": {**_TEXTS_OF_BOTH, "user_fusion": "attention"},
    "slim": {**_TEXTS_OF_BOTH, "user_fusion": "concat"},
    # As of all arms of vectors: every parameter is trained. Arms that read one vector a row read
    # the mean of its chunks.
    "kser": {**_TEXTS_OF_BOTH, "adapter_chunks": True},
}
# Arms that read a product of vectors, not a teacher's.
ALIGNED = (*_OF_ONE_PRODUCT, *(f"{name}_selective" for name in _OF_ONE_PRODUCT))
VECTOR_ARMS = (
    *("init", "adapter", "init_selective", "adapter_selective", "kar", "colakg"),
    *("side", "llmrec", "dual_view", "llm_esr_full", "slim", "pad_aligned", "pad_towers"),
    *(*CHUNKED, *ALIGNED),
)
# Arms that read a product of another kind, by what names it.
PRODUCT_ARMS: Mapping[str, tuple[str, ...]] = {
    EDITS: ("edited", "edited_random"),
    INSERTED: ("inserted",),
    RATED: ("kept_hard",),
}
# Arms without a word of an LLM: one of them is the reference of those with one.
WITHOUT_LLM = ("none", "hard_own", "pruned", "truncated")
# Arms that learn from no teacher.
UNTAUGHT = (*WITHOUT_LLM, *VECTOR_ARMS, *(arm for of in PRODUCT_ARMS.values() for arm in of))
# Of these, what an arm with an LLM's word is held against.
REFERENCES = (*WITHOUT_LLM[1:], "edited_random")
# Arms in which alpha is learned or a rule: what controls can be matched to, first choice first, but
# for `auto`, which comes before them.
GATED = (
    *("hard_negatives", "calibrated", "paper", "budget", "rule", "paper_hard_negatives"),
    *(f"{name}_selective" for name in ("interactions", *DISTILLATIONS)),
)
# A control takes the knobs of the matched arm. `constant` and `shuffled` take its tuned settings
# too: they change one thing. The others teach something else, and are tuned like any arm.
CONTROLS = ("constant", *controls.CONTROLS)
# iALS needs an extra.
DEFAULT_CONTROLS = tuple(control for control in CONTROLS if control != "ials")
UNTUNED = ("constant", "shuffled")

# The arm that chooses: its search and each seed's validation say which of its variants a run is.
# The latter only where unlisted items rank below the teacher's lists.
AUTO = config.AUTO
VARIANTS = ("none", "global", "calibrated", "paper")
FREE_LISTS = ("rrd", "rrd_selective", "hard_negatives")

# Losses of pairs whose weight is not alpha: what a constant gate of their mean weight has instead.
_CONSTANT_LOSS: Mapping[str, str] = {"confidence": "logistic", "gain": "logistic"}


@dataclasses.dataclass(frozen=True)
class ComparisonPlan:
    """What is compared on one data set.

    Attributes:
      data: dataset directory.
      out: directory of the runs and of the report.
      knobs: what the command line says of every run, by name.
      teacher: product under DATA/teacher; empty if no arm is guided.
      backbones, arms: what is compared; `none` is among the arms, controls come last.
      matched: the arm that controls take their knobs from; empty without controls.
      focus: the arm that the verdict is about.
      seeds: runs of an arm.
      options: how every arm is searched.
      search: knob -> what it may be, in place of `arm_spaces.RANGES` and of arms' own ranges.
      softmax: loss in place of softmax where the catalogue is large (`arm_spaces.softmax_of`).
      variants: what `auto` chooses among.
      own_arms: arms beside `ARMS`: name -> knobs.
      vectors: product under DATA/embeddings; empty without `VECTOR_ARMS`.
      products: of `PRODUCT_ARMS`, by what names it.
      edit_range: thresholds of edits that are searched; None: none.
      edit_hows: what may become of edits.
      refit: also train every run once more, on training and validation.
      refit_teacher: the teacher made anew of training and validation, which refits learn from;
        empty: from `teacher`.
      backbone_knobs: backbone -> what a preset says of its runs, by name.
      factors_width: numbers of EASE's factors, which rows may begin with; 0: they begin as drawn.
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
    options: config.CompareConfig = dataclasses.field(default_factory=config.CompareConfig)
    search: SearchSpace = dataclasses.field(default_factory=dict)
    softmax: str = "softmax"
    variants: tuple[str, ...] = VARIANTS
    own_arms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    vectors: str = ""
    products: Mapping[str, str] = dataclasses.field(default_factory=dict)
    edit_range: tuple[float, float] | None = None
    edit_hows: tuple[str, ...] = config.EDIT_HOWS
    refit: bool = False
    refit_teacher: str = ""
    backbone_knobs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    factors_width: int = 0

    @property
    def tuned_arms(self) -> tuple[str, ...]:
        """Arms that are tuned themselves."""
        return tuple(arm for arm in self.arms if arm not in UNTUNED)

    def teacher_of(self, arm: str) -> str:
        """The product that `arm` learns from."""
        knobs = {**ARMS, **self.own_arms}.get(arm, {})
        if knobs.get("guidance") == "none" or "teacher_vectors" in knobs:
            return ""
        return (
            controls.control_name(self.teacher, arm) if arm in controls.CONTROLS else self.teacher
        )

    def refit_teacher_of(self, arm: str) -> str:
        """The product that refits of `arm` learn from."""
        anew = dataclasses.replace(self, teacher=self.refit_teacher or self.teacher)
        return anew.teacher_of(arm)

    def copied(self, arm: str) -> str:
        """The arm whose knobs an arm has: itself, or of a control what it is matched to."""
        return self.matched if arm in CONTROLS else arm

    def chooses(self, arm: str) -> bool:
        """Whether a variant is among an arm's settings: `auto`, and controls matched to it."""
        return self.copied(arm) == AUTO

    def knobs_of(self, arm: str, variant: str = "") -> dict[str, Any]:
        """The knobs that make the arm, its teacher among them.

        Args:
          variant: of an arm that chooses.
        """
        named = {VECTORS: self.vectors, **self.products}
        if edits := self.products.get(EDITS):
            named[RANDOM_EDITS] = edit_controls.control_name(edits)
        of_arm = {
            name: named.get(value, value) if isinstance(value, str) else value
            for name, value in {**ARMS, **self.own_arms}[variant or self.copied(arm)].items()
        }
        if self.knobs.get("rating_threshold"):
            of_arm = _of_rows(of_arm, self.knobs)
        guided = of_arm.get("guidance") != "none"
        return {**of_arm, "teacher": self.teacher_of(arm) if guided else ""}

    def _shared_knobs(self, of_arm: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs of every run that the arm has a use for."""
        return used_by(str(of_arm["guidance"]), self.knobs)

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
        """The run of an arm with its settings, the variant of one that chooses among them.

        Args:
          reference: the run that an arm with a reference reads.

        Raises:
          ConfigError: a knob has no such value, an arm's gate for instance.
        """
        settings = dict(settings)
        of_arm = self.knobs_of(arm, str(settings.pop("variant", "")))
        of_backbone = self.backbone_knobs.get(backbone, {})
        knobs = {**self._shared_knobs(of_arm), **of_backbone, **of_arm, **settings}
        if "negatives" in of_arm:  # what the arm is, whatever suits `none`
            knobs["negatives"] = of_arm["negatives"]
        if knobs.get("reference_runs") in (OF_NONE, OF_STRONGEST) and reference is not None:
            knobs["reference_runs"] = str(reference)
        where = {"backbone": backbone, "seed": seed}
        if arm == "constant" and of_arm["guidance"] != "none":
            learned = {name: value for name, value in knobs.items() if name != "alpha"}
            run = config.make_run(self.data, str(workdir), **where, **learned)
            if run.guidance.guidance == "pairwise":
                loss = run.guidance_loss_name
                knobs["guidance_loss"] = _CONSTANT_LOSS.get(loss, loss)
            knobs["gate"] = "constant"
        return config.make_run(self.data, str(workdir), **where, **knobs)

    def reads(self, arm: str) -> str:
        """What the arm's runs read: a run `OF_NONE`, `OF_STRONGEST`, or none (empty)."""
        variants = self.variants if self.chooses(arm) else ("",)
        read = {str(self.knobs_of(arm, variant).get("reference_runs", "")) for variant in variants}
        return next((which for which in (OF_STRONGEST, OF_NONE) if which in read), "")

    def read_before(self, arm: str) -> set[str]:
        """The tuned arms of which a run may be read by an arm's runs."""
        read = {OF_NONE: {"none"}, OF_STRONGEST: {*WITHOUT_LLM}}.get(self.reads(arm), set[str]())
        return read & {*self.tuned_arms}

    def reference(self, arm: str, of_arms: Mapping[str, Mapping[str, Any]]) -> str:
        """The arm whose run of the same seed an arm reads; of `OF_STRONGEST` the first of equals.

        Args:
          of_arms: arm -> what tuning chose, of those without an LLM's word that are compared.
        """
        if self.reads(arm) != OF_STRONGEST:
            return "none"
        valid = {
            other: of_arms[other]["tried"][of_arms[other]["trial"]]["valid"]
            for other in WITHOUT_LLM
            if other in self.arms
        }
        return max(valid, key=valid.__getitem__)

    def tune_dir(self, backbone: str, arm: str) -> pathlib.Path:
        """Where the tuning runs of an arm are kept, each in `trial_N`."""
        return self._folder(backbone, "tune", arm) / arm

    def base_dir(self, backbone: str) -> pathlib.Path:
        """Where the tuning runs of the search are kept that those of all arms begin at."""
        return self.tune_dir(backbone, "none").with_name("base")

    def run_dir(self, backbone: str, arm: str, tuned: Mapping[str, Any], seed: int) -> pathlib.Path:
        """Where a run that meets the test part is kept: that of seed 0 is the run that tuning
        trained, where it did.

        Args:
          tuned: what tuning tried and chose of the arm, or of a finalist of `auto`.
        """
        if seed == 0 and tuned["trial"] is not None:
            return self.tune_dir(backbone, arm) / trial_name(tuned["trial"])
        variant = f"_{tuned['chosen']['variant']}" if self.chooses(arm) else ""
        return self._folder(backbone, "runs", arm) / f"{arm}{variant}_seed{seed}"

    def _folder(self, backbone: str, kind: str, arm: str) -> pathlib.Path:
        """Arms that learn from a teacher have a folder of its name: comparisons of several teachers
        share an OUT, and the runs of `none` in it."""
        folder = self.out / backbone / kind
        return folder / self.teacher if self.teacher_of(arm) else folder

    def refit_dir(self, backbone: str, arm: str, seed: int) -> pathlib.Path:
        """Where the refit of a run is kept."""
        folder = self._folder(backbone, "refit", arm)
        if self.refit_teacher and self.teacher_of(arm):
            folder /= self.refit_teacher
        return folder / f"{arm}_seed{seed}"

    def run(
        self, backbone: str, arm: str, of_arms: Mapping[str, Mapping[str, Any]], seed: int
    ) -> RunConfig:
        """The run of a seed with the settings that tuning chose; of `auto` the first finalist's.

        Args:
          of_arms: arm -> what tuning tried and chose.
        """
        return self._run(backbone, arm, of_arms, of_arms[arm], seed)

    def candidates(
        self, backbone: str, arm: str, of_arms: Mapping[str, Mapping[str, Any]], seed: int
    ) -> list[RunConfig]:
        """The runs of a seed that validation chooses among: of `auto` its finalists, else one."""
        finalists = of_arms[arm].get("finalists") or [of_arms[arm]]
        return [self._run(backbone, arm, of_arms, of, seed) for of in finalists]

    def _run(
        self,
        backbone: str,
        arm: str,
        of_arms: Mapping[str, Mapping[str, Any]],
        tuned: Mapping[str, Any],
        seed: int,
    ) -> RunConfig:
        workdir = self.run_dir(backbone, arm, tuned, seed)
        read = self.reference(arm, of_arms)
        reference = self.run_dir(backbone, read, of_arms[read], seed)
        return self.config(backbone, arm, tuned["chosen"], workdir, seed, reference=reference)


def _of_rows(of_arm: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of an arm where rows have labels: no negative is drawn, and nothing is replaced."""
    drawn = _SCORED_NEGATIVES if of_arm.get("negatives") == "scored" else {}
    of_rows = {name: value for name, value in of_arm.items() if name not in drawn}
    if "edits" in of_arm and "edit_how" not in given:
        of_rows.setdefault("edit_how", "delete")
    return of_rows


def used_by(guidance: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs without those of other guidances: a run refuses what it would not use."""
    unused = {
        flag_name(field)
        for name, section in config.sections().items()
        if name in config.GUIDANCE and name != guidance
        for field in dataclasses.fields(section)
    }
    return {name: value for name, value in knobs.items() if name not in unused}


def trial_name(number: int) -> str:
    """The directory of a trial."""
    return f"trial_{number:03d}"


def own_arm(text: str) -> tuple[str, dict[str, Any]]:
    """`wide:gate=calibrated,gate_hidden=8` as a name and knobs; guidance=pairwise goes without
    saying. What has no `=` goes on with the value before it: `gate_inputs=history,teacher`.

    Raises:
      ConfigError: not of this form, or the name is taken.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in re.split(r",(?=[^,]*=)", rest)]
    if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not all(k and v for k, _, v in pairs):
        raise ConfigError(f"--arm={text}: write NAME:knob=value,knob=value")
    if name in ARMS or name in CONTROLS or name == AUTO:
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
      matched, focus: arms, or empty: the first of `auto` and `GATED` among the arms; the focus may
        be any.
      own_arms: arms beside `ARMS`; they are compared without being asked for.

    Raises:
      ConfigError: an unknown arm, or one that cannot be matched.
    """
    unknown = [arm for arm in asked if arm not in (*ARMS, AUTO, *CONTROLS)]
    if unknown:
        known = listing((*ARMS, AUTO, *CONTROLS), limit=99)
        raise ConfigError(f"--guidance: {listing(unknown)} is not one of: {known}")

    unknown = [arm for arm in wanted if arm not in CONTROLS]
    if unknown:
        raise ConfigError(f"--controls: {listing(unknown)} is not one of: {listing(CONTROLS)}")

    plain = [arm for arm in dict.fromkeys(["none", *asked, *own_arms]) if arm not in CONTROLS]
    gated = [arm for arm in GATED if arm in plain]
    gated += [arm for arm, knobs in own_arms.items() if knobs.get("gate", "constant") != "constant"]
    gated = [AUTO, *gated] if AUTO in plain else gated
    for flag, arm, among in (("matched_to", matched, gated), ("focus", focus, plain[1:])):
        if arm and arm not in among:
            raise ConfigError(f"--{flag}={arm} is not one of the arms: {listing(among)}")

    asked_controls = [arm for arm in asked if arm in CONTROLS]
    if asked_controls and not gated:
        raise ConfigError(
            f"--guidance: the control {asked_controls[0]} copies an arm with a gate; add one of: "
            f"{listing((AUTO, *GATED))}"
        )

    matched = matched or (gated[0] if gated else "")
    kept = dict.fromkeys([*asked_controls, *wanted]) if matched else {}
    focus = focus or matched or plain[-1]
    return (*plain, *kept), matched if kept else "", focus
