# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, which programs were compared, and who else uses its processors.

Reads /proc; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
QUIET_CORES = 0.10
"""Others may use this much of one core before a measurement waits or is marked."""

VERSIONS = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "nft": ["nft", "--version"],
    "wrk": ["wrk", "-v"],
    "iperf3": ["iperf3", "--version"],
    "ovs": ["ovs-vswitchd", "--version"],
}


def describe() -> dict[str, str]:
    """What a reader must know to compare figures: processor, kernel, versions."""
    facts = {"cpus": str(len(os.sched_getaffinity(0))), "kernel": platform.release(),
             "python": platform.python_version()}
    found = re.search(r"^model name\s*:\s*(.+)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    if found:
        facts["processor"] = found[1]
    for name, argv in VERSIONS.items():
        with contextlib.suppress(OSError):
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
            version = re.search(r"\d+\.\d+[\w.+-]*", done.stdout + done.stderr)
            facts[name] = version[0] if version else "unknown"
    return facts


def process_ticks(stat: str) -> tuple[int, int, int]:
    """Parent, CPU ticks used (user and system) and start time, from the text of /proc/PID/stat."""
    fields = stat[stat.rindex(")") + 2:].split()
    return int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[19])


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used, in seconds; OSError where it is gone."""
    return process_ticks((PROC / str(pid) / "stat").read_text())[1] / TICKS


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; OSError where it is gone."""
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processes() -> Iterator[tuple[int, int, int, int]]:
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent, ticks, start = process_ticks((entry / "stat").read_text())
                yield int(entry.name), parent, ticks, start


class Others:
    """CPU time used by processes that are not the benchmark's, between construction and :meth:`cores`.

    Ours are this process, its descendants, and whatever runs in namespaces of ours. Kernel threads
    belong to nobody: what they do may be our own packets.
    """

    def __init__(self, inodes: Iterable[int] = ()) -> None:
        self._inodes = frozenset(inodes)
        self._since = time.monotonic()
        self._before = self._foreign()

    def _foreign(self) -> dict[tuple[int, int], int]:
        every = list(_processes())
        children: dict[int, list[int]] = {}
        for pid, parent, _, _ in every:
            children.setdefault(parent, []).append(pid)
        ours, todo = set(), [os.getpid()]
        while todo:
            pid = todo.pop()
            ours.add(pid)
            todo.extend(children.get(pid, ()))
        return {(pid, start): ticks for pid, parent, ticks, start in every
                if pid not in ours and parent != 2 and pid != 2 and not self._inside(pid)}

    def _inside(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return (PROC / str(pid) / "ns" / "net").stat().st_ino in self._inodes
        return False

    def cores(self) -> float:
        """How many cores others kept busy, on average, since construction."""
        elapsed = time.monotonic() - self._since
        used = sum(ticks - self._before.get(key, 0) for key, ticks in self._foreign().items())
        return max(0, used) / TICKS / elapsed if elapsed else 0.0


def wait_until_quiet(patience: float) -> float:
    """Wait until others leave the processors alone, at most ``patience`` seconds.

    Returns:
        the cores that others used in the last look.
    """
    end = time.monotonic() + patience
    while True:
        others = Others()
        time.sleep(0.4)
        cores = others.cores()
        if cores <= QUIET_CORES or time.monotonic() >= end:
            return cores
