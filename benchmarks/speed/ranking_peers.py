"""The world that `ranking.py` ranks, and another library's top-K lists of it, in its own process.

Needs NumPy, SciPy and the peer, and nothing of this project: see `turns`, whose unit is here a
user, not a triple.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time

import numpy as np
import turns
from turns import Contestant, Facts, Turn

WIDTH, TOP, BATCH = 64, 20, 1000


@dataclasses.dataclass(frozen=True)
class Size:
    """Users, items, how many of the users are ranked, and about how many items each has."""

    users: int
    items: int
    ranked: int
    seen: int
    relevant: int


SIZES = {
    "ml100k": Size(943, 1_682, 943, 85, 10),
    "large": Size(138_000, 27_000, 20_000, 100, 10),  # the users and items of MovieLens-20M
}


@dataclasses.dataclass(frozen=True)
class World:
    """Random factors, and pairs [n] of the ranked users; a pair may come twice."""

    factors: tuple[np.ndarray, np.ndarray]
    users: np.ndarray
    seen: tuple[np.ndarray, np.ndarray]
    relevant: tuple[np.ndarray, np.ndarray]


def make(size: Size, width: int = WIDTH) -> World:
    """The world of `size`, the same in every process."""
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(n, width)).astype(np.float32) for n in (size.users, size.items)]
    users = np.sort(rng.choice(size.users, size.ranked, replace=False)).astype(np.int32)
    seen, relevant = (
        (np.repeat(users, count), rng.integers(0, size.items, count * users.size))
        for count in (size.seen, size.relevant)
    )
    return World((factors[0], factors[1]), users, seen, relevant)


def prepare(job: Facts) -> Contestant:
    """implicit's `recommend` in batches, seen items left out."""
    try:
        import scipy.sparse
        from implicit.cpu.als import AlternatingLeastSquares
    except ImportError as error:
        raise turns.Refused(
            f"--peer=implicit cannot be imported ({error}); name an environment that has it "
            "with --peer_python=PYTHON"
        ) from error
    size = SIZES[job["size"]]
    world = make(size)
    seen = scipy.sparse.csr_matrix(
        (np.ones(world.seen[0].size, np.float32), world.seen), shape=(size.users, size.items)
    )
    model = AlternatingLeastSquares(factors=WIDTH)
    model.user_factors, model.item_factors = world.factors

    def turn() -> Turn:
        begin = time.perf_counter()
        for start in range(0, world.users.size, BATCH):
            users = world.users[start : start + BATCH]
            model.recommend(users, seen[users], N=TOP, filter_already_liked_items=True)
        return Turn(world.users.size, time.perf_counter() - begin)

    turn()
    return Contestant({"version": importlib.metadata.version("implicit")}, turn)


if __name__ == "__main__":
    turns.serve(prepare)
