# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What looking after members costs new connections: with and without it, in turns, in one and the same laboratory.

Two laboratories one after the other differ by more than what is measured here.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.lab import Lab, Process
from bench.lbapp_targets import SETTLE_SECONDS, Installation
from bench.load import WEB_PORT, Client, Site, new_connections
from bench.targets import VIP

SECONDS = 2
POOL = "/v1/pools/watched"
WATCHED: dict[str, Any] = {
    "monitors": [{"type": "TCP", "interval": 1, "timeout": 1},
                 {"type": "HTTP", "url_path": "/small", "interval": 1, "timeout": 1}],
    "passive": {}, "damping": {}, "distribution": {"interval": 1}}
"""Checks once a second, clients' failures, damping, and weights made of what agents beside the servers report."""
PLAIN: dict[str, Any] = {"monitors": [], "passive": None, "damping": None, "distribution": None}

FIGURES: dict[str, str] = {
    "watched_conn_per_s": "new connections/s, members looked after",
    "unwatched_conn_per_s": "new connections/s, members left alone",
    "watching_percent": "what that costs, %",
    "watching_percent_error": "standard error of it, %",
}


def watching(pairs: int, progress: Callable[[str], None]) -> dict[str, float]:
    """Measure new connections so many times with and as often without, every other time the other way round.

    Returns:
        medians of both, and the mean of what is missing with it, pair by pair, with its standard error.
    """
    with Lab() as lab:
        progress("starting")
        installation = Installation(lab, ("--fastpath",))
        installation.post("/v1/networks", {"name": "all", "cidr": "10.0.0.0/8", "address": "10.255.0.1",
                                           "monitor_address": "10.255.0.2"})
        installation.post("/v1/virtual-servers", {
            "name": "web", "vip_address": VIP, "protocol": "TCP", "protocol_port": WEB_PORT, "decision": "controller",
            "pool": {"name": "watched", "lb_algorithm": "WEIGHTED_ROUND_ROBIN", "members": [
                {"address": address, "protocol_port": WEB_PORT} for address in installation.addresses]}})
        installation.wait_answer(VIP, WEB_PORT)
        agents = _agents(installation)
        site = Site(tuple(Client(client, VIP) for client in installation.clients), installation.servers,
                    installation.controller, SETTLE_SECONDS)
        new_connections(lab, site, 1)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(pairs):
            for watched in (True, False) if number % 2 else (False, True):
                progress(f"pair {number + 1} of {pairs}, members {'looked after' if watched else 'left alone'}")
                _look_after(installation, agents, watched)
                rates[watched].append(new_connections(lab, site, SECONDS)[0].per_second)
        return figures(rates[True], rates[False])


def figures(watched: Sequence[float], unwatched: Sequence[float]) -> dict[str, float]:
    """The figures of rates that were measured in pairs, at least two."""
    missing = [100 * (1 - one / other) for one, other in zip(watched, unwatched, strict=True)]
    return {"watched_conn_per_s": statistics.median(watched), "unwatched_conn_per_s": statistics.median(unwatched),
            "watching_percent": statistics.mean(missing),
            "watching_percent_error": statistics.stdev(missing) / math.sqrt(len(missing))}


def _agents(installation: Installation) -> list[Process]:
    key = installation.process.state / "bus.key"
    started = installation.server_agents("--report-only", *(("--bus-key", str(key)) if key.exists() else ()))
    installation.wait(lambda: sum(bool(one.get("report")) for one in installation.get(
        "/v1/server-agents")["server_agents"]) == len(installation.servers), "the servers report")
    return started


def _look_after(installation: Installation, agents: Sequence[Process], watched: bool) -> None:
    for agent in agents:
        agent.check()
        agent.popen.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
    installation.patch(POOL, WATCHED if watched else PLAIN)

    def there() -> bool:
        states = [(member["health_status"] or {}).get("state") for member in installation.get(
            f"{POOL}/members")["members"]]
        return all(state == "up" for state in states) if watched else True

    installation.wait(there, "the members are checked")
    time.sleep(SETTLE_SECONDS)
