# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The control segment (CS): messages from the data flow segment in, messages to it out.

Owns all state of the control segment, by way of its parts: the compiled configuration
(:mod:`services`), where next hops are (:mod:`neighbours`), the connections it must know
(:mod:`connections`), the counters (:mod:`statistics`), and for each switch and virtual server
the members that can be reached and the state of selection among them. Never does I/O and never
reads a clock: each method that needs the time is given it, in seconds that only grow.

Which member it is, is :mod:`choosing`'s; who is known again, :mod:`persistence`'s; who waits, :mod:`waiting`'s.

What is answered to a QUERY (003 FIGURES 8, 22), in this order:

    virtual server 0 (a port nobody serves)           NOTAVAIL
    one that reads what clients say (no APP_QUERY)    NOTAVAIL
    a virtual server that is not configured           UNKNOWN
    a connection that is known                        its member, again
    TCP, and not the beginning of a connection        UNKNOWN
    disabled, in maintenance, without a pool, or its
        switch is draining                            NOTAVAIL
    more new connections than its limits allow        CONNLIMIT
    as many connections as its limit allows           CONNLIMIT, or it waits
    no member that takes connections can be reached   NOTAVAIL
    those that can be are full                        CONNLIMIT, or it waits
    otherwise                                         the member that its client is known to, or the algorithm selects

An APP_QUERY is answered in the same order; the pool is the one that the virtual server's L7 policies name for what
the client said, unless they answer it themselves. Who waits (the pool has a line) is answered later, by a REPLY that
leaves with some other message's commands: whenever anything happened, those first in line are tried again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lbapp.config.model import Binding as Wanted
from lbapp.config.model import Configuration, Member, Pool, VirtualServer
from lbapp.control.answers import Answers
from lbapp.control.buckets import Rates
from lbapp.control.choosing import Choice, Choosing, Chosen, Full, SwitchState
from lbapp.control.connections import Connection, Connections
from lbapp.control.l7 import Answer, More, Reject
from lbapp.control.l7.values import missing, value
from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Binding,
    Delete,
    Error,
    Failed,
    FromSwitch,
    Host,
    HostChanged,
    Live,
    NeighbourSeen,
    PortDown,
    Probe,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Stats,
    SwitchDown,
    SwitchUp,
    ToSwitch,
)
from lbapp.control.neighbours import Neighbours
from lbapp.control.persistence import Clients
from lbapp.control.services import Service, Services, Way
from lbapp.control.statistics import REFUSALS, REFUSED_PACKETS, Counters, Counts, Endings, Ledger, Refusal, Statistics
from lbapp.control.waiting import Lines, LineView, Told, Waiter

__all__ = ["Chosen", "ControlSegment", "Limits"]

EMPTY = Configuration()

_HANDSHAKE = 0x17
"""FIN, SYN, RST and ACK: what decides whether a segment opens a connection. ECN's bits may be there as well."""

_SYN = 0x02


