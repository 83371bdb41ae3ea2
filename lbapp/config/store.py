# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration store: follows the database, and changes it.

Owns the session with the database and the one current :class:`Snapshot`. What the database
holds is what is configured, whoever wrote it: a change of ours becomes visible here when the
database reports it, like anybody else's. Never decides what a change means for traffic.

Under eventlet's monkey patching the threads here are greenlets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lbapp.config import ovsdb, rows
from lbapp.config.changes import (
    Change,
    Conflict,
    Create,
    Delete,
    Expect,
    Invalid,
    NotFound,
    Plan,
    StoreError,
    Unavailable,
    Update,
    new_id,
    plan,
)
from lbapp.config.mirror import Mirror
from lbapp.config.model import Configuration
from lbapp.config.snapshot import Snapshot

__all__ = ["Change", "Conflict", "Create", "Delete", "Expect", "Invalid", "NotFound", "Snapshot", "Store",
           "StoreError", "Unavailable", "Update", "new_id"]

LOG = logging.getLogger(__name__)

DATABASE = "lbapp"
ANSWER_SECONDS = 120.0
"""For one transaction: tens of thousands of rows take the database some seconds."""
QUEUE_SECONDS = 60.0
"""How long a change waits for the one before it."""
SEEN_SECONDS = 5.0
RACE_SECONDS = 15.0
"""How long a change is derived again and again while other processes keep changing things first."""
_BACKOFF = (0.05, 0.1, 0.2, 0.5, 1.0)

Changes = Sequence[Change] | Callable[[Snapshot], Sequence[Change]]
Callback = Callable[[Configuration], None]


