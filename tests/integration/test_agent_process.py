# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp agent`` beside the switch and ``lbapp run --agent``: both buses, with real traffic around them.

Exercises lbapp.agent_process and lbapp.remote_agents from end to end.
"""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.bus import keyfile
from tests.integration.support import (
    ECHO_PORT,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    configure,
    members,
    pool,
    refused,
    server,
    settle,
    statistics,
)
from topologies.controller import ControllerProcess
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo
from topologies.two_switches import TwoSwitchesTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WAYS = {"fast": 80, "round": 8080, "least": 8081}
ONE, TWO = 6754, 6755


class Agent:
    """``lbapp agent`` of one bridge."""

    def __init__(self, lab: Lab, key: Path, bridge: str = "lb1", port: int = ONE, *options: str) -> None:
        self.lab, self.bridge, self.address = lab, bridge, f"127.0.0.1:{port}"
        self.log = key.with_name(f"{bridge}-{port}.log")
        self._argv = ("agent", "--bridge", bridge, "--listen", self.address, "--key", str(key), *options)
        self.process: subprocess.Popen[Any] | None = None

    @property
    def _prefix(self) -> list[str]:
        return ["env", *(f"{name}={value}" for name, value in self.lab.ovs.environment.items()),
                self.lab.controller.command]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = self.lab.root.popen(*self._prefix, *self._argv, stdout=log, stderr=log)
        seen = self.said("fast path in front of")
        wait_until(lambda: self.said("fast path in front of") > seen, 10, f"an agent for {self.bridge}")

    def said(self, words: str) -> int:
        """How often the log has these words."""
        return self.log.read_text().count(words)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=10)

    def remove(self) -> None:
        if self.process is not None:
            end(self.process, patience=10)
        self.lab.root.run(*self._prefix, "agent", "--bridge", self.bridge, "--remove")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bus") / "bus.key"
    keyfile.ensure(path)
    return path


@pytest.fixture(scope="module")
def lab(key: Path) -> Iterator[Lab]:
    options = ["--agent", f"127.0.0.1:{ONE}", "--bus-key", str(key)]
    with Lab(SingleTopo(), options=options) as made:
        made.start_servers()
        made.start_controller()
        yield made


@pytest.fixture(scope="module")
def agent(lab: Lab, key: Path) -> Iterator[Agent]:
    made = Agent(lab, key)
    made.start()
    yield made
    made.remove()


@pytest.fixture
def site(lab: Lab, agent: Agent) -> Lab:
    if agent.process is None or agent.process.poll() is not None:
        agent.start()
    wait_until(lambda: fastpath(lab) is not None, 15, "the agent is connected")
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        name = "six" if six else "four"
        web = members(lab, six=six)
        pools += [pool(f"weights-{name}", "WEIGHTED_ROUND_ROBIN", web), pool(f"turns-{name}", "ROUND_ROBIN", web),
                  pool(f"least-{name}", "LEAST_CONNECTIONS", web),
                  pool(f"echo-{name}", "WEIGHTED_ROUND_ROBIN", members(lab, ECHO_PORT, six)),
                  pool(f"asked-{name}", "ROUND_ROBIN", members(lab, ECHO_PORT, six))]
        servers += [server(f"fast-{name}", WAYS["fast"], f"weights-{name}", vip),
                    server(f"round-{name}", WAYS["round"], f"turns-{name}", vip),
                    server(f"least-{name}", WAYS["least"], f"least-{name}", vip),
                    server(f"udp-{name}", 53, f"echo-{name}", vip, "UDP"),
                    server(f"asked-{name}", 54, f"asked-{name}", vip, "UDP")]
    configure(lab, pools, servers)
    time.sleep(0.3)  # CSMB carries it to the agent
    return lab


def fastpath(lab: Lab, dpid: str = "0000000000000001") -> dict[str, Any] | None:
    """The statistics of a switch's fast path."""
    found = [switch for switch in lab.rest.get("/v1/stats")["switches"] if switch["dpid"] == dpid]
    return found[0]["fastpath"] if found else None


def count(lab: Lab, name: str, dpid: str = "0000000000000001") -> int:
    found = fastpath(lab, dpid)
    assert found is not None
    return int(found[name])


def url(vip: str, port: int, path: str = "") -> str:
    return f"http://[{vip}]:{port}/{path}" if ":" in vip else f"http://{vip}:{port}/{path}"


