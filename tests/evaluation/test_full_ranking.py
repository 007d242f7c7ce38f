"""Full ranking on the device against a plain NumPy one, and what it may not do."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
import worlds
from jax.sharding import AxisType, Mesh
from ranked_worlds import (
    World,
    by_vectors,
    check,
    factors,
    make_world,
    split_by_user,
    table,
)
from sklearn.metrics import roc_auc_score

from slgr_jax.config import EvaluationConfig, SliceConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError, NonFiniteError
from slgr_jax.evaluation import device_ranking, device_scoring, full_ranking, ranking_metrics
from slgr_jax.evaluation.placement import Placement


@pytest.fixture(params=["native", "xla"])
def kernels(request) -> str:
    """Who ranks."""
    if request.param == "native":
        worlds.need_native_kernels()
    return request.param


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("seed", "n_users", "n_items", "chunk"),
    [(0, 23, 70, 7), (1, 16, 128, 8), (2, 9, 257, 1024), (3, 40, 20, 1)],
)
def test_equals_plain_numpy(seed, n_users, n_items, chunk, ties, kernels):
    world = make_world(seed, n_users, n_items, ties=ties, overlap=seed % 2 == 1)
    ranked = world.rank(users_per_chunk=chunk, top_k=15, kernels=kernels)
    check(world, ranked, 15)
    assert 1 not in ranked.users  # has seen everything
    assert (seed % 2 == 1) == (ranked.n_dropped > 0)


def test_two_stage_lists_equal_the_sorted_order():
    """Long catalogue, short lists, many ties: the path that looks at blocks."""
    world = make_world(5, 12, 3000, ties=True, overlap=False)
    assert device_ranking._BLOCK * 4 * 5 <= 3000
    check(world, world.rank(top_k=5, kernels="xla"), 5)


@pytest.mark.slow
def test_chunks_and_padding_do_not_matter():
    world = make_world(8, 37, 90, ties=True, overlap=True)
    base = world.rank(users_per_chunk=64)
    for chunk in (1, 5, 36, 37, 38):
        _assert_same(world.rank(users_per_chunk=chunk), base)


def _assert_same(a: ranking_metrics.Ranking, b: ranking_metrics.Ranking) -> None:
    for field in dataclasses.fields(ranking_metrics.Ranking):
        left, right = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)


def test_item_order_does_not_matter():
    world = make_world(9, 20, 80, ties=False, overlap=False)
    order = np.random.default_rng(0).permutation(80)
    moved = World(world.scores[:, order], world.relevant[:, order], world.masked[:, order])
    a, b = world.rank(), moved.rank()
    assert a.pooled_auc == pytest.approx(b.pooled_auc, abs=1e-15)
    for row in range(a.users.size):
        pairs = slice(a.offsets[row], a.offsets[row + 1])
        before = dict(zip(a.items[pairs].tolist(), a.ranks[pairs].tolist(), strict=True))
        after = dict(zip(order[b.items[pairs]].tolist(), b.ranks[pairs].tolist(), strict=True))
        assert before == after
    listed = np.where(b.top_items < 0, -1, order[b.top_items])
    np.testing.assert_array_equal(a.top_items, listed)


def test_every_room_for_relevant_items(kernels):
    """1 to 300 relevant items: several compiled widths in one ranking."""
    rng = np.random.default_rng(4)
    relevant = np.zeros((12, 320), bool)
    for u, count in enumerate((1, 2, 15, 16, 17, 63, 64, 65, 128, 255, 256, 300)):
        relevant[u, rng.choice(320, count, replace=False)] = True
    scores = rng.integers(0, 50, relevant.shape).astype(np.float32)
    world = World(scores, relevant, np.zeros_like(relevant))
    check(world, world.rank(users_per_chunk=2, top_k=3, kernels=kernels), 3)


def test_masked_items_are_never_listed(kernels):
    world = make_world(6, 25, 60, ties=False, overlap=False)
    scores = world.scores + 100 * world.masked  # the model loves what is masked
    users = np.array([7, 3, 1, 24, 3], np.int32)
    with jax.transfer_guard("disallow"):
        top = full_ranking.top_k(
            table,
            jax.device_put(scores),
            users,
            world.csr[1],
            60,
            k=50,
            users_per_chunk=2,
            kernels=kernels,
        )
    assert top.users.tolist() == users.tolist()
    for row, u in enumerate(users):
        candidates = np.flatnonzero(~world.masked[u])
        order = candidates[np.argsort(-scores[u, candidates])][:50]
        assert top.items[row].tolist() == [*order, *([-1] * (50 - order.size))]
        assert top.scores[row, : order.size].tolist() == scores[u, order].tolist()
        assert np.all(top.scores[row, order.size :] == -np.inf)
    assert top.items[2].tolist() == [-1] * 50  # user 1 has seen everything


def test_lists_are_no_longer_than_the_catalogue():
    world = make_world(6, 5, 9, ties=False, overlap=False)
    assert world.rank(top_k=20).top_items.shape[1] == 9
    assert world.rank(top_k=0).top_items.shape[1] == 0


@pytest.mark.parametrize(
    "relevant_scores",
    [
        np.full(50, 0.5),
        np.concatenate([np.full(25, -3e38), np.full(25, 3e38)]),
        np.linspace(1, 1 + 1e-6, 50),
        np.concatenate([np.full(49, 1e-30), [1e30]]),
        np.geomspace(1e-20, 1e20, 50),
    ],
    ids=["equal", "extreme", "narrow", "outlier", "geometric"],
)
def test_pooled_auc_is_exact_for_awkward_scores(relevant_scores, kernels):
    """Scores that defeat the look-up table's equal cells; negatives equal and next to them."""
    positive = relevant_scores.astype(np.float32)
    near = [positive, np.nextafter(positive, np.float32(0)), np.nextafter(positive, np.float32(9))]
    scores = np.concatenate([positive, *near]).reshape(4, 50)
    relevant = np.zeros((4, 50), bool)
    relevant[0] = True
    # Spread the relevant items over the users.
    shuffle = np.random.default_rng(0).permutation(200)
    scores, relevant = (x.reshape(-1)[shuffle].reshape(4, 50) for x in (scores, relevant))
    world = World(scores, relevant, np.zeros_like(relevant))
    wins = np.sum(scores[relevant][:, None] > scores[~relevant][None, :])
    ties = np.sum(scores[relevant][:, None] == scores[~relevant][None, :])
    assert world.rank(kernels=kernels).pooled_auc == (2 * wins + ties) / (2 * 50 * 150)


