"""A run that begins where another one ended: `slgr train --init_from=RUN --data=DATA2`.

    tables    the rows of RUN's users, items and categories, with their optimiser slots, are the
              first rows; those behind them are as fresh as in any run
    features  each value's row, by the value: new ones are fresh
    params    copied, with their optimiser's state; those of the guidance where it is the same.
              Adapters of vectors that RUN had none of begin as fresh as in any run, and so does
              the optimiser's state then, and with --train_only
    step, draws, patience    begin anew

A run of three towers (--towers=three) may begin as runs of the phases before it: RUN on ids alone
is its tower of rows, RUN of --towers=aligned its second one, with the run of --init_ids_from as the
first. Towers that no run is named for begin fresh, and so does every optimiser's state.

The rows and parameters are RUN's best, as it serves them, and the slots its last: a checkpoint
keeps no others. --init_slots=reset lets them, and Adam's moments, begin anew. A backbone that
propagates whole tables (LightGCN), or adds features or what vectors come to, serves what rows
become, so that there its last rows are taken.

DATA2 must be what RUN was trained on, or made from it by `slgr prepare --append`; no row that RUN
learned from, or was chosen by, may be evaluated now. RUN is read once, when a run begins: a run
that is resumed has all of it in its own checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from slgr_jax import config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import lineage
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.features import Feature
from slgr_jax.errors import ConfigError, listing
from slgr_jax.guidance import make_guidance
from slgr_jax.models.backbones import AnyBackbone, DotBackbone, adapters
from slgr_jax.models.backbones.base import feature_tables
from slgr_jax.models.embedding_table import RowFormat
from slgr_jax.models.row_optimizers import RowOptimizer
from slgr_jax.sampling import features as features_lib
from slgr_jax.sampling.context import choose_features
from slgr_jax.training import checkpoint, run_directory, tower_beginnings
from slgr_jax.training.state import Learner, TrainState, abstract_serving, abstract_state
from slgr_jax.training.tower_beginnings import Part

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The run that another begins from.

    Attributes:
      config: as it was started; rows: of each of its tables, without padding; served: of each that
        it serves, what vectors come to among them.
      shapes: of every array of its state, by path.
    places: table of features -> [rows] where its rows are here, -1 where a value is no more; of
      every other table, whose rows stay the first ones, none.
    """

    workdir: str
    config: config.RunConfig
    rows: Mapping[str, int]
    served: Mapping[str, int]
    shapes: Shapes
    places: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def check(learner: Learner, dataset: Dataset) -> None:
    """Refuse a --init_from that this run cannot begin from.

    Raises:
      ConfigError: RUN is no run, is another model, has seen what is evaluated now, or was trained
        on data that this dataset does not descend from.
      ManifestError: it has no checkpoint, or a damaged one.
    """
    for part in tower_beginnings.parts(learner):
        _origin_of(part, dataset)


def beginning(
    learner: Learner, dataset: Dataset, fresh: Callable[[np.int32], TrainState]
) -> Callable[[np.int32], TrainState]:
    """Seed -> the state that a run with --init_from begins with.

    Args:
      fresh: seed -> a fresh state; its rows stay where RUN has none.
    """

    @functools.cache
    def kept() -> list[tuple[Part, _Kept]]:
        return [
            (part, _read(part.learner, _origin_of(part, dataset)))
            for part in tower_beginnings.parts(learner)
        ]

    def begin(seed: np.int32) -> TrainState:
        state = fresh(seed)
        for part, of_run in kept():
            state = (
                tower_beginnings.in_tower(part, state, of_run.tables, of_run.params, of_run.places)
                if part.tower
                else _whole(part, state, of_run)
            )
        return state

    return begin


def _whole(part: Part, state: TrainState, of_run: _Kept) -> TrainState:
    """A fresh state that RUN has all tables of."""
    params, opt_state = {**state.params, **of_run.params}, state.opt_state
    params["backbone"] = {**state.params["backbone"], **of_run.params["backbone"]}
    if of_run.opt_state is not None:
        opt_state = of_run.opt_state
    tables = {
        name: _grown(part.learner, state.tables[name], rows, of_run.places.get(name))
        for name, rows in of_run.tables.items()
    }
    begun: TrainState = state.replace(  # type: ignore[attr-defined]
        tables=tables, params=params, opt_state=opt_state
    )
    return begun


