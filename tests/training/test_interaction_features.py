"""Features of interactions: a row's own in training and labelled rows, the last one's in lists."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import worlds

from slgr_jax import config, serving
from slgr_jax.config import make_run
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest import prepare
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import Scoring, ServingState, pair_scores
from slgr_jax.sampling import features as slots_lib
from slgr_jax.sampling import labelled_rows
from slgr_jax.sampling.batch import Batch
from slgr_jax.sampling.context import Queries, at_interactions, interaction_rows
from slgr_jax.training import build, loop, state, step

USERS, HOURS, LIKED = 30, 3, 10  # LIKED items an hour


def _log() -> list[tuple[str, str, int, str, str, str]]:
    """(user, item, time, hour, tags, price): what is liked depends on the hour and on nothing else.

    Times of users interleave; some tags and prices are missing.
    """
    rng, rows, clock = np.random.default_rng(0), [], 0
    for turn in range(8):
        for user in rng.permutation(USERS):
            hour = int(rng.integers(HOURS))
            item = LIKED * hour + (user + turn * 7) % LIKED
            tags = "|".join(f"t{t}" for t in range(3) if (clock >> t) % 2)
            price = "" if clock % 5 == 0 else str(clock / 4)
            rows.append((f"u{user}", f"i{item}", clock, f"h{hour}", tags, price))
            clock += 1
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("log")
    lines = [",".join(map(str, row)) for row in _log()]
    header = "user,item,timestamp,hour,tags,price"
    (root / "log.csv").write_text("\n".join([header, *lines]) + "\n")
    return root


def _prepared(folder: pathlib.Path, out: pathlib.Path, **knobs: object) -> Dataset:
    values = {
        "source": "csv",
        "input": str(folder / "log.csv"),
        "out": str(out),
        "interaction_features": "hour,tags:multi,price:numeric",
        "valid_fraction": 0.2,
        "test_fraction": 0.2,
        **knobs,
    }
    prepare.prepare(config.PrepareConfig(**values))  # type: ignore[arg-type]
    return dataset_lib.load(out)


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory) -> Dataset:
    return _prepared(folder, tmp_path_factory.mktemp("data") / "d")


def _first_rows() -> dict[tuple[str, str], tuple[int, str, str, str]]:
    """(user, item) -> what its earliest row says: that is the one which is kept."""
    kept: dict[tuple[str, str], tuple[int, str, str, str]] = {}
    for user, item, *rest in _log():
        kept.setdefault((user, item), tuple(rest))
    return kept


def _run(data: Dataset, workdir: pathlib.Path | str, **knobs) -> config.RunConfig:
    values = {"backbone": "deepfm", "dim": 4, "batch_size": 16, "epochs": 2, "patience": 0}
    values |= {"features": "all", "mlp": (8,), "dropout": 0.0, "kernels": "xla"}
    return make_run(str(data.path), str(workdir), **values | knobs)


def _pairs(data: Dataset, part: str) -> list[tuple[str, str]]:
    ids = data.items["item_id"].to_pylist()
    rows = data.part(part)
    return [(data.user_ids[u].as_py(), ids[i]) for u, i in zip(rows.users, rows.items, strict=True)]


def test_prepare_keeps_the_values_of_each_row(data):
    """Every row of every part has what the kept line of the file says, by plain loops."""
    features = {f.name: f for f in data.features}
    assert {f.side for f in data.features} == {"interaction"}
    kept, pairs = (
        _first_rows(),
        [p for part in ("train", "valid", "test") for p in _pairs(data, part)],
    )
    trained = [kept[pair] for pair in _pairs(data, "train")]
    assert features["hour"].values == ("h0", "h1", "h2")
    hours = [
        None if c is None else features["hour"].values[c]
        for c in features["hour"].column.to_pylist()
    ]
    assert hours == [kept[pair][1] for pair in pairs]
    tags = features["tags"]
    named = [None if c is None else [tags.values[k] for k in c] for c in tags.column.to_pylist()]
    assert named == [kept[pair][2].split("|") if kept[pair][2] else None for pair in pairs]
    prices = np.array([float(row[3]) for row in trained if row[3]])
    assert features["price"].mean == pytest.approx(prices.mean())
    assert features["price"].deviation == pytest.approx(prices.std())
    expected = [
        np.nan if not kept[p][3] else (float(kept[p][3]) - prices.mean()) / prices.std()
        for p in pairs
    ]
    np.testing.assert_allclose(features["price"].standardised(), expected, rtol=1e-5)


def test_they_decide_neither_split_nor_ids(folder, data, tmp_path):
    plain = _prepared(folder, tmp_path / "plain", interaction_features="")
    assert plain.features == ()
    for name in ("split_hash", "id_map_hash"):
        assert getattr(plain.manifest, name) == getattr(data.manifest, name)


def _hour_of_row(data: Dataset, experiment, rows) -> list[str | None]:
    """The hour that the slots of interactions name, read back through the table's rows."""
    slots = experiment.arrays.context.features.interaction
    names = [*next(f for f in data.features if f.name == "hour").values, None]
    return [names[int(r)] for r in np.asarray(slots.rows)[np.asarray(rows), 0]]


