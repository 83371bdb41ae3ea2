# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.control.master``: what becomes of reports, and servers of unequal capacity that are simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from lbapp.config.model import Configuration
from lbapp.config.pool import Algorithm, Distribution, Member, Pool, Synthesis
from lbapp.control.master import Buffers, Master, Report


def site(*weights: int, pool: str = "web", first: int = 1, members: Mapping[int, Mapping[str, Any]] | None = None,
         **distribution: Any) -> Pool:
    """A pool whose member number n is 10.0.0.n, port 80."""
    distribution.setdefault("algorithm", Synthesis.EVEN_LOAD)
    return Pool(name=pool, lb_algorithm=Algorithm.WEIGHTED_ROUND_ROBIN, distribution=Distribution(**distribution),
                members=tuple(Member(**{"address": f"10.0.0.{number}", "protocol_port": 80, "number": number,
                                        "weight": weight, **(members or {}).get(number, {})})
                              for number, weight in enumerate(weights, first)))


def of(*pools: Pool) -> Configuration:
    return Configuration(pools={pool.name: pool for pool in pools})


def say(master: Master, number: int, now: float, flags: Iterable[str] = (), **values: float) -> None:
    master.report(f"s{number}", [(f"10.0.0.{number}", 80)], values, now, flags)


def shares(weights: Mapping[int, int]) -> dict[int, float]:
    total = sum(weights.values())
    return {number: weight / total for number, weight in weights.items()}


# ------------------------------------------------------------------ the buffers


def test_a_reader_has_a_whole_table_or_the_one_before() -> None:
    buffers = Buffers()
    first = buffers.active
    buffers.write({1: 10, 2: 20})
    assert buffers.active is first and first == {}
    buffers.flip()
    second = buffers.active
    assert second == {1: 10, 2: 20} and first == {}
    written = {1: 7, 2: 8, 3: 9}
    buffers.write(written)
    written[1] = 0  # whoever wrote it may go on with it
    assert buffers.active is second
    buffers.flip()
    buffers.write({})
    buffers.flip()
    assert second == {1: 10, 2: 20} and buffers.active == {} and buffers.flips == 3
    with pytest.raises(TypeError):
        second[1] = 5  # type: ignore[index]


# ------------------------------------------------------------------ who reports what


def test_without_reports_weights_are_the_configured_ones() -> None:
    master = Master()
    other = Pool(name="other", members=(Member(address="10.9.9.9", protocol_port=1, number=9),))
    configuration = of(site(3, 1, 0), other)
    assert master.distribute(configuration, 0.0) == {1: 3, 2: 1}  # of weight 0 nobody speaks, nor of other pools
    assert master.take_events() == [
        "pool web: member 10.0.0.1:80: its weight is the configured one: no report",
        "pool web: member 10.0.0.2:80: its weight is the configured one: no report"]
    assert master.take_events() == []


def test_the_table_is_another_object_only_after_a_flip() -> None:
    master, configuration = Master(), of(site(1, 1))
    before = master.distribute(configuration, 0.0)
    assert master.distribute(configuration, 100.0) is before is master.weights
    assert master.distribute(of(site(1, 2)), 101.0) == {1: 1, 2: 2}


def test_a_round_is_due_every_interval() -> None:
    master, configuration = Master(), of(site(1, 1, algorithm=Synthesis.FORMULA, formula="share", interval=5))
    master.distribute(configuration, 0.0)
    for number, share in ((1, 3), (2, 1)):
        say(master, number, 1.0, share=share)
    assert master.distribute(configuration, 4.9) == {1: 1, 2: 1}
    assert master.distribute(configuration, 5.0) == {1: 3, 2: 1}
    assert master.take_events()[-1] == "pool web: member 10.0.0.2:80: its weight follows what its server reports"


@pytest.mark.parametrize(("age", "flags", "why"), [
    (15.5, (), "the report of agent s2 is stale"),
    (0.0, ("cpu: expected 0 to 1, got 7",), "the report of agent s2 is flagged: cpu: expected 0 to 1, got 7")])
