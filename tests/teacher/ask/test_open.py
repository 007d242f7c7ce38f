"""Requests that are still open are written again, under the same ids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slgr_jax.config import CandidateConfig, RequestConfig
from slgr_jax.data import schema
from slgr_jax.errors import InputError
from slgr_jax.teacher.ask import asking, candidates, prompts, requests


@pytest.fixture
def written(make_dataset, tmp_path):
    """`written(**options)` -> (directory, manifest) of pointwise requests."""
    rng = np.random.default_rng(3)
    data = make_dataset(
        users=[f"u{u}" for u in range(9)],
        items=[f"i{i}" for i in range(30)],
        titles=[f"Film {i}" for i in range(30)],
        train={user: sorted(rng.permutation(30)[:6].tolist()) for user in range(9)},
        valid={},
        test={},
    )
    lines = prompts.item_lines(data)
    sizes = CandidateConfig(candidates=5, cold_candidates=0, tail_users=0, popular_pool=30)
    drawn = candidates.draw(data, lines, sizes, seed=0)
    candidates.write(data, "c", drawn, sizes, seed=0, diversity="-")
    drawn, source = candidates.load(data, "c")

    def write(**options):
        options = RequestConfig(**({"prompt": "pointwise", "requests_per_file": 20} | options))
        asker = asking.asker(data, drawn, lines, options, 0)
        root = tmp_path / "r"
        return root, requests.write(asker, asking.plan(asker), source, root, model="m")

    return write


def test_open_requests_keep_their_ids_and_cut_ones_get_more_tokens(written):
    root, manifest = written()
    lines = list(requests.read_lines(root, manifest))
    some = lines[3::2]
    assert len(some) > 20
    factors = {line["custom_id"]: 1 + k % 3 for k, line in enumerate(some)}
    files = requests.write_open(root, manifest, factors)
    assert [path.name for path in files] == [
        f"requests-open-{k:05d}.jsonl" for k in range(-(-len(some) // 20))
    ]
    again = [json.loads(line) for path in files for line in path.read_bytes().splitlines()]
    for before, after in zip(some, again, strict=True):
        most = before["body"]["max_tokens"] * factors[before["custom_id"]]
        assert after == before | {"body": before["body"] | {"max_tokens": most}}

    assert requests.write_open(root, manifest, {some[0]["custom_id"]: 2}) == files[:1]
    assert len(list(root.glob("requests-open-*"))) == 1
    assert written()[1] == manifest  # requests written again leave the open ones
    assert files[0].is_file()
    assert requests.write_open(root, manifest, {}) == []
    assert not list(root.glob("requests-open-*"))
    assert requests.report_open([], 0).startswith("no request is open")


def test_options_that_ask_nothing_else_leave_requests_as_they_are(written):
    root, manifest = written()
    assert written(price_in=2.0, more_tokens=4)[1].fingerprint == manifest.fingerprint
    assert written(max_requests=100_000)[1].fingerprint == manifest.fingerprint
    with pytest.raises(InputError, match="holds other requests"):
        written(max_requests=int(manifest.plan["requests"]) - 1)
    assert schema.read_request_manifest(root).fingerprint == manifest.fingerprint
