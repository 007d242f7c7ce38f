"""A parent dataset's product for the dataset that was made from it by `slgr prepare --append`.

Indices mean the same in both, so that the rows stay as they are. What must hold is that the teacher
has seen nothing that is evaluated now: what it was shown is the parent's training part, so that all
of it must be in the child's. Rows on what is a training item of its user by now are dropped, as an
import drops them, unless prompts hid training items: there they test the teacher.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from slgr_jax.data import lineage, schema
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError, ManifestError
from slgr_jax.teacher.products import preferences
from slgr_jax.teacher.products.preferences import Provenance

# Counts of a manifest: rows that were carried over, and those that were not.
CARRIED, NOW_TRAINING = "carried_rows", "dropped_now_training_rows"
USERS = "users_with_now_training_items"


def check_seen(dataset: Dataset, parent: Dataset) -> None:
    """Refuse a dataset that was not made from `parent`, or evaluates what a teacher of it saw.

    Raises:
      ManifestError: see above; `parent` itself is refused, too.
    """
    hashes = dataclasses.asdict(parent.manifest)
    line = lineage.line_from(dataset.manifest, hashes)
    if line is None:
        raise ManifestError(
            f"{dataset.path} was not made from {parent.path} (split "
            f"{parent.manifest.split_hash[:8]}) by slgr prepare --append: indices may mean other "
            "users and items; export the teacher there and import it here (slgr teach export)"
        )
    if not line:
        raise ManifestError(
            f"{dataset.path} and {parent.path} hold the same split, "
            f"{parent.manifest.split_hash[:8]}: its teachers fit as they are; copy them"
        )
    shown = parent.positives(("train",))
    still = dataset.positives(("train",)).contains(shown.owners(), shown.indices)
    if not still.all():
        raise ManifestError(
            f"{np.count_nonzero(~still)} of {still.size} training interactions of {parent.path}, "
            f"which its teachers may have been shown, are evaluated in {dataset.path}: a teacher "
            "would leak them; ask it anew"
        )


def carry(
    dataset: Dataset,
    parent: Dataset,
    name: str,
    *,
    new_items: str = "error",
    rows_per_shard: int = preferences.ROWS_PER_SHARD,
    overwrite: bool = False,
) -> schema.TeacherManifest:
    """Write PARENT/teacher/NAME as DATA/teacher/NAME.

    Args:
      dataset: made from `parent` by `slgr prepare --append`, perhaps over several days.
      new_items: items that the parent had not, where unlisted items rank below a list: error;
        below = they, too, though the teacher could not name them; unknown = all unlisted items of
        the product are taken for not asked about.
      rows_per_shard, overwrite: as for `preferences.write_product`.

    Raises:
      ManifestError: as `check_seen` and `preferences.load`: the teacher has seen evaluation data.
      InputError: nothing is left, or the lists say nothing of new items and `new_items` is error.
    """
    check_seen(dataset, parent)
    table, manifest = preferences.stored(parent, name)
    unlisted = _unlisted(manifest, dataset, parent, new_items)
    trained = np.zeros(table.num_rows, bool)
    if manifest.training_items != "hidden":
        trained = now_training(table, dataset, parent)
    if table.num_rows and trained.all():
        raise InputError(
            f"all {table.num_rows} rows of teacher {name!r} are on what are training items by now: "
            "nothing is left to carry; ask the teacher anew"
        )
    users = table.column("user").to_numpy()[trained]
    counts = {CARRIED: int((~trained).sum()), NOW_TRAINING: int(trained.sum())}
    counts[USERS] = int(np.unique(users).size)
    stated = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(Provenance)}
    stated |= {"unlisted": unlisted, "carried_from": parent.manifest.split_hash}
    return preferences.write_product(
        dataset,
        name,
        table.filter(pa.array(~trained)),
        provenance=Provenance(**stated),
        counts={**manifest.counts, **counts},
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
    )


def now_training(table: pa.Table, dataset: Dataset, parent: Dataset) -> np.ndarray:
    """[rows] bool: names a training item of its user that was none in the parent.

    Args:
      table: one of `schema.TEACHER_SCHEMAS`; a preference counts where either item is one.
    """
    before, now = parent.positives(("train",)), dataset.positives(("train",))
    users = table.column("user").to_numpy()
    trained = np.zeros(table.num_rows, bool)
    for name in ("item", "preferred", "other"):
        if name in table.column_names:
            items = table.column(name).to_numpy()
            trained |= now.contains(users, items) & ~before.contains(users, items)
    return trained


def _unlisted(
    manifest: schema.TeacherManifest, dataset: Dataset, parent: Dataset, new_items: str
) -> str:
    """What unlisted items of the carried product mean."""
    added = dataset.n_items - parent.n_items
    if manifest.unlisted != "below" or not added or new_items == "below":
        return manifest.unlisted
    if new_items == "unknown":
        return "unknown"
    raise InputError(
        f"unlisted items rank below the lists of teacher {manifest.name!r}, and {dataset.path} has "
        f"{added} items that it could not name: --new_items=below ranks them below all the same, "
        "--new_items=unknown keeps only the order within the lists"
    )