def test_a_member_whose_report_does_not_count_has_its_configured_share(
        age: float, flags: tuple[str, ...], why: str) -> None:
    master = Master()
    configuration = of(site(1, 2, 1, algorithm=Synthesis.FORMULA, formula="share"))
    for number, share in ((1, 60), (3, 20)):
        say(master, number, 20.0, share=share)
    say(master, 2, 20.0 - age, flags, share=1000)
    weights = master.distribute(configuration, 20.0)
    # Twice the average of the others, which have the weight 1: 80.
    assert weights == {1: 60, 2: 80, 3: 20}
    standing = master.standing(2)
    assert standing is not None and standing.why == why and standing.agent == ""
    assert master.take_events() == [f"pool web: member 10.0.0.2:80: its weight is the configured one: {why}"]
    say(master, 2, 30.0, share=40)
    for number, share in ((1, 60), (3, 20)):
        say(master, number, 30.0, share=share)
    assert master.distribute(configuration, 30.0) == {1: 60, 2: 40, 3: 20}
    assert master.take_events() == ["pool web: member 10.0.0.2:80: its weight follows what its server reports"]


def test_all_reports_stale_leaves_the_configured_weights() -> None:
    master, configuration = Master(), of(site(5, 1, algorithm=Synthesis.FORMULA, formula="share"))
    for number in (1, 2):
        say(master, number, 0.0, share=number)
    assert master.distribute(configuration, 0.0) == {1: 1, 2: 2}
    assert master.distribute(configuration, 100.0) == {1: 5, 2: 1}


def test_a_report_of_address_and_port_comes_before_one_of_the_host_unless_it_is_stale() -> None:
    master = Master()
    member = Member(address="10.0.0.1", protocol_port=80)
    assert master.of(member, 0.0) is None
    master.report("host", [("10.0.0.1", 0)], {"x": 1}, 5.0)
    master.report("port", [("10.0.0.1", 80), ("10.0.0.1", 81)], {"x": 2}, 3.0)
    chosen = [master.of(member, since) for since in (0.0, 4.0, 10.0)]
    assert [one and one.agent for one in chosen] == ["port", "host", "port"]
    master.report("flagged", [("10.0.0.1", 80)], {"x": 3}, 4.0, ["x"])
    master.report("newer", [("10.0.0.1", 80)], {"x": 3, "nan": math.nan}, 4.0)
    assert master.of(member, 0.0) == Report("newer", frozenset({("10.0.0.1", 80)}), {"x": 3.0}, 4.0)
    for agent in ("port", "flagged", "newer", "host"):
        assert master.forget(agent) and not master.forget(agent)
    assert master.of(member, 0.0) is None


def test_members_that_get_no_connections_decide_nothing() -> None:
    """An idle server that is down is not one that could take more."""
    pool = site(1, 1, 1, 1, members={3: {"draining": True}})
    master, configuration = Master(), of(pool)
    for now in range(0, 300, 5):
        for number, cpu in ((1, 0.5), (2, 0.5), (3, 0.0), (4, 0.0)):
            say(master, number, now, cpu=cpu)
        weights = master.distribute(configuration, float(now), resting={4})
    assert len(set(weights.values())) == 1
    standing = master.standing(4)
    assert standing is not None and standing.why == "it gets no new connections"
    assert master.take_events() == []  # that is no news of the master's


# ------------------------------------------------------------------ changes of the configuration


def test_pools_and_members_come_and_go() -> None:
    master = Master()
    one, two = site(1, 1), site(4, 4, pool="api", first=3)
    assert master.distribute(of(one), 0.0) == {1: 1, 2: 1}
    assert master.distribute(of(one, two), 0.1) == {1: 1, 2: 1, 3: 4, 4: 4}
    assert master.distribute(of(two), 0.2) == {3: 4, 4: 4}
    assert master.standing(1) is None and master.standing(3) is not None
    assert master.distribute(of(site(4, pool="api", first=3)), 0.3) == {3: 4}
    assert master.distribute(of(), 0.4) == {}
    assert master.distribute(of(site()), 0.5) == {}