def links(lab: Lab) -> list[str]:
    """Interfaces of a fast path."""
    return re.findall(r"\b(lb[ioq][0-9a-f]+)", lab.root.run("ip", "-o", "link").stdout)


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("way", WAYS)
def test_connections_are_served_and_their_ends_told_of(site: Lab, vip: str, way: str) -> None:
    name = f"{way}-{'six' if ':' in vip else 'four'}"
    opened, closed, deletes = (statistics(site, name)[kind] for kind in ("opened", "closed", "refused"))
    before = count(site, "deletes")
    assert site.client("c1").who(url(vip, WAYS[way]), 30) == {"s1": 10, "s2": 10, "s3": 10}
    wait_until(lambda: count(site, "deletes") - before >= 30, 10, "all ends told of")
    wait_until(lambda: statistics(site, name)["closed"] - closed >= 30, 10, "all ends counted")
    if way != "fast":
        assert statistics(site, name)["opened"] - opened == 30
    assert statistics(site, name)["closed"] - closed == 30
    assert statistics(site, name)["refused"] == deletes


def test_datagrams(site: Lab) -> None:
    for vip in (VIP, VIP6):
        for port in (53, 54):
            answers = site.client("c1").udp(vip, port, 9)
            assert sorted(map(str, answers)) == ["s1"] * 3 + ["s2"] * 3 + ["s3"] * 3


def test_ends_travel_in_batches(site: Lab) -> None:
    deletes, messages = count(site, "deletes"), count(site, "delete_messages")
    site.client("c1").run("curl", "-sSf", "-o", "/dev/null", "--max-time", "60", "--parallel", "--parallel-max", "50",
                          "-H", "Connection: close", f"{url(VIP, 80)}?[1-2000]", timeout=60)
    wait_until(lambda: count(site, "deletes") - deletes >= 2000, 10, "2000 connections told of")
    assert count(site, "deletes") - deletes <= 2010, "each is told of once"
    assert count(site, "delete_messages") - messages <= 2000 / 20


def test_what_is_refused_is_refused_at_once(site: Lab) -> None:
    client = site.client("c1")
    for name in ("fast-four", "round-four"):
        site.rest.patch(f"/v1/virtual-servers/{name}", {"maintenance": True})
    site.rest.patch("/v1/virtual-servers/least-four", {"connection_limit": 2})
    settle(site, ["fast-four", "round-four"])
    time.sleep(0.3)
    assert refused(client, VIP, 80) < REFUSED_WITHIN
    assert refused(client, VIP, 8080) < REFUSED_WITHIN
    held = [Held(client, VIP, 8081) for _ in range(2)]
    try:
        assert refused(client, VIP, 8081) < REFUSED_WITHIN
    finally:
        for one in held:
            one.close()
    wait_until(lambda: statistics(site, "least-four")["active"] == 0, 10, "the ends of both connections")
    Held(client, VIP, 8081).close()


def test_least_connections(site: Lab) -> None:
    client = site.client("c1")
    held = [Held(client, VIP, 8081) for _ in range(6)]
    try:
        assert sorted(one.server for one in held) == ["s1", "s1", "s2", "s2", "s3", "s3"]
        for one in held:
            if one.server == "s3":
                one.close()
        wait_until(lambda: statistics(site, "least-four")["active"] == 4, 10, "two have ended")
        more = [Held(client, VIP, 8081) for _ in range(2)]
        assert [one.server for one in more] == ["s3", "s3"]
        # Conntrack knows nothing of them: its snapshots must not make them dead.
        time.sleep(11)
        assert statistics(site, "least-four")["active"] == 6
        for one in more:
            one.close()
    finally:
        for one in held:
            one.close()


def test_a_member_that_is_removed(site: Lab) -> None:
    for way, name in (("fast", "weights-four"), ("round", "turns-four")):
        client = site.client("c1")
        old = Held(client, VIP, WAYS[way])
        site.rest.patch(f"/v1/pools/{name}", {"members": [one for one in members(site) if one["name"] != old.server]})
        settle(site)
        time.sleep(0.3)
        with pytest.raises(OSError):
            for _ in range(3):
                old.ask()
        old.reset()
        new = Held(client, VIP, WAYS[way], source_port=old.port)
        assert new.server != old.server
        new.close()


@pytest.fixture
def download(site: Lab) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    digest, target = site.make_file("big", 60_000_000), site.directory / "downloaded"
    process = site.client("c2").popen("curl", "-sSf", "--max-time", "60", "--limit-rate", "12M", "-o", str(target),
                                      url(VIP, 80, "big"))
    time.sleep(0.7)
    yield process, digest, target
    process.kill()
    process.wait()


