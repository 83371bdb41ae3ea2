# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""003's messages as OpenFlow carries them: decode what a switch sends, encode what it is told.

QUERY is a packet-in, REPLY one packet-out (with ``state: rules`` two flow-mods more), DELETE is
flow-removed. The cookie of the punting rule says what a packet-in means. Pure: bytes and values.

Reading this way round: ``decode_packet_in`` → control segment → ``ReplyEncoder.encode``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lbapp.config.model import Configuration, Member, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.messages import Closed, Error, FlowSignature, Host, Query, Reason, Reply
from lbapp.dataflow import frames
from lbapp.dataflow.matches import ETH_IPV4, ETH_IPV6, TCP, packed
from lbapp.dataflow.openflow import (
    FIELDS,
    FLOOD,
    MAX_LENGTH,
    SEND_FLOW_REMOVED,
    Action,
    DecrementTtl,
    FinTimeout,
    Flow,
    Load,
    Output,
    Resubmit,
    SetField,
    add_flow,
    conntrack_flush,
    encode_actions,
    packet_out,
)
from lbapp.dataflow.pipeline import (
    OWNER_MASK,
    VIRTUAL_MAC,
    Kind,
    Label,
    Priority,
    Register,
    Table,
    connection_cookie,
    kind_of,
    owner_of,
    probe_mac,
    zones,
)
from lbapp.dataflow.serving import commit

OFPP_CONTROLLER = 0xFFFFFFFD
FIN_IDLE_TIMEOUT = 2
FIN_HARD_TIMEOUT = 10
_IN_PORT = 0x80000004
_CT_MARK, _CT_LABEL, _REG2 = (FIELDS[name].nxm for name in ("ct_mark", "ct_label", Register.VIRTUAL_SERVER))
_CT_DESTINATION, _CT_DESTINATION6, _CT_PORT = (FIELDS[name].nxm for name in ("ct_nw_dst", "ct_ipv6_dst", "ct_tp_dst"))


class PacketIn(NamedTuple):
    """A punted packet. ``cookie`` is the punting rule's."""

    cookie: int
    in_port: int
    frame: bytes
    match: bytes


class Answered(NamedTuple):
    """A query that came as a packet-in, with its answer: the client's packet, with a whole checksum, and parsed."""

    reply: Reply
    frame: bytes
    packet: frames.Packet


class Held(NamedTuple):
    """An open connection in a fast path. ``signature`` is the client's; times are in seconds, counts of both ways."""

    signature: FlowSignature
    virtual_server: int
    member: int
    serial: int
    decided: bool
    age: float
    idle: float
    packets: int
    bytes: int


class TruncatedError(ValueError):
    """A message that is shorter than it says."""


def decode_packet_in(data: bytes) -> PacketIn:
    """Read an OFPT_PACKET_IN.

    Raises:
        TruncatedError: the message is shorter than its own lengths, or has no in_port.
    """
    size = len(data)
    if size < 34:
        raise TruncatedError("packet-in too short")
    match_length = data[26] << 8 | data[27]
    start = 24 + (match_length + 7 & ~7) + 2
    if match_length < 4 or start > size:
        raise TruncatedError("packet-in match length")
    if data[28:32] == b"\x80\x00\x00\x04" and match_length >= 12:
        port = int.from_bytes(data[32:36], "big")
    else:
        found = oxm_field(data[28:24 + match_length], _IN_PORT)
        if found is None:
            raise TruncatedError("packet-in without in_port")
        port = int.from_bytes(found, "big")
    return PacketIn(int.from_bytes(data[16:24], "big"), port, data[start:], data[28:24 + match_length])


def oxm_field(oxms: bytes, header: int) -> bytes | None:
    """The value of a field in a list of OXM TLVs, or None."""
    offset = 0
    while offset + 4 <= len(oxms):
        length = oxms[offset + 3]
        if offset + 4 + length > len(oxms):
            return None
        found = int.from_bytes(oxms[offset:offset + 4], "big")
        if found & ~0xFF & ~0x100 == header & ~0xFF:
            size = header & 0xFF
            return oxms[offset + 4:offset + 4 + size] if length >= size else None
        offset += 4 + length
    return None


