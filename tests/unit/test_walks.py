# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Packets on their way through the pipeline, and through the controller where they climb."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import netaddr
import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from lbapp.app import LoadBalancer, Switch
from lbapp.config.model import Algorithm, Configuration, Decision, Protocol, State
from lbapp.control.messages import Host, NeighbourSeen, SwitchUp
from lbapp.dataflow.pipeline import VIRTUAL_MAC, Kind, zones
from tests import sites
from tests.fake_frames import Headers, address_number, build, frame, mac, mac_number, parse, transport
from tests.fake_switch import FakeSwitch

VIRTUAL = int.from_bytes(VIRTUAL_MAC, "big")
CLIENT_PORT = 101
SWITCH_DECIDES: dict[str, Any] = {"decision": Decision.SWITCH}


class World:
    """A switch, the controller, and hosts that answer nothing by themselves."""

    def __init__(self, site: Configuration, **more) -> None:
        self.site = site
        self.hosts = sites.reachable(site)
        self.switch = FakeSwitch(**more)
        self.app = LoadBalancer(wsgi=None)
        self.app.configure(site)
        datapath = types.SimpleNamespace(id=1, send=self.switch.receive, address=("127.0.0.1", 1))
        self.datapath = datapath
        self.state = Switch(datapath, self.app.control, site)
        self.app.switches[1] = self.state
        self.app.control.handle(SwitchUp(1, {}), 0.0)
        for address, host in self.hosts.items():
            self.app.control.handle(NeighbourSeen(1, address, host), 0.0)
        self.state.session.read()
        self._answers()
        for _ in self.state.session.reconcile(site):
            pass
        self._answers()
        assert self.state.session.ready and not self.state.session.needs_repair
        self.punts: list[Kind] = []

    def _answers(self) -> None:
        while self.switch.outbox:
            data = self.switch.outbox.pop(0)
            answer = self.app.receive(self.datapath, data[1], data)
            assert answer is not None, "not ours"
            self.switch.receive(answer)

    def send(self, port: int, data: bytes) -> list:
        """Inject a frame; returns everything that left in consequence."""
        out = list(self.switch.inject(port, data))
        while self.switch.outbox:
            message = self.switch.outbox.pop(0)
            if message[1] == 10:
                self.punts.append(Kind(message[17]))
            self.switch.sent = []
            answer = self.app.receive(self.datapath, message[1], message)
            assert answer is not None
            if answer:
                self.switch.receive(answer)
            out += self.switch.sent
        return out

    def one(self, port: int, data: bytes) -> tuple[int, Headers]:
        (sent,) = self.send(port, data)
        return sent.port, parse(sent.frame)


def site(*servers, of=None, networks=(), algorithm=Algorithm.ROUND_ROBIN) -> Configuration:
    return sites.configuration(servers or [sites.server()], [sites.pool(algorithm=algorithm, of=of)], networks)


def reply_to(h: Headers, port: int = 0) -> bytes:
    """What a member answers to a packet it got."""
    family = "ipv4" if h["eth_type"] == 0x800 else "ipv6"
    name = "tcp" if h["ip_proto"] == 6 else "udp"
    back = dict(h) | {"ip_ttl": 64}
    for field in ("eth", family, name):
        back[f"{field}_src"], back[f"{field}_dst"] = h[f"{field}_dst"], h[f"{field}_src"]
    if name == "tcp":
        back["tcp_flags"] = 0x12
    return build(back)


VIPS = pytest.mark.parametrize("six", [False, True])
PROTOCOLS = pytest.mark.parametrize("protocol", Protocol)
STYLES = pytest.mark.parametrize("style", [{}, SWITCH_DECIDES, {"state": State.RULES}],
                                 ids=["punted", "switch", "rules"])


