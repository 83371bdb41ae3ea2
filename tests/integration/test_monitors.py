# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Members are checked from the balancer's own address in their network, through Open vSwitch, fast path or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from lbapp.config.monitor import Monitor
from lbapp.dataflow.fastpath.records import Record, read
from lbapp.dataflow.ovs import PrivateOvs
from lbapp.monitors.place import INSIDE, Place, PlaceError, port_name
from lbapp.monitors.supervisor import Changed, Monitors, Target
from tests.integration.support import VIP, VIP6, configure, members, pool, server
from topologies.hosts import ECHO_PORT
from topologies.lab import Lab
from topologies.namespace import Namespace, end, wait_until

pytestmark = pytest.mark.integration
WITH_FASTPATH = True

ADDRESSES = ("10.0.0.250/24", "fd00::250/64")
BRIDGE = "lbmon-test"
FOUND_WITHIN = 30.0


def target(address: str, port: int, **fields: Any) -> Target:
    monitor = msgspec.convert({"interval": 0.5, "timeout": 0.5, "fast_interval": 0.2, **fields}, Monitor)
    return Target(address=address, port=port, monitor=monitor)


class Heard:
    """What the process says, by target."""

    def __init__(self) -> None:
        self.states: dict[str, Changed] = {}
        self.times: dict[str, float] = {}

    def changed(self, found: list[Changed]) -> None:
        self.states.update((one.key, one) for one in found)

    def wait(self, wanted: dict[str, bool], within: float = FOUND_WITHIN) -> None:
        try:
            wait_until(lambda: all(key in self.states and self.states[key].up == up for key, up in wanted.items()),
                       within, "every target is known to be as it is")
        except TimeoutError:
            wrong = {key: self.states.get(key) for key, up in wanted.items()
                     if key not in self.states or self.states[key].up != up}
            raise AssertionError(f"expected {wanted}, wrong are {wrong}") from None


def record(lab: Lab) -> Record:
    """The port's, whatever interface stands there now."""
    name = port_name(lab.bridges[0])
    (found,) = [one for one in read(lab.ovs) if (one.wire or one.name) == name]
    return found


@pytest.fixture
def place(lab: Lab) -> Iterator[Place]:
    with lab.root.entered():
        made = Place(lab.ovs, lab.bridges[0], ADDRESSES)
        made.ensure()
        try:
            if lab.controller.fastpath:
                # What is on its way while the port gets its wire is lost, and a first check would say so for ever.
                wait_until(lambda: record(lab).name.startswith("lbo") and record(lab).ofport, 15, "a wire in front")
            yield made
        finally:
            made.remove()


@pytest.fixture
def checked(place: Place) -> Iterator[Callable[[dict[str, Target]], Heard]]:
    heard = Heard()
    monitors = Monitors(heard.changed, lambda found: heard.times.update(found), netns=place.netns)

    def check(targets: dict[str, Target]) -> Heard:
        monitors.update(targets)
        return heard

    try:
        yield check
    finally:
        monitors.close()


def sites(lab: Lab) -> None:
    """Virtual servers whose members are those that are checked: their rules see the checks' packets, too."""
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab)), pool("web6", "ROUND_ROBIN", members(lab, six=True))],
              [server("web", 80, "web"), server("web6", 80, "web6", vip=VIP6)])


