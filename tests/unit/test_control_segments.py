# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Several control segments in one data flow segment (:mod:`lbapp.control_segments`)."""

from __future__ import annotations

from lbapp.bus import csmb
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Binding,
    Closed,
    Error,
    FlowSignature,
    Host,
    Query,
    Reap,
    Reason,
    Reply,
    Timeout,
)
from lbapp.control_segments import ControlSegments, Key, announce
from lbapp.dataflow.distribution import Distribution, Greeting, Limits, Target
from lbapp.dataflow.fastpath.layout import Hash, Mode

VIP = bytes((10, 9, 0, 1))
ONE, OTHER = 0xA, 0xB
HOST = Host(bytes((2, 0, 0, 0, 0, 1)), 4)


def distribution(number: int = 7, mode: Mode = Mode.PUNT, port: int = 80, member: int = 3) -> Distribution:
    return Distribution(number, VIP, port, 6, mode, Hash.TURN, 7440, (
        Target(member, 2, bytes((10, 0, 0, 1)), 8080, HOST, False), Target(member + 1, 1, None, 0, HOST, True)))


def tell(segments: ControlSegments, identity: int, made: Distribution) -> list[int]:
    server, targets = announce(made)
    return [*segments.added(identity, server), *segments.distributed(identity, made.number, targets)]


def query(virtual_server: int, serial: int = 1) -> Query:
    return Query(serial, 1, 9, bytes(6), FlowSignature(bytes((10, 0, 0, 9)), 4000, VIP, 80, 6), virtual_server, 2)


def closed(virtual_server: int) -> Closed:
    return Closed(5, virtual_server, 3, Reason.SHUTDOWN, False, True, 10, 1000, 0.5)


def test_a_distribution_arrives_as_it_was() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    assert set(tell(segments, ONE, distribution(7))) == {1}
    assert segments.distribution(1) == distribution(1)
    assert segments.distribution(99) is None


def test_one_address_is_one_virtual_server_whoever_announces_it() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    tell(segments, ONE, distribution(7, member=3))
    tell(segments, OTHER, distribution(500, member=30))
    assert list(segments.numbers()) == [1]
    told = segments.distribution(1)
    assert told is not None
    assert told.targets[0].member == 3, "the first one's members"
    assert list(segments.queries([query(1)])) == [(ONE, [query(7)])]
    assert dict(segments.closed([closed(1)])) == {ONE: [closed(7)], OTHER: [closed(500)._replace(member=30)]}
    assert segments.traffic(OTHER, {(1, 3): "traffic", (9, 3): "nobody's"}) == {(500, 30): "traffic"}
    assert segments.traffic(ONE, {(1, 3): "traffic"}) == {(7, 3): "traffic"}
    (gone,) = dict(segments.closed([closed(1)._replace(member=99)]))[OTHER]
    assert gone.member == 99, "of what is not in the distribution any more, the number itself"


def test_all_flows_of_a_member_are_those_of_its_own_virtual_servers() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    tell(segments, ONE, distribution(7, port=80))
    tell(segments, ONE, distribution(8, port=81, member=50))
    tell(segments, OTHER, distribution(7, port=82))
    tell(segments, OTHER, distribution(8, port=80))
    member = Reap(1, 0, 0, 3, final=True)
    single, timeout = Reap(1, 9, 7, 3), Timeout(1, 11, 5)
    assert list(segments.reaps(ONE, [single, member, timeout])) == [
        single, member._replace(virtual_server=1), timeout]
    assert list(segments.reaps(OTHER, [member])) == [member._replace(virtual_server=3)], "80 is led by the first one"
    assert list(segments.reaps(OTHER, [member])) == [member._replace(virtual_server=3)], "unknown now: all of its own"
    assert (segments.led(ONE), segments.led(OTHER)) == ([1, 2], [3])


def test_numbers_of_an_agent_before_this_one_go_on() -> None:
    before = {Key(VIP, 80, 6): 9, Key(VIP, 81, 6): 4}
    segments = ControlSegments(before, used=20)
    segments.connected(ONE)
    for number, port in enumerate((82, 81, 80)):
        tell(segments, ONE, distribution(number, port=port))
    assert list(segments.numbers()) == [21, 4, 9]
    segments = ControlSegments(before)
    segments.forget_before()
    tell(segments, ONE, distribution(1, port=80))
    assert list(segments.numbers()) == [10], "neither theirs, nor one that theirs may have"


