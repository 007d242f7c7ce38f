#!/usr/bin/env python
"""The request files of `slgr teach requests` through vLLM on the GPUs of a Ray cluster.

    slgr teach requests --data=DATA --name=my_llm --model=MODEL --file_format=parquet
    python launch/cluster/score_ray.py DATA/requests/my_llm RESULTS MODEL --concurrency=8
    slgr teach collect --data=DATA --name=my_llm --results=RESULTS

Run it where Ray is (`ray job submit -- python score_ray.py ...`), with 'ray[llm]' installed and
REQUESTS and RESULTS on a file system that all nodes share. Started again it asks only what has no
answer in RESULTS yet: what was under way when it was stopped, and what failed (a prompt longer than
the model takes, ...), which is in RESULTS too, with its error. What `slgr teach requests --open`
writes is another set of requests: give its file as REQUESTS, and other RESULTS.
"""
# Tried on: Ray 2.60 on one machine, from requests to a collected teacher, with --dry_run in vLLM's
# place (tests/teacher/collect/); build_processor and SamplingParams also with vLLM 0.29, whose
# engine did not run: there was no GPU.

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import sys
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = dict[str, Any]
# Fields of a request's body that are no sampling parameters of the same name.
TRANSLATED = (
    *("model", "messages", "max_completion_tokens", "response_format", "logprobs"),
    *("top_logprobs", "chat_template_kwargs"),
)


def to_vllm(row: Row) -> Row:
    """A request -> the columns that vLLM's stage reads: messages and sampling_params."""
    body = json.loads(row["body"])
    parameters = {name: value for name, value in body.items() if name not in TRANSLATED}
    if "max_completion_tokens" in body:
        parameters["max_tokens"] = body["max_completion_tokens"]
    if body.get("logprobs"):
        parameters["logprobs"] = body.get("top_logprobs", 0)
    form = body.get("response_format", {})
    if form.get("type") == "json_schema":
        # As text: columns of a block have one type, and would give each schema the labels of all.
        schema = json.dumps(form["json_schema"]["schema"])
        parameters["structured_outputs"] = {"json": schema}
    elif form.get("type") == "json_object":
        parameters["structured_outputs"] = {"json_object": True}
    return {"messages": body["messages"], "sampling_params": parameters}


def to_result(row: Row) -> Row:
    """A row of vLLM's stage -> custom_id, response (a chat completion, as JSON) and error."""
    if row["__inference_error__"]:
        return {
            "custom_id": row["custom_id"],
            "response": "",
            "error": row["__inference_error__"],
        }
    body = json.loads(row["body"])
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    told = int(row["num_generated_tokens"])
    choice = {
        "message": {"role": "assistant", "content": row["generated_text"]},
        # The stage does not hand on why an answer ended.
        "finish_reason": "length" if limit and told >= limit else "stop",
        "logprobs": to_logprobs(row) if row.get("logprobs") is not None else None,
    }
    usage = {"prompt_tokens": int(row["num_input_tokens"]), "completion_tokens": told}
    response = json.dumps({"choices": [choice], "usage": usage})
    return {"custom_id": row["custom_id"], "response": response, "error": ""}


def to_logprobs(row: Row) -> Row:
    """vLLM's {token id: its text and logprob} of each token -> those of a chat completion."""
    content = []
    for token, offered in zip(row["generated_tokens"], row["logprobs"], strict=True):
        entries = {
            int(number): {"token": entry["decoded_token"], "logprob": entry["logprob"]}
            for number, entry in offered.items()
        }
        content.append({**entries[int(token)], "top_logprobs": list(entries.values())})
    return {"content": content}


def refuse(what: str) -> NoReturn:
    """End with the status of an error to mend."""
    print(f"error: {what}", file=sys.stderr)
    sys.exit(2)


def request_files(requests: pathlib.Path) -> list[str]:
    """The Parquet files of a folder of requests, or the one that is named."""
    named = requests.suffix == ".parquet" and requests.is_file()
    files = [requests] if named else sorted(requests.glob("requests-[0-9]*.parquet"))
    if not files:
        refuse(
            f"{requests} has no requests-NNNNN.parquet; write them with slgr teach requests "
            "--file_format=parquet"
        )
    return [str(path) for path in files]


