# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections on their way from the client's first data to a member (:mod:`lbapp.dataflow.proxy`), as transcripts:
a client and a member that are played, a fast path that remembers, a clock that is told."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from lbapp.control.messages import AppQuery, AppReply, Binding, Edit, Error, Host, Query, Refused, Reply, Translation
from lbapp.dataflow import frames, handshake, proxy
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.frames import ACK, FIN, RST, SYN, Segment
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.dataflow.proxy import Proxy

SWITCH, SERVICE = 5, 7
CLIENT, VIP, MEMBERS = (bytes((10, 0, 0, 1)), 40000), (bytes((10, 0, 0, 100)), 80), {
    3: (bytes((10, 0, 0, 13)), 8080), 4: (bytes((10, 0, 0, 14)), 8080)}
CLIENT_MAC, MEMBER_MAC = bytes((10, 0, 0, 0, 0, 1)), bytes((10, 0, 0, 0, 0, 3))
CLIENT_WIRE, MEMBER_WIRE = 101, 104
ISN, COOKIE, MEMBER_ISN = 0xFFFFFFF0, 0x9A000001, 0xFFFF0000
REQUEST = b"GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"
OPTIONS = Options(1460, 7, True)


class Wire(NamedTuple):
    ifindex: int


class FakeFastPath:
    def __init__(self) -> None:
        self.ports = {1: Wire(CLIENT_WIRE), 4: Wire(MEMBER_WIRE)}
        self.room = layout.Result.OPENED
        self.installed: list[tuple[layout.FlowKey, layout.Flow]] = []
        self.splices: dict[int, layout.Splice] = {}
        self.closed: list[layout.FlowKey] = []
        self.injected: list[tuple[int, bytes]] = []
        self.sent: list[tuple[int, bytes]] = []
        self.pending_forgotten: list[layout.FlowKey] = []

    def port_of(self, ifindex: int) -> int | None:
        return next((number for number, wire in self.ports.items() if wire.ifindex == ifindex), None)

    def install(self, flows: Sequence[tuple[layout.FlowKey, layout.Flow]]) -> list[layout.Result]:
        self.installed += flows
        return [self.room] * (len(flows) // 2)

    def set_splices(self, splices: dict[int, layout.Splice]) -> None:
        self.splices.update(splices)

    def close_flow(self, key: layout.FlowKey) -> None:
        self.closed.append(key)

    def forget_pending(self, keys: Sequence[layout.FlowKey]) -> None:
        self.pending_forgotten += keys

    def inject(self, ifindex: int, frame: bytes) -> bool:
        self.injected.append((ifindex, frame))
        return True

    def send(self, ifindex: int, frame: bytes) -> bool:
        self.sent.append((ifindex, frame))
        return True


class World:
    """The proxy, and both ends of a connection."""

    def __init__(self) -> None:
        self.fast, self.counters = FakeFastPath(), Counter[str]()
        self.greeting: Greeting | None = Greeting(seconds=10.0)
        self.proxy = Proxy(self.fast, SWITCH, itertools.count(101, 2), self.flows, lambda _: self.greeting,
                           self.counters)
        self.states: list[int] = []

    def flows(self, reply: Reply, state: int) -> Any:
        self.states.append(state)
        if reply.translation is None or reply.translation.host.port not in self.fast.ports:
            return None
        key = layout.FlowKey(CLIENT[0], VIP[0], CLIENT[1], VIP[1], 6)
        return ((key, ("in", reply.member)), (key, ("out", reply.member)))

    def client(self, at: int = 0, payload: bytes = b"", flags: int = ACK, *, kind: int | None = None,
               now: float = 0.0, ack: int = COOKIE + 1, options: Options = OPTIONS,
               isn: int = ISN) -> AppQuery | None:
        """The client sends, from that offset of its data."""
        frame = frames.tcp(VIRTUAL_MAC, CLIENT_MAC, CLIENT, VIP, Segment(isn + 1 + at, ack, flags, 500, b"", payload))
        if kind is None:
            kind = layout.Ask.LATER if at or not payload else layout.Ask.DATA
        self.proxy.from_client(layout.QueryRecord(CLIENT_WIRE, SERVICE, frame, kind, options.pack()), now)
        return self.asked(now)

    def asked(self, now: float) -> AppQuery | None:
        questions = self.proxy.flush(now)
        assert len(questions) <= 1
        return questions[0] if questions else None

    def member(self, ack: int, flags: int = ACK, payload: bytes = b"", *, member: int = 3, seq: int = MEMBER_ISN,
               options: bytes = b"", now: float = 0.0) -> AppQuery | None:
        """The member sends; ``ack`` counts from the client's initial sequence number."""
        frame = frames.tcp(VIRTUAL_MAC, MEMBER_MAC, MEMBERS[member], CLIENT,
                           Segment(seq, ISN + ack, flags, 500, options, payload))
        self.proxy.from_member(layout.QueryRecord(MEMBER_WIRE, SERVICE, frame, layout.Ask.MEMBER, 0), now)
        return self.asked(now)

    def answer(self, query: Query, member: int = 3, binding: Binding = Binding.SPLICE, port: int = 4,
               now: float = 0.0) -> list[Refused]:
        address, number = MEMBERS[member]
        return self.proxy.reply([AppReply(query, Reply(query, Error.OK, member, Translation(
            address, number, Host(MEMBER_MAC, port))), binding)], now)

    def change(self, query: Query, edit: Edit, member: int = 3, now: float = 0.0) -> list[Refused]:
        address, number = MEMBERS[member]
        return self.proxy.reply([AppReply(query, Reply(query, Error.OK, member, Translation(
            address, number, Host(MEMBER_MAC, 4))), edit=edit)], now)

    def more(self, query: Query, now: float = 0.0) -> None:
        assert self.proxy.reply([AppReply(query)], now) == []

    def to_client(self) -> list[Segment]:
        return self._sent(CLIENT_WIRE, VIP, CLIENT, CLIENT_MAC)

    def to_member(self, member: int = 3) -> list[Segment]:
        return self._sent(MEMBER_WIRE, CLIENT, MEMBERS[member], MEMBER_MAC)

    def _sent(self, wire: int, source: tuple[bytes, int], destination: tuple[bytes, int], mac: bytes) -> list[Segment]:
        there, self.fast.sent = [frame for where, frame in self.fast.sent if where == wire], [
            one for one in self.fast.sent if one[0] != wire]
        found = []
        for frame in there:
            packet = frames.parse(frame)
            assert frames.with_checksum(frame, packet) == frame
            assert frame[:6] == mac
            assert packet.signature[:4] == (*source, *destination)
            found.append(frames.segment(frame, packet))
        return found


@pytest.fixture
def world() -> World:
    return World()


SYN_ACK = b"\x02\x04\x05\x8c\x01\x01\x04\x02\x01\x03\x03\x09"


def test_one_segment_is_spliced(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert asked.data == REQUEST
    assert (asked.seq, asked.ack) == (ISN + 1 & 0xFFFFFFFF, COOKIE + 1)
    assert asked.query[:4] == (101, SWITCH, 1, CLIENT_MAC)
    assert not world.answer(asked.query)
    assert world.states == [layout.SPLICE]
    (syn,) = world.to_member()
    assert syn == Segment(ISN, 0, SYN, 64240, b"\x02\x04\x05\xb4\x01\x01\x04\x02\x01\x03\x03\x07", b"")
    assert not world.fast.splices and not world.fast.injected
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, 9 - 7)}
    ((wire, frame),) = world.fast.injected
    assert wire == CLIENT_WIRE
    assert frames.segment(frame, frames.parse(frame)).payload == REQUEST
    assert not len(world.proxy) and not world.to_client() and not world.to_member(), "the client was told nothing"