def test_two_control_segments_with_the_same_numbers_do_not_meet() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    tell(segments, ONE, distribution(7, port=80))
    tell(segments, OTHER, distribution(7, port=81))
    assert list(segments.queries([query(1), query(2), query(1, 9)])) == [
        (ONE, [query(7), query(7, 9)]), (OTHER, [query(7)])]
    assert (segments.local(ONE, 7), segments.local(OTHER, 7), segments.local(OTHER, 8)) == (1, 2, 0)


def test_when_the_first_one_goes_the_next_is_asked() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    tell(segments, ONE, distribution(7))
    tell(segments, OTHER, distribution(8, member=30))
    assert segments.disconnected(ONE) == [1]
    told = segments.distribution(1)
    assert told is not None
    assert (told.mode, told.targets[0].member) == (Mode.PUNT, 30)
    assert list(segments.queries([query(1)])) == [(OTHER, [query(8)])]
    assert segments.disconnected(OTHER) == [1]
    alone = segments.distribution(1)
    assert alone is not None
    assert alone.mode is Mode.PASS, "nobody would answer"
    assert list(segments.queries([query(1)])) == []
    assert segments.connected(OTHER) == [1]
    again = segments.distribution(1)
    assert again is not None
    assert again.mode is Mode.PUNT


def test_of_several_control_segments_only_the_share_of_the_one_that_dies_moves() -> None:
    """Row 10, at one data flow segment: three of them share sixty virtual servers, each of which two announce."""
    identities = (0xA, 0xB, 0xC)
    segments = ControlSegments()
    for identity in identities:
        segments.connected(identity)
    for number in range(60):
        for turn in (0, 1):
            tell(segments, identities[(number + turn) % 3], distribution(number + 1, port=1000 + number))

    def asked() -> dict[int, int]:
        return {number: identity for number in segments.numbers()
                for identity, _ in segments.queries([query(number)])}

    before = asked()
    assert len(before) == 60 and {list(before.values()).count(one) for one in identities} == {20}
    told = {number: segments.distribution(number) for number in before}
    for dead in identities:
        share = {number for number, identity in before.items() if identity == dead}
        anew = set(segments.disconnected(dead))
        after = asked()
        assert {number for number in before if after.get(number) != before[number]} == share
        assert set(after) == set(before) and dead not in after.values(), "somebody is asked about each"
        assert {number for number in told if segments.distribution(number) != told[number]} <= share <= anew
        segments.connected(dead)
        assert asked() == before, "and back, when it is there again"


def test_what_is_decided_in_the_data_flow_segment_needs_nobody() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    tell(segments, ONE, distribution(7, Mode.DECIDE))
    segments.disconnected(ONE)
    assert segments.distribution(1) == distribution(1, Mode.DECIDE)


def test_removing_and_moving() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    tell(segments, ONE, distribution(7))
    tell(segments, OTHER, distribution(8))
    assert segments.removed(ONE, 7) == [1]
    assert segments.distribution(1) is not None, "the other one still wants it"
    assert segments.removed(OTHER, 8) == [1]
    assert segments.distribution(1) is None
    assert segments.removed(OTHER, 8) == []
    assert segments.distributed(OTHER, 8, ()) == []
    tell(segments, ONE, distribution(7, port=80))
    moved = tell(segments, ONE, distribution(7, port=90))
    assert [segments.distribution(number) is None for number in dict.fromkeys(moved)] == [True, False]


def test_a_virtual_server_takes_anothers_address_before_that_one_is_removed() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    tell(segments, ONE, distribution(7))
    server, targets = announce(distribution(8, member=50))
    assert segments.added(ONE, server) == [1]
    taken = segments.distribution(1)
    assert taken is not None and not taken.targets, "nothing of the other one's"
    segments.distributed(ONE, 8, targets)
    assert segments.removed(ONE, 7) == []
    assert list(segments.queries([query(1)])) == [(ONE, [query(8)])]
    assert segments.removed(ONE, 8) == [1]
    assert segments.distribution(1) is None


def test_what_this_fast_path_cannot_serve_is_passed_on() -> None:
    for more in ({"flags": csmb.Flag.HTTP_PROXY}, {"flags": csmb.Flag.WILDCARD_PORT},
                 {"assist": csmb.Assist.CS_ASSIST}):
        segments = ControlSegments()
        segments.connected(ONE)
        server, targets = announce(distribution())
        segments.added(ONE, server._replace(**more))
        segments.distributed(ONE, 7, targets)
        told = segments.distribution(1)
        assert told is not None
        assert told.mode is Mode.PASS


