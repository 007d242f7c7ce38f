"""Sequence backbones against plain numpy in float64; what a state may not see, it does not see."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_vjp
from scipy.special import erf, expit

from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones.attention import Drop
from slgr_jax.models.backbones.base import dots
from slgr_jax.models.backbones.bert4rec import ONLY_LAST, BERT4Rec, cloze_places
from slgr_jax.models.backbones.gru4rec import GRU4Rec
from slgr_jax.models.backbones.sasrec import SASRec
from slgr_jax.sampling.context import Context, Histories, Queries

ITEMS, WIDTH, LENGTH, HEADS = 9, 8, 5, 2
LAYERS = 2
COMMON = {"n_items": ITEMS, "dim": WIDTH, "layers": LAYERS, "init_std": 0.5}
MAKERS = {
    "sasrec": functools.partial(SASRec, **COMMON, heads=HEADS, hidden=12),
    "gru4rec": functools.partial(GRU4Rec, **COMMON, hidden=6),
    "bert4rec": functools.partial(BERT4Rec, **COMMON, heads=HEADS, hidden=12, mask_probability=0.4),
}
# Users with more events than L, with fewer, with none, and with L.
HISTORY_OF = [[3, 1, 4, 1, 5, 8, 2], [6, 5], [], [7, 0, 7, 2, 3]]
CONTEXT = Context(
    Histories(
        jnp.asarray(np.cumsum([0, *map(len, HISTORY_OF)]), jnp.int32),
        jnp.asarray(np.concatenate(HISTORY_OF), jnp.int32),
        jnp.asarray([len(history) for history in HISTORY_OF], jnp.int32),
    )
)
USERS, UNTIL = [0, 0, 0, 1, 1, 2, 3], [7, 4, 1, 2, 0, 0, 5]
QUERIES = Queries(jnp.asarray(USERS, jnp.int32), jnp.asarray(UNTIL, jnp.int32))


# Nearly all the time of these tests is compilation.
_quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _make(name, *, dropout=0.0, length=LENGTH, **changes):
    return MAKERS[name](length=length, dropout=dropout, **changes)


@functools.cache
def _params(name, layers=LAYERS):
    """Every number random: no bias is 0 and no scale 1."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.4 * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(_make(name, layers=layers).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _table():
    return np.random.default_rng(2).normal(size=(ITEMS, WIDTH)).astype(np.float32)


def _programs(backbone):
    """(query vectors from rows, window), compiled."""

    @_quick_jit
    def vectors(params, rows, queries):
        return backbone.query_vectors(params, {"item": rows}, CONTEXT, queries, dropout=None)

    @_quick_jit
    def window(params, events, there, key):
        return backbone.window(params, events, there, key=key)

    return vectors, window


@functools.cache
def _shared(name):
    return _programs(_make(name))


def _rows(backbone, queries):
    return _table()[np.asarray(backbone.query_ids(CONTEXT, queries)["item"])]


def _queries(users, as_of):
    return Queries(jnp.asarray(users, jnp.int32), jnp.asarray(as_of, jnp.int32))


def _vectors(name, params=None, queries=None):
    """Query vectors by the shared program; it is compiled for len(USERS) queries."""
    params, queries = params or _params(name), queries or QUERIES
    return np.asarray(_shared(name)[0](params, _rows(_make(name), queries), queries))


# One window of each number of real events; the places before them hold rows of their own.
_THERE = np.arange(LENGTH + 1)[None, :] >= np.arange(LENGTH + 2)[:, None]
_EVENTS = np.random.default_rng(3).normal(size=(*_THERE.shape, WIDTH)).astype(np.float32)


def _window(name, params=None, events=_EVENTS, there=_THERE, seed=0):
    params = _params(name) if params is None else params
    return jax.tree.map(np.asarray, _shared(name)[1](params, events, there, jax.random.key(seed)))


# The oracle: one sequence at a time, real events only, float64.


def _double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return p["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + p["bias"]


def _affine(p, x):
    return x @ p["kernel"] + p["bias"]


def _gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def _transformer(p, x, positions, causal):
    """States of the n events x [n, D] at `positions` of the sequence."""
    x = x + p["positions"][positions]
    for layer in range(LAYERS):
        q = p[f"block_{layer}"]
        query, key, value = np.split(_affine(q["qkv"], _norm(q["attention_norm"], x)), 3, axis=1)
        mixed, width = np.zeros_like(x), WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(x)):
                seen = t + 1 if causal else len(x)
                weight = np.exp(key[:seen, part] @ query[t, part] / math.sqrt(width))
                mixed[t, part] = weight / weight.sum() @ value[:seen, part]
        x = x + _affine(q["attended"], mixed)
        x = x + _affine(q["outer"], _gelu(_affine(q["inner"], _norm(q["forward_norm"], x))))
    return _norm(p["norm"], x)


