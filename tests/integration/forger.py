# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Frames that nobody's kernel would send, in the middle of somebody's connection or in its first data's place."""

from __future__ import annotations

import json
import socket
import struct

from tests.integration.capture import Capture
from topologies.hosts import LabHost

MORE = 0x2000
RECORD_ROUTE = bytes((7, 3, 4, 0))
NOTHING_TO_DO = bytes((6, 0, 1, 4, 0, 0, 0, 0))
"""IPv6: a header of options for every hop, which has padding alone, in front of TCP."""


def _sum(data: bytes) -> int:
    return 0xFFFF - int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


class Forger:
    """Makes frames of somebody's connection, whole but for what is asked for.

    Args:
        host: the client.
        wire: what it sent so far.
        port: of the virtual server.
    """

    def __init__(self, host: LabHost, wire: Capture, port: int) -> None:
        last = [one for one in wire.read() if one.sent and one.dport == port][-1]
        self.sport, self.dport, self.ack = last.sport, last.dport, last.ack
        self.seq = last.seq + len(last.payload)
        self.source, self.destination = last.source, last.destination
        self.six = len(last.source) == 16
        self._number = 0
        address = socket.inet_ntop(socket.AF_INET6 if self.six else socket.AF_INET, last.destination)
        neighbour = host.run("ip", "neigh", "show", address).stdout.split("lladdr ")[1].split()[0]
        (link,) = json.loads(host.run("ip", "-j", "link", "show", host.interface).stdout)
        self.ethernet = bytes.fromhex((neighbour + link["address"]).replace(":", "")) + (
            b"\x86\xdd" if self.six else b"\x08\x00")
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._socket.bind((host.interface, 0))

    def tcp(self, *, doff: int = 5, sport: int | None = None, dport: int | None = None, spoil: int = 0,
            source: bytes | None = None, method: bytes = b"GET") -> bytes:
        """A segment that says ``forged``; ``spoil`` makes its checksum wrong."""
        self._number += 1
        said = b"%b /forged-%d HTTP/1.1\r\nHost: a\r\n\r\n" % (method, self._number)
        head = struct.pack("!HHIIBBHHH", self.sport if sport is None else sport, self.dport if dport is None else dport,
                           self.seq & 0xFFFFFFFF, self.ack, doff << 4, 0x18, 500, 0, 0)
        pseudo = (source or self.source) + self.destination + struct.pack("!II", len(head + said), 6)
        check = _sum(pseudo + head + said) ^ spoil
        return head[:16] + check.to_bytes(2, "big") + head[18:] + said

    def send(self, body: bytes, *, options: bool = False, source: bytes | None = None, more: int = 0,
             version: int | None = None, fragment: int = 0, spoil: int = 0) -> None:
        """Send it in a packet.

        Args:
            options: have some in the packet's head.
            more: the packet says so many bytes more than there are.
            version: of IP, where it is not the true one.
            fragment: the piece's place in units of 8 bytes, and :data:`MORE`.
            spoil: makes the head's checksum wrong (IPv4).
        """
        addresses = (source or self.source) + self.destination
        if self.six:
            kind, between = 6, b""
            if fragment:
                kind, between = 44, struct.pack("!BBHI", 6, 0, (fragment & 0x1FFF) << 3 | bool(fragment & MORE), 77)
            elif options:
                kind, between = 0, NOTHING_TO_DO
            head = struct.pack("!IHBB", (version or 6) << 28, len(between + body) + more, kind, 64)
            head += addresses + between
        else:
            said = RECORD_ROUTE if options else b""
            words = 5 + len(said) // 4
            head = struct.pack("!BBHHHBBH", (version or 4) << 4 | words, 0, 4 * words + len(body) + more, 77, fragment,
                               64, 6, 0) + addresses + said
            head = head[:10] + (_sum(head) ^ spoil).to_bytes(2, "big") + head[12:]
        self._socket.send(self.ethernet + head + body)

    def close(self) -> None:
        """Stop."""
        self._socket.close()
