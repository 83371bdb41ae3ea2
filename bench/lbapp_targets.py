# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp itself as a target: its own Open vSwitch in the middle, ``lbapp run`` beside it, set up by REST.

Only what an operator would use is used: the command, the REST interface, Open vSwitch's tools.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from bench import machine
from bench.lab import NAMED, BenchError, Lab, Namespace, Process, tail
from bench.load import BULK_PORT, WEB_PORT, Client, Messages, Site
from bench.targets import VIP, Target, hosts, start_servers
from lbapp.dataflow.ovs import OvsError, PrivateOvs
from topologies import namespace as processes
from topologies.controller import OPENFLOW, ControllerProcess, RestError

BRIDGE = "br0"
PREFIX_LENGTH = 8
LINE_COUNTERS = ("vconn_sent", "vconn_received")
"""Open vSwitch's coverage counters of OpenFlow messages."""
READY_SECONDS = 20.0
SETTLE_SECONDS = 1.2
"""Open vSwitch adds its counters up once a second."""


class RunningController:
    """A controller under measurement."""

    def __init__(self, process: ControllerProcess, ovs: PrivateOvs) -> None:
        self._process = process
        self._ovs = ovs

    @property
    def pid(self) -> int:
        """Its process; BenchError where it has ended."""
        if not self._process.running or self._process.process is None:
            raise BenchError(f"the controller ended: {tail(self._process.log_tail(), 3)}")
        return self._process.process.pid

    def cpu_seconds(self) -> float:
        """See :class:`bench.load.Controller`."""
        return machine.cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        """See :class:`bench.load.Controller`."""
        return machine.rss_bytes(self.pid)

    def messages(self) -> Messages:
        """See :class:`bench.load.Controller`. The total is the switch's own count, of everything on the line."""
        try:
            stats = self._process.rest.get("/v1/stats")
            total = sum(int(self._ovs.appctl("coverage/read-counter", name)) for name in LINE_COUNTERS)
        except (RestError, httpx.HTTPError, OvsError) as error:
            raise BenchError(str(error)) from None
        return counted(stats, total)


def counted(stats: Mapping[str, Any], total: int) -> Messages:
    """The messages of ``GET /v1/stats``, over all switches, with the total from elsewhere."""
    flow_mods, packet_ins, removed = (sum(int(switch[kind]) for switch in stats["switches"])
                                      for kind in ("flow_mods", "packet_ins", "flows_removed"))
    agents = [switch["fastpath"] for switch in stats["switches"] if switch.get("fastpath")]
    closed, closing, asked = (sum(int(agent[kind]) for agent in agents)
                              for kind in ("deletes", "delete_messages", "queries"))
    # Proxied handshakes are answered before there is a connection whose packets could be counted.
    relays = [switch["relay"] for switch in stats["switches"] if switch.get("relay")]
    shaken = sum(int(one["handshakes"].get(kind, 0)) for one in (*agents, *relays)
                 for kind in ("greeted", "greeted_ack"))
    packets = sum(int(server["packets"] or 0) for server in stats["virtual_servers"])
    return Messages(total, flow_mods, packet_ins, closed, closing, packet_ins + removed + asked + closing,
                    packets + shaken)


