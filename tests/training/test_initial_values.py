"""Rows that begin with vectors: closed forms, plain recomputation, resuming, refusals."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.models import embedding_table
from slgr_jax.models.embedding_table import TableSpec
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import (
    build,
    initial_values,
    loop,
    multi_seed,
    programs,
    run_directory,
    step,
)

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH = 24, 20, 12
NO_TEXT = (3, 11)  # items without a vector


def write_vectors(data: Dataset, name: str, *, seed: int = 0, overwrite: bool = False) -> Vectors:
    """A product whose users have none; items' vectors."""
    values = np.random.default_rng(seed).normal(size=(data.n_items, WIDTH)).astype(np.float32)
    items = Vectors(values + 2.0, ~np.isin(np.arange(data.n_items), NO_TEXT))
    users = Vectors(np.zeros((data.n_users, WIDTH), np.float32), np.zeros(data.n_users, bool))
    embeddings.write(data, name, items, users, users_from="file", overwrite=overwrite)
    return items


@pytest.fixture
def data(tmp_path: pathlib.Path) -> Dataset:
    dataset = worlds.random_dataset(tmp_path / "d", n_users=USERS, n_items=ITEMS, per_user=6)
    write_vectors(dataset, "text")
    return dataset


def _run(data: Dataset, workdir: pathlib.Path | str, **knobs) -> config.RunConfig:
    values = {"dim": 6, "batch_size": 16, "epochs": 2, "patience": 0, "init_item_vectors": "text"}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _initial(data: Dataset, **knobs) -> dict[str, np.ndarray]:
    """Table -> values of a fresh state, as the run's own program makes them."""
    experiment = build.build(_run(data, "run", **knobs), data)
    state = programs.make_programs(experiment).init(np.int32(5))
    specs = experiment.trainer.backbone.tables
    return {
        name: np.asarray(embedding_table.values_of(state.tables[name], specs[name]))
        for name in specs
    }


