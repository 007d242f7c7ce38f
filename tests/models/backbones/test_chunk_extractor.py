"""KSER-style extraction of chunks: plain loops, masks, order, several devices, freezing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose, assert_array_equal

from slgr_jax.config import make_run
from slgr_jax.config.applies import check_used
from slgr_jax.errors import ConfigError
from slgr_jax.experiments.arms import ARMS, VECTORS
from slgr_jax.mesh import make_layout
from slgr_jax.models.backbones import chunk_extractor, vector_maps
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.embedding_table import RowFormat
from slgr_jax.models.row_access import Reads
from slgr_jax.models.scoring import Scoring, moments, pair_scores
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.chunks import Chunks
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, loop, programs, restore, step
from slgr_jax.training.state import init_state, make_serving_state

USERS, ITEMS, Z, D = 20, 16, 5, 4
FIELDS = (2, 3)
NO_TEXT = 11  # an item without a chunk


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True)
    rng = np.random.default_rng(0)

    def chunks(rows, fields):
        sizes = list(fields.values())
        counts = rng.integers(0, np.array(sizes) + 1, (rows, len(sizes))).astype(np.int16)
        counts[NO_TEXT] = 0
        values = rng.normal(2.0, 1.0, (rows, sum(sizes), Z)).astype(np.float16)
        return Chunks(values, counts, fields)

    items = chunks(ITEMS, {"text": 2, "title": 3})
    users = chunks(USERS, {"text": 2})
    embeddings.write(dataset, "texts", items, users, users_from="file")
    plain = (Vectors(rng.normal(size=(n, Z)), np.ones(n, bool)) for n in (ITEMS, USERS))
    embeddings.write(dataset, "plain", *plain, users_from="file")
    return dataset


def _run(data, workdir="w", **knobs):
    values = {"item_vectors": "texts", "user_vectors": "texts", "adapter_chunks": True, "dim": D}
    values |= {"adapter_hidden": (6,), "mlp": (8,), "batch_size": 16, "vector_dtype": "float32"}
    values |= {"kernels": "xla", "init_std": 1.0, "max_history": 4, "backbone": "deepfm"}
    return make_run(str(data.path), str(workdir), **values | {"epochs": 1, "patience": 0} | knobs)


def _random(tree, seed=0):
    """Parameters of the same shapes, none of which is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def _perceptron(layers, x):
    for number in range(len(layers)):
        layer = jax.tree.map(lambda a: np.asarray(a, np.float64), layers[f"layer_{number}"])
        x = (np.maximum(x, 0) if number else x) @ layer["kernel"] + layer["bias"]
    return x[0]


def _softmax(x):
    weights = np.exp(np.array(x) - max(x))
    return weights / weights.sum()


def _by_loops(params, alignment, stored, query, x):
    """X + Z of one row by the formula, a chunk at a time: missing chunks are not there at all."""
    kernel, rows, begin = np.asarray(params["map"], np.float64), [], 0
    for count in FIELDS:
        chunks = [z[:-1].astype(np.float64) for z in stored[begin : begin + count] if z[-1]]
        begin += count
        if not chunks:
            continue
        mapped = [(v - v.mean()) / np.sqrt(v.var() + 1e-6) for v in (z @ kernel for z in chunks)]
        scores = [_perceptron(params["chunk"], np.concatenate([k, query])) for k in mapped]
        pooled = sum(a * k for a, k in zip(_softmax(scores), mapped, strict=True))
        share = 1 / (1 + np.exp(-_perceptron(params["field"], np.concatenate([pooled, query]))))
        rows.append(share * pooled)
    if not rows:
        return x
    w = {name: np.asarray(value, np.float64) for name, value in alignment.items()}
    out = []
    for field in x:
        of_keys = [field @ w["query"] @ (r @ w["key"]) / np.sqrt(D) for r in rows]
        mixed = sum(a * (r @ w["value"]) for a, r in zip(_softmax(of_keys), rows, strict=True))
        out.append(field + mixed @ w["output"])
    return np.array(out)


