"""The world that tests of collecting share."""

from __future__ import annotations

import pytest
from teacher.collect import asked_world


@pytest.fixture
def world(make_dataset):
    """12 users, 40 items and a candidate set named c."""
    return asked_world.make_world(make_dataset)
