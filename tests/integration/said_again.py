# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Somebody on a client's wire who says again what the client said. Asserts nothing: that is what the tests are for."""

from __future__ import annotations

import contextlib
import socket
import time

from topologies.hosts import LabHost

ETH_P_ALL, PACKET_OUTGOING = 3, 4


class Echo:
    """Hears what one interface of a host sends, and can send it once more.

    Args:
        host: the host.
    """

    def __init__(self, host: LabHost) -> None:
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            self._socket.bind((host.interface, ETH_P_ALL))
        self._socket.setblocking(False)

    def heard(self, text: bytes, within: float = 1.0) -> bytes:
        """The next frame that the host sends with this in it, as soon as it is on the wire.

        Raises:
            TimeoutError: there is none.
        """
        end = time.monotonic() + within
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                frame, where = self._socket.recvfrom(1 << 16)
                if where[2] == PACKET_OUTGOING and text in frame:
                    return frame
        raise TimeoutError(f"nothing with {text!r} was sent")

    def say(self, frame: bytes) -> None:
        """Send it."""
        self._socket.send(frame)

    def forget(self) -> None:
        """Whatever was on the wire so far is not heard any more."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1 << 16)

    def close(self) -> None:
        """Stop."""
        self._socket.close()
