# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A pool of queueing servers, simulated, and the control segment that selects among them.

Only the servers and their clients are simulated. The control segment is the real one: it is asked
(QUERY) for each request, and told of ended connections (DELETE) in batches, as by a switch.
Everything follows from the trace and its seed; no clock is read.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from lbapp.config.model import Algorithm, Configuration, Member, Pool, Protocol, VirtualServer
from lbapp.config.pool import Distribution, Override, Synthesis
from lbapp.control.engine import ControlSegment
from lbapp.control.master import Master
from lbapp.control.messages import Closed, Delete, FlowSignature, Host, Query, Reason, SwitchUp

BATCH_SECONDS = 0.1
"""How often a switch tells of connections that ended."""
REPORT_SECONDS = 1.0
"""How often agents beside the servers report."""
NOTICED_SECONDS = 2.5
"""How long checks take to notice that a member is dead: two of them, one a second, each with a second's patience."""
WARM_UP = 0.2
"""Requests of this first part of the time are not counted."""
BYTES_PER_SECOND = 1_000_000
"""What an answer has for each second of work: large answers are long ones."""
PACKETS = 10
SWITCH, VIRTUAL_SERVER = 1, 1


@dataclass(frozen=True)
class Machine:
    """What a member can do: so many requests side by side, each at ``speed`` (1: a second of work in a second)."""

    workers: int = 4
    speed: float = 1.0
    weight: int = 1

    @property
    def capacity(self) -> float:
        """Seconds of work in a second."""
        return self.workers * self.speed


@dataclass(frozen=True)
class Trace:
    """Requests, and the members that serve them.

    Attributes:
        tail: the exponent of the sizes' bounded Pareto distribution; 0: they are exponentially distributed.
        load: work that arrives, as a share of what all members together can do in the beginning.
        changes: (share of the time, index of a member, its speed from then on).
        deaths: (share of the time, index of a member that is dead from then on).
        clients: different addresses; the n-th has a share of 1/n of the first one's.
    """

    name: str
    text: str
    machines: tuple[Machine, ...]
    requests: int
    seconds: float = 40.0
    load: float = 0.6
    tail: float = 1.2
    changes: tuple[tuple[float, int, float], ...] = ()
    deaths: tuple[tuple[float, int], ...] = ()
    clients: int = 5000

    @property
    def mean_work(self) -> float:
        """Seconds of work in a request, on average."""
        return self.load * sum(machine.capacity for machine in self.machines) * self.seconds / self.requests


@dataclass(frozen=True)
class Outcome:
    """What became of a trace's requests under one algorithm; ``imbalance``: the busiest member's utilisation by the
    mean one's, of those that live; ``lost``: requests that a dead member had or got."""

    imbalance: float
    latencies: Sequence[float] = field(repr=False)
    lost: int = 0

    def percentile(self, percent: float) -> float:
        """Seconds that so many per cent of the requests did not exceed."""
        return self.latencies[min(len(self.latencies) - 1, math.ceil(len(self.latencies) * percent / 100) - 1)]


def bounded_pareto(draw: float, tail: float, spread: float = 1000.0) -> float:
    """A size from 1 to ``spread``, from an even draw of [0, 1)."""
    return float((1 - draw * (1 - spread ** -tail)) ** (-1 / tail))


def pareto_mean(tail: float, spread: float = 1000.0) -> float:
    """The mean of :func:`bounded_pareto`."""
    if tail == 1:
        return math.log(spread) / (1 - 1 / spread)
    return tail / (tail - 1) * (1 - spread ** (1 - tail)) / (1 - spread ** -tail)


def requests(trace: Trace, seed: int) -> list[tuple[float, float, int]]:
    """(time, work in seconds, client) of all requests: Poisson arrivals."""
    chance = random.Random(f"{trace.name} {seed}")
    shares = list(accumulate(1 / rank for rank in range(1, trace.clients + 1)))
    rate = trace.requests / trace.seconds
    mean = pareto_mean(trace.tail) if trace.tail else 1.0
    now, result = 0.0, []
    for _ in range(trace.requests):
        now += chance.expovariate(rate)
        size = bounded_pareto(chance.random(), trace.tail) if trace.tail else chance.expovariate(1.0)
        result.append((now, size * trace.mean_work / mean, bisect_right(shares, chance.random() * shares[-1])))
    return result


