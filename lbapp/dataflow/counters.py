# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a switch's own rules have counted: read on demand, by cookie, and summed.

A rule in BIND counts the connections that the switch gave a member without asking; a rule for
queries counts the packets it punted. Pure: multipart bytes in, sums out.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

from lbapp.dataflow.openflow import ANY, encode_match
from lbapp.dataflow.pipeline import COOKIE_MAGIC, COOKIE_MASK, Kind, Priority, Table, kind_of, owner_of

_REG1 = b"\x00\x01\x02\x04"


@dataclass(slots=True)
class RuleCounters:
    """Sums over a switch's rules.

    Attributes:
        bound: connections that the switch decided, by (virtual server, member).
        punted: packets that rules for queries sent up, by virtual server.
        forwarded: (packets, bytes) from clients, by member.
        rules: how many rules of ours there are.
        connections: how many connections have a rule pair.
    """

    bound: Counter[tuple[int, int]] = field(default_factory=Counter)
    punted: Counter[int] = field(default_factory=Counter)
    forwarded: dict[int, tuple[int, int]] = field(default_factory=dict)
    rules: int = 0
    connections: int = 0

    def add(self, entry: bytes) -> None:
        """Take one entry of an OFPMP_FLOW reply (at least 56 bytes)."""
        cookie, packets, size = struct.unpack_from("!QQQ", entry, 24)
        kind = kind_of(cookie)
        self.rules += 1
        self.connections += kind is Kind.CONNECTION_IN
        if kind is Kind.QUERY:
            self.punted[owner_of(cookie)] += packets
        elif kind is Kind.FORWARD and entry[12] << 8 | entry[13] != Priority.SPECIAL:  # that one is of no one member
            before = self.forwarded.get(owner_of(cookie), (0, 0))
            self.forwarded[owner_of(cookie)] = (before[0] + packets, before[1] + size)
        elif entry[2] == Table.BIND and packets:
            member = _register(entry)
            if member:
                self.bound[owner_of(cookie), member] += packets


@dataclass(slots=True)
class ConnectionCounters:
    """What the rules of one connection have counted; ``rules`` 0: there are none."""

    serial: int
    rules: int = 0
    packets: int = 0
    octets: int = 0

    def add(self, entry: bytes) -> None:
        """Take one entry of an OFPMP_FLOW reply (at least 56 bytes)."""
        packets, size = struct.unpack_from("!QQ", entry, 32)
        self.rules += 1
        self.packets += packets
        self.octets += size


def request_body(cookie: int = COOKIE_MAGIC << 56, mask: int = COOKIE_MASK) -> bytes:
    """The body of an OFPMP_FLOW request for rules by their cookie: by default every rule of ours."""
    return struct.pack("!B3xII4xQQ", 0xFF, ANY, ANY, cookie, mask) + encode_match(())


def _register(entry: bytes) -> int:
    """The member number that a BIND rule matches."""
    end = 48 + (entry[50] << 8 | entry[51])
    at = 52
    while at + 4 <= min(end, len(entry)):
        size = entry[at + 3]
        if entry[at:at + 4] == _REG1:
            return int.from_bytes(entry[at + 4:at + 8], "big")
        at += 4 + size
    return 0
