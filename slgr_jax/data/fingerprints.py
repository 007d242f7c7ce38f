"""What a dataset is, as one word each: its ids, and its split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.data.schema import PARTS
from slgr_jax.files import PathLike

_AT_ONCE = 1 << 20  # ids or rows that are looked at together


def id_map_hash(user_ids: pa.Array, item_ids: pa.Array) -> str:
    """SHA-256 over the external ids, length-prefixed, users then items, in index order."""
    digest = hashlib.sha256()
    for ids in (user_ids, item_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        for first in range(0, len(ids), _AT_ONCE):
            encoded = [value.encode() for value in ids.slice(first, _AT_ONCE).to_pylist()]
            digest.update(b"".join(len(data).to_bytes(4, "little") + data for data in encoded))
    return digest.hexdigest()


def split_hash(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """SHA-256 over the (user, item) pairs of each part, in (user, item) order.

    Args:
      pairs: part name -> (users, items), int32 arrays of one length, any order.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        users, items = pairs[part]
        order = np.lexsort((items, users))
        digest.update(part.encode())
        digest.update(np.ascontiguousarray(users[order], dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(items[order], dtype="<i4").tobytes())
    return digest.hexdigest()


def items_by_user(users: np.ndarray, items: np.ndarray) -> bytes:
    """What `split_hash_of` reads: the items of rows in (user, item) order, as little-endian int32.

    Args:
      users, items: [n] int32 of one part, any order.
    """
    if not users.size:
        return b""
    width, first = int(items.max()) + 1, int(users.min())
    keys = (users.astype(np.int64) - first) * width + items
    keys.sort()
    return np.asarray(keys % width, dtype="<i4").tobytes()


def split_hash_of(parts: Mapping[str, tuple[np.ndarray, PathLike]]) -> str:
    """`split_hash` of rows that are not in memory.

    Args:
      parts: part name -> ([U] rows of each user, a file of `items_by_user` of all users in order).
    """
    digest = hashlib.sha256()
    for part in PARTS:
        counts, path = parts[part]
        digest.update(part.encode())
        ends = np.cumsum(counts, dtype=np.int64)
        first = 0
        while first < counts.size:
            begun = int(ends[first - 1]) if first else 0
            last = max(int(np.searchsorted(ends, begun + _AT_ONCE, "right")), first + 1)
            users = np.repeat(np.arange(first, last, dtype="<i4"), counts[first:last])
            digest.update(users.tobytes())
            first = last
        with open(path, "rb") as file:
            while block := file.read(4 * _AT_ONCE):
                digest.update(block)
    return digest.hexdigest()