def test_training_rows_have_their_own_and_negatives_their_positives(data):
    experiment = build.build(_run(data, "run"), data, worlds.one_device())
    targets, kept = experiment.arrays.interactions.targets, _first_rows()
    assert targets is not None
    assert targets.interactions is not None
    ids = data.items["item_id"].to_pylist()
    for user, item, hour in zip(
        np.asarray(targets.users),
        np.asarray(targets.items),
        _hour_of_row(data, experiment, targets.interactions),
        strict=True,
    ):
        assert hour == kept[data.user_ids[int(user)].as_py(), ids[int(item)]][1]
    # A triple is one query with two candidates: one interaction for both.
    trainer = experiment.trainer
    before = state.init_state(trainer, 0)
    old = np.array(before.tables["interaction_feature"])
    after, sums, health = step.make_run_steps(trainer)(
        before, experiment.arrays, jax.random.key(0), jnp.int32(3)
    )
    assert int(health.step) == -1
    assert np.isfinite(float(sums["loss"]))
    moved = np.abs(np.asarray(after.tables["interaction_feature"]) - old)
    assert (moved[:3].max(axis=1) > 0).all()


def test_queries_without_one_have_the_last_before_their_moment(data):
    experiment = build.build(_run(data, "run"), data, worlds.one_device())
    context = experiment.arrays.context
    kept = _first_rows()
    pairs = {part: _pairs(data, part) for part in ("train", "valid")}
    users = np.arange(data.n_users, dtype=np.int32)
    for parts in (("train",), ("train", "valid")):
        as_of = sum(np.bincount(data.part(p).users, minlength=data.n_users) for p in parts)
        queries = Queries(jnp.asarray(users), jnp.asarray(as_of, jnp.int32))
        found = at_interactions(context, queries).interactions
        expected = []
        for user in data.user_ids.to_pylist():
            own = [kept[pair] for p in parts for pair in pairs[p] if pair[0] == user]
            expected.append(max(own)[1] if own else None)
        assert _hour_of_row(data, experiment, found) == expected
    nobody = Queries(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert _hour_of_row(data, experiment, at_interactions(context, nobody).interactions) == [None]


def test_a_score_is_the_network_on_the_rows_of_the_slots(data):
    """DeepFM's first-order term by hand: where factors are 0, a score is a sum of last entries."""
    run = _run(data, "run", history_fields=False, init_std=1.0)
    experiment = build.build(run, data, worlds.one_device())
    trainer, context = experiment.trainer, experiment.arrays.context
    backbone = trainer.backbone
    first = state.init_state(trainer, 3)
    served = state.make_serving_state(trainer)(first, context)
    values = {name: np.asarray(table, np.float64).copy() for name, table in served.values.items()}
    for table in values.values():
        table[:, :-1] = 0.0  # factors: what is left is first order, and the perceptron's bias
    scoring_values = {name: jnp.asarray(table, jnp.float32) for name, table in values.items()}
    rows = interaction_rows(data, "test")
    users, items = data.test.users, data.test.items
    scoring = Scoring(ServingState(served.params, scoring_values), context, None)
    queries = Queries(jnp.asarray(users), jnp.zeros(users.size, jnp.int32), jnp.asarray(rows))
    scores = np.asarray(
        pair_scores(backbone, scoring, Candidates(queries, jnp.asarray(items)[:, None]))
    )[:, 0]
    table, slots = values["interaction_feature"][:, -1], context.features.interaction
    by_hand = values["user"][users, -1] + values["item"][items, -1]
    kept = _first_rows()
    hour = next(f for f in data.features if f.name == "hour")
    tags = next(f for f in data.features if f.name == "tags")
    price = next(f for f in data.features if f.name == "price")
    tag0, price0 = len(hour.values) + 1, len(hour.values) + 1 + len(tags.values) + 1
    for k, pair in enumerate(_pairs(data, "test")):
        _, name, listed, number = kept[pair]
        by_hand[k] += table[hour.values.index(name)]
        chosen = [tag0 + tags.values.index(t) for t in listed.split("|") if t]
        by_hand[k] += table[chosen].mean() if chosen else table[tag0 + len(tags.values)]
        z = (float(number or 0) - price.mean) / price.deviation
        by_hand[k] += z * table[price0] if number else table[price0 + 1]
    constant = scores - by_hand  # the perceptron of zeros is the same everywhere
    np.testing.assert_allclose(constant, constant[0], atol=1e-5)
    assert np.std(by_hand) > 0.1
    assert slots.rows.shape[0] == len(data.train) + len(data.valid) + len(data.test) + 1


def test_labelled_rows_have_their_own_and_negatives_their_positives(data):
    rows = labelled_rows.sampled_rows(data, "test", negatives=2, min_history=0, seed=0)
    own = interaction_rows(data, "test")
    place = {
        (u, i): k for k, (u, i) in enumerate(zip(data.test.users, data.test.items, strict=True))
    }
    for begin in range(0, len(rows), 3):
        row = own[place[rows.users[begin], rows.items[begin]]]
        np.testing.assert_array_equal(rows.interactions[begin : begin + 3], row)
    everything = np.concatenate(
        [interaction_rows(data, part) for part in ("train", "valid", "test")]
    )
    assert sorted(everything) == list(range(everything.size))


def test_a_model_learns_what_the_hour_decides_and_lists_in_a_context(data, tmp_path):
    with worlds.runs_on(1):
        knobs = {"epochs": 100, "lr": 0.05, "features": "hour", "history_fields": False}
        run = _run(data, tmp_path / "run", **knobs)
        loop.train(run)
        trained = serving.trained_run.load(str(tmp_path / "run"), "last")
        by_hour = {
            h: trained.in_context({"hour": f"h{h}"}).recommend(k=4, mask_seen=False)
            for h in range(HOURS)
        }
        plain = trained.recommend(k=4, mask_seen=False)
    liked = {h: {f"i{LIKED * h + k}" for k in range(LIKED)} for h in range(HOURS)}
    for hour, lists in by_hour.items():
        share = np.mean([[item in liked[hour] for item in row] for row in lists.items])
        assert share > 0.8, (hour, share)
    # Without a context: as of the user's last event of training and validation.
    kept = _first_rows()
    for user, listed in zip(plain.users, plain.items, strict=True):
        own = [kept[p] for part in ("train", "valid") for p in _pairs(data, part) if p[0] == user]
        assert np.mean([item in liked[int(max(own)[1][1:])] for item in listed]) >= 0.5
    with pytest.raises(
        ConfigError, match="'h9': no training interaction has this value; there are h0, h1, h2"
    ):
        trained.in_context({"hour": "h9"})
    with pytest.raises(ConfigError, match="called 'day'; it reads hour"):
        trained.in_context({"day": "1"})


def test_a_given_value_is_encoded_as_a_row_is(data):
    values = {"tags": ["t2", "t0"], "price": "7.5"}
    hour, tags, price = features_lib.of_values(data.features, values, "RUN")
    assert hour.column.to_pylist() == [None]
    assert [tags.values[k] for k in tags.column.to_pylist()[0]] == ["t2", "t0"]
    np.testing.assert_allclose(
        price.standardised(), (7.5 - price.mean) / price.deviation, rtol=1e-5
    )
    with pytest.raises(ConfigError, match="no finite number"):
        features_lib.of_values(data.features, {"price": "cheap"}, "RUN")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"features": "hour", "backbone": "mf"}, "reads no features of interactions"),
        ({"features": "all", "backbone": "sasrec"}, "reads no features of interactions"),
    ],
)
def test_other_backbones_refuse_them(data, knobs, message):
    run = make_run(str(data.path), "run", dim=4, **knobs)
    with pytest.raises(ConfigError, match=message):
        build.build(run, data, worlds.one_device())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"interaction_features": "hours"}, "no column hours.*--interaction_features"),
        ({"interaction_features": "timestamp"}, "timestamp is the column of the timestamp"),
        ({"interaction_features": "price"}, "say price:numeric or price:categorical"),
        ({"interaction_features": "hour:numeric"}, "'h[0-2]' of row 1 is no finite number"),
        ({"source": "movielens"}, "--interaction_features is not used with --source=movielens"),
    ],
)
def test_refusals_of_prepare(folder, tmp_path, knobs, message):
    with pytest.raises((ConfigError, InputError), match=message):
        _prepared(folder, tmp_path / "out", **knobs)
    assert not (tmp_path / "out").exists()


