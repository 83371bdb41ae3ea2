# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""TCP and UDP, IPv4 and IPv6, decided by the switch and by the controller: who answers, and how the choice falls."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.integration.support import (
    ECHO_PORT,
    VIP,
    VIP6,
    Held,
    addresses,
    ask_from,
    configure,
    held,
    in_order,
    members,
    pool,
    proportional,
    server,
    statistics,
)

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True
ALL = {"s1", "s2", "s3"}
DECISIONS = ("switch", "controller")


@pytest.fixture
def families(lab: Lab) -> Iterator[Lab]:
    """TCP (80: the switch decides, 8080: the controller does, 8081: rules) and UDP (53, 54, 55), both families."""
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        for protocol, port, first in (("TCP", 80, 80), ("UDP", ECHO_PORT, 53)):
            name = f"{protocol}-{'six' if six else 'four'}"
            pools.append(pool(name, "ROUND_ROBIN", members(lab, port, six)))
            listed = (first, 8080, 8081) if protocol == "TCP" else (53, 54, 55)
            for way, listen in zip((*DECISIONS, "rules"), listed, strict=True):
                how = {"state": "rules"} if way == "rules" else {"decision": way}
                servers.append(server(f"{name}-{way}", listen, name, vip, protocol, **how))
    configure(lab, pools, servers)
    yield lab


@pytest.mark.parametrize("port", [80, 8080, 8081], ids=["switch", "controller", "rules"])
@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_tcp_reaches_every_member_and_the_bodies_are_theirs(families: Lab, vip: str, port: int) -> None:
    lab, client = families, families.client("c1")
    base = f"http://[{vip}]:{port}" if ":" in vip else f"http://{vip}:{port}"
    assert set(client.who(f"{base}/", 60)) == ALL
    about = json.loads(client.curl(f"{base}/about"))
    chosen = lab.server(about["server"])
    six = ":" in vip
    assert about["server_address"] == (chosen.address6 if six else chosen.address)
    assert about["client_address"] == (client.address6 if six else client.address), "the member sees the client"


@pytest.mark.parametrize("port", [80, 8080, 8081], ids=["switch", "controller", "rules"])
@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_tcp_carries_two_megabytes_unchanged(families: Lab, vip: str, port: int) -> None:
    lab, client = families, families.client("c2")
    digest = lab.make_file("two", 2_000_000)
    target = lab.directory / "two-got"
    client.curl(f"http://[{vip}]:{port}/two" if ":" in vip else f"http://{vip}:{port}/two", "-o", str(target))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("port", [53, 54, 55], ids=["switch", "controller", "rules"])
@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_udp_reaches_every_member(families: Lab, vip: str, port: int) -> None:
    client = families.client("c3")
    assert set(client.udp(vip, port, 60)) == ALL
    assert None not in client.udp(vip, port, 3, payload=bytes(range(256)) * 5), "1280 bytes, echoed"


def test_a_udp_flow_stays_with_its_member(families: Lab) -> None:
    import socket

    client = families.client("c1")
    for vip, port in ((VIP, 53), (VIP, 54), (VIP, 55), (VIP6, 54)):
        with client.entered():
            endpoint = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, socket.SOCK_DGRAM)
        with endpoint:
            endpoint.settimeout(2)
            endpoint.connect((vip, port))
            answers = set()
            for number in range(10):
                endpoint.send(b"%d" % number)
                name, _, echoed = endpoint.recv(100).partition(b" ")
                assert echoed == b"%d" % number
                answers.add(name)
        assert len(answers) == 1, f"{vip} {port}: {answers}"


def test_round_robin_alternates_exactly(lab: Lab) -> None:
    configure(lab, [pool("even", "ROUND_ROBIN", members(lab))],
              [server("even", 80, "even"), server("pair", 81, "even", state="rules")])
    for port in (80, 81):
        order = in_order(lab.client("c1"), f"http://{VIP}:{port}/", 30)
        assert len(order) == 30
        assert set(order[:3]) == ALL
        assert order == order[:3] * 10