def test_pooled_auc_sums_pass_32_bits(monkeypatch):
    """Sums of a row's counts beyond 2^31 are carried in digits: force many of them."""
    world = make_world(3, 30, 1000, ties=True, overlap=False)
    look_up = device_ranking.pool_chunk

    def narrow(*args, pieces, bits, **how):
        assert pieces == 1
        digits = jax.device_get(look_up(*args, pieces=5, bits=3, **how))
        assert digits[:, 4].any()
        return (digits << (3 * np.arange(5))).sum(axis=1, keepdims=True)

    base = world.rank(kernels="xla")
    monkeypatch.setattr(device_ranking, "pool_chunk", narrow)
    assert world.rank(kernels="xla").pooled_auc == base.pooled_auc


def test_pooled_auc_tiles_do_not_matter(monkeypatch):
    world = make_world(13, 10, 777, ties=True, overlap=False)
    base = world.rank(kernels="xla")
    monkeypatch.setattr(device_ranking, "_POOL_TILE", 1)
    jax.clear_caches()
    assert world.rank(kernels="xla").pooled_auc == base.pooled_auc


def test_nothing_relevant(kernels):
    world = make_world(0, 6, 12, ties=False, overlap=False)
    ranked = World(world.scores, np.zeros_like(world.relevant), world.masked).rank(kernels=kernels)
    assert ranked.users.size == ranked.items.size == 0
    assert ranked.offsets.tolist() == [0]
    assert np.isnan(ranked.pooled_auc)
    everything = World(world.scores, np.ones_like(world.relevant), world.masked & False).rank(
        kernels=kernels
    )
    assert np.isnan(everything.pooled_auc)
    assert set(everything.greater.tolist()) == {0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_the_user(bad, kernels):
    world = make_world(1, 9, 30, ties=False, overlap=False)
    world.relevant[5, 11] = True
    world.scores[5, 17] = bad
    with pytest.raises(NonFiniteError, match=r"1 of \d users .* index 5;"):
        world.rank(kernels=kernels)
    with pytest.raises(NonFiniteError, match="index 5;"):
        full_ranking.top_k(
            table,
            jax.device_put(world.scores),
            np.arange(9),
            world.csr[1],
            30,
            k=3,
            kernels=kernels,
        )


def test_a_model_of_another_catalogue_is_refused():
    world = make_world(1, 9, 30, ties=False, overlap=False)
    with pytest.raises(ConfigError, match=r"\(8, 30\), expected \(8, 31\)"):
        full_ranking.rank(table, jax.device_put(world.scores), *world.csr, 31)


def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    devices = np.array(jax.devices()[:8]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_eight_devices_equal_one(shape):
    world = make_world(21, 45, 700, ties=True, overlap=True)
    mesh = _mesh(shape, ("data", "table"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(world.scores, everywhere)
    split = jax.device_put(
        world.scores[:44], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("table"))
    )
    with jax.transfer_guard("disallow"):
        ranked = full_ranking.rank(
            table, state, *world.csr, 700, users_per_chunk=13, top_k=5, mesh=mesh
        )
        top = full_ranking.top_k(
            table, split, np.arange(44), world.csr[1], 700, k=5, users_per_chunk=13, mesh=mesh
        )
    _assert_same(ranked, world.rank(top_k=5))
    single = full_ranking.top_k(
        table, jax.device_put(world.scores), np.arange(44), world.csr[1], 700, k=5
    )
    np.testing.assert_array_equal(top.items, single.items)


def test_scores_are_split_over_the_devices():
    mesh = _mesh((8,), ("data",))
    seen = []

    def watched(state: jax.Array, users: jax.Array) -> jax.Array:
        seen.append(users.sharding if hasattr(users, "sharding") else None)
        return state[users]

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(np.zeros((64, 20), np.float32), everywhere)
    users = jax.device_put(np.arange(64, dtype=np.int32), Placement(mesh).by_user)
    scores = device_scoring.score_chunk(
        None, state, users, score_users=watched, n_items=20, at=Placement(mesh)
    )
    assert {shard.data.shape for shard in scores.addressable_shards} == {(8, 20)}
    assert len(seen) == 1


def test_one_model_is_traced_once_for_all_chunks_and_calls():
    world = make_world(2, 50, 40, ties=False, overlap=False)
    traces = []

    def counted(state: jax.Array, users: jax.Array) -> jax.Array:
        traces.append(users.shape)
        return state[users]

    state = jax.device_put(world.scores)
    relevant, seen = world.csr
    before = device_ranking.rank_chunk._cache_size()
    for _ in range(3):
        full_ranking.rank(counted, state, relevant, seen, 40, users_per_chunk=8)
    assert traces == [(8,)]
    # Rooms for 16 and 64 relevant items.
    assert device_ranking.rank_chunk._cache_size() - before == 2


def test_tied_dot_products_stay_tied_between_the_passes(kernels):
    """Items with equal factors tie exactly, in ranks and in the pooled AUC."""
    rng = np.random.default_rng(0)
    items = np.repeat(rng.normal(size=(50, 16)), 2, axis=0).astype(np.float32)
    users = rng.normal(size=(20, 16)).astype(np.float32)
    relevant = np.zeros((20, 100), bool)
    relevant[:, ::2] = True  # every relevant item has a twin that is not
    csr = Csr.from_pairs(*np.nonzero(relevant), 20)
    none = Csr(np.zeros(21, np.int64), np.zeros(0, np.int32))
    ranked = full_ranking.rank(
        factors, jax.device_put((users, items)), csr, none, 100, kernels=kernels
    )
    assert np.all(ranked.tied == 1)
    auc = ranking_metrics.per_user(ranked, (10,)).values["auc"]
    np.testing.assert_allclose(auc, 0.5, atol=1e-12)
    assert ranked.pooled_auc == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("who", ["native", "xla", "split"])
def test_items_ranked_among_themselves_are_a_catalogue_of_their_own(who):
    """The same as a world that has no other items, but for their numbers."""
    if who == "native":
        worlds.need_native_kernels()
    world = make_world(14, 37, 90, ties=True, overlap=True)
    among = np.random.default_rng(0).random(90) < 0.4
    own = World(world.scores[:, among], world.relevant[:, among], world.masked[:, among])
    how = split_by_user(world, 4) if who == "split" else {"state": jax.device_put(world.scores)}
    state, kernels = how.pop("state"), "native" if who == "native" else "xla"
    ranked = full_ranking.rank(
        table, state, *world.csr, 90, users_per_chunk=16, among=among, kernels=kernels, **how
    )
    expected = own.rank(top_k=0, pooled_auc=False)
    assert ranked.n_dropped == expected.n_dropped > 0
    np.testing.assert_array_equal(ranked.items, np.flatnonzero(among)[expected.items])
    same = dataclasses.replace(ranked, items=expected.items)
    _assert_same(same, expected)


def test_slices_that_are_ranked_apart(tmp_path):
    """Recall and AUC of tail items among tail items, by sorting each user's scores."""
    dataset = worlds.random_dataset(tmp_path / "data")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(dataset.n_users, dataset.n_items)).astype(np.float32)
    slices = SliceConfig(tail_item_fraction=0.5)
    config = EvaluationConfig(ks=(3,), rank_apart=True)
    parts = full_ranking.evaluate_dataset(table, jax.device_put(scores), dataset, slices, config)
    tail = dataset.slices(slices).tail_items
    for name, group in (("tail_items_apart", tail), ("head_items_apart", ~tail)):
        recalls, aucs = [], []
        for u in range(dataset.n_users):
            hidden = set(dataset.positives(("train", "valid")).row(u).tolist())
            free = [i for i in np.argsort(-scores[u]).tolist() if group[i] and i not in hidden]
            wanted = set(dataset.positives(("test",)).row(u).tolist()) & set(free)
            if not wanted:
                continue
            recalls.append(len(wanted & set(free[:3])) / len(wanted))
            labels = [i in wanted for i in free]
            if not all(labels):
                aucs.append(roc_auc_score(labels, scores[u, free]))
        values = parts["test"].slices[name]
        assert values["n"] == len(recalls) > 5
        assert values["recall@3"] == pytest.approx(np.mean(recalls))
        assert values["auc"] == pytest.approx(np.mean(aucs))
        assert parts["test"].users[name.replace("_items", "")].users.size == len(recalls)
    usual = full_ranking.evaluate_dataset(
        table,
        jax.device_put(scores),
        dataset,
        slices,
        dataclasses.replace(config, rank_apart=False),
    )
    assert not set(ranking_metrics.APART) & set(usual["test"].slices)
    assert usual["test"].slices["tail_items"] == parts["test"].slices["tail_items"]


def test_vectors_are_ranked_as_their_products():
    """Ranks, lists, lists with filters, by a model whose vectors may be asked for; exact sums."""
    worlds.need_native_kernels()
    rng = np.random.default_rng(1)
    users, items = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (70, 90))
    base = make_world(3, 70, 90, ties=True, overlap=True)
    world = World(users @ items.T + np.float32(0), base.relevant, base.masked)
    state, csr = jax.device_put((users, items)), world.csr
    with jax.transfer_guard("disallow"):
        ranked = full_ranking.rank(by_vectors, state, *csr, 90, users_per_chunk=32, top_k=15)
    check(world, ranked, 15)

    asked = rng.integers(0, 70, 50).astype(np.int32)
    by = {
        model: full_ranking.TopLists(model, state, csr[1], 90, k=7, users_per_chunk=16)
        for model in (by_vectors, factors)
    }
    allowed = rng.random(90) < 0.5
    for listable in (None, allowed):
        got, expected = (
            lists(asked, None if listable is None else lists.put(listable, None))
            for lists in by.values()
        )
        np.testing.assert_array_equal(got.items, expected.items)
        np.testing.assert_array_equal(got.scores, expected.scores)


def test_vectors_of_another_catalogue_are_refused():
    worlds.need_native_kernels()
    world = make_world(3, 5, 30, ties=False, overlap=False)
    state = jax.device_put((np.zeros((5, 4), np.float32), np.zeros((30, 4), np.float32)))
    with pytest.raises(ConfigError, match="vectors of 30 items, expected 31"):
        full_ranking.rank(by_vectors, state, *world.csr, 31)


@pytest.mark.parametrize("model", [factors, by_vectors], ids=["matrix", "vectors"])
def test_one_ranker_ranks_one_state_after_another(model):
    """Each as `rank` does, and none is kept."""
    world = make_world(11, 40, 60, ties=False, overlap=True)
    rng = np.random.default_rng(2)
    ranker = full_ranking.Ranker(model, *world.csr, 60, users_per_chunk=16, pooled_auc=False)
    for _ in range(3):
        state = jax.device_put(tuple(rng.normal(size=(n, 8)).astype(np.float32) for n in (40, 60)))
        expected = full_ranking.rank(
            model, state, *world.csr, 60, users_per_chunk=16, pooled_auc=False
        )
        _assert_same(ranker(state), expected)
        held = [weakref.ref(leaf) for leaf in state]
        del state
        gc.collect()
        assert not any(ref() for ref in held)


def test_evaluate_dataset_masks_what_it_says(tmp_path):
    dataset = worlds.random_dataset(tmp_path / "data")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(dataset.n_users, dataset.n_items)).astype(np.float32)
    config = EvaluationConfig(ks=(3, 5))
    with jax.transfer_guard("disallow"):
        parts = full_ranking.evaluate_dataset(
            table, jax.device_put(scores), dataset, SliceConfig(), config
        )
    assert list(parts) == ["valid", "test"]
    for part, masks in (("valid", ("train",)), ("test", ("train", "valid"))):
        recalls = []
        for u in range(dataset.n_users):
            hidden = {i for name in masks for i in dataset.positives((name,)).row(u).tolist()}
            wanted = set(dataset.positives((part,)).row(u).tolist()) - hidden
            order = [i for i in np.argsort(-scores[u]).tolist() if i not in hidden]
            if wanted:
                recalls.append(len(wanted & set(order[:3])) / len(wanted))
        assert parts[part].slices["overall"]["n"] == len(recalls)
        assert parts[part].slices["overall"]["recall@3"] == pytest.approx(np.mean(recalls))
        assert parts[part].data.masked == masks
        assert 0 < parts[part].slices["overall"]["auc_pooled"] < 1


