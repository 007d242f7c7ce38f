"""Guidances of vectors: golden values, plain numpy, several devices, masks, gates, refusals."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from list_teachers import draws_of
from numpy.testing import assert_allclose

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.guidance import alignment, htd, rlmrec, vector_teacher
from slgr_jax.guidance.base import METHOD, Frozen, Sources, make_guidance
from slgr_jax.reports import gate_evaluation
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import loop, step, vector_products
from slgr_jax.training.build import build
from slgr_jax.training.state import init_state

USERS, ITEMS, Z, E = 24, 30, 5, 4
NO_TEXT = (3, 11)  # items without a vector


def _vectors(seed, rows, width=Z, missing=()):
    rng = np.random.default_rng(seed)
    values = rng.normal(0.5, 2.0, (rows, width)).astype(np.float32)
    has = ~np.isin(np.arange(rows), missing)
    return Vectors(np.where(has[:, None], values, 0), has)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    dataset = worlds.random_dataset(
        tmp_path_factory.mktemp("aligned") / "d", n_users=USERS, n_items=ITEMS, timed=True
    )
    items = _vectors(0, ITEMS, missing=NO_TEXT)
    embeddings.write(dataset, "text", items, _vectors(1, USERS), users_from="file")
    return dataset


def _run(data, workdir="w", **knobs):
    values = {"guidance": "rlmrec_con", "teacher_vectors": "text", "batch_size": 16, "dim": E + 1}
    values |= {"epochs": 2, "patience": 0, "init_std": 1.0, "lambda": 1.0, "kernels": "xla"}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _experiment(data, **knobs):
    return build(_run(data, **knobs), data, worlds.one_device())


def _lanes(seed=0, lanes=6, width=E):
    rng = np.random.default_rng(seed)
    has = (rng.random((lanes, 3)) < 0.7).astype(np.float32)
    return alignment.Lanes(
        ids=jnp.asarray(rng.integers(0, 5, (lanes, 3)), jnp.int32),
        student=jnp.asarray(rng.normal(size=(lanes, 3, width)), jnp.float32),
        teacher=jnp.asarray(rng.normal(size=(lanes, 3, Z)), jnp.float32),
        has=jnp.asarray(has),
        weights=jnp.asarray(has * rng.random((lanes, 1)), jnp.float32),
        others=jnp.asarray(rng.normal(size=(lanes, 2, width)), jnp.float32),
        known=jnp.asarray(np.arange(lanes)[:, None] % 3 > np.arange(2), jnp.float32),
    )


def _method(name, **knobs):
    run = make_run("d", "w", guidance=name, teacher_vectors="t", **knobs)
    guidance = make_guidance(run)
    return guidance, guidance.init_method(jax.random.key(0), E, Z)


# ---------------------------------------------------------------------------------- golden values

_ENTITIES = (
    [[-2.325031, -0.218792], [-1.245911, -0.732267], [-0.544259, -0.3163], [0.411631, 1.042513]],
    [[0.12573, -0.132105, 0.640423], [0.1049, -0.535669, 0.361595],
     [1.304, 0.947081, -0.703735], [-1.265421, -0.623274, 0.041326]],
)  # fmt: skip


def test_topologies_are_those_computed_elsewhere():
    """Sums over four vectors; in two groups of two."""
    student, teacher = (jnp.array(rows) for rows in _ENTITIES)
    entities = htd.Entities(student, teacher, jnp.ones(4), jnp.ones(4))
    full = htd.full_topology(entities, entities, positive=False)
    assert float(jnp.sum(full.errors)) == pytest.approx(10.44014, rel=1e-5)
    assert float(jnp.sum(full.pairs)) == 16
    groups = jnp.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]])
    within, across = htd.group_topology(entities, entities, (groups, groups), positive=False)
    assert float(jnp.sum(within.errors)) == pytest.approx(0.099911, abs=1e-6)
    assert float(jnp.sum(across.errors)) == pytest.approx(3.872703, rel=1e-5)
    assert (float(jnp.sum(within.pairs)), float(jnp.sum(across.pairs))) == (8, 4)


def test_contrasts_are_those_computed_elsewhere():
    e = jnp.array([[-0.128535, 1.366463, -0.665195, 0.35151],
                   [0.90347, 0.094012, -0.743499, -0.921725],
                   [-0.457726, 0.220195, -1.009618, -0.209176]])  # fmt: skip
    p = jnp.array([[-0.159225, 0.540846, 0.214659, 0.355373],
                   [-0.653829, -0.129614, 0.783975, 1.493431],
                   [-1.259066, 1.513924, 1.345875, 0.781311],
                   [0.264456, -0.313923, 1.458021, 1.960258],
                   [1.801635, 1.315104, 0.35738, -1.208319],
                   [-0.004454, 0.656475, -1.288361, 0.395122]])  # fmt: skip
    own, everybody = jnp.array([0, 2, 5]), jnp.arange(6)
    users = rlmrec.contrast(e, p[own], own, p, everybody, jnp.ones(6), 0.2)
    assert float(jnp.mean(users)) == pytest.approx(2.796876, abs=1e-5)
    items = rlmrec.contrast(e, p[own], own, p[own], own, jnp.ones(3), 0.2)
    assert float(jnp.mean(items)) == pytest.approx(2.091994, abs=1e-5)
    # One's own repeated, and what is not there, change nothing.
    again, repeated = jnp.concatenate([p[own], p[own], p[:1]]), jnp.concatenate([own, own, own[:1]])
    there = jnp.array([1.0] * 3 + [0] * 4)
    alike = rlmrec.contrast(e, p[own], own, again, repeated, there, 0.2)
    assert_allclose(alike, items, rtol=1e-5)
    none = rlmrec.contrast(e, p[own], own, p[own], own, jnp.zeros(3), 0.2)
    assert_allclose(none, 0.0, atol=1e-6)


# ------------------------------------------------------------------------- against plain numpy


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _perceptron(params, x):
    names = sorted(params)
    for name in names[:-1]:
        x = x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        x = np.where(x > 0, x, 0.01 * x)
    return x @ np.asarray(params[names[-1]]["kernel"]) + np.asarray(params[names[-1]]["bias"])


def _contrasts(anchors, own, ids, has, temperature):
    out = []
    for a, id_ in enumerate(ids):
        allowed = [b for b in range(len(ids)) if has[b] and ids[b] != id_]
        cosines = [_unit(anchors[a]) @ _unit(own[b]) / temperature for b in [a, *allowed]]
        out.append(np.log(np.exp(cosines).sum()) - cosines[0])
    return np.array(out)


def _expected_con(params, lanes):
    mapped = _perceptron(params, lanes.teacher)
    sides = [
        _contrasts(lanes.student[:, s], mapped[:, s], lanes.ids[:, s], lanes.has[:, s], 0.2)
        for s in range(3)
    ]
    return 3 * (lanes.weights * np.stack(sides, 1)).sum() / lanes.has.sum()


def _expected_gen(params, lanes):
    of_model = {name: value for name, value in params.items() if name != "tokens"}
    ids = (lanes.ids + np.array([0, 1000, 1000])).reshape(-1)
    mapped = _perceptron(of_model, lanes.student).reshape(-1, Z)
    terms = _contrasts(mapped, lanes.teacher.reshape(-1, Z), ids, lanes.has.reshape(-1), 0.5)
    return 3 * (lanes.weights.reshape(-1) * terms).sum() / lanes.has.sum()


def _expected_hint(params, lanes):
    errors = ((_perceptron(params, lanes.student) - lanes.teacher) ** 2).mean(-1)
    return 3 * (lanes.weights * errors).sum() / lanes.has.sum()


def _expected_esr(params, lanes):
    total, count = 0.0, 0
    for lane in range(len(lanes.ids)):
        others = lanes.others[lane][lanes.known[lane] > 0]
        if lanes.has[lane, 0] and len(others):
            count += 1
            errors = (lanes.student[lane, 0] - others.mean(0)) ** 2
            total += lanes.weights[lane, 0] * errors.mean()
    return total / count


def _expected_ftd(params, lanes):
    ids = (lanes.ids + np.array([0, 1000, 1000])).reshape(-1)
    student, teacher = lanes.student.reshape(-1, E), lanes.teacher.reshape(-1, Z)
    has, weights = lanes.has.reshape(-1), lanes.weights.reshape(-1)
    seen, kept = set(), []
    for i, id_ in enumerate(ids):
        if has[i] and id_ not in seen:
            kept.append(i)
            seen.add(id_)
    total = 0.0
    for i in kept:
        for j in kept:
            cosines = [_unit(x[i]) @ _unit(x[j]) for x in (student, teacher)]
            total += weights[i] * weights[j] * (cosines[0] - cosines[1]) ** 2
    return total / len(kept) ** 2


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("rlmrec_con", {}, _expected_con),
        ("rlmrec_gen", {}, _expected_gen),
        ("hint", {"hint_hidden": 3}, _expected_hint),
        ("htd", {"htd_groups": 0}, _expected_ftd),
        ("llm_esr", {}, _expected_esr),
    ],
)
def test_losses_are_those_of_plain_numpy(name, knobs, expected):
    method, params = _method(name, **knobs)
    lanes = _lanes()
    losses = method.lane_losses(params, lanes, worlds.one_device(), jax.random.key(1))
    host = {name: np.asarray(value, np.float64) for name, value in vars(lanes).items()}
    host["known"] = host["known"] > 0
    expected_loss = expected(params, types.SimpleNamespace(**host))
    assert float(jnp.mean(losses)) == pytest.approx(expected_loss, rel=1e-5)


def test_topology_of_groups_is_that_of_its_parts():
    """gamma of both topologies, the rest of what rebuilds the product's vectors."""
    lanes, key = _lanes(seed=3), jax.random.key(1)
    for gamma in (0.0, 0.3, 1.0):
        method, params = _method("htd", htd_groups=2, htd_topology=gamma)
        value = float(jnp.mean(method.lane_losses(params, lanes, worlds.one_device(), key)))
        local, everything = method._entities(lanes, worlds.one_device())
        groups = np.asarray(method._groups(params, local.teacher, key))
        assert set(groups.sum(1).round(5)) == {1.0}
        within, across = htd.group_topology(local, everything, (groups, groups), positive=False)
        topology = sum(float(x.errors.sum() / x.pairs.sum()) for x in (within, across))
        rebuilt = 0.0
        for i in range(18):
            k = int(groups[i].argmax())
            mapped = local.student[i] @ params["maps"][k] + params["biases"][k]
            rebuilt += float(local.weights[i] * jnp.mean((local.teacher[i] - mapped) ** 2))
        rebuilt /= float(local.counted.sum())
        assert value == pytest.approx(gamma * topology + (1 - gamma) * rebuilt, rel=1e-4)


