# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.dataflow.ovs against a real Open vSwitch of the test session's own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lbapp.dataflow.ovs import CONNTRACK_TIMEOUTS, Ovs, OvsError, PrivateOvs
from tests.namespaces import require
from topologies.namespace import Namespace


def test_without_descriptors_a_command_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = Path("/proc/self/fd")
    before = {one.name for one in here.iterdir()}
    try:
        for spare in range(1, 8):
            spent = []
            while True:
                spent.append(os.open(os.devnull, os.O_RDONLY))
                if spent[-1] >= max(map(int, before)) + 20:
                    break
            resource.setrlimit(resource.RLIMIT_NOFILE, (spent[-1] + 1 + spare, limits[1]))
            with pytest.raises(OvsError, match="ovs-vsctl cannot be started: Too many open files"):
                Ovs(tmp_path).vsctl("show")
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for one in spent:
                os.close(one)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert {one.name for one in here.iterdir()} == before


@pytest.fixture
def bridge(switch: PrivateOvs) -> Iterator[str]:
    switch.add_bridge("br-test", "tcp:127.0.0.1:6699", datapath_id=0xABC)
    yield "br-test"
    switch.delete_bridge("br-test")


def field(switch: PrivateOvs, table: str, record: str, column: str) -> str:
    return switch.vsctl("get", table, record, column).strip().strip('"')


def test_a_bridge_has_our_settings(switch: PrivateOvs, bridge: str) -> None:
    assert switch.bridges() == [bridge]
    assert field(switch, "Bridge", bridge, "datapath_type") == "netdev"
    assert field(switch, "Bridge", bridge, "fail_mode") == "secure"
    assert field(switch, "Bridge", bridge, "protocols") == "[OpenFlow13, OpenFlow15]"
    assert field(switch, "Bridge", bridge, "datapath_id") == "0000000000000abc"
    assert field(switch, "Bridge", bridge, "other_config:controller-queue-size") == "511"
    assert field(switch, "Controller", bridge, "target") == "tcp:127.0.0.1:6699"
    assert field(switch, "Controller", bridge, "inactivity_probe") == "5000"
    assert field(switch, "Controller", bridge, "max_backoff") == "1000"
    assert not switch.connected(bridge)


def test_another_target_keeps_the_rules(switch: PrivateOvs, bridge: str) -> None:
    switch.ofctl("add-flow", bridge, "cookie=0x77,actions=drop")
    switch.add_bridge(bridge, "tcp:127.0.0.1:6698", datapath_id=0xABC)
    switch.set_controller(bridge, "tcp:127.0.0.1:6697")
    assert field(switch, "Controller", bridge, "target") == "tcp:127.0.0.1:6697"
    assert "cookie=0x77" in switch.ofctl("dump-flows", bridge)


def test_a_port_gets_the_number_and_the_vlan_asked_for(switch: PrivateOvs, bridge: str) -> None:
    subprocess.run([*switch.prefix, "ip", "link", "add", "va", "type", "veth", "peer", "vb"], check=True)
    try:
        assert switch.add_port(bridge, "va", number=7, tag=20) == 7
        assert field(switch, "Port", "va", "tag") == "20"
        switch.delete_port(bridge, "va")
        assert "va" not in switch.vsctl("list-ports", bridge).split()
    finally:
        subprocess.run([*switch.prefix, "ip", "link", "del", "va"], check=True)


def test_an_interface_that_is_not_there_is_an_error(switch: PrivateOvs, bridge: str) -> None:
    with pytest.raises(OvsError, match="nowhere0"):
        switch.add_port(bridge, "nowhere0")


def test_conntrack_timeouts_are_set_once_and_changed(switch: PrivateOvs) -> None:
    switch.set_conntrack_timeouts([5, 6])
    before = switch.vsctl("get", "Open_vSwitch", ".", "cur_cfg")
    switch.set_conntrack_timeouts([5, 6])
    assert switch.vsctl("get", "Open_vSwitch", ".", "cur_cfg") == before
    switch.set_conntrack_timeouts([6], {**CONNTRACK_TIMEOUTS, "tcp_close": 9})
    listed = {line.split(",")[0]: line for line in switch.vsctl("list-zone-tp", "netdev").splitlines() if line}
    assert "tcp_close=1 " in listed["Zone:5"]
    assert "tcp_close=9 " in listed["Zone:6"]


def test_readings(switch: PrivateOvs) -> None:
    assert switch.version() >= (3, 1, 0)
    assert switch.tso
    assert switch.controller_queue_drops() == 0
    assert switch.conntrack_entries() == 0


def test_packets_that_the_controller_does_not_take_are_counted(switch: PrivateOvs, bridge: str) -> None:
    """A controller that connects and never reads: OVS's queue towards it overflows."""
    program = """
import socket, struct, sys
listening = socket.socket()
listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
listening.bind(("127.0.0.1", 6699)); listening.listen()
print("ready", flush=True)
connection, _ = listening.accept()
connection.sendall(struct.pack("!BBHI", 4, 0, 8, 1))
connection.recv(8)
connection.sendall(struct.pack("!BBHIHH", 4, 9, 12, 2, 0, 0xffff))  # SET_CONFIG: whole packets
print("connected", flush=True)
sys.stdin.read()
"""
    peer = subprocess.Popen([*switch.prefix, sys.executable, "-c", program], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)
    try:
        assert peer.stdout is not None
        assert peer.stdout.readline() == "ready\n"
        assert peer.stdout.readline() == "connected\n"
        packet = "00" * 6 + "020000000001" + "88b5" + "00" * 1400
        before = switch.controller_queue_drops()
        for _ in range(40):
            switch.ofctl("packet-out", bridge, "LOCAL", "controller", *[packet] * 100)
            if switch.controller_queue_drops() > before:
                break
        assert switch.controller_queue_drops() > before
    finally:
        peer.kill()
        peer.communicate()


def test_a_killed_switch_comes_back_with_its_bridges(netns: Callable[[str], Namespace], tmp_path: Path) -> None:
    require("ovs-vswitchd")
    ovs = PrivateOvs(tmp_path / "ovs", netns("switch").prefix)
    try:
        ovs.ensure_running()
        ovs.add_bridge("br0")
        ovs.kill_switch()
        assert not ovs.switch_running()
        ovs.ensure_running()
        assert ovs.bridges() == ["br0"]
        assert "br0" in ovs.ofctl("show", "br0")
    finally:
        ovs.stop()
    assert not ovs.database_running()


def test_where_nothing_runs_the_error_says_so(tmp_path: Path) -> None:
    ovs = Ovs(tmp_path)
    assert not ovs.database_running()
    assert not ovs.switch_running()
    assert not ovs.tso
    with pytest.raises(OvsError, match="database connection failed"):
        ovs.add_bridge("br0")


def test_a_missing_program_is_named() -> None:
    with pytest.raises(OvsError, match="ovs-nothing is not installed"):
        Ovs().command("ovs-nothing")


def test_commands_work_in_a_process_that_eventlet_has_patched(switch: PrivateOvs) -> None:
    program = ("import eventlet; eventlet.monkey_patch();"
               "from lbapp.dataflow.ovs import Ovs; import sys;"
               "print(Ovs(sys.argv[1]).tso)")
    done = subprocess.run([sys.executable, "-c", program, str(switch.rundir)], capture_output=True, text=True,
                          timeout=30, check=False, cwd=Path(__file__).resolve().parents[2])
    assert done.stdout == "True\n", done.stderr
