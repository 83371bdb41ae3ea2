# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers that read what clients say, judged by every segment that client and member send and get.

Real kernels at both ends; what is right is said in tests/segments.py. Every binding, IPv4 and IPv6.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bad_wire import bad_wire
from tests.integration.capture import captures, offload
from tests.integration.handed_over import Site
from tests.integration.late_isn import late_isn
from tests.integration.support import VIP, VIP6
from tests.integration.watched import SIZES, WAYS, Connection, laboratory
from topologies.lab import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

CLOSE = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with laboratory(tmp_path_factory.mktemp("wire")) as made:
        yield made


both_ways = pytest.mark.parametrize("way", list(WAYS))
both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])


@both
@both_ways
@pytest.mark.parametrize("last", ["server", "client"])
def test_a_large_answer(site: Site, way: str, vip: str, last: str) -> None:
    """Whoever finishes first."""
    digest = site.lab.make_file("large", SIZES[way])
    with captures(site.lab.client(), site.lab.server()) as ends:
        made = Connection(site, way, vip, ends)
        made.say("GET", "/large", CLOSE if last == "server" else b"")
        assert hashlib.sha256(made.answer()).hexdigest() == digest
        if last == "server":
            made.until_closed()
        _, member = made.judge()
    assert len(member.down.stream) > SIZES[way]


@both
@both_ways
@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_a_client_that_finishes_first(site: Site, way: str, vip: str, wait: float) -> None:
    """Its FIN with the request, or while the answer is on its way (nginx would take that for the end of it all)."""
    with captures(site.lab.client(), site.lab.server()) as ends:
        made = Connection(site, way, vip, ends)
        made.say("GET", f"/bytes/{SIZES[way]}")
        time.sleep(wait)
        made.socket.shutdown(socket.SHUT_WR)
        assert made.answer() == bytes(range(256)) * (SIZES[way] // 256)
        made.until_closed()
        # A FIN on the heels of the request may be there before it, which went up to be read.
        made.judge(lossy=wait == 0)


@both
@both_ways
def test_a_large_body(site: Site, way: str, vip: str) -> None:
    body = os.urandom(SIZES[way])
    with captures(site.lab.client(), site.lab.server()) as ends:
        made = Connection(site, way, vip, ends)
        made.say("POST", "/", body=body)
        assert made.answer().decode().strip() == hashlib.sha256(body).hexdigest()
        _, member = made.judge()
    assert member.up.stream.endswith(body)


@both
@both_ways
def test_a_first_flight_in_one_frame(site: Site, way: str, vip: str) -> None:
    """With offload, head and body in one write come as one frame that fits no wire: it is cut up, not lost."""
    client, body = site.lab.client(), os.urandom(6000)

    def repeated() -> int:
        rows = [line.split() for line in client.run("cat", "/proc/self/net/snmp").stdout.splitlines()
                if line.startswith("Tcp:")]
        return int(dict(zip(*rows, strict=True))["RetransSegs"])

    again = []
    with offload(client), captures(client, site.lab.server()) as ends:
        for _ in range(5):
            before = repeated()
            made = Connection(site, way, vip, ends)
            made.say("POST", "/", body=body)
            assert made.answer().decode().strip() == hashlib.sha256(body).hexdigest()
            made.socket.close()
            again.append(repeated() - before)
        assert any(one.sent and len(one.payload) > 6000 for one in ends[0].read()), "there were such frames"
    # A flight that is lost is sent again by every one of them; a machine that stood still makes one of them impatient.
    assert again.count(0) >= 3, f"nothing has to be sent twice: {again}"


@both
@both_ways
def test_many_requests_of_one_connection(site: Site, way: str, vip: str) -> None:
    with captures(site.lab.client(), site.lab.server()) as ends:
        made = Connection(site, way, vip, ends)
        for _ in range(20):
            made.say("GET", "/")
            assert made.answer() == b"s1\n"
        _, member = made.judge()
    assert member.up.stream.count(b"GET / ") == 20


@both
@both_ways
@pytest.mark.parametrize("back", [1, 20, 700, 1_000_000])
def test_numbers_that_begin_again(site: Site, way: str, vip: str, back: int) -> None:
    """The client's initial number is so far below 2**32: its SYN, its request, its body go over it."""
    body = os.urandom(2_000_000)
    with captures(site.lab.client(), site.lab.server()) as ends:
        made = Connection(site, way, vip, ends, 2**32 - back)
        made.say("POST", "/", b"X-More: " + b"y" * 600 + b"\r\n", body)
        assert made.answer().decode().strip() == hashlib.sha256(body).hexdigest()
        client, _ = made.judge()
    assert client.up.high > back


@both
@pytest.mark.parametrize("way", [way for way in WAYS if way != "handoff"])
@pytest.mark.parametrize("back", [1, 500_000])
def test_members_numbers_that_begin_again(site: Site, way: str, vip: str, back: int, tmp_path: Path) -> None:
    """The member's initial number is so far below 2**32: its SYN-ACK, its head, its body go over it. (Where it is
    handed the connection, the cookie is its number.)"""
    client, member = site.lab.client(), site.lab.server()
    with contextlib.ExitStack() as settings:
        client.run("sysctl", "-qw", "net.ipv4.tcp_sack=0")
        settings.callback(client.run, "sysctl", "-qw", "net.ipv4.tcp_sack=1")
        settings.enter_context(late_isn(member, WAYS[way][2], 2**32 - back, tmp_path))
        with captures(client, member) as ends:
            made = Connection(site, way, vip, ends)
            made.say("GET", f"/bytes/{SIZES[way]}")
            assert made.answer() == bytes(range(256)) * (SIZES[way] // 256)
            _, seen = made.judge()
    assert seen.down.isn == 2**32 - back and seen.down.high > back


@both
@both_ways
@pytest.mark.parametrize("sack", [True, False], ids=["sack", "nosack"])
@pytest.mark.parametrize("isn", [None, 2**32 - 300_000], ids=["any", "wrap"])
def test_loss(site: Site, way: str, vip: str, sack: bool, isn: int | None, tmp_path: Path) -> None:
    """Both ways, with SACK and without: gaps are filled, and what SACK tells is true in the other end's numbers."""
    client, member = site.lab.client(), site.lab.server()
    digest, body = site.lab.make_file("one", 1_000_000), os.urandom(1_000_000)
    with contextlib.ExitStack() as wires:
        # A server agent needs it at its host: there the client alone has none.
        site.disturbed |= way != "handoff" and not sack
        for host in (client,) if way == "handoff" else (client, member):
            host.run("sysctl", "-qw", f"net.ipv4.tcp_sack={int(sack)}")
            wires.callback(host.run, "sysctl", "-qw", "net.ipv4.tcp_sack=1")
        for host in (client, member):
            wires.enter_context(bad_wire(host, tmp_path, loss=0.03, twice=0.02, order=0.06))
        blocks = 0
        for method in ("GET", "POST"):
            with captures(client, member) as ends:
                made = Connection(site, way, vip, ends, isn)
                if method == "GET":
                    made.say("GET", "/one")
                    assert hashlib.sha256(made.answer()).hexdigest() == digest
                else:
                    made.say("POST", "/", body=body)
                    assert made.answer().decode().strip() == hashlib.sha256(body).hexdigest()
                views = made.judge(lossy=True)
            blocks += sum(view.up.blocks + view.down.blocks for view in views)
    assert (blocks > 0) == sack, "SACK was there where it was on"
