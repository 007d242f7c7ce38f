"""Features from raw files: kinds, vocabularies, missing and unknown values, refusals."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax.config import PrepareConfig
from slgr_jax.data import dataset as dataset_lib
from slgr_jax.data import features as features_lib
from slgr_jax.data.dataset import Dataset
from slgr_jax.data.ingest import feature_columns, prepare
from slgr_jax.data.ingest.feature_columns import Declared
from slgr_jax.errors import ConfigError, InputError, ShardError

# u4 and d are in the test part alone.
TRAIN = "user,item\nu1,a\nu1,b\nu2,a\nu3,b\nu2,c\nu3,c\n"
VALID = "user,item\nu1,c\n"
TEST = "user,item\nu4,a\nu2,d\n"
USERS = "user,age,gender,tags,text\nu1,10,m,x|y|x,hi\nu2,20,f,y,\nu4,99,d,x|zz,bye\nu9,7,q,w,no\n"
ITEMS = "item,title,year,kind,code\na,A,1990,k1,1\nb,B,2000,k2,2\nc,C,,k1,3\nd,D,2010,k3,1\n"
DECLARED = {"user_features": "age:numeric,gender,tags:multi", "item_features": "year:numeric,kind"}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    texts = {"train": TRAIN, "valid": VALID, "test": TEST, "users": USERS, "items": ITEMS}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def prepared(folder: pathlib.Path, out: str = "out", **more: object) -> Dataset:
    files = {
        knob: str(folder / f"{name}.csv")
        for knob, name in (
            ("input", "train"),
            ("valid_input", "valid"),
            ("test_input", "test"),
            ("users_input", "users"),
            ("items_input", "items"),
        )
    }
    values = {"source": "csv", "out": str(folder / out), **files, **more}
    prepare.prepare(PrepareConfig(**values))  # type: ignore[arg-type]
    return dataset_lib.load(folder / out)


def by_name(data: Dataset) -> dict[str, features_lib.Feature]:
    return {feature.name: feature for feature in data.known_features}


def test_values_of_training_users_are_the_vocabulary(folder: pathlib.Path) -> None:
    features = by_name(prepared(folder, **DECLARED))
    assert list(features) == ["age", "gender", "tags", "year", "kind"]
    # u1, u2, u3 (in no row of the table), u4 (unknown: nobody in training has d, zz).
    assert features["gender"].values == ("f", "m")
    assert features["gender"].column.to_pylist() == [1, 0, None, None]
    assert features["tags"].values == ("x", "y")
    assert features["tags"].column.to_pylist() == [[0, 1], [1], None, [0]]
    assert features["kind"].values == ("k1", "k2")
    assert features["kind"].column.to_pylist() == [0, 1, 0, None]
    assert [features[name].missing for name in ("age", "gender", "kind")] == [1, 2, 1]


def test_numbers_are_standardised_by_training_users(folder: pathlib.Path) -> None:
    features = by_name(prepared(folder, **DECLARED))
    age, year = features["age"], features["year"]
    assert (age.mean, age.deviation) == (15.0, 5.0)  # of 10 and 20
    np.testing.assert_allclose(age.standardised(), [-1, 1, np.nan, 84 / 5])
    assert (year.mean, year.deviation) == (1995.0, 5.0)  # of a and b: c has none, d is in no row
    np.testing.assert_allclose(year.standardised(), [-1, 1, np.nan, 3])
    same = features_lib.numeric("n", "user", np.full(3, 7.0), np.ones(3, bool))
    np.testing.assert_array_equal(same.standardised(), np.zeros(3))


def test_features_decide_neither_split_nor_ids(folder: pathlib.Path) -> None:
    plain, rich = prepared(folder), prepared(folder, "rich", **DECLARED)
    assert plain.features == ()
    for name in ("split_hash", "id_map_hash"):
        assert getattr(plain.manifest, name) == getattr(rich.manifest, name)
    assert features_lib.digest(plain.features) == ""
    one = prepared(folder, "one", **DECLARED | {"item_features": "year:categorical,kind"})
    assert features_lib.digest(one.features) != features_lib.digest(rich.features)
    again = prepared(folder, "again", **DECLARED)
    assert features_lib.digest(again.features) == features_lib.digest(rich.features)


def test_the_user_table_gives_texts_too(folder: pathlib.Path) -> None:
    prepared(folder)
    users = pa.ipc.open_file(str(folder / "out" / "users-00000-of-00001.arrow")).read_all()
    assert users["text"].to_pylist() == ["hi", None, None, "bye"]


def test_damaged_features_are_refused(folder: pathlib.Path) -> None:
    prepared(folder, **DECLARED)
    path = folder / "out" / "user_features-00000-of-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="user_features-00000"):
        dataset_lib.load(folder / "out")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"user_features": "sex"}, "no column sex; columns found: user, age, gender, tags, text"),
        ({"user_features": "age"}, "say age:numeric or age:categorical"),
        ({"item_features": "code"}, "say code:numeric or code:categorical"),
        ({"user_features": "gender:numeric"}, "'m' of id 'u1' is no finite number"),
        ({"user_features": "age:number"}, "kinds are categorical, multi, numeric"),
        ({"user_features": "age:numeric(;)"}, "is not NAME, NAME:KIND"),
        ({"user_features": "gender,gender"}, "names gender more than once"),
        ({"user_features": "gender", "users_input": ""}, "add --users_input=FILE"),
        ({"item_features": "kind", "items_input": ""}, "add --items_input=FILE"),
        ({"source": "amazon", "item_features": "kind"}, "not used with --source=amazon"),
        ({"source": "movielens", "items_input": ""}, "--users_input is not used with"),
        ({"user_column": "gender", "user_features": "age:numeric"}, "has no column gender"),
    ],
)
def test_refusals(folder: pathlib.Path, knobs: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message.replace("(", r"\(")):
        prepared(folder, **knobs)
    assert not (folder / "out").exists()


def test_an_item_feature_called_categories_is_refused(folder: pathlib.Path) -> None:
    (folder / "items.csv").write_text(ITEMS.replace("kind", "categories"))
    with pytest.raises(InputError, match="may not be called categories"):
        prepared(folder, item_features="categories:multi")
    assert by_name(prepared(folder))["categories"].kind == "multi"


def test_a_table_of_other_users_is_refused(folder: pathlib.Path) -> None:
    (folder / "users.csv").write_text(USERS.replace("\nu", "\nU"))
    with pytest.raises(InputError, match=r"no user of the interactions is in .*'u1'.*'U1'"):
        prepared(folder, user_features="gender")


def test_infinite_and_missing_numbers(folder: pathlib.Path) -> None:
    (folder / "users.csv").write_text("user,age\nu1, 10 \nu2,\nu3,nan\nu4,5\n")
    assert np.isnan(by_name(prepared(folder, user_features="age:numeric"))["age"].standardised())[
        1:3
    ].all()
    (folder / "users.csv").write_text("user,age\nu1,inf\n")
    with pytest.raises(InputError, match="'inf' of id 'u1' is no finite number"):
        prepared(folder, "again", user_features="age:numeric")


def test_kinds_of_typed_columns(folder: pathlib.Path) -> None:
    columns = {
        "user": ["u1", "u2", "u4"],
        "height": [1.5, None, 2.5],
        "tags": [["x", "y"], [], None],
        "vip": [True, False, None],
        "code": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), folder / "users.parquet")
    table = {"users_input": str(folder / "users.parquet")}
    features = by_name(prepared(folder, **table, user_features="height,tags,vip,code:categorical"))
    kinds = {name: feature.kind for name, feature in features.items()}
    assert kinds == {"height": "numeric", "tags": "multi", "vip": "categorical",
                     "code": "categorical"}  # fmt: skip
    assert features["tags"].column.to_pylist() == [[0, 1], None, None, None]
    assert features["vip"].values == ("false", "true")
    for declared, message in (("code", "code:numeric"), ("tags:numeric", "must be numbers"),
                              ("height:categorical", "no exact text"),
                              ("tags:categorical", "say NAME:multi")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            prepared(folder, "no", **table, user_features=declared)


def test_a_recbole_header_types_its_fields(tmp_path: pathlib.Path) -> None:
    inter = "user_id:token\titem_id:token\ttimestamp:float\n"
    inter += "".join(f"u{k % 3}\ti{k % 4}\t{k}\n" for k in range(12))
    (tmp_path / "x.inter").write_text(inter)
    (tmp_path / "x.user").write_text(
        "user_id:token\tage:float\tjob:token\tzip_code:token\tv:float_seq\n"
        "u0\t30\tdoctor\t123\t1 2\nu1\t40\t\t456\t3 4\n"
    )
    (tmp_path / "x.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tcast:token_seq\n"
        "i0\tOne Two\t1990\tDrama War\tann bob\ni1\tTwo\t1991\tWar\tbob\n"
    )

    def read(out: str, **more: object) -> dict[str, features_lib.Feature]:
        values = {"source": "recbole", "input": str(tmp_path), "out": str(tmp_path / out), **more}
        prepare.prepare(PrepareConfig(split="ratio", **values))  # type: ignore[arg-type]
        return by_name(dataset_lib.load(tmp_path / out))

    features = read("out")
    kinds = {name: feature.kind for name, feature in features.items()}
    assert kinds == {
        "age": "numeric", "job": "categorical", "release_year": "categorical", "cast": "multi",
        "categories": "multi",
    }  # fmt: skip
    assert features["cast"].values == ("ann", "bob")
    assert features["job"].column.to_pylist() == [0, None, None]
    named = read("named", user_features="age:categorical,zip_code", item_features="none")
    assert {name: f.kind for name, f in named.items() if f.side == "user"} == {
        "age": "categorical", "zip_code": "categorical",
    }  # fmt: skip
    assert [name for name, f in named.items() if f.side == "item"] == ["categories"]
    with pytest.raises(InputError, match="column v is float_seq"):
        read("no", user_features="v")
    with pytest.raises(InputError, match="no column sex; columns found: age, job"):
        read("no", user_features="sex")


def test_movielens_users(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        log = "".join(f"{1 + k % 3}\t{1 + k % 4}\t5\t{k}\n" for k in range(12))
        archive.writestr("ml/u.data", log)
        archive.writestr("ml/u.user", "1|24|M|artist|x\n2|53|F|other|y\n3|24|M|artist|z\n")
    config = PrepareConfig(
        source="movielens", input=str(tmp_path / "ml.zip"), out=str(tmp_path / "out"), split="ratio"
    )
    prepare.prepare(config)
    features = by_name(dataset_lib.load(tmp_path / "out"))
    assert {name: f.kind for name, f in features.items()} == {
        "age": "numeric", "gender": "categorical", "occupation": "categorical",
    }  # fmt: skip
    assert features["age"].column.to_pylist() == [24, 53, 24]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("none", ()),
        ("a", (Declared("a"),)),
        ("a b:multi(,), c :numeric", (Declared("a b", "multi", ","), Declared("c", "numeric"))),
        ("t:multi(||)", (Declared("t", "multi", "||"),)),
    ],
)
def test_what_a_flag_names(text: str, expected: tuple[Declared, ...] | None) -> None:
    assert feature_columns.declared(text, "user_features") == expected


def test_a_table_of_nobody_has_no_features(tmp_path):
    (tmp_path / "in").mkdir()
    rows = "".join(f"u{k % 3}\ti{k % 4}\t{k}\n" for k in range(12))
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (tmp_path / "in" / "x.inter").write_text(header + rows)
    (tmp_path / "in" / "x.user").write_text("user_id:token\tage:float\n")
    places = {"input": str(tmp_path / "in"), "out": str(tmp_path / "out")}
    prepare.prepare(PrepareConfig(source="recbole", **places))
    assert dataset_lib.load(tmp_path / "out").features == ()
