"""How RecBole is driven, on a stand-in for it: settings, files, turns."""

from __future__ import annotations

import itertools
import sys
import types

import numpy as np
import peers
import pytest
import synthetic

from slgr_jax import config
from slgr_jax.config import CLICK_BACKBONES, SEQUENCE_BACKBONES

TINY = synthetic.Size(users=60, items=40, interactions=600, fewest=2)


class Batch(list):
    """Rows of a batch; on a device at once."""

    def to(self, device):
        return self


class Model:
    """A model whose loss has no gradient; says how many batches it has learned from."""

    trained = 0

    def __init__(self, config, dataset):
        assert dataset == "the data"

    def to(self, device):
        assert device == "cpu"
        return self

    def train(self):
        pass

    def calculate_loss(self, interaction):
        Model.trained += 1
        return types.SimpleNamespace(backward=lambda: None)


class Loader(list):
    dataset = "the data"


def module(**names):
    return types.SimpleNamespace(**names)


@pytest.fixture
def asked(monkeypatch):
    """Settings that RecBole's Config was made of; a loader of four batches of 12 rows."""
    made_of = {}

    def make_config(*, model, dataset, config_dict):
        made_of.update(config_dict, model=model, dataset=dataset)
        with open(f"{config_dict['data_path']}/pairs/pairs.inter", encoding="ascii") as file:
            made_of["header"] = file.readline().split()
        return config_dict | {"device": "cpu", "MODEL_TYPE": "general"}

    optimizer = module(zero_grad=lambda: None, step=lambda: None)
    loader = Loader(Batch(range(12)) for _ in range(4))
    fakes = {
        "torch": module(set_num_threads=lambda n: None, cuda=module(is_available=lambda: False)),
        "pandas": module(Series=type("Series", (), {"agg": lambda self, how: how})),
        "recbole": module(),
        "recbole.config": module(Config=make_config),
        "recbole.data": module(
            create_dataset=lambda settings: "everything",
            data_preparation=lambda settings, data: (loader, None, None),
        ),
        "recbole.utils": module(
            get_model=lambda name: Model,
            get_trainer=lambda kind, name: lambda settings, model: module(optimizer=optimizer),
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(peers, "versions", lambda *names: dict.fromkeys(names, "0"))
    monkeypatch.setattr(peers.turns, "units_for", lambda seconds, work: 5)
    for name in ("float_", "complex_", "unicode_"):  # or they would stay in NumPy
        monkeypatch.setattr(np, name, object, raising=False)
    return made_of


def job_of(backbone, batch_size=0):
    run = config.make_run("", "", backbone=backbone)
    return {
        "backbone": backbone,
        "threads": 1,
        "batch_size": batch_size,
        "own_batch_size": 512,
        "negatives": 2,
        "seconds": 0.0,
        "knobs": {name: getattr(run.model, name) for name in vars(run.model)},
    }


@pytest.mark.parametrize("backbone", peers.RECBOLE)
def test_recbole_trains_its_namesake_on_our_pairs(asked, backbone):
    contestant = peers.recbole(synthetic.make(TINY), job_of(backbone))
    softmax, click = backbone in SEQUENCE_BACKBONES, backbone in CLICK_BACKBONES
    timed = softmax or backbone == "din"
    assert asked["model"] == contestant.facts["model"] == peers.RECBOLE[backbone][0]
    assert asked["header"] == ["user_id:token", "item_id:token", "timestamp:float"][: 2 + timed]
    assert asked["load_col"]["inter"] == ["user_id", "item_id", "timestamp"][: 2 + timed]
    assert ("item" in asked["load_col"]) == click
    assert asked["eval_args"]["order"] == ("TO" if timed else "RO")
    negatives = asked["train_neg_sample_args"]
    assert negatives is None if softmax else negatives["sample_num"] == 2
    assert contestant.facts["batch_size"] == (512 if backbone == "lightgcn" else 2048)
    assert peers.recbole(synthetic.make(TINY), job_of(backbone, 64)).facts["batch_size"] == 64


def test_a_turn_of_recbole_learns_from_whole_batches(asked, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(peers.time, "perf_counter", lambda: float(next(clock)))
    contestant = peers.recbole(synthetic.make(TINY), job_of("deepfm"))
    before = Model.trained
    turn = contestant.turn()
    assert Model.trained - before == 5  # more than an epoch: it starts anew
    # A triple is a row of label 1 and two of label 0.
    assert (turn.triples, turn.seconds) == (5 * 12 / 3, 1.0)
