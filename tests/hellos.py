# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""ClientHellos and first flights of HTTP/2, made by the field, so that tests can also make wrong ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import hpack

from lbapp.control.l7.http2 import PREFACE


def vector(size: int, data: bytes) -> bytes:
    """Data behind its length."""
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, b"".join(bytes((kind,)) + vector(2, name) for name in names)))


def alpn(*names: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def body(*extensions: bytes, session: bytes = b"", version: bytes = b"\3\3", suites: bytes = b"\x13\x01",
         compression: bytes = b"\0") -> bytes:
    """A hello without the head of its handshake message; without extensions it ends before them."""
    start = version + bytes(range(32)) + vector(1, session) + vector(2, suites) + vector(1, compression)
    return start + (vector(2, b"".join(extensions)) if extensions else b"")


def records(message: bytes, size: int = 16384, kind: int = 22) -> bytes:
    """A handshake message in records of at most ``size`` bytes."""
    return b"".join(bytes((kind, 3, 1)) + vector(2, message[at:at + size]) for at in range(0, len(message), size))


def hello(*extensions: bytes, size: int = 16384, **fields: bytes) -> bytes:
    """A whole ClientHello on the wire."""
    return records(b"\1" + vector(3, body(*extensions, **fields)), size)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


REQUEST = ((":method", "GET"), (":scheme", "http"), (":authority", "shop.example"), (":path", "/img/a.png"))


def block(headers: Iterable[tuple[str, str]] = REQUEST) -> bytes:
    """Headers in HPACK."""
    return hpack.Encoder().encode(list(headers))


def h2(headers: Sequence[tuple[str, str]] = REQUEST, *before: bytes) -> bytes:
    """What a client with prior knowledge says first."""
    return b"".join((PREFACE, frame(4, 0, 0, bytes.fromhex("000300000064")), *before,
                     frame(1, 0x5, 1, block(headers))))
