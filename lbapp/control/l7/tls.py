# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""TLS: the ClientHello (RFC 8446, 4.1.2; RFC 5246, 7.4.1.2), and nothing behind it.

Owns: server name, ALPN and session id of a hello in any number of records. Never: decrypts or answers.

Encrypted ClientHello: the name that rules compare is always the outer one. With a real ECH that is the public name of
whoever holds the keys, so a rule for the hidden name does not hold and the default pool gets the connection, unless
the public name has a rule of its own. The extension alone must not hide the name: browsers send it, filled with
chance, to every server (GREASE ECH), and the two cannot be told apart.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from lbapp.control.l7.outcomes import Reject

HELLO_MOST = 65536
RECORDS_MOST = 256
RECORD_MOST = 16384
EXTENSIONS_MOST = 128
NAMES_MOST = 64
"""Server names, and ALPN protocols: each costs time, and no client has nearly as many."""
HANDSHAKE = 22
CLIENT_HELLO = 1
SERVER_NAME, ALPN, SESSION_TICKET, ENCRYPTED_HELLO = 0, 16, 35, 0xFE0D
GREASE = frozenset(high << 8 | high for high in range(0x0A, 0x100, 0x10))
"""Values that mean nothing, so that servers stay used to unknown ones (RFC 8701)."""
_EXTENSION = struct.Struct("!HH")
_NAME_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:")


class ClientHello(NamedTuple):
    """What rules may ask of a hello.

    Attributes:
        sni: lower case, without a trailing dot; None where the client names no server.
        alpn: in the client's order, GREASE left out.
        session_id: as sent; rules compare its hexadecimal digits, lower case.
        encrypted: whether an ECH extension is there (which may be GREASE).
        ticket: of a session that the client wants to resume (RFC 5077; TLS 1.2 and before).
    """

    sni: str | None = None
    alpn: tuple[bytes, ...] = ()
    session_id: bytes = b""
    encrypted: bool = False
    ticket: bytes = b""

    def describe(self) -> str:
        """``sni shop.example``: what is told of it in logs."""
        return f"sni {self.sni}" if self.sni is not None else "no sni"


class _Broken(Exception):
    """A field reaches beyond what holds it, or is not what it must be."""


class _Bytes:
    """A cursor that never reads beyond its end."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _Broken("a field that ends behind the hello")
        taken = self.data[self.at:end]
        self.at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """A field behind its length of ``size`` bytes."""
        return self.take(self.number(size))

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def parse(data: bytes) -> ClientHello | Reject | None:
    """Read a hello.

    Args:
        data: all that the client sent so far; what follows the hello is not looked at.

    Returns:
        The hello, why it is none, or None while it is not complete.
    """
    message = _assemble(data)
    if not isinstance(message, bytes):
        return message
    try:
        return _hello(message)
    except _Broken as error:
        return Reject("", f"not a ClientHello: {error}")


def _assemble(data: bytes) -> bytes | Reject | None:
    """The hello's body, out of its records. Every check is made as soon as its bytes are there, in their order."""
    pieces = bytearray()
    at = 0
    for _ in range(RECORDS_MOST):
        head = data[at:at + 5]
        if head and head[0] != HANDSHAKE:
            if head[0] & 0x80 and not at:
                return Reject("", "not TLS (SSL 2 perhaps)")
            return Reject("", "not a TLS handshake")
        if len(head) > 1 and head[1] != 3:
            return Reject("", f"not a version of TLS: {head[1]}")
        if len(head) < 5:
            return None
        length = int.from_bytes(head[3:5], "big")
        if not 0 < length <= RECORD_MOST:
            return Reject("", f"a TLS record of {length} bytes")
        at += 5
        if at + length > HELLO_MOST:
            return Reject("", f"no ClientHello within {HELLO_MOST} bytes")
        pieces += data[at:at + length]
        if pieces and pieces[0] != CLIENT_HELLO:
            return Reject("", f"not a ClientHello: handshake type {pieces[0]}")
        if len(pieces) >= 4:
            size = int.from_bytes(pieces[1:4], "big")
            if size > HELLO_MOST:
                return Reject("", f"a ClientHello of {size} bytes")
            if len(pieces) >= 4 + size:
                return bytes(pieces[4:4 + size])
        at += length
        if at > len(data):
            return None
    return Reject("", f"a ClientHello in more than {RECORDS_MOST} records")


def _hello(body: bytes) -> ClientHello:
    hello = _Bytes(body)
    if hello.take(2)[0] != 3:
        raise _Broken("no version of TLS")
    hello.take(32)
    session_id = hello.vector(1)
    if len(session_id) > 32:
        raise _Broken("a session id of more than 32 bytes")
    suites = hello.vector(2)
    if not suites or len(suites) % 2:
        raise _Broken("cipher suites of an odd length, or none")
    if not hello.vector(1):
        raise _Broken("no compression methods")
    name: str | None = None
    protocols: tuple[bytes, ...] = ()
    ticket = b""
    seen: set[int] = set()
    if hello.left:
        extensions = hello.vector(2)
        if hello.left:
            raise _Broken("bytes behind the extensions")
        for kind, value in _extensions(extensions):
            if kind in seen:
                raise _Broken(f"extension {kind} twice")
            if len(seen) >= EXTENSIONS_MOST:
                raise _Broken(f"more than {EXTENSIONS_MOST} extensions")
            seen.add(kind)
            if kind == SERVER_NAME:
                name = _server_name(value)
            elif kind == ALPN:
                protocols = _protocols(value)
            elif kind == SESSION_TICKET:
                ticket = value
    return ClientHello(name, protocols, session_id, ENCRYPTED_HELLO in seen, ticket)


def _extensions(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each extension; GREASE is left out."""
    at, end = 0, len(data)
    grease = 0
    while at < end:
        if at + 4 > end:
            raise _Broken("a field that ends behind the hello")
        kind, size = _EXTENSION.unpack_from(data, at)
        at += 4 + size
        if at > end:
            raise _Broken("a field that ends behind the hello")
        if kind not in GREASE:
            yield kind, data[at - size:at]
            continue
        grease += 1
        if grease > EXTENSIONS_MOST:
            raise _Broken("nothing but GREASE")


def _server_name(value: bytes) -> str | None:
    """RFC 6066, 3: one name of type host_name; others are unknown and skipped."""
    outer = _Bytes(value)
    names = _Bytes(outer.vector(2))
    if outer.left or not names.left:
        raise _Broken("a server name of the wrong length")
    found: str | None = None
    for _ in range(NAMES_MOST):
        if not names.left:
            return found
        kind = names.number(1)
        name = names.vector(2)
        if kind != 0:
            continue
        if found is not None:
            raise _Broken("two server names")
        if not name or not _NAME_BYTES.issuperset(name):
            raise _Broken("a server name that is none")
        found = name.decode("ascii").lower().removesuffix(".")
    raise _Broken(f"{NAMES_MOST} server names or more")


def _protocols(value: bytes) -> tuple[bytes, ...]:
    """RFC 7301, 3.1."""
    outer = _Bytes(value)
    names = _Bytes(outer.vector(2))
    if outer.left or not names.left:
        raise _Broken("ALPN of the wrong length")
    found: list[bytes] = []
    for _ in range(NAMES_MOST):
        if not names.left:
            return tuple(found)
        name = names.vector(1)
        if not name:
            raise _Broken("an empty ALPN protocol")
        if not (len(name) == 2 and int.from_bytes(name, "big") in GREASE):
            found.append(name)
    raise _Broken(f"{NAMES_MOST} ALPN protocols or more")
