# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A session with an OVSDB server: JSON-RPC (RFC 7047, section 4) over one stream.

Owns the socket and the framing, nothing else: it does not know our tables and never
reconnects. Works the same in threads and, under eventlet's monkey patching, in greenlets.

Why not ``ovs.db.idl``: see docs/adr/0003-store.md.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

_CHUNK = 1 << 18
_LARGEST = 1 << 30
"""No message of a database of ours comes near this; a peer that sends more is not one."""


class Lost(Exception):
    """The session ended, or the server did not answer in time; the text says how."""


class Refused(Exception):
    """The server answered a request with an error."""


class RowUpdate(msgspec.Struct):
    """One row of an update: both for a change, ``new`` alone for an insertion, ``old`` alone for a deletion."""

    old: dict[str, Any] = {}
    new: dict[str, Any] | None = None


Updates = dict[str, dict[str, msgspec.Raw]]
"""Table, then row UUID, then a :class:`RowUpdate` still to be decoded: one at a time, because a
first dump of everything as Python objects takes ten times the memory of its text."""

decode_row = msgspec.json.Decoder(RowUpdate).decode
decode_updates = msgspec.json.Decoder(Updates).decode


class _Message(msgspec.Struct):
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw()
    id: Any = None
    result: msgspec.Raw = msgspec.Raw()
    error: Any = None


_MESSAGE = msgspec.json.Decoder(_Message)
_UPDATE = msgspec.json.Decoder(tuple[Any, Updates])


_TOKEN = re.compile(rb'\\.|["{}]', re.DOTALL)
_SPACE = b" \t\r\n"


