"""Worlds to rank: scores known by heart, and what plain NumPy says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from slgr_jax.data.dataset import Csr
from slgr_jax.evaluation import device_ranking, full_ranking, ranking_metrics
from slgr_jax.mesh import Layout, UserShards, make_layout


def table(state: jax.Array, users: jax.Array) -> jax.Array:
    """A model that knows its scores by heart: state [U, I]."""
    return state[users]


def factors(state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
    return state[0][users] @ state[1].T


class Factors:
    """The same model, whose vectors may be asked for."""

    def queries(self, state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
        return state[0][users]

    def own_queries(self, state: Any, users: jax.Array, layout: Layout) -> jax.Array:
        raise NotImplementedError("no users are split here")

    def items(self, state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[1]

    def __call__(self, state: tuple[jax.Array, jax.Array], users: jax.Array) -> jax.Array:
        return factors(state, users)


by_vectors = Factors()


def device_rows(mask: np.ndarray) -> device_ranking.DeviceCsr:
    """The items of each user in a mask [U, I]."""
    csr = Csr.from_pairs(*np.nonzero(mask), mask.shape[0])
    indices = np.zeros(mask.size, np.int32)  # room for more than there is, as in use
    indices[: csr.indices.size] = csr.indices
    return device_ranking.DeviceCsr(*jax.device_put((csr.offsets.astype(np.int32), indices)))


def random_masks(
    rng: np.random.Generator, shape: tuple[int, int], *, seen: float, relevant: float
) -> tuple[np.ndarray, np.ndarray]:
    """[U, I] each, by shares of the items."""
    return rng.random(shape) < seen, rng.random(shape) < relevant


@dataclasses.dataclass(frozen=True)
class World:
    scores: np.ndarray  # [U, I]
    relevant: np.ndarray  # [U, I] bool
    masked: np.ndarray  # [U, I] bool

    @property
    def csr(self) -> tuple[Csr, Csr]:
        n = self.scores.shape[0]
        return tuple(Csr.from_pairs(*np.nonzero(m), n) for m in (self.relevant, self.masked))

    def rank(self, **options) -> ranking_metrics.Ranking:
        state = jax.device_put(self.scores)
        with jax.transfer_guard("disallow"):
            return full_ranking.rank(table, state, *self.csr, self.scores.shape[1], **options)


def make_world(seed: int, n_users: int, n_items: int, *, ties: bool, overlap: bool) -> World:
    """Random scores and masks; user 0 has nothing relevant, user 1 has seen everything."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_users, n_items)).astype(np.float32)
    if ties:
        scores = np.round(scores * 2) / 2
        scores[rng.random(scores.shape) < 0.1] = -0.0  # beside the 0.0 that rounding makes
    relevant = rng.random(scores.shape) < 0.1
    masked = rng.random(scores.shape) < 0.3
    relevant[0] = False
    relevant[1] &= overlap
    masked[1] = True
    relevant[2] = True  # more relevant items than any other user
    if not overlap:
        masked &= ~relevant
    return World(scores, relevant, masked)


def check(world: World, ranked: ranking_metrics.Ranking, k: int) -> None:
    """Every field of `found` against one user at a time in NumPy."""
    scores, row = world.scores, 0
    labels, values = [], []
    for u in range(scores.shape[0]):
        candidates = np.flatnonzero(~world.masked[u])
        order = candidates[np.lexsort((candidates, -scores[u, candidates]))]
        wanted = np.flatnonzero(world.relevant[u] & ~world.masked[u])
        if not wanted.size:
            assert u not in ranked.users
            continue
        assert ranked.users[row] == u
        pairs = slice(ranked.offsets[row], ranked.offsets[row + 1])
        others = scores[u, candidates[~world.relevant[u, candidates]]]
        place = {int(item): p + 1 for p, item in enumerate(order)}
        assert ranked.items[pairs].tolist() == wanted.tolist()
        assert ranked.ranks[pairs].tolist() == [place[i] for i in wanted]
        assert ranked.scores[pairs].tolist() == scores[u, wanted].tolist()
        assert ranked.greater[pairs].tolist() == [
            int((others > scores[u, i]).sum()) for i in wanted
        ]
        assert ranked.tied[pairs].tolist() == [int((others == scores[u, i]).sum()) for i in wanted]
        assert ranked.n_candidates[row] == candidates.size
        best = [*order[:k], *([-1] * (k - order.size))]
        assert ranked.top_items[row].tolist() == best
        labels.append(world.relevant[u, candidates])
        values.append(scores[u, candidates])
        row += 1
    assert row == ranked.users.size
    assert ranked.n_dropped == int((world.relevant & world.masked).sum())
    pooled = roc_auc_score(np.concatenate(labels), np.concatenate(values))
    assert ranked.pooled_auc == pytest.approx(pooled, abs=1e-12)


def split_by_user(world: World, devices: int) -> dict[str, object]:
    """The world's users dealt out to eight shards over devices: how `rank` is asked about them."""
    users = UserShards.deal(np.arange(world.scores.shape[0]) % 5, 8)
    layout = make_layout(devices=jax.devices()[:devices])
    rows = np.zeros((users.table_rows, world.scores.shape[1]), np.float32)
    rows[users.row] = world.scores
    mesh = layout.mesh if devices > 1 else None
    return {"state": jax.device_put(rows, layout.users_sharding), "mesh": mesh, "split": users}
