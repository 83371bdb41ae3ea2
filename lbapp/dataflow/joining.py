# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Segments of one connection, neighbours, as one frame: what had to wait leaves together.

Let go one by one, the first may be acknowledged before the last has left; what the client then sends overtakes the
rest, and the member takes them for lost. Pure; knows neither connections nor who sends the frames. What is larger
than a frame can be is cut up again by whoever sends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lbapp.config.pool import LEAST_MSS
from lbapp.dataflow import frames
from lbapp.dataflow.frames import ACK, FIN, PSH

LARGEST = 60_000
"""Bytes of a joined frame: its length has to fit 16 bits."""
LONGEST_SEGMENT = 1460
"""Bytes of data beyond which a frame is cut up when it is sent (``fastpath/injector.py``), into pieces of
``LEAST_MSS``; whoever takes less gets the segments as they were."""


class Going(NamedTuple):
    """How segments of a connection are passed on: what their receiver takes at once, and whether they go ``soon``."""

    mss: int
    soon: bool = False


@lru_cache(maxsize=64)
def going(mss: int, soon: bool = False) -> Going:
    """One of the few that there are."""
    return Going(mss, soon)


def join(several: Sequence[bytes], mss: int) -> list[bytes]:
    """Join what is next to each other, in the order given.

    Args:
        several: TCP frames with whole checksums.
        mss: the most data of a segment that their receiver takes.

    Returns:
        Frames with the same bytes in the same order; those that cannot be joined as they were.
    """
    if len(several) < 2 or mss < LEAST_MSS:
        return list(several)
    found: list[bytes] = []
    group: list[tuple[bytes, frames.Packet, frames.Segment]] = []
    size = 0
    for frame in several:
        packet = frames.parse(frame)
        part = frames.segment(frame, packet)
        if group and not (_follows(group[-1], (frame, packet, part)) and size + len(part.payload) <= LARGEST):
            found += _joined(group, mss)
            group, size = [], 0
        group.append((frame, packet, part))
        size += len(part.payload)
    return found + _joined(group, mss)


def _follows(one: tuple[bytes, frames.Packet, frames.Segment], other: tuple[bytes, frames.Packet, frames.Segment],
             ) -> bool:
    """Whether the other goes on where this one ends, and nothing is lost by saying both in one segment."""
    (frame, packet, part), (following, next_packet, next_part) = one, other
    return (packet.signature == next_packet.signature and frame[:14] == following[:14]
            and packet.offset == next_packet.offset and not part.options and not next_part.options
            and part.flags & ~PSH == ACK and next_part.flags & ~(PSH | FIN) == ACK
            and next_part.seq == part.seq + len(part.payload) & 0xFFFFFFFF)


def _joined(group: Sequence[tuple[bytes, frames.Packet, frames.Segment]], mss: int) -> list[bytes]:
    payload = b"".join(part.payload for _, _, part in group)
    if len(group) == 1 or mss < len(payload) <= LONGEST_SEGMENT:
        return [frame for frame, _, _ in group]
    frame, packet, part = group[0]
    last = group[-1][2]
    flags = part.flags | last.flags | (PSH if any(one.flags & PSH for _, _, one in group) else 0)
    head = (frame[packet.offset:packet.offset + 4] + part.seq.to_bytes(4, "big") + last.ack.to_bytes(4, "big")
            + bytes((5 << 4, flags)) + last.window.to_bytes(2, "big") + bytes(4))
    signature = packet.signature
    return [frames.with_tcp(frame[:packet.offset], signature.source, signature.destination, head + payload)]
