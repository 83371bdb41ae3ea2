# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The process that checks members: hears from the controller what to check, does it, says what changed.

A process of its own, on asyncio, so that packets never wait for checks. Owns the times at which checks begin, their
limits of time and number, and what is said to the controller. It ends when the controller hangs up.

What is to be said is kept by target, the newest only, while the controller does not read; so nothing here grows with
time. A check that could not be made for a reason of this host's own (no more files or ports) is no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import itertools
import logging
import os
import random
import resource
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import click

from lbapp.monitors import checks, namespace
from lbapp.monitors.checks import Check, Surroundings
from lbapp.monitors.errors import OUR_OWN, CheckFailed, printable
from lbapp.monitors.protocol import (
    TARGETS_MOST,
    Changed,
    Command,
    Lines,
    ProtocolError,
    Report,
    Setting,
    Statistics,
    Target,
    decode_command,
    decode_monitor,
    encode,
)
from lbapp.monitors.state import Health
from lbapp.monitors.stream import words

LOG = logging.getLogger("lbapp.monitors")

TELL_S = 0.05
"""What changed is collected for so long."""
LATENCIES_S = 1.0
STATISTICS_S = 5.0
LATE_S = 0.5
FILES = 65_536
FILES_SPARE = 64
RUNNING_MOST = 20_000
MESSAGES_MOST = 50
CHANGED_BATCH = 500
LATENCY_BATCH = 2000
WRITE_BUFFER = 1 << 20
GARBAGE_OBJECTS = 20_000
"""New objects after which the young ones are looked at for cycles (Python's own: 700)."""


class Watch:
    """One target, and what is known of it."""

    __slots__ = ("check", "due", "gone", "health", "key", "serial", "target", "task")

    def __init__(self, setting: Setting, target: Target, check: Check) -> None:
        self.key, self.serial, self.target, self.check = setting.key, setting.serial, target, check
        self.health = Health(target.monitor, setting.up)
        self.due = 0.0
        self.gone = False
        self.task: asyncio.Task[None] | None = None


