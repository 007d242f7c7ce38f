"""The users nearest to an item by text as pseudo-interactions: ColdLLM's filter, without training.

    of item i: the M users u outside its training users with the largest cos(z_u, z_i)

ColdLLM (WSDM 2025) trains two towers for these vectors and lets an LLM say yes or no to what they
find; its authors' pairs show that nearly all of what helps is the vectors' doing. Items are those
that training saw at most so many times; what a list of a user says is `pseudo_interactions.derive`.

Shape letters: U users, I items, D width of a vector, M users of an item.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from slgr_jax.config import DeriveConfig, NearestConfig, TeachConfig
from slgr_jax.config.derive import NEAREST_USERS
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.teacher.local import nearest
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products import preferences, pseudo_interactions


def write(
    dataset: Dataset, common: TeachConfig, options: DeriveConfig, vectors: NearestConfig
) -> schema.TeacherManifest:
    """Write DATA/teacher/NAME: the nearest users of each rare item.

    Raises:
      UserError: as `nearest.vectors_of`.
      ConfigError: --places, which lists alone have.
      InputError: no such item has a vector.
    """
    shards.check_target(
        preferences.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    if options.places != DeriveConfig.places:
        raise ConfigError(
            f"--places={options.places} is of --lists=NAME; drop it, or use --users_per_item"
        )
    most = options.users_per_item or NEAREST_USERS
    items, users, provenance = nearest.vectors_of(dataset, vectors)
    rare = pseudo_interactions.rare_items(dataset, options.rare_items)
    asked = Vectors(items.values, items.has & rare)
    trained = dataset.positives(("train",))
    by_item = Csr.from_pairs(trained.indices, trained.owners(), dataset.n_items)
    of_items, nearest_users, _ = nearest.nearest(users, asked, by_item, most)
    if not of_items.size:
        raise InputError(
            f"{dataset.path}: {int(rare.sum())} of {dataset.n_items} items have at most "
            f"{options.rare_items} training interactions, {int(asked.has.sum())} of them a vector, "
            f"and {int(users.has.sum())} users one; raise --rare_items"
        )
    starts = np.searchsorted(of_items, of_items, side="left")
    places = 1 + np.arange(of_items.size) - starts
    weights = pseudo_interactions.weights_of(places, options.weights)
    return pseudo_interactions.write(
        dataset,
        common,
        nearest_users,
        of_items,
        weights,
        dataclasses.replace(provenance, model=f"nearest users by {provenance.model}"),
    )