@pytest.mark.parametrize("who", ["native", "xla", "mesh"])
def test_lists_hold_what_may_be_listed(who):
    if who == "native":
        worlds.need_native_kernels()
    world = make_world(5, 37, 300, ties=True, overlap=False)
    rng = np.random.default_rng(0)
    allowed, only = rng.random(300) < 0.3, rng.random((37, 300)) < 0.2
    only[3] = False  # a user who may get nothing
    mesh = _mesh((8,), ("data",)) if who == "mesh" else None
    lists = full_ranking.TopLists(
        table,
        _everywhere(world.scores, mesh),
        world.csr[1],
        300,
        k=9,
        users_per_chunk=16,
        mesh=mesh,
        kernels="xla" if who == "mesh" else who,
    )
    users = rng.permutation(37)
    for everybody, own in ((allowed, None), (None, only), (allowed, only)):
        rows = None if own is None else Csr.from_pairs(*np.nonzero(own), 37)
        top = lists(users, lists.put(everybody, rows))
        for row, user in enumerate(users):
            free = ~world.masked[user]
            free &= True if everybody is None else everybody
            free &= True if own is None else own[user]
            best = np.argsort(-np.where(free, world.scores[user], -np.inf), kind="stable")
            wanted = best[: min(9, int(free.sum()))]
            assert top.items[row].tolist() == [*wanted, *[-1] * (9 - wanted.size)]
            np.testing.assert_array_equal(
                top.scores[row][: wanted.size], world.scores[user][wanted]
            )
            assert np.isneginf(top.scores[row][wanted.size :]).all()
    assert lists.put(None, None) is None


def _everywhere(scores: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """The scores whole on every device."""
    if mesh is None:
        return jax.device_put(scores)
    return jax.device_put(scores, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
