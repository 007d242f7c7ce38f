"""Features as fields of a click model: each against plain loops, in their places."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.data import features as features_lib
from slgr_jax.models.backbones.click import make_click
from slgr_jax.sampling.context import (
    Context,
    Histories,
    Queries,
    Sizes,
)
from slgr_jax.sampling.features import Features, make_slots

DIM = 4
EVERYBODY = np.ones(3, bool)
OF_USERS = [
    worlds.feature("job", "user", [["a"], [], ["b"]]),
    features_lib.numeric("age", "user", np.array([1.0, np.nan, 3.0]), EVERYBODY),
]
OF_ITEMS = [worlds.feature("tags", "item", [["x", "y"], ["y"], []])]
EVENTS = [[2, 0], [], [1]]  # of three users, over three items


class _Linear:
    """A network whose logit is sum_fd w_fd x_fd, so that a wrong field shows."""

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights

    def apply(self, variables, fields, dropout=None):
        return jnp.einsum("rfd,fd->r", fields, self._weights)


@pytest.mark.parametrize("history", [True, False])
def test_each_feature_is_a_field(history):
    (users, user_sizes), (items, item_sizes) = make_slots(OF_USERS, 9), make_slots(OF_ITEMS, 9)
    model = make_click(
        "dcn",
        sizes=Sizes(3, 3, longest_history=2, user_features=user_sizes, item_features=item_sizes),
        dim=DIM, length=2, init_std=1.0, dropout=0.0, history=history,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tables = {
        name: rng.normal(size=(spec.rows, spec.width)).astype(np.float32)
        for name, spec in model.tables.items()
    }
    assert {name: len(table) for name, table in tables.items()} == {
        "user": 3, "item": 3, "user_feature": 3 + 2, "item_feature": 3,
    }  # fmt: skip
    u, i, f, g = (tables[name] for name in ("user", "item", "user_feature", "item_feature"))
    z = 1.0  # mean 2, deviation 1
    job, age = [f[0], f[2], f[1]], [-z * f[3], f[4], z * f[3]]
    tags = [(g[0] + g[1]) / 2, g[1], g[2]]
    zero = np.zeros(DIM)

    def fields(user: int, item: int) -> np.ndarray:
        rows = [u[user], job[user], age[user]]
        if history:
            events = EVENTS[user]
            rows.append(np.mean([i[e] for e in events], axis=0) if events else zero)
            rows.append(np.mean([tags[e] for e in events], axis=0) if events else zero)
        return np.array([*rows, i[item], tags[item]])

    asked, candidates = np.array([0, 1, 2]), np.array([[0, 1], [2, 0], [1, 1]], np.int32)
    weights = rng.normal(size=(len(fields(0, 0)), DIM)).astype(np.float32)
    model._network = _Linear(weights)
    offsets = np.cumsum([0, *map(len, EVENTS)])
    flat = np.array([e for row in EVENTS for e in row])
    histories = Histories(*(jnp.asarray(x, jnp.int32) for x in (offsets, flat, np.diff(offsets))))
    context = Context(histories=histories, features=Features(users, items))
    queries = Queries(jnp.asarray(asked), jnp.asarray([len(EVENTS[x]) for x in asked]))
    ids = model.ids(context, queries, jnp.asarray(candidates))
    rows = {name: jnp.asarray(tables[name])[named] for name, named in ids.items()}
    scores = model.score({}, rows, context, queries, jnp.asarray(candidates))
    expected = [
        [(weights * fields(user, item)).sum() for item in row]
        for user, row in zip(asked, candidates, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
