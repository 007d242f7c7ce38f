"""From request files through a fake LLM's answers to a product: exact, whatever the order, the
damage or the number of runs."""

from __future__ import annotations

import itertools
import json
import math
import random

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from teacher.collect.asked_world import (
    U,
    answered,
    ask,
    gather,
    log_rows,
    put,
    scores_of,
    tastes,
)  # fmt: skip

from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.ask import candidates, prompts, requests
from slgr_jax.teacher.collect import answer_log, derive, quarantine
from slgr_jax.teacher.products import preferences

NUMBERS = itertools.count()


def test_listwise_answers_become_the_scores_exactly(world, tmp_path):
    root = ask(world, list_size=4, permutations=2)
    lines = answered(root)
    manifest, told = gather(world, put(tmp_path / "out.jsonl", lines))
    expected = tastes(world, root)
    assert scores_of(world) == {pair: np.float32(score) for pair, score in expected.items()}
    drawn, _ = candidates.load(world, "c")
    assert set(expected) == set(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))
    assert f"read {len(lines)} results: {len(lines)} accepted, 0 repeated, 0 quarantined" in told
    assert (manifest.built_from, manifest.training_items) == ("train_only", "hidden")
    assert (manifest.model, manifest.unlisted, manifest.score_kind) == ("fake", "unknown", "score")
    assert manifest.prompt_hash == prompts.read_template("listwise").hash
    assert manifest.counts["train_pairs"] == drawn.hidden.indices.size
    assert manifest.counts["prompt_tokens"] == 100 * len(lines)
    ledger = json.loads((answer_log.log_path(world.path, "t") / answer_log.LEDGER).read_text())
    assert ledger["accepted"] == {
        "answers": len(lines), "without_usage": 0,
        "prompt_tokens": 100 * len(lines), "completion_tokens": 10 * len(lines),
    }  # fmt: skip
    rows, _ = answer_log.load_log(world, "t")
    assert rows.num_rows == 2 * len(expected)
    by_request = {}
    for row in rows.to_pylist():
        by_request.setdefault(row["request"], []).append((row["position"], row["item"]))
    index = requests.load_index(root, schema.read_request_manifest(root)).to_pylist()
    assert by_request == {row["request"]: list(enumerate(row["items"])) for row in index}


def test_shuffled_lines_two_files_and_a_kill_change_nothing(world, tmp_path, monkeypatch):
    root = ask(world, list_size=3)
    lines = answered(root)
    gather(world, put(tmp_path / "a.jsonl", lines))
    whole, rows = scores_of(world), log_rows(world)
    random.Random(0).shuffle(lines)
    folder = tmp_path / "b" / "deep"
    folder.mkdir(parents=True)
    put(folder / "1.jsonl", lines[:20])
    put(folder / "2.jsonl", [*lines[15:], ""])

    written = []

    def killed(directory, manifest, *rest):
        if len(manifest.files.get("answers", ())) == 3:
            raise KeyboardInterrupt  # the third shard is on disk, the manifest does not list it
        written.append(manifest)
        return original(directory, manifest, *rest)

    original = schema.write_manifest
    monkeypatch.setattr(schema, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        gather(world, tmp_path / "b", name="k", requests=root, rows_per_shard=10)
    monkeypatch.undo()
    assert len(answer_log.load_log(world, "k")[1].files["answers"]) == 2
    _, told = gather(world, tmp_path / "b", name="k", requests=root, rows_per_shard=10)
    assert "0 quarantined" in told
    assert log_rows(world, "k") == rows
    assert scores_of(world, "k") == whole


def test_a_second_run_over_more_results_only_adds(world, tmp_path):
    root = ask(world, list_size=3)
    lines = answered(root)
    first = put(tmp_path / "a.jsonl", lines[:10])
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:10]) + "\n" + lines[10][:40])
    manifest, told = gather(world, first)
    assert "read 11 results: 10 accepted, 0 repeated, 1 quarantined (not JSON 1)" in told
    assert f"10 of {len(lines)} requests are complete" in told
    log = answer_log.log_path(world.path, "t")
    before = {path.name: path.read_bytes() for path in log.glob("answer*.arrow")}
    some = scores_of(world)
    put(tmp_path / "a.jsonl", lines)
    manifest, told = gather(world, first)
    assert f"{len(lines) - 10} accepted, 10 repeated, 0 quarantined" in told
    assert {name: (log / name).read_bytes() for name in before} == before
    assert scores_of(world).items() > some.items()
    assert manifest.counts["quarantined"] == 1
    _, told = gather(world, first)
    assert f"0 accepted, {len(lines)} repeated" in told


