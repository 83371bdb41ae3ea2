# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The simulation of ``bench.distribution``: servers by hand, sizes by their mean, and what must come out of it."""

from __future__ import annotations

import asyncio
from statistics import fmean

import pytest
from click.testing import CliRunner

from bench import arrivals, distribution, work_server
from bench.queueing import (
    NOTICED_SECONDS,
    WARM_UP,
    Machine,
    Outcome,
    Server,
    Trace,
    bounded_pareto,
    pareto_mean,
    requests,
    simulate,
)
from lbapp.config.model import Algorithm
from lbapp.config.pool import Synthesis
from tests.monitored import closed_port

TEN = (Machine(),) * 10
SLOW = Trace("slow", "", (Machine(speed=0.1), *TEN[1:]), 4000, seconds=20.0)


@pytest.fixture(scope="module")
def slow() -> dict[Algorithm, Outcome]:
    return {algorithm: simulate(SLOW, algorithm, 1) for algorithm in (
        Algorithm.ROUND_ROBIN, Algorithm.LEAST_CONNECTIONS, Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST,
        Algorithm.BOUNDED_LOAD_HASH)}


def test_a_server_shares_its_workers():
    """Two workers; three requests of 2 s each: together they need 6 s of work, which two workers do in 3."""
    server = Server(Machine(workers=2))
    for serial in range(2):
        server.add(2.0, serial)
    assert server.next() == 2.0
    server.add(2.0, 2)
    assert server.next() == pytest.approx(3.0)
    server.advance(1.5)
    server.speed = 0.5
    server.version += 1
    assert server.next() == pytest.approx(4.5)
    server.advance(4.5)
    assert [server.finish() for _ in range(3)] == [0, 1, 2]
    assert server.next() == float("inf")
    assert server.busy == pytest.approx(6.0)
    assert server.could == pytest.approx(1.5 * 2 + 3 * 1)


def test_a_lone_request_has_one_worker():
    server = Server(Machine(workers=4, speed=2.0))
    server.add(1.0, 0)
    assert server.next() == 0.5


def test_sizes_have_the_mean_they_are_meant_to_have():
    draws = [bounded_pareto((step + 0.5) / 200_000, 1.2) for step in range(200_000)]
    assert min(draws) >= 1
    assert max(draws) <= 1000
    assert fmean(draws) == pytest.approx(pareto_mean(1.2), rel=0.01)
    assert pareto_mean(1.0) == pytest.approx(6.91, rel=0.01)


def test_the_same_seed_has_the_same_requests():
    assert requests(SLOW, 1) == requests(SLOW, 1)
    assert requests(SLOW, 1) != requests(SLOW, 2)
    assert len(requests(SLOW, 1)) == SLOW.requests


def test_an_outcome_follows_from_the_seed(slow):
    again = simulate(SLOW, Algorithm.LEAST_RESPONSE_TIME, 1)
    assert again.latencies == slow[Algorithm.LEAST_RESPONSE_TIME].latencies
    assert again.imbalance == slow[Algorithm.LEAST_RESPONSE_TIME].imbalance


def test_a_slow_member_hurts_those_who_do_not_look(slow):
    high = {algorithm: outcome.percentile(99) for algorithm, outcome in slow.items()}
    for algorithm in (Algorithm.LEAST_CONNECTIONS, Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST,
                      Algorithm.BOUNDED_LOAD_HASH):
        assert high[algorithm] < high[Algorithm.ROUND_ROBIN] / 3, high
    assert high[Algorithm.LEAST_RESPONSE_TIME] < high[Algorithm.LEAST_CONNECTIONS], high
    assert slow[Algorithm.LEAST_RESPONSE_TIME].imbalance < slow[Algorithm.ROUND_ROBIN].imbalance


def test_a_dying_member_is_left():
    trace = Trace("dying", "", TEN, 4000, seconds=20.0, changes=((0.5, 0, 0.1),))
    turns = simulate(trace, Algorithm.ROUND_ROBIN, 1).percentile(99)
    assert simulate(trace, Algorithm.LEAST_RESPONSE_TIME, 1).percentile(99) < turns / 3


