# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What an agent beside servers reports: ``lbapp.server_agent.measure`` and ``reporter``; the command."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

from lbapp import launcher
from lbapp.cli import cli
from lbapp.client import Client
from lbapp.server_agent import measure, process, sockets
from lbapp.server_agent.adopt import AdoptError, Listener
from lbapp.server_agent.measure import Meter
from lbapp.server_agent.report import Told, signed
from lbapp.server_agent.reporter import Reporter, Reporting, beside
from lbapp.server_agent.sources import Sources, read
from topologies.namespace import wait_until

KEY = b"0123456789abcdef0123456789abcdef"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------ what the kernel tells


@contextlib.contextmanager
def serving(family: socket.AddressFamily = socket.AF_INET, address: str = "127.0.0.1",
            clients: int = 0) -> Iterator[int]:
    """A listener with so many connections; yields its port."""
    with contextlib.ExitStack() as stack:
        both = address == "::"
        listener = stack.enter_context(socket.create_server((address, 0), family=family, dualstack_ipv6=both))
        port = listener.getsockname()[1]
        for _ in range(clients):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stack.enter_context(listener.accept()[0])
        yield port


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"),
                                                 (socket.AF_INET6, "::")])
def test_established_connections_of_a_server_are_counted(family: socket.AddressFamily, address: str) -> None:
    with serving(family, address, 3) as port, serving(clients=2) as other:
        assert measure.sockets([("127.0.0.1", port)]).established == 3
        assert measure.sockets([("127.0.0.1", port), ("127.0.0.1", other)]).established == 5
        assert measure.sockets([("127.0.0.2", port)]).established == 0
        assert measure.sockets([]) == (0, frozenset())
        found = measure.sockets([("127.0.0.1", 0)])  # all that listen; other programs may as well
        assert found.established >= 5 and len(found.listening) >= 2
        one = measure.sockets([("127.0.0.1", port)])
        assert len(one.listening) == 1 and os.getpid() in measure.owners(one.listening)
    assert measure.owners([]) == frozenset()


def test_who_waits_for_late_segments_is_no_client() -> None:
    """Nor is such a connection (TIME_WAIT) told of at all: there may be tens of thousands of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as client:
                listener.accept()[0].close()
                assert not client.recv(1)
        with socket.create_connection(("127.0.0.1", port)), listener.accept()[0]:
            wait_until(lambda: len([one for one in sockets.tcp(6) if one.port == port]) == 5, 5, "five wait")
            told = [one for one in sockets.tcp(sockets.LISTEN, sockets.ESTABLISHED) if one.port == port]
            assert [(one.address, one.state) for one in told] == [
                (bytes((127, 0, 0, 1)), sockets.LISTEN), (bytes((127, 0, 0, 1)), sockets.ESTABLISHED)]
            assert measure.sockets([("127.0.0.1", port)]).established == 1


def test_many_sockets_come_in_several_messages() -> None:
    with serving() as port, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert measure.sockets([("127.0.0.1", port)]).established == 100
        (listener,) = [one for one in sockets.tcp(sockets.LISTEN) if one.port == port]
        assert listener.inode in measure.sockets([("127.0.0.1", port)]).listening


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A message that says so (here: of a family that there is not), and what else can be measured is."""
    monkeypatch.setattr(sockets, "_BY_FAMILY", 19)  # a question that nobody answers
    with pytest.raises(OSError, match="does not list its TCP sockets"):
        list(sockets.tcp(sockets.LISTEN))
    assert "memory" in Meter().measure([("127.0.0.1", 80)])
    assert "clients cannot be measured" in caplog.text


def test_a_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    wait_until(lambda: "cpu" in meter.measure([]), 30, "two looks at the CPU")
    monkeypatch.setattr(measure, "SHORTEST_S", 3600.0)
    values = meter.measure([])
    assert "cpu" not in values  # too soon for another figure
    assert 0 < values["memory"] < 1 and values["memory_available"] > 0 and values["load"] >= 0
    assert values["cores"] == psutil.cpu_count() and values["clients"] == 0


def test_busy_and_idle_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        user = nice = system = irq = softirq = steal = 0.0
        idle = iowait = 0.0

    times = Times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    meter = Meter()
    times.user, times.system, times.idle, times.iowait = 2.0, 1.0, 8.0, 1.0
    assert meter.measure([])["cpu"] == 0.25
    times.idle += 0.1
    assert "cpu" not in meter.measure([])
    times.idle += 100
    assert meter.measure([])["cpu"] == 0.0
    times.idle -= 50  # some kernels' counters go back
    times.user += 60
    assert meter.measure([])["cpu"] == 1.0


