"""Edits in an LLM's place: as many of the same users' training interactions, drawn at random.

Of each user the probabilities of noise, each with its replacement, are put on other interactions of
the user, uniformly without replacement: whatever threshold and limit a run has, it edits as many of
each user as with the product, and with the same items. What differs is which. Kept as
DATA/edits/NAME.random.

Shape letters: n training interactions, m rows of a product.
"""

from __future__ import annotations

import numpy as np

from slgr_jax.data import edit_schema, schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.teacher.products import edits
from slgr_jax.teacher.products.preferences import Provenance


def control_name(name: str) -> str:
    """The product that holds the control of the edits `name`."""
    return f"{name}.random"


def ensure(dataset: Dataset, name: str, *, seed: int = 0) -> str:
    """The name of the control of DATA/edits/NAME, written if there is none; one that is there is
    kept.

    Raises:
      ConfigError: what is there was made of other edits.
      ManifestError, ShardError: the product does not fit, or is damaged.
    """
    product, control = edits.load(dataset, name), control_name(name)
    root, stated = edits.product_path(dataset.path, control), _model(product.manifest, seed)
    if not (root / schema.MANIFEST).is_file():
        write(dataset, product, control, seed=seed)
    elif (model := edits.read_manifest(dataset, control).model) != stated:
        raise ConfigError(
            f"{root} says {model!r}, not {stated!r}: it controls other edits than {name} holds, or "
            "was made otherwise; remove it, and it is made anew"
        )
    return control


def write(
    dataset: Dataset, product: edits.Edits, name: str, *, seed: int = 0
) -> edit_schema.EditManifest:
    """Write the control of `product` as DATA/edits/NAME."""
    users = dataset.train.users
    drawn = np.random.default_rng(seed).random(users.size)
    by_lot = np.lexsort((drawn, users))  # of each user, in random order
    edited = users[product.rows]
    first = np.searchsorted(edited, edited, side="left")
    begins = np.searchsorted(users, edited, side="left")
    rows = by_lot[begins + np.arange(edited.size) - first]
    same = product.replacements == dataset.train.items[rows]
    return edits.write(
        dataset,
        name,
        rows,
        product.noise,
        np.where(same, -1, product.replacements),  # nothing is replaced by itself
        provenance=Provenance(
            built_from=product.manifest.built_from, model=_model(product.manifest, seed)
        ),
    )


def _model(manifest: edit_schema.EditManifest, seed: int) -> str:
    """What the control's manifest says of itself: of which edits it is the control."""
    held = schema.files_hash(manifest.files["edits"])[:8]
    return f"control: random places of {manifest.name} (edits {held}, seed {seed})"
