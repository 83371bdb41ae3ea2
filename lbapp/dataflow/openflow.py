# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Flows, groups and packet-outs as values, and their bytes on the wire.

OpenFlow 1.3 with Open vSwitch's extensions, as far as the pipeline uses them. Ryu can serialize
all of this, at some 770 Python calls a flow-mod; a site of 10 000 virtual servers has 200 000
flows, so the closed set that the pipeline needs is encoded here, and a test holds every kind of
it against Ryu's own bytes. Pure: no socket, no clock, no Ryu.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

VERSION = 4
OFPT_PACKET_OUT = 13
OFPT_FLOW_MOD = 14
OFPT_GROUP_MOD = 15
OFPT_EXPERIMENTER = 4
ONF = 0x4F4E4600
NICIRA = 0x00002320

IN_PORT = 0xFFFFFFF8
NORMAL = 0xFFFFFFFA
FLOOD = 0xFFFFFFFB
CONTROLLER = 0xFFFFFFFD
ANY = 0xFFFFFFFF
NO_BUFFER = 0xFFFFFFFF
MAX_LENGTH = 0xFFFF
"""Of a message. Segments that a host leaves to be cut up later can come close to it."""
SAME_PORT16 = 0xFFF8
"""OFPP_IN_PORT in Nicira's 16-bit actions."""

SEND_FLOW_REMOVED = 1
SELECT = 1


class Field(NamedTuple):
    """A field of a packet or of its metadata: how OXM/NXM names it, and its size in bytes."""

    header: int
    size: int
    experimenter: int | None = None

    def tlv(self, value: int | bytes, mask: int | bytes | None = None) -> bytes:
        """The field with a value, as a match or a set-field carries it."""
        data = value if isinstance(value, bytes) else value.to_bytes(self.size, "big")
        if len(data) != self.size:
            raise ValueError(f"expected {self.size} bytes, got {len(data)}")
        masked = b"" if mask is None else mask if isinstance(mask, bytes) else mask.to_bytes(self.size, "big")
        if masked == b"\xff" * self.size:
            masked = b""  # as a switch reports it
        experimenter = b"" if self.experimenter is None else self.experimenter.to_bytes(4, "big")
        head = self.header | (0x100 if masked else 0) | len(experimenter) + len(data) + len(masked)
        return head.to_bytes(4, "big") + experimenter + data + masked

    @property
    def nxm(self) -> int:
        """The 32-bit header that Nicira's actions name the field by."""
        return self.header | self.size


def _oxm(field: int, size: int) -> Field:
    return Field(0x80000000 | field << 9, size)


def _nxm(vendor_class: int, field: int, size: int) -> Field:
    return Field(vendor_class << 16 | field << 9, size)


FIELDS: dict[str, Field] = {
    "in_port": _oxm(0, 4), "eth_dst": _oxm(3, 6), "eth_src": _oxm(4, 6), "eth_type": _oxm(5, 2),
    "ip_proto": _oxm(10, 1), "ipv4_src": _oxm(11, 4), "ipv4_dst": _oxm(12, 4),
    "tcp_src": _oxm(13, 2), "tcp_dst": _oxm(14, 2), "udp_src": _oxm(15, 2), "udp_dst": _oxm(16, 2),
    "icmpv4_type": _oxm(19, 1), "icmpv4_code": _oxm(20, 1),
    "arp_op": _oxm(21, 2), "arp_spa": _oxm(22, 4), "arp_tpa": _oxm(23, 4), "arp_sha": _oxm(24, 6),
    "arp_tha": _oxm(25, 6), "ipv6_src": _oxm(26, 16), "ipv6_dst": _oxm(27, 16),
    "icmpv6_type": _oxm(29, 1), "icmpv6_code": _oxm(30, 1), "ipv6_nd_target": _oxm(31, 16),
    "ipv6_nd_sll": _oxm(32, 6), "ipv6_nd_tll": _oxm(33, 6),
    "nd_reserved": _nxm(0x1000, 1, 4),
    "nd_options_type": _nxm(0x1000, 2, 1),
    "nxm_in_port": _nxm(0, 0, 2), "ip_frag": _nxm(1, 26, 1), "tcp_flags": Field(0xFFFF5400, 2, experimenter=ONF),
    "ct_state": _nxm(1, 105, 4), "ct_zone": _nxm(1, 106, 2), "ct_mark": _nxm(1, 107, 4), "ct_label": _nxm(1, 108, 16),
    "ct_nw_proto": _nxm(1, 119, 1), "ct_nw_src": _nxm(1, 120, 4), "ct_nw_dst": _nxm(1, 121, 4),
    "ct_ipv6_src": _nxm(1, 122, 16), "ct_ipv6_dst": _nxm(1, 123, 16),
    "ct_tp_src": _nxm(1, 124, 2), "ct_tp_dst": _nxm(1, 125, 2),
    **{f"reg{number}": _nxm(1, number, 4) for number in range(8)},
}

