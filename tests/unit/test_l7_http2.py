# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 with prior knowledge: the first request, and everything that is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.control.l7 import Answer, More, Reject, Request, ToPool
from lbapp.control.l7.http1 import HEADERS_MOST
from lbapp.control.l7.http2 import FRAMES_MOST, PREFACE, parse
from tests.hellos import REQUEST, block, frame, h2
from tests.l7_servers import policy, reader, rule, to_pool

HTTP = reader("http",
              to_pool("images", rule("PATH", "STARTS_WITH", "/img/"), rule("HOST_NAME", "EQUAL_TO", "shop.example")),
              to_pool("tagged", rule("HEADER", "EQUAL_TO", "yes", "X-Tag")),
              to_pool("member", rule("COOKIE", "EQUAL_TO", "7", "member")),
              policy("moved", "REDIRECT_TO_URL", rule("PATH", "EQUAL_TO", "/old"), redirect_url="http://a/new"),
              policy("no", "REJECT", rule("METHOD", "EQUAL_TO", "DELETE")))
SETTINGS = frame(4, 0, 0)


def said(**changed: str | None) -> tuple[tuple[str, str], ...]:
    """The request with other pseudo-headers."""
    fields = {name[1:]: value for name, value in REQUEST} | changed
    return tuple((f":{name}", value) for name, value in fields.items() if value is not None)


BLOCK = block()
READ = {
    "plain": h2(), "window": h2(REQUEST, frame(8, 0, 0, b"\0\1\0\0")), "ping": h2(REQUEST, frame(6, 0, 0, bytes(8))),
    "priority frame": h2(REQUEST, frame(2, 0, 3, bytes(5))), "unknown frame": h2(REQUEST, frame(0xAB, 0xFF, 9, b"x")),
    "more settings": h2(REQUEST, SETTINGS, frame(4, 1, 0)),
    "with a body": h2() + frame(0, 1, 1, b"body"),
    "padded": PREFACE + SETTINGS + frame(1, 0x4 | 0x8, 1, b"\2" + BLOCK + b"\0\0"),
    "with priority": PREFACE + SETTINGS + frame(1, 0x4 | 0x20, 1, bytes(5) + BLOCK),
    "padded, with priority": PREFACE + SETTINGS + frame(1, 0x2D, 1, b"\1" + bytes(5) + BLOCK + b"\0"),
    "continued": PREFACE + SETTINGS + frame(1, 0, 1, BLOCK[:3]) + frame(9, 0, 1) + frame(9, 4, 1, BLOCK[3:]),
    "another stream": PREFACE + SETTINGS + frame(1, 4, 7, BLOCK),
    "host beside authority": h2((*REQUEST, ("host", "Shop.example"))),
    "host only": h2((*said(authority=None), ("host", "shop.example"))),
    "authority with port": h2(said(authority="SHOP.example:8080")),
}


@pytest.mark.parametrize("data", READ.values(), ids=READ)
def test_the_first_request_decides(data):
    assert HTTP.read(data) == ToPool("images-pool", "images", HTTP.read(data).key)
    assert HTTP.read(data).key == "GET shop.example/img/a.png"
    request = parse(data)
    assert isinstance(request, Request) and request.version == "HTTP/2"


@pytest.mark.parametrize(("headers", "name"), [
    (said(path="/"), ""), (said(path="/img/../"), ""), (said(authority="other"), ""), (said(authority=None), ""),
    ((*said(path="/"), ("x-tag", "yes")), "tagged"),
    ((*said(path="/"), ("cookie", "a=1"), ("cookie", "member=7")), "member"),
    (said(method="OPTIONS", path="*"), "")])
def test_rules_see_what_they_see_of_http1(headers, name):
    outcome = HTTP.read(h2(headers))
    assert isinstance(outcome, ToPool) and outcome.policy == name


def test_a_rule_for_the_header_host_sees_the_authority():
    hosts = reader("http", to_pool("x", rule("HEADER", "EQUAL_TO", "shop.example", "Host")))
    assert hosts.read(h2()).policy == "x"


def test_what_would_be_answered_is_reset():
    assert HTTP.read(h2(said(path="/old"))) == Reject("moved", "HTTP/2: no answer with 302 is made")
    assert HTTP.read(h2(said(method="DELETE", path="/"))).policy == "no"
    assert HTTP.timed_out(PREFACE) == Reject("", "HTTP/2: no complete request in time")
    assert isinstance(HTTP.timed_out(b"PRI"), Answer)


