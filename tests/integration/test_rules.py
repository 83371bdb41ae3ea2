# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``state: rules``: a pair of OpenFlow rules a connection, which the switch takes away by itself and accounts for."""

from __future__ import annotations

import hashlib
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.support import (
    ECHO_PORT,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    configure,
    flows,
    held,
    in_its_cache,
    members,
    packets,
    pool,
    server,
    statistics,
    tcp,
    wait_for_both_rules,
    wait_for_statistics,
)
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

INBOUND, OUTBOUND = "cookie=0x1b08", "cookie=0x1b09"


def pairs(lab: Lab) -> tuple[list[str], list[str]]:
    """The rules of connections: from clients, from members."""
    listed = flows(lab)
    return ([one for one in listed if one.startswith(INBOUND)], [one for one in listed if one.startswith(OUTBOUND)])


@pytest.fixture
def rules(lab: Lab) -> Lab:
    """TCP 80 in both families and UDP 53, connections as rules."""
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab)), pool("web6", "ROUND_ROBIN", members(lab, six=True)),
                    pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT))],
              [server("web", 80, "web", state="rules"), server("web6", 80, "web6", VIP6, state="rules"),
               server("echo", 53, "echo", protocol="UDP", state="rules", idle_timeout=1)])
    wait_until(lambda: pairs(lab) == ([], []), 15, "the rules of the tests before are gone")
    return lab


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_a_pair_for_each_connection_that_a_fin_takes_away(rules: Lab, vip: str) -> None:
    lab, client = rules, rules.client("c1")
    with held(client, vip, 80, 4) as open_ones:
        for one in open_ones:
            one.ask()
        inbound, outbound = pairs(lab)
        assert (len(inbound), len(outbound)) == (4, 4)
        for one in open_ones:
            assert sum(f"tp_src={one.port}," in flow for flow in inbound) == 1
            assert sum(f"tp_dst={one.port} " in flow for flow in outbound) == 1

        def carried() -> bool:
            for one in open_ones:
                one.ask()
            return all(packets(flow) >= 3 for flow in pairs(lab)[0])

        # The first packets are quicker than the switch's cache, which follows its rules when it comes to it.
        wait_until(carried, 10, "the rules carry the packets")
        assert statistics(lab, "web6" if ":" in vip else "web")["active"] == 4
    closed = time.monotonic()
    wait_until(lambda: pairs(lab) == ([], []), 12, "a FIN shortens the rules' lives")
    assert time.monotonic() - closed < 12, "idle_timeout alone would be 60 s"
    name = "web6" if ":" in vip else "web"
    wait_for_both_rules(lab, name)
    found = statistics(lab, name)
    assert (found["opened"], found["closed"], found["active"]) == (4, 4, 0)
    assert lab.rest.get("/v1/connections")["connections"] == []


def test_closed_connections_are_counted_with_their_bytes(rules: Lab) -> None:
    lab, client = rules, rules.client("c2")
    digest = lab.make_file("five", 5_000_000)
    target = lab.directory / "five-got"
    before = statistics(lab, "web")
    client.curl(f"http://{VIP}/five", "-o", str(target), "-H", "Connection: close")
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    wait_for_both_rules(lab, "web")
    found = statistics(lab, "web")
    assert found["closed"] == before["closed"] + 1
    moved = found["bytes"] - before["bytes"]
    assert 5_000_000 < moved < 5_600_000, f"{moved} bytes: the file, its headers and the ACKs"
    switch = lab.rest.get("/v1/stats")["switches"][0]
    assert switch["flows_removed"] >= 2


def test_messages_per_connection(rules: Lab) -> None:
    """One query, and two rules removed: nothing else comes up."""
    lab, client = rules, rules.client("c3")
    number = 20
    before, here = lab.rest.get("/v1/stats")["switches"][0], statistics(lab, "web")
    opened = [tcp(client, VIP, 80) for _ in range(number)]
    in_its_cache(lab)  # packets that are quicker climb
    for one in opened:
        one.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
        one.close()
    wait_for_both_rules(lab, "web")
    assert pairs(lab) == ([], [])
    after = wait_for_statistics(lab, "web", opened=here["opened"] + number)
    now = lab.rest.get("/v1/stats")["switches"][0]
    assert now["flows_removed"] - before["flows_removed"] == 2 * number
    assert now["flow_mods"] - before["flow_mods"] == 2 * number
    messages = after["messages_to_controller"] - here["messages_to_controller"]
    # The ACK of the handshake may be too quick; nothing else can be.
    assert 3 * number <= messages <= 4 * number, messages


def test_an_idle_udp_flow_ends_and_begins_again(rules: Lab) -> None:
    lab, client = rules, rules.client("c1")
    with client.entered():
        endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with endpoint:
        endpoint.settimeout(2)
        endpoint.connect((VIP, 53))
        first = None
        for _ in range(5):
            endpoint.send(b"x")
            name = endpoint.recv(100).split()[0]
            assert first in (None, name)
            first = name
        assert [len(side) for side in pairs(lab)] == [1, 1]
        wait_until(lambda: pairs(lab) == ([], []), 5, "idle_timeout: 1")
        wait_for_statistics(lab, "echo", active=0)
        endpoint.send(b"again")
        assert endpoint.recv(100).endswith(b"again")
    assert len(pairs(lab)[0]) == 1


def test_a_connection_that_idled_out_is_refused_at_once(lab: Lab) -> None:
    """Both rules went for want of traffic: it has ended, and whoever goes on with it learns so."""
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))],
              [server("web", 80, "web", state="rules", idle_timeout=1)])
    with held(lab.client("c1"), VIP, 80, 1) as (one,):
        wait_for_statistics(lab, "web", closed=1, active=0)
        begun = time.monotonic()
        with pytest.raises(ConnectionResetError):
            one.ask()
        assert time.monotonic() - begun < REFUSED_WITHIN
    assert Held(lab.client("c1"), VIP, 80).server


def test_a_hard_timeout_ends_it(lab: Lab) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))],
              [server("web", 80, "web", state="rules", idle_timeout=0, hard_timeout=2)])
    client = lab.client("c1")
    begun = time.monotonic()
    with held(client, VIP, 80, 1) as (one,):
        while time.monotonic() - begun < 1.0:
            assert one.ask()
            time.sleep(0.1)
        wait_until(lambda: pairs(lab) == ([], []), 5, "hard_timeout: 2")
        assert 1.5 <= time.monotonic() - begun <= 6
        wait_for_statistics(lab, "web", closed=1, active=0)
        with pytest.raises((ConnectionResetError, TimeoutError, BrokenPipeError)):
            one.ask()


def test_rules_of_a_removed_virtual_server_go_with_it(rules: Lab) -> None:
    lab, client = rules, rules.client("c1")
    with held(client, VIP, 80, 3):
        assert len(pairs(lab)[0]) == 3
        lab.rest.delete("/v1/virtual-servers/web")
        wait_until(lambda: pairs(lab) == ([], []), 3, "its connections' rules are gone")
