# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What was counted: connections and traffic by virtual server, member and switch, and refusals.

Owns the counters, and the estimates made of them: how long a member takes, and what it carried
lately. Never decides anything from them. Counters exist from their first use and are forgotten
with what they count, so there are never more than resources configured.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from math import exp, log
from typing import NamedTuple

from lbapp.control.messages import Closed, Error, Reason

DECAY = 10.0
"""Seconds in which what was measured loses 1 - 1/e of its weight."""

RISE, FALL = 8, 32
"""Connections in which it loses the same: to longer response times, and to shorter ones."""

CHECK = 8
"""A check, always the same request, tells as much as so many connections."""

LEAST_SECONDS = 0.001
"""Response times below are taken as this one: the fast path's clock ticks every 1.05 ms, and what differs there is the
network rather than the members."""

CHECKED_SECONDS = 120.0
"""After a check was heard of, connections tell nothing of response times for so long (or three times as long as the
check before it was ago)."""

REFUSED_PACKETS = 2
"""A connection with no more than these (SYN and RST) was refused: that is fast, but no response."""


class Refusal(enum.Enum):
    """Why a connection was refused: the errors of 003 FIGURE 8, no room in the switch (FIGURE 18), what the client
    said, or limits on new connections."""

    UNKNOWN = "unknown"
    NOTAVAIL = "notavail"
    CONNLIMIT = "connlimit"
    OVERFLOW = "overflow"
    REJECTED = "rejected"
    ANSWERED = "answered"
    RATE = "rate"
    CLIENT_RATE = "client_rate"


REFUSALS = {Error.UNKNOWN: Refusal.UNKNOWN, Error.NOTAVAIL: Refusal.NOTAVAIL, Error.CONNLIMIT: Refusal.CONNLIMIT}


class Estimates(NamedTuple):
    """What was measured of a member. Times are those of the statistics that told (``now``).

    Attributes:
        response: seconds it takes, as estimated at ``response_at``; None: not known.
        checked: whether checks told that; else connections.
        lately: bytes of connections that ended, older ones counting less, as of ``lately_at``; None: none were counted.
    """

    response: float | None = None
    response_at: float = 0.0
    checked: bool = False
    lately: float | None = None
    lately_at: float = 0.0

    def lately_by(self, now: float) -> float | None:
        """What is left of these bytes by then."""
        return None if self.lately is None else self.lately * exp(min(0.0, self.lately_at - now) / DECAY)


class Counters(NamedTuple):
    """A copy of counters. ``active`` covers the connections that the control segment follows."""

    opened: int
    closed: int
    active: int
    packets: int
    bytes: int
    estimates: Estimates = Estimates()


class Counts:
    """Counters that go on counting."""

    __slots__ = ("_checked_at", "_checked_until", "active", "bytes", "closed", "ended_lately", "lately", "lately_at",
                 "latency", "latency_at", "opened", "packets", "wanted")

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.active = 0
        self.packets = 0
        self.bytes = 0
        self.latency = self.latency_at = 0.0
        self._checked_at = self._checked_until = 0.0
        self.lately = self.ended_lately = self.lately_at = 0.0
        self.wanted = False

    def observed(self, seconds: float, now: float, checked: bool = False, connections: int = 1) -> None:
        """A response time was measured: a moving average that follows peaks faster than calm (after peak EWMA).

        It is the geometric mean that moves: sizes of answers are skewed, and one large one tells little of a member.

        Args:
            seconds: how long it took; of several connections, their geometric mean.
            now: when that became known.
            checked: a monitor measured it. Then connections are not asked, whose durations are also clients' doing.
            connections: how many there were.
        """
        if checked:
            since = 0.0
            if now < self._checked_until:
                since = now - self._checked_at
            else:
                self.latency = 0.0  # what connections told is not comparable
            self._checked_until = max(self._checked_until, now + CHECKED_SECONDS, now + 3 * since)
            self._checked_at = now
            connections = CHECK
        elif now < self._checked_until:
            return
        if seconds < LEAST_SECONDS:
            seconds = LEAST_SECONDS
        before = self.latency
        if before:
            pace = RISE if seconds > before else FALL
            seconds *= (before / seconds) ** exp(min(0.0, self.latency_at - now) / DECAY - connections / pace)
        self.latency = seconds
        self.latency_at = now

    def ended(self, connections: int, size: int, now: float) -> None:
        """Connections ended, and had so many bytes: what came lately counts most."""
        keep = exp(min(0.0, self.lately_at - now) / DECAY)
        self.lately = self.lately * keep + size
        self.ended_lately = self.ended_lately * keep + connections
        self.lately_at = now

    def copy(self) -> Counters:
        """The counters as they are now."""
        return Counters(self.opened, self.closed, self.active, self.packets, self.bytes, Estimates(
            self.latency or None, self.latency_at, self._checked_until > 0.0 and self.latency_at == self._checked_at,
            self.lately if self.lately or self.ended_lately else None, self.lately_at))


