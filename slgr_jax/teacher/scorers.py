"""Language models that run locally: a teacher without a service and without a download.

`WordLlama` reads token vectors distilled from a Llama out of an installed package. The scoring
rule on top knows nothing but item texts and training histories (`item_vectors`,
`profiles`): the score of (u, i) is the cosine of the mean vector of u's training items and
the vector of i. Whom to ask about what follows S-LLMR (arXiv 2512.21526, section 3.1).

Shape letters: U users, I items, D width of a text vector, n rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import scipy.sparse

from slgr_jax.config import SliceConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import InputError, UserError
from slgr_jax.teacher import preferences

# One vector per field: a long title must not drown the genres, nor a long text the title.
TEMPLATE = "fields: title without '(year)' | year | categories joined by ', ' | text"
# Added to a field's covariance, in units of its mean variance, before whitening. 5 to 40 give
# the same held-in accuracy within .01 on MovieLens-100K.
SHRINKAGE = 10.0
_INSTALL = "pip install 'slgr_jax[llm]' (from a checkout: pip install -e '.[llm]')"
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_CHUNK = 8192


class Embedder(Protocol):
    """A language model as this module sees it."""

    @property
    def name(self) -> str:
        """Model name for manifests."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] float32 of unit length; a text without tokens is a zero row."""


class WordLlama:
    """Token vectors [32,000, 256] distilled from a Llama, read from the package `wordllama`.

    The package's own loader asks a model hub, so its two files are read directly and the
    package is never imported.

    Raises:
      UserError: the extra `llm` is not installed, or the package holds other files.
    """

    name = "wordllama-l2_supercat-256"

    def __init__(self) -> None:
        found = importlib.util.find_spec("wordllama")
        if found is None or not found.submodule_search_locations:
            raise UserError(f"--scorer=wordllama needs the package wordllama: {_INSTALL}")
        try:
            import safetensors.numpy
            import tokenizers
        except ImportError as error:
            raise UserError(f"--scorer=wordllama needs {error.name}: {_INSTALL}") from error
        root = pathlib.Path(next(iter(found.submodule_search_locations)))
        weights = root / "weights" / "l2_supercat_256.safetensors"
        vocabulary = root / "tokenizers" / "l2_supercat_tokenizer_config.json"
        for path in (weights, vocabulary):
            if not path.is_file():
                raise UserError(f"the installed wordllama lacks {path.name}: {_INSTALL}")
        tensors = safetensors.numpy.load_file(weights)
        self._vectors = tensors["embedding.weight"].astype(np.float32)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the token vectors of each text, L2-normalised, [n, 256] float32."""
        chunks = [self._embed(texts[k : k + _CHUNK]) for k in range(0, len(texts), _CHUNK)]
        return np.concatenate(chunks) if chunks else np.zeros((0, self._vectors.shape[1]), "f4")

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [np.asarray(one.ids, np.int32) for one in encoded]
        starts = np.concatenate([[0], np.cumsum([one.size for one in ids])])
        tokens = np.concatenate(ids)
        bags = scipy.sparse.csr_matrix(
            (np.ones(tokens.size, np.float32), tokens, starts),
            shape=(len(ids), self._vectors.shape[0]),
        )
        return _unit(np.asarray(bags @ self._vectors))


def make(name: str) -> Embedder:
    """The local model called `name`, one of `config.SCORERS`."""
    return {"wordllama": WordLlama}[name]()


def item_fields(dataset: Dataset) -> dict[str, list[str]]:
    """Per field the text of each item, empty where it has none: `TEMPLATE`."""
    raw = {name: dataset.items.column(name).to_pylist() for name in ("title", "text")}
    titles = [title or "" for title in raw["title"]]
    years = [_YEAR.search(title) for title in titles]
    categories = dataset.items.column("categories").to_pylist()
    return {
        "title": [_YEAR.sub("", title) for title in titles],
        "year": [year.group(1) if year else "" for year in years],
        "categories": [", ".join(name for name in row or () if name) for row in categories],
        "text": [text or "" for text in raw["text"]],
    }


def item_vectors(dataset: Dataset, embedder: Embedder) -> np.ndarray:
    """[I, F * D] float32 of unit length, F fields; an item without any text is a zero row.

    Per field: centre on the catalogue mean, normalise, and whiten with
    (C + SHRINKAGE * tr(C) / D * I)^(-1/2), C the catalogue's covariance; then concatenate and
    normalise. The dot product of two such vectors is a sum of Mahalanobis products per field.
    """
    blocks = []
    for texts in item_fields(dataset).values():
        present = np.array([bool(text.strip()) for text in texts], bool)
        if len(set(texts)) < 2:  # nothing to tell items apart
            continue
        vectors = embedder.embed(texts)
        centred = _unit(vectors - vectors[present].mean(0))
        centred[~present] = 0
        covariance = centred.T.astype(np.float64) @ centred / present.sum()
        values, axes = np.linalg.eigh(covariance)
        scale = np.sqrt(np.maximum(values, 0) + SHRINKAGE * values.mean())
        blocks.append((centred @ axes / scale).astype(np.float32))
    if not blocks:
        raise InputError(
            f"{dataset.path} has no item texts to score with; prepare it again with item titles "
            "(launch/prepare.py --items_input)"
        )
    return _unit(np.concatenate(blocks, axis=1))


def profiles(history: Csr, vectors: np.ndarray) -> np.ndarray:
    """[U, F * D]: unit mean of the vectors of each user's items; zero without any."""
    size = history.indices.size
    bags = scipy.sparse.csr_matrix(
        (np.ones(size, np.float32), history.indices, history.offsets),
        shape=(history.offsets.size - 1, vectors.shape[0]),
    )
    return _unit(np.asarray(bags @ vectors))


