"""Vectors that stay as they are, and the small network that makes rows of them.

Wherever a backbone sees a row of item i it sees

    e_i + A(z_i)        its own row and what its vector comes to (`--item_vectors`)
    A(z_i)              the vector alone (`--noitem_rows`): also of an item that no step has seen
    e_i + g(n_i) A(z_i) with `--adapter_gate`: g(n) = sigmoid(w log(1 + n) + b), n the training
                        interactions of the item: where there is a log, a text may be worth less

and of users likewise. Click models that keep rows have A(z_i) as one more field instead. z_i is
looked up like a row and never written: no gradient, no optimiser state, no place in a checkpoint.
A is trained as dense parameters are. Rows without a vector have A = 0.

DLLM2Rec (RecSys'24) adds W z + c to the input embedding, LLMEmb (AAAI'25) and LLM-ESR (NeurIPS'24)
map vectors by two linear layers. KAR (RecSys'24, arXiv 2306.10933) has a mixture of experts'
outputs as fields (`Experts`). A KSER-style extractor reads several vectors a row (`Extractor`).
CoLaKG (SIGIR'25) takes the mean of a row and its mapped vector, and lets items read those with the
nearest texts (`Neighbourhood`), before a graph smooths both. LLMRec (WSDM'24) lets the graph smooth
them by themselves (`SideFeature`). LLM-ESR keeps both side by side, [e_i ; A(z_i)], as two views
of an item (`SecondView`, `dual_view`). PAD makes one view of both, then has a tower for each view
(`tower_views`, `towers`). LANE and SLIM let a history's states take up vectors of the user
(`UserVectors`, `user_fusion`).

The maps themselves are in `vector_maps` and `tower_views`.

Shape letters: Z numbers of a vector, W width of a row, D of what becomes of it (W but for several
views), I items, k neighbours of one.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from slgr_jax.config import VectorConfig
from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones.tower_views import MergedView, ThreeViews
from slgr_jax.models.backbones.vector_maps import (
    Adapter,
    Experts,
    Extractor,
    Neighbourhood,
    SecondView,
    SideFeature,
    UserVectors,
)
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling.context import Sizes, VectorSizes

SHARED = "shared"  # of these, what they have in common: experts, an alignment
PARAMS = "adapters"  # of a backbone's dense parameters, those of its adapters
FIELDS = {"item": "item_vector", "user": "user_vector"}  # side -> its field of a click model
SIDES = {"item": "item_side", "user": "user_side"}  # side -> what a graph smooths beside its rows


@runtime_checkable
class Adapted(Protocol):
    """A backbone whose rows can come from vectors.

    Attributes:
      tables: as `Backbone.tables`: without those whose rows are their vectors alone.
      adapters: by the name that the backbone calls rows by.
      vector_fields: whether vectors beside rows are fields of their own, called `FIELDS`.
    """

    tables: Mapping[str, TableSpec]
    adapters: Mapping[str, Adapter]
    vector_fields: bool


NONE: Mapping[str, Adapter] = types.MappingProxyType({})


def with_vectors(backbone: Any, config: VectorConfig, sizes: Sizes) -> Any:
    """A copy of a backbone that sees what vectors come to; itself where there are none.

    Raises:
      ConfigError: it has no rows of that side, or none that anything could be added to.
    """
    adapters: dict[str, Adapter] = {}
    tables = dict(backbone.tables)
    for side, of_side in (("item", sizes.item_vectors), ("user", sizes.user_vectors)):
        if of_side is None:
            continue
        if config.fuses_users and side == "user" and isinstance(backbone, Adapted):
            of_items = adapters["item"].spec if "item" in adapters else tables["item"]
            width = of_items.vector_width
            adapters[side] = UserVectors(
                *(side, sizes.users, of_side.width, width, config.adapter_hidden),
                init_std=width**0.5,  # entries of about 1, as those of states
                gated=config.adapter_gate,
                slots=sum(of_side.fields) or 1,
            )
            continue
        if not isinstance(backbone, Adapted) or side not in tables:
            fix = " or, of a sequence backbone, add --user_fusion" if side == "user" else ""
            raise ConfigError(
                f"--{side}_vectors: {type(backbone).__name__} has no rows of {side}s that vectors "
                f"could be added to; drop it{fix}"
            )
        if config.adapter_neighbours and not getattr(backbone, "whole", False):
            raise ConfigError(
                f"--adapter_neighbours={config.adapter_neighbours} lets all items read their "
                f"neighbours before a graph smooths them, and {type(backbone).__name__} looks at "
                "those of a batch alone; use --backbone=lightgcn, or drop it"
            )
        own = tables[side]
        if weight := config.side_weights[side]:
            if not getattr(backbone, "side_features", False):
                raise ConfigError(
                    f"--{side}_side_weight={weight:g} is for backbones with a graph, and "
                    f"{type(backbone).__name__} has none; use --backbone=lightgcn, or drop it"
                )
            sizes_of_side = (side, own.rows, of_side.width, own.width, config.adapter_hidden)
            adapters[SIDES[side]] = SideFeature(*sizes_of_side, own.init_std, weight=weight)
            continue
        beside = backbone.vector_fields and not of_side.alone
        name = FIELDS[side] if beside else side
        adapters[name] = _adapter(config, side, own, of_side, joint=beside)
        if of_side.alone:
            del tables[side]
    if not adapters:
        return backbone
    widths = {adapter.vectors for adapter in adapters.values()}
    if config.adapter_experts and config.adapter_shared and len(widths) > 1:
        raise ConfigError(
            f"--adapter_shared={config.adapter_shared} experts read the vectors of items and of "
            f"users, and these have {' and '.join(map(str, sorted(widths)))} numbers; give one "
            "product for both, or --adapter_shared=0"
        )
    composed = copy.copy(backbone)
    composed.adapters, composed.tables = adapters, tables
    return composed


def _adapter(
    config: VectorConfig, side: str, own: TableSpec, of_side: VectorSizes, *, joint: bool
) -> Adapter:
    """What makes rows of the vectors of a side, whose own rows are `own`."""
    sizes = (side, own.rows, of_side.width)
    if of_side.fields:
        # A network's fields are vectors; what is added to a row is added to its scalars, too.
        width = own.vector_width if joint else own.width
        hidden = config.selection_hidden
        return Extractor(*sizes, width, hidden, own.init_std, fields=of_side.fields, joint=joint)
    if config.adapter_neighbours:
        return Neighbourhood(*sizes, own.width, (), own.init_std)
    if config.dual_view:
        sizes_of_view = (*sizes, own.width, config.adapter_hidden, own.init_std)
        return SecondView(*sizes_of_view, config.adapter_gate)
    if config.towers != "none" and side == "item":
        views = ThreeViews if config.towers == "three" else MergedView
        return views(*sizes, own.width, config.adapter_hidden, own.init_std)
    if config.adapter_experts:
        return Experts(
            *(*sizes, own.width, config.expert_hidden, own.init_std),
            experts=config.adapter_experts,
            shared=config.adapter_shared,
        )
    return Adapter(*sizes, own.width, config.adapter_hidden, own.init_std, config.adapter_gate)


def without_vectors(backbone: Any) -> Any:
    """A copy of a backbone whose every table is trained as one that sees no vectors."""
    if not of(backbone):
        return backbone
    composed = copy.copy(backbone)
    composed.adapters = NONE
    return composed


def of(backbone: Any) -> Mapping[str, Adapter]:
    """The adapters of a backbone by the name of the rows that they make; {} for most."""
    return backbone.adapters if isinstance(backbone, Adapted) else NONE


def init_params(backbone: Any, key: jax.Array) -> dict[str, Any]:
    """A backbone's dense parameters, those of its adapters as `PARAMS` among them."""
    params = dict(backbone.init(key))
    if adapters := of(backbone):
        keys = jax.random.split(jax.random.fold_in(key, 1), len(adapters))
        params[PARAMS] = {
            name: adapter.init(each)
            for (name, adapter), each in zip(sorted(adapters.items()), keys, strict=True)
        }
        first = next(iter(adapters.values()))
        if shared := first.init_shared(jax.random.fold_in(key, 2)):
            params[PARAMS][SHARED] = shared
    return params


