"""A product is of one dataset, one split and one id map, and knows nothing of what is evaluated:
others are refused."""

from __future__ import annotations

from typing import Protocol

from slgr_jax.data import schema
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


def refuse_leak(built_from: str, product: str, fix: str) -> None:
    """Raise `ManifestError` where a product has seen evaluation data, or does not say what it saw.

    Args:
      built_from: as its manifest says, of `schema.BUILT_FROM`.
      product: names it in the error.
      fix: what to do.
    """
    if built_from not in schema.BUILT_FROM or built_from == "includes_eval":
        raise ManifestError(
            f"{product} says built_from={built_from}: training on it would leak evaluation data; "
            f"{fix}"
        )
