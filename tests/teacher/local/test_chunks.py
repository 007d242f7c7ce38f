"""Several vectors a row: cut, written, read back, imported; nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import EmbedConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.local import chunks, embeddings, scorers

TITLES = ["a b", "b", None, "c", "d d", "zzz"]
TEXTS = ["a b c d e", None, None, "e e e", "a", None]
IDS = ["电影", "01", "电影", "café", "电影"]  # conftest's ids 5, 0, 5, 3, 5
FIELDS = ["text", "title", "text", "text", "title"]
VECTORS = np.arange(15, dtype=np.float32).reshape(5, 3) + 1


class Letters:
    name = "letters"

    def embed(self, texts):
        rows = np.array([[text.count(c) for c in "abcde"] for text in texts], np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


@pytest.fixture
def local(make_dataset, monkeypatch):
    monkeypatch.setattr(scorers, "WordLlama", Letters)
    return make_dataset(titles=TITLES, texts=TEXTS)


def make(dataset, name="e", **options):
    common = {key: options.pop(key) for key in ("overwrite", "rows_per_shard") if key in options}
    stated = {key: options.pop(key) for key in ("built_from", "unknown") if key in options}
    values = {"chunks": 3, **options}
    return embeddings.embed(
        dataset, TeachConfig(name=name, **common), EmbedConfig(**values), **stated
    )


def read(dataset, side="items", name="e"):
    """[R, S, Z] chunks, NaN where there is none, of float64."""
    blocks = list(embeddings.load_chunks(dataset, name, side))
    values, real = (np.concatenate([block[k] for block in blocks]) for k in (1, 2))
    return np.where(real[..., None], values.astype(float), np.nan)


def test_a_text_is_cut_evenly_and_no_word_is_lost():
    words = [f"w{i}" for i in range(11)]
    for most in (1, 2, 3, 20):
        for size in (1, 4, 11, 12):
            pieces = [piece.split() for piece in chunks.cut("  ".join(words), most, size)]
            assert [word for piece in pieces for word in piece] == words
            lengths = [len(piece) for piece in pieces]
            assert max(lengths) - min(lengths) <= 1
            assert len(pieces) == min(most, -(-11 // size))
    assert chunks.cut(" \n", 3, 2) == []


def test_texts_become_chunks_by_field_and_users_their_items_means(local):
    manifest = make(local, chunk_words=2, rows_per_shard=4)
    assert manifest.fields == {"items": {"text": 3, "title": 1}, "users": {"text": 1, "title": 1}}
    assert (manifest.dim, manifest.dtype, manifest.users_from) == (5, "float16", "history")
    assert len(manifest.files["items"]) == 2
    expected = np.full((6, 4, 5), np.nan)
    model = Letters()
    for item, (title, text) in enumerate(zip(TITLES, TEXTS, strict=True)):
        pieces = chunks.cut(text or "", 3, 2)
        for at, piece in [*enumerate(pieces), (3, title or "")]:
            vector = model.embed([piece])[0]
            if vector.any():
                expected[item, at] = vector
    np.testing.assert_allclose(read(local), expected, atol=1e-3)
    # "zzz" has no known word, so that its item has no chunk.
    assert manifest.counts["items"] == 4
    assert manifest.counts["chunks_of_items"] == (~np.isnan(expected[..., 0])).sum()

    loaded = embeddings.load(local, "e")
    has = ~np.isnan(expected[..., 0]).all(axis=1)
    np.testing.assert_array_equal(loaded.items.has, has)
    np.testing.assert_allclose(
        loaded.items.values[has], np.nanmean(expected[has], axis=1), atol=1e-3
    )
    users = read(local, "users")
    positives = local.positives(("train",))
    for user in range(local.n_users):
        for slot, span in ((0, slice(0, 3)), (1, slice(3, 4))):
            of_items = expected[positives.row(user), span]
            real = ~np.isnan(of_items[..., :1])
            mean = np.where(real, of_items, 0).sum(axis=1) / np.maximum(real.sum(axis=1), 1)
            total = mean.sum(axis=0)
            unit = total / np.linalg.norm(total) if total.any() else np.full(5, np.nan)
            np.testing.assert_allclose(users[user, slot], unit, atol=1e-3)


def _file(path, fields=FIELDS, ids=IDS, vectors=VECTORS):
    lists = pa.array([list(map(float, row)) for row in vectors], pa.list_(pa.float64()))
    columns = {"item": ids, "vector": lists} | ({} if fields is None else {"field": fields})
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def _expected(fields):
    out = np.full((6, 3, 3), np.nan)
    if fields is None:
        out[5], out[0, 0], out[3, 0] = VECTORS[[0, 2, 4]], VECTORS[1], VECTORS[3]
    else:  # two slots of text, one of title
        out[5], out[0, 2], out[3, 0] = VECTORS[[0, 2, 4]], VECTORS[1], VECTORS[3]
    return out


@pytest.mark.parametrize("fields", [FIELDS, None])
@pytest.mark.parametrize("kind", ["parquet", "npz", "jsonl"])
def test_chunks_from_files_are_read_back_in_their_order(local, tmp_path, kind, fields):
    path = tmp_path / f"v.{kind}"
    if kind == "parquet":
        _file(path, fields)
    elif kind == "npz":
        more = {} if fields is None else {"fields": np.array(fields)}
        np.savez(path, ids=np.array(IDS), vectors=VECTORS, **more)
    else:
        fields = None  # results say none
        lines = []
        for item in dict.fromkeys(IDS):
            places = [k for k, other in enumerate(IDS) if other == item]
            data = [{"index": i, "embedding": VECTORS[k].tolist()} for i, k in enumerate(places)]
            body = {"custom_id": f"item-{item}", "response": {"body": {"data": data[::-1]}}}
            lines.append(json.dumps(body))
        path.write_text("\n".join(lines) + "\n")
    manifest = make(local, vectors=str(path), user_vectors="", built_from="train_only")
    slots = {"text": 3} if fields is None else {"text": 2, "title": 1}
    assert manifest.fields["items"] == slots
    np.testing.assert_array_equal(read(local), _expected(fields))


def test_files_that_cannot_be_chunks_are_refused_and_leave_nothing(local, tmp_path):
    path = tmp_path / "v.parquet"
    bad, wide = VECTORS.copy(), VECTORS * 1e6
    bad[3, 1] = np.nan
    cases = [
        (
            _file(path),
            {"chunks": 1},
            "2 chunks of field 'text', and --chunks=1; give",
        ),
        (
            _file(tmp_path / "f.parquet", ids=["no", *IDS[1:]]),
            {},
            "'no' and 0 more ids are",
        ),
        (_file(tmp_path / "n.parquet", vectors=bad), {}, "not finite as float16"),
        (_file(tmp_path / "w.parquet", vectors=wide), {}, "not finite as float16"),
        (_file(tmp_path / "u.parquet", ids=["x"] * 5), {"unknown": "drop"}, "none of its 5 ids"),
        (tmp_path / "gone.parquet", {}, "gone.parquet is not a file"),
    ]
    ragged = pa.table({"item": IDS, "vector": [[1.0], [1.0, 2.0], [1.0], [1.0], [1.0]]})
    pq.write_table(ragged, tmp_path / "r.parquet")
    cases.append((tmp_path / "r.parquet", {}, "has vectors of widths: 1, 2"))
    pq.write_table(pa.table({"item": IDS, "v": IDS}), tmp_path / "c.parquet")
    cases.append((tmp_path / "c.parquet", {}, "expected item and vector"))
    np.savez(tmp_path / "s.npz", ids=np.array(IDS), vectors=VECTORS[:3])
    cases.append((tmp_path / "s.npz", {}, r"expected ids \[n\], vectors \[n, Z\]"))
    (tmp_path / "j.jsonl").write_text('{"custom_id": "item-01"}\n')
    cases.append((tmp_path / "j.jsonl", {}, "line 1 is no result with vectors"))
    for file, knobs, text in cases:
        with pytest.raises(InputError, match=text):
            make(local, vectors=str(file), **knobs)
        root = local.path / "embeddings"
        assert not root.exists() or not list(root.iterdir())
    manifest = make(local, vectors=str(tmp_path / "f.parquet"), unknown="drop")
    assert manifest.counts["dropped_unknown"] == 1
    for knobs, text in (
        ({"chunks": 0, "chunk_words": 9}, "add --chunks=8"),
        ({"text_requests": "t"}, "--chunks=3 for several"),
        ({"vectors": "v", "chunk_words": 9}, "are vectors of chunks already"),
    ):
        with pytest.raises(ConfigError, match=text):
            make(local, **knobs)


def test_a_damaged_or_foreign_product_is_refused(local, make_dataset):
    manifest = make(local)
    root = local.path / "embeddings" / "e"

    def write(counts, value=1.0):
        """The items' shard anew, with its checksum: what another program might write."""
        numbers = np.full((6, 4 * 5), value, np.float16)
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(array)), array.shape[1])
            for array in (numbers, np.array(counts, np.int16))
        ]
        relative = manifest.files["items"][0].path
        table = pa.table(columns, schema=schema.chunks(20, 2))
        file = shards.write_shard(root, relative, table)
        fields = {**manifest.fields, "items": {"text": 3, "title": 1}}
        files = {**manifest.files, "items": (file,)}
        schema.write_manifest(root, dataclasses.replace(manifest, files=files, fields=fields))

    write([[3, 1]] * 6)
    assert read(local).shape == (6, 4, 5)
    write([[3, 1]] * 5 + [[4, 1]])
    with pytest.raises(ShardError, match=r"row 5 counts \[4, 1\] chunks in fields of \[3, 1\]"):
        embeddings.load(local, "e")
    write([[-1, 1]] * 6)
    with pytest.raises(ShardError, match=r"row 0 counts \[-1, 1\]"):
        read(local)
    write([[0, 0]] * 6, np.nan)
    with pytest.raises(ShardError, match="a chunk of row 0 is not finite"):
        read(local)
    write([[3, 1]] * 6)
    path = root / manifest.files["items"][0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"?" + whole[201:])
    with pytest.raises(ShardError, match="SHA-256"):
        read(local)
    path.write_bytes(whole)
    other = dataclasses.replace(local.manifest, split_hash="0" * 64)
    with pytest.raises(ManifestError, match="split"):
        embeddings.load(dataclasses.replace(local, manifest=other), "e")
