"""The knobs of a training run, and what goes with what."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any

from slgr_jax.config.backbones import (
    BACKBONE_DEFAULTS,
    BACKBONES,
    LOSSES,
    LOSSES_OF,
    learns_from_sequences,
)
from slgr_jax.config.guidance import (
    GUIDANCE_DEFAULTS,
    GateConfig,
    GuidanceConfig,
    PairwiseConfig,
    RRDConfig,
)
from slgr_jax.config.knobs import BATCH, COUNT, FLOAT, WIDTH, Section, flag_name, knob
from slgr_jax.errors import ConfigError, listing

ROWS = ("none", "sampled", "rated")
NEGATIVES = ("uniform", "popularity", "in_batch")
KERNELS = ("auto", "native", "xla")
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "lazy_adam")
TABLE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SliceConfig(Section):
    """Which users are cold and which items are tail, by training counts only."""

    cold_user_history: int = knob(
        -1,
        "cold users have at most this many training interactions; -1 = the count that the "
        "quarter of users with least history does not exceed",
        minimum=-1,
        maximum=COUNT,
    )
    tail_item_fraction: float = knob(
        0.2, "tail items: this share of the catalogue, least popular first", minimum=0, maximum=1
    )
    history_bins: tuple[int, ...] = knob(
        (5, 10, 20, 50, 100), "upper edges of the history-length slices", minimum=0, maximum=COUNT
    )
    popularity_bins: tuple[int, ...] = knob(
        (5, 20, 50, 100, 200), "upper edges of the item-popularity slices", minimum=0, maximum=COUNT
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The recommender."""

    backbone: str = knob("mf", "recommender to train", choices=BACKBONES)
    dim: int = knob(64, "width of an embedding", minimum=1, maximum=WIDTH)
    item_bias: bool = knob(True, "mf: add a learned bias per item")
    init_std: float = knob(
        0.1,
        "standard deviation of a freshly drawn embedding row's norm "
        "per sqrt(dim), i.e. entries ~ N(0, init_std^2 / dim)",
        above=0,
        maximum=FLOAT,
    )
    dropout: float = knob(
        0.0,
        "dropout rate of a training pass: mf on the user's vector, lightgcn on the graph's edges, "
        "others inside the network",
        minimum=0,
        below=1,
    )
    layers: int = knob(
        2,
        "lightgcn: propagations; sasrec, bert4rec: transformer blocks; gru4rec: recurrent layers; "
        "autoint, dcn, dcnv2: interaction layers",
        minimum=1,
        maximum=256,
    )
    heads: int = knob(2, "sasrec, bert4rec, autoint: attention heads", minimum=1, maximum=WIDTH)
    hidden: int = knob(
        128,
        "gru4rec: width of the state; sasrec, bert4rec: width of the feed-forward",
        minimum=1,
        maximum=WIDTH,
    )
    max_history: int = knob(
        50,
        "sequence and click backbones: latest events of a user that are looked at",
        minimum=1,
        maximum=WIDTH,
    )
    history_fields: bool = knob(
        True, "click backbones: use the history and its categories as fields (needs times)"
    )
    most_categories: int = knob(
        8, "click backbones: categories kept of an item", minimum=1, maximum=WIDTH
    )
    mask_probability: float = knob(
        0.2, "bert4rec: share of events that are masked and predicted", above=0, below=1
    )
    mlp: tuple[int, ...] = knob(
        (200, 80), "click backbones: widths of the MLP", minimum=1, maximum=WIDTH
    )
    attention_mlp: tuple[int, ...] = knob(
        (64, 16), "din: widths of the attention unit's MLP", minimum=1, maximum=WIDTH
    )
    attention_width: int = knob(
        64, "autoint: width of the attention over fields", minimum=1, maximum=WIDTH
    )
    cin: tuple[int, ...] = knob(
        (100, 100, 100),
        "xdeepfm: maps of each layer of the interaction network",
        minimum=1,
        maximum=WIDTH,
    )
    experts: int = knob(
        4, "dcnv2: experts of a cross layer (with --low_rank)", minimum=1, maximum=1024
    )
    low_rank: int = knob(
        0, "dcnv2: rank of an expert's cross matrix; 0 = one full matrix", minimum=0, maximum=WIDTH
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """How tables (row by row) and dense parameters (optax Adam) are updated."""

    table_optimizer: str = knob(
        "adagrad", "update rule of the embedding rows a batch touches", choices=TABLE_OPTIMIZERS
    )
    table_dtype: str = knob(
        "float32",
        "storage of the tables' values; bfloat16 halves it and rounds stochastically (what an "
        "optimiser accumulates stays float32)",
        choices=TABLE_DTYPES,
    )
    lr: float = knob(0.05, "learning rate of the tables", above=0, maximum=FLOAT)
    l2: float = knob(
        0.02,
        "L2 penalty per triple on the rows it touches: l2/2 * (|u|^2+|i|^2+|j|^2)",
        minimum=0,
        maximum=FLOAT,
    )
    adam_b1: float = knob(0.9, "lazy_adam: decay of the first moment", minimum=0, below=1)
    adam_b2: float = knob(0.999, "lazy_adam: decay of the second moment", minimum=0, below=1)
    eps: float = knob(1e-8, "adagrad, lazy_adam: added to the denominator", above=0, maximum=FLOAT)
    dense_lr: float = knob(
        1e-3, "Adam learning rate of dense parameters and the gate", above=0, maximum=FLOAT
    )


@dataclasses.dataclass(frozen=True)
class LossConfig(Section):
    """What is learned from interactions."""

    loss: str = knob(
        "auto",
        "bpr: a positive over a drawn negative; bce: positive and negatives as labelled rows; "
        "softmax: the positive among all items; sampled_softmax: among --shared_negatives, with "
        "their probability taken out; auto: the backbone's own",
        choices=LOSSES,
    )
    negatives_per_positive: int = knob(
        1, "bpr, bce: negatives drawn for each positive", minimum=1, maximum=WIDTH
    )
    shared_negatives: int = knob(
        1024,
        "sampled_softmax: negatives drawn a step, for all positives of it",
        minimum=1,
        maximum=BATCH,
    )
    rating_threshold: float = knob(
        0.0,
        "bce: every training interaction is a row, 1 where its rating is at least this, and no "
        "negative is drawn; 0 = all are positives",
        minimum=0,
        maximum=FLOAT,
    )
    min_history: int = knob(
        0,
        "learn from interactions that have at least this many earlier ones of the user (the click "
        "benchmark of S-LLMR: 1); sequence backbones need one anyway",
        minimum=0,
        maximum=COUNT,
    )


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Section):
    """How triples are drawn on the device."""

    batch_size: int = knob(
        2048,
        "per step, over all devices: triples, labelled positives or, for sequence backbones, "
        "windows of --max_history events",
        minimum=1,
        maximum=BATCH,
    )
    triples_per_user: int = knob(
        8,
        "triples (and preferences) drawn for one user at a time; every training interaction stays "
        "as likely, and a user's row is read once for several triples",
        minimum=1,
        maximum=BATCH,
    )
    negatives: str = knob(
        "uniform", "distribution of the negative item j in a triple (u, i, j)", choices=NEGATIVES
    )
    popularity_power: float = knob(
        1.0, "negatives=popularity: P(j) ~ (training count of j)^power", minimum=0, maximum=100
    )
    allow_positive_negatives: bool = knob(
        False, "let a training positive of the user be drawn as its negative"
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Full ranking over all items."""

    ks: tuple[int, ...] = knob(
        (10, 20), "cut-offs K of the ranking metrics", minimum=1, maximum=BATCH
    )
    eval_users_per_chunk: int = knob(
        1024, "users ranked at once; bounds memory", minimum=1, maximum=BATCH
    )
    pooled_auc: bool = knob(True, "also report AUC over all user-item pairs pooled")
    ranking: bool = knob(True, "rank the catalogue; --noranking leaves only --rows")
    rows: str = knob(
        "none",
        "also predict clicks on labelled rows (auc, gauc, log-loss): sampled = each positive with "
        "--row_negatives drawn items; rated = interactions, 1 where rated --rating_threshold",
        choices=ROWS,
    )
    row_negatives: int = knob(
        1, "rows=sampled: negatives drawn for each positive", minimum=1, maximum=WIDTH
    )
    row_seed: int = knob(0, "rows=sampled: seed of the negatives", minimum=0, maximum=COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ks:
            raise ConfigError("--ks is empty; give at least one cut-off, e.g. --ks=10,20")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The loop."""

    epochs: int = knob(
        200,
        "most epochs; one epoch draws as many triples as there are training interactions",
        minimum=1,
        maximum=COUNT,
    )
    eval_every: int = knob(1, "epochs between two validations", minimum=1, maximum=COUNT)
    patience: int = knob(
        10,
        "validations without a better early_stop_metric before stopping; 0 = never",
        minimum=0,
        maximum=COUNT,
    )
    early_stop_metric: str = knob(
        "ndcg@10",
        "overall validation metric to maximise; unless given, at the first of --ks where 10 is not "
        "among them, and rows_auc with --noranking",
    )
    steps_per_dispatch: int = knob(
        0,
        "steps K per device program, between which signals and errors are seen; 0 = about two "
        "million triples and preferences of mf, or as much work",
        minimum=0,
        maximum=BATCH,
    )
    checkpoint_every_s: float = knob(
        30.0,
        "seconds between two checkpoints; one is also written at the end",
        minimum=0,
        maximum=COUNT,
    )
    restart: bool = knob(False, "delete what --workdir holds and start anew, instead of resuming")
    seed: int = knob(
        0, "seed of initialisation and of every draw", minimum=0, maximum=2_000_000_000
    )
    table_shards: int = knob(
        1,
        "devices that share the rows of one table; the others replicate it",
        minimum=1,
        maximum=WIDTH,
    )
    kernels: str = knob(
        "auto",
        "who reads and writes table rows, and ranks: native (C++ compiled on this machine; one CPU "
        "device), xla, or auto = native where it can be had",
        choices=KERNELS,
    )
    min_devices: int = knob(1, "refuse to start with fewer devices", minimum=1, maximum=BATCH)
    tensorboard: bool = knob(False, "also write TensorBoard files (extra: tensorboard)")
    verify_checksums: bool = knob(True, "check every shard's SHA-256 when loading")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: where, and every section."""

    data: str
    workdir: str
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    pairwise: PairwiseConfig = dataclasses.field(default_factory=PairwiseConfig)
    rrd: RRDConfig = dataclasses.field(default_factory=RRDConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    slices: SliceConfig = dataclasses.field(default_factory=SliceConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.guidance.guidance != "none" and not self.guidance.teacher:
            raise ConfigError(
                f"--guidance={self.guidance.guidance} needs --teacher=NAME, a product under "
                "DATA/teacher (make one with slgr teach)"
            )
        if self.guidance.guidance == "none" and self.guidance.teacher:
            raise ConfigError(
                f"--teacher={self.guidance.teacher} is not used with --guidance=none; "
                "add --guidance=pairwise or drop it"
            )
        self._check_methods()
        self._check_reference_runs()
        self._check_loss()

    def _check_methods(self) -> None:
        """Refuse knobs of a guidance that this run does not have: they would do nothing."""
        for method in ("pairwise", "rrd"):
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
        if gate.reference_runs and not (gate.reads_reference_runs or hard_negatives):
            raise ConfigError(
                f"--reference_runs={gate.reference_runs} is not read with "
                f"--uncertainty={gate.uncertainty} and --gate={gate.gate}, "
                f"--gate_inputs={gate.gate_inputs}; add "
                "--uncertainty=ensemble, reference to the inputs of a supervised gate, or "
                "--hard_negatives, or drop it"
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
        if workdir in map(os.path.realpath, self.gate.members):
            raise ConfigError(
                f"--reference_runs={self.gate.reference_runs} names --workdir={self.workdir} "
                f"itself; name runs "
                "that were trained before it"
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
        if self.evaluation.rows == "rated" and not loss.rating_threshold:
            raise ConfigError("--rows=rated needs --rating_threshold=R: label 1 from R on")
        if not self.evaluation.ranking and self.evaluation.rows == "none":
            raise ConfigError("--noranking and --rows=none leave nothing to evaluate")
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
    def reference_runs(self) -> tuple[str, ...]:
        """Directories of the runs that a gate reads, or that rank hard negatives; () without
        guidance."""
        return self.gate.members if self.guided else ()

    @property
    def hard_negatives(self) -> int:
        """R: hard negatives that complete a user's list; 0 without pairwise guidance."""
        return self.pairwise.hard_negatives

    @property
    def gate_lr(self) -> float:
        """Adam learning rate of the gate, with 0 resolved."""
        return self.gate.gate_lr or (0.02 if self.gate.supervised else self.optimizer.dense_lr)

    @property
    def labelled_per_step(self) -> int:
        """K: labelled preferences drawn per step; 0 without a supervised gate."""
        if not self.guided or not self.gate.supervised:
            return 0
        return self.gate.labelled_per_step or max(1, self.preferences_per_step // 2)

    @property
    def preferences_per_step(self) -> int:
        """G: preferences drawn per step; 0 without guidance."""
        if not self.guided:
            return 0
        return self.guidance.preferences_per_step or self.sampler.batch_size


def sections() -> dict[str, type[Section]]:
    """The sections of a training run by the name they have in `RunConfig`."""
    hints = typing.get_type_hints(RunConfig)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[field.name])
    }


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
