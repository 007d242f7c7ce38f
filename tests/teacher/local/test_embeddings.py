"""Embedding products: what is written is read back by index; nothing else is accepted."""

from __future__ import annotations

import base64
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slgr_jax.config import EmbedConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.local import embeddings, scorers, vector_files

TITLES = ["aab", "b", None, "c", "dd", "e"]
# conftest's ids, out of index order; item 1 and item 4 have no vector.
IDS = ["电影", "01", "café", " x"]
WHERE = [5, 0, 3, 2]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


class Letters:
    name = "letters"

    def embed(self, texts):
        rows = np.array([[text.count(c) for c in "abcde"] for text in texts], np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


@pytest.fixture
def local(make_dataset, monkeypatch):
    monkeypatch.setattr(scorers, "WordLlama", Letters)
    return make_dataset(titles=TITLES, texts=[None] * 5 + ["e a"])


def make(dataset, name="e", **options):
    common = {key: options.pop(key) for key in ("overwrite", "rows_per_shard") if key in options}
    stated = {key: options.pop(key) for key in ("built_from", "unknown") if key in options}
    return embeddings.embed(
        dataset, TeachConfig(name=name, **common), EmbedConfig(**options), **stated
    )


def write_file(path, ids=IDS, vectors=VECTORS, what="item"):
    lists = pa.array([row.tolist() for row in vectors], pa.list_(pa.float64()))
    table = pa.table({what: ids, "vector": lists})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table({what: ids, "vector": fixed})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif path.suffix == ".npz":
        np.savez(path, ids=np.array(ids), emb=vectors.astype(np.float16))
    else:
        lines = [line(f"{what}-{one}", row.tolist()) for one, row in zip(ids, vectors, strict=True)]
        path.write_text("".join(lines), encoding="utf-8")
    return path


def line(custom_id, embedding, *, bare=False):
    body = {"data": [{"index": 0, "embedding": embedding}], "usage": {}}
    response = body if bare else {"status_code": 200, "body": body}
    return json.dumps({"custom_id": custom_id, "response": response, "error": None}) + "\n"


def test_a_local_model_gives_items_and_users(local):
    manifest = make(local, rows_per_shard=2)
    loaded = embeddings.load(local, "e")
    expected = Letters().embed(["aab", "b", "", "c", "dd", "e. e a"])
    np.testing.assert_array_equal(loaded.items.values, expected)
    assert loaded.items.has.tolist() == [True, True, False, True, True, True]
    # By hand: user 0 has 0, 1, 2 (2 has no text); user 3 has only 2.
    mean = expected[[0, 1]].sum(0)
    np.testing.assert_allclose(loaded.users.values[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert loaded.users.has.tolist() == [True, True, True, False, True]
    assert not loaded.users.values[3].any()
    assert (manifest.model, manifest.users_from, manifest.dim) == ("letters", "history", 5)
    assert manifest.counts == {"items": 5, "users": 4}
    assert len(manifest.files["items"]) == 3
    assert "vectors of 5 of 6 items and 4 of 5 users (from: history)" in embeddings.report(manifest)


def test_a_missing_vector_is_a_null_on_disk(local):
    manifest = make(local)
    root = local.path / schema.EMBEDDINGS_DIR / "e"
    table = pa.ipc.open_file(root / manifest.files["items"][0].path).read_all()
    assert table.column("vector").null_count == 1
    assert table.column("vector")[2].as_py() is None
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 5)


def test_users_of_texts_need_texts(local):
    with pytest.raises(InputError, match=r"has no user texts; use --users=history"):
        make(local, users="text")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "npz", "jsonl"])
def test_import_joins_on_ids(tiny, tmp_path, ending):
    make(tiny, vectors=str(write_file(tmp_path / f"v.{ending}")), dtype="float16")
    loaded = embeddings.load(tiny, "e")
    assert loaded.items.has.tolist() == [True, False, True, True, False, True]
    np.testing.assert_array_equal(loaded.items.values[WHERE], VECTORS)
    assert loaded.items.values.dtype == np.float32
    sums = VECTORS[WHERE.index(0)] + VECTORS[WHERE.index(2)]  # user 0 has items 0, 1, 2
    np.testing.assert_allclose(loaded.users.values[0], sums / np.linalg.norm(sums), atol=2e-3)


def test_users_of_a_file(tiny, tmp_path):
    users = write_file(tmp_path / "u.parquet", ["u,5", "007"], VECTORS[:2], "user")
    manifest = make(tiny, vectors=str(write_file(tmp_path / "v.npz")), user_vectors=str(users))
    loaded = embeddings.load(tiny, "e")
    assert manifest.users_from == "file"
    np.testing.assert_array_equal(loaded.users.values[[4, 0]], VECTORS[:2])
    assert loaded.users.has.tolist() == [True, False, False, False, True]
    wide = write_file(tmp_path / "w.parquet", ["007"], np.ones((1, 4), np.float32), "user")
    with pytest.raises(InputError, match="width 3, user vectors 4"):
        make(tiny, "f", vectors=str(tmp_path / "v.npz"), user_vectors=str(wide))


