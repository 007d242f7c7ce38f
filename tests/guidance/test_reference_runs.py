"""Uncertainty by an ensemble: its value, what it may not touch, and which runs may be in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy.special import expit, logit

from slgr_jax import config
from slgr_jax.errors import ConfigError, ManifestError
from slgr_jax.guidance import gates
from slgr_jax.guidance.base import Frozen, Scored
from slgr_jax.guidance.gating import Observed
from slgr_jax.mesh import make_layout
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.serving import TrainedRun, load
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, loop, multi_seed, restore, run_directory, step
from slgr_jax.training import state as state_lib

N_USERS, N_ITEMS = 24, 30
MF = {"dim": 4, "init_std": 2.0, "batch_size": 32, "epochs": 2}
SASREC = MF | {"backbone": "sasrec", "max_history": 5, "layers": 1, "hidden": 4, "dropout": 0.0}
GUIDED = MF | {
    "guidance": "pairwise",
    "teacher": "t",
    "uncertainty": "ensemble",
    "lambda": 0.5,
    "kernels": "xla",
}
REFERENCE = {"gate": "calibrated", "gate_inputs": "history,reference"}
# Of the paper's gate: it starts at zero, where nothing that it reads matters.
GATE = {"weight": np.array([0.5, -0.5, 3.0], np.float32), "bias": np.float32(-0.4)}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    _use_devices(monkeypatch, 1)


def _use_devices(monkeypatch, count):
    layout = make_layout(devices=jax.devices()[:count])
    monkeypatch.setattr(restore, "make_layout", lambda **_: layout)


def _teach(dataset):
    rng = np.random.default_rng(0)
    rows = [
        f"u{user},i{item},{score}"
        for user in range(N_USERS)
        for item, score in zip(rng.choice(N_ITEMS, 12, replace=False), rng.random(12), strict=True)
    ]
    path = dataset.path / "scores.csv"
    path.write_text("user,item,score\n" + "\n".join(rows) + "\n")
    provenance = preferences.Provenance(unlisted="below", training_items="hidden")
    preferences.import_scores(dataset, path, "t", provenance=provenance, keep_training_items=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset with a teacher, and three trained runs on it: (dataset, mf, mf, sasrec)."""
    root = tmp_path_factory.mktemp("world")
    dataset = worlds.random_dataset(root / "d", n_users=N_USERS, n_items=N_ITEMS, per_user=12)
    _teach(dataset)
    with pytest.MonkeyPatch.context() as patch:
        _use_devices(patch, 1)
        for name, knobs in (("a", MF), ("b", MF | {"seed": 1}), ("sasrec", SASREC)):
            loop.train(config.make_run(str(dataset.path), str(root / name), **knobs))
    return dataset, root / "a", root / "b", root / "sasrec"


def _run(world, workdir, **knobs):
    dataset, one, two, _ = world
    named = {"reference_runs": f"{one},{two}"} | GUIDED | knobs
    return config.make_run(str(dataset.path), str(workdir), **named)


def _believed(member, users, items, part="valid"):
    """[n, C] probabilities: of matrix factorisation by hand, of others off their ranking."""
    run = restore.restore_run(str(member))
    if run.config.model.backbone == "mf":
        values = jax.device_get(run.serving.values)
        user, item = (values[name].astype(np.float64) for name in ("user", "item"))
        products = np.einsum("nd,ncd->nc", user[users][:, :-1], item[items][..., :-1])
        return expit(products + item[items][..., -1])
    ranked = jax.jit(run.score_users)(run.scoring(part), jnp.asarray(users))
    return expit(np.take_along_axis(np.asarray(ranked, np.float64), np.asarray(items), axis=1))


def _q(one, two):
    """Of two probabilities: 4 Var = (p - p')^2."""
    return (one - two) ** 2


