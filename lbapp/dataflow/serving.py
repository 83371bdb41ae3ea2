# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of one virtual server: how its packets are found, who selects, and the commit. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from lbapp.config.model import Algorithm, Member, Pool, Protocol, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.selection import maglev_table, slot_blocks
from lbapp.dataflow.matches import (
    BARE_SYN,
    ETH_IPV4,
    ETH_IPV6,
    TCP,
    ip_match,
    packed,
    to_controller,
    to_relay,
    transport_match,
)
from lbapp.dataflow.openflow import (
    NAT_DESTINATION,
    Action,
    Bucket,
    Conntrack,
    Flow,
    Group,
    Load,
    Match,
    Move,
    MultipathFlow,
    MultipathSource,
    Nat,
    Resubmit,
    SelectGroup,
)
from lbapp.dataflow.pipeline import VIRTUAL_MAC, Kind, Label, Priority, Register, Table, Zones, group_number, rule

SOURCE_HASH_BITS = 8
MAGLEV_SIZE = 251
"""Prime, and below the 256 hash values that Open vSwitch divides among a select group's buckets."""
HASH_VALUES = 256
MAX_BUCKETS = 1000
"""What fits in one group-mod of 64 KB; the controller selects for larger pools."""
MAX_BLOCKS = 40
"""Rules that a hash over the client's address may cost a virtual server; beyond, the controller selects."""


def commit(virtual_server: VirtualServer, member: Member, zone: Zones, *, routed: bool, tracked: bool = False,
           serial: int = 0) -> Conntrack:
    """The action that creates a connection's state: translation, mark and return path, in one."""
    nat = None
    if virtual_server.translate_address:
        port = member.protocol_port if virtual_server.translate_port else 0
        nat = Nat(NAT_DESTINATION, packed(member.address), (port, port))
    elif virtual_server.translate_port and member.protocol_port and not virtual_server.wildcard_address:
        nat = Nat(NAT_DESTINATION, packed(virtual_server.vip_address), (member.protocol_port, member.protocol_port))
    flags = tracked | virtual_server.snat << 1 | routed << 2
    return Conntrack(zone.service, commit=True, table=Table.BOUND, nat=nat, execute=(
        Load("ct_mark", member.number),
        Move("eth_src", "ct_label", 48, 0, Label.CLIENT_MAC),
        Move("nxm_in_port", "ct_label", 16, 0, Label.CLIENT_PORT),
        Load("ct_label", serial, Label.SERIAL, 32),
        Load("ct_label", virtual_server.number | flags << 24, Label.VIRTUAL_SERVER, 32),
    ))


def virtual_server_flows(virtual_server: VirtualServer, pool: Pool | None, eligible: Sequence[Member], routes: Routes,
                         zone: Zones, relayed: bool = False) -> tuple[list[Flow], SelectGroup | None]:
    """The rules of one virtual server, and the group where a group decides.

    Args:
        virtual_server: the virtual server.
        pool: its pool.
        eligible: members that can have new connections on this switch.
        routes: the balancer's networks.
        zone: the switch's conntrack zones.
        relayed: the controller has its connections (:mod:`lbapp.dataflow.relay`).
    """
    if not virtual_server.admin_state_up:
        return [], None
    number = virtual_server.number
    kind = Kind.VIRTUAL_SERVER
    entry = _entry(virtual_server)
    if relayed:
        priority, match = entry
        return [rule(Table.VIRTUAL_SERVER, priority, match, (to_relay(),), kind=Kind.RELAY, owner=number)], None
    load = Load(Register.VIRTUAL_SERVER, number)
    query = (to_controller(),)
    of_this = (Register.VIRTUAL_SERVER, number)
    if virtual_server.state is State.RULES:
        priority, match = entry
        return [
            rule(Table.VIRTUAL_SERVER, priority, match, (load,), kind=kind, owner=number, goto=Table.RULES),
            rule(Table.RULES, Priority.NORMAL, (of_this,), query, kind=Kind.QUERY, owner=number),
        ], None
    priority, match = entry
    flows = [rule(Table.VIRTUAL_SERVER, priority, match,
                  (load, Conntrack(zone.service, table=Table.SERVE, nat=Nat())), kind=kind, owner=number)]
    new: Match = (("ct_mark", 0), of_this)
    if (virtual_server.maintenance or pool is None or not virtual_server.switch_decides(pool)
            or not 0 < len(eligible) <= _most_members(virtual_server, pool)):
        flows.append(rule(Table.SERVE, Priority.NEW, new, query, kind=Kind.QUERY, owner=number))
        return flows, None
    group, choice, blocks = _decision(virtual_server, pool, eligible)
    if len(blocks) > MAX_BLOCKS:
        flows.append(rule(Table.SERVE, Priority.NEW, new, query, kind=Kind.QUERY, owner=number))
        return flows, None
    ether = ETH_IPV4 if virtual_server.version == 4 else ETH_IPV6
    if virtual_server.protocol is Protocol.TCP:
        # Only what begins a connection: to conntrack, any segment out of nowhere is new.
        flows.append(rule(Table.SERVE, Priority.OUT_OF_NOWHERE, new, query, kind=Kind.QUERY, owner=number))
        new = (("eth_type", ether), ("ip_proto", TCP), BARE_SYN, *new)
    flows.append(rule(Table.SERVE, Priority.NEW, new, (choice,), kind=kind, owner=number,
                      goto=Table.SOURCE_HASH if blocks else None))
    for value, mask, member_number in blocks:
        flows.append(rule(Table.SOURCE_HASH, Priority.NORMAL, (
            of_this, (Register.SLOT, value, mask | 0xFFFFFF00)), (Load(Register.MEMBER, member_number),),
            kind=kind, owner=number, goto=Table.BIND))
    flows += [rule(Table.BIND, Priority.NORMAL, (("eth_type", ether), of_this, (Register.MEMBER, member.number)),
                   (commit(virtual_server, member, zone, routed=routes.routed(virtual_server, member)),),
                   kind=kind, owner=number) for member in eligible]
    return flows, group


