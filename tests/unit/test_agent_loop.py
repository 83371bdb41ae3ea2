# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""When an agent's loop looks at what: ports when the kernel tells of them, the table as often as it needs."""

from __future__ import annotations

import socket
import time
import types
from collections.abc import Iterator
from typing import Any

import eventlet
import pytest
from eventlet import patcher

from lbapp import agents
from lbapp.agents import AgentLoop
from lbapp.dataflow.fastpath.layout import Swept
from lbapp.dataflow.fastpath.removal import PortsError
from tests.green import until

threading: Any = patcher.original("threading")


class FakeWires:
    def __init__(self) -> None:
        self.told, self.tell = socket.socketpair()
        self.told.setblocking(False)
        self.moved = False

    def fileno(self) -> int:
        return self.told.fileno()

    def follow(self) -> bool:
        self.told.recv(100)
        return self.moved


class FakeAgent:
    switch = 1

    def __init__(self) -> None:
        self.fastpath = types.SimpleNamespace(wires=FakeWires())
        self.synced = self.swept = self.entered = 0
        self.found = Swept.nothing()
        self.broken = False

    def sync_ports(self) -> None:
        self.synced += 1
        if self.broken:
            raise PortsError("a port could not be moved")

    def sweep(self) -> Swept:
        self.swept += 1
        return self.found

    def opened(self) -> int:
        return self.entered

    def room(self, swept: Swept) -> int:
        return 100


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> FakeAgent:
    for name, seconds in (("PORTS_SECONDS", 30.0), ("PORTS_AGAIN_SECONDS", 0.1), ("PORTS_GATHER_SECONDS", 0.01),
                          ("SWEEP_SECONDS", 0.05), ("EMPTY_SECONDS", 30.0)):
        monkeypatch.setattr(agents, name, seconds)
    monkeypatch.setattr(agents, "SWEEP_SHARE", 1.0)
    return FakeAgent()


@pytest.fixture
def work(agent: FakeAgent) -> Iterator[Any]:
    """Runs one of the loop's parts."""
    running: list[Any] = []

    def start(name: str) -> None:
        loop = AgentLoop(agent, list, list, list)  # type: ignore[arg-type]
        running.append(eventlet.spawn(getattr(loop, name)))

    yield start
    for one in running:
        one.kill()
    agent.fastpath.wires.told.close()
    agent.fastpath.wires.tell.close()


def test_silent_interfaces_cost_nothing(agent: FakeAgent, work: Any) -> None:
    work("_ports")
    eventlet.sleep(0.3)
    assert agent.synced == 0
    agent.fastpath.wires.tell.send(b"carrier")
    until(lambda: agent.synced == 1)
    eventlet.sleep(0.5)
    assert agent.synced == 1, "some change, perhaps of a port that came from elsewhere"


def test_a_port_is_looked_for_at_once_and_once_more(agent: FakeAgent, work: Any) -> None:
    """What Open vSwitch did is in its database a moment later."""
    agent.fastpath.wires.moved = True
    work("_ports")
    eventlet.sleep(0)
    agent.fastpath.wires.tell.send(b"promiscuous")
    until(lambda: agent.synced == 1)
    until(lambda: agent.synced == 2)
    eventlet.sleep(0.4)
    assert agent.synced == 2


def test_a_port_that_fails_is_told_in_a_line_and_tried_again(agent: FakeAgent, work: Any,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    agent.fastpath.wires.moved = agent.broken = True
    work("_ports")
    eventlet.sleep(0)
    agent.fastpath.wires.tell.send(b"x")
    until(lambda: agent.synced == 1)
    agent.broken = False
    agent.fastpath.wires.tell.send(b"x")
    until(lambda: agent.synced == 2)
    (record,) = caplog.records
    assert "a port could not be moved" in record.getMessage()
    assert record.exc_info is None


def test_an_empty_table_is_seldom_swept(agent: FakeAgent, work: Any) -> None:
    work("_sweeps")
    until(lambda: agent.swept == 1)
    eventlet.sleep(0.3)
    assert agent.swept == 1
    agent.entered = 100
    until(lambda: agent.swept == 2, "it fills up")


def test_others_go_on_while_a_table_is_swept(agent: FakeAgent, work: Any) -> None:
    """It takes tens of milliseconds: another thread does it."""
    swept, answers = threading.Event(), []

    def sweep() -> Swept:
        answers.append(swept.wait(5))  # holds up the whole thread that it is in
        return agent.found

    agent.sweep = sweep  # type: ignore[method-assign]
    work("_sweeps")
    for _ in range(20):
        eventlet.sleep(0.001)
    assert not answers
    swept.set()
    until(lambda: answers == [True], "and not after five seconds")


def test_a_table_with_connections_is_swept_again_and_again(agent: FakeAgent, work: Any) -> None:
    agent.found = agent.found._replace(live=3)
    began = time.monotonic()
    work("_sweeps")
    until(lambda: agent.swept >= 3, "again and again")
    assert time.monotonic() - began >= 2 * agents.SWEEP_SECONDS, "with a pause between"