Match = tuple[tuple[str, int | bytes] | tuple[str, int | bytes, int | bytes], ...]


def encode_match(match: Match) -> bytes:
    """The bytes of an ofp_match, padded."""
    body = b"".join([FIELDS[entry[0]].tlv(*entry[1:]) for entry in match])
    length = 4 + len(body)
    return struct.pack("!HH", 1, length) + body + bytes(-length % 8)


# ------------------------------------------------------------------ actions


class Output(NamedTuple):
    """Send to a port; to the controller with ``max_length`` bytes."""

    port: int
    max_length: int = 0

    def encode(self) -> bytes:
        return struct.pack("!HHIH6x", 0, 16, self.port, self.max_length)


class OutputRegister(NamedTuple):
    """Send to the port whose number stands in the low 16 bits of a register."""

    field: str

    def encode(self) -> bytes:
        return struct.pack("!HHIHHIH6x", 0xFFFF, 24, NICIRA, 15, 15, FIELDS[self.field].nxm, 0)


class Group(NamedTuple):
    """Let a group decide."""

    group: int

    def encode(self) -> bytes:
        return struct.pack("!HHI", 22, 8, self.group)


class SetField(NamedTuple):
    """Rewrite a whole field."""

    field: str
    value: int | bytes

    def encode(self) -> bytes:
        tlv = FIELDS[self.field].tlv(self.value)
        length = 4 + len(tlv)
        return struct.pack("!HH", 25, length + -length % 8) + tlv + bytes(-length % 8)


class SetTtl(NamedTuple):
    """Set the IP TTL or hop limit."""

    ttl: int

    def encode(self) -> bytes:
        return struct.pack("!HHB3x", 23, 8, self.ttl)


class DecrementTtl(NamedTuple):
    """Decrement the IP TTL or hop limit; a packet whose TTL runs out goes no further."""

    def encode(self) -> bytes:
        return struct.pack("!HH4x", 24, 8)


class Load(NamedTuple):
    """Write ``bits`` bits of a field from ``offset`` on (NXAST_REG_LOAD)."""

    field: str
    value: int
    offset: int = 0
    bits: int = 0

    def encode(self) -> bytes:
        field = FIELDS[self.field]
        bits = self.bits or field.size * 8
        return struct.pack("!HHIHHIQ", 0xFFFF, 24, NICIRA, 7, self.offset << 6 | bits - 1, field.nxm, self.value)


class Move(NamedTuple):
    """Copy ``bits`` bits of one field into another (NXAST_REG_MOVE)."""

    source: str
    destination: str
    bits: int
    source_offset: int = 0
    destination_offset: int = 0

    def encode(self) -> bytes:
        return struct.pack("!HHIHHHHII", 0xFFFF, 24, NICIRA, 6, self.bits, self.source_offset,
                           self.destination_offset, FIELDS[self.source].nxm, FIELDS[self.destination].nxm)


class Resubmit(NamedTuple):
    """Look the packet up in another table, then go on here."""

    table: int

    def encode(self) -> bytes:
        return struct.pack("!HHIHHB3x", 0xFFFF, 16, NICIRA, 14, SAME_PORT16, self.table)


class FinTimeout(NamedTuple):
    """Shorten the rule's own timeouts once a FIN or RST has matched it, in seconds."""

    idle: int
    hard: int

    def encode(self) -> bytes:
        return struct.pack("!HHIHHH2x", 0xFFFF, 16, NICIRA, 19, self.idle, self.hard)


class MultipathSource(NamedTuple):
    """Write ``hash(source address) mod slots`` into a field (NXAST_MULTIPATH, nw_src, modulo_n)."""

    field: str
    slots: int

    def encode(self) -> bytes:
        return struct.pack("!HHIHHH2xHHI2xHI", 0xFFFF, 32, NICIRA, 10, 4, 0, 0, self.slots - 1, 0, 31,
                           FIELDS[self.field].nxm)


