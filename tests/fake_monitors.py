# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Monitors without a process: a test says what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lbapp.config.model import Configuration, Network
from lbapp.health import HealthService
from lbapp.monitors.supervisor import Changed, Statistics, Target


class FakeMonitors:
    """See :class:`lbapp.vantages.Vantages`."""

    def __init__(self, on_changed: Callable[[list[Changed]], None],
                 on_latencies: Callable[[list[tuple[str, float]]], None]) -> None:
        self.on_changed, self.on_latencies = on_changed, on_latencies
        self.targets: dict[str, Target] = {}
        self.closed = False

    def configure(self, networks: Iterable[Network], targets: Mapping[str, Target]) -> None:
        self.networks = list(networks)
        self.targets = dict(targets)

    def attach(self, bridge: str) -> None:
        self.bridge = bridge

    def statistics(self) -> list[tuple[tuple[str, ...], Statistics]]:
        return [(("10.0.0.250/24",), Statistics(targets=len(self.targets), checks=70, late=1, cpu_seconds=0.25))]

    def found(self, key: str, up: bool, reason: str = "why") -> None:
        self.on_changed([Changed(key=key, up=up, reason=reason)])

    def close(self) -> None:
        self.closed = True


class Watched:
    """A health service whose monitors and clock are a test's."""

    def __init__(self, in_force: Callable[[Configuration], None] = lambda _: None, **arguments: Any) -> None:
        self.now = 1000.0
        self.service = HealthService(in_force, FakeMonitors, clock=lambda: self.now, **arguments)  # type: ignore[arg-type]

    @property
    def monitors(self) -> FakeMonitors:
        made: Any = self.service._vantages
        assert isinstance(made, FakeMonitors)
        return made

    def found(self, key: str, up: bool, reason: str = "why") -> None:
        """A check came to a result, and it is looked at."""
        self.monitors.found(key, up, reason)
        self.service.step()