def test_what_the_client_did_not_offer_is_not_offered(world: World) -> None:
    asked = world.client(0, REQUEST, options=Options(536, None, False))
    assert asked is not None
    world.answer(asked.query)
    assert world.to_member()[0].options == b"\x02\x04\x02\x18"
    world.member(1, SYN | ACK, options=b"\x02\x04\x05\xb4")
    assert world.fast.splices[101].shift == 0


def test_handoff_has_no_handshake(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query, binding=Binding.HANDOFF)
    assert world.states == [0]
    assert [wire for wire, _ in world.fast.injected] == [CLIENT_WIRE]
    assert not world.fast.sent and not len(world.proxy)


def test_a_request_in_pieces_is_acknowledged_and_then_repeated_until_it_has_arrived(world: World) -> None:
    asked = world.client(0, REQUEST[:5])
    assert asked is not None
    world.more(asked.query)
    assert world.to_client() == [Segment(COOKIE + 1, ISN + 6 & 0xFFFFFFFF, ACK, 14600 >> 7, b"", b"")]
    # The second piece comes twice, and behind the third.
    assert world.client(20, REQUEST[20:], now=0.1) is None
    again = world.client(5, REQUEST[5:20], now=0.2)
    assert again is not None
    assert again.data == REQUEST
    assert world.client(5, REQUEST[5:20], now=0.3) is None
    world.answer(again.query, binding=Binding.HANDOFF, now=0.3)
    assert world.states == [layout.SPLICE], "what was acknowledged cannot be handed off"
    assert world.to_member()[0].flags == SYN
    world.member(1, SYN | ACK, options=SYN_ACK, now=0.4)
    assert not world.fast.splices
    sent = Segment(ISN + 1 & 0xFFFFFFFF, MEMBER_ISN + 1, ACK | proxy.PSH, 500, b"", REQUEST)
    assert world.to_member() == [sent]
    # It is lost; a part of it arrives; then all.
    assert world.proxy.tick(0.5) == [] and not world.to_member()
    assert world.proxy.tick(0.8) == [] and world.to_member() == [sent]
    world.member(11, now=0.9)
    assert world.to_member() == [sent._replace(seq=ISN + 11 & 0xFFFFFFFF, payload=REQUEST[10:])]
    assert not world.fast.splices
    world.member(1 + len(REQUEST), payload=b"HTTP/1.1 200 OK", now=1.0)
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, 2)}
    ((wire, frame),) = world.fast.injected
    assert wire == MEMBER_WIRE
    assert frames.segment(frame, frames.parse(frame)).payload == b"HTTP/1.1 200 OK"
    assert not len(world.proxy)


