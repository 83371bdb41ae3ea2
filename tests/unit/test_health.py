# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.control.health, .events and .effective: from what is seen of members to the configuration in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import Configuration, VirtualServer
from lbapp.config.pool import Member, Override, Pool
from lbapp.control.effective import MOST_WEIGHT, Effective, needed_priority, weights
from lbapp.control.events import EventKind, Events
from lbapp.control.health import Condition, Health, State


def pool(name: str = "p", members: int = 2, first: int = 1, **fields: Any) -> Pool:
    made = [{"address": f"10.0.0.{first + index}", "protocol_port": 80, "number": first + index,
             "id": f"m{first + index}", **(fields.pop(f"m{index}", {}))} for index in range(members)]
    return msgspec.convert({"id": name, "name": name, "members": made, **fields}, Pool)


def each(field: str, values: Sequence[int]) -> dict[str, Any]:
    """A field of every member."""
    return {f"m{index}": {field: value} for index, value in enumerate(values)}


def server(**fields: Any) -> VirtualServer:
    return msgspec.convert({"id": "v", "name": "v", "number": 1, "vip_address": "10.0.0.99", "protocol": "TCP",
                            "protocol_port": 80, "default_pool_id": "p", **fields}, VirtualServer)


class Site:
    """Health and what comes of it, with a clock of the test's."""

    def __init__(self, *pools: Pool, **servers: VirtualServer) -> None:
        self.events = Events()
        self.health = Health(self.events)
        self.effective = Effective(self.health.condition)
        self.now = 100.0
        self.wanted = Configuration()
        self.configure(*pools, **servers)

    def configure(self, *pools: Pool, **servers: VirtualServer) -> None:
        self.wanted = Configuration(pools={one.id: one for one in pools}, virtual_servers=servers)
        self.effective.configure(self.wanted, self.health.configure(self.wanted, self.now))

    def said(self, number: int, up: bool, monitor: str = "tcp", reason: str = "why") -> None:
        changed = self.health.checked(number, monitor, up, reason, self.now)
        self.effective.configure(self.wanted, () if changed is None else (changed,))

    def failed(self, number: int, times: int = 1) -> None:
        for _ in range(times):
            changed = self.health.failed(number, "refused", self.now)
            self.effective.configure(self.wanted, () if changed is None else (changed,))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.effective.configure(self.wanted, self.health.tick(self.now))

    def members(self, key: str = "p") -> tuple[Member, ...]:
        return self.effective.configuration.pools[key].members

    def taking(self, key: str = "p") -> list[int]:
        return [member.number for member in self.members(key) if member.takes_new]

    def told(self, *kinds: EventKind) -> list[str]:
        return [event.text for event in self.events.since(0) if event.kind in kinds]


TCP = [{"type": "TCP"}]


def test_nothing_known_changes_nothing() -> None:
    site = Site(pool(monitors=TCP), v=server())
    assert site.effective.configuration.pools["p"] is site.wanted.pools["p"]
    assert site.effective.configuration.virtual_servers is site.wanted.virtual_servers
    assert site.taking() == [1, 2]


def test_a_member_that_is_down_takes_nothing_until_it_is_up() -> None:
    site = Site(pool(monitors=TCP))
    site.said(1, True)
    site.said(2, False, reason="connection refused")
    assert site.taking() == [1]
    assert site.members()[1].health is Override.DOWN, "its connections go on"
    site.said(2, True)
    assert site.taking() == [1, 2]
    assert site.effective.configuration.pools["p"] is site.wanted.pools["p"]
    assert site.told(EventKind.MEMBER_DOWN) == ["tcp: connection refused"]
    report = site.health.report(2)
    assert report is not None
    assert (report.state, report.since, report.monitors) == (State.UP, 100.0, {"tcp": (State.UP, "why")})


