"""Relaxed ranking distillation: golden value, closed form, draws by enumeration, every backbone."""

from __future__ import annotations

import collections
import itertools

import jax
import jax.numpy as jnp
import list_teachers
import numpy as np
import pytest
import worlds
from list_teachers import N_ITEMS, N_USERS, draws_of

from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import rrd
from slgr_jax.models.dot_access import DotAccess
from slgr_jax.teacher.products import preferences
from slgr_jax.training import step
from slgr_jax.training.state import init_state


def _dataset(path, **more):
    return list_teachers.listing_dataset(path, **more)


def _experiment(dataset, workdir, **knobs):
    few = {"guidance": "rrd", "rrd_interesting": 4, "rrd_uninteresting": 4}
    return list_teachers.experiment(dataset, workdir, **{**few, **knobs})


# -------------------------------------------------------------------------------------- the loss


def test_golden_value():
    """Scores (1, .4, -.2) of the list and (.3, -.5) outside it: 3.21539, computed elsewhere."""
    listed = jnp.array([[1.0, 0.4, -0.2]])
    terms = rrd.relaxed_ranking_terms(listed, jnp.array([[0.3, -0.5]]), jnp.ones((1, 3), bool))
    assert float(jnp.sum(terms)) == pytest.approx(3.21539, abs=1e-5)


def test_terms_are_those_of_a_plackett_luce_model_whose_places_may_be_missing():
    rng = np.random.default_rng(1)
    listed, unlisted = rng.normal(size=(5, 4)) * 3, rng.normal(size=(5, 6)) * 3
    lengths = np.array([4, 3, 1, 2, 0])
    mask = np.arange(4) < lengths[:, None]
    terms = rrd.relaxed_ranking_terms(jnp.asarray(listed), jnp.asarray(unlisted), jnp.asarray(mask))

    expected = np.zeros((5, 4))
    for g, k in itertools.product(range(5), range(4)):
        if mask[g, k]:
            others = np.exp(listed[g, k : lengths[g]]).sum() + np.exp(unlisted[g]).sum()
            expected[g, k] = np.log(others) - listed[g, k]
    np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-5)


def test_missing_places_get_no_gradient_and_none_is_a_nan():
    mask = jnp.array([[True, True, False], [False, False, False]])
    scores = jnp.array([[1.0, 2.0, 99.0], [1.0, 2.0, 3.0]])

    def loss(scores):
        return jnp.sum(rrd.relaxed_ranking_terms(scores, jnp.zeros((2, 2)), mask))

    gradient = jax.grad(loss)(scores)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~np.asarray(mask)] == 0).all()


def test_the_order_of_unlisted_items_does_not_count():
    listed, unlisted = jnp.array([[0.5, -0.1]]), jnp.array([[0.3, 1.2, -0.4]])
    mask = jnp.ones((1, 2), bool)
    terms = rrd.relaxed_ranking_terms(listed, unlisted, mask)
    np.testing.assert_allclose(
        terms, rrd.relaxed_ranking_terms(listed, unlisted[:, ::-1], mask), rtol=1e-6
    )
    swapped = rrd.relaxed_ranking_terms(listed[:, ::-1], unlisted, mask)
    assert float(jnp.sum(swapped)) > float(jnp.sum(terms))  # 0.5 belongs first


# -------------------------------------------------------------------------------------- the draw


@pytest.mark.parametrize("kernels", ["xla", "native"])
@pytest.mark.parametrize("sample", [True, False])
def test_lists_keep_their_order_above_items_that_are_neither_listed_nor_owned(
    tmp_path, kernels, sample
):
    if kernels == "native":
        worlds.need_native_kernels()
    dataset = _dataset(tmp_path / "d")
    experiment = _experiment(dataset, tmp_path / "r", rrd_sample=sample, kernels=kernels)
    drawn = draws_of(experiment, steps=20)
    teacher = preferences.load(dataset, "t")
    train = dataset.positives(("train",))

    users = np.unique(drawn.queries.users)
    assert users.tolist() == [u for u in range(N_USERS) if u % 3 != 2]  # those with a list
    for user, items, listed in zip(
        drawn.queries.users.ravel(),
        drawn.items.reshape(-1, 8),
        drawn.listed.reshape(-1, 4),
        strict=True,
    ):
        start, end = teacher.offsets[user : user + 2]
        best_first = teacher.items[start:end][::-1].tolist()
        kept = items[:4][listed].tolist()
        assert len(kept) == min(4, len(best_first))
        places = [best_first.index(item) for item in kept]
        assert places == sorted(places)
        if not sample:
            assert places == list(range(len(places)))
        outside = set(range(N_ITEMS)) - set(best_first) - set(train.row(user).tolist())
        assert set(items[4:].tolist()) <= outside
        assert set(items[:4][~listed].tolist()) <= {best_first[0]}  # rows that are read already


