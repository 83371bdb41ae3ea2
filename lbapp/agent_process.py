# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp agent``: the process beside the switch. The fast path on one side, both message buses on the other.

Owns the process: it sets the fast path up, adopts what an earlier one left, and takes it down again or leaves it,
as it was told. Decides nothing; which control segment is asked is in ``control_segments.py``.

Started anew, it finds virtual servers and connections of an agent before it. They go on as they were until a control
segment has said all it wants; what nobody wants ``REJOIN_SECONDS`` later is removed. What ended meanwhile is told of
once somebody is there to hear it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import eventlet

from lbapp.agents import AgentLoop
from lbapp.bus.counted import Traffic
from lbapp.bus.csmb import HelloFlag
from lbapp.bus.events import Added, Distribution, Down, Keyed, Removed, Synced, Up
from lbapp.bus.ssmb import Lost
from lbapp.bus.transport import CsPeer, DfsServer
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Closed,
    Error,
    NewFlow,
    Query,
    Reap,
    Reason,
    Reply,
    Reset,
    Stats,
    Timeout,
)
from lbapp.control_segments import ControlSegments, Cookies, Key
from lbapp.dataflow import conntrack
from lbapp.dataflow.agent import Agent
from lbapp.dataflow.fastpath import fastpath as fastpath_of
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.fastpath import FastPath, FastPathUnavailable
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.dataflow.pipeline import zones

LOG = logging.getLogger("lbapp.agent")

