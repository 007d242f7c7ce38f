"""LightGCN against dense float64 matrices, by XLA and by the CPU kernel."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from slgr_jax.data.dataset import Csr
from slgr_jax.mesh import UserShards, make_layout, sum_over_parts
from slgr_jax.models.backbones import lightgcn
from slgr_jax.models.backbones.lightgcn import LightGCN, Propagation
from slgr_jax.sampling import random_bits, user_context
from slgr_jax.sampling.context import Context, Graph, Queries

USERS, ITEMS, D, K = 11, 17, 5, 3


@pytest.fixture(params=["xla", "native"])
def native(request):
    if request.param == "native":
        worlds.need_native_kernels()
    return request.param == "native"


def _touched(seed=0):
    """[U, I] bool: users and items without any edge at both ends and within, and one full row."""
    touched = np.random.default_rng(seed).random((USERS, ITEMS)) < 0.4
    touched[4] = True
    touched[[0, 6, USERS - 1]] = False
    touched[:, [0, 9, ITEMS - 1]] = False
    return touched


def _graph(touched):
    users, items = np.nonzero(touched)
    by_user = Csr.from_pairs(users, items, touched.shape[0])
    by_item = Csr.from_pairs(items, users, touched.shape[1])
    arrays = (by_user.offsets, by_user.indices, by_item.offsets, by_item.indices)
    return Graph(*(jnp.asarray(x, jnp.int32) for x in arrays))


def _adjacency(touched, kept=None, rate=0.0):
    """[U + I, U + I] float64: D^-1/2 A D^-1/2 with the degrees of `touched`."""
    users, items = touched.shape
    whole = np.zeros((users + items, users + items))
    for u in range(users):
        for i in range(items):
            if touched[u, i] and (kept is None or kept[u, i]):
                degrees = touched[u].sum() * touched[:, i].sum()
                whole[u, users + i] = whole[users + i, u] = 1 / np.sqrt(degrees) / (1 - rate)
    return whole


def _smoothing(adjacency, layers):
    """The mean of its powers 0 .. K."""
    powers = [np.linalg.matrix_power(adjacency, k) for k in range(layers + 1)]
    return np.mean(powers, axis=0)


def _values(width=D, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "user": jnp.asarray(rng.normal(size=(USERS, width)), jnp.float32),
        "item": jnp.asarray(rng.normal(size=(ITEMS, width)), jnp.float32),
    }


def _stacked(tables):
    return np.concatenate([np.asarray(tables["user"]), np.asarray(tables["item"])], axis=0)


@functools.cache
def _model(native, layers=K):
    model = LightGCN(
        n_users=USERS,
        n_items=ITEMS,
        dim=D,
        layers=layers,
        init_std=0.1,
        dropout=0.25,
        native=native,
    )

    @functools.partial(jax.jit, static_argnames="rate")
    def run(values, graph, key=None, rate=None):
        """The result, and its cotangents' way back to `values`."""
        dropout = None if key is None else (rate, key)

        def propagate(values):
            return model.propagate({}, values, Context(graph=graph), dropout=dropout)

        out, back = jax.vjp(propagate, values)
        return out, back(out)[0]

    return model, run


def test_propagate_and_its_gradient_equal_dense_matrices(native):
    """d <w, P E> / dE = P^T w; here w = P E."""
    touched, values = _touched(), _values()
    smoothing = _smoothing(_adjacency(touched), K)
    out, back = _model(native)[1](values, _graph(touched))
    wanted = smoothing @ _stacked(values)
    np.testing.assert_allclose(_stacked(out), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_stacked(back), smoothing.T @ wanted, rtol=1e-5, atol=1e-6)
    # Of rows without edges only layer 0 is left, to the bit.
    for row in (0, 6, USERS - 1):
        np.testing.assert_array_equal(out["user"][row], values["user"][row] / (K + 1))
    for row in (0, 9, ITEMS - 1):
        np.testing.assert_array_equal(out["item"][row], values["item"][row] / (K + 1))


def test_gathering_in_parts_changes_nothing(monkeypatch):
    """Two tiles at a time, the last part not full; a row's edges lie in several parts."""
    values, graph, key = _values(), _graph(_touched()), jax.random.key(3)
    monkeypatch.setattr(lightgcn, "GATHERED", 2 * lightgcn.TILE * D + 1)
    parts = Propagation(K, False, 0.25)
    words, tables = lightgcn.edge_words(key, USERS, ITEMS), (values["user"], values["item"])
    got = jax.jit(functools.partial(lightgcn.propagate, parts))(tables, graph, words)
    monkeypatch.undo()
    wanted, _ = _model(False)[1](values, graph, key, 0.25)
    np.testing.assert_allclose(got[0], wanted["user"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], wanted["item"], rtol=1e-5, atol=1e-6)


