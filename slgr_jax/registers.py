"""Parts of one's own: gates, guidances and backbones under a name, in this process.

Importing this module imports no JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slgr_jax import config


def register_gate(
    name: str, maker: Callable[[config.GateConfig], Any], *, supervised: bool = False
) -> None:
    """Let `gate=NAME` mean a gate of your own, in this process.

    A script that trains, loads or evaluates such a run registers the gate first.

    Args:
      name: what --gate calls it.
      maker: from the gate's section to a Flax module, `slgr_jax.guidance.gates.GateInputs` of G
        preferences -> alpha [G].
      supervised: it learns from labelled preferences and has a method `logits` (see
        `slgr_jax.guidance.gates`); otherwise from the guidance loss, or not at all.

    Raises:
      ConfigError: the name is taken.
    """
    from slgr_jax.guidance import gates

    gates.register(name, maker, supervised=supervised)


def register_guidance(name: str, maker: Callable[..., Any]) -> None:
    """Let `guidance=NAME` mean a use of an LLM product of your own, in this process.

    Args:
      name: what --guidance calls it.
      maker: (run, backbones of its reference runs, whether CPU kernels run) -> a
        `slgr_jax.guidance.base.Guidance`.

    Raises:
      ConfigError: the name is taken.
    """
    from slgr_jax.guidance import base

    base.register(name, maker)


def register_backbone(name: str, maker: Callable[..., Any], **facts: Any) -> None:
    """Let `backbone=NAME` mean a recommender of your own, in this process.

    Args:
      name: what --backbone calls it.
      maker: (model section, sizes, native) -> a backbone (`slgr_jax.models.backbones.base`).
      **facts: losses, defaults, reads, sequence: see `slgr_jax.models.backbones.register`.

    Raises:
      ConfigError: the name is taken, or a loss is unknown.
    """
    from slgr_jax.models import backbones

    backbones.register(name, maker, **facts)
