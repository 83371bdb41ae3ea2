# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Hashes of flows, and the tables by which the switch and the control segment give a hash its member.

Owns nothing: functions of their arguments. No hash here is Python's own, which differs from one
process to the next: the same flow meets the same member after a restart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from zlib import crc32

from lbapp.control.messages import FlowSignature

SLOT_BITS = 8
TABLE_SIZES = (5003, 16_381, 65_537)
SLOTS_EACH = 100
"""What the Maglev paper asks for, so that shares are right to a percent. A table is no larger
than that needs: the largest takes 65 ms to build, the smallest 2."""

_WORD = 0xFFFFFFFFFFFFFFFF


# ------------------------------------------------------------------ hashes


def mix(value: int) -> int:
    """Spread an integer over 64 bits (the finalizer of splitmix64): every bit in changes half the bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def source_hash(signature: FlowSignature) -> int:
    """64 bits that depend on the client's address alone."""
    # CRC is linear: without the mix, clients that differ in few bits would share few slots.
    return mix(crc32(signature.source))


def flow_hash(signature: FlowSignature) -> int:
    """64 bits that depend on the flow signature, but for the type of service.

    003's signature is a sextuple; a connection whose packets change their TOS stays where it is.
    """
    it = signature
    ports = (it.source_port << 24 | it.destination_port << 8 | it.protocol).to_bytes(5, "big")
    return mix(crc32(ports, crc32(it.destination, crc32(it.source))))


# ------------------------------------------------------------------ tables shared with the switch


def slot_blocks(members: Sequence[tuple[int, int]], bits: int = SLOT_BITS) -> list[tuple[int, int, int]]:
    """Divide ``2**bits`` slots among members, as (value, mask) pairs a switch can match.

    Shares are proportional to weight, by largest remainder; every member of a weight above 0
    has one slot at least. Blocks are powers of two, the largest first: that aligns each of them,
    and makes their number the least for these shares.

    Args:
        members: (key, weight) each; weight 0 gets nothing.
        bits: the width of the slot number.

    Returns:
        (value, mask, key) each; a slot belongs to the one block where ``slot & mask == value``.

    Raises:
        ValueError: more members than slots, or a negative weight.
    """
    if any(weight < 0 for _, weight in members):
        raise ValueError("weight: expected 0 or more")
    served = [(key, weight) for key, weight in members if weight]
    slots = 1 << bits
    if len(served) > slots:
        raise ValueError(f"members: expected at most {slots}, got {len(served)}")
    if not served:
        return []
    total = sum(weight for _, weight in served)
    shares = [max(1, weight * slots // total) for _, weight in served]

    def short(index: int) -> int:
        return served[index][1] * slots - shares[index] * total

    left = slots - sum(shares)
    for index in sorted(range(len(served)), key=short, reverse=True)[:max(0, left)]:
        shares[index] += 1
    for _ in range(-left):  # the guaranteed slots of light members come from those who have most beyond their due
        shares[min((i for i in range(len(served)) if shares[i] > 1), key=short)] -= 1

    pieces = [(1 << bit, key) for share, (key, _) in zip(shares, served, strict=True)
              for bit in range(bits + 1) if share >> bit & 1]
    pieces.sort(key=lambda piece: -piece[0])
    blocks, value = [], 0
    for size, key in pieces:
        blocks.append((value, slots - size, key))
        value += size
    return blocks


def table_size(members: int) -> int:
    """The prime number of slots that the controller's Maglev table has for so many members."""
    size = next((size for size in TABLE_SIZES if members * SLOTS_EACH <= size), max(TABLE_SIZES[-1], 2 * members + 1))
    while not _prime(size):
        size += 2
    return size


def _prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


def maglev_table(members: Sequence[tuple[int, int]], size: int = 251) -> tuple[int, ...]:
    """The look-up table of Maglev (Eisenbud et al., NSDI 2016, section 3.4), weighted.

    Every member has its own order of preference among the slots, from its key alone. They take
    turns at claiming their next free slot; a lighter member is skipped on some turns. So a
    member that goes leaves nearly all other slots as they were.

    Args:
        members: (key, weight) each; the order does not matter, weight 0 gets nothing.
        size: slots, a prime.

    Returns:
        The key each slot belongs to; empty when there are no members.

    Raises:
        ValueError: the size is not a prime, or there are more members than slots.
    """
    served = sorted((key, weight) for key, weight in members if weight > 0)
    if not _prime(size):
        raise ValueError(f"size: expected a prime, got {size}")
    if len(served) > size:
        raise ValueError(f"members: expected at most {size}, got {len(served)}")
    if not served:
        return ()
    heaviest = max(weight for _, weight in served)
    places, steps = [], []
    for key, _ in served:
        digest = hashlib.blake2b(key.to_bytes(8, "big"), digest_size=16).digest()
        places.append(int.from_bytes(digest[:8], "big") % size)
        steps.append(int.from_bytes(digest[8:], "big") % (size - 1) + 1)
    table = [-1] * size
    # Everybody claims on the first turn: light members have a slot in a small table too.
    due = [heaviest - weight for _, weight in served]
    rows = [(index, key, weight) for index, (key, weight) in enumerate(served)]
    filled = 0
    while True:
        for index, key, weight in rows:
            due[index] += weight
            if due[index] < heaviest:
                continue
            due[index] -= heaviest
            place, step = places[index], steps[index]
            while table[place] >= 0:
                place += step
                if place >= size:
                    place -= size
            table[place] = key
            places[index] = place
            filled += 1
            if filled == size:
                return tuple(table)
