"""Click prediction against float64 numpy, row by row, and what may not change a score."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_vjp
from scipy.special import expit, softmax

from slgr_jax.errors import ConfigError
from slgr_jax.models.backbones import click, interactions
from slgr_jax.models.backbones.click import ClickModel, make_click
from slgr_jax.models.backbones.interactions import GLOROT_SPLIT, GLOROT_STACK, dropped
from slgr_jax.sampling.context import FIELDS, HISTORY, Context, Fields, Histories, Queries, Sizes

SIX = ("deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din")
DIM, LENGTH = 4, 3
SIZES = Sizes(users=5, items=8, categories=4, categories_per_item=3)
EVENTS = [[], [3], [1, 2, 0, 7, 4], [5, 5, 6, 2], [0, 6, 1]]
CATEGORIES = [[1], [0, 2], [], [3, 1, 0], [2, 3], [0], [1, 2, 3], []]
# The second is cut before its end, one has less than L events, two have none.
USERS, UNTIL = np.array([2, 2, 3, 1, 0, 4]), np.array([5, 2, 4, 1, 0, 0])
ITEMS = np.array([[0, 3], [2, 2], [6, 1], [4, 5], [3, 7], [6, 0]], np.int32)
SMALL: dict[str, Any] = {
    "dim": DIM,
    "length": LENGTH,
    "init_std": 1.0,
    "dropout": 0.1,
    "mlp": (5, 3),
    "layers": 2,
    "attention_width": 6,
    "cin": (4, 6, 3),
    "experts": 3,
    "attention_mlp": (5, 2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SIX},
    "dcnv2 mixed": {"low_rank": 2},
    "deepfm without history": {"history": False},
    "deepfm without categories": {"sizes": dataclasses.replace(SIZES, categories=0)},
    "din without categories": {"sizes": dataclasses.replace(SIZES, categories=0)},
}


# Compiling is most of this file's time: leave out what makes programs fast.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _int32(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def _context(events=EVENTS, categories=CATEGORIES) -> Context:
    """With categories padded as `Fields` says."""
    offsets = np.cumsum([0, *map(len, events)])
    items = np.array([item for row in events for item in row])
    counts = np.array([len(row) for row in categories])
    padded = [(row or [0]) + [(row or [0])[-1]] * (3 - len(row or [0])) for row in categories]
    histories = Histories(*map(_int32, (offsets, items, np.diff(offsets))))
    return Context(histories, Fields(_int32(padded), _int32(counts)))


def _queries(users=USERS, as_of=UNTIL) -> Queries:
    return Queries(_int32(users), _int32(as_of))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with random parameters (biases too) and tables; its score, compiled once."""

    model: ClickModel
    params: Any
    values: dict[str, np.ndarray]
    score: Any
    gradient: Any  # score, of sum(weight * score) by (params, rows)

    def rows(self, context: Context, queries: Queries, items: np.ndarray) -> dict[str, np.ndarray]:
        ids = self.model.ids(context, queries, items)
        return {name: self.values[name][np.asarray(at)] for name, at in ids.items()}

    def __call__(self, context=None, queries=None, items=ITEMS, rows=None) -> np.ndarray:
        context, queries = context or _context(), queries or _queries()
        rows = rows or self.rows(context, queries, items)
        return np.asarray(self.score(self.params, rows, context, queries, items))


@functools.cache
def _case(variant: str) -> Case:
    settings = {"sizes": SIZES} | SMALL | VARIANTS[variant]
    model, rng = make_click(variant.split()[0], **settings), np.random.default_rng(0)

    def normal(shape):
        return rng.normal(size=shape).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.float32(0.7) * normal(leaf.shape), shapes)
    values = {name: normal((spec.rows, spec.width)) for name, spec in model.tables.items()}

    def total(params, rows, weight, *args):
        scores = model.score(params, rows, *args)
        return jnp.sum(weight * scores), scores

    gradient = _jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    return Case(model, params, values, _jit(model.score), gradient)


