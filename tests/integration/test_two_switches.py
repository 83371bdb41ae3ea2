# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients on one switch, servers on another, one controller for both; members and clients that move."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import (
    ECHO_PORT,
    LAN,
    VIP,
    VIP6,
    Held,
    configure,
    downloads,
    flows,
    held,
    members,
    packets,
    pool,
    server,
    settle,
)
from topologies.hosts import LabHost
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

ALL = {"s1", "s2", "s3"}
FOUND_WITHIN = 10.0
WAYS: list[dict[str, Any]] = [{"decision": "switch"}, {"decision": "controller"}, {"state": "rules"}]
IDS = ["switch", "controller", "rules"]
PORTS = {"switch": 80, "controller": 8080, "rules": 8081}


@pytest.fixture
def site(two_switches_lab: Lab) -> Lab:
    """TCP decided in each of the three ways, in both families, and UDP."""
    lab = two_switches_lab
    pools = [pool("web", "ROUND_ROBIN", members(lab)), pool("web6", "ROUND_ROBIN", members(lab, six=True)),
             pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT))]
    servers = [server("echo", 53, "echo", protocol="UDP")]
    for name, how in zip(IDS, WAYS, strict=True):
        servers += [server(name, PORTS[name], "web", **how), server(f"{name}6", PORTS[name], "web6", VIP6, **how)]
    configure(lab, pools, servers)
    _found_everywhere(lab)
    return lab


def _found_everywhere(lab: Lab) -> None:
    """ONLINE says that some switch found a member; here each has to."""
    wanted = {host.address for host in lab.servers} | {host.address6 for host in lab.servers}
    wait_until(lambda: all(wanted <= set(switch["hosts"]) for switch in lab.rest.get("/v1/switches")["switches"]), 10,
               "both switches know all members")
    lab.ovs.appctl("revalidator/wait")


@pytest.mark.parametrize("way", IDS)
@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_clients_here_servers_there(site: Lab, vip: str, way: str) -> None:
    url = f"http://[{vip}]:{PORTS[way]}/" if ":" in vip else f"http://{vip}:{PORTS[way]}/"
    for client in site.clients:
        assert set(client.who(url, 45)) == ALL
    if ":" not in vip:
        assert set(site.client("c1").udp(vip, 53, 30)) == ALL


@pytest.mark.parametrize("way", IDS)
def test_the_reverse_a_member_as_the_client(site: Lab, way: str) -> None:
    """From the other switch: the servers' own requests to the virtual address, and to a member on the clients' side."""
    lab = site
    guest = lab.client("c3").nginx()
    try:
        far = [{"name": "c3", "address": lab.client("c3").address, "protocol_port": 80}]
        how = WAYS[IDS.index(way)]
        configure(lab, [pool("far", "ROUND_ROBIN", far)], [server("far", 80, "far", **how)])
        wait_until(lambda: all(lab.client("c3").address in one["hosts"]
                               for one in lab.rest.get("/v1/switches")["switches"]), 10, "c3 is found by both")
        lab.ovs.appctl("revalidator/wait")
        for client in (*lab.servers, lab.client("c1")):
            assert client.who(f"http://{VIP}/", 10) == {"c3": 10}, client.name
    finally:
        lab.client("c3").kill(guest)


def test_each_connection_is_one_switchs(site: Lab) -> None:
    """The first switch translates; the second one only switches, and keeps nothing of the connection."""
    lab = site
    before, nothing_new = lab.rest.get("/v1/stats"), _dropped(lab)
    with held(lab.client("c1"), VIP, PORTS["controller"], 10):
        listed = [one for one in lab.rest.get("/v1/connections?limit=1000")["connections"]
                  if one["virtual_server"] == "controller" and one["state"] in ("ESTABLISHED", "FAST")]
        assert len(listed) == 10
        assert len({one["switch"] for one in listed}) == 1
    after = lab.rest.get("/v1/stats")
    opened = [{one["name"]: one["opened"] for one in which["virtual_servers"]}["controller"]
              for which in (before, after)]
    assert opened[1] - opened[0] == 10
    assert _dropped(lab) == nothing_new, "no packet for a virtual address went astray"


def _dropped(lab: Lab) -> list[int]:
    """Packets to the balancer's MAC that no rule wanted, by bridge."""
    return [packets(flow) for bridge in lab.bridges for flow in flows(lab, "table=60", bridge=bridge)
            if "actions=drop" in flow]


@contextlib.contextmanager
def moved(lab: Lab, host: LabHost, to: str) -> Iterator[None]:
    """A host's cable is drawn out of its switch and put into another port of ``to``; back again afterwards."""
    node = lab.net.get(host.name)
    link = node.defaultIntf().link
    port = link.intf2 if link.intf1.node is node else link.intf1
    home = port.node.name
    number = port.node.ports[port]
    with lab.root.entered():
        lab.ovs.delete_port(home, str(port))
        lab.ovs.add_port(to, str(port), 30)
    try:
        yield
    finally:
        with lab.root.entered():
            lab.ovs.delete_port(to, str(port))
            lab.ovs.add_port(home, str(port), number)


