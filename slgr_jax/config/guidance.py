"""The knobs of guidance and of gates; parts of a training run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from slgr_jax.config.knobs import BATCH, FLOAT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError, listing

# Lists, so that one's own can be added: `register_guidance`, `register_gate`.
AUTO = "auto"  # --guidance of slgr train alone: which guidance is chosen by validation
# Losses of global distillation from the literature: docs/distillation.md.
DISTILLATIONS = ("kd", "list_kl", "rd", "dllm2rec", "cd", "rrd", "dcd", "unkd")
# Those that align a recommender's vectors with those of a product: docs/alignment.md.
ALIGNMENTS = (
    *("hint", "htd", "rlmrec_con", "rlmrec_gen", "llm_esr", "ctrl", "llmemb_rat", "pad_mmd"),
)
BUILT_IN_GUIDANCE = (
    *("none", "pairwise", "pointwise", "interactions"),
    *DISTILLATIONS,
    *ALIGNMENTS,
)
GUIDANCE = list(BUILT_IN_GUIDANCE)
# Those that read nothing of a user but what a device has of its own users (--user_shards).
GUIDANCE_BY_USER = ("pairwise", "pointwise", "interactions", *DISTILLATIONS)
# Those that draw whole lists, which must be known to rank above what they leave out.
LIST_GUIDANCES = ("list_kl", "rd", "dllm2rec", "cd", "rrd", "dcd")
GUIDANCE_LOSSES = ("auto", "hinge", "logistic", "soft", "confidence", "gain")
GATES = ["paper", "constant", "rule", "budget", "calibrated"]
# Gates that learn from interactions which the recommender does not learn from.
SUPERVISED_GATES = ["calibrated"]
# Knobs whose default is another one for some guidances.
GUIDANCE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"gate": "constant"}
        for name in ("pointwise", "interactions", *DISTILLATIONS, *ALIGNMENTS)
    },
    # A cosine's gradient grows as a vector shrinks: 0.01 ruins LightGCN (benchmarks/LOG.md).
    **{name: {"gate": "constant", "lambda": 0.001} for name in ("rlmrec_con", "rlmrec_gen")},
    "llmemb_rat": {"gate": "constant", "lambda": 0.01},
    "pad_mmd": {"gate": "constant", "lambda": 0.2},
}
GATE_INPUTS = (
    *("margin", "history", "popularity", "uncertainty"),
    *("teacher", "slices", "agreement", "reference"),
    *("votes", "confidence", "named", "named_gap"),
)
# Those that say what a teacher knows: of its word on a user, and of an item over all users.
WORD_INPUTS = ("votes", "confidence")
NAMED_INPUTS = ("named", "named_gap")
LABEL_SOURCES = ("auto", "validation", "hidden")
UNCERTAINTIES = ("confidence", "entropy", "dropout", "ensemble")
PAIR_SELECTIONS = ("uniform", "largest_gap")


def register_guidance(name: str) -> None:
    """Let --guidance=NAME be one of one's own; `slgr_jax.guidance.register` calls it."""
    _register(name, GUIDANCE, "guidance")


def register_gate(name: str, *, supervised: bool) -> None:
    """Let --gate=NAME be one of one's own; `slgr_jax.guidance.gates.register` calls it."""
    _register(name, GATES, "gate")
    if supervised:
        SUPERVISED_GATES.append(name)


