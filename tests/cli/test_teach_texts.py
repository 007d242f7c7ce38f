"""Texts of users and items as a user asks for them: requests, ask, collect, embed, inspect."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from cli.test_teach import refused, teach
from teacher.written_world import ids, make_world, put, result

from slgr_jax.data import schema
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.products import texts

needs_wordllama = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the extra 'llm' is not installed"
)


@pytest.fixture
def world(make_dataset):
    return make_world(make_dataset)


def done(*args):
    outcome = teach(*args)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_the_chain_from_requests_to_a_second_round(world, tmp_path):
    common = (f"--data={world.path}", "--name=profiles")
    plan = done("requests", *common, "--prompt=user_profile", "--price_in=1000", "--dry_run")
    assert "plan: 5 requests about as many of 6 users" in plan
    assert not (world.path / schema.REQUESTS_DIR).exists()
    refused(teach("requests", *common, "--prompt=user_profile"), "missing --model")
    asked = ("requests", *common, "--prompt=user_profile", "--model=some-llm")
    told = done(*asked, "--price_in=1000")
    assert told.startswith(plan)
    assert "5 user_profile requests to some-llm in 1 files" in told

    root = world.path / "requests/profiles"
    lines = [result(one, json.dumps({"text": f"Taste {k}."})) for k, one in enumerate(ids(root))]
    lines[1] = result(ids(root)[1], "I'm sorry, but I cannot help with that.")
    told = done("collect", *common, f"--results={put(tmp_path / 'a.jsonl', lines)}")
    assert "4 accepted, 0 repeated, 1 quarantined (refusal 1)" in told
    assert "texts profiles: 4 of 4 of 6 users by some-llm" in told
    assert f"next: slgr teach embed --data={world.path} --name=NAME --user_texts=profiles" in told
    assert not (world.path / "teacher").exists()
    shown = done("inspect", *common)
    assert shown in told
    assert "words of a text: 5 % 2, half 2, 95 % 2, longest 2; 4 texts differ" in shown
    assert "e.g. text of user u0: Taste 0." in shown

    assert "1 requests are still open" in done("requests", *common, "--open")
    (again,) = (root / "requests-open-00000.jsonl").read_text("utf-8").splitlines()
    assert json.loads(again)["custom_id"] == ids(root)[1]
    more = put(tmp_path / "b.jsonl", [result(ids(root)[1], "Taste 1.")])
    assert "texts profiles: 5 of 5 of 6 users" in done("collect", *common, f"--results={more}")
    assert "no request is open" in done("requests", *common, "--open")
    table = texts.load(world, "profiles").table
    assert table.column("text").to_pylist() == [f"Taste {k}." for k in range(5)]


@needs_wordllama
def test_texts_of_users_and_items_are_embedded_in_one_go(world, tmp_path):
    for name, prompt in (("facts", "kar_item"), ("tastes", "kar_user")):
        common = (f"--data={world.path}", f"--name={name}")
        done("requests", *common, "--model=m", f"--prompt={prompt}", "--factors=genre,mood")
        one = [
            result(custom_id, json.dumps({"genre": f"crime {k}", "mood": "dark"}))
            for k, custom_id in enumerate(ids(world.path / "requests" / name))
        ]
        put(tmp_path / f"{name}.jsonl", one)
    data = f"--data={world.path}"
    done("collect", data, "--name=facts", f"--results={tmp_path / 'facts.jsonl'}")
    embed = ("--embed=kar", "--item_texts=facts")
    collect = ("collect", data, "--name=tastes", f"--results={tmp_path / 'tastes.jsonl'}")
    told = done(*collect, *embed)
    assert "vectors of 8 of 8 items and 5 of 6 users (from: text)" in told
    assert "chunks of a row of users, at most: genre 1, mood 1" in told
    product = embeddings.load(world, "kar")
    assert product.users.has.tolist() == [True] * 5 + [False]
    # User k and item k say the same.
    np.testing.assert_array_equal(product.users.values[3], product.items.values[3])
    assert (product.users.values[3] != product.items.values[4]).any()

    refused(teach(*collect, *embed), "embeddings/kar exists", "--overwrite")
    done(*collect, *embed, "--overwrite", "--chunks=0")
    refused(
        teach(*collect, "--embed=x", "--user_texts=facts"), "--user_texts=facts", "--name=tastes"
    )
    refused(teach(*collect, "--chunks=2"), "of --embed=NAME: add it, or drop them")
    told = done("embed", data, "--name=whole", "--item_texts=facts", "--user_texts=tastes")
    assert "vectors of 8 of 8 items and 5 of 6 users (from: text)" in told
    refused(
        teach("embed", data, "--name=w", "--item_texts=tastes"),
        "the texts 'tastes' are about users",
        "--user_texts=tastes",
    )


BAD = {
    "factors without texts": (
        ["requests", "--model=m", "--factors=a,b"],
        ["--factors=a,b is of a prompt that asks for texts", "user_profile", "--prompt=listwise"],
    ),
    "texts of candidates": (
        ["candidates", "--prompt=kar_user"],
        ["--prompt=kar_user asks for a text of each user", "slgr teach requests"],
    ),
    "an unknown form": (
        ["requests", "--prompt=user_profil"],
        ["'user_profil' is not one of: listwise", "user_profile, item_description, kar_user"],
    ),
    "vectors of scores": (
        ["collect", "--results=x.jsonl", "--requests={listwise}", "--embed=v"],
        ["--embed=v is of texts", "--prompt=listwise"],
    ),
    "no titles": (
        ["requests", "--prompt=user_profile", "--model=m", "--data={bare}"],
        ["has no item texts to show", "--items_input"],
    ),
    "nothing of the name": (["inspect"], ["has no teacher 't'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_commands_give_one_line(world, make_dataset, tmp_path, case):
    (name, *args), words = BAD[case]
    paths = {"listwise": tmp_path / "listwise", "bare": ""}
    if case == "no titles":
        paths["bare"] = make_dataset("bare").path
    if case == "vectors of scores":
        of_data = (f"--data={world.path}", "--name=t")
        done("candidates", *of_data, "--candidates=2", "--cold_candidates=0", "--tail_users=0")
        done("requests", *of_data, "--model=m", f"--out={paths['listwise']}")
    refused(
        teach(name, f"--data={world.path}", "--name=t", *(arg.format(**paths) for arg in args)),
        *words,
    )
