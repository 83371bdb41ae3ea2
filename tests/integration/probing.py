# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A probe that goes on while a fault happens, and what it saw."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from topologies.hosts import LabHost
from topologies.namespace import end

SCRIPT = Path(__file__).with_name("probe_client.py")


class Seen(NamedTuple):
    """One request. ``at`` is in monotonic seconds."""

    at: float
    seconds: float
    name: str | None
    error: str | None


class Probe:
    """See :func:`probing`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.seen: list[Seen] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(Seen(*json.loads(line)))

    def since(self, at: float) -> list[Seen]:
        """The requests that began after a moment."""
        return [one for one in list(self.seen) if one.at >= at]

    def names(self, at: float = 0.0) -> Counter[str | None]:
        """Who answered those (None: nobody)."""
        return Counter(one.name for one in self.since(at))

    def quiet(self, count: int, within: float) -> None:
        """Wait until so many requests in a row have been answered.

        Raises:
            TimeoutError: not within so many seconds.
        """
        deadline = time.monotonic() + within
        begun = time.monotonic()
        while time.monotonic() < deadline:
            latest = self.since(begun)[-count:]
            if len(latest) == count and all(one.error is None for one in latest):
                return
            time.sleep(0.05)
        raise TimeoutError(f"no {count} answers in a row within {within} s: {self.since(begun)[-count:]}")

    def stop(self) -> list[Seen]:
        """End it; returns all that it saw."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        end(self._process)
        self._reader.join(5)
        return self.seen


@contextlib.contextmanager
def probing(host: LabHost, address: str, port: int, path: str = "/", rate: float = 50) -> Iterator[Probe]:
    """Requests from a host for the time of the block, each on a connection of its own."""
    process = host.popen(sys.executable, "-S", str(SCRIPT), address, str(port), path, str(rate),
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    probe = Probe(process)
    try:
        yield probe
    finally:
        probe.stop()