def test_batch_results_in_both_shapes_and_with_bad_lines(tiny, tmp_path):
    path = tmp_path / "results.jsonl"
    packed = base64.b64encode(np.array([7, 8, 9], "<f4").tobytes()).decode()
    path.write_text(
        line("item-1", [9, 9, 9])
        + line("item-电影", packed, bare=True)
        + "not json\n"
        + json.dumps({"custom_id": "item-01", "response": None, "error": {"code": "x"}}) + "\n"
        + line("user-007", [1, 1, 1])
        + line("item-café", [1, float("nan"), 2])
        + line("item-1", [1, 2, 3])
        + line("item-10", [4, 5, 6])[:-9],
        encoding="utf-8",
    )  # fmt: skip
    manifest = make(tiny, vectors=str(path), user_vectors=str(path))
    loaded = embeddings.load(tiny, "e")
    assert loaded.items.has.tolist() == [False, True, False, False, False, True]
    assert loaded.items.values[[1, 5]].tolist() == [[1, 2, 3], [7, 8, 9]]
    assert np.flatnonzero(loaded.users.has).tolist() == [0]
    assert (manifest.counts["dropped_lines"], manifest.counts["repeated_lines"]) == (4, 1)
    assert "dropped lines 4, repeated lines 1" in embeddings.report(manifest)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.recursive(
                st.none() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["custom_id", "response", "body", "data", "embedding"]),
                        inner,
                    )
                ),
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=6,
    )
)
def test_no_line_crashes_and_none_that_is_valid_is_lost(tiny, tmp_path, junk):
    path = tmp_path / "results.jsonl"
    lines = [piece.replace(b"\n", b" ").replace(b"\r", b" ") for piece in junk]
    path.write_bytes(b"\n".join([*lines, line("item-01", [1, 2]).encode(), *lines]))
    vectors, counts = vector_files.read_vectors(path, tiny, "item")
    assert vectors.values[0].tolist() == [1, 2]
    assert counts["dropped_lines"] == 2 * sum(bool(piece.strip()) for piece in lines)


def test_files_that_cannot_be_used(tiny, tmp_path):
    def refuse(words, *args, **options):
        path = write_file(tmp_path / "v.parquet", *args)
        with pytest.raises(InputError, match=words):
            make(tiny, vectors=str(path), **options)

    foreign = [*IDS[:3], "no"]
    refuse(r"1 of 4 ids are no item of .* 'no'; add --unknown=drop", foreign)
    manifest = make(tiny, vectors=str(tmp_path / "v.parquet"), unknown="drop")
    assert manifest.counts["dropped_unknown"] == 1
    refuse("none of its 4 ids", ["a", "b", "c", "d"], VECTORS, name="f", unknown="drop")
    refuse("'01' has two different vectors", ["01", "01", "1", "10"], name="f")
    broken = VECTORS.copy()
    broken[1, 1] = np.inf
    refuse("vector of item '01' is not finite", IDS, broken, name="f")
    refuse("has columns film, vector; expected item and vector", IDS, VECTORS, "film", name="f")
    ragged = pa.table({"item": ["01", "1"], "vector": [[1.0], [1.0, 2.0]]})
    pq.write_table(ragged, tmp_path / "r.parquet")
    with pytest.raises(InputError, match="2 widths: 1, 2"):
        make(tiny, "f", vectors=str(tmp_path / "r.parquet"))
    with pytest.raises(InputError, match="is not a file"):
        make(tiny, "f", vectors=str(tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(InputError, match=r"bad\.npz cannot be read"):
        make(tiny, "f", vectors=str(tmp_path / "bad.npz"))
    big = write_file(tmp_path / "big.parquet", IDS, VECTORS * 1e6)
    with pytest.raises(InputError, match="not finite as float16"):
        make(tiny, "f", vectors=str(big), dtype="float16")
    with pytest.raises(InputError, match=r"e exists; .*--overwrite"):
        make(tiny, vectors=str(tmp_path / "v.parquet"), unknown="drop")
    with pytest.raises(ConfigError, match="cannot name"):
        make(tiny, "../x", vectors=str(tmp_path / "v.parquet"))


def test_load_refuses_what_does_not_fit(make_dataset, tmp_path):
    one = make_dataset("one")
    path = str(write_file(tmp_path / "v.npz"))
    manifest = make(one, vectors=path)
    with pytest.raises(ManifestError, match="no embeddings 'x'; it has: e"):
        embeddings.load(one, "x")
    for field, words in (("split_hash", "made for split"), ("id_map_hash", "made for id map")):
        other = dataclasses.replace(one.manifest, **{field: "f" * 64})
        with pytest.raises(ManifestError, match=words):
            embeddings.load(dataclasses.replace(one, manifest=other), "e")
    shard = one.path / schema.EMBEDDINGS_DIR / "e" / manifest.files["items"][0].path
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match="truncated"):
        embeddings.load(one, "e")
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(ShardError, match="SHA-256"):
        embeddings.load(one, "e")
    make(one, vectors=path, built_from="includes_eval", overwrite=True)
    with pytest.raises(ManifestError, match="built_from=includes_eval"):
        embeddings.load(one, "e")


def test_requests_for_a_service(local, tmp_path):
    path = tmp_path / "requests.jsonl"
    options = EmbedConfig(text_requests=str(path))
    assert embeddings.write_requests(local, options, "some-model") == 5
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert rows[-1] == {
        "custom_id": "item-电影",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "some-model", "input": "e. e a"},
    }
    assert [row["custom_id"] for row in rows][:2] == ["item-01", "item-1"]
