"""Training rows with their labels, and what an LLM reasons about them: DATA/examples/NAME.

A row is (user, item, position): the item was shown after `position` of the user's training
interactions. Its label is read from the data, never from the file: 1 for a training interaction, 0
for an item that the user has in no part (with a threshold: by the rating of a training
interaction). An interaction of validation or test is refused: its reasoning has seen what is
evaluated. The rows are examples beside other rows (`models/backbones/in_context.py`).

Shape letters: m rows, R numbers of a reasoning.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from slgr_jax.config import ExampleFileConfig, TeachConfig
from slgr_jax.data import example_schema, schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError, ManifestError, ShardError, listing
from slgr_jax.sampling import labelled_rows
from slgr_jax.teacher.local import vector_files
from slgr_jax.teacher.products import answers, preferences
from slgr_jax.teacher.products.same_split import refuse_leak, refuse_other_split

PathLike = str | os.PathLike[str]

# Items of a history that a prompt shows, the latest.
_SHOWN = 20
_PROMPT = """A person chose these, the latest last:
{history}

Then the person was shown: {item}
The person {outcome} it.

Reason step by step from the history to why. Say what the person likes and dislikes, what the item
is, and how the two go together."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """A product in memory, by user, position and item.

    Attributes:
      manifest: what it is.
      users, items, positions: [m].
      clicked: [m] the labels, bool.
      reasoning: [m, R].
    """

    manifest: example_schema.ExampleManifest
    users: Int[np.ndarray, "m"]
    items: Int[np.ndarray, "m"]
    positions: Int[np.ndarray, "m"]
    clicked: np.ndarray
    reasoning: Float[np.ndarray, "m R"]


def product_path(data: PathLike, name: str) -> pathlib.Path:
    """DATA/examples/NAME; a name that is not one plain directory name is a `ConfigError`."""
    folder = pathlib.Path(data) / example_schema.EXAMPLES_DIR
    return folder / preferences.product_path(data, name).name


def make(
    dataset: Dataset,
    common: TeachConfig,
    options: ExampleFileConfig,
    *,
    built_from: str = "train_only",
    prompt_hash: str = "",
    unknown: str = "error",
) -> example_schema.ExampleManifest:
    """Write DATA/examples/NAME: of a file with reasoning, or of rows that are drawn, without.

    Args:
      built_from: what the file's reasoning saw, of `schema.BUILT_FROM`.
      unknown: rows with ids that the dataset lacks: error, or drop (and count).

    Raises:
      ManifestError: the file has seen evaluation data.
      InputError: it names rows that are no training rows, the same row twice, a vector that is not
        finite; or all labels are the same.
    """
    target = product_path(dataset.path, common.name)
    shards.check_target(target, overwrite=common.overwrite)
    if not options.file:
        drawn = draw(dataset, options)
        if options.prompts:
            write_prompts(dataset, drawn, pathlib.Path(options.prompts))
        return write(dataset, common, options.threshold, *drawn, np.zeros((len(drawn[0]), 0)))
    path = pathlib.Path(options.file)
    from_training = "have the LLM read training rows only, then make them again"
    refuse_leak(dataset, built_from, f"--examples={path}", from_training)
    raw, counts = _read(path, dataset, unknown)
    users, items, positions, reasoning = raw
    positions, clicked = _labelled(dataset, users, items, positions, options.threshold, path)
    stated = preferences.Provenance(
        built_from=built_from, model=common.model, prompt_hash=prompt_hash
    )
    rows = users, items, positions, clicked, reasoning
    return write(dataset, common, options.threshold, *rows, stated=stated, counts=counts)


def draw(
    dataset: Dataset, options: ExampleFileConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(users, items, positions, clicked) of a share of the training rows, a function of the seed.

    The rows are every training interaction and, without a threshold, as many items that its user
    has in no part (`labelled_rows.sampled_rows`).
    """
    if options.threshold:
        rows = labelled_rows.rated_rows(dataset, "train", threshold=options.threshold)
    else:
        rows = labelled_rows.sampled_rows(dataset, "train", min_history=0, seed=options.seed)
    count = max(1, round(options.share * len(rows)))
    rng = np.random.default_rng([options.seed, len(rows)])
    chosen = np.sort(rng.choice(len(rows), count, replace=False))
    return tuple(  # type: ignore[return-value]
        column[chosen] for column in (rows.users, rows.items, rows.as_of, rows.labels > 0)
    )


