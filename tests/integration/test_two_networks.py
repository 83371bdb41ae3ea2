# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients outside, servers inside, the balancer as the gateway of both (003, FIGURE 2); and ``snat``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.integration.support import (
    ECHO_PORT,
    LAN,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    configure,
    family_of,
    flows,
    held,
    members,
    pool,
    refused,
    server,
    unreachable,
)
from topologies.hosts import LabHost
from topologies.namespace import Namespace, wait_until
from topologies.two_networks import TwoNetworksTopo

if TYPE_CHECKING:
    from topologies.lab import Lab

OUT, OUT6 = TwoNetworksTopo.VIP, TwoNetworksTopo.VIP6
NETWORKS = yaml.safe_load(TwoNetworksTopo.SITE.read_text())["networks"]
TTL_PORT = 5400
START_TTL = 40
IP_RECVTTL = 12  # not in the socket module
FAMILIES = pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
WAYS: list[dict[str, Any]] = [{"decision": "switch"}, {"decision": "controller"}, {"state": "rules"}]
EACH_WAY = pytest.mark.parametrize("how", WAYS, ids=["switch", "controller", "rules"])


def _url(vip: str, port: int = 80, path: str = "/") -> str:
    return f"http://[{vip}]:{port}{path}" if ":" in vip else f"http://{vip}:{port}{path}"


def _address(host: LabHost, six: bool) -> str:
    return host.address6 if six else host.address


def _datagram_socket(host: Namespace, six: bool, port: int = 0) -> socket.socket:
    with host.entered():
        endpoint = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
    level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
    endpoint.setsockopt(level, socket.IPV6_RECVHOPLIMIT if six else IP_RECVTTL, 1)
    endpoint.setsockopt(level, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, START_TTL)
    endpoint.settimeout(3)
    endpoint.bind(("::" if six else "0.0.0.0", port))
    return endpoint


def _receive(endpoint: socket.socket) -> tuple[bytes, int, tuple[Any, ...]]:
    """Payload, TTL, sender."""
    payload, ancillary, _flags, sender = endpoint.recvmsg(2000, 100)
    return payload, int.from_bytes(ancillary[0][2][:4], "little"), sender


def _there_and_back(client: LabHost, member: LabHost, to: tuple[str, int], six: bool) -> tuple[int, int, str, str]:
    """Hops lost on the way there and back, the sender as the member and as the client saw it."""
    with _datagram_socket(member, six, TTL_PORT) as inside, _datagram_socket(client, six) as outside:
        outside.sendto(b"ping", to)
        payload, there, seen = _receive(inside)
        assert payload == b"ping"
        inside.sendto(b"pong", seen)
        payload, back, answered = _receive(outside)
        assert payload == b"pong"
    return START_TTL - there, START_TTL - back, str(seen[0]), str(answered[0])


@FAMILIES
@EACH_WAY
def test_clients_outside_reach_servers_inside(two_networks_lab: Lab, six: bool, how: dict[str, Any]) -> None:
    lab, vip = two_networks_lab, OUT6 if six else OUT
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six)),
                    pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT, six))],
              [server("web", 80, "web", vip, **how), server("echo", 53, "echo", vip, "UDP", **how)], NETWORKS)
    client = lab.client("c1")
    assert set(client.who(_url(vip), 45)) == {"s1", "s2", "s3"}
    assert set(client.udp(vip, 53, 40)) == {"s1", "s2", "s3"}
    about = json.loads(client.curl(_url(vip, path="/about")))
    assert about["client_address"] == _address(client, six), "the member sees the client"
    digest, target = lab.make_file("ten", 10_000_000), lab.directory / "ten-got"
    client.curl(_url(vip, path="/ten"), "-o", str(target))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert refused(client, vip, 4444) < REFUSED_WITHIN
    assert unreachable(client, vip, 4444) < REFUSED_WITHIN


