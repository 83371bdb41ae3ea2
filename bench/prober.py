# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client that makes new connections at a gentle, steady pace and notes how long each one takes.

wrk starts its clock when the request is written, after the handshake; a balancer that decides on the
first packet does its work before that. This one starts at ``connect`` and stops at the last byte.
Run inside a client's namespace as ``python bench/prober.py ADDRESS PORT PATH SECONDS INTERVAL_MS``;
prints one JSON object: ``{"milliseconds": [...], "failures": N}``. Imports nothing of the project.
"""

from __future__ import annotations

import json
import socket
import sys
import time

TIMEOUT_SECONDS = 5.0


def fetch(address: str, port: int, request: bytes) -> float:
    """Milliseconds from connect to the end of the answer; OSError where there is no whole answer."""
    start = time.perf_counter()
    with socket.create_connection((address, port), TIMEOUT_SECONDS) as connection:
        connection.sendall(request)
        first = b""
        while data := connection.recv(65536):
            first = first or data
    if b" 200 " not in first[:16]:
        raise OSError("no 200 answer")
    return (time.perf_counter() - start) * 1000


def probe(address: str, port: int, path: str, seconds: float, interval: float) -> dict[str, object]:
    """Fetch ``path`` over new connections, one every ``interval`` seconds at most, for ``seconds``."""
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
    took: list[float] = []
    failures = 0
    due = time.monotonic()
    end = due + seconds
    while due < end:
        try:
            took.append(fetch(address, port, request))
        except OSError:
            failures += 1
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    return {"milliseconds": [round(value, 4) for value in took], "failures": failures}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]) / 1000)))
