# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Draining a whole switch, without one: what is in force where, who is refused, what is told and counted.

lbapp/control/switch_draining.py, lbapp/finishing.py, and what they meet in the control segment, the application, the
fast paths' links and the health service.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from lbapp.config.model import Configuration, Persistence, PersistenceType, Protocol, State, Switch
from lbapp.control.events import EventKind, Events
from lbapp.control.messages import Error, Host, NeighbourSeen, Reap, SwitchUp
from lbapp.control.switch_draining import Clock, OnSwitches, SwitchDraining
from lbapp.dataflow.conntrack import Entry
from lbapp.dataflow.fastpath.layout import Mode
from lbapp.dataflow.openflow import delete_by_cookie
from lbapp.dataflow.ovs import OvsError
from lbapp.dataflow.pipeline import EVERY_CONNECTION, Kind, connection_cookie
from lbapp.fastpaths import MemberTraffic
from lbapp.readings import Readings as RealReadings
from lbapp.runtime import ControllerRuntime
from tests import sites
from tests.fake_frames import frame
from tests.fake_monitors import Watched
from tests.playbook import ACK, Playbook, accepted, member, query, refused, site, up
from tests.unit.test_app import Bench, messages, outward, work
from tests.unit.test_engine_app_query import configuration as reading_site
from tests.unit.test_engine_app_query import control, said
from tests.unit.test_fastpaths import SWITCH, FakeLink, World
from tests.unit.test_fastpaths import configuration as fast_site
from tests.unit.test_fastpaths import member as fast_member
from tests.unit.test_runtime import Readings

replace = msgspec.structs.replace
ONE, TWO = f"{1:016x}", f"{2:016x}"


def asked(dpid: str = ONE, draining: bool = True, **fields: Any) -> dict[str, Switch]:
    """What operators ask of one switch."""
    one = Switch(name=dpid, draining=draining, **fields)
    return {f"id-{one.name}": one}


def draining(made: Configuration, dpid: str = ONE, ended: bool = False) -> Configuration:
    """The same configuration while a switch is draining."""
    return replace(made, switches=asked(dpid), drained=frozenset({int(dpid, 16)} if ended else ()))


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("text", ["1f", "0x1F", "0X000000000000001f", "000000000000001F"])
def test_a_datapath_id_has_one_spelling(text: str) -> None:
    one = Switch(name=text)
    assert (one.name, one.dpid) == ("000000000000001f", 31)


@pytest.mark.parametrize("text", ["", "0x", "12345678901234567", "lb1", "1 ", "-1", "1\n"])
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="name: expected a datapath id"):
        Switch(name=text)


# ------------------------------------------------------------------ since when


def test_the_clock_of_switches() -> None:
    events = Events()
    clocks = SwitchDraining(events)
    clocks.configure({}, 5.0)
    assert not clocks.tick(6.0) and clocks.clock(1) is None
    clocks.configure({**asked(ONE, drain_timeout=30), **asked(TWO)}, 10.0)
    assert (clocks.clock(1), clocks.clock(2), clocks.ended) == (Clock(10.0), Clock(10.0), frozenset())
    clocks.configure({**asked(ONE, drain_timeout=30), **asked(TWO), **asked("3", draining=False)}, 20.0)
    assert clocks.clock(1) == Clock(10.0), "another change does not begin anew"
    assert not clocks.tick(39.9)
    assert clocks.tick(40.0) and not clocks.tick(41.0)
    assert (clocks.clock(1), clocks.ended) == (Clock(10.0, True), frozenset({1}))
    clocks.configure({**asked(ONE, drain_timeout=300), **asked(TWO)}, 42.0)
    assert clocks.ended == frozenset({1}), "what was reset stays so"
    clocks.configure({**asked(ONE, draining=False), **asked(TWO)}, 50.0)
    assert (clocks.clock(1), clocks.ended) == (None, frozenset())
    clocks.configure({}, 60.0)
    assert [(event.at, event.kind, event.text) for event in events.since(0)] == [
        (10.0, EventKind.SWITCH_DRAINING, f"switch {ONE}: draining, for at most 30 s"),
        (10.0, EventKind.SWITCH_DRAINING, f"switch {TWO}: draining"),
        (40.0, EventKind.SWITCH_DRAINED, f"switch {ONE}: its 30 s are over; what is left is reset"),
        (50.0, EventKind.SWITCH_DRAINING, f"switch {ONE}: no longer draining"),
        (60.0, EventKind.SWITCH_DRAINING, f"switch {TWO}: no longer draining")]


