"""Recommenders: one file a family, pure scoring."""

from __future__ import annotations

from collections.abc import Callable

from slgr_jax.backbones.base import Backbone
from slgr_jax.backbones.mf import MatrixFactorization
from slgr_jax.config import ModelConfig

__all__ = ["Backbone", "make_backbone"]


def make_backbone(config: ModelConfig, *, n_users: int, n_items: int) -> Backbone:
    """The backbone that `config.backbone` names, for a data set's sizes."""
    makers: dict[str, Callable[[], Backbone]] = {
        "mf": lambda: MatrixFactorization(
            n_users=n_users,
            n_items=n_items,
            dim=config.dim,
            item_bias=config.item_bias,
            init_std=config.init_std,
            dropout=config.dropout,
        ),
    }
    return makers[config.backbone]()
