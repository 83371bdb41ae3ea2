# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Very many connections in the fast path, and what fast path and controller use while nothing happens.

``fastpath`` fills the table by packets, as clients would, and then sees real connections through the same table.
``idle`` looks at processes that have nothing to do. Both return plain figures for the ``scale`` part of
``latest.json``.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.dialogue import Dialogue
from bench.lab import BenchError, Lab, Namespace
from bench.lbapp_targets import BRIDGE, Installation, Lbapp
from bench.load import WEB_PORT, Client, Site, new_connections
from bench.machine import PROC, TICKS, wait_until_quiet
from bench.targets import VIP
from lbapp.dataflow.fastpath import build
from lbapp.dataflow.fastpath.tables import Tables
from lbapp.dataflow.pipeline import VIRTUAL_MAC

GENERATED = "172.16.0.0/12"
"""Where the clients of the generator come from. The servers have no way back, so they stay silent."""
FIRST = 172 << 24 | 16 << 16
APART = 1 << 16
HELD_PORT = 7000
REAL = 1000
"""Connections with sockets at both ends, held while the table fills."""
SPARE = 300_000
"""So much more than what is held fits: a measured connection stays in the table for some seconds after its end."""
RATE_SECONDS = 3
SWEEPS = 5
FREED_SECONDS = 3.0
"""The kernel frees much a moment later."""
WATCHED_SECONDS = 20.0
PINS = Path("/sys/fs/bpf/lbapp")
MEMORY = ("Slab", "Percpu", "VmallocUsed")
_HERE = Path(__file__).resolve().parent

Progress = Callable[[str], None]


# ---------------------------------------------------------------------- what the kernel says


def parse_memory(text: str) -> int:
    """Bytes the kernel uses for its own objects, from the text of /proc/meminfo."""
    found = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return sum(found[name] for name in MEMORY) * 1024


def _memory() -> int:
    return parse_memory((PROC / "meminfo").read_text())


def parse_memlock(text: str) -> int | None:
    """Bytes of a map, from the text of /proc/PID/fdinfo/FD; None if it is no map."""
    found = re.search(r"^memlock:\s+(\d+)$", text, re.MULTILINE)
    return int(found[1]) if found and re.search(r"^map_type:", text, re.MULTILINE) else None


def _maps(pid: int) -> int:
    """Bytes of all maps that a process has open, each counted once, as the kernel reckons them."""
    seen: dict[str, int] = {}
    for path in (PROC / str(pid) / "fdinfo").iterdir():
        try:
            text = path.read_text()
        except OSError:
            continue  # closed meanwhile
        size, number = parse_memlock(text), re.search(r"^map_id:\s+(\d+)$", text, re.MULTILINE)
        if size is not None and number is not None:
            seen[number[1]] = size
    return sum(seen.values())


def with_children(stat: str) -> float:
    """CPU seconds of a process and of the children it has waited for, from the text of /proc/PID/stat."""
    fields = stat[stat.rindex(")") + 2:].split()
    return sum(map(int, fields[11:15])) / TICKS


def _cpu(pid: int) -> float:
    return with_children((PROC / str(pid) / "stat").read_text())


def _percent(pids: Sequence[int], seconds: float) -> list[float]:
    """The share of one core that processes, each with its children, use during some seconds."""
    wait_until_quiet(5.0)
    before, since = [_cpu(pid) for pid in pids], time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - since
    return [100 * (_cpu(pid) - was) / elapsed for pid, was in zip(pids, before, strict=True)]


# ---------------------------------------------------------------------- the table


class _Generator:
    """The generators in all clients' namespaces."""

    def __init__(self, clients: Sequence[Namespace], count: int, stack: ExitStack) -> None:
        self._count = count
        self._running = []
        for index, client in enumerate(clients):
            share = count // len(clients) + (index < count % len(clients))
            first = FIRST + index * APART
            self._running.append(stack.enter_context(Dialogue(client.argv(
                sys.executable, "-S", "-E", str(_HERE / "packets.py"), "eth0", VIRTUAL_MAC.hex(":"), VIP, str(WEB_PORT),
                ".".join(map(str, first.to_bytes(4, "big"))), str(share)))))

    def send(self, what: str) -> None:
        """A packet of every client."""
        for one in self._running:
            one.ask(what)
        sent = sum(one.answer()["sent"] for one in self._running)
        if sent != self._count:
            raise BenchError(f"the generator sent {sent} packets instead of {self._count}")


