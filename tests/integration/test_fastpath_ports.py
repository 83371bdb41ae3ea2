# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Ports of a real bridge get veth pairs in front of them, keep their numbers, and follow what changes.

The two programs here are the least that can stand there: every frame goes on to where the map says.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lbapp.dataflow.fastpath import ports as ports_module
from lbapp.dataflow.fastpath.ports import Wire
from lbapp.dataflow.fastpath.removal import PRIORITY
from tests.integration.wires import BRIDGE, HOSTS, Site, in_another_process, site_number
from tests.namespaces import require
from topologies.namespace import wait_until

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.integration.wires"]

NO_PAUSE = 0.3
"""Seconds: one retransmission (Linux's shortest time-out is 0.2 s)."""
ATTACH_WITHIN = 2.0


# ------------------------------------------------------------------- attaching


def test_every_port_gets_a_pair_and_keeps_its_number(site, load):
    before, loaded = site.everything(), load()
    identity = site.ovs.vsctl("get", "Bridge", BRIDGE, "datapath_id")
    with site.wires(loaded) as wires:
        begun = time.monotonic()
        changes = wires.sync()
        print(f"attached {HOSTS} ports in {time.monotonic() - begun:.3f} s")
        links = site.links()
        places = {f"lbo{links[name]['ifindex']}": place for name, place in before["places"].items()}
        assert site.places() == places
        numbers = {f"lbo{links[name]['ifindex']}": number for name, number in before["numbers"].items()}
        assert site.port_numbers() == numbers
        assert changes.added == wires.ports and not changes.removed
        for name, number in before["numbers"].items():
            index = links[name]["ifindex"]
            inner, outer = links[f"lbi{index}"], links[f"lbo{index}"]
            assert wires.ports[number] == Wire(number, name, index, inner["ifindex"], outer["ifname"])
            assert inner["mtu"] == outer["mtu"] == 1500
            assert outer["address"] == links[name]["address"]
            assert {"UP", "NOARP"} <= set(inner["flags"]) & set(outer["flags"])
            assert "PROMISC" in links[name]["flags"]
            features = site.root.run("ethtool", "-k", outer["ifname"]).stdout
            assert "tx-checksumming: on" in features and "tcp-segmentation-offload: on" in features
            assert [one["options"]["bpf_name"] for one in site.filters(name)] == [f"lbapp-wire {BRIDGE} clsact"]
        assert set(wires.left_alone) == {BRIDGE}
        assert "internal" in wires.left_alone[BRIDGE]
        assert site.ovs.vsctl("get", "Bridge", BRIDGE, "datapath_id") == identity
        site.ping()
        assert wires.sync() == ({}, {})
        wires.take_down()
        assert wires.ports == {}
        site.ping()
    assert site.everything() == before


@pytest.mark.alone
def test_bulk_transfers_stay_in_large_frames(site, load):
    require("iperf3")
    with site.wires(load()) as wires:
        wires.sync()
        server = site.hosts[1].popen("iperf3", "-s", "-1", stdout=subprocess.DEVNULL)
        wait_until(lambda: site.hosts[1].run("ss", "-Hltn", "sport = :5201").stdout, 5, "iperf3 listens")
        outer = wires.ports[site_number(site, wires, "w2")].outer
        before = counters(site, outer)
        answer = json.loads(site.hosts[0].run("iperf3", "-J", "-t2", "-c", site.address(site.hosts[1])).stdout)
        server.wait(10)
        packets, octets = (after - earlier for after, earlier in zip(counters(site, outer), before, strict=True))
        speed = answer["end"]["sum_received"]["bits_per_second"]
        print(f"{speed / 1e9:.1f} Gbit/s, {octets / packets:.0f} bytes a frame")
        assert octets / packets > 5000
        assert speed > 1e9


def counters(site: Site, name: str) -> tuple[int, int]:
    """Packets and bytes that the bridge sent through a port."""
    found = json.loads(site.root.run("ip", "-j", "-s", "link", "show", name).stdout)[0]["stats64"]["tx"]
    return found["packets"], found["bytes"]


