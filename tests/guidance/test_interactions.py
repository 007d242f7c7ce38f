"""Pseudo-interactions in training: the loss, draws, edges, and what must not notice them."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import list_teachers
import numpy as np
import pytest
import worlds
from list_teachers import N_ITEMS, N_USERS, draws_of
from numpy.testing import assert_allclose, assert_array_equal

import slgr_jax
from slgr_jax.config import applies, make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import interactions
from slgr_jax.guidance.base import Scored, make_guidance
from slgr_jax.guidance.gating import Observed
from slgr_jax.mesh import make_layout
from slgr_jax.reports import gate_evaluation
from slgr_jax.sampling.arrays import PairFacts
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.preferences import Preferences
from slgr_jax.teacher.products import preferences
from slgr_jax.training import loop, restore, step
from slgr_jax.training.build import build
from slgr_jax.training.state import init_state

PLACES = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Lists of 6, 3 and no items (`t`), and pseudo-interactions with weights (`w`)."""
    path = tmp_path_factory.mktemp("interactions") / "d"
    dataset = list_teachers.listing_dataset(path)
    train, rng = dataset.positives(("train",)), np.random.default_rng(1)
    pairs = [
        (user, item)
        for user in range(N_USERS)
        for item in rng.choice(N_ITEMS, user % 8, replace=False)
        if item not in train.row(user)
    ]
    users, items = np.array(pairs).T
    weights = rng.integers(1, 9, len(pairs)) / 8
    worlds.teach(dataset, users, items, weights, name="w", score_kind="weight", unlisted="below")
    return dataset


def _experiment(dataset, workdir, **knobs):
    common = {"guidance": "interactions", "interactions_places": PLACES}
    return list_teachers.experiment(dataset, workdir, **common | knobs)


def _stated(dataset, name, places=0):
    """user -> [(item, weight)], the first places outside training, best first, in plain Python."""
    teacher, train = preferences.load(dataset, name), dataset.positives(("train",))
    stated = {}
    for user in range(dataset.n_users):
        rows = range(teacher.offsets[user], teacher.offsets[user + 1])
        named = [(-teacher.scores[r], int(teacher.items[r])) for r in rows]
        outside = [(i, -s) for s, i in sorted(named) if i not in set(train.row(user).tolist())]
        stated[user] = outside[: places or None]
    return stated


# ------------------------------------------------------------------------------------------- loss


def test_a_row_has_the_recommendation_loss():
    scores = np.array([[2.0, -1.0], [0.3, 0.4], [-3.0, 1.0]])
    taken, other = scores.T
    bpr = np.log1p(np.exp(-(taken - other)))
    of_taken, of_other = np.log1p(np.exp(-taken)), np.log1p(np.exp(other))
    expected = {
        ("bpr", False): bpr,
        ("softmax", False): -np.log(np.exp(taken) / np.exp(scores).sum(axis=1)),
        ("bce", False): (of_taken + of_other) / 2,
        ("bce", True): of_taken,
    }
    for (loss, rows), values in expected.items():
        got = interactions.row_loss(jnp.asarray(scores, jnp.float32), loss, rows=rows)
        assert_allclose(got, values, rtol=1e-5)


