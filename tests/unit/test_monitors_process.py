# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.process: when checks begin, what is told; and the process as a whole, over pipes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lbapp.monitors import checks, namespace
from lbapp.monitors import process as module
from lbapp.monitors.checks import Check, Surroundings
from lbapp.monitors.process import Checker
from lbapp.monitors.protocol import Command, Report, Setting, Target, commands, decode_report, encode_monitor
from tests.monitored import command, silent, target, tcp_server

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


class Scripted(Check):
    """A check that does what the test says.

    Attributes:
        results: of each address, what its checks do, one after the other; the last one for ever.
    """

    results: dict[str, list[Any]] = {}
    running = most = 0

    def __init__(self, target: Target, around: Surroundings) -> None:
        self.target = target  # its address is but a name

    async def run(self) -> bool:
        """See :class:`Check`."""
        results = Scripted.results[self.target.address]
        one = results.pop(0) if len(results) > 1 else results[0]
        Scripted.running += 1
        Scripted.most = max(Scripted.most, Scripted.running)
        try:
            if callable(one):
                await one()
            elif isinstance(one, BaseException):
                raise one
        finally:
            Scripted.running -= 1
        return True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    monkeypatch.setattr(checks, "make", Scripted)
    Scripted.results, Scripted.running, Scripted.most = {}, 0, 0
    yield Scripted.results
    Scripted.results = {}


def run(with_checker: Callable[[Checker], Awaitable[Any]], most: int = 1000) -> Any:
    async def inner() -> Any:
        checker = Checker(Surroundings(asyncio.get_running_loop()), most)
        try:
            async with asyncio.timeout(PATIENCE):
                return await with_checker(checker)
        finally:
            checker.close()
            await asyncio.sleep(0)

    return asyncio.run(inner())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def quick(address: str, **fields: Any) -> Target:
    return target(80, address, **{"type": "TCP", "interval": 0.05, "fast_interval": 0.05, "timeout": 0.05,
                                  "jitter": 0, **fields})


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_a_state_is_told_when_it_changes_and_not_before(scripted: dict[str, list[Any]]) -> None:
    scripted["a"] = [True, REFUSED, True, REFUSED, REFUSED, REFUSED, True, True, True]
    told: list[tuple[bool, str, int, bool]] = []

    async def watch(checker: Checker) -> None:
        checker.take(command(("a", quick("a", rise=2, fall=3))))
        while len(told) < 3:
            await checker.news.wait()
            checker.news.clear()
            one = checker.changed.pop("a")
            told.append((one.up, one.reason, one.checks, one.seconds is not None))

    run(watch)
    assert told == [(True, "", 1, True), (False, "connection refused", 6, False), (True, "", 8, True)]


def test_response_times_are_those_of_good_checks(scripted: dict[str, list[Any]]) -> None:
    scripted["a"], scripted["b"] = [True], [REFUSED]

    async def watch(checker: Checker) -> dict[str, float]:
        checker.take(command(("a", quick("a")), ("b", quick("b"))))
        await until(lambda: checker.statistics.checks >= 6)
        return checker.latencies

    found = run(watch)
    assert found.keys() == {"a"} and found["a"] >= 0


def test_a_new_definition_begins_again_and_an_old_one_goes_on(scripted: dict[str, list[Any]]) -> None:
    scripted["a"] = scripted["b"] = [True]

    async def watch(checker: Checker) -> None:
        checker.take(command(("a", quick("a")), ("b", quick("b"))))
        await until(lambda: len(checker.changed) == 2)
        first = dict(checker.watches)
        checker.changed.clear()
        checker.take(command(("b", quick("b", rise=5)), ("a", quick("a"))))
        assert checker.watches["a"] is first["a"] and checker.watches["b"] is not first["b"]
        # What is known of the old one is told again: the controller does not seem to know.
        assert checker.changed["a"].up and checker.changed["a"].serial == 1
        await until(lambda: "b" in checker.changed)
        assert (checker.changed["b"].serial, checker.watches["b"].serial) == (0, 0)
        checker.take(command(remove=("a", "b", "nobody")))
        assert not checker.watches and not checker.changed and not checker.latencies
        before = checker.statistics.checks
        await asyncio.sleep(0.2)
        assert checker.statistics.checks == before

    run(watch)


def test_what_is_known_is_not_unknown(scripted: dict[str, list[Any]]) -> None:
    scripted["a"] = [REFUSED]
    monitor = encode_monitor(quick("a", fall=3).monitor)
    known = Setting(key="a", address="a", port=80, monitor=monitor, serial=5, up=True)

    async def watch(checker: Checker) -> int:
        checker.take(Command(set=[known]))
        await checker.news.wait()
        return checker.changed["a"].checks

    assert run(watch) == 3


