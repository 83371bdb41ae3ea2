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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lbapp.config.model import Algorithm, Configuration, Member, Pool, Protocol, VirtualServer
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import Closed, Delete, FlowSignature, Host, Query, Reason, SwitchUp

BATCH_SECONDS = 0.1
"""How often a switch tells of connections that ended."""
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
    clients: int = 5000

    @property
    def mean_work(self) -> float:
        """Seconds of work in a request, on average."""
        return self.load * sum(machine.capacity for machine in self.machines) * self.seconds / self.requests


@dataclass(frozen=True)
class Outcome:
    """What became of a trace's requests under one algorithm; ``imbalance``: the busiest member's utilisation by the
    mean one's."""

    imbalance: float
    latencies: Sequence[float] = field(repr=False)

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


def control_segment(algorithm: Algorithm, machines: Sequence[Machine]) -> ControlSegment:
    """A control segment with one virtual server, whose pool these are, and a switch that reaches them."""
    addresses = [f"10.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"
                 for number in range(len(machines))]
    pool = Pool(name="pool", lb_algorithm=algorithm, members=tuple(
        Member(address=address, protocol_port=80, number=number, weight=machine.weight)
        for number, (address, machine) in enumerate(zip(addresses, machines, strict=True), 1)))
    server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80,
                           number=VIRTUAL_SERVER, default_pool_id="pool")
    control = ControlSegment(Configuration(virtual_servers={"web": server}, pools={"pool": pool}))
    control.handle(SwitchUp(SWITCH, {address: Host(b"\2\0\0\0\0\1", 1) for address in addresses}), 0.0)
    return control


def simulate(trace: Trace, algorithm: Algorithm, seed: int, batch: float = BATCH_SECONDS) -> Outcome:
    """Run a trace to the end of its last request.

    Args:
        trace: what comes, and who is there.
        algorithm: who selects.
        seed: of the requests.
        batch: seconds from one batch of ended connections to the next.
    """
    control = control_segment(algorithm, trace.machines)
    servers = [Server(machine) for machine in trace.machines]
    arrivals = requests(trace, seed)
    events: list[tuple[float, int, int]] = []  # (when a request will be done, server, the server's version then)
    changes = sorted(((share * trace.seconds, index, speed) for share, index, speed in trace.changes), reverse=True)
    ended: list[Closed] = []
    took: list[float] = []
    used: list[tuple[float, float]] = []
    batch_at, arrived = batch, 0

    def reschedule(index: int) -> None:
        when = servers[index].next()
        if when < math.inf:
            heapq.heappush(events, (when, index, servers[index].version))

    while arrived < len(arrivals) or events:
        arrival = arrivals[arrived][0] if arrived < len(arrivals) else math.inf
        change = changes[-1][0] if changes else math.inf
        now = min(arrival, change, batch_at, events[0][0] if events else math.inf)
        if not used and now >= trace.seconds:
            for server in servers:  # what follows only empties the queues
                server.advance(now)
            used = [(server.busy, server.could) for server in servers]
        if now == batch_at:
            batch_at += batch
            if ended:
                control.handle(Delete(SWITCH, tuple(ended)), now)
                ended.clear()
        elif now == change:
            _, index, speed = changes.pop()
            servers[index].advance(now)
            servers[index].speed = speed
            servers[index].version += 1
            reschedule(index)
        elif now == arrival:
            _, work, client = arrivals[arrived]
            serial = arrived
            arrived += 1
            signature = FlowSignature((0x0A800000 + client).to_bytes(4, "big"), 1024 + serial % 60_000,
                                      b"\xc0\0\2\1", 80, 6)
            reply = control.query(Query(serial, SWITCH, 1, b"\2\0\0\0\0\1", signature, VIRTUAL_SERVER, 2), now)
            assert reply is not None and reply.member  # the pool has neither limits nor a waiting line
            index = reply.member - 1
            servers[index].advance(now)
            servers[index].add(work, serial)
            reschedule(index)
        else:
            _, index, version = heapq.heappop(events)
            server = servers[index]
            if version != server.version:
                continue
            server.advance(now)
            serial = server.finish()
            reschedule(index)
            began, work, _ = arrivals[serial]
            ended.append(Closed(serial, VIRTUAL_SERVER, index + 1, Reason.SHUTDOWN, packets=PACKETS,
                                bytes=int(work * BYTES_PER_SECOND), duration=now - began))
            if began >= WARM_UP * trace.seconds:
                took.append(now - began)
    shares = [busy / could for busy, could in used or [(server.busy, server.could) for server in servers]]
    return Outcome(max(shares) / (sum(shares) / len(shares)), sorted(took))
