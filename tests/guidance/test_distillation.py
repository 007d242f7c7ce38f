"""Losses of global distillation: golden values, plain numpy, draws by enumeration, refusals."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import list_teachers
import numpy as np
import pytest
import worlds
from list_teachers import N_ITEMS, N_USERS, draws_of
from numpy.testing import assert_allclose

from slgr_jax import config
from slgr_jax.config import DLLM2RecConfig, make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.guidance import cd, dcd, kd, list_kl, lists, rd, unkd
from slgr_jax.guidance.base import Scored, make_guidance
from slgr_jax.guidance.gating import Observed
from slgr_jax.sampling.arrays import PairFacts
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.preferences import Preferences
from slgr_jax.teacher.products import preferences
from slgr_jax.training import step
from slgr_jax.training.state import init_state

G, K, L = 5, 4, 6
LENGTHS = np.array([4, 3, 1, 2, 4])
FEW = {
    "rd": {"rd_places": K, "rd_samples": L},
    "dllm2rec": {"dllm2rec_places": K, "dllm2rec_samples": L},
    "list_kl": {"list_kl_places": K, "list_kl_samples": L, "list_kl_temperature": 2.0},
    "cd": {"cd_pool": K, "cd_items": 2, "cd_samples": L},
    "dcd": {"dcd_listed_pool": K, "dcd_unlisted_pool": L, "dcd_interesting": 2,
            "dcd_uninteresting": 2},
}  # fmt: skip


def _method(name, **knobs):
    run = make_run("d", "w", guidance=name, teacher="t", **{**FEW.get(name, {}), **knobs})
    return make_guidance(run)


def _lists(method, seed=0):
    """Scores [G, K + L] of lists of `LENGTHS`, and what was drawn of them."""
    rng = np.random.default_rng(seed)
    said = np.sort(rng.random((G, K)), axis=1)[:, ::-1]
    items, zeros = jnp.zeros((G, K + L), jnp.int32), jnp.zeros((G, K))
    of_pair, tail = jnp.zeros((G, K, 2)), rng.integers(0, 2, (G, K, 2))
    drawn = lists.ListDraw(
        queries=Queries(items[:, 0], None),
        items=items,
        listed=jnp.asarray(np.arange(K) < LENGTHS[:, None]),
        targets=jnp.asarray(said, jnp.float32),
        unlisted=jnp.full(G, 60),
        noise=jnp.asarray(rng.integers(0, 2**32, (G, K + L), np.uint32)),
        pairs=Preferences(
            Queries(items[:, :K], None),
            of_pair.astype(jnp.int32),
            zeros,
            PairFacts(zeros, of_pair, zeros, jnp.asarray(tail, jnp.float32)),
        ),
        labelled=None,
    )
    if method == "list_kl":
        drawn = list_kl.ListKLDraw(**vars(drawn))
    scores = rng.normal(size=(G, K + L)) * 2
    scores[0, :K] += 10  # a recommender that agrees with the teacher
    return scores, drawn


def _softplus(x):
    return np.logaddexp(0.0, x)


def _estimated_ranks(scores, listed):
    above = scores[:, None, :] > scores[:, :K, None]
    return 1 + (above[..., :K] & listed[:, None]).sum(-1) + 60 / L * above[..., K:].sum(-1)


def _rd(scores, drawn, ranks_of):
    listed = np.asarray(drawn.listed)
    weight = np.exp(-np.arange(1.0, K + 1)) * listed
    weight /= weight.sum(1, keepdims=True)
    error = _estimated_ranks(ranks_of, listed) - np.arange(1, K + 1)
    return K * weight * np.tanh(np.maximum(0.1 * error, 0)) * _softplus(-scores[:, :K])


def _dllm2rec(scores, drawn, ranks_of):
    listed, said = np.asarray(drawn.listed), np.asarray(drawn.targets, np.float64)
    position, confidence = np.exp(-np.arange(1.0, K + 1)) * listed, np.exp(said) * listed
    agreed = (_estimated_ranks(ranks_of, listed) <= K) * listed
    weight = 0.3 * position / position.sum(1, keepdims=True)
    weight = weight + 0.5 * confidence / confidence.sum(1, keepdims=True) + 0.1 * agreed
    return K * weight / weight.sum(1, keepdims=True) * _softplus(-scores[:, :K])


def _list_kl(scores, drawn, _):
    listed, said = np.asarray(drawn.listed), np.asarray(drawn.targets, np.float64)
    p = np.exp(said) * listed
    p /= p.sum(1, keepdims=True)
    others = 60 / L * np.exp(scores[:, K:] / 2).sum(1, keepdims=True)
    mass = np.exp(scores[:, :K] / 2) * listed
    q = mass / (mass.sum(1, keepdims=True) + others)
    return K * np.where(listed, p * np.log(np.where(listed, p / np.where(listed, q, 1), 1)), 0)


def _keys(drawn):
    words = np.asarray(drawn.noise, np.float64)
    return -np.log(-np.log((words + 0.5) / 2**32))


def _greatest(keys, count):
    return keys >= np.sort(keys, axis=1)[:, -count:][:, :1]


def _cd(scores, drawn, ranks_of):
    listed, target = np.asarray(drawn.listed), np.asarray(drawn.targets, np.float64)
    above = ranks_of[:, None, :] > ranks_of[:, :K, None]
    rank = 1 + (above[..., :K] & listed[:, None]).sum(-1) + above[..., K:].sum(-1)
    keys = np.where(listed, _keys(drawn)[:, :K] - rank / 20, -np.inf)
    y = scores[:, :K]
    terms = target * _softplus(-y) + (1 - target) * _softplus(y)
    return np.where(listed & _greatest(keys, 2), K / 2 * terms, 0)


def _relaxed(scores, low, high):
    terms = np.zeros((G, K))
    for g, k in itertools.product(range(G), range(K)):
        if low[g, k]:
            others = np.exp(scores[g, k:K][low[g, k:]]).sum() + np.exp(scores[g, K:][high[g]]).sum()
            terms[g, k] = np.log(others) - scores[g, k]
    return terms


def _dcd(scores, drawn, ranks_of):
    listed = np.asarray(drawn.listed)
    everything = np.concatenate([listed, np.ones((G, L), bool)], axis=1)
    rank = 1 + ((ranks_of[:, None, :] > ranks_of[:, :, None]) & everything[:, None]).sum(-1)
    low = np.maximum(np.tanh(np.maximum(rank[:, :K] - np.arange(1, K + 1), 0) / 10), 1e-5)
    high = np.tanh(np.maximum(LENGTHS[:, None] + 1 - rank[:, K:], 0) / 10)
    keys = _keys(drawn)
    with np.errstate(divide="ignore"):
        of_listed = np.where(listed, np.log(low) + keys[:, :K], -np.inf)
        of_others = np.log(high) + keys[:, K:]
    low, high = listed & _greatest(of_listed, 2), (high > 0) & _greatest(of_others, 2)
    assert 0 < high.sum() < G * 2, "the world has both users with and without overestimated items"
    every = np.ones((G, L), bool)
    return K / 2 * _relaxed(scores, low, high) + _relaxed(scores, listed, every)


NUMPY = {"rd": _rd, "dllm2rec": _dllm2rec, "list_kl": _list_kl, "cd": _cd, "dcd": _dcd}


@pytest.mark.parametrize("name", NUMPY)
def test_losses_and_gradients_are_those_of_plain_numpy(name):
    """Value by value, and by central differences with weights and choices left as they are."""
    method = _method(name)
    scores, drawn = _lists(name)
    expected = NUMPY[name](scores, drawn, scores)
    given = jnp.asarray(scores, jnp.float32)
    assert_allclose(method.place_losses(given, drawn), expected, rtol=2e-5, atol=2e-5)
    assert (expected[~np.asarray(drawn.listed)] == 0).all()

    gradient = jax.grad(lambda x: jnp.sum(method.place_losses(x, drawn)))(given)
    for g, c in itertools.product(range(G), range(K + L)):
        step_ = np.zeros_like(scores)
        step_[g, c] = 1e-5
        ends = [NUMPY[name](scores + sign * step_, drawn, scores).sum() for sign in (1, -1)]
        assert float(gradient[g, c]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-4)


# ---------------------------------------------------------------------------------- golden values


def test_weights_of_rd_are_those_computed_elsewhere():
    listed = jnp.ones((1, 5), bool)
    position = rd.position_weights(listed, 1.0)[0]
    assert_allclose(position, [0.636409, 0.234122, 0.086129, 0.031685, 0.011656], atol=1e-6)
    ranks = jnp.array([[3.0, 1.0, 40.0, 7.0, 120.0]])
    discrepancy = rd.discrepancy_weights(ranks, rd.place_ranks(listed), 0.1)[0]
    assert_allclose(discrepancy, [0.197375, 0.0, 0.998778, 0.291313, 1.0], atol=1e-6)
    loss = jnp.sum(position * jax.nn.softplus(-jnp.array([1.2, -0.3, 0.5, 0.1, -1.0])))
    assert float(loss) == pytest.approx(0.444135, abs=1e-6)


def test_weights_of_dllm2rec_are_those_computed_elsewhere():
    """Distances 0, .3, .7, 1.2, 2.8 of the generated text; the first and the fourth agreed on."""
    distances = jnp.array([[0.0, 0.3, 0.7, 1.2, 2.8]])
    agreed = jnp.array([[True, False, False, True, False]])
    knobs = DLLM2RecConfig()
    weights = rd.importance_weights(jnp.ones((1, 5), bool), -distances, agreed, knobs)[0]
    assert_allclose(weights, [0.483274, 0.212734, 0.121357, 0.167441, 0.015194], atol=2e-5)
    missing = jnp.arange(5)[None] < 2
    weights = rd.importance_weights(missing, -distances, agreed, knobs)[0]
    assert (np.asarray(weights[2:]) == 0).all()
    assert float(jnp.sum(weights)) == pytest.approx(1.0)


def test_soft_labels_of_cd_are_those_computed_elsewhere():
    labels = cd.soft_labels(jnp.array([2.0, -1.0]), 2.0, 0.0)
    assert_allclose(labels, [0.731059, 0.377541], atol=1e-6)


def test_errors_in_ranks_weigh_as_computed_elsewhere():
    low = dcd.error_weights(jnp.array([[9.0, -1.0, 0.0, -3.0]]), 10.0, 1e-5)
    assert_allclose(low, [[0.716298, 1e-5, 1e-5, 1e-5]], atol=1e-6)
    high = dcd.error_weights(jnp.array([[-4.0, 0.0, 2.0, 43.0]]), 10.0)
    assert_allclose(high, [[0, 0, 0.197375, 0.99963]], atol=1e-5)


def test_sample_weights_are_those_computed_elsewhere():
    pairs = {(1, 1): 1, (1, 2): 2, (2, 1): 0, (10, 15): 1.5, (15, 10): 0.5, (3, 100): 2,
             (100, 3): 0, (0, 7): 1}  # fmt: skip
    teacher, student = (jnp.array(ranks, jnp.float32) for ranks in zip(*pairs, strict=True))
    assert_allclose(list_kl.sample_weights(teacher, student), list(pairs.values()), rtol=1e-6)


def test_with_every_item_the_divergence_is_that_of_the_list_and_its_tail():
    """KL over the catalogue of which the teacher's tail is one bucket."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=9), rng.normal(size=4)
    p = 0.8 * np.exp(teacher) / np.exp(teacher).sum()
    q = np.exp(student) / np.exp(student).sum()
    expected = (p * np.log(p / q[:4])).sum() + 0.2 * np.log(0.2 / q[4:].sum())
    as_rows = [jnp.asarray(x, jnp.float32)[None] for x in (teacher, student[:4], student[4:])]
    terms = list_kl.divergence_terms(
        as_rows[0], as_rows[1], jnp.ones((1, 4), bool), as_rows[2], jnp.array([5]), 0.2
    )
    assert float(jnp.sum(terms)) == pytest.approx(expected, rel=1e-5)


