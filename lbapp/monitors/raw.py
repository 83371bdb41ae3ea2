# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Checks by packets of our own making: ICMP echo, and a SYN whose SYN-ACK is answer enough.

One raw socket for all checks of a kind and family. What waits for an answer stands in a table that is as large as the
number of checks that run, no larger. An answer counts where address, ports or number, and a value that only the asked
host has seen all fit.

The SYN comes from ports that are bound, so that nobody else of this host uses them, but not listened at: so the kernel
answers the SYN-ACK with a RST by itself, and the member keeps nothing. Checksums are whole: neither kind leaves its
own to be completed on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import secrets
import socket
import struct
from typing import Any

from lbapp.monitors.checks import Check, Surroundings
from lbapp.monitors.errors import CheckFailed
from lbapp.monitors.protocol import Target

PORTS = 16
"""Of one address and port of a member, so many half-open checks can be on their way at the same time."""
AGAIN_S = 1.0
"""A SYN that is not answered is repeated, as TCP does (RFC 6298)."""
_READ_MOST = 256
_SO_ATTACH_FILTER = 26
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_ECHO, _REPLY, _ECHO6, _REPLY6 = 8, 0, 128, 129
_SYN, _RST, _SYN_ACK = 0x02, 0x04, 0x12
_WINDOW, _MSS = 64_240, 1220


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class _Waiting:
    """A raw socket, and who waits for what."""

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: socket.socket) -> None:
        self._loop, self._socket = loop, endpoint
        self._waiting: dict[Any, asyncio.Future[Any]] = {}
        endpoint.setblocking(False)
        with contextlib.suppress(OSError):
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        loop.add_reader(endpoint.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(_READ_MOST):
            try:
                data, source = self._socket.recvfrom(2048)
            except BlockingIOError:
                return
            except OSError:
                continue  # what ICMP says of somebody else's packet
            self._take(data, source[0].partition("%")[0])

    def _take(self, data: bytes, source: str) -> None:
        raise NotImplementedError

    def _answer(self, key: Any, value: Any) -> None:
        waiter = self._waiting.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_result(value)

    def _send(self, packet: bytes, address: str) -> None:
        to = (address, 0, 0, 0) if ":" in address else (address, 0)
        # A buffer that is full for a moment loses a packet, as any link on the way might.
        with contextlib.suppress(BlockingIOError):
            self._socket.sendto(packet, to)


class _Echoes(_Waiting):
    """ICMP echo requests of one family."""

    def __init__(self, loop: asyncio.AbstractEventLoop, family: socket.AddressFamily) -> None:
        self._six = family == socket.AF_INET6
        protocol = socket.IPPROTO_ICMPV6 if self._six else socket.IPPROTO_ICMP
        try:
            endpoint = socket.socket(family, socket.SOCK_RAW, protocol)
            self._raw = True
        except PermissionError:
            endpoint = socket.socket(family, socket.SOCK_DGRAM, protocol)  # where net.ipv4.ping_group_range says so
            self._raw = False
        if self._raw and self._six:
            types = bytearray(b"\xff" * 32)
            struct.pack_into("=I", types, 4 * (_REPLY6 >> 5), 0xFFFFFFFF & ~(1 << (_REPLY6 & 31)))
            endpoint.setsockopt(protocol, _ICMP6_FILTER, bytes(types))
        elif self._raw:
            endpoint.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", 0xFFFFFFFF & ~(1 << _REPLY)))
        self._id = secrets.randbits(16)
        self._numbers = itertools.count()
        super().__init__(loop, endpoint)

    async def ask(self, address: str) -> None:
        """Send an echo request and wait for the reply."""
        number, value = next(self._numbers) & 0xFFFF, secrets.token_bytes(16)
        kind = _ECHO6 if self._six else _ECHO
        packet = struct.pack("!BBHHH", kind, 0, 0, self._id, number) + value
        if not self._six:  # the kernel sees to that of ICMPv6 (RFC 3542, 3.1)
            packet = packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]
        key = (socket.inet_pton(socket.AF_INET6 if self._six else socket.AF_INET, address), number, value)
        waiter = self._waiting[key] = self._loop.create_future()
        try:
            self._send(packet, address)
            await waiter
        finally:
            del self._waiting[key]

    def _take(self, data: bytes, source: str) -> None:
        if self._raw and not self._six:
            data = data[(data[0] & 0xF) * 4:] if data else b""
        if len(data) < 24:
            return
        kind, _, _, identifier, number = struct.unpack_from("!BBHHH", data)
        if kind == (_REPLY6 if self._six else _REPLY) and (identifier == self._id or not self._raw):
            self._answer((socket.inet_pton(socket.AF_INET6 if self._six else socket.AF_INET, source), number,
                          data[8:24]), None)


