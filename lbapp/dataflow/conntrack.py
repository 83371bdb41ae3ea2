# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections as the switch's conntrack holds them: the text of ``dpctl/dump-conntrack``, read.

With ``state: conntrack`` the switch is the only one who knows all connections. OpenFlow cannot
ask for them; Open vSwitch's own control socket can, where the switch runs on this host. Pure:
text in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lbapp.dataflow.pipeline import OWNER_MASK, Label

_TUPLE = re.compile(r"src=([0-9a-f.:]+),dst=([0-9a-f.:]+),sport=(\d+),dport=(\d+)")
_NUMBER = re.compile(r"\b(zone|mark|labels|timeout)=(0x[0-9a-f]+|\d+)")
_STATE = re.compile(r"protoinfo=\(state=([A-Z0-9_]+)")


class Entry(NamedTuple):
    """One connection. ``original`` is what the client sent: source, destination, source port, destination port."""

    protocol: str
    original: tuple[str, str, int, int]
    reply: tuple[str, str, int, int]
    zone: int
    member: int
    serial: int
    virtual_server: int
    tracked: bool
    state: str


def parse(lines: Iterable[str], zone: int) -> Iterator[Entry]:
    """Read a dump; lines that are no TCP or UDP connection of ``zone`` are passed over."""
    for line in lines:
        protocol = line[:line.find(",")]
        if protocol not in ("tcp", "udp"):
            continue
        sides = _TUPLE.findall(line)
        numbers = {name: int(value, 0) for name, value in _NUMBER.findall(line)}
        if len(sides) < 2 or numbers.get("zone", 0) != zone or not numbers.get("mark"):
            continue
        label = numbers.get("labels", 0)
        state = _STATE.search(line)
        original, reply = ((s[0], s[1], int(s[2]), int(s[3])) for s in sides[:2])
        yield Entry(protocol, original, reply, zone, numbers["mark"], label >> Label.SERIAL & 0xFFFFFFFF,
                    label >> Label.VIRTUAL_SERVER & OWNER_MASK, bool(label >> Label.TRACKED & 1),
                    state.group(1) if state else "")
