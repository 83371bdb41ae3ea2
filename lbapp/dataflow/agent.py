# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The data flow segment's half of 003's messages, for the fast path of one switch.

Turns distributions into the fast path's tables, first packets into QUERY, REPLY into flows, the fast path's
ledger into DELETE. Owns the packets that wait for a REPLY and what the tables hold; decides nothing, and knows
neither sockets nor clocks: the process that runs it (``lbapp run``, ``lbapp agent``) does.

Who owns a connection: the fast path, from the moment its entry is there until its ledger has told of its end.
Open vSwitch knows nothing of it. Where the agent is not in the controller's process, a connection that came by
packet-in is Open vSwitch's altogether, in conntrack: nobody could say when its entry would be there.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from lbapp.control.buckets import Ration, mask, ration
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Closed,
    Delete,
    Error,
    FlowSignature,
    NewFlow,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Stats,
    Timeout,
)
from lbapp.dataflow import frames
from lbapp.dataflow.carrier import Answered, Held
from lbapp.dataflow.distribution import Distribution, Greeting, Target, slots
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.entries import Departure, Entry, FirstFrame
from lbapp.dataflow.fastpath.fastpath import FastPath
from lbapp.dataflow.fastpath.layout import Mode
from lbapp.dataflow.matches import TCP
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.dataflow.proxy import Proxy
from lbapp.dataflow.relay import Relay

LOG = logging.getLogger("lbapp.agent")

MOST_QUERIES = 32
"""Packets that are taken from the ring at once: the first clients have their members while others are still to be
read. With all that waits at once, members are without work and then have too much: 8 % fewer connections a second."""
MAX_WAITING = 16_384
"""Flows whose packets wait for a REPLY; the oldest makes room."""
MAX_FRAMES = 8
"""Packets of one flow that wait (003: "the DFS buffers all incoming packets in the flow")."""
ASK_AGAIN_SECONDS = 0.5
"""What is not answered after so long is asked again: the QUERY or its REPLY was lost."""
MOST_AGAIN = 256
"""Questions asked again at once: a control segment that is slow has others waiting."""
MOST_TWICE = 4096
"""Flows that were asked about again, and were answered: so many are remembered."""
GIVE_UP_SECONDS = 3.0
NEARLY_FULL = 0.95
ROOM = 0.85
"""Where the table is fuller than the first, the oldest connections go until it is as full as the second."""
MANY_WALKS, MOST_LISTED = 3, 20_000
"""Where the flows of so many members or virtual servers go at once, and there are fewer flows than that, all are
listed: a walk over the whole table takes long, however little is in it."""
LINGER_MS = 5000
"""How long a closed connection still translates what comes late."""
SHORT_LINGER_MS = 250
"""The same where the table is nearly full."""
HELD = "proxy_held"
"""Of what an agent tells by name the one that does not only grow: clients whose handshake is proxied, and whose
connection no member has yet."""

_REASONS: dict[int, Reason] = {layout.Reason.SHUTDOWN: Reason.SHUTDOWN, layout.Reason.IDLE: Reason.IDLE,
            layout.Reason.OVERFLOW: Reason.OVERFLOW, layout.Reason.DELETED: Reason.DELETED}


class Waiting(NamedTuple):
    """A flow that was asked about. ``frames`` are its packets so far, with whole checksums."""

    query: Query
    asked: float
    first: float
    ifindex: int
    frames: list[bytes]
    packet: frames.Packet


_THERE = frozenset({layout.Result.OPENED, layout.Result.EXISTS, layout.Result.GONE})


Path = TypeVar("Path", bound=FastPath | Relay)


