"""The fused step against an independent dense numpy step; golden values; one trace; sharding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy.special import expit

from slgr_jax.config import (
    TABLE_DTYPES,
    GateConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)
from slgr_jax.evaluation import full_ranking, ranking_metrics
from slgr_jax.mesh import make_layout
from slgr_jax.sampling.context import Context
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, checkpoint, loop, programs, restore, step
from slgr_jax.training import state as state_lib


def _teach(dataset, seed=0):
    """A teacher with eight scored items a user."""
    rng = np.random.default_rng(seed)
    items = [rng.choice(dataset.n_items, 8, replace=False) for _ in range(dataset.n_users)]
    scores = np.sort(rng.uniform(size=(dataset.n_users, 8)).astype(np.float32), axis=1)
    users = np.repeat(np.arange(dataset.n_users), 8)
    worlds.teach(dataset, users, np.concatenate(items), scores.ravel())


def _built(dataset, layout, **sections):
    """The trainer of a run, and its device arrays."""
    config = worlds.run_config(dataset, "run", **sections)
    if config.guided and config.guidance.teacher not in preferences.products(dataset.path):
        _teach(dataset)
    experiment = build.build(config, dataset, layout)
    return experiment.trainer, experiment.arrays


GUIDED = {
    "model": ModelConfig(dim=8, init_std=1.0),
    "optimizer": OptimizerConfig(table_optimizer="sgd", lr=0.1, l2=0.05),
    "sampler": SamplerConfig(batch_size=16),
    "guidance": GuidanceConfig(guidance="pairwise", teacher="t", weight=0.5),
}


def _run(trainer, arrays, steps, seed=0):
    state = state_lib.init_state(trainer, seed)
    key = jax.random.key_data(jax.random.key(seed + 1))
    return step.make_run_steps(trainer)(state, arrays, key, jnp.int32(steps))


def _values(trainer, state):
    serving = state_lib.make_serving_state(trainer)(state, Context())
    return {k: np.asarray(v) for k, v in state_lib.by_user(trainer, serving).values.items()}


@pytest.mark.parametrize("gate", ["paper", "constant", "rule"])
def test_one_step_equals_dense_numpy(tmp_path, gate):
    """BPR + L2 + lambda * gated hinge, differentiated by hand on whole tables."""
    dataset = worlds.random_dataset(tmp_path / "d")
    layout = worlds.one_device()
    gate_config = GateConfig(gate=gate, alpha=0.7)
    trainer, arrays = _built(dataset, layout, gate=gate_config, **GUIDED)
    before = _values(trainer, state_lib.init_state(trainer, 0))
    state, sums, health = _run(trainer, arrays, 1)
    after = _values(trainer, state)

    key = jax.random.fold_in(jax.random.key_data(jax.random.key(1)), 0)
    keys = jax.random.split(key)[:1]
    drawn = jax.device_get(step.draw_steps(trainer, keys, arrays))
    batch, guided = jax.tree.map(lambda x: x[0], drawn)
    p, q = before["user"].astype(np.float64), before["item"].astype(np.float64)
    slices = dataset.slices(trainer.config.slices)
    cold, tail = slices.cold_users.astype(float), slices.tail_items.astype(float)

    def score(u, i):
        return p[u, :-1] @ q[i, :-1] + q[i, -1]

    grad_p, grad_q = np.zeros_like(p), np.zeros_like(q)

    def add(u, i, d):
        grad_p[u, :-1] += d * q[i, :-1]
        grad_q[i, :-1] += d * p[u, :-1]
        grad_q[i, -1] += d

    rec = guidance = 0.0
    for u, (i, j) in zip(batch.queries.users, batch.items, strict=True):
        x = score(u, i) - score(u, j)
        rec += np.log1p(np.exp(-x)) / 16
        add(u, i, -expit(-x))
        add(u, j, expit(-x))
        for table, row, grad in ((p, u, grad_p), (q, i, grad_q), (q, j, grad_q)):
            grad[row] += 0.05 * table[row]
    for u, (a, b) in zip(guided.pairs.queries.users, guided.pairs.items, strict=True):
        x = score(u, a) - score(u, b)
        alpha = {"constant": 0.7, "rule": max(cold[u], tail[a], tail[b]), "paper": 0.5}[gate]
        guidance += alpha * max(0.0, 1.0 - x) / 16
        if x < 1.0:
            add(u, a, -0.5 * alpha)
            add(u, b, 0.5 * alpha)
    np.testing.assert_allclose(after["user"], p - 0.1 * grad_p, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["item"], q - 0.1 * grad_q, rtol=1e-4, atol=1e-5)
    assert float(sums["rec_loss"]) == pytest.approx(rec, rel=1e-5)
    assert float(sums["guidance_loss"]) == pytest.approx(guidance, rel=1e-5)
    assert int(health.step) == -1


def test_golden_first_steps(tmp_path):
    """Three steps of the default optimiser. If a change of drawing, initialisation or arithmetic
    is meant, print the new numbers with this test's own `sums` and say why in the commit."""
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = GUIDED | {"optimizer": OptimizerConfig(), "model": ModelConfig(dim=8)}
    trainer, arrays = _built(dataset, worlds.one_device(), **sections)
    _, sums, _ = _run(trainer, arrays, 3)
    got = [float(sums[name]) / 3 for name in ("loss", "rec_loss", "guidance_loss", "alpha")]
    assert got == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [0.96081710, 0.70151689, 0.51807225, 0.49939530]


