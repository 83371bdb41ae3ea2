# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which member gets a new connection: one class an algorithm, and the tables the switch shares.

Owns the state that an algorithm needs between two connections. Never knows whether a member
can be reached: it is given those that can (:class:`Candidate`), anew whenever they change, and
keeps its place across such a change. :mod:`plain` has what goes by turn, hash or number of
connections, :mod:`measured` what goes by statistics.
"""

from __future__ import annotations

from lbapp.config.model import Algorithm
from lbapp.control.selection.candidates import Candidate, Load, Selector
from lbapp.control.selection.measured import BoundedLoadHash, Fastest, LeastBytes, LeastResponseTime
from lbapp.control.selection.plain import (
    ConsistentHash,
    LeastConnections,
    RandomTwoChoices,
    RoundRobin,
    SourceIP,
    WeightedRoundRobin,
)
from lbapp.control.selection.tables import (
    SLOT_BITS,
    flow_hash,
    maglev_table,
    mix,
    slot_blocks,
    source_hash,
    table_size,
)

__all__ = [
    "ALGORITHMS", "COUNTING", "SLOT_BITS", "BoundedLoadHash", "Candidate", "ConsistentHash", "Fastest", "LeastBytes",
    "LeastConnections", "LeastResponseTime", "Load", "RandomTwoChoices", "RoundRobin", "Selector", "SourceIP",
    "WeightedRoundRobin", "flow_hash", "maglev_table", "mix", "slot_blocks", "source_hash", "table_size",
]

ALGORITHMS: dict[Algorithm, type[Selector]] = {
    Algorithm.ROUND_ROBIN: RoundRobin,
    Algorithm.WEIGHTED_ROUND_ROBIN: WeightedRoundRobin,
    Algorithm.LEAST_CONNECTIONS: LeastConnections,
    Algorithm.SOURCE_IP: SourceIP,
    Algorithm.CONSISTENT_HASH: ConsistentHash,
    Algorithm.RANDOM_TWO_CHOICES: RandomTwoChoices,
    Algorithm.LEAST_RESPONSE_TIME: LeastResponseTime,
    Algorithm.LEAST_BYTES: LeastBytes,
    Algorithm.FASTEST: Fastest,
    Algorithm.BOUNDED_LOAD_HASH: BoundedLoadHash,
}

COUNTING = frozenset({
    Algorithm.LEAST_CONNECTIONS, Algorithm.RANDOM_TWO_CHOICES, Algorithm.LEAST_RESPONSE_TIME, Algorithm.LEAST_BYTES,
    Algorithm.FASTEST, Algorithm.BOUNDED_LOAD_HASH,
})
"""Algorithms that need to know how many connections a member has, and what became of them."""