class Server:
    """A member that serves all its requests at once, in equal shares (processor sharing).

    Work is measured on a clock of its own, which runs as fast as each of the requests is served.
    """

    __slots__ = ("_at", "_clock", "busy", "could", "machine", "running", "speed", "version")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.speed = machine.speed
        self.running: list[tuple[float, int]] = []
        self.version = 0
        self.busy = self.could = 0.0
        self._clock = self._at = 0.0

    def _rate(self) -> float:
        return self.speed * min(1.0, self.machine.workers / max(1, len(self.running)))

    def advance(self, now: float) -> None:
        """Serve until ``now``."""
        passed = now - self._at
        self._clock += passed * self._rate()
        self.busy += passed * self.speed * min(len(self.running), self.machine.workers)
        self.could += passed * self.speed * self.machine.workers
        self._at = now

    def add(self, work: float, serial: int) -> None:
        """Another request, now."""
        heapq.heappush(self.running, (self._clock + work, serial))
        self.version += 1

    def finish(self) -> int:
        """The first request is done, now; returns its serial."""
        self.version += 1
        return heapq.heappop(self.running)[1]

    def next(self) -> float:
        """When the first request will be done, if nothing changes."""
        return self._at + max(0.0, self.running[0][0] - self._clock) / self._rate() if self.running else math.inf


class Segment:
    """The real control segment with one virtual server, whose pool these are, and a switch that reaches them.

    Args:
        how: who selects; a synthesis of weights from what servers report selects in turns by these weights.
        machines: the members.
    """

    def __init__(self, how: Algorithm | Synthesis, machines: Sequence[Machine]) -> None:
        self._master = Master() if isinstance(how, Synthesis) else None
        self._weights: Mapping[int, int] = {}
        self._dead: set[int] = set()
        self._members = [Member(address=f"10.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}",
                                protocol_port=80, number=number + 1, weight=machine.weight)
                         for number, machine in enumerate(machines)]
        self._pool = Pool(
            name="pool", members=tuple(self._members),
            lb_algorithm=how if isinstance(how, Algorithm) else Algorithm.WEIGHTED_ROUND_ROBIN,
            distribution=Distribution(algorithm=how, interval=1) if isinstance(how, Synthesis) else None)
        self._server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80,
                                     number=VIRTUAL_SERVER, default_pool_id="pool")
        self._hosts = {member.address: Host(b"\2\0\0\0\0\1", 1) for member in self._members}
        self._configured = self._configuration()
        self.control = ControlSegment(self._configured)
        self.control.handle(SwitchUp(SWITCH, self._hosts), 0.0)

    def _configuration(self) -> Configuration:
        members = tuple(msgspec.structs.replace(
            one, weight=self._weights.get(one.number, one.weight),
            health=Override.DOWN if one.number in self._dead else Override.AUTO) for one in self._members)
        return Configuration(virtual_servers={"web": self._server},
                             pools={"pool": msgspec.structs.replace(self._pool, members=members)})

    @property
    def listens(self) -> bool:
        """Whether weights follow what servers report."""
        return self._master is not None

    def choose(self, serial: int, client: int, now: float) -> int:
        """The index of the member that a request of a client gets."""
        address = (0x0A800000 + client).to_bytes(4, "big")
        signature = FlowSignature(address, 1024 + serial % 60_000, b"\xc0\0\2\1", 80, 6)
        reply = self.control.query(Query(serial, SWITCH, 1, b"\2\0\0\0\0\1", signature, VIRTUAL_SERVER, 2), now)
        assert reply is not None  # the pool has neither limits nor a waiting line
        assert reply.member
        return reply.member - 1

    def ended(self, closed: Sequence[Closed], now: float) -> None:
        """A batch of connections that ended."""
        self.control.handle(Delete(SWITCH, tuple(closed)), now)

    def died(self, index: int, now: float) -> None:
        """Its checks say so."""
        self._dead.add(index + 1)
        self._configure(now)

    def _configure(self, now: float) -> None:
        self.control.handle(SwitchUp(SWITCH, self._hosts), now)  # as neighbours answer from time to time
        self.control.configure(self._configuration(), now)

    def report(self, values: Sequence[Mapping[str, float]], now: float) -> None:
        """What the servers' agents say, all of them at once, where somebody listens."""
        assert self._master is not None
        for member, said in zip(self._members, values, strict=True):
            if member.number not in self._dead:
                self._master.report(member.address, [(member.address, 0)], said, now)
        weights = self._master.distribute(self._configured, now, self._dead)
        if weights is not self._weights:
            self._weights = weights
            self._configure(now)


def simulate(trace: Trace, how: Algorithm | Synthesis, seed: int, batch: float = BATCH_SECONDS) -> Outcome:
    """Run a trace to the end of its last request.

    Args:
        trace: what comes, and who is there.
        how: who selects, or what makes the weights.
        seed: of the requests.
        batch: seconds from one batch of ended connections to the next.
    """
    return _Run(trace, Segment(how, trace.machines), seed, batch).outcome()


