# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What may come of reading what a client said first, and the HTTP answers that the balancer itself gives.

Owns: the outcomes and the bytes of an answer. Never: decides which of them it is, or sends anything.
"""

from __future__ import annotations

from lbapp.control.messages import Edit
from lbapp.values import Value

KEY_MOST = 200
"""Characters of the text that says what decided."""


class More(Value, frozen=True):
    """Not decidable yet: more bytes are needed."""


class ToPool(Value, frozen=True):
    """A member of a pool gets the connection.

    Attributes:
        pool: the pool's name; None is the virtual server's default pool.
        policy: the policy that decided; empty with the default pool.
        key: what decided, short and printable: ``GET shop.example/img/a.png``, ``sni shop.example``.
        edit: how what the client said is changed for the member.
    """

    pool: str | None
    policy: str
    key: str
    edit: Edit | None = None


class Answer(Value, frozen=True):
    """The client gets these bytes, and then the connection is closed.

    Attributes:
        status: the HTTP status code within ``data``.
        data: the whole response.
        policy: the policy that decided; empty where the request itself is at fault.
        why: for people.
    """

    status: int
    data: bytes
    policy: str
    why: str


class Reject(Value, frozen=True):
    """The connection is reset.

    Attributes:
        policy: the policy that decided; empty where what the client said is at fault.
        why: for people.
    """

    policy: str
    why: str


Outcome = More | ToPool | Answer | Reject

MORE = More()


_PHRASES = {
    200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 301: "Moved Permanently", 302: "Found",
    303: "See Other", 304: "Not Modified", 307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    410: "Gone", 414: "URI Too Long", 421: "Misdirected Request", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 451: "Unavailable For Legal Reasons", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}


def _phrase(status: int) -> str:
    # A policy may name any code; a phrase may say anything (RFC 9112, 4).
    return _PHRASES.get(status, "Status")


def response(status: int, *, body: bytes = b"", content_type: str = "text/plain", location: str = "",
             head: bool = False) -> bytes:
    """A whole HTTP/1.1 response that ends the connection.

    Args:
        status: 200-599.
        body: left out with 204 and 304, which have none (RFC 9110, 15.3.5 and 15.4.5).
        content_type: of the body; said only where there is one.
        location: for redirects.
        head: answers a HEAD request: the headers tell the length of a body that does not follow (RFC 9110, 9.3.2).
    """
    lines = [f"HTTP/1.1 {status} {_phrase(status)}"]
    if location:
        lines.append(f"Location: {location}")
    bodiless = status in (204, 304)
    if not bodiless:
        if body and content_type:
            lines.append(f"Content-Type: {content_type}")
        lines.append(f"Content-Length: {len(body)}")
    lines.append("Connection: close")
    start = "\r\n".join((*lines, "", "")).encode("latin-1")
    return start if head or bodiless else start + body


def refusal(status: int, why: str) -> Answer:
    """The answer to a request that is at fault, or comes at a bad time: its status line says all."""
    return Answer(status, response(status, body=f"{status} {_phrase(status)}\n".encode()), "", why)


def printable(text: str) -> str:
    """The beginning of a text, with a ``?`` for every character that is none to be printed."""
    text = text[:KEY_MOST]
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one.isascii() and one.isprintable() else "?" for one in text)