def _origin_of(part: Part, dataset: Dataset) -> Origin:
    """`_origin` of a part's run, refused by the knob that names it."""
    try:
        return _origin(part.learner, dataset)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--init_from=", f"--{part.knob}=")) from error


# --- what RUN is ------------------------------------------------------------------------------


def _origin(learner: Learner, dataset: Dataset) -> Origin:
    run = learner.config
    workdir = run.train.init_from
    source = run_directory.read_config(workdir)
    record = run_directory.read_record(workdir)
    if record is None:
        raise ConfigError(f"--init_from={workdir} holds no {run_directory.RECORD}; train it first")
    _check_data(workdir, record, dataset)
    left = lineage.validation_left(
        lineage.line_from(dataset.manifest, record) or (), dataset.manifest
    )
    if source.train.refit and left:
        raise ConfigError(
            f"--init_from={workdir} is a refit, which has learned validation: {left} rows of it "
            f"may be evaluated in {dataset.path}; begin with the run that it refits, "
            f"{source.train.refit}"
        )
    if source.model.backbone != run.model.backbone:
        raise ConfigError(
            f"--init_from={workdir} has --backbone={source.model.backbone}, this run "
            f"--backbone={run.model.backbone}; give it the same"
        )
    for name in ("table_optimizer", "table_dtype"):
        was, now = (getattr(each.optimizer, name) for each in (source, run))
        if was != now:
            raise ConfigError(
                f"--init_from={workdir} has --{name}={was}, this run --{name}={now}: its rows "
                "carry another optimiser's state; give it the same"
            )
    saved = checkpoint.Checkpoints(workdir, writable=False)
    try:
        shapes = saved.shapes()
    finally:
        saved.close()
    rows = {name: int(table["rows"]) for name, table in record["tables"].items()}
    made = {
        name: int(record[f"{adapter.side}s"])
        for name, adapter in adapters.of(_backbone_of(learner, source)).items()
    }
    origin = Origin(workdir, source, rows, {**made, **rows}, shapes)
    places = _feature_places(learner, origin, dataset)
    _check_shapes(learner, origin)
    return dataclasses.replace(origin, places=places)


def _feature_places(
    learner: Learner, origin: Origin, dataset: Dataset
) -> Mapping[str, Int[np.ndarray, "rows"]]:
    """As of `Origin.places`. Vocabularies grow in the middle of a table, which holds several.

    Raises:
      ConfigError: RUN's data are no longer what it read, or it read other features.
    """
    model, workdir = origin.config.model, origin.workdir
    if not set(features_lib.TABLES.values()) & set(origin.rows):
        return {}
    data = origin.config.data
    was = dataset_lib.load(data, verify=False) if os.path.isdir(data) else None
    if was is None or not run_directory.same_features(workdir, origin.config, was):
        raise ConfigError(
            f"--init_from={workdir} read features of {data}, which is not there or has others now; "
            "it says which row is which value: put it back"
        )
    before, now = choose_features(model, was), choose_features(learner.config.model, dataset)
    names = [[(f.side, f.name, f.kind) for f in chosen.features] for chosen in (before, now)]
    if names[0] != names[1]:
        there, here = ([f"{side} {name} ({kind})" for side, name, kind in each] for each in names)
        raise ConfigError(
            f"--init_from={workdir} reads the features {listing(there)}, this run {listing(here)}; "
            "give it the same --features"
        )
    places: dict[str, np.ndarray] = {}
    for side, table in features_lib.TABLES.items():
        if table in origin.rows:
            places[table] = _places(before.of(side), now.of(side))
    return places


def _places(before: Sequence[Feature], now: Sequence[Feature]) -> Int[np.ndarray, "rows"]:
    """Row of a feature table -> the same value's row in the table of `now` (`make_slots`)."""
    rows: list[int] = []
    first = 0
    for old, new in zip(before, now, strict=True):
        if old.kind == "numeric":
            rows += [first, first + 1]
            first += 2
            continue
        code = {value: first + place for place, value in enumerate(new.values)}
        missing = first + len(new.values)
        rows += [*(code.get(value, -1) for value in old.values), missing]
        first = missing + 1
    return np.array(rows, np.int32)


