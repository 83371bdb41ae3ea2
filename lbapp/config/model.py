# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration model: every resource an operator can describe, frozen.

One definition serves validation (REST, site files, database rows), the published JSON schema
and the control segment. Field names are Octavia's where Octavia has the field; the others are
those of document 003 (TRANSLATE_ADDR is ``translate_address`` and so on, 003 FIGURE 15).

A change of configuration is a whole new :class:`Configuration`; nothing here is ever mutated.
Nothing here does I/O.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated

import msgspec
import netaddr

from lbapp.config.fields import (
    TOKEN,
    UNLIMITED,
    Burst,
    ConnectionLimit,
    Location,
    Name,
    Number,
    Port,
    Rate,
    RuleText,
    Seconds,
    Text,
    address_field,
    canonical_dpid,
    check_regex,
    octets,
    set_field,
    unicast_field,
)
from lbapp.config.pool import Algorithm, Member, Persistence, PersistenceType, Pool

__all__ = [
    "AUTO_SWITCH_ALGORITHMS", "INSPECT_MOST", "KEYED", "REDIRECT_CODES", "RULE_TYPES", "SWITCH_ALGORITHMS",
    "UNLIMITED", "Algorithm", "Application", "Binding", "CompareType", "Configuration", "Decision", "L7Policy",
    "L7Rule", "Member", "Name", "Network", "Persistence", "PersistenceType", "PolicyAction", "Pool", "Protocol",
    "RuleType", "State", "Switch", "VirtualServer",
]

INSPECT_MOST = 4096
REDIRECT_CODES = (301, 302, 303, 307, 308)
_PLACE = re.compile(r"(?:(?:lp8:|lp16:)?([0-9]{1,4}))?")


class Protocol(enum.Enum):
    """Transport protocol of a virtual server."""

    TCP = "TCP"
    UDP = "UDP"

    @property
    def number(self) -> int:
        """The IP protocol number."""
        return 6 if self is Protocol.TCP else 17


class State(enum.Enum):
    """Where the state of a virtual server's connections lives in the switch."""

    CONNTRACK = "conntrack"
    RULES = "rules"


class Decision(enum.Enum):
    """Who selects the member of a new connection."""

    AUTO = "auto"
    SWITCH = "switch"
    CONTROLLER = "controller"


class Application(enum.Enum):
    """What of a connection is read before its member is selected: nothing, or what the client says first."""

    L4 = "l4"
    HTTP = "http"
    TLS = "tls"
    RAW = "raw"


class Binding(enum.Enum):
    """How a member gets a connection whose handshake it has not seen.

    ``splice``: by a second handshake and offsets of sequence numbers. ``handoff``: its own kernel adopts the connection
    from the first data segment (``lbapp server-agent``). ``hybrid``: the controller shakes hands with both sides, then
    the fast path has it with the offsets. ``relay``: every packet goes through the controller. ``auto``: what member
    and switch can do.
    """

    AUTO = "auto"
    SPLICE = "splice"
    HANDOFF = "handoff"
    HYBRID = "hybrid"
    RELAY = "relay"


class RuleType(enum.Enum):
    """What of a request an L7 rule looks at."""

    METHOD = "METHOD"
    HOST_NAME = "HOST_NAME"
    PATH = "PATH"
    QUERY = "QUERY"
    HEADER = "HEADER"
    COOKIE = "COOKIE"
    FILE_TYPE = "FILE_TYPE"
    SNI = "SNI"
    ALPN = "ALPN"
    SESSION_ID = "SESSION_ID"
    DATA = "DATA"


class CompareType(enum.Enum):
    """How an L7 rule compares."""

    EQUAL_TO = "EQUAL_TO"
    STARTS_WITH = "STARTS_WITH"
    ENDS_WITH = "ENDS_WITH"
    CONTAINS = "CONTAINS"
    REGEX = "REGEX"


class PolicyAction(enum.Enum):
    """What happens to a connection that a policy matches."""

    REDIRECT_TO_POOL = "REDIRECT_TO_POOL"
    REDIRECT_TO_URL = "REDIRECT_TO_URL"
    REDIRECT_PREFIX = "REDIRECT_PREFIX"
    FIXED_RESPONSE = "FIXED_RESPONSE"
    REJECT = "REJECT"


