"""Losses that count nothing, and those that an LLM's scores keep."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from numpy.testing import assert_allclose

import slgr_jax
from slgr_jax.config import CandidateConfig, HardnessConfig, make_run
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import make_layout
from slgr_jax.teacher.products import preferences
from slgr_jax.training import (
    checkpoint,
    dropping,
    hard_candidates,
    restore,
    run_directory,
    step,
)
from slgr_jax.training.build import build
from slgr_jax.training.dropping import Dropped
from slgr_jax.training.state import abstract_state, init_state

pytestmark = pytest.mark.usefixtures("one_device")
N_USERS, N_ITEMS, DIM = 16, 40, 8
KNOBS = {
    **{"backbone": "mf", "item_bias": False, "dim": DIM, "batch_size": 32, "l2": 0.0},
    **{"table_optimizer": "sgd", "lr": 0.5, "init_std": 2.0, "loss": "bpr"},
    **{"drop_share": 0.5, "drop": "hardest", "keep_hard": "s", "hard_steps": 100},
    **{"negatives": "scored", "hard_share": 1.0},
}
ROWS = {"loss": "bce", "rating_threshold": 3.0, "negatives": "uniform", "hard_share": 0.5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A product `s` of scores from 0 to 10: of most training interactions, and of other items."""
    path = tmp_path_factory.mktemp("dropping") / "d"
    dataset = worlds.random_dataset(path, n_users=N_USERS, n_items=N_ITEMS, ratings=True)
    rng, train = np.random.default_rng(0), dataset.positives(("train",))
    pairs = [
        (user, item)
        for user in range(N_USERS)
        for item in range(N_ITEMS)
        if rng.random() < (0.8 if item in train.row(user) else 0.3)
    ]
    users, items = np.array(pairs).T
    worlds.teach(dataset, users, items, rng.integers(0, 41, users.size) / 4, name="s")
    return dataset


def _stated(dataset):
    """(user, item) -> score, in plain Python."""
    teacher = preferences.load(dataset, "s")
    users = np.repeat(np.arange(N_USERS), np.diff(teacher.offsets))
    keys = zip(users.tolist(), teacher.items.tolist(), strict=True)
    return dict(zip(keys, teacher.scores.tolist(), strict=True))


def _experiment(dataset, layout=None, **knobs):
    run = make_run(str(dataset.path), "r", **KNOBS | knobs)
    return build(run, dataset, layout or worlds.one_device())


def _first_batch(experiment):
    keys = jax.random.split(jax.random.fold_in(jax.random.key_data(jax.random.key(1)), 0))
    drawn, _ = step.draw_steps(experiment.trainer, keys[:1], experiment.arrays)
    return jax.device_get(jax.tree.map(lambda x: x[0], drawn))


def _stepped(experiment, steps=1):
    trainer = experiment.trainer
    state = jax.jit(lambda: init_state(trainer, 0))()
    before = {n: np.asarray(state.tables[n])[:, :DIM] for n in ("user", "item")}
    key = trainer.layout.put(jax.random.key_data(jax.random.key(1)))
    count = trainer.layout.put(np.int32(steps))
    after, sums, _ = step.make_run_steps(trainer)(state, experiment.arrays, key, count)
    moved = {n: np.asarray(after.tables[n])[:, :DIM] - before[n] for n in before}
    return before, moved, {name: float(value) for name, value in sums.items()}


# ------------------------------------------------------------------------------------ definitions


def test_the_share_grows_as_published():
    dropped = Dropped(0.05, "hardest", worlds.one_device(), 5000)
    shares = [float(dropped.share_at(jnp.int32(at))) for at in (10, 100, 250, 1000)]
    assert_allclose(shares, [0.002, 0.02, 0.05, 0.05], rtol=1e-6)


def test_what_is_left_follows_the_share():
    loss, weights = jnp.arange(100.0), jnp.ones(100)
    dropped = Dropped(0.3, "hardest", worlds.one_device(), 100)
    for at, left in ((0, 100), (10, 90), (29, 71), (1000, 70)):
        kept = np.asarray(dropped.left(loss, weights, jnp.int32(at)))
        assert kept.tolist() == [1.0] * left + [0.0] * (100 - left)