def _check_data(workdir: str, record: Mapping[str, Any], dataset: Dataset) -> None:
    line = lineage.line_from(dataset.manifest, record)
    if line is None:
        raise ConfigError(
            f"--init_from={workdir} was trained on split {record['split_hash'][:8]}, and "
            f"{dataset.path} (split {dataset.manifest.split_hash[:8]}) is neither that nor made "
            "from it: add the new interactions with slgr prepare --append"
        )
    if backward := lineage.moved_backward(line):
        moved = ", ".join(f"{count} {key}" for key, count in backward.items())
        raise ConfigError(
            f"--init_from={workdir} has seen rows that {dataset.path} evaluates ({moved}): its "
            "metrics would flatter; train anew without --init_from"
        )


def _check_shapes(learner: Learner, origin: Origin) -> None:
    """Refuse another number of columns, fewer rows, or parameters of another shape."""
    specs = learner.backbone.tables
    if set(specs) != set(origin.rows):
        raise ConfigError(
            f"--init_from={origin.workdir} has tables {listing(sorted(origin.rows))}, this run "
            f"{listing(sorted(specs))}; give it the same knobs, and the data the same columns"
        )
    for name, spec in specs.items():
        if origin.rows[name] > spec.rows:
            raise ConfigError(
                f"--init_from={origin.workdir} has {origin.rows[name]} rows in table {name}, this "
                f"run {spec.rows}: rows are only added"
            )
    wanted = _shapes_of(_abstract(learner, origin))
    wrong = [
        f"{path} {list(origin.shapes.get(path, ()))} there, {list(shape)} here"
        for path, shape in wanted.items()
        if path.startswith(("tables/", "params/backbone")) and origin.shapes.get(path) != shape
    ]
    if wrong:
        model, vectors = learner.config.model, learner.config.vectors
        run = dataclasses.replace(origin.config, model=model, vectors=vectors)
        knobs = listing(config.differences(origin.config, run)) if run != origin.config else "none"
        raise ConfigError(
            f"--init_from={origin.workdir} is of other shapes: {listing(wrong)}; knobs of the "
            f"model that differ: {knobs}; give it the same (where a longer history widened a "
            "window, --max_history keeps the old one)"
        )


def _learner_of(learner: Learner, origin: Origin) -> Learner:
    """What RUN trained, if its model has this run's shapes."""
    source = origin.config
    backbone = _backbone_of(learner, source)
    remembered = checkpoint.remembered(origin.shapes)
    guidance = make_guidance(source)
    return Learner(source, backbone, guidance, learner.layout, remembered=remembered)


def _backbone_of(learner: Learner, source: config.RunConfig) -> AnyBackbone:
    """The backbone that RUN trained, if its model has this run's shapes."""
    if source.vectors.products:
        return learner.backbone
    without: AnyBackbone = adapters.without_vectors(learner.backbone)
    return without


def _abstract(learner: Learner, origin: Origin) -> TrainState:
    """The state of RUN, if its shapes are those of this run's model and its own guidance."""
    state = abstract_state(_learner_of(learner, origin))
    layout = learner.layout
    tables = {}
    for name, leaf in state.tables.items():
        rows, *_ = origin.shapes.get(f"tables/{name}", (0,))
        # Padded for the devices that RUN had.
        split = layout.table_sharding if rows % layout.table_shards == 0 else layout.replicated
        tables[name] = jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype, sharding=split)
    as_saved: TrainState = state.replace(tables=tables)  # type: ignore[attr-defined]
    return as_saved


def _shapes_of(state: TrainState) -> dict[str, tuple[int, ...]]:
    trees = {"tables": state.tables, "params": state.params}
    return {array.name: array.shape for array in checkpoint.array_shapes(trees)}


# --- what is taken of it ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a run takes over: packed rows without padding, dense parameters, their optax state."""

    tables: Mapping[str, jax.Array]
    params: Mapping[str, Any]
    opt_state: Any  # None: begins anew, as the guidance does
    places: Mapping[str, np.ndarray]  # as of `Origin`