def write_prompts(
    dataset: Dataset,
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    path: pathlib.Path,
) -> None:
    """What to ask an LLM about rows, as Parquet: the history before each, its item and label."""
    if path.exists():
        raise InputError(f"--example_prompts={path} is there already; name another file")
    users, items, positions, clicked = drawn
    train, titles = dataset.train, _titles(dataset)
    begins = np.searchsorted(train.users, users)
    prompts = []
    for begin, item, position, liked in zip(begins, items, positions, clicked, strict=True):
        before = train.items[begin + max(0, position - _SHOWN) : begin + position]
        history = "\n".join(f"- {titles[place]}" for place in before) or "(nothing yet)"
        outcome = "chose" if liked else "did not choose"
        prompts.append(_PROMPT.format(history=history, item=titles[item], outcome=outcome))
    table = pa.table(
        {
            "user": dataset.user_ids.take(pa.array(users)),
            "item": dataset.items.column("item_id").take(pa.array(items)),
            "position": pa.array(positions, pa.int32()),
            "label": pa.array(clicked, pa.int8()),
            "prompt": prompts,
        }
    )
    pq.write_table(table, path)


def _titles(dataset: Dataset) -> list[str]:
    ids, titles = (dataset.items.column(name).to_pylist() for name in ("item_id", "title"))
    return [title or raw_id for raw_id, title in zip(ids, titles, strict=True)]


def _read(
    path: pathlib.Path, dataset: Dataset, unknown: str
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dict[str, int]]:
    """Users, items, positions (-1: not said) and vectors of the rows of a file that are known."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give Parquet or Arrow with user, item and vector")
    raw = shards.read_table(path)
    missing = {"user", "item", "vector"} - set(raw.column_names)
    if missing:
        raise InputError(
            f"{path} has columns {listing(raw.column_names)}; expected user, item, vector and "
            "perhaps position"
        )
    if not raw.num_rows or raw.column("vector").null_count:
        raise InputError(
            f"{path} has {raw.num_rows} rows, {raw.column('vector').null_count} of them without a "
            "vector; give a vector of each example"
        )
    texts = {name: answers.id_texts(raw.column(name), name, path) for name in ("user", "item")}
    counts: dict[str, int] = {}
    indices = answers.indices_of(texts, dataset)
    keep = answers.known_rows(texts, indices, dataset, path, unknown, counts)
    vectors = vector_files.vectors_of(raw.column("vector"), path)
    _refuse(~np.isfinite(vectors).all(axis=1), path, "has a vector that is not finite")
    positions = np.full(raw.num_rows, -1)
    if "position" in raw.column_names:
        said = answers.numbers_of(raw, "examples", "position", path)
        _refuse(~((said >= 0) & (said == np.floor(said))), path, "has no position from 0 on")
        positions = said.astype(np.int64)
    columns = (indices["user"], indices["item"], positions, vectors)
    users, items, positions, vectors = (column[keep] for column in columns)
    return (users, items, positions, vectors), counts


def _labelled(
    dataset: Dataset,
    users: np.ndarray,
    items: np.ndarray,
    positions: np.ndarray,
    threshold: float,
    path: pathlib.Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labels of rows, by the data.

    A row without a position is the user's latest training interaction with the item; one that is
    none stands after all of the user's training.
    """
    train, keys = dataset.train, _keys(dataset, users, items)
    trained = np.bincount(train.users, minlength=dataset.n_users)
    evaluated_parts = [dataset.part(part) for part in ("valid", "test")]
    evaluated = np.isin(
        keys,
        np.concatenate([_keys(dataset, part.users, part.items) for part in evaluated_parts]),
    )
    at = _latest(_keys(dataset, train.users, train.items), keys)
    begins = (np.cumsum(trained) - trained)[users]
    inside = (positions >= 0) & (positions < trained[users])
    named = begins + np.where(inside, positions, 0)
    exact = inside & (train.items[np.minimum(named, len(train) - 1)] == items)
    interaction = np.where(positions < 0, at >= 0, exact)
    at = np.where(exact, named, at)
    _refuse(
        ~interaction & evaluated,
        path,
        "is an interaction of validation or test: examples are training rows, and their labels are "
        "shown to the rows that are evaluated; leave it out",
    )
    _refuse(
        (positions > trained[users]) | (~interaction & (at >= 0)),
        path,
        "has a position at which the user's training has another item; positions count the user's "
        "training interactions before the row",
    )
    if threshold:
        if train.ratings is None:
            raise InputError(
                f"--liked_from={threshold:g}: {dataset.path} has no ratings; drop it, and what is "
                "no training interaction has label 0"
            )
        _refuse(~interaction, path, "is no training interaction, which --liked_from labels")
        clicked = train.ratings[at] >= threshold
    else:
        clicked = interaction
    places = np.where(interaction, dataset.moments("train")[at], positions)
    places = np.where(~interaction & (positions < 0), trained[users], places)
    return places.astype(np.int32), clicked