CLOSE = Edit(len(REQUEST) - 2, 0, b"Connection: close\r\n")
SHORTER = Edit(0, 4, b"X")


@pytest.mark.parametrize("edit", [CLOSE, SHORTER], ids=["longer", "shorter"])
def test_what_the_member_is_told_instead_leaves_what_follows_its_numbers(world: World, edit: Edit) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert not world.change(asked.query, edit)
    assert world.states == [layout.SPLICE]
    more = len(edit.text) - edit.removed
    (syn,) = world.to_member()
    assert syn == Segment(ISN - more & 0xFFFFFFFF, 0, SYN, 64240, syn.options, b"")
    # Its client sends what follows the request; then it says all of it again.
    assert world.client(len(REQUEST), b"body") is None
    assert world.client(0, REQUEST + b"body") is None
    world.member(1 - more, SYN | ACK, options=SYN_ACK)
    told = REQUEST[:edit.at] + edit.text + REQUEST[edit.at + edit.removed:] + b"body"
    (sent,) = world.to_member()
    assert (sent.seq, sent.payload) == (ISN + 1 - more & 0xFFFFFFFF, told)
    assert world.client(0, REQUEST + b"body") is None and not world.fast.injected, "not by the client's segments"
    world.member(5 - more)
    assert [part.payload for part in world.to_member()] == [told[4:]]
    world.member(1 + len(REQUEST) + 4, payload=b"HTTP/1.1 200 OK")
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, 2)}, "nothing but the member's"
    ((wire, frame),) = world.fast.injected
    assert (wire, frames.segment(frame, frames.parse(frame)).payload) == (MEMBER_WIRE, b"HTTP/1.1 200 OK")
    assert not len(world.proxy) and not world.to_client()