BATCH = 4096
"""Closed connections taken at once; the bus divides them into datagrams."""
REJOIN_SECONDS = 8.0
"""Control segments that were connected to an agent before this one are back by then (``transport.BACK_OFF``)."""
MOST_EARLY = 262_144
"""Closed connections that wait for a control segment after a start; more are counted, not kept."""
COUNT_SECONDS = 1.0
"""What was counted is told so often, if it has changed."""
COUNT_SHARE = 0.01
"""But it takes this share of one core at most."""
SWITCH_REAPS = 65_536
MOST_FLOWS = 65_536
"""Connections that a control segment hands over (NEWFLOW) before it has said what they belong to; so many wait."""
MOST_DECIDED = 16_384
"""Decisions on what clients said that are remembered, so that a second one, after it was asked again, is not done."""
DUMP_SECONDS = 2.0
"""Open vSwitch is asked so often for its connections, at most."""
CLOSING = frozenset({"CLOSING", "TIME_WAIT", "CLOSED", "LAST_ACK", "FIN_WAIT_2"})


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
        ovs: the switch.

    Raises:
        OSError: the address is in use or not of this host.
    """

    def __init__(self, fastpath: FastPath, switch: int, settings: Settings, ovs: Ovs | None = None) -> None:
        self._ovs = ovs or Ovs()
        used = max((number for number, _ in fastpath.service_stats()), default=0)
        self.segments = ControlSegments({Key(*key): number for key, number in fastpath.services().items()}, used)
        self.agent = Agent(fastpath, switch, itertools.count(secrets.randbits(31) * 2 + 1, 2))
        self._synchronised = False
        self._saying: dict[int, set[int]] = {}
        self._early: deque[Closed] = deque()
        self._told: dict[int, object] = {}
        self._reaps: OrderedDict[tuple[int, int], Reap] = OrderedDict()
        self._flows: dict[int, deque[NewFlow]] = {}
        self._decided: OrderedDict[int, None] = OrderedDict()
        self._keys: Cookies | None = None
        self._server = DfsServer(settings.listen, settings.key, switch, self._event, self._messages,
                                 flags=HelloFlag.APP_PROXY)
        self.address = self._server.address
        self._loop = AgentLoop(self.agent, self._asked, self._closed, self._alive, BATCH)
        self._loop.start()
        self._greenlets = [eventlet.spawn(self._guarded, work) for work in (self._counting, self._looking)]

    def stop(self) -> None:
        """End the buses; the fast path goes on."""
        self._loop.stop()
        for greenlet in self._greenlets:
            greenlet.kill()
        self._server.close()

    # -------------------------------------------------------------- from the control segments

    def _event(self, peer: CsPeer, event: Any) -> None:
        identity, segments = peer.identity, self.segments
        if isinstance(event, Up):
            self._saying[identity] = set()
            self._told.pop(identity, None)
            self._tell(segments.connected(identity), identity)
        elif isinstance(event, Down):
            self._flows.pop(identity, None)
            self._tell({*self._saying.pop(identity, ()), *segments.disconnected(identity)})
            self._use_cookies()
        elif isinstance(event, Keyed):
            told = segments.keyed(identity, (event.keys, event.current))
            self._use_cookies()
            self._tell(told, identity)
        elif isinstance(event, Added):
            self._tell(segments.added(identity, event.server), identity)
        elif isinstance(event, Distribution):
            self._tell(segments.distributed(identity, event.number, event.targets), identity)
        elif isinstance(event, Removed):
            self._tell(segments.removed(identity, event.number), identity)
        elif isinstance(event, Synced):
            LOG.info("control segment %x: %d virtual servers", identity, event.servers)
            said = self._saying.pop(identity, set())
            self._count(peer)  # before anything begins: what it hears first is from before its time
            if not self._synchronised:
                self._synchronised = True
                said.update(segments.numbers())
                self._greenlets.append(eventlet.spawn_after(REJOIN_SECONDS, self._guarded_once, self._rejoined))
            self._tell(said)
            self._messages(peer, list(self._flows.pop(identity, ())))
            if self._early:
                early, self._early = list(self._early), deque()
                self._closed(early)

    def _tell(self, numbers: Iterable[int], identity: int | None = None) -> None:
        """Have the fast path follow; once ``identity`` has said all it wants, if it is about to."""
        if identity in self._saying:
            self._saying[identity].update(numbers)
            return
        if self._synchronised:
            changed = {number: self.segments.distribution(number) for number in numbers}
            if changed:
                self.agent.configure(changed)

    def _use_cookies(self) -> None:
        cookies = self.segments.cookies()
        if cookies is not None and cookies != self._keys:
            self._keys = cookies
            self.agent.fastpath.set_cookies(*cookies)

    def _rejoined(self) -> None:
        """What an agent before this one had been told of, and nobody wants any more, goes."""
        self.segments.forget_before()
        self.agent.configure({number: self.segments.distribution(number) for number in self.segments.numbers()},
                             whole=True)

    def _messages(self, peer: CsPeer, messages: list[Any]) -> None:
        identity = peer.identity
        if identity in self._saying:
            # SSMB is faster than CSMB: what a flow belongs to is not here yet.
            early = self._flows.setdefault(identity, deque(maxlen=MOST_FLOWS))
            early.extend(message for message in messages if isinstance(message, NewFlow))
            messages = [message for message in messages if not isinstance(message, NewFlow)]
        replies: list[Reply | NewFlow | AppReply] = [message for message in messages if isinstance(
            message, (Reply, NewFlow)) or (isinstance(message, AppReply) and self._first(message))]
        if replies:
            numbers = {reply.query.serial: reply.query.virtual_server for reply in replies}
            refused = self.agent.reply(self.segments.replies(identity, replies), time.monotonic())
            if refused:
                peer.send_refused([one._replace(virtual_server=numbers[one.serial]) for one in refused])
        reaps = [message for message in messages if isinstance(message, (Reap, Timeout))]
        if reaps:
            self._reap(peer, reaps)
        for message in messages:
            if isinstance(message, Reset):
                LOG.warning("control segment %x: every connection of its own is forgotten (RESET)", identity)
                for number in self.segments.led(identity):
                    self.agent.fastpath.delete(virtual_server=number)
            elif isinstance(message, Lost):
                LOG.warning("control segment %x had to drop %d messages", identity, message.records)

    def _first(self, reply: AppReply) -> bool:
        """Whether this is not a decision's repetition: the connection may have come and gone meanwhile."""
        if reply.reply is None:
            return True
        serial = reply.query.serial
        if serial in self._decided:
            return False
        self._decided[serial] = None
        if len(self._decided) > MOST_DECIDED:
            self._decided.popitem(last=False)
        return True

    def _reap(self, peer: CsPeer, reaps: Sequence[Reap | Timeout]) -> None:
        """Of even serials are the connections that the controller opened by packet-in: they are in conntrack."""
        own = [one for one in reaps if not one.serial or one.serial & 1]
        for answer in self.agent.reap(list(self.segments.reaps(peer.identity, own))) if own else ():
            peer.send_deletes(answer.closed)
        for one in reaps:
            if isinstance(one, Reap) and one.serial and not one.serial & 1 and not one.final:
                self._reaps[peer.identity, one.serial] = one
                if len(self._reaps) > SWITCH_REAPS:
                    self._reaps.popitem(last=False)  # it will be asked again

    def _looking(self) -> None:
        """Answer what was asked about connections that the switch holds itself."""
        while True:
            eventlet.sleep(DUMP_SECONDS / 4)
            if not self._reaps:
                continue
            asked, self._reaps = self._reaps, OrderedDict()
            zone = zones(self.agent.switch).service
            try:
                lines = self._ovs.appctl("dpctl/dump-conntrack", f"zone={zone}").splitlines()
            except OvsError as error:
                LOG.warning("conntrack cannot be read: %s", error)  # nobody can tell; it will be asked again
            else:
                alive = {entry.serial for entry in conntrack.parse(lines, zone) if entry.state not in CLOSING}
                switch = self.agent.switch
                for (identity, serial), reap in asked.items():
                    peer = self._server.peers.get(identity)
                    if peer is None:
                        continue
                    if serial in alive:
                        peer.send_stats([Stats(switch, serial, Error.CONNALIVE, 0, 0)])
                    else:
                        peer.send_deletes([Closed(serial, reap.virtual_server, reap.member, Reason.DELETED, False,
                                                  False)])
            eventlet.sleep(DUMP_SECONDS)

    # -------------------------------------------------------------- to the control segments

    def _asked(self, queries: Sequence[Query | AppQuery]) -> None:
        for identity, batch in self.segments.queries(queries):
            peer = self._server.peers.get(identity)
            if peer is not None:
                peer.send_queries([one for one in batch if isinstance(one, Query)])
                peer.send_app_queries([one for one in batch if isinstance(one, AppQuery)])
                peer.flush(urgent=True)

    def _closed(self, closed: list[Closed]) -> None:
        if not self._synchronised:
            # An agent before this one left them in the ring; nobody is here yet who knows their numbers.
            room = MOST_EARLY - len(self._early)
            self._early.extend(closed[:room])
            self.agent.counters["closed_lost"] += len(closed[room:])
            return
        for identity, batch in self.segments.closed(closed):
            peer = self._server.peers.get(identity)
            if peer is not None:
                peer.send_deletes(batch)

    def _alive(self, alive: list[Stats]) -> None:
        for peer in self._server.peers.values():
            peer.send_stats(alive)

    def _counting(self) -> None:
        """Tell every control segment what was counted, when it has changed."""
        while True:
            began = time.thread_time()
            self._count(*(peer for peer in self._server.peers.values()
                          if peer.connected and peer.identity not in self._saying))
            eventlet.sleep(max(COUNT_SECONDS, (time.thread_time() - began) / COUNT_SHARE))

    def _count(self, *peers: CsPeer) -> None:
        if not peers:
            return
        counters, traffic = self.agent.told(), self.agent.fastpath.service_stats()
        traffic.update(((number, 0), layout.Traffic(*refused, 0, 0))
                       for number, refused in self.agent.fastpath.refusals().items() if any(refused))
        for peer in peers:
            own = self.segments.traffic(peer.identity, traffic)
            told = (self.agent.held, counters, own)
            if told != self._told.get(peer.identity) and peer.send_counters(self.agent.held, counters, (
                    Traffic(*key, *value) for key, value in own.items())):
                self._told[peer.identity] = told

    def _guarded(self, work: Any) -> None:
        while True:
            self._guarded_once(work)
            eventlet.sleep(1.0)

    def _guarded_once(self, work: Any) -> None:
        try:
            work()
        except Exception:
            LOG.exception("%s failed; going on", work.__name__.strip("_"))


