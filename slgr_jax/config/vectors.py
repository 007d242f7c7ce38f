"""The knobs of what a run takes from vectors of items and users; part of a training run."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import FLOAT, WIDTH, Section, knob
from slgr_jax.config.training import TABLE_DTYPES

INIT_HOWS = ("pca", "variance", "uniform", "random", "leading", "all")


@dataclasses.dataclass(frozen=True)
class VectorConfig(Section):
    """What comes from products under DATA/embeddings (slgr teach embed)."""

    init_item_vectors: str = knob(
        "",
        "begin with these vectors as the items' rows, by --init_how, and with the mean of their "
        "training items' as users' rows; items without a vector begin as drawn",
    )
    init_user_vectors: str = knob(
        "",
        "begin with the user vectors of this product as the users' rows",
    )
    init_how: str = knob(
        "pca",
        "which numbers of a vector a row begins with: pca = the first principal components; "
        "variance = the coordinates that vary most over the most popular fifth; uniform = every "
        "n-th; random = any, drawn with repetition (all three LLMInit's); leading = the first "
        "ones, of narrower vectors all, and the rest is drawn (slgr teach factors); all = all of "
        "them, as many as a row has",
        choices=INIT_HOWS,
    )
    init_scale: float = knob(
        1.0,
        "root mean square length of the rows that begin with vectors, over that of rows as drawn",
        above=0,
        maximum=FLOAT,
    )
    init_half: float = knob(
        0.0,
        "begin with a share a = H / (H + n) of the vector and as much less of what would be drawn, "
        "n the training interactions of the item (or of the user, with --init_user_vectors): half "
        "and half at n = H, so that cold and tail rows believe the text more; 0 = all alike",
        minimum=0,
        maximum=FLOAT,
    )

    item_vectors: str = knob(
        "",
        "add to each item's row what an adapter, learned with the rest, makes of its vector of "
        "this product, which stays as it is; click backbones: one more field. An item that "
        "training never saw is scored by its vector",
    )
    user_vectors: str = knob("", "the same for users: mf, lightgcn and click backbones")
    item_rows: bool = knob(
        True,
        "learn a row of its own for each item; --noitem_rows: what its vector comes to is all",
    )
    user_rows: bool = knob(True, "the same for users")
    adapter_hidden: tuple[int, ...] = knob(
        (), "widths of the adapter's hidden layers; none = a linear map", minimum=1, maximum=WIDTH
    )
    adapter_experts: int = knob(
        0,
        "experts of each side's adapter, mixed by a softmax of its vectors, each a network with a "
        "ReLU behind every layer (KAR: 5); --adapter_hidden is theirs, 128 by default; 0 = one map",
        minimum=0,
        maximum=1024,
    )
    adapter_shared: int = knob(
        2,
        "experts besides that the adapters of items and of users share",
        minimum=0,
        maximum=1024,
    )
    adapter_chunks: bool = knob(
        False,
        "choose among a row's several vectors (slgr teach embed --chunks) by a selection network "
        "and an attention, KSER-style; --adapter_hidden is the network's, 64 by default. Click "
        "backbones: of the item that is scored, and of the user. Without it, and for all else, a "
        "row's vector is the mean of its chunks",
    )
    adapter_gate: bool = knob(
        False,
        "multiply what an adapter makes of a vector by sigmoid(w log(1 + n) + b), n the training "
        "interactions of the item (user), w and b learned with the rest and one for each side: how "
        "far a text is believed where there is a log",
    )
    event_vectors: bool = knob(
        True,
        "click backbones: the events of a history have the field of their vectors, too; "
        "--noevent_vectors: the item that is scored alone (KAR), at less cost",
    )
    vector_l2: float = knob(
        1.0,
        "share of --l2 that is on what vectors come to; less where new items are to be found",
        minimum=0,
        maximum=FLOAT,
    )
    vector_dtype: str = knob(
        "bfloat16", "storage of --item_vectors and --user_vectors", choices=TABLE_DTYPES
    )

    @property
    def products(self) -> dict[str, str]:
        """Side -> the product whose vectors stay beside training."""
        named = {"item": self.item_vectors, "user": self.user_vectors}
        return {side: name for side, name in named.items() if name}

    @property
    def expert_hidden(self) -> tuple[int, ...]:
        """Hidden layers of each expert."""
        return self.adapter_hidden or (128,)

    @property
    def selection_hidden(self) -> tuple[int, ...]:
        """Hidden layers of the networks that select chunks."""
        return self.adapter_hidden or (64,)

    def alone(self, side: str) -> bool:
        """Whether a side has vectors and no rows."""
        return not (self.item_rows if side == "item" else self.user_rows)

    @property
    def init_products(self) -> dict[str, str]:
        """Table -> the product whose vectors its rows begin with."""
        named = {"item": self.init_item_vectors, "user": self.init_user_vectors}
        return {table: name for table, name in named.items() if name}