def test_soft_labels_of_kd_are_softened_logits():
    scaled = jnp.array([0.0, 0.25, 1.0])
    for scores, probability in (("scaled", [0, 0.25, 1]), ("probability", [0.2, 0.35, 0.8])):
        assert_allclose(kd.soft_labels(scaled, 0.2, 0.8, scores, 1.0), probability, rtol=1e-6)
        softer = kd.soft_labels(scaled, 0.2, 0.8, scores, 2.0)
        odds = np.sqrt(np.array(probability) / np.maximum(1 - np.array(probability), 1e-300))
        assert_allclose(softer, odds / (1 + odds), rtol=1e-5)
    logits = kd.soft_labels(scaled, -2.0, 2.0, "logit", 2.0)
    assert_allclose(logits, 1 / (1 + np.exp(-np.array([-1.0, -0.5, 1.0]))), rtol=1e-6)


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(("length", "temperature"), [(2, 20.0), (5, 1.0), (7, 0.5), (40, 20.0),
                                                     (6, 1e5)])  # fmt: skip
def test_two_places_are_drawn_as_if_anew_while_they_are_equal(length, temperature):
    rng = np.random.default_rng(4)
    words = jnp.asarray(rng.integers(0, 2**32, (2, 400_000), np.uint32))
    draw = jax.jit(unkd.two_places, static_argnums=3)
    places = draw(words[0], words[1], jnp.full(words.shape[1], length), temperature)
    better, worse = np.asarray(places).T
    assert ((better >= 0) & (better < worse) & (worse < length)).all()
    p = np.exp(-np.arange(length) / temperature)
    law = np.triu(np.outer(p, p), 1)
    law /= law.sum()
    counts = np.zeros((length, length))
    np.add.at(counts, (better, worse), 1)
    assert_allclose(counts / counts.sum(), law, atol=4 * np.sqrt(law.max() / words.shape[1]))


