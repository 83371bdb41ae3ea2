# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Relayed connections from packet-in to packet-out (:mod:`lbapp.relays`), with the control segment itself and a client
and a member that are played."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest

from lbapp.config.model import (
    Algorithm,
    Application,
    Binding,
    Configuration,
    Member,
    Pool,
    Protocol,
    VirtualServer,
)
from lbapp.config.monitor import Passive
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import FlowSignature, Host, NeighbourSeen, NewFlow, Query, Reap, SwitchUp, Translation
from lbapp.dataflow.carrier import PacketIn
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN
from lbapp.dataflow.pipeline import VIRTUAL_MAC, Kind, cookie
from lbapp.fastpaths import FastPaths
from lbapp.relays import RelayLink
from tests.fastpath_packets import CLIENT_MAC, MEMBER_MAC, Seen, frame, read

SWITCH, NUMBER = 5, 7
CLIENT, VIP, MEMBER = "10.0.0.1", "10.0.0.100", "10.0.0.13"
CLIENT_PORT, MEMBER_PORT = 1, 4
ISN, MEMBER_ISN = 1000, 70000
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x01\x01\x01\x03\x03\x07"
WORD = 0xFFFFFFFF
NEW = NewFlow(Query(1, SWITCH, 1, CLIENT_MAC, FlowSignature(bytes(4), 1, bytes(4), 2, 6), NUMBER, 0), 3,
              Translation(None, 0, Host(MEMBER_MAC, 4)))


class World:
    """One switch, one virtual server, one member."""

    def __init__(self, binding: Binding = Binding.AUTO, **more: Any) -> None:
        pool = Pool(name="p", id="p", members=(Member(address=MEMBER, protocol_port=8080, number=3, id="3"),), **more)
        self.configuration = Configuration(pools={"p": pool}, virtual_servers={"v": VirtualServer(
            name="v", id="v", number=NUMBER, vip_address=VIP, protocol=Protocol.TCP, protocol_port=80,
            default_pool_id="p", application=Application.HTTP, binding=binding)})
        self.control = ControlSegment()
        self.control.configure(self.configuration, 0.0)
        self.control.handle(SwitchUp(SWITCH, {}), 0.0)
        self.control.handle(NeighbourSeen(SWITCH, MEMBER, Host(MEMBER_MAC, MEMBER_PORT)), 0.0)
        self.handed: list[NewFlow] = []
        self.takes = True
        self.sent: list[bytes] = []
        self.relays = FastPaths(self.control, lambda _: None, lambda *_: True, relaying=True)
        self.relays.configure(self.configuration)
        self.link = RelayLink(SWITCH, self.relays, self.sent.append, self.hand_over,
                              lambda number: binding is Binding.HYBRID)
        self.relays.add(SWITCH, self.link)

    def hand_over(self, flow: NewFlow) -> bool:
        self.handed.append(flow)
        return self.takes

    def comes(self, data: bytes, port: int, owner: int = NUMBER) -> list[tuple[int, Seen]]:
        """A packet-in, and what leaves for it: ports and frames."""
        number, out = self.link.packet_in(PacketIn(cookie(Kind.RELAY, owner), port, data, b""))
        assert number == NUMBER
        return packet_outs(out)

    def client(self, flags: int, at: int = 1, ack: int = 0, **more: Any) -> list[tuple[int, Seen]]:
        return self.comes(frame(CLIENT, VIP, flags=flags, seq=ISN + at & WORD, ack=ack, **more), CLIENT_PORT)

    def member(self, flags: int, at: int = 1, ack: int = 0, **more: Any) -> list[tuple[int, Seen]]:
        return self.comes(frame(MEMBER, CLIENT, 6, 8080, 40000, flags=flags, seq=MEMBER_ISN + at & WORD, ack=ack,
                                eth_dst=VIRTUAL_MAC, eth_src=MEMBER_MAC, **more), MEMBER_PORT, 0)

    def establish(self) -> int:
        """Up to the member's having the request; returns the sequence number that the client was given."""
        ((port, greeting),) = self.client(SYN, 0, tcp_options=OPTIONS)
        assert (port, greeting.flags, greeting.ack) == (CLIENT_PORT, SYN | ACK, ISN + 1)
        assert self.client(ACK, ack=greeting.seq + 1) == []
        ((port, opening),) = self.client(ACK | PSH, ack=greeting.seq + 1, payload=REQUEST)
        assert (port, opening.flags, opening.seq, opening.destination) == (MEMBER_PORT, SYN, ISN, MEMBER)
        ((port, first),) = self.member(SYN | ACK, 0, ack=ISN + 1, tcp_options=OPTIONS)
        assert (port, first.payload, first.seq, first.ack) == (MEMBER_PORT, REQUEST, ISN + 1, MEMBER_ISN + 1)
        return greeting.seq