class MultipathFlow(NamedTuple):
    """Write ``hash(addresses, ports) mod slots`` into a field (NXAST_MULTIPATH, symmetric_l3l4+udp, modulo_n).

    A select group without further words hashes no ports of UDP; this does.
    """

    field: str
    slots: int

    def encode(self) -> bytes:
        return struct.pack("!HHIHHH2xHHI2xHI", 0xFFFF, 32, NICIRA, 10, 3, 0, 0, self.slots - 1, 0, 31,
                           FIELDS[self.field].nxm)


NAT_SOURCE, NAT_DESTINATION = 1, 2


class Nat(NamedTuple):
    """Translate in a ct action. ``address`` None and ``port`` 0 with neither flag: undo what conntrack knows.

    ``ports`` is a range (low, high); (0, 0) leaves the port alone.
    """

    direction: int = 0
    address: bytes | None = None
    ports: tuple[int, int] = (0, 0)

    def encode(self) -> bytes:
        present, data = 0, b""
        if self.address is not None:
            present |= 1 if len(self.address) == 4 else 4
            data += self.address
        low, high = self.ports
        if low:
            present |= 16
            data += struct.pack("!H", low)
            if high != low:
                present |= 32
                data += struct.pack("!H", high)
        length = 16 + len(data)
        return (struct.pack("!HHIH2xHH", 0xFFFF, length + -length % 8, NICIRA, 36, self.direction, present) + data
                + bytes(-length % 8))


class Conntrack(NamedTuple):
    """Send through conntrack in ``zone``; go on in ``table`` (None: not). ``execute`` writes mark and label."""

    zone: int
    commit: bool = False
    table: int | None = None
    nat: Nat | None = None
    execute: tuple[Load | Move, ...] = ()

    def encode(self) -> bytes:
        nested = (self.nat.encode() if self.nat is not None else b"") + b"".join(a.encode() for a in self.execute)
        table = 0xFF if self.table is None else self.table
        return struct.pack("!HHIHHIHB3xH", 0xFFFF, 24 + len(nested), NICIRA, 35, int(self.commit), 0, self.zone,
                           table, 0) + nested


Action = (Output | OutputRegister | Group | SetField | SetTtl | DecrementTtl | Load | Move | Resubmit | FinTimeout
          | MultipathSource | MultipathFlow | Conntrack)


def encode_actions(actions: Iterable[Action]) -> bytes:
    """The bytes of an action list."""
    return b"".join([action.encode() for action in actions])


# ------------------------------------------------------------------ messages


class Flow(NamedTuple):
    """A rule of a table. ``goto`` is the table that goes on after the actions."""

    table: int
    priority: int
    match: Match
    actions: tuple[Action, ...]
    cookie: int
    goto: int | None = None
    idle_timeout: int = 0
    hard_timeout: int = 0
    flags: int = 0

    def instructions(self) -> bytes:
        data = b""
        if self.actions:
            actions = encode_actions(self.actions)
            data = struct.pack("!HH4x", 4, 8 + len(actions)) + actions
        if self.goto is not None:
            data += struct.pack("!HHB3x", 1, 8, self.goto)
        return data

    def body(self, match: bytes | None = None) -> bytes:
        """All that makes the rule what it is, without its cookie."""
        return (struct.pack("!HHHH", self.idle_timeout, self.hard_timeout, self.priority, self.flags)
                + (encode_match(self.match) if match is None else match) + self.instructions())


class Bucket(NamedTuple):
    """One choice of a select group."""

    weight: int
    actions: tuple[Action, ...]

    def encode(self) -> bytes:
        actions = encode_actions(self.actions)
        return struct.pack("!HHII4x", 16 + len(actions), self.weight, ANY, ANY) + actions


class SelectGroup(NamedTuple):
    """A select group (in Open vSwitch: by a hash of the connection, in proportion to the weights)."""

    group: int
    buckets: tuple[Bucket, ...]


def digest(flow: Flow) -> int:
    """24 bits that tell one rule's content from another's: part of its cookie."""
    return int.from_bytes(hashlib.blake2b(flow.body(), digest_size=3).digest(), "big")


