"""What a use of an LLM product in training is: the protocol, the registry.

An objective learns from interactions; a guidance learns from an LLM product, and both have the same
shape: what is drawn of device arrays, which candidates that needs scored, and a loss of the scores.
The train step knows no guidance by name:

    batch  = draw(key, arrays)                       interactions
    drawn  = guidance.draw(key', arrays.guidance)    G queries with C candidates each
    scores = view(objective's reads + drawn's candidates)
    loss   = objective.learn(scores) + lambda guidance.loss(scores).loss + guidance.loss(...).gate

To add one: a file with a class that follows `Guidance`, a line in guidance/__init__.py, a section
of knobs in config/guidance.py. One of your own, outside this package: `register`.

Shape letters: G queries a step, C candidates of a query, S steps drawn at once, M reference runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from slgr_jax.config import RunConfig, register_guidance
from slgr_jax.data.dataset import Csr, Dataset
from slgr_jax.mesh import Layout
from slgr_jax.models.backbones import AnyBackbone
from slgr_jax.models.backbones.base import Dropout
from slgr_jax.models.candidates import Candidates, Vectors
from slgr_jax.models.row_access import Access, Masked, Reads
from slgr_jax.models.scoring import Scoring
from slgr_jax.sampling.arrays import Interactions
from slgr_jax.sampling.context import Context, Histories
from slgr_jax.sampling.negatives import Generators

if TYPE_CHECKING:
    from slgr_jax.guidance.gating import Gating

ReferenceRun = tuple[AnyBackbone, Scoring]  # a finished run, as of a moment of its users
METHOD = "method"  # of a guidance's parameters, those of no gate
_CANDIDATES = "guidance"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a guidance makes its arrays from, on the host, once a run.

    Attributes:
      backbone: what is trained.
      reference_runs: those of --reference_runs, as of the end of training.
    """

    run: RunConfig
    dataset: Dataset
    backbone: AnyBackbone
    reference_runs: Sequence[ReferenceRun] = ()


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The recommender before a step's update, scored without a gradient.

    `dropout` is of a training pass, so that its scores are those that a step's lanes have.
    """

    access: Access
    tables: Mapping[str, jax.Array]
    params: Mapping[str, Any]
    context: Context
    dropout: Dropout

    def scorer(self, candidates: Candidates) -> Callable[[Dropout], Float[Array, "N C"]]:
        """Dropout -> logits of candidates; their rows are read once."""
        reads = Reads({_CANDIDATES: candidates}, {})
        leaves = self.access.read(self.tables, self.context, reads)

        def scores(dropout: Dropout) -> jax.Array:
            view = self.access.view(self.params, leaves, self.context, reads, dropout)
            return view.scores(_CANDIDATES, dropout)

        return scores


@struct.dataclass
class Scored:
    """What a step's pass says of a guidance's candidates, with its gradient.

    Attributes:
      scores: [G, C] logits.
      differences: [G] s_0 - s_1 where C is 2; None otherwise.
      stochastic: (key, dropout rate) -> [G, C] logits of one stochastic pass.
      vectors: () -> the vectors whose dot products the scores are; of a guidance that
        `reads_vectors`.
      pair_vectors: () -> [G, C, E] the vectors before the logits of a network that sees both sides;
        of such a guidance of a `PairBackbone`.
      item_rows: () -> table -> [G, C, D] the rows that the items' vectors are made of, with what
        frozen vectors come to; of such a guidance of a `DotBackbone`.
    """

    scores: Float[Array, "G C"]
    differences: Float[Array, "G"] | None
    stochastic: Callable[[jax.Array, float], Float[Array, "G C"]] = struct.field(pytree_node=False)
    vectors: Callable[[], Vectors] | None = struct.field(pytree_node=False, default=None)
    pair_vectors: Callable[[], Float[Array, "G C E"]] | None = struct.field(
        pytree_node=False, default=None
    )
    item_rows: Callable[[], Mapping[str, Float[Array, "G C D"]]] | None = struct.field(
        pytree_node=False, default=None
    )


class GuidanceLoss(NamedTuple):
    """This device's share of what guidance adds: sums over its lanes over the count of all.

    Attributes:
      loss: [] of the product's lanes; lambda is not in it.
      gate: [] what supervises a gate; 0 where nothing does.
      metrics: by `Guidance.metrics`, [] each.
    """

    loss: Float[Array, ""]
    gate: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Guidance(Protocol):
    """One use of an LLM product; see the module's docstring."""

    @property
    def queries(self) -> int:
        """G: queries drawn a step, over all devices."""
        ...

    @property
    def queries_knob(self) -> str:
        """What sets `queries`, as errors name it."""
        ...

    @property
    def width(self) -> int:
        """C: candidates of each query."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `loss` reports each step, means over its lanes."""
        ...

    @property
    def learning_rate(self) -> float:
        """Adam's, of the guidance's parameters."""
        ...

    @property
    def reads_stochastic(self) -> bool:
        """Whether `Scored.stochastic` is called: its passes need candidates of their own."""
        ...

    @property
    def reads_vectors(self) -> bool:
        """Whether `Scored.vectors` and `item_rows`, or `pair_vectors`, are called: rows are read
        then, not dot products of them. Backbones that are a dot product have the former, those
        whose network leaves vectors the latter; `arrays` refuses what does not fit."""
        ...

    def arrays(self, sources: Sources) -> tuple[Any, Csr | None]:
        """Host arrays to draw from, and training interactions to leave out for its sake.

        Raises:
          UserError: a product that is missing, damaged, of another split, or of no use to it.
        """
        ...

    def init(self, key: jax.Array, backbone: AnyBackbone) -> dict[str, Any]:
        """Dense parameters: a gate's, and under `METHOD` those of the method itself, which learn as
        the backbone's dense parameters do; {} where there are none."""
        ...

    def draw(
        self,
        words_of: Generators,
        arrays: Any,
        interactions: Interactions,
        histories: Histories | None,
    ) -> Any:
        """What S steps train on, [S, G, ...], each a function of its own generators.

        Args:
          arrays: of this guidance, on the devices.
          interactions: what batches are drawn from, and what is known of users and items.
        """
        ...

    def candidates(self, drawn: Any) -> Candidates:
        """The candidates [G, C] of one step's draw whose scores `loss` reads."""
        ...

    def masked(self, params: Mapping[str, Any], drawn: Any, layout: Layout) -> Masked:
        """Rows that the step's pass is to see otherwise than they are, by table, before a graph
        propagates them; {} for most. Asked of a guidance that `reads_vectors` alone."""
        ...

    def observe(self, frozen: Frozen, drawn: Any, arrays: Any, key: jax.Array) -> Any:
        """What is scored or looked up without a gradient: labelled preferences, reference runs,
        a product's vectors."""
        ...

    def loss(
        self,
        params: Mapping[str, Any],
        scored: Scored,
        drawn: Any,
        observed: Any,
        layout: Layout,
        key: jax.Array,
    ) -> GuidanceLoss:
        """What it adds to the loss of one step."""
        ...

    @property
    def gating(self) -> Gating:
        """The gate that weighs its lanes, and what supervises it."""
        ...