def _recurrent(p, x):
    for layer in range(LAYERS):
        q = p[f"layer_{layer}"]
        w_r, w_z, w_n = np.split(q["input"]["kernel"], 3, axis=1)
        b_r, b_z, b_n = np.split(q["input"]["bias"], 3)
        u_r, u_z, u_n = np.split(q["recurrent"], 3, axis=1)
        h, states = np.zeros(len(u_r)), []
        for event in x:
            r = expit(event @ w_r + b_r + h @ u_r)
            z = expit(event @ w_z + b_z + h @ u_z)
            n = np.tanh(event @ w_n + b_n + r * (h @ u_n + q["reset_bias"]))
            h = (1 - z) * n + z * h
            states.append(h)
        x = np.array(states)
    return _affine(p["output"], x)


def _next_states(name, p, rows, last):
    """SASRec's and GRU4Rec's states after each of rows [n, D], of which the last is at `last`."""
    scaled = rows * math.sqrt(WIDTH)
    if name == "gru4rec":
        return _recurrent(p, scaled)
    return _transformer(p, scaled, np.arange(len(rows)) + last + 1 - len(rows), causal=True)


def _cloze_states(p, rows, masked, last):
    x = np.where(masked[:, None], p["mask"], rows * math.sqrt(WIDTH))
    h = _transformer(p["encoder"], x, np.arange(len(rows)) + last + 1 - len(rows), causal=False)
    return _norm(p["output_norm"], _gelu(_affine(p["output"], h)))


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_scores_equal_numpy(name):
    """Scores of the whole catalogue, from real events alone; without any, what all states share."""
    p, table = _double(_params(name)), _table().astype(np.float64)
    backbone, items = _make(name), np.tile(np.arange(ITEMS), (len(USERS), 1))
    rows = {"item": _table()[backbone.item_ids(CONTEXT, items)["item"]]}
    got = dots(_vectors(name), backbone.item_vectors(_params(name), rows))
    for n, (user, as_of) in enumerate(zip(USERS, UNTIL, strict=True)):
        rows = table[HISTORY_OF[user][:as_of]]
        if name == "bert4rec":
            rows = np.concatenate([rows[-(LENGTH - 1) :], np.full((1, WIDTH), np.nan)])
            masked = np.arange(len(rows)) == len(rows) - 1
            expected = _cloze_states(p, rows, masked, LENGTH - 1)[-1]
        elif as_of == 0:
            expected = p["norm"]["bias"] if name == "sasrec" else p["output"]["bias"]
        else:
            expected = _next_states(name, p, rows[-LENGTH:], LENGTH - 1)[-1]
        _close(got[n], table @ expected)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_window_of_next_events_equals_numpy(name):
    window, p = _window(name), _double(_params(name))
    np.testing.assert_array_equal(window.place, np.arange(1, LENGTH + 1))
    for n, there in enumerate(_THERE):
        predicts = [float(there[k] and there[k + 1]) for k in range(LENGTH)]
        np.testing.assert_array_equal(window.weights[n], predicts)
        rows = _EVENTS[n, :-1][there[:-1]].astype(np.float64)
        if len(rows):
            expected = _next_states(name, p, rows, LENGTH - 1)
            _close(window.states[n, LENGTH - len(rows) :], expected)


def test_cloze_window_equals_numpy():
    """Which events were masked is read off the targets; the states then follow."""
    p, checked = _double(_params("bert4rec")), 0
    for seed in range(3):
        window = _window("bert4rec", seed=seed)
        assert window.states.shape == (len(_THERE), 2, WIDTH)  # T = 0.4 L
        for n, there in enumerate(_THERE[:, 1:]):
            targets = window.place[n][window.weights[n] > 0] - 1
            assert there[targets].all()
            assert (len(targets) > 0) == there.any()
            masked = np.isin(np.arange(LENGTH), targets)[there]
            if not there.any():
                continue
            states = np.zeros((LENGTH, WIDTH))
            rows = _EVENTS[n, 1:][there].astype(np.float64)
            states[there] = _cloze_states(p, rows, masked, LENGTH - 1)
            _close(window.states[n][window.weights[n] > 0], states[targets])
            checked += len(targets)
    assert checked > 15


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_a_later_event_changes_no_earlier_state(name):
    plain = _window(name).states
    for k in range(1, LENGTH):
        changed = _EVENTS.copy()
        changed[:, k] = changed[:, k - 1]
        got = _window(name, events=changed).states
        np.testing.assert_array_equal(got[:, :k], plain[:, :k])
        assert (got[0, k:] != plain[0, k:]).all()


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_a_place_of_a_window_is_a_query_at_its_moment(name):
    """Training and scoring agree: exactly the same function but for SASRec's positions, which
    count back from the latest event of what is read; they are set to 0 here."""
    params = _params(name)
    if name == "sasrec":
        params = {**params, "positions": jnp.zeros_like(params["positions"])}
    history = HISTORY_OF[0][: LENGTH + 1]
    window = _window(name, params, events=np.tile(_table()[history], (len(_THERE), 1, 1)))
    queries = _queries([0] * 7, [1, 2, 3, 4, 5, 5, 5])
    _close(window.states[0], _vectors(name, params, queries)[:LENGTH])


