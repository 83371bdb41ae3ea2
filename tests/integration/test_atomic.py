# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Changes of the configuration while clients connect without a pause: no connection meets half of a change."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import VIP, VIP6, Held, change_member, configure, members, pool, server, settle
from topologies.hosts import LabHost
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

pytestmark = pytest.mark.alone

CHANGES = 20
AT_LEAST = 300


class Clients:
    """Connect again and again, each to its target in a thread of its own, until told to stop.

    A host has one target of a family: connections from one port to two virtual servers may meet at the member that
    both share, and there be one and the same.

    Attributes:
        served: who answered how often.
        failures: what went wrong, with the time since the start and the client's port.
    """

    def __init__(self, *targets: tuple[LabHost, str, int]) -> None:
        self.served: dict[tuple[str, int], Counter[str]] = {target[1:]: Counter() for target in targets}
        self.failures: list[str] = []
        self.slow: list[str] = []
        self._stop = threading.Event()
        self._begun = time.monotonic()
        self._threads = [threading.Thread(target=self._run, args=(target[0], target[1:]), daemon=True)
                         for target in targets]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _run(self, host: LabHost, target: tuple[str, int]) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                one = Held(host, *target)
                one.close()
            except (OSError, AssertionError) as error:
                self.failures.append(f"{begun - self._begun:.3f} s, {target}: {error!r}")
                continue
            self.served[target][one.server] += 1
            took = time.monotonic() - begun
            if took > 0.9:
                self.slow.append(f"{begun - self._begun:.3f} s, {target}: {took:.2f} s")

    def few_were_slow(self) -> None:
        """Assert that hardly a packet was lost (a SYN is sent again after a second)."""
        assert len(self.slow) <= max(1, self.total // 200), self.slow

    @property
    def total(self) -> int:
        """Connections that were served."""
        return sum(sum(counted.values()) for counted in self.served.values())


@pytest.mark.parametrize("algorithm", ["WEIGHTED_ROUND_ROBIN", "SOURCE_IP", "CONSISTENT_HASH"])
def test_no_connection_fails_while_a_pool_changes(lab: Lab, algorithm: str) -> None:
    """Weights, members that drain, leave and come, in each way to decide and both families."""
    configure(lab, [pool("web", algorithm, members(lab)), pool("web6", algorithm, members(lab, six=True))],
              [server("switch", 80, "web", decision="switch"), server("six", 80, "web6", VIP6, decision="switch"),
               server("controller", 8080, "web", decision="controller"), server("rules", 8081, "web", state="rules")])
    first, second, third = lab.clients
    with Clients((first, VIP, 80), (first, VIP6, 80), (second, VIP, 8080), (third, VIP, 8081)) as clients:
        steps = itertools.cycle(_steps())
        for _ in range(CHANGES):
            name, fields = next(steps)
            for which in ("web", "web6"):
                change_member(lab, which, name, cached=False, **fields)
        deadline = time.monotonic() + 20
        while clients.total < AT_LEAST and time.monotonic() < deadline:
            time.sleep(0.05)
    assert clients.failures == []
    clients.few_were_slow()
    assert clients.total >= AT_LEAST
    for target, counted in clients.served.items():
        assert sum(counted.values()) >= 20, f"{target}: {counted}"


def _steps() -> list[tuple[str, dict[str, Any]]]:
    return [("s1", {"weight": 3}), ("s2", {"draining": True}), ("s3", {"weight": 5}), ("s2", {"draining": False}),
            ("s1", {"admin_state_up": False}), ("s3", {"weight": 1}), ("s1", {"admin_state_up": True}),
            ("s2", {"weight": 0}), ("s1", {"weight": 1}), ("s2", {"weight": 1})]


def drained(lab: Lab, name: str) -> None:
    """Wait until a draining member has no connection, and none that is on its way to it either."""
    for _ in range(2):
        time.sleep(0.1)
        wait_until(lambda: [one["connections"] for one in lab.rest.get("/v1/draining")["draining"]
                            if one["name"] == name] == [0], 20, f"{name} has no connection left")


@pytest.mark.parametrize("decision", ["switch", "controller"])
def test_no_connection_fails_while_members_are_removed_and_added(lab: Lab, decision: str) -> None:
    """A member drains until its connections have ended, is taken out of the pool, and put in again."""
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))], [server("web", 80, "web", decision=decision)])
    with Clients((lab.client("c1"), VIP, 80)) as clients:
        for round_ in range(CHANGES // 4):
            name = f"s{1 + round_ % 3}"
            change_member(lab, "web", name, draining=True)
            drained(lab, name)
            listed = lab.rest.get("/v1/pools/web/members")["members"]
            gone = next(one for one in listed if one["name"] == name)
            lab.rest.delete(f"/v1/pools/web/members/{gone['id']}")
            settle(lab, cached=False)
            lab.rest.post("/v1/pools/web/members", {"name": name, "address": gone["address"],
                                                    "protocol_port": gone["protocol_port"]})
            settle(lab, cached=False)
    assert clients.failures == []
    clients.few_were_slow()
    assert clients.total >= 100
    assert set(clients.served[VIP, 80]) == {"s1", "s2", "s3"}


def test_others_are_not_touched_by_a_virtual_server_that_comes_and_goes(lab: Lab) -> None:
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))],
              [server("a", 80, "web"), server("b", 8080, "web", decision="controller")])
    pool_id = lab.rest.get("/v1/pools/web")["id"]
    with Clients((lab.client("c1"), VIP, 80), (lab.client("c2"), VIP, 8080)) as clients:
        for number in range(CHANGES // 2):
            lab.rest.post("/v1/virtual-servers", {"name": "passing", "vip_address": VIP, "protocol": "TCP",
                                                  "protocol_port": 9000 + number, "default_pool_id": pool_id})
            settle(lab, cached=False)
            Held(lab.client("c3"), VIP, 9000 + number).close()
            lab.rest.delete("/v1/virtual-servers/passing")
            settle(lab, cached=False)
    assert clients.failures == []
    clients.few_were_slow()
    assert clients.total >= 100


def test_a_whole_site_applied_again_changes_nothing(lab: Lab) -> None:
    """The same document, and one that differs in one field: idempotent, and only what differs is touched."""
    site = {"networks": [], "pools": [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))],
            "virtual_servers": [server("a", 80, "web")]}
    lab.apply(site)
    settle(lab)
    identifier = lab.rest.get("/v1/virtual-servers/a")["id"]
    with Clients((lab.client("c2"), VIP, 80)) as clients:
        before = lab.rest.get("/v1/stats")["switches"][0]["flow_mods"]
        for _ in range(3):
            lab.apply(site)
        settle(lab)
        assert lab.rest.get("/v1/stats")["switches"][0]["flow_mods"] == before, "nothing to change, nothing sent"
        lab.apply({**site, "virtual_servers": [server("a", 80, "web", description="changed")]})
        settle(lab)
    assert lab.rest.get("/v1/virtual-servers/a")["id"] == identifier
    assert clients.failures == []
