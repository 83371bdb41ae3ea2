# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path's work for proxied connections, done in the control segment: for switches that have none.

Every packet of such a connection is a packet-in here and a packet-out from here (binding ``relay``). Handshakes are
answered by the same cookies as in ``handshake.bpf.h``, connections translated as in ``splice.bpf.h``, and the agent
above (``agent.py``, ``proxy.py``) cannot tell the difference. Owns the connections that are relayed; decides nothing.
Pure: frames in, ``out`` filled, the clock is given.

A relayed connection that a fast path has taken over (binding ``hybrid``) is translated here for as long as packets of
it still come; nobody is told of its end from here. What is on its way through here would be overtaken by what comes
next: so a connection with more than one packet under way is taken over only when all of it has been acknowledged.
Until then acknowledgments are kept back, so that neither end sends more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from typing import Any, NamedTuple

from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import cookies, layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.entries import Entry
from lbapp.dataflow.fastpath.layout import Ask, Flow, FlowKey, QueryRecord, Reason, Result, Service, ServiceKey, Splice
from lbapp.dataflow.fastpath.requests import Requests
from lbapp.dataflow.frames import ACK, FIN, RST, SYN, Packet, Segment
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.dataflow.relayed import Connection
from lbapp.dataflow.splicing import fit, hops, translated

MAX_RELAYED = 4096
"""Connections relayed at once."""
MAX_PENDING = 16_384
MAX_ASKED = 1024
MAX_ENDED = 65_536
MAX_DOUBTS = 4096
DOUBT_SECONDS, DOUBT_OVER_SECONDS = 3.0, 60.0
REACH = 0x20000
"""How far a client may be from where it began while its first data is being read."""
HALF_CLOSED_SECONDS = 300.0
PARTING_MOST = 256
"""Packets of a connection after which a fast path takes it over though not all of them were acknowledged."""


class Port(NamedTuple):
    """A port of the switch, as the agent knows the wires of a fast path."""

    ifindex: int


class Ports:
    """Every number is a port: where members and clients are, the switch itself has said."""

    def get(self, number: int) -> Port:
        """The port of a number."""
        return Port(number)

    def __getitem__(self, number: int) -> Port:
        return Port(number)


class Relayed(NamedTuple):
    """A connection that a fast path is to take over: as the client sends it, the way there and back, what is
    translated (None: nothing but addresses and ports), and who has finished (1: the client, 2: its member)."""

    key: FlowKey
    flow: Flow
    back: Flow
    splice: Splice | None
    finished: int