class Checker:
    """Carries out checks, each at its time.

    Args:
        around: what checks share.
        most: how many run at the same time; the others wait.
    """

    def __init__(self, around: Surroundings, most: int) -> None:
        self._loop, self._around, self._most = around.loop, around, most
        self.watches: dict[str, Watch] = {}
        self.changed: dict[str, Changed] = {}
        self.latencies: dict[str, float] = {}
        self.news = asyncio.Event()
        self._queue: list[tuple[float, int, Watch]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._waiting = self._checks = self._late = 0
        self._complained: dict[str, float] = {}

    # ------------------------------------------------------------------ what is checked

    def take(self, command: Command) -> None:
        """Do what the controller says."""
        for key in command.remove:
            self._remove(key)
        new = []
        monitors: dict[bytes, Any] = {}
        for setting in command.set:
            raw = bytes(setting.monitor)
            try:
                monitor = monitors.get(raw) or monitors.setdefault(raw, decode_monitor(raw))
                target = Target(address=setting.address, port=setting.port, monitor=monitor)
                before = self.watches.get(setting.key)
                if before is not None and before.target == target:
                    # As it is, but for what reports are to say: the controller may have missed the last one.
                    self._again(before, setting)
                    continue
                self._remove(setting.key)
                if len(self.watches) >= TARGETS_MOST:
                    self._complain("more targets than %d: the others are not checked", TARGETS_MOST)
                    continue
                watch = Watch(setting, target, checks.make(target, self._around))
            except Exception as error:
                self._complain("%s is not checked: %s", setting.key, printable(str(error)))
                continue
            self.watches[setting.key] = watch
            new.append(watch)
        self._waiting += len(new)
        now = self._loop.time()
        for watch in new:
            self._put(watch, now + watch.health.first(random.random(), self._waiting))
        self._arm()

    def _again(self, watch: Watch, setting: Setting) -> None:
        watch.serial = setting.serial
        if watch.health.up is not None and watch.health.up != setting.up:
            self._tell(watch, "", None)

    def _remove(self, key: str) -> None:
        watch = self.watches.pop(key, None)
        if watch is None:
            return
        watch.gone = True
        if not watch.health.checks:
            self._waiting -= 1
        if watch.task is not None:
            watch.task.cancel()
        self.changed.pop(key, None)
        self.latencies.pop(key, None)
        if len(self._queue) > 1024 and len(self._queue) > 2 * (len(self.watches) + 1):
            self._queue = [entry for entry in self._queue if not entry[2].gone]
            heapq.heapify(self._queue)

    # ------------------------------------------------------------------ at its time

    def _put(self, watch: Watch, due: float) -> None:
        watch.due = due
        heapq.heappush(self._queue, (due, next(self._order), watch))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue and len(self._running) < self._most:
            self._timer = self._loop.call_at(self._queue[0][0], self._begin)

    def _begin(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._queue and self._queue[0][0] <= now and len(self._running) < self._most:
            watch = heapq.heappop(self._queue)[2]
            if watch.gone:
                continue
            if now - watch.due > LATE_S:
                self._late += 1
            task = watch.task = self._loop.create_task(self._run(watch))
            self._running.add(task)
            task.add_done_callback(self._ended)
        self._arm()

    def _ended(self, task: asyncio.Task[None]) -> None:
        full = len(self._running) >= self._most
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("a check ended in an unforeseen way: %s: %s", type(error).__name__, printable(str(error)))
        if full or self._timer is None:
            self._arm()

    async def _run(self, watch: Watch) -> None:
        begun = self._loop.time()
        if watch.check.gate is None:
            good, reason, seconds = await self._attempt(watch)
        else:
            async with watch.check.gate:  # whoever waits here does not fail by that
                good, reason, seconds = await self._attempt(watch)
        watch.task = None
        if watch.gone:
            return
        if good or reason:
            self._result(watch, good, reason, seconds)
        due = begun + watch.health.pause(random.random())
        self._put(watch, max(due, self._loop.time()))
        if self._queue[0][2] is watch:
            self._arm()

    async def _attempt(self, watch: Watch) -> tuple[bool, str, float | None]:
        """Check once: whether it went well, else why not (empty: it could not be tried), seconds if they count."""
        begun = self._loop.time()
        timeout = watch.target.monitor.timeout
        try:
            async with asyncio.timeout(timeout):
                measured = await watch.check.run()
            return True, "", self._loop.time() - begun if measured else None
        except CheckFailed as error:
            return False, str(error), None
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                return watch.check.silence_is_good, f"no {watch.check.lacks} within {timeout:g} s", None
            if error.errno not in OUR_OWN:
                return False, words(error), None
            self._complain("checks are left out: %s", words(error))
            return False, "", None
        except Exception as error:
            self._complain("%s: the check went wrong: %s: %s", checks.of(watch.target.monitor), type(error).__name__,
                           printable(str(error)))
            return False, "the check itself went wrong; see the log", None

    def _result(self, watch: Watch, good: bool, reason: str, seconds: float | None) -> None:
        health = watch.health
        self._checks += 1
        if not health.checks:
            self._waiting -= 1
        if health.take(good, seconds):
            self._tell(watch, "" if good else reason, seconds)
        if good and seconds is not None and health.latency is not None:
            self.latencies[watch.key] = health.latency

    def _tell(self, watch: Watch, reason: str, seconds: float | None) -> None:
        self.changed[watch.key] = Changed(key=watch.key, up=bool(watch.health.up), reason=printable(reason),
                                          seconds=seconds, checks=watch.health.checks, serial=watch.serial)
        self.news.set()

    def _complain(self, text: str, *values: Any) -> None:
        """What goes wrong here is said once a minute."""
        now = self._loop.time()
        said = text % values
        if now - self._complained.get(said, -60.0) < 60.0:
            return
        if len(self._complained) > 200:
            self._complained.clear()
        self._complained[said] = now
        LOG.warning("%s", said)

    @property
    def statistics(self) -> Statistics:
        """See there."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Statistics(targets=len(self.watches), checks=self._checks, late=self._late, running=len(self._running),
                          cpu_seconds=used.ru_utime + used.ru_stime)

    def close(self) -> None:
        """Begin no more, and end what runs."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._running:
            task.cancel()


class _Log(logging.Handler):
    """Keeps what is for the controller's log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take it; what is too much is left out."""
        if len(self.messages) < MESSAGES_MOST:
            self.messages.append((record.levelno, printable(record.getMessage(), 400)))


class _Wire(asyncio.Protocol):
    """What the controller says, and whether it reads."""

    def __init__(self, checker: Checker) -> None:
        self._checker, self._lines = checker, Lines()
        self.free = True
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Do what it says."""
        try:
            for line in self._lines.feed(data):
                self._checker.take(decode_command(line))
        except ProtocolError as error:
            self.end(f"the controller says what makes no sense: {error}")

    def eof_received(self) -> None:
        """It hung up."""
        self.end("")

    def connection_lost(self, _error: Exception | None) -> None:
        """It is gone."""
        self.end("")

    def pause_writing(self) -> None:
        """It does not read."""
        self.free = False

    def resume_writing(self) -> None:
        """It reads again."""
        self.free = True

    def end(self, why: str) -> None:
        """It is over."""
        if not self.over.done():
            self.over.set_result(why)

    async def connect(self) -> asyncio.WriteTransport:
        """Take standard input and output: one socket, or two pipes."""
        loop = asyncio.get_running_loop()
        if stat.S_ISSOCK(os.fstat(0).st_mode):
            return (await loop.create_unix_connection(lambda: self, sock=socket.socket(fileno=os.dup(0))))[0]
        await loop.connect_read_pipe(lambda: self, os.fdopen(os.dup(0), "rb", 0))
        return (await loop.connect_write_pipe(lambda: self, os.fdopen(os.dup(1), "wb", 0)))[0]


async def _speak(checker: Checker, log: _Log, out: asyncio.WriteTransport, wire: _Wire) -> None:
    loop = asyncio.get_running_loop()
    statistics_at = latencies_at = 0.0
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATENCIES_S):
                await checker.news.wait()
        await asyncio.sleep(TELL_S)
        if not wire.free:
            continue
        checker.news.clear()
        messages, log.messages = log.messages, []
        now = loop.time()
        statistics = None
        if now >= statistics_at:
            statistics_at, statistics = now + STATISTICS_S, checker.statistics
        latencies: list[tuple[str, float]] = []
        if now >= latencies_at:
            latencies_at = now + LATENCIES_S
            latencies = list(checker.latencies.items())
            checker.latencies.clear()
        changed = list(checker.changed.values())
        checker.changed.clear()
        if messages or statistics is not None:
            _say(out, Report(messages=messages, statistics=statistics))
        for batch in _batches(changed, CHANGED_BATCH):
            _say(out, Report(changed=batch))
        for part in _batches(latencies, LATENCY_BATCH):
            _say(out, Report(latencies=part))


def _batches(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start:start + size] for start in range(0, len(values), size)]


def _say(out: asyncio.WriteTransport, report: Report) -> None:
    out.write(encode(report) + b"\n")


def _complain(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody foresaw is told in a line."""
    error = context.get("exception")
    LOG.error("%s: %s", context.get("message", "a fault"), printable(f"{type(error).__name__}: {error}"))


async def serve(scripts: Path | None, log: _Log, most: int) -> str:
    """Work until the controller hangs up; returns why it is over, where that is a fault."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_complain)
    checker = Checker(Surroundings(loop, scripts), most)
    wire = _Wire(checker)
    out = await wire.connect()
    out.set_write_buffer_limits(high=WRITE_BUFFER)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wire.end, "")
    speaking = loop.create_task(_speak(checker, log, out, wire))
    try:
        either: list[asyncio.Future[Any]] = [wire.over, speaking]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if speaking.done():
            return f"{type(speaking.exception()).__name__}: {speaking.exception()}"
        return wire.over.result()
    finally:
        checker.close()
        speaking.cancel()
        out.abort()


def open_files() -> int:
    """Allow as many open files as may be; returns how many checks may run at the same time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # An external command needs three.
    return max(16, min(RUNNING_MOST, (max(soft, wanted) - FILES_SPARE) // 2))


@click.command()
@click.option("--scripts", type=click.Path(path_type=Path), help="Directory of external checks.")
@click.option("--netns", type=click.Path(path_type=Path), help="Network namespace to work in.")
@click.option("--log-level", default="INFO", show_default=True)
def main(scripts: Path | None, netns: Path | None, log_level: str) -> None:
    """Check members: commands on standard input, reports on standard output."""
    log = _Log()
    logger = logging.getLogger("lbapp")
    logger.handlers[:] = [log]
    logger.propagate = False
    logger.setLevel(log_level.upper())
    # Checks make few cycles; what was imported need not be looked through for them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 50)
    try:
        if netns is not None:
            namespace.enter(netns)
        why = asyncio.run(serve(scripts, log, open_files()))
    except OSError as error:
        why = f"{error.filename or 'members cannot be checked'}: {words(error)}"
    if why:
        os.write(1, encode(Report(messages=[(logging.ERROR, printable(why))])) + b"\n")
        sys.exit(1)
