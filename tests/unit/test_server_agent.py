# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.server_agent.process`` against a REST interface, a kernel and interfaces that are made up; the command."""

from __future__ import annotations

import errno
import json
import logging
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from lbapp import launcher
from lbapp.cli import cli
from lbapp.client import Client, ClientError
from lbapp.dataflow.fastpath.netlink import IFF_UP, Filter, Link, NetlinkError
from lbapp.server_agent import adopt, process
from lbapp.server_agent.adopt import Listener
from lbapp.server_agent.listening import listening
from lbapp.server_agent.process import Lease, ServerAgent, Settings

ONE, TWO = "00" * 16, "ab" * 16


class Controller:
    """Answers what ``answer`` is; an exception, or a status, is one. Remembers what it was told."""

    def __init__(self) -> None:
        self.answer: Any = {"cookie_keys": [ONE, None], "window_scale": 7, "lease_seconds": 10}
        self.told: list[tuple[str, str, Any]] = []
        self.tokens: list[str] = []
        self.connected = 0

    def _asked(self, request: httpx.Request) -> httpx.Response:
        self.told.append((request.method, request.url.raw_path.decode(),
                          json.loads(request.content) if request.content else None))
        self.tokens.append(request.headers["Authorization"])
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, int):
            return httpx.Response(self.answer, json={"error": {"code": self.answer, "message": "no, thank you"}})
        return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json=self.answer)

    def connect(self) -> Client:
        self.connected += 1
        return Client("http://127.0.0.1:1", f"token-{self.connected}", transport=httpx.MockTransport(self._asked))

    def announced(self) -> list[list[tuple[str, int]]]:
        return [[(one["address"], one["port"]) for one in body["listeners"]] for method, _, body in self.told
                if method == "PUT"]


class Tables:
    """In the place of a loaded program."""

    program = 42

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.refused = 0
        self.scale: int | None = None

    def set_listeners(self, listeners: Any) -> None:
        self.listeners = list(listeners)

    def set_keys(self, keys: Any) -> None:
        self.events.append(("keys", *(key and key.hex() for key in keys)))

    def set_window_scale(self, scale: int) -> None:
        self.scale = scale

    def counters(self) -> dict[str, int]:
        return {"refused": self.refused}


class Interfaces:
    """In the place of rtnetlink: interfaces, and the filters at their ingress."""

    def __init__(self, events: list[Any], *names: str) -> None:
        self.events = events
        self.there = {name: Link(index, name, IFF_UP | (8 if name == "lo" else 0), 1500, b"", "", 0, "")
                      for index, name in enumerate(names, 1)}
        self.at: dict[int, Filter] = {}
        self.clsact: set[int] = set()
        self.gone: set[int] = set()

    def links(self) -> dict[str, Link]:
        return self.there

    def clsacts(self) -> set[int]:
        return self.clsact

    def add_clsact(self, index: int) -> bool:
        new = index not in self.clsact
        self.clsact.add(index)
        return new

    def delete_clsact(self, index: int) -> None:
        self.clsact.discard(index)

    def filters(self, index: int, parents: Any = ()) -> list[Filter]:
        return [self.at[index]] if index in self.at else []

    def set_program(self, index: int, priority: int, handle: int, program: int, name: str) -> None:
        if index in self.gone:
            raise NetlinkError(errno.ENODEV, "No such device")
        self.events.append(("attach", index))
        self.at[index] = Filter(priority, handle, "bpf", name, program)

    def delete_filter(self, index: int, priority: int, handle: int) -> None:
        self.events.append(("detach", index))
        del self.at[index]


