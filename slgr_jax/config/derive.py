"""The knobs of slgr teach interactions."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import Section, knob

# What an interaction weighs that is derived from a list.
WEIGHTS = ("one", "place")
# The nearest users of an item where --users_per_item is 0: as many as ColdLLM has.
NEAREST_USERS = 20


@dataclasses.dataclass(frozen=True)
class DeriveConfig(Section):
    """interactions: what a teacher's lists, or texts, say that users take."""

    lists: str = knob(
        "",
        "product of DATA/teacher whose first places count as interactions; empty: whoever is "
        "nearest to an item by text (vectors: --embeddings and --centre as for nearest)",
    )
    places: int = knob(
        10,
        "--lists: first places of a user's list, own training items left out; 0 = all",
        minimum=0,
    )
    rare_items: int = knob(
        -1,
        "only items with at most so many training interactions: 0 = those that training never "
        "saw, -1 = any item",
        minimum=-1,
    )
    users_per_item: int = knob(
        0,
        "keep so many users of an item, those whose lists have it first (or whose vectors are "
        f"nearest to its); 0 = all of --lists, {NEAREST_USERS} nearest",
        minimum=0,
    )
    weights: str = knob(
        "one",
        "of each interaction: one = 1, place = 1 / log2(1 + place), the place in the user's list "
        "(by texts: among the item's users)",
        choices=WEIGHTS,
    )