# Of the others: test_ctrl.py, test_llmemb_rat.py, test_pad_mmd.py.
@pytest.mark.parametrize(
    "name", [x for x in config.ALIGNMENTS if x not in ("ctrl", "llmemb_rat", "pad_mmd")]
)
def test_gradients_are_right_and_nothing_without_a_vector_matters(name):
    method, params = _method(name)
    lanes, key = _lanes(seed=2), jax.random.key(1)

    def loss(lanes):
        return jnp.mean(method.lane_losses(params, lanes, worlds.one_device(), key))

    gradient = jax.grad(lambda x: loss(lanes.replace(student=x)))(lanes.student)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jnp.asarray(rng.normal(size=lanes.student.shape), jnp.float32)
        ends = [float(loss(lanes.replace(student=lanes.student + s * 1e-3 * direction)))
                for s in (1, -1)]  # fmt: skip
        assert float(jnp.sum(gradient * direction)) == pytest.approx(
            (ends[0] - ends[1]) / 2e-3, abs=4e-3
        )
    assert float(jnp.abs(gradient).max()) > 0
    assert (np.asarray(gradient)[np.asarray(lanes.weights) == 0] == 0).all()
    to_others = jax.grad(lambda x: loss(lanes.replace(others=x)))(lanes.others)
    assert (np.asarray(to_others) == 0).all()
    nothing = lanes.replace(has=jnp.zeros((6, 3)), weights=jnp.zeros((6, 3)))
    assert float(loss(nothing)) == 0.0