def check(download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, digest, target = download
    assert process.wait(60) == 0
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


def test_an_agent_that_is_killed_and_started_again(
        site: Lab, agent: Agent, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    agent.kill()
    for one in held.values():
        assert one.ask() == one.server
    assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}, "the programs decide alone"
    agent.start()

    def served() -> bool:
        return site.client("c1").run("curl", "-sf", "--max-time", "1", url(VIP, 8080), check=False).returncode == 0
    wait_until(served, 5, "new connections that the controller decides")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)


def test_a_controller_that_is_killed_and_started_again(
        site: Lab, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    site.controller.kill()
    for one in held.values():
        assert one.ask() == one.server
    assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
    site.start_controller()
    wait_until(lambda: site.client("c1").run("curl", "-sf", "--max-time", "1", url(VIP, 8080),
                                             check=False).returncode == 0, 5, "new connections are decided")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)


def test_loss_on_the_bus_loses_nothing_that_matters(site: Lab) -> None:
    rules = """
table inet loss {
  chain in {
    type filter hook input priority 0; policy accept;
    iif lo meta l4proto udp numgen random mod 100 < 10 drop
  }
}
"""
    site.root.run("nft", "-f", "-", stdin=rules)
    try:
        deletes = count(site, "deletes")
        # A lost question costs a client's retransmission: a second.
        assert sum(site.client("c1").who(url(VIP, 8080), 60).values()) == 60
        assert sum(site.client("c1").who(url(VIP, 80), 200).values()) == 200
        wait_until(lambda: count(site, "deletes") - deletes >= 260, 15, "all ends told of")
        time.sleep(1)
        assert count(site, "deletes") - deletes == 260, "each once"
    finally:
        site.root.run("nft", "delete", "table", "inet", "loss")


def test_a_partition_between_controller_and_agent(site: Lab) -> None:
    """Row 6: the bus is cut for 8 s, dead after 3 missed HELLOs."""
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    deletes = count(site, "deletes")
    rules = f"""
table inet cut {{
  chain in {{
    type filter hook input priority 0; policy accept;
    tcp dport {ONE} drop
    tcp sport {ONE} drop
    iif lo meta l4proto udp drop
  }}
}}
"""
    site.root.run("nft", "-f", "-", stdin=rules)
    try:
        until = time.monotonic() + 8
        asked = 0
        while time.monotonic() < until:
            asked += sum(site.client("c1").who(url(VIP, 80), 30).values())
            for one in held.values():
                assert one.ask() == one.server
            time.sleep(0.5)
    finally:
        site.root.run("nft", "delete", "table", "inet", "cut")
    wait_until(lambda: count(site, "deletes") - deletes >= asked, 15, "what ended meanwhile is told of")
    assert count(site, "deletes") - deletes == asked, "once"
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    assert site.client("c1").who(url(VIP, 8080), 9) == {"s1": 3, "s2": 3, "s3": 3}


def test_strangers_are_shut_out_and_nobody_else_notices(site: Lab, tmp_path: Path) -> None:
    """Row 15, on the agent's ports."""
    with site.root.entered():
        silent = [socket.create_connection(("127.0.0.1", ONE), 2) for _ in range(40)]
        rude = [socket.create_connection(("127.0.0.1", ONE), 2) for _ in range(3)]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for one, said in zip(rude, (b"GET / HTTP/1.1\r\n\r\n" * 4, bytes(64), b"\xff" * 64), strict=True):
        one.settimeout(1.5)
        one.sendall(said)
        with _ended():
            while one.recv(4096):
                pass
    for _ in range(100):
        datagrams.sendto(bytes(80), ("127.0.0.1", ONE))
    assert site.client("c1").who(url(VIP, 8080), 9) == {"s1": 3, "s2": 3, "s3": 3}
    for one in (*silent, *rude, datagrams):
        one.close()
    other = tmp_path / "other.key"
    keyfile.ensure(other)
    stranger = ControllerProcess(site.root, tmp_path / "state", options=[
        "--agent", f"127.0.0.1:{ONE}", "--bus-key", str(other)], environment=site.ovs.environment)
    stranger.options += ["--listen", "127.0.0.1:6700", "--api", "127.0.0.1:8090"]
    stranger.rest.base = "http://127.0.0.1:8090"
    try:
        stranger.start()
        wait_until(lambda: "bus: 127.0.0.1 port" in stranger.log_tail(), 10, "the stranger is told nothing")
        assert stranger.rest.get("/v1/stats")["switches"] == []
    finally:
        stranger.stop()


