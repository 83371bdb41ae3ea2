# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Where the next hops are: MAC address and port of each, as each switch sees it.

Owns what is known about neighbours and when to ask again. Never decides who is a next hop
(:mod:`lbapp.config.routing` does) and never sends: it returns :class:`Probe` and
:class:`HostChanged`.

The life of a neighbour:

    unresolved --seen--> resolved --5 s--> asked --seen--> resolved
        ^  asked at once, then after                |
        |  0.25, 0.5, 1, 2, 4, 5, 5 ... s           | three probes, a second apart, unanswered
        +-------------------------------------------+

A port that goes down counts as one unanswered probe for everything behind it: two more a
second apart, and they are lost. What a switch's own rules say when it connects is believed, and
asked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from zlib import crc32

from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import Host, HostChanged, Probe
from lbapp.control.timers import Timed, Timers

FIRST_RETRY = 0.25
LAST_RETRY = 5.0
PERIOD = 5.0
ANSWER = 1.0
MISSED = 3
FORGET = 300.0

_NOTHING: Mapping[str, Host] = MappingProxyType({})


class _Neighbour(Timed):
    """One address on one switch. ``tries``: probes since it last answered; ``asked``: on demand, not configured."""

    __slots__ = ("address", "asked", "host", "seen", "switch", "tries")

    def __init__(self, switch: int, address: str, asked: bool, now: float) -> None:
        super().__init__()
        self.switch = switch
        self.address = address
        self.asked = asked
        self.seen = now
        self.host: Host | None = None
        self.tries = 0


class _Switch:
    """What one switch sees. ``waiting`` holds the unresolved among ``asked``; both are in order of asking."""

    __slots__ = ("asked", "hosts", "neighbours", "ports", "up", "waiting")

    def __init__(self) -> None:
        self.up = False
        self.neighbours: dict[str, _Neighbour] = {}
        self.hosts: dict[str, Host] = {}
        self.ports: dict[int, dict[str, None]] = {}
        self.asked: dict[str, None] = {}
        self.waiting: dict[str, None] = {}


Commands = list[Probe | HostChanged]


