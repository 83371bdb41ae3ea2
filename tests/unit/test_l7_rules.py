# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Rules of HTTP: which value is compared, in which form; policies, their order, and what they do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import Protocol, VirtualServer
from lbapp.control.l7 import Answer, Reject, Request, ToPool
from lbapp.control.l7.outcomes import KEY_MOST, printable, response
from lbapp.control.l7.reader import Reader
from lbapp.control.l7.request import normal_path, unescape
from tests.l7_servers import policy, reader, rule, to_pool


def said(line: str = "GET / HTTP/1.1", *headers: str) -> bytes:
    named = any(one.lower().startswith("host:") for one in headers)
    return "\r\n".join((line, *(() if named else ("Host: shop.example",)), *headers, "", "")).encode()


def holds(one, data: bytes) -> bool:
    """Whether a rule holds; the same rule inverted must say the opposite."""
    outcome = reader("http", to_pool("x", one)).read(data)
    assert isinstance(outcome, ToPool), outcome
    turned = rule(one.type.value, one.compare_type.value, one.value, one.key, invert=True)
    assert (reader("http", to_pool("x", turned)).read(data).policy == "x") != (outcome.policy == "x")
    return outcome.policy == "x"


@pytest.mark.parametrize(("raw", "normal"), [
    (b"/", b"/"), (b"*", b"*"), (b"/a/b.png", b"/a/b.png"), (b"/a/", b"/a/"), (b"/a//b", b"/a/b"), (b"//a", b"/a"),
    (b"/a//", b"/a/"), (b"/./a", b"/a"), (b"/a/.", b"/a/"), (b"/a/./", b"/a/"), (b"/a/..", b"/"), (b"/a/b/..", b"/a/"),
    (b"/a/../b", b"/b"), (b"/..", b"/"), (b"/../../a", b"/a"), (b"/a/../../b/./c/", b"/b/c/"), (b"/a/...", b"/a/..."),
    (b"/.a", b"/.a"), (b"/a./b", b"/a./b"), (b"/%61dmin", b"/admin"), (b"/a/%2e%2e/b", b"/b"), (b"/a/%2E./b", b"/b"),
    (b"/a/..%2fb", b"/b"), (b"/a%2F..%2Fb", b"/b"), (b"/%252e%252e/b", b"/%2e%2e/b"), (b"/%2", b"/%2"),
    (b"/%zz", b"/%zz"),
    (b"/%C3%A4", b"/\xc3\xa4"), (b"/a%00", b"/a\0"), (b"/a\\..\\b", b"/a\\..\\b"), (b"/a;/../b", b"/b")])
def test_paths_have_one_form(raw, normal):
    assert normal_path(raw) == normal


@given(st.lists(st.sampled_from([b"/", b".", b"..", b"%2e", b"%2F", b"a", b"//", b"%25"])).map(b"".join))
def test_no_dot_segment_is_left_in_a_path(path):
    parts = normal_path(b"/" + path).split(b"/")
    assert parts[0] == b"" and not {b".", b".."} & set(parts) and b"" not in parts[1:-1]


@given(st.binary())
def test_escapes_are_decoded_once(data):
    assert unescape("".join(f"%{byte:02x}" for byte in data).encode()) == data