def packet_outs(data: bytes) -> list[tuple[int, Seen]]:
    """Packet-outs with one output each."""
    found = []
    while data:
        version, kind, length = struct.unpack_from("!BBH", data)
        assert (version, kind) == (4, 13)
        (actions,) = struct.unpack_from("!H", data, 16)
        action, size, port = struct.unpack_from("!HHI", data, 24)
        assert (action, size, actions) == (0, 16, 16)
        found.append((port, read(data[24 + actions:length])))
        data = data[length:]
    return found


def test_a_connection_from_its_first_packet_to_its_last() -> None:
    world = World()
    seq = world.establish()
    ((port, seen),) = world.member(ACK | PSH, ack=ISN + 1 + len(REQUEST), payload=b"answer")
    assert (port, seen.source, seen.sport, seen.seq, seen.payload) == (CLIENT_PORT, VIP, 80, seq + 1, b"answer")
    assert world.link.read().connections == 1
    (held,) = world.link.connections(10)
    assert (held.virtual_server, held.member, held.packets) == (NUMBER, 3, 2)
    world.client(ACK | FIN, 1 + len(REQUEST), ack=seq + 7)
    world.member(ACK | FIN, 7, ack=ISN + 2 + len(REQUEST))
    world.link.tick(0.0)
    counted = world.control.statistics().virtual_servers[NUMBER]
    assert (counted.opened, counted.closed) == (1, 1)
    assert world.handed == [] and world.sent == []


@pytest.mark.parametrize("minds", [False, True])
def test_a_members_own_errors_are_failures_where_the_pool_says_so(minds: bool) -> None:
    world = World(passive=Passive(server_errors=minds))
    world.establish()
    world.member(ACK | PSH, ack=ISN + 1 + len(REQUEST), payload=b"HTTP/1.1 503 Service Unavailable\r\n")
    world.link.tick(0.0)
    assert list(world.control.failures) == ([(3, "status 503")] if minds else [])


def test_a_member_that_does_not_answer_what_is_relayed() -> None:
    """The client's request went to it; it is asked for twice, and has said nothing."""
    world = World(passive=Passive(first_byte=1.0))
    world.establish()
    world.control.tick(0.0)
    for now in (2.0, 4.0):
        for asked in world.control.tick(now):
            assert isinstance(asked, Reap)
            world.link.reap([asked])
        world.link.tick(now)
    assert list(world.control.failures) == [(3, "no answer within 1 s")]


def test_a_member_may_adopt_what_is_relayed() -> None:
    """It gets the request itself, with the client's numbers and the cookie's; nothing but addresses is translated."""
    world = World()
    world.control.adopting = frozenset({(MEMBER, 8080)})
    ((_, greeting),) = world.client(SYN, 0, tcp_options=OPTIONS)
    ((port, first),) = world.client(ACK | PSH, ack=greeting.seq + 1, payload=REQUEST)
    assert (port, first.destination, first.dport, first.payload) == (MEMBER_PORT, MEMBER, 8080, REQUEST)
    assert (first.seq, first.ack) == (ISN + 1, greeting.seq + 1)
    ((port, seen),) = world.comes(frame(MEMBER, CLIENT, 6, 8080, 40000, flags=ACK, seq=greeting.seq + 1, ack=ISN + 5,
                                        eth_dst=VIRTUAL_MAC, eth_src=MEMBER_MAC, payload=b"answer"), MEMBER_PORT, 0)
    assert (port, seen.source, seen.seq, seen.payload) == (CLIENT_PORT, VIP, greeting.seq + 1, b"answer")