def test_a_distribution_that_changes_begins_anew() -> None:
    master = Master()
    for number in (1, 2):
        say(master, number, 0.0, a=number, b=3 - number)
    assert master.distribute(of(site(1, 1, algorithm=Synthesis.FORMULA, formula="a")), 0.0) == {1: 1, 2: 2}
    assert master.distribute(of(site(1, 1, algorithm=Synthesis.FORMULA, formula="b")), 0.1) == {1: 2, 2: 1}


# ------------------------------------------------------------------ simulated servers


class Servers:
    """Servers whose CPU is used by their share of the demand, over their capacity, as it was some rounds ago.

    Args:
        demand: of all clients, in the unit of the capacities.
        busy: what each does besides.
        delay: rounds after which a changed share shows.
    """

    def __init__(self, capacities: list[float], demand: float, busy: list[float] | None = None, delay: int = 1) -> None:
        self.capacities, self.demand, self.delay = capacities, demand, delay
        self.busy = busy or [0.0] * len(capacities)
        self.past: list[dict[int, float]] = []

    def cpu(self) -> list[float]:
        share = self.past[max(0, len(self.past) - self.delay)] if self.past else {}
        return [min(1.0, (share.get(number, 0.0) * self.demand + busy) / capacity) for number, (capacity, busy)
                in enumerate(zip(self.capacities, self.busy, strict=True), 1)]

    def run(self, master: Master, configuration: Configuration, rounds: int, noise: float = 0.0) -> list[list[float]]:
        measured = []
        pool = next(iter(configuration.pools.values()))
        at = len(self.past) * pool.distribution.interval  # type: ignore[union-attr]
        for number in range(rounds):
            now = at + number * pool.distribution.interval  # type: ignore[union-attr]
            if not self.past:
                self.past.append(shares({one.number: one.weight for one in pool.members}))
            cpus = self.cpu()
            measured.append(cpus)
            for index, (cpu, capacity) in enumerate(zip(cpus, self.capacities, strict=True), 1):
                shake = 1 + noise * math.sin(number * 12.9898 + index * 78.233)
                say(master, index, now, cpu=cpu * shake, memory=0.3, cores=capacity)
            self.past.append(shares(master.distribute(configuration, now)))
        return measured


def spread(cpus: list[float]) -> float:
    return (max(cpus) - min(cpus)) / (sum(cpus) / len(cpus))


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize(("capacities", "demand", "busy"), [
    ([4, 2, 1], 3.5, None), ([8, 1], 6.0, None), ([2, 2, 2], 3.0, [0.0, 0.5, 0.0]), ([4, 4, 4, 1], 2.0, None),
    ([2, 1], 2.7, None)])
def test_even_load_becomes_even_and_stays_so(capacities: list[float], demand: float, busy: list[float] | None,
                                             delay: int) -> None:
    master, configuration = Master(), of(site(*[1] * len(capacities)))
    measured = Servers(capacities, demand, busy, delay).run(master, configuration, 60)
    assert spread(measured[0]) > 0.1
    assert all(spread(cpus) < 0.12 for cpus in measured[30:]), [round(spread(cpus), 3) for cpus in measured]
    # No swinging around the goal: who was below the average does not get far above it on the way.
    overshoot = max(max(cpus) / (sum(cpus) / len(cpus)) - 1 for cpus in measured[20:])
    assert overshoot < 0.1
    assert master.buffers.flips < 30


def test_even_load_recovers_from_a_sudden_change() -> None:
    master, configuration = Master(), of(site(1, 1, 1))
    servers = Servers([2, 2, 2], 3.0)
    servers.run(master, configuration, 10)
    servers.busy[0] = 0.9  # somebody compiles there
    measured = servers.run(master, configuration, 60)
    assert spread(measured[0]) > 0.3 and all(spread(cpus) < 0.12 for cpus in measured[35:])
    assert master.weights[1] < master.weights[2] / 2
    servers.busy[0] = 0.0
    assert all(spread(cpus) < 0.12 for cpus in servers.run(master, configuration, 60)[35:])


