# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The agent beside servers: ``lbapp server-agent``.

Owns the loop that tells the controller over REST what is adopted here, takes the keys of cookies from its answers, and
keeps the program on the interfaces. What the program does is in ``adopt.bpf.c``; whether a connection is handed over is
the controller's decision. Beside it, or alone, runs the loop that reports how loaded the servers are (``reporter.py``).

Nothing is ever announced whose cookies could not be told: at first, and after every failure (it may be another
controller by now, with other keys), it announces that it adopts nothing, and takes the keys from the answer. Without an
answer the keys stay: what is on its way is adopted still. The controller hands nothing over once the lease has ended.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import quote

from lbapp.client import ApiError, Client, ClientError
from lbapp.dataflow.fastpath.kernel import KernelError
from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.server_agent import adopt
from lbapp.server_agent.adopt import Adopter, AdoptError, Listener
from lbapp.server_agent.listening import heard, listening
from lbapp.server_agent.measure import Meter
from lbapp.server_agent.namespaces import Outside, inside
from lbapp.server_agent.reporter import Reporter, Reporting, beside
from lbapp.server_agent.sources import Sources

LOG = logging.getLogger("lbapp.server_agent")

INTERVAL_S = 3.0
LOOK_S = 0.5
"""How often who listens is looked at: no connection is to be handed to a server that has died."""
ANSWER_S = 2.0
"""An answer is waited for so long."""
GRACE_S = 0.5
"""After the controller was told that it is over: what has been handed over by then is still adopted."""
_KEY = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``lbapp server-agent`` was told.

    Attributes:
        name: by which the controller knows this agent.
        listeners: addresses and ports of servers here.
        ports: of servers at any address of this host.
        interfaces: where clients' packets come in; none: all that are up, but for loopback.
        namespace: the network namespace of the servers; None: this one.
        reporting: what is reported of their load.
    """

    name: str
    listeners: tuple[Listener, ...] = ()
    ports: tuple[int, ...] = ()
    interfaces: tuple[str, ...] = ()
    namespace: Path | None = None
    reporting: Reporting = field(default_factory=Reporting)

    @property
    def wanted(self) -> tuple[Listener, ...]:
        """What connections are adopted for."""
        return *self.listeners, *(Listener(None, port) for port in self.ports)

    def served(self, addresses: Callable[[], list[str]]) -> list[Listener]:
        """The addresses and ports of the servers here.

        Args:
            addresses: this host's.
        """
        own = addresses() if self.ports else []
        return list(dict.fromkeys([*self.listeners, *(
            Listener(address, port) for address in own for port in self.ports)]))

    def reported(self, addresses: Callable[[], list[str]]) -> list[tuple[str, int]]:
        """The same, as reports name them; where no server is named, whatever serves at this host's addresses."""
        served = [(one.address, one.port) for one in self.served(addresses) if one.address is not None]
        return served or [(address, 0) for address in addresses()]


class Lease(NamedTuple):
    """The controller's answer.

    Attributes:
        keys: two keys of cookies, or None.
        window_scale: what clients were offered.
        seconds: how long the announcement counts.
    """

    keys: tuple[bytes | None, bytes | None]
    window_scale: int
    seconds: float

    @classmethod
    def read(cls, answer: Any) -> Lease:
        """From JSON.

        Raises:
            ClientError: it is something else.
        """
        try:
            keys, scale, seconds = answer["cookie_keys"], answer["window_scale"], answer["lease_seconds"]
            one, two = (None if key is None else bytes.fromhex(_KEY.fullmatch(key)[0])  # type: ignore[index]
                        for key in keys)
            if type(scale) is not int or not 0 <= scale <= adopt.MAX_SCALE:
                raise ValueError(scale)
            if type(seconds) not in (int, float) or not seconds > 0:
                raise ValueError(seconds)
        except (KeyError, TypeError, ValueError):
            raise ClientError("the controller's answer holds no keys of cookies; is it an older one?") from None
        return cls((one, two), scale, float(seconds))