def test_groups_have_equal_popularity_all_together():
    popularity = np.array([1, 8, 0, 2, 4, 1])
    assert unkd.popularity_groups(popularity, 2).tolist() == [1, 0, 1, 1, 1, 1]
    assert unkd.popularity_groups(np.full(6, 3), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert unkd.popularity_groups(np.zeros(3, int), 2).tolist() == [0, 0, 0]


def test_pairs_of_unkd_are_of_one_group_and_in_the_teachers_order(tmp_path):
    dataset = list_teachers.listing_dataset(tmp_path / "d", unlisted="unknown")
    experiment = list_teachers.experiment(dataset, tmp_path / "r", guidance="unkd", unkd_groups=2)
    drawn = draws_of(experiment, steps=40)
    users, items = drawn.pairs.queries.users.ravel(), drawn.pairs.items.reshape(-1, 2)
    groups = unkd.popularity_groups(dataset.popularity, 2)
    assert (groups[items[:, 0]] == groups[items[:, 1]]).all()

    teacher = preferences.load(dataset, "t")
    able = set()
    for user in range(N_USERS):
        listed = teacher.items[teacher.offsets[user] : teacher.offsets[user + 1]]
        able |= {(user, g) for g in (0, 1) if (groups[listed] == g).sum() >= 2}
    keys, counts = np.unique(np.stack([users, groups[items[:, 0]]], 1), axis=0, return_counts=True)
    assert set(map(tuple, keys.tolist())) == able
    assert counts.max() < 3 * counts.min()  # as often as any other
    scores = {
        (user, item): score
        for user in range(N_USERS)
        for item, score in zip(
            teacher.items[teacher.offsets[user] : teacher.offsets[user + 1]],
            teacher.scores[teacher.offsets[user] : teacher.offsets[user + 1]],
            strict=True,
        )
    }
    margins = [scores[u, a] - scores[u, b] for u, (a, b) in zip(users, items, strict=True)]
    assert_allclose(drawn.pairs.margins.ravel(), margins, rtol=1e-5)
    assert min(margins) > 0


def test_an_interaction_is_drawn_with_its_rank_in_the_list(tmp_path):
    dataset = list_teachers.listing_dataset(tmp_path / "d")
    few = FEW["list_kl"] | {"list_kl_sample_weights": True, "lists_per_step": 64}
    experiment = list_teachers.experiment(dataset, tmp_path / "r", guidance="list_kl", **few)
    drawn = draws_of(experiment, steps=8)
    assert drawn.items.shape[-1] == K + L == experiment.trainer.guidance.width
    teacher, train = preferences.load(dataset, "t"), dataset.positives(("train",))
    ranks = []
    for user, item, rank in zip(
        drawn.queries.users.ravel(),
        drawn.items[..., -1].ravel(),
        drawn.teacher_ranks.ravel(),
        strict=True,
    ):
        start, end = teacher.offsets[user : user + 2]
        best_first = teacher.items[start:end][::-1].tolist()
        assert item in train.row(user)
        assert rank == (best_first.index(item) if item in best_first else len(best_first)) + 1
        ranks.append(rank)
    assert len(set(ranks)) > 3
    in_list = dataset.n_items - np.asarray(drawn.unlisted)
    assert (in_list > 0).all()
    assert (np.asarray(drawn.unlisted) < N_ITEMS).all()


# ---------------------------------------------------------------------------- the step, and errors


@pytest.mark.parametrize("name", NUMPY)
def test_a_gate_weighs_each_place(name):
    """--gate=constant with alpha 1 is the method; rule believes the places of tail items alone."""
    scores, drawn = _lists(name)
    terms = NUMPY[name](scores, drawn, scores)
    believed = np.asarray(drawn.pairs.facts.tail).max(axis=-1)
    scored = Scored(jnp.asarray(scores, jnp.float32), None, lambda *_: None)
    for gate, alpha in (("constant", np.ones((G, K))), ("rule", believed)):
        method = _method(name, gate=gate)
        given = (scored, drawn, Observed(1.0), worlds.one_device(), jax.random.key(0))
        added = method.loss({}, *given)
        assert float(added.loss) == pytest.approx((alpha * terms).mean(), rel=1e-4)
        assert float(added.metrics["alpha"]) == pytest.approx(alpha.mean())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("kd", {}),
        ("unkd", {"unkd_groups": 2, "gate": "paper"}),
        ("list_kl", FEW["list_kl"] | {"list_kl_sample_weights": True, "gate": "calibrated"}),
    ],
    ids=["kd", "unkd", "list_kl"],
)
def test_every_kind_of_draw_trains(tmp_path, name, knobs):
    """Pairs of scores, pairs of a group, lists with an interaction: what is learned falls."""
    dataset = list_teachers.listing_dataset(tmp_path / "d")
    more = {"lambda": 5.0, "l2": 0.0, "kernels": "xla"}
    experiment = list_teachers.experiment(dataset, tmp_path / "r", guidance=name, **more, **knobs)
    run_steps = step.make_run_steps(experiment.trainer)
    key = jax.random.key_data(jax.random.key(1))
    state, losses = init_state(experiment.trainer, 0), []
    for _ in range(2):
        state, sums, health = run_steps(state, experiment.arrays, key, jnp.int32(60))
        assert int(health.step) == -1
        losses.append(float(sums["guidance_loss"]) / max(float(sums["alpha"]), 1e-6))
        assert 0 < float(sums["alpha"]) / 60 <= 1
    assert losses[1] < losses[0]
    assert float(sums["agreement"]) / 60 > 0.6


