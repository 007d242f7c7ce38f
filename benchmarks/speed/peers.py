"""Other trainers of the same job, one a process: on the same pairs, BPR matrix factorisation, or
(recbole) the recommender of the same name.

    python benchmarks/speed/throughput.py --peer=implicit,cornac --peer_python=PYTHON

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
from typing import Any

import numpy as np
import synthetic
import turns
from turns import Contestant, Facts, Turn

LR, L2 = 0.01, 0.01  # neither changes the speed
ROWS_GB = 1.0  # most that RecBole's rows of histories may take


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
    users, items = ({i: i for i in range(n)} for n in (pairs.n_users, pairs.n_items))
    data = Dataset(pairs.n_users, pairs.n_items, users, items, (pairs.users, pairs.items, ratings))
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


# RecBole's names of the recommenders, and what it calls the knobs of ours.
RECBOLE: dict[str, tuple[str, Callable[[Facts], Facts]]] = {
    "mf": ("BPR", lambda knobs: {"embedding_size": knobs["dim"]}),
    "lightgcn": (
        "LightGCN",
        lambda knobs: {"embedding_size": knobs["dim"], "n_layers": knobs["layers"]},
    ),
    "sasrec": ("SASRec", lambda knobs: _transformer(knobs)),
    "bert4rec": (
        "BERT4Rec",
        lambda knobs: _transformer(knobs) | {"mask_ratio": knobs["mask_probability"]},
    ),
    "gru4rec": (
        "GRU4Rec",
        lambda knobs: {
            "embedding_size": knobs["dim"],
            "hidden_size": knobs["hidden"],
            "num_layers": knobs["layers"],
            "dropout_prob": knobs["dropout"],
        },
    ),
    "deepfm": ("DeepFM", lambda knobs: _perceptron(knobs)),
    "xdeepfm": ("xDeepFM", lambda knobs: _perceptron(knobs) | {"cin_layer_size": knobs["cin"]}),
    "autoint": (
        "AutoInt",
        lambda knobs: (
            _perceptron(knobs)
            | {
                "attention_size": knobs["attention_width"],
                "n_layers": knobs["layers"],
                "num_heads": knobs["heads"],
                "dropout_probs": [knobs["dropout"]] * 3,
            }
        ),
    ),
    "dcn": ("DCN", lambda knobs: _perceptron(knobs) | {"cross_layer_num": knobs["layers"]}),
    "dcnv2": (
        "DCNV2",
        lambda knobs: (
            _perceptron(knobs)
            | {
                "structure": "parallel",
                "cross_layer_num": knobs["layers"],
                "mixed": knobs["low_rank"] > 0,
                "expert_num": knobs["experts"],
                "low_rank": knobs["low_rank"],
            }
        ),
    ),
    "din": ("DIN", lambda knobs: _perceptron(knobs)),
}


CLICK = ("deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din")
SOFTMAX = ("sasrec", "bert4rec", "gru4rec")  # their loss draws no negatives


def _transformer(knobs: Facts) -> Facts:
    return {
        "hidden_size": knobs["dim"],
        "inner_size": knobs["hidden"],
        "n_layers": knobs["layers"],
        "n_heads": knobs["heads"],
        "hidden_dropout_prob": knobs["dropout"],
        "attn_dropout_prob": knobs["dropout"],
    }


def _perceptron(knobs: Facts) -> Facts:
    return {
        "embedding_size": knobs["dim"],
        "mlp_hidden_size": knobs["mlp"],
        "dropout_prob": knobs["dropout"],
    }


def recbole(pairs: synthetic.Pairs, job: Facts) -> Contestant:
    """RecBole's model of a backbone: its loader, its sampler, its loss, its optimiser (dense Adam).

    The lines of its trainer's epoch, stopped after as many batches as a turn has time for. A row
    of its data is, for BPR and LightGCN, a triple; for click models (and DIN, with a history) an
    item with a label, of which a triple has two or more; for SASRec and GRU4Rec a history of up
    to --max_history events and the one place that is predicted, its end; BERT4Rec predicts what
    it masks of that history, or in every other batch its last event. --dim, --layers, --heads,
    --hidden, --mlp and their like are those of the run; its DIN has one width for both MLPs.
    """
    import torch

    _patch_for_recbole()
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer

    torch.set_num_threads(job["threads"])
    backbone = job["backbone"]
    model_name, _ = RECBOLE[backbone]
    timed = backbone in SOFTMAX or backbone == "din"
    # Its trainer writes a log to the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if timed:
            _check_rows(pairs, job)
        files = pathlib.Path(folder) / "pairs"
        _write_atomic(pairs, files, moments=timed, fields=backbone in CLICK)
        config = _recbole_config(folder, job, timed=timed)
        loader, _, _ = data_preparation(config, create_dataset(config))
        kind = get_model(model_name)
        if backbone == "lightgcn":
            # Its own goes through a dictionary of edges, which SciPy 1.13 and later refuse.
            kind.get_norm_adj_mat = _normalised
        model = kind(config, loader.dataset).to(config["device"])
        optimizer = get_trainer(config["MODEL_TYPE"], model_name)(config, model).optimizer
    model.train()
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def batches(count: int) -> float:
        triples = 0.0
        for interaction in itertools.islice(endless, count):
            interaction = interaction.to(config["device"])
            optimizer.zero_grad()
            loss = model.calculate_loss(interaction)
            loss.backward()
            optimizer.step()
            triples += counted(backbone, interaction, job["negatives"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return triples

    count = turns.units_for(job["seconds"], batches)

    def turn() -> Turn:
        begin = time.perf_counter()
        triples = batches(count)
        return Turn(triples, time.perf_counter() - begin)

    facts = {
        "versions": versions("recbole", "torch"),
        "device": str(config["device"]),
        "optimizer": "adam",
        "model": model_name,
        "batch_size": config["train_batch_size"],
    }
    return Contestant(facts, turn, lambda: {"skipped": 0.0})


def _patch_for_recbole() -> None:
    """What RecBole 1.2.1 needs of NumPy 1 and of pandas 2, where these are newer."""
    # It reads names that NumPy 2 has dropped.
    for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        if not hasattr(np, name):
            setattr(np, name, kind)
    import pandas

    # It counts each entry's items with `agg(len)`, which since pandas 3 counts the entries.
    agg = pandas.Series.agg
    pandas.Series.agg = lambda self, how, **more: (
        self.map(len) if how is len else agg(self, how, **more)
    )


def _recbole_config(folder: str, job: Facts, *, timed: bool) -> Any:
    """RecBole's settings for the pairs in `folder`; `timed`: its model reads histories."""
    from recbole.config import Config

    backbone = job["backbone"]
    model_name, settings = RECBOLE[backbone]
    batch = job["batch_size"] or (job["own_batch_size"] if backbone == "lightgcn" else 2048)
    columns = {"inter": ["user_id", "item_id"] + ["timestamp"] * timed}
    if backbone in CLICK:
        columns["item"] = ["item_id", "class"]
    negatives = {
        "distribution": "uniform",
        "sample_num": job["negatives"],
        "alpha": 1.0,
        "dynamic": False,
        "candidate_num": 0,
    }
    split = {
        "split": {"RS": [1.0, 0.0, 0.0]},
        "order": "TO" if timed else "RO",
        "group_by": "none",
        "mode": "full",
    }
    options = {
        "data_path": folder,
        "checkpoint_dir": folder,
        "load_col": columns,
        "eval_args": split,
        "metrics": ["Recall"],
        "valid_metric": "Recall@10",
        "train_neg_sample_args": None if backbone in SOFTMAX else negatives,
        "MAX_ITEM_LIST_LENGTH": job["knobs"]["max_history"],
        "train_batch_size": batch,
        "learning_rate": LR,
        "worker": 0,
        "show_progress": False,
        "state": "ERROR",
    }
    return Config(model=model_name, dataset="pairs", config_dict=options | settings(job["knobs"]))


