# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How much the control segment may hold and how much it may send at once.

Owns the bounds only; what happens at a bound is written where the bound is kept.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Bounds of the control segment's tables and of one tick's work.

    Attributes:
        connections: connections known by serial, over all switches; the oldest makes room.
        switches: switches remembered, connected or not.
        asked_hosts: per switch, hosts looked up on demand; the oldest makes room.
        probes_per_tick: neighbours looked after in one tick.
        reaps_per_tick: connections whose idle timer is looked after in one tick.
        chosen: per switch, open connections whose reason is remembered (why that pool); the oldest makes room.
        attempts: members that are tried for one connection, at most.
        clients: clients remembered (persistence), over all pools; one of the largest pool's makes room.
        changes: of those, changes that wait to be kept; the oldest makes room, and is lost at the next restart.
        waiting: connections that wait in lines, over all pools; more are refused.
        live_interval: seconds between two :class:`~lbapp.control.messages.Live` snapshots of a
            switch. A younger connection may be missing from one without being dead.
    """

    connections: int = 262_144
    switches: int = 256
    asked_hosts: int = 1024
    probes_per_tick: int = 500
    reaps_per_tick: int = 1000
    live_interval: float = 10.0
    chosen: int = 65_536
    attempts: int = 3
    clients: int = 1_048_576
    changes: int = 262_144
    waiting: int = 65_536


DEFAULTS = Limits()
