"""Fused teachers against the definitions: by hand, by dicts, and as a user runs the command."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.guidance import teacher_product
from slgr_jax.guidance.base import Sources
from slgr_jax.models.backbones import make_backbone
from slgr_jax.sampling.context import Sizes
from slgr_jax.sampling.teacher_arrays import TeacherLists
from slgr_jax.teacher.products import combine, preferences, rows

REPO = pathlib.Path(__file__).parents[3]
N_USERS = 4


def answers(found, *, below=False):
    """{(user, item): score} -> `Answers`."""
    ordered = sorted(found, key=lambda pair: (pair[0], found[pair]))
    counts = np.bincount(np.array([u for u, _ in ordered], np.int64), minlength=N_USERS)
    return combine.TeacherScores(
        np.concatenate([[0], np.cumsum(counts)]),
        np.array([i for _, i in ordered], np.int32),
        np.array([found[pair] for pair in ordered], np.float32),
        below,
    )


def as_dict(fused):
    columns = (fused.users, fused.items, fused.scores)
    return {(u, i): s for u, i, s in zip(*(c.tolist() for c in columns), strict=True)}


def product(dataset, name, found, **provenance):
    """A product of scores from {(user, item): score or None}."""
    columns = [[u for u, _ in found], [i for _, i in found], list(found.values())]
    told = preferences.Provenance(**provenance)
    table = pa.table(columns, schema=schema.TEACHER_SCORES)
    return preferences.write_product(dataset, name, table, provenance=told)


def made(dataset, names, name="all", overwrite=False, **options):
    """The result of `combine` as a dict, and its manifest."""
    common = config.TeachConfig(data=str(dataset.path), name=name, overwrite=overwrite)
    combine.combine(dataset, common, config.CombineConfig(names=names, **options))
    found = preferences.load(dataset, name)
    users = np.repeat(np.arange(dataset.n_users), np.diff(found.offsets))
    keys = zip(users.tolist(), found.items.tolist(), strict=True)
    return dict(zip(keys, found.scores.tolist(), strict=True)), found.manifest


# --- formulas -----------------------------------------------------------------------------------

# User 1: item 7 first, then 3 and 5 together, 2 last. User 3: one item.
FIRST = {(1, 5): 0.5, (1, 2): -1.0, (1, 7): 4.0, (1, 3): 0.5, (3, 0): 2.0}
SECOND = {(1, 2): 30.0, (1, 9): 10.0}


@pytest.mark.parametrize(
    ("method", "ranked", "alone"),
    [
        ("reciprocal", {7: 1, 3: 1 / 2.5, 5: 1 / 2.5, 2: 1 / 4}, 1),
        ("rrf", {7: 1 / 61, 3: 1 / 62.5, 5: 1 / 62.5, 2: 1 / 64}, 1 / 61),
        ("borda", {7: 1, 3: 1 - 1.5 / 4, 5: 1 - 1.5 / 4, 2: 1 / 4}, 1),
        ("mean", {7: 1, 3: 0.3, 5: 0.3, 2: 0}, 0.6),
    ],
)
def test_one_teacher_alone_is_scored_by_the_formula(method, ranked, alone):
    fused = combine.fuse([answers(FIRST)], method)
    expected = {**{(1, item): score for item, score in ranked.items()}, (3, 0): alone}
    assert as_dict(fused) == pytest.approx(expected, rel=1e-6)
    assert list(as_dict(fused)) == sorted(expected)  # by user, then item


@pytest.mark.parametrize(
    ("method", "first", "second", "expected"),
    [
        # Item 2: ranks 4 of 4 and 1 of 2; item 7: the first teacher's 1; item 9: the other's 2.
        ("reciprocal", True, True, {2: (1 / 4 + 1) / 2, 7: 1 / 2, 9: 1 / 4}),
        ("reciprocal", False, False, {2: (1 / 4 + 1) / 2, 7: 1, 9: 1 / 2}),
        ("reciprocal", True, False, {2: (1 / 4 + 1) / 2, 7: 1, 9: 1 / 4}),
        ("rrf", True, True, {2: 1 / 64 + 1 / 61, 7: 1 / 61, 9: 1 / 62}),
        ("rrf", False, False, {2: 1 / 64 + 1 / 61, 7: 2 / 61, 9: 2 / 62}),
        ("borda", True, True, {2: (1 / 4 + 1) / 2, 7: 1 / 2, 9: 1 / 4}),
        ("borda", False, True, {2: (1 / 4 + 1) / 2, 7: 1 / 2, 9: 1 / 2}),
        ("mean", True, True, {2: (0 + 1) / 2, 7: 1, 9: 0}),
        ("mean", False, False, {2: (0 + 1) / 2, 7: 1, 9: 0}),
        ("latest", True, True, {2: 30.0, 7: 4.0, 9: 10.0}),
        ("latest", True, False, {2: 30.0, 7: 4.0, 9: 10.0}),
    ],
)
def test_who_does_not_list_an_item(method, first, second, expected):
    both = [answers(FIRST, below=first), answers(SECOND, below=second)]
    found = as_dict(combine.fuse(both, method))
    assert {item: found[1, item] for item in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("other", "expected"), [("below", 1 / 2), ("unknown", 1)])
def test_a_free_list_that_is_empty_counts_only_among_free_lists(other, expected):
    # The second teacher has no list of user 3.
    both = [answers(FIRST, below=other == "below"), answers(SECOND, below=True)]
    assert as_dict(combine.fuse(both, "reciprocal"))[3, 0] == expected


def test_k_of_rrf_and_scores_that_are_all_equal():
    assert as_dict(combine.fuse([answers(FIRST)], "rrf", rrf_k=0))[1, 2] == 1 / 4
    flat = answers({(0, 0): 3.0, (2, 1): 3.0})
    assert as_dict(combine.fuse([flat], "mean")) == {(0, 0): 0.5, (2, 1): 0.5}
    wide = answers({(0, 0): 3e38, (0, 1): -3e38})  # their difference is no float32
    assert as_dict(combine.fuse([wide], "mean")) == {(0, 0): 1, (0, 1): 0}
    assert as_dict(combine.fuse([wide], "borda")) == {(0, 0): 1, (0, 1): 0.5}


def by_dicts(teachers, method, k):
    """The definition, pair by pair: (score, votes) of each."""
    said = []
    for found, _ in teachers:
        low, high = min(found.values(), default=0), max(found.values(), default=0)
        mine = {}
        for (user, item), score in found.items():
            listed = [s for (u, _), s in found.items() if u == user]
            rank = sum(s > score for s in listed) + (1 + sum(s == score for s in listed)) / 2
            mine[user, item] = {
                "reciprocal": 1 / rank,
                "rrf": 1 / (k + rank),
                "borda": 1 - (rank - 1) / len(listed),
                "mean": (score - low) / (high - low) if high > low else 0.5,
                "latest": score,
            }[method]
        said.append(mine)
    free = all(below for _, below in teachers)
    out = {}
    for user, item in {pair for found, _ in teachers for pair in found}:
        words = []
        for mine, (found, below) in zip(said, teachers, strict=True):
            has_list = any(u == user for u, _ in found)
            if (user, item) in mine:
                words.append(mine[user, item])
            elif method not in ("mean", "latest") and below and (free or has_list):
                words.append(0.0)
        words = words[-1:] if method == "latest" else words
        score = sum(words) / len(words) * (len(teachers) if method == "rrf" else 1)
        out[user, item] = (score, sum((user, item) in found for found, _ in teachers))
    return out


PAIRS = st.tuples(st.integers(0, N_USERS - 1), st.integers(0, 5))
TEACHER = st.tuples(
    st.dictionaries(PAIRS, st.integers(-3, 3).map(float), max_size=16), st.booleans()
)


@pytest.mark.parametrize("piece", [1, 5, 65_536])  # rows looked at together
@settings(deadline=None)
@given(
    teachers=st.lists(TEACHER, min_size=1, max_size=4),
    method=st.sampled_from(config.FUSIONS),
    k=st.integers(0, 70),
)
def test_any_teachers_are_fused_as_the_definition_says(piece, teachers, method, k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PIECE", piece)
        fused = combine.fuse([answers(f, below=b) for f, b in teachers], method, rrf_k=k)
    expected = by_dicts(teachers, method, k)
    scores = {pair: score for pair, (score, _) in expected.items()}
    assert as_dict(fused) == pytest.approx(scores, rel=1e-6, abs=1e-7)
    assert list(as_dict(fused)) == sorted(expected)
    assert fused.votes.tolist() == [expected[pair][1] for pair in sorted(expected)]


def test_the_order_of_teachers_and_any_growing_scale_change_nothing():
    rng = np.random.default_rng(0)
    pairs = [[(u, i) for u in range(N_USERS) for i in rng.permutation(30)[:12]] for _ in range(3)]
    found = [{pair: float(rng.normal()) for pair in one} for one in pairs]
    bent = [{pair: float(np.exp(3 * s) - 7) for pair, s in one.items()} for one in found]
    for method in ("reciprocal", "rrf", "borda"):
        one = as_dict(combine.fuse([answers(f) for f in found], method))
        other = as_dict(combine.fuse([answers(f) for f in reversed(bent)], method))
        assert one == pytest.approx(other, rel=1e-6)


# --- products -----------------------------------------------------------------------------------


def test_a_product_says_what_it_was_made_of(tiny):
    parts = {
        "a": product(tiny, "a", {(0, 3): 2.0, (0, 4): 1.0}, model="m-1", prompt_hash="p1"),
        "b": product(
            *(tiny, "b", {(0, 4): 5.0, (2, 5): None}),
            built_from="includes_label", training_items="hidden", prompt_hash="p2",
        ),
        "c": product(
            *(tiny, "c", {(1, 2): 5.0}),
            built_from="prefix", training_items="none", prompt_hash="p1",
        ),
    }  # fmt: skip
    found, manifest = made(tiny, "a, b,c")
    assert found == {(0, 3): 1.0, (0, 4): 0.75, (1, 2): 1.0}  # what has no answer is not in it
    told = (manifest.built_from, manifest.training_items, manifest.unlisted, manifest.prompt_hash)
    assert told == ("includes_label", "shown", "unknown", "p1+p2")
    hashes = {
        name: hashlib.sha256(part.files[0].sha256.encode()).hexdigest()[:8]
        for name, part in parts.items()
    }
    assert manifest.model == (
        f"combined: a (m-1, answers {hashes['a']}), b (answers {hashes['b']}), "
        f"c (answers {hashes['c']})"
    )
    assert manifest.score_kind == "reciprocal: mean 1/rank"
    assert (manifest.counts["rows"], manifest.counts["dropped_by_min_votes"]) == (3, 0)
    careful = made(tiny, "b,c", name="bc")[1]
    assert (careful.built_from, careful.training_items) == ("includes_label", "hidden")
    # A free list may lack an item because that was in its prompt.
    product(tiny, "free", {(0, 5): 1.0}, unlisted="below", training_items="none")
    _, with_free = made(tiny, "b,free", name="bf")
    assert (with_free.training_items, with_free.prompt_hash) == ("shown", "p2")


@pytest.mark.parametrize(
    ("unlisted", "result", "expected"),
    [
        (("below", "below"), "below", {3: 0.5, 4: 0.75, 5: 0.25}),
        (("unknown", "unknown"), "unknown", {3: 1.0, 4: 0.75, 5: 0.5}),
        (("below", "unknown"), "unknown", {3: 1.0, 4: 0.75, 5: 0.25}),
    ],
)
def test_unlisted_items_of_the_result(tiny, unlisted, result, expected):
    product(tiny, "a", {(0, 3): 2.0, (0, 4): 1.0}, unlisted=unlisted[0])
    product(tiny, "b", {(0, 4): 2.0, (0, 5): 1.0}, unlisted=unlisted[1])
    found, manifest = made(tiny, "a,b")
    assert found == {(0, item): score for item, score in expected.items()}
    assert manifest.unlisted == result
    counts_zero = manifest.score_kind.endswith(", 0 where a teacher does not list the item")
    assert counts_zero == (result == "below")


def test_only_what_enough_teachers_answered_is_kept(tiny):
    product(tiny, "a", {(0, 3): 3.0, (0, 4): 2.0, (0, 5): 1.0, (1, 3): 1.0})
    product(tiny, "b", {(0, 4): 3.0, (1, 3): 1.0, (1, 4): None})
    product(tiny, "c", {(0, 4): 3.0, (0, 5): 1.0})
    everything, _ = made(tiny, "a,b,c", method="rrf", rrf_k=9)
    found, manifest = made(tiny, "a,b,c", name="two", method="rrf", rrf_k=9, min_votes=2)
    # Ranks are those of the whole lists: item 4 is the second of a's three.
    assert found == {pair: everything[pair] for pair in ((0, 4), (0, 5), (1, 3))}
    assert found[0, 4] == pytest.approx(1 / 11 + 1 / 10 + 1 / 10)
    assert manifest.score_kind == "rrf: sum 1/(9 + rank), answered by at least 2 of 3"
    assert manifest.counts["dropped_by_min_votes"] == 1
    assert "dropped by min votes 1" in preferences.report(manifest)
    assert list(made(tiny, "a,b,c", name="three", min_votes=3)[0]) == [(0, 4)]


def test_mistakes_are_named(tiny, make_dataset):
    product(tiny, "a", {(0, 3): 2.0})
    product(tiny, "b", {(0, 4): 2.0})
    product(tiny, "silent", {(0, 4): None})
    product(tiny, "mute", {(0, 3): None})
    product(tiny, "leaky", {(0, 4): 2.0}, built_from="includes_eval")
    stated = pa.table([[0], [1], [2], [1.0]], schema=schema.TEACHER_PREFERENCES)
    preferences.write_product(tiny, "pairs", stated, provenance=preferences.Provenance())
    cases = [
        (ConfigError, "a", {}, "names 1 of the two or more teachers to combine; .* has: a, b, le"),
        (ConfigError, " ,", {}, "names 0 of the two or more .* has: a, b"),
        (ConfigError, "a,b,a", {}, "--names has a more than once; .* has: a, b"),
        (ConfigError, "a,b", {"name": "b"}, "--name=b is one of --names"),
        (ConfigError, "a,b", {"min_votes": 3}, "--min_votes=3 is more than the 2 teachers"),
        (ConfigError, "a,b", {"method": "max"}, "--method='max' is not one of: reciprocal, rrf"),
        (ManifestError, "a,gpt", {}, "has no teacher 'gpt'; it has: a, b"),
        (ManifestError, "a,leaky", {}, "built_from=includes_eval: training on it would leak"),
        (InputError, "a,pairs", {}, "'pairs' holds preferences, .* --pairs_to=scores"),
        (InputError, "a,b", {"min_votes": 2}, "answer of 2 of a, b, the most is 1: lower --min_v"),
        (InputError, "mute,silent", {}, "answer of 1 of mute, silent, the most is 0: combine oth"),
    ]
    for kind, names, options, words in cases:
        with pytest.raises(kind, match=words):
            made(tiny, names, **options)
    other = make_dataset("other", train={0: [0]})
    product(other, "a", {(0, 3): 2.0})
    preferences.product_path(other.path, "a").rename(preferences.product_path(tiny.path, "moved"))
    with pytest.raises(ManifestError, match="'moved' was made for split"):
        made(tiny, "a,moved")
    before = set(preferences.products(tiny.path))
    made(tiny, "a,b")
    with pytest.raises(InputError, match="exists; choose another path or add --overwrite"):
        made(tiny, "b,a")
    made(tiny, "b,a", overwrite=True)
    assert set(preferences.products(tiny.path)) == before | {"all"}  # nothing is left by a refusal
    shard = next(preferences.product_path(tiny.path, "b").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match="truncated"):
        made(tiny, "a,b", name="c")
    with pytest.raises(InputError, match="all exists"):  # said before anything is read
        made(tiny, "a,b")


# --- as a user runs it --------------------------------------------------------------------------


def teach(*args):
    command = [sys.executable, str(REPO / "launch" / "teach.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_what_training_reads(tmp_path):
    data = worlds.random_dataset(tmp_path / "data", n_users=20, n_items=15)
    rng = np.random.default_rng(3)
    found = {}
    for name in ("x", "y"):
        pairs = [(u, int(i)) for u in range(0, 20, 2) for i in rng.permutation(15)[:6]]
        found[name] = dict(zip(pairs, rng.normal(size=len(pairs)).tolist(), strict=True))
        product(data, name, found[name], unlisted="below", model=f"llm-{name}")
    told = (f"--data={data.path}", "--name=both", "--names=x,y", "--rows_per_shard=50")
    result = teach("combine", *told, "--method=borda")
    assert (result.returncode, result.stderr) == (0, "")
    assert "teacher both: scores (borda: mean 1 - (rank - 1)/length, 0 where" in result.stdout
    assert "by combined: x (llm-x, answers " in result.stdout
    expected = by_dicts([(one, True) for one in found.values()], "borda", 60)
    assert len(preferences.load(data, "both").manifest.files) == -(-len(expected) // 50) > 1
    guidance = config.GuidanceConfig("pairwise", "both")
    run = config.RunConfig(str(data.path), "w", guidance=guidance)
    backbone = make_backbone(run.model, Sizes(data.n_users, data.n_items))
    read = teacher_product.teacher_arrays(Sources(run, data, backbone))
    assert isinstance(read, TeacherLists)
    users = np.repeat(np.arange(20), np.diff(read.offsets)).tolist()
    trained_on = zip(
        zip(users, read.items.tolist(), strict=True), read.scores.tolist(), strict=True
    )
    assert dict(trained_on) == pytest.approx({pair: score for pair, (score, _) in expected.items()})
    for words, text in (
        (("combine", *told), "both exists; choose another path or add --overwrite"),
        (("combine", *told, "--append"), "combine cannot --append"),
        (("combine", *told[:2]), "--names='' names 0 of the two or more"),
    ):
        refused = teach(*words)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        assert text in refused.stderr


def test_nothing_is_appended_to_a_combined_product(tiny):
    """Ranks and means are of all answers at once."""
    product(tiny, "a", {(0, 1): 1.0, (0, 2): 2.0})
    product(tiny, "b", {(0, 1): 1.0, (0, 3): 2.0})
    made(tiny, "a,b")
    before = preferences.load(tiny, "all")
    more = pa.table([[1], [1], [5.0]], schema=schema.TEACHER_SCORES)
    with pytest.raises(InputError, match=r"'all' is combined: a.*, b.*combine anew"):
        preferences.append(tiny, "all", more)
    after = preferences.load(tiny, "all")
    np.testing.assert_array_equal(before.scores, after.scores)
    assert before.manifest == after.manifest
