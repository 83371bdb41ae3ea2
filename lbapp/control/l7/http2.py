# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 with prior knowledge (RFC 9113): the connection preface and the first request's headers.

Owns: which request opens the connection. Never: answers, or reads a second request; whatever is wrong is a
:class:`Reject`, since an answer would take frames that belong to whoever gets the connection.

Only what a client can say without having heard anything is accepted: its SETTINGS, then WINDOW_UPDATE, PRIORITY, PING
and unknown frames, then HEADERS with its CONTINUATIONs.
"""

from __future__ import annotations

import hpack

from lbapp.control.l7.http1 import AUTHORITY, HEADERS_MOST, METHOD, METHOD_MOST, ORIGIN
from lbapp.control.l7.outcomes import Reject
from lbapp.control.l7.request import Request, host_of

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TELLING = PREFACE[:4]
"""From here on a client can be told from one that uses a method such as POST."""
SAID_MOST = 65536
FRAME_MOST = 16384
BLOCK_MOST = 32768
LIST_MOST = 65536
FRAMES_MOST = 64

DATA, HEADERS, PRIORITY, RESET, SETTINGS, PROMISE, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x4, 0x8, 0x20
_CONNECTION_BOUND = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


def _reject(why: str) -> Reject:
    return Reject("", f"HTTP/2: {why}")


def parse(data: bytes) -> Request | Reject | None:
    """Read the first request.

    Args:
        data: all that the client sent so far; as far as it goes it agrees with ``PREFACE``.

    Returns:
        The request, why it is refused, or None while it is not complete.
    """
    at = len(PREFACE)
    block: bytearray | None = None
    stream = 0
    for number in range(FRAMES_MOST):
        head = data[at:at + 9]
        if len(head) < 9:
            return None
        length = int.from_bytes(head[:3], "big")
        kind, flags = head[3], head[4]
        target = int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
        at += 9 + length
        if length > FRAME_MOST:
            return _reject(f"a frame of {length} bytes")
        if at > SAID_MOST:
            return _reject(f"no request within {SAID_MOST} bytes")
        wrong = _misplaced(number, kind, flags, length, target, stream)
        if wrong:
            return _reject(wrong)
        if len(data) < at:
            return None
        payload = data[at - length:at]
        if kind == HEADERS:
            fragment = _fragment(flags, payload)
            if fragment is None:
                return _reject("padding or priority longer than its frame")
            stream = target
            block = bytearray(fragment)
        elif kind == CONTINUATION and block is not None:
            block += payload
        else:
            continue
        if len(block) > BLOCK_MOST:
            return _reject(f"headers of more than {BLOCK_MOST} bytes before HPACK")
        if flags & END_HEADERS:
            return _request(bytes(block))
    return _reject(f"no request within {FRAMES_MOST} frames")


def _misplaced(number: int, kind: int, flags: int, length: int, target: int, stream: int) -> str:
    """What is wrong with a frame at this place, by its head alone; empty: nothing."""
    if number == 0:
        if kind != SETTINGS or flags & ACK or target or length % 6:
            return "the preface does not end in SETTINGS"
        return ""
    if stream:
        return "" if kind == CONTINUATION and target == stream else "headers without their continuation"
    if kind == HEADERS:
        return "" if target % 2 else "a request on a stream that is not the client's"
    if kind == SETTINGS:
        return "" if not target and not length % 6 and not (flags & ACK and length) else "SETTINGS that are none"
    if kind == PING:
        return "" if length == 8 and not target else "a PING that is none"
    if kind == WINDOW:
        return "" if length == 4 and not target else "a WINDOW_UPDATE that is none"
    if kind == PRIORITY:
        return "" if length == 5 and target else "a PRIORITY that is none"
    return "" if kind > CONTINUATION else f"frame type {kind} before a request"


def _fragment(flags: int, payload: bytes) -> bytes | None:
    """The field block within HEADERS, without padding and priority (RFC 9113, 6.2)."""
    start, padding = 0, 0
    if flags & PADDED:
        if not payload:
            return None
        start, padding = 1, payload[0]
    if flags & WITH_PRIORITY:
        start += 5
    end = len(payload) - padding
    return payload[start:end] if start <= end else None


def _request(block: bytes) -> Request | Reject:
    """The request of a whole field block (RFC 9113, 8.2 and 8.3)."""
    decoder = hpack.Decoder(max_header_list_size=LIST_MOST)
    try:
        decoded = decoder.decode(block, raw=True)
    except (hpack.HPACKError, ValueError, IndexError) as error:
        return _reject(f"headers that HPACK cannot read ({type(error).__name__})")
    pseudo: dict[bytes, bytes] = {}
    headers: list[tuple[bytes, bytes]] = []
    for pair in decoded:
        name, value = bytes(pair[0]), bytes(pair[1])
        if name.startswith(b":"):
            if headers or name in pseudo or name not in (b":method", b":scheme", b":authority", b":path"):
                return _reject("pseudo-headers that are unknown, twice or late")
            pseudo[name] = value
        elif not METHOD.fullmatch(name) or name != name.lower() or name in _CONNECTION_BOUND:
            return _reject("a header that HTTP/2 does not have")
        elif name == b"te" and value != b"trailers":
            return _reject("te says more than trailers")
        else:
            headers.append((name, value))
        if any(byte in value for byte in b"\0\r\n") or value != value.strip(b" \t"):
            return _reject("a header's value with NUL, CR, LF, or white space around it")
    if len(headers) > HEADERS_MOST:
        return _reject(f"more than {HEADERS_MOST} headers")
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if method == b"CONNECT":
        return _reject("CONNECT")
    if not METHOD.fullmatch(method) or len(method) > METHOD_MOST or not pseudo.get(b":scheme"):
        return _reject("no method or no scheme")
    if not ORIGIN.fullmatch(path) and not (path == b"*" and method == b"OPTIONS"):
        return _reject("the path is none")
    hosts = [value for name, value in headers if name == b"host"]
    authority = pseudo.get(b":authority")
    said = [*([] if authority is None else [authority]), *hosts]
    if len(hosts) > 1 or not all(one.lower() == said[0].lower() for one in said):
        return _reject("the host is said twice, and not the same")
    host = said[0] if said else b""
    if not AUTHORITY.fullmatch(host):
        return _reject("the authority is not a host")
    if authority is not None and not hosts:
        headers.insert(0, (b"host", authority))  # so that a rule for the header Host finds it in either version
    return Request(method, path, host_of(host), headers, "HTTP/2")
