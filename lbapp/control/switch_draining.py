# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Switches that are draining: for how long, and what the configuration in force is on them.

A switch that drains is given a variant of the configuration in force, and need not know why: every virtual server is in
maintenance there, so that new connections are refused at once in whatever way each of them refuses, and everything that
established ones need (addresses that are answered, members that are reached) stays. Once its time is over, its pools
have no members any more, so that what is left is reset as if they had been removed. All other switches get the
configuration itself. No I/O and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from lbapp.config.fields import replaced
from lbapp.config.model import Configuration, Pool, Switch, VirtualServer
from lbapp.control.events import EventKind, Events

R = TypeVar("R", VirtualServer, Pool)


class Clock(NamedTuple):
    """Since when a switch has been draining, in the caller's seconds, and whether its time is over."""

    since: float
    ended: bool = False


class SwitchDraining:
    """Which switches are draining, and since when.

    Args:
        events: where changes are told.

    Attributes:
        ended: datapath ids of those whose time is over. A new object with each change.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._switches: Mapping[str, Switch] = {}
        self._clocks: dict[int, Clock] = {}
        self.ended: frozenset[int] = frozenset()

    def configure(self, switches: Mapping[str, Switch], now: float) -> None:
        """Take over what operators ask for. Who goes on draining keeps the time since when it has."""
        if switches is self._switches:
            return
        self._switches = switches
        draining = {one.dpid: one for one in switches.values() if one.draining}
        for dpid in self._clocks.keys() - draining.keys():
            del self._clocks[dpid]
            self._tell(dpid, now, EventKind.SWITCH_DRAINING, "no longer draining")
        for dpid, one in draining.items():
            if dpid not in self._clocks:
                self._clocks[dpid] = Clock(now)
                limit = f", for at most {one.drain_timeout} s" if one.drain_timeout else ""
                self._tell(dpid, now, EventKind.SWITCH_DRAINING, f"draining{limit}")
        self.tick(now)

    def tick(self, now: float) -> bool:
        """What it is time for.

        Returns:
            Whether the time of any switch is over, or not over any more.
        """
        if not self._clocks and not self.ended:
            return False
        limits = {one.dpid: one.drain_timeout for one in self._switches.values()}
        for dpid, clock in self._clocks.items():
            limit = limits[dpid]
            ended = clock.ended or bool(limit and now - clock.since >= limit)
            if ended and not clock.ended:
                self._clocks[dpid] = clock._replace(ended=True)
                self._tell(dpid, now, EventKind.SWITCH_DRAINED, f"its {limit} s are over; what is left is reset")
        ended_now = frozenset(dpid for dpid, clock in self._clocks.items() if clock.ended)
        changed = ended_now != self.ended
        if changed:
            self.ended = ended_now
        return changed

    def clock(self, dpid: int) -> Clock | None:
        """Of a switch; None: it is not draining."""
        return self._clocks.get(dpid)

    def _tell(self, dpid: int, now: float, kind: EventKind, text: str) -> None:
        self._events.add(now, kind, f"switch {dpid:016x}: {text}")


class _Kept(Generic[R]):
    """What was made of resources, as long as they are the same objects: who compares finds no difference then."""

    def __init__(self, change: Callable[[R], R]) -> None:
        self._change: Callable[[R], R] = change
        self._made: dict[str, tuple[R, R]] = {}

    def of(self, resources: Mapping[str, R]) -> dict[str, R]:
        """All of them, changed."""
        made: dict[str, tuple[R, R]] = {}
        for key, one in resources.items():
            known = self._made.get(key)
            made[key] = known if known is not None and known[0] is one else (one, self._change(one))
        self._made = made
        return {key: pair[1] for key, pair in made.items()}


def _maintained(server: VirtualServer) -> VirtualServer:
    return server if server.maintenance else replaced(server, {"maintenance": True})


def _emptied(pool: Pool) -> Pool:
    return replaced(pool, {"members": ()}) if pool.members else pool


class OnSwitches:
    """The configuration in force on each switch. Variants are made once for each configuration, where one is needed."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._of: Configuration | None = None
        self._draining: frozenset[int] = frozenset()
        self._servers: _Kept[VirtualServer] = _Kept(_maintained)
        self._pools: _Kept[Pool] = _Kept(_emptied)
        self._closed: Configuration | None = None
        self._cleared: Configuration | None = None

    def of(self, configuration: Configuration, switch: int) -> Configuration:
        """The configuration that a switch is given; itself where it is not draining."""
        if not configuration.switches:
            if self._of is not None:
                self._forget()
            return configuration
        if configuration is not self._of:
            self._of, self._draining = configuration, configuration.draining
            self._closed = self._cleared = None
        if switch not in self._draining:
            return configuration
        if self._closed is None:
            self._closed = Configuration(
                virtual_servers=self._servers.of(configuration.virtual_servers), pools=configuration.pools,
                networks=configuration.networks, redirected=configuration.redirected)
        if switch not in configuration.drained:
            return self._closed
        if self._cleared is None:
            self._cleared = Configuration(
                virtual_servers=self._closed.virtual_servers, pools=self._pools.of(configuration.pools),
                networks=configuration.networks, redirected=configuration.redirected)
        return self._cleared