def test_hybrid_hands_over_with_offsets() -> None:
    world = World(Binding.HYBRID)
    seq = world.establish()
    (flow,) = world.handed
    assert (flow.member, flow.seq_offset, flow.ack_offset) == (3, 0, MEMBER_ISN - seq & WORD)
    assert (flow.query.virtual_server, flow.query.in_port, flow.query.client_mac) == (NUMBER, CLIENT_PORT, CLIENT_MAC)
    assert flow.translation.host == Host(MEMBER_MAC, MEMBER_PORT)
    assert not world.link.holds(flow.query.serial)
    ((_, seen),) = world.member(ACK, ack=ISN + 1 + len(REQUEST))
    assert seen.seq == seq + 1, "what was on its way is translated here"
    assert world.handed == [flow]
    world.member(FIN | ACK, ack=ISN + 1 + len(REQUEST))
    assert world.handed[1:] == [flow._replace(member_finished=True)], "the fast path has not seen that"
    world.client(RST, 1 + len(REQUEST))
    assert world.handed[2:] == [flow._replace(member_finished=True, client_finished=True)]
    world.link.tick(0.0)
    assert world.control.statistics().virtual_servers[NUMBER].closed == 0, "the fast path will tell"


def test_hybrid_hands_over_what_a_member_adopts_at_once() -> None:
    world = World(Binding.HYBRID)
    world.control.adopting = frozenset({(MEMBER, 8080)})
    ((_, greeting),) = world.client(SYN, 0, tcp_options=OPTIONS)
    ((_, first),) = world.client(ACK | PSH, ack=greeting.seq + 1, payload=REQUEST)
    assert first.payload == REQUEST
    (flow,) = world.handed
    assert (flow.member, flow.ack_offset) == (3, None) and not world.link.holds(flow.query.serial)


def test_what_no_fast_path_takes_is_relayed_on() -> None:
    world = World(Binding.HYBRID)
    world.takes = False
    world.establish()
    assert world.link.holds(world.handed[0].query.serial)
    world.client(RST, 1 + len(REQUEST))
    world.link.tick(0.0)
    assert world.control.statistics().virtual_servers[NUMBER].closed == 1


def test_a_fast_path_that_comes_later_has_what_is_there() -> None:
    world = World()
    world.establish()
    assert world.handed == []
    assert world.link.offer_all() == 1 and len(world.handed) == 1
    assert world.link.offer_all() == 0


def test_a_members_other_packets_go_on() -> None:
    world = World()
    data = frame(MEMBER, "10.0.0.9", 6, 8080, 40001, flags=ACK, payload=b"x" * 10)
    number, out = world.link.packet_in(PacketIn(cookie(Kind.RELAY), MEMBER_PORT, data, b""))
    assert number == 0 and out.endswith(data)
    assert struct.unpack_from("!I", out, 12) == (MEMBER_PORT,), "as if it came in there"
    long = frame(MEMBER, "10.0.0.9", 6, 8080, 40001, flags=ACK, payload=bytes(4000))
    assert len(world.link.packet_in(PacketIn(cookie(Kind.RELAY), MEMBER_PORT, long, b""))[1]) > 4000
    broken = data[:40]
    assert world.link.packet_in(PacketIn(cookie(Kind.RELAY), MEMBER_PORT, broken, b""))[0] == 0
    strange = frame(CLIENT, "10.0.0.101", flags=SYN)
    assert world.link.packet_in(PacketIn(cookie(Kind.RELAY, 99), CLIENT_PORT, strange, b"")) == (0, b"")


def test_nobody_relays_for_a_virtual_server_that_is_gone() -> None:
    world = World()
    world.establish()
    world.link.configure({NUMBER: None})
    world.link.tick(0.0)
    assert world.link.read().connections == 0
    assert world.control.statistics().virtual_servers[NUMBER].closed == 1


def test_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that does not answer is asked again, from a tick."""
    world = World()
    ((_, greeting),) = world.client(SYN, 0, tcp_options=OPTIONS)
    world.client(ACK | PSH, ack=greeting.seq + 1, payload=REQUEST)
    monkeypatch.setattr("lbapp.dataflow.proxy.OPEN_SECONDS", 0.0)
    world.link.tick(time.monotonic() + 2)
    ((port, seen),) = packet_outs(b"".join(world.sent))
    assert (port, seen.flags, seen.seq) == (MEMBER_PORT, SYN, ISN)


def test_the_link() -> None:
    world = World(lb_algorithm=Algorithm.LEAST_CONNECTIONS)
    assert world.link.deliver([]) == [] and not world.link.take_over(NEW)
    world.establish()
    ((serial, number, member),) = world.link.live()
    assert (number, member) == (NUMBER, 3)
    world.link.reap([Reap(SWITCH, serial, NUMBER, 3, final=True)])
    world.link.tick(0.0)
    assert world.control.statistics().virtual_servers[NUMBER].active == 0
    world.link.close()
