# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, and processes inside them.

A namespace is known by a process that lives in it, so nothing has to be cleaned up in the file
system, and it is gone when that process is. Every process started here is ended by the kernel
when the process that started it ends, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class CommandError(Exception):
    """A command in a namespace failed. The message holds the command and what it said."""


def end(process: subprocess.Popen[Any], patience: float = 3.0) -> None:
    """End a process: it is asked, and killed if it does not listen."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def wait_until(condition: Callable[[], Any], timeout: float, what: str, every: float = 0.05) -> Any:
    """Call ``condition`` until it is true, and return what it gave.

    Raises:
        TimeoutError: it was not within ``timeout`` seconds; the message names ``what``.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(every)


def file_tail(path: Path, lines: int) -> str:
    """The last lines of a file; empty where there is none."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def unavailable() -> str | None:
    """Why network namespaces cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        return "network namespaces cannot be made on this machine"
    return None


class Namespace:
    """The network namespace of a process.

    Args:
        name: for messages.
        pid: a process that lives in it.
    """

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._processes: list[subprocess.Popen[Any]] = []

    @classmethod
    def create(cls, name: str) -> Namespace:
        """Make a new one, with loopback up. :meth:`close` ends it.

        Raises:
            CommandError: not root, or the kernel refuses.
        """
        holder = subprocess.Popen([*_with_us(), "unshare", "--net", "sleep", "infinity"],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  start_new_session=True)  # a Ctrl-C on the terminal is for us alone
        outside = Path("/proc/self/ns/net").stat().st_ino
        try:
            def inside() -> bool:
                if holder.poll() is not None:
                    assert holder.stderr is not None
                    raise CommandError(f"cannot make a network namespace: {holder.stderr.read().decode().strip()}")
                # Until unshare has become sleep, the process is still where it was started.
                return (Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n"
                        and Path(f"/proc/{holder.pid}/ns/net").stat().st_ino != outside)

            wait_until(inside, 5, f"a network namespace for {name}", every=0.005)
            namespace = cls(name, holder.pid)
            namespace._processes.append(holder)
            namespace.run("ip", "link", "set", "lo", "up")
        except BaseException:
            end(holder)
            raise
        return namespace

    @property
    def prefix(self) -> tuple[str, ...]:
        """A command that runs another one inside."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net")

    def close(self) -> None:
        """End every process that was started through this object, and the namespace with them."""
        while self._processes:
            end(self._processes.pop())

    # ---------------------------------------------------------------- processes

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a process inside; it ends with :meth:`close` or with this process at the latest.

        It is a session leader, so that a Ctrl-C on the terminal reaches only us.
        """
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("start_new_session", True)
        process = subprocess.Popen([*_with_us(), *self.prefix, *argv], **options)
        # Ended ones need not be remembered: thousands of short ones are started in a test run.
        self._processes = [known for known in self._processes if known.poll() is None] + [process]
        return process

    def run(self, *argv: str, timeout: float = 30.0, check: bool = True,
            stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end.

        Raises:
            CommandError: it failed and ``check`` is true, or took longer than ``timeout`` seconds.
        """
        try:
            done = subprocess.run([*self.prefix, *argv], input=stdin or "", capture_output=True, text=True,
                                  errors="replace", timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise CommandError(f"{self.name}: no end within {timeout:g} s: {' '.join(argv)}") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise CommandError(f"{self.name}: {' '.join(argv)} gave {done.returncode}: {said}")
        return done

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is inside for the time of the block; sockets made there stay inside for ever."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.enter()
            yield
        finally:
            _setns(before)
            os.close(before)

    def enter(self) -> None:
        """Move the calling thread inside, for good."""
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)


def _with_us() -> tuple[str, ...]:
    """A command that runs another one and has the kernel end it when we end.

    For the kernel "we" is a thread: what a passing thread starts must not end with it. TERM, so
    that nginx and the controller can end their own children.
    """
    if threading.current_thread() is threading.main_thread():
        return ("setpriv", "--pdeathsig", "TERM")
    return ()


def _setns(descriptor: int) -> None:
    if _LIBC.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")