def _parameters():
    selection = chunk_extractor.init_selection(
        jax.random.key(0), vectors=Z, width=D, query=2 * D, hidden=(6, 3)
    )
    return _random(selection), _random(chunk_extractor.init_alignment(jax.random.key(1), D), 1)


def _extracted(params, alignment, stored, query, x):
    mapped = chunk_extractor.mapped(params, jnp.asarray(stored))
    of_fields, present = chunk_extractor.selected(params, mapped, jnp.asarray(query), FIELDS)
    z = chunk_extractor.aligned(alignment, jnp.asarray(x), of_fields, present)
    return np.asarray(x + z), of_fields


def _stored(rng, *shape):
    stored = rng.normal(size=(*shape, sum(FIELDS), Z + 1)).astype(np.float32)
    stored[..., -1] = rng.integers(0, 2, stored.shape[:-1])
    return stored


def test_the_output_is_that_of_plain_loops_over_the_chunks_there_are():
    params, alignment = _parameters()
    rng = np.random.default_rng(2)
    stored = _stored(rng, 3, 7)
    stored[0, 0, :, -1] = 0  # nothing at all
    stored[0, 1, : FIELDS[0], -1] = 0  # a field without a chunk
    query = rng.normal(size=(3, 7, 2 * D)).astype(np.float32)
    x = rng.normal(size=(3, 7, 6, D)).astype(np.float32)
    out, _ = _extracted(params, alignment, stored, query, x)
    for at in np.ndindex(3, 7):
        expected = _by_loops(params, alignment, stored[at], query[at].astype(np.float64), x[at])
        assert_allclose(out[at], expected, rtol=2e-3, atol=2e-4)
    assert_array_equal(out[0, 0], x[0, 0])


def test_the_order_of_chunks_and_what_is_behind_the_mask_change_nothing():
    params, alignment = _parameters()
    rng = np.random.default_rng(3)
    stored = _stored(rng, 9)
    query, x = rng.normal(size=(9, 2 * D)).astype(np.float32), np.ones((9, 2, D), np.float32)
    out, _ = _extracted(params, alignment, stored, query, x)
    permuted = stored[:, [1, 0, 4, 2, 3]]
    assert_allclose(_extracted(params, alignment, permuted, query, x)[0], out, rtol=1e-5, atol=1e-5)
    across = stored[:, [4, 1, 2, 3, 0]]  # fields are apart
    assert np.abs(_extracted(params, alignment, across, query, x)[0] - out).max() > 1e-2
    other = np.where(stored[..., -1:] > 0, stored, rng.normal(size=stored.shape) * 50)
    other[..., -1] = stored[..., -1]
    assert_array_equal(_extracted(params, alignment, other.astype(np.float32), query, x)[0], out)


def test_gradients_are_finite_and_missing_chunks_have_none():
    params, alignment = _parameters()
    stored = jnp.asarray(_stored(np.random.default_rng(4), 5)).at[0, :, -1].set(0)

    def total(params, alignment, stored):
        mapped = chunk_extractor.mapped(params, stored)
        of_fields, present = chunk_extractor.selected(params, mapped, jnp.ones((5, 2 * D)), FIELDS)
        return jnp.sum(
            chunk_extractor.aligned(alignment, jnp.ones((5, 2, D)), of_fields, present) ** 2
        )

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(params, alignment, stored)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))
    of_vectors, real = np.asarray(gradients[2])[..., :-1], np.asarray(stored)[..., -1] > 0
    assert (of_vectors[~real] == 0).all()
    assert (np.abs(of_vectors[real]).max(axis=-1) > 0).all()


# --- in a recommender ---------------------------------------------------------------------------

USER_IDS, ITEM_IDS = np.array([0, 7, 19]), np.array([[0, 1], [14, 3], [NO_TEXT, 2]], np.int32)


def _candidates(context):
    as_of = None if context.histories is None else context.histories.trained[jnp.asarray(USER_IDS)]
    return Candidates(Queries(jnp.asarray(USER_IDS), as_of), jnp.asarray(ITEM_IDS))


def _scores(experiment, state):
    trainer, context = experiment.trainer, experiment.arrays.context
    reads = Reads({"x": _candidates(context)}, {})
    leaves = trainer.access.read(state.tables, context, reads)
    view = trainer.access.view(state.params["backbone"], leaves, context, reads, None)
    return np.asarray(view.scores("x", None))