def test_what_a_dead_member_had_and_got_is_lost():
    trace = Trace("dead", "", TEN, 4000, seconds=20.0, deaths=((0.5, 0),))
    turns, least = (simulate(trace, algorithm, 1) for algorithm in (Algorithm.ROUND_ROBIN, Algorithm.LEAST_CONNECTIONS))
    expected = NOTICED_SECONDS * 4000 / 20 / 10
    assert 0.7 * expected < turns.lost < 1.5 * expected, "a tenth of all until it is noticed, and what it had"
    assert least.lost < turns.lost / 3, "its connections never end: it looks full"
    counted = sum(began >= WARM_UP * trace.seconds for began, _, _ in requests(trace, 1))
    assert len(turns.latencies) + turns.lost == counted, "and nothing else"


@pytest.mark.parametrize("synthesis", [Synthesis.EVEN_LOAD, Synthesis.CAPABILITY, Synthesis.DYNAMIC_RATIO])
def test_weights_that_follow_reports_spare_a_slow_member(slow, synthesis):
    outcome, turns = simulate(SLOW, synthesis, 1), slow[Algorithm.ROUND_ROBIN]
    assert outcome.imbalance < turns.imbalance
    assert outcome.percentile(99) < turns.percentile(99) / 3


def test_late_news_misleads_those_who_count_connections():
    """What has ended and is not told of yet makes fast members look full; who knows how fast they are is not misled."""
    trace = Trace("quick", "", SLOW.machines[:6], 6000, seconds=20.0, load=0.5, tail=0)
    late, soon = ({algorithm: simulate(trace, algorithm, 1, batch).percentile(99) for algorithm in (
        Algorithm.LEAST_CONNECTIONS, Algorithm.LEAST_RESPONSE_TIME)} for batch in (0.3, 0.005))
    assert late[Algorithm.LEAST_CONNECTIONS] > 1.5 * soon[Algorithm.LEAST_CONNECTIONS]
    assert late[Algorithm.LEAST_RESPONSE_TIME] < 1.5 * soon[Algorithm.LEAST_RESPONSE_TIME]


def test_where_all_are_alike_measuring_does_no_harm():
    """Sizes that differ a thousandfold tell nothing of members that are the same."""
    trace = Trace("skewed", "", TEN, 8000, seconds=20.0)
    plain = simulate(trace, Algorithm.LEAST_CONNECTIONS, 1)
    for algorithm in (Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST):
        outcome = simulate(trace, algorithm, 1)
        assert outcome.percentile(50) < 1.5 * plain.percentile(50)
        assert outcome.percentile(99) < 1.5 * plain.percentile(99)


def test_the_command_prints_a_table_a_trace():
    done = CliRunner().invoke(distribution.main, ["--requests", "200", "--traces", "slow,dying", "--algorithms",
                                                  "round_robin,FASTEST"])
    assert done.exit_code == 0, done.output
    assert done.output.count("FASTEST") == done.output.count("ROUND_ROBIN") == 2
    assert "LEAST_BYTES" not in done.output
    refused = CliRunner().invoke(distribution.main, ["--traces", "fast"])
    assert refused.exit_code == 2
    assert "expected some of skewed, slow, dying, dead, large" in refused.output


# ------------------------------------------------------------------ the real ones


@pytest.mark.parametrize("line", [b"POST /1", b"GET 1", b"GET /x", b"", b"GET /-1", b"GET /nan", b"GET /1e9"])
def test_the_server_refuses_what_is_no_work(line):
    with pytest.raises(ValueError, match=r"expected|convert"):
        work_server.seconds_of(line + b" HTTP/1.1\r\n\r\n")


async def listening(port: int) -> None:
    """Return when something accepts connections."""
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise AssertionError(f"nothing listens on {port}")


def test_clients_are_served_and_a_slow_server_takes_longer():
    async def both(ports: list[int]) -> list[dict[str, object]]:
        servers = [asyncio.create_task(work_server.serve(port, 50, speed))
                   for port, speed in zip(ports, (1.0, 0.05), strict=True)]
        for port in ports:
            await listening(port)
        results = await asyncio.gather(*(arrivals.load("127.0.0.1", port, 40, 1.0, 0.01, 7) for port in ports))
        for server in servers:
            server.cancel()
        return results

    with closed_port() as one, closed_port() as two:
        fast, slow = asyncio.run(both([kept.getsockname()[1] for kept in (one, two)]))
    assert fast["failures"] == slow["failures"] == 0
    assert len(fast["milliseconds"]) == len(slow["milliseconds"]) > 10  # type: ignore[arg-type]
    assert sum(slow["milliseconds"]) > sum(fast["milliseconds"])  # type: ignore[call-overload]
