"""Products of examples: whose rows, labels by the data, what is refused, and the command."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds

from slgr_jax.cli.teach import inspect
from slgr_jax.config import ExampleFileConfig, TeachConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, ManifestError
from slgr_jax.teacher.local import examples

Row = tuple[int, int]


@pytest.fixture
def data(tmp_path: pathlib.Path) -> Dataset:
    """User 0 has items 3, 1, 2 in training, 4 in validation, 5 in test; user 1 has 1 and 6, 6."""
    train = np.array([[0, 3], [0, 1], [0, 2], [1, 1], [1, 6], [1, 6]])
    rest = (np.array([[0, 4], [1, 2]]), np.array([[0, 5], [1, 3]]))
    return worlds.write_dataset(
        tmp_path / "d", train, *rest, n_users=2, n_items=9, parts_in_time=True, ratings=True
    )


def _file(tmp_path: pathlib.Path, rows: list[Row], **columns: Any) -> str:
    table = {"user": [f"u{u}" for u, _ in rows], "item": [f"i{i}" for _, i in rows]}
    vectors = [[float(n), 1.0] for n in range(len(rows))]
    pq.write_table(pa.table({**table, "vector": vectors, **columns}), tmp_path / "f.parquet")
    return str(tmp_path / "f.parquet")


def _make(data: Dataset, **options: Any) -> examples.Examples:
    stated = {key: options.pop(key) for key in ("built_from", "unknown") if key in options}
    common = TeachConfig(str(data.path), "e", overwrite=True)
    examples.make(data, common, ExampleFileConfig(**options), **stated)
    return examples.load(data, "e")


def _rows(held: examples.Examples) -> list[tuple[int, int, int, bool]]:
    columns = held.users, held.items, held.positions, held.clicked
    return [(int(u), int(i), int(t), bool(y)) for u, i, t, y in zip(*columns, strict=True)]


def test_labels_and_moments_are_those_of_the_data(data: Dataset, tmp_path: pathlib.Path):
    """The file's own labels say the opposite, and are not read."""
    rows = [(0, 8), (0, 1), (1, 6), (1, 7)]
    held = _make(data, file=_file(tmp_path, rows, label=[1, 0, 0, 1]))
    wanted = [(0, 1, 1, True), (0, 8, 3, False), (1, 6, 2, True), (1, 7, 3, False)]
    assert _rows(held) == wanted
    assert held.reasoning.tolist() == [[1.0, 1.0], [0.0, 1.0], [2.0, 1.0], [3.0, 1.0]]


def test_a_position_says_which_of_several(data: Dataset, tmp_path: pathlib.Path):
    rows = [(1, 6), (1, 6), (1, 7)]
    held = _make(data, file=_file(tmp_path, rows, position=[1, 2, 0]))
    assert _rows(held) == [(1, 7, 0, False), (1, 6, 1, True), (1, 6, 2, True)]


def test_ratings_label_training_interactions(data: Dataset, tmp_path: pathlib.Path):
    # Ratings are (user + 2 item) % 5 + 1: 2, 3, 5 of user 0.
    held = _make(data, file=_file(tmp_path, [(0, 3), (0, 1), (0, 2)]), threshold=3.0)
    assert _rows(held) == [(0, 3, 0, False), (0, 1, 1, True), (0, 2, 2, True)]
    with pytest.raises(InputError, match="row 2 of 1 such rows is no training interaction"):
        _make(data, file=_file(tmp_path, [(0, 3), (0, 8)]), threshold=3.0)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([(0, 1), (0, 4)], {}, "row 2 of 1 such rows is an interaction of validation or test"),
        ([(0, 1), (0, 5)], {}, "row 2 of 1 such rows is an interaction of validation or test"),
        ([(0, 1), (0, 8), (0, 8)], {}, "'i8' twice at position 3"),
        ([(0, 1), (0, 2)], {}, "2 of 2 examples are clicked"),
        ([(0, 1), (0, 8)], {"position": [0, 3]}, "row 1 of 1 such rows has a position"),
        ([(0, 1), (0, 8)], {"position": [1, 4]}, "row 2 of 1 such rows has a position"),
        ([(0, 1), (0, 99)], {}, "i99"),
        ([(0, 1), (0, 8)], {"vector": [[1.0], [np.nan]]}, "row 2 .* not finite"),
        ([(0, 1), (0, 8)], {"vector": [[1.0], [1.0, 2.0]]}, "2 widths"),
    ],
)
def test_what_is_no_training_row_is_refused(
    data: Dataset, tmp_path: pathlib.Path, rows: list[Row], columns: Any, message: str
):
    with pytest.raises(InputError, match=message):
        _make(data, file=_file(tmp_path, rows, **columns))


def test_what_has_seen_evaluation_or_another_split_is_refused(
    data: Dataset, tmp_path: pathlib.Path
):
    path = _file(tmp_path, [(0, 1), (0, 8)])
    with pytest.raises(ManifestError, match="includes_eval"):
        _make(data, file=path, built_from="includes_eval")
    _make(data, file=path)
    other = worlds.random_dataset(tmp_path / "other", n_users=2, n_items=9, per_user=5)
    (data.path / "examples").rename(other.path / "examples")
    with pytest.raises(ManifestError, match="was made for"):
        examples.load(other, "e")
    with pytest.raises(ConfigError, match="--example_seed=3"):
        ExampleFileConfig(file=path, seed=3)


def test_rows_are_drawn_by_the_seed_and_come_back_with_reasoning(tmp_path: pathlib.Path):
    dataset = worlds.random_dataset(tmp_path / "d", parts_in_time=True)
    asked = tmp_path / "asked.parquet"
    drawn = _make(dataset, share=0.25, seed=1, prompts=str(asked))
    assert drawn.reasoning.shape == (120, 0)  # a quarter of 240 interactions and as many others
    assert _rows(_make(dataset, share=0.25, seed=1)) == _rows(drawn)
    assert _rows(_make(dataset, share=0.25, seed=2)) != _rows(drawn)
    seen = {
        pair
        for part in ("valid", "test")
        for pair in worlds.pairs_of(dataset.part(part).users, dataset.part(part).items)
    }
    assert not seen & worlds.pairs_of(drawn.users, drawn.items)

    table = pq.read_table(asked)
    row = table.slice(5, 1).to_pylist()[0]
    user, item = int(row["user"][1:]), int(row["item"][1:])
    before = dataset.train.items[dataset.train.users == user][: row["position"]]
    listed = "\n".join(f"- item {i}" for i in before) or "(nothing yet)"
    outcome = "chose" if row["label"] else "did not choose"
    assert listed in row["prompt"]
    assert f"shown: item {item}\nThe person {outcome} it." in row["prompt"]
    answered = table.append_column("vector", pa.array([[1.0, 2.0]] * table.num_rows))
    pq.write_table(answered, tmp_path / "answered.parquet")
    held = _make(dataset, file=str(tmp_path / "answered.parquet"))
    assert _rows(held) == _rows(drawn)
    assert held.reasoning.shape == (120, 2)


def test_the_command_makes_and_inspects(
    data: Dataset, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = _file(tmp_path, [(0, 1), (0, 8), (1, 7)])
    given = ["teach", "examples", f"--data={data.path}", "--name=e", f"--examples={path}"]
    command = [sys.executable, "-m", "slgr_jax.cli", *given, "--model=m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inspect.work(data, TeachConfig(str(data.path), "e"))
    for said in (done.stdout, capsys.readouterr().out):
        assert "examples e by m" in said
        assert "3 training rows of 2 users, 1 clicked (interactions)" in said
        assert "reasoning of 2 numbers" in said
