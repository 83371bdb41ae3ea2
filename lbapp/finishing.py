# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Members and switches that are draining, and how many connections they still have, as people are told of it.

Reads the data flow segment and the control segment; changes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from lbapp.api.views import DrainingView, SwitchView
from lbapp.config.model import Configuration, State
from lbapp.dataflow.ovs import OvsError
from lbapp.health import HealthService
from lbapp.readings import CLOSING, Readings

LOG = logging.getLogger("lbapp.finishing")


class _Held(NamedTuple):
    """Connections by (switch, member). ``unread``: switches of this host whose conntrack could not be read."""

    counted: Counter[tuple[int, int]]
    ruled: Counter[tuple[int, int]]
    unread: set[int]


class Finishing:
    """See the module.

    Args:
        application: the Ryu application.
        readings: what is read from the switches on demand.
        health: knows who is draining, and since when.
    """

    def __init__(self, application: Any, readings: Readings, health: HealthService) -> None:
        self._application = application
        self._readings = readings
        self._health = health

    def views(self) -> list[DrainingView]:
        """Every member that is draining, with the connections that switches and fast paths hold for it; then every
        switch that is."""
        wanted = self._health.wanted
        found = [(pool, member, report) for pool in wanted.pools.values() for member in pool.members
                 if member.draining and (report := self._health.report(member)) is not None]
        switches = [(one, clock) for one in wanted.switches.values()
                    if (clock := self._health.switch(one.dpid)) is not None]
        if not found and not switches:
            return []
        told = self._told()
        held = self._held()
        of_members: Counter[int] = Counter()
        for (_, number), connections in (held.counted + held.ruled).items():
            of_members[number] += connections
        views = [DrainingView(
            pool=pool.name, member=member.endpoint, name=member.name,
            seconds=round(self._health.elapsed(report.draining_since or 0.0), 1), drain_timeout=member.drain_timeout,
            # What is left after its time gets no packet through any more, and is reset with the next one.
            connections=0 if report.ended else of_members[member.number] if told else None, ended=report.ended)
            for pool, member, report in found]
        if switches:
            self._readings.count()
        return views + [DrainingView(
            kind="switch", switch=one.name, pool="", member="", name="",
            seconds=round(self._health.elapsed(clock.since), 1), drain_timeout=one.drain_timeout,
            connections=0 if clock.ended else self._through(one.dpid, held) if told else None, ended=clock.ended)
            for one, clock in switches]

    def described(self, views: Iterable[SwitchView]) -> list[SwitchView]:
        """The same switches with what is asked of them, and those that are not connected but asked something of."""
        listed = {one.dpid: one for one in views}
        asked = self._health.wanted.switches.values()
        for one in asked:
            known = listed.get(one.name) or SwitchView(dpid=one.name, address="", connected=False)
            listed[one.name] = msgspec.structs.replace(known, draining=one.draining, drain_timeout=one.drain_timeout)
        for left in self.views() if any(one.draining for one in asked) else ():
            if left.kind == "switch":
                listed[left.switch] = msgspec.structs.replace(
                    listed[left.switch], connections=left.connections, ended=left.ended)
        return list(listed.values())

    def _told(self) -> bool:
        """Whether all switches have what is in force: those that do not go on giving members connections."""
        return all(switch.session.synchronised is self._application.in_force(switch.id)
                   for switch in list(self._application.switches.values()))

    def _through(self, switch: int, held: _Held) -> int | None:
        """The connections of a switch; None where not all of them can be known."""
        connected = self._application.switches.get(switch)
        if connected is None or switch in held.unread:
            return None
        if not self._readings.is_local(switch):
            application = self._application
            for server in self._configuration.virtual_servers.values():
                if not (application.control.follows(server.number) or any(
                        paths.serves(switch, server.number) for paths in (application.fastpaths, application.relays))):
                    return None
        # A pair of rules lives longer than the memory of a controller that was started again.
        ruled: int = connected.session.counters.connections
        return ruled + sum(count for (where, _), count in held.counted.items() if where == switch)

    def _held(self) -> _Held:
        """How many connections there are: those that are in the data flow segment, and those of rules."""
        held = _Held(Counter(), Counter(), set())
        application = self._application
        rules = {server.number for server in self._configuration.virtual_servers.values()
                 if server.state is State.RULES}
        for connection in list(application.control.connections()):
            key = connection.switch, connection.member
            if connection.virtual_server in rules:
                held.ruled[key] += 1
            elif not (self._readings.is_local(connection.switch) or connection.switch in application.fastpaths):
                held.counted[key] += 1
        for switch in list(application.switches):
            for paths in (application.fastpaths, application.relays):
                reading = paths.read(switch)
                for (_, member), traffic in reading.members.items() if reading is not None else ():
                    held.counted[switch, member] += max(0, traffic.opened - traffic.closed)
            try:
                if self._readings.is_local(switch):
                    for entry in self._readings.conntrack(switch):
                        held.counted[switch, entry.member] += entry.state not in CLOSING
            except OvsError as error:
                held.unread.add(switch)
                LOG.warning("switch %016x: its connections cannot be counted: %s", switch, error)
        return held

    @property
    def _configuration(self) -> Configuration:
        configuration: Configuration = self._application.configuration
        return configuration
