# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers that read what clients say, with everything real: curl, openssl, nginx, the kernel's own TCP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hellos import hello, server_name
from tests.integration.bad_wire import bad_wire
from tests.integration.l7_site import (
    both,
    configured,
    connect,
    counters,
    everything,
    is_reset,
    laboratory,
    named,
    rule,
    shows_why,
    to_pool,
    url,
)
from tests.integration.support import VIP, VIP6, at_rest, configure, members, pool, server, settle, statistics, tcp
from topologies.hosts import OWN_PORTS
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from laboratory(tmp_path_factory, "--fastpath")


@pytest.fixture
def site(lab: Lab) -> Lab:
    return configured(lab)


every = pytest.mark.parametrize("binding", ["splice", "handoff", "hybrid", "relay"])


def bound(site: Lab, binding: str, **more: Any) -> None:
    """Give one virtual server a binding."""
    site.rest.patch("/v1/virtual-servers/web-four", {"binding": binding, **more})
    settle(site)


# ------------------------------------------------------------------ choosing


@both
@pytest.mark.parametrize(("path", "options", "expected"), [
    ("/one/x", (), "s1"), ("/about", ("-H", "Host: two.example"), "s2"),
    ("/about", ("-H", "Host: TWO.example:80"), "s2"),
    ("/about", ("-H", "Cookie: a=b; third=yes"), "s3"), ("/one/%2e%2e/about", ("-H", "Host: two.example"), "s2")])
def test_http_goes_where_the_rules_say(site: Lab, vip: str, path: str, options: tuple[str, ...], expected: str) -> None:
    for _ in range(4):
        found = site.client().run("curl", "-gsS", "--path-as-is", "-o", "/dev/null", "-w", "%header{x-server}",
                                  "--max-time", "5", *options, url(vip, path)).stdout
        assert found == expected


@both
def test_what_no_rule_names_goes_to_the_default_pool_in_turns(site: Lab, vip: str) -> None:
    name = named(vip, "web")
    before, asked = at_rest(site, name), counters(site)["queries"]
    assert site.client().who(url(vip), 30) == Counter({"s1": 10, "s2": 10, "s3": 10})
    assert counters(site)["queries"] - asked == 30, "one question a connection"
    wait_until(lambda: statistics(site, name)["closed"] - before["closed"] >= 30, 10, "the ends of all")
    after = statistics(site, name)
    assert after["opened"] - before["opened"] == 30
    assert after["packets"] - (before["packets"] or 0) >= 30 * 5


@both
def test_the_member_sees_the_client(site: Lab, vip: str) -> None:
    told = json.loads(site.client().curl(url(vip, "/about")))
    assert told["client_address"] == (site.client().address6 if ":" in vip else site.client().address)


@both
@pytest.mark.parametrize("version", ["--tlsv1.2 --tls-max 1.2", "--tlsv1.3"])
def test_tls_goes_where_its_server_name_says(site: Lab, vip: str, version: str) -> None:
    for name, expected in (("one.example", "s1"), ("a.two.example", "s2"), ("other.example", "s3")):
        found = site.client().curl(url(name, "/", 443, "https"), "-k", *version.split(), "--resolve",
                                   f"{name}:443:{vip}")
        assert found.strip() == expected


@both
def test_tls_without_a_server_name_is_the_default_pool_s(site: Lab, vip: str) -> None:
    """As of whoever asks by address."""
    assert site.client().curl(url(vip, "/", 443, "https"), "-k").strip() == "s3"


def tls(site: Lab, vip: str, *options: str) -> str:
    """What openssl is answered."""
    return site.client().run("openssl", "s_client", "-connect", f"[{vip}]:443", *options, "-quiet", "-ign_eof",
                             stdin="GET / HTTP/1.0\r\n\r\n", timeout=15, check=False).stdout