def test_a_pair_has_no_addresses_from_which_it_would_speak(site, load):
    with site.wires(load()) as wires:
        wires.sync()
        names = [end for wire in wires.ports.values() for end in (wire.outer, wire.outer.replace("lbo", "lbi"))]
        for name in names:
            assert not json.loads(site.root.run("ip", "-j", "addr", "show", name).stdout)[0]["addr_info"]


def test_others_filters_stay(site, load):
    loaded = load()
    site.root.run("tc", "qdisc", "add", "dev", "w1", "clsact")
    site.root.run("tc", "filter", "add", "dev", "w1", "ingress", "pref", "7", "bpf", "da", "object-pinned",
                  str(loaded.pins / "next"))
    before = site.everything()
    with site.wires(loaded) as wires:
        wires.sync()
        site.ping()
        assert [one["pref"] for one in site.filters("w1")] == [7, PRIORITY]
        wires.take_down()
    assert site.everything() == before


def test_clsact_that_was_there_stays_even_if_empty(site, load):
    site.root.run("tc", "qdisc", "add", "dev", "w1", "clsact")
    before, loaded = site.everything(), load()
    with site.wires(loaded) as wires:
        wires.sync()
    with site.wires(load()) as wires:  # another one, with other programs, has to know that too
        wires.sync()
        wires.take_down()
    assert site.everything() == before


def test_what_the_port_was_told_is_carried_over(site, load):
    site.ovs.vsctl("set", "Port", "w1", "tag=12", "--", "set", "Interface", "w1", "external_ids:owner=x y",
                   "mtu_request=1400", "other_config:k=\"v\"")
    wait_until(lambda: site.links()["w1"]["mtu"] == 1400, 3, "the MTU asked for")
    before = site.everything()
    with site.wires(load()) as wires:
        wires.sync()
        outer = wires.ports[site_number(site, wires, "w1")].outer
        assert site.ovs.vsctl("get", "Port", "w1", "tag").strip() == "12"
        assert site.ovs.vsctl("get", "Interface", outer, "external_ids:owner").strip() == '"x y"'
        assert site.links()[outer]["mtu"] == 1400
        wires.take_down()
    assert site.everything() == before


def test_other_ports_are_left_alone(site, load):
    site.ovs.vsctl("add-port", BRIDGE, "int0", "--", "set", "Interface", "int0", "type=internal",
                   "--", "add-port", BRIDGE, "patch0", "--", "set", "Interface", "patch0", "type=patch",
                   "options:peer=patch1",
                   "--", "add-port", BRIDGE, "vx0", "--", "set", "Interface", "vx0", "type=vxlan",
                   "options:remote_ip=127.0.0.9",
                   "--", "--may-exist", "add-port", BRIDGE, "missing0")
    site.root.run("ip", "link", "add", "b0", "type", "veth", "peer", "name", "b1")
    site.ovs.vsctl("add-bond", BRIDGE, "bond0", "b0", "b1")
    try:
        with site.wires(load()) as wires:
            wires.sync()
            assert {wire.name for wire in wires.ports.values()} == {"w1", "w2", "w3"}
            assert {name: why.split()[-1] for name, why in wires.left_alone.items()} == {
                BRIDGE: "internal", "int0": "internal", "patch0": "patch", "vx0": "vxlan", "missing0": "exist",
                "b0": "bond", "b1": "bond"}
    finally:
        site.root.run("ip", "link", "del", "b0")


def test_eight_ports_take_little_time(site, load):
    names = [f"e{number}" for number in range(8)]
    site.ovs.add_bridge("br8")
    for name in names:
        site.root.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        site.root.run("ip", "link", "set", name, "up")
        site.root.run("ip", "link", "set", f"{name}p", "up")
        site.ovs.add_port("br8", name)
    try:
        with site.wires(load(), "br8") as wires:
            times = []
            for step in (wires.sync, wires.sync, wires.follow, wires.take_down):
                begun = time.monotonic()
                step()
                times.append(time.monotonic() - begun)
            print("attach {:.3f} s, nothing new {:.3f} s, follow {:.4f} s, take down {:.3f} s".format(*times))
            assert max(times) < ATTACH_WITHIN
    finally:
        for name in names:
            site.root.run("ip", "link", "del", name)


