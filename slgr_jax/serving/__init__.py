"""A trained run as an object: scores, recommendations, vectors, new users, its gate."""

from slgr_jax.serving.histories import History, read_histories
from slgr_jax.serving.recommender import Recommendations, Recommender
from slgr_jax.serving.trained_run import TrainedRun, load

__all__ = ["History", "Recommendations", "Recommender", "TrainedRun", "load", "read_histories"]
