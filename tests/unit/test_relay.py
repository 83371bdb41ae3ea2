# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Relayed connections (lbapp.dataflow.relay, lbapp.dataflow.splicing): the same packets go through the fast path's
programs and through what stands in for them, and the same comes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from lbapp.dataflow import frames, relay, splicing
from lbapp.dataflow.fastpath import cookies, kernel, layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import Ask, Flow, FlowKey, Reason, Result, Splice
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN
from lbapp.dataflow.relay import Relay
from tests.fastpath_packets import (
    BOTH,
    FAMILIES,
    REDIRECT,
    SHOT,
    TCP,
    WIRE,
    Bench,
    answer,
    entries,
    frame,
    packed,
    read,
    request,
)
from tests.relay_world import (
    ISN,
    KEYS,
    LINUX,
    MEMBER,
    SERIAL,
    SERVICE,
    WORD,
    Clock,
    offer,
    pair,
    walked,
)

pytest_plugins = ["tests.fastpath_packets", "tests.relay_world"]


class Twins:
    """The programs, and what stands in for them."""

    def __init__(self, tables: Bench, here: Relay) -> None:
        self.tables, self.here = tables, here
        offer(tables)

    def install(self, flows: Sequence[tuple[FlowKey, Flow]]) -> Result:
        (one,), (other,) = self.tables.install(entries(flows)), self.here.install(entries(flows))
        assert one is other
        return one

    def splice(self, splices: dict[int, Splice]) -> None:
        assert self.tables.set_splices(splices) == self.here.set_splices(splices)

    def forwarded(self, data: bytes) -> bytes:
        """The same bytes leave both."""
        verdict, out, _ = kernel.run(self.tables.programs["wire"], data, room=len(data) + 256)
        assert verdict == REDIRECT
        number = self.here.packet(WIRE, data)
        made, self.here.out = self.here.out, []
        if out == data:
            assert (number, made) == (None, []), "it is left to the switch"
        else:
            assert (number, made) == (SERVICE, [(WIRE, out)])
        return bytes(out)

    def answered(self, data: bytes) -> tuple[Any, ...]:
        """Both answer the same, but for what an IP header may say of a packet of its own."""
        verdict, out, _ = kernel.run(self.tables.programs["wire"], data, room=len(data) + 256)
        assert verdict == REDIRECT
        (made,) = walked(self.here, data)
        one, other = read(bytes(out)), read(made)
        told = (one.source, one.destination, one.sport, one.dport, one.seq, one.ack, one.flags, one.window,
                one.tcp_options, one.payload)
        assert told == (other.source, other.destination, other.sport, other.dport, other.seq, other.ack, other.flags,
                        other.window, other.tcp_options, other.payload)
        assert made[:12] == out[:12]
        return told

    def kept(self, data: bytes) -> list[tuple[int, int]]:
        """Nothing leaves; what comes up for the agent is the same: its kind, and the cookie's options."""
        verdict, _, _ = kernel.run(self.tables.programs["wire"], data, room=len(data) + 256)
        assert verdict == SHOT
        assert walked(self.here, data) == []
        one, other = self.tables.queries(), self.here.queries()
        assert [record._replace(ifindex=0) for record in one] == [record._replace(ifindex=0) for record in other]
        return [(record.kind, record.options) for record in other]

    def ended(self) -> list[tuple[int, ...]]:
        """What is told of connections that ended, but for what state that was, and how long they took."""
        told = [[(*one[:9], *one[11:]) for one in paths.closed()] for paths in (self.tables, self.here)]
        assert told[0] == told[1]
        return [one[8:] for one in told[1]]


@pytest.fixture
def twins(tables: Bench, here: Relay) -> Twins:
    return Twins(tables, here)


def cookie(family: int) -> int:
    return cookies.make(KEYS, 0, packed(FAMILIES[family][0]), 40000, ISN, Options(1460, 7, True))


# ------------------------------------------------------------------ as the programs do


@BOTH
@pytest.mark.parametrize("routed", [False, True], ids=["bridged", "routed"])
def test_packets_are_translated_alike(twins: Twins, family: int, routed: bool) -> None:
    """Random ones, of every kind that a connection has."""
    random.seed(family + routed)
    for turn in range(150):
        twins.tables.reset()
        offer(twins.tables)
        twins.here.delete(everything=True)
        twins.here.closed()
        spliced = bool(turn % 4)
        assert twins.install(pair(family, layout.SPLICE if spliced else 0, routed=routed)) is Result.OPENED
        if spliced:
            twins.splice({SERIAL: Splice(random.getrandbits(32), random.randint(-14, 14), random.randint(-14, 14))})
        for data in (random_packet(family, request), random_packet(family, answer)):
            twins.forwarded(data)


