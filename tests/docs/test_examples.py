"""The notebook and the scripts of docs/, run on tiny data as a reader runs them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import pathlib
import runpy
import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds

import slgr_jax as sl
from slgr_jax import config
from slgr_jax.data import schema
from slgr_jax.guidance import gates

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
NOTEBOOK = DOCS / "tutorial.ipynb"
SMALL = {"epochs": 2, "batch_size": 32, "dim": 8}
SERVES = pathlib.Path(sl.__file__).with_name("serving").is_dir()


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A notebook configures logging, as a user's program may."""
    root, ours = logging.getLogger(), logging.getLogger("slgr_jax")
    before = list(root.handlers), ours.level
    yield
    root.handlers[:] = before[0]
    ours.setLevel(before[1])


@pytest.fixture
def files(tmp_path):
    """ratings.csv of 20 users, and answers.csv about every item."""
    rng = np.random.default_rng(1)
    pairs = worlds.random_pairs(0, n_users=20, n_items=15, per_user=8)
    when = rng.permutation(len(pairs))
    ratings = [f"u{user},i{item},{1_000 + t}" for (user, item), t in zip(pairs, when, strict=True)]
    answers = [f"u{user},i{item},{rng.random():.3f}" for user in range(20) for item in range(12)]
    for name, header, rows in (
        ("ratings", "user,item,timestamp", ratings),
        ("answers", "user,item,score", answers),
    ):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return tmp_path


def test_the_notebook_is_small_and_has_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 20_000
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    """Its code cells in order, in one namespace; what is printed tells what the text promises."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    namespace: dict[str, object] = {"__name__": "notebook"}
    shown = io.StringIO()
    for cell in notebook["cells"]:
        serving = "serving" in cell["metadata"].get("tags", ())
        if cell["cell_type"] != "code" or (serving and not SERVES):
            continue
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(shown):
            exec(compile(source, f"{NOTEBOOK.name} {cell['id']}", "exec"), namespace)

    text = shown.getvalue()
    assert "'users': 200" in text
    assert len(namespace["curve"]) == namespace["plain"].epoch  # type: ignore
    assert "test: ndcg@10 user by user, each run minus plain" in text
    gate = namespace["evaluation"].runs[1].gate  # type: ignore
    alpha = {name: values["alpha"] for name, values in gate["slices"].items()}
    assert alpha["cold_users"] > alpha["warm_users"]


@pytest.mark.slow
def test_own_data_trains_with_and_without_the_llm(files):
    script = runpy.run_path(str(DOCS / "own_data.py"))
    evaluation = script["main"](
        str(files / "ratings.csv"), str(files / "answers.csv"), files / "out", **SMALL
    )
    assert [run.label for run in evaluation.runs[:2]] == ["plain", "guided"]
    assert [run.config.guidance.teacher for run in evaluation.runs[:2]] == ["", "llm"]
    assert evaluation.runs[1].config.gate.gate == "calibrated"


@pytest.fixture
def _registered_gates_are_forgotten():
    """A test of every knob's values takes the last gate there is."""
    before = list(config.GATES)
    yield
    config.GATES[:] = before


@pytest.mark.slow
@pytest.mark.usefixtures("_registered_gates_are_forgotten")
def test_own_gate_weighs_by_history(files):
    sl.prepare(source="csv", input=files / "ratings.csv", out=files / "data")
    sl.import_teacher(files / "data", files / "answers.csv", "llm")
    script = runpy.run_path(str(DOCS / "own_gate.py"))
    evaluation = script["main"](str(files / "data"), "llm", str(files / "run"), **SMALL)
    assert evaluation.runs[0].config.gate.gate == "short_history"

    history = np.array([-1.0, 0.0, 1.0], np.float32)
    three = {
        name: np.zeros((3, *values.shape[1:]), values.dtype)
        for name, values in vars(gates.empty_inputs()).items()
    }
    inputs = gates.GateInputs(**three | {"history": history})
    alpha = script["ShortHistory"]().apply({}, inputs)
    np.testing.assert_allclose(alpha, 1 / (1 + np.exp(2 * history)), rtol=1e-6)


