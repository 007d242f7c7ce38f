"""What a gate reads of how much a teacher knows, against plain Python over the product's rows."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax.config import (
    GateConfig,
    GuidanceConfig,
    ModelConfig,
    PairwiseConfig,
    SamplerConfig,
    TrainConfig,
)
from slgr_jax.data import schema
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import teacher_knowledge
from slgr_jax.sampling.context import Queries
from slgr_jax.sampling.preferences import Preferences, pair_facts
from slgr_jax.sampling.teacher_arrays import teacher_pairs
from slgr_jax.serving.trained_run import load
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, loop, step

pytestmark = pytest.mark.usefixtures("one_device")

N_USERS, N_ITEMS = 24, 30
NOTHING = teacher_pairs(np.zeros(0), np.zeros((0, 2)), np.zeros(0))
INPUTS = "history,teacher,votes,confidence,named,named_gap"


def _products(path):
    """A dataset with free lists of probabilities `t`, and what they say: pair -> (score, votes)."""
    dataset = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, per_user=12)
    rng = np.random.default_rng(0)
    words = {
        (user, int(item)): (float(np.float32(score)), float(np.float32(votes)))
        for user in range(N_USERS)
        for item, score, votes in zip(
            rng.choice(N_ITEMS, 9, replace=False, p=_popular()),
            rng.random(9),
            rng.uniform(0.3, 1.0, 9),
            strict=True,
        )
    }
    users, items = (np.array(column, np.int32) for column in zip(*words, strict=True))
    scores, votes = (np.array(x, np.float32) for x in zip(*words.values(), strict=True))
    shuffled = rng.permutation(users.size)  # their order says nothing
    table = pa.table([users, items, votes], schema=schema.TEACHER_VOTES).take(shuffled)
    provenance = preferences.Provenance(unlisted="below", score_kind="prob")
    rows = pa.table([users, items, scores], schema=schema.TEACHER_SCORES)
    preferences.write_product(dataset, "t", rows, provenance=provenance, votes=table)
    return dataset, words


def _popular():
    weights = 1.0 / (np.arange(N_ITEMS) + 2.0)
    return weights / weights.sum()


def _run(dataset, workdir, *, guidance=None, **gate):
    return worlds.run_config(
        dataset,
        workdir,
        model=ModelConfig(dim=4),
        sampler=SamplerConfig(batch_size=64),
        guidance=GuidanceConfig(**{"guidance": "pairwise", "teacher": "t"} | (guidance or {})),
        gate=GateConfig(**{"gate": "calibrated", "gate_inputs": INPUTS} | gate),
        train=TrainConfig(kernels="xla"),
    )


def _named(words):
    """Standardised log(1 + lists with the item), by the formula."""
    logs = [math.log(1 + sum(item == i for _, item in words)) for i in range(N_ITEMS)]
    mean = sum(logs) / N_ITEMS
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / N_ITEMS)
    return [(x - mean) / spread for x in logs]


def _expected(words, users, items):
    of_word = [
        [words.get((u, i), (0.5, 0.0)) for i in row] for u, row in zip(users, items, strict=True)
    ]
    votes = [[votes for _, votes in row] for row in of_word]
    confidence = [[abs(2 * score - 1) for score, _ in row] for row in of_word]
    named = _named(words)
    return votes, confidence, [[named[i] for i in row] for row in items]


def _check(known, words, users, items):
    expected = _expected(words, users.tolist(), items.tolist())
    for found, wanted in zip((known.votes, known.confidence, known.named), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hard_negatives", [0, 5])
def test_what_is_drawn_is_known_as_the_product_says(tmp_path, hard_negatives):
    """Of preferences and labelled ones, over unlisted items (votes and confidence 0) and hard
    negatives; a finished run is told the same by user and item."""
    dataset, words = _products(tmp_path / "d")
    run = _run(dataset, tmp_path / "r")
    if hard_negatives:
        plain = worlds.run_config(dataset, tmp_path / "n", model=ModelConfig(dim=4))
        plain = dataclasses.replace(plain, train=TrainConfig(epochs=1, kernels="xla"))
        loop.train(plain)
        gate = {"reference_runs": plain.workdir, "gate_inputs": INPUTS + ",reference"}
        run = _run(dataset, tmp_path / "r", **gate)
        run = dataclasses.replace(run, pairwise=PairwiseConfig(hard_negatives=hard_negatives))
    experiment = build.build(run, dataset, worlds.one_device())
    guidance, arrays = experiment.trainer.guidance, experiment.arrays
    keys = jax.random.split(jax.random.key(3), 1)
    drawn = jax.tree.map(lambda x: x[0], step.draw_steps(experiment.trainer, keys, arrays)[1])
    unlisted = 0
    for pairs in (drawn.pairs, drawn.labelled):
        users, items = np.asarray(pairs.queries.users), np.asarray(pairs.items)
        known = guidance.gating._known(arrays.guidance.gate, pairs)
        _check(known, words, users, items)
        _check(teacher_knowledge.of_pairs(run, dataset, users, items), words, users, items)
        rows = zip(users.tolist(), items.tolist(), strict=True)
        unlisted += sum((user, item) not in words for user, row in rows for item in row)
    assert unlisted > 20


@pytest.mark.slow
def test_a_gate_learns_from_votes_whom_to_believe(tmp_path):
    """Of a teacher that is right where its answers agree, and wrong where they do not, alpha of a
    finished run is above one half for the former and below for the latter."""
    n_users = 160
    rng = np.random.default_rng(1)
    pairs = worlds.random_pairs(0, n_users, N_ITEMS, 8)
    by_user = pairs.reshape(n_users, 8, 2)
    dataset = worlds.write_dataset(
        tmp_path / "d",
        by_user[:, :5].reshape(-1, 2),
        by_user[:, 5:7].reshape(-1, 2),
        by_user[:, 7:].reshape(-1, 2),
        n_users=n_users,
        n_items=N_ITEMS,
    )
    rows, votes = [], []
    for user in range(n_users):
        sure = rng.random() < 0.5
        chosen, others = (
            by_user[user, 5:7, 1],
            np.setdiff1d(np.arange(N_ITEMS), by_user[user, :, 1]),
        )
        for item, right in ((chosen[0], True), (others[0], False), (others[1], False)):
            rows.append((user, item, float(right == sure)))
            votes.append((user, item, 1.0 if sure else 0.4))
    users, items, scores = (np.array(x) for x in zip(*rows, strict=True))
    of_votes = pa.table([users, items, np.array(votes)[:, 2]], names=["user", "item", "votes"])
    table = pa.table([users, items, scores], names=["user", "item", "score"])
    preferences.write_product(
        dataset,
        "t",
        table.cast(schema.TEACHER_SCORES),
        provenance=preferences.Provenance(),
        votes=of_votes.cast(schema.TEACHER_VOTES),
    )
    run = _run(dataset, tmp_path / "r", gate_inputs="votes", gate_lr=0.1, gate_hidden=0)
    train = TrainConfig(epochs=12, eval_every=12, kernels="xla")
    loop.train(dataclasses.replace(run, train=train))
    finished = load(run.workdir)
    # Of each user's three rows the first and the second differ; the higher score is preferred.
    order = np.argsort(-scores.reshape(n_users, 3)[:, :2], axis=1)
    pairs = np.take_along_axis(items.reshape(n_users, 3)[:, :2], order, axis=1)
    alpha = finished.believe(np.arange(n_users), pairs, np.ones(n_users, np.float32))
    agreed = np.array(votes)[::3, 2] == 1.0
    assert alpha[agreed].mean() > 0.8
    assert alpha[~agreed].mean() < 0.3


def test_what_a_product_does_not_have_is_refused_with_a_fix(tmp_path):
    dataset, _ = _products(tmp_path / "d")
    rows = np.arange(6, dtype=np.int32)
    users, items = np.divmod(np.arange(2 * N_ITEMS), N_ITEMS)
    worlds.teach(dataset, users, items, np.linspace(-1, 3, users.size), name="asked")
    stated = pa.table(
        [rows // 3, rows, rows + 6, np.ones(6, np.float32)], schema=schema.TEACHER_PREFERENCES
    )
    provenance = preferences.Provenance()
    preferences.write_product(dataset, "stated", stated, provenance=provenance)

    def refused(words, inputs, teacher="asked", entries=True, **more):
        run = _run(
            dataset, tmp_path / "r", guidance={"teacher": teacher} | more, gate_inputs=inputs
        )
        with pytest.raises(ConfigError, match=words) as error:
            teacher_knowledge.arrays(run, dataset, NOTHING, entries=entries)
        assert "\n" not in str(error.value)

    refused(r"no probabilities; drop confidence, or ask with --prompt=pointwise", "confidence")
    refused(r"teacher asked scored what it was asked about.*drop named and named_gap", "named")
    refused(r"teacher stated states pairs, and votes are of scored items", "votes", "stated")
    refused(r"--guidance=rrd does not say which entries.*use --guidance=pairwise", "votes", "t",
            entries=False, guidance="rrd")  # fmt: skip
    run = _run(dataset, tmp_path / "r", guidance={"teacher": "asked"}, gate_inputs="votes")
    with pytest.raises(ConfigError, match=r"asked does not hold how far .*slgr teach combine"):
        build.build(run, dataset, worlds.one_device())
    with pytest.raises(ConfigError, match=r"--user_shards=2: --gate_inputs=votes are of whole"):
        dataclasses.replace(run, train=dataclasses.replace(run.train, user_shards=2))
    none = _run(dataset, tmp_path / "r", gate_inputs="history")
    assert teacher_knowledge.arrays(none, dataset, NOTHING, entries=True) is None
    assert teacher_knowledge.of_pairs(none, dataset, rows, rows[:, None]) is None


def test_gates_that_read_nothing_of_it_are_told_nothing(tmp_path):
    """0, whatever the shape, so that a gate of one's own reads numbers."""
    dataset, _ = _products(tmp_path / "d")
    run = _run(dataset, tmp_path / "r", gate_inputs="history")
    experiment = build.build(run, dataset, worlds.one_device())
    assert experiment.arrays.guidance.gate.knowledge is None
    users, items = jnp.zeros(4, jnp.int32), jnp.zeros((4, 2), jnp.int32)
    facts = pair_facts(experiment.arrays.interactions.facts, users, items)
    pairs = Preferences(Queries(users), items, jnp.ones(4), facts)
    assert experiment.trainer.guidance.gating._known(experiment.arrays.guidance.gate, pairs) is None
