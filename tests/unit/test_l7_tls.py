# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""TLS: what is read of a ClientHello, in any number of records and segments, and what is none."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.control.l7 import ClientHello, More, Reject, ToPool
from lbapp.control.l7.tls import EXTENSIONS_MOST, HELLO_MOST, NAMES_MOST, RECORDS_MOST, parse
from tests.hellos import alpn, body, extension, hello, records, server_name, vector
from tests.l7_servers import policy, reader, rule, to_pool

SHOP = server_name(b"shop.example")
TLS = reader("tls", to_pool("shop", rule("SNI", "EQUAL_TO", "shop.example")),
             to_pool("sub", rule("SNI", "ENDS_WITH", ".Shop.example")),
             policy("no", "REJECT", rule("SNI", "REGEX", "^bad[0-9]+[.]")),
             to_pool("h2", rule("ALPN", "EQUAL_TO", "h2")),
             to_pool("sid", rule("SESSION_ID", "STARTS_WITH", "ab01")))

READ = [
    (hello(), ClientHello()),
    (hello(SHOP), ClientHello("shop.example")),
    (hello(SHOP, size=1), ClientHello("shop.example")),
    (hello(SHOP, size=3), ClientHello("shop.example")),
    (hello(SHOP) + b"anything", ClientHello("shop.example")),
    (hello(server_name(b"SHOP.Example.")), ClientHello("shop.example")),
    (hello(server_name(b"x", kind=7)), ClientHello()),
    (hello(alpn(b"h2", b"http/1.1"), SHOP), ClientHello("shop.example", (b"h2", b"http/1.1"))),
    (hello(alpn(b"\x0a\x0a", b"h2")), ClientHello(None, (b"h2",))),
    (hello(extension(0x0A0A, b""), extension(0x0A0A, b"\0"), SHOP, extension(0xFAFA, b"\0")),
     ClientHello("shop.example")),
    (hello(session=b"\xab\x01"), ClientHello(session_id=b"\xab\x01")),
    (hello(extension(0xFE0D, b"\0" * 40), SHOP), ClientHello("shop.example", encrypted=True)),
    (hello(extension(21, b"\0" * 40000), SHOP), ClientHello("shop.example")),
    (hello(*(extension(1000 + n, b"") for n in range(EXTENSIONS_MOST))), ClientHello()),
    (hello(alpn(*[b"a"] * (NAMES_MOST - 1))), ClientHello(None, (b"a",) * (NAMES_MOST - 1))),
    (hello(SHOP, version=b"\3\1"), ClientHello("shop.example")),
]


@pytest.mark.parametrize(("data", "expected"), READ)
def test_a_hello_is_read(data, expected):
    assert parse(data) == expected


@pytest.mark.parametrize("data", [one for one, _ in READ if len(one) < 2000])
def test_it_does_not_matter_how_a_hello_comes(data):
    whole = TLS.read(data)
    for cut in range(len(data)):
        outcome = TLS.read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole


BROKEN = [
    (b"GET / HTTP/1.1\r\n", "not a TLS handshake"), (b"\x00", "not a TLS handshake"),
    (b"\x15\3\1", "not a TLS handshake"),
    (bytes.fromhex("802e010002001500000010010080"), "SSL 2"), (b"\x16\2", "not a version of TLS"),
    (b"\x16\3\1\0\0", "a TLS record of 0"), (b"\x16\3\1\x40\x01", "a TLS record of 16385"),
    (records(b"\2" + vector(3, body())), "handshake type 2"),
    (records(b"\1\1\0\1" + bytes(100)), "a ClientHello of 65537"),
    (records((b"\1" + vector(3, body(SHOP)))[:10]) + records(b"\0" * 40, kind=23), "not a TLS handshake"),
    (records(b"\1" + vector(3, body(extension(21, b"\0" * RECORDS_MOST))), size=1), "records"),
    (hello(version=b"\2\0"), "no version"), (hello(session=b"a" * 33), "session id"),
    (hello(suites=b""), "cipher suites"), (hello(suites=b"abc"), "cipher suites"),
    (hello(compression=b""), "compression"), (hello(SHOP, SHOP), "twice"),
    (records(b"\1" + vector(3, body(SHOP) + b"\0")), "behind the extensions"),
    (records(b"\1" + vector(3, body(SHOP)[:-1])), "ends behind"), (records(b"\1\0\0\0"), "ends behind"),
    (hello(extension(0, b"")), "ends behind"), (hello(extension(0, b"\0\0")), "server name"),
    (hello(server_name(b"a", b"b")), "two server names"), (hello(server_name(b"")), "server name"),
    (hello(server_name(b"a\0b")), "server name"), (hello(server_name(b"a b")), "server name"),
    (hello(*(extension(1000 + n, b"") for n in range(EXTENSIONS_MOST + 1))), "extensions"),
    (hello(*(extension(0x0A0A, b"") for _ in range(EXTENSIONS_MOST + 1))), "GREASE"),
    (hello(alpn(*[b"a"] * NAMES_MOST)), "ALPN protocols or more"),
    (hello(extension(0, vector(2, b"\7\0\0" * NAMES_MOST))), "server names or more"),
    (hello(extension(16, b"\0\0")), "ALPN"), (hello(alpn(b"")), "ALPN"),
]


