"""Titles in any dress mean their item or none, and never another one."""

from __future__ import annotations

import collections
import re
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st

from slgr_jax.teacher.products import titles
from slgr_jax.teacher.products.titles import Match, TitleIndex, normal

ALIENS = ["Alien", "Aliens", "Alien (1979)", "Alien: Resurrection", "The Alien"]


def means(text, catalogue=ALIENS, **options):
    """The title of the item that a title means, or how it means none."""
    (match,) = TitleIndex(catalogue).match([text], **options)
    assert (match.item >= 0) == (match.how in ("exact", "normalised", "subtitle"))
    return catalogue[match.item] if match.item >= 0 else match.how


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Alien", "Alien"),
        ("ALIEN", "Alien"),
        ("“Alien”", "Alien"),
        ("**Alien** (1979)", "Alien (1979)"),
        ("alien [1979]", "Alien (1979)"),
        ("Alien (1979) 4.5/5", "Alien (1979)"),
        ("Alien (1979) - a crew meets a guest", "Alien (1979)"),
        ("Alien (Ridley Scott, 1979)", "absent"),  # nobody knows that Scott is no subtitle
        ("the alien", "The Alien"),
        ("Alien, The", "The Alien"),
        ("A. liens", "absent"),
        ("Alien – Resurrection", "Alien: Resurrection"),
        ("ALIEN RESURRECTION (1997)", "Alien: Resurrection"),
        ("Alien: Covenant", "absent"),
        ("Alien - Covenant", "absent"),
        ("Alien 3", "absent"),
        ("The Alien (1979)", "ambiguous"),  # The Alien, of 1979, or Alien (1979)
        ("The Aliens", "Aliens"),
        ("", "absent"),
        ("(1979)", "absent"),
    ],
)
def test_near_duplicates(text, meant):
    assert means(text) == meant


def test_a_year_breaks_ties_and_is_never_contradicted():
    kids = ["Kid, The (1921)", "Kid (1990)", "Heat (1995)", "Ran"]
    assert means("The Kid (1921)", kids) == "Kid, The (1921)"
    assert means("Kid (1990)", kids) == "Kid (1990)"
    assert means("the kid", kids) == "ambiguous"
    assert means("Heat", kids) == "Heat (1995)"
    assert means("Heat (1986)", kids) == "absent"
    assert means("Ran (1985)", kids) == "Ran"
    cuts = ["The Alien", "Alien (Final Cut) (1979)"]
    assert means("Alien (1979)", cuts) == cuts[1]
    assert means("Heat", ["Heat (1986)", "Heat (1995)"]) == "ambiguous"
    assert means("Heat", ["Heat", "Heat"]) == "ambiguous"


def test_a_subtitle_is_left_out_where_the_year_says_so_or_the_user():
    catalogue = ["Mad Max: Fury Road (2015)", "Sapiens: A Brief History", "X: 1", "X: 2"]
    assert means("Mad Max (2015)", catalogue) == "Mad Max: Fury Road (2015)"
    assert means("Mad Max (1979)", catalogue, subtitles=True) == "absent"
    assert means("Mad Max", catalogue) == "shortened"
    assert means("Sapiens", catalogue) == "shortened"
    assert means("Sapiens", catalogue, subtitles=True) == "Sapiens: A Brief History"
    assert means("X", catalogue, subtitles=True) == "ambiguous"
    assert means("Alien: Covenant", ["Alien"], subtitles=True) == "absent"


def test_brackets_are_left_out_unless_they_number_or_contradict():
    books = ["Foundation (Foundation, #1)", "Kill Bill (Vol. 2)", "C++", "C"]
    assert means("foundation", books) == "Foundation (Foundation, #1)"
    assert means("Foundation (Empire, #2)", books) == "absent"
    assert means("Kill Bill", books) == "absent"
    assert means("Kill Bill Vol 2", books) == "Kill Bill (Vol. 2)"
    assert means("c++", books) == "C++"
    assert means("C#", books) == "absent"


def test_an_author_is_left_out_where_the_item_or_the_whole_list_has_one():
    index = TitleIndex(["Dune", "Emma", "Alien", "It", "Ran"], ["Frank Herbert", "", "", "", ""])
    one = index.match(["Dune - Frank Herbert", "Dune by Frank Herbert", "Emma - Jane Austen"])
    assert [match.item for match in one] == [0, 0, -1]
    written = ["Emma", "It", "Ran", "Dune", "Alien"]
    for between in (" by ", " - ", " — "):
        with_authors = index.match([f"{title}{between}Some Body" for title in written])
        assert [match.item for match in with_authors] == [1, 3, 4, 0, 2]
    twice = index.match([*(f"{title} by Some Body" for title in written), "emma by some body"])
    assert [match.item for match in twice] == [1, 3, 4, 0, 2, 1]
    franchise = index.match([f"Alien - {name}" for name in ("One", "Two", "Three", "Four", "Five")])
    assert {match.how for match in franchise} == {"absent"}


