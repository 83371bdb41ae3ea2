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
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import netaddr

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$(?!\n)")]
MemberName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[A-Za-z0-9._:-]*$(?!\n)")]
Text = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^[^\u0000]*$")]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Weight = Annotated[int, msgspec.Meta(ge=0, le=256)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ConnectionLimit = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]

UNLIMITED = -1


class Protocol(enum.Enum):
    """Transport protocol of a virtual server."""

    TCP = "TCP"
    UDP = "UDP"

    @property
    def number(self) -> int:
        """The IP protocol number."""
        return 6 if self is Protocol.TCP else 17


class Algorithm(enum.Enum):
    """How a pool's member is selected for a new connection."""

    ROUND_ROBIN = "ROUND_ROBIN"
    WEIGHTED_ROUND_ROBIN = "WEIGHTED_ROUND_ROBIN"
    LEAST_CONNECTIONS = "LEAST_CONNECTIONS"
    SOURCE_IP = "SOURCE_IP"
    CONSISTENT_HASH = "CONSISTENT_HASH"
    RANDOM_TWO_CHOICES = "RANDOM_TWO_CHOICES"


class State(enum.Enum):
    """Where the state of a virtual server's connections lives in the switch."""

    CONNTRACK = "conntrack"
    RULES = "rules"


class Decision(enum.Enum):
    """Who selects the member of a new connection."""

    AUTO = "auto"
    SWITCH = "switch"
    CONTROLLER = "controller"


SWITCH_ALGORITHMS = frozenset({
    Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN, Algorithm.SOURCE_IP, Algorithm.CONSISTENT_HASH,
})
"""Algorithms that a switch can carry out (round robin there is even in proportion, not in order)."""

AUTO_SWITCH_ALGORITHMS = SWITCH_ALGORITHMS - {Algorithm.ROUND_ROBIN}
"""Algorithms that ``decision: auto`` leaves to the switch."""


def canonical_address(value: str) -> str:
    """Return the canonical text of an IPv4 or IPv6 address.

    Raises:
        ValueError: the text is not an address, or it carries a prefix length.
    """
    try:
        address = netaddr.IPAddress(value, flags=netaddr.INET_PTON)
    except (netaddr.AddrFormatError, ValueError, TypeError) as error:
        raise ValueError(f"expected an IPv4 or IPv6 address, got {value!r}") from error
    return str(address)


def _set(resource: Any, field: str, value: Any) -> None:
    msgspec.structs.force_setattr(resource, field, value)


def _address_field(resource: Any, field: str) -> None:
    value = getattr(resource, field)
    if value is None:
        return
    try:
        _set(resource, field, canonical_address(value))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _unicast(resource: Any, field: str) -> None:
    value = getattr(resource, field)
    if value is None:
        return
    address = netaddr.IPAddress(value)
    if address.is_multicast() or int(address) == 0 or value == "255.255.255.255" or address.is_loopback():
        raise ValueError(f"{field}: expected a unicast address that hosts can have, got {value!r}")


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A server of a pool.

    ``number`` is given by the store, is never used twice, and is what the switch writes into
    ``ct_mark``; it is what lets connections survive a restart of the controller.
    """

    address: str
    protocol_port: Port
    id: str = ""
    name: MemberName = ""
    number: Number = 0
    weight: Weight = 1
    admin_state_up: bool = True
    draining: bool = False

    def __post_init__(self) -> None:
        _address_field(self, "address")
        _unicast(self, "address")

    @property
    def takes_new(self) -> bool:
        """Whether its configuration lets it have new connections."""
        return self.admin_state_up and not self.draining and self.weight > 0


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Members, and how one of them is selected."""

    name: Name
    id: str = ""
    description: Text = ""
    lb_algorithm: Algorithm = Algorithm.ROUND_ROBIN
    admin_state_up: bool = True
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        for index, member in enumerate(self.members):
            key = (member.address, member.protocol_port)
            if key in seen:
                raise ValueError(f"members[{index}]: address {member.address} with protocol_port "
                                 f"{member.protocol_port} is already a member of this pool")
            seen.add(key)


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

    def __post_init__(self) -> None:
        _address_field(self, "vip_address")
        _address_field(self, "next_hop")
        _unicast(self, "next_hop")
        if not self.wildcard_address:
            _unicast(self, "vip_address")
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

    def switch_decides(self, pool: Pool | None) -> bool:
        """Whether the switch itself selects the member of a new connection."""
        if self.decision is Decision.CONTROLLER or self.state is State.RULES or pool is None:
            return False
        if self.connection_limit != UNLIMITED:
            return False
        allowed = SWITCH_ALGORITHMS if self.decision is Decision.SWITCH else AUTO_SWITCH_ALGORITHMS
        return pool.lb_algorithm in allowed


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network in which the balancer has an address of its own (003, FIGURE 2).

    Hosts there may use ``address`` as their gateway. ``gateway`` is a router of that network
    that leads to everywhere else.
    """

    name: Name
    cidr: str
    address: str
    id: str = ""
    description: Text = ""
    gateway: str | None = None

    def __post_init__(self) -> None:
        try:
            network = netaddr.IPNetwork(self.cidr)
        except (netaddr.AddrFormatError, ValueError) as error:
            raise ValueError(f"cidr: expected a network such as 10.0.0.0/24, got {self.cidr!r}") from error
        if network.ip != network.network:
            raise ValueError(f"cidr: expected no host bits, such as {network.cidr}, got {self.cidr!r}")
        _set(self, "cidr", str(network.cidr))
        for field in ("address", "gateway"):
            _address_field(self, field)
            _unicast(self, field)
            value = getattr(self, field)
            if value is not None and netaddr.IPAddress(value) not in network:
                raise ValueError(f"{field}: expected an address inside {self.cidr}, got {value}")
        if self.gateway == self.address:
            raise ValueError("gateway: expected another address than the balancer's own")


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator asked for, at one moment. Keys are resource ids (UUIDs)."""

    virtual_servers: Mapping[str, VirtualServer] = {}
    pools: Mapping[str, Pool] = {}
    networks: Mapping[str, Network] = {}

    def pool_of(self, virtual_server: VirtualServer) -> Pool | None:
        """The pool a virtual server sends connections to, if it has one."""
        if virtual_server.default_pool_id is None:
            return None
        return self.pools.get(virtual_server.default_pool_id)