def random_packet(family: int, made: Any) -> bytes:
    blocks = random.randint(0, 3)
    options = b"\x01" * random.randint(0, 3)
    if blocks:
        options += bytes((5, 2 + 8 * blocks)) + random.randbytes(8 * blocks)
    options += b"\x08\x0a" + random.randbytes(8) if random.random() < 0.3 and len(options) <= 30 else b""
    flags = random.choice([ACK, ACK | PSH, ACK | FIN, RST, ACK | RST, SYN, SYN | ACK, FIN, 0])
    return bytes(made(family, flags=flags, seq=random.getrandbits(32), ack=random.getrandbits(32),
                      window=random.getrandbits(16), tcp_options=options,
                      payload=random.randbytes(random.randint(0, 60)), ttl=random.randint(2, 255)))


@BOTH
def test_handshakes_are_answered_alike(twins: Twins, family: int) -> None:
    for options in (b"", LINUX, b"\x02\x04\x05\xb4", b"\x02\x04\x05\xb4\x01\x03\x03\x0e", b"\x04\x02\x01\x01",
                    b"\x02\x04", b"\x03\x03\xff\x01", b"\x05\x01\x02\x04", b"\x02\x04\x00\x00"):
        told = twins.answered(request(family, SYN, seq=ISN, tcp_options=options))
        assert told[5:8] == (ISN + 1 & WORD, SYN | ACK, layout.WINDOW)
        top = cookies.check(KEYS, packed(FAMILIES[family][0]), 40000, ISN, told[4])
        assert top is not None
        offered = Options.offered(options)
        assert Options.of(top)._replace(mss=0) == offered._replace(mss=0)


@BOTH
def test_what_clients_say_next_is_taken_alike(twins: Twins, family: int) -> None:
    by = cookie(family)
    top = by >> 23
    seen = {"seq": ISN + 1 & WORD, "ack": by + 1 & WORD}
    assert twins.kept(request(family, ACK, **seen)) == [], "the ACK of the handshake"
    assert twins.kept(request(family, RST, **seen)) == []
    assert twins.kept(request(family, ACK, **{**seen, "ack": 77}, payload=b"forged")) == []
    assert twins.kept(request(family, FIN, **seen)) == []
    assert twins.answered(request(family, ACK, **{**seen, "seq": ISN}))[5] == ISN + 1 & WORD, "a keep-alive probe"
    assert twins.answered(request(family, ACK | FIN, **seen))[6] == RST, "it leaves without a word"
    assert twins.kept(request(family, ACK | PSH, **seen, payload=b"GET / HT")) == [(Ask.DATA, top)]
    assert twins.kept(request(family, ACK | PSH, **seen, payload=b"GET / HT")) == [(Ask.DATA, top)]
    later = {**seen, "seq": ISN + 9 & WORD}
    assert twins.kept(request(family, ACK, **later, payload=b"TP/1.1\r\n")) == [(Ask.LATER, top)]
    assert twins.kept(request(family, ACK, **later)) == []
    assert twins.kept(request(family, ACK | FIN, **later)) == [(Ask.LATER, top)]
    told = twins.answered(request(family, SYN, seq=ISN, tcp_options=LINUX))
    assert told[4] == by, "the SYN again: the same cookie"
    assert twins.kept(request(family, RST, **later)) == [(Ask.LATER, top)]
    assert twins.kept(request(family, ACK, **later, payload=b"TP/1.1\r\n")) == [], "it was forgotten"


@BOTH
def test_what_is_replayed_is_taken_alike(twins: Twins, clock: Clock, family: int) -> None:
    """While its connection lives, when it has ended, when nothing is left of it, and when its key has gone."""
    by = cookie(family)
    ack = request(family, ACK, seq=ISN + 1 & WORD, ack=by + 1)
    first = request(family, ACK | PSH, seq=ISN + 1 & WORD, ack=by + 1, payload=b"GET / HTTP/1.1")
    assert twins.kept(first) == twins.kept(first) == [(Ask.DATA, by >> 23)]
    twins.install(pair(family))
    twins.splice({SERIAL: Splice(5)})
    for end in ((), (answer(family, ACK | RST),)):
        for data in (*end, ack, first):
            twins.forwarded(data)
    assert len(twins.ended()) == 1
    clock.now += 6
    for paths in (twins.tables, twins.here):
        assert paths.sweep(linger_ms=0).shutdown == 1
    assert twins.kept(ack) == [] and twins.kept(first) == [(Ask.DATA, by >> 23)], "as good as the first time"
    for paths in (twins.tables, twins.here):
        paths.set_cookies((b"another".ljust(16), KEYS[1]), 1)
    assert twins.kept(first) == [], "though it is known what was said"
    for paths in (twins.tables, twins.here):
        paths.forget_pending([pair(family)[0][0]])
    assert twins.kept(ack) == twins.kept(first) == []