def _with_alignment(state):
    """The state with an alignment that is not zero."""
    of_backbone = dict(state.params["backbone"])
    of_backbone["adapters"] = _random(of_backbone["adapters"])
    return state.replace(params={**state.params, "backbone": of_backbone})


@pytest.mark.parametrize("backbone", ["deepfm", "din", "lightgcn", "sasrec"])
def test_scores_begin_as_without_texts_and_serving_keeps_what_training_sees(data, backbone):
    sides = {"user_vectors": ""} if backbone == "sasrec" else {}
    knobs = {"backbone": backbone, **sides}
    experiment = build.build(_run(data, **knobs), data, worlds.one_device())
    state = init_state(experiment.trainer, 0)
    none = {"item_vectors": "", "user_vectors": "", "adapter_chunks": False, "adapter_hidden": ()}
    plain = build.build(_run(data, **knobs | none), data, worlds.one_device())
    of_backbone = {k: v for k, v in state.params["backbone"].items() if k != "adapters"}
    without = state.replace(params={**state.params, "backbone": of_backbone})
    assert_allclose(_scores(experiment, state), _scores(plain, without), rtol=1e-6, atol=1e-6)

    state = _with_alignment(state)
    trained = _scores(experiment, state)
    assert np.abs(trained - _scores(plain, without)).max() > 1e-3
    serving = make_serving_state(experiment.trainer)(state, experiment.arrays.context)
    context = experiment.arrays.context.replace(vectors=None)
    scoring = Scoring(serving, context, moments(context, "valid"))
    served = pair_scores(experiment.trainer.backbone, scoring, _candidates(context))
    assert_allclose(np.asarray(served), trained, rtol=1e-4, atol=1e-4)


def test_an_item_without_chunks_is_scored_by_its_rows_alone(data):
    experiment = build.build(_run(data, user_vectors=""), data, worlds.one_device())
    state = init_state(experiment.trainer, 0)
    moved = _scores(experiment, _with_alignment(state)) != _scores(experiment, state)
    has = embeddings.load(data, "texts").items.has
    assert not has[NO_TEXT]
    assert_array_equal(moved, has[ITEM_IDS])


def test_blocks_of_rows_serve_what_all_at_once_would(data, monkeypatch):
    from slgr_jax.training import state as state_lib

    experiment = build.build(_run(data), data, worlds.one_device())
    state = _with_alignment(init_state(experiment.trainer, 0))
    served = {}
    for size in (7, 1000):
        monkeypatch.setattr(state_lib, "_CHUNKED_ROWS", size)
        serving = make_serving_state(experiment.trainer)(state, experiment.arrays.context)
        served[size] = serving.values["item_vector"]
        assert served[size].shape == (ITEMS, sum(FIELDS) * (D + 1))
    assert_allclose(*map(np.asarray, served.values()), rtol=1e-5, atol=1e-6)


def test_several_devices_have_the_gradient_of_one(data):
    moments_of = []
    for layout in (worlds.one_device(), make_layout(table_shards=4)):
        run = _run(data, l2=0.01, user_vectors="", dropout=0.0)
        experiment = build.build(run, data, layout)
        state = _with_alignment(init_state(experiment.trainer, 0))
        key = jax.random.key_data(jax.random.key(1))
        run_steps = step.make_run_steps(experiment.trainer)
        state, _, health = run_steps(state, experiment.arrays, key, jnp.int32(1))
        assert int(health.step) == -1
        moments_of.append(jax.tree.map(np.asarray, state.opt_state[0].mu["backbone"]["adapters"]))
    for ours, theirs in zip(*map(jax.tree.leaves, moments_of), strict=True):
        assert np.abs(ours).max() > 0
        assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


# --- the extractor alone ------------------------------------------------------------------------