def test_the_cpu_of_those_who_listen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    meter = Meter(of_servers=True, clock=lambda: now[0])
    with serving() as port:
        assert "cpu" not in meter.measure([("127.0.0.1", port)])
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        now[0] = 1.0
        used = meter.measure([("127.0.0.1", port)])["cpu"]
        assert 0.05 <= used <= 1.0  # 0.2 s of one of two cores, and whatever came besides
    now[0] = 100.0
    for _ in range(2):
        assert "cpu" not in meter.measure([("127.0.0.1", port)])  # nobody listens
        now[0] += 1
    assert len(messages(caplog)) == 1 and "no process is found that listens there" in messages(caplog)[0]


def test_what_cannot_be_measured_is_missing_and_said_once(monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    def refused(*_: Any) -> Any:
        raise OSError(13, "Permission denied")

    meter = Meter()
    monkeypatch.setattr(psutil, "virtual_memory", refused)
    monkeypatch.setattr(measure, "sockets", refused)
    monkeypatch.setattr(os, "getloadavg", refused)
    for _ in range(2):
        assert meter.measure([("10.0.0.1", 80)]).keys() <= {"cpu", "cores"}
    assert len(messages(caplog)) == 3 and "memory cannot be measured" in messages(caplog)[0]


# ------------------------------------------------------------------ the loop


class Controller:
    """Answers what ``answer`` is; remembers what it was told."""

    def __init__(self) -> None:
        self.answer: Any = {"flags": []}
        self.told: list[tuple[str, str, Any]] = []
        self.connected = 0

    def _asked(self, request: httpx.Request) -> httpx.Response:
        self.told.append((request.method, request.url.raw_path.decode(),
                          json.loads(request.content) if request.content else None))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, int):
            return httpx.Response(self.answer, json={"error": {"code": self.answer, "message": "no, thank you"}})
        return httpx.Response(200, json=self.answer)

    def connect(self) -> Client:
        self.connected += 1
        return Client("http://127.0.0.1:1", "token", transport=httpx.MockTransport(self._asked))


class Values:
    """In the place of sources, or of a meter."""

    def __init__(self, *names: str, **values: float) -> None:
        self.names, self.values = frozenset(names) | values.keys(), values

    def had(self) -> dict[str, float]:
        return self.values

    def measure(self, endpoints: Any) -> dict[str, float]:
        return dict(self.values)


def reporter(controller: Controller, own: Values | None = None,
             endpoints: Callable[[], Any] = lambda: [("10.0.0.1", 80), ("10.0.0.1", 80)], **options: Any) -> Reporter:
    measured: Any = Values(cpu=0.5, memory=0.25, odd=math.nan)
    return Reporter("a host", Reporting(**options), endpoints, controller.connect, measured,
                    own or Values(), clock=lambda: 123.5)  # type: ignore[arg-type]


def test_reports_are_numbered_and_complete() -> None:
    controller = Controller()
    one = reporter(controller, Values("missing", queue=7.0))
    assert one.step() and one.step()
    (method, path, first), (_, _, second) = controller.told
    assert (method, path) == ("PUT", "/v1/server-agents/a%20host/report")
    assert first == {"run": first["run"], "sequence": 1, "time": 123.5,
                     "servers": [{"address": "10.0.0.1", "port": 80}],
                     "values": {"cpu": 0.5, "memory": 0.25, "queue": 7.0}, "signature": None}
    assert len(bytes.fromhex(first["run"])) == 16 and second == {**first, "sequence": 2}
    again = reporter(controller)
    again.step()
    assert controller.told[-1][2]["run"] != first["run"]
    one.close()


def test_what_the_operator_measures_takes_the_place_of_what_is_measured() -> None:
    controller = Controller()
    reporter(controller, Values("memory", cpu=0.125)).step()
    assert controller.told[0][2]["values"] == {"cpu": 0.125}  # memory is missing rather than measured another way