def _paper_alpha(dataset, q, users, items):
    slices = dataset.slices(config.SliceConfig())
    cold, tail = slices.cold_users[users], slices.tail_items[items]
    logit = 0.5 * cold[:, None] - 0.5 * tail + 3.0 * q - 0.4
    return expit(logit).mean(axis=1)


def _built(run, dataset):
    """The trainer of a run, and its device arrays."""
    experiment = build.build(run, dataset)
    return experiment.trainer, experiment.arrays


def _initial(trainer):
    return jax.jit(lambda: state_lib.init_state(trainer, 0))()


def _draw(trainer, arrays):
    """What the first step with key 1 draws: its batch, and that of its guidance."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))[:1]
    drawn = jax.jit(lambda keys, arrays: step.draw_steps(trainer, keys, arrays))(keys, arrays)
    return jax.tree.map(lambda x: x[0], jax.device_get(drawn))


def _one_step(trainer, arrays, gate=GATE):
    """A step with these parameters of the gate: its guidance's draw, the state after it, sums."""
    state = _initial(trainer)
    gate = jax.device_put(gate, trainer.layout.replicated)
    state = state.replace(params=state.params | {"guidance": gate})
    key = jax.random.key_data(jax.random.key(1))
    state, sums, _ = step.make_run_steps(trainer)(state, arrays, key, jnp.int32(1))
    _, guided = _draw(trainer, arrays)
    return guided, jax.device_get(state), jax.device_get(sums)


def _observe(trainer, arrays, state, guided):
    """What the gate is told of a step."""
    params = state.params["backbone"]
    frozen = Frozen(trainer.access, state.tables, params, arrays.context, None)
    return trainer.guidance.observe(frozen, guided, arrays.guidance, jax.random.key(0))


