"""The knobs of what a run takes from vectors of items and users; part of a training run."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.backbones import BUILT_IN, DUAL_VIEW_BACKBONES, SEQUENCE_BACKBONES
from slgr_jax.config.knobs import FLOAT, WIDTH, Section, knob
from slgr_jax.config.training import TABLE_DTYPES
from slgr_jax.errors import ConfigError, listing

USER_FUSIONS = ("none", "attention", "concat")
TOWERS = ("none", "aligned", "three")
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
    user_vectors: str = knob(
        "",
        "the same for users: mf, lightgcn and click backbones; sequence backbones: --user_fusion",
    )
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
    adapter_neighbours: int = knob(
        0,
        "CoLaKG (10 to 30): a row is the mean of itself and its mapped vector, and an item then of "
        "itself and what it takes, by an attention, from so many items with the nearest vectors; "
        "lightgcn; 0 = none",
        minimum=0,
        maximum=1024,
    )
    item_side_weight: float = knob(
        0.0,
        "LLMRec (0.02): what --item_vectors come to is smoothed over the graph by itself, made as "
        "long as this, and added to what becomes of the rows; lightgcn; 0 = it is added to rows "
        "before the graph smooths them",
        minimum=0,
        maximum=FLOAT,
    )
    user_side_weight: float = knob(
        0.0, "the same of --user_vectors (LLMRec: 2.8)", minimum=0, maximum=FLOAT
    )
    adapter_gate: bool = knob(
        False,
        "multiply what an adapter makes of a vector by sigmoid(w log(1 + n) + b), n the training "
        "interactions of the item (user), w and b learned with the rest and one for each side: how "
        "far a text is believed where there is a log",
    )
    dual_view: bool = knob(
        False,
        "LLM-ESR: an item's row and its mapped vector stay two views side by side, a history is "
        "read by both through one encoder, with cross-attention between them, and scores add up; "
        "sasrec, gru4rec; begin rows with --init_item_vectors=NAME, too, as LLM-ESR does",
    )
    dual_view_heads: int = knob(
        2, "heads of the attention between the views", minimum=1, maximum=WIDTH
    )
    towers: str = knob(
        "none",
        "PAD; aligned = an item's row and its mapped vector become one view by a network, which a "
        "history is read by (with --guidance=pad_mmd its second phase); three = an encoder for "
        "rows, for this view and for texts alone, whose scores are weighed by learned shares of "
        "the item's bin of training frequency (its third phase); sasrec, gru4rec",
        choices=TOWERS,
    )
    user_fusion: str = knob(
        "none",
        "what sequence backbones do with --user_vectors; attention = LANE: states of a history "
        "attend to the user's several vectors, preferences for instance (slgr teach embed "
        "--chunks); concat = SLIM: a state and the user's vector side by side through a linear "
        "map. A user without a vector is its history alone",
        choices=USER_FUSIONS,
    )
    user_fusion_heads: int = knob(4, "heads of --user_fusion=attention", minimum=1, maximum=WIDTH)
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

    def check(self) -> None:
        """Refuse knobs of this section that contradict each other.

        Raises:
          ConfigError: what to drop.
        """
        self._check_readings()
        if self.dual_view and not self.item_vectors:
            raise ConfigError(
                "--dual_view reads items' vectors beside their rows: add --item_vectors=NAME "
                "(slgr teach embed), or drop it"
            )
        if self.towers != "none" and not self.item_vectors:
            raise ConfigError(
                f"--towers={self.towers} reads items' vectors beside their rows: add "
                "--item_vectors=NAME (slgr teach embed), or drop it"
            )
        if self.towers == "three" and self.init_item_vectors:
            raise ConfigError(
                f"--init_item_vectors={self.init_item_vectors} is what one row of an item begins "
                "with, and --towers=three has two; begin with runs of the phases before it, "
                "--init_from, or drop --init_item_vectors"
            )
        if self.fuses_users and not self.user_vectors:
            raise ConfigError(
                f"--user_fusion={self.user_fusion} is of users' vectors and the states of their "
                "histories: add --user_vectors=NAME (slgr teach embed), or drop it"
            )
        for side in ("item", "user"):
            if self.alone(side):
                self._check_alone(side)
            if self.side_weights[side] and side not in self.products:
                raise ConfigError(
                    f"--{side}_side_weight={self.side_weights[side]:g} weighs what vectors come "
                    f"to: add --{side}_vectors=NAME (slgr teach embed), or drop it"
                )
        if not self.event_vectors and self.alone("item"):
            raise ConfigError(
                "--noitem_rows leaves the events of a history their vectors alone, and "
                "--noevent_vectors takes these; drop one of them"
            )

    def check_fits(self, backbone: str) -> None:
        """Refuse what a built-in backbone does not do with vectors.

        Raises:
          ConfigError: what to use instead.
        """
        if backbone not in BUILT_IN:
            return
        if (count := self.adapter_neighbours) and backbone != "lightgcn":
            raise ConfigError(
                f"--adapter_neighbours={count} lets all items read their neighbours before a graph "
                f"smooths them, and --backbone={backbone} has none; use lightgcn, or drop it"
            )
        weights = self.side_weights
        if any(weights.values()) and backbone != "lightgcn":
            side = next(side for side, weight in weights.items() if weight)
            raise ConfigError(
                f"--{side}_side_weight={weights[side]:g} adds what a graph makes of vectors to "
                f"what it makes of rows, and --backbone={backbone} has no graph; use lightgcn, or "
                "drop it: vectors are added to rows then"
            )
        if self.dual_view and backbone not in DUAL_VIEW_BACKBONES:
            raise ConfigError(
                f"--dual_view reads histories from their first event on, and --backbone={backbone} "
                f"does not; use {' or '.join(DUAL_VIEW_BACKBONES)}, or drop it: vectors are added "
                "to rows then"
            )
        if self.towers != "none" and backbone not in DUAL_VIEW_BACKBONES:
            raise ConfigError(
                f"--towers={self.towers} reads histories from their first event on, and "
                f"--backbone={backbone} does not; use {' or '.join(DUAL_VIEW_BACKBONES)}, or drop "
                "it: vectors are added to rows then"
            )
        if self.fuses_users and backbone not in SEQUENCE_BACKBONES:
            raise ConfigError(
                f"--user_fusion={self.user_fusion} is for backbones to which a user is a history, "
                f"{listing(SEQUENCE_BACKBONES)}; --backbone={backbone} takes up --user_vectors "
                "without it: drop it"
            )

    def _check_readings(self) -> None:
        """Refuse two ways of reading vectors at once."""
        neighbours = f"--adapter_neighbours={self.adapter_neighbours}"
        experts = f"--adapter_experts={self.adapter_experts}"
        hidden = f"--adapter_hidden={','.join(map(str, self.adapter_hidden))}"
        clashes = {
            f"--adapter_chunks and {experts} are two ways to read vectors": (
                self.adapter_chunks and self.adapter_experts
            ),
            f"--adapter_gate weighs one map, and the {self.adapter_experts} of --adapter_experts "
            "have a gate of their own": self.adapter_gate and self.adapter_experts,
            "--adapter_gate weighs one map, and --adapter_chunks weighs each chunk": (
                self.adapter_gate and self.adapter_chunks
            ),
            f"{neighbours} and {experts} are two ways to read vectors": (
                self.adapter_neighbours and self.adapter_experts
            ),
            f"{neighbours} and --adapter_chunks are two ways to read vectors": (
                self.adapter_neighbours and self.adapter_chunks
            ),
            f"{neighbours} takes the mean of a row and its vector, which --adapter_gate would "
            "weigh": self.adapter_neighbours and self.adapter_gate,
            "--item_side_weight and --user_side_weight weigh what one map makes of vectors; "
            "--adapter_experts, --adapter_chunks, --adapter_gate and --adapter_neighbours make "
            "rows of them": any(self.side_weights.values())
            and bool(
                self.adapter_experts
                or self.adapter_chunks
                or self.adapter_gate
                or self.adapter_neighbours
            ),
            f"{neighbours} reads vectors by one linear map, and {hidden} has layers between": (
                self.adapter_neighbours and self.adapter_hidden
            ),
        }
        if self.dual_view:
            clashes |= {
                f"--dual_view keeps a row and its vector apart, and {other} makes one of them": on
                for other, on in (
                    (experts, self.adapter_experts),
                    ("--adapter_chunks", self.adapter_chunks),
                    (neighbours, self.adapter_neighbours),
                )
            }
        if self.towers != "none":
            towers = f"--towers={self.towers}"
            clashes |= {
                f"{towers} and {other} are two ways to read items' vectors": on
                for other, on in (
                    ("--dual_view", self.dual_view),
                    (experts, self.adapter_experts),
                    ("--adapter_chunks", self.adapter_chunks),
                    (neighbours, self.adapter_neighbours),
                )
            }
            weighs = "by a network" if self.towers == "aligned" else "by bins of its frequency"
            clashes[f"{towers} weighs an item's text {weighs}, and --adapter_gate by its count"] = (
                self.adapter_gate
            )
        if self.fuses_users:
            fusion = f"--user_fusion={self.user_fusion}"
            clashes |= {
                f"{fusion} reads users' vectors by one map, {experts} by several": (
                    self.adapter_experts
                ),
                f"{fusion} and --adapter_chunks are two ways to read users' vectors": (
                    self.adapter_chunks
                ),
            }
        for reason, holds in clashes.items():
            if holds:
                raise ConfigError(f"{reason}; drop one of them")

    def _check_alone(self, side: str) -> None:
        """Refuse what needs rows of a side that has none."""
        if self.adapter_chunks:
            raise ConfigError(
                f"--adapter_chunks selects chunks by the {side}'s row, and --no{side}_rows leaves "
                "none; drop one of them"
            )
        if self.adapter_neighbours:
            raise ConfigError(
                f"--adapter_neighbours={self.adapter_neighbours} takes the mean of a row and its "
                f"vector, and --no{side}_rows leaves no row; drop one of them"
            )
        if self.dual_view and side == "item":
            raise ConfigError(
                "--dual_view has items' rows for one of its views, and --noitem_rows leaves none; "
                "drop one of them"
            )
        if self.towers != "none" and side == "item":
            raise ConfigError(
                f"--towers={self.towers} reads items' rows beside their vectors, and --noitem_rows "
                "leaves none; drop one of them"
            )
        if self.fuses_users and side == "user":
            raise ConfigError(
                f"--user_fusion={self.user_fusion} is for backbones that have no rows of users, "
                "which --nouser_rows would leave out; drop --nouser_rows"
            )
        if self.side_weights[side]:
            raise ConfigError(
                f"--{side}_side_weight={self.side_weights[side]:g} adds to what becomes of the "
                f"{side}s' rows, and --no{side}_rows leaves none; drop one of them"
            )
        if side not in self.products:
            raise ConfigError(
                f"--no{side}_rows leaves {side}s their vectors alone: add --{side}_vectors=NAME "
                "(slgr teach embed), or drop it"
            )
        if side in self.init_products:
            raise ConfigError(
                f"--init_{side}_vectors={self.init_products[side]} is what rows begin with, and "
                f"--no{side}_rows leaves none; drop one of them"
            )

    @property
    def products(self) -> dict[str, str]:
        """Side -> the product whose vectors stay beside training."""
        named = {"item": self.item_vectors, "user": self.user_vectors}
        return {side: name for side, name in named.items() if name}

    @property
    def fuses_users(self) -> bool:
        """Whether states of histories take up users' vectors."""
        return self.user_fusion != "none"

    def reads_chunks(self, side: str) -> bool:
        """Whether a side's several vectors are read, not their mean."""
        return self.adapter_chunks or (side == "user" and self.user_fusion == "attention")

    @property
    def side_weights(self) -> dict[str, float]:
        """Side -> the length of what its vectors add behind a graph; 0: they are added to rows."""
        return {"item": self.item_side_weight, "user": self.user_side_weight}

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