@pytest.mark.parametrize("knobs", [{"loss": "bpr"}, {"loss": "bce"}], ids=["bpr", "bce"])
def test_the_loss_is_alpha_times_weight_times_a_rows_loss(knobs):
    method = make_guidance(
        make_run("d", "w", guidance="interactions", teacher="t", gate="rule", **knobs)
    )
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(6, 2)), rng.random(6)
    cold, tail = rng.integers(0, 2, 6), rng.integers(0, 2, (6, 2))
    zeros, items = jnp.zeros(6), jnp.zeros((6, 2), jnp.int32)
    facts = PairFacts(
        zeros, jnp.zeros((6, 2)), jnp.asarray(cold, jnp.float32), jnp.asarray(tail, jnp.float32)
    )
    drawn = interactions.PseudoDraw(
        Preferences(Queries(items[:, 0]), items, zeros, facts), None, taken=jnp.asarray(weights)
    )
    given = jnp.asarray(scores, jnp.float32)
    added = method.loss(
        {},
        Scored(given, given[:, 0] - given[:, 1], lambda key, rate: given),
        drawn,
        Observed(1.0),
        worlds.one_device(),
        jax.random.key(0),
    )
    alpha = np.where((cold > 0) | tail.any(axis=1), 1.0, 0.0)
    assert 0 < alpha.sum() < 6
    taken, other = scores.T
    each = np.log1p(np.exp(-(taken - other)))
    if knobs["loss"] == "bce":
        each = (np.log1p(np.exp(-taken)) + np.log1p(np.exp(other))) / 2
    assert float(added.loss) == pytest.approx((alpha * weights * each).mean(), rel=1e-5)
    assert float(added.metrics["agreement"]) == pytest.approx((taken > other).mean())


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("teacher", ["t", "w"])
@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_each_stated_item_is_drawn_as_often_with_its_weight(dataset, tmp_path, teacher, kernels):
    if kernels == "native":
        worlds.need_native_kernels()
    experiment = _experiment(
        dataset, tmp_path, teacher=teacher, kernels=kernels, preferences_per_step=512
    )
    drawn = draws_of(experiment, steps=60)
    stated = _stated(dataset, teacher, places=PLACES if teacher == "t" else 0)
    weight_of = {
        (user, item): weight if teacher == "w" else 1.0
        for user, rows in stated.items()
        for item, weight in rows
    }
    users, items = drawn.pairs.queries.users.ravel(), drawn.pairs.items.reshape(-1, 2)
    counts = dict.fromkeys(weight_of, 0)
    train = dataset.positives(("train",))
    for user, (taken, other), weight in zip(users, items, drawn.taken.ravel(), strict=True):
        counts[user, taken] += 1
        assert weight == weight_of[user, taken]
        assert (user, other) not in weight_of
        assert other not in train.row(user)
    expected = users.size / len(counts)
    assert max(abs(n - expected) for n in counts.values()) < 5 * np.sqrt(expected)


def test_a_draw_is_a_function_of_seed_and_step(dataset, tmp_path):
    experiment = _experiment(dataset, tmp_path, teacher="w")
    keys = jax.random.split(jax.random.key(3), 5)

    @jax.jit
    def draw(keys):
        return step.draw_steps(experiment.trainer, keys, experiment.arrays)[1]

    together, alone = draw(keys), draw(keys[2:3])
    jax.tree.map(lambda a, b: assert_array_equal(a[2], b[0]), together, alone)


def test_eight_devices_equal_one(dataset, tmp_path, eight_devices):
    del eight_devices
    knobs = {
        "guidance": "interactions",
        "teacher": "w",
        "gate": "rule",
        "batch_size": 32,
        "dim": 8,
        "lambda": 2.0,
    }
    run = make_run(str(dataset.path), str(tmp_path), **knobs)
    states = []
    for layout in (worlds.one_device(), make_layout()):
        experiment = build(run, dataset, layout)
        run_steps = step.make_run_steps(experiment.trainer)
        key = layout.put(jax.random.key_data(jax.random.key(1)))
        state = init_state(experiment.trainer, 0)
        states.append(run_steps(state, experiment.arrays, key, layout.put(np.int32(3)))[:2])
    (one, sums), (eight, sums_of_eight) = states
    for name in one.tables:
        assert_allclose(eight.tables[name], one.tables[name], rtol=1e-3, atol=1e-5)
    for name in sums:
        assert float(sums_of_eight[name]) == pytest.approx(float(sums[name]), rel=1e-4)
    assert float(sums["guidance_loss"]) > 0


# ----------------------------------------------------------------------- what must not notice them


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_what_is_known_of_users_and_items_stays(dataset, tmp_path, negatives):
    """Popularity, cold and tail, negatives of triples: those of a run without them."""
    knobs = {"negatives": negatives, "backbone": "lightgcn"}
    with_them = _experiment(dataset, tmp_path, teacher="w", **knobs).arrays
    without = _experiment(
        dataset, tmp_path, teacher="", guidance="none", interactions_places=10, **knobs
    ).arrays
    jax.tree.map(assert_array_equal, with_them.interactions, without.interactions)
    jax.tree.map(assert_array_equal, with_them.context, without.context)


