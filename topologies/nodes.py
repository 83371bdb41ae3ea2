# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the topologies are made of: the switch as the load balancer wants it, and hosts with both families.

Loaded by the interpreter of ``mn`` as well: standard library, Mininet and lbapp.dataflow.ovs only.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, ClassVar

from mininet.log import error, warn
from mininet.node import Host, OVSSwitch
from mininet.topo import Topo

from lbapp.dataflow.ovs import Ovs, OvsError

AGENT_PORT = 6653
"""An agent listens at this port and the number of its switch, unless told otherwise."""
DEFAULT_TARGET = "tcp:127.0.0.1:6653"


class LoadBalancerSwitch(OVSSwitch):
    """Open vSwitch on the userspace datapath, with segmentation offload, secure, with our queues and timers.

    A link whose switch end has the parameter ``tag`` becomes an access port of that VLAN.

    Args:
        name: such as ``s1``; the datapath id is the number in it.
        ovs: the instance to use; by default the system's, which is started if need be.
        target: the OpenFlow target where Mininet knows no controller; empty for none.
        bus_key: with it, an agent (``lbapp agent``) puts a fast path in front of the switch: the file with the key
            that it shares with its controllers.
        agent: where the agent listens.
    """

    def __init__(self, name: str, ovs: Ovs | None = None, target: str = DEFAULT_TARGET, bus_key: str | Path = "",
                 agent: str = "", **params: Any) -> None:
        params.update(datapath="user", failMode="secure", batch=False)
        super().__init__(name, **params)
        self.ovs = ovs if ovs is not None else Ovs()
        self.target = target
        self.bus_key = bus_key
        self.agent = agent or f"127.0.0.1:{AGENT_PORT + int(self.dpid, 16) % 1000}"
        self._agent: subprocess.Popen[Any] | None = None

    @classmethod
    def setup(cls) -> None:
        """Mininet calls this before it makes switches; the instance is known only afterwards."""

    def start(self, controllers: list[Any]) -> None:
        """Make the bridge, its ports, and point it at its controller."""
        targets = [f"{c.protocol}:{c.IP()}:{c.port}" for c in controllers] or [self.target]
        try:
            self.ovs.ensure_running()
            self.ovs.delete_bridge(self.name)
            self.ovs.add_bridge(self.name, targets[0] or None, datapath_id=int(self.dpid, 16))
            for interface in self.intfList():
                if self.ports[interface] and not interface.IP():
                    self.attach(interface)
            if self.bus_key:
                self._start_agent()
        except OvsError as problem:
            error(f"{self.name}: {problem}\n")
            raise SystemExit(1) from None

    def _start_agent(self) -> None:
        """Start the agent. It comes up by itself; without eBPF it says so and ends, and the switch does it all."""
        environment = {**os.environ, **self.ovs.environment}
        command = [_lbapp(), "agent", "--bridge", self.name, "--listen", self.agent, "--key", str(self.bus_key)]
        log = Path(self.bus_key).with_name(f"agent-{self.name}.log")
        with log.open("ab") as output:
            self._agent = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def _stop_agent(self) -> None:
        """End the agent, which takes the fast path down; what one that was killed has left goes as well."""
        if self._agent is None:
            return
        self._agent.terminate()
        try:
            self._agent.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        subprocess.run([_lbapp(), "agent", "--bridge", self.name, "--remove"], check=False, capture_output=True,
                       env={**os.environ, **self.ovs.environment})
        self._agent = None

    def attach(self, intf: Any) -> None:
        """Make an interface a port of the bridge."""
        intf.ifconfig("up")
        self.ovs.add_port(self.name, str(intf), self.ports.get(intf), intf.params.get("tag"))

    def detach(self, intf: Any) -> None:
        """Take an interface off the bridge."""
        self.ovs.delete_port(self.name, str(intf))

    def connected(self) -> bool:
        """Whether a controller is on the line."""
        return self.ovs.connected(self.name)

    def dpctl(self, *args: str) -> str:
        """``ovs-ofctl`` for Mininet's ``dpctl`` command."""
        try:
            return self.ovs.ofctl(args[0], self.name, *args[1:])
        except OvsError as problem:
            return f"{problem}\n"

    def stop(self, deleteIntfs: bool = True) -> None:
        """Delete the bridge; the daemons belong to who started them."""
        self._stop_agent()
        try:
            self.ovs.delete_bridge(self.name)
        except OvsError as problem:
            warn(f"{self.name}: {problem}\n")
        if deleteIntfs:
            self.deleteIntfs()

    # Mininet would start and stop all switches in one ovs-vsctl of its own, for the system's instance.

    @classmethod
    def batchStartup(cls, switches: list[Any], run: Any = None) -> list[Any]:
        """Nothing is left to do after :meth:`start`."""
        return switches

    @classmethod
    def batchShutdown(cls, switches: list[Any], run: Any = None) -> list[Any]:
        """None is stopped here: Mininet then calls :meth:`stop` for each."""
        return []


