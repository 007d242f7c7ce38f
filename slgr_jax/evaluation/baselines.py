"""Recommenders that take seconds, so that a run's numbers have something to stand beside.

Each gives, for every setting to try, scores that `full_ranking.rank` takes; `tune` keeps the
setting with the best validation ndcg@10 (of labelled rows: auc). All learn from training
interactions alone, whatever their rating. `baseline_evaluation.py` shows them beside a run.

Shape letters: U users, I items, B users of a chunk, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from scipy.linalg import lapack

from slgr_jax.config import EASE_BY_DEFAULT, BaselineConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError
from slgr_jax.evaluation import click_metrics, full_ranking
from slgr_jax.evaluation.device_ranking import DeviceCsr
from slgr_jax.evaluation.device_scoring import ScoreUsers
from slgr_jax.evaluation.ranking_metrics import per_user
from slgr_jax.sampling.labelled_rows import LabelledRows

TUNED_ON, TUNED_ON_ROWS = "ndcg@10", "rows_auc"
_ROW_USERS = 256  # users whose rows are scored at once
# At the peak: X^T X in float32, its inverse in float64, that in float32, the best weights so far,
# and their like on the device.
_EASE_BYTES = 24
_EASE_STEP = 512  # columns made at once
# Co-occurrences and cosines in float32, and the cosines on the device.
_ITEM_ITEM_BYTES = 12
_HISTORY_STEP = 16  # items of one user's history that one loop step marks
# Adding a row of B for each user of a chunk takes memory the time in which so many columns of a
# product with B are computed.
_ITEMS_PER_ADDITION = 32

Settings = Mapping[str, float]


class Fitted(NamedTuple):
    """A model as `full_ranking.rank` takes it."""

    score_users: ScoreUsers
    state: Any  # pytree of arrays


class Baseline(Protocol):
    """A recommender with a small grid of settings.

    Attributes:
      grid: settings to try.
    """

    @property
    def grid(self) -> Sequence[Settings]: ...

    def fit(self, dataset: Dataset, grid: Sequence[Settings]) -> Iterator[Fitted]:
        """The model of each setting, one at a time."""
        ...


# ------------------------------------------------------------------------ most popular


def _popular_scores(state: Float[Array, " I"], users: Int[Array, " B"]) -> Float[Array, "B I"]:
    return jnp.broadcast_to(state[None, :], (users.size, state.size))


@dataclasses.dataclass(frozen=True)
class Popular:
    """s_ui = number of training users of i."""

    @property
    def grid(self) -> Sequence[Settings]:
        return [{}]

    def fit(self, dataset: Dataset, grid: Sequence[Settings]) -> Iterator[Fitted]:
        for _ in grid:
            yield Fitted(_popular_scores, dataset.learned_popularity.astype(np.float32))


# ------------------------------------------------------------------------ EASE


class EaseState(NamedTuple):
    """X by rows, and B."""

    histories: DeviceCsr
    weights: Float[Array, "I I"]


def _ease_scores(state: EaseState, users: Int[Array, " B"]) -> Float[Array, "B I"]:
    """X_u B, with X_u made of the users' rows: only a chunk of it ever exists. Where the longest
    history of a chunk is short, the rows of B that it names are added instead."""
    start, count = state.histories.of(users)
    n_items = state.weights.shape[0]
    longest = jnp.max(count)

    def items_at(place: jax.Array) -> Int[Array, "B P"]:
        items = state.histories.indices.at[start[:, None] + place].get(mode="clip")
        # A place past the end of a history holds another user's item: moved off the matrix.
        return jnp.where(place < count[:, None], items, n_items)

    def mark(i: jax.Array, x: Float[Array, "B I"]) -> Float[Array, "B I"]:
        items = items_at(i * _HISTORY_STEP + jnp.arange(_HISTORY_STEP)[None, :])
        return x.at[jnp.arange(users.size)[:, None], items].set(1.0, mode="drop")

    def multiplied(x: Float[Array, "B I"]) -> Float[Array, "B I"]:
        steps = -(-longest // _HISTORY_STEP)  # rounded up
        x = jax.lax.fori_loop(0, steps, mark, x)
        return jnp.matmul(x, state.weights, precision=jax.lax.Precision.HIGHEST)

    def add(i: jax.Array, scores: Float[Array, "B I"]) -> Float[Array, "B I"]:
        items = items_at(i[None, None])[:, 0]
        return scores + state.weights.at[items].get(mode="fill", fill_value=0.0)

    def added(scores: Float[Array, "B I"]) -> Float[Array, "B I"]:
        return jax.lax.fori_loop(0, longest, add, scores)

    zeros = jnp.zeros((users.size, n_items), jnp.float32)
    return jax.lax.cond(longest * _ITEMS_PER_ADDITION < n_items, added, multiplied, zeros)


@dataclasses.dataclass(frozen=True)
class Ease:
    """s_u = x_u B; B minimises |X - XB|^2 + l |B|^2 among matrices with a zero diagonal.

    With P = (X^T X + l I)^-1: B_ij = -P_ij / P_jj off the diagonal (Steck 2019, arXiv 1905.03375,
    equation 8). X [U, I] is 1 at training pairs. Time O(min(U, I)^3), memory O(I^2): where users
    are fewer, l P = I - X^T (X X^T + l I)^-1 X is taken instead (Woodbury), in which X is sparse.

    Attributes:
      lambdas: values of l to try.
      gb: most memory, in gigabytes.
    """

    lambdas: Sequence[float]
    gb: float = math.inf

    @property
    def grid(self) -> Sequence[Settings]:
        return [{"lambda": l2} for l2 in self.lambdas]

    def fits(self, n_items: int) -> bool:
        """Whether the memory is enough."""
        return _EASE_BYTES * n_items**2 <= self.gb * 1e9

    def fit(self, dataset: Dataset, grid: Sequence[Settings]) -> Iterator[Fitted]:
        """As for `Baseline`.

        Raises:
          ConfigError: the catalogue needs more memory than `gb`.
        """
        n = dataset.n_items
        _check_memory("ease", _EASE_BYTES * n**2, self.gb, n)
        positives = dataset.positives(("train",))
        offsets: Any = positives.offsets.astype(np.int32)
        indices: Any = positives.indices
        x = positives.matrix(n)
        x = x[np.flatnonzero(positives.counts)]
        by_users = x.shape[0] < n
        gram = None if by_users else (x.T @ x).toarray()

        for settings in grid:
            l2 = settings["lambda"]
            weights: Any = _weights_by_users(x, l2) if gram is None else _weights(gram, l2)
            yield Fitted(_ease_scores, EaseState(DeviceCsr(offsets, indices), weights))
            del weights  # or two settings' matrices are held at once


def _inverse(gram: np.ndarray, l2: float) -> np.ndarray:
    """(gram + l I)^-1 in float64, through a Cholesky factor; its lower triangle is filled."""
    p = gram.astype(np.float64, order="F")
    p[np.diag_indices_from(p)] += l2
    p, failed = lapack.dpotrf(p, lower=1, overwrite_a=1)
    if not failed:
        p, failed = lapack.dpotri(p, lower=1, overwrite_c=1)
    if failed:
        raise ConfigError(f"EASE is singular to machine precision with lambda {l2:g}; raise it")
    return p


def _weights(gram: np.ndarray, l2: float) -> np.ndarray:
    """B [I, I] float32 from X^T X."""
    p = _inverse(gram, l2)
    diagonal = np.diag(p).astype(np.float32)
    weights = np.tril(p.astype(np.float32), -1)
    del p
    weights += weights.T
    weights /= -diagonal[None, :]
    return weights


def _weights_by_users(x: Any, l2: float) -> np.ndarray:
    """B [I, I] float32 from X [U, I] (sparse): B_ij = G_ij / (1 - G_jj) off the diagonal, with
    G = X^T (X X^T + l I)^-1 X."""
    p = _inverse((x @ x.T).toarray(), l2)
    for begin in range(0, p.shape[0], _EASE_STEP):  # the upper triangle, without a second matrix
        end = begin + _EASE_STEP
        block = np.tril(p[begin:end, begin:end])
        p[begin:end, begin:end] = block + np.tril(block, -1).T
        p[begin:end, end:] = p[end:, begin:end].T
    p = p.T  # the same matrix, by rows as SciPy wants it

    columns, rows_of_items = x.tocsc(), x.T.tocsr()
    weights = np.empty((x.shape[1], x.shape[1]), np.float32)
    for begin in range(0, x.shape[1], _EASE_STEP):
        of = slice(begin, begin + _EASE_STEP)
        g = rows_of_items @ (columns[:, of].T @ p).T  # [I, items of the step]
        at = np.arange(begin, begin + g.shape[1]), np.arange(g.shape[1])
        diagonal = g[at]
        g[at] = 0.0
        weights[:, of] = g / (1.0 - diagonal)
    return weights


# ------------------------------------------------------------------------ item-item


@dataclasses.dataclass(frozen=True)
class ItemItem:
    """s_u = x_u C, C_ij = n_ij / sqrt(n_i n_j) off the diagonal: cosines of items' training users.

    n_i users have item i, n_ij have both (Sarwar et al. 2001). Memory O(I^2).

    Attributes:
      gb: most memory, in gigabytes.
    """

    gb: float = math.inf

    @property
    def grid(self) -> Sequence[Settings]:
        return [{}]

    def fit(self, dataset: Dataset, grid: Sequence[Settings]) -> Iterator[Fitted]:
        """As for `Baseline`.

        Raises:
          ConfigError: the catalogue needs more memory than `gb`.
        """
        n = dataset.n_items
        _check_memory("item_item", _ITEM_ITEM_BYTES * n**2, self.gb, n)
        positives = dataset.positives(("train",))
        x = positives.matrix(n)
        weights = (x.T @ x).toarray()
        scale = (1 / np.sqrt(np.maximum(dataset.learned_popularity, 1))).astype(np.float32)
        weights *= scale[:, None]
        weights *= scale[None, :]
        np.fill_diagonal(weights, 0)
        offsets: Any = positives.offsets.astype(np.int32)
        indices: Any = positives.indices
        for _ in grid:
            yield Fitted(_ease_scores, EaseState(DeviceCsr(offsets, indices), weights))


def _check_memory(name: str, needed: int, gb: float, n_items: int) -> None:
    if needed > gb * 1e9:
        shown = {"ease": "EASE"}.get(name, name)
        raise ConfigError(
            f"{shown} over {n_items} items needs {needed / 1e9:.1f} GB, more than "
            f"--ease_gb={gb:g}; raise it, or leave {name} out of --baselines"
        )


# ------------------------------------------------------------------------ iALS


def _factor_scores(
    state: tuple[Float[Array, "U D"], Float[Array, "I D"]], users: Int[Array, " B"]
) -> Float[Array, "B I"]:
    chosen, items = state[0][users], state[1]
    return jnp.matmul(chosen, items.T, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Ials:
    """s_ui = <x_u, y_i>, minimising sum_ui c_ui (p_ui - s_ui)^2 + l (|x|^2 + |y|^2).

    p_ui is 1 at training pairs, where c_ui = alpha; else 0, where c_ui = 1 (Hu, Koren and
    Volinsky 2008, equation 3). The package `implicit` solves it (extra: ials).

    Attributes:
      dim: D.
      regularizations, alphas: values of l and of alpha to try, each with each.
      iterations: sweeps over users and items.
      seed: of the first factors.
    """

    dim: int
    regularizations: Sequence[float]
    alphas: Sequence[float]
    iterations: int
    seed: int = 0

    @property
    def grid(self) -> Sequence[Settings]:
        return [
            {"regularization": l2, "alpha": alpha}
            for l2 in self.regularizations
            for alpha in self.alphas
        ]

    def fit(self, dataset: Dataset, grid: Sequence[Settings]) -> Iterator[Fitted]:
        """As for `Baseline`.

        Raises:
          ConfigError: `implicit` is not installed.
        """
        try:
            from implicit.cpu.als import AlternatingLeastSquares
            from threadpoolctl import threadpool_limits
        except ImportError as error:
            raise ConfigError(
                f"the baseline ials needs a package that is not there ({error}); "
                "pip install 'slgr_jax[ials]', or leave ials out of --baselines"
            ) from error

        x = dataset.positives(("train",)).matrix(dataset.n_items)
        for settings in grid:
            with threadpool_limits(1, "blas"):  # implicit has threads of its own
                model = AlternatingLeastSquares(
                    factors=self.dim,
                    regularization=float(settings["regularization"]),
                    alpha=float(settings["alpha"]),
                    iterations=self.iterations,
                    random_state=self.seed,
                )
                model.fit(x, show_progress=False)
            yield Fitted(_factor_scores, (model.user_factors, model.item_factors))


# ------------------------------------------------------------------------ by name


class Tuned(NamedTuple):
    """The best setting of a baseline.

    Attributes:
      fitted: the model, on the devices.
      settings: what it was fitted with.
      tried: each setting with its validation ndcg@10 (rows_auc); empty if none was ranked.
    """

    fitted: Fitted
    settings: Settings
    tried: list[dict[str, Any]]


def tune(
    baseline: Baseline,
    dataset: Dataset,
    *,
    mesh: Mesh | None = None,
    kernels: str = "auto",
    users_per_chunk: int = 1024,
    rows: LabelledRows | None = None,
) -> Tuned:
    """Fit every setting on train; keep the best on validation, the first among equals.

    A single setting is not ranked. Without validation interactions the grid's middle is kept.
    Beside a refit the best is fitted once more, on train and validation.

    Args:
      baseline, dataset: what to fit, on what.
      mesh, kernels, users_per_chunk: as for `full_ranking.rank`.
      rows: labelled validation rows, whose auc chooses in place of the ranking's ndcg@10.
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if dataset.as_split is not None:
        by_validation = tune(
            baseline,
            dataset.as_split,
            mesh=mesh,
            kernels=kernels,
            users_per_chunk=users_per_chunk,
            rows=rows,
        )
        again = next(iter(baseline.fit(dataset, [by_validation.settings])))
        placed = Fitted(again.score_users, jax.device_put(again.state, everywhere))
        return by_validation._replace(fitted=placed)

    grid = baseline.grid
    if not len(dataset.valid):
        grid = grid[len(grid) // 2 :][:1]

    models = baseline.fit(dataset, grid)
    best: tuple[float, Fitted, Settings] | None = None
    tried: list[dict[str, Any]] = []
    for settings in grid:
        score_users, state = next(models)
        fitted = Fitted(score_users, jax.device_put(state, everywhere))
        del state  # EASE: as large as everything else
        if len(grid) == 1:
            return Tuned(fitted, settings, [])

        if rows is None:
            name, value = TUNED_ON, _ndcg(fitted, dataset, mesh, kernels, users_per_chunk)
        else:
            name, value = TUNED_ON_ROWS, click_metrics.auc(row_scores(fitted, rows), rows.labels)
        tried.append({**settings, name: value})
        if best is None or value > best[0]:
            best = value, fitted, settings
        del fitted

    assert best is not None, "a grid has at least one setting"
    _, fitted, settings = best
    return Tuned(fitted, settings, tried)


def _ndcg(
    fitted: Fitted, dataset: Dataset, mesh: Mesh | None, kernels: str, users_per_chunk: int
) -> float:
    """Validation ndcg@10."""
    ranked = full_ranking.rank(
        fitted.score_users,
        fitted.state,
        dataset.positives(("valid",)),
        dataset.positives(("train",)),
        dataset.n_items,
        users_per_chunk=users_per_chunk,
        top_k=0,
        pooled_auc=False,
        mesh=mesh,
        kernels=kernels,
    )
    values = per_user(ranked, (10,)).values[TUNED_ON]
    return float(np.mean(values)) if values.size else 0.0  # all of validation may be masked


def row_scores(fitted: Fitted, rows: LabelledRows) -> np.ndarray:
    """[n] float32: the scores of labelled rows. They order items, and are no logits."""
    score = jax.jit(fitted.score_users)
    users, place = np.unique(rows.users, return_inverse=True)
    order = np.argsort(place, kind="stable")
    out = np.empty(len(rows), np.float32)
    for begin in range(0, users.size, _ROW_USERS):
        of_chunk = users[begin : begin + _ROW_USERS]
        padded = np.full(_ROW_USERS, of_chunk[0], np.int32)
        padded[: of_chunk.size] = of_chunk
        low, high = np.searchsorted(place[order], [begin, begin + _ROW_USERS])
        chosen = order[low:high]
        out[chosen] = np.asarray(score(fitted.state, padded))[
            place[chosen] - begin, rows.items[chosen]
        ]
    return out


def chosen(options: BaselineConfig, n_items: int) -> tuple[str, ...]:
    """The baselines that `--baselines` names for a catalogue of `n_items`."""
    if options.baselines == "auto":
        small = n_items <= EASE_BY_DEFAULT and _ease(options).fits(n_items)
        return ("popular", "ease") if small else ("popular",)
    names = options.baselines.split(",")
    return () if options.baselines == "none" else tuple(dict.fromkeys(names))


def left_out(options: BaselineConfig, n_items: int) -> str:
    """Why EASE is not among the baselines that were asked for with `auto`; empty where it is."""
    if options.baselines != "auto" or "ease" in chosen(options, n_items):
        return ""
    if n_items <= EASE_BY_DEFAULT:
        return f"EASE is left out: over {n_items:,} items it needs more than --ease_gb"
    return (
        f"EASE is left out: its time grows with the cube of the items, of which there are "
        f"{n_items:,}; --baselines=popular,ease fits it all the same, and --ease_lambdas=LAMBDA "
        "tries one value in place of seven"
    )


def make_baseline(name: str, options: BaselineConfig) -> Baseline:
    """The baseline called `name`."""
    if name == "ease":
        return _ease(options)
    if name == "item_item":
        return ItemItem(options.ease_gb)
    if name == "ials":
        return Ials(
            options.ials_dim,
            options.ials_regularizations,
            options.ials_alphas,
            options.ials_iterations,
        )
    return Popular()


def _ease(options: BaselineConfig) -> Ease:
    return Ease(options.ease_lambdas, options.ease_gb)
