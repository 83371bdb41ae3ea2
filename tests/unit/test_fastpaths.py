# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The controller's side of fast paths (:mod:`lbapp.fastpaths`), with a link that only remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lbapp import fastpaths as fastpaths_module
from lbapp.config.model import Algorithm, Application, Configuration, Member, Pool, Protocol, VirtualServer
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Closed,
    Error,
    FlowSignature,
    Host,
    NeighbourSeen,
    NewFlow,
    Query,
    Reap,
    Reason,
    Reply,
    Stats,
    SwitchUp,
)
from lbapp.dataflow import frames
from lbapp.dataflow.carrier import Answered
from lbapp.dataflow.distribution import Distribution
from lbapp.dataflow.fastpath.layout import Mode
from lbapp.fastpaths import FastPaths, MemberTraffic, Reading
from tests.fake_frames import frame
from tests.playbook import replied

SWITCH = 1


class FakeLink:
    """Remembers what it was told."""

    proxies = True
    limits = True
    lossy = True

    def __init__(self) -> None:
        self.told: list[tuple[dict[int, Distribution | None], bool]] = []
        self.greeted: list[tuple[tuple[bytes | None, bytes | None], int]] = []
        self.replies: list[Reply] = []
        self.app_replies: list[AppReply] = []
        self.delivered: list[Answered] = []
        self.reaps: list[list[Reap]] = []
        self.left: list[Answered] = []
        self.traffic = {(1, 1): MemberTraffic(10, 8, 100, 1000)}
        self.taken: list[NewFlow] = []
        self.refused: dict[int, tuple[int, int]] = {1: (10, 20)}
        self.closed = False

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        self.told.append((dict(changed), whole))

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        self.greeted.append((keys, current))

    def reply(self, replies: Sequence[Reply | AppReply]) -> None:
        self.replies += [one for one in replies if isinstance(one, Reply)]
        self.app_replies += [one for one in replies if isinstance(one, AppReply)]

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        self.delivered += answered
        return self.left

    def take_over(self, flow: NewFlow) -> bool:
        self.taken.append(flow)
        return True

    def reap(self, reaps: Sequence[Reap]) -> None:
        self.reaps.append(list(reaps))

    def live(self) -> Sequence[tuple[int, int, int]]:
        return [(5, 1, 1)]

    def read(self) -> Reading:
        return Reading(2, {"hits": 7}, dict(self.traffic), refused=dict(self.refused))

    def connections(self, limit: int) -> Any:
        return iter(())

    def close(self) -> None:
        self.closed = True


def member(number: int, **more: Any) -> Member:
    return Member(address=f"10.0.0.{number}", protocol_port=8080, number=number, id=str(number), **more)


def configuration(*members: Member, servers: Sequence[int] = (1,), **more: Any) -> Configuration:
    pools = {"p": Pool(name="p", id="p", lb_algorithm=Algorithm.WEIGHTED_ROUND_ROBIN, members=members)}
    return Configuration(pools=pools, virtual_servers={str(number): VirtualServer(
        name=f"v{number}", id=str(number), number=number, vip_address="10.0.0.100", protocol=Protocol.TCP,
        protocol_port=80 + number, default_pool_id="p", **more) for number in servers})


class World:
    """A control segment with one switch, and its fast paths."""

    def __init__(self) -> None:
        self.control = ControlSegment()
        self.done: list[Any] = []
        self.fastpaths = FastPaths(self.control, self.done.extend)
        self.link = FakeLink()
        self.configure(configuration(member(1), member(2)))
        self.control.handle(SwitchUp(SWITCH, {}), 0.0)
        for number in (1, 2):
            self.found(number)

    def found(self, number: int, port: int | None = None) -> None:
        self.control.handle(NeighbourSeen(SWITCH, f"10.0.0.{number}", Host(bytes((2, 0, 0, 0, 0, number)),
                                                                          port or number)), 0.0)

    def configure(self, made: Configuration) -> None:
        self.fastpaths.configure(made)
        self.control.configure(made, 0.0)


@pytest.fixture
def world() -> World:
    made = World()
    made.fastpaths.add(SWITCH, made.link)
    return made


def query(serial: int = 101, virtual_server: int = 1, port: int = 4000) -> Query:
    return Query(serial, SWITCH, 9, bytes((2, 0, 0, 0, 0, 9)), FlowSignature(
        bytes((10, 0, 0, 9)), port, bytes((10, 0, 0, 100)), 80 + virtual_server, 6), virtual_server, frames.SYN)


# ------------------------------------------------------------------ told


