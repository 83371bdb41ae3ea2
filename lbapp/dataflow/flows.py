# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The rules that make a switch a load balancer: those that always stand, and those of each fact.

What a fact is, and which a virtual server needs, is in ``facts.py``; the rules of a virtual
server alone are in ``serving.py``. Pure functions, no state.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from lbapp.control.messages import Host
from lbapp.dataflow.facts import (
    Address,
    Answer,
    Fact,
    Forward,
    FragmentSource,
    Gateway,
    Local,
    Neighbour,
    Own,
    Source,
    SourceNat,
)
from lbapp.dataflow.matches import (
    ANY_FRAGMENT,
    ANY_RST,
    CT_INVALID,
    CT_REPLY,
    ETH_ARP,
    ETH_IPV4,
    ETH_IPV6,
    ICMP,
    ICMP6,
    TCP,
    UDP,
    ip_match,
    label_bit,
    of_virtual_server,
    packed,
    to_controller,
    to_relay,
    transport_match,
)
from lbapp.dataflow.openflow import (
    IN_PORT,
    NAT_SOURCE,
    NORMAL,
    Action,
    Conntrack,
    DecrementTtl,
    Flow,
    Load,
    Match,
    Move,
    Nat,
    Output,
    OutputRegister,
    SetField,
    SetTtl,
)
from lbapp.dataflow.pipeline import VIRTUAL_MAC, Kind, Label, Priority, Register, Table, Zones, rule

TARGET_LINK_LAYER_ADDRESS = 2
SOLICITED_OVERRIDE = 0x60000000
SNAT_PORTS = (1024, 65535)


def _restore(routed: bool) -> tuple[Action, ...]:
    return (
        Move("ct_label", "eth_dst", 48, Label.CLIENT_MAC, 0), SetField("eth_src", VIRTUAL_MAC),
        *((DecrementTtl(),) if routed else ()),
        Move("ct_label", Register.PORT, 16, Label.CLIENT_PORT, 0), Load("nxm_in_port", 0),
        OutputRegister(Register.PORT),
    )


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
    for ether in (ETH_IPV4, ETH_IPV6):
        # Of no connection: it ends nothing, and is not to be answered.
        yield base(Table.SERVE, Priority.STRANGER, (("eth_type", ether), ("ip_proto", TCP), ("ct_mark", 0), ANY_RST))
    yield base(Table.SERVE, Priority.NO_SERVER, (("ct_mark", 0),))
    yield base(Table.SERVE, Priority.DEFAULT, (), goto=Table.BOUND)
    yield base(Table.BOUND, Priority.INVALID, (("ct_mark", 0),), to_controller(), kind=Kind.FULL)
    yield base(Table.BOUND, Priority.SPECIAL, (label_bit(Label.SNAT),), goto=Table.SNAT)
    yield base(Table.BOUND, Priority.DEFAULT, (), goto=Table.FORWARD)
    yield base(Table.FORWARD, Priority.DEFAULT, (), to_controller(), kind=Kind.GONE)
    yield base(Table.ROUTE, Priority.DEFAULT, (), goto=Table.L2)
    yield base(Table.L2, Priority.NORMAL, (("eth_dst", VIRTUAL_MAC),))
    yield base(Table.L2, Priority.DEFAULT, (), Output(NORMAL))


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
            yield rule(Table.CLASSIFY, Priority.SOURCE_FRAGMENT, (*ip_match(address, "src"), ANY_FRAGMENT),
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
            yield rule(Table.VIRTUAL_SERVER, Priority.LOCAL_ADDRESS, ip_match(address, "dst"), kind=Kind.ADDRESS,
                       goto=Table.ROUTE)


def host_route(address: str, host: Host) -> Flow:
    """The rule that routes to a host of one of our networks."""
    return rule(Table.ROUTE, Priority.HOST, (*ip_match(address, "dst"), ("eth_dst", VIRTUAL_MAC)),
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
    return rule(table, priority, (*ip_match(address, "dst"), ("ip_proto", ICMP if version == 4 else ICMP6),
                                  (kind, request), (f"icmpv{version}_code", 0)), (
        Move("eth_src", "eth_dst", 48), SetField("eth_src", VIRTUAL_MAC),
        Move(f"ipv{version}_src", f"ipv{version}_dst", len(data) * 8), SetField(f"ipv{version}_src", data),
        SetField(kind, reply), SetTtl(64), Output(IN_PORT)), kind=Kind.ADDRESS)


def _address(address: str, zone: Zones) -> Iterator[Flow]:
    here = ip_match(address, "dst")
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
        yield rule(Table.VIRTUAL_SERVER, Priority.PORT_DENIED, transport_match(here, protocol), (to_controller(),),
                   kind=Kind.DENIED)


def _source(fact: Source, zone: Zones) -> Flow:
    match = transport_match(ip_match(fact.address, "src"), fact.protocol, "src", fact.port)
    if fact.relayed:
        return rule(Table.CLASSIFY, Priority.SOURCE_RELAYED, match, (to_relay(),), kind=Kind.RELAY)
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
    here = ip_match(address, "dst")
    for protocol in (TCP, UDP):
        yield rule(Table.CLASSIFY, Priority.OWN_SOURCE, transport_match(here, protocol),
                   (Conntrack(zone.snat, table=Table.UNSNAT, nat=Nat()),), kind=Kind.ADDRESS)
    yield _echo(Table.ROUTE, Priority.OWN_ADDRESS, address)
    yield rule(Table.ROUTE, Priority.OWN_ADDRESS_OTHER, here, kind=Kind.ADDRESS)
    network = ipaddress.ip_network(cidr)
    version = network.version
    yield rule(Table.ROUTE, Priority.CONNECTED, (
        ("eth_type", ETH_IPV4 if version == 4 else ETH_IPV6), ("eth_dst", VIRTUAL_MAC),
        (f"ipv{version}_dst", network.network_address.packed, network.netmask.packed)), (to_controller(),),
        kind=Kind.LOOKUP)
