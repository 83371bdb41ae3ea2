# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The controller's side of the process that checks members: starts it, tells it what to check, hears what changed.

Owns the process and the socket to it. Never checks anything itself, and never decides what a state means.

Nobody here waits for the process: what it is to be told is kept as the newest definition of each target, so that there
is never more of it than there are targets, however slowly it reads. A process that ends, or says nothing any more, is
started again and told everything, with the states that are known: these stay until it has found something else.

Works in threads and, under eventlet's monkey patching, in greenlets: a socket pair rather than pipes, which eventlet
would wait for with the whole process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lbapp.monitors.protocol import (
    Changed,
    Lines,
    ProtocolError,
    Statistics,
    Target,
    commands,
    decode_report,
)

__all__ = ["Changed", "Monitors", "Statistics", "Target"]

LOG = logging.getLogger("lbapp.monitors")

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0
"""Who has run for so long is started again at once."""
SILENCE_S = 30.0
"""It says something every few seconds; one that is silent for so long is ended."""
ENDING_S = 3.0
_CHUNK = 1 << 18


def _environment() -> dict[str, str]:
    """In which the process finds this very package, wherever the controller has it from."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


class Monitors:
    """See the module.

    Args:
        on_changed: called with what changed, from a thread (greenlet) of this object; should be quick.
        on_latencies: the same with the newest smoothed seconds of targets.
        scripts: the directory of external checks; without it they all fail.
        netns: the network namespace in which the process is; None: that of the controller.
        log_level: what it tells for the log.
    """

    def __init__(self, on_changed: Callable[[list[Changed]], None],
                 on_latencies: Callable[[list[tuple[str, float]]], None], scripts: Path | None = None,
                 netns: Path | None = None, log_level: str = "INFO") -> None:
        self._on_changed, self._on_latencies = on_changed, on_latencies
        self._arguments = [sys.executable, "-m", "lbapp.monitors", "--log-level", log_level]
        if scripts is not None:
            self._arguments += ["--scripts", str(scripts)]
        if netns is not None:
            self._arguments += ["--netns", str(netns)]
        self._wanted: dict[str, tuple[Target, int]] = {}
        self._known: dict[str, bool] = {}
        self._untold: dict[str, bool] = {}  # key: whether it is to be set, else removed
        self._serial = 0
        self._lock = threading.Condition()
        self._closed = False
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._statistics: Statistics | None = None
        self._starts = 0
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ what is checked

    def update(self, targets: Mapping[str, Target]) -> None:
        """Have these checked, and nothing else. Those that are as before keep their state.

        The process is started when there is the first target. Never waits for it.
        """
        with self._lock:
            if self._closed:
                return
            for key in self._wanted.keys() - targets.keys():
                del self._wanted[key]
                self._known.pop(key, None)
                self._untold[key] = False
            for key, target in targets.items():
                before = self._wanted.get(key)
                if before is not None and (before[0] is target or before[0] == target):
                    continue
                self._serial += 1
                self._wanted[key] = (target, self._serial)
                self._known.pop(key, None)
                self._untold[key] = True
            self._lock.notify_all()
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="monitors", daemon=True)
                self._thread.start()

    @property
    def statistics(self) -> Statistics | None:
        """What the process said of itself last; None before it has said anything."""
        return self._statistics

    @property
    def starts(self) -> int:
        """How often the process was started."""
        return self._starts

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """End the process. Nothing is called back any more once this has returned."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._hang_up()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * ENDING_S)

    def _hang_up(self) -> None:
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------ the process

    def _run(self) -> None:
        failures = 0
        while not self._closed:
            begun = time.monotonic()
            why = self._once()
            if self._closed:
                return
            if time.monotonic() - begun >= STEADY_S:
                failures = 0
            pause = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            failures += 1
            LOG.warning("members are not checked: %s; the process is started again in %g s", why, pause)
            with self._lock:
                self._lock.wait_for(lambda: self._closed, pause)

    def _once(self) -> str:
        """One process from its start to its end; returns why it ended."""
        ours, its = socket.socketpair()
        try:
            try:
                process = subprocess.Popen(self._arguments, stdin=its.fileno(), stdout=its.fileno(),
                                           start_new_session=True, env=_environment())
            except OSError as error:
                return f"it cannot be started: {error.strerror or error}"
            finally:
                its.close()
            ours.settimeout(SILENCE_S)
            self._starts += 1
            self._process, self._socket = process, ours
            with self._lock:
                self._untold = dict.fromkeys(self._wanted, True)
            if self._closed:  # close() came before there was a socket
                self._hang_up()
            writer = threading.Thread(target=self._write, args=(ours,), name="monitors-write", daemon=True)
            writer.start()
            why = self._read(ours)
            self._socket = None
            with self._lock:
                self._lock.notify_all()
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            writer.join()
            return self._end(process, why)
        finally:
            self._socket = self._process = None
            ours.close()

    @staticmethod
    def _end(process: subprocess.Popen[bytes], why: str) -> str:
        try:
            status = process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return why
        if status < 0:
            return f"the process was ended by signal {-status}"
        return why if not status else f"the process ended with status {status}"

    def _write(self, connection: socket.socket) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._untold or self._closed or self._socket is not connection)
                if self._closed or self._socket is not connection:
                    return
                untold, self._untold = self._untold, {}
                removed = [key for key, there in untold.items() if not there]
                settings = [(key, *self._wanted[key], self._known.get(key))
                            for key, there in untold.items() if there]
            try:
                for line in commands(settings, removed):
                    connection.sendall(line)
            except OSError:
                # Too slow, or gone; whichever, the reader is to know it.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return

    def _read(self, connection: socket.socket) -> str:
        lines = Lines()
        while True:
            try:
                data = connection.recv(_CHUNK)
            except TimeoutError:
                return f"the process has said nothing for {SILENCE_S:g} s"
            except OSError as error:
                return f"the process went away: {error.strerror or error}"
            if not data:
                return "the process ended"
            try:
                for line in lines.feed(data):
                    self._take(line)
            except ProtocolError as error:
                return f"the process says what makes no sense: {error}"

    # ------------------------------------------------------------------ what it says

    def _take(self, line: bytes) -> None:
        report = decode_report(line)
        if report.statistics is not None:
            self._statistics = report.statistics
        for level, text in report.messages:
            LOG.log(level, "%s", text)
        with self._lock:
            if self._closed:
                return
            changed = [one for one in report.changed if self._wanted.get(one.key, (None, -1))[1] == one.serial]
            for one in changed:
                self._known[one.key] = one.up
            latencies = [one for one in report.latencies if one[0] in self._wanted]
        try:
            if changed:
                self._on_changed(changed)
            if latencies:
                self._on_latencies(latencies)
        except Exception:
            LOG.exception("what the monitors found could not be used")