def test_a_new_link_is_told_everything_and_that_it_is_all(world: World) -> None:
    ((changed, whole),) = world.link.told
    assert whole
    made = changed[1]
    assert made is not None
    assert (made.mode, [target.member for target in made.targets]) == (Mode.DECIDE, [1, 2])


def test_only_what_changed_is_told(world: World) -> None:
    world.configure(configuration(member(1), member(2), servers=(1, 2)))
    world.fastpaths.refresh(SWITCH)
    assert [sorted(changed) for changed, _ in world.link.told[1:]] == [[2]]
    world.fastpaths.refresh(SWITCH)
    assert len(world.link.told) == 2
    world.configure(configuration(member(1), member(2), servers=(2,)))
    world.fastpaths.refresh(SWITCH)
    assert world.link.told[2][0] == {1: None}


def test_a_virtual_server_that_the_switch_takes_over_leaves_the_fast_path(world: World) -> None:
    world.configure(configuration(member(1), member(2), snat=True))
    world.fastpaths.refresh(SWITCH)
    assert world.link.told[1:] == [({1: None}, False)]
    assert not world.fastpaths.serves(SWITCH, 1)


def test_a_member_that_moved_is_told_of_for_those_who_use_it(world: World) -> None:
    world.found(2, port=7)
    world.fastpaths.refresh(SWITCH, world.control.users("10.0.0.2"))
    ((changed, whole),) = world.link.told[1:]
    made = changed[1]
    assert made is not None and not whole
    assert [target.host.port for target in made.targets] == [1, 7]


def test_a_member_that_is_removed_loses_its_connections(world: World) -> None:
    world.configure(configuration(member(1)))
    world.fastpaths.refresh(SWITCH)
    assert world.link.reaps == [[Reap(SWITCH, 0, 0, 2, final=True)]]


def test_a_member_that_is_disabled_keeps_them(world: World) -> None:
    world.configure(configuration(member(1), member(2, admin_state_up=False)))
    world.fastpaths.refresh(SWITCH)
    assert world.link.reaps == []
    made = world.link.told[1][0][1]
    assert made is not None
    assert [(target.member, target.weight) for target in made.targets] == [(1, 1), (2, 0)]


def test_without_queries_by_agents_the_controller_decides_by_packet_in() -> None:
    world = World()
    world.fastpaths.queries = False
    world.configure(configuration(member(1), member(2), connection_limit=10))
    world.fastpaths.add(SWITCH, world.link)
    made = world.link.told[0][0][1]
    assert made is not None
    assert made.mode is Mode.PASS


# ------------------------------------------------------------------ asked


def test_a_batch_of_queries_gets_one_batch_of_replies(world: World) -> None:
    world.fastpaths.asked(SWITCH, [query(101), query(103, port=4001), query(105, virtual_server=9)])
    assert [(reply.query.serial, reply.error) for reply in world.link.replies] == [
        (101, Error.OK), (103, Error.OK), (105, Error.UNKNOWN)]
    assert world.fastpaths.messages(SWITCH) == {"queries": 3, "query_messages": 1}
    assert world.fastpaths.asked_by(SWITCH) == {1: 2, 9: 1}


def test_a_query_that_comes_again_is_the_same_flow(world: World) -> None:
    """Its REPLY was lost; the one that comes is the same, and the connection counts once."""
    for _ in range(3):
        world.fastpaths.asked(SWITCH, [query(101)])
    first, *rest = world.link.replies
    assert rest == [first, first]
    assert world.control.virtual_server_counters(1).opened == 1
    world.fastpaths.asked(SWITCH, [query(101, port=4001)])
    assert world.control.virtual_server_counters(1).opened == 2, "a serial that is used for another flow"
    for serial in range(1001, 1001 + 2 * fastpaths_module.RECENT, 2):
        world.fastpaths.asked(SWITCH, [query(serial, port=4002)])
    world.link.replies.clear()
    world.fastpaths.asked(SWITCH, [query(101, port=4001)])
    assert world.control.virtual_server_counters(1).opened == fastpaths_module.RECENT + 3, "it is bounded"


def test_nothing_is_remembered_for_an_agent_whose_replies_cannot_be_lost(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLink, "lossy", False)
    for _ in range(2):
        world.fastpaths.asked(SWITCH, [query(101)])
    assert len(world.link.replies) == 2
    assert world.control.virtual_server_counters(1).opened == 2


def test_whom_an_agent_elsewhere_is_asked_about(world: World) -> None:
    world.configure(configuration(member(1), member(2), connection_limit=10))
    world.fastpaths.asked(SWITCH, [query(101), query(103, port=4001)])
    world.control.query(query(104, port=4002), 1.0)
    assert [(one.serial, one.virtual_server, one.final) for one in world.fastpaths.suspects(SWITCH)] == [
        (101, 1, False), (103, 1, False)]
    assert world.fastpaths.suspects(2) == []


