"""What guidances have in common that align a recommender's vectors with those of a product.

A step draws G training interactions, and to each an item that the user does not have: G lanes of a
user, an item and another item, each with the vector e that the recommender scores with and the
vector z that the product (--teacher_vectors) has of it. A subclass states what each lane adds:

    L = 3 / n sum over the lanes of alpha sum over its three of l(e, z),   n of them have a vector

so that with a vector for everything it is the sum over users, items and other items of the mean of
each (ctrl.py contrasts a lane's two rows instead, llmemb_rat.py and pad_mmd.py are of its item
alone). alpha = 1 (--gate=constant, the default of these guidances) is the method as published; any
other gate believes each lane by itself: alpha is its word on the preference (item, other item), of
which the product's margin is cos(z_u, z_i) - cos(z_u, z_j). A supervised gate learns how often such
margins are right on validation items. What has no vector counts nothing.

Vectors are stored as float16, whole on every device, and looked up by lane: no step costs O(users)
or O(items). Backbones without vectors of their own (click models) are refused, but by ctrl.py.

Shape letters: G lanes, N of all devices, E width of the recommender's vectors, Z of the product's,
R users or items, S steps drawn at once; the axis of length 3 is (user, item, other item).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import check_fits
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import teacher_product, vector_teacher
from slgr_jax.guidance.base import METHOD, Frozen, GuidanceLoss, Scored, Sources
from slgr_jax.guidance.gated import Gated
from slgr_jax.guidance.gating import GateArrays, Observed
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone, DotBackbone
from slgr_jax.models.backbones.adapters import row_specs
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.arrays import Interactions, host_array
from slgr_jax.sampling.context import Histories, Queries
from slgr_jax.sampling.labelled_preferences import LabelledPreferences
from slgr_jax.sampling.negatives import Generators, below, draw_outside
from slgr_jax.sampling.preferences import Preferences, at_the_end_of_training, pair_facts
from slgr_jax.sampling.teacher_arrays import TeacherLists
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors

_ROWS_AT_ONCE = 1 << 14
_NO_COSINE = -1e30


@struct.dataclass
class SideVectors:
    """Vectors of users, or of items.

    Attributes:
      values: [R, Z] float16.
      has: [R] which rows have one; the others are zero.
    """

    values: Float[Array, "R Z"]
    has: Bool[Array, "R"]

    def of(self, ids: Int[Array, "*N"]) -> tuple[Float[Array, "*N Z"], Float[Array, "*N"]]:
        """float32 vectors, and 1 where there is one."""
        return self.values[ids].astype(jnp.float32), self.has[ids].astype(jnp.float32)


@struct.dataclass
class AlignmentArrays:
    """The product's vectors, and what the gate learns from.

    Attributes:
      teacher: cosines of users with some items, which label preferences; None without a gate that
        is taught.
      margin_scale: a typical difference of cosines.
      width: E.
    """

    users: SideVectors
    items: SideVectors
    gate: GateArrays
    teacher: TeacherLists | None
    margin_scale: float = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)


@struct.dataclass
class AlignmentDraw:
    """Lanes: [S, G] of S steps, [G] of one.

    Attributes:
      queries: [G]; items: [G, 2] (item, other item).
      drawn: [G] 0 where the user has every item, so that the other is none.
      pairs: the same without margins, which `observe` looks up.
    """

    queries: Queries
    items: Int[Array, "*G 2"]
    drawn: Float[Array, "*G"]
    pairs: Preferences
    labelled: LabelledPreferences | None


@struct.dataclass
class AlignmentObserved(Observed):
    """What a gate is told, and the product's vectors.

    Attributes:
      vectors: z of each lane.
      has: 1 where there is one.
      width: E.
    """

    vectors: Float[Array, "G 3 Z"] | None = None
    has: Float[Array, "G 3"] | None = None
    width: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Lanes:
    """One step's lanes, on this device.

    Attributes:
      ids: [G, 3] of the user and of both items.
      student: e; teacher: z.
      has: [G, 3] 1 where there is a z.
      weights: [G, 3] alpha, 0 where there is no z.
      rows: what its item's e is made of: its row, with what its vector comes to.
      others, known: e of other users of each lane, and 1 where there is one; of a method that has
        any (`Alignment.with_others`).
    """

    ids: Int[Array, "G 3"]
    student: Float[Array, "G 3 E"]
    teacher: Float[Array, "G 3 Z"]
    has: Float[Array, "G 3"]
    weights: Float[Array, "G 3"]
    rows: Float[Array, "G D"] | None = None
    others: Float[Array, "G N E"] | None = None
    known: Float[Array, "G N"] | None = None


class Perceptron(nn.Module):
    """One hidden layer with a leaky ReLU; a linear map without one.

    Attributes:
      hidden: its width; 0: none.
      outputs: width of what comes out.
    """

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*N A"]) -> Float[Array, "*N B"]:
        if self.hidden:
            x = nn.leaky_relu(nn.Dense(self.hidden)(x))
        return jnp.asarray(nn.Dense(self.outputs)(x))


class Alignment(Gated):
    """The shared half of a guidance of vectors; a subclass has `init_method` and `lane_losses`.

    Attributes:
      users_optional: whether items' vectors are enough.
      standardised: whether users' and items' vectors are less the mean of each and divided by one
        number each; without, by one number for both, as they lie in one space.
      scaled: whether they are divided by anything.
    """

    queries_knob = "--aligned_per_step"
    reads_vectors = True
    width = 2
    standardised = True
    scaled = True
    users_optional = False

    def init_method(self, key: jax.Array, width: int, vectors: int) -> dict[str, Any]:
        """The method's own parameters.

        Args:
          width: E.
          vectors: Z.
        """
        raise NotImplementedError

    def lane_losses(
        self, params: Mapping[str, Any], lanes: Lanes, layout: Layout, key: jax.Array
    ) -> Float[Array, "G"]:
        """What each lane adds to the loss, so that the mean over all devices' lanes is L.

        Args:
          params: the method's own.
        """
        raise NotImplementedError

    def with_others(
        self, lanes: Lanes, others: Float[Array, "G N E"], drawn: AlignmentDraw
    ) -> Lanes:
        """The lanes with e of what `candidates` has behind each: nothing, for most methods."""
        return lanes

    @property
    def queries(self) -> int:
        return self.run.aligned_per_step

    def arrays(self, sources: Sources) -> tuple[AlignmentArrays, Csr | None]:
        run, dataset = sources.run, sources.dataset
        self.check(sources.backbone)
        product = embeddings.load(
            dataset, run.guidance.teacher_vectors, verify=run.train.verify_checksums
        )
        users, items = self._prepared(dataset, product)
        teacher: TeacherLists | None = None
        gate, scale = GateArrays(None, ()), 1.0
        if run.gate_is_taught or self.gating.reference_backbones:
            teacher = teacher_product.teacher_arrays(sources)  # type: ignore[assignment]
            assert isinstance(teacher, TeacherLists)
            gate, _ = self.gating.arrays(sources, teacher)
            scale = teacher.margin_scale
        width = self.student_width(sources.backbone)
        return AlignmentArrays(users, items, gate, teacher, scale, width), None

    def student_width(self, backbone: AnyBackbone) -> int:
        """E."""
        return vector_width(backbone)

    def check(self, backbone: AnyBackbone) -> None:
        """Refuse a backbone that the method makes no sense for."""
        name = self.run.model.backbone
        check_fits(self.run.guidance.guidance, name)
        if not isinstance(backbone, DotBackbone) or "item" not in row_specs(backbone):
            raise ConfigError(
                f"--guidance={self.run.guidance.guidance} aligns the vectors that scores are "
                f"products of, and --backbone={name} has none of items; use one of mf, lightgcn, "
                "sasrec, gru4rec, bert4rec"
            )

    def _prepared(
        self, dataset: Dataset, product: embeddings.Embeddings
    ) -> tuple[SideVectors, SideVectors]:
        """Users' and items' vectors as host arrays.

        Raises:
          InputError: those with training interactions are all alike.
        """
        name = product.manifest.name
        taught = self.run.gate_is_taught or bool(self.gating.reference_backbones)
        if self.users_optional and taught and not product.users.has.any():
            raise ConfigError(
                f"--gate={self.run.gate.gate} is told of cosines of users and items, and "
                f"--teacher_vectors={name} has no vectors of users; add some (slgr teach embed "
                "--user_vectors), or use --gate=constant, rule or budget"
            )
        counts = (dataset.history, dataset.popularity)
        sides = (product.users, product.items)
        trained = [of_side.has & (count > 0) for of_side, count in zip(sides, counts, strict=True)]
        moments = [
            _moments(of_side.values, rows) for of_side, rows in zip(sides, trained, strict=True)
        ]
        for side, rows, (_, variance) in zip(("users", "items"), trained, moments, strict=True):
            if not variance > 0 and not (self.users_optional and not product.users.has.any()):
                raise InputError(
                    f"--teacher_vectors={name}: {rows.sum()} {side} with training interactions "
                    "have a vector, and all of these are alike; make vectors that tell them apart"
                )
        if not self.scaled:
            return _side(product.users, 0.0, 1.0), _side(product.items, 0.0, 1.0)
        if self.standardised:
            return tuple(  # type: ignore[return-value]
                _side(of_side, mean, float(np.sqrt(variance)) or 1.0)
                for of_side, (mean, variance) in zip(sides, moments, strict=True)
            )
        squares = [variance + np.square(mean).mean() for mean, variance in moments]
        return tuple(_side(of_side, 0.0, np.sqrt(np.mean(squares))) for of_side in sides)  # type: ignore[return-value]

    def init(self, key: jax.Array, backbone: AnyBackbone) -> dict[str, Any]:
        for_gate, for_method = jax.random.split(key)
        vectors = embeddings.width_of(self.run.data, self.run.guidance.teacher_vectors)
        method = self.init_method(for_method, self.student_width(backbone), vectors)
        return {**self.gating.init(for_gate), METHOD: method}

    def lanes(
        self, words_of: Generators, interactions: Interactions
    ) -> tuple[Int[Array, "S G"], Int[Array, "S G 2"], Float[Array, "S G"]]:
        """Users, their item and another, and whether there is another."""
        words = random_bits.words(words_of.own, 2, self.queries)
        at = below(words[0], interactions.users.shape[0])
        users = interactions.users[at]
        others, drawn = draw_outside(
            words[1], users, interactions.negatives, interactions.cumulative, native=self.native
        )
        items = jnp.stack([interactions.items[at], others.astype(jnp.int32)], axis=-1)
        return users, items, drawn

    def draw(
        self,
        words_of: Generators,
        arrays: AlignmentArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> AlignmentDraw:
        users, items, drawn = self.lanes(words_of, interactions)
        queries = at_the_end_of_training(users, histories)
        facts = pair_facts(interactions.facts, users, items, native=self.native)
        labelled = None
        if arrays.teacher is not None:
            labelled = self.gating.draw(
                words_of.third,
                arrays.gate,
                arrays.teacher,
                interactions.facts,
                histories,
                self.rule,
            )
        pairs = Preferences(queries, items, jnp.zeros_like(drawn), facts)
        return AlignmentDraw(queries, items, drawn, pairs, labelled)

    def candidates(self, drawn: AlignmentDraw) -> Candidates:
        return Candidates(drawn.queries, drawn.items)

    def observe(
        self, frozen: Frozen, drawn: AlignmentDraw, arrays: AlignmentArrays, key: jax.Array
    ) -> AlignmentObserved:
        of_users, has_user = arrays.users.of(drawn.queries.users)
        of_items, has_item = arrays.items.of(drawn.items)
        has = jnp.concatenate([has_user[:, None], has_item], axis=1)
        has = has.at[:, 2].multiply(drawn.drawn)
        seen = self.gating.observe(
            frozen, drawn.pairs, drawn.labelled, arrays.margin_scale, arrays.gate, key
        )
        vectors = jnp.concatenate([of_users[:, None], of_items], axis=1)
        return AlignmentObserved(**vars(seen), vectors=vectors, has=has, width=arrays.width)

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: AlignmentDraw,
        observed: AlignmentObserved,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        vectors = observed.vectors
        assert vectors is not None
        for_gate, for_method = jax.random.split(key)
        of_user, of_item, of_other = (vectors[:, side] for side in range(3))
        margins = vector_teacher.cosines(of_user, of_item)
        margins -= vector_teacher.cosines(of_user, of_other)
        pairs = drawn.pairs.replace(margins=margins)  # type: ignore[attr-defined]
        drawn = drawn.replace(pairs=pairs)  # type: ignore[attr-defined]
        asked = scored.scores.shape[0] // drawn.items.shape[0]  # queries of a lane, its user first
        scores = scored.scores[::asked]

        def stochastic(key: jax.Array, rate: float) -> Float[Array, "G 2"]:
            return scored.stochastic(key, rate)[::asked]

        alpha, _ = self.believe(params, scores, stochastic, drawn, observed, for_gate)

        losses = self.losses(params[METHOD], scored, drawn, observed, alpha, layout, for_method)
        agrees = jax.lax.stop_gradient(scores[:, 0] > scores[:, 1])
        return self.added(params, losses, alpha, agrees, drawn, observed, layout)

    def losses(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: AlignmentDraw,
        observed: AlignmentObserved,
        alpha: Float[Array, "G"],
        layout: Layout,
        key: jax.Array,
    ) -> Float[Array, "G"]:
        """What each lane adds to the loss: `lane_losses` of its user and items."""
        vectors, has, count = observed.vectors, observed.has, drawn.items.shape[0]
        assert scored.vectors is not None
        assert scored.item_rows is not None
        assert vectors is not None
        assert has is not None
        by_lane = (of_side.reshape(count, -1, *of_side.shape[1:]) for of_side in scored.vectors())
        states, items = (of_side[..., : observed.width] for of_side in by_lane)
        student = jnp.concatenate([states[:, :1], items[:, 0]], axis=1)
        ids = jnp.concatenate([drawn.queries.users[:, None], drawn.items], axis=1)
        made = scored.item_rows()["item"]
        rows = made.reshape(count, -1, *made.shape[1:])[:, 0, 0]
        lanes = Lanes(ids, student, vectors, has, alpha[:, None] * has, rows)
        lanes = self.with_others(lanes, states[:, 1:], drawn)
        return self.lane_losses(params, lanes, layout, key)


def info_nce(
    positive: Float[Array, "A"], cosines: Float[Array, "A N"], counted: Bool[Array, "A N"]
) -> Float[Array, "A"]:
    """-p + log(exp(p) + sum of exp(s) over what is `counted`)."""
    rest = jax.nn.logsumexp(jnp.where(counted, cosines, _NO_COSINE), axis=-1)
    return jnp.logaddexp(positive, rest) - positive


def mean_over_lanes(terms: Float[Array, "G 3"], lanes: Lanes, layout: Layout) -> Float[Array, "G"]:
    """What each lane adds to 3 / n sum of weight * term, n = how many have a vector."""
    count = layout.sum_over_all(jnp.sum(lanes.has))
    total = terms.shape[0] * layout.devices
    return jnp.sum(lanes.weights * terms, axis=1) * (3.0 * total / jnp.maximum(count, 1.0))


def first_of_each(ids: Int[Array, "N"], has: Float[Array, "N"]) -> Float[Array, "N"]:
    """1 for the first of each id that is there."""
    place = jnp.arange(ids.shape[0])
    before = (ids[:, None] == ids[None, :]) & (has[None, :] > 0) & (place[None, :] < place[:, None])
    return has * (1.0 - jnp.any(before, axis=1))


def vector_width(backbone: AnyBackbone) -> int:
    """E: numbers of the vectors that a backbone scores with, without an item's bias and the 1 that
    a user's vector has for it."""
    spec = row_specs(backbone)["item"]
    model = backbone.factor_model if isinstance(backbone, DotBackbone) else None
    return spec.width - 1 if model is not None and model.unit else spec.vector_width


def _moments(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean [Z] of some rows, and the mean squared distance of an entry from it."""
    count = max(int(rows.sum()), 1)
    blocks = [slice(begin, begin + _ROWS_AT_ONCE) for begin in range(0, rows.size, _ROWS_AT_ONCE)]
    mean = sum(values[block][rows[block]].sum(axis=0, dtype=np.float64) for block in blocks) / count
    squares = sum(float(np.square(values[block][rows[block]] - mean).sum()) for block in blocks)
    return np.asarray(mean), squares / (count * values.shape[1])


def _side(vectors: Vectors, mean: np.ndarray | float, scale: float) -> SideVectors:
    """(z - mean) / scale as host arrays."""
    out = np.zeros(vectors.values.shape, np.float16)
    for begin in range(0, len(out), _ROWS_AT_ONCE):
        block = slice(begin, begin + _ROWS_AT_ONCE)
        has = vectors.has[block, None]
        out[block] = np.where(has, (vectors.values[block] - mean) / scale, 0.0)
    return SideVectors(host_array(out, np.float16), host_array(vectors.has, bool))
