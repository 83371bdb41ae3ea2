# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client that makes new connections at a gentle, steady pace and notes how long each one takes.

wrk starts its clock when the request is written, after the handshake; a balancer that decides on the
first packet does its work before that. This one starts at ``connect``, and notes the answer's first byte and its last.
Run inside a client's namespace as ``python bench/prober.py ADDRESS PORT PATH SECONDS INTERVAL_MS``;
prints one JSON object: ``{"milliseconds": [...], "first_byte": [...], "failures": N}``. Imports nothing of the project.
"""

from __future__ import annotations

import json
import socket
import sys
import time

TIMEOUT_SECONDS = 5.0


def fetch(address: str, port: int, request: bytes) -> tuple[float, float]:
    """Milliseconds from connect to the answer's first byte and to its end; OSError where there is no whole answer."""
    start = time.perf_counter()
    with socket.create_connection((address, port), TIMEOUT_SECONDS) as connection:
        connection.sendall(request)
        first = data = connection.recv(65536)
        began = time.perf_counter()
        while data:
            data = connection.recv(65536)
    if b" 200 " not in first[:16]:
        raise OSError("no 200 answer")
    return (began - start) * 1000, (time.perf_counter() - start) * 1000


def probe(address: str, port: int, path: str, seconds: float, interval: float) -> dict[str, object]:
    """Fetch ``path`` over new connections, one every ``interval`` seconds at most, for ``seconds``."""
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
    took: list[tuple[float, float]] = []
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
    first, whole = ([round(pair[index], 4) for pair in took] for index in (0, 1))
    return {"milliseconds": whole, "first_byte": first, "failures": failures}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]) / 1000)))
