"""Listwise softmax distillation: the divergence of two softmaxes over a teacher's list.

The recommender's half of LLMD4Rec (arXiv 2505.18120), L = w2 KL(softmax(z / T') || softmax(y / T))
with z the teacher's scores and y the recommender's. An LLM's scores end with its list, and a
softmax over the catalogue would cost a step O(items), so

    p_k     = (1 - tail) softmax_k(z / T')          of the K listed places
    Z       = sum_j exp(y_j / T) + n / L sum_l exp(y_l / T)
    q_k     = exp(y_k / T) / Z
    q_tail  = n / L sum_l exp(y_l / T) / Z
    KL      = sum_k p_k log(p_k / q_k) + tail log(tail / q_tail)

with l over L of the n items that are neither listed nor the user's, drawn uniformly: Z is unbiased
for the sum over these K and all that the list leaves out but the user's own. With tail = 0 (the
default) the second term is none, and the rest a cross-entropy with soft labels. A gate weighs the
terms of places; the tail's by the mean of its list.

--list_kl_sample_weights, LLMD4Rec's w2: one of the user's training interactions is drawn, r the
teacher's rank of it (its place; one past the list's end where it is not listed) and s the
recommender's (`lists.estimated_ranks`):

    w2 = min(2, s / r) where s > r, else max(0, 2 - r / s)

Needs: lists whose unlisted items rank below; sample weights, that they hold training items. Fits
every backbone. Costs: K + L candidates a list; with an even number of them, on the fast path of
dot products.

Shape letters: G lists, K listed items, L unlisted items, C candidates, S steps drawn at once, n
training interactions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from slgr_jax.config import ListKLConfig, RunConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError
from slgr_jax.guidance.base import Sources
from slgr_jax.guidance.gated import GatedArrays
from slgr_jax.guidance.gating import Gating
from slgr_jax.guidance.lists import NO_SCORE, ListArrays, ListDraw, ListGuidance, estimated_ranks
from slgr_jax.mesh import UserShards
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.sampling import random_bits, user_shards
from slgr_jax.sampling.arrays import Interactions, host_array
from slgr_jax.sampling.context import Histories, host32
from slgr_jax.sampling.negatives import Generators, below
from slgr_jax.sampling.teacher_arrays import TeacherLists


@struct.dataclass
class RankedInteractions:
    """The users' training interactions, and where the teacher ranks each.

    Attributes:
      offsets: [U + 1]; items: [n] sorted by user.
      ranks: [n] place in the user's list from 1 on; one past its end where it is not listed.
    """

    offsets: Int[Array, "U1"]
    items: Int[Array, "n"]
    ranks: Float[Array, "n"]


@struct.dataclass
class ListKLArrays(ListArrays):
    """`interactions` is None without sample weights."""

    interactions: RankedInteractions | None = None


@struct.dataclass
class ListKLDraw(ListDraw):
    """`teacher_ranks` [G] is that of the last candidate, an interaction of the user; 0 where the
    user has none. None without sample weights."""

    teacher_ranks: Float[Array, "*G"] | None = None


def divergence_terms(
    teacher_scores: Float[Array, "G K"],
    listed_scores: Float[Array, "G K"],
    listed: Bool[Array, "G K"],
    unlisted_scores: Float[Array, "G L"],
    unlisted: Int[Array, "G"],
    tail: float,
) -> Float[Array, "G K"]:
    """Whose sum over places is the KL of the module's docstring; the tail's term is shared among
    them equally. Scores are over their temperatures already."""
    log_p = jax.nn.log_softmax(jnp.where(listed, teacher_scores, NO_SCORE), axis=1)
    log_p += np.float32(np.log1p(-tail))
    scores = jnp.where(listed, listed_scores, NO_SCORE)
    log_share = jnp.log(jnp.maximum(unlisted, 1).astype(jnp.float32) / unlisted_scores.shape[1])
    log_others = log_share + jax.nn.logsumexp(unlisted_scores, axis=1)
    log_z = jnp.logaddexp(jax.nn.logsumexp(scores, axis=1), log_others)
    terms = jnp.exp(log_p) * (log_p - (scores - log_z[:, None]))
    if tail > 0:
        of_tail = tail * (np.float32(np.log(tail)) - (log_others - log_z))
        places = jnp.maximum(jnp.sum(listed, axis=1), 1)
        terms += (of_tail / places)[:, None]
    return jnp.where(listed, terms, 0.0)


def sample_weights(
    teacher_ranks: Float[Array, "G"], student_ranks: Float[Array, "G"]
) -> Float[Array, "G"]:
    """w2 of the module's docstring, in [0, 2]; 1 where the teacher's rank is 0 (unknown)."""
    r, s = jnp.maximum(teacher_ranks, 1.0), jnp.maximum(student_ranks, 1.0)
    weight = jnp.where(s > r, jnp.minimum(2.0, s / r), jnp.maximum(0.0, 2.0 - r / s))
    return jnp.where(teacher_ranks > 0, weight, 1.0)


class ListKL(ListGuidance):
    """See the module's docstring."""

    @property
    def knobs(self) -> ListKLConfig:
        """Its section."""
        return self.run.list_kl

    @property
    def interesting(self) -> int:
        return self.knobs.places

    @property
    def uninteresting(self) -> int:
        """With sample weights the last of --list_kl_samples candidates is the interaction."""
        return self.knobs.samples - self.knobs.sample_weights

    @property
    def width(self) -> int:
        return self.knobs.places + self.knobs.samples

    def arrays(self, sources: Sources) -> tuple[ListKLArrays, Csr | None]:
        arrays, left_out = super().arrays(sources)
        assert isinstance(arrays.teacher, TeacherLists)
        interactions = None
        if self.knobs.sample_weights:
            interactions = _ranked(arrays.teacher, sources)
        return ListKLArrays(**vars(arrays), interactions=interactions), left_out

    def deal(self, arrays: GatedArrays, shards: UserShards) -> ListKLArrays:
        dealt = super().deal(arrays, shards)
        assert isinstance(arrays, ListKLArrays)
        assert isinstance(dealt, ListKLArrays)
        ranked = arrays.interactions
        if ranked is None:
            return dealt
        by_user: Any = user_shards.ByUser(user_shards.owners_of(ranked.offsets), shards)
        own = RankedInteractions(
            by_user.bounds(), by_user.entries(ranked.items), by_user.entries(ranked.ranks)
        )
        return dataclasses.replace(dealt, interactions=own)

    def draw(
        self,
        words_of: Generators,
        arrays: ListArrays,
        interactions: Interactions,
        histories: Histories | None,
    ) -> ListKLDraw:
        assert isinstance(arrays, ListKLArrays)
        drawn, ranked = super().draw(words_of, arrays, interactions, histories), arrays.interactions
        if ranked is None:
            return ListKLDraw(**vars(drawn))
        words = random_bits.words(words_of.own, 1, self.queries)[0]
        users = drawn.queries.users
        start = ranked.offsets[users]
        count = ranked.offsets[users + 1] - start
        chosen = jnp.minimum(start + below(words, count), ranked.items.shape[0] - 1)
        items = jnp.concatenate([drawn.items, ranked.items[chosen][..., None]], axis=-1)
        ranks = jnp.where(count > 0, ranked.ranks[chosen], 0.0)
        return ListKLDraw(**(vars(drawn) | {"items": items}), teacher_ranks=ranks)

    def place_losses(self, scores: Float[Array, "G C"], drawn: ListDraw) -> Float[Array, "G K"]:
        assert isinstance(drawn, ListKLDraw)
        listed_scores, unlisted_scores = self.split(scores)
        terms = divergence_terms(
            drawn.targets / self.knobs.teacher_temperature,
            listed_scores / self.knobs.temperature,
            drawn.listed,
            unlisted_scores / self.knobs.temperature,
            drawn.unlisted,
            self.knobs.tail,
        )
        if drawn.teacher_ranks is not None:
            ranks = estimated_ranks(
                scores[:, -1:], listed_scores, drawn.listed, unlisted_scores, drawn.unlisted
            )
            terms *= sample_weights(drawn.teacher_ranks, ranks[:, 0])[:, None]
        return self.interesting * terms  # the mean over places is the sum of the method