def test_what_is_hard_is_as_defined():
    hardness = HardnessConfig(steps=100)
    scores = np.array([[8.0, 2.0], [8.0, 0.5], [5.0, 1.5], [3.0, 9.0], [6.5, 3.0], [7.5, 1.0]])
    labels = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    for at, pair, positive, negative in ((0, 7, 8, 4), (150, 5.5, 6.5, 2.5), (10**6, 3, 6, 2)):
        now = jnp.int32(at)
        hard = dropping.is_hard(jnp.asarray(scores), None, hardness, now)
        assert hard.tolist() == (scores[:, 0] - scores[:, 1] < pair).tolist()
        hard = dropping.is_hard(jnp.asarray(scores[:, :1]), jnp.asarray(labels), hardness, now)
        expected = [s < positive if y else s > negative for s, y in zip(scores[:, 0], labels)]  # noqa: B905
        assert hard.tolist() == expected
    at_once = dropping.is_hard(jnp.asarray(scores), None, HardnessConfig(steps=0), jnp.int32(0))
    assert at_once.tolist() == (scores[:, 0] - scores[:, 1] < 3).tolist()


def test_scores_are_looked_up(dataset):
    scored, stated = _experiment(dataset).arrays.interactions.scored, _stated(dataset)
    users = np.repeat(np.arange(N_USERS), N_ITEMS).astype(np.int32)
    items = np.tile(np.arange(N_ITEMS), N_USERS).astype(np.int32)
    at = dropping.find(scored, jnp.asarray(users), jnp.asarray(items)[:, None])
    scores, known = dropping.look_up(scored, at)
    pairs = list(zip(users.tolist(), items.tolist(), strict=True))
    assert known[:, 0].tolist() == [pair in stated for pair in pairs]
    assert scores[:, 0].tolist() == [stated.get(pair, 0.0) for pair in pairs]


# --------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_a_step_learns_what_is_left_and_what_is_hard(dataset, kernels):
    experiment, stated = _experiment(dataset, kernels=kernels), _stated(dataset)
    batch, train = _first_batch(experiment), dataset.positives(("train",))
    before, moved, sums = _stepped(experiment)
    users, items = batch.queries.users, batch.items
    scores = np.einsum("bd,bcd->bc", before["user"][users], before["item"][items])
    loss = np.log1p(np.exp(scores[:, 1] - scores[:, 0]))
    dropped, known, hard = set(np.argsort(loss)[16:].tolist()), [], []
    for user, (item, other) in zip(users.tolist(), items.tolist(), strict=True):
        assert (user, other) in stated  # negatives are of the scored items
        assert other not in train.row(user)
        known.append((user, item) in stated)
        hard.append(known[-1] and stated[user, item] - stated[user, other] < 7)
    kept = [lane in dropped and hard[lane] for lane in range(32)]
    assert 0 < sum(kept) < 16
    assert sums["dropped"] == 16
    assert sums["kept_hard"] == sum(kept)
    assert sums["dropped_unscored"] == sum(not known[lane] for lane in dropped) > 0
    weights = np.array([lane not in dropped or kept[lane] for lane in range(32)], float)
    assert sums["triples"] == weights.sum()
    assert sums["loss"] == pytest.approx((weights * loss).sum() / weights.sum(), rel=1e-4)
    slope = weights / (1 + np.exp(scores[:, 0] - scores[:, 1]))
    expected = {name: np.zeros_like(values) for name, values in before.items()}
    difference = before["item"][items[:, 0]] - before["item"][items[:, 1]]
    np.add.at(expected["user"], users, slope[:, None] * difference)
    np.add.at(expected["item"], items[:, 0], slope[:, None] * before["user"][users])
    np.add.at(expected["item"], items[:, 1], -slope[:, None] * before["user"][users])
    for name, values in expected.items():
        assert_allclose(moved[name], 0.5 * values, rtol=1e-3, atol=1e-5)


def test_rows_are_hard_by_their_label(dataset):
    experiment, stated = _experiment(dataset, **ROWS), _stated(dataset)
    batch = _first_batch(experiment)
    before, _, sums = _stepped(experiment)
    users, items, labels = batch.queries.users, batch.items[:, 0], batch.labels
    logits = np.einsum("bd,bd->b", before["user"][users], before["item"][items])
    loss = np.log1p(np.exp(np.where(labels > 0, -logits, logits)))
    dropped = np.argsort(loss)[16:].tolist()
    said = [stated.get((int(u), int(i))) for u, i in zip(users, items, strict=True)]
    hard = [s is not None and (s < 8 if y else s > 4) for s, y in zip(said, labels, strict=True)]
    assert set(labels.tolist()) == {0.0, 1.0}
    assert sums["kept_hard"] == sum(hard[lane] for lane in dropped)
    assert sums["dropped_unscored"] == sum(said[lane] is None for lane in dropped)
    assert 0 < sums["kept_hard"] < 16


