# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.0 and 1.1: the head of the first request, from the first byte to the empty line.

Owns: what is a request, what is too long, and what is refused. Never: waits for a body, or decides
about a good request.

The judge is httptools (llhttp, strict); what llhttp lets pass and a member could read in another way is refused here:
both ``Content-Length`` and ``Transfer-Encoding``, several ``Content-Length``, any transfer coding but one ``chunked``,
that one with HTTP/1.0 too, bare CR or LF, NUL and other controls, white space around a header's name, folded lines,
HTTP/1.1 without exactly one ``Host``, a target whose authority is not that of ``Host``, bytes in a target that are no
ASCII to be printed, a fragment.

That is stricter than HAProxy, which writes every head anew and may therefore repair it. Here the client's own bytes go
on, and what a member would make of them cannot be known. Of the refused cases of tests/unit/test_l7_http.py HAProxy
2.6.12, as it is unless configured, refuses most too: lengths that differ or are no number, transfer codings (but see
below), a bare CR, white space or NUL in a header's name, a fragment, other bytes in a target, another authority than
``Host``. It repairs: ``Content-Length`` beside ``Transfer-Encoding`` (dropped), the same ``Content-Length`` or ``Host``
twice (once), bare LF, folded lines, empty lines in front, wider gaps in the request line, other versions. It passes on:
no ``Host`` or one that is no host, odd targets, ``Transfer-Encoding`` with HTTP/1.0, NUL and DEL in a header's value,
``CONNECT``.