# ---------------------------------------------------------------------------------- arrays, draws


def test_vectors_come_standardised_and_are_looked_up_by_lane(data):
    experiment = _experiment(data)
    arrays = experiment.arrays.guidance
    product = embeddings.load(data, "text")
    trained = product.items.has & (data.popularity > 0)
    of_trained = product.items.values[trained].astype(np.float64)
    spread = np.sqrt(((of_trained - of_trained.mean(0)) ** 2).mean())
    expected = (product.items.values - of_trained.mean(0)) / spread
    expected[list(NO_TEXT)] = 0
    assert arrays.items.values.dtype == jnp.float16
    assert_allclose(arrays.items.values, expected, atol=3e-3)

    one_space = _experiment(data, guidance="hint").arrays.guidance
    ratio = np.asarray(one_space.users.values, np.float64) / product.users.values
    assert_allclose(ratio, ratio[0, 0], rtol=2e-3)

    drawn = draws_of(experiment, steps=30)
    train = data.positives(("train",))
    users, items = drawn.queries.users.ravel(), drawn.items.reshape(-1, 2)
    for user, (item, other) in zip(users, items, strict=True):
        assert item in train.row(user)
        assert other not in train.row(user)
    counts = np.bincount(items[:, 0], minlength=ITEMS)
    assert np.corrcoef(counts, data.popularity)[0, 1] > 0.9

    one = jax.tree.map(lambda x: jnp.asarray(x[0]), drawn)
    trainer, context = experiment.trainer, experiment.arrays.context
    frozen = Frozen(trainer.access, init_state(trainer, 0).tables, {}, context, None)
    seen = trainer.guidance.observe(frozen, one, arrays, jax.random.key(0))
    lookup = np.asarray(arrays.items.values, np.float32)[np.asarray(one.items)]
    assert_allclose(seen.vectors[:, 1:], lookup)
    assert_allclose(seen.has[:, 1:], ~np.isin(one.items, NO_TEXT))


