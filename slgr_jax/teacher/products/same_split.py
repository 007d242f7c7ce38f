"""A product is of one dataset, one split and one id map: others are refused."""

from __future__ import annotations

from typing import Protocol

from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ManifestError


class OfSplit(Protocol):
    """A manifest that says what it was made for."""

    @property
    def id_map_hash(self) -> str: ...

    @property
    def split_hash(self) -> str: ...


def refuse_other_split(
    dataset: Dataset, manifest: OfSplit, product: str, fix: str = "make it again"
) -> None:
    """Raise `ManifestError` where a manifest is of another split or id map than the dataset.

    Args:
      dataset: what the product must fit.
      manifest: of the product.
      product: names it in the error.
      fix: what to do.
    """
    for name, noun in (("id_map_hash", "id map"), ("split_hash", "split")):
        of_product, of_data = getattr(manifest, name), getattr(dataset.manifest, name)
        if of_product != of_data:
            raise ManifestError(
                f"{product} was made for {noun} {of_product[:8]}, {dataset.path} has {noun} "
                f"{of_data[:8]}; {fix}"
            )