def _read(learner: Learner, origin: Origin) -> _Kept:
    of_run = _learner_of(learner, origin)
    backbone = of_run.backbone
    serving, layout = abstract_serving(of_run), learner.layout
    values: dict[str, Any] = {}
    for name, leaf in serving.values.items():
        count = origin.served[name]
        if of_run.serves_blocks:
            count = layout.padded_rows(count)
        values[name] = jax.ShapeDtypeStruct(
            (count, leaf.shape[1]), leaf.dtype, sharding=leaf.sharding
        )
    saved = checkpoint.Checkpoints(origin.workdir, writable=False)
    try:
        state, best = saved.restore(
            _abstract(learner, origin), dataclasses.replace(serving, values=values)
        )
    finally:
        saved.close()

    rows = {name: table[: origin.rows[name]] for name, table in state.tables.items()}
    params: dict[str, Any] = dict(state.params)
    if not _serves_sums(backbone):
        rows = {
            name: _with_values(
                packed, best.values[name][: origin.rows[name]], backbone.tables[name].width
            )
            for name, packed in rows.items()
        }
        params = {"backbone": best.params, "guidance": best.guidance}
    opt_state = state.opt_state
    of_others = learner.config.adapters_alone != origin.config.adapters_alone
    if of_others or set(params["backbone"]) != set(_params_of(learner)):
        opt_state = None  # of other parameters
    if learner.config.train.init_slots == "reset":
        opt_state = None
        rows = {
            name: _with_fresh_slots(packed, backbone.tables[name].width, learner.row_optimizer)
            for name, packed in rows.items()
        }
    if not _same_guidance(learner.config, origin.config):
        del params["guidance"]
        opt_state = None
    return _Kept(rows, params, opt_state, origin.places)


def _params_of(learner: Learner) -> Mapping[str, Any]:
    """The dense parameters of this run's backbone, as shapes."""
    of_backbone: Mapping[str, Any] = abstract_state(learner).params["backbone"]
    return of_backbone


def _serves_sums(backbone: AnyBackbone) -> bool:
    """Whether what is served in place of a table's rows is not these rows."""
    propagates = isinstance(backbone, DotBackbone) and backbone.whole
    return propagates or bool(feature_tables(backbone) or adapters.of(backbone))


def _with_values(
    packed: Num[Array, "R W"], values: Float[Array, "R D"], width: int
) -> Num[Array, "R W"]:
    """Packed rows with other values and the slots that they have."""
    row_format = RowFormat.of(packed, width)
    return row_format.pack(values, row_format.unpack(packed)[1])


def _with_fresh_slots(
    packed: Num[Array, "R W"], width: int, optimizer: RowOptimizer
) -> Num[Array, "R W"]:
    """Packed rows with their values and the slots of rows that no step has touched."""
    row_format = RowFormat.of(packed, width)
    values, slots = row_format.unpack(packed)
    return row_format.pack(values, jnp.broadcast_to(optimizer.initial(width), slots.shape))


def _same_guidance(run: config.RunConfig, source: config.RunConfig) -> bool:
    """Whether a gate means the same in both: one guidance, one gate, one list of inputs; and what
    a method learns beside it: the same vectors and knobs."""
    if not (run.guided and source.guided):
        return run.guided == source.guided
    alike = [
        (
            *(each.guidance.guidance, each.gate.gate, each.gate.gate_inputs),
            *(each.guidance.teacher_vectors, each.aligns and _method(each)),
        )
        for each in (run, source)
    ]
    return alike[0] == alike[1]


def _method(run: config.RunConfig) -> Any:
    """The section of the run's guidance."""
    return getattr(run, run.guidance.guidance)


def _grown(
    learner: Learner, fresh: jax.Array, rows: jax.Array, places: np.ndarray | None
) -> jax.Array:
    """`fresh` with `rows` as its first ones, or at `places`."""
    if places is not None:
        known = np.flatnonzero(places >= 0)
        put_at = jax.jit(
            lambda table, at, rows: jnp.asarray(table).at[at].set(rows),
            donate_argnums=0,
            out_shardings=learner.layout.table_sharding,
        )
        return put_at(fresh, places[known], rows[known])
    put = jax.jit(
        lambda table, first: jnp.asarray(table).at[: first.shape[0]].set(first),
        donate_argnums=0,
        out_shardings=learner.layout.table_sharding,
    )
    return put(fresh, rows)