@BOTH
def test_until_the_member_is_there_all_goes_to_the_agent_alike(twins: Twins, family: int) -> None:
    twins.install(pair(family))
    top = cookie(family) >> 23
    ack = cookie(family) + 1
    assert twins.kept(request(family, ACK, ack=ack)) == []
    assert twins.kept(request(family, ACK, ack=ack, payload=b"x")) == [(Ask.LATER, top)]
    assert twins.kept(request(family, RST | ACK, ack=ack)) == [(Ask.LATER, top)]
    assert twins.kept(answer(family, SYN | ACK)) == [(Ask.MEMBER, 0)]
    assert twins.kept(answer(family, ACK)) == [(Ask.MEMBER, 0)]
    twins.splice({SERIAL: Splice(5), 77: Splice(6)})
    twins.forwarded(request(family, ACK, ack=ack, payload=b"x"))
    twins.forwarded(answer(family, ACK))


@BOTH
@pytest.mark.parametrize("ends", [["request", "answer"], ["answer", "request"], ["reset"], ["answer", "reset"]])
def test_ends_are_told_of_alike(twins: Twins, family: int, ends: list[str]) -> None:
    twins.install(pair(family))
    twins.splice({SERIAL: Splice(5)})
    twins.forwarded(request(family, ACK, payload=b"question"))
    twins.forwarded(answer(family, ACK, payload=b"answer"))
    assert twins.ended() == []
    for end in ends:
        twins.forwarded({"request": request(family, ACK | FIN), "answer": answer(family, ACK | FIN),
                         "reset": request(family, RST)}[end])
    ((reason, *_),) = twins.ended()
    assert reason == Reason.SHUTDOWN
    twins.forwarded(answer(family, ACK))
    assert twins.ended() == [], "told once"
    assert twins.install(pair(family, serial=10)) is Result.OPENED, "its place is another one's now"


def test_places_are_had_once(twins: Twins) -> None:
    assert twins.install(pair()) is Result.OPENED
    assert twins.install(pair(serial=10)) is Result.EXISTS
    other = pair(serial=11)
    other[0] = (other[0][0]._replace(destination_port=81), other[0][1])
    assert twins.install(other) is Result.TAKEN


# ------------------------------------------------------------------ what programs have not


def test_what_is_longer_than_a_frame_is_divided(here: Relay) -> None:
    """As offload makes them: their last part alone ends the stream."""
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(100)})
    payload = random.randbytes(5000)
    out = walked(here, answer(flags=ACK | PSH | FIN, seq=50, payload=payload))
    seen = [read(one) for one in out]
    assert all(len(one) <= splicing.FRAME for one in out) and len(out) == 5
    assert b"".join(one.payload for one in seen) == payload
    assert [one.seq - (50 - 100) & WORD for one in seen] == [sum(len(part.payload) for part in seen[:at])
                                                             for at in range(len(seen))]
    assert [one.flags for one in seen] == [ACK] * 4 + [ACK | PSH | FIN]
    unchanged = answer(flags=ACK, payload=b"short")
    assert splicing.divided(unchanged, frames.parse(unchanged)) == [unchanged]
    whole = answer(flags=ACK, seq=7, payload=payload)
    assert b"".join(read(one).payload for one in splicing.divided(whole, frames.parse(whole))) == payload


@BOTH
def test_what_was_cut_on_its_way_is_the_shorter_segment_that_is_left(here: Relay, family: int) -> None:
    here.install(entries(pair(family)))
    here.set_splices({SERIAL: Splice(0)})
    (out,) = walked(here, request(family, ACK | FIN, seq=3, payload=bytes(range(200)))[:150])
    seen = read(out)
    assert seen.payload == bytes(range(200))[:len(seen.payload)] and len(seen.payload) > 50
    assert (seen.seq, seen.flags) == (3, ACK), "its end has not come"


