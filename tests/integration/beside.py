# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A laboratory with ``lbapp agent`` beside its switch and ``lbapp run --agent``: what test_agent_*.py share.

A test module makes fixtures of the generators here (``yield from``).
"""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.bus import keyfile
from tests.integration.support import ECHO_PORT, VIP, VIP6, configure, members, pool, server
from topologies.lab import Lab
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

WAYS = {"fast": 80, "round": 8080, "least": 8081}
ONE, TWO = 6754, 6755


class Agent:
    """``lbapp agent`` of one bridge."""

    def __init__(self, lab: Lab, key: Path, bridge: str = "lb1", port: int = ONE, *options: str) -> None:
        self.lab, self.bridge, self.address = lab, bridge, f"127.0.0.1:{port}"
        self.log = key.with_name(f"{bridge}-{port}.log")
        self.argv = ["agent", "--bridge", bridge, "--listen", self.address, "--key", str(key), *options]
        self.process: subprocess.Popen[Any] | None = None

    @property
    def _prefix(self) -> list[str]:
        return ["env", *(f"{name}={value}" for name, value in self.lab.ovs.environment.items()),
                self.lab.controller.command]

    def start(self) -> None:
        with self.log.open("ab") as log:
            seen = self.said("fast path in front of")
            self.process = self.lab.root.popen(*self._prefix, *self.argv, stdout=log, stderr=log)
        wait_until(lambda: self.said("fast path in front of") > seen, 30, f"an agent for {self.bridge}")

    def said(self, words: str) -> int:
        """How often the log has these words."""
        return self.log.read_text().count(words)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=10)

    def remove(self) -> None:
        if self.process is not None:
            end(self.process, patience=10)
        self.lab.root.run(*self._prefix, "agent", "--bridge", self.bridge, "--remove")


def shared_key(directories: pytest.TempPathFactory) -> Path:
    """A new key in a directory of its own."""
    path = directories.mktemp("bus") / "bus.key"
    keyfile.ensure(path)
    return path


def laboratory(key: Path) -> Iterator[Lab]:
    """A controller that looks for its agent; the agent is not there yet."""
    options = ["--agent", f"127.0.0.1:{ONE}", "--bus-key", str(key)]
    with Lab(SingleTopo(), options=options) as made:
        made.start_servers()
        made.start_controller()
        yield made


def beside(lab: Lab, key: Path) -> Iterator[Agent]:
    """The agent of the switch."""
    made = Agent(lab, key)
    made.start()
    yield made
    made.remove()


def configured(lab: Lab, agent: Agent) -> Lab:
    """The laboratory with the agent connected, and virtual servers of every kind."""
    if agent.process is None or agent.process.poll() is not None:
        agent.start()
    wait_until(lambda: fastpath(lab) is not None, 15, "the agent is connected")
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        name = "six" if six else "four"
        web = members(lab, six=six)
        pools += [pool(f"weights-{name}", "WEIGHTED_ROUND_ROBIN", web), pool(f"turns-{name}", "ROUND_ROBIN", web),
                  pool(f"least-{name}", "LEAST_CONNECTIONS", web),
                  pool(f"echo-{name}", "WEIGHTED_ROUND_ROBIN", members(lab, ECHO_PORT, six)),
                  pool(f"asked-{name}", "ROUND_ROBIN", members(lab, ECHO_PORT, six))]
        servers += [server(f"fast-{name}", WAYS["fast"], f"weights-{name}", vip),
                    server(f"round-{name}", WAYS["round"], f"turns-{name}", vip),
                    server(f"least-{name}", WAYS["least"], f"least-{name}", vip),
                    server(f"udp-{name}", 53, f"echo-{name}", vip, "UDP"),
                    server(f"asked-{name}", 54, f"asked-{name}", vip, "UDP")]
    configure(lab, pools, servers)
    time.sleep(0.3)  # CSMB carries it to the agent
    return lab


def fastpath(lab: Lab, dpid: str = "0000000000000001") -> dict[str, Any] | None:
    """The statistics of a switch's fast path."""
    found = [switch for switch in lab.rest.get("/v1/stats")["switches"] if switch["dpid"] == dpid]
    return found[0]["fastpath"] if found else None


def count(lab: Lab, name: str, dpid: str = "0000000000000001") -> int:
    """One counter of it."""
    found = fastpath(lab, dpid)
    assert found is not None
    return int(found[name])


def url(vip: str, port: int, path: str = "") -> str:
    """Where a virtual server is."""
    return f"http://[{vip}]:{port}/{path}" if ":" in vip else f"http://{vip}:{port}/{path}"


def links(lab: Lab) -> list[str]:
    """Interfaces of a fast path."""
    return re.findall(r"\b(lb[ioq][0-9a-f]+)", lab.root.run("ip", "-o", "link").stdout)


def downloading(site: Lab) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A transfer of some seconds: the process, the digest of what it is to get, where it puts it."""
    digest, target = site.make_file("big", 60_000_000), site.directory / "downloaded"
    target.unlink(missing_ok=True)
    process = site.client("c2").popen("curl", "-sSf", "--max-time", "60", "--limit-rate", "12M", "-o", str(target),
                                      url(VIP, 80, "big"))
    wait_until(lambda: target.exists() and target.stat().st_size, 10, "it is under way")
    yield process, digest, target
    process.kill()
    process.wait()


def check(download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    """Assert that it ends well, byte for byte."""
    process, digest, target = download
    assert process.wait(60) == 0
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
