# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the control segment's own work costs: ``python -m bench.selection``.

Measures in one process, without a switch: a pick of each algorithm, an answer to a QUERY, a
followed connection from QUERY to DELETE and its memory, and a change of configuration among
10 000 virtual servers. Prints a table of medians; keeps nothing.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from lbapp.config.model import Algorithm, Configuration, Member, Pool, Protocol, State, VirtualServer
from lbapp.control.engine import ControlSegment, Limits
from lbapp.control.messages import Closed, Delete, FlowSignature, Host, Live, Query, Reason, SwitchUp
from lbapp.control.selection import ALGORITHMS, Candidate
from lbapp.control.statistics import Counts

ROUNDS = 7
BATCH = 10_000
FOLLOWED = 100_000
SERVICES = 10_000


def microseconds(work: Callable[[], Any], count: int, rounds: int = ROUNDS) -> float:
    """The median time of one of ``count`` pieces of work that a call does."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) / count * 1e6)
    return statistics.median(times)


def queries(count: int, first: int = 1) -> list[Query]:
    """First packets of different clients."""
    return [Query(serial, 1, 1, b"\2\0\0\0\0\1",
                  FlowSignature((0x0A000000 + serial // 50_000).to_bytes(4, "big"), 1024 + serial % 50_000,
                                b"\xc0\0\2\1", 80, 6), 1, 2) for serial in range(first, first + count)]


def site(services: int, **fields: Any) -> Configuration:
    """Virtual servers with a pool of five members each."""
    algorithm = fields.pop("algorithm", Algorithm.ROUND_ROBIN)
    pools, servers = {}, {}
    for index in range(services):
        pools[f"p{index}"] = Pool(name=f"p{index}", lb_algorithm=algorithm, members=tuple(
            Member(address=f"10.{index // 250}.{index % 250}.{k}", protocol_port=80, number=5 * index + k)
            for k in range(1, 6)))
        servers[f"v{index}"] = VirtualServer(
            name=f"v{index}", vip_address=f"192.0.{index // 250}.{index % 250 + 1}", protocol=Protocol.TCP,
            protocol_port=80, number=index + 1, default_pool_id=f"p{index}", **fields)
    return Configuration(virtual_servers=servers, pools=pools)


def started(configuration: Configuration) -> ControlSegment:
    """A control segment with a switch that knows the first pool's members."""
    control = ControlSegment(configuration, Limits())
    control.handle(SwitchUp(1, {f"10.0.0.{k}": Host(b"\2\0\0\0\0\1", k) for k in range(1, 6)}), 0.0)
    return control


def busy(number: int) -> Counts:
    """A member's load with everything in it that an algorithm may look at."""
    counts = Counts()
    counts.active = 3 + number % 2
    counts.observed(0.01 * (1 + number % 4), number)
    counts.ended(50, 50_000, number)
    return counts


def picks(algorithm: Algorithm, members: int, asked: Sequence[Query]) -> float:
    """Microseconds of a pick among so many members."""
    selector = ALGORITHMS[algorithm]()
    selector.update([Candidate(number, 1 + number % 3, busy(number)) for number in range(1, members + 1)])
    selector.pick(asked[0].signature, 0)  # tables are built at the first
    pick = selector.pick

    def work() -> None:
        for query in asked:
            pick(query.signature, query.serial)

    return microseconds(work, len(asked))


def answers(asked: Sequence[Query], **fields: Any) -> float:
    """Microseconds of an answer to a QUERY."""
    took = []
    for _ in range(ROUNDS):
        query = started(site(1, **fields)).query
        begin = time.perf_counter()
        for one in asked:
            query(one, 1.0)
        took.append((time.perf_counter() - begin) / len(asked) * 1e6)
    return statistics.median(took)


def followed() -> list[tuple[str, str]]:
    """A followed connection's time and memory, and the time of a snapshot of all."""
    asked = queries(FOLLOWED)
    tracemalloc.start()
    control = started(site(1, state=State.RULES))
    before = tracemalloc.get_traced_memory()[0]
    for query in asked:
        control.query(query, 1.0)
    memory = (tracemalloc.get_traced_memory()[0] - before) / FOLLOWED
    tracemalloc.stop()
    begin = time.perf_counter()
    for query in asked:
        ways = (Closed(query.serial, 1, 1, Reason.IDLE, outbound) for outbound in (False, True))
        control.handle(Delete(1, tuple(ways)), 2.0)
    closing = (time.perf_counter() - begin) / FOLLOWED * 1e6
    control = started(site(1, algorithm=Algorithm.LEAST_CONNECTIONS))
    live = Live(1, tuple((query.serial, 1, query.serial % 5 + 1) for query in asked))
    control.handle(live, 1.0)
    snapshot = microseconds(lambda: control.handle(live, 2.0), 1, 3) / 1000
    return [("DELETE of both directions, one message a connection", f"{closing:8.2f} us"),
            ("memory of a followed connection, its signature not counted", f"{memory:8.0f} bytes"),
            (f"a snapshot of {FOLLOWED} connections", f"{snapshot:8.1f} ms")]


def configuration() -> list[tuple[str, str]]:
    """A large configuration, and one change in it."""
    large = site(SERVICES)
    control = ControlSegment()
    begin = time.perf_counter()
    control.configure(large, 0.0)
    first = (time.perf_counter() - begin) * 1000
    control.handle(SwitchUp(1, {}), 0.0)
    times = []
    for turn in range(ROUNDS):
        pools = dict(large.pools)
        pools["p7"] = Pool(name="p7", members=pools["p7"].members[turn % 2:])
        following = Configuration(virtual_servers=dict(large.virtual_servers), pools=pools)
        begin = time.perf_counter()
        control.configure(following, 0.0)
        times.append((time.perf_counter() - begin) * 1000)
    return [(f"{SERVICES} virtual servers with 5 members each, configured", f"{first:8.1f} ms"),
            ("one pool of them changed", f"{statistics.median(times):8.2f} ms")]


def main() -> None:
    """Measure and print."""
    asked = queries(BATCH)
    rows = []
    for algorithm in Algorithm:
        few, many = (picks(algorithm, members, asked) for members in (5, 200))
        rows.append((f"pick {algorithm.value.lower()}, 5 and 200 members", f"{few:8.2f} {many:8.2f} us"))
    for algorithm in Algorithm:
        rows.append((f"QUERY {algorithm.value.lower()}", f"{answers(asked, algorithm=algorithm):8.2f} us"))
    rows.append(("QUERY round_robin, state: rules", f"{answers(asked, state=State.RULES):8.2f} us"))
    rows += followed()
    rows += configuration()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}} {value}")


if __name__ == "__main__":
    main()
