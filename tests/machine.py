# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the machine did while a test ran, for the report of one that failed.

A test that waits three seconds for a packet fails on a machine that stands still for so long, and nothing else says so.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

_EVERY = 0.02
_SPENT = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
"""What all time of the CPUs went into; psutil's other fields are parts of these."""


class Watch:
    """Notices when this process was not run, from :meth:`begin` on."""

    def __init__(self) -> None:
        self.begin()
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def begin(self) -> None:
        """What happened until now is over."""
        self._longest, self._before = 0.0, psutil.cpu_times()

    def told(self) -> str:
        """What happened since, for a person to read."""
        now, then = psutil.cpu_times(), self._before
        total = sum(getattr(now, name) - getattr(then, name) for name in _SPENT) or 1.0

        def share(name: str) -> int:
            return int((getattr(now, name) - getattr(then, name)) * 100 / total)

        load = " ".join(f"{one:.1f}" for one in os.getloadavg())
        return (f"longest pause of this process {self._longest:.2f} s; CPUs {share('idle')} % idle, "
                f"{share('iowait')} % waiting for disks, {share('steal')} % taken by other machines; "
                f"load {load}")

    def _run(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(_EVERY)
            self._longest = max(self._longest, time.monotonic() - before - _EVERY)
