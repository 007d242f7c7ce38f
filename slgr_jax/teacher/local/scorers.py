"""Local models as teachers, without a service: scores of (user, item) pairs.

`Cosine` compares text vectors (`WordLlama` reads token vectors distilled from a Llama out of an
installed package); `likelihood.Likelihood` asks a language model. Both see item texts and training
histories, and nothing else. Whom to ask about what: `candidates.py`.

Shape letters: U users, I items, D width of a text vector, F text fields, n pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from slgr_jax import progress
from slgr_jax.config import CandidateConfig, ScoreConfig, SliceConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.errors import ConfigError, InputError, UserError
from slgr_jax.teacher.ask import candidates
from slgr_jax.teacher.local import likelihood
from slgr_jax.teacher.local.likelihood import Events
from slgr_jax.teacher.local.vectors import profiles, unit
from slgr_jax.teacher.products import preferences

# One vector per field: a long title must not drown the genres, nor a long text the title.
TEMPLATE = "fields: title without '(year)' | year | categories joined by ', ' | text"
# Added to a field's covariance, in units of its mean variance, before whitening. 5 to 40 give
# the same held-in accuracy within .01 on MovieLens-100K.
SHRINKAGE = 10.0
# Categories beside a title: three lift the held-in accuracy on Last.fm from .65 to .76 (s.e. .04).
_CATEGORIES = 3
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
# MovieLens puts the article last: `Net, The`.
_ARTICLE = re.compile(r"^(.*\S), (The|A|An|Le|La|Les|L'|Il|El|Los|Las|Das|Der|Die)$")
_INSTALL = "pip install 'slgr_jax[llm]' (from a checkout: pip install -e '.[llm]')"
_NO_TEXTS = (
    "{data} has no item texts to score with; prepare it again with item titles "
    "(slgr prepare --items_input)"
)
_CHUNK = 8192


class Embedder(Protocol):
    """What makes vectors of texts."""

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
        package = importlib.util.find_spec("wordllama")
        if package is None or not package.submodule_search_locations:
            raise UserError(f"--scorer=wordllama needs the package wordllama: {_INSTALL}")
        try:
            import safetensors.numpy
            import tokenizers
        except ImportError as error:
            raise UserError(f"--scorer=wordllama needs {error.name}: {_INSTALL}") from error
        root = pathlib.Path(next(iter(package.submodule_search_locations)))
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
        begins = progress.over(range(0, len(texts), _CHUNK), "part", label="texts")
        chunks = [self._embed(texts[k : k + _CHUNK]) for k in begins]
        return np.concatenate(chunks) if chunks else np.zeros((0, self._vectors.shape[1]), "f4")

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [np.asarray(encoding.ids, np.int32) for encoding in encoded]
        starts = np.concatenate([[0], np.cumsum([row.size for row in ids])])
        tokens = np.concatenate(ids)
        import scipy.sparse  # not at the top: training on vectors, which reads them, never needs it

        bags = scipy.sparse.csr_matrix(
            (np.ones(tokens.size, np.float32), tokens, starts),
            shape=(len(ids), self._vectors.shape[0]),
        )
        return unit(np.asarray(bags @ self._vectors))


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
        centred = unit(vectors - vectors[present].mean(0))
        centred[~present] = 0
        covariance = centred.T.astype(np.float64) @ centred / present.sum()
        values, axes = np.linalg.eigh(covariance)
        scale = np.sqrt(np.maximum(values, 0) + SHRINKAGE * values.mean())
        blocks.append((centred @ axes / scale).astype(np.float32))

    if not blocks:
        raise InputError(_NO_TEXTS.format(data=dataset.path))
    return unit(np.concatenate(blocks, axis=1))


class Scorer(Protocol):
    """What scores (user, item) pairs of one dataset.

    Attributes:
      name, score_kind, prompt_hash: for manifests.
      described: [I] bool, items it can score and show.
    """

    name: str
    score_kind: str
    prompt_hash: str
    described: np.ndarray

    def score(
        self,
        history: Events,
        users: np.ndarray,
        items: np.ndarray,
        *,
        keep: pathlib.Path | None = None,
        restart: bool = False,
    ) -> np.ndarray:
        """[n] float32: scores of pairs of described items; NaN for a user without a history.

        Args:
          history: (users, items) of the events that are shown, by user, then time.
          users, items: [n].
          keep: where a job that takes long keeps what is finished, to go on after a kill.
          restart: drop what another job left there.
        """


class Cosine:
    """Cosine of the mean vector of a user's items and an item's vector.

    Attributes:
      vectors: [I, F * D], `item_vectors`.
    """

    score_kind = "cosine"
    prompt_hash = hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]

    def __init__(self, dataset: Dataset, embedder: Embedder) -> None:
        self.name, self._n_users = embedder.name, dataset.n_users
        self.vectors = item_vectors(dataset, embedder)
        self.described = _filled(self.vectors)

    def score(
        self,
        history: Events,
        users: np.ndarray,
        items: np.ndarray,
        *,
        keep: pathlib.Path | None = None,
        restart: bool = False,
    ) -> np.ndarray:
        """As `Scorer.score`; nothing is kept, it takes seconds."""
        shown_users, shown_items = history
        shown = Csr.from_pairs(shown_users, shown_items, self._n_users)
        means = profiles(shown, self.vectors)
        out = np.empty(users.size, np.float32)
        for start in progress.over(range(0, users.size, _CHUNK), "part", label="scores"):
            part = slice(start, start + _CHUNK)
            out[part] = np.einsum("nd,nd->n", means[users[part]], self.vectors[items[part]])
        out[~_filled(means)[users]] = np.nan
        return out


def make(dataset: Dataset, options: ScoreConfig, *, history_items: int = 10) -> Scorer:
    """The local model `options.scorer`, made ready for a dataset.

    Args:
      dataset: item texts.
      options: which model.
      history_items: titles in the prompt of a language model.

    Raises:
      ConfigError: `transformers` without --llm.
      UserError: its extra is not installed, or the model cannot be loaded.
      InputError: no item has a text.
    """
    if options.scorer == "wordllama":
        return Cosine(dataset, WordLlama())
    if not options.llm:
        raise ConfigError("--scorer=transformers needs --llm=FOLDER or --llm=NAME")
    lines = language_lines(dataset)
    model = likelihood.Transformers(options.llm)
    return likelihood.Likelihood(model, lines, history_items, noun=options.noun)


def language_lines(dataset: Dataset) -> list[str]:
    """[I] what a language model reads and predicts: `The Net (Sci-Fi, Thriller)`.

    The title as a reader would say it, and its first `_CATEGORIES` categories. A description stands
    for a missing title; empty where an item has neither.
    """
    fields = item_fields(dataset)
    categories = dataset.items.column("categories").to_pylist()
    lines = []
    for title, text, names in zip(fields["title"], fields["text"], categories, strict=True):
        line = _ARTICLE.sub(r"\2 \1", " ".join((title or text).split()))
        kinds = ", ".join([name for name in names or () if name][:_CATEGORIES])
        lines.append(f"{line} ({kinds})" if line and kinds else line)
    if not any(lines):
        raise InputError(_NO_TEXTS.format(data=dataset.path))
    return lines


def draw_pairs(
    dataset: Dataset, scorer: Scorer, options: CandidateConfig, *, max_users: int = 0, seed: int = 0
) -> tuple[candidates.CandidateSet, dict[str, int]]:
    """The paper's pairs (`candidates.paper_sets`) for what `scorer` can score, and their counts.

    Only training interactions are looked at. Users without a training item with text cannot be
    asked about, and a user's own training items are never candidates.

    Args:
      dataset: training interactions.
      scorer: what will score the pairs.
      options: what is drawn.
      max_users: ask about that many users, drawn at random; 0 = all.
      seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    able = np.unique(candidates.described_history(dataset, scorer.described)[0])
    keys_by_set = candidates.paper_sets(
        dataset, able, scorer.described, _space(dataset, scorer), options, rng
    )

    if max_users:
        chosen = rng.permutation(able)[:max_users]
        keys_by_set = {
            k: keys[np.isin(keys // dataset.n_items, chosen)] for k, keys in keys_by_set.items()
        }

    keys = np.unique(np.concatenate(list(keys_by_set.values())))
    if not keys.size:
        raise InputError(
            f"{dataset.path}: no item is left to score that has a text and that a user has not "
            "seen; raise --candidates, --cold_candidates or --tail_users"
        )

    counts = {f"{name}_candidates": int(np.unique(keys).size) for name, keys in keys_by_set.items()}
    users, items = (part.astype(np.int32) for part in np.divmod(keys, dataset.n_items))
    none = np.zeros(0, np.int32)
    hidden = Csr.from_pairs(none, none, dataset.n_users)
    return candidates.CandidateSet(users, items, np.zeros_like(users), hidden), counts


def _space(dataset: Dataset, scorer: Scorer) -> np.ndarray:
    """[I, D] in which cold users' items are spread: texts, or popularity where none is at hand."""
    if isinstance(scorer, Cosine):
        return scorer.vectors
    try:
        return item_vectors(dataset, WordLlama())
    except UserError:
        return np.log1p(dataset.popularity)[:, None].astype(np.float32)


def score(
    dataset: Dataset,
    common: TeachConfig,
    options: ScoreConfig,
    candidate_options: CandidateConfig,
    scorer: Scorer,
    *,
    candidate_set: str = "",
) -> schema.TeacherManifest:
    """Score pairs with a local model and write DATA/teacher/NAME.

    Args:
      dataset: item texts and training interactions.
      common, options, candidate_options: what to do.
      scorer: what `make` gave for `options`.
      candidate_set: DATA/candidates/... to score, without its hidden items in any history; empty:
        the pairs of `draw_pairs`.
    """
    target = preferences.product_path(dataset.path, common.name)
    shards.check_target(target, overwrite=common.overwrite)

    if candidate_set:
        pairs, _ = candidates.load(dataset, candidate_set)
        pairs, counts = _able_pairs(dataset, scorer, pairs, options.max_users, common.seed)
    else:
        pairs, counts = draw_pairs(
            dataset, scorer, candidate_options, max_users=options.max_users, seed=common.seed
        )

    history = candidates.described_history(dataset, scorer.described, pairs.hidden)
    keep = target.with_name(f".{target.name}.scoring")
    scores = scorer.score(history, pairs.users, pairs.items, keep=keep, restart=common.overwrite)

    provenance = preferences.Provenance(
        built_from="train_only",
        unlisted="unknown",
        training_items="hidden" if pairs.hidden.indices.size else "none",
        model=scorer.name,
        prompt_hash=scorer.prompt_hash,
        score_kind=scorer.score_kind,
    )
    columns = [pairs.users, pairs.items, pa.array(scores, from_pandas=True)]
    return preferences.write_product(
        dataset,
        common.name,
        pa.table(columns, schema=schema.TEACHER_SCORES),
        provenance=provenance,
        counts=counts,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def _able_pairs(
    dataset: Dataset,
    scorer: Scorer,
    pairs: candidates.CandidateSet,
    max_users: int,
    seed: int,
) -> tuple[candidates.CandidateSet, dict[str, int]]:
    """The pairs that `scorer` can score, of at most `max_users` users; counts of the others."""
    shown = candidates.described_history(dataset, scorer.described, pairs.hidden)[0]
    able = np.intersect1d(shown, pairs.users)
    if max_users:
        able = np.random.default_rng(seed).permutation(able)[:max_users]

    chosen = np.zeros(dataset.n_users, bool)
    chosen[able] = True
    kept = pairs.of_users(chosen)
    described = scorer.described[kept.items]
    kept = dataclasses.replace(
        kept,
        users=kept.users[described],
        items=kept.items[described],
        reasons=kept.reasons[described],
    )

    if not kept.users.size:
        raise InputError(f"{dataset.path}: no pair of the candidate set has texts to score")
    return kept, {"dropped_pairs": int(pairs.users.size - kept.users.size)}


def held_in_accuracy(
    dataset: Dataset,
    scorer: Scorer,
    *,
    left_out: float = 0.2,
    negatives: int = 5,
    limit: int = 50_000,
    seed: int = 0,
) -> dict[str, float]:
    """How often the scores put a training item left out of the history over another item.

    Only training interactions are used: `left_out` of them are taken out of the histories and
    compared with items the user has no training interaction with, drawn uniformly ("uniform")
    or by training count ("popular"). At most `limit` of them are compared. Means over users;
    `_cold`: over cold users; `_error`: standard error of the mean over users. Chance is .5; NaN
    where there is nobody to compare.
    """
    rng = np.random.default_rng(seed)
    history, described = dataset.positives(("train",)), scorer.described
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), history.counts)
    out = rng.random(owners.size) < left_out
    hidden = Csr.from_pairs(owners[out], history.indices[out], dataset.n_users)
    shown = candidates.described_history(dataset, described, hidden)
    has_history = np.bincount(shown[0], minlength=dataset.n_users) > 0

    chosen = np.flatnonzero(out & has_history[owners] & described[history.indices])
    chosen = np.sort(rng.permutation(chosen)[:limit])
    u, i = owners[chosen], history.indices[chosen].astype(np.int64)
    trained = owners * dataset.n_items + history.indices
    masses = {"uniform": described.astype(float), "popular": dataset.popularity * described}
    drawn = {
        name: rng.choice(dataset.n_items, size=(u.size, negatives), p=mass / mass.sum())
        for name, mass in masses.items()
    }

    base = u * dataset.n_items
    keys = np.unique(
        np.concatenate([base + i, *((base[:, None] + j).ravel() for j in drawn.values())])
    )
    users, items = (part.astype(np.int32) for part in np.divmod(keys, dataset.n_items))
    scores = scorer.score(shown, users, items)
    right = scores[np.searchsorted(keys, base + i)][:, None]

    cold = dataset.slices(SliceConfig()).cold_users
    result = {}
    for name, j in drawn.items():
        wrong_keys = base[:, None] + j
        valid = ~np.isin(wrong_keys, trained)
        wrong = scores[np.searchsorted(keys, wrong_keys)]
        wins = ((right > wrong) + 0.5 * (right == wrong)) * valid
        trials = np.bincount(u, valid.sum(1), dataset.n_users)
        known = trials > 0
        per_user = np.bincount(u, wins.sum(1), dataset.n_users)[known] / trials[known]
        thin = per_user[cold[known]]
        result[name] = float(per_user.mean()) if per_user.size else float("nan")
        result[f"{name}_cold"] = float(thin.mean()) if thin.size else float("nan")
        result[f"{name}_error"] = (
            float(per_user.std(ddof=1) / per_user.size**0.5) if per_user.size > 1 else float("nan")
        )
    return result


def held_in_report(dataset: Dataset, scorer: Scorer, options: ScoreConfig) -> str:
    """`held_in_accuracy` in one line for people."""
    slow = not isinstance(scorer, Cosine)
    if slow and not options.held_in:
        return "held-in accuracy: not checked (--held_in=0)"
    share = held_in_accuracy(dataset, scorer, limit=options.held_in if slow else 50_000)
    return (
        "training items left out of the history score above a random item "
        f"{share['uniform']:.1%} of the time (cold users {share['uniform_cold']:.1%}), above one "
        f"drawn by popularity {share['popular']:.1%} (cold {share['popular_cold']:.1%}); "
        f"chance is 50%, standard error {share['popular_error']:.1%}"
    )


def _filled(vectors: np.ndarray) -> np.ndarray:
    return np.asarray((vectors != 0).any(axis=1), bool)
