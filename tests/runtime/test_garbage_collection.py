"""Garbage is collected at the given iterations only."""

from __future__ import annotations

import gc
import weakref

from megatron_vlm.runtime.garbage_collection import ScheduledCollection


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def _dead_cycle() -> weakref.ref[_Cycle]:
    return weakref.ref(_Cycle())


def test_cycles_are_collected_every_interval() -> None:
    collection = ScheduledCollection(3)
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        cycle = _dead_cycle()
        for iteration in (1, 2):
            collection.after(iteration)
            assert cycle() is not None
        collection.after(3)
        assert cycle() is None
    finally:
        collection.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python() -> None:
    collection = ScheduledCollection(0)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    collection.after(1)
    collection.close()
    assert gc.isenabled()
