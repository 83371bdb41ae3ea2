# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Pools and their members, as an operator describes them. Frozen; does no I/O."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from lbapp.config.fields import (
    TOKEN,
    UNLIMITED,
    ConnectionLimit,
    MemberName,
    Name,
    Number,
    Port,
    RuleText,
    Seconds,
    Text,
    Weight,
    address_field,
    unicast_field,
)
from lbapp.config.formula import FormulaError, parse
from lbapp.config.monitor import Damping, Monitor, MonitorRule, Passive


class Algorithm(enum.Enum):
    """How a pool's member is selected for a new connection."""

    ROUND_ROBIN = "ROUND_ROBIN"
    WEIGHTED_ROUND_ROBIN = "WEIGHTED_ROUND_ROBIN"
    LEAST_CONNECTIONS = "LEAST_CONNECTIONS"
    SOURCE_IP = "SOURCE_IP"
    CONSISTENT_HASH = "CONSISTENT_HASH"
    RANDOM_TWO_CHOICES = "RANDOM_TWO_CHOICES"
    LEAST_RESPONSE_TIME = "LEAST_RESPONSE_TIME"
    LEAST_BYTES = "LEAST_BYTES"
    FASTEST = "FASTEST"
    BOUNDED_LOAD_HASH = "BOUNDED_LOAD_HASH"


LEAST_MSS = 1220
"""What every path takes that takes IPv6 (RFC 8200, 5): what is too long for a frame is cut into pieces of so much."""
WEIGHTED = frozenset(Algorithm) - {Algorithm.ROUND_ROBIN}
"""Algorithms that look at weights."""


class Override(enum.Enum):
    """What an operator says of a member's health: nothing, or the last word."""

    AUTO = "auto"
    UP = "up"
    DOWN = "down"


class OnDown(enum.Enum):
    """What becomes of the established connections of a member that goes down."""

    KEEP = "keep"
    RESET = "reset"


class PersistenceType(enum.Enum):
    """By what a client is known again."""

    SOURCE_IP = "SOURCE_IP"
    DESTINATION_IP = "DESTINATION_IP"
    APP_COOKIE = "APP_COOKIE"
    HEADER = "HEADER"
    QUERY = "QUERY"
    TLS_SESSION_ID = "TLS_SESSION_ID"
    SNI = "SNI"
    RAW = "RAW"


READ_PERSISTENCE: dict[PersistenceType, str] = {
    PersistenceType.APP_COOKIE: "http", PersistenceType.HEADER: "http", PersistenceType.QUERY: "http",
    PersistenceType.TLS_SESSION_ID: "tls", PersistenceType.SNI: "tls", PersistenceType.RAW: "raw",
}
"""What a virtual server must read for those that lie in what a client says."""


class Persistence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is known again goes where it went before.

    Attributes:
        key: the name of the cookie, header or parameter; for RAW, ``OFFSET:LENGTH`` in the client's first bytes.
        prefix_length_v4, prefix_length_v6: how much of an address counts.
        timeout: seconds without a new connection after which a client is forgotten.
        limit: clients remembered, of this pool; the one that was away longest makes room.
        while_draining: whether clients known to a member that is draining are still let in there.
        while_down: whether they are sent even to a member that is down.
    """

    type: PersistenceType
    key: RuleText = ""
    prefix_length_v4: Annotated[int, msgspec.Meta(ge=1, le=32)] = 32
    prefix_length_v6: Annotated[int, msgspec.Meta(ge=1, le=128)] = 128
    timeout: Annotated[int, msgspec.Meta(ge=1, le=604_800)] = 3600
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100_000
    while_draining: bool = True
    while_down: bool = False

    def __post_init__(self) -> None:
        keyed = self.type in (PersistenceType.APP_COOKIE, PersistenceType.HEADER, PersistenceType.QUERY)
        if keyed and not self.key:
            raise ValueError(f"key: expected a name, with type {self.type.value}")
        if self.type is PersistenceType.RAW:
            self.span()
        elif self.key and not keyed:
            raise ValueError(f"key: expected none with type {self.type.value}")
        if self.type is PersistenceType.HEADER and not TOKEN.fullmatch(self.key):
            raise ValueError(f"key: expected a header's name, got {self.key!r}")

    def span(self) -> tuple[int, int]:
        """Offset and length of a RAW key.

        Raises:
            ValueError: it says something else.
        """
        offset, colon, length = self.key.partition(":")
        if not (colon and offset.isdecimal() and length.isdecimal() and len(self.key) < 12
                and 1 <= int(length) <= 256 and int(offset) + int(length) <= 4096):
            raise ValueError(f"key: expected OFFSET:LENGTH, at most 256 bytes within the first 4096, got {self.key!r}")
        return int(offset), int(length)


class Synthesis(enum.Enum):
    """How the master makes weights of what servers report (004)."""

    EVEN_LOAD = "EVEN_LOAD"
    CAPABILITY = "CAPABILITY"
    DYNAMIC_RATIO = "DYNAMIC_RATIO"
    FORMULA = "FORMULA"


class Distribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The weights of a pool's members follow what agents beside the servers report (004, resource manager).

    Attributes:
        formula: with FORMULA, the share of a member, from what it reports.
        interval: seconds from one distribution to the next.
        stale: a report older than this many seconds counts for nothing.
    """

    algorithm: Synthesis = Synthesis.DYNAMIC_RATIO
    formula: RuleText = ""
    interval: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 5.0
    stale: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 15.0

    def __post_init__(self) -> None:
        if (self.algorithm is Synthesis.FORMULA) != bool(self.formula):
            raise ValueError("formula: expected a formula with algorithm FORMULA, and none without")
        if self.formula:
            try:
                parse(self.formula)
            except FormulaError as error:
                raise ValueError(f"formula: {error}") from None