A refusal that does not need the whole head must not depend on what comes later, or on how the bytes were split. Hence
two ways that agree: :func:`parse` accepts a whole head in few steps; :func:`_fault` goes line by line, and says of any
beginning what its first fault is. Whatever :func:`_fault` finds, :func:`parse` does not accept.
"""

from __future__ import annotations

import functools
import re

import httptools

from lbapp.control.l7.outcomes import Answer, refusal
from lbapp.control.l7.request import Received, Request, host_of, split_target

HEAD_MOST = 65536
HEADERS_MOST = 100
LINE_MOST = 16384
METHOD_MOST = 32

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
METHOD = re.compile(_TOKEN)
_NAME = re.compile(_TOKEN + rb":")
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]")
# RFC 3986's reg-name without the comma (it would be two values), or an address in brackets.
AUTHORITY = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]{0,5})?")
_TARGET = re.compile(rb"[!\"$-~]+")  # ASCII to be printed, without "#"
ORIGIN = re.compile(rb"/[!\"$-~]*")
_HOST_CACHED = 255
_PLAIN = bytes((9, *range(32, 127), *range(128, 256)))
_KNOWN = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE"})
_SPOKEN = {b"HTTP/1.1": "HTTP/1.1", b"HTTP/1.0": "HTTP/1.0"}


class _Nobody:
    """Gets no call: llhttp only has to say whether all is well."""

    __slots__ = ()


_NOBODY = _Nobody()


def _line_fault(line: bytes) -> Answer | None:
    """What is wrong with a request line (without its line end)."""
    method, _, rest = line.partition(b" ")
    if not METHOD.fullmatch(method) or len(method) > METHOD_MOST:
        return refusal(400, "not a request of HTTP: no method")
    target, space, version = rest.partition(b" ")
    if not space or not _TARGET.fullmatch(target) or b" " in version:
        return refusal(400, "the request line is not method, target and version")
    if not _VERSION.fullmatch(version):
        # HTTP/3.0 is caught below; HTTP/3 or RTSP/1.0 are no HTTP version at all (RFC 9112, 2.3).
        return refusal(400, "the version is not one of HTTP")
    if version not in _SPOKEN:
        return refusal(505, f"version {version.decode()}")
    if method == b"CONNECT":
        return refusal(501, "CONNECT")
    return None


def _header_fault(line: bytes) -> Answer | None:
    """What is wrong with a header line (without its line end)."""
    if not _NAME.match(line):
        return refusal(400, "a folded header line" if line[:1] in b" \t" else "a header line without a proper name")
    if line.translate(None, _PLAIN):
        return refusal(400, "a control character in a header")
    return None


def _fault(data: bytes) -> Answer | None:
    """The first fault in the beginning of a request; None: none yet. Looks at no more than ``HEAD_MOST`` bytes."""
    start = 2 if data.startswith(b"\r\n") else 0
    end = data.find(b"\n", start, start + LINE_MOST)
    line = data[start:end if end >= 0 else start + LINE_MOST]
    if end < 0:
        word = line.partition(b" ")[0].removesuffix(b"\r")
        if (word and not METHOD.fullmatch(word)) or len(word) > METHOD_MOST or line[:1] == b" ":
            return refusal(400, "not a request of HTTP: no method")
        if len(line) < LINE_MOST:
            return None
        return refusal(414, f"a request line of more than {LINE_MOST} bytes")
    found = _line_fault(line.removesuffix(b"\r"))
    if found is not None:
        return found
    if not line.endswith(b"\r"):
        return refusal(400, "a line that does not end in CR LF")
    count = 0
    at = end + 1
    while (end := data.find(b"\n", at, HEAD_MOST)) >= 0:
        line = data[at:end]
        if not line.endswith(b"\r"):
            return refusal(400, "a line that does not end in CR LF")
        if line == b"\r":
            return None
        count += 1
        found = _header_fault(line[:-1])
        if found is not None:
            return found
        if count > HEADERS_MOST:
            return refusal(431, f"more than {HEADERS_MOST} headers")
        at = end + 1
    return refusal(431, f"a head of more than {HEAD_MOST} bytes") if len(data) > HEAD_MOST else None


def parse(data: bytes) -> Request | Answer | None:
    """Read the head of a request.

    Args:
        data: all that the client sent so far; what follows the head is not looked at. One empty line in front is
            skipped (RFC 9112, 2.2).

    Returns:
        The request, the answer to one that is refused, or None while the head is not complete.
    """
    start = 2 if data[:2] == b"\r\n" else 0
    end = data.find(b"\r\n\r\n", start, HEAD_MOST) + 4
    if end < 4:
        return _fault(data)
    head = data[start:end]
    line_end = head.find(b"\r\n")
    parts = head[:line_end].split(b" ")
    if len(parts) != 3 or line_end >= LINE_MOST - 1 or head.count(b"\r\n") > HEADERS_MOST + 2:
        return _refuse(data)
    method, target, version = parts
    if version not in _SPOKEN or not _TARGET.fullmatch(target):
        return _refuse(data)
    judged = head
    if method not in _KNOWN:
        # llhttp knows its own list of methods only; any token is one (RFC 9110, 9.1), and members know which.
        if method == b"CONNECT" or len(method) > METHOD_MOST or not METHOD.fullmatch(method):
            return _refuse(data)
        judged = b"GET" + head[len(method):]
    try:
        httptools.HttpRequestParser(_NOBODY).feed_data(judged)
    except httptools.HttpParserUpgrade:
        pass  # a good request that asks for another protocol: whether it gets it is the member's affair
    except httptools.HttpParserError:
        return _refuse(data)
    return _examine(Received(method, target, b"", head, _SPOKEN[version]))


def _refuse(data: bytes) -> Answer:
    """The answer to a whole head that was not accepted: its first fault, or else what only a whole head can have."""
    return _fault(data) or refusal(400, "a head that is not of HTTP/1.1")


def _examine(request: Received) -> Request | Answer:
    """What only a whole head shows. Fills in the host."""
    lower = request.lower
    said = b""
    at = lower.find(b"\nhost:") + 6
    if at >= 6:
        if lower.find(b"\nhost:", at) >= 0:
            return refusal(400, "more than one Host")
        said = request.head[at:lower.find(b"\r", at)].strip(b" \t")
    elif request.version == "HTTP/1.1":
        return refusal(400, "no Host")
    if b"\ncontent-length:" in lower or b"\ntransfer-encoding:" in lower:
        wrong = _framing(request)
        if wrong:
            return refusal(400, wrong)
    host = _host(said) if len(said) <= _HOST_CACHED else _host.__wrapped__(said)
    if host is None:
        return refusal(400, "Host is not a host")
    request.host = host
    if request.target[:1] == b"/":
        return request
    if request.target == b"*" and request.method == b"OPTIONS":
        return request
    return _absolute(request, said)


def _framing(request: Received) -> str:
    """What is wrong with the length of the body; empty: nothing."""
    lengths, codings = request.values(b"content-length"), request.values(b"transfer-encoding")
    if len(lengths) > 1 or not all(one.isdigit() for one in lengths):
        return "Content-Length is not one number"
    if not codings:
        return ""
    if lengths:
        return "both Content-Length and Transfer-Encoding"
    if request.version == "HTTP/1.0":
        return "Transfer-Encoding with HTTP/1.0"
    steps = [one.strip(b" \t").lower() for one in b",".join(codings).split(b",")]
    if steps != [b"chunked"]:
        # Others are legal and hardly used; a name that a member misreads hides where its body ends (HAProxy: 422).
        return "Transfer-Encoding is not chunked alone"
    return ""


def _absolute(request: Received, said: bytes) -> Request | Answer:
    """A request whose target has a host of its own, which must be the one of ``Host``."""
    authority, target = split_target(request.target)
    if authority is None:
        return refusal(400, "the target is neither a path nor absolute")
    if not authority or not AUTHORITY.fullmatch(authority):
        return refusal(400, "the target's authority is not a host")
    if said and not _same(authority, said):
        return refusal(400, "the target's authority is not that of Host")
    return Received(request.method, target, host_of(authority), request.head, request.version)


@functools.lru_cache(maxsize=1024)
def _host(said: bytes) -> bytes | None:
    """The normal form of what ``Host`` says; None where that is no host. Few hosts are asked for often."""
    return host_of(said) if AUTHORITY.fullmatch(said) else None


def _same(authority: bytes, host: bytes) -> bool:
    """Whether two authorities are one, a port that is the scheme's own or empty being none."""
    def normal(one: bytes) -> bytes:
        one = one.lower()
        for port in (b":", b":80"):
            one = one.removesuffix(port)
        return one
    return normal(authority) == normal(host)