class Host:
    def __init__(self, directory: Path, **settings: Any) -> None:
        self.events: list[Any] = []
        self.controller, self.tables = Controller(), Tables(self.events)
        self.interfaces = Interfaces(self.events, "lo", "eth0")
        self.sysctl = directory
        self.there = {("::", 80), ("::", 443)}
        settings.setdefault("listeners", (Listener("10.0.0.51", 80),))
        self.agent = ServerAgent(Settings("a host", **settings), self.tables,  # type: ignore[arg-type]
                                 self.interfaces, self.controller.connect,  # type: ignore[arg-type]
                                 lambda: ["10.0.0.51", "fd00::51"], directory, there=lambda: self.there)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------ in touch


def test_the_keys_come_before_anything_is_announced(host: Host) -> None:
    assert host.agent.step() == 3.0
    assert host.controller.announced() == [[], [("10.0.0.51", 80)]]
    assert {(method, path) for method, path, _ in host.controller.told} == {("PUT", "/v1/server-agents/a%20host")}
    assert host.controller.tokens[0] == "Bearer token-1"
    assert host.events == [("keys", ONE, None), ("attach", 2)] and host.tables.scale == 7
    host.agent.step()
    assert host.controller.announced()[2:] == [[("10.0.0.51", 80)]]
    assert len(host.events) == 2  # nothing has changed


def test_new_keys_are_written_at_once(host: Host) -> None:
    host.agent.step()
    host.controller.answer = {"cookie_keys": [ONE, TWO], "window_scale": 5, "lease_seconds": 3}
    assert host.agent.step() == 1.0  # three times a lease
    assert host.events[-1] == ("keys", ONE, TWO) and host.tables.scale == 5


def test_an_interface_that_goes_meanwhile_changes_nothing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.agent.step()
    host.interfaces.there["eth1"] = Link(3, "eth1", IFF_UP, 1500, b"", "", 0, "")
    host.interfaces.gone.add(3)
    host.agent.step()
    assert host.controller.announced()[2:] == [[("10.0.0.51", 80)]] and not messages(caplog)
    host.interfaces.gone.clear()  # another one, of the same name
    host.agent.step()
    assert host.events[-1] == ("attach", 3), "tried again"


def test_who_does_not_listen_is_not_announced(tmp_path: Path) -> None:
    host = Host(tmp_path, listeners=(Listener("10.0.0.51", 80), Listener("10.0.0.52", 81)), ports=(443,))
    host.agent.step()
    assert host.controller.announced()[-1] == [("10.0.0.51", 80), ("10.0.0.51", 443), ("fd00::51", 443)]
    assert not host.agent.changed()
    host.there.add(("10.0.0.9", 8080))
    assert not host.agent.changed(), "nobody asked for it"
    host.there.discard(("::", 443))
    host.there.add(("0.0.0.0", 443))
    host.agent.step()
    assert host.controller.announced()[-1] == [("10.0.0.51", 80), ("10.0.0.51", 443)], "of IPv4 alone"
    host.there.discard(("0.0.0.0", 443))
    host.there.add(("10.0.0.52", 81))
    assert host.agent.changed()
    host.agent.step()
    assert host.controller.announced()[-1] == [("10.0.0.51", 80), ("10.0.0.52", 81)]
    assert not host.agent.changed()


def test_the_kernels_listeners() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_connection(one.getsockname()) as client, \
            socket.create_server(("::", 0), family=socket.AF_INET6) as two:
        found = listening()
        assert {one.getsockname()[:2], ("::", two.getsockname()[1])} <= found
        assert client.getsockname()[:2] not in found
    assert "" not in {address for address, _ in found}


