"""What a run learns in place of its training interactions, and beside them in histories.

`--edits=NAME`: an LLM has said of training interactions how likely they are noise
(`teacher/products/edits.py`). Those above --edit_threshold, at most --edits_per_user of a history,
are

    replaced   by the item that it named: that one is predicted, and looked up in histories
    deleted    neither predicted nor looked up
    weighed    their loss times 1 - P(noise); histories stay as they are

`--insert=NAME`: the first --inserted_per_user pseudo-interactions of a user are put into the
history as edited, each at one of its n + 1 places, uniformly: it is looked up by what comes after
it, and predicted, its loss times its weight, from what comes before (Llama4Rec, arXiv 2401.13870).

Training alone looks at it. Popularity, cold users and tail items, a gate's inputs, LightGCN's
graph, seen items, and the histories that validation, test and serving look up are those of the
data. What is put in place or beside is no negative of its user, and neither is what it replaced.

Shape letters: U users, n interactions, m inserted ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from slgr_jax.config import EditConfig, RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset, Part
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.sampling import context as context_lib
from slgr_jax.sampling.context import Context, Histories
from slgr_jax.teacher.products import edits as products
from slgr_jax.teacher.products import preferences, pseudo_interactions
from slgr_jax.teacher.products.edits import Edits

_COUNTS = (
    *("interactions_replaced", "interactions_deleted", "interactions_weighed"),
    "interactions_inserted",
)


@dataclasses.dataclass(frozen=True)
class Edited:
    """The training interactions as a run learns them.

    Attributes:
      dataset: its training part is what is learned; what is counted is the data's.
      weights: [n] float32 what each of them counts; None: all alike.
      more: items beside a user's training items that are no negatives.
      counts: how many of `_COUNTS` there are.
    """

    dataset: Dataset
    weights: Float[np.ndarray, "n"] | None
    more: Csr
    counts: Mapping[str, int]

    def histories(self) -> Histories:
        """What training looks up (host arrays)."""
        return context_lib.make_histories(self.dataset, self.weights)


class Sequences(NamedTuple):
    """Interactions by user, then in their order, and what each counts as something to predict."""

    users: Int[np.ndarray, "n"]
    items: Int[np.ndarray, "n"]
    weights: Float[np.ndarray, "n"]
    ratings: Float[np.ndarray, "n"] | None = None


def edited(run: RunConfig, dataset: Dataset, context: Context) -> Edited | None:
    """What a run learns in place of the training interactions; None where it learns these.

    Args:
      dataset: as the run learns from it; context: what its backbone looks up.

    Raises:
      ManifestError, ShardError: a product does not fit, or is damaged.
      ConfigError: the backbone looks up features of interactions.
      InputError: nothing is edited or inserted, or nothing is left.
    """
    options = run.edits
    if not options.named:
        return None
    if context.features is not None and context.features.interaction is not None:
        raise ConfigError(
            f"{options.named}: features of interactions are of the histories as they "
            f"were; leave them out of --features={run.model.features}, or drop it"
        )
    train = dataset.train
    ones = np.ones(len(train), np.float32)
    learned = Sequences(train.users, train.items, ones, train.ratings)
    more, counts = Csr.empty(dataset.n_users), dict.fromkeys(_COUNTS, 0)
    if options.product:
        learned, more, counts = _with_edits(run, dataset, learned, counts)
    if options.inserted:
        pseudo = _to_insert(run, dataset)
        learned = insert(learned, pseudo, dataset.n_users, options)
        counts["interactions_inserted"] = int(pseudo.users.size)
        more = Csr.from_pairs(
            np.concatenate([more.owners(), pseudo.users]),
            np.concatenate([more.indices, pseudo.items]),
            dataset.n_users,
        )
    part = Part(learned.users, learned.items, None, learned.ratings)
    as_split = dataset.as_split or dataset
    alike = bool((learned.weights == 1).all())
    return Edited(
        dataclasses.replace(dataset, train=part, features=(), as_split=as_split),
        None if alike else learned.weights,
        more,
        counts,
    )


def _with_edits(
    run: RunConfig, dataset: Dataset, train: Sequences, counts: Mapping[str, int]
) -> tuple[Sequences, Csr, dict[str, int]]:
    """The training interactions with edits, the replacements by user, and how many there are."""
    options, as_split = run.edits, dataset.as_split or dataset
    product = products.load(as_split, options.product, verify=run.train.verify_checksums)
    chosen = _chosen(options, product, as_split)
    rows = dataset.split_rows[product.rows[chosen]]
    noise, replacements = product.noise[chosen], product.replacements[chosen]
    if options.how == "weigh":
        weights = train.weights.copy()
        weights[rows] = 1 - noise
        none = Csr.empty(dataset.n_users)
        return train._replace(weights=weights), none, {**counts, _COUNTS[2]: int(rows.size)}
    named = (replacements >= 0) & (options.how == "replace")
    keep, items = np.ones(train.users.size, bool), train.items.copy()
    keep[rows[~named]] = False
    items[rows[named]] = replacements[named]
    if not keep.any():
        raise InputError(
            f"--edits={options.product} deletes all {keep.size} training interactions; raise "
            "--edit_threshold or lower --edits_per_user"
        )
    ratings = None if train.ratings is None else train.ratings[keep]
    kept = Sequences(train.users[keep], items[keep], train.weights[keep], ratings)
    more = Csr.from_pairs(train.users[rows[named]], replacements[named], dataset.n_users)
    of_edits = {_COUNTS[0]: int(named.sum()), _COUNTS[1]: int((~named).sum())}
    return kept, more, {**counts, **of_edits}


def _chosen(options: EditConfig, product: Edits, as_split: Dataset) -> Int[np.ndarray, "c"]:
    """Places in the product of what is edited."""
    above = options.threshold
    if options.threshold_of == "quantile":
        above = float(np.quantile(product.noise, above)) if product.noise.size else 0.0
    users = as_split.train.users[product.rows]
    chosen = products.chosen(product, users, above=above, most=options.per_user)
    if not chosen.size:
        highest = f"{product.noise.max():g}" if product.noise.size else "none"
        raise InputError(
            f"--edits={options.product} edits nothing: no probability of noise is above "
            f"{above:g} (the highest: {highest}); lower --edit_threshold"
        )
    return chosen


def _to_insert(run: RunConfig, dataset: Dataset) -> Sequences:
    """The pseudo-interactions to insert, by user, the best last."""
    name, most = run.edits.inserted, run.edits.inserted_per_user
    teacher = preferences.load(dataset, name, verify=run.train.verify_checksums)
    pseudo = pseudo_interactions.of_teacher(dataset, teacher, most, knob="--insert", whole=False)
    if not pseudo.items.size:
        raise InputError(
            f"--insert: teacher {name!r} names nothing outside its users' own training items"
        )
    users = np.repeat(np.arange(dataset.n_users, dtype=np.int32), np.diff(pseudo.offsets))
    weights = pseudo.scores if pseudo.weighted else np.ones(users.size, np.float32)
    return Sequences(users, pseudo.items, weights)


def insert(history: Sequences, pseudo: Sequences, n_users: int, options: EditConfig) -> Sequences:
    """Histories with `pseudo` at random places, without ratings.

    The place of a user's k-th is floor(x (n + 1)), n the events of the history and x in [0, 1) a
    function of --insert_seed, --inserted_per_user, the user and k.
    """
    events, inserted = (np.bincount(each.users, minlength=n_users) for each in (history, pseudo))
    draws = np.random.default_rng(options.insert_seed).random((n_users, options.inserted_per_user))
    place = draws[pseudo.users, _within(pseudo.users, inserted)] * (events[pseudo.users] + 1)
    # Event k is between the places k and k + 1.
    at = np.concatenate([_within(history.users, events) + 0.5, np.floor(place)])
    users, items, weights = (
        np.concatenate([getattr(history, name), getattr(pseudo, name)])
        for name in ("users", "items", "weights")
    )
    order = np.lexsort((at, users))
    return Sequences(users[order], items[order], weights[order])


def _within(users: Int[np.ndarray, "n"], counts: Int[np.ndarray, "U"]) -> Int[np.ndarray, "n"]:
    """Of rows by user: how many of the same user come before each."""
    return np.arange(users.size) - (np.cumsum(counts) - counts)[users]


def record(run: RunConfig, dataset: Dataset) -> dict[str, dict[str, str]]:
    """What run.json says of products that decide what is learned: knob -> name and hash.

    Raises:
      ManifestError: one is not there, or edits do not fit.
    """
    options, of_knobs = run.edits, {}
    teachers = {"insert": options.inserted, "keep_hard": run.hardness.product}
    if options.product:
        files = products.read_manifest(dataset, options.product).files["edits"]
        of_knobs["edits"] = {"product": options.product, "hash": schema.files_hash(files)}
    for knob, name in teachers.items():
        if name:
            path = preferences.product_path(dataset.path, name)
            files = schema.read_teacher_manifest(path).files
            of_knobs[knob] = {"product": name, "hash": schema.files_hash(files)}
    return of_knobs


def changed(run: RunConfig, dataset: Dataset, recorded: Mapping[str, Any] | None) -> str:
    """The knob whose product holds something else than the run began with; empty for none.

    Args:
      recorded: run.json of the run; None: it has none.
    """
    was = (recorded or {}).get("edited_by", {})
    for knob, now in record(run, dataset).items():
        if knob in was and was[knob]["hash"] != now["hash"]:
            return f"--{knob}: {now['product']} holds something else now"
    return ""
