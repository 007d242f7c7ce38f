"""Recommender-ChatGPT's folders: the authors' parts, halves, genres and tags; the real files."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset
from slgr_jax.data.ingest import prepare, sources, split
from slgr_jax.errors import ConfigError, InputError

SHARED = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "sisinf_llm_recs"
# User 10 sorts before 9 as text, and after it as a number.
TRAIN = {9: (1, 2, 3), 10: (2, 3), 11: (1, 4)}
TEST = {9: (4, 5, 6, 7), 10: (1, 4), 11: (2,)}


def lines(parts: dict[int, tuple[int, ...]], *more: str) -> str:
    return "".join("\t".join((f"{u}", f"{i}", "1.0", *more)) + "\n"
                   for u, items in parts.items() for i in items)  # fmt: skip


def clone(root: pathlib.Path) -> pathlib.Path:
    """A tiny clone: three data sets, and what else lies there."""
    data = root / "data" / "dataset"
    book, music, movie = (data / d for d in ("facebook_book", "hetrec2011_lastfm_2k", "ml_small"))
    for folder in (book / "MAPS", music / "splitting" / "0", movie / "splitting" / "0"):
        folder.mkdir(parents=True)
    (root / "README.md").write_text("not read\n")
    (book / "trainingset.tsv").write_text(lines(TRAIN))
    (book / "testset.tsv").write_text(lines(TEST))
    (book / "books.tsv").write_text("1\tDune (novel)\n2\tEmma\n9\tNobody read it\n")
    (book / "MAPS" / "map.tsv").write_text("1\t0\t5\t7\n2\t7\n")
    (book / "features_genres.tsv").write_text(
        "0\t<http://dbpedia.org/property/genre><http://dbpedia.org/resource/Science_fiction>\n"
        "5\t<http://dbpedia.org/ontology/wikiPageWikiLink><http://dbpedia.org/resource/Drama>\n"
    )
    (music / "splitting" / "0" / "train.tsv").write_text(lines(TRAIN))
    (music / "splitting" / "0" / "test.tsv").write_text(lines(TEST))
    (music / "artists.dat").write_text("id\tname\turl\n1\tABBA\tx\n4\tBeyoncé\tx\n")
    (music / "tags.dat").write_bytes(
        "tagID\ttagValue\n7\tpop\n8\tdisco\n9\tyé-yé\n".encode("cp1252")
    )
    (music / "user_taggedartists.dat").write_text(
        "userID\tartistID\ttagID\tday\tmonth\tyear\n"
        "9\t1\t7\t1\t1\t2009\n9\t1\t8\t1\t1\t2009\n10\t1\t8\t1\t1\t2009\n10\t4\t9\t1\t1\t2009\n"
    )
    (movie / "splitting" / "0" / "train.tsv").write_text(lines(TRAIN, "964982703"))
    (movie / "splitting" / "0" / "test.tsv").write_text(lines(TEST, "964982704"))
    (movie / "movies.csv").write_text('movieId,title,genres\n1,"Kid, The (1921)",Comedy|Drama\n')
    return root


def config(path: pathlib.Path, **more: object) -> PrepareConfig:
    options: dict[str, object] = {"out": "unused", **more}
    return PrepareConfig(source="sisinf", input=str(path), **options)  # type: ignore[arg-type]


def prepared(path: pathlib.Path, out: pathlib.Path, **more: object) -> dataset.Dataset:
    prepare.prepare(config(path, out=str(out), **more))
    return dataset.load(out)


def pairs(data: dataset.Dataset, part: str) -> set[tuple[int, int]]:
    users, items = (ids.cast("int64").to_numpy()
                    for ids in (data.user_ids, data.items["item_id"].combine_chunks()))  # fmt: skip
    of_part = data.part(part)
    return set(zip(users[of_part.users].tolist(), items[of_part.items].tolist(), strict=True))


def as_pairs(parts: dict[int, tuple[int, ...]]) -> set[tuple[int, int]]:
    return {(user, item) for user, items in parts.items() for item in items}


@pytest.mark.parametrize("name", ["facebook_book", "hetrec2011_lastfm_2k", "ml_small"])
def test_training_is_the_authors_and_test_is_halved(tmp_path: pathlib.Path, name: str) -> None:
    data = prepared(clone(tmp_path / "clone"), tmp_path / "out", name=name, seed=3)
    assert data.manifest.name == name
    assert pairs(data, "train") == as_pairs(TRAIN)
    # The halves are drawn over users in the order of their numbers.
    users = np.repeat(list(TEST), [len(items) for items in TEST.values()])
    items = np.concatenate([np.array(items) for items in TEST.values()])
    half = split.halves(users, 3)
    expected = set(zip(users[half].tolist(), items[half].tolist(), strict=True))
    assert pairs(data, "valid") == expected
    assert pairs(data, "test") == as_pairs(TEST) - expected
    assert data.manifest.split["valid"] == "half of each user's test rows"
    assert data.manifest.split["seed"] == 3


def texts(data: dataset.Dataset) -> dict[str, tuple[str, list[str]]]:
    columns = (data.items[name].to_pylist() for name in ("item_id", "title", "categories"))
    return {item: (title, tags) for item, title, tags in zip(*columns, strict=True) if title}


def test_genres_and_tags(tmp_path: pathlib.Path) -> None:
    root = clone(tmp_path / "clone")
    book = prepared(root, tmp_path / "book", name="facebook_book")
    # Only features that are genres: not what a page links to.
    assert texts(book) == {"1": ("Dune (novel)", ["Science fiction"]), "2": ("Emma", None)}
    music = prepared(root, tmp_path / "music", name="hetrec2011_lastfm_2k")
    # Tags by how many gave them.
    assert texts(music) == {"1": ("ABBA", ["disco", "pop"]), "4": ("Beyoncé", ["yé-yé"])}
    names = {entry["name"] for entry in music.manifest.source["files"]}
    assert names == {"train.tsv", "test.tsv", "artists.dat", "tags.dat", "user_taggedartists.dat"}
    movie = prepared(root, tmp_path / "movie", name="ml_small")
    assert texts(movie) == {"1": ("Kid, The (1921)", ["Comedy", "Drama"])}
    assert movie.train.timestamps is not None
    assert movie.train.ratings is not None
    assert book.train.ratings is None


def test_the_folder_of_a_data_set_will_do(tmp_path: pathlib.Path) -> None:
    folder = clone(tmp_path) / "data" / "dataset" / "ml_small"
    assert sources.read(config(folder)).name == "ml_small"


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({}, InputError, "holds 3 candidates"),
        ({"name": "ml_small", "split": "ratio"}, ConfigError, "--split=ratio is not used"),
        ({"name": "ml_small", "items_input": "x"}, ConfigError, "--items_input is not used"),
        ({"name": "ml_small", "split_column": "x"}, ConfigError, "--split_column is not used"),
    ],
)
def test_refusals(
    tmp_path: pathlib.Path, more: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        prepare.prepare(config(clone(tmp_path), **more))


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    folder = clone(tmp_path) / "data" / "dataset" / "facebook_book"
    with pytest.raises(InputError, match="is one file"):
        sources.read(config(folder / "books.tsv"))
    (folder / "testset.tsv").unlink()
    with pytest.raises(InputError, match="has no test part beside it"):
        sources.read(config(folder))
    (folder / "books.tsv").unlink()
    with pytest.raises(InputError, match=r"none of: books\.tsv, artists\.dat, movies\.csv"):
        sources.read(config(folder))


@pytest.mark.skipif(
    not (SHARED / "interactions.parquet").is_file(),
    reason="shared/data/sisinf_llm_recs is not beside the checkout",
)
@pytest.mark.parametrize("name", ["facebook_book", "hetrec2011_lastfm_2k", "ml_small_2018"])
def test_real_rows_in_their_original_layout(tmp_path: pathlib.Path, name: str) -> None:
    """The converted tables written back as the repository has them: the same split as LOG's."""
    log = pq.read_table(SHARED / "interactions.parquet")
    log = log.filter(pc.equal(log["dataset"].cast("string"), name))
    items = {"facebook_book": "books.tsv", "ml_small_2018": "movies.csv"}.get(name, "artists.dat")
    folder = tmp_path / name
    parts = folder if name == "facebook_book" else folder / "splitting" / "0"
    parts.mkdir(parents=True)
    header = {"movies.csv": "movieId,title,genres\n", "artists.dat": "id\tname\n"}.get(items, "")
    item = log["itemId"][0].as_py()
    (folder / items).write_text(header + (f"{item},x,\n" if "," in header else f"{item}\tx\n"))
    for part in ("train", "test"):
        rows = log.filter(pc.equal(log["split"].cast("string"), part)).to_pylist()
        more = [row["timestamp"] for row in rows] if name == "ml_small_2018" else None
        text = "".join(
            f"{row['userId']}\t{row['itemId']}\t{row['value']}"
            + (f"\t{more[k]}\n" if more else "\n")
            for k, row in enumerate(rows)
        )
        stem = {"train": "trainingset", "test": "testset"}[part] if parts == folder else part
        (parts / f"{stem}.tsv").write_text(text)
    data = prepared(folder, tmp_path / "out")
    assert data.manifest.split_hash.startswith(_SPLITS[name])


# Of the splits that LOG's numbers are of (benchmarks/results/audit_*.json).
_SPLITS = {
    "facebook_book": "16cb9fa2a5ef",
    "hetrec2011_lastfm_2k": "77806f861880",
    "ml_small_2018": "601f8f278f8c",
}
