"""Other trainers of the same job, one a process: BPR matrix factorisation on the same pairs.

    python benchmarks/throughput.py --peer=implicit,cornac --peer_python=PYTHON

Run by `throughput.py` over `turns`; needs NumPy, SciPy and the peer, and nothing of this project:
PYTHON may be another environment. Each peer uses every core it is given, float32, its fastest
settings, and counts the triples that it draws, those that it then skips as false negatives too.
Timed are training epochs alone. `skipped` is the share of draws that train nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import synthetic
import turns
from turns import Contestant, Facts, Turn

LR, L2 = 0.01, 0.01  # neither changes the speed


def versions(*packages: str) -> Facts:
    """The installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


def implicit(pairs: synthetic.Pairs, job: Facts) -> Contestant:
    """implicit's Hogwild SGD; negatives by popularity, a positive is skipped.

    Its callback times each epoch, so what `fit` does before and after them is left out.
    """
    import scipy.sparse
    from implicit.cpu.bpr import BayesianPersonalizedRanking

    matrix = scipy.sparse.csr_matrix(
        (np.ones(len(pairs), np.float32), (pairs.users, pairs.items)),
        shape=(pairs.n_users, pairs.n_items),
    )
    model = BayesianPersonalizedRanking(
        factors=job["dim"], learning_rate=LR, regularization=L2, num_threads=job["threads"]
    )
    skipped: list[float] = []

    def epochs(count: int) -> float:
        times: list[float] = []

        def after(_: int, elapsed: float, __: int, misses: int) -> None:
            times.append(elapsed)
            skipped.append(misses / len(pairs))

        model.iterations = count
        model.fit(matrix, show_progress=False, callback=after)
        return sum(times)

    count = turns.units_for(job["seconds"], epochs)
    return Contestant(
        {"versions": versions("implicit"), "device": "cpu", "optimizer": "sgd"},
        lambda: Turn(count * len(pairs), epochs(count)),
        lambda: {"skipped": float(np.mean(skipped))},
    )


def cornac(pairs: synthetic.Pairs, job: Facts) -> Contestant:
    """cornac's Hogwild SGD; negatives uniformly, a positive is skipped.

    `fit` with no epochs times what surrounds the epochs, which is taken off.
    """
    from cornac.data import Dataset
    from cornac.models import BPR

    warnings.filterwarnings("ignore", message="Model is already fitted")
    ratings = np.ones(len(pairs), np.float32)
    ids = [{i: i for i in range(n)} for n in (pairs.n_users, pairs.n_items)]
    data = Dataset(pairs.n_users, pairs.n_items, *ids, (pairs.users, pairs.items, ratings))
    model = BPR(k=job["dim"], learning_rate=LR, lambda_reg=L2, num_threads=job["threads"])

    def fit(count: int) -> float:
        model.max_iter = count
        return turns.timed(lambda: model.fit(data))

    def turn() -> Turn:
        around = fit(0)
        return Turn(count * len(pairs), fit(count) - around)

    count = turns.units_for(job["seconds"], fit)
    # The chance that a uniform item is among the positives of a random pair's user.
    skipped = float((pairs.counts.astype(np.float64) ** 2).sum() / len(pairs) / pairs.n_items)
    return Contestant(
        {"versions": versions("cornac"), "device": "cpu", "optimizer": "sgd"},
        turn,
        lambda: {"skipped": skipped},
    )


