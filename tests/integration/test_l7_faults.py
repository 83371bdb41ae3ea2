# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, and what strangers do, on every binding of virtual servers that read what clients say.

One laboratory, a virtual server and three servers of its own for each binding: dead, silent and refusing members, all
of them gone, floods, frames that are none, bad wires. And what changes the request that a member gets
(``close_after_first``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.frames import RST
from tests.integration.bad_wire import bad_wire
from tests.integration.capture import Capture, captures
from tests.integration.handed_over import Site
from tests.integration.l7_site import PYTHON_PORT, WEB_SERVER, connect, rule, to_pool, url
from tests.integration.support import VIP, VIP6, configure, held, members, pool, server
from topologies.hosts import LabHost
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

BINDINGS = {"splice": 81, "handoff": 82, "hybrid": 83, "relay": 84}
"""The virtual server's port, which is nginx's as well; what takes bodies is at :data:`PYTHON_PORT` and so much."""
CLOSING = {"splice": 91, "auto": 92, "hybrid": 93, "relay": 94}
"""The same of virtual servers with ``close_after_first``; with ``auto`` members adopt what need not be changed."""
NAMES = ["s1", "s2", "s3"]
ALL = set(NAMES)
every = pytest.mark.parametrize("binding", list(BINDINGS))
FAULT = "table inet fault {{\n chain in {{\n type filter hook input priority -10; policy accept;\n {}\n }}\n}}\n"


class Place:
    """The laboratory, and who serves."""

    agents: Site

    def __init__(self, lab: Lab) -> None:
        self.lab, self.client = lab, lab.client()
        self.running: dict[tuple[str, str], subprocess.Popen[Any]] = {}

    def start(self, binding: str) -> None:
        """Every server of a binding that does not run."""
        for host in self.lab.servers:
            if (host.name, binding) not in self.running:
                self.running[host.name, binding] = host.nginx(self.lab.directory / "files", (BINDINGS[binding],))

    def kill(self, binding: str, *names: str) -> None:
        """As a crash does."""
        for name in names:
            self.lab.server(name).kill(self.running.pop((name, binding)))

    def stop(self) -> None:
        while self.running:
            end(self.running.popitem()[1])

    def url(self, binding: str, path: str = "/", vip: str = VIP) -> str:
        return url(vip, path, BINDINGS[binding])

    def who(self, binding: str, count: int) -> Counter[str]:
        return self.client.who(self.url(binding), count)

    def stats(self, binding: str) -> dict[str, Any]:
        """Of whoever shakes hands with its clients."""
        told = self.lab.rest.get("/v1/stats")["switches"][0]
        return dict(told["fastpath" if binding in ("splice", "handoff") else "relay"] or {})

    def at_rest(self, binding: str) -> None:
        """Nothing is left half-way, and no connection."""
        name = f"{binding}-four"
        wait_until(lambda: not self.stats(binding).get("handshakes_held") and not [
            one for one in self.lab.rest.get(f"/v1/connections?virtual_server={name}&limit=1000")["connections"]
            if one["state"] not in ("TIME_WAIT", "CLOSED")], 15, "nothing is held")


@contextlib.contextmanager
def fault(host: LabHost, *rules: str) -> Iterator[Callable[[], str]]:
    """Rules of nftables at what comes in at a host; makes a function that lists them with their counters."""
    host.run("nft", "-f", "-", stdin=FAULT.format("\n".join(rules)))
    try:
        yield lambda: host.run("nft", "list", "table", "inet", "fault").stdout
    finally:
        host.run("nft", "delete", "table", "inet", "fault")


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.ExitStack() as running:
        lab = running.enter_context(Lab(SingleTopo(), directory=tmp_path_factory.mktemp("faults") / "lab",
                                        options=["--fastpath"]))
        made = Place(lab)
        running.callback(made.stop)
        for host in lab.servers:
            running.callback(end, host.nginx(lab.directory / "files", tuple(CLOSING.values())))
            for port in (*BINDINGS.values(), *CLOSING.values()):
                running.callback(end, host.popen(sys.executable, str(WEB_SERVER), host.name, str(PYTHON_PORT + port)))
        for binding in BINDINGS:
            made.start(binding)
        lab.start_controller()
        wait_until(lambda: lab.rest.get("/v1/stats")["switches"][0].get("fastpath"), 10, "a fast path")
        pools, servers = [], []
        for binding, port, closes in [*((*one, False) for one in BINDINGS.items()),
                                      *((*one, True) for one in CLOSING.items())]:
            for word, vip in (("four", VIP), ("six", VIP6)):
                name, six = f"{'closing-' if closes else ''}{binding}-{word}", vip == VIP6
                pools += [pool(name, "ROUND_ROBIN", members(lab, port, six)),
                          pool(f"bodies-{name}", "ROUND_ROBIN", members(lab, PYTHON_PORT + port, six))]
                servers.append(server(
                    name, port, name, vip, application="http", binding=binding, close_after_first=closes,
                    l7_policies=[to_pool(f"bodies-{name}", rule("METHOD", "EQUAL_TO", "PUT"))]))
        configure(lab, pools, servers)
        made.agents = Site(lab, (BINDINGS["handoff"], PYTHON_PORT + BINDINGS["handoff"], CLOSING["auto"]))
        running.callback(made.agents.stop_agents)
        made.agents.start_agents()
        yield made


@pytest.fixture
def place(_place: Place, request: pytest.FixtureRequest) -> Place:
    """All servers of the test's binding serve."""
    binding = request.node.callspec.params["binding"]
    _place.start(binding)
    wait_until(lambda: set(_place.who(binding, 6)) == ALL, 15, "all of them serve")
    return _place


# ------------------------------------------------------------------ members


@every
def test_a_member_dies(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 1: others are not touched, new connections are soon the others' altogether; it is found when it is back."""
    with held(place.client, VIP, BINDINGS[binding], 3) as three:
        assert {one.server for one in three} == ALL
        place.kill(binding, "s1")
        begun = time.monotonic()
        wait_until(lambda: set(place.who(binding, 12)) == {"s2", "s3"}, 3, "the others have all of it")
        moved = time.monotonic() - begun
        for one in three:
            if one.server != "s1":
                assert one.ask() == one.server
    place.start(binding)
    begun = time.monotonic()
    wait_until(lambda: set(place.who(binding, 6)) == ALL, 10, "it serves again")
    told(f"12 new connections are the others' {moved:.2f} s after its death; "
         f"it serves {time.monotonic() - begun:.2f} s after it is back")


@every
def test_a_member_is_silent(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 2: another one answers within 6 s. Who was handed over waits until it speaks again, as without us."""
    def asked() -> list[subprocess.Popen[str]]:
        return [place.client.popen("curl", "-gsS", "--max-time", "20" if binding == "handoff" else "6",
                                   place.url(binding), stdout=subprocess.PIPE, text=True) for _ in range(3)]

    with held(place.client, VIP, BINDINGS[binding], 3) as three:
        with fault(place.lab.server("s1"), f"tcp dport {BINDINGS[binding]} drop"):
            begun, asking = time.monotonic(), asked()
            if binding == "handoff":
                time.sleep(0.5)
                assert [one.poll() for one in asking].count(None) == 1, "one of them waits"
            else:
                assert {one.communicate()[0].strip() for one in asking} == {"s2", "s3"}
                told(f"another one has answered after {time.monotonic() - begun:.2f} s")
            for one in three:
                if one.server != "s1":
                    assert one.ask() == one.server
        if binding == "handoff":
            healed = time.monotonic()
            assert {one.communicate()[0].strip() for one in asking} == ALL
            told(f"who was handed over is answered {time.monotonic() - healed:.2f} s after it speaks again")
        assert [one.ask() for one in three] == [one.server for one in three], "s1's goes on"


@every
def test_a_member_refuses(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 3, after the client's handshake: another member has it. Who was handed over is reset by the member itself."""
    with fault(place.lab.server("s1"), f"tcp dport {BINDINGS[binding]} reject with tcp reset"):
        began = time.monotonic()
        found = place.who(binding, 12)
        took = time.monotonic() - began
        assert took < 12, "a second at most for each of them"
        told(f"12 requests took {took:.2f} s")
        if binding == "handoff":
            assert found == Counter({"s2": 4, "s3": 4, "curl: (56)": 4})
        else:
            assert set(found) == {"s2", "s3"} and found.total() == 12


@every
def test_all_members_are_down(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 4: refused quickly, and it heals by itself."""
    def answered() -> str:
        return place.client.run("curl", "-gsS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}",
                                place.url(binding), check=False).stdout

    place.kill(binding, *NAMES)
    wait_until(lambda: answered() == "503", 3, "503")
    began = time.monotonic()
    assert answered() == "503"
    took = time.monotonic() - began
    assert took < 1.5
    place.start(binding)
    began = time.monotonic()
    wait_until(lambda: set(place.who(binding, 6)) == ALL, 10, "they serve again")
    told(f"refused after {took:.2f} s; healed in {time.monotonic() - began:.2f} s")


# ------------------------------------------------------------------ strangers


@every
def test_a_flood_of_syns(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 12: nothing of it reaches a member, nothing is held, and who means it is served."""
    place.at_rest(binding)
    before = place.stats(binding)
    foreign = "ip saddr != 10.0.0.0/8 tcp flags & (syn | ack) == syn counter drop"
    with contextlib.ExitStack() as counting:
        lists = [counting.enter_context(fault(host, foreign)) for host in place.lab.servers]
        # Ten thousand a second are the fast path's; a controller that answers each of them by itself has fewer.
        fast = binding in ("splice", "handoff")
        flood = place.lab.client("c2").popen(
            "hping3", "-q", "-S", "-p", str(BINDINGS[binding]), "-i", "u50" if fast else "u1000", "--rand-source", VIP,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: place.stats(binding)["handshakes"]["greeted"] - before["handshakes"]["greeted"] > 500,
                       10, "a flood")
            began = time.monotonic()
            found = place.who(binding, 60)
            took = time.monotonic() - began
            assert found.total() == 60 and sum(found[name] for name in NAMES) >= 59, found
            greeted = place.stats(binding)["handshakes"]["greeted"] - before["handshakes"]["greeted"]
        finally:
            end(flood)
        assert all("packets 0 bytes 0" in listed() for listed in lists), "not one of them"
    after = place.stats(binding)
    assert after["handshakes"]["asked_data"] - before["handshakes"]["asked_data"] <= 120, "no message for it"
    began = time.monotonic()
    place.at_rest(binding)
    told(f"60 requests in {took:.2f} s beside {greeted} forged SYNs so far; "
         f"at rest {time.monotonic() - began:.2f} s after the last")


@every
def test_floods_of_other_segments(place: Place, binding: str, told: Callable[[str], None]) -> None:
    """Row 13: ACK, with data and without, RST, FIN, Xmas and null. No more comes back than was sent."""
    place.at_rest(binding)
    stranger = place.lab.client("c3")

    def passed() -> tuple[int, int]:
        (link,) = json.loads(stranger.run("ip", "-j", "-s", "link", "show", stranger.interface).stdout)
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    before, served = passed(), f"ip saddr {stranger.address} tcp dport {BINDINGS[binding]} counter"
    with contextlib.ExitStack() as counting:
        lists = [counting.enter_context(fault(host, served)) for host in place.lab.servers]
        floods = [stranger.popen("hping3", "-q", *flags, "-p", str(BINDINGS[binding]), "-c", "150", "-i", "u2000", VIP,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                  for flags in (("-A",), ("-A", "-d", "100"), ("-R",), ("-F",), ("-F", "-P", "-U"), ())]
        for flood in floods:
            flood.wait(20)
        assert place.who(binding, 12).keys() <= ALL
        assert all("packets 0 bytes 0" in listed() for listed in lists), "no member hears of it"
    sent, back = (now - then for now, then in zip(passed(), before, strict=True))
    assert sent >= 6 * 150 * 40 and back <= sent, "no amplifier"
    began = time.monotonic()
    place.at_rest(binding)
    told(f"{sent} bytes came, {back} went back; at rest after {time.monotonic() - began:.2f} s")


def _sum(data: bytes) -> int:
    total = int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF
    return 0xFFFF - total


class Forger:
    """Makes frames of somebody's connection, whole but for what is asked for.

    Args:
        host: the client.
        wire: what it sent so far.
    """

    def __init__(self, host: LabHost, wire: Capture, port: int) -> None:
        last = [one for one in wire.read() if one.sent and one.dport == port][-1]
        self.sport, self.dport, self.ack = last.sport, last.dport, last.ack
        self.seq = last.seq + len(last.payload)
        self.source, self.destination = last.source, last.destination
        self._number = 0
        neighbour = host.run("ip", "neigh", "show", VIP).stdout.split("lladdr ")[1].split()[0]
        (link,) = json.loads(host.run("ip", "-j", "link", "show", host.interface).stdout)
        self.ethernet = bytes.fromhex((neighbour + link["address"]).replace(":", "")) + b"\x08\x00"
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._socket.bind((host.interface, 0x0800))

    def tcp(self, *, doff: int = 5, sport: int | None = None, dport: int | None = None, spoil: int = 0,
            source: bytes | None = None) -> bytes:
        self._number += 1
        said = b"GET /forged-%d HTTP/1.1\r\nHost: a\r\n\r\n" % self._number
        head = struct.pack("!HHIIBBHHH", self.sport if sport is None else sport, self.dport if dport is None else dport,
                           self.seq & 0xFFFFFFFF, self.ack, doff << 4, 0x18, 500, 0, 0)
        pseudo = (source or self.source) + self.destination + struct.pack("!HH", 6, len(head + said))
        check = _sum(pseudo + head + said) ^ spoil
        return head[:16] + check.to_bytes(2, "big") + head[18:] + said

    def send(self, body: bytes, *, options: bytes = b"", source: bytes | None = None, more: int = 0, version: int = 4,
             fragment: int = 0, spoil: int = 0) -> None:
        words = 5 + len(options) // 4
        head = struct.pack("!BBHHHBBH", version << 4 | words, 0, 4 * words + len(body) + more, 77, fragment, 64, 6,
                           0) + (source or self.source) + self.destination + options
        self._socket.send(self.ethernet + head[:10] + (_sum(head) ^ spoil).to_bytes(2, "big") + head[12:] + body)

    def close(self) -> None:
        self._socket.close()


@every
def test_frames_that_are_none(place: Place, binding: str) -> None:
    """Row 18, in the middle of a connection: no member gets any of it as valid, and the connection goes on."""
    client, port, virtual = place.client, BINDINGS[binding], socket.inet_aton(VIP)
    with captures(client) as (wire,), held(client, VIP, port, 1) as (one,):
        forger = Forger(client, wire, port)
        try:
            with captures(place.lab.server(one.server)) as (behind,):
                forger.send(forger.tcp(spoil=0x55))
                forger.send(forger.tcp(doff=4))
                forger.send(forger.tcp(doff=15))
                forger.send(forger.tcp(sport=0))
                forger.send(forger.tcp(dport=0))
                forger.send(forger.tcp(source=virtual), source=virtual)
                forger.send(forger.tcp(), more=400)
                forger.send(forger.tcp(), version=5)
                forger.send(forger.tcp(), spoil=0x55)
                forger.send(forger.tcp(), options=bytes((7, 3, 4, 0)))
                # A header in two pieces (RFC 1858), and a piece that would write over another one's ports.
                whole = forger.tcp()
                forger.send(whole[:8], fragment=0x2000)
                forger.send(whole[8:], fragment=0x0001)
                forger.send(whole[:24], fragment=0x2000)
                forger.send(whole[8:], fragment=0x0001)
                time.sleep(0.3)  # what is still on its way through the controller
                assert not [got for got in wire.read() if got.dport == forger.sport and got.sport == port
                            and got.destination == forger.source and got.flags & RST], "nobody takes it for the client"
                with contextlib.suppress(TimeoutError):
                    one.ask()
                time.sleep(0.2)
                seen = behind.read()
        finally:
            forger.close()
        assert any(b"GET / " in got.payload for got in seen), "there was something to see"
        assert not [got.payload for got in seen if b"forged" in got.payload and not got.wrong]
        assert one.ask() == one.server


# ------------------------------------------------------------------ wires


BAD: dict[str, dict[str, float]] = {"1%": {"loss": 0.01}, "10%": {"loss": 0.1}, "twice": {"twice": 0.1},
                                    "order": {"order": 0.1}, "damage": {"damage": 0.02}}
RATHER = [binding for binding in BINDINGS if binding != "splice"]
"""Bodies of spliced connections are test_l7's."""


@pytest.mark.parametrize(("vip", "sack"), [(VIP, "1"), (VIP6, "0")], ids=["ipv4-sack", "ipv6-nosack"])
@pytest.mark.parametrize("how", ["clean", *BAD])
@pytest.mark.parametrize("binding", RATHER)
def test_bodies_arrive_whole_both_ways(place: Place, binding: str, how: str, vip: str, sack: str) -> None:
    client, lab = place.client, place.lab
    size = {"relay": 10 << 20}.get(binding, 100 << 20) if how == "clean" else 1 << 20
    digest = lab.make_file("large", size)
    upload, target = lab.directory / "upload", lab.directory / "got"
    data = os.urandom(1 << 20) * (size >> 20)
    upload.write_bytes(data)
    ends = [client, *lab.servers]
    with contextlib.ExitStack() as wires:
        # A server agent needs SACK at its host: with handoff the client alone has none.
        for host in ends if binding != "handoff" else (client,):
            host.run("sysctl", "-qw", f"net.ipv4.tcp_sack={sack}")
            wires.callback(host.run, "sysctl", "-qw", "net.ipv4.tcp_sack=1")
        if how != "clean":
            for host in ends:
                wires.enter_context(bad_wire(host, lab.directory, **BAD[how]))
        client.run("curl", "-gsS", "--max-time", "100", "-o", str(target), place.url(binding, "/large", vip),
                   timeout=120)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
        told = client.run("curl", "-gsS", "--max-time", "100", "-H", "Expect:", "-T", str(upload),
                          place.url(binding, "/", vip), timeout=120).stdout
        assert told.strip() == hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------ one request a connection


closing = pytest.mark.parametrize("binding", list(CLOSING))
both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
TOLD = "%{num_connects} %header{x-server}\\n"


@closing
@both
@pytest.mark.parametrize("options", [(), ("-H", "Connection: keep-alive"), ("-0", "-H", "Connection: Keep-Alive")],
                         ids=["silent", "kept", "old"])
def test_every_request_is_balanced_by_itself(_place: Place, binding: str, vip: str, options: tuple[str, ...]) -> None:
    where = [word for _ in range(6) for word in ("-o", "/dev/null", url(vip, "/", CLOSING[binding]))]
    told = _place.client.run("curl", "-gsS", "--max-time", "10", *options, "-w", TOLD, *where).stdout.split("\n")
    assert Counter(told) == Counter({"1 s1": 2, "1 s2": 2, "1 s3": 2, "": 1}), "a connection each, and all have turns"


@closing
def test_bodies_behind_a_changed_request(_place: Place, binding: str, tmp_path: Path) -> None:
    """As much as there is, over bad wires too: what follows the request is where it belongs."""
    lab, client, data = _place.lab, _place.client, os.urandom(1 << 20)
    digest = lab.make_file("behind", len(data))
    upload, target = tmp_path / "upload", tmp_path / "got"
    upload.write_bytes(data)
    for how in ({}, BAD["order"], BAD["1%"]):
        with contextlib.ExitStack() as wires:
            for host in (client, *lab.servers) if how else ():
                wires.enter_context(bad_wire(host, lab.directory, **how))
            # With the second one the body comes at once behind the head, and not when the server has asked for it.
            for expect in ((), ("-H", "Expect:")):
                told = client.run("curl", "-gsS", "--max-time", "60", *expect, "-T", str(upload),
                                  url(VIP, "/", CLOSING[binding]), timeout=70).stdout
                assert told.strip() == hashlib.sha256(data).hexdigest()
            client.run("curl", "-gsS", "--max-time", "60", "-o", str(target), url(VIP, "/behind", CLOSING[binding]),
                       timeout=70)
            assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


def test_what_need_not_be_changed_is_handed_over(_place: Place) -> None:
    where = url(VIP, "/", CLOSING["auto"])
    since = _place.agents.shaken()
    assert set(_place.client.who(where, 9)) == ALL  # these say Connection: close
    wait_until(lambda: since() == (9, 0), 5, "no handshake with a member")
    _place.client.curl(where)
    wait_until(lambda: since()[0] == 10 and since()[1] >= 1, 5, "one that is spliced")


def test_who_asks_for_another_protocol_is_left_alone(_place: Place) -> None:
    with connect(_place.client, VIP, CLOSING["splice"]) as it:
        for _ in range(2):
            it.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            assert b"HTTP/1.1 200 " in it.recv(4096)
