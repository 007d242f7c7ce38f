"""The knobs of how a run is trained: updates, losses, draws, the loop."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import LOSSES
from slgr_jax.config.knobs import BATCH, COUNT, FLOAT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError, listing

NEGATIVES = ("uniform", "popularity", "in_batch", "hard", "scored")
KERNELS = ("auto", "native", "xla")
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "lazy_adam")
TRAINED = ("all", "adapters")
INIT_SLOTS = ("keep", "reset")
TABLE_DTYPES = ("float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb", "mlflow")


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
    drop_share: float = knob(
        0.0,
        "bpr, bce: share of a batch's losses that count nothing, --drop says which (LLMRec: 0.71); "
        "not of sequence backbones",
        minimum=0,
        below=1,
    )
    drop: str = knob(
        "easiest",
        "easiest = the least losses, as LLMRec's program does; hardest = the greatest, as its text "
        "says and as a truncated loss against noise does",
        choices=("easiest", "hardest"),
    )
    drop_steps: int = knob(
        0,
        "--drop_share is reached by and by: the share at step T is T / this, at most --drop_share "
        "(T-CE; LLMHD: 3000 to 50000); 0 = from the first step",
        minimum=0,
        maximum=COUNT,
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
        "uniform",
        "distribution of the negative item j in a triple (u, i, j); hard = a share --hard_share of "
        "them among the user's --hard_pool items that --reference_runs rank highest, the rest "
        "uniform; scored = such a share among the items that --keep_hard has scores of",
        choices=NEGATIVES,
    )
    hard_share: float = knob(
        0.5, "negatives=hard, scored: share of negatives from the pool", above=0, maximum=1
    )
    hard_pool: int = knob(
        100,
        "negatives=hard: R, items of a user's pool: those outside training that the runs of "
        "--reference_runs rank highest, by mean score",
        minimum=1,
        maximum=BATCH,
    )
    popularity_power: float = knob(
        1.0, "negatives=popularity: P(j) ~ (training count of j)^power", minimum=0, maximum=100
    )
    rating_power: float = knob(
        0.0,
        "draw a training interaction as often as its rating to this power, rounded, and once at "
        "least: 1 for play counts (slgr prepare --count_repeats), 0.5 to damp them; 0 = all alike",
        minimum=0,
        maximum=10,
    )
    allow_positive_negatives: bool = knob(
        False, "let a training positive of the user be drawn as its negative"
    )


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
    init_from: str = knob(
        "",
        "WORKDIR of a run to begin with: same backbone and widths, on the same data or on those "
        "that --data was made from with slgr prepare --append; new users and items begin afresh",
    )
    init_ids_from: str = knob(
        "",
        "--towers=three: WORKDIR of a run without vectors that the tower of rows begins with, "
        "beside the aligned one of --init_from",
    )
    init_slots: str = knob(
        "keep",
        "--init_from: what the optimiser has gathered about old rows: keep = small steps for them "
        "and large ones for new rows, best in few epochs; reset = large ones for all, better after "
        "many",
        choices=INIT_SLOTS,
    )
    train_only: str = knob(
        "all",
        "all, or adapters = what makes rows and fields of --item_vectors and --user_vectors alone: "
        "rows and the network of --init_from stay as they are, to the bit, without dropout",
        choices=TRAINED,
    )
    refit: str = knob(
        "",
        "WORKDIR of a finished run to train once more for serving: its settings, data and gate "
        "(which learns no more), on training and validation, for as many epochs as its best "
        "validation came after. --data is then where its data are now, if elsewhere; --teacher may "
        "name the same one made with validation (teach nearest --with_validation); --seed and what "
        "changes no number may differ",
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
    user_shards: int = knob(
        0,
        "V parts that users are cut in, with all that belongs to them (rows of their table, "
        "interactions, histories, features, preferences), each on one device: what they take falls "
        "with the devices. A "
        "constant of the run and a multiple of the devices, which it must divide into: 128, say. "
        "0 = all of it on every device",
        minimum=0,
        maximum=WIDTH,
    )
    kernels: str = knob(
        "auto",
        "who reads and writes table rows, and ranks: native (C++ compiled on this machine; one CPU "
        "device), xla, or auto = native where it can be had",
        choices=KERNELS,
    )
    min_devices: int = knob(1, "refuse to start with fewer devices", minimum=1, maximum=BATCH)
    track: str = knob(
        "",
        "trackers that are told what log.jsonl holds, with commas: tensorboard, wandb, mlflow "
        "(extras of these names); their own environment variables say where",
    )
    verify_checksums: bool = knob(
        True, "check the checksum of every shard and checkpoint when loading"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.tracker_names if name not in TRACKERS]
        if unknown:
            raise ConfigError(f"--track={listing(unknown)} is not one of: {listing(TRACKERS)}")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The trackers of --track, each once."""
        names = (name.strip() for name in self.track.split(","))
        return tuple(dict.fromkeys(name for name in names if name))