def _fast(installation: Installation) -> dict[str, Any]:
    """What the controller tells of the fast path."""
    found = [switch["fastpath"] for switch in installation.get("/v1/stats")["switches"]]
    if not found or found[0] is None:
        raise BenchError("the switch has no fast path (the controller's log says why)")
    fast: dict[str, Any] = found[0]
    return fast


def _arrived(servers: Sequence[Namespace]) -> int:
    """Frames that reached the servers."""
    def read() -> int:
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == "eth0":
                return int(rest.split()[1])
        raise BenchError("a server has no eth0")
    return sum(server.call(read) for server in servers)


@contextmanager
def _table(installation: Installation) -> Iterator[Tables]:
    """The table that the controller's agent looks after, once more, to sweep it by the clock."""
    identifier = installation.ovs.vsctl("get", "bridge", BRIDGE, "datapath_id").strip().strip('"')
    pins = list(PINS.glob(f"{identifier}*"))
    if len(pins) != 1:
        raise BenchError(f"{PINS} holds {len(pins)} tables of {BRIDGE}, expected one")
    tables = Tables(build.OBJECT, pins[0], mac=VIRTUAL_MAC)
    try:
        yield tables
    finally:
        tables.close(keep=True)


def _sweep_ms(tables: Tables) -> float:
    took = []
    for _ in range(SWEEPS):
        since = time.monotonic()
        tables.sweep()
        took.append(1000 * (time.monotonic() - since))
    return statistics.median(took)


def _rate(lab: Lab, installation: Installation) -> float:
    site = Site(tuple(Client(client, VIP) for client in installation.clients), installation.servers)
    return new_connections(lab, site, RATE_SECONDS)[0].per_second


def _served(lab: Lab, count: int) -> Installation:
    """A fast path with room for so many connections and some more, and two virtual servers that it decides."""
    installation = Installation(lab, ("--fastpath", "--max-connections", str(count + SPARE)))
    for server in installation.servers:
        lab.ip([f"route add blackhole {GENERATED}"], server)
        lab.spawn(server, f"holder-{server.name}", [sys.executable, str(_HERE / "holder.py"), "serve", str(HELD_PORT)])
    target = Lbapp("fastpath", "WEIGHTED_ROUND_ROBIN", decision="switch")
    for name, port in (("web", WEB_PORT), ("held", HELD_PORT)):
        installation.post("/v1/virtual-servers", target.virtual_server(name, port, installation.addresses))
        installation.wait_answer(VIP, port)
    _fast(installation)
    return installation


def fastpath(count: int, progress: Progress) -> dict[str, float]:
    """Fill the fast path with ``count`` connections, and use it while it holds them.

    A connection counts as held if it is in the table and, when all are, a packet of it comes out at a server.

    Returns:
        how many are held, their memory, what a sweep of them takes, new connections/s beside them.
    """
    result: dict[str, float] = {"fast_connections": count}
    with Lab() as lab:
        progress("new connections, nothing held")
        installation = _served(lab, count)
        with _table(installation) as tables:
            result["fast_sweep_empty_ms"] = _sweep_ms(tables)
        result["fast_rate_empty"] = _rate(lab, installation)
    # Another one for the rest: what that load left in the kernel's caches would blur its memory.
    with Lab() as lab, ExitStack() as stack:
        progress("starting")
        installation = _served(lab, count)
        pid = installation.controller.pid
        tables = stack.enter_context(_table(installation))
        real = stack.enter_context(Dialogue(installation.clients[0].argv(
            sys.executable, str(_HERE / "holder.py"), "hold", VIP, str(HELD_PORT), str(REAL))))
        result["fast_real_opened"] = real.answer()["held"]
        time.sleep(FREED_SECONDS)
        empty, fixed = _memory(), _maps(pid)

        progress(f"{count} connections")
        generator = _Generator(installation.clients, count, stack)
        since = time.monotonic()
        generator.send("syn")
        generator.send("ack")
        result["fast_fill_seconds"] = time.monotonic() - since
        time.sleep(FREED_SECONDS)
        result |= {"fast_table_bytes": _maps(pid), "fast_kernel_bytes": _memory() - empty + fixed,
                   "fast_sweep_ms": _sweep_ms(tables)}
        result["fast_bytes_per_connection"] = result["fast_kernel_bytes"] / max(1, tables.sweep().live)

        progress("new connections beside them")
        result["fast_rate_full"] = _rate(lab, installation)
        progress("a packet of every connection")
        hits, arrived = _fast(installation)["hits"], _arrived(installation.servers)
        generator.send("ack")
        came = min(_fast(installation)["hits"] - hits, _arrived(installation.servers) - arrived, count)
        real.ask("check")
        alive = real.answer()["alive"]
        progress("nothing happens, all are held")
        result["fast_full_cpu_percent"], = _percent([pid], WATCHED_SECONDS)
        result |= {"fast_connections_held": max(0, min(came, tables.sweep().live - alive)), "fast_real_alive": alive}
    return {**result, "fast_rate_share": result["fast_rate_full"] / result["fast_rate_empty"]}