@pytest.mark.parametrize("where", ["lb2", "lb1"], ids=["another port", "another switch"])
def test_a_member_that_moves_is_found_again(site: Lab, where: str) -> None:
    lab, member = site, site.server("s1")
    client = lab.client("c1")
    took = {}
    with moved(lab, member, where):
        begun = time.monotonic()
        for way, port in PORTS.items():
            served = partial(_served, client, port)
            wait_until(lambda: served() == ALL, FOUND_WITHIN, f"s1 serves again, {way}")  # noqa: B023
            took[way] = time.monotonic() - begun
        wait_until(lambda: "s1" in client.udp(VIP, 53, 6), FOUND_WITHIN, "and by UDP")
        wait_until(lambda: _port_of(lab, where, member) == 30, FOUND_WITHIN, "its own switch knows its port")
    assert max(took.values()) <= FOUND_WITHIN, took
    begun = time.monotonic()
    wait_until(lambda: all(_served(client, port) == ALL for port in PORTS.values()), FOUND_WITHIN, "and back home")
    settle(lab)


def _port_of(lab: Lab, bridge: str, host: LabHost) -> int | None:
    """Where a switch believes a host to be."""
    view = next(one for one in lab.rest.get("/v1/switches")["switches"] if int(one["dpid"], 16) == int(bridge[2:]))
    return view["hosts"].get(host.address, {}).get("port")


def _served(client: LabHost, port: int) -> set[str]:
    """Who answers new connections, none of which may take longer than a second."""
    answered = set()
    for _ in range(6):
        done = client.run("curl", "-s", "--max-time", "0.5", f"http://{VIP}:{port}/", check=False)
        if done.returncode:
            return set()
        answered.add(done.stdout.strip())
    return answered


def test_the_others_do_not_notice_a_move(site: Lab) -> None:
    lab = site
    digest = lab.make_file("twenty", 20_000_000)
    client = lab.client("c2")
    with contextlib.ExitStack() as stack:
        going: list[Held] = []
        while len(going) < 6:
            one = Held(client, VIP, PORTS["controller"])
            stack.callback(one.close)
            if one.server != "s1":
                going.append(one)
        configure_only = {"admin_state_up": False}
        path = next(f"/v1/pools/web/members/{one['id']}" for one in lab.rest.get("/v1/pools/web/members")["members"]
                    if one["name"] == "s1")
        lab.rest.patch(path, configure_only)
        settle(lab)
        (download,) = stack.enter_context(downloads(client, [f"http://{VIP}/twenty"], lab.directory, "8M"))
        download.progressed(2_000_000)
        with moved(lab, lab.server("s1"), "lb1"):
            for _ in range(5):
                assert [one.ask() for one in going] == [one.server for one in going]
                time.sleep(0.1)
        assert download.digest() == digest
        assert hashlib.sha256((lab.directory / "files" / "twenty").read_bytes()).hexdigest() == digest


def test_one_switch_goes_the_other_stays(site: Lab, told: Callable[[str], None]) -> None:
    """A switch without its controller goes on; the other one is not concerned (row 10, as far as one controller goes:
    of the nodes of its data flow segment one is gone, and nothing of the other one's share moves)."""
    lab = site
    others = members(lab, names=("s2", "s3"))  # s1 is a client here: a member cannot be its own
    configure(lab, [pool("web", "ROUND_ROBIN", others)],
              [server(name, PORTS[name], "web", **how) for name, how in zip(IDS, WAYS, strict=True)])
    wait_until(lambda: all(_port_of(lab, bridge, lab.server(name)) for bridge in lab.bridges
                           for name in ("s2", "s3")), 10, "both switches know both")
    with contextlib.ExitStack() as open_ones:
        here = [one for port in PORTS.values() for one in open_ones.enter_context(held(lab.client("c2"), VIP, port, 3))]
        there = open_ones.enter_context(held(lab.server("s1"), VIP, PORTS["switch"], 3))
        lab.ovs.set_controller("lb2", "tcp:127.0.0.1:1")
        _without_the_other(lab, told)
        for one in (*here, *there):
            assert one.ask() == one.server, "no connection has moved"


def _without_the_other(lab: Lab, told: Callable[[str], None]) -> None:
    try:
        begun = time.monotonic()
        wait_until(lambda: len(lab.rest.get("/v1/switches")["switches"]) == 1, 10, "lb2 is not connected")
        gone = time.monotonic() - begun
        for way, port in PORTS.items():
            assert set(lab.client("c1").who(f"http://{VIP}:{port}/", 30)) == {"s2", "s3"}, way
        assert set(lab.server("s1").who(f"http://{VIP}/", 30)) == {"s2", "s3"}, "lb2 decides by itself what it can"
    finally:
        lab.ovs.set_controller("lb2", "tcp:127.0.0.1:6653")
    begun = time.monotonic()
    wait_until(lambda: _served(lab.server("s1"), 8080) == {"s2", "s3"}, 10, "lb2 asks its controller again")
    took = time.monotonic() - begun
    told(f"missed after {gone:.2f} s; asks its controller again after {took:.2f} s")
    assert took <= 5


def test_a_client_may_move_between_connections(site: Lab) -> None:
    lab, client = site, site.client("c1")
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))], [server("web", 80, "web")], LAN)
    _found = lab.rest.get("/v1/switches")["switches"]
    assert len(_found) == 2
    with moved(lab, client, "lb2"):
        wait_until(lambda: _served(client, 80) == ALL, FOUND_WITHIN, "c1 is served by the other switch")
    wait_until(lambda: _served(client, 80) == ALL, FOUND_WITHIN, "and by the first again")
