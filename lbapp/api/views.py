# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the REST API shows of the running controller, and the protocol it asks for it.

Values only. Resources themselves are the model's; these are live facts. A figure that is not
known is null, never a made-up 0.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Annotated, Protocol

import msgspec

from lbapp.config.model import Member, Pool, VirtualServer
from lbapp.server_agent.report import Told


class ProvisioningStatus(enum.Enum):
    """Whether the switches have what is configured (Octavia's words)."""

    ACTIVE = "ACTIVE"
    PENDING_UPDATE = "PENDING_UPDATE"
    ERROR = "ERROR"


class OperatingStatus(enum.Enum):
    """Whether it works (Octavia's words, and DISABLED for what is administratively down)."""

    ONLINE = "ONLINE"
    OFFLINE = "OFFLINE"
    DRAINING = "DRAINING"
    DEGRADED = "DEGRADED"
    NO_MONITOR = "NO_MONITOR"
    DISABLED = "DISABLED"


Dpid = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$", description="datapath id, 16 hexadecimal digits")]
Count = Annotated[int, msgspec.Meta(ge=0)]


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """Where a neighbour is, seen from a switch."""

    mac: str
    port: int


class SwitchView(msgspec.Struct, frozen=True, kw_only=True):
    """A switch that is connected, or that something is asked of.

    Attributes:
        dpid: datapath id, 16 hexadecimal digits.
        address: the far end of its OpenFlow connection, ``ip:port``; empty while there is none.
        connected: now.
        connected_seconds: since when; 0 while it is not connected.
        flows: rules of the balancer on it.
        groups: groups of the balancer on it.
        hosts: neighbours it knows, by address.
        role: the controller's OpenFlow role there (``equal``, ``master``, ``slave``).
        features: what it can do that matters here, such as ``conntrack``, ``groups``, ``bundles``.
        draining: no new connections through it.
        drain_timeout: seconds after which what is left is reset; 0: never.
        connections: those that are left while it is draining; else, and where that cannot be known, null.
        ended: its time to drain is over.
    """

    dpid: Dpid
    address: str
    connected: bool
    connected_seconds: float = 0.0
    flows: Count = 0
    groups: Count = 0
    hosts: dict[str, HostView] = {}
    role: str = "equal"
    features: tuple[str, ...] = ()
    draining: bool = False
    drain_timeout: Count = 0
    connections: Count | None = None
    ended: bool = False


class ConnectionView(msgspec.Struct, frozen=True, kw_only=True):
    """A connection of a client.

    Attributes:
        id: its serial, hexadecimal; unique.
        switch: the switch that holds its state (dpid).
        virtual_server: name.
        member: ``address:port`` (an IPv6 address in brackets).
        protocol: ``TCP`` or ``UDP``.
        client: the client's ``ip:port``.
        destination: what the client addressed, ``ip:port``.
        state: conntrack's word for it, such as ``ESTABLISHED``; ``ACTIVE`` for a rule pair,
            ``FAST`` for one in the fast path.
        idle_seconds, age_seconds: null where the switch does not tell.
        packets, bytes: both directions; null where the switch does not count them.
        decided_by: ``switch`` or ``controller``.
        policy: where what the client said decided, the L7 policy that matched; empty: none did.
        key: what was read of it, such as ``GET shop.example/img/a.png`` or ``sni shop.example``.
        binding: how its member has the connection: ``splice``, ``handoff``, ``hybrid`` or ``relay``.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]+$")]
    switch: Dpid
    virtual_server: str
    member: str
    protocol: str
    client: str
    destination: str
    state: str
    idle_seconds: float | None = None
    age_seconds: float | None = None
    packets: Count | None = None
    bytes: Count | None = None
    decided_by: str = "controller"
    policy: str | None = None
    key: str | None = None
    binding: str | None = None


class VirtualServerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a virtual server since the controller started.

    Attributes:
        active: connections now; null where the switch decides and has not been asked yet.
        refused: by reason, such as ``NOTAVAIL``, ``CONNLIMIT``, ``UNKNOWN``, ``RATE``, ``CLIENT_RATE``.
        messages_to_controller: OpenFlow messages that its connections caused.
        messages_per_connection: the same by ``opened``; null before the first connection.
    """

    id: str
    name: str
    opened: Count = 0
    closed: Count = 0
    active: Count | None = 0
    refused: dict[str, int] = {}
    packets: Count | None = None
    bytes: Count | None = None
    messages_to_controller: Count = 0
    messages_per_connection: float | None = None


class MemberStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a member since the controller started, and what the algorithms that measure know of it.

    Attributes:
        pool, member: a name, ``address:port``.
        active: connections now; null where the switch decides and does not tell.
        response_seconds: how long it takes to respond, as estimated last; null while nothing is known.
        response_by: of what that was made, ``monitors`` or ``connections``.
        response_age_seconds: how long ago.
        bytes_lately: of connections that ended, each counting less by a factor of e every 10 s; null where nothing
            was counted, which is also so while no algorithm asks for it.
        bytes_lately_age_seconds: how long ago the last of them was told of.
    """

    id: str
    pool: str
    member: str
    opened: Count = 0
    closed: Count = 0
    active: Count | None = 0
    packets: Count | None = None
    bytes: Count | None = None
    response_seconds: float | None = None
    response_by: str | None = None
    response_age_seconds: float | None = None
    bytes_lately: Count | None = None
    bytes_lately_age_seconds: float | None = None


class FastPathStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a switch's fast path and of the messages of its agent.

    Attributes:
        connections: those it holds now; null until an agent that is a process of its own has told.
        hits: packets that it translated itself.
        misses: packets that it left to Open vSwitch, by reason.
        handshakes: of virtual servers that read what clients say: SYNs answered with a cookie, and what came of them.
        handshakes_held: how many of these are held now: the client has spoken, and no member has the connection yet.
        drops: what found no room or no answer, by reason.
        queries, deletes: first packets asked about, closed connections told of, one by one (unbundled).
        query_messages, delete_messages: the messages that carried them (bundled).
    """

    connections: Count | None = 0
    hits: Count = 0
    misses: dict[str, int] = {}
    handshakes: dict[str, int] = {}
    handshakes_held: Count = 0
    drops: dict[str, int] = {}
    queries: Count = 0
    query_messages: Count = 0
    deletes: Count = 0
    delete_messages: Count = 0


class RelayStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of connections that go through the controller: with binding ``relay``; ``hybrid``, until they are handed
    over.

    Attributes:
        connections: those that it holds now.
        packets: those that it translated.
        handshakes, handshakes_held: as a fast path's.
        drops: what found no room or no answer, by reason.
    """

    connections: Count = 0
    packets: Count = 0
    handshakes: dict[str, int] = {}
    handshakes_held: Count = 0
    drops: dict[str, int] = {}


class SwitchStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the controller's side of a switch.

    Attributes:
        packet_ins, packet_outs, flow_mods, flows_removed: OpenFlow messages.
        queries_dropped: first packets not answered because the controller's queue was full.
        table_full: rules that the switch had no room for.
        conntrack_full: connections that its conntrack had no room for; null where it does not tell.
        reconnects: times it came back.
        messages_per_connection: messages to the control segment, each QUERY and DELETE counted, by connections
            opened; null before the first.
        messages_per_connection_bundled: the same as they travel, many in one message.
        fastpath: null where it has none.
        relay: null where nothing was relayed so far.
    """

    dpid: Dpid
    packet_ins: Count = 0
    packet_outs: Count = 0
    flow_mods: Count = 0
    flows_removed: Count = 0
    queries_dropped: Count = 0
    table_full: Count = 0
    conntrack_full: Count | None = None
    reconnects: Count = 0
    messages_per_connection: float | None = None
    messages_per_connection_bundled: float | None = None
    fastpath: FastPathStatistics | None = None
    relay: RelayStatistics | None = None


