"""How rows are updated from the sum of their gradients; each rule with slots of its own a row.

Shape letters: N rows, D width, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slgr_jax.config import OptimizerConfig
from slgr_jax.kernels import cpu


class RowOptimizer(Protocol):
    """An update rule for rows, each with its own slots.

    `apply` maps (values [N, D], slots [N, S], gradient [N, D]) to new values and slots. It sees
    each touched row once, with the sum of its gradients.
    """

    @property
    def rule(self) -> cpu.Rule:
        """The same update for the CPU kernels."""
        ...

    def slots(self, width: int) -> int:
        """S for rows of width D."""
        ...

    def initial(self, width: int) -> np.ndarray:
        """The [S] slots of an untouched row."""
        ...

    def apply(
        self, values: Float[Array, "N D"], slots: Float[Array, "N S"], grad: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        """One update of each row."""
        ...


@dataclasses.dataclass(frozen=True)
class Sgd:
    """w <- w - lr g. On touched rows equal to `optax.sgd(lr)`."""

    lr: float

    @property
    def rule(self) -> cpu.Rule:
        return cpu.Rule("sgd", self.lr)

    def slots(self, width: int) -> int:
        return 0

    def initial(self, width: int) -> np.ndarray:
        return np.zeros(0, np.float32)

    def apply(
        self, values: Float[Array, "N D"], slots: Float[Array, "N S"], grad: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        return values - self.lr * grad, slots


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """a <- a + g^2; w <- w - lr g / sqrt(a + eps), per entry, a starts at 0.1.

    On touched rows equal to `optax.adagrad(lr, initial_accumulator_value=0.1, eps)`
    (Duchi et al. 2011).
    """

    lr: float
    eps: float

    @property
    def rule(self) -> cpu.Rule:
        return cpu.Rule("adagrad", self.lr, self.eps)

    def slots(self, width: int) -> int:
        return width

    def initial(self, width: int) -> np.ndarray:
        return np.full(width, 0.1, np.float32)

    def apply(
        self, values: Float[Array, "N D"], slots: Float[Array, "N S"], grad: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        slots = slots + grad * grad
        return values - self.lr * grad * jax.lax.rsqrt(slots + self.eps), slots


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad:
    """a <- a + mean(g^2); w <- w - lr g / sqrt(a + eps): one accumulator a row, from 0.1.

    The row-wise variant of DLRM-style trainers: 4 bytes of state a row instead of 4 D.
    """

    lr: float
    eps: float

    @property
    def rule(self) -> cpu.Rule:
        return cpu.Rule("rowwise_adagrad", self.lr, self.eps)

    def slots(self, width: int) -> int:
        return 1

    def initial(self, width: int) -> np.ndarray:
        return np.full(1, 0.1, np.float32)

    def apply(
        self, values: Float[Array, "N D"], slots: Float[Array, "N S"], grad: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        slots = slots + jnp.mean(grad * grad, axis=1, keepdims=True)
        return values - self.lr * grad * jax.lax.rsqrt(slots + self.eps), slots


@dataclasses.dataclass(frozen=True)
class LazyAdam:
    """Adam on the rows a batch touches, with each row's own step count.

    A row's trajectory is exactly that of `optax.adam(lr, b1, b2, eps)` fed the steps that touch
    the row; steps that do not touch it neither decay its moments nor move it. Slots: first
    moment [D], second moment [D], count [1].
    """

    lr: float
    b1: float
    b2: float
    eps: float

    @property
    def rule(self) -> cpu.Rule:
        return cpu.Rule("lazy_adam", self.lr, self.eps, self.b1, self.b2)

    def slots(self, width: int) -> int:
        return 2 * width + 1

    def initial(self, width: int) -> np.ndarray:
        return np.zeros(2 * width + 1, np.float32)

    def apply(
        self, values: Float[Array, "N D"], slots: Float[Array, "N S"], grad: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N S"]]:
        width = values.shape[1]
        count = slots[:, 2 * width :] + 1.0
        first = self.b1 * slots[:, :width] + (1.0 - self.b1) * grad
        second = self.b2 * slots[:, width : 2 * width] + (1.0 - self.b2) * grad * grad
        # 1 - b^t through expm1: exact where b^t is close to 1, as it is for b2 and small t.
        first_scale = -jnp.expm1(count * np.float32(np.log(self.b1))) if self.b1 else 1.0
        second_scale = -jnp.expm1(count * np.float32(np.log(self.b2))) if self.b2 else 1.0
        step = (first / first_scale) / (jnp.sqrt(second / second_scale) + self.eps)
        return values - self.lr * step, jnp.concatenate([first, second, count], axis=1)


def make_row_optimizer(config: OptimizerConfig) -> RowOptimizer:
    """The row optimiser that `config.table_optimizer` names."""
    makers: dict[str, Callable[[], RowOptimizer]] = {
        "sgd": lambda: Sgd(config.lr),
        "adagrad": lambda: Adagrad(config.lr, config.eps),
        "rowwise_adagrad": lambda: RowwiseAdagrad(config.lr, config.eps),
        "lazy_adam": lambda: LazyAdam(config.lr, config.adam_b1, config.adam_b2, config.eps),
    }
    return makers[config.table_optimizer]()