def _files(*roots):
    """Every file's path and content, but for locks."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for root in roots
        for path in sorted(pathlib.Path(root).rglob("*"))
        if path.is_file()
    }


# --- the value ------------------------------------------------------------------------------------


def test_q_is_the_spread_of_what_the_runs_believe():
    """Two runs: (p - p')^2; agreement: 0; half sure of each side: 1, the most there is."""
    scores = np.random.default_rng(0).normal(size=(2, 7, 2)).astype(np.float32)
    found = gates.variance_uncertainty(jnp.asarray(scores))
    expected = _q(*expit(scores.astype(np.float64)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(gates.variance_uncertainty(jnp.ones((5, 3, 2))), 0.0)
    sides = jnp.array([-40.0, 40.0, 40.0, -40.0])[:, None, None]
    np.testing.assert_allclose(gates.variance_uncertainty(sides), 1.0)


@pytest.mark.parametrize(("devices", "kernels"), [(1, "xla"), (2, "xla"), (1, "native")])
def test_alpha_of_a_step_equals_numpy(world, tmp_path, monkeypatch, devices, kernels):
    if kernels == "native":
        worlds.need_native_kernels()
    _use_devices(monkeypatch, devices)
    trainer, arrays = _built(_run(world, tmp_path / "r", kernels=kernels), world[0])
    guided, _, sums = _one_step(trainer, arrays)
    users, items = guided.pairs.queries.users, guided.pairs.items
    q = _q(*(_believed(member, users, items) for member in world[1:3]))
    assert q.std() > 0.05
    expected = _paper_alpha(world[0], q, users, items)
    assert float(sums["alpha"]) == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_a_member_that_reads_histories_is_asked_as_of_all_of_training(world, tmp_path, kernels):
    """By a run whose own backbone reads none."""
    if kernels == "native":
        worlds.need_native_kernels()
    _, mf, _, sasrec = world
    knobs = {"reference_runs": f"{mf},{sasrec}", "kernels": kernels}
    trainer, arrays = _built(_run(world, tmp_path / "r", **knobs), world[0])
    assert arrays.context.histories is None
    guided, _, sums = _one_step(trainer, arrays)
    users, items = guided.pairs.queries.users, guided.pairs.items
    expected, seen = (
        _paper_alpha(
            *(world[0], _q(_believed(mf, users, items), _believed(sasrec, users, items, part))),
            *(users, items),
        ).mean()
        for part in ("valid", "test")
    )
    assert float(sums["alpha"]) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - seen) > 1e-4  # validation is not among what it looked at


def test_reference_runs_are_asked_about_labelled_preferences_too(world, tmp_path):
    knobs = {"gate": "calibrated", "gate_inputs": "uncertainty", "labelled_per_step": 24}
    trainer, arrays = _built(_run(world, tmp_path / "r", **knobs), world[0])
    assert arrays.interactions.targets is None  # validation's, though the teacher hid items
    state, (_, guided) = _initial(trainer), _draw(trainer, arrays)

    @jax.jit
    def observe(arrays, guided):
        return _observe(trainer, arrays, state, guided)

    observed, labelled = observe(arrays, guided), guided.labelled
    believed = [_believed(member, labelled.queries.users, labelled.items) for member in world[1:3]]
    np.testing.assert_allclose(observed.labelled.uncertainty, _q(*believed), rtol=1e-4, atol=1e-6)
    pairs = guided.pairs
    believed = [_believed(member, pairs.queries.users, pairs.items) for member in world[1:3]]
    probabilities = expit(np.asarray(observed.reference_scores))
    np.testing.assert_allclose(probabilities, believed, rtol=1e-4, atol=1e-6)


def test_a_reference_is_the_mean_margin_of_the_runs(world, tmp_path):
    """One run is enough, and q is still the recommender's own."""
    knobs = REFERENCE | {"uncertainty": "entropy", "gate_hidden": 0, "labelled_per_step": 24}
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 2)), rng.normal(size=2)
    for members in (world[1:3], world[1:2]):
        named = {"reference_runs": ",".join(map(str, members))}
        trainer, arrays = _built(_run(world, tmp_path / "r", **knobs, **named), world[0])
        gate = {"alpha": {"weight": np.float32(weight), "bias": np.float32(bias)}}
        gate["prior"] = {"weight": np.ones((2, 2), np.float32)}
        guided, _, sums = _one_step(trainer, arrays, gate)
        users, items = guided.pairs.queries.users, guided.pairs.items
        logits = np.mean([logit(_believed(member, users, items)) for member in members], axis=0)
        history = np.asarray(arrays.interactions.facts.log_history)[users]
        z = np.stack([history, logits[:, 0] - logits[:, 1]], axis=1)
        other = 1 - np.asarray(gates.folds(jnp.asarray(users)))
        expected = expit(np.sum(weight[other] * z, axis=1) + bias[other])
        assert float(sums["alpha"]) == pytest.approx(expected.mean(), rel=1e-4)


def test_hidden_items_which_the_reference_runs_have_learned_supervise_no_gate(world, tmp_path):
    """What two runs were trained on they agree about: a gate would read the answer off it."""
    run = _run(world, tmp_path / "r", gate="calibrated", labelled_preferences="hidden")
    with pytest.raises(ConfigError, match=r"runs of --reference_runs were trained on.*=validation"):
        build.build(run, world[0])


def test_a_supervised_gate_reads_the_spread(world, tmp_path):
    """Alpha of a step is the gate's, of the numpy q, with the other fold's parameters."""
    knobs = {"gate": "calibrated", "gate_inputs": "uncertainty", "gate_hidden": 0}
    trainer, arrays = _built(_run(world, tmp_path / "r", **knobs), world[0])
    weight, bias = np.array([[2.0, -1.0], [-3.0, 1.5]]), np.array([0.3, -0.2])
    gate = {"alpha": {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}}
    guided, _, sums = _one_step(trainer, arrays, gate)
    users, items = guided.pairs.queries.users, guided.pairs.items
    q = _q(*(_believed(member, users, items) for member in world[1:3]))
    other = 1 - np.asarray(gates.folds(jnp.asarray(users)))
    alpha = expit((weight[other] * q).sum(1) + bias[other])
    assert float(sums["alpha"]) == pytest.approx(alpha.mean(), rel=1e-5)