def test_damaged_packets_are_nobodys(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(0)})
    data = bytearray(request(payload=b"abc"))
    data[-1] ^= 1
    assert here.packet(WIRE, bytes(data)) == 0
    for short in range(0, 60, 7):
        here.packet(WIRE, request(payload=b"abc")[:short])
    assert here.out == [] and here.counters()["shot"] >= 5


def test_what_the_fast_path_would_not_translate_is_dropped(here: Relay) -> None:
    """Its checksum would be made anew, and would be right then."""
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    good = request(payload=b"x")

    def summed(made: bytearray) -> bytes:
        made[24:26] = bytes(2)
        made[24:26] = (0xFFFF - frames.ones_sum(bytes(made[14:made[14] % 16 * 4 + 14]))).to_bytes(2, "big")
        return bytes(made)

    spoiled, first = bytearray(good), bytearray(good)
    spoiled[24] ^= 1
    first[20] |= 0x20
    longer = bytearray(good[:34] + bytes((1, 1, 1, 0)) + good[34:])
    longer[14], longer[17] = 0x46, longer[17] + 4
    assert len(walked(here, good)) == 1
    for made in (bytes(spoiled), summed(first), summed(longer)):
        assert walked(here, made) == []
    assert here.counters()["shot"] == 3
    fields: tuple[dict[str, Any], ...] = ({"sport": 0}, {"dport": 0})
    for ports in fields:
        data = frame(FAMILIES[4][0], FAMILIES[4][1], flags=SYN, **ports)
        assert walked(here, data) == []


def test_a_members_other_packets_are_not_ours(here: Relay) -> None:
    assert here.packet(WIRE, answer()) is None
    assert here.packet(WIRE, frame("10.0.1.7", "10.0.0.1", 17, 8080, 40000)) is None
    assert here.packet(WIRE, request(flags=SYN, seq=1)) == SERVICE


def test_hops_end(here: Relay) -> None:
    here.install(entries(pair(routed=True)))
    here.set_splices({SERIAL: Splice(0)})
    assert walked(here, request(ttl=1)) == []
    assert len(walked(here, request(ttl=2))) == 1


def test_who_goes_on_without_a_cookie_is_reset(here: Relay, clock: Clock) -> None:
    stray = request(4, ACK | PSH, seq=5, ack=6, payload=b"x")
    assert walked(here, stray) == []
    clock.now += relay.DOUBT_SECONDS - 0.1
    assert walked(here, stray) == []
    clock.now += 0.2
    (out,) = walked(here, stray)
    assert (read(out).flags, read(out).seq) == (RST, 6)
    clock.now += relay.DOUBT_OVER_SECONDS
    assert walked(here, stray) == [], "that was long ago"


def test_tables_are_bounded(here: Relay) -> None:
    small = Relay(Clock(), most=2)
    assert [small.install(entries(pair(serial=1 + at, port=40000 + at)))[0] for at in range(3)] == [
        Result.OPENED, Result.OPENED, Result.FULL]
    for port in range(relay.MAX_DOUBTS + 10):
        here.packet(WIRE, frame("10.0.0.1", "10.0.0.100", TCP, 1000 + port, 80, flags=ACK, payload=b"x"))
    assert len(here._doubts) == relay.MAX_DOUBTS
    here.install(entries(pair()))
    for _ in range(relay.MAX_ASKED + 5):
        here.packet(WIRE, request(payload=b"x"))
    assert len(here.queries()) == relay.MAX_ASKED and here.counters()["ask_lost"] == 5


def test_what_has_ended_makes_room() -> None:
    small = Relay(Clock(), most=2)
    small.install(entries([*pair(state=0, serial=1, port=40000), *pair(state=0, serial=2, port=40001)]))
    assert small.hand_over(1) is not None
    small.take_back(1)
    assert small.install(entries(pair(serial=3, port=40002))) == [Result.FULL], "it was given back"
    small.packet(WIRE, frame("10.0.0.1", "10.0.0.100", TCP, 40001, 80, flags=RST))
    assert small.install(entries(pair(state=0, serial=3, port=40002))) == [Result.OPENED]
    assert small.serials() == [1, 3]
    small.hand_over(3)
    assert small.install(entries(pair(serial=4, port=40003))) == [Result.OPENED] and small.serials() == [1, 4]
    assert [one.serial for one in small.closed()] == [2], "each is told of once, by whoever has it"


