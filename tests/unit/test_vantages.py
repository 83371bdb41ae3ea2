# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.vantages: who is checked from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lbapp.config.model import Network
from lbapp.config.monitor import Monitor
from lbapp.monitors.supervisor import Statistics, Target
from lbapp.vantages import Vantages, Wanted

MONITOR = msgspec.convert({"type": "TCP"}, Monitor)
LAN = Network(name="lan", cidr="10.0.0.0/24", address="10.0.0.254", gateway="10.0.0.1", monitor_address="10.0.0.250")
LAN6 = Network(name="lan6", cidr="fd00::/64", address="fd00::254", monitor_address="fd00::250")


class Process:
    def __init__(self, on_changed: Any, on_latencies: Any, scripts: Any, netns: Path | None) -> None:
        self.netns, self.closed = netns, False
        self.targets: dict[str, Target] = {}
        self.statistics: Statistics | None = None

    def update(self, targets: dict[str, Target]) -> None:
        self.targets = dict(targets)

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.made: list[Wanted] = []
        self.removed: list[Wanted] = []
        self.processes: list[Process] = []
        self.refuse: Exception | None = None
        self.vantages = Vantages(lambda _: None, lambda _: None, None, self.spot, self.process)  # type: ignore[arg-type]

    def spot(self, wanted: Wanted) -> Any:
        if self.refuse is not None:
            raise self.refuse
        self.made.append(wanted)
        removed = self.removed

        class Spot:
            netns = Path("/run/netns/x")

            def remove(self) -> None:
                removed.append(wanted)

        return Spot()

    def process(self, *arguments: Any) -> Process:
        self.processes.append(Process(*arguments))
        return self.processes[-1]

    @property
    def checked(self) -> dict[str, set[str]]:
        """What is checked, by where."""
        return {"inside" if one.netns else "own": set(one.targets) for one in self.processes if not one.closed}


TARGETS = {"1:tcp": Target(address="10.0.0.51", port=80, monitor=MONITOR),
           "2:tcp": Target(address="fd00::51", port=80, monitor=MONITOR),
           "3:tcp": Target(address="192.0.2.7", port=80, monitor=MONITOR)}


def test_without_a_monitor_address_all_are_checked_from_this_host() -> None:
    bench = Bench()
    bench.vantages.configure([Network(name="lan", cidr="10.0.0.0/24", address="10.0.0.254")], TARGETS)
    bench.vantages.attach("br0")
    assert bench.checked == {"own": {"1:tcp", "2:tcp", "3:tcp"}}
    assert bench.made == []


def test_members_of_a_network_wait_for_their_place() -> None:
    bench = Bench()
    bench.vantages.configure([LAN, LAN6], TARGETS)
    assert bench.checked == {"own": {"3:tcp"}}
    bench.vantages.attach("br0")
    bench.vantages.attach("br1")
    assert bench.checked == {"own": {"3:tcp"}, "inside": {"1:tcp", "2:tcp"}}
    assert bench.made == [Wanted("br0", ("10.0.0.250/24", "fd00::250/64"), ("10.0.0.1",))]
    bench.vantages.close()
    assert bench.checked == {}
    assert bench.removed == bench.made


def test_what_the_processes_say_of_themselves() -> None:
    bench = Bench()
    bench.vantages.configure([LAN], TARGETS)
    bench.vantages.attach("lb1")
    assert bench.vantages.statistics() == [], "nothing yet"
    own, inside = (Statistics(checks=number, cpu_seconds=0.5) for number in (7, 9))
    for process in bench.processes:
        process.statistics = inside if process.netns else own
    assert bench.vantages.statistics() == [((), own), (("10.0.0.250/24",), inside)]
    bench.vantages.configure([], TARGETS)
    assert bench.vantages.statistics() == [((), own)]


def test_another_address_is_another_place() -> None:
    bench = Bench()
    bench.vantages.attach("br0")
    bench.vantages.configure([LAN], {})
    bench.vantages.configure([LAN], TARGETS)
    assert len(bench.made) == 1
    bench.vantages.configure([msgspec.structs.replace(LAN, monitor_address="10.0.0.249")], TARGETS)
    assert [one.addresses for one in bench.made] == [("10.0.0.250/24",), ("10.0.0.249/24",)]
    assert len(bench.removed) == 1
    assert bench.checked == {"own": {"2:tcp", "3:tcp"}, "inside": {"1:tcp"}}
    bench.vantages.configure([], TARGETS)
    assert bench.checked == {"own": {"1:tcp", "2:tcp", "3:tcp"}}


def test_a_place_that_cannot_be_made_leaves_members_unchecked(caplog: Any) -> None:
    bench = Bench()
    bench.refuse = OSError("no namespaces here")
    bench.vantages.configure([LAN], TARGETS)
    bench.vantages.attach("br0")
    assert bench.checked == {"own": {"2:tcp", "3:tcp"}}
    assert "no namespaces here" in caplog.text
    later = {key: target for key, target in TARGETS.items() if not key.startswith("2")}
    bench.vantages.configure([LAN], later)
    assert bench.checked == {"own": {"3:tcp"}}, "others are looked after all the same"
    bench.refuse = None
    bench.vantages.configure([LAN], TARGETS)
    assert bench.checked == {"own": {"2:tcp", "3:tcp"}, "inside": {"1:tcp"}}
