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
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.integration.bad_wire import bad_wire
from tests.integration.capture import captures
from tests.integration.forger import MORE, Forger
from tests.integration.handed_over import Site
from tests.integration.l7_site import (
    PYTHON_PORT,
    WEB_SERVER,
    connect,
    everything,
    named,
    rule,
    to_pool,
    url,
)
from tests.integration.probing import probing
from tests.integration.support import VIP, VIP6, configure, fault, held, members, pool, server, tcp
from tests.segments import parse
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
both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
FAST = ("splice", "handoff")
"""Their clients are shaken hands with by the fast path; the controller does it for the others."""
URG = 32
FLOOD6 = Path(__file__).with_name("flood6.py")
NETWORKS = [{"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254", "monitor_address": "10.0.0.250"},
            {"name": "lan6", "cidr": "fd00::/64", "address": "fd00::254", "monitor_address": "fd00::250"}]
CHECK = {"type": "TCP", "interval": 1, "fast_interval": 0.25, "timeout": 1, "rise": 2, "fall": 2}


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

    def who(self, binding: str, count: int, vip: str = VIP, timeout: float = 30.0) -> Counter[str]:
        return self.client.who(self.url(binding, vip=vip), count, timeout)

    def stats(self, binding: str) -> dict[str, Any]:
        """Of whoever shakes hands with its clients."""
        told = self.lab.rest.get("/v1/stats")["switches"][0]
        return dict(told["fastpath" if binding in FAST else "relay"] or {})

    def at_rest(self, binding: str, vip: str = VIP) -> None:
        """Nothing is left half-way, and no connection."""
        wait_until(lambda: not self.stats(binding).get("handshakes_held") and not self.whose(binding, vip), 15,
                   "nothing is held")

    def whose(self, binding: str, vip: str) -> Counter[str]:
        """The members of the connections that go on."""
        found = self.lab.rest.get(f"/v1/connections?virtual_server={named(vip, binding)}&limit=1000")["connections"]
        return Counter(one["member"] for one in found if one["state"] not in ("TIME_WAIT", "CLOSED"))


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
        assert lab.has_fastpath
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
        configure(lab, pools, servers, NETWORKS)
        made.agents = Site(lab, (BINDINGS["handoff"], PYTHON_PORT + BINDINGS["handoff"], CLOSING["auto"]))
        running.callback(made.agents.stop_agents)
        made.agents.start_agents()
        yield made


@pytest.fixture
def place(_place: Place, request: pytest.FixtureRequest) -> Place:
    """All servers of the test's binding serve."""
    binding, vip = (request.node.callspec.params[name] for name in ("binding", "vip"))
    _place.start(binding)
    wait_until(lambda: set(_place.who(binding, 6, vip)) == ALL, 15, "all of them serve")
    return _place


# ------------------------------------------------------------------ members


