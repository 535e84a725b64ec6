"""Which sequence owns which row of the key/value cache, and what else the rows hold that a later prompt may share.
Standard library only; the tensors are kv_cache.py's.

A decode step runs over rows 0…highest used in one go, so rows are handed out lowest first, and a hole left by a
finished sequence is filled by the next request or, when none comes, by moving the topmost row down. A row within that
range that is not decoding (still prefilling, or a hole) rides along as an idle lane.

    row    0    1    2    3    4  …  max_num_seqs − 1   max_num_seqs
           A    B    ·    C    ·            ·              probe row
                     ▲    └── compact: C moves to 2        (never decodes)

A free row keeps its prompt's keys and values (``RowContent``) until it is needed. Before it is overwritten they move to
the free row that was used least recently, so that nothing useful is lost while any row is idle. A prompt then copies
its longest common prefix with any row, busy or free, instead of computing it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from triton_backend.sequence import Sequence

MIN_SHARED_TOKENS = 16
"""Shorter prefixes are computed: not worth a row's place, nor a copy."""


@dataclass(frozen=True)
class RowCopy:
    """Positions ``start``…``end − 1`` of row ``source`` go to the same positions of row ``target``."""

    source: int
    target: int
    start: int
    end: int


@dataclass(frozen=True)
class RowMove:
    """``sequence`` and everything of it go from row ``source`` to row ``target``."""

    sequence: Sequence
    source: int
    target: int


@dataclass
class RowContent:
    """What a row holds: keys and values of ``token_ids``, computed with ``adapter``. Larger ``used`` is more recent."""

    token_ids: tuple[int, ...]
    adapter: Any
    used: int


