# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The one value in what a client said by which it is known again (persistence).

Owns: which of several values counts (the first that is not empty). Never: remembers one, or decides anything by it.
"""

from __future__ import annotations

from lbapp.config.pool import Persistence, PersistenceType
from lbapp.control.l7 import http1, http2, tls
from lbapp.control.l7.request import Request


def value(persistence: Persistence, data: bytes) -> bytes | None:
    """The value; None where the client did not say one.

    Args:
        persistence: of a type that lies in what clients say.
        data: all that the client sent so far, from its first byte.
    """
    kind = persistence.type
    if kind is PersistenceType.RAW:
        offset, length = persistence.span()
        return data[offset:offset + length] if len(data) >= offset + length else None
    if kind in (PersistenceType.TLS_SESSION_ID, PersistenceType.SNI):
        hello = tls.parse(data)
        if not isinstance(hello, tls.ClientHello):
            return None
        if kind is PersistenceType.SNI:
            return hello.sni.encode() if hello.sni else None
        return hello.ticket or hello.session_id or None
    request = http2.parse(data) if data[:4] == http2.TELLING else http1.parse(data)
    if not isinstance(request, Request):
        return None
    return next((one for one in _said(kind, persistence.key.encode(), request) if one), None)


def _said(kind: PersistenceType, name: bytes, request: Request) -> list[bytes]:
    if kind is PersistenceType.APP_COOKIE:
        return request.cookie(name)
    return request.values(name.lower()) if kind is PersistenceType.HEADER else request.parameter(name)


def missing(persistence: Persistence, data: bytes) -> bool:
    """Whether a client that says more may still say the value (RAW, whose bytes may lie behind those that decide)."""
    return persistence.type is PersistenceType.RAW and len(data) < sum(persistence.span())
