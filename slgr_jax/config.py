"""Every knob of the trainer: name, default, unit, range, in one place.

A section is a frozen dataclass whose fields are made with `knob`. `flags.py` derives the
command line from the same fields, so a default or a help text is never written twice.
"""

from __future__ import annotations

import dataclasses

from slgr_jax.errors import ConfigError
from slgr_jax.knobs import Section, flag_name, knob

BACKBONES = ("mf",)
GUIDANCE = ("none", "selective")
GUIDANCE_LOSSES = ("hinge", "logistic")
GATES = ("paper", "constant", "rule")
UNCERTAINTIES = ("confidence", "entropy", "dropout")
NEGATIVES = ("uniform", "popularity", "in_batch")
KERNELS = ("auto", "native", "xla")
PAIR_SELECTIONS = ("uniform", "largest_gap")
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "lazy_adam")
TABLE_DTYPES = ("float32", "bfloat16")
SPLITS = ("auto", "global_time", "leave_last", "ratio", "premade")
# What a teacher product was built from (DESIGN section 6); the loader refuses `includes_eval`.
BUILT_FROM = ("train_only", "prefix", "includes_label", "includes_eval")
# What an item outside a user's list means: never asked about, or ranked below the list (a list
# that the teacher wrote freely over the whole catalogue).
UNLISTED = ("unknown", "below")
SCORERS = ("wordllama",)
SOURCES = ("movielens", "recbole", "amazon", "csv", "parquet")


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Section):
    """Raw files to a dataset directory."""

    source: str = knob("", "layout of the input", choices=("", *SOURCES))
    input: str = knob("", "file, folder, or zip archive (a .whl is one) with the raw data")
    test_input: str = knob("", "rows of a pre-made test split, same layout as --input")
    valid_input: str = knob("", "rows of a pre-made validation split, same layout as --input")
    out: str = knob("", "dataset directory to write; must not exist")
    name: str = knob("", "data set inside --input where it holds several; also the name in reports")
    split: str = knob(
        "auto",
        "split rule; auto = global_time where there are timestamps, else ratio; premade = take "
        "--test_input/--valid_input or --split_column as they are",
        choices=SPLITS,
    )
    split_column: str = knob("", "column that says train, valid or test (with --split=premade)")
    valid_fraction: float = knob(
        0.1, "share of interactions for validation (ratio, global_time)", above=0, below=1
    )
    test_fraction: float = knob(
        0.1, "share of interactions for test (ratio, global_time)", above=0, below=1
    )
    ratio_by: str = knob(
        "all", "ratio split: shuffle all rows together, or each user's", choices=("all", "user")
    )
    seed: int = knob(0, "seed of the ratio split", minimum=0)
    user_core: int = knob(1, "drop users with fewer interactions, repeatedly (k-core)", minimum=1)
    item_core: int = knob(1, "drop items with fewer interactions, repeatedly (k-core)", minimum=1)
    min_rating: float = knob(
        float("-inf"), "drop interactions rated below this; -inf keeps all", flag="min_rating"
    )
    user_column: str = knob("user", "csv, parquet: column with user ids (any text)")
    item_column: str = knob("item", "csv, parquet: column with item ids (any text)")
    time_column: str = knob(
        "timestamp", "csv, parquet: column with times (s, ms, us, ns or dates); used if present"
    )
    rating_column: str = knob("rating", "csv, parquet: column with ratings; used if present")
    items_input: str = knob(
        "",
        "csv, parquet: item table (csv, Parquet or Arrow with --item_column) to attach; "
        "amazon: metadata jsonl",
    )
    title_column: str = knob("title", "--items_input: column with titles; used if present")
    text_column: str = knob("text", "--items_input: column with descriptions; used if present")
    categories_column: str = knob(
        "categories", "--items_input: column with lists, or text split at '|'; used if present"
    )
    delimiter: str = knob(",", "csv: column separator; tab is '\\t'")
    rows_per_shard: int = knob(4_194_304, "most interactions in one Arrow shard", minimum=1)
    overwrite: bool = knob(False, "replace --out when it exists")


