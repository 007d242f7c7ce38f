"""What a run learns in place of its training interactions: `slgr train --edits=NAME`.

An LLM has said of training interactions how likely they are noise (`teacher/products/edits.py`).
Those above --edit_threshold, at most --edits_per_user of a history, are

    replaced   by the item that it named: that one is predicted, and looked up in histories
    deleted    neither predicted nor looked up
    weighed    their loss times 1 - P(noise); histories stay as they are

Training alone looks at it. Popularity, cold users and tail items, a gate's inputs, LightGCN's
graph, seen items, and the histories that validation, test and serving look up are those of the
data. A replacement is no negative of its user, and neither is what it replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from slgr_jax.config import RunConfig
from slgr_jax.data import schema
from slgr_jax.data.dataset import Csr, Dataset, Part
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.sampling import context as context_lib
from slgr_jax.sampling.context import Context, Histories
from slgr_jax.teacher.products import edits as products

_COUNTS = ("interactions_replaced", "interactions_deleted", "interactions_weighed")


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


def edited(run: RunConfig, dataset: Dataset, context: Context) -> Edited | None:
    """What a run learns in place of the training interactions; None where it learns these.

    Args:
      dataset: as the run learns from it; context: what its backbone looks up.

    Raises:
      ManifestError, ShardError: the product does not fit, or is damaged.
      ConfigError: the backbone looks up features of interactions.
      InputError: nothing is edited, or nothing is left.
    """
    options = run.edits
    if not options.product:
        return None
    if context.features is not None and context.features.interaction is not None:
        raise ConfigError(
            f"--edits={options.product}: features of interactions are of the histories as they "
            f"were; leave them out of --features={run.model.features}, or drop --edits"
        )
    as_split = dataset.as_split or dataset
    product = products.load(as_split, options.product, verify=run.train.verify_checksums)
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
    rows = dataset.split_rows[product.rows[chosen]]
    noise, replacements = product.noise[chosen], product.replacements[chosen]
    train, weights, more = dataset.train, None, Csr.empty(dataset.n_users)
    keep, items = np.ones(len(train), bool), train.items
    counts = dict.fromkeys(_COUNTS, 0)
    if options.how == "weigh":
        weights = np.ones(len(train), np.float32)
        weights[rows] = 1 - noise
        counts["interactions_weighed"] = int(rows.size)
    else:
        named = (replacements >= 0) & (options.how == "replace")
        keep[rows[~named]] = False
        items = items.copy()
        items[rows[named]] = replacements[named]
        more = Csr.from_pairs(train.users[rows[named]], replacements[named], dataset.n_users)
        counts["interactions_replaced"] = int(named.sum())
        counts["interactions_deleted"] = int((~named).sum())
    if not keep.any():
        raise InputError(
            f"--edits={options.product} deletes all {keep.size} training interactions; raise "
            "--edit_threshold or lower --edits_per_user"
        )
    ratings = None if train.ratings is None else train.ratings[keep]
    part = Part(train.users[keep], items[keep], None, ratings)
    learned = dataclasses.replace(dataset, train=part, features=(), as_split=as_split)
    return Edited(learned, weights, more, counts)


def record(run: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What run.json says of the product: its name and its hash; {} without one.

    Raises:
      ManifestError: it is not there, or does not fit.
    """
    name = run.edits.product
    if not name:
        return {}
    manifest = products.read_manifest(dataset, name)
    return {"product": name, "hash": schema.files_hash(manifest.files["edits"])}


def changed(run: RunConfig, dataset: Dataset, recorded: Mapping[str, Any] | None) -> str:
    """Says that the product holds other edits than the run began with; empty where it does not.

    Args:
      recorded: run.json of the run; None: it has none.
    """
    was, now = (recorded or {}).get("edits", {}), record(run, dataset)
    if was and now and was["hash"] != now["hash"]:
        return f"--edits: {run.edits.product} holds other edits now"
    return ""
