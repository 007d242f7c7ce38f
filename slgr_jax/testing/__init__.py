"""A world with a known answer: users, items, interactions, and a teacher as reliable as one sets.

    world = simulate(WorldConfig(reliability=Region(history=8)))
    dataset = write(world, "world")  # a dataset directory, with the teacher product `pairs`
    judged = world.judge(np.random.default_rng(1), "test")
    calibration.auc(judged.reliability, judged.right)  # of the Bayes rule

Interactions. Utility s_ui = taste * <p_u, q_i> / sqrt(D) + b_i with p, q ~ N(0, I) and b_i =
-popularity_skew * log(rank of i). A user's events are the items of the greatest s_ui + Gumbel
noise: a sample without replacement with probabilities softmax(s_u) (Plackett-Luce; Kool et al.
2019, arXiv 1903.06059), in random order of time. History lengths follow a power law.

Teacher. It states pairs (preferred, other). Each is stated in the correct order with probability
r(history of the user, popularity of both items), independently; the counts are those of the
training part. Statements are of two sorts:

- open: two items that are neither training nor validation items of the user; correct is the order
  of utility, which nobody observes;
- known: a validation item of the user, or a training item that the teacher was not shown, against
  an item they never interacted with; correct is the former first. A gate may learn from these.

`World.judge` makes the second sort from the test part, to measure a gate; no product holds them.

What a gate can know, and the Bayes rule for it: `Statements.reliability` for history and
popularity alone, `Statements.belief` for the margin too, `World.oracle` for the utilities too,
which bounds a gate that sees the recommender's own scores. A shuffled teacher has r = 1/2 and yet
an oracle far from 1/2: a recommender that knows the user knows which statements are wrong.
"""

from slgr_jax.testing.files import LISTS, PAIRS, write, write_lists, write_pairs
from slgr_jax.testing.reliabilities import TEACHERS, Constant, Logistic, Region, Reliability
from slgr_jax.testing.world import Statements, Truth, World, WorldConfig, simulate

__all__ = [
    "LISTS",
    "PAIRS",
    "TEACHERS",
    "Constant",
    "Logistic",
    "Region",
    "Reliability",
    "Statements",
    "Truth",
    "World",
    "WorldConfig",
    "simulate",
    "write",
    "write_lists",
    "write_pairs",
]
