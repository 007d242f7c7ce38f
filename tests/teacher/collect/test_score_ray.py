"""launch/cluster/score_ray.py: what it makes of requests and of vLLM's rows, and Ray for real."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from teacher.collect import asked_world
from teacher.collect.reading import read_one

from slgr_jax.data import schema
from slgr_jax.teacher.ask import answer_form, requests
from slgr_jax.teacher.collect.refusals import Refused

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "launch" / "cluster" / "score_ray.py"
# The script in a Ray of two cores (its actor holds one): where prompts may have so many words;
# then, with one file of results cut off, where any may. `first` keeps what the first one wrote.
TWICE = """
import glob, os, runpy, shutil, sys
import ray
ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
script, requests, results, words, first = sys.argv[1:]
command = [script, requests, results, "model", "--dry_run", "--rows_per_file=10"]
sys.argv = [*command, f'--engine={{"max_model_len": {words}}}']
runpy.run_path(script, run_name="__main__")
shutil.copytree(results, first)
os.truncate(min(glob.glob(f"{results}/*.parquet")), 100)
sys.argv = command
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module; Ray is imported only where it is used."""
    spec = importlib.util.spec_from_file_location("score_ray", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of_vllm(**columns):
    """The columns of Ray's vLLM stage (2.60) for an answer of two tokens."""
    body = {"messages": [], "max_tokens": 5}
    return {
        "custom_id": "r0",
        "body": json.dumps(body),
        "generated_text": "Yes",
        "generated_tokens": [7, 8],
        "num_generated_tokens": 2,
        "num_input_tokens": 30,
        "logprobs": None,
        "__inference_error__": "",
        **columns,
    }


def test_a_request_is_what_vllm_reads(script):
    schema_of_answer = answer_form.answer_schema("listwise", 3)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "max_completion_tokens": 40,
        "logprobs": True,
        "top_logprobs": 20,
        "seed": 3,
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": answer_form.response_format("listwise", 3, "json_schema"),
    }
    columns = script.to_vllm({"custom_id": "r0", "body": json.dumps(body)})
    assert columns["messages"] == body["messages"]
    parameters = columns["sampling_params"]
    assert json.loads(parameters.pop("structured_outputs")["json"]) == schema_of_answer
    assert parameters == {"temperature": 0.5, "max_tokens": 40, "logprobs": 20, "seed": 3}

    plain = script.to_vllm({"body": json.dumps({"messages": [], "max_tokens": 4})})
    assert plain["sampling_params"] == {"max_tokens": 4}
    loose = {"messages": [], "response_format": {"type": "json_object"}}
    asked = script.to_vllm({"body": json.dumps(loose)})["sampling_params"]
    assert asked == {"structured_outputs": {"json_object": True}}


def test_a_row_of_vllm_is_read_by_collect(script):
    def read(**columns):
        return read_one(json.dumps(script.to_result(row_of_vllm(**columns))))

    answer = read()
    assert (answer.custom_id, answer.text, answer.cut) == ("r0", "Yes", False)
    assert (answer.prompt_tokens, answer.completion_tokens) == (30, 2)
    assert read(num_generated_tokens=5).cut

    def entry(text, logprob):
        return {"decoded_token": text, "logprob": logprob, "rank": 1}

    first = {7: entry("Ye", -0.25), 9: entry("No", -2.0)}
    answer = read(logprobs=[first, {8: entry("s", -0.5)}])
    assert answer.tokens == [("Ye", {"Ye": -0.25, "No": -2.0}), ("s", {"s": -0.5})]

    failed = read(generated_text="", __inference_error__="ValueError: too long")
    assert isinstance(failed, Refused)
    assert (failed.custom_id, failed.kind, failed.detail) == ("r0", "error", "ValueError: too long")


@pytest.mark.parametrize(
    ("options", "fix"),
    [({}, "--file_format=parquet"), ({"file_format": "parquet", "body": '{"n": 2}'}, "--body")],
)
def test_what_is_wrong_is_one_line(script, world, tmp_path, monkeypatch, capsys, options, fix):
    root = asked_world.ask(world, **options)
    monkeypatch.setattr(sys, "argv", ["score_ray.py", str(root), str(tmp_path / "results"), "m"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert fix in line
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_requests_go_through_ray_to_a_teacher(world, tmp_path):
    """Half of the prompts are too long at first, and one file of results is cut off."""
    for module in ("ray", "pydantic", "aiohttp"):  # what ray.data.llm imports without vLLM
        pytest.importorskip(module, reason="pip install 'ray[data]' pydantic aiohttp")
    root = asked_world.ask(world, file_format="parquet", requests_per_file=20, permutations=3)
    asked = list(requests.read_lines(root, schema.read_request_manifest(root)))
    words = [len(request["body"]["messages"][0]["content"].split()) for request in asked]
    middle = int(statistics.median(words))
    results, first = tmp_path / "results", tmp_path / "first"
    ended = subprocess.run(
        [sys.executable, "-c", TWICE, *map(str, (SCRIPT, root, results, middle, first))],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    total, failed = len(words), sum(count > middle for count in words)
    assert 0 < failed < total
    assert f"{total - failed} of {total} requests have an answer" in ended.stdout
    assert f"{failed} failed" in ended.stdout
    _, report = asked_world.gather(world, first, requests=root)
    read = f"{total} results: {total - failed} accepted, 0 repeated, {failed} quarantined"
    assert read in report

    files = sorted(first.glob("*.parquet"))
    assert len(files) > 1
    tables = [pq.read_table(path, columns=["error"]) for path in files[1:]]
    kept = sum(table["error"].to_pylist().count("") for table in tables)
    assert f"{total} of {total} requests have an answer" in ended.stdout
    assert f", {kept} had one before" in ended.stdout
    written = sum(pq.read_metadata(path).num_rows for path in results.glob("*.parquet"))
    assert written == total - kept + sum(table.num_rows for table in tables), "none is asked twice"
    _, report = asked_world.gather(world, results, requests=root, overwrite=True)
    assert f"{total} of {total} requests are complete" in report