def test_several_devices_have_the_numbers_of_one(dataset):
    knobs = {"drop_steps": 8, "hard_steps": 2}
    *_, alone = _stepped(_experiment(dataset, **knobs), 6)
    *_, both = _stepped(_experiment(dataset, make_layout(devices=jax.devices()[:2]), **knobs), 6)
    assert alone["dropped"] == sum(32 - np.floor((1 - min(t / 8, 0.5)) * 32) for t in range(6))
    assert both == pytest.approx(alone, rel=1e-4)


def test_a_run_reports_them_and_resumes_with_its_product_alone(dataset, tmp_path):
    copy = shutil.copytree(dataset.path, tmp_path / "d")
    knobs = KNOBS | {"epochs": 2, "drop_steps": 4}
    slgr_jax.train(copy, tmp_path / "r", **knobs)
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    record = next(line for line in lines if line.get("epoch") == 2)
    assert record["train/dropped"] >= record["train/kept_hard"] > 0
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["edited_by"]["keep_hard"]["product"] == "s"
    assert facts["train_pairs_scored"] == sum(
        item in dataset.positives(("train",)).row(user) for user, item in _stated(dataset)
    )
    users, items = np.array(list(_stated(dataset))[1:]).T
    shutil.rmtree(copy / "teacher" / "s")
    world = dataclasses.replace(dataset, path=copy)
    worlds.teach(world, users, items, np.arange(users.size) % 11.0, name="s")
    with pytest.raises(ConfigError, match="--keep_hard: s holds something else now"):
        slgr_jax.train(copy, tmp_path / "r", **knobs | {"epochs": 3})


# ------------------------------------------------------------------------- the filter by variance


def _filtered(experiment, steps):
    """A state after each of `steps` steps, with its batch and what the step reported."""
    trainer = experiment.trainer
    state = jax.jit(lambda: init_state(trainer, 0))()
    program = step.make_run_steps(trainer)
    key = trainer.layout.put(jax.random.key_data(jax.random.key(1)))
    one, out = trainer.layout.put(np.int32(1)), []
    for at in range(steps):
        keys = jax.random.split(jax.random.fold_in(key, at))
        batch, _ = step.draw_steps(trainer, keys[:1], experiment.arrays)
        tables = {name: np.asarray(state.tables[name])[:, :DIM] for name in ("user", "item")}
        batch = jax.device_get(jax.tree.map(lambda x: x[0], batch))
        state, sums, _ = program(state, experiment.arrays, key, one)
        out.append((batch, tables, {name: float(value) for name, value in sums.items()}))
    return jax.device_get(state), out


def _varying(rings, size, share):
    """Of lanes with a full ring the share of the greatest variance; of equals the first lane."""
    full = [lane for lane, scores in rings.items() if len(scores) >= size]
    by_variance = sorted(full, key=lambda lane: -np.var(rings[lane][-size:]))
    return set(by_variance[: int(np.ceil(share * len(full) - 1e-4))])