@pytest.mark.parametrize(("one", "data", "expected"), [
    (rule("METHOD", "EQUAL_TO", "POST"), said("POST / HTTP/1.1"), True),
    (rule("METHOD", "EQUAL_TO", "POST"), said("post / HTTP/1.1"), False),
    (rule("METHOD", "REGEX", "^(GET|HEAD)$"), said("HEAD / HTTP/1.1"), True),
    (rule("HOST_NAME", "EQUAL_TO", "Shop.Example"), said("GET / HTTP/1.1", "Host: SHOP.example:8080"), True),
    (rule("HOST_NAME", "EQUAL_TO", "shop.example"), said("GET / HTTP/1.1", "Host: shop.example."), True),
    (rule("HOST_NAME", "EQUAL_TO", "shop.example."), said("GET / HTTP/1.1", "Host: shop.example"), True),
    (rule("HOST_NAME", "EQUAL_TO", "shop.example"), said("GET http://shop.example/ HTTP/1.1"), True),
    (rule("HOST_NAME", "ENDS_WITH", ".example"), said("GET / HTTP/1.1", "Host: example"), False),
    (rule("HOST_NAME", "EQUAL_TO", "[2001:db8::1]"), said("GET / HTTP/1.1", "Host: [2001:DB8::1]:80"), True),
    (rule("HOST_NAME", "EQUAL_TO", ""), b"GET / HTTP/1.0\r\n\r\n", True),
    (rule("PATH", "EQUAL_TO", "/a"), said("GET /a?b HTTP/1.1"), True),
    (rule("PATH", "STARTS_WITH", "/admin"), said("GET /x/../%61dmin/ HTTP/1.1"), True),
    (rule("PATH", "STARTS_WITH", "/img/"), said("GET /img/..%2fadmin HTTP/1.1"), False),
    (rule("PATH", "ENDS_WITH", ".php"), said("GET /a.php?x=.png HTTP/1.1"), True),
    (rule("PATH", "CONTAINS", "secret"), said("GET /a?secret HTTP/1.1"), False),
    (rule("PATH", "EQUAL_TO", "/ä"), said("GET /%C3%A4 HTTP/1.1"), True),
    (rule("PATH", "REGEX", r"^/v[0-9]+/"), said("GET /v12/a HTTP/1.1"), True),
    (rule("PATH", "REGEX", r"(a+)+$"), said("GET /" + "a" * 8000 + "b HTTP/1.1"), False),
    (rule("FILE_TYPE", "EQUAL_TO", "png"), said("GET /a.tar.PNG?x HTTP/1.1"), True),
    (rule("FILE_TYPE", "EQUAL_TO", ".png"), said("GET /a.png HTTP/1.1"), True),
    (rule("FILE_TYPE", "EQUAL_TO", "png"), said("GET /a.png/b HTTP/1.1"), False),
    (rule("FILE_TYPE", "EQUAL_TO", ""), said("GET /a HTTP/1.1"), True),
    (rule("FILE_TYPE", "REGEX", "^jpe?g$"), said("GET /a.jpg HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "b c", "a"), said("GET /?x=1&a=b+c HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "b&c", "ä"), said("GET /?%C3%A4=b%26c HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "2", "a"), said("GET /?a=1&a=2 HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "1=2?", "a"), said("GET /?a=1=2? HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "", "a"), said("GET /?a HTTP/1.1"), True),
    (rule("QUERY", "EQUAL_TO", "", "a"), said("GET /?A HTTP/1.1"), False),
    (rule("QUERY", "CONTAINS", "", "a"), said("GET / HTTP/1.1"), False),
    (rule("HEADER", "EQUAL_TO", "yes", "X-Tag"), said("GET / HTTP/1.1", "x-tAG: \tyes "), True),
    (rule("HEADER", "EQUAL_TO", "Yes", "X-Tag"), said("GET / HTTP/1.1", "X-Tag: yes"), False),
    (rule("HEADER", "EQUAL_TO", "b", "X-Tag"), said("GET / HTTP/1.1", "X-Tag: a", "X-Tag: b"), True),
    (rule("HEADER", "STARTS_WITH", "", "X-Tag"), said("GET / HTTP/1.1"), False),
    (rule("HEADER", "CONTAINS", "Firefox", "User-Agent"), said("GET / HTTP/1.1", "User-Agent: a Firefox/1"), True),
    (rule("HEADER", "EQUAL_TO", "shop.example", "Host"), said(), True),
    (rule("COOKIE", "EQUAL_TO", "7", "member"), said("GET / HTTP/1.1", "Cookie: a=b; member=7;c=d"), True),
    (rule("COOKIE", "EQUAL_TO", "7", "member"), said("GET / HTTP/1.1", "Cookie: a=b", "Cookie: member=7"), True),
    (rule("COOKIE", "EQUAL_TO", "7", "member"), said("GET / HTTP/1.1", "Cookie: Member=7"), False),
    (rule("COOKIE", "EQUAL_TO", "7", "member"), said("GET / HTTP/1.1", "Cookie: xmember=7; member=70"), False),
    (rule("COOKIE", "EQUAL_TO", '"7"', "member"), said("GET / HTTP/1.1", 'Cookie: member="7"'), True),
    (rule("COOKIE", "EQUAL_TO", "", "member"), said("GET / HTTP/1.1", "Cookie: member; x"), False),
    (rule("COOKIE", "REGEX", "^[0-9a-f]{4}$", "id"), said("GET / HTTP/1.1", "Cookie: id=00ff"), True)])
def test_a_rule_holds_or_not(one, data, expected):
    assert holds(one, data) is expected


PATH_A, HOST_B = rule("PATH", "EQUAL_TO", "/a"), rule("HOST_NAME", "EQUAL_TO", "b")


@pytest.mark.parametrize(("policies", "name"), [
    ((), ""), ((to_pool("x"),), "x"), ((to_pool("x", admin_state_up=False),), ""), ((to_pool("x"), to_pool("y")), "x"),
    ((to_pool("x", PATH_A, HOST_B), to_pool("y", PATH_A)), "x"),
    ((to_pool("x", PATH_A, rule("HOST_NAME", "EQUAL_TO", "c")), to_pool("y", PATH_A)), "y"),
    ((to_pool("x", PATH_A, HOST_B, rule("METHOD", "EQUAL_TO", "GET", invert=True)),), ""),
    ((to_pool("x", admin_state_up=False), to_pool("y", HOST_B)), "y"),
    ((to_pool("x", *[PATH_A] * 16),), "x")])
def test_the_first_policy_all_of_whose_rules_hold_decides(policies, name):
    outcome = reader("http", *policies).read(said("GET /a HTTP/1.1", "Host: b"))
    assert outcome == ToPool(f"{name}-pool" if name else None, name, "GET b/a")


def test_nothing_is_read_for_l4():
    assert Reader.of(VirtualServer(name="v", vip_address="10.0.0.1", protocol=Protocol.TCP, protocol_port=1)) is None


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_says_where_to(code):
    web = reader("http",
                 policy("whole", "REDIRECT_TO_URL", rule("PATH", "EQUAL_TO", "/old"), redirect_url="https://a.example/new",
                        redirect_http_code=code),
                 policy("prefix", "REDIRECT_PREFIX", redirect_prefix="https://b.example/", redirect_http_code=code))
    outcome = web.read(said("GET /old HTTP/1.1"))
    assert isinstance(outcome, Answer) and (outcome.status, outcome.policy) == (code, "whole")
    lines = outcome.data.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 %d " % code)
    assert lines[1:] == [b"Location: https://a.example/new", b"Content-Length: 0", b"Connection: close", b"", b""]
    for target in ("/x/../y%20?z=%0d%0aa: b".replace(": ", ":"), "http://shop.example/x/../y%20?z=%0d%0aa:b"):
        outcome = web.read(said(f"GET {target} HTTP/1.1"))
        assert (outcome.status, outcome.policy) == (code, "prefix")
        assert b"\r\nLocation: https://b.example/x/../y%20?z=%0d%0aa:b\r\n" in outcome.data
    assert b"\r\nLocation: https://b.example/\r\n" in web.read(said("OPTIONS * HTTP/1.1")).data


def test_a_fixed_response_is_given_and_head_gets_no_body():
    web = reader("http", policy("fixed", "FIXED_RESPONSE", response_status=418, response_body="<ä>",
                                response_content_type="text/html; charset=utf-8"))
    start = (b"HTTP/1.1 418 Status\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: 4\r\n"
             b"Connection: close\r\n\r\n")
    assert web.read(said()) == Answer(418, start + "<ä>".encode(), "fixed", "GET shop.example/")
    assert web.read(said("HEAD / HTTP/1.1")).data == start
    for status in (204, 304):
        bare = reader("http", policy("fixed", "FIXED_RESPONSE", response_status=status, response_body="text"))
        data = bare.read(said()).data
        assert data.endswith(b"\r\nConnection: close\r\n\r\n") and b"Content" not in data.partition(b"\r\n")[2]


def test_a_reset_says_which_policy():
    web = reader("http", policy("no", "REJECT", PATH_A))
    assert web.read(said("GET /a HTTP/1.1")) == Reject("no", "GET shop.example/a")


def test_what_is_told_of_a_request_is_short_and_leaves_the_query_out():
    long = reader("http").read(said("GET /" + "a" * 1000 + "?password=x HTTP/1.1")).key
    assert len(long) == KEY_MOST and long.startswith("GET shop.example/aaa")
    assert "password" not in reader("http").read(said("GET /?password=x HTTP/1.1")).key
    assert printable("a\n\x7f\u2028ä") == "a????"
    assert b"\r\n\r\n" in response(200)


def test_explain_tells_of_every_rule():
    web = reader("http", to_pool("x", PATH_A, HOST_B), to_pool("off", admin_state_up=False),
                 to_pool("y", rule("QUERY", "EQUAL_TO", "2", "n"), rule("COOKIE", "EQUAL_TO", "1", "c", invert=True)),
                 to_pool("rest"))
    request = Request.of("GET", "http://B.example/%61?n=1&n=2#top", [("Accept", "*/*")])
    found = web.explain(request)
    assert [(one.policy.name, one.asked, one.matched, one.decided) for one in found] == [
        ("x", True, False, False), ("off", False, False, False), ("y", True, True, True), ("rest", True, True, False)]
    assert [(one.held, one.compared) for one in found[0].rules] == [(True, ("/a",)), (False, ("b.example",))]
    assert [(one.held, one.compared) for one in found[2].rules] == [(True, ("1", "2")), (True, ())]
    assert web.decide(request) == ToPool("y-pool", "y", "GET b.example/%61")


def test_explain_reads_raw_data_as_far_as_configured():
    raw = reader("raw", to_pool("x", rule("DATA", "CONTAINS", "b")), inspect_bytes=2)
    assert not raw.explain(b"aab")[0].matched and raw.decide(b"aab").policy == ""
    assert raw.explain(b"ab")[0].rules[0].compared == ("ab",) and raw.decide(b"ab").policy == "x"


@pytest.mark.parametrize(("url", "headers", "host", "target"), [
    ("/a", [], b"", b"/a"), ("/a", [("host", "X:1")], b"x", b"/a"), ("http://x", [], b"x", b"/"),
    ("https://X:443/a?b#c", [], b"x", b"/a?b"), ("http://x/", [("Host", "y")], b"y", b"/"),
    ("/ä", [], b"", "/ä".encode())])
def test_a_request_can_be_made_without_bytes(url, headers, host, target):
    made = Request.of("GET", url, headers)
    assert (made.host, made.target, made.method) == (host, target, b"GET")
    if host:
        assert len(made.values(b"host")) == 1