def test_what_cannot_be_used_is_quarantined_once_and_stops_nothing(world, tmp_path):
    root = ask(world, list_size=3)
    lines = answered(root)
    other = json.loads(lines[0])
    body = other["response"].get("body", other["response"])
    body["choices"][0]["message"]["content"] = '{"A": 0.123}'
    foreign = json.loads(lines[1]) | {"custom_id": "ffffffffffffffff"}
    nul = json.loads(lines[1]) | {"custom_id": foreign["custom_id"] + "\0"}
    failed = {"custom_id": json.loads(lines[2])["custom_id"], "error": {"message": "too long"}}
    prose = json.loads(lines[3])
    held = prose["response"].get("body", prose["response"])
    held["choices"][0]["message"]["content"] = "I cannot."
    bad = [json.dumps(one) for one in (other, foreign, nul, failed, prose)]
    mixed = [*lines[:3], *lines[4:], *bad, lines[0], '{"half']
    path = put(tmp_path / "a.jsonl", mixed)
    (tmp_path / "empty.jsonl").touch()
    _, told = gather(world, path, tmp_path / "empty.jsonl")
    count = len(lines) - 1
    assert f"read {len(mixed)} results: {count} accepted, 1 repeated, 6 quarantined" in told
    log = answer_log.log_path(world.path, "t") / quarantine.QUARANTINE
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [one["reason"] for one in entries] == [
        "another answer", "foreign custom_id", "foreign custom_id", "error", "none of the labels",
        "not JSON",
    ]  # fmt: skip
    assert entries[3]["detail"] == "too long"
    assert entries[0]["source"] == f"a.jsonl:{len(lines)}"
    assert (entries[4]["prompt_tokens"], entries[4]["completion_tokens"]) == (100, 10)
    before = log.read_bytes()
    log.write_bytes(before + b'{"cut')  # a line that a kill cut off
    gather(world, path)
    assert log.read_bytes() == before
    user = requests.load_index(root, schema.read_request_manifest(root)).to_pylist()[3]
    answered_items = {i for u, i in scores_of(world) if u == user["user"]}
    assert not answered_items & set(user["items"])  # unanswered, so without a score


def test_nothing_usable_is_an_error_that_says_so(world, tmp_path):
    root = ask(world)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InputError, match="none of the 0 results"):
        gather(world, empty)
    bad = put(tmp_path / "a.jsonl", ["{", '{"custom_id": "x", "error": "boom"}'])
    with pytest.raises(InputError, match=r"none of the 2 results .*not JSON 1, error 1; see "):
        gather(world, bad)
    with pytest.raises(InputError, match=r"--results=nowhere does not exist"):
        gather(world, "nowhere")
    with pytest.raises(InputError, match=r"names no file of results"):
        gather(world, root)  # request files are no results
    with pytest.raises(ConfigError, match="missing --results"):
        gather(world)
    with pytest.raises(ConfigError, match="--score_range=1,1 is not a lowest"):
        gather(world, empty, score_range=(1, 1))
    with pytest.raises(ManifestError, match=r"slgr teach requests"):
        gather(world, empty, requests=tmp_path)


def test_a_product_from_elsewhere_is_not_replaced_by_accident(world, tmp_path):
    root = ask(world)
    out = put(tmp_path / "out.jsonl", answered(root))
    theirs = put(tmp_path / "s.csv", ["user,item,score", "u1,i1,1"])
    preferences.import_scores(world, theirs, "t")
    with pytest.raises(InputError, match=r"t exists; .*--overwrite"):
        gather(world, out)
    gather(world, out, overwrite=True)
    gather(world, out)
    assert len(scores_of(world)) > 1