def test_only_so_many_run_at_the_same_time_and_the_others_are_late(scripted: dict[str, list[Any]],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LATE_S", 0.05)
    names = [f"{index}" for index in range(10)]
    for name in names:
        scripted[name] = [lambda: asyncio.sleep(0.1)]

    async def watch(checker: Checker) -> int:
        checker.take(command(*((name, quick(name, timeout=30, interval=30)) for name in names)))
        await until(lambda: len(checker.changed) == len(names))
        assert all(one.up for one in checker.changed.values())
        return checker.statistics.late

    assert run(watch, most=3) > 0
    assert Scripted.most == 3


def test_a_check_that_takes_longer_than_its_time_has_failed(scripted: dict[str, list[Any]]) -> None:
    scripted["a"] = [lambda: asyncio.sleep(3600)]

    async def watch(checker: Checker) -> str:
        checker.take(command(("a", quick("a", interval=1, timeout=0.25))))
        await checker.news.wait()
        return checker.changed["a"].reason

    assert run(watch) == "no answer within 0.25 s"
    assert Scripted.running == 0


def test_what_this_host_lacks_is_no_fault_of_the_member(scripted: dict[str, list[Any]],
                                                        caplog: pytest.LogCaptureFixture) -> None:
    scripted["a"] = [OSError(errno.EMFILE, "x"), OSError(errno.EADDRNOTAVAIL, "x"), True, True]

    async def watch(checker: Checker) -> tuple[bool, int]:
        checker.take(command(("a", quick("a"))))
        await checker.news.wait()
        return checker.changed["a"].up, checker.changed["a"].checks

    with caplog.at_level(logging.WARNING, "lbapp.monitors"):
        assert run(watch) == (True, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "checks are left out: too many open files", "checks are left out: no free port of this host"]


def test_a_fault_of_ours_is_told_without_a_traceback(scripted: dict[str, list[Any]],
                                                     caplog: pytest.LogCaptureFixture) -> None:
    scripted["a"] = [ZeroDivisionError("oh"), ZeroDivisionError("oh"), True]

    async def watch(checker: Checker) -> str:
        checker.take(command(("a", quick("a", fall=1))))
        await checker.news.wait()
        reason = checker.changed["a"].reason
        await until(lambda: checker.watches["a"].health.up)
        return reason

    with caplog.at_level(logging.WARNING, "lbapp.monitors"):
        assert run(watch) == "the check itself went wrong; see the log"
    (record,) = caplog.records  # once, though it happened twice
    assert record.getMessage() == "TCP monitor tcp: the check went wrong: ZeroDivisionError: oh"
    assert record.exc_info is None


def test_what_cannot_be_checked_is_said_and_the_rest_is_checked(scripted: dict[str, list[Any]],
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    scripted["a"] = [True]
    monkeypatch.setattr(module, "TARGETS_MOST", 2)
    bad = Setting(key="bad", address="a", port=80, monitor=msgspec.Raw(b'{"type":"X"}'))

    async def watch(checker: Checker) -> set[str]:
        checker.take(Command(set=[bad]))
        checker.take(command(*((name, quick("a")) for name in "xyz")))
        await until(lambda: len(checker.changed) == 2)
        return set(checker.watches)

    with caplog.at_level(logging.WARNING, "lbapp.monitors"):
        assert run(watch) == {"x", "y"}
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "bad is not checked", "more targets than 2"]


def test_many_that_come_and_go_leave_nothing(scripted: dict[str, list[Any]]) -> None:
    scripted["a"] = [True]

    async def watch(checker: Checker) -> None:
        one = quick("a", interval=3600)
        for _ in range(10):
            checker.take(command(*((f"{index}", one) for index in range(500))))
            checker.take(command(remove=tuple(f"{index}" for index in range(500))))
        assert len(checker._queue) <= 1024
        assert checker._waiting == 0

    run(watch)


# ------------------------------------------------------------------ the process


class Process:
    """The process over two pipes."""

    def __init__(self, *arguments: str) -> None:
        self.child = subprocess.Popen([sys.executable, "-m", "lbapp.monitors", *arguments], cwd=ROOT,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, data: bytes) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(data)
        self.child.stdin.flush()

    def reports(self) -> Iterator[Report]:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            yield decode_report(line)

    def end(self) -> int:
        assert self.child.stdin is not None
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        return self.child.wait(PATIENCE)


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(*arguments: str) -> Process:
        made.append(Process(*arguments))
        return made[-1]

    yield start
    for one in made:
        one.child.kill()
        one.child.wait()
        for stream in (one.child.stdin, one.child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def test_the_process_checks_and_ends_when_it_is_not_needed(started: Callable[..., Process]) -> None:
    process = started()
    with tcp_server(silent) as port:
        process.say(b"".join(commands([("k", target(port, type="TCP"), 7, None)], [])))
        changed: list[Any] = []
        latencies: list[Any] = []
        statistics = None
        for report in process.reports():
            changed += report.changed
            latencies += report.latencies
            statistics = report.statistics or statistics
            if changed and latencies and statistics is not None and statistics.checks:
                break
    assert [(one.key, one.up, one.serial, one.checks) for one in changed] == [("k", True, 7, 1)]
    assert latencies[0][0] == "k" and latencies[0][1] > 0
    assert statistics is not None
    assert (statistics.targets, statistics.checks, statistics.cpu_seconds > 0) == (1, 1, True)
    assert process.end() == 0


def test_nonsense_ends_the_process_with_a_word(started: Callable[..., Process]) -> None:
    process = started()
    process.say(b'{"set": 7}\n')
    messages = [text for report in process.reports() for _, text in report.messages]
    assert len(messages) == 1 and messages[0].startswith("the controller says what makes no sense: Expected `array`")
    assert process.end() == 1


def test_what_is_no_network_namespace_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
        namespace.enter(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        namespace.enter(tmp_path / "none")


def test_a_network_namespace_that_does_not_exist(started: Callable[..., Process], tmp_path: Path) -> None:
    process = started("--netns", str(tmp_path / "none"))
    (report,) = process.reports()
    assert report.messages == [(logging.ERROR, f"{tmp_path}/none: no such file or directory")]
    assert process.end() == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_works_in_the_network_namespace_it_is_given(started: Callable[..., Process], netns: Any) -> None:
    inside = netns("monitors")
    process = started("--netns", f"/proc/{inside.pid}/ns/net")
    with tcp_server(silent) as port:  # listens here, and not in there
        process.say(b"".join(commands([("k", target(port, type="TCP"), 0, None)], [])))
        changed = next(report.changed for report in process.reports() if report.changed)
    assert [(one.up, one.reason) for one in changed] == [(False, "connection refused")]
    assert process.end() == 0
