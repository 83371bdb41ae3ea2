# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What REST says of connections, counters and switches, held against what the test did and what the switch shows."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import (
    ECHO_PORT,
    LAN,
    VIP,
    VIP6,
    configure,
    flows,
    held,
    in_its_cache,
    members,
    pool,
    server,
    settle,
    statistics,
    tcp,
    wait_for_both_rules,
    wait_for_statistics,
)
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

PORTS = {"switch": 80, "controller": 8080, "rules": 8081}


@pytest.fixture
def site(lab: Lab) -> Lab:
    """TCP in three ways, one in IPv6, and UDP."""
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab)), pool("six", "ROUND_ROBIN", members(lab, six=True)),
                    pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT))],
              [server("switch", 80, "web", decision="switch"), server("controller", 8080, "web"),
               server("rules", 8081, "web", state="rules"), server("six", 80, "six", VIP6),
               server("echo", 53, "echo", protocol="UDP")], LAN)
    return lab


def _connections(lab: Lab, **wanted: str) -> list[dict[str, Any]]:
    """All connections with these fields, over all pages."""
    found: list[dict[str, Any]] = []
    path: str | None = "/v1/connections?limit=7"
    while path is not None:
        page = lab.rest.get(path)
        assert len(page["connections"]) <= 7
        found += page["connections"]
        path = page["next"]
    assert len({one["id"] for one in found}) == len(found), "each once"
    return [one for one in found if all(one[key] == value for key, value in wanted.items())]


def _open(lab: Lab) -> str:
    """The state of an open connection that neither rules nor the controller keep."""
    return "FAST" if lab.controller.fastpath else "ESTABLISHED"


@pytest.mark.parametrize("way", list(PORTS))
def test_connections_are_those_that_are_open(site: Lab, way: str) -> None:
    lab, client = site, site.client("c1")
    with held(client, VIP, PORTS[way], 10) as open_ones:
        listed = _connections(lab, virtual_server=way, state="ACTIVE" if way == "rules" else _open(lab))
        assert {one["client"] for one in listed} == {f"{client.address}:{one.port}" for one in open_ones}
        by_client = {one["client"]: one for one in listed}
        for one in open_ones:
            shown = by_client[f"{client.address}:{one.port}"]
            assert shown["member"] == f"{lab.server(one.server).address}:80"
            assert (shown["destination"], shown["protocol"]) == (f"{VIP}:{PORTS[way]}", "TCP")
            assert shown["switch"] == "0000000000000001"
            assert shown["decided_by"] == ("switch" if way == "switch" else "controller")
        filtered = lab.rest.get(f"/v1/connections?virtual_server={way}&limit=1000")["connections"]
        assert {one["client"] for one in filtered} >= set(by_client)
        assert {one["virtual_server"] for one in filtered} == {way}
    wait_until(lambda: not [one for one in _connections(lab, virtual_server=way)
                            if one["state"] in ("ESTABLISHED", "ACTIVE", "FAST")], 15,
               "closed ones are not open any more")


def test_connections_of_ipv6_and_udp(site: Lab) -> None:
    lab, client = site, site.client("c2")
    names = client.udp(VIP, 53, 5)
    with held(client, VIP6, 80, 3) as open_ones:
        shown = _connections(lab, virtual_server="six", state=_open(lab))
        assert {one["client"] for one in shown} == {f"[{client.address6}]:{one.port}" for one in open_ones}
        assert {one["destination"] for one in shown} == {f"[{VIP6}]:80"}
    udp = [one for one in _connections(lab, virtual_server="echo") if one["client"].startswith(f"{client.address}:")]
    assert len(udp) == 5
    assert Counter(one["member"] for one in udp) == Counter(f"{lab.server(str(name)).address}:{ECHO_PORT}"
                                                           for name in names)
    assert {one["protocol"] for one in udp} == {"UDP"}


@pytest.mark.parametrize("way", list(PORTS))
def test_counters_are_what_was_done(site: Lab, way: str) -> None:
    lab, number = site, 60
    before = statistics(lab, way)
    here = {one["member"]: one["opened"] for one in lab.rest.get("/v1/stats")["members"] if one["pool"] == "web"}
    served = lab.client("c1").who(f"http://{VIP}:{PORTS[way]}/", number)
    after = wait_for_statistics(lab, way, opened=before["opened"] + number)
    opened = {one["member"]: one["opened"] - here[one["member"]]
              for one in lab.rest.get("/v1/stats")["members"] if one["pool"] == "web"}
    assert opened == {f"{host.address}:80": served[host.name] for host in lab.servers}
    assert sum(opened.values()) == number
    messages = after["messages_to_controller"] - before["messages_to_controller"]
    if way == "switch":
        assert messages == 0
    elif way == "controller":
        assert messages == number
    assert after["refused"] == before["refused"]


