"""`slgr teach import --items_as=titles`: lists of titles that somebody has already."""

from __future__ import annotations

import pytest

from slgr_jax import api
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.products import preferences

TITLES = ["Alien (1979)", "Heat (1995)", "Kid, The (1921)", "Dune (1984)", "Dune (2021)", None]


@pytest.fixture
def films(make_dataset):
    return make_dataset(titles=TITLES)


def load_csv(films, tmp_path, text, **knobs):
    path = tmp_path / "lists.csv"
    path.write_text(text, "utf-8")
    knobs = {"items_as": "titles", "overwrite": True} | knobs
    return api.import_teacher(films, path, "t", **knobs)


def held(films):
    """(user, item) -> score."""
    teacher = preferences.load(films, "t")
    users = [u for u in range(films.n_users) for _ in range(*teacher.offsets[u : u + 2])]
    return dict(
        zip(zip(users, teacher.items.tolist(), strict=True), teacher.scores.tolist(), strict=True)
    )


def test_titles_are_ranked_matched_and_counted(films, tmp_path):
    text = (
        "user,title,rank\n"
        "ann lee,Jaws,1\nann lee,alien,2\nann lee,DUNE,3\nann lee,The Kid,4\n"
        "007,heat,2\n007,Dune (2021),4\n007,Heat (1995),1\n"
    )
    manifest = load_csv(films, tmp_path, text, unlisted="below", keep_training_items=True)
    # 007 names Heat twice: the better place counts, though it stands below.
    assert held(films) == {(2, 0): -2.0, (2, 2): -4.0, (0, 1): -1.0, (0, 4): -4.0}
    counts = {key[7:]: n for key, n in manifest.counts.items() if key.startswith("titles_") and n}
    assert counts == {"exact": 2, "normalised": 2, "ambiguous": 1, "absent": 1, "repeated": 1}
    assert (manifest.counts["titles"], manifest.counts["file_rows"]) == (7, 7)
    assert manifest.unlisted == "below"
    assert "7 titles: 2 (28.6%) an item's title to the letter" in preferences.report(manifest)


def test_preferences_by_titles(films, tmp_path):
    text = 'user,preferred,other\n"u,5",the kid,dune (2021)\n"u,5",Jaws,alien\n'
    manifest = load_csv(films, tmp_path, text, keep_training_items=True)
    assert (manifest.kind, manifest.counts["preferences"]) == ("preferences", 1)
    with pytest.raises(InputError, match="row 2 prefers item 'ALIEN' over itself"):
        load_csv(films, tmp_path, "user,preferred,other\n007,Jaws,heat\n007,alien,ALIEN\n")


def test_json_lines_with_numbers_as_titles(films, tmp_path):
    lines = (
        '{"user": "007", "title": 1984, "rank": 1}\n{"user": "007", "title": "heat", "rank": 2}\n'
    )
    load_csv(films, tmp_path, lines, keep_training_items=True)
    assert held(films) == {(0, 1): -2.0}


def test_training_items_are_dropped_as_for_ids(films, tmp_path):
    text = "user,item,rank\n007,alien,1\n007,dune (1984),2\n"
    manifest = load_csv(films, tmp_path, text)
    assert manifest.counts["dropped_training_item_rows"] == 1
    assert held(films) == {(0, 3): -2.0}


def test_what_cannot_be_used_is_refused_by_its_row_or_count(films, tmp_path):
    with pytest.raises(InputError, match=r"no row names an item .* 1 \(50.0%\) of two items"):
        load_csv(films, tmp_path, "user,item,rank\n007,Dune,1\n007,Jaws,2\n")
    with pytest.raises(InputError, match=r"1 of 1 rows name ids .*1 user \('nobody'\)"):
        load_csv(films, tmp_path, "user,item,rank\nnobody,heat,1\n007,Jaws,2\n")
    with pytest.raises(InputError, match="row 2 has no item id"):
        load_csv(films, tmp_path, "user,item,rank\n007,heat,1\n007,,2\n")
    with pytest.raises(InputError, match="the column title: add --items_as=titles"):
        load_csv(films, tmp_path, "user,title,rank\n007,heat,1\n", items_as="ids")
    with pytest.raises(ConfigError, match="items_as"):
        preferences.import_scores(films, tmp_path / "lists.csv", "x", items_as="names")
