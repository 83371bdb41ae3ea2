# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The load: what wrk, iperf3 and the prober are asked to do, and how their output is read.

Every figure comes from here and is computed the same way for every target. It knows a
:class:`Site` (clients and where they connect), not what stands between clients and servers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bench.lab import BenchError, Lab, Namespace

WEB_PORT = 80
BULK_PORT = 5201
SMALL, SMALL_BYTES = "/small", 128
BIG, BIG_BYTES = "/big", 100_000_000
CONNECTIONS = 64
PROBE_INTERVAL_MS = 4
FIRST_BYTE_PER_SECOND = 800
"""New connections while the first byte is timed: of all clients together, well below what the slowest target can do."""
BAD_SHARE = 0.01
"""More failed requests than this share of all, and the figure is not one."""

_HERE = Path(__file__).resolve().parent


class Messages(NamedTuple):
    """Messages between switch and controller since its start.

    ``total``, ``flow_mods`` and ``packet_ins`` are OpenFlow's. ``closed`` connections were told of over the message
    bus, in ``closed_messages``. ``asking`` are all messages to the control segment, whoever carries them: packet-ins,
    flow-removed, questions one by one, and those of closed connections. ``packets`` of connections are as many as a
    controller would be asked about that decides for each packet.
    """

    total: int
    flow_mods: int
    packet_ins: int
    closed: int = 0
    closed_messages: int = 0
    asking: int = 0
    packets: int = 0


class Controller(Protocol):
    """What can be asked about a controller while it works."""

    def cpu_seconds(self) -> float:
        """User and system time its process has used."""

    def rss_bytes(self) -> int:
        """Resident memory of its process."""

    def messages(self) -> Messages:
        """OpenFlow messages so far."""


@dataclass(frozen=True)
class Client:
    """A host that makes connections, and the address it connects to."""

    namespace: Namespace
    service: str


@dataclass(frozen=True)
class Site:
    """A target that is up: clients in front, servers behind, perhaps a controller."""

    clients: tuple[Client, ...]
    servers: tuple[Namespace, ...]
    controller: Controller | None = None
    settle_seconds: float = 0.5


@dataclass(frozen=True)
class WrkResult:
    """One or several wrk runs side by side, added up."""

    per_second: float
    bytes_per_second: float
    requests: int
    errors: int
    histogram: dict[int, int] = field(default_factory=dict)
    """Microseconds from writing the request to the whole answer -> how many."""

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the requests' latency (without the handshake), in milliseconds."""
        return histogram_percentile(self.histogram, percent) / 1000