class _ended:
    """A block in which the connection ends: by a RST, or at the end of what is read."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ConnectionResetError)


def test_two_control_segments_at_one_agent(site: Lab, agent: Agent, tmp_path: Path, key: Path) -> None:
    """The second one comes, announces what it has, and is killed: the first one's connections do not notice."""
    second = ControllerProcess(site.root, tmp_path / "second", options=[
        "--agent", f"127.0.0.1:{ONE}", "--bus-key", str(key), "--listen", "127.0.0.1:6701", "--api", "127.0.0.1:8091"],
        environment=site.ovs.environment)
    second.rest.base = "http://127.0.0.1:8091"
    connected, gone = agent.said("is connected"), agent.said("is gone")
    try:
        second.start()
        wait_until(lambda: agent.said("is connected") > connected, 10, "both are connected")
        second.rest.post("/v1/virtual-servers", server("theirs", 80, None) | {"vip_address": "10.0.0.99"})
        for port in (80, 8080):
            assert site.client("c1").who(url(VIP, port), 9) == {"s1": 3, "s2": 3, "s3": 3}
        second.kill()
        wait_until(lambda: agent.said("is gone") > gone, 10, "one of them is gone")
        for port in (80, 8080):
            assert site.client("c1").who(url(VIP, port), 9) == {"s1": 3, "s2": 3, "s3": 3}
    finally:
        second.stop()


def test_queries_by_openflow_are_the_switchs_own(site: Lab) -> None:
    """With the agent elsewhere, nobody knows when an entry would be there: conntrack has these connections."""
    site.controller.stop()
    site.controller.options += ["--queries", "openflow"]
    site.start_controller()
    wait_until(lambda: fastpath(site) is not None, 15, "the agent is connected")
    try:
        time.sleep(1)
        queries, deletes = count(site, "queries"), count(site, "deletes")
        for port in (8080, 8081):
            assert site.client("c1").who(url(VIP, port), 9) == {"s1": 3, "s2": 3, "s3": 3}
        time.sleep(0.5)
        assert (count(site, "queries"), count(site, "deletes")) == (queries, deletes)
        assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
        wait_until(lambda: count(site, "deletes") >= deletes + 9, 10, "what the fast path decides is in it")
    finally:
        site.controller.stop()
        del site.controller.options[-2:]
        site.start_controller()


def test_one_that_is_told_to_stop_leaves_nothing_behind(site: Lab, agent: Agent) -> None:
    held = Held(site.client("c1"), VIP, 8080)
    assert links(site)
    agent.kill(signal.SIGTERM)
    assert links(site) == []
    assert "Interface lbo" not in site.ovs.vsctl("show")
    held.close()
    assert site.client("c1").who(url(VIP, 80), 9), "Open vSwitch does it all"
    agent.start()
    wait_until(lambda: len(site.client("c1").who(url(VIP, 8080), 9)) == 3, 10, "and it comes back")


def test_two_switches_with_an_agent_each(tmp_path: Path, key: Path) -> None:
    options = ["--agent", f"127.0.0.1:{ONE}", "--agent", f"127.0.0.1:{TWO}", "--bus-key", str(key)]
    with Lab(TwoSwitchesTopo(), tmp_path / "lab", options=options) as lab:
        agents = [Agent(lab, key, "lb1", ONE), Agent(lab, key, "lb2", TWO)]
        lab.start_servers()
        lab.start_controller()
        try:
            for one in agents:
                one.start()
            wait_until(lambda: all(fastpath(lab, f"{number:016x}") is not None for number in (1, 2)), 15, "both agents")
            configure(lab, [pool("weights", "WEIGHTED_ROUND_ROBIN", members(lab)),
                            pool("turns", "ROUND_ROBIN", members(lab))],
                      [server("fast-four", 80, "weights"), server("round-four", 8080, "turns")])
            time.sleep(0.5)
            for port in (80, 8080):
                assert sum(lab.client("c1").who(url(VIP, port), 9).values()) == 9
            wait_until(lambda: count(lab, "deletes") >= 18, 10, "the ends, from the first switch")
            assert count(lab, "queries") >= 9
        finally:
            for one in agents:
                one.remove()