def torch(pairs: synthetic.Pairs, job: Facts) -> Contestant:
    """A plain PyTorch step: sparse nn.Embedding, torch.optim.SGD, everything on the device.

    SGD is the fastest of its sparse optimisers. Pairs with replacement, negatives uniformly
    without a look at the positives; steps are enqueued without waiting.
    """
    import torch

    torch.set_num_threads(job["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = job["batch_size"] or 8192
    users = torch.as_tensor(pairs.users, dtype=torch.int64, device=device)
    items = torch.as_tensor(pairs.items, dtype=torch.int64, device=device)
    tables = torch.nn.ModuleList(
        torch.nn.Embedding(rows, job["dim"], sparse=True) for rows in (pairs.n_users, pairs.n_items)
    ).to(device)
    for table in tables:
        torch.nn.init.normal_(table.weight, std=0.01)
    optimizer = torch.optim.SGD(tables.parameters(), lr=LR)

    def steps(count: int) -> None:
        for _ in range(count):
            drawn = torch.randint(len(pairs), (batch,), device=device)
            both = torch.stack(
                [items[drawn], torch.randint(pairs.n_items, (batch,), device=device)], dim=1
            )
            user, item = tables[0](users[drawn]), tables[1](both)
            difference = (user * (item[:, 0] - item[:, 1])).sum(1)
            loss = torch.nn.functional.softplus(-difference).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    count = turns.units_for(job["seconds"], steps)

    def finish() -> Facts:
        if device.type != "cuda":
            return {"skipped": 0.0}
        return {"skipped": 0.0, "device_peak_mb": torch.cuda.max_memory_allocated() / 1e6}

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return Contestant(
        {"versions": versions("torch"), "device": name, "optimizer": "sgd", "batch_size": batch},
        lambda: Turn(count * batch, turns.timed(lambda: steps(count))),
        finish,
    )


def recbole(pairs: synthetic.Pairs, job: Facts) -> Contestant:
    """RecBole's BPR: its loader, its sampler, its model and its optimiser (dense Adam).

    The lines of its trainer's epoch, stopped after as many batches as a turn has time for.
    """
    import torch

    # RecBole 1.2.1 reads names that NumPy 2 has dropped.
    for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        if not hasattr(np, name):
            setattr(np, name, kind)
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.general_recommender import BPR
    from recbole.trainer import Trainer

    torch.set_num_threads(job["threads"])
    batch = job["batch_size"] or 2048
    # Its trainer writes a log to the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _write_atomic(pairs, pathlib.Path(folder) / "pairs")
        config = Config(
            model="BPR",
            dataset="pairs",
            config_dict={
                "data_path": folder,
                "checkpoint_dir": folder,
                "load_col": {"inter": ["user_id", "item_id"]},
                "eval_args": {
                    "split": {"RS": [1.0, 0.0, 0.0]},
                    "order": "RO",
                    "group_by": "none",
                    "mode": "full",
                },
                "embedding_size": job["dim"],
                "train_batch_size": batch,
                "learning_rate": LR,
                "worker": 0,
                "show_progress": False,
                "state": "ERROR",
            },
        )
        data = create_dataset(config)
        loader, _, _ = data_preparation(config, data)
        model = BPR(config, loader.dataset).to(config["device"])
        optimizer = Trainer(config, model).optimizer
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def batches(count: int) -> int:
        triples = 0
        for interaction in itertools.islice(endless, count):
            interaction = interaction.to(config["device"])
            optimizer.zero_grad()
            loss = model.calculate_loss(interaction)
            loss.backward()
            optimizer.step()
            triples += len(interaction)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return triples

    count = turns.units_for(job["seconds"], batches)

    def turn() -> Turn:
        begin = time.perf_counter()
        triples = batches(count)
        return Turn(triples, time.perf_counter() - begin)

    return Contestant(
        {
            "versions": versions("recbole", "torch"),
            "device": str(config["device"]),
            "optimizer": "adam",
            "batch_size": batch,
        },
        turn,
        lambda: {"skipped": 0.0},
    )


def _write_atomic(pairs: synthetic.Pairs, folder: pathlib.Path) -> None:
    """The pairs as RecBole's file of interactions."""
    folder.mkdir()
    with open(folder / f"{folder.name}.inter", "w", encoding="ascii") as file:
        file.write("user_id:token\titem_id:token\n")
        np.savetxt(file, np.stack([pairs.users, pairs.items], axis=1), "%d", delimiter="\t")


PEERS: dict[str, Callable[[synthetic.Pairs, Facts], Contestant]] = {
    "implicit": implicit,
    "cornac": cornac,
    "recbole": recbole,
    "torch": torch,
}
INSTALL = {
    "implicit": "pip install 'slgr_jax[peers]'",
    "cornac": "pip install 'slgr_jax[peers]'",
    "recbole": "pip install recbole (--no-deps, then what it misses, where its pins clash)",
    "torch": "pip install torch",
}


def prepare(job: Facts) -> Contestant:
    """The peer that `job["peer"]` names, warm."""
    # Read by the thread pools of C libraries when they are loaded.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(job["threads"])
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # implicit warns, and is slower, with more
    pairs = synthetic.Pairs.load(job["pairs"])
    name: str = job["peer"]
    try:
        contestant = PEERS[name](pairs, job)
    except ImportError as error:
        raise turns.Refused(
            f"--peer={name} cannot be imported ({error}): {INSTALL[name]}, or name an environment "
            "that has it with --peer_python=PYTHON"
        ) from error
    contestant.facts.update(peer=name, threads=job["threads"])
    return contestant


if __name__ == "__main__":
    turns.serve(prepare)
