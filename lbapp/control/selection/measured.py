# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The algorithms that go by what was measured: response times, bytes, and how full the others are.

Owns what each keeps between two connections. Measures nothing and has no clock: estimates come
with the members' loads (:mod:`lbapp.control.statistics`), each with the time it was made at, and
the latest of these times is as near to now as matters.

Estimates change with batches of statistics, many picks apart, and numbers of connections with
every pick. So the former are read again after a quarter as many picks as there are members: a
pick in a large pool then costs little more than looking at the numbers of connections.

An estimate of a member that has no connections fades (:data:`DECAY`): who was slow once is tried
again, with one connection. While that is open nothing fades: it has yet to tell how long it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from lbapp.control.messages import FlowSignature
from lbapp.control.selection.candidates import Candidate, Load
from lbapp.control.selection.plain import ConsistentHash
from lbapp.control.selection.tables import source_hash
from lbapp.control.statistics import DECAY, LEAST_SECONDS

BOUND = 1.25
"""How full a member may be beyond the average (c of Mirrokni, Thorup, Zadimoghaddam, "Consistent hashing with bounded
loads", 2016): smaller is more even, larger leaves more clients where they were."""

READ_AGAIN = 4
"""Estimates are read again after one pick for so many members."""


def wanted(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same, from whose connections something is to be learnt."""
    for candidate in candidates:
        candidate.load.wanted = True
    return list(candidates)


def response_times(loads: Sequence[Load]) -> list[tuple[float, float]]:
    """Seconds each member takes: as it was measured, and faded for the time since.

    Nobody knows yet how fast a member is that was never measured: it counts as the fastest of the others.
    """
    now = max([load.latency_at for load in loads])
    unknown = min([load.latency for load in loads if load.latency], default=LEAST_SECONDS)
    return [(load.latency, load.latency * exp((load.latency_at - now) / DECAY)) if load.latency else (unknown, unknown)
            for load in loads]


class _Lowest:
    """What is common to those that give a connection to the member with the lowest score, in turns where it is even."""

    def __init__(self) -> None:
        self._candidates: list[Candidate] = []
        self._rows: list[tuple[int, Load, float, float]] = []
        self._turn = 0
        self._left = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`: what was measured or counted stays with the members."""
        self._candidates = wanted(candidates)
        self._turn = self._turn % len(candidates) if candidates else 0
        self._left = 0


class LeastResponseTime(_Lowest):
    """Shortest expected wait: the response time, times the connections there would be, by weight.

    As Finagle's load balancer does it ("peak EWMA"), but for the estimate: see :meth:`Counts.observed`.
    """

    def _read(self) -> None:
        candidates = self._candidates
        times = response_times([candidate.load for candidate in candidates])
        # Twice in a row, so that a round may start anywhere.
        self._rows = [(index, candidate.load, latency / candidate.weight, faded / candidate.weight)
                      for index, (candidate, (latency, faded)) in enumerate(zip(candidates, times, strict=True))] * 2
        self._left = len(candidates) // READ_AGAIN

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        if self._left <= 0:
            self._read()
        else:
            self._left -= 1
        turn, count = self._turn, len(self._candidates)
        best, least = turn, inf
        for index, load, busy, idle in self._rows[turn:turn + count]:
            active = load.active
            score = (active + 1) * busy if active else idle
            if score < least:
                best, least = index, score
        self._turn = best + 1 if best + 1 < count else 0
        return best


class Fastest:
    """Response times alone, however many connections there are: shares in proportion to weight and speed.

    Not all to the fastest: how slow that has become is known only when connections end, and by then it would have got
    far too many, and the next one after it.
    """

    def __init__(self) -> None:
        self._candidates: list[Candidate] = []
        self._shares: list[float] = []
        self._credit: list[float] = []
        self._left = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        credit = {candidate.number: have for candidate, have in zip(self._candidates, self._credit, strict=True)}
        self._candidates = wanted(candidates)
        self._credit = [credit.get(candidate.number, 0.0) for candidate in candidates]
        self._left = 0

    def _read(self) -> None:
        candidates = self._candidates
        times = response_times([candidate.load for candidate in candidates])
        speeds = [candidate.weight / max(latency if candidate.load.active else faded, LEAST_SECONDS)
                  for candidate, (latency, faded) in zip(candidates, times, strict=True)]
        total = sum(speeds)
        self._shares = [speed / total for speed in speeds]
        self._left = len(candidates) // READ_AGAIN

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`. Turns are those of smooth weighted round robin."""
        if self._left <= 0:
            self._read()
        else:
            self._left -= 1
        credit = [have + share for have, share in zip(self._credit, self._shares, strict=True)]
        best = credit.index(max(credit))
        credit[best] -= 1.0
        self._credit = credit
        return best


class LeastBytes(_Lowest):
    """Fewest bytes lately in proportion to weight; connections that are open count with what others had."""

    def __init__(self) -> None:
        super().__init__()
        self._each = 1.0

    def _read(self) -> None:
        candidates = self._candidates
        now = max([candidate.load.lately_at for candidate in candidates])
        kept = [exp((candidate.load.lately_at - now) / DECAY) for candidate in candidates]
        sizes = [candidate.load.lately * keep for candidate, keep in zip(candidates, kept, strict=True)]
        ended = sum([candidate.load.ended_lately * keep for candidate, keep in zip(candidates, kept, strict=True)])
        # How large answers are depends on clients rather than on members. Where nothing was counted, it is connections
        # that are levelled.
        self._each = sum(sizes) / ended if ended else 1.0
        self._rows = [(index, candidate.load, size, 1 / candidate.weight)
                      for index, (candidate, size) in enumerate(zip(candidates, sizes, strict=True))] * 2
        self._left = len(candidates) // READ_AGAIN

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        if self._left <= 0:
            self._read()
        else:
            self._left -= 1
        turn, count, each = self._turn, len(self._candidates), self._each
        best, least = turn, inf
        for index, load, size, share in self._rows[turn:turn + count]:
            score = (size + load.active * each) * share
            if score < least:
                best, least = index, score
        self._turn = best + 1 if best + 1 < count else 0
        return best


class BoundedLoadHash(ConsistentHash):
    """The same client address, the same member, as long as that has no more connections than :data:`BOUND` allows.

    Where it has, the client goes to the next one in the table: always the same one too, and others of this member's
    clients to others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loads: list[tuple[Load, int]] = []
        self._weight = 0

    def update(self, candidates: Sequence[Candidate]) -> None:
        """See :class:`Selector`."""
        super().update(candidates)
        self._loads = [(candidate.load, candidate.weight) for candidate in candidates]
        self._weight = sum(candidate.weight for candidate in candidates)

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """See :class:`Selector`."""
        table, loads = self._table or self._build(), self._loads
        size = len(table)
        at = source_hash(signature) % size
        index = table[at]
        load, weight = loads[index]
        if not load.active:
            return index
        # Fewer than its share of this, in whole numbers: rounding shares up, as the paper does, lets in the same ones.
        most, total = BOUND * (sum([load.active for load, _ in loads]) + 1), self._weight
        if load.active * total < most * weight:
            return index
        for step in range(at + 1, at + 1 + 2 * len(loads)):
            index = table[step if step < size else step - size]
            load, weight = loads[index]
            if load.active * total < most * weight:
                return index
        # Those that have room have few slots.
        return min(range(len(loads)), key=lambda index: loads[index][0].active / loads[index][1])