# --- what it may not touch ------------------------------------------------------------------------


def _with_reference_runs(arrays, reference_runs):
    gate = arrays.guidance.gate.replace(reference_runs=reference_runs)
    return arrays.replace(guidance=arrays.guidance.replace(gate=gate))


def _other_members(arrays):
    """The same arrays, but for the first member's item vectors."""
    first, *rest = arrays.guidance.gate.reference_runs
    values = first.serving.values
    values = values | {"item": values["item"] + jnp.float32(1.0)}
    first = first.replace(serving=first.serving.replace(values=values))
    return _with_reference_runs(arrays, (first, *rest))


def test_members_move_alpha_and_nothing_that_is_learned_from_interactions(world, tmp_path):
    trainer, arrays = _built(_run(world, tmp_path / "r", **{"lambda": 0.0}), world[0])
    _, before, sums = _one_step(trainer, arrays)
    _, after, others = _one_step(trainer, _other_members(arrays))
    assert abs(float(sums["alpha"] - others["alpha"])) > 1e-3
    assert float(sums["rec_loss"]) == float(others["rec_loss"])
    jax.tree.map(np.testing.assert_array_equal, before.tables, after.tables)
    # ... and with a weight, what alpha is multiplied with.
    trainer, arrays = _built(_run(world, tmp_path / "r"), world[0])
    _, before, _ = _one_step(trainer, arrays)
    _, after, _ = _one_step(trainer, _other_members(arrays))
    assert np.abs(before.tables["item"] - after.tables["item"]).max() > 1e-5


def test_reference_runs_get_no_gradient(world, tmp_path):
    trainer, arrays = _built(_run(world, tmp_path / "r"), world[0])
    state, (_, guided) = _initial(trainer), _draw(trainer, arrays)
    first, *rest = arrays.guidance.gate.reference_runs

    @jax.jit
    def loss(values):
        moved = first.replace(serving=first.serving.replace(values=values))
        observed = _observe(trainer, _with_reference_runs(arrays, (moved, *rest)), state, guided)
        scores = jnp.zeros(guided.pairs.items.shape)
        scored = Scored(scores, scores[:, 0], lambda key, rate: scores)
        added = trainer.guidance.loss(
            GATE, scored, guided, observed, trainer.layout, jax.random.key(0)
        )
        return added.loss

    values = first.serving.values
    moved = {name: 2.0 * value for name, value in values.items()}
    assert abs(float(loss(values)) - float(loss(moved))) > 1e-4
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(values)):
        np.testing.assert_array_equal(leaf, 0.0)


def test_what_members_look_up_is_on_the_device_once(world, tmp_path):
    shutil.copytree(world[3], tmp_path / "again")
    members = f"{world[3]},{tmp_path / 'again'},{world[1]}"
    _, arrays = _built(_run(world, tmp_path / "r", reference_runs=members), world[0])
    first, again, mf = arrays.guidance.gate.reference_runs
    for leaf, same in zip(*map(jax.tree.leaves, (first.context, again.context)), strict=True):
        assert leaf.unsafe_buffer_pointer() == same.unsafe_buffer_pointer()
    assert jax.tree.leaves((mf.context, mf.as_of)) == []


# --- after training -------------------------------------------------------------------------------


