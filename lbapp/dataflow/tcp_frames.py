# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What was captured of clients and members whose handshakes are proxied, read in one go: this is the packet path.

The readable version is :mod:`lbapp.dataflow.frames`, step by step; what is said here is the same of every frame
(``tests/unit/test_tcp_frames.py``). Pure.
"""

from __future__ import annotations

import struct

from lbapp.control.messages import FlowSignature
from lbapp.dataflow import frames
from lbapp.dataflow.frames import TCP, MalformedError, Packet, Segment

_FOUR = struct.Struct("!6x6sHBBHxxHxBxx4s4sHHIIHHHxx").unpack_from
_SIX = struct.Struct("!6x6sHIHBx16s16sHHIIHHHxx").unpack_from


def read(frame: bytes) -> tuple[bytes, Packet, Segment]:
    """A TCP frame with its whole checksum, its addresses, and its TCP part.

    Raises:
        MalformedError: as :func:`frames.parse` and :func:`frames.with_checksum` say.
    """
    size = len(frame)
    if size >= 54 and frame[12] == 8:
        mac, ether, first, tos, length, part, protocol, source, destination, port, other, seq, ack, shape, window, \
            field = _FOUR(frame)
        addresses, offset, end = 26, 34, 14 + length
        plain = ether == 0x0800 and first == 0x45 and not part & 0x1FFF
    elif size >= 74:
        mac, ether, first, length, protocol, source, destination, port, other, seq, ack, shape, window, \
            field = _SIX(frame)
        addresses, offset, end, tos = 22, 54, 54 + length, first >> 20 & 0xFF
        plain = ether == 0x86DD and first >> 28 == 6
    else:
        return _step_by_step(frame)
    payload = offset + (shape >> 12) * 4
    if not plain or protocol != TCP or not offset + 20 <= payload <= end <= size:
        return _step_by_step(frame)
    # The residue of all that the checksum covers, which is what lies from the addresses to the end, and two numbers.
    covered = int.from_bytes(frame[addresses:end], "big")
    whole = ((covered << 8 if end & 1 else covered) + TCP + end - offset) % 0xFFFF
    if whole:
        pseudo = (int.from_bytes(frame[addresses:offset], "big") + TCP + end - offset) % 0xFFFF
        if field != (pseudo or 0xFFFF):
            raise MalformedError("transport checksum")
        checksum = 0xFFFF - (whole - field) % 0xFFFF
        frame = b"".join((frame[:offset + 16], checksum.to_bytes(2, "big"), frame[offset + 18:]))
    return (frame, Packet(FlowSignature(source, port, destination, other, TCP, tos), mac, shape & 0xFF, offset, end),
            Segment(seq, ack, shape & 0xFF, window, frame[offset + 20:payload], frame[payload:end]))


def _step_by_step(frame: bytes) -> tuple[bytes, Packet, Segment]:
    packet = frames.parse(frame)
    frame = frames.with_checksum(frame, packet)
    return frame, packet, frames.segment(frame, packet)
