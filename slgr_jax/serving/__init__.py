"""A trained run as an object: scores, recommendations, vectors, what its gate believes."""

from slgr_jax.serving.recommender import Recommendations, Recommender
from slgr_jax.serving.trained_run import TrainedRun, load

__all__ = ["Recommendations", "Recommender", "TrainedRun", "load"]
