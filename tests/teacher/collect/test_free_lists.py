"""Free lists from request to product: what is asked, what titles become, what is counted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from teacher.collect.asked_world import gather, put
from teacher.collect.reading import result

from slgr_jax import api
from slgr_jax.config import CandidateConfig, ReportConfig, RequestConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.reports import teacher_audit
from slgr_jax.teacher.ask import asking, candidates, prompts, requests
from slgr_jax.teacher.collect import answer_log, collecting, open_requests
from slgr_jax.teacher.collect.free_lists import scores
from slgr_jax.teacher.products import preferences

pytestmark = pytest.mark.usefixtures("one_device")

TITLES = [
    *("Alien (1979)", "Aliens (1986)", "Heat (1995)", "Kid, The (1921)", "Ran", "Dune (1984)"),
    *("Dune (2021)", "Mad Max: Fury Road (2015)", None, "Solaris (1972)"),
]
TRAIN = {0: [0, 1, 2], 1: [3, 4], 2: [1, 9]}


@pytest.fixture
def films(make_dataset):
    """3 users, 10 items, one of them without a title; candidate sets `plain` and `hiding`."""
    data = make_dataset(
        users=["a", "b", "c"],
        items=[f"i{k}" for k in range(10)],
        titles=TITLES,
        train=TRAIN,
        valid={1: [0]},
        test={},
    )
    for name, hiding in (("plain", 0), ("hiding", 3)):
        options = CandidateConfig(calibration_users=hiding)
        drawn = candidates.draw(data, prompts.item_lines(data), options, seed=0)
        candidates.write(data, name, drawn, options, seed=0, diversity="popularity")
    return data


def ask(data, *, name="t", drawn_as="plain", **options):
    """Write requests for free lists; returns their folder and, by user, their custom_ids."""
    drawn, source = candidates.load(data, drawn_as)
    given = RequestConfig(prompt="free_list", **options)
    asker = asking.asker(data, drawn, prompts.item_lines(data), given, 0)
    root = requests.directory(data.path, name)
    requests.write(asker, asking.plan(asker), source, root, model="fake")
    index = requests.load_index(root, schema.read_request_manifest(root)).to_pylist()
    ids = {}
    for row in index:
        ids.setdefault(row["user"], []).append(row["custom_id"])
    return root, ids


def bodies(root):
    return [line["body"] for line in requests.read_lines(root, schema.read_request_manifest(root))]


def listed(data, name="t"):
    """By user the (item, score) of a product, the best first."""
    teacher = preferences.load(data, name)
    out = {}
    for user in range(data.n_users):
        rows = slice(teacher.offsets[user], teacher.offsets[user + 1])
        out[user] = list(
            zip(
                teacher.items[rows][::-1].tolist(), teacher.scores[rows][::-1].tolist(), strict=True
            )
        )
    return out


def answer(*titles, **facts):
    return result(json.dumps({"titles": titles}), **facts)


def test_a_request_shows_the_history_and_asks_for_titles(films):
    root, ids = ask(films)
    assert {user: len(held) for user, held in ids.items()} == {0: 1, 1: 1, 2: 1}
    body = bodies(root)[0]
    text = body["messages"][0]["content"]
    assert "- Alien (1979)\n- Aliens (1986)\n- Heat (1995)\n" in text
    assert "Which 50 other items" in text
    assert "Solaris" not in text
    titles = body["response_format"]["json_schema"]["schema"]["properties"]["titles"]
    assert titles["maxItems"] == 50
    assert body["max_tokens"] > 50 * 12


def test_a_catalogue_is_shown_in_another_order_each_time_without_what_was_chosen(films):
    root, _ = ask(films, catalogue="all", permutations=2, list_size=3)
    texts = [body["messages"][0]["content"] for body in bodies(root)]
    shown = [text.split("\n\n")[0].splitlines()[1:] for text in texts]
    of_first = {title for k, title in enumerate(TITLES) if title and k not in TRAIN[0]}
    assert set(shown[0]) == set(shown[1]) == of_first
    assert shown[0] != shown[1]
    assert all("Which 3 items of the first list" in text for text in texts)


def test_hidden_items_stay_in_the_catalogue(films):
    root, _ = ask(films, drawn_as="hiding", catalogue="all")
    drawn, _ = candidates.load(films, "hiding")
    hidden = drawn.hidden.row(0)
    assert hidden.size == 1
    catalogue, history = bodies(root)[0]["messages"][0]["content"].split("\n\n")[:2]
    assert TITLES[hidden[0]] in catalogue
    assert TITLES[hidden[0]] not in history


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"catalogue": "all", "catalogue_tokens": 5}, "more than --catalogue_tokens=5"),
        ({"permutations": 2}, "--temperature=0.7, or --catalogue=all"),
        ({"list_size": 1}, "--list_size=1 is no list"),
    ],
)
def test_what_cannot_be_asked_is_refused(films, options, words):
    with pytest.raises(ConfigError, match=words):
        ask(films, **options)


def test_other_prompts_have_no_catalogue_and_their_own_default(films):
    drawn, _ = candidates.load(films, "plain")
    lines = prompts.item_lines(films)
    with pytest.raises(ConfigError, match="--catalogue=all is of --prompt=free_list"):
        asking.asker(films, drawn, lines, RequestConfig(catalogue="all"), 0)
    assert asking.asker(films, drawn, lines, RequestConfig(), 0).options.list_size == 20


def test_a_template_of_ones_own(films, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Seen:\n$history\nName $count. $answer", "utf-8")
    root, _ = ask(films, template=str(path), list_size=7)
    assert "Name 7. Answer with one JSON object" in bodies(root)[0]["messages"][0]["content"]
    path.write_text("$history $candidates", "utf-8")
    with pytest.raises(ConfigError, match="needs --catalogue=all"):
        ask(films, name="u", template=str(path))


def test_titles_become_a_ranked_list_and_what_means_no_item_is_counted(films, tmp_path):
    _, ids = ask(films)
    path = put(
        tmp_path / "results.jsonl",
        [
            answer(
                "The Kid", "Dune", "Jaws", "HEAT", "kid, the (1921)", "Ran", custom_id=ids[0][0]
            ),
            answer("Mad Max (2015)", "Mad Max", "Dune (2021)", custom_id=ids[1][0]),
            answer("Jaws", "Up", custom_id=ids[2][0]),
        ],
    )
    manifest, told = gather(films, path)
    # User 0 has seen Heat, so that it is dropped; places are those in the answer.
    assert listed(films) == {0: [(3, -1.0), (4, -6.0)], 1: [(7, -1.0), (6, -3.0)], 2: []}
    counts = {key[7:]: n for key, n in manifest.counts.items() if key.startswith("titles_") and n}
    assert counts == {
        "exact": 2, "normalised": 2, "subtitle": 1, "ambiguous": 1, "shortened": 1, "absent": 1,
        "repeated": 1,
    }  # fmt: skip
    assert manifest.counts["titles"] == 9
    assert manifest.counts["dropped_training_item_rows"] == 1
    assert (manifest.unlisted, manifest.built_from, manifest.score_kind, manifest.model) == (
        *("below", "train_only", "rank"), "fake",
    )  # fmt: skip
    assert "none of the catalogue (2 titles: Jaws, Up)" in told
    assert "1 (11.1%) of two items or more (refused)" in preferences.report(manifest)
    (still,) = open_requests.open_requests(films, "t")
    assert (still.custom_id, still.state) == (ids[2][0], "refused")
    with pytest.raises(InputError, match="none of the catalogue"):
        gather(films, put(tmp_path / "none.jsonl", [answer("Jaws", custom_id=ids[2][0])]))


def test_the_log_keeps_titles_and_another_matching_needs_no_new_answers(films, tmp_path):
    _, ids = ask(films)
    path = put(tmp_path / "r.jsonl", [answer("Mad Max", "Ran", custom_id=ids[0][0])])
    gather(films, path)
    assert listed(films)[0] == [(4, -2.0)]
    rows, _ = answer_log.load_log(films, "t")
    assert rows.schema == schema.TITLES
    assert rows.column("title").to_pylist() == ["Mad Max", "Ran"]
    options = collecting.CollectConfig(results=str(path))
    collecting.collect(films, TeachConfig(name="t", subtitles=True), options)
    assert listed(films)[0] == [(7, -1.0), (4, -2.0)]


def test_lists_of_one_user_are_one_by_mean_place(films):
    lists = [(1, ["Heat", "Jaws", "Ran"]), (1, ["Solaris", "Heat"]), (0, ["Ran"])]
    rows = [
        (k, u, p, 0, title) for k, (u, said) in enumerate(lists) for p, title in enumerate(said)
    ]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema.TITLES)
    got, votes, _ = scores(table, films, None, subtitles=False)
    found = {(row["user"], row["item"]): row["score"] for row in got.to_pylist()}
    # User 1 has seen Ran (item 4). What an answer of m titles leaves out is at place m + 1.
    assert found == {(0, 4): -1.0, (1, 2): -(1 + 2) / 2, (1, 9): -(4 + 1) / 2}
    # Of the places above what is left out: Heat 3 and 1, Solaris 0 and 2.
    agreement = {(row["user"], row["item"]): row["votes"] for row in votes.to_pylist()}
    expected = {(1, 2): 4**2 / (2 * 10), (1, 9): 2**2 / (2 * 4), (0, 4): 1.0}
    assert {pair: agreement[pair] for pair in expected} == pytest.approx(expected)


def test_hidden_training_items_are_kept_and_other_ones_dropped(films, tmp_path):
    _, ids = ask(films, drawn_as="hiding")
    drawn, _ = candidates.load(films, "hiding")
    hidden = int(drawn.hidden.row(0)[0])
    said = [TITLES[item] for item in TRAIN[0]] + ["Ran"]
    path = put(tmp_path / "r.jsonl", [answer(*said, custom_id=ids[0][0])])
    manifest, _ = gather(films, path)
    assert manifest.training_items == "hidden"
    assert {item for item, _ in listed(films)[0]} == {hidden, 4}

    again = candidates.draw(
        films, prompts.item_lines(films), CandidateConfig(calibration_users=0), seed=1
    )
    candidates.write(
        films, "hiding", again, CandidateConfig(), seed=1, diversity="popularity", overwrite=True
    )
    manifest, told = gather(films, path)
    assert {item for item, _ in listed(films)[0]} == {4}
    assert manifest.training_items == "none"
    assert "the candidate set hiding is not what was asked with" in told


def test_a_cut_list_is_kept_and_open_and_a_whole_one_replaces_it(films, tmp_path):
    _, ids = ask(films)
    cut = result('{"titles": ["Ran", "Sola', custom_id=ids[0][0], finish="length")
    gather(films, put(tmp_path / "a.jsonl", [cut]))
    assert listed(films)[0] == [(4, -1.0)]
    assert open_requests.open_requests(films, "t")[0].state == "cut"
    whole = answer("Ran", "Solaris", custom_id=ids[0][0])
    _, told = gather(films, put(tmp_path / "b.jsonl", [whole]))
    assert "1 in place of cut ones" in told
    assert listed(films)[0] == [(4, -1.0), (9, -2.0)]


def test_free_lists_do_not_mix_with_scores(films, tmp_path):
    _, ids = ask(films)
    gather(films, put(tmp_path / "r.jsonl", [answer("Ran", custom_id=ids[0][0])]))
    drawn, source = candidates.load(films, "plain")
    asker = asking.asker(films, drawn, prompts.item_lines(films), RequestConfig(), 0)
    root = tmp_path / "listwise"
    requests.write(asker, asking.plan(asker), source, root, model="fake")
    with pytest.raises(ConfigError, match="free_list prompts, which do not mix with listwise"):
        gather(films, tmp_path / "r.jsonl", requests=root)


def test_the_report_of_a_free_list(films, tmp_path):
    _, ids = ask(films)
    lines = [answer("Alien", "Jaws", "Dune (2021)", custom_id=ids[1][0])]
    gather(films, put(tmp_path / "r.jsonl", lines))
    audit = teacher_audit.make(films, "t", ReportConfig(), prices=(0, 0), seed=0)
    text = teacher_audit.markdown(audit)
    assert "3 titles: 1 (33.3%) an item's title to the letter" in text
    assert audit.deciding == "validation"
    assert np.isclose(audit.agreement[0].accuracy, 1)  # it lists the validation item first


@pytest.mark.slow
def test_the_recipe_ends_in_a_run_that_is_trained_on_the_lists(make_dataset, tmp_path):
    # Which ten of the films that a user has not seen are listed is drawn: only the lists tell.
    films = [f"Film {k} ({1950 + k})" for k in range(40)]
    rng = np.random.default_rng(0)
    chosen = {u: rng.permutation(40).tolist() for u in range(30)}
    data = make_dataset(
        users=[f"u{u}" for u in range(30)],
        items=[f"i{k}" for k in range(40)],
        titles=films,
        train={u: items[:4] for u, items in chosen.items()},
        valid={u: items[4:5] for u, items in chosen.items()},
        test={u: items[5:6] for u, items in chosen.items()},
    )
    options = CandidateConfig(calibration_users=0)
    drawn = candidates.draw(data, prompts.item_lines(data), options, seed=0)
    candidates.write(data, "plain", drawn, options, seed=0, diversity="popularity")
    _, ids = ask(data, name="fav", list_size=10)
    lines = [
        answer(*(films[k].upper() for k in chosen[user][6:16]), "Jaws", custom_id=custom_id)
        for user, (custom_id,) in ids.items()
    ]
    gather(data, put(tmp_path / "results.jsonl", lines), name="fav")

    knobs = {"epochs": 20, "eval_every": 20, "lr": 0.1, "batch_size": 64}
    api.train(data.path, tmp_path / "PLAIN", **knobs)
    guidance = {"guidance": "pairwise", "teacher": "fav", "gate": "constant", "lambda_": 5.0}
    references = {"hard_negatives": 5, "reference_runs": str(tmp_path / "PLAIN")}
    api.train(data.path, tmp_path / "GUIDED", **guidance, **references, **knobs)

    def listed_over_others(name):
        """Share of (listed, unlisted) films of a user of which the listed one has more score."""
        run = api.load(tmp_path / name)
        shares = []
        for user, items in chosen.items():
            scored = run.scores([f"u{user}"] * 34, [f"i{k}" for k in items[6:]])
            shares.append((scored[:10, None] > scored[10:]).mean())
        return np.mean(shares)

    assert abs(listed_over_others("PLAIN") - 0.5) < 0.1
    assert listed_over_others("GUIDED") > 0.7
