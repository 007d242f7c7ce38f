"""The knobs of slgr teach embed, nearest and factors: vectors of items and users."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import WIDTH, Section, knob
from slgr_jax.errors import ConfigError

# What makes vectors of texts.
EMBEDDERS = ("wordllama", "transformers")


@dataclasses.dataclass(frozen=True)
class EmbedConfig(Section):
    """embed: item and user vectors to DATA/embeddings/NAME."""

    embedder: str = knob(
        "wordllama", "local model that reads the item texts (--llm as above)", choices=EMBEDDERS
    )
    vectors: str = knob(
        "",
        "import instead: Parquet or Arrow with item and vector, npz with ids and vectors (ids as "
        "in the raw data), or batch-API results (.jsonl) whose custom_id is item-ID; "
        "--built_from and --unknown as for import",
    )
    user_vectors: str = knob("", "import: the users' vectors, likewise; empty: see --users")
    item_texts: str = knob(
        "",
        "DATA/texts/... (collect) that local models read in place of the items' own texts; an item "
        "without one has no vector",
    )
    user_texts: str = knob(
        "", "DATA/texts/... that local models read of the users; empty: see --users"
    )
    users: str = knob(
        "history",
        "a user's vector: history = mean of its training items' vectors, text = of the user's own "
        "text in DATA (local models)",
        choices=("history", "text"),
    )
    text_requests: str = knob(
        "",
        "write only this file: batch-API embedding requests (.jsonl) of the item texts, and of "
        "--user_texts, for --model; give what comes back with --vectors (and --user_vectors)",
    )
    dtype: str = knob(
        "float32",
        "type of the numbers on disk (chunks: float16)",
        choices=("float32", "float16"),
    )
    chunks: int = knob(
        0,
        "several vectors a row: at most so many chunks of each field (title, categories, text; of "
        "--item_texts the factors; of a file its column field). --vectors: one line a chunk. 0 = "
        "one vector a row",
        minimum=0,
        maximum=1024,
    )
    chunk_words: int = knob(
        64,
        "--chunks: words of a chunk; more where a text would have more chunks than --chunks",
        minimum=1,
        maximum=100_000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("item", "user"):
            texts, vectors = getattr(self, f"{side}_texts"), self.vectors or self.user_vectors
            if texts and vectors:
                raise ConfigError(
                    f"--{side}_texts={texts} is read by a local model, and {vectors} holds vectors "
                    "already; drop one of them"
                )
        if self.user_texts and self.users == "text":
            raise ConfigError(
                f"--users=text reads the users' own texts in DATA, and --user_texts="
                f"{self.user_texts} others; drop one of them"
            )
        default = type(self).chunk_words
        if not self.chunks and self.chunk_words != default:
            raise ConfigError(
                f"--chunk_words={self.chunk_words} is of several vectors a row; add --chunks=8"
            )
        if self.chunks and self.text_requests:
            raise ConfigError(
                f"--text_requests asks for one vector a row, and --chunks={self.chunks} for "
                "several; drop one of them (vectors of chunks made elsewhere: --vectors)"
            )
        if self.chunks and self.vectors and self.chunk_words != default:
            raise ConfigError(
                f"--chunk_words={self.chunk_words} cuts texts, and --vectors={self.vectors} are "
                "vectors of chunks already; drop one of them"
            )


@dataclasses.dataclass(frozen=True)
class NearestConfig(Section):
    """nearest: each user's nearest items by text, as a list over the whole catalogue."""

    listed: int = knob(50, "length of a user's list (from_run, from_baseline: likewise)", minimum=1)
    embeddings: str = knob(
        "", "vectors of DATA/embeddings/NAME (embed); empty = wordllama's of the item texts"
    )
    centre: bool = knob(
        True,
        "--embeddings: subtract the mean item vector first, which vectors of most language models "
        "share and which tells items not apart (users without a history: the mean user vector)",
    )


@dataclasses.dataclass(frozen=True)
class SimilarConfig(Section):
    """similar: users' lists from lists of items beside an item."""

    similar: str = knob(
        "",
        "Parquet, Arrow or CSV file with item, other, and perhaps score or rank (1 the best); ids "
        "as in the raw data",
    )


@dataclasses.dataclass(frozen=True)
class FactorConfig(Section):
    """factors: vectors whose inner products are a recommender's scores."""

    width: int = knob(
        256,
        "numbers of a vector, the best first: a run whose rows are narrower takes the first ones",
        minimum=1,
        maximum=WIDTH,
    )