# --- The oracle: one row at a time, float64, from the papers' formulas --------------------------


def _mlp(params, x, masks=(), dice=False):
    for layer in range(len(SMALL["mlp"])):
        x = x * masks[layer] if masks else x
        dense = params[f"Dense_{layer}"]
        x = x @ dense["kernel"] + dense["bias"]
        if dice:
            p, alpha = expit(x), params[f"Dice_{layer}"]["alpha"]
            x = p * x + (1 - p) * alpha * x
        else:
            x = np.maximum(x, 0)
    return x


def _deep(params, x, masks, dice=False):
    head = params["Dense_0"]
    return (_mlp(params["Mlp_0"], x, masks, dice) @ head["kernel"] + head["bias"])[0]


def _deepfm(params, x, masks, settings):
    pairs = sum(x[f] @ x[g] for f in range(len(x)) for g in range(f))
    return pairs + _deep(params, x.ravel(), masks)


def _xdeepfm(params, x, masks, settings):
    maps, pooled = x, []
    for layer, size in enumerate(settings["cin"]):
        kernel, bias = params[f"cin_{layer}"], params[f"cin_bias_{layer}"]
        found = np.zeros((size, DIM))
        for h in range(size):
            for i in range(len(maps)):
                for j in range(len(x)):
                    found[h] += kernel[i * len(x) + j, h] * maps[i] * x[j]
            found[h] = np.maximum(found[h] + bias[h], 0)
        last = layer == len(settings["cin"]) - 1
        maps = found[: size // 2]
        pooled += [out.sum() for out in (found if last else found[size // 2 :])]
    head = params["cin_head"]["kernel"][:, 0]
    return np.array(pooled) @ head + _deep(params, x.ravel(), masks)


def _autoint(params, x, masks, settings):
    fields, heads = x, settings.get("heads", 2)
    for layer in range(settings["layers"]):
        kernel = params[f"attention_{layer}"]
        query, key, value, residual = (x @ kernel[:, part] for part in range(4))
        each, mixed = settings["attention_width"] // heads, np.zeros_like(residual)
        for h in range(heads):
            own = slice(h * each, (h + 1) * each)
            for f in range(len(x)):
                fit = [query[f, own] @ key[g, own] / np.sqrt(each) for g in range(len(x))]
                mixed[f, own] = softmax(fit) @ value[:, own]
        x = np.maximum(mixed + residual, 0)
    head = params["attention_head"]["kernel"][:, 0]
    return x.ravel() @ head + _deep(params, fields.ravel(), masks)


def _dcn(params, x, masks, settings):
    start = x = x.ravel()
    for kernel, bias in zip(params["cross"][:, :, 0], params["cross_bias"], strict=True):
        x = start * (x @ kernel) + bias + x
    last = np.concatenate([x, _mlp(params["Mlp_0"], start, masks)])
    return last @ params["head"][:, 0] + params["head_bias"]


def _dcnv2(params, x, masks, settings):
    start = x = x.ravel()
    for layer in range(settings["layers"]):
        p = params[f"cross_{layer}"]
        if settings.get("low_rank"):
            gates, total = softmax(x @ p["gate"] + p["gate_bias"]), 0.0
            for k in range(settings["experts"]):
                inner = np.tanh(np.tanh(x @ p["down"][:, k]) @ p["core"][k])
                total = total + gates[k] * start * (inner @ p["up"][k] + p["bias"])
            x = total + x
        else:
            x = start * (x @ p["kernel"] + p["bias"]) + x
    last = np.concatenate([x, _mlp(params["Mlp_0"], start, masks)])
    return (last @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])[0]


def _din(params, user, target, events, masks, settings):
    target = target.ravel()
    pooled = np.zeros_like(target)
    for event in events:
        event = event.ravel()
        x = np.concatenate([target, event, target - event, target * event])
        x = expit(x @ params["attention"] + params["attention_bias"])
        second, head = params["attention_1"], params["attention_head"]
        x = expit(x @ second["kernel"] + second["bias"])
        weight = (x @ head["kernel"] + head["bias"])[0]
        pooled += weight / np.sqrt(target.size) * event
    x = np.concatenate([user, target, pooled, target * pooled])
    return _deep(params, x, masks, dice=True)


FIELD_ORACLES = {"deepfm": _deepfm, "xdeepfm": _xdeepfm, "autoint": _autoint, "dcn": _dcn}
FIELD_ORACLES |= {"dcnv2": _dcnv2}


def _item_fields(values, item):
    found = [values["item"][item]]
    if "category" in values:
        mine = [values["category"][c] for c in CATEGORIES[item]]
        found.append(np.mean(mine, axis=0) if mine else np.zeros(values["item"].shape[1]))
    return np.array(found)


def _expected(variant: str, masks=None) -> np.ndarray:
    """Scores of (USERS, UNTIL, ITEMS); masks: [layer][row, unit] factors of the perceptron."""
    case, name = _case(variant), variant.split()[0]
    settings = SMALL | VARIANTS[variant]
    values, params = jax.tree.map(lambda x: np.asarray(x, np.float64), (case.values, case.params))
    scores = np.zeros(ITEMS.shape)
    for n, (user, as_of) in enumerate(zip(USERS, UNTIL, strict=True)):
        events = [_item_fields(values, item) for item in EVENTS[user][:as_of][-LENGTH:]]
        for c, item in enumerate(ITEMS[n]):
            row = n * ITEMS.shape[1] + c
            own = [mask[row] for mask in masks] if masks else ()
            person, target = values["user"][user], _item_fields(values, item)
            if name == "din":
                scores[n, c] = _din(params, person, target, events, own, settings)
                continue
            fields = [person]
            if settings.get("history", True):
                fields += list(np.mean(events, axis=0) if events else np.zeros_like(target))
            fields = np.array([*fields, *target])
            first_order = fields[:, DIM:].sum()
            scores[n, c] = first_order + FIELD_ORACLES[name](params, fields[:, :DIM], own, settings)
    return scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_equal_numpy(variant):
    expected = _expected(variant)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(_case(variant)(), expected, rtol=2e-4, atol=2e-4)


def test_dropout_keeps_the_mean_and_draws_anew_for_each_layer():
    x, rate = jnp.ones((400, 50)), 0.3
    draw = _jit(lambda key: [dropped(x, (rate, key), layer) for layer in (0, 1)])
    passes = [np.asarray(one) for one in draw(jax.random.key(1))]
    for one in passes:
        np.testing.assert_allclose(np.unique(one), [0, 1 / (1 - rate)], rtol=1e-6)
        assert abs((one == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / one.size)
    assert abs(np.corrcoef(*(one.ravel() for one in passes))[0, 1]) < 4 / np.sqrt(x.size)
    assert dropped(x, None, 0) is x
    assert dropped(x, (0.0, jax.random.key(1)), 0) is x


@pytest.mark.parametrize("name", SIX)
def test_dropout_is_on_the_perceptron_and_only_on_request(name):
    case, rate, key = _case(name), 0.4, jax.random.key(7)
    masked = _jit(lambda *args: case.model.score(*args, dropout=(rate, key)))
    got = dataclasses.replace(case, score=masked)()
    mlp = case.params["Mlp_0"]
    widths = [mlp[f"Dense_{layer}"]["kernel"].shape[0] for layer in range(len(SMALL["mlp"]))]
    ones = jnp.ones((ITEMS.size, max(widths)))  # a narrower mask is the first columns of a wide one
    masks = [
        np.asarray(dropped(ones, (rate, key), layer), np.float64)[:, :width]
        for layer, width in enumerate(widths)
    ]
    np.testing.assert_allclose(got, _expected(name, masks), rtol=2e-4, atol=2e-4)
    assert np.abs(got - case()).max() > 0.1


# --- What may not change a score ------------------------------------------------------------------


@pytest.mark.parametrize("name", SIX)
def test_order_of_events_and_of_categories_does_not_matter(name):
    case, whole = _case(name), _queries(as_of=[len(EVENTS[user]) for user in USERS])
    turned = [row[:-LENGTH] + row[-LENGTH:][::-1] for row in EVENTS]  # the same last L
    expected = case(queries=whole)
    got = case(_context(turned), whole)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    got = case(_context(categories=[row[::-1] for row in CATEGORIES]), whole)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SIX)
def test_what_is_not_there_has_no_influence_and_no_gradient(name):
    """Rows of places before a user's first event and of padding categories, whatever they hold."""
    case, context, queries = _case(name), _context(), _queries()
    rows = case.rows(context, queries, ITEMS)
    seen = np.asarray(case.model.ids(context, queries, ITEMS)["item"])
    padding = {
        "user": np.zeros(USERS.shape, bool),
        "item": np.concatenate(
            [np.zeros(ITEMS.shape, bool), UNTIL[:, None] + np.arange(-LENGTH, 0) < 0], axis=1
        ),
        "category": np.arange(3) >= np.array([len(row) for row in CATEGORIES])[seen][..., None],
    }
    assert padding["item"].sum() == 1 + 2 + 3 + 3
    padding["category"] |= padding["item"][..., None]
    garbage = {
        name: np.where(padding[name][..., None], 1e3 * (1 + np.cos(value)), value)
        for name, value in rows.items()
    }
    np.testing.assert_array_equal(case(rows=garbage), case(rows=rows))
    found = case.gradient(case.params, garbage, np.ones(ITEMS.shape), context, queries, ITEMS)[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    for table, gradient in found[1].items():
        touched = (np.asarray(gradient) != 0).any(axis=-1)
        assert not touched[padding[table]].any()
        assert touched[~padding[table]].mean() > 0.7  # a ReLU may be off


@pytest.mark.parametrize("name", SIX)
def test_events_from_the_moment_on_have_no_influence(name):
    case = _case(name)
    later = [list(row) for row in EVENTS]
    later[2][2:], later[4], later[3][2:] = [6, 6, 6], [1, 1, 1], [0, 0]
    before = _queries([2, 4, 3, 0, 2, 4], [2, 0, 2, 0, 1, 0])
    np.testing.assert_array_equal(case(_context(later), before), case(_context(), before))
    # And with them in, they have: the test can fail.
    after = _queries([2, 4, 3, 0, 2, 4], [3, 1, 3, 0, 4, 2])
    changed = case(_context(later), after) != case(_context(), after)
    assert changed.all(axis=1).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("name", SIX)
def test_candidates_do_not_see_each_other(name):
    case = _case(name)
    for items in (ITEMS[:, ::-1], ITEMS[:, [0, 0]], ITEMS[:, [1, 1]]):
        got, expected = case(items=items), case()
        for c, column in enumerate(items.T):
            at = 0 if (column == ITEMS[:, 0]).all() else 1
            np.testing.assert_allclose(got[:, c], expected[:, at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deepfm", "din"])
def test_many_candidates_are_scored_as_one_by_one_and_as_by_block(name, monkeypatch):
    """Three candidates in blocks of two, the last of which is padded."""
    case = _case(name)
    items = np.concatenate([ITEMS, ITEMS[::-1, :1]], axis=1)
    alone = np.concatenate([case(items=items[:, c : c + 1]) for c in range(3)], axis=1)
    np.testing.assert_allclose(alone[:, :2], case(), rtol=1e-5, atol=1e-5)
    ran, scan = [], jax.lax.map
    monkeypatch.setattr(
        jax.lax, "map", lambda run, x: ran.append(x["target"].shape) or scan(run, x)
    )
    monkeypatch.setattr(click, "BLOCK", 2 * len(USERS))
    blocked = dataclasses.replace(case, score=_jit(lambda *args: case.model.score(*args)))
    np.testing.assert_allclose(blocked(items=items), alone, rtol=1e-5, atol=1e-5)
    assert ran == [(2, len(USERS), 2, 2, case.values["item"].shape[1])]
    masked = functools.partial(case.model.score, dropout=(0.5, jax.random.key(0)))
    args = case.params, case.rows(_context(), _queries(), items), _context(), _queries(), items
    jax.eval_shape(masked, *args)
    assert len(ran) == 1  # blocks would share their masks


@pytest.mark.parametrize("name", SIX)
def test_score_gradients(name):
    """Of every parameter and row, against differences of the score."""
    case, context, queries = _case(name), _context(), _queries()
    rows = case.rows(context, queries, ITEMS)

    def score(params, rows):
        return case.score(params, rows, context, queries, ITEMS)

    def with_vjp(params, rows):
        def vjp(weight):
            return case.gradient(params, rows, weight, context, queries, ITEMS)[0]

        return score(params, rows), vjp

    check_vjp(score, with_vjp, (case.params, rows), eps=2e-4, rtol=1e-2, atol=1e-2)


# --- What a model states of itself ----------------------------------------------------------------


@pytest.mark.parametrize("name", SIX)
def test_tables_and_reads(name):
    model, width = _case(name).model, DIM + (name in ("deepfm", "xdeepfm"))
    assert {table: (spec.rows, spec.width) for table, spec in model.tables.items()} == {
        "user": (SIZES.users, width),
        "item": (SIZES.items, width),
        "category": (SIZES.categories, width),
    }
    assert model.reads == {HISTORY, FIELDS}
    assert model.dropout == SMALL["dropout"]
    plain = make_click(name, **SMALL | {"sizes": dataclasses.replace(SIZES, categories=0)})
    assert plain.tables.keys() == {"user", "item"}
    assert plain.reads == {HISTORY}
    if name != "din":
        assert make_click(name, sizes=SIZES, **SMALL, history=False).reads == {FIELDS}


def test_each_matrix_of_a_stack_starts_as_it_would_alone():
    """Xavier: variance 2 / (in + out), whatever stands beside it."""
    expected = np.sqrt(2 / (40 + 60))
    for initializer, shape in ((GLOROT_STACK, (7, 40, 60)), (GLOROT_SPLIT, (40, 7, 60))):
        values = np.asarray(initializer(jax.random.key(0), shape))
        assert values.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * values.size))


def test_settings_that_contradict_are_named():
    for name, settings, text in (
        ("din", {"history": False}, "history"),
        ("din", {"length": 0}, "length > 0"),
        ("din", {"attention_mlp": ()}, "attention_mlp"),
        ("autoint", {"attention_width": 7}, "attention_width=7 .* heads=2"),
        ("xdeepfm", {"cin": (5, 3)}, r"cin=\(5, 3\)"),
        ("xdeepfm", {"cin": ()}, "cin"),
    ):
        with pytest.raises(ConfigError, match=text):
            make_click(name, sizes=SIZES, **SMALL | settings)


def test_rows_in_chunks_give_the_same(monkeypatch):
    """Three rows at a time, the last chunk filled up, forward and backward."""
    network = interactions.XDeepFm(cin=(4, 6), mlp=(5,))
    fields = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3, 4)), jnp.float32)
    params = network.init(jax.random.key(0), fields)

    def loss(params, fields):
        return jnp.sum(jnp.sin(network.apply(params, fields)))

    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, fields)
    monkeypatch.setattr(interactions, "_AT_ONCE", 36)
    parts = jax.jit(jax.value_and_grad(lambda *a: loss(*a), argnums=(0, 1)))(params, fields)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole)
