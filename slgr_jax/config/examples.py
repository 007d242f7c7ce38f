"""The knobs of examples in context (LLM-CF): of the product, and of a run that reads it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from slgr_jax.config.backbones import CLICK_BACKBONES
from slgr_jax.config.knobs import COUNT, FLOAT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError, listing

if TYPE_CHECKING:
    from slgr_jax.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class ExampleFileConfig(Section):
    """teach examples: training rows, with what an LLM reasons about them, to DATA/examples/NAME."""

    file: str = knob(
        "",
        "Parquet or Arrow file with user, item, vector and perhaps position (how many training "
        "interactions of the user lie before): the LLM's reasoning about training rows; empty = "
        "draw rows, without reasoning",
        flag="examples",
    )
    threshold: float = knob(
        0.0,
        "label 1 from this rating on, as slgr train --rating_threshold says; 0 = an interaction is "
        "1, an item that the user has in no part 0",
        minimum=0,
        maximum=FLOAT,
        flag="liked_from",
    )
    share: float = knob(
        0.1, "share of the training rows that is drawn", above=0, maximum=1, flag="example_share"
    )
    seed: int = knob(
        0,
        "of the rows that are drawn, and of their items",
        minimum=0,
        maximum=COUNT,
        flag="example_seed",
    )
    prompts: str = knob(
        "",
        "write this Parquet file, too: user, item, position, label and prompt of each row that is "
        "drawn, for an LLM of yours; its reasoning, embedded as a column vector, is --examples",
        flag="example_prompts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        drawing = {"example_share": "share", "example_seed": "seed", "example_prompts": "prompts"}
        given = [
            f"--{flag}={getattr(self, name)}"
            for flag, name in drawing.items()
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.file and given:
            raise ConfigError(
                f"--examples={self.file} says which rows are examples, and {listing(given)} is of "
                "rows that are drawn; drop one of them"
            )


@dataclasses.dataclass(frozen=True)
class ExampleConfig(Section):
    """Training rows with their labels, and an LLM's reasoning, beside each row (LLM-CF)."""

    product: str = knob(
        "",
        "click backbones: product of DATA/examples (slgr teach examples), of which each row reads "
        "the most similar through a small transformer, as one more field",
        flag="examples",
    )
    vectors: str = knob(
        "",
        "vectors of items (slgr teach embed) by which similar examples are found: half the cosine "
        "of the items, half that of the histories' means",
        flag="example_vectors",
    )
    reasoning: bool = knob(
        True,
        "read the LLM's reasoning; --noexample_reasoning: the examples' rows and labels alone, "
        "which need no LLM",
        flag="example_reasoning",
    )
    per_label: int = knob(
        2,
        "examples of each label beside a row",
        minimum=1,
        maximum=64,
        flag="examples_per_label",
    )
    layers: int = knob(
        2, "layers of the transformer over them", minimum=1, maximum=64, flag="example_layers"
    )
    heads: int = knob(2, "heads of its attention", minimum=1, maximum=WIDTH, flag="example_heads")
    reconstruction: float = knob(
        1.0,
        "weight of 1 - cosine of the reasoning and what is made again of its state",
        minimum=0,
        maximum=FLOAT,
        flag="reconstruction_weight",
    )

    def check(self, run: RunConfig) -> None:
        """Refuse what examples do not go with in a run: what would change which rows they are, or
        the network beside which they are read.

        Raises:
          ConfigError: what, and what to do.
        """
        if not self.product:
            if self.vectors:
                raise ConfigError(
                    f"--example_vectors={self.vectors} find examples: add --examples=NAME (slgr "
                    "teach examples), or drop it"
                )
            return
        backbone, dim = run.model.backbone, run.model.dim
        if backbone not in CLICK_BACKBONES:
            raise ConfigError(
                f"--examples={self.product} are beside the fields of a click model, and "
                f"--backbone={backbone} has none; use one of {listing(CLICK_BACKBONES)}, or drop it"
            )
        if not self.vectors:
            raise ConfigError(
                f"--examples={self.product} are found by vectors of items: add "
                "--example_vectors=NAME (slgr teach embed)"
            )
        if dim % (2 * self.heads):
            raise ConfigError(
                f"--dim={dim} is not a multiple of twice --example_heads={self.heads}: each head "
                "turns pairs of numbers; change either"
            )
        reasons = {
            f"--init_from={run.train.init_from} begins a network at another's": run.train.init_from,
            f"--refit={run.train.refit} puts validation among a user's rows": run.train.refit,
            f"{run.edits.named} moves rows": run.edits.named,
            "--adapter_chunks are of the row that is scored alone": run.vectors.adapter_chunks,
            f"--user_shards={run.train.user_shards} leaves each device its own users' rows": (
                run.train.user_shards
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(
                    f"--examples={self.product} are rows of all users' training with their fields, "
                    f"and {reason}; drop one of them"
                )