def test_what_is_in_force() -> None:
    told: list[Configuration] = []
    watched = Watched(told.append)
    wanted = site(2)
    watched.service.configure(wanted)
    watched.service.configure(replace(wanted, switches=asked(drain_timeout=30)))
    assert (told[-1].draining, told[-1].drained, len(told)) == ({1}, frozenset(), 2)
    watched.now += 29
    watched.service.step()
    assert len(told) == 2
    watched.now += 1
    watched.service.step()
    assert (told[-1].drained, told[-1].virtual_servers, len(told)) == (frozenset({1}), wanted.virtual_servers, 3)
    watched.service.step()
    assert len(told) == 3 and watched.service.switch(1) == Clock(1000.0, True)
    watched.service.configure(wanted)
    assert (told[-1].draining, told[-1].drained) == (frozenset(), frozenset())
    kinds = [event.kind for event in watched.service.since(0)]
    assert kinds == [EventKind.SWITCH_DRAINING, EventKind.SWITCH_DRAINED, EventKind.SWITCH_DRAINING]


# ------------------------------------------------------------------ what is in force where


def test_only_the_switch_that_drains_gets_another_configuration() -> None:
    on = OnSwitches()
    plain = site(2)
    assert on.of(plain, 1) is plain
    made = draining(plain)
    assert on.of(made, 2) is made
    here = on.of(made, 1)
    assert here is on.of(made, 1), "made once"
    assert here.virtual_servers["v"] == replace(plain.virtual_servers["v"], maintenance=True)
    assert here.pools is made.pools and here.networks is made.networks
    idle = replace(plain, switches=asked(draining=False))
    assert on.of(idle, 1) is idle


def test_what_did_not_change_stays_the_same_object() -> None:
    on = OnSwitches()
    first, second = sites.server("a", 1), sites.server("b", 2, port=81, maintenance=True)
    before = on.of(draining(sites.configuration([first, second], [sites.pool()])), 1)
    assert before.virtual_servers["b"] is second, "it is in maintenance everywhere"
    changed = draining(sites.configuration([first, sites.server("b", 2, port=82)], before.pools.values()))
    after = on.of(changed, 1)
    assert after is not before and after.virtual_servers["a"] is before.virtual_servers["a"]
    assert after.virtual_servers["b"].protocol_port == 82 and after.virtual_servers["b"].maintenance


def test_a_switch_whose_time_is_over_has_no_members() -> None:
    on = OnSwitches()
    plain = site(3)
    closing = on.of(draining(plain), 1)
    over = draining(plain, ended=True)
    here = on.of(over, 1)
    assert here.pools["p"] == replace(plain.pools["p"], members=()) and on.of(over, 1) is here
    assert here.virtual_servers["v"] is closing.virtual_servers["v"]
    assert on.of(over, 2).pools["p"].members == plain.pools["p"].members


# ------------------------------------------------------------------ the control segment


@pytest.mark.parametrize("state", State)
def test_new_connections_are_refused_and_known_ones_go_on(state: State) -> None:
    plain = site(2, state=state, connection_limit=1000)
    play = Playbook(plain)
    (play >> up(2)).ignore()
    (play >> up(2, switch=2)).ignore()
    assert play.control.query(query(1), 0.0).error is Error.OK  # type: ignore[union-attr]
    play.configure(draining(plain)).ignore()
    play >> query(2) << refused(2, Error.NOTAVAIL)
    known = play.control.query(query(1, flags=ACK), 0.0)
    assert known is not None and (known.error, known.member) == (Error.OK, 1)
    other = play.control.query(query(3, switch=2), 0.0)
    assert other is not None and other.error is Error.OK, "another switch has nothing to do with it"
    play.configure(plain).ignore()
    assert play.control.query(query(4), 0.0).error is Error.OK  # type: ignore[union-attr]


def test_udp_and_a_switch_that_comes_while_it_drains() -> None:
    play = Playbook(draining(site(1, protocol=Protocol.UDP)))
    (play >> up(1)).ignore()
    play >> query(1, flags=0, protocol=17) << refused(1, Error.NOTAVAIL)


def test_clients_that_are_known_reach_their_member_through_another_switch() -> None:
    plain = site(3, pool={"persistence": Persistence(type=PersistenceType.SOURCE_IP)})
    play = Playbook(plain)
    (play >> up(3)).ignore()
    (play >> up(3, switch=2)).ignore()
    play >> query(1, client=7) << accepted(1, 1)
    play >> query(2, client=8) << accepted(2, 2)
    play.configure(draining(plain)).ignore()
    play >> query(3, client=8) << refused(3, Error.NOTAVAIL)
    elsewhere = play.control.query(query(4, client=8, switch=2), 0.0)
    assert elsewhere is not None and elsewhere.member == 2, "persistence names a member, not a switch"