def test_guidance_off_ignores_the_gate_and_draws_no_preferences(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = {k: v for k, v in GUIDED.items() if k != "guidance"}
    trainer, arrays = _built(dataset, worlds.one_device(), **sections)
    state, sums, _ = _run(trainer, arrays, 2)
    assert trainer.guidance is None
    assert trainer.guidance_pairs == 0
    assert arrays.guidance is None
    assert state.params["guidance"] == {}
    assert set(sums) == {"steps", "loss", "rec_loss", "accuracy", "triples"}


def test_zero_alpha_trains_as_without_guidance(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    layout = worlds.one_device()
    plain, arrays = _built(dataset, layout, **{k: v for k, v in GUIDED.items() if k != "guidance"})
    gated, arrays_of_gated = _built(
        dataset, layout, gate=GateConfig(gate="constant", alpha=0.0), **GUIDED
    )
    alone = _values(plain, _run(plain, arrays, 5)[0])
    silent = _values(gated, _run(gated, arrays_of_gated, 5)[0])
    for name in alone:
        np.testing.assert_allclose(silent[name], alone[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_k_steps_in_one_dispatch_equal_k_dispatches(tmp_path, dtype):
    dataset = worlds.random_dataset(tmp_path / "d")
    optimizer = dataclasses.replace(GUIDED["optimizer"], table_dtype=dtype)
    trainer, arrays = _built(dataset, worlds.one_device(), **GUIDED | {"optimizer": optimizer})
    at_once, _, _ = _run(trainer, arrays, 6)
    run, state = step.make_run_steps(trainer), state_lib.init_state(trainer, 0)
    key = jax.random.key_data(jax.random.key(1))
    for count in (1, 2, 3):
        state, _, _ = run(state, arrays, key, jnp.int32(count))
    jax.tree.map(np.testing.assert_array_equal, state, at_once)
    assert run._cache_size() == 1  # one trace serves every K


def test_weights_known_to_be_one_are_those_that_are_drawn(tmp_path):
    """Weights that are compiled in change no bit."""
    dataset = worlds.random_dataset(tmp_path / "d")
    trainer, arrays = _built(dataset, worlds.one_device(), **GUIDED)
    assert trainer.plan.every_negative
    drawn = dataclasses.replace(
        trainer, plan=dataclasses.replace(trainer.plan, every_negative=False)
    )
    ends = [_run(version, arrays, 12) for version in (trainer, drawn)]
    for compiled, weighed in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(compiled, weighed)


@pytest.mark.parametrize("table_shards", [1, 8])
def test_eight_devices_equal_one(tmp_path, table_shards):
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = GUIDED | {"optimizer": OptimizerConfig(table_optimizer="adagrad", lr=0.1)}
    alone, arrays = _built(dataset, worlds.one_device(), **sections)
    many, shared = _built(dataset, make_layout(table_shards=table_shards), **sections)
    one_state, one_sums, _ = _run(alone, arrays, 10)
    many_state, many_sums, _ = _run(many, shared, 10)
    expected, got = _values(alone, one_state), _values(many, many_state)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-4, atol=1e-5)
    for name in one_sums:
        assert float(many_sums[name]) == pytest.approx(float(one_sums[name]), rel=1e-4)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_state_is_donated_and_step_cost_is_free_of_the_table(
    tmp_path, users_compiler, dtype, kernels
):
    """The compiled dispatch reuses the state's buffers; beside slots, temporaries follow B. A
    step reads each table by one gather and writes it by one scatter, whole rows both; or it
    does so in two kernels. No table is copied, nothing is sorted."""
    if kernels == "native":
        worlds.need_native_kernels()
    dataset = worlds.random_dataset(tmp_path / "d")
    layout = worlds.one_device()
    sections = GUIDED | {
        "optimizer": OptimizerConfig(table_dtype=dtype),
        "train": TrainConfig(kernels=kernels),
    }
    trainer, arrays = _built(dataset, layout, **sections)
    rows = 500_000
    big = {
        name: dataclasses.replace(spec, rows=rows) for name, spec in trainer.backbone.tables.items()
    }
    trainer.backbone.tables = big
    state = jax.eval_shape(lambda: state_lib.init_state(trainer, 0))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = step.make_run_steps(trainer).lower(state, arrays, key, count)
    compiled = lowered.compile(compiler_options=users_compiler)
    memory = compiled.memory_analysis()
    table_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in state.tables.values())
    assert memory.alias_size_in_bytes >= table_bytes
    slots = 2 * rows * 4
    drawn = step.DRAWN_AT_ONCE * 64  # batches of many steps are drawn at once
    assert memory.temp_size_in_bytes < slots * 1.1 + drawn
    (padded, lanes), text = state.tables["item"].shape, compiled.as_text()
    table = rf"\w+\[{padded},{lanes}\]\S*"
    by_xla = 2 if kernels == "xla" else 0
    assert len(re.findall(rf" gather\(.*slice_sizes=\{{1,{lanes}\}}", text)) == by_xla
    assert len(re.findall(rf"{table} scatter\(", text)) == by_xla
    assert len(re.findall(rf"= {table} copy\(", text)) == 0
    assert " sort(" not in text
    calls = sorted(re.findall(r'custom_call_target="(slgr_\w+)"', text))
    by_kernel = ["slgr_draw_preferences", "slgr_draw_triples"]
    by_kernel += [f"slgr_factor_scores_{dtype}", f"slgr_factor_update_{dtype}"]
    by_kernel += ["slgr_take"] * 2  # of what is known of a pair, what the gate reads: cold, tail
    assert calls == (by_kernel if kernels == "native" else [])


@pytest.mark.parametrize(("gate_inputs", "calls"), [("history,teacher", 1), ("reference", 3)])
def test_a_gate_that_only_weighs_is_computed_by_its_kernel(tmp_path, gate_inputs, calls):
    """Alpha, and the prior of the items as they are and exchanged; XLA computes, with gradients,
    what is said of the few preferences that teach it."""
    worlds.need_native_kernels()
    dataset = worlds.random_dataset(tmp_path / "d")
    gate = {"gate": "calibrated", "gate_inputs": gate_inputs, "labelled_per_step": 3}
    if gate_inputs == "reference":
        plain = worlds.run_config(dataset, tmp_path / "plain", train=TrainConfig(epochs=1))
        loop.train(plain)
        gate["reference_runs"] = plain.workdir
    sections = GUIDED | {"gate": GateConfig(**gate), "train": TrainConfig(kernels="native")}
    trainer, arrays = _built(dataset, worlds.one_device(), **sections)
    state = jax.eval_shape(lambda: state_lib.init_state(trainer, 0))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    text = step.make_run_steps(trainer).lower(state, arrays, key, count).as_text()
    assert text.count("@slgr_logistic_gate(") == calls
    lanes = re.findall(r"stablehlo\.tanh .*tensor<\d+x(\d+)xf32>", text)
    assert set(lanes) == {"3"}
    assert trainer.guidance_pairs == 16


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_bad_numbers_name_the_first_step_and_leaf(tmp_path, dtype):
    dataset = worlds.random_dataset(tmp_path / "d")
    optimizer = dataclasses.replace(GUIDED["optimizer"], table_dtype=dtype)
    trainer, arrays = _built(dataset, worlds.one_device(), **GUIDED | {"optimizer": optimizer})
    state = state_lib.init_state(trainer, 0)
    finite = jax.jit(functools.partial(programs._finite, trainer))
    assert all(finite(state).values())
    infinite = {"float32": np.inf, "bfloat16": 0x7F80}[dtype]
    state = state.replace(
        tables=state.tables | {"item": state.tables["item"].at[:, 0].set(infinite)}
    )
    assert [name for name, fine in finite(state).items() if not fine] == ["tables/item"]
    key = jax.random.key_data(jax.random.key(1))
    _, _, health = step.make_run_steps(trainer)(state, arrays, key, jnp.int32(4))
    assert int(health.step) == 0
    bad = [n for k, n in enumerate(trainer.leaf_names) if int(health.leaves) >> k & 1]
    assert bad == ["tables/item", "loss"]


def test_dropout_uncertainty_runs_and_stays_in_range(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "d")
    gate = GateConfig(gate="paper", uncertainty="dropout")
    trainer, arrays = _built(dataset, worlds.one_device(), gate=gate, **GUIDED)
    state, sums, _ = _run(trainer, arrays, 20)
    assert float(sums["alpha"]) / 20 < 0.5  # fell from one half, as it must
    assert np.isfinite(float(state.params["guidance"]["weight"][2]))


def test_paper_gate_collapses_in_training(tmp_path):
    """benchmarks/BELIEVE.md reproduced: alpha only falls, whatever the teacher is worth."""
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = GUIDED | {"train": TrainConfig(), "optimizer": OptimizerConfig(dense_lr=0.01)}
    trainer, arrays = _built(dataset, worlds.one_device(), **sections)
    state, run = state_lib.init_state(trainer, 0), step.make_run_steps(trainer)
    key, alphas = jax.random.key_data(jax.random.key(1)), []
    for _ in range(6):
        state, sums, _ = run(state, arrays, key, jnp.int32(50))
        alphas.append(float(sums["alpha"]) / 50)
    assert alphas[0] < 0.5
    assert all(later < earlier for earlier, later in itertools.pairwise(alphas))


# --- bfloat16 tables ------------------------------------------------------------------------------


def test_bfloat16_on_eight_devices_equals_one(tmp_path):
    """Two replicas of four shards. The noise does not depend on the mesh: only where sums differ
    in their last bit, an entry falls to the other neighbour."""
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = GUIDED | {"optimizer": OptimizerConfig(lr=0.1, table_dtype="bfloat16")}
    alone, arrays = _built(dataset, worlds.one_device(), **sections)
    many, shared = _built(dataset, make_layout(table_shards=4), **sections)
    expected = _values(alone, _run(alone, arrays, 10)[0])
    got = _values(many, _run(many, shared, 10)[0])
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2**-6, atol=1e-3)
        assert (got[name] != expected[name]).mean() < 0.05


def test_a_checkpoint_keeps_every_bit_of_a_bfloat16_table(tmp_path):
    """Random bits, NaN patterns among them, written from two shards and read on one device."""
    dataset = worlds.random_dataset(tmp_path / "d")
    sections = GUIDED | {"optimizer": OptimizerConfig(table_dtype="bfloat16")}
    trainer, _ = _built(dataset, make_layout(table_shards=2), **sections)
    state = state_lib.init_state(trainer, 0)
    rng = np.random.default_rng(0)
    bits = {
        name: rng.integers(0, 1 << 16, table.shape, dtype=np.uint16)
        for name, table in state.tables.items()
    }
    state = state.replace(tables=jax.device_put(bits, trainer.layout.table_sharding))
    best = state_lib.make_serving_state(trainer)(state, Context())
    saved = checkpoint.Checkpoints(str(tmp_path / "run"), writable=True)
    saved.save(state, best, checkpoint.Progress(step=1))
    saved.close()
    alone, _ = _built(dataset, worlds.one_device(), **sections)
    saved = checkpoint.Checkpoints(str(tmp_path / "run"), writable=False)
    abstract = state_lib.abstract_state(alone), state_lib.abstract_serving(alone)
    restored, serving = saved.restore(*abstract)
    saved.close()
    for name, spec in alone.backbone.tables.items():
        assert restored.tables[name].sharding.is_fully_replicated
        np.testing.assert_array_equal(restored.tables[name], bits[name])
        values = bits[name][: spec.rows, : spec.width].astype(np.uint32) << 16
        np.testing.assert_array_equal(np.asarray(serving.values[name]).view(np.uint32), values)


def test_checkerboard_is_solved_in_bfloat16(tmp_path):
    dataset = worlds.checkerboard(tmp_path / "d", size=24)
    run = worlds.run_config(
        dataset,
        tmp_path / "run",
        model=ModelConfig(dim=8),
        optimizer=OptimizerConfig(table_dtype="bfloat16", lr=0.3, l2=0.001),
        sampler=SamplerConfig(batch_size=128),
        train=TrainConfig(epochs=60, patience=0, eval_every=60),
    )
    loop.train(run)
    restored = restore.restore_run(run.workdir)
    ranking = full_ranking.rank(
        restored.score_users,
        restored.scoring("test"),
        dataset.positives(("test",)),
        dataset.positives(("train", "valid")),
        dataset.n_items,
    )
    assert ranking_metrics.summarize(ranking_metrics.per_user(ranking, (1,)))["recall@1"] == 1.0
