# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The controller's side of agents elsewhere (:mod:`lbapp.remote_agents`): links, totals, what is said again."""

from __future__ import annotations

import functools
import os
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eventlet
import pytest

from lbapp import remote_agents as module
from lbapp.bus.counted import Traffic
from lbapp.bus.csmb import VERSIONS, HelloFlag, Version
from lbapp.bus.events import Added, Counted, Keyed
from lbapp.bus.transport import DfsServer
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
    Reply,
    Stats,
    Translation,
)
from lbapp.dataflow.agent import HELD
from lbapp.dataflow.distribution import Distribution, Greeting, Limits
from lbapp.dataflow.fastpath.layout import Hash, Mode
from lbapp.fastpaths import MemberTraffic
from lbapp.remote_agents import REPEATS, RemoteAgents, RemoteLink, Totals, own_identity
from tests.green import until

KEY = os.urandom(32)
SWITCH = 9


# ------------------------------------------------------------------ totals


def counted(hits: int, *rows: tuple[int, ...], **more: int) -> Counted:
    return Counted(5, {"hits": hits, **more}, tuple(Traffic(*row) for row in rows))


def test_totals_of_one_fast_path_are_its_own() -> None:
    totals = Totals()
    assert totals.connections is None and totals.members == {}
    totals.take(counted(10, (1, 3, 8, 6, 60, 600)))
    totals.take(counted(30, (1, 3, 9, 9, 90, 900), (1, 4, 2, 1, 10, 100)))
    assert totals.connections == 5
    assert totals.counters == {"hits": 30}
    assert totals.members == {(1, 3): MemberTraffic(9, 9, 90, 900), (1, 4): MemberTraffic(2, 1, 10, 100)}
    assert totals.before == {(1, 3): 8, (1, 4): 0}, "opened before anybody listened"


def test_a_fast_path_that_is_set_up_again_counts_on_and_what_it_held_is_gone() -> None:
    totals = Totals()
    totals.take(counted(10, (1, 3, 8, 6, 60, 600), (2, 3, 5, 5, 5, 5)))
    totals.take(counted(2, (1, 3, 1, 0, 1, 10)))
    assert totals.counters == {"hits": 12}
    assert totals.members == {(1, 3): MemberTraffic(9, 8, 61, 610), (2, 3): MemberTraffic(5, 5, 5, 5)}


def test_a_process_that_is_started_again_counts_on_for_its_own_part() -> None:
    totals = Totals()
    totals.take(counted(10, refused=4))
    totals.take(counted(20, refused=1))
    assert totals.counters == {"hits": 20, "refused": 5}


def test_what_is_held_half_way_is_told_as_it_is() -> None:
    totals = Totals()
    for held in (7, 3, 5):
        totals.take(counted(10, **{HELD: held}))
        assert totals.counters[HELD] == held, "not added up"


# ------------------------------------------------------------------ links


class Client:
    """A :class:`CsClient` that is played."""

    def __init__(self) -> None:
        self.connected = True
        self.said: list[Reap] = []

    def send_reaps(self, reaps: list[Reap]) -> None:
        self.said += reaps

    def put(self, server: Any) -> None:
        pass

    def distribute(self, number: int, targets: Any) -> None:
        pass


def reap(serial: int, member: int = 3, final: bool = False) -> Reap:
    return Reap(SWITCH, serial, 1, member, final)


def test_what_the_control_segment_repeats_is_said_once() -> None:
    client = Client()
    link = RemoteLink(client)  # type: ignore[arg-type]
    link.reap([reap(1)])
    link.again(time.monotonic() + 100)
    assert client.said == [reap(1)]


def test_what_nobody_else_repeats_is_said_until_it_is_answered_or_was_said_often() -> None:
    client = Client()
    link = RemoteLink(client)  # type: ignore[arg-type]
    client.connected = False
    link.reap([reap(0, 4, final=True)])
    link.insist([reap(5), reap(7), reap(9)])
    assert client.said == []
    client.connected = True
    now = time.monotonic()
    link.again(now)
    assert client.said == [reap(0, 4, final=True), reap(5), reap(7), reap(9)]
    link.again(now + 0.5)
    assert len(client.said) == 4, "not yet"
    link.answered([Delete(SWITCH, (Closed(5, 1, 3, Reason.DELETED),)), Stats(SWITCH, 7, Error.CONNALIVE, 1, 2)])
    for second in range(1, 20):
        link.again(now + second * 1.1)
    assert client.said[4:] == [reap(0, 4, final=True), reap(9)] * (REPEATS - 1)