@FAMILIES
@EACH_WAY
def test_it_counts_as_one_hop_each_way(two_networks_lab: Lab, six: bool, how: dict[str, Any]) -> None:
    lab, vip = two_networks_lab, OUT6 if six else OUT
    configure(lab, [pool("one", "ROUND_ROBIN", members(lab, TTL_PORT, six, names=("s1",)))],
              [server("one", 53, "one", vip, "UDP", **how)], NETWORKS)
    client, member = lab.client("c1"), lab.server("s1")
    for _ in range(2):  # the first packet's way is another than the following ones'
        assert _there_and_back(client, member, (vip, 53), six) == (1, 1, _address(client, six), vip)


@FAMILIES
def test_what_is_not_balanced_is_routed(two_networks_lab: Lab, six: bool) -> None:
    lab = two_networks_lab
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six))],
              [server("web", 80, "web", OUT6 if six else OUT)], NETWORKS)
    client, member = lab.client("c2"), lab.server("s2")
    member.run("ping", "-c2", "-i0.2", "-W2", _address(client, six))
    client.run("ping", "-c2", "-i0.2", "-W2", _address(member, six))
    about = json.loads(client.curl(_url(_address(member, six), path="/about")))
    assert (about["server"], about["client_address"]) == ("s2", _address(client, six)), "a member's own address"
    outside = client.nginx(ports=(8888,))
    try:
        assert member.curl(_url(_address(client, six), 8888)) == "c2\n"
    finally:
        client.kill(outside)
    hops = _there_and_back(client, member, (_address(member, six), TTL_PORT), six)
    assert hops == (1, 1, _address(client, six), _address(member, six))
    for own in ("fd00:1::1", "2001:db8:1::1") if six else ("10.0.1.1", "192.0.2.1"):
        for host in (client, member):
            host.run("ping", "-c1", "-W2", own)


def test_nobody_there_is_asked_for_and_nothing_grows(two_networks_lab: Lab) -> None:
    lab = two_networks_lab
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))], [server("web", 80, "web", OUT)], NETWORKS)
    before = len(flows(lab))
    client = lab.client("c1")
    for last in range(100, 130):
        client.run("ping", "-c1", "-W0.01", f"10.0.1.{last}", check=False)
    assert lab.client("c2").curl(_url(OUT)).startswith("s"), "others are served meanwhile"
    assert len(flows(lab)) <= before + 2, "addresses that nobody has leave no rules"


@FAMILIES
def test_the_networks_are_apart(two_networks_lab: Lab, six: bool) -> None:
    """A client that gives itself an address of the inner network finds nobody there."""
    lab = two_networks_lab
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six))],
              [server("web", 80, "web", OUT6 if six else OUT)], NETWORKS)
    client, member = lab.client("c3"), lab.server("s3")
    intruder = "fd00:1::200/64" if six else "10.0.1.200/24"
    client.run("ip", "addr", "add", intruder, "dev", client.interface, *(("nodad",) if six else ()))
    try:
        assert client.run("ping", "-c2", "-i0.2", "-W1", _address(member, six), check=False).returncode != 0
        shown = client.run("ip", "neigh", "show", _address(member, six)).stdout
        assert "lladdr" not in shown, "its neighbour solicitation did not cross"
    finally:
        client.run("ip", "addr", "del", intruder, "dev", client.interface)
        client.run("ip", "-6" if six else "-4", "neigh", "flush", "dev", client.interface)


@contextlib.contextmanager
def without_a_way_back(lab: Lab) -> Iterator[None]:
    """Servers that know no gateway."""
    for host in lab.servers:
        host.run("sh", "-c", "ip route del default; ip -6 route del default")
    try:
        yield
    finally:
        for host in lab.servers:
            host.run("sh", "-c", f"ip route add default via 10.0.1.1; "
                                 f"ip -6 route add default via fd00:1::1 dev {host.interface}")


