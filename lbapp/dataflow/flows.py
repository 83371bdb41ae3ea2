# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The rules that make a switch a load balancer: facts of a configuration, and the rules of each.

A *fact* is a small value that several virtual servers may share ("this address is ours", "this
member is behind that neighbour"). Sharing is counted by ``program.py``; this module only knows
which facts a virtual server needs and which rules a fact means. Pure functions, no state.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from msgspec import Struct

from lbapp.config.model import Algorithm, Member, Network, Pool, Protocol, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.messages import Host
from lbapp.control.selection import maglev_table, slot_blocks
from lbapp.dataflow.openflow import (
    CONTROLLER,
    IN_PORT,
    NAT_DESTINATION,
    NAT_SOURCE,
    NORMAL,
    Action,
    Bucket,
    Conntrack,
    DecrementTtl,
    Flow,
    Group,
    Load,
    Match,
    Move,
    MultipathFlow,
    MultipathSource,
    Nat,
    Output,
    OutputRegister,
    Resubmit,
    SelectGroup,
    SetField,
    SetTtl,
)
from lbapp.dataflow.pipeline import VIRTUAL_MAC, Kind, Label, Priority, Register, Table, Zones, group_number, rule

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
ETH_IPV4, ETH_IPV6, ETH_ARP = 0x0800, 0x86DD, 0x0806
MAX_PACKET_IN = 65535
SOURCE_HASH_BITS = 8
MAGLEV_SIZE = 251
"""Prime, and below the 256 hash values that Open vSwitch divides among a select group's buckets."""
HASH_VALUES = 256
MAX_BUCKETS = 1000
"""What fits in one group-mod of 64 KB; the controller selects for larger pools."""
MAX_BLOCKS = 40
"""Rules that a hash over the client's address may cost a virtual server; beyond, the controller selects."""
CT_INVALID = ("ct_state", 0x30, 0x30)
CT_REPLY = ("ct_state", 0x28, 0x38)
"""+trk+inv, and +trk+rpl-inv."""
ANY_FRAGMENT = ("ip_frag", 1, 1)
"""The first one as well: Open vSwitch hides the ports of all fragments, unless told otherwise."""
TARGET_LINK_LAYER_ADDRESS = 2
SOLICITED_OVERRIDE = 0x60000000
SNAT_PORTS = (1024, 65535)


class Address(Struct, frozen=True):
    """Fact: a virtual address is served here. ``denied`` ports of it are refused."""

    address: str


class Answer(Struct, frozen=True):
    """Fact: ARP and neighbour solicitations for an address are answered."""

    address: str


class Source(Struct, frozen=True):
    """Fact: packets from here may be replies of a connection. ``port`` 0: from any port."""

    address: str
    protocol: int
    port: int
    rules: bool


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


def packed(address: str) -> bytes:
    """The bytes of an address."""
    return ipaddress.ip_address(address).packed


def address_text(data: bytes) -> str:
    """The canonical text of an address."""
    return str(ipaddress.ip_address(data))


def _ip(address: str, side: str) -> Match:
    data = packed(address)
    return (("eth_type", ETH_IPV4 if len(data) == 4 else ETH_IPV6), (f"ipv{4 if len(data) == 4 else 6}_{side}", data))


def _transport(match: Match, protocol: int, side: str = "", port: int = 0) -> Match:
    match = (*match, ("ip_proto", protocol))
    return (*match, (f"{'tcp' if protocol == TCP else 'udp'}_{side}", port)) if port else match


def to_controller() -> Output:
    """Punt the whole frame."""
    return Output(CONTROLLER, MAX_PACKET_IN)


def _restore(routed: bool) -> tuple[Action, ...]:
    return (
        Move("ct_label", "eth_dst", 48, Label.CLIENT_MAC, 0), SetField("eth_src", VIRTUAL_MAC),
        *((DecrementTtl(),) if routed else ()),
        Move("ct_label", Register.PORT, 16, Label.CLIENT_PORT, 0), Load("nxm_in_port", 0),
        OutputRegister(Register.PORT),
    )


def label_bit(bit: Label, value: int = 1) -> tuple[str, int, int]:
    """A match on one bit of ct_label."""
    return ("ct_label", value << bit, 1 << bit)


def of_virtual_server(number: int) -> tuple[str, int, int]:
    """A match on the virtual server that ct_label names."""
    return ("ct_label", number << Label.VIRTUAL_SERVER, ((1 << 24) - 1) << Label.VIRTUAL_SERVER)


def base_flows(zone: Zones, probe: bytes) -> Iterator[Flow]:
    """The rules that stand on every switch, whatever the configuration."""
    def base(table: Table, priority: Priority, match: Match, *actions: Action, goto: Table | None = None,
             kind: Kind = Kind.BASE) -> Flow:
        return rule(table, priority, match, actions, kind=kind, goto=goto)

    neighbour = Kind.NEIGHBOUR
    yield base(Table.CLASSIFY, Priority.PROBE_REPLY, (("eth_type", ETH_ARP), ("eth_dst", probe)), to_controller(),
               kind=neighbour)
    yield base(Table.CLASSIFY, Priority.PROBE_REPLY, (
        ("eth_type", ETH_IPV6), ("eth_dst", probe), ("ip_proto", ICMP6), ("icmpv6_type", 136), ("icmpv6_code", 0)),
        to_controller(), kind=neighbour)
    yield base(Table.CLASSIFY, Priority.DUPLICATE_ADDRESS_DETECTION, (
        ("eth_type", ETH_IPV6), ("ip_proto", ICMP6), ("ipv6_src", bytes(16)), ("icmpv6_type", 135),
        ("icmpv6_code", 0)), goto=Table.L2)
    for kind in (3, 11):
        yield base(Table.CLASSIFY, Priority.ICMP_ERROR, (
            ("eth_type", ETH_IPV4), ("ip_proto", ICMP), ("icmpv4_type", kind)),
            Conntrack(zone.service, table=Table.RETURN, nat=Nat()))
    for kind in (1, 2, 3):
        yield base(Table.CLASSIFY, Priority.ICMP_ERROR, (
            ("eth_type", ETH_IPV6), ("ip_proto", ICMP6), ("icmpv6_type", kind)),
            Conntrack(zone.service, table=Table.RETURN, nat=Nat()))
    yield base(Table.CLASSIFY, Priority.DEFAULT, (), goto=Table.VIRTUAL_SERVER)

    for ether in (ETH_IPV4, ETH_IPV6):
        known = Conntrack(zone.service, table=Table.RETURN, nat=Nat())
        yield base(Table.RULES_RETURN, Priority.DEFAULT, (("eth_type", ether),), known)
        yield base(Table.UNSNAT, Priority.REPLY, (("eth_type", ether), CT_REPLY), known)
    yield base(Table.UNSNAT, Priority.DEFAULT, (), goto=Table.VIRTUAL_SERVER)
    for ether in (ETH_IPV4, ETH_IPV6):
        for flag in (0x01, 0x04):
            closing = (("eth_type", ether), ("ip_proto", TCP), label_bit(Label.TRACKED), ("tcp_flags", flag, flag))
            yield rule(Table.RETURN, Priority.CLOSING, (*closing, CT_REPLY), (to_controller(),),
                       kind=Kind.CLOSE, goto=Table.RESTORE)
            if flag == 0x04:
                yield rule(Table.SERVE, Priority.CLOSING, closing, (to_controller(),), kind=Kind.CLOSE,
                           goto=Table.BOUND)
    yield base(Table.RETURN, Priority.REPLY, (CT_REPLY,), goto=Table.RESTORE)
    yield base(Table.RETURN, Priority.DEFAULT, (), goto=Table.VIRTUAL_SERVER)
    for ether in (ETH_IPV4, ETH_IPV6):
        yield base(Table.RESTORE, Priority.SPECIAL, (("eth_type", ether), label_bit(Label.ROUTED)), *_restore(True))
    yield base(Table.RESTORE, Priority.NORMAL, (), *_restore(False))
    yield base(Table.VIRTUAL_SERVER, Priority.DEFAULT, (), goto=Table.ROUTE)
    yield base(Table.ND_ANSWER, Priority.NORMAL, (
        ("eth_type", ETH_IPV6), ("ip_proto", ICMP6), ("icmpv6_type", 136), ("icmpv6_code", 0)),
        SetField("nd_options_type", TARGET_LINK_LAYER_ADDRESS), SetField("nd_reserved", SOLICITED_OVERRIDE),
        SetField("ipv6_nd_tll", VIRTUAL_MAC), SetTtl(255), Output(IN_PORT))
    yield base(Table.SERVE, Priority.INVALID, (CT_INVALID,))
    yield base(Table.SERVE, Priority.NO_SERVER, (("ct_mark", 0),))
    yield base(Table.SERVE, Priority.DEFAULT, (), goto=Table.BOUND)
    yield base(Table.BOUND, Priority.INVALID, (("ct_mark", 0),), to_controller(), kind=Kind.FULL)
    yield base(Table.BOUND, Priority.SPECIAL, (label_bit(Label.SNAT),), goto=Table.SNAT)
    yield base(Table.BOUND, Priority.DEFAULT, (), goto=Table.FORWARD)
    yield base(Table.FORWARD, Priority.DEFAULT, (), to_controller(), kind=Kind.GONE)
    yield base(Table.ROUTE, Priority.DEFAULT, (), goto=Table.L2)
    yield base(Table.L2, Priority.NORMAL, (("eth_dst", VIRTUAL_MAC),))
    yield base(Table.L2, Priority.DEFAULT, (), Output(NORMAL))


# ------------------------------------------------------------------ facts of a configuration


def member_source(virtual_server: VirtualServer, member: Member) -> Source | None:
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
    return Source(address, virtual_server.protocol.number, port, virtual_server.state is State.RULES)


def facts_of(virtual_server: VirtualServer, pool: Pool | None, routes: Routes, wildcards: frozenset[int]) -> list[Fact]:
    """The facts a virtual server needs. ``wildcards``: IP versions that have a wildcard virtual server."""
    if not virtual_server.admin_state_up:
        return []
    facts: list[Fact] = []
    if not virtual_server.wildcard_address:
        facts.append(Address(virtual_server.vip_address))
        if virtual_server.arp:
            facts.append(Answer(virtual_server.vip_address))
    if virtual_server.next_hop is not None:
        facts.append(Neighbour(virtual_server.next_hop))
    for member in pool.members if pool is not None else ():
        source = member_source(virtual_server, member)
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


# ------------------------------------------------------------------ rules of a fact


def flows_of(fact: Fact, zone: Zones, host: Host | None) -> Iterator[Flow]:
    """The rules that a fact means on a switch.

    Args:
        fact: the fact.
        zone: the switch's conntrack zones.
        host: where the fact's next hop is, for facts that have one; without it they mean no rule.
    """
    match fact:
        case Answer(address):
            yield from _answer(address)
        case Address(address):
            yield from _address(address, zone)
        case Source():
            yield _source(fact, zone)
        case FragmentSource(address):
            yield rule(Table.CLASSIFY, Priority.SOURCE_FRAGMENT, (*_ip(address, "src"), ANY_FRAGMENT),
                       (Conntrack(zone.service, table=Table.RETURN, nat=Nat()),), kind=Kind.SOURCE)
        case Forward() if host is not None:
            yield from _forward(fact, host)
        case SourceNat(member, virtual_server, address, routed):
            data = packed(address)
            named = virtual_server | routed << Label.ROUTED - Label.VIRTUAL_SERVER
            yield rule(Table.SNAT, Priority.NORMAL,
                       (("eth_type", ETH_IPV4 if len(data) == 4 else ETH_IPV6), ("ct_mark", member),
                        of_virtual_server(virtual_server)),
                       (SetField("eth_src", VIRTUAL_MAC),
                        Conntrack(zone.snat, commit=True, table=Table.FORWARD,
                                  nat=Nat(NAT_SOURCE, data, SNAT_PORTS),
                                  execute=(Load("ct_mark", member),
                                           Load("ct_label", named, Label.VIRTUAL_SERVER, 32)))),
                       kind=Kind.SOURCE, owner=member)
        case Neighbour(address):
            yield from _neighbour(address)
        case Own(address, cidr):
            yield from _own(address, cidr, zone)
        case Gateway(address) if host is not None:
            yield rule(Table.ROUTE, Priority.GATEWAY,
                       (("eth_type", ETH_IPV6 if ":" in address else ETH_IPV4), ("eth_dst", VIRTUAL_MAC)),
                       _deliver(host, routed=True), kind=Kind.ROUTE)
        case Local(address):
            yield rule(Table.VIRTUAL_SERVER, Priority.LOCAL_ADDRESS, _ip(address, "dst"), kind=Kind.ADDRESS,
                       goto=Table.ROUTE)


def host_route(address: str, host: Host) -> Flow:
    """The rule that routes to a host of one of our networks."""
    return rule(Table.ROUTE, Priority.HOST, (*_ip(address, "dst"), ("eth_dst", VIRTUAL_MAC)),
                _deliver(host, routed=True), kind=Kind.ROUTE)


def _deliver(host: Host, routed: bool) -> tuple[Action, ...]:
    return (*((SetField("eth_src", VIRTUAL_MAC), DecrementTtl()) if routed else ()), SetField("eth_dst", host.mac),
            Load("nxm_in_port", 0), Output(host.port))


def _forward(fact: Forward, host: Host) -> Iterator[Flow]:
    version = (("eth_type", ETH_IPV6 if ":" in fact.next_hop else ETH_IPV4),)
    deliver = _deliver(host, fact.routed)
    if fact.virtual_server:
        yield rule(Table.FORWARD, Priority.SPECIAL, (*version, of_virtual_server(fact.virtual_server)), deliver,
                   kind=Kind.FORWARD, owner=fact.virtual_server)
        return
    # Virtual servers on both sides of the balancer may share a member: each connection says what it is.
    here = (*version, ("ct_mark", fact.member))
    if fact.routed:
        yield rule(Table.FORWARD, Priority.ROUTED, (*here, label_bit(Label.ROUTED)), deliver, kind=Kind.FORWARD,
                   owner=fact.member)
    # The fallback is for connections that are older than the networks of the configuration.
    yield rule(Table.FORWARD, Priority.FALLBACK if fact.routed else Priority.NORMAL, here, deliver, kind=Kind.FORWARD,
               owner=fact.member)


def _answer(address: str) -> Iterator[Flow]:
    data = packed(address)
    if len(data) == 4:
        yield rule(Table.CLASSIFY, Priority.ANSWER, (("eth_type", ETH_ARP), ("arp_op", 1), ("arp_tpa", data)), (
            Move("eth_src", "eth_dst", 48), SetField("eth_src", VIRTUAL_MAC), SetField("arp_op", 2),
            Move("arp_sha", "arp_tha", 48), SetField("arp_sha", VIRTUAL_MAC),
            Move("arp_spa", "arp_tpa", 32), SetField("arp_spa", data), Output(IN_PORT)), kind=Kind.ADDRESS)
    else:
        yield rule(Table.CLASSIFY, Priority.ANSWER, (
            ("eth_type", ETH_IPV6), ("ip_proto", ICMP6), ("icmpv6_type", 135), ("icmpv6_code", 0),
            ("ipv6_nd_target", data)), (
            Move("eth_src", "eth_dst", 48), SetField("eth_src", VIRTUAL_MAC),
            Move("ipv6_src", "ipv6_dst", 128), SetField("ipv6_src", data), SetField("icmpv6_type", 136)),
            kind=Kind.ADDRESS, goto=Table.ND_ANSWER)


def _echo(table: Table, priority: Priority, address: str) -> Flow:
    """Answer a ping in the switch."""
    data = packed(address)
    version = 4 if len(data) == 4 else 6
    request, reply = (8, 0) if version == 4 else (128, 129)
    kind = f"icmpv{version}_type"
    return rule(table, priority, (*_ip(address, "dst"), ("ip_proto", ICMP if version == 4 else ICMP6),
                                  (kind, request), (f"icmpv{version}_code", 0)), (
        Move("eth_src", "eth_dst", 48), SetField("eth_src", VIRTUAL_MAC),
        Move(f"ipv{version}_src", f"ipv{version}_dst", len(data) * 8), SetField(f"ipv{version}_src", data),
        SetField(kind, reply), SetTtl(64), Output(IN_PORT)), kind=Kind.ADDRESS)


def _address(address: str, zone: Zones) -> Iterator[Flow]:
    here = _ip(address, "dst")
    through = Conntrack(zone.service, table=Table.SERVE, nat=Nat())
    yield _echo(Table.VIRTUAL_SERVER, Priority.ADDRESS_SERVICE, address)
    if ":" in address:
        errors = [(("ip_proto", ICMP6), ("icmpv6_type", kind)) for kind in (1, 2, 3)]
    else:
        errors = [(("ip_proto", ICMP), ("icmpv4_type", kind)) for kind in (3, 11)]
    for error in errors:
        yield rule(Table.VIRTUAL_SERVER, Priority.ADDRESS_SERVICE, (*here, *error), (through,), kind=Kind.ADDRESS)
    yield rule(Table.VIRTUAL_SERVER, Priority.FRAGMENT, (*here, ANY_FRAGMENT), (through,), kind=Kind.ADDRESS)
    for protocol in (TCP, UDP):
        yield rule(Table.VIRTUAL_SERVER, Priority.PORT_DENIED, _transport(here, protocol), (to_controller(),),
                   kind=Kind.DENIED)


def _source(fact: Source, zone: Zones) -> Flow:
    match = _transport(_ip(fact.address, "src"), fact.protocol, "src", fact.port)
    if fact.rules:
        # What an action reads, Open vSwitch's cache tells apart: a packet for which there is no pair of rules must
        # not leave an entry there that the first packets of a new connection would follow, untranslated.
        ports = "tcp" if fact.protocol == TCP else "udp"
        return rule(Table.CLASSIFY, Priority.SOURCE_RULES, match, (
            Move("ipv6_dst" if ":" in fact.address else "ipv4_dst", Register.PEER_ADDRESS, 32),
            Move(f"{ports}_dst", Register.PEER_PORTS, 16), Move(f"{ports}_src", Register.PEER_PORTS, 16, 0, 16)),
            kind=Kind.SOURCE, goto=Table.RULES_RETURN)
    return rule(Table.CLASSIFY, Priority.SOURCE, match, (Conntrack(zone.service, table=Table.RETURN, nat=Nat()),),
                kind=Kind.SOURCE)


def _neighbour(address: str) -> Iterator[Flow]:
    data = packed(address)
    match: Match = (("eth_type", ETH_ARP), ("arp_spa", data)) if len(data) == 4 else (
        ("eth_type", ETH_IPV6), ("ip_proto", ICMP6), ("icmpv6_type", 136), ("icmpv6_code", 0),
        ("ipv6_nd_target", data))
    yield rule(Table.CLASSIFY, Priority.NEIGHBOUR, match, (to_controller(),), kind=Kind.NEIGHBOUR, goto=Table.L2)


def _own(address: str, cidr: str, zone: Zones) -> Iterator[Flow]:
    here = _ip(address, "dst")
    for protocol in (TCP, UDP):
        yield rule(Table.CLASSIFY, Priority.OWN_SOURCE, _transport(here, protocol),
                   (Conntrack(zone.snat, table=Table.UNSNAT, nat=Nat()),), kind=Kind.ADDRESS)
    yield _echo(Table.ROUTE, Priority.OWN_ADDRESS, address)
    yield rule(Table.ROUTE, Priority.OWN_ADDRESS_OTHER, here, kind=Kind.ADDRESS)
    network = ipaddress.ip_network(cidr)
    version = network.version
    yield rule(Table.ROUTE, Priority.CONNECTED, (
        ("eth_type", ETH_IPV4 if version == 4 else ETH_IPV6), ("eth_dst", VIRTUAL_MAC),
        (f"ipv{version}_dst", network.network_address.packed, network.netmask.packed)), (to_controller(),),
        kind=Kind.LOOKUP)


# ------------------------------------------------------------------ rules of a virtual server


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
                         zone: Zones) -> tuple[list[Flow], SelectGroup | None]:
    """The rules of one virtual server, and the group where a group decides.

    Args:
        virtual_server: the virtual server.
        pool: its pool.
        eligible: members that can have new connections on this switch.
        routes: the balancer's networks.
        zone: the switch's conntrack zones.
    """
    if not virtual_server.admin_state_up:
        return [], None
    number = virtual_server.number
    kind = Kind.VIRTUAL_SERVER
    entry = _entry(virtual_server)
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
    flows.append(rule(Table.SERVE, Priority.NEW, new, (choice,), kind=kind, owner=number,
                      goto=Table.SOURCE_HASH if blocks else None))
    for value, mask, member_number in blocks:
        flows.append(rule(Table.SOURCE_HASH, Priority.NORMAL, (
            of_this, (Register.SLOT, value, mask | 0xFFFFFF00)), (Load(Register.MEMBER, member_number),),
            kind=kind, owner=number, goto=Table.BIND))
    ether = ETH_IPV4 if virtual_server.version == 4 else ETH_IPV6
    flows += [rule(Table.BIND, Priority.NORMAL, (("eth_type", ether), of_this, (Register.MEMBER, member.number)),
                   (commit(virtual_server, member, zone, routed=routes.routed(virtual_server, member)),),
                   kind=kind, owner=number) for member in eligible]
    return flows, group


def _entry(virtual_server: VirtualServer) -> tuple[Priority, Match]:
    """How a client's packet finds its virtual server: the most specific one wins."""
    if not virtual_server.wildcard_address:
        match = _ip(virtual_server.vip_address, "dst")
        priority = Priority.EXACT_ADDRESS if virtual_server.wildcard_port else Priority.EXACT
    else:
        match = (("eth_type", ETH_IPV4 if virtual_server.version == 4 else ETH_IPV6), ("eth_dst", VIRTUAL_MAC))
        priority = Priority.WILDCARD if virtual_server.wildcard_port else Priority.EXACT_PORT
    return priority, _transport(match, virtual_server.protocol.number, "dst", virtual_server.protocol_port)


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
