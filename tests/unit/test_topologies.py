# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The topologies: their shape, their sites, and that they carry packets without any controller."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from lbapp.config.model import Member, Network, Pool, VirtualServer

pytest.importorskip("mininet.topo", reason="Mininet's Python package is not installed")

from topologies.nodes import LoadBalancerSwitch, LoadBalancerTopo
from topologies.single import SingleTopo
from topologies.two_networks import EXTERNAL_TAG, INTERNAL_TAG, TwoNetworksTopo
from topologies.two_switches import TwoSwitchesTopo

ROOT = Path(__file__).resolve().parents[2]
ALL = [SingleTopo, TwoNetworksTopo, TwoSwitchesTopo]


def hosts(topo: LoadBalancerTopo) -> dict[str, ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    return {name: ipaddress.ip_interface(topo.nodeInfo(name)["ip"]) for name in topo.hosts()}


@pytest.mark.parametrize("kind", ALL)
def test_addresses_are_unique_and_in_both_families(kind: type[LoadBalancerTopo]) -> None:
    topo = kind(clients=5, servers=4)
    assert sorted(topo.hosts()) == ["c1", "c2", "c3", "c4", "c5", "s1", "s2", "s3", "s4"]
    every = [topo.nodeInfo(name) for name in topo.hosts()]
    for key in ("ip", "ip6", "mac"):
        assert len({host[key] for host in every}) == 9
    taken = {ipaddress.ip_interface(host[key]).ip for host in every for key in ("ip", "ip6")}
    assert ipaddress.ip_address(kind.VIP) not in taken
    assert ipaddress.ip_address(kind.VIP6) not in taken


@pytest.mark.parametrize("count", [-1, 41])
def test_too_many_hosts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 0 to 40 hosts, got {count}"):
        SingleTopo(clients=count)


def test_two_networks_keeps_them_apart() -> None:
    topo = TwoNetworksTopo(clients=2, servers=2)
    tags = {}
    for node1, node2, info in topo.links(withInfo=True):
        host, params = (node1, info["params2"]) if node1 != "lb1" else (node2, info["params1"])
        tags[host] = params["tag"]
    assert tags == {"c1": EXTERNAL_TAG, "c2": EXTERNAL_TAG, "s1": INTERNAL_TAG, "s2": INTERNAL_TAG}
    addresses = hosts(topo)
    assert addresses["c1"].network != addresses["s1"].network
    assert topo.nodeInfo("c1")["gateway"] == "192.0.2.1"
    assert topo.nodeInfo("s1")["gateway6"] == "fd00:1::1"


def test_two_switches_put_clients_and_servers_apart() -> None:
    topo = TwoSwitchesTopo(clients=2, servers=2)
    assert {tuple(sorted(link)) for link in topo.links()} == {
        ("c1", "lb1"), ("c2", "lb1"), ("lb2", "s1"), ("lb2", "s2"), ("lb1", "lb2")}


@pytest.mark.parametrize("kind", ALL)
def test_the_site_fits_its_topology(kind: type[LoadBalancerTopo]) -> None:
    site = yaml.safe_load(kind.SITE.read_text())
    topo = kind()
    networks = [msgspec.convert(entry, Network) for entry in site["networks"]]
    pools = {entry["name"]: msgspec.convert(entry, Pool) for entry in site["pools"]}
    known = {str(ipaddress.ip_interface(topo.nodeInfo(name)[key]).ip)
             for name in topo.hosts() for key in ("ip", "ip6")}
    for pool in pools.values():
        assert pool.members
        for member in pool.members:
            assert isinstance(member, Member)
            assert member.address in known
    assert len({network.cidr for network in networks}) == len(networks)
    taken = set()
    for entry in site["virtual_servers"]:
        pool = pools[entry.pop("pool")]
        server = msgspec.convert(entry, VirtualServer)
        assert server.vip_address in (kind.VIP, kind.VIP6)
        assert {":" in member.address for member in pool.members} == {server.version == 6}
        taken.add(server.key)
    assert len(taken) == len(site["virtual_servers"])


@pytest.mark.parametrize(("name", "topo"), [("single", "lb-single"), ("two_networks", "lb-two-networks"),
                                            ("two_switches", "lb-two-switches")])
def test_mn_can_read_the_file(name: str, topo: str) -> None:
    """``mn --custom`` reads it with exec(), in another interpreter, and from any directory."""
    script = ("import sys; path = sys.argv[1]; custom = {};"
              "exec(compile(open(path).read(), path, 'exec'), custom, custom);"
              "built = custom['topos'][sys.argv[2]](clients=2, servers=1);"
              "print(sorted(built.hosts()), custom['switches']['lb'].__name__)")
    done = subprocess.run(["/usr/bin/python3", "-c", script, str(ROOT / "topologies" / f"{name}.py"), topo],
                          cwd="/", capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""
    assert done.stdout == f"['c1', 'c2', 's1'] {LoadBalancerSwitch.__name__}\n"


def test_packets_pass_without_a_controller(make_lab: Callable[..., Any]) -> None:
    lab = make_lab("single")
    lab.forward_plainly()
    lab.start_servers()
    digest = lab.make_file("file", 5_000_000)
    client, server = lab.client("c1"), lab.server("s2")
    assert client.who(f"http://{server.address}/", 20) == {"s2": 20}
    assert client.who(f"http://[{server.address6}]/", 20) == {"s2": 20}
    assert client.udp(server.address, 5300, 5) == ["s2"] * 5
    assert client.udp(server.address6, 5300, 5) == ["s2"] * 5
    got = client.run("sh", "-c", f"curl -s http://{server.address}/file | sha256sum").stdout.split()[0]
    assert got == digest


def test_the_two_networks_do_not_reach_each_other(make_lab: Callable[..., Any]) -> None:
    lab = make_lab("two_networks")
    lab.forward_plainly()
    client = lab.client("c1")
    assert client.run("ping", "-c1", "-W2", lab.client("c2").address, check=False).returncode == 0
    # On the wire, too: an ARP request of one network is not heard in the other.
    lab.client("c1").run("ip", "addr", "add", "10.0.1.99/24", "dev", client.interface)
    assert client.run("ping", "-c1", "-W1", "-I", "10.0.1.99", lab.server("s1").address, check=False).returncode == 1


def test_nothing_is_left_of_a_laboratory(make_lab: Callable[..., Any]) -> None:
    lab = make_lab("two_switches")
    lab.start_servers()
    pids = [lab.root.pid, *(host.pid for host in lab.hosts.values()),
            *(process.pid for pair in lab.services.values() for process in pair)]
    daemons = [int(path.read_text()) for path in lab.ovs.rundir.glob("*.pid")]
    assert len(daemons) == 2
    lab.close()
    # A process that was ended by its parent's end may be there a moment longer, as a zombie.
    left = [pid for pid in pids + daemons if _alive(pid)]
    assert left == []


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
