# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Answers that come later, because a connection stood in line: packets that are held here, and questions of agents."""

from __future__ import annotations

import time
from typing import Any

import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from lbapp import app as module
from lbapp.config.model import Application, Configuration, Pool, Protocol, State, VirtualServer
from lbapp.config.pool import Member, Waiting
from lbapp.control.messages import AppQuery, AppReply, Closed, Delete, Error, Reason, Reply
from tests import sites
from tests.fake_frames import frame
from tests.unit.test_app import Bench, messages, outward
from tests.unit.test_fastpaths import SWITCH, FakeLink, World, query

LINE = Waiting(limit=2, timeout=5)


def full(**fields: Any) -> Bench:
    """One member with room for one connection, which is there."""
    member = Member(address="10.0.0.11", protocol_port=8080, number=1, id="m1", connection_limit=1)
    bench = Bench(sites.configuration([sites.server(**fields)], [sites.pool(of=[member], waiting=LINE)]))
    assert bench.punt()
    return bench


def end_first(bench: Bench) -> None:
    (first,) = bench.app.control.connections()
    bench.app.perform(bench.app.control.handle(Delete(1, (Closed(first.serial, 1, first.member, Reason.SHUTDOWN),)),
                                               time.monotonic()))


def test_a_packet_is_held_until_its_connection_has_its_turn() -> None:
    bench = full()
    second = frame("10.0.0.2", "10.0.0.100", payload=b"")
    assert bench.punt(second) == b""
    assert bench.punt(second) == b"", "again: it keeps its place"
    assert len(bench.switch.lined) == 1 and bench.app.control.line("p", time.monotonic()).waited == 1
    bench.sent.clear()
    end_first(bench)
    (sent,) = [data for data in bench.sent if data[1] == 13]
    actions, packet = outward(sent)
    assert [action[0] for action in actions] == ["load", "ct"]
    assert packet["ipv4_src"] == int.from_bytes(bytes((10, 0, 0, 2)), "big")
    assert not bench.switch.lined


def test_the_same_with_rule_pairs() -> None:
    bench = full(state=State.RULES)
    assert bench.punt(frame("10.0.0.2", "10.0.0.100")) == b""
    bench.sent.clear()
    (first,) = bench.app.control.connections()
    for outbound in (False, True):
        bench.app.perform(bench.app.control.handle(Delete(1, (
            Closed(first.serial, 1, first.member, Reason.SHUTDOWN, outbound),)), time.monotonic()))
    assert [data[1] for one in bench.sent for data in messages(one)] == [14, 14, 13]


def test_who_waited_too_long_is_refused() -> None:
    bench = full()
    bench.punt(frame("10.0.0.2", "10.0.0.100"))
    bench.sent.clear()
    bench.app.perform(bench.app.control.tick(time.monotonic() + LINE.timeout + 1))
    packets = [outward(data) for data in bench.sent if data[1] == 13]
    assert [packet["tcp_flags"] for _, packet in packets if "tcp_flags" in packet] == [0x14], "RST"


def test_packets_held_are_bounded_and_their_clients_repeat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINED_PACKETS", 1)
    bench = full()
    for last in (2, 3):
        assert bench.punt(frame(f"10.0.0.{last}", "10.0.0.100")) == b""
    assert len(bench.switch.lined) == 1
    bench.sent.clear()
    end_first(bench)
    assert not [data for data in bench.sent if data[1] == 13], "that of 10.0.0.2 had to make room"
    assert bench.punt(frame("10.0.0.2", "10.0.0.100")) != b"", "it has its member already"


# ------------------------------------------------------------------ agents


def waiting_world(application: Application = Application.L4) -> World:
    world = World()
    member = Member(address="10.0.0.1", protocol_port=8080, number=1, id="1", connection_limit=1)
    server = VirtualServer(name="v", id="1", number=1, vip_address="10.0.0.100", protocol=Protocol.TCP,
                           protocol_port=81, default_pool_id="p", application=application)
    world.configure(Configuration(pools={"p": Pool(name="p", id="p", members=(member,), waiting=LINE)},
                                  virtual_servers={"1": server}))
    world.fastpaths.add(SWITCH, world.link)
    return world


def ended(world: World, serial: int) -> list[Reply | AppReply]:
    world.done.clear()
    world.fastpaths.closed(SWITCH, [Closed(serial, 1, 1, Reason.SHUTDOWN)])
    return [one for one in world.done if isinstance(one, (Reply, AppReply))]


def test_an_agents_question_is_answered_later_and_then_again_the_same() -> None:
    world = waiting_world()
    world.fastpaths.asked(SWITCH, [query(101), query(103, port=4001)])
    assert [one.query.serial for one in world.link.replies] == [101]
    world.fastpaths.asked(SWITCH, [query(103, port=4001)])
    assert len(world.link.replies) == 1, "it waits still"
    (late,) = ended(world, 101)
    world.fastpaths.late(late)
    assert world.link.replies[-1] == late and world.link.replies[-1].query.serial == 103
    world.fastpaths.asked(SWITCH, [query(103, port=4001)])
    assert world.link.replies[-1] == late, "the REPLY was lost"
    assert world.control.virtual_server_counters(1).opened == 2
    world.fastpaths.remove(SWITCH)
    world.fastpaths.late(late)
    assert len(world.link.replies) == 3


def test_what_clients_say_too() -> None:
    world = waiting_world(Application.HTTP)
    said = [AppQuery(query(serial, port=serial), 1, 2, b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for serial in (101, 103)]
    world.fastpaths.asked(SWITCH, said)
    assert [one.reply is None for one in world.link.app_replies] == [False, True]
    (late,) = ended(world, 101)
    world.fastpaths.late(late)
    world.fastpaths.asked(SWITCH, said[1:])
    assert world.link.app_replies[-2:] == [late, late]
    assert isinstance(late, AppReply) and late.reply is not None and late.reply.error is Error.OK


@pytest.mark.parametrize("relayed", [False, True])
def test_whoever_asked_is_answered(relayed: bool) -> None:
    bench = Bench(sites.configuration([sites.server(application=Application.HTTP)], [sites.pool()]))
    links = {False: FakeLink(), True: FakeLink()}
    bench.app.fastpaths.add(1, links[False])
    bench.app.relays.add(1, links[True])
    links[False].proxies = not relayed
    asked = query(101)
    bench.app.perform([AppReply(asked, Reply(asked, Error.CONNLIMIT), answer=b"503")])
    assert [len(links[one].app_replies) for one in (relayed, not relayed)] == [1, 0]
    bench.app.perform([Reply(asked, Error.CONNLIMIT)])
    assert len(links[False].replies) == 1 and not links[True].replies
