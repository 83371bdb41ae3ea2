# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What one monitor knows of one member, and when it looks again.

    unknown ──first result──▸ up ◂──rise good ones in a row── down
                              up ──fall bad ones in a row──▸  down

Pure: results and chances in (numbers from 0 up to 1), states and pauses out. No clock, no chance of its own.
"""

from __future__ import annotations

from lbapp.config.monitor import Monitor

FIRST_PER_S = 2000
"""So many new targets are checked for the first time each second."""
SMOOTHING = 0.25
"""The share of the newest time in the smoothed one."""


class Health:
    """See the module.

    Args:
        monitor: how the member is checked.
        up: what is known already; None: nothing.

    Attributes:
        up: the state; None as long as it is unknown.
        checks: results so far.
        latency: smoothed seconds of good checks; None before the first.
    """

    __slots__ = ("_against", "_monitor", "checks", "latency", "up")

    def __init__(self, monitor: Monitor, up: bool | None = None) -> None:
        self._monitor = monitor
        self.up = up
        self.checks = 0
        self.latency: float | None = None
        self._against = 0

    @property
    def changing(self) -> bool:
        """Whether the last result speaks against the state."""
        return self._against > 0

    def take(self, good: bool, seconds: float | None) -> bool:
        """Take a result; returns whether the state has changed.

        Args:
            good: how the check went.
            seconds: it took; None where that says nothing.
        """
        self.checks += 1
        if good and seconds is not None:
            self.latency = (seconds if self.latency is None
                            else self.latency + SMOOTHING * (seconds - self.latency))
        if self.up is None:
            self.up = good
            return True
        if good == self.up:
            self._against = 0
            return False
        self._against += 1
        if self._against < (self._monitor.rise if good else self._monitor.fall):
            return False
        self.up, self._against = good, 0
        return True

    def pause(self, chance: float) -> float:
        """Seconds from the beginning of the last check to that of the next one."""
        monitor = self._monitor
        if self.changing:
            interval = monitor.fast_interval
        elif self.checks == 1:
            # Those that were checked for the first time in one go need not stay together.
            return monitor.interval * max(chance, 0.01)
        else:
            interval = monitor.interval
        return interval * (1 + monitor.jitter * (2 * chance - 1))

    def first(self, chance: float, waiting: int) -> float:
        """Seconds until the first check, where so many targets wait for theirs."""
        return chance * min(self._monitor.interval, waiting / FIRST_PER_S)
