"""Real interactions with real LLM answers, as a dataset directory with its teacher products.

    git clone https://github.com/sisinflab/Recommender-ChatGPT
    python benchmarks/quality/real_data.py --dataset=facebook_book --clone=Recommender-ChatGPT \\
        --out=DIR
    python benchmarks/quality/real_data.py --dataset=ml1m --out=DIR

DIR/data is the dataset, DIR/data/teacher/NAME its products. With --clone it is made from the files
as their authors publish them: `slgr prepare --source=sisinf`, `slgr teach import` of each LLM's
answers, `slgr teach combine` of all. Without, from what ../shared/data holds (its terms forbid
putting it into this repository), through DIR/raw with plain inputs of the same commands; the two
have the same split, and lists that differ where titles were matched by likeness.

What a teacher may have seen decides the split. The sisinf prompts hold the whole training part,
so a validation part carved out of it would have been shown to the LLM; the validation part is
half of the authors' test part instead, user by user, and the other half stays the test part.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slgr_jax.cli import flags
from slgr_jax.config import PrepareConfig
from slgr_jax.config.knobs import Section, knob
from slgr_jax.data.ingest.split import halves
from slgr_jax.errors import ConfigError, InputError, listing

SISINF = ("facebook_book", "hetrec2011_lastfm_2k", "ml_small_2018")
DATASETS = (*SISINF, "ml100k_lusifer", "ml1m", "ml1m_profiles")
USABLE = ("exact", "noyear", "fuzzy")  # how an LLM's title was found; the rest is not the catalogue


@dataclasses.dataclass(frozen=True)
class RealDataConfig(Section):
    """Which data set, from where, to where."""

    dataset: str = knob("", "data set to build", choices=("", *DATASETS))
    out: str = knob("", "folder for raw/ and data/; must not hold them yet")
    shared: str = knob("", "the folder with the data; default: shared/data beside the checkout")
    clone: str = knob(
        "",
        "in place of --shared: a clone of github.com/sisinflab/Recommender-ChatGPT, of "
        "facebook_book, hetrec2011_lastfm_2k or ml_small_2018",
    )
    seed: int = knob(0, "seed of the valid/test halves", minimum=0)


@dataclasses.dataclass(frozen=True)
class Product:
    """One teacher: rows of external ids and scores, and what is known about it."""

    rows: Any  # pa.Table: user, item, score
    built_from: str
    unlisted: str
    model: str
    score_kind: str


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A data set as the public commands take it."""

    interactions: Any  # pa.Table: user, item, split[, timestamp, rating]
    items: Any  # pa.Table: item, title, categories[, text]
    products: Mapping[str, Product]


def build(config: RealDataConfig) -> tuple[Any, dict[str, Any]]:
    """Write DIR/raw and DIR/data; returns the dataset manifest and a manifest per product."""
    import pyarrow.parquet as pq

    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.data.ingest import prepare
    from slgr_jax.teacher.products import preferences

    if config.clone:
        return _from_clone(config)
    inputs = read(config)
    raw = pathlib.Path(config.out) / "raw"
    try:
        raw.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(f"{raw} exists; choose another --out") from error
    pq.write_table(inputs.interactions, raw / "interactions.parquet")
    pq.write_table(inputs.items, raw / "items.parquet")
    for name, product in inputs.products.items():
        pq.write_table(product.rows, raw / f"teacher_{name}.parquet")
    prepared = prepare.prepare(
        PrepareConfig(
            source="parquet",
            input=str(raw / "interactions.parquet"),
            items_input=str(raw / "items.parquet"),
            out=str(pathlib.Path(config.out) / "data"),
            name=config.dataset,
            split="premade",
            split_column="split",
        )
    )
    data = dataset_lib.load(pathlib.Path(config.out) / "data")
    manifests = {}
    for name, product in inputs.products.items():
        manifests[name] = preferences.import_scores(
            data,
            raw / f"teacher_{name}.parquet",
            name,
            provenance=preferences.Provenance(
                built_from=product.built_from,
                unlisted=product.unlisted,
                model=product.model,
                score_kind=product.score_kind,
            ),
            unknown="drop",  # titles that an LLM named and that nobody interacted with
            keep_training_items=True,  # some of these teachers were asked about nothing else
        )
    return prepared, manifests


# Where a data set of the clone has the lists that an LLM wrote freely, a text file a user.
FREE_LISTS: Mapping[str, str] = {
    "gpt-3.5-turbo": "chat_gpt_output/checkpoints",
    "text-davinci-003": "text_davinci_output/EXP_1",
    "palm-2": "google_palm/EXP_1",
}


