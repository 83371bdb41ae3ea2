# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is shown of the running controller."""

from __future__ import annotations

import math
import time
from typing import cast

import msgspec
import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from lbapp.api.views import ConnectionView, StatisticsView, SwitchView
from lbapp.config.model import Algorithm, Application, Configuration, Decision, Protocol, State
from lbapp.control.messages import Closed, Delete, Reason
from lbapp.dataflow.conntrack import Entry
from lbapp.dataflow.ovs import OvsError
from lbapp.dataflow.pipeline import Kind
from lbapp.fastpaths import MemberTraffic, Reading
from lbapp.readings import Readings as RealReadings
from lbapp.remembering import endpoint
from lbapp.runtime import ControllerRuntime
from tests import sites
from tests.fake_frames import frame, parse
from tests.fake_monitors import Watched
from tests.unit.test_app import Bench


class Readings:
    """Readings of a switch that is on this host, or is not."""

    def __init__(self, entries=(), *, local: bool = True) -> None:
        self.entries, self.local = entries, local

    def count(self) -> None:
        """Nothing new."""

    def is_local(self, switch: int) -> bool:
        return self.local

    def conntrack(self, switch: int):
        if isinstance(self.entries, OvsError):
            raise self.entries
        return iter(self.entries)

    def queue_drops(self, switch: int) -> int:
        return 4


def made(site: Configuration, readings: Readings | None = None) -> tuple[Bench, ControllerRuntime]:
    bench = Bench(site)
    watched = Watched()
    watched.service.configure(site)
    return bench, ControllerRuntime(bench.app, cast(RealReadings, readings or Readings()), watched.service)


def commit(bench: Bench) -> None:
    """The switch answers all that was sent."""
    bench.switch.session._open.clear()
    for _ in bench.switch.session.configure(bench.app.configuration):
        pass


SITE = sites.configuration([sites.server()], [sites.pool(of=sites.members(2))])


def test_a_virtual_server_is_pending_until_every_switch_has_it():
    bench, runtime = made(SITE)
    server = SITE.virtual_servers["v"]
    assert runtime.virtual_server_status(server) == ("PENDING_UPDATE", "ONLINE")
    commit(bench)
    assert runtime.virtual_server_status(server) == ("ACTIVE", "ONLINE")
    changed = sites.configuration([sites.server(maintenance=True)], SITE.pools.values())
    bench.app.configure(changed)
    assert runtime.virtual_server_status(changed.virtual_servers["v"]) == ("PENDING_UPDATE", "OFFLINE")
    bench.switch.session._error = True
    assert runtime.virtual_server_status(changed.virtual_servers["v"])[0] == "ERROR"
    bench.app.switches.clear()
    assert runtime.virtual_server_status(changed.virtual_servers["v"])[0] == "ACTIVE"


@pytest.mark.parametrize(("more", "expected"), [
    ({}, "ONLINE"), ({"admin_state_up": False}, "DISABLED"), ({"maintenance": True}, "OFFLINE"),
    ({"use": None}, "OFFLINE")])
def test_operating_status_of_a_virtual_server(more, expected):
    site = sites.configuration([sites.server(**more)], SITE.pools.values())
    assert made(site)[1].virtual_server_status(site.virtual_servers["v"])[1] == expected


def test_a_virtual_server_that_reads_is_offline_where_nobody_hears_its_clients(monkeypatch):
    site = sites.configuration([sites.server(application=Application.HTTP)], [sites.pool(of=sites.members(2))])
    bench, runtime = made(site)
    assert runtime.virtual_server_status(site.virtual_servers["v"])[1] == "OFFLINE"
    monkeypatch.setattr(bench.app.fastpaths, "serves", lambda switch, number: True)
    assert runtime.virtual_server_status(site.virtual_servers["v"])[1] == "ONLINE"