@pytest.mark.parametrize("name", [*NUMPY])
def test_lists_that_say_nothing_of_other_items_are_refused(tmp_path, name):
    dataset = list_teachers.listing_dataset(tmp_path / "d", unlisted="unknown")
    with pytest.raises(ConfigError, match=rf"--guidance={name} takes.*unknown.*--unlisted=below"):
        list_teachers.experiment(dataset, tmp_path / "r", guidance=name)


def test_what_a_product_lacks_is_named_with_what_to_do(tmp_path):
    dataset = list_teachers.listing_dataset(tmp_path / "d", lengths=(2, 2, 0))

    def refused(error, match, **knobs):
        with pytest.raises(error, match=match):
            list_teachers.experiment(dataset, tmp_path / "r", **knobs)

    lines = [f"u{u},i0,i1,1.0" for u in range(N_USERS)]
    (tmp_path / "pairs.csv").write_text("\n".join(["user,preferred,other,margin", *lines]) + "\n")
    preferences.import_scores(dataset, tmp_path / "pairs.csv", "pairs")
    for name in config.DISTILLATIONS:
        refused(ConfigError, "teacher pairs", guidance=name, teacher="pairs")

    refused(InputError, r"no two of any of 30 groups.*lower --unkd_groups", guidance="unkd",
            unkd_groups=30)  # fmt: skip
    train = dataset.positives(("train",))
    lines = [f"u{u},i{i},{i}" for u in range(N_USERS) for i in range(N_ITEMS)
             if i not in train.row(u)]  # fmt: skip
    (tmp_path / "new.csv").write_text("\n".join(["user,item,score", *lines]) + "\n")
    new_ones = preferences.Provenance(unlisted="below")
    preferences.import_scores(dataset, tmp_path / "new.csv", "new", provenance=new_ones)
    refused(ConfigError, "scores of teacher new go from 0 to 29; use", guidance="kd",
            teacher="new", kd_scores="probability", unlisted_share=0.0)  # fmt: skip


