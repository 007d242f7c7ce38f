"""Trained runs read back: to be served, to be evaluated, to be another run's reference."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slgr_jax import cluster, config
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import own_users, schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.features import INTERACTION
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import make_guidance, with_edges
from slgr_jax.guidance.base import ReferenceRun
from slgr_jax.mesh import Layout, UserShards, make_layout, put
from slgr_jax.models.backbones import (
    AnyBackbone,
    DotBackbone,
    make_backbone,
    reads_of,
    window_length,
)
from slgr_jax.models.backbones.adapters import row_specs
from slgr_jax.models.backbones.base import feature_tables
from slgr_jax.models.scoring import Scoring, ServingState, moments, score_users
from slgr_jax.sampling import context as context_lib
from slgr_jax.sampling import user_context, user_shards
from slgr_jax.sampling.context import HISTORY, Context, FrozenVectors
from slgr_jax.sampling.features import FeatureSlots
from slgr_jax.training import checkpoint, example_products, run_directory, vector_products
from slgr_jax.training.state import (
    Learner,
    abstract_serving,
    abstract_state,
    by_user,
    make_serving_state,
)


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """A trained run, ready to score.

    Attributes:
      learner: its config, backbone and guidance, and the devices it is on.
      dataset: what it was trained on.
      serving, context: what `scoring` puts together.
      looked_up: the host arrays of `context`, where it lies with its users on the devices; None:
        it is whole on each.
    """

    learner: Learner
    dataset: Dataset
    serving: ServingState
    context: Context
    looked_up: Context | None = None

    @property
    def config(self) -> config.RunConfig:
        """As the run was started."""
        return self.learner.config

    @property
    def backbone(self) -> AnyBackbone:
        """What was trained."""
        return self.learner.backbone

    @property
    def mesh(self) -> Mesh | None:
        """Devices to split users over; None on one device."""
        layout = self.learner.layout
        return layout.mesh if layout.devices > 1 else None

    @property
    def split(self) -> UserShards | None:
        """How users are split over `mesh`; None: row u of their table is that of user u."""
        return self.learner.layout.users

    @property
    def split_items(self) -> bool:
        """Whether tables are split over the `table` axis of `mesh`, filled up as in training."""
        return self.learner.serves_blocks

    def rows_of(self, users: np.ndarray) -> np.ndarray:
        """[n] where users are in their table, which is what `score_users` asks about."""
        return users if self.split is None else self.split.row[users]

    def device_of(self, users: np.ndarray) -> np.ndarray | None:
        """[n] which device of `mesh` has each user; None: any."""
        if self.split is None or self.mesh is None:
            return None
        return self.split.device_of(users, self.mesh.size)

    def asking(self, users: np.ndarray, part: str) -> tuple[Scoring, np.ndarray]:
        """What scores some users as of the moment before `part`, and the rows that it has them in.

        Histories and features that lie with their users are looked up on one device; what is known
        of these users is put on all of them instead, with room for a power of two.

        Args:
          users: [n], in any order.

        Returns:
          (scoring, [n] rows).

        Raises:
          ConfigError: as of `whole`.
        """
        self._refuse_others()
        if self.looked_up is None:
            return self.scoring(part), self.rows_of(users)
        distinct, place = np.unique(users, return_inverse=True)
        room = 1 << max(distinct.size - 1, 0).bit_length()
        padded = np.pad(distinct, (0, room - distinct.size), mode="edge")
        of_users = context_lib.of_users(self.looked_up, padded)
        context, rows = self.learner.layout.put((of_users, self.rows_of(padded)))
        values = {
            name: self._fetched(self.serving.values[name], rows)
            if spec.of_users
            else self.serving.values[name]
            for name, spec in row_specs(self.backbone).items()
        }
        serving = dataclasses.replace(self.serving, values=values)
        return Scoring(serving, context, moments(context, part)), place.astype(np.int32)

    def asked_in(self, circumstances: FeatureSlots) -> RestoredRun:
        """This run, every query in the same circumstances.

        Args:
          circumstances: [1, S] features of interactions (host arrays).
        """

        def replaced(context: Context, slots: FeatureSlots) -> Context:
            assert context.features is not None, "the run reads features of interactions"
            features = dataclasses.replace(context.features, interaction=slots)
            return dataclasses.replace(context, features=features)

        context = replaced(self.context, self.learner.layout.put(circumstances))
        looked_up = self.looked_up and replaced(self.looked_up, circumstances)
        return dataclasses.replace(self, context=context, looked_up=looked_up)

    @functools.cached_property
    def _fetched(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(table, rows [n]) -> [n, D], whole on every device."""
        replicated = self.learner.layout.replicated
        return jax.jit(lambda table, rows: table[rows], out_shardings=replicated)

    def whole(self) -> RestoredRun:
        """This run with whole tables on all devices, the rows of users in the order of their
        numbers; itself where they are so.

        Raises:
          ConfigError: this process of several has read what belongs to its own users alone.
        """
        if self.split is None and not self.split_items:
            return self
        self._refuse_others()
        layout = make_layout()
        serving = put(by_user(self.learner, self.serving), layout.replicated)
        learner = dataclasses.replace(self.learner, layout=layout)
        context = self.context if self.looked_up is None else self.looked_up
        return RestoredRun(learner, self.dataset, serving, layout.put(context))

    def _refuse_others(self) -> None:
        if self.dataset.of_users is not None:
            raise ConfigError(
                "this is one of several processes, and has read what belongs to its own users "
                "alone: ask a process that works alone, or for metrics, lists and vectors by "
                "evaluate, recommend and export"
            )

    @property
    def score_users(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(scoring, users [B], or where they are split `rows_of` them) -> scores [B, I]."""
        return score_users(self.backbone)

    def scoring(self, part: str) -> Scoring:
        """The argument of `score_users` as of the moment before `part` (valid or test)."""
        if self.looked_up is None:
            return Scoring(self.serving, self.context, moments(self.context, part))
        as_of = moments(self.looked_up, part)
        return Scoring(self.serving, self.context, user_context.numbers(as_of, self.learner.layout))


def backbone_and_context(
    run: config.RunConfig, dataset: Dataset, *, native: bool
) -> tuple[AnyBackbone, Context]:
    """The run's backbone, and the host arrays that it looks up, without vectors.

    Raises:
      ConfigError: a history is wanted of a dataset without times.
    """
    reads, most = reads_of(run.model), run.model.most_categories
    chosen = context_lib.choose_features(run.model, dataset)
    if of_interactions := chosen.of(INTERACTION):
        reads |= {HISTORY}  # the last event before a moment says in which circumstances
        if dataset.train.timestamps is None:
            raise ConfigError(
                f"--features={run.model.features}: {dataset.path} has no times, so that no "
                f"interaction is a user's last, whose {of_interactions[0].name} a ranking could "
                "take; prepare it with --time_column, or leave features of interactions out"
            )
    if HISTORY in reads and dataset.train.timestamps is None:
        fix = "give them (--time_column of slgr prepare; any increasing number will do)"
        if run.model.backbone in config.CLICK_BACKBONES:
            fix += ", or train without history fields: --nohistory_fields"
        raise ConfigError(
            f"--backbone={run.model.backbone} reads histories, and {dataset.path} has no times; "
            f"{fix}"
        )
    if run.examples.product and example_products.timed(dataset):
        reads |= {HISTORY}  # which rows come before which
    looked_up = context_lib.make_context(dataset, reads, most_categories=most, chosen=chosen)
    sizes = context_lib.sizes(dataset, reads, most_categories=most, chosen=chosen)
    longest = user_shards.largest(sizes.longest_history, dataset)
    of_vectors = vector_products.sizes(run, dataset)
    of_examples = example_products.sizes(run, dataset)
    sizes = dataclasses.replace(sizes, longest_history=longest, examples=of_examples, **of_vectors)
    model = run.model
    shown = example_products.arrays(run, dataset, window_length(model, sizes))
    looked_up = dataclasses.replace(looked_up, examples=shown)
    if run.adapters_alone:  # a network that learns nothing scores as it does when it serves
        model = dataclasses.replace(model, dropout=0.0)
    return make_backbone(model, sizes, run.vectors, run.examples, native=native), looked_up


def load_data(run: config.RunConfig) -> Dataset:
    """The dataset as a run learns from it: of a refit, validation is training data.

    Raises:
      ManifestError, ShardError: it is damaged, or none.
    """
    dataset = dataset_lib.load(run.data, verify=run.train.verify_checksums)
    return dataset.with_validation() if run.train.refit else dataset


def load_own_users(run: config.RunConfig, layout: Layout | None = None) -> Dataset:
    """The dataset as a process of a job reads it whose users are split over its devices.

    Args:
      layout: the devices; None: those that the run asks for.

    Raises:
      ManifestError, ShardError: it is damaged, or none.
      ConfigError: shards of users that the devices cannot have as many of each.
    """
    layout, count = layout or layout_of(run), run.train.user_shards
    _say_what_is_read(run)

    def choose(history: np.ndarray, bounds: np.ndarray | None) -> np.ndarray:
        users = _user_shards(count, history, bounds)
        shards = dataclasses.replace(layout, users=users).shards_of_process
        return np.asarray(shards[users.row // users.rows], bool)

    return own_users.load(run.data, choose, verify=run.train.verify_checksums)


def _user_shards(count: int, history: np.ndarray, bounds: np.ndarray | None) -> UserShards:
    """The users' shards: those that they are numbered by, or as many of these together; dealt by
    their interactions where they are numbered otherwise.

    Args:
      history: [U] training items of each user.
      bounds: `Dataset.user_bounds`.
    """
    if bounds is not None and (bounds.size - 1) % count == 0:
        return UserShards.of_ranges(bounds[:: (bounds.size - 1) // count])
    return UserShards.deal(history, count)


def _say_what_is_read(run: config.RunConfig) -> None:
    """Tell, once for the job, where processes have to read what is not theirs."""
    manifest, count = schema.read_dataset_manifest(run.data), run.train.user_shards
    if manifest.user_shards and manifest.user_shards % count == 0:
        return
    how = "without --user_shards"
    if manifest.user_shards:
        how = f"with --user_shards={manifest.user_shards}, which is no multiple of {count}"
    elif manifest.parents:
        how = "with --append, which numbers users as its parents did"
    cluster.say_first(
        f"--user_shards={count}: every process reads all training interactions to keep its own "
        f"users', as {run.data} was prepared {how}; slgr prepare --user_shards={count} (all rows "
        "anew) gives each process files of its own"
    )


def restore_run(
    workdir: str, which: str = "best", *, data: str | None = None, split: bool = False
) -> RestoredRun:
    """A run's dataset and its `best` or `last` state, for evaluation and export.

    Args:
      data: where its dataset is now; None: where it was trained.
      split: leave tables as --table_shards and --user_shards have split them, where that divides
        the devices, or the devices it; they are whole on every device otherwise.

    Raises:
      ConfigError: the dataset is not there, or is another one than the run was trained on.
      ManifestError: no checkpoint, or a damaged one.
    """
    run = run_directory.read_config(workdir)
    if data is not None:
        run = dataclasses.replace(run, data=data)
    if not os.path.isdir(run.data):
        raise ConfigError(
            f"{workdir} was trained on {run.data}, which is not there; put it back, or say where "
            "it is now: --data=NEW"
        )
    dataset = _load_served(run) if split else load_data(run)
    if run_directory.trained_on(workdir, dataset) is False:
        raise ConfigError(
            f"{workdir} was trained on another split or id map than {dataset.path} now holds "
            f"(split {dataset.manifest.split_hash[:8]}); point --data back or train again"
        )
    if run_directory.same_features(workdir, run, dataset) is False:
        raise ConfigError(
            f"{workdir} was trained with --features={run.model.features}, and those of "
            f"{dataset.path} are others now; point --data back or train again"
        )
    return _restored(workdir, run, dataset, which, split=split)


def _load_served(run: config.RunConfig) -> Dataset:
    """A run's dataset with the test part; of several processes each reads its own users' training
    interactions, if that is all that it needs: the rows' slices count everybody's events.

    Raises:
      ConfigError: the devices of several processes cannot have as many shards of users each.
    """
    own = run.reads_own_users and run.evaluation.rows == "none"
    if not own or cluster.processes() == 1:
        return load_data(run)
    dataset = load_own_users(run, make_layout())
    return own_users.with_test(dataset, verify=run.train.verify_checksums)


def _restored(
    workdir: str, run: config.RunConfig, dataset: Dataset, which: str, *, split: bool = False
) -> RestoredRun:
    """A state of the run in `workdir`, which was trained on `dataset`: whole, or with `split` as
    the run is served."""
    if changed := example_products.changed(run, dataset, run_directory.read_record(workdir)):
        raise ConfigError(f"{workdir}: {changed}, and its scores are made beside it; put it back")
    backbone, looked_up = backbone_and_context(run, dataset, native=False)
    served = _served(backbone, looked_up)
    layout = _layout_to_serve(run, backbone) if split else make_layout()
    trained = Learner(run, backbone, make_guidance(run), _trained_on(run, dataset, layout))
    if which != "best":
        looked_up = _with_edges(workdir, run, dataset, backbone, looked_up)
    saved = checkpoint.Checkpoints(workdir, writable=False, verify=run.train.verify_checksums)
    try:
        if which == "best":
            serving = saved.restore_best(abstract_serving(trained))
        else:
            learned = dataclasses.replace(trained, remembered=checkpoint.remembered(saved.shapes()))
            state = saved.restore_state(abstract_state(learned))
            vectors = _frozen(workdir, run, dataset, layout)
            as_trained = user_context.put(looked_up, trained.layout)
            reads = dataclasses.replace(as_trained, vectors=layout.put(vectors))
            serving = make_serving_state(trained)(state, reads)
    finally:
        saved.close()
    if trained.layout.users is None:
        return RestoredRun(trained, dataset, serving, layout.put(served))
    if not split or trained.layout.devices < layout.devices:
        return RestoredRun(trained, dataset, serving, served, served).whole()
    dealt = user_context.put(served, trained.layout)
    by_number = served if user_context.is_of_users(served) else None
    return RestoredRun(trained, dataset, serving, dealt, by_number)


def _served(backbone: AnyBackbone, looked_up: Context) -> Context:
    """What scoring looks up: not the graph that tables have been propagated on, nor the features
    whose rows have been added to others."""
    propagated = isinstance(backbone, DotBackbone) and backbone.whole
    return dataclasses.replace(
        looked_up,
        graph=None if propagated else looked_up.graph,
        features=None if feature_tables(backbone) else looked_up.features,
    )


def _layout_to_serve(run: config.RunConfig, backbone: AnyBackbone) -> Layout:
    """All devices, with the table shards that the run had where it can be ranked over blocks."""
    layout, shards = make_layout(), run.train.table_shards
    # Vectors of items can be asked for block by block, a network that sees both sides cannot.
    ranks_blocks = isinstance(backbone, DotBackbone) and layout.devices % shards == 0
    return make_layout(table_shards=shards) if ranks_blocks else layout


def _trained_on(run: config.RunConfig, dataset: Dataset, layout: Layout) -> Layout:
    """The layout with users split as in training; one device, where all do not divide them."""
    if run.train.user_shards % layout.devices and cluster.processes() == 1:
        layout = make_layout(devices=list(layout.mesh.devices.flat[:1]))
    return with_users(layout, run, dataset)


def _frozen(
    workdir: str, run: config.RunConfig, dataset: Dataset, layout: Layout
) -> FrozenVectors | None:
    """The vectors beside which the run in `workdir` was trained; None without any."""
    if not run.vectors.products:
        return None
    if changed := vector_products.changed(run, dataset, run_directory.read_record(workdir)):
        raise ConfigError(f"{workdir}: {changed}; put those back, or take the best state")
    return vector_products.frozen(run, dataset, layout)


def _with_edges(
    workdir: str, run: config.RunConfig, dataset: Dataset, backbone: AnyBackbone, context: Context
) -> Context:
    """The context with the edges that the run in `workdir` was trained with."""
    was = run_directory.recorded(workdir)
    changed = was is not None and was["teacher_hash"] != run_directory.teacher_hash(run)
    if run.adds_edges and changed:
        raise ConfigError(
            f"{workdir}: teacher {run.guidance.teacher} has other interactions now than the graph "
            "was trained with; put those back, or take the best state"
        )
    return with_edges(run, dataset, backbone, context)


def restore_reference_runs(run: config.RunConfig, dataset: Dataset) -> list[RestoredRun]:
    """The best states of the runs that --reference_runs names; [] where it names none.

    They know training alone, of a refit too: what its gate was taught to read.

    Raises:
      ConfigError: one is not there, was trained on another dataset than `dataset`, or is a refit.
      ManifestError: one has no checkpoint yet, or a damaged one.
    """
    dataset = dataset.as_split or dataset
    restored: list[RestoredRun] = []
    shared: dict[Any, Context] = {}  # what runs of a kind look up is there once
    for workdir in run.reference_runs:
        trained, recorded = run_directory.read_config(workdir), run_directory.recorded(workdir)
        if recorded is None:
            raise ConfigError(
                f"--reference_runs: {workdir} holds no {run_directory.RECORD}; train it first"
            )
        if trained.train.refit:
            raise ConfigError(
                f"--reference_runs: {workdir} is a refit, which has learned validation; name the "
                f"run that it refits, {trained.train.refit}"
            )
        for name, what in (("split_hash", "split"), ("id_map_hash", "id map")):
            here = getattr(dataset.manifest, name)
            if recorded[name] != here:
                raise ConfigError(
                    f"--reference_runs: {workdir} was trained on {what} {recorded[name][:8]}, "
                    f"{dataset.path} has {what} {here[:8]}; name runs that were trained on this "
                    "dataset"
                )
        reference = _restored(workdir, trained, dataset, "best")
        model = trained.model
        features = context_lib.choose_features(model, dataset).digest
        kind = (
            reference.backbone.reads,
            model.most_categories,
            features,
            model.most_feature_values,
            (trained.examples, model.max_history) if trained.examples.product else None,
        )
        looked_up = shared.setdefault(kind, reference.context)
        restored.append(dataclasses.replace(reference, context=looked_up))
    return restored


def as_of(reference_runs: Sequence[RestoredRun], part: str) -> list[ReferenceRun]:
    """(backbone, what it scores with) of reference runs, histories cut before `part`."""
    return [(reference.backbone, reference.scoring(part)) for reference in reference_runs]


def layout_of(run: config.RunConfig) -> Layout:
    """The devices that a run asks for."""
    return make_layout(table_shards=run.train.table_shards, min_devices=run.train.min_devices)


def with_users(layout: Layout, run: config.RunConfig, dataset: Dataset) -> Layout:
    """The layout, with users split over it as the run asks for.

    Raises:
      ConfigError: the devices do not divide its shards of users.
    """
    count = run.train.user_shards
    users = _user_shards(count, dataset.history, dataset.user_bounds) if count else None
    layout = dataclasses.replace(layout, users=users)
    if users is None or dataset.of_users is None:
        return layout
    here = layout.shards_of_process
    return dataclasses.replace(layout, users=dataclasses.replace(users, here=here))