def answered(results: pathlib.Path) -> pa.Array:
    """custom_ids in `results` that have an answer; a file that was cut off is removed."""
    parts = []
    for path in sorted(results.glob("*.parquet")):
        try:
            table = pq.read_table(path, columns=["custom_id", "error"])
        except pa.ArrowInvalid:
            print(f"{path} was cut off: its requests are asked again")
            path.unlink()
            continue
        parts.append(table.filter(pc.equal(table["error"], ""))["custom_id"].combine_chunks())
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def engine(options: argparse.Namespace, first: Row) -> Any:
    """Dataset of requests -> dataset of vLLM's rows."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs={
            "tensor_parallel_size": options.tensor_parallel_size,
            **options.engine,
        },
        concurrency=options.concurrency,
        batch_size=options.batch_size,
        should_continue_on_error=True,  # one bad request must not end the job
    )
    if options.dry_run:
        longest = config.engine_kwargs.get("max_model_len", 1 << 20)
        # In actors, as vLLM is: each block that they have done is written at once.
        return lambda dataset: dataset.map(
            StandIn, fn_constructor_args=(longest,), concurrency=options.concurrency
        )
    template = json.loads(first["body"]).get("chat_template_kwargs")
    return build_processor(
        config, to_vllm, builder_kwargs={"chat_template_kwargs": template} if template else None
    )


class StandIn:
    """vLLM's stage with answers that mean nothing, but have the form that was asked for."""

    def __init__(self, longest: int) -> None:
        self.longest = longest  # words of a prompt

    def __call__(self, row: Row) -> Row:
        row = {**row, **to_vllm(row)}
        words = sum(len(message["content"].split()) for message in row["messages"])
        failed = words > self.longest
        schema = json.loads(row["sampling_params"].get("structured_outputs", {}).get("json", "{}"))
        return {
            **row,
            "generated_text": "" if failed else json.dumps(example(schema, row["custom_id"])),
            "generated_tokens": [],
            "num_generated_tokens": 0,
            "num_input_tokens": 0 if failed else words,
            "logprobs": None,
            "__inference_error__": f"ValueError: {words} > {self.longest} words" if failed else "",
        }


def example(schema: Row, seed: str) -> Any:
    """A value that a JSON schema of `slgr teach requests` allows, a function of `seed`."""
    draw = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    if "enum" in schema:
        return schema["enum"][draw % len(schema["enum"])]
    kind = schema.get("type", "object")
    if kind == "object":
        names = schema.get("properties", {})
        return {name: example(names[name], f"{seed} {name}") for name in names}
    if kind == "array":
        values = schema["items"].get("enum", ["a title"])
        return values[draw % len(values) :] + values[: draw % len(values)]
    low, high = schema.get("minimum", 0), schema.get("maximum", 1)
    return round(low + (high - low) * draw / 2**32, 3)


def parse(arguments: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("requests", type=pathlib.Path, help="DATA/requests/NAME, or a file of it")
    parser.add_argument("results", type=pathlib.Path, help="folder of results, Parquet")
    parser.add_argument("model", help="what vLLM loads: a name or a folder")
    parser.add_argument("--concurrency", type=int, default=1, help="engines at once")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs of an engine")
    parser.add_argument("--batch_size", type=int, default=64, help="requests of a batch")
    parser.add_argument(
        "--rows_per_file",
        type=int,
        default=2000,
        help="results a file; of one that is unfinished all are asked again",
    )
    parser.add_argument(
        "--engine",
        type=json.loads,
        default={},
        help='JSON, more arguments of vLLM: {"max_model_len": 4096}',
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="everything but vLLM: answers of the right form that mean nothing, errors "
        "for prompts of more words than max_model_len",
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    files = request_files(options.requests)
    first = next(pq.ParquetFile(files[0]).iter_batches(1)).to_pylist()[0]
    if json.loads(first["body"]).get("n", 1) != 1:
        refuse('the requests ask for "n" samples, and Ray hands on one: leave it out of --body')
    options.results.mkdir(parents=True, exist_ok=True)

    import ray  # here, so that --help and the errors above need no Ray

    ray.init(ignore_reinit_error=True)
    done = answered(options.results)
    known = ray.put(done)

    def is_open(table: pa.Table) -> pa.Table:
        return table.filter(pc.invert(pc.is_in(table["custom_id"], ray.get(known))))

    asked = ray.data.read_parquet(files).select_columns(["custom_id", "body"])
    asked = asked.map_batches(is_open, batch_format="pyarrow", batch_size=None)
    # Strict, or it is fused with its neighbours, and a file is all that one task has read.
    asked = asked.repartition(target_num_rows_per_block=options.rows_per_file, strict=True)
    results = engine(options, first)(asked).map(to_result)
    results.write_parquet(os.path.abspath(options.results))

    total = sum(pq.read_metadata(path).num_rows for path in files)
    after = len(answered(options.results))
    print(f"{after:,} of {total:,} requests have an answer in {options.results}, {len(done):,} had "
          "one before")  # fmt: skip
    if after < total:
        print(f"  {total - after:,} failed: their errors are there; the same command asks again")


if __name__ == "__main__":
    main()
