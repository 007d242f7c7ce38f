"""`slgr teach` as a user runs it: exit codes, one line on standard error, what is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
import resource
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slgr_jax import config
from slgr_jax.cli.teach import COMMANDS
from slgr_jax.config.knobs import flag_name
from slgr_jax.data import schema
from slgr_jax.teacher.products import preferences

REPO = pathlib.Path(__file__).parents[2]
GOOD = "user,item,score\n007,01,0.5\n007,1,0.25\nΩμέγα,电影,3\nΩμέγα,café,\n"


ALL = {
    flag_name(field)
    for section in (*config.TEACH_SECTIONS, config.BaselineConfig)
    for field in dataclasses.fields(section)
}


def teach(*args):
    command = [sys.executable, str(REPO / "launch" / "teach.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def refused(result, *words):
    """Exit code 2 and exactly one line on standard error, which has all the words."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_help_is_instant_and_imports_neither_jax_nor_pyarrow():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = teach("import", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: other work on the machine is not this command's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert result.returncode == 0
    for text in ("import --data=DATA", "--unknown=error", "one of error, drop", "includes_eval"):
        assert text in result.stdout
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", REPO / "launch" / "teach.py", "import", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in trace.splitlines()}
    assert "slgr_jax.cli.flags" in imported
    assert imported.isdisjoint({"jax", "pyarrow", "numpy"})


def test_help_lists_the_commands_and_shows_no_flags():
    shown = teach("--help").stdout
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", shown, re.MULTILINE)
    assert "\n  --" not in shown


def test_help_of_a_command_shows_the_flags_that_it_uses_and_no_others():
    shown = teach("combine", "--help").stdout
    assert set(re.findall(r"^  --(\w+)=", shown, re.MULTILINE)) == {
        *("config", "data", "name", "rows_per_shard", "overwrite", "with_validation"),
        *("names", "method", "rrf_k", "min_votes"),
    }


def test_every_knob_is_of_a_command():
    assert set().union(*(command.flag_names() for command in COMMANDS.values())) == ALL


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_use_its_own_flags(name):
    usage = COMMANDS[name].usage
    examples = re.findall(rf"^    slgr teach {name} (.+)$", usage, re.MULTILINE)
    assert examples
    for example in examples:
        used = re.findall(r"--(\w+)", example)
        stand_ins = COMMANDS[name].stand_ins
        assert {"data", "name"} <= set(used)
        for needed in COMMANDS[name].required:
            assert {needed, *stand_ins.get(needed, ())} & set(used)
        assert set(used) <= COMMANDS[name].flag_names()