def test_sweeping(here: Relay, clock: Clock) -> None:
    for at in range(4):
        here.install(entries(pair(state=0, serial=1 + at, port=40000 + at)))
    here.packet(WIRE, request(flags=RST))
    half = frame("10.0.0.1", "10.0.0.100", TCP, 40001, 80, flags=FIN | ACK)
    here.packet(WIRE, half)
    swept = here.sweep(5000)
    assert (swept.live, swept.lingering) == (3, 1)
    clock.now += 6
    assert here.sweep(5000).shutdown == 1 and len(here) == 3
    clock.now += 95
    assert here.sweep(5000).idle == 2, "after their own time"
    clock.now += relay.HALF_CLOSED_SECONDS
    assert here.sweep(5000).idle == 1 and len(here) == 0
    assert [one.reason for one in here.closed()] == [Reason.SHUTDOWN, *[Reason.IDLE] * 3]
    here.install(entries(pair()))
    clock.now += 1
    assert here.sweep(5000, 1).overflow == 1


def test_deleting_moving_and_asking(here: Relay) -> None:
    here.install(entries(pair(state=layout.TRACKED)))
    assert here.tracked() == [(SERIAL, SERVICE, MEMBER)]
    assert here.relocate(MEMBER, bytes(6), 44).relocated == 1 and here.relocate(99, bytes(6), 44).relocated == 0
    here.packet(WIRE, request())
    assert here.out[-1][0] == 44
    assert here.reap({SERIAL: layout.Wanted(), 77: layout.Wanted()})[1] == {77}
    assert [(one.serial, one.reason) for one in here.closed()] == [(SERIAL, Reason.ALIVE)]
    key, flow = here.flows(10)[0]
    assert here.lookup(key) == flow and flow.packets == 1
    assert here.reap({SERIAL: layout.Wanted(idle_seconds=5)})[1] == set()
    assert here.reap({SERIAL: layout.Wanted(final=True)})[1] == {SERIAL}
    assert [one.reason for one in here.closed()] == [Reason.DELETED]
    here.install(entries(pair()))
    assert here.delete(virtual_server=99).deleted == 0
    assert here.delete(virtual_server=SERVICE, member=MEMBER).deleted == 1
    assert not here.close_flow(key)
    here.install(entries(pair()))
    assert here.close_flow(key) and len(here) == 0
    assert here.service_stats()[SERVICE, MEMBER][:2] == (3, 3)


def test_whether_a_member_has_said_anything_and_what(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7, 2)})

    def answered() -> bool:
        here.reap({SERIAL: layout.Wanted()})
        (told,) = here.closed()
        return bool(told.state & layout.ANSWERED)

    here.packet(WIRE, request(payload=b"GET / HTTP/1.1"))
    here.packet(WIRE, answer())
    assert not answered(), "an acknowledgment is no answer"
    here.packet(WIRE, answer(payload=b"HTTP/1.1 200 OK"))
    assert answered() and here.errors() == []
    here.packet(WIRE, request(payload=b"GET /again HTTP/1.1"))
    here.packet(WIRE, answer(payload=b"HTTP/1.1 503 Service Unavailable"))
    assert here.errors() == [(SERIAL, SERVICE, MEMBER, 503)] and here.errors() == []


def test_a_member_that_has_forgotten_begins_no_connection_unread(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    for data in (request(payload=b"GET /"), request(flags=SYN), answer(flags=SYN | ACK), answer(), request(flags=SYN)):
        assert len(walked(here, data)) == 1 and here.closed() == []
    assert walked(here, answer(flags=SYN | ACK)) == [] and len(here.closed()) == 1


def test_a_member_that_does_not_scale_windows_stays(here: Relay) -> None:
    """A fast path is not told how to translate the client's."""
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7, -7, 3)})
    assert here.hand_over(SERIAL) is None and here.holds(SERIAL)
    assert [read(one).window for one in walked(here, request(payload=b"more"))] == [4000]


def test_without_a_key_nobody_is_greeted(here: Relay) -> None:
    here.set_cookies((None, None), 0)
    assert walked(here, request(flags=SYN, seq=1)) == []
    assert not here.give(WIRE, request()) and not here.sync_ports()
    assert (here.port_of(5), here.ports.get(5), here.ports[6]) == (5, relay.Port(5), relay.Port(6))
    assert here.targets() == set()
    here.set_targets({1: layout.Target(None, 0, bytes(6), 1, 1)})
    assert here.targets() == {1}
    here.set_targets({1: None})
    assert here.targets() == set()
    assert SERVICE in here.services().values()
