# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp agent``: the process beside the switch. The fast path on one side, both message buses on the other.

Owns the process: it sets the fast path up, adopts what an earlier one left, and takes it down again or leaves it,
as it was told. Decides nothing; which control segment is asked is in ``control_segments.py``.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import eventlet

from lbapp.agents import AgentLoop
from lbapp.bus.sessions import Added, Distribution, Down, Removed, Synced, Up
from lbapp.bus.ssmb import Lost
from lbapp.bus.transport import CsPeer, DfsServer
from lbapp.control.messages import Closed, NewFlow, Query, Reap, Reply, Reset, Stats, Timeout
from lbapp.control_segments import ControlSegments
from lbapp.dataflow.agent import Agent
from lbapp.dataflow.fastpath import fastpath as fastpath_of
from lbapp.dataflow.fastpath.fastpath import FastPath
from lbapp.dataflow.ovs import Ovs

LOG = logging.getLogger("lbapp.agent")

BATCH = 4096
"""Closed connections taken at once; the bus divides them into datagrams."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``lbapp agent`` was told.

    Attributes:
        bridge: whose ports get the fast path.
        listen: for CSMB; SSMB uses the same address.
        key: the shared key of the buses.
        max_connections: the size of the table.
        leave: leave the fast path in place at the end.
    """

    bridge: str
    listen: tuple[str, int]
    key: bytes
    max_connections: int
    leave: bool = False


class AgentProcess:
    """The agent and its buses.

    Args:
        fastpath: the fast path, set up.
        switch: the datapath id.
        settings: what to listen on, and the key.

    Raises:
        OSError: the address is in use or not of this host.
    """

    def __init__(self, fastpath: FastPath, switch: int, settings: Settings) -> None:
        self.segments = ControlSegments()
        self.agent = Agent(fastpath, switch, itertools.count(secrets.randbits(31) * 2 + 1, 2))
        self._synchronised = False
        self._server = DfsServer(settings.listen, settings.key, switch, self._event, self._messages)
        self.address = self._server.address
        self._loop = AgentLoop(self.agent, self._asked, self._closed, self._alive, BATCH)
        self._loop.start()

    def stop(self) -> None:
        """End the buses; the fast path goes on."""
        self._loop.stop()
        self._server.close()

    # -------------------------------------------------------------- from the control segments

    def _event(self, peer: CsPeer, event: Any) -> None:
        identity, segments = peer.identity, self.segments
        if isinstance(event, Up):
            self._tell(segments.connected(identity))
        elif isinstance(event, Down):
            self._tell(segments.disconnected(identity))
        elif isinstance(event, Added):
            self._tell(segments.added(identity, event.server))
        elif isinstance(event, Distribution):
            self._tell(segments.distributed(identity, event.number, event.targets))
        elif isinstance(event, Removed):
            self._tell(segments.removed(identity, event.number))
        elif isinstance(event, Synced):
            LOG.info("control segment %x: %d virtual servers", identity, event.servers)
            if not self._synchronised:
                # What an agent before this one had been told of, and nobody wants any more.
                self._synchronised = True
                self._tell(segments.numbers(), whole=True)

    def _tell(self, numbers: Iterable[int], *, whole: bool = False) -> None:
        """Until the first control segment has said all it wants, what is there from before goes on."""
        changed = {number: self.segments.distribution(number) for number in numbers}
        if self._synchronised and (changed or whole):
            self.agent.configure(changed, whole=whole)

    def _messages(self, peer: CsPeer, messages: list[Any]) -> None:
        identity = peer.identity
        replies: list[Reply | NewFlow] = [message for message in messages if isinstance(message, (Reply, NewFlow))]
        if replies:
            self.agent.reply(self.segments.replies(identity, replies))
        reaps = [message for message in messages if isinstance(message, (Reap, Timeout))]
        if reaps:
            for answer in self.agent.reap(reaps):
                peer.send_deletes(answer.closed)
        for message in messages:
            if isinstance(message, Reset):
                LOG.warning("control segment %x: every connection is forgotten (RESET)", identity)
                self.agent.reset()
            elif isinstance(message, Lost):
                LOG.warning("control segment %x had to drop %d messages", identity, message.records)

    # -------------------------------------------------------------- to the control segments

    def _asked(self, queries: list[Query]) -> None:
        for identity, batch in self.segments.queries(queries):
            peer = self._server.peers.get(identity)
            if peer is not None:
                peer.send_queries(batch)
                peer.flush()

    def _closed(self, closed: list[Closed]) -> None:
        for identity, batch in self.segments.closed(closed):
            peer = self._server.peers.get(identity)
            if peer is not None:
                peer.send_deletes(batch)


    def _alive(self, alive: list[Stats]) -> None:
        for peer in self._server.peers.values():
            peer.send_stats(alive)


def remove(bridge: str) -> None:
    """Take down what an agent, or a controller with an agent in it, left in front of a bridge.

    Raises:
        PortsError, OvsError: something could not be undone; all the rest was.
    """
    for name in fastpath_of.remove(Ovs(), bridge):
        LOG.info("%s is a port of %s again", name, bridge)


def run(settings: Settings) -> None:
    """Run an agent until it is told to stop.

    Raises:
        FastPathUnavailable: there can be no fast path here; the text says why.
        OvsError: Open vSwitch is not there, or has no such bridge.
        OSError: the address is in use or not of this host.
    """
    ovs = Ovs()
    switch = int(ovs.vsctl("get", "Bridge", settings.bridge, "datapath_id", wait=False).strip().strip('"'), 16)
    begun = time.monotonic()
    fastpath = FastPath.open(ovs, settings.bridge, max_connections=settings.max_connections)
    process: AgentProcess | None = None
    try:
        process = AgentProcess(fastpath, switch, settings)
        LOG.info("fast path in front of %d ports of %s after %.2f s; CSMB on %s:%d", len(fastpath.ports),
                 settings.bridge, time.monotonic() - begun, *process.address)
        while True:
            eventlet.sleep(3600)
    finally:
        if process is not None:
            process.stop()
        fastpath.close(keep=settings.leave)
        LOG.info("stopped; the fast path of %s is %s", settings.bridge, "left in place" if settings.leave else "gone")