@dataclasses.dataclass(frozen=True)
class TeachConfig(Section):
    """Teacher answers to a product under DATA/teacher."""

    data: str = knob("", "dataset directory that launch/prepare.py wrote")
    name: str = knob("", "product to write or inspect: DATA/teacher/NAME")
    scores: str = knob(
        "",
        "import: Parquet, Arrow or CSV file with user, item, score (empty score: not answered) or "
        "user, preferred, other[, margin]; ids as in the raw data",
    )
    built_from: str = knob(
        "train_only",
        "import: what the teacher saw; train_only = training interactions, prefix = what came "
        "before each interaction, includes_label = also the training answers it scores, "
        "includes_eval = evaluation data (training refuses it)",
        choices=BUILT_FROM,
    )
    unlisted: str = knob(
        "unknown",
        "import: an item outside a user's list was never asked about (unknown) or ranks below "
        "the list (below: the teacher wrote it freely over the whole catalogue)",
        choices=UNLISTED,
    )
    model: str = knob("", "import: which LLM answered, for reports")
    prompt_hash: str = knob("", "import: hash or name of the prompt, for reports")
    score_kind: str = knob("score", "import: logit, prob, rating, rank, ..., for reports")
    unknown: str = knob(
        "error",
        "import: rows with an id that DATA does not have; drop counts them",
        choices=("error", "drop"),
    )
    duplicates: str = knob(
        "error",
        "import: rows that disagree about one user's same items; equal rows count once",
        choices=("error", "mean"),
    )
    delimiter: str = knob(",", "import: CSV column separator; tab is '\\t'")
    scorer: str = knob("wordllama", "score: local language model (extra: llm)", choices=SCORERS)
    candidates: int = knob(
        20, "score: items per user with history, drawn from the popular pool", minimum=0
    )
    popular_pool: int = knob(1000, "score: size of the pool, most training users first", minimum=1)
    cold_candidates: int = knob(
        20, "score: more items per cold user, evenly spread over the text space", minimum=0
    )
    tail_fraction: float = knob(
        0.1, "score: tail items are this share of the catalogue", minimum=0, maximum=1
    )
    tail_users: int = knob(20, "score: users drawn per tail item", minimum=0)
    seed: int = knob(0, "score: seed of the candidate draws", minimum=0)
    rows_per_shard: int = knob(4_194_304, "most rows in one Arrow shard", minimum=1)
    overwrite: bool = knob(False, "replace the product when it exists")


