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
        wait_until(lambda: self.announced() == len(self.lab.servers), 15, "every agent announces its servers")
        time.sleep(0.5)  # the controller looks at them every tenth of a second

    def stop_agents(self) -> None:
        while self.agents:
            end(self.agents.popitem()[1])

    def announced(self) -> int:
        return sum(bool(one["listeners"]) for one in self.lab.rest.get("/v1/server-agents")["server_agents"])

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