@VIPS
@PROTOCOLS
@STYLES
def test_there_and_back(six, protocol, style):
    vip, client = ("fd00::100", "fd00::1") if six else ("10.0.0.100", "10.0.0.1")
    world = World(site(sites.server(vip=vip, protocol=protocol, **style), of=sites.members(six=six)))
    family, name = ("ipv6" if six else "ipv4"), protocol.value.lower()
    first = frame(client, vip, protocol.number, payload=b"hello" if protocol is Protocol.UDP else b"")
    port, there = world.one(CLIENT_PORT, first)
    member = next(address for address, host in world.hosts.items() if host.port == port)
    assert there[f"{family}_dst"] == address_number(member) and there[f"{name}_dst"] == 8080
    assert there["eth_dst"] == int.from_bytes(world.hosts[member].mac, "big")
    assert there["eth_src"] == mac_number(mac(1)) and there[f"{family}_src"] == address_number(client)
    assert world.punts == ([] if style == SWITCH_DECIDES else [Kind.QUERY])
    back_port, back = world.one(port, reply_to(there))
    assert back_port == CLIENT_PORT
    assert (back["eth_dst"], back["eth_src"]) == (mac_number(mac(1)), VIRTUAL)
    assert (back[f"{family}_src"], back[f"{name}_src"], back[f"{name}_dst"]) == (address_number(vip), 80, 40000)
    assert back["ip_ttl"] == 64
    later = frame(client, vip, protocol.number, flags=0x10, payload=b"more")
    assert world.one(CLIENT_PORT, later)[0] == port
    assert len(world.punts) == (0 if style == SWITCH_DECIDES else 1)