def test_data_without_times_are_refused(folder, tmp_path):
    data = _prepared(folder, tmp_path / "d", time_column="", split="ratio")
    with pytest.raises(ConfigError, match="has no times, so that no interaction is a user's last"):
        build.build(_run(data, "run", history_fields=False), data, worlds.one_device())


def test_recbole_and_parquet_say_the_same(folder, data, tmp_path):
    rows = _log()
    header = (
        "user_id:token\titem_id:token\ttimestamp:float\thour:token\ttags:token_seq\tprice:float"
    )
    lines = ["\t".join([*map(str, row[:4]), row[4].replace("|", " "), row[5]]) for row in rows]
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "w.inter").write_text("\n".join([header, *lines]) + "\n")
    recbole = _prepared(
        folder, tmp_path / "r", source="recbole", input=str(tmp_path / "w"),
        interaction_features="hour,tags,price",
    )  # fmt: skip
    table = {
        name: [row[k] for row in rows]
        for k, name in enumerate(("user", "item", "timestamp", "hour"))
    }
    table["tags"] = [row[4].split("|") if row[4] else None for row in rows]
    table["price"] = [float(row[5]) if row[5] else None for row in rows]
    pa.parquet.write_table(pa.table(table), tmp_path / "log.parquet")
    parquet = _prepared(
        folder, tmp_path / "p", source="parquet", input=str(tmp_path / "log.parquet"),
        interaction_features="hour,tags,price",
    )  # fmt: skip
    assert features_lib.digest(recbole.features) == features_lib.digest(data.features)
    assert features_lib.digest(parquet.features) == features_lib.digest(data.features)


