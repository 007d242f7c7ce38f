"""The Python API: what the commands do, as functions; `import slgr_jax as sl` has them all.

    import slgr_jax as sl

    sl.prepare(source="csv", input="ratings.csv", out="DATA")
    sl.import_teacher("DATA", "answers.csv", "my_llm", model="some-llm")
    sl.train("DATA", "PLAIN")
    sl.train("DATA", "GUIDED", guidance="pairwise", teacher="my_llm", lambda_=0.3)
    print(sl.evaluate(["PLAIN", "GUIDED"]))

Keyword arguments are the knobs of `slgr ... --help` by their names there, with the same defaults
(`lambda`, a word of Python, is also `lambda_`); lists stand for values with commas. Errors are
`slgr_jax.errors.UserError`s that name a knob as `--knob`.

No flags are parsed and nothing is printed: lines for people go to `logging.getLogger("slgr_jax")`
(`logging.basicConfig(level=logging.INFO)` shows them). Importing this module imports no JAX.
"""

from slgr_jax.api.experiments import compare, tune
from slgr_jax.api.runs import evaluate, export, inspect, load, recommend
from slgr_jax.api.training import (
    IMPORT_COMMON,
    import_edits,
    import_interactions,
    import_teacher,
    prepare,
    train,
)

__all__ = [
    "IMPORT_COMMON",
    "compare",
    "evaluate",
    "export",
    "import_edits",
    "import_interactions",
    "import_teacher",
    "inspect",
    "load",
    "prepare",
    "recommend",
    "train",
    "tune",
]