def _keys(dataset: Dataset, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    return users.astype(np.int64) * dataset.n_items + items


def _latest(held: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The last place of each wanted key among those that are held; -1 where it is not."""
    order = np.argsort(held, kind="stable")
    place = np.searchsorted(held[order], wanted, side="right") - 1
    found = order[np.maximum(place, 0)]
    return np.where((place >= 0) & (held[found] == wanted), found, -1)


def _refuse(bad: np.ndarray, path: pathlib.Path, what: str) -> None:
    if bad.any():
        row = int(np.argmax(bad)) + 1
        raise InputError(f"{path}: row {row} of {int(bad.sum())} such rows {what}")


def write(
    dataset: Dataset,
    common: TeachConfig,
    threshold: float,
    users: np.ndarray,
    items: np.ndarray,
    positions: np.ndarray,
    clicked: np.ndarray,
    reasoning: np.ndarray,
    *,
    stated: preferences.Provenance | None = None,
    counts: dict[str, int] | None = None,
) -> example_schema.ExampleManifest:
    """Write examples as a product; all or nothing. Arguments as of `Examples`, in any order.

    Args:
      threshold: from which rating on a label is 1; 0: of interactions.

    Raises:
      InputError: all labels are the same, or a row is there twice.
    """
    if clicked.all() or not clicked.any():
        raise InputError(
            f"{int(clicked.sum())} of {clicked.size} examples are clicked: a row is shown some of "
            "each label; give both (items that the user has in no part are not clicked)"
        )
    order = np.lexsort((items, positions, users))
    users, items, positions, clicked = (x[order] for x in (users, items, positions, clicked))
    same = [np.diff(column) == 0 for column in (users, positions, items)]
    if (again := np.logical_and.reduce(same)).any():
        row = int(np.argmax(again))
        raise InputError(
            f"user {dataset.user_ids[int(users[row])].as_py()!r} has item "
            f"{dataset.items.column('item_id')[int(items[row])].as_py()!r} twice at position "
            f"{positions[row]} ({int(again.sum())} such rows); keep one"
        )
    width = reasoning.shape[1]
    columns = {
        "user": pa.array(users, pa.int32()),
        "position": pa.array(positions, pa.int32()),
        "item": pa.array(items, pa.int32()),
        "label": pa.array(clicked, pa.int8()),
    }
    if width:
        flat = pa.array(reasoning[order].astype(np.float32).ravel())
        columns["reasoning"] = pa.FixedSizeListArray.from_arrays(flat, width)
    stated = stated or preferences.Provenance()
    facts = {"rows": users.size, "clicked": clicked.sum(), "users": np.unique(users).size}
    root = product_path(dataset.path, common.name)
    with shards.atomic_directory(root, overwrite=common.overwrite) as staging:
        table = pa.table(columns, schema=example_schema.examples(width))
        files = shards.write_shards(staging, "part", table, rows_per_shard=common.rows_per_shard)
        manifest = example_schema.ExampleManifest(
            name=common.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            dataset=dataset.manifest.name,
            id_map_hash=dataset.manifest.id_map_hash,
            split_hash=dataset.manifest.split_hash,
            built_from=stated.built_from,
            model=stated.model,
            prompt_hash=stated.prompt_hash,
            width=width,
            threshold=float(threshold),
            counts={**{name: int(count) for name, count in facts.items()}, **(counts or {})},
            files={"examples": files},
        )
        return schema.write_manifest(staging, manifest)


def read_manifest(dataset: Dataset, name: str) -> example_schema.ExampleManifest:
    """What DATA/examples/NAME is.

    Raises:
      ManifestError: no such product, made for another split or id map, or it has seen evaluation
        data.
    """
    root = product_path(dataset.path, name)
    if not (root / schema.MANIFEST).is_file():
        held = sorted(path.parent.name for path in root.parent.glob(f"*/{schema.MANIFEST}"))
        raise ManifestError(
            f"{dataset.path} has no examples {name!r}; it has: {listing(held)}; make them with "
            f"slgr teach examples --data={dataset.path} --name={name} --examples=FILE"
        )
    manifest = example_schema.read_example_manifest(root)
    fix = "make them again (slgr teach examples --overwrite)"
    refuse_other_split(dataset, manifest, f"the examples {name!r}", fix)
    from_training = "have the LLM read training rows only, then make them again"
    refuse_leak(dataset, manifest.built_from, f"the product of examples {name!r}", from_training)
    return manifest


def load(dataset: Dataset, name: str, *, verify: bool = True) -> Examples:
    """Read DATA/examples/NAME, or refuse it.

    Args:
      verify: also compare each shard's SHA-256.

    Raises:
      ManifestError: as `read_manifest`.
      ShardError: a shard is missing, truncated or corrupt, or a label is not that of the data.
    """
    manifest, root = read_manifest(dataset, name), product_path(dataset.path, name)
    kind = example_schema.examples(manifest.width)
    table = shards.read_shards(root, manifest.files["examples"], kind, verify=verify)
    names = ("user", "item", "position", "label")
    users, items, positions, labels = (table.column(column).to_numpy() for column in names)
    inside = (users >= 0) & (users < dataset.n_users) & (items >= 0) & (items < dataset.n_items)
    holds = bool(inside.all()) and len(users) > 0
    if holds:
        said = _labelled(dataset, users, items, positions, manifest.threshold, root)
        holds = bool((said[0] == positions).all() and (said[1] == (labels == 1)).all())
    if not holds:
        raise ShardError(
            f"{root}: it says of some row what {dataset.path} does not; make it again (slgr teach "
            "examples --overwrite)"
        )
    reasoning = np.zeros((len(users), 0), np.float32)
    if manifest.width:
        reasoning = vector_files.vectors_of(table.column("reasoning"), root)
    return Examples(manifest, users, items, positions, labels == 1, reasoning)


def report(examples: Examples) -> str:
    """A few lines for people: what the product is and covers."""
    manifest, counts = examples.manifest, examples.manifest.counts
    by = f" by {manifest.model}" if manifest.model else ""
    label = f"rated from {manifest.threshold:g}" if manifest.threshold else "interactions"
    reasoning = f"reasoning of {manifest.width} numbers" if manifest.width else "no reasoning"
    lines = [
        f"examples {manifest.name}{by}, for {manifest.dataset} split {manifest.split_hash[:8]}",
        f"  {counts['rows']:,} training rows of {counts['users']:,} users, {counts['clicked']:,} "
        f"clicked ({label}); {reasoning}; built_from={manifest.built_from}",
    ]
    dropped = {k: v for k, v in counts.items() if v and k.startswith("dropped_")}
    if dropped:
        lines.append("  " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in dropped.items()))
    return "\n".join(lines)