def row_specs(backbone: Any) -> dict[str, TableSpec]:
    """Every table that scoring reads: those that are trained, as wide as what vectors make of
    them, and what vectors come to."""
    made = {
        name: adapter.spec
        for name, adapter in of(backbone).items()
        if not isinstance(adapter, SideFeature)
    }
    trained = {
        name: dataclasses.replace(
            spec, width=made[name].width, scalars=made[name].scalars or spec.scalars
        )
        if name in made
        else spec
        for name, spec in backbone.tables.items()
    }
    return {**made, **trained}


def made_of(
    backbone: Any,
    params: Mapping[str, Any],
    name: str,
    stored: Float[Array, "... Z1"],
    row: Float[Array, "... W"] | None = None,
) -> Float[Array, "... D"]:
    """What the adapter called `name` makes of stored vectors.

    Args:
      params: the backbone's.
      row: what it is added to; None where nothing is.
    """
    of_adapters = params[PARAMS]
    return of(backbone)[name].apply(of_adapters[name], stored, of_adapters.get(SHARED), row)


def added(
    backbone: Any,
    params: Mapping[str, Any],
    rows: Mapping[str, Float[Array, "... W"]],
    vectors: Mapping[str, Float[Array, "... Z1"]],
) -> dict[str, Float[Array, "... D"]]:
    """Rows by name, and to them, or in their place, what stored vectors of these names come to."""
    out = dict(rows)
    for name, stored in vectors.items():
        row = out.get(name)
        made = made_of(backbone, params, name, stored, row)
        out[name] = made if row is None else of(backbone)[name].widened(row) + made
    return out


def added_to_all(
    backbone: Any,
    params: Mapping[str, Any],
    tables: Mapping[str, Float[Array, "_ W"]],
    vectors: Mapping[str, Float[Array, "_ Z1"]],
    neighbours: Int[Array, "I k"] | None,
) -> dict[str, Float[Array, "_ D"]]:
    """`added` of whole tables, whose rows may read one another (`Adapter.among`)."""
    out, adapters = added(backbone, params, tables, vectors), of(backbone)
    for name, stored in vectors.items():
        of_adapter = params[PARAMS][name]
        out[name] = adapters[name].among(of_adapter, out[name], stored, neighbours)
    return out
