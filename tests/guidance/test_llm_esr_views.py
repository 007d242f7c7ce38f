"""LLM-ESR's term between an item's two views: plain numpy, its gradient, refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import alignment, llm_esr
from slgr_jax.guidance.base import make_guidance
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training.build import build

USERS, ITEMS, Z, D, LANES, SHARE = 12, 10, 5, 4, 6, 0.3
NO_TEXT = 2  # a lane whose item has none


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("views") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, timed=True, per_user=4)
    rng = np.random.default_rng(0)
    sides = (
        Vectors(rng.normal(size=(rows, Z)).astype(np.float32), np.ones(rows, bool))
        for rows in (ITEMS, USERS)
    )
    embeddings.write(dataset, "text", *sides, users_from="file")
    return dataset


def _run(data: Dataset, **knobs: Any) -> config.RunConfig:
    values = {"backbone": "sasrec", "dim": D, "guidance": "llm_esr", "teacher_vectors": "text"}
    values |= {"item_vectors": "text", "dual_view": True, "llm_esr_views": SHARE}
    return make_run(str(data.path), "w", **values | knobs)


def _lanes() -> alignment.Lanes:
    rng = np.random.default_rng(1)
    has = np.ones((LANES, 3), np.float32)
    has[NO_TEXT, 1] = 0

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return alignment.Lanes(
        ids=jnp.asarray(rng.integers(0, ITEMS, (LANES, 3)), jnp.int32),
        student=drawn(LANES, 3, 2 * D),
        teacher=drawn(LANES, 3, Z),
        has=jnp.asarray(has),
        weights=jnp.asarray(has * rng.random((LANES, 1)), jnp.float32),
        rows=drawn(LANES, 2 * D),
        others=drawn(LANES, 2, 2 * D),
        known=jnp.ones((LANES, 2)),
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _expected(rows: np.ndarray, alpha: np.ndarray) -> float:
    """Both cross-entropies of the items with a text, each weighed by its alpha."""
    kept = [lane for lane in range(LANES) if lane != NO_TEXT]
    own, text = np.split(rows[kept], 2, axis=1)
    target = _softmax((text @ text.T + own @ own.T) / 2)
    total = 0.0
    for scores, aim in ((text @ own.T, target), (own @ text.T, target.T)):
        total += 0.5 * -(aim * np.log(_softmax(scores))).sum(axis=1)
    return float((alpha[kept] * total).mean())


def _loss(data: Dataset, share: float, rows: jax.Array) -> jax.Array:
    method = make_guidance(_run(data, llm_esr_views=share))
    assert isinstance(method, llm_esr.SelfDistillation)
    lanes = _lanes().replace(rows=rows)
    return jnp.mean(method.lane_losses({}, lanes, worlds.one_device(), jax.random.key(0)))


def test_the_term_is_that_of_plain_numpy_and_reaches_both_views(data):
    lanes = _lanes()
    rows, alpha = np.asarray(lanes.rows, np.float64), np.asarray(lanes.weights)[:, 1]
    added = _loss(data, SHARE, lanes.rows) - _loss(data, 0.0, lanes.rows)
    assert float(added) == pytest.approx(SHARE * _expected(rows, alpha), rel=1e-4)

    gradient = np.asarray(jax.grad(lambda rows: _loss(data, SHARE, rows))(lanes.rows))
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=rows.shape)
        ends = [_expected(rows + sign * 1e-4 * direction, alpha) for sign in (1, -1)]
        slope = SHARE * (ends[0] - ends[1]) / 2e-4
        assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-3)
    assert (gradient[NO_TEXT] == 0).all()
    assert np.abs(gradient[[0, 1, 3, 4, 5]]).min(axis=0).max() > 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dual_view": False}, r"--llm_esr_views=0.3 contrasts two views .* --dual_view"),
        (
            {"teacher_vectors": "other"},
            r"=text come to, and --teacher_vectors=other names others",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        build(_run(data, **knobs), data, worlds.one_device())
