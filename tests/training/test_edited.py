"""Edits of training interactions: what is learned and looked up, and what must not notice them."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

import slgr_jax
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import make_layout
from slgr_jax.models.row_access import RowAccess
from slgr_jax.sampling import batch as batch_lib
from slgr_jax.sampling.negatives import generators
from slgr_jax.teacher.products import edits, preferences
from slgr_jax.training import edited, objectives, restore, run_directory, step
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
        chosen = {row: (-noise, other) for noise, row, other in sorted(said)[: most or None]}
        events = []
        for row in np.flatnonzero(train.users == user).tolist():
            item, (noise, other) = int(train.items[row]), chosen.get(row, (0.0, -1))
            if row in chosen and how == "replace" and other >= 0:
                events.append((other, 1.0))
            elif row not in chosen or how == "weigh":
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
        inputs = objectives.Inputs(
            batch, context, arrays.interactions, params, 0.0, 1, key, jnp.int32(0)
        )
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
    changed = _experiment(dataset, tmp_path / "b", backbone="sasrec", max_history=9)
    for a, b in zip(
        jax.tree.leaves(plain.arrays.interactions.facts),
        jax.tree.leaves(changed.arrays.interactions.facts),
        strict=True,
    ):
        assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(plain.validated), jax.tree.leaves(changed.validated), strict=True
    ):
        assert_array_equal(a, b)
    assert changed.arrays.context.histories.items.size < changed.validated.histories.items.size
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
    assert record["edited_by"]["edits"]["product"] == "n"
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
        with pytest.raises(ConfigError, match="--edits: n holds something else now"):
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
        ({"user_shards": 4}, "--edits=n reads all users' histories"),
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


# ------------------------------------------------------------------------------------- insertion


def _teach_pseudo(dataset, name="w"):
    """Users 0 to 8 take 1 to 3 items each, by weight; the others none."""
    rng, train = np.random.default_rng(3), dataset.positives(("train",))
    pairs = [
        (user, int(item))
        for user in range(9)
        for item in rng.choice(
            np.setdiff1d(np.arange(N_ITEMS), train.row(user)), 1 + user % 3, False
        )
    ]
    users, items = np.array(pairs).T
    weights = (rng.permutation(users.size) + 1) / 32
    worlds.teach(dataset, users, items, weights, name=name, score_kind="weight", unlisted="below")
    return {pair: float(np.float32(w)) for pair, w in zip(pairs, weights, strict=True)}


@pytest.fixture(scope="module")
def stated(dataset):
    """(user, item) -> weight of the product `w`."""
    return _teach_pseudo(dataset)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("more", [{"edits": "", "edit_threshold": 0.6}, {"edit_how": "replace"}])
def test_what_is_inserted_is_the_best_of_each_user_and_the_rest_stays(
    dataset, stated, tmp_path, most, more
):
    knobs = {"backbone": "sasrec", "max_history": 100, "insert": "w", "inserted_per_user": most}
    knobs |= {"edits_per_user": 2} | more
    experiment = _experiment(dataset, tmp_path / "r", **knobs)
    plain = {user: [] for user in range(N_USERS)}
    for user, item in zip(dataset.train.users, dataset.train.items, strict=True):
        plain[int(user)].append(int(item))
    if more.get("edits") != "":
        plain = {u: [i for i, _ in events] for u, events in _learned(dataset, "replace").items()}
    histories, inserted = jax.device_get(experiment.arrays.context.histories), 0
    for user, events in plain.items():
        ordered = sorted((w, i) for (u, i), w in stated.items() if u == user)
        best = {item: weight for weight, item in ordered[-most:]}
        begin, count = int(histories.offsets[user]), int(histories.trained[user])
        row = histories.items[begin : begin + count].tolist()
        weights = histories.weights[begin : begin + count].tolist()
        assert count == len(events) + len(best)
        met, rest = {}, []
        for item, weight in zip(row, weights, strict=True):
            if item in best and item not in met and weight != 1:
                met[item] = weight
            else:
                rest.append(item)
                assert weight == 1
        assert (met, rest) == (best, events)
        inserted += len(best)
    assert experiment.edited.counts["interactions_inserted"] == inserted > 0
    pairs = {(u, i) for u, i in stated if i in experiment.edited.more.row(u).tolist()}
    assert len(pairs) == inserted


def test_places_are_uniform_and_a_function_of_the_seed_and_the_user():
    """n events have n + 1 places; what other users have, and the weights, change nothing."""
    users, events = 4000, 4
    history = edited.Sequences(
        np.repeat(np.arange(users), events),
        np.tile(np.arange(events), users),
        np.ones(users * events, np.float32),
    )
    pseudo = edited.Sequences(
        np.repeat(np.arange(users), 2),
        np.tile([10, 11], users),
        np.tile(np.float32([0.5, 0.25]), users),
    )
    options = make_run("d", "w", inserted_per_user=2, insert_seed=5).edits
    out = edited.insert(history, pseudo, users, options)
    rows = out.items.reshape(users, events + 2)
    assert_array_equal(out.users, np.repeat(np.arange(users), events + 2))
    assert_array_equal(
        rows[rows < 10].reshape(users, events), np.tile(np.arange(events), (users, 1))
    )
    for item, weight in ((10, 0.5), (11, 0.25)):
        assert_array_equal(out.weights[out.items == item], weight)
        before = np.cumsum(rows < 10, axis=1)[rows == item]  # events of the user before it
        assert stats.chisquare(np.bincount(before, minlength=events + 1)).pvalue > 1e-3
    both = [np.cumsum(rows < 10, axis=1)[rows == item] for item in (10, 11)]
    assert abs(np.corrcoef(both)[0, 1]) < 0.05

    some = slice(0, 2000 * 2)
    fewer = edited.Sequences(pseudo.users[some], pseudo.items[some], pseudo.weights[some])
    again = edited.insert(history, fewer, users, options)
    assert_array_equal(again.items[: 2000 * (events + 2)], out.items[: 2000 * (events + 2)])
    other = make_run("d", "w", inserted_per_user=2, insert_seed=6).edits
    assert (edited.insert(history, pseudo, users, other).items != out.items).any()


def test_inserted_items_are_no_negatives_and_no_training_interactions(dataset, stated, tmp_path):
    knobs = {"backbone": "gru4rec", "loss": "bpr", "max_history": 6, "insert": "w"}
    knobs |= {"edits": "", "edit_threshold": 0.6, "inserted_per_user": 3, "edits_per_user": 2}
    experiment = _experiment(dataset, tmp_path / "r", **knobs)
    interactions, plan = experiment.arrays.interactions, experiment.trainer.plan
    keys = jax.random.split(jax.random.key(0), 32)
    batch = jax.device_get(batch_lib.draw(generators(keys)[0], interactions, plan))
    train, drawn = dataset.positives(("train",)), {}
    for user, items in zip(batch.queries.users.ravel(), batch.items.reshape(-1, 7), strict=True):
        drawn.setdefault(int(user), set()).update(items[1:].tolist())
    for user, others in drawn.items():
        own = {*train.row(user).tolist(), *(i for u, i in stated if u == user)}
        assert others == set(range(N_ITEMS)) - own
    plain = _experiment(dataset, tmp_path / "p", **knobs | {"insert": "", "inserted_per_user": 1})
    for a, b in zip(
        jax.tree.leaves((interactions.facts, interactions.users, experiment.validated)),
        jax.tree.leaves(
            (plain.arrays.interactions.facts, plain.arrays.interactions.users, plain.validated)
        ),
        strict=True,
    ):
        assert_array_equal(a, b)


def test_a_run_with_insertions_is_trained_and_resumed_with_its_product_alone(
    dataset, stated, tmp_path
):
    knobs = {"backbone": "sasrec", "max_history": 6, "insert": "w", "epochs": 1, "dim": 8}
    slgr_jax.train(dataset.path, tmp_path / "r", **knobs)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["edited_by"]["insert"]["product"] == "w"
    assert record["interactions_inserted"] == len({user for user, _ in stated})
    shutil.rmtree(dataset.path / "teacher" / "w")
    users, items = np.array(sorted(stated)[:4]).T
    worlds.teach(dataset, users, items, np.ones(4), name="w", score_kind="weight", unlisted="below")
    try:
        with pytest.raises(ConfigError, match="--insert: w holds something else now"):
            slgr_jax.train(dataset.path, tmp_path / "r", **knobs | {"epochs": 2})
    finally:
        shutil.rmtree(dataset.path / "teacher" / "w")
        _teach_pseudo(dataset)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"backbone": "mf"}, "add --guidance=interactions --teacher=w in its place"),
        ({"backbone": "din"}, "add --guidance=interactions --teacher=w in its place"),
        ({"insert": "unknown"}, "does not say that users take them"),
        ({"insert": "no"}, "has no teacher 'no'"),
        ({"user_shards": 4}, "--insert=w reads all users' histories"),
        (
            {"negatives": "hard", "loss": "bpr", "reference_runs": "other"},
            "use uniform or popularity",
        ),
    ],
)
def test_insertions_that_do_not_go_together_are_refused(dataset, stated, tmp_path, knobs, said):
    (user, item), *_ = stated
    worlds.teach(dataset, np.array([user]), np.array([item]), np.ones(1), name="unknown")
    given = {"backbone": "sasrec", "insert": "w", "dim": 8} | knobs
    with pytest.raises(slgr_jax.errors.UserError, match=said):
        build(make_run(str(dataset.path), "r", **given), dataset, worlds.one_device())
    shutil.rmtree(dataset.path / "teacher" / "unknown")


def test_a_knob_of_insertions_without_one_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="--insert_seed=1 is not used without --insert; add"):
        slgr_jax.train(dataset.path, tmp_path / "r", insert_seed=1, backbone="sasrec")
