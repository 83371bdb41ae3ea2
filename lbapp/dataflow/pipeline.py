# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The switch pipeline, declared once: tables, registers, priorities, cookies, conntrack zones.

Theory of operation
-------------------
A frame starts in CLASSIFY. What is not ours leaves by L2, where the switch learns and forwards as
any switch does. A client's packet to a virtual address goes to VIRTUAL_SERVER (the most specific
virtual server wins), through conntrack, and arrives in SERVE. There ``ct_mark`` is the number of
the member of an established connection: BOUND sends it on to FORWARD. A new connection has no mark
yet: the switch decides (a select group, or the SOURCE_HASH table) and BIND commits, or the packet
goes to the controller (QUERY), whose packet-out (REPLY) commits. A member's packet is recognised
by its source, has its translation undone by conntrack, and leaves by RESTORE as ``ct_label`` says:
the client's MAC and port stand there, so that rules never grow with connections.

The second style (``state: rules``) has one rule pair a connection, in RULES and RULES_RETURN.

Every rule is made in ``flows.py`` and ``serving.py`` and is held against :data:`DECLARATION` by the tests. This
module does no I/O and knows nothing of the configuration.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from lbapp.dataflow.openflow import (
    Action,
    Conntrack,
    DecrementTtl,
    FinTimeout,
    Flow,
    Group,
    Load,
    Match,
    Move,
    MultipathFlow,
    MultipathSource,
    Output,
    OutputRegister,
    Resubmit,
    SetField,
    SetTtl,
    digest,
)

VIRTUAL_MAC = bytes.fromhex("026c62000001")
"""The MAC of every virtual address and of the balancer's own addresses, the same on all switches."""


def probe_mac(switch: int) -> bytes:
    """The MAC that a switch's own ARP and neighbour probes carry, so that answers come back to that switch."""
    return b"\x02\x6c\x63" + (switch ^ switch >> 24 ^ switch >> 48).to_bytes(8, "big")[-3:]


class Table(enum.IntEnum):
    """Tables in the order a packet can meet them."""

    CLASSIFY = 0
    RULES_RETURN = 1
    UNSNAT = 2
    RETURN = 3
    RESTORE = 4
    VIRTUAL_SERVER = 10
    ND_ANSWER = 11
    RULES = 12
    SERVE = 20
    SOURCE_HASH = 21
    BIND = 30
    BOUND = 31
    SNAT = 35
    FORWARD = 40
    ROUTE = 50
    L2 = 60


class Register(enum.StrEnum):
    """Registers and what they hold while a packet is in the pipeline."""

    MEMBER = "reg1"
    VIRTUAL_SERVER = "reg2"
    PORT = "reg3"
    SLOT = "reg4"
    PEER_ADDRESS = "reg5"
    PEER_PORTS = "reg6"


class Label(enum.IntEnum):
    """Bit offsets in ``ct_label``: the return path and the connection's identity."""

    CLIENT_MAC = 0
    CLIENT_PORT = 48
    SERIAL = 64
    VIRTUAL_SERVER = 96
    TRACKED = 120
    SNAT = 121
    ROUTED = 122


class Kind(enum.IntEnum):
    """What a rule is for: a byte of its cookie. A packet-in carries the cookie, and so its meaning."""

    BASE = 1
    ADDRESS = 2
    VIRTUAL_SERVER = 3
    SOURCE = 4
    FORWARD = 5
    ROUTE = 6
    CONNECTION_IN = 8
    CONNECTION_OUT = 9
    QUERY = 16
    DENIED = 17
    FULL = 18
    GONE = 19
    CLOSE = 20
    NEIGHBOUR = 21
    LOOKUP = 22
    RELAY = 23


PUNTS = frozenset({Kind.QUERY, Kind.DENIED, Kind.FULL, Kind.GONE, Kind.CLOSE, Kind.NEIGHBOUR, Kind.LOOKUP,
                   Kind.RELAY})
"""Kinds whose rules send packets to the controller."""

COOKIE_MAGIC = 0x1B
COOKIE_MASK = 0xFF << 56
OWNER_MASK = (1 << 24) - 1


def cookie(kind: Kind, owner: int = 0) -> int:
    """A cookie without its digest: magic, kind, owner (the number of a virtual server or member)."""
    return COOKIE_MAGIC << 56 | kind << 48 | owner << 24


