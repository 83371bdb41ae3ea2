# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A laboratory with ``lbapp server-agent`` beside its servers. Asserts nothing: that is what the tests are for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lbapp.handoffs import LEASE_SECONDS
from topologies.hosts import LabHost
from topologies.lab import Lab
from topologies.namespace import end, wait_until

LBAPP = str(Path(sys.executable).with_name("lbapp"))


class Site:
    """A laboratory whose servers have their agents.

    Args:
        lab: the laboratory; its servers and its controller run.
        ports: what the agents announce, at every address of their host.
    """

    def __init__(self, lab: Lab, ports: Sequence[int] = (80,)) -> None:
        self.lab = lab
        self.ports = ports
        self.agents: dict[str, subprocess.Popen[Any]] = {}
        self.disturbed = False

    def log(self, host: LabHost) -> Path:
        return self.lab.directory / f"{host.name}-agent.log"

    def start_agents(self) -> None:
        controller = self.lab.controller
        for host in self.lab.servers:
            if host.name not in self.agents:
                ports = [word for port in self.ports for word in ("--listen-port", str(port))]
                self.agents[host.name] = controller.namespace.popen(
                    LBAPP, "--token-file", str(controller.state / "token"), "server-agent", "--name", host.name,
                    "--netns", f"/proc/{host.pid}/ns/net", *ports, "--log-file", str(self.log(host)))
        self.settled()

    def stop_agents(self) -> None:
        while self.agents:
            end(self.agents.popitem()[1])

    def settled(self) -> None:
        """What the agents announced is so now. One that finds its host's settings changed (a test says so by
        ``disturbed``) announces nothing, and then all of it again."""
        began = time.monotonic()

        def is_so(told: dict[str, Any]) -> bool:
            if self.disturbed and told["listeners"]:
                return LEASE_SECONDS - told["expires_in"] < time.monotonic() - began - 0.1
            return bool(told["listeners"])

        wait_until(lambda: sum(map(is_so, self._told())) == len(self.agents), 20, "every agent announces its servers")
        self.disturbed = False
        time.sleep(0.3)  # the controller looks at them every tenth of a second

    def announces(self, *ports: int) -> None:
        """Wait until every host's agent announces servers at these ports."""
        def all_of_them() -> bool:
            return all(set(ports) <= {int(where.rpartition(":")[2]) for where in one["listeners"]}
                       for one in self._told())

        wait_until(all_of_them, 15, f"servers at {ports} are announced")
        time.sleep(0.3)

    def announced(self) -> int:
        return sum(bool(one["listeners"]) for one in self._told())

    def _told(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.lab.rest.get("/v1/server-agents")["server_agents"]
        return found

    def counters(self) -> dict[str, int]:
        """Of handshakes, the fast path's and those that the controller does itself."""
        told = self.lab.rest.get("/v1/stats")["switches"][0]
        both = (part["handshakes"] for part in (told["fastpath"], told["relay"]) if part)
        return dict(sum((Counter(one) for one in both), Counter()))

    def shaken(self) -> Callable[[], tuple[int, int]]:
        """How many clients shook hands since, and with how many members the switch did."""
        before = self.counters()

        def since() -> tuple[int, int]:
            now = self.counters()
            return (now.get("greeted", 0) - before.get("greeted", 0),
                    sum(now.get(name, 0) - before.get(name, 0) for name in ("splice_wait", "given")))

        return since
