# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the configuration in force: what operators asked for, and what is known of the members by now.

Owns the watch over members (:mod:`lbapp.control.health`), the process that checks them, what the master distributes,
and the events that tell of all that. Everybody else gets the configuration in force from here, whole, and never the
operators' own. Decides nothing about connections.

A change of what is known is in force at once: the next QUERY is answered by it, and switches and fast paths are told.
Many changes at a time become one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from lbapp.config.model import Configuration
from lbapp.config.pool import Member, Pool
from lbapp.control.effective import Effective, needed_priority
from lbapp.control.events import Event, EventKind, Events
from lbapp.control.health import Health, Report
from lbapp.control.master import Master
from lbapp.control.switch_draining import Clock, SwitchDraining
from lbapp.monitors.supervisor import Changed, Statistics, Target
from lbapp.vantages import OnChanged, OnLatencies, Vantages

LOG = logging.getLogger("lbapp.health")

TICK = 0.2
MOST_WAITING = 200_000
"""Results that were not looked at yet; the process tells only what changed, so that is twice for each target."""

Passive = Callable[[], Iterable[tuple[int, str]]]


def key_of(member: Member, monitor: str) -> str:
    """What a target is called: the member's number, which nobody else ever has, and the monitor's name."""
    return f"{member.number}:{monitor}"


def targets_of(pools: Iterable[Pool]) -> dict[str, Target]:
    """Everything that is to be checked. Members that are disabled are left alone."""
    return {
        key_of(member, monitor.name): Target(address=member.monitor_address or member.address,
                                             port=member.monitor_port or member.protocol_port, monitor=monitor)
        for pool in pools if pool.monitors and pool.admin_state_up
        for member in pool.members if member.admin_state_up
        for monitor in pool.monitors if monitor.admin_state_up}