Maker = Callable[[RunConfig, tuple[AnyBackbone, ...], bool], Guidance]
_MAKERS: dict[str, Maker] = {}


def register(name: str, maker: Maker) -> None:
    """Let --guidance=NAME be a guidance of one's own.

    Args:
      maker: (run, backbones of its reference runs, whether the CPU kernels run) -> a `Guidance`.

    Raises:
      ConfigError: the name is taken.
    """
    register_guidance(name)
    _MAKERS[name] = maker


def built_in(makers: Mapping[str, Maker]) -> None:
    """Makers of the names that config/guidance.py has a section for."""
    _MAKERS.update(makers)


def make_guidance(
    run: RunConfig, reference_backbones: tuple[AnyBackbone, ...] = (), *, native: bool = False
) -> Guidance | None:
    """The guidance that --guidance names; None for none.

    Args:
      reference_backbones: of the runs of --reference_runs, where a gate reads their scores.
      native: whether the CPU kernels draw and score.
    """
    name = run.guidance.guidance
    return None if name == "none" else _MAKERS[name](run, reference_backbones, native)


def mean_over_queries(
    values: Float[Array, "G"], layout: Layout, weights: Float[Array, "G"] | None = None
) -> Float[Array, ""]:
    """This device's share of the mean over the queries of all devices.

    Args:
      weights: as of `Preferences`; 0 silences even a NaN.
    """
    if weights is not None:
        values = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(values) * (1.0 / (values.shape[0] * layout.devices))
