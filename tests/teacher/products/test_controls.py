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


def without_echo(dataset, rows):
    """The rows but for those of users' own training items."""
    train = worlds.pairs_of(dataset.train.users, dataset.train.items)
    return [row for row in rows if row[:2] not in train]


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


@pytest.mark.parametrize("hidden", [True, False])
def test_shuffled_users_trade_whole_answers_of_about_the_same_number(world, hidden):
    rows = random_answers(world, 1)
    assert len({row[0] for row in rows}) % 2 == 1  # three of them trade in a ring
    told = {"training_items": "hidden"} if hidden else {}
    product(world, rows, built_from="prefix", **told)
    assert controls.ensure(world, "llm", "shuffled") == "llm.shuffled"
    old, new = lists_of(rows_of(world, "llm")), lists_of(rows_of(world, "llm.shuffled"))
    train = worlds.pairs_of(world.train.users, world.train.items)
    echoes = sum((user, item) in train for user, listed in new.items() for item, _ in listed)
    if hidden:  # they test the teacher
        assert echoes > 10
        assert sorted(map(repr, old.values())) == sorted(map(repr, new.values()))
    else:
        assert echoes == 0
    for user, listed in new.items():
        whole = [
            giver
            for giver, theirs in old.items()
            if giver != user
            and listed == [row for row in theirs if hidden or (user, row[0]) not in train]
        ]
        assert whole, user

    def answers(found):
        return np.array([sum(score is not None for _, score in found[u]) for u in sorted(found)])

    if hidden:
        # Two users trade, of neighbouring numbers of answers; at random they would differ by 2.3.
        assert np.abs(answers(old) - answers(new)).mean() < 0.5
    manifest = preferences.load(world, "llm.shuffled").manifest
    assert (manifest.built_from, manifest.unlisted) == ("prefix", "unknown")
    assert manifest.model.startswith("control: shuffled of llm (answers ")
    first = rows_of(world, "llm.shuffled")
    product(world, rows, name="same", **told)
    controls.write(world, "same", "shuffled", seed=1)
    assert rows_of(world, "same.shuffled") != first


def test_shuffled_lists_have_their_length_and_scores_and_no_echo(world):
    rows = random_answers(world, 1, missing=0.0, items_per_user=(4, 12))
    product(world, rows, unlisted="below")
    controls.ensure(world, "llm", "shuffled")
    old = lists_of(without_echo(world, rows_of(world, "llm")))
    new = lists_of(rows_of(world, "llm.shuffled"))
    assert sum(map(len, old.values())) < len(rows)
    train = worlds.pairs_of(world.train.users, world.train.items)
    assert set(old) == set(new)
    for user, listed in new.items():
        assert not any((user, item) in train for item, _ in listed)
        assert len({item for item, _ in listed}) == len(listed)
        assert sorted(score for _, score in listed) == sorted(score for _, score in old[user])
        # The first of them are another user's, in that user's order.
        order = [item for item, _ in sorted(listed, key=lambda row: -row[1])]
        shared = []
        for giver, theirs in old.items():
            ranked = [item for item, _ in sorted(theirs, key=lambda row: -row[1])]
            fresh = [item for item in ranked if (user, item) not in train][: len(order)]
            if giver != user and order[: len(fresh)] == fresh:
                shared.append(len(fresh))
        assert max(shared) > 0.3 * len(order), user
    manifest = preferences.load(world, "llm.shuffled").manifest
    assert manifest.counts["train_pairs"] == 0
    # The numbers of users that name an item are about those of the product: popular items stay so.
    named = [
        np.bincount([row[1] for row in rows_of(world, name)], minlength=world.n_items)
        for name in ("llm", "llm.shuffled")
    ]
    assert np.corrcoef(*named)[0, 1] > 0.3


def test_the_crowd_lists_what_is_named_most_the_same_for_everybody(world):
    rows = random_answers(world, 3, missing=0.0)
    product(world, rows, unlisted="below")
    controls.ensure(world, "llm", "consensus")
    named = without_echo(world, rows)
    votes = [sum(item == row[1] for row in named) for item in range(world.n_items)]
    train = worlds.pairs_of(world.train.users, world.train.items)
    old, new = lists_of(named), lists_of(rows_of(world, "llm.consensus"))
    for user, listed in new.items():
        fresh = [i for i in range(world.n_items) if (user, i) not in train and votes[i]]
        best = sorted(fresh, key=lambda i: (-votes[i], i))[: len(old[user])]
        assert sorted(best) == sorted(item for item, _ in listed)
        assert all(score == votes[item] for item, score in listed)
    assert set(old) == set(new)


