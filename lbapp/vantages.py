# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""From where members are checked: the balancer's own address in their network, or this host as it is.

Owns one process of checks for each such place. A network with a ``monitor_address`` has its members checked from that
address, at a port of a bridge of this host: the way there is the one that clients' packets take. All others are checked
over this host's own interfaces. Members whose place is not there yet (no bridge has connected) are not checked, so
nobody takes them for dead. Never looks at what is found.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from lbapp.config.model import Network
from lbapp.monitors.supervisor import Changed, Monitors, Statistics, Target

LOG = logging.getLogger("lbapp.health")

OnChanged = Callable[[list[Changed]], None]
OnLatencies = Callable[[list[tuple[str, float]]], None]


class Spot(Protocol):
    """A network namespace with the balancer's addresses in it."""

    @property
    def netns(self) -> Path:
        """Its file."""
        ...

    def remove(self) -> None:
        """Take it down."""
        ...


class Wanted(NamedTuple):
    """What a place must be like: addresses with their prefix lengths, and the routers of their networks."""

    bridge: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]


class Vantages:
    """All places.

    Args:
        on_changed, on_latencies, scripts: see :class:`lbapp.monitors.supervisor.Monitors`.
        spot: makes a place, or takes one over that is there.
        monitors: makes a process of checks.
    """

    def __init__(self, on_changed: OnChanged, on_latencies: OnLatencies, scripts: Path | None,
                 spot: Callable[[Wanted], Spot], monitors: Callable[..., Monitors] = Monitors) -> None:
        self._calls = (on_changed, on_latencies, scripts)
        self._make_spot, self._make = spot, monitors
        self._own = monitors(*self._calls, None)
        self._inside: Monitors | None = None
        self._spot: Spot | None = None
        self._there: Wanted | None = None
        self._targets: Mapping[str, Target] = {}
        self._networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, Network]] = []
        self._bridge: str | None = None
        self._lock = threading.RLock()
        self._closed = False

    def configure(self, networks: Iterable[Network], targets: Mapping[str, Target]) -> None:
        """Take the networks over, and who is to be checked (:meth:`lbapp.monitors.supervisor.Monitors.update`)."""
        with self._lock:
            self._networks = [(ipaddress.ip_network(one.cidr), one) for one in networks
                              if one.monitor_address is not None]
            self._targets = targets
            self._arrange()

    def attach(self, bridge: str) -> None:
        """A bridge of this host is there. The first one is where the places are, for as long as this runs."""
        with self._lock:
            self._bridge = self._bridge or bridge
            self._arrange()

    def statistics(self) -> list[tuple[tuple[str, ...], Statistics]]:
        """What the processes that check say of themselves, each with the addresses that it checks from (none: the
        controller's own network)."""
        inside, there = self._inside, self._there
        found: list[tuple[tuple[str, ...], Statistics | None]] = [((), self._own.statistics)]
        if inside is not None and there is not None:
            found.append((there.addresses, inside.statistics))
        return [(addresses, said) for addresses, said in found if said is not None]

    def close(self) -> None:
        """End all checks and take down what was made."""
        with self._lock:
            self._closed = True
            self._own.close()
            self._leave()

    # -------------------------------------------------------------- places

    def _wanted(self) -> Wanted | None:
        if self._bridge is None or not self._networks:
            return None
        return Wanted(self._bridge,
                      tuple(sorted(f"{one.monitor_address}/{network.prefixlen}" for network, one in self._networks)),
                      tuple(sorted(one.gateway for _, one in self._networks if one.gateway is not None)))

    def _arrange(self) -> None:
        wanted = self._wanted()
        if not self._closed and wanted != self._there:
            self._leave()
            if wanted is not None:
                self._settle(wanted)
        self._tell()

    def _settle(self, wanted: Wanted) -> None:
        try:
            self._spot = self._make_spot(wanted)
        except Exception as error:
            # Whatever it is: its members go on being used unchecked, people are told, and the next change tries again.
            LOG.error("members cannot be checked from %s at bridge %s: %s", ", ".join(wanted.addresses),
                      wanted.bridge, error)
            return
        self._there = wanted
        self._inside = self._make(*self._calls, self._spot.netns)

    def _leave(self) -> None:
        if self._inside is not None:
            self._inside.close()
        if self._spot is not None:
            try:
                self._spot.remove()
            except Exception as error:
                LOG.warning("what checks of members had at bridge %s is left there: %s",
                            self._there.bridge if self._there else "", error)
        self._inside = self._spot = self._there = None

    def _tell(self) -> None:
        own: dict[str, Target] = {}
        inside: dict[str, Target] = {}
        for key, target in self._targets.items():
            (inside if self._covered(target) else own)[key] = target
        self._own.update(own)
        if self._inside is not None:
            self._inside.update(inside)

    def _covered(self, target: Target) -> bool:
        if not self._networks:
            return False
        address = ipaddress.ip_address(target.address)
        return any(address in network for network, _ in self._networks)