def test_places_are_drawn_without_replacement_by_their_weight(tmp_path):
    """Two of three places: each set as likely as exp(-rank / T) one after the other says."""
    dataset = _dataset(tmp_path / "d", lengths=(3, 3, 3))
    experiment = _experiment(
        dataset, tmp_path / "r", rrd_interesting=2, rrd_temperature=1.0, lists_per_step=400
    )
    drawn = draws_of(experiment, steps=50)
    teacher = preferences.load(dataset, "t")
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for user, items in zip(
        drawn.queries.users.ravel(), drawn.items.reshape(-1, 6)[:, :2], strict=True
    ):
        start, end = teacher.offsets[user : user + 2]
        best_first = teacher.items[start:end][::-1].tolist()
        counts[tuple(best_first.index(item) for item in items)] += 1

    weight = np.exp(-np.arange(3.0))
    share = weight / weight.sum()
    total = sum(counts.values())
    for pair in itertools.combinations(range(3), 2):
        a, b = pair
        expected = share[a] * share[b] / (1 - share[a]) + share[b] * share[a] / (1 - share[b])
        assert counts[pair] / total == pytest.approx(expected, abs=0.012)


def test_a_gate_is_asked_about_each_listed_item_and_an_unlisted_one(tmp_path):
    dataset = _dataset(tmp_path / "d")
    experiment = _experiment(dataset, tmp_path / "r", gate="calibrated", rrd_uninteresting=2)
    drawn = jax.tree.map(lambda x: x[0], draws_of(experiment))
    pairs = experiment.trainer.guidance.gate_pairs(drawn)
    items = np.asarray(drawn.items)
    np.testing.assert_array_equal(pairs.items[:, 0], items[:, :4].ravel())
    np.testing.assert_array_equal(pairs.items[:, 1], items[:, [4, 5, 4, 5]].ravel())
    np.testing.assert_array_equal(pairs.queries.users, np.repeat(drawn.queries.users, 4))
    assert (np.asarray(pairs.margins) >= 0).all()
    assert drawn.labelled is not None


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("backbone", "gate"),
    [
        *(("mf", gate) for gate in ("constant", "calibrated", "paper")),
        *(("lightgcn", "calibrated"), ("sasrec", "constant"), ("deepfm", "calibrated")),
    ],
)
def test_every_kind_of_backbone_learns_the_lists(tmp_path, backbone, gate):
    """With every weight on the lists, these rise above what they leave out."""
    dataset = _dataset(tmp_path / "d")
    knobs = {"backbone": backbone, "gate": gate, "lambda": 5.0, "dropout": 0.0, "l2": 0.0}
    if backbone == "mf":
        worlds.need_native_kernels()
    if backbone == "deepfm":
        knobs |= {"mlp": (8,)}
    experiment = _experiment(dataset, tmp_path / "r", **knobs)
    trainer = experiment.trainer
    assert isinstance(trainer.access, DotAccess) == (backbone == "mf")

    run_steps = step.make_run_steps(trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(trainer, 0), []
    for _ in range(3):
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(40))
        losses.append(float(sums["guidance_loss"]) / 40)
        assert int(health.step) == -1
        assert 0 <= float(sums["alpha"]) / 40 <= 1
    assert losses[-1] < losses[0]
    if gate == "constant":
        assert float(sums["alpha"]) / 40 == pytest.approx(1.0)
        assert float(sums["agreement"]) / 40 > 0.6


def test_matrix_factorisation_reads_its_lists_by_one_kernel_call(tmp_path):
    worlds.need_native_kernels()
    dataset = _dataset(tmp_path / "d")
    experiment = _experiment(dataset, tmp_path / "r")
    trainer = experiment.trainer
    key = jax.random.key_data(jax.random.key(1))
    arguments = (init_state(trainer, 0), experiment.arrays, key, jnp.int32(3))
    text = step.make_run_steps(trainer).lower(*arguments).as_text()
    assert text.count("@slgr_factor_scores") == 1
    assert text.count("@slgr_factor_update") == 1


def test_pairs_of_an_odd_list_are_read_as_rows_to_the_same_loss(tmp_path):
    """3 + 4 candidates leave the fast path; the loss of the first step is the same function."""
    worlds.need_native_kernels()
    dataset = _dataset(tmp_path / "d")
    odd = _experiment(dataset, tmp_path / "a", rrd_interesting=3)
    assert not isinstance(odd.trainer.access, DotAccess)
    sums = {}
    for kernels in ("native", "xla"):
        experiment = _experiment(dataset, tmp_path / kernels, kernels=kernels)
        assert isinstance(experiment.trainer.access, DotAccess) == (kernels == "native")
        key = jax.random.key_data(jax.random.key(1))
        _, sums[kernels], _ = step.make_run_steps(experiment.trainer)(
            init_state(experiment.trainer, 0), experiment.arrays, key, jnp.int32(5)
        )
    for name in ("loss", "guidance_loss", "agreement"):
        assert float(sums["native"][name]) == pytest.approx(float(sums["xla"][name]), rel=1e-4)


# ---------------------------------------------------------------------------------------- errors


def test_lists_that_say_nothing_of_other_items_are_refused(tmp_path):
    dataset = _dataset(tmp_path / "d", unlisted="unknown")
    with pytest.raises(ConfigError, match=r"teacher t that is unknown.*--unlisted=below"):
        _experiment(dataset, tmp_path / "r")


def test_knobs_of_another_guidance_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--rrd_interesting=5 is not used with --guidance=none"):
        make_run("d", "w", rrd_interesting=5)
    with pytest.raises(ConfigError, match=r"--margin=2.0 is not used with --guidance=rrd"):
        make_run("d", "w", guidance="rrd", teacher="t", margin=2.0)
    assert make_run("d", "w", guidance="rrd", teacher="t").gate.gate == "constant"