class Waiting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The line in which connections wait while all members have as many as they may.

    Attributes:
        limit: how many may wait; more are refused.
        timeout: seconds after which one that waits is refused.
    """

    limit: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 128
    timeout: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 5.0


class Sorry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client of an HTTP virtual server is answered while no member can take it."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 503
    body: Annotated[str, msgspec.Meta(max_length=8192)] = ""
    content_type: Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[!-~ ]*$(?!\n)")] = "text/plain"


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A server of a pool.

    ``number`` is given by the store, is never used twice, and is what the switch writes into
    ``ct_mark``; it is what lets connections survive a restart of the controller.

    Attributes:
        draining: no new connections, but for clients that are known to it where the pool says so.
        drain_timeout: seconds after which what is left of a draining member's connections is reset; 0: never.
        priority: members of a lower one are used while fewer than ``minimum_active`` of the higher ones are up.
        connection_limit: concurrent connections, -1 for no limit.
        health: ``up`` or ``down`` whatever its monitors say.
        monitor_address, monitor_port: where it is checked, if not where it serves.
    """

    address: str
    protocol_port: Port
    id: str = ""
    name: MemberName = ""
    number: Number = 0
    weight: Weight = 1
    admin_state_up: bool = True
    draining: bool = False
    drain_timeout: Seconds = 0
    priority: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    connection_limit: ConnectionLimit = UNLIMITED
    health: Override = Override.AUTO
    monitor_address: str | None = None
    monitor_port: Port = 0

    def __post_init__(self) -> None:
        for field in ("address", "monitor_address"):
            address_field(self, field)
            unicast_field(self, field)

    @property
    def endpoint(self) -> str:
        """Where it serves, for people: ``address:port``, an IPv6 address in brackets."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.protocol_port}"

    @property
    def takes_new(self) -> bool:
        """Whether its configuration lets it have new connections."""
        return self.admin_state_up and not self.draining and self.weight > 0 and self.health is not Override.DOWN


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Members, and how one of them is selected.

    Attributes:
        monitors: how members are checked; ``monitor_rule``: whether all of them must be satisfied, or any.
        passive: whether clients' own connections tell of a member's health.
        damping: whether a member that changes too often is kept down.
        on_down: what becomes of the connections of a member that goes down.
        slow_start: seconds in which a member that came up gets its whole weight.
        minimum_active: with fewer members up than this, the next lower priority takes part.
        fallback_pool: the name of the pool that is used while no member of this one can be.
        sorry: what HTTP clients are answered while there is no such pool either.
        persistence: how clients are known again.
        distribution: whether weights follow what servers report.
        waiting: where connections wait while all members are full.
        mss: the most data of a segment that members, and the way to them, take: it is said to clients that are shaken
            hands with for them. 0: as much as a frame of Ethernet holds.
    """

    name: Name
    id: str = ""
    description: Text = ""
    lb_algorithm: Algorithm = Algorithm.ROUND_ROBIN
    admin_state_up: bool = True
    members: tuple[Member, ...] = ()
    monitors: Annotated[tuple[Monitor, ...], msgspec.Meta(max_length=8)] = ()
    monitor_rule: MonitorRule = MonitorRule.ALL
    passive: Passive | None = None
    damping: Damping | None = None
    on_down: OnDown = OnDown.KEEP
    slow_start: Seconds = 0
    minimum_active: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    fallback_pool: Name | None = None
    sorry: Sorry | None = None
    persistence: Persistence | None = None
    distribution: Distribution | None = None
    waiting: Waiting | None = None
    mss: Annotated[int, msgspec.Meta(ge=0, le=1460)] = 0

    @property
    def needs_controller(self) -> bool:
        """Whether members can be selected only by who remembers clients, or counts connections."""
        return self.persistence is not None or any(one.connection_limit != UNLIMITED for one in self.members)

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        for index, member in enumerate(self.members):
            key = (member.address, member.protocol_port)
            if key in seen:
                raise ValueError(f"members[{index}]: address {member.address} with protocol_port "
                                 f"{member.protocol_port} is already a member of this pool")
            seen.add(key)
        names: set[str] = set()
        for index, monitor in enumerate(self.monitors):
            if monitor.name in names:
                raise ValueError(f"monitors[{index}].name: {monitor.name} is there already")
            names.add(monitor.name)
        for field, wanted in (("slow_start", self.slow_start > 0), ("distribution", self.distribution is not None)):
            if wanted and self.lb_algorithm not in WEIGHTED:
                raise ValueError(f"{field}: expected an lb_algorithm that looks at weights, "
                                 f"such as WEIGHTED_ROUND_ROBIN, not {self.lb_algorithm.value}")
        if 0 < self.mss < LEAST_MSS:
            raise ValueError(f"mss: expected 0, or {LEAST_MSS} to 1460, got {self.mss}")
        if self.fallback_pool == self.name:
            raise ValueError("fallback_pool: expected another pool")
