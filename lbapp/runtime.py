# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the REST API shows of the running controller: statuses, switches, connections, counters.

Reads the control segment, the switches' sessions and the readings; changes nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lbapp import remembering
from lbapp.api.views import (
    CheckStatistics,
    ConnectionView,
    DrainingView,
    EventView,
    FastPathStatistics,
    HealthView,
    HostView,
    Lease,
    MemberStatistics,
    MonitorView,
    PersistenceView,
    RelayStatistics,
    ReportAnswer,
    ReportView,
    ServerAgentView,
    StatisticsView,
    SwitchStatistics,
    SwitchView,
    VirtualServerStatistics,
)
from lbapp.config.model import Application, Binding, Configuration, Member, Pool, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.engine import Chosen
from lbapp.control.statistics import Refusal
from lbapp.dataflow.agent import HELD
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.matches import address_text
from lbapp.dataflow.ovs import OvsError
from lbapp.fastpaths import Link, Reading
from lbapp.finishing import Finishing
from lbapp.handoffs import LEASE_SECONDS
from lbapp.health import HealthService
from lbapp.readings import Readings
from lbapp.remembering import endpoint
from lbapp.reports import Heard, Reports
from lbapp.server_agent.report import Told

LOG = logging.getLogger("lbapp.runtime")

FEATURES = ("bundles", "conntrack", "groups")
MOST_FAST = 20_000
"""Connections of a fast path in one list: it may hold a million."""
HANDSHAKES = ("greeted", "greeted_ack", "cookie_bad", "reset_sent", "asked_data", "asked_member", "ask_lost",
              "splice_wait", "given", "proxy_stray", "proxy_dropped", "proxy_member_failed", "proxy_unanswered")
"""What a fast path and its agent count of handshakes that are proxied."""
DROPS = ("shot", "closed_lost", "malformed", "waiting_dropped", "unanswered", "refused", "query_unknown_port",
         "reply_unknown_port")
"""Counters of a fast path and its agent that tell of something lost, or refused."""
PROTOCOLS = {6: "TCP", 17: "UDP"}


def _named(reading: Reading, names: Iterable[str]) -> dict[str, int]:
    return {name: reading.counters[name] for name in names if name in reading.counters}


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _share(messages: int, opened: int) -> float | None:
    return round(messages / opened, 4) if opened else None


def _report_view(heard: Heard, now: float) -> ReportView:
    return ReportView(
        age_seconds=round(now - heard.at, 1), sequence=heard.told.sequence,
        servers=[endpoint(address, port) if port else address for address, port in heard.told.endpoints],
        values={name: value for name, value in heard.told.values.items() if math.isfinite(value)},
        flags=list(heard.flags), signed=heard.signed, refused=heard.refused)