class HealthService:
    """See the module.

    Args:
        in_force: called with each new configuration in force.
        vantages: makes what checks members, given what to call with changes and with response times.
        failures: clients' connections that failed since the last call: (member's number, reason).
        response_times: called with (member's number, seconds) as they are measured.
        master: makes weights of what servers report.
        clock: seconds that only grow.
    """

    def __init__(self, in_force: Callable[[Configuration], None],
                 vantages: Callable[[OnChanged, OnLatencies], Vantages], failures: Passive = tuple,
                 response_times: Callable[[list[tuple[int, float]]], None] = lambda _: None,
                 master: Master | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._in_force = in_force
        self._failures, self._response_times = failures, response_times
        self._clock = clock
        self._began = time.time() - clock()
        self.events = Events()
        self._health = Health(self.events)
        self._switches = SwitchDraining(self.events)
        self._effective = Effective(self._health.condition)
        self._wanted = Configuration()
        self._told = 0
        self._changed: deque[Changed] = deque(maxlen=MOST_WAITING)
        self._news = threading.Condition()
        self._lock = threading.RLock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._levels: dict[str, int] = {}
        self._weights: Mapping[int, int] = {}
        self._master = master
        self._distributed = False
        self._vantages = vantages(self._on_changed, self._on_latencies)

    # -------------------------------------------------------------- life

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, and the process that checks members."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._vantages.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._closed:
            with self._news:
                self._news.wait_for(lambda: self._changed or self._closed, TICK)
            try:
                self.step()
            except Exception:
                LOG.exception("the members' health could not be brought up to date")
                time.sleep(TICK)

    # -------------------------------------------------------------- in

    def configure(self, configuration: Configuration) -> None:
        """Operators want another configuration."""
        with self._lock:
            now = self._clock()
            self._wanted = configuration
            # Once more where there is none any more: the weights are to go.
            self._distributed = self._distributed or any(
                one.distribution is not None for one in configuration.pools.values())
            self._switches.configure(configuration.switches, now)
            self._remake(self._health.configure(configuration, now), now, whole=True)
        self._vantages.configure(configuration.networks.values(), targets_of(configuration.pools.values()))

    def step(self) -> None:
        """Take in what became known, and do what it is time for."""
        with self._lock:
            now = self._clock()
            touched = self._health.tick(now)
            while self._changed:
                one = self._changed.popleft()
                number, _, monitor = one.key.partition(":")
                touched.add(self._health.checked(int(number), monitor, one.up, one.reason, now) or "")
            for member, reason in self._failures():
                touched.add(self._health.failed(member, reason, now) or "")
            touched.discard("")
            touched.update(self._distribute(now))
            if self._switches.tick(now) or touched:
                self._remake(touched, now)
            self._log()

    def _distribute(self, now: float) -> set[str]:
        """Take over what the master distributes; returns the pools in which members get other weights."""
        if self._master is None or not self._distributed:
            return set()
        resting = {member.number for pool in self._wanted.pools.values() if pool.distribution is not None
                   for member in pool.members if self._health.condition(member).down}
        weights = self._master.distribute(self._wanted, now, resting)
        for text in self._master.take_events():
            self.events.add(now, EventKind.DISTRIBUTION, text)
        if weights is self._weights:
            return set()
        before, self._weights = self._weights, weights
        different = {number for number in weights.keys() | before.keys() if weights.get(number) != before.get(number)}
        self._distributed = bool(weights) or any(one.distribution is not None for one in self._wanted.pools.values())
        return {key for key, pool in self._wanted.pools.items()
                if not different.isdisjoint(member.number for member in pool.members)}

    def _on_changed(self, changed: list[Changed]) -> None:
        with self._news:
            self._changed.extend(changed)
            self._news.notify_all()

    def _on_latencies(self, latencies: list[tuple[str, float]]) -> None:
        with self._lock:
            self._response_times([(int(key.partition(":")[0]), seconds) for key, seconds in latencies])

    # -------------------------------------------------------------- the configuration in force

    def _remake(self, touched: Iterable[str], now: float, whole: bool = False) -> None:
        touched = set(touched)
        before, replaced = self._effective.configuration, self._effective.replacing
        made = self._effective.configure(self._wanted, touched, self._weights, self._switches.ended)
        replacing = self._effective.replacing
        for key in sorted(made.pools.keys() & (replaced.keys() | replacing.keys())):
            other = replacing.get(key)
            if other != replaced.get(key):
                text = "its own members are used again" if other is None else f"pool {made.pools[other].name} is used"
                self.events.add(now, EventKind.FALLBACK, text, made.pools[key].name)
        for key in touched:
            self._tell_priority(key, made.pools.get(key), now)
        if whole or made is not before:
            self._in_force(made)
        self._log()

    def _tell_priority(self, key: str, pool: Pool | None, now: float) -> None:
        wanted = self._wanted.pools.get(key)
        if pool is None or wanted is None or not pool.minimum_active:
            self._levels.pop(key, None)
            return
        up = {member.number for member in pool.members if member.health.value != "down"}
        least = needed_priority(wanted, (member for member in wanted.members if member.takes_new
                                         and member.number in up))
        before = self._levels.get(key)
        self._levels[key] = least
        if before is not None and before != least:
            text = f"members of priority {least} and above take part" if least else "all members take part"
            self.events.add(now, EventKind.PRIORITY, text, wanted.name)

    def happened(self, kind: EventKind, text: str, pool: str = "", member: str = "") -> None:
        """Something that others noticed."""
        with self._lock:
            self.events.add(self._clock(), kind, text, pool, member)
            self._log()

    def _log(self) -> None:
        for event in self.events.since(self._told):
            where = " ".join(part for part in (f"pool {event.pool}:" if event.pool else "",
                                               f"{event.member}:" if event.member else "") if part)
            self._told = event.number
            if event.kind is EventKind.SWITCH:
                continue  # who noticed it has logged it
            level = logging.WARNING if event.kind in (EventKind.MEMBER_DOWN, EventKind.MEMBER_FAILED) else logging.INFO
            LOG.log(level, "%s %s %s", event.kind.value, where, event.text)

    # -------------------------------------------------------------- out

    def report(self, member: Member) -> Report | None:
        """What is known of a member's health."""
        return self._health.report(member.number)

    def down(self, member: Member) -> bool:
        """Whether a member takes no connections for its health's sake."""
        return self._health.condition(member).down

    def switch(self, dpid: int) -> Clock | None:
        """Since when a switch has been draining; None: it is not."""
        return self._switches.clock(dpid)

    def checks(self) -> list[tuple[tuple[str, ...], Statistics]]:
        """See :meth:`lbapp.vantages.Vantages.statistics`."""
        return self._vantages.statistics()

    def wall(self, at: float) -> float:
        """The time of day of a moment of the clock, in seconds since 1970."""
        return self._began + at

    def since(self, number: int) -> Iterator[Event]:
        """Events after one."""
        return self.events.since(number)

    def attach(self, bridge: str) -> None:
        """A bridge of this host is there: members may be checked from it."""
        self._vantages.attach(bridge)

    @property
    def wanted(self) -> Configuration:
        """What operators asked for."""
        return self._wanted

    def elapsed(self, at: float) -> float:
        """Seconds since a moment of the clock."""
        return max(0.0, self._clock() - at)
