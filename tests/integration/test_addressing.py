# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which packets are a virtual server's, and what of them is rewritten: wildcards, translation, next hop, ARP, ping."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import (
    ECHO_PORT,
    LAN,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    configure,
    flows,
    members,
    pool,
    refused,
    server,
    unreachable,
)
from topologies.hosts import LabHost
from topologies.namespace import end

if TYPE_CHECKING:
    from topologies.lab import Lab

VIRTUAL_MAC = "02:6c:62:00:00:01"


@contextlib.contextmanager
def shell(host: LabHost, *pairs: tuple[str, str]) -> Iterator[None]:
    """Commands for the time of the block, each with the one that takes it back."""
    with contextlib.ExitStack() as stack:
        for command, back in pairs:
            host.run("sh", "-c", command)
            stack.callback(host.run, "sh", "-c", back, check=False)
        yield


@contextlib.contextmanager
def having_the_address(host: LabHost, *addresses: str) -> Iterator[None]:
    """A member that accepts packets to the virtual address itself, and does not tell its network."""
    with shell(host, ("sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2",
                      "sysctl -qw net.ipv4.conf.all.arp_ignore=0 net.ipv4.conf.all.arp_announce=0"),
               *((f"ip addr add {a}/{128 if ':' in a else 32} dev lo {'nodad' if ':' in a else ''}",
                  f"ip addr del {a}/{128 if ':' in a else 32} dev lo") for a in addresses)):
        yield


@contextlib.contextmanager
def also_on(host: LabHost, *ports: int) -> Iterator[None]:
    """A second nginx on further ports for the time of the block."""
    process = host.nginx(ports=ports)
    try:
        yield
    finally:
        end(process)


def _one(lab: Lab, name: str, who: str, port: int = 80, six: bool = False) -> dict[str, Any]:
    return pool(name, "ROUND_ROBIN", members(lab, port, six, names=(who,)))


DECISIONS = pytest.mark.parametrize("how", [{"decision": "switch"}, {"decision": "controller"}],
                                    ids=["switch", "controller"])


@DECISIONS
@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
def test_the_most_specific_virtual_server_wins(lab: Lab, six: bool, how: dict[str, Any]) -> None:
    vip, any_address = (VIP6, "::") if six else (VIP, "0.0.0.0")
    configure(lab, [_one(lab, name, name, six=six) for name in ("s1", "s2", "s3")], [
        server("exact", 8000, "s1", vip, **how), server("any-port", 0, "s2", vip, **how),
        server("any-address", 8000, "s3", any_address, **how)], LAN)
    client = lab.client("c1")
    far = "2001:db8:99::" if six else "203.0.113."
    gateway = "fd00::254" if six else "10.0.0.254"
    route = f"{'-6' if six else ''} route %s {far}{'/64' if six else '0/24'} via {gateway}"
    with shell(client, ("ip " + route % "add", "ip " + route % "del")):
        asked = {(address, port): Held(client, address, port) for address, port in (
            (vip, 8000), (vip, 8001), (vip, 65535), (f"{far}7", 8000), (f"{far}8", 8000))}
        for one in asked.values():
            one.close()
        assert {where: one.server for where, one in asked.items()} == {
            (vip, 8000): "s1", (vip, 8001): "s2", (vip, 65535): "s2", (f"{far}7", 8000): "s3", (f"{far}8", 8000): "s3"}
        # A member's own address is left alone although the wildcard would match it (003, "other known local address").
        direct = Held(client, lab.server("s1").address6 if six else lab.server("s1").address, 80)
        direct.close()
        assert direct.server == "s1"


def test_any_address_and_any_port(lab: Lab) -> None:
    configure(lab, [_one(lab, "s2", "s2"), _one(lab, "s3", "s3", ECHO_PORT)],
              [server("everything", 0, "s2", "0.0.0.0"), server("datagrams", 0, "s3", "0.0.0.0", "UDP")], LAN)
    client = lab.client("c2")
    with shell(client, ("ip route add 203.0.113.0/24 via 10.0.0.254", "ip route del 203.0.113.0/24")):
        for port in (1, 80, 12345):
            assert client.curl(f"http://203.0.113.{port % 200}:{port}/") == "s2\n"
            assert client.udp(f"203.0.113.{port % 200}", port) == ["s3"]


@pytest.mark.parametrize("how", [{"decision": "switch"}, {"decision": "controller"}, {"state": "rules"}],
                         ids=["switch", "controller", "rules"])
@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
def test_the_port_is_left_alone(lab: Lab, six: bool, how: dict[str, Any]) -> None:
    vip = VIP6 if six else VIP
    configure(lab, [_one(lab, "s1", "s1", six=six)],
              [server("same", 8090, "s1", vip, translate_port=False, **how),
               server("all", 0, "s1", vip, translate_port=False, **how)])
    client = lab.client("c1")
    base = f"http://[{vip}]" if six else f"http://{vip}"
    with also_on(lab.server("s1"), 8090, 8091):
        for port in (8090, 8091, 80):
            assert json.loads(client.curl(f"{base}:{port}/about"))["server_port"] == port


@pytest.mark.parametrize("how", [{"decision": "switch"}, {"decision": "controller"}, {"state": "rules"}],
                         ids=["switch", "controller", "rules"])