@both
def test_tls_goes_where_its_protocol_says(site: Lab, vip: str) -> None:
    """With and without a server name; the first policy that holds decides."""
    for options, expected in (("-noservername -alpn acme-tls/1", "s1"),
                              ("-servername other.example -alpn http/1.1,acme-tls/1", "s1"),
                              ("-servername a.two.example -alpn acme-tls/1", "s2"),
                              ("-noservername -alpn http/1.1", "s3")):
        assert f"X-Server: {expected}" in tls(site, vip, *options.split())


def test_a_client_hello_of_two_segments(site: Lab) -> None:
    """As post-quantum key shares make them."""
    assert "X-Server: s2" in tls(site, VIP, "-servername", "a.two.example", "-alpn",
                                 ",".join(f"protocol-{number:03}-{'x' * 200}" for number in range(9)))


@both
def test_what_is_no_client_hello_is_reset(site: Lab, vip: str) -> None:
    """And no member hears of it."""
    before = at_rest(site, named(vip, "tls"))["opened"]
    name = server_name(b"one.example")
    for said in (hello(name, name), hello(name, version=b"\2\0"), b"GET / HTTP/1.1\r\nHost: one.example\r\n\r\n"):
        assert is_reset(site.client(), vip, 443, said)
    assert site.client().curl(url(vip, "/", 443, "https"), "-k").strip() == "s3"
    wait_until(lambda: statistics(site, named(vip, "tls"))["opened"] - before == 1, 5, "the good one")


@both
def test_first_bytes(site: Lab, vip: str) -> None:
    for path, expected in (("/one.txt", "s1"), ("/two", "s2"), ("/three", "s3")):
        with connect(site.client(), vip, 7000) as it:
            it.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert f"X-Server: {expected}".encode() in everything(it)


@both
def test_answers_of_our_own(site: Lab, vip: str) -> None:
    client = site.client()
    found = client.run("curl", "-gsSi", "--max-time", "5", url(vip, "/away")).stdout
    assert found.startswith("HTTP/1.1 308 ")
    assert "Location: https://elsewhere.example/" in found
    found = client.run("curl", "-gsSi", "--max-time", "5", url(vip, "/tea")).stdout
    assert found.startswith("HTTP/1.1 418 ") and found.endswith("short\n")
    found = client.run("curl", "-gsSi", "--max-time", "5", "-H", "Content-Length: 3", "-H",
                       "Transfer-Encoding: chunked", url(vip)).stdout
    assert found.startswith("HTTP/1.1 400 ")
    done = client.run("curl", "-gsS", "--max-time", "5", "-X", "TRACE", url(vip), check=False)
    assert done.returncode == 56, "reset"
    # Nothing of it stays with the client's port.
    assert client.answered(url(vip), 3) == 3


@both
def test_why_a_connection_went_where_it_went(site: Lab, vip: str) -> None:
    shows_why(site, vip, "splice")


@both
def test_no_member_no_waiting(site: Lab, vip: str) -> None:
    """All refuse: 503 at once. One refuses: the next one has it."""
    began = time.monotonic()
    found = site.client().run("curl", "-gsSi", "--max-time", "5", url(vip, "/dead")).stdout
    assert found.startswith("HTTP/1.1 503 ")
    assert time.monotonic() - began < 1
    for _ in range(6):
        began = time.monotonic()
        found = site.client().run("curl", "-gsS", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "5",
                                  url(vip, "/half")).stdout
        assert found == "s2"
        assert time.monotonic() - began < 1


def test_a_member_that_only_a_policy_leads_to(site: Lab) -> None:
    """Nobody else has it as a member: it is found, and served, all the same."""
    configure(site, [pool("one", "ROUND_ROBIN", members(site, names=["s1"])),
                     pool("two", "ROUND_ROBIN", members(site, names=["s2"]))],
              [server("web", 80, "one", application="http", l7_policies=[
                  to_pool("two", rule("HOST_NAME", "EQUAL_TO", "two.example"))])])
    assert site.client().who(url(VIP), 3) == Counter({"s1": 3})
    assert site.client().curl(url(VIP), "-H", "Host: two.example").strip() == "s2"


# ------------------------------------------------------------------ reading