# -------------------------------------------------------- established connections


@pytest.mark.alone
def test_a_transfer_survives_attaching_adoption_and_taking_down(site, load, stream):
    with site.wires(load()) as wires:
        begun = time.monotonic()
        wires.sync()
        stream.flowing()
        print(f"attach: silence of {stream.longest_silence(begun):.3f} s")
        assert stream.longest_silence(begun) < 2
        ports = wires.ports
        numbers = site.port_numbers()
    # Kept; then adopted by another, whose programs are other ones.
    stream.flowing()
    loaded = load()
    with site.wires(loaded) as wires:
        begun = time.monotonic()
        changes = wires.sync()
        stream.flowing()
        print(f"adoption: silence of {stream.longest_silence(begun):.3f} s")
        assert stream.longest_silence(begun) < NO_PAUSE
        assert changes.added == ports == wires.ports
        assert site.port_numbers() == numbers
        running = {one["options"]["prog"]["id"] for name in ("w1", "w2", "w3") for one in site.filters(name)}
        assert running == {program_id(loaded.wire)}
        begun = time.monotonic()
        wires.take_down()
        stream.flowing()
        print(f"take down: silence of {stream.longest_silence(begun):.3f} s")
        assert stream.longest_silence(begun) < 2


def program_id(descriptor: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("prog_id:"))


# ------------------------------------------------------------------------- changes


def test_carrier_mtu_and_address_are_followed(site, load):
    with site.wires(load()) as wires:
        wires.sync()
        number = site_number(site, wires, "w1")
        outer = wires.ports[number].outer

        def followed(condition: Callable[[], bool], what: str) -> float:
            begun = time.monotonic()

            def told() -> bool:
                assert wires.follow() is False
                return condition()

            wait_until(told, 3, what, every=0.01)
            return time.monotonic() - begun

        wires.follow()
        site.hosts[0].run("ip", "link", "set", "eth0", "down")
        print(f"carrier lost: seen after {followed(lambda: site.link_down(number), 'the port is down'):.3f} s")
        site.hosts[0].run("ip", "link", "set", "eth0", "up")
        followed(lambda: not site.link_down(number), "the port is up")
        site.ping()
        site.root.run("ip", "link", "set", "w1", "mtu", "1300")
        followed(lambda: site.links()[outer]["mtu"] == 1300, "the MTU")
        site.root.run("ip", "link", "set", "w1", "address", "02:00:00:00:99:01")
        followed(lambda: site.links()[outer]["address"] == "02:00:00:00:99:01", "the address")
        # As it is for W without a pair: a port that the controller disables is down for its host.
        site.ovs.ofctl("mod-port", BRIDGE, outer, "down")
        followed(lambda: "UP" not in site.links()["w1"]["flags"], "W is down")
        site.ovs.ofctl("mod-port", BRIDGE, outer, "up")
        followed(lambda: "UP" in site.links()["w1"]["flags"] and not site.link_down(number), "W is up")
        site.ping()


def test_a_port_without_carrier_is_attached_as_such(site, load):
    site.hosts[0].run("ip", "link", "set", "eth0", "down")
    with site.wires(load()) as wires:
        wires.sync()
        wait_until(lambda: site.link_down(site_number(site, wires, "w1")), 3, "the port is down")
        assert not site.link_down(site_number(site, wires, "w2"))


def test_ports_come_and_go(site, load):
    loaded = load()
    gone: list[Wire] = []
    with site.wires(loaded, disconnect=gone.append) as wires:
        wires.sync()
        first = dict(wires.ports)
        name = "w4" if len(site.hosts) > HOSTS else site.host()
        site.ovs.add_port(BRIDGE, name, 40)
        wait_until(wires.follow, 3, "a port that came is noticed")
        changes = wires.sync()
        assert [wire.name for wire in changes.added.values()] == [name]
        assert list(changes.added) == [40] and not changes.removed
        assert wires.ports == {**first, 40: changes.added[40]}
        assert wires.follow() is False
        site.hosts[0].run("ping", "-c1", "-W2", site.address(site.hosts[3]))

        # Taken off by the name that it has always had.
        site.ovs.delete_port(BRIDGE, name)
        wait_until(wires.follow, 3, "a port that went is noticed")
        changes = wires.sync()
        assert not changes.added and list(changes.removed) == [40]
        assert gone == [changes.removed[40]]
        assert wires.ports == first
        assert not site.filters(name)
        assert "PROMISC" not in site.links()[name]["flags"]
        assert len([link for link in site.links() if link.startswith("lbi")]) == HOSTS
        site.ping()


