"""Examples in context (LLM-CF) against plain numpy: retrieval, leaks, network, runs, refusals."""

from __future__ import annotations

import pathlib
from typing import Any

import begun_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose, assert_array_equal

from slgr_jax import config, serving
from slgr_jax.config import ExampleFileConfig, TeachConfig, make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.models import scoring
from slgr_jax.models.backbones import in_context
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import Scoring
from slgr_jax.sampling import examples as examples_lib
from slgr_jax.sampling.context import Queries
from slgr_jax.teacher.local import embeddings, examples
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import build, checkpoint, loop, restore
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, DIM, LENGTH, REASONING = 14, 12, 5, 4, 3, 6
MODELS = ("deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din")


def _vectors(dataset: Dataset, rng: np.random.Generator) -> None:
    of_items = Vectors(
        rng.normal(1.0, 2.0, (ITEMS, WIDTH)).astype(np.float32), np.ones(ITEMS, bool)
    )
    nobody = Vectors(np.zeros((USERS, WIDTH), np.float32), np.zeros(USERS, bool))
    embeddings.write(dataset, "items", of_items, nobody, users_from="file")


def _product(dataset: Dataset, rng: np.random.Generator, name: str, width: int) -> None:
    """All training rows and a negative each, so that a query has rows of its own to be shown."""
    common = TeachConfig(str(dataset.path), name)
    options = ExampleFileConfig(share=1.0)
    rows = examples.draw(dataset, options)
    reasoning = rng.normal(size=(len(rows[0]), width))
    examples.write(dataset, common, 0.0, *rows, reasoning)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(
        path, n_users=USERS, n_items=ITEMS, per_user=6, timed=True, parts_in_time=True, categories=3
    )
    rng = np.random.default_rng(0)
    _vectors(dataset, rng)
    _product(dataset, rng, "reasons", REASONING)
    _product(dataset, rng, "labels", 0)
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str = "run", **knobs: Any) -> config.RunConfig:
    values = {"backbone": "dcnv2", "dim": DIM, "batch_size": 8, "epochs": 1, "patience": 0}
    values |= {"init_std": 1.0, "kernels": "xla", "dropout": 0.0, "mlp": (8,), "low_rank": 2}
    values |= {"max_history": LENGTH, "examples": "reasons", "example_vectors": "items"}
    values |= {"example_heads": 1, "rows": "sampled"}
    return make_run(str(data.path), str(workdir), **values | knobs)


# --- retrieval ------------------------------------------------------------------------------------