class _Frames:
    """Cuts a byte stream into JSON texts: nothing but their own braces delimits them.

    Linear in the bytes received, whatever the chunks, and at the speed of C: braces outside
    strings are counted per chunk; only a chunk in which one message ends and another begins is
    looked at token by token.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, chunk: bytes) -> list[_Message]:
        """Take what was received; return the messages that are complete now.

        Raises:
            ValueError: this is not JSON-RPC.
            Lost: the message has no end.
        """
        depth, in_string, escaped = self._depth, self._in_string, self._escaped
        outside = self._count(chunk)
        texts = []
        if b"}{" in outside.translate(None, _SPACE):
            start = 0
            for end in self._ends(chunk, depth, in_string, escaped):
                texts.append(b"".join([*self._parts, chunk[start:end]]))
                self._parts.clear()
                start = end
            chunk = chunk[start:]
        self._parts.append(chunk)
        if self._depth == 0 and not self._in_string:
            texts.append(b"".join(self._parts))
            self._parts.clear()
        self._size = self._size + len(chunk) if self._parts else 0
        if self._size > _LARGEST:
            raise Lost(f"the database sent a message of more than {_LARGEST} bytes")
        return [_MESSAGE.decode(text) for text in texts if text.strip()]

    def _count(self, chunk: bytes) -> bytes:
        """Move on past a chunk; returns what of it is outside strings."""
        text = chunk[1:] if self._escaped else chunk
        self._escaped = False
        if b"\\" in text:
            text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
            self._escaped = text.endswith(b"\\")
        pieces = text.split(b'"')
        outside = b"".join(pieces[1 if self._in_string else 0::2])
        self._in_string ^= len(pieces) % 2 == 0
        self._depth += outside.count(b"{") - outside.count(b"}")
        return outside

    @staticmethod
    def _ends(chunk: bytes, depth: int, in_string: bool, escaped: bool) -> list[int]:
        ends = []
        for match in _TOKEN.finditer(chunk, 1 if escaped else 0):
            token = match.group()
            if token == b'"':
                in_string = not in_string
            elif in_string or token[0] == 0x5C:
                continue
            elif token == b"{":
                depth += 1
            else:
                depth -= 1
                if depth == 0:
                    ends.append(match.end())
        return ends


def addresses(remote: str) -> list[tuple[socket.AddressFamily, Any]]:
    """The addresses in a comma-separated list of ``unix:PATH`` and ``tcp:HOST:PORT``.

    Raises:
        ValueError: the text is not such a list.
    """
    found: list[tuple[socket.AddressFamily, Any]] = []
    for one in remote.split(","):
        kind, _, rest = one.strip().partition(":")
        host, _, port = rest.rpartition(":")
        if kind == "unix" and rest:
            found.append((socket.AF_UNIX, rest))
        elif kind == "tcp" and host and port.isascii() and port.isdigit():
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            found.append((family, (host.strip("[]"), int(port))))
        else:
            raise ValueError(f"expected unix:PATH or tcp:HOST:PORT as the database's remote, got {one!r}")
    return found


def connect(remote: str, seconds: float) -> socket.socket:
    """Connect to the first address of a remote that answers.

    Raises:
        ValueError: see :func:`addresses`.
        OSError: none answers.
    """
    last: OSError | None = None
    for family, address in addresses(remote):
        connection = socket.socket(family)
        connection.settimeout(seconds)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            last = error
            continue
        connection.settimeout(None)
        return connection
    assert last is not None
    raise last


class _Pending:
    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result = msgspec.Raw()
        self.error: Exception | None = None


def _ignore(_: Updates) -> None:
    """Before the first dump nothing is monitored."""


class Session:
    """One connection, from its opening to its loss.

    Args:
        remote: see :func:`connect`.
        seconds: to connect.
    """

    def __init__(self, remote: str, seconds: float = 5.0) -> None:
        self._socket = connect(remote, seconds)
        self._frames = _Frames()
        self._sending = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._serial = 0
        self._closed: str | None = None

    def call(self, method: str, params: list[Any], seconds: float) -> msgspec.Raw:
        """Send a request and wait for its answer, which :meth:`receive` in another thread will read.

        Returns:
            The result's JSON text.

        Raises:
            Lost: no answer; whether the request was carried out is not known.
            Refused: the server's error.
        """
        pending = self._request(method, params)
        if not pending.done.wait(seconds):
            self.close(f"no answer to {method} within {seconds:.0f} s")
        if pending.error is not None:
            raise pending.error
        return pending.result

    def ask(self, method: str, params: list[Any], seconds: float) -> msgspec.Raw:
        """Like :meth:`call`, but reads the answer itself: only before :meth:`receive` is used."""
        pending = self._request(method, params)
        self._socket.settimeout(seconds)
        while not pending.done.is_set():
            self._read(_ignore)
        self._socket.settimeout(None)
        if pending.error is not None:
            raise pending.error
        return pending.result

    def receive(self, on_update: Callable[[Updates], None]) -> None:
        """Read until the session is lost; hand every table update on, in the server's order.

        The server sends a transaction's update before the transaction's answer on the same
        session, so whoever waits in :meth:`call` continues after ``on_update`` saw it.

        Raises:
            Lost: always, in the end.
        """
        while True:
            self._read(on_update)

    def close(self, reason: str = "closed") -> None:
        """End the session; everyone who waits gets :class:`Lost`, and so does :meth:`receive`.

        The descriptor stays until :meth:`release`: it must not go, and be given to another
        connection, while somebody reads from it.
        """
        if self._closed is None:
            self._closed = reason
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for pending in list(self._pending.values()):
            pending.error = Lost(self._closed)
            pending.done.set()
        self._pending.clear()

    def release(self) -> None:
        """Give up the socket, once nobody reads any more."""
        self.close()
        self._socket.close()

    def _request(self, method: str, params: list[Any]) -> _Pending:
        pending = _Pending()
        with self._sending:
            if self._closed is not None:
                raise Lost(self._closed)
            self._serial += 1
            self._pending[self._serial] = pending
            self._send({"method": method, "params": params, "id": self._serial})
        return pending

    def _send(self, message: dict[str, Any]) -> None:
        try:
            # In pieces: eventlet's sendall copies all that is left for each part the kernel takes.
            text = memoryview(msgspec.json.encode(message))
            for start in range(0, len(text), _CHUNK):
                self._socket.sendall(text[start:start + _CHUNK])
        except OSError as error:
            self.close(str(error))
            raise Lost(self._closed) from None

    def _read(self, on_update: Callable[[Updates], None]) -> None:
        try:
            chunk = self._socket.recv(_CHUNK)
        except OSError as error:
            self.close(str(error))
            raise Lost(self._closed) from None
        if not chunk:
            self.close("the database closed the connection")  # or we did, and that reason stands
            raise Lost(self._closed)
        try:
            messages = self._frames.feed(chunk)
        except ValueError as error:
            self.close(f"the database does not speak JSON-RPC: {error}")
            raise Lost(self._closed) from None
        for message in messages:
            self._dispatch(message, on_update)

    def _dispatch(self, message: _Message, on_update: Callable[[Updates], None]) -> None:
        if message.method == "echo":
            with self._sending:
                self._send({"result": message.params, "error": None, "id": message.id})
        elif message.method == "update":
            on_update(_UPDATE.decode(message.params)[1])
        elif message.method is None:
            pending = self._pending.pop(message.id, None)
            if pending is None:
                return
            if message.error is not None:
                pending.error = Refused(json.dumps(message.error))
            pending.result = message.result
            pending.done.set()