BOMB = block([*REQUEST, ("x", "a" * 4000)]) + b"\xbe" * 20  # the table's newest entry, again and again
WRONG = {
    "no settings": PREFACE + frame(1, 5, 1, BLOCK), "settings acknowledged": PREFACE + frame(4, 1, 0),
    "settings of a stream": PREFACE + frame(4, 0, 1), "settings of five bytes": PREFACE + frame(4, 0, 0, bytes(5)),
    "data first": PREFACE + SETTINGS + frame(0, 0, 1), "reset first": PREFACE + SETTINGS + frame(3, 0, 1, bytes(4)),
    "promise": PREFACE + SETTINGS + frame(5, 0, 1, bytes(4)), "goaway": PREFACE + SETTINGS + frame(7, 0, 0, bytes(8)),
    "continuation first": PREFACE + SETTINGS + frame(9, 4, 1, BLOCK),
    "even stream": PREFACE + SETTINGS + frame(1, 5, 2, BLOCK), "stream 0": PREFACE + SETTINGS + frame(1, 5, 0, BLOCK),
    "not continued": PREFACE + SETTINGS + frame(1, 0, 1, BLOCK) + frame(6, 0, 0, bytes(8)),
    "continued elsewhere": PREFACE + SETTINGS + frame(1, 0, 1, BLOCK) + frame(9, 4, 3),
    "short ping": PREFACE + SETTINGS + frame(6, 0, 0, bytes(7)),
    "short window": PREFACE + SETTINGS + frame(8, 0, 0, bytes(3)),
    "short priority": PREFACE + SETTINGS + frame(2, 0, 1, bytes(4)),
    "too much padding": PREFACE + SETTINGS + frame(1, 0xC, 1, b"\xff" + BLOCK),
    "no padding": PREFACE + SETTINGS + frame(1, 0xC, 1), "no priority": PREFACE + SETTINGS + frame(1, 0x24, 1, b"abc"),
    "a large frame": PREFACE + SETTINGS + b"\0\x40\1\1\4\0\0\0\1", "nothing but pings": PREFACE + SETTINGS + frame(
        6, 0, 0, bytes(8)) * FRAMES_MOST,
    "nothing but large frames": PREFACE + SETTINGS + frame(0xAB, 0, 0, bytes(16384)) * 4,
    "a flood of continuations": PREFACE + SETTINGS + frame(1, 0, 1, BLOCK) + frame(9, 0, 1) * FRAMES_MOST,
    "large headers": PREFACE + SETTINGS + frame(1, 0, 1, bytes(16384)) +
        frame(9, 0, 1, bytes(16384)) + frame(9, 4, 1, b"0"),
    "no hpack": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    "half a header": PREFACE + SETTINGS + frame(1, 4, 1, BLOCK[:-3]),
    "an index of nothing": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff\x80\x01"),
    "a table too large": PREFACE + SETTINGS + frame(1, 4, 1, b"\x3f\xe1\xff\x03" + BLOCK),
    "a bomb": PREFACE + SETTINGS + frame(1, 4, 1, BOMB),
    "no headers": PREFACE + SETTINGS + frame(1, 4, 1), "no method": h2(said(method=None)),
    "no path": h2(said(path=None)),
    "no scheme": h2(said(scheme=None)), "connect": h2(said(method="CONNECT")), "method": h2(said(method="GE T")),
    "absolute path": h2(said(path="http://shop.example/")), "space in the path": h2(said(path="/a b")),
    "fragment": h2(said(path="/#a")), "authority": h2(said(authority="me@a")),
    "authority list": h2(said(authority="a,b")),
    "other host": h2((*REQUEST, ("host", "other"))),
    "two hosts": h2((*REQUEST, ("host", "shop.example"), ("host", "shop.example"))),
    "twice": h2((*REQUEST, (":path", "/"))), "unknown pseudo": h2((*REQUEST, (":status", "200"))),
    "late pseudo": h2((*said(path=None), ("a", "b"), (":path", "/"))), "upper case": h2((*REQUEST, ("X-Tag", "a"))),
    "transfer-encoding": h2((*REQUEST, ("transfer-encoding", "chunked"))), "te": h2((*REQUEST, ("te", "gzip"))),
    "connection": h2((*REQUEST, ("connection", "close"))), "name": h2((*REQUEST, ("a b", "c"))),
    "CR LF": h2((*REQUEST, ("a", "b\r\nc: d"))), "NUL": h2((*REQUEST, ("a", "b\0"))),
    "many": h2((*REQUEST, *((f"a{n}", "b") for n in range(HEADERS_MOST + 1)))),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_is_no_request_is_reset(data):
    outcome = HTTP.read(data)
    assert isinstance(outcome, Reject) and outcome.policy == "" and outcome.why.startswith("HTTP/2: ")
    assert HTTP.timed_out(data) == outcome


@pytest.mark.parametrize("data", [*READ.values(), *WRONG.values()], ids=[*READ, *WRONG])
def test_it_does_not_matter_how_it_comes(data):
    whole = HTTP.read(data)
    for cut in range(0, len(data), 1 if len(data) < 2000 else 61):
        outcome = HTTP.read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole


def test_a_preface_that_goes_wrong_is_a_version_that_is_not_spoken():
    broken = PREFACE[:-6] + b"XX\r\n\r\n"
    assert HTTP.read(broken).status == 505 and HTTP.read(PREFACE) == More()
    assert all(HTTP.read(PREFACE[:cut]) == More() for cut in range(len(PREFACE)))


@settings(max_examples=300)
@given(st.one_of(
    st.binary(max_size=80).map(lambda data: PREFACE + SETTINGS + frame(1, 4, 1, data)),
    st.binary(max_size=60).map(lambda data: PREFACE + data),
    st.tuples(st.sampled_from(list(READ.values())), st.integers(20, 120), st.binary(max_size=3)).map(
        lambda t: t[0][:t[1]] + t[2] + t[0][t[1] + len(t[2]):])))
def test_nothing_a_stranger_says_raises_or_depends_on_how_it_comes(data):
    whole = HTTP.read(data)
    for cut in range(len(data)):
        outcome = HTTP.read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole
    assert not isinstance(HTTP.timed_out(data), More)