def test_what_a_dead_member_had_can_be_reset() -> None:
    site = Site(pool(monitors=TCP, on_down="reset"))
    site.said(2, False)
    assert [member.number for member in site.members()] == [1]
    site.said(2, True)
    assert [member.number for member in site.members()] == [1, 2]


@pytest.mark.parametrize(("rule", "said", "takes"), [
    ("all", (True, True), True), ("all", (True, False), False), ("all", (False, True), False),
    ("all", (True, None), True), ("all", (None, False), False),
    ("any", (True, False), True), ("any", (False, True), True), ("any", (False, False), False),
    ("any", (False, None), True),
])
def test_all_or_any(rule: str, said: tuple[bool | None, bool | None], takes: bool) -> None:
    site = Site(pool(members=1, monitors=[{"type": "TCP"}, {"type": "ICMP"}], monitor_rule=rule))
    for monitor, up in zip(("tcp", "icmp"), said, strict=True):
        if up is not None:
            site.said(1, up, monitor)
    assert bool(site.taking()) is takes


def test_an_operator_has_the_last_word() -> None:
    site = Site(pool(monitors=TCP, m0={"health": "up"}, m1={"health": "down"}))
    site.said(1, False)
    site.said(2, True)
    assert site.taking() == [1]


def test_what_an_operator_says_is_told() -> None:
    site = Site(pool(m1={"health": "down"}))
    site.configure(pool(m0={"health": "up"}, m1={"health": "down"}))
    site.configure(pool(m0={"health": "up"}, m1={"weight": 5}))
    site.configure(pool(m0={"health": "up"}))
    assert [(event.pool, event.member, event.text) for event in site.events.since(0)
            if event.kind is EventKind.MEMBER_OVERRIDDEN] == [
        ("p", "10.0.0.2:80", "down, says an operator"), ("p", "10.0.0.1:80", "up, says an operator"),
        ("p", "10.0.0.2:80", "no operator's word any more")]


def test_a_changed_pool_keeps_what_is_known() -> None:
    site = Site(pool(monitors=TCP))
    site.said(1, False)
    site.configure(pool(monitors=TCP, description="other"))
    assert site.taking() == [2]
    site.configure(pool(monitors=TCP, m0={"address": "10.0.0.77"}))
    assert site.taking() == [1, 2], "it is another server now"
    site.said(1, False)
    site.configure(pool())
    assert site.taking() == [1, 2], "nobody watches it"
    assert site.health.checked(1, "tcp", False, "", site.now) is None


def test_clients_failures_take_a_member_out_for_a_while() -> None:
    site = Site(pool(passive={"failures": 3, "window": 10, "hold": 5}))
    site.failed(1, 2)
    site.wait(11)
    site.failed(1, 2)
    assert site.taking() == [1, 2], "four, but not within the window"
    site.failed(1)
    assert site.taking() == [2]
    site.wait(4.9)
    assert site.taking() == [2]
    site.wait(0.2)
    assert site.taking() == [1, 2]
    assert len(site.told(EventKind.MEMBER_FAILED)) == 1


def test_after_failures_a_monitor_decides_when_the_hold_is_over() -> None:
    site = Site(pool(monitors=TCP, passive={"failures": 1, "hold": 5}))
    site.said(1, True)
    site.failed(1)
    assert site.taking() == [2]
    site.said(1, False)
    site.wait(6)
    assert site.taking() == [2]
    site.said(1, True)
    assert site.taking() == [1, 2]


def test_a_member_that_flaps_stays_down_until_it_is_well() -> None:
    site = Site(pool(monitors=TCP, damping={"changes": 4, "window": 60, "hold": 20}))
    site.said(1, True)
    for up in (False, True, False, True):
        site.wait(1)
        site.said(1, up)
    site.wait(1)
    assert site.taking() == [2]
    site.wait(10)
    site.said(1, False)
    site.said(1, True)
    site.wait(15)
    assert site.taking() == [2], "it was down again meanwhile"
    site.wait(21)
    assert site.taking() == [1, 2]
    assert len(site.told(EventKind.MEMBER_DAMPED)) == 1


