# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Starts tests/unit/rest_server.py and talks to it: what the tests of the API share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15


class RestProcess:
    """A running server, and a client that has its token."""

    def __init__(self, directory: Path, *options: str, verify: str | None = None) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.unit.rest_server", str(directory), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(directory / "stderr").open("w"), text=True,
            cwd=ROOT)
        assert self.process.stdout is not None
        ports = self.process.stdout.readline().split()
        assert ports, (directory / "stderr").read_text()
        self.port, self.bare_port = map(int, ports)
        self.token = (directory / "token").read_text().strip()
        scheme = "https" if verify else "http"
        self.client = httpx.Client(base_url=f"{scheme}://127.0.0.1:{self.port}", timeout=SECONDS, trust_env=False,
                                   verify=ssl.create_default_context(cafile=verify),
                                   # Servers of these tests may close an idle connection after a second.
                                   limits=httpx.Limits(keepalive_expiry=0.3),
                                   headers={"Authorization": f"Bearer {self.token}"})

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """One request; ``body`` is sent as JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None:
            return self.client.request(method, path, headers=named)
        return self.client.request(method, path, headers={"Content-Type": "application/json", **named},
                                   content=json.dumps(body))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def say(self, text: str) -> bytes:
        """Send text on a connection of its own; return all that comes back until the server closes it."""
        with self.connect() as connection:
            connection.sendall(text.encode())
            return read_all(connection)

    @property
    def log(self) -> str:
        return (self.directory / "stderr").read_text()

    @property
    def database_pid(self) -> int:
        return int((self.directory / "ovsdb-server.pid").read_text())

    def stop(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.database_pid, signal.SIGTERM)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the peer closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


@contextlib.contextmanager
def rest_process(directory: Path, *options: str, verify: str | None = None) -> Iterator[RestProcess]:
    """A server for the time of a ``with``."""
    running = RestProcess(directory, *options, verify=verify)
    try:
        yield running
    finally:
        running.stop()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer, which must have this status."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"code", "message", "field"}
    assert "Traceback" not in response.text
    return error
