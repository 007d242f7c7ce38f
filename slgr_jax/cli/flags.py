"""Sections of `slgr_jax.config` as absl flags, and one-line errors for every command.

`run(main, sections=..., required=...)` is the whole of a command's ceremony: it defines a flag
per knob, answers `--help` without importing JAX, turns a bad flag or a `UserError` into one line
on standard error and exit status 2, shows what the library logs (`console`), and calls `main`.
Every command with knobs takes `--config=FILE`, in which they have the same names
(`config.config_file`); what the command line gives counts more.
What JAX compiles is kept for the next process (`keep_compiled`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from slgr_jax import config
from slgr_jax.cli import console
from slgr_jax.config import RunConfig, config_file
from slgr_jax.config.knobs import Knob, Section, flag_name, knob_of
from slgr_jax.errors import ConfigError, UserError, listing
from slgr_jax.files import cache_directory

FLAGS = flags.FLAGS
EXIT_USER_ERROR = 2
EXIT_KILLED = 130  # 128 + SIGINT, as a shell says it
EXIT_AWAITING = 76  # what somebody else makes is not there yet: the same command goes on
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the same command goes on later
_HELP = frozenset({"-h", "-help", "--help", "--helpfull", "--helpshort"})
# absl's names for the types of flags that are no knobs.
_TYPES = {"string": str, "bool": bool, "int": int, "float": float}
# What the system says of a path that a user gave; anything else is a defect.
_PATH_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    }
)


class _IntTuple(flags.ArgumentParser[tuple[int, ...]]):
    """Comma-separated integers, `10,20`."""

    def parse(self, argument: Any) -> tuple[int, ...]:
        if isinstance(argument, tuple):
            return argument
        try:
            return tuple(int(part) for part in str(argument).split(",") if part.strip())
        except ValueError as error:
            raise ValueError("expected integers separated by commas, e.g. 10,20") from error


class _Space(flags.ArgumentParser[Any]):
    """A search space: text on the command line, a table in a config file."""

    def flag_type(self) -> str:
        return "space"

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str | Mapping):
            raise ValueError("expected a table of knobs and their values")
        return argument


class _TupleSerializer(flags.ArgumentSerializer[Any]):
    def serialize(self, value: Any) -> str:
        return ",".join(str(part) for part in value)


def only(section: type[Section], names: Collection[str]) -> type[Section]:
    """`section` reduced to the knobs of these command-line names, for `run(sections=...)`.

    Raises:
      AssertionError: the section has no knob of a name.
    """
    hints = typing.get_type_hints(section)
    kept = [field for field in dataclasses.fields(section) if flag_name(field) in names]
    missing = set(names) - {flag_name(field) for field in kept}
    assert not missing, f"{section.__name__} has no knob {sorted(missing)}"

    fields = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(default=field.default, metadata=field.metadata),
        )
        for field in kept
    ]
    return dataclasses.make_dataclass(
        section.__name__,
        fields,
        bases=(Section,),
        frozen=True,
        namespace={"__doc__": section.__doc__},
    )


def without(section: type[Section], names: Collection[str]) -> type[Section]:
    """`section` without the knobs of these names, where it has them, for `run(sections=...)`."""
    every = [flag_name(field) for field in dataclasses.fields(section)]
    return only(section, [name for name in every if name not in names])


def define_section(section: type[Section]) -> None:
    """Define one absl flag per knob of `section`, with the section's own defaults."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, meta, hint = flag_name(field), knob_of(field), hints[field.name]
        if name in FLAGS:
            raise AssertionError(f"two knobs are called --{name}")
        _define(name, field.default, hint, meta)


def define_space(name: str, text: str) -> None:
    """Define a flag that holds a search space (`experiments.search_space`)."""
    flags.DEFINE(_Space(), name, "", text)


def _define(name: str, default: Any, hint: Any, meta: Knob) -> None:
    if hint is bool:
        flags.DEFINE_bool(name, default, meta.help)
    elif hint is int:
        flags.DEFINE_integer(name, default, meta.help)
    elif hint is float:
        flags.DEFINE_float(name, default, meta.help)
    elif hint is str:
        # Choices are checked by the section, which words the error; absl would print three lines.
        flags.DEFINE_string(name, default, meta.help)
    else:
        flags.DEFINE(_IntTuple(), name, default, meta.help, serializer=_TupleSerializer())


def section_from_flags(section: type[Any]) -> Any:
    """The section with the values given on the command line; a knob without a flag keeps its
    default."""
    values = {
        field.name: FLAGS[flag_name(field)].value
        for field in dataclasses.fields(section)
        if flag_name(field) in FLAGS
    }
    return section(**values)


