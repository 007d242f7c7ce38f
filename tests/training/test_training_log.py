"""The log of a run: resumed as if nothing had happened, lines through logging, a callback."""

from __future__ import annotations

import io
import json
import logging
import pathlib

import pytest

from slgr_jax.training import training_log
from slgr_jax.training.training_log import LOG, TrainingLog, TrainingProgress


def _write(root: pathlib.Path, steps: range, *, start: int = 0) -> None:
    with TrainingLog(str(root), epoch=start, total=100, trackers=None) as journal:
        for step in steps:
            journal.record(step, {"epoch": step, "loss": step / 4}, f"step {step}")
            journal.advance(step)


def _steps(root: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (root / LOG).read_text().splitlines()]


def test_a_record_is_one_line_with_its_step_and_time(tmp_path):
    _write(tmp_path, range(1, 3))
    first, second = map(json.loads, (tmp_path / LOG).read_text().splitlines())
    assert {k: v for k, v in first.items() if k != "time"} == {"step": 1, "epoch": 1, "loss": 0.25}
    assert second["time"] >= first["time"] > 1e9


def test_a_record_is_on_the_disk_before_the_next_one(tmp_path):
    with TrainingLog(str(tmp_path), epoch=0, total=9, trackers=None) as journal:
        journal.record(3, {}, "")
        assert _steps(tmp_path) == [3]


def test_records_past_the_checkpoint_are_dropped(tmp_path):
    _write(tmp_path, range(1, 6))
    _write(tmp_path, range(4, 7), start=3)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_validation_logged_but_not_saved_is_dropped(tmp_path):
    """A checkpoint of its last step may exist that does not count it as done."""
    _write(tmp_path, range(1, 4))
    with TrainingLog(str(tmp_path), epoch=2, total=9, trackers=None) as journal:
        journal.record(3, {"epoch": 3}, "")
    assert _steps(tmp_path) == [1, 2, 3]


def test_a_run_that_starts_anew_drops_them_all(tmp_path):
    _write(tmp_path, range(1, 6))
    _write(tmp_path, range(1, 3))
    assert _steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [b'{"epoch": 3, "ti', b"\xff\xfe\x00", b"3", b"[]", b'{"epoch": "3"}', b"{}", b"null"],
    ids=repr,
)
def test_what_a_kill_cut_short_is_dropped_with_all_after_it(tmp_path, damage):
    _write(tmp_path, range(1, 3))
    kept = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(kept + damage + b"\n" + kept)
    _write(tmp_path, range(0), start=50)
    assert (tmp_path / LOG).read_bytes() == kept


def test_lines_are_logged_and_nothing_is_printed(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO, logger="slgr_jax"):
        _write(tmp_path, range(1, 4))
    assert [record.getMessage() for record in caplog.records] == ["step 1", "step 2", "step 3"]
    assert {record.name.split(".")[0] for record in caplog.records} == {"slgr_jax"}
    assert capfd.readouterr() == ("", "")


def test_lines_go_to_one_stream_for_a_while(tmp_path, caplog):
    logger = logging.getLogger("slgr_jax")
    stream = io.StringIO()
    with caplog.at_level(logging.DEBUG, logger="slgr_jax"):
        before = (list(logger.handlers), logger.level, logger.propagate)
        with training_log.lines_to(stream):
            _write(tmp_path, range(1, 3))
            logger.debug("too much")
        assert (list(logger.handlers), logger.level, logger.propagate) == before
        logger.info("again")
    assert stream.getvalue() == "step 1\nstep 2\n"
    assert [record.getMessage() for record in caplog.records] == ["again"]


def test_a_listener_hears_of_steps_and_of_validations(tmp_path):
    heard = []
    with training_log.listening(heard.append):
        _write(tmp_path, range(1, 3))
    _write(tmp_path, range(3, 4), start=2)  # nobody listens any more
    where = str(tmp_path)
    assert heard == [
        TrainingProgress(where, 1, 100, {"epoch": 1, "loss": 0.25}),
        TrainingProgress(where, 1, 100),
        TrainingProgress(where, 2, 100, {"epoch": 2, "loss": 0.5}),
        TrainingProgress(where, 2, 100),
    ]


def test_what_a_listener_raises_ends_the_run_with_its_records_kept(tmp_path):
    def stop(progress):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"), training_log.listening(stop):
        _write(tmp_path, range(1, 3))
    assert _steps(tmp_path) == [1]


def test_nothing_is_left_beside_the_log(tmp_path):
    _write(tmp_path, range(1, 3))
    _write(tmp_path, range(3, 4), start=2)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
