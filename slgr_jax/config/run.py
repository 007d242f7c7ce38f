"""A training run: its sections, and which of their values go together."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any

from slgr_jax.config.alignment import (
    CTRLConfig,
    HintConfig,
    HTDConfig,
    LLMEmbRATConfig,
    LLMESRConfig,
    RLMRecConConfig,
    RLMRecGenConfig,
)
from slgr_jax.config.backbones import (
    BACKBONE_DEFAULTS,
    LOSSES_OF,
    SPLIT_BY_USER,
    learns_from_sequences,
)
from slgr_jax.config.distillation import (
    CDConfig,
    DCDConfig,
    DLLM2RecConfig,
    KDConfig,
    ListKLConfig,
    RDConfig,
    RRDConfig,
    UnKDConfig,
)
from slgr_jax.config.edits import EditConfig
from slgr_jax.config.evaluation import EvaluationConfig, SliceConfig
from slgr_jax.config.examples import ExampleConfig
from slgr_jax.config.guidance import (
    ALIGNMENTS,
    BUILT_IN_GUIDANCE,
    GUIDANCE_BY_USER,
    GUIDANCE_DEFAULTS,
    GateConfig,
    GuidanceConfig,
    InteractionsConfig,
    PairwiseConfig,
)
from slgr_jax.config.hardness import HardnessConfig
from slgr_jax.config.knobs import Section, flag_name
from slgr_jax.config.model import ModelConfig
from slgr_jax.config.training import LossConfig, OptimizerConfig, SamplerConfig, TrainConfig
from slgr_jax.config.vectors import VectorConfig
from slgr_jax.errors import ConfigError, listing


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: where, and every section."""

    data: str
    workdir: str
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    vectors: VectorConfig = dataclasses.field(default_factory=VectorConfig)
    examples: ExampleConfig = dataclasses.field(default_factory=ExampleConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    hardness: HardnessConfig = dataclasses.field(default_factory=HardnessConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    edits: EditConfig = dataclasses.field(default_factory=EditConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    pairwise: PairwiseConfig = dataclasses.field(default_factory=PairwiseConfig)
    interactions: InteractionsConfig = dataclasses.field(default_factory=InteractionsConfig)
    kd: KDConfig = dataclasses.field(default_factory=KDConfig)
    list_kl: ListKLConfig = dataclasses.field(default_factory=ListKLConfig)
    rd: RDConfig = dataclasses.field(default_factory=RDConfig)
    dllm2rec: DLLM2RecConfig = dataclasses.field(default_factory=DLLM2RecConfig)
    cd: CDConfig = dataclasses.field(default_factory=CDConfig)
    rrd: RRDConfig = dataclasses.field(default_factory=RRDConfig)
    dcd: DCDConfig = dataclasses.field(default_factory=DCDConfig)
    unkd: UnKDConfig = dataclasses.field(default_factory=UnKDConfig)
    hint: HintConfig = dataclasses.field(default_factory=HintConfig)
    htd: HTDConfig = dataclasses.field(default_factory=HTDConfig)
    rlmrec_con: RLMRecConConfig = dataclasses.field(default_factory=RLMRecConConfig)
    rlmrec_gen: RLMRecGenConfig = dataclasses.field(default_factory=RLMRecGenConfig)
    llm_esr: LLMESRConfig = dataclasses.field(default_factory=LLMESRConfig)
    ctrl: CTRLConfig = dataclasses.field(default_factory=CTRLConfig)
    llmemb_rat: LLMEmbRATConfig = dataclasses.field(default_factory=LLMEmbRATConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    slices: SliceConfig = dataclasses.field(default_factory=SliceConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        self._check_teacher()
        self._check_methods()
        self._check_reference_runs()
        self._check_vectors()
        self._check_train_only()
        self.examples.check(self)
        self._check_loss()
        for section in (self.edits, self.hardness):
            section.check(self.model.backbone, self.loss, self.sampler)
        self._check_user_shards()

    def _check_user_shards(self) -> None:
        """Refuse what would need one device to hold what belongs to other devices' users."""
        shards = self.train.user_shards
        if not shards:
            return
        guidance = self.guidance.guidance
        vectors = [f"--{side}_vectors" for side in self.vectors.products]
        vectors += [f"--init_{table}_vectors" for table in self.vectors.init_products]
        reasons = {
            f"--backbone={self.model.backbone} reads what is on every device, which "
            f"{listing(SPLIT_BY_USER)} do not": self.model.backbone not in SPLIT_BY_USER,
            "--interactions_edges are of the graph of all users": self.adds_edges,
            f"--guidance={guidance} reads what is on every device, which "
            f"{listing(GUIDANCE_BY_USER)} do not": self.guided and guidance not in GUIDANCE_BY_USER,
            "--pair_selection=largest_gap compares the preferences of all users": (
                self.guided and self.pairwise.pair_selection == "largest_gap"
            ),
            "--reference_runs are whole on every device": bool(self.reference_runs),
            f"--gate_inputs={self.gate.gate_inputs} are of whole lists": (
                self.guided and bool(self.gate.knowledge_inputs)
            ),
            "--negatives=in_batch are other users' items": self.sampler.negatives == "in_batch",
            f"{listing(vectors)} are in the order of rows without shards": bool(vectors),
            "--init_from reads tables as they are without shards": bool(self.train.init_from),
            "--refit is of a run without shards": bool(self.train.refit),
            "--kernels=native draw and rank for a whole run": self.train.kernels == "native",
            f"--keep_hard={self.hardness.product} is whole on each": bool(self.hardness.product),
            f"{self.edits.named} reads all users' histories": bool(self.edits.named),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"--user_shards={shards}: {reason}; drop one of them")

    def _check_teacher(self) -> None:
        """A guidance has the product that it learns from, and none is named that nobody reads."""
        guidance = self.guidance
        reads: tuple[str, ...] = ("teacher_vectors",) if self.aligns else ("teacher",)
        if not self.guided:
            reads = ()
        elif guidance.guidance not in BUILT_IN_GUIDANCE:
            reads = ("teacher", "teacher_vectors")  # one's own: nothing is known of it
        if reads and not any(getattr(guidance, name) for name in reads):
            where = "DATA/embeddings (make one with slgr teach embed)"
            where = where if self.aligns else "DATA/teacher (make one with slgr teach)"
            raise ConfigError(
                f"--guidance={guidance.guidance} needs --{reads[0]}=NAME, a product under {where}"
            )
        for name, example in (("teacher", "pairwise"), ("teacher_vectors", "rlmrec_con")):
            if (product := getattr(guidance, name)) and name not in reads:
                raise ConfigError(
                    f"--{name}={product} is not used with --guidance={guidance.guidance}; add "
                    f"--guidance={example} or drop it"
                )

    def _check_methods(self) -> None:
        """Refuse knobs of a guidance that this run does not have: they would do nothing."""
        for method in method_sections():
            section = getattr(self, method)
            unused = [
                f"--{flag_name(field)}={getattr(section, field.name)}"
                for field in dataclasses.fields(section)
                if getattr(section, field.name) != field.default
            ]
            if unused and method != self.guidance.guidance:
                raise ConfigError(
                    f"{listing(unused)} is not used with --guidance={self.guidance.guidance}; add "
                    f"--guidance={method} or drop it"
                )

    def _check_reference_runs(self) -> None:
        gate, hard_negatives = self.gate, self.pairwise.hard_negatives
        hard = hard_negatives or self.draws_hard_negatives
        if gate.reference_runs and not (gate.reads_reference_runs or hard):
            raise ConfigError(
                f"--reference_runs={gate.reference_runs} is not read with "
                f"--uncertainty={gate.uncertainty} and --gate={gate.gate}, "
                f"--gate_inputs={gate.gate_inputs}; add "
                "--uncertainty=ensemble, reference to the inputs of a supervised gate, "
                "--hard_negatives or --negatives=hard, or drop it"
            )
        if self.draws_hard_negatives and not gate.members:
            raise ConfigError(
                "--negatives=hard are those that a trained run ranks highest: name one that was "
                "trained without them, --reference_runs=RUN"
            )
        if self.hard_negatives and not gate.members:
            raise ConfigError(
                f"--hard_negatives={hard_negatives} are ranked by trained runs: name one that "
                f"was trained without "
                "guidance, --reference_runs=RUN"
            )
        if self.guided and self.guidance_loss_name == "gain" and not self._has_prior:
            raise ConfigError(
                "--guidance_loss=gain weighs by what a teacher adds to a reference: it needs "
                "--gate=calibrated with reference among --gate_inputs"
            )
        workdir = os.path.realpath(self.workdir)
        if self.train.init_slots != "keep" and not self.train.init_from:
            raise ConfigError(
                f"--init_slots={self.train.init_slots} is not used without --init_from=RUN; drop it"
            )
        towers = self.vectors.towers == "three" and not self.vectors.fuses_users
        if (ids := self.train.init_ids_from) and not (self.train.init_from and towers):
            raise ConfigError(
                f"--init_ids_from={ids} is what one of --towers=three begins with, beside "
                "--init_from=RUN, a run with --towers=aligned, and without --user_fusion; add "
                "these, or drop it"
            )
        for name in ("init_from", "init_ids_from", "refit"):
            source = getattr(self.train, name)
            if source and os.path.realpath(source) == workdir:
                raise ConfigError(
                    f"--{name}={source} is --workdir itself; choose another --workdir"
                )
        if workdir in map(os.path.realpath, self.gate.members):
            raise ConfigError(
                f"--reference_runs={self.gate.reference_runs} names --workdir={self.workdir} "
                f"itself; name runs "
                "that were trained before it"
            )

    @property
    def adapters_alone(self) -> bool:
        """Whether rows and the network stay as --init_from left them (--train_only)."""
        return self.train.train_only == "adapters"

    def _check_train_only(self) -> None:
        if not self.adapters_alone:
            return
        if not self.vectors.products:
            raise ConfigError(
                "--train_only=adapters trains what makes rows of vectors: add --item_vectors=NAME "
                "(slgr teach embed), or drop it"
            )
        if not self.train.init_from:
            raise ConfigError(
                "--train_only=adapters leaves rows and network as a trained run has them: name it, "
                "--init_from=RUN, or drop it"
            )
        if self.guided:
            raise ConfigError(
                f"--train_only=adapters trains no gate and no rows, which "
                f"--guidance={self.guidance.guidance} is for; drop one of them"
            )
        vectors = self.vectors
        for named, is_own in {
            "--dual_view": vectors.dual_view,
            f"--towers={vectors.towers}": vectors.towers != "none",
            f"--user_fusion={vectors.user_fusion}": vectors.fuses_users,
        }.items():
            if is_own:
                raise ConfigError(
                    f"--train_only=adapters leaves the network as it is, and {named} is one of its "
                    "own; drop one of them"
                )

    def _check_vectors(self) -> None:
        self.vectors.check()
        self.vectors.check_fits(self.model.backbone)
        if self.train.init_from and self.vectors.init_products:
            names = listing(f"--init_{table}_vectors" for table in self.vectors.init_products)
            raise ConfigError(
                f"{names} and --init_from both say what rows begin with; drop one of them"
            )

    def _check_loss(self) -> None:
        backbone, loss = self.model.backbone, self.loss
        if loss.loss not in ("auto", *LOSSES_OF[backbone]):
            raise ConfigError(
                f"--loss={loss.loss} makes no sense for --backbone={backbone}; "
                f"choose one of {listing(LOSSES_OF[backbone])}"
            )
        if loss.rating_threshold and self.loss_name != "bce":
            raise ConfigError(
                f"--rating_threshold={loss.rating_threshold:g} labels rows, which --loss=bce "
                f"learns from; this run has --loss={self.loss_name}"
            )
        if loss.rating_threshold and learns_from_sequences(backbone):
            raise ConfigError(
                f"--rating_threshold labels rows; --backbone={backbone} learns from sequences of "
                "interactions: drop the low ones with slgr prepare --min_rating"
            )
        if loss.drop_share and (
            self.loss_name not in ("bpr", "bce") or learns_from_sequences(backbone)
        ):
            raise ConfigError(
                f"--drop_share={loss.drop_share:g} drops triples or rows of --loss=bpr or bce, and "
                f"--backbone={backbone} --loss={self.loss_name} learns neither; drop it"
            )
        if self.sampler.rating_power and learns_from_sequences(backbone):
            raise ConfigError(
                f"--rating_power={self.sampler.rating_power:g} draws by rating, and "
                f"--backbone={backbone} learns each window of a history once; drop one of them"
            )
        if self.evaluation.rows == "rated" and not loss.rating_threshold:
            raise ConfigError("--rows=rated needs --rating_threshold=R: label 1 from R on")
        if not self.evaluation.ranking and self.evaluation.rows == "none":
            raise ConfigError("--noranking and --rows=none leave nothing to evaluate")
        if self.draws_hard_negatives and (
            self.loss_name not in ("bpr", "bce") or loss.rating_threshold
        ):
            why = f"--loss={self.loss_name}"
            why = "--rating_threshold" if loss.rating_threshold else why
            raise ConfigError(
                f"--negatives=hard are drawn for one user each, by --loss=bpr or bce; {why} draws "
                "none of its own"
            )
        if self.sampler.negatives == "in_batch" and (
            self.loss_name in ("softmax", "sampled_softmax")
            or learns_from_sequences(backbone)
            or loss.negatives_per_positive > 1
        ):
            raise ConfigError(
                "--negatives=in_batch gives one negative to a triple; use uniform or popularity "
                f"with --backbone={backbone} --loss={self.loss_name}"
            )

    @property
    def reads_own_users(self) -> bool:
        """Whether one process of several reads the training interactions of its own users alone:
        not where it draws labelled rows outside every part, or looks up features."""
        alone = self.evaluation.rows != "sampled" and self.model.features == "none"
        return bool(self.train.user_shards) and alone

    @property
    def loss_name(self) -> str:
        """The recommendation loss, with `auto` resolved."""
        name = self.loss.loss
        return LOSSES_OF[self.model.backbone][0] if name == "auto" else name

    @property
    def guidance_loss_name(self) -> str:
        """The pairwise loss on preferences, with `auto` resolved."""
        name = self.pairwise.guidance_loss
        if name != "auto":
            return name
        if self.gate.gate != "calibrated":
            return "hinge"
        return "gain" if self._has_prior else "confidence"

    @property
    def _has_prior(self) -> bool:
        return self.gate.gate == "calibrated" and "reference" in self.gate.input_names

    @property
    def guided(self) -> bool:
        """Whether there is a guidance."""
        return self.guidance.guidance != "none"

    @property
    def aligns(self) -> bool:
        """Whether its guidance learns from vectors of users and items, not from a teacher's word
        on items."""
        return self.guidance.guidance in ALIGNMENTS

    @property
    def guided_by(self) -> str:
        """The product that its guidance learns from; empty without guidance."""
        return self.guidance.teacher or self.guidance.teacher_vectors

    @property
    def aligned_per_step(self) -> int:
        """G: interactions drawn per step by a guidance of vectors."""
        return self.guidance.aligned_per_step or min(self.sampler.batch_size, 512)

    @property
    def reference_runs(self) -> tuple[str, ...]:
        """Directories of the runs that a gate reads, or that rank hard negatives."""
        return self.gate.members if self.guided or self.draws_hard_negatives else ()

    @property
    def adds_edges(self) -> bool:
        """Whether what guides the run is also edges of the graph."""
        return self.interactions.edges

    @property
    def draws_hard_negatives(self) -> bool:
        """Whether negatives of triples come from what reference runs rank highest."""
        return self.sampler.negatives == "hard"

    @property
    def hard_negatives(self) -> int:
        """R: hard negatives that complete a user's list; 0 without pairwise guidance."""
        return self.pairwise.hard_negatives

    @property
    def gate_lr(self) -> float:
        """Adam learning rate of the gate, with 0 resolved."""
        return self.gate.gate_lr or (0.02 if self.gate.supervised else self.optimizer.dense_lr)

    @property
    def gate_is_taught(self) -> bool:
        """Whether labelled preferences teach the gate; that of a refit is as its run left it."""
        return self.guided and self.gate.supervised and not self.train.refit

    @property
    def labelled_per_step(self) -> int:
        """K: labelled preferences drawn per step; 0 without a supervised gate that learns."""
        if not self.gate_is_taught:
            return 0
        return self.gate.labelled_per_step or max(1, self.preferences_per_step // 2)

    @property
    def preferences_per_step(self) -> int:
        """G: preferences drawn per step; 0 without guidance."""
        if not self.guided:
            return 0
        if self.aligns:
            return self.aligned_per_step
        return self.guidance.preferences_per_step or self.sampler.batch_size


def sections() -> dict[str, type[Section]]:
    """The sections of a training run by the name they have in `RunConfig`."""
    hints = typing.get_type_hints(RunConfig)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[field.name])
    }


def method_sections() -> dict[str, type[Section]]:
    """The sections whose knobs go with one guidance alone, by its name."""
    return {name: section for name, section in sections().items() if name in BUILT_IN_GUIDANCE}


def upgrade(values: Any) -> None:
    """Give what an older run kept of its knobs, as JSON, the names that they have now."""
    if not isinstance(values, dict):
        return
    train, rrd = values.get("train"), values.get("rrd")
    if isinstance(train, dict) and "tensorboard" in train:
        train["track"] = "tensorboard" if train.pop("tensorboard") else ""
    if isinstance(rrd, dict) and "lists_per_step" in rrd:
        values.setdefault("guidance", {})["lists_per_step"] = rrd.pop("lists_per_step")


def make_run(data: str, workdir: str, **values: Any) -> RunConfig:
    """A run from knobs by their command-line names.

    Those not given have the defaults of the backbone, then of the guidance; the metric to stop by
    is one that --ks and --ranking leave.

    Raises:
      ConfigError: a name that is no knob, or a value out of its range.
    """
    backbone = values.get("backbone", ModelConfig.backbone)
    guidance = values.get("guidance", GuidanceConfig.guidance)
    rest = {
        **BACKBONE_DEFAULTS.get(backbone, {}),
        **GUIDANCE_DEFAULTS.get(guidance, {}),
        **values,
    }
    rest.setdefault("early_stop_metric", _first_metric(rest))
    parts = {}
    for name, section in sections().items():
        fields = {flag_name(field): field.name for field in dataclasses.fields(section)}
        parts[name] = section(**{fields[k]: rest.pop(k) for k in list(rest) if k in fields})
    if rest:
        raise ConfigError(f"no knob is called {listing(map(repr, rest))}")
    return RunConfig(data, workdir, **parts)  # type: ignore[arg-type]


def _first_metric(values: Mapping[str, Any]) -> str:
    """ndcg@10, or at the first cut-off without 10; rows_auc where nothing is ranked."""
    if not values.get("ranking", True):
        return "rows_auc"
    cutoffs = tuple(values.get("ks", ())) or (10,)
    return f"ndcg@{10 if 10 in cutoffs else cutoffs[0]}"


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """`--flag: old -> new` for each knob in which two runs differ (not data and workdir)."""
    changes = []
    for section in dataclasses.fields(RunConfig):
        left, right = getattr(a, section.name), getattr(b, section.name)
        if not dataclasses.is_dataclass(left):
            continue
        for field in dataclasses.fields(left):
            old, new = getattr(left, field.name), getattr(right, field.name)
            if old != new:
                changes.append(f"--{flag_name(field)}: {old} -> {new}")
    return changes