class ControllerRuntime:
    """See :class:`lbapp.api.views.Runtime`.

    Args:
        application: the Ryu application.
        readings: what is read from the switches on demand.
        health: what is known of the members.
    """

    def __init__(self, application: Any, readings: Readings, health: HealthService) -> None:
        self._application = application
        self._health = health
        self._readings = readings
        self._finishing = Finishing(application, readings, health)
        self._started = time.monotonic()
        self._routes: tuple[Configuration | None, Routes] = (None, Routes())
        self._hops: dict[str, set[str]] = {}

    # -------------------------------------------------------------- statuses

    def virtual_server_status(self, vs: VirtualServer) -> tuple[str, str]:
        """Provisioning: whether every connected switch has it. Operating: whether a client would get a member."""
        pool = self._configuration.pool_of(vs)
        switches = self._application.switches
        states = [self._provisioning(switch, vs) for switch in switches.values()]
        provisioning = next((s for s in ("ERROR", "PENDING_UPDATE") if s in states), "ACTIVE")
        if not vs.admin_state_up:
            return provisioning, "DISABLED"
        hops = {vs.next_hop} if vs.next_hop is not None else set()
        if vs.maintenance or (switches and self._configuration.draining.issuperset(switches)):
            return provisioning, "OFFLINE"
        if vs.application is not Application.L4:
            return provisioning, self._application_status(vs, hops)
        return provisioning, "OFFLINE" if pool is None else self._pool_status(pool, hops)

    def _application_status(self, vs: VirtualServer, hops: set[str]) -> str:
        """Where what clients say decides: by all pools it may decide for."""
        if not any(self._serves(switch.id, vs) for switch in self._application.switches.values()):
            return "OFFLINE"
        states = {self._pool_status(pool, hops) for pool in self._configuration.pools_of(vs).values()}
        if states == {"ONLINE"}:
            return "ONLINE"
        return "DEGRADED" if states & {"ONLINE", "DEGRADED"} else "OFFLINE"

    def _serves(self, switch: int, server: VirtualServer) -> bool:
        """Whether a fast path or what relays has the connections of a virtual server on a switch."""
        application = self._application
        return any(paths.serves(switch, server.number) for paths in (application.fastpaths, application.relays))

    def pool_status(self, pool: Pool) -> tuple[str, str]:
        """DEGRADED: some of the members that should take connections cannot be reached."""
        return "ACTIVE", self._pool_status(pool, self._next_hops(pool))

    def _pool_status(self, pool: Pool, hops: set[str]) -> str:
        if not pool.admin_state_up:
            return "DISABLED"
        wanted = [member for member in pool.members if member.takes_new]
        online = sum(self._usable(member, hops) for member in wanted)
        if not online:
            return "OFFLINE"
        return "ONLINE" if online == len(wanted) else "DEGRADED"

    def member_status(self, pool: Pool, member: Member) -> tuple[str, str]:
        """ONLINE and OFFLINE say whether the member answers on its network."""
        if not member.admin_state_up:
            return "ACTIVE", "DISABLED"
        if member.draining or not member.weight:
            return "ACTIVE", "DRAINING"
        return "ACTIVE", "ONLINE" if self._usable(member, self._next_hops(pool)) else "OFFLINE"

    def member_health(self, member: Member) -> HealthView | None:
        """What is known of a member's health."""
        report = self._health.report(member)
        if report is None:
            return None
        return HealthView(
            state=report.state.value, reason=report.reason, share=report.share,
            since=None if report.since is None else _utc(self._health.wall(report.since)),
            monitors={name: MonitorView(state=state.value, reason=why)
                      for name, (state, why) in report.monitors.items()})

    def effective_weight(self, pool: Pool, member: Member) -> int:
        """The weight that counts now; 0 while it takes no new connections."""
        here = self._configuration.pools.get(pool.id, pool)
        return next((one.weight for one in here.members if one.number == member.number and one.takes_new), 0)

    def events(self, after: int) -> Iterator[EventView]:
        """What happened after an event's number."""
        for event in self._health.since(after):
            yield EventView(number=event.number, at=_utc(self._health.wall(event.at)), kind=event.kind.value,
                            pool=event.pool, member=event.member, text=event.text)

    def persistence(self, wanted: Mapping[str, str]) -> Iterator[PersistenceView]:
        """Clients that are known again."""
        return remembering.clients(self._application.control, self._health.wanted, wanted, time.monotonic())

    def forget(self, wanted: Mapping[str, str]) -> int | None:
        """Forget some of them."""
        return remembering.forget(self._application.control, self._health.wanted, wanted)

    def draining(self) -> list[DrainingView]:
        """Every member and switch that is draining."""
        return self._finishing.views()

    def _compiled(self) -> Routes:
        """The configuration's routes, and the next hops of its pools' virtual servers, made once for each."""
        configuration = self._configuration
        if self._routes[0] is not configuration:
            self._routes = configuration, Routes(configuration.networks.values())
            self._hops = {}
            for server in configuration.virtual_servers.values():
                if server.next_hop is not None and server.default_pool_id is not None:
                    self._hops.setdefault(server.default_pool_id, set()).add(server.next_hop)
        return self._routes[1]

    def _next_hops(self, pool: Pool) -> set[str]:
        """The next hops of the virtual servers that use a pool and have one of their own."""
        self._compiled()
        return self._hops.get(pool.id, set())

    def _usable(self, member: Member, hops: set[str]) -> bool:
        return not self._health.down(member) and self._reachable(member, hops)

    def _reachable(self, member: Member, hops: set[str]) -> bool:
        """Whether some switch knows a way: by one of these next hops, or where there are none, by its address."""
        ways = hops or {self._compiled().towards(member.address)}
        return any(self._application.control.host(switch, hop) is not None
                   for switch in self._application.switches for hop in ways)

    def _provisioning(self, switch: Any, vs: VirtualServer) -> str:
        if switch.session.needs_repair:
            return "ERROR"
        there, wanted = switch.session.synchronised, self._application.in_force(switch.id)
        if there is None or there.virtual_servers.get(vs.id) is not wanted.virtual_servers.get(vs.id):
            return "PENDING_UPDATE"
        return "ACTIVE" if there.pool_of(vs) is wanted.pool_of(vs) else "PENDING_UPDATE"

    # -------------------------------------------------------------- switches

    def switches(self) -> list[SwitchView]:
        """The connected switches, and those that something is asked of."""
        self._readings.count()
        now = time.monotonic()
        return self._finishing.described(SwitchView(
            dpid=f"{switch.id:016x}", address=endpoint(*switch.datapath.address[:2]), connected=True,
            connected_seconds=round(now - switch.connected, 1), flows=switch.session.counters.rules,
            groups=switch.session.group_count, features=FEATURES,
            hosts={address: HostView(mac=host.mac.hex(":"), port=host.port)
                   for address, host in dict(self._application.control.hosts(switch.id)).items()},
        ) for switch in list(self._application.switches.values()))

    # -------------------------------------------------------------- connections

    def connections(self) -> Iterator[ConnectionView]:
        """From conntrack where the switch is on this host; rule pairs from the control segment."""
        configuration = self._configuration
        servers = {server.number: server for server in configuration.virtual_servers.values()}
        members = {member.number: member for pool in configuration.pools.values() for member in pool.members}
        for switch in list(self._application.switches):
            application = self._application
            for paths, state in ((application.fastpaths, "FAST"), (application.relays, "RELAYED")):
                yield from self._fast(paths.link(switch), switch, state, servers, members)
            try:
                if self._readings.is_local(switch):
                    yield from self._conntrack(switch, servers, members)
            except OvsError as error:
                LOG.warning("switch %016x: its connections cannot be listed: %s", switch, error)
        yield from self._followed(servers, members)

    def _fast(self, link: Link | None, switch: int, state: str, servers: dict[int, VirtualServer],
              members: dict[int, Member]) -> Iterator[ConnectionView]:
        for held in link.connections(MOST_FAST) if link is not None else ():
            server, member = servers.get(held.virtual_server), members.get(held.member)
            if server is None or member is None:
                continue
            signature = held.signature
            chosen = self._application.control.chosen(switch, held.serial)
            client = endpoint(address_text(signature.source), signature.source_port)
            yield ConnectionView(
                id=f"{held.serial:08x}" if held.serial else hashlib.blake2b(
                    repr((switch, signature)).encode(), digest_size=8).hexdigest(),
                switch=f"{switch:016x}", virtual_server=server.name,
                member=member.endpoint, protocol=PROTOCOLS[signature.protocol],
                client=client, destination=endpoint(address_text(signature.destination), signature.destination_port),
                state=state, idle_seconds=round(held.idle, 3), age_seconds=round(held.age, 3), packets=held.packets,
                bytes=held.bytes, decided_by="switch" if held.decided else "controller",
                policy=chosen.policy if chosen is not None else None, key=chosen.key if chosen is not None else None,
                binding=self._binding(server, state, chosen))

    @staticmethod
    def _binding(server: VirtualServer, state: str, chosen: Chosen | None) -> str | None:
        if state == "RELAYED" or (chosen is not None and server.binding is Binding.HYBRID):
            return "relay" if state == "RELAYED" else "hybrid"
        return chosen.binding.value if chosen is not None else None

    def _conntrack(self, switch: int, servers: dict[int, VirtualServer],
                   members: dict[int, Member]) -> Iterator[ConnectionView]:
        for entry in self._readings.conntrack(switch):
            server, member = servers.get(entry.virtual_server), members.get(entry.member)
            if server is None or member is None:
                continue
            source, destination, source_port, destination_port = entry.original
            yield ConnectionView(
                id=f"{entry.serial:08x}" if entry.serial else hashlib.blake2b(
                    repr((switch, entry.protocol, entry.original)).encode(), digest_size=8).hexdigest(),
                switch=f"{switch:016x}", virtual_server=server.name,
                member=member.endpoint, protocol=entry.protocol.upper(),
                client=endpoint(source, source_port), destination=endpoint(destination, destination_port),
                state=entry.state or "ACTIVE", decided_by="controller" if entry.serial else "switch")

    def _followed(self, servers: dict[int, VirtualServer], members: dict[int, Member]) -> Iterator[ConnectionView]:
        now = time.monotonic()
        for connection in list(self._application.control.connections()):
            server, member = servers.get(connection.virtual_server), members.get(connection.member)
            if server is None or member is None or connection.signature is None:
                continue
            if server.state is not State.RULES and (self._readings.is_local(connection.switch)
                                                    or connection.switch in self._application.fastpaths):
                continue  # conntrack or the fast path told of it
            signature = connection.signature
            yield ConnectionView(
                id=f"{connection.serial:08x}", switch=f"{connection.switch:016x}", virtual_server=server.name,
                member=member.endpoint, protocol=PROTOCOLS[signature.protocol],
                client=endpoint(address_text(signature.source), signature.source_port),
                destination=endpoint(address_text(signature.destination), signature.destination_port),
                state="ACTIVE", age_seconds=round(now - connection.opened, 3), packets=connection.packets,
                bytes=connection.bytes)

    # -------------------------------------------------------------- counters

    def statistics(self) -> StatisticsView:
        """Counters of the control segment, and those that the switches' own rules keep."""
        self._readings.count()
        counted = self._application.control.statistics()
        switches = list(self._application.switches.values())
        bound: Counter[tuple[int, int]] = Counter()
        messages: Counter[int] = Counter()
        forwarded: dict[int, list[int]] = {}
        alive: Counter[int] = Counter()
        unfollowed: Counter[int] = Counter()
        openings: dict[int, int] = {}
        readings: dict[int, Reading | None] = {}
        relayed: dict[int, Reading | None] = {}
        for switch in switches:
            bound.update(switch.session.counters.bound)
            messages.update(switch.punts)
            messages.update(self._application.fastpaths.asked_by(switch.id))
            followed = counted.switches.get(switch.id)
            openings[switch.id] = sum(switch.session.counters.bound.values()) + (followed.opened if followed else 0)
            reading = readings[switch.id] = self._application.fastpaths.read(switch.id)
            relay = relayed[switch.id] = self._application.relays.read(switch.id)
            for held in (reading, relay):
                for (server_number, member_number), traffic in held.members.items() if held is not None else ():
                    alive[server_number] += traffic.opened - traffic.closed
                    if not self._application.control.follows(server_number):
                        unfollowed[member_number] += traffic.opened - traffic.closed
            for key, traffic in reading.members.items() if reading is not None else ():
                if self._application.fastpaths.decides(switch.id, key[0]):  # others the control segment has counted
                    opened = traffic.opened - reading.before.get(key, 0)
                    bound[key] += opened
                    openings[switch.id] += opened
            for number, (packets, size) in switch.session.counters.forwarded.items():
                totals = forwarded.setdefault(number, [0, 0])
                totals[0] += packets
                totals[1] += size
        by_server: Counter[int] = Counter()
        by_member: Counter[int] = Counter()
        for (server_number, member_number), opened in bound.items():
            by_server[server_number] += opened
            by_member[member_number] += opened
        refused: dict[int, Counter[str]] = {}
        for (number, why), times in counted.refused.items():
            refused.setdefault(number, Counter())[why.name] += times
        for reading in readings.values():
            for number, beyond in reading.refused.items() if reading is not None else ():
                for why, times in zip((Refusal.RATE, Refusal.CLIENT_RATE), beyond, strict=True):
                    if times:
                        refused.setdefault(number, Counter())[why.name] += times
        servers = {key: self._of_server(server, by_server, messages, refused, alive)
                   for key, server in self._configuration.virtual_servers.items()}
        untold = self._pools_of({key for key, server in servers.items() if server.active is None})
        return StatisticsView(
            uptime_seconds=round(time.monotonic() - self._started, 1),
            virtual_servers=list(servers.values()),
            members=[self._of_member(pool, member, by_member, forwarded,
                                     None if pool.id in untold else unfollowed[member.number])
                     for pool in self._configuration.pools.values() for member in pool.members],
            switches=[self._of_switch(switch, readings[switch.id], relayed[switch.id], openings[switch.id])
                      for switch in switches],
            pools=remembering.pools(self._application.control, self._configuration, time.monotonic()),
            monitors=[CheckStatistics(
                addresses=list(addresses), targets=said.targets, checks=said.checks, late=said.late,
                running=said.running, cpu_seconds=round(said.cpu_seconds, 3))
                for addresses, said in self._health.checks()])

    def _of_server(self, server: VirtualServer, bound: Counter[int], messages: Counter[int],
                   refused: Mapping[int, Mapping[str, int]], alive: Counter[int]) -> VirtualServerStatistics:
        counters = self._application.control.virtual_server_counters(server.number)
        opened = counters.opened + bound[server.number]
        return VirtualServerStatistics(
            id=server.id, name=server.name, opened=opened, closed=counters.closed,
            active=self._active(server, counters.active, alive[server.number]),
            refused=dict(refused.get(server.number, {})),
            packets=counters.packets if server.state is State.RULES or counters.closed else None,
            bytes=counters.bytes if server.state is State.RULES or counters.closed else None,
            messages_to_controller=messages[server.number],
            messages_per_connection=round(messages[server.number] / opened, 4) if opened else None)

    def _active(self, server: VirtualServer, followed: int, alive: int) -> int | None:
        """Connections now: known where they are followed, or where fast paths hold all of them."""
        if self._application.control.follows(server.number):
            return followed
        switches = self._application.switches
        held = switches and all(self._serves(switch, server) for switch in switches)
        return max(0, alive) if held else None

    def _pools_of(self, servers: set[str]) -> set[str]:
        """The pools that these virtual servers reach, by id: those in force, and those that an operator asked for."""
        return {key for configuration in (self._configuration, self._health.wanted) for one in servers
                if (server := configuration.virtual_servers.get(one)) is not None
                for key in configuration.pools_reached(server)}

    def _of_member(self, pool: Pool, member: Member, bound: Counter[int], forwarded: dict[int, list[int]],
                   unfollowed: int | None) -> MemberStatistics:
        """``unfollowed``: connections besides those that the control segment follows; None: not known."""
        counters = self._application.control.member_counters(member.number)
        packets, size = forwarded.get(member.number, (0, 0))
        now, known = time.monotonic(), counters.estimates
        lately = known.lately_by(now)
        return MemberStatistics(
            id=member.id, pool=pool.name, member=member.endpoint,
            opened=counters.opened + bound[member.number], closed=counters.closed,
            active=None if unfollowed is None else counters.active + max(0, unfollowed),
            packets=counters.packets + packets, bytes=counters.bytes + size,
            response_seconds=None if known.response is None else round(known.response, 6),
            response_by=None if known.response is None else "monitors" if known.checked else "connections",
            response_age_seconds=None if known.response is None else round(max(0.0, now - known.response_at), 1),
            bytes_lately=None if lately is None else round(lately),
            bytes_lately_age_seconds=None if lately is None else round(max(0.0, now - known.lately_at), 1))

    @staticmethod
    def _of_relay(reading: Reading | None) -> RelayStatistics | None:
        if reading is None or not any(reading.counters.values()):
            return None
        return RelayStatistics(connections=reading.connections or 0, packets=reading.counters["hits"],
                               handshakes=_named(reading, HANDSHAKES),
                               handshakes_held=reading.counters.get(HELD, 0), drops=_named(reading, DROPS))

    def _of_switch(self, switch: Any, reading: Reading | None, relay: Reading | None,
                   opened: int) -> SwitchStatistics:
        counters = switch.counters
        told = Counter(self._application.fastpaths.messages(switch.id))
        punts = sum(switch.punts.values())
        return SwitchStatistics(
            dpid=f"{switch.id:016x}", packet_ins=counters["packet_ins"], packet_outs=counters["packet_outs"],
            flow_mods=counters["flow_mods"] + switch.session.flow_mods, flows_removed=counters["flow_removeds"],
            queries_dropped=self._readings.queue_drops(switch.id), table_full=counters["table_full"],
            conntrack_full=counters["conntrack_full"], reconnects=self._application.reconnects[switch.id],
            messages_per_connection=_share(punts + told["queries"] + told["deletes"], opened),
            messages_per_connection_bundled=_share(
                punts + told["query_messages"] + told["delete_messages"], opened),
            relay=self._of_relay(relay), fastpath=None if reading is None else FastPathStatistics(
                connections=reading.connections, hits=reading.counters.get("hits", 0),
                misses={name.removeprefix("miss_"): count for name, count in reading.counters.items()
                        if name.startswith("miss_")},
                handshakes=_named(reading, HANDSHAKES), handshakes_held=reading.counters.get(HELD, 0),
                drops=_named(reading, DROPS),
                **{name: told[name] for name in ("queries", "query_messages", "deletes", "delete_messages")}))

    # -------------------------------------------------------------- agents beside servers

    def server_agents(self) -> list[ServerAgentView]:
        """Agents beside servers."""
        now = time.monotonic()
        announced = self._application.handoffs.agents()
        heard = self._application.reports.agents(now)
        return [ServerAgentView(
            name=name,
            listeners=sorted(endpoint(*one) for one in announced[name].listeners) if name in announced else [],
            expires_in=round(max(announced[name].until - now, 0.0), 1) if name in announced else None,
            report=_report_view(heard[name], now) if name in heard else None)
            for name in announced.keys() | heard.keys()]

    def report(self, name: str, told: Told, signature: bytes | None) -> ReportAnswer:
        """An agent beside servers says how loaded they are."""
        reports: Reports = self._application.reports
        flags = reports.take(name, told, signature, time.monotonic(), time.time())
        return ReportAnswer(flags=list(flags), interval=round(reports.interval(), 3))

    def announce(self, name: str, listeners: list[tuple[str, int]]) -> Lease | None:
        """An agent beside servers says what it adopts connections for."""
        if not self._application.handoffs.announce(name, listeners, time.monotonic()):
            return None
        one, two = (None if key is None else key.hex() for key in self._application.fastpaths.cookies.keys)
        return Lease(cookie_keys=(one, two), window_scale=Greeting().window_scale, lease_seconds=LEASE_SECONDS)

    def withdraw(self, name: str) -> bool:
        """Such an agent ends."""
        adopted, reported = self._application.handoffs.withdraw(name), self._application.reports.withdraw(name)
        return bool(adopted or reported)

    @property
    def _configuration(self) -> Configuration:
        configuration: Configuration = self._application.configuration
        return configuration
