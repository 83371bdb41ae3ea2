# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The controller as a process of the laboratory, and a client of its REST interface.

Only ``lbapp run`` and HTTP are used here, as an operator would; nothing of the application is imported.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from topologies.namespace import Namespace, end, file_tail, wait_until

OPENFLOW = "127.0.0.1:6653"
API = "127.0.0.1:8080"


class RestError(Exception):
    """The REST interface refused. The message holds the request, the status and what was said."""


class Rest:
    """A client of the REST interface that speaks from inside a namespace, with the token of the state directory.

    Args:
        namespace: where the controller is.
        token: the file with the bearer token; read at each request, for it is made on the first run.
        base: URL that the paths are appended to.
    """

    def __init__(self, namespace: Namespace, token: Path, base: str = f"http://{API}") -> None:
        self._namespace = namespace
        self._token = token
        self.base = base

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None,
                timeout: float = 30.0) -> httpx.Response:
        """Send a request and return whatever answer comes.

        Raises:
            httpx.TransportError: no answer.
        """
        sent = dict(headers or {})
        if "Authorization" not in sent and self._token.exists():
            sent["Authorization"] = f"Bearer {self._token.read_text().strip()}"
        with self._namespace.entered():
            return httpx.request(method, self.base + path, json=body, headers=sent, timeout=timeout, trust_env=False)

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """Send a request that has to succeed and return its JSON, None where the answer is empty.

        Raises:
            RestError: an error status.
            httpx.TransportError: no answer.
        """
        response = self.request(method, path, body, headers)
        if response.is_error:
            raise RestError(f"{method} {path} gave {response.status_code}: {response.text.strip()}")
        return response.json() if response.content else None

    def get(self, path: str) -> Any:
        """GET, see :meth:`call`."""
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """POST, see :meth:`call`."""
        return self.call("POST", path, body)

    def put(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """PUT, see :meth:`call`."""
        return self.call("PUT", path, body, headers)

    def patch(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """PATCH, see :meth:`call`."""
        return self.call("PATCH", path, body, headers)

    def delete(self, path: str) -> Any:
        """DELETE, see :meth:`call`."""
        return self.call("DELETE", path)

    def answers(self) -> bool:
        """Whether anybody answers at all."""
        try:
            self.request("GET", "/v1/switches", timeout=2)
        except httpx.TransportError:
            return False
        return True


class ControllerProcess:
    """``lbapp run`` in a namespace.

    Args:
        namespace: where it runs and listens.
        state: its state directory; kept from one start to the next.
        applications: further Ryu applications to run beside it.
        options: further options of ``lbapp run``.
        environment: variables added to ours, such as ``OVS_RUNDIR``.
    """

    def __init__(self, namespace: Namespace, state: Path, applications: Sequence[str] = (),
                 options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.namespace = namespace
        self.state = state
        self.log = state.with_name(state.name + ".log")
        self.options = list(options)
        self.applications = list(applications)
        self.environment = dict(environment or {})
        self.rest = Rest(namespace, state / "token")
        self.process: subprocess.Popen[Any] | None = None

    @property
    def command(self) -> str:
        """``lbapp``, of this virtual environment."""
        return str(Path(sys.executable).with_name("lbapp"))

    @property
    def argv(self) -> list[str]:
        """The command line."""
        return [self.command, "run", "--state-dir", str(self.state),
                "--listen", OPENFLOW, "--api", API, *self.options, *self.applications]

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def start(self, wait: float = 20.0) -> None:
        """Start it and wait until its REST interface answers; nothing happens if it runs already.

        Args:
            wait: seconds; 0 returns at once.

        Raises:
            RuntimeError: it ended, or does not answer in time; with the end of its log.
        """
        if self.running:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(self.argv)}\n".encode())
            log.flush()
            self.process = self.namespace.popen(*self.argv, stdout=log, stderr=log, cwd=self.state,
                                                env={**os.environ, **self.environment})
        if wait:
            try:
                wait_until(lambda: not self.running or self.rest.answers(), wait, "an answer on the REST interface")
            except TimeoutError as error:
                raise RuntimeError(f"lbapp run: {error}\n{self.log_tail()}") from None
            if not self.running:
                raise RuntimeError(f"lbapp run ended with {self.process.returncode}:\n{self.log_tail()}")

    def kill(self) -> None:
        """Kill it at once, as a crash would. Its database process lives on and is found again."""
        if self.process is not None and self.running:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End it in an orderly way, and what it may have left after it was killed."""
        if self.process is not None:
            end(self.process, patience=10)
        for pidfile in self.state.glob("*.pid"):
            with contextlib.suppress(ValueError, OSError):
                pid = int(pidfile.read_text())
                # The number may be somebody else's by now.
                if str(self.state).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)

    @property
    def fastpath(self) -> bool:
        """Whether it puts a fast path in front of the bridges."""
        return "--fastpath" in self.options or bool(os.environ.get("LBAPP_FASTPATH"))

    @property
    def has_no_fastpath(self) -> bool:
        """Whether it has said that this machine lets it have none."""
        return "has no fast path, Open vSwitch" in self.log.read_text(errors="replace")

    def remove_fastpath(self, bridges: Sequence[str]) -> None:
        """Take down the fast paths that it left in front of bridges: a controller that ends leaves them forwarding."""
        for bridge in bridges if self.fastpath else ():
            self.namespace.run("env", *(f"{name}={value}" for name, value in self.environment.items()), self.command,
                               "agent", "--bridge", bridge, "--remove", "--log-level", "WARNING")

    def log_tail(self, lines: int = 30) -> str:
        """The end of what it printed."""
        return file_tail(self.log, lines)

    def rss(self) -> int:
        """Its resident memory in bytes, 0 when it is not running."""
        if not self.running:
            return 0
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def cpu_seconds(self) -> float:
        """The CPU time it has used, of all its threads, user and system."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