# ---------------------------------------------------------------------- nothing to do


def _configured(lab: Lab, options: Sequence[str] = ()) -> Installation:
    installation = Installation(lab, options)
    target = Lbapp("idle", "WEIGHTED_ROUND_ROBIN", decision="switch")
    installation.post("/v1/virtual-servers", target.virtual_server("web", WEB_PORT, installation.addresses))
    installation.wait_answer(VIP, WEB_PORT)
    return installation


def idle(seconds: int, progress: Progress) -> dict[str, float]:
    """CPU that controller and agent use while nothing happens, as a share of one core, with all they start.

    Returns:
        the controller's without a fast path and with one in its own process; the agent's beside the switch, and the
        controller's that it is connected to.
    """
    result: dict[str, float] = {}
    for name, options in (("idle_controller_percent", ()), ("idle_fastpath_percent", ("--fastpath",))):
        with Lab() as lab:
            progress(" ".join(("lbapp run", *options)))
            installation = _configured(lab, options)
            if options:
                _fast(installation)
            result[name], = _percent([installation.controller.pid], seconds)
    with Lab() as lab:
        progress("lbapp agent, and lbapp run connected to it")
        key = lab.directory / "bus.key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        installation = _configured(lab, ("--agent", "127.0.0.1:6654", "--bus-key", str(key)))
        agent = lab.spawn(installation.middle, "agent", [
            installation.process.argv[0], "agent", "--bridge", BRIDGE, "--key", str(key)],
            env=installation.ovs.environment)
        def connected() -> bool:
            agent.check()
            return installation.get("/v1/stats")["switches"][0]["fastpath"] is not None
        try:
            installation.wait(connected, "the agent connected to the controller")
            result["idle_agent_percent"], result["idle_with_agent_percent"] = _percent(
                [agent.pid, installation.controller.pid], seconds)
        finally:
            agent.stop()  # it gives the ports back, so the switch has to live
            _remove(installation)
    return result


def _remove(installation: Installation) -> None:
    subprocess.run(installation.middle.argv(installation.process.argv[0], "agent", "--bridge", BRIDGE, "--remove",
                                            "--log-level", "WARNING"),
                   env={**os.environ, **installation.ovs.environment}, check=False, capture_output=True, timeout=20)


FASTPATH: dict[str, str] = {
    "fast_connections": "connections, fast path",
    "fast_connections_held": "of these held: in the table, and a packet passes",
    "fast_real_opened": "beside them, with sockets: opened",
    "fast_real_alive": "of these alive, a byte both ways",
    "fast_fill_seconds": "time to open them, s",
    "fast_kernel_bytes": "kernel memory, all maps and connections, bytes",
    "fast_table_bytes": "as the maps themselves report it, bytes",
    "fast_bytes_per_connection": "kernel memory, bytes/connection",
    "fast_sweep_empty_ms": "a sweep of the empty table, ms",
    "fast_sweep_ms": "a sweep of the full table, ms",
    "fast_full_cpu_percent": "controller with the full table, % of a core",
    "fast_rate_empty": "new connections/s, empty table",
    "fast_rate_full": "new connections/s, full table",
    "fast_rate_share": "full by empty",
}
IDLE: dict[str, str] = {
    "idle_controller_percent": "lbapp run, % of a core",
    "idle_fastpath_percent": "lbapp run --fastpath, % of a core",
    "idle_agent_percent": "lbapp agent, % of a core",
    "idle_with_agent_percent": "lbapp run with that agent, % of a core",
}