def test_a_finished_runs_alpha_is_as_of_the_moment_before_test(world, tmp_path):
    """Of a run whose best state has `GATE` as its gate."""
    run = _run(world, tmp_path / "r", reference_runs=f"{world[1]},{world[3]}")
    loop.train(run)
    trained = load(run.workdir).restored
    serving = trained.serving.replace(guidance=GATE)
    finished = TrainedRun(run.workdir, dataclasses.replace(trained, serving=serving))
    rng = np.random.default_rng(1)
    users, items = rng.integers(0, N_USERS, 50), rng.integers(0, N_ITEMS, (50, 2))
    alpha = finished.believe(users, items, np.ones(50, np.float32))
    q = _q(*(_believed(member, users, items, "test") for member in (world[1], world[3])))
    np.testing.assert_allclose(alpha, _paper_alpha(world[0], q, users, items), rtol=1e-4)


def test_evaluation_asks_the_gate_and_refuses_other_members(world, tmp_path, monkeypatch):
    """The members as of the moment before test; training and evaluation leave them as they
    were."""
    other = pathlib.Path(shutil.copytree(world[1], tmp_path / "other"))
    run = _run(world, tmp_path / "r", reference_runs=f"{other},{world[3]}")
    before, believe, asked = _files(other, world[3]), TrainedRun._alpha, []

    def spy(self, gating, scoring, references, *args):
        asked.extend(references)
        return believe(self, gating, scoring, references, *args)

    monkeypatch.setattr(TrainedRun, "_alpha", spy)
    loop.train(run)
    gate = evaluate_run(run.workdir, "a").gate
    assert _files(other, world[3]) == before
    events = np.concatenate([world[0].train.users, world[0].valid.users])
    np.testing.assert_array_equal(asked[1].as_of, np.bincount(events, minlength=N_USERS))
    assert gate["slices"]["overall"]["n"] == 20_000
    spread = [group["alpha"] for group in gate["reliability"]]
    assert max(spread) > min(spread)
    loop.train(config.make_run(str(world[0].path), str(other), **MF | {"epochs": 3}))
    with pytest.raises(
        ConfigError, match=r"/r was trained with another --reference_runs \(.*other at"
    ):
        evaluate_run(run.workdir, "a")


