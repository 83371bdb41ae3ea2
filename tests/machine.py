# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the machine did while a test ran, for the report of one that failed.

A test that waits three seconds for a packet fails on a machine that stands still for so long, and nothing else says so.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_EVERY = 0.02


class Watch:
    """Notices when this process was not run, from :meth:`begin` on.

    Args:
        stat: where the kernel tells of its CPUs' time.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._longest = 0.0
        self._before = self._times()
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def begin(self) -> None:
        """What happened until now is over."""
        self._longest, self._before = 0.0, self._times()

    def told(self) -> str:
        """What happened since, for a person to read."""
        spent = [now - then for now, then in zip(self._times(), self._before, strict=True)]
        total = sum(spent) or 1
        load = " ".join(f"{one:.1f}" for one in os.getloadavg())
        return (f"longest pause of this process {self._longest:.2f} s; CPUs {spent[3] * 100 // total} % idle, "
                f"{spent[4] * 100 // total} % waiting for disks, {spent[7] * 100 // total} % taken by other machines; "
                f"load {load}")

    def _times(self) -> list[int]:
        """Of all CPUs: user, nice, system, idle, iowait, irq, softirq, steal (proc(5))."""
        return [int(one) for one in self._stat.read_text().split("\n", 1)[0].split()[1:9]]

    def _run(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(_EVERY)
            self._longest = max(self._longest, time.monotonic() - before - _EVERY)