def given_knobs(*sections: type[Section]) -> dict[str, Any]:
    """The knobs of `sections` that the command line gives, by their names there."""
    names = [flag_name(field) for section in sections for field in dataclasses.fields(section)]
    return {
        name: FLAGS[name].value
        for name in names
        if name in FLAGS and not FLAGS[name].using_default_value
    }


def run_config_from_flags(data: str, workdir: str) -> RunConfig:
    """The `RunConfig` that the command line describes.

    A knob that is not given there has the default of --backbone, where that has one of its own.
    """
    return config.make_run(data, workdir, **given_knobs(*config.sections().values()))


def _range_text(meta: Knob, name: str) -> str:
    others: dict[str, list[str]] = {}
    for backbone, defaults in config.BACKBONE_DEFAULTS.items():
        if name in defaults:
            others.setdefault(str(defaults[name]), []).append(backbone)
    parts = [f"default {value} for {', '.join(which)}" for value, which in others.items()]
    if meta.choices is not None:
        parts.append("one of " + ", ".join(choice or "''" for choice in meta.choices))
    if meta.minimum is not None:
        parts.append(f">= {meta.minimum:g}")
    if meta.above is not None:
        parts.append(f"> {meta.above:g}")
    if meta.maximum is not None:
        parts.append(f"<= {meta.maximum:g}")
    if meta.below is not None:
        parts.append(f"< {meta.below:g}")
    return "; ".join(parts)


def help_text(usage: str, sections: Sequence[type[Section]], own: Sequence[str]) -> str:
    """The command's docstring, then its flags in groups: default, meaning, valid values."""
    lines = [usage.strip(), ""]

    def add(name: str, default: Any, text: str, valid: str) -> None:
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        head = f"  --{name}={shown}" if shown not in (None, "") else f"  --{name}=..."
        body = f"{text} ({valid})" if valid else text
        lines.append(head)
        indent = " " * 6
        lines.extend(
            textwrap.wrap(
                body,
                92,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,  # a name that is cut cannot be copied
            )
        )

    if own:
        lines.append("This command:")
        for name in own:
            flag = FLAGS[name]
            add(name, flag.default, flag.help or "", "")
    for section in sections:
        fields = [field for field in dataclasses.fields(section) if flag_name(field) in FLAGS]
        if not fields:
            continue
        doc = (section.__doc__ or section.__name__).strip().splitlines()[0].rstrip(".")
        lines.extend(["", f"{doc}:"])
        for field in fields:
            meta = knob_of(field)
            add(flag_name(field), field.default, meta.help, _range_text(meta, flag_name(field)))
    return "\n".join(lines)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Exit quietly with status 1 on a closed pipe (EPIPE)."""
    try:
        yield
        print(end="", flush=True)  # what is still buffered fails here, and not at Python's end
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at its end
        raise SystemExit(1) from None


def keep_compiled() -> None:
    """Let JAX keep every program it compiles for the next process, unless told otherwise.

    JAX reads these variables when it is first imported. `JAX_COMPILATION_CACHE_DIR` moves the
    cache, `JAX_ENABLE_COMPILATION_CACHE=0` turns it off. Where nothing can be written there is
    none: JAX would warn of each program.
    """
    cache = str(cache_directory("xla"))
    # Small programs too: all of them together take longer to compile than a large one to look up.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):
        os.makedirs(cache, exist_ok=True)
    if os.access(cache, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether --help, in one of its spellings, is among the arguments."""
    return any(word in _HELP for word in arguments)


def show_help(text: str) -> NoReturn:
    """Print the help and exit with status 0; a reader that leaves early is no error."""
    with _reader_may_leave():
        print(text)
    raise SystemExit(0)