def test_orders_become_places(world, tmp_path):
    root = ask(world, prompt="ranking", list_size=30)
    manifest, _ = gather(world, put(tmp_path / "out.jsonl", answered(root, "ranking")))
    expected = tastes(world, root)
    found = scores_of(world)
    for u in range(U):
        mine = {i: s for (v, i), s in expected.items() if v == u}
        for i, score in mine.items():
            below, ties = (
                sum(op(s, score) for s in mine.values()) for op in (float.__lt__, float.__eq__)
            )
            place = found[u, i] * (len(mine) - 1)
            assert below - 1e-4 <= place <= below + ties - 1 + 1e-4
    assert manifest.score_kind == "rank"


@pytest.mark.parametrize("orders", ["both", "random"])
def test_pairs_become_preferences_with_their_margin(world, tmp_path, orders):
    root = ask(world, prompt="pairwise", orders=orders, logprobs=True, pairs=15)
    manifest, _ = gather(world, put(tmp_path / "out.jsonl", answered(root, "pairwise")))
    expected, index = tastes(world, root), requests.load_index(
        root, schema.read_request_manifest(root)
    ).to_pylist()  # fmt: skip
    wanted = {}
    for row in index:
        u, (a, b) = row["user"], row["items"]
        gap = 3 * (expected[u, a] - expected[u, b])
        p = 1 / (1 + math.exp(-(gap + 0.5)))
        if orders == "both":
            p = (p + 1 - 1 / (1 + math.exp(-(-gap + 0.5)))) / 2
        if abs(2 * p - 1) > 1e-6:
            wanted[(u, a, b) if p > 0.5 else (u, b, a)] = abs(2 * p - 1)
    teacher = preferences.load(world, "t")
    found = zip(teacher.users, teacher.preferred, teacher.other, teacher.margin, strict=True)
    found = {(int(u), int(a), int(b)): float(m) for u, a, b, m in found if m > 1e-6}
    assert found == pytest.approx(wanted, abs=1e-5)
    assert manifest.score_kind == "prob"


def test_pairs_can_become_win_rates(world, tmp_path):
    root = ask(world, prompt="pairwise", pairs=15)
    gather(world, put(tmp_path / "out.jsonl", answered(root, "pairwise")), pairs_to="scores")
    rows = answer_log.load_log(world, "t")[0].to_pylist()
    wins = {}
    for row in rows:
        wins.setdefault((row["user"], row["item"]), []).append(row["score"])
        wins.setdefault((row["user"], row["other"]), []).append(1 - row["score"])
    assert scores_of(world) == pytest.approx(
        {pair: sum(shares) / len(shares) for pair, shares in wins.items()}, abs=1e-6
    )


def test_pairs_and_lists_do_not_mix_in_one_log(world, tmp_path):
    root = ask(world)
    gather(world, put(tmp_path / "a.jsonl", answered(root)))
    pairs = ask(world, "p", prompt="pairwise")
    out = put(tmp_path / "b.jsonl", answered(pairs, "pairwise"))
    with pytest.raises(ConfigError, match=r"listwise prompts, which do not mix with pairwise"):
        gather(world, out, requests=pairs)


def test_two_request_sets_add_up_in_one_log(world, tmp_path):
    first, second = ask(world, "a", list_size=3), ask(world, "b", list_size=5)
    gather(world, put(tmp_path / "a.jsonl", answered(first)), requests=first)
    manifest, _ = gather(world, put(tmp_path / "b.jsonl", answered(second)), requests=second)
    expected = tastes(world, first)
    assert scores_of(world) == {pair: np.float32(score) for pair, score in expected.items()}
    assert answer_log.load_log(world, "t")[0].num_rows == 2 * len(expected)
    assert len(answer_log.load_log(world, "t")[1].sources) == 2
    assert manifest.counts["answered_requests"] == len(answered(first)) + len(answered(second))


def log_table(rows):
    """Rows (request, user, item, other, score) as a log."""
    columns = list(zip(*rows, strict=True))
    zeros = [0] * len(rows)
    positions = [k if k and rows[k][0] == rows[k - 1][0] else 0 for k in range(len(rows))]
    return pa.table([*columns[:4], positions, zeros, columns[4]], schema=schema.ANSWERS)