@both
def test_requests_in_any_pieces(site: Lab, vip: str) -> None:
    request = b"GET /one/x HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\nX-Long: " + b"y" * 3000 + b"\r\n\r\n"
    for sizes in ([1] * 30, [700] * 6, [10, 2000]):
        with connect(site.client(), vip, 80) as it:
            it.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            left = request
            for size in sizes:
                it.sendall(left[:size])
                left = left[size:]
                time.sleep(0.005)
            it.sendall(left)
            assert b"X-Server: s1" in everything(it)


@every
@pytest.mark.parametrize(("number", "size"), [(70, 1000), (101, 1)], ids=["bytes", "fields"])
def test_headers_beyond_all_bounds_are_431(site: Lab, binding: str, number: int, size: int) -> None:
    """The whole answer, and an end in order: no reset, which could take the answer with it."""
    bound(site, binding)
    with connect(site.client(), VIP, 80) as it:
        it.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"z" * size)
                                                              for n in range(number)))
        found = everything(it)
    assert found.startswith(b"HTTP/1.1 431 ") and found.endswith(b"\r\n\r\n431 Request Header Fields Too Large\n")


def test_a_client_that_says_nothing_costs_nothing(site: Lab) -> None:
    asked = counters(site)["queries"]
    held = [connect(site.client(), VIP, 80) for _ in range(50)]
    time.sleep(0.3)
    assert counters(site)["queries"] == asked, "no message"
    assert site.client().answered(url(VIP), 3) == 3
    for one in held:
        one.close()


@every
def test_half_a_request_is_408(site: Lab, binding: str) -> None:
    bound(site, binding, inspect_timeout=1)
    with connect(site.client(), VIP, 80) as it:
        began = time.monotonic()
        it.sendall(b"GET / HTTP/1.1\r\n")
        found = everything(it)
    assert found.startswith(b"HTTP/1.1 408 ") and found.endswith(b"\r\n\r\n408 Request Timeout\n")
    assert time.monotonic() - began >= 1, "not before its time"


# ------------------------------------------------------------------ carrying


