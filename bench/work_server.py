# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server whose requests take as long as they say, and of which a few are served at a time.

``GET /SECONDS`` keeps one of the workers busy for so many seconds, divided by the server's speed; others wait in turn.
It sleeps rather than computes, so that many of these fit on one machine. Run inside a server's namespace as ``python
bench/work_server.py PORT WORKERS SPEED``. Imports nothing of the project.
"""

from __future__ import annotations

import asyncio
import sys

BODY = b"x" * 512
ANSWER = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
BAD = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
LONGEST = 60.0


def seconds_of(head: bytes) -> float:
    """The work that a request asks for.

    Raises:
        ValueError: it is no such request.
    """
    words = head.split(b" ", 2)
    if len(words) != 3 or words[0] != b"GET" or not words[1].startswith(b"/"):
        raise ValueError("expected GET /SECONDS")
    seconds = float(words[1][1:])
    if not 0 <= seconds <= LONGEST:
        raise ValueError(f"expected at most {LONGEST} seconds")
    return seconds


async def serve(port: int, workers: int, speed: float) -> None:
    """Listen until the process is ended."""
    free = asyncio.Semaphore(workers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            try:
                seconds = seconds_of(head)
            except ValueError:
                writer.write(BAD)
            else:
                async with free:
                    await asyncio.sleep(seconds / speed)
                writer.write(ANSWER)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client went away, or is none
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
