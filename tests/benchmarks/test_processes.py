"""The table of several processes: its efficiency is by round, per device, and of the same work."""

from __future__ import annotations

import processes


def row(count, devices, triples, seconds, processor, **more):
    arrangement = processes.Arrangement(count, devices, 8, **more)
    measured = {"triples": triples, "seconds": seconds, "processor_s": processor}
    return {"backbone": "mf", **vars(arrangement), **measured}


def test_efficiency_is_of_the_turns_of_the_same_round():
    alone = row(1, 1, [100, 100, 100], [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])  # the machine slows down
    two = row(2, 1, [200, 200, 200], [1.25, 2.5, 5.0], [4.0, 4.0, 4.0], scaling="weak")
    first, second = processes.shown([alone, two])
    assert (first["times 1 x 1"], first["efficiency"]) == ("1.00 (1.00-1.00)", "1.00")
    assert second["processes x devices"] == "2 x 1"
    assert second["cores"] == 2
    assert second["times 1 x 1"] == "1.60 (1.60-1.60)"
    assert second["efficiency"] == "0.80"
    assert second["work"] == "0.50"
    assert second["batch"] == "8 weak"


def test_every_arrangement_has_the_cores_of_its_devices():
    """And the first is one device, by the programs that several run."""
    first, *others = processes.arrangements(64)
    assert (first.processes, first.devices, first.kernels) == (1, 1, "xla")
    several = [each for each in others if each.processes * each.devices == 2]
    assert {each.kernels for each in several} == {"xla"}
    assert {(each.batch, each.scaling) for each in several} == {(64, "strong"), (128, "weak")}
    assert {each.table_shards for each in several} == {1, 2}
    assert len(several) == 8
