# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client that asks so many times a second, each time on a connection of its own, until its input ends; one line of
JSON for each: [when (monotonic seconds), how long, the server's name or null, the error or null]."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any


def main() -> None:
    host, port, path, rate = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    ended = threading.Event()

    def until_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=until_the_end, daemon=True).start()
    due = time.monotonic()
    while not ended.is_set():
        begun = time.monotonic()
        name: Any = None
        error: Any = None
        connection = http.client.HTTPConnection(host, port, timeout=5)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read().decode()
            if answer.status == 200:
                name = body.strip()
            else:
                error = f"status {answer.status}"
        except (OSError, http.client.HTTPException) as problem:
            error = type(problem).__name__
        finally:
            connection.close()
        print(json.dumps([begun, time.monotonic() - begun, name, error]), flush=True)
        due = max(due + 1 / rate, time.monotonic() - 1)
        ended.wait(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
