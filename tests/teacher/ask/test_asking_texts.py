"""Requests for texts of users and items: what they show, ask and never show; what they cost."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slgr_jax.config import TEXT_PROMPTS, RequestConfig, TextConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.ask import asking_texts, prompts, requests, text_prompts

U, I = 9, 30  # noqa: E741 - the letters of the code
# No title is part of another, or of a template.
TITLES = [f"Kx{i:02d}q" if i != 3 else None for i in range(I)]
TEXTS = [" ".join(f"w{i}x{k}" for k in range(300)) if i % 2 else None for i in range(I)]


@pytest.fixture
def world(make_dataset):
    """9 users, of whom user 0 has no training item and user 1 only the one without a title; items
    from 25 on are of validation and test alone."""
    rng = np.random.default_rng(1)
    train = {u: sorted(rng.permutation(25)[: 2 + 2 * u].tolist()) for u in range(2, U)}
    left = {u: np.setdiff1d(np.arange(I), train.get(u, [])) for u in range(U)}
    return make_dataset(
        users=[f"u{u}" for u in range(U)],
        items=[f"i{i}" for i in range(I)],
        titles=TITLES,
        texts=TEXTS,
        categories=[["Drama", "Crime"] if i % 2 else None for i in range(I)],
        train={**train, 1: [3]},
        valid={u: [int(left[u][0])] for u in range(U)},
        test={u: [int(left[u][1]), 25 + u % 5] for u in range(U)},
    )


def make(data, prompt="user_profile", seed=0, factors="", words=100, item_words=200, **options):
    texts = TextConfig(factors=factors, words=words, item_words=item_words)
    asker = asking_texts.asker(data, RequestConfig(prompt=prompt, **options), texts, seed)
    return asker, asking_texts.plan(asker)


def write(data, root, model="m", overwrite=False, **options):
    asker, planned = make(data, **options)
    return asking_texts.write(asker, planned, root, model=model, overwrite=overwrite)


def asked(root):
    """(prompt, line, index row) of every request, in order."""
    manifest = schema.read_request_manifest(root)
    lines = list(requests.read_lines(root, manifest))
    index = requests.load_index(root, manifest).to_pylist()
    told = [line["body"]["messages"][0]["content"] for line in lines]
    return list(zip(told, lines, index, strict=True))


@pytest.mark.parametrize("prompt", ["user_profile", "kar_user", "user_attributes"])
def test_a_prompt_about_a_user_shows_its_last_training_items_and_none_held_out(
    world, tmp_path, prompt
):
    """The leak test: no title of a user's own validation and test items, or of any item that is
    only held out, is in its prompt."""
    write(world, tmp_path / "r", prompt=prompt, history_items=4)
    trained = world.positives(("train",))
    lines = prompts.item_lines(world)
    rows = asked(tmp_path / "r")
    assert [row["user"] for _, _, row in rows] == list(range(1, U))
    for text, line, row in rows:
        mine = trained.row(row["user"]).tolist()
        assert row["items"] == mine[-4:]  # without times: by index
        shown = text.split("last:\n")[1].split("\n\n")[0].splitlines()
        assert shown == [f"- {lines[item]}" for item in mine[-4:]]
        others = [title for i, title in enumerate(TITLES) if title and i not in mine[-4:]]
        assert not any(title in json.dumps(line) for title in others)
    held_out = set(world.test.items.tolist()) - set(world.train.items.tolist())
    assert held_out
    whole = "".join(text for text, _, _ in rows)
    assert not any(TITLES[item] in whole for item in held_out if TITLES[item])


def test_a_prompt_about_an_item_shows_its_own_row_and_no_interaction(world, make_dataset, tmp_path):
    write(world, tmp_path / "r", prompt="item_description", item_words=3)
    rows = asked(tmp_path / "r")
    assert [(row["user"], row["items"]) for _, _, row in rows] == [(-1, [i]) for i in range(I)]
    shown = [text.split("catalogue:\n")[1].split("\n\n")[0] for text, _, _ in rows]
    assert shown[:4] == [
        "Title: Kx00q",
        "Title: Kx01q\nCategories: Drama, Crime\nDescription: w1x0 w1x1 w1x2",
        "Title: Kx02q",
        "Categories: Drama, Crime\nDescription: w3x0 w3x1 w3x2",
    ]
    other = make_dataset(
        "other",
        users=[f"u{u}" for u in range(U)],
        items=[f"i{i}" for i in range(I)],
        titles=TITLES,
        texts=TEXTS,
        categories=[["Drama", "Crime"] if i % 2 else None for i in range(I)],
        train={0: [1, 2]},
        valid={},
        test={},
    )
    write(other, tmp_path / "o", prompt="item_description", item_words=3)
    again = asked(tmp_path / "o")
    assert [text for text, _, _ in again] == [text for text, _, _ in rows]
    ids = {row["custom_id"] for _, _, row in rows}
    assert ids.isdisjoint({row["custom_id"] for _, _, row in again})  # of another split


def test_the_words_of_a_request(world, tmp_path):
    manifest = write(world, tmp_path / "r", model="some-llm", words=40, history_items=1)
    text, line, row = asked(tmp_path / "r")[1]
    (item,) = row["items"]
    assert text == (
        "A person chose these items, the most recent last:\n"
        f"- {prompts.item_lines(world)[item]}\n\n"
        "Describe this person's taste in at most 40 words: what kinds of items the person likes, "
        "what those above have in common, and what the person would enjoy next. Name none of the "
        'items.\nAnswer with one JSON object, {"text": "..."}, and nothing else.\n'
    )
    form = line["body"]["response_format"]["json_schema"]
    assert form["schema"] == {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    }
    assert line["body"]["model"] == "some-llm"
    assert line["body"]["max_tokens"] == 2 * (1.5 * 40 + 6 + 2) + 16
    assert manifest.complete
    assert (manifest.candidates, manifest.training_items) == ("", "none")
    assert manifest.plan["shown"] == "the last 1 training items that have a title or text"
    assert (manifest.plan["side"], manifest.plan["fields"]) == ("user", ["text"])


def test_factors_are_asked_for_where_the_template_asks_for_them(world, tmp_path):
    write(world, tmp_path / "r", prompt="kar_item", factors=" genre, lead  actor", words=20)
    text, line, _ = asked(tmp_path / "r")[0]
    assert "one by one: genre, lead actor." in text
    assert '{"genre": "...", "lead actor": "..."}' in text
    schema_of = line["body"]["response_format"]["json_schema"]["schema"]
    assert schema_of["required"] == ["genre", "lead actor"]
    assert line["body"]["max_tokens"] == 2 * (2 * (1.5 * 20 + 6) + 2) + 16
    lines = make(world, prompt="kar_user", structured="none")[0].fill(["x"]).splitlines()
    assert lines[-1] == (
        "Answer with a line for each, which begins with its name and a colon, such as category: "
        "..., and nothing else."
    )
    with pytest.raises(ConfigError, match=r"--factors=a,b, .*no \$factors.*--prompt=kar_user"):
        make(world, factors="a,b")
    for bad in ("a,,b", "Genre,genre", "lead actor,lead_actor", "a,-"):
        with pytest.raises(ConfigError, match="empty, without a letter or there twice"):
            make(world, prompt="kar_item", factors=bad)


def test_a_template_of_ones_own(world, tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("For $$1: $item\nIn $words words.\n$answer", encoding="utf-8")
    asker, _ = make(world, prompt="kar_item", template=str(template), words=7, structured="none")
    assert asker.fields == text_prompts.ONE_TEXT
    assert asker.prompt(0) == "For $1: Title: Kx00q\nIn 7 words.\nAnswer with the text alone.\n"
    with pytest.raises(ConfigError, match=r"missing history; unknown item; .*may have \$answer"):
        make(world, prompt="user_profile", template=str(template))


def test_a_user_or_item_that_no_prompt_could_show_is_not_asked_about(world, make_dataset):
    _, planned = make(world)
    assert np.flatnonzero(~planned.rows).tolist() == [0]
    assert planned.facts["not_shown"] == 1
    assert "1 users have no training item with a text: none is asked" in planned.report()
    bare = make_dataset("bare")
    for prompt in ("user_profile", "item_description"):
        with pytest.raises(InputError, match=r"has no item t.* to show; .*--items_input"):
            make(bare, prompt=prompt)
    untrained = make_dataset("cold", titles=list("abcdef"), train={}, valid={0: [1]}, test={})
    with pytest.raises(InputError, match="no user has anything that a prompt could show"):
        make(untrained)


def test_the_budget_keeps_a_drawn_part_and_says_what_it_cuts(world):
    asker, whole = make(world, price_in=1e6, price_out=2e6)
    facts = whole.facts
    assert facts["requests"] == 8
    assert facts["answer_tokens"] == 8 * (150 + 6 + 2)
    assert facts["cost"] == facts["prompt_tokens"] + 2 * facts["answer_tokens"]
    exact = prompts.token_counter()[1]([asker.prompt(row) for row in range(1, U)]).sum()
    assert abs(facts["prompt_tokens"] - exact) <= 0.05 * exact
    _, some = make(world, max_requests=3)
    assert some.facts["requests"] == some.rows.sum() == 3
    assert some.facts["cut"] == 5
    assert "the budget cuts 5 users" in some.report()
    drawn = {tuple(make(world, max_requests=3, seed=seed)[1].rows) for seed in range(8)}
    assert len(drawn) > 3
    with pytest.raises(ConfigError, match="--max_tokens=5 does not pay for one user, who costs"):
        make(world, max_tokens=5)
    with pytest.raises(ConfigError, match=r"--max_tokens=5 .* one item, .*lower --item_words"):
        make(world, prompt="kar_item", max_tokens=5)
    with pytest.raises(ConfigError, match="needs prices"):
        make(world, max_cost=1.0)


def test_written_again_the_same_requests_stay_and_others_are_refused(world, tmp_path):
    root = tmp_path / "r"
    first = write(world, root, requests_per_file=3)
    assert len(first.files["requests"]) == 3
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    (root / first.files["requests"][2].path).unlink()  # a write that was killed
    assert write(world, root, requests_per_file=3, price_in=1.0).fingerprint == first.fingerprint
    after = {path.name: path.read_bytes() for path in root.iterdir()}
    assert {k: v for k, v in after.items() if k != "requests.json"} == {
        k: v for k, v in before.items() if k != "requests.json"
    }
    with pytest.raises(InputError, match="holds other requests"):
        write(world, root, words=50)
    other = write(world, root, words=50, overwrite=True)
    assert other.fingerprint != first.fingerprint
    assert len(asked(root)) == 8


def test_options_of_candidates_and_a_missing_model_are_refused(world, tmp_path):
    for option in ({"permutations": 2}, {"candidate_set": "c"}, {"pairs": 3}, {"list_size": 5}):
        ((name, value),) = option.items()
        with pytest.raises(ConfigError, match=f"--{name}={value} is of prompts about candidates"):
            make(world, **option)
    with pytest.raises(ConfigError, match="missing --model"):
        write(world, tmp_path / "r", model="")
    with pytest.raises(ConfigError, match="--logprobs is of one token"):
        write(world, tmp_path / "r", logprobs=True)
    assert not (tmp_path / "r").exists()


def test_every_template_is_of_one_side_and_asks_for_its_form():
    for prompt, side in TEXT_PROMPTS.items():
        template, fields = text_prompts.read_template(RequestConfig(prompt=prompt), TextConfig())
        gap = {"user": "history", "item": "item"}[side]
        assert "SHOWN" in template.fill(**{gap: "SHOWN"})
        assert text_prompts.instruction(fields, "json_schema") in template.fill(**{gap: ""})
