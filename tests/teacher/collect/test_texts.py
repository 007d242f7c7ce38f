"""Texts of users and items, from stub answers to a product; what cannot be used stays open."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from teacher.written_world import (
    answered,
    ask,
    gather,
    held,
    ids,
    make_world,
    put,
    result,
    text_of,
)

from slgr_jax.config import CollectConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.ask import requests
from slgr_jax.teacher.collect import answer_log, collecting, text_collecting
from slgr_jax.teacher.collect.open_requests import open_requests
from slgr_jax.teacher.products import texts


@pytest.fixture
def world(make_dataset):
    return make_world(make_dataset)


def test_a_text_of_each_user_becomes_a_row(world, tmp_path):
    root = ask(world)
    product, told = gather(world, put(tmp_path / "a.jsonl", answered(root)))
    assert held(product) == {(u, "text"): text_of(u) for u in range(5)}
    assert "read 5 results: 5 accepted, 0 repeated, 0 quarantined" in told
    manifest = product.manifest
    assert (manifest.prompt, manifest.side, manifest.fields) == ("user_profile", "user", ("text",))
    assert (manifest.model, manifest.built_from) == ("fake", "train_only")
    assert manifest.prompt_hash == schema.read_request_manifest(root).template_hash
    assert manifest.shown == "the last 10 training items that have a title or text"
    wanted = {"rows": 6, "rows_with_text": 5, "texts": 5, "distinct_texts": 5}
    wanted |= {"complete_requests": 5, "prompt_tokens": 500, "completion_tokens": 50}
    counts = {name: count for name, count in manifest.counts.items() if count}
    assert counts == wanted

    # The files alone, as anybody reads them.
    (file,) = (world.path / "texts/t").glob("part-*.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    assert table.to_pylist() == [
        {"row": u, "id": f"u{u}", "field": "text", "text": text_of(u)} for u in range(5)
    ]
    loaded = texts.load(world, "t", "user")
    assert loaded.table.equals(product.table)
    assert loaded.manifest == manifest
    assert not list((world.path / "texts").glob(".*"))


@pytest.mark.parametrize("rows_per_shard", [1, 4, 1000])
def test_a_text_a_factor_of_each_item(world, tmp_path, rows_per_shard):
    root = ask(world, prompt="kar_item", factors="mood,genre")
    lines = answered(root)
    lines[2] = result(ids(root)[2], json.dumps({"mood": "", "genre": "b c"}))
    product, _ = gather(world, put(tmp_path / "a.jsonl", lines), rows_per_shard=rows_per_shard)
    expected = {
        (i, f): text_of(i, place) for i in range(8) for place, f in enumerate(["mood", "genre"])
    }
    del expected[2, "mood"]
    expected[2, "genre"] = "b c"
    assert held(product) == expected
    order = [(line["row"], line["field"]) for line in product.table.to_pylist()]
    assert order == list(expected)
    counts = product.manifest.counts
    assert (counts["texts"], counts["empty_texts"], counts["rows_with_text"]) == (15, 1, 8)
    by_field = product.by_field(8)
    assert list(by_field) == ["mood", "genre"]
    assert by_field["mood"][2] == ""
    assert by_field["genre"][7] == text_of(7, 1)


FAILURES = {
    "empty": (json.dumps({"text": ""}), "stop", "refused", "empty answer"),
    "refused": ("I'm sorry, but I cannot help with that.", "stop", "refused", "refusal"),
    "cut off": ('{"text": "Likes sl', "length", "refused", "cut off"),
    "of another form": (json.dumps({"a": "b", "c": "d"}), "stop", "refused", "no texts"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_is_no_text_is_told_and_stays_open_until_one_comes(world, tmp_path, case):
    content, finish, state, kind = FAILURES[case]
    root = ask(world)
    lines = answered(root)
    bad = [lines[0], result(ids(root)[1], content, finish), *lines[2:]]
    product, told = gather(world, put(tmp_path / "a.jsonl", bad))
    assert sorted(held(product)) == [(u, "text") for u in (0, 2, 3, 4)]
    assert f"4 accepted, 0 repeated, 1 quarantined ({kind} 1)" in told
    assert f"4 of 5 requests are complete; open: 1 {state}" in told
    assert product.manifest.counts[f"{state}_requests"] == 1
    (still_open,) = open_requests(world, "t")
    assert (still_open.custom_id, still_open.state) == (ids(root)[1], state)
    assert still_open.reason.startswith(kind)

    # The next round asks about what is open, and nothing else.
    manifest = schema.read_request_manifest(root)
    (file,) = requests.write_open(root, manifest, {still_open.custom_id: 2})
    (again,) = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert again["custom_id"] == ids(root)[1]
    product, told = gather(world, put(tmp_path / "b.jsonl", [lines[1]]))
    assert held(product) == {(u, "text"): text_of(u) for u in range(5)}
    assert "1 accepted" in told
    assert open_requests(world, "t") == []


def test_repeated_contradicted_unknown_and_foreign_answers(world, make_dataset, tmp_path):
    root = ask(world)
    lines, first = answered(root), ids(root)[0]
    other = make_world(make_dataset, "other", test={1: [6]})
    foreign = answered(ask(other))
    told_twice = [lines[0], lines[0], result(first, json.dumps({"text": "Something else."}))]
    unknown = [result("nobody", json.dumps({"text": "x"})), *foreign]
    product, told = gather(world, put(tmp_path / "a.jsonl", told_twice + unknown))
    assert held(product) == {(0, "text"): text_of(0)}
    assert "read 9 results: 1 accepted, 1 repeated, 7 quarantined" in told
    assert "foreign custom_id 6" in told
    assert "another answer 1" in told
    assert "1 of 5 requests are complete; open: 4 missing" in told
    assert [request.custom_id for request in open_requests(world, "t")] == ids(root)[1:]
    with pytest.raises(
        InputError, match=r"none of the 5 results .* can be used: foreign custom_id"
    ):
        gather(world, put(tmp_path / "f.jsonl", foreign))
    with pytest.raises(ManifestError, match="was made for split"):
        gather(other, tmp_path / "a.jsonl", name="u", requests=root)


def test_failed_requests_and_samples(world, tmp_path):
    root = ask(world)
    custom = ids(root)
    failed = {"custom_id": custom[0], "response": None, "error": {"message": "quota"}}
    two = json.loads(result(custom[1], json.dumps({"text": "First."})))
    choice = {"message": {"content": "Second one."}, "finish_reason": "stop"}
    two["response"]["body"]["choices"].append(choice)
    product, told = gather(world, put(tmp_path / "a.jsonl", [json.dumps(failed), json.dumps(two)]))
    assert held(product) == {(1, "text"): "First."}
    assert "open: 1 failed, 3 missing" in told


def test_requests_of_another_template_fill_what_is_missing(world, tmp_path):
    root = ask(world)
    gather(world, put(tmp_path / "a.jsonl", answered(root)[:3]))
    template = tmp_path / "t.txt"
    template.write_text("$history\nWho is this? $answer", encoding="utf-8")
    more = ask(world, name="more", template=str(template))
    lines = [result(custom_id, f"Person {k}.") for k, custom_id in enumerate(ids(more))]
    product, _ = gather(world, put(tmp_path / "b.jsonl", lines), requests=more)
    assert list(held(product).values()) == [*map(text_of, range(3)), "Person 3.", "Person 4."]
    hashes = [schema.read_request_manifest(one).template_hash for one in (root, more)]
    assert product.manifest.prompt_hash == "+".join(hashes)


def test_texts_of_one_kind_make_a_product(world, tmp_path):
    gather(world, put(tmp_path / "a.jsonl", answered(ask(world))))
    items = ask(world, name="items", prompt="kar_item", factors="a,b")
    answers = put(tmp_path / "b.jsonl", answered(items))
    with pytest.raises(ConfigError, match="user_profile prompts, which do not mix with kar_item"):
        gather(world, answers, requests=items)
    fewer = ask(world, name="fewer", prompt="kar_item", factors="a")
    gather(world, answers, name="items")
    with pytest.raises(ConfigError, match="do not mix"):
        gather(world, put(tmp_path / "c.jsonl", answered(fewer)), name="items", requests=fewer)


def test_a_log_of_texts_is_read_again_without_results_being_lost(world, tmp_path):
    """A kill after the log was written and before the product loses nothing."""
    root = ask(world)
    lines = answered(root)
    gather(world, put(tmp_path / "a.jsonl", lines[:4]))
    for path in (world.path / "texts/t").iterdir():
        path.unlink()
    (world.path / "texts/t").rmdir()
    product, told = gather(world, put(tmp_path / "b.jsonl", lines[3:]))
    assert len(held(product)) == 5
    assert "1 accepted, 1 repeated" in told
    rows, manifest = answer_log.load_log(world, "t")
    assert rows.schema == schema.WRITTEN
    assert manifest.sources[0]["fields"] == ["text"]


def test_a_folder_that_is_no_product_is_left_alone(world, tmp_path):
    answers = put(tmp_path / "a.jsonl", answered(ask(world)))
    (world.path / "texts/t").mkdir(parents=True)
    (world.path / "texts/t/mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists"):
        gather(world, answers)
    assert not (world.path / "answers/t").exists()


def test_nothing_is_collected_without_results(world):
    ask(world)
    for collect in (text_collecting.collect, collecting.collect):
        with pytest.raises(ConfigError, match="missing --results"):
            collect(world, TeachConfig(name="t"), CollectConfig())
