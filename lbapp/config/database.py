# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The embedded configuration database: one ``ovsdb-server`` process on a file of ours.

Owns the directory with the database file, its schema version and the life of the server
process. Never reads or writes a row; that is :mod:`lbapp.config.store`.

The server outlives a controller that was killed: its next start adopts it from the pidfile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

LOG = logging.getLogger(__name__)

SCHEMA = Path(__file__).with_name("lbapp.ovsschema")
DATABASE = "lbapp"

TOOL_SECONDS = 60.0
"""How long one run of ``ovsdb-tool`` may take."""
START_SECONDS = 20.0
STOP_SECONDS = 10.0
_LONGEST_SOCKET_PATH = 100
"""``sun_path`` has 108 bytes; ovsdb-server appends a suffix while it binds."""


class DatabaseError(Exception):
    """The database cannot be created, upgraded, started or stopped; the text says why."""


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError:
        raise DatabaseError(f"{command[0]} is not installed (Debian package openvswitch-switch)") from None
    except subprocess.TimeoutExpired:
        raise DatabaseError(f"{command[0]} {command[1]} did not end within {TOOL_SECONDS:.0f} s") from None
    except OSError as error:
        raise DatabaseError(f"{command[0]} cannot be started: {error.strerror or error}") from None
    if done.returncode:
        raise DatabaseError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise DatabaseError(f"expected a schema version such as 1.0.0, got {text!r}") from None


class EmbeddedDatabase:
    """The database of one controller, in one directory of mode 0700.

    Args:
        directory: created where missing; holds the file, the socket, the pidfile and the log.
        schema: the schema file this program was written for.
    """

    def __init__(self, directory: str | Path, schema: Path = SCHEMA) -> None:
        self.directory = Path(directory).absolute()
        self.schema = schema
        self.file = self.directory / "lbapp.db"
        self.socket = self.directory / "db.sock"
        self.pidfile = self.directory / "ovsdb-server.pid"
        self.log = self.directory / "ovsdb-server.log"
        self.control = self.directory / "ovsdb-server.ctl"

    @property
    def remote(self) -> str:
        """Where to connect, in OVSDB's notation."""
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id, if it runs."""
        try:
            pid = int(self.pidfile.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        # The pid may have been given to another process since.
        return pid if command[0].endswith(b"ovsdb-server") and os.fsencode(self.file) in command else None

    def start(self) -> None:
        """Create or upgrade the database where needed, and start its server or adopt the running one.

        May be called again at any time; it then makes sure that the server runs.

        Raises:
            DatabaseError: with the reason, for people.
        """
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET_PATH:
            raise DatabaseError(f"{self.directory}: expected a shorter path, a Unix socket has to fit in it")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        except OSError as error:
            raise DatabaseError(f"{self.directory}: {error.strerror}") from None
        with self._exclusive():
            if self._adopt():
                return
            self._prepare_file()
            self._launch()

    def stop(self) -> None:
        """End the server; what was committed is on disk already."""
        pid = self.pid
        if pid is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                if self.pid != pid:
                    return
                time.sleep(0.02)
        raise DatabaseError(f"ovsdb-server (process {pid}) does not end")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Only one process at a time prepares a directory."""
        descriptor = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DatabaseError(f"{self.directory}: another process is preparing it") from None
                    time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def _adopt(self) -> bool:
        if self.pid is None:
            return False
        known = _version(_run("ovsdb-tool", "schema-version", str(self.schema)))
        if self._answers() and self._file_version() == known:
            LOG.info("using the configuration database that runs already (process %s)", self.pid)
            return True
        self.stop()
        return False

    def _answers(self, seconds: float = 5.0) -> bool:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(seconds)
        try:
            connection.connect(str(self.socket))
            connection.sendall(b'{"method":"echo","params":[],"id":0}')
            return bool(connection.recv(64))
        except OSError:
            return False
        finally:
            connection.close()

    def _file_version(self) -> tuple[int, ...]:
        return _version(_run("ovsdb-tool", "db-version", str(self.file)))

    def _prepare_file(self) -> None:
        if not self.file.exists():
            _run("ovsdb-tool", "create", str(self.file), str(self.schema))
            self.file.chmod(0o600)
            return
        name = _run("ovsdb-tool", "db-name", str(self.file))
        if name != DATABASE:
            raise DatabaseError(f"{self.file}: expected a database named {DATABASE}, found {name}")
        found, known = self._file_version(), _version(_run("ovsdb-tool", "schema-version", str(self.schema)))
        dotted = ".".join(map(str, found))
        if found > known:
            raise DatabaseError(f"{self.file}: its schema version {dotted} is newer than "
                                f"{'.'.join(map(str, known))}, the newest this lbapp knows; use a newer lbapp")
        if _run("ovsdb-tool", "needs-conversion", str(self.file), str(self.schema)) != "yes":
            return
        backup = self.file.with_name(f"{self.file.name}.backup-{dotted}-{time.time_ns()}")
        try:
            shutil.copy2(self.file, backup)
        except OSError as error:
            raise DatabaseError(f"{backup}: {error.strerror}") from None
        LOG.info("upgrading the configuration database from schema version %s; the old one is kept as %s",
                 dotted, backup)
        # Columns the old schema lacks come out empty, and empty means the model's default: no step of our own.
        _run("ovsdb-tool", "convert", str(self.file), str(self.schema))

    def _launch(self) -> None:
        # A server that was killed leaves these behind.
        for path in (self.socket, self.control):
            path.unlink(missing_ok=True)
        _run("ovsdb-server", "--detach", f"--pidfile={self.pidfile}", f"--log-file={self.log}",
             "--verbose=console:off", "--verbose=syslog:off", "--verbose=file:info",
             f"--remote=punix:{self.socket}", f"--unixctl={self.control}", str(self.file))
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self.pid is None:
                raise DatabaseError(f"ovsdb-server does not answer; see {self.log}")
            time.sleep(0.02)