def query(punted: PacketIn, packet: frames.Packet, switch: int, serial: int) -> Query:
    """A packet-in of a rule for queries, as QUERY."""
    kind = punted.cookie >> 48 & 0xFF
    number = punted.cookie >> 24 & OWNER_MASK if kind == Kind.QUERY else 0
    return Query(serial, switch, punted.in_port, packet.source_mac, packet.signature, number, packet.tcp_flags)


class ConnectionMark(NamedTuple):
    """What conntrack's mark and label say of a punted packet's connection."""

    member: int
    serial: int
    virtual_server: int


def connection_mark(punted: PacketIn) -> ConnectionMark:
    """Read mark and label out of a packet-in's metadata; zeros where they are missing."""
    mark, label = oxm_field(punted.match, _CT_MARK), oxm_field(punted.match, _CT_LABEL)
    bits = int.from_bytes(label, "big") if label is not None else 0
    number = bits >> Label.VIRTUAL_SERVER & OWNER_MASK
    if not number:
        register = oxm_field(punted.match, _REG2)
        number = int.from_bytes(register, "big") if register is not None else 0
    return ConnectionMark(int.from_bytes(mark, "big") if mark is not None else 0, bits >> Label.SERIAL & 0xFFFFFFFF,
                          number)


class FlowRemoved(NamedTuple):
    """A rule of a connection that ended."""

    serial: int
    outbound: bool
    reason: Reason
    packets: int
    bytes: int
    duration: float


_REASONS = {0: Reason.IDLE, 1: Reason.HARD, 2: Reason.DELETED, 3: Reason.DELETED, 5: Reason.OVERFLOW}


def decode_flow_removed(data: bytes) -> FlowRemoved | None:
    """Read an OFPT_FLOW_REMOVED; None where the rule was not one of a connection of ours.

    Raises:
        TruncatedError: the message is too short.
    """
    if len(data) < 48:
        raise TruncatedError("flow-removed too short")
    cookie, _, reason, _, seconds, nanoseconds, idle, _, packets, size = struct.unpack_from("!QHBBIIHHQQ", data, 8)
    kind = kind_of(cookie)
    if kind not in (Kind.CONNECTION_IN, Kind.CONNECTION_OUT):
        return None
    why = _REASONS.get(reason, Reason.DELETED)
    if why in (Reason.IDLE, Reason.HARD) and idle == FIN_IDLE_TIMEOUT:
        why = Reason.SHUTDOWN  # the rule saw a FIN or RST, which shortened its time-out
    return FlowRemoved(cookie & 0xFFFFFFFF, kind is Kind.CONNECTION_OUT, why, packets, size,
                       seconds + nanoseconds / 1e9)


def closed_by_shutdown(mark: ConnectionMark) -> Closed:
    """A FIN or RST that a rule reported, as one entry of DELETE."""
    return Closed(mark.serial, mark.virtual_server, mark.member, Reason.SHUTDOWN, counted=False)


# ------------------------------------------------------------------ CS -> DFS


