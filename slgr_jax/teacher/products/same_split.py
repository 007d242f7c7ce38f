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


def seen_in(dataset: Dataset) -> str:
    """What a product has seen that is made of all that can be learned from in `dataset`."""
    return "train_only" if dataset.as_split is None else "includes_valid"


def more_seen(*built_from: str) -> str:
    """What has been seen by what is made of several: the most that one of them has."""
    return max(built_from, key=schema.BUILT_FROM.index)


def able_to_read(dataset: Dataset, built_from: str) -> Dataset:
    """The dataset that a product may be read with to be shown, not learned from."""
    needs_validation = built_from == "includes_valid" and dataset.as_split is None
    return dataset.with_validation() if needs_validation else dataset


def refuse_leak(dataset: Dataset, built_from: str, product: str, fix: str) -> None:
    """Raise `ManifestError` where a product has seen evaluation data, or does not say what it saw.

    Args:
      dataset: what learns from it; where validation has joined training (`with_validation`), what
        has seen that is welcome.
      built_from: as its manifest says, of `schema.BUILT_FROM`.
      product: names it in the error.
      fix: what to do.
    """
    if built_from not in schema.BUILT_FROM or built_from == "includes_eval":
        raise ManifestError(
            f"{product} says built_from={built_from}: training on it would leak evaluation data; "
            f"{fix}"
        )
    if built_from == "includes_valid" and dataset.as_split is None:
        raise ManifestError(
            f"{product} was made of training and validation (built_from=includes_valid): only a "
            "refit learns from it, slgr train --refit=RUN --teacher=NAME or slgr compare "
            "--refit_teacher=NAME; name here the one that was made of training"
        )