def _expected(data: Dataset, width: int, norm: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Table -> rows by PCA in plain numpy (singular vectors of the centred matrix), which have."""
    items = embeddings.load(data, "text").items
    has = items.has
    centred = items.values.astype(np.float64) - items.values[has].astype(np.float64).mean(axis=0)
    axes = np.linalg.svd(centred[has], full_matrices=False)[2][:width]
    axes *= np.sign(axes[np.arange(width), np.abs(axes).argmax(axis=1)])[:, None]
    projected = centred @ axes.T
    users, known = np.zeros((data.n_users, width)), np.zeros(data.n_users, bool)
    for user in range(data.n_users):
        liked = [item for item in data.positives(("train",)).row(user) if has[item]]
        if liked:
            users[user], known[user] = projected[liked].mean(axis=0), True
    items, users = (
        rows * norm / np.sqrt((rows[which] ** 2).sum(axis=1).mean())
        for rows, which in ((projected, has), (users, known))
    )
    return {"item": (items, has), "user": (users, known)}


def test_items_begin_with_principal_components_and_users_with_the_mean_of_their_items(data):
    drawn = _initial(data, init_item_vectors="")
    begun = _initial(data, init_scale=2.0)
    # Of 6 numbers the last is the item's bias: drawn, as are items without a vector.
    expected = _expected(data, 5, norm=2.0 * 0.1 * np.sqrt(5 / 6))
    for table, (rows, has) in expected.items():
        assert 0 < has.sum() < has.size
        np.testing.assert_allclose(begun[table][has, :5], rows[has], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(begun[table][~has], drawn[table][~has])
        np.testing.assert_array_equal(begun[table][:, 5], drawn[table][:, 5])


def test_rows_that_training_says_much_of_begin_less_with_their_vector(data):
    """a v + sqrt(1 - a^2) r with a = H / (H + n), by hand; users' means are whole."""
    drawn, whole = _initial(data, init_item_vectors=""), _initial(data)
    begun = _initial(data, init_half=2.0)
    has = embeddings.load(data, "text").items.has
    count = np.bincount(data.train.items, minlength=ITEMS)
    share = np.where(has, 2.0 / (2.0 + count), 0.0)[:, None]
    assert np.unique(share).size > 4
    expected = share * whole["item"][:, :5] + np.sqrt(1 - share**2) * drawn["item"][:, :5]
    np.testing.assert_allclose(begun["item"][:, :5], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(begun["item"][~has], drawn["item"][~has])
    np.testing.assert_array_equal(begun["user"], whole["user"])


@pytest.mark.parametrize(
    ("backbone", "knobs", "tables"),
    [
        ("lightgcn", {}, {"item": 6, "user": 6}),
        ("sasrec", {"heads": 1}, {"item": 6}),
        ("gru4rec", {}, {"item": 6}),
        ("bert4rec", {"heads": 1}, {"item": 6}),
        ("deepfm", {}, {"item": 6, "user": 6}),  # the seventh number is the first-order weight
        ("dcnv2", {}, {"item": 6, "user": 6}),
    ],
)
def test_every_backbone_begins_with_them(data, backbone, knobs, tables):
    begun = _initial(data, backbone=backbone, **knobs)
    experiment = build.build(_run(data, "run", backbone=backbone, **knobs), data)
    specs = experiment.trainer.backbone.tables
    assert set(experiment.initial) == set(tables)
    expected = _expected(data, 6, norm=1.0)
    for name, width in tables.items():
        spec, (rows, has) = specs[name], expected[name]
        assert spec.vector_width == width
        rows = rows * spec.init_std * np.sqrt(width / spec.width)
        np.testing.assert_allclose(begun[name][has, :width], rows[has], rtol=1e-3, atol=1e-5)


def test_variance_takes_the_published_columns():
    # METHODS' golden value: variances 0, 1, 16, 0 over the popular rows, of which 1 and 2 are kept.
    values = np.array(
        [[5, 0, -4, 1], [5, 2, 4, 1], [-9, 1, 0, 8], [7, 1, 0, -8], *[[1, 1, 1, 50]] * 6]
    )
    popular = np.array([9, 9, 0, 0, *[0] * 6])
    vectors = Vectors(values.astype(np.float32), np.ones(10, bool))
    columns = initial_values.columns_of_variance(vectors, 2, popular)
    np.testing.assert_array_equal(values[:2].var(axis=0), [0, 1, 16, 0])
    np.testing.assert_array_equal(columns, [1, 2])
    # A popular row without a vector is none of the popular ones.
    without = Vectors(vectors.values, np.arange(10) != 0)
    np.testing.assert_array_equal(
        initial_values.columns_of_variance(without, 1, popular),
        [np.argmax(values[1:3].var(axis=0))],
    )


@pytest.mark.parametrize(
    ("how", "width", "expected"),
    [
        ("uniform", 3, [0, 4, 8]),
        ("uniform", 5, [0, 2, 4, 6, 8]),
        ("leading", 3, [0, 1, 2]),
        ("all", 12, list(range(12))),
    ],
)
def test_columns_are_taken_as_they_are(how, width, expected):
    values = np.arange(24, dtype=np.float32).reshape(2, 12)
    vectors = Vectors(values, np.ones(2, bool))
    projection = initial_values.make_projection(how, vectors, width, np.zeros(2))
    np.testing.assert_array_equal(projection(values), values[:, expected])


def test_rows_wider_than_leading_vectors_are_drawn_behind_them(data):
    drawn = _initial(data, dim=20, init_item_vectors="")["item"]
    begun = _initial(data, dim=20, init_how="leading")["item"]
    np.testing.assert_array_equal(begun[:, WIDTH:], drawn[:, WIDTH:])
    np.testing.assert_array_equal(begun[list(NO_TEXT)], drawn[list(NO_TEXT)])
    vectors = embeddings.load(data, "text").items
    values, has = vectors.values, vectors.has
    # The numbers that are given are as large as those that are drawn: .1 / sqrt(20) each.
    scale = 0.1 * np.sqrt(WIDTH / 20) / np.sqrt(np.square(values[has]).sum(axis=1).mean())
    np.testing.assert_allclose(begun[has, :WIDTH], scale * values[has], rtol=1e-5)


def test_random_columns_are_the_same_every_time():
    vectors = Vectors(np.arange(100, dtype=np.float32)[None], np.ones(1, bool))
    first, second = (
        initial_values.make_projection("random", vectors, 50, np.zeros(1))(vectors.values)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert len(set(first[0])) < 50  # with repetition


def test_users_of_the_same_product_lie_in_the_items_space(data):
    items = embeddings.load(data, "text").items
    copies = Vectors(np.resize(items.values, (USERS, WIDTH)), np.resize(items.has, USERS))
    embeddings.write(data, "both", items, copies, users_from="file")
    begun = _initial(data, init_item_vectors="both", init_user_vectors="both", item_bias=False)
    has = np.resize(items.has, USERS)
    alike = np.resize(begun["item"], (USERS, 6))
    ratio = begun["user"][has] / alike[has]  # the tables differ in length alone
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_scaling_makes_the_root_mean_square_length_that_of_drawn_rows():
    vectors = Vectors(np.array([[3, 4], [0, 0], [9, 9]], np.float32), np.array([True, True, False]))
    scaled = initial_values.scaled(vectors, TableSpec(3, 8, 0.5, scalars=6), 1.0)
    assert np.sqrt((scaled.values[:2] ** 2).sum(axis=1).mean()) == pytest.approx(0.5 * 0.5)
    nothing = Vectors(np.zeros((2, 2), np.float32), np.array([True, False]))
    with pytest.raises(InputError, match=r"1 of 2 rows have one, and all are zero"):
        initial_values.scaled(nothing, TableSpec(2, 2, 0.5), 1.0)


def test_a_run_says_what_it_began_with_and_goes_on_with_the_same_vectors(data, tmp_path):
    run = _run(data, tmp_path / "run", epochs=1)
    initial = build.build(run, data).initial
    known = int(_expected(data, 5, norm=1.0)["user"][1].sum())
    assert initial_values.summary(initial, data).endswith(f"18 of 20 items and {known} of 24 users")
    loop.train(run)
    record = run_directory.read_record(run.workdir)
    assert record["initial_rows"] == {
        "item": {"vectors": 18, "drawn": 2},
        "user": {"vectors": known, "drawn": 24 - known},
    }
    loop.train(_run(data, tmp_path / "run", epochs=2))  # goes on, and keeps what it said
    assert run_directory.read_record(run.workdir)["initial_rows"] == record["initial_rows"]

    write_vectors(data, "text", seed=1, overwrite=True)
    with pytest.raises(ConfigError, match=r"--init_item_vectors: text holds other vectors now"):
        loop.train(_run(data, tmp_path / "run", epochs=3))


def test_seeds_trained_together_begin_as_each_alone(data, tmp_path):
    def runs(where: str) -> list[config.RunConfig]:
        more = {"kernels": "xla", "epochs": 1}
        return [_run(data, tmp_path / f"{where}{seed}", seed=seed, **more) for seed in (0, 1)]

    multi_seed.train_seeds(runs("together"))
    for run in runs("alone"):
        loop.train(run)
    losses = [
        json.loads((tmp_path / f"{where}{seed}/log.jsonl").read_text().splitlines()[-1])
        for where in ("together", "alone")
        for seed in (0, 1)
    ]
    for one, other in zip(losses[:2], losses[2:], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


def test_the_vectors_are_an_argument_of_the_program(data):
    experiment = build.build(_run(data, "run"), data)
    make = jax.jit(lambda seed, rows: programs.init_state(experiment.trainer, seed, rows))
    text = make.lower(np.int32(0), experiment.initial).as_text()
    assert "tensor<128x5xf32>" in text.split("->")[0]  # an input, padded
    assert not any("dense<" in line and "128x5xf32" in line for line in text.splitlines())


def test_the_step_is_the_program_of_a_run_without_vectors(data):
    texts = []
    for knobs in ({}, {"init_item_vectors": ""}):
        experiment = build.build(_run(data, "run", **knobs), data)
        state = programs.init_state(experiment.trainer, 0)
        key = jax.random.key_data(jax.random.key(1))
        run_steps = step.make_run_steps(experiment.trainer)
        texts.append(run_steps.lower(state, experiment.arrays, key, np.int32(1)).as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"dim": 14},
            r"pca fills 13 numbers of a row and needs vectors of at least as many; these",
        ),
        ({"init_how": "all"}, r"all fills 5 numbers of a row and needs vectors of exactly"),
        ({"backbone": "gru4rec", "init_user_vectors": "text"}, r"gru4rec has no rows of users"),
    ],
)
def test_what_does_not_fit_is_refused(data, knobs, message):
    with pytest.raises(ConfigError, match=message):
        build.build(_run(data, "run", **knobs), data)


def test_vectors_that_vary_in_too_few_directions_are_refused(data):
    items = embeddings.load(data, "text").items
    flat = Vectors(items.values[:, :1] * np.ones((1, WIDTH), np.float32), items.has)
    users = Vectors(np.zeros((USERS, WIDTH), np.float32), np.zeros(USERS, bool))
    embeddings.write(data, "flat", flat, users, users_from="file")
    with pytest.raises(ConfigError, match=r"18 vectors vary in 1 directions, and a row has 5"):
        build.build(_run(data, "run", init_item_vectors="flat"), data)


def test_other_products_are_refused(data, tmp_path):
    with pytest.raises(ManifestError, match=r"has no embeddings 'nothing'; it has: text"):
        build.build(_run(data, "run", init_item_vectors="nothing"), data)
    other = worlds.random_dataset(
        tmp_path / "other", seed=9, n_users=USERS, n_items=ITEMS, per_user=6
    )
    (other.path / "embeddings").symlink_to(data.path / "embeddings")
    with pytest.raises(ManifestError, match=r"split"):
        build.build(_run(other, "run"), other)
    next((data.path / "embeddings/text/items").iterdir()).write_bytes(b"")
    with pytest.raises(ShardError):
        build.build(_run(data, "run"), data)


def test_init_from_and_vectors_exclude_each_other(data):
    with pytest.raises(ConfigError, match=r"--init_item_vectors and --init_from both say"):
        _run(data, "run", init_from="there")


def test_a_scale_without_vectors_does_nothing_and_is_refused(data):
    run = _run(data, "run", init_item_vectors="", init_scale=2.0)
    with pytest.raises(ConfigError, match=r"init_scale=2.0 is not used without initial vectors"):
        config.check_used(run, ["init_scale"])
