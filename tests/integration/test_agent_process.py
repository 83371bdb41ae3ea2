# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp agent`` beside the switch and ``lbapp run --agent``: both buses, with real traffic around them.

Exercises lbapp.agent_process and lbapp.remote_agents from end to end.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.agents import CLOSED_SECONDS
from tests.integration import beside
from tests.integration.beside import ONE, TWO, WAYS, Agent, check, count, fastpath, links, url
from tests.integration.support import (
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    at_rest,
    configure,
    held,
    members,
    pool,
    refused,
    server,
    settle,
    statistics,
    wait_for_statistics,
)
from topologies.hosts import OWN_PORTS, LabHost
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.two_switches import TwoSwitchesTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside.shared_key(tmp_path_factory)


@pytest.fixture(scope="module")
def lab(key: Path) -> Iterator[Lab]:
    yield from beside.laboratory(key)


@pytest.fixture(scope="module")
def agent(lab: Lab, key: Path) -> Iterator[Agent]:
    yield from beside.beside(lab, key)


@pytest.fixture
def site(lab: Lab, agent: Agent) -> Lab:
    return beside.configured(lab, agent)


@pytest.fixture
def download(site: Lab) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    yield from beside.downloading(site)


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("way", WAYS)
def test_connections_are_served_and_their_ends_told_of(site: Lab, vip: str, way: str) -> None:
    name = f"{way}-{'six' if ':' in vip else 'four'}"
    before, deletes = at_rest(site, name), count(site, "deletes")
    assert site.client("c1").who(url(vip, WAYS[way]), 30) == {"s1": 10, "s2": 10, "s3": 10}
    wait_until(lambda: count(site, "deletes") - deletes >= 30, 10, "all ends told of")
    wait_until(lambda: statistics(site, name)["closed"] - before["closed"] >= 30, 10, "all ends counted")
    # What the fast path decided, its agent tells of once a second.
    told = wait_for_statistics(site, name, opened=before["opened"] + 30, closed=before["closed"] + 30,
                               active=0)
    assert told["refused"] == before["refused"]
    assert told["packets"] >= 30 * 8


def test_what_the_agent_counted_is_shown(site: Lab) -> None:
    before = fastpath(site)
    assert before is not None
    with held(site.client("c1"), VIP, 80, 4):
        assert site.client("c1").who(url(VIP, 80), 30) == {"s1": 10, "s2": 10, "s3": 10}
        assert site.client("c1").who("http://10.0.0.51/", 3), "past the balancer"
        wait_until(lambda: count(site, "hits") - before["hits"] >= 30 * 8, 5, "hits")
        wait_until(lambda: count(site, "connections") == 4, 15, "the open ones, when the table is swept")
        wait_for_statistics(site, "fast-four", active=4)
        after = fastpath(site)
        assert after is not None
        assert after["misses"]["flow"] > before["misses"]["flow"] or after["misses"]["service"] > before[
            "misses"]["service"]
    members_of = [one for one in site.rest.get("/v1/stats")["members"] if one["pool"] == "weights-four"]
    assert [one["opened"] for one in members_of] and all(one["opened"] >= 10 for one in members_of)


def test_datagrams(site: Lab) -> None:
    for vip in (VIP, VIP6):
        for port in (53, 54):
            answers = site.client("c1").udp(vip, port, 9)
            assert sorted(map(str, answers)) == ["s1"] * 3 + ["s2"] * 3 + ["s3"] * 3


def test_flows_that_would_meet_on_their_way_back(site: Lab) -> None:
    """From one port of the client, to one port of one member, by two virtual servers: the second one's port is
    changed by Open vSwitch."""
    client = site.client("c1")
    for port in range(7001, 7013):
        answers = [datagram(client, port, (vip, 53 + turn)) for vip in (VIP, VIP6) for turn in (0, 1, 0, 1)]
        assert all(answers), (port, answers)
    wait_until(lambda: (fastpath(site) or {})["misses"].get("answered"), 10, "Open vSwitch was given some")


def datagram(client: LabHost, port: int, to: tuple[str, int]) -> str | None:
    """Who answers a datagram from this port; None: nobody did. Raises ConnectionRefusedError."""
    with client.entered():
        endpoint = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM)
    with endpoint:
        endpoint.settimeout(1.0)
        endpoint.bind(("", port))
        endpoint.connect(to)
        endpoint.send(b"who")
        try:
            return endpoint.recv(100).decode().partition(" ")[0]
        except TimeoutError:
            return None