def test_packet_ins_are_taken_over_in_batches(world: World) -> None:
    data = frame("10.0.0.9", "10.0.0.100", sport=4000, dport=81)
    reply = replied(world.control, query(), 1.0)
    packet = frames.parse(data)
    assert world.fastpaths.takes(SWITCH, reply, data, packet)
    assert world.link.delivered == []
    assert world.fastpaths.flush(SWITCH) == []
    assert world.link.delivered == [Answered(reply, data, packet)]
    assert world.fastpaths.flush(SWITCH) == ()
    assert not world.fastpaths.takes(SWITCH, Reply(query(), Error.NOTAVAIL), data, packet)
    assert not world.fastpaths.takes(2, reply, data, packet), "a switch without a fast path"


def test_what_finds_no_room_comes_back(world: World) -> None:
    data = frame("10.0.0.9", "10.0.0.100", sport=4000, dport=81)
    one = Answered(replied(world.control, query(), 1.0), data, frames.parse(data))
    world.link.left = [one]
    world.fastpaths.takes(SWITCH, *one)
    assert world.fastpaths.flush(SWITCH) == [one]


def test_closed_connections_are_one_message_and_count(world: World) -> None:
    closed = [Closed(serial, 1, 1, Reason.SHUTDOWN, False, True, 10, 1000, 0.1) for serial in range(64)]
    world.fastpaths.closed(SWITCH, closed)
    assert world.fastpaths.messages(SWITCH) == {"deletes": 64, "delete_messages": 1}
    counters = world.control.virtual_server_counters(1)
    assert (counters.closed, counters.packets, counters.bytes) == (64, 640, 64_000)


def test_reaps_travel_together(world: World) -> None:
    for serial in (1, 2, 3):
        world.fastpaths.reap(Reap(SWITCH, serial, 1, 1))
    world.fastpaths.reap(Reap(2, 4, 1, 1))
    assert world.link.reaps == []
    world.fastpaths.tick()
    world.fastpaths.tick()
    assert [[reap.serial for reap in reaps] for reaps in world.link.reaps] == [[1, 2, 3]]


def test_answers_reach_the_control_segment() -> None:
    world = World()
    world.configure(configuration(member(1), member(2), connection_limit=10))
    world.fastpaths.add(SWITCH, world.link)
    world.fastpaths.asked(SWITCH, [query(101)])
    (before,) = world.control.connections()
    world.fastpaths.heard([Stats(SWITCH, 101, Error.CONNALIVE, 12, 3400)])
    (after,) = world.control.connections()
    assert (before.packets, after.packets, after.bytes) == (0, 12, 3400)


# ------------------------------------------------------------------ views


def test_views_of_one_link(world: World) -> None:
    assert SWITCH in world.fastpaths and 2 not in world.fastpaths
    assert world.fastpaths.decides(SWITCH, 1) and not world.fastpaths.decides(SWITCH, 2)
    assert world.fastpaths.live(SWITCH) == [(5, 1, 1)] and world.fastpaths.live(2) == ()
    world.link.traffic[1, 1] = MemberTraffic(25, 20, 200, 2000)
    reading = world.fastpaths.read(SWITCH)
    assert reading is not None
    assert reading.members[1, 1].opened - reading.before[1, 1] == 15, "since this controller began"
    assert world.fastpaths.read(2) is None
    assert world.fastpaths.messages(2) == {} and world.fastpaths.asked_by(2) == {}


def test_the_end(world: World) -> None:
    world.fastpaths.close()
    assert world.link.closed
    assert world.fastpaths.link(SWITCH) is None
    world.fastpaths.add(SWITCH, FakeLink())
    world.fastpaths.remove(SWITCH)
    world.fastpaths.asked(SWITCH, [query()])
    assert SWITCH not in world.fastpaths


