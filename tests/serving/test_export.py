"""Exports read back by other programs: by what they are made for, without this package."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file

import slgr_jax as sl
from slgr_jax.errors import InputError, UserError

N_USERS, N_ITEMS = 24, 30
# A reader that has jax and numpy, and cannot import anything of this package or of its others.
READER = """
import json, pathlib, sys
for name in ("slgr_jax", "flax", "optax", "orbax", "pyarrow", "absl", "jaxtyping"):
    sys.modules[name] = None
import numpy as np
from jax import export

out, jobs = {}, json.loads(sys.argv[1])
for folder, rows, items, exclude in jobs:
    folder = pathlib.Path(folder)
    weights = dict(np.load(folder / "scorer" / "weights.npz"))
    load = lambda name: export.deserialize(bytearray((folder / "scorer" / name).read_bytes()))
    rows, items, exclude = (np.array(x, np.int32) for x in (rows, items, exclude))
    scores = load("scores.stablehlo").call(weights, rows, items)
    listed, values = load("top_k.stablehlo").call(weights, rows, exclude)
    out[folder.name] = [np.asarray(x).tolist() for x in (scores, listed, values)]
print(json.dumps(out))
"""


def _read(folder: pathlib.Path, kind: str) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """User ids, item ids, user vectors, item vectors."""
    if kind == "parquet":
        tables = [pq.read_table(folder / f"{name}s.parquet") for name in ("user", "item")]
        users, items = (np.stack(table["vector"].to_numpy()) for table in tables)
        return tables[0]["user"].to_pylist(), tables[1]["item"].to_pylist(), users, items
    ids = [json.loads((folder / f"{name}_ids.json").read_text()) for name in ("user", "item")]
    if kind == "npy":
        return *ids, np.load(folder / "users.npy"), np.load(folder / "items.npy")
    vectors = load_file(folder / "vectors.safetensors")
    return *ids, vectors["users"], vectors["items"]


@pytest.mark.parametrize(
    ("backbone", "kind"), [("mf", "parquet"), ("lightgcn", "npy"), ("sasrec", "safetensors")]
)
def test_inner_products_of_exported_vectors_are_the_scores(trained, tmp_path, backbone, kind):
    run, folder = trained(backbone), tmp_path / "out"
    written = sl.export(run.workdir, folder, format=kind)
    user_ids, item_ids, users, items = _read(folder, kind)
    assert (users.dtype, len(users), len(items)) == (np.float32, N_USERS, N_ITEMS)
    pairs = [(user, item) for user in range(N_USERS) for item in range(N_ITEMS)]
    expected = run.scores([user_ids[u] for u, _ in pairs], [item_ids[i] for _, i in pairs])
    np.testing.assert_allclose((users @ items.T).reshape(-1), expected, rtol=1e-4, atol=1e-5)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == written.manifest
    assert manifest["vectors"]["width"] == users.shape[1]
    assert str(written).startswith(f"wrote {folder}: vectors of 24 users and 30 items, ")
    on_disk = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(InputError, match=r"exists; choose another path or add --overwrite"):
        sl.export(run.workdir, folder)


def test_the_index_finds_what_brute_force_finds(trained, tmp_path):
    usearch = pytest.importorskip("usearch.index", reason="the extra export is not installed")
    run, folder = trained("mf"), tmp_path / "out"
    written = sl.export(run.workdir, folder, format="npy", index="usearch", k=5)
    users, items = np.load(folder / "users.npy"), np.load(folder / "items.npy")
    index = usearch.Index.restore(str(folder / "items.usearch"))
    exact = np.argsort(-(users @ items.T), axis=1)[:, :5]
    keys = [np.asarray(index.search(user, 5).keys) for user in users]
    hits = [len({*mine} & {*true}) for mine, true in zip(keys, exact, strict=True)]
    facts = written.manifest["index"]
    assert facts["recall"] == pytest.approx(np.mean(hits) / 5)
    assert facts["recall"] > 0.9  # thirty items: a graph of 32 links a node misses none
    assert (facts["k"], facts["users_compared"]) == (5, N_USERS)
    assert "recall@5" in str(written)


def test_the_scorer_runs_without_this_package(trained, small_data, tmp_path):
    rng, jobs, expected = np.random.default_rng(0), [], {}
    for backbone in ("mf", "sasrec", "deepfm"):
        run, folder = trained(backbone), tmp_path / backbone
        written = sl.export(run.workdir, folder, format="none", scorer=True, k=7)
        users = rng.permutation(N_USERS)[:9]
        items = rng.integers(0, N_ITEMS, users.size)
        seen = [run.seen.row(user) for user in users]
        width = max(map(len, seen))
        exclude = [[*row, *[-1] * (width - len(row))] for row in seen]
        rows = users
        if backbone == "sasrec":
            events = run.restored.context.histories
            offsets, history = np.asarray(events.offsets), np.asarray(events.items)
            length = run.restored.backbone.length
            latest = [history[offsets[u] : offsets[u + 1]][-length:] for u in users]
            rows = np.array([[*[-1] * (length - len(row)), *row] for row in latest])
        inputs = written.manifest["scorer"]["programs"]["top_k"]["inputs"]
        assert list(inputs) == ["histories" if backbone == "sasrec" else "users", "exclude"]
        jobs.append([str(folder), rows.tolist(), items.tolist(), np.array(exclude).tolist()])
        names = [f"u{u}" for u in users]
        expected[backbone] = (run.scores(names, [f"i{i}" for i in items]), run.recommend(names, 7))

    reader = [sys.executable, "-I", "-c", READER, json.dumps(jobs)]
    done = subprocess.run(reader, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for backbone, (scores, items, values) in json.loads(done.stdout).items():
        pair_scores, lists = expected[backbone]
        np.testing.assert_allclose(scores, pair_scores, rtol=1e-4, atol=1e-5)
        assert [[f"i{i}" if i >= 0 else None for i in row] for row in items] == lists.items
        np.testing.assert_allclose(values, lists.scores, rtol=1e-4, atol=1e-5)


def test_the_scorer_is_lowered_for_platforms_that_are_not_there(trained, tmp_path):
    folder = tmp_path / "out"
    sl.export(trained("lightgcn").workdir, folder, scorer=True)
    for name in ("scores", "top_k"):
        data = (folder / "scorer" / f"{name}.stablehlo").read_bytes()
        program = jax_export.deserialize(bytearray(data))
        assert program.platforms == ("cpu", "cuda", "tpu")
        calls = re.findall(r"custom_call @(\w+)", program.mlir_module())
        assert not [call for call in calls if "slgr" in call]
        assert b".py" not in data  # no path of the machine that wrote it
        assert len(data) < 20_000  # the tables are beside it
    with np.load(folder / "scorer" / "weights.npz") as weights:
        assert not any("graph" in key for key in weights)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("deepfm", {}, r"--backbone=deepfm scores a user and an item together.*--scorer"),
        ("deepfm", {"index": "usearch"}, r"has no vectors"),
        ("mf", {"format": "none"}, r"--format=none without --scorer leaves nothing to export"),
        ("mf", {"format": "none", "index": "usearch"}, r"an index of vectors, which --format=none"),
        ("mf", {"k": 5}, r"--k=5 is the length of lists, and vectors have none; add --scorer"),
        ("mf", {"k": 0, "scorer": True}, r"--k=0; it must be at least 1"),
        ("mf", {"format": "csv"}, r"--format='csv' is not one of: parquet, npy, safetensors, none"),
        ("mf", {"index": "faiss"}, r"--index='faiss' is not one of: none, usearch"),
    ],
)
def test_what_cannot_be_exported_is_said(trained, tmp_path, backbone, options, message):
    with pytest.raises(UserError, match=message):
        sl.export(trained(backbone).workdir, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
