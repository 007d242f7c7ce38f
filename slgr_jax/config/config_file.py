"""Config files: knobs by their flag names, in TOML, YAML or JSON (`--config=FILE`).

    # mine.toml
    data = "DATA"
    lr = 0.05
    ks = [10, 20]

    [guidance]          # a section of a run groups keys, and means nothing more
    lambda = 0.3

`RUN/config.json`, which every run writes, is such a file. TOML is read by Python itself, YAML by
the extra yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import re
import tomllib
import typing
from collections.abc import Collection, Mapping
from typing import Any

from slgr_jax import json_files
from slgr_jax.config.knobs import flag_name
from slgr_jax.config.run import sections
from slgr_jax.errors import ConfigError, listing

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
# YAML 1.1 takes 1e-3 for text; whoever writes it means a number.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read(path: str) -> dict[str, Any]:
    """The knobs that a file gives, by flag name, of whatever type it gives them.

    Keys below the name of a section of a run (`[optimizer]`) are that section's; any other table
    is a value. There a knob may also have its field's name, as in `RUN/config.json`.

    Raises:
      ConfigError: no such file, another ending than `SUFFIXES`, not of its format, one knob given
        twice, or `restart`, which would delete a run each time that the file is used.
    """
    values: dict[str, Any] = {}
    for key, value in _parsed(pathlib.Path(path)).items():
        group = value if key in sections() else {key: value}
        if not isinstance(group, dict):
            raise ConfigError(f"{path}: {key} = {_shown(value)}: a section is a table of knobs")
        fields = dataclasses.fields(sections()[key]) if key in sections() else ()
        flags = {field.name: flag_name(field) for field in fields}
        for field_name, inner in group.items():
            name = flags.get(field_name, str(field_name))
            if name in values:
                raise ConfigError(f"{path}: {name} is given twice")
            values[name] = inner

    # A run's own: who edits a copy of its config.json means what it says now.
    values.pop(json_files.CHECKSUM, None)
    if values.pop("restart", False):
        raise ConfigError(
            f"{path}: restart deletes a run; remove it, and give --restart on the command line once"
        )
    return values


def _parsed(path: pathlib.Path) -> dict[str, Any]:
    """The top of a config file, a mapping."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"--config={path}: its name must end in one of {listing(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
        if suffix == ".toml":
            return tomllib.loads(text)
        values = json.loads(text) if suffix == ".json" else _yaml(text)
    except OSError as error:
        raise ConfigError(f"--config={path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of every one of the formats, and of UTF-8
        raise ConfigError(f"--config={path} is not {suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config={path} holds {_shown(values)}; expected names and values")
    return values


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("a YAML file needs the extra: pip install 'slgr_jax[yaml]'") from error
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _numbers(value: Any) -> Any:
    """`value` with text such as `1e-3` made a number."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def refuse_unknown(path: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are no flags of a command, with those that are spelled alike.

    Raises:
      ConfigError: there is one.
    """
    for name in names:
        if name not in known:
            like = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {listing(like)}?" if like else "see --help for what there is"
            raise ConfigError(f"{path}: no knob of this command is called {name!r}; {hint}")


def typed(path: str, name: str, hint: Any, value: Any) -> Any:
    """`value` of a file as what a knob of type `hint` holds: str, bool, int, float, tuple or list.

    Raises:
      ConfigError: it is of another type.
    """
    if hint is float and type(value) is int:
        return float(value)
    if hint is list and isinstance(value, list):
        return [str(element) for element in value]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        (inner, *_) = typing.get_args(hint)
        return tuple(typed(path, name, inner, element) for element in value)
    if hint not in (str, bool, int, float) or type(value) is not hint:
        raise ConfigError(
            f"{path}: {name} = {_shown(value)} is {_NAMES.get(type(value), 'of no known type')}; "
            f"--{name} takes {_NAMES.get(hint, 'a list of whole numbers')}"
        )
    return value


_NAMES: Mapping[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
    type(None): "empty",
}


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
