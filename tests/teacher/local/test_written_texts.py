"""Vectors of what an LLM wrote: of users and of items, one a row or one a factor."""

from __future__ import annotations

import json

import numpy as np
import pytest
from teacher.written_world import (
    ITEMS,
    USERS,
    answered,
    ask,
    gather,
    ids,
    make_world,
    put,
    result,
    text_of,
)

from slgr_jax.config import EmbedConfig, TeachConfig
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.local import embeddings, scorers, vector_files


class Letters:
    name = "letters"

    def embed(self, texts):
        rows = np.array([[text.split().count(c) for c in "abcde"] for text in texts], np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


@pytest.fixture
def world(make_dataset, monkeypatch, tmp_path):
    """Profiles p of users, factors f of items (a factor of item 1 is empty, item 2 has none)."""
    monkeypatch.setattr(scorers, "WordLlama", Letters)
    data = make_world(make_dataset)
    gather(data, put(tmp_path / "p.jsonl", answered(ask(data, "p"))), name="p")
    root = ask(data, "f", prompt="kar_item", factors="mood,genre")
    lines = answered(root)
    lines[1] = result(ids(root)[1], json.dumps({"mood": "", "genre": text_of(1, 1)}))
    del lines[2]
    gather(data, put(tmp_path / "f.jsonl", lines), name="f")
    return data


def embed(data, name="e", **options):
    return embeddings.embed(data, TeachConfig(name=name), EmbedConfig(**options))


def one(text):
    return Letters().embed([text])[0]


def test_a_vector_of_each_text(world):
    manifest = embed(world, item_texts="f", user_texts="p")
    product = embeddings.load(world, "e")
    assert (manifest.users_from, manifest.built_from) == ("text", "train_only")
    assert product.users.has.tolist() == [True] * 5 + [False]
    assert product.items.has.tolist() == [True, True, False, *[True] * 5]
    for user in range(5):
        np.testing.assert_array_equal(product.users.values[user], one(text_of(user)))
    for item in (0, 3, 7):
        joined = f"mood: {text_of(item, 0)}\ngenre: {text_of(item, 1)}"
        np.testing.assert_array_equal(product.items.values[item], one(joined))
    np.testing.assert_array_equal(product.items.values[1], one(text_of(1, 1)))
    assert not product.items.values[2].any()


def test_users_of_their_items_texts_and_items_of_their_own(world):
    embed(world, item_texts="f")
    product = embeddings.load(world, "e")
    expected = product.items.values[[0, 1, 2, 3]].sum(axis=0)  # user 3 has items 0 to 3
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(product.users.values[3], expected, rtol=1e-6)
    with pytest.raises(InputError, match="no item texts to embed"):  # titles have no such words
        embed(world, "u", user_texts="p")


def test_a_chunk_of_each_factor(world):
    manifest = embed(world, item_texts="f", user_texts="p", chunks=1, chunk_words=50)
    assert manifest.fields == {"items": {"genre": 1, "mood": 1}, "users": {"text": 1}}
    (block,) = embeddings.load_chunks(world, "e", "items")
    assert block.real.tolist() == [
        [item != 2, item not in (1, 2)] for item in range(ITEMS)
    ]  # genre, mood
    for item in (0, 1, 5):
        want = one(text_of(item, 1)).astype(np.float16)
        np.testing.assert_array_equal(block.values[item, 0], want)
    (block,) = embeddings.load_chunks(world, "e", "users")
    assert block.values.shape == (USERS, 1, 5)
    np.testing.assert_array_equal(block.values[4, 0], one(text_of(4)).astype(np.float16))
    # One vector a row, where one is read, is the mean over factors.
    mean = (one(text_of(5, 0)).astype(np.float16) + one(text_of(5, 1)).astype(np.float16)) / 2
    np.testing.assert_allclose(embeddings.load(world, "e").items.values[5], mean, rtol=1e-3)


def test_what_was_read_decides_the_hash(world, tmp_path):
    hashes = [
        embed(world, f"e{k}", **options).prompt_hash
        for k, options in enumerate(
            (
                {"item_texts": "f"},
                {"item_texts": "f", "user_texts": "p"},
                {"item_texts": "f", "chunks": 1},
                {"item_texts": "f", "chunks": 2},
            )
        )
    ]
    assert len(set(hashes)) == 4
    root = ask(world, "f2", prompt="kar_item", factors="mood,genre")
    gather(world, put(tmp_path / "f2.jsonl", answered(root)), name="f2")
    assert embed(world, "again", item_texts="f2").prompt_hash not in hashes


def test_texts_of_the_other_side_and_flags_that_contradict_are_refused(world):
    with pytest.raises(ConfigError, match="about users: give them with --user_texts=p"):
        embed(world, item_texts="p")
    with pytest.raises(ManifestError, match="has no texts 'no'; it has: f, p"):
        embed(world, user_texts="no")
    with pytest.raises(ConfigError, match=r"--item_texts=f .* x.parquet holds vectors already"):
        EmbedConfig(item_texts="f", vectors="x.parquet")
    with pytest.raises(ConfigError, match=r"--users=text reads .* --user_texts=p others"):
        EmbedConfig(user_texts="p", users="text")
    assert not (world.path / "embeddings").exists()


def test_a_hosted_model_is_asked_for_vectors_of_both(world, tmp_path):
    path = tmp_path / "texts.jsonl"
    options = EmbedConfig(item_texts="f", user_texts="p", text_requests=str(path))
    assert embeddings.write_requests(world, options, "some-model") == 7 + 5
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    told = {line["custom_id"]: line["body"]["input"] for line in lines}
    assert told["user-u4"] == text_of(4)
    assert told["item-i1"] == f"genre: {text_of(1, 1)}"
    assert "item-i2" not in told

    results = [
        {
            "custom_id": custom_id,
            "response": {"body": {"data": [{"embedding": one(text).tolist()}]}},
        }
        for custom_id, text in told.items()
    ]
    answers = put(tmp_path / "vectors.jsonl", map(json.dumps, results))
    vectors, _ = vector_files.read_vectors(answers, world, "user")
    np.testing.assert_allclose(vectors.values[3], one(text_of(3)), rtol=1e-6)
    embed(world, "hosted", vectors=str(answers), user_vectors=str(answers))
    embed(world, "local", item_texts="f", user_texts="p")
    hosted, local = (embeddings.load(world, name) for name in ("hosted", "local"))
    for side in ("items", "users"):
        mine, theirs = getattr(hosted, side), getattr(local, side)
        np.testing.assert_array_equal(mine.has, theirs.has)
        np.testing.assert_allclose(mine.values, theirs.values, rtol=1e-6)