def test_clients_that_were_shaken_hands_with_are_told() -> None:
    segment = control(draining(reading_site()))
    reply = segment.app_query(said(1), 0.0)
    assert reply.reply is not None and reply.reply.error is Error.NOTAVAIL
    assert reply.answer.startswith(b"HTTP/1.1 503 ")


def test_whoever_stands_in_line_is_refused() -> None:
    from tests.unit.test_waiting import LINE

    plain = site(members=[member(1, connection_limit=1)], pool={"waiting": LINE})
    play = Playbook(plain)
    (play >> up(1)).ignore()
    assert play.control.query(query(1), 0.0).error is Error.OK  # type: ignore[union-attr]
    assert play.control.query(query(2), 0.0) is None, "it waits"
    play.configure(draining(plain)) << refused(2, Error.NOTAVAIL)


def test_what_is_left_is_forgotten_when_the_time_is_over() -> None:
    plain = site(1, state=State.RULES)
    play = Playbook(plain)
    (play >> up(1)).ignore()
    (play >> up(1, switch=2)).ignore()
    for serial, switch in ((1, 1), (2, 2)):
        assert play.control.query(query(serial, switch=switch), 0.0).error is Error.OK  # type: ignore[union-attr]
    play.configure(draining(plain)).none()
    play.configure(draining(plain, ended=True)) << Reap(1, 1, 1, 1, final=True)
    play >> query(1, flags=ACK) << refused(1, Error.UNKNOWN)
    assert [one.serial for one in play.control.connections()] == [2]


# ------------------------------------------------------------------ fast paths


def test_a_fast_path_is_told_and_another_is_not() -> None:
    world, other = World(), FakeLink()
    made = fast_site(fast_member(1), fast_member(2))
    world.control.handle(SwitchUp(2, {}), 0.0)
    for number in (1, 2):
        world.control.handle(NeighbourSeen(2, f"10.0.0.{number}", Host(bytes((2, 0, 0, 0, 0, number)), number)), 0.0)
    world.fastpaths.add(SWITCH, world.link)
    world.fastpaths.add(2, other)
    world.configure(draining(made))
    for switch in (SWITCH, 2):
        world.fastpaths.refresh(switch)
    told = world.link.told[-1][0][1]
    assert told is not None
    assert (told.mode, [target.member for target in told.targets]) == (Mode.PASS, [1, 2]), "open ones go on"
    assert len(other.told) == 1 and not world.link.reaps
    world.configure(draining(made, ended=True))
    for switch in (SWITCH, 2):
        world.fastpaths.refresh(switch)
    assert world.link.reaps == [[Reap(SWITCH, 0, 0, number, final=True) for number in (1, 2)]]
    assert len(other.told) == 1 and not other.reaps
    world.configure(made)
    world.fastpaths.refresh(SWITCH)
    told = world.link.told[-1][0][1]
    assert told is not None and told.mode is Mode.DECIDE


# ------------------------------------------------------------------ the application

SITE = sites.configuration([sites.server(), sites.server("r", 2, port=81, state=State.RULES)],
                           [sites.pool(of=sites.members(2))])


def queued(bench: Bench) -> Configuration:
    """Do all that is queued for the switch; returns the last configuration of it."""
    *_, last = (argument for job, argument in work(bench) if job == "configure")
    assert isinstance(last, Configuration)
    return last


def test_the_application_gives_a_switch_what_is_in_force_there() -> None:
    bench = Bench(SITE)
    bench.app.configure(draining(SITE))
    assert queued(bench) is bench.app.in_force(1)
    assert all(one.maintenance for one in bench.switch.session.program._configuration.virtual_servers.values())
    actions, packet = outward(bench.punt(frame("10.0.0.1", "10.0.0.100")))
    assert actions == [("output", 7, 0)] and packet["tcp_flags"] == 0x14, "a RST, at once"
    reset = delete_by_cookie(connection_cookie(Kind.CONNECTION_IN, 0), EVERY_CONNECTION)
    assert reset not in bench.sent
    bench.app.configure(draining(SITE, ended=True))
    assert not any(pool.members for pool in queued(bench).pools.values())
    assert reset in bench.sent, "rule pairs go, whoever knows of them"
    bench.sent.clear()
    bench.app.configure(SITE)
    assert queued(bench) is SITE and reset not in bench.sent
    assert len(messages(bench.punt(frame("10.0.0.2", "10.0.0.100")))) == 1


