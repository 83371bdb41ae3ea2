# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client as a member sees it behind a fast path that hands connections over: it begins with data, never with a SYN.

Frame by frame, on a packet socket; the kernel of its namespace does not have its address, and so keeps silent.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import time
from typing import Any

from lbapp.dataflow.fastpath import cookies
from tests.fastpath_packets import ACK, FIN, Seen, frame, read

PSH = 8
KEY = bytes(range(16))
OFFERS = cookies.Options(1400, 9, True)


def later(number: int, by: int) -> int:
    return number + by & 0xFFFFFFFF


class CookieClient:
    """One connection.

    ``seq`` is what it sends next, ``expected`` what it wants to hear next; ``said`` is what it heard in order.
    """

    def __init__(self, wire: socket.socket, macs: tuple[bytes, bytes], addresses: tuple[str, str], port: int = 80, *,
                 sport: int = 40000, isn: int = 5000, key: bytes = KEY, offers: cookies.Options = OFFERS,
                 cookie: int | None = None) -> None:
        self.wire, self.macs, self.addresses, self.port, self.sport = wire, macs, addresses, port, sport
        made = cookies.make((key, None), 0, ipaddress.ip_address(addresses[0]).packed, sport, isn, offers)
        self.isn, self.cookie = isn, made if cookie is None else cookie
        self.seq, self.expected = later(isn, 1), later(self.cookie, 1)
        self.said, self.ended = b"", False
        self.window = 30000

    def send(self, payload: bytes = b"", flags: int = ACK, *, at: int | None = None, **options: Any) -> None:
        """Send a segment; the next one begins where it ends, unless ``at`` is given."""
        self.wire.send(frame(*self.addresses, sport=self.sport, dport=self.port, flags=flags, payload=payload,
                             seq=self.seq if at is None else at, ack=self.expected, window=self.window,
                             eth_src=self.macs[0], eth_dst=self.macs[1], **options))
        if at is None:
            self.seq = later(self.seq, len(payload) + (1 if flags & FIN else 0))

    def hear(self, seconds: float = 1.0) -> Seen | None:
        """The next segment for this client; None: none came."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and select.select([self.wire], [], [], left)[0]:
            data = self.wire.recv(1 << 17)
            if data[12:14] not in (b"\x08\x00", b"\x86\xdd") or data[:6] != self.macs[0]:
                continue
            if (data[23] if data[12] == 8 else data[20]) != socket.IPPROTO_TCP:
                continue
            seen = read(data, "any")
            if (seen.destination, seen.dport, seen.sport) == (self.addresses[0], self.sport, self.port):
                return seen
        return None

    def converse(self, until: int | None = None, seconds: float = 5.0) -> bytes:
        """Acknowledge what comes in order, until so many bytes are there, or until the server ends."""
        deadline = time.monotonic() + seconds
        while not self.ended and (until is None or len(self.said) < until) and time.monotonic() < deadline:
            seen = self.hear(deadline - time.monotonic())
            if seen is None:
                break
            assert not seen.flags & 4, "RST"
            if seen.seq == self.expected and (seen.payload or seen.flags & FIN):
                self.said += seen.payload
                self.ended = bool(seen.flags & FIN)
                self.expected = later(seen.seq, len(seen.payload) + self.ended)
                self.send()
        return self.said

    def silence(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes."""
        return self.hear(seconds) is None
