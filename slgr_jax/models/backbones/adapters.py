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

Shape letters: Z numbers of a vector, D width of a row, S slots for vectors of a row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from slgr_jax.config import VectorConfig
from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import chunk_extractor
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.sampling.context import Sizes, VectorSizes

SHARED = "shared"  # of these, what they have in common: experts, an alignment
GATE = "gate"  # of an adapter's parameters, what weighs its output or its experts
PARAMS = "adapters"  # of a backbone's dense parameters, those of its adapters
FIELDS = {"item": "item_vector", "user": "user_vector"}  # side -> its field of a click model


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A(z) = W_n relu(... relu(W_1 z + b_1)) + b_n of the vectors of one side.

    Attributes:
      side: whose vectors, item or user.
      rows: how many there are.
      vectors: Z.
      width: D.
      hidden: widths of the layers between.
      init_std: fresh outputs have the length of drawn rows, as vectors come with entries of root
        mean square 1.
      gated: whether outputs are multiplied by g(n), which begins at 1/2 whatever n.
    """

    side: str
    rows: int
    vectors: int
    width: int
    hidden: tuple[int, ...]
    init_std: float
    gated: bool = False

    @property
    def stored(self) -> TableSpec:
        """How vectors lie in a table: Z numbers, then (where it is gated) log(1 + n), then 1 (0
        where a row has no vector)."""
        return TableSpec(self.rows, self.vectors + self.gated + 1, 0.0)

    @property
    def spec(self) -> TableSpec:
        """The table that all outputs make."""
        return TableSpec(self.rows, self.width, self.init_std)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: weights ~ N(0, 2 / inputs) before a relu, biases 0."""
        sizes = zip((self.vectors, *self.hidden), (*self.hidden, self.width), strict=True)
        layers = {}
        for number, (inputs, outputs) in enumerate(sizes):
            last = number == len(self.hidden)
            std = self.init_std / np.sqrt(outputs * inputs) if last else np.sqrt(2.0 / inputs)
            drawn = jax.random.normal(jax.random.fold_in(key, number), (inputs, outputs))
            layers[f"layer_{number}"] = {
                "kernel": np.float32(std) * drawn,
                "bias": jnp.zeros(outputs),
            }
        if self.gated:
            layers[GATE] = {"weight": jnp.zeros(()), "bias": jnp.zeros(())}
        return layers

    def init_shared(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters that it has in common with other adapters; {} without any."""
        return {}

    @property
    def penalised(self) -> bool:
        """Whether --l2 is on what vectors come to, as it is on rows."""
        return True

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z1"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... D"]:
        """What stored vectors come to; 0 where there is none.

        Args:
          shared: parameters that it has in common with other adapters.
          row: what they are added to; None where nothing is.
        """
        x, has = stored[..., : self.vectors], stored[..., -1:]
        if self.gated:
            gate, log_count = params[GATE], stored[..., self.vectors : self.vectors + 1]
            has = has * jax.nn.sigmoid(gate["weight"] * log_count + gate["bias"])
        for number in range(len(self.hidden) + 1):
            layer = params[f"layer_{number}"]
            x = jnp.dot(jax.nn.relu(x) if number else x, layer["kernel"])
            x = x + jnp.expand_dims(layer["bias"], tuple(range(x.ndim - 1)))
        return x * has


@dataclasses.dataclass(frozen=True)
class Experts(Adapter):
    """A(z) = sum over the experts e of softmax(G z)_e relu(W_n relu(... relu(W_1 z + b_1)) + b_n)

    KAR's hybrid-expert adaptor (section 3.3): some experts are the side's own, some are shared with
    the other side's adapter, the gate G is the side's own.

    Attributes:
      experts: how many are its own.
      shared: how many it has in common with other adapters.
    """

    experts: int = 1
    shared: int = 0

    def init(self, key: jax.Array) -> dict[str, Any]:
        for_experts, for_gate = jax.random.split(key)
        count = self.experts + self.shared
        gate = jax.random.normal(for_gate, (self.vectors, count)) / np.sqrt(self.vectors)
        return {GATE: gate, **self.init_experts(for_experts, self.experts)}

    def init_shared(self, key: jax.Array) -> dict[str, Any]:
        return self.init_experts(key, self.shared) if self.shared else {}

    def init_experts(self, key: jax.Array, count: int) -> dict[str, Any]:
        """Fresh parameters of some experts."""
        one = dataclasses.replace(self, init_std=self.init_std * np.sqrt(2.0))
        stacked: dict[str, Any] = jax.vmap(functools.partial(Adapter.init, one))(
            jax.random.split(key, count)
        )
        return stacked

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z1"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... D"]:
        z, has = stored[..., :-1].reshape(-1, self.vectors), stored[..., -1:]
        outputs = [self._outputs(params, z)]
        if self.shared:
            assert shared is not None
            outputs.append(self._outputs(shared, z))
        weights = jax.nn.softmax(z @ params[GATE])
        mixed = jnp.einsum("nx,xnd->nd", weights, jnp.concatenate(outputs))
        return mixed.reshape(*stored.shape[:-1], self.width) * has

    def _outputs(self, params: Mapping[str, Any], z: Float[Array, "N Z"]) -> Float[Array, "X N D"]:
        """What each expert makes of vectors."""
        layers = [params[f"layer_{number}"] for number in range(len(self.hidden) + 1)]
        x = jnp.broadcast_to(z, (layers[0]["kernel"].shape[0], *z.shape))
        for layer in layers:
            x = jax.nn.relu(jnp.einsum("xni,xio->xno", x, layer["kernel"]) + layer["bias"][:, None])
        return x


@dataclasses.dataclass(frozen=True)
class Extractor(Adapter):
    """Several vectors a row, and the choice among them (`chunk_extractor`).

    Beside a row, A(z) = Z of the row as the one field X, which is the query, too. Where a network
    sees both sides (`joint`) it is mapped chunks, which serving keeps: the network selects among
    them by the user and the item (`of_query`) and aligns them (`chunk_extractor.aligned`).

    Attributes:
      fields: how many slots each field of the text has; S together.
      joint: whether a network goes on from mapped chunks.
    """

    fields: tuple[int, ...] = ()
    joint: bool = False

    @property
    def slots(self) -> int:
        """S."""
        return sum(self.fields)

    @property
    def stored(self) -> TableSpec:
        """How vectors lie in a table: of each slot Z numbers, then 1 (0 where it is empty)."""
        return TableSpec(self.rows, self.slots * (self.vectors + 1), 0.0)

    @property
    def spec(self) -> TableSpec:
        width = self.slots * (self.width + 1) if self.joint else self.width
        return TableSpec(self.rows, width, self.init_std)

    @property
    def penalised(self) -> bool:
        """No: mapped chunks have one length, and Z is another for every query."""
        return False

    def init(self, key: jax.Array) -> dict[str, Any]:
        query = self.width * (2 if self.joint else 1)
        return chunk_extractor.init_selection(
            key, vectors=self.vectors, width=self.width, query=query, hidden=self.hidden
        )

    def init_shared(self, key: jax.Array) -> dict[str, Any]:
        return {"alignment": chunk_extractor.init_alignment(key, self.width)}

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... SZ"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... D"]:
        slots = stored.reshape(*stored.shape[:-1], self.slots, self.vectors + 1)
        chunks = chunk_extractor.mapped(params, slots)
        if self.joint:
            return chunks.reshape(*stored.shape[:-1], -1)
        assert row is not None, "an item that has no row has no query"
        assert shared is not None
        of_fields, present = chunk_extractor.selected(params, chunks, row, self.fields)
        x = row[..., None, :]
        return chunk_extractor.aligned(shared["alignment"], x, of_fields, present)[..., 0, :]

    def of_query(
        self,
        params: Mapping[str, Any],
        kept: Float[Array, "... SD"],
        query: Float[Array, "... Q"],
    ) -> tuple[Float[Array, "... F D"], Bool[Array, "... F"]]:
        """r_f of every field for a query, and which fields there are.

        Args:
          params: the side's.
          kept: what `apply` made of stored vectors.
          query: q.
        """
        chunks = kept.reshape(*kept.shape[:-1], self.slots, self.width + 1)
        return chunk_extractor.selected(params, chunks, query, self.fields)


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
        if not isinstance(backbone, Adapted) or side not in tables:
            raise ConfigError(
                f"--{side}_vectors: {type(backbone).__name__} has no rows of {side}s that vectors "
                "could be added to; drop it"
            )
        own = tables[side]
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
    """Every table that scoring reads: those that are trained, and what vectors come to."""
    made = {name: adapter.spec for name, adapter in of(backbone).items()}
    return {**made, **backbone.tables}


def made_of(
    backbone: Any,
    params: Mapping[str, Any],
    name: str,
    stored: Float[Array, "... Z1"],
    row: Float[Array, "... D"] | None = None,
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
    rows: Mapping[str, Float[Array, "... D"]],
    vectors: Mapping[str, Float[Array, "... Z1"]],
) -> dict[str, Float[Array, "... D"]]:
    """Rows by name, and to them, or in their place, what stored vectors of these names come to."""
    out = dict(rows)
    for name, stored in vectors.items():
        row = out.get(name)
        made = made_of(backbone, params, name, stored, row)
        out[name] = made if row is None else row + made
    return out
