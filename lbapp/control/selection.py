# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which member gets a new connection: one class an algorithm, and the tables the switch shares.

Owns the state that an algorithm needs between two connections. Never knows whether a member
can be reached: it is given those that can (:class:`Candidate`), anew whenever they change, and
keeps its place across such a change. No hash here is Python's own, which differs from one
process to the next: the same flow meets the same member after a restart.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol
from zlib import crc32

from lbapp.config.model import Algorithm
from lbapp.control.messages import FlowSignature

SLOT_BITS = 8
TABLE_SIZES = (5003, 16_381, 65_537)
SLOTS_EACH = 100
"""What the Maglev paper asks for, so that shares are right to a percent. A table is no larger
than that needs: the largest takes 65 ms to build, the smallest 2."""

_WORD = 0xFFFFFFFFFFFFFFFF


class Load(Protocol):
    """Something that knows how many connections a member has."""

    active: int


class Candidate(NamedTuple):
    """A member that may be selected. ``number`` is its stable key; ``weight`` is above 0."""

    number: int
    weight: int
    load: Load


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
    source, source_port, destination, destination_port, protocol, _ = signature
    ports = (source_port << 24 | destination_port << 8 | protocol).to_bytes(5, "big")
    return mix(crc32(ports, crc32(destination, crc32(source))))


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


# ------------------------------------------------------------------ algorithms


class Selector(Protocol):
    """An algorithm and its state."""

    def update(self, candidates: Sequence[Candidate]) -> None:
        """Take other candidates; keep the place among those that stay."""

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """The index of the selected candidate. There is one candidate at least."""


class RoundRobin:
    """One after the other, whatever they weigh."""

    def __init__(self) -> None:
        self._order: list[int] = []
        self._next = 0
        self._begun = False

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`: next is who follows the last one now, or if that is gone, who followed it then."""
        order = [candidate.number for candidate in candidates]
        places = {number: index for index, number in enumerate(order)}
        waiting = self._order[self._next:] + self._order[:self._next]
        if waiting and waiting[-1] in places:
            self._next = (places[waiting[-1]] + 1) % len(order) if self._begun else 0
        else:
            self._next = next((places[number] for number in waiting if number in places), 0)
        self._order = order

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        index = self._next
        self._begun = True
        self._next = index + 1 if index + 1 < len(self._order) else 0
        return index


class WeightedRoundRobin:
    """Smooth weighted round robin: weights 5, 1, 1 give a a b a c a a, never five in a row.

    Everybody gains its weight on each turn; who has most is selected and pays the total.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._weights: list[int] = []
        self._credit: list[int] = []
        self._total = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        credit = dict(zip(self._numbers, self._credit, strict=True))
        self._numbers = [candidate.number for candidate in candidates]
        self._weights = [candidate.weight for candidate in candidates]
        self._credit = [credit.get(number, 0) for number in self._numbers]
        self._total = sum(self._weights)

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        credit = [have + weight for have, weight in zip(self._credit, self._weights, strict=True)]
        index = credit.index(max(credit))
        credit[index] -= self._total
        self._credit = credit
        return index


class LeastConnections:
    """Fewest connections in proportion to weight; equals take turns."""

    def __init__(self) -> None:
        self._candidates: list[tuple[int, int, Load]] = []
        self._count = 0
        self._turn = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        # Twice in a row, so that a round may start anywhere.
        self._candidates = [(index, candidate.weight, candidate.load)
                            for _ in range(2) for index, candidate in enumerate(candidates)]
        self._count = len(candidates)
        self._turn = self._turn % self._count if self._count else 0

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        turn = self._turn
        best, best_weight, load = self._candidates[turn]
        best_active = load.active
        for index, weight, load in self._candidates[turn + 1:turn + self._count]:
            active = load.active
            if active * best_weight < best_active * weight:
                best, best_weight, best_active = index, weight, active
        self._turn = best + 1 if best + 1 < self._count else 0
        return best


def _indices(values: list[int]) -> array[int]:
    """The numbers in as few bytes as they fit in: there may be ten thousand such tables."""
    highest = max(values, default=0)
    return array("B" if highest < 1 << 8 else "H" if highest < 1 << 16 else "L", values)


class SourceIP:
    """The same client address, the same member; the slots are those a switch would match."""

    def __init__(self) -> None:
        self._slots: array[int] = array("B")
        self._mask = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        # More members than slots is for the controller alone: no switch gets such a table.
        bits = SLOT_BITS if len(candidates) <= 1 << SLOT_BITS else len(candidates).bit_length() + 1
        self._mask = (1 << bits) - 1
        weights = [(index, candidate.weight) for index, candidate in enumerate(candidates)]
        blocks = slot_blocks(weights, bits)
        self._slots = _indices([index for _, mask, index in blocks for _ in range((1 << bits) - mask)])

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        return self._slots[source_hash(signature) & self._mask]


class ConsistentHash:
    """The same flow, the same member, and few flows move when members come and go (Maglev)."""

    def __init__(self) -> None:
        self._members: list[tuple[int, int]] = []
        self._table: array[int] = array("B")

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`. The table is built when it is first needed: it takes milliseconds."""
        members = [(candidate.number, candidate.weight) for candidate in candidates]
        if members != self._members:
            self._members = members
            self._table = array("B")

    def _build(self) -> array[int]:
        places = {number: index for index, (number, _) in enumerate(self._members)}
        table = maglev_table(self._members, table_size(len(self._members)))
        self._table = _indices([places[number] for number in table])
        return self._table

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        table = self._table or self._build()
        return table[flow_hash(signature) % len(table)]


class RandomTwoChoices:
    """Two different members drawn by weight; the one with fewer connections for its weight."""

    def __init__(self) -> None:
        self._candidates: list[tuple[int, Load]] = []
        self._ends: list[int] = []
        self._total = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        self._candidates = [(candidate.weight, candidate.load) for candidate in candidates]
        self._ends = list(accumulate(candidate.weight for candidate in candidates))
        self._total = self._ends[-1] if self._ends else 0

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`. The draw follows from the serial: a transcript can be repeated."""
        draw = mix(serial)
        ends = self._ends
        one = bisect_right(ends, (draw & 0xFFFFFFFF) % self._total)
        weight, load = self._candidates[one]
        rest = self._total - weight
        if not rest:
            return one
        point = (draw >> 32) % rest
        if point >= ends[one] - weight:
            point += weight
        two = bisect_right(ends, point)
        other_weight, other_load = self._candidates[two]
        return two if other_load.active * weight < load.active * other_weight else one


ALGORITHMS: dict[Algorithm, type[Selector]] = {
    Algorithm.ROUND_ROBIN: RoundRobin,
    Algorithm.WEIGHTED_ROUND_ROBIN: WeightedRoundRobin,
    Algorithm.LEAST_CONNECTIONS: LeastConnections,
    Algorithm.SOURCE_IP: SourceIP,
    Algorithm.CONSISTENT_HASH: ConsistentHash,
    Algorithm.RANDOM_TWO_CHOICES: RandomTwoChoices,
}

COUNTING = frozenset({Algorithm.LEAST_CONNECTIONS, Algorithm.RANDOM_TWO_CHOICES})
"""Algorithms that need to know how many connections a member has."""
