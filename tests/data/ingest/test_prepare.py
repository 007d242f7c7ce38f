"""From raw file to dataset directory: numbers, manifest, and the command itself."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset, schema, shards
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError, InputError

ROOT = pathlib.Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
WHEEL = os.environ.get("SLGR_RECBOLE_WHEEL", "")
DAY = 86_400
START = 1_500_000_000


def write_csv(path: pathlib.Path, rows: Iterable[tuple[object, ...]], header: str) -> pathlib.Path:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(path: pathlib.Path, out: pathlib.Path, **more: object) -> dataset.Dataset:
    """Prepare a csv (or what `more` says) and load it again, checksums included."""
    values = {"source": "csv", "input": str(path), "out": str(out), **more}
    prepare.prepare(PrepareConfig(**values))  # type: ignore[arg-type]
    return dataset.load(out)


def external(data: dataset.Dataset, part: str) -> list[tuple[object, ...]]:
    """(user id, item id, time in microseconds, rating) of a part, in stored order."""
    found = data.part(part)
    users, items = data.user_ids.to_pylist(), data.items["item_id"].to_pylist()
    columns: list[list[object]] = [[users[u] for u in found.users], [items[i] for i in found.items]]
    for values in (found.timestamps, found.ratings):
        columns.append([None] * len(found) if values is None else values.tolist())
    return list(zip(*columns, strict=True))


def world(n: int = 60) -> list[tuple[str, str, int, int]]:
    """A user, item, time, rating log without repeats, one row a day."""
    return [(f"u{k % 7}", f"i{k // 7}", START + k * DAY, 1 + k % 5) for k in range(n)]


HEADER = "user,item,timestamp,rating"


def test_global_time_by_hand(tmp_path: pathlib.Path) -> None:
    rows = world()
    data = run(write_csv(tmp_path / "log.csv", rows[::-1], HEADER), tmp_path / "d")
    expected = [(u, i, t * 10**6, float(r)) for u, i, t, r in rows]
    assert external(data, "train") == sorted(expected[:48], key=lambda r: (r[0], r[2]))
    assert external(data, "valid") == sorted(expected[48:54], key=lambda r: (r[0], r[2]))
    assert external(data, "test") == sorted(expected[54:], key=lambda r: (r[0], r[2]))
    manifest = data.manifest
    assert manifest.split["rule"] == "global_time"
    assert manifest.split["time_unit"] == "s"
    assert manifest.split["cutoffs"] == {
        "valid_from": "2017-08-31T02:40:00+00:00",
        "test_from": "2017-09-06T02:40:00+00:00",
    }
    assert manifest.counts["users"] == 7
    assert manifest.counts["items"] == 9
    assert [manifest.counts[part] for part in schema.PARTS] == [48, 6, 6]


def test_ids_survive_exactly(tmp_path: pathlib.Path) -> None:
    users = ["007", "7", " lead", "trail ", "a  b", "žluť", "\U0001f600", "NULL", "nan"]
    rows = [(user, f"0{k}", START + k, 1) for k, user in enumerate(users)]
    data = run(write_csv(tmp_path / "log.csv", rows, HEADER), tmp_path / "d")
    assert data.user_ids.to_pylist() == sorted(users)
    assert data.items["item_id"].to_pylist() == [f"0{k}" for k in range(9)]
    found = {row[:2] for part in schema.PARTS for row in external(data, part)}
    assert found == {row[:2] for row in rows}


def test_milliseconds_give_the_same_dataset(tmp_path: pathlib.Path) -> None:
    rows = world()
    milli = [(u, i, t * 1000, r) for u, i, t, r in rows]
    one = run(write_csv(tmp_path / "s.csv", rows, HEADER), tmp_path / "s")
    two = run(write_csv(tmp_path / "ms.csv", milli, HEADER), tmp_path / "ms")
    assert two.manifest.split["time_unit"] == "ms"
    assert one.manifest.split_hash == two.manifest.split_hash
    assert one.manifest.id_map_hash == two.manifest.id_map_hash
    assert [f.sha256 for f in one.manifest.files["train"]] == [
        f.sha256 for f in two.manifest.files["train"]
    ]


def test_duplicates_keep_the_earliest(tmp_path: pathlib.Path) -> None:
    rows = world()
    again = [("u0", "i0", START + 500 * DAY, 4), ("u1", "i0", START - DAY, 2)]
    data = run(write_csv(tmp_path / "log.csv", [*rows, *again], HEADER), tmp_path / "d")
    assert data.manifest.filters["duplicates"] == 2
    kept = {row[:2]: row[2:] for part in schema.PARTS for row in external(data, part)}
    assert len(kept) == 60
    assert kept["u0", "i0"] == (START * 10**6, 1.0)
    assert kept["u1", "i0"] == ((START - DAY) * 10**6, 2.0)


def test_a_user_with_one_interaction(tmp_path: pathlib.Path) -> None:
    rows = [*world(), ("alone", "i0", START + 30, 5)]
    for split in ("global_time", "leave_last", "ratio"):
        data = run(write_csv(tmp_path / "l.csv", rows, HEADER), tmp_path / split, split=split)
        users = data.user_ids.to_pylist()
        assert users[0] == "alone"
        assert sum(int((data.part(part).users == 0).sum()) for part in schema.PARTS) == 1
        if split == "leave_last":
            assert data.history[0] == 1


def test_filters_come_before_the_split_and_are_counted(tmp_path: pathlib.Path) -> None:
    rows = [*world(), ("once", "i0", START, 5), ("u0", "once", START + 1, 5)]
    path = write_csv(tmp_path / "log.csv", rows, HEADER)
    data = run(path, tmp_path / "d", min_rating=2.0, user_core=2, item_core=2)
    # 12 of the 60 rows of `world` are rated 1; the user and the item "once" have one row each.
    filters = data.manifest.filters
    assert filters["rows_read"] == 62
    assert filters["below_min_rating"] == 12
    assert filters["outside_k_core"] == 2
    assert filters["k_core"] == {
        "user_core": 2, "item_core": 2, "rounds": 1, "users": 1, "items": 1
    }  # fmt: skip
    assert sum(data.manifest.counts[part] for part in schema.PARTS) == 48
    assert "once" not in data.user_ids.to_pylist() + data.items["item_id"].to_pylist()


def test_ratio_is_stable_and_seeded(tmp_path: pathlib.Path) -> None:
    path = write_csv(tmp_path / "log.csv", [row[:2] for row in world()], "user,item")
    hashes = [
        run(path, tmp_path / f"{k}", seed=seed).manifest.split_hash
        for k, seed in enumerate((1, 1, 2))
    ]
    # The rule is a contract: a change here makes published splits irreproducible.
    assert hashes[0].startswith("7722cf3d9ceb")
    assert hashes[0] == hashes[1] != hashes[2]
    assert json.loads((tmp_path / "0" / "manifest.json").read_text())["split"]["rule"] == "ratio"
    assert dataset.load(tmp_path / "0").train.timestamps is None


LOGS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 30)), min_size=12, max_size=60
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    LOGS, st.sampled_from(["global_time", "leave_last", "ratio"]), st.sampled_from(["all", "user"])
)
def test_parts_are_a_partition(
    tmp_path: pathlib.Path, rows: list[tuple[int, int, int]], split: str, by: str
) -> None:
    path = write_csv(tmp_path / "log.csv", rows, "user,item,timestamp")
    more = {"split": split, "ratio_by": by, "valid_fraction": 0.2, "test_fraction": 0.2}
    try:
        data = run(path, tmp_path / "d", overwrite=True, **more)
    except InputError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert any(word in refused for word in ("distinct times", "3 interactions", "empty"))
        return
    earliest: dict[tuple[str, str], int] = {}
    for user, item, time in rows:
        pair = (str(user), str(item))
        earliest[pair] = min(time, earliest.get(pair, time))
    parts = [external(data, part) for part in schema.PARTS]
    found = [(row[:2], row[2]) for part in parts for row in part]
    assert len(found) == len(earliest)
    assert dict(found) == {pair: time * 10**6 for pair, time in earliest.items()}
    assert data.user_ids.to_pylist() == sorted({user for user, _ in earliest})
    for part in schema.PARTS:
        stored = data.part(part)
        assert stored.timestamps is not None
        keys = list(zip(stored.users, stored.timestamps, stored.items, strict=True))
        assert keys == sorted(keys)


# --- pre-made splits ----------------------------------------------------------------------


def test_three_files(tmp_path: pathlib.Path) -> None:
    train, valid, test = (tmp_path / f"{part}.csv" for part in schema.PARTS)
    write_csv(train, [("a", "x", START, 1), ("b", "y", START, 1), ("b", "x", START, 1)], HEADER)
    write_csv(valid, [("a", "y", START + 1, 1), ("b", "y", START + 1, 1)], HEADER)
    write_csv(test, [("b", "z", START + 2, 1), ("a", "y", START, 1), ("c", "x", START, 1)], HEADER)
    data = run(train, tmp_path / "d", valid_input=str(valid), test_input=str(test), user_core=2)
    # (b, y) of valid is in train; (a, y) of test is in valid. The core drops a's one train row,
    # and leaves the evaluation rows of a and c alone.
    assert [row[:2] for row in external(data, "train")] == [("b", "x"), ("b", "y")]
    assert [row[:2] for row in external(data, "valid")] == [("a", "y")]
    assert [row[:2] for row in external(data, "test")] == [("b", "z"), ("c", "x")]
    manifest = data.manifest
    assert manifest.filters["repeated_in_eval"] == {"valid": 1, "test": 1}
    assert manifest.counts["test_users_without_train"] == 1
    assert {entry["name"] for entry in manifest.source["files"]} == {
        "train.csv", "valid.csv", "test.csv"
    }  # fmt: skip
    sha = hashlib.sha256(test.read_bytes()).hexdigest()
    assert sha in {entry["sha256"] for entry in manifest.source["files"]}
    assert str(tmp_path) not in (tmp_path / "d" / "manifest.json").read_text()


def test_valid_is_carved_by_time_or_else_by_ratio(tmp_path: pathlib.Path) -> None:
    rows = world(42)
    test = write_csv(tmp_path / "t.csv", [("u0", "new", START + 90 * DAY, 5)], HEADER)
    data = run(write_csv(tmp_path / "l.csv", rows, HEADER), tmp_path / "a", test_input=str(test))
    assert sorted(row[:2] for row in external(data, "valid")) == sorted(r[:2] for r in rows[38:])
    assert data.manifest.split["valid"] == "carved from train by time"
    test = write_csv(tmp_path / "t.csv", [("u0", "new")], "user,item")
    path = write_csv(tmp_path / "l.csv", [row[:2] for row in rows], "user,item")
    data = run(path, tmp_path / "b", test_input=str(test), seed=5)
    order = np.random.default_rng(5).permutation(42)
    expected = {rows[k][:2] for k in order[38:]}
    assert {row[:2] for row in external(data, "valid")} == expected


def test_split_column(tmp_path: pathlib.Path) -> None:
    folds = ["train", "train", "dev", "test", "unused"]
    rows = [(*row, fold) for row, fold in zip(world(5), folds, strict=True)]
    path = write_csv(tmp_path / "log.csv", rows, HEADER + ",fold")
    data = run(path, tmp_path / "d", split_column="fold")
    assert [len(data.part(part)) for part in schema.PARTS] == [2, 1, 1]
    assert data.manifest.filters["unused_in_split_column"] == 1
    assert data.n_users == 4


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"split_column": "rating"}, InputError, "holds '1', '2', '3', '4', '5'; it may hold"),
        (
            {"split_column": "x", "split": "ratio"},
            ConfigError,
            "--split_column is a pre-made split",
        ),
        ({"split_column": "x", "test_input": "y"}, ConfigError, "give one"),
        ({"split": "premade"}, ConfigError, "needs --test_input or --split_column"),
        ({"time_column": "", "split": "leave_last"}, InputError, "--split=leave_last needs times"),
        ({"min_rating": 9.0}, InputError, "below_min_rating dropped all 60"),
        ({"rating_column": "", "min_rating": 1.0}, ConfigError, "the input has no ratings"),
        ({"user_core": 99}, InputError, "--user_core=99 --item_core=1 dropped all 60"),
    ],
)
def test_errors_leave_nothing(
    tmp_path: pathlib.Path, more: dict[str, object], error: type[Exception], message: str
) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    with pytest.raises(error, match=message):
        run(path, tmp_path / "deep" / "d", **more)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_one_moment_for_all_rows_cannot_be_split_by_time(tmp_path: pathlib.Path) -> None:
    path = write_csv(tmp_path / "log.csv", [(k, k, START, 1) for k in range(9)], HEADER)
    with pytest.raises(InputError, match="needs 3 distinct times, the data have 1"):
        run(path, tmp_path / "d")


def test_item_texts_follow_their_items(tmp_path: pathlib.Path) -> None:
    rows = [{"item": f"i{k}", "title": f"T{k}", "categories": ["c"]} for k in (8, 3, 99)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    data = run(path, tmp_path / "d", items_input=str(tmp_path / "items.parquet"))
    titles = dict(zip(*(data.items[c].to_pylist() for c in ("item_id", "title")), strict=True))
    assert titles == {f"i{k}": f"T{k}" if k in (3, 8) else None for k in range(9)}
    assert data.items.schema == schema.ITEMS
    assert data.manifest.counts["items_with_title"] == 2


# --- writing ------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_shard", "sha256_of"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failing_write_leaves_no_directory(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    error: BaseException,
) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    real, calls = getattr(shards, failing), []

    def third_fails(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(shards, failing, third_fails)
    with pytest.raises(type(error)):
        run(path, tmp_path / "d")
    assert len(calls) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_shards_hold_at_most_the_stated_rows(tmp_path: pathlib.Path) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    one = run(path, tmp_path / "one")
    many = run(path, tmp_path / "many", rows_per_shard=5)
    assert [file.rows for file in many.manifest.files["train"]] == [5] * 9 + [3]
    assert many.manifest.split_hash == one.manifest.split_hash
    for part in schema.PARTS:
        assert external(many, part) == external(one, part)


def test_overwrite_spares_teacher_products(tmp_path: pathlib.Path) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    run(path, tmp_path / "d")
    with pytest.raises(InputError, match="exists; choose another path or add --overwrite"):
        run(path, tmp_path / "d")
    run(path, tmp_path / "d", overwrite=True)
    (tmp_path / "d" / "teacher" / "gpt").mkdir(parents=True)
    with pytest.raises(InputError, match="teacher products that --overwrite would delete"):
        run(path, tmp_path / "d", overwrite=True)


# --- the command --------------------------------------------------------------------------


def command(*args: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "launch" / "prepare.py")
    return subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_command_succeeds(tmp_path: pathlib.Path) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    done = command("--source=csv", f"--input={path}", f"--out={tmp_path / 'd'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "log: 7 users, 9 items" in done.stdout
    assert "test_from: 2017-09-06T02:40:00+00:00" in done.stdout
    assert done.stdout.endswith(f"wrote {tmp_path / 'd'}\n")
    assert dataset.load(tmp_path / "d").n_users == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sauce=csv",), "Unknown command line flag 'sauce'"),
        (("--source=excel",), "--source='excel' is not one of"),
        (("--input=nowhere.csv",), "nowhere.csv does not exist"),
        (("--user_column=uid",), "has no column uid; columns found: user, item, timestamp, rating"),
        (("--test_fraction=1.5",), "--test_fraction=1.5 must be less than 1"),
        (("--out=",), "missing --out"),
        (("--out=LOG/d",), "is not a directory"),
    ],
)
def test_a_bad_command_says_so_in_one_line(
    tmp_path: pathlib.Path, args: tuple[str, ...], message: str
) -> None:
    path = write_csv(tmp_path / "log.csv", world(), HEADER)
    base = ("--source=csv", f"--input={path}", f"--out={tmp_path / 'd'}")
    done = command(*base, *(arg.replace("LOG", str(path)) for arg in args))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['prepare.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'launch' / 'prepare.py')!r}, run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0\n"
        "assert not {'jax', 'pyarrow', 'numpy'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in ("--split=auto", "--test_input=...", "--rows_per_shard=4194304"):
        assert flag in done.stdout


# --- real data ----------------------------------------------------------------------------


@pytest.mark.skipif(not WHEEL, reason="SLGR_RECBOLE_WHEEL names no recbole wheel")
@pytest.mark.parametrize("name", ["ml-100k", ""])
def test_movielens_100k_from_the_recbole_wheel(tmp_path: pathlib.Path, name: str) -> None:
    data = run(pathlib.Path(WHEEL), tmp_path / "d", source="recbole", name=name)
    assert data.manifest.name == "ml-100k"
    assert (data.n_users, data.n_items) == (943, 1682)
    assert [len(data.part(part)) for part in schema.PARTS] == [79_999, 10_001, 10_000]
    times = [data.part(part).timestamps for part in schema.PARTS]
    assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()  # type: ignore[union-attr]
    first = data.items.slice(data.items["item_id"].to_pylist().index("1"), 1).to_pylist()[0]
    assert first["title"] == "Toy Story (1995)"
    assert first["categories"] == ["Animation", "Children's", "Comedy"]
    assert data.manifest.counts["items_with_title"] == 1682


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the read-only data in ../shared")
def test_movielens_100k_published_splits(tmp_path: pathlib.Path) -> None:
    path = SHARED / "ml100k_splits" / "interactions.parquet"
    given_rows = run(path, tmp_path / "a", source="parquet", split_column="ratio_split")
    by_rule = run(path, tmp_path / "b", source="parquet", split="ratio", seed=42)
    assert [len(by_rule.part(part)) for part in schema.PARTS] == [80_000, 10_000, 10_000]
    assert given_rows.manifest.split_hash == by_rule.manifest.split_hash
    last = run(path, tmp_path / "c", source="parquet", split_column="leave_last_split")
    assert [len(last.part(part)) for part in schema.PARTS] == [98_114, 943, 943]


def test_validation_is_half_of_each_users_test_rows(tmp_path: pathlib.Path) -> None:
    users = ("10", "9", "u")
    train = write_csv(tmp_path / "a.csv", [(u, "x") for u in users], "user,item")
    rows = [(u, f"i{k}") for u in users for k in range(4)]
    test = write_csv(tmp_path / "b.csv", rows, "user,item")
    data = run(train, tmp_path / "out", test_input=str(test), valid_from="test", seed=5)
    assert len(data.train) == 3  # the whole training part
    valid, tested = ([row[:2] for row in external(data, part)] for part in ("valid", "test"))
    assert sorted(valid + tested) == sorted(rows)
    assert [sum(row[0] == u for row in valid) for u in users] == [2, 2, 2]
    assert data.manifest.split["seed"] == 5
    one = write_csv(tmp_path / "c.csv", [("9", "i0")], "user,item")
    with pytest.raises(InputError, match="1 test rows of 1 users leave a part empty"):
        run(train, tmp_path / "no", test_input=str(one), valid_from="test")
    with pytest.raises(ConfigError, match="has a validation part; drop it"):
        run(
            train,
            tmp_path / "no",
            test_input=str(test),
            valid_input=str(one),
            valid_from="train",
        )
    with pytest.raises(ConfigError, match="--valid_from=test is of a pre-made split"):
        run(train, tmp_path / "no", valid_from="test", split="ratio")
