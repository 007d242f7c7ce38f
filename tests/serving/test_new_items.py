"""Items that a run has never seen, scored from their vectors: equal to plain numpy; refusals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds

from slgr_jax import api, serving
from slgr_jax.config import make_run
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.serving import new_items
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.training import loop

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, WIDTH, DIM, LAYERS = 16, 12, 4, 6, 2
IDS = ["new b", "new a", "café"]
NEW = np.random.default_rng(7).normal(1.0, 2.0, (3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "d"
    dataset = worlds.random_dataset(path, n_users=USERS, n_items=ITEMS, per_user=6, categories=3)
    values = np.random.default_rng(0).normal(1.0, 2.0, (ITEMS, WIDTH)).astype(np.float32)
    items = Vectors(values, np.arange(ITEMS) != 5)
    users = Vectors(np.zeros((USERS, WIDTH), np.float32), np.zeros(USERS, bool))
    embeddings.write(dataset, "text", items, users, users_from="file")
    return dataset


@pytest.fixture(scope="module")
def runs(data: Dataset, tmp_path_factory: pytest.TempPathFactory):
    """Knobs of a backbone -> its trained run."""
    root, kept = tmp_path_factory.mktemp("runs"), {}

    def run(**knobs):
        name = "_".join(map(str, knobs.values()))
        if name not in kept:
            common = {"dim": DIM, "batch_size": 16, "epochs": 1, "patience": 0}
            common |= {"item_vectors": "text", "vector_dtype": "float32", "max_history": 4}
            loop.train(make_run(str(data.path), str(root / name), **{**common, **knobs}))
            kept[name] = serving.load(str(root / name))
        return kept[name]

    return run


def _adapted(data: Dataset, run, name: str) -> np.ndarray:
    """[3, D] of the new items, from the product and the saved weights, in plain numpy."""
    items = embeddings.load(data, "text").items
    trained = items.values[items.has & (data.popularity > 0)].astype(np.float64)
    mean = trained.mean(axis=0)
    z = (NEW - mean) / np.sqrt(((trained - mean) ** 2).mean())
    layer = run.restored.serving.params["adapters"][name]["layer_0"]
    return z @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


@pytest.mark.parametrize(
    ("knobs", "divided"),
    [
        ({"backbone": "mf"}, 1),
        ({"backbone": "mf", "item_rows": False}, 1),
        ({"backbone": "lightgcn", "layers": LAYERS}, LAYERS + 1),
        ({"backbone": "sasrec", "heads": 1}, 1),
    ],
)
def test_new_items_are_scored_by_what_their_vectors_come_to(data, runs, knobs, divided):
    run = runs(**knobs)
    before = run.vectors()
    grown = run.with_items(IDS, NEW)
    after = grown.vectors()
    expected = _adapted(data, run, "item") / divided
    np.testing.assert_allclose(after.items[ITEMS:], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(after.items[:ITEMS], before.items)
    np.testing.assert_array_equal(after.users, before.users)

    scores = after.users[3] @ after.items.T
    best = np.argsort(-scores, kind="stable")
    names = [*(f"i{item}" for item in range(ITEMS)), *IDS]
    listed = grown.recommend(["u3"], k=ITEMS + 3, mask_seen=False)
    assert listed.items == [[names[item] for item in best]]
    pair = grown.scores(["u3"] * 2, ["café", "i2"])
    np.testing.assert_allclose(pair, scores[[-1, 2]], rtol=1e-4, atol=1e-5)


def test_a_click_model_sees_them_as_a_field(data, runs):
    run = runs(backbone="dcnv2")
    grown = run.with_items(IDS, NEW)
    made = np.asarray(grown.restored.serving.values["item_vector"])[ITEMS:]
    np.testing.assert_allclose(made, _adapted(data, run, "item_vector"), rtol=1e-3, atol=1e-5)
    known = [f"i{item}" for item in range(ITEMS)]
    np.testing.assert_array_equal(
        grown.scores(["u1"] * ITEMS, known), run.scores(["u1"] * ITEMS, known)
    )
    new = grown.scores(["u1"] * 3, IDS)
    assert len(set(new.tolist())) == 3  # they differ in nothing but their vectors
    listed = grown.recommend(["u1"], k=ITEMS + 3, mask_seen=False)
    assert set(IDS) <= set(listed.items[0])


def test_from_a_file_to_lists_and_vectors(data, runs, tmp_path):
    run = runs(backbone="mf")
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table({"item": IDS, "vector": NEW.tolist()}), path)
    api.recommend(
        run.workdir, "all", tmp_path / "lists.parquet", k=ITEMS + 3, mask_seen=False, new_items=path
    )
    assert set(IDS) <= set(pq.read_table(tmp_path / "lists.parquet").column("item").to_pylist())
    api.export(run.workdir, tmp_path / "export", new_items=path)
    exported = pq.read_table(next((tmp_path / "export").glob("item*.parquet")))
    assert exported.num_rows == ITEMS + 3
    assert exported.column(0).to_pylist()[-3:] == IDS


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["i3", "x", "y"], NEW, r"new items 'i3' are items of the run already, or there twice"),
        (["x", "x", "y"], NEW, r"new items 'x' are"),
        (IDS, NEW[:, :3], r"vectors of 3 numbers, --item_vectors=text has 4"),
        (IDS, NEW * [[1], [np.nan], [1]], r"the vector of item 'new a' is not finite"),
        (IDS[:2], NEW, r"2 ids and vectors of shape \(3, 4\)"),
    ],
)
def test_odd_items_are_refused(runs, ids, vectors, message):
    with pytest.raises(InputError, match=message):
        runs(backbone="mf").with_items(ids, vectors)


def test_a_run_without_an_adapter_is_refused(data, runs):
    with pytest.raises(ConfigError, match=r"without --item_vectors: it has no adapter"):
        runs(backbone="mf", item_vectors="").with_items(IDS, NEW)


def test_other_vectors_than_the_run_began_with_are_refused(data, runs):
    run = runs(backbone="mf")
    product = embeddings.load(data, "text")
    try:
        other = Vectors(product.items.values + 1, product.items.has)
        embeddings.write(data, "text", other, product.users, users_from="file", overwrite=True)
        with pytest.raises(ConfigError, match=r"--item_vectors: text holds other vectors now"):
            new_items.with_items(run, IDS, NEW)
    finally:
        embeddings.write(
            data, "text", product.items, product.users, users_from="file", overwrite=True
        )
