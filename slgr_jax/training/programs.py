"""What a loop runs besides its steps, and how many of those it dispatches at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from slgr_jax.mesh import put
from slgr_jax.models import embedding_table
from slgr_jax.models.backbones import DotBackbone, JointBackbone, SequenceBackbone
from slgr_jax.models.embedding_table import InitialRows
from slgr_jax.models.scoring import ServingState
from slgr_jax.sampling.context import Context
from slgr_jax.training import refit, warm_start
from slgr_jax.training.build import Experiment
from slgr_jax.training.state import Learner, TrainState, init_state, make_serving_state
from slgr_jax.training.step import Trainer
from slgr_jax.training.validation import Validation

# steps_per_dispatch=0: work in one dispatch, in triples of mf.
TRIPLES_PER_DISPATCH = 1 << 21
# What else costs as much as a triple of matrix factorisation, on a CPU, to a factor of a few: a
# place of a window, a triple of a click model, 16 logits of a softmax, 8 rows that a graph reads.
# (The last two count how many go into one triple.)
_PLACE, _CLICK, _LOGITS, _GRAPH_ROWS = 64, 64, 16, 8


def steps_per_dispatch(trainer: Trainer) -> int:
    """K: what --steps_per_dispatch says, or as many steps as take a second, roughly."""
    backbone, plan = trainer.backbone, trainer.plan
    scored = plan.triples + trainer.guidance_pairs
    work = scored
    if isinstance(backbone, SequenceBackbone):
        work = scored * backbone.length * _PLACE
    elif isinstance(backbone, JointBackbone):
        work = scored * _CLICK
    elif trainer.config.loss_name == "softmax":
        work += scored * plan.n_items // _LOGITS
    if isinstance(backbone, DotBackbone) and backbone.whole:
        work += 12 * plan.drawn // _GRAPH_ROWS  # a few layers, both ways, forward and back
    return trainer.config.train.steps_per_dispatch or max(1, TRIPLES_PER_DISPATCH // work)


def put_number(trainer: Trainer, number: int) -> jax.Array:
    """A number on every device."""
    return trainer.layout.put(np.int32(number))


# What runs once at the start is a program each, with the seed as an argument: run line by line it
# would be ten, and to look one up in the compilation cache takes longer than to run it.


def _draw_key(seed: jax.Array) -> jax.Array:
    """Key data of a run's draws; the seed itself is the initialisation's."""
    return jax.random.key_data(jax.random.key(seed + 1))


def _make_init(
    learner: Learner, initial: Mapping[str, InitialRows]
) -> Callable[[np.int32], TrainState]:
    """Jitted `init_state`: seed -> a fresh state, laid out as the steps want it.

    Args:
      initial: host arrays, an argument of the program: as constants they would be compiled.
    """
    start = functools.partial(init_state, learner)
    program = jax.jit(start, out_shardings=learner.state_layout)

    def init(seed: np.int32) -> TrainState:
        return program(seed, put(dict(initial), learner.layout.table_sharding))

    return init


def _finite(learner: Learner, state: TrainState) -> dict[str, jax.Array]:
    """Which of the state's parts hold only finite numbers."""
    finite = {
        f"tables/{name}": embedding_table.all_finite(state.tables[name], spec.width)
        for name, spec in learner.backbone.tables.items()
    }
    for name, part in (("params", state.params), ("opt_state", state.opt_state)):
        leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(part)]
        finite[name] = jnp.all(jnp.array(leaves))
    return finite


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a loop runs besides its steps; each is compiled once, whatever the number of seeds.

    Attributes:
      init: seed -> a fresh state.
      key: seed -> key data of its draws.
      serving: (state, context) -> what validation and export score with.
      finite: state -> which of its parts hold only finite numbers.
      validate: the metrics of a serving state.
      per_epoch: steps of an epoch.
      dispatch: K, steps of a dispatch.
    """

    init: Callable[[np.int32], TrainState]
    key: Callable[[np.int32], jax.Array]
    serving: Callable[[TrainState, Context], ServingState]
    finite: Callable[[TrainState], dict[str, jax.Array]]
    validate: Validation
    per_epoch: int
    dispatch: int


def make_programs(experiment: Experiment) -> Programs:
    """The programs of the runs of an experiment."""
    trainer = experiment.trainer
    init = _make_init(trainer, experiment.initial)
    if trainer.config.train.init_from:
        init = warm_start.beginning(trainer, experiment.dataset, init)
    if trainer.config.train.refit:
        init = refit.beginning(trainer, init)
    return Programs(
        init=init,
        key=jax.jit(_draw_key, out_shardings=trainer.layout.replicated),
        serving=make_serving_state(trainer),
        finite=jax.jit(functools.partial(_finite, trainer)),
        validate=Validation(trainer, experiment.dataset, experiment.validated),
        per_epoch=-(-trainer.plan.drawn // trainer.plan.triples),
        dispatch=steps_per_dispatch(trainer),
    )