def _entry(virtual_server: VirtualServer) -> tuple[Priority, Match]:
    """How a client's packet finds its virtual server: the most specific one wins."""
    if not virtual_server.wildcard_address:
        match = ip_match(virtual_server.vip_address, "dst")
        priority = Priority.EXACT_ADDRESS if virtual_server.wildcard_port else Priority.EXACT
    else:
        match = (("eth_type", ETH_IPV4 if virtual_server.version == 4 else ETH_IPV6), ("eth_dst", VIRTUAL_MAC))
        priority = Priority.WILDCARD if virtual_server.wildcard_port else Priority.EXACT_PORT
    return priority, transport_match(match, virtual_server.protocol.number, "dst", virtual_server.protocol_port)


def _hashed(virtual_server: VirtualServer, pool: Pool) -> bool:
    """Whether the switch hashes into slots of rules, rather than leaving the choice to a group."""
    return pool.lb_algorithm is Algorithm.SOURCE_IP or (
        virtual_server.protocol is Protocol.UDP and pool.lb_algorithm is not Algorithm.CONSISTENT_HASH)


def _most_members(virtual_server: VirtualServer, pool: Pool) -> int:
    """The members that the switch can select among."""
    if pool.lb_algorithm is Algorithm.CONSISTENT_HASH:
        return MAGLEV_SIZE
    return 1 << SOURCE_HASH_BITS if _hashed(virtual_server, pool) else MAX_BUCKETS


def _decision(virtual_server: VirtualServer, pool: Pool, eligible: Sequence[Member],
              ) -> tuple[SelectGroup | None, Action, Sequence[tuple[int, int, int]]]:
    """How the switch selects: a group of buckets, or slots of a hash over the client's address or the whole flow."""
    weights = [(member.number, member.weight) for member in eligible]
    number = virtual_server.number
    if pool.lb_algorithm is Algorithm.SOURCE_IP:
        return None, MultipathSource(Register.SLOT, 1 << SOURCE_HASH_BITS), slot_blocks(weights, SOURCE_HASH_BITS)
    even = pool.lb_algorithm is Algorithm.ROUND_ROBIN
    if virtual_server.protocol is Protocol.UDP and pool.lb_algorithm is not Algorithm.CONSISTENT_HASH:
        # A select group would give all datagrams between two addresses to one member.
        shares = [(key, 1 if even else weight) for key, weight in weights]
        return None, MultipathFlow(Register.SLOT, 1 << SOURCE_HASH_BITS), slot_blocks(shares, SOURCE_HASH_BITS)
    if pool.lb_algorithm is Algorithm.CONSISTENT_HASH:
        buckets = tuple(_bucket(1, member) for member in maglev_table(weights, MAGLEV_SIZE))
    else:
        if not even and sum(weight for _, weight in weights) > HASH_VALUES * min(weight for _, weight in weights):
            weights = _in_hash_values(weights)
        buckets = tuple(_bucket(1 if even else weight, member) for member, weight in weights)
    return SelectGroup(group_number(number), buckets), Group(group_number(number)), ()


def _in_hash_values(weights: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Weights as shares of the 256 values that Open vSwitch's dp_hash has.

    It takes the lightest bucket as one value; a pool that needs more values than there are would make
    it fall back to a hash that needs an upcall for each connection, and keeps to the weights less well.
    """
    if len(weights) > HASH_VALUES:
        return weights
    shares = dict.fromkeys((member for member, _ in weights), 0)
    for _, mask, member in slot_blocks(weights, SOURCE_HASH_BITS):
        shares[member] += HASH_VALUES - mask
    return list(shares.items())


def _bucket(weight: int, member: int) -> Bucket:
    return Bucket(weight, (Load(Register.MEMBER, member), Resubmit(Table.BIND)))