def test_neighbours_are_the_users_with_the_nearest_vectors(data):
    """All users but oneself and those that training does not know, the best first."""
    experiment = _experiment(data, guidance="llm_esr", llm_esr_neighbours=USERS + 2)
    arrays = experiment.arrays.guidance
    vectors = np.asarray(arrays.users.values, np.float64)
    cosines = _unit(vectors) @ _unit(vectors).T
    drawn = draws_of(experiment, steps=2)
    for user, others, known in zip(
        drawn.queries.users.ravel(),
        drawn.others.users.reshape(-1, USERS + 2),
        drawn.known.reshape(-1, USERS + 2),
        strict=True,
    ):
        able = [v for v in np.argsort(-cosines[user]) if v != user and data.history[v] > 0]
        assert others[: len(able)].tolist() == able
        assert known.sum() == known[: len(able)].sum() == len(able)

    one = jax.tree.map(lambda x: x[0], drawn)
    asked = experiment.trainer.guidance.candidates(one)
    lanes = len(one.items)
    by_lane = asked.queries.users.reshape(lanes, -1)
    assert_allclose(by_lane[:, 0], one.queries.users)
    assert_allclose(by_lane[:, 1:], one.others.users)
    assert_allclose(asked.items, np.repeat(one.items, 1 + one.others.users.shape[1], axis=0))


def test_cosines_label_what_a_gate_is_taught(data):
    run = _run(data, gate="calibrated")
    teacher = vector_teacher.lists(data, "text", "valid")
    product = embeddings.load(data, "text")
    train, valid = (data.positives((part,)) for part in ("train", "valid"))
    listed = 0
    for user in range(USERS):
        row = slice(teacher.offsets[user], teacher.offsets[user + 1])
        items = np.asarray(teacher.items[row])
        listed += np.isin(items, valid.row(user)).sum()
        assert not np.isin(items, train.row(user)).any()
        expected = _unit(product.items.values[items]) @ _unit(product.users.values[user])
        assert_allclose(teacher.scores[row], expected, rtol=1e-4)
    assert listed == product.items.has[data.valid.items].sum()
    arrays, left_out = make_guidance(run).arrays(
        Sources(run, data, _experiment(data).trainer.backbone)
    )
    assert left_out is None
    assert arrays.gate.labels.count > 0
    assert arrays.margin_scale == pytest.approx(np.std(teacher.scores), rel=1e-5)


# ---------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("name", "backbone", "knobs"),
    [
        ("rlmrec_con", "mf", {"gate": "calibrated"}),
        ("rlmrec_con", "sasrec", {"dim": E, "max_history": 4, "layers": 1, "gate": "budget"}),
        ("rlmrec_gen", "lightgcn", {"dim": E, "layers": 2}),
        ("hint", "mf", {"item_vectors": "text", "gate": "paper"}),
        ("htd", "lightgcn", {"dim": E, "htd_groups": 3, "dropout": 0.2}),
        ("llm_esr", "sasrec", {"dim": E, "max_history": 4, "layers": 1, "gate": "rule"}),
    ],
)
def test_what_is_learned_falls(data, name, backbone, knobs):
    experiment = _experiment(data, guidance=name, backbone=backbone, **{"lambda": 10.0, **knobs})
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(experiment.trainer, 0), []
    start = jax.tree.map(np.asarray, state.params["guidance"][METHOD])
    for _ in range(2):
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(60))
        assert int(health.step) == -1
        losses.append(float(sums["guidance_loss"]) / max(float(sums["alpha"]), 1e-6))
        assert 0 < float(sums["alpha"]) / 60 <= 1
    assert losses[1] < losses[0]
    moved = jax.tree.map(
        lambda a, b: np.abs(a - np.asarray(b)).max(), start, state.params["guidance"][METHOD]
    )
    assert min(jax.tree.leaves(moved), default=1.0) > 0  # llm_esr has none