def test_the_last_part_is_summed_where_every_tile_is_used(monkeypatch):
    """Three couples, six tiles in parts of four: one layer gives (p + q) / 2 to both."""
    graph, tables = _graph(np.eye(3, dtype=bool)), tuple(x[:3] for x in _values().values())
    monkeypatch.setattr(lightgcn, "GATHERED", 4 * lightgcn.TILE * D)
    for got in lightgcn.propagate(Propagation(1, False), tables, graph, None):
        np.testing.assert_allclose(got, (tables[0] + tables[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(("devices", "rate"), [(1, 0.0), (4, 0.0), (4, 0.25)])
def test_devices_with_their_own_users_propagate_as_one(devices, rate):
    """Of all users' dense matrix, forward and back, with as many edges dropped in both orders.

    A device's loss is <users' rows that it has, w> + its share of <items' rows, w>.
    """
    touched, values = _touched(), _values()
    layout = make_layout(devices=jax.devices()[:devices])
    users = UserShards.deal(touched.sum(axis=1), 4)
    layout = dataclasses.replace(layout, users=users)
    context = Context(graph=jax.device_get(_graph(touched)))
    placed = user_context.put(context, layout)
    rows = np.random.default_rng(2).normal(size=(users.table_rows, D)).astype(np.float32)
    rows[users.row] = values["user"]  # the other rows are nobody's
    weights = {name: jax.random.normal(jax.random.key(3), x.shape) for name, x in values.items()}
    of_rows = np.zeros_like(rows)
    of_rows[users.row] = weights["user"]
    model, dropout = _model(False)[0], (rate, jax.random.key(7)) if rate else None

    def local(user, item, of_user, graph):
        def loss(values):
            out = model.propagate({}, values, Context(graph=graph), dropout=dropout)
            of_items = jnp.sum(out["item"] * weights["item"]) / devices
            return jnp.sum(out["user"] * of_user) + of_items, out

        back, out = jax.grad(loss, has_aux=True)({"user": user, "item": item})
        return out, {**back, "item": sum_over_parts(back["item"])}

    lanes, whole = layout.batch_spec, jax.sharding.PartitionSpec()
    of_tables, of_graph = {"user": lanes, "item": whole}, user_context.specs(placed, layout).graph
    specs = (lanes, whole, lanes, of_graph)
    run = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=(of_tables, of_tables),
        check_vma=False,
    )
    run = local if devices == 1 else run
    out, back = jax.device_get(jax.jit(run)(rows, values["item"], of_rows, placed.graph))
    kept = None
    if rate:
        words = lightgcn.edge_words(dropout[1], users.table_rows, ITEMS)
        mixed = random_bits.mixed(words[0][users.row][:, None] + words[1][None, :])
        kept = np.asarray(mixed) >= 2**30
        assert 0 < (touched & kept).sum() < touched.sum()
    smoothing = _smoothing(_adjacency(touched, kept, rate), K)
    for got, given in ((out, values), (back, weights)):
        of_users = {**got, "user": got["user"][users.row]}
        wanted = smoothing @ _stacked(given)
        np.testing.assert_allclose(_stacked(of_users), wanted, rtol=1e-5, atol=1e-6)


def _identity():
    """Tables whose columns are the unit vectors: the result is the matrix that propagates."""
    eye = jnp.eye(USERS + ITEMS, dtype=jnp.float32)
    return {"user": eye[:USERS], "item": eye[USERS:]}


def _one_layer(native, key, rate):
    """The [U + I, U + I] matrix that one layer multiplies by."""
    out, _ = _model(native, 1)[1](_identity(), _graph(_touched()), key, rate)
    return 2 * _stacked(out) - np.eye(USERS + ITEMS)


def test_a_pass_drops_edges_in_both_directions_and_all_layers(native):
    touched, rate, key = _touched(), 0.25, jax.random.key(7)
    one = _one_layer(native, key, rate)
    np.testing.assert_array_equal(one != 0, (one != 0).T)
    assert not one[:USERS, :USERS].any()
    assert not one[USERS:, USERS:].any()
    kept = one[:USERS, USERS:] != 0
    assert (kept <= touched).all()
    assert 0 < kept.sum() < touched.sum()
    adjacency = _adjacency(touched, kept, rate)  # degrees of the whole graph
    np.testing.assert_allclose(one, adjacency, rtol=1e-5, atol=1e-6)
    smoothing, values = _smoothing(adjacency, K), _values()
    out, back = _model(native)[1](values, _graph(touched), key, rate)
    wanted = smoothing @ _stacked(values)
    np.testing.assert_allclose(_stacked(out), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_stacked(back), smoothing.T @ wanted, rtol=1e-5, atol=1e-6)
    other = _one_layer(native, jax.random.key(8), rate)
    assert ((other != 0) != (one != 0)).any()


def test_dropped_edges_are_those_whose_word_is_small(native):
    """The definition, in Python's integers."""
    rate, key, touched = 0.25, jax.random.key(9), _touched()
    words = [np.asarray(x).astype(object) for x in lightgcn.edge_words(key, USERS, ITEMS)]
    one = _one_layer(native, key, rate)
    for u, i in zip(*np.nonzero(touched), strict=True):
        x = (words[0][u] + words[1][i]) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        assert (one[u, USERS + i] != 0) == ((x ^ x >> 16) >= 2**30)


def test_a_rate_of_zero_is_the_pass_without_dropout():
    run, values, graph = _model(False)[1], _values(), _graph(_touched())
    plain = run.lower(values, graph).as_text()
    assert run.lower(values, graph, rate=0.25).as_text() == plain  # no key, no dropout
    found = {
        rate: run.lower(values, graph, jax.random.key(9), rate).as_text() for rate in (0.0, 0.25)
    }
    assert found[0.0].count("\n") == plain.count("\n") < found[0.25].count("\n")


def test_fates_of_edges_are_independent_and_of_the_right_rate():
    """Over keys: each edge's share of drops, and the correlation of every two edges."""
    n_keys, rate = 4000, 0.3
    keys = jax.random.split(jax.random.key(0), n_keys)
    users, items = jax.jit(jax.vmap(lambda key: lightgcn.edge_words(key, 6, 7)))(keys)
    words = random_bits.mixed(users[:, :, None] + items[:, None, :]).reshape(n_keys, -1)
    drops = np.asarray(words) < Propagation(1, False, rate).threshold
    error = np.sqrt(rate * (1 - rate) / n_keys)
    np.testing.assert_allclose(drops.mean(axis=0), rate, atol=4.5 * error)
    correlation = np.corrcoef(drops.T) - np.eye(42)
    assert np.abs(correlation).max() < 5 / np.sqrt(n_keys)


def test_passes_with_many_keys_at_once(native):
    """Uncertainty by dropout runs passes under vmap: each is the pass with its key, and their
    mean after one layer is the pass without dropout."""
    model, values, graph = _model(native, 1)[0], _identity(), _graph(_touched())
    keys, rate = jax.random.split(jax.random.key(1), 300), 0.25

    def one(key, graph):
        out = model.propagate({}, values, Context(graph=graph), dropout=(rate, key))
        return 2 * jnp.concatenate([out["user"], out["item"]])

    passes = np.asarray(jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, graph))
    passes = passes - np.eye(USERS + ITEMS)[None]
    np.testing.assert_allclose(passes[5], _one_layer(native, keys[5], rate), rtol=1e-6, atol=1e-7)
    adjacency = _adjacency(_touched())
    error = adjacency * np.sqrt(rate / (1 - rate) / len(keys))
    assert (np.abs(passes.mean(axis=0) - adjacency) <= 4.5 * error + 1e-6).all()


def test_scores_are_dot_products_of_propagated_rows():
    model, values, context = _model(False)[0], _values(), Context(graph=_graph(_touched()))
    final = _model(False)[1](values, context.graph)[0]
    queries, items = Queries(jnp.array([4, 0])), jnp.array([[1, 9], [2, 2]])
    (users,) = model.query_ids(context, queries).values()
    rows = {"user": final["user"][users]}
    query = model.query_vectors({}, rows, context, queries, dropout=(0.25, jax.random.key(0)))
    (wanted,) = model.item_ids(context, items).values()
    vectors = model.item_vectors({}, {"item": final["item"][wanted]})
    smoothed = _smoothing(_adjacency(_touched()), K) @ _stacked(values)
    for n, user in enumerate((4, 0)):
        for c in range(2):
            score = smoothed[user] @ smoothed[USERS + int(items[n, c])]
            assert float(query[n] @ vectors[n, c]) == pytest.approx(score, rel=1e-4, abs=1e-6)
    assert {name: (spec.rows, spec.width) for name, spec in model.tables.items()} == {
        "user": (USERS, D),
        "item": (ITEMS, D),
    }
    assert model.dropout == 0.25
    assert model.init(jax.random.key(0)) == {}
