# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Agents beside servers report their load, and the members' weights follow: everything real.

All namespaces of a laboratory share the machine's CPUs, so what decides here are values that the servers themselves
say: of a command, of a page and of Prometheus metrics, in the servers' own network namespaces.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.server_agent.report import Told, document, sign
from tests.integration.support import VIP, configure, members, pool, server
from topologies.controller import RestError
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

LBAPP = str(Path(sys.executable).with_name("lbapp"))
NAMES = ("s1", "s2", "s3")
STATUS_PORT = 9100
URL = f"http://{VIP}/"


class Reported:
    """A laboratory whose servers say a value ``speed``: s1 by a command, s2 in a page, s3 as a metric."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self.key = directory / "bus.key"
        self.agents: dict[str, subprocess.Popen[Any]] = {}
        self.services: list[subprocess.Popen[Any]] = []
        for name in NAMES:
            (directory / name).mkdir()
            self.say(name, 50)
        for name in NAMES[1:]:
            self.services.append(lab.server(name).popen(
                sys.executable, "-m", "http.server", str(STATUS_PORT), "--bind", "127.0.0.1", "--directory",
                str(directory / name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def say(self, name: str, speed: float) -> None:
        """What a server is to say from now on; in all three ways."""
        for file, text in (("number", f"{speed}\n"), ("status.json", json.dumps({"now": [{"speed": speed}]})),
                           ("metrics", f'# TYPE speed gauge\nspeed{{of="this"}} {speed}\nspeed{{of="that"}} 1e9\n')):
            draft = self.directory / name / f".{file}"
            draft.write_text(text)
            draft.replace(self.directory / name / file)

    def source(self, name: str) -> str:
        local = f"http://127.0.0.1:{STATUS_PORT}"
        return {"s1": f"speed=command:/bin/cat {self.directory}/s1/number",
                "s2": f"speed=http:{local}/status.json#now.0.speed",
                "s3": f'speed=prometheus:{local}/metrics#speed{{of="this"}}'}[name]

    def start(self, name: str, *words: str, key: bool = True) -> None:
        """Start an agent that only reports."""
        signed = ("--bus-key", str(self.key)) if key else ()
        log = self.directory / f"{name}.log"
        self.agents[name] = self.lab.controller.namespace.popen(
            LBAPP, "--token-file", str(self.lab.controller.state / "token"), "server-agent", "--report-only", "--name",
            name, "--netns", f"/proc/{self.lab.server(name).pid}/ns/net", "--listen-port", "80", "--report-interval",
            "0.5", *signed, *words, "--log-file", str(log))

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self.agents.pop(name)
        process.send_signal(how)
        process.wait(30)

    def close(self) -> None:
        for process in (*self.agents.values(), *self.services):
            end(process)
        self.agents.clear()

    def report(self, name: str) -> dict[str, Any]:
        listed = self.lab.rest.get("/v1/server-agents")["server_agents"]
        return next((one["report"] or {} for one in listed if one["name"] == name), {})

    def events(self) -> list[str]:
        return [one["text"] for one in self.lab.rest.get("/v1/events?limit=1000")["events"]]

    def shares(self, count: int = 60) -> dict[str, int]:
        """Who answered how many of so many new connections."""
        return dict.fromkeys(NAMES, 0) | dict(self.lab.client().who(URL, count))


@pytest.fixture(scope="module")
def _reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    directory = tmp_path_factory.mktemp("reports")
    with contextlib.ExitStack() as running:
        lab = running.enter_context(Lab(SingleTopo(), directory=directory / "lab",
                                        options=["--bus-key", str(directory / "bus.key")]))
        lab.start_servers()
        lab.start_controller()
        made = Reported(lab, directory)
        running.callback(made.close)
        yield made


@pytest.fixture
def reported(_reported: Reported) -> Iterator[Reported]:
    for name in NAMES:
        _reported.say(name, 50)
    yield _reported
    for name in list(_reported.agents):
        _reported.stop(name)


def distributed(reported: Reported, **distribution: Any) -> None:
    """A pool whose weights follow, and a virtual server that uses it."""
    configure(reported.lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(reported.lab), distribution={
        "interval": 1, **distribution})], [server("web", 80, "web")])


def reports(reported: Reported, name: str, **values: float) -> bool:
    """Whether a server's last report has these values, and counts."""
    report = reported.report(name)
    return bool(report) and not report["flags"] and values.items() <= report["values"].items()


def slows(reported: Reported, name: str) -> None:
    """A server says that it is slow, and gets fewer connections; then it is well again."""
    reported.say(name, 2)  # a 625th of the others' share
    wait_until(lambda: reports(reported, name, speed=2.0), 60, f"the report of {name}")
    wait_until(lambda: reported.shares()[name] <= 2, 60, f"fewer connections for {name}")
    reported.say(name, 50)


def test_weights_follow_what_servers_say_of_themselves(reported: Reported) -> None:
    distributed(reported, algorithm="FORMULA", formula="speed ** 2", stale=30)
    for name in NAMES:
        reported.start(name, "--value", reported.source(name))
    wait_until(lambda: all(reports(reported, name, speed=50.0) for name in NAMES), 60, "the first reports")
    report = reported.report("s2")
    assert report["signed"] and report["refused"] == 0 and report["age_seconds"] < 60
    host = reported.lab.server("s2")
    assert report["servers"] == [f"{host.address}:80", f"[{host.address6}]:80"]
    wait_until(lambda: reported.report("s2")["values"].keys() >= {"cpu", "memory", "load", "clients", "cores"}, 60,
               "what the kernel tells")
    assert all(0 <= reported.report("s2")["values"][name] <= 1 for name in ("cpu", "memory"))
    wait_until(lambda: min(reported.shares().values()) >= 5, 60, "even shares")
    for name in NAMES:  # one after the other is slow, by each way of saying so
        slows(reported, name)
    wait_until(lambda: min(reported.shares().values()) >= 5, 60, "even shares again")
    assert any("its weight follows what its server reports" in text for text in reported.events())


