# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What happened to members, pools and switches, newest last, for people and programs to read.

Owns the bounded list and its numbers, which only grow. Has no clock: times are the caller's.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

MOST = 10_000


class EventKind(enum.Enum):
    """What an event is about."""

    MEMBER_UP = "member_up"
    MEMBER_DOWN = "member_down"
    MEMBER_DAMPED = "member_damped"
    MEMBER_DRAINING = "member_draining"
    MEMBER_DRAINED = "member_drained"
    MEMBER_SLOW_START = "member_slow_start"
    MEMBER_FAILED = "member_failed"
    MEMBER_OVERRIDDEN = "member_overridden"
    PRIORITY = "priority"
    FALLBACK = "fallback"
    DISTRIBUTION = "distribution"
    SWITCH = "switch"
    SWITCH_DRAINING = "switch_draining"
    SWITCH_DRAINED = "switch_drained"


class Event(NamedTuple):
    """One of them. ``at`` is in the caller's seconds; ``pool`` and ``member`` are names for people, or empty."""

    number: int
    at: float
    kind: EventKind
    pool: str
    member: str
    text: str


class Events:
    """The latest events.

    Args:
        most: older ones than so many are forgotten.
    """

    def __init__(self, most: int = MOST) -> None:
        self._kept: deque[Event] = deque(maxlen=most)
        self._next = 1

    def add(self, at: float, kind: EventKind, text: str, pool: str = "", member: str = "") -> Event:
        """Something happened."""
        event = Event(self._next, at, kind, pool, member, text)
        self._next += 1
        self._kept.append(event)
        return event

    def __len__(self) -> int:
        return len(self._kept)

    def since(self, number: int) -> Iterator[Event]:
        """Those after an event's number, oldest first."""
        if number + 1 <= self._next - len(self._kept):
            return iter(tuple(self._kept))
        skip = len(self._kept) - (self._next - 1 - number)
        return iter(tuple(self._kept)[max(0, skip):])