def test_a_slow_start_raises_the_weight_in_steps() -> None:
    site = Site(pool(monitors=TCP, lb_algorithm="WEIGHTED_ROUND_ROBIN", slow_start=10))
    site.said(1, True)
    assert {member.weight for member in site.members()} == {1}, "the first result is no come-back"
    site.said(1, False)
    site.said(1, True)
    seen = []
    for _ in range(11):
        one, two = site.members()
        seen.append(one.weight / two.weight)
        site.wait(1)
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(0.05, abs=0.01)
    assert seen[5] == pytest.approx(0.55, abs=0.06)
    assert seen[-1] == 1.0
    assert site.effective.configuration.pools["p"] is site.wanted.pools["p"]


def test_draining_has_an_end() -> None:
    site = Site(pool(m0={"draining": True, "drain_timeout": 30}))
    assert site.taking() == [2]
    site.wait(29)
    assert len(site.members()) == 2
    site.wait(2)
    assert [member.number for member in site.members()] == [2]
    site.configure(pool())
    assert site.taking() == [1, 2]
    assert site.told(EventKind.MEMBER_DRAINED) == ["its 30 s are over; what is left is reset"]


def test_lower_priorities_wait_for_their_turn() -> None:
    site = Site(pool(members=4, monitors=TCP, minimum_active=2, m0={"priority": 10}, m1={"priority": 10},
                     m2={"priority": 5}))
    assert site.taking() == [1, 2]
    site.said(1, False)
    assert site.taking() == [2, 3]
    site.said(3, False)
    assert site.taking() == [2, 4]
    site.said(1, True)
    assert site.taking() == [1, 2]


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 13))
def test_no_priority_is_left_out_while_it_is_needed(ranks: list[int], least: int) -> None:
    made = pool(members=len(ranks), minimum_active=least,
                **each("priority", ranks))
    used = [rank for rank in ranks if rank >= needed_priority(made, made.members)]
    assert len(used) >= min(len(ranks), least)
    without = [rank for rank in used if rank > min(used, default=0)]
    assert not least or len(used) == len(ranks) or len(without) < least, "no more of them than that takes"


def test_a_fallback_takes_the_place_of_a_pool_without_members() -> None:
    site = Site(pool(monitors=TCP, fallback_pool="q"), pool("q", first=10, fallback_pool="p"), v=server())
    site.said(1, False)
    assert site.effective.configuration.virtual_servers["v"].default_pool_id == "p"
    site.said(2, False)
    assert site.effective.configuration.virtual_servers["v"].default_pool_id == "q"
    assert site.effective.replacing == {"p": "q"}
    site.said(1, True)
    assert site.effective.configuration.virtual_servers is site.wanted.virtual_servers


def test_whom_a_fallback_stands_in_for_is_known() -> None:
    """Their members may have connections of the virtual server, now and afterwards."""
    site = Site(pool(monitors=TCP, fallback_pool="q"), pool("q", first=10, fallback_pool="r"),
                pool("r", first=20, fallback_pool="q"), pool("s", first=30),
                v=server(), w=server(id="w", name="w", number=2, protocol_port=81, default_pool_id="s"))

    def reached(key: str) -> list[str]:
        now = site.effective.configuration
        return list(now.pools_reached(now.virtual_servers[key]))

    assert (reached("v"), reached("w")) == (["p", "q", "r"], ["s"])
    site.said(1, False)
    site.said(2, False)
    assert site.effective.configuration.redirected == {1: site.wanted.virtual_servers["v"]}
    assert (reached("v"), reached("w")) == (["q", "p", "r"], ["s"]), "first the one in force"
    site.said(1, True)
    assert site.effective.configuration.redirected == {} and reached("v") == ["p", "q", "r"]


