# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A UDP server that says who it is: ``python udp_echo.py NAME PORT``, standard library only.

Answers each datagram with its name, a space, and what it got, in both families, and from the
address that the datagram was sent to (which may be one of several).
"""

from __future__ import annotations

import selectors
import socket
import sys

IPV4_PKTINFO = 8  # not in the socket module before Python 3.14
MOST = 65535


def serve(name: str, port: int) -> None:
    """Answer for ever."""
    selector = selectors.DefaultSelector()
    for family, level, option in ((socket.AF_INET, socket.IPPROTO_IP, IPV4_PKTINFO),
                                  (socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)):
        bound = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setsockopt(level, option, 1)
        bound.setblocking(False)
        bound.bind(("", port))
        selector.register(bound, selectors.EVENT_READ)
    prefix = name.encode() + b" "
    while True:
        for key, _events in selector.select():
            endpoint = key.fileobj
            assert isinstance(endpoint, socket.socket)
            try:
                payload, information, _flags, sender = endpoint.recvmsg(MOST, 128)
                # The packet information that came along, sent back, makes its destination our source.
                endpoint.sendmsg([prefix + payload], information, 0, sender)
            except OSError:
                continue  # the client is gone or cannot be reached; the next datagram counts


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