@pytest.mark.parametrize("port", [80, 8080])
def test_ends_travel_in_batches(site: Lab, port: int) -> None:
    """Also where questions travel at the same time, for which nobody is to wait."""
    for name in ("fast-four", "round-four"):
        at_rest(site, name)
    deletes, messages = count(site, "deletes"), count(site, "delete_messages")
    began = time.monotonic()
    site.client("c1").run("curl", "-sSf", "-o", "/dev/null", "--max-time", "60", "--parallel", "--parallel-max", "50",
                          "-H", "Connection: close", f"{url(VIP, port)}?[1-2000]", timeout=60)
    wait_until(lambda: count(site, "deletes") - deletes >= 2000, 10, "2000 connections told of")
    seconds = time.monotonic() - began
    assert count(site, "deletes") - deletes == 2000, "each is told of once"
    # A datagram holds more than forty; what did not fill one leaves when its time has come.
    assert count(site, "delete_messages") - messages <= 2000 / 40 + seconds / CLOSED_SECONDS


def test_what_is_refused_is_refused_at_once(site: Lab) -> None:
    client = site.client("c1")
    for name in ("fast-four", "round-four"):
        site.rest.patch(f"/v1/virtual-servers/{name}", {"maintenance": True})
    site.rest.patch("/v1/virtual-servers/least-four", {"connection_limit": 2})
    settle(site, ["fast-four", "round-four"])
    for port in (80, 8080):
        wait_until(lambda: not _served(client, port), 10, "the agent knows")  # noqa: B023 (asked at once)
        assert refused(client, VIP, port) < REFUSED_WITHIN
    held = [Held(client, VIP, 8081) for _ in range(2)]
    try:
        assert refused(client, VIP, 8081) < REFUSED_WITHIN
    finally:
        for one in held:
            one.close()
    wait_until(lambda: statistics(site, "least-four")["active"] == 0, 10, "the ends of both connections")
    Held(client, VIP, 8081).close()


def test_a_switch_that_is_drained_is_an_agents_switch_too(site: Lab) -> None:
    """What is in force there alone goes to its agent by the same bus: refused, finished, and reset in the end."""
    client, path, names = site.client("c1"), "/v1/switches/1", [f"{way}-four" for way in WAYS]
    held = [Held(client, VIP, port) for port in WAYS.values()]
    try:
        site.rest.put(path, {"draining": True})
        settle(site, [*names, *(name.replace("four", "six") for name in names), "udp-four", "udp-six", "asked-four",
                      "asked-six"])
        for port in WAYS.values():
            wait_until(lambda: not _served(client, port), 10, "the agent knows")  # noqa: B023 (asked at once)
            refused(client, VIP, port)
        assert [one.ask() for one in held] == [one.server for one in held]
        wait_until(lambda: site.rest.get(path)["connections"] >= len(held), 10, "they are counted")
        site.rest.patch(path, {"drain_timeout": 1})
        wait_until(lambda: site.rest.get(path)["ended"], 10, "its time is over")
        for one in held:
            wait_until(lambda: _gone(one), 20, "it is reset")  # noqa: B023 (asked at once)
    finally:
        site.rest.delete(path)
        for one in held:
            one.close()
    for port in WAYS.values():
        wait_until(lambda: _served(client, port), 10, "the agent knows")  # noqa: B023 (asked at once)


def _served(client: LabHost, port: int) -> bool:
    return client.run("curl", "-sf", "--max-time", "3", url(VIP, port), check=False).returncode == 0


def _gone(one: Held) -> bool:
    try:
        one.ask()
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def test_least_connections(site: Lab) -> None:
    client = site.client("c1")
    wait_until(lambda: statistics(site, "least-four")["active"] == 0, 10, "earlier connections are told of")
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
        old = Held(client, VIP, WAYS[way], source_port=next(OWN_PORTS))
        site.rest.patch(f"/v1/pools/{name}", {"members": [one for one in members(site) if one["name"] != old.server]})
        settle(site)
        wait_until(lambda: _gone(old), 10, "it is cut")  # noqa: B023 (asked at once)
        old.reset()
        new = Held(client, VIP, WAYS[way], source_port=old.port)
        assert new.server != old.server
        new.close()


