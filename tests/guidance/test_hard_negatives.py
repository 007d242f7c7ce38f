"""Hard negatives: which items complete a list, what is drawn among them, and who may ask for
them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import worlds

from slgr_jax import config
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import hard_negatives, teacher_product
from slgr_jax.guidance.base import Frozen, Sources
from slgr_jax.reports.run_evaluation import evaluate_run
from slgr_jax.sampling import labelled_preferences
from slgr_jax.sampling.negatives import generators
from slgr_jax.sampling.preferences import draw_pairs
from slgr_jax.teacher.products import preferences
from slgr_jax.training import build, loop, restore, step
from slgr_jax.training import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device")

N_USERS, N_ITEMS = 24, 30
MF = {"dim": 4, "init_std": 2.0, "batch_size": 32, "epochs": 2, "kernels": "xla"}
GUIDED = MF | {"guidance": "pairwise", "teacher": "t", "gate": "constant", "hard_negatives": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset, a teacher with lists of 4 for all but two users, and two runs without guidance."""
    root = tmp_path_factory.mktemp("world")
    dataset = worlds.random_dataset(root / "d", n_users=N_USERS, n_items=N_ITEMS, per_user=12)
    rng = np.random.default_rng(0)
    rows = [
        f"u{user},i{item},{score}"
        for user in range(2, N_USERS)
        for item, score in zip(rng.choice(N_ITEMS, 4, replace=False), rng.random(4), strict=True)
    ]
    path = root / "scores.csv"
    path.write_text("user,item,score\n" + "\n".join(rows) + "\n")
    for name, unlisted in (("t", "below"), ("asked", "unknown")):
        provenance = preferences.Provenance(unlisted=unlisted)
        preferences.import_scores(
            dataset, path, name, provenance=provenance, keep_training_items=True
        )
    for name, seed in (("a", 0), ("b", 1)):
        loop.train(config.make_run(str(dataset.path), str(root / name), seed=seed, **MF))
    return dataset, root / "a", root / "b"


def _scores(dataset, *members):
    """[U, I] mean scores of runs of matrix factorisation, from their tables."""
    found = []
    for member in members:
        values = jax.device_get(restore.restore_run(str(member)).serving.values)
        user, item = (values[name].astype(np.float64) for name in ("user", "item"))
        found.append(user[:, :-1] @ item[:, :-1].T + item[:, -1])
    return np.mean(found, axis=0)


def _members(dataset, *members):
    return restore.as_of([restore.restore_run(str(member)) for member in members], "valid")


def _taken(dataset, teacher):
    """[U, I] bool: listed or trained on."""
    taken = np.zeros((N_USERS, N_ITEMS), bool)
    taken[dataset.train.users, dataset.train.items] = True
    taken[np.repeat(np.arange(N_USERS), np.diff(teacher.offsets)), teacher.items] = True
    return taken


@pytest.mark.parametrize("several", [False, True])
def test_rivals_are_what_the_runs_rank_highest(world, several):
    dataset, *paths = world
    paths = paths if several else paths[:1]
    teacher = preferences.load(dataset, "t")
    found = hard_negatives.of_lists(dataset, teacher, _members(dataset, *paths), 5, kernels="xla")
    open_scores = np.where(_taken(dataset, teacher), -np.inf, _scores(dataset, *paths))
    best = np.argsort(-open_scores, axis=1)[:, :5]
    assert found.counts[:2].tolist() == [0, 0]  # nothing is listed for them
    for user in range(2, N_USERS):
        np.testing.assert_array_equal(found.row(user), np.sort(best[user]))


def test_a_user_with_few_items_left_has_those(world):
    dataset, one, _ = world
    teacher = preferences.load(dataset, "t")
    found = hard_negatives.of_lists(
        dataset, teacher, _members(dataset, one), N_ITEMS, kernels="xla"
    )
    left = ~_taken(dataset, teacher)
    for user in range(2, N_USERS):
        np.testing.assert_array_equal(found.row(user), np.flatnonzero(left[user]))


