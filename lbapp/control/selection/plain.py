# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The algorithms that need a turn, a hash, or the number of a member's connections, and no more.

Owns what each keeps between two connections. Never knows how fast a member is (:mod:`measured`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from lbapp.control.messages import FlowSignature
from lbapp.control.selection.candidates import Candidate, Load
from lbapp.control.selection.tables import (
    SLOT_BITS,
    flow_hash,
    maglev_table,
    mix,
    slot_blocks,
    source_hash,
    table_size,
)


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