class DualStackHost(Host):
    """A host with an IPv4 and an IPv6 address, and default routes of both families.

    Params beyond Mininet's: ``ip6`` (address/length), ``gateway`` and ``gateway6`` (addresses).
    """

    def config(self, ip6: str | None = None, gateway: str | None = None, gateway6: str | None = None,
               **params: Any) -> Any:
        """Configure the default interface; Mininet calls this once the links are there."""
        result = super().config(**params)
        interface = self.defaultIntf()
        if interface is None:
            return result
        if ip6:
            # Without nodad the address cannot be used for a second.
            self.cmd(f"ip -6 addr add {ip6} dev {interface} nodad")
        if gateway:
            self.cmd(f"ip route replace default via {gateway}")
        if gateway6:
            self.cmd(f"ip -6 route replace default via {gateway6} dev {interface}")
        return result

    def set_offload(self, enabled: bool) -> None:
        """Switch checksum and segmentation offload; the userspace datapath without TSO needs it off."""
        for interface in self.intfList():
            if interface.name != "lo":
                self.cmd(f"ethtool -K {interface} tx {'on' if enabled else 'off'}")


class LoadBalancerTopo(Topo):
    """What the three topologies share: names, addresses and ports of their hosts.

    Clients are ``c1, c2, ...``, servers ``s1, s2, ...``, switches ``lb1, lb2, ...``. Host ``n`` of a
    network has the address ``first + n`` there, and in IPv6 the same digits.
    """

    VIP: ClassVar[str]
    VIP6: ClassVar[str]
    SITE: ClassVar[Path]
    MOST = 40

    def add_hosts(self, switch: str, prefix: str, count: int, network: str, network6: str, first: int,
                  gateway: int | None = None, tag: int | None = None) -> None:
        """Add hosts of one network to a switch, at its next free ports.

        Args:
            switch: the switch.
            prefix: of their names.
            count: how many.
            network: the first three numbers of their IPv4 addresses, such as ``10.0.0``.
            network6: their /64, such as ``fd00:``.
            first: see the class.
            gateway: last part of the gateway's addresses in both families; None for no gateway.
            tag: VLAN that keeps the network apart on the switch.
        """
        if not 0 <= int(count) <= self.MOST:
            raise ValueError(f"expected 0 to {self.MOST} hosts, got {count}")
        for index in range(1, int(count) + 1):
            last = first + index
            options: dict[str, Any] = {"ip": f"{network}.{last}/24", "ip6": f"{network6}:{last}/64",
                                       "mac": _mac(f"{network}.{last}")}
            if gateway is not None:
                options.update(gateway=f"{network}.{gateway}", gateway6=f"{network6}:{gateway}")
            host = self.addHost(f"{prefix}{index}", cls=DualStackHost, **options)
            self.addLink(host, switch, port1=0, params2={} if tag is None else {"tag": tag})

    def add_switch(self, number: int, bus_key: str = "") -> str:
        """Add the switch ``lbNUMBER``; with a fast path where there is a key for its agent."""
        return self.addSwitch(f"lb{number}", cls=LoadBalancerSwitch, dpid=f"{number:x}", bus_key=bus_key)


def _lbapp() -> str:
    """The command: the one of this project's virtual environment, whoever's interpreter this is."""
    own = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "lbapp"
    return str(own) if own.exists() else "lbapp"


def _mac(address: str) -> str:
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