def score_candidates(
    dataset: Dataset, embedder: Embedder, options: TeachConfig
) -> tuple[pa.Table, dict[str, int]]:
    """Choose (user, item) pairs and score them: rows of `schema.TEACHER_SCORES`, and counts.

    Only training interactions are looked at. Users without a training item with text cannot be
    asked about, and a user's own training items are never candidates.

    Args:
      dataset: item texts, training interactions.
      embedder: the language model.
      options: `candidates` per user are drawn without repeats from the `popular_pool` items with
        most training users; `cold_candidates` per cold user (default `SliceConfig`), one item from
        each of that many equally large cells of the text space; each item in the least popular
        share `tail_fraction` is paired with `tail_users` random users; `seed` of all draws.
    """
    vectors = item_vectors(dataset, embedder)
    history = dataset.positives(("train",))
    users = profiles(history, vectors)
    able = np.flatnonzero(_filled(users))
    rng = np.random.default_rng(options.seed)
    slices = dataset.slices(SliceConfig(tail_item_fraction=options.tail_fraction))
    described = _filled(vectors)
    order = np.lexsort((np.arange(dataset.n_items), -dataset.popularity.astype(np.int64)))
    pool = order[described[order]][: options.popular_pool]
    cold = able[slices.cold_users[able]]
    tail = np.flatnonzero(slices.tail_items & described)
    asked = {
        "popular": _from_pool(able, pool, options.candidates, history, dataset.n_items, rng),
        "cold": _from_cells(
            cold, vectors, described, options.cold_candidates, dataset.n_items, rng
        ),
        "tail": _random_users(tail, able, options.tail_users, dataset.n_items, rng),
    }
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), history.counts)
    own = owners * dataset.n_items + history.indices
    asked = {name: keys[~np.isin(keys, own)] for name, keys in asked.items()}
    keys = np.unique(np.concatenate(list(asked.values())))
    if not keys.size:
        raise InputError(
            f"{dataset.path}: no item is left to score that has a text and that a user has not "
            "seen; raise --candidates, --cold_candidates or --tail_users"
        )
    rows, items = np.divmod(keys, dataset.n_items)
    scores = pa.array(_dots(users, rows, vectors, items))
    arrays = [pa.array(rows.astype(np.int32)), pa.array(items.astype(np.int32)), scores]
    counts = {f"{name}_candidates": int(np.unique(keys).size) for name, keys in asked.items()}
    return pa.table(arrays, schema=schema.TEACHER_SCORES), counts


def score(dataset: Dataset, options: TeachConfig) -> schema.TeacherManifest:
    """Score candidates with the local model `options.scorer` and write DATA/teacher/NAME."""
    target = preferences.product_path(dataset.path, options.name)
    shards.check_target(target, overwrite=options.overwrite)
    embedder = make(options.scorer)
    table, counts = score_candidates(dataset, embedder, options)
    provenance = preferences.Provenance(
        built_from="train_only",
        unlisted="unknown",
        model=embedder.name,
        prompt_hash=hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16],
        score_kind="cosine",
    )
    return preferences.write_product(
        dataset,
        options.name,
        table,
        provenance=provenance,
        counts=counts,
        rows_per_shard=options.rows_per_shard,
        overwrite=options.overwrite,
    )


