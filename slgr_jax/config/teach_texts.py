"""The knobs of texts that an LLM writes about users and items: slgr teach requests, collect."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from slgr_jax.config.knobs import Section, knob
from slgr_jax.errors import ConfigError

# What a request asks a text for, and of whom it is: user or item.
TEXT_PROMPTS: Mapping[str, str] = {
    "user_profile": "user",
    "item_description": "item",
    "kar_user": "user",
    "kar_item": "item",
    "user_attributes": "user",
    "item_attributes": "item",
}
# The factors that a template with $factors asks about where --factors is empty.
FACTORS = ("category", "theme", "style", "mood", "quality", "audience")


@dataclasses.dataclass(frozen=True)
class TextConfig(Section):
    """requests, collect: texts of users and items (--prompt=user_profile, kar_item, ...)."""

    factors: str = knob(
        "",
        "requests of a template with $factors (kar_user, kar_item, user_attributes, "
        "item_attributes): a text for each of these, separated by commas (genre,director,mood); "
        f"empty: {','.join(FACTORS)}",
    )
    words: int = knob(100, "requests: most words that a text is asked for", minimum=1)
    item_words: int = knob(
        200, "requests: words of an item's description that a prompt about it shows", minimum=0
    )
    embed: str = knob(
        "",
        "collect: also make DATA/embeddings/... of the texts, as slgr teach embed --item_texts (or "
        "--user_texts) does; with factors a vector for each (--chunks=1, unless another is given)",
    )

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The factors that were given, in their order; () where none were.

        Raises:
          ConfigError: one has no letter, or is there twice.
        """
        names = tuple(" ".join(name.split()) for name in self.factors.split(","))
        if not self.factors.strip():
            return ()
        plain = ["".join(filter(str.isalnum, name.casefold())) for name in names]
        if not all(plain) or len(set(plain)) < len(names):
            raise ConfigError(
                f"--factors={self.factors!r} has a name that is empty, without a letter or there "
                "twice; give different words, separated by commas: genre,director,mood"
            )
        return names


def refuse_text_knobs(options: TextConfig, prompt: str) -> None:
    """Raise `ConfigError` where knobs of texts are given with a prompt that asks for none."""
    for name in ("factors", "words", "item_words"):
        value, default = getattr(options, name), getattr(TextConfig, name)
        if value != default:
            raise ConfigError(
                f"--{name}={value} is of a prompt that asks for texts ({', '.join(TEXT_PROMPTS)}), "
                f"and --prompt={prompt} asks about candidates; drop one of them"
            )
