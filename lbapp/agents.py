# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Runs agents under eventlet: in the controller's own process, where controller and switch share a host.

Owns the greenlets that wait for the fast path's rings, and the time at which it is swept. Decides nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import eventlet
from eventlet import tpool
from eventlet.hubs import trampoline

from lbapp.control.messages import AppQuery, AppReply, Closed, NewFlow, Query, Reap, Reply, Stats
from lbapp.dataflow.agent import Agent
from lbapp.dataflow.carrier import Answered, Held
from lbapp.dataflow.distribution import Distribution
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.fastpath import FastPath, FastPathUnavailable
from lbapp.dataflow.fastpath.removal import PortsError
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.fastpaths import FastPaths, MemberTraffic, Reading

LOG = logging.getLogger("lbapp.agent")

BATCH = 1024
"""Closed connections told of in one message where it does not have to fit a datagram."""
CLOSED_SECONDS = 0.05
"""Closed connections are told of together: after so long, or a whole batch."""
TICK_SECONDS = 0.25
SWEEP_SECONDS = 1.0
EMPTY_SECONDS = 4.0
"""The same where the last sweep found nothing: walking over empty memory is most of what an idle agent does."""
SWEEP_SHARE = 0.01
"""The most of one core that sweeping takes: a large table is swept less often, but for one that fills up."""
PORTS_SECONDS = 10.0
"""The bridge's ports are compared so often although no interface changed."""
PORTS_AGAIN_SECONDS = 1.0
PORTS_GATHER_SECONDS = 0.05


class AgentLoop:
    """Runs one agent.

    Args:
        agent: the agent.
        asked: takes a batch of QUERY.
        closed: takes a batch of DELETE.
        alive: takes a batch of STATS.
        batch: the most closed connections in one.
    """

    def __init__(self, agent: Agent[FastPath], asked: Callable[[Sequence[Query | AppQuery]], None],
                 closed: Callable[[list[Closed]], None], alive: Callable[[list[Stats]], None],
                 batch: int = BATCH) -> None:
        self.agent = agent
        self._asked = asked
        self._closed = closed
        self._alive = alive
        self._batch = batch
        self._threads: list[Any] = []

    def start(self) -> None:
        """Begin."""
        self._threads = [eventlet.spawn(self._guarded, work) for work in (
            self._queries, self._closings, self._ticks, self._sweeps, self._ports)]

    def stop(self) -> None:
        """End; the fast path goes on."""
        for thread in self._threads:
            thread.kill()
        self._threads = []

    def _guarded(self, work: Callable[[], None]) -> None:
        while True:
            try:
                work()
            except Exception:
                LOG.exception("switch %016x: %s failed; going on", self.agent.switch, work.__name__.strip("_"))
                eventlet.sleep(1.0)

    def _queries(self) -> None:
        descriptor, asked = self.agent.fastpath.queries_fileno(), False
        while True:
            if not asked:
                trampoline(descriptor, read=True)
            queries = self.agent.queries(time.monotonic())
            asked = bool(queries)
            if asked:
                self._asked(queries)
                eventlet.sleep(0)  # others have their turn, and what came meanwhile is one batch

    def _closings(self) -> None:
        while True:
            eventlet.sleep(CLOSED_SECONDS)  # the fast path wakes nobody for a connection that ended
            more = True
            while more:
                closed, alive = self.agent.ended(self._batch)
                if closed:
                    self._closed(closed)
                if alive:
                    self._alive(alive)
                more = len(closed) + len(alive) == self._batch  # what came meanwhile waits for its own batch
                eventlet.sleep(0)

    def _ticks(self) -> None:
        while True:
            eventlet.sleep(TICK_SECONDS)
            asking = self.agent.tick(time.monotonic())
            if asking:
                self._asked(asking)

    def _sweeps(self) -> None:
        while True:
            # A walk over a large table takes tens of milliseconds, in which clients would wait.
            (swept, took), opened = tpool.execute(self._sweep), self.agent.opened()
            found = swept.live or swept.lingering or swept.shutdown or swept.idle or swept.overflow
            until = time.monotonic() + max(SWEEP_SECONDS if found else EMPTY_SECONDS, took / SWEEP_SHARE)
            room = self.agent.room(swept)
            while time.monotonic() < until and self.agent.opened() - opened < room:
                eventlet.sleep(SWEEP_SECONDS)

    def _sweep(self) -> tuple[layout.Swept, float]:
        """What a sweep found, and its seconds of CPU: a busy machine does not make it a larger share of one."""
        began = time.thread_time()
        return self.agent.sweep(), time.thread_time() - began

    def _ports(self) -> None:
        """Ports are looked after when the kernel tells of an interface, and now and then in any case."""
        wires, due = self.agent.fastpath.wires, time.monotonic() + PORTS_SECONDS
        while True:
            told = True
            try:
                trampoline(wires.fileno(), read=True, timeout=max(0.01, due - time.monotonic()),
                           timeout_exc=TimeoutError)
            except TimeoutError:
                told = False
            try:
                moved = False
                if told:
                    eventlet.sleep(PORTS_GATHER_SECONDS)  # they seldom come alone
                    moved = wires.follow()
                    # Open vSwitch notes in its database what it did only afterwards; and of a port that goes from one
                    # bridge to another, the other one may hear nothing but that some interface changed.
                    due = min(due, time.monotonic() + PORTS_AGAIN_SECONDS)
                if time.monotonic() >= due:
                    moved, due = True, time.monotonic() + PORTS_SECONDS
                if moved:
                    self.agent.sync_ports()
            except (PortsError, OvsError) as error:
                LOG.warning("switch %016x: its ports cannot be followed: %s", self.agent.switch, error)
                due = time.monotonic() + PORTS_AGAIN_SECONDS
                eventlet.sleep(PORTS_AGAIN_SECONDS)