class _HalfOpens(_Waiting):
    """SYNs of one family."""

    def __init__(self, loop: asyncio.AbstractEventLoop, family: socket.AddressFamily) -> None:
        self._family = family
        endpoint = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
        try:
            self._base, self._reserved = _reserve(family)
            _only_ports(endpoint, self._base, family)
        except BaseException:
            endpoint.close()
            raise
        self._next = itertools.count()
        self._expected: dict[Any, int] = {}
        super().__init__(loop, endpoint)

    async def ask(self, address: str, port: int) -> bool:
        """Send a SYN and wait: True for a SYN-ACK, False for a RST."""
        there = socket.inet_pton(self._family, address)
        first = next(self._next)
        for offset in range(PORTS):
            own = self._base + (first + offset) % PORTS
            key = (there, port, own)
            if key not in self._waiting:
                break
        else:
            raise CheckFailed(f"{PORTS} checks of this port are on their way already")
        number = secrets.randbits(32)
        packet = self._syn(address, there, port, own, number)
        waiter = self._waiting[key] = self._loop.create_future()
        self._expected[key] = (number + 1) & 0xFFFFFFFF
        again = self._loop.call_later(AGAIN_S, self._send_again, packet, address)
        try:
            self._send(packet, address)
            return bool(await waiter)
        finally:
            again.cancel()
            del self._waiting[key], self._expected[key]

    def _send_again(self, packet: bytes, address: str) -> None:
        with contextlib.suppress(OSError):
            self._send(packet, address)

    def _syn(self, address: str, there: bytes, port: int, own: int, number: int) -> bytes:
        with socket.socket(self._family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))
            here = socket.inet_pton(self._family, probe.getsockname()[0].partition("%")[0])
        head = struct.pack("!HHIIBBHHHBBH", own, port, number, 0, 6 << 4, _SYN, _WINDOW, 0, 0, 2, 4, _MSS)
        pseudo = here + there + (struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head)) if len(here) == 4
                                 else struct.pack("!II", len(head), socket.IPPROTO_TCP))
        return head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]

    def _take(self, data: bytes, source: str) -> None:
        if self._family == socket.AF_INET:
            data = data[(data[0] & 0xF) * 4:] if data else b""
        if len(data) < 20:
            return
        port, own, _, acknowledged, _, flags = struct.unpack_from("!HHIIBB", data)
        key = (socket.inet_pton(self._family, source), port, own)
        if self._expected.get(key) != acknowledged:
            return
        if flags & _SYN_ACK == _SYN_ACK:
            self._answer(key, True)
        elif flags & _RST:
            self._answer(key, False)


def _reserve(family: socket.AddressFamily) -> tuple[int, list[socket.socket]]:
    """Bind a row of ports; returns the first, and the sockets."""
    anywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    for _ in range(200):
        base = (20_000 + secrets.randbelow(45_000)) & ~(PORTS - 1)
        held: list[socket.socket] = []
        try:
            for port in range(base, base + PORTS):
                one = socket.socket(family, socket.SOCK_STREAM)
                held.append(one)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((anywhere, port))
        except OSError:
            for one in held:
                one.close()
            continue
        return base, held
    raise CheckFailed("no free ports of this host")


def _only_ports(endpoint: socket.socket, base: int, family: socket.AddressFamily) -> None:
    """Have the kernel keep from a raw socket what is not for those ports (classic BPF)."""
    reject, accept = (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF)
    compare = [(0x54, 0, 0, 0xFFFF & ~(PORTS - 1)), (0x15, 0, 1, base), accept, reject]
    # An IPv4 raw socket sees the IP header, an IPv6 one does not.
    load = [(0x28, 0, 0, 2)] if family == socket.AF_INET6 else [(0xB1, 0, 0, 0), (0x48, 0, 0, 2)]
    program = b"".join(struct.pack("=HBBI", *one) for one in [*load, *compare])
    buffer = ctypes.create_string_buffer(program, len(program))
    endpoint.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                        struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))


def _shared(kind: type[Any], around: Surroundings, family: socket.AddressFamily) -> Any:
    key = (kind.__name__, family)
    if key not in around.sockets:
        try:
            around.sockets[key] = kind(around.loop, family)
        except PermissionError:
            raise CheckFailed("raw sockets are not permitted on this host") from None
    return around.sockets[key]


class Echo(Check):
    """Asks by ICMP echo."""

    needs_port = False

    async def run(self) -> bool:
        """See :class:`Check`."""
        await _shared(_Echoes, self.around, self.family).ask(self.target.address)
        return True


class HalfOpen(Check):
    """Sends a SYN."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        self._port = target.checked_port

    async def run(self) -> bool:
        """See :class:`Check`."""
        if not await _shared(_HalfOpens, self.around, self.family).ask(self.target.address, self._port):
            raise CheckFailed("connection refused")
        return True