class Agent(Generic[Path]):
    """The agent of one switch.

    Args:
        fastpath: its fast path, or what stands in for one.
        switch: its datapath id.
        serials: serials for the flows that this agent originates; the controller's own are even, these odd.

    Attributes:
        counters: what the agent itself has dropped or refused, by name.
        held: connections in the table at the last sweep.
    """

    def __init__(self, fastpath: Path, switch: int, serials: Iterator[int]) -> None:
        self.fastpath = fastpath
        self.switch = switch
        self.counters: Counter[str] = Counter()
        self.held = 0
        self._serials = serials
        self._waiting: OrderedDict[FlowSignature, Waiting] = OrderedDict()
        self._twice: OrderedDict[int, None] = OrderedDict()
        self._told: dict[int, Distribution] = {}
        self._serving: dict[layout.ServiceKey, int] = {}
        self._targets: dict[tuple[int, int], int] = {}
        self._free: deque[int] = deque()
        self.proxy = Proxy(fastpath, switch, serials, self._entry, self._greeting, self.counters)
        # Tables of an agent that was here before go on until this one knows better.
        self._next = max(fastpath.targets(), default=0) + 1

    # -------------------------------------------------------------- what it is told

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """Take over these virtual servers; None: it is gone, and so are its flows.

        No packet meets half of it: targets are there before the table that names them, and go after it.

        Args:
            changed: by number.
            whole: these are all; whatever else is there from before is gone as well.
        """
        stale: list[tuple[int, int]] = []
        gone: list[int] = []
        targets: dict[int, layout.Target] = {}
        services: dict[layout.ServiceKey, layout.Service | None] = {}
        # What goes first: what takes its place may have its address, and may have been told of before.
        for number, made in changed.items():
            old = self._told.get(number)
            if old is not None and (made is None or _key(made) != _key(old)):
                if self._serving.get(_key(old)) == number:
                    del self._serving[_key(old)]
                    services[_key(old)] = None
                gone.append(number)
        for number, made in changed.items():
            old = self._told.pop(number, None)
            if made is not None:
                self._told[number] = made
                for target in made.targets:
                    wire = self.fastpath.ports.get(target.host.port)
                    if wire is not None:
                        targets[self._target_id(number, target.member)] = layout.Target(
                            target.address, target.port, target.host.mac, wire.ifindex, target.member, target.routed)
                services[_key(made)] = self._service(made, targets)
                self._serving[_key(made)] = number
            if old is not None:
                kept = {target.member for target in made.targets} if made is not None else set()
                stale += [(number, target.member) for target in old.targets if target.member not in kept]
                if made is not None:
                    self._relocate(old, made)
        if whole:
            gone += self._leftovers(services)
        self.fastpath.set_targets(targets)
        self.fastpath.set_services(services)
        if whole:
            self.fastpath.set_targets(dict.fromkeys(self.fastpath.targets() - self._targets.values()))
        ids = [self._targets.pop(key) for key in stale if key in self._targets]
        self.fastpath.set_targets(dict.fromkeys(ids))
        self._free.extend(ids)
        self._forget([(0, number) for number in gone])

    def _leftovers(self, services: dict[layout.ServiceKey, layout.Service | None]) -> list[int]:
        """Note what the fast path serves and nobody told of; returns the virtual servers that are no more."""
        there = self.fastpath.services()
        services.update(dict.fromkeys(there.keys() - services.keys()))
        return [number for number in set(there.values()) if number not in self._told]

    def _target_id(self, virtual_server: int, member: int) -> int:
        key = (virtual_server, member)
        if key not in self._targets:
            self._targets[key] = self._free.popleft() if self._free else self._next
            self._next += self._targets[key] == self._next
        return self._targets[key]

    def _service(self, made: Distribution, targets: Mapping[int, layout.Target]) -> layout.Service:
        ids = [self._targets.get((made.number, target.member), 0) for target in made.targets]
        # A member behind a port that this fast path has not: the switch's own rules know the way.
        reachable = made._replace(targets=tuple(
            target if number in targets else target._replace(weight=0)
            for number, target in zip(ids, made.targets, strict=True)))
        table = slots(reachable) if made.mode is Mode.DECIDE else ()
        mode = Mode.PASS if made.mode is Mode.DECIDE and not table else made.mode
        greeting = made.greeting or Greeting(0, 0, False)
        return layout.Service(made.number, mode, made.hash, made.idle, tuple(ids[index] for index in table),
                              greeting.mss, greeting.window_scale, greeting.sack, _ration(made))

    def _relocate(self, old: Distribution, made: Distribution) -> None:
        """A member that moved takes its established connections along."""
        before = {target.member: target.host for target in old.targets}
        for target in made.targets:
            if before.get(target.member, target.host) != target.host:
                wire = self.fastpath.ports.get(target.host.port)
                if wire is not None:
                    self.fastpath.relocate(target.member, target.host.mac, wire.ifindex, made.number)

    def reply(self, replies: Sequence[Reply | NewFlow | AppReply], now: float = 0.0) -> list[Refused]:
        """Install the flows of a batch of REPLY or NEWFLOW; then the packets that wait for them go, or refusals.

        Returns:
            The flows that could not be held: their control segment is to forget them.
        """
        said = [reply for reply in replies if isinstance(reply, AppReply)]
        refused: list[Refused] = self.proxy.reply(said, now) if said else []
        if len(said) == len(replies):
            return refused
        entries: list[Entry] = []
        installing: list[tuple[Query, Waiting | None]] = []
        offsets: dict[int, layout.Splice] = {}
        for one in replies:
            if isinstance(one, AppReply):
                continue
            reply, more = _as_reply(one), 0
            if isinstance(one, NewFlow):
                # What a member said before this has the connection, nobody here knows.
                more = layout.ANSWERED | one.client_finished * layout.FIN | one.member_finished * layout.PEER_FIN
                if one.ack_offset is not None:
                    more |= layout.SPLICE
                    offsets[one.query.serial] = layout.Splice(one.ack_offset, one.window_shift)
            waiting = self._waiting.pop(reply.query.signature, None)
            if waiting is None:
                if reply.query.serial in self._twice:
                    continue  # the second answer; its flow may have come and gone
            elif waiting.asked != waiting.first:
                self._twice[waiting.query.serial] = None
                if len(self._twice) > MOST_TWICE:
                    self._twice.popitem(last=False)
            if reply.error is not Error.OK or reply.translation is None:
                if waiting is not None:
                    self._refuse(waiting)
                continue
            entry = self._entry(reply, more, 0, FirstFrame(waiting.ifindex, waiting.frames[0])
                                if waiting is not None and _waits(reply.query) else None)
            if entry is None:
                self.counters["reply_unknown_port"] += 1
                refused.append(self._refused(reply.query))
                continue
            entries.append(entry)
            installing.append((reply.query, waiting))
        for (query, waiting), result in zip(installing, self.fastpath.install(entries) if entries else (), strict=True):
            if result is layout.Result.GONE:
                continue
            if result not in _THERE:
                # Without its flow it would only ask again. Old connections live on (003, FIGURE 18).
                refused.append(self._refused(query))
                if waiting is not None and not (result == layout.Result.TAKEN and self._give(waiting)):
                    self._refuse(waiting)
            elif waiting is not None:
                for frame in waiting.frames:
                    self.fastpath.inject(waiting.ifindex, frame, _waits(query))
        if offsets:
            self.fastpath.set_splices(offsets)
        return refused

    def _refused(self, query: Query) -> Refused:
        return Refused(self.switch, query.serial, query.virtual_server)

    def deliver(self, answered: Sequence[Answered]) -> list[Answered]:
        """Install the flows of queries that came as packet-ins, and let their packets go.

        Returns:
            Those for which there was no room, or no wire: the switch itself has to serve them.
        """
        entries: list[Entry] = []
        going: list[Answered] = []
        left: list[Answered] = []
        for one in answered:
            entry = self._entry(one.reply)
            if entry is None:
                left.append(one)
            else:
                entries.append(entry._replace(departure=FirstFrame(entry.client_ifindex, one.frame))
                               if _waits(one.reply.query) else entry)
                going.append(one)
        for one, result in zip(going, self.fastpath.install(entries) if entries else (), strict=True):
            query = one.reply.query
            if result not in _THERE:
                left.append(one)
            elif result is not layout.Result.GONE:
                self.fastpath.inject(self.fastpath.ports[query.in_port].ifindex, one.frame, _waits(query))
        return left

    def _greeting(self, virtual_server: int) -> Greeting | None:
        told = self._told.get(virtual_server)
        return told.greeting if told is not None else None

    def _entry(self, reply: Reply, more: int = 0, request: int = 0, departure: Departure | None = None) -> Entry | None:
        """A connection as a REPLY wants it; None where there is no such virtual server, or port."""
        query, signature, translation = reply.query, reply.query.signature, reply.translation
        told = self._told.get(query.virtual_server)
        if translation is None or told is None:
            return None
        ports = self.fastpath.ports
        client, server = ports.get(query.in_port), ports.get(translation.host.port)
        if client is None or server is None:
            return None
        address = translation.address if translation.address is not None else signature.destination
        state = (layout.ROUTED if translation.routed else 0) | (layout.TRACKED if reply.tracked else 0) | more
        return Entry(
            layout.FlowKey(signature.source, signature.destination, signature.source_port, signature.destination_port,
                           signature.protocol),
            layout.Flow(signature.source, address, signature.source_port,
                        translation.port or signature.destination_port, translation.host.mac,
                        VIRTUAL_MAC if translation.routed else layout.KEEP_MAC, server.ifindex, state, query.serial,
                        query.virtual_server, reply.member, told.idle, request=request),
            query.client_mac, client.ifindex, departure)

    def _give(self, waiting: Waiting) -> bool:
        """Leave a flow whose way back is another connection's to Open vSwitch, which can change the client's port."""
        given = all(self.fastpath.give(waiting.ifindex, frame) for frame in waiting.frames)
        self.counters["miss_answered"] += given
        return given

    def _refuse(self, waiting: Waiting) -> None:
        self.counters["refused"] += 1
        answer = frames.refusal(waiting.frames[0], waiting.packet, VIRTUAL_MAC)
        if answer is not None:
            self.fastpath.send(waiting.ifindex, answer)

    def reap(self, asked: Sequence[Reap | Timeout]) -> list[Delete]:
        """Delete flows unless alive, or in any case (REAP, 003 FIGURE 19); give them other time-outs (TIMEOUT).

        A Reap with serial 0 is for all flows of its member (of its virtual server, where it names one). Returns the
        answer for those that are not there; of the others :meth:`ended` tells.
        """
        wanted: dict[int, layout.Wanted] = {}
        gone: list[tuple[int, int]] = []
        for one in asked:
            if isinstance(one, Timeout):
                wanted[one.serial] = layout.Wanted(False, min(one.seconds, 65535))
            elif one.serial:
                wanted[one.serial] = layout.Wanted(one.final, 0)
            elif one.member:
                gone.append((one.member, one.virtual_server))
        self._forget(gone)
        if not wanted:
            return []
        _, missing = self.fastpath.reap(wanted)
        return [Delete(self.switch, tuple(Closed(serial, 0, 0, Reason.DELETED, False, False)
                                          for serial in sorted(missing)))] if missing else []

    def _forget(self, gone: Sequence[tuple[int, int]]) -> None:
        """Delete the flows of (member, virtual server), where one of them 0 is any. Many are listed and deleted in one
        walk over the table, rather than in one for each, where there are few enough to list."""
        flows = self.fastpath.flows(MOST_LISTED) if len(gone) >= MANY_WALKS else None
        if flows is not None and len(flows) < MOST_LISTED:
            pairs = set(gone)
            serials = {flow.serial for _, flow in flows if not pairs.isdisjoint(
                ((flow.member, 0), (0, flow.virtual_server), (flow.member, flow.virtual_server)))}
            if serials:
                self.fastpath.reap(dict.fromkeys(serials, layout.Wanted(final=True)))
            return
        for member, virtual_server in gone:
            if member:
                self.fastpath.delete(member=member, virtual_server=virtual_server or None)
            else:
                self.fastpath.delete(virtual_server=virtual_server)

    def reset(self) -> None:
        """Forget every flow (RESET)."""
        self.fastpath.delete(everything=True)

    # -------------------------------------------------------------- what it asks and tells

    def queries(self, now: float) -> list[Query | AppQuery]:
        """The first packets that came, at most :data:`MOST_QUERIES` of them, as a batch of QUERY and APP_QUERY. There
        may be more."""
        asked: list[Query | AppQuery] = []
        for record in self.fastpath.queries(MOST_QUERIES):
            ifindex, frame = record.ifindex, record.frame
            try:
                if record.kind != layout.Ask.FIRST:
                    member = record.kind == layout.Ask.MEMBER
                    (self.proxy.from_member if member else self.proxy.from_client)(record, now)
                    continue
                packet = frames.parse(frame)
                frame = frames.with_checksum(frame, packet)
            except frames.MalformedError:
                self.counters["malformed"] += 1
                continue
            known = self._waiting.get(packet.signature)
            if known is not None:
                if packet.signature.protocol == TCP:
                    known.frames[:] = (frame,)  # a SYN again
                elif len(known.frames) < MAX_FRAMES:
                    known.frames.append(frame)
                else:
                    self.counters["waiting_dropped"] += 1
                continue
            port = self.fastpath.port_of(ifindex)
            if port is None:
                self.counters["query_unknown_port"] += 1
                continue
            query = Query(next(self._serials) & 0xFFFFFFFF, self.switch, port, packet.source_mac, packet.signature,
                          record.virtual_server, packet.tcp_flags)
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popitem(last=False)
                self.counters["waiting_dropped"] += 1
            self._waiting[packet.signature] = Waiting(query, now, now, ifindex, [frame], packet)
            asked.append(query)
        return [*asked, *self.proxy.flush(now)]

    def ended(self, limit: int) -> tuple[list[Closed], list[Stats]]:
        """Connections that ended, as one batch of DELETE, and live ones that were asked about, as STATS (CONNALIVE; in
        front of it NOTAVAIL, where the member has not said anything).

        Totals are of both directions.
        """
        closed: list[Closed] = []
        alive: list[Stats] = []
        reasons, seconds, add = _REASONS, layout.milliseconds(1 << 20) / (1 << 20) / 1000, closed.append
        for (_, _, _, _, _, virtual_server, member, serial, reason, state, duration, packets_in, bytes_in, packets_out,
             bytes_out) in self.fastpath.closed(limit):
            if reason in reasons:
                add(Closed(serial, virtual_server, member, reasons[reason], packets_in == packets_out == 1, True,
                           packets_in + packets_out, bytes_in + bytes_out, duration * seconds))
            else:
                for error in (Error.CONNALIVE,) if state & layout.ANSWERED else (Error.NOTAVAIL, Error.CONNALIVE):
                    alive.append(Stats(self.switch, serial, error, packets_in + packets_out, bytes_in + bytes_out))
        return closed, alive

    def connections(self, limit: int, now: int) -> Iterator[Held]:
        """Open connections of the table, at most so many, in no order. ``now`` is in the fast path's ticks."""
        fastpath = self.fastpath
        for key, flow in fastpath.flows(2 * limit):
            if flow.state & (layout.OUTBOUND | layout.CLOSED):
                continue
            back = fastpath.lookup(layout.FlowKey(flow.destination, flow.source, flow.destination_port,
                                                  flow.source_port, key.protocol))
            age, idle = (layout.milliseconds(now - then & 0xFFFFFFFF) / 1000
                         for then in (flow.opened, max(flow.used, back.used if back is not None else 0)))
            yield Held(FlowSignature(key.source, key.source_port, key.destination, key.destination_port, key.protocol),
                       flow.virtual_server, flow.member, flow.serial,
                       bool(flow.state & layout.DECIDED), age, max(idle, 0.0),
                       flow.packets + (back.packets if back is not None else 0),
                       flow.bytes + (back.bytes if back is not None else 0))

    def tick(self, now: float) -> list[Query | AppQuery]:
        """Give up on what nobody answered; returns what has to be asked, or asked again."""
        while self._waiting:
            signature, waiting = next(iter(self._waiting.items()))
            if now - waiting.first < GIVE_UP_SECONDS:
                break
            del self._waiting[signature]
            self.counters["unanswered"] += 1
        late = [(signature, waiting) for signature, waiting in self._waiting.items()
                if now - waiting.asked >= ASK_AGAIN_SECONDS]
        for signature, waiting in late[:MOST_AGAIN]:
            self._waiting[signature] = waiting._replace(asked=now)
        return [*(waiting.query for _, waiting in late[:MOST_AGAIN]), *self.proxy.tick(now)]

    def sweep(self) -> layout.Swept:
        """Delete what has ended or is idle; where the table is nearly full, the oldest too (003, FIGURE 18)."""
        swept = self.fastpath.sweep(LINGER_MS)
        size = self.fastpath.max_flows
        if swept.live + swept.lingering > NEARLY_FULL * size:
            swept = self.fastpath.sweep(SHORT_LINGER_MS)  # what has ended makes room before anything that lives
            surplus = swept.live + swept.lingering - int(ROOM * size)
            if swept.live + swept.lingering > NEARLY_FULL * size:
                swept = self.fastpath.sweep(SHORT_LINGER_MS, swept.older_than(surplus), evict_most=surplus)
        self.held = swept.live
        return swept

    def opened(self) -> int:
        """Connections that were entered into the table so far."""
        counters = self.fastpath.counters()
        return counters["opened_here"] + counters["opened_installed"]

    def told(self) -> dict[str, int]:
        """What the fast path and the agent have counted, by name, and how many handshakes are held half-way."""
        return {**self.fastpath.counters(), **self.counters, HELD: len(self.proxy)}

    def room(self, swept: layout.Swept) -> int:
        """How many connections may come after this sweep before the next one is due."""
        size = self.fastpath.max_flows
        return max(int(NEARLY_FULL * size) - swept.live - swept.lingering, int((1 - NEARLY_FULL) * size))

    def sync_ports(self) -> None:
        """Follow the bridge's ports; what goes by one that changed is told anew."""
        if self.fastpath.sync_ports():
            self.configure(dict(self._told))


def _waits(query: Query) -> bool:
    """Whether the client says nothing more before it is answered, which could overtake its first packet."""
    return bool(query.tcp_flags & frames.SYN)


def _as_reply(message: Reply | NewFlow) -> Reply:
    """A NEWFLOW is a REPLY to what nobody asked. The client's own numbers are the member's here: offsets
    (ADD_TCP_OFFSETS) that would change them cannot be."""
    if isinstance(message, Reply):
        return message
    if message.seq_offset:
        return Reply(message.query, Error.UNKNOWN)
    return Reply(message.query, Error.OK, message.member, message.translation, tracked=message.tracked)


def _ration(made: Distribution) -> Ration | None:
    if made.limits is None:
        return None
    rate, burst, client_rate, client_burst, prefix = made.limits
    return ration(rate, burst, client_rate, client_burst, mask(prefix, len(made.address)))


def _key(made: Distribution) -> layout.ServiceKey:
    return layout.ServiceKey(made.address, made.port, made.protocol)


__all__ = ["Agent", "Target", "Waiting"]