def test_sample_weights_need_training_items_in_the_lists(tmp_path):
    dataset = list_teachers.listing_dataset(tmp_path / "d")
    train = dataset.positives(("train",))
    lines = [f"u{u},i{i},{i}" for u in range(N_USERS) for i in range(20) if i not in train.row(u)]
    (tmp_path / "new.csv").write_text("\n".join(["user,item,score", *lines]) + "\n")
    below = preferences.Provenance(unlisted="below")
    preferences.import_scores(dataset, tmp_path / "new.csv", "new", provenance=below)
    with pytest.raises(ConfigError, match=r"new lists no training item; drop it.*--keep_training"):
        list_teachers.experiment(
            dataset, tmp_path / "r", guidance="list_kl", teacher="new", list_kl_sample_weights=True
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"guidance": "cd", "cd_items": 30}, "--cd_items=30 is more than --cd_pool=20 to draw"),
        ({"guidance": "dcd", "dcd_interesting": 21}, "21 is more than --dcd_listed_pool=20"),
        ({"guidance": "dcd", "dcd_uninteresting": 41}, "41 is more than --dcd_unlisted_pool=40"),
        ({"guidance": "dllm2rec", "dllm2rec_position": 0.0, "dllm2rec_confidence": 0.0,
          "dllm2rec_consistency": 0.0}, "are all 0, which weighs every place by nothing; give"),
        ({"guidance": "list_kl", "list_kl_tail": 1.0}, "--list_kl_tail=1.0 must be less than 1"),
        ({"guidance": "rd", "cd_pool": 30}, "--cd_pool=30 is not used with --guidance=rd; add"),
        ({"guidance": "kd", "kd_scores": "cosine"}, "is not one of: .*probability"),
    ],
)  # fmt: skip
def test_knobs_that_contradict_each_other_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        make_run("d", "w", teacher="t", **knobs)