class Store:
    """The configuration, kept in an OVSDB database.

    Args:
        remote: ``unix:PATH`` or ``tcp:HOST:PORT``, or several with commas between them.
        revive: called before each attempt to connect again; may start the database. What it
            raises is logged.

    Raises:
        ValueError: ``remote`` is neither.
    """

    def __init__(self, remote: str, revive: Callable[[], None] | None = None) -> None:
        ovsdb.addresses(remote)
        self.remote = remote
        self._revive = revive
        self._mirror = Mirror()
        self._snapshot = Snapshot()
        self._rejected: Mapping[str, str] = {}
        self._subscribers: list[Callback] = []
        self._writing = threading.Lock()
        self._news = threading.Condition()
        self._session: ovsdb.Session | None = None
        self._first = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # -------------------------------------------------------------- life

    def start(self, seconds: float = 30.0) -> None:
        """Connect and read everything; keep following from then on, across lost connections.

        Raises:
            Unavailable: not within ``seconds``.
        """
        self._thread = threading.Thread(target=self._follow, name="store", daemon=True)
        self._thread.start()
        if not self._first.wait(seconds):
            self.stop()
            raise Unavailable(f"no configuration database at {self.remote}")

    def stop(self) -> None:
        """Disconnect. The database itself is left alone."""
        self._stopped.set()
        session = self._session
        if session is not None:
            session.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    # -------------------------------------------------------------- what is configured

    @property
    def configuration(self) -> Configuration:
        """The current configuration; the last known one while the database is away."""
        return self._snapshot.configuration

    @property
    def snapshot(self) -> Snapshot:
        """The current configuration with its revisions."""
        return self._snapshot

    @property
    def available(self) -> bool:
        """Whether the database is connected."""
        return self._session is not None and self._first.is_set()

    @property
    def rejected(self) -> Mapping[str, str]:
        """Rows left out because they do not validate: row id to reason."""
        return self._rejected

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Have each new configuration passed to ``callback``, in order.

        It is called from the store's own thread (greenlet), before the change's
        :meth:`apply` returns: it should be quick, and must not call :meth:`apply`.

        Returns:
            What ends it.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return unsubscribe

    # -------------------------------------------------------------- changes

    def apply(self, changes: Changes) -> Snapshot:
        """Make changes in one transaction: all of them, on disk and seen by every subscriber, or none.

        Args:
            changes: or a function that derives them from a snapshot; it is called again when
                somebody else changed the database at the same time, so it should do nothing else.

        Returns:
            A snapshot that has the changes.

        Raises:
            Invalid, NotFound, Conflict: nothing was changed.
            Unavailable: the database is away. If it went away during the transaction, nobody
                knows yet whether it was made; the snapshot will tell.
        """
        if not self._writing.acquire(timeout=QUEUE_SECONDS):
            raise Unavailable("the configuration database is busy with another change")
        try:
            deadline = time.monotonic() + RACE_SECONDS
            while True:
                snapshot = self._snapshot
                asked = changes(snapshot) if callable(changes) else changes
                planned = plan(snapshot, asked)
                if not self.available:
                    raise Unavailable("the configuration database is not available")
                if not planned.operations:
                    return snapshot
                if self._commit(planned):
                    self._wait(planned.generation, SEEN_SECONDS)
                    return self._snapshot
                if time.monotonic() > deadline:
                    raise Conflict("other changes were made at the same time, again and again")
                # Another process was first. Its change is on its way here, or here.
                self._wait(snapshot.settings.generation + 1, 0.1)
        finally:
            self._writing.release()

    def check(self, changes: Changes) -> None:
        """Raise what :meth:`apply` would raise for these changes now, and change nothing."""
        snapshot = self._snapshot
        plan(snapshot, changes(snapshot) if callable(changes) else changes)

    def _commit(self, planned: Plan) -> bool:
        """Send one transaction; False where it came too late."""
        session = self._session
        if session is None:
            raise Unavailable("the configuration database is not available")
        self._mirror.expected = planned.expected
        try:
            answer = session.call("transact", [DATABASE, *planned.operations], ANSWER_SECONDS)
        except ovsdb.Lost as error:
            raise Unavailable(f"the configuration database went away ({error}); "
                              "whether the change was made will show when it is back") from None
        except ovsdb.Refused as error:
            raise Unavailable(f"the configuration database refused: {error}") from None
        finally:
            self._mirror.expected = {}
        failed = _failure(bytes(answer))
        if failed is None:
            return True
        kind, details = failed["error"], failed.get("details", "")
        if kind == "timed out" or (kind == "constraint violation" and "Settings" in details):
            return False
        if kind == "constraint violation" and "index on" in details:
            columns = details.partition("index on ")[2].partition(".")[0]
            # Not seen in the snapshot, so it is a row left out of it, or one written just now.
            raise Conflict(f"not unique in the database: {columns}; the log names the rows that are left out")
        if kind == "referential integrity violation":
            raise Conflict("in use by, or refers to, a row that changed at the same time")
        if kind == "constraint violation":
            raise Invalid(f"the database refused: {details}")
        LOG.error("the configuration database could not commit: %s", json.dumps(failed))
        why = failed.get("io-error")  # such as a disk that is full
        raise Unavailable(f"the configuration database could not write: {details or kind}{f': {why}' if why else ''}")

    def _wait(self, generation: int, seconds: float) -> None:
        with self._news:
            self._news.wait_for(lambda: self._snapshot.settings.generation >= generation, seconds)

    # -------------------------------------------------------------- following the database

    def _follow(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            try:
                session = ovsdb.Session(self.remote)
            except OSError as error:
                self._lost(failures, error)
                failures += 1
                continue
            try:
                self._serve(session)
            except (ovsdb.Lost, ovsdb.Refused) as error:
                failures = 0 if self._session is not None else failures
                self._session = None
                self._lost(failures, error)
            except Exception:
                self._session = None
                if self._stopped.is_set():
                    return  # the socket was closed under a read: that is how it is stopped
                LOG.exception("cannot follow the configuration database")
                self._lost(len(_BACKOFF), None)
            finally:
                self._session = None
                session.release()
            failures += 1

    def _serve(self, session: ovsdb.Session) -> None:
        request = {table: {"columns": columns} for table, columns in rows.MONITORED.items()}
        dump = session.ask("monitor", [DATABASE, "configuration", request], ANSWER_SECONDS)
        self._take(ovsdb.decode_updates(dump), whole=True)
        del dump
        self._session = session
        if not self._first.is_set():
            self._first.set()
        else:
            LOG.warning("connected to the configuration database again")
        session.receive(self._take)

    def _take(self, updates: ovsdb.Updates, whole: bool = False) -> None:
        before = self._snapshot
        after = self._mirror.take(before, updates, whole)
        with self._news:
            self._rejected = dict(self._mirror.rejected)
            self._snapshot = after
            self._news.notify_all()
        if after.configuration is before.configuration:
            return
        for callback in tuple(self._subscribers):
            try:
                callback(after.configuration)
            except Exception:
                LOG.exception("a subscriber failed on the new configuration")

    def _lost(self, failures: int, error: Exception | None) -> None:
        if self._stopped.is_set():
            return
        if failures == 0 and error is not None:
            LOG.warning("no connection to the configuration database: %s", error)
        time.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
        if self._revive is None or self._stopped.is_set():
            return
        try:
            self._revive()
        except Exception as failure:
            LOG.error("cannot start the configuration database: %s", failure)


def _failure(answer: bytes) -> dict[str, str] | None:
    """The error in a transaction's results, if there is one."""
    if b'"error"' not in answer:
        return None
    return next((one for one in msgspec.json.decode(answer) if one and "error" in one), None)
