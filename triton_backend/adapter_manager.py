"""Which adapter lies in which slot of the graph, and how many running requests use it. Standard library only; the
matrices are adapter_slots.py's.

    slot     1          2          3
           summary    legal        ·         a request with a new adapter takes the free slot, or else that of the
           3 users    unused                 adapter that has been unused for longest; if all are in use, it waits
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterRef:
    """One state of an adapter; ``digest`` is its manifest's."""

    name: str
    digest: str


@dataclass(frozen=True)
class AdapterPlacement:
    """``slot`` 0 is no adapter. ``needs_load``: what lies in the slot is to be replaced."""

    slot: int
    needs_load: bool


NO_ADAPTER = AdapterPlacement(0, needs_load=False)


class AdapterManager:
    """Owner of the slot table; used by the scheduler, on the engine thread."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(range(num_slots, 0, -1))
        self._slots: dict[AdapterRef, int] = {}
        self._num_users: dict[AdapterRef, int] = {}
        self._unused: OrderedDict[AdapterRef, None] = OrderedDict()

    @property
    def active(self) -> tuple[str, ...]:
        """Names of adapters that running requests use."""
        return tuple(sorted({ref.name for ref in self._num_users}))

    def can_acquire(self, ref: AdapterRef | None) -> bool:
        return ref is None or ref in self._slots or bool(self._free or self._unused)

    def acquire(self, ref: AdapterRef | None) -> AdapterPlacement:
        """A slot for one more request with ``ref``; the caller has asked ``can_acquire``."""
        if ref is None:
            return NO_ADAPTER
        needs_load = ref not in self._slots
        if needs_load:
            self._slots[ref] = self._free.pop() if self._free else self._evict()
        self._unused.pop(ref, None)
        self._num_users[ref] = self._num_users.get(ref, 0) + 1
        return AdapterPlacement(self._slots[ref], needs_load)

    def release(self, ref: AdapterRef | None) -> None:
        """One request less; the adapter stays in its slot until that is needed."""
        if ref is None:
            return
        self._num_users[ref] -= 1
        if not self._num_users[ref]:
            del self._num_users[ref]
            if ref in self._slots:
                self._unused[ref] = None

    def forget(self, ref: AdapterRef) -> None:
        """``ref`` could not be loaded: its slot holds nothing that may be used."""
        self._free.append(self._slots.pop(ref))
        self._unused.pop(ref, None)

    def forget_all(self) -> None:
        """Nothing is in use, and what lies in the slots is not sure."""
        assert not self._num_users
        for ref in tuple(self._slots):
            self.forget(ref)

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost or given twice; run by tests."""
        assert sorted((*self._free, *self._slots.values())) == list(range(1, self._num_slots + 1))
        assert set(self._unused) == set(self._slots) - set(self._num_users)
        assert all(count > 0 for count in self._num_users.values())

    def _evict(self) -> int:
        ref, _ = self._unused.popitem(last=False)
        return self._slots.pop(ref)