def message(kind: int, body: bytes, xid: int = 0) -> bytes:
    """An OpenFlow message with its header."""
    return struct.pack("!BBHI", VERSION, kind, 8 + len(body), xid) + body


def add_flow(flow: Flow, xid: int = 0) -> bytes:
    """A flow-mod that adds a rule, or replaces the one with the same table, match and priority."""
    return message(OFPT_FLOW_MOD, struct.pack(
        "!QQBBHHHIIIH2x", flow.cookie, 0, flow.table, 0, flow.idle_timeout, flow.hard_timeout, flow.priority,
        NO_BUFFER, 0, 0, flow.flags) + encode_match(flow.match) + flow.instructions(), xid)


def delete_flow(table: int, priority: int, match: bytes, xid: int = 0) -> bytes:
    """A flow-mod that deletes exactly one rule; ``match`` is an encoded, padded ofp_match."""
    return message(OFPT_FLOW_MOD, struct.pack(
        "!QQBBHHHIIIH2x", 0, 0, table, 4, 0, 0, priority, NO_BUFFER, ANY, ANY, 0) + match, xid)


def delete_by_cookie(cookie: int, mask: int, xid: int = 0) -> bytes:
    """A flow-mod that deletes every rule whose cookie matches under a mask, in all tables."""
    return message(OFPT_FLOW_MOD, struct.pack(
        "!QQBBHHHIIIH2x", cookie, mask, 0xFF, 3, 0, 0, 0, NO_BUFFER, ANY, ANY, 0) + encode_match(()), xid)


GROUP_ADD, GROUP_MODIFY, GROUP_DELETE = 0, 1, 2


def group_mod(command: int, group: SelectGroup, xid: int = 0) -> bytes:
    """Add, replace or delete a select group."""
    buckets = b"" if command == GROUP_DELETE else b"".join(bucket.encode() for bucket in group.buckets)
    return message(OFPT_GROUP_MOD, struct.pack("!HBxI", command, SELECT, group.group) + buckets, xid)


def packet_out(in_port: int, actions: bytes, frame: bytes, xid: int = 0) -> bytes:
    """A packet-out with encoded actions; nothing where the frame is too large for one (its sender repeats it)."""
    length = 24 + len(actions) + len(frame)
    if length > MAX_LENGTH:
        return b""
    return b"".join((struct.pack("!BBHIIIH6x", VERSION, OFPT_PACKET_OUT, length, xid, NO_BUFFER, in_port, len(actions)),
                     actions, frame))


def conntrack_flush(zone: int, protocol: int, source: bytes, destination: bytes, source_port: int,
                    destination_port: int, xid: int = 0) -> bytes:
    """Forget a connection (NXT_CT_FLUSH, Open vSwitch 3.1): its tuple is that of the client's packets as they came."""
    wide = [address if len(address) == 16 else bytes(10) + b"\xff\xff" + address for address in (source, destination)]
    nested = b"".join(struct.pack("!HH16s4x", kind, 20, address) for kind, address in enumerate(wide)) + b"".join(
        struct.pack("!HHH2x", kind, 8, port) for kind, port in ((2, source_port), (3, destination_port)))
    return message(OFPT_EXPERIMENTER, struct.pack("!IIB7xHH4x", NICIRA, 32, protocol, 0, 8 + len(nested)) + nested
                   + struct.pack("!HHH2x", 2, 8, zone), xid)


BUNDLE_OPEN, BUNDLE_COMMIT, BUNDLE_COMMITTED, BUNDLE_DISCARD = 0, 4, 5, 6
BUNDLE_ATOMIC_ORDERED = 3


def bundle_control(bundle: int, kind: int, xid: int = 0) -> bytes:
    """Open, commit or discard a bundle (ONF extension 230, which Open vSwitch speaks in OpenFlow 1.3)."""
    return message(OFPT_EXPERIMENTER, struct.pack("!IIIHH", ONF, 2300, bundle, kind, BUNDLE_ATOMIC_ORDERED), xid)


def bundle_add(bundle: int, inner: bytes, xid: int = 0) -> bytes:
    """Put a message into a bundle; both carry the same transaction id, as they must."""
    inner = inner[:4] + struct.pack("!I", xid) + inner[8:]
    return message(OFPT_EXPERIMENTER, struct.pack("!IIIHH", ONF, 2301, bundle, 0, BUNDLE_ATOMIC_ORDERED) + inner, xid)