def test_what_clients_say_is_asked_by_agents(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    server = VirtualServer(name="v", id="1", number=1, vip_address="10.0.0.100", protocol=Protocol.TCP,
                           protocol_port=81, default_pool_id="p", application=Application.HTTP)
    world.configure(Configuration(pools={"p": Pool(name="p", id="p", members=(member(1), member(2)))},
                                  virtual_servers={"1": server}))
    link = FakeLink()
    world.fastpaths.add(1, link)
    made = link.told[-1][0][1]
    assert made is not None
    assert (made.mode, {target.member for target in made.targets}) == (Mode.PROXY, {1, 2})
    assert made.greeting is not None and made.greeting.seconds == 10
    assert len(link.greeted) == 1 and link.greeted[0][0][0] is not None
    assert world.fastpaths.serves(1, 1)


def test_what_is_relayed_is_left_alone_by_fast_paths_and_told_to_the_relay_alone(world: World) -> None:
    """And what is not, the other way round."""
    relayed = configuration(member(1), member(2), servers=(1, 2), application=Application.HTTP)
    changed: list[int] = []
    paths = FastPaths(world.control, world.done.extend, lambda _, server: server.number == 2)
    relays = FastPaths(world.control, world.done.extend, lambda _, server: server.number == 2, relaying=True,
                       cookies=paths.cookies)
    paths.changed = changed.append
    world.control.configure(relayed, 0.0)
    told = []
    for one in (paths, relays):
        one.configure(relayed)
        link = FakeLink()
        one.add(SWITCH, link)
        told.append({number: made.mode for number, made in link.told[-1][0].items() if made is not None})
        assert link.greeted[-1][0] == paths.cookies.keys, "the same keys"
    assert told == [{1: Mode.PROXY, 2: Mode.PASS}, {2: Mode.PROXY}]
    assert changed == [SWITCH]
    assert paths.proxies(SWITCH) and not paths.proxies(9)
    paths.remove(SWITCH)
    assert changed == [SWITCH, SWITCH]


def test_what_is_asked_again_about_a_client_is_answered_as_before_and_counts_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.configure(configuration(member(1), member(2), application=Application.HTTP))
    link = FakeLink()
    world.fastpaths.add(SWITCH, link)
    answers: list[AppReply] = []
    monkeypatch.setattr(world.control, "app_query", lambda asked, now, limited: answers.pop(0))
    first = AppQuery(query(), 1, 2, b"", b"GET / HTTP/1.1\r\n")
    decided = AppReply(first.query, Reply(first.query, Error.NOTAVAIL), answer=b"x" * 1000)
    answers += [AppReply(first.query), decided]
    for asked in (first, first, first, first._replace(data=b"GET / HTTP/1.1\r\n\r\n", timed_out=True)):
        world.fastpaths.asked(SWITCH, [asked])
    assert link.app_replies == [AppReply(first.query), decided, decided, decided]
    # Another connection with its serial, and one that is asked about much later, are new.
    other = first._replace(query=first.query._replace(client_mac=b"other!"))
    answers += [decided._replace(query=other.query), decided]
    world.fastpaths.asked(SWITCH, [other])
    monkeypatch.setattr(fastpaths_module, "ASKED_AGAIN_SECONDS", 0.0)
    world.fastpaths.asked(SWITCH, [first])
    assert answers == []


def test_answers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.configure(configuration(member(1), member(2), application=Application.HTTP))
    world.fastpaths.add(SWITCH, FakeLink())
    monkeypatch.setattr(fastpaths_module, "RECENT_BYTES", 2500)
    asks: list[int] = []

    def answer(asked: AppQuery, now: float, limited: bool) -> AppReply:
        asks.append(asked.query.serial)
        return AppReply(asked.query, Reply(asked.query, Error.NOTAVAIL), answer=b"x" * 1000)

    monkeypatch.setattr(world.control, "app_query", answer)
    for serial in (1, 3, 5, 5, 3, 1):
        world.fastpaths.asked(SWITCH, [AppQuery(query()._replace(serial=serial), 1, 2, b"", b"GET")])
    assert asks == [1, 3, 5, 1]


@pytest.mark.parametrize(("keeps", "mode", "errors"), [
    (True, Mode.DECIDE, [Error.OK] * 4), (False, Mode.PUNT, [Error.OK] * 2 + [Error.CONNLIMIT] * 2)])
def test_limits_are_kept_once(keeps: bool, mode: Mode, errors: list[Error]) -> None:
    """By a fast path that can, else by the control segment."""
    world = World()
    world.configure(configuration(member(1), member(2), rate_limit=1, rate_burst=2))
    link = FakeLink()
    link.limits = keeps
    world.fastpaths.add(SWITCH, link)
    (told,) = link.told[-1][0].values()
    assert told is not None
    assert (told.mode, told.limits is not None) == (mode, keeps)
    world.fastpaths.asked(SWITCH, [query(serial, port=4000 + serial) for serial in (1, 3, 5, 7)])
    assert [reply.error for reply in link.replies] == errors
    world.fastpaths.asked(SWITCH, [query(1, port=4001)])
    assert link.replies[-1].error is Error.OK, "asked again"


def test_what_was_refused_before_this_controller_is_not_its(world: World) -> None:
    world.link.refused = {1: (12, 20), 2: (1, 5)}
    reading = world.fastpaths.read(SWITCH)
    assert reading is not None
    assert reading.refused == {1: (2, 0), 2: (1, 5)}
