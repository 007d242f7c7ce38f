"""`prepare --keep_items`: items of the table without interactions are candidates everywhere."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

import slgr_jax
from slgr_jax.config import SliceConfig, make_run
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines
from slgr_jax.training import build, state, step

START = 1_500_000_000
# Of the table's ids some sort before, some among those of the log; i03 is not in the table.
TABLE = ["a_new", "i00", "i01", "i02", "i02x", "i04", "i05", "i06", "i07", "zz"]
ALONE = ["a_new", "i02x", "zz"]


def _log(first: int, *more: tuple[str, str]) -> list[tuple[str, str, int]]:
    pairs = [(f"u{u}", f"i{i:02}") for u in range(8) for i in range(8) if (u + i) % 2]
    pairs = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))]
    return [(u, i, first + k) for k, (u, i) in enumerate([*pairs, *more])]


def _prepared(tmp: pathlib.Path, name: str, rows: list[Any], **knobs: Any) -> Dataset:
    log, items = tmp / f"{name}.csv", tmp / "items.csv"
    log.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    items.write_text(
        "item,title,kind\n" + "".join(f"{i},{'T' * (i != 'zz')},k{i[0]}\n" for i in TABLE)
    )
    values = {"keep_items": True, "items_input": items, **knobs}
    slgr_jax.prepare(source="csv", input=log, out=tmp / name, **values)
    return dataset_lib.load(tmp / name)


def _ids(data: Dataset) -> list[str]:
    return data.items["item_id"].to_pylist()


def test_they_stand_behind_the_others(tmp_path):
    plain = _prepared(tmp_path, "plain", _log(START), keep_items=False)
    kept = _prepared(tmp_path, "kept", _log(START), item_features="kind")
    assert _ids(plain) == [f"i{k:02}" for k in range(8)]
    assert _ids(kept) == [*_ids(plain), *ALONE]
    assert kept.manifest.split_hash == plain.manifest.split_hash
    assert kept.manifest.counts["items_without_interactions"] == 3
    assert "items without interactions, candidates all the same: 3" in prepare.summary(
        kept.manifest
    )
    assert kept.items["title"].to_pylist()[-3:] == ["T", "T", None]  # a candidate without a title
    assert kept.manifest.counts["items_with_title"] == 11 - 2  # nor has i03, in no table
    (kind,) = kept.features
    assert kind.column.to_pylist()[-3:] == [None, kind.values.index("ki"), None]
    np.testing.assert_array_equal(kept.popularity[-3:], 0)
    assert (
        kept.slices(SliceConfig(tail_item_fraction=3 / 11)).tail_items.tolist()
        == [False] * 8 + [True] * 3
    )


def test_the_filters_leave_them(tmp_path):
    rows = [*_log(START), ("u1", "i05", START + 999), ("new", "zz", START + 999)]
    data = _prepared(tmp_path, "kept", rows, item_core=2, user_core=2)
    assert _ids(data)[-3:] == ALONE  # zz lost its only row, and is in the table
    assert data.n_users == 8


def test_append_keeps_their_index(tmp_path):
    parent = _prepared(tmp_path, "old", _log(START))
    rows = [
        ("u1", "zz", START + 9_000),
        ("u2", "fresh", START + 9_001),
        ("u3", "zz", START + 9_002),
    ]
    child = _prepared(tmp_path, "new", rows, append=parent.path)
    assert _ids(child) == [*_ids(parent), "fresh"]
    assert child.manifest.counts["items_without_interactions"] == 2
    # What is not in the parent's catalogue is taken from a later table likewise.
    bare = _prepared(tmp_path, "bare", _log(START), keep_items=False)
    later = _prepared(tmp_path, "later", rows, append=bare.path)
    assert _ids(later) == [*_ids(bare), "fresh", "zz", "a_new", "i02x"]
    assert later.manifest.id_map_hash != child.manifest.id_map_hash


def test_json_tables_are_read_whole(tmp_path):
    table = tmp_path / "items.jsonl"
    table.write_text("".join(json.dumps({"item": i, "title": i}) + "\n" for i in TABLE))
    data = _prepared(tmp_path, "kept", _log(START), items_input=table)
    assert _ids(data)[-3:] == ALONE
    assert data.items["title"].to_pylist()[-1] == "zz"


def test_a_table_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="--keep_items keeps the items of an item table"):
        _prepared(tmp_path, "kept", _log(START), items_input="")


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
@pytest.mark.parametrize("backbone", ["mf", "lightgcn"])
def test_models_score_and_draw_them(tmp_path, backbone, negatives):
    data = _prepared(tmp_path, "kept", _log(START))
    knobs = {
        "dim": 4,
        "batch_size": 64,
        "backbone": backbone,
        "negatives": negatives,
        "kernels": "xla",
    }
    experiment = build.build(
        make_run(str(data.path), "run", **knobs), data, worlds.one_device()
    )  # fmt: skip
    first = state.init_state(experiment.trainer, 0)
    before = np.array(first.tables["item"])
    after, sums, health = step.make_run_steps(experiment.trainer)(
        first, experiment.arrays, jax.random.key(0), jnp.int32(4)
    )
    assert int(health.step) == -1
    assert np.isfinite(float(sums["loss"]))
    served = state.make_serving_state(experiment.trainer)(after, experiment.arrays.context)
    assert np.isfinite(np.asarray(served.values["item"])).all()
    drawn = (np.asarray(after.tables["item"]) != before).any(axis=1)[8:11]
    if backbone == "mf":  # a graph's step reads every row
        assert drawn.tolist() == [negatives == "uniform"] * 3


@pytest.mark.parametrize("name", ["popular", "ease", "ials"])
def test_baselines_give_them_finite_scores(tmp_path, name):
    if name == "ials":
        pytest.importorskip("implicit", reason="the extra ials is not installed")
    data = _prepared(tmp_path, "kept", _log(START))
    users = np.arange(data.n_users, dtype=np.int32)
    baseline = {
        "popular": baselines.Popular(),
        "ease": baselines.Ease((1.0,)),
        "ials": baselines.Ials(4, (0.1,), (1.0,), 3),
    }[name]
    (fitted,) = baseline.fit(data, baseline.grid[:1])
    scores = np.asarray(jax.jit(fitted.score_users)(fitted.state, users))
    assert scores.shape == (data.n_users, 11)
    np.testing.assert_allclose(scores[:, -3:], 0, atol=1e-6)  # nobody has them
