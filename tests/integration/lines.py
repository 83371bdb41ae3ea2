# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that may have to wait before they are served, and what the controller tells of their line."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from tests.integration.support import tcp
from topologies.lab import Lab
from topologies.namespace import Namespace, wait_until

PATIENCE = 45.0


class Visitor:
    """Connects and asks, in a thread of its own; the connection stays open.

    Attributes:
        done: set when it has been served or refused.
        server: who served it; empty: nobody.
        answer: the first line of what came.
        error: why it was not served.
        seconds: how long that took.
    """

    def __init__(self, host: Namespace, address: str, port: int) -> None:
        self.done = threading.Event()
        self.server = self.answer = ""
        self.error: OSError | None = None
        self.seconds = 0.0
        self._where = host, address, port
        self._socket: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self._socket = tcp(*self._where, timeout=PATIENCE)
            self._socket.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            data = b""
            while b"\r\n\r\n" not in data:
                more = self._socket.recv(4096)
                if not more:
                    break
                data += more
            self.answer = data.partition(b"\r\n")[0].decode()
            found = re.search(rb"(?i)x-server: (\S+)", data) or re.search(rb"\r\n\r\n(\S+)", data)
            if " 200 " in self.answer and found is not None:
                self.server = found[1].decode()
        except OSError as error:
            self.error = error
        self.seconds = time.monotonic() - begun
        self.done.set()

    def wait(self) -> Visitor:
        """Until it has been served or refused."""
        assert self.done.wait(PATIENCE), "it waits still"
        return self

    def close(self) -> None:
        """End its connection."""
        if self._socket is not None:
            self._socket.close()


def line_of(lab: Lab, pool: str) -> dict[str, Any]:
    """What the controller tells of a pool's line."""
    found: dict[str, Any] = next(one for one in lab.rest.get("/v1/stats")["pools"] if one["name"] == pool)
    return found


def waiting(lab: Lab, pool: str, count: int) -> dict[str, Any]:
    """Wait until so many stand in line."""
    wait_until(lambda: line_of(lab, pool)["waiting"] == count, PATIENCE, f"{count} in line")
    return line_of(lab, pool)