def test_as_edges_they_are_in_the_graph_alone(dataset, tmp_path):
    knobs = {"teacher": "w", "backbone": "lightgcn"}
    without = _experiment(dataset, tmp_path, **knobs).arrays
    arrays = _experiment(dataset, tmp_path, interactions_edges=True, **knobs).arrays
    jax.tree.map(assert_array_equal, arrays.interactions, without.interactions)
    graph, train = arrays.context.graph, dataset.positives(("train",))
    for user, rows in _stated(dataset, "w").items():
        row = graph.items[graph.user_offsets[user] : graph.user_offsets[user + 1]]
        expected = sorted([*train.row(user).tolist(), *(item for item, _ in rows)])
        assert row.tolist() == expected
    assert graph.users.shape == graph.items.shape
    assert graph.items.shape != without.context.graph.items.shape


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("backbone", "knobs"),
    [
        ("mf", {"loss": "bpr"}),
        ("lightgcn", {"interactions_edges": True}),
        ("deepfm", {"mlp": (8,), "max_history": 3}),
    ],
    ids=["mf", "lightgcn", "deepfm"],
)
def test_every_kind_of_backbone_learns_them(dataset, tmp_path, backbone, knobs):
    experiment = _experiment(
        dataset, tmp_path, teacher="w", backbone=backbone, dropout=0.0, l2=0.0,
        **knobs | {"lambda": 5.0},
    )  # fmt: skip
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(experiment.trainer, 0), []
    for steps in (2, 100):  # before anything is learned; while it is, and after
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(steps))
        losses.append(float(sums["guidance_loss"]) / steps)
        assert int(health.step) == -1
    assert losses[-1] < losses[0]
    assert float(sums["agreement"]) / steps > 0.6


def test_a_run_with_edges_is_served_as_it_was_trained(dataset, tmp_path, monkeypatch):
    """Its best state needs no product; its last one needs that of its graph."""

    def listed(items):
        users = np.repeat(np.arange(N_USERS), len(items))
        of_users = np.tile(items, N_USERS)
        scores = np.tile([1.0, 2.0], N_USERS)  # the second comes first
        worlds.teach(dataset, users, of_users, scores, name="e", unlisted="below")

    listed([6, 7])
    run = make_run(
        str(dataset.path), str(tmp_path / "run"), guidance="interactions", teacher="e",
        backbone="lightgcn", interactions_edges=True, interactions_places=1, batch_size=64, dim=8,
        epochs=1,
    )  # fmt: skip
    loop.train(run)
    scores = []
    for which in ("best", "last"):
        restored = restore.restore_run(run.workdir, which)
        scored = restored.score_users(restored.scoring("test"), jnp.arange(N_USERS))
        scores.append(np.asarray(scored))
    assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-7)  # one epoch: the last is the best

    # The gate's report asks about what was learned: one place of each list.
    asked = []
    monkeypatch.setattr(gate_evaluation, "draw", lambda run, teacher, part: asked.append(teacher))
    assert gate_evaluation.evaluate_gate(slgr_jax.load(run.workdir)) is None
    assert asked[0].items.tolist() == [row[0][0] for row in _stated(dataset, "e").values() if row]

    shutil.rmtree(preferences.product_path(dataset.path, "e"))
    listed([6, 8])
    restore.restore_run(run.workdir, "best")
    with pytest.raises(ConfigError, match="has other interactions now than the graph was trained"):
        restore.restore_run(run.workdir, "last")


# --------------------------------------------------------------------------------------- refusals


def test_products_that_state_no_interactions_are_refused(dataset, tmp_path):
    users, items = np.array([0, 0, 1]), np.array([1, 2, 3])
    scores = np.array([0.5, 2.0, 1.0])
    worlds.teach(dataset, users, items, scores, name="asked")
    worlds.teach(dataset, users, items, scores, name="heavy", score_kind="weight", unlisted="below")
    train = dataset.positives(("train",))
    owners = train.owners()[:3]
    worlds.teach(dataset, owners, train.indices[:3], np.ones(3), name="echo", unlisted="below")
    for name, said in (
        ("asked", "unlisted=unknown.*slgr teach interactions --lists=asked"),
        ("heavy", "has weights from 0.5 to 2; they must be above 0 and up to 1"),
        ("echo", "names nothing outside its users' own training items"),
    ):
        with pytest.raises(InputError, match=said):
            _experiment(dataset, tmp_path, teacher=name)


def test_knobs_that_do_nothing_are_refused():
    common = {"guidance": "interactions", "teacher": "t"}
    run = make_run("d", "w", **common, interactions_edges=True)
    with pytest.raises(ConfigError, match="interactions_edges=True is not used with --backbone=mf"):
        applies.check_used(run, ["interactions_edges"])
    for name in ("unlisted_share", "min_gap"):
        run = make_run("d", "w", **common, **{name: 0.5})
        with pytest.raises(ConfigError, match=f"{name}=0.5 is not used with --guidance=interact"):
            applies.check_used(run, [name])
    with pytest.raises(ConfigError, match="interactions_places=3 is not used with --guidance=kd"):
        make_run("d", "w", guidance="kd", teacher="t", interactions_places=3)
