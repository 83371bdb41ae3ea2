# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``close_after_first``: what is made of a request (:mod:`lbapp.control.l7.closing`), and who is asked to make it."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import Application, Binding, Protocol, VirtualServer
from lbapp.control.l7 import Answer, Reader, ToPool
from lbapp.control.l7.closing import closing
from lbapp.control.l7.http1 import parse
from lbapp.control.l7.http2 import PREFACE
from lbapp.control.l7.request import Request

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


def changed(data: bytes) -> bytes:
    edit = closing(data)
    return data if edit is None else data[:edit.at] + edit.text + data[edit.at + edit.removed:]


@pytest.mark.parametrize(("said", "expected"), [
    (GET + b"\r\n", GET + b"Connection: close\r\n\r\n"),
    (GET + b"\r\nGET /next", GET + b"Connection: close\r\n\r\nGET /next"),
    (b"\r\n" + GET + b"\r\nbody", b"\r\n" + GET + b"Connection: close\r\n\r\nbody"),
    (GET + b"Connection: keep-alive\r\nX: y\r\n\r\n", GET + b"Connection: close\r\nX: y\r\n\r\n"),
    (GET + b"CONNECTION:Keep-Alive\r\n\r\n", GET + b"CONNECTION: close\r\n\r\n"),
    (GET + b"Connection:\t \r\n\r\n", GET + b"Connection: close\r\n\r\n"),
    (GET + b"Connection: TE, keep-alive ,X-Hop\r\nTE: trailers\r\n\r\n",
     GET + b"Connection: close, te, x-hop\r\nTE: trailers\r\n\r\n"),
    (GET + b"Connection: te\r\nX: y\r\nConnection: keep-alive\r\nTE: trailers\r\n\r\n",
     GET + b"Connection: close, te\r\nX: y\r\nTE: trailers\r\n\r\n"),
    (GET + b"X-Connection: close\r\n\r\n", GET + b"X-Connection: close\r\nConnection: close\r\n\r\n"),
    (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"GET / HTTP/1.0\r\nConnection: close\r\n\r\n")])
def test_what_a_request_becomes(said: bytes, expected: bytes) -> None:
    assert changed(said) == expected
    assert closing(expected) is None, "once"


@pytest.mark.parametrize("said", [
    GET + b"Connection: close\r\n\r\n", GET + b"connection: TE, Close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: TE\r\n\r\n", GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    GET + b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n"])
def test_what_stays_as_it_is(said: bytes) -> None:
    assert closing(said) is None


token = st.text("abcdefXYZ-", min_size=1, max_size=8)
names = st.one_of(token.map(lambda name: f"x-{name}"), st.sampled_from(["Connection", "connection", "CONNECTION"]))
values = st.lists(st.one_of(token, st.sampled_from(["keep-alive", "close", "Keep-Alive", "te", "Upgrade", ""])),
                  max_size=3).map(", ".join)


@given(st.lists(st.tuples(names, values), max_size=6), st.binary(max_size=20), st.sampled_from(["1.0", "1.1"]))
def test_another_parser_sees_a_request_that_closes_and_is_otherwise_the_same(
        headers: list[tuple[str, str]], body: bytes, version: str) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    said = f"GET /p HTTP/{version}\r\nHost: a\r\n{lines}\r\n".encode() + body
    assert isinstance(parse(said), Request)
    after = changed(said)
    assert after.endswith(b"\r\n\r\n" + body)

    def seen(data: bytes) -> h11.Request:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        event = connection.next_event()
        assert isinstance(event, h11.Request)
        return event

    def options(request: h11.Request) -> set[bytes]:
        return {one.strip().lower() for name, value in request.headers if name == b"connection"
                for one in value.split(b",")} - {b""}

    before, now = seen(said), seen(after)
    assert (now.method, now.target, now.http_version) == (before.method, before.target, before.http_version)
    assert [one for one in now.headers if one[0] != b"connection"] == [
        one for one in before.headers if one[0] != b"connection"]
    if after == said:
        assert options(now) & {b"close", b"upgrade"} or (version == "1.0" and b"keep-alive" not in options(now))
    else:
        assert options(now) == (options(before) | {b"close"}) - {b"keep-alive"}


def server(**fields: object) -> VirtualServer:
    return VirtualServer(name="v", vip_address="10.0.0.100", protocol=Protocol.TCP, protocol_port=80, **{
        "application": Application.HTTP, "close_after_first": True, **fields})  # type: ignore[arg-type]


def test_the_reader_says_it_where_it_is_wanted() -> None:
    said = GET + b"\r\n"
    reader = Reader(server())
    for found in (reader.read(said), reader.timed_out(said)):
        assert isinstance(found, ToPool) and found.edit == closing(said)
    found = Reader(server(close_after_first=False)).read(said)
    assert isinstance(found, ToPool) and found.edit is None
    assert isinstance(reader.read(b"GET / HTTP/9.9\r\n\r\n"), Answer)


def test_http2_is_left_as_it_is() -> None:
    headers = bytes((0x82, 0x86, 0x84, 0x41, 1)) + b"a"
    said = PREFACE + bytes(3) + b"\4" + bytes(5) + len(headers).to_bytes(3, "big") + b"\1\5\0\0\0\1" + headers
    found = Reader(server()).read(said)
    assert isinstance(found, ToPool) and found.edit is None


@pytest.mark.parametrize(("fields", "field"), [
    ({"application": Application.TLS}, "application"), ({"application": Application.RAW}, "application"),
    ({"application": Application.L4}, "application"), ({"binding": Binding.HANDOFF}, "binding")])
def test_where_it_cannot_be_it_is_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected "):
        server(**fields)
    for binding in (Binding.AUTO, Binding.SPLICE, Binding.HYBRID, Binding.RELAY):
        assert server(binding=binding).close_after_first