class CacheManager:
    """Owner of the row table; used by the scheduler, on the engine thread.

    ``shares_generated``: generated tokens may be shared, too. Their keys and values were computed one by one and may
    differ from a prompt's in the last bits.
    """

    def __init__(self, max_num_seqs: int, enable_prefix_caching: bool = True, shares_generated: bool = False) -> None:
        self.max_num_seqs = max_num_seqs
        self.probe_row = max_num_seqs
        self._enable_prefix_caching = enable_prefix_caching
        self._shares_generated = shares_generated
        self._free = list(range(max_num_seqs))
        self._owners: dict[int, Sequence] = {}
        self._contents: dict[int, RowContent] = {}
        self._clock = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._owners)

    def allocate(self, sequence: Sequence) -> list[RowCopy]:
        """Give ``sequence`` the lowest free row; the caller has checked ``num_free``. The copies come first."""
        row, _ = self._best_match(sequence)
        if row in self._contents:  # so that it is not the one to make way for others
            self._contents[row].used = self._tick()
        row = sequence.row = heapq.heappop(self._free)
        self._owners[row] = sequence
        content = self._contents.pop(row, None)
        if content is None:
            return []
        # What the row holds may be just what this sequence needs: then it stays.
        if (
            sequence is sequence.state.lead
            and sequence.num_computed == 0
            and (length := self._usable_length(sequence, content))
        ):
            sequence.num_computed = length
            if length == len(content.token_ids):
                return []
        return self._save_content(row, content)

    def share_prefix(self, sequence: Sequence) -> RowCopy | None:
        """The copy that saves ``sequence``, whose prompt is to be computed next, the most; None if there is none."""
        row, length = self._best_match(sequence)
        if length <= sequence.num_computed:
            return None
        copy = RowCopy(row, sequence.row, sequence.num_computed, length)
        sequence.num_computed = length
        return copy

    def release(self, sequence: Sequence) -> int:
        """Take the row back; returns how many of its tokens are worth keeping where they are."""
        row, owner = sequence.row, self._owners.pop(sequence.row)
        assert owner is sequence, f"row {row} is not owned by the sequence that frees it"
        content = self._content_of(sequence)
        sequence.row = -1
        is_kept = len(content.token_ids) >= MIN_SHARED_TOKENS and not self._is_held(content)
        if is_kept:
            self._contents[row] = content
        heapq.heappush(self._free, row)
        return len(content.token_ids) if is_kept else 0

    def compact(self) -> list[RowCopy | RowMove]:
        """Move the topmost used row into the lowest hole below it; empty if there is none."""
        if not self._owners or not self._free:
            return []
        source, target = max(self._owners), self._free[0]
        if target > source:
            return []
        content = self._contents.pop(target, None)
        copies: list[RowCopy | RowMove] = [*self._save_content(target, content)] if content else []
        sequence = self._owners.pop(source)
        heapq.heapreplace(self._free, source)
        self._owners[target] = sequence
        sequence.row = target
        return [*copies, RowMove(sequence, source, target)]

    def forget_contents(self) -> None:
        """What free rows hold is not sure: what was planned for them was perhaps not carried out."""
        self._contents.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError if a row is lost, owned twice or known differently by its sequence; run by tests."""
        used, free = set(self._owners), set(self._free)
        assert len(free) == len(self._free) and not used & free
        assert used | free == set(range(self.max_num_seqs))
        assert all(sequence.row == row for row, sequence in self._owners.items())
        assert set(self._contents) <= free
        assert all(len(content.token_ids) >= MIN_SHARED_TOKENS for content in self._contents.values())

    def _save_content(self, row: int, content: RowContent) -> list[RowCopy]:
        """Keep ``content``, whose ``row`` will be overwritten, in another free row, unless all of those are newer."""
        if self._is_held(content):
            return []
        spare = [free for free in self._free if free != row]
        oldest = min(spare, key=lambda free: self._contents[free].used if free in self._contents else -1, default=None)
        if oldest is None or (oldest in self._contents and self._contents[oldest].used > content.used):
            return []
        self._contents[oldest] = content
        return [RowCopy(row, oldest, 0, len(content.token_ids))]

    def _is_held(self, content: RowContent) -> bool:
        """Whether some other row holds all of it."""
        return any(
            other.adapter == content.adapter and other.token_ids[: len(content.token_ids)] == content.token_ids
            for _, other in self._all_contents()
            if other is not content
        )

    def _best_match(self, sequence: Sequence) -> tuple[int, int]:
        """The row, other than its own, that holds most of a sequence's prompt, and how many tokens; 0 if none does."""
        matches = [
            (self._usable_length(sequence, content), row)
            for row, content in self._all_contents()
            if row != sequence.row
        ]
        length, row = max(matches, default=(0, -1))
        return row, length

    def _all_contents(self) -> Iterator[tuple[int, RowContent]]:
        yield from self._contents.items()
        for row, owner in self._owners.items():
            yield row, self._content_of(owner)

    def _content_of(self, sequence: Sequence) -> RowContent:
        """What another prompt may share of a sequence's row; nothing if it depends on a source text, too."""
        token_ids = sequence.computed_ids() if self._shares_generated else sequence.prompt_ids[: sequence.num_computed]
        if not self._enable_prefix_caching or sequence.state.source_ids:
            token_ids = ()
        return RowContent(token_ids, sequence.state.adapter, self._tick())

    def _usable_length(self, sequence: Sequence, content: RowContent) -> int:
        """How much of ``content`` a sequence can use for its prompt, leaving a token to compute; 0 if too little."""
        state = sequence.state
        # Log probabilities of the prompt need every position computed.
        if content.adapter != state.adapter or state.source_ids or state.params.prompt_logprobs is not None:
            return 0
        limit = min(len(content.token_ids), sequence.num_prompt_tokens - 1)
        length = common_prefix_length(sequence.prompt_ids, content.token_ids, limit)
        return length if length >= MIN_SHARED_TOKENS else 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def common_prefix_length(a: Items[int], b: Items[int], limit: int) -> int:
    """How many of the first ``limit`` elements are equal: by halving, since comparing slices is fast."""
    low, high = 0, max(limit, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
