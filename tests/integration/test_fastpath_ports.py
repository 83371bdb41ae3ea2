# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Ports of a real bridge get veth pairs in front of them, keep working, and get rid of them again.

The two programs here are the least that can stand there: every frame goes on to where the map says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.fastpath import ports as ports_module
from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.dataflow.fastpath.ports import PortsError, Programs, Wire, Wires, remove
from lbapp.dataflow.ovs import PrivateOvs
from tests.integration.leading import SOURCE, Loaded
from tests.integration.support import tcp
from tests.namespaces import require
from topologies.namespace import Namespace, wait_until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
HOSTS = 3
BRIDGE = "br0"
NUMBERS = [1, 20, 3]
"""The second port's number was asked for, the others' were given."""
PORT = 7000
NO_PAUSE = 0.3
"""Seconds: one retransmission (Linux's shortest time-out is 0.2 s)."""
ATTACH_WITHIN = 2.0


# ------------------------------------------------------------------ programs


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Loaded]]:
    """Load the programs, each time anew."""
    require("clang", "bpftool")
    directory = tmp_path_factory.mktemp("bpf")
    (directory / "lead.bpf.c").write_text(SOURCE)
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", f"-I/usr/include/{platform.machine()}-linux-gnu", "-c",
                    "lead.bpf.c", "-o", "lead.bpf.o"], cwd=directory, check=True)
    with ExitStack() as cleanup:
        def make() -> Loaded:
            pins = Path(f"/sys/fs/bpf/lbapp-test-{os.getpid()}-{time.monotonic_ns()}")
            done = subprocess.run(["bpftool", "prog", "loadall", str(directory / "lead.bpf.o"), str(pins), "pinmaps",
                                   str(pins / "maps")], check=False, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"eBPF programs cannot be loaded: {done.stderr.strip().splitlines()[-1]}")
            cleanup.callback(unpin, pins)
            loaded = Loaded(pins)
            cleanup.callback(loaded.close)
            return loaded

        yield make