def test_what_is_relayed_is_counted_and_listed():
    site = sites.configuration([sites.server(application=Application.HTTP)], [sites.pool(of=sites.members(2))])
    bench, runtime = made(site)
    assert runtime.statistics().switches[0].relay is None
    bench.app._do(bench.switch, "configure", site)
    assert runtime.virtual_server_status(site.virtual_servers["v"])[1] == "ONLINE"
    answer = bench.punt(kind=Kind.RELAY)
    assert answer is not None
    greeted = parse(answer[40:])
    told = runtime.statistics().switches[0].relay
    assert told is not None and (told.connections, told.handshakes["greeted"]) == (0, 1)
    assert told.handshakes_held == 0, "of a client that has said nothing, nothing is held"
    request = frame("10.0.0.1", "10.0.0.100", flags=24, seq=1001, ack=greeted["tcp_seq"] + 1,
                    payload=b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    bench.punt(request, Kind.RELAY)
    (view,) = [one for one in runtime.connections() if one.state == "RELAYED"]
    assert (view.binding, view.policy, view.virtual_server) == ("relay", "", "v")
    told = runtime.statistics().switches[0].relay
    assert told is not None and (told.connections, told.handshakes_held) == (1, 1), "its member was sent a SYN"


def test_status_of_members_and_pools():
    first, second = sites.members(2)
    variants = {
        "ONLINE": first, "DISABLED": msgspec.structs.replace(first, admin_state_up=False),
        "DRAINING": msgspec.structs.replace(first, draining=True), "OFFLINE": second}
    for expected, member in variants.items():
        site = sites.configuration([sites.server()], [sites.pool(of=(member,))])
        bench, runtime = made(site)
        if expected == "OFFLINE":
            bench.app.control._neighbours._switches[1].hosts.clear()
        pool = site.pools["p"]
        assert runtime.member_status(pool, pool.members[0]) == ("ACTIVE", expected)
        assert runtime.pool_status(pool)[1] == ("ONLINE" if expected == "ONLINE" else "OFFLINE")
    bench, runtime = made(SITE)
    del bench.app.control._neighbours._switches[1].hosts["10.0.0.12"]
    assert runtime.pool_status(SITE.pools["p"])[1] == "DEGRADED"
    down = msgspec.structs.replace(SITE.pools["p"], admin_state_up=False)
    assert runtime.pool_status(down)[1] == "DISABLED"


def test_members_behind_a_next_hop_are_there_when_it_is():
    site = sites.covering()["next hop 4"]
    bench, runtime = made(site)
    (server,), (pool,) = site.virtual_servers.values(), site.pools.values()
    bench.app.control._neighbours._switches[1].hosts.pop("10.0.0.11", None)
    assert runtime.virtual_server_status(server)[1] == "ONLINE"
    assert runtime.member_status(pool, pool.members[0])[1] == "ONLINE"
    bench.app.control._neighbours._switches[1].hosts.clear()
    assert runtime.virtual_server_status(server)[1] == "OFFLINE"


def test_switches():
    site = sites.configuration([sites.server(decision=Decision.SWITCH)], SITE.pools.values())
    bench, runtime = made(site)
    (view,) = runtime.switches()
    assert isinstance(view, SwitchView)
    assert (view.dpid, view.address, view.connected, view.groups) == ("0000000000000001", "127.0.0.1:1", True, 1)
    assert {address: host.port for address, host in view.hosts.items()} == {
        address: host.port for address, host in sites.reachable(site).items()}
    msgspec.convert(msgspec.to_builtins(view), SwitchView)
    assert bench.switch.id == 1


def entry(serial: int, server: int = 1, member: int = 1, six: bool = False) -> Entry:
    client, vip = ("fd00::1", "fd00::100") if six else ("10.0.0.1", "10.0.0.100")
    return Entry("tcp", (client, vip, 40000 + serial, 80), (vip, client, 80, 40000), 2, member, serial, server, False,
                 "ESTABLISHED")


def test_connections_of_conntrack():
    entries = [entry(0xAB), entry(0), entry(5, server=9), entry(6, member=77), entry(7, six=True)]
    _, runtime = made(SITE, Readings(entries))
    views = list(runtime.connections())
    assert [view.decided_by for view in views] == ["controller", "switch", "controller"]
    assert views[0].id == "000000ab" and len(views[1].id) == 16
    assert (views[0].member, views[0].client) == ("10.0.0.11:8080", "10.0.0.1:40171")
    assert views[0].destination == "10.0.0.100:80"
    assert views[2].client == "[fd00::1]:40007"
    for view in views:
        msgspec.convert(msgspec.to_builtins(view), ConnectionView)


@pytest.mark.parametrize("readings", [Readings(OvsError("gone")), Readings(local=False), Readings()])
def test_connections_of_rules(readings):
    site = sites.configuration([sites.server(state=State.RULES)], SITE.pools.values())
    bench, runtime = made(site, readings)
    bench.punt()
    (view,) = runtime.connections()
    assert (view.virtual_server, view.client, view.destination, view.state, view.protocol) == (
        "v", "10.0.0.1:40000", "10.0.0.100:80", "ACTIVE", "TCP")
    assert view.packets == 0 and view.age_seconds is not None and view.age_seconds < 5


def test_counted_connections_of_a_switch_elsewhere_come_from_the_control_segment():
    site = sites.configuration([sites.server(connection_limit=5)], SITE.pools.values())
    for local, expected in ((True, 0), (False, 1)):
        bench, runtime = made(site, Readings(local=local))
        bench.punt()
        assert len(list(runtime.connections())) == expected


def test_statistics():
    site = sites.configuration([sites.server(), sites.server("u", 2, protocol=Protocol.UDP, state=State.RULES)],
                               SITE.pools.values())
    bench, runtime = made(site)
    for sport in range(2000, 2010):
        bench.punt(frame("10.0.0.1", "10.0.0.100", sport=sport))
    bench.punt(frame("10.0.0.1", "10.0.0.100", 17), number=2)
    bench.punt(frame("10.0.0.1", "10.0.0.100", flags=0x10, sport=7))
    bench.switch.session.counters.bound.update({(1, 1): 30, (1, 2): 10})
    bench.switch.session.counters.forwarded[1] = (7, 700)
    view = runtime.statistics()
    assert isinstance(view, StatisticsView)
    (checks,) = view.monitors
    assert (checks.addresses, checks.targets, checks.checks, checks.late, checks.cpu_seconds) == (
        ["10.0.0.250/24"], 0, 70, 1, 0.25)
    tcp, udp = view.virtual_servers
    assert (tcp.opened, tcp.messages_to_controller, tcp.active, tcp.packets) == (50, 11, None, None)
    assert tcp.messages_per_connection == round(11 / 50, 4) and tcp.refused == {"UNKNOWN": 1}
    assert (udp.opened, udp.active, udp.packets) == (1, 1, 0)
    members = {member.id: member for member in view.members}
    assert members["m1"].opened + members["m2"].opened == 51
    assert (members["m1"].packets, members["m1"].bytes) == (7, 700)
    (switch,) = view.switches
    assert (switch.packet_ins, switch.packet_outs, switch.queries_dropped) == (12, 12, 4)
    assert switch.flow_mods == 2 + bench.switch.session.flow_mods
    msgspec.convert(msgspec.to_builtins(view), StatisticsView)


def test_what_algorithms_go_by_is_told_of_each_member():
    site = sites.configuration([sites.server()], [sites.pool("p", Algorithm.LEAST_BYTES, sites.members(3))])
    bench, runtime = made(site)
    for sport in (2000, 2001, 2002):
        bench.punt(frame("10.0.0.1", "10.0.0.100", sport=sport))
    control, now = bench.app.control, time.monotonic()
    control.response_times([(1, 0.0125)], now - 3.0)
    serials = {one.member: one.serial for one in control.connections()}
    control.handle(Delete(1, (Closed(serials[2], 1, 2, Reason.SHUTDOWN, False, True, 9, 9000, 0.25),)), now - 7.0)
    checked, asked, unknown = runtime.statistics().members
    assert (checked.active, checked.response_seconds, checked.response_by) == (1, 0.0125, "monitors")
    assert checked.response_age_seconds is not None and 3.0 <= checked.response_age_seconds < 60.0
    assert (checked.bytes_lately, checked.bytes_lately_age_seconds) == (None, None)
    assert (asked.active, asked.response_seconds, asked.response_by) == (0, 0.25, "connections")
    assert asked.bytes_lately_age_seconds is not None and 7.0 <= asked.bytes_lately_age_seconds < 60.0
    assert asked.bytes_lately is not None
    assert asked.bytes_lately == pytest.approx(9000 * math.exp(-asked.bytes_lately_age_seconds / 10), rel=0.02, abs=1)
    assert unknown.active == 1
    assert (unknown.response_seconds, unknown.response_by, unknown.response_age_seconds, unknown.bytes_lately,
            unknown.bytes_lately_age_seconds) == (None,) * 5


def test_connections_of_members_that_nobody_follows(monkeypatch):
    """Known from what holds them, else not made up."""
    site = sites.configuration([sites.server()], [sites.pool(of=sites.members(2))])
    bench, runtime = made(site)
    assert [one.active for one in runtime.statistics().members] == [None, None]
    reading = Reading(5, {}, {(1, 1): MemberTraffic(9, 4, 0, 0), (1, 2): MemberTraffic(3, 3, 0, 0)})
    monkeypatch.setattr(bench.app.fastpaths, "serves", lambda switch, number: True)
    monkeypatch.setattr(bench.app.fastpaths, "read", lambda switch: reading)
    assert [one.active for one in runtime.statistics().members] == [5, 0]


def test_endpoints():
    assert endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint("fd00::1", 80) == "[fd00::1]:80"
