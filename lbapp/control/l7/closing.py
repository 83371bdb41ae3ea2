# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``close_after_first``: how a request is changed so that its server closes the connection after the answer.

Owns: the change. Never: makes it, or looks at anything but a head that :mod:`lbapp.control.l7.http1` found good.
"""

from __future__ import annotations

from lbapp.control.messages import Edit

_LINE = b"Connection: close\r\n"
_KEEP = b"keep-alive"


def closing(data: bytes) -> Edit | None:
    """The change that makes ``Connection: close`` of whatever the request says of its connection (RFC 9112, 9.6).

    Other options stay: they name headers that are for the next hop alone, and are told to go no further.

    Args:
        data: what the client said, its first head complete and good.

    Returns:
        None where nothing is to be changed: the request says so itself; it is one of HTTP/1.0 that wants no other; it
        asks for another protocol, of which there is no second request.
    """
    start = 2 if data[:2] == b"\r\n" else 0
    end = data.find(b"\r\n\r\n", start) + 2
    lower = data[start:end].lower()
    found: list[tuple[int, int, int]] = []
    options: list[bytes] = []
    at = lower.find(b"\nconnection:")
    while at >= 0:
        value, line_end = at + len(b"\nconnection:"), lower.find(b"\r", at)
        found.append((start + at + 1, start + value, start + line_end))
        options += [one for piece in lower[value:line_end].split(b",") if (one := piece.strip(b" \t"))]
        at = lower.find(b"\nconnection:", line_end)
    if b"close" in options or b"upgrade" in options:
        return None
    if _KEEP not in options and lower[:lower.find(b"\r")].endswith(b" http/1.0"):
        return None
    if not found:
        return Edit(end, 0, _LINE)
    said = b" " + b", ".join([b"close", *(one for one in options if one != _KEEP)])
    # All of it in the first of these lines: not every server reads more than one. The others go.
    _, first, last = found[0]
    text, so_far = said, last
    for line, _, line_end in found[1:]:
        text += data[so_far:line - 2]
        so_far = line_end
    return Edit(first, so_far - first, text)
