"""What a run proposes to ask about, against a sort of its scores."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.config import CandidateConfig, EvaluationConfig, TrainConfig
from slgr_jax.errors import ConfigError
from slgr_jax.training import hard_candidates, restore

U, I = 12, 30  # noqa: E741 - the letters of the code


def test_a_run_proposes_its_best_items_and_its_least_sure(monkeypatch, tmp_path):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(U, I)).astype(np.float32)
    owners = np.repeat(np.arange(U - 1), 5)  # the last user has no history
    items = np.concatenate([rng.permutation(I)[:5] for _ in range(U - 1)])
    pairs = np.stack([owners, items], axis=1)
    dataset = worlds.write_dataset(
        tmp_path / "d", pairs, pairs[:0], pairs[:0], n_users=U, n_items=I
    )
    trained = dataset.positives(("train",))
    run = types.SimpleNamespace(
        dataset=dataset,
        score_users=lambda state, users: state[jnp.maximum(users, 0)],
        scoring=lambda part: {"valid": jnp.asarray(scores)}[part],
        mesh=None,
        config=types.SimpleNamespace(evaluation=EvaluationConfig(), train=TrainConfig()),
    )
    monkeypatch.setattr(restore, "restore_run", lambda path: run)
    options = CandidateConfig(run="somewhere", hard_top=4, hard_uncertain=3)
    proposed = hard_candidates.propose(dataset, options)
    for user in range(U - 1):
        unseen = np.setdiff1d(np.arange(I), trained.row(user))
        best = unseen[np.argsort(-scores[user, unseen])[:4]]
        near = unseen[np.argsort(abs(scores[user, unseen]))[:3]]
        assert set(proposed["hard_top"].row(user)) == set(best)
        assert set(proposed["hard_uncertain"].row(user)) == set(near)
    assert not proposed["hard_top"].row(U - 1).size
    assert set(hard_candidates.propose(dataset, dataclasses.replace(options, hard_top=0))) == {
        "hard_uncertain"
    }

    other = dataclasses.replace(dataset.manifest, split_hash="0" * 64)
    run.dataset = dataclasses.replace(dataset, manifest=other)
    with pytest.raises(ConfigError, match=r"--run=somewhere was trained on .*split_hash 00000000"):
        hard_candidates.propose(dataset, options)