def test_a_switch_that_comes_back_is_held_against_its_own() -> None:
    bench = Bench(SITE, ready=False)
    bench.app.configure(draining(SITE))
    while bench.switch.work:
        bench.switch.work.done(*bench.switch.work.next())
    bench.app._do(bench.switch, "reconcile", None)
    wanted = bench.switch.session.program._configuration
    assert wanted is bench.app.in_force(1) and wanted.virtual_servers["v"].maintenance


# ------------------------------------------------------------------ what is shown


def settled(bench: Bench) -> None:
    """The switch has what it was told."""
    queued(bench)
    bench.switch.session._open.clear()
    bench.switch.session._settle()


def shown(wanted: dict[str, Switch], readings: Readings | None = None, made: Configuration = SITE, ended: bool = False,
          told: bool = True) -> tuple[Bench, ControllerRuntime]:
    bench, watched = Bench(made), Watched()
    configuration = replace(made, switches=wanted)
    watched.service.configure(configuration)
    if ended:
        watched.now += 1000
        watched.service.step()
        configuration = replace(configuration, drained=frozenset({1}))
    bench.app.configure(configuration)
    if told:
        settled(bench)
    return bench, ControllerRuntime(bench.app, cast(RealReadings, readings or Readings()), watched.service)


def entry(state: str = "ESTABLISHED") -> Entry:
    return Entry("tcp", ("10.0.0.1", "10.0.0.100", 1, 80), ("10.0.0.11", "10.0.0.1", 8080, 1), 1, 1, 0, 1, False, state)


def test_what_a_switch_still_has_is_counted() -> None:
    bench, runtime = shown(asked(), Readings([entry(), entry(), entry("TIME_WAIT")]))
    bench.switch.session.counters.connections = 4
    link = FakeLink()
    link.traffic = {(1, 1): MemberTraffic(10, 7, 0, 0)}
    bench.app.fastpaths.add(1, link)
    (one,) = runtime.draining()
    assert (one.kind, one.switch, one.connections, one.drain_timeout) == ("switch", ONE, 2 + 4 + 3, 0)
    (view,) = runtime.switches()
    assert (view.dpid, view.connected, view.draining, view.connections, view.ended) == (ONE, True, True, 9, False)


def test_members_that_drain_come_first_and_nothing_is_counted_twice() -> None:
    first, second = sites.members(2)
    made = sites.configuration([sites.server()], [sites.pool(of=(replace(first, draining=True), second))])
    _, runtime = shown(asked(), Readings([entry()]), made)
    assert [(one.kind, one.member, one.switch, one.connections) for one in runtime.draining()] == [
        ("member", "10.0.0.11:8080", "", 1), ("switch", "", ONE, 1)]


def test_what_cannot_be_known_is_not_made_up() -> None:
    _, away = shown(asked(TWO, drain_timeout=9))
    (one,) = away.draining()
    assert (one.switch, one.connections) == (TWO, None)
    connected, missing = sorted(away.switches(), key=lambda view: view.dpid)
    assert (connected.draining, connected.connections) == (False, None)
    assert (missing.dpid, missing.connected, missing.address, missing.draining, missing.drain_timeout) == (
        TWO, False, "", True, 9)
    _, elsewhere = shown(asked(), Readings(local=False))
    assert elsewhere.draining()[0].connections is None, "it decides itself, where nobody here can look"
    rules = sites.configuration([sites.server(state=State.RULES)], [sites.pool()])
    bench, elsewhere = shown(asked(), Readings(local=False), rules)
    bench.switch.session.counters.connections = 3
    assert elsewhere.draining()[0].connections == 3, "but rules can be counted"
    _, broken = shown(asked(), Readings(OvsError("gone")))
    assert broken.draining()[0].connections is None


def test_after_its_time_nothing_counts_any_more() -> None:
    _, runtime = shown(asked(drain_timeout=5), Readings([entry()]), ended=True)
    (one,) = runtime.draining()
    assert (one.connections, one.ended, one.seconds) == (0, True, 1000.0)
    assert runtime.switches()[0].ended


def test_the_status_of_virtual_servers() -> None:
    bench, runtime = shown(asked(), told=False)
    server = SITE.virtual_servers["v"]
    assert runtime.virtual_server_status(server) == ("PENDING_UPDATE", "OFFLINE"), "nobody would be let in"
    assert runtime.draining()[0].connections is None, "it may be giving members connections still"
    settled(bench)
    assert runtime.draining()[0].connections == 0
    assert runtime.virtual_server_status(server)[0] == "ACTIVE", "it has what it is to have"
    bench.app.configure(SITE)
    assert runtime.virtual_server_status(server) == ("PENDING_UPDATE", "ONLINE")


def test_nothing_is_asked_of_anybody() -> None:
    _, runtime = shown({})
    assert runtime.draining() == [] and [one.draining for one in runtime.switches()] == [False]