class Installation:
    """Four clients and two servers on one switch, and a controller for it; no virtual server yet.

    Args:
        lab: where it is built.
        options: further options of ``lbapp run``.
    """

    def __init__(self, lab: Lab, options: Sequence[str] = ()) -> None:
        self.lab = lab
        clients, servers = hosts(lab)
        self.clients, self.servers = tuple(clients), tuple(servers)
        self.middle = lab.namespace("mid")
        self.addresses = [f"10.1.0.{index}" for index in range(1, len(servers) + 1)]
        self.ovs = PrivateOvs(lab.directory / "ovs", self.middle.argv())
        lab.on_close(self.ovs.stop)
        try:
            self.ovs.ensure_running()
            self.ovs.add_bridge(BRIDGE, controller=f"tcp:{OPENFLOW}")
            self._join("c", clients, [f"10.0.0.{index}" for index in range(1, len(clients) + 1)])
            self._join("s", servers, self.addresses)
        except OvsError as error:
            raise BenchError(str(error)) from None
        start_servers(lab, servers)
        # A namespace is known by a process in it.
        anchor = lab.spawn(self.middle, "anchor", ["sleep", "infinity"])
        inside = processes.Namespace("the middle", anchor.pid)
        self.process = ControllerProcess(inside, lab.directory / "state", options=options,
                                         environment=self.ovs.environment)
        lab.on_close(lambda: self.process.remove_fastpath([BRIDGE]))
        lab.on_close(self.process.stop)
        try:
            self.process.start(READY_SECONDS)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise BenchError(f"lbapp run is not ready ({why}): {tail(self.process.log_tail(), 3)}") from None
        self.rest = self.process.rest
        self.controller = RunningController(self.process, self.ovs)
        # Open vSwitch's own is_connected is up to five seconds old.
        self.wait(lambda: self.get("/v1/switches")["switches"], "the switch connected to the controller")
        if "--fastpath" in options:
            self.wait(lambda: any(switch["fastpath"] for switch in self.get("/v1/stats")["switches"]),
                      "a fast path (without one the controller's log says why)")

    def _join(self, label: str, namespaces: Sequence[Namespace], addresses: Sequence[str]) -> None:
        for index, (namespace, address) in enumerate(zip(namespaces, addresses, strict=True), 1):
            self.lab.link(namespace, "eth0", self.middle, f"{label}{index}")
            self.lab.ip([f"addr add {address}/{PREFIX_LENGTH} dev eth0"], namespace)
            self.ovs.add_port(BRIDGE, f"{label}{index}")

    def wait(self, condition: Any, what: str, patience: float = READY_SECONDS) -> None:
        """Wait until a condition holds; BenchError if it does not in time."""
        try:
            processes.wait_until(condition, patience, what)
        except TimeoutError as error:
            raise BenchError(f"{error}: {tail(self.process.log_tail(), 3)}") from None

    def get(self, path: str) -> Any:
        """A REST call that has to succeed."""
        return _succeeded(self.rest.get, path)

    def post(self, path: str, body: Any) -> Any:
        """A REST call that has to succeed."""
        return _succeeded(self.rest.post, path, body)

    def patch(self, path: str, body: Any) -> Any:
        """A REST call that has to succeed."""
        return _succeeded(self.rest.patch, path, body)

    def server_agents(self, *options: str) -> list[Process]:
        """Start ``lbapp server-agent`` beside each server, for its web server."""
        return [self.lab.spawn(self.middle, f"server-agent-{namespace.name}", [
            self.process.command, "--token-file", str(self.process.state / "token"), "server-agent", "--name",
            namespace.name, "--netns", str(NAMED / namespace.name), "--listener", f"{address}:{WEB_PORT}", *options])
            for namespace, address in zip(self.servers, self.addresses, strict=True)]

    def rules(self) -> int:
        """How many OpenFlow rules the switch holds."""
        try:
            found = re.search(r"flow_count=(\d+)", self.ovs.ofctl("dump-aggregate", BRIDGE))
        except OvsError as error:
            raise BenchError(str(error)) from None
        if found is None:
            raise BenchError("ovs-ofctl dump-aggregate does not say how many rules there are")
        return int(found[1])

    def command(self, *arguments: str) -> list[str]:
        """A command line of ``lbapp`` that speaks to this controller, from inside the middle."""
        return self.middle.argv(self.process.argv[0], "--url", self.rest.base,
                                "--token-file", str(self.process.state / "token"), *arguments)

    def wait_answer(self, address: str, port: int) -> None:
        """Wait until a connection through the virtual server succeeds."""
        def answers() -> bool:
            try:
                self.clients[0].connect(address, port, 1.0).close()
            except OSError:
                return False
            return True
        self.wait(answers, f"an answer on {address}:{port}")