@pytest.mark.parametrize("name", MAKERS)
def test_padding_influences_nothing(name):
    """Rows of places without an event: not in a query, not in a window."""
    rows = _rows(_make(name), QUERIES)
    length = rows.shape[1]
    there = np.asarray(UNTIL)[:, None] + np.arange(length) - length >= 0
    other = np.where(there[..., None], rows, 7.0 * rows[:, ::-1] + 1.0)
    got = _shared(name)[0](_params(name), other, QUERIES)
    np.testing.assert_array_equal(got, _vectors(name))
    window = _window(name)
    got = _window(name, events=np.where(_THERE[..., None], _EVENTS, 7.0 * _EVENTS[::-1] + 1.0))
    real = window.weights > 0
    np.testing.assert_array_equal(got.states[real], window.states[real])


@pytest.mark.parametrize("name", MAKERS)
def test_a_longer_window_gives_a_short_history_the_same_vector(name):
    """Positions count from the latest event: the last L of a longer table are those of L."""
    longer = _params(name)
    if name != "gru4rec":
        inner = longer if name == "sasrec" else longer["encoder"]
        more = np.concatenate([np.ones((3, WIDTH), np.float32), inner["positions"]])
        inner = {**inner, "positions": more}
        longer = inner if name == "sasrec" else {**longer, "encoder": inner}
    backbone = _make(name, length=LENGTH + 3)
    got = _programs(backbone)[0](longer, _rows(backbone, QUERIES), QUERIES)
    short = np.asarray(UNTIL) < LENGTH
    _close(got[short], _vectors(name)[short])
    assert (np.abs(got[0] - _vectors(name)[0]) > 1e-4).all()  # 7 events are more than L


def test_a_masked_target_does_not_leak():
    """No state depends on the row of an event that a mask hides; on others every state does."""
    window = _window("bert4rec")
    hidden = np.zeros(_THERE.shape, bool)
    for n, places in enumerate(window.place):
        hidden[n, places[window.weights[n] > 0]] = True
    got = _window("bert4rec", events=np.where(hidden[..., None], _EVENTS[:, ::-1], _EVENTS))
    np.testing.assert_array_equal(got.states, window.states)
    seen = ~hidden & _THERE
    seen[:, 0] = False  # the event before the last L is not read
    got = _window("bert4rec", events=np.where(seen[..., None], -_EVENTS, _EVENTS))
    reads = (window.weights > 0) & seen.any(axis=1, keepdims=True)
    assert (got.states[reads] != window.states[reads]).all()


def test_masks_are_a_share_of_the_real_events():
    windows, length, probability = 6000, 12, 0.3
    real = np.arange(windows) % (length + 1)
    there = np.arange(length)[None, :] >= length - real[:, None]
    draw = _quick_jit(functools.partial(cloze_places, probability=probability))
    places, chosen = map(np.asarray, draw(jax.random.key(4), jnp.asarray(there)))
    assert places.shape == chosen.shape == (windows, 4)
    masked = np.zeros((windows, length), int)
    np.add.at(masked, (np.nonzero(chosen)[0], places[chosen]), 1)
    assert masked.max() == 1
    assert not masked[~there].any()
    count, share = masked.sum(axis=1), np.floor(probability * real + 0.5)
    usual = np.where(real > 0, np.maximum(share, 1), 0)
    only_last = (count != usual) | ((usual == 1) & (masked[:, -1] == 1))
    assert (masked[only_last].sum(axis=1) == 1).all()
    assert masked[only_last, -1].all()
    # Where several are masked as a rule, a single one is the last, one time in eleven.
    many = usual > 1
    off = 4 * math.sqrt(ONLY_LAST * (1 - ONLY_LAST) / many.sum())
    assert abs(only_last[many].mean() - ONLY_LAST) < off
    # Otherwise each real place is masked equally often.
    full = masked[(real == length) & ~only_last]
    assert (np.abs(full.mean(axis=0) - 4 / 12) < 4 * math.sqrt(2 / 9 / len(full))).all()
    again = np.asarray(draw(jax.random.key(5), jnp.asarray(there))[0])
    assert (again != places)[real == length].any(axis=1).mean() > 0.9


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name):
    """Of every parameter and row, through padding and masks."""
    backbone = _make(name, layers=1)
    there, key = jnp.asarray(_THERE[[0, 3]]), jax.random.key(0)
    mix = np.random.default_rng(5).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    flat, unravel = ravel_pytree((_params(name, layers=1), jnp.asarray(_EVENTS[[0, 3]])))

    @_quick_jit
    @jax.value_and_grad
    def objective(flat):
        params, events = unravel(flat)
        window = backbone.window(params, events, there, key=key)
        kept = window.states * window.weights[:, :, None]
        return jnp.sum(kept * mix[:, : kept.shape[1]])

    def pulled_back(flat):
        value, gradient = objective(flat)
        return value, lambda cotangent: (cotangent * gradient,)

    # What check_grads does in reverse mode, with one program in place of three.
    check_vjp(lambda x: objective(x)[0], pulled_back, (flat,), eps=1e-3, rtol=1e-2, atol=1e-2)


