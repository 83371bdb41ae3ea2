# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What goes over a host's wire, as it is there: a packet socket in its namespace, and checksums that are real.

Judges nothing: that is for tests/segments.py and the tests.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

from tests.segments import Segment, parse
from topologies.hosts import LabHost

ETH_P_ALL, PACKET_OUTGOING = 3, 4
SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 263, 6, 33
ROOM = 256 << 20
"""Nobody reads while a test runs: all of it waits in the socket."""
OFFLOADS = ("tx", "rx", "tso", "gso", "gro")


class Capture:
    """From its making to its end, everything that one interface of a host sends and gets."""

    def __init__(self, host: LabHost) -> None:
        self.name = host.name
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
            self._socket.bind((host.interface, ETH_P_ALL))
        self._socket.setblocking(False)
        self.lost = 0

    def frames(self) -> Iterator[tuple[bytes, bool]]:
        """All frames since the last time, and whether the host sent them."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._socket.recvfrom(1 << 17)
                yield frame, where[2] == PACKET_OUTGOING
        # Reading them sets them back.
        self.lost += struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]

    def read(self) -> list[Segment]:
        """The TCP segments since the last time."""
        return [one for frame, sent in self.frames() if (one := parse(frame, sent)) is not None]

    def close(self) -> None:
        """Stop."""
        self._socket.close()


@contextlib.contextmanager
def captures(*hosts: LabHost) -> Iterator[list[Capture]]:
    """One for each host, for the time of the block."""
    with contextlib.ExitStack() as running:
        made = []
        for host in hosts:
            made.append(Capture(host))
            running.callback(made[-1].close)
        yield made


def _offload(host: LabHost, on: bool) -> None:
    # Without the last TCP makes large segments all the same, which are cut up last of all.
    host.run("ethtool", "-K", host.interface, *(word for one in OFFLOADS for word in (one, "on" if on else "off")))
    host.run("ip", "link", "set", host.interface, "gso_max_segs", "65535" if on else "1")


@contextlib.contextmanager
def real_checksums(hosts: Sequence[LabHost]) -> Iterator[None]:
    """Hosts compute every checksum themselves, and send each segment by itself, for the time of the block."""
    with contextlib.ExitStack() as running:
        for host in hosts:
            running.callback(_offload, host, True)
            _offload(host, False)
        yield


@contextlib.contextmanager
def offload(host: LabHost) -> Iterator[None]:
    """The same turned off again."""
    _offload(host, True)
    try:
        yield
    finally:
        _offload(host, False)