@both
@every
def test_a_member_dies(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 1: others are not touched, new connections are soon the others' altogether; it is found when it is back."""
    with held(place.client, vip, BINDINGS[binding], 3) as three:
        assert {one.server for one in three} == ALL
        place.kill(binding, "s1")
        begun = time.monotonic()
        wait_until(lambda: set(place.who(binding, 12, vip)) == {"s2", "s3"}, 3, "the others have all of it")
        moved = time.monotonic() - begun
        for one in three:
            if one.server != "s1":
                assert one.ask() == one.server
    place.start(binding)
    begun = time.monotonic()
    wait_until(lambda: set(place.who(binding, 6, vip)) == ALL, 10, "it serves again")
    told(f"12 new connections are the others' {moved:.2f} s after its death; "
         f"it serves {time.monotonic() - begun:.2f} s after it is back")


def _asked(place: Place, binding: str, vip: str, most: int) -> list[subprocess.Popen[str]]:
    """Three requests at once, each on a connection of its own."""
    return [place.client.popen("curl", "-gsS", "--max-time", str(most), place.url(binding, vip=vip),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]


@both
@every
def test_a_member_is_silent(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 2: another one answers within 6 s. Who was handed over waits until it speaks again, as without us."""
    with held(place.client, vip, BINDINGS[binding], 3) as three:
        with fault(place.lab.server("s1"), f"tcp dport {BINDINGS[binding]} drop"):
            begun, asking = time.monotonic(), _asked(place, binding, vip, 20 if binding == "handoff" else 6)
            if binding == "handoff":
                wait_until(lambda: [one.poll() for one in asking].count(None) == 1, 5, "one of them waits")
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


@pytest.mark.parametrize(("binding", "vip", "on_down"), [("handoff", VIP, "keep"), ("handoff", VIP6, "reset")],
                         ids=["ipv4-keep", "ipv6-reset"])
def test_a_silent_member_that_is_watched(place: Place, binding: str, vip: str, on_down: str,
                                         told: Callable[[str], None]) -> None:
    """Row 2 of handoff as operators have it, with a monitor: within 6 s nobody new is handed to a silent member, though
    its agent announces it all the time. Who was before waits for it; where the pool says ``reset``, another one has it
    as soon as it says its first data again."""
    lab, path, host, port = place.lab, f"/v1/pools/{named(vip, binding)}", place.lab.server("s1"), BINDINGS[binding]
    endpoint = f"[{host.address6}]:{port}" if vip == VIP6 else f"{host.address}:{port}"

    def states() -> set[str]:
        listed = lab.rest.get(f"{path}/members")["members"]
        return {(one["health_status"] or {"state": "not watched"})["state"] for one in listed}

    lab.rest.patch(path, {"monitors": [CHECK], "on_down": on_down})
    try:
        wait_until(lambda: states() == {"up"}, 15, "all of them are watched, and well")
        with held(place.client, vip, port, 3) as three:
            (silent,), others = ([one for one in three if (one.server == "s1") == it] for it in (True, False))
            with fault(host, f"tcp dport {port} drop"):
                begun, asking = time.monotonic(), _asked(place, binding, vip, 20)
                wait_until(lambda: place.whose(binding, vip)[endpoint] == 2, 2, "one of them was handed to it")
                wait_until(lambda: place.who(binding, 6, vip, 0.5).keys() == {"s2", "s3"}, 6,
                           "the others have all of it")
                moved = time.monotonic() - begun
                assert place.agents.announced() == 3, "its agent has not withdrawn it"
                assert place.who(binding, 12, vip).keys() == {"s2", "s3"}
                assert [one.ask() for one in others] == [one.server for one in others]
                if on_down == "reset":
                    assert {one.communicate()[0].strip() for one in asking} == {"s2", "s3"}
                    told(f"who was handed to it has another one's answer after {time.monotonic() - begun:.2f} s")
                else:
                    assert [one.poll() for one in asking].count(None) == 1, "it goes on waiting"
            if on_down == "keep":
                assert {one.communicate()[0].strip() for one in asking} == ALL and silent.ask() == "s1"
        wait_until(lambda: set(place.who(binding, 6, vip)) == ALL, 10, "it serves again")
        told(f"nobody new is handed to it {moved:.2f} s after its silence began")
    finally:
        lab.rest.patch(path, {"monitors": [], "on_down": "keep"})
        wait_until(lambda: states() == {"not watched"}, 10, "nobody is watched any more")


@both
@every
def test_a_member_refuses(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 3, after the client's handshake: another member has it. Who was handed over is reset by the member itself."""
    with fault(place.lab.server("s1"), f"tcp dport {BINDINGS[binding]} reject with tcp reset"):
        began = time.monotonic()
        found = place.who(binding, 12, vip)
        took = time.monotonic() - began
        assert took < 12, "a second at most for each of them"
        told(f"12 requests took {took:.2f} s")
        if binding == "handoff":
            assert found == Counter({"s2": 4, "s3": 4, "curl: (56)": 4})
        else:
            assert set(found) == {"s2", "s3"} and found.total() == 12


@both
@every
def test_all_members_are_down(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 4: refused quickly, and it heals by itself."""
    def answered() -> str:
        return place.client.run("curl", "-gsS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}",
                                place.url(binding, vip=vip), check=False).stdout

    place.kill(binding, *NAMES)
    wait_until(lambda: answered() == "503", 3, "503")
    began = time.monotonic()
    assert answered() == "503"
    took = time.monotonic() - began
    assert took < 1.5
    place.start(binding)
    began = time.monotonic()
    wait_until(lambda: set(place.who(binding, 6, vip)) == ALL, 10, "they serve again")
    told(f"refused after {took:.2f} s; healed in {time.monotonic() - began:.2f} s")


# ------------------------------------------------------------------ strangers


def flood(host: LabHost, vip: str, port: int, flags: int, every: int, *, size: int = 0, count: int = 0,
          forged: bool = False) -> subprocess.Popen[Any]:
    """Segments to a virtual server, one in so many microseconds; ``forged``: from everywhere."""
    if vip == VIP6:
        words = [sys.executable, "-S", str(FLOOD6), host.interface, "any" if forged else host.address6,
                 VIRTUAL_MAC.hex(), vip, *map(str, (port, flags, size, every, count))]
    else:
        letters = zip("FSRPAU", (FIN, SYN, RST, PSH, ACK, URG), strict=True)
        words = ["hping3", "-q", "-p", str(port), "-i", f"u{every}", "-d", str(size), vip,
                 *(f"-{letter}" for letter, flag in letters if flags & flag)]
        words += [*(("-c", str(count)) if count else ()), *(("--rand-source",) if forged else ())]
    return host.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@both
@every
def test_a_flood_of_forged_segments(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 12, SYNs, and data with cookies that nobody was given: nothing of it reaches a member, nothing is held, who
    means it is served all the time. A fast path asks nobody about it, from wherever it says to come (one address in
    eight is a group's)."""
    place.at_rest(binding, vip)
    before, port, fast = place.stats(binding)["handshakes"], BINDINGS[binding], binding in FAST

    def since(name: str) -> int:
        return int(place.stats(binding)["handshakes"][name] - before[name])

    def punted() -> int:
        return int(place.lab.rest.get("/v1/stats")["switches"][0]["packet_ins"])

    foreign = f"ip saddr != 10.0.0.0/8 tcp dport {port} counter drop", \
        f"ip6 saddr != fd00::/64 tcp dport {port} counter drop"
    asked = punted()
    with contextlib.ExitStack() as running:
        lists = [running.enter_context(fault(host, *foreign)) for host in place.lab.servers]
        probe = running.enter_context(probing(place.client, vip, port, rate=50 if fast else 20))
        # Ten thousand a second are the fast path's; a controller that answers each of them by itself has fewer.
        floods = [flood(place.lab.client("c2"), vip, port, SYN, 50 if fast else 1000, forged=True),
                  flood(place.lab.client("c3"), vip, port, ACK, 500 if fast else 2000, size=100, forged=True)]
        for one in floods:
            running.callback(end, one)
        wait_until(lambda: since("greeted") > 500, 10, "a flood")
        begun = time.monotonic()
        probe.quiet(60 if fast else 30, 10)
        assert [one.poll() for one in floods] == [None, None], "it went on all the time"
        greeted = since("greeted")
        seen = [one for one in probe.stop() if one.at >= begun]
        assert sum(one.error is None and one.name in ALL for one in seen) >= 0.99 * len(seen), [
            one for one in seen if one.error]
        for one in floods:
            end(one)
        assert all(listed().count("packets 0 bytes 0") == 2 for listed in lists), "not one of them"
        assert since("asked_data") <= 2 * len(probe.seen), "no message for it"
        assert not fast or punted() - asked < 100, "nor by the switch"
    began = time.monotonic()
    place.at_rest(binding, vip)
    told(f"{len(seen)} requests beside {greeted} forged SYNs so far, the slowest took "
         f"{max(one.seconds for one in seen):.2f} s; at rest {time.monotonic() - began:.2f} s after the last")


@both
@every
def test_floods_of_other_segments(place: Place, binding: str, vip: str, told: Callable[[str], None]) -> None:
    """Row 13: ACK, with data and without, RST, FIN, Xmas and null. No more comes back than was sent."""
    place.at_rest(binding, vip)
    stranger, port = place.lab.client("c3"), BINDINGS[binding]

    def passed() -> tuple[int, int]:
        (link,) = json.loads(stranger.run("ip", "-j", "-s", "link", "show", stranger.interface).stdout)
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    before = passed()
    served = f"{f'ip6 saddr {stranger.address6}' if vip == VIP6 else f'ip saddr {stranger.address}'} tcp dport {port}"
    with contextlib.ExitStack() as counting:
        lists = [counting.enter_context(fault(host, f"{served} counter")) for host in place.lab.servers]
        floods = [flood(stranger, vip, port, flags, 2000, size=size, count=150) for flags, size in (
            (ACK, 0), (ACK, 100), (RST, 0), (FIN, 0), (FIN | PSH | URG, 0), (0, 0))]
        for one in floods:
            one.wait(20)
        assert place.who(binding, 12, vip).keys() <= ALL
        assert all("packets 0 bytes 0" in listed() for listed in lists), "no member hears of it"
    sent, back = (now - then for now, then in zip(passed(), before, strict=True))
    assert sent >= 6 * 150 * 40 and back <= sent, "no amplifier"
    began = time.monotonic()
    place.at_rest(binding, vip)
    told(f"{sent} bytes came, {back} went back; at rest after {time.monotonic() - began:.2f} s")


@both
@every
def test_frames_that_are_none(place: Place, binding: str, vip: str) -> None:
    """Row 18, in the middle of a connection: no member gets any of it as valid, and the connection goes on."""
    client, port = place.client, BINDINGS[binding]
    with captures(client) as (wire,), held(client, vip, port, 1) as (one,):
        forger = Forger(client, wire, port)
        virtual = forger.destination
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
                if vip == VIP:
                    forger.send(forger.tcp(), spoil=0x55)
                forger.send(forger.tcp(), options=True)
                # A header in two pieces (RFC 1858), and a piece that would write over another one's ports.
                whole = forger.tcp()
                forger.send(whole[:8], fragment=MORE)
                forger.send(whole[8:], fragment=1)
                forger.send(whole[:24], fragment=MORE)
                forger.send(whole[8:], fragment=1)
                time.sleep(0.3)  # what is still on its way through the controller
                assert not [got for got in wire.read() if got.dport == forger.sport and got.sport == port
                            and got.destination == forger.source and got.flags & RST], "nobody takes it for the client"
                with contextlib.suppress(TimeoutError):
                    one.ask()
                time.sleep(0.2)
                seen = [(frame, parse(frame, sent)) for frame, sent in behind.frames()]
        finally:
            forger.close()
        assert any(b"GET / " in frame for frame, _ in seen), "there was something to see"
        assert not [frame for frame, got in seen if b"forged" in frame and not (got and got.wrong)]
        assert one.ask() == one.server


@pytest.mark.parametrize("how", ["checksum", "fragments", "options"])
@both
@every
def test_first_data_that_is_none(place: Place, binding: str, vip: str, how: str) -> None:
    """Row 18, where a connection begins: nobody decides by it, no member gets any of it, the client's own data is
    answered as if nothing had been, and nothing is left."""
    client, port = place.client, BINDINGS[binding]
    with captures(client, *place.lab.servers) as (wire, *behind), tcp(client, vip, port, timeout=5) as it:
        forger = Forger(client, wire, port)
        try:
            # What it asks for is another pool's.
            whole = forger.tcp(method=b"PUT", spoil=0x55 * (how == "checksum"))
            if how == "fragments":
                forger.send(whole[:24], fragment=MORE)
                forger.send(whole[24:], fragment=3)
            else:
                forger.send(whole, options=how == "options")
            time.sleep(0.2)  # it may be on its way through the controller
            it.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answer = everything(it)
        finally:
            forger.close()
        assert answer.startswith(b"HTTP/1.1 200 ") and answer[-3:-1].decode() in ALL
        seen = [(frame, parse(frame, sent)) for one in behind for frame, sent in one.frames()]
    assert any(b"GET / " in frame for frame, _ in seen), "there was something to see"
    assert not [frame for frame, _ in seen if b"forged" in frame]
    assert not [got for _, got in seen if got and got.dport == PYTHON_PORT + port], "nobody read it"
    place.at_rest(binding, vip)


# ------------------------------------------------------------------ wires


BAD: dict[str, dict[str, float]] = {"1%": {"loss": 0.01}, "10%": {"loss": 0.1}, "twice": {"twice": 0.1},
                                    "order": {"order": 0.1}, "damage": {"damage": 0.02}}
RATHER = [(binding, how) for binding in BINDINGS for how in ("clean", *BAD) if binding != "splice" or "%" in how]
"""What else happens to bodies of spliced connections is test_l7's."""


@pytest.mark.parametrize(("vip", "sack"), [(VIP, "1"), (VIP6, "0")], ids=["ipv4-sack", "ipv6-nosack"])
@pytest.mark.parametrize(("binding", "how"), RATHER)
def test_bodies_arrive_whole_both_ways(place: Place, binding: str, how: str, vip: str, sack: str) -> None:
    client, lab = place.client, place.lab
    size = 100 << 20 if how == "clean" else 1 << 20
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
