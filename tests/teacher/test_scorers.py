"""The local scorer: a toy embedder with known geometry, then the real token vectors."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from slgr_jax.config import SliceConfig, TeachConfig
from slgr_jax.errors import InputError, UserError
from slgr_jax.teacher import preferences, scorers

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None or importlib.util.find_spec("tokenizers") is None,
    reason="the extra 'llm' is not installed",
)
N_USERS, N_ITEMS = 60, 90


class Letters:
    """Counts of the letters a..e, unit length: texts that share letters are near."""

    name = "letters"

    def __init__(self):
        self.seen = []

    def embed(self, texts):
        self.seen += texts
        rows = np.array([[text.count(c) for c in "abcde"] for text in texts], np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


@pytest.fixture
def clans(make_dataset):
    """User u and item i of clan k = index % 3; users interact within their clan only."""
    rng = np.random.default_rng(0)
    titles = ["abc"[i % 3] * (1 + i % 4) + "d" * (i % 2) for i in range(N_ITEMS)]
    train = {}
    for u in range(N_USERS):
        size = 3 if u < 20 else 8
        train[u] = sorted(rng.choice(np.arange(u % 3, N_ITEMS, 3), size, replace=False).tolist())
    train[59] = []
    return make_dataset(
        users=[f"u{u}" for u in range(N_USERS)],
        items=[f"i{i}" for i in range(N_ITEMS)],
        titles=titles,
        train=train,
        valid={0: [N_ITEMS - 1]},
        test={1: [N_ITEMS - 2]},
    )


def test_item_fields_split_title_and_year(make_dataset):
    dataset = make_dataset(
        titles=["Heat (1995)", "1984", None, "(2001)", "Se7en (a) (1995) ", "x"],
        categories=[["Drama", "Crime"], [], None, ["Noir"], [""], ["A", ""]],
        texts=[None, "long text", None, None, "", None],
    )
    assert scorers.item_fields(dataset) == {
        "title": ["Heat", "1984", "", "", "Se7en (a)", "x"],
        "year": ["1995", "", "", "2001", "1995", ""],
        "categories": ["Drama, Crime", "", "", "Noir", "", "A"],
        "text": ["", "long text", "", "", "", ""],
    }


def test_item_vectors_are_centred_whitened_and_unit(make_dataset):
    titles = ["a", "b", "ab", "c", "", "ae"]
    dataset = make_dataset(titles=titles)
    vectors = scorers.item_vectors(dataset, Letters())
    # By the definition, with dense algebra: W = (C + SHRINKAGE tr(C)/D I)^-1 between unit rows.
    raw = Letters().embed(titles)
    present = np.array([bool(title) for title in titles])
    centred = raw - raw[present].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    centred = centred[present].astype(np.float64)
    covariance = centred.T @ centred / present.sum()
    ridge = scorers.SHRINKAGE * np.trace(covariance) / 5
    products = centred @ np.linalg.inv(covariance + ridge * np.eye(5)) @ centred.T
    norms = np.sqrt(np.diag(products))
    np.testing.assert_allclose(
        (vectors @ vectors.T)[np.ix_(present, present)],
        products / np.outer(norms, norms),
        atol=1e-5,
    )
    assert not vectors[~present].any()


def test_fields_without_information_are_left_out(make_dataset):
    same = make_dataset(titles=["a", "b", "ab", "c", "d", "ae"], texts=["e"] * 6)
    alone = make_dataset("alone", titles=["a", "b", "ab", "c", "d", "ae"])
    np.testing.assert_array_equal(
        scorers.item_vectors(same, Letters()), scorers.item_vectors(alone, Letters())
    )
    with pytest.raises(InputError, match=r"has no item texts .*--items_input"):
        scorers.item_vectors(make_dataset("bare"), Letters())


def test_scores_are_cosines_with_the_training_profile(clans):
    table, _ = scorers.score_candidates(clans, Letters(), TeachConfig(candidates=5, tail_users=3))
    vectors = scorers.item_vectors(clans, Letters())
    history = clans.positives(("train",))
    for row in table.slice(0, 200).to_pylist():
        mean = vectors[history.row(row["user"])].mean(0)
        cosine = mean @ vectors[row["item"]] / np.linalg.norm(mean)
        assert row["score"] == pytest.approx(float(cosine), abs=1e-5)
    clan = table["user"].to_numpy() % 3 == table["item"].to_numpy() % 3
    scores = table["score"].to_numpy()
    assert scores[clan].min() > scores[~clan].max()


def test_candidates_follow_the_paper(clans):
    table, counts = scorers.score_candidates(
        clans,
        Letters(),
        TeachConfig(candidates=7, popular_pool=30, cold_candidates=0, tail_users=0),
    )
    users, items = table["user"].to_numpy(), table["item"].to_numpy()
    pool = np.lexsort((np.arange(N_ITEMS), -clans.popularity.astype(int)))[:30]
    assert set(items) <= set(pool.tolist())
    assert np.bincount(users, minlength=N_USERS).tolist() == [7] * 59 + [0]  # 59: no history
    assert counts == {"popular_candidates": 59 * 7, "cold_candidates": 0, "tail_candidates": 0}
    own = {
        (u, i) for u, i in zip(clans.train.users.tolist(), clans.train.items.tolist(), strict=True)
    }
    assert own.isdisjoint(zip(users.tolist(), items.tolist(), strict=True))
    assert (np.diff(users.astype(np.int64) * N_ITEMS + items) > 0).all()  # sorted, no repeats

    table, _ = scorers.score_candidates(
        clans, Letters(), TeachConfig(candidates=0, cold_candidates=9, tail_users=0)
    )
    cold = np.flatnonzero(clans.slices(SliceConfig()).cold_users & (clans.history > 0))
    assert set(table["user"].to_pylist()) == set(cold.tolist())
    assert max(np.bincount(table["user"].to_numpy())) == 9  # fewer where an own item was drawn

    table, _ = scorers.score_candidates(
        clans,
        Letters(),
        TeachConfig(candidates=0, cold_candidates=0, tail_users=4, tail_fraction=0.1),
    )
    tail = clans.slices(SliceConfig(tail_item_fraction=0.1)).tail_items
    assert set(table["item"].to_pylist()) == set(np.flatnonzero(tail).tolist())
    assert max(np.bincount(table["item"].to_numpy())) <= 4


def test_cells_cover_the_text_space_evenly():
    # Four far-apart clusters of 6 items, and 4 cells: each cell is one cluster.
    centres = np.array([[0, 0], [100, 3], [210, 1], [350, 2]], float)
    vectors = np.concatenate([centre + np.arange(12).reshape(6, 2) / 10 for centre in centres])
    cells = scorers._cells(np.arange(24), vectors, 4)
    assert sorted(sorted(cell.tolist()) for cell in cells) == np.arange(24).reshape(4, 6).tolist()
    assert [len(c) for c in scorers._cells(np.arange(10), vectors[:10], 3)] == [3, 3, 4]


def test_draws_depend_on_the_seed_only(clans, make_dataset):
    first, _ = scorers.score_candidates(clans, Letters(), TeachConfig(seed=1))
    again, _ = scorers.score_candidates(clans, Letters(), TeachConfig(seed=1))
    other, _ = scorers.score_candidates(clans, Letters(), TeachConfig(seed=2))
    assert first.equals(again)
    assert not first.equals(other)


def test_evaluation_parts_change_nothing(make_dataset):
    titles = ["a", "b", "ab", "c", "d", "ae"]
    one = make_dataset("one", titles=titles, valid={0: [3]}, test={1: [4]})
    two = make_dataset("two", titles=titles, valid={0: [5]}, test={3: [0]})
    tables = [scorers.score_candidates(d, Letters(), TeachConfig(seed=3))[0] for d in (one, two)]
    assert tables[0].equals(tables[1])


def test_held_in_accuracy_is_one_for_clans_and_half_for_noise(clans):
    good = scorers.held_in_accuracy(clans, Letters(), negatives=3)
    # A negative of the user's own clan can win; two thirds are of other clans and cannot.
    assert good["uniform"] > 2 / 3
    assert good["uniform"] > scorers.held_in_accuracy(clans, Noise(), negatives=3)["uniform"] + 0.1
    noise = scorers.held_in_accuracy(clans, Noise(), negatives=20, left_out=0.5)
    assert noise["uniform"] == pytest.approx(0.5, abs=0.06)
    assert set(good) == {"uniform", "uniform_cold", "popular", "popular_cold"}


class Noise:
    """Vectors that have nothing to do with the text."""

    name = "noise"

    def embed(self, texts):
        rows = np.random.default_rng(5).normal(size=(len(texts), 64))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_missing_extra_names_the_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wordllama" else real(name)
    )
    with pytest.raises(
        UserError, match=r"pip install 'slgr_jax\[llm\]' .*pip install -e '.\[llm\]'"
    ):
        scorers.make("wordllama")


@needs_model
def test_wordllama_reads_the_package_without_importing_it():
    import sys

    model = scorers.make("wordllama")
    assert "wordllama" not in sys.modules
    texts = ["Toy Story", "", "Toy  Story", "A Bug's Life", "tax law"]
    vectors = model.embed(texts)
    assert vectors.shape == (5, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 1, 1], atol=1e-6)
    # By hand: the mean of the token vectors, normalised.
    ids = model._tokenizer.encode("A Bug's Life", add_special_tokens=False).ids
    mean = model._vectors[ids].mean(0)
    np.testing.assert_allclose(vectors[3], mean / np.linalg.norm(mean), atol=1e-6)
    assert model.embed([]).shape == (0, 256)


@needs_model
def test_wordllama_is_close_on_related_titles():
    model = scorers.make("wordllama")
    crime, mystery, cookery = model.embed(["Thriller Crime", "murder mystery", "cooking recipes"])
    assert crime @ mystery > 0.3 > 0.1 > crime @ cookery


@needs_model
def test_score_writes_a_product_that_loads(clans):
    manifest = scorers.score(clans, TeachConfig(name="wl", candidates=4, seed=2))
    assert manifest.model == "wordllama-l2_supercat-256"
    assert manifest.built_from == "train_only"
    assert manifest.score_kind == "cosine"
    assert len(manifest.prompt_hash) == 16
    assert manifest.counts["train_pairs"] == 0
    teacher = preferences.load(clans, "wl")
    assert teacher.items.size == manifest.counts["rows"]
    assert np.abs(teacher.scores).max() <= 1 + 1e-5
    with pytest.raises(InputError, match=r"wl exists; .*--overwrite"):
        scorers.score(clans, TeachConfig(name="wl"))
