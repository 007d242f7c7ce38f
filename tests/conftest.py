"""The test policy: 8 virtual devices, warnings and rank promotion are errors, flags parsed."""

from __future__ import annotations

import warnings

import jax
import pytest
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Raised inside third-party packages on import or teardown; nothing here can mend them.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(orbax|flax)\..*")
        yield


@pytest.fixture(autouse=True, scope="session")
def _flags_are_parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