def connection_cookie(kind: Kind, serial: int) -> int:
    """The cookie of one connection's rule: its serial in the low 32 bits."""
    return COOKIE_MAGIC << 56 | kind << 48 | serial


ANY_CONNECTION = (1 << 64) - 1 ^ 1 << 48
"""A cookie mask that takes both directions of a connection: their kinds differ in one bit."""

EVERY_CONNECTION = ANY_CONNECTION & ~0xFFFFFFFF
"""The same of all connections, whatever their serials."""


def kind_of(value: int) -> Kind | None:
    """The kind that a cookie names; None where the rule is not ours."""
    if value >> 56 != COOKIE_MAGIC:
        return None
    try:
        return Kind(value >> 48 & 0xFF)
    except ValueError:
        return None


def owner_of(value: int) -> int:
    """The owner's number in a cookie."""
    return value >> 24 & OWNER_MASK


def group_number(virtual_server: int) -> int:
    """The group of a virtual server: other applications' groups on the switch have other numbers."""
    return COOKIE_MAGIC << 24 | virtual_server


def is_group_of_ours(number: int) -> bool:
    """Whether :func:`group_number` gave a group its number."""
    return number >> 24 == COOKIE_MAGIC


class Zones(NamedTuple):
    """A switch's conntrack zones. Bridges of one userspace Open vSwitch share conntrack: each has its own."""

    service: int
    snat: int


def zones(switch: int) -> Zones:
    """The zones of a switch, from its datapath id alone: the same after a restart of the controller."""
    folded = (switch ^ switch >> 15 ^ switch >> 30 ^ switch >> 45) & 0x7FFF
    base = folded * 2 if folded else 0xFFFE
    return Zones(base, base + 1)


class Priority(enum.IntEnum):
    """Priorities, named by what they decide. Greater wins, within a table."""

    DEFAULT = 0
    ANSWER = 900
    DUPLICATE_ADDRESS_DETECTION = 950
    PROBE_REPLY = 810
    NEIGHBOUR = 800
    OWN_SOURCE = 700
    SOURCE_RELAYED = 620
    SOURCE_RULES = 610
    SOURCE = 600
    SOURCE_FRAGMENT = 590
    ICMP_ERROR = 500
    # VIRTUAL_SERVER
    FRAGMENT = 450
    EXACT = 400
    ADDRESS_SERVICE = 350
    EXACT_ADDRESS = 300
    PORT_DENIED = 250
    LOCAL_ADDRESS = 200
    EXACT_PORT = 150
    WILDCARD = 100
    # SERVE, RETURN, BOUND, FORWARD
    INVALID = 901
    CLOSING = 801
    REPLY = 701
    STRANGER = 511
    NEW = 501
    OUT_OF_NOWHERE = 495
    NO_SERVER = 490
    SPECIAL = 401
    ROUTED = 20
    NORMAL = 10
    FALLBACK = 5
    # ROUTE
    OWN_ADDRESS = 502
    OWN_ADDRESS_OTHER = 491
    HOST = 402
    CONNECTED = 301
    GATEWAY = 201


class TableRule(NamedTuple):
    """What a table's rules may match, do, and go on to."""

    fields: frozenset[str]
    actions: frozenset[type]
    goto: frozenset[Table]


_L3 = frozenset({"in_port", "eth_type", "ip_proto", "ipv4_src", "ipv4_dst", "ipv6_src", "ipv6_dst", "eth_dst",
                 "ip_frag"})
_L4 = frozenset({"tcp_src", "tcp_dst", "udp_src", "udp_dst"})
_ICMP = frozenset({"icmpv4_type", "icmpv4_code", "icmpv6_type", "icmpv6_code"})
_ARP = frozenset({"arp_op", "arp_spa", "arp_tpa", "ipv6_nd_target"})
_ANSWER = frozenset({Move, SetField, SetTtl, Output})
_DELIVER = frozenset({SetField, DecrementTtl, Load, Output})

