"""Edits of training interactions: what is learned and looked up, and what must not notice them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose, assert_array_equal

import slgr_jax
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import make_layout
from slgr_jax.models.row_access import RowAccess
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling.negatives import generators
from slgr_jax.teacher.products import edits, preferences
from slgr_jax.training import objectives, restore, run_directory, step
from slgr_jax.training.build import build
from slgr_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("one_device")
N_USERS, N_ITEMS = 12, 30
KNOBS = {"edits": "n", "edit_threshold": 0.5, "edits_per_user": 2, "batch_size": 16, "dim": 8}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Random noise of half of the interactions, with and without replacements."""
    path = tmp_path_factory.mktemp("edited") / "d"
    dataset = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, ratings=True)
    _edit(dataset, "n", seed=0)
    return dataset


def _edit(dataset, name, seed, **more):
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(rng.random(len(dataset.train)) < 0.6)
    noise = (rng.permutation(rows.size) + 1) / (rows.size + 1)
    others = (dataset.train.items[rows] + rng.integers(1, N_ITEMS, rows.size)) % N_ITEMS
    replacements = np.where(rng.random(rows.size) < 0.6, others, -1)
    provenance = preferences.Provenance()
    edits.write(
        dataset, name, rows, noise.astype(np.float32), replacements, provenance=provenance, **more
    )


def _experiment(dataset, workdir, **knobs):
    run = make_run(str(dataset.path), str(workdir), **KNOBS | knobs)
    return build(run, restore.load_data(run), worlds.one_device())


def _learned(dataset, how, threshold=0.5, most=2):
    """user -> [(item, weight)] as learned, in plain Python."""
    held, train = edits.load(dataset, "n"), dataset.train
    out = {}
    for user in range(dataset.n_users):
        said = [
            (-float(held.noise[k]), int(held.rows[k]), int(held.replacements[k]))
            for k in range(held.rows.size)
            if train.users[held.rows[k]] == user and held.noise[k] > threshold
        ]
        edited = {row: (-noise, other) for noise, row, other in sorted(said)[: most or None]}
        events = []
        for row in np.flatnonzero(train.users == user).tolist():
            item, (noise, other) = int(train.items[row]), edited.get(row, (0.0, -1))
            if row in edited and how == "replace" and other >= 0:
                events.append((other, 1.0))
            elif row not in edited or how == "weigh":
                events.append((item, 1.0 - noise))
        out[user] = events
    return out


@pytest.mark.parametrize("how", ["replace", "delete", "weigh"])
@pytest.mark.parametrize("backbone", ["sasrec", "din", "mf"])
def test_what_is_learned_and_looked_up(dataset, tmp_path, how, backbone):
    experiment = _experiment(
        dataset, tmp_path / "r", edit_how=how, backbone=backbone, max_history=100
    )
    learned = _learned(dataset, how)
    assert sum(len(events) for events in learned.values()) < len(dataset.train) or how == "weigh"
    context, targets = experiment.arrays.context, experiment.arrays.interactions.targets
    if backbone != "mf":
        histories = jax.device_get(context.histories)
        for user, events in learned.items():
            row = slice(*histories.offsets[user : user + 2].tolist())
            own = dataset.valid.items[dataset.valid.users == user]
            expected = [item for item, _ in events]
            assert histories.items[row].tolist() == [*expected, *own.tolist()]
            assert histories.trained[user] == len(events)
            if how == "weigh":
                expected = [weight for _, weight in events]
                assert_allclose(histories.weights[row], [*expected, *np.ones(own.size)], rtol=1e-6)
        assert (histories.weights is None) == (how != "weigh")
    drawn = zip(targets.users.tolist(), targets.items.tolist(), strict=True)
    if backbone == "sasrec":  # one window a user: its last event
        assert list(drawn) == [(u, e[-1][0]) for u, e in learned.items() if len(e) > 1]
        assert targets.weights is None
        return
    assert list(drawn) == [(user, item) for user, events in learned.items() for item, _ in events]
    if how == "weigh":
        expected = [weight for events in learned.values() for _, weight in events]
        assert_allclose(targets.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["replace", "weigh"])