def test_a_list_is_completed_from_below(world):
    dataset, one, _ = world
    teacher = preferences.load(dataset, "t")
    found = hard_negatives.of_lists(dataset, teacher, _members(dataset, one), 5, kernels="xla")
    completed = hard_negatives.complete(teacher, found)
    floor = np.float32(teacher.scores.min() - teacher.scores.std())
    for user in range(N_USERS):
        mine = slice(*completed.offsets[user : user + 2])
        was = slice(*teacher.offsets[user : user + 2])
        listed = np.concatenate([found.row(user), teacher.items[was]])
        np.testing.assert_array_equal(completed.items[mine], listed)
        scores = np.concatenate([np.full(found.row(user).size, floor), teacher.scores[was]])
        np.testing.assert_allclose(completed.scores[mine], scores, rtol=1e-6)
        assert np.all(np.diff(completed.scores[mine]) >= 0)
    assert completed.manifest.unlisted == "unknown"


def test_only_lists_that_others_rank_below_have_rivals(world):
    dataset, one, _ = world
    asked = preferences.load(dataset, "asked")
    with pytest.raises(ConfigError, match=r"teacher asked are unknown.*--unlisted=below"):
        hard_negatives.complete(
            asked, hard_negatives.of_lists(dataset, asked, _members(dataset, one), 5)
        )


def test_preferences_are_drawn_among_list_and_rivals(world, tmp_path):
    """Uniformly over the entries of both; never against another item, never hard negative over
    listed."""
    dataset, one, _ = world
    run = config.make_run(str(dataset.path), str(tmp_path / "r"), **GUIDED, reference_runs=str(one))
    experiment = build.build(run, dataset)
    guidance, arrays = experiment.trainer.guidance, experiment.arrays.guidance
    teacher = preferences.load(dataset, "t")
    found = hard_negatives.of_lists(dataset, teacher, _members(dataset, one), 5, kernels="xla")
    rule = dataclasses.replace(guidance.rule, count=40_000)
    _, words_of = generators(jax.random.split(jax.random.key(0), 1))
    drawn = draw_pairs(words_of, arrays.teacher, rule)
    users, items = (np.asarray(x)[0] for x in drawn[:2])
    listed = np.zeros((N_USERS, N_ITEMS), bool)
    listed[np.repeat(np.arange(N_USERS), np.diff(teacher.offsets)), teacher.items] = True
    rival = np.zeros_like(listed)
    rival[np.repeat(np.arange(N_USERS), found.counts), found.indices] = True
    assert listed[users, items[:, 0]].all()
    assert (listed | rival)[users, items[:, 1]].all()
    # By hand for 4 listed (no ties) and 5 hard negatives: 5 of 9 begin with a hard negative, which
    # has 4 listed partners; of the others 5 of 8 partners are hard negatives.
    assert rival[users, items[:, 1]].mean() == pytest.approx(5 / 9 + 4 / 9 * 5 / 8, abs=0.01)
    # a gate without a reference does not score it again
    interactions = experiment.arrays.interactions
    assert guidance.draw(words_of, arrays, interactions, None).pairs.entries is None
    assert guidance.gating.reference_backbones == ()
    assert arrays.gate.reference_runs == ()


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_reference_runs_score_the_lists_once_and_steps_look_it_up(world, tmp_path, kernels):
    """What the gate is told of drawn and of labelled preferences is what the runs' tables say."""
    if kernels == "native":
        worlds.need_native_kernels()
    dataset, *paths = world
    inputs = {"gate": "calibrated", "gate_inputs": "reference,history,popularity,teacher"}
    knobs = GUIDED | inputs | {"kernels": kernels, "reference_runs": ",".join(map(str, paths))}
    run = config.make_run(str(dataset.path), str(tmp_path / "r"), **knobs)
    experiment = build.build(run, dataset)
    trainer, arrays = experiment.trainer, experiment.arrays
    assert arrays.guidance.gate.reference_runs == ()

    keys = jax.random.split(jax.random.key(1), 1)
    drawn = jax.tree.map(lambda x: x[0], step.draw_steps(trainer, keys, arrays)[1])
    state = state_lib.init_state(trainer, 0)
    frozen = Frozen(trainer.access, state.tables, state.params["backbone"], arrays.context, None)
    observed = trainer.guidance.observe(frozen, drawn, arrays.guidance, jax.random.key(0))

    by_run = np.stack([_scores(dataset, path) for path in paths])
    users, items = np.asarray(drawn.pairs.queries.users), np.asarray(drawn.pairs.items)
    expected = by_run[:, users[:, None], items]
    np.testing.assert_allclose(observed.reference_scores, expected, rtol=1e-4, atol=1e-5)
    users, items = np.asarray(drawn.labelled.queries.users), np.asarray(drawn.labelled.items)
    margins = np.diff(by_run[:, users[:, None], items], axis=-1)[..., 0].mean(axis=0)
    kept = np.asarray(drawn.labelled.weights) > 0
    assert kept.any()
    found = np.asarray(observed.labelled.reference_margin)
    np.testing.assert_allclose(found[kept], -margins[kept], rtol=1e-3, atol=1e-4)


