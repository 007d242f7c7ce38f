"""Recommenders by name: one file a family, pure scoring; `register` adds a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from slgr_jax.config import (
    CLICK_BACKBONES,
    ExampleConfig,
    ModelConfig,
    VectorConfig,
    register_backbone,
)
from slgr_jax.errors import ConfigError, listing
from slgr_jax.models.backbones.adapters import with_vectors
from slgr_jax.models.backbones.base import (
    AnyBackbone,
    DotBackbone,
    JointBackbone,
    SequenceBackbone,
    missing_members,
    with_features,
)
from slgr_jax.models.backbones.bert4rec import BERT4Rec
from slgr_jax.models.backbones.click import make_click
from slgr_jax.models.backbones.dual_view import with_two_views
from slgr_jax.models.backbones.gru4rec import GRU4Rec
from slgr_jax.models.backbones.in_context import with_examples
from slgr_jax.models.backbones.lightgcn import LightGCN
from slgr_jax.models.backbones.mf import MatrixFactorization
from slgr_jax.models.backbones.sasrec import SASRec
from slgr_jax.models.backbones.towers import with_towers
from slgr_jax.models.backbones.user_fusion import with_user_fusion
from slgr_jax.sampling.context import FEATURES, FIELDS, GRAPH, HISTORY, Sizes
from slgr_jax.sampling.features import TABLES

__all__ = [
    "AnyBackbone",
    "DotBackbone",
    "JointBackbone",
    "SequenceBackbone",
    "make_backbone",
    "reads_of",
    "register",
    "window_length",
]


class Maker(Protocol):
    """Makes a backbone of a dataset's sizes; `native`: CPU kernels may be called (one device)."""

    def __call__(self, config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone: ...


@dataclasses.dataclass(frozen=True)
class _Entry:
    make: Maker
    reads: Callable[[ModelConfig], Collection[str]]


def register(
    name: str,
    maker: Maker,
    *,
    losses: Sequence[str] = ("bpr", "bce"),
    defaults: Mapping[str, Any] | None = None,
    reads: Collection[str] = (),
    sequence: bool = False,
) -> None:
    """Let `--backbone=NAME` mean a backbone of your own, in this process.

    A script that trains or restores such a run registers it first:

        class Popularity(ItemTableBackbone): ...    # see `base.DotBackbone` for the members

        register("popularity", lambda config, sizes, *, native: Popularity(sizes.items, config.dim))
        slgr_jax.train(data, workdir, backbone="popularity")

    Args:
      name: what --backbone calls it.
      maker: gives a `DotBackbone`, `SequenceBackbone` or `JointBackbone`.
      losses: of `config.LOSSES`, those it can learn by; the first is what --loss=auto means.
      defaults: knobs, by command-line name, that default otherwise for it.
      reads: of HISTORY, FIELDS, FEATURES, GRAPH (`sampling.context`), what it looks up besides
        its tables.
      sequence: whether it is a `SequenceBackbone`, which learns from windows of histories.

    Raises:
      ConfigError: the name is taken, a loss is unknown, or `reads` names what there is not.
    """
    known = (HISTORY, FIELDS, FEATURES, GRAPH)
    unknown = sorted(set(reads) - set(known))
    if unknown:
        raise ConfigError(
            f"backbone {name!r} reads {listing(unknown)}; there is only {listing(known)}"
        )
    register_backbone(name, losses=losses, defaults=defaults or {}, sequence=sequence)
    _ENTRIES[name] = _Entry(maker, lambda _: reads)


def reads_of(config: ModelConfig) -> frozenset[str]:
    """What of the `Context` the backbone that `config` names may look up."""
    reads = frozenset(_ENTRIES[config.backbone].reads(config))
    return reads | {FEATURES} if config.features != "none" else reads


def make_backbone(
    config: ModelConfig,
    sizes: Sizes,
    vectors: VectorConfig | None = None,
    examples: ExampleConfig | None = None,
    *,
    native: bool = False,
) -> AnyBackbone:
    """The backbone that `config.backbone` names, for a dataset's sizes.

    Args:
      vectors, examples: how these are read, where `sizes` has some.
      native: let CPU kernels do what they can (one CPU device).

    Raises:
      ConfigError: settings that contradict each other, or a registered maker gave no backbone.
    """
    backbone = _ENTRIES[config.backbone].make(config, sizes, native=native)
    missing = missing_members(backbone)
    if missing:
        raise ConfigError(
            f"--backbone={config.backbone}: {type(backbone).__name__} has no {listing(missing)}, "
            "which slgr_jax.models.backbones.base asks of a backbone"
        )
    backbone = with_features(backbone, sizes)
    read = reads_of(config)
    if sizes.interaction_features is not None:  # the moment says which was the last interaction
        read |= {HISTORY}
    undeclared = sorted(backbone.reads - read)
    if undeclared:
        raise ConfigError(
            f"--backbone={config.backbone} reads {listing(undeclared)}, and was registered with "
            f"reads={sorted(read)}; name them there"
        )
    if config.features != "none":
        _check_features(backbone, config, sizes)
    vectors = vectors or VectorConfig()
    adapted: AnyBackbone = with_vectors(backbone, vectors, sizes)
    if vectors.dual_view:
        adapted = with_two_views(adapted, vectors.dual_view_heads)
    if vectors.towers != "none":
        adapted = with_towers(adapted, vectors.towers)
    if vectors.fuses_users:
        adapted = with_user_fusion(adapted, vectors.user_fusion, vectors.user_fusion_heads)
    if sizes.examples is not None:
        length = window_length(config, sizes)
        adapted = with_examples(adapted, sizes.examples, examples or ExampleConfig(), length)
    return adapted


def _check_features(backbone: AnyBackbone, config: ModelConfig, sizes: Sizes) -> None:
    """Refuse features that the backbone would not look at."""
    sides = {"user": sizes.user_features, "item": sizes.item_features}
    unread = [
        side
        for side, of_side in sides.items()
        if of_side is not None and TABLES[side] not in backbone.tables
    ]
    given = [side for side, of_side in sides.items() if of_side is not None]
    if unread and (unread == given or config.features != "all"):
        raise ConfigError(
            f"--features={config.features}: --backbone={config.backbone} reads no features of "
            f"{listing(f'{side}s' for side in unread)}; drop them"
        )


def _dot(config: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """The settings that backbones whose score is a dot product share."""
    return {
        "n_items": sizes.items,
        "dim": config.dim,
        "init_std": config.init_std,
        "dropout": config.dropout,
    }


def window_length(config: ModelConfig, sizes: Sizes) -> int:
    """L. No window is longer than the longest history: shorter ones cost less."""
    return max(1, min(config.max_history, sizes.longest_history))


def _sequence(config: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """The settings that sequence backbones share."""
    return {
        **_dot(config, sizes),
        "length": window_length(config, sizes),
        "layers": config.layers,
        "hidden": config.hidden,
    }


def _mf(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return MatrixFactorization(
        n_users=sizes.users, item_bias=config.item_bias, **_dot(config, sizes)
    )


def _lightgcn(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return LightGCN(n_users=sizes.users, layers=config.layers, native=native, **_dot(config, sizes))


def _sasrec(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return SASRec(heads=config.heads, **_sequence(config, sizes))


def _gru4rec(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return GRU4Rec(**_sequence(config, sizes))


def _bert4rec(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return BERT4Rec(
        heads=config.heads, mask_probability=config.mask_probability, **_sequence(config, sizes)
    )


def _click(config: ModelConfig, sizes: Sizes, *, native: bool) -> AnyBackbone:
    return make_click(
        config.backbone,
        sizes=sizes,
        dim=config.dim,
        length=window_length(config, sizes),
        init_std=config.init_std,
        dropout=config.dropout,
        mlp=config.mlp,
        layers=config.layers,
        heads=config.heads,
        attention_width=config.attention_width,
        cin=config.cin,
        experts=config.experts,
        low_rank=config.low_rank,
        attention_mlp=config.attention_mlp,
        history=config.history_fields,
    )


def _click_reads(config: ModelConfig) -> Collection[str]:
    return {HISTORY, FIELDS} if config.history_fields else {FIELDS}


_ENTRIES: dict[str, _Entry] = {
    "mf": _Entry(_mf, lambda _: ()),
    "lightgcn": _Entry(_lightgcn, lambda _: {GRAPH}),
    "sasrec": _Entry(_sasrec, lambda _: {HISTORY}),
    "gru4rec": _Entry(_gru4rec, lambda _: {HISTORY}),
    "bert4rec": _Entry(_bert4rec, lambda _: {HISTORY}),
    **dict.fromkeys(CLICK_BACKBONES, _Entry(_click, _click_reads)),
}