def held_in_accuracy(
    dataset: Dataset,
    embedder: Embedder,
    *,
    left_out: float = 0.2,
    negatives: int = 5,
    limit: int = 50_000,
    seed: int = 0,
) -> dict[str, float]:
    """How often the scores put a training item left out of the profile over another item.

    Only training interactions are used: `left_out` of them are taken out of the profiles and
    compared with items the user has no training interaction with, drawn uniformly ("uniform")
    or by training count ("popular"). At most `limit` of them are compared. Means over users;
    `_cold`: over cold users. Chance is .5; NaN where there is nobody to compare.
    """
    rng = np.random.default_rng(seed)
    history = dataset.positives(("train",))
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), history.counts)
    out = rng.random(owners.size) < left_out
    vectors = item_vectors(dataset, embedder)
    known = Csr.from_pairs(owners[~out], history.indices[~out], dataset.n_users)
    users = profiles(known, vectors)
    asked = out & _filled(users)[owners]
    chosen = np.flatnonzero(asked)
    chosen = np.sort(rng.permutation(chosen)[:limit])
    u, i = owners[chosen], history.indices[chosen]
    own = owners * dataset.n_items + history.indices
    cold = dataset.slices(SliceConfig()).cold_users
    result = {}
    for name, mass in (("uniform", np.ones(dataset.n_items)), ("popular", dataset.popularity)):
        j = rng.choice(dataset.n_items, size=(u.size, negatives), p=mass / mass.sum())
        valid = ~np.isin(u[:, None] * dataset.n_items + j, own)
        right = _dots(users, u, vectors, i)[:, None]
        wrong = np.stack([_dots(users, u, vectors, j[:, k]) for k in range(negatives)], axis=1)
        wins = ((right > wrong) + 0.5 * (right == wrong)) * valid
        trials = np.bincount(u, valid.sum(1), dataset.n_users)
        with np.errstate(invalid="ignore"):
            per_user = np.bincount(u, wins.sum(1), dataset.n_users) / trials
        result[name] = float(np.nanmean(per_user)) if trials.any() else float("nan")
        thin = per_user[cold & (trials > 0)]
        result[f"{name}_cold"] = float(thin.mean()) if thin.size else float("nan")
    return result


def held_in_report(dataset: Dataset, embedder: Embedder) -> str:
    """`held_in_accuracy` in one line for people."""
    share = held_in_accuracy(dataset, embedder)
    return (
        "training items left out of the profile score above a random item "
        f"{share['uniform']:.1%} of the time (cold users {share['uniform_cold']:.1%}), above one "
        f"drawn by popularity {share['popular']:.1%} (cold {share['popular_cold']:.1%}); "
        "chance is 50%"
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 1e-12, lengths, np.inf)).astype(np.float32)


def _dots(users: np.ndarray, u: np.ndarray, vectors: np.ndarray, i: np.ndarray) -> np.ndarray:
    out = np.empty(u.size, np.float32)
    for start in range(0, u.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = np.einsum("nd,nd->n", users[u[part]], vectors[i[part]])
    return out


def _filled(vectors: np.ndarray) -> np.ndarray:
    return np.asarray((vectors != 0).any(axis=1), bool)


def _from_pool(
    users: np.ndarray, pool: np.ndarray, size: int, history: Csr, n_items: int, rng: Any
) -> np.ndarray:
    place = np.full(n_items, -1)
    place[pool] = np.arange(pool.size)
    out = [np.zeros(0, np.int64)]
    for start in range(0, users.size if size else 0, _CHUNK):
        chunk = users[start : start + _CHUNK]
        lot = rng.random((chunk.size, pool.size), dtype=np.float32)
        rows = np.repeat(np.arange(chunk.size), history.counts[chunk])
        columns = place[np.concatenate([history.row(u) for u in chunk])]
        lot[rows[columns >= 0], columns[columns >= 0]] = 2  # own items come last, are cut later
        drawn = np.argsort(lot, axis=1)[:, :size]
        out.append((chunk[:, None].astype(np.int64) * n_items + pool[drawn]).ravel())
    return np.concatenate(out)


def _from_cells(
    users: np.ndarray,
    vectors: np.ndarray,
    described: np.ndarray,
    size: int,
    n_items: int,
    rng: Any,
) -> np.ndarray:
    if not size:
        return np.zeros(0, np.int64)
    out = [np.zeros(0, np.int64)]
    for cell in _cells(np.flatnonzero(described), vectors, size):
        if cell.size:
            out.append(users.astype(np.int64) * n_items + rng.choice(cell, size=users.size))
    return np.concatenate(out)


def _cells(items: np.ndarray, vectors: np.ndarray, count: int) -> list[np.ndarray]:
    """Split items into `count` cells of about equal size along leading directions."""
    if count == 1 or items.size <= 1:
        return [items]
    centred = vectors[items] - vectors[items].mean(0)
    axis = centred[np.argmax(np.linalg.norm(centred, axis=1))]
    for _ in range(10):  # power iteration: any spread-out direction will do
        axis = centred.T @ (centred @ axis)
        axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    order = items[np.argsort(centred @ axis, kind="stable")]
    left = count // 2
    cut = items.size * left // count
    return _cells(order[:cut], vectors, left) + _cells(order[cut:], vectors, count - left)


def _random_users(
    items: np.ndarray, users: np.ndarray, size: int, n_items: int, rng: Any
) -> np.ndarray:
    if not size or not items.size or not users.size:
        return np.zeros(0, np.int64)
    drawn = rng.choice(users, size=(items.size, size)).astype(np.int64)
    return (drawn * n_items + items[:, None]).ravel()
