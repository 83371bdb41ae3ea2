# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTP request as rules see it: what is compared, and in which form.

Owns: the normal forms of host, path, query, cookies and file type. Never: parses a protocol, or decides.

What rules compare is always bytes:

* ``method``: as it was sent.
* ``host``: of ``Host`` (or ``:authority``), without its port and without one trailing dot, in lower case.
* ``path``: of the target without the query, *normalized*, so that no other spelling leads around a rule: ``%XX`` is
  decoded once (``%252e`` becomes ``%2e`` and stays that; what is no ``%XX`` stays), then ``//`` becomes ``/``, and
  dot segments are removed (RFC 3986, 5.2.4; nothing leads above the root). A backslash and ``;`` mean nothing.
* parameters: the query, split at ``&``, names and values decoded once, ``+`` being a space; the first ``=`` splits.
* cookies: of all ``Cookie`` headers, split at ``;``; names are compared as they are (RFC 6265), values too, with
  quotation marks if they have any.
* ``file_type``: what follows the last dot in the last segment of ``path``, in lower case; empty without a dot.
* ``headers``: names in lower case, values without white space at the ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lbapp.control.l7.outcomes import KEY_MOST

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BYTES = {f"{high}{low}".encode(): bytes((int(high + low, 16),))
          for high in "0123456789abcdefABCDEF" for low in "0123456789abcdefABCDEF"}
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)", re.DOTALL)


def unescape(text: bytes) -> bytes:
    """Decode ``%XX`` once; what is no such escape stays as it is."""
    return _ESCAPE.sub(lambda found: _BYTES[found[1]], text) if b"%" in text else text


def normal_path(raw: bytes) -> bytes:
    """The normal form of a path, as the module says."""
    path = unescape(raw)
    if b"/." not in path and b"//" not in path:
        return path
    kept: list[bytes] = []
    parts = path.split(b"/")
    for part in parts:
        if part == b"..":
            if kept:
                kept.pop()
        elif part not in (b"", b"."):
            kept.append(part)
    ending = b"/" if kept and parts[-1] in (b"", b".", b"..") else b""
    return b"/" + b"/".join(kept) + ending


def host_of(authority: bytes) -> bytes:
    """The host within ``host:port``: lower case, no port, no trailing dot."""
    host = authority[:authority.find(b"]") + 1] if authority.startswith(b"[") else authority.partition(b":")[0]
    return host.lower().removesuffix(b".")


def split_target(target: bytes) -> tuple[bytes | None, bytes]:
    """The authority of an absolute-form target (None in any other form), and the target without it.

    ``http://a.example?x`` has an empty path, which is ``/`` (RFC 9110, 4.2.3).
    """
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        return None, target
    rest = found[2]
    return found[1], rest if rest.startswith(b"/") else b"/" + rest