def _register(name: str, names: list[str], flag: str) -> None:
    if name in (*names, AUTO):
        raise ConfigError(
            f"--{flag}={name} is there already; choose another name than {listing(names)}"
        )
    names.append(name)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig(Section):
    """What the teacher's product does to the loss."""

    guidance: str = knob(
        "none",
        "use of the teacher in training; pairwise = its preferences; pointwise = squared error of "
        "sigmoid(score) and its score, scaled to [0, 1]; interactions = what it says that users "
        "take, as interactions beside those of DATA; kd = cross-entropy with its scores as "
        "soft labels; list_kl = divergence of two softmaxes over its list (LLMD4Rec); rd = its "
        "first items as positives, weighed by place and by the recommender's error; dllm2rec = by "
        "place, score and agreement; cd = soft labels of listed items drawn by rank; rrd = its "
        "lists in order, above what they leave out; dcd = the same where recommender and teacher "
        "disagree; unkd = its order among items of similar popularity. Of --teacher_vectors: "
        "hint = map the recommender's vectors to them; htd = their cosines; rlmrec_con = contrast "
        "of users and items with their own; rlmrec_gen = the vectors of masked nodes of a graph; "
        "llm_esr = a user's vector drawn to those of users with the nearest vectors; ctrl = "
        "contrast of a click model's rows with the vectors of their user and item; llmemb_rat = "
        "items made of texts alone, alike as a finished run's are; pad_mmd = items' rows and what "
        "their texts come to, one distribution (--towers=aligned, --dual_view). Each goes through "
        "--gate. slgr train takes auto too: none, or pairwise with the gate and lambda that "
        "validation prefers beyond noise",
        choices=GUIDANCE,
    )
    teacher: str = knob("", "name of the teacher product under DATA/teacher")
    teacher_vectors: str = knob(
        "",
        "hint, htd, rlmrec_con, rlmrec_gen, llm_esr, ctrl, llmemb_rat, pad_mmd: the product under "
        "DATA/embeddings (slgr teach embed) that the recommender's vectors are aligned with",
    )
    weight: float = knob(
        0.1,
        "weight of the guidance loss; rlmrec_con and rlmrec_gen: 0.001 by default, "
        "llmemb_rat: 0.01, pad_mmd: 0.2",
        flag="lambda",
        minimum=0,
        maximum=FLOAT,
    )
    preferences_per_step: int = knob(
        0,
        "pairwise, pointwise, interactions, kd, unkd: preferences (interactions) G per step; 0 = "
        "batch_size",
        minimum=0,
        maximum=BATCH,
    )
    lists_per_step: int = knob(
        0,
        "guidances that learn lists: lists G per step; 0 = as many candidates as the batch's "
        "triples have",
        minimum=0,
        maximum=BATCH,
    )
    aligned_per_step: int = knob(
        0,
        "guidances of --teacher_vectors: interactions G per step whose user, item and another item "
        "are aligned; 0 = batch_size, but no more than 512: contrasts and cosines cost G times G",
        minimum=0,
        maximum=BATCH,
    )
    min_gap: float = knob(
        0.0,
        "least difference of two teacher scores that makes a preference; ties never do",
        minimum=0,
        maximum=FLOAT,
    )
    unlisted_share: float = knob(
        1.0,
        "share of preferences that put a listed item over an unlisted one, for teachers "
        "whose manifest says that unlisted items rank below the list",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        if self.guidance == AUTO:
            raise ConfigError(
                "--guidance=auto is a choice among runs, which slgr train alone makes, and no "
                f"guidance that one run has; give one of {listing(GUIDANCE)}"
            )
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class PairwiseConfig(Section):
    """--guidance=pairwise: a loss on s_ua - s_ub."""

    guidance_loss: str = knob(
        "auto",
        "pairwise loss on x = s_ua - s_ub: hinge max(0, margin - x), logistic log(1 + exp(-x)), "
        "both times alpha; soft -alpha log sigmoid(x) - (1 - alpha) log sigmoid(-x); confidence = "
        "(2 alpha - 1)^2 times soft: nothing where the teacher is right half the time; gain = "
        "|alpha - prior| times soft, the prior being what the reference alone believes; auto = "
        "gain for gate=calibrated with reference among its inputs, confidence without, else hinge "
        "(the paper's)",
        choices=GUIDANCE_LOSSES,
    )
    margin: float = knob(1.0, "hinge: margin m on logits", above=0, maximum=FLOAT)
    pair_selection: str = knob(
        "uniform",
        "uniform over preferences, or keep the largest score gaps among "
        "pair_candidates times as many (the paper's rule)",
        choices=PAIR_SELECTIONS,
    )
    pair_candidates: int = knob(
        4, "pair_selection=largest_gap: candidates per kept one", minimum=1, maximum=1024
    )
    hard_negatives: int = knob(
        0,
        "draw preferences among a list and the R other items that the runs of --reference_runs "
        "rank highest for its user, for teachers whose manifest says that unlisted items rank "
        "below the list; 0 = against any unlisted item. With it, add reference to --gate_inputs",
        minimum=0,
        maximum=BATCH,
    )


@dataclasses.dataclass(frozen=True)
class InteractionsConfig(Section):
    """--guidance=interactions: what a teacher says that users take, beside what they took."""

    places: int = knob(
        10,
        "first places of a teacher's list that count as interactions, each with weight 1; 0 = "
        "whole lists. What slgr teach import --interactions or slgr teach interactions wrote is "
        "taken whole, with its weights",
        flag="interactions_places",
        minimum=0,
        maximum=WIDTH,
    )
    edges: bool = knob(
        False,
        "they are edges of the graph too, whatever the gate says of them (lightgcn)",
        flag="interactions_edges",
    )


@dataclasses.dataclass(frozen=True)
class GateConfig(Section):
    """Whether a preference is believed: alpha in [0, 1]."""

    gate: str = knob(
        "paper",
        "paper = sigmoid(w.[cold, tail, q] + b), learned from the guidance loss; budget = the same "
        "with the mean of alpha held at --budget; constant = --alpha; rule = 1 on cold users or "
        "tail items, else 0; calibrated = P(the teacher is right), learned where the answer is "
        "known. Default paper for pairwise, constant for others",
        choices=GATES,
    )
    alpha: float = knob(
        1.0, "gate=constant: 1 is global distillation, 0 is none", minimum=0, maximum=1
    )
    budget: float = knob(0.3, "gate=budget: rho, the mean of alpha", minimum=0, maximum=1)
    budget_weight: float = knob(
        10.0,
        "gate=budget: weight of (mean alpha - rho)^2 beside the gated loss",
        minimum=0,
        maximum=FLOAT,
    )
    gate_lr: float = knob(
        0.0,
        "Adam learning rate of the gate; 0 = 0.02 for supervised gates, else dense_lr",
        minimum=0,
        maximum=FLOAT,
    )
    gate_inputs: str = knob(
        "history,popularity,teacher",
        "gate=calibrated: what the gate reads: history and popularity (log counts), teacher "
        "(its margin), slices (cold, tail), uncertainty (q of both items), margin (the "
        "recommender's own s_ua - s_ub), agreement (its sign), reference (the mean of s_ua - s_ub "
        "over the runs of --reference_runs); of what the teacher knows votes (how far its several "
        "answers on each item agree), confidence (|2p - 1| of answers that are probabilities), "
        "named (in how many users' lists each item is, log, standardised), named_gap (named less "
        "popularity). With uncertainty, margin or agreement a soft loss "
        "aims at what the recommender already believes, which benchmarks/LOG.md found to help "
        "less; a reference stands still",
    )
    gate_hidden: int = knob(
        16,
        "gate=calibrated: width of a hidden layer beside the linear one",
        minimum=0,
        maximum=WIDTH,
    )
    labelled_preferences: str = knob(
        "auto",
        "gate=calibrated: where the right answer is known; validation = validation "
        "interactions, cross-fitted over two halves of the users; hidden = training items that "
        "were hidden from the teacher, and are then not trained on; auto = where the teacher has "
        "a word on more of them",
        choices=LABEL_SOURCES,
    )
    labelled_per_step: int = knob(
        0,
        "gate=calibrated: labelled preferences drawn per step; 0 = half the preferences",
        minimum=0,
        maximum=BATCH,
    )
    uncertainty: str = knob(
        "entropy",
        "q, read by paper, budget and --gate_inputs: confidence 2(1 - max(p, 1-p)), entropy "
        "H(p)/ln 2, dropout 4 Var(p) over dropout_samples passes, ensemble 4 Var(p) over the runs "
        "of --reference_runs; p = sigmoid(score)",
        choices=UNCERTAINTIES,
    )
    reference_runs: str = knob(
        "",
        "uncertainty=ensemble, reference among --gate_inputs, or --hard_negatives: directories "
        "RUN,... of runs trained on this dataset, of any backbone, each with its own seed or "
        "settings (two or more for an uncertainty); their best states are read, never changed",
    )
    dropout_samples: int = knob(
        5, "uncertainty=dropout: stochastic passes", minimum=2, maximum=1024
    )
    dropout_rate: float = knob(0.2, "uncertainty=dropout: dropout rate", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.input_names if name not in GATE_INPUTS]
        if unknown or not self.input_names:
            raise ConfigError(
                f"--gate_inputs={self.gate_inputs}: choose from {listing(GATE_INPUTS)}"
            )
        self._check_reference_runs()

    def _check_reference_runs(self) -> None:
        places = [os.path.realpath(member) for member in self.members]
        if self.reads_reference_runs and len(places) < (least := 2 if self._spread else 1):
            what = "--uncertainty=ensemble" if self._spread else f"--gate_inputs={self.gate_inputs}"
            raise ConfigError(
                f"{what} needs {least} or more runs, --reference_runs={self.reference_runs} names "
                f"{len(places)}; give work directories of trained runs: --reference_runs=RUN,RUN"
            )
        for member, place in zip(self.members, places, strict=True):
            if (times := places.count(place)) > 1:
                raise ConfigError(
                    f"--reference_runs={self.reference_runs} names {member} {times} times: a run "
                    f"does not "
                    "differ from itself; name each once"
                )

    @property
    def _spread(self) -> bool:
        return self.uncertainty == "ensemble"

    @property
    def reads_reference_runs(self) -> bool:
        """Whether the gate looks at what the runs of --reference_runs say of a preference."""
        return self._spread or (self.supervised and "reference" in self.input_names)

    @property
    def members(self) -> tuple[str, ...]:
        """What --reference_runs names: directories of runs."""
        return tuple(name for name in self.reference_runs.split(",") if name)

    @property
    def input_names(self) -> tuple[str, ...]:
        """What --gate_inputs names."""
        return tuple(name for name in self.gate_inputs.split(",") if name)

    @property
    def knowledge_inputs(self) -> tuple[str, ...]:
        """Those of a supervised gate's inputs that say what the teacher knows."""
        known = (*WORD_INPUTS, *NAMED_INPUTS)
        return tuple(name for name in known if self.supervised and name in self.input_names)

    @property
    def supervised(self) -> bool:
        """Whether the gate is taught by labelled preferences."""
        return self.gate in SUPERVISED_GATES
