"""Rows that begin with what a text says of an item, in place of a draw.

    items   q_i = s P(z_i), z_i the item's vector
    users   p_u = s P(z_u) where the user has a vector; with vectors of items alone
            p_u = s mean_{i in train(u)} P(z_i)    (LLMInit: E_user = rownorm(A) E_item)

P keeps E of a vector's Z numbers, as many as a row's vector has; s, one number a table, makes the
root mean square length of these rows that of drawn ones, times --init_scale:

    pca       coordinates along the first principal components of the vectors (what Harte et al.
              2023, LLM2X, and LLM-ESR's item table begin with)
    variance  the E coordinates of largest variance over the most popular fifth of the items
    uniform   coordinates 0, n, 2n, ... with n = floor(Z / E)
    random    E coordinates, drawn with repetition; the same for every seed
    leading   coordinates 0 to E - 1: the best, of vectors in the order of what they explain, as
              `slgr teach factors` makes them; of narrower ones all, and the rest is drawn
    all       Z = E: vectors that were made for this width, as SAID's are

With --init_half=H items with n training interactions begin with

    a_i q_i + sqrt(1 - a_i^2) r_i,    a_i = H / (H + n_i),    r_i what would be drawn

of which the root mean square length is the same: an item that training says much of begins almost
as drawn, one that it says nothing of with its vector. Users' own vectors likewise; a mean over
items is all of training that there is, and is taken whole.

`variance`, `uniform` and `random` are LLMInit's (arXiv 2503.01814). Where a table's rows have an
entry that is no part of a vector (a bias), that entry is drawn. Training goes on from there as
from any beginning: nothing of the vectors is left in a step, a checkpoint or serving.

Shape letters: R rows, Z width of a product's vectors, E width of a row's vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from slgr_jax.config import RunConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.embedding_table import InitialRows, TableSpec
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors

# [R, Z] -> [R, E]
Projection = Callable[[np.ndarray], np.ndarray]

POPULAR_SHARE = 0.2  # of rows, whose variances LLMInit compares
# A principal component of less of the first one's variance is rounding.
_LEAST_VARIANCE = 1e-10
_ROWS_AT_ONCE = 1 << 14


def initial_rows(
    run: RunConfig, dataset: Dataset, backbone: AnyBackbone, layout: Layout
) -> dict[str, InitialRows]:
    """What rows begin with, by table, as host arrays; {} for a run without initial vectors.

    Raises:
      ConfigError: the backbone has no such rows, or vectors and rows differ in width.
      ManifestError, ShardError: a product is not there, is of another split or id map, has seen
        evaluation data, is damaged or not finite.
    """
    named = run.vectors.init_products
    missing = [table for table in named if table not in backbone.tables]
    if missing:
        raise ConfigError(
            f"--init_{missing[0]}_vectors: --backbone={run.model.backbone} has no rows of "
            f"{missing[0]}s; drop it"
        )

    products = {name: embeddings.load(dataset, name) for name in sorted(set(named.values()))}
    vectors = {table: getattr(products[name], f"{table}s") for table, name in named.items()}
    interactions = {"item": dataset.popularity, "user": dataset.history}
    specs = backbone.tables
    projected: dict[str, Vectors] = {}
    for table, of_table in vectors.items():
        fitted_on = table
        if named.get("item") == named[table]:
            fitted_on = "item"  # items and users of one product lie in one space
        projection = make_projection(
            run.vectors.init_how,
            vectors[fitted_on],
            specs[table].vector_width,
            interactions[fitted_on],
        )
        projected[table] = Vectors(projection(of_table.values), of_table.has)
    if "user" in specs and "user" not in projected and "item" in projected:
        projected["user"] = means_of_items(dataset, projected["item"])

    return {
        table: _placed(
            scaled(of_table, specs[table], run.vectors.init_scale),
            shares(interactions[table], run.vectors.init_half if table in named else 0.0),
            layout,
        )
        for table, of_table in projected.items()
    }


def shares(counts: np.ndarray, half: float) -> np.ndarray:
    """[R] a = H / (H + n) of rows with n training interactions; 1 where H is 0."""
    if not half:
        return np.ones(counts.size, np.float32)
    share: np.ndarray = (half / (half + counts.astype(np.float64))).astype(np.float32)
    return share


def counts(initial: Mapping[str, InitialRows], dataset: Dataset) -> dict[str, dict[str, int]]:
    """By table: how many rows begin with a vector, and how many as drawn."""
    rows = {"item": dataset.n_items, "user": dataset.n_users}
    given = {table: int((np.asarray(of.share) > 0).sum()) for table, of in initial.items()}
    return {
        table: {"vectors": count, "drawn": rows[table] - count} for table, count in given.items()
    }


def summary(initial: Mapping[str, InitialRows], dataset: Dataset) -> str:
    """What a run's first line says of them; empty without any."""
    parts = [
        f"{of_table['vectors']} of {sum(of_table.values())} {table}s"
        for table, of_table in counts(initial, dataset).items()
    ]
    return f", rows that begin with vectors: {' and '.join(parts)}" if parts else ""