def test_the_crowd_without_lists(tiny):
    product(tiny, [(0, 4, 0.5), (0, 5, 0.25), (2, 5, 0.75), (3, 4, None)])
    controls.ensure(tiny, "llm", "consensus")
    assert rows_of(tiny, "llm.consensus") == [
        (0, 4, 0.5), (0, 5, 0.5), (2, 5, 0.5), (3, 4, None),
    ]  # fmt: skip
    # 4 is preferred once and loses twice, 5 twice and never, 3 the rest: -1/3, 1, -1/2 of ...
    pairs = [(0, 4, 3, 1.0), (1, 5, 4, 1.0), (2, 5, 4, 1.0), (3, 3, 2, 1.0)]
    product(tiny, pairs, name="pairs")
    controls.ensure(tiny, "pairs", "consensus")
    scores = {2: -1.0, 3: 0.0, 4: -1 / 3, 5: 1.0}
    assert [row[:3] for row in rows_of(tiny, "pairs.consensus")] == [
        (0, 3, 4), (1, 5, 4), (2, 5, 4), (3, 3, 2),
    ]  # fmt: skip
    margins = [row[3] for row in rows_of(tiny, "pairs.consensus")]
    assert margins == pytest.approx([abs(scores[a] - scores[b]) for _, a, b, _ in pairs])


@pytest.mark.parametrize("hidden", [True, False])
def test_a_recommender_takes_the_place_of_the_teacher(world, hidden):
    """Its scores are the caller's; coverage and lengths are the product's."""
    scores = np.random.default_rng(0).random((world.n_users, world.n_items)).astype(np.float32)
    fitted = []

    def fit(name):
        fitted.append(name)
        return lambda users: scores[users]

    rows = random_answers(world, 3, missing=0.0)
    told = {"training_items": "hidden"} if hidden else {}
    product(world, rows, unlisted="below", **told)
    product(world, rows, name="asked", **told)
    for _ in range(2):  # what is there is not fitted again
        controls.ensure(world, "llm", "ease", fit=fit)
        controls.ensure(world, "asked", "ials", fit=fit)
    assert fitted == ["ease", "ials"]
    train = worlds.pairs_of(world.train.users, world.train.items)
    for user, listed in lists_of(rows_of(world, "llm.ease")).items():
        fresh = [i for i in range(world.n_items) if (user, i) not in train]
        length = len(lists_of(rows if hidden else without_echo(world, rows))[user])
        assert {i for i, _ in listed} == set(sorted(fresh, key=lambda i: -scores[user, i])[:length])
    for user, item, score in rows_of(world, "asked.ials"):
        assert score == scores[user, item]
    manifests = [preferences.load(world, name).manifest for name in ("llm.ease", "asked.ials")]
    # Nothing was hidden from what is fitted on train.
    said = ["none" if hidden else "shown", "shown"]
    assert [manifest.training_items for manifest in manifests] == said


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
    # User 0 has item 1 in training and user 2 item 0: answers on these would be echo.
    train = worlds.pairs_of(tiny.train.users, tiny.train.items)
    assert {(0, 1), (2, 0)} <= train
    assert not {(2, 1), (2, 2)} & train
    assert rows_of(tiny, "llm.shuffled") == [(2, 1, 2, 1.0)]


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
    with pytest.raises(
        ConfigError, match="controls other answers than llm holds, or was made otherwise; remove it"
    ):
        controls.ensure(tiny, "llm", "popularity")


def test_mistakes_are_named(tiny):
    product(tiny, [(0, 4, 0.5), (2, 5, 0.5)], built_from="includes_eval")
    with pytest.raises(ConfigError, match="unknown control 'random'; choose one of: shuffled"):
        controls.ensure(tiny, "llm", "random")
    with pytest.raises(ManifestError, match="has no teacher 'gpt'"):
        controls.ensure(tiny, "gpt", "popularity")
    with pytest.raises(ManifestError, match="would leak"):
        controls.ensure(tiny, "llm", "shuffled")
