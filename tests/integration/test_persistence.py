# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that meet their member again, members' limits and lines to wait in: with and without a fast path."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from typing import TYPE_CHECKING

from tests.integration.lines import Visitor, line_of, waiting
from tests.integration.support import (
    VIP,
    Held,
    addresses,
    ask_from,
    change_member,
    configure,
    members,
    pool,
    refused,
    server,
    settle,
)
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True
KNOWN = {"type": "SOURCE_IP"}
PORTS = {"conntrack": 80, "rules": 8081}


def persistent(lab: Lab, **more: object) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab), persistence={**KNOWN, **more})],
              [server("conntrack", 80, "web"), server("rules", 8081, "web", state="rules")])


def kept(lab: Lab) -> int:
    """How many clients the controller has on disk."""
    with sqlite3.connect(f"file:{lab.controller.state / 'persistence.db'}?mode=ro", uri=True) as database:
        (count,) = database.execute("SELECT count(*) FROM clients").fetchone()
    return int(count)


def test_clients_meet_their_member_again_whatever_becomes_of_the_controller(lab: Lab) -> None:
    persistent(lab)
    client = lab.client("c1")
    lab.rest.call("DELETE", "/v1/persistence?all=true")
    with addresses(client, "10.0.0.", 150, 6) as given:
        first = {address: ask_from(client, VIP, 80, address) for address in given}
        assert set(Counter(first.values()).values()) == {2}, first
        for port in PORTS.values():
            assert {address: ask_from(client, VIP, port, address) for address in given for _ in range(2)} == first
        listed = lab.rest.get("/v1/persistence?pool=web&limit=4")
        rest = lab.rest.get(listed["next"])
        assert {one["key"]: one["member_name"] for one in [*listed["persistence"], *rest["persistence"]]} == {
            f"{address}/32": name for address, name in first.items()}
        wait_until(lambda: kept(lab) == len(given), 20, "all are on disk")
        lab.controller.kill()
        wait_until(lambda: not any(map(lab.ovs.connected, lab.bridges)), 10, "the switch has noticed")
        lab.start_controller()
        settle(lab)
        assert {address: ask_from(client, VIP, 80, address) for address in given} == first
        assert lab.rest.call("DELETE", f"/v1/persistence?key={given[0]}") == {"removed": 1}
        assert lab.rest.get(f"/v1/persistence?key={given[0]}")["persistence"] == []
        assert lab.rest.call("DELETE", "/v1/persistence?pool=web") == {"removed": len(given) - 1}


def test_members_that_drain_are_down_or_disabled(lab: Lab) -> None:
    persistent(lab)
    client = lab.client("c1")
    with addresses(client, "10.0.0.", 160, 4) as (known, other, third, fourth):
        mine = ask_from(client, VIP, 80, known)
        change_member(lab, "web", mine, draining=True)
        assert ask_from(client, VIP, 80, known) == mine, "its clients are let in"
        assert ask_from(client, VIP, 8081, known) == mine
        assert mine not in {ask_from(client, VIP, 80, address) for address in (other, third, fourth)}
        change_member(lab, "web", mine, draining=False, health="down")
        second = ask_from(client, VIP, 80, known)
        assert second != mine
        change_member(lab, "web", mine, health="auto")
        assert ask_from(client, VIP, 80, known) == second, "it has another one now"
        change_member(lab, "web", second, admin_state_up=False)
        assert ask_from(client, VIP, 80, known) != second
        change_member(lab, "web", second, admin_state_up=True)


def test_what_the_client_addressed(lab: Lab) -> None:
    """Of each address a pool knows the member, whoever the client is (DESTINATION_IP)."""
    addressed = [VIP, "10.0.0.101", "10.0.0.102"]
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab), persistence={"type": "DESTINATION_IP"})],
              [server(f"at-{number}", 80, "web", vip) for number, vip in enumerate(addressed)])
    first = {vip: lab.client("c1").who(f"http://{vip}/", 6) for vip in addressed}
    assert all(len(found) == 1 for found in first.values()), "one and the same, though it is others' turn"
    assert {vip: set(lab.client("c2").who(f"http://{vip}/", 6)) for vip in addressed} == {
        vip: set(found) for vip, found in first.items()}
    assert {one["key"] for one in lab.rest.get("/v1/persistence?pool=web")["persistence"]} == {
        f"{vip}/32" for vip in addressed}


def limited(lab: Lab, **line: object) -> None:
    one = members(lab, names=["s1"], connection_limit=1)
    configure(lab, [pool("one", "ROUND_ROBIN", one, waiting=line)],
              [server("conntrack", 80, "one"), server("rules", 8081, "one", state="rules")])


def one_after_the_other(lab: Lab, port: int) -> None:
    limited(lab, limit=3, timeout=40)
    client = lab.client("c1")
    before = line_of(lab, "one")
    wait_until(lambda: lab.rest.get("/v1/stats?pool=one")["members"][0]["active"] == 0, 20, "nobody is there")
    now: Held | Visitor = Held(client, VIP, port)
    visitors: list[Visitor] = []
    try:
        for count in (1, 2, 3):
            visitors.append(Visitor(client, VIP, port))
            shown = waiting(lab, "one", count)
        assert [place["position"] for place in shown["line"]] == [1, 2, 3]
        assert all(place["client"].startswith(client.address) for place in shown["line"])
        refused(client, VIP, port)
        for index, visitor in enumerate(visitors):
            assert not any(one.done.is_set() for one in visitors[index:]), "one at a time"
            now.close()
            now = visitor.wait()
            assert visitor.server == "s1", (visitor.answer, visitor.error)
    finally:
        for visitor in visitors:
            visitor.close()
        now.close()
    after = waiting(lab, "one", 0)
    assert [after[name] - before[name] for name in ("waited", "refused_full", "timed_out")] == [3, 1, 0]


def test_one_after_the_other(lab: Lab) -> None:
    one_after_the_other(lab, 80)


def test_one_after_the_other_with_rule_pairs(lab: Lab) -> None:
    one_after_the_other(lab, 8081)


def test_a_wait_that_is_longer_than_an_agents_patience(lab: Lab) -> None:
    """It keeps no packet for more than three seconds; the client's SYN comes again."""
    limited(lab, limit=3, timeout=40)
    client = lab.client("c1")
    held = Held(client, VIP, 80)
    late = Visitor(client, VIP, 80)
    waiting(lab, "one", 1)
    time.sleep(6.5)
    assert line_of(lab, "one")["waiting"] == 1 and not late.done.is_set()
    held.close()
    assert late.wait().server == "s1", (late.answer, late.error)
    late.close()


def test_nobody_waits_for_ever(lab: Lab) -> None:
    limited(lab, limit=3, timeout=1.5)
    client = lab.client("c1")
    before = line_of(lab, "one")
    wait_until(lambda: lab.rest.get("/v1/stats?pool=one")["members"][0]["active"] == 0, 20, "nobody is there")
    held = Held(client, VIP, 80)
    late = Visitor(client, VIP, 80).wait()
    assert isinstance(late.error, ConnectionRefusedError), (late.answer, late.error)
    assert late.seconds >= 1.4
    assert held.ask() == "s1"
    held.close()
    assert line_of(lab, "one")["timed_out"] > before["timed_out"]
