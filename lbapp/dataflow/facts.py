# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Facts of a configuration: small values that several virtual servers may share.

"This address is ours", "this member is behind that neighbour". Sharing is counted by
``program.py``; which rules a fact means is in ``flows.py``. Pure functions, no state.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from lbapp.config.model import Member, Network, State, VirtualServer
from lbapp.config.routing import Routes


class Address(Struct, frozen=True):
    """Fact: a virtual address is served here. ``denied`` ports of it are refused."""

    address: str


class Answer(Struct, frozen=True):
    """Fact: ARP and neighbour solicitations for an address are answered."""

    address: str


class Source(Struct, frozen=True):
    """Fact: packets from here may be replies of a connection. ``port`` 0: from any port; ``relayed``: the controller
    has it."""

    address: str
    protocol: int
    port: int
    rules: bool
    relayed: bool = False


class FragmentSource(Struct, frozen=True):
    """Fact: fragments from here, of which no ports are seen, may belong to replies of a connection."""

    address: str


class Forward(Struct, frozen=True):
    """Fact: a member (or with ``virtual_server`` all of a virtual server's members) is reached by a next hop."""

    member: int
    virtual_server: int
    next_hop: str
    routed: bool


class SourceNat(Struct, frozen=True):
    """Fact: connections of a virtual server to a member have their source translated."""

    member: int
    virtual_server: int
    address: str
    routed: bool


class Neighbour(Struct, frozen=True):
    """Fact: the controller wants to hear where an address is."""

    address: str


class Own(Struct, frozen=True):
    """Fact: the balancer's own address in a network (answered, and the source of translated connections)."""

    address: str
    cidr: str


class Gateway(Struct, frozen=True):
    """Fact: a router leads to everywhere that no network of ours contains."""

    address: str


class Local(Struct, frozen=True):
    """Fact: an address that a wildcard virtual server leaves alone (003, "other known local address")."""

    address: str


Fact = Address | Answer | Source | FragmentSource | Forward | SourceNat | Neighbour | Own | Gateway | Local


def member_source(virtual_server: VirtualServer, member: Member, relayed: bool = False) -> Source | None:
    """Where replies of a member come from; None where they need no undoing (transparent wildcard)."""
    if virtual_server.translate_address:
        address = member.address
    elif virtual_server.wildcard_address:
        return None
    else:
        address = virtual_server.vip_address
    port = virtual_server.protocol_port
    if virtual_server.translate_port and member.protocol_port:
        port = member.protocol_port
    return Source(address, virtual_server.protocol.number, port, virtual_server.state is State.RULES, relayed)


def facts_of(virtual_server: VirtualServer, members: Iterable[Member], routes: Routes, wildcards: frozenset[int],
             relayed: bool = False) -> list[Fact]:
    """The facts a virtual server needs.

    Args:
        virtual_server: the virtual server.
        members: those that may have connections of it.
        routes: the balancer's networks.
        wildcards: IP versions that have a wildcard virtual server.
        relayed: the controller has its connections.
    """
    if not virtual_server.admin_state_up:
        return []
    facts: list[Fact] = []
    if not virtual_server.wildcard_address:
        facts.append(Address(virtual_server.vip_address))
        if virtual_server.arp:
            facts.append(Answer(virtual_server.vip_address))
    if virtual_server.next_hop is not None:
        facts.append(Neighbour(virtual_server.next_hop))
    for member in members:
        source = member_source(virtual_server, member, relayed)
        if source is not None:
            facts += [source, FragmentSource(source.address)]
        next_hop = routes.next_hop(virtual_server, member)
        routed = routes.routed(virtual_server, member)
        if virtual_server.next_hop is not None:
            facts.append(Forward(0, virtual_server.number, next_hop, routed))
        else:
            facts.append(Forward(member.number, 0, next_hop, routed))
            facts.append(Neighbour(next_hop))
        if virtual_server.snat:
            own = routes.source_address(member)
            if own is not None:
                facts.append(SourceNat(member.number, virtual_server.number, own, routed))
        if member_version(member) in wildcards:
            facts.append(Local(member.address))
    return facts


def member_version(member: Member) -> int:
    """4 or 6."""
    return 6 if ":" in member.address else 4


def network_facts(network: Network, routes: Routes) -> list[Fact]:
    """The facts of a network in which the balancer has an address. Of several gateways one is used."""
    facts: list[Fact] = [Own(network.address, network.cidr), Answer(network.address), Local(network.address)]
    if network.gateway is not None and network.gateway == routes.gateway(":" in network.gateway):
        facts += [Gateway(network.gateway), Neighbour(network.gateway)]
    return facts
