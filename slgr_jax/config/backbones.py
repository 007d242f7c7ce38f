"""Recommenders by name: which losses suit each, and which knobs default otherwise for it.

A user's own is added by `slgr_jax.models.backbones.register`, which calls `register_backbone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax.errors import ConfigError, listing

SEQUENCE_BACKBONES = ("sasrec", "gru4rec", "bert4rec")
CLICK_BACKBONES = ("deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din")
# Those whose places look back alone: what two views of an event say may not come from later ones.
DUAL_VIEW_BACKBONES = ("sasrec", "gru4rec")
# Those that read nothing of a user but what a device has of its own users (--user_shards).
SPLIT_BY_USER = ("mf", "lightgcn", *SEQUENCE_BACKBONES, *CLICK_BACKBONES)
LOSSES = ("auto", "bpr", "bce", "softmax", "sampled_softmax")

# Losses that make sense for a backbone; the first is what `auto` means.
LOSSES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mf", "lightgcn"), ("bpr", "bce", "softmax", "sampled_softmax")),
    **dict.fromkeys(SEQUENCE_BACKBONES, ("softmax", "sampled_softmax", "bce", "bpr")),
    **dict.fromkeys(CLICK_BACKBONES, ("bce", "bpr")),
}
BUILT_IN = tuple(LOSSES_OF)
BACKBONES = LOSSES_OF.keys()  # a view: it has what is registered later, too

_SEQUENCE_DEFAULTS: Mapping[str, Any] = {
    "table_optimizer": "lazy_adam",
    "lr": 1e-3,
    "l2": 0.0,
    "batch_size": 128,
    "dropout": 0.2,
}
_CLICK_DEFAULTS: Mapping[str, Any] = {
    "table_optimizer": "lazy_adam",
    "lr": 1e-3,
    "l2": 0.0,
    "dropout": 0.1,
    "max_history": 20,
    "rows": "sampled",
    "ranking": False,
    "early_stop_metric": "rows_auc",
}
# What a knob's default is where a backbone is known to want another; by command-line name.
BACKBONE_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "lightgcn": {"table_optimizer": "lazy_adam", "lr": 3e-3, "l2": 1e-3, "layers": 3},
    **dict.fromkeys(SEQUENCE_BACKBONES, _SEQUENCE_DEFAULTS),
    "sasrec": {**_SEQUENCE_DEFAULTS, "hidden": 256, "dropout": 0.5},
    "gru4rec": {**_SEQUENCE_DEFAULTS, "layers": 1, "dropout": 0.3},
    **dict.fromkeys(CLICK_BACKBONES, _CLICK_DEFAULTS),
}
_LEARN_FROM_SEQUENCES = set(SEQUENCE_BACKBONES)


def register_backbone(
    name: str, *, losses: Sequence[str], defaults: Mapping[str, Any], sequence: bool
) -> None:
    """Let --backbone=NAME be chosen in this process; see `models.backbones.register`.

    Raises:
      ConfigError: the name is taken, or a loss is none of `LOSSES`.
    """
    if name in LOSSES_OF:
        raise ConfigError(
            f"a backbone is called {name!r} already: {listing(BACKBONES)}; register another name"
        )
    unknown = [loss for loss in losses if loss not in LOSSES[1:]]
    if unknown or not losses:
        raise ConfigError(
            f"losses={tuple(losses)} of backbone {name!r}: give some of {listing(LOSSES[1:])}"
        )
    LOSSES_OF[name] = tuple(losses)
    BACKBONE_DEFAULTS[name] = dict(defaults)
    if sequence:
        _LEARN_FROM_SEQUENCES.add(name)


def learns_from_sequences(name: str) -> bool:
    """Whether the backbone of that name learns from windows of histories, not from triples."""
    return name in _LEARN_FROM_SEQUENCES