@pytest.mark.parametrize("decision", DECISIONS)
def test_weights_hold(lab: Lab, decision: str) -> None:
    configure(lab, [pool("three-one", "WEIGHTED_ROUND_ROBIN", members(lab, weights=(3, 1), names=("s1", "s2")))],
              [server("web", 80, "three-one", decision=decision)])
    counted: Counter[str] = Counter()
    for client in lab.clients:
        counted += client.who(f"http://{VIP}/", 200)
    assert sum(counted.values()) == 600
    proportional(counted, {"s1": 3, "s2": 1})
    if decision == "controller":
        assert counted == {"s1": 450, "s2": 150}, "in the controller it is exact"


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("algorithm", ["SOURCE_IP", "CONSISTENT_HASH"])
def test_hashes_keep_a_client_and_spread_clients(lab: Lab, algorithm: str, decision: str) -> None:
    configure(lab, [pool("hashed", algorithm, members(lab))], [server("web", 80, "hashed", decision=decision)])
    client = lab.client("c1")
    with addresses(client, "10.0.0.", 110, 40) as given:
        first = {address: ask_from(client, VIP, 80, address) for address in given}
        assert set(first.values()) == ALL, "40 clients reach all members"
        if algorithm == "SOURCE_IP":
            again = {address: ask_from(client, VIP, 80, address) for address in given for _ in range(3)}
            assert again == first, "the same client always has the same member"
    if algorithm == "CONSISTENT_HASH":
        # It goes by address and port: the same connection again, the same member again.
        for number in range(20):
            one = Held(client, VIP, 80, client.address, 30000 + number)
            one.reset()
            other = Held(client, VIP, 80, client.address, 30000 + number)
            other.reset()
            assert one.server == other.server


def test_least_connections_goes_where_fewest_are(lab: Lab) -> None:
    configure(lab, [pool("least", "LEAST_CONNECTIONS", members(lab))], [server("web", 80, "least")])
    client = lab.client("c1")
    with held(client, VIP, 80, 30) as open_ones:
        assert Counter(one.server for one in open_ones) == dict.fromkeys(ALL, 10)
        for one in open_ones:
            if one.server == "s2":
                one.close()
        _wait_active(lab, "web", 20)
        with held(client, VIP, 80, 10) as more:
            assert {one.server for one in more} == {"s2"}, "s2 had ten fewer"
    _wait_active(lab, "web", 0)


def test_random_two_choices_spreads_held_connections(lab: Lab) -> None:
    configure(lab, [pool("two", "RANDOM_TWO_CHOICES", members(lab))], [server("web", 80, "two")])
    with held(lab.client("c1"), VIP, 80, 60) as open_ones:
        counted = Counter(one.server for one in open_ones)
    assert set(counted) == ALL
    # The gap of two choices grows as log log n; of blind chance it would be some 10 of 20.
    assert max(counted.values()) - min(counted.values()) <= 6, counted


@pytest.mark.parametrize("decision", DECISIONS)
def test_without_new_connections_the_established_go_on(lab: Lab, decision: str) -> None:
    from tests.integration.support import change_member

    client = lab.client("c2")
    for fields, back in (({"weight": 0}, {"weight": 1}), ({"draining": True}, {"draining": False}),
                         ({"admin_state_up": False}, {"admin_state_up": True})):
        configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))],
                  [server("web", 80, "web", decision=decision)])
        with ExitStack() as stack:
            on_s1 = None
            while on_s1 is None:
                one = Held(client, VIP, 80)
                stack.callback(one.close)
                on_s1 = one if one.server == "s1" else None
            change_member(lab, "web", "s1", **fields)
            assert set(client.who(f"http://{VIP}/", 60)) == {"s2", "s3"}, fields
            assert on_s1.ask() == "s1", f"{fields}: the established one goes on"
            change_member(lab, "web", "s1", **back)
            assert set(client.who(f"http://{VIP}/", 60)) == ALL, back
            assert on_s1.ask() == "s1"


def _wait_active(lab: Lab, name: str, active: int) -> None:
    from topologies.namespace import wait_until

    wait_until(lambda: statistics(lab, name)["active"] == active, 5, f"{active} connections active at {name}")
