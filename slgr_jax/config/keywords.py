"""Keyword arguments of Python as knobs, each of its type: `slgr_jax.train(..., lr=0.1)`."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slgr_jax.config.knobs import Section, flag_name
from slgr_jax.errors import ConfigError, listing


def _typed(name: str, hint: Any, value: Any) -> Any:
    """`value` as what a knob of type `hint` holds.

    Raises:
      ConfigError: it is of another type.
    """
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple | range):
        (inner, *_) = typing.get_args(hint)
        return tuple(_typed(name, inner, element) for element in value)
    if hint is str and isinstance(value, list | tuple):
        return ",".join(_typed(name, str, element) for element in value)

    accepted: Mapping[Any, tuple[type, Callable[[Any], Any]]] = {
        str: (str, str),
        bool: (bool, bool),
        int: (numbers.Integral, int),
        float: (numbers.Real, float),
    }
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    kind, convert = accepted.get(hint, (tuple, tuple))
    # True is an Integral; a knob that counts is no switch.
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        wanted = "a list" if kind is tuple else f"of type {hint.__name__}"
        raise ConfigError(f"--{name}={value!r} is of type {type(value).__name__}, not {wanted}")
    return convert(value)


def knob_values(sections: Sequence[type[Section]], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as knobs by their command-line names, each of its type.

    Raises:
      ConfigError: none of the sections has a knob of a name, or a value is of another type.
    """
    hints: dict[str, Any] = {}
    for section in sections:
        of_fields = typing.get_type_hints(section)
        hints |= {flag_name(field): of_fields[field.name] for field in dataclasses.fields(section)}

    values = {}
    for keyword, value in knobs.items():
        name = "lambda" if keyword == "lambda_" else keyword
        if name not in hints:
            like = difflib.get_close_matches(name, hints, n=3)
            known = f"; did you mean {listing(like)}?" if like else ""
            raise ConfigError(f"no knob is called {name!r}{known}")
        values[name] = _typed(name, hints[name], value)
    return values


def section_of(section: type[Any], values: Mapping[str, Any]) -> Any:
    """A section with those of `values` that are its knobs."""
    fields = {flag_name(field): field.name for field in dataclasses.fields(section)}
    return section(**{fields[name]: value for name, value in values.items() if name in fields})
