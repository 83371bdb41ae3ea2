# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How loaded this server is, as its kernel tells: CPU, memory, load average, established connections.

Owns what a figure is the difference of. What cannot be measured is left out, never a made-up 0. Sockets are those of
the calling thread's network namespace; CPU and memory are the host's.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import psutil

from lbapp.server_agent.sockets import ESTABLISHED, LISTEN, tcp

LOG = logging.getLogger("lbapp.server_agent")

SHORTEST_S = 0.2
"""Two looks at the CPU closer together tell nothing."""
SEARCH_S = 30.0
"""The processes behind listening sockets are looked for so often."""
PROCESSES = Path("/proc")


class Sockets(NamedTuple):
    """What of the kernel's list concerns some servers.

    Attributes:
        established: connections to them.
        listening: inodes of their listening sockets.
    """

    established: int
    listening: frozenset[int]


def sockets(endpoints: Collection[tuple[str, int]]) -> Sockets:
    """The TCP sockets of servers at addresses and ports; port 0: all at that address that listen.

    Raises:
        OSError: they cannot be listed.
    """
    inodes: dict[tuple[bytes, int], int] = {}
    established: Counter[tuple[bytes, int]] = Counter()
    for one in tcp(LISTEN, ESTABLISHED):
        if one.state == LISTEN:
            inodes[one.address, one.port] = one.inode
        else:
            established[one.address, one.port] += 1
    wanted: set[tuple[bytes, int]] = set()
    for text, number in endpoints:
        for address in _packed(text):
            if number:
                wanted.add((address, number))
            else:
                wanted.update((address, port) for at, port in inodes if at in (address, *_ANY))
    ports = {port for _, port in wanted}
    return Sockets(sum(established[one] for one in wanted), frozenset(
        inode for one, inode in inodes.items() if one in wanted or (one[0] in _ANY and one[1] in ports)))


_ANY = (bytes(4), bytes(16))


def _packed(text: str) -> list[bytes]:
    """An address as sockets have it: those of IPv6 have IPv4 mapped."""
    packed = ipaddress.ip_address(text).packed
    return [packed, bytes(10) + b"\xff\xff" + packed] if len(packed) == 4 else [packed]


def owners(inodes: Collection[int], directory: Path = PROCESSES) -> frozenset[int]:
    """The processes that hold sockets; those of other users only for root."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for pid in psutil.pids() if wanted else ():
        try:
            with os.scandir(directory / str(pid) / "fd") as descriptors:
                if any(_link(Path(one.path)) in wanted for one in descriptors):
                    found.add(pid)
        except OSError:
            continue  # it ended, or is somebody else's
    return frozenset(found)


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


class Meter:
    """Measures, step by step.

    Args:
        of_servers: whether ``cpu`` is that of the processes that listen, instead of the whole host's.
    """

    def __init__(self, of_servers: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_servers, self._clock = of_servers, clock
        self._cores = psutil.cpu_count() or 1
        self._host: tuple[float, float] | None = None
        self._processes: dict[int, tuple[float, float]] = {}
        self._pids: frozenset[int] = frozenset()
        self._searched = self._looked = float("-inf")
        self._told: set[str] = set()
        if not of_servers:
            self._host = self._times()

    def measure(self, endpoints: Collection[tuple[str, int]]) -> dict[str, float]:
        """The values by name, as far as they can be had.

        Args:
            endpoints: addresses and ports of the servers here; port 0: all at that address.
        """
        values: dict[str, float] = {"cores": float(self._cores)}
        self._try("memory", self._memory, values)
        self._try("load", lambda: {"load": os.getloadavg()[0] / self._cores}, values)
        found: Sockets | None = None
        try:
            found = sockets(endpoints)
            values["clients"] = float(found.established)
        except (OSError, ValueError) as error:
            self._say("clients", error)
        if not self._of_servers:
            self._try("cpu", self._cpu, values)
        elif found is not None:
            inodes = found.listening
            self._try("cpu", lambda: self._cpu_of(inodes), values)
        return values

    def _try(self, name: str, how: Callable[[], dict[str, float]], values: dict[str, float]) -> None:
        try:
            values.update(how())
        except (OSError, ValueError, psutil.Error) as error:
            self._say(name, error)

    def _say(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            LOG.warning("%s cannot be measured: %s", name, error)

    @staticmethod
    def _memory() -> dict[str, float]:
        memory = psutil.virtual_memory()
        if not memory.total:
            return {}
        used = 1.0 - memory.available / memory.total
        return {"memory": min(max(used, 0.0), 1.0), "memory_available": float(memory.available)}

    @staticmethod
    def _times() -> tuple[float, float]:
        """Seconds that the host's CPUs were busy, and all."""
        times = psutil.cpu_times()
        every = [times.user, times.nice, times.system, times.idle, times.iowait, times.irq, times.softirq, times.steal]
        total = sum(every)
        return total - times.idle - times.iowait, total

    def _cpu(self) -> dict[str, float]:
        busy, total = self._times()
        before = self._host
        if before is not None and total - before[1] < SHORTEST_S * self._cores:
            return {}
        self._host = busy, total
        if before is None:
            return {}
        return {"cpu": min(max((busy - before[0]) / (total - before[1]), 0.0), 1.0)}

    def _cpu_of(self, inodes: Collection[int]) -> dict[str, float]:
        """Of the processes that listen: their share of all cores."""
        now = self._clock()
        if now - self._looked < SHORTEST_S:
            return {}
        if now - self._searched >= SEARCH_S or not self._pids:
            self._searched, self._pids = now, owners(inodes)
            if not self._pids:
                raise ValueError("no process is found that listens there; those of other users only root finds")
        times: dict[int, tuple[float, float]] = {}
        for pid in self._pids:
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    spent = process.cpu_times()
                    times[pid] = process.create_time(), spent.user + spent.system
            except psutil.Error:
                self._searched = float("-inf")  # it ended: another one may be in its place
        before, passed = self._processes, now - self._looked
        self._processes, self._looked = times, now
        known = [pid for pid, (born, _) in times.items() if pid in before and before[pid][0] == born]
        if not known:
            return {}
        spent_all = sum(times[pid][1] - before[pid][1] for pid in known)
        return {"cpu": min(max(spent_all / passed / self._cores, 0.0), 1.0)}
