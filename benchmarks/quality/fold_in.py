"""What folding a user in is worth beside training on the user.

    python benchmarks/quality/fold_in.py --data=DATA --out=DIR

A share of the users that have training, validation and test items is taken out of a copy of DATA
(same ids), every recommender is trained on all users and on the others, and the users that were
held out are folded in from their training items. For the same users the table has NDCG@10 and
Recall@10 over the whole catalogue of

    trained    the run that was trained on everybody
    folded     the run that has not seen them; beside it users/s of one call for all of them, and
               the median of one user's fold-in and list of ten, both after compilation
    popular    most popular items among the other users

Both runs know a user's training items and nothing later; training and validation items are masked
(--part=valid, by which settings are chosen: training items). Called again it goes on with what is
trained. Backbones that read times need some in DATA.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob
from slgr_jax.errors import ConfigError, InputError, listing

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Csr, Dataset
    from slgr_jax.serving import TrainedRun

# Knobs of the runs, besides defaults: fewer validations where one is dear.
KNOBS: dict[str, dict[str, Any]] = {
    "mf": {},
    "lightgcn": {"batch_size": 4096, "eval_every": 5, "patience": 4, "epochs": 150},
    "sasrec": {"eval_every": 4, "patience": 3, "epochs": 60},
    "deepfm": {"patience": 3, "epochs": 40},
}
SINGLE = 50  # users whose latency is measured
METRICS = ("ndcg@10", "recall@10")


@dataclasses.dataclass(frozen=True)
class FoldInConfig(Section):
    """What is compared."""

    data: str = knob("", "dataset directory")
    out: str = knob("", "directory of the copy without held users, the runs and the table")
    backbones: str = knob(",".join(KNOBS), "recommenders, with commas")
    share: float = knob(0.2, "users held out, of all", above=0, below=1)
    seed: int = knob(0, "seed of who is held out", minimum=0)
    part: str = knob("test", "items to find", choices=("valid", "test"))


def held_users(dataset: Dataset, config: FoldInConfig) -> np.ndarray:
    """Ascending indices of the users that are held out."""
    counts = [dataset.positives((part,)).counts for part in ("train", "valid", "test")]
    able = np.flatnonzero(np.min(counts, axis=0))
    wanted = round(config.share * dataset.n_users)
    if wanted < 1 or wanted > able.size:
        raise InputError(
            f"--share={config.share:g} of {dataset.n_users} users is {wanted}, and {able.size} "
            "have items in every part"
        )
    return np.sort(np.random.default_rng(config.seed).choice(able, wanted, replace=False))


def write_without(dataset: Dataset, held: np.ndarray, out: pathlib.Path) -> None:
    """A copy of `dataset` with the same ids and no interaction of the users `held`."""
    import pyarrow as pa

    from slgr_jax.data import fingerprints, schema, shards

    files, pairs = dict(dataset.manifest.files), {}
    with shards.atomic_directory(out) as root:
        for name in set(files) - set(schema.PARTS):  # ids, and features where there are some
            for file in files[name]:
                shutil.copyfile(dataset.path / file.path, root / file.path)
        for part in schema.PARTS:
            table = shards.read_shards(dataset.path, files[part], schema.INTERACTIONS)
            users = table.column("user").to_numpy()
            table = table.filter(pa.array(~np.isin(users, held)))
            files[part] = shards.write_shards(root, f"{part}/part", table, rows_per_shard=10**7)
            pairs[part] = (table.column("user").to_numpy(), table.column("item").to_numpy())
        manifest = dataclasses.replace(
            dataset.manifest, files=files, split_hash=fingerprints.split_hash(pairs)
        )
        schema.write_manifest(root, manifest)


def rows_of(csr: Csr, users: np.ndarray) -> Csr:
    """The rows of `users`, numbered 0, 1, ..."""
    from slgr_jax.data.dataset import Csr

    rows = [csr.row(user) for user in users]
    owners = np.repeat(np.arange(users.size), [row.size for row in rows])
    return Csr.from_pairs(owners, np.concatenate(rows), users.size)


def histories_of(dataset: Dataset, users: np.ndarray) -> dict[str, Any]:
    """The training events of `users` as `TrainedRun.fold_in` takes them."""
    from slgr_jax.serving.histories import History

    ids, train = np.array(dataset.items.column("item_id").to_pylist()), dataset.train
    histories = {}
    for user in users:
        rows = np.flatnonzero(train.users == user)
        when = None if train.timestamps is None else train.timestamps[rows]
        histories[dataset.user_ids[user].as_py()] = History(ids[train.items[rows]].tolist(), when)
    return histories


def quality(
    score_users: Any, state: Any, relevant: Csr, seen: Csr, n_items: int
) -> dict[str, float]:
    """Means over the users with relevant items."""
    from slgr_jax.evaluation import full_ranking, ranking_metrics

    ranked = full_ranking.rank(score_users, state, relevant, seen, n_items, pooled_auc=False)
    values = ranking_metrics.per_user(ranked, (10,)).values
    return {name: float(values[name].mean()) for name in METRICS}


def of_trained(run: TrainedRun, held: np.ndarray, relevant: Csr, seen: Csr) -> dict[str, float]:
    """Of the run that was trained on the held users too, as of the end of training."""
    scoring, users = run.restored.scoring("valid"), np.asarray(held, np.int32)
    score = run.restored.score_users

    def score_held(state: Any, rows: Any) -> Any:
        scoring, users = state
        return score(scoring, users[rows])

    return quality(score_held, (scoring, users), relevant, seen, run.dataset.n_items)


def of_folded(
    run: TrainedRun, histories: dict[str, Any], relevant: Csr, seen: Csr
) -> dict[str, float]:
    """Of the run that has not seen them, and how long folding in takes."""
    folded = run.fold_in(histories)
    begin = time.perf_counter()
    run.fold_in(histories)
    seconds = time.perf_counter() - begin

    spent = []
    chosen = list(histories.items())[:SINGLE]
    for _ in range(2):  # the first round compiles
        spent = []
        for name, history in chosen:
            begin = time.perf_counter()
            run.fold_in({name: history}).recommend(k=10)
            spent.append(time.perf_counter() - begin)

    view = folded.run.restored
    values = quality(view.score_users, view.scoring("test"), relevant, seen, run.dataset.n_items)
    speed = {
        "users/s": float(f"{len(histories) / seconds:.2g}"),
        "ms a user": round(1e3 * statistics.median(spent)),
    }
    return {**values, **speed}


def measure(config: FoldInConfig) -> list[dict[str, Any]]:
    """A row for each recommender and way."""
    import slgr_jax
    from slgr_jax import serving
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.evaluation.baselines import Popular

    dataset, out = dataset_lib.load(config.data), pathlib.Path(config.out)
    held = held_users(dataset, config)
    if not (out / "data").exists():
        write_without(dataset, held, out / "data")
    others = dataset_lib.load(out / "data")

    masked = ("train",) if config.part == "valid" else ("train", "valid")
    relevant = rows_of(dataset.positives((config.part,)), held)
    seen = rows_of(dataset.positives(masked), held)
    (popular,) = Popular().fit(others, [{}])
    rows: list[dict[str, Any]] = [
        {"recommender": "popular", **quality(*popular, relevant, seen, others.n_items)}
    ]
    histories = histories_of(dataset, held)
    for name in config.backbones.split(","):
        for users, data in (("trained", config.data), ("folded", str(out / "data"))):
            workdir = str(out / f"{name}-{users}")
            slgr_jax.train(data, workdir, backbone=name, **KNOBS[name])
            run = serving.load(workdir)
            if users == "trained":
                values = of_trained(run, held, relevant, seen)
            else:
                values = of_folded(run, histories, relevant, seen)
            rows.append({"recommender": name, "users": users, **values})
            print(rows[-1], flush=True)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    from slgr_jax.reports.tables import markdown_table

    columns = ("recommender", "users", *METRICS, "users/s", "ms a user")
    return markdown_table(rows, columns)


def main(_: list[str]) -> None:
    config = flags.section_from_flags(FoldInConfig)
    unknown = [name for name in config.backbones.split(",") if name not in KNOBS]
    if unknown:
        raise ConfigError(f"--backbones: {listing(unknown)} is not one of: {listing(KNOBS)}")
    text = render(measure(config))
    (pathlib.Path(config.out) / f"fold_in_{config.part}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[FoldInConfig], required=("data", "out"))