@pytest.mark.parametrize("kernels", ["auto", "xla"])
@pytest.mark.parametrize("rows", [False, True])
def test_the_filter_keeps_what_varies_and_is_hard(dataset, kernels, rows):
    """Every step against lists of all earlier scores, in plain Python."""
    share, size = 0.4, 3
    knobs = {"hard_variance_share": share, "hard_variance_scores": size, "lr": 0.05}
    experiment = _experiment(dataset, kernels=kernels, **(ROWS if rows else {}), **knobs)
    stated, train = _stated(dataset), dataset.positives(("train",))
    known = {**stated, **{(u, int(i)): None for u in range(N_USERS) for i in train.row(u)}}
    known |= stated
    state, steps = _filtered(experiment, 25)
    scored = {pair: [] for pair in known}
    drops = dict.fromkeys(known, 0)
    filtered = kept_hard = 0
    for at, (batch, tables, sums) in enumerate(steps):
        users, items = batch.queries.users, batch.items
        scores = np.einsum("bd,bcd->bc", tables["user"][users], tables["item"][items])
        if rows:
            sign = np.where(batch.labels > 0, 1, -1)
            loss = np.log1p(np.exp(-sign * scores[:, 0]))
        else:
            loss = np.log1p(np.exp(scores[:, 1] - scores[:, 0]))
        dropped = np.argsort(loss, kind="stable")[16:].tolist()
        pairs = [[(int(u), int(i)) for i in row] for u, row in zip(users, items, strict=True)]
        varies = set()
        for column in range(items.shape[1]):
            rings = {lane: scored.get(pairs[lane][column], []) for lane in sorted(dropped)}
            varies |= _varying(rings, size, share)
        hard = set()
        for lane in dropped:
            said = [stated.get(pair) for pair in pairs[lane]]
            if None in said:
                continue
            if not rows and said[0] - said[1] < max(7 - at / 100, 3):
                hard.add(lane)
            if rows:
                positive = batch.labels[lane] > 0
                low, high = max(8 - at / 100, 6), max(4 - at / 100, 2)
                hard |= {lane} if (said[0] < low if positive else said[0] > high) else set()
        new = [d for d in dropped if all(len(scored.get(p, [])) < size for p in pairs[d])]
        assert sums["dropped_new"] == len(new)
        assert sums["kept_hard"] == len(hard & varies)
        assert sums["dropped_steady"] == len(hard - varies)
        weights = np.array([d not in dropped or d in hard & varies for d in range(32)], float)
        assert sums["loss"] == pytest.approx((weights * loss).sum() / weights.sum(), rel=1e-4)
        filtered, kept_hard = filtered + len(hard - varies), kept_hard + len(hard & varies)
        drawn = {}
        for lane in range(32):
            for column, pair in enumerate(pairs[lane]):
                drawn.setdefault(pair, (scores[lane, column], lane in dropped))
        for pair, (score, was_dropped) in drawn.items():
            scored[pair].append(score)
            drops[pair] += was_dropped
    assert filtered > 10
    assert kept_hard > 10
    for at, pair in enumerate(sorted(known)):
        assert state.rings.times[at] == len(scored[pair])
        assert state.rings.dropped[at] == drops[pair]
        ring = [0.0] * size
        for place, score in enumerate(scored[pair]):
            ring[place % size] = score
        assert_allclose(state.rings.scores[at], ring, rtol=1e-3, atol=1e-4)