@dataclasses.dataclass(frozen=True)
class SliceConfig(Section):
    """Which users are cold and which items are tail, by training counts only."""

    cold_user_history: int = knob(
        -1,
        "cold users have at most this many training interactions; -1 = the count that the "
        "quarter of users with least history does not exceed",
        minimum=-1,
    )
    tail_item_fraction: float = knob(
        0.2, "tail items: this share of the catalogue, least popular first", minimum=0, maximum=1
    )
    history_bins: tuple[int, ...] = knob(
        (5, 10, 20, 50, 100), "upper edges of the history-length slices", minimum=0
    )
    popularity_bins: tuple[int, ...] = knob(
        (5, 20, 50, 100, 200), "upper edges of the item-popularity slices", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The recommender."""

    backbone: str = knob("mf", "recommender to train", choices=BACKBONES)
    dim: int = knob(64, "width of an embedding", minimum=1)
    item_bias: bool = knob(True, "mf: add a learned bias per item")
    init_std: float = knob(
        0.1,
        "standard deviation of a freshly drawn embedding row's norm "
        "per sqrt(dim), i.e. entries ~ N(0, init_std^2 / dim)",
        above=0,
    )
    dropout: float = knob(0.0, "mf: dropout rate on the user-item product", minimum=0, below=1)


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
    lr: float = knob(0.05, "learning rate of the tables", above=0)
    l2: float = knob(
        0.02, "L2 penalty per triple on the rows it touches: l2/2 * (|u|^2+|i|^2+|j|^2)", minimum=0
    )
    adam_b1: float = knob(0.9, "lazy_adam: decay of the first moment", minimum=0, below=1)
    adam_b2: float = knob(0.999, "lazy_adam: decay of the second moment", minimum=0, below=1)
    eps: float = knob(1e-8, "adagrad, lazy_adam: added to the denominator", above=0)
    dense_lr: float = knob(1e-3, "Adam learning rate of dense parameters and the gate", above=0)


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Section):
    """How triples are drawn on the device."""

    batch_size: int = knob(2048, "triples per step, over all devices", minimum=1)
    triples_per_user: int = knob(
        8,
        "triples (and preferences) drawn for one user at a time; every training interaction stays "
        "as likely, and a user's row is read once for several triples",
        minimum=1,
    )
    negatives: str = knob(
        "uniform", "distribution of the negative item j in a triple (u, i, j)", choices=NEGATIVES
    )
    popularity_power: float = knob(
        1.0, "negatives=popularity: P(j) ~ (training count of j)^power", minimum=0
    )
    allow_positive_negatives: bool = knob(
        False, "let a training positive of the user be drawn as its negative"
    )


@dataclasses.dataclass(frozen=True)
class GuidanceConfig(Section):
    """What the teacher's preferences do to the loss."""

    guidance: str = knob("none", "use of the teacher in training", choices=GUIDANCE)
    teacher: str = knob("", "name of the teacher product under DATA/teacher")
    weight: float = knob(0.1, "weight of the guidance loss", flag="lambda", minimum=0)
    guidance_loss: str = knob(
        "hinge",
        "pairwise loss on x = s_ua - s_ub: hinge max(0, margin - x), logistic log(1 + exp(-x))",
        choices=GUIDANCE_LOSSES,
    )
    margin: float = knob(1.0, "hinge: margin m on logits", above=0)
    preferences_per_step: int = knob(0, "preferences G per step; 0 = batch_size", minimum=0)
    min_gap: float = knob(
        0.0,
        "least difference of two teacher scores that makes a preference; ties never do",
        minimum=0,
    )
    pair_selection: str = knob(
        "uniform",
        "uniform over preferences, or keep the largest score gaps among "
        "pair_candidates times as many (the paper's rule)",
        choices=PAIR_SELECTIONS,
    )
    pair_candidates: int = knob(4, "pair_selection=largest_gap: candidates per kept one", minimum=1)
    unlisted_share: float = knob(
        1.0,
        "share of preferences that put a listed item over an unlisted one, for teachers "
        "whose manifest says that unlisted items rank below the list",
        minimum=0,
        maximum=1,
    )


@dataclasses.dataclass(frozen=True)
class GateConfig(Section):
    """Whether a preference is believed: alpha in [0, 1]."""

    gate: str = knob(
        "paper",
        "paper = sigmoid(w.[cold, tail, q] + b), learned; constant = --alpha; rule = 1 on "
        "cold users or tail items, else 0",
        choices=GATES,
    )
    alpha: float = knob(
        1.0, "gate=constant: 1 is global distillation, 0 is none", minimum=0, maximum=1
    )
    uncertainty: str = knob(
        "entropy",
        "q of gate=paper: confidence 2(1 - max(p, 1-p)), entropy H(p)/ln 2, dropout "
        "4 Var(p) over dropout_samples passes; p = sigmoid(score)",
        choices=UNCERTAINTIES,
    )
    dropout_samples: int = knob(5, "uncertainty=dropout: stochastic passes", minimum=2)
    dropout_rate: float = knob(0.2, "uncertainty=dropout: dropout rate", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Full ranking over all items."""

    ks: tuple[int, ...] = knob((10, 20), "cut-offs K of the ranking metrics", minimum=1)
    eval_users_per_chunk: int = knob(1024, "users ranked at once; bounds memory", minimum=1)
    pooled_auc: bool = knob(True, "also report AUC over all user-item pairs pooled")

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
    )
    eval_every: int = knob(1, "epochs between two validations", minimum=1)
    patience: int = knob(
        10, "validations without a better early_stop_metric before stopping; 0 = never", minimum=0
    )
    early_stop_metric: str = knob("ndcg@10", "overall validation metric to maximise")
    steps_per_dispatch: int = knob(
        0,
        "steps K per device program, between which signals and errors are seen; 0 = about two "
        "million triples and preferences",
        minimum=0,
    )
    checkpoint_every_s: float = knob(
        30.0, "seconds between two checkpoints; one is also written at the end", minimum=0
    )
    restart: bool = knob(False, "delete what --workdir holds and start anew, instead of resuming")
    seed: int = knob(
        0, "seed of initialisation and of every draw", minimum=0, maximum=2_000_000_000
    )
    table_shards: int = knob(
        1, "devices that share the rows of one table; the others replicate it", minimum=1
    )
    kernels: str = knob(
        "auto",
        "who reads and writes table rows, and ranks: native (C++ compiled on this machine; one CPU "
        "device), xla, or auto = native where it can be had",
        choices=KERNELS,
    )
    min_devices: int = knob(1, "refuse to start with fewer devices", minimum=1)
    tensorboard: bool = knob(False, "also write TensorBoard files (extra: tensorboard)")
    verify_checksums: bool = knob(True, "check every shard's SHA-256 when loading")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: where, and every section."""

    data: str
    workdir: str
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    slices: SliceConfig = dataclasses.field(default_factory=SliceConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.guidance.guidance == "selective" and not self.guidance.teacher:
            raise ConfigError(
                "--guidance=selective needs --teacher=NAME, a product under DATA/teacher "
                "(make one with launch/teach.py)"
            )
        if self.guidance.guidance == "none" and self.guidance.teacher:
            raise ConfigError(
                f"--teacher={self.guidance.teacher} is not used with --guidance=none; "
                "add --guidance=selective or drop it"
            )

    @property
    def preferences_per_step(self) -> int:
        """G: preferences drawn per step; 0 without guidance."""
        if self.guidance.guidance == "none":
            return 0
        return self.guidance.preferences_per_step or self.sampler.batch_size


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """`--flag: old -> new` for each knob in which two runs differ (not data and workdir)."""
    out = []
    for section in dataclasses.fields(RunConfig):
        left, right = getattr(a, section.name), getattr(b, section.name)
        if not dataclasses.is_dataclass(left):
            continue
        for field in dataclasses.fields(left):
            old, new = getattr(left, field.name), getattr(right, field.name)
            if old != new:
                out.append(f"--{flag_name(field)}: {old} -> {new}")
    return out
