# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What was put in front of ports goes away again: after a crash, when half of it is gone, when a step was refused."""

from __future__ import annotations

import time

import pytest

from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.dataflow.fastpath.ports import Programs, Wire
from lbapp.dataflow.fastpath.records import WIRE, in_order, read
from lbapp.dataflow.fastpath.removal import PortsError, remove
from tests.integration.wires import BRIDGE, HOSTS, in_another_process, site_number

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.integration.wires"]

NO_PAUSE = 0.3
"""Seconds: one retransmission (Linux's shortest time-out is 0.2 s)."""


# ------------------------------------------------------------------------ crashes


@pytest.mark.alone
def test_forwarding_survives_a_kill_and_repair_leaves_nothing(site, load, stream):
    before, loaded = site.everything(), load()
    process = in_another_process(site, """
        import sys
        from tests.integration.leading import attach_and_wait
        attach_and_wait(*sys.argv[1:])
        """, str(site.ovs.rundir), BRIDGE, str(loaded.pins))
    assert process.stdout is not None and process.stdout.readline() == "attached\n"
    stream.flowing()
    begun = time.monotonic()
    process.kill()
    process.wait()
    stream.flowing()
    assert stream.longest_silence(begun) < NO_PAUSE
    assert site.port_numbers() != before["numbers"]
    site.ping()
    with site.root.entered():
        assert set(remove(site.ovs, BRIDGE)) == {"w1", "w2", "w3"}
    stream.flowing()
    assert site.everything() == before
    with site.root.entered():
        assert remove(site.ovs, BRIDGE) == []
        assert remove(site.ovs) == []


@pytest.mark.parametrize("damage", ["pair", "filter", "clsact", "switch", "unlabelled"])
def test_half_of_it_is_gone(site, load, damage):
    before, loaded = site.everything(), load()
    with site.wires(loaded) as wires:
        wires.sync()
        wire = wires.ports[site_number(site, wires, "w1")]
    broken = {"pair": ["ip", "link", "del", wire.outer],
              "filter": ["tc", "filter", "del", "dev", "w1", "ingress"],
              "clsact": ["tc", "qdisc", "del", "dev", f"lbi{wire.ifindex}", "clsact"],
              "switch": ["true"],
              "unlabelled": ["ip", "link", "set", f"lbi{wire.ifindex}", "alias", ""]}[damage]
    site.root.run(*broken)
    if damage == "switch":
        site.ovs.kill_switch()
        site.ovs.ensure_running()
    with site.wires(loaded) as wires:  # repaired by the next one
        wires.sync()
        assert {wire.name for wire in wires.ports.values()} == {"w1", "w2", "w3"}
        assert sorted(wires.ports) == sorted(before["numbers"].values())
        if damage == "switch":
            site.ovs.ofctl("add-flow", BRIDGE, "priority=0,actions=NORMAL")
        site.ping()
    site.root.run(*broken, check=False)
    with site.root.entered():
        remove(site.ovs)
    after = site.everything()
    if damage == "switch":
        del before["places"], after["places"]  # a datapath that starts numbers its ports anew
    assert after == before


def test_the_switch_is_dead(site, load):
    """Kernel and database are put in order; the switch reads it when it starts."""
    before, loaded = site.everything(), load()
    with site.wires(loaded) as wires:
        site.ovs.kill_switch()
        # Nothing can be attached now, and nothing is left of the attempt.
        with pytest.raises(PortsError, match=BRIDGE):
            wires.sync()
        assert not [name for name in site.links() if name.startswith(("lbi", "lbo"))]
        site.ovs.ensure_running()
        wires.sync()
        site.ovs.kill_switch()
        begun = time.monotonic()
        wires.take_down()
        assert time.monotonic() - begun < 5
        assert not [name for name in site.links() if name.startswith(("lbi", "lbo"))]
        site.ovs.ensure_running()
        assert site.port_numbers() == before["numbers"]


def test_a_bridge_that_is_no_more(site, load):
    with site.wires(load()) as wires:
        wires.sync()
        site.ovs.delete_bridge(BRIDGE)
        with pytest.raises(PortsError, match=f"{BRIDGE}.*no such bridge"):
            wires.sync()
        wires.take_down()
    assert not [name for name in site.links() if name.startswith(("lbi", "lbo"))]
    assert not site.filters("w1")
    assert "PROMISC" not in site.links()["w1"]["flags"]


