"""A trained run as an object.

    run = load("RUN")
    run.scores(["u1", "u1"], ["i7", "i9"])
    run.recommend(["u1", "u2"], k=10)
    run.fold_in({"new": ["i7"]})   # users it has never seen
    run.vectors()                 # whose inner product is the score
    run.alpha(users, preferred, other, margins)
    run.evaluate("test")

Users and items are named by their external ids, as in the raw data. Everything is as of the end of
validation, which is what there is to serve with, unless a part says otherwise.

Shape letters: U users, I items, n rows of a request, K cut-off, E width of the vectors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.data.features import INTERACTION, of_values
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.evaluation import click_metrics, full_ranking
from slgr_jax.evaluation.ranking_metrics import PartResult, Values
from slgr_jax.guidance import make_guidance, teacher_knowledge
from slgr_jax.guidance.base import Guidance
from slgr_jax.guidance.gating import Gating, gate_inputs
from slgr_jax.guidance.teacher_knowledge import PairKnowledge
from slgr_jax.models.candidates import Candidates
from slgr_jax.models.scoring import (
    ScoreRows,
    Scoring,
    pair_scores,
    score_own_rows,
    score_rows,
)
from slgr_jax.sampling import arrays, labelled_rows
from slgr_jax.sampling.context import Queries, choose_features
from slgr_jax.sampling.features import make_slots
from slgr_jax.sampling.preferences import pair_facts
from slgr_jax.serving import new_items
from slgr_jax.serving.fold_in import FoldedUsers, Folder
from slgr_jax.serving.histories import History
from slgr_jax.serving.recommender import (
    ItemsOf,
    Recommendations,
    Recommender,
    item_filter,
)
from slgr_jax.serving.run_vectors import RunVectors, Vectors
from slgr_jax.training import restore, run_directory
from slgr_jax.training.restore import RestoredRun

# Rows that one call of `scores` puts on the device.
_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """See the module's docstring; `load` makes it."""

    workdir: str
    restored: RestoredRun

    @property
    def config(self) -> RunConfig:
        """As the run was started."""
        return self.restored.config

    @property
    def dataset(self) -> Dataset:
        """What it was trained on."""
        return self.restored.dataset

    def __repr__(self) -> str:
        run, data = self.config, self.dataset
        guidance = run.guidance.guidance
        return (
            f"TrainedRun({self.workdir!r}: {run.model.backbone} on {data.manifest.name}, "
            f"{data.n_users} users x {data.n_items} items, guidance {guidance})"
        )

    # ------------------------------------------------------------------------------ scores

    def scores(self, users: Sequence[str], items: Sequence[str]) -> Float[np.ndarray, "n"]:
        """[n] logits of pairs.

        Raises:
          InputError: an unknown id, or two lengths.
        """
        if len(users) != len(items):
            raise InputError(f"{len(users)} users and {len(items)} items; give pairs")
        user_index, item_index = self.user_index(users), self.item_index(items)
        chunks = []
        for user_chunk, item_chunk in _chunks(user_index, item_index):
            scoring, rows = self.restored.asking(user_chunk, "test")
            chunks.append(np.asarray(self._pair_scores(scoring, rows, item_chunk[:, None]))[:, 0])
        return np.concatenate([np.zeros(0, np.float32), *chunks])[: len(users)]

    @functools.cached_property
    def _pair_scores(self) -> Callable[[Scoring, Any, Any], jax.Array]:
        backbone = self.restored.backbone

        @jax.jit
        def scores(scoring: Scoring, users: jax.Array, items: jax.Array) -> jax.Array:
            return pair_scores(backbone, scoring, Candidates(scoring.queries(users), items))

        return scores

    def recommend(
        self,
        users: Sequence[str] | None = None,
        k: int = 10,
        *,
        mask_seen: bool = True,
        allow: ItemsOf | None = None,
        deny: ItemsOf | None = None,
    ) -> Recommendations:
        """The k best items of each user; by the same ranking that evaluation measures.

        Each call puts what it needs on the device: keep a `recommender` to answer many.

        Args:
          users: ids; None: every user.
          mask_seen: leave out what a user has in training and validation.
          allow: ids of the only items to list, or, by user, of the only items of each.
          deny: ids of items not to list, or, by user, of each.

        Raises:
          InputError: an unknown id.
        """
        names = self.dataset.user_ids.to_pylist() if users is None else [str(u) for u in users]
        batch = min(1024, 1 << max(len(names) - 1, 0).bit_length())
        lists = self.recommender(k, mask_seen=mask_seen, allow=allow, deny=deny, batch_users=batch)
        return lists.recommend(names)

    def recommender(
        self,
        k: int = 10,
        *,
        mask_seen: bool = True,
        allow: ItemsOf | None = None,
        deny: ItemsOf | None = None,
        batch_users: int = 1024,
    ) -> Recommender:
        """Answers many calls by one compiled program.

        Args:
          k, mask_seen, batch_users: as of `Recommender`.
          allow, deny: as of `recommend`.

        Raises:
          ConfigError: k or `batch_users` is under 1, or no item is allowed.
          InputError: an unknown id.
        """
        items = item_filter(self, allow, deny)
        return Recommender(self, k, mask_seen=mask_seen, items=items, batch_users=batch_users)

    def in_context(self, values: Mapping[str, object]) -> TrainedRun:
        """This run, asked in given circumstances: every list and score is as of these, and not as
        of each user's last interaction. Labelled rows keep their own.

        Args:
          values: feature of interactions -> its value, of a multi-valued one a list; those that are
            not named are unknown.

        Raises:
          ConfigError: this run reads no such feature, or a value is none that it has learned.
        """
        chosen = choose_features(self.config.model, self.dataset)
        features = of_values(chosen.of(INTERACTION), values, self.workdir)
        slots, _ = make_slots(features, chosen.most_values)
        return self if slots is None else TrainedRun(self.workdir, self.restored.asked_in(slots))

    @functools.cached_property
    def seen(self) -> Csr:
        """[U] rows of the items that users have in training and validation."""
        return self.dataset.positives(("train", "valid"))

    @functools.cached_property
    def score_users(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(scoring, users [B]) -> scores [B, I]; the same function each time, compiled once."""
        return self.restored.score_users

    def fold_in(
        self, histories: Mapping[str, Sequence[str] | History], *, unknown: str = "refuse"
    ) -> FoldedUsers:
        """New users, from the items each has; nothing that was trained changes (`fold_in.py`).

        Args:
          histories: name -> item ids, oldest first, or a `History` with times and weights. A name
            may be that of a known user: it is another one all the same.
          unknown: items that the run does not know: refuse, or skip (and count).

        Raises:
          InputError: no user, an empty history, an unknown item, times or weights of no use.
          ConfigError: a run that users cannot be folded into.
        """
        return self._folder.fold(histories, unknown=unknown)

    @functools.cached_property
    def _folder(self) -> Folder:
        return Folder(self.whole)

    @functools.cached_property
    def whole(self) -> TrainedRun:
        """This run for what reads whole tables, or knows users by their number: tables that are
        split over the devices are whole on each, users in their order."""
        restored = self.restored.whole()
        return self if restored is self.restored else TrainedRun(self.workdir, restored)

    def vectors(self) -> Vectors:
        """Vectors of all users and items whose inner product is `scores`.

        Raises:
          ConfigError: a backbone whose score is no inner product.
        """
        users, items = (
            np.arange(count, dtype=np.int32)
            for count in (self.dataset.n_users, self.dataset.n_items)
        )
        return Vectors(self.run_vectors.of_users(users), self.run_vectors.of_items(items))

    @functools.cached_property
    def run_vectors(self) -> RunVectors:
        """`vectors` of some users at a time.

        Raises:
          ConfigError: as of `vectors`.
        """
        return RunVectors(self.restored)

    def with_items(self, ids: Sequence[str], vectors: Float[np.ndarray, "n Z"]) -> TrainedRun:
        """This run with new items behind its own, scored by its adapter from their vectors.

        See `new_items.with_items`, and `new_items.read_items` for files.
        """
        return new_items.with_items(self.whole, ids, vectors)

    # ---------------------------------------------------------------------------- the gate

    @functools.cached_property
    def reference_runs(self) -> list[RestoredRun]:
        """The runs that its gate reads or that ranked its hard negatives.

        Raises:
          ConfigError: they are not those that it was trained with.
        """
        if not self.config.reference_runs:
            return []
        other = run_directory.other_reference_runs(self.workdir, self.config)
        if other:
            raise ConfigError(
                f"{self.workdir} was trained with another --reference_runs ({other}); put it back "
                "or train again"
            )
        return restore.restore_reference_runs(self.config, self.dataset)

    @functools.cached_property
    def guidance(self) -> Guidance | None:
        """Its guidance, with the reference runs that the gate reads."""
        reads = self.config.guided and self.config.gate.reads_reference_runs
        backbones = tuple(run.backbone for run in self.reference_runs) if reads else ()
        return make_guidance(self.config, backbones)

    def alpha(
        self,
        users: Sequence[str],
        preferred: Sequence[str],
        other: Sequence[str],
        margins: Sequence[float] | np.ndarray,
        *,
        margin_scale: float = 1.0,
    ) -> Float[np.ndarray, "n"]:
        """[n] how far its gate believes that users prefer one item to another.

        Args:
          margins: the teacher's score differences, > 0.
          margin_scale: a typical one, in which the gate reads them (`TeacherLists.margin_scale`).

        Raises:
          ConfigError: a run without guidance.
        """
        items = np.stack([self.item_index(preferred), self.item_index(other)], axis=1)
        scaled = np.asarray(margins, np.float32) / np.float32(margin_scale)
        return self.believe(self.user_index(users), items, scaled)

    def believe(
        self,
        users: Int[np.ndarray, "n"],
        items: Int[np.ndarray, "n 2"],
        margins: Float[np.ndarray, "n"],
        *,
        part: str = "test",
        as_of: np.ndarray | None = None,
    ) -> Float[np.ndarray, "n"]:
        """[n] alpha of (preferred, other), by index.

        Args:
          margins: the teacher's, over a typical one.
          part: the moment: before validation or before test.
          as_of: the moment of each, for backbones that read histories; None: of its user.
        """
        if self.guidance is None:
            raise ConfigError(f"{self.workdir} was trained with --guidance=none: it has no gate")
        gating = self.guidance.gating
        scoring, rows = self.restored.asking(users, part)
        references = tuple(run.scoring(part) for run in self.reference_runs)
        if not gating.reference_backbones:
            references = ()
        slices = self.dataset.slices(self.config.slices)
        facts = arrays.make_facts(self.dataset, slices.cold_users, slices.tail_items)
        queries = scoring.queries(jnp.asarray(rows))
        if as_of is not None and scoring.as_of is not None:
            queries = Queries(queries.users, jnp.asarray(as_of))
        alpha = self._alpha(
            gating,
            scoring,
            references,
            Candidates(queries, jnp.asarray(items)),
            jnp.asarray(users),
            jnp.asarray(margins),
            jax.device_put(facts),
            teacher_knowledge.of_pairs(self.config, self.dataset, users, items),
        )
        return np.asarray(alpha, np.float64)

    def _alpha(
        self,
        gating: Gating,
        scoring: Scoring,
        references: tuple[Scoring, ...],
        candidates: Candidates,
        users: jax.Array,
        margins: jax.Array,
        facts: arrays.Facts,
        knowledge: PairKnowledge | None,
    ) -> jax.Array:
        run, backbone = self.config, self.restored.backbone

        @jax.jit
        def believe(
            scoring: Scoring,
            references: tuple[Scoring, ...],
            candidates: Candidates,
            users: jax.Array,
            margins: jax.Array,
            facts: arrays.Facts,
            knowledge: PairKnowledge | None,
        ) -> Any:
            def scores(dropout: tuple[float, jax.Array] | None) -> jax.Array:
                return pair_scores(backbone, scoring, candidates, dropout)

            inputs = gate_inputs(
                run,
                scores(None),
                lambda key, rate: scores((rate, key)),
                users,
                margins,
                pair_facts(facts, users, candidates.items),
                jax.random.key(1),
                gating.ask_reference_runs(references, candidates.queries, candidates.items),
                knowledge,
            )
            return gating.alpha_and_prior(scoring.serving.guidance, inputs)[0]

        alpha = believe(scoring, references, candidates, users, margins, facts, knowledge)
        return jnp.asarray(alpha)

    # -------------------------------------------------------------------------- evaluation

    def evaluate(self, part: str = "test") -> tuple[PartResult | None, dict[str, Values]]:
        """(full ranking, labelled rows by slice) of a part; None or {} where it is not asked for.

        Raises:
          ConfigError: no such part.
        """
        if part not in ("valid", "test"):
            raise ConfigError(f"part={part!r} is not one of: valid, test")
        if part == "valid" and self.config.train.refit:
            raise ConfigError(
                f"{self.workdir} is a refit: validation is its training data; evaluate test, or "
                f"the run that it refits, {self.config.train.refit}"
            )
        evaluation, run = self.config.evaluation, self.restored
        scoring, ranking = run.scoring(part), None
        if evaluation.ranking:
            ranking = full_ranking.evaluate_dataset(
                self.score_users,
                scoring,
                run.dataset,
                self.config.slices,
                evaluation,
                parts=(part,),
                mesh=run.mesh,
                split=run.split,
                split_items=run.split_items,
                kernels=self.config.train.kernels,
            ).get(part)
        by_slice: dict[str, Values] = {}
        if evaluation.rows != "none" and len(run.dataset.part(part)):
            rows = labelled_rows.make_rows(run.dataset, part, evaluation, self.config.loss)
            slices = run.dataset.slices(self.config.slices)
            by_slice = click_metrics.summarize_rows(rows, self.row_scores(rows, part), slices)
        return ranking, by_slice

    def row_scores(self, rows: labelled_rows.LabelledRows, part: str) -> Float[np.ndarray, "n"]:
        """[n] logits of labelled rows of a part, each as of its own moment."""
        run = self.restored
        if run.looked_up is None:
            rows = dataclasses.replace(rows, users=run.rows_of(rows.users))
        return self._score_rows(run.scoring(part), rows)

    @functools.cached_property
    def _score_rows(self) -> ScoreRows:
        run = self.restored
        if run.looked_up is None:
            return score_rows(run.backbone)
        features = run.looked_up.features
        circumstances = None if features is None else features.interaction
        return score_own_rows(
            run.backbone, run.learner.layout, circumstances, split_tables=run.split_items
        )

    # ---------------------------------------------------------------------------------- ids

    @functools.cached_property
    def item_id_array(self) -> pa.Array:
        """[I] external ids as text."""
        return self.dataset.items.column("item_id").combine_chunks()

    @functools.cached_property
    def item_ids(self) -> list[str]:
        """[I] external ids."""
        ids: list[str] = self.item_id_array.to_pylist()
        return ids

    def user_index(self, users: Sequence[str]) -> Int[np.ndarray, "n"]:
        """[n] int32 of external ids."""
        return _index(self.dataset.user_ids, users, "user")

    def item_index(self, items: Sequence[str]) -> Int[np.ndarray, "n"]:
        """[n] int32 of external ids."""
        return _index(self.item_id_array, items, "item")


def load(workdir: str, which: str = "best", *, data: str | None = None) -> TrainedRun:
    """A trained run from its directory.

    Args:
      which: its `best` state by validation, or its `last`.
      data: where its dataset is now; None: where it was trained.

    Raises:
      ConfigError: not a run, or its dataset is another one now.
      ManifestError: no checkpoint, or a damaged one.
    """
    if which not in ("best", "last"):
        raise ConfigError(f"which={which!r} is not one of: best, last")
    return TrainedRun(workdir, restore.restore_run(workdir, which, data=data, split=True))


def _index(known: Any, names: Sequence[str], kind: str) -> np.ndarray:
    asked = pa.array([str(name) for name in names], pa.string())
    index = pc.index_in(asked, value_set=known)
    if index.null_count:
        unknown = asked.filter(pc.is_null(index)).to_pylist()
        raise InputError(
            f"unknown {kind} id {listing(map(repr, unknown), limit=3)} ({len(unknown)} of "
            f"{len(names)}); the data has {len(known)} ids such as {known[0].as_py()!r}"
        )
    return np.asarray(index.to_numpy(zero_copy_only=False), np.int32)


def _chunks(users: np.ndarray, items: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of equal length, the last one filled up, so that one program serves all."""
    size = min(_CHUNK, 1 << max(users.size - 1, 0).bit_length())
    pieces = []
    for begin in range(0, users.size, size):
        piece = (users[begin : begin + size], items[begin : begin + size])
        short = size - piece[0].size
        pieces.append(tuple(np.pad(x, (0, short), mode="edge") for x in piece))
    return pieces  # type: ignore[return-value]
