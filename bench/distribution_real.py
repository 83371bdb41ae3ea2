# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A slow member among real servers: HAProxy's leastconn and lbapp's algorithms, in namespaces, in one run.

The servers are :mod:`bench.work_server`: their requests take as long as their clients say, and one
server takes several times as long. Clients come in an open loop (:mod:`bench.arrivals`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lab import Lab, Namespace
from bench.lbapp_targets import Installation
from bench.load import parse_prober, percentile
from bench.targets import VIP, routed

PORTS = (8001, 8002, 8003)
"""Members on each of the server hosts."""
SERVICE_PORT = 8000
WORKERS = 4
SLOW = 0.1
"""The speed of the first member; the others have 1."""
MEAN_WORK = 0.04
LOAD = 0.5
"""Work that arrives, as a share of what all members could do if none were slow."""

HAPROXY = """\
global
    nbthread 2
    maxconn 4000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen web
    bind {vip}:{port} backlog 8192
    balance leastconn
{members}
"""

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Turn:
    """What clients saw in one turn of one target: milliseconds."""

    target: str
    round: int
    p50: float
    p99: float
    requests: int


def _members(lab: Lab, servers: Sequence[Namespace], addresses: Sequence[str]) -> list[tuple[str, int]]:
    """Start the members; they are ready on return."""
    members: list[tuple[str, int]] = []
    for server, address in zip(servers, addresses, strict=True):
        for port in PORTS:
            speed = 1.0 if members else SLOW
            process = lab.spawn(server, f"work-{address}-{port}", [
                sys.executable, "-S", "-E", str(_HERE / "work_server.py"), str(port), str(WORKERS), str(speed)])
            lab.wait_port(server, "127.0.0.1", port, process)
            members.append((address, port))
    return members


def haproxy(lab: Lab) -> tuple[list[Namespace], int]:
    """HAProxy between clients and members.

    Returns:
        the clients, and how many members there are.
    """
    middle, site, addresses = routed(lab)
    members = _members(lab, site.servers, addresses)
    path = lab.directory / "leastconn.cfg"
    path.write_text(HAPROXY.format(vip=VIP, port=SERVICE_PORT, members="\n".join(
        f"    server s{index} {address}:{port}" for index, (address, port) in enumerate(members, 1))))
    process = lab.spawn(middle, "haproxy", ["haproxy", "-db", "-f", str(path)])
    lab.wait_port(middle, VIP, SERVICE_PORT, process)
    return [client.namespace for client in site.clients], len(members)


def lbapp(algorithm: str) -> Callable[[Lab], tuple[list[Namespace], int]]:
    """lbapp with its fast path; the controller is asked for every connection."""
    def build(lab: Lab) -> tuple[list[Namespace], int]:
        installation = Installation(lab, ("--fastpath",))
        members = _members(lab, installation.servers, installation.addresses)
        installation.post("/v1/virtual-servers", {
            "name": "web", "vip_address": VIP, "protocol": "TCP", "protocol_port": SERVICE_PORT,
            "pool": {"name": "pool", "lb_algorithm": algorithm, "members": [
                {"address": address, "protocol_port": port} for address, port in members]}})
        installation.wait_answer(VIP, SERVICE_PORT)
        return list(installation.clients), len(members)
    return build


TARGETS: dict[str, Callable[[Lab], tuple[list[Namespace], int]]] = {
    "haproxy leastconn": haproxy,
    "lbapp LEAST_CONNECTIONS": lbapp("LEAST_CONNECTIONS"),
    "lbapp LEAST_RESPONSE_TIME": lbapp("LEAST_RESPONSE_TIME"),
    "lbapp FASTEST": lbapp("FASTEST"),
}


def turn(name: str, number: int, seconds: int, seed: int) -> Turn:
    """Build one target, load it, and take it down.

    Raises:
        BenchError: it could not be built, or more than 1 % of its requests failed.
    """
    with Lab() as lab:
        clients, members = TARGETS[name](lab)
        rate = LOAD * members * WORKERS / MEAN_WORK / len(clients)
        outputs = lab.run_all([client.argv(
            sys.executable, "-S", "-E", str(_HERE / "arrivals.py"), VIP, str(SERVICE_PORT), str(rate), str(seconds),
            str(MEAN_WORK), str(seed + index)) for index, client in enumerate(clients)], timeout=seconds + 60)
        took = parse_prober(outputs, "milliseconds", name)
    return Turn(name, number, percentile(took, 50), percentile(took, 99), len(took))


def run(rounds: int, seconds: int, seed: int) -> Iterator[Turn]:
    """All targets in each round, in an order that changes; the clients of a round are the same for all."""
    names = list(TARGETS)
    for number in range(rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            yield turn(name, number + 1, seconds, seed + 1000 * number)
