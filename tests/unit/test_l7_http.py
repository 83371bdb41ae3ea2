# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/1: which requests are read, which are refused, and that neither depends on how the bytes come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.control.l7 import Answer, More, ToPool
from lbapp.control.l7.http1 import HEAD_MOST, HEADERS_MOST, LINE_MOST, parse
from tests.l7_servers import policy, reader, rule, to_pool

HTTP = reader("http",
              to_pool("images", rule("PATH", "STARTS_WITH", "/img/")),
              to_pool("admin", rule("PATH", "EQUAL_TO", "/admin"), rule("HOST_NAME", "EQUAL_TO", "shop.example")),
              policy("teapot", "FIXED_RESPONSE", rule("PATH", "EQUAL_TO", "/tea"), response_status=418,
                     response_body="short\n"))
H = b"Host: shop.example\r\n"


def head(line: bytes = b"GET / HTTP/1.1", *headers: bytes, host: bool = True) -> bytes:
    return b"\r\n".join((line, *((b"Host: shop.example",) if host else ()), *headers, b"", b""))


GOOD = [
    head(), b"\r\n" + head(), head(b"GET / HTTP/1.0", host=False), head(b"OPTIONS * HTTP/1.1"),
    head(b"GET http://shop.example/ HTTP/1.1"), head(b"GET http://SHOP.example:80 HTTP/1.1"),
    head(b"GET https://shop.example/?a HTTP/1.1"), head(b"PROPFIND / HTTP/1.1"), head(b"x-own / HTTP/1.1"),
    head(b"POST / HTTP/1.1", b"Content-Length: 3") + b"abc", head(b"POST / HTTP/1.1", b"Content-Length: 3"),
    head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked"),
    head(b"POST / HTTP/1.1", b"transfer-encoding:\tChunked "),
    head(b"GET / HTTP/1.1", b"Connection: Upgrade", b"Upgrade: websocket"), head(b"GET / HTTP/1.1", b"A:"),
    head(b"GET / HTTP/1.1", b"A: \xe4\t:b"), head(b"GET / HTTP/1.1", b"Host:", host=False),
    head(b"GET / HTTP/1.1", b"Host: [2001:db8::1]:80", host=False), head(b"GET /%00%zz;a=\\ HTTP/1.1"),
    head(b"GET / HTTP/1.1", *(b"A: b" for _ in range(HEADERS_MOST - 1))),
    head(b"GET /" + b"a" * (LINE_MOST - 16) + b" HTTP/1.1"), head(b"GET / HTTP/1.1", b"A: " + b"a" * 60000),
]

