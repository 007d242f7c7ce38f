"""The knobs of what a run takes from vectors of items and users; part of a training run."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import FLOAT, Section, knob

INIT_HOWS = ("pca", "variance", "uniform", "random", "all")


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
        "n-th; random = any, drawn with repetition (all three LLMInit's); all = all of them, as "
        "many as a row has",
        choices=INIT_HOWS,
    )
    init_scale: float = knob(
        1.0,
        "root mean square length of the rows that begin with vectors, over that of rows as drawn",
        above=0,
        maximum=FLOAT,
    )

    @property
    def init_products(self) -> dict[str, str]:
        """Table -> the product whose vectors its rows begin with."""
        named = {"item": self.init_item_vectors, "user": self.init_user_vectors}
        return {table: name for table, name in named.items() if name}
