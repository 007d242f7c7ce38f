"""Texts as a product: what is refused, and what is said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from teacher.written_world import answered, ask, gather, make_world, put

from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.products import texts


@pytest.fixture
def world(make_dataset):
    return make_world(make_dataset)


ABOUT = {
    "model": "m",
    "prompt": "kar_user",
    "prompt_hash": "0123456789abcdef",
    "side": "user",
    "fields": ("genre", "mood"),
    "shown": "the last 3 training items that have a title or text",
}


def write(data, rows, fields, written, name="t", **changes):
    return texts.write(
        data,
        name,
        np.array(rows),
        np.array(fields),
        written,
        about=ABOUT | changes,
        counts={"empty_texts": 2},
    )


def test_rows_are_in_order_of_user_and_field(world):
    write(world, [4, 1, 4], [1, 1, 0], ["c", "a", "b"])
    rows = texts.load(world, "t").table.to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, "u1", "mood", "a"),
        (4, "u4", "genre", "b"),
        (4, "u4", "mood", "c"),
    ]


def test_the_report_counts_words_and_shows_one(world):
    words = [1, 2, 3, 10, 200]
    made = write(world, range(5), [0, 0, 0, 1, 1], [" ".join(["w"] * n) for n in words])
    assert texts.report(made).splitlines() == [
        "texts t: 5 of 5 of 6 users by m (kar_user, prompt 01234567), for tiny split "
        f"{world.manifest.split_hash[:8]}",
        f"  built_from=train_only; prompts showed {ABOUT['shown']}",
        "  words of a text: 5 % 1, half 3, 95 % 200, longest 200; 5 texts differ",
        "  of each factor: genre 3, mood 2",
        "  empty texts 2",
        "  e.g. genre of user u0: w",
    ]
    long = write(world, [2], [0], ["ab " * 400], name="l")
    assert texts.report(long).endswith(f"of user u2: {('ab ' * 400)[:300]}...")


def test_what_does_not_fit_is_refused_by_name(world, make_dataset, tmp_path):
    made = write(world, [0, 1], [0, 1], ["a", "b"])
    root = texts.product_path(world.path, "t")
    with pytest.raises(ManifestError, match=r"has no texts 'no'; it has: t"):
        texts.load(world, "no")
    with pytest.raises(ConfigError, match=r"about users: give them with --user_texts=t"):
        texts.load(world, "t", "item")
    other = make_world(make_dataset, "other", test={1: [6]})
    (other.path / "texts").mkdir()
    root.rename(other.path / "texts/t")
    with pytest.raises(
        ManifestError, match=r"texts 't' was made for split .*\(slgr teach requests"
    ):
        texts.load(other, "t")
    (other.path / "texts/t").rename(root)

    (file,) = made.manifest.files["texts"]
    data = (root / file.path).read_bytes()
    for damaged, why in ((data[:-1], "truncated"), (data.replace(b"mood", b"mooo"), "SHA-256")):
        (root / file.path).write_bytes(damaged)
        with pytest.raises(ShardError, match=why):
            texts.load(world, "t")
    (root / file.path).write_bytes(data)
    texts.load(world, "t")
    seen = dataclasses.replace(made.manifest, built_from="includes_eval")
    schema.write_manifest(root, seen)
    with pytest.raises(ManifestError, match=r"built_from=includes_eval: .* leak"):
        texts.load(world, "t")


def test_rows_and_fields_that_are_not_are_refused(world):
    made = write(world, [0, 5], [0, 1], ["a", "b"])
    root = texts.product_path(world.path, "t")
    schema.write_manifest(root, dataclasses.replace(made.manifest, fields=("genre",)))
    with pytest.raises(ShardError, match=r"has texts of mood, its manifest fields genre"):
        texts.load(world, "t")
    made = write(world, [0, 7], [0, 1], ["a", "b"], name="i", side="item")
    root = texts.product_path(world.path, "i")
    schema.write_manifest(root, dataclasses.replace(made.manifest, side="user"))
    with pytest.raises(ShardError, match=r"names row 7 of 6 users"):
        texts.load(world, "i")


def test_all_or_nothing(world):
    write(world, [0], [0], ["a"])
    with pytest.raises(InputError, match="exists"):
        write(world, [1], [0], ["b"])
    with pytest.raises(UnicodeEncodeError):
        write(world, [1], [0], ["\ud800"], name="u")
    assert sorted(path.name for path in (world.path / "texts").iterdir()) == ["t"]


def test_a_directory_of_texts_is_inspected(world, tmp_path):
    from slgr_jax.reports import inspection

    gather(world, put(tmp_path / "a.jsonl", answered(ask(world))))
    found = inspection.inspect_data(str(world.path))
    assert found.faults == []
    shown = str(found)
    assert "  texts t: 5 of 5 of 6 users by fake" in shown
    assert "answers t: 5 texts that hold, 0 results in quarantine" in shown
    assert "requests t: 5 user_profile to fake, complete" in shown
    (file,) = (world.path / "texts/t").glob("part-*")
    file.write_bytes(file.read_bytes()[:-8])
    (fault,) = inspection.inspect_data(str(world.path)).faults
    assert "truncated" in fault
