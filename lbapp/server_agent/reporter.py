# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Tells the controller how loaded the servers here are (004: "agents on the application servers").

Owns the loop, the sequence of the reports, their signature, and a connection to the controller of its own: so nothing
here ever holds up the announcements of what is adopted. What is measured is in ``measure.py`` and ``sources.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lbapp.client import ApiError, Client, ClientError
from lbapp.server_agent import report
from lbapp.server_agent.adopt import AdoptError
from lbapp.server_agent.measure import Meter
from lbapp.server_agent.report import Told
from lbapp.server_agent.sources import Sources, Value

LOG = logging.getLogger("lbapp.server_agent")

INTERVAL_S = 3.0
ANSWER_S = 2.0
LONGEST_S = 300.0
"""Between reports, whatever the controller says."""
FIRST_S = 1.0
"""After the start: then there is something to measure."""

Endpoints = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Reporting:
    """What is reported, and how.

    Attributes:
        only: report, and adopt no connections.
        values: of the operator's own; they take the place of measured ones of the same name.
        of_servers: whether ``cpu`` is that of the processes that listen, instead of the host's.
        interval: seconds between reports, at least; the controller may want fewer.
        key: the buses' shared key; None: reports are not signed.
    """

    only: bool = False
    values: tuple[Value, ...] = ()
    of_servers: bool = False
    interval: float = INTERVAL_S
    key: bytes | None = None


class Reporter:
    """The loop, step by step.

    Args:
        name: by which the controller knows this agent.
        endpoints: addresses and ports of the servers here, as they are then.
        connect: makes a client of the controller.
        meter: measures what the kernel tells.
        sources: the operator's own values.
        outside: a block in which the controller can be reached.
        clock: seconds since 1970.
    """

    def __init__(self, name: str, reporting: Reporting, endpoints: Callable[[], Iterable[tuple[str, int]]],
                 connect: Callable[[], Client], meter: Meter, sources: Sources,
                 outside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
                 clock: Callable[[], float] = time.time) -> None:
        self._name, self._reporting, self._endpoints, self._connect = name, reporting, endpoints, connect
        self._meter, self._sources, self._outside, self._clock = meter, sources, outside, clock
        self._run = secrets.token_bytes(report.RUN_BYTES)
        self._sequence = 0
        self._client: Client | None = None
        self._failure: str | None = None
        self._flags: tuple[str, ...] = ()
        self._wanted = 0.0

    def close(self) -> None:
        """Close the connection to the controller."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def told(self) -> Told:
        """The next report."""
        endpoints: Endpoints = tuple(dict.fromkeys(self._endpoints()))[:report.MOST_ENDPOINTS]
        measured = self._meter.measure(endpoints)
        for name in self._sources.names:
            measured.pop(name, None)  # the operator wants it measured otherwise: if that is missing, it is missing
        values = {name: value for name, value in {**measured, **self._sources.had()}.items() if math.isfinite(value)}
        self._sequence += 1
        return Told(self._run, self._sequence, self._clock(), endpoints, values)

    def step(self) -> bool:
        """Report once; returns whether the controller took it. What fails is said once."""
        try:
            told = self.told()
            key = self._reporting.key
            signature = None if key is None else report.sign(key, self._name, told)
            answer = self._call("PUT", "/report", report.document(told, signature))
        except (ClientError, AdoptError, OSError, ValueError) as error:
            if isinstance(error, ApiError) and error.status == 401:
                self.close()  # there may be another token next time
            if str(error) != self._failure:
                LOG.warning("the controller gets no report of this server's load: %s", error)
                self._failure = str(error)
            return False
        if self._failure is not None:
            LOG.info("the controller gets reports of this server's load again")
            self._failure = None
        said, wanted = (answer.get("flags"), answer.get("interval")) if isinstance(answer, dict) else (None, None)
        self._wanted = min(max(wanted, 0.0), LONGEST_S) if isinstance(wanted, float | int) and wanted > 0 else 0.0
        flags = tuple(str(flag)[:200] for flag in said[:report.MOST_VALUES]) if isinstance(said, list) else ()
        if flags and flags != self._flags:
            LOG.warning("reports do not count: %s", "; ".join(flags))
        self._flags = flags
        return True

    @property
    def pause(self) -> float:
        """Seconds until the next report."""
        return max(self._reporting.interval, self._wanted)

    def withdraw(self) -> bool:
        """Tell the controller that there will be no more. False if it does not know."""
        try:
            self._call("DELETE", "", None)
        except ClientError as error:
            LOG.info("the controller could not be told: %s", error)
            return False
        return True

    def run(self, stop: threading.Event) -> None:
        """Report until then."""
        try:
            stop.wait(min(FIRST_S, self._reporting.interval))
            while not stop.is_set():
                try:
                    self.step()
                except Exception:
                    LOG.exception("this server's load cannot be reported")
                stop.wait(self.pause)
        finally:
            if not self._reporting.only:
                self.close()

    def _call(self, method: str, path: str, body: Any) -> Any:
        with self._outside():
            if self._client is None:
                self._client = self._connect()
            return self._client.call(method, f"/v1/server-agents/{quote(self._name, safe='')}{path}", body,
                                     seconds=ANSWER_S)


@contextlib.contextmanager
def beside(reporter: Reporter, sources: Sources) -> Iterator[None]:
    """The loop in a thread, and the sources in theirs, for the time of the block.

    Threads are born in the network namespace of the caller.
    """
    stop = threading.Event()
    thread = threading.Thread(target=reporter.run, args=(stop,), name="reports", daemon=True)
    sources.start(stop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(2 * ANSWER_S)
