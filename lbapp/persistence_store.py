# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is known again, on disk: what lets clients meet their members after a restart of the controller.

Owns a SQLite database, ``persistence.db`` in the state directory (mode 0600), and writes what has changed once a
second, in native threads: no packet waits for a disk. Ages are kept by the wall clock, because a controller that was
away knows no other; when that clock is set while the controller runs, what is kept moves with it. Decides nothing, and
never stops anything: with a full disk or a broken file traffic goes on, one line in the log says so, and what could not
be written is tried again, as far as there is room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eventlet
from eventlet import patcher, tpool

from lbapp.control.persistence import Changes, Clients, Kept

threading: Any = patcher.original("threading")
"""Locks that native threads share."""

LOG = logging.getLogger("lbapp.persistence")

FILE = "persistence.db"
INTERVAL = 1.0
PURGE_SECONDS = 60.0
"""How often what is over is deleted."""
AT_ONCE = 5000
"""Changes that are gathered before others have their turn."""
MOST_PENDING = 1 << 20
"""Changes that wait for a disk that does not take them; the oldest are lost."""
JUMP_SECONDS = 1.0
"""A wall clock that has moved so much more or less than the time that went by was set."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS clients (
    pool TEXT NOT NULL, key BLOB NOT NULL, kind TEXT NOT NULL, member INTEGER NOT NULL, used REAL NOT NULL,
    expires REAL NOT NULL, PRIMARY KEY (pool, key)) WITHOUT ROWID
"""
_WRITE = "INSERT OR REPLACE INTO clients VALUES (?, ?, ?, ?, ?, ?)"

Row = tuple[str, bytes, str, int, float, float]


class Pending:
    """What is to be written: first what is cleared, then what is there or is no more (None)."""

    def __init__(self) -> None:
        self.cleared: dict[tuple[str, int], None] = {}
        self.entries: OrderedDict[tuple[str, bytes], Row | None] = OrderedDict()
        self.lost = 0
        self.shift = 0.0

    def __bool__(self) -> bool:
        return bool(self.cleared or self.entries or self.shift)

    def move(self, seconds: float) -> None:
        """The wall clock was set forward by so much (or back): what is written, and what waits here, moves along."""
        self.shift += seconds
        for key, row in self.entries.items():
            if row is not None:
                self.entries[key] = (*row[:4], row[4] + seconds, row[5] + seconds)

    def add(self, changes: Changes, clock: float) -> None:
        """Take changes over; ``clock`` is the time now, on the wall."""
        for pool, member in changes.cleared:
            for key in [key for key, row in self.entries.items()
                        if pool in ("", key[0]) and row is not None and member in (0, row[3])]:
                del self.entries[key]
            self.cleared[pool, member] = None
        for one in changes.entries:
            key = (one.pool, one.key)
            self.entries.pop(key, None)  # what changed last is lost last
            used = clock - one.age
            self.entries[key] = (*key, one.kind, one.member, used, used + one.timeout) if one.member else None
        while len(self.entries) > MOST_PENDING:
            self.entries.popitem(last=False)
            self.lost += 1


