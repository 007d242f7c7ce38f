"""Facebook Books, Last.fm and ml-latest-small as SisInfLab published them. See `raw.Raw`.

github.com/sisinflab/Recommender-ChatGPT ("Evaluating ChatGPT as a Recommender System", Di Palma et
al., arXiv 2309.03613), folders of data/dataset:

    facebook_book         trainingset.tsv, testset.tsv; books.tsv; MAPS/map.tsv, features_genres.tsv
    hetrec2011_lastfm_2k  splitting/0/train.tsv, test.tsv; artists.dat;
                          user_taggedartists.dat, tags.dat
    ml_small_2018         splitting/0/train.tsv, test.tsv, with times; movies.csv

The LLMs whose lists are beside them were shown a user's whole training part. So validation is half
of the authors' test part, user by user, and the other half is test (--valid_from=test).
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from slgr_jax.config import PrepareConfig
from slgr_jax.data import schema
from slgr_jax.data.ingest import movielens, tables, texts
from slgr_jax.data.ingest.archive import Files
from slgr_jax.data.ingest.delimited import DelimitedFile
from slgr_jax.data.ingest.raw import Piece, Raw, nothing
from slgr_jax.data.ingest.text_lines import Dialect
from slgr_jax.data.ingest.texts import Texts
from slgr_jax.errors import ConfigError, InputError, listing

_TRAIN = ("trainingset.tsv", "train.tsv")
_TEST = {"trainingset.tsv": "testset.tsv", "train.tsv": "test.tsv"}
_TABS = Dialect(delimiter="\t", quote="")
_GENRE = ("genre", "genres", "literaryGenre")  # the ends of DBpedia's names of the property
_MOST_TAGS = 8


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a data set's files hold.

    Attributes:
      columns: of the interactions' files, which have no header. A weight is not read: books have
        none, and those of Last.fm are logarithms of counts.
      items: file of the items' texts, and how it is read.
    """

    columns: tuple[str, ...]
    items: str
    texts: Callable[[Files, pathlib.PurePosixPath, PrepareConfig], Texts | None]


def interactions(config: PrepareConfig) -> Raw:
    """The training and test parts of the data set --name, with titles and genres or tags.

    Raises:
      InputError: the folder is not one of the three, or a file is damaged.
      ConfigError: another split, or parts from elsewhere.
    """
    if config.test_input or config.split not in ("auto", "premade"):
        flag = "--test_input" if config.test_input else f"--split={config.split}"
        raise ConfigError(
            f"{flag} is not used with --source=sisinf: the training part is the authors', which "
            "their LLMs were shown; --seed draws another half of their test part as validation"
        )
    files = Files(config.input)
    if files.single is not None:
        raise InputError(f"{config.input} is one file; --source=sisinf reads the clone's folder")
    train = files.choose(lambda n: n in _TRAIN, listing(_TRAIN), config.name)
    root = pathlib.PurePosixPath(train).parent
    if root.parts[-2:] == ("splitting", "0"):
        root = root.parent.parent
    layout = _layout_of(files, root)
    test = files.beside(train, _TEST[pathlib.PurePosixPath(train).name])
    if test is None:
        raise InputError(f"{files.where(train)} has no test part beside it")
    return Raw(
        tuple(
            _part(files, name, part, layout, config)
            for name, part in ((train, "train"), (test, "test"))
        ),
        (files,),
        lambda _: layout.texts(files, root, config),
        nothing,
        name=pathlib.Path(files.where(train)).resolve().parents[len(_below(train, root))].name,
    )


def _below(name: str, root: pathlib.PurePosixPath) -> tuple[str, ...]:
    """The folders between a file and the root of its data set."""
    return pathlib.PurePosixPath(name).relative_to(root).parts[:-1]


def _layout_of(files: Files, root: pathlib.PurePosixPath) -> _Layout:
    for layout in _LAYOUTS:
        if (root / layout.items).as_posix() in files.names:
            return layout
    known = listing([layout.items for layout in _LAYOUTS])
    raise InputError(f"{files.where(root.as_posix())} has none of: {known}")