def counted(backbone: str, interaction: Any, negatives: int) -> float:
    """Triples or predicted places of a batch of RecBole's; see `recbole`."""
    if backbone == "bert4rec":  # as its loss does: a mask at the first place is not
        return int((interaction["MASK_INDEX"] > 0).sum())
    return len(interaction) / (1 + negatives if backbone in CLICK else 1)


def _normalised(model: Any) -> Any:
    """D^-1/2 A D^-1/2 of RecBole's LightGCN as the sparse tensor that it propagates with."""
    import scipy.sparse
    import torch

    pairs = model.interaction_matrix.astype(np.float32)
    whole = scipy.sparse.bmat([[None, pairs], [pairs.T, None]], format="coo")
    scale = (np.asarray(whole.sum(axis=1)).ravel() + 1e-7) ** -0.5
    values = (scale[whole.row] * whole.data * scale[whole.col]).astype(np.float32)
    places = np.stack([whole.row, whole.col]).astype(np.int64)
    return torch.sparse_coo_tensor(torch.from_numpy(places), torch.from_numpy(values), whole.shape)


def _check_rows(pairs: synthetic.Pairs, job: Facts) -> None:
    """RecBole keeps the history of every row: two lists (items, times) of 8 and 4 bytes an event.

    Raises:
      Refused: that is more than ROWS_GB.
    """
    gb = len(pairs) * job["knobs"]["max_history"] * 12 / 1e9
    if gb > ROWS_GB:
        raise turns.Refused(
            f"--peer=recbole keeps a row with its history for each of {len(pairs):,} interactions: "
            f"{gb:.1f} GB for --backbone={job['backbone']}, made one by one; compare on "
            "--sizes=ml100k, or lower --interactions or --max_history"
        )


def _write_atomic(
    pairs: synthetic.Pairs, folder: pathlib.Path, *, moments: bool, fields: bool
) -> None:
    """The pairs as RecBole's file of interactions; `fields`: and one of the items' categories."""
    folder.mkdir()
    columns = {"user_id:token": pairs.users, "item_id:token": pairs.items}
    if moments:
        columns["timestamp:float"] = synthetic.moments(pairs)
    with open(folder / f"{folder.name}.inter", "w", encoding="ascii") as file:
        print(*columns, sep="\t", file=file)
        np.savetxt(file, np.stack(list(columns.values()), axis=1), "%d", delimiter="\t")
    if fields:
        offsets, codes = synthetic.categories(pairs.n_items)
        with open(folder / f"{folder.name}.item", "w", encoding="ascii") as file:
            print("item_id:token", "class:token_seq", sep="\t", file=file)
            for item, of_item in enumerate(np.split(codes, offsets[1:-1])):
                print(item, " ".join(map(str, of_item)), sep="\t", file=file)


PEERS: dict[str, Callable[[synthetic.Pairs, Facts], Contestant]] = {
    "implicit": implicit,
    "cornac": cornac,
    "recbole": recbole,
    "torch": torch,
}
# The backbones that each peer trains; recbole: its models of the same names.
TRAINED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("implicit", "cornac", "torch"), ("mf",)),
    "recbole": tuple(RECBOLE),
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