@pytest.mark.parametrize("busy", [False, True], ids=["plain", "balanced"])
def test_members_are_checked_in_both_families(lab, checked, busy):
    if busy:
        sites(lab)
    wanted: dict[str, bool] = {}
    targets: dict[str, Target] = {}
    for host in lab.servers:
        for address in (host.address, host.address6):
            for kind, port, fields in (("TCP", 80, {}), ("TCP_HALF_OPEN", 80, {}), ("HTTP", 80, {"body_regex": "^s"}),
                                       ("ICMP", 0, {}), ("UDP", ECHO_PORT, {"send": "x", "expect": host.name})):
                targets[f"{address} {kind}"] = target(address, port, type=kind, **fields)
                wanted[f"{address} {kind}"] = True
            for kind, fields in (("TCP", {}), ("TCP_HALF_OPEN", {}), ("HTTP", {}), ("UDP", {"send": "x"})):
                targets[f"{address} no {kind}"] = target(address, 81, type=kind, **fields)
                wanted[f"{address} no {kind}"] = False
    for address in ("10.0.0.99", "fd00::99"):
        targets[f"{address} nobody"] = target(address, 80, type="ICMP")
        wanted[f"{address} nobody"] = False
    heard = checked(targets)
    heard.wait(wanted)
    for host in lab.servers:
        for address in (host.address, host.address6):
            assert {heard.states[f"{address} no {kind}"].reason for kind in ("TCP", "TCP_HALF_OPEN", "HTTP")} == {
                "connection refused"}
            assert heard.states[f"{address} no UDP"].reason == "port unreachable"
    if busy:
        assert set(lab.client("c1").who(f"http://{VIP}/", 6)) == {host.name for host in lab.servers}
        assert set(lab.client("c1").who(f"http://[{VIP6}]/", 6)) == {host.name for host in lab.servers}


def test_a_member_that_dies_and_comes_back(lab, checked):
    sites(lab)
    host = lab.server("s2")
    heard = checked({f"{kind}{version}": target(address, 80, type=kind, rise=2, fall=2)
                     for kind in ("TCP", "TCP_HALF_OPEN", "HTTP")
                     for version, address in ((4, host.address), (6, host.address6))})
    everything = {f"{kind}{version}": True for kind in ("TCP", "TCP_HALF_OPEN", "HTTP") for version in (4, 6)}
    heard.wait(everything)
    wait_until(lambda: everything.keys() <= heard.times.keys(), 10, "response times")
    assert all(0 < seconds < 0.5 for seconds in heard.times.values())
    end(lab.services["s2"][0])
    heard.wait(dict.fromkeys(everything, False))
    assert {one.reason for one in heard.states.values()} == {"connection refused"}
    lab.start_servers()
    heard.wait(everything)


def test_the_fast_path_takes_it_for_an_ordinary_port(lab, place):
    name = port_name(lab.bridges[0])
    index = json.loads(lab.root.run("ip", "-json", "link", "show", name).stdout)[0]["ifindex"]
    if lab.controller.fastpath:
        assert record(lab).name == f"lbo{index}"
    number = record(lab).ofport
    # Another process, after a crash of the first, finds it all there and moves nothing.
    assert Place(lab.ovs, lab.bridges[0], ADDRESSES).ensure() == place.netns
    assert record(lab).ofport == number
    assert json.loads(lab.root.run("ip", "-json", "link", "show", name).stdout)[0]["ifindex"] == index
    place.remove()
    assert name not in lab.ovs.vsctl("list-ports", lab.bridges[0]).split()
    if lab.controller.fastpath:
        wait_until(lambda: f"lbo{index}" not in lab.root.run("ip", "-br", "link").stdout, 15, "the wire is gone")
    place.remove()


# ------------------------------------------------------------------ the place alone


@pytest.fixture
def bridge(switch: PrivateOvs) -> Iterator[PrivateOvs]:
    switch.add_bridge(BRIDGE)
    try:
        yield switch
    finally:
        switch.delete_bridge(BRIDGE)


def namespace_of(ovs: PrivateOvs) -> Namespace:
    """That of the switch."""
    path = next(one for one in ovs.prefix if one.startswith("--net=")).partition("/proc/")[2]
    return Namespace("switch", int(path.partition("/")[0]))


def addresses(place: Place, root: Namespace) -> set[str]:
    listed = json.loads(root.run("ip", "-json", "-n", place.netns.name, "address", "show", "dev", INSIDE).stdout)
    return {f"{one['local']}/{one['prefixlen']}" for one in listed[0]["addr_info"] if one["scope"] == "global"}


def routers(place: Place, root: Namespace) -> list[str]:
    """Where the place's default routes lead, IPv4's first."""
    found = [root.run("ip", "-n", place.netns.name, family, "route", "show", "default").stdout.split()
             for family in ("-4", "-6")]
    return [words[2] for words in found if words]