@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
def test_the_address_is_left_alone(lab: Lab, six: bool, how: dict[str, Any]) -> None:
    vip = VIP6 if six else VIP
    configure(lab, [_one(lab, "s2", "s2", six=six), _one(lab, "echo", "s2", ECHO_PORT, six)],
              [server("plain", 80, "s2", vip, translate_address=False, translate_port=False, **how),
               server("port-only", 8080, "s2", vip, translate_address=False, **how),
               server("datagrams", 53, "echo", vip, "UDP", translate_address=False, **how)])
    client = lab.client("c1")
    base = f"http://[{vip}]" if six else f"http://{vip}"
    with having_the_address(lab.server("s2"), vip):
        for port in (80, 8080):
            about = json.loads(client.curl(f"{base}:{port}/about"))
            assert (about["server"], about["server_address"], about["server_port"]) == ("s2", vip, 80)
        assert client.udp(vip, 53, 3) == ["s2"] * 3


@DECISIONS
def test_a_next_hop_of_the_virtual_servers_own(lab: Lab, how: dict[str, Any]) -> None:
    """Members that live behind a neighbour which no configured network tells of (003, ROUTE_BY_DST_IP off)."""
    hop = lab.server("s3")
    behind = [{"name": "behind", "address": "10.99.0.1", "protocol_port": 80}]
    configure(lab, [pool("behind", "WEIGHTED_ROUND_ROBIN", behind)],
              [server("hop", 80, "behind", route_by_destination=False, next_hop=hop.address, **how)])
    with shell(hop, ("ip addr add 10.99.0.1/32 dev lo", "ip addr del 10.99.0.1/32 dev lo")):
        about = json.loads(lab.client("c1").curl(f"http://{VIP}/about"))
        assert (about["server"], about["server_address"]) == ("s3", "10.99.0.1")


def test_no_answer_to_arp_where_none_is_wanted(lab: Lab) -> None:
    configure(lab, [_one(lab, "s1", "s1"), _one(lab, "six", "s1", six=True)],
              [server("quiet", 80, "s1", arp=False), server("quiet6", 80, "six", VIP6, arp=False)])
    client = lab.client("c1")
    for vip, family in ((VIP, "-4"), (VIP6, "-6")):
        client.run("ip", family, "neigh", "flush", "dev", client.interface)
        assert client.run("ping", "-c1", "-W1", vip, check=False).returncode != 0
        assert "lladdr" not in client.run("ip", "neigh", "show", vip).stdout
        with shell(client, (f"ip neigh replace {vip} lladdr {VIRTUAL_MAC} dev {client.interface}",
                            f"ip neigh del {vip} dev {client.interface}")):
            assert client.curl(f"http://[{vip}]/" if ":" in vip else f"http://{vip}/") == "s1\n"
            assert client.run("ping", "-c1", "-W1", vip, check=False).returncode == 0, "it accepts"


def test_the_virtual_address_answers_arp_and_ping(lab: Lab) -> None:
    configure(lab, [_one(lab, "s1", "s1"), _one(lab, "six", "s1", six=True)],
              [server("web", 80, "s1"), server("web6", 80, "six", VIP6)], LAN)
    client = lab.client("c2")
    before = lab.rest.get("/v1/stats")["switches"][0]["packet_outs"]
    for address, family in ((VIP, "-4"), (VIP6, "-6"), ("10.0.0.254", "-4"), ("fd00::254", "-6")):
        client.run("ip", family, "neigh", "flush", "dev", client.interface)
        # 1400 bytes of a pattern: ping compares what comes back.
        client.run("ping", "-c3", "-i0.1", "-W1", "-s1400", "-pdeadbeef", address)
        assert VIRTUAL_MAC in client.run("ip", "neigh", "show", address).stdout
    after = lab.rest.get("/v1/stats")["switches"][0]["packet_outs"]
    assert after - before < 12, "the switch answers by itself (some probes of members aside)"
    unanswered = client.run("ping", "-c1", "-W1", "10.0.0.253", check=False)
    assert unanswered.returncode != 0, "nobody has this address"


def test_a_virtual_address_goes_and_comes(lab: Lab) -> None:
    client = lab.client("c3")
    web = [_one(lab, "s1", "s1")]
    configure(lab, web, [server("web", 80, "s1")])
    assert client.curl(f"http://{VIP}/") == "s1\n"
    configure(lab, web, [server("web", 80, "s1", "10.0.0.101")])
    assert client.curl("http://10.0.0.101/") == "s1\n"
    client.run("ip", "neigh", "flush", "dev", client.interface)
    assert client.run("ping", "-c1", "-W1", VIP, check=False).returncode != 0
    assert not [line for line in flows(lab) if f"{VIP} " in line or f"{VIP}," in line], "nothing of it is left"


def test_tcp_and_udp_of_one_address_and_port_are_two_virtual_servers(lab: Lab) -> None:
    configure(lab, [_one(lab, "tcp", "s1"), _one(lab, "udp", "s2", ECHO_PORT)],
              [server("tcp", 53, "tcp"), server("udp", 53, "udp", protocol="UDP")])
    client = lab.client("c1")
    assert client.curl(f"http://{VIP}:53/") == "s1\n"
    assert client.udp(VIP, 53) == ["s2"]
    lab.rest.delete("/v1/virtual-servers/udp")
    assert unreachable(client, VIP, 53) < REFUSED_WITHIN
    assert client.curl(f"http://{VIP}:53/") == "s1\n"
    assert refused(client, VIP, 54) < REFUSED_WITHIN