class WaitingView(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that stands in line."""

    position: Annotated[int, msgspec.Meta(ge=1)]
    virtual_server: str
    client: str
    seconds: float


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of a pool that remembers clients, or in whose line connections wait.

    Attributes:
        clients: known again; null without ``persistence``.
        waiting: connections that stand in line now.
        longest_seconds: for how long the first of them has.
        waited: connections that have stood in line, those that still do included.
        timed_out: of those, how many were refused because nobody had room in time.
        refused_full: connections that were refused because the line was full.
        line: the first twenty that stand there.
    """

    id: str
    name: str
    clients: Count | None = None
    waiting: Count = 0
    longest_seconds: float = 0.0
    waited: Count = 0
    timed_out: Count = 0
    refused_full: Count = 0
    line: list[WaitingView] = []


class CheckStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process that checks members, since it was started.

    Attributes:
        addresses: those it checks from; none: the controller's own.
        targets: members by monitors, now.
        checks: that came to a result.
        late: that began more than half a second after their time.
        running: now.
        cpu_seconds: that it has used; external commands not included.
    """

    addresses: list[str]
    targets: Count = 0
    checks: Count = 0
    late: Count = 0
    running: Count = 0
    cpu_seconds: float = 0.0


class StatisticsView(msgspec.Struct, frozen=True, kw_only=True):
    """All counters. They start with the controller."""

    uptime_seconds: float = 0.0
    virtual_servers: list[VirtualServerStatistics] = []
    members: list[MemberStatistics] = []
    switches: list[SwitchStatistics] = []
    pools: list[PoolStatistics] = []
    monitors: list[CheckStatistics] = []


class PersistenceView(msgspec.Struct, frozen=True, kw_only=True):
    """A client that is known again.

    Attributes:
        id: unique; the order of lists.
        pool: name.
        type: by what it is known, as in the pool's ``persistence``.
        key: a network, or what it says; ``hex:`` and digits where that cannot be printed, ``digest:`` and digits of
            what is long.
        member: ``address:port`` of the member that it was given last; ``member_name`` if it has one.
        idle_seconds: since its last new connection.
        expires_in: seconds until it is forgotten, unless it comes again.
    """

    id: str
    pool: str
    type: str
    key: str
    member: str
    member_name: str = ""
    idle_seconds: float = 0.0
    expires_in: float = 0.0


class ReportView(msgspec.Struct, frozen=True, kw_only=True):
    """The last report of an agent beside servers.

    Attributes:
        age_seconds: since it came.
        servers: ``address:port`` of the servers it is about, ``address`` where it is about all that serve there.
        flags: what is wrong with it; with anything, it does not count.
        signed: whether its signature was checked.
        refused: reports in the agent's name that were refused.
    """

    age_seconds: float
    sequence: int
    servers: list[str]
    values: dict[str, float]
    flags: list[str]
    signed: bool
    refused: int


class ReportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Of a report that was taken.

    Attributes:
        flags: what is wrong with it; with anything, it does not count.
        interval: the next one is wanted after so many seconds, and no sooner.
    """

    flags: list[str]
    interval: float


class ServerAgentView(msgspec.Struct, frozen=True, kw_only=True):
    """An agent beside servers, whose kernel adopts connections (handoff), or which reports their load.

    Attributes:
        name: which it gave itself.
        listeners: ``address:port`` of the servers it adopts connections for.
        expires_in: seconds, unless it announces itself again; null: it adopts none.
        report: what it said last of the servers' load; null: nothing.
    """

    name: str
    listeners: list[str]
    expires_in: float | None
    report: ReportView | None = None


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent beside servers needs to know.

    Attributes:
        cookie_keys: two keys, hexadecimal; null: there is none at that place.
        window_scale: what clients were told in the handshake, if they offered any.
        lease_seconds: how long the announcement counts.
    """

    cookie_keys: tuple[str | None, str | None]
    window_scale: int
    lease_seconds: float


class MonitorView(msgspec.Struct, frozen=True, kw_only=True):
    """What one monitor says of a member."""

    state: str
    reason: str


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a member's health.

    Attributes:
        state: ``unknown``, ``up`` or ``down``; what an operator said in ``health`` is not considered.
        since: when it became that (UTC); null: since it is watched.
        share: how much of its weight a slow start leaves, 0 to 1.
    """

    state: str
    since: str | None
    reason: str
    monitors: dict[str, MonitorView]
    share: float


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. ``at`` is UTC."""

    number: int
    at: str
    kind: str
    pool: str
    member: str
    text: str


class DrainingView(msgspec.Struct, frozen=True, kw_only=True):
    """A member or a switch that is draining, and how many connections it still has.

    Attributes:
        kind: ``member`` or ``switch``.
        pool, member, name: of a member; else empty.
        switch: of a switch, its datapath id; else empty.
        connections: null where not all of them can be known: as long as a switch has yet to be told, or is not
            connected just now, or runs elsewhere without a fast path.
        ended: its time is over; what was left is reset with its next packet.
    """

    pool: str
    member: str
    name: str
    seconds: float
    drain_timeout: int
    connections: Count | None
    kind: str = "member"
    switch: str = ""
    ended: bool = False


class Runtime(Protocol):
    """What the API asks the running controller. Statuses are (provisioning, operating), Octavia's words."""

    def virtual_server_status(self, vs: VirtualServer) -> tuple[str, str]:
        """Of a virtual server."""
        ...

    def pool_status(self, pool: Pool) -> tuple[str, str]:
        """Of a pool as a whole."""
        ...

    def member_status(self, pool: Pool, member: Member) -> tuple[str, str]:
        """Of a member of a pool."""
        ...

    def member_health(self, member: Member) -> HealthView | None:
        """What is known of a member's health; None where nobody watches it."""
        ...

    def effective_weight(self, pool: Pool, member: Member) -> int:
        """The weight that counts now: with slow start and distribution; 0 while it takes no new connections."""
        ...

    def events(self, after: int) -> Iterable[EventView]:
        """What happened after an event's number, oldest first."""
        ...

    def persistence(self, wanted: Mapping[str, str]) -> Iterable[PersistenceView]:
        """Clients that are known again, in any order; only of a ``pool``, a ``member``, a ``key``."""
        ...

    def forget(self, wanted: Mapping[str, str]) -> int | None:
        """Forget such clients, or all; how many there were, None where no pool or member is meant."""
        ...

    def draining(self) -> list[DrainingView]:
        """Every member and switch that is draining."""
        ...

    def switches(self) -> list[SwitchView]:
        """All that are connected, or that something is asked of."""
        ...

    def connections(self) -> Iterable[ConnectionView]:
        """All that are known, in any order.

        Other greenlets run while the API walks through them: what is iterated must bear that.
        """
        ...

    def statistics(self) -> StatisticsView:
        """A reading of the counters."""
        ...

    def server_agents(self) -> list[ServerAgentView]:
        """Agents beside servers."""
        ...

    def announce(self, name: str, listeners: list[tuple[str, int]]) -> Lease | None:
        """An agent beside servers says what it adopts connections for; None: there are too many agents."""
        ...

    def report(self, name: str, told: Told, signature: bytes | None) -> ReportAnswer:
        """An agent beside servers says how loaded they are.

        Raises:
            lbapp.reports.Refused: it is not taken.
        """
        ...

    def withdraw(self, name: str) -> bool:
        """Such an agent ends; returns whether it was known."""
        ...