def histogram_percentile(histogram: dict[int, int], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the entries do not exceed."""
    total = sum(histogram.values())
    if not total:
        raise BenchError("nothing was answered")
    seen = 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen * 100 >= total * percent:
            return value
    raise AssertionError("unreachable: the last value covers all entries")


def percentile(values: Sequence[float], percent: float) -> float:
    """The same of a plain sequence."""
    counts: dict[float, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return histogram_percentile(counts, percent)  # type: ignore[arg-type]


def parse_wrk(outputs: Sequence[str]) -> WrkResult:
    """Add up what ``wrk.lua`` printed in each of several runs side by side."""
    rate = volume = 0.0
    requests = errors = 0
    histogram: dict[int, int] = {}
    for output in outputs:
        found = False
        for line in output.splitlines():
            words = line.split()
            if words[:1] == ["result"] and len(words) == 9:
                found = True
                microseconds, done, read, *failed = (int(word) for word in words[1:])
                rate += done * 1e6 / microseconds
                volume += read * 1e6 / microseconds
                requests += done
                errors += sum(failed)
            elif words[:1] == ["bucket"]:
                value, count = int(words[1]), int(words[2])
                histogram[value] = histogram.get(value, 0) + count
        if not found:
            raise BenchError("wrk printed no result")
    return WrkResult(rate, volume, requests, errors, histogram)


def parse_iperf(output: str) -> float:
    """Gbit/s that arrived, from ``iperf3 -J``."""
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        raise BenchError("iperf3 printed no result") from None
    if "error" in result:
        raise BenchError(f"iperf3: {result['error']}")
    try:
        bits = float(result["end"]["sum_received"]["bits_per_second"])
    except KeyError:
        raise BenchError("iperf3's result is incomplete") from None
    if bits <= 0:
        raise BenchError("iperf3: nothing arrived")
    return bits / 1e9


def _wrk(client: Client, path: str, connections: int, seconds: int, close: bool) -> list[str]:
    header = ["-H", "Connection: close"] if close else []
    return client.namespace.argv(
        "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(_HERE / "wrk.lua"), *header,
        f"http://{client.service}:{WEB_PORT}{path}")


def _checked(result: WrkResult, what: str) -> WrkResult:
    if not result.requests:
        raise BenchError(f"{what}: nothing was answered")
    if result.errors > BAD_SHARE * result.requests:
        raise BenchError(f"{what}: {result.errors} of {result.requests + result.errors} requests failed")
    return result


def check(lab: Lab, site: Site) -> None:
    """Fetch the small object once through every client and look at every byte of it."""
    for client in site.clients:
        url = f"http://{client.service}:{WEB_PORT}{SMALL}"
        body = lab.run(client.namespace.argv("curl", "-sS", "--fail", "--max-time", "5", url), timeout=10)
        if body != small_object():
            raise BenchError(f"{url} answered {body[:40]!r}, not the object the servers have")


def small_object() -> str:
    """The object behind ``SMALL``: 128 bytes."""
    return ("0123456789abcdef" * SMALL_BYTES)[:SMALL_BYTES - 1] + "\n"


def _prober(client: Client, seconds: float, interval_ms: float) -> list[str]:
    return client.namespace.argv(sys.executable, "-S", "-E", str(_HERE / "prober.py"), client.service, str(WEB_PORT),
                                 SMALL, str(seconds), str(interval_ms))


def parse_prober(outputs: Sequence[str], what: str, where: str) -> list[float]:
    """The milliseconds that several probers side by side saw.

    Args:
        outputs: what each printed.
        what: ``milliseconds`` (to the last byte) or ``first_byte``.
        where: for the error.

    Raises:
        BenchError: too many failed.
    """
    took: list[float] = []
    failures = 0
    for output in outputs:
        seen = json.loads(output)
        took += [float(value) for value in seen[what]]
        failures += seen["failures"]
    if not took or failures > max(1, BAD_SHARE * len(took)):
        raise BenchError(f"{where}: {failures} of {failures + len(took)} probes failed")
    return took


def first_byte(lab: Lab, site: Site, seconds: int) -> list[float]:
    """Milliseconds from connect to the answer's first byte, of new connections at a moderate, fixed rate."""
    interval = 1000 * len(site.clients) / FIRST_BYTE_PER_SECOND
    outputs = lab.run_all([_prober(client, seconds, interval) for client in site.clients], timeout=seconds + 20)
    return parse_prober(outputs, "first_byte", "first byte")


def new_connections(lab: Lab, site: Site, seconds: int) -> tuple[WrkResult, list[float]]:
    """64 connections at any time, a new one for every request; and what a prober beside them saw.

    Returns:
        wrk's result, and the prober's milliseconds from connect to the last byte.
    """
    each = CONNECTIONS // len(site.clients)
    last = site.clients[-1]
    prober = _prober(last, seconds - 0.3, PROBE_INTERVAL_MS)
    *outputs, probed = lab.run_all(
        [*(_wrk(client, SMALL, each, seconds, close=True) for client in site.clients), prober], timeout=seconds + 20)
    result = _checked(parse_wrk(outputs), "new connections")
    return result, parse_prober([probed], "milliseconds", "new connections")


KERNEL_COUNTERS = ("TCPSynRetrans", "TCPTimeouts", "PAWSTimewait", "ListenDrops", "TCPTimeWaitOverflow")
"""What tells of packets that were lost or refused between clients and servers."""


def parse_netstat(text: str) -> dict[str, int]:
    """The kernel counters of interest in /proc/net/netstat; 0 for those it does not know."""
    known: dict[str, int] = {}
    lines = text.splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        known.update(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return {name: known.get(name, 0) for name in KERNEL_COUNTERS}


def kernel_counters(site: Site) -> dict[str, int]:
    """Those counters, added up over all clients and servers."""
    total = dict.fromkeys(KERNEL_COUNTERS, 0)
    for namespace in (*(client.namespace for client in site.clients), *site.servers):
        text = namespace.call(Path("/proc/thread-self/net/netstat").read_text)
        for name, value in parse_netstat(text).items():
            total[name] += value
    return total


def keep_alive(lab: Lab, site: Site, seconds: int) -> WrkResult:
    """64 connections that stay open."""
    each = CONNECTIONS // len(site.clients)
    outputs = lab.run_all([_wrk(client, SMALL, each, seconds, close=False) for client in site.clients],
                          timeout=seconds + 20)
    return _checked(parse_wrk(outputs), "keep-alive")


def big_objects(lab: Lab, site: Site, seconds: int) -> WrkResult:
    """100 MB objects, one connection a client."""
    outputs = lab.run_all([_wrk(client, BIG, 1, seconds, close=False) for client in site.clients], timeout=seconds + 20)
    result = parse_wrk(outputs)
    if result.errors or not result.bytes_per_second:
        raise BenchError(f"100 MB objects: {result.errors} requests failed, {result.requests} were answered")
    return result


def bulk(lab: Lab, site: Site, seconds: int, down: bool) -> float:
    """Gbit/s of one TCP stream, from client to server or (``down``) back."""
    client = site.clients[0]
    argv = ["iperf3", "-c", client.service, "-p", str(BULK_PORT), "-t", str(seconds), "-J", *(["-R"] if down else [])]
    return parse_iperf(lab.run(client.namespace.argv(*argv), timeout=seconds + 15))