@pytest.mark.parametrize("encoding", ["csv", "parquet", "file", "stream"])
def test_import_writes_a_product_and_says_what_it_assumes(tiny, tmp_path, encoding):
    path = tmp_path / "answers"
    rows = {
        "user": ["007", "007", "Ωμέγα", "Ωμέγα"],
        "item": ["01", "1", "电影", "café"],
        "score": [0.5, 0.25, 3.0, None],
    }
    if encoding == "csv":
        path.write_text(GOOD, encoding="utf-8")
    elif encoding == "parquet":
        pq.write_table(pa.table(rows), path)
    else:
        make = pa.ipc.new_file if encoding == "file" else pa.ipc.new_stream
        with make(path, pa.table(rows).schema) as writer:
            writer.write_table(pa.table(rows))
    result = teach(
        "import",
        f"--data={tiny.path}",
        f"--scores={path}",
        "--name=gpt",
        "--model=some-llm",
        "--prompt_hash=ab12",
        "--score_kind=prob",
        "--unlisted=below",
        "--built_from=prefix",
        "--keep_training_items",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "4 rows in 1 shards: 3 answers on 2 users and 3 items, 1 preferences" in result.stdout
    assert "assumed: built_from=prefix: you state that" in result.stdout
    teacher = preferences.load(tiny, "gpt")
    assert teacher.items.tolist() == [1, 0, 5]
    assert teacher.scores.tolist() == [0.25, 0.5, 3.0]
    manifest = teacher.manifest
    assert (manifest.model, manifest.prompt_hash, manifest.score_kind) == (
        "some-llm",
        "ab12",
        "prob",
    )
    assert (manifest.unlisted, manifest.built_from) == ("below", "prefix")
    shown = teach("inspect", f"--data={tiny.path}", "--name=gpt")
    assert shown.returncode == 0
    assert shown.stdout == result.stdout


def test_inspect_refuses_a_damaged_product(tiny, tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text(GOOD, encoding="utf-8")
    manifest = preferences.import_scores(tiny, path, "gpt", keep_training_items=True)
    shard = tiny.path / schema.TEACHER_DIR / "gpt" / manifest.files[0].path
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(teach("inspect", f"--data={tiny.path}", "--name=gpt"), shard.name, "truncated")
    refused(teach("inspect", f"--data={tiny.path}", "--name=no"), "no teacher 'no'", "gpt")


BAD = {
    "nothing": ([], ["no command given", "import, score", "candidates, requests, ask, collect"]),
    "unknown command": (["imports"], ["'imports' is not a command"]),
    "no data": (["import", "--name=t"], ["missing --data"]),
    "no scores": (["import", "--data={data}", "--name=t"], ["missing --scores"]),
    "no results": (["collect", "--data={data}", "--name=t"], ["missing --results"]),
    "no candidates": (
        ["requests", "--data={data}", "--name=t", "--model=m"],
        ["has no candidate set 't'", "slgr teach candidates"],
    ),
    "no titles": (["candidates", "--data={data}", "--name=t"], ["--items_input"]),
    "no dataset": (
        ["import", "--data=nowhere", "--scores={scores}", "--name=t"],
        ["nowhere is not a directory", "slgr prepare"],
    ),
    "a flag of others": (
        ["score", "--data={data}", "--name=t", "--scores={scores}"],
        ["slgr teach score has no flag --scores, which is of slgr teach import", "score --help"],
    ),
    "a flag of several others": (
        ["inspect", "--data={data}", "--name=t", "--price_in=1"],
        ["no flag --price_in", "of slgr teach candidates, requests, ask, report;"],
    ),
    "nobody's flag": (
        ["inspect", "--data={data}", "--name=t", "--price=1"],
        ["Unknown command line flag 'price'", "see slgr teach inspect --help"],
    ),
    "bad choice": (
        ["import", "--data={data}", "--scores={scores}", "--name=t", "--unknown=maybe"],
        ["--unknown='maybe' is not one of: error, drop"],
    ),
    "unknown ids": (
        ["import", "--data={data}", "--scores={scores}", "--name=t"],
        ["1 of 2 rows", "1 user ('8')", "--unknown=drop"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_commands_give_one_line(tiny, tmp_path, case):
    scores = tmp_path / "answers.csv"
    scores.write_text("user,item,score\n8,01,1\n7,01,1\n", encoding="utf-8")
    args, words = BAD[case]
    refused(teach(*(arg.format(data=tiny.path, scores=scores) for arg in args)), *words)


def test_score_needs_item_texts_or_the_extra(tiny):
    result = teach("score", f"--data={tiny.path}", "--name=wl")
    if importlib.util.find_spec("wordllama") is None:
        refused(result, "pip install 'slgr_jax[llm]'", "pip install -e '.[llm]'")
    else:
        refused(result, "has no item texts to score with")


@pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the extra 'llm' is not installed"
)
def test_score_writes_a_product(make_dataset):
    data = make_dataset(titles=["Alien", "Aliens", "Heat", "Toy Story", "Toy Story 2", "Psycho"])
    result = teach(
        "score", f"--data={data.path}", "--name=wl", "--candidates=2", "--cold_candidates=0",
        "--tail_users=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "by wordllama-l2_supercat-256" in result.stdout
    assert "chance is 50%" in result.stdout
    teacher = preferences.load(data, "wl")
    # Two candidates each, fewer only where a user has interacted with nearly everything.
    assert teacher.offsets.tolist() == [0, 2, 4, 6, 8, 10]
    assert teacher.manifest.counts["train_pairs"] == 0


def test_the_chain_from_candidates_to_a_product(make_dataset, tmp_path):
    data = make_dataset(titles=["Alien", "Aliens", "Heat", "Toy Story", "Toy Story 2", "Psycho"])
    common = (f"--data={data.path}", "--name=llm")
    plan = teach("candidates", *common, "--price_in=1000", "--dry_run")
    assert plan.returncode == 0, plan.stderr
    assert "requests about 5 users" in plan.stdout
    assert "cost 0.00" not in plan.stdout
    assert not (data.path / schema.CANDIDATES_DIR).exists()
    drawn = teach("candidates", *common, "--price_in=1000")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.startswith(plan.stdout)
    refused(teach("requests", *common), "missing --model")
    assert teach("requests", *common, "--dry_run").returncode == 0
    assert not (data.path / schema.REQUESTS_DIR).exists()
    written = teach("requests", *common, "--model=some-llm", "--price_in=1000")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith(plan.stdout)
    lines = (data.path / "requests/llm/requests-00000.jsonl").read_text("utf-8").splitlines()
    answers = tmp_path / "answers.jsonl"
    with open(answers, "w", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            message = {"content": '{"A": 0.5}' if number else "no idea"}
            told = {"custom_id": json.loads(line)["custom_id"]}
            told["response"] = {"choices": [{"message": message}]}
            file.write(json.dumps(told) + "\n")
    result = teach("collect", *common, f"--results={answers}")
    assert result.returncode == 0, result.stderr
    assert f"{len(lines) - 1} accepted, 0 repeated, 1 quarantined" in result.stdout
    assert "by some-llm" in result.stdout
    teacher = preferences.load(data, "llm")
    assert teacher.scores.tolist() == [0.5] * (len(lines) - 1)
    assert teacher.manifest.training_items == "hidden"