def test_masked_nodes_are_seen_as_the_token_and_get_no_gradient(data):
    """Their own rows play no part in the pass; those of their neighbours do."""
    knobs = {"guidance": "rlmrec_gen", "backbone": "lightgcn", "dim": E, "layers": 1, "l2": 0.0}
    experiment = _experiment(data, **knobs, aligned_per_step=2, table_optimizer="sgd")
    trainer, arrays = experiment.trainer, experiment.arrays
    state = init_state(trainer, 0)
    batch, drawn = step.draw_steps(trainer, jax.random.split(jax.random.key(0), 1), arrays)
    one = jax.tree.map(lambda x: x[0], (batch, drawn))
    slots = {name: jnp.zeros(t.shape[0], jnp.int32) for name, t in state.tables.items()}
    new, *_ = step.train_step(trainer, state, slots, *one, arrays, jax.random.key(1))
    users, items = np.asarray(one[1].queries.users), np.asarray(one[1].items).ravel()
    for name, masked in (("user", users), ("item", items)):
        moved = np.abs(np.asarray(new.tables[name]) - np.asarray(state.tables[name])).max(axis=1)
        assert (moved[masked] == 0).all()
        assert moved.max() > 0
    tokens = new.params["guidance"][METHOD]["tokens"]
    assert all(float(jnp.abs(token).max()) > 0 for token in tokens.values())


def test_a_run_goes_on_to_the_bit_is_served_and_says_what_it_learned_from(data, tmp_path, capsys):
    whole, parts = (_run(data, tmp_path / name, gate="calibrated") for name in ("a", "b"))
    assert loop.train(whole).status == "finished"
    first = dataclasses.replace(parts, train=dataclasses.replace(parts.train, epochs=1))
    loop.train(first)
    loop.train(parts)
    runs = [serving.load(run.workdir) for run in (whole, parts)]
    values = [jax.device_get(run.restored.serving) for run in runs]
    jax.tree.map(np.testing.assert_array_equal, *values)
    report = gate_evaluation.evaluate_gate(runs[0])
    assert 0 <= report["auc"] <= 1
    assert report["slices"]["overall"]["n"] > 0
    embeddings.write(data, "other", _vectors(5, ITEMS), _vectors(6, USERS), users_from="file")
    guidance = dataclasses.replace(parts.guidance, teacher_vectors="other")
    with pytest.raises(ConfigError, match=r"--teacher_vectors: text -> other"):
        loop.train(dataclasses.replace(parts, guidance=guidance))


def test_other_vectors_under_the_same_name_are_refused(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d", n_users=USERS, n_items=ITEMS)
    embeddings.write(dataset, "text", _vectors(0, ITEMS), _vectors(1, USERS), users_from="file")
    run = _run(dataset, tmp_path / "r", epochs=1)
    loop.train(run)
    others = _vectors(2, USERS)
    embeddings.write(dataset, "text", _vectors(0, ITEMS), others, users_from="file", overwrite=True)
    again = dataclasses.replace(run, train=dataclasses.replace(run.train, epochs=2))
    with pytest.raises(ConfigError, match=r"--teacher_vectors \(users\): text holds other vectors"):
        loop.train(again)
    record = vector_products.record(run, dataset)
    assert set(record) == {"teacher_vectors (items)", "teacher_vectors (users)"}


# --------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_with_what_to_do(data):
    with pytest.raises(ConfigError, match=r"--backbone=deepfm has none.*--item_vectors"):
        _experiment(data, backbone="deepfm", dim=E)
    for backbone in ("mf", "sasrec"):
        with pytest.raises(ConfigError, match=r"masks nodes of a graph.*--backbone=lightgcn"):
            _experiment(data, guidance="rlmrec_gen", backbone=backbone, dim=E)
    with pytest.raises(ManifestError, match=r"no embeddings 'none'; it has: .*text"):
        _experiment(data, teacher_vectors="none")
    with pytest.raises(ConfigError, match=r"--labelled_preferences=hidden: teacher text was not"):
        _experiment(data, gate="calibrated", labelled_preferences="hidden")
    alike = Vectors(np.ones((ITEMS, Z), np.float32), np.ones(ITEMS, bool))
    embeddings.write(data, "alike", alike, _vectors(1, USERS), users_from="file")
    with pytest.raises(InputError, match=r"--teacher_vectors=alike: \d+ items .* all of these are"):
        _experiment(data, teacher_vectors="alike")
