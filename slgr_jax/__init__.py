"""Train recommenders with offline LLM knowledge, believed only where it is right.

    import slgr_jax as sl

    sl.prepare(source="csv", input="ratings.csv", out="DATA")
    sl.import_teacher("DATA", "answers.csv", "my_llm")
    sl.train("DATA", "RUN", guidance="pairwise", teacher="my_llm", gate="calibrated")
    print(sl.evaluate("RUN"))

Importing this package imports nothing heavy: `--help` of a command must not wait for JAX.
`slgr_jax.api` says what each function does.
"""

from slgr_jax.api import (
    compare,
    evaluate,
    export,
    import_edits,
    import_interactions,
    import_teacher,
    inspect,
    load,
    prepare,
    recommend,
    train,
    tune,
)
from slgr_jax.registers import register_backbone, register_gate, register_guidance

__all__ = [
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
    "register_backbone",
    "register_gate",
    "register_guidance",
    "train",
    "tune",
]

__version__ = "0.1.0"
