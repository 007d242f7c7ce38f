"""What is searched: text and files mean the same, and nothing is searched that a knob cannot be."""

from __future__ import annotations

import re
import tomllib

import pytest

from slgr_jax.errors import ConfigError
from slgr_jax.experiments.search_space import (
    Choice,
    Range,
    at_an_end,
    corners,
    make_space,
    split_text,
    wider,
)

TEXT = (
    "lr=1e-3..1e-1:log, layers=1..4,dropout=0..0.5,dim=32|64|128,item_bias=true|False,"
    "backbone=mf|lightgcn,lambda=.1|1"
)
FILE = """
lr = { low = 1e-3, high = 1e-1, log = true }
layers = "1..4"
dropout = { low = 0, high = 0.5 }
dim = [32, 64, 128]
item_bias = [true, false]
backbone = ["mf", "lightgcn"]
lambda_ = [0.1, 1]
"""
SPACE = {
    "lr": Range(1e-3, 1e-1, log=True),
    "layers": Range(1, 4),
    "dropout": Range(0.0, 0.5),
    "dim": Choice((32, 64, 128)),
    "item_bias": Choice((True, False)),
    "backbone": Choice(("mf", "lightgcn")),
    "lambda": Choice((0.1, 1.0)),
}


def test_flags_and_a_file_give_the_same_space():
    assert make_space(split_text(TEXT), {}) == SPACE
    assert make_space(tomllib.loads(FILE), {}) == SPACE
    assert make_space(SPACE, {}) == SPACE
    assert make_space({"mlp": [[200, 80], [64]]}, {}) == {"mlp": Choice(((200, 80), (64,)))}
    assert (SPACE["layers"].is_whole, SPACE["dropout"].is_whole) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to search"),
        ("lr", "'lr' is not NAME=VALUES"),
        ("lr=", "'lr=' is not NAME=VALUES"),
        ("lr=.1..1,lr=1|2", "lr is given twice"),
        ("lrr=.1..1", "no knob of this command is called 'lrr'; did you mean lr"),
        ("lr=-1..1", "lr=-1..1: --lr=-1.0 must be greater than 0"),
        ("lr=0..1:log", "must begin above 0"),
        ("lr=1..0.1", "the first end must be below the second"),
        ("lr=1..1", "the first end must be below the second"),
        ("lr=1..inf", "both finite"),
        ("lr=1..x", "'x' is not a number"),
        ("lr=.1..1:lin", "'lin' is no scale; there is :log"),
        ("dim=8..9.5", "'9.5' is not a whole number"),
        ("dim=0|8", "--dim=0 is below its minimum 1"),
        ("dropout=0..1", "--dropout=1.0 must be less than 1"),
        ("dim=8", "needs two values at least"),
        ("dim=8|8", "needs two values at least, each once"),
        ("dim=8|", "'' is not a whole number"),
        ("item_bias=yes|no", "'yes' is not true or false"),
        ("backbone=mf|lightgnc", "'lightgnc' is not one of: mf, lightgcn"),
        ("backbone=a..b", "backbone is no number; give choices"),
        ("mlp=8|16", "mlp holds lists; give them in a file"),
        ("seed=1|2", "seed cannot be searched; use --seeds"),
        ("ks=1|2", "ks cannot be searched"),
        ("early_stop_metric=mrr|ndcg@10", "early_stop_metric cannot be searched"),
        ("epochs=1..3", "--epochs is given and searched"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_space(split_text(text), {"epochs": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 1}, "is no range"),
        ({"low": 1, "high": 2, "step": 1}, "is no range"),
        ({"low": "1", "high": 2}, 'lr = "1" is text; --lr takes a number'),
        ([0.1, "x"], 'lr = "x" is text; --lr takes a number'),
        (3, "is no range"),
    ],
)
def test_a_table_of_another_form_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_space({"lr": values}, {})


def test_corners_hold_every_end_and_every_choice():
    seen = corners(SPACE)
    for name, of in SPACE.items():
        ends = of.values if isinstance(of, Choice) else (of.low, of.high)
        assert {point[name] for point in seen} == set(ends)


@pytest.mark.parametrize(
    ("name", "value", "at_end"),
    [
        ("lr", 0.00105, True),
        ("lr", 0.0096, True),
        ("lr", 0.0012, False),  # the middle of a linear scale would be far away
        ("layers", 5, True),
        ("layers", 3, False),
        ("dropout", 0.001, False),  # nothing is below 0
        ("dropout", 0.499, True),
        ("dim", 32, True),
        ("dim", 64, False),
        ("backbone", "mf", False),
    ],
)
def test_the_end_of_a_range_is_told(name, value, at_end):
    space = {
        "lr": Range(1e-3, 1e-2, log=True),
        "layers": Range(2, 5),
        "dropout": Range(0.0, 0.5),
        "dim": Choice((32, 64, 128)),
        "backbone": Choice(("mf", "lightgcn")),
    }
    middle = {"lr": 3e-3, "layers": 3, "dropout": 0.2, "dim": 64, "backbone": "lightgcn"}
    ends = at_an_end(space, middle | {name: value})
    assert [end.split()[0] for end in ends] == ([name] if at_end else [])


@pytest.mark.parametrize(
    ("name", "of", "side", "expected"),
    [
        ("lr", Range(1e-3, 1.0, log=True), 1, (Range(1e-3, 10.0, log=True), 3.162)),
        ("lr", Range(1e-3, 1.0, log=True), 0, (Range(1e-4, 1.0, log=True), 3.162e-4)),
        ("dropout", Range(0.0, 0.6), 1, (Range(0.0, 0.8), 0.7)),
        ("dropout", Range(0.0, 0.9), 1, (Range(0.0, 0.95), 0.95)),  # below 1
        ("hard_share", Range(0.1, 0.9), 1, (Range(0.1, 1.0), 0.95)),  # 1 itself
        ("hard_share", Range(0.1, 1.0), 1, None),
        ("layers", Range(1, 4), 1, (Range(1, 5), 5)),
        ("dim", Choice((32, 64, 128)), 1, (Choice((32, 64, 128, 256)), 256)),
        ("dim", Choice((32, 64, 128)), 0, (Choice((16, 32, 64, 128)), 16)),
        ("dim", Choice((1, 2)), 0, None),
    ],
)
def test_a_range_is_wider_by_a_third_of_it(name, of, side, expected):
    assert wider(name, of, side) == expected
