# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.health: monitors' results, failures and weights become the configuration in force."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec

from lbapp.config.model import Configuration, VirtualServer
from lbapp.config.pool import Pool
from lbapp.control.events import EventKind
from lbapp.control.master import Master
from lbapp.health import HealthService, targets_of
from tests.fake_monitors import FakeMonitors, Watched

MONITORS = [{"type": "TCP"}, {"type": "HTTP", "port": 8080}]


def site(**fields: Any) -> Configuration:
    members = [{"address": f"10.0.0.{number}", "protocol_port": 80, "number": number} for number in (1, 2)]
    pool = msgspec.convert({"id": "p", "name": "p", "lb_algorithm": "LEAST_CONNECTIONS", "members": members,
                            "monitors": MONITORS, **fields}, Pool)
    other = msgspec.convert({"id": "q", "name": "q", "members": [
        {"address": "10.0.0.9", "protocol_port": 80, "number": 9}]}, Pool)
    server = msgspec.convert({"id": "v", "name": "v", "number": 1, "vip_address": "10.0.0.99", "protocol": "TCP",
                              "protocol_port": 80, "default_pool_id": "p"}, VirtualServer)
    return Configuration(pools={"p": pool, "q": other}, virtual_servers={"v": server})


def taking(configuration: Configuration, key: str = "p") -> list[int]:
    return [member.number for member in configuration.pools[key].members if member.takes_new]


def test_what_is_checked() -> None:
    targets = targets_of(site().pools.values())
    assert sorted(targets) == ["1:http", "1:tcp", "2:http", "2:tcp"]
    assert (targets["1:http"].checked_port, targets["1:tcp"].checked_port) == (8080, 80)
    elsewhere = site(members=[{"address": "10.0.0.1", "protocol_port": 80, "number": 1, "monitor_port": 81,
                               "monitor_address": "10.0.0.7"},
                              {"address": "10.0.0.2", "protocol_port": 80, "number": 2, "admin_state_up": False}])
    targets = targets_of(elsewhere.pools.values())
    assert {(key, one.address, one.checked_port) for key, one in targets.items()} == {
        ("1:tcp", "10.0.0.7", 81), ("1:http", "10.0.0.7", 8080)}


def test_a_result_is_in_force_with_the_next_step() -> None:
    told: list[Configuration] = []
    watched = Watched(told.append)
    watched.service.configure(site())
    assert len(told) == 1
    assert sorted(watched.monitors.targets) == ["1:http", "1:tcp", "2:http", "2:tcp"]
    watched.found("1:tcp", False, "connection refused")
    assert taking(told[-1]) == [2]
    report = watched.service.report(site().pools["p"].members[0])
    assert report is not None
    assert report.reason == "tcp: connection refused"
    watched.service.step()
    assert len(told) == 2, "nothing new is not told"
    watched.found("77:tcp", False)
    assert len(told) == 2, "nobody knows that member"


def test_many_results_are_one_change() -> None:
    told: list[Configuration] = []
    watched = Watched(told.append)
    watched.service.configure(site())
    for key in ("1:tcp", "2:tcp", "1:http", "2:http"):
        watched.monitors.found(key, False)
    watched.service.step()
    assert len(told) == 2
    assert taking(told[-1]) == []


def test_clients_failures_and_weights() -> None:
    told: list[Configuration] = []
    failures: list[tuple[int, str]] = [(1, "refused")] * 3
    master = Master()
    watched = Watched(told.append, failures=lambda: tuple(failures), master=master)
    watched.service.configure(site(monitors=[], passive={}, distribution={}))
    watched.service.step()
    failures.clear()
    assert taking(told[-1]) == [2]
    watched.now += 60
    watched.service.step()
    assert taking(told[-1]) == [1, 2]
    assert [member.weight for member in told[-1].pools["p"].members] == [1, 1], "nobody has reported"
    for number, share in ((1, 30.0), (2, 10.0)):
        master.report(f"a{number}", [(f"10.0.0.{number}", 0)], {"share": share}, watched.now)
    watched.service.configure(site(monitors=[], distribution={"algorithm": "FORMULA", "formula": "share"}))
    watched.now += 10
    watched.service.step()
    assert [member.weight for member in told[-1].pools["p"].members] == [30, 10]
    watched.service.configure(site(monitors=[]))
    watched.now += 10
    watched.service.step()
    assert [member.weight for member in told[-1].pools["p"].members] == [1, 1]


def test_events_tell_of_fallbacks_and_priorities() -> None:
    watched = Watched()
    watched.service.configure(site(fallback_pool="q", minimum_active=1, members=[
        {"address": f"10.0.0.{number}", "protocol_port": 80, "number": number, "priority": number}
        for number in (1, 2)]))
    watched.found("2:tcp", False)
    watched.found("1:tcp", False)
    watched.found("1:tcp", True)
    watched.found("1:http", True)
    kinds = [(event.kind, event.text) for event in watched.service.since(0)
             if event.kind in (EventKind.FALLBACK, EventKind.PRIORITY)]
    assert kinds == [(EventKind.PRIORITY, "all members take part"), (EventKind.FALLBACK, "pool q is used"),
                     (EventKind.FALLBACK, "its own members are used again")]


def test_response_times_are_passed_on() -> None:
    seen: list[tuple[int, float]] = []
    watched = Watched(response_times=seen.extend)
    watched.service.configure(site())
    watched.monitors.on_latencies([("2:http", 0.25)])
    assert seen == [(2, 0.25)]


def test_it_runs_by_itself_and_ends() -> None:
    seen = threading.Event()
    service = HealthService(lambda made: seen.set() if taking(made) == [2] else None,
                            FakeMonitors)  # type: ignore[arg-type]
    service.configure(site())
    service.start()
    monitors: Any = service._vantages
    monitors.found("1:tcp", False)
    assert seen.wait(10)
    service.close()
    assert monitors.closed
    before = time.time() - 5
    assert before < service.wall(next(service.since(0)).at) < time.time() + 5
