# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which TCP sockets there are, as the kernel of this machine tells (:mod:`lbapp.server_agent.sockets`), and what it
says when it does not."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import closing

import pytest

from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.server_agent.sockets import ESTABLISHED, LISTEN, Socket, tcp

SOCK_DIAG, BY_FAMILY = 4, 20


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_listener_and_a_connection(family: socket.AddressFamily, address: str) -> None:
    with closing(socket.create_server((address, 0), family=family)) as server:
        port, packed = server.getsockname()[1], socket.inet_pton(family, address)
        with closing(socket.create_connection((address, port))) as client:
            own = Socket(packed, client.getsockname()[1], ESTABLISHED, os.fstat(client.fileno()).st_ino)
            assert own in list(tcp(ESTABLISHED))
            assert Socket(packed, port, LISTEN, os.fstat(server.fileno()).st_ino) in list(tcp(LISTEN))
            assert {one.state for one in tcp(ESTABLISHED, LISTEN)} == {ESTABLISHED, LISTEN}
    assert port not in {one.port for one in tcp(LISTEN)}


def test_a_list_that_the_kernel_cannot_make_is_no_empty_one() -> None:
    """Of a protocol whose part of the socket monitor is not there, it says so with the list's last message."""
    with Netlink(SOCK_DIAG) as netlink, pytest.raises(NetlinkError) as caught:
        netlink.dump(BY_FAMILY, struct.pack("=BBBxI48x", socket.AF_INET, 250, 0, 0xFFFFFFFF))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("lacks", "code", "told"), [
    (socket.AF_INET6, errno.ENOENT, True), (socket.AF_INET6, errno.EPERM, False),
    (socket.AF_INET, errno.ENOENT, False)])
def test_a_kernel_without_ipv6_tells_of_the_others(monkeypatch: pytest.MonkeyPatch, lacks: int, code: int,
                                                   told: bool) -> None:
    dump = Netlink.dump

    def lacking(self: Netlink, kind: int, body: bytes) -> list[bytes]:
        if body[0] == lacks:
            raise NetlinkError(code, os.strerror(code))
        return dump(self, kind, body)

    monkeypatch.setattr(Netlink, "dump", lacking)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        if told:
            assert server.getsockname()[1] in {one.port for one in tcp(LISTEN)}
        else:
            with pytest.raises(OSError, match="the kernel does not list its TCP sockets") as caught:
                list(tcp(LISTEN))
            assert caught.value.errno == code