def unpin(pins: Path) -> None:
    for path in sorted(pins.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    pins.rmdir()


# ---------------------------------------------------------------------- site


class Site:
    """A bridge in a namespace of its own, with hosts."""

    def __init__(self, directory: Path, cleanup: ExitStack) -> None:
        self.cleanup = cleanup
        self.root = Namespace.create("the switch's")
        cleanup.callback(self.root.close)
        self.ovs = PrivateOvs(directory / "ovs", self.root.prefix)
        cleanup.callback(self.ovs.stop)
        self.ovs.ensure_running()
        self.hosts: list[Namespace] = []

    def host(self) -> str:
        """A further host and its interface W in the switch's namespace."""
        host = Namespace.create(f"h{len(self.hosts) + 1}")
        self.cleanup.callback(host.close)
        self.hosts.append(host)
        name = f"w{len(self.hosts)}"
        self.plug(name, host)
        return name

    def plug(self, name: str, host: Namespace) -> None:
        self.root.run("ip", "link", "add", name, "mtu", "1500", "type", "veth", "peer", "name", "eth0", "netns",
                      str(host.pid), "address", f"02:00:00:00:00:{self.hosts.index(host) + 1:02x}")
        self.root.run("ip", "link", "set", name, "up")
        host.run("ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")

    def address(self, host: Namespace) -> str:
        return f"10.9.0.{self.hosts.index(host) + 1}"

    def reset(self) -> None:
        """Whatever the test before did: one bridge, a learning switch, three hosts."""
        self.ovs.ensure_running()
        with self.root.entered():
            remove(self.ovs)
        for bridge in self.ovs.bridges():
            self.ovs.delete_bridge(bridge)
        while len(self.hosts) < HOSTS:
            self.host()
        self.ovs.add_bridge(BRIDGE)
        self.ovs.ofctl("add-flow", BRIDGE, "priority=0,actions=NORMAL")
        for number, host in enumerate(self.hosts[:HOSTS]):
            name = f"w{number + 1}"
            if not self.root.run("ip", "link", "show", name, check=False).stdout:
                self.plug(name, host)
            self.root.run("tc", "qdisc", "del", "dev", name, "clsact", check=False)
            self.root.run("ip", "link", "set", name, "up", "mtu", "1500")
            host.run("ip", "link", "set", "eth0", "up")
            self.ovs.add_port(BRIDGE, name, NUMBERS[number] if number == 1 else None)
            # The system's first port number may not be 1 where others came and went.
        self.ping()

    @contextmanager
    def wires(self, loaded: Loaded, bridge: str = BRIDGE, **options: Any) -> Iterator[Wires]:
        with self.root.entered():
            options.setdefault("connect", loaded.connect)
            options.setdefault("programs", loaded.programs)
            made = Wires(self.ovs, bridge, **options)
        try:
            yield made
        finally:
            made.close()

    # ------------------------------------------------------------ what there is

    def ping(self) -> None:
        """Every host reaches the others."""
        for host in self.hosts[:HOSTS]:
            for other in self.hosts[:HOSTS]:
                if other is not host:
                    reached = "ping", "-c1", "-i0.2", "-W1", self.address(other)
                    wait_until(lambda: host.run(*reached, check=False).returncode == 0, 5,  # noqa: B023 (asked at once)
                               f"{host.name} reaches {other.name}")

    def links(self) -> dict[str, dict[str, Any]]:
        listed = json.loads(self.root.run("ip", "-j", "-d", "link").stdout)
        return {link["ifname"]: link for link in listed}

    def filters(self, name: str) -> list[dict[str, Any]]:
        listed = json.loads(self.root.run("tc", "-j", "filter", "show", "dev", name, "ingress").stdout or "[]")
        return [one for one in listed if "options" in one]

    def port_numbers(self, bridge: str = BRIDGE) -> dict[str, int]:
        """OpenFlow's port numbers by name."""
        lines = self.ovs.ofctl("show", bridge).splitlines()
        found = [line.strip().partition("(") for line in lines if "): addr:" in line]
        return {name.partition(")")[0]: int(number) for number, _, name in found if number != "LOCAL"}

    def places(self) -> dict[str, str]:
        """OpenFlow's and the datapath's port numbers by name, of ports that are not the bridge's own."""
        return dict(re.findall(r"^    (\S+) (\d+/\d+): \(system\)", self.ovs.appctl("dpif/show"), re.MULTILINE))

    def link_down(self, number: int) -> bool:
        """What OpenFlow says of a port."""
        lines = self.ovs.ofctl("show", BRIDGE).splitlines()
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{number}("))
        return "LINK_DOWN" in lines[start + 2]

    def everything(self) -> dict[str, Any]:
        """All that a pair changes, and must have changed back."""
        kept = ("flags", "mtu", "address", "promiscuity", "ifalias", "link_index")
        links = {name: {key: link.get(key) for key in kept} for name, link in self.links().items()}
        return {
            "links": links,
            "qdiscs": self.root.run("tc", "qdisc").stdout,
            "filters": {name: self.root.run("tc", "filter", "show", "dev", name, "ingress").stdout for name in links},
            "switch": sorted(self.ovs.vsctl("show").splitlines()),
            "interfaces": sorted(self.ovs.vsctl(
                "--columns=name,ofport,ofport_request,external_ids,type,mtu_request,other_config,error", "--format=csv",
                "list", "Interface").splitlines()),
            "numbers": self.port_numbers(),
            "places": self.places(),
            "rules": self.ovs.ofctl("--no-stats", "dump-flows", BRIDGE),
        }


@pytest.fixture(scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require("ovs-vswitchd", "ovsdb-server", "ovs-vsctl", "tc", "ping")
    with ExitStack() as cleanup:
        yield Site(tmp_path_factory.mktemp("ports"), cleanup)


@pytest.fixture
def site(_site: Site) -> Site:
    _site.reset()
    return _site


class Stream:
    """A TCP connection on which something is sent every few milliseconds; knows the longest silence.

    Args:
        begun: the server's end listens in ``server``, the client is in ``client``.
    """

    EVERY = 0.005

    def __init__(self, site: Site, client: Namespace, server: Namespace) -> None:
        import socket

        with server.entered():
            listener = socket.create_server((site.address(server), PORT))
        self._sender = tcp(client, site.address(server), PORT)
        self._receiver, _ = listener.accept()
        listener.close()
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._ending = threading.Event()
        self.arrivals: list[float] = []
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._ending.wait(self.EVERY):
            block = os.urandom(1000)
            self._sender.sendall(block)
            self._sent.update(block)
        self._sender.close()

    def _receive(self) -> None:
        self._receiver.settimeout(20)
        while block := self._receiver.recv(65536):
            self._received.update(block)
            self.arrivals.append(time.monotonic())

    def flowing(self) -> None:
        """Wait until something arrives that was sent after now."""
        now = time.monotonic()
        wait_until(lambda: self.arrivals and self.arrivals[-1] > now + 4 * self.EVERY, 15, "the transfer goes on")

    def longest_silence(self, since: float) -> float:
        times = [since, *(when for when in self.arrivals if when > since)]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def end(self) -> None:
        """Assert that all that was sent has come."""
        self._ending.set()
        for thread in self._threads:
            thread.join(20)
        self._receiver.close()
        assert self._sent.hexdigest() == self._received.hexdigest()


@pytest.fixture
def stream(site: Site) -> Iterator[Stream]:
    """From the first host to the second."""
    made = Stream(site, site.hosts[0], site.hosts[1])
    made.flowing()
    yield made
    made.end()


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


def site_number(site: Site, wires: Wires, name: str) -> int:
    return next(number for number, wire in wires.ports.items() if wire.name == name)


def counters(site: Site, name: str) -> tuple[int, int]:
    """Packets and bytes that the bridge sent through a port."""
    found = json.loads(site.root.run("ip", "-j", "-s", "link", "show", name).stdout)[0]["stats64"]["tx"]
    return found["packets"], found["bytes"]


def test_a_pair_says_nothing_by_itself(site, load):
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
        assert [one["pref"] for one in site.filters("w1")] == [7, ports_module.PRIORITY]
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


# ------------------------------------------------------------------------ crashes


def in_another_process(site: Site, code: str, *arguments: str) -> subprocess.Popen[str]:
    return site.root.popen(sys.executable, "-c", textwrap.dedent(code), *arguments, cwd=ROOT, text=True,
                           stdout=subprocess.PIPE)


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
        wait_until(lambda: wires.follow() and wires.sync().added, 5, "it has a wire again")
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
