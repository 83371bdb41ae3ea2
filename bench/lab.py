# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Namespaces, links and processes of one measurement; owns all of them and leaves none behind.

A :class:`Lab` is a context manager: whatever happens inside, its processes are ended, its
namespaces deleted and its directory removed. Children also get the parent's death signal, so that
SIGKILL on the benchmark ends them too; :func:`sweep` removes what is left of such a run.
It never touches the namespace it was started in, nor a process it did not start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

PREFIX = "lbb"
DIRECTORY = "lbapp-bench-"
NAMED = Path("/run/netns")
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 4.0

SYSCTLS = {
    "net/ipv4/ip_local_port_range": "1024 65535",
    "net/ipv4/ip_local_reserved_ports": "5201",
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/tcp_timestamps": "1",
    "net/ipv4/tcp_max_syn_backlog": "8192",
    "net/core/somaxconn": "8192",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
"""The same in every namespace of every target: enough ports, and their reuse after TIME_WAIT."""

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class BenchError(Exception):
    """Something that keeps a target from being measured; the text is for the operator."""


def die_with_parent() -> None:
    """Between fork and exec: have the kernel kill the child when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def raise_open_files(limit: int) -> int:
    """Let this process and its children hold up to ``limit`` open files; returns what was granted."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (max(hard, limit), hard):  # the first needs CAP_SYS_RESOURCE
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, most), most))
            break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def tail(text: str, lines: int = 4) -> str:
    """The last lines of a program's output, on one line."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])


class Namespace:
    """One network namespace: one host, in this benchmark."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def inode(self) -> int:
        """What ``/proc/PID/ns/net`` of its processes shows."""
        return (NAMED / self.name).stat().st_ino

    def argv(self, *command: str) -> list[str]:
        """The command line that runs ``command`` in here."""
        return ["ip", "netns", "exec", self.name, *command]

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in here, in a thread of its own, and return what it returns.

        Sockets made in it stay in the namespace.
        """
        outcome: list[T] = []
        failure: list[BaseException] = []

        def enter() -> None:
            try:
                with (NAMED / self.name).open() as handle:
                    if _libc.setns(handle.fileno(), CLONE_NEWNET):
                        code = ctypes.get_errno()
                        raise OSError(code, os.strerror(code), self.name)
                outcome.append(function())
            except BaseException as error:  # handed to the caller below
                failure.append(error)

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def connect(self, address: str, port: int, timeout: float = 5.0) -> socket.socket:
        """A TCP connection made from in here."""
        return self.call(lambda: socket.create_connection((address, port), timeout))

    def sysctl(self, settings: Mapping[str, str]) -> None:
        """Set kernel parameters of this namespace; keys are paths below /proc/sys."""
        def write() -> None:
            for path, value in settings.items():
                (Path("/proc/sys") / path).write_text(value)
        self.call(write)


class Process:
    """A child that runs until it is stopped; its output goes to a file."""

    def __init__(self, label: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.label, self.popen, self.log = label, popen, log

    @property
    def pid(self) -> int:
        """Its process id (``ip netns exec`` is replaced by the program, so it is the program's)."""
        return self.popen.pid

    def last_words(self) -> str:
        """The end of its output."""
        try:
            return tail(self.log.read_text(errors="replace")) or "(no output)"
        except OSError:
            return "(no output)"

    def check(self) -> None:
        """Raise BenchError if it is no longer running."""
        code = self.popen.poll()
        if code is not None:
            raise BenchError(f"{self.label} ended with status {code}: {self.last_words()}")

    def stop(self) -> None:
        """End it: asked first, forced after the grace period."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()


class Lab:
    """The namespaces, links, processes and files of one measurement."""

    def __init__(self) -> None:
        self._namespaces: list[Namespace] = []
        self._processes: list[Process] = []
        self._cleanups: list[Callable[[], None]] = []
        self.directory = Path(tempfile.mkdtemp(prefix=f"{DIRECTORY}{os.getpid()}-"))
        self.directory.chmod(0o755)  # nginx's workers read from it

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End and remove everything; what fails is skipped, and no second Ctrl-C stops it half-way."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            self._close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def _close(self) -> None:
        for cleanup in reversed(self._cleanups):
            with contextlib.suppress(Exception):
                cleanup()
        for process in reversed(self._processes):
            with contextlib.suppress(OSError):
                process.stop()
        for namespace in self._namespaces:
            _remove(namespace.name)
        self._cleanups, self._processes, self._namespaces = [], [], []
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """All of its namespaces."""
        return tuple(self._namespaces)

    def on_close(self, cleanup: Callable[[], None]) -> None:
        """Call ``cleanup`` when the lab closes, before its processes are stopped."""
        self._cleanups.append(cleanup)

    def namespace(self, label: str) -> Namespace:
        """Make a namespace with loopback up and the benchmark's kernel parameters."""
        namespace = Namespace(f"{PREFIX}{os.getpid()}-{label}")
        self._namespaces.append(namespace)
        self.ip([f"netns add {namespace.name}"])
        self.ip(["link set lo up"], namespace)
        namespace.sysctl(SYSCTLS)
        return namespace

    def ip(self, lines: Iterable[str], namespace: Namespace | None = None) -> None:
        """Run lines of ``ip -batch``, in a namespace if one is given."""
        where = ["-n", namespace.name] if namespace is not None else []
        self.run(["ip", *where, "-batch", "-"], text="\n".join(lines) + "\n")

    def link(self, one: Namespace, one_port: str, other: Namespace, other_port: str) -> None:
        """Join two namespaces by a veth pair whose ends are up."""
        self.ip([f"link add {one_port} netns {one.name} type veth peer name {other_port} netns {other.name}"])
        self.ip([f"link set {one_port} up"], one)
        self.ip([f"link set {other_port} up"], other)

    def spawn(self, namespace: Namespace, label: str, argv: Sequence[str],
              env: Mapping[str, str] | None = None) -> Process:
        """Start a process that lives until the lab closes.

        Args:
            namespace: where it runs.
            label: its name in messages, and its log file's.
            argv: program and arguments.
            env: environment variables added to ours.
        """
        log = self.directory / f"{label}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                namespace.argv(*argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent, start_new_session=True, env={**os.environ, **(env or {})})
        process = Process(label, popen, log)
        self._processes.append(process)
        # Until ip has entered the namespace, the process is still in ours: who joins it by its id would miss.
        inside, end = namespace.inode, time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(OSError):  # it has ended already; whoever needs it will say so
            while Path(f"/proc/{popen.pid}/ns/net").stat().st_ino != inside and time.monotonic() < end:
                time.sleep(0.001)
        return process

    def run(self, argv: Sequence[str], *, text: str | None = None, timeout: float = 30.0,
            env: Mapping[str, str] | None = None) -> str:
        """Run a command to its end and return its standard output.

        Raises:
            BenchError: it failed, or took longer than ``timeout`` seconds.
        """
        return self.run_all([argv], text=text, timeout=timeout, env=env)[0]

    def run_all(self, commands: Sequence[Sequence[str]], *, text: str | None = None, timeout: float = 30.0,
                env: Mapping[str, str] | None = None) -> list[str]:
        """Run commands side by side and return their standard outputs; errors as for :meth:`run`."""
        running: list[subprocess.Popen[str]] = []
        outputs = []
        end = time.monotonic() + timeout
        try:
            for argv in commands:
                running.append(subprocess.Popen(
                    list(argv), stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                    preexec_fn=die_with_parent, start_new_session=True, env={**os.environ, **(env or {})}))
            for argv, popen in zip(commands, running, strict=True):
                out, err = popen.communicate(text, timeout=max(0.1, end - time.monotonic()))
                if popen.returncode:
                    raise BenchError(f"{_short(argv)} failed with status {popen.returncode}: {tail(err or out)}")
                outputs.append(out)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{_short(error.cmd)} took longer than {timeout:.0f} s") from None
        except FileNotFoundError as error:
            raise BenchError(f"{error.filename} is not installed (make setup installs it)") from None
        finally:
            for popen in running:
                if popen.poll() is None:
                    popen.kill()
                    popen.wait()
        return outputs

    def wait_port(self, namespace: Namespace, address: str, port: int, process: Process,
                  patience: float = 15.0) -> None:
        """Wait until something accepts TCP connections; BenchError if ``process`` ends before or time is up."""
        end = time.monotonic() + patience
        while True:
            process.check()
            try:
                namespace.connect(address, port, 1.0).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise BenchError(f"{process.label} does not accept connections on {address}:{port} "
                                     f"after {patience:.0f} s ({error}): {process.last_words()}") from None
            time.sleep(0.05)


def _short(argv: Sequence[str] | str) -> str:
    words = argv.split() if isinstance(argv, str) else list(argv)
    if words[:3] == ["ip", "netns", "exec"]:
        words = words[4:]
    return " ".join(words[:4])


def _remove(name: str) -> None:
    """Delete a namespace of ours and end what still runs in it."""
    listing = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for word in listing.stdout.split():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(word), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def sweep() -> list[str]:
    """Remove namespaces, their processes and directories of benchmark runs that were killed; returns their names."""
    removed = []
    for path in sorted(NAMED.glob(f"{PREFIX}*-*")):
        found = re.fullmatch(rf"{PREFIX}(\d+)-.+", path.name)
        if found and not _exists(int(found[1])):
            _remove(path.name)
            removed.append(path.name)
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{DIRECTORY}*-*")):
        found = re.fullmatch(rf"{DIRECTORY}(\d+)-.+", path.name)
        if found and not _exists(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