RULE_TYPES: dict[Application, frozenset[RuleType]] = {
    Application.L4: frozenset(),
    Application.HTTP: frozenset({RuleType.METHOD, RuleType.HOST_NAME, RuleType.PATH, RuleType.QUERY, RuleType.HEADER,
                                 RuleType.COOKIE, RuleType.FILE_TYPE}),
    Application.TLS: frozenset({RuleType.SNI, RuleType.ALPN, RuleType.SESSION_ID}),
    Application.RAW: frozenset({RuleType.DATA}),
}
"""The rules that fit what is read."""

KEYED = frozenset({RuleType.HEADER, RuleType.COOKIE, RuleType.QUERY})
"""Rule types that look at one of many, by its name."""

SWITCH_ALGORITHMS = frozenset({
    Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN, Algorithm.SOURCE_IP, Algorithm.CONSISTENT_HASH,
})
"""Algorithms that a switch can carry out (round robin there is even in proportion, not in order)."""

AUTO_SWITCH_ALGORITHMS = SWITCH_ALGORITHMS - {Algorithm.ROUND_ROBIN}
"""Algorithms that ``decision: auto`` leaves to the switch."""


class L7Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One condition on what a client said (names are Octavia's).

    Attributes:
        key: which header, cookie or parameter; for DATA where to look: empty for the beginning, an offset, or
            ``lp8:OFFSET``, ``lp16:OFFSET`` for a field behind its own length of one or two bytes.
        value: what to compare with; for DATA text, or ``hex:`` and digits.
        invert: the condition holds where the comparison does not.
    """

    type: RuleType
    compare_type: CompareType
    value: RuleText
    key: RuleText = ""
    invert: bool = False

    def __post_init__(self) -> None:
        if self.type in KEYED and not self.key:
            raise ValueError(f"key: expected the name of a {self.type.value.lower()}, for type {self.type.value}")
        if self.key and self.type not in KEYED and self.type is not RuleType.DATA:
            raise ValueError(f"key: expected none with type {self.type.value}")
        if self.type is RuleType.HEADER and not TOKEN.fullmatch(self.key):
            raise ValueError(f"key: expected a header's name, got {self.key!r}")
        place = _PLACE.fullmatch(self.key)
        if self.type is RuleType.DATA and (place is None or int(place[1] or 0) >= INSPECT_MOST):
            raise ValueError(f"key: expected an offset, lp8:OFFSET or lp16:OFFSET, each below "
                             f"{INSPECT_MOST}, got {self.key!r}")
        if self.type is RuleType.DATA and self.value.startswith("hex:"):
            octets("value", self.value)
            if self.compare_type is CompareType.REGEX:
                raise ValueError("value: expected no hex: with compare_type REGEX (write \\x00 there)")
        if self.compare_type is CompareType.REGEX:
            check_regex("value", self.value)


class L7Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do with a connection to which all its rules apply. The first policy that matches decides.

    Attributes:
        redirect_pool: the name of a pool, for REDIRECT_TO_POOL.
        redirect_url: the whole new location, for REDIRECT_TO_URL.
        redirect_prefix: what comes before the request's own path and query, for REDIRECT_PREFIX.
        redirect_http_code: of the two.
        response_status, response_body, response_content_type: for FIXED_RESPONSE.
    """

    name: Name
    action: PolicyAction
    description: Text = ""
    rules: Annotated[tuple[L7Rule, ...], msgspec.Meta(max_length=16)] = ()
    redirect_pool: Name | None = None
    redirect_url: Location | None = None
    redirect_prefix: Location | None = None
    redirect_http_code: int = 302
    response_status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    response_body: Annotated[str, msgspec.Meta(max_length=8192)] = ""
    response_content_type: Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[!-~ ]*$(?!\n)")] = "text/plain"
    admin_state_up: bool = True

    def __post_init__(self) -> None:
        for action, field in ((PolicyAction.REDIRECT_TO_POOL, "redirect_pool"),
                              (PolicyAction.REDIRECT_TO_URL, "redirect_url"),
                              (PolicyAction.REDIRECT_PREFIX, "redirect_prefix")):
            if (getattr(self, field) is not None) != (self.action is action):
                raise ValueError(f"{field}: expected {'a value' if self.action is action else 'none'} with action "
                                 f"{self.action.value}")
        if self.redirect_http_code not in REDIRECT_CODES:
            raise ValueError(f"redirect_http_code: expected {', '.join(map(str, REDIRECT_CODES))}, "
                             f"got {self.redirect_http_code}")


class VirtualServer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An address, protocol and port that clients connect to (003, "virtual server").

    Attributes:
        vip_address: the virtual address; ``0.0.0.0`` or ``::`` is the wildcard of its family
            (WILDCARD_ADDR).
        protocol_port: 1-65535; 0 is the wildcard (WILDCARD_PORT).
        admin_state_up: false takes the virtual server off the switch altogether.
        maintenance: true refuses new connections (NOTAVAIL) and keeps the established ones.
        connection_limit: concurrent connections, -1 for no limit (CONNLIMIT).
        translate_address: rewrite the destination to the member's address (TRANSLATE_ADDR).
        translate_port: rewrite the destination port to the member's port (TRANSLATE_PORT).
        route_by_destination: reach the member by its own address; otherwise by ``next_hop``
            (ROUTE_BY_DST_IP).
        arp: answer ARP and neighbour solicitations for the address (not NOARP_MODE).
        snat: also rewrite the source, to the balancer's own address in the member's network.
        state: connections in conntrack, or as one rule pair each.
        decision: who selects; ``auto`` leaves to the switch what the switch can do.
        idle_timeout, hard_timeout: seconds, for ``state: rules``; 0 is none.
        application: what clients say first, where that is read (003: HTTP_PROXY, COOKIE_PROXY, SSL_PROXY, RAW_PROXY).
        binding: how the member gets a connection that was read.
        l7_policies: in their order; where none matches, ``default_pool_id`` it is.
        inspect_bytes: with ``application: raw``, how much of it decides.
        inspect_timeout: seconds a client may take to say enough.
        close_after_first: with ``application: http``, members are told to close each connection after its first
            answer, so that every request is balanced by itself.
        rate_limit, rate_burst: new connections a second, and how many at once (0: a second's worth); -1: no limit.
        client_rate_limit, client_rate_burst: the same for each client network of ``client_prefix_v4`` or ``_v6`` bits.
    """

    name: Name
    vip_address: str
    protocol: Protocol
    protocol_port: Port
    id: str = ""
    number: Number = 0
    description: Text = ""
    default_pool_id: str | None = None
    admin_state_up: bool = True
    maintenance: bool = False
    connection_limit: ConnectionLimit = UNLIMITED
    translate_address: bool = True
    translate_port: bool = True
    route_by_destination: bool = True
    next_hop: str | None = None
    arp: bool = True
    snat: bool = False
    state: State = State.CONNTRACK
    decision: Decision = Decision.AUTO
    idle_timeout: Seconds = 60
    hard_timeout: Seconds = 0
    application: Application = Application.L4
    binding: Binding = Binding.AUTO
    l7_policies: Annotated[tuple[L7Policy, ...], msgspec.Meta(max_length=256)] = ()
    inspect_bytes: Annotated[int, msgspec.Meta(ge=1, le=INSPECT_MOST)] = 64
    inspect_timeout: Annotated[int, msgspec.Meta(ge=1, le=60)] = 10
    close_after_first: bool = False
    rate_limit: Rate = UNLIMITED
    rate_burst: Burst = 0
    client_rate_limit: Rate = UNLIMITED
    client_rate_burst: Burst = 0
    client_prefix_v4: Annotated[int, msgspec.Meta(ge=8, le=32)] = 32
    client_prefix_v6: Annotated[int, msgspec.Meta(ge=16, le=128)] = 64

    def __post_init__(self) -> None:
        address_field(self, "vip_address")
        address_field(self, "next_hop")
        unicast_field(self, "next_hop")
        if not self.wildcard_address:
            unicast_field(self, "vip_address")
        if self.route_by_destination and self.next_hop is not None:
            raise ValueError("next_hop: expected none while route_by_destination is true")
        if not self.route_by_destination and self.next_hop is None:
            raise ValueError("next_hop: expected an address while route_by_destination is false")
        if self.next_hop is not None and (":" in self.next_hop) != (self.version == 6):
            raise ValueError(f"next_hop: expected an IPv{self.version} address like vip_address")
        if self.snat and not self.translate_address:
            raise ValueError("snat: expected translate_address to be true as well")
        if self.snat and self.state is State.RULES:
            raise ValueError("snat: expected state conntrack")
        if self.state is State.RULES and self.wildcard_address:
            raise ValueError("state: expected conntrack for a wildcard vip_address")
        if self.connection_limit != UNLIMITED and self.decision is Decision.SWITCH:
            raise ValueError("decision: expected auto or controller with a connection_limit "
                             "(the switch does not count connections)")
        if self.state is State.RULES and self.decision is Decision.SWITCH:
            raise ValueError("decision: expected auto or controller with state rules")
        if self.state is State.RULES and not self.idle_timeout and not self.hard_timeout:
            raise ValueError("idle_timeout: expected above 0 with state rules, or a hard_timeout "
                             "(a connection's rules must end)")
        if self.l7_policies or self.application is not Application.L4:
            self._check_application()
        if self.close_after_first:
            if self.application is not Application.HTTP:
                raise ValueError("application: expected http with close_after_first")
            if self.binding is Binding.HANDOFF:
                raise ValueError("binding: expected auto, splice, hybrid or relay with close_after_first "
                                 "(what is handed over is the client's own request)")

    def _check_application(self) -> None:
        if self.application is Application.L4:
            raise ValueError("application: expected http, tls or raw with l7_policies")
        word = f"with application {self.application.value}"
        if self.protocol is not Protocol.TCP:
            raise ValueError(f"protocol: expected TCP {word}")
        if self.state is not State.CONNTRACK:
            raise ValueError(f"state: expected conntrack {word}")
        if self.wildcard_address or self.wildcard_port:
            field = "vip_address" if self.wildcard_address else "protocol_port"
            raise ValueError(f"{field}: expected no wildcard {word}")
        if not self.translate_address:
            raise ValueError(f"translate_address: expected true {word}")
        if self.snat:
            raise ValueError(f"snat: expected false {word}")
        if self.decision is Decision.SWITCH:
            raise ValueError(f"decision: expected auto or controller {word}")
        seen: set[str] = set()
        for index, policy in enumerate(self.l7_policies):
            if policy.name in seen:
                raise ValueError(f"l7_policies[{index}].name: {policy.name} is there already")
            seen.add(policy.name)
            if self.application is not Application.HTTP and policy.action not in (
                    PolicyAction.REDIRECT_TO_POOL, PolicyAction.REJECT):
                raise ValueError(f"l7_policies[{index}].action: expected REDIRECT_TO_POOL or REJECT {word}, "
                                 f"got {policy.action.value}")
            for at, rule in enumerate(policy.rules):
                if rule.type not in RULE_TYPES[self.application]:
                    known = ", ".join(one.value for one in RuleType if one in RULE_TYPES[self.application])
                    raise ValueError(f"l7_policies[{index}].rules[{at}].type: expected {known} {word}, "
                                     f"got {rule.type.value}")

    @property
    def pool_names(self) -> frozenset[str]:
        """The pools that its policies name."""
        return frozenset(policy.redirect_pool for policy in self.l7_policies if policy.redirect_pool is not None)

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.vip_address else 4

    @property
    def wildcard_address(self) -> bool:
        """WILDCARD_ADDR of 003."""
        return self.vip_address in ("0.0.0.0", "::")

    @property
    def wildcard_port(self) -> bool:
        """WILDCARD_PORT of 003."""
        return self.protocol_port == 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What must be unique: address, protocol and port."""
        return (self.vip_address, self.protocol.value, self.protocol_port)

    @property
    def limited(self) -> bool:
        """Whether new connections are limited."""
        return self.rate_limit != UNLIMITED or self.client_rate_limit != UNLIMITED

    def switch_decides(self, pool: Pool | None, limits: bool = False) -> bool:
        """Whether the switch itself selects the member of a new connection. ``limits``: it keeps limits on them (a fast
        path does; Open vSwitch cannot, so the controller decides)."""
        if self.limited and not limits:
            return False
        if self.decision is Decision.CONTROLLER or self.state is State.RULES or pool is None:
            return False
        if self.connection_limit != UNLIMITED or self.application is not Application.L4 or pool.needs_controller:
            return False
        allowed = SWITCH_ALGORITHMS if self.decision is Decision.SWITCH else AUTO_SWITCH_ALGORITHMS
        return pool.lb_algorithm in allowed


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network in which the balancer has an address of its own (003, FIGURE 2).

    Hosts there may use ``address`` as their gateway. ``gateway`` is a router of that network
    that leads to everywhere else. Members there are checked from ``monitor_address``.
    """

    name: Name
    cidr: str
    address: str
    id: str = ""
    description: Text = ""
    gateway: str | None = None
    monitor_address: str | None = None

    def __post_init__(self) -> None:
        try:
            network = netaddr.IPNetwork(self.cidr)
        except (netaddr.AddrFormatError, ValueError) as error:
            raise ValueError(f"cidr: expected a network such as 10.0.0.0/24, got {self.cidr!r}") from error
        if network.ip != network.network:
            raise ValueError(f"cidr: expected no host bits, such as {network.cidr}, got {self.cidr!r}")
        set_field(self, "cidr", str(network.cidr))
        for field in ("address", "gateway", "monitor_address"):
            address_field(self, field)
            unicast_field(self, field)
            value = getattr(self, field)
            if value is not None and netaddr.IPAddress(value) not in network:
                raise ValueError(f"{field}: expected an address inside {self.cidr}, got {value}")
        if self.gateway == self.address:
            raise ValueError("gateway: expected another address than the balancer's own")
        if self.monitor_address is not None and self.monitor_address in (self.address, self.gateway):
            raise ValueError("monitor_address: expected another address than the balancer's own and the gateway's")


class Switch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A switch that something is asked of; one that nobody asks anything of needs none.

    Attributes:
        name: its datapath id, 16 hexadecimal digits.
        draining: no new connections through it; those that it has are finished.
        drain_timeout: seconds after which what is left of them is reset; 0: never.
    """

    name: str
    id: str = ""
    draining: bool = False
    drain_timeout: Seconds = 0

    def __post_init__(self) -> None:
        try:
            set_field(self, "name", canonical_dpid(self.name))
        except ValueError as error:
            raise ValueError(f"name: {error}") from None

    @property
    def dpid(self) -> int:
        """Its datapath id."""
        return int(self.name, 16)


class Configuration(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything an operator asked for, at one moment. Keys are resource ids (UUIDs).

    Attributes:
        drained: datapath ids of draining switches whose time is over; only in a configuration in force.
        redirected: virtual servers of which another pool takes a pool's place, as an operator asked for them, by
            number; likewise.
    """

    virtual_servers: Mapping[str, VirtualServer] = {}
    pools: Mapping[str, Pool] = {}
    networks: Mapping[str, Network] = {}
    switches: Mapping[str, Switch] = {}
    drained: frozenset[int] = frozenset()
    redirected: Mapping[int, VirtualServer] = {}

    @property
    def draining(self) -> frozenset[int]:
        """The datapath ids of the switches that are draining."""
        return frozenset(one.dpid for one in self.switches.values() if one.draining)

    def pool_of(self, virtual_server: VirtualServer) -> Pool | None:
        """The pool a virtual server sends connections to, if it has one."""
        if virtual_server.default_pool_id is None:
            return None
        return self.pools.get(virtual_server.default_pool_id)

    def pools_of(self, virtual_server: VirtualServer) -> dict[str, Pool]:
        """All pools that a virtual server may send connections to, by id."""
        pool = self.pool_of(virtual_server)
        found = {} if pool is None else {str(virtual_server.default_pool_id): pool}
        if virtual_server.l7_policies:
            names = virtual_server.pool_names
            found.update((key, one) for key, one in self.pools.items() if one.name in names)
        return found

    def several(self, virtual_server: VirtualServer) -> bool:
        """Whether a virtual server may have connections at members of more than one pool."""
        if virtual_server.l7_policies or virtual_server.number in self.redirected:
            return True
        pool = self.pool_of(virtual_server)
        return pool is not None and pool.fallback_pool is not None

    def pools_reached(self, virtual_server: VirtualServer) -> dict[str, Pool]:
        """All pools whose members may have connections of a virtual server, by id: those that new ones are sent to
        first; then those that others take the place of, and those that may take theirs."""
        found = self.pools_of(virtual_server)
        if virtual_server.number in self.redirected:
            found.update(self.pools_of(self.redirected[virtual_server.number]))
        pools = list(found.values())
        for pool in pools:  # and those that are found on the way
            key = self._ids_of_pools.get(pool.fallback_pool) if pool.fallback_pool is not None else None
            if key is not None and key not in found:
                found[key] = self.pools[key]
                pools.append(found[key])
        return found

    @cached_property
    def _ids_of_pools(self) -> Mapping[str, str]:
        return {one.name: key for key, one in self.pools.items()}