def test_dropout_is_unbiased_and_only_on_request():
    rate, x = 0.3, jnp.arange(1.0, 9.0).reshape(2, 4)

    def once(key):
        return Drop().apply({}, x, rate, rngs={"dropout": key})

    passes = np.asarray(_quick_jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 5000)))
    ratio = passes / np.asarray(x)
    assert set(np.round(ratio.reshape(-1), 5)) == {0.0, np.float32(np.round(1 / 0.7, 5))}
    share = (ratio == 0).mean(axis=0)
    assert (np.abs(share - rate) < 4 * math.sqrt(0.21 / 5000)).all()
    # Entries are dropped independently of each other.
    together = np.corrcoef((ratio == 0).reshape(5000, -1).T) - np.eye(8)
    assert np.abs(together).max() < 4.5 / math.sqrt(5000)
    np.testing.assert_array_equal(Drop().apply({}, x, 0.0), x)


@pytest.mark.parametrize("name", MAKERS)
def test_a_training_pass_is_stochastic_by_its_key_alone(name):
    backbone, params = _make(name, dropout=0.5, layers=1), _params(name, layers=1)
    rows = {"item": _rows(backbone, QUERIES)}
    # Of the window with one event the cloze task masks that one, whatever the key.
    at = (LENGTH, 0) if name == "bert4rec" else (0, LENGTH - 1)

    @_quick_jit
    def both(seed):
        key = jax.random.key(seed)
        window = backbone.window(params, _EVENTS, _THERE, key=key)
        vectors = backbone.query_vectors(params, rows, CONTEXT, QUERIES, dropout=(0.5, key))
        return window.states[at], vectors[0]

    one, same, other = both(0), both(0), both(1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one[0] != other[0]).any()
    assert (one[1] != other[1]).any()


def test_fresh_parameters():
    """Matrices ~ N(0, 0.02^2) and positions as large as scaled rows; gates orthogonal in a GRU."""
    made = [_make("bert4rec", layers=1), _make("gru4rec", layers=1)]
    init = _quick_jit(lambda key: [backbone.init(key) for backbone in made])
    bert, gru = jax.tree.map(np.asarray, init(jax.random.key(0)))
    found: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(bert):
        found.setdefault(path[-1].key, []).append(leaf.reshape(-1))
    for name, std in (("kernel", 0.02), ("positions", 0.5), ("mask", 0.5)):
        numbers = np.concatenate(found.pop(name)) / std
        assert abs(np.sqrt((numbers**2).mean()) - 1) < 4 / math.sqrt(2 * numbers.size)
    assert (np.concatenate(found.pop("scale")) == 1).all()
    assert (np.concatenate(found.pop("bias")) == 0).all()
    assert not found
    for gate in np.split(gru["layer_0"]["recurrent"], 3, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(6), atol=1e-5)


def test_heads_that_do_not_share_the_width_are_refused():
    backbone = SASRec(**{**COMMON, "dim": 10}, length=3, heads=4, hidden=4, dropout=0.0)
    with pytest.raises(ConfigError, match=r"--dim=10 is not a multiple of --heads=4"):
        backbone.init(jax.random.key(0))


def test_tables_pass_through():
    values = {"item": jnp.asarray(_table())}
    for name in MAKERS:
        backbone = _make(name)
        assert backbone.propagate({}, values, CONTEXT)["item"] is values["item"]
        assert set(backbone.tables) == {"item"}
        spec = backbone.tables["item"]
        assert (spec.rows, spec.width, spec.init_std) == (ITEMS, WIDTH, 0.5)