def test_replies_come_back_with_local_numbers() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    tell(segments, ONE, distribution(7))
    reply = Reply(query(7), Error.NOTAVAIL)
    assert segments.replies(ONE, [reply]) == [Reply(query(1), Error.NOTAVAIL)]
    assert segments.replies(OTHER, [reply]) == [Reply(query(0), Error.NOTAVAIL)]


# ------------------------------------------------------------------ what clients say

GREETING = Greeting(1460, 7, True, 2.5)
KEYS, OTHERS = ((b"a" * 16, None), 0), ((b"b" * 16, b"c" * 16), 1)


def greeted(number: int = 7, port: int = 80) -> Distribution:
    return distribution(number, Mode.PROXY, port)._replace(greeting=GREETING)


def test_nobody_is_greeted_before_there_are_keys_or_while_nobody_hears() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    tell(segments, ONE, greeted())
    assert segments.cookies() is None
    told = segments.distribution(1)
    assert told is not None
    assert (told.mode, told.greeting) == (Mode.PASS, None)
    assert list(segments.keyed(ONE, KEYS)) == [1], "to be told anew"
    assert segments.cookies() == KEYS
    assert segments.distribution(1) == greeted(1)
    assert list(segments.keyed(ONE, OTHERS)) == [], "other keys alone change nothing else"
    assert segments.cookies() == OTHERS
    assert set(segments.disconnected(ONE)) == {1}
    told = segments.distribution(1)
    assert told is not None and told.mode is Mode.PASS
    assert segments.cookies() is None, "those that are used already"


def test_who_reads_what_clients_say_is_not_this_fast_path() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.keyed(ONE, KEYS)
    server, _ = announce(greeted())
    for flag in (csmb.Flag.HTTP_PROXY, csmb.Flag.SSL_PROXY, csmb.Flag.COOKIE_PROXY):
        segments.added(ONE, server._replace(flags=server.flags | flag))
        told = segments.distribution(1)
        assert told is not None and told.mode is Mode.PASS
    assert announce(greeted()._replace(mode=Mode.PASS))[0].greeting is None


def test_what_clients_say_has_everybodys_own_numbers() -> None:
    segments = ControlSegments()
    for identity in (ONE, OTHER):
        segments.connected(identity)
        segments.keyed(identity, KEYS)
    tell(segments, OTHER, greeted(500, 81))
    tell(segments, ONE, greeted(7))
    asked = AppQuery(query(2), 1, 2, b"", b"GET", (9,), True)
    plain = query(1, 3)
    assert dict(segments.queries([asked, plain])) == {ONE: [asked._replace(query=query(7))],
                                                      OTHER: [query(500, 3)]}
    (more,) = segments.replies(ONE, [AppReply(query(7))])
    assert more == AppReply(query(2))
    decided = AppReply(query(7), Reply(query(7), Error.OK, 3), Binding.SPLICE, b"")
    assert segments.replies(ONE, [decided]) == [AppReply(query(2), Reply(query(2), Error.OK, 3), Binding.SPLICE, b"")]


def test_keys_are_those_of_who_has_been_there_longest_and_its_members_alone_can_check_them() -> None:
    segments = ControlSegments()
    segments.connected(OTHER)
    segments.connected(ONE)
    tell(segments, ONE, greeted())
    segments.keyed(ONE, KEYS)
    assert segments.cookies() == KEYS, "the other one has told none"
    segments.keyed(OTHER, OTHERS)
    assert segments.cookies() == OTHERS
    handed = AppReply(query(7), Reply(query(7), Error.OK, 3), Binding.HANDOFF)
    (reply,) = segments.replies(ONE, [handed])
    assert isinstance(reply, AppReply) and reply.binding is Binding.SPLICE, "its members do not have the other's keys"
    segments.disconnected(OTHER)
    assert segments.cookies() == KEYS
    (reply,) = segments.replies(ONE, [handed])
    assert isinstance(reply, AppReply) and reply.binding is Binding.HANDOFF
    segments.connected(OTHER)
    segments.keyed(OTHER, OTHERS)
    assert segments.cookies() == KEYS, "no change for who comes back"


def test_limits_arrive_and_so_does_what_they_refused() -> None:
    segments = ControlSegments()
    segments.connected(ONE)
    segments.connected(OTHER)
    limited = distribution(7, Mode.DECIDE)._replace(limits=Limits(100, 5, -1, 0, 24))
    tell(segments, ONE, limited)
    assert segments.distribution(1) == limited._replace(number=1)
    tell(segments, OTHER, distribution(500, member=30))
    assert segments.traffic(ONE, {(1, 0): "refused"}) == {(7, 0): "refused"}
    assert segments.traffic(OTHER, {(1, 0): "refused"}) == {(500, 0): "refused"}
