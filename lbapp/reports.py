# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The resource manager (004, "resource manager module 52"): takes the reports of agents beside servers.

Owns who may report (the signature, the sequence against replay), what is absurd, and what is shown of it. What a report
means for a pool the master decides (``control/master.py``), which gets every report, with its flags. Has no clock.

A report is refused, and changes nothing, when it is not signed though there is a key, or is none newer than what was
heard: of the same run with no greater sequence number, of another run with no later time. So a recorded one is good for
nothing while the controller lives. A controller that was just started remembers none; then the time protects, because a
report whose time is far from the controller's is flagged, and does not count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lbapp.control.master import Master
from lbapp.server_agent.report import Told, signed

LOG = logging.getLogger("lbapp.reports")

MOST_AGENTS = 4096
LONGEST_NAME = 255
CLOCK_SECONDS = 60.0
"""How far an agent's clock may be from the controller's."""
MOST_PER_SECOND = 50
"""Reports of all agents together, where that is often enough: each takes the controller half a millisecond."""
IDLE_SECONDS = 10.0
"""How often agents report while no pool looks at it."""
FORGET_SECONDS = 3600.0
"""An agent that is silent for so long is forgotten; no pool counts an older report."""
WITHDRAWN_SECONDS = 3 * CLOCK_SECONDS
"""One that has ended is remembered until no recorded report of it could count."""
LARGEST = 1e15
SHARES = frozenset({"cpu", "memory", "utilization"})
"""Values from 0 to 1."""
NOT_NEGATIVE = frozenset({"load", "clients", "requests_per_second", "execution_time", "memory_available", "capability",
                          "cores"})


class Refused(Exception):
    """A report was not taken. The message says why."""


class Unsigned(Refused):
    """It has no signature, or a wrong one."""


class Outdated(Refused):
    """It was heard already, or a later one was; or there is no room for another agent."""


@dataclass(slots=True)
class Heard:
    """What was heard of one agent.

    Attributes:
        at: when the last report came, in the caller's seconds.
        flags: what is wrong with it.
        signed: whether its signature was checked.
        refused: reports in its name that were refused since it was first heard.
        latest: the latest time of any report that was believed.
    """

    told: Told
    at: float
    flags: tuple[str, ...]
    signed: bool
    refused: int
    latest: float


class Reports:
    """The reports of all agents.

    Args:
        master: gets them.
    """

    def __init__(self, master: Master) -> None:
        self.key: bytes | None = None
        """The buses' shared key; with one, reports must be signed."""
        self._master = master
        self._agents: dict[str, Heard] = {}

    def take(self, agent: str, told: Told, signature: bytes | None, now: float, wall: float) -> tuple[str, ...]:
        """An agent reports.

        Args:
            now: seconds of a clock that only goes forward.
            wall: seconds since 1970.

        Returns:
            What is wrong with it; with anything, it does not count.

        Raises:
            Refused: it is not taken.
        """
        heard = self._agents.get(agent)
        try:
            self._admit(agent, told, signature, heard, now)
        except Refused as refused:
            if heard is not None:
                heard.refused += 1
                if heard.refused & heard.refused - 1 == 0:  # the 1st, 2nd, 4th, 8th...
                    LOG.warning("agent %s: a report was refused (%d so far): %s", agent, heard.refused, refused)
            raise
        flags = (*absurd(told.values), *_clock(told.time - wall))
        if flags and (heard is None or heard.flags != flags):
            LOG.warning("agent %s: its report does not count: %s", agent, "; ".join(flags))
        elif heard is not None and heard.flags and not flags:
            LOG.info("agent %s: its reports count again", agent)
        # A clock that was ahead must not lock its agent out for long once it is set right.
        latest = min(told.time, wall + CLOCK_SECONDS) if math.isfinite(told.time) else wall
        if heard is not None:
            latest = max(latest, heard.latest)
        self._agents[agent] = Heard(told, now, flags, self.key is not None, heard.refused if heard else 0, latest)
        self._master.report(agent, told.endpoints, told.values, now, flags)
        return flags

    def interval(self) -> float:
        """How many seconds an agent is to let pass until its next report, unless it was told to let more pass."""
        fair = len(self._agents) / MOST_PER_SECOND
        needs = self._master.needs
        return max(IDLE_SECONDS, fair) if needs is None else min(max(needs[0], fair), needs[1] / 3)

    def _admit(self, agent: str, told: Told, signature: bytes | None, heard: Heard | None, now: float) -> None:
        if self.key is not None:
            if signature is None:
                raise Unsigned("expected a report that is signed with the key of the buses (--bus-key)")
            if not signed(signature, self.key, agent, told):
                raise Unsigned("expected another signature; has the agent the controller's key of the buses?")
        if heard is not None:
            if told.run == heard.told.run:
                if told.sequence <= heard.told.sequence:
                    raise Outdated(f"expected a sequence number greater than {heard.told.sequence}, "
                                   f"got {told.sequence}")
            elif told.time <= heard.latest:
                raise Outdated("expected a report that is later than the last one of the agent's run before")
        elif len(self._agents) >= MOST_AGENTS:
            self._tidy(now)
            if len(self._agents) >= MOST_AGENTS:
                raise Outdated(f"{MOST_AGENTS} agents report already")

    def withdraw(self, agent: str) -> bool:
        """An agent ends: what it reported counts no more; returns whether it was known.

        It is remembered for a while, so that none of its reports counts again.
        """
        known = self._master.forget(agent)
        heard = self._agents.get(agent)
        if heard is not None:
            heard.flags = (WITHDRAWN,)
        return known

    def agents(self, now: float) -> dict[str, Heard]:
        """What was heard of agents that have not ended, by name."""
        self._tidy(now)
        return {name: heard for name, heard in self._agents.items() if heard.flags != (WITHDRAWN,)}

    def _tidy(self, now: float) -> None:
        for name in [name for name, heard in self._agents.items() if now - heard.at > (
                WITHDRAWN_SECONDS if heard.flags == (WITHDRAWN,) else FORGET_SECONDS)]:
            del self._agents[name]
            self._master.forget(name)


WITHDRAWN = "withdrawn"


def absurd(values: Mapping[str, float]) -> list[str]:
    """What of reported values cannot be."""
    found = []
    for name, value in values.items():
        if not math.isfinite(value):
            found.append(f"{name}: expected a number, got {value}")
        elif name in SHARES and not 0 <= value <= 1:
            found.append(f"{name}: expected 0 to 1, got {value:g}")
        elif name in NOT_NEGATIVE and value < 0:
            found.append(f"{name}: expected no less than 0, got {value:g}")
        elif abs(value) > LARGEST:
            found.append(f"{name}: expected at most {LARGEST:g}, got {value:g}")
    return found


def _clock(ahead: float) -> list[str]:
    if abs(ahead) <= CLOCK_SECONDS:
        return []
    if not math.isfinite(ahead):
        return ["time: expected a number"]
    return [f"time: expected the controller's, got one {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"]
