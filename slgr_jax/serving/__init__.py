"""A trained run as an object: scores, recommendations, vectors, what its gate believes."""

from slgr_jax.serving.trained_run import Recommendations, TrainedRun, load

__all__ = ["Recommendations", "TrainedRun", "load"]
