"""Requests by `custom_id`, and what is known of their answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class RequestIndex:
    """The requests of one directory, and which of them are answered.

    Attributes:
      requests, users, permutations: [R]; items of request r are
        `items[offsets[r]:offsets[r + 1]]`.
      answered: [R] bool, an answer was accepted; cut: [R] bool, and each ended too early.

    Shape letters: R requests.
    """

    def __init__(self, table: pa.Table) -> None:
        """`table`: schema.REQUESTS."""
        ids = [np.array(chunk.to_pylist(), "S") for chunk in table.column("custom_id").chunks]
        names = np.concatenate([np.zeros(0, "S1"), *ids])
        self._order = np.argsort(names, kind="stable")
        self._names = names[self._order]

        table = table.combine_chunks()
        self.requests, self.users, self.permutations = (
            table.column(name).to_numpy() for name in ("request", "user", "permutation")
        )
        lists = [chunk.flatten().to_numpy() for chunk in table.column("items").chunks]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column("items").chunks]
        self.items = np.concatenate([np.zeros(0, np.int32), *lists])
        self.offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()

        self.answered = np.zeros(self.requests.size, bool)
        self.cut = np.zeros(self.requests.size, bool)
        self._known: dict[tuple[int, int], tuple[int, bool]] = {}

    def find(self, custom_id: str) -> int | None:
        """The row of the request with this id."""
        name = custom_id.encode("utf-8", "surrogatepass")
        position = int(np.searchsorted(self._names, np.bytes_(name)))
        if position < self._names.size and self._names[position] == name:
            return int(self._order[position])
        return None

    def shown(self, row: int) -> np.ndarray:
        """Items of a request, as its prompt shows them."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def about(self, row: int) -> int:
        """The user that a request is about; of one without a user, its item."""
        user = int(self.users[row])
        return int(self.shown(row)[0]) if user < 0 else user

    def known(self, row: int, sample: int) -> tuple[int, bool] | None:
        """(digest, cut) of the answer that is held for one sample of a request."""
        return self._known.get((row, sample))

    def accept(self, row: int, sample: int, digest: int, *, cut: bool) -> None:
        """Hold an answer, in place of the one held before. A request is cut while all are."""
        self._known[row, sample] = (digest, cut)
        self.cut[row] = cut and (self.cut[row] or not self.answered[row])
        self.answered[row] = True

    def remember(self, answered: pa.Table) -> None:
        """Take over what a log holds of these requests (schema.ANSWERED); others are skipped."""
        rows_of = {int(request): row for row, request in enumerate(self.requests)}
        columns = (
            answered.column(name).to_pylist() for name in ("request", "sample", "digest", "cut")
        )
        for request, sample, digest, cut in zip(*columns, strict=True):
            if request in rows_of:
                self.accept(rows_of[request], sample, digest, cut=cut)
