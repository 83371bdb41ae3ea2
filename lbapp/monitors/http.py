# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The check that asks by HTTP, plain or over TLS.

A connection for each request, which is closed behind it. Of the answer, the first 32 KiB of headers and the first
64 KiB of body are read, no more.
"""

from __future__ import annotations

import httptools
import re2

from lbapp.config.fields import REGEX
from lbapp.config.monitor import MonitorType, codes
from lbapp.monitors.checks import ANSWER_MOST, Check, Surroundings
from lbapp.monitors.errors import CheckFailed
from lbapp.monitors.protocol import Target
from lbapp.monitors.stream import Stream, TlsStream, server_name, tls_context

HEADERS_MOST = 32 << 10
"""Bytes until the headers have ended."""
_INTERIM = frozenset({100, 102, 103})


class _Answer:
    """What httptools calls; it keeps what counts. Nothing here raises."""

    __slots__ = ("_head_only", "_parser", "body", "bounded", "complete", "headers", "status")

    def __init__(self, head_only: bool) -> None:
        self._head_only = head_only
        self.body = bytearray()
        self.status = 0
        self.headers = self.complete = self.bounded = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take some of it.

        Raises:
            CheckFailed: it is no HTTP.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.complete = True
        except httptools.HttpParserError:
            # Something behind the end of an answer is none of our business.
            if not self.complete:
                raise CheckFailed("the answer is no HTTP") from None

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Whether the body says itself where it ends."""
        if len(name) in (14, 17) and name.lower() in (b"content-length", b"transfer-encoding"):
            self.bounded = True

    def on_headers_complete(self) -> None:
        """The status is known."""
        if self.complete:
            return
        status = self._parser.get_status_code()
        if status in _INTERIM:
            self.bounded = False
            return
        self.status, self.headers = status, True
        if self._head_only:
            self.complete = True

    def on_body(self, data: bytes) -> None:
        """Some of the body."""
        if self.headers and not self.complete:
            self.body += data[:ANSWER_MOST - len(self.body)]

    def on_message_complete(self) -> None:
        """The end."""
        if self.headers:
            self.complete = True


class Http(Check):
    """See the module."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        monitor = self.monitor
        self._codes = codes(monitor.expected_codes)
        self._regex = re2.compile(monitor.body_regex.encode(), REGEX) if monitor.body_regex else None
        self._tls = tls_context(monitor.tls_verify, ("http/1.1",)) if monitor.type is MonitorType.HTTPS else None
        self._name = server_name(monitor.domain_name, monitor.tls_verify) if monitor.domain_name else None
        self._request = self._written()

    def _written(self) -> bytes:
        monitor, target = self.monitor, self.target
        given = {header.name.lower() for header in monitor.headers}
        lines = [f"{monitor.http_method} {monitor.url_path} HTTP/1.1"]
        if "host" not in given:
            host = f"[{target.address}]" if ":" in target.address else target.address
            usual = 443 if self._tls is not None else 80
            port = "" if target.checked_port == usual else f":{target.checked_port}"
            lines.append(f"Host: {monitor.domain_name or host + port}")
        lines += [f"{name}: {value}" for name, value in (
            ("User-Agent", "lbapp"), ("Accept", "*/*"), ("Connection", "close")) if name.lower() not in given]
        if monitor.http_method == "POST" and "content-length" not in given:
            lines.append("Content-Length: 0")
        lines += [f"{header.name}: {header.value}" for header in monitor.headers]
        return "\r\n".join([*lines, "", ""]).encode()

    async def run(self) -> bool:
        """See :class:`Check`."""
        loop = self.around.loop
        stream = (Stream(loop, self.family, self.address) if self._tls is None
                  else TlsStream(loop, self.family, self.address, self._tls, self._name))
        try:
            await stream.connect()
            await stream.send(self._request)
            answer = await self._read(stream)
        finally:
            stream.close()
        if answer.status not in self._codes:
            raise CheckFailed(f"status {answer.status}, expected {self.monitor.expected_codes}")
        if self._regex is not None and self._regex.search(bytes(answer.body)) is None:
            raise CheckFailed("body does not match")
        return True

    async def _read(self, stream: Stream) -> _Answer:
        answer = _Answer(self.monitor.http_method == "HEAD")
        total = 0
        while True:
            data = await stream.receive()
            if not data:
                if answer.headers and not answer.bounded:
                    return answer
                raise CheckFailed("the answer is cut off" if total else "connection closed without an answer")
            total += len(data)
            answer.feed(data)
            if answer.complete or len(answer.body) >= ANSWER_MOST:
                return answer
            if not answer.headers and total > HEADERS_MOST:
                raise CheckFailed(f"headers of more than {HEADERS_MOST >> 10} KiB")
            if total > HEADERS_MOST + 4 * ANSWER_MOST:  # chunks of next to nothing, trailers without end
                raise CheckFailed("the answer has no end")