def test_a_chosen_rival_is_labelled_against_the_teacher(world, tmp_path):
    """Each chosen item is labelled that is listed or a hard negative, and no other."""
    dataset, one, _ = world
    run = config.make_run(str(dataset.path), str(tmp_path / "r"), **GUIDED, reference_runs=str(one))
    members = _members(dataset, one)
    arrays = teacher_product.teacher_arrays(Sources(run, dataset, members[0][0], members))
    chosen = labelled_preferences.chosen_items(dataset, "valid")
    source = labelled_preferences.label_source(dataset, arrays, chosen)
    teacher = preferences.load(dataset, "t")
    completed = hard_negatives.complete(
        teacher, hard_negatives.of_lists(dataset, teacher, members, 5, kernels="xla")
    )
    owners = np.repeat(np.arange(N_USERS), np.diff(completed.offsets))
    inside = np.zeros((N_USERS, N_ITEMS), bool)
    inside[owners, completed.items] = True
    wanted = inside[chosen.users, chosen.items]
    assert 0 < wanted.sum() < wanted.size
    np.testing.assert_array_equal(source.labels.chosen, np.flatnonzero(wanted))


def test_rivals_need_runs_that_rank_them(world, tmp_path):
    dataset, one, _ = world
    where = (str(dataset.path), str(tmp_path / "r"))
    with pytest.raises(
        ConfigError, match=r"--hard_negatives=5 are ranked by trained runs.*--reference_runs=RUN"
    ):
        config.make_run(*where, **GUIDED)
    with pytest.raises(ConfigError, match=r"--hard_negatives=5 is not used with --guidance=none"):
        config.make_run(*where, **MF, hard_negatives=5)
    with pytest.raises(ConfigError, match="is not read with"):
        config.make_run(*where, **GUIDED | {"hard_negatives": 0}, reference_runs=str(one))


def test_a_run_with_rivals_trains_resumes_and_is_evaluated(world, tmp_path):
    """Its labelled test preferences are on lists with hard negatives; other reference runs
    are refused."""
    dataset, one, two = world
    knobs = GUIDED | {"gate": "calibrated", "gate_inputs": "reference,history,popularity,teacher"}
    where = (str(dataset.path), str(tmp_path / "r"))
    run = config.make_run(*where, **knobs, reference_runs=str(one))
    loop.train(run)
    gate = evaluate_run(run.workdir, "r").gate
    assert gate is not None
    assert 0 < gate["slices"]["overall"]["right"] < 1
    loop.train(config.make_run(*where, **knobs | {"epochs": 3}, reference_runs=str(one)))
    with pytest.raises(ConfigError, match="--reference_runs"):
        loop.train(config.make_run(*where, **knobs | {"epochs": 4}, reference_runs=str(two)))
