"""Control teachers against the definitions, user by user."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.products import controls, preferences


def product(dataset, rows, name="llm", **provenance):
    """A product from (user, item, score or None) or (user, preferred, other, margin) rows."""
    kind = "scores" if len(rows[0]) == 3 else "preferences"
    found = schema.TEACHER_SCHEMAS[kind]
    columns = list(zip(*sorted(rows, key=lambda row: row[:2]), strict=True))
    table = pa.table([pa.array(c) for c in columns], names=found.names).cast(found)
    told = preferences.Provenance(**provenance)
    preferences.write_product(dataset, name, table, provenance=told)


def rows_of(dataset, name):
    """The product's rows as tuples, by user and item(s)."""
    root = preferences.product_path(dataset.path, name)
    manifest = schema.read_teacher_manifest(root)
    table = shards.read_shards(root, manifest.files, schema.TEACHER_SCHEMAS[manifest.kind])
    rows = zip(*(table[c].to_pylist() for c in table.column_names), strict=True)
    return sorted(rows, key=lambda row: row[:-1])


def lists_of(rows):
    """user -> its rows without the user."""
    out = {}
    for user, *rest in rows:
        out.setdefault(user, []).append(tuple(rest))
    return out


def random_answers(dataset, seed, *, missing=0.2, items_per_user=(2, 9)):
    """Answers of most users about some items, some of them missing; sizes differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in rng.permutation(dataset.n_users)[: dataset.n_users - 5]:
        chosen = rng.choice(dataset.n_items, rng.integers(*items_per_user), replace=False)
        scores = rng.random(chosen.size)
        rows += [
            (int(user), int(i), None if rng.random() < missing else float(s))
            for i, s in zip(chosen, scores, strict=True)
        ]
    return rows


def cosine_sums(dataset):
    """[U, I] by plain loops over sets: sum over training items j != i of cos(i, j)."""
    fans = [set() for _ in range(dataset.n_items)]
    mine = [set() for _ in range(dataset.n_users)]
    for u, i in zip(dataset.train.users.tolist(), dataset.train.items.tolist(), strict=True):
        fans[i].add(u)
        mine[u].add(i)
    out = np.zeros((dataset.n_users, dataset.n_items))
    for u in range(dataset.n_users):
        for i in range(dataset.n_items):
            for j in mine[u] - {i}:
                if fans[i]:
                    out[u, i] += len(fans[i] & fans[j]) / math.sqrt(len(fans[i]) * len(fans[j]))
    return out


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "_CHUNK", 7)  # several chunks, the last not full
    return worlds.random_dataset(tmp_path / "data", n_users=40, n_items=30)


def test_shuffled_users_trade_whole_lists_of_about_the_same_length(world):
    rows = random_answers(world, 1)
    assert len({row[0] for row in rows}) % 2 == 1  # three of them trade in a ring
    product(world, rows, built_from="prefix", unlisted="below")
    assert controls.ensure(world, "llm", "shuffled") == "llm.shuffled"
    old, new = lists_of(rows_of(world, "llm")), lists_of(rows_of(world, "llm.shuffled"))
    assert set(old) == set(new)
    assert sorted(map(repr, old.values())) == sorted(map(repr, new.values()))
    assert all(new[user] != old[user] for user in old)

    def answers(found):
        return np.array([sum(score is not None for _, score in found[u]) for u in sorted(found)])

    # Two users trade, of neighbouring numbers of answers; at random they would differ by 2.3.
    assert np.abs(answers(old) - answers(new)).mean() < 0.5
    manifest = preferences.load(world, "llm.shuffled").manifest
    assert (manifest.built_from, manifest.unlisted) == ("prefix", "below")
    assert manifest.model.startswith("control: shuffled of llm (answers ")
    first = rows_of(world, "llm.shuffled")
    product(world, rows, name="same")
    controls.write(world, "same", "shuffled", seed=1)
    assert rows_of(world, "same.shuffled") != first


def test_a_teacher_of_one_user_cannot_be_shuffled(tiny):
    product(tiny, [(1, 2, 0.5), (1, 3, 0.25)])
    with pytest.raises(InputError, match="answers for 1 user"):
        controls.ensure(tiny, "llm", "shuffled")


@pytest.mark.parametrize("control", ["popularity", "item_item"])
def test_asked_pairs_are_scored_by_the_formula(world, control):
    rows = random_answers(world, 2)
    product(world, rows, training_items="hidden")
    controls.ensure(world, "llm", control)
    expected = cosine_sums(world)
    if control == "popularity":
        counts = np.bincount(world.train.items, minlength=world.n_items)
        expected = np.tile(counts, (world.n_users, 1))
    found = rows_of(world, f"llm.{control}")
    assert [row[:2] for row in found] == [row[:2] for row in rows_of(world, "llm")]
    for (user, item, score), (*_, old) in zip(found, rows_of(world, "llm"), strict=True):
        assert (score is None) == (old is None)
        assert score is None or score == pytest.approx(expected[user, item], rel=1e-6)
    assert preferences.load(world, f"llm.{control}").manifest.training_items == "hidden"


@pytest.mark.parametrize("control", ["popularity", "item_item"])
def test_free_lists_become_the_best_unseen_items(world, control):
    rows = random_answers(world, 3, missing=0.0)
    product(world, rows, unlisted="below", training_items="hidden")
    controls.ensure(world, "llm", control)
    scores = cosine_sums(world)
    if control == "popularity":
        counts = np.bincount(world.train.items, minlength=world.n_items)
        scores = np.tile(counts, (world.n_users, 1)).astype(float)
    train = worlds.pairs_of(world.train.users, world.train.items)
    old, found = lists_of(rows_of(world, "llm")), lists_of(rows_of(world, f"llm.{control}"))
    assert {u: len(x) for u, x in found.items()} == {u: len(x) for u, x in old.items()}
    for user, listed in found.items():
        unseen = [i for i in range(world.n_items) if (user, i) not in train]
        best = sorted((scores[user, i] for i in unseen), reverse=True)[: len(listed)]
        assert [s for _, s in sorted(listed, key=lambda x: -x[1])] == pytest.approx(best, rel=1e-6)
        for item, score in listed:
            assert (user, item) not in train
            assert score == pytest.approx(scores[user, item], rel=1e-6)
    manifest = preferences.load(world, f"llm.{control}").manifest
    assert (manifest.unlisted, manifest.training_items) == ("below", "none")
    assert manifest.counts["train_pairs"] == 0


def test_equally_popular_items_are_listed_by_index(tiny):
    # Counts 4 3 3 2 1 0; user 3 has seen item 2.
    product(tiny, [(3, 5, 1.0), (3, 4, 0.5)], unlisted="below")
    controls.ensure(tiny, "llm", "popularity")
    assert rows_of(tiny, "llm.popularity") == [(3, 0, 4.0), (3, 1, 3.0)]


def test_a_list_is_no_longer_than_what_is_unseen(tiny):
    # User 4 has seen 0 to 3 of 6 items.
    product(tiny, [(4, 5, 1.0), (4, 4, 0.5), (4, 0, 0.25)], unlisted="below")
    controls.ensure(tiny, "llm", "popularity")
    assert rows_of(tiny, "llm.popularity") == [(4, 4, 1.0), (4, 5, 0.0)]


def test_preferences_are_turned_to_the_scores_order(tiny):
    # Counts 4 3 3 2 1 0: 0 over 4 stays, 5 over 1 turns, 1 and 2 are as popular as each other.
    product(tiny, [(0, 0, 4, 1.0), (0, 1, 2, 1.0), (2, 5, 1, 0.5)])
    controls.ensure(tiny, "llm", "popularity")
    assert rows_of(tiny, "llm.popularity") == [(0, 0, 4, 3.0), (2, 1, 5, 3.0)]
    controls.ensure(tiny, "llm", "shuffled")
    assert rows_of(tiny, "llm.shuffled") == [(0, 5, 1, 0.5), (2, 0, 4, 1.0), (2, 1, 2, 1.0)]


def test_what_is_there_is_kept_and_what_is_stale_refused(tiny):
    product(tiny, [(0, 4, 0.5), (2, 5, 0.5)])
    controls.ensure(tiny, "llm", "popularity")
    root = preferences.product_path(tiny.path, "llm.popularity")
    made = (root / "manifest.json").stat().st_mtime_ns
    controls.ensure(tiny, "llm", "popularity")
    assert (root / "manifest.json").stat().st_mtime_ns == made
    table = pa.table([[0], [3], [0.5]], names=["user", "item", "score"])
    told = preferences.Provenance()
    answers = table.cast(schema.TEACHER_SCORES)
    preferences.write_product(tiny, "llm", answers, provenance=told, overwrite=True)
    with pytest.raises(ConfigError, match="controls other answers than llm holds; remove it"):
        controls.ensure(tiny, "llm", "popularity")


def test_mistakes_are_named(tiny):
    product(tiny, [(0, 4, 0.5), (2, 5, 0.5)], built_from="includes_eval")
    with pytest.raises(ConfigError, match="unknown control 'random'; choose one of: shuffled"):
        controls.ensure(tiny, "llm", "random")
    with pytest.raises(ManifestError, match="has no teacher 'gpt'"):
        controls.ensure(tiny, "gpt", "popularity")
    with pytest.raises(ManifestError, match="would leak"):
        controls.ensure(tiny, "llm", "shuffled")
