# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections of checks: a socket or TLS over one, a few calls each, for the event loop of the process.

Owns nothing but the socket. asyncio's own streams make a transport, a protocol and buffers for each connection, which
costs more than the whole check; here a check is awaited on the bare socket.

A connection ends with a RST unless it is told otherwise: the member keeps nothing of it, nor does this host, whose
ports would soon be used up by connections in TIME_WAIT.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import os
import socket
import ssl
import struct
from typing import Any

from lbapp.monitors.errors import CheckFailed

_CHUNK = 1 << 14
_RESET = struct.pack("ii", 1, 0)

WORDS = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.EPIPE: "connection reset",
    errno.ETIMEDOUT: "connection timed out",
    errno.EHOSTUNREACH: "host unreachable",
    errno.ENETUNREACH: "network unreachable",
    errno.EADDRNOTAVAIL: "no free port of this host",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.EPERM: "not permitted on this host",
    errno.EACCES: "not permitted on this host",
}


def words(error: OSError) -> str:
    """What an error means, for people."""
    if error.errno is None:
        return str(error) or type(error).__name__
    return WORDS.get(error.errno) or os.strerror(error.errno).lower()


def endpoint(address: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Family and socket address.

    Raises:
        ValueError: it is no address; a name would be looked up, and everything would wait for that.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.inet_pton(family, address)
    except OSError:
        raise ValueError(f"{address!r} is no address") from None
    return family, (address, port, 0, 0) if family == socket.AF_INET6 else (address, port)


class Stream:
    """A TCP connection.

    Args:
        loop: that of the process.
        family, address: see :func:`endpoint`.
    """

    __slots__ = ("_address", "_loop", "_socket")

    def __init__(self, loop: asyncio.AbstractEventLoop, family: socket.AddressFamily, address: Any) -> None:
        self._loop, self._address = loop, address
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)

    async def connect(self) -> None:
        """Connect.

        Raises:
            OSError: refused, unreachable.
        """
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            self._socket.connect(self._address)
        except BlockingIOError:
            pass
        else:
            return
        await self._ready(write=True)
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        while data:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                await self._ready(write=True)
                continue
            data = data[sent:]

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        while True:
            try:
                return self._socket.recv(_CHUNK)
            except BlockingIOError:
                await self._ready(write=False)

    async def _ready(self, write: bool) -> None:
        waiter = self._loop.create_future()
        number = self._socket.fileno()
        if write:
            self._loop.add_writer(number, _set, waiter)
        else:
            self._loop.add_reader(number, _set, waiter)
        try:
            await waiter
        finally:
            if write:
                self._loop.remove_writer(number)
            else:
                self._loop.remove_reader(number)

    def finish(self) -> None:
        """End in the ordinary way: what was sent still arrives."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


class Datagrams:
    """A UDP socket that hears one peer alone, and ICMP's word that there is none.

    Args:
        loop: that of the process.
        family, address: see :func:`endpoint`.
    """

    __slots__ = ("_loop", "_socket")

    def __init__(self, loop: asyncio.AbstractEventLoop, family: socket.AddressFamily, address: Any) -> None:
        self._loop = loop
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(address)
        except BaseException:
            self._socket.close()
            raise

    def send(self, data: bytes) -> None:
        """Send a datagram."""
        self._socket.send(data)

    async def receive(self) -> bytes:
        """The next datagram.

        Raises:
            OSError: nobody is there.
        """
        return await self._loop.sock_recv(self._socket, 1 << 16)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


@functools.cache
def tls_context(verify: bool, protocols: tuple[str, ...] = ()) -> ssl.SSLContext:
    """How checks speak TLS; the authorities are the system's."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def host_of(name: str) -> str:
    """A name or address without its port and brackets."""
    if name.startswith("["):
        return name[1:].partition("]")[0]
    if name.count(":") == 1:
        return name.partition(":")[0]
    return name


def server_name(name: str, verify: bool) -> str | None:
    """What to name in the greeting: an address only where it is to be found in the certificate."""
    host = host_of(name)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") or None
    return host if verify else None


class TlsStream(Stream):
    """TLS over a TCP connection.

    Args:
        context: how.
        name: of the server; None: none is said.
    """

    __slots__ = ("_in", "_out", "_tls")

    def __init__(self, loop: asyncio.AbstractEventLoop, family: socket.AddressFamily, address: Any,
                 context: ssl.SSLContext, name: str | None) -> None:
        super().__init__(loop, family, address)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)

    async def connect(self) -> None:
        """Connect and greet.

        Raises:
            CheckFailed: no TLS, or not with this certificate.
            OSError: refused, unreachable.
        """
        await super().connect()
        try:
            await self._step(self._tls.do_handshake)
        except ssl.SSLCertVerificationError as error:
            raise CheckFailed(f"certificate: {error.verify_message or error.reason}") from None

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        while data:
            sent = await self._step(self._tls.write, data)
            data = data[sent:]

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await self._step(self._tls.read, _CHUNK)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def _step(self, action: Any, *arguments: Any) -> Any:
        while True:
            try:
                done = action(*arguments)
            except ssl.SSLWantReadError:
                await self._flush()
                data = await super().receive()
                if data:
                    self._in.write(data)
                else:
                    self._in.write_eof()
                continue
            except ssl.SSLCertVerificationError:
                raise
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                if action == self._tls.read:
                    raise
                raise CheckFailed("TLS: the connection was closed") from None
            except ssl.SSLError as error:
                raise CheckFailed(f"TLS: {(error.reason or 'failed').lower().replace('_', ' ')}") from None
            await self._flush()
            return done

    async def _flush(self) -> None:
        data = self._out.read()
        if data:
            await super().send(data)
