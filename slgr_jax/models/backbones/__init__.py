"""Recommenders: one file a family, pure scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slgr_jax.config import CLICK_BACKBONES, SEQUENCE_BACKBONES, ModelConfig
from slgr_jax.models.backbones.base import AnyBackbone, DotBackbone, JointBackbone, SequenceBackbone
from slgr_jax.models.backbones.bert4rec import BERT4Rec
from slgr_jax.models.backbones.click import make_click
from slgr_jax.models.backbones.gru4rec import GRU4Rec
from slgr_jax.models.backbones.lightgcn import LightGCN
from slgr_jax.models.backbones.mf import MatrixFactorization
from slgr_jax.models.backbones.sasrec import SASRec
from slgr_jax.sampling.context import FIELDS, GRAPH, HISTORY, Sizes

__all__ = [
    "AnyBackbone",
    "DotBackbone",
    "JointBackbone",
    "SequenceBackbone",
    "make_backbone",
    "reads_of",
]


def reads_of(config: ModelConfig) -> frozenset[str]:
    """What of the `Context` the backbone that `config` names may look up."""
    if config.backbone in SEQUENCE_BACKBONES:
        return frozenset({HISTORY})
    if config.backbone in CLICK_BACKBONES:
        return frozenset({HISTORY, FIELDS} if config.history_fields else {FIELDS})
    return frozenset({GRAPH} if config.backbone == "lightgcn" else ())


def make_backbone(config: ModelConfig, sizes: Sizes, *, native: bool = False) -> AnyBackbone:
    """The backbone that `config.backbone` names, for a dataset's sizes.

    Args:
      native: let CPU kernels do what they can (one CPU device).
    """
    dot: dict[str, Any] = {
        "n_items": sizes.items,
        "dim": config.dim,
        "init_std": config.init_std,
        "dropout": config.dropout,
    }
    # No window is longer than the longest history: shorter ones cost less.
    length = max(1, min(config.max_history, sizes.longest_history))
    sequence = {**dot, "length": length, "layers": config.layers, "hidden": config.hidden}
    makers: dict[str, Callable[[], AnyBackbone]] = {
        "mf": lambda: MatrixFactorization(n_users=sizes.users, item_bias=config.item_bias, **dot),
        "lightgcn": lambda: LightGCN(
            n_users=sizes.users, layers=config.layers, native=native, **dot
        ),
        "sasrec": lambda: SASRec(heads=config.heads, **sequence),
        "gru4rec": lambda: GRU4Rec(**sequence),
        "bert4rec": lambda: BERT4Rec(
            heads=config.heads, mask_probability=config.mask_probability, **sequence
        ),
    }
    if config.backbone in CLICK_BACKBONES:
        return make_click(
            config.backbone,
            sizes=sizes,
            dim=config.dim,
            length=length,
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
    return makers[config.backbone]()