class ControlSegment:
    """The control segment of any number of switches.

    Args:
        configuration: what to begin with; :meth:`configure` replaces it.
        limits: bounds of tables and of the work of one tick.

    Attributes:
        adopting: addresses and ports of members whose hosts adopt connections (handoff), whoever knows of them.
        failures: members that refused a client's connection, or left it unanswered, for whoever watches them.
        clients: who is known again; whoever keeps and shows them may.
    """

    def __init__(self, configuration: Configuration = EMPTY, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self._services = Services()
        self._neighbours = Neighbours(limits)
        self._connections = Connections(limits)
        self._ledger = Ledger()
        self.clients = Clients(limits)
        self._choosing = Choosing(self._neighbours, self._ledger, self.clients)
        self._lines = Lines(limits)
        self._rates = Rates(self._ledger, self._lines)
        self._switches: dict[int, SwitchState] = {}
        self._up: set[int] = set()
        # Queries are answered one reply each; what else they cause leaves with the next message.
        self.adopting: frozenset[tuple[str, int]] = frozenset()
        self._outbox: deque[ToSwitch] = deque(maxlen=65_536)
        self.failures: deque[tuple[int, str]] = deque(maxlen=4096)
        self._answers = Answers(self.failures.append, limits)
        self._handlers: dict[type, Callable[[Any, float], Iterable[ToSwitch]]] = {
            Query: self._on_query,
            Delete: self._on_delete,
            Stats: self._on_stats,
            Failed: self._answers.failed,
            Refused: self._on_refused,
            Live: self._on_live,
            SwitchUp: self._on_switch_up,
            SwitchDown: self._on_switch_down,
            NeighbourSeen: self._on_neighbour_seen,
            PortDown: self._on_port_down,
        }
        self.configure(configuration, 0.0)

    # -------------------------------------------------------------- in

    def handle(self, message: FromSwitch, now: float) -> list[ToSwitch]:
        """Take one message from the data flow segment (003 FIGURE 22); return what it has to do.

        Raises:
            TypeError: this is no message of the data flow segment (FIGURE 22, block 2260).
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise TypeError(f"expected a message from the data flow segment, got {type(message).__name__}")
        return self._out(handler(message, now), now)

    def tick(self, now: float) -> list[ToSwitch]:
        """Do what it is time for; to be called ten times a second."""
        commands: list[ToSwitch] = [*self._located(self._neighbours.tick(now)),
                                    *self._connections.tick(now, self._up), *self._answers.tick(now, self._up)]
        self.clients.tick(now)
        commands += [self._give_up(one) for one in self._lines.overdue(now)]
        return self._out(commands, now)

    def _out(self, commands: Iterable[ToSwitch], now: float) -> list[ToSwitch]:
        if self._lines.size:
            served: list[Reply | AppReply] = self._lines.serve(lambda one: self._serve(one, now))
            commands = [*commands, *served]
        if not self._outbox:
            return list(commands)
        result = [*self._outbox, *commands]
        self._outbox.clear()
        return result

    # -------------------------------------------------------------- queries

    def query(self, query: Query, now: float, limited: bool = False) -> Reply | None:
        """Answer for a flow that no rule covers (QUERY). The order of the checks: see the module's text.

        None: it waits; its REPLY comes later. Who asks again meanwhile keeps its place.
        ``limited``: whoever asks has kept the limits on new connections.
        """
        number = query.virtual_server
        service = self._services.by_number.get(number)
        if service is None:
            # 003 FIGURE 8: "the port requested was denied" is NOTAVAIL.
            return self._refuse(query, 0, Error.UNKNOWN if number else Error.NOTAVAIL)
        if service.reader is not None:
            return self._refuse(query, number, Error.NOTAVAIL)
        if service.follows:
            known = self._known(service, query, now)
            if known is not None:
                return known
        if service.tcp and query.tcp_flags & _HANDSHAKE != _SYN:
            return self._refuse(query, number, Error.UNKNOWN)
        switch = self._switches.get(query.switch)
        if switch is None or switch.draining or not service.accepts:
            return self._refuse(query, number, Error.NOTAVAIL)
        if not limited and (over := self._rates.refuse(service.virtual_server, query, now)):
            return over
        pool = service.virtual_server.default_pool_id or ""
        if 0 <= service.limit <= self._ledger.virtual_server(number).active:
            return self._stand(service, pool, query, 0, now)
        return self._select(switch, service, pool, query, now)

    def _select(self, switch: SwitchState, service: Service, pool: str, query: Query, now: float,
                told: Told | None = None, said: bytes | None = None, failed: tuple[int, ...] = ()) -> Reply | None:
        groups = switch.groups.get(service.number)
        group = groups.get(pool) if groups is not None else None
        if group is None or group.stale:
            group = self._choosing.fill(switch, query.switch, service, pool)
        if not group.special and not failed:
            if not group.choices:
                return self._refuse(query, service.number, Error.NOTAVAIL)
            assert group.selector is not None
            return self._opened(service, query, group.choices[group.selector.pick(query.signature, query.serial)], now)
        found = self._choosing.choose(group, pool, query, said, now, failed)
        if found is None:
            return self._refuse(query, service.number, Error.NOTAVAIL)
        if isinstance(found, Full):
            if failed:
                return self._refuse(query, service.number, Error.CONNLIMIT)
            return self._stand(service, pool, query, found.member, now, told, said)
        return self._opened(service, query, found, now)

    def _opened(self, service: Service, query: Query, choice: Choice, now: float) -> Reply:
        member, translation, way, counts = choice
        if self._lines.size:
            self._lines.leave(query)
        if service.follows:
            self._connections.open(query, member, service.rules, way, counts, service.idle, now)
        else:
            for count in counts:
                count.opened += 1
        return Reply(query, Error.OK, member, translation, True, service.counts)

    def app_query(self, asked: AppQuery, now: float, limited: bool = False) -> AppReply:
        """Answer for a flow whose client was shaken hands with, and has spoken (APP_QUERY)."""
        query = asked.query
        number = query.virtual_server
        service = self._services.by_number.get(number)
        if service is None or service.reader is None:
            return AppReply(query, self._refuse(query, number if service is not None else 0, Error.UNKNOWN))
        switch = self._switches.get(query.switch)
        if switch is None or switch.draining or not service.accepts:
            return self._turned_away(service, asked, Error.NOTAVAIL)
        if service.follows:
            # Who has just shaken hands has no other connection on this port any more.
            known = self._connections.find(query.switch, query.signature)
            if known is not None:
                self._replace(known)
        no_more = 0 <= service.limit <= self._ledger.virtual_server(number).active
        if no_more and not service.waits:
            return self._turned_away(service, asked, Error.CONNLIMIT)
        if asked.failed:
            self.failures.append((asked.failed[-1], "refused, or no answer"))
        reader = service.reader
        read = reader.timed_out(asked.data) if asked.timed_out else reader.read(asked.data)
        if isinstance(read, More):
            return AppReply(query)
        if not (limited or asked.failed) and (over := self._rates.refuse(service.virtual_server, query, now)):
            return AppReply(query, over)
        if isinstance(read, Answer):
            self._ledger.refuse(number, Refusal.ANSWERED)
            return AppReply(query, Reply(query, Error.NOTAVAIL), answer=read.data)
        if isinstance(read, Reject):
            self._ledger.refuse(number, Refusal.REJECTED)
            return AppReply(query, Reply(query, Error.NOTAVAIL))
        pool = service.names.get(read.pool, "") if read.pool else service.virtual_server.default_pool_id or ""
        keys, said = self.clients.keys(pool), None
        if keys is not None and keys.spoken:
            if missing(keys.persistence, asked.data) and not asked.timed_out:
                return AppReply(query)
            said = keys.said(value(keys.persistence, asked.data))
        told = Told(read.policy, read.key, reader.unavailable(asked.data, service.sorries.get(pool, b"")), read.edit)
        if len(asked.failed) >= self._limits.attempts:
            reply: Reply | None = self._refuse(query, number, Error.NOTAVAIL)
        elif no_more:
            reply = self._stand(service, pool, query, 0, now, told, said)
        else:
            reply = self._select(switch, service, pool, query, now, told, said, asked.failed)
        # Who waits is told that its words have arrived, as if more of them were needed.
        return AppReply(query) if reply is None else self._app_reply(switch, service, reply, told)

    def _app_reply(self, switch: SwitchState, service: Service, reply: Reply, told: Told) -> AppReply:
        query = reply.query
        if reply.error is not Error.OK:
            return AppReply(query, reply, answer=told.unavailable)
        binding = Binding.SPLICE if told.edit is not None else self._binding(service, reply.member)
        switch.note(query.serial, Chosen(told.policy, told.read, binding), self._limits.chosen)
        self._answers.given(query.switch, query.serial, service.number, reply.member)
        return AppReply(query, reply, binding, edit=told.edit)

    def _binding(self, service: Service, number: int) -> Binding:
        """Handoff where the member's host can do it and nobody said otherwise."""
        if service.virtual_server.binding is Wanted.SPLICE or not self.adopting:
            return Binding.SPLICE
        return Binding.HANDOFF if service.endpoints.get(number) in self.adopting else Binding.SPLICE

    def _turned_away(self, service: Service, asked: AppQuery, error: Error) -> AppReply:
        assert service.reader is not None
        sorry = service.sorries.get(service.virtual_server.default_pool_id or "", b"")
        return AppReply(asked.query, self._refuse(asked.query, service.number, error),
                        answer=service.reader.unavailable(asked.data, sorry))

    # -------------------------------------------------------------- who waits

    def _stand(self, service: Service, pool: str, query: Query, member: int, now: float, told: Told | None = None,
               said: bytes | None = None) -> Reply | None:
        """Stand in the pool's line, for one member or (0) any; CONNLIMIT where there is none, or no room in it."""
        farm = service.farms.get(pool)
        waiting = farm.pool.waiting if farm is not None else None
        if waiting is not None and self._lines.stand(waiting, query, pool, said, told, member, now):
            return None
        return self._refuse(query, service.number, Error.CONNLIMIT)

    def _serve(self, waiter: Waiter, now: float) -> Reply | AppReply | None:
        """Try one that waits again; None: it goes on waiting."""
        query = waiter.query
        number = query.virtual_server
        service, switch = self._services.by_number.get(number), self._switches.get(query.switch)
        if service is None or switch is None or switch.draining or not service.accepts or (
                (service.reader is None) != (waiter.told is None)):
            return self._late(waiter, self._refuse(query, number if service is not None else 0, Error.NOTAVAIL))
        if 0 <= service.limit <= self._ledger.virtual_server(number).active:
            return None
        pool = waiter.pool if waiter.told is not None else service.virtual_server.default_pool_id or ""
        reply = self._select(switch, service, pool, query, now, waiter.told, waiter.said)
        return None if reply is None else self._late(waiter, reply)

    def _give_up(self, waiter: Waiter) -> Reply | AppReply:
        number = waiter.query.virtual_server
        return self._late(waiter, self._refuse(waiter.query, number if number in self._services.by_number else 0,
                                               Error.CONNLIMIT))

    def _late(self, waiter: Waiter, reply: Reply) -> Reply | AppReply:
        if waiter.told is None:
            return reply
        service, switch = self._services.by_number.get(reply.query.virtual_server), self._switches.get(
            reply.query.switch)
        if service is None or switch is None:
            return AppReply(reply.query, reply, answer=waiter.told.unavailable)
        return self._app_reply(switch, service, reply, waiter.told)

    # -------------------------------------------------------------- connections that are known

    def _known(self, service: Service, query: Query, now: float) -> Reply | None:
        """The answer for a packet of a connection that exists; None where it opens another one."""
        entry = self._connections.find(query.switch, query.signature)
        if entry is None or entry.virtual_server != service.number:
            return None
        opening = not service.tcp or query.tcp_flags & _HANDSHAKE == _SYN
        if service.tcp and opening and entry.new_session(query.serial, now):
            self._replace(entry)
            return None
        way = entry.way
        assert isinstance(way, Way)  # it has a signature, so it was opened here
        host = self._neighbours.host(query.switch, way.next_hop)
        if host is None:
            if opening:
                self._replace(entry)
                return None
            return self._refuse(query, service.number, Error.NOTAVAIL)
        install = self._connections.reinstall(entry, now)
        # The serial of a flow stays the same for its life, whichever query asks about it.
        return Reply(query._replace(serial=entry.serial), Error.OK, entry.member, way.translation(host), install,
                     service.counts)

    def _replace(self, entry: Any) -> None:
        """Another session takes the 4-tuple: what the old one left in the switch is to go."""
        if entry.rules:
            self._outbox.append(entry.reap(final=True))
        self._connections.remove(entry)

    def _refuse(self, query: Query, number: int, error: Error) -> Reply:
        self._ledger.refuse(number, REFUSALS[error])
        return Reply(query, error)

    # -------------------------------------------------------------- other messages

    def _on_query(self, query: Query, now: float) -> Iterable[ToSwitch]:
        reply = self.query(query, now)
        return () if reply is None else (reply,)

    def _on_delete(self, delete: Delete, now: float) -> Iterable[ToSwitch]:
        followed = self._connections.of(delete.switch)
        endings = Endings()
        # Most are not followed: they are added up first, for few virtual servers and members.
        sums: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
        for closed in delete.closed:
            entry = followed.get(closed.serial)
            if (closed.packets == REFUSED_PACKETS and closed.outbound and closed.counted
                    and closed.reason is Reason.SHUTDOWN and not (entry and entry.rules)):
                self.failures.append((closed.member, "refused"))
            if entry is not None:
                load = entry.counts[1]
                if load.wanted:
                    known = entry.signature is not None  # an older one than this controller was not opened just now
                    endings.add(load, closed, entry.rules, now - entry.opened if known else None)
                self._connections.closed(entry, closed, now)
                continue
            total = sums[closed.virtual_server, closed.member]
            total[0] += 1
            total[1] += closed.packets
            total[2] += closed.bytes
        for (virtual_server, member), total in sums.items():
            self._count_closed(delete.switch, virtual_server, member, *total)
        endings.settle(now)
        self._answers.ended(delete.switch, delete.closed)
        if delete.switch in self._switches:
            self._switches[delete.switch].ended(delete.closed)
        return ()

    def _count_closed(self, switch: int, virtual_server: int, member: int, number: int, packets: int,
                      size: int) -> None:
        service, known = self._services.by_number.get(virtual_server), self._switches.get(switch)
        counts = []
        if service is not None:
            counts.append(self._ledger.virtual_server(virtual_server))
        if member in self._services.members:
            counts.append(self._ledger.member(member))
        if known is not None:
            counts.append(known.counts)
        for count in counts:
            count.packets += packets
            count.bytes += size
            if service is not None and not service.follows:
                count.closed += number  # one that is followed was counted when it left the table

    def _on_stats(self, stats: Stats, now: float) -> Iterable[ToSwitch]:
        self._answers.heard(stats)
        entry = self._connections.get(stats.switch, stats.serial)
        if entry is not None:
            self._connections.stats(entry, stats, stats.error is Error.CONNALIVE, now)
        return ()

    def _on_refused(self, refused: Refused, now: float) -> Iterable[ToSwitch]:
        entry = self._connections.get(refused.switch, refused.serial)
        if entry is not None:
            self._connections.remove(entry)
        number = refused.virtual_server if refused.virtual_server in self._services.by_number else 0
        self._ledger.refuse(number, Refusal.OVERFLOW)
        return ()

    def _on_live(self, live: Live, now: float) -> Iterable[ToSwitch]:
        switch = self._switches.get(live.switch)
        if switch is None:
            return ()
        for serial, number, member in self._connections.live(live, now):
            service = self._services.by_number.get(number)
            if service is None or not service.counts or member not in self._services.members:
                continue
            counts = (self._ledger.virtual_server(number), self._ledger.member(member), switch.counts)
            self._connections.adopt(live.switch, serial, number, member, service.rules, counts, service.idle, now)
        return ()

    def _on_switch_up(self, message: SwitchUp, now: float) -> Iterable[ToSwitch]:
        switch = message.switch
        if switch not in self._switches:
            self._make_room()
            self._switches[switch] = SwitchState(self._ledger.switch(switch),
                                                 switch in self._services.configuration.draining)
        self._up.add(switch)
        for number in self._switches[switch].groups:
            self._switches[switch].stale(number)
        return self._located(self._neighbours.switch_up(switch, message.hosts, now))

    def _make_room(self) -> None:
        """Bound the switches remembered: the first one that is not connected is forgotten."""
        while len(self._switches) >= self._limits.switches:
            away = next((switch for switch in self._switches if switch not in self._up), None)
            if away is None:
                return  # all of them are connected: what carries messages bounds those
            self._connections.forget_switch(away)
            self._neighbours.forget_switch(away)
            self._ledger.forget(switches=(away,))
            del self._switches[away]

    def _on_switch_down(self, message: SwitchDown, now: float) -> Iterable[ToSwitch]:
        self._up.discard(message.switch)
        self._lines.forget(message.switch)
        self._neighbours.switch_down(message.switch)
        return ()

    def _on_neighbour_seen(self, message: NeighbourSeen, now: float) -> Iterable[ToSwitch]:
        return self._located(self._neighbours.seen(message.switch, message.address, message.host, now))

    def _on_port_down(self, message: PortDown, now: float) -> Iterable[ToSwitch]:
        return self._located(self._neighbours.port_down(message.switch, message.port, now))

    def _located(self, commands: list[Probe | HostChanged]) -> list[Probe | HostChanged]:
        """Note which groups a change of a next hop touches."""
        for command in commands:
            if type(command) is HostChanged:
                for number in self._services.users(command.address):
                    self._switches[command.switch].stale(number)
        return commands

    # -------------------------------------------------------------- configuration

    def configure(self, configuration: Configuration, now: float) -> list[ToSwitch]:
        """Replace the configuration. What did not change keeps its state, counters and connections.

        Connections survive every change, but for those of a virtual server or member that is
        removed, or of a switch whose time to drain is over: their rules are to go (a final Reap).

        Raises:
            ValueError: a virtual server or member has no number, or one twice; nothing changed.
        """
        change = self._services.update(configuration)
        self.clients.configure(configuration.pools)
        self._lines.keep(configuration.pools)
        self._answers.configure(configuration.pools)
        commands: list[ToSwitch] = []
        removed = set(change.removed)
        drained = configuration.drained
        if (removed or change.gone_members or change.uncounted or drained) and len(self._connections):
            commands += self._cut(removed, change.gone_members, change.uncounted, drained)
        self._ledger.forget(removed, change.gone_members)
        self._rates.forget(removed)
        draining = configuration.draining
        for dpid, switch in self._switches.items():
            switch.draining = dpid in draining
            for number in removed:
                switch.groups.pop(number, None)
            for number in change.changed:
                switch.stale(number)
        commands += self._located(self._neighbours.configure(change.wanted, change.unwanted, now))
        return self._out(commands, now)

    def _cut(self, virtual_servers: set[int], members: set[int], uncounted: set[int],
             switches: frozenset[int]) -> list[Reap]:
        gone = self._connections.take(
            lambda entry: entry.virtual_server in virtual_servers or entry.member in members or entry.switch in switches
            or (not entry.rules and entry.virtual_server in uncounted))
        return [entry.reap(final=True) for entry in gone if entry.rules]

    # -------------------------------------------------------------- views

    def want(self, switch: int, address: str, now: float) -> list[ToSwitch]:
        """Look up a host of our networks that is no member, so as to route to it."""
        return self._out(self._located(self._neighbours.want(switch, address, now)), now)

    def host(self, switch: int, address: str) -> Host | None:
        """Where an address is, seen from a switch; None where that is not known."""
        return self._neighbours.host(switch, address)

    def hosts(self, switch: int) -> Mapping[str, Host]:
        """A read-only, live view of the neighbours a switch sees."""
        return self._neighbours.hosts(switch)

    def users(self, address: str) -> tuple[int, ...]:
        """The numbers of the virtual servers that reach members by way of an address."""
        return tuple(self._services.users(address))

    def eligible(self, switch: int, virtual_server: VirtualServer, pool: Pool | None) -> tuple[Member, ...]:
        """The members, in the pool's order, that take new connections and can be reached from a switch.

        The virtual server's own state (disabled, maintenance) is not considered.
        """
        return self._choosing.eligible(self._services, switch, virtual_server, pool)

    def connections(self) -> Iterator[Connection]:
        """Copies of the connections that are known, by switch, oldest first."""
        return iter(self._connections)

    @property
    def counting(self) -> bool:
        """Whether any virtual server's connections are counted from snapshots of conntrack (Live)."""
        return bool(self._services.counting)

    def follows(self, virtual_server: int) -> bool:
        """Whether the connections of a virtual server (its number) are known one by one."""
        service = self._services.by_number.get(virtual_server)
        return service is not None and service.follows

    def virtual_server_of(self, switch: int, serial: int) -> int:
        """The number of the virtual server of a connection that is known; else 0."""
        entry = self._connections.get(switch, serial)
        return entry.virtual_server if entry is not None else 0

    def chosen(self, switch: int, serial: int) -> Chosen | None:
        """Why a connection whose client was read went where it went; None where that is not known (any more)."""
        known = self._switches.get(switch)
        return known.chosen.get(serial) if known is not None else None

    def line(self, pool: str, now: float) -> LineView:
        """Who waits for members of a pool (its id)."""
        return self._lines.view(pool, now)

    def active(self, member: int) -> int:
        """The connections of a member, among those that are known."""
        return self.member_counters(member).active

    def response_times(self, pairs: Iterable[tuple[int, float]], now: float) -> None:
        """How many seconds members (by number) took to answer a check; who is not configured is passed over."""
        for number, seconds in pairs:
            if number in self._services.members and 0 <= seconds < float("inf"):
                self._ledger.member(number).observed(seconds, now, checked=True)

    def virtual_server_counters(self, number: int) -> Counters:
        """The counters of one virtual server."""
        return (self._ledger.virtual_servers.get(number) or Counts()).copy()

    def member_counters(self, number: int) -> Counters:
        """The counters of one member."""
        return (self._ledger.members.get(number) or Counts()).copy()

    def statistics(self) -> Statistics:
        """All counters as they are now."""
        return self._ledger.copy(len(self._connections), self._connections.overflowed, self._connections.unanswered)
