"""Recommendations against evaluation's ranks and a plain recomputation, and as files."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

import slgr_jax as sl
from slgr_jax.errors import InputError, UserError
from slgr_jax.evaluation import device_ranking, device_scoring, full_ranking
from slgr_jax.serving import recommendation_files

N_USERS, N_ITEMS = 24, 30


def _expected(run, user: str, k: int, hidden: set[str]) -> list[str]:
    """The k best items by score that are not hidden; ties by index."""
    ids = [f"i{i}" for i in range(N_ITEMS)]
    scores = run.scores([user] * N_ITEMS, ids)
    best = [ids[i] for i in np.argsort(-scores, kind="stable")]
    return [item for item in best if item not in hidden][:k]


def _seen(run, user: str) -> set[str]:
    return {f"i{i}" for i in run.seen.row(int(user[1:]))}


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", "sasrec", "deepfm"])
def test_the_place_of_a_test_item_is_its_rank_in_evaluation(trained, backbone):
    run = trained(backbone)
    relevant = run.dataset.positives(("test",))
    scoring = run.restored.scoring("test")
    ranking = full_ranking.rank(
        run.score_users, scoring, relevant, run.seen, N_ITEMS, mesh=run.restored.mesh
    )
    top = run.recommender(k=N_ITEMS).top(ranking.users)
    assert ranking.items.size > 40
    for row, item, rank in zip(ranking.rows, ranking.items, ranking.ranks, strict=True):
        assert top.items[row][rank - 1] == item


def test_one_program_answers_any_number_of_users(trained):
    recommender = trained("mf").recommender(k=3, batch_users=8)
    assert recommender.batch_users == 8
    everybody = recommender.top(np.arange(N_USERS, dtype=np.int32))
    programs = (device_scoring.score_chunk, device_ranking.rank_chunk)
    before = [program._cache_size() for program in programs]
    for size in (1, 2, 7, 8, 9, 20):
        users = np.arange(size, dtype=np.int32)[::-1]
        np.testing.assert_array_equal(recommender.top(users).items, everybody.items[users])
    assert [program._cache_size() for program in programs] == before
    assert recommender.top(np.zeros(0, np.int32)).items.shape == (0, 3)


def test_filters_leave_what_they_say(trained):
    run, users = trained("mf"), ["u3", "u17", "u5"]
    allow, deny = [f"i{i}" for i in range(20)], ["i2", "i3", "i25"]
    listed = run.recommend(users, 30, allow=allow, deny=deny)
    for user, items, scores in zip(users, listed.items, listed.scores, strict=True):
        left = [item for item in items if item]
        hidden = _seen(run, user) | (set(map("i{}".format, range(N_ITEMS))) - set(allow)) | {*deny}
        assert left == _expected(run, user, 30, hidden)
        assert len(left) < 30
        assert np.isneginf(scores[len(left) :]).all()
        assert np.isfinite(scores[: len(left)]).all()

    # By user: an allow list is all that a user may get, a deny list is in addition to others.
    own = run.recommend(
        users, 5, mask_seen=False, allow={"u3": ["i4", "i9"], "u5": ["i1"]}, deny={"u3": ["i9"]}
    )
    assert own.items == [["i4", *[None] * 4], [None] * 5, ["i1", *[None] * 4]]

    # Of one call, within what the recommender lists at all.
    recommender = run.recommender(k=4, allow=allow)
    narrowed = recommender.recommend(["u3"], deny=["i2"], allow=["i2", "i5", "i28"])
    assert [item for item in narrowed.items[0] if item] == (
        ["i5"] if "i5" not in _seen(run, "u3") else []
    )
    assert recommender.recommend(["u3"]).items == run.recommend(["u3"], 4, allow=allow).items


def _table(path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    if path.suffix == ".csv":
        return pacsv.read_csv(path).cast(recommendation_files.SCHEMA)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pa.Table.from_pylist(rows, recommendation_files.SCHEMA)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_files_hold_the_lists_in_long_form(trained, tmp_path, monkeypatch, ending):
    run, out = trained("mf"), tmp_path / f"lists{ending}"
    monkeypatch.setattr(recommendation_files, "ROWS", 1)  # a block is what the program lists
    monkeypatch.setattr(recommendation_files, "BATCH", 8)
    written = sl.recommend(run.workdir, "all", out, k=25)
    listed = run.recommend(k=25)
    rows = [
        (user, item, rank + 1, score)
        for user, items, scores in zip(*listed, strict=True)
        for rank, (item, score) in enumerate(zip(items, scores, strict=True))
        if item is not None
    ]
    table = _table(out)
    assert table.schema == recommendation_files.SCHEMA
    assert list(zip(*table.select([0, 1, 2]).to_pydict().values(), strict=True)) == [
        row[:3] for row in rows
    ]
    scores = [row[3] for row in rows]  # float32, some near 0
    np.testing.assert_allclose(table["score"].to_numpy(), scores, rtol=1e-6, atol=1e-8)

    short = sum(None in items for items in listed.items)
    assert (written.users, written.rows, written.short) == (N_USERS, len(rows), short)
    assert str(written) == (
        f"wrote {out}: 24 users, {len(rows)} rows; {short} of them have fewer than 25 items left"
    )
    with pytest.raises(InputError, match=r"exists; choose another path or add --overwrite"):
        sl.recommend(run.workdir, "all", out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_any_text_is_an_id(tmp_path):
    odd = ['a"b', "c,d", "e\nf", "ü\\", "\t"]
    columns = [odd, odd, range(5), [0.5, 1e-9, -2.0, 3e20, 0.0]]
    schema = recommendation_files.SCHEMA
    table = pa.table([pa.array(x) for x in columns], names=schema.names).cast(schema)
    for ending, maker in recommendation_files.WRITERS.items():
        writer = maker(tmp_path / f"x{ending}")
        writer.write_table(table)
        writer.close()
    assert _table(tmp_path / "x.jsonl").equals(table)
    assert _table(tmp_path / "x.parquet").equals(table)
    options = pacsv.ParseOptions(newlines_in_values=True)
    read = pacsv.read_csv(tmp_path / "x.csv", parse_options=options)
    assert read.cast(schema).equals(table)


def test_users_and_filters_come_from_files(trained, tmp_path):
    run = trained("mf")
    (tmp_path / "users.txt").write_bytes(b"\xef\xbb\xbfu3\r\n\r\nu17\nu3\nnobody\n")
    pq.write_table(pa.table({"who": ["u3", "u17"]}), tmp_path / "users.parquet")
    (tmp_path / "users.csv").write_text("who,age\nu3,4\nu17,5\n")
    (tmp_path / "deny.csv").write_text("user,item,why\nu3,i1,x\nu17,i2,y\nu17,i3,\n")
    wanted = {
        "u3": _expected(run, "u3", 4, _seen(run, "u3") | {"i1"}),
        "u17": _expected(run, "u17", 4, _seen(run, "u17") | {"i2", "i3"}),
    }
    rows = [(user, item) for user, items in wanted.items() for item in items]
    for name, more in (
        ("users.txt", {"unknown": "skip"}),
        ("users.parquet", {"user_column": "who"}),
        ("users.csv", {"user_column": "who"}),
    ):
        deny = tmp_path / "deny.csv"
        if "user_column" in more:  # the column's name holds in every file
            (tmp_path / "who.csv").write_text(deny.read_text().replace("user", "who"))
            deny = tmp_path / "who.csv"
        out = tmp_path / "out.csv"
        written = sl.recommend(
            run.workdir, tmp_path / name, out, k=4, deny=deny, overwrite=True, **more
        )
        table = _table(out)
        assert list(zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True)) == rows
        left_out = {kind: count for kind, count in written.skipped.items() if count}
        assert left_out == ({"unknown user": 1, "repeated user": 1} if "unknown" in more else {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"users": "nobody,u1"}, r"--users: unknown user id 'nobody' \(1 unknown in 2 distinct\)"),
        ({"users": "nobody", "unknown": "skip"}, r"unknown user id 'nobody'.*correct them$"),
        ({"users": "gone.csv"}, r"--users=gone.csv is not there, and no user's id; give a file"),
        ({"users": ","}, r"--users names nobody"),
        ({"users": "all", "unknown": "skip"}, r"--unknown=skip has nothing to skip"),
        ({"users": "u1", "unknown": "drop"}, r"--unknown='drop' is not one of: refuse, skip"),
        ({"users": "u1", "user_column": "who"}, r"--user_column=who names a column of no file"),
        ({"users": "u1", "item_column": "what"}, r"--item_column=what names a column of no file"),
        ({"users": "{dir}/a.csv"}, r"a.csv has no column 'user'; columns found: who; name it with"),
        ({"users": "{dir}/b.csv"}, r"b.csv: row 2 has no id in column user"),
        ({"users": "{dir}/empty.txt"}, r"empty.txt is empty; it names no user"),
        ({"users": "{dir}/cut.parquet"}, r"cut.parquet cannot be read as an Arrow file"),
        ({"users": "all", "allow": "{dir}/a.csv"}, r"a.csv has no column 'item'"),
        ({"users": "all", "deny": "{dir}/all.txt"}, r"leave none to list"),
        ({"users": "all", "deny": "{dir}/gone.txt"}, r"gone.txt is not a file"),
        ({"users": "all", "k": 0}, r"k=0; it must be at least 1"),
        ({"users": "all", "out": "{dir}/x.xlsx"}, r"the ending says the format, one of: .parquet"),
        ({"users": "all", "checkpoint": "first"}, r"'first' is not one of: best, last"),
    ],
)
def test_what_cannot_be_answered_is_said(trained, tmp_path, arguments, message):
    (tmp_path / "a.csv").write_text("who\nu1\n")
    (tmp_path / "b.csv").write_text("user,item\nu1,i1\n,i2\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "all.txt").write_text("".join(f"i{i}\n" for i in range(N_ITEMS)))
    given = {
        name: value.replace("{dir}", str(tmp_path)) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    out = given.pop("out", str(tmp_path / "out.csv"))
    with pytest.raises(UserError, match=message):
        sl.recommend(trained("mf").workdir, given.pop("users"), out, **given)
    assert not (tmp_path / "out.csv").exists()