def _part(files: Files, name: str, part: str, layout: _Layout, config: PrepareConfig) -> Piece:
    dialect = dataclasses.replace(_TABS, encoding=config.encoding)
    file = DelimitedFile(files, name, dialect, layout.columns)
    roles = {column: column for column in layout.columns if not column.startswith("_")}
    return Piece.of(file.read(roles, drop=tables.drops(config)), part, roles)


# --- texts of items --------------------------------------------------------------------------


def _books(files: Files, root: pathlib.PurePosixPath, config: PrepareConfig) -> Texts | None:
    """Titles, and the genres that DBpedia has."""
    names = _genre_names(files, root)
    genres = {
        item: [names[feature] for feature in features if feature in names]
        for item, *features in _fields(files, root / "MAPS" / "map.tsv")
    }
    return _titled(files, root / "books.tsv", ("item", "title"), genres, config)


def _genre_names(files: Files, root: pathlib.PurePosixPath) -> dict[str, str]:
    """Number of a feature -> genre: `12 <.../literaryGenre><.../Crime_fiction>`."""
    names = {}
    for feature, pair, *_ in _fields(files, root / "features_genres.tsv"):
        kind, _, value = pair.strip("<>").partition("><")
        if kind.rsplit("/", 1)[-1] in _GENRE:
            names[feature] = value.rsplit("/", 1)[-1].replace("_", " ")
    return names


def _artists(files: Files, root: pathlib.PurePosixPath, config: PrepareConfig) -> Texts | None:
    """Names, and the tags that most users gave, of equal ones the first given."""
    names = {tag: name for tag, name, *_ in _fields(files, root / "tags.dat")}
    given: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _, artist, tag, *_ in _fields(files, root / "user_taggedartists.dat"):
        given[artist][tag] += 1
    tags = {
        artist: [names[tag] for tag, _ in counts.most_common(_MOST_TAGS) if tag in names]
        for artist, counts in given.items()
    }
    return _titled(files, root / "artists.dat", None, tags, config)


def _movies(files: Files, root: pathlib.PurePosixPath, config: PrepareConfig) -> Texts | None:
    return movielens.movies_csv(files, (root / "movies.csv").as_posix(), config)


def _titled(
    files: Files,
    path: pathlib.PurePosixPath,
    names: Sequence[str] | None,
    categories: Mapping[str, Sequence[str]],
    config: PrepareConfig,
) -> Texts | None:
    """The item table of a file with ids and titles.

    Args:
      names: of its columns; None: it has a header, with id and name.
      categories: by item.
    """
    dialect = tables.dialect_of_texts(files, path.as_posix(), _TABS, config)
    file = DelimitedFile(files, path.as_posix(), dialect, names)
    wanted = {"item": "item", "title": "title"} if names else {"item": "id", "title": "name"}
    rows = file.read(wanted, drop=tables.drops(config), ids=(), is_log=False)
    cells = (rows.columns[role].to_pylist() for role in wanted)
    items = [
        {"item_id": item, "title": title, "categories": categories.get(item) or None}
        for item, title in zip(*cells, strict=True)
    ]
    return texts.beside(items, schema.ITEMS, rows.count)


def _fields(files: Files, path: pathlib.PurePosixPath) -> Iterator[list[str]]:
    """The tab-separated fields of a file that is small and may be missing."""
    if path.as_posix() in files.names:
        text, _ = files.text(path.as_posix())
        for line in text.splitlines():
            fields = line.split("\t")
            if len(fields) > 1:
                yield fields


_LAYOUTS = (
    _Layout(("user", "item", "_value"), "books.tsv", _books),
    _Layout(("user", "item", "_value"), "artists.dat", _artists),
    _Layout(("user", "item", "rating", "timestamp"), "movies.csv", _movies),
)