class Request:
    """A request line and its headers. Parameters are worked out when they are first asked for.

    Attributes:
        method: as it was sent.
        target: path and query as they were sent, without scheme and authority.
        path: in its normal form.
        host: in its normal form; empty where the client named none.
        headers: names in lower case, values stripped, in their order.
        version: ``HTTP/1.1`` and so on.
        head: all of it as it was sent, where a value of a header or cookie stands as it is; None where it does not.
    """

    __slots__ = ("_headers", "_parameters", "head", "host", "method", "path", "target", "version")

    def __init__(self, method: bytes, target: bytes, host: bytes, headers: list[tuple[bytes, bytes]] | None,
                 version: str = "HTTP/1.1") -> None:
        self.method = method
        self.target = target
        self.host = host
        self.version = version
        self.path = normal_path(target.partition(b"?")[0])
        self.head: bytes | None = None
        self._headers = headers
        self._parameters: list[tuple[bytes, bytes]] | None = None

    @classmethod
    def of(cls, method: str, url: str, headers: Iterable[tuple[str, str]] = ()) -> Request:
        """A request that nobody has sent.

        Args:
            method: such as ``GET``.
            url: absolute, or a path; its authority is what ``Host`` would say, unless ``headers`` has one.
            headers: names and values.
        """
        pairs = [(name.strip().lower().encode(), value.strip().encode()) for name, value in headers]
        authority, target = split_target(url.partition("#")[0].encode())
        said = next((value for name, value in pairs if name == b"host"), None)
        if said is None and authority is not None:
            said = authority
            pairs.insert(0, (b"host", authority))
        return cls(method.encode(), target, host_of(said or b""), pairs)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """All headers: names in lower case, values stripped."""
        return self._headers or []

    @property
    def query(self) -> bytes:
        """What follows the first ``?``, as it was sent."""
        return self.target.partition(b"?")[2]

    def cookie(self, name: bytes) -> list[bytes]:
        """The values of all cookies of a name."""
        found = []
        for value in self.values(b"cookie"):
            for piece in value.split(b";"):
                if name in piece:  # most cookies are others
                    key, equals, said = piece.partition(b"=")
                    if equals and key.strip(b" \t") == name:
                        found.append(said.strip(b" \t"))
        return found

    def parameter(self, name: bytes) -> list[bytes]:
        """The values of all parameters of a name. Where the name cannot occur, nothing is taken apart."""
        if self._parameters is None:
            target = self.target
            if b"?" not in target or (name not in target and b"%" not in target and b"+" not in target):
                return []
        return [value for key, value in self.parameters if key == name]

    @property
    def file_type(self) -> bytes:
        """The extension of the path's last segment, lower case, without its dot."""
        _, dot, extension = self.path.rpartition(b"/")[2].rpartition(b".")
        return extension.lower() if dot else b""

    @property
    def parameters(self) -> list[tuple[bytes, bytes]]:
        """Names and values of the query's parameters, decoded, in their order."""
        if self._parameters is None:
            self._parameters = []
            for piece in self.query.replace(b"+", b" ").split(b"&"):
                if piece:
                    key, _, value = piece.partition(b"=")
                    self._parameters.append((unescape(key), unescape(value)))
        return self._parameters

    def values(self, name: bytes) -> list[bytes]:
        """The values of all headers of a name (lower case)."""
        return [value for key, value in self.headers if key == name]

    def describe(self) -> str:
        """``GET shop.example/img/a.png``: what is told of it in logs, without its query (which may hold secrets)."""
        text = b"%b %b%b" % (self.method, self.host, self.target.partition(b"?")[0])
        return text[:KEY_MOST].decode("latin-1")


class Received(Request):
    """A request as it came: headers are looked up in the bytes, so that only those that rules ask for cost anything.

    Attributes:
        head: from the request line to the empty line, found good: lines end in CR LF, which stands nowhere else, no
            line is folded, and a name is followed by its colon at once.
        lower: the same in lower case.
    """

    __slots__ = ("lower",)

    head: bytes

    def __init__(self, method: bytes, target: bytes, host: bytes, head: bytes, version: str) -> None:
        self.method = method
        self.target = target
        self.host = host
        self.version = version
        path = target.partition(b"?")[0]
        self.path = normal_path(path) if b"%" in path or b"/." in path or b"//" in path else path
        self._headers = self._parameters = None
        self.head = head
        self.lower = head.lower()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """All headers: names in lower case, values stripped."""
        if self._headers is None:
            pairs = (line.partition(b":") for line in self.head.split(b"\r\n")[1:-2])
            self._headers = [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
        return self._headers

    def values(self, name: bytes) -> list[bytes]:
        """The values of all headers of a name (lower case)."""
        start = b"\n%b:" % name
        at = self.lower.find(start)
        if at < 0:
            return []
        head = self.head
        at += len(start)
        end = head.find(b"\r", at)
        found = [head[at:end].strip(b" \t")]
        while (at := self.lower.find(start, end)) >= 0:
            at += len(start)
            end = head.find(b"\r", at)
            found.append(head[at:end].strip(b" \t"))
        return found