def test_even_load_changes_at_most_a_quarter_in_a_round() -> None:
    master, configuration = Master(), of(site(1, 1))
    servers = Servers([1000, 1], 1.0, [0.0, 1.0])
    servers.run(master, configuration, 40)
    ratios = [after[2] / after[1] / (before[2] / before[1]) for before, after in
              zip(servers.past[1:10], servers.past[2:10], strict=False)]
    assert min(ratios) > 1 / 1.25 ** 2 / 1.05 and master.weights == {1: 256, 2: 1}


@pytest.mark.parametrize("algorithm", [Synthesis.CAPABILITY, Synthesis.DYNAMIC_RATIO, Synthesis.EVEN_LOAD])
def test_noise_changes_nothing(algorithm: Synthesis) -> None:
    master, configuration = Master(), of(site(1, 1, 1, algorithm=algorithm))
    servers = Servers([2, 2, 2], 3.0)
    servers.run(master, configuration, 40)
    flips = master.buffers.flips
    servers.run(master, configuration, 200, noise=0.02)
    assert master.buffers.flips == flips


def test_half_a_percent_too_little_to_tell() -> None:
    """A pool that hardly does anything is not shifted to and fro."""
    master, configuration = Master(), of(site(1, 1))
    for now in range(0, 500, 5):
        say(master, 1, now, cpu=0.004)
        say(master, 2, now, cpu=0.0)
        master.distribute(configuration, float(now))
    assert 1 <= master.weights[2] / master.weights[1] < 8


@pytest.mark.parametrize("demand", [0.5, 3.5, 6.3, 6.9])
def test_capability_shares_by_idle_cores_and_does_not_swing(demand: float) -> None:
    master, configuration = Master(), of(site(1, 1, 1, algorithm=Synthesis.CAPABILITY))
    measured = Servers([4, 2, 1], demand).run(master, configuration, 100)
    assert all(spread(cpus) < 0.12 for cpus in measured[70:]), [round(spread(cpus), 3) for cpus in measured]


@pytest.mark.parametrize("demand", [0.5, 3.0, 5.5])
def test_dynamic_ratio_gives_less_to_who_has_less_left(demand: float) -> None:
    master, configuration = Master(), of(site(1, 1, 1, algorithm=Synthesis.DYNAMIC_RATIO))
    servers = Servers([2, 2, 2], demand, [0.0, 0.0, 0.4])
    measured = servers.run(master, configuration, 120)
    assert master.weights[3] < master.weights[1]
    assert abs(master.weights[1] - master.weights[2]) <= 2
    tail = [one[3] for one in servers.past[80:]]
    assert (max(tail) - min(tail)) / max(tail) < 0.1 and max(measured[-1]) - min(measured[-1]) < 0.25


def test_dynamic_ratio_heeds_memory() -> None:
    master, configuration = Master(), of(site(1, 1, algorithm=Synthesis.DYNAMIC_RATIO))
    for now in range(0, 200, 5):
        say(master, 1, now, cpu=0.2, memory=0.2)
        say(master, 2, now, cpu=0.2, memory=0.99)
        master.distribute(configuration, float(now))
    assert 3 < master.weights[1] / master.weights[2] < 8


def test_capability_is_what_a_server_says_of_itself() -> None:
    master, configuration = Master(), of(site(1, 2, 1, algorithm=Synthesis.CAPABILITY))
    say(master, 1, 0.0, capability=10, cores=64)
    say(master, 2, 0.0, capability=10)
    say(master, 3, 0.0, cpu=0.5)
    weights = master.distribute(configuration, 0.0)
    assert weights == {1: 10, 2: 20, 3: 10}
    standing = master.standing(3)
    assert standing is not None and standing.why == "its server reports neither capability nor cores"


# ------------------------------------------------------------------ formulas, and what is not reported


