"""What a dataset is, as one word each: its ids, and its split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from slgr_jax.data.schema import PARTS


def id_map_hash(user_ids: pa.Array, item_ids: pa.Array) -> str:
    """SHA-256 over the external ids, length-prefixed, users then items, in index order."""
    digest = hashlib.sha256()
    for ids in (user_ids, item_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        for value in ids.to_pylist():
            data = value.encode()
            digest.update(len(data).to_bytes(4, "little"))
            digest.update(data)
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
