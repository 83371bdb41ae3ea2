# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the fast path is told of a virtual server (:mod:`lbapp.dataflow.distribution`)."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import (
    Algorithm,
    Application,
    Configuration,
    Decision,
    Member,
    Network,
    Pool,
    Protocol,
    State,
    VirtualServer,
)
from lbapp.config.routing import Routes
from lbapp.control.messages import Host
from lbapp.dataflow.distribution import Distribution, Limits, Target, distribution, distributions, idle_seconds, slots
from lbapp.dataflow.fastpath.layout import SLOTS, Hash, Mode
from tests.unit.test_selection import maglev_shares


def members(*weights: int) -> tuple[Member, ...]:
    return tuple(Member(address=f"10.0.0.{n}", protocol_port=8080, number=n, weight=weight, id=str(n))
                 for n, weight in enumerate(weights, 1))


def host(number: int) -> Host:
    return Host(bytes((2, 0, 0, 0, 0, number)), number)


HOSTS = {f"10.0.0.{n}": host(n) for n in range(1, 9)}


def server(**more: Any) -> VirtualServer:
    return VirtualServer(**{"name": "v", "id": "v", "number": 7, "vip_address": "10.9.0.1", "protocol": Protocol.TCP,
                            "protocol_port": 80, "default_pool_id": "p", **more})


def pool(algorithm: Algorithm = Algorithm.WEIGHTED_ROUND_ROBIN, *weights: int) -> Pool:
    return Pool(name="p", id="p", lb_algorithm=algorithm, members=members(*weights or (1, 1)))


def made(virtual_server: VirtualServer, of: Pool, *, queries: bool = True, routes: Routes | None = None,
         ) -> Distribution | None:
    return distribution(virtual_server, of, of.members, routes or Routes(), HOSTS, queries=queries)


@pytest.mark.parametrize(("algorithm", "decision", "mode", "pick"), [
    (Algorithm.WEIGHTED_ROUND_ROBIN, Decision.AUTO, Mode.DECIDE, Hash.TURN),
    (Algorithm.SOURCE_IP, Decision.AUTO, Mode.DECIDE, Hash.SOURCE),
    (Algorithm.CONSISTENT_HASH, Decision.AUTO, Mode.DECIDE, Hash.FLOW),
    (Algorithm.ROUND_ROBIN, Decision.SWITCH, Mode.DECIDE, Hash.TURN),
    (Algorithm.ROUND_ROBIN, Decision.AUTO, Mode.PUNT, Hash.TURN),
    (Algorithm.LEAST_CONNECTIONS, Decision.AUTO, Mode.PUNT, Hash.TURN),
    (Algorithm.WEIGHTED_ROUND_ROBIN, Decision.CONTROLLER, Mode.PUNT, Hash.TURN),
])
def test_who_decides(algorithm: Algorithm, decision: Decision, mode: Mode, pick: Hash) -> None:
    told = made(server(decision=decision), pool(algorithm))
    assert told is not None
    assert (told.mode, told.hash) == (mode, pick)
    assert [target.member for target in told.targets] == [1, 2]


def test_without_an_agent_that_asks_queries_are_packet_ins() -> None:
    told = made(server(), pool(Algorithm.LEAST_CONNECTIONS), queries=False)
    assert told is not None
    assert told.mode is Mode.PASS


@pytest.mark.parametrize("more", [
    {"admin_state_up": False}, {"vip_address": "0.0.0.0"}, {"protocol_port": 0}, {"snat": True},
    {"state": State.RULES},
])
def test_what_is_left_to_the_switch(more: dict[str, Any]) -> None:
    assert made(server(**more), pool()) is None


def test_new_connections_that_are_refused_go_to_the_control_segment() -> None:
    told = made(server(maintenance=True), pool())
    assert told is not None
    assert told.mode is Mode.PASS


def test_a_member_that_takes_no_new_connections_keeps_its_place_but_no_slot() -> None:
    of = pool(Algorithm.WEIGHTED_ROUND_ROBIN, 2, 3)
    told = distribution(server(), of, of.members[1:], Routes(), HOSTS, queries=True)
    assert told is not None
    assert [(target.member, target.weight) for target in told.targets] == [(1, 0), (2, 3)]
    assert slots(told) == (1,)
    nobody = distribution(server(), of, (), Routes(), HOSTS, queries=True)
    assert nobody is not None
    assert (nobody.mode, slots(nobody)) == (Mode.PASS, ())


def test_a_target_says_all_that_is_needed() -> None:
    told = made(server(), pool(Algorithm.WEIGHTED_ROUND_ROBIN, 3, 1))
    assert told is not None
    assert told[:4] == (7, bytes((10, 9, 0, 1)), 80, 6)
    assert told.idle == idle_seconds(Protocol.TCP) == 7440
    assert told.targets == (Target(1, 3, bytes((10, 0, 0, 1)), 8080, host(1), False),
                            Target(2, 1, bytes((10, 0, 0, 2)), 8080, host(2), False))


def test_nothing_is_translated_where_nothing_is_to_be() -> None:
    told = made(server(translate_address=False, translate_port=False), pool())
    assert told is not None
    assert {(target.address, target.port) for target in told.targets} == {(None, 0)}


def test_a_router_between_two_networks() -> None:
    networks = (Network(name="in", cidr="10.0.0.0/24", address="10.0.0.254"),
                Network(name="out", cidr="10.9.0.0/24", address="10.9.0.254"))
    told = made(server(), pool(), routes=Routes(networks))
    assert told is not None
    assert all(target.routed for target in told.targets)


