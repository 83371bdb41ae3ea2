# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections on their way from the client's first data to a member (:mod:`lbapp.dataflow.proxy`), as transcripts:
a client and a member that are played, a fast path that remembers, a clock that is told."""

from __future__ import annotations

import pytest

from lbapp.control.messages import AppReply, Binding, Error, Host, Refused, Reply, Translation
from lbapp.dataflow import frames, handshake, proxy
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN, Segment
from lbapp.dataflow.joining import going
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.values import astuple
from tests.proxy_world import (
    CLIENT,
    CLIENT_MAC,
    CLIENT_WIRE,
    COOKIE,
    ISN,
    MEMBER_ISN,
    MEMBER_MAC,
    MEMBER_WIRE,
    MEMBERS,
    OPTIONS,
    REQUEST,
    SERVICE,
    SWITCH,
    SYN_ACK,
    VIP,
    World,
)


@pytest.fixture(params=[False, True], ids=["sent by the proxy", "gone with its entry"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


def test_one_segment_is_spliced(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert asked.data == REQUEST
    assert (asked.seq, asked.ack) == (ISN + 1 & 0xFFFFFFFF, COOKIE + 1)
    assert astuple(asked.query)[:4] == (101, SWITCH, 1, CLIENT_MAC)
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


def acknowledged(world: World, said: bytes, at: int, options: Options = OPTIONS) -> None:
    """A client says it in two segments, the first of which it is told has arrived; its member is sent a SYN."""
    asked = world.client(0, said[:at], options=options)
    assert asked is not None
    world.more(asked.query)
    again = world.client(at, said[at:], now=0.2)
    assert again is not None
    world.answer(again.query)
    world.to_member()


def test_a_member_without_window_scaling_is_told_whole_windows(world: World) -> None:
    acknowledged(world, REQUEST, 5, OPTIONS._replace(window_scale=5))
    world.member(1, SYN | ACK, options=b"\x02\x04\x05\xb4")
    assert [(part.window, part.payload) for part in world.to_member()] == [(500 << 5, REQUEST)]
    world.member(1 + len(REQUEST), payload=b"HTTP/1.1 200 OK")
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, -7, 5)}


def test_what_is_delivered_from_here_fits_the_way_to_the_member(world: World) -> None:
    """The pool's mss, though the member itself would take more."""
    world.greeting = Greeting(1220, seconds=10.0)
    said = REQUEST.ljust(3000, b"x")
    acknowledged(world, said, 1000)
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert [part.payload for part in world.to_member()] == [said[:1220], said[1220:2440], said[2440:]]


def test_handoff_has_no_handshake(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query, binding=Binding.HANDOFF)
    assert world.states == [layout.HELD]
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
    sent = Segment(ISN + 1 & 0xFFFFFFFF, MEMBER_ISN + 1, ACK | PSH, 500, b"", REQUEST)
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


def sending(world: World) -> list[Segment]:
    """A client that was told that a part of its request has arrived, and a member that is being sent all of it."""
    asked = world.client(0, REQUEST[:5], now=-1.0)
    assert asked is not None
    world.more(asked.query, now=-1.0)
    again = world.client(5, REQUEST[5:])
    assert again is not None
    world.answer(again.query)
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert world.to_client()[-1].flags == ACK
    return world.to_member()


def test_a_member_that_resets_while_it_is_sent_the_request_is_the_last(world: World) -> None:
    """It may have begun with it: the client hears of that, and the next member of nothing."""
    assert [part.payload for part in sending(world)[1:]] == [REQUEST]
    assert world.member(0, RST, seq=MEMBER_ISN + 1) is None
    assert world.to_client() == [Segment(COOKIE + 1, ISN + 1 + len(REQUEST) & 0xFFFFFFFF, RST | ACK, 0, b"", b"")]
    assert not world.counters["proxy_member_failed"] and world.counters["refused"] == 1
    assert len(world.fast.closed) == 1 and not len(world.proxy) and not world.proxy._bytes
    assert world.proxy.tick(20.0) == []


def test_a_member_that_does_not_acknowledge_what_it_is_sent_is_the_last(world: World) -> None:
    sent = sending(world)[1:]
    for tenth in range(1, 93):
        assert world.proxy.tick(tenth / 10) == []
    assert world.to_member() == sent * (proxy.REPEATS - 1) and not world.to_client()
    assert world.proxy.tick(9.4) == []
    assert [part.flags for part in world.to_client()] == [RST | ACK]
    assert [part.flags for part in world.to_member()] == [RST], "it is told as well"
    assert world.counters["proxy_unanswered"] == 1 and not world.counters["proxy_member_failed"]
    assert len(world.fast.closed) == 1 and not len(world.proxy) and not world.proxy._bytes