def test_an_agent_that_is_killed_and_started_again(
        site: Lab, agent: Agent, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    ending = [Held(site.client("c1"), VIP, WAYS["least"]) for _ in range(5)]
    closed = statistics(site, "fast-four")["closed"]
    agent.kill()
    for one in held.values():
        assert one.ask() == one.server
    for one in ending:
        one.close()
    assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}, "the programs decide alone"
    agent.start()

    def served() -> bool:
        return site.client("c1").run("curl", "-sf", "--max-time", "1", url(VIP, 8080), check=False).returncode == 0
    wait_until(served, 15, "new connections that the controller decides")
    wait_for_statistics(site, "least-four", active=1)
    # The download may have ended as well.
    wait_until(lambda: statistics(site, "fast-four")["closed"] >= closed + 9, 10, "the ends are told")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    wait_for_statistics(site, "least-four", active=0)
    check(download)


def test_both_are_killed_and_started_again(
        site: Lab, agent: Agent, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    """Row 7. Controller and agent number nothing as before: what is there keeps its meaning."""
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    agent.kill()
    site.controller.kill()
    for _ in range(3):
        assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
        for one in held.values():
            assert one.ask() == one.server
    agent.start()
    site.start_controller()
    wait_until(lambda: site.client("c1").run("curl", "-sf", "--max-time", "1", url(VIP, 8080),
                                             check=False).returncode == 0, 15, "new connections are decided")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)
    for way, port in WAYS.items():
        assert site.client("c1").answered(url(VIP, port), 9) == 9, way
    wait_for_statistics(site, "least-four", active=0)


def test_a_controller_that_is_killed_and_started_again(
        site: Lab, download: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    site.controller.kill()
    for one in held.values():
        assert one.ask() == one.server
    assert site.client("c1").who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
    site.start_controller()
    wait_until(lambda: site.client("c1").run("curl", "-sf", "--max-time", "1", url(VIP, 8080),
                                             check=False).returncode == 0, 15, "new connections are decided")
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    check(download)


class Second:
    """Another control segment at the same agent (second_segment.py)."""

    def __init__(self, site: Lab, key: Path, directory: Path, announced: list[dict[str, Any]]) -> None:
        self.state, self.log = directory / "second.json", directory / "second.log"
        with self.log.open("wb") as log:
            self.process = site.root.popen(sys.executable, "-m", "tests.integration.second_segment",
                                           f"127.0.0.1:{ONE}", str(key), str(self.state), stdin=subprocess.PIPE,
                                           stdout=log, stderr=log)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(announced).encode())
        self.process.stdin.close()
        wait_until(lambda: self.told().get("synced"), 10, "the second control segment is connected")

    def told(self) -> dict[str, Any]:
        return json.loads(self.state.read_text()) if self.state.exists() else {}


def targets(site: Lab, pool_name: str, *names: str) -> list[dict[str, Any]]:
    """Members as the wire knows them, with the numbers that the first control segment gave."""
    (switch,) = site.rest.get("/v1/switches")["switches"]
    listed = site.rest.get(f"/v1/pools/{pool_name}/members")["members"]
    return [{"member": one["number"], "address": one["address"], "port": one["protocol_port"],
             "mac": switch["hosts"][one["address"]]["mac"], "out_port": switch["hosts"][one["address"]]["port"]}
            for one in listed if one["name"] in names]


