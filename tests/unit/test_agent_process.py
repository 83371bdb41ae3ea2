# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The agent's process (:mod:`lbapp.agent_process`) between a fast path that is played and control segments over real
sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import eventlet
import pytest

from lbapp import agent_process as module
from lbapp.agent_process import AgentProcess, Settings
from lbapp.bus.counted import Traffic
from lbapp.bus.events import Counted, Synced, Up
from lbapp.bus.transport import CsClient
from lbapp.control.messages import (
    AppQuery,
    AppReply,
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
    Translation,
)
from lbapp.control_segments import announce
from lbapp.dataflow.agent import HELD
from lbapp.dataflow.distribution import Distribution, Greeting, Target
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import Hash, Mode, ServiceKey
from lbapp.dataflow.ovs import OvsError
from lbapp.dataflow.pipeline import Label, zones
from tests.fake_fastpath import FakeFastPath
from tests.green import until
from tests.unit.test_agent import CLIENT, MEMBER, VIP

SWITCH = 5
KEY = os.urandom(32)


class Fast(FakeFastPath):
    """Also counts, and has been somebody else's before."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[int, int], layout.Traffic] = {}
        self.named = {"hits": 1}
        self.refused: dict[int, tuple[int, int]] = {}

    def service_stats(self) -> dict[tuple[int, int], layout.Traffic]:
        return dict(self.traffic)

    def counters(self) -> dict[str, int]:
        return dict(self.named)

    def refusals(self) -> dict[int, tuple[int, int]]:
        return dict(self.refused)

    def set_cookies(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        self.told.append(("set_cookies", (keys, current)))


class Loop:
    """Instead of the greenlets that wait for rings."""

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class Ovs:
    """Has these connections in conntrack."""

    def __init__(self) -> None:
        self.dump: str | OvsError = ""

    def appctl(self, *_: str) -> str:
        if isinstance(self.dump, OvsError):
            raise self.dump
        return self.dump


def made(number: int = 7, port: int = 80, mode: Mode = Mode.PUNT, member: int = 3) -> Distribution:
    return Distribution(number, VIP, port, 6, mode, Hash.TURN, 600, (
        Target(member, 1, MEMBER, 8080, Host(bytes((2, 0, 0, 0, 0, 3)), 4), False),))


def closed(virtual_server: int, serial: int = 11, member: int = 3) -> Closed:
    return Closed(serial, virtual_server, member, Reason.SHUTDOWN, False, True, 10, 1000, 0.5)


class Site:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "AgentLoop", Loop)
        monkeypatch.setattr(module, "COUNT_SECONDS", 0.05)
        monkeypatch.setattr(module, "COUNT_SHARE", 1.0)
        monkeypatch.setattr(module, "DUMP_SECONDS", 0.04)
        monkeypatch.setattr(module, "REJOIN_SECONDS", 0.3)
        self.fast, self.ovs = Fast(), Ovs()
        self.process: AgentProcess | None = None
        self.clients: list[CsClient] = []

    def start(self) -> AgentProcess:
        settings = Settings("br0", ("127.0.0.1", 0), KEY, 1024)
        self.process = AgentProcess(self.fast, SWITCH, settings, self.ovs)  # type: ignore[arg-type]
        return self.process

    def segment(self, identity: int = 77, *wanted: Distribution) -> tuple[CsClient, list[Any]]:
        """A control segment that wants this, connected; and what it hears."""
        process = self.process
        assert process is not None
        heard: list[Any] = []
        client = CsClient(process.address, KEY, identity, lambda _, event: heard.append(event),
                          lambda _, messages: heard.extend(messages))
        self.clients.append(client)
        said = [announce(one) for one in wanted]
        client.replace([server for server, _ in said], {server.number: targets for server, targets in said})
        until(lambda: any(isinstance(event, Synced) for event in heard))
        until(lambda: process._server.peers[identity].connected and identity not in process._saying)
        return client, heard

    def numbers(self) -> dict[int, tuple[int, Mode]]:
        """What the fast path serves: number and mode by port."""
        return {key.port: (service.number, service.mode) for key, service in self.fast.kept_services.items()}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    one = Site(monkeypatch)
    yield one
    for client in one.clients:
        client.close()
    if one.process is not None:
        one.process.stop()


def test_connections_of_an_agent_before_keep_their_numbers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REJOIN_SECONDS", 2.0)
    for number, port in ((4, 80), (9, 81), (6, 82)):
        site.fast.kept_services[ServiceKey(VIP, port, 6)] = layout.Service(number, Mode.DECIDE, Hash.TURN, 600, ())
    site.fast.traffic[12, 3] = layout.Traffic(1, 1, 1, 1)
    site.start()
    site.segment(77, made(1, 81), made(2, 80), made(3, 90))
    assert {port: number for port, (number, _) in site.numbers().items()} == {80: 4, 81: 9, 90: 13, 82: 6}
    until(lambda: 82 not in site.numbers())
    assert {"virtual_server": 6} in site.fast.did("delete"), "nobody has announced it in all that time"


def test_another_control_segment_has_time_to_come_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REJOIN_SECONDS", 60.0)
    for number, port in ((4, 80), (9, 81)):
        site.fast.kept_services[ServiceKey(VIP, port, 6)] = layout.Service(number, Mode.DECIDE, Hash.TURN, 600, ())
    process = site.start()
    site.segment(77, made(1, 80))
    assert 81 in site.numbers()
    site.segment(88, made(1, 81))
    process._rejoined()
    assert site.numbers() == {80: (4, Mode.PUNT), 81: (9, Mode.PUNT)}
    assert site.fast.did("delete") == []


def test_no_packet_meets_a_virtual_server_without_its_distribution(site: Site) -> None:
    site.fast.kept_services[ServiceKey(VIP, 80, 6)] = layout.Service(4, Mode.DECIDE, Hash.TURN, 600, ())
    process = site.start()
    seen: list[Mode] = []
    configure = process.agent.configure

    def noting(changed: Any, **more: Any) -> None:
        configure(changed, **more)
        seen.extend(mode for _, mode in site.numbers().values())

    process.agent.configure = noting  # type: ignore[method-assign]
    site.segment(77, made(1, 80, Mode.DECIDE))
    until(lambda: len(seen) >= 2)
    assert set(seen) == {Mode.DECIDE}


def test_what_ended_before_anybody_was_there_is_told_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_EARLY", 3)
    site.fast.kept_services[ServiceKey(VIP, 80, 6)] = layout.Service(4, Mode.DECIDE, Hash.TURN, 600, ())
    process = site.start()
    process._closed([closed(4, serial) for serial in range(1, 6)])
    _, heard = site.segment(77, made(50, 80))
    until(lambda: any(isinstance(one, Delete) for one in heard))
    (told,) = [one for one in heard if isinstance(one, Delete)]
    assert [(one.serial, one.virtual_server) for one in told.closed] == [(1, 50), (2, 50), (3, 50)]
    assert process.agent.counters["closed_lost"] == 2


def test_what_cannot_be_held_is_refused_to_whom_it_belongs(site: Site) -> None:
    site.start()
    client, heard = site.segment(77, made(50, 80))
    site.fast.room = layout.Result.FULL
    query = Query(9, SWITCH, 1, bytes(6), FlowSignature(CLIENT, 4000, VIP, 80, 6), 50, 2)
    client.send_replies([Reply(query, Error.OK, 3, Translation(MEMBER, 8080, Host(bytes(6), 4)))])
    until(lambda: Refused(SWITCH, 9, 50) in heard)


def test_reap_is_answered_by_who_holds_the_connection(site: Site) -> None:
    process = site.start()
    client, heard = site.segment(77, made(50, 80))
    label = 8 << Label.SERIAL | 50 << Label.VIRTUAL_SERVER | 1 << Label.TRACKED
    line = (f"tcp,orig=(src=10.0.0.1,dst=10.0.0.100,sport=1,dport=80),reply=(src=10.0.0.2,dst=10.0.0.1,sport=80,"
            f"dport=1),zone={zones(SWITCH).service},mark=3,labels={label:#x},protoinfo=(state=ESTABLISHED)")
    site.ovs.dump = OvsError("not now")
    site.fast.missing = {7}
    client.send_reaps([Reap(SWITCH, serial, 50, 3) for serial in (7, 8, 10)])
    until(lambda: process._reaps == {} and any(isinstance(one, Delete) for one in heard))
    eventlet.sleep(0.1)
    assert site.fast.did("reap") == [{7: layout.Wanted()}]
    assert [one.closed[0].serial for one in heard if isinstance(one, Delete)] == [7]
    site.ovs.dump = line
    client.send_reaps([Reap(SWITCH, serial, 50, 3) for serial in (8, 10)])
    until(lambda: Stats(SWITCH, 8, Error.CONNALIVE, 0, 0) in heard)
    until(lambda: sum(isinstance(one, Delete) for one in heard) == 2)
    assert [one.closed[0].serial for one in heard if isinstance(one, Delete)] == [7, 10]


def test_a_member_or_reset_of_one_is_not_the_others(site: Site) -> None:
    site.start()
    one, _ = site.segment(77, made(50, 80))
    site.segment(88, made(50, 81))
    one.send_reaps([Reap(SWITCH, 0, 0, 3, final=True)])
    until(lambda: site.fast.did("delete"))
    assert site.fast.did("delete") == [{"member": 3, "virtual_server": site.numbers()[80][0]}]
    one.send_reset()
    until(lambda: len(site.fast.did("delete")) == 2)
    assert site.fast.did("delete")[1] == {"virtual_server": site.numbers()[80][0]}


def test_what_was_counted_is_told_when_it_changes(site: Site) -> None:
    process = site.start()
    _, heard = site.segment(77, made(50, 80))
    _, other = site.segment(88, made(60, 81))
    number = site.numbers()[80][0]
    site.fast.traffic = {(number, 3): layout.Traffic(4, 1, 40, 4000)}
    site.fast.refused = {number: (7, 2), 999: (1, 1), number + 1: (0, 0)}
    process.agent.held = 3
    process.agent.counters["refused"] = 2
    expected = Counted(3, {"hits": 1, "refused": 2, HELD: 0}, (
        Traffic(50, 3, 4, 1, 40, 4000), Traffic(50, 0, 7, 2, 0, 0)))
    until(lambda: expected in heard)
    until(lambda: Counted(3, {"hits": 1, "refused": 2, HELD: 0}, ()) in other)
    eventlet.sleep(0.3)
    assert heard.count(expected) == 1, "once"


def test_what_is_heard_first_is_from_before_anything_begins(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    process = site.start()
    configure = process.agent.configure

    def traffic_at_once(changed: Any, **more: Any) -> None:
        configure(changed, **more)
        site.fast.named = {"hits": 2}

    process.agent.configure = traffic_at_once  # type: ignore[method-assign]
    _, heard = site.segment(77, made(50, 80))
    until(lambda: Counted(0, {"hits": 2, HELD: 0}, ()) in heard)
    assert next(one for one in heard if isinstance(one, Counted)) == Counted(0, {"hits": 1, HELD: 0}, ())


def test_work_that_fails_goes_on(site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    process = site.start()
    site.segment(77, made(50, 80))
    monkeypatch.setattr(site.fast, "counters", lambda: 1 / 0)
    until(lambda: "counting failed" in caplog.text)
    assert process.address[0] == "127.0.0.1"


# ------------------------------------------------------------------ what clients say

KEYS = (b"a" * 16, None)


def greeted(number: int = 50, port: int = 80) -> Distribution:
    return made(number, port, Mode.PROXY)._replace(greeting=Greeting(1460, 7, True, 2.5))


def test_keys_and_greetings_reach_the_fast_path(site: Site) -> None:
    site.start()
    client, _ = site.segment(77, greeted())
    assert site.numbers()[80][1] is Mode.PASS, "no keys yet"
    client.greet(KEYS, 0)
    until(lambda: site.numbers()[80][1] is Mode.PROXY)
    assert site.fast.did("set_cookies") == [(KEYS, 0)]
    (service,) = site.fast.kept_services.values()
    assert (service.mss, service.window_scale, service.sack) == (1460, 7, True)
    client.greet((KEYS[0], b"b" * 16), 1)
    until(lambda: site.fast.did("set_cookies")[1:] == [((KEYS[0], b"b" * 16), 1)])
    client.close()
    until(lambda: site.numbers()[80][1] is Mode.PASS)
    assert len(site.fast.did("set_cookies")) == 2, "what is on its way goes on"


def test_what_a_client_said_is_asked_and_what_is_decided_is_done_once(site: Site) -> None:
    process = site.start()
    client, heard = site.segment(77, greeted())
    client.greet(KEYS, 0)
    until(lambda: site.numbers()[80][1] is Mode.PROXY)
    number = site.numbers()[80][0]
    said: list[Any] = []
    reply = process.agent.reply

    def noting(replies: Any, now: float = 0.0) -> Any:
        assert abs(now - time.monotonic()) < 5
        said.extend(replies)
        return reply(replies, now)

    process.agent.reply = noting  # type: ignore[method-assign]
    query = Query(9, SWITCH, 1, bytes(6), FlowSignature(CLIENT, 4000, VIP, 80, 6), number, 2)
    asked = AppQuery(query, 1, 2, b"", b"GET / HTTP/1.1\r\n" * 4000, (3,), True)
    process._asked([asked])
    own = query._replace(virtual_server=50)
    until(lambda: asked._replace(query=own) in heard)
    member = Reply(own, Error.OK, 3, Translation(MEMBER, 8080, Host(bytes(6), 4)))
    decided = AppReply(own, member)
    for one in (AppReply(own), AppReply(own), decided, decided):
        client.send_app_replies([one])
        client.flush()
    until(lambda: Refused(SWITCH, 9, 50) in heard)  # the agent knows no such connection
    eventlet.sleep(0.1)
    assert said == [AppReply(query)] * 2 + [decided._replace(query=query, reply=member._replace(query=query))]
    assert heard.count(Refused(SWITCH, 9, 50)) == 1


def test_a_flow_that_is_handed_over_waits_for_what_it_belongs_to(site: Site) -> None:
    process = site.start()
    client, heard = site.segment(77, made(50))
    query = Query(8, SWITCH, 1, bytes(6), FlowSignature(CLIENT, 4000, VIP, 81, 6), 51, 0)
    flow = NewFlow(query, 3, Translation(MEMBER, 8080, Host(bytes(6), 4)))
    peer = process._server.peers[77]
    # As at the beginning of a connection, whose CSMB is slower.
    process._event(peer, Up(peer.hello, None, None, 1400))  # type: ignore[arg-type]
    process._messages(peer, [flow])
    assert site.fast.did("install") == []
    client.put(announce(made(51, 81))[0])
    until(lambda: process.segments.local(77, 51))
    process._event(peer, Synced(2))
    assert len(site.fast.did("install")) == 1
    eventlet.sleep(0.05)
    assert not any(isinstance(one, Refused) for one in heard)


def test_decisions_that_are_remembered_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DECIDED", 2)
    process = site.start()
    query = Query(9, SWITCH, 1, bytes(6), FlowSignature(CLIENT, 4000, VIP, 80, 6), 1, 2)
    replies = [AppReply(query._replace(serial=serial), Reply(query, Error.NOTAVAIL)) for serial in (1, 3, 5)]
    assert [process._first(one) for one in (*replies, replies[2], replies[0])] == [True, True, True, False, True]
