# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers that read what clients say, with the agent in a process of its own (lbapp.agent_process): what
test_l7.py shows of an agent in the controller, over the buses, and what can happen to those."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import beside
from tests.integration.beside import ONE, Agent, count, fastpath
from tests.integration.handed_over import Site as Hosts
from tests.integration.l7_site import both, configured, connect, counters, everything, laboratory, named, url
from tests.integration.support import VIP, VIP6, at_rest, statistics
from topologies.lab import Lab, unavailable
from topologies.namespace import wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

LOSS = """
table inet loss {
  chain in {
    type filter hook input priority 0; policy accept;
    iif lo meta l4proto udp numgen random mod 100 < 10 drop
  }
}
"""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside.shared_key(tmp_path_factory)


@pytest.fixture(scope="module")
def lab(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from laboratory(tmp_path_factory, "--agent", f"127.0.0.1:{ONE}", "--bus-key", str(key), fastpath=False)


@pytest.fixture(scope="module")
def agent(lab: Lab, key: Path) -> Iterator[Agent]:
    yield from beside.beside(lab, key)


@pytest.fixture
def site(lab: Lab, agent: Agent) -> Lab:
    wait_until(lambda: fastpath(lab) is not None, 15, "the agent is connected")
    configured(lab)
    wait_until(lambda: served(lab), 10, "the fast path shakes hands")
    return lab


def handshakes(site: Lab) -> int:
    """SYNs that the fast path answered."""
    return counters(site)["greeted"]


def served(site: Lab) -> bool:
    """Whether a new connection is the fast path's, not relayed by the controller. What was counted is told of once a
    second."""
    before = handshakes(site)
    if site.client().run("curl", "-gsS", "-o", "/dev/null", "--max-time", "4", url(VIP), check=False).returncode:
        return False
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        if handshakes(site) > before:
            return True
        time.sleep(0.1)
    return False


def asked(site: Lab, target: str, *options: str, timeout: int = 10) -> str:
    """Which server answers."""
    return site.client().run("curl", "-gsSk", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", str(timeout),
                             *options, target, timeout=timeout + 5).stdout


# ------------------------------------------------------------------ choosing


@both
def test_http_goes_where_the_rules_say(site: Lab, vip: str) -> None:
    name = named(vip, "web")
    before = at_rest(site, name)
    for _ in range(5):
        assert asked(site, url(vip, "/one/x")) == "s1"
        assert asked(site, url(vip, "/about"), "-H", "Host: two.example") == "s2"
        assert asked(site, url(vip, "/about"), "-H", "Cookie: a=b; third=yes") == "s3"
    assert site.client().who(url(vip), 15) == Counter({"s1": 5, "s2": 5, "s3": 5})
    wait_until(lambda: statistics(site, name)["closed"] - before["closed"] == 30, 10, "the ends of all")
    assert statistics(site, name)["opened"] - before["opened"] == 30, "each once"


@both
def test_tls_goes_where_its_server_name_says(site: Lab, vip: str) -> None:
    for host, expected in (("one.example", "s1"), ("a.two.example", "s2"), ("other.example", "s3")):
        found = site.client().curl(url(host, "/", 443, "https"), "-k", "--resolve", f"{host}:443:{vip}")
        assert found.strip() == expected


@both
def test_first_bytes(site: Lab, vip: str) -> None:
    for path, expected in (("/one.txt", "s1"), ("/two", "s2"), ("/three", "s3")):
        with connect(site.client(), vip, 7000) as it:
            it.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert f"X-Server: {expected}".encode() in everything(it)


@both
def test_answers_of_our_own(site: Lab, vip: str) -> None:
    client = site.client()
    found = client.run("curl", "-gsSi", "--max-time", "5", url(vip, "/away")).stdout
    assert found.startswith("HTTP/1.1 308 ")
    assert "Location: https://elsewhere.example/" in found
    found = client.run("curl", "-gsSi", "--max-time", "5", url(vip, "/tea")).stdout
    assert found.startswith("HTTP/1.1 418 ") and found.endswith("short\n")
    found = client.run("curl", "-gsSi", "--max-time", "8", url(vip, "/dead")).stdout
    assert found.startswith("HTTP/1.1 503 "), "every member refused"
    assert asked(site, url(vip, "/half")) == "s2", "the first one refused"
    done = client.run("curl", "-gsS", "--max-time", "5", "-X", "TRACE", url(vip), check=False)
    assert done.returncode == 56, "reset"


def large(size: int) -> list[str]:
    """Headers of so many bytes, none of them long."""
    return [option for number in range(size // 1000) for option in ("-H", f"X-{number:03}: {'x' * 992}")]


@both
def test_a_request_of_60_kilobytes_of_headers(site: Lab, vip: str) -> None:
    """It needs some fifty datagrams. A Python server takes it; nginx would answer 400."""
    began = time.monotonic()
    found = site.client().run("curl", "-gsS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10",
                              *large(60_000), url(vip, "/python")).stdout
    assert found == "200", "the member's own answer"
    assert time.monotonic() - began < 8
    found = site.client().run("curl", "-gsSi", "--max-time", "10", *large(70_000), url(vip, "/python")).stdout
    assert found.startswith("HTTP/1.1 431 "), "more than is read"


# ------------------------------------------------------------------ faults


def test_loss_on_the_bus(site: Lab) -> None:
    """A tenth of all datagrams. A lost question or answer is asked again after half a second; parts are sent again."""
    name = named(VIP, "web")
    before = at_rest(site, name)
    site.root.run("nft", "-f", "-", stdin=LOSS)
    try:
        for _ in range(10):
            assert asked(site, url(VIP, "/one/x")) == "s1"
        assert site.client().who(url(VIP), 30, timeout=60) == Counter({"s1": 10, "s2": 10, "s3": 10})
        for _ in range(4):
            began = time.monotonic()
            found = site.client().run("curl", "-gsS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "15",
                                      *large(60_000), url(VIP, "/python"), timeout=20).stdout
            assert found == "200"
            assert time.monotonic() - began < 12
        found = site.client().run("curl", "-gsSi", "--max-time", "8", url(VIP, "/away")).stdout
        assert found.startswith("HTTP/1.1 308 ")
    finally:
        site.root.run("nft", "delete", "table", "inet", "loss")
    wait_until(lambda: statistics(site, name)["closed"] - before["closed"] == 44, 15, "the ends of all")
    assert statistics(site, name)["opened"] - before["opened"] == 44, "each once, however often it was asked"


def test_an_agent_that_is_killed_and_started_again(site: Lab, agent: Agent) -> None:
    """Its fast path goes on shaking hands; who speaks meanwhile repeats it until somebody hears."""
    agent.kill()
    waiting = [site.client().popen("curl", "-gsS", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "20",
                                   url(VIP, "/one/x"), stdout=subprocess.PIPE) for _ in range(3)]
    time.sleep(1)
    agent.start()
    for one in waiting:
        assert one.communicate(timeout=25)[0] == b"s1"
    wait_until(lambda: served(site), 15, "the fast path shakes hands")
    for _ in range(3):
        assert asked(site, url(VIP, "/about"), "-H", "Host: two.example") == "s2"


def test_a_partition_between_controller_and_agent(site: Lab) -> None:
    """Nobody hears what clients say to the fast path: it leaves them to the switch, and the controller relays."""
    site.root.run("nft", "-f", "-", stdin=f"""
table inet cut {{
  chain in {{
    type filter hook input priority 0; policy accept;
    tcp dport {ONE} drop
    tcp sport {ONE} drop
    iif lo meta l4proto udp drop
  }}
}}
""")
    try:
        wait_until(lambda: site.client().run("curl", "-gsS", "-o", "/dev/null", "--max-time", "2", url(VIP),
                                             check=False).returncode == 0, 20, "relayed")
        for _ in range(5):
            assert asked(site, url(VIP, "/one/x")) == "s1"
            assert asked(site, url(VIP, "/about"), "-H", "Host: two.example") == "s2"
        relayed = [connect(site.client(), vip, 80) for vip in (VIP, VIP6) for _ in range(3)]
        for one in relayed:
            again(one)
    finally:
        site.root.run("nft", "delete", "table", "inet", "cut")
    wait_until(lambda: served(site), 20, "the fast path shakes hands again")
    assert asked(site, url(VIP, "/one/x")) == "s1"
    before = count(site, "hits")
    for _ in range(5):
        for one in relayed:
            again(one)  # taken over, and not cut
    wait_until(lambda: count(site, "hits") - before >= 60, 5, "the fast path has them")
    for one in relayed:
        one.close()


def again(one: socket.socket) -> None:
    """One more request of a connection."""
    one.sendall(b"GET /one/x HTTP/1.1\r\nHost: any.example\r\n\r\n")
    found = b""
    while not found.endswith(b"one/x\n"):
        found += one.recv(65536)
    assert b"X-Server: s1" in found


def test_hybrid_hands_over_to_an_agent_elsewhere(site: Lab) -> None:
    """NEWFLOW with offsets and a window shift, by the bus."""
    configured(site, binding="hybrid")
    time.sleep(1)
    file = site.make_file("download", 20_000_000)
    target = site.directory / "l7-hybrid"
    before = count(site, "hits"), at_rest(site, "web-four")["closed"]
    site.client().run("curl", "-gsSf", "--max-time", "30", "-o", str(target), url(VIP, "/download"), timeout=40)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == file
    wait_until(lambda: count(site, "hits") - before[0] > 100, 5, "most of it went by the fast path")
    wait_until(lambda: statistics(site, "web-four")["closed"] - before[1] == 1, 10, "its end")


def test_a_controller_that_is_started_again(site: Lab) -> None:
    """What is on its way goes on without it; what is new waits for it."""
    file = site.make_file("download", 20_000_000)
    target = site.directory / "l7-downloaded"
    download = site.client("c2").popen("curl", "-gsSf", "--max-time", "60", "--limit-rate", "4M", "-o", str(target),
                                       url(VIP, "/download"))
    try:
        time.sleep(0.7)
        site.controller.kill()
        site.controller.start()
        wait_until(lambda: fastpath(site) is not None, 20, "the agent is connected")
        wait_until(lambda: served(site), 20, "the fast path shakes hands again")
        assert asked(site, url(VIP, "/one/x")) == "s1"
        assert download.wait(60) == 0
        assert hashlib.sha256(target.read_bytes()).hexdigest() == file
    finally:
        download.kill()
        download.wait()


# ------------------------------------------------------------------ handed over


def test_connections_are_handed_to_hosts_that_adopt_them(site: Lab) -> None:
    """The members' hosts have the controller's keys, and so has the fast path: over the buses."""
    hosts = Hosts(site)
    hosts.start_agents()
    try:
        since = hosts.shaken()
        assert site.client().who(url(VIP), 15) == Counter({"s1": 5, "s2": 5, "s3": 5})
        # What is counted is told of once a second.
        wait_until(lambda: since() == (15, 0), 10, "15 handshakes with the client, none with a member")
    finally:
        hosts.stop_agents()