class Relay:
    """The relayed connections of one switch; see :class:`lbapp.dataflow.fastpath.fastpath.FastPath`, whose methods an
    agent calls, for what those of the same name do.

    Args:
        clock: seconds of any monotonic clock.
        most: connections at once.

    Attributes:
        out: frames that are to leave, with their port, in order; whoever sends them empties it.
        requests: none: no SYN-ACK is answered here.
    """

    def __init__(self, clock: Callable[[], float], most: int = MAX_RELAYED) -> None:
        self.ports = Ports()
        self.max_flows = most
        self.out: list[tuple[int, bytes]] = []
        self.requests = Requests(bytearray(), int)
        self._clock = clock
        self._keys: tuple[bytes | None, bytes | None] = (None, None)
        self._current = 0
        self._targets: dict[int, layout.Target] = {}
        self._services: dict[ServiceKey, Service] = {}
        self._flows: dict[FlowKey, tuple[Connection, int]] = {}
        self._by_serial: OrderedDict[int, Connection] = OrderedDict()
        self._pending: OrderedDict[FlowKey, tuple[int, int]] = OrderedDict()
        self._doubts: OrderedDict[FlowKey, tuple[float, int]] = OrderedDict()
        self._asked: deque[QueryRecord] = deque()
        self._ended: deque[layout.Closed] = deque()
        self._errors: deque[tuple[int, int, int, int]] = deque(maxlen=MAX_ASKED)
        self._traffic: dict[tuple[int, int], list[int]] = {}
        self._counts: Counter[str] = Counter()
        self._there: list[int] = []
        self._finishing: list[Connection] = []
        self._spent: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_serial)

    # -------------------------------------------------------------- packets

    def packet(self, port: int, frame: bytes) -> int | None:
        """A packet of a client to a virtual server that is relayed, or of one of its members.

        Returns:
            Its virtual server, 0 where that cannot be said; None: of a member, and of no relayed connection.
        """
        try:
            frame, packet = frames.whole(frame)
            return self._walk(port, frame, packet) if packet.signature.protocol == frames.TCP else None
        except frames.MalformedError:
            self._counts["shot"] += 1
            return 0

    def _walk(self, port: int, frame: bytes, packet: Packet) -> int | None:
        it = packet.signature
        key = FlowKey(it.source, it.destination, it.source_port, it.destination_port, it.protocol)
        known = self._flows.get(key)
        service = self._services.get(ServiceKey(it.destination, it.destination_port, it.protocol))
        if not fit(frame, packet) and (known is not None or service is not None):
            raise frames.MalformedError("nothing that may be translated")
        if known is not None:
            if packet.tcp_flags & (SYN | ACK | RST | FIN) != SYN or not _over(
                    known[0], frames.segment(frame, packet).seq):
                self._follow(known[0], known[1], port, frame, packet)
                return known[0].sides[0].virtual_server
            self._remove(known[0], Reason.SHUTDOWN)
        if service is None:
            return None
        part = frames.segment(frame, packet)
        if part.flags & (SYN | ACK | RST | FIN) == SYN:
            self._greet(port, key, packet, part, service)
        else:
            self._listen(port, key, frame, packet, part, service)
        return service.number

    def inject(self, ifindex: int, frame: bytes, soon: bool = False) -> bool:
        """See :meth:`FastPath.inject`: it is done when this returns, in any case."""
        return self.packet(ifindex, frame) is not None

    def send(self, ifindex: int, frame: bytes) -> bool:
        """See :meth:`FastPath.send`."""
        self.out.append((ifindex, frame))
        return True

    def give(self, ifindex: int, frame: bytes) -> bool:
        """See :meth:`FastPath.give`: the switch itself does nothing for such a connection."""
        return False

    # -------------------------------------------------------------- handshakes

    def _greet(self, port: int, key: FlowKey, packet: Packet, part: Segment, service: Service) -> None:
        if self._keys[self._current] is None or not packet.source_mac or packet.source_mac[0] & 1:
            self._counts["shot"] += 1
            return
        offered = Options.offered(part.options)
        known = self._pending.get(key)
        if known is not None and known[0] == part.seq:
            cookie = known[1]
        else:
            self._pending.pop(key, None)
            cookie = cookies.make(self._keys, self._current, key.source, key.source_port, part.seq, offered)
        packed = b"\x02\x04" + (service.mss or 536).to_bytes(2, "big")
        if offered.sack and service.sack:
            packed += b"\x01\x01\x04\x02"
        if offered.window_scale is not None and service.window_scale is not None:
            packed += b"\x01\x03\x03" + bytes((service.window_scale,))
        self._counts["greeted"] += 1
        self._answer(port, packet, Segment(cookie, part.seq + 1, SYN | ACK, layout.WINDOW, packed, b""))

    def _answer(self, port: int, packet: Packet, part: Segment) -> None:
        it = packet.signature
        self.out.append((port, frames.tcp(packet.source_mac, VIRTUAL_MAC, (it.destination, it.destination_port),
                                          (it.source, it.source_port), part)))

    def _listen(self, port: int, key: FlowKey, frame: bytes, packet: Packet, part: Segment, service: Service) -> None:
        isn, cookie, flags = part.seq - 1 & 0xFFFFFFFF, part.ack - 1 & 0xFFFFFFFF, part.flags
        bare = not part.payload
        known = self._pending.get(key)
        if known is not None and not flags & SYN and isn - known[0] & 0xFFFFFFFF <= REACH and (
                flags & RST or (flags & ACK and cookie - known[1] & 0xFFFFFFFF <= REACH)):
            if bare and not flags & (FIN | RST):
                self._counts["greeted_ack"] += 1
                return
            kind = Ask.DATA if (isn, cookie) == known else Ask.LATER
            if kind is Ask.DATA and not flags & RST and cookies.check(
                    self._keys, key.source, key.source_port, isn, cookie) is None:
                self._doubt(port, key, packet, part)  # it may be left of a connection that has gone
                return
            if flags & RST:
                del self._pending[key]
            self._ask(port, service.number, frame, kind, known[1] >> 23)
            return
        if flags & RST or not flags & ACK:
            self._counts["cookie_bad"] += 1
            return
        top = None if flags & SYN else cookies.check(self._keys, key.source, key.source_port, isn, cookie)
        if top is None:
            if bare and not flags & (SYN | FIN) and cookies.check(
                    self._keys, key.source, key.source_port, isn + 1 & 0xFFFFFFFF, cookie) is not None:
                # It has waited for long before saying anything, and asks whether we are still there.
                self._counts["greeted_ack"] += 1
                scale = service.window_scale if Options.of(cookie >> 23).window_scale is not None else 0
                self._answer(port, packet, Segment(cookie + 1, isn + 2, ACK, layout.WINDOW >> (scale or 0), b"", b""))
                return
            self._doubt(port, key, packet, part)
        elif bare:
            if flags & FIN:
                self._reset(port, packet, part)  # there is no connection that could be closed in order
            else:
                self._counts["greeted_ack"] += 1
        else:
            self._pending[key] = (isn, cookie)
            if len(self._pending) > MAX_PENDING:
                self._pending.popitem(last=False)
            self._ask(port, service.number, frame, Ask.DATA, top)

    def _doubt(self, port: int, key: FlowKey, packet: Packet, part: Segment) -> None:
        """It may have come before the client's first data: dropped; who goes on like that for seconds is reset."""
        self._counts["cookie_bad"] += 1
        now, first = self._clock(), self._doubts.get(key)
        if first is None or first[1] != part.ack or now - first[0] >= DOUBT_OVER_SECONDS:
            self._doubts.pop(key, None)
            self._doubts[key] = (now, part.ack)
            if len(self._doubts) > MAX_DOUBTS:
                self._doubts.popitem(last=False)
        elif now - first[0] >= DOUBT_SECONDS:
            self._reset(port, packet, part)

    def _reset(self, port: int, packet: Packet, part: Segment) -> None:
        self._counts["reset_sent"] += 1
        self._answer(port, packet, Segment(part.ack, 0, RST, 0, b"", b""))

    def _ask(self, port: int, virtual_server: int, frame: bytes, kind: Ask, top: int = 0) -> None:
        if len(self._asked) >= MAX_ASKED:
            self._counts["ask_lost"] += 1  # its sender repeats it
            return
        self._counts["asked_member" if kind is Ask.MEMBER else "asked_data"] += 1
        self._asked.append(QueryRecord(port, virtual_server, frame, kind, top))

    def queries(self, _limit: int = 0) -> list[QueryRecord]:
        """See :meth:`Tables.queries`; all there are, for nobody is told that there are more."""
        asked = list(self._asked)
        self._asked.clear()
        return asked

    # -------------------------------------------------------------- connections

    def _follow(self, one: Connection, side: int, port: int, frame: bytes, packet: Packet) -> None:
        flow, part = one.sides[side], frames.segment(frame, packet)
        if one.waits:
            self._counts["splice_wait"] += 1
            if side or part.payload or part.flags & (SYN | FIN | RST):
                self._ask(port, flow.virtual_server, frame, Ask.MEMBER if side else Ask.LATER,
                          part.ack - 1 >> 23 & 0x1FF)
            return
        if flow.state & layout.ROUTED and hops(frame) <= 1:
            self._counts["shot"] += 1
            return
        if not part.flags & SYN:
            one.met = one.met or bool(side)
        elif one.begun_anew(side, part):
            self._close(one)
            return
        self._counts["hits"] += 1
        one.used[side] = self._clock()
        one.packets[side] += 1
        one.octets[side] += len(frame)
        if part.payload and (status := one.said(side, part.payload)):
            self._errors.append((flow.serial, flow.virtual_server, flow.member, status))
        splice = one.splice or Splice(0)
        made = translated(frame, packet, part, flow, splice, bool(side))
        more = not one.taken and one.count(side, part, len(made))
        if one.parting:
            one.parting += 1
            if not any(one.under_way) or one.parting > PARTING_MOST:
                one.parting, one.under_way = 0, [0, 0]
                self._there.append(flow.serial)
                self.out += [kept for side in one.kept for kept in side]
                one.kept = [[], []]
            elif more and not part.payload and not part.options and not part.flags & (SYN | FIN | RST):
                one.kept[side] = [(flow.ifindex, frame) for frame in made]  # it says all that those before it did
                return
        self.out += [(flow.ifindex, frame) for frame in made]
        fins = 3 if part.flags & RST else 1 << side if part.flags & FIN else 0
        if fins & ~one.fins:
            one.fins |= fins
            if one.fins == 3:
                self._close(one)
            if one.taken:
                self._finishing.append(one)

    def errors(self) -> list[tuple[int, int, int, int]]:
        """Answers with a status of 5xx since the last call: serial, virtual server, member, status."""
        errors = list(self._errors)
        self._errors.clear()
        return errors

    def install(self, entries: Sequence[Entry]) -> list[Result]:
        """See :meth:`Tables.install`: nothing goes by itself here."""
        return [self._enter((one.key, one.flow), one.back()) for one in entries]

    def _enter(self, inbound: tuple[FlowKey, Flow], outbound: tuple[FlowKey, Flow]) -> Result:
        for key, found in ((inbound[0], Result.EXISTS), (outbound[0], Result.TAKEN)):
            known = self._flows.get(key)
            if known is not None:
                if not known[0].closed:
                    return found
                self._remove(known[0], Reason.SHUTDOWN)
        if len(self._by_serial) >= self.max_flows:
            if not self._spent:
                return Result.FULL
            # What has ended, or somebody else has, is only kept for packets that come late.
            self._remove(self._by_serial[next(iter(self._spent))], Reason.SHUTDOWN)
        one = Connection((inbound[0], outbound[0]), (inbound[1], outbound[1]), self._clock())
        for side, key in enumerate(one.keys):
            self._flows[key] = one, side
        self._by_serial[inbound[1].serial] = one
        if not one.waits:
            self._there.append(inbound[1].serial)  # its member adopts it
        self._pending.pop(inbound[0], None)
        self._count_opened(one, 1)
        self._counts["opened_installed"] += 1
        return Result.OPENED

    def _count_opened(self, one: Connection, number: int) -> None:
        flow = one.sides[0]
        self._traffic.setdefault((flow.virtual_server, flow.member), [0, 0, 0, 0])[0] += number

    def _close(self, one: Connection, reason: Reason = Reason.SHUTDOWN) -> None:
        one.closed = True
        self._spent[one.sides[0].serial] = None
        if not one.told and not one.taken:
            one.told = True
            flow, (packets, back), (octets, octets_back) = one.sides[0], one.packets, one.octets
            totals = self._traffic.setdefault((flow.virtual_server, flow.member), [0, 0, 0, 0])
            for at, more in enumerate((1, packets + back, octets + octets_back), 1):
                totals[at] += more
            self._counts["closed_count"] += 1
            if len(self._ended) >= MAX_ENDED:
                self._counts["closed_lost"] += 1
                return
            key = one.keys[0]
            self._ended.append(layout.Closed(
                layout.mapped(key.source), layout.mapped(key.destination), layout.swap(key.source_port),
                layout.swap(key.destination_port), key.protocol, flow.virtual_server, flow.member, flow.serial, reason,
                flow.state, layout.ticks(1000 * (self._clock() - one.opened)), packets, octets, back, octets_back))

    def _remove(self, one: Connection, reason: Reason) -> None:
        self._close(one, reason)
        for key in one.keys:
            self._flows.pop(key, None)
        self._by_serial.pop(one.sides[0].serial, None)
        self._spent.pop(one.sides[0].serial, None)

    def hand_over(self, serial: int) -> Relayed | None:
        """Let a fast path have a connection, if it lives and its member is there; it is still translated here until
        nothing of it comes any more. One whose member has no window scaling stays here: NEWFLOW does not tell of it."""
        one = self._by_serial.get(serial)
        if one is None or one.closed or one.taken or one.waits or (one.splice is not None and one.splice.shift_in):
            return None
        one.taken = True
        self._spent[serial] = None
        self._count_opened(one, -1)
        return _relayed(one)

    def finishing(self) -> list[Relayed]:
        """The connections that a fast path has, of which it cannot know that a side has finished: what said that was on
        its way here, and has been since the last call."""
        finishing, self._finishing = self._finishing, []
        return [_relayed(one) for one in finishing]

    def take_back(self, serial: int) -> None:
        """Nobody else has it: its end is told of from here."""
        one = self._by_serial.get(serial)
        if one is not None and one.taken:
            one.taken = False
            self._spent.pop(serial, None)
            self._count_opened(one, 1)

    def holds(self, serial: int) -> bool:
        """Whether a connection is here, and nobody else has it."""
        one = self._by_serial.get(serial)
        return one is not None and not one.taken

    def serials(self) -> list[int]:
        """Of all connections, oldest first."""
        return list(self._by_serial)

    def there(self) -> list[int]:
        """The connections that a fast path may have: their members have come since the last call, or :meth:`part`
        has put them off and they are calm now."""
        there, self._there = self._there, []
        return there

    def part(self, serial: int) -> bool:
        """Whether a fast path may take a connection over now; if not, it is of the next ones that are there."""
        one = self._by_serial[serial]
        if not one.calm:
            one.parting = 1
        return one.calm

    def virtual_server(self, serial: int) -> int | None:
        """A connection's; None where it has gone."""
        one = self._by_serial.get(serial)
        return one.sides[0].virtual_server if one is not None else None

    # -------------------------------------------------------------- what the agent sets

    def set_targets(self, targets: Mapping[int, layout.Target | None]) -> None:
        """See :meth:`Tables.set_targets`."""
        _update(self._targets, targets)

    def targets(self) -> KeysView[int]:
        """See :meth:`Tables.targets`."""
        return self._targets.keys()

    def set_services(self, services: Mapping[ServiceKey, Service | None]) -> None:
        """See :meth:`Tables.set_services`."""
        _update(self._services, services)

    def services(self) -> dict[ServiceKey, int]:
        """See :meth:`Tables.services`."""
        return {key: service.number for key, service in self._services.items()}

    def set_cookies(self, keys: Sequence[bytes | None], current: int) -> None:
        """See :meth:`Tables.set_cookies`."""
        self._keys, self._current = (keys[0], keys[1]), current

    def set_splices(self, splices: Mapping[int, Splice]) -> set[int]:
        """See :meth:`Tables.set_splices`."""
        for serial, splice in splices.items():
            if serial in self._by_serial:
                self._by_serial[serial].splice = splice
                self._there.append(serial)
        return splices.keys() - self._by_serial.keys()

    def forget_pending(self, keys: Iterable[FlowKey]) -> None:
        """See :meth:`Tables.forget_pending`."""
        for key in keys:
            self._pending.pop(key, None)

    def close_flow(self, key: FlowKey) -> bool:
        """See :meth:`Tables.close_flow`."""
        known = self._flows.get(key)
        if known is None:
            return False
        self._remove(known[0], Reason.SHUTDOWN)
        return True

    def port_of(self, ifindex: int) -> int | None:
        """The port of a wire: itself."""
        return ifindex

    def sync_ports(self) -> bool:
        """Whether wires changed: never."""
        return False

    # -------------------------------------------------------------- ends

    def closed(self, limit: int = 4096) -> list[layout.Closed]:
        """See :meth:`Tables.closed`."""
        return [self._ended.popleft() for _ in range(min(limit, len(self._ended)))]

    def sweep(self, linger_ms: float = 5000, evict_ms: float = 0, *, evict_most: int = 0xFFFFFFFF) -> layout.Swept:
        """See :meth:`Tables.sweep`; the oldest go first."""
        now, done, ages = self._clock(), Counter[str](), [0] * layout.HISTOGRAM
        for one in list(self._by_serial.values()):
            silent = now - max(one.used)
            if one.closed or one.taken:
                if silent >= linger_ms / 1000:
                    self._remove(one, Reason.SHUTDOWN)
                    done["shutdown"] += 1
                else:
                    done["lingering"] += 1
            elif silent >= (HALF_CLOSED_SECONDS if one.fins else one.sides[0].idle_seconds):
                self._remove(one, Reason.IDLE)
                done["idle"] += 1
            elif evict_ms and silent * 1000 >= evict_ms and done["overflow"] < evict_most:
                self._remove(one, Reason.OVERFLOW)
                done["overflow"] += 1
            else:
                done["live"] += 1
                ages[min(layout.ticks(1000 * silent).bit_length(), layout.HISTOGRAM) - 1] += 1
        return layout.Swept.nothing()._replace(histogram=tuple(ages), **done)

    def delete(self, *, virtual_server: int | None = None, member: int | None = None,
               everything: bool = False) -> layout.Swept:
        """See :meth:`Tables.delete`."""
        gone = [one for one in self._by_serial.values()
                if everything or ((virtual_server is None or one.sides[0].virtual_server == virtual_server)
                                  and (member is None or one.sides[0].member == member))]
        for one in gone:
            self._remove(one, Reason.DELETED)
        return layout.Swept.nothing()._replace(deleted=len(gone))

    def relocate(self, member: int, mac: bytes, ifindex: int, virtual_server: int | None = None) -> layout.Swept:
        """See :meth:`Tables.relocate`."""
        moved = [one for one in self._by_serial.values() if one.sides[0].member == member
                 and virtual_server in (None, one.sides[0].virtual_server)]
        for one in moved:
            one.sides = one.sides[0]._replace(destination_mac=mac, ifindex=ifindex), one.sides[1]
        return layout.Swept.nothing()._replace(relocated=len(moved))

    def reap(self, wanted: Mapping[int, layout.Wanted]) -> tuple[layout.Swept, set[int]]:
        """See :meth:`Tables.reap`."""
        for serial, want in wanted.items():
            one = self._by_serial.get(serial)
            if one is None:
                continue
            if want.idle_seconds:
                one.sides = one.sides[0]._replace(idle_seconds=want.idle_seconds), one.sides[1]
            elif want.final or one.closed:
                self._remove(one, Reason.DELETED)
            else:
                flow = one.sides[0]
                self._ended.append(layout.Closed(
                    bytes(16), bytes(16), 0, 0, 6, flow.virtual_server, flow.member, serial, Reason.ALIVE,
                    flow.state | (layout.ANSWERED if one.answered else 0), 0, one.packets[0], one.octets[0],
                    one.packets[1], one.octets[1]))
        return layout.Swept.nothing(), {serial for serial in wanted if serial not in self._by_serial}

    # -------------------------------------------------------------- views

    def _of(self, one: Connection, side: int) -> Flow:
        now = self._clock()
        return one.sides[side]._replace(
            state=one.sides[side].state | (layout.CLOSED if one.closed or one.taken else 0), packets=one.packets[side],
            bytes=one.octets[side], used=layout.ticks(1000 * one.used[side]) if now else 0,
            opened=layout.ticks(1000 * one.opened))

    def lookup(self, key: FlowKey) -> Flow | None:
        """See :meth:`Tables.lookup`."""
        known = self._flows.get(key)
        return self._of(*known) if known is not None else None

    def flows(self, limit: int) -> list[tuple[FlowKey, Flow]]:
        """See :meth:`Tables.flows`."""
        found: list[tuple[FlowKey, Flow]] = []
        for key, (one, side) in self._flows.items():
            if len(found) >= limit:
                break
            found.append((key, self._of(one, side)))
        return found

    def tracked(self) -> list[tuple[int, int, int]]:
        """See :meth:`Tables.tracked`."""
        return [(serial, one.sides[0].virtual_server, one.sides[0].member) for serial, one in self._by_serial.items()
                if one.sides[0].state & layout.TRACKED and not one.closed and not one.taken]

    def counters(self) -> dict[str, int]:
        """See :meth:`Tables.counters`; what was not counted yet is 0."""
        names = [counter.name.lower() for counter in layout.Counter]
        return {name: self._counts[name] for name in names}

    def service_stats(self) -> dict[tuple[int, int], layout.Traffic]:
        """See :meth:`Tables.service_stats`."""
        return {key: layout.Traffic(*counts) for key, counts in self._traffic.items()}


def _over(one: Connection, isn: int) -> bool:
    """Whether a SYN begins another connection: this one has ended, or a fast path has had it, which would have had the
    SYN if it still did. One of its own that was long on its way has a number just before what it said."""
    sent = one.sent[0]
    return one.closed or (one.taken and sent is not None and not 0 < sent - isn & 0xFFFFFFFF <= REACH)


def _relayed(one: Connection) -> Relayed:
    return Relayed(one.keys[0], *one.sides, one.splice, one.fins)


def _update(table: dict[Any, Any], changed: Mapping[Any, Any]) -> None:
    for key, value in changed.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
