# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The agent (:mod:`lbapp.dataflow.agent`) against a fast path that only remembers what it was told."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable
from typing import Any

import pytest

from lbapp.control.buckets import SECOND, Ration, Shape
from lbapp.control.messages import (
    Closed,
    Delete,
    Error,
    FlowSignature,
    Host,
    NewFlow,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Stats,
    Timeout,
    Translation,
)
from lbapp.dataflow import agent as module
from lbapp.dataflow import frames
from lbapp.dataflow.agent import LINGER_MS, SHORT_LINGER_MS, Agent
from lbapp.dataflow.carrier import Answered
from lbapp.dataflow.distribution import Distribution, Limits, Target
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import Hash, Mode
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.values import astuple
from tests.fake_fastpath import CLIENT_WIRE, MEMBER_WIRE, FakeFastPath, Wire, ways
from tests.fake_frames import frame

SWITCH = 5
VIP, CLIENT, MEMBER = bytes((10, 0, 0, 100)), bytes((10, 0, 0, 1)), bytes((10, 0, 0, 13))


@pytest.fixture(params=[False, True], ids=["sent by the agent", "gone with its entry"])
def fast(request: pytest.FixtureRequest) -> FakeFastPath:
    return FakeFastPath(request.param)


@pytest.fixture
def agent(fast: FakeFastPath) -> Agent:
    made = Agent(fast, SWITCH, itertools.count(101, 2))  # type: ignore[type-var]
    made.configure({7: distribution()})
    fast.told.clear()
    return made


def target(member: int = 3, weight: int = 1, port: int = 4, routed: bool = False) -> Target:
    return Target(member, weight, MEMBER, 8080, Host(bytes((2, 0, 0, 0, 0, member)), port), routed)


def distribution(*targets: Target, mode: Mode = Mode.PUNT, number: int = 7, port: int = 80) -> Distribution:
    return Distribution(number, VIP, port, 6, mode, Hash.TURN, 7440, targets or (target(),))


def syn(source_port: int = 4000) -> bytes:
    return frame("10.0.0.1", "10.0.0.100", sport=source_port, dport=80, flags=2)


def arrive(fast: FakeFastPath, *data: bytes, wire: int = CLIENT_WIRE) -> None:
    fast.arrived += [layout.QueryRecord(wire, 7, one) for one in data]


def ask(agent: Agent, fast: FakeFastPath, *data: bytes, now: float = 1.0) -> list[Query]:
    arrive(fast, *data)
    asked: list[Query] = []
    while fast.arrived:
        asked += [one for one in agent.queries(now) if isinstance(one, Query)]
    return asked


def test_the_first_are_answered_before_the_last_are_read(agent: Agent, fast: FakeFastPath) -> None:
    arrive(fast, *(syn(port) for port in range(4000, 4000 + module.MOST_QUERIES + 3)))
    assert [len(agent.queries(1.0)) for _ in range(3)] == [module.MOST_QUERIES, 3, 0]


def reply(query: Query, routed: bool = False, **more: Any) -> Reply:
    where = Translation(MEMBER, 8080, Host(bytes((2, 0, 0, 0, 0, 3)), 4), routed)
    return Reply(query, Error.OK, 3, where, **more)


# ------------------------------------------------------------------ questions


