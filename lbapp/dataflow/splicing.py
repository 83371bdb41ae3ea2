# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A packet of a relayed connection as its receiver is to have it: what ``splice.bpf.h`` and the rest of the fast path
do to one, in the control segment. Pure."""

from __future__ import annotations

import struct

from lbapp.config.pool import LEAST_MSS
from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import Flow, Splice
from lbapp.dataflow.frames import ACK, FIN, PSH, SYN, Packet, Segment

FRAME = 1514
"""The longest frame that goes out; what came in longer (offload) is divided."""


def hops(frame: bytes) -> int:
    """The hops that an IP packet may still make."""
    return frame[22] if frame[12:14] == b"\x08\x00" else frame[21]


def fit(frame: bytes, packet: Packet) -> bool:
    """Whether a packet is one that the fast path would translate: its checksum here is made anew, and would hide what
    is wrong with it. IPv4 options and fragments are nobody's here; neither are ports of 0."""
    it = packet.signature
    if not it.source_port or not it.destination_port or it.source == it.destination:
        return False
    if len(it.source) == 16:
        return True
    return packet.offset == 34 and not frame[20] & 0x20 and frames.ones_sum(frame[14:34]) == 0xFFFF


def _with_sacks(packed: bytes, offset: int) -> bytes:
    """TCP options, every edge of SACK blocks moved."""
    made = bytearray(packed)
    for at, kind, length in frames.tcp_options(packed):
        if kind == 5 and length & 7 == 2:
            for edge in range(at + 2, at + length, 4):
                value = int.from_bytes(packed[edge:edge + 4], "big") + offset & 0xFFFFFFFF
                made[edge:edge + 4] = value.to_bytes(4, "big")
    return bytes(made)


def _scaled(window: int, shift: int) -> int:
    return min(window << shift if shift >= 0 else window >> -shift, 0xFFFF)


def translated(frame: bytes, packet: Packet, part: Segment, flow: Flow, splice: Splice, member: bool) -> list[bytes]:
    """A packet as its receiver is to have it: addresses, ports, hops, and what is counted in bytes; in several frames
    where it is longer than one.

    Args:
        frame: with a whole checksum.
        packet, part: the same, parsed.
        flow: its direction.
        splice: of the connection.
        member: it is the member's.
    """
    seq, ack, window, packed = part.seq, part.ack, part.window, part.options
    if member:
        seq, shift = seq - splice.offset, splice.shift
    else:
        shift = splice.shift_in
        if part.flags & ACK:
            ack += splice.offset
            packed = _with_sacks(packed, splice.offset)
    if not part.flags & SYN:
        window = _scaled(window, shift)
    six = len(flow.source) == 16
    head = bytearray(frame[:packet.offset])
    head[0:6] = flow.destination_mac
    if flow.source_mac != layout.KEEP_MAC:
        head[6:12] = flow.source_mac
    if six:
        head[22:54] = flow.source + flow.destination
    else:
        head[26:34] = flow.source + flow.destination
    if flow.state & layout.ROUTED:
        head[21 if six else 22] -= 1
    changed = part._replace(seq=seq, ack=ack, window=window, options=packed)
    return _divided(bytes(head), (flow.source, flow.source_port), (flow.destination, flow.destination_port), changed,
                    _urgent(frame, packet), FRAME if len(frame) <= FRAME else LEAST_MSS - len(part.options))


def divided(frame: bytes, packet: Packet, most: int = FRAME) -> list[bytes]:
    """A packet as it is, with a whole checksum; in several frames where it is longer than one.

    Args:
        frame, packet: the packet.
        most: data of a piece, if that is less than a frame holds.
    """
    it = packet.signature
    if it.protocol != frames.TCP or len(frame) <= FRAME:
        return [frame]
    return _divided(frame[:packet.offset], (it.source, it.source_port), (it.destination, it.destination_port),
                    frames.segment(frame, packet), _urgent(frame, packet), most)


def _urgent(frame: bytes, packet: Packet) -> int:
    return int.from_bytes(frame[packet.offset + 18:packet.offset + 20], "big")


def _divided(head: bytes, source: tuple[bytes, int], destination: tuple[bytes, int], part: Segment,
             urgent: int, most: int = FRAME) -> list[bytes]:
    room = min(FRAME - len(head) - 20 - len(part.options), most)
    made = []
    for at in range(0, max(len(part.payload), 1), room):
        flags = part.flags if at + room >= len(part.payload) else part.flags & ~(FIN | PSH)
        header = struct.pack("!HHIIBBHHH", source[1], destination[1], part.seq + at & 0xFFFFFFFF,
                             part.ack & 0xFFFFFFFF, 20 + len(part.options) << 2, flags, part.window, 0, urgent)
        made.append(frames.with_tcp(head, source[0], destination[0],
                                    header + part.options + part.payload[at:at + room]))
    return made