def test_a_member_that_is_back_loses_nothing_to_what_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "announce", lambda made: (made, made.targets))
    client = Client()
    link = RemoteLink(client)  # type: ignore[arg-type]
    link.reap([reap(0, 4, final=True), reap(0, 5, final=True), reap(9, 4, final=True)])
    client.said.clear()
    made: Any = types.SimpleNamespace(targets=(types.SimpleNamespace(member=4),))
    link.configure({1: made})
    link.again(time.monotonic() + 100)
    assert client.said == [reap(0, 5, final=True), reap(9, 4, final=True)]


def test_what_is_repeated_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REAPS", 3)
    client = Client()
    client.connected = False
    link = RemoteLink(client)  # type: ignore[arg-type]
    link.insist([reap(serial) for serial in (1, 3, 5, 7)])
    client.connected = True
    link.again(time.monotonic())
    assert [one.serial for one in client.said] == [3, 5, 7]


# ------------------------------------------------------------------ agents


class FastPaths:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.links: dict[int, Any] = {}
        self.told: list[Any] = []
        self.believed: list[Reap] = []
        self.questions: list[Any] = []

    def link(self, switch: int) -> Any:
        return self.links.get(switch)

    def add(self, switch: int, link: Any) -> None:
        self.links[switch] = link
        self.told.append(("add", switch))

    def remove(self, switch: int) -> None:
        del self.links[switch]
        self.told.append(("remove", switch))

    def refresh(self, switch: int) -> None:
        self.told.append(("refresh", switch))

    def changed(self, switch: int) -> None:
        self.told.append(("changed", switch))

    def suspects(self, switch: int) -> list[Reap]:
        return self.believed

    def asked(self, switch: int, queries: Any) -> None:
        self.told.append(("asked", switch, len(queries)))
        self.questions += queries

    def closed(self, switch: int, closed: Any) -> None:
        self.told.append(("closed", switch, len(closed)))

    def heard(self, messages: Any) -> None:
        self.told += messages


class Site:
    def __init__(self) -> None:
        self.fastpaths = FastPaths()
        self.agents = RemoteAgents(self.fastpaths, KEY, 77)  # type: ignore[arg-type]
        self.heard: list[Any] = []
        self.events: list[Any] = []
        self.servers: list[DfsServer] = []

    def dfs(self, switch: int = SWITCH, listen: tuple[str, int] = ("127.0.0.1", 0),
            flags: HelloFlag = HelloFlag.APP_PROXY, versions: tuple[Version, ...] = VERSIONS) -> DfsServer:
        server = DfsServer(listen, KEY, switch, lambda _, event: self.events.append(event),
                           lambda _, messages: self.heard.extend(messages), flags=flags, versions=versions)
        self.servers.append(server)
        return server


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.agents.close()
    for server in one.servers:
        server.close()


def test_an_agent_is_the_link_of_its_switch_and_stays_it(site: Site) -> None:
    first = site.dfs()
    site.agents.connect(first.address)
    until(lambda: ("add", SWITCH) in site.fastpaths.told)
    peer = first.peers[77]
    until(lambda: peer.connected)
    query = Query(1, SWITCH, 1, bytes(6), FlowSignature(bytes(4), 4000, bytes((10, 0, 0, 100)), 80, 6), 1, 2)
    peer.send_queries([query])
    peer.send_deletes([Closed(3, 1, 3, Reason.SHUTDOWN)] * 2)
    peer.send_stats([Stats(SWITCH, 5, Error.CONNALIVE, 1, 2)])
    assert peer.send_counters(4, {"hits": 9}, [Traffic(1, 3, 8, 6, 60, 600)])
    for told in (("asked", SWITCH, 1), ("closed", SWITCH, 2), Stats(SWITCH, 5, Error.CONNALIVE, 1, 2)):
        until(functools.partial(site.fastpaths.told.__contains__, told))
    link = site.fastpaths.links[SWITCH]
    until(lambda: link.read().connections == 4)
    reading = link.read()
    assert (reading.counters["hits"], reading.members) == (9, {(1, 3): MemberTraffic(8, 6, 60, 600)})
    # It ends; the next one at its place may have lost something.
    site.fastpaths.believed = [reap(11)]
    first.close()
    until(lambda: not link.client.connected)
    site.dfs(listen=first.address)
    until(lambda: ("refresh", SWITCH) in site.fastpaths.told)
    until(lambda: reap(11) in site.heard)
    assert site.fastpaths.links[SWITCH] is link


