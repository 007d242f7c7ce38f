"""The knobs of the recommender; part of a training run."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import BACKBONES
from slgr_jax.config.knobs import FLOAT, WIDTH, Section, knob


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The recommender."""

    backbone: str = knob("mf", "recommender to train", choices=BACKBONES)
    dim: int = knob(64, "width of an embedding", minimum=1, maximum=WIDTH)
    item_bias: bool = knob(True, "mf: add a learned bias per item")
    init_std: float = knob(
        0.1,
        "standard deviation of a freshly drawn embedding row's norm "
        "per sqrt(dim), i.e. entries ~ N(0, init_std^2 / dim)",
        above=0,
        maximum=FLOAT,
    )
    dropout: float = knob(
        0.0,
        "dropout rate of a training pass: mf on the user's vector, lightgcn on the graph's edges, "
        "others inside the network",
        minimum=0,
        below=1,
    )
    layers: int = knob(
        2,
        "lightgcn: propagations; sasrec, bert4rec: transformer blocks; gru4rec: recurrent layers; "
        "autoint, dcn, dcnv2: interaction layers",
        minimum=1,
        maximum=256,
    )
    heads: int = knob(2, "sasrec, bert4rec, autoint: attention heads", minimum=1, maximum=WIDTH)
    hidden: int = knob(
        128,
        "gru4rec: width of the state; sasrec, bert4rec: width of the feed-forward",
        minimum=1,
        maximum=WIDTH,
    )
    max_history: int = knob(
        50,
        "sequence and click backbones: latest events of a user that are looked at",
        minimum=1,
        maximum=WIDTH,
    )
    history_fields: bool = knob(
        True, "click backbones: use the history and its categories as fields (needs times)"
    )
    most_categories: int = knob(
        8, "click backbones: categories kept of an item", minimum=1, maximum=WIDTH
    )
    features: str = knob(
        "none",
        "features of users, items and interactions to use: none, all that the dataset has, or "
        "names (age,gender) as slgr prepare kept them; fields of click backbones, for others added "
        "to a user's and an item's row. sasrec, gru4rec, bert4rec: items' alone; interactions' are "
        "for click backbones alone",
    )
    most_feature_values: int = knob(
        16, "values kept of a multi-valued feature, the first of its row", minimum=1, maximum=WIDTH
    )
    mask_probability: float = knob(
        0.2, "bert4rec: share of events that are masked and predicted", above=0, below=1
    )
    mlp: tuple[int, ...] = knob(
        (200, 80), "click backbones: widths of the MLP", minimum=1, maximum=WIDTH
    )
    attention_mlp: tuple[int, ...] = knob(
        (64, 16), "din: widths of the attention unit's MLP", minimum=1, maximum=WIDTH
    )
    attention_width: int = knob(
        64, "autoint: width of the attention over fields", minimum=1, maximum=WIDTH
    )
    cin: tuple[int, ...] = knob(
        (100, 100, 100),
        "xdeepfm: maps of each layer of the interaction network",
        minimum=1,
        maximum=WIDTH,
    )
    experts: int = knob(
        4, "dcnv2: experts of a cross layer (with --low_rank)", minimum=1, maximum=1024
    )
    low_rank: int = knob(
        0, "dcnv2: rank of an expert's cross matrix; 0 = one full matrix", minimum=0, maximum=WIDTH
    )
