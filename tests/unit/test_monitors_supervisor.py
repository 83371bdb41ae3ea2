# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.supervisor: the process is told what to check, heard, and started again, in threads and greenlets."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.monitors import supervisor
from lbapp.monitors.supervisor import Changed, Monitors, Target
from tests.monitored import closed_port, silent, target, tcp_server
from topologies.namespace import wait_until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


class Heard:
    """What was called back."""

    def __init__(self) -> None:
        self.changes: list[Changed] = []
        self.latencies: dict[str, float] = {}

    def changed(self, found: list[Changed]) -> None:
        self.changes += found

    def timed(self, found: list[tuple[str, float]]) -> None:
        self.latencies.update(found)

    @property
    def states(self) -> list[tuple[str, bool]]:
        return [(one.key, one.up) for one in self.changes]

    def wait(self, count: int) -> list[tuple[str, bool]]:
        wait_until(lambda: len(self.changes) >= count, PATIENCE, f"{count} changes")
        return self.states


Make = Callable[..., tuple[Monitors, Heard]]


@pytest.fixture
def make() -> Iterator[Make]:
    with contextlib.ExitStack() as stack:
        def start(**options: Any) -> tuple[Monitors, Heard]:
            heard = Heard()
            monitors = Monitors(heard.changed, heard.timed, **options)
            stack.callback(monitors.close)
            return monitors, heard

        yield start


def often(port: int, **fields: Any) -> Target:
    return target(port, **{"type": "TCP", "interval": 5, "fast_interval": 0.1, "timeout": 5, **fields})


def gone(pid: int | None) -> bool:
    return pid is not None and not Path(f"/proc/{pid}").exists()


def test_members_come_go_and_change(make: Make) -> None:
    monitors, heard = make()
    assert (monitors.pid, monitors.statistics, monitors.starts) == (None, None, 0)
    with tcp_server(silent) as port, closed_port() as closed:
        refusing = closed.getsockname()[1]
        targets = {"a": often(port), "b": often(refusing)}
        monitors.update(targets)
        assert sorted(heard.wait(2)) == [("a", True), ("b", False)]
        assert {one.key: one.reason for one in heard.changes} == {"a": "", "b": "connection refused"}
        wait_until(lambda: "a" in heard.latencies, PATIENCE, "a response time")
        assert heard.latencies.keys() == {"a"} and heard.latencies["a"] > 0
        # As they are, in another object and another order; one more; one that is not any more.
        monitors.update({"c": often(port, rise=1), "a": often(port)})
        assert heard.wait(3)[2:] == [("c", True)]
        monitors.update({"a": often(refusing), "c": often(port, rise=1)})
        assert heard.wait(4)[3:] == [("a", False)]
        assert heard.changes[3].checks == 1  # a new definition: its first result counts
        wait_until(lambda: monitors.statistics is not None and monitors.statistics.targets == 2, PATIENCE,
                   "two are left")
    assert heard.wait(5)[4:] == [("c", False)]
    pid = monitors.pid
    monitors.close()
    assert gone(pid) and monitors.starts == 1
    monitors.update({"a": often(1)})  # too late, and no fault


def test_a_process_that_is_killed_is_started_again_and_states_stay(make: Make,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.05,))
    monitors, heard = make()
    with tcp_server(silent) as port:
        monitors.update({"a": often(port, fall=2), "b": often(port, fall=2)})
        assert sorted(heard.wait(2)) == [("a", True), ("b", True)]
        for restarts in (1, 2):
            first, pid = monitors.statistics, monitors.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda restarts=restarts: monitors.starts == 1 + restarts and monitors.pid, PATIENCE,  # type: ignore[misc]
                       "another process")
            wait_until(lambda first=first: monitors.statistics is not first, PATIENCE, "it speaks")  # type: ignore[misc]
            wait_until(lambda: monitors.statistics and monitors.statistics.checks >= 2, PATIENCE, "both checked")
        assert len(heard.changes) == 2  # nothing had changed
    assert sorted(heard.wait(4)[2:]) == [("a", False), ("b", False)]
    assert all(one.checks >= 2 for one in heard.changes[2:])  # one bad result does not undo what is known


def test_nobody_waits_for_a_process_that_does_not_read(make: Make) -> None:
    monitors, heard = make()
    with closed_port() as closed:
        one = target(closed.getsockname()[1], type="TCP")
        monitors.update({"first": one})
        heard.wait(1)
        pid = monitors.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            done = threading.Event()

            def much() -> None:
                for turn in range(20):
                    monitors.update({f"{turn}:{index}:{'x' * 200}": one for index in range(2000)})
                done.set()

            threading.Thread(target=much, daemon=True).start()
            assert done.wait(PATIENCE)
            assert len(monitors._untold) <= 22 * 2000  # one entry a target, however often it was set
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: monitors.statistics is not None and monitors.statistics.targets == 2000, PATIENCE,
                   "the last ones are checked")
        wait_until(lambda: len({one.key for one in heard.changes if one.key.startswith("19:")}) == 2000, PATIENCE,
                   "all of them")
        assert monitors.starts == 1


