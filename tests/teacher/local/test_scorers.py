"""Local scorers: a toy embedder and a toy language model, then the real token vectors."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from slgr_jax.config import CandidateConfig, ScoreConfig, SliceConfig, TeachConfig
from slgr_jax.data.dataset import Csr
from slgr_jax.errors import ConfigError, InputError, UserError
from slgr_jax.teacher.ask import candidates
from slgr_jax.teacher.local import likelihood, scorers
from slgr_jax.teacher.local.likelihood import Likelihood
from slgr_jax.teacher.products import preferences

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


def test_scores_are_cosines_with_the_shown_history(clans):
    scorer = scorers.Cosine(clans, Letters())
    pairs, _ = scorers.draw_pairs(clans, scorer, CandidateConfig(candidates=5, tail_users=3))
    hidden = Csr.from_pairs(
        np.array([3]), np.array([clans.positives(("train",)).row(3)[0]]), N_USERS
    )
    history = candidates.described_history(clans, scorer.described, hidden)
    scores = scorer.score(history, pairs.users, pairs.items)
    for u, i, score in zip(pairs.users.tolist(), pairs.items.tolist(), scores, strict=True):
        shown = clans.positives(("train",)).row(u)
        shown = shown[1:] if u == 3 else shown
        mean = scorer.vectors[shown].mean(0)
        assert score == pytest.approx(
            float(mean @ scorer.vectors[i] / np.linalg.norm(mean)), abs=1e-5
        )
    clan = pairs.users % 3 == pairs.items % 3
    assert scores[clan].min() > scores[~clan].max()
    assert np.isnan(scorer.score(history, np.array([59]), np.array([0])))  # 59: no history


def test_candidates_follow_the_paper(clans):
    scorer = scorers.Cosine(clans, Letters())
    pairs, counts = scorers.draw_pairs(
        clans,
        scorer,
        CandidateConfig(candidates=7, popular_pool=30, cold_candidates=0, tail_users=0),
    )
    users, items = pairs.users, pairs.items
    pool = np.lexsort((np.arange(N_ITEMS), -clans.popularity.astype(int)))[:30]
    assert set(items) <= set(pool.tolist())
    assert np.bincount(users, minlength=N_USERS).tolist() == [7] * 59 + [0]  # 59: no history
    assert counts == {"popular_candidates": 59 * 7, "cold_candidates": 0, "tail_candidates": 0}
    own = {
        (u, i) for u, i in zip(clans.train.users.tolist(), clans.train.items.tolist(), strict=True)
    }
    assert own.isdisjoint(zip(users.tolist(), items.tolist(), strict=True))
    assert (np.diff(users.astype(np.int64) * N_ITEMS + items) > 0).all()  # sorted, no repeats

    pairs, _ = scorers.draw_pairs(
        clans, scorer, CandidateConfig(candidates=0, cold_candidates=9, tail_users=0)
    )
    cold = np.flatnonzero(clans.slices(SliceConfig()).cold_users & (clans.history > 0))
    assert set(pairs.users.tolist()) == set(cold.tolist())
    assert max(np.bincount(pairs.users)) == 9  # fewer where an own item was drawn

    pairs, _ = scorers.draw_pairs(
        clans,
        scorer,
        CandidateConfig(candidates=0, cold_candidates=0, tail_users=4, tail_fraction=0.1),
    )
    tail = clans.slices(SliceConfig(tail_item_fraction=0.1)).tail_items
    assert set(pairs.items.tolist()) == set(np.flatnonzero(tail).tolist())
    assert max(np.bincount(pairs.items)) <= 4


def test_cells_cover_the_text_space_evenly():
    # Four far-apart clusters of 6 items, and 4 cells: each cell is one cluster.
    centres = np.array([[0, 0], [100, 3], [210, 1], [350, 2]], float)
    vectors = np.concatenate([centre + np.arange(12).reshape(6, 2) / 10 for centre in centres])
    cells = candidates._cells(np.arange(24), vectors, 4)
    assert sorted(sorted(cell.tolist()) for cell in cells) == np.arange(24).reshape(4, 6).tolist()
    assert [len(c) for c in candidates._cells(np.arange(10), vectors[:10], 3)] == [3, 3, 4]


def test_draws_depend_on_the_seed_only(clans):
    scorer = scorers.Cosine(clans, Letters())
    draws = [
        scorers.draw_pairs(clans, scorer, CandidateConfig(), seed=seed)[0] for seed in (1, 1, 2)
    ]
    first, again, other = ((pairs.users * N_ITEMS + pairs.items).tolist() for pairs in draws)
    assert first == again
    assert first != other


def test_evaluation_parts_change_nothing(make_dataset):
    titles = ["a", "b", "ab", "c", "d", "ae"]
    one = make_dataset("one", titles=titles, valid={0: [3]}, test={1: [4]})
    two = make_dataset("two", titles=titles, valid={0: [5]}, test={3: [0]})
    draws = [
        scorers.draw_pairs(d, scorers.Cosine(d, Letters()), CandidateConfig(), seed=3)[0]
        for d in (one, two)
    ]
    np.testing.assert_array_equal(draws[0].users, draws[1].users)
    np.testing.assert_array_equal(draws[0].items, draws[1].items)


def test_held_in_accuracy_is_one_for_clans_and_half_for_noise(clans):
    def accuracy(embedder, **options):
        return scorers.held_in_accuracy(clans, scorers.Cosine(clans, embedder), **options)

    good = accuracy(Letters(), negatives=3)
    # A negative of the user's own clan can win; two thirds are of other clans and cannot.
    assert good["uniform"] > 2 / 3
    assert good["uniform"] > accuracy(Noise(), negatives=3)["uniform"] + 0.1
    noise = accuracy(Noise(), negatives=20, left_out=0.5)
    assert noise["uniform"] == pytest.approx(0.5, abs=0.06)
    kinds = {f"{name}{what}" for name in ("uniform", "popular") for what in ("", "_cold", "_error")}
    assert set(good) == kinds


@pytest.mark.parametrize(("of_training", "expected"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_held_in_accuracy_of_scores_that_know_the_answer(clans, of_training, expected):
    own = {*zip(clans.train.users.tolist(), clans.train.items.tolist(), strict=True)}

    class Knows:
        described = np.ones(N_ITEMS, bool)

        def score(self, history, users, items, *, keep=None, restart=False):
            asked = {*zip(users.tolist(), items.tolist(), strict=True)}
            shown = {*zip(history[0].tolist(), history[1].tolist(), strict=True)}
            assert shown <= own
            self.hidden = (asked & own) - shown
            pairs = zip(users.tolist(), items.tolist(), strict=True)
            return np.array([of_training * (pair in own) for pair in pairs])

    scorer = Knows()
    found = scorers.held_in_accuracy(clans, scorer, limit=12)
    assert len(scorer.hidden) >= 12
    assert (found["uniform"], found["popular"], found["uniform_error"]) == (expected, expected, 0)


class Counts:
    """A unigram model of the prompt: log P(token) = log((count in the prompt + 1) / (len + 128)).

    One token a character; counts its calls and can be made to fail at one of them.
    """

    name, batch = "counts", 2

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = 0, fail_at

    def encode(self, texts):
        return [[ord(c) for c in text] for text in texts]

    def log_probs(self, prompts, continuations):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [
            np.array([self.log_prob(prompt, one) for one in many], np.float32)
            for prompt, many in zip(prompts, continuations, strict=True)
        ]

    def log_prob(self, prompt, one):
        return sum(np.log((prompt.count(t) + 1) / (len(prompt) + 128)) for t in one)


def likelihood_of(dataset, model=None, history_items=3, noun=""):
    lines = scorers.language_lines(dataset)
    return Likelihood(model or Counts(), lines, history_items, noun=noun)


def everything(dataset):
    """History and all pairs of users with and without one."""
    history = candidates.described_history(dataset, np.ones(N_ITEMS, bool))
    users, items = np.divmod(np.arange(N_USERS * N_ITEMS), N_ITEMS)
    return history, users[::7].astype(np.int32), items[::7].astype(np.int32)


def test_lines_are_as_a_reader_would_say_them(make_dataset):
    dataset = make_dataset(
        titles=["Net, The (1995)", "Heat", None, " a  b ", "Postino, Il (1994)", "Me, Myself"],
        texts=[None, "x", "a long\ntext", None, None, None],
        categories=[["A", "", "B", "C", "D"], [], None, ["A"], None, None],
    )
    assert scorers.language_lines(dataset) == [
        *("The Net (A, B, C)", "Heat", "a long text", "a b (A)", "Il Postino", "Me, Myself")
    ]
    with pytest.raises(InputError, match="has no item texts to score with"):
        scorers.language_lines(make_dataset("bare"))


@pytest.mark.parametrize(
    ("noun", "opening", "neutral"),
    [("", "I like:\n-", "A list:\n-"), ("pop songs", "Pop songs I like:\n-", "Pop songs:\n-")],
)
def test_likelihood_is_the_log_ratio_by_hand(clans, noun, opening, neutral):
    history, users, items = everything(clans)
    model = Counts()
    scores = likelihood_of(clans, model, noun=noun).score(history, users, items)
    titles = clans.items.column("title").to_pylist()
    for u, i, score in zip(users.tolist()[::9], items.tolist()[::9], scores[::9], strict=True):
        shown = [titles[item] for item in history[1][history[0] == u]][-3:]
        if not shown:
            assert np.isnan(score)
            continue
        prompt = opening + "".join(f" {title}\n-" for title in shown)
        title = [ord(c) for c in f" {titles[i]}"]
        liked = model.log_prob([ord(c) for c in prompt], title)
        plain = model.log_prob([ord(c) for c in neutral], title)
        assert score == pytest.approx((liked - plain) / len(title) ** 0.5, abs=1e-5)


def test_order_of_the_pairs_changes_nothing(clans):
    history, users, items = everything(clans)
    scorer = likelihood_of(clans)
    order = np.random.default_rng(0).permutation(users.size)
    np.testing.assert_array_equal(
        scorer.score(history, users[order], items[order]),
        scorer.score(history, users, items)[order],
    )


def test_a_killed_job_goes_on_and_ends_the_same(clans, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(likelihood, "_USERS_PER_PART", 8)
    history, users, items = everything(clans)
    keep = tmp_path / "job"
    whole = Counts()
    expected = likelihood_of(clans, whole).score(history, users, items, keep=keep)
    assert not keep.exists()
    assert "counts: 60 users, 772 pairs" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        likelihood_of(clans, Counts(fail_at=14)).score(history, users, items, keep=keep)
    assert sorted(path.stem for path in keep.glob("*.npy")) == [
        *("prior", "users-00000", "users-00001")
    ]
    again = Counts()
    resumed = likelihood_of(clans, again).score(history, users, items, keep=keep)
    np.testing.assert_array_equal(resumed, expected)
    assert again.calls == whole.calls - 1 - 8  # the prior, and two parts of 8 users by twos
    assert not keep.exists()


def test_parts_of_another_job_are_refused_or_dropped(clans, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "_USERS_PER_PART", 8)
    history, users, items = everything(clans)
    keep = tmp_path / "job"
    with pytest.raises(KeyboardInterrupt):
        likelihood_of(clans, Counts(fail_at=14)).score(history, users, items, keep=keep)
    other = likelihood_of(clans, history_items=2)
    with pytest.raises(InputError, match=r"parts of a job with other settings.*--overwrite"):
        other.score(history, users, items, keep=keep)
    np.testing.assert_array_equal(
        other.score(history, users, items, keep=keep, restart=True),
        likelihood_of(clans, history_items=2).score(history, users, items),
    )


def test_a_stored_candidate_set_is_scored_without_what_it_hides(clans):
    options = CandidateConfig(candidates=2, calibration_users=9, calibration_pick="random")
    lines = clans.items.column("title").to_pylist()
    drawn = candidates.draw(clans, lines, options, seed=1)
    candidates.write(clans, "set", drawn, options, seed=1, diversity="popularity")
    common = TeachConfig(name="lm")
    scorer = likelihood_of(clans)
    manifest = scorers.score(clans, common, ScoreConfig(), options, scorer, candidate_set="set")
    assert manifest.training_items == "hidden"
    assert (manifest.model, manifest.score_kind) == ("counts", "log_ratio")
    teacher = preferences.load(clans, "lm")
    assert teacher.items.size == drawn.users.size
    shown = candidates.described_history(clans, scorer.described, drawn.hidden)
    owners = np.repeat(np.arange(N_USERS), np.diff(teacher.offsets)).astype(np.int32)
    np.testing.assert_array_equal(teacher.scores, scorer.score(shown, owners, teacher.items))
    few = ScoreConfig(max_users=5)
    scorers.score(clans, TeachConfig(name="few"), few, options, scorer, candidate_set="set")
    assert (np.diff(preferences.load(clans, "few").offsets) > 0).sum() == 5


def test_unknown_models_are_one_line(clans):
    with pytest.raises(ConfigError, match="transformers needs --llm="):
        scorers.make(clans, ScoreConfig(scorer="transformers"))
    with pytest.raises(UserError, match=r"--llm=nowhere/at/all (cannot be loaded|needs torch)"):
        scorers.make(clans, ScoreConfig(scorer="transformers", llm="nowhere/at/all"))


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
        scorers.WordLlama()


@needs_model
def test_wordllama_reads_the_package_without_importing_it():
    import sys

    model = scorers.WordLlama()
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
    model = scorers.WordLlama()
    crime, mystery, cookery = model.embed(["Thriller Crime", "murder mystery", "cooking recipes"])
    assert crime @ mystery > 0.3 > 0.1 > crime @ cookery


@needs_model
def test_score_writes_a_product_that_loads(clans):
    options = ScoreConfig()
    scorer = scorers.make(clans, options)
    common, asked = TeachConfig(name="wl", seed=2), CandidateConfig(candidates=4)
    manifest = scorers.score(clans, common, options, asked, scorer)
    assert manifest.model == "wordllama-l2_supercat-256"
    assert manifest.built_from == "train_only"
    assert manifest.score_kind == "cosine"
    assert len(manifest.prompt_hash) == 16
    assert manifest.counts["train_pairs"] == 0
    teacher = preferences.load(clans, "wl")
    assert teacher.items.size == manifest.counts["rows"]
    assert np.abs(teacher.scores).max() <= 1 + 1e-5
    with pytest.raises(InputError, match=r"wl exists; .*--overwrite"):
        scorers.score(clans, common, options, asked, scorer)
