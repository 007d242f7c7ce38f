"""Which knobs do nothing in which runs, so that one who gives them is told.

A comparison gives all its arms the same knobs, so this holds for what a user gives a single run
(`check_used`), not for every `RunConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from slgr_jax.config.backbones import BUILT_IN, CLICK_BACKBONES, SEQUENCE_BACKBONES
from slgr_jax.config.guidance import (
    ALIGNMENTS,
    BUILT_IN_GUIDANCE,
    LIST_GUIDANCES,
    GateConfig,
    GuidanceConfig,
)
from slgr_jax.config.hardness import HardnessConfig
from slgr_jax.config.knobs import flag_name
from slgr_jax.config.run import RunConfig, method_sections
from slgr_jax.errors import ConfigError, listing


class Applies(NamedTuple):
    """A knob does something where --`flag` is one of `values`."""

    flag: str
    values: tuple[Any, ...]


_TRANSFORMERS = ("sasrec", "bert4rec")
_WITH_LAYERS = ("lightgcn", *SEQUENCE_BACKBONES, "autoint", "dcn", "dcnv2")
_READ_PREFERENCES = tuple(
    name for name in BUILT_IN_GUIDANCE if name not in ("none", "interactions")
)
_LEARNED_GATES = ("paper", "budget", "calibrated")

# By command-line name. Of a backbone, guidance or gate of a user's own nothing is known: it may
# read any knob.
_APPLIES: Mapping[str, Applies] = {
    "item_bias": Applies("backbone", ("mf",)),
    "layers": Applies("backbone", _WITH_LAYERS),
    "heads": Applies("backbone", (*_TRANSFORMERS, "autoint")),
    "hidden": Applies("backbone", SEQUENCE_BACKBONES),
    "max_history": Applies("backbone", (*SEQUENCE_BACKBONES, *CLICK_BACKBONES)),
    "mask_probability": Applies("backbone", ("bert4rec",)),
    "attention_mlp": Applies("backbone", ("din",)),
    "attention_width": Applies("backbone", ("autoint",)),
    "cin": Applies("backbone", ("xdeepfm",)),
    **dict.fromkeys(("experts", "low_rank"), Applies("backbone", ("dcnv2",))),
    **dict.fromkeys(
        ("history_fields", "most_categories", "mlp"), Applies("backbone", CLICK_BACKBONES)
    ),
    **dict.fromkeys(("adam_b1", "adam_b2"), Applies("table_optimizer", ("lazy_adam",))),
    "negatives_per_positive": Applies("loss", ("bpr", "bce")),
    "shared_negatives": Applies("loss", ("sampled_softmax",)),
    "negatives": Applies("loss", ("bpr", "bce", "sampled_softmax")),
    "popularity_power": Applies("negatives", ("popularity",)),
    "hard_share": Applies("negatives", ("hard", "scored")),
    "hard_pool": Applies("negatives", ("hard",)),
    "interactions_edges": Applies("backbone", ("lightgcn",)),
    **dict.fromkeys(("min_gap", "unlisted_share"), Applies("guidance", _READ_PREFERENCES)),
    "lists_per_step": Applies("guidance", LIST_GUIDANCES),
    "aligned_per_step": Applies("guidance", ALIGNMENTS),
    "margin": Applies("guidance_loss", ("hinge",)),
    "pair_candidates": Applies("pair_selection", ("largest_gap",)),
    **dict.fromkeys(("rrd_temperature", "rrd_pool"), Applies("rrd_sample", (True,))),
    "alpha": Applies("gate", ("constant",)),
    **dict.fromkeys(("budget", "budget_weight"), Applies("gate", ("budget",))),
    "gate_lr": Applies("gate", _LEARNED_GATES),
    "uncertainty": Applies("gate", _LEARNED_GATES),
    **dict.fromkeys(
        ("gate_inputs", "gate_hidden", "labelled_preferences", "labelled_per_step"),
        Applies("gate", ("calibrated",)),
    ),
    **dict.fromkeys(("dropout_samples", "dropout_rate"), Applies("uncertainty", ("dropout",))),
    "dual_view_heads": Applies("dual_view", (True,)),
    "user_fusion_heads": Applies("user_fusion", ("attention",)),
    "reconstruction_weight": Applies("example_reasoning", (True,)),
    "rating_power": Applies("rating_threshold", (0.0,)),
    **dict.fromkeys(
        ("cold_user_history", "tail_item_fraction", "tail_item_popularity"),
        Applies("slice_preset", ("own",)),
    ),
    **dict.fromkeys(("row_negatives", "row_seed"), Applies("rows", ("sampled",))),
}
_OF_VECTORS = (
    *("adapter_hidden", "adapter_experts", "adapter_shared", "adapter_chunks", "adapter_gate"),
    *("adapter_neighbours", "item_side_weight", "user_side_weight", "dual_view"),
    *("towers", "user_fusion"),
    *("event_vectors", "vector_l2", "vector_dtype"),
)
_OF_EXAMPLES = (
    *("example_reasoning", "examples_per_label", "example_layers", "example_heads"),
    "reconstruction_weight",
)
_OF_EDITS = ("edit_how", "edit_threshold", "edit_threshold_of", "edits_per_user")
_OF_HARDNESS = frozenset(flag_name(field) for field in dataclasses.fields(HardnessConfig))
# Of what --train_only=adapters leaves as it is.
_OF_FROZEN = ("lr", "dropout", "init_slots")
_BUILT_IN: Mapping[str, Collection[str]] = {
    "backbone": BUILT_IN,
    "guidance": BUILT_IN_GUIDANCE,
    "gate": ("constant", "rule", *_LEARNED_GATES),
}


def check_used(run: RunConfig, given: Collection[str]) -> None:
    """Refuse knobs that a user gives and that do nothing in this run.

    A knob that is given its default changes nothing and is let pass.

    Args:
      given: command-line names of the knobs that were given.

    Raises:
      ConfigError: each such knob, what it goes with, and what to do.
    """
    values, guidance = _values(run), _names(GuidanceConfig, GateConfig)
    unused = []
    for name in given:
        value, default = values[name]
        if value == default:
            continue
        if name == "reference_runs" and run.draws_hard_negatives:
            continue
        if name in guidance and not run.guided:
            fix = "add --guidance=pairwise (or another) with --teacher=NAME"
            unused.append(f"--{name}={_text(value)} is not used with --guidance=none; {fix}")
        elif name == "most_feature_values" and run.model.features == "none":
            text = f"--{name}={_text(value)} is not used with --features=none"
            unused.append(f"{text}; add --features=all")
        elif name in ("init_how", "init_scale", "init_half") and not run.vectors.init_products:
            text = f"--{name}={_text(value)} is not used without initial vectors"
            unused.append(f"{text}; add --init_item_vectors=NAME (slgr teach embed)")
        elif name in _OF_EXAMPLES and not run.examples.product:
            text = f"--{name}={_text(value)} is not used without examples"
            unused.append(f"{text}; add --examples=NAME (slgr teach examples)")
        elif name in _OF_EDITS and not run.edits.product:
            text = f"--{name}={_text(value)} is not used without edits"
            unused.append(f"{text}; add --edits=NAME (slgr teach import --edits=FILE)")
        elif name in ("inserted_per_user", "insert_seed") and not run.edits.inserted:
            text = f"--{name}={_text(value)} is not used without --insert"
            unused.append(f"{text}; add --insert=NAME (slgr teach interactions)")
        elif name.startswith("hard_") and name in _OF_HARDNESS and not run.hardness.product:
            text = f"--{name}={_text(value)} is not used without --keep_hard"
            unused.append(f"{text}; add --keep_hard=NAME (slgr teach import)")
        elif name == "hard_variance_scores" and not run.hardness.filters:
            text = f"--{name}={_text(value)} is not used with --hard_variance_share=1"
            unused.append(f"{text}; add --hard_variance_share=0.5")
        elif name in ("drop", "drop_steps") and not run.loss.drop_share:
            text = f"--{name}={_text(value)} is not used with --drop_share=0"
            unused.append(f"{text}; add --drop_share=0.1")
        elif name in ("event_vectors", "vector_l2") and run.vectors.adapter_chunks:
            why = "chunks are of the item that is scored and the user, and --l2 is not on them"
            unused.append(f"--{name}={_text(value)} is not used with --adapter_chunks: {why}")
        elif name == "vector_l2" and run.vectors.towers != "none":
            why = "--l2 is on rows alone there"
            unused.append(f"--{name}={_text(value)} is not used with --towers: {why}")
        elif name == "event_vectors" and not _has_event_vectors(run):
            text = f"--{name}={_text(value)} is not used without a history's fields of vectors"
            unused.append(f"{text}; add --item_vectors=NAME and --backbone={CLICK_BACKBONES[0]}")
        elif name in _OF_FROZEN and run.adapters_alone:
            text = f"--{name}={_text(value)} is not used with --train_only=adapters"
            unused.append(f"{text}, which moves no row and no network")
        elif name == "adapter_shared" and not run.vectors.adapter_experts:
            text = f"--{name}={_text(value)} is not used without experts"
            unused.append(f"{text}; add --adapter_experts=5")
        elif name in _OF_VECTORS and not run.vectors.products:
            text = f"--{name}={_text(value)} is not used without vectors"
            unused.append(f"{text}; add --item_vectors=NAME (slgr teach embed)")
        elif name in _APPLIES and not _does(run, _APPLIES[name], values):
            flag, goes_with = _APPLIES[name]
            now, wanted = _resolved(run, flag, values), map(_text, goes_with)
            fix = f"add --{flag}={next(iter(goes_with))}" if len(goes_with) == 1 else ""
            fix = fix or f"it goes with --{flag} one of {listing(wanted, limit=len(goes_with))}"
            unused.append(f"--{name}={_text(value)} is not used with --{flag}={_text(now)}; {fix}")
    if unused:
        raise ConfigError(f"{'; '.join(unused)}; or drop {'them' if len(unused) > 1 else 'it'}")


def check_auto(given: Mapping[str, Any]) -> None:
    """Refuse knobs that --guidance=auto chooses itself, even at their defaults, and no teacher.

    Args:
      given: knobs that a user gives, by command-line name.

    Raises:
      ConfigError: the knobs, and what to do.
    """
    if not given.get("teacher"):
        raise ConfigError(
            "--guidance=auto needs --teacher=NAME, a product under DATA/teacher (make one with "
            "slgr teach)"
        )
    set_there = _names(GateConfig, *method_sections().values())
    clash = [f"--{name}={_text(value)}" for name, value in given.items() if name in set_there]
    if clash:
        them = "them" if len(clash) > 1 else "it"
        raise ConfigError(
            f"--guidance=auto chooses gate and loss itself: drop {listing(clash)}, or name the "
            f"guidance to use {them} with, --guidance=pairwise for instance"
        )


def _names(*sections: type[Any]) -> set[str]:
    names = {flag_name(field) for section in sections for field in dataclasses.fields(section)}
    # RunConfig holds these against each other.
    return names - {"guidance", "teacher", "teacher_vectors"}


def _has_event_vectors(run: RunConfig) -> bool:
    """Whether the events of a history have fields that vectors make."""
    model = run.model
    clicks = model.backbone in CLICK_BACKBONES or model.backbone not in BUILT_IN
    return clicks and model.history_fields and bool(run.vectors.item_vectors)


def _values(run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Command-line name -> (value in this run, its section's default)."""
    sections = [getattr(run, field.name) for field in dataclasses.fields(run)]
    return {
        flag_name(field): (getattr(section, field.name), field.default)
        for section in sections
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
    }


def _resolved(run: RunConfig, flag: str, values: Mapping[str, tuple[Any, Any]]) -> Any:
    """The value of a knob in this run, `auto` resolved."""
    resolved = {"loss": run.loss_name, "guidance_loss": run.guidance_loss_name}
    return resolved.get(flag, values[flag][0])


def _does(run: RunConfig, applies: Applies, values: Mapping[str, tuple[Any, Any]]) -> bool:
    now = _resolved(run, applies.flag, values)
    known: Sequence[Any] | Collection[str] = _BUILT_IN.get(applies.flag, (now,))
    return now in applies.values or now not in known


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