def test_a_formulas_value_is_the_share() -> None:
    master = Master()
    configuration = of(site(1, 1, 3, 1, algorithm=Synthesis.FORMULA, formula="weight * speed / (1 + queue)"))
    for number, speed, queue in ((1, 100, 1), (2, 100, 0), (3, 100, 0)):
        say(master, number, 0.0, speed=speed, queue=queue)
    say(master, 4, 0.0, speed=100)
    weights = master.distribute(configuration, 0.0)
    assert weights == {1: 43, 2: 85, 3: 256, 4: 77}  # 50, 100 and 300 by 5 weights: the fourth has 90
    standing = master.standing(4)
    assert standing is not None
    assert standing.why == "the formula cannot be computed: its server does not report queue"


@pytest.mark.parametrize(("formula", "why"), [
    ("1 / (x - 1)", "the formula cannot be computed"), ("x - 5", "no server of the pool has any share"),
    ("0", "no server of the pool has any share"),
    ("y", "the formula cannot be computed: its server does not report y")])
def test_a_formula_that_leads_nowhere(formula: str, why: str) -> None:
    master = Master()
    configuration = of(site(7, 2, algorithm=Synthesis.FORMULA, formula=formula))
    for number in (1, 2):
        say(master, number, 0.0, x=1)
    assert master.distribute(configuration, 0.0) == {1: 7, 2: 2}
    standing = master.standing(1)
    assert standing is not None and standing.why == why


def test_shares_of_any_size_become_weights() -> None:
    master = Master()
    configuration = of(site(1, 1, 1, 1, algorithm=Synthesis.FORMULA, formula="share"))
    for number, share in ((1, 1e308), (2, -5.0), (3, 1e-320), (4, 5e11)):
        say(master, number, 0.0, share=share)
    assert master.distribute(configuration, 0.0) == {1: 256, 2: 1, 3: 1, 4: 128}


def test_even_load_uses_what_most_servers_report() -> None:
    master, configuration = Master(), of(site(1, 1, 1))
    for now in range(0, 400, 5):
        say(master, 1, now, cpu=0.1, clients=90)
        say(master, 2, now, clients=10)
        say(master, 3, now, clients=1e308, load=math.inf)
        weights = master.distribute(configuration, float(now))
    assert weights[2] == weights[1] > weights[3]
    standing = master.standing(1)
    assert standing is not None and standing.load == 90
    say(master, 1, 400.0, other=1)
    master.distribute(configuration, 400.0)
    standing = master.standing(1)
    assert standing is not None and standing.why == "its server does not report clients"


def test_even_load_without_any_load() -> None:
    master, configuration = Master(), of(site(2, 1))
    say(master, 1, 0.0, memory=0.5)
    assert master.distribute(configuration, 0.0) == {1: 2, 2: 1}
    assert "does not report utilization, cpu, load, clients" in master.take_events()[0]


def test_a_thousand_members() -> None:
    """Each synthesis at once, with a report for every other member."""
    pools = []
    for index, algorithm in enumerate(Synthesis):
        first = 1 + index * 1000
        pools.append(Pool(
            name=algorithm.value, lb_algorithm=Algorithm.WEIGHTED_ROUND_ROBIN, distribution=Distribution(
                algorithm=algorithm, formula="1 - cpu" if algorithm is Synthesis.FORMULA else ""),
            members=tuple(Member(address=f"10.{index}.{one // 250}.{one % 250 + 1}", protocol_port=80,
                                 number=first + one) for one in range(1000))))
    master, configuration = Master(), of(*pools)
    for round_ in range(3):
        for pool in pools:
            for member in pool.members[::2]:
                master.report(f"a{member.number}", [(member.address, 0)],
                              {"cpu": member.number % 10 / 20, "cores": 4}, round_ * 5.0)
        weights = master.distribute(configuration, round_ * 5.0)
        assert len(weights) == 4000 and all(1 <= weight <= 256 for weight in weights.values())
    assert len(master.take_events()) <= 1000