def test_training_the_extractor_alone_keeps_rows_and_network_to_the_bit(data, tmp_path):
    none = {"item_vectors": "", "user_vectors": "", "adapter_chunks": False, "adapter_hidden": ()}
    knobs = {"table_dtype": "bfloat16", "dropout": 0.3, "l2": 0.01}
    source = _run(data, tmp_path / "plain", **none | knobs)
    loop.train(source)
    alone = {"train_only": "adapters", "init_from": source.workdir, "seed": 3}
    run = _run(data, tmp_path / "kser", **knobs | alone, dense_lr=0.05)
    experiment = build.build(run, data, worlds.one_device())
    begun = programs.make_programs(experiment).init(np.int32(3))
    before = jax.tree.map(np.asarray, begun)
    key = jax.random.key_data(jax.random.key(1))
    run_steps = step.make_run_steps(experiment.trainer)
    state, *_ = run_steps(begun, experiment.arrays, key, jnp.int32(12))
    after = jax.tree.map(np.asarray, state)

    for name, table in before.tables.items():
        assert_array_equal(after.tables[name].view(np.uint8), table.view(np.uint8))
    was, now = (dict(x.params["backbone"]) for x in (before, after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), was.pop("adapters"), now.pop("adapters"))
    assert min(jax.tree.leaves(moved)) > 0
    for ours, theirs in zip(*map(jax.tree.leaves, (was, now)), strict=True):
        assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    held = {leaf.size for leaf in jax.tree.leaves(after.opt_state)}
    assert max(leaf.size for leaf in jax.tree.leaves(was)) not in held  # no moments of these

    assert experiment.trainer.backbone.dropout == 0
    served = restore.restore_run(source.workdir).serving  # RUN's best is what it begins with
    for name, rows in served.values.items():
        width = experiment.trainer.backbone.tables[name].width
        first = RowFormat.of(before.tables[name], width).unpack(before.tables[name])[0]
        assert_array_equal(np.asarray(first)[: len(rows)], np.asarray(rows))


def test_what_does_not_go_together_is_refused(data):
    for knobs, text in (
        ({"adapter_experts": 3}, "--adapter_chunks and --adapter_experts=3 are two ways"),
        ({"item_rows": False}, "selects chunks by the item's row, and --noitem_rows"),
        ({"train_only": "adapters"}, "name it, --init_from=RUN"),
        (
            {"item_vectors": "", "user_vectors": "", "train_only": "adapters", "init_from": "r"},
            "--train_only=adapters trains what makes rows of vectors: add --item_vectors",
        ),
        (
            {"guidance": "pairwise", "teacher": "t", "train_only": "adapters", "init_from": "r"},
            "--train_only=adapters trains no gate and no rows",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            _run(data, **knobs)
    with pytest.raises(ConfigError, match=r"--item_vectors=plain has one vector a row; make chunk"):
        build.build(_run(data, item_vectors="plain"), data, worlds.one_device())
    with pytest.raises(ConfigError, match=r"--user_vectors: SASRec has no rows of users"):
        build.build(_run(data, backbone="sasrec"), data, worlds.one_device())
    texts = {"backbone": "deepfm", "item_vectors": "texts"}
    alone = {**texts, "init_from": "r", "train_only": "adapters"}
    for knobs, text in (
        ({"adapter_chunks": True}, "--adapter_chunks=True is not used without vectors"),
        ({**texts, "adapter_chunks": True, "vector_l2": 0.5}, "not used with --adapter_chunks"),
        ({**texts, "adapter_chunks": True, "event_vectors": False}, "not used with --adapter_ch"),
        ({**alone, "dropout": 0.3}, "--dropout=0.3 is not used with --train_only=adapters"),
        ({**alone, "lr": 0.3}, "--lr=0.3 is not used with --train_only=adapters"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_used(make_run("d", "w", **knobs), list(knobs))


def test_the_arm_of_a_comparison_is_the_extractor():
    knobs = {name: "v" if value == VECTORS else value for name, value in ARMS["kser"].items()}
    run = make_run("d", "w", backbone="dcnv2", **knobs)
    assert run.vectors.adapter_chunks
    assert run.vectors.products == {"item": "v", "user": "v"}
    assert run.vectors.selection_hidden == (64,)
    assert vector_maps.Extractor("item", 1, 3, 2, (64,), 1.0, fields=(2, 1)).stored.width == 12
