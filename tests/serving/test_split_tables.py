"""Runs of --table_shards are served with the tables that training had: a block on each device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import serving
from slgr_jax.evaluation import device_scoring
from slgr_jax.evaluation.placement import Placement
from slgr_jax.training import run_directory

SHARDS = 2


def _with_shards(monkeypatch) -> None:
    """Runs have had table shards: their checkpoints are the same on any number of them."""
    read = run_directory.read_config

    def with_shards(workdir: str):
        run = read(workdir)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, table_shards=SHARDS))

    monkeypatch.setattr(run_directory, "read_config", with_shards)


def _ids(kind: str, indices) -> list[str]:
    return [f"{kind}{index}" for index in indices]


@pytest.mark.parametrize(
    "backbone", ["mf", "lightgcn", pytest.param("sasrec", marks=pytest.mark.slow)]
)
def test_a_run_is_ranked_over_blocks_of_items(trained, monkeypatch, backbone):
    """The numbers of whole tables; both checkpoints; nothing gathers a table."""
    workdir, asked = trained(backbone).workdir, _ids("u", [7, 3, 7, 0, 19])
    with worlds.runs_on(SHARDS):
        whole = serving.load(workdir)
        assert not whole.restored.split_items
        _with_shards(monkeypatch)
        run, last = (serving.load(workdir, which) for which in ("best", "last"))
    assert run.restored.split_items
    for name, known in whole.restored.serving.values.items():
        for rows in (run.restored.serving.values[name], last.restored.serving.values[name]):
            held = {part.data.shape[0] for part in rows.addressable_shards}
            assert held == {rows.shape[0] // SHARDS}, name
            # "last" of one epoch is "best".
            np.testing.assert_allclose(rows[: known.shape[0]], known, rtol=1e-6, atol=1e-7)

    lists, expected = (each.recommend(asked, 6, deny=["i4"]) for each in (run, whole))
    assert lists.items == expected.items
    np.testing.assert_allclose(lists.scores, expected.scores, rtol=1e-5)
    (got, _), (expected, _) = run.evaluate("test"), whole.evaluate("test")
    for name, metrics in expected.slices.items():
        assert got.slices[name] == pytest.approx(metrics, abs=1e-6), name
    pairs = asked, _ids("i", range(5))
    np.testing.assert_allclose(run.scores(*pairs), whole.scores(*pairs), rtol=1e-5, atol=1e-6)
    for left, right in zip(run.vectors(), whole.vectors(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)

    at = Placement(run.restored.mesh, None, 30)
    users = jax.device_put(np.zeros(8, np.int32), at.by_user)
    columns = run.restored.serving.values["item"].shape[0]
    program = device_scoring.score_chunk.lower(
        None,
        run.restored.scoring("test"),
        users,
        score_users=run.score_users,
        n_items=columns,
        at=at,
    )
    gathered = [x for x in program.compile().as_text().splitlines() if " all-gather(" in x]
    assert not [x for x in gathered if f"[{columns}," in x], "a whole table"
