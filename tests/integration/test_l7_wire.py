# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers that read what clients say, judged by every segment that client and member send and get.

Real kernels at both ends; what is right is said in tests/segments.py. Every binding, IPv4 and IPv6.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bad_wire import bad_wire
from tests.integration.capture import Capture, captures, offload, real_checksums
from tests.integration.handed_over import Site
from tests.integration.late_isn import late_isn
from tests.integration.support import VIP, VIP6, configure, family_of, members, pool, server
from tests.segments import View, compare
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WEB_SERVER = Path(__file__).with_name("web_server.py")
WAYS = {"splice": (80, 80, 9000), "handoff": (81, 8080, 9001), "hybrid": (82, 8081, 9002), "relay": (83, 8082, 9003)}
"""The virtual server's port, and the member's: nginx, and what takes bodies. None is used both ways, so that no port of
a client means two connections there."""
SIZES = {way: 1_000_192 if way == "relay" else 5_000_192 for way in WAYS}
"""Bytes of what is large, a multiple of 256; every packet of a relayed connection goes through the controller."""
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, SEND_QUEUE, OFF_NO_WINDOW_PROBE = 19, 20, 21, 2, -1
CLOSE = b"Connection: close\r\n"


def _to_python(name: str, kind: str, value: str) -> dict[str, Any]:
    return {"name": kind, "action": "REDIRECT_TO_POOL", "redirect_pool": name,
            "rules": [{"type": kind, "compare_type": "STARTS_WITH", "value": value}]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("wire")
    with contextlib.ExitStack() as running:
        # A process that moves to another processor overtakes the packets that it has sent from the one before.
        running.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        lab = running.enter_context(Lab(SingleTopo(clients=1, servers=1), directory=directory / "lab",
                                        options=["--fastpath"]))
        lab.start_servers()
        running.callback(end, lab.server().nginx(lab.directory / "files", (WAYS["relay"][1],)))
        for _, _, port in WAYS.values():
            running.callback(end, lab.server().popen(sys.executable, str(WEB_SERVER), "s1", str(port)))
        lab.start_controller()
        wait_until(lambda: lab.rest.get("/v1/stats")["switches"][0].get("fastpath"), 10, "a fast path")
        pools, servers = [], []
        for way, (port, *behind) in WAYS.items():
            for word, vip in (("four", VIP), ("six", VIP6)):
                name = f"{way}-{word}"
                pools += [pool(f"{name}-{member}", "ROUND_ROBIN", members(lab, member, vip == VIP6))
                          for member in behind]
                servers.append(server(name, port, f"{name}-{behind[0]}", vip, application="http", binding=way,
                                      l7_policies=[_to_python(f"{name}-{behind[1]}", "METHOD", "POST"),
                                                   _to_python(f"{name}-{behind[1]}", "PATH", "/bytes/")]))
        configure(lab, pools, servers)
        # Without TIME_WAIT a server that finishes first has nothing left that could answer the client's FIN.
        lab.server().run("sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=4096")
        made = Site(lab, WAYS["handoff"][1:])
        running.callback(made.stop_agents)
        made.start_agents()
        running.enter_context(real_checksums([lab.client(), lab.server()]))
        # The switch's end of each wire as well: a frame that has to be cut up is, before its host sees it.
        for link in json.loads(lab.root.run("ip", "-j", "link").stdout):
            if re.fullmatch(r"lb1-eth\d+", link["ifname"]):
                lab.root.run("ethtool", "-K", link["ifname"], "tx", "off", "tso", "off")
        yield made


class Connection:
    """A client's connection to a virtual server, and both ends' captures of it.

    Args:
        site: the laboratory.
        way: the binding.
        vip: the virtual address.
        isn: the client's initial sequence number; the kernel's choice where None.
    """

    def __init__(self, site: Site, way: str, vip: str, ends: list[Capture], isn: int | None = None) -> None:
        self._client = site.lab.client()
        self._spliced, self._ends = way != "handoff", ends
        # The switch's queue to the controller is short: what finds it full is dropped, and sent again.
        self._lossy = way == "relay"
        if way == "handoff":
            # An agent that finds something changed at its interfaces announces itself anew.
            wait_until(lambda: site.announced() == len(site.lab.servers), 20, "every agent announces its servers")
            time.sleep(0.3)
        self._since = site.shaken()
        with self._client.entered():
            self.socket = socket.socket(family_of(vip))
        self.socket.settimeout(30)
        if isn is not None:
            for option, value in ((TCP_REPAIR, 1), (TCP_REPAIR_QUEUE, SEND_QUEUE), (TCP_QUEUE_SEQ, isn),
                                  (TCP_REPAIR, OFF_NO_WINDOW_PROBE)):
                self.socket.setsockopt(socket.IPPROTO_TCP, option, struct.pack("I", value & 0xFFFFFFFF))
        self.socket.connect((vip, WAYS[way][0]))
        address, self.port = self.socket.getsockname()[:2]
        self._known = (socket.inet_pton(family_of(vip), address), self.port)
        self._isn, self._left = isn, b""

    def say(self, method: str, path: str, headers: bytes = b"", body: bytes = b"") -> None:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: a.example\r\n{length}".encode() + headers
        self.socket.sendall(head + b"\r\n" + body)

    def answer(self) -> bytes:
        """The body of the next answer, which is 200."""
        while b"\r\n\r\n" not in self._left:
            self._more()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = next(int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n")
                      if line.startswith(b"content-length:"))
        while len(self._left) < length:
            self._more()
        body, self._left = self._left[:length], self._left[length:]
        return body

    def _more(self) -> None:
        part = self.socket.recv(1 << 20)
        assert part, "the connection ended"
        self._left += part

    def until_closed(self) -> None:
        """The other side finishes, having said no more."""
        assert self.socket.recv(1) == b"" == self._left

    def judge(self, lossy: bool = False) -> tuple[View, View]:
        """Wait for the end of the connection, and assert that all was as it has to be. Returns both ends' views."""
        self.socket.close()
        lossy = lossy or self._lossy
        upper, lower = self._ends
        client, kept = View("client", self._known, lossy=lossy), []
        deadline = time.monotonic() + 10
        while True:
            ended = client.ended
            client.add(upper.read())
            kept += lower.read()
            member = View("member", self._known, None if self._spliced else client, lossy)
            if ended or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # and once more: the last segments may be on their way to the other end
        member.add(kept)
        assert upper.lost == lower.lost == 0, "the captures have all of it"
        assert client.close() + member.close() + compare(client, member, self._spliced) == []
        assert self._isn in (None, client.up.isn)
        greeted, opened = self._since()
        assert greeted >= 1 and (opened >= 1) == self._spliced, "as the virtual server's binding says"
        return client, member


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