def _from_clone(config: RealDataConfig) -> tuple[Any, dict[str, Any]]:
    """`build`, from the files as their authors publish them; lists written freely alone."""
    from slgr_jax import api
    from slgr_jax.config import CombineConfig, TeachConfig
    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.teacher.products import combine

    if config.dataset not in SISINF or config.shared:
        other = "--shared" if config.shared else f"--dataset={config.dataset}"
        raise ConfigError(f"--clone does not go with {other}; it holds {listing(SISINF)}")
    data = str(pathlib.Path(config.out) / "data")
    prepared = api.prepare(
        source="sisinf", input=config.clone, name=config.dataset, out=data, seed=config.seed
    )
    folder = pathlib.Path(config.clone) / "data" / "dataset" / config.dataset
    manifests = {
        f"{llm}_free_top50": api.import_teacher(
            data,
            folder / answers,
            f"{llm}_free_top50",
            model=llm,
            items_as="titles",
            unlisted="below",
            keep_training_items=True,  # as LOG's products do
        )
        for llm, answers in FREE_LISTS.items()
    }
    manifests["all_free"] = combine.combine(
        dataset_lib.load(data),
        TeachConfig(data=data, name="all_free"),
        CombineConfig(names=",".join(manifests)),
    )
    return prepared, manifests


def read(config: RealDataConfig) -> Inputs:
    """The inputs of `config.dataset`; a missing folder is an `InputError`."""
    if config.dataset not in DATASETS:
        raise ConfigError(f"--dataset={config.dataset!r} is not one of: {listing(DATASETS)}")
    shared = pathlib.Path(config.shared) if config.shared else default_shared()
    readers: dict[str, tuple[str, Callable[[pathlib.Path, RealDataConfig], Inputs]]] = {
        "ml100k_lusifer": ("ml100k_lusifer", _lusifer),
        "ml1m": ("ml1m_llm_text", _ml1m),
        "ml1m_profiles": ("ml1m_llm_text", _ml1m_profiles),
        **dict.fromkeys(SISINF, ("sisinf_llm_recs", _sisinf)),
    }
    folder, reader = readers[config.dataset]
    if not (shared / folder / "interactions.parquet").is_file():
        raise InputError(
            f"{shared / folder} does not hold the data of {config.dataset}; give the folder that "
            "holds it with --shared"
        )
    return reader(shared / folder, config)


def default_shared() -> pathlib.Path:
    """shared/data beside the checkout."""
    return pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"


def _sisinf(folder: pathlib.Path, config: RealDataConfig) -> Inputs:
    """Ranked lists of three LLMs per user (sisinflab/Recommender-ChatGPT, titles re-matched)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    log = _only(_plain(folder / "interactions.parquet"), "dataset", config.dataset)
    log = log.filter(pc.not_equal(log["split"], "unused"))
    interactions = {
        "user": log["userId"],
        "item": log["itemId"],
        "split": _halve_test(log["split"].to_pylist(), log["userId"].to_numpy(), config.seed),
    }
    if config.dataset == "ml_small_2018":
        interactions |= {"timestamp": log["timestamp"], "rating": log["value"]}
    items = _only(_plain(folder / "items.parquet"), "dataset", config.dataset)
    tags = pc.replace_substring(items["tags"], "; ", "|")  # ml_small_2018 has | already
    return Inputs(
        pa.table(interactions),
        pa.table({"item": items["itemId"], "title": items["title"], "categories": tags}),
        _sisinf_products(folder, config.dataset),
    )


def _sisinf_products(folder: pathlib.Path, dataset: str) -> dict[str, Product]:
    """A product of each LLM and prompt, and the free lists of all LLMs as one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rankings = _only(_plain(folder / "llm_rankings.parquet"), "dataset", dataset)
    rankings = rankings.filter(pc.is_in(rankings["match"], pa.array(USABLE)))
    shown = _only(_plain(folder / "llm_candidates.parquet"), "dataset", dataset)

    products, free = {}, {}
    for llm in sorted(pc.unique(rankings["llm"]).to_pylist()):
        for exp in ("free_top50", "rerank_pop50", "rerank_userknn50"):
            ranked = _ranks(_only(_only(rankings, "llm", llm), "exp", exp))
            unlisted = "unknown"
            if exp == "free_top50":
                unlisted, free[llm] = "below", ranked
            else:
                ranked = _with_unanswered(ranked, _only(shown, "exp", exp), llm)
            user, item, rank = ranked
            products[f"{llm}_{exp}"] = Product(
                rows=_rows(user, item, 1 / np.log2(rank + 1)),
                built_from="train_only",
                unlisted=unlisted,
                model=llm,
                score_kind="1/log2(rank+1)",
            )
    products["all_free"] = _fused(free)
    return products


