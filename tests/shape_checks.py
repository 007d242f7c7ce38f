"""Annotations of shapes, checked while tests run: `conftest` hooks `checked` into `PACKAGES`.

In production nothing of it runs: an annotation is then a comment that mypy reads.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np

# Where every call, and every dataclass of arrays, is checked against its annotations.
PACKAGES = (
    "slgr_jax.evaluation",
    "slgr_jax.guidance",
    "slgr_jax.kernels",
    "slgr_jax.mesh",
    "slgr_jax.models",
    "slgr_jax.sampling",
    "slgr_jax.serving",
    "slgr_jax.training",
)
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct, jax.core.ShapedArray)


class _MetaArray(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _ARRAYS)


class AnyArray(metaclass=_MetaArray):
    """What may stand where an array of the device is meant, of the same shape and dtype.

    JAX takes numpy arrays too, and rebuilds dataclasses around abstract values.
    """


# Where no shape is given, the same things may stand; an int is a float where a float is meant.
_CONF = beartype.BeartypeConf(
    hint_overrides=beartype.FrozenDict({jax.Array: AnyArray}), is_pep484_tower=True
)


def install() -> None:
    """Check every module of `PACKAGES`; to be called before the first of them is imported."""
    jaxtyping.Array = AnyArray
    jaxtyping.install_import_hook(PACKAGES, "shape_checks.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype` of a function, or of a dataclass's `__init__` where it is given arrays.

    JAX also rebuilds a dataclass of arrays around other things: shardings, axes, shapes.
    """
    for hint in function.__annotations__.values():
        _make_checkable(hint)
    typed = beartype.beartype(conf=_CONF)(function)
    if function.__name__ != "__init__":
        return typed

    @functools.wraps(function)
    def of_arrays(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args[1:], kwargs))
        if leaves and all(isinstance(leaf, _ARRAYS) for leaf in leaves):
            typed(*args, **kwargs)

    return of_arrays


def _make_checkable(hint: Any) -> None:
    """Let `isinstance` look at the members of the protocols in an annotation."""
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for inner in typing.get_args(hint):
        _make_checkable(inner)