def test_two_control_segments_at_one_agent(site: Lab, agent: Agent, tmp_path: Path, key: Path) -> None:
    """The second one has a virtual server of its own, and one that the first one has too."""
    s1, s3 = targets(site, "turns-four", "s1"), targets(site, "turns-four", "s3")
    # The same number for a member as the first one's, and another host behind it.
    other = [{**s3[0], "member": s1[0]["member"]}]
    client, gone = site.client("c1"), agent.said("is gone")
    # None of these ends before the ends of others are counted.
    kept = [Held(client, VIP, 8080)]
    while kept[-1].server != "s1":
        kept.append(Held(client, VIP, 8080))
    first = kept[-1]
    wait_for_statistics(site, "round-four", active=len(kept))
    closed = statistics(site, "round-four")["closed"]
    second = Second(site, key, tmp_path, [
        {"number": 1, "address": VIP, "port": 9000, "mode": "PUNT", "targets": other},
        {"number": 2, "address": VIP, "port": 9001, "mode": "DECIDE", "targets": other},
        {"number": 3, "address": VIP, "port": 8080, "mode": "PUNT", "targets": s3}])
    try:
        wait_until(lambda: _served(client, 9000), 10, "the agent has what the second one said")
        for port in (9000, 9001):
            assert client.who(url(VIP, port), 9) == {"s3": 9}, "the second one's own"
        assert client.who(url(VIP, 8080), 9) == {"s1": 3, "s2": 3, "s3": 3}, "the first one is asked"
        wait_until(lambda: sum(second.told()["deleted"].values()) >= 28, 10, "all ends, to the second")
        wait_for_statistics(site, "round-four", 10, closed=closed + 9)
        told, mine, theirs = second.told(), s1[0]["member"], s3[0]["member"]
        assert told["queries"] == 10
        assert told["deleted"] == {f"1/{mine}": 10, f"2/{mine}": 9, f"3/{theirs}": 3, "3/0": 6}
        wait_until(lambda: second.told()["traffic"].get(f"1/{mine}", [0, 0])[:2] == [10, 10], 5, "its traffic")
        held_there = Held(client, VIP, 9000)
        # Its members go: theirs alone.
        second.process.send_signal(signal.SIGUSR1)
        with pytest.raises(OSError):
            for _ in range(30):
                held_there.ask()
                time.sleep(0.1)
        held_there.reset()
        assert first.ask() == "s1"
        # The first one is killed: the second one is asked, and the other way round.
        site.controller.kill()
        wait_until(lambda: agent.said("is gone") > gone, 10, "one of them is gone")
        assert client.who(url(VIP, 8080), 9) == {"s3": 9}
        assert client.who(url(VIP, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
        assert first.ask() == "s1"
        site.start_controller()
        wait_until(lambda: client.who(url(VIP, 8080), 3) == {"s1": 1, "s2": 1, "s3": 1}, 40, "the first one is asked")
        second.process.kill()
        second.process.wait()
        wait_until(lambda: agent.said("is gone") >= gone + 2, 10, "the other one is gone")
        for port in (80, 8080):
            assert client.who(url(VIP, port), 9) == {"s1": 3, "s2": 3, "s3": 3}
        assert client.who(url(VIP, 9001), 3) == {"s3": 3}, "what needs nobody goes on"
        assert first.ask() == "s1"
        for one in kept:
            one.close()
    finally:
        end(second.process)
    agent.kill()  # the next one hears nothing of the second, and gives it up
    agent.start()
    wait_until(lambda: client.run("curl", "-sf", "--max-time", "0.5", url(VIP, 9001), check=False).returncode != 0, 15,
               "what nobody wants any more goes")


def test_queries_by_openflow_are_the_switchs_own(site: Lab) -> None:
    """With the agent elsewhere, nobody knows when an entry would be there: conntrack has these connections."""
    site.controller.stop()
    site.controller.options += ["--queries", "openflow"]
    site.start_controller()
    wait_until(lambda: fastpath(site) is not None, 15, "the agent is connected")
    client = site.client("c1")
    try:
        site.rest.patch("/v1/virtual-servers/least-four", {"connection_limit": 3})
        settle(site)
        time.sleep(1)
        queries, deletes = count(site, "queries"), count(site, "deletes")
        for vip in (VIP, VIP6):
            for port in (8080, 8081):
                assert client.who(url(vip, port), 3) == {"s1": 1, "s2": 1, "s3": 1}
            assert sorted(map(str, client.udp(vip, 54, 9))) == ["s1"] * 3 + ["s2"] * 3 + ["s3"] * 3
        time.sleep(0.5)
        assert (count(site, "queries"), count(site, "deletes")) == (queries, deletes)
        for vip in (VIP, VIP6):
            assert client.who(url(vip, 80), 9) == {"s1": 3, "s2": 3, "s3": 3}
        wait_until(lambda: count(site, "deletes") >= deletes + 18, 10, "what the fast path decides is in it")
        # What conntrack holds is read every ten seconds.
        wait_for_statistics(site, "least-four", 25, active=0)
        with held(client, VIP, 8081, 3) as three:
            assert sorted(one.server for one in three) == ["s1", "s2", "s3"]
            assert refused(client, VIP, 8081) < REFUSED_WITHIN
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
                assert lab.client("c1").answered(url(VIP, port), 9) == 9
            wait_until(lambda: count(lab, "deletes") >= 18, 10, "the ends, from the first switch")
            assert count(lab, "queries") >= 9
        finally:
            for one in agents:
                one.remove()
