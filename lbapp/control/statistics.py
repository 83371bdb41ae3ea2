# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What was counted: connections and traffic by virtual server, member and switch, and refusals.

Owns the counters. Never decides anything from them. Counters exist from their first use and
are forgotten with what they count, so there are never more than resources configured.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from lbapp.control.messages import Error


class Refusal(enum.Enum):
    """Why a connection was refused: the errors of 003 FIGURE 8, or no room in the switch (FIGURE 18)."""

    UNKNOWN = "unknown"
    NOTAVAIL = "notavail"
    CONNLIMIT = "connlimit"
    OVERFLOW = "overflow"
    REJECTED = "rejected"
    ANSWERED = "answered"


REFUSALS = {Error.UNKNOWN: Refusal.UNKNOWN, Error.NOTAVAIL: Refusal.NOTAVAIL, Error.CONNLIMIT: Refusal.CONNLIMIT}


class Counters(NamedTuple):
    """A copy of counters. ``active`` covers the connections that the control segment follows."""

    opened: int
    closed: int
    active: int
    packets: int
    bytes: int


class Counts:
    """Counters that go on counting."""

    __slots__ = ("active", "bytes", "closed", "opened", "packets")

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.active = 0
        self.packets = 0
        self.bytes = 0

    def copy(self) -> Counters:
        """The counters as they are now."""
        return Counters(self.opened, self.closed, self.active, self.packets, self.bytes)


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
