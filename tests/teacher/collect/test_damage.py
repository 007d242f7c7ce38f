"""Damage to an answer log: a named error, or nothing at all; never a traceback, never accepted."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from teacher.collect.asked_world import answered, ask, gather, put, scores_of

from slgr_jax.data import schema
from slgr_jax.data.schema import MANIFEST
from slgr_jax.errors import ManifestError, ShardError
from slgr_jax.teacher.collect import answer_log
from slgr_jax.teacher.collect.open_requests import open_requests
from slgr_jax.teacher.collect.quarantine import QUARANTINE

NAMED = (ManifestError, ShardError)
TRIALS = 60


@pytest.fixture
def log(world, tmp_path):
    """A log with answers and a quarantine, its folder, and the results it was made from."""
    lines = answered(ask(world, list_size=3))
    path = put(tmp_path / "a.jsonl", [*lines[:-2], '{"half', "{}", lines[0][:-9]])
    gather(world, path, rows_per_shard=20)
    return world, answer_log.log_path(world.path, "t"), path


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def drop(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 40) :]


def repeat(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + 40] + data[start:]


def other_value(data, rng):
    """Another value of any type in place of one of the JSON's, at any depth."""
    raw = json.loads(data.splitlines()[0] if b"\n{" in data else data)
    holder, key = raw, rng.choice(list(raw))
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    holder[key] = rng.choice([None, 7, -1, "x", [], {}, [1], {"a": 1}, True, 1e308, "\ud800", [[]]])
    rest = data.splitlines(keepends=True)[1:] if b"\n{" in data else []
    return json.dumps(raw).encode() + b"\n" + b"".join(rest)


def monster(data, rng):
    return rng.choice([b"[" * 50_000, b"9" * 5_000, b'{"a":' * 9_000, b"\xff\xfe", b"null", b"{}"])


DAMAGES = (flip, cut, drop, repeat, other_value, monster)


def same_json(old, new):
    """Whether two files hold the same JSON, however it is written (a space more)."""
    try:
        return json.loads(old) == json.loads(new)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST, QUARANTINE])
def test_damage_is_a_named_error(log, name, damage):
    world, root, path = log
    rng = random.Random(f"{name} {damage.__name__}")
    whole = (root / name).read_bytes()
    scores = scores_of(world)
    for _ in range(TRIALS):
        data = damage(whole, rng)
        if data == whole or (name == MANIFEST and same_json(whole, data)):
            continue
        if name == QUARANTINE and data.startswith(whole):
            continue  # a tail that the manifest does not list: the next test
        (root / name).write_bytes(data)
        with pytest.raises(NAMED, match=name):
            open_requests(world, "t")
        with pytest.raises(NAMED, match=name):
            gather(world, path)
        assert (root / name).read_bytes() == data  # nothing was overwritten
    (root / name).write_bytes(whole)
    _, told = gather(world, path)
    assert "0 accepted" in told
    assert scores_of(world) == scores


def test_the_error_says_what_to_do_and_it_works(log):
    world, root, path = log
    scores = scores_of(world)
    (root / QUARANTINE).unlink()
    with pytest.raises(ShardError, match=rf"missing.* remove {root} and run slgr teach collect"):
        open_requests(world, "t")
    shutil.rmtree(root)
    gather(world, path, overwrite=True)
    assert scores_of(world) == scores


def test_what_a_killed_run_added_to_the_quarantine_comes_again_with_the_next(log):
    world, root, path = log
    before = (root / QUARANTINE).read_bytes()
    first = before.splitlines(keepends=True)[0]
    for tail in (b'{"cut', first, b"\xff\n", b"[]\n"):
        (root / QUARANTINE).write_bytes(before + tail)
        assert open_requests(world, "t")  # reads no further than the manifest says
        gather(world, path)
        assert (root / QUARANTINE).read_bytes() == before


def test_shards_that_disagree_are_named(log):
    world, root, _ = log
    manifest = answer_log.read_manifest(world, "t")
    files = dict(manifest.files)
    files["answered"] = files["answered"][:-1]
    schema.write_manifest(root, type(manifest)(**{**vars(manifest), "files": files}))
    with pytest.raises(ShardError, match="answers and answered shards disagree"):
        answer_log.load_log(world, "t")
