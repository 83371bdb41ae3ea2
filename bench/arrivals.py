# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that come when they come, whether or not earlier ones have been served (an open loop).

Each makes a new connection, asks for an exponentially distributed amount of work (:mod:`bench.work_server`), and is
timed from when it was due to the last byte. Run inside a client's namespace as ``python bench/arrivals.py ADDRESS PORT
RATE SECONDS MEAN_WORK SEED``; prints one JSON object as ``prober.py`` does. Imports nothing of the project.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

PATIENCE_SECONDS = 30.0


async def one(address: str, port: int, work: float, due: float) -> tuple[float, float]:
    """(when it was due, milliseconds until it was served); OSError where it was not."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(f"GET /{work:.6f} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    if b" 200 " not in answer[:16]:
        raise OSError("no 200 answer")
    return due, (time.perf_counter() - due) * 1000


async def load(address: str, port: int, rate: float, seconds: float, mean: float, seed: int) -> dict[str, object]:
    """Let clients come for so many seconds, and wait for the last one.

    Returns:
        ``milliseconds`` of all but those of the first fifth of the time, and ``failures``.
    """
    chance = random.Random(seed)
    begin = time.perf_counter()
    due = begin
    clients: list[asyncio.Task[tuple[float, float]]] = []
    while True:
        due += chance.expovariate(rate)
        if due > begin + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        work = chance.expovariate(1 / mean)
        clients.append(asyncio.create_task(asyncio.wait_for(one(address, port, work, due), PATIENCE_SECONDS)))
    results = await asyncio.gather(*clients, return_exceptions=True)
    served = [result for result in results if not isinstance(result, BaseException)]
    return {"milliseconds": [round(took, 3) for when, took in served if when >= begin + seconds / 5],
            "first_byte": [], "failures": len(results) - len(served)}


if __name__ == "__main__":
    where, at, *figures = sys.argv[1:]
    per_second, length, work_seconds, first = (float(figure) for figure in figures)
    print(json.dumps(asyncio.run(load(where, int(at), per_second, length, work_seconds, int(first)))))
