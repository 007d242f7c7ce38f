"""Products that grow, that are shared by several readers, and that are larger than one piece."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pytest

from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.products import preferences, rows
from slgr_jax.teacher.products.preferences import Provenance

N_USERS, N_ITEMS = 40, 12
COLUMNS = {kind: columns.names for kind, columns in schema.TEACHER_SCHEMAS.items()}


@pytest.fixture
def world(make_dataset):
    users, items = (tuple(f"{k}" for k in range(n)) for n in (N_USERS, N_ITEMS))
    train = {u: [(u + k) % N_ITEMS for k in range(1 + u % 3)] for u in range(N_USERS)}
    return make_dataset("world", users=users, items=items, train=train, valid={3: [1]}, test={})


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(rows, "PIECE", 7)


def table_of(kind, found):
    """Rows (a list of tuples) as a table of the kind."""
    columns = zip(*found, strict=True) if found else ((),) * len(COLUMNS[kind])
    return pa.table([list(c) for c in columns], schema=schema.TEACHER_SCHEMAS[kind])


def random_rows(kind, seed, share=0.4):
    """Distinct pairs in random order; some scores equal, some null."""
    rng = np.random.default_rng(seed)
    if kind == "scores":
        keys = itertools.product(range(N_USERS), range(N_ITEMS))
        values = lambda: None if rng.random() < 0.1 else float(rng.integers(-2, 3)) / 4  # noqa: E731
    else:
        pairs = itertools.combinations(range(N_ITEMS), 2)
        both = itertools.product(range(N_USERS), pairs)
        keys = ((user, *rng.permutation(pair).tolist()) for user, pair in both)
        values = lambda: float(rng.integers(1, 4)) / 2  # noqa: E731
    found = [(*key, values()) for key in keys if rng.random() < share]
    return [found[k] for k in rng.permutation(len(found))]


def as_lists(teacher):
    """Every row of a teacher, in its order."""
    if teacher.manifest.kind == "scores":
        users = np.repeat(np.arange(N_USERS), np.diff(teacher.offsets)).tolist()
        return list(zip(users, teacher.items.tolist(), teacher.scores.tolist(), strict=True))
    columns = (teacher.users, teacher.preferred, teacher.other, teacher.margin)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def expected(kind, found):
    if kind == "scores":
        return sorted((r for r in found if r[2] is not None), key=lambda r: (r[0], r[2], r[1]))
    return sorted(found)


def write(world, kind, found, name="t", **options):
    return preferences.write_product(
        world, name, table_of(kind, found), provenance=Provenance(), **options
    )


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("per_shard", [5, 1000])
def test_rows_in_any_order_come_back_sorted(world, kind, per_shard):
    found = random_rows(kind, 0)
    manifest = write(world, kind, found, rows_per_shard=per_shard)
    teacher = preferences.load(world, "t")
    if kind == "preferences":  # of a user in the order they came
        stated = sorted(found, key=lambda row: row[0])
        assert as_lists(teacher) == stated
    else:
        assert as_lists(teacher) == expected(kind, found)
    counts = np.bincount([row[0] for row in as_lists(teacher)], minlength=N_USERS)
    assert np.diff(teacher.offsets).tolist() == counts.tolist()
    assert manifest.order == "user"
    assert sum(file.rows for file in manifest.files) == len(found) == manifest.counts["rows"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_appended_rows_are_as_if_written_at_once(world, kind):
    found = random_rows(kind, 1)
    first, second, third = found[:60], found[60:61], found[61:]
    write(world, kind, first, rows_per_shard=11)
    root = preferences.product_path(world.path, "t")
    before = {path.name: path.stat() for path in root.glob("*.arrow")}
    for more in (second, third):
        preferences.append(world, "t", table_of(kind, more), rows_per_shard=20, counts={"asked": 7})
    manifest = write(world, kind, found, name="whole")
    appended = preferences.load(world, "t")
    assert sorted(as_lists(appended)) == sorted(as_lists(preferences.load(world, "whole")))
    if kind == "scores":
        assert as_lists(appended) == expected(kind, found)
    assert appended.manifest.counts == {**manifest.counts, "asked": 14}
    assert appended.manifest.coverage == manifest.coverage
    for name, stat in before.items():  # no shard was touched
        assert (root / name).stat() == stat
    names = {file.path for file in appended.manifest.files}
    assert {path.name for path in root.iterdir()} == {*names, schema.MANIFEST}
    assert {name[:13] for name in names if name not in before} == {"append-00001-", "append-00002-"}


REPEATED = {
    "scores": ([(3, 1, 0.5), (4, 2, None)], [(3, 2, 0.5), (4, 2, 1.0)], "user 4, item 2 already"),
    "same way": ([(3, 1, 2, 1.0)], [(3, 4, 5, 1.0), (3, 1, 2, 2.0)], "user 3, items 1 and 2 alr"),
    "other way": ([(3, 1, 2, 1.0)], [(3, 2, 1, 1.0)], "user 3, items 1 and 2 already"),
}


@pytest.mark.parametrize("case", REPEATED)
def test_a_pair_that_is_there_is_refused(world, case):
    there, more, message = REPEATED[case]
    kind = "scores" if case == "scores" else "preferences"
    write(world, kind, there)
    root = preferences.product_path(world.path, "t")
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(InputError, match=message):
        preferences.append(world, "t", table_of(kind, more))
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    other_user = [(row[0] + 30, *row[1:]) for row in more]
    preferences.append(world, "t", table_of(kind, other_user))


def test_what_cannot_be_appended(world):
    write(world, "scores", [(0, 1, 1.0)])
    with pytest.raises(InputError, match=r"'t' holds scores, not preferences"):
        preferences.append(world, "t", table_of("preferences", [(0, 1, 2, 1.0)]))
    with pytest.raises(ManifestError, match=r"no teacher 'gone'"):
        preferences.append(world, "gone", table_of("scores", [(0, 1, 1.0)]))
    with pytest.raises(ShardError, match=r"added to .*: item index 12 is outside"):
        preferences.append(world, "t", table_of("scores", [(0, N_ITEMS, 1.0)]))
    with pytest.raises(ShardError, match=r"user 1, item 1 has two scores"):
        preferences.append(world, "t", table_of("scores", [(1, 1, 1.0), (1, 1, 2.0)]))
    with pytest.raises(InputError, match=r"columns a is no teacher"):
        preferences.append(world, "t", pa.table({"a": [1]}))


def test_a_crash_leaves_the_old_product_whole(world, monkeypatch):
    write(world, "scores", [(0, 1, 1.0)])
    root = preferences.product_path(world.path, "t")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            preferences.append(world, "t", table_of("scores", [(1, 1, 5.0), (2, 1, 5.0)]))
    (stray,) = root.glob("append-*")
    assert as_lists(preferences.load(world, "t")) == [(0, 1, 1.0)]
    stray.rename(root / "append-00001-part-00007-of-00009.arrow")
    preferences.append(world, "t", table_of("scores", [(3, 1, 2.0)]))
    assert as_lists(preferences.load(world, "t")) == [(0, 1, 1.0), (3, 1, 2.0)]
    assert len(list(root.glob("append-*"))) == 1


def hold(path, held, done):
    with shards.locked(path):
        held.set()
        done.wait(20)


def test_two_processes_do_not_append_at_once(world):
    write(world, "scores", [(0, 1, 1.0)])
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    path = str(preferences.product_path(world.path, "t"))
    other = context.Process(target=hold, args=(path, held, done))
    other.start()
    assert held.wait(20)
    with pytest.raises(InputError, match=r"being written by another process"):
        preferences.append(world, "t", table_of("scores", [(3, 1, 2.0)]))
    done.set()
    other.join()
    preferences.append(world, "t", table_of("scores", [(3, 1, 2.0)]))


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_readers_share_the_rows_by_user(world, kind, ordered, count):
    found = random_rows(kind, 2)
    write(world, kind, found[:80], rows_per_shard=11)
    preferences.append(world, "t", table_of(kind, found[80:]), rows_per_shard=9)
    root = preferences.product_path(world.path, "t")
    if not ordered:  # a product whose maker promises nothing, with its shards in another order
        raw = json.loads((root / schema.MANIFEST).read_text()) | {"order": ""}
        raw["files"] = raw["files"][::-1]
        del raw["checksum"]
        (root / schema.MANIFEST).write_text(json.dumps(raw))
    whole = as_lists(preferences.load(world, "t"))
    ends = [k * N_USERS // count for k in range(count + 1)]
    ranges = list(itertools.pairwise(ends))
    parts = [as_lists(preferences.load(world, "t", users=users)) for users in ranges]
    assert [row for part in parts for row in part] == whole
    for users, part in zip(ranges, parts, strict=True):
        assert {row[0] for row in part} <= set(range(*users))


def test_a_reader_reads_no_other_shards(world):
    found = [(u, 1, float(u)) for u in range(N_USERS)]
    manifest = write(world, "scores", found, rows_per_shard=10)
    root = preferences.product_path(world.path, "t")
    damaged = root / manifest.files[3].path
    whole = damaged.read_bytes()
    score = np.float32(35).tobytes()
    assert whole.count(score) == 1
    damaged.write_bytes(whole.replace(score, np.float32(36).tobytes()))
    assert as_lists(preferences.load(world, "t", users=(0, 20))) == found[:20]
    with pytest.raises(ShardError, match=damaged.name):
        preferences.load(world, "t", users=(20, 40))
    damaged.unlink()
    assert as_lists(preferences.load(world, "t", users=(0, 30))) == found[:30]
    with pytest.raises(ShardError, match=f"{damaged.name} is missing"):
        preferences.load(world, "t", users=(29, 31))
    assert as_lists(preferences.load(world, "t", users=(7, 7))) == []


def test_files_whose_users_are_not_known_are_opened(world):
    """Products that were written before their manifests said so."""
    found = [(u, 1, float(u)) for u in range(N_USERS)]
    manifest = write(world, "scores", found, rows_per_shard=10)
    root = preferences.product_path(world.path, "t")
    schema.write_manifest(root, dataclasses.replace(manifest, user_ranges={}))
    assert as_lists(preferences.load(world, "t", users=(5, 25))) == found[5:25]
    (root / manifest.files[3].path).unlink()
    with pytest.raises(ShardError, match="is missing"):
        preferences.load(world, "t", users=(5, 25))


def test_counts_are_those_of_plain_python(world):
    for kind in COLUMNS:
        found = random_rows(kind, 3)
        counts = write(world, kind, found, name=kind).counts
        answered = [row for row in found if row[-1] is not None]
        if kind == "scores":
            named = {row[:2] for row in answered}
            preferred = sum(
                one[2] > two[2] for one in answered for two in answered if one[0] == two[0]
            )
        else:
            named = {(row[0], item) for row in found for item in row[1:3]}
            preferred = len(found)
        train = set(zip(world.train.users.tolist(), world.train.items.tolist(), strict=True))
        assert counts["preferences"] == preferred
        assert counts["train_pairs"] == len(named & train)
        assert counts["valid_pairs"] == len(named & {(3, 1)})
        assert counts["users"] == len({user for user, _ in named})
        assert counts["items"] == len({item for _, item in named})
        assert counts["answered"] == len(answered)


def test_scores_that_no_single_key_can_hold(world, monkeypatch):
    found = random_rows("scores", 4)
    write(world, "scores", found, name="packed")
    monkeypatch.setattr(rows, "_packed", lambda *_: None)
    write(world, "scores", found, name="sorted")
    one, two = (as_lists(preferences.load(world, name)) for name in ("packed", "sorted"))
    assert one == two == expected("scores", found)


@pytest.mark.parametrize("packed", [True, False])
def test_a_preference_stated_twice_is_refused(world, monkeypatch, packed):
    if not packed:
        monkeypatch.setattr(rows, "_packed", lambda *_: None)
    write(world, "preferences", [(2, 5, 1, 1.0), (2, 0, 1, 1.0), (3, 0, 1, 1.0)], name="once")
    with pytest.raises(ShardError, match=r"user 2 prefers item 5 over 1 twice"):
        write(world, "preferences", [(2, 5, 1, 1.0), (2, 0, 1, 1.0), (2, 5, 1, 2.0)])


def test_training_items_are_recorded_and_old_manifests_load(world):
    seen = Provenance(training_items="hidden")
    table = table_of("scores", [(0, 1, 1.0)])
    manifest = preferences.write_product(world, "t", table, provenance=seen)
    assert manifest.training_items == "hidden"
    path = preferences.product_path(world.path, "t") / schema.MANIFEST
    raw = json.loads(path.read_text())
    for missing in ("training_items", "order", "checksum"):
        del raw[missing]
    path.write_text(json.dumps(raw))
    assert preferences.load(world, "t").manifest.training_items == "shown"
    path.write_text(json.dumps(raw | {"training_items": "perhaps"}))
    with pytest.raises(
        ManifestError, match=r"training_items 'perhaps' is not one of: none, hidden"
    ):
        preferences.load(world, "t")
    with pytest.raises(ConfigError, match=r"--training_items='some' is not one of"):
        Provenance(training_items="some")


def test_a_file_can_be_added_to_a_product(world, tmp_path):
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for path, rows_ in zip(paths, ("0,1,1\n0,x,2\n", "0,2,3\ny,1,1\n0,z,1\n"), strict=True):
        path.write_text("user,item,score\n" + rows_)
    preferences.import_scores(world, paths[0], "t", unknown="drop")
    options = {"unknown": "drop", "to_existing": True}
    manifest = preferences.import_scores(world, paths[1], "t", **options)
    assert as_lists(preferences.load(world, "t")) == [(0, 1, 1.0), (0, 2, 3.0)]
    assert manifest.counts["file_rows"] == 5
    assert manifest.counts["dropped_unknown_item_rows"] == 2
    with pytest.raises(InputError, match=r"user 0, item 2 already"):
        preferences.import_scores(world, paths[1], "t", **options)
    with pytest.raises(ConfigError, match=r"--append adds .* --overwrite replaces"):
        preferences.import_scores(world, paths[1], "t", overwrite=True, **options)
    with pytest.raises(ManifestError, match=r"no teacher 'new'"):
        preferences.import_scores(world, paths[1], "new", **options)
