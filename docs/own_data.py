"""Train on interactions and LLM answers of your own, with and without the LLM.

    python docs/own_data.py ratings.csv answers.csv OUT

ratings.csv has user, item[, timestamp, rating]; answers.csv has user, item, score, with the same
ids. Writes OUT/data, OUT/plain and OUT/guided, and prints how the two runs rank the test part.
"""

from __future__ import annotations

import logging
import pathlib
import sys
from typing import Any

import slgr_jax as sl


def main(ratings: str, answers: str, out: pathlib.Path, **knobs: Any) -> sl.api.Evaluation:
    """Prepare, import, train twice, evaluate.

    Args:
      ratings: interactions, a CSV file.
      answers: what the LLM answered, a CSV file.
      out: directory to write.
      **knobs: of both runs: epochs, dim, ...
    """
    data = out / "data"
    if not data.exists():
        sl.prepare(source="csv", input=ratings, out=data)
        sl.import_teacher(data, answers, "llm", built_from="train_only")

    # The calibrated gate learns from held-out interactions how far the LLM is to be believed.
    sl.train(data, out / "plain", **knobs)
    sl.train(data, out / "guided", guidance="pairwise", teacher="llm", gate="calibrated", **knobs)
    return sl.evaluate([out / "plain", out / "guided"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])))
