# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A bridge with hosts, all in namespaces of their own, and a transfer between two of them.

Fixtures (a test module names this one in ``pytest_plugins``): ``load`` makes the programs of leading.py anew,
``site`` is the bridge, in order again before each test, ``stream`` a TCP transfer under way on it.

PYTEST_DONT_REWRITE: what is imported as a module is imported before it is known to be a plug-in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.fastpath.ports import Wires
from lbapp.dataflow.fastpath.removal import remove
from lbapp.dataflow.ovs import PrivateOvs
from tests.integration.leading import SOURCE, Loaded
from tests.integration.support import tcp
from tests.namespaces import require
from topologies.namespace import Namespace, wait_until

ROOT = Path(__file__).resolve().parents[2]
HOSTS = 3
BRIDGE = "br0"
NUMBERS = [1, 20, 3]
"""The second port's number was asked for, the others' were given."""
PORT = 7000


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


def in_another_process(site: Site, code: str, *arguments: str) -> subprocess.Popen[str]:
    return site.root.popen(sys.executable, "-c", textwrap.dedent(code), *arguments, cwd=ROOT, text=True,
                           stdout=subprocess.PIPE)


def site_number(site: Site, wires: Wires, name: str) -> int:
    return next(number for number, wire in wires.ports.items() if wire.name == name)
