# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What an algorithm is given, and what it has to do. Owns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lbapp.control.messages import FlowSignature


class Load(Protocol):
    """What is known of a member's load. Times are those of the statistics that told (``now``).

    Attributes:
        active: connections it has.
        latency: seconds it takes, as estimated at ``latency_at``; 0: not known.
        lately: bytes of connections that ended, older ones counting less, as of ``lately_at``.
        ended_lately: those connections.
        wanted: whether anybody goes by that; who does says so, and it is estimated from then on.
    """

    active: int
    latency: float
    latency_at: float
    lately: float
    ended_lately: float
    lately_at: float
    wanted: bool


class Candidate(NamedTuple):
    """A member that may be selected. ``number`` is its stable key; ``weight`` is above 0."""

    number: int
    weight: int
    load: Load


class Selector(Protocol):
    """An algorithm and its state."""

    def update(self, candidates: Sequence[Candidate]) -> None:
        """Take other candidates; keep the place among those that stay."""

    def pick(self, signature: FlowSignature, serial: int) -> int:
        """The index of the selected candidate. There is one candidate at least."""