def _fused(free: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Product:
    """The free lists of several LLMs (user, item, rank) as one, by mean reciprocal rank."""
    from slgr_jax.teacher.products import combine

    users = np.arange(2 + max(int(user.max()) for user, _, _ in free.values()))
    lists = []
    for user, item, rank in free.values():
        order = np.lexsort((-rank, user))  # within a user the best last
        offsets = np.searchsorted(user, users)
        lists.append(combine.TeacherScores(offsets, item[order], -rank[order], below=True))
    fused = combine.fuse(lists, "reciprocal")
    return Product(
        rows=_rows(fused.users, fused.items, fused.scores),
        built_from="train_only",
        unlisted="below",
        model="mean of " + ", ".join(free),
        score_kind="mean 1/rank, 0 where an LLM does not list the item",
    )


def _lusifer(folder: pathlib.Path, config: RealDataConfig) -> Inputs:
    """GPT-4o-mini ratings of MovieLens-100K pairs, on the official u1 split.

    The profiles in the prompts come from the last 40 ratings of u1.base: the teacher never saw
    u1.test, but knows the answer of some training pairs it rates (includes_label). What it rates
    are the interactions themselves, so rated pairs of valid and test are left out: being listed
    would give them away.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    log = _plain(folder / "interactions.parquet")
    user, item = log["userId"].to_numpy(), log["movieId"].to_numpy()
    interactions = pa.table(
        {
            "user": user,
            "item": item,
            "split": _halve_test(log["split_u1"].to_pylist(), user, config.seed),
            "timestamp": log["timestamp"],
            "rating": log["rating"],
        }
    )
    items = _plain(folder / "items.parquet")
    titles = [
        f"{title} ({year})" if year else title
        for title, year in zip(
            items["movie_title"].to_pylist(), items["release_year"].to_pylist(), strict=True
        )
    ]
    table = {
        "item": items["movieId"],
        "title": titles,
        "text": items["overview"],
        "categories": pc.replace_substring(items["class"], " ", "|"),
    }
    train = log.filter(pc.equal(log["split_u1"], "train"))
    product = Product(
        _renamed(train, "llm_rating"), "includes_label", "unknown", "gpt-4o-mini", "rating 1-5"
    )
    return Inputs(interactions, pa.table(table), {"gpt4o_mini_rating": product})


def _ml1m(folder: pathlib.Path, config: RealDataConfig) -> Inputs:
    """Ratings of up to ten MovieLens-1M pairs per user by two LLMs.

    Nothing says which of a user's other interactions the rating prompts held, so any of them may
    have been shown. The rated pairs were not: they are what was asked. So of each user's rated
    pairs a quarter is valid, a quarter test, and the rest is training data, with the ratings as
    teacher; all other interactions are training data. This is not the authors' split.
    """
    import pyarrow as pa

    log = _plain(folder / "interactions.parquet")
    rated = _plain(folder / "llm_ratings_53k.parquet")
    user, item = log["userId"].to_numpy(), log["movieId"].to_numpy()
    keys = _keys(user, item)
    asked = np.isin(keys, _keys(rated["userId"].to_numpy(), rated["movieId"].to_numpy()))
    first = halves(user[asked], config.seed)  # one half: evaluation
    evaluated = np.flatnonzero(asked)[first]
    split = np.full(keys.size, "train", dtype=object)
    split[evaluated] = "test"
    split[evaluated[halves(user[evaluated], config.seed + 1)]] = "valid"
    hidden = np.isin(
        _keys(rated["userId"].to_numpy(), rated["movieId"].to_numpy()), keys[evaluated]
    )
    rated = rated.filter(pa.array(~hidden))
    products = {
        column: Product(_renamed(rated, column), "includes_label", "unknown", llm, "rating 1-5")
        for column, llm in (
            ("gpt4o_mini_rating", "gpt-4o-mini"),
            ("gemma3_4b_rating", "gemma3-4b"),
        )
    }
    interactions = pa.table({"user": user, "item": item, "split": pa.array(split, pa.string())})
    return Inputs(interactions, _ml1m_items(folder), products)


def _ml1m_profiles(folder: pathlib.Path, config: RealDataConfig) -> Inputs:
    """MovieLens-1M on the split that Qwen-max wrote the users' profiles for (GEAR-Rec).

    The prompts held training items only. What Qwen wrote becomes a teacher by vectors of the
    profiles and of its descriptions of the movies: `teach.py embed --vectors=ITEMS
    --user_vectors=USERS --built_from=train_only`, then `teach.py nearest --embeddings`.
    """
    import pyarrow as pa

    log = _plain(folder / "interactions.parquet")
    user = log["userId"].to_numpy()
    split = _halve_test(log["split"].to_pylist(), user, config.seed)
    interactions = pa.table({"user": user, "item": log["movieId"], "split": split})
    return Inputs(interactions, _ml1m_items(folder), {})


def _ml1m_items(folder: pathlib.Path) -> Any:
    """Titles, genres and Qwen's descriptions of the movies."""
    items = _plain(folder / "items.parquet")
    return items.select(["movieId", "title", "qwen_max_description", "genres"]).rename_columns(
        ["item", "title", "text", "categories"]
    )


def _plain(path: pathlib.Path) -> Any:
    """A Parquet file with dictionary columns as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    for k, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(k, field.name, table.column(k).cast(pa.string()))
    return table


def _only(table: Any, column: str, value: str) -> Any:
    import pyarrow.compute as pc

    return table.filter(pc.equal(table[column], value))


def _keys(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    return users.astype(np.int64) << 32 | items.astype(np.int64)


def _ranks(table: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and ranks 1, 2, ... after unusable and repeated titles are gone."""
    user, item = table["userId"].to_numpy(), table["itemId"].to_numpy()
    order = np.lexsort((table["rank"].to_numpy(), user))
    user, item = user[order], item[order]
    _, first = np.unique(_keys(user, item), return_index=True)
    keep = np.sort(first)
    user, item = user[keep], item[keep]
    starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    lengths = np.diff(np.append(starts, user.size))
    rank = np.arange(user.size) - np.repeat(starts, lengths) + 1
    return user, item, rank.astype(np.float64)


def _with_unanswered(
    ranked: tuple[np.ndarray, np.ndarray, np.ndarray], shown: Any, llm: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add candidates that were shown and not ranked, with rank NaN.

    Users whose candidates are not recorded are left out: nothing then tells the titles that were
    candidates from those the LLM copied out of the history in its prompt.
    """
    import pyarrow.compute as pc

    user, item, rank = ranked
    if pc.any(pc.equal(shown["llm"], "all")).as_py():  # one list for everybody
        candidates = shown["itemId"].to_numpy()
        owners = np.repeat(np.unique(user), candidates.size)
        candidates = np.tile(candidates, np.unique(user).size)
    else:
        shown = _only(shown, "llm", llm)
        owners, candidates = shown["userId"].to_numpy(), shown["itemId"].to_numpy()
    known = np.isin(_keys(user, item), _keys(owners, candidates))
    user, item, rank = user[known], item[known], rank[known]
    silent = ~np.isin(_keys(owners, candidates), _keys(user, item))
    return (
        np.concatenate([user, owners[silent]]),
        np.concatenate([item, candidates[silent]]),
        np.concatenate([rank, np.full(int(silent.sum()), np.nan)]),
    )


def _rows(user: np.ndarray, item: np.ndarray, score: np.ndarray) -> Any:
    import pyarrow as pa

    scores = pa.array(score.astype(np.float32), mask=np.isnan(score))
    return pa.table({"user": user, "item": item, "score": scores})


def _renamed(table: Any, column: str) -> Any:
    return table.select(["userId", "movieId", column]).rename_columns(["user", "item", "score"])


def _halve_test(parts: list[str], users: np.ndarray, seed: int) -> Any:
    import pyarrow as pa

    split = np.array(parts, dtype=object)
    test = np.flatnonzero(split == "test")
    split[test[halves(users[test], seed)]] = "valid"
    return pa.array(split, pa.string())


def main(_: list[str]) -> None:
    from slgr_jax.data.ingest import prepare
    from slgr_jax.teacher.products import preferences

    config = flags.section_from_flags(RealDataConfig)
    dataset, products = build(config)
    print(prepare.summary(dataset))
    for manifest in products.values():
        print(preferences.report(manifest))
    print(f"wrote {pathlib.Path(config.out) / 'data'}")


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[RealDataConfig], required=("dataset", "out"))
