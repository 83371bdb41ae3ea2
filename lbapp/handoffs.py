# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The members whose hosts can adopt connections (handoff), as their agents announced over REST.

Owns the announcements and when they end. Who stops announcing is spliced again. Decides nothing, and has no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LEASE_SECONDS = 10.0
"""How long an announcement counts; agents repeat it every few seconds."""
MOST_AGENTS = 4096
MOST_LISTENERS = 256


class Announced(NamedTuple):
    """What one agent announced. ``until`` is in the caller's seconds."""

    listeners: frozenset[tuple[str, int]]
    until: float


class Handoffs:
    """All announcements, by the agents' names."""

    def __init__(self) -> None:
        self._agents: dict[str, Announced] = {}

    def announce(self, name: str, listeners: Iterable[tuple[str, int]], now: float) -> bool:
        """An agent says which addresses and ports it adopts connections for; returns whether there is room for it."""
        if name not in self._agents and len(self._agents) >= MOST_AGENTS:
            return False
        self._agents[name] = Announced(frozenset(listeners), now + LEASE_SECONDS)
        return True

    def withdraw(self, name: str) -> bool:
        """An agent ends; returns whether it was known."""
        return self._agents.pop(name, None) is not None

    def adopting(self, now: float) -> frozenset[tuple[str, int]]:
        """Every address and port that is announced now."""
        for name in [name for name, announced in self._agents.items() if announced.until <= now]:
            del self._agents[name]
        return frozenset().union(*(announced.listeners for announced in self._agents.values()))

    def agents(self) -> dict[str, Announced]:
        """All announcements, by name."""
        return dict(self._agents)