def _similar(
    data: Dataset, user: int, item: int, as_of: int
) -> dict[bool, list[tuple[float, Any]]]:
    """Label -> (similarity, (user, item, position)) of every allowed example, the best first."""
    held = examples.load(data, "reasons")
    z = embeddings.load(data, "items").items.values.astype(np.float64)
    trained = np.isin(np.arange(ITEMS), data.train.items)
    z = z - z[trained].mean(axis=0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    events = np.concatenate([data.train.items, data.valid.items])
    owners = np.concatenate([data.train.users, data.valid.users])

    def history(user: int, before: int) -> np.ndarray:
        mine = events[owners == user][:before][-LENGTH:]
        h = z[mine].sum(axis=0) if len(mine) else np.zeros(WIDTH)
        return h / max(np.linalg.norm(h), 1e-12)

    out: dict[bool, list[tuple[float, Any]]] = {True: [], False: []}
    asked = history(user, as_of)
    for u, i, t, clicked in zip(held.users, held.items, held.positions, held.clicked, strict=True):
        if u == user and (t >= as_of or i == item):
            continue
        s = 0.5 * asked @ history(u, t) + 0.5 * z[item] @ z[i]
        out[bool(clicked)].append((s, (u, i, t)))
    for found in out.values():
        found.sort(key=lambda pair: -pair[0])
    return out


def _find(run: config.RunConfig, data: Dataset, queries: Queries, items: np.ndarray) -> Any:
    experiment = build.build(run, data)
    backbone = experiment.trainer.backbone
    assert isinstance(backbone, in_context.InContext)
    return backbone.found(experiment.arrays.context, queries, jnp.asarray(items))


@pytest.mark.parametrize("block", [4, 1024])
def test_examples_are_those_that_a_search_of_all_finds(
    data: Dataset, block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(examples_lib, "BLOCK", block)
    train, moments = data.train, data.moments("train")
    rng = np.random.default_rng(1)
    rows = rng.choice(len(train), 20, replace=False)
    items = np.stack([train.items[rows], rng.integers(0, ITEMS, 20)], axis=1).astype(np.int32)
    users, as_of = train.users[rows], moments[rows]
    found = _find(_run(data), data, Queries(jnp.asarray(users), jnp.asarray(as_of)), items)
    for n in range(20):
        for c in range(2):
            wanted = _similar(data, users[n], items[n, c], as_of[n])
            got = [
                (int(found.users[n, c, k]), int(found.items[n, c, k]), int(found.as_of[n, c, k]))
                for k in range(4)
            ]
            assert got[:2] == [row for _, row in wanted[True][:2]]
            assert got[2:] == [row for _, row in wanted[False][:2]]
            assert bool(found.real[n, c].all())


def test_no_row_is_shown_itself_its_item_or_what_came_later(data: Dataset):
    """Every pair of every user at every moment, with as many examples as there are."""
    run = _run(data, examples_per_label=40)
    for part in ("train", "valid", "test"):
        asked = data.part(part)
        queries = Queries(jnp.asarray(asked.users), jnp.asarray(data.moments(part)))
        found = jax.tree.map(np.asarray, _find(run, data, queries, asked.items[:, None]))
        shown = found.real[:, 0]
        same = (found.users[:, 0] == asked.users[:, None]) & shown
        later = found.as_of[:, 0] >= data.moments(part)[:, None]
        assert same.any()
        assert not (same & later).any()
        assert not (same & (found.items[:, 0] == asked.items[:, None])).any()
        # All that is shown is of training: a row that the product has.
        held = examples.load(data, "reasons")
        rows = set(zip(held.users, held.items, held.positions, strict=True))
        named = np.stack([found.users[:, 0], found.items[:, 0], found.as_of[:, 0]], axis=-1)[shown]
        assert set(map(tuple, named.tolist())) <= rows


def test_without_times_no_row_of_the_same_user_is_shown(tmp_path: pathlib.Path):
    dataset = worlds.random_dataset(
        tmp_path / "d", n_users=USERS, n_items=ITEMS, per_user=6, timed=False
    )
    rng = np.random.default_rng(0)
    _vectors(dataset, rng)
    _product(dataset, rng, "reasons", REASONING)
    run = _run(dataset, history_fields=False, examples_per_label=40)
    asked = dataset.test
    found = _find(run, dataset, Queries(jnp.asarray(asked.users)), asked.items[:, None])
    shown = np.asarray(found.real[:, 0])
    assert shown.any()
    assert not (shown & (np.asarray(found.users[:, 0]) == asked.users[:, None])).any()


def test_a_label_of_test_changes_no_score(data: Dataset, tmp_path: pathlib.Path):
    """What is evaluated may be what it likes: examples, and so scores, are training's alone."""
    other = worlds.write_dataset(
        tmp_path / "d",
        np.stack([data.train.users, data.train.items], axis=1),
        np.stack([data.valid.users, data.valid.items], axis=1),
        np.stack([data.test.users, data.test.items[::-1]], axis=1),
        n_users=USERS, n_items=ITEMS, parts_in_time=True, categories=3,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    _vectors(other, rng)
    held = examples.load(data, "reasons")
    foreign = {(int(u), int(i)) for u, i in zip(other.test.users, other.test.items, strict=True)}
    kept = np.array(
        [(int(u), int(i)) not in foreign for u, i in zip(held.users, held.items, strict=True)]
    )
    for dataset in (data, other):
        columns = held.users, held.items, held.positions, held.clicked, held.reasoning
        common = TeachConfig(str(dataset.path), "kept")
        examples.write(dataset, common, 0.0, *(column[kept] for column in columns))
    scores = []
    queries = Queries(jnp.arange(USERS), jnp.full(USERS, 3))
    candidates = Candidates(queries, jnp.tile(jnp.arange(ITEMS), (USERS, 1)))
    for dataset in (data, other):
        experiment = build.build(_run(dataset, examples="kept"), dataset)
        scores.append(_scores(experiment, state_lib.init_state(experiment.trainer, 0), candidates))
    assert_array_equal(*scores)


# --- the network ----------------------------------------------------------------------------------


def _scores(experiment: Any, state: Any, candidates: Candidates) -> np.ndarray:
    context = experiment.arrays.context
    serving_state = state_lib.make_serving_state(experiment.trainer)(state, context)
    given = Scoring(serving_state, context, None)
    return np.asarray(scoring.pair_scores(experiment.trainer.backbone, given, candidates))


def _host(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _mlp(x: np.ndarray, params: Any) -> np.ndarray:
    inner = np.maximum(x @ params["in"]["kernel"] + params["in"]["bias"], 0)
    return inner @ params["out"]["kernel"] + params["out"]["bias"]


def _rms(x: np.ndarray, params: Any) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * params["scale"]


def _turn(x: np.ndarray, place: int) -> np.ndarray:
    """The numbers of one head, as complex ones: number j and number j + E/2 are a point."""
    half = len(x) // 2
    point = x[:half] + 1j * x[half:]
    point = point * np.exp(1j * place * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([point.real, point.imag])


def _layer(x: np.ndarray, seen: list[int], heads: int, params: Any) -> np.ndarray:
    """One layer, a place at a time: each asks the places of `seen` up to its own."""
    normed, width, out = _rms(x, params["attention_norm"]), x.shape[1] // heads, x.copy()
    q, k, v = (normed @ params[name]["kernel"] for name in ("query", "key", "value"))
    for t in seen:  # what becomes of the other places is nobody's
        asked, mixed = [s for s in seen if s <= t], []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = np.array([_turn(q[t, part], t) @ _turn(k[s, part], s) for s in asked])
            weights = np.exp(logits / np.sqrt(width))
            mixed.append(
                sum(w * v[s, part] for w, s in zip(weights, asked, strict=True)) / weights.sum()
            )
        out[t] += np.concatenate(mixed) @ params["attended"]["kernel"]
    normed = _rms(out, params["forward_norm"])
    gate = normed @ params["gate"]["kernel"]
    return (
        out
        + (gate / (1 + np.exp(-gate)) * (normed @ params["inner"]["kernel"]))
        @ params["outer"]["kernel"]
    )


@pytest.mark.parametrize("missing", [(), (1, 3)])
def test_the_reader_is_its_formula(missing: tuple[int, ...]):
    rng, heads, dim, k = np.random.default_rng(0), 2, 8, 4
    fields, shown = rng.normal(size=(1, 10)), rng.normal(size=(1, k, 10))
    reasoning = rng.normal(size=(1, k, REASONING))
    labels = np.array([1, 1, 0, 0])
    real = np.ones((1, k), bool)
    real[0, list(missing)] = False
    reader = in_context.ExampleReader(dim, 2, heads)
    given = (*(jnp.asarray(x, jnp.float32) for x in (fields, shown, reasoning)), labels, real)
    params = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        reader.init(jax.random.key(0), *given)["params"],
    )
    read = reader.apply({"params": params}, *given)

    host, tokens = _host(params), []
    for e in range(k):
        tokens += [_mlp(shown[0, e], host["fields"]), _mlp(reasoning[0, e], host["reasoning"])]
        tokens.append(host["labels"][labels[e]])
    x = np.stack([*tokens, _mlp(fields[0], host["fields"])])
    seen = [t for t in range(3 * k) if real[0, t // 3]] + [3 * k]
    for number in range(2):
        x = _layer(x, seen, heads, host[f"layer_{number}"])
    x = _rms(x, host["norm"])
    assert_allclose(np.asarray(read.state[0]), x[-1], rtol=2e-4, atol=2e-5)
    lost = []
    for e in range(k):
        if real[0, e]:
            again = _mlp(x[3 * e + 1], host["decoder"])
            c = reasoning[0, e]
            lost.append(1 - again @ c / np.linalg.norm(again) / np.linalg.norm(c))
    assert_allclose(float(read.lost[0]), np.mean(lost), rtol=1e-4)


@pytest.mark.parametrize("backbone", MODELS)
def test_every_click_model_learns_beside_examples(data: Dataset, backbone: str):
    """Every parameter moves, and a score is that of the click model with one more field."""
    knobs: dict[str, Any] = {"cin": (4,)} if backbone == "xdeepfm" else {}
    knobs |= {"attention_width": 4} if backbone == "autoint" else {}
    experiment, state = begun_runs.after_three_steps(_run(data, backbone=backbone, **knobs), data)
    backbone_, context = experiment.trainer.backbone, experiment.arrays.context
    queries = Queries(jnp.array([0, 3]), jnp.array([2, 3]))
    items = jnp.array([[1, 5, 2], [4, 0, 7]])
    params = state.params["backbone"]
    serving_state = state_lib.make_serving_state(experiment.trainer)(state, context)
    rows = scoring.rows_of(serving_state.values, backbone_.ids(context, queries, items))
    got = backbone_.score(params, rows, context, queries, items)

    # One pair at a time, its rows looked up by hand.
    model, found = backbone_._model, backbone_.found(context, queries, items)
    labels = jnp.array([1, 1, 0, 0])
    reader = backbone_._reader
    for n in range(2):
        for c in range(3):
            one = Queries(queries.users[n : n + 1], queries.as_of[n : n + 1])
            item = items[n : n + 1, c : c + 1]
            own = scoring.rows_of(serving_state.values, model.ids(context, one, item))
            shown = []
            for k in range(4):
                asked = Queries(found.users[n, c, k : k + 1], found.as_of[n, c, k : k + 1])
                listed = found.items[n, c, k].reshape(1, 1)
                of_example = scoring.rows_of(
                    serving_state.values, model.ids(context, asked, listed)
                )
                shown.append(model.pair_fields(of_example, context, asked, listed).reshape(-1))
            fields = model.pair_fields(own, context, one, item).reshape(1, -1)
            given = fields, jnp.stack(shown)[None], found.reasoning[n, c][None], labels
            read = reader.apply({"params": params["in_context"]}, *given, found.real[n, c][None])
            beside = read.state[:, None]
            wanted = model.score(params, own, context, one, item, beside=beside)
            assert_allclose(got[n, c], wanted[0, 0], rtol=2e-5, atol=1e-6)
            assert (
                abs(
                    float(
                        wanted[0, 0]
                        - model.score(params, own, context, one, item, beside=0 * beside)[0, 0]
                    )
                )
                > 1e-6
            )


def test_the_loss_has_what_is_made_again(data: Dataset):
    """The step's loss less the same with weight 0 is the weight times the mean of what is lost."""
    from slgr_jax.training import step

    sums = {}
    for weight in (0.0, 3.0):
        experiment = build.build(_run(data, reconstruction_weight=weight), data)
        state = state_lib.init_state(experiment.trainer, 0)
        key = jax.random.key_data(jax.random.key(1))
        _, sums[weight], _ = step.make_run_steps(experiment.trainer)(
            state, experiment.arrays, key, np.int32(1)
        )
    assert step.LOST not in sums[0.0]
    added = float(sums[3.0]["loss"] - sums[0.0]["loss"])
    assert_allclose(added, 3.0 * float(sums[3.0][step.LOST]), rtol=1e-4)
    assert float(sums[3.0][step.LOST]) > 0


def test_without_reasoning_rows_and_labels_are_all(data: Dataset):
    """A product with reasoning and one without come to the same scores."""
    scores = []
    candidates = Candidates(Queries(jnp.array([0, 3]), jnp.array([2, 3])), jnp.array([[1], [4]]))
    for name in ("reasons", "labels"):
        run = _run(data, examples=name, example_reasoning=False)
        experiment = build.build(run, data)
        assert not experiment.trainer.backbone.lost_weight
        scores.append(_scores(experiment, state_lib.init_state(experiment.trainer, 0), candidates))
    assert_array_equal(*scores)


# --- runs -----------------------------------------------------------------------------------------


def test_a_restored_run_scores_as_the_trained_one(data: Dataset, tmp_path: pathlib.Path):
    """By what training ended with, looked up in training's own context."""
    run = _run(data, tmp_path / "run", ranking=False, early_stop_metric="rows_auc")
    outcome = loop.train(run)
    assert outcome.status == "finished"
    restored = restore.restore_run(str(tmp_path / "run"), "last")
    experiment = build.build(run, data)
    saved = checkpoint.Checkpoints(run.workdir, writable=False)
    state = saved.restore_state(state_lib.abstract_state(experiment.trainer))
    saved.close()
    candidates = Candidates(
        Queries(jnp.arange(USERS), jnp.full(USERS, 3)), jnp.tile(jnp.arange(3), (USERS, 1))
    )
    trained = _scores(experiment, state, candidates)
    served = Scoring(restored.serving, restored.context, None)
    again = scoring.pair_scores(restored.backbone, served, candidates)
    assert_array_equal(np.asarray(again), trained)
    with pytest.raises(ConfigError, match="new users"):
        serving.load(run.workdir).fold_in({"new": ["i1", "i2"]})

    # Other reasoning under the same name is another model.
    held = examples.load(data, "reasons")
    rows = held.users, held.items, held.positions, held.clicked
    common = TeachConfig(str(data.path), "reasons", overwrite=True)
    examples.write(data, common, 0.0, *rows, held.reasoning + 1)
    try:
        with pytest.raises(ConfigError, match="--examples: reasons holds something else now"):
            restore.restore_run(str(tmp_path / "run"))
    finally:
        examples.write(data, common, 0.0, *rows, held.reasoning)


def test_examples_say_what_no_row_of_an_item_could(tmp_path: pathlib.Path):
    """Each item has one row, so that nothing is learned of it; its place x, which its vector has,
    says the label, and an example's reasoning says its own place. The nearest clicked and not
    clicked lie at x and at 0."""
    items = np.random.default_rng(0).permutation(600)
    pairs = np.stack([np.repeat(5 * np.arange(6), 100), items], axis=1)
    part = np.arange(600) % 10
    dataset = worlds.write_dataset(
        tmp_path / "d", pairs[part < 7], pairs[part == 7], pairs[part > 7],
        n_users=26, n_items=600, parts_in_time=True, ratings=True,
    )  # fmt: skip
    liked = 2 * np.arange(600) % 5 + 1 >= 3
    x = np.random.default_rng(1).uniform(0.05, 1, 600) * np.where(liked, 1, -1)
    angle = np.pi / 2 * x
    of_items = Vectors(np.stack([np.cos(angle), np.sin(angle)], 1), np.ones(600, bool))
    nobody = Vectors(np.zeros((26, 2), np.float32), np.zeros(26, bool))
    embeddings.write(dataset, "items", of_items, nobody, users_from="file")
    common = TeachConfig(str(dataset.path), "reasons")
    rows = examples.draw(dataset, ExampleFileConfig(share=1.0, threshold=3.0))
    examples.write(dataset, common, 3.0, *rows, np.stack([x[rows[1]], np.ones(len(rows[1]))], 1))
    auc = {}
    for name, knobs in {
        "with": {},
        "without": {"examples": "", "example_vectors": "", "example_heads": 2},
    }.items():
        run = _run(
            dataset, tmp_path / name, dim=8, batch_size=32, epochs=12, init_std=0.1,
            rows="rated", rating_threshold=3.0, loss="bce", ranking=False,
            early_stop_metric="rows_auc", lr=0.01, dense_lr=0.01, **knobs,
        )  # fmt: skip
        loop.train(run)
        auc[name] = serving.load(run.workdir).evaluate("test")[1]["overall"]["auc"]
    assert auc["with"] > 0.9, auc
    assert auc["without"] < 0.65, auc


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"backbone": "mf", "mlp": (200, 80), "low_rank": 0, "max_history": 50},
            "fields of a click",
        ),
        ({"example_vectors": ""}, "add --example_vectors"),
        ({"examples": ""}, "add --examples"),
        ({"dim": 6, "example_heads": 2}, "multiple of twice"),
        ({"examples": "labels"}, "--noexample_reasoning"),
        ({"rating_threshold": 3.0, "loss": "bce"}, "--liked_from=3"),
    ],
)
def test_what_does_not_go_together_is_refused(data: Dataset, knobs: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, **knobs), data)