@FAMILIES
@pytest.mark.parametrize("how", WAYS[:2], ids=["switch", "controller"])
def test_snat_for_members_without_a_way_back(two_networks_lab: Lab, six: bool, how: dict[str, Any]) -> None:
    lab, vip = two_networks_lab, OUT6 if six else OUT
    own = "fd00:1::1" if six else "10.0.1.1"
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six)),
                    pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT, six))],
              [server("snat", 80, "web", vip, snat=True, **how), server("plain", 81, "web", vip, **how),
               server("udp", 53, "echo", vip, "UDP", snat=True, **how)], NETWORKS)
    with without_a_way_back(lab):
        plain = lab.client("c1").run("curl", "-gs", "--max-time", "1", _url(vip, 81), check=False)
        assert plain.returncode == 28, "without snat the answer finds no way"
        seen = set()
        for client in lab.clients:
            about = json.loads(client.curl(_url(vip, path="/about")))
            assert about["client_address"] == own, "the member sees the balancer"
            seen |= set(client.who(_url(vip), 20))
            assert None not in client.udp(vip, 53, 5)
        assert seen == {"s1", "s2", "s3"}
        with held(lab.client("c1"), vip, 80, 20) as first, held(lab.client("c2"), vip, 80, 20) as second:
            for one in (*first, *second):
                assert one.ask() == one.server, "40 connections behind one address stay apart"
        digest, target = lab.make_file("ten", 10_000_000), lab.directory / "ten-got"
        lab.client("c1").curl(_url(vip, path="/ten"), "-o", str(target))
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


@FAMILIES
def test_snat_within_one_network(lab: Lab, six: bool) -> None:
    vip, own = (VIP6, "fd00::254") if six else (VIP, "10.0.0.254")
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab, six=six))],
              [server("snat", 80, "web", vip, snat=True)], LAN)
    for client in lab.clients:
        assert json.loads(client.curl(_url(vip, path="/about")))["client_address"] == own
    # A member that is its own client: without snat the answer would never pass the switch.
    member = lab.server("s1")
    assert set(member.who(_url(vip), 45)) == {"s1", "s2", "s3"}


def test_icmp_errors_find_their_connection(two_networks_lab: Lab) -> None:
    """A member's "port unreachable" reaches the client, as the virtual server's."""
    lab = two_networks_lab
    closed = members(lab, 5999, names=("s1",))
    configure(lab, [pool("closed", "ROUND_ROBIN", closed)],
              [server("udp", 53, "closed", OUT, "UDP"), server("tcp", 80, "closed", OUT)], NETWORKS)
    client = lab.client("c1")
    assert unreachable(client, OUT, 53) < REFUSED_WITHIN
    assert refused(client, OUT, 80) < REFUSED_WITHIN


@FAMILIES
def test_a_client_that_appears_later_is_found(two_networks_lab: Lab, six: bool) -> None:
    """The controller looks hosts up that it routes to; the packets that asked are kept until it knows."""
    lab = two_networks_lab
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six))],
              [server("web", 80, "web", OUT6 if six else OUT)], NETWORKS)
    client, member = lab.client("c1"), lab.server("s1")
    late = "2001:db8:1::77" if six else "192.0.2.77"
    client.run("ip", "addr", "add", f"{late}/{64 if six else 24}", "dev", client.interface,
               *(("nodad",) if six else ()))
    try:
        lost = member.run("ping", "-c1", "-W2", late, check=False)
        assert lost.returncode == 0, "not even the first packet is lost"
        with socket_from(client, late) as endpoint:
            endpoint.connect((OUT6 if six else OUT, 80))
        wait_until(lambda: any(late in line for line in flows(lab, "table=50")), 2, "a rule leads to it")
    finally:
        client.run("ip", "addr", "del", f"{late}/{64 if six else 24}", "dev", client.interface)


def socket_from(host: Namespace, address: str) -> socket.socket:
    """A TCP socket bound to an address of a host."""
    with host.entered():
        endpoint = socket.socket(family_of(address), socket.SOCK_STREAM)
    endpoint.settimeout(3)
    endpoint.bind((address, 0))
    return endpoint


def test_long_lived_connections_through_the_gateway(two_networks_lab: Lab) -> None:
    lab = two_networks_lab
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))], [server("web", 80, "web", OUT)], NETWORKS)
    one = Held(lab.client("c1"), OUT, 80)
    try:
        for _ in range(5):
            assert one.ask() == one.server
    finally:
        one.close()