REFUSED = [
    (400, head(b"GET / HTTP/1.1", host=False)),
    (400, head(b"GET / HTTP/1.1", b"Host: shop.example")),
    (400, head(b"GET / HTTP/1.1", b"Host: a, b", host=False)),
    (400, head(b"GET / HTTP/1.1", b"Host: a b", host=False)),
    (400, head(b"GET / HTTP/1.1", b"Host: me@a", host=False)),
    (400, head(b"GET / HTTP/1.1", b"Host: a/b", host=False)),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 3", b"Transfer-Encoding: chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Content-Length: 3")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 3", b"Content-Length: 4")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 3", b"Content-Length: 3")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 3, 4")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: +3")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: -3")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 0x3")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length:")),
    (400, head(b"POST / HTTP/1.1", b"Content-Length: 99999999999999999999999")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: identity")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked, gzip")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked, chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: xchunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: gzip, chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: cunked, chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: x\xffy", b"Transfer-Encoding: chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: ,chunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: \x0bchunked")),
    (400, head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")),
    (400, head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked")),
    (400, head(b"GET / HTTP/1.1", b"A : b")),
    (400, head(b"GET / HTTP/1.1", b" A: b")),
    (400, head(b"GET / HTTP/1.1", b"A: b", b" c")),
    (400, head(b"GET / HTTP/1.1", b"A: b", b"\tc: d")),
    (400, head(b"GET / HTTP/1.1", b": b")),
    (400, head(b"GET / HTTP/1.1", b"Ab")),
    (400, head(b"GET / HTTP/1.1", b"A\x00: b")),
    (400, head(b"GET / HTTP/1.1", b"A: b\x00")),
    (400, head(b"GET / HTTP/1.1", b"A: b\rc: d")),
    (400, head(b"GET / HTTP/1.1", b"A: b\nc: d")),
    (400, head(b"GET / HTTP/1.1", b"A: b\r\rc\nd")),
    (400, head(b"GET / HTTP/1.1", b"A: b\x7f")),
    (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    (400, b"\n" + head()),
    (400, b"\r\n\r\n" + head()),
    (400, b" " + head()),
    (400, head(b"GET /")),
    (400, head(b"GET  / HTTP/1.1")),
    (400, head(b"GET / HTTP/1.1 ")),
    (400, head(b"GET\t/ HTTP/1.1")),
    (400, head(b"GET / a HTTP/1.1")),
    (400, head(b"GET / http/1.1")),
    (400, head(b"GET / HTTP/11")),
    (400, head(b"GET / RTSP/1.0")),
    (400, head(b"GET /#a HTTP/1.1")),
    (400, head(b"GET /\xe4 HTTP/1.1")),
    (400, head(b"GET /\x01 HTTP/1.1")),
    (400, head(b"GET a HTTP/1.1")),
    (400, head(b"GET * HTTP/1.1")),
    (400, head(b"GET ftp://shop.example/ HTTP/1.1")),
    (400, head(b"GET http:///a HTTP/1.1")),
    (400, head(b"GET http://other.example/ HTTP/1.1")),
    (400, head(b"GET http://shop.example:81/ HTTP/1.1")),
    (400, head(b"GET http://me@shop.example/ HTTP/1.1")),
    (400, head(b"GET(x) / HTTP/1.1")),
    (400, head(b"A" * 33 + b" / HTTP/1.1")),
    (400, bytes.fromhex("16030100c8010000c40303")),
    (400, b"\x00"), (400, b"SSH-2.0-OpenSSH_9.2\r\n"), (400, b"{\"a\": 1}"),
    (501, head(b"CONNECT shop.example:443 HTTP/1.1")),
    (505, head(b"GET / HTTP/3.0")), (505, head(b"GET / HTTP/2.0")), (505, head(b"GET / HTTP/1.2")),
    (505, head(b"GET / HTTP/0.9")), (505, b"PRI / HTTP/1.1\r\n\r\n"),
    (414, head(b"GET /" + b"a" * (LINE_MOST - 15) + b" HTTP/1.1")), (414, b"GET /" + b"a" * LINE_MOST),
    (414, b"GET /" + b"a" * 2 * HEAD_MOST),
    (431, head(b"GET / HTTP/1.1", *(b"A: b" for _ in range(HEADERS_MOST)))),
    (431, head(b"GET / HTTP/1.1", b"A: " + b"a" * HEAD_MOST)),
    (431, b"GET / HTTP/1.1\r\nA: " + b"a" * HEAD_MOST),
]


@pytest.mark.parametrize("data", GOOD, ids=[repr(one[:70]) for one in GOOD])
def test_a_good_request_is_read(data):
    outcome = HTTP.read(data)
    assert isinstance(outcome, ToPool), outcome
    assert outcome.pool is None and outcome.policy == ""


@pytest.mark.parametrize(("status", "data"), REFUSED, ids=[f"{one[0]} {one[1][:70]!r}" for one in REFUSED])
def test_a_bad_request_is_refused(status, data):
    outcome = HTTP.read(data)
    assert isinstance(outcome, Answer), outcome
    assert outcome.status == status and outcome.policy == "" and outcome.why
    assert outcome.data.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close\r\n" in outcome.data


def consistent(read, data, cuts=None):
    """Every beginning is undecided, until one decides for all that follow."""
    whole = read(data)
    for cut in range(len(data)) if cuts is None else cuts:
        outcome = read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole, (data[:cut], outcome, whole)


@pytest.mark.parametrize("data", [*GOOD, *(one for _, one in REFUSED)], ids=lambda one: repr(one[:70]))
def test_a_beginning_decides_for_everything_behind_it(data):
    cuts = None if len(data) < 2000 else [*range(200), *range(0, len(data), 997), *range(len(data) - 200, len(data)),
                                          *range(LINE_MOST - 3, LINE_MOST + 4), *range(HEAD_MOST - 3, HEAD_MOST + 4)]
    consistent(HTTP.read, data, cuts)
    whole = HTTP.read(data)
    assert HTTP.read(data + b"GET / HTTP/1.1\r\n\0\n\n") == whole


PIECES = st.sampled_from([
    b"GET", b"POST", b"PRI", b"CONNECT", b"FOO", b" ", b"  ", b"/", b"/img/", b"..", b"%2e", b"http://a", b"*",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"Host: a\r\n", b"Host", b":", b": ",
    b"a", b"\t", b"\0", b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n", b"GET / HTTP/1.1\r\n", b"\x80",
    b"#", b"?", b",", b"SM"])
SHAPED = st.one_of(st.lists(PIECES, max_size=20).map(b"".join), st.binary(max_size=60),
                   st.tuples(st.sampled_from([one for one in GOOD if len(one) < 200]), st.integers(0, 90), PIECES,
                             st.integers(0, 3)).map(lambda t: t[0][:t[1]] + t[2] + t[0][t[1] + t[3]:]))


@settings(max_examples=400)
@given(SHAPED)
def test_nothing_a_stranger_says_raises_or_depends_on_how_it_comes(data):
    consistent(HTTP.read, data)
    assert not isinstance(HTTP.timed_out(data), More)
    outcome = HTTP.read(data)
    if isinstance(outcome, ToPool):
        assert outcome.key.isprintable() and outcome.key.isascii() and len(outcome.key) <= 200


def test_what_is_late_is_answered():
    assert HTTP.timed_out(b"").status == 408
    assert HTTP.timed_out(b"GET / HT").status == 408
    assert HTTP.timed_out(b"GET / HTTP/1.1\r\n" + H + b"\r\n") == HTTP.read(head())


def test_no_member_is_503():
    told = HTTP.unavailable()
    assert told.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert told.endswith(b"\r\n\r\n503 Service Unavailable\n") and told == HTTP.unavailable(head())
    assert HTTP.unavailable(head(b"HEAD / HTTP/1.1")) == told[:-24] and HTTP.unavailable(b"PRI * HTTP/2.0") == b""


@pytest.mark.parametrize("data", [
    head(b"HEAD / HTTP/1.1", b"A : b"), head(b"HEAD / HTTP/3.0"), b"\r\nHEAD / HTTP/1.1\n"])
def test_a_refused_head_gets_no_body(data):
    outcome = HTTP.read(data)
    assert isinstance(outcome, Answer) and outcome.data.endswith(b"Connection: close\r\n\r\n")
    consistent(HTTP.read, data)
    assert HTTP.timed_out(b"HEAD / HT").data.endswith(b"\r\n\r\n")


def test_a_head_is_handed_over_as_it_is():
    request: Any = parse(head(b"GET http://Shop.Example:80?q=1 HTTP/1.1", b"Cookie:  a=1 "))
    assert (request.method, request.target, request.host) == (b"GET", b"/?q=1", b"shop.example")
    assert request.headers == [(b"host", b"shop.example"), (b"cookie", b"a=1")] and request.version == "HTTP/1.1"
    other: Any = parse(head(b"FOO /a HTTP/1.0"))
    assert (other.method, other.version) == (b"FOO", "HTTP/1.0")


@pytest.mark.parametrize("name", [b"A", b"Connection", b"Upgrade", b"Transfer-Encoding", b"Content-Length", b"Host"])
@pytest.mark.parametrize("byte", [*range(9), *range(10, 32), 127])
def test_no_control_passes_anywhere_in_a_header(name, byte):
    one = bytes((byte,))
    for line in (name + one + b": x", name + b":" + one, name + b": x" + one, name + b": x" + one + b"y",
                 one + name + b": x", name + b": x," + one + b", y"):
        data = head(b"GET / HTTP/1.1", line)
        assert HTTP.read(data).status == 400, data
        consistent(HTTP.read, data)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([b"A", b"a", b"Ab", b"b", b"X-Host", b"Cookie", b"cookie"]),
                          st.sampled_from([b"", b"a: b", b"\tx ", b":", b"a=1; b=2", b"\xff", b"cookie: a"])),
                max_size=8))
def test_a_header_is_found_in_the_bytes_as_in_the_list(pairs):
    request: Any = parse(head(b"GET / HTTP/1.1", *(b"%b:%b" % pair for pair in pairs)))
    assert request.headers == [(b"host", b"shop.example"), *((name.lower(), value.strip()) for name, value in pairs)]
    for name in (b"a", b"ab", b"b", b"x-host", b"host", b"cookie", b"missing"):
        assert request.values(name) == [value for key, value in request.headers if key == name]
