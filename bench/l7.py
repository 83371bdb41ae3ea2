# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""CPU of reading what a client says first: bytes in, outcome out, against ten policies.

``python -m bench.l7 [--profile] [--count N]``. Nothing of the network is in it. The least of several rounds is
printed: whatever else the machine does can only add.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import ssl
import time

import hpack

from lbapp.config.model import (
    Application,
    CompareType,
    L7Policy,
    L7Rule,
    PolicyAction,
    Protocol,
    RuleType,
    VirtualServer,
)
from lbapp.control.l7 import More, Reader, ToPool

BROWSER = (b"GET /static/css/main.css?v=20261121 HTTP/1.1\r\nHost: shop.example:8080\r\n"
           b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
           b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
           b"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n"
           b"Referer: http://shop.example:8080/\r\nCookie: session=4f1a9be20d; theme=dark\r\n"
           b"Connection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\nPriority: u=0, i\r\n\r\n")
PLAIN = b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n"


def _policy(number: int, *rules: tuple[RuleType, CompareType, str, str]) -> L7Policy:
    return L7Policy(name=f"p{number}", action=PolicyAction.REDIRECT_TO_POOL, redirect_pool=f"pool{number}",
                    rules=tuple(L7Rule(type=type_, compare_type=compare, value=value, key=key)
                                for type_, compare, value, key in rules))


def http_policies() -> tuple[L7Policy, ...]:
    """Ten policies of every kind; the browser's request is looked at by all of them and fits the last."""
    path, host = RuleType.PATH, RuleType.HOST_NAME
    starts, equal = CompareType.STARTS_WITH, CompareType.EQUAL_TO
    return (
        _policy(1, (path, starts, "/api/", "")), _policy(2, (host, equal, "img.example", "")),
        _policy(3, (path, CompareType.REGEX, r"^/v[0-9]+/(cart|checkout)", "")),
        _policy(4, (host, equal, "shop.example", ""), (path, starts, "/admin", "")),
        _policy(5, (RuleType.METHOD, equal, "POST", ""), (path, starts, "/upload", "")),
        _policy(6, (RuleType.HEADER, CompareType.CONTAINS, "Mobile", "User-Agent")),
        _policy(7, (RuleType.COOKIE, equal, "beta", "theme")), _policy(8, (RuleType.FILE_TYPE, equal, "png", "")),
        _policy(9, (RuleType.QUERY, equal, "debug", "mode")),
        _policy(10, (host, equal, "shop.example", ""), (path, starts, "/static/", "")))


def plain_policies() -> tuple[L7Policy, ...]:
    """Ten policies as sites have them: paths, hosts and one expression; the browser's request fits the last."""
    path, host = RuleType.PATH, RuleType.HOST_NAME
    starts, equal = CompareType.STARTS_WITH, CompareType.EQUAL_TO
    return (
        *(_policy(n, (host, equal, f"h{n}.example", "")) for n in range(1, 4)),
        *(_policy(n, (host, equal, "shop.example", ""), (path, starts, f"/part{n}/", "")) for n in range(4, 9)),
        _policy(9, (path, CompareType.REGEX, r"^/v[0-9]+/(cart|checkout)", "")),
        _policy(10, (path, starts, "/static/", "")))


def sni_policies() -> tuple[L7Policy, ...]:
    """Ten names; the last is the one that is asked for."""
    return tuple(_policy(n, (RuleType.SNI, CompareType.EQUAL_TO, name, "")) for n, name in enumerate(
        [*(f"s{n}.example" for n in range(9)), "shop.example"], 1))


def server(application: Application, *policies: L7Policy) -> Reader:
    """The reader of a virtual server with these policies."""
    reader = Reader.of(VirtualServer(name="v", vip_address="10.0.0.100", protocol=Protocol.TCP, protocol_port=80,
                                     application=application, l7_policies=policies))
    assert reader is not None
    return reader


def hello() -> bytes:
    """What this machine's OpenSSL says first."""
    out = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="shop.example")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def prior_knowledge() -> bytes:
    """What a client of HTTP/2 says first."""
    block = hpack.Encoder().encode([(":method", "GET"), (":scheme", "http"), (":authority", "shop.example"),
                                    (":path", "/static/css/main.css"), ("user-agent", "curl/7.88.1"),
                                    ("accept", "*/*")])
    return (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
            + len(block).to_bytes(3, "big") + b"\1\5\0\0\0\1" + block)


def microseconds(reader: Reader, data: bytes, count: int, rounds: int = 5) -> float:
    """CPU of one reading."""
    read = reader.read
    least = float("inf")
    for _ in range(rounds):
        before = time.process_time()
        for _ in range(count):
            read(data)
        least = min(least, time.process_time() - before)
    return least / count * 1e6


def main() -> None:
    """Print microseconds of CPU per reading, for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--count", type=int, default=20_000)
    arguments = parser.parse_args()
    web, tls = server(Application.HTTP, *http_policies()), server(Application.TLS, *sni_policies())
    told = hello()
    for title, reader, data, pool in (
            ("GET of a browser, 10 policies of every kind", web, BROWSER, "pool10"),
            ("GET of a browser, 10 policies of paths and hosts", server(Application.HTTP, *plain_policies()), BROWSER,
             "pool10"),
            ("GET of a browser, no policy", server(Application.HTTP), BROWSER, None),
            ("GET, the smallest, 10 policies", web, PLAIN, None),
            ("GET of a browser, its first half", web, BROWSER[:len(BROWSER) // 2], ...),
            ("HTTP/2, 10 policies", web, prior_knowledge(), "pool10"),
            ("ClientHello of OpenSSL, 10 names", tls, told, "pool10")):
        outcome = reader.read(data)
        if pool is ...:
            assert isinstance(outcome, More), outcome
        else:
            assert isinstance(outcome, ToPool) and outcome.pool == pool, outcome
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        spent = microseconds(reader, data, arguments.count)
        profile.disable()
        print(f"{title:48} {len(data):5} bytes {spent:6.2f} us")
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