BAD: dict[str, dict[str, float]] = {"loss": {"loss": 0.05}, "twice": {"twice": 0.1}, "order": {"order": 0.1},
                                    "damage": {"damage": 0.02}}


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("how", ["clean", *BAD])
@pytest.mark.parametrize("sack", ["1", "0"], ids=["sack", "nosack"])
def test_large_bodies_arrive_whole_both_ways(site: Lab, vip: str, how: str, sack: str) -> None:
    client = site.client()
    size = 100_000_000 if how == "clean" else 3_000_000
    digest = site.make_file("large", size)
    upload = site.directory / "upload"
    data = os.urandom(1 << 20) * (size // (1 << 20))
    upload.write_bytes(data)
    ends = [client, *site.servers]
    with contextlib.ExitStack() as wires:
        for host in ends:
            host.run("sysctl", "-qw", f"net.ipv4.tcp_sack={sack}")
            wires.callback(host.run, "sysctl", "-qw", "net.ipv4.tcp_sack=1")
        if how != "clean":
            for host in ends:
                wires.enter_context(bad_wire(host, site.directory, **BAD[how]))
        target = site.directory / "got"
        client.run("curl", "-gsS", "--max-time", "100", "-o", str(target), url(vip, "/large"), timeout=120)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
        told = client.run("curl", "-gsS", "--max-time", "100", "-H", "Expect:", "-T", str(upload), url(vip, "/python"),
                          timeout=120).stdout
        assert told.strip() == hashlib.sha256(data).hexdigest()


@both
def test_many_requests_on_a_bad_wire(site: Lab, vip: str) -> None:
    """Rows 1 and 2: handshakes and first data suffer as well."""
    with contextlib.ExitStack() as wires:
        for host in (site.client(), *site.servers):
            wires.enter_context(bad_wire(host, site.directory, loss=0.03, twice=0.03, order=0.1))
        served = site.client().who(url(vip), 60, timeout=90)
    assert set(served) <= {"s1", "s2", "s3"}, served
    assert served.total() == 60


@both
@pytest.mark.parametrize("first", ["server", "client"])
@pytest.mark.parametrize("binding", ["splice", "hybrid", "relay"])
def test_a_port_that_comes_back_at_once(lab: Lab, vip: str, binding: str, first: str) -> None:
    """Whoever finishes first: what the port was led to before is forgotten, and each request is read anew. A server
    that finishes first remembers it, and takes the next one all the same."""
    site, closing = configured(lab, binding=binding), "Connection: close\r\n" if first == "server" else ""
    # A port for each: that a server remembers it from another virtual address is another matter.
    port = next(OWN_PORTS)
    with contextlib.ExitStack() as settings:
        for host, most, usually in ((site.client(), 0, 131_072), *((one, 4096, 0) for one in site.servers)):
            settings.callback(host.run, "sysctl", "-qw", f"net.ipv4.tcp_max_tw_buckets={usually}")
            host.run("sysctl", "-qw", f"net.ipv4.tcp_max_tw_buckets={most}")
        for turn in range(12):
            where, expected = (("/one/x", "s1"), ("/about", "s2"), ("/about", "s3"))[turn % 3]
            more = ("", "", "Cookie: third=yes\r\n")[turn % 3] + closing
            name = "two.example" if expected == "s2" else "a.example"
            began = time.monotonic()
            with tcp(site.client(), vip, 80, source_port=port, timeout=5) as it:
                for part in (f"GET {where} HTTP/1.1\r\n", f"Host: {name}\r\n{more}\r\n"):
                    it.sendall(part.encode())
                    time.sleep(0.005 * (turn % 2))  # in several segments the agent delivers it itself
                answer = it.recv(4096)
                if first == "client":
                    it.shutdown(socket.SHUT_WR)
                assert f"X-Server: {expected}".encode() in answer + everything(it)
            assert time.monotonic() - began < 2
            wait_until(lambda: not site.client().run("ss", "-Htan", "sport", "=", f":{port}").stdout, 2, "it is free")
        waiting = [host.run("ss", "-Htan", "state", "time-wait", "dport", "=", f":{port}").stdout
                   for host in site.servers]
        assert all(waiting) if first == "server" else not any(waiting), "who finished first remembers it"


def test_a_flood_of_syns_costs_nothing(site: Lab) -> None:
    vip = VIP  # hping3 has no IPv6
    asked, before = at_rest(site, named(vip, "web"))["opened"], counters(site)
    host = site.client("c2")
    flood = host.popen("hping3", "-q", "-S", "-p", "80", "--flood", "--rand-source", vip, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        served = site.client().who(url(vip), 20, timeout=20)
    finally:
        end(flood)
    assert served.total() == 20 and set(served) == {"s1", "s2", "s3"}
    after = counters(site)
    assert after["greeted"] - before["greeted"] > 1000
    assert after["queries"] - before["queries"] == 20
    assert statistics(site, named(vip, "web"))["opened"] - asked == 20


def test_forged_acknowledgements_get_nowhere(site: Lab) -> None:
    before = counters(site)
    host = site.client("c2")
    host.run("hping3", "-q", "-A", "-p", "80", "-c", "300", "-i", "u500", "-d", "20", VIP, check=False)
    after = counters(site)
    assert after["cookie_bad"] - before["cookie_bad"] >= 290
    assert after["queries"] == before["queries"]


def test_the_controller_comes_back(site: Lab) -> None:
    """Connections that were spliced go on without it, and new ones come when it is back."""
    digest = site.make_file("slow", 20_000_000)
    target = site.directory / "got"
    going = site.client().popen("curl", "-gsS", "--limit-rate", "8M", "-o", str(target), url(VIP, "/slow"))
    wait_until(lambda: target.exists() and target.stat().st_size > 100_000, 5, "a download that goes")
    site.controller.kill()
    time.sleep(0.5)
    site.start_controller()
    assert going.wait(30) == 0
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    wait_until(lambda: site.client().who(url(VIP), 3, timeout=3).keys() <= {"s1", "s2", "s3"}, 10, "new connections")
