# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The check that is a program of the operator's own.

Whoever may configure monitors may name what lies in one directory, and nothing else; what lies there is the operator's
business. It is started without a shell, with an environment of next to nothing, limits of its own and a session of its
own, and what is left of that session's processes is killed when it has ended or its time is over.

The number of processes is not limited: the kernel counts them by user, not by command.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from lbapp.monitors.checks import Check, Surroundings
from lbapp.monitors.errors import OUR_OWN, CheckFailed, printable
from lbapp.monitors.protocol import Target
from lbapp.monitors.stream import words

OUTPUT_MOST = 4096
MEMORY = 1 << 30
FILES = 256
FILE_SIZE = 16 << 20
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def executable(directory: Path | None, name: str) -> Path:
    """The program of that name.

    Raises:
        CheckFailed: there is none that may be started.
    """
    if directory is None:
        raise CheckFailed("no directory of scripts was given to the controller")
    path = directory / name
    if path.name != name or name in (".", ".."):
        raise CheckFailed(f"{printable(name)} is no name of a script")
    try:
        for one in (directory, path):
            if stat.S_IMODE(one.stat().st_mode) & stat.S_IWOTH:
                raise CheckFailed(f"{one.name} may be written by everybody, so it is not started")
        if not stat.S_ISREG(path.stat().st_mode) or not os.access(path, os.X_OK):
            raise CheckFailed(f"{name} is not executable")
    except OSError as error:
        raise CheckFailed(f"{name}: {words(error)}") from None
    return path


def _limits(seconds: float) -> Callable[[], None]:
    """What the new process does before it becomes the program."""
    limits = ((resource.RLIMIT_CPU, math.ceil(seconds) + 1), (resource.RLIMIT_AS, MEMORY),
              (resource.RLIMIT_NOFILE, FILES), (resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_CORE, 0))

    def apply() -> None:
        for which, most in limits:
            hard = resource.getrlimit(which)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, most))
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return apply


class External(Check):
    """See the module."""

    lacks = "end"
    needs_port = False

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        self.gate = around.at_once
        self._arguments = [target.address, str(target.checked_port), *self.monitor.arguments]
        self._before = _limits(self.monitor.timeout)

    async def run(self) -> bool:
        """See :class:`Check`."""
        path = executable(self.around.scripts, self.monitor.command)
        try:
            running = _Running(self.around.loop, [str(path), *self._arguments], self._before)
        except OSError as error:
            if error.errno in OUR_OWN:
                raise
            raise CheckFailed(f"{path.name} cannot be started: {words(error)}") from None
        except subprocess.SubprocessError:
            raise CheckFailed(f"{path.name} cannot be started: its limits cannot be set") from None
        try:
            status = await running.ended
        finally:
            output = running.close()
        if status:
            said = next((line for line in output.splitlines() if line.strip()), b"")
            raise CheckFailed(printable(said) if said else (
                f"exit status {status}" if status > 0 else f"ended by signal {-status}"))
        return True


class _Running:
    """A program at work.

    Attributes:
        ended: its exit status; negative: the signal.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, command: list[str], before: Callable[[], None]) -> None:
        self._loop = loop
        self.ended: asyncio.Future[int] = loop.create_future()
        self._output = bytearray()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, cwd="/", env=ENVIRONMENT, start_new_session=True,
                                         preexec_fn=before)
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        try:
            self._watch = os.pidfd_open(self._process.pid)
        except OSError:
            self._kill()
            self._process.wait()
            self._process.stdout.close()
            raise
        loop.add_reader(self._pipe, self._read)
        loop.add_reader(self._watch, self._end)

    def _read(self) -> None:
        try:
            data = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._pipe)
        self._output += data[:OUTPUT_MOST - len(self._output)]

    def _kill(self) -> None:
        # Before the process is waited for: until then nobody else gets its number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end(self) -> None:
        """It has ended; what it left behind is to end, too."""
        self._kill()
        self._loop.remove_reader(self._watch)
        os.close(self._watch)
        self._watch = -1
        status = self._process.wait()
        if not self.ended.done():
            self.ended.set_result(status)

    def close(self) -> bytes:
        """End it, and return the beginning of what it said."""
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._read()
        self._loop.remove_reader(self._pipe)
        self._process.stdout.close()
        if self._watch >= 0:
            self._kill()  # it is waited for when it is gone, whoever waits for its result
        return bytes(self._output)