def test_the_penalty_counts_each_value_once(data):
    """Slots that repeat the one before do not count, whatever the features."""
    slots, _ = slots_lib.make_slots(list(data.features), 4)
    used = np.asarray(slots_lib.is_used(slots, jnp.asarray(slots.rows)))
    ends = np.cumsum(slots.widths)
    for row, marks in zip(slots.rows, used, strict=True):
        for end, width in zip(ends, slots.widths, strict=True):
            part = slice(end - width, end)
            assert marks[part].sum() == len(set(row[part].tolist()))


def test_preferences_beside_triples_have_the_users_last_training_interaction(
    data, tmp_path_factory
):
    """Triples and preferences are scored in one pass: each query has its own interaction there."""
    users = np.repeat(np.arange(data.n_users), 4)
    items = np.tile(np.arange(4), data.n_users)
    worlds.teach(data, users, items, np.tile(np.arange(4.0), data.n_users))
    run = _run(data, tmp_path_factory.mktemp("g") / "run", guidance="pairwise", teacher="t")
    experiment = build.build(run, data, worlds.one_device())
    context, queries = (
        experiment.arrays.context,
        Queries(jnp.asarray([3]), jnp.asarray([2]), jnp.asarray([7])),
    )
    trained = context.histories.trained
    preferences = Candidates(
        Queries(jnp.asarray([5, 6]), trained[jnp.asarray([5, 6])]), jnp.zeros((2, 2), jnp.int32)
    )
    batch = Batch(queries, jnp.asarray([[0, 1]]), jnp.ones(1), None, None)
    reads = experiment.trainer.objective.reads(batch, context, preferences)
    (both,) = reads.candidates.values()
    last = np.asarray(context.histories.offsets)[[5, 6]] + np.asarray(trained)[[5, 6]] - 1
    np.testing.assert_array_equal(both.queries.interactions, [7, *last])
    first = state.init_state(experiment.trainer, 0)
    _, _, health = step.make_run_steps(experiment.trainer)(
        first, experiment.arrays, jax.random.key(0), jnp.int32(2)
    )
    assert int(health.step) == -1