def test_round_robin_by_the_controller_is_exact():
    world = World(site())
    ports = [world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", sport=n))[0] for n in range(2000, 2050)]
    assert set(Counter(ports).values()) == {10}


@pytest.mark.parametrize("algorithm", [Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN,
                                       Algorithm.CONSISTENT_HASH])
@PROTOCOLS
def test_the_switch_spreads_by_weight(algorithm, protocol):
    weights = (4, 1, 1, 1, 1)
    server = sites.server(protocol=protocol, **SWITCH_DECIDES)
    world = World(site(server, of=sites.members(weights=weights), algorithm=algorithm))
    ports = Counter(world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", protocol.number, sport=n))[0]
                    for n in range(2000, 2800))
    first = ports[world.hosts["10.0.0.11"].port] / 800
    assert abs(first - (0.2 if algorithm is Algorithm.ROUND_ROBIN else 0.5)) < 0.08
    assert len(ports) == 5 and not world.punts


def test_the_same_client_the_same_member():
    world = World(site(sites.server(), algorithm=Algorithm.SOURCE_IP))
    for client in range(1, 60):
        ports = {world.one(CLIENT_PORT, frame(f"10.0.2.{client}", "10.0.0.100", sport=n))[0]
                 for n in (2000, 3000, 4000)}
        assert len(ports) == 1
    assert not world.punts


# ------------------------------------------------------------------ answers in the switch


def test_arp_is_answered():
    world = World(site())
    ask = build({"eth_dst": 2**48 - 1, "eth_src": 5, "eth_type": 0x806, "arp_op": 1, "arp_sha": 5,
                 "arp_spa": 0x0A000001, "arp_tha": 0, "arp_tpa": 0x0A000064})
    port, answer = world.one(CLIENT_PORT, ask)
    assert port == CLIENT_PORT
    assert answer == {"eth_dst": 5, "eth_src": VIRTUAL, "eth_type": 0x806, "arp_op": 2, "arp_sha": VIRTUAL,
                      "arp_tha": 5, "arp_spa": 0x0A000064, "arp_tpa": 0x0A000001}
    other = build(parse(ask) | {"arp_tpa": 0x0A000065})
    assert [sent.port for sent in world.send(CLIENT_PORT, other)] == [0xFFFFFFFA]
    quiet = World(site(sites.server(arp=False)))
    assert [sent.port for sent in quiet.send(CLIENT_PORT, ask)] == [0xFFFFFFFA]


SOLICITATION = transport("fd00::1", "ff02::1:ff00:100", 17) | {
    "eth_dst": 0x3333FF000100, "ip_proto": 58, "ip_ttl": 255, "icmpv6_type": 135, "icmpv6_code": 0, "nd_reserved": 0,
    "ipv6_nd_target": address_number("fd00::100"), "nd_options_type": 1, "ipv6_nd_sll": mac_number(mac(1))}


def test_neighbour_solicitations_are_answered():
    world = World(site(sites.server(vip="fd00::100"), of=sites.members(six=True)))
    port, answer = world.one(CLIENT_PORT, build(SOLICITATION))
    assert port == CLIENT_PORT
    assert (answer["icmpv6_type"], answer["ip_ttl"], answer["nd_reserved"]) == (136, 255, 0x60000000)
    assert (answer["ipv6_src"], answer["ipv6_dst"]) == (address_number("fd00::100"), address_number("fd00::1"))
    assert (answer["nd_options_type"], answer["ipv6_nd_tll"], answer["eth_dst"]) == (2, VIRTUAL, mac_number(mac(1)))
    probe = build(SOLICITATION | {"ipv6_src": 0, "nd_options_type": 0})  # duplicate address detection
    assert [sent.port for sent in world.send(CLIENT_PORT, probe)] == [0xFFFFFFFA]


@pytest.mark.parametrize(("vip", "kind", "answer"), [("10.0.0.100", "icmpv4", (8, 0)),
                                                     ("fd00::100", "icmpv6", (128, 129))])
def test_echo_is_answered(vip, kind, answer):
    six = kind == "icmpv6"
    world = World(site(sites.server(vip=vip), of=sites.members(six=six)))
    client = "fd00::1" if six else "10.0.0.1"
    ask = transport(client, vip, 17) | {"ip_proto": 58 if six else 1, f"{kind}_type": answer[0], f"{kind}_code": 0,
                                        "payload": b"\0\1\0\1data", "ip_ttl": 3}
    port, got = world.one(CLIENT_PORT, build(ask))
    family = "ipv6" if six else "ipv4"
    assert (port, got[f"{kind}_type"], got["ip_ttl"], got["payload"]) == (CLIENT_PORT, answer[1], 64, b"\0\1\0\1data")
    assert (got[f"{family}_src"], got[f"{family}_dst"]) == (address_number(vip), address_number(client))


# ------------------------------------------------------------------ refusals


@PROTOCOLS
def test_a_port_that_nobody_serves_is_refused(protocol):
    world = World(site())
    port, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", protocol.number, dport=81))
    assert port == CLIENT_PORT and world.punts == [Kind.DENIED]
    assert answer["tcp_flags"] == 0x14 if protocol is Protocol.TCP else answer["icmpv4_code"] == 3


@STYLES
def test_maintenance_refuses_new_connections_and_keeps_old_ones(style):
    world = World(site(sites.server(**style)))
    port, _ = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100"))
    closed = site(sites.server(maintenance=True, **style))
    world.app.configure(closed)
    for _ in world.state.session.configure(closed):
        pass
    world._answers()
    assert world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", flags=0x10))[0] == port
    back, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", sport=50000))
    assert (back, answer["tcp_flags"]) == (CLIENT_PORT, 0x14)


def test_a_segment_of_no_connection_is_refused():
    world = World(site())
    _, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", flags=0x10, ack=77))
    assert (answer["tcp_flags"], answer["tcp_seq"]) == (4, 77)
    assert world.send(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", flags=0x04)) == []


@pytest.mark.parametrize("style", [{}, SWITCH_DECIDES])
def test_a_full_conntrack_refuses_new_connections(style):
    world = World(site(sites.server(**style)), max_connections=1)
    port, _ = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100"))
    back, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", sport=50000))
    assert (back, answer["tcp_flags"], answer["ipv4_src"]) == (CLIENT_PORT, 0x14, 0x0A000064)
    assert world.state.counters["conntrack_full"] == 1
    assert world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", flags=0x10))[0] == port


def test_a_connection_whose_member_is_gone_is_reset_by_the_virtual_address():
    world = World(site())
    world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100"))
    empty = site(of=())
    world.app.configure(empty)
    for _ in world.state.session.configure(empty):
        pass
    world._answers()
    port, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", flags=0x10, ack=99))
    assert world.punts[-1] is Kind.GONE and port == CLIENT_PORT
    assert (answer["ipv4_src"], answer["tcp_src"], answer["tcp_seq"]) == (0x0A000064, 80, 99)
    assert not any(world.switch.conntrack.values()), "the client may use its port again"


# ------------------------------------------------------------------ who serves


def test_the_most_specific_virtual_server_wins():
    names = {"exact": ("10.0.0.100", 80), "address": ("10.0.0.100", 0), "port": ("0.0.0.0", 80), "any": ("0.0.0.0", 0)}
    servers = [sites.server(name, number, vip, port, use=name, translate_port=False)
               for number, (name, (vip, port)) in enumerate(names.items(), 1)]
    pools = [sites.pool(name, of=sites.members(1, first=number)) for number, name in enumerate(names, 1)]
    world = World(sites.configuration(servers, pools))
    for name, vip, port in (("exact", "10.0.0.100", 80), ("address", "10.0.0.100", 81), ("port", "8.8.8.8", 80),
                            ("any", "8.8.8.8", 81)):
        out, there = world.one(CLIENT_PORT, frame("10.0.0.1", vip, dport=port))
        number = list(names).index(name) + 1
        assert out == world.hosts[f"10.0.0.{10 + number}"].port, name
        assert there["tcp_dst"] == port
    # Not addressed to the balancer's MAC, or to a known local address: none of a wildcard's business.
    for data in (frame("10.0.0.1", "8.8.8.8", eth_dst=mac(9)), frame("10.0.0.1", "10.0.0.11")):
        assert world.punts.count(Kind.QUERY) == 4
        assert all(sent.port in (0xFFFFFFFA,) for sent in world.send(CLIENT_PORT, data))


def test_udp_to_a_tcp_port_is_denied():
    world = World(site())
    _, answer = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", 17))
    assert (answer["icmpv4_type"], answer["icmpv4_code"]) == (3, 3)


@VIPS
@pytest.mark.parametrize("style", [{}, SWITCH_DECIDES])
def test_snat_both_ways(six, style):
    vip, client, own = ("fd00::100", "fd01::9", "fd00::254") if six else ("10.0.0.100", "192.168.1.9", "10.0.0.254")
    family = "ipv6" if six else "ipv4"
    world = World(site(sites.server(vip=vip, snat=True, **style), of=sites.members(six=six),
                       networks=(*sites.LAN, *sites.OUTSIDE)))
    for sport in (40000, 41000):
        for _ in range(2):
            port, there = world.one(CLIENT_PORT, frame(client, vip, sport=sport))
            assert there[f"{family}_src"] == address_number(own) and there["eth_src"] == VIRTUAL
        back_port, back = world.one(port, reply_to(there))
        assert back_port == CLIENT_PORT
        assert (back[f"{family}_src"], back[f"{family}_dst"]) == (address_number(vip), address_number(client))
        assert (back["tcp_src"], back["tcp_dst"], back["eth_dst"]) == (80, sport, mac_number(mac(1)))
    assert not world.send(port, frame("10.0.0.11", "10.0.0.254", dport=7)) or six


def test_routed_between_two_networks():
    world = World(site(sites.server(vip="192.168.1.100"), networks=(*sites.LAN, *sites.OUTSIDE)))
    port, there = world.one(CLIENT_PORT, frame("192.168.1.9", "192.168.1.100", ttl=10))
    assert (there["ip_ttl"], there["eth_src"]) == (9, VIRTUAL)
    back = parse(reply_to(there)) | {"eth_dst": VIRTUAL}
    _, back = world.one(port, build(back))
    assert back["ip_ttl"] == 63


def test_members_shared_by_both_sides():
    world = World(site(sites.server("a", 1), sites.server("b", 2, "192.168.1.100"), of=sites.members(1),
                       networks=(*sites.LAN, *sites.OUTSIDE)))
    _, inside = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", ttl=10))
    _, outside = world.one(CLIENT_PORT, frame("192.168.1.9", "192.168.1.100", ttl=10))
    assert (inside["ip_ttl"], inside["eth_src"]) == (10, mac_number(mac(1)))
    assert (outside["ip_ttl"], outside["eth_src"]) == (9, VIRTUAL)


def test_an_address_of_ours_may_be_virtual():
    world = World(site(sites.server(vip="10.0.0.254"), networks=sites.LAN))
    port, there = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.254"))
    assert there["ipv4_dst"] == 0x0A00000B
    assert world.one(port, reply_to(there))[1]["ipv4_src"] == 0x0A0000FE


def test_next_hop_without_translation():
    server = sites.server(translate_address=False, translate_port=False, route_by_destination=False,
                          next_hop="10.0.0.1")
    world = World(site(server))
    port, there = world.one(CLIENT_PORT, frame("10.0.0.9", "10.0.0.100"))
    assert port == world.hosts["10.0.0.1"].port
    assert (there["ipv4_dst"], there["tcp_dst"]) == (0x0A000064, 80)
    _, back = world.one(port, reply_to(there))
    assert back["eth_dst"] == mac_number(mac(1))


# ------------------------------------------------------------------ corners


def test_two_clients_on_one_port_are_told_apart():
    world = World(site())
    for client in (1, 2):
        _, there = world.one(CLIENT_PORT + client, frame(f"10.0.0.{client}", "10.0.0.100", eth_src=mac(client)))
        port, back = world.one(world.hosts[str(netaddr.IPAddress(there["ipv4_dst"]))].port, reply_to(there))
        assert (port, back["eth_dst"]) == (CLIENT_PORT + client, mac_number(mac(client)))


def test_client_and_member_behind_one_port():
    world = World(site(of=sites.members(1)))
    port = world.hosts["10.0.0.11"].port
    out, there = world.one(port, frame("10.0.0.1", "10.0.0.100"))
    assert out == port
    assert world.one(port, reply_to(there))[0] == port


def test_what_is_not_ours_is_switched():
    world = World(site())
    for data in (frame("10.0.0.1", "10.0.0.2", eth_dst=mac(9)), frame("fd00::1", "fd00::2", eth_dst=mac(9)),
                 build({"eth_dst": 1, "eth_src": 2, "eth_type": 0x88CC, "payload": b"lldp"})):
        assert [sent.port for sent in world.send(CLIENT_PORT, data)] == [0xFFFFFFFA]
    assert world.send(CLIENT_PORT, frame("10.0.0.1", "10.0.0.2")) == []  # to our MAC, but nobody's business


def test_fragments_are_left_to_conntrack():
    world = World(site())
    for kind in (1, 3):
        h = transport("10.0.0.1", "10.0.0.100", 17, payload=bytes(64)) | {"ip_frag": kind}
        world.send(CLIENT_PORT, build(h))
        back = transport("10.0.0.11", "10.0.0.1", 17, sport=8080) | {"ip_frag": kind, "payload": bytes(64)}
        world.send(2, build(back))
    assert world.punts == []  # never taken for a port that nobody serves


def test_port_reuse_within_conntracks_memory_keeps_the_member():
    world = World(site())
    first = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", seq=1))[0]
    again = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", seq=99))[0]
    assert first == again and world.punts == [Kind.QUERY]


def test_rules_of_a_closed_connection_give_way_to_a_new_session():
    world = World(site(sites.server(state=State.RULES)))
    first = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", seq=1))[0]
    for cookie in [rule.cookie for rule in world.switch.rules.values() if rule.flags & 1]:
        world.switch.expire(cookie)
    world._answers()
    world.app._flush(world.state)
    assert not any(rule.flags & 1 for rule in world.switch.rules.values())
    second = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100", seq=99))[0]
    assert first != second
    assert sum(rule.flags & 1 for rule in world.switch.rules.values()) == 2


def test_closing_is_reported_where_connections_are_counted():
    world = World(site(algorithm=Algorithm.LEAST_CONNECTIONS))
    port, there = world.one(CLIENT_PORT, frame("10.0.0.1", "10.0.0.100"))
    fin = parse(reply_to(there)) | {"tcp_flags": 0x11}
    assert world.app.control.active(1) == 1
    assert world.one(port, build(fin))[0] == CLIENT_PORT
    assert world.punts == [Kind.QUERY, Kind.CLOSE]
    world.app._flush(world.state)
    assert world.app.control.active(1) == 0
    assert len(world.switch.conntrack[zones(1).service]) == 1


def test_neighbours_are_heard_and_switched_on():
    world = World(site())
    answer = build({"eth_dst": 5, "eth_src": 6, "eth_type": 0x806, "arp_op": 2, "arp_sha": 6, "arp_spa": 0x0A00000B,
                    "arp_tha": 5, "arp_tpa": 0x0A000001})
    assert [sent.port for sent in world.send(44, answer)] == [0xFFFFFFFA]
    assert world.app.control.host(1, "10.0.0.11") == Host(bytes(5) + b"\6", 44)
