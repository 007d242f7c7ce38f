"""What a sub-command of `slgr teach` is: its words, its work, and the knobs that it uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from slgr_jax.cli import flags
from slgr_jax.config import TeachConfig
from slgr_jax.config.knobs import Section, flag_name

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset

_ALWAYS = ("data", "name")


@dataclasses.dataclass(frozen=True)
class SubCommand:
    """One of `slgr teach ...`. A knob that it does not use is no flag of it.

    Attributes:
      usage: the docstring of its module: what --help shows first; the first line is its summary.
      work: (dataset, what commands share) -> None; reads its other knobs off the flags.
      common: the knobs of `TeachConfig` that it uses, beside data and name.
      sections: sections of which it uses every knob.
      parts: sections of which it uses some knobs, and these.
      required: flags that must be given, beside data and name.
      stand_ins: required flag -> those that may be given in its place.
      refused: flags that other sub-commands have -> why this one cannot have them.
    """

    usage: str
    work: Callable[[Dataset, TeachConfig], None]
    common: tuple[str, ...] = ()
    sections: tuple[type[Section], ...] = ()
    parts: Mapping[type[Section], tuple[str, ...]] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()
    stand_ins: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of `usage`."""
        return self.usage.strip().splitlines()[0]

    def flag_sections(self) -> tuple[type[Section], ...]:
        """The sections whose knobs become flags, reduced to what is used."""
        some = [flags.only(section, names) for section, names in self.parts.items()]
        return (flags.only(TeachConfig, (*_ALWAYS, *self.common)), *self.sections, *some)

    def flag_names(self) -> frozenset[str]:
        """The flags that it has."""
        return frozenset(
            flag_name(field)
            for section in self.flag_sections()
            for field in dataclasses.fields(section)
        )