class LocalLink:
    """See :class:`lbapp.fastpaths.Link`: the agent is in this process."""

    proxies = True
    limits = True
    lossy = False

    def __init__(self, agent: Agent[FastPath], fastpaths: FastPaths) -> None:
        self.agent = agent
        self._fastpaths = fastpaths
        switch = agent.switch
        self._loop = AgentLoop(agent, lambda queries: fastpaths.asked(switch, queries),
                               lambda closed: fastpaths.closed(switch, closed), fastpaths.heard)
        self._loop.start()

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.agent.configure(changed, whole=whole)

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.agent.fastpath.set_cookies(keys, current)

    def reply(self, replies: Sequence[Reply | AppReply]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self._fastpaths.heard(self.agent.reply(replies, time.monotonic()))

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        """See :class:`lbapp.fastpaths.Link`."""
        return self.agent.deliver(answered)

    def take_over(self, flow: NewFlow) -> bool:
        """See :class:`lbapp.fastpaths.Link`."""
        return not self.agent.reply([flow], time.monotonic())

    def reap(self, reaps: Sequence[Reap]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self._fastpaths.heard(self.agent.reap(reaps))

    def live(self) -> Sequence[tuple[int, int, int]]:
        """See :class:`lbapp.fastpaths.Link`."""
        return self.agent.fastpath.tracked()

    def read(self) -> Reading:
        """See :class:`lbapp.fastpaths.Link`."""
        return Reading(self.agent.held, self.agent.told(), {
            key: MemberTraffic(*traffic) for key, traffic in self.agent.fastpath.service_stats().items()},
            refused=self.agent.fastpath.refusals())

    def connections(self, limit: int) -> Iterator[Held]:
        """See :class:`lbapp.fastpaths.Link`."""
        return self.agent.connections(limit, time.monotonic_ns() >> layout.TICK_SHIFT & 0xFFFFFFFF)

    def close(self) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self._loop.stop()
        with contextlib.suppress(OvsError, OSError):
            self.agent.fastpath.close(keep=True)


def local_link(switch: int, fastpaths: FastPaths, ovs: Ovs, **options: Any) -> LocalLink | None:
    """Give a switch of this host a fast path; None, with a line in the log that says why, where that cannot be."""
    try:
        bridge = ovs.bridge_of(switch)
        if bridge is None:
            LOG.info("switch %016x is not on this host: it needs an agent there for a fast path", switch)
            return None
        fastpath = FastPath.open(ovs, bridge, **options)
    except (FastPathUnavailable, OvsError) as error:
        LOG.warning("switch %016x has no fast path, Open vSwitch does it all: %s", switch, error)
        return None
    LOG.info("switch %016x: fast path in front of %d ports of %s", switch, len(fastpath.ports), bridge)
    return LocalLink(Agent(fastpath, switch, itertools.count(secrets.randbits(31) * 2 + 1, 2)), fastpaths)
