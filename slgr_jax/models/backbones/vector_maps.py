"""The maps A(z) that make rows of frozen vectors; `adapters` says where rows are made of them.

Shape letters: Z numbers of a vector, D width of a row, S slots for vectors of a row, R rows, I
items, k neighbours of one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.models.backbones import chunk_extractor, semantic_neighbours
from slgr_jax.models.embedding_table import TableSpec

GATE = "gate"  # of an adapter's parameters, what weighs its output or its experts


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
        return self.mapped(params, x) * has

    def mapped(self, params: Mapping[str, Any], x: Float[Array, "... Z"]) -> Float[Array, "... D"]:
        """A(z) of vectors that are there."""
        for number in range(len(self.hidden) + 1):
            layer = params[f"layer_{number}"]
            x = jnp.dot(jax.nn.relu(x) if number else x, layer["kernel"])
            x = x + jnp.expand_dims(layer["bias"], tuple(range(x.ndim - 1)))
        return x

    @property
    def chunked(self) -> bool:
        """Whether a row has several vectors, so many numbers that all rows are read in blocks."""
        return False

    def widened(self, row: Float[Array, "... W"]) -> Float[Array, "... D"]:
        """A row as wide as what `apply` adds to it: most are."""
        return row

    def among(
        self,
        params: Mapping[str, Any],
        rows: Float[Array, "R D"],
        stored: Float[Array, "R Z1"],
        neighbours: Int[Array, "I k"] | None,
    ) -> Float[Array, "R D"]:
        """All rows, with what vectors come to, after they have read one another: most do not."""
        return rows


@dataclasses.dataclass(frozen=True)
class SecondView(Adapter):
    """[0 ; A(z)], which is added to [e ; 0]: an item's two views (`dual_view`), D numbers each."""

    @property
    def spec(self) -> TableSpec:
        return TableSpec(self.rows, 2 * self.width, self.init_std)

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z1"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... W"] | None = None,
    ) -> Float[Array, "... D"]:
        mapped = super().apply(params, stored, shared)
        return jnp.concatenate([jnp.zeros_like(mapped), mapped], axis=-1)

    def widened(self, row: Float[Array, "... W"]) -> Float[Array, "... D"]:
        return jnp.concatenate([row, jnp.zeros_like(row)], axis=-1)


@dataclasses.dataclass(frozen=True)
class UserVectors(Adapter):
    """A(z_s) of each vector s of a user, which states of histories take up (`user_fusion`).

    A row of what serving keeps is [A(z_s), h_s] of each of S slots, then g: h_s = 1 where there is
    a vector, g = 1 where there is any, times g(n) of `Adapter` where it is gated.

    Attributes:
      slots: S.
    """

    slots: int = 1

    @property
    def stored(self) -> TableSpec:
        """Of each slot Z numbers, then 1 (0 where it is empty); where it is gated log(1 + n)."""
        return TableSpec(self.rows, self.slots * (self.vectors + 1) + self.gated, 0.0)

    @property
    def spec(self) -> TableSpec:
        return TableSpec(self.rows, self.slots * (self.width + 1) + 1, self.init_std)

    @property
    def penalised(self) -> bool:
        """No: what they come to is no row, and a user has as many as slots are filled."""
        return False

    @property
    def chunked(self) -> bool:
        return self.slots > 1

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... SZ"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... SD"]:
        slots = self.slots * (self.vectors + 1)
        of_slots = stored[..., :slots].reshape(*stored.shape[:-1], self.slots, self.vectors + 1)
        z, has = of_slots[..., :-1], of_slots[..., -1:]
        weight = jnp.max(has[..., 0], axis=-1, keepdims=True)
        if self.gated:
            gate = params[GATE]
            weight = weight * jax.nn.sigmoid(gate["weight"] * stored[..., slots:] + gate["bias"])
        kept = jnp.concatenate([self.mapped(params, z) * has, has], axis=-1)
        return jnp.concatenate([kept.reshape(*stored.shape[:-1], -1), weight], axis=-1)


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
class Neighbourhood(Adapter):
    """h = 1/2 (e + ELU(W z)), of items then h' of h (`semantic_neighbours`): CoLaKG's fusion.

    A row without a vector stays e. What is added to a row is h - e; --l2 is on ELU(W z).
    """

    def init(self, key: jax.Array) -> dict[str, Any]:
        for_map, for_attention = jax.random.split(key)
        drawn = jax.random.normal(for_map, (self.vectors, self.width))
        params: dict[str, Any] = {"kernel": np.float32(self.init_std / np.sqrt(drawn.size)) * drawn}
        if self.side == "item":
            of_attention = semantic_neighbours.init_attention(for_attention, self.vectors)
            params["attention"] = of_attention
        return params

    def apply(
        self,
        params: Mapping[str, Any],
        stored: Float[Array, "... Z1"],
        shared: Mapping[str, Any] | None = None,
        row: Float[Array, "... D"] | None = None,
    ) -> Float[Array, "... D"]:
        z, has = stored[..., :-1], stored[..., -1:]
        mapped = jax.nn.elu(jnp.dot(z, params["kernel"]))
        return mapped * has if row is None else 0.5 * (mapped - row) * has

    def among(
        self,
        params: Mapping[str, Any],
        rows: Float[Array, "R D"],
        stored: Float[Array, "R Z1"],
        neighbours: Int[Array, "I k"] | None,
    ) -> Float[Array, "R D"]:
        if self.side != "item":
            return rows
        assert neighbours is not None, "training looks them up"
        count = neighbours.shape[0]  # rows that fill a table up are behind them
        of_attention, z = params["attention"], stored[:count, :-1]
        smoothed = semantic_neighbours.smoothed(of_attention, rows[:count], z, neighbours)
        return jnp.concatenate([smoothed, rows[count:]])


@dataclasses.dataclass(frozen=True)
class SideFeature(Adapter):
    """F = A(z), which a graph smooths beside the rows of its side: final = E + weight F' / |F'|.

    Nothing looks F up but the graph's backbone (`LightGCN.propagate`); serving keeps none of it.

    Attributes:
      weight: the length that each vector F' has where it is added.
    """

    weight: float = 0.0


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
    def chunked(self) -> bool:
        return True

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