def test_an_interface_vanishes_and_comes_again(site, load):
    with site.wires(load()) as wires:
        wires.sync()
        number = site_number(site, wires, "w3")
        site.root.run("ip", "link", "del", "w3")
        wait_until(wires.follow, 3, "it is noticed")
        changes = wires.sync()
        assert list(changes.removed) == [number]
        assert "w3" in wires.left_alone
        assert len([link for link in site.links() if link.startswith("lbi")]) == HOSTS - 1
        site.plug("w3", site.hosts[2])
        wait_until(wires.follow, 5, "it is noticed")
        # Open vSwitch gives it a number after it has begun to use it.
        wait_until(lambda: wires.sync().added, 5, "it has a wire again")
        assert {wire.name for wire in wires.ports.values()} == {"w1", "w2", "w3"}
        assert site_number(site, wires, "w3") == number
        site.ping()
        wires.take_down()


def test_a_datapath_in_the_kernel_needs_no_pair(site, load, monkeypatch):
    """Told so; here the datapath is Open vSwitch's own all the same."""
    before = site.everything()
    read = vars(ports_module)["read"]
    monkeypatch.setattr(ports_module, "read",
                        lambda ovs: [replace(record, datapath_type="system") for record in read(ovs)])
    with site.wires(load()) as wires:
        wires.sync()
        assert {(wire.name, wire.inner, wire.outer) for wire in wires.ports.values()} == {
            ("w1", 0, "w1"), ("w2", 0, "w2"), ("w3", 0, "w3")}
        assert site.port_numbers() == before["numbers"]
        assert site.filters("w1")
        site.ping()
        assert wires.sync() == ({}, {})
        site.ovs.delete_port(BRIDGE, "w3")
        assert [wire.name for wire in wires.sync().removed.values()] == ["w3"]
        assert not site.filters("w3")
        site.ovs.add_port(BRIDGE, "w3")
        wires.take_down()
    assert not site.filters("w1")
    site.ping()


# ------------------------------------------------------------------- green threads


def test_it_works_in_green_threads(site, load):
    """In a process as the controller's is: nobody has to wait for it."""
    loaded = load()
    process = in_another_process(site, """
        import sys, warnings
        warnings.simplefilter("ignore")
        import eventlet
        eventlet.monkey_patch()
        import time
        from pathlib import Path
        from lbapp.dataflow.fastpath.netlink import Netlink
        from lbapp.dataflow.fastpath.ports import Wires
        from lbapp.dataflow.ovs import Ovs
        from tests.integration.leading import Loaded

        ticks = []
        def tick():
            while True:
                ticks.append(time.monotonic())
                eventlet.sleep(0.002)
        eventlet.spawn(tick)
        loaded = Loaded(Path(sys.argv[2]))
        wires = Wires(Ovs(sys.argv[1]), sys.argv[3], loaded.programs, loaded.connect)
        netlink = Netlink()
        def many():
            for _ in range(100):
                assert "w1" in netlink.links()
                eventlet.sleep(0)
        others = [eventlet.spawn(many) for _ in range(3)] + [eventlet.spawn(wires.sync) for _ in range(2)]
        with eventlet.Timeout(20):
            for other in others:
                other.wait()
            assert sorted(wire.name for wire in wires.ports.values()) == ["w1", "w2", "w3"]
            eventlet.sleep(0.1)
            wires.follow()
            wires.take_down()
        print(max(later - earlier for earlier, later in zip(ticks, ticks[1:])))
        """, str(site.ovs.rundir), str(loaded.pins), BRIDGE)
    said, _ = process.communicate(timeout=40)
    assert process.returncode == 0
    print(f"the others waited {float(said):.3f} s at most")
    assert float(said) < 0.5
    site.ping()
