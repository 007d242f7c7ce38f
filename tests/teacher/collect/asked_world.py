"""A small world, requests about it, and a fake LLM that answers them."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np

from slgr_jax.config import CandidateConfig, CollectConfig, RequestConfig, TeachConfig
from slgr_jax.data import schema
from slgr_jax.teacher.ask import asking, candidates, prompts, requests
from slgr_jax.teacher.collect import answer_log, collecting
from slgr_jax.teacher.products import preferences

U, I = 12, 40  # noqa: E741 - the letters of the code


def make_world(make_dataset):
    """12 users, 40 items and a candidate set named c."""
    rng = np.random.default_rng(1)
    train = {u: sorted(rng.permutation(I)[: 2 + u % 5].tolist()) for u in range(U)}
    data = make_dataset(
        users=[f"u{u}" for u in range(U)],
        items=[f"i{i}" for i in range(I)],
        titles=[f"Film {i} (A: 0.1, B > C)" for i in range(I)],  # titles must never be read
        train=train,
        valid={},
        test={},
    )
    options = CandidateConfig(candidates=9, cold_candidates=0, tail_users=2)
    drawn = candidates.draw(data, prompts.item_lines(data), options, seed=0)
    candidates.write(data, "c", drawn, options, seed=0, diversity="popularity")
    return data


def ask(data, name="t", **options):
    """Write requests named `name` of the candidate set c."""
    drawn, source = candidates.load(data, "c")
    asker = asking.asker(data, drawn, prompts.item_lines(data), RequestConfig(**options), 0)
    root = requests.directory(data.path, name)
    requests.write(asker, asking.plan(asker), source, root, model="fake")
    return root


def taste(history, line):
    """A score in hundredths that a history and an item's line decide."""
    return hashlib.sha256(f"{history}|{line}".encode()).digest()[0] % 101 / 100


def tastes(data, root):
    """(user, item) -> the fake LLM's score, by index: nothing is read out of prompts."""
    manifest = schema.read_request_manifest(root)
    drawn, _ = candidates.load(data, "c")
    lines = prompts.item_lines(data)
    options = RequestConfig(**manifest.options)
    offsets, items = asking.shown_history(asking.asker(data, drawn, lines, options, 0))
    expected = {}
    for row in requests.load_index(root, manifest).to_pylist():
        u = row["user"]
        past = "\n".join(f"- {lines[i]}" for i in items[offsets[u] : offsets[u + 1]])
        for i in row["items"]:
            expected[u, i] = taste(past, lines[i])
    return expected


def fake_llm(line, form="listwise"):
    """The result line for a request line; answers by label, as told by the prompt alone."""
    raw = json.loads(line)
    text = raw["body"]["messages"][0]["content"]
    past = text.split("last:\n")[1].split("\n\n")[0]
    logprobs = None
    if form in ("listwise", "ranking"):
        listed = text.split("Candidates:\n")[1].split("\n\n")[0].splitlines()
        scores = {line.split(". ")[0]: taste(past, line.split(". ", 1)[1]) for line in listed}
        best = sorted(scores, key=lambda a: -scores[a])
        content = json.dumps(scores) if form == "listwise" else " > ".join(best)
    else:
        listed = text.split("choose?\n")[1].split("\n\n")[0].splitlines()
        a, b = (taste(past, line.split(". ", 1)[1]) for line in listed)
        p = 1 / (1 + math.exp(-(3 * (a - b) + 0.5)))  # what is shown first is at an advantage
        content = "A" if p > 0.5 else "B"
        tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log1p(-p)}]
        logprobs = {"content": [tops["AB".index(content)] | {"top_logprobs": tops}]}
    body = {
        "choices": [{"message": {"content": content}, "logprobs": logprobs}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    response = {"status_code": 200, "body": body} if len(text) % 2 else body
    return json.dumps(
        {"id": "x", "custom_id": raw["custom_id"], "response": response, "error": None}
    )


def answered(root, form="listwise"):
    lines = []
    for path in sorted(root.glob("requests-*.jsonl")):
        lines += [fake_llm(line, form) for line in path.read_text("utf-8").splitlines()]
    return lines


def gather(data, *files, name="t", requests="", overwrite=False, rows_per_shard=1000, **options):
    common = TeachConfig(name=name, rows_per_shard=rows_per_shard, overwrite=overwrite)
    given = CollectConfig(results=",".join(map(str, files)), requests=str(requests), **options)
    return collecting.collect(data, common, given)


def put(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def scores_of(data, name="t"):
    """(user, item) -> score of a product."""
    teacher = preferences.load(data, name)
    users = np.repeat(np.arange(U), np.diff(teacher.offsets))
    return dict(
        zip(zip(users.tolist(), teacher.items.tolist(), strict=True), teacher.scores, strict=True)
    )


def log_rows(data, name="t"):
    """The log as a set of rows, whatever their order."""
    table, _ = answer_log.load_log(data, name)
    return sorted(map(str, table.to_pylist()))