@pytest.mark.parametrize("script", ["own_data.py", "own_gate.py"])
def test_a_script_without_arguments_says_how_it_is_called(script):
    shown = subprocess.run(
        [sys.executable, str(DOCS / script)], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout) == (1, "")
    assert f"python docs/{script}" in shown.stderr


def _commands(page: str) -> list[list[str]]:
    """The commands of the blocks of a page that are marked as bash."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = [
        line for block in text.split("```bash\n")[1:] for line in block.split("```")[0].splitlines()
    ]
    return [shlex.split(line) for line in lines if line]


def _run(command: list[str], folder: pathlib.Path) -> str:
    """A command of a page, in a folder; what it prints."""
    quick = [f"--{name}={value}" for name, value in SMALL.items() if command[0] == "train"]
    done = subprocess.run(
        [sys.executable, "-m", "slgr_jax.cli", *command, *quick],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _write(request: dict[str, Any]) -> dict[str, Any]:
    """A result as a batch service gives it: what an LLM could write about a user or an item."""
    asked = request["body"]
    keys = asked["response_format"]["json_schema"]["schema"]["required"]
    shown = asked["messages"][0]["content"].split("\n")[1]
    said = {"content": json.dumps({key: f"{key} as of {shown}" for key in keys})}
    body = {"choices": [{"message": said, "finish_reason": "stop"}]}
    return {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the extra 'llm' is not installed"
)
def test_the_example_of_texts_runs_as_it_stands(files, tmp_path):
    titles = [f"i{item},Film {item}" for item in range(15)]
    (files / "items.csv").write_text("\n".join(["item,title", *titles]), encoding="utf-8")
    given = ["--input=ratings.csv", "--items_input=items.csv", "--split=leave_last"]
    _run(["prepare", "--source=csv", "--out=DATA", *given], tmp_path)
    commands = [command[1:] for command in _commands("texts.md")]
    told = {}
    for command in commands:
        told[tuple(command)] = _run(command, tmp_path)
        if command[:2] == ["teach", "requests"] and "--open" not in command:
            name = command[3].removeprefix("--name=")
            lines = (tmp_path / f"DATA/requests/{name}/requests-00000.jsonl").read_text("utf-8")
            results = [json.dumps(_write(json.loads(line))) for line in lines.splitlines()]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(results), encoding="utf-8")
    assert "no request is open" in "".join(told.values())
    assert "texts profiles: 20 of 20 of 20 users by some-llm" in "".join(told.values())
    for name, fields in (("said", {}), ("kar", dict.fromkeys(("genre", "mood"), 1))):
        manifest = schema.read_embedding_manifest(tmp_path / f"DATA/embeddings/{name}")
        assert (manifest.counts["users"], manifest.counts["items"]) == (20, 15)
        assert dict(manifest.fields.get("users", {})) == fields
    for run in ("RUN_RLMREC", "RUN_KAR"):
        assert (tmp_path / run / "log.jsonl").is_file()


@pytest.mark.slow
def test_what_other_systems_hand_over_is_read_and_learned(files, tmp_path):
    prepare = [
        "slgr",
        "prepare",
        "--source=csv",
        "--input=ratings.csv",
        "--out=DATA",
        "--split=leave_last",
    ]
    rng = np.random.default_rng(0)
    items = [f"i{item}" for item in range(15)]
    vectors = [rng.normal(size=8).astype(np.float32).tolist() for _ in items]
    pq.write_table(pa.table({"item": items, "vector": vectors}), tmp_path / "items.parquet")
    ranks = [
        f"u{user},i{item},{rank}"
        for user in range(20)
        for rank, item in enumerate(rng.permutation(15)[:5], 1)
    ]
    (tmp_path / "bigrec.csv").write_text("\n".join(["user,item,rank", *ranks]), encoding="utf-8")
    beside = [
        f"i{item},i{(item + step) % 15},{1 / step}" for item in range(15) for step in (1, 2, 3)
    ]
    (tmp_path / "beside.csv").write_text("\n".join(["item,other,score", *beside]), encoding="utf-8")
    commands = _commands("methods.md")
    assert [command[1] for command in commands] == ["teach", "train"] * 3
    for _, *arguments in [prepare, *commands]:
        _run(arguments, tmp_path)
    for run in ("RUN_VECTORS", "RUN_LISTS", "RUN_BESIDE"):
        assert (tmp_path / run / "log.jsonl").is_file()
