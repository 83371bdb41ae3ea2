# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The master module (004, "master module 54"): synthesizes a distribution from what servers report of their load.

Owns the reports that count, each member's share, and the two buffers of the configuration table. Never measures, sends
or authenticates anything, and has no clock.

Theory of operation. Each member of a pool with a ``distribution`` has a **share**; weights are the shares of a pool on
a scale of 1 to 256. Every ``interval`` seconds an algorithm says which share each member ought to have:

* FORMULA is the operator's word: the share is its value, at once.
* CAPABILITY and DYNAMIC_RATIO compute it from what the member's server has left. That shrinks as its share grows: the
  computed share is a moving target. Of the way there, only as much is gone as the servers have left on average, at most
  half, and a quarter of the share in one round. (With servers alike, used up to u, a share that grows by 1 % takes
  u / (1 - u) % of what is left; a gain of (1 - u) / 2 makes each round halve the error, however full they are.)
* EVEN_LOAD knows no such target, but compares: who is busier than the average of the pool gets less in the next round,
  the others more (an integral controller: it rests only when the loads are even, whatever the servers' capacity). Its
  measurements are smoothed; gain and smoothing are chosen so that it is critically damped. A share changes by at most a
  quarter in one round.

A member without a report that counts (none, too old, flagged, or
one that lacks what the algorithm needs) has the share that its configured weight is among those that have one.

The result is written whole to the back-up buffer, and then the buffers are flipped (004, FIGURE 4): a reader has the
earlier table or the new one, never a part of it. Where no share would change by at least 5 %, nothing is written, so
that the data flow segment's tables do not change for noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from lbapp.config.formula import Formula, parse
from lbapp.config.model import Configuration
from lbapp.config.pool import Distribution, Member, Pool, Synthesis

MOST_WEIGHT = 256
SMOOTHING = 0.5
"""How much of a measured load is the newest."""
GAIN = 0.2
"""Of EVEN_LOAD. Share x and smoothed load y of a server follow x' = x - GAIN y', y' = y + SMOOTHING (x - y) in
logarithms: a double root near 0.7, so that errors halve in two rounds and hardly overshoot."""
SHARE_GAIN = 0.5
"""Of CAPABILITY and DYNAMIC_RATIO, at most."""
STEP = math.log(1.25)
"""A share changes by no more in a round."""
RANGE = math.log(64)
"""A share of EVEN_LOAD is no further than this from what is configured."""
HYSTERESIS = 0.05
LEAST_LEFT = 0.02
"""A server that is used up counts as if it had this left: it must be able to recover."""
CPU_EXPONENT, MEMORY_EXPONENT = 0.6, 0.4
"""DYNAMIC_RATIO: the CPU counts half as much again as memory; who has none of either left gets next to nothing."""
LOADS: dict[str, float] = {"utilization": 0.05, "cpu": 0.05, "load": 0.05, "clients": 2.0, "requests_per_second": 2.0}
"""What EVEN_LOAD evens out: the one that most servers of a pool report, of those the first; and the average below which
differences say nothing yet."""
MOST_EVENTS = 1000
LARGEST = 1e12
"""A share or a load beyond it counts as this: sums of them stay numbers."""
_RESTING = "it gets no new connections"

Endpoint = tuple[str, int]
"""Address and port of a server; port 0: whatever serves at that address."""


class Report(NamedTuple):
    """What an agent said last.

    Attributes:
        at: when, in the caller's seconds.
        flags: what is wrong with it; a flagged report does not count.
    """

    agent: str
    endpoints: frozenset[Endpoint]
    values: Mapping[str, float]
    at: float
    flags: tuple[str, ...] = ()


class Standing(NamedTuple):
    """Why a member has its weight.

    Attributes:
        agent: whose report counted; empty: none.
        load: what EVEN_LOAD measured, smoothed; or the share that was computed.
        why: empty; or why its share is the configured one.
    """

    agent: str
    load: float | None
    why: str


class Buffers:
    """The configuration table's two memory buffers, A and B (004, FIGURE 4).

    What a reader took from :attr:`active` never changes afterwards: a buffer is replaced, not rewritten.
    """

    def __init__(self) -> None:
        self._buffers: list[Mapping[int, int]] = [MappingProxyType({}), MappingProxyType({})]
        self._active = 0
        self.flips = 0

    @property
    def active(self) -> Mapping[int, int]:
        """The table that counts: members' numbers and weights."""
        return self._buffers[self._active]

    def write(self, table: Mapping[int, int]) -> None:
        """Fill the back-up buffer."""
        self._buffers[1 - self._active] = MappingProxyType(dict(table))

    def flip(self) -> None:
        """The back-up buffer becomes the active one."""
        self._active = 1 - self._active
        self.flips += 1


class _Course:
    """What is remembered of a member from round to round."""

    __slots__ = ("drift", "share", "smooth")

    def __init__(self) -> None:
        self.drift = 0.0
        self.smooth: float | None = None
        self.share: float | None = None


class _Distributed:
    """What is remembered of a pool."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.formula: Formula | None = parse(distribution.formula) if distribution.formula else None
        self.due = -math.inf
        self.members: tuple[tuple[int, int], ...] = ()
        self.courses: dict[int, _Course] = {}
        self.weights: dict[int, int] = {}
        self.shares: dict[int, float] = {}
        self.standings: dict[int, Standing] = {}
        self.metric = ""


class Master:
    """Reports in, distributions out."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        self._reports: dict[str, Report] = {}
        self._at: dict[Endpoint, set[str]] = {}
        self._pools: dict[str, _Distributed] = {}
        self._events: deque[str] = deque(maxlen=MOST_EVENTS)
        self._configuration: Configuration | None = None

    # -------------------------------------------------------------- reports

    def report(self, agent: str, endpoints: Iterable[Endpoint], values: Mapping[str, float], now: float,
               flags: Iterable[str] = ()) -> None:
        """An agent says how loaded the servers at some addresses are. Takes the place of what it said before.

        Args:
            flags: what is wrong with it. It takes the place of the earlier one, and does not count.
        """
        self.forget(agent)
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        report = Report(agent, frozenset(endpoints), finite, now, tuple(flags))
        self._reports[agent] = report
        for endpoint in report.endpoints:
            self._at.setdefault(endpoint, set()).add(agent)

    def forget(self, agent: str) -> bool:
        """An agent ends; returns whether anything was known of it."""
        report = self._reports.pop(agent, None)
        if report is None:
            return False
        for endpoint in report.endpoints:
            agents = self._at[endpoint]
            agents.discard(agent)
            if not agents:
                del self._at[endpoint]
        return True

    def of(self, member: Member, since: float) -> Report | None:
        """The report of a member's server: of its address and port before one of its address, but rather a newer one
        than one from before ``since``; rather one without flags; the newest."""
        found = None
        for endpoint in ((member.address, member.protocol_port), (member.address, 0)):
            agents = self._at.get(endpoint)
            if agents:
                best = max((self._reports[agent] for agent in agents),
                           key=lambda one: (one.at >= since, not one.flags, one.at, one.agent))
                if best.at >= since:
                    return best
                found = found or best
        return found

    # -------------------------------------------------------------- distributions

    @property
    def weights(self) -> Mapping[int, int]:
        """The active buffer: another object only after a flip."""
        return self.buffers.active

    @property
    def needs(self) -> tuple[float, float] | None:
        """How often reports are looked at, and after how long they are stale: the least of all pools, in seconds. None:
        no pool looks at any."""
        wanted = [one.distribution for one in self._pools.values()]
        return (min(one.interval for one in wanted), min(one.stale for one in wanted)) if wanted else None

    def standing(self, number: int) -> Standing | None:
        """Why a member has its weight; None: no distribution has it."""
        for distributed in self._pools.values():
            found = distributed.standings.get(number)
            if found is not None:
                return found
        return None

    def take_events(self) -> list[str]:
        """What was noteworthy since the last time, in its order."""
        events = list(self._events)
        self._events.clear()
        return events

    def distribute(self, configuration: Configuration, now: float,
                   resting: Collection[int] = frozenset()) -> Mapping[int, int]:
        """Do what is due; to be called at least once a second.

        Args:
            resting: the numbers of members that get no new connections just now (down, say). What they report says
                nothing of their share.

        Returns:
            The active buffer: for each member, by number, of a pool with a ``distribution`` its weight, 1 to 256, in
            the place of the configured one. Members of configured weight 0 are not in it.
        """
        changed = False
        if configuration is not self._configuration:
            self._configuration = configuration
            changed = self._reconcile(configuration)
        for key, distributed in self._pools.items():
            pool = configuration.pools[key]
            members = tuple((one.number, one.weight) for one in pool.members)
            if now < distributed.due and members == distributed.members:
                continue
            distributed.due = now + distributed.distribution.interval
            shares = self._round(distributed, pool, now, resting)
            weights = _scaled(shares)
            if members != distributed.members or (weights != distributed.weights
                                                  and _differ(distributed.shares, shares)):
                distributed.members, distributed.shares, distributed.weights = members, shares, weights
                changed = True
        if changed:
            self.buffers.write({number: weight for one in self._pools.values() for number, weight in
                                one.weights.items()})
            self.buffers.flip()
        return self.buffers.active

    def _reconcile(self, configuration: Configuration) -> bool:
        """Pools that have a distribution, and only those; one that was changed begins anew."""
        wanted = {key: pool.distribution for key, pool in configuration.pools.items() if pool.distribution is not None}
        gone = [key for key, one in self._pools.items() if wanted.get(key) != one.distribution]
        for key in gone:
            del self._pools[key]
        for key, distribution in wanted.items():
            if key not in self._pools:
                self._pools[key] = _Distributed(distribution)
        return bool(gone)

    def _round(self, distributed: _Distributed, pool: Pool, now: float, resting: Collection[int]) -> dict[int, float]:
        members = {one.number: one for one in pool.members if one.weight > 0}
        for number in [number for number in distributed.courses if number not in members]:
            del distributed.courses[number]
        reports: dict[int, Report] = {}
        whys: dict[int, str] = {}
        for number, member in members.items():
            report = self.of(member, now - distributed.distribution.stale)
            if not member.takes_new or number in resting:
                whys[number] = _RESTING
            elif report is None:
                whys[number] = "no report"
            elif now - report.at > distributed.distribution.stale:
                whys[number] = f"the report of agent {report.agent} is stale"
            elif report.flags:
                whys[number] = f"the report of agent {report.agent} is flagged: {'; '.join(report.flags)}"
            else:
                reports[number] = report
        loads = _SYNTHESES[distributed.distribution.algorithm](distributed, members, reports, whys)
        for number in members:
            if number not in loads:
                distributed.courses.pop(number, None)
        self._tell(distributed, pool, members, whys)
        distributed.standings = {number: Standing(reports[number].agent if number in loads else "", loads.get(number),
                                                  whys.get(number, "")) for number in members}
        return _completed(members, {number: distributed.courses[number].share or 0.0 for number in loads})

    def _tell(self, distributed: _Distributed, pool: Pool, members: Mapping[int, Member],
              whys: Mapping[int, str]) -> None:
        for number, member in members.items():
            before = distributed.standings.get(number)
            was, why = before.why if before is not None else "", whys.get(number, "")
            if why == was or (why or was) == _RESTING or (before is None and not why):
                continue
            name = f"pool {pool.name}: member {member.endpoint}"
            self._events.append(f"{name}: its weight is the configured one: {why}" if why else
                                f"{name}: its weight follows what its server reports")


# ------------------------------------------------------------------ algorithms


def _completed(members: Mapping[int, Member], shares: Mapping[int, float]) -> dict[int, float]:
    """Shares of all members: who has none has what its configured weight is among those who have. With no share at all:
    the configured weights."""
    if not any(shares.values()):
        return {number: float(member.weight) for number, member in members.items()}
    average = sum(shares.values()) / sum(members[number].weight for number in shares)
    return {number: shares.get(number, average * member.weight) for number, member in members.items()}


def _scaled(shares: Mapping[int, float]) -> dict[int, int]:
    """Weights of 1 to 256 in the ratio of the shares. Shares that are such weights stay as they are."""
    if all(share == round(share) and 1 <= share <= MOST_WEIGHT for share in shares.values()):
        return {number: round(share) for number, share in shares.items()}
    largest = max(shares.values())
    return {number: max(1, round(share / largest * MOST_WEIGHT)) for number, share in shares.items()}


def _differ(before: Mapping[int, float], after: Mapping[int, float]) -> bool:
    """Whether the share of any member changes by at least 5 % of itself."""
    if before.keys() != after.keys():
        return True
    was, will = sum(before.values()), sum(after.values())
    return any(abs(after[number] / will - share / was) >= HYSTERESIS * share / was
               for number, share in before.items())


def _even(distributed: _Distributed, members: Mapping[int, Member], reports: Mapping[int, Report],
          whys: dict[int, str]) -> dict[int, float]:
    """EVEN_LOAD: who is busier than the average gets less."""
    said = {name: sum(name in one.values for one in reports.values()) for name in LOADS}
    metric = max(said, key=lambda name: said[name])  # of several the first
    whys.update((number, f"its server does not report {metric if said[metric] else ', '.join(LOADS)}")
                for number, report in reports.items() if metric not in report.values)
    if not said[metric]:
        return {}
    if metric != distributed.metric:
        distributed.metric = metric
        for course in distributed.courses.values():
            course.smooth = None
    loads = {}
    for number, report in reports.items():
        if metric not in report.values:
            continue
        course = distributed.courses.setdefault(number, _Course())
        measured = min(max(report.values[metric], 0.0), LARGEST)
        course.smooth = measured if course.smooth is None else course.smooth + SMOOTHING * (measured - course.smooth)
        loads[number] = course.smooth
    mean = sum(loads.values()) / len(loads)
    for number, load in loads.items():
        course = distributed.courses[number]
        error = (mean - load) / max(mean, LOADS[metric])
        if abs(error) > HYSTERESIS:  # what a table that stays does not even out must not add up either
            course.drift += min(max(GAIN * error, -STEP), STEP)
    # Only ratios count: what all have in common would wander off without end.
    total = sum(members[number].weight for number in loads)
    common = sum(members[number].weight * distributed.courses[number].drift for number in loads) / total
    for number in loads:
        course = distributed.courses[number]
        course.drift = min(max(course.drift - common, -RANGE), RANGE)
        course.share = members[number].weight * math.exp(course.drift)
    return loads


def _wanted(members: Mapping[int, Member], reports: Mapping[int, Report], whys: dict[int, str],
            share: Callable[[Member, Mapping[str, float]], float | None], lacking: str) -> dict[int, float]:
    """Shares from each report alone."""
    wanted: dict[int, float] = {}
    for number, report in reports.items():
        value = share(members[number], report.values)
        if value is None or not math.isfinite(value):
            whys[number] = lacking
        else:
            wanted[number] = min(max(value, 0.0), LARGEST)
    if not any(wanted.values()):
        whys.update((number, "no server of the pool has any share") for number in wanted)
        return {}
    return wanted


def _approach(distributed: _Distributed, wanted: Mapping[int, float], reports: Mapping[int, Report]) -> None:
    """Go some of the way to the shares that are wanted now."""
    used = [reports[number].values["cpu"] for number in wanted if "cpu" in reports[number].values]
    gain = SHARE_GAIN * max(1.0 - sum(used) / len(used), LEAST_LEFT) if used else SHARE_GAIN
    # Only ratios count: what was so far is brought to the scale of what is wanted.
    known = {number: course.share for number, course in distributed.courses.items()
             if number in wanted and course.share}
    least = sum(wanted.values()) / MOST_WEIGHT / 4  # a weight tells no less
    scale = sum(wanted[number] for number in known) / sum(known.values()) if known else 1.0
    for number, value in wanted.items():
        course = distributed.courses.setdefault(number, _Course())
        value = max(value, least)
        if number in known:
            before = max(known[number] * scale, least)
            value = before * math.exp(min(max(gain * math.log(value / before), -STEP), STEP))
        course.share = value


def _left(used: float) -> float:
    return max(1.0 - used, LEAST_LEFT)


def _capability(distributed: _Distributed, members: Mapping[int, Member], reports: Mapping[int, Report],
                whys: dict[int, str]) -> dict[int, float]:
    """CAPABILITY: what a server can do: as it says itself, or its idle cores."""
    def share(member: Member, values: Mapping[str, float]) -> float | None:
        if "capability" in values:
            return member.weight * values["capability"]
        if "cores" not in values:
            return None
        return member.weight * values["cores"] * (_left(values["cpu"]) if "cpu" in values else 1.0)

    wanted = _wanted(members, reports, whys, share, "its server reports neither capability nor cores")
    _approach(distributed, wanted, reports)
    return wanted


def _dynamic(distributed: _Distributed, members: Mapping[int, Member], reports: Mapping[int, Report],
             whys: dict[int, str]) -> dict[int, float]:
    """DYNAMIC_RATIO: what is left of CPU and memory, the geometric mean of both."""
    def share(member: Member, values: Mapping[str, float]) -> float | None:
        exponents = {"cpu": CPU_EXPONENT, "memory": MEMORY_EXPONENT}
        there = {name: exponent for name, exponent in exponents.items() if name in values}
        if not there:
            return None
        return member.weight * math.exp(sum(exponent * math.log(_left(values[name])) for name, exponent in there.items()
                                            ) / sum(there.values()))

    wanted = _wanted(members, reports, whys, share, "its server reports neither cpu nor memory")
    _approach(distributed, wanted, reports)
    return wanted


def _formula(distributed: _Distributed, members: Mapping[int, Member], reports: Mapping[int, Report],
             whys: dict[int, str]) -> dict[int, float]:
    """FORMULA: its value."""
    formula = distributed.formula
    assert formula is not None

    def share(member: Member, values: Mapping[str, float]) -> float | None:
        return formula.value({**values, "weight": float(member.weight)})

    unknown = "the formula cannot be computed"
    wanted = _wanted(members, reports, whys, share, unknown)
    for number, why in whys.items():
        missing = formula.names - reports[number].values.keys() - {"weight"} if why == unknown else ()
        if missing:
            whys[number] = f"{unknown}: its server does not report {', '.join(sorted(missing))}"
    for number, value in wanted.items():
        distributed.courses.setdefault(number, _Course()).share = value
    return wanted


_SYNTHESES: dict[Synthesis, Callable[[_Distributed, Mapping[int, Member], Mapping[int, Report], dict[int, str]],
                                     dict[int, float]]] = {
    Synthesis.EVEN_LOAD: _even, Synthesis.CAPABILITY: _capability, Synthesis.DYNAMIC_RATIO: _dynamic,
    Synthesis.FORMULA: _formula,
}
