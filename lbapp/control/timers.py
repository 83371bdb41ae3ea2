# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A timer wheel without a clock: many timers, each moved and cancelled in constant time.

Owns which item is due when. Never knows what an item is, and never reads the time. A heap of
timers would keep every cancelled timer until its time came: at ten thousand connections a
second that is most of the heap. Here an item is in exactly one slot, or in none.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar


class Timed:
    """What a timer can be set on; ``slot`` belongs to :class:`Timers`."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot: int | None = None


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """One timer an item, in slots of equal length.

    Args:
        grain: seconds a slot; a timer is due with its slot, up to one grain early and never late.
    """

    def __init__(self, grain: float) -> None:
        self._grain = grain
        self._slots: dict[int, dict[T, None]] = {}
        self._order: list[int] = []

    def _slot(self, at: float) -> int:
        return int(at / self._grain + 1e-6)  # 0.3 / 0.05 is a little less than 6

    def schedule(self, item: T, at: float) -> None:
        """Set the item's only timer, in place of the one it had."""
        slot = self._slot(at)
        if item.slot == slot:
            return
        if item.slot is not None:
            del self._slots[item.slot][item]
        items = self._slots.get(slot)
        if items is None:
            items = self._slots[slot] = {}
            heapq.heappush(self._order, slot)
        items[item] = None
        item.slot = slot

    def cancel(self, item: T) -> None:
        """Take the item's timer away, if it has one."""
        if item.slot is not None:
            # An empty slot stays until its time: removing it here would leave its number in
            # the heap, once more with each set and cancel.
            del self._slots[item.slot][item]
            item.slot = None

    def due(self, now: float, limit: int) -> list[T]:
        """Take up to ``limit`` items whose time has come, earliest slot first; they have no timer then."""
        last = self._slot(now)
        taken: list[T] = []
        while self._order and self._order[0] <= last:
            items = self._slots[self._order[0]]
            batch = list(itertools.islice(items, limit - len(taken)))
            taken += batch
            if len(batch) < len(items):
                for item in batch:
                    del items[item]
                break
            del self._slots[heapq.heappop(self._order)]
        for item in taken:
            item.slot = None
        return taken
