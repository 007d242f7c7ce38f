"""What a product says of how much its teacher knows: inputs of a gate beside the word itself.

    votes       how far the several answers on (user, item) agree, in [0, 1]: `products/votes.py`
    confidence  |2 p - 1| of an answer that is a probability p
    named       log(1 + in how many users' lists the item is), standardised over items: how popular
                it is in what the teacher has read, not in the log
    named_gap   named less the item's popularity in training, standardised likewise

An item that a user's list leaves out has votes and confidence 0. Everything is of the product
alone, which has seen training interactions only.

Shape letters: U users, I items, E entries of the lists that preferences are drawn from, N
preferences; the axis of length 2 is (preferred, other).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from slgr_jax.config import NAMED_INPUTS, WORD_INPUTS, RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, listing
from slgr_jax.kernels import cpu
from slgr_jax.sampling.arrays import host_array, standardised
from slgr_jax.sampling.teacher_arrays import TeacherLists, TeacherPairs
from slgr_jax.teacher.products import preferences, votes
from slgr_jax.teacher.products.rows import Teacher


@struct.dataclass
class Knowledge:
    """What the gate reads; None what it does not.

    Attributes:
      votes, confidence: of each entry of the lists.
      named: of each item.
    """

    votes: Float[Array, "E"] | None = None
    confidence: Float[Array, "E"] | None = None
    named: Float[Array, "I"] | None = None


@struct.dataclass
class PairKnowledge:
    """`Knowledge` of both items of N preferences; 0 what the gate does not read."""

    votes: Float[Array, "N 2"]
    confidence: Float[Array, "N 2"]
    named: Float[Array, "N 2"]


def arrays(
    run: RunConfig, dataset: Dataset, lists: TeacherLists | TeacherPairs, *, entries: bool
) -> Knowledge | None:
    """What a run's gate reads, as host arrays; None where it reads nothing of the kind.

    Args:
      lists: what preferences are drawn from (host arrays), hard negatives among them or not.
      entries: whether preferences say which entries they are of.

    Raises:
      ConfigError: the product, or the guidance, does not have it.
      ManifestError, ShardError: as `preferences.load`.
    """
    names = run.gate.knowledge_inputs
    if not names:
        return None
    teacher = _product(run, dataset)
    of_words = [name for name in names if name in WORD_INPUTS]
    if of_words and not entries:
        raise ConfigError(
            f"--gate_inputs={run.gate.gate_inputs}: --guidance={run.guidance.guidance} does not "
            f"say which entries its pairs are of, and {listing(of_words)} "
            f"{'are' if len(of_words) > 1 else 'is'} of entries; use --guidance=pairwise, or drop "
            f"{'them' if len(of_words) > 1 else 'it'}"
        )
    assert isinstance(lists, TeacherLists), "`_product` refuses stated pairs"
    counts = np.diff(np.asarray(lists.offsets))
    owners = np.repeat(np.arange(counts.size, dtype=np.int64), counts)
    keys = owners * dataset.n_items + np.asarray(lists.items)
    words = {name: _word(name, run, dataset, teacher, keys) for name in of_words}
    named = named_of(teacher, dataset.n_items) if set(names) & set(NAMED_INPUTS) else None
    return Knowledge(**words, named=named)


def of_pairs(
    run: RunConfig, dataset: Dataset, users: np.ndarray, items: np.ndarray
) -> PairKnowledge | None:
    """The same for preferences of a finished run, by user and item (host arrays).

    Args:
      users, items: [N], [N, 2].

    Raises:
      ConfigError, ManifestError, ShardError: as `arrays`.
    """
    names = run.gate.knowledge_inputs
    if not names:
        return None
    teacher = _product(run, dataset)
    keys = users.astype(np.int64)[:, None] * dataset.n_items + items
    none = np.zeros(items.shape, np.float32)
    words = {
        name: _word(name, run, dataset, teacher, keys) if name in names else none
        for name in WORD_INPUTS
    }
    named = none
    if set(names) & set(NAMED_INPUTS):
        named = np.asarray(named_of(teacher, dataset.n_items))[items]
    return PairKnowledge(**words, named=named)  # type: ignore[arg-type]


def at(
    knowledge: Knowledge | None,
    items: Int[Array, "N 2"],
    entries: Int[Array, "N 2"] | None,
    *,
    native: bool,
) -> PairKnowledge | None:
    """What is known of drawn preferences; None without anything to know."""
    if knowledge is None:
        return None

    def take(values: jax.Array, ids: jax.Array) -> jax.Array:
        return cpu.take(values, ids) if native else values[ids]

    none = jnp.zeros(items.shape, jnp.float32)

    def of_entries(values: jax.Array | None) -> jax.Array:
        if values is None:
            return none
        assert entries is not None, "a guidance that says it draws entries gives them"
        return jnp.where(entries >= 0, take(values, jnp.maximum(entries, 0)), 0.0)

    return PairKnowledge(
        votes=of_entries(knowledge.votes),
        confidence=of_entries(knowledge.confidence),
        named=none if knowledge.named is None else take(knowledge.named, items),
    )


def named_of(teacher: Teacher, n_items: int) -> Float[Array, "I"]:
    """`named` of every item (a host array)."""
    named: Float[Array, "I"] = standardised(np.bincount(teacher.items, minlength=n_items))
    return named


def _product(run: RunConfig, dataset: Dataset) -> Teacher:
    """The product, or why it has no such thing."""
    names, asked = run.gate.knowledge_inputs, f"--gate_inputs={run.gate.gate_inputs}"
    if not run.guidance.teacher:
        raise ConfigError(
            f"{asked}: {listing(names)} are of a teacher's lists, and --teacher_vectors has none; "
            "drop them"
        )
    teacher = preferences.load(dataset, run.guidance.teacher, verify=False)
    manifest = teacher.manifest
    if manifest.kind != "scores":
        raise ConfigError(
            f"{asked}: teacher {manifest.name} states pairs, and {listing(names)} are of scored "
            "items; drop them: what it says of its pairs is the input teacher"
        )
    if set(names) & set(NAMED_INPUTS) and manifest.unlisted != "below":
        raise ConfigError(
            f"{asked}: teacher {manifest.name} scored what it was asked about, and named no item "
            "of its own (unlisted=unknown); drop named and named_gap, or give free lists (slgr "
            "teach import --unlisted=below)"
        )
    if "confidence" in names:
        low, high = teacher.scores.min(initial=0.0), teacher.scores.max(initial=1.0)
        if manifest.score_kind != "prob" or low < 0 or high > 1:
            raise ConfigError(
                f"{asked}: the scores of teacher {manifest.name} ({manifest.score_kind}, from "
                f"{low:g} to {high:g}) are no probabilities; drop confidence, or ask with "
                "--prompt=pointwise (slgr teach import --score_kind=prob where they are)"
            )
    return teacher


def _word(
    name: str, run: RunConfig, dataset: Dataset, teacher: Teacher, keys: np.ndarray
) -> Float[Array, "..."]:
    """`votes` or `confidence` of pairs user * I + item; 0 where the product has no word."""
    if name == "votes":
        known, values = votes.load(dataset, run.guidance.teacher, verify=False)
    else:
        owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), np.diff(teacher.offsets))
        known = owners * dataset.n_items + teacher.items
        order = np.argsort(known, kind="stable")
        known, values = known[order], np.abs(2.0 * teacher.scores[order] - 1.0)
    if not known.size:
        return host_array(np.zeros(keys.shape), np.float32)
    place = np.minimum(np.searchsorted(known, keys), known.size - 1)
    word: Float[Array, "..."] = host_array(
        np.where(known[place] == keys, values[place], 0.0), np.float32
    )
    return word
