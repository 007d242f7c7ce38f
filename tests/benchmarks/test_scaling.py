"""benchmarks/speed/scaling.py: sizes, memory of a row, the picture; no speed is asserted."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import scaling

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"


def test_one_table_grows_at_a_time():
    users, items = (scaling.size_of(vary, 77, 1000) for vary in ("users", "items"))
    assert (users.users, users.items) == (77, 27_000)
    assert (items.users, items.items) == (138_000, 77)
    assert users.interactions == items.interactions == 1000


def test_memory_of_a_row_is_measured_against_the_smallest_size():
    rows = [
        {"users": users, "items": 5, "state_mb": state_mb, "stated_bytes_per_row": 260}
        for users, state_mb in ((10, 100.0), (10_010, 90.0), (1_000_010, 360.0))
    ]
    measured = [row["measured_bytes_per_row"] for row in scaling.with_slopes(rows)]
    assert measured == [None, None, pytest.approx(260.0)]  # 2.6 MB more cannot be told from noise


@pytest.mark.slow
def test_scaling_draws_and_prints(tmp_path):
    picture, out = tmp_path / "scaling.png", tmp_path / "rows.json"
    command = [sys.executable, str(SPEED / "scaling.py"), f"--out={picture}", f"--json={out}"]
    command += ["--table_rows=300,600,100000000", "--vary=users", "--interactions=2000"]
    command += ["--repeats=1", "--seconds=0", "--table_optimizer=sgd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())
    assert [row["users"] for row in rows] == [300, 600]
    assert [row["stated_bytes_per_row"] for row in rows] == [260, 260]
    assert "100,000,000 users: left out, 26.0 GB > --max_gb" in done.stdout
