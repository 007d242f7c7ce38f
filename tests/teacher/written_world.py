"""A small world that an LLM writes about, its requests, and a stub that answers them by rule."""

from __future__ import annotations

import json

from slgr_jax.config import CollectConfig, RequestConfig, TeachConfig, TextConfig
from slgr_jax.data import schema
from slgr_jax.teacher.ask import asking_texts, requests
from slgr_jax.teacher.collect import text_collecting

USERS, ITEMS = 6, 8
WORDS = "abcde"


def make_world(make_dataset, folder="data", **changes):
    """6 users of 1 to 6 training items, 8 items; user 5 has no training item."""
    parts = {
        "users": [f"u{u}" for u in range(USERS)],
        "items": [f"i{i}" for i in range(ITEMS)],
        "titles": [f"Film {i}" for i in range(ITEMS)],
        "train": {u: list(range(u + 1)) for u in range(5)},
        "valid": {0: [6]},
        "test": {1: [7]},
    }
    return make_dataset(folder, **(parts | changes))


def ask(data, name="t", prompt="user_profile", factors="", **options):
    """Write requests named `name`; their directory."""
    texts = TextConfig(factors=factors)
    asker = asking_texts.asker(data, RequestConfig(prompt=prompt, **options), texts)
    root = requests.directory(data.path, name)
    asking_texts.write(asker, asking_texts.plan(asker), root, model="fake")
    return root


def ids(root):
    """The custom_id of each request, in order."""
    manifest = schema.read_request_manifest(root)
    return [line["custom_id"] for line in requests.read_lines(root, manifest)]


def text_of(row, field=0):
    """What the stub writes about a row: as many words as the row's number and 2, by field."""
    return " ".join([WORDS[field], *[WORDS[row % 5]] * (row + 1)])


def result(custom_id, content, finish="stop"):
    """A result line of the batch API."""
    body = {
        "choices": [{"message": {"content": content}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    response = {"status_code": 200, "body": body}
    return json.dumps({"custom_id": custom_id, "response": response, "error": None})


def answered(root):
    """The result of each request as the stub writes it."""
    manifest = schema.read_request_manifest(root)
    fields = manifest.plan["fields"]
    lines = []
    for row in requests.load_index(root, manifest).to_pylist():
        about = row["user"] if row["user"] >= 0 else row["items"][0]
        texts = {field: text_of(about, place) for place, field in enumerate(fields)}
        lines.append(result(row["custom_id"], json.dumps(texts)))
    return lines


def put(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gather(data, *files, name="t", requests="", **common):
    """Collect; the product, and what was told."""
    options = CollectConfig(results=",".join(map(str, files)), requests=str(requests))
    return text_collecting.collect(data, TeachConfig(name=name, **common), options)


def held(product):
    """(row, field) -> text of a product."""
    return {(line["row"], line["field"]): line["text"] for line in product.table.to_pylist()}