def test_batches_have_the_weights_and_no_replacement_as_a_negative(dataset, tmp_path, how):
    experiment = _experiment(dataset, tmp_path / "r", edit_how=how, batch_size=512)
    interactions, plan = experiment.arrays.interactions, experiment.trainer.plan
    keys = jax.random.split(jax.random.key(0), 8)
    draw = jax.jit(lambda keys: batch_lib.draw(generators(keys)[0], interactions, plan))
    batch = jax.device_get(draw(keys))
    learned, train = _learned(dataset, how), dataset.positives(("train",))
    weights = {(user, item): w for user, events in learned.items() for item, w in events}
    users, items = batch.queries.users.ravel(), batch.items.reshape(-1, 2)
    met = {}
    for user, (item, other), weight in zip(users, items, batch.weights.ravel(), strict=True):
        assert weight == pytest.approx(weights[user, item])
        taken = {*train.row(user).tolist(), *(i for i, _ in learned[user])}
        assert int(other) not in taken
        met.setdefault(int(user), set()).add(int(other))
        met[user] |= taken
    assert all(everything == set(range(N_ITEMS)) for everything in met.values())
    assert plan.every_negative == (how == "replace")


@pytest.mark.parametrize("backbone", ["sasrec", "gru4rec", "bert4rec"])
@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_each_place_of_a_window_has_its_targets_weight(dataset, tmp_path, backbone, loss):
    """The loss is linear in the weights, and the weight of an event is on the loss of it alone."""
    experiment = _experiment(
        dataset, tmp_path / "r", edit_how="weigh", backbone=backbone, loss=loss, max_history=4,
        edit_threshold=0.0, edits_per_user=0, mask_probability=0.5,
    )  # fmt: skip
    trainer, arrays = experiment.trainer, experiment.arrays
    state = init_state(trainer, 0)
    keys = jax.random.split(jax.random.key(1), 1)
    drawn = batch_lib.draw(generators(keys)[0], arrays.interactions, trainer.plan)
    batch = jax.tree.map(lambda x: x[0], drawn)
    params, key = state.params["backbone"], jax.random.key(2)
    access = trainer.access
    assert isinstance(access, RowAccess)

    @jax.jit
    def learn(weights):
        histories = arrays.context.histories.replace(weights=weights)
        context = arrays.context.replace(histories=histories)
        reads = trainer.objective.reads(batch, context, None)
        leaves = access.read(state.tables, context, reads)
        view = access.view(params, leaves, context, reads, None, {})
        inputs = objectives.Inputs(batch, context, arrays.interactions, params, 0.0, 1, key)
        learned = trainer.objective.learn(view, inputs)
        return learned.loss, learned.count

    histories = jax.device_get(arrays.context.histories)
    weights, trained = histories.weights, histories.trained
    alone = [learn(row) for row in jnp.eye(weights.size)]
    losses, counts = (np.array([float(x[at]) for x in alone]) for at in (0, 1))
    total, count = learn(jnp.asarray(weights))
    assert len(set(weights[weights < 1])) > 20
    assert float(total) == pytest.approx(float(losses @ weights), rel=1e-4)
    assert float(count) == pytest.approx(float(counts @ weights), rel=1e-5)

    # How often an event is predicted, by the windows that end at the drawn moments.
    predicted = np.zeros(weights.size)
    for user, as_of in zip(batch.queries.users.tolist(), batch.queries.as_of.tolist(), strict=True):
        begin = histories.offsets[user]
        window = np.arange(max(0, as_of - 4), as_of + 1)
        predicted[begin + (window[1:] if backbone != "bert4rec" else window[-4:])] += 1
        assert as_of < trained[user]
    if backbone == "bert4rec":  # a share of them is masked
        assert ((counts > 0) <= (predicted > 0)).all()
        assert counts.sum() > 0
    else:
        assert_array_equal(counts, predicted)


def test_nothing_but_learning_notices_edits(dataset, tmp_path):
    plain = _experiment(dataset, tmp_path / "a", backbone="sasrec", edits="", max_history=9,
                        edit_threshold=0.6)  # fmt: skip
    edited = _experiment(dataset, tmp_path / "b", backbone="sasrec", max_history=9)
    for a, b in zip(
        jax.tree.leaves(plain.arrays.interactions.facts),
        jax.tree.leaves(edited.arrays.interactions.facts),
        strict=True,
    ):
        assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(plain.validated), jax.tree.leaves(edited.validated), strict=True
    ):
        assert_array_equal(a, b)
    assert edited.arrays.context.histories.items.size < edited.validated.histories.items.size
    graphs = [
        _experiment(dataset, tmp_path / name, backbone="lightgcn", **knobs).arrays.context.graph
        for name, knobs in (("c", {}), ("d", {"edits": "", "edit_threshold": 0.6}))
    ]
    for a, b in zip(*map(jax.tree.leaves, graphs), strict=True):
        assert_array_equal(a, b)