def _ranked(teacher: TeacherLists, sources: Sources) -> RankedInteractions:
    """The teacher's ranks of what users have (host arrays).

    Raises:
      ConfigError: it lists none of it.
    """
    dataset = sources.dataset
    positives = dataset.positives(("train",))
    offsets, items = np.asarray(teacher.offsets, np.int64), np.asarray(teacher.items)
    owners = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    past_every_key = dataset.n_users * dataset.n_items  # so that a search finds one
    keys = np.append(owners * dataset.n_items + items, past_every_key)
    order = np.argsort(keys)
    wanted = positives.keys(dataset.n_items)
    nearest = order[np.searchsorted(keys, wanted, sorter=order)]
    has = keys[nearest] == wanted
    if not user_shards.total(int(has.sum()), dataset):
        raise ConfigError(
            "--list_kl_sample_weights compares ranks of what users have, and teacher "
            f"{sources.run.guidance.teacher} lists no training item; drop it, or use lists that "
            "hold them (slgr teach import --keep_training_items)"
        )
    ends = offsets[positives.owners() + 1]
    past_the_end = ends - offsets[positives.owners()] + 1
    return RankedInteractions(
        host32(positives.offsets),
        host32(positives.indices),
        host_array(np.where(has, ends - nearest, past_the_end), np.float32),
    )


def make(run: RunConfig, reference_backbones: tuple[AnyBackbone, ...], native: bool) -> ListKL:
    """The listwise softmax distillation of a run."""
    return ListKL(run, Gating(run, reference_backbones, native), native)
