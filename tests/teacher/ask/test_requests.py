"""Request files: what they ask, what they never show, what they cost; a killed write goes on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import CandidateConfig, RequestConfig, SliceConfig
from slgr_jax.data import schema, shards
from slgr_jax.errors import ConfigError, InputError, ManifestError, ShardError
from slgr_jax.teacher.ask import answer_form, asking, candidates, prompts, request_files, requests

U, I = 24, 50  # noqa: E741 - the letters of the code
TITLES = [f"Film <{i}> of ${i}" for i in range(I)]


@pytest.fixture
def world(make_dataset):
    """24 users of 0 to 15 training items; valid and test items are no training items."""
    rng = np.random.default_rng(1)
    train, valid, test = {}, {}, {}
    for u in range(U):
        drawn, size = rng.permutation(I), min(u, 15)
        train[u] = sorted(drawn[:size].tolist())
        valid[u], test[u] = drawn[size : size + 1].tolist(), drawn[size + 1 : size + 3].tolist()
    return make_dataset(
        users=[f"u{u}" for u in range(U)],
        items=[f"i{i}" for i in range(I)],
        titles=TITLES,
        categories=[["Drama", "Crime"] if i % 2 else None for i in range(I)],
        train=train,
        valid=valid,
        test=test,
    )


@pytest.fixture
def drawn(world):
    lines = prompts.item_lines(world)
    options = CandidateConfig(candidates=8, popular_pool=30, cold_candidates=4, tail_users=3)
    found = candidates.draw(world, lines, options, seed=0)
    candidates.write(world, "c", found, options, seed=0, diversity="popularity")
    return found


def make(world, *, seed=0, **options):
    """(asker, plan, candidate manifest) for the candidate set c."""
    found, source = candidates.load(world, "c")
    one = asking.asker(world, found, prompts.item_lines(world), RequestConfig(**options), seed)
    return one, asking.plan(one), source


def write(world, root, *, model="m", overwrite=False, **options):
    one, planned, source = make(world, **options)
    return requests.write(one, planned, source, root, model=model, overwrite=overwrite)


def asked(root):
    """(line, index row) of every request, in order."""
    lines = []
    for path in sorted(root.glob("requests-*.jsonl")):
        lines += [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    index = requests.load_index(root, schema.read_request_manifest(root)).to_pylist()
    return list(zip(lines, index, strict=True))


def content(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix != ".json"}


def test_every_candidate_is_asked_about_once_a_permutation(world, drawn, tmp_path):
    root = tmp_path / "r"
    write(world, root, list_size=5, permutations=3)
    expected = set(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))
    seen = collections.defaultdict(list)
    by_list = collections.defaultdict(list)
    for line, row in asked(root):
        assert line["custom_id"] == row["custom_id"]
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert len(row["items"]) <= 5
        seen[row["permutation"]] += [(row["user"], item) for item in row["items"]]
        by_list[row["user"], frozenset(row["items"])].append(tuple(row["items"]))
    assert sorted(seen) == [0, 1, 2]
    for pairs in seen.values():
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == expected
    assert all(len(orders) == 3 for orders in by_list.values())
    assert any(len(set(orders)) == 3 for orders in by_list.values())
    assert len({line["custom_id"] for line, _ in asked(root)}) == len(asked(root))


def test_a_prompt_shows_training_items_that_are_not_hidden_and_nothing_else(world, drawn, tmp_path):
    root = tmp_path / "r"
    write(world, root, history_items=4)
    lines = prompts.item_lines(world)
    trained = world.positives(("train",))
    assert drawn.hidden.indices.size
    for line, row in asked(root):
        text = line["body"]["messages"][0]["content"]
        history, rest = text.split("\n\nCandidates:\n")
        shown = [lines.index(one[2:]) for one in history.splitlines()[1:]]
        left = [i for i in trained.row(row["user"]) if i not in drawn.hidden.row(row["user"])]
        assert shown == left[-4:]  # without times: by index
        listed = rest.split("\n\n")[0].splitlines()
        labels = [prompts.label(k) for k in range(len(row["items"]))]
        assert listed == [f"{a}. {lines[i]}" for a, i in zip(labels, row["items"], strict=True)]


def test_the_words_of_a_request(world, drawn, tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("Liked:\n$history\nCosts $$1.\n$candidates\n?", encoding="utf-8")
    root = tmp_path / "r"
    manifest = write(
        world, root, prompt="pairwise", template=str(template), history_items=1, logprobs=True,
        top_logprobs=5, answer_tokens=7, temperature=0.5, structured="none",
        body='{"seed": 4, "max_tokens": null}',
    )  # fmt: skip
    line, row = asked(root)[0]
    lines, (a, b) = prompts.item_lines(world), row["items"]
    past = world.positives(("train",)).row(row["user"])
    past = [i for i in past if i not in drawn.hidden.row(row["user"])]
    assert line["body"] == {
        "model": "m",
        "messages": [
            {
                "role": "user",
                "content": f"Liked:\n- {lines[past[-1]]}\nCosts $1.\nA. {lines[a]}\n"
                f"B. {lines[b]}\n?\n",
            }
        ],
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 5,
        "seed": 4,
    }
    assert manifest.template_hash == prompts.read_template("pairwise", str(template)).hash
    assert "logprobs" not in json.loads(
        (tmp_path / "r" / "requests-00000.jsonl").read_text("utf-8").splitlines()[0]
    )


def test_pointwise_prompts_show_one_item_without_a_label(world, drawn, tmp_path):
    root = tmp_path / "r"
    write(world, root, prompt="pointwise")
    lines = prompts.item_lines(world)
    for line, row in asked(root)[:5]:
        (item,) = row["items"]
        assert f"item?\n{lines[item]}\n\nAnswer" in line["body"]["messages"][0]["content"]
    assert len(asked(root)) == drawn.users.size


def test_pairs_are_distinct_and_calibration_comes_first(world, drawn):
    tests = drawn.reasons >> schema.REASONS.index("calibration") & 1
    for orders, size in (("one", 1), ("random", 1), ("both", 2)):
        one, _, _ = make(world, prompt="pairwise", orders=orders, pairs=12)
        swapped = 0
        for user in np.unique(drawn.users).tolist():
            made = one.of_user(user)
            pairs = [tuple(items.tolist()) for _, items in made]
            assert len({frozenset(pair) for pair in pairs}) == len(pairs) // size <= 12
            assert len(set(pairs)) == len(pairs)
            if orders == "both":
                assert pairs[1::2] == [(b, a) for a, b in pairs[::2]]
                assert [k for k, _ in made] == [0, 1] * (len(pairs) // 2)
            swapped += sum(a > b for a, b in pairs)
            mine = drawn.items[(drawn.users == user) & (tests > 0)]
            hidden = set(drawn.hidden.row(user).tolist())
            known = {
                frozenset(pair)
                for pair in itertools.combinations(mine.tolist(), 2)
                if len(hidden & set(pair)) == 1
            }
            first = {frozenset(pair) for pair in pairs[: size * len(known)]}
            assert first == known
        total = sum(len(one.of_user(user)) for user in np.unique(drawn.users).tolist())
        expected = {"one": (0, 0), "random": (0.4, 0.6), "both": (0.5, 0.5)}[orders]
        assert expected[0] <= swapped / total <= expected[1]


def test_the_plan_is_what_is_written(world, drawn, tmp_path):
    for prompt in ("listwise", "ranking", "pairwise", "pointwise", "rating", "free_list"):
        one, planned, source = make(world, prompt=prompt, price_in=2.0, price_out=3.0)
        requests.write(one, planned, source, tmp_path / prompt, model="m")
        rows = asked(tmp_path / prompt)
        assert planned.facts["requests"] == len(rows)
        assert planned.facts["users"] == len({row["user"] for _, row in rows})
        texts = [line["body"]["messages"][0]["content"] for line, _ in rows]
        _, count = prompts.token_counter()
        assert planned.facts["prompt_tokens"] == pytest.approx(int(count(texts).sum()), rel=0.03)
        most = sum(line["body"]["max_tokens"] for line, _ in rows)
        assert planned.facts["answer_tokens"] * 2 + 16 * len(rows) == most
        cost = planned.facts["prompt_tokens"] * 2e-6 + planned.facts["answer_tokens"] * 3e-6
        assert planned.facts["cost"] == pytest.approx(cost, abs=1e-4)


def test_a_budget_cuts_whole_users_and_keeps_shares(world, drawn):
    _, whole, _ = make(world, prompt="pointwise")
    cold = world.slices(SliceConfig()).cold_users
    tests = drawn.hidden.counts > 0
    for name, most in (("max_requests", 200), ("max_tokens", 25_000), ("max_cost", 0.03)):
        _, planned, _ = make(world, prompt="pointwise", price_in=1.0, **{name: most})
        facts = planned.facts
        spent = {
            "max_requests": facts["requests"],
            "max_tokens": facts["prompt_tokens"] + facts["answer_tokens"],
            "max_cost": facts["cost"],
        }[name]
        sizes = np.bincount(drawn.users, minlength=U)
        assert spent <= most
        assert facts["requests"] == sizes[planned.users].sum()
        assert 0 < facts["users"] < whole.facts["users"]
        assert facts["cut_users"] == whole.facts["users"] - facts["users"]
        assert facts["cut_cold_users"] == (whole.users & ~planned.users & cold).sum()
        assert facts["cut_calibration_users"] == (whole.users & ~planned.users & tests).sum()
        share = facts["users"] / whole.facts["users"]
        for stratum in itertools.product((False, True), repeat=2):
            mine = whole.users & (cold == stratum[0]) & (tests == stratum[1])
            assert abs(planned.users[mine].sum() - share * mine.sum()) <= 1
        assert "the budget cuts" in planned.report()
    small = make(world, prompt="pointwise", max_requests=100)[1].users
    large = make(world, prompt="pointwise", max_requests=200)[1].users
    assert (small <= large).all()
    with pytest.raises(ConfigError, match=r"--max_requests=2 does not pay for one user, who costs"):
        make(world, prompt="pointwise", max_requests=2)
    with pytest.raises(ConfigError, match="--max_cost needs prices"):
        make(world, max_cost=1.0)


def test_a_user_of_the_budget_is_asked_the_same(world, drawn, tmp_path):
    write(world, tmp_path / "all")
    write(world, tmp_path / "some", max_requests=20)
    texts = [
        {(row["user"], tuple(row["items"])) for _, row in asked(tmp_path / name)}
        for name in ("all", "some")
    ]
    assert texts[1] < texts[0]


def test_files_hold_at_most_so_many_requests_and_bytes(world, drawn, tmp_path):
    whole, by_count, by_size = (tmp_path / name for name in ("whole", "count", "size"))
    write(world, whole)
    lines = (whole / "requests-00000.jsonl").read_bytes().splitlines()
    write(world, by_count, requests_per_file=7)
    write(world, by_size, megabytes_per_file=0.01)
    for root, most, size in ((by_count, 7, 1e9), (by_size, 50_000, 10_000)):
        files = sorted(root.glob("requests-*.jsonl"))
        assert len(files) > 2
        for path in files:
            assert path.read_bytes().count(b"\n") <= most
            assert path.stat().st_size <= size
        bodies = [json.loads(line)["body"] for p in files for line in p.read_bytes().splitlines()]
        assert bodies == [json.loads(line)["body"] for line in lines]
    manifest = schema.read_request_manifest(by_count)
    for file in manifest.files["requests"]:
        assert file.sha256 == shards.sha256_of(by_count / file.path)


def damage_by_losing_a_file(root):
    (root / "requests-00002.jsonl").unlink()


def damage_by_truncation(root):
    path = root / "index-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_one_byte(root):
    path = root / "requests-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-2] + b" \n")


def damage_by_a_kill(root):
    """As a killed write leaves it: three files listed, a fourth half written."""
    found = schema.read_request_manifest(root)
    files = {key: listed[:3] for key, listed in found.files.items()}
    partly = dataclasses.replace(found, complete=False, files=files)
    schema.write_manifest(root, partly)
    (root / ".requests-00003.jsonl.7-0123abcd.partial.jsonl").write_bytes(b"{half")
    (root / "index-00003.arrow").write_bytes(b"ARROW1 half")


def test_parquet_files_hold_the_same_requests_and_take_the_place_of_lines(
    world, drawn, tmp_path, monkeypatch
):
    """The ids stay, so that answers to either form are answers; a write goes on in its form."""
    monkeypatch.setattr(request_files, "_ROW_GROUP", 3)
    root = tmp_path / "r"
    manifest = write(world, root, requests_per_file=7)
    lines = list(requests.read_lines(root, manifest))
    columns = write(world, root, requests_per_file=7, file_format="parquet")
    assert columns.fingerprint == manifest.fingerprint
    assert list(requests.read_lines(root, columns)) == lines
    assert not list(root.glob("*.jsonl"))
    files = sorted(root.glob("requests-*.parquet"))
    assert len(files) == len(manifest.files["requests"]) > 2
    table = pq.read_table(files[0])
    assert table.column_names == ["custom_id", "method", "url", "body"]
    assert json.loads(table["body"][0].as_py()) == lines[0]["body"]

    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"requests-00001\.parquet"):
        list(requests.read_lines(root, columns))
    before = files[0].stat().st_mtime_ns
    again = write(world, root, requests_per_file=7, file_format="parquet")
    assert list(requests.read_lines(root, again)) == lines
    assert files[0].stat().st_mtime_ns == before

    (first,) = requests.write_open(root, again, {lines[3]["custom_id"]: 2})
    assert first.name == "requests-open-00000.parquet"
    (row,) = pq.read_table(first).to_pylist()
    assert row["custom_id"] == lines[3]["custom_id"]
    assert json.loads(row["body"])["max_tokens"] == 2 * lines[3]["body"]["max_tokens"]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda root: None, 4),
        (damage_by_losing_a_file, 2),
        (damage_by_truncation, 1),
        (damage_by_one_byte, 1),
        (damage_by_a_kill, 3),
    ],
)
def test_a_write_goes_on_after_the_last_whole_file(world, drawn, tmp_path, damage, kept):
    root = tmp_path / "r"
    first = write(world, root, requests_per_file=7)
    assert len(first.files["requests"]) >= 4
    before = content(root)
    damage(root)
    times = {p.name: p.stat().st_mtime_ns for p in root.glob("requests-*.jsonl")}
    again = write(world, root, requests_per_file=7)
    assert again == first
    assert content(root) == before
    for number in range(kept):
        name = f"requests-{number:05d}.jsonl"
        assert (root / name).stat().st_mtime_ns == times[name]


def test_other_requests_are_not_written_over(world, drawn, tmp_path):
    root = tmp_path / "r"
    write(world, root, requests_per_file=7)
    before = content(root)
    with pytest.raises(InputError, match=r"holds other requests \(m, listwise.*--overwrite"):
        write(world, root, list_size=3)
    with pytest.raises(InputError, match="holds other requests"):
        write(world, root, model="n", requests_per_file=7)
    assert content(root) == before
    write(world, root, list_size=3, overwrite=True)
    assert len(list(root.glob("requests-*"))) == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("x")
    with pytest.raises(InputError, match=r"holds no requests.json; choose another --out"):
        write(world, mine, overwrite=True)
    with pytest.raises(ConfigError, match="missing --model"):
        write(world, tmp_path / "new", model="")
    assert not (tmp_path / "new").exists()


def test_a_damaged_index_is_named(world, drawn, tmp_path):
    manifest = write(world, tmp_path / "r")
    (tmp_path / "r" / "index-00000.arrow").unlink()
    with pytest.raises(ShardError, match=r"index-00000.arrow is missing"):
        requests.load_index(tmp_path / "r", manifest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$history", "missing candidates"),
        ("$history $candidates $user", "unknown user"),
        ("$history $candidates for 5$", "bare \\$"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(tmp_path, text, words):
    path = tmp_path / "t.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words):
        prompts.read_template("listwise", str(path))


@pytest.mark.parametrize("body", ["{", "[1]", "7"])
def test_a_body_must_be_an_object(world, drawn, tmp_path, body):
    with pytest.raises(ConfigError, match=r"--body=.* is not"):
        write(world, tmp_path / "r", body=body)
    assert not (tmp_path / "r").exists()


def test_log_probabilities_are_of_one_token(world, drawn, tmp_path):
    with pytest.raises(ConfigError, match=r"--logprobs .*--prompt=listwise asks for many"):
        write(world, tmp_path / "r", logprobs=True)


def test_labels_count_like_columns_of_a_sheet():
    assert [prompts.label(k) for k in (0, 1, 25, 26, 27, 51, 52, 701, 702)] == [
        *("A", "B", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA")
    ]


def test_item_lines(make_dataset):
    data = make_dataset(
        titles=["Heat\n(1995) ", None, "", "M", None, "x"],
        texts=[None, "y" * 200, "a  b", None, None, None],
        categories=[["Crime", " "], ["Drama"], None, [], ["Noir"], None],
    )
    assert prompts.item_lines(data) == [
        *("Heat (1995) (Crime)", "y" * 120 + " (Drama)", "a b", "M", "", "x")
    ]
    with pytest.raises(InputError, match=r"has no item texts to show; .*--items_input"):
        prompts.item_lines(make_dataset("bare"))


def test_tokens_are_counted_or_estimated(monkeypatch):
    assert prompts._quarter(["", "abc", "abcde"]).tolist() == [0, 1, 2]
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    assert prompts.token_counter()[0] == "four characters a token"


def test_request_numbers_are_the_index_of_their_rows(world, drawn, tmp_path):
    write(world, tmp_path / "r")
    rows = [row for _, row in asked(tmp_path / "r")]
    numbers = np.array([row["request"] for row in rows])
    assert (np.diff(numbers) == 1).all()
    assert numbers[0] >= 0
    table = requests.load_index(tmp_path / "r", schema.read_request_manifest(tmp_path / "r"))
    assert table.schema.field("items").type == pa.list_(pa.int32())


def test_a_request_states_the_form_of_its_answer(world, drawn, tmp_path):
    write(world, tmp_path / "schema", prompt="ranking", list_size=5)
    for line, row in asked(tmp_path / "schema"):
        stated = line["body"]["response_format"]["json_schema"]
        expected = answer_form.answer_schema("ranking", len(row["items"]))
        assert (stated["strict"], stated["schema"]) == (True, expected)
    write(world, tmp_path / "object", structured="json_object", token_limit="max_completion_tokens")
    body = asked(tmp_path / "object")[0][0]["body"]
    assert body["response_format"] == {"type": "json_object"}
    assert body["max_completion_tokens"] > 0
    assert "max_tokens" not in body
    write(world, tmp_path / "none", structured="none")
    assert "response_format" not in asked(tmp_path / "none")[0][0]["body"]


def test_the_range_of_scores_is_asked_for_recorded_and_checked(world, drawn, tmp_path):
    found, source = candidates.load(world, "c")
    lines = prompts.item_lines(world)
    asker = asking.asker(world, found, lines, RequestConfig(), 0, score_range=(1, 7))
    manifest = requests.write(asker, asking.plan(asker), source, tmp_path / "r", model="m")
    assert manifest.plan["score_range"] == [1, 7]
    schema_of = asked(tmp_path / "r")[0][0]["body"]["response_format"]["json_schema"]["schema"]
    assert schema_of["properties"]["A"] == {"type": "number", "minimum": 1, "maximum": 7}
    with pytest.raises(InputError, match="holds other requests"):
        write(world, tmp_path / "r")
    with pytest.raises(ConfigError, match="--score_range=1,1 is not a lowest and a highest"):
        asking.asker(world, found, lines, RequestConfig(), 0, score_range=(1, 1))


def test_a_damaged_manifest_is_named_and_never_believed(world, drawn, tmp_path):
    manifest = write(world, tmp_path / "r", max_requests=20)
    path = tmp_path / "r" / schema.REQUESTS_MANIFEST
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:size] for size in rng.integers(0, len(whole), 20)]
    for place, value in zip(
        rng.integers(0, len(whole), 300), rng.integers(0, 256, 300), strict=True
    ):
        damaged.append(whole[:place] + bytes([value]) + whole[place + 1 :])
    damaged += [b"[" * 100_000, b"{}", b"null", whole.replace(b"true", b"1" * 5000)]
    damaged += [whole.replace(b'"rows": ', b'"rows": 1'), whole.replace(b'"m"', b'"n"')]
    messages = []
    for data in damaged:
        path.write_bytes(data)
        try:
            read = schema.read_request_manifest(tmp_path / "r")
        except ManifestError as error:
            messages.append(str(error))
        else:
            assert read == manifest  # what changed was white space, or nothing
    assert len(messages) > 250
    assert all(str(tmp_path / "r") in message for message in messages)

    # What the message says to do works.
    path.write_bytes(whole.replace(b'"m"', b'"n"'))
    with pytest.raises(ManifestError, match="make it again with slgr teach requests --overwrite"):
        write(world, tmp_path / "r", max_requests=20)
    assert write(world, tmp_path / "r", max_requests=20, overwrite=True) == manifest