class ReplyEncoder:
    """Encodes replies for one switch and one configuration.

    The bytes of a commit differ between connections in the serial alone: they are made once for a
    virtual server and member, and patched.
    """

    def __init__(self, switch: int, configuration: Configuration, routes: Routes) -> None:
        self._zones = zones(switch)
        self.routes = routes
        self._servers: dict[int, VirtualServer] = {}
        self._members: dict[tuple[int, int], Member] = {}
        for server in configuration.virtual_servers.values():
            self._servers[server.number] = server
        self._configuration = configuration
        self._commits: dict[tuple[int, int, bool], tuple[bytes, bytes]] = {}

    def encode(self, reply: Reply, frame: bytes, packet: frames.Packet) -> bytes | None:
        """The messages that carry a reply out; None where there is nothing to send.

        Args:
            reply: the control segment's answer.
            frame: the client's packet, with a whole checksum.
            packet: the same, parsed.
        """
        asked = reply.query
        if reply.error is not Error.OK:
            answer = frames.refusal(frame, packet, VIRTUAL_MAC)
            return None if answer is None else packet_out(OFPP_CONTROLLER, _to_port(asked.in_port), answer)
        if reply.translation is not None and self.is_rules(asked.virtual_server):
            return self._rules(reply, frame)
        before, after = self.commit_template(asked.virtual_server, reply.member, reply.tracked)
        length = 28 + len(before) + len(after) + len(frame)
        if length > MAX_LENGTH:
            return None  # as in packet_out
        return b"".join((
            struct.pack("!BBHIIIH6x", 4, 13, length, 0, 0xFFFFFFFF, asked.in_port, length - 24 - len(frame)),
            before, asked.serial.to_bytes(4, "big"), after, frame))

    def commit_template(self, virtual_server: int, member: int, tracked: bool) -> tuple[bytes, bytes]:
        """The encoded actions of a commit, before and after the four bytes of the serial."""
        key = (virtual_server, member, tracked)
        template = self._commits.get(key)
        if template is None:
            low = self.commit_actions(virtual_server, member, tracked, 0)
            high = self.commit_actions(virtual_server, member, tracked, 0xFFFFFFFF)
            at = next(index for index, (a, b) in enumerate(zip(low, high, strict=True)) if a != b)
            template = self._commits[key] = (low[:at], low[at + 4:])
        return template

    def commit_actions(self, virtual_server: int, member: int, tracked: bool, serial: int) -> bytes:
        """The readable version of a commit's actions."""
        server = self._servers[virtual_server]
        chosen = self._member(virtual_server, member)
        return encode_actions((
            Load(Register.VIRTUAL_SERVER, virtual_server),
            commit(server, chosen, self._zones, routed=self.routes.routed(server, chosen), tracked=tracked,
                   serial=serial)))

    def ends(self, reply: Reply) -> tuple[VirtualServer, Member]:
        """What a connection goes from and to."""
        number = reply.query.virtual_server
        return self._servers[number], self._member(number, reply.member)

    def is_rules(self, virtual_server: int) -> bool:
        """Whether a virtual server's connections are rule pairs."""
        server = self._servers.get(virtual_server)
        return server is not None and server.state is State.RULES

    def _member(self, virtual_server: int, member: int) -> Member:
        key = (virtual_server, member)
        if key not in self._members:
            for pool in self._configuration.pools_reached(self._servers[virtual_server]).values():
                self._members.update(((virtual_server, one.number), one) for one in pool.members)
        return self._members[key]

    def _rules(self, reply: Reply, frame: bytes) -> bytes:
        flows = self.connection_rules(reply)
        if not reply.install:
            actions = encode_actions(action for action in flows[0].actions if not isinstance(action, FinTimeout))
            return packet_out(reply.query.in_port, actions, frame)
        # The packet goes by its new rule: where a full table refused that, it goes nowhere (and Refused answers it).
        return b"".join([*map(add_flow, reversed(flows)),
                         packet_out(reply.query.in_port, encode_actions((Resubmit(Table.RULES),)), frame)])

    def connection_rules(self, reply: Reply) -> tuple[Flow, Flow]:
        """One rule for each direction of a connection (``state: rules``): inbound, outbound."""
        asked, translation = reply.query, reply.translation
        assert translation is not None
        server = self._servers[asked.virtual_server]
        member = self._member(asked.virtual_server, reply.member)
        routed = self.routes.routed(server, member)
        s = asked.signature
        version = 4 if len(s.source) == 4 else 6
        ether = ("eth_type", ETH_IPV4 if version == 4 else ETH_IPV6)
        transport = "tcp" if s.protocol == TCP else "udp"
        target = translation.address if translation.address is not None else s.destination
        port = translation.port or s.destination_port
        src, dst = f"ipv{version}_src", f"ipv{version}_dst"
        tp_src, tp_dst = f"{transport}_src", f"{transport}_dst"
        fin: tuple[Action, ...] = (FinTimeout(FIN_IDLE_TIMEOUT, FIN_HARD_TIMEOUT),) if s.protocol == TCP else ()
        hop: tuple[Action, ...] = (DecrementTtl(),) if routed else ()

        def flow(table: Table, kind: Kind, match: tuple[tuple[str, int | bytes], ...],
                 actions: tuple[Action, ...]) -> Flow:
            return Flow(int(table), int(Priority.SPECIAL), match, (*fin, *hop, *actions),
                        connection_cookie(kind, asked.serial), None, server.idle_timeout, server.hard_timeout,
                        SEND_FLOW_REMOVED)

        inbound = flow(
            Table.RULES, Kind.CONNECTION_IN,
            (ether, ("ip_proto", s.protocol), (src, s.source), (dst, s.destination), (tp_src, s.source_port),
             (tp_dst, s.destination_port)),
            (*((SetField("eth_src", VIRTUAL_MAC),) if routed else ()), SetField("eth_dst", translation.host.mac),
             *((SetField(dst, target),) if target != s.destination else ()),
             *((SetField(tp_dst, port),) if port != s.destination_port else ()),
             Load("nxm_in_port", 0), Output(translation.host.port)))
        outbound = flow(
            Table.RULES_RETURN, Kind.CONNECTION_OUT,
            (ether, ("ip_proto", s.protocol), (src, target), (dst, s.source), (tp_src, port),
             (tp_dst, s.source_port)),
            (SetField("eth_src", VIRTUAL_MAC), SetField("eth_dst", asked.client_mac),
             *((SetField(src, s.destination),) if target != s.destination else ()),
             *((SetField(tp_src, s.destination_port),) if port != s.destination_port else ()),
             Load("nxm_in_port", 0), Output(asked.in_port)))
        return inbound, outbound