def test_a_member_nobody_has_found_gets_nothing() -> None:
    of = Pool(name="p", id="p", lb_algorithm=Algorithm.WEIGHTED_ROUND_ROBIN,
              members=(*members(1), Member(address="10.0.0.99", protocol_port=80, number=99, id="x")))
    told = made(server(), of)
    assert told is not None
    assert [target.member for target in told.targets] == [1]


def test_all_virtual_servers_of_a_configuration() -> None:
    servers = {str(n): server(id=str(n), number=n, protocol_port=n, snat=n == 2) for n in (1, 2, 3)}
    configuration = Configuration(virtual_servers=servers, pools={"p": pool()})
    told = distributions(configuration, Routes(), HOSTS, lambda _, of: of.members if of else (), queries=True)
    assert [one.number for one in told] == [1, 3]


def weighted(pick: Hash, *weights: int) -> Distribution:
    return Distribution(1, b"", 80, 6, Mode.DECIDE, pick, 60, tuple(
        Target(n, weight, None, 0, host(1), False) for n, weight in enumerate(weights)))


def test_turns_are_smooth_and_exact() -> None:
    table = slots(weighted(Hash.TURN, 10, 2, 2))
    assert Counter(table) == {0: 5, 1: 1, 2: 1}
    assert all(table[n:n + 4] != (0, 0, 0, 0) for n in range(4))
    assert slots(weighted(Hash.TURN, 4, 4)) == (0, 1)
    assert slots(weighted(Hash.TURN)) == ()


@given(st.lists(st.integers(1, 256), min_size=1, max_size=40), st.sampled_from(Hash))
def test_shares_follow_weights(weights: list[int], pick: Hash) -> None:
    table = slots(weighted(pick, *weights))
    counted = Counter(table)
    if pick is not Hash.TURN:
        assert len(table) == SLOTS
        shares = maglev_shares(dict(enumerate(weights)), SLOTS)
        assert all(counted[index] in allowed for index, allowed in shares.items())
        return
    total, whole = sum(weights), sum(weights) // math.gcd(*weights)
    if whole <= SLOTS:
        assert {index: Fraction(count, len(table)) for index, count in counted.items()} == {
            index: Fraction(weight, total) for index, weight in enumerate(weights)}
        return
    assert len(table) <= SLOTS
    dues = [Fraction(weight * SLOTS, total) for weight in weights]
    room = Fraction(SLOTS - sum(due < 1 for due in dues), SLOTS)
    for index, due in enumerate(dues):
        assert max(Fraction(1), due * room - 1) <= counted[index] <= max(Fraction(1), due)


def test_a_light_member_has_its_turn() -> None:
    """A weight above 0 means that it serves (ADR 4), also where a round has less than a turn for it."""
    for weights in ([256, 256, 256, 256, 256, 1, 256, 1, 1, 1, 256, 1, 1, 1, 1, 256], [256] * 300 + [1] * 10):
        assert set(slots(weighted(Hash.TURN, *weights))) == set(range(len(weights)))


def test_a_member_that_goes_leaves_other_clients_where_they_were() -> None:
    before = slots(weighted(Hash.SOURCE, 1, 1, 1, 1, 1))
    gone = weighted(Hash.SOURCE, 1, 1, 1, 1, 1)
    after = slots(gone._replace(targets=gone.targets[:4]))
    moved = sum(1 for a, b in zip(before, after, strict=True) if a != 4 and a != b)
    assert moved < 0.1 * len(before)


# ------------------------------------------------------------------ limits on new connections

LIMITED: dict[str, Any] = {"rate_limit": 50, "client_rate_limit": 5, "client_rate_burst": 9, "client_prefix_v4": 24}


def limited(keeps: bool, queries: bool = True, **more: Any) -> Distribution:
    one = pool()
    told = distribution(server(**LIMITED, **more), one, one.members, Routes(), HOSTS, queries=queries, pools=(one,),
                        limits=keeps)
    assert told is not None
    return told


def test_a_fast_path_that_keeps_limits_decides_and_one_that_does_not_asks() -> None:
    assert (limited(True).mode, limited(True).limits) == (Mode.DECIDE, Limits(50, 0, 5, 9, 24))
    assert (limited(False).mode, limited(False).limits) == (Mode.PUNT, None)
    assert limited(False, queries=False).mode is Mode.PASS, "by packet-in"
    assert limited(True, queries=False).mode is Mode.DECIDE
    told = made(server(), pool())
    assert told is not None and told.limits is None


def test_limits_of_handshakes_that_are_proxied() -> None:
    for keeps, limits in ((True, Limits(50, 0, 5, 9, 24)), (False, None)):
        told = limited(keeps, application=Application.HTTP)
        assert (told.mode, told.limits) == (Mode.PROXY, limits)


@pytest.mark.parametrize(("vip", "segments", "said"), [
    ("10.0.0.100", (0, 0), 1460), ("fd00::1", (0, 0), 1440), ("10.0.0.100", (1360, 0), 1360),
    ("fd00::1", (1400, 1220), 1220), ("fd00::1", (1460,), 1440),
])
def test_clients_are_promised_what_all_members_take(vip: str, segments: tuple[int, ...], said: int) -> None:
    pools = [Pool(name=f"p{index}", mss=mss) for index, mss in enumerate(segments)]
    told = distribution(server(vip_address=vip, application=Application.HTTP), None, (), Routes(), HOSTS, queries=True,
                        pools=pools)
    assert told is not None and told.greeting is not None
    assert (told.greeting.mss, told.greeting.window_scale, told.greeting.sack) == (said, 7, True)


def test_the_prefix_is_that_of_the_family() -> None:
    one = pool()
    six = server(vip_address="fd00::1", client_rate_limit=1, client_prefix_v6=48)
    told = distribution(six, one, (), Routes(), HOSTS, queries=True, limits=True)
    assert told is not None and told.limits == Limits(-1, 0, 1, 0, 48)