class Endings:
    """What one batch of DELETE tells of its members, added up: a response time and a size for each."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[Counts, list[float]] = {}

    def add(self, load: Counts, closed: Closed, rules: bool, held: float | None) -> None:
        """Take one closed connection, or one direction of it.

        Args:
            load: its member's counters.
            closed: what the switch told.
            rules: each direction is told of by itself, seconds after its end: its duration says nothing.
            held: seconds since it was opened; None where that is not known.
        """
        total = self._sums.get(load)
        if total is None:
            total = self._sums[load] = [0.0, 0, 0, 0]
        if closed.counted:
            total[2] += closed.outbound or not rules
            total[3] += closed.bytes
            held = closed.duration if closed.packets > REFUSED_PACKETS else None
        if held is not None and not rules and closed.reason is Reason.SHUTDOWN:
            total[0] += log(held if held > LEAST_SECONDS else LEAST_SECONDS)
            total[1] += 1

    def settle(self, now: float) -> None:
        """The batch is complete."""
        for load, (logarithms, timed, ended, size) in self._sums.items():
            if timed:
                load.observed(exp(logarithms / timed), now, connections=int(timed))
            if ended or size:
                load.ended(int(ended), int(size), now)


class Statistics(NamedTuple):
    """Everything counted, as it was at one moment. Keys are the resources' numbers; virtual
    server 0 stands for all that are not configured."""

    virtual_servers: dict[int, Counters]
    members: dict[int, Counters]
    switches: dict[int, Counters]
    refused: dict[tuple[int, Refusal], int]
    connections: int
    overflowed: int
    unanswered: int


class Ledger:
    """The owner of all counters."""

    def __init__(self) -> None:
        self.virtual_servers: dict[int, Counts] = {}
        self.members: dict[int, Counts] = {}
        self.switches: dict[int, Counts] = {}
        self.refused: dict[tuple[int, Refusal], int] = {}

    def virtual_server(self, number: int) -> Counts:
        """The counters of a virtual server."""
        return self.virtual_servers.get(number) or self.virtual_servers.setdefault(number, Counts())

    def member(self, number: int) -> Counts:
        """The counters of a member."""
        return self.members.get(number) or self.members.setdefault(number, Counts())

    def switch(self, switch: int) -> Counts:
        """The counters of a switch."""
        return self.switches.get(switch) or self.switches.setdefault(switch, Counts())

    def refuse(self, virtual_server: int, why: Refusal) -> None:
        """Count one refused connection."""
        key = (virtual_server, why)
        self.refused[key] = self.refused.get(key, 0) + 1

    def forget(self, virtual_servers: Iterable[int] = (), members: Iterable[int] = (),
               switches: Iterable[int] = ()) -> None:
        """Drop the counters of what is no longer there."""
        for number in virtual_servers:
            self.virtual_servers.pop(number, None)
            for why in Refusal:
                self.refused.pop((number, why), None)
        for number in members:
            self.members.pop(number, None)
        for number in switches:
            self.switches.pop(number, None)

    def copy(self, connections: int, overflowed: int, unanswered: int) -> Statistics:
        """All counters as they are now, with the figures that the connection table keeps."""
        return Statistics(
            {number: counts.copy() for number, counts in self.virtual_servers.items()},
            {number: counts.copy() for number, counts in self.members.items()},
            {number: counts.copy() for number, counts in self.switches.items()},
            dict(self.refused), connections, overflowed, unanswered)
