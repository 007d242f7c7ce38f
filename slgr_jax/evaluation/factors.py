"""Vectors whose inner products are a recommender's scores, as nearly as their width allows.

Of S [U, I], the scores, the best approximation of rank E in squares is (Eckart and Young 1936)

    S ~ L_E diag(s_E) R_E^T,    users p_u = L_E[u] sqrt(s_E),    items q_i = R_E[i] sqrt(s_E)

in the order of the singular values s, so that the first numbers of the vectors are the best of a
smaller width. S is never held: Halko et al. 2011 (algorithms 4.4 and 5.1) multiply it from both
sides, a chunk of users at a time.

Shape letters: U users, I items, E width, K = E and some more columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slgr_jax.config import BaselineConfig, TeachConfig
from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import baselines, teacher_lists
from slgr_jax.teacher.local import embeddings
from slgr_jax.teacher.local.vectors import Vectors
from slgr_jax.teacher.products.controls import ScoreUsers

_OVERSAMPLED = 16  # columns more than are kept
_POWER = 3  # times that S and its transpose are applied to what is random
_USERS_AT_ONCE = 1024


def from_baseline(
    dataset: Dataset,
    common: TeachConfig,
    name: str,
    options: BaselineConfig,
    *,
    width: int,
    dtype: str = "float32",
) -> schema.EmbeddingManifest:
    """The factors of a baseline, fitted on train and tuned on validation: DATA/embeddings/NAME.

    Args:
      name: one of `config.BASELINES`.
      options: its grid.
      width: E.
      dtype: of the numbers on disk.

    Raises:
      ConfigError: it cannot be fitted, or there are fewer users or items than numbers.
      InputError: the product is there, without --overwrite.
    """
    shards.check_target(
        embeddings.product_path(dataset.path, common.name), overwrite=common.overwrite
    )
    check_width(width, dataset.n_users, dataset.n_items)
    fitted, settings, _ = baselines.tune(baselines.make_baseline(name, options), dataset)
    users, items = factorise(
        teacher_lists.host_scores(fitted), dataset.n_users, dataset.n_items, width
    )
    said = ", ".join(f"{key} {value:g}" for key, value in settings.items())
    return embeddings.write(
        dataset,
        common.name,
        Vectors(items, np.ones(dataset.n_items, bool)),
        Vectors(users, np.ones(dataset.n_users, bool)),
        users_from="factors",
        model=f"factors of {name}" + (f" ({said})" if said else ""),
        dtype=dtype,
        rows_per_shard=common.rows_per_shard,
        overwrite=common.overwrite,
    )


def ensure(dataset: Dataset, name: str, width: int) -> None:
    """EASE's factors as DATA/embeddings/NAME, made anew where they are narrower than `width`.

    Raises:
      ConfigError, ManifestError: they cannot be made, or what is there is of another split.
    """
    if embeddings.product_path(dataset.path, name).is_dir():
        manifest = embeddings.read_manifest(dataset, name)
        if manifest.dim >= width:
            return
    common = TeachConfig(data=str(dataset.path), name=name, overwrite=True)
    from_baseline(dataset, common, "ease", BaselineConfig(), width=width)


def check_width(width: int, n_users: int, n_items: int) -> None:
    """Refuse more numbers than scores of so many users and items have.

    Raises:
      ConfigError: they are more.
    """
    if width > (most := min(n_users, n_items)):
        raise ConfigError(
            f"--width={width}: scores of {n_users} users and {n_items} items have at most {most} "
            f"factors; set --width to {most} or less"
        )


def factorise(
    score_users: ScoreUsers, n_users: int, n_items: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """([U, E] users, [I, E] items) float32, the same for the same scores.

    Args:
      score_users: users [B] -> their scores [B, I].
      width: E, at most the smaller of U and I.
    """
    columns = min(width + _OVERSAMPLED, n_users, n_items)
    random = np.random.default_rng(0).standard_normal((n_items, columns)).astype(np.float32)
    basis = _orthonormal(_times(score_users, n_users, random))
    for _ in range(_POWER):
        basis = _orthonormal(_transposed_times(score_users, n_items, basis))
        basis = _orthonormal(_times(score_users, n_users, basis))

    small = _transposed_times(score_users, n_items, basis).T  # [K, I]
    left, values, right = np.linalg.svd(small, full_matrices=False)
    # A factor's sign is arbitrary: the largest entry of its items is made positive.
    largest = right[np.arange(columns), np.abs(right).argmax(axis=1)]
    lengths = np.sqrt(values) * np.where(largest < 0, -1, 1)
    users = (basis @ left)[:, :width] * lengths[:width]
    items = right[:width].T * lengths[:width]
    return users.astype(np.float32), items.astype(np.float32)


def _chunks(score_users: ScoreUsers, n_users: int) -> Iterator[tuple[slice, np.ndarray]]:
    for begin in range(0, n_users, _USERS_AT_ONCE):
        rows = slice(begin, min(begin + _USERS_AT_ONCE, n_users))
        yield rows, score_users(np.arange(rows.start, rows.stop))


def _times(score_users: ScoreUsers, n_users: int, right: np.ndarray) -> np.ndarray:
    """S `right`: [I, K] -> [U, K]."""
    out = np.empty((n_users, right.shape[1]), np.float32)
    for rows, scores in _chunks(score_users, n_users):
        out[rows] = scores @ right
    return out


def _transposed_times(score_users: ScoreUsers, n_items: int, left: np.ndarray) -> np.ndarray:
    """S^T `left`: [U, K] -> [I, K]."""
    out = np.zeros((n_items, left.shape[1]), np.float32)
    for rows, scores in _chunks(score_users, left.shape[0]):
        out += scores.T @ left[rows]
    return out


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns.astype(np.float64))[0].astype(np.float32)