def test_messages_per_connection(site: Lab) -> None:
    """Decided by the switch 0, by the controller 1, as a pair of rules 1 query and 2 rules removed."""
    lab, number, client = site, 20, site.client("c3")
    for way, port in PORTS.items():
        opened = [tcp(client, VIP, port) for _ in range(number)]
        in_its_cache(lab)  # packets that are quicker would climb (state: rules)
        for one in opened:
            one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert one.recv(4096).startswith(b"HTTP/1.1 200")
            one.close()
        wait_for_statistics(lab, way, opened=number)
    wait_for_statistics(lab, "rules", 15, closed=number, active=0)
    wait_for_both_rules(lab, "rules")
    assert statistics(lab, "switch")["messages_per_connection"] == 0.0
    assert statistics(lab, "controller")["messages_per_connection"] == 1.0
    rules = statistics(lab, "rules")["messages_per_connection"]
    assert 3.0 <= rules <= 4.0, "the ACK of a handshake may be too quick for the cache; nothing else is"


def test_members_bytes(site: Lab) -> None:
    lab = site
    lab.make_file("five", 5_000_000)
    target = lab.directory / "five-got"
    before = {one["member"]: one["bytes"] for one in lab.rest.get("/v1/stats")["members"] if one["pool"] == "web"}
    lab.client("c1").curl(f"http://{VIP}:8081/five", "-o", str(target), "-H", "Connection: close")
    wait_for_both_rules(lab, "rules")
    moved = [one["bytes"] - before[one["member"]] for one in lab.rest.get("/v1/stats")["members"]
             if one["pool"] == "web"]
    assert sum(moved) > 5_000_000, "a rule pair's bytes, both directions"
    assert sorted(moved)[:2] == [0, 0], "of one member"


def test_switches_are_as_they_are(site: Lab) -> None:
    lab = site
    time.sleep(1.1)  # readings are at most a second old
    (view,) = lab.rest.get("/v1/switches")["switches"]
    assert (view["dpid"], view["connected"]) == ("0000000000000001", True)
    assert view["address"].startswith("127.0.0.1:")
    assert view["flows"] == len(flows(lab))
    assert view["groups"] == lab.ovs.ofctl("dump-groups", "lb1").count("group_id=")
    # Behind a fast path the interface has another name; Mininet numbers ports as it makes them.
    ports = {host.address: number for number, host in enumerate((*lab.clients, *lab.servers), 1)} \
        if lab.controller.fastpath else {
            host.address: int(lab.ovs.vsctl("get", "Interface", f"lb1-eth{number}", "ofport"))
            for number, host in enumerate((*lab.clients, *lab.servers), 1)}
    macs = {host.address: host.run("ip", "-o", "link", "show", host.interface).stdout.split("link/ether ")[1][:17]
            for host in lab.servers}
    for host in lab.servers:
        for address in (host.address, host.address6):
            assert view["hosts"][address] == {"mac": macs[host.address], "port": ports[host.address]}
    assert view["connected_seconds"] > 0


def test_statuses_follow_the_members(site: Lab) -> None:
    """A member that falls silent is OFFLINE, its pool DEGRADED; both recover by themselves."""
    lab, silent = site, site.server("s3")
    silent.run("ip", "link", "set", silent.interface, "down")
    try:
        wait_until(lambda: lab.rest.get("/v1/pools/web")["operating_status"] == "DEGRADED", 12, "web is degraded")
        states = {one["name"]: one["operating_status"] for one in lab.rest.get("/v1/pools/web/members")["members"]}
        assert states == {"s1": "ONLINE", "s2": "ONLINE", "s3": "OFFLINE"}
        assert lab.rest.get("/v1/virtual-servers/switch")["operating_status"] == "DEGRADED"
        in_its_cache(lab)
        for port in (80, 8080, 8081):
            assert set(lab.client("c1").who(f"http://{VIP}:{port}/", 45)) == {"s1", "s2"}
    finally:
        silent.run("ip", "link", "set", silent.interface, "up")
        silent.run("ip", "-6", "addr", "replace", f"{silent.address6}/64", "dev", silent.interface, "nodad")
    settle(lab, within=15)
    assert set(lab.client("c1").who(f"http://{VIP}:8080/", 9)) == {"s1", "s2", "s3"}
