"""A guidance and a gate of one's own, made outside the package; nobody else names a method."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from flax import struct

from slgr_jax import config, guidance
from slgr_jax.config import make_run
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import gates
from slgr_jax.guidance.base import GuidanceLoss, mean_over_queries
from slgr_jax.guidance.gating import Gating
from slgr_jax.models.candidates import Candidates
from slgr_jax.sampling import random_bits
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.negatives import below
from slgr_jax.sampling.preferences import at_the_end_of_training
from slgr_jax.teacher.products import preferences
from slgr_jax.training import loop, step
from slgr_jax.training.build import build
from slgr_jax.training.state import init_state

PACKAGE = pathlib.Path(config.__file__).parents[1]


@struct.dataclass
class Liked:
    """Items that the teacher scored 1, by user."""

    users: jax.Array
    items: jax.Array


@struct.dataclass
class Drawn:
    """One liked item of each user: [S, G] of S steps, [G] of one."""

    queries: Queries
    items: jax.Array


@dataclasses.dataclass(frozen=True)
class PullUp:
    """mean (sigmoid(s) - 1)^2 of one liked item a query: a guidance in forty lines."""

    run: config.RunConfig
    queries: int = 8

    width = 1
    metrics = ("error",)
    learning_rate = 0.01
    reads_stochastic = False
    reads_vectors = False
    queries_knob = "queries of PullUp"

    @property
    def gating(self):
        return Gating(self.run)

    def arrays(self, sources):
        teacher = preferences.load(sources.dataset, self.run.guidance.teacher)
        users = np.repeat(np.arange(sources.dataset.n_users), np.diff(teacher.offsets))
        liked = teacher.scores == 1
        return Liked(users[liked].astype(np.int32), teacher.items[liked].astype(np.int32)), None

    def init(self, key, backbone):
        return {"offset": jnp.zeros(())}

    def draw(self, words_of, arrays, interactions, histories):
        words = random_bits.words(words_of.own, 1, self.queries)[0]
        at = below(words, arrays.users.shape[0])
        queries = at_the_end_of_training(arrays.users[at], histories)
        return Drawn(queries, arrays.items[at])

    def candidates(self, drawn):
        return Candidates(drawn.queries, drawn.items[:, None])

    def masked(self, params, drawn, layout):
        return {}

    def observe(self, frozen, drawn, arrays, key):
        return None

    def loss(self, params, scored, drawn, observed, layout, key):
        error = jnp.square(jax.nn.sigmoid(scored.scores[:, 0] + params["offset"]) - 1.0)
        mean = mean_over_queries(error, layout)
        return GuidanceLoss(mean, jnp.float32(0.0), {"error": mean})


class Popular(nn.Module):
    """alpha = sigmoid(w popularity of the preferred item + b)."""

    @nn.compact
    def __call__(self, inputs):
        weight = self.param("weight", nn.initializers.zeros, ())
        return jax.nn.sigmoid(weight * inputs.popularity[:, 0])


@pytest.fixture(scope="module")
def registered():
    guidance.register("pull_up", lambda run, references, native: PullUp(run))
    gates.register("popular", lambda section: Popular())
    yield
    config.GUIDANCE.remove("pull_up")
    config.GATES.remove("popular")


def _dataset(path):
    dataset = worlds.random_dataset(path, n_users=24, n_items=30)
    lines = [f"u{u},i{i},{int(i % 2 == 0)}" for u in range(24) for i in range(10)]
    (path / "scores.csv").write_text("\n".join(["user,item,score", *lines]) + "\n")
    preferences.import_scores(dataset, path / "scores.csv", "t", keep_training_items=True)
    return dataset


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("backbone", ["mf", "deepfm"])
def test_a_guidance_of_ones_own_trains(tmp_path, registered, backbone, devices):
    dataset = _dataset(tmp_path / "d")
    knobs = {"guidance": "pull_up", "teacher": "t", "lambda": 20.0, "batch_size": 16, "mlp": (8,)}
    run = make_run(str(dataset.path), str(tmp_path / "r"), backbone=backbone, dim=8, **knobs)
    layout = worlds.one_device() if devices == 1 else None
    experiment = build(run, dataset, layout)
    state = init_state(experiment.trainer, 0)
    run_steps = step.make_run_steps(experiment.trainer)
    key, errors = jax.random.key_data(jax.random.key(0)), []
    for _ in range(2):
        state, sums, _ = run_steps(state, experiment.arrays, key, jnp.int32(60))
        errors.append(float(sums["error"]) / 60)
    assert errors[1] < errors[0] < 0.3
    assert float(state.params["guidance"]["offset"]) > 0


def test_a_gate_of_ones_own_weighs_pairs_and_resumes(tmp_path, registered):
    dataset = _dataset(tmp_path / "d")
    knobs = {"guidance": "pairwise", "teacher": "t", "gate": "popular", "batch_size": 16}
    run = make_run(str(dataset.path), str(tmp_path / "r"), dim=8, epochs=2, **knobs)
    assert loop.train(run).status == "finished"
    records = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert 0 < records[-1]["train/alpha"] < 0.5  # every gradient of a gated hinge lowers it
    assert loop.train(run).epoch == 2


def test_a_taken_or_unknown_name_is_refused(registered):
    with pytest.raises(ConfigError, match=r"--guidance=rrd is there already"):
        guidance.register("rrd", lambda *_: None)
    with pytest.raises(ConfigError, match=r"--gate=paper is there already"):
        gates.register("paper", lambda _: None)
    with pytest.raises(ConfigError, match=r"--guidance='other' is not one of: .*pull_up"):
        make_run("d", "w", guidance="other", teacher="t")


def test_no_module_outside_guidance_and_config_names_a_method():
    """The seam: adding a method touches its file, its registry line, its section."""
    names = [name for name in config.GUIDANCE if name not in ("none", "pull_up", "interactions")]
    # An everyday word, which is the method where it is a string or a section of knobs.
    methods = rf"\b({'|'.join(names)})\b|['\"]interactions['\"]|run\.interactions\b"
    named = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for room in ("training", "sampling", "models", "evaluation", "serving", "reports")
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(methods, line)
    ]
    assert named == []