def _to_port(port: int) -> bytes:
    return encode_actions((Output(port),))


def refuse(punted: PacketIn, packet: frames.Packet) -> bytes | None:
    """The packet-out that refuses a punted packet's sender at once.

    The packet may have been translated before it was punted: conntrack knows whom its sender meant.
    """
    meant = _as_sent(punted, packet)
    answer = frames.refusal(*meant, VIRTUAL_MAC) if meant is not None else None
    return None if answer is None else packet_out(OFPP_CONTROLLER, _to_port(punted.in_port), answer)


def forget(punted: PacketIn, packet: frames.Packet, switch: int) -> bytes:
    """The message that has conntrack forget a punted packet's connection: its member is gone for good, and the
    client may want its port again. Empty where the sender is not to be seen any more."""
    meant = _as_sent(punted, packet)
    if meant is None:
        return b""
    signature = meant[1].signature
    return conntrack_flush(zones(switch).service, signature.protocol, signature.source, signature.destination,
                           signature.source_port, signature.destination_port)


def _as_sent(punted: PacketIn, packet: frames.Packet) -> tuple[bytes, frames.Packet] | None:
    """A punted packet as its sender sent it; None where its source was translated as well."""
    if packet.source_mac == VIRTUAL_MAC:
        return None
    address = oxm_field(punted.match, _CT_DESTINATION if len(packet.signature.destination) == 4 else _CT_DESTINATION6)
    port = oxm_field(punted.match, _CT_PORT)
    if address is None or port is None:
        return punted.frame, packet
    return frames.with_destination(punted.frame, packet, address, int.from_bytes(port, "big"))


def probe(switch: int, address: str, sender: str | None) -> bytes:
    """The packet-out that asks on all ports who has an address."""
    frame = frames.probe(packed(address), probe_mac(switch), packed(sender) if sender is not None else None)
    return packet_out(OFPP_CONTROLLER, encode_actions((Output(FLOOD),)), frame)


def forward_to(host: Host, frame: bytes) -> bytes:
    """The packet-out that hands a held packet to a host (routed, so with the balancer's MAC)."""
    return packet_out(OFPP_CONTROLLER, encode_actions((
        SetField("eth_src", VIRTUAL_MAC), SetField("eth_dst", host.mac), DecrementTtl(), Output(host.port))), frame)


__all__ = [
    "ConnectionMark", "FlowRemoved", "PacketIn", "ReplyEncoder", "TruncatedError", "closed_by_shutdown",
    "connection_mark", "decode_flow_removed", "decode_packet_in", "forget", "forward_to", "owner_of", "probe",
    "query", "refuse",
]
