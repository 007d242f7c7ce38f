"""benchmarks/quality/real_data.py on the shared data; skipped where that is absent."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import ScoreConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.errors import ConfigError
from slgr_jax.teacher.local import scorers
from slgr_jax.teacher.products import preferences

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "quality" / "real_data.py"
_spec = importlib.util.spec_from_file_location("benchmarks_real_data", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
real_data = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = real_data
_spec.loader.exec_module(real_data)

SHARED = real_data.default_shared()


def needs(folder):
    return pytest.mark.skipif(
        not (SHARED / folder / "interactions.parquet").is_file(),
        reason=f"shared/data/{folder} is not beside the checkout",
    )


def build(dataset, out):
    config = real_data.RealDataConfig(dataset=dataset, out=str(out))
    _, manifests = real_data.build(config)
    return dataset_lib.load(out / "data"), manifests


def as_set(users, items):
    return set(zip(np.asarray(users).tolist(), np.asarray(items).tolist(), strict=True))


def raw_pairs(data, part):
    """The pairs of a part, with the raw data's ids."""
    users, items = (
        np.array(ids.to_pylist(), np.int64) for ids in (data.user_ids, data.items["item_id"])
    )
    return as_set(users[part.users], items[part.items])


def test_absent_data_gives_one_line(tmp_path):
    command = [sys.executable, SCRIPT, "--dataset=ml1m", f"--shared={tmp_path}", "--out=x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--shared" in result.stderr
    assert str(tmp_path / "ml1m_llm_text") in result.stderr


def test_ranks_close_the_gaps_of_unusable_titles():
    table = pa.table(
        {"userId": [2, 1, 1, 1, 1], "itemId": [7, 5, 9, 5, 6], "rank": [4, 2, 9, 3, 5]}
    )
    user, item, rank = real_data._ranks(table)
    assert list(zip(user.tolist(), item.tolist(), rank.tolist(), strict=True)) == [
        (1, 5, 1.0),
        (1, 6, 2.0),
        (1, 9, 3.0),
        (2, 7, 1.0),
    ]


def test_shown_but_unranked_candidates_have_no_rank():
    ranked = (np.array([1, 1, 2]), np.array([5, 6, 5]), np.array([1.0, 2.0, 1.0]))
    candidates = pa.table(
        {"llm": ["m", "m", "m", "n"], "userId": [1, 1, 1, 2], "itemId": [5, 6, 8, 5]}
    )
    user, item, rank = real_data._with_unanswered(ranked, candidates, "m")
    # User 2's candidates are not recorded for m: all of that user is left out.
    assert as_set(user, item) == {(1, 5), (1, 6), (1, 8)}
    assert np.isnan(rank[item == 8]).all()
    assert not np.isnan(rank[item != 8]).any()
    everybody = pa.table({"llm": ["all", "all"], "userId": [-1, -1], "itemId": [5, 8]})
    user, item, rank = real_data._with_unanswered(ranked, everybody, "m")
    assert as_set(user[~np.isnan(rank)], item[~np.isnan(rank)]) == {(1, 5), (2, 5)}
    assert as_set(user[np.isnan(rank)], item[np.isnan(rank)]) == {(1, 8), (2, 8)}


def test_a_clone_in_place_of_shared_data(tmp_path):
    """The authors' files: parts, halves, the lists of three LLMs and all of them as one."""
    folder = tmp_path / "clone" / "data" / "dataset" / "facebook_book"
    folder.mkdir(parents=True)
    (folder / "trainingset.tsv").write_text("".join(f"{u}\t1\t1.0\n" for u in range(6)))
    rows = "".join(f"{u}\t{i}\t1.0\n" for u in range(6) for i in (2, 3))
    (folder / "testset.tsv").write_text(rows)
    (folder / "books.tsv").write_text("1\tEmma\n2\tDune\n3\tIt\n")
    for answers in real_data.FREE_LISTS.values():
        (folder / answers).mkdir(parents=True)
        for user in range(6):
            (folder / answers / f"user_{user}_checkpoint.txt").write_text("1. Dune\n2. It\n")
    out = tmp_path / "out"
    config = real_data.RealDataConfig(
        dataset="facebook_book", clone=str(tmp_path / "clone"), out=str(out)
    )
    _, manifests = real_data.build(config)
    assert [*manifests] == [*(f"{llm}_free_top50" for llm in real_data.FREE_LISTS), "all_free"]
    data = dataset_lib.load(out / "data")
    assert (len(data.train), len(data.valid), len(data.test)) == (6, 6, 6)
    assert len(preferences.load(data, "all_free").items) == 12
    refused = dataclasses.replace(config, dataset="ml1m")
    with pytest.raises(ConfigError, match="--clone does not go with --dataset=ml1m"):
        real_data.build(refused)


@needs("sisinf_llm_recs")
@pytest.mark.slow
def test_facebook_book(tmp_path):
    data, manifests = build("facebook_book", tmp_path)
    assert (data.n_users, data.n_items) == (1398, 2933)
    assert len(data.train) == 15_234  # the authors' training part, whole: the LLMs saw it all
    assert len(data.valid) + len(data.test) == 3744
    assert abs(len(data.valid) - len(data.test)) < 100
    assert len(manifests) == 10
    llms = ("gpt-3.5-turbo", "palm-2", "text-davinci-003")
    assert all(f"{llm}_rerank_userknn50" in manifests for llm in llms)
    for name, manifest in manifests.items():
        assert manifest.built_from == "train_only"
        assert manifest.unlisted == ("below" if "free" in name else "unknown")
    free = preferences.load(data, "gpt-3.5-turbo_free_top50")
    assert free.items.size == 48_864 + 680  # exact + fuzzy in the source
    lengths = np.diff(free.offsets)
    assert lengths.max() <= 50
    # Strict ranks: score 1/log2(rank + 1) of rank 1..n, so every pair is a preference.
    assert preferences.usable_pairs(free).tolist() == (lengths * (lengths - 1) // 2).tolist()
    assert free.scores[free.offsets[1:][lengths > 0] - 1].tolist() == [1.0] * int(
        (lengths > 0).sum()
    )
    # A hand-checked list: the first user of the source file, best first.
    raw = real_data._plain(SHARED / "sisinf_llm_recs" / "llm_rankings.parquet")
    for column, value in (
        ("dataset", "facebook_book"),
        ("llm", "gpt-3.5-turbo"),
        ("exp", "free_top50"),
    ):
        raw = raw.filter(pc.equal(raw[column], value))
    first = raw["userId"][0].as_py()
    listed = raw.filter(pc.equal(raw["userId"], first)).sort_by("rank").to_pylist()
    expected = [str(r["itemId"]) for r in listed if r["match"] in ("exact", "noyear", "fuzzy")]
    u = data.user_ids.to_pylist().index(str(first))
    ids = data.items["item_id"].to_pylist()
    listed = free.items[free.offsets[u] : free.offsets[u + 1]][::-1]
    assert [ids[i] for i in listed] == expected
    # all_free: the mean reciprocal rank, by plain loops for that user.
    total = dict.fromkeys(range(data.n_items), 0.0)
    for llm in llms:
        teacher = preferences.load(data, f"{llm}_free_top50")
        row = teacher.items[teacher.offsets[u] : teacher.offsets[u + 1]][::-1]
        for rank, item in enumerate(row.tolist(), 1):
            total[item] += 1 / rank / 3
    every = preferences.load(data, "all_free")
    a, b = every.offsets[u], every.offsets[u + 1]
    fused = dict(zip(every.items[a:b].tolist(), every.scores[a:b].tolist(), strict=True))
    assert fused == pytest.approx({item: score for item, score in total.items() if score})


@needs("sisinf_llm_recs")
@pytest.mark.slow
def test_lastfm_reranks_without_recorded_candidates_are_left_out(tmp_path):
    data, manifests = build("hetrec2011_lastfm_2k", tmp_path)
    assert len(data.train) == 49_171
    counts = manifests["gpt-3.5-turbo_rerank_userknn50"].counts
    assert counts["users"] == 371
    assert counts["rows"] == 371 * 50
    assert counts["train_pairs"] == 0  # the candidates were unseen items
    assert manifests["palm-2_rerank_pop50"].counts["unanswered"] > 0
    table = pq.read_table(tmp_path / "raw" / "teacher_palm-2_rerank_pop50.parquet")
    assert table["score"].null_count == manifests["palm-2_rerank_pop50"].counts["unanswered"]
    assert data.n_items == 1507
    assert manifests["palm-2_free_top50"].counts["dropped_unknown_item_rows"] > 0


@needs("ml100k_lusifer")
def test_lusifer_teacher_names_training_pairs_only(tmp_path):
    data, manifests = build("ml100k_lusifer", tmp_path)
    assert (data.n_users, data.n_items, len(data.train)) == (943, 1682, 80_000)
    manifest = manifests["gpt4o_mini_rating"]
    assert manifest.built_from == "includes_label"
    counts = manifest.counts
    assert (counts["rows"], counts["answered"]) == (80_000, 78_414)
    assert (counts["train_pairs"], counts["valid_pairs"], counts["test_pairs"]) == (78_414, 0, 0)
    assert data.items["title"][data.items["item_id"].to_pylist().index("1")].as_py() == (
        "Toy Story (1995)"
    )
    teacher = preferences.load(data, "gpt4o_mini_rating")
    assert set(np.unique(teacher.scores).tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


@needs("ml100k_lusifer")
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the extra 'llm' is not installed"
)
def test_local_teacher_beats_chance_on_movielens(tmp_path):
    data, _ = build("ml100k_lusifer", tmp_path)
    scorer = scorers.make(data, ScoreConfig(scorer="wordllama"))
    share = scorers.held_in_accuracy(data, scorer)
    # Chance .5; popularity alone has .59 against negatives drawn by popularity.
    assert share["popular"] > 0.64
    assert share["uniform"] > 0.64


@needs("ml1m_llm_text")
@pytest.mark.slow
def test_ml1m_evaluates_on_rated_pairs_that_no_prompt_held(tmp_path):
    data, manifests = build("ml1m", tmp_path)
    assert (data.n_users, data.n_items) == (6040, 3260)
    assert len(data.train) + len(data.valid) + len(data.test) == 998_539
    rated = pq.read_table(SHARED / "ml1m_llm_text" / "llm_ratings_53k.parquet")
    pairs = as_set(rated["userId"], rated["movieId"])
    for part in (data.valid, data.test):
        assert raw_pairs(data, part) <= pairs
    for name in ("gpt4o_mini_rating", "gemma3_4b_rating"):
        counts = manifests[name].counts
        assert manifests[name].built_from == "includes_label"
        assert counts["train_pairs"] == counts["answered"] == 26_664
        assert counts["valid_pairs"] == counts["test_pairs"] == 0


@needs("ml1m_llm_text")
@pytest.mark.slow
def test_profiles_of_ml1m_were_written_from_what_is_training_here(tmp_path):
    """The authors' training part stays it; their test part is halved, user by user."""
    data, manifests = build("ml1m_profiles", tmp_path)
    log = pq.read_table(SHARED / "ml1m_llm_text" / "interactions.parquet")
    train = np.asarray(log["split"].to_pylist()) == "train"
    users, items = (np.asarray(log[name]) for name in ("userId", "movieId"))
    assert manifests == {}
    assert raw_pairs(data, data.train) == as_set(users[train], items[train])
    held = [raw_pairs(data, part) for part in (data.valid, data.test)]
    assert held[0] | held[1] == as_set(users[~train], items[~train])
    assert not held[0] & held[1]
    assert abs(len(held[0]) - len(held[1])) <= data.n_users