def run(
    main: Callable[[list[str]], None],
    *,
    usage: str,
    name: str = "",
    sections: Sequence[type[Section]] = (),
    define: Callable[[], None] | None = None,
    own: Sequence[str] = (),
    required: Sequence[str] = (),
    stand_ins: Mapping[str, tuple[str, ...]] | None = None,
    positional: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> None:
    """Parse the command line, then call `main` with the positional arguments.

    Args:
      main: does the work; gets the positional arguments (sub-command names).
      usage: text shown first by `--help`, normally the command's `__doc__`.
      name: what a user types to call the command, `slgr train`; errors say `NAME --help`.
      sections: sections whose knobs become flags.
      define: defines the command's own flags, with `absl.flags`.
      own: names of flags that the script defined itself before, for `--help`.
      required: names of flags that must be given.
      stand_ins: required flag -> flags that may be given in its place.
      positional: accepted values of the first positional argument; none if empty.
      hints: flag that the command does not have -> the error when it is given all the same.
    """
    before = set(FLAGS)
    if define is not None:
        define()
    own = (*own, *(flag for flag in FLAGS if flag not in before))
    for section in sections:
        define_section(section)
    if sections:
        flags.DEFINE_string(
            "config", "", "TOML, YAML or JSON file with flags by name; the command line wins"
        )
        own = (*own, "config")

    def parse(argv: Sequence[str]) -> list[str]:
        if wants_help(argv[1:]):
            show_help(help_text(usage, sections, own))
        rest = _positional(argv, name, hints or {})
        if sections and FLAGS["config"].value:
            _read_config_file(FLAGS["config"].value, sections, own)
        _check_positional(rest, positional, name)
        missing = [flag for flag in required if not _given(flag, stand_ins or {})]
        if missing:
            fail(f"missing {listing('--' + flag for flag in missing)}; {_see_help(name)}")
        return rest

    app.run(_guarded(main), flags_parser=parse)


def _given(flag: str, stand_ins: Mapping[str, tuple[str, ...]]) -> bool:
    return any(FLAGS[name].value for name in (flag, *stand_ins.get(flag, ())))


def _see_help(name: str) -> str:
    return f"see {name} --help" if name else "see --help"


def _positional(argv: Sequence[str], name: str, hints: Mapping[str, str]) -> list[str]:
    """Parse the flags; what is left of the command line."""
    try:
        return list(FLAGS(list(argv))[1:])
    except flags.UnrecognizedFlagError as error:
        if error.flagname in hints:
            fail(hints[error.flagname])
        fail(f"{error}; {_see_help(name)}")
    except flags.Error as error:
        fail(f"{error}; {_see_help(name)}")


def _read_config_file(path: str, sections: Sequence[type[Section]], own: Sequence[str]) -> None:
    """Let flags that the command line does not give have the values of a config file."""
    knob_types: dict[str, Any] = {}
    for section in sections:
        of_fields = typing.get_type_hints(section)
        knob_types |= {flag_name(f): of_fields[f.name] for f in dataclasses.fields(section)}
    try:
        values = config_file.read(path)
        config_file.refuse_unknown(path, values, (set(own) - {"config"}) | set(knob_types))
        for name, value in values.items():
            flag = FLAGS[name]
            typed = _typed(path, flag, knob_types.get(name), value)
            if not flag.present:
                flag.value, flag.using_default_value = typed, False
    except UserError as error:
        fail(str(error))


def _typed(path: str, flag: flags.Flag[Any], hint: Any, value: Any) -> Any:
    """A config file's value of a knob of type `hint`, or of a command's own flag."""
    kind = flag.flag_type()
    if hint is None and "string" in kind and kind != "string":  # a list of strings, by commas or
        value, hint = value if isinstance(value, list) else [value], list  # by repetition
    if hint is None and kind in _TYPES:
        value = config_file.typed(path, flag.name, _TYPES[kind], value)
    if hint is not None:
        return config_file.typed(path, flag.name, hint, value)
    try:
        return flag.parser.parse(
            value
        )  # which knows its bounds, or reads what has a type of its own
    except ValueError as error:
        raise ConfigError(f"{path}: {flag.name}: {error}") from error


def _check_positional(rest: Sequence[str], positional: Sequence[str], name: str) -> None:
    unexpected = rest
    if positional:
        if not rest or rest[0] not in positional:
            given = f"{rest[0]!r} is not a command" if rest else "no command given"
            fail(f"{given}; commands: {listing(positional)}; {_see_help(name)}")
        unexpected = rest[1:]
    if unexpected:
        fail(f"unexpected argument {listing(unexpected)}; flags look like --name=value")


def _guarded(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main`, with its errors in one line."""

    def guarded(rest: list[str]) -> None:
        keep_compiled()
        verbosity = FLAGS["verbosity"]
        console.install(quiet=verbosity.present and verbosity.value < 0)
        # Importing and tracing make little but what stays: to look through it every 700 objects
        # takes an eighth of a start.
        gc.set_threshold(100_000, 20, 20)
        # Orbax logs every file it writes, and each error that it then raises as well.
        if not verbosity.present:
            logging.set_verbosity(logging.FATAL)

        try:
            with _reader_may_leave():
                main(rest)
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on or begins anew", file=sys.stderr)
            raise SystemExit(EXIT_KILLED) from None
        except OSError as error:
            if error.errno not in _PATH_ERRORS:
                raise
            where = f" while writing {error.filename}" if error.filename else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free space or choose another path" if full else "choose another path"
            fail(f"{os.strerror(error.errno or 0)}{where}; {fix}")

    return guarded