class _Run:
    """One simulation. ``due`` are things that happen at their time: (when, in which order, what)."""

    def __init__(self, trace: Trace, segment: Segment, seed: int, batch: float) -> None:
        self.trace, self.segment, self.batch = trace, segment, batch
        self.servers = [Server(machine) for machine in trace.machines]
        self.arrivals = requests(trace, seed)
        self.done: list[tuple[float, int, int]] = []  # (when a request will be, its server, the server's version then)
        self.due: list[tuple[float, int, Callable[[float], None]]] = []
        self.dead: set[int] = set()
        self.closed: list[Closed] = []
        self.took: list[float] = []
        self.lost = 0
        self.used: list[tuple[float, float]] = []
        self.reported = [0.0] * len(self.servers)
        self.ordered = 0
        for share, index, speed in trace.changes:
            self._at(share * trace.seconds, lambda now, index=index, speed=speed: self._change(index, speed, now))  # type: ignore[misc]
        for share, index in trace.deaths:
            self._at(share * trace.seconds, lambda now, index=index: self._die(index, now))  # type: ignore[misc]
            self._at(share * trace.seconds + NOTICED_SECONDS, lambda now, index=index: segment.died(index, now))  # type: ignore[misc]
        self._at(trace.seconds, self._count)
        self._at(batch, self._tell)
        if segment.listens:
            self._at(REPORT_SECONDS, self._report)

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        self.ordered += 1
        heapq.heappush(self.due, (when, self.ordered, what))

    def outcome(self) -> Outcome:
        """Do it."""
        arrived = 0
        while arrived < len(self.arrivals) or self.done:
            arrival = self.arrivals[arrived][0] if arrived < len(self.arrivals) else math.inf
            done = self.done[0][0] if self.done else math.inf
            if self.due[0][0] <= min(arrival, done):
                when, _, what = heapq.heappop(self.due)
                what(when)
            elif arrival <= done:
                self._arrive(arrived)
                arrived += 1
            else:
                self._finish(*heapq.heappop(self.done))
        if not self.used:
            self._count(max(self.trace.seconds, self.arrivals[-1][0]))
        shares = [busy / could for index, (busy, could) in enumerate(self.used) if index not in self.dead]
        return Outcome(max(shares) / (sum(shares) / len(shares)), sorted(self.took), self.lost)

    def _arrive(self, serial: int) -> None:
        now, work, client = self.arrivals[serial]
        index = self.segment.choose(serial, client, now)
        if index in self.dead:
            self.lost += 1
            return
        self.servers[index].advance(now)
        self.servers[index].add(work, serial)
        self._reschedule(index)

    def _reschedule(self, index: int) -> None:
        when = self.servers[index].next()
        if when < math.inf:
            heapq.heappush(self.done, (when, index, self.servers[index].version))

    def _finish(self, now: float, index: int, version: int) -> None:
        server = self.servers[index]
        if version != server.version:
            return
        server.advance(now)
        serial = server.finish()
        self._reschedule(index)
        began, work, _ = self.arrivals[serial]
        self.closed.append(Closed(serial, VIRTUAL_SERVER, index + 1, Reason.SHUTDOWN, packets=PACKETS,
                                  bytes=int(work * BYTES_PER_SECOND), duration=now - began))
        if began >= WARM_UP * self.trace.seconds:
            self.took.append(now - began)

    def _change(self, index: int, speed: float, now: float) -> None:
        server = self.servers[index]
        server.advance(now)
        server.speed = speed
        server.version += 1
        self._reschedule(index)

    def _die(self, index: int, now: float) -> None:
        """What it had is lost, and nobody hears of these connections' ends."""
        server = self.servers[index]
        server.advance(now)
        self.lost += len(server.running)
        server.running.clear()
        server.version += 1
        self.dead.add(index)

    def _tell(self, now: float) -> None:
        if self.closed:
            self.segment.ended(self.closed, now)
            self.closed.clear()
        self._at(now + self.batch, self._tell)

    def _report(self, now: float) -> None:
        said = []
        for index, server in enumerate(self.servers):
            server.advance(now)
            used = (server.busy - self.reported[index]) / (server.speed * server.machine.workers * REPORT_SECONDS)
            self.reported[index] = server.busy
            said.append({"cpu": min(used, 1.0), "cores": server.speed * server.machine.workers,
                         "clients": float(len(server.running))})
        self.segment.report(said, now)
        self._at(now + REPORT_SECONDS, self._report)

    def _count(self, now: float) -> None:
        """What follows only empties the queues."""
        for server in self.servers:
            server.advance(now)
        self.used = [(server.busy, server.could) for server in self.servers]
