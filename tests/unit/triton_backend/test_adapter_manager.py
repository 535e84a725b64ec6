"""Whatever comes and goes: no slot is lost or shared, and only an adapter that nobody uses makes way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_backend.adapter_manager import AdapterManager, AdapterRef

pytestmark = pytest.mark.unit

REFS = [AdapterRef(name, digest) for name in "abc" for digest in ("1", "2")]
STEPS = st.lists(st.tuples(st.sampled_from(["acquire", "release", "fail", "forget_all"]), st.integers(0, 99)))


class Slots:
    """The same table, told slowly: slot → adapter, one entry per user, and the unused, longest first."""

    def __init__(self, num_slots: int) -> None:
        self.manager = AdapterManager(num_slots)
        self.num_slots = num_slots
        self.loaded: dict[int, AdapterRef] = {}
        self.users: list[AdapterRef] = []
        self.unused: list[AdapterRef] = []

    def acquire(self, ref: AdapterRef) -> None:
        is_loaded = ref in self.loaded.values()
        has_room = len(self.loaded) < self.num_slots or bool(self.unused)
        assert self.manager.can_acquire(ref) == (is_loaded or has_room)
        if not is_loaded and not has_room:
            return
        placement = self.manager.acquire(ref)
        assert placement.needs_load != is_loaded
        if is_loaded:
            assert self.loaded[placement.slot] == ref
        elif len(self.loaded) < self.num_slots:
            assert placement.slot not in self.loaded
        else:
            assert self.loaded[placement.slot] == self.unused.pop(0)
        assert 1 <= placement.slot <= self.num_slots
        self.loaded[placement.slot] = ref
        self.users.append(ref)
        self.unused = [other for other in self.unused if other != ref]

    def release(self, ref: AdapterRef) -> None:
        self.manager.release(ref)
        self.users.remove(ref)
        if ref not in self.users:
            self.unused.append(ref)

    def fail(self, ref: AdapterRef) -> None:
        """It cannot be loaded: its requests are removed, and then its slot is free."""
        for user in [user for user in self.users if user == ref]:
            self.release(user)
        self.manager.forget(ref)
        self.forgotten(ref)

    def forget_all(self) -> None:
        for user in tuple(self.users):
            self.release(user)
        self.manager.forget_all()
        for ref in tuple(self.unused):
            self.forgotten(ref)

    def forgotten(self, ref: AdapterRef) -> None:
        self.unused.remove(ref)
        self.loaded = {slot: other for slot, other in self.loaded.items() if other != ref}

    def check(self) -> None:
        self.manager.check_integrity()
        assert self.manager.active == tuple(sorted({ref.name for ref in self.users}))
        for ref in REFS:
            assert self.manager.can_acquire(ref) or (ref not in self.loaded.values() and not self.unused)


@given(st.integers(1, 4), STEPS)
def test_slots_stay_whole_and_only_the_adapter_unused_for_longest_makes_way(num_slots, steps):
    slots = Slots(num_slots)
    for name, number in steps:
        if name == "acquire":
            slots.acquire(REFS[number % len(REFS)])
        elif name == "forget_all":
            slots.forget_all()
        elif slots.users:
            getattr(slots, name)(slots.users[number % len(slots.users)])
        slots.check()


@given(st.integers(0, 3))
def test_requests_without_an_adapter_need_no_slot(num_slots):
    manager = AdapterManager(num_slots)
    for _ in range(num_slots + 2):
        assert manager.can_acquire(None)
        assert (manager.acquire(None).slot, manager.acquire(None).needs_load) == (0, False)
    manager.release(None)
    assert manager.active == ()
    manager.check_integrity()


def test_a_version_without_slots_never_has_room():
    assert not AdapterManager(0).can_acquire(REFS[0])


def test_an_adapter_waits_while_all_slots_are_in_use():
    manager = AdapterManager(2)
    a, b, c = REFS[:3]
    for ref in (a, b, b):
        manager.acquire(ref)
    manager.release(b)
    assert not manager.can_acquire(c)
    manager.release(b)
    assert manager.can_acquire(c)
    assert manager.acquire(c).slot == 2
    assert not manager.can_acquire(b)


@pytest.mark.parametrize("damage", [lambda m: m._free.pop(), lambda m: m._free.append(1)])
def test_a_slot_that_is_lost_or_given_twice_is_noticed(damage):
    manager = AdapterManager(3)
    manager.acquire(REFS[0])
    damage(manager)
    with pytest.raises(AssertionError):
        manager.check_integrity()
