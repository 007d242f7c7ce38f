"""A mixture of experts over vectors (KAR) as fields of click models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose

from slgr_jax.config import make_run
from slgr_jax.config.applies import check_used
from slgr_jax.errors import ConfigError
from slgr_jax.experiments.arms import ARMS, VECTORS
from slgr_jax.models.backbones import vector_maps
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.row_access import Reads
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, step
from slgr_jax.training.state import init_state

USERS, ITEMS, Z = 20, 16, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True)
    rng = np.random.default_rng(0)
    for name, width in (("text", Z), ("wide", Z + 1)):
        items, users = (
            Vectors(rng.normal(size=(rows, width)).astype(np.float32), np.ones(rows, bool))
            for rows in (ITEMS, USERS)
        )
        embeddings.write(dataset, name, items, users, users_from="file")
    return dataset


def _experiment(data, **knobs):
    values = {"item_vectors": "text", "user_vectors": "text", "adapter_experts": 3, "dim": 4}
    values |= {"adapter_hidden": (6,), "event_vectors": False, "mlp": (8,), "batch_size": 16}
    values |= {"kernels": "xla", "init_std": 1.0, "max_history": 4, "backbone": "deepfm"}
    run = make_run(str(data.path), "w", **values | knobs)
    return build.build(run, data, worlds.one_device())


def _scores(experiment, state, users, items):
    trainer, context = experiment.trainer, experiment.arrays.context
    moments = None if context.histories is None else context.histories.trained[jnp.asarray(users)]
    candidates = Candidates(Queries(jnp.asarray(users), moments), jnp.asarray(items))
    reads = Reads({"x": candidates}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(state.params["backbone"], leaves, context, reads, None)
    return np.asarray(view.scores("x", None))


def test_outputs_are_those_of_plain_loops():
    """softmax(G z) over own and shared experts, a ReLU behind every layer, 0 without a vector."""
    expert = vector_maps.Experts("item", 1, Z, 4, (6,), 1.0, experts=3, shared=2)
    keys = jax.random.split(jax.random.key(0))
    own, shared = expert.init(keys[0]), expert.init_experts(keys[1], 2)
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(2, 7, Z + 1)).astype(np.float32)
    stored[..., -1] = rng.integers(0, 2, (2, 7))
    made = np.asarray(expert.apply(own, jnp.asarray(stored), shared))
    for place in np.ndindex(2, 7):
        z, has = stored[place][:-1].astype(np.float64), stored[place][-1]
        logits = z @ np.asarray(own["gate"], np.float64)
        weights = np.exp(logits) / np.exp(logits).sum()
        total = np.zeros(4)
        for e in range(5):
            of_expert, at = (own, e) if e < 3 else (shared, e - 3)
            x = z
            for layer in ("layer_0", "layer_1"):
                kernel, bias = (np.asarray(of_expert[layer][k])[at] for k in ("kernel", "bias"))
                x = np.maximum(x @ kernel + bias, 0)
            total += weights[e] * x
        assert_allclose(made[place], total * has, rtol=1e-4, atol=1e-6)
    apart = {tuple(np.asarray(own["layer_0"]["kernel"])[e].ravel()[:3]) for e in range(3)}
    assert len(apart) == 3


@pytest.mark.parametrize("backbone", ["deepfm", "din", "dcnv2"])
def test_the_field_is_of_the_candidate_alone_and_experts_learn_from_both_sides(data, backbone):
    experiment = _experiment(data, backbone=backbone)
    state = init_state(experiment.trainer, 0)
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    before = jax.tree.map(np.asarray, state.params["backbone"]["adapters"])
    assert set(before) == {"item_vector", "user_vector", "shared"}
    state, _, health = run_steps(state, experiment.arrays, key, jnp.int32(30))
    assert int(health.step) == -1
    after = state.params["backbone"]["adapters"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 0

    # An item's vector moves its own score; as an event of the user's history it moves nothing.
    user = 3
    row = data.positives(("train",)).row(user)
    other = next(i for i in range(ITEMS) if i not in row)
    users, items = np.array([user]), np.array([[other, row[-1]]], np.int32)
    first = _scores(experiment, state, users, items)
    table = experiment.arrays.context.vectors.item
    context = experiment.arrays.context
    changed = context.vectors.replace(item=table.at[row[-1]].set(0))
    arrays = experiment.arrays.replace(context=context.replace(vectors=changed))
    second = _scores(build.Experiment(
        experiment.config, data, experiment.trainer, arrays, {}), state, users, items)  # fmt: skip
    assert second[0, 0] == first[0, 0]
    assert second[0, 1] != first[0, 1]


def test_what_does_not_go_together_is_refused(data):
    with pytest.raises(ConfigError, match=r"--adapter_shared=2 experts .* have 5 and 6 numbers"):
        _experiment(data, user_vectors="wide")
    assert (
        "shared"
        not in init_state(
            _experiment(data, user_vectors="wide", adapter_shared=0).trainer, 0
        ).params["backbone"]["adapters"]
    )
    with pytest.raises(ConfigError, match=r"--noitem_rows leaves .* --noevent_vectors takes"):
        _experiment(data, item_rows=False)
    plain = {"backbone": "mf", "item_vectors": "text"}
    for knobs, text in (
        ({**plain, "event_vectors": False}, "--event_vectors=False is not used without a history"),
        ({**plain, "adapter_shared": 3}, "--adapter_shared=3 is not used without experts"),
        ({"adapter_experts": 5}, "--adapter_experts=5 is not used without vectors"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_used(make_run("d", "w", **knobs), list(knobs))


def test_the_arm_of_a_comparison_is_kar():
    knobs = {name: "v" if value == VECTORS else value for name, value in ARMS["kar"].items()}
    run = make_run("d", "w", backbone="dcnv2", **knobs)
    assert (run.vectors.adapter_experts, run.vectors.adapter_shared) == (5, 2)
    assert run.vectors.expert_hidden == (128,)
    assert run.vectors.products == {"item": "v", "user": "v"}
    assert not run.vectors.event_vectors