def test_with_a_key_reports_are_signed() -> None:
    controller = Controller()
    reporter(controller, key=KEY).step()
    said = controller.told[0][2]
    told = Told(bytes.fromhex(said["run"]), said["sequence"], said["time"], (("10.0.0.1", 80),), said["values"])
    assert signed(bytes.fromhex(said["signature"]), KEY, "a host", told)


def test_failures_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller()
    one = reporter(controller)
    for answer in (503, 503, httpx.ConnectError("refused"), 401):
        controller.answer = answer
        assert not one.step()
    assert len(messages(caplog)) == 3 and "no, thank you" in messages(caplog)[0]
    controller.answer = {"flags": ["cpu: expected 0 to 1, got 7"]}
    assert one.step() and one.step()
    assert messages(caplog)[3:] == ["reports do not count: cpu: expected 0 to 1, got 7"]
    assert controller.connected == 2  # after the 401: there may be another token
    others: list[Any] = [[], None, {"flags": 1}, {}]
    for other in others:
        controller.answer = other
        assert one.step()


@pytest.mark.parametrize(("wanted", "pause"), [
    (1, 3.0), (5.5, 5.5), (1e9, 300.0), (-1, 3.0), (None, 3.0), ("9", 3.0), (float("1e400"), 300.0), (math.nan, 3.0)])
def test_the_controller_says_how_often(wanted: Any, pause: float) -> None:
    controller = Controller()
    one = reporter(controller)
    assert one.pause == 3.0
    controller.answer = {"flags": [], "interval": 20}
    one.step()
    assert one.pause == 20
    one._call = lambda *_: {"flags": [], "interval": wanted}  # type: ignore[method-assign]
    one.step()
    assert one.pause == pause


def test_addresses_that_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    def none() -> Any:
        raise AdoptError("this host's addresses cannot be listed")

    controller = Controller()
    assert not reporter(controller, endpoints=none).step()
    assert controller.told == [] and "cannot be listed" in messages(caplog)[0]


def test_the_loop_ends_when_it_is_told_to() -> None:
    controller = Controller()
    one = reporter(controller, interval=0.01)
    with beside(one, Sources([], 1)):
        wait_until(lambda: len(controller.told) >= 3, 60, "three reports")
    count = len(controller.told)
    assert not [thread for thread in threading.enumerate() if thread.name == "reports"]
    assert one.withdraw() and controller.told[count:] == [("DELETE", "/v1/server-agents/a%20host", None)]
    controller.answer = 404
    assert not one.withdraw()


def test_servers_that_are_reported() -> None:
    def own() -> list[str]:
        return ["10.0.0.51", "fd00::51"]

    named = process.Settings("x", (Listener("10.0.0.51", 80),), (80, 81))
    assert named.reported(own) == [("10.0.0.51", 80), ("10.0.0.51", 81), ("fd00::51", 80), ("fd00::51", 81)]
    assert process.Settings("x").reported(own) == [("10.0.0.51", 0), ("fd00::51", 0)]


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in ("LBAPP_URL", "LBAPP_TOKEN", "LBAPP_TOKEN_FILE", "LBAPP_DEBUG", "LBAPP_BUS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LBAPP_STATE_DIR", str(tmp_path))
    ran: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "run_server_agent", lambda **options: ran.update(options))

    def run(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, ["--token", "t", "server-agent", *words], prog_name="lbapp")
        assert result.exit_code == code, result.output
        return result.stderr if code else ran["settings"].reporting

    return run


def test_the_command_line(command: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    assert command("--listen-port", "80") == Reporting()
    assert command("--report-only", "--value", "queue=command:/bin/queue -n", "--value", "cpu=http:http://h/#cpu",
                   "--cpu", "servers", "--report-interval", "1.5", "--bus-key", str(key)) == Reporting(
        True, (read("queue=command:/bin/queue -n"), read("cpu=http:http://h/#cpu")), True, 1.5, KEY)


def test_the_command_line_is_checked(command: Any, tmp_path: Path) -> None:
    assert "--value: expected NAME=" in command("--report-only", "--value", "x", code=2)
    assert "--value: x: expected once" in command("--report-only", *["--value", "x=command:/x"] * 2, code=2)
    assert "cannot read the key file" in command("--report-only", "--bus-key", str(tmp_path / "none"), code=1)
    (tmp_path / "open").write_bytes(KEY)
    (tmp_path / "open").chmod(0o644)
    assert "chmod 600" in command("--report-only", "--bus-key", str(tmp_path / "open"), code=1)
