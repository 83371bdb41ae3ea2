# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A laboratory: one topology alive in Mininet, with its own Open vSwitch, real servers, and the controller.

All of it lives in a network namespace of its own and under one temporary directory, so a
laboratory meets nothing that runs on the machine, two of them do not meet each other, and
nothing is left when it is closed. Demo, shell, tests and benchmark are built on it.

    with Lab(SingleTopo()) as lab:
        lab.start_servers()
        lab.start_controller()
        lab.apply(lab.topo.SITE)
        print(lab.client("c1").curl("http://10.0.0.100/"))
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from mininet.link import Intf
from mininet.log import setLogLevel
from mininet.net import Mininet

from lbapp.dataflow.ovs import PrivateOvs
from lbapp.monitors.place import Place
from topologies import namespace
from topologies.controller import OPENFLOW, ControllerProcess, Rest
from topologies.hosts import LabHost
from topologies.namespace import CommandError, Namespace, wait_until
from topologies.nodes import LoadBalancerTopo

BIG_BYTES = 100_000_000
FASTPATH_SECONDS = 30.0
PROGRAMS = ("ovs-vswitchd", "ovsdb-server", "mnexec", "ethtool", "nginx", "curl")


def unavailable() -> str | None:
    """Why a laboratory cannot be had here; None where it can."""
    reason = namespace.unavailable()
    if reason:
        return reason
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    # Mininet waits for ever for a host that mnexec could not make.
    done = subprocess.run(["mnexec", "-n", "true"], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"Mininet cannot make hosts (mnexec: {done.stderr.strip()}; in a chroot, / has to be a mount point)"
    return None


class Lab:
    """See the module. Made alive by the constructor, ended by :meth:`close` or a ``with`` block.

    Args:
        topo: the topology.
        directory: for sockets, logs and served files; a temporary one by default.
        applications: Ryu applications to run beside the load balancer.
        options: further options of ``lbapp run``.

    Attributes:
        root: the namespace of switch and controller.
        ovs: the switch.
        net: Mininet's own object.
        controller: the controller's process; not started by the constructor.
    """

    def __init__(self, topo: LoadBalancerTopo, directory: Path | None = None, applications: Sequence[str] = (),
                 options: Sequence[str] = ()) -> None:
        reason = unavailable()
        if reason:
            raise CommandError(f"no laboratory on this machine: {reason}")
        self.topo = topo
        self.services: dict[str, tuple[subprocess.Popen[Any], subprocess.Popen[Any]]] = {}
        self._cleanup = contextlib.ExitStack()
        try:
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix="lbapp-lab-"))
                self._cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
            self.directory = directory
            self.root = Namespace.create("the laboratory")
            self._cleanup.callback(self.root.close)
            self.ovs = PrivateOvs(directory / "ovs", self.root.prefix)
            self._cleanup.callback(self.ovs.stop)
            self.ovs.ensure_running()
            self._start_network()
            self.controller = ControllerProcess(self.root, directory / "state", applications, options,
                                                self.ovs.environment)
            self._cleanup.callback(self._remove_places)
            self._cleanup.callback(self.controller.remove_fastpath, self.bridges)
            self._cleanup.callback(self.controller.stop)
        except BaseException:
            self.close()
            raise

    def _start_network(self) -> None:
        setLogLevel("output")
        # Mininet would set limits of the whole machine.
        Mininet.inited = True
        for switch in self.topo.switches():
            information = {**self.topo.nodeInfo(switch), "ovs": self.ovs, "target": f"tcp:{OPENFLOW}"}
            self.topo.setNodeInfo(switch, information)
        self.hosts: dict[str, LabHost] = {}
        with self.root.entered():
            # Its interfaces stay where they were made; the shells of its switches too.
            self.net = Mininet(self.topo, controller=None, build=False)
            self._cleanup.callback(self._stop_network)
            self.net.build()
            self.net.start()
            tso = self.ovs.tso
            for node in self.net.hosts:
                node.set_offload(tso)
                interface: Intf = node.defaultIntf()
                host = LabHost(node.name, node.pid, interface.IP(), node.params["ip6"].partition("/")[0],
                               str(interface), self.directory / node.name)
                self.hosts[node.name] = host
                self._cleanup.callback(host.close)

    def _remove_places(self) -> None:
        """What a controller that was killed has left of its checks of members."""
        with self.root.entered():
            for place in (Place(self.ovs, bridge, ()) for bridge in self.bridges):
                if place.netns.exists():
                    place.remove()

    def _stop_network(self) -> None:
        with self.root.entered():
            self.net.stop()

    def close(self) -> None:
        """End everything, in the reverse order of its making."""
        self._cleanup.close()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # -------------------------------------------------------------------- parts

    @property
    def rest(self) -> Rest:
        """The controller's REST interface."""
        return self.controller.rest

    def client(self, name: str = "c1") -> LabHost:
        """A client."""
        return self.hosts[name]

    def server(self, name: str = "s1") -> LabHost:
        """A server."""
        return self.hosts[name]

    @property
    def clients(self) -> list[LabHost]:
        """All clients."""
        return [host for name, host in self.hosts.items() if name.startswith("c")]

    @property
    def servers(self) -> list[LabHost]:
        """All servers."""
        return [host for name, host in self.hosts.items() if name.startswith("s")]

    @property
    def bridges(self) -> list[str]:
        """The names of the switches."""
        return list(self.topo.switches())

    # ------------------------------------------------------------------- actions

    def start_servers(self) -> None:
        """Start nginx and the UDP echo on every server, where they do not run already.

        They serve the files that :meth:`make_file` makes. ``services`` holds the processes by
        server name: HTTP, then UDP.
        """
        files = self.directory / "files"
        files.mkdir(exist_ok=True)
        for server in self.servers:
            http, udp = self.services.get(server.name, (None, None))
            if http is None or http.poll() is not None:
                http = server.nginx(files)
            if udp is None or udp.poll() is not None:
                udp = server.udp_echo()
            self.services[server.name] = (http, udp)

    def make_file(self, name: str = "big", size: int = BIG_BYTES) -> str:
        """Make a file of random bytes that all servers serve, and return its SHA-256 in hexadecimal."""
        digest = hashlib.sha256()
        files = self.directory / "files"
        files.mkdir(exist_ok=True)
        with (files / name).open("wb") as file:
            while size > 0:
                block = os.urandom(min(size, 1 << 20))
                digest.update(block)
                file.write(block)
                size -= len(block)
        return digest.hexdigest()

    def start_controller(self, wait: float = 20.0) -> None:
        """Start the controller and wait until every switch is connected to it."""
        self.controller.start(wait)
        self.wait_connected(wait)

    def wait_connected(self, timeout: float = 20.0) -> None:
        """Wait until every switch has its controller on the line.

        Raises:
            RuntimeError: not in time; with the end of the controller's log.
        """
        wanted = {f"{number:016x}" for number in range(1, len(self.bridges) + 1)}

        def connected() -> bool:
            # Not from OVSDB, which tells up to 5 seconds later.
            views = self.rest.get("/v1/switches")["switches"]
            return wanted <= {view["dpid"] for view in views if view["connected"]}

        try:
            wait_until(connected, timeout, "all switches connected to the controller")
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.controller.log_tail()}") from None
        if self.controller.fastpath:
            # Packets on their way while ports are moved are lost. Where there can be none, all works without.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: self.has_fastpath or self.controller.has_no_fastpath, FASTPATH_SECONDS,
                           "a fast path in front of all switches")

    @property
    def has_fastpath(self) -> bool:
        """Whether there is one in front of every switch that is connected."""
        return all(switch["fastpath"] for switch in self.rest.get("/v1/stats")["switches"])

    def apply(self, site: Path | dict[str, Any], wait: float = 10.0) -> Any:
        """Make a site (a file or its content) the whole configuration: ``PUT /v1/config``.

        Args:
            site: the document.
            wait: seconds that the switches may take to have it; 0 does not wait.

        Raises:
            RestError: it was refused.
            TimeoutError: the switches do not have it in time.
        """
        document = yaml.safe_load(site.read_text()) if isinstance(site, Path) else site
        answer = self.rest.put("/v1/config", document)
        if wait:
            self.wait_provisioned(wait)
        return answer

    def wait_provisioned(self, timeout: float = 10.0) -> None:
        """Wait until no virtual server is ``PENDING_UPDATE``.

        Raises:
            TimeoutError: not in time.
        """
        wait_until(lambda: all(server["provisioning_status"] != "PENDING_UPDATE"
                               for server in self.rest.get("/v1/virtual-servers")["virtual_servers"]), timeout,
                   "the switches have the configuration", every=0.02)

    def forward_plainly(self) -> None:
        """Make the switches ordinary learning switches: for the laboratory without a controller."""
        for bridge in self.bridges:
            self.ovs.ofctl("add-flow", bridge, "priority=0,actions=NORMAL")