def test_another_bridges_wires_are_not_touched(site, load):
    loaded = load()
    site.root.run("ip", "link", "add", "x1", "type", "veth", "peer", "name", "x1p")
    try:
        site.ovs.add_bridge("br1")
        site.ovs.add_port("br1", "x1")
        with site.wires(loaded) as wires, site.wires(loaded, "br1") as others:
            wires.sync()
            others.sync()
            kept = others.ports
            wires.take_down()
            assert others.sync() == ({}, {})
            assert others.ports == kept
            assert site.filters("x1")
            with site.root.entered():
                assert remove(site.ovs) == ["x1"]
            assert not [name for name in site.links() if name.startswith(("lbi", "lbo"))]
    finally:
        site.root.run("ip", "link", "del", "x1")


# ------------------------------------------------------------------------ refusals


def test_failures_leave_the_bridge_as_it_was(site, load):
    before, loaded = site.everything(), load()

    def refuse(wire: Wire) -> None:
        if wire.name == "w3":
            raise PortsError("the map is full")

    gone: list[str] = []
    for options, said in (
            ({"connect": refuse}, "the map is full"),
            # Of another type: refused at the last step, when the ports have been exchanged.
            ({"programs": Programs(loaded.other, loaded.out)}, "w[123]:"),
            ({"programs": Programs(loaded.wire, loaded.other)}, "w[123]:")):
        with (site.wires(loaded, **options, disconnect=lambda wire: gone.append(wire.name)) as wires,
              pytest.raises(PortsError, match=f"{BRIDGE}.*{said}")):
            wires.sync()
        assert site.everything() == before
        assert wires.ports == {}
    assert gone == ["w1", "w3", "w1", "w3", "w2"]  # those that were connected; at the last attempt none
    site.ping()


def test_a_new_port_that_is_refused_leaves_the_others_attached(site, load):
    loaded = load()
    name = "w4" if len(site.hosts) > HOSTS else site.host()

    def refuse(wire: Wire) -> None:
        if wire.name == name:
            raise PortsError("no room")
        loaded.connect(wire)

    with site.wires(loaded, connect=refuse) as wires:
        wires.sync()
        kept = wires.ports
        site.ovs.add_port(BRIDGE, name)
        with pytest.raises(PortsError, match="no room"):
            wires.sync()
        assert wires.ports == kept
        assert name in site.port_numbers()
        site.ping()


def test_what_is_no_program_or_no_bridge(site, load):
    loaded = load()
    with (pytest.raises(PortsError, match="no eBPF program"),
          site.wires(loaded, programs=Programs(loaded.onward, loaded.out))):
        pass
    with site.wires(loaded, "br9") as wires, pytest.raises(PortsError, match=r"br9.*no such bridge"):
        wires.sync()


def test_refusals_of_the_kernel_are_told(site):
    with site.root.entered(), Netlink() as netlink:
        with pytest.raises(NetlinkError):
            netlink.add_pair("lo", "x", 1500, bytes([2, 0, 0, 0, 0, 1]))
        with pytest.raises(NetlinkError):
            netlink.change(999_999, up=True)
        assert netlink.delete(999_999) is False
        assert netlink.filters(netlink.links()["lo"].ifindex) == []


# ------------------------------------------------------------------------- records


def test_records_say_what_stands_for_what(site, load):
    before = {record.name: record for record in read(site.ovs)}
    assert before["w2"].requested == 20 and before["w1"].requested is None
    assert before[BRIDGE].type == "internal" and before[BRIDGE].ofport == 65534
    with site.wires(load()) as wires:
        wires.sync()
        after = {record.wire: record for record in read(site.ovs) if record.wire is not None}
        assert set(after) == {"w1", "w2", "w3"}
        for name, record in after.items():
            assert record.external_ids[WIRE] == name
            assert (record.ofport, record.port, record.error) == (before[name].ofport, before[name].port, "")
        places = {name: int(place.partition("/")[2]) for name, place in site.places().items()}
        order = [places[record.name] for record in in_order(site.ovs, after.values())]
        assert order == sorted(places.values(), reverse=True)