def own_addresses() -> list[str]:
    """The addresses at which others reach this host: neither loopback nor link-local.

    Raises:
        AdoptError: they cannot be had.
    """
    try:
        done = subprocess.run(["ip", "-json", "address", "show", "scope", "global", "up"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=5, check=True)
        found = [one["local"] for link in json.loads(done.stdout) for one in link.get("addr_info", ())
                 if "local" in one]  # what is left out of the list leaves an empty object
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise AdoptError(f"this host's addresses cannot be listed: {error}") from None
    return sorted(address for address in set(found) if not ipaddress.ip_address(address).is_loopback)


class ServerAgent:
    """The loop, step by step.

    Args:
        settings: what is adopted, and where.
        adopter: the loaded program.
        netlink: to the kernel, in the namespace of the servers.
        connect: makes a client of the controller, with the token as it is then.
        addresses: this host's.
        sysctl: the kernel's settings.
        outside: a block in which the controller can be reached.
        there: who listens.
    """

    def __init__(self, settings: Settings, adopter: Adopter, netlink: Netlink, connect: Callable[[], Client],
                 addresses: Callable[[], list[str]] = own_addresses, sysctl: Path = adopt.SYSCTL,
                 outside: Outside = contextlib.nullcontext,
                 there: Callable[[], Collection[tuple[str, int]]] = listening) -> None:
        self.settings, self._adopter, self._netlink = settings, adopter, netlink
        self._connect, self._addresses, self._sysctl = connect, addresses, sysctl
        self._outside, self._there = outside, there
        self._ports = frozenset(one.port for one in settings.wanted)
        self._heard: frozenset[tuple[str, int]] = frozenset()
        self._client: Client | None = None
        self._lease: Lease | None = None
        self._told: str | None = None
        self._attached: set[str] = set()
        self._refused = 0
        adopter.set_listeners(settings.wanted)

    def close(self) -> None:
        """Close the connection to the controller."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def step(self) -> float:
        """Keep in touch once; returns after how many seconds to do it again."""
        try:
            lacking = adopt.lacking(self._sysctl)
            if lacking:
                raise AdoptError("; ".join(lacking))
            if self._lease is None:
                self._announce([])
                self.attach()
            else:
                self.attach()
            self._heard = self._listening()
            lease = self._announce(heard(self.settings.served(self._addresses), self._heard))
        except (ClientError, AdoptError, KernelError, NetlinkError) as error:
            self._lease = None
            if isinstance(error, ApiError) and error.status == 401:
                self.close()  # there may be another token next time
            self._say(str(error))
            return INTERVAL_S
        self._say(None)
        self._look()
        return min(INTERVAL_S, lease.seconds / 3)

    def changed(self) -> bool:
        """Whether a server has come or gone since the last step: that is not to be kept for the next one."""
        try:
            return self._lease is not None and self._listening() != self._heard
        except AdoptError:
            return True  # the step says so

    def _listening(self) -> frozenset[tuple[str, int]]:
        try:
            return frozenset(one for one in self._there() if one[1] in self._ports)
        except OSError as error:
            raise AdoptError(f"it cannot be seen which servers listen: {error}") from None

    def withdraw(self) -> bool:
        """Tell the controller that nothing more is adopted here. False if it does not know."""
        try:
            self._call("DELETE", None)
        except ClientError as error:
            LOG.info("the controller could not be told: %s", error)
            return False
        return True

    def attach(self) -> None:
        """Put the program on the interfaces, on those that came since the last time too.

        Raises:
            AdoptError: there is no such interface, or the kernel refuses.
        """
        there = adopt.attached(self._netlink)
        wanted = adopt.interfaces(self._netlink.links().values(), self.settings.interfaces)
        attached = set()
        for link in wanted:
            if link.name not in self._attached or link.name not in there:
                if not adopt.attach(self._netlink, link, self._adopter.program):
                    continue
                LOG.info("connections are adopted at %s", link.name)
            attached.add(link.name)
        if wanted and not attached:
            raise AdoptError("no interface is left")
        self._attached = attached
        adopt.detach(self._netlink, keep=self._attached)

    def _announce(self, listeners: Collection[Listener]) -> Lease:
        lease = Lease.read(self._call("PUT", {"listeners": [one.document() for one in listeners]}))
        if self._lease is None or lease.keys != self._lease.keys:
            self._adopter.set_keys(lease.keys)
        self._adopter.set_window_scale(lease.window_scale)
        self._lease = lease
        return lease

    def _call(self, method: str, body: Any) -> Any:
        with self._outside():
            if self._client is None:
                self._client = self._connect()
            return self._client.call(method, f"/v1/server-agents/{quote(self.settings.name, safe='')}", body,
                                     seconds=ANSWER_S)

    def _say(self, failure: str | None) -> None:
        """What fails is said once, and once more when it changes or is over."""
        if failure == self._told:
            return
        if failure is not None:
            LOG.warning("no connections are handed to this host: %s", failure)
        elif self._told is not None:
            LOG.info("the controller hands connections to this host again")
        self._told = failure

    def _look(self) -> None:
        refused = self._adopter.counters()["refused"]
        if refused != self._refused:
            LOG.warning("the kernel refused %d connections: the listener may be one of MPTCP, which adopts none",
                        refused - self._refused)
            self._refused = refused


@contextlib.contextmanager
def claim() -> Iterator[None]:
    """Be the only agent of its kind in this network namespace. The name goes with the process, however it ends.

    Raises:
        AdoptError: there is one already.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        try:
            mark.bind("\0lbapp-server-agent")
        except OSError:
            raise AdoptError("another agent beside servers is at work here") from None
        yield


def remove(namespace: Path | None = None) -> list[str]:
    """Take the program off all interfaces of a network namespace where an agent left it.

    Raises:
        AdoptError: an agent is at work here, or the kernel refuses.
    """
    with inside(namespace), claim(), Netlink() as netlink:
        return adopt.detach(netlink)


def run(settings: Settings, connect: Callable[[], Client]) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        AdoptError: connections cannot be adopted here; the text says why.
    """
    stop = threading.Event()

    def stopping(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(inside(settings.namespace))
        reporting = settings.reporting
        sources = Sources(reporting.values, reporting.interval)
        reporter = Reporter(settings.name, reporting, lambda: settings.reported(own_addresses), connect,
                            Meter(reporting.of_servers), sources, outside)
        if reporting.only:
            stack.callback(reporter.close)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stopping)
            LOG.info("agent %s: this server's load is reported", settings.name)
            sources.start(stop)
            reporter.run(stop)
            reporter.withdraw()
            return
        lacking = adopt.lacking()
        if lacking:
            raise AdoptError("; ".join(lacking))
        stack.enter_context(claim())
        netlink = stack.enter_context(Netlink())
        adopt.interfaces(netlink.links().values(), settings.interfaces)  # a wrong name is said at once
        adopter = Adopter()
        stack.callback(adopter.close)
        agent = ServerAgent(settings, adopter, netlink, connect, outside=outside)
        stack.callback(agent.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stopping)
        try:
            LOG.info("agent %s: connections are adopted for %s", settings.name, ", ".join(
                f"{one.address or 'any address'} port {one.port}" for one in settings.wanted))
            with beside(reporter, sources):  # ends before the agent says that it is over
                while not stop.is_set():
                    again = time.monotonic() + agent.step()
                    while not stop.wait(LOOK_S) and time.monotonic() < again and not agent.changed():
                        pass
            if agent.withdraw():
                stop.clear()  # a second signal ends the pause
                stop.wait(GRACE_S)
        finally:
            adopt.detach(netlink)
            LOG.info("stopped: %s", ", ".join(f"{name} {value}" for name, value in adopter.counters().items()))