def test_an_acknowledgment_of_what_was_not_sent_or_was_acknowledged_before_is_none(world: World) -> None:
    sent = sending(world)[-1]
    world.member(11)
    left = sent._replace(seq=ISN + 11 & 0xFFFFFFFF, payload=REQUEST[10:])
    assert world.to_member() == [left]
    for ack in (-500, 0, 1, 5, 11, 2 + len(REQUEST), 70_000):
        assert world.member(ack, payload=b"nobody's") is None
        assert not world.to_member() and not world.fast.splices and not world.fast.injected
    assert world.proxy.tick(0.4) == [] and world.to_member() == [left], "it is repeated in its time"
    world.member(1 + len(REQUEST))
    assert world.fast.splices and not len(world.proxy)


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
    for port in range(2 * proxy.PASSED_ON):
        world.proxy._passed.put(port, going(1000))
    assert world.client(len(REQUEST), b"body") is None
    assert len(world.fast.injected) == 2 and world.counters["proxy_stray"] == 1


@pytest.mark.parametrize("binding", list(Binding))
def test_first_data_that_was_doubled_is_no_second_connection(world: World, binding: Binding) -> None:
    """The other copy was in the ring already when the connection was entered. Only where its flow has gone, it is of a
    client that has begun anew on that port."""
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query, binding=binding)
    if binding is Binding.SPLICE:
        world.member(1, SYN | ACK)
    assert len(world.fast.injected) == 1
    world.fast.room = layout.Result.EXISTS
    assert world.client(0, REQUEST) is None, "nobody is asked, and nobody is refused"
    assert world.fast.injected[1:] == world.fast.injected[:1], "its member knows it"
    assert not len(world.proxy) and not world.to_client() and not world.fast.pending_forgotten
    world.fast.closed.append(world.fast.installed[0].key)
    again = world.client(0, REQUEST)
    assert again is not None
    assert again.query.serial != asked.query.serial


@pytest.mark.parametrize(("binding", "flags", "size", "soon"), [
    (Binding.HANDOFF, ACK | PSH, 1448, True), (Binding.HANDOFF, ACK | PSH, 1480, False),
    (Binding.HANDOFF, ACK, 1448, False), (Binding.SPLICE, ACK | PSH, 1448, False),
], ids=["all was said", "longer than a frame", "more comes", "splice"])
def test_what_more_could_overtake_goes_at_once(world: World, binding: Binding, flags: int, size: int,
                                               soon: bool) -> None:
    asked = world.client(0, REQUEST.ljust(size), flags)
    assert asked is not None
    world.answer(asked.query, binding=binding)
    if binding is Binding.SPLICE:
        world.member(1, SYN | ACK)
    assert world.fast.soon == [soon]
    world.client(size, b"late")
    assert world.fast.injected[-1][1].endswith(b"late") and world.fast.soon == [soon, soon], "in the same order"


def test_what_is_said_after_a_connection_was_deleted_goes_round_in_no_circle(world: World) -> None:
    """The fast path hands it over as long as it knows the client's beginning: so that is forgotten, and it resets."""
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query)
    world.member(1, SYN | ACK, now=1.0)
    assert world.client(len(REQUEST), b"late", now=1.5) is None
    assert len(world.fast.injected) == 2 and not world.fast.pending_forgotten
    world.fast.closed.append(world.fast.installed[0].key)
    assert world.client(len(REQUEST), b"later", now=1.6) is None
    assert len(world.fast.injected) == 2 and world.counters["proxy_stray"] == 1
    assert [(key.source_port, key.destination_port) for key in world.fast.pending_forgotten] == [(CLIENT[1], VIP[1])]


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
    assert len(world.fast.installed) == 1
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
        monkeypatch.setattr("tests.proxy_world.CLIENT", (CLIENT[0], 50000 + port))
        assert world.client(0, b"GET") is not None
    assert len(world.proxy) == 3 and world.counters["proxy_dropped"] == 2
    monkeypatch.setattr(proxy, "MAX_TOTAL", 100)
    monkeypatch.setattr("tests.proxy_world.CLIENT", (CLIENT[0], 60000))
    assert world.client(0, bytes(500)) is not None
    monkeypatch.setattr("tests.proxy_world.CLIENT", (CLIENT[0], 60001))
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