def means_of_items(dataset: Dataset, items: Vectors) -> Vectors:
    """Per user the mean of the vectors of the training items that have one."""
    pairs = dataset.positives(("train",)).matrix(dataset.n_items)
    count = np.asarray(pairs @ items.has.astype(np.float32))
    total = np.asarray(pairs @ np.where(items.has[:, None], items.values, 0).astype(np.float32))
    return Vectors(total / np.maximum(count, 1)[:, None], count > 0)


def scaled(vectors: Vectors, spec: TableSpec, factor: float) -> Vectors:
    """`vectors` at `factor` times the root mean square length of as many numbers of drawn rows,
    init_std sqrt(C / D) of C.

    Raises:
      InputError: all of them are zero.
    """
    lengths = np.square(vectors.values[vectors.has], dtype=np.float64).sum(axis=1)
    length = math.sqrt(lengths.mean()) if lengths.size else 0.0
    if not length:
        raise InputError(
            f"initial vectors: {vectors.has.sum()} of {vectors.has.size} rows have one, and all "
            "are zero as --init_how has them; name another product"
        )
    wanted = factor * spec.init_std * math.sqrt(vectors.values.shape[1] / spec.width)
    return Vectors((vectors.values * (wanted / length)).astype(np.float32), vectors.has)


def _placed(vectors: Vectors, share: np.ndarray, layout: Layout) -> InitialRows:
    """With the table's padding rows; what has no vector has no share of one."""
    more = layout.padded_rows(vectors.has.size) - vectors.has.size
    values = np.pad(np.where(vectors.has[:, None], vectors.values, 0), ((0, more), (0, 0)))
    share = np.pad(np.where(vectors.has, share, 0).astype(np.float32), (0, more))
    return InitialRows(values, share)  # type: ignore[arg-type]


# --- projections --------------------------------------------------------------------------------


def make_projection(how: str, vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    """What keeps E = `width` numbers of a vector.

    Args:
      how: one of `config.INIT_HOWS`.
      vectors: that it is fitted on.
      counts: [R] training interactions of each.

    Raises:
      ConfigError: vectors have too few numbers, or vary in too few directions.
    """
    available = vectors.values.shape[1]
    if (available < width and how != "leading") or (how == "all" and available != width):
        relation = "exactly" if how == "all" else "at least"
        raise ConfigError(
            f"--init_how={how} fills {width} numbers of a row and needs vectors of {relation} as "
            f"many; these have {available}: set --dim so that rows fit, or make other vectors"
        )
    return _PROJECTIONS[how](vectors, width, counts)


def _pca(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    """By the eigenvectors of the covariance matrix, gathered a block of rows at a time."""
    rows = np.flatnonzero(vectors.has)
    available = vectors.values.shape[1]
    blocks = range(0, rows.size, _ROWS_AT_ONCE)
    total = np.zeros(available)
    for begin in blocks:
        total += vectors.values[rows[begin : begin + _ROWS_AT_ONCE]].sum(axis=0, dtype=np.float64)
    mean = total / max(rows.size, 1)
    covariance = np.zeros((available, available))
    for begin in blocks:
        centred = vectors.values[rows[begin : begin + _ROWS_AT_ONCE]] - mean
        covariance += centred.T @ centred

    variances, components = np.linalg.eigh(covariance)
    variances, components = variances[::-1], components[:, ::-1]
    directions = int((variances > _LEAST_VARIANCE * max(variances[0], 1e-30)).sum())
    if directions < width:
        raise ConfigError(
            f"--init_how=pca: {rows.size} vectors vary in {directions} directions, and a row has "
            f"{width} numbers to fill; set a smaller --dim or another --init_how"
        )
    components = components[:, :width]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(width)])

    def project(values: np.ndarray) -> np.ndarray:
        out = np.empty((values.shape[0], width), np.float32)
        for begin in range(0, values.shape[0], _ROWS_AT_ONCE):
            block = slice(begin, begin + _ROWS_AT_ONCE)
            out[block] = (values[block] - mean) @ components
        return out

    return project


def _columns(columns: np.ndarray) -> Projection:
    return lambda values: values[:, columns]


def _variance(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    return _columns(columns_of_variance(vectors, width, counts))


def columns_of_variance(vectors: Vectors, width: int, counts: np.ndarray) -> np.ndarray:
    """[E] the coordinates, ascending, that vary most over the most popular rows with a vector.

    Those are a fifth of the rows, two at least; equal counts and variances go by index.
    """
    rows = np.flatnonzero(vectors.has)
    popular = rows[np.argsort(-counts[rows].astype(np.int64), kind="stable")]
    popular = popular[: max(2, math.ceil(POPULAR_SHARE * rows.size))]
    variances = vectors.values[popular].var(axis=0, dtype=np.float64)
    return np.sort(np.argsort(-variances, kind="stable")[:width])


def _uniform(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    return _columns(np.arange(width) * (vectors.values.shape[1] // width))


def _random(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    return _columns(np.random.default_rng(0).integers(vectors.values.shape[1], size=width))


def _leading(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    return lambda values: values[:, :width]


def _all(vectors: Vectors, width: int, counts: np.ndarray) -> Projection:
    return lambda values: values


_PROJECTIONS: Mapping[str, Callable[[Vectors, int, np.ndarray], Projection]] = {
    "pca": _pca,
    "variance": _variance,
    "uniform": _uniform,
    "random": _random,
    "leading": _leading,
    "all": _all,
}