def _log(run):
    lines = (pathlib.Path(run.workdir) / "log.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in x.items() if k not in ("time", "triples_per_s")} for x in kept]


def test_seeds_trained_together_share_the_ensemble(world, tmp_path):
    alone = [_run(world, tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    group = [_run(world, tmp_path / f"g{seed}", seed=seed) for seed in (0, 1)]
    multi_seed.train_seeds(group)
    for one, other in zip(alone, group, strict=True):
        loop.train(one)
        for left, right in zip(_log(one), _log(other), strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    ends = [_log(run)[-1]["train/alpha"] for run in group]
    assert ends[0] != ends[1]


# --- resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    loop.train(_run(world, tmp_path / "whole", epochs=3))
    for epochs in (1, 3):
        loop.train(_run(world, tmp_path / "parts", epochs=epochs))
    whole, parts = (
        restore.restore_run(str(tmp_path / name), "last").serving for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_resuming_with_other_members_is_refused_and_moved_ones_are_not(world, tmp_path):
    other = pathlib.Path(shutil.copytree(world[1], tmp_path / "other"))
    run = _run(world, tmp_path / "r", reference_runs=f"{other},{world[2]}")
    loop.train(run)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    per_epoch = json.loads((other / "run.json").read_text())["steps_per_epoch"]
    assert [x["run"] for x in record["reference_runs"]] == [str(other), str(world[2])]
    assert record["reference_runs"][0]["step"] == 2 * per_epoch

    moved = other.rename(tmp_path / "moved")
    again = _run(world, tmp_path / "r", reference_runs=f"{moved},{world[2]}", epochs=3)
    assert loop.train(again).epoch == 3
    swapped = _run(world, tmp_path / "r", reference_runs=f"{world[2]},{moved}", epochs=4)
    with pytest.raises(
        ConfigError, match=r"other settings \(--reference_runs: .*moved at.*--restart"
    ):
        loop.train(swapped)
    loop.train(config.make_run(str(world[0].path), str(moved), **MF | {"epochs": 3}))
    said = rf"moved at step {2 * per_epoch}, .* -> .*moved at step {3 * per_epoch}, .*--restart"
    with pytest.raises(ConfigError, match=said):
        loop.train(dataclasses.replace(again, train=config.TrainConfig(epochs=4, kernels="xla")))
    with pytest.raises(ConfigError, match="--uncertainty: ensemble -> entropy"):
        loop.train(_run(world, tmp_path / "r", reference_runs="", uncertainty="entropy"))
    # Without a record the names are what is left to compare.
    (tmp_path / "r" / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"--reference_runs: .*moved,.*/b -> .*/b,.*moved"):
        loop.train(swapped)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (
            {"reference_runs": ""},
            r"needs 2 or more runs, --reference_runs= names 0; .*--reference_runs=RUN,RUN",
        ),
        (
            {"reference_runs": "", "uncertainty": "entropy"} | REFERENCE,
            r"--gate_inputs=history,reference needs 1 or more runs, --reference_runs= names 0",
        ),
        (
            REFERENCE | {"gate": "paper", "uncertainty": "entropy"},
            r"not read with --uncertainty=entropy and --gate=paper, --gate_inputs=history,ref",
        ),
        ({"reference_runs": "a,"}, r"--reference_runs=a, names 1;"),
        ({"reference_runs": "a,b,x/../a"}, r"names a 2 times: .* name each once"),
        ({"uncertainty": "entropy"}, r"=entropy and --gate=paper.*; add --uncertainty=ens"),
        ({"reference_runs": "a,r"}, r"--reference_runs=a,r names --workdir=./r itself; name runs"),
    ],
)
def test_settings_that_name_no_ensemble(world, knobs, said):
    with pytest.raises(ConfigError, match=said):
        _run(world, "./r", **knobs)


def test_runs_that_cannot_be_members_are_named(world, tmp_path):
    dataset, mf, *_ = world

    def refused(member, said, kind=ConfigError):
        run = _run(world, tmp_path / "r", reference_runs=f"{mf},{member}")
        with pytest.raises(kind, match=said):
            loop.train(run)
        assert not (tmp_path / "r").exists()

    refused(tmp_path / "gone", r"gone is not a run: it holds no config.json")
    begun = pathlib.Path(shutil.copytree(mf, tmp_path / "begun"))
    shutil.rmtree(begun / "checkpoints")
    refused(begun, r"begun holds no checkpoints; train first", ManifestError)
    (begun / "checkpoints").mkdir()
    refused(begun, r"begun holds no finished checkpoint; train first", ManifestError)
    (begun / "run.json").unlink()
    refused(begun, r"--reference_runs: .*begun holds no run.json; train it first")
    other = worlds.random_dataset(tmp_path / "other", n_users=N_USERS, n_items=N_ITEMS, seed=5)
    loop.train(config.make_run(str(other.path), str(tmp_path / "foreign"), **MF))
    hashes = (other.manifest.split_hash[:8], dataset.manifest.split_hash[:8])
    refused(
        tmp_path / "foreign",
        rf"foreign was trained on split {hashes[0]}, .* has split {hashes[1]}; name runs",
    )
    renamed = json.loads((mf / "run.json").read_text()) | {"id_map_hash": "0123456789"}
    del renamed["checksum"]
    shutil.copytree(mf, tmp_path / "renamed")
    (tmp_path / "renamed" / "run.json").write_text(json.dumps(renamed))
    refused(tmp_path / "renamed", r"renamed was trained on id map 01234567, .* has id map ")


def test_without_a_gate_nobody_is_asked(world, tmp_path):
    """Without guidance the members need not even be there."""
    run = _run(world, tmp_path / "r", reference_runs="no,where", guidance="none", teacher="")
    trainer, arrays = _built(run, world[0])
    assert trainer.guidance is arrays.guidance is None
    assert run_directory.reference_checkpoints(run) == []
    assert Observed(1.0).reference_scores is None