class PersistenceStore:
    """The database. Its methods block: they are for native threads, one at a time.

    Args:
        directory: the state directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def _opened(self) -> sqlite3.Connection:
        """Open the file, or make it. One that is none is put aside."""
        if self._connection is not None:
            return self._connection
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # no room, no right to: nothing is wrong with what is in it
            aside = self.path.with_suffix(".broken")
            LOG.warning("%s cannot be read (%s); it is put aside as %s, and who is known is learnt anew", self.path,
                        error, aside.name)
            self.path.replace(aside)
            for journal in ("-wal", "-shm"):
                self.path.with_name(f"{FILE}{journal}").unlink(missing_ok=True)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self.path.chmod(0o600)
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            # After a power failure the last seconds may be gone, but the file is good.
            connection.execute("PRAGMA synchronous=NORMAL")
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            connection.execute(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def load(self, clock: float) -> list[Kept]:
        """What was kept and is not over.

        Raises:
            OSError, sqlite3.Error: it cannot be read.
        """
        with self._lock:
            rows = self._opened().execute(
                "SELECT pool, key, kind, member, used, expires FROM clients WHERE expires > ?", (clock,))
            # A clock that was set back: nobody has connected in the future.
            return [Kept(pool, key, kind, member, max(clock - used, 0.0), expires - used)
                    for pool, key, kind, member, used, expires in rows if isinstance(key, bytes)]

    def write(self, pending: Pending, purge: float | None = None) -> None:
        """Write changes, all or none; with ``purge`` also delete what was over by then.

        Raises:
            OSError, sqlite3.Error: nothing was written.
        """
        with self._lock:
            try:
                self._write(self._opened(), pending, purge)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._close()  # it is looked at when it is opened again
                raise

    @staticmethod
    def _write(connection: sqlite3.Connection, pending: Pending, purge: float | None) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            if pending.shift:
                connection.execute("UPDATE clients SET used = used + ?, expires = expires + ?", (pending.shift,) * 2)
            for pool, member in pending.cleared:
                connection.execute("DELETE FROM clients WHERE (? = '' OR pool = ?) AND (? = 0 OR member = ?)",
                                   (pool, pool, member, member))
            connection.executemany("DELETE FROM clients WHERE pool = ? AND key = ?",
                                   [key for key, row in pending.entries.items() if row is None])
            connection.executemany(_WRITE, [row for row in pending.entries.values() if row is not None])
            if purge is not None:
                connection.execute("DELETE FROM clients WHERE expires <= ?", (purge,))
            connection.execute("COMMIT")
        except BaseException:
            # Where there is no transaction any more, SQLite has ended it.
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise


class Keeper:
    """Keeps what the control segment knows of clients.

    Args:
        clients: who is known.
        store: where it is kept.
        elsewhere: runs what blocks without holding up anything else.
    """

    def __init__(self, clients: Clients, store: PersistenceStore,
                 elsewhere: Callable[..., Any] = tpool.execute) -> None:
        self._clients = clients
        self._store = store
        self._elsewhere = elsewhere
        self._pending = Pending()
        self._working = False
        self._purged = float("-inf")
        self._ahead = time.time() - time.monotonic()
        self._thread: Any = None
        self.failing = False

    def read(self) -> list[Kept]:
        """What was kept; empty where that cannot be read."""
        try:
            kept: list[Kept] = self._elsewhere(self._store.load, time.time())
            return kept
        except (OSError, sqlite3.Error) as error:
            self._failed(error)
            return []

    def start(self, kept: list[Kept]) -> None:
        """Have clients known again, and keep them from now on; to be called once there is a configuration."""
        restored = self._clients.restore(kept, time.monotonic())
        if restored:
            LOG.info("%d clients are known from before", restored)
        self._thread = eventlet.spawn(self._work)

    def _work(self) -> None:
        while True:
            eventlet.sleep(INTERVAL)
            try:
                self.keep()
            except Exception:
                LOG.exception("keeping clients failed; going on")

    def keep(self) -> None:
        """Write what has changed."""
        if self._working:
            return
        self._working = True
        try:
            self._keep()
        finally:
            self._working = False

    def _keep(self) -> None:
        now, clock = time.monotonic(), time.time()
        jumped, self._ahead = clock - now - self._ahead, clock - now
        if abs(jumped) >= JUMP_SECONDS:
            LOG.warning("the clock was set by %+.0f s; clients are known for as long as before", jumped)
            self._pending.move(jumped)
        while True:
            changes = self._clients.changes(now, AT_ONCE)
            self._pending.add(changes, clock)
            if len(changes.entries) < AT_ONCE:
                break
            eventlet.sleep(0)
        purge = clock if now - self._purged >= PURGE_SECONDS else None
        if not self._pending and purge is None:
            return
        writing, self._pending = self._pending, Pending()
        try:
            self._elsewhere(self._store.write, writing, purge)
        except (OSError, sqlite3.Error) as error:
            self._failed(error)
            self._pending = writing  # only this adds to it, so nothing has come meanwhile
        else:
            self._purged = now if purge is not None else self._purged
            if self.failing:
                LOG.info("clients are kept in %s again; %d changes were lost", self._store.path, writing.lost)
            self.failing = False

    def _failed(self, error: Exception) -> None:
        if not self.failing:
            LOG.error("clients cannot be kept in %s: %s; traffic goes on, and after a restart they are not known",
                      self._store.path, error)
        self.failing = True

    def stop(self) -> None:
        """Write what is left."""
        if self._thread is not None:
            self._thread.kill()
            self._thread = None
        self._elsewhere = lambda function, *arguments: function(*arguments)
        self.keep()
        self._store.close()