def test_the_next_member_is_asked_for_with_what_the_client_said(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.change(asked.query, CLOSE)
    world.to_member()
    again = world.member(1 - len(CLOSE.text), RST | ACK, seq=0)
    assert again is not None
    assert (again.data, again.seq, again.failed) == (REQUEST, ISN + 1 & 0xFFFFFFFF, (3,))
    world.change(again.query, CLOSE, member=4)
    assert world.to_member(4)[0].seq == ISN - len(CLOSE.text) & 0xFFFFFFFF
    # No SYN but another one than the client's own begins anew.
    world.client(-1, b"", SYN, kind=layout.Ask.LATER)
    assert len(world.proxy) == 1
    world.client(-20, b"", SYN, kind=layout.Ask.LATER)
    assert len(world.proxy) == 0


def test_a_change_beyond_what_was_said_is_refused(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    (refused,) = world.change(asked.query, Edit(len(REQUEST), 1, b""))
    assert refused.serial == asked.query.serial
    assert world.to_client()[-1].flags & RST and not world.fast.installed
    assert not len(world.proxy) and not world.proxy._bytes


def test_an_answer_of_several_segments_is_passed_on_whole(world: World) -> None:
    """Those of the same batch, those that were read late, and what the client says meanwhile."""
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.change(asked.query, CLOSE)
    world.member(1 - len(CLOSE.text), SYN | ACK, options=SYN_ACK)
    end = 1 + len(REQUEST)

    def record(source: tuple[bytes, int], to: tuple[bytes, int], wire: int, kind: int, part: Segment) -> Any:
        return layout.QueryRecord(wire, SERVICE, frames.tcp(VIRTUAL_MAC, MEMBER_MAC, source, to, part), kind, 0)

    def of_member(at: int, payload: bytes, flags: int = ACK) -> Any:
        return record(MEMBERS[3], CLIENT, MEMBER_WIRE, layout.Ask.MEMBER,
                      Segment(MEMBER_ISN + 1 + at, ISN + end, flags, 500, b"", payload))

    for at, payload, flags in ((0, b"one", ACK), (3, b"two", ACK), (6, b"", ACK | RST)):
        world.proxy.from_member(of_member(at, payload, flags), 0.0)
    world.proxy.from_client(record(CLIENT, VIP, CLIENT_WIRE, layout.Ask.LATER, Segment(
        ISN + end, COOKIE + 1, ACK, 500, b"", b"next")), 0.0)
    assert world.asked(0.0) is None
    passed = [(wire, frames.segment(frame, frames.parse(frame))) for wire, frame in world.fast.injected]
    assert [(wire, part.payload, part.flags & RST) for wire, part in passed] == [
        (MEMBER_WIRE, b"onetwo", 0), (MEMBER_WIRE, b"", RST), (CLIENT_WIRE, b"next", 0)]
    world.proxy.from_member(of_member(6, b"late"), 0.1)
    assert world.asked(0.1) is None
    assert frames.segment(world.fast.injected[-1][1], frames.parse(world.fast.injected[-1][1])).payload == b"late"
    assert not world.counters["proxy_stray"] and not world.proxy._bytes


def test_a_large_request_goes_in_segments_the_member_can_take(world: World) -> None:
    data = bytes(range(256)) * 100
    asked = world.client(0, data[:1000])
    assert asked is not None
    world.more(asked.query)
    asked = world.client(1000, data[1000:], now=1.0)
    assert asked is not None
    world.answer(asked.query, now=1.0)
    world.to_member()
    world.member(1, SYN | ACK, options=b"\x02\x04\x02\x18", now=1.0)
    got, acked = b"", 0
    while acked < len(data):
        parts = world.to_member()
        assert parts
        assert sum(len(part.payload) for part in parts) <= proxy.WINDOW
        for part in parts:
            assert part.seq == ISN + 1 + len(got) & 0xFFFFFFFF
            assert len(part.payload) <= 536
            got += part.payload
        acked = len(got)
        world.member(1 + acked, now=1.0)
    assert got == data
    assert world.fast.splices


def test_a_slow_writer_is_not_asked_about_byte_by_byte(world: World) -> None:
    asked = world.client(0, b"G")
    assert asked is not None
    world.more(asked.query)
    questions = 0
    for index, byte in enumerate(b"ET / HTTP/1.1\r\n" * 20):
        question = world.client(1 + index, bytes((byte,)), now=0.001 * index)
        if question is not None:
            questions += 1
            world.more(question.query, now=0.001 * index)
        assert world.to_client()[-1].ack == ISN + 2 + index + 1 & 0xFFFFFFFF, "it may send on in any case"
    assert 0 < questions < 12
    assert len(world.proxy.tick(1.5)) == 1, "what it said since is asked about later"


def test_a_client_that_says_too_little_too_slowly(world: World) -> None:
    asked = world.client(0, b"GET")
    assert asked is not None
    world.more(asked.query)
    assert world.proxy.tick(9.9) == []
    (last,) = world.proxy.tick(10.0)
    assert last.timed_out and last.data == b"GET"
    # Nobody answers that either.
    world.to_client()
    assert world.proxy.tick(10.0 + proxy.GIVE_UP_SECONDS) == []
    assert [part.flags for part in world.to_client()] == [RST | ACK]
    assert not len(world.proxy)


def test_half_a_request_and_then_fin_is_all_there_will_be(world: World) -> None:
    asked = world.client(0, b"GET")
    assert asked is not None
    world.more(asked.query)
    last = world.client(3, b"", FIN | ACK, now=0.1)
    assert last is not None
    assert last.timed_out


def test_a_request_with_fin_goes_as_it_came(world: World) -> None:
    asked = world.client(0, REQUEST, FIN | ACK)
    assert asked is not None
    world.answer(asked.query)
    world.member(1, SYN | ACK)
    (frame,) = [frame for _, frame in world.fast.injected]
    assert frames.segment(frame, frames.parse(frame)).flags == FIN | ACK


def test_the_client_goes_away(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    world.to_member()
    assert world.client(len(REQUEST), b"", RST | ACK) is None
    assert [part.flags for part in world.to_member()] == [RST]
    assert len(world.fast.closed) == 1 and not len(world.proxy)
    world.member(1, SYN | ACK)
    assert not world.fast.splices and world.counters["proxy_stray"] == 1


def test_the_next_member_where_one_refuses(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    world.to_member()
    again = world.member(1, RST | ACK, seq=0)
    assert again is not None
    assert again.failed == (3,) and again.query.serial != asked.query.serial
    assert again.data == REQUEST
    assert len(world.fast.closed) == 1
    world.answer(again.query, member=4)
    assert world.to_member(4)[-1].flags == SYN
    world.member(1, SYN | ACK, member=4)
    assert list(world.fast.splices) == [again.query.serial]
    assert len(world.fast.injected) == 1


def test_a_member_that_remembers_an_older_connection_is_told_to_forget_it(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    (syn,) = world.to_member()
    for _ in range(5):
        world.member(5000, ACK)
    sent = world.to_member()
    assert sent == [Segment(ISN + 5000 & 0xFFFFFFFF, 0, RST, 0, b"", b""), syn] * 3, "and not for ever"
    world.member(1, SYN | ACK)
    assert world.fast.splices


def test_a_forged_reset_is_none(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    assert world.member(77, RST | ACK, seq=0) is None
    world.member(1, SYN | ACK)
    assert world.fast.splices


def test_the_next_member_where_one_is_silent(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    world.to_member()
    assert world.proxy.tick(0.9) == [] and not world.to_member()
    assert world.proxy.tick(1.0) == []
    assert [part.flags for part in world.to_member()] == [SYN]
    assert world.proxy.tick(2.9) == []
    (again,) = world.proxy.tick(3.0)
    assert again.failed == (3,)
    # No other one: an answer of our own, or a reset.
    world.proxy.reply([AppReply(again.query, Reply(again.query, Error.NOTAVAIL), answer=b"HTTP/1.1 503 \r\n\r\n")], 3.0)
    assert world.to_client()[0].payload == b"HTTP/1.1 503 \r\n\r\n"


def test_an_answer_of_our_own_is_repeated_until_the_client_has_closed(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    answer = b"HTTP/1.1 302 Found\r\n\r\n" + bytes(3000)
    world.proxy.reply([AppReply(asked.query, Reply(asked.query, Error.NOTAVAIL), answer=answer)], 0.0)
    parts = world.to_client()
    assert b"".join(part.payload for part in parts) == answer
    assert [part.flags & FIN for part in parts] == [0, 0, FIN]
    assert [part.seq for part in parts] == [COOKIE + 1, COOKIE + 1461, COOKIE + 2921]
    assert {part.ack for part in parts} == {ISN + 1 + len(REQUEST) & 0xFFFFFFFF}
    world.proxy.tick(proxy.REPEAT_SECONDS)
    assert world.to_client() == parts
    end = COOKIE + 2 + len(answer)
    assert world.client(len(REQUEST), b"", FIN | ACK, ack=end) is None
    assert world.to_client() == [Segment(end, ISN + 2 + len(REQUEST) & 0xFFFFFFFF, ACK, 14600 >> 7, b"", b"")]
    assert not len(world.proxy) and not world.fast.installed


def test_an_answer_that_nobody_takes_is_given_up(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.proxy.reply([AppReply(asked.query, Reply(asked.query, Error.NOTAVAIL), answer=b"x")], 0.0)
    for second in range(60):
        world.proxy.tick(float(second))
    assert not len(world.proxy)
    sent = world.to_client()
    assert len(sent) == proxy.REPEATS + 1 and sent[-1].flags & RST


def test_a_refusal_without_answer_is_a_reset(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.proxy.reply([AppReply(asked.query, Reply(asked.query, Error.NOTAVAIL))], 0.0)
    assert world.to_client() == [Segment(COOKIE + 1, ISN + 1 + len(REQUEST) & 0xFFFFFFFF, RST | ACK, 0, b"", b"")]
    assert world.fast.pending_forgotten and not len(world.proxy)


def test_no_room_and_no_port(world: World) -> None:
    world.fast.room = layout.Result.FULL
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert world.answer(asked.query) == [Refused(SWITCH, 101, SERVICE)]
    assert world.to_client()[0].flags & RST
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert world.answer(asked.query, port=99) == [Refused(SWITCH, 103, SERVICE)]
    assert world.counters["reply_unknown_port"] == 1 and not len(world.proxy)


def test_an_answer_for_nobody_is_refused_so_that_it_is_forgotten(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.client(0, b"", RST)
    assert world.answer(asked.query) == [Refused(SWITCH, 101, SERVICE)]


def test_a_client_that_begins_anew(world: World) -> None:
    first = world.client(0, b"GET")
    assert first is not None
    second = world.client(0, REQUEST, ack=COOKIE + 1000, isn=55)
    assert second is not None
    assert second.query.serial != first.query.serial and second.seq == 56
    assert len(world.proxy) == 1


def test_a_syn_that_was_late_is_none(world: World) -> None:
    first = world.client(0, REQUEST)
    assert first is not None
    world.answer(first.query)
    assert world.client(-1, b"", SYN, ack=0) is None
    assert len(world.proxy) == 1
    assert world.client(-1, b"", SYN, ack=0, isn=77) is None
    assert len(world.proxy) == 0 and len(world.fast.closed) == 1


def test_late_segments_of_a_connection_that_is_ready_are_passed_on_once(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    world.member(1, SYN | ACK)
    assert len(world.fast.injected) == 1
    assert world.client(len(REQUEST), b"body") is None
    assert len(world.fast.injected) == 2
    world.proxy._passed.clear()
    assert world.client(len(REQUEST), b"body") is None
    assert len(world.fast.injected) == 2 and world.counters["proxy_stray"] == 1


def test_a_batch_is_one_question(world: World) -> None:
    for at in range(0, len(REQUEST), 10):
        frame = frames.tcp(VIRTUAL_MAC, CLIENT_MAC, CLIENT, VIP, Segment(ISN + 1 + at, COOKIE + 1, ACK, 500, b"",
                                                                       REQUEST[at:at + 10]))
        world.proxy.from_client(layout.QueryRecord(
            CLIENT_WIRE, SERVICE, frame, layout.Ask.LATER if at else layout.Ask.DATA, OPTIONS.pack()), 0.0)
    asked = world.asked(0.0)
    assert asked is not None
    assert asked.data == REQUEST
    # A question that was asked twice is answered twice.
    one = AppReply(asked.query, Reply(asked.query, Error.OK, 3, Translation(*MEMBERS[3], Host(MEMBER_MAC, 4))))
    assert world.proxy.reply([one, one], 0.0) == []
    assert len(world.fast.installed) == 2
    world.member(1, SYN | ACK)
    assert len(world.fast.injected) == 4


def test_asked_again_when_the_client_repeats_itself(world: World) -> None:
    assert world.client(0, REQUEST) is not None
    assert world.client(0, REQUEST, now=0.2) is None
    again = world.client(0, REQUEST, now=0.6)
    assert again is not None
    assert again.query.serial == 101


def test_tables_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MAX_HANDSHAKES", 3)
    for port in range(5):
        monkeypatch.setattr(f"{__name__}.CLIENT", (CLIENT[0], 50000 + port))
        assert world.client(0, b"GET") is not None
    assert len(world.proxy) == 3 and world.counters["proxy_dropped"] == 2
    monkeypatch.setattr(proxy, "MAX_TOTAL", 100)
    monkeypatch.setattr(f"{__name__}.CLIENT", (CLIENT[0], 60000))
    assert world.client(0, bytes(500)) is not None
    monkeypatch.setattr(f"{__name__}.CLIENT", (CLIENT[0], 60001))
    assert world.client(0, b"GET") is not None
    assert len(world.proxy) == 1 and world.proxy._bytes == 3


def test_what_is_kept_of_one_connection_is_bounded(world: World) -> None:
    world.client(0, b"GET ")
    for at in range(4, 200_000, 1000):
        world.client(at, bytes(1000), now=at / 1000)
        world.client(at + 5000, bytes(10), now=at / 1000)
    (one,) = world.proxy._all.values()
    assert len(one.data) == handshake.MAX_DATA
    assert len(one.ahead) <= handshake.MAX_AHEAD
    assert world.proxy._bytes == handshake.MAX_DATA


def test_no_greeting_no_connection(world: World) -> None:
    world.greeting = None
    assert world.client(0, REQUEST) is None
    assert not len(world.proxy)


def test_a_question_that_is_lost_is_asked_again_and_given_up_at_last(world: World) -> None:
    first = world.client(payload=REQUEST, flags=ACK, now=10.0)
    assert first is not None
    assert world.proxy.tick(10.4) == []
    assert world.proxy.tick(10.5) == [first], "the same question: nothing has changed"
    assert world.proxy.tick(10.75) == []
    assert [len(world.proxy.tick(when)) for when in (11.0, 11.5, 12.0, 12.5)] == [1, 1, 1, 1]
    assert world.to_client() == []
    assert world.proxy.tick(13.0) == []
    assert world.to_client()[0].flags & RST and world.counters["unanswered"] == 1
    assert len(world.proxy) == 0


def test_an_answer_to_an_earlier_question_is_none_to_a_later_one(world: World) -> None:
    first = world.client(payload=REQUEST[:-4], now=10.0)
    second = world.client(len(REQUEST) - 4, REQUEST[-4:], now=10.2)
    assert first is not None and second is not None
    world.more(first.query, 10.3)
    assert world.proxy.tick(10.6) == []
    assert world.proxy.tick(10.7) == [second], "the second one was lost"
    world.more(second.query, 10.8)
    assert world.proxy.tick(11.5) == [], "now all are answered"
    assert world.proxy.tick(14.0) == [], "and the client has its time"
    assert len(world.proxy) == 1


def test_questions_asked_again_are_not_all_asked_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MOST_AGAIN", 2)
    for port in range(40_000, 40_005):
        frame = frames.tcp(VIRTUAL_MAC, CLIENT_MAC, (CLIENT[0], port), VIP,
                           Segment(ISN + 1, COOKIE + 1, ACK, 500, b"", REQUEST))
        world.proxy.from_client(layout.QueryRecord(CLIENT_WIRE, SERVICE, frame, layout.Ask.DATA, OPTIONS.pack()), 10.0)
    assert len(world.proxy.flush(10.0)) == 5
    assert [len(world.proxy.tick(when)) for when in (10.6, 10.6, 10.6, 10.6)] == [2, 2, 1, 0]