def _succeeded(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (RestError, httpx.HTTPError) as error:
        raise BenchError(str(error)) from None


class Lbapp(Target):
    """lbapp with one of its ways to treat a new connection.

    Args:
        name: the target's name.
        algorithm: of the pool.
        run: further options of ``lbapp run``.
        options: further fields of the virtual server.
    """

    def __init__(self, name: str, algorithm: str, run: Sequence[str] = (), **options: str) -> None:
        self.name = name
        self._algorithm = algorithm
        self._run = run
        self._options = options

    def virtual_server(self, name: str, port: int, addresses: Sequence[str]) -> dict[str, Any]:
        """The body of the REST call that adds a virtual server with its pool."""
        members = [{"address": address, "protocol_port": port} for address in addresses]
        return {"name": name, "vip_address": VIP, "protocol": "TCP", "protocol_port": port, **self._options,
                "pool": {"name": f"{name}-pool", "lb_algorithm": self._algorithm, "members": members}}

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        installation = Installation(lab, self._run)
        installation.post("/v1/virtual-servers", self.virtual_server("web", WEB_PORT, installation.addresses))
        installation.post("/v1/virtual-servers", self.virtual_server("bulk", BULK_PORT, installation.addresses[:1]))
        for port in (WEB_PORT, BULK_PORT):
            installation.wait_answer(VIP, port)
        time.sleep(0.5)
        return Site(tuple(Client(client, VIP) for client in installation.clients), installation.servers,
                    installation.controller, SETTLE_SECONDS)


class Spliced(Lbapp):
    """What clients say is read: the rules of ``haproxy-http``, then a second handshake with the member."""

    bulk = False  # iperf3 does not speak HTTP
    first_byte = True

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        installation = Installation(lab, self._run)
        members = [{"address": address, "protocol_port": WEB_PORT} for address in installation.addresses]
        for name in ("one", "two", "three"):
            installation.post("/v1/pools", {"name": name, "members": members})
        rules = {"one": ("PATH", "STARTS_WITH", "/one/", ""), "two": ("HOST_NAME", "EQUAL_TO", "two.example", ""),
                 "three": ("COOKIE", "EQUAL_TO", "yes", "third")}
        policies = [{"name": name, "action": "REDIRECT_TO_POOL", "redirect_pool": name, "rules": [
            {"type": kind, "compare_type": compare, "value": value, "key": key}]}
            for name, (kind, compare, value, key) in rules.items()]
        installation.post("/v1/virtual-servers", {**self.virtual_server("web", WEB_PORT, installation.addresses),
                                                  "application": "http", "l7_policies": policies})
        self.agents(installation)
        installation.wait_answer(VIP, WEB_PORT)
        time.sleep(0.5)
        return Site(tuple(Client(client, VIP) for client in installation.clients), installation.servers,
                    installation.controller, SETTLE_SECONDS)

    def agents(self, installation: Installation) -> None:
        """None beside the servers."""


class HandedOff(Spliced):
    """The same, and the servers' kernels adopt the connections: an ``lbapp server-agent`` for each."""

    def agents(self, installation: Installation) -> None:
        """Start them, and wait until they have announced themselves."""
        installation.server_agents()

        def all_announced() -> bool:
            agents = installation.rest.get("/v1/server-agents")["server_agents"]
            return sum(bool(agent["listeners"]) for agent in agents) == len(installation.servers)

        installation.wait(all_announced, "the agents beside the servers")


OURS: tuple[Target, ...] = (
    Lbapp("lbapp-switch", "WEIGHTED_ROUND_ROBIN", decision="switch"),
    Lbapp("lbapp-punted", "ROUND_ROBIN", ("--fastpath", "--queries", "openflow"), decision="controller"),
    Lbapp("lbapp-ovs", "ROUND_ROBIN", decision="controller"),
    Lbapp("lbapp-rules", "ROUND_ROBIN", state="rules"),
    Lbapp("lbapp-fastpath", "WEIGHTED_ROUND_ROBIN", ("--fastpath",), decision="switch"),
    Spliced("lbapp-splice", "ROUND_ROBIN", ("--fastpath",), binding="splice"),
    Spliced("lbapp-hybrid", "ROUND_ROBIN", ("--fastpath",), binding="hybrid"),
    HandedOff("lbapp-handoff", "ROUND_ROBIN", ("--fastpath",), binding="handoff"),
    Lbapp("lbapp-agent", "ROUND_ROBIN", ("--fastpath",), decision="controller"),
)