def test_a_first_packet_becomes_a_query(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    assert query == Query(101, SWITCH, 1, frames.parse(syn()).source_mac, frames.parse(syn()).signature, 7, 2)


def test_what_is_not_answered_is_asked_again(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn(), now=1.0)
    assert ask(agent, fast, syn(), now=1.4) == [], "the client's own repetition asks nothing"
    assert agent.tick(1.0 + module.ASK_AGAIN_SECONDS - 0.01) == []
    assert agent.tick(1.0 + module.ASK_AGAIN_SECONDS) == [query], "with the same serial"
    assert agent.tick(1.1 + module.ASK_AGAIN_SECONDS) == []
    agent.reply([reply(query)])
    assert len(fast.did("inject")) == 1, "of a SYN, one copy goes on"
    assert fast.soon == [True], "nothing comes behind it"
    assert agent.tick(9.0) == []


def test_the_second_answer_to_what_was_asked_twice_opens_nothing(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn(), now=1.0)
    agent.tick(2.0)
    for _ in range(2):
        agent.reply([reply(query)])
    assert len(fast.did("install")) == 1, "its flow may have come and gone"


def test_not_all_is_asked_again_at_once(agent: Agent, fast: FakeFastPath) -> None:
    ask(agent, fast, *(syn(port) for port in range(4000, 4000 + module.MOST_AGAIN + 10)), now=1.0)
    assert [len(agent.tick(now)) for now in (2.0, 2.25, 2.3)] == [module.MOST_AGAIN, 10, 0]


def test_datagrams_wait_together_and_in_order(agent: Agent, fast: FakeFastPath) -> None:
    datagrams = [frame("10.0.0.1", "10.0.0.100", 17, sport=4000, dport=80, payload=bytes([n]))
                 for n in range(module.MAX_FRAMES + 2)]
    (query,) = ask(agent, fast, *datagrams)
    agent.reply([reply(query)])
    assert [data for _, data in fast.did("inject")] == datagrams[:module.MAX_FRAMES]
    assert not any(fast.soon), "more may come, and is not to overtake them"
    assert agent.counters["waiting_dropped"] == 2


@pytest.mark.parametrize("broken", [b"", b"\0" * 60, syn()[:40]])
def test_what_is_malformed_asks_nothing(agent: Agent, fast: FakeFastPath, broken: bytes) -> None:
    assert ask(agent, fast, broken) == []
    assert agent.counters["malformed"] == 1


def test_a_wire_that_is_no_port_asks_nothing(agent: Agent, fast: FakeFastPath) -> None:
    arrive(fast, syn(), wire=999)
    assert agent.queries(1.0) == []
    assert agent.counters["query_unknown_port"] == 1


def test_waiting_is_bounded_in_number_and_time(agent: Agent, fast: FakeFastPath,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    first, *rest = ask(agent, fast, *(syn(4000 + n) for n in range(4)))
    agent.reply([reply(first)])
    assert fast.did("inject") == [], "the oldest one had to make room"
    agent.tick(1.0 + module.GIVE_UP_SECONDS - 0.1)
    agent.reply([reply(rest[0])])
    assert len(fast.did("inject")) == 1
    agent.tick(1.0 + module.GIVE_UP_SECONDS)
    agent.reply([reply(rest[1])])
    assert len(fast.did("inject")) == 1
    assert agent.counters["unanswered"] == 2


# ------------------------------------------------------------------ answers


def test_a_reply_installs_both_ways_before_the_packet_goes(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    agent.reply([reply(query, tracked=True)])
    assert [kind for kind, _ in fast.told] == ["install", "inject"]
    ((there, way), (back, return_way)) = ways(fast)
    assert there == layout.FlowKey(CLIENT, VIP, 4000, 80, 6)
    assert back == layout.FlowKey(MEMBER, CLIENT, 8080, 4000, 6)
    assert astuple(way)[:8] == (CLIENT, MEMBER, 4000, 8080, bytes((2, 0, 0, 0, 0, 3)), layout.KEEP_MAC, MEMBER_WIRE,
                       layout.TRACKED)
    assert astuple(return_way)[:8] == (VIP, CLIENT, 80, 4000, query.client_mac, VIRTUAL_MAC, CLIENT_WIRE,
                              layout.TRACKED | layout.OUTBOUND)
    assert astuple(way)[8:12] == astuple(return_way)[8:12] == (101, 7, 3, 7440)
    assert fast.did("inject") == [(CLIENT_WIRE, syn())]


def test_of_a_connection_that_somebody_else_has_had_nobody_says_that_its_member_is_silent(agent: Agent,
                                                                                         fast: FakeFastPath) -> None:
    packet = frames.parse(syn())
    query = Query(2, SWITCH, 1, packet.source_mac, packet.signature, 7, 2)
    where = Translation(MEMBER, 8080, Host(bytes((2, 0, 0, 0, 0, 3)), 4))
    assert agent.reply([NewFlow(query, 3, where)]) == []
    ((_, way), (_, back)) = ways(fast)
    assert way.state & layout.ANSWERED and back.state & layout.ANSWERED


@pytest.mark.parametrize(("finished", "expected"), [
    ({}, 0), ({"client_finished": True}, layout.FIN), ({"member_finished": True}, layout.PEER_FIN)])
def test_who_has_finished_is_told_with_the_connection(agent: Agent, fast: FakeFastPath, finished: dict[str, bool],
                                                      expected: int) -> None:
    packet = frames.parse(syn())
    query = Query(2, SWITCH, 1, packet.source_mac, packet.signature, 7, 2)
    where = Translation(MEMBER, 8080, Host(bytes((2, 0, 0, 0, 0, 3)), 4))
    assert agent.reply([NewFlow(query, 3, where, **finished)]) == []
    ((one,),) = fast.did("install")
    assert one.flow.state & (layout.FIN | layout.PEER_FIN) == expected


def test_a_router_writes_its_own_address(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    agent.reply([reply(query, routed=True)])
    ((_, way), (_, back)) = ways(fast)
    assert (way.source_mac, way.state, back.state) == (VIRTUAL_MAC, layout.ROUTED, layout.ROUTED | layout.OUTBOUND)


def test_replies_are_installed_in_one_batch(agent: Agent, fast: FakeFastPath) -> None:
    queries = ask(agent, fast, *(syn(4000 + n) for n in range(5)))
    agent.reply([reply(query) for query in queries])
    assert [len(batch) for batch in fast.did("install")] == [5]
    assert [kind for kind, _ in fast.told] == ["install"] + ["inject"] * 5


def test_what_did_not_go_with_its_entry_is_sent(agent: Agent, fast: FakeFastPath) -> None:
    fast.queue = 2
    queries = ask(agent, fast, *(syn(4000 + n) for n in range(5)))
    assert agent.reply([reply(query) for query in queries]) == []
    assert sorted(data for _, data in fast.did("inject")) == sorted(syn(4000 + n) for n in range(5)), "each once"
    assert fast.queue == 0


def test_the_reply_of_a_packet_in_installs_and_injects_nothing(agent: Agent, fast: FakeFastPath) -> None:
    packet = frames.parse(syn())
    agent.reply([reply(Query(2, SWITCH, 1, packet.source_mac, packet.signature, 7, 2))])
    assert [kind for kind, _ in fast.told] == ["install"]


def test_a_refusal_is_sent_at_once(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    assert agent.reply([Reply(query, Error.NOTAVAIL)]) == []
    ((wire, data),) = fast.did("send")
    assert wire == CLIENT_WIRE
    refusal = frames.parse(data)
    assert refusal.tcp_flags & frames.RST
    assert refusal.signature.five[:4] == (VIP, 80, CLIENT, 4000)
    assert fast.did("install") == []
    agent.reply([Reply(query, Error.NOTAVAIL)])
    assert len(fast.did("send")) == 1, "a reply that comes twice"


@pytest.mark.parametrize(("in_port", "out_port", "number"), [(99, 4, 7), (1, 99, 7), (1, 4, 8)])
def test_a_reply_about_what_is_not_here_installs_nothing(agent: Agent, fast: FakeFastPath, in_port: int, out_port: int,
                                                         number: int) -> None:
    packet = frames.parse(syn())
    query = Query(2, SWITCH, in_port, packet.source_mac, packet.signature, number, 2)
    refused = agent.reply([Reply(query, Error.OK, 3, Translation(MEMBER, 8080, Host(bytes(6), out_port)))])
    assert refused == [Refused(SWITCH, 2, number)]
    assert fast.told == []
    assert agent.counters["reply_unknown_port"] == 1


@pytest.mark.parametrize("room", [layout.Result.FULL, layout.Result.TAKEN])
def test_without_room_for_its_flow_a_client_is_refused(agent: Agent, fast: FakeFastPath, room: layout.Result) -> None:
    (query,) = ask(agent, fast, syn())
    fast.room, fast.pairs = room, False
    assert agent.reply([reply(query)]) == [Refused(SWITCH, query.serial, 7)], "nobody has to wait for its end"
    assert fast.did("inject") == [], "it would only ask again"
    assert len(fast.did("send")) == 1


def test_a_flow_whose_way_back_is_anothers_is_left_to_the_switch(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    fast.room = layout.Result.TAKEN
    assert agent.reply([reply(query)]) == [Refused(SWITCH, query.serial, 7)]
    assert fast.did("give") == [(CLIENT_WIRE, syn())]
    assert (fast.did("send"), fast.did("inject"), agent.counters["miss_answered"]) == ([], [], 1)


def test_a_flow_that_is_there_already_is_used(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    fast.room = layout.Result.EXISTS
    agent.reply([reply(query)])
    assert len(fast.did("inject")) == 1


def packet_in(number: int = 7, in_port: int = 1) -> Answered:
    packet = frames.parse(syn())
    return Answered(reply(Query(2, SWITCH, in_port, packet.source_mac, packet.signature, number, 2)), syn(), packet)


def test_packet_ins_go_by_the_fast_path_once_their_flows_are_there(agent: Agent, fast: FakeFastPath) -> None:
    assert agent.deliver([packet_in()]) == []
    assert [kind for kind, _ in fast.told] == ["install", "inject"]
    assert fast.did("inject") == [(CLIENT_WIRE, syn())]


def test_packet_ins_that_find_no_room_are_left_to_the_switch(agent: Agent, fast: FakeFastPath) -> None:
    fast.room = layout.Result.FULL
    unknown = packet_in(in_port=99)
    assert agent.deliver([packet_in(), unknown]) == [unknown, packet_in()]
    assert fast.did("inject") == []


# ------------------------------------------------------------------ tables


def test_decided_virtual_servers_get_targets_and_slots(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({7: distribution(target(3, 2), target(4, 1), target(5, 0), mode=Mode.DECIDE)})
    service = fast.kept_services[layout.ServiceKey(VIP, 80, 6)]
    members = [fast.kept_targets[one].member for one in service.slots]
    assert (service.number, service.mode, service.hash, service.idle_seconds) == (7, Mode.DECIDE, Hash.TURN, 7440)
    assert sorted(members) == [3, 3, 4]


def test_a_member_behind_an_unknown_port_is_left_to_the_switch(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({7: distribution(target(3, port=9), mode=Mode.DECIDE)})
    service = fast.kept_services[layout.ServiceKey(VIP, 80, 6)]
    assert (service.mode, service.slots) == (Mode.PASS, ())


def test_what_goes_leaves_nothing_behind(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({7: distribution(target(3), target(4), mode=Mode.DECIDE)})
    agent.configure({7: distribution(target(4), mode=Mode.DECIDE)})
    assert [one.member for one in fast.kept_targets.values()] == [4]
    agent.configure({7: None})
    assert (fast.kept_targets, fast.kept_services) == ({}, {})
    assert fast.did("delete") == [{"virtual_server": 7}], "and its connections"


def test_a_virtual_server_that_moves_takes_its_old_address_away(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({7: distribution(port=81)})
    assert list(fast.kept_services) == [layout.ServiceKey(VIP, 81, 6)]
    assert fast.did("delete") == [{"virtual_server": 7}]


@pytest.mark.parametrize("steps", [
    [{8: distribution(number=8), 7: None}], [{7: None, 8: distribution(number=8)}],
    [{8: distribution(number=8)}, {7: None}], [{7: None}, {8: distribution(number=8)}]],
    ids=["together", "together, gone first", "new before", "gone before"])
def test_a_virtual_server_that_takes_another_ones_place(agent: Agent, fast: FakeFastPath,
                                                        steps: list[dict[int, Distribution | None]]) -> None:
    for step in steps:
        agent.configure(step)
    service = fast.kept_services[layout.ServiceKey(VIP, 80, 6)]
    assert service is not None and service.number == 8
    assert fast.did("delete") == [{"virtual_server": 7}], "connections of the former one"


def test_virtual_servers_that_change_places(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({8: distribution(number=8, port=81)})
    agent.configure({7: distribution(port=81), 8: distribution(number=8)})
    assert {key.port: made.number for key, made in fast.kept_services.items()} == {80: 8, 81: 7}


def test_numbers_of_targets_are_used_again_and_never_twice_at_once(agent: Agent, fast: FakeFastPath) -> None:
    for turn in range(20):
        agent.configure({7: distribution(target(turn + 3), target(turn + 4), mode=Mode.DECIDE)})
        assert {one.member for one in fast.kept_targets.values()} == {turn + 3, turn + 4}
    assert max(fast.kept_targets) <= 5


def test_a_member_that_moved_takes_its_connections_along(agent: Agent, fast: FakeFastPath) -> None:
    moved = target(3)._replace(host=Host(bytes((2, 0, 0, 0, 0, 99)), 1))
    agent.configure({7: distribution(moved)})
    assert fast.did("relocate") == [(3, bytes((2, 0, 0, 0, 0, 99)), CLIENT_WIRE, 7)]


def test_an_agent_that_starts_again_removes_what_nobody_wants_any_more(fast: FakeFastPath) -> None:
    before = Agent(fast, SWITCH, itertools.count(1, 2))  # type: ignore[type-var]
    before.configure({7: distribution(target(3), mode=Mode.DECIDE),
                      8: distribution(target(4), mode=Mode.DECIDE, number=8, port=81)}, whole=True)
    fast.told.clear()
    after = Agent(fast, SWITCH, itertools.count(1, 2))  # type: ignore[type-var]
    assert len(fast.kept_services) == 2, "it goes on until the new one knows better"
    old = set(fast.kept_targets)
    after.configure({7: distribution(target(3), mode=Mode.DECIDE)}, whole=True)
    assert [service.number for service in fast.kept_services.values()] == [7]
    assert not old & set(fast.kept_targets), "a number must not lead elsewhere while an old table names it"
    assert fast.did("delete") == [{"virtual_server": 8}]


def test_ports_that_changed_are_told_anew(agent: Agent, fast: FakeFastPath) -> None:
    agent.configure({7: distribution(target(3), mode=Mode.DECIDE)})
    agent.sync_ports()
    fast.ports[4], fast.port_change = Wire(204), True
    agent.sync_ports()
    assert [one.ifindex for one in fast.kept_targets.values()] == [204]


# ------------------------------------------------------------------ ends


def ended(serial: int, reason: layout.Reason, state: int = 0) -> layout.Closed:
    return layout.Closed(bytes(16), bytes(16), 0, 0, 6, 7, 3, serial, reason, state, layout.ticks(1500), 4, 400, 3,
                         3000)


@pytest.mark.parametrize(("packets", "refused"), [((1, 1), True), ((2, 0), False), ((2, 1), False), ((5, 4), False)])
def test_who_answered_the_first_packet_with_its_last_has_refused(agent: Agent, fast: FakeFastPath,
                                                                 packets: tuple[int, int], refused: bool) -> None:
    """A client's own SYN and RST are two packets as well, and anybody can forge them."""
    fast.ending = [ended(11, layout.Reason.SHUTDOWN)._replace(packets_in=packets[0], packets_out=packets[1])]
    (one,), _ = agent.ended(3)
    assert (one.outbound, one.packets) == (refused, sum(packets))


def test_closed_connections_are_told_of_in_batches(agent: Agent, fast: FakeFastPath) -> None:
    fast.ending = [ended(serial, reason) for serial, reason in enumerate(
        (layout.Reason.SHUTDOWN, layout.Reason.IDLE, layout.Reason.OVERFLOW, layout.Reason.DELETED), 11)]
    closed, alive = agent.ended(3)
    assert [(one.serial, one.reason) for one in closed] == [
        (11, Reason.SHUTDOWN), (12, Reason.IDLE), (13, Reason.OVERFLOW)]
    assert closed[0]._replace(duration=0.0) == Closed(11, 7, 3, Reason.SHUTDOWN, False, True, 7, 3400)
    assert abs(closed[0].duration - 1.5) < 0.002
    assert alive == []
    assert [one.reason for one in agent.ended(3)[0]] == [Reason.DELETED]


def test_reap_is_answered_for_the_dead_and_for_the_living(agent: Agent, fast: FakeFastPath) -> None:
    fast.missing = {8}
    answers = agent.reap([Reap(SWITCH, 8, 7, 3), Reap(SWITCH, 9, 7, 3), Reap(SWITCH, 10, 7, 3, final=True),
                          Timeout(SWITCH, 11, 90), Reap(SWITCH, 0, 0, 3, final=True),
                          Reap(SWITCH, 0, 7, 4, final=True)])
    assert answers == [Delete(SWITCH, (Closed(8, 0, 0, Reason.DELETED, False, False),))]
    assert fast.did("reap") == [{8: layout.Wanted(), 9: layout.Wanted(), 10: layout.Wanted(final=True),
                                 11: layout.Wanted(idle_seconds=90)}]
    assert fast.did("delete") == [{"member": 3, "virtual_server": None}, {"member": 4, "virtual_server": 7}]
    fast.ending = [ended(9, layout.Reason.ALIVE, layout.ANSWERED), ended(12, layout.Reason.ALIVE)]
    assert agent.ended(10) == ([], [Stats(SWITCH, 9, Error.CONNALIVE, 7, 3400),
                                    Stats(SWITCH, 12, Error.NOTAVAIL, 7, 3400),
                                    Stats(SWITCH, 12, Error.CONNALIVE, 7, 3400)]), "the second one's member was silent"


def test_many_members_that_go_are_one_walk(agent: Agent, fast: FakeFastPath) -> None:
    def flow(serial: int, virtual_server: int, member: int) -> Any:
        return types.SimpleNamespace(serial=serial, virtual_server=virtual_server, member=member)

    fast.held = [(number, flow(*one)) for number, one in enumerate(
        [(1, 7, 3), (1, 7, 3), (2, 8, 3), (3, 7, 4), (4, 8, 4), (5, 7, 5), (6, 7, 6)])]
    fast.missing = {2}
    assert agent.reap([Reap(SWITCH, 0, 0, 3, final=True), Reap(SWITCH, 0, 8, 4, final=True),
                       Reap(SWITCH, 0, 0, 5, final=True)]) == [], "nobody asked about the one that went meanwhile"
    assert fast.did("reap") == [dict.fromkeys((1, 2, 4, 5), layout.Wanted(final=True))]
    assert fast.did("delete") == []
    fast.held *= 5000
    agent.reap([Reap(SWITCH, 0, 0, number, final=True) for number in (3, 4, 5)])
    assert len(fast.did("delete")) == 3, "there are too many to list"


def test_nothing_asked_is_no_walk(agent: Agent, fast: FakeFastPath) -> None:
    assert agent.reap([]) == []
    assert fast.told == []


def test_reset_forgets_everything(agent: Agent, fast: FakeFastPath) -> None:
    agent.reset()
    assert fast.did("delete") == [{"everything": True}]


def test_a_table_that_is_nearly_full_loses_its_oldest(agent: Agent, fast: FakeFastPath) -> None:
    agent.sweep()
    assert fast.did("sweep") == [(False, {})]
    assert agent.held == 10
    histogram: Iterable[int] = (*(0,) * 10, 900, 60, *(0,) * 20)
    fast.found = fast.found._replace(live=960, lingering=0, histogram=tuple(histogram))
    agent.sweep()
    assert fast.did("sweep")[-1] == (True, {"evict_most": 960 - 850})


def test_what_has_ended_makes_room_before_what_lives(agent: Agent, fast: FakeFastPath) -> None:
    full = fast.found._replace(live=500, lingering=480)
    swept = {LINGER_MS: full, SHORT_LINGER_MS: full._replace(lingering=20, shutdown=460)}
    lingers: list[float] = []

    def sweep(linger_ms: float, evict_ms: float = 0, **more: Any) -> layout.Swept:
        assert not evict_ms, "nothing that lives has to go"
        lingers.append(linger_ms)
        return swept[int(linger_ms)]

    fast.sweep = sweep  # type: ignore[method-assign]
    assert agent.sweep().lingering == 20
    assert lingers == [LINGER_MS, SHORT_LINGER_MS]


def test_the_next_sweep_is_due_before_the_table_is_full(agent: Agent, fast: FakeFastPath) -> None:
    assert agent.room(fast.found._replace(live=100, lingering=50)) == 950 - 150
    assert agent.room(fast.found._replace(live=949, lingering=0)) == 50, "but not all the time"


def test_the_view_of_open_connections(agent: Agent, fast: FakeFastPath) -> None:
    (query,) = ask(agent, fast, syn())
    agent.reply([reply(query)])
    ((key, way), (back_key, back)) = ways(fast)
    second = layout.ticks(1000)
    way = way._replace(packets=3, bytes=300, opened=5 * second, used=8 * second, state=layout.DECIDED)
    back = back._replace(packets=2, bytes=2000, opened=5 * second, used=9 * second)
    over = way._replace(state=layout.CLOSED)
    fast.held = [(key, way), (back_key, back), (key._replace(source_port=1), over)]
    (held,) = agent.connections(100, 10 * second)
    assert held[:5] == (FlowSignature(CLIENT, 4000, VIP, 80, 6), 7, 3, 101, True)
    assert (round(held.age), round(held.idle), held.packets, held.bytes) == (5, 1, 5, 2300)


def test_limits_reach_the_fast_path_as_buckets(agent: Agent, fast: FakeFastPath) -> None:
    one = distribution(target(), mode=Mode.DECIDE)
    agent.configure({7: one._replace(limits=Limits(100, 0, 10, 5, 24))})
    (service,) = fast.kept_services.values()
    assert service.ration == Ration(Shape(SECOND // 100, SECOND), Shape(SECOND // 10, SECOND // 2), b"\xff\xff\xff\0")
    agent.configure({7: one._replace(limits=Limits(-1, 0, -1, 0, 24))})
    (service,) = fast.kept_services.values()
    assert service.ration is None