DECLARATION: dict[Table, TableRule] = {
    Table.CLASSIFY: TableRule(_L3 | _L4 | _ICMP | _ARP, _ANSWER | {Conntrack},
                              frozenset({Table.RULES_RETURN, Table.VIRTUAL_SERVER, Table.ND_ANSWER, Table.L2})),
    Table.RULES_RETURN: TableRule(_L3 | _L4, _DELIVER | {Conntrack, FinTimeout}, frozenset()),
    Table.UNSNAT: TableRule(frozenset({"ct_state", "eth_type"}), frozenset({Conntrack}),
                             frozenset({Table.VIRTUAL_SERVER})),
    Table.RETURN: TableRule(frozenset({"ct_state", "ct_label", "eth_type", "ip_proto", "tcp_flags"}),
                            frozenset({Output}), frozenset({Table.RESTORE, Table.VIRTUAL_SERVER})),
    Table.RESTORE: TableRule(frozenset({"ct_label", "eth_type"}),
                             frozenset({Move, SetField, Load, OutputRegister, DecrementTtl}), frozenset()),
    Table.VIRTUAL_SERVER: TableRule(_L3 | _L4 | _ICMP, _ANSWER | {Load, Conntrack},
                                    frozenset({Table.RULES, Table.ROUTE})),
    Table.ND_ANSWER: TableRule(frozenset({"eth_type", "ip_proto", "icmpv6_type", "icmpv6_code"}), _ANSWER, frozenset()),
    Table.RULES: TableRule(_L3 | _L4 | {Register.VIRTUAL_SERVER}, _DELIVER | {FinTimeout}, frozenset()),
    Table.SERVE: TableRule(
        frozenset({"ct_state", "ct_mark", "ct_label", "eth_type", "ip_proto", "tcp_flags", Register.VIRTUAL_SERVER}),
        frozenset({Output, Group, MultipathSource, MultipathFlow}), frozenset({Table.BOUND, Table.SOURCE_HASH})),
    Table.SOURCE_HASH: TableRule(frozenset({Register.VIRTUAL_SERVER, Register.SLOT}), frozenset({Load}),
                                 frozenset({Table.BIND})),
    Table.BIND: TableRule(frozenset({Register.VIRTUAL_SERVER, Register.MEMBER, "eth_type"}), frozenset({Conntrack}),
                          frozenset()),
    Table.BOUND: TableRule(frozenset({"ct_mark", "ct_label"}), frozenset({Output}),
                           frozenset({Table.SNAT, Table.FORWARD})),
    Table.SNAT: TableRule(frozenset({"ct_mark", "ct_label", "eth_type"}), frozenset({SetField, Conntrack}),
                          frozenset()),
    Table.FORWARD: TableRule(frozenset({"ct_mark", "ct_label", "eth_type"}), _DELIVER, frozenset()),
    Table.ROUTE: TableRule(_L3 | _ICMP, _DELIVER | _ANSWER, frozenset({Table.L2})),
    Table.L2: TableRule(frozenset({"eth_dst"}), frozenset({Output}), frozenset()),
}
"""What each table's rules may be. Group buckets may load MEMBER and resubmit to BIND."""

BUCKET_ACTIONS = frozenset({Load, Resubmit})


class UndeclaredError(ValueError):
    """A rule does something that its table is not declared to do."""


def check(flow: Flow) -> None:
    """Hold a rule against the declaration.

    Raises:
        UndeclaredError: a field, an action or a next table that the table is not declared to have.
    """
    rule = DECLARATION[Table(flow.table)]
    for entry in flow.match:
        if entry[0] not in rule.fields:
            raise UndeclaredError(f"{Table(flow.table).name}: may not match {entry[0]}")
    for action in flow.actions:
        if type(action) not in rule.actions:
            raise UndeclaredError(f"{Table(flow.table).name}: may not do {action}")
        if isinstance(action, Conntrack) and action.table is not None and action.table <= flow.table:
            raise UndeclaredError(f"{Table(flow.table).name}: goes back to table {action.table}")
    if flow.goto is not None and Table(flow.goto) not in rule.goto:
        raise UndeclaredError(f"{Table(flow.table).name}: may not go to {Table(flow.goto).name}")
    if kind_of(flow.cookie) is None:
        raise UndeclaredError(f"{Table(flow.table).name}: rule without a cookie of ours")


def rule(table: Table, priority: Priority, match: Match,
         actions: tuple[Action, ...] = (), *, kind: Kind, owner: int = 0, goto: Table | None = None) -> Flow:
    """A standing rule: one without timeouts, whose cookie says what it is and digests its content."""
    flow = Flow(int(table), int(priority), match, actions, 0, None if goto is None else int(goto))
    return flow._replace(cookie=cookie(kind, owner) | digest(flow))