def test_a_quantile_is_of_the_products_probabilities(dataset, tmp_path):
    noise = edits.load(dataset, "n").noise
    knobs = {"edit_how": "delete", "edits_per_user": 0, "edit_threshold": 0.9}
    experiment = _experiment(dataset, tmp_path / "r", edit_threshold_of="quantile", **knobs)
    gone = len(dataset.train) - experiment.arrays.interactions.targets.users.size
    assert noise.size == 41  # the quantile is the 37th of them
    assert gone == (noise > np.sort(noise)[36]).sum() == 4


def test_a_run_is_trained_recorded_refit_and_resumed_with_its_edits_alone(dataset, tmp_path):
    knobs = KNOBS | {"edit_how": "replace", "epochs": 2, "backbone": "sasrec", "max_history": 9}
    outcome = slgr_jax.train(dataset.path, tmp_path / "r", **knobs)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    learned, train = _learned(dataset, "replace"), dataset.train
    events = sum(map(len, learned.values()))
    assert record["interactions_deleted"] == len(train) - events > 0
    assert record["interactions_replaced"] > 0 == record["interactions_weighed"]
    assert record["edits"]["product"] == "n"
    slgr_jax.evaluate(tmp_path / "r")
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    validated = metrics["valid"]["overall"]["ndcg@10"]  # histories are the data's in both
    assert outcome.best_metric == pytest.approx(validated, rel=1e-5)
    assert slgr_jax.load(tmp_path / "r").recommend(["u0"], 3)

    # A refit edits the same interactions, wherever validation comes among them.
    slgr_jax.train(None, tmp_path / "f", refit=tmp_path / "r")
    run = run_directory.read_config(str(tmp_path / "f"))
    refit = build(run, restore.load_data(run), worlds.one_device())
    histories = jax.device_get(refit.arrays.context.histories)
    joined = restore.load_data(run).train
    assert (
        histories.items.size == events + len(dataset.valid) == len(joined) - (len(train) - events)
    )
    for user, kept in learned.items():
        row = histories.items[slice(*histories.offsets[user : user + 2].tolist())].tolist()
        own = dataset.valid.items[dataset.valid.users == user].tolist()
        assert sorted(row) == sorted([*(item for item, _ in kept), *own])

    _edit(dataset, "n", seed=1, overwrite=True)
    try:
        with pytest.raises(ConfigError, match="--edits: n holds other edits now"):
            slgr_jax.train(dataset.path, tmp_path / "r", **knobs | {"epochs": 3})
    finally:
        _edit(dataset, "n", seed=0, overwrite=True)
    slgr_jax.train(dataset.path, tmp_path / "r", **knobs | {"epochs": 3})


def test_several_devices_have_the_numbers_of_one(dataset, tmp_path):
    run = make_run(
        str(dataset.path), str(tmp_path / "r"), **KNOBS,
        edit_how="weigh", backbone="sasrec", max_history=4, dropout=0.0,
    )  # fmt: skip
    losses = []
    for layout in (worlds.one_device(), make_layout(devices=jax.devices()[:2])):
        experiment = build(run, dataset, layout)
        trainer = experiment.trainer
        program = step.make_run_steps(trainer)
        key = layout.put(jax.random.key_data(jax.random.key(1)))
        state = jax.jit(lambda: init_state(trainer, 0))()  # noqa: B023
        _, sums, _ = program(state, experiment.arrays, key, layout.put(np.int32(2)))
        losses.append({name: float(value) for name, value in sums.items()})
    assert losses[0]["triples"] != round(losses[0]["triples"])
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"edit_threshold": 1.0}, "edits nothing: no probability of noise is above 1"),
        ({"edits": "no"}, "has no edits 'no'; it has: n;"),
        ({"rating_threshold": 4.0, "loss": "bce"}, "use delete or weigh"),
        ({"negatives": "in_batch"}, "use uniform or popularity, or --edit_how=delete"),
        ({"user_shards": 4}, "--edits=n is of all users' histories"),
    ],
)
def test_what_does_not_go_together_is_refused(dataset, tmp_path, knobs, said):
    with pytest.raises(slgr_jax.errors.UserError, match=said):
        _experiment(dataset, tmp_path / "r", **knobs)


def test_everything_deleted_is_refused(dataset, tmp_path):
    rows = np.arange(len(dataset.train))
    noise, none = np.ones(rows.size, np.float32), np.full(rows.size, -1)
    edits.write(dataset, "all", rows, noise, none, provenance=preferences.Provenance())
    with pytest.raises(InputError, match=f"deletes all {rows.size} training interactions"):
        _experiment(dataset, tmp_path / "r", edits="all", edits_per_user=0)


def test_a_knob_of_edits_without_edits_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="--edit_how=delete is not used without edits; add"):
        slgr_jax.train(dataset.path, tmp_path / "r", edit_how="delete")