def test_accents_go_and_letters_stay():
    assert normal("Amélie") == "amelie"
    assert normal("Wall·E & Æon!") == "wall e and æon"
    assert normal("ガラス") != normal("カラス")  # glass, and a crow
    assert normal("й") != normal("и")
    assert means("Léon", ["Leon"]) == "Leon"
    assert means("*NSYNC", ["NSYNC", "*NSYNC"]) == "*NSYNC"


def test_counts_are_of_all_titles():
    how = collections.Counter({"exact": 2, "ambiguous": 1, "absent": 1})
    counts = titles.counts(how)
    assert counts["titles"] == 4 == sum(counts[f"titles_{kind}"] for kind in titles.HOW)
    assert "2 (50.0%) an item's title to the letter" in titles.report(counts)
    assert titles.report({}) == ""
    assert Match(-1, "absent") == TitleIndex([None, " "]).match(["x"])[0]


# --- any title, any dress ----------------------------------------------------------------------

NAMES = ("Alien", "Aliens", "Léon", "Kid", "Kid Alien", "Don't Look", "电影", "M*A*S*H")
SUBTITLES = ("", "Resurrection", "Kid", "Part Two")
WORKS = [(name, sub) for name in NAMES for sub in SUBTITLES]
YEARS = {work: 1950 + k for k, work in enumerate(WORKS)}
works = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from(SUBTITLES),
    st.booleans(),  # an article
    st.sampled_from((0, 50, None)),  # the year, a remake, no year
)


def title_of(work, *, behind=False):
    name, sub, article, later = work
    name = (f"{name}, The" if behind else f"The {name}") if article else name
    year = f" ({YEARS[work[0], sub] + later})" if later is not None else ""
    return name + (f": {sub}" if sub else "") + year


def swapped_quotes(text):
    return "“" + text.replace("'", "’") + "”"


KEEPING = {
    "upper": str.upper,
    "lower": str.lower,
    "quotes": swapped_quotes,
    "bold": lambda text: f"**{text}**",
    "dash": lambda text: text.replace(": ", " – "),
    "spaces": lambda text: "  " + text.replace(" ", "  "),
    "full stop": lambda text: text + "." if not text.endswith(")") else text,
    "accents": lambda text: "".join(
        c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)
    ),
    "plot": lambda text: text + " - it ends well" if text.endswith(")") else text,
    "brackets": lambda text: text.replace("(", "[").replace(")", "]"),
}
LOSING = {
    "no year": lambda text: re.sub(r" \(\d+\)$", "", text),
    "no article": lambda text: text.replace("The ", "").replace(", The", ""),
}


def bare(text):
    """Letters and digits alone: equal where titles differ in nothing but dress."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"\W", "", plain.lower())


def may_be_one(first, second):
    """Whether two may be one work: the article is dress, and a missing year says nothing."""
    years = {first[3], second[3]} - {None}
    return first[:2] == second[:2] and len(years) < 2


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(works, min_size=1, max_size=12),
    works,
    st.booleans(),
    st.lists(st.sampled_from(sorted(KEEPING)), max_size=3),
    st.lists(st.sampled_from(sorted(LOSING)), max_size=2),
    st.booleans(),
)
def test_a_dressed_title_means_its_item_or_none(catalogue, work, known, dresses, lost, behind):
    if known:
        work = catalogue[0]
    else:
        hypothesis.assume(not any(may_be_one(work, other) for other in catalogue))
        lost = []  # without its year it would be another title
    text = title_of(work, behind=behind and not work[1])
    for name in lost:
        text = LOSING[name](text)
    said = bare(text)
    for name in dresses:
        text = KEEPING[name](text)

    shown = [title_of(other) for other in catalogue]
    (match,) = TitleIndex(shown).match([text])
    same_words = [title for title in shown if bare(title) == said]
    if match.item < 0:
        whole = known and not lost and not behind
        assert not whole or (match.how == "ambiguous" and len(same_words) > 1), (text, shown)
    elif same_words:
        assert shown[match.item] in same_words, (text, shown)
    else:
        assert known, (text, shown)
        assert shown[match.item] == title_of(work), (text, shown)
