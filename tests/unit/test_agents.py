# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The greenlets that run an agent (:mod:`lbapp.agents`), with an agent and a fast path that are played."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import eventlet
import pytest

from lbapp import agents
from lbapp.agents import AgentLoop, LocalLink, local_link
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.fastpath import FastPath, FastPathUnavailable
from lbapp.dataflow.ovs import OvsError
from tests.green import until

IDLE = layout.Swept(0, 0, 0, 0, 0, 0, 0, 0, 0, (0,) * 32)


class Agent:
    """Hands out what it was given, and notes what was done with it."""

    switch = 5

    def __init__(self) -> None:
        self.readable, self.rings = os.pipe()
        self.changed, self.change = os.pipe()
        os.set_blocking(self.readable, False)
        os.set_blocking(self.changed, False)
        self.waiting: list[int] = []
        self.ends: list[int] = []
        self.lives: list[int] = []
        self.ticks = self.sweeps = self.synced = self.failures = 0
        self.counters: dict[str, int] = {"refused": 2}
        self.held = 3
        self.kept: list[bool] = []
        wires = types.SimpleNamespace(fileno=lambda: self.changed, follow=self.follow)
        self.fastpath = types.SimpleNamespace(
            queries_fileno=lambda: self.readable, wires=wires, tracked=lambda: [(1, 2, 3)],
            counters=lambda: {"hits": 9}, service_stats=lambda: {(7, 3): layout.Traffic(1, 2, 3, 4)},
            refusals=lambda: {7: (4, 2)},
            close=lambda keep: self.kept.append(keep))

    def told(self) -> dict[str, int]:
        return {**self.fastpath.counters(), **self.counters}

    def come(self, *queries: int) -> None:
        self.waiting += queries
        os.write(self.rings, b"x")

    def follow(self) -> bool:
        os.read(self.changed, 100)
        return True

    def queries(self, now: float) -> list[int]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("odd")
        with contextlib.suppress(BlockingIOError):
            os.read(self.readable, 100)
        waiting, self.waiting = self.waiting, []
        return waiting

    def ended(self, limit: int) -> tuple[list[int], list[int]]:
        ends, self.ends = self.ends[:limit], self.ends[limit:]
        lives, self.lives = self.lives, []
        return ends, lives

    def tick(self, now: float) -> None:
        self.ticks += 1

    def sweep(self) -> layout.Swept:
        self.sweeps += 1
        return IDLE

    def opened(self) -> int:
        return 0

    def room(self, swept: layout.Swept) -> int:
        return 1000

    def sync_ports(self) -> None:
        self.synced += 1

    def deliver(self, answered: Any) -> Any:
        return answered

    def reap(self, reaps: Any) -> Any:
        return [("answer", reap) for reap in reaps]

    def close(self) -> None:
        for one in (self.readable, self.rings, self.changed, self.change):
            os.close(one)


class Told:
    """What the loop passed on."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.closed: list[list[int]] = []
        self.alive: list[list[int]] = []


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


@pytest.fixture
def told(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.setattr(agents, "TICK_SECONDS", 0.01)
    made = Told()
    loop = AgentLoop(agent, made.asked.append, made.closed.append, made.alive.append, batch=4)  # type: ignore[arg-type]
    loop.start()
    yield made
    loop.stop()


def test_queries_are_asked_as_soon_as_they_come(agent: Agent, told: Told) -> None:
    agent.come(1, 2, 3)
    until(lambda: told.asked)
    agent.come(4)
    until(lambda: len(told.asked) == 2)
    assert told.asked == [[1, 2, 3], [4]]


def test_ends_are_told_in_batches_and_the_living_too(agent: Agent, told: Told) -> None:
    agent.ends, agent.lives = list(range(10)), [7]
    until(lambda: sum(map(len, told.closed)) == 10)
    assert told.closed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert told.alive == [[7]]


def test_time_passes(agent: Agent, told: Told) -> None:
    until(lambda: agent.ticks > 3 and agent.sweeps == 1)


def test_ports_are_looked_after_when_an_interface_changes(agent: Agent, told: Told) -> None:
    eventlet.sleep(0.02)
    assert agent.synced == 0
    os.write(agent.change, b"x")
    until(lambda: agent.synced == 1)


def test_one_error_is_not_the_end(agent: Agent, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    agent.failures = 1
    agent.come(1)
    until(lambda: told.asked == [[1]])
    assert "queries failed; going on" in caplog.text


def test_the_link_of_the_own_process(agent: Agent) -> None:
    heard: list[Any] = []
    fastpaths = types.SimpleNamespace(asked=lambda switch, queries: heard.append((switch, queries)),
                                      closed=lambda switch, closed: heard.append((switch, closed)), heard=heard.extend)
    link = LocalLink(agent, fastpaths)  # type: ignore[arg-type]
    agent.come(1)
    until(lambda: heard == [(5, [1])])
    link.reap(["one"])  # type: ignore[list-item]
    assert heard[1:] == [("answer", "one")]
    assert link.live() == [(1, 2, 3)]
    reading = link.read()
    assert (reading.connections, reading.counters, reading.members[7, 3]) == (
        3, {"hits": 9, "refused": 2}, (1, 2, 3, 4))
    link.close()
    assert agent.kept == [True], "the fast path goes on"


@pytest.mark.parametrize("why", [FastPathUnavailable("this kernel has no eBPF"), OvsError("br0 is away")])
def test_a_switch_without_a_fast_path_is_said_and_served(why: Exception, monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise why
    monkeypatch.setattr(FastPath, "open", refuse)
    ovs: Any = types.SimpleNamespace(bridge_of=lambda switch: "br0")
    assert local_link(5, None, ovs) is None  # type: ignore[arg-type]
    assert f"no fast path, Open vSwitch does it all: {why}" in caplog.text


def test_a_switch_elsewhere_needs_an_agent_there(caplog: pytest.LogCaptureFixture) -> None:
    ovs: Any = types.SimpleNamespace(bridge_of=lambda switch: None)
    with caplog.at_level("INFO", "lbapp"):
        assert local_link(5, None, ovs) is None  # type: ignore[arg-type]
    assert "needs an agent there" in caplog.text