VIP = bytes((10, 0, 0, 100))
QUERY = Query(1, SWITCH, 1, bytes(6), FlowSignature(bytes(4), 4000, VIP, 80, 6), 5, 2)
GREETED = Distribution(5, VIP, 80, 6, Mode.PROXY, Hash.TURN, 600, (), Greeting(1460, 7, True, 2.5))


def test_an_agent_that_shakes_hands_gets_keys_and_is_answered(site: Site) -> None:
    server = site.dfs()
    site.agents.connect(server.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    assert link.proxies
    link.greet((b"a" * 16, None), 0)
    link.configure({5: GREETED}, whole=True)
    until(lambda: any(isinstance(event, Added) for event in site.events))
    assert Keyed((b"a" * 16, None), 0) in site.events
    added = next(event for event in site.events if isinstance(event, Added))
    assert added.server.greeting == (1460, 7, True, 2500)
    asked = AppQuery(QUERY, 1, 2, b"", b"GET /" + bytes(60_000), (7,), True)
    server.peers[77].send_app_queries([asked])
    until(lambda: site.fastpaths.questions == [asked])
    told = AppReply(QUERY, Reply(QUERY, Error.NOTAVAIL), answer=b"HTTP/1.1 503 ..." * 3000)
    link.reply([AppReply(QUERY), told])
    until(lambda: len(site.heard) == 2)
    assert site.heard == [AppReply(QUERY), told]
    flow = NewFlow(QUERY, 3, Translation(None, 0, Host(bytes(6), 4)), False, 0, 7, -2, member_finished=True)
    assert link.take_over(flow)
    until(lambda: site.heard[-1] == flow)
    # Away: nobody would hear what clients say. Back: it is told the keys again.
    server.close()
    until(lambda: ("changed", SWITCH) in site.fastpaths.told)
    assert not link.proxies and not link.take_over(flow)
    link.greet((b"a" * 16, b"b" * 16), 1)
    site.events.clear()
    site.dfs(listen=server.address)
    until(lambda: Keyed((b"a" * 16, b"b" * 16), 1) in site.events)
    until(lambda: site.fastpaths.told.count(("changed", SWITCH)) == 2)
    assert link.proxies


def test_an_older_agent_does_not_take_over_what_has_half_ended(site: Site) -> None:
    """It could not be told; a connection that nobody has finished is its own."""
    server = site.dfs(versions=VERSIONS[:3])
    site.agents.connect(server.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    flow = NewFlow(QUERY, 3, Translation(None, 0, Host(bytes(6), 4)))
    assert not link.take_over(flow._replace(client_finished=True))
    assert not link.take_over(flow._replace(member_finished=True))
    assert link.take_over(flow)
    until(lambda: site.heard == [flow])


@pytest.mark.parametrize("older", [{"versions": VERSIONS[:1]}, {"flags": HelloFlag(0)}])
def test_an_older_agent_goes_on_without(site: Site, caplog: pytest.LogCaptureFixture, older: Any) -> None:
    server = site.dfs(**older)
    site.agents.connect(server.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    assert not link.proxies
    assert "does not shake hands with clients" in caplog.text
    link.greet((b"a" * 16, None), 0)
    link.configure({5: GREETED._replace(mode=Mode.PASS, greeting=None)}, whole=True)
    until(lambda: any(isinstance(event, Added) for event in site.events))
    assert not any(isinstance(event, Keyed) for event in site.events)
    server.peers[77].send_queries([QUERY])
    until(lambda: site.fastpaths.questions == [QUERY])
    assert not link.take_over(NewFlow(QUERY, 3, Translation(None, 0, Host(bytes(6), 4)), False, 0, 7))


def test_another_switch_at_the_same_address_is_another_link(site: Site) -> None:
    first = site.dfs()
    site.agents.connect(first.address)
    until(lambda: SWITCH in site.fastpaths.links)
    first.close()
    site.dfs(switch=10, listen=first.address)
    until(lambda: 10 in site.fastpaths.links)
    assert ("remove", SWITCH) in site.fastpaths.told and SWITCH not in site.fastpaths.links


def test_a_second_agent_of_a_switch_is_left_alone(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first, second = site.dfs(), site.dfs()
    site.agents.connect(first.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    site.agents.connect(second.address)
    until(lambda: f"the one at 127.0.0.1:{second.address[1]} is left alone" in caplog.text)
    second.peers[77].send_deletes([Closed(3, 1, 3, Reason.SHUTDOWN)])
    second.peers[77].flush()
    eventlet.sleep(0.1)
    assert ("closed", SWITCH, 1) not in site.fastpaths.told
    assert site.fastpaths.links[SWITCH] is link


def test_the_own_number_is_drawn_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "identity"
    number = own_identity(path)
    assert number and own_identity(path) == number
    path.write_text("not a number")
    assert own_identity(path) == own_identity(path)
    assert "held no number" in caplog.text


# ------------------------------------------------------------------ limits on new connections


def test_what_limits_refused_is_no_member() -> None:
    totals = Totals()
    totals.take(counted(10, (1, 0, 5, 7, 0, 0), (1, 3, 8, 6, 60, 600)))
    assert totals.refused == {1: (0, 0)}, "before anybody listened"
    totals.take(counted(20, (1, 0, 6, 9, 0, 0), (2, 0, 3, 0, 0, 0), (1, 3, 8, 6, 60, 600)))
    assert totals.refused == {1: (1, 2), 2: (3, 0)}
    assert totals.members == {(1, 3): MemberTraffic(8, 6, 60, 600)}
    totals.take(counted(5, (1, 0, 2, 1, 0, 0)))
    assert totals.refused == {1: (3, 3), 2: (3, 0)}, "a fast path that was set up anew"
    totals.take(counted(6, (1, 0, 2, 4, 0, 0), (2, 0, 1, 1, 0, 0)))
    assert totals.refused == {1: (3, 6), 2: (4, 1)}


def test_who_keeps_limits(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(100, 0, 5, 9, 24)
    server = site.dfs()
    site.agents.connect(server.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    assert link.limits and "keeps no limits" not in caplog.text
    link.configure({5: GREETED._replace(mode=Mode.DECIDE, greeting=None, limits=limits)}, whole=True)
    until(lambda: any(isinstance(event, Added) for event in site.events))
    assert next(event for event in site.events if isinstance(event, Added)).server.limits == limits
    rows = [Traffic(5, 0, 4, 2, 0, 0), Traffic(5, 3, 9, 9, 9, 9)]
    until(lambda: server.peers[77].send_counters(1, {"hits": 1}, rows[1:]))
    until(lambda: server.peers[77].send_counters(1, {"hits": 2}, rows))
    until(lambda: link.read().refused == {5: (4, 2)})
    # An older one comes to its place: until it is known, it is told what it can do.
    server.close()
    until(lambda: ("changed", SWITCH) in site.fastpaths.told)
    assert link.limits, "away: what it was told is in force"
    site.events.clear()
    site.dfs(listen=server.address, versions=VERSIONS[:2])
    until(lambda: not link.limits)
    until(lambda: any(isinstance(event, Added) for event in site.events))
    added = next(event for event in site.events if isinstance(event, Added))
    assert (added.server.mode, added.server.limits) == (Mode.PUNT, None)
    assert "keeps no limits" in caplog.text


def test_an_older_control_segment_hears_nothing_of_limits(site: Site) -> None:
    server = site.dfs(versions=VERSIONS[:2])
    site.agents.connect(server.address)
    until(lambda: SWITCH in site.fastpaths.links)
    link = site.fastpaths.links[SWITCH]
    rows = [Traffic(5, 0, 4, 2, 0, 0), Traffic(5, 3, 9, 9, 9, 9)]
    until(lambda: server.peers[77].send_counters(1, {"hits": 1}, rows))
    until(lambda: (5, 3) in link.read().members)
    assert not link.read().refused
