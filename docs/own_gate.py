"""A gate of your own: believe the LLM where the user's history is short.

    python docs/own_gate.py DATA TEACHER RUN

DATA is a dataset directory (`slgr prepare`), TEACHER a product of it (`slgr teach`), RUN the
directory of the run. A gate is a Flax module from `GateInputs` of G preferences to alpha [G], the
weight of each preference in the loss. It is registered before the run is trained or loaded.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import slgr_jax as sl
from slgr_jax.guidance.gates import GateInputs


class ShortHistory(nn.Module):
    """alpha = sigmoid(-slope * history): 1/2 for a user of average history, more for a shorter.

    Attributes:
      slope: how sharply belief falls; per standard deviation of log(1 + training interactions).
    """

    slope: float = 2.0

    @nn.compact
    def __call__(self, inputs: GateInputs) -> Float[Array, "G"]:
        return jax.nn.sigmoid(-self.slope * inputs.history)


def main(data: str, teacher: str, workdir: str, **knobs: Any) -> sl.api.Evaluation:
    """Train with the gate, and evaluate.

    Args:
      data: dataset directory.
      teacher: product under DATA/teacher.
      workdir: directory of the run.
      **knobs: of the run: epochs, dim, ...
    """
    sl.register_gate("short_history", lambda config: ShortHistory())
    sl.train(data, workdir, guidance="pairwise", teacher=teacher, gate="short_history", **knobs)
    return sl.evaluate(workdir)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(main(*sys.argv[1:]))
