"""What benchmarks/speed/startup.py times, each in a process of its own; it says when it got where.

    python benchmarks/speed/startup_children.py ours MARKS launch/train.py --data=DATA ...
    PEER/bin/python benchmarks/speed/startup_children.py torch|keras_rs MARKS PAIRS.npz

Appends one JSON object a moment to MARKS: its name, the time of day, for `ours` also what JAX had
compiled by then. A peer is the least that trains BPR matrix factorisation with that library: 64
wide, one epoch, one negative a pair, drawn beforehand and without looking whether it is one.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

WIDTH = 64
REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
HITS = "/jax/compilation_cache/cache_hits"
LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"


class Marks:
    """Writes moments to a file; `totals` are written along."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.totals: collections.Counter[str] = collections.Counter()

    def __call__(self, name: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"mark": name, "at": time.time(), **self.totals}) + "\n")

    def after(self, owner: Any, name: str, mark: str) -> None:
        """Mark each return of `owner.name`."""
        real: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            self(mark)
            return found

        setattr(owner, name, wrapped)


def ours(marks: Marks, script: str, *arguments: str) -> None:
    """Run a launch script as it is, with marks where it passes from one room to the next."""
    from slgr_jax.cli import flags

    real = flags.run

    def run(main: Callable[[list[str]], None], **options: Any) -> None:
        def marked(rest: list[str]) -> None:
            marks("main")
            from slgr_jax.data import dataset
            from slgr_jax.training import build, loop, training_log

            _count_compiles(marks)
            marks("imported")
            marks.after(dataset, "load", "loaded")
            marks.after(build, "build", "built")
            marks.after(training_log.TrainingLog, "__init__", "ready")
            marks.after(
                training_log.TrainingLog, "advance", "steps"
            )  # the last one is the epoch's end
            marks.after(training_log.TrainingLog, "record", "valid")
            marks.after(loop, "train", "saved")
            main(rest)

        real(marked, **options)

    flags.run = run
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _count_compiles(marks: Marks) -> None:
    from jax import monitoring

    counted = {REQUESTS: "programs", HITS: "hits"}
    summed = {LOWER: "lower_s", COMPILE: "compile_s"}

    def on_event(event: str, **_: Any) -> None:
        if event in counted:
            marks.totals[counted[event]] += 1

    def on_duration(event: str, duration: float, **_: Any) -> None:
        if event in summed:
            marks.totals[summed[event]] += duration

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)


def torch(marks: Marks, pairs: str) -> None:
    """Sparse Adagrad on two `nn.Embedding`."""
    import numpy as np
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, or it warns
    data = np.load(pairs)
    users, items, others = (torch.from_numpy(data[name]) for name in ("users", "items", "others"))
    tables = [
        torch.nn.Embedding(int(data[rows]), WIDTH, sparse=True) for rows in ("n_users", "n_items")
    ]
    optimizer = torch.optim.Adagrad([table.weight for table in tables], lr=0.05)
    batch = int(data["batch"])
    order = torch.randperm(len(users))
    for start in range(0, len(users), batch):
        rows = order[start : start + batch]
        vectors = tables[0](users[rows])
        gap = (vectors * (tables[1](items[rows]) - tables[1](others[rows]))).sum(1)
        loss = -torch.nn.functional.logsigmoid(gap).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    marks("steps")


def keras_rs(marks: Marks, pairs: str) -> None:
    """Keras on JAX with keras-rs' pairwise loss and dense Adam, through `fit`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_rs
    import numpy as np

    data = np.load(pairs)
    user = keras.Input((1,), dtype="int32")
    pair = keras.Input((2,), dtype="int32")
    vectors = keras.layers.Embedding(int(data["n_users"]), WIDTH)(user)
    scores = keras.ops.sum(
        vectors * keras.layers.Embedding(int(data["n_items"]), WIDTH)(pair), axis=-1
    )
    model = keras.Model([user, pair], scores)
    model.compile(optimizer="adam", loss=keras_rs.losses.PairwiseLogisticLoss())
    labels = np.tile(np.float32([1.0, 0.0]), (len(data["users"]), 1))
    inputs = [data["users"][:, None], np.stack([data["items"], data["others"]], axis=1)]
    model.fit(inputs, labels, batch_size=int(data["batch"]), epochs=1, verbose=0)
    marks("steps")


if __name__ == "__main__":
    {"ours": ours, "torch": torch, "keras_rs": keras_rs}[sys.argv[1]](
        Marks(sys.argv[2]), *sys.argv[3:]
    )