def test_policies_follow_to_the_fallback() -> None:
    policy = {"name": "a", "action": "REDIRECT_TO_POOL", "redirect_pool": "p"}
    site = Site(pool(monitors=TCP, members=1, fallback_pool="q"), pool("q", first=10),
                v=server(application="http", default_pool_id="q", l7_policies=[policy]))
    site.said(1, False)
    first = site.effective.configuration.virtual_servers["v"]
    assert first.l7_policies[0].redirect_pool == "q"
    site.configure(*site.wanted.pools.values(), v=site.wanted.virtual_servers["v"],
                   w=server(id="w", name="w", number=2, protocol_port=81))
    assert site.effective.configuration.virtual_servers["v"] is first, "what did not change is the same object"


def test_a_disabled_fallback_is_none() -> None:
    site = Site(pool(monitors=TCP, members=1, fallback_pool="q"), pool("q", first=10, admin_state_up=False), v=server())
    site.said(1, False)
    assert site.effective.configuration.virtual_servers["v"].default_pool_id == "p"


@given(st.lists(st.tuples(st.integers(0, 256), st.sampled_from([1.0, 0.05, 0.5, 0.95])), min_size=1, max_size=8))
def test_scaled_weights_keep_their_proportions(given_: list[tuple[int, float]]) -> None:
    members = pool(members=len(given_), **each("weight", [weight for weight, _ in given_])).members
    shares = {member.number: share for member, (_, share) in zip(members, given_, strict=True)}
    told = weights(members, {}, lambda member: Condition(share=shares[member.number]))
    for member in members:
        assert 0 <= told[member.number] <= MOST_WEIGHT
        assert bool(told[member.number]) == bool(member.weight), "a weight of 0 stays, and no other becomes 0"
    whole = [(told[member.number], member.weight) for member in members if shares[member.number] == 1.0]
    assert all(one * other_weight == other * weight for one, weight in whole for other, other_weight in whole)


def test_weights_of_a_distribution() -> None:
    site = Site(pool(lb_algorithm="WEIGHTED_ROUND_ROBIN", m1={"weight": 0}))
    site.effective.configure(site.wanted, ("p",), {1: 77, 2: 99})
    assert [member.weight for member in site.members()] == [77, 0], "a weight of 0 is an operator's"
    site.effective.configure(site.wanted, ("p",), {})
    assert site.effective.configuration.pools["p"] is site.wanted.pools["p"]


def test_events_are_numbered_and_bounded() -> None:
    events = Events(3)
    for at in range(5):
        events.add(float(at), EventKind.SWITCH, str(at))
    assert [event.number for event in events.since(0)] == [3, 4, 5]
    assert [event.number for event in events.since(4)] == [5]
    assert [event.number for event in events.since(9)] == []
    assert len(events) == 3


@given(st.lists(st.tuples(st.sampled_from(["up", "down", "failed", "wait", "drain", "undrain"]), st.integers(1, 3)),
                max_size=60))
def test_it_settles_whatever_happens(story: list[tuple[str, int]]) -> None:
    """When all monitors are content and all holds have passed, everybody takes connections with its whole weight."""
    fields: dict[str, Any] = {"monitors": TCP, "passive": {"failures": 2, "hold": 3}, "slow_start": 4,
                              "damping": {"changes": 3, "window": 20, "hold": 5}, "lb_algorithm": "LEAST_CONNECTIONS"}
    site = Site(pool(members=3, **fields))
    for what, number in story:
        if what in ("up", "down"):
            site.said(number, what == "up")
        elif what == "failed":
            site.failed(number)
        elif what == "wait":
            site.wait(number)
        else:
            drained: dict[str, Any] = {f"m{number - 1}": {"draining": what == "drain"}}
            site.configure(pool(members=3, **fields, **drained))
    site.configure(pool(members=3, **fields))
    for number in (1, 2, 3):
        site.said(number, True)
    for _ in range(40):
        site.wait(1)
    assert site.taking() == [1, 2, 3]
    assert site.effective.configuration.pools["p"] == site.wanted.pools["p"]