def test_it_is_made_changed_mended_and_removed(bridge):
    root = namespace_of(bridge)
    with root.entered():
        first = Place(bridge, BRIDGE, ["10.0.0.250/24"], tag=7)
        name = port_name(BRIDGE)
        try:
            assert first.ensure().exists()
            assert addresses(first, root) == {"10.0.0.250/24"}
            assert bridge.vsctl("get", "Port", name, "tag").strip() == "7"
            features = root.run("ip", "netns", "exec", first.netns.name, "ethtool", "-k", INSIDE).stdout
            assert "tx-checksumming: off" in features
            assert "generic-segmentation-offload: off" in features
            second = Place(bridge, BRIDGE, ["10.0.0.251/24", "fd00:0::251/64"],
                           gateways=["10.0.0.1", "fd00::1"])
            second.ensure()
            assert addresses(second, root) == {"10.0.0.251/24", "fd00::251/64"}
            assert bridge.vsctl("get", "Port", name, "tag").strip() == "[]"
            assert routers(second, root) == ["10.0.0.1", "fd00::1"]
            Place(bridge, BRIDGE, ["10.0.0.251/24", "fd00::251/64"]).ensure()
            assert routers(second, root) == []
            # Somebody deletes the pair; the port's record stays.
            root.run("ip", "link", "delete", name)
            second.ensure()
            assert addresses(second, root) == {"10.0.0.251/24", "fd00::251/64"}
            assert int(bridge.vsctl("get", "Interface", name, "ofport")) > 0
            # Somebody deletes the namespace, and with it both ends.
            root.run("ip", "netns", "delete", second.netns.name)
            wait_until(lambda: name not in root.run("ip", "-br", "link").stdout, 10, "the pair went with it")
            second.ensure()
            assert int(bridge.vsctl("get", "Interface", name, "ofport")) > 0
        finally:
            first.remove()
        assert not first.netns.exists()
        assert name not in root.run("ip", "-br", "link").stdout
        assert name not in bridge.vsctl("list-ports", BRIDGE).split()
        first.remove()


def test_two_network_namespaces_with_a_bridge_of_one_name_do_not_meet(bridge, netns):
    made = []
    for where in (namespace_of(bridge), netns("other")):
        with where.entered():
            made.append(Place(bridge, BRIDGE, ["10.0.0.250/24"]).netns.name)
    assert made[0] != made[1] and all(name.startswith(f"lbmon-{BRIDGE}-") for name in made)


def test_another_network_namespaces_place_is_left_alone(bridge, netns):
    root, other = namespace_of(bridge), netns("other")
    with root.entered():
        place, same = Place(bridge, BRIDGE, ["10.0.0.250/24"]), Place(bridge, BRIDGE, ["10.0.0.250/24"])
        place.ensure()
    try:
        with other.entered(), pytest.raises(PlaceError, match="in use by another network namespace"):
            same.ensure()
        assert addresses(place, root) == {"10.0.0.250/24"}
    finally:
        with root.entered():
            place.remove()


def test_what_cannot_be_had_is_said(bridge):
    with pytest.raises(PlaceError, match=r"monitor address: '10\.0\.0\.300/24'"):
        Place(bridge, BRIDGE, ["10.0.0.300/24"])
    with namespace_of(bridge).entered():
        nowhere = Place(bridge, "nosuch", ["10.0.0.250/24"])
        with pytest.raises(PlaceError, match="there is no bridge nosuch"):
            nowhere.ensure()
        assert not nowhere.netns.exists()
        nowhere.remove()


def test_a_bridge_that_went_away_takes_nothing_along_that_is_not_removed(bridge):
    root = namespace_of(bridge)
    with root.entered():
        place = Place(bridge, BRIDGE, ["10.0.0.250/24"])
        place.ensure()
        bridge.delete_bridge(BRIDGE)
        place.remove()
        assert not place.netns.exists()
        assert port_name(BRIDGE) not in root.run("ip", "-br", "link").stdout
