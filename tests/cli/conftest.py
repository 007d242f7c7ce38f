"""The small dataset directories of the teacher's tests."""

from teacher.conftest import make_dataset, tiny

__all__ = ["make_dataset", "tiny"]
