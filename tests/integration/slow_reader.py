# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that fetch a file slowly, many at a time; for each, when it has ended, a line of JSON: the SHA-256 of what it
got, or the error. The socket's buffer is small, so that it is the whole way that is slow."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time

BUFFER = 16_384


def fetch(host: str, port: int, path: str, rate: float) -> str:
    """The digest of a file, fetched with so many bytes a second."""
    digest, begun, got = hashlib.sha256(), time.monotonic(), 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.settimeout(30)
        connection.connect((host, port))
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(BUFFER) or b"\r\n\r\n"
        head, _, body = data.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise OSError(head.decode(errors="replace"))
        while body:
            digest.update(body)
            got += len(body)
            time.sleep(max(0.0, begun + got / rate - time.monotonic()))
            body = connection.recv(BUFFER)
    return digest.hexdigest()


def main() -> None:
    host, port, path, count, rate = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])

    def one() -> None:
        try:
            told = fetch(host, port, path, rate)
        except OSError as error:
            told = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps(told) + "\n")  # one call: others write too

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