def test_an_agent_that_dies_leaves_the_configured_weight(reported: Reported) -> None:
    distributed(reported, algorithm="FORMULA", formula="speed", stale=3)
    reported.say("s1", 0.1)
    for name in NAMES:
        reported.start(name, "--value", reported.source(name))
    wait_until(lambda: all(reports(reported, name) for name in NAMES), 60, "the first reports")
    wait_until(lambda: reported.shares()["s1"] <= 2, 60, "few connections for s1")
    reported.stop("s1", signal.SIGKILL)
    wait_until(lambda: any("report of agent s1 is stale" in text for text in reported.events()), 60, "the event")
    wait_until(lambda: min(reported.shares().values()) >= 5, 60, "even shares")
    assert reported.report("s1")  # still shown, with its age
    reported.stop("s2")
    assert reported.report("s2") == {}  # it said that it ends


def test_absurd_reports_are_flagged_and_do_not_count(reported: Reported) -> None:
    distributed(reported, algorithm="FORMULA", formula="speed * (1 - cpu)", stale=30)
    reported.say("s1", 7)
    cpus = {"s1": f"/bin/cat {reported.directory}/s1/number", "s2": "/bin/echo 0", "s3": "/bin/echo 0"}
    for name, cpu in cpus.items():
        reported.start(name, "--value", reported.source(name), "--value", f"cpu=command:{cpu}")
    wait_until(lambda: reported.report("s1").get("flags") == ["cpu: expected 0 to 1, got 7"], 60, "the flag")
    said = "the report of agent s1 is flagged: cpu: expected 0 to 1, got 7"
    wait_until(lambda: any(said in text for text in reported.events()), 60, "the event")
    wait_until(lambda: all(reports(reported, name) for name in NAMES[1:]), 60, "the others' reports")
    wait_until(lambda: min(reported.shares().values()) >= 5, 60, "even shares")
    wait_until(lambda: "reports do not count" in (reported.directory / "s1.log").read_text(), 60, "the agent's log")


def test_values_that_fail_are_missing_and_others_go_on(reported: Reported) -> None:
    distributed(reported, algorithm="FORMULA", formula="speed", stale=30)
    reported.start("s1", "--value", reported.source("s1"), "--value", "slow=command:/bin/sleep 600", "--value",
                   "none=http:http://127.0.0.1:1/", "--value", "failing=command:/bin/false")
    wait_until(lambda: reports(reported, "s1", speed=50.0), 60, "the report")
    before = reported.report("s1")["sequence"]
    wait_until(lambda: reported.report("s1")["sequence"] >= before + 10, 60, "more reports")
    assert reported.report("s1")["values"].keys().isdisjoint({"slow", "none", "failing"})
    (reported.directory / "s1/number").unlink()
    wait_until(lambda: "speed" not in reported.report("s1")["values"], 60, "the value's absence")
    wait_until(lambda: any("its server does not report speed" in text for text in reported.events()), 60, "the event")


def test_reports_must_be_signed_and_come_once(reported: Reported) -> None:
    reported.start("s1", key=False)
    wait_until(lambda: "signed with the key of the buses" in (reported.directory / "s1.log").read_text(), 60,
               "its log says why")
    assert reported.report("s1") == {}
    key = reported.key.read_bytes()
    told = Told(bytes(16), 1, time.time(), (("10.0.0.1", 80),), {"cpu": 0.5})
    body = document(told, sign(key, "by hand", told))
    rest = reported.lab.rest
    path = "/v1/server-agents/by%20hand"
    assert rest.put(f"{path}/report", body)["flags"] == []
    with pytest.raises(RestError, match="greater than 1"):
        rest.put(f"{path}/report", body)
    with pytest.raises(RestError, match="another signature"):
        rest.put(f"{path}/report", {**body, "sequence": 2})
    assert reported.report("by hand")["refused"] == 2
    rest.delete(path)


def test_agents_that_adopt_connections_report_as_well(reported: Reported) -> None:
    host = reported.lab.server("s3")
    log = reported.directory / "adopting.log"
    agent = reported.lab.controller.namespace.popen(
        LBAPP, "--token-file", str(reported.lab.controller.state / "token"), "server-agent", "--name", "both",
        "--netns", f"/proc/{host.pid}/ns/net", "--listen-port", "80", "--bus-key", str(reported.key),
        "--log-file", str(log))
    try:
        def shown() -> dict[str, Any]:
            listed = reported.lab.rest.get("/v1/server-agents")["server_agents"]
            return next((one for one in listed if one["name"] == "both"), {})

        wait_until(lambda: bool(shown()) or agent.poll() is not None, 60, "its announcement")
        if agent.poll() is not None:
            pytest.skip(f"no connections are adopted here: {log.read_text().strip()[-200:]}")
        wait_until(lambda: bool(shown()["listeners"]) and bool(shown()["report"]), 60, "both")
        assert set(shown()["listeners"]) <= set(shown()["report"]["servers"])
    finally:
        end(agent)
    wait_until(lambda: shown() == {}, 60, "its end")