def test_a_process_that_falls_silent_is_ended(make: Make, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(supervisor, "SILENCE_S", 8.0)  # it speaks every five
    monkeypatch.setattr(supervisor, "ENDING_S", 0.2)
    monitors, heard = make()
    with closed_port() as closed, caplog.at_level(logging.WARNING, "lbapp.monitors"):
        monitors.update({"a": target(closed.getsockname()[1], type="TCP")})
        heard.wait(1)
        pid = monitors.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: monitors.starts >= 2, PATIENCE, "another process")
        assert gone(pid)
    assert caplog.records[0].getMessage().startswith("members are not checked: the process has said nothing for 8 s")


@pytest.mark.parametrize(("command", "why"), [
    (["/nonexistent"], "it cannot be started: No such file or directory"),
    ([sys.executable, "-c", "print('hello')"], "the process says what makes no sense: JSON is malformed"),
    ([sys.executable, "-c", "import os; os.write(1, b'x' * (5 << 20))"],
     "the process says what makes no sense: a message of more than 4194304 bytes"),
    ([sys.executable, "-c", "raise SystemExit(3)"], "the process ended with status 3"),
    ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "the process was ended by signal 9"),
])
def test_what_is_no_process_of_ours(make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                    command: list[str], why: str) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.01, 600.0))
    monitors, heard = make()
    monitors._arguments = command
    with caplog.at_level(logging.WARNING, "lbapp.monitors"):
        monitors.update({"a": often(1)})
        wait_until(lambda: len(caplog.records) == 2, PATIENCE, "it was tried twice")
        monitors.close()  # though the next attempt is far away
    said = [record.getMessage() for record in caplog.records]
    assert all(one.startswith(f"members are not checked: {why}") for one in said), said
    assert said[1].endswith("in 600 s")
    assert heard.changes == []


def test_what_is_done_with_changes_may_fail(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    monitors, heard = make()
    seen: list[int] = []

    def fail_once(found: list[Changed]) -> None:
        seen.append(len(found))
        if len(seen) == 1:
            raise ZeroDivisionError
        heard.changed(found)

    monitors._on_changed = fail_once
    with closed_port() as closed, caplog.at_level(logging.ERROR, "lbapp.monitors"):
        one = target(closed.getsockname()[1], type="TCP")
        monitors.update({"a": one})
        wait_until(lambda: seen, PATIENCE, "the first one")
        monitors.update({"a": one, "b": one})
        assert heard.wait(1) == [("b", False)]
    assert [record.getMessage() for record in caplog.records] == ["what the monitors found could not be used"]


def test_its_log_is_the_controllers(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    monitors, _ = make()
    with caplog.at_level(logging.WARNING, "lbapp.monitors"):
        monitors.update({"a": Target(address="no address", port=1, monitor=often(1).monitor),
                         "b": often(1)})
        wait_until(lambda: caplog.records, PATIENCE, "a word about it")
    assert (caplog.records[0].levelno, caplog.records[0].getMessage()) == (
        logging.WARNING, "a is not checked: 'no address' is no address")


GREEN = """
import eventlet
eventlet.monkey_patch()
import sys, threading, time
sys.path.insert(0, {root!r})
import msgspec
from lbapp.config.monitor import Monitor
from lbapp.monitors.supervisor import Monitors, Target

ticks = longest = 0
def tick():
    global ticks, longest
    while True:
        begun = time.monotonic()
        eventlet.sleep(0.01)
        longest = max(longest, time.monotonic() - begun)
        ticks += 1

eventlet.spawn(tick)
changes, times = [], {{}}
monitors = Monitors(changes.extend, times.update)
monitor = msgspec.convert({{"type": "TCP", "interval": 20, "timeout": 20}}, Monitor)
monitors.update({{f"{{index}}": Target(address="127.0.0.1", port={port}, monitor=monitor) for index in range(500)}})
deadline = time.monotonic() + {patience}
while (len(changes) < 500 or len(times) < 500) and time.monotonic() < deadline:
    eventlet.sleep(0.02)
pid, before = monitors.pid, ticks
assert all(one.up for one in changes), changes
import os, signal
os.kill(pid, signal.SIGSTOP)  # it does not read, and nobody notices
monitors.update({{f"{{index}}-{{'x' * 300}}": Target(address="127.0.0.1", port={port}, monitor=monitor)
                 for index in range(20000)}})
eventlet.sleep(0.5)
os.kill(pid, signal.SIGCONT)
eventlet.sleep(0.2)
monitors.close()
print(len(changes) >= 500, len(times) >= 500, ticks - before > 5, os.path.exists(f"/proc/{{pid}}"))
"""


def test_it_is_the_same_in_green_threads() -> None:
    with tcp_server(silent) as port:
        program = GREEN.format(root=str(ROOT), port=port, patience=PATIENCE)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True,
                              timeout=150, check=False)
    assert (done.stdout, done.returncode) == ("True True True False\n", 0), done.stderr


def test_the_socket_is_not_left_to_others(make: Make) -> None:
    """A process that outlived the controller because a script held its end would be worse than none."""
    monitors, heard = make()
    with closed_port() as closed:
        monitors.update({"a": target(closed.getsockname()[1], type="TCP")})
        heard.wait(1)
    connection = monitors._socket
    assert isinstance(connection, socket.socket) and not connection.get_inheritable()