class Neighbours:
    """All neighbours of all switches.

    Args:
        limits: how many to ask in one tick, and how many to look up on demand.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self._budget = limits.probes_per_tick
        self._wanted: dict[str, None] = {}
        self._switches: dict[int, _Switch] = {}
        self._timers: Timers[_Neighbour] = Timers(0.05)

    # -------------------------------------------------------------- views

    def host(self, switch: int, address: str) -> Host | None:
        """Where an address is, seen from a switch; None where that is not known."""
        state = self._switches.get(switch)
        return state.hosts.get(address) if state is not None else None

    def hosts(self, switch: int) -> Mapping[str, Host]:
        """A read-only, live view of everything a switch knows."""
        state = self._switches.get(switch)
        return MappingProxyType(state.hosts) if state is not None else _NOTHING

    # -------------------------------------------------------------- what is wanted

    def configure(self, wanted: Iterable[str], unwanted: Iterable[str], now: float) -> Commands:
        """Addresses that the configuration needs from now on, and those it no longer needs."""
        commands: Commands = []
        for address in unwanted:
            self._wanted.pop(address, None)
            for state in self._switches.values():
                if address in state.neighbours:
                    self._forget(state, address, commands)
        for address in wanted:
            self._wanted[address] = None
            for switch, state in self._switches.items():
                neighbour = state.neighbours.get(address)
                if neighbour is None:
                    self._add(switch, state, address, False, now)
                elif neighbour.asked:
                    neighbour.asked = False
                    state.asked.pop(address, None)
                    state.waiting.pop(address, None)
        return self._run(now, commands)

    def want(self, switch: int, address: str, now: float) -> Commands:
        """Look a host up on demand. It is forgotten when it has not been seen for 300 s.

        At the bound, one that never answered makes room, or else the oldest: addresses that
        somebody scans do not drive out hosts that exist.
        """
        commands: Commands = []
        state = self._switches.get(switch)
        if state is None or not state.up or address in state.neighbours:
            return commands
        while len(state.asked) >= self._limits.asked_hosts:
            self._forget(state, next(iter(state.waiting or state.asked)), commands)
        self._add(switch, state, address, True, now)
        return self._run(now, commands)

    # -------------------------------------------------------------- what happened

    def switch_up(self, switch: int, hosts: Mapping[str, Host], now: float) -> Commands:
        """A switch connected; its rules say where ``hosts`` are. What they don't say is not known any more."""
        commands: Commands = []
        state = self._switches.setdefault(switch, _Switch())
        state.up = True
        for neighbour in list(state.neighbours.values()):
            if neighbour.asked and neighbour.address not in hosts:
                self._forget(state, neighbour.address, [])
        for address in self._wanted:
            if address not in state.neighbours:
                self._add(switch, state, address, False, now)
        for address in hosts:
            if address not in state.neighbours:
                if len(state.asked) >= self._limits.asked_hosts:
                    commands.append(HostChanged(switch, address, None))
                    continue
                self._add(switch, state, address, True, now)
        for neighbour in state.neighbours.values():
            self._place(state, neighbour, hosts.get(neighbour.address))
            neighbour.tries = 0
            self._timers.schedule(neighbour, now)
        return self._run(now, commands)

    def switch_down(self, switch: int) -> None:
        """A switch is gone: it forwards as before, so what is known stays; there is nobody to ask."""
        state = self._switches.get(switch)
        if state is not None:
            state.up = False
            for neighbour in state.neighbours.values():
                self._timers.cancel(neighbour)

    def forget_switch(self, switch: int) -> None:
        """Drop everything about a switch."""
        self.switch_down(switch)
        self._switches.pop(switch, None)

    def seen(self, switch: int, address: str, host: Host, now: float) -> Commands:
        """An address showed itself, asked or not, where it was or elsewhere."""
        state = self._switches.get(switch)
        neighbour = state.neighbours.get(address) if state is not None else None
        if state is None or neighbour is None or not state.up:
            return []
        neighbour.seen = now
        neighbour.tries = 0
        self._timers.schedule(neighbour, self._next_turn(neighbour, now))
        if neighbour.host == host:
            return []
        self._place(state, neighbour, host)
        return [HostChanged(switch, address, host)]

    def port_down(self, switch: int, port: int, now: float) -> Commands:
        """A port lost its link: ask for everything behind it, elsewhere it may answer."""
        state = self._switches.get(switch)
        if state is None or not state.up:
            return []
        for address in state.ports.get(port, ()):
            neighbour = state.neighbours[address]
            neighbour.tries = MISSED - 2
            self._timers.schedule(neighbour, now)
        return self._run(now, [])

    def tick(self, now: float) -> Commands:
        """Ask whom it is time to ask, and give up whom it is time to give up."""
        self._budget = self._limits.probes_per_tick
        return self._run(now, [])

    # -------------------------------------------------------------- inside

    def _run(self, now: float, commands: Commands) -> Commands:
        due = self._timers.due(now, self._budget)
        self._budget -= len(due)
        for neighbour in due:
            switch, address = neighbour.switch, neighbour.address
            state = self._switches[switch]
            if neighbour.asked and now - neighbour.seen >= FORGET:
                self._forget(state, address, commands)
                continue
            if neighbour.host is not None and neighbour.tries >= MISSED:
                self._place(state, neighbour, None)
                neighbour.tries = 0
                commands.append(HostChanged(switch, address, None))
            commands.append(Probe(switch, address))
            if neighbour.host is not None:
                delay = ANSWER
            else:
                delay = min(LAST_RETRY, FIRST_RETRY * (1 << min(neighbour.tries, 8)))
            neighbour.tries += 1
            self._timers.schedule(neighbour, now + delay)
        return commands

    def _next_turn(self, neighbour: _Neighbour, now: float) -> float:
        """When to verify a resolved neighbour: a fixed phase of the period, so that turns spread evenly."""
        phase = crc32(neighbour.address.encode()) % 1000 / 1000 * PERIOD
        earliest = now + PERIOD / 2
        return earliest + (phase - earliest) % PERIOD

    def _add(self, switch: int, state: _Switch, address: str, asked: bool, now: float) -> None:
        neighbour = state.neighbours[address] = _Neighbour(switch, address, asked, now)
        if asked:
            state.asked[address] = None
            state.waiting[address] = None
        if state.up:
            self._timers.schedule(neighbour, now)

    def _forget(self, state: _Switch, address: str, commands: Commands) -> None:
        neighbour = state.neighbours.pop(address)
        if neighbour.host is not None:
            commands.append(HostChanged(neighbour.switch, address, None))
        self._place(state, neighbour, None)
        self._timers.cancel(neighbour)
        state.asked.pop(address, None)
        state.waiting.pop(address, None)

    def _place(self, state: _Switch, neighbour: _Neighbour, host: Host | None) -> None:
        """Put a neighbour at a host, in every index."""
        address = neighbour.address
        if neighbour.host is not None:
            behind = state.ports[neighbour.host.port]
            del behind[address]
            if not behind:
                del state.ports[neighbour.host.port]
        neighbour.host = host
        if host is None:
            state.hosts.pop(address, None)
            if neighbour.asked:
                state.waiting[address] = None
            return
        state.hosts[address] = host
        state.ports.setdefault(host.port, {})[address] = None
        state.waiting.pop(address, None)
