# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path with everything around it: real clients and servers, Open vSwitch behind, a controller."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.agents import BATCH, CLOSED_SECONDS
from lbapp.bus import keyfile
from tests.integration.beside import check, downloading
from tests.integration.support import (
    ECHO_PORT,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    at_rest,
    configure,
    members,
    pool,
    refused,
    server,
    settle,
    statistics,
)
from topologies.hosts import OWN_PORTS
from topologies.lab import Lab, unavailable
from topologies.namespace import Namespace, end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WAYS = {"fast": 80, "round": 8080, "least": 8081}
"""Decided in the fast path, asked for by the agent, asked for and followed by the control segment."""


@pytest.fixture(scope="module", params=["agent", "openflow"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A laboratory whose queries take one way or the other."""
    with Lab(SingleTopo(), options=["--fastpath", "--queries", request.param]) as made:
        made.start_servers()
        made.start_controller()
        wait_until(lambda: fastpath(made) is not None, 10, "a fast path")
        yield made


@pytest.fixture
def site(lab: Lab) -> Lab:
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        name = "six" if six else "four"
        web, echo = members(lab, six=six), members(lab, ECHO_PORT, six)
        pools += [pool(f"weights-{name}", "WEIGHTED_ROUND_ROBIN", web), pool(f"turns-{name}", "ROUND_ROBIN", web),
                  pool(f"least-{name}", "LEAST_CONNECTIONS", web), pool(f"echo-{name}", "WEIGHTED_ROUND_ROBIN", echo),
                  pool(f"asked-{name}", "ROUND_ROBIN", echo)]
        servers += [server(f"fast-{name}", WAYS["fast"], f"weights-{name}", vip),
                    server(f"round-{name}", WAYS["round"], f"turns-{name}", vip),
                    server(f"least-{name}", WAYS["least"], f"least-{name}", vip),
                    server(f"udp-{name}", 53, f"echo-{name}", vip, "UDP"),
                    server(f"asked-{name}", 54, f"asked-{name}", vip, "UDP")]
    configure(lab, pools, servers)
    return lab


def fastpath(lab: Lab) -> dict[str, Any] | None:
    """The fast path's statistics."""
    (switch,) = lab.rest.get("/v1/stats")["switches"] or [{}]
    found: dict[str, Any] | None = switch.get("fastpath")
    return found


def hits(lab: Lab) -> int:
    found = fastpath(lab)
    assert found is not None
    return int(found["hits"])


def url(vip: str, port: int, path: str = "") -> str:
    return f"http://[{vip}]:{port}/{path}" if ":" in vip else f"http://{vip}:{port}/{path}"


def conntrack(lab: Lab) -> int:
    """Connections of ours that Open vSwitch holds."""
    return len(re.findall(r"^tcp.*mark=", lab.ovs.appctl("dpctl/dump-conntrack"), re.M))


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("way", WAYS)
def test_connections_go_by_the_fast_path_from_their_second_packet_on(site: Lab, vip: str, way: str) -> None:
    client, name = site.client("c1"), f"{way}-{'six' if ':' in vip else 'four'}"
    opened, before, held_by_ovs = at_rest(site, name)["opened"], hits(site), conntrack(site)
    served = client.who(url(vip, WAYS[way]), 30)
    assert served == Counter({host.name: 10 for host in site.servers})
    # SYN (but for one that climbed), ACK, request, FIN, last ACK; and as many back.
    assert hits(site) - before >= 30 * 8
    assert conntrack(site) == held_by_ovs, "Open vSwitch knows nothing of them"
    wait_until(lambda: statistics(site, name)["closed"] - opened >= 30, 10, "the ends of all connections")
    told = statistics(site, name)
    assert (told["opened"] - opened, told["active"]) == (30, 0)
    assert told["packets"] >= 30 * 8


@pytest.mark.parametrize(("vip", "port"), [(VIP, 53), (VIP6, 53), (VIP, 54), (VIP6, 54)])
def test_datagrams(site: Lab, vip: str, port: int) -> None:
    before = hits(site)
    assert Counter(site.client("c1").udp(vip, port, 9)) == {"s1": 3, "s2": 3, "s3": 3}
    assert hits(site) - before >= 9
    with exchange(site, vip, port) as endpoint:
        answers = []
        for number in range(10):
            endpoint.send(f"datagram {number}".encode())
            answers.append(endpoint.recv(65535))
    assert len({answer.partition(b" ")[0] for answer in answers}) == 1, "one client port is one flow"


def exchange(site: Lab, vip: str, port: int) -> socket.socket:
    """A UDP socket of a client."""
    with site.client("c1").entered():
        endpoint = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, socket.SOCK_DGRAM)
    endpoint.settimeout(3)
    endpoint.connect((vip, port))
    return endpoint


def test_weights(site: Lab) -> None:
    site.rest.patch("/v1/pools/weights-four", {"members": members(site, weights=(4, 2, 1))})
    settle(site)
    assert site.client("c1").who(url(VIP, 80), 70) == {"s1": 40, "s2": 20, "s3": 10}


@pytest.mark.parametrize("way", WAYS)
def test_an_established_connection_stays_where_it_is_when_the_table_changes(site: Lab, way: str) -> None:
    name = {"fast": "weights-four", "round": "turns-four", "least": "least-four"}[way]
    old = [Held(site.client("c1"), VIP, WAYS[way]) for _ in range(6)]
    try:
        site.rest.patch(f"/v1/pools/{name}", {"members": members(site, weights=(0, 1, 0))})
        settle(site)
        assert set(site.client("c1").who(url(VIP, WAYS[way]), 10)) == {"s2"}
        for one in old:
            assert one.ask() == one.server
    finally:
        for one in old:
            one.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_removed_member_cuts_its_connections_and_their_port_is_free(site: Lab, way: str) -> None:
    name = {"fast": "weights-four", "round": "turns-four", "least": "least-four"}[way]
    client = site.client("c1")
    old = Held(client, VIP, WAYS[way], source_port=next(OWN_PORTS))
    left = [one for one in members(site) if one["name"] != old.server]
    site.rest.patch(f"/v1/pools/{name}", {"members": left})
    settle(site)
    with pytest.raises(OSError):
        for _ in range(3):
            old.ask()
    old.reset()
    new = Held(client, VIP, WAYS[way], source_port=old.port)
    assert new.server != old.server
    new.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_client_uses_its_port_again_and_again(site: Lab, way: str) -> None:
    ports, port = set(), next(OWN_PORTS)
    for _ in range(5):
        one = Held(site.client("c1"), VIP, WAYS[way], source_port=port)
        assert one.ask() == one.server
        ports.add(one.port)
        one.reset()
    assert ports == {port}


def test_maintenance_and_limits_refuse_at_once(site: Lab) -> None:
    client = site.client("c1")
    for name in ("fast-four", "round-four"):
        site.rest.patch(f"/v1/virtual-servers/{name}", {"maintenance": True})
    site.rest.patch("/v1/virtual-servers/least-four", {"connection_limit": 2})
    settle(site, ["fast-four", "round-four"])
    at_rest(site, "least-four")
    assert refused(client, VIP, 80) < REFUSED_WITHIN
    assert refused(client, VIP, 8080) < REFUSED_WITHIN
    with_limit = [Held(client, VIP, 8081) for _ in range(2)]
    try:
        assert refused(client, VIP, 8081) < REFUSED_WITHIN
        assert statistics(site, "least-four")["refused"]["CONNLIMIT"] >= 1
    finally:
        for one in with_limit:
            one.close()
    wait_until(lambda: statistics(site, "least-four")["active"] == 0, 10, "the ends of both connections")
    Held(client, VIP, 8081).close()


def test_least_connections_sees_what_is_open(site: Lab) -> None:
    client = site.client("c1")
    at_rest(site, "least-four")
    held = [Held(client, VIP, 8081) for _ in range(6)]
    try:
        assert Counter(one.server for one in held) == {"s1": 2, "s2": 2, "s3": 2}
        alone = [one for one in held if one.server == "s2"]
        for one in alone:
            one.close()
        wait_until(lambda: statistics(site, "least-four")["active"] == 4, 10, "the ends of two connections")
        assert {Held(client, VIP, 8081).server for _ in range(2)} == {"s2"}
    finally:
        for one in held:
            one.close()


def test_closed_connections_are_told_of_many_at_a_time(site: Lab) -> None:
    before, began = fastpath(site), time.monotonic()
    assert before is not None
    site.client("c1").run("curl", "-sSf", "-o", "/dev/null", "--max-time", "60", "--parallel", "--parallel-max", "50",
                          "-H", "Connection: close", f"{url(VIP, 80)}?[1-2000]", timeout=60)

    def told() -> int:
        now = fastpath(site)
        assert now is not None
        return int(now["deletes"]) - int(before["deletes"])

    wait_until(lambda: told() >= 2000, 10, "2000 connections told of")
    seconds, after = time.monotonic() - began, fastpath(site)
    assert after is not None
    assert after["delete_messages"] - before["delete_messages"] <= 2000 / BATCH + seconds / CLOSED_SECONDS


def test_the_view_of_connections(site: Lab) -> None:
    client = site.client("c1")
    held = {way: Held(client, VIP, port) for way, port in WAYS.items()}
    try:
        listed = site.rest.get("/v1/connections?limit=1000")["connections"]
        for way, one in held.items():
            (view,) = [view for view in listed if view["protocol"] == "TCP" and view["client"].endswith(f":{one.port}")]
            assert view["virtual_server"] == f"{way}-four"
            assert view["destination"] == f"{VIP}:{WAYS[way]}"
            assert view["decided_by"] == ("switch" if way == "fast" else "controller")
            assert view["packets"] >= 4 and view["bytes"] > 200
    finally:
        for one in held.values():
            one.close()


@pytest.fixture
def download(site: Lab) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    yield from downloading(site)


def test_a_controller_that_is_killed_leaves_connections_alone(
        site: Lab, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c2"), VIP, port) for way, port in WAYS.items()}
    site.controller.kill()
    for _ in range(3):
        assert set(site.client("c1").who(url(VIP, 80), 9)) == {"s1", "s2", "s3"}, "the fast path decides alone"
        for one in held.values():
            assert one.ask() == one.server
    begun = time.monotonic()
    site.start_controller()
    for port in WAYS.values():
        def served(port: int = port) -> bool:
            try:
                Held(site.client("c2"), VIP, port).close()
            except OSError:
                return False
            return True
        wait_until(served, 5, f"new connections on port {port}")
    assert time.monotonic() - begun < 10
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)


def test_ovs_that_is_killed_leaves_connections_alone(
        site: Lab, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c2"), VIP, port) for way, port in WAYS.items()}
    site.ovs.kill_switch()
    for one in held.values():
        assert one.ask() == one.server
    assert set(site.client("c1").who(url(VIP, 80), 9)) == {"s1", "s2", "s3"}
    site.ovs.ensure_running()
    site.wait_connected()

    def served() -> bool:
        try:
            Held(site.client("c2"), VIP, WAYS["round"]).close()
        except OSError:
            return False
        return True
    wait_until(served, 10, "new connections that the controller decides")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)


@pytest.mark.parametrize("lab", ["agent"], indirect=True)
def test_a_flood_of_forged_syns_harms_nobody_and_goes_away(site: Lab) -> None:
    """Row 12, as far as a balancer goes that does not shake hands itself: members see the SYNs, all else is well."""
    before, held = site.controller.rss(), Held(site.client("c2"), VIP, 80)
    flood = site.client("c3").popen("hping3", "-q", "-n", "--rand-source", "-S", "-p", "80", "-i", "u100", VIP,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        begun = time.monotonic()
        served: Counter[str] = Counter()
        while time.monotonic() - begun < 5:
            served += site.client("c1").who(url(VIP, 80), 25)
            served += site.client("c1").who(url(VIP, 8080), 25)
            assert held.ask() == held.server
        assert sum(served.values()) >= 50 * 5 and set(served) == {"s1", "s2", "s3"}
        wait_until(lambda: (fastpath(site) or {})["connections"] > 1000, 20, "the flood is really there")
    finally:
        end(flood)
    assert site.controller.rss() - before < 50_000_000
    wait_until(lambda: (fastpath(site) or {})["connections"] < 50, 30, "half-open connections have gone")
    held.close()


@pytest.mark.parametrize("lab", ["agent"], indirect=True)
def test_another_controller_target_flushes_nothing(site: Lab) -> None:
    """Row 9."""
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    site.ovs.vsctl("set-controller", "lb1", "tcp:localhost:6653")
    for _ in range(3):
        for one in held.values():
            assert one.ask() == one.server
        assert set(site.client("c2").who(url(VIP, 80), 9)) == {"s1", "s2", "s3"}
    site.wait_connected()
    wait_until(lambda: site.client("c2").run("curl", "-sf", "--max-time", "1", url(VIP, 8080),
                                             check=False).returncode == 0, 10, "new connections")
    for one in held.values():
        assert one.ask() == one.server
        one.close()


def test_large_datagrams_in_fragments(site: Lab) -> None:
    payload = bytes(itertools.islice(itertools.cycle(range(256)), 5000))
    for vip, port in ((VIP, 53), (VIP6, 53)):
        with exchange(site, vip, port) as endpoint:
            endpoint.send(b"first")  # the flow is there; what follows is in fragments both ways
            assert endpoint.recv(65535).endswith(b"first")
            for _ in range(3):
                endpoint.send(payload)
                assert endpoint.recv(65535).endswith(payload)


def test_the_switch_of_mininet_brings_its_agent(tmp_path: Path) -> None:
    key = tmp_path / "bus.key"
    keyfile.ensure(key)
    options = ["--agent", "127.0.0.1:6654", "--bus-key", str(key)]
    with Lab(SingleTopo(clients=1, bus_key=str(key)), tmp_path / "lab", options=options) as lab:
        lab.start_servers()
        lab.start_controller()
        wait_until(lambda: fastpath(lab) is not None, 10, "a fast path")
        pools = [pool("weights", "WEIGHTED_ROUND_ROBIN", members(lab)), pool("turns", "ROUND_ROBIN", members(lab))]
        configure(lab, pools, [server("fast-four", 80, "weights"), server("round-four", 8080, "turns")])
        for port in (80, 8080):
            wait_until(lambda: lab.client("c1").who(url(VIP, port), 9) == {"s1": 3, "s2": 3, "s3": 3}, 10,  # noqa: B023
                       "the agent has all members")
        assert re.search(r"Port lb\d+-eth1\s+Interface lbo", lab.ovs.vsctl("show")), "in front of the switch's ports"
        lab.net.get("lb1").stop(deleteIntfs=False)
        links = lab.root.run("ip", "-o", "link").stdout
        assert not re.search(r"\blb[ioq][0-9a-f]+", links), links


def test_without_ebpf_open_vswitch_does_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = Namespace.popen
    monkeypatch.setattr(Namespace, "popen", lambda self, *argv, **more: popen(
        self, "setpriv", "--bounding-set=-sys_admin,-bpf", "--inh-caps=-sys_admin,-bpf", *argv, **more)
        if "run" in argv else popen(self, *argv, **more))
    with Lab(SingleTopo(clients=1), tmp_path / "lab", options=["--fastpath"]) as lab:
        lab.start_servers()
        lab.start_controller()
        configure(lab, [pool("turns", "ROUND_ROBIN", members(lab))], [server("round-four", 80, "turns")])
        assert lab.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
        assert fastpath(lab) is None
        assert re.search(r"WARNING .*no fast path, Open vSwitch does it all: .*(permitted|permission)",
                         lab.controller.log_tail(), re.I)
