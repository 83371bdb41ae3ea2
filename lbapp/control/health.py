# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which members are well: what monitors, clients' connections and operators say, made into one word for each.

Owns the state of every member that is watched (its pool has monitors, or looks at clients' connections), of members
that are draining, and of those that start slowly. Decides nothing about traffic: :mod:`lbapp.control.effective` does
that with what is said here. No I/O and no clock.

A member's state, and what changes it:

    unknown ── first results ──> up or down      unknown takes connections: a restart is no reason to refuse them
    up ── a monitor it needs says down ──> down
    up ── too many clients' connections failed ──> down for ``passive.hold`` seconds (or until monitors say up again)
    down ── its monitors are satisfied, and no hold is left ──> up, with the slow start of its pool
    any ── ``damping.changes`` changes within the window ──> down, until it has been well for ``damping.hold`` seconds
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lbapp.config.model import Configuration
from lbapp.config.monitor import MonitorRule
from lbapp.config.pool import Member, Override, Pool
from lbapp.control.events import EventKind, Events

SLOW_START_STEPS = 20
"""A slow start raises the weight so many times."""


class State(enum.Enum):
    """What is known of a member."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Condition(NamedTuple):
    """What traffic has to know of a member.

    Attributes:
        down: it takes no connections.
        share: of its weight, 0 to 1, while it starts slowly.
        ended: the time it had for draining is over: what is left is to be reset.
    """

    down: bool = False
    share: float = 1.0
    ended: bool = False


WELL = Condition()


class Report(NamedTuple):
    """What people are told of a member. ``since`` is in the caller's seconds; None: from the beginning."""

    state: State
    since: float | None
    reason: str
    monitors: Mapping[str, tuple[State, str]]
    draining_since: float | None = None
    ended: bool = False
    share: float = 1.0


class _Watched:
    """One member."""

    __slots__ = ("changes", "damped", "draining", "ended", "failures", "held", "member", "monitors", "pool", "ramp",
                 "reason", "since", "state", "step", "well")

    def __init__(self, pool: Pool, member: Member) -> None:
        self.pool, self.member = pool, member
        self.state = State.UNKNOWN
        self.since: float | None = None
        self.reason = ""
        self.monitors: dict[str, tuple[State, str]] = {}
        self.failures: deque[float] = deque(maxlen=100)
        self.changes: deque[float] = deque(maxlen=100)
        self.held: float | None = None
        """Until when clients' failures keep it down."""
        self.damped = False
        self.well: float | None = None
        """Since when it has been well, while it is damped."""
        self.ramp: float | None = None
        """When its slow start began."""
        self.step = SLOW_START_STEPS
        self.draining: float | None = None
        self.ended = False

    def monitored(self) -> tuple[State, str]:
        """What its monitors say together, and the reason."""
        wanted = [monitor.name for monitor in self.pool.monitors if monitor.admin_state_up]
        said = [self.monitors.get(name, (State.UNKNOWN, "")) for name in wanted]
        if not said:
            return State.UNKNOWN, ""
        decisive, other = (State.DOWN, State.UP) if self.pool.monitor_rule is MonitorRule.ALL else \
            (State.UP, State.DOWN)
        for name, (state, reason) in zip(wanted, said, strict=True):
            if state is decisive:
                return state, f"{name}: {reason}" if reason else name
        if all(state is other for state, _ in said):
            name, (state, reason) = wanted[0], said[0]
            return state, f"{name}: {reason}" if reason else name
        return State.UNKNOWN, ""

    @property
    def condition(self) -> Condition:
        return Condition(self.state is State.DOWN, self.step / SLOW_START_STEPS, self.ended)


def _needed(pool: Pool, member: Member) -> bool:
    return bool(pool.monitors or pool.passive is not None or member.draining or pool.slow_start)


class Health:
    """The health of all members.

    Args:
        events: where changes are told.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._watched: dict[int, _Watched] = {}
        self._pools: Mapping[str, Pool] = {}
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._timed: set[int] = set()
        """Members for whom something may become due."""

    # -------------------------------------------------------------- in

    def configure(self, configuration: Configuration, now: float) -> set[str]:
        """Take a configuration over; what did not change keeps its state.

        Returns:
            The ids of the pools whose members' conditions may be other ones now.
        """
        before, after = self._pools, configuration.pools
        if before is after:
            return set()
        touched = {key for key, pool in after.items() if before.get(key) is not pool}
        gone = [key for key in before if key not in after]
        for key in gone:
            self._forget(self._numbers.pop(key, ()))
        for key in touched:
            pool = after[key]
            self._overridden(before.get(key), pool, now)
            kept = []
            for member in pool.members:
                if not _needed(pool, member):
                    continue
                kept.append(member.number)
                self._take(pool, member, now)
            self._forget(set(self._numbers.get(key, ())).difference(kept))
            self._numbers[key] = tuple(kept)
        self._pools = after
        return touched | set(gone)

    def _overridden(self, before: Pool | None, pool: Pool, now: float) -> None:
        """Tell of what an operator says of members, or says no more."""
        said = {member.number: member.health for member in before.members} if before is not None else {}
        for member in pool.members:
            if member.health is not said.get(member.number, Override.AUTO):
                text = ("no operator's word any more" if member.health is Override.AUTO
                        else f"{member.health.value}, says an operator")
                self._events.add(now, EventKind.MEMBER_OVERRIDDEN, text, pool.name, member.endpoint)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._watched.pop(number, None)
            self._timed.discard(number)

    def _take(self, pool: Pool, member: Member, now: float) -> None:
        known = self._watched.get(member.number)
        where = member.address, member.protocol_port
        if known is None or (known.member.address, known.member.protocol_port) != where:
            known = self._watched[member.number] = _Watched(pool, member)
        known.pool, known.member = pool, member
        names = {monitor.name for monitor in pool.monitors if monitor.admin_state_up}
        for name in [name for name in known.monitors if name not in names]:
            del known.monitors[name]
        if not names and pool.passive is None:
            known.state, known.reason, known.damped, known.held = State.UNKNOWN, "", False, None
        if member.draining and known.draining is None:
            known.draining = now
            limit = f", for at most {member.drain_timeout} s" if member.drain_timeout else ""
            self._tell(known, now, EventKind.MEMBER_DRAINING, f"draining{limit}")
        elif not member.draining and known.draining is not None:
            known.draining, known.ended = None, False
            self._tell(known, now, EventKind.MEMBER_DRAINING, "no longer draining")
        if not pool.slow_start:
            known.ramp, known.step = None, SLOW_START_STEPS
        self._settle(known, now)
        self._timed.add(member.number)

    def checked(self, number: int, monitor: str, up: bool, reason: str, now: float) -> str | None:
        """A monitor's word on a member changed.

        Returns:
            The id of the pool, where the member's condition changed.
        """
        known = self._watched.get(number)
        if known is None or all(one.name != monitor for one in known.pool.monitors):
            return None  # it was removed while the check was on its way
        known.monitors[monitor] = State.UP if up else State.DOWN, reason
        return self._after(known, now)

    def failed(self, number: int, reason: str, now: float) -> str | None:
        """A client's connection to a member failed. Returns as :meth:`checked` does."""
        known = self._watched.get(number)
        if known is None or known.pool.passive is None:
            return None
        passive = known.pool.passive
        known.failures.append(now)
        while known.failures and known.failures[0] <= now - passive.window:
            known.failures.popleft()
        if len(known.failures) < passive.failures or known.held is not None:
            return None
        known.failures.clear()
        known.held = now + passive.hold
        self._tell(known, now, EventKind.MEMBER_FAILED,
                   f"{passive.failures} connections of clients failed within {passive.window:g} s ({reason})")
        return self._after(known, now, reason)

    def tick(self, now: float) -> set[str]:
        """What it is time for; returns the ids of pools in which a condition changed."""
        changed: set[str] = set()
        for number in tuple(self._timed):
            known = self._watched[number]
            pool = self._after(known, now)
            if pool is not None:
                changed.add(pool)
        return changed

    # -------------------------------------------------------------- the state of one

    def _after(self, known: _Watched, now: float, reason: str = "") -> str | None:
        before = known.condition
        self._settle(known, now, reason)
        if known.condition == before:
            return None
        return known.pool.id

    def _settle(self, known: _Watched, now: float, reason: str = "") -> None:
        """Bring a member's state up to date with everything that is known of it."""
        said, why = known.monitored()
        if known.held is not None and now >= known.held:
            known.held = None
            if said is State.UNKNOWN:
                said, why = State.UP, f"{known.pool.passive.hold:g} s have passed" if known.pool.passive else ""
        if known.held is not None:
            said, why = State.DOWN, reason or known.reason
        for _ in range(2):  # a change may be the one that is too many
            self._damp(known, said, now)
            told, text = said, why
            if known.damped and said is not State.DOWN:
                told, text = State.DOWN, "it changed too often"
            if told is not State.UNKNOWN and told is not known.state:
                self._change(known, told, text, now)
        self._ramp(known, now)
        self._drain(known, now)
        if known.held is None and not known.damped and known.ramp is None and (
                known.draining is None or known.ended or not known.member.drain_timeout):
            self._timed.discard(known.member.number)
        else:
            self._timed.add(known.member.number)

    def _damp(self, known: _Watched, said: State, now: float) -> None:
        damping = known.pool.damping
        if damping is None:
            known.damped = False
            return
        while known.changes and known.changes[0] <= now - damping.window:
            known.changes.popleft()
        if not known.damped:
            if len(known.changes) >= damping.changes:
                known.damped, known.well = True, None
                self._tell(known, now, EventKind.MEMBER_DAMPED,
                           f"changed {len(known.changes)} times within {damping.window:g} s; it stays down until it "
                           f"has been well for {damping.hold:g} s")
            else:
                return
        if said is State.DOWN:
            known.well = None
        elif known.well is None:
            known.well = now
        elif now - known.well >= damping.hold:
            known.damped = False
            known.changes.clear()

    def _change(self, known: _Watched, state: State, reason: str, now: float) -> None:
        first = known.state is State.UNKNOWN
        known.state, known.since, known.reason = state, now, reason
        if not first:
            known.changes.append(now)
        kind = EventKind.MEMBER_UP if state is State.UP else EventKind.MEMBER_DOWN
        self._tell(known, now, kind, reason or state.value)
        if state is State.UP and not first and known.pool.slow_start:
            known.ramp, known.step = now, 1
            self._tell(known, now, EventKind.MEMBER_SLOW_START, f"its whole weight in {known.pool.slow_start} s")
        elif state is State.DOWN:
            known.ramp, known.step = None, SLOW_START_STEPS

    def _ramp(self, known: _Watched, now: float) -> None:
        if known.ramp is None:
            return
        share = (now - known.ramp) / known.pool.slow_start
        known.step = min(SLOW_START_STEPS, 1 + int(share * SLOW_START_STEPS))
        if known.step == SLOW_START_STEPS:
            known.ramp = None

    def _drain(self, known: _Watched, now: float) -> None:
        limit = known.member.drain_timeout
        if known.draining is None or known.ended or not limit or now - known.draining < limit:
            return
        known.ended = True
        self._tell(known, now, EventKind.MEMBER_DRAINED, f"its {limit} s are over; what is left is reset")

    def _tell(self, known: _Watched, now: float, kind: EventKind, text: str) -> None:
        self._events.add(now, kind, text, known.pool.name, known.member.endpoint)

    # -------------------------------------------------------------- out

    def condition(self, member: Member) -> Condition:
        """What traffic has to know of a member; an operator's word is the last."""
        known = self._watched.get(member.number)
        said = WELL if known is None else known.condition
        if member.health is Override.AUTO:
            return said
        return said._replace(down=member.health is Override.DOWN)

    def report(self, number: int) -> Report | None:
        """What people are told of a member; None where nobody watches it."""
        known = self._watched.get(number)
        if known is None:
            return None
        return Report(known.state, known.since, known.reason, dict(known.monitors), known.draining,
                      known.ended, known.condition.share)