def remove(bridge: str) -> None:
    """Take down what an agent, or a controller with an agent in it, left in front of a bridge.

    Raises:
        PortsError, OvsError: something could not be undone; all the rest was.
        FastPathUnavailable: an agent is at work there.
    """
    with claim(bridge):
        for name in fastpath_of.remove(Ovs(), bridge):
            LOG.info("%s is a port of %s again", name, bridge)


@contextlib.contextmanager
def claim(bridge: str) -> Iterator[None]:
    """Be the only agent of a bridge: two would take each other's connections away.

    The name goes with the process, however it ends, and is its network namespace's own.

    Raises:
        FastPathUnavailable: there is one already.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        try:
            mark.bind(f"\0lbapp-agent-{bridge}")
        except OSError:
            raise FastPathUnavailable(f"another agent is at work in front of {bridge}") from None
        yield


def _check_free(address: tuple[str, int]) -> None:
    """Before a fast path is set up for nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def run(settings: Settings) -> None:
    """Run an agent until it is told to stop.

    Raises:
        FastPathUnavailable: there can be no fast path here; the text says why.
        OvsError: Open vSwitch is not there, or has no such bridge.
        OSError: the address is in use or not of this host.
    """
    _check_free(settings.listen)
    with claim(settings.bridge):
        _run(settings)


def _run(settings: Settings) -> None:
    ovs = Ovs()
    switch = int(ovs.vsctl("get", "Bridge", settings.bridge, "datapath_id", wait=False).strip().strip('"'), 16)
    begun = time.monotonic()
    fastpath = FastPath.open(ovs, settings.bridge, max_connections=settings.max_connections)
    process: AgentProcess | None = None
    try:
        process = AgentProcess(fastpath, switch, settings, ovs)
        LOG.info("fast path in front of %d ports of %s after %.2f s; CSMB on %s:%d", len(fastpath.ports),
                 settings.bridge, time.monotonic() - begun, *process.address)
        while True:
            eventlet.sleep(3600)
    finally:
        if process is not None:
            process.stop()
        # One that was found and could not be served is as it was.
        leave = settings.leave or (process is None and fastpath.adopted)
        fastpath.close(keep=leave)
        LOG.info("stopped; the fast path of %s is %s", settings.bridge, "left in place" if leave else "gone")
