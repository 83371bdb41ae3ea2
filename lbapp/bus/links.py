# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The sockets under the transports: one TCP connection with its session, one UDP socket, complaints about peers.

Owns greenlets and sockets. Never decides anything: ``sessions.py`` and ``channel.py`` do.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket as names
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import eventlet
from eventlet.event import Event as Wake
from eventlet.green import socket
from eventlet.hubs import trampoline

from lbapp.bus import ssmb
from lbapp.bus.errors import Fault
from lbapp.bus.events import Event
from lbapp.bus.sessions import Phase, Session

LOG = logging.getLogger("lbapp.bus")
clock = time.monotonic

RECEIVE_BUFFER = 4 << 20
AT_ONCE = 64
"""Datagrams that are read before other greenlets get their turn."""
_LARGEST = ssmb.LIMITS[1] + 1


class Complaints:
    """Counts what was wrong by reason; logs it once a peer and interval, with how often it was since."""

    INTERVAL = 10.0
    PEERS = 1024

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._last: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def note(self, peer: str, fault: Fault, text: str) -> None:
        """Something of ``peer`` was not honoured."""
        self.counts[fault.value] += 1
        now = clock()
        said, since = self._last.get(peer, (now - self.INTERVAL, 0))
        if now - said < self.INTERVAL:
            self._last[peer] = (said, since + 1)
            return
        self._last[peer] = (now, 0)
        self._last.move_to_end(peer)
        if len(self._last) > self.PEERS:
            self._last.popitem(last=False)
        LOG.warning("bus: %s: %s%s", peer, text, f" ({since} more since the last report)" if since else "")


def guarded(what: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Call what was given to us; its errors are logged and stay its own."""
    try:
        function(*arguments)
    except Exception as error:
        LOG.error("bus: %s failed: %s: %s", what, type(error).__name__, error, exc_info=LOG.isEnabledFor(logging.DEBUG))


def pack_address(text: str) -> bytes:
    """An address in text as bytes; ``0.0.0.0`` and ``::`` become b"" (take that of the TCP connection)."""
    packed = names.inet_pton(names.AF_INET6 if ":" in text else names.AF_INET, text.partition("%")[0])
    return packed if any(packed) else b""


def unpack_address(packed: bytes) -> str:
    """The text of packed bytes."""
    return names.inet_ntop(names.AF_INET6 if len(packed) == 16 else names.AF_INET, packed)


def family(address: str) -> int:
    """AF_INET or AF_INET6."""
    return names.AF_INET6 if ":" in address else names.AF_INET


class Datagrams:
    """One UDP socket.

    Args:
        address: where to bind; port 0 is any.
        take: called with each datagram and its sender.
    """

    def __init__(self, address: tuple[str, int], take: Callable[[bytes, tuple[Any, ...]], None]) -> None:
        self._green = socket.socket(family(address[0]), socket.SOCK_DGRAM)
        try:
            self._green.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._green.bind(address)
        except OSError:
            self._green.close()
            raise
        # The socket beneath the green one, which does not block: a green call for each datagram would be dear.
        self._socket = self._green.fd
        self._take = take
        self.address: tuple[str, int] = self._green.getsockname()[:2]
        self.unsent = 0
        self._reader = eventlet.spawn(self._read)

    def send(self, datagram: bytes, address: tuple[str, int]) -> None:
        """Send, or drop and count it: what matters is sent again."""
        try:
            self._socket.sendto(datagram, address)
        except OSError:
            self.unsent += 1

    def close(self) -> None:
        """Stop reading, and close."""
        self._reader.kill()
        self._green.close()

    def _read(self) -> None:
        receive = self._socket.recvfrom
        while True:
            for _ in range(AT_ONCE):
                try:
                    datagram, sender = receive(_LARGEST)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno == errno.EBADF:
                        return
                    break
                guarded("a datagram", self._take, datagram, sender)
            else:
                eventlet.sleep(0)
                continue
            trampoline(self._socket, read=True)


class Connection:
    """One TCP connection and its session: a greenlet that reads (the caller's), one that writes.

    Args:
        stream: the connected green socket.
        address: the peer's.
        handle: called with the connection and each event.
    """

    def __init__(self, stream: Any, address: tuple[str, int], session: Session,
                 handle: Callable[[Connection, Event], None]) -> None:
        self.stream = stream
        self.address = address
        self.session = session
        self._handle = handle
        self._wake = Wake()
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        """Read until the connection ends; returns with the socket closed."""
        writer = eventlet.spawn(self._write)
        session = self.session
        try:
            while session.phase is not Phase.DOWN:
                data = self.stream.recv(65536)
                if not data:
                    session.end(Fault.CLOSED, "closed by the peer")
                else:
                    session.receive(data, clock())
                self.settle()
        except OSError as error:
            session.end(Fault.CLOSED, error.strerror or str(error))
        finally:
            session.end(Fault.CLOSED, "closed")
            writer.kill()
            self.stream.close()
            self.settle()

    def settle(self) -> None:
        """After the session was touched: deliver its events, let its output be written."""
        for event in self.session.drain():
            guarded("an event's handler", self._handle, self, event)
        if self.session.phase is Phase.DOWN:
            # Wakes both greenlets, whatever they wait for.
            with contextlib.suppress(OSError):
                self.stream.shutdown(socket.SHUT_RDWR)
        if not self._wake.ready():
            self._wake.send()

    def tick(self, now: float) -> None:
        """Let time pass."""
        self.session.tick(now)
        if self.session.busy:
            self.settle()

    def end(self, fault: Fault, text: str) -> None:
        """End it from outside."""
        self.session.end(fault, text)
        self.settle()

    def _write(self) -> None:
        try:
            while self.session.phase is not Phase.DOWN:
                self._wake = Wake()
                data = self.session.take()
                for event in self.session.drain():
                    guarded("an event's handler", self._handle, self, event)
                if data:
                    self.stream.sendall(data)
                else:
                    self._wake.wait()
        except OSError as error:
            self.end(Fault.CLOSED, error.strerror or str(error))
