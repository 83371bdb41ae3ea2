# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The TCP sockets of the calling thread's network namespace, as the kernel tells a program that asks for those in some
states (sock_diag(7)).

A busy server has tens of thousands in TIME_WAIT, which ``/proc/net/tcp`` spells out each time, and this leaves out.
Owns the encoding of the question and of the answers. Says nothing of what they mean.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError

ESTABLISHED, LISTEN = 1, 10
"""States of a TCP socket (linux/tcp_states.h)."""

_SOCK_DIAG, _BY_FAMILY = 4, 20
_QUESTION = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2 (linux/inet_diag.h): family, protocol, no extensions, a mask of states; of any address."""
_FOUND = struct.Struct("=BB2x")
_PORT = struct.Struct("!H")
_SOURCE, _INODE = 8, struct.Struct("=I")
_INODE_AT = 68


class Socket(NamedTuple):
    """A socket's own end.

    Attributes:
        address: packed; all zeros are any.
        port: its number.
        state: :data:`ESTABLISHED`, :data:`LISTEN`.
        inode: by which ``/proc/PID/fd`` names it; 0: nobody has it any more.
    """

    address: bytes
    port: int
    state: int
    inode: int


def tcp(*states: int) -> Iterator[Socket]:
    """All in these states, IPv4 first.

    Raises:
        OSError: the kernel does not tell.
    """
    mask = sum(1 << state for state in states)
    try:
        with Netlink(_SOCK_DIAG) as netlink:
            for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
                try:
                    found = netlink.dump(_BY_FAMILY, _QUESTION.pack(family, socket.IPPROTO_TCP, 0, mask))
                except NetlinkError as error:
                    if family == socket.AF_INET6 and error.errno == errno.ENOENT:
                        break  # a kernel without IPv6; it has told of the others
                    raise
                for body in found:
                    _, state = _FOUND.unpack_from(body)
                    yield Socket(body[_SOURCE:_SOURCE + size], _PORT.unpack_from(body, _FOUND.size)[0], state,
                                 _INODE.unpack_from(body, _INODE_AT)[0])
    except NetlinkError as error:
        raise OSError(error.errno, f"the kernel does not list its TCP sockets: {error.strerror}") from None


__all__ = ["ESTABLISHED", "LISTEN", "Socket", "tcp"]