@pytest.mark.parametrize(("data", "word"), BROKEN, ids=[word for _, word in BROKEN])
def test_what_is_no_hello_is_reset(data, word):
    outcome = TLS.read(data)
    assert isinstance(outcome, Reject) and word in outcome.why and outcome.policy == ""
    assert TLS.timed_out(data) == outcome
    for cut in range(len(data)):
        early = TLS.read(data[:cut])
        assert isinstance(early, More) or early == outcome


def test_a_hello_has_a_bound():
    assert isinstance(TLS.read(hello(extension(21, b"\0" * 60000), SHOP)), ToPool)
    big = hello(extension(21, b"\0" * 65470))
    assert len(big) > HELLO_MOST
    assert TLS.read(big) == TLS.read(big[:len(big) - 1]) == Reject("", f"no ClientHello within {HELLO_MOST} bytes")


@pytest.mark.parametrize(("data", "policy_name", "key"), [
    (hello(SHOP), "shop", "sni shop.example"), (hello(server_name(b"img.shop.example")), "sub", "sni img.shop.example"),
    (hello(server_name(b"notshop.example")), "", "sni notshop.example"), (hello(), "", "no sni"),
    (hello(alpn(b"http/1.1", b"h2")), "h2", "no sni"), (hello(alpn(b"h2c")), "", "no sni"),
    (hello(session=b"\xab\x01\x02"), "sid", "no sni"), (hello(session=b"\x01\xab\x01"), "", "no sni"),
    (hello(extension(0xFE0D, b"\0" * 9), server_name(b"public.example")), "", "sni public.example"),
])
def test_rules_decide(data, policy_name, key):
    assert TLS.read(data) == ToPool(f"{policy_name}-pool" if policy_name else None, policy_name, key)


def test_a_policy_can_reset():
    assert TLS.read(hello(server_name(b"bad77.example"))) == Reject("no", "sni bad77.example")


def test_without_a_name_an_inverted_rule_holds():
    inverted = reader("tls", to_pool("others", rule("SNI", "EQUAL_TO", "shop.example", invert=True)))
    assert inverted.read(hello()).policy == "others" and inverted.read(hello(SHOP)).policy == ""


def test_who_says_nothing_in_time_goes_to_the_default_pool():
    assert TLS.timed_out(b"") == ToPool(None, "", "no ClientHello in time")
    assert TLS.timed_out(hello(SHOP)[:30]).pool is None and TLS.timed_out(hello(SHOP)).policy == "shop"
    assert TLS.unavailable() == b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_hello_of_openssl_is_read(version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="Shop.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    found = parse(out.read())
    assert isinstance(found, ClientHello)
    assert found.sni == "shop.example" and found.alpn == (b"h2", b"http/1.1") and not found.encrypted
    assert bool(found.session_id) == (version is ssl.TLSVersion.TLSv1_3)


@settings(max_examples=300)
@given(st.one_of(
    st.binary(max_size=80), st.binary(max_size=80).map(lambda data: records(b"\1" + vector(3, data)) if data else b""),
    st.tuples(st.sampled_from([one for one, _ in READ if len(one) < 400]), st.integers(0, 200),
              st.binary(max_size=3)).map(lambda t: t[0][:t[1]] + t[2] + t[0][t[1] + len(t[2]):])))
def test_nothing_a_stranger_says_raises_or_depends_on_how_it_comes(data):
    whole = TLS.read(data)
    for cut in range(len(data)):
        outcome = TLS.read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole
    assert not isinstance(TLS.timed_out(data), More)