def test_rings_are_those_of_one_device_on_two(dataset):
    knobs = {"hard_variance_share": 0.4, "hard_variance_scores": 2, "lr": 0.05}
    alone, of_alone = _filtered(_experiment(dataset, **knobs), 12)
    layout = make_layout(devices=jax.devices()[:2])
    both, of_both = _filtered(_experiment(dataset, layout, **knobs), 12)
    for (*_, one), (*_, two) in zip(of_alone, of_both, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert both.rings.times.tolist() == alone.rings.times.tolist()
    assert both.rings.dropped.tolist() == alone.rings.dropped.tolist()
    assert_allclose(both.rings.scores, alone.rings.scores, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_remembers_its_scores(dataset, tmp_path):
    knobs = KNOBS | {"hard_variance_share": 0.5, "hard_variance_scores": 2, "epochs": 4}
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    slgr_jax.train(dataset.path, whole, **knobs)
    slgr_jax.train(dataset.path, halves, **knobs | {"epochs": 2})
    slgr_jax.train(dataset.path, halves, **knobs)
    states = []
    for workdir in (whole, halves):
        saved = checkpoint.Checkpoints(workdir, writable=False)
        run = run_directory.read_config(workdir)
        trainer = build(run, dataset, worlds.one_device()).trainer
        states.append(saved.restore_state(abstract_state(trainer)))
        saved.close()
    one, two = (jax.tree.leaves(state) for state in states)
    assert [x.tobytes() for x in jax.device_get(one)] == [x.tobytes() for x in jax.device_get(two)]
    assert (states[0].rings.times > 2).any()
    last = restore.restore_run(whole, "last")  # without the pairs of the product
    assert last.dataset.n_users == N_USERS


def test_a_run_begins_from_one_that_remembers(dataset, tmp_path):
    """The rings of another product are of other pairs: they begin anew."""
    knobs = KNOBS | {"hard_variance_share": 0.5, "epochs": 1}
    slgr_jax.train(dataset.path, tmp_path / "first", **knobs)
    pairs = list(_stated(dataset).items())[5:]
    users, items = np.array([pair for pair, _ in pairs]).T
    worlds.teach(dataset, users, items, np.array([score for _, score in pairs]), name="again")
    begun = knobs | {"keep_hard": "again", "init_from": str(tmp_path / "first")}
    slgr_jax.train(dataset.path, tmp_path / "second", **begun)
    slgr_jax.train(dataset.path, tmp_path / "third", **begun | {"hard_variance_share": 1.0})
    lines = (tmp_path / "second" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["train/dropped_new"] > 0


def test_a_run_says_what_to_ask_about_anew(dataset, tmp_path):
    """Against the run's own rings: those that were dropped often and vary least."""
    workdir = str(tmp_path / "r")
    knobs = {"hard_variance_share": 0.5, "hard_variance_scores": 2, "epochs": 6}
    slgr_jax.train(dataset.path, workdir, **KNOBS | knobs)
    none = {"hard_top": 0, "hard_uncertain": 0}
    options = CandidateConfig(run=workdir, doubtful=2, doubtful_drops=2, **none)
    proposed = hard_candidates.propose(dataset, options)["doubtful"]

    run = run_directory.read_config(workdir)
    saved = checkpoint.Checkpoints(workdir, writable=False)
    trainer = build(run, dataset, worlds.one_device()).trainer
    rings = jax.device_get(saved.restore_state(abstract_state(trainer)).rings)
    saved.close()
    stated, train = _stated(dataset), dataset.positives(("train",))
    pairs = sorted({*stated, *((u, int(i)) for u in range(N_USERS) for i in train.row(u))})
    most, drops = 0, 0
    for user in range(N_USERS):
        able = {
            item: np.var(rings.scores[at])
            for at, (owner, item) in enumerate(pairs)
            if owner == user and rings.times[at] >= 2 and rings.dropped[at] >= 2
        }
        assert set(proposed.row(user)) == set(sorted(able, key=able.get)[:2])
        most, drops = max(most, len(able)), drops + len(able)
    assert most > 2
    assert proposed.indices.size < drops
    assert any(item in train.row(user) for user in range(N_USERS) for item in proposed.row(user))

    plain = str(tmp_path / "plain")
    slgr_jax.train(dataset.path, plain, **KNOBS | {"epochs": 1})
    with pytest.raises(ConfigError, match=r"--doubtful=2: .*plain remembers no scores; train it"):
        hard_candidates.propose(dataset, dataclasses.replace(options, run=plain))


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"drop": "easiest"}, "nothing is dropped so; add --drop_share=0.1 --drop=hardest"),
        ({"drop_share": 0.0}, "nothing is dropped so; add --drop_share=0.1 --drop=hardest"),
        ({"negatives": "uniform"}, "add --negatives=scored --hard_share=1"),
        ({"keep_hard": ""}, "add --keep_hard=NAME --drop_share=0.1 --drop=hardest, or use uniform"),
        ({"negatives_per_positive": 2}, "drop --negatives_per_positive=2"),
        ({"loss": "bce", "rating_threshold": 3.0}, "no negative is drawn with"),
        ({"hard_pair_first": 2.0}, "--hard_pair_first=2 is below --hard_pair_last=3"),
        ({"user_shards": 4}, "--keep_hard=s is whole on each"),
        ({"edits": "n", "hard_share": 1.0}, "--negatives=scored may be a replacement"),
    ],
)
def test_what_does_not_go_together_is_refused(dataset, knobs, said):
    with pytest.raises(ConfigError, match=said):
        make_run(str(dataset.path), "r", **KNOBS | knobs)


def test_scores_that_say_nothing_are_refused(dataset, tmp_path):
    train = dataset.positives(("train",))
    own, other = int(train.row(0)[0]), next(i for i in range(N_ITEMS) if i not in train.row(0))
    user, both = np.array([0, 0]), np.array([own, other])
    worlds.teach(dataset, user[1:], both[1:], np.array([5.0]), name="others")
    worlds.teach(dataset, user[:1], both[:1], np.array([5.0]), name="own")
    worlds.teach(dataset, user, both, np.array([0.1, 0.9]), name="small")
    for name, said in (
        ("others", "scores no training interaction; import it with --keep_training_items"),
        ("own", "scores training interactions alone"),
        ("small", "from 0.1 to 0.9, of which all would be hard; give thresholds on their scale"),
    ):
        with pytest.raises(InputError, match=said):
            _experiment(dataset, keep_hard=name)
    scaled = _experiment(dataset, keep_hard="small", hard_pair_last=0.5)
    assert scaled.arrays.interactions.scored.scores.size == 2
    with pytest.raises(ConfigError, match="--hard_steps=5 is not used without --keep_hard"):
        slgr_jax.train(dataset.path, tmp_path / "r", hard_steps=5)
    with pytest.raises(ConfigError, match="--hard_variance_scores=3 is not used with"):
        slgr_jax.train(dataset.path, tmp_path / "r", **KNOBS, hard_variance_scores=3)
    with pytest.raises(ConfigError, match="--drop_steps=5 is not used with --drop_share=0"):
        slgr_jax.train(dataset.path, tmp_path / "r", drop_steps=5)
