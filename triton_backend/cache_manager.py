"""Which sequence owns which row of the key/value cache. Standard library only; the tensors are kv_cache.py's.

A decode step runs over rows 0…highest used in one go, so rows are handed out lowest first, and a hole left by a
finished sequence is filled by the next request or, when none comes, by moving the topmost row down. A row within that
range that is not decoding (still prefilling, or a hole) rides along as an idle lane.

    row    0    1    2    3    4  …  max_num_seqs − 1   max_num_seqs
           A    B    ·    C    ·            ·              probe row
                     ▲    └── compact: C moves to 2        (never decodes)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from triton_backend.sequence import Sequence


@dataclass(frozen=True)
class RowMove:
    """Keys and values of ``sequence`` go from row ``source`` to row ``target``; done by the runner before it runs."""

    sequence: Sequence
    source: int
    target: int


class CacheManager:
    """Owner of the row table; used by the scheduler, on the engine thread."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.probe_row = max_num_seqs
        self._free = list(range(max_num_seqs))
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._owners)

    def allocate(self, sequence: Sequence) -> None:
        """Give ``sequence`` the lowest free row; the caller has checked ``num_free``."""
        sequence.row = heapq.heappop(self._free)
        self._owners[sequence.row] = sequence

    def release(self, sequence: Sequence) -> None:
        owner = self._owners.pop(sequence.row)
        assert owner is sequence, f"row {sequence.row} is not owned by the sequence that frees it"
        heapq.heappush(self._free, sequence.row)
        sequence.row = -1

    def compact(self) -> RowMove | None:
        """Move the topmost used row into the lowest hole below it, if there is one."""
        if not self._owners or not self._free:
            return None
        source, target = max(self._owners), self._free[0]
        if target > source:
            return None
        sequence = self._owners.pop(source)
        heapq.heapreplace(self._free, source)
        self._owners[target] = sequence
        sequence.row = target
        return RowMove(sequence, source, target)

    def check_integrity(self) -> None:
        """Raise AssertionError if a row is lost, owned twice or known differently by its sequence; run by tests."""
        used, free = set(self._owners), set(self._free)
        assert len(free) == len(self._free) and not used & free
        assert used | free == set(range(self.max_num_seqs))
        assert all(sequence.row == row for row, sequence in self._owners.items())