def test_means_over_permutations_by_hand():
    rows = log_table(
        [
            *((0, 0, 5, None, 0.9), (0, 0, 6, None, 0.1), (0, 0, 7, None, 0.1)),
            *((1, 0, 7, None, 0.4), (1, 0, 5, None, None), (1, 0, 6, None, 0.8)),
            *((2, 1, 5, None, None), (3, 1, 6, None, 0.2)),
        ]
    )
    table, votes = derive._mean_scores(rows, 10, by_rank=False)
    raw = table.to_pylist()
    assert [(row["user"], row["item"]) for row in raw] == [(0, 5), (0, 6), (0, 7), (1, 5), (1, 6)]
    assert [row["score"] for row in raw] == [
        pytest.approx(0.9), pytest.approx(0.45), pytest.approx(0.25), None, pytest.approx(0.2)
    ]  # fmt: skip
    # From .1, 0, to .9, 1: of item 6 0 and .875, of item 7 0 and .375, of item 5 one alone.
    agreement = {(row["user"], row["item"]): row["votes"] for row in votes.to_pylist()}
    assert agreement == pytest.approx({(0, 5): 1, (0, 6): 0.5, (0, 7): 0.5, (1, 6): 1})
    # Request 0: places 0.5, 0.5, 2 of 2; request 1: 1, 0 of 1; request 3: alone.
    ranks = derive._mean_scores(rows, 10, by_rank=True)[0].to_pylist()
    assert [row["score"] for row in ranks] == [1, 0.625, 0.125, None, 0.5]


def test_both_orders_are_averaged_by_hand():
    rows = log_table(
        [
            *((0, 0, 3, 8, 0.9), (1, 0, 8, 3, 0.3)),  # (.9 + 1 - .3) / 2 = .8
            *((2, 0, 8, 4, 0.75), (3, 0, 8, 4, 0.25)),  # one order, twice: .5
            *((4, 1, 3, 8, 1.0), (5, 1, 3, 8, 0.5), (6, 1, 8, 3, 0.0)),  # (.75 + 1) / 2
        ]
    )
    users, low, high, p = derive._pair_probabilities(rows, 10)
    assert users.tolist() == [0, 0, 1]
    assert low.tolist() == [3, 4, 3]
    assert high.tolist() == [8, 8, 8]
    assert p.tolist() == pytest.approx([0.8, 0.5, 0.875])
    table, undecided = derive._preferences(users, low, high, p)
    assert undecided == 1
    assert table.to_pylist() == [
        {"user": 0, "preferred": 3, "other": 8, "margin": pytest.approx(0.6)},
        {"user": 1, "preferred": 3, "other": 8, "margin": pytest.approx(0.75)},
    ]


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.data())
def test_quarantine_and_accepted_are_what_was_read(world, tmp_path, data):
    root = requests.directory(world.path, "t")
    lines = answered(root if root.exists() else ask(world, list_size=4))[:12]
    pieces = st.sampled_from(lines) | st.sampled_from(lines).flatmap(
        lambda line: st.integers(1, len(line) - 1).map(lambda at: line[:at])
    )
    chosen = data.draw(st.lists(pieces | st.just("{}") | st.text("a{}1", max_size=4), max_size=30))
    chosen.append(lines[0])
    name = f"p{next(NUMBERS)}"
    _, told = gather(world, put(tmp_path / "x.jsonl", chosen), name=name, requests=root)
    valid = [line for line in chosen if line in lines]
    bad = [line for line in chosen if line.strip() and line not in lines]
    assert (
        f"read {len(valid) + len(bad)} results: {len(set(valid))} accepted, "
        f"{len(valid) - len(set(valid))} repeated, {len(bad)} quarantined"
    ) in told
    entries = (
        (answer_log.log_path(world.path, name) / quarantine.QUARANTINE).read_text().splitlines()
    )
    assert len(entries) == len(set(bad))
    assert answer_log.load_log(world, name)[0].num_rows == sum(
        len(json.loads(line)["response"].get("body", json.loads(line)["response"])["choices"][0][
            "message"]["content"].split(", ")) for line in set(valid)
    )  # fmt: skip