def test_where_the_kernel_does_not_tell_who_listens_nothing_is_adopted(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.agent.step()
    assert host.controller.announced()[-1]

    def none() -> frozenset[tuple[str, int]]:
        raise FileNotFoundError(2, "the kernel does not list its TCP sockets")

    host.agent._there = none
    assert host.agent.changed()
    before = len(host.controller.announced())
    host.agent.step()
    assert len(host.controller.announced()) == before and not host.agent.changed(), "the lease runs out"


def test_ports_are_announced_with_every_address(tmp_path: Path) -> None:
    host = Host(tmp_path, ports=(80, 443))
    host.agent.step()
    assert host.controller.announced()[1] == [("10.0.0.51", 80), ("10.0.0.51", 443), ("fd00::51", 80),
                                              ("fd00::51", 443)]
    assert host.tables.listeners == [Listener("10.0.0.51", 80), Listener(None, 80), Listener(None, 443)]


def test_no_answer_leaves_the_keys_and_is_told_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.agent.step()
    before = list(host.events)
    host.controller.answer = httpx.ConnectError("refused")
    for _ in range(3):
        assert host.agent.step() == 3.0
    assert host.events == before
    assert len(messages(caplog)) == 1 and "no controller answers" in messages(caplog)[0]
    host.controller.answer = 503
    host.agent.step()
    assert len(messages(caplog)) == 2 and "no, thank you" in messages(caplog)[1]
    # It may be another controller, with other keys: they come first again.
    host.controller.answer = {"cookie_keys": [TWO, None], "window_scale": 7, "lease_seconds": 10}
    told = len(host.controller.announced())
    host.agent.step()
    assert host.controller.announced()[told:] == [[], [("10.0.0.51", 80)]]
    assert host.events[len(before):] == [("keys", TWO, None)]
    assert len(messages(caplog)) == 2


def test_a_token_that_is_refused_is_read_again(host: Host) -> None:
    host.controller.answer = 401
    host.agent.step()
    host.agent.step()
    assert host.controller.tokens == ["Bearer token-1", "Bearer token-2"]
    host.controller.answer = 503
    host.agent.step()
    host.agent.step()
    assert host.controller.connected == 3


@pytest.mark.parametrize("answer", [
    {}, [], None, "keys", {"cookie_keys": [ONE], "window_scale": 7, "lease_seconds": 10},
    {"cookie_keys": [ONE, None, None], "window_scale": 7, "lease_seconds": 10},
    {"cookie_keys": [ONE[2:], None], "window_scale": 7, "lease_seconds": 10},
    {"cookie_keys": ["zz" * 16, None], "window_scale": 7, "lease_seconds": 10},
    {"cookie_keys": [1, None], "window_scale": 7, "lease_seconds": 10},
    {"cookie_keys": [ONE, None], "window_scale": 15, "lease_seconds": 10},
    {"cookie_keys": [ONE, None], "window_scale": True, "lease_seconds": 10},
    {"cookie_keys": [ONE, None], "window_scale": 7, "lease_seconds": 0},
    {"cookie_keys": [ONE, None], "window_scale": 7, "lease_seconds": "10"}])
def test_an_answer_that_is_something_else(host: Host, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ClientError, match="no keys of cookies"):
        Lease.read(answer)
    host.controller.answer = answer
    host.agent.step()
    assert host.events == [] and "no keys of cookies" in messages(caplog)[0]


def test_no_keys_at_all_are_an_answer() -> None:
    assert Lease.read({"cookie_keys": [None, None], "window_scale": 0, "lease_seconds": 2.5}) == Lease(
        (None, None), 0, 2.5)


def test_it_says_that_it_is_over(host: Host) -> None:
    host.agent.step()
    assert host.agent.withdraw()
    assert host.controller.told[-1] == ("DELETE", "/v1/server-agents/a%20host", None)
    host.controller.answer = 404
    assert not host.agent.withdraw()
    host.agent.close()


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("name", ["tcp_syncookies", "tcp_window_scaling", "tcp_sack"])
def test_settings_that_keep_the_kernel_from_it(host: Host, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (host.sysctl / name).write_text("1\n")
    assert adopt.lacking(host.sysctl) == []
    host.agent.step()
    told = len(host.controller.told)
    (host.sysctl / name).write_text("0\n")
    host.agent.step()
    assert len(host.controller.told) == told and f"net.ipv4.{name} is 0" in messages(caplog)[0]
    (host.sysctl / name).write_text("2\n")
    host.agent.step()
    assert host.controller.announced()[-2:] == [[], [("10.0.0.51", 80)]]


def test_interfaces_that_come_and_go(host: Host) -> None:
    host.agent.step()
    more = Interfaces(host.events, "lo", "eth0", "eth1").there
    host.interfaces.there = more
    host.agent.step()
    assert host.events[-1] == ("attach", 3)
    more["eth1"] = more["eth1"]._replace(flags=0)
    host.agent.step()
    assert host.events[-1] == ("detach", 3) and host.interfaces.clsact == {2}
    del host.interfaces.at[2]  # somebody took it off
    host.agent.step()
    assert host.events[-1] == ("attach", 2)


def test_what_a_killed_one_left_goes_on_until_its_keys_are_known(host: Host) -> None:
    host.interfaces.clsact.add(2)
    host.interfaces.at[2] = Filter(adopt.PRIORITY, adopt.HANDLE, "bpf", "lbapp-adopt clsact", 7)
    host.agent.step()
    assert host.events == [("keys", ONE, None), ("attach", 2)]
    assert host.interfaces.at[2].name == "lbapp-adopt clsact" and host.interfaces.at[2].program == 42


def test_somebody_elses_place_is_left_alone(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.interfaces.at[2] = Filter(adopt.PRIORITY, 5, "bpf", "another", 7)
    host.agent.step()
    assert host.controller.announced() == [[]] and "somebody else's" in messages(caplog)[0]


def test_an_interface_that_is_no_more_ends_the_announcing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = Host(tmp_path, interfaces=("eth0",))
    host.agent.step()
    link = host.interfaces.there.pop("eth0")
    host.agent.step()
    assert len(host.controller.announced()) == 2 and "there is no interface eth0" in messages(caplog)[0]
    host.interfaces.there["eth0"] = link
    host.agent.step()
    assert host.controller.announced()[-1] == [("10.0.0.51", 80)]


def test_refusals_are_told(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.agent.step()
    host.tables.refused = 3
    host.agent.step()
    host.agent.step()
    assert len(messages(caplog)) == 1 and "refused 3 connections" in messages(caplog)[0]


def test_own_addresses_are_addresses() -> None:
    assert all(address not in ("127.0.0.1", "::1") and "/" not in address for address in process.own_addresses())


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in ("LBAPP_URL", "LBAPP_TOKEN", "LBAPP_TOKEN_FILE", "LBAPP_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LBAPP_STATE_DIR", str(tmp_path))
    ran: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "run_server_agent", lambda **options: ran.update(options))

    def run(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, [*words], prog_name="lbapp")
        assert result.exit_code == code, result.output
        return result.stderr if code else dict(ran)

    return run


def test_the_command_line(command: Any) -> None:
    ran = command("--token", "t", "server-agent", "--listener", "10.0.0.51:80", "--listener", "[fd00::0:51]:80",
                  "--listen-port", "443", "--interface", "eth0", "--name", "one")
    assert ran["settings"] == Settings("one", (Listener("10.0.0.51", 80), Listener("fd00::51", 80)), (443,), ("eth0",))
    assert not ran["remove"]
    ran["connect"]().close()


def test_the_command_line_is_checked(command: Any) -> None:
    assert "at least one --listener or --listen-port" in command("server-agent", code=2)
    assert "'web' does not appear" in command("server-agent", "--listener", "web:80", code=2)
    assert "expected host:port" in command("server-agent", "--listener", "10.0.0.51", code=2)
    assert "expected a URL" in command("--url", "nonsense", "server-agent", "--listen-port", "80", code=1)
    assert "does not exist" in command("--token-file", "/nowhere", "server-agent", "--listen-port", "80", code=1)
    assert command("server-agent", "--remove")["remove"]


def test_only_one_agent_at_a_time() -> None:
    with process.claim(), pytest.raises(adopt.AdoptError, match="another agent"), process.claim():
        pass
