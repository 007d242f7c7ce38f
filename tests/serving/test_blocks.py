"""Users a block at a time: in the order asked for, whatever device has them."""

from __future__ import annotations

import numpy as np
import pytest
import worlds

from slgr_jax import serving
from slgr_jax.config import make_run
from slgr_jax.serving import blocks
from slgr_jax.training import loop

SIZE, DEVICES = 8, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> serving.TrainedRun:
    """Forty users, numbered by eight shards: ten on each of four devices, one behind the other."""
    folder = tmp_path_factory.mktemp("by_shard")
    world = worlds.dataset_by_shard(folder, 8)
    knobs = {"dim": 8, "batch_size": 32, "epochs": 1, "patience": 0, "user_shards": 8}
    with worlds.runs_on(1):
        loop.train(make_run(str(world.path), str(folder / "run"), **knobs))
    with worlds.runs_on(DEVICES):
        return serving.load(str(folder / "run"))


@pytest.mark.parametrize("in_turns", [False, True])
def test_blocks_come_in_order_and_are_as_many_of_each_device(run, tmp_path, in_turns):
    users = np.arange(40, dtype=np.int32)
    if in_turns:
        users = users.reshape(DEVICES, -1).T.reshape(-1)
    asked: list[np.ndarray] = []

    def of_users(some: np.ndarray) -> tuple[np.ndarray, ...]:
        asked.append(some)
        return np.stack([some, -some], axis=1), some / 2

    came = list(blocks.in_order(run, users, SIZE, of_users, tmp_path / "out.csv"))
    assert [places for places, _ in came] == [slice(at, at + SIZE) for at in range(0, 40, SIZE)]
    for at, expected in enumerate((np.stack([users, -users], axis=1), users / 2)):
        np.testing.assert_array_equal(
            np.concatenate([columns[at] for _, columns in came]), expected
        )
    of_blocks = [np.bincount(run.restored.device_of(some), minlength=DEVICES) for some in asked]
    assert [of_block.max() for of_block in of_blocks] == [2] * 5
    if in_turns:  # then they are taken as they are
        np.testing.assert_array_equal(np.concatenate(asked), users)
    assert not list(tmp_path.iterdir()), "files between are gone"


def test_where_any_device_has_all_users_blocks_are_as_they_are_asked_for(run, tmp_path):
    with worlds.runs_on(3):  # which do not divide the shards
        whole = serving.load(run.workdir)
    users = np.arange(40, dtype=np.int32)
    came = list(blocks.in_order(whole, users, 30, lambda some: (some + 1,), tmp_path / "out"))
    assert [len(columns[0]) for _, columns in came] == [30, 10]
    np.testing.assert_array_equal(np.concatenate([x[0] for _, x in came]), users + 1)
