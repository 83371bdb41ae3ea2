# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Faults and abuse around ``lbapp agent``: a bad bus, bad peers, bad packets, no room (lbapp.agent_process)."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbapp.bus import keyfile
from tests.integration import beside
from tests.integration.beside import ONE, WAYS, Agent, url
from tests.integration.support import VIP, Held, at_rest, statistics, wait_for_statistics
from topologies.controller import ControllerProcess
from topologies.hosts import OWN_PORTS
from topologies.lab import Lab, unavailable
from topologies.namespace import wait_until

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


def test_a_client_uses_its_port_again_and_again(site: Lab) -> None:
    """Row 20."""
    for port in WAYS.values():
        own = next(OWN_PORTS)
        for _ in range(4):
            one = Held(site.client("c1"), VIP, port, source_port=own)
            assert one.ask() == one.server
            one.reset()


def answered(site: Lab, port: int, count: int) -> int:
    """How many of so many requests a member answers, for a client as patient as TCP is: a lost question is asked again
    after half a second, for three seconds; then it takes the client's next SYN."""
    said = site.client("c1").run("curl", "-gsS", "--max-time", "60", "--connect-timeout", "20", "-H",
                                 "Connection: close", *([url(VIP, port)] * count), timeout=120).stdout
    return sum(line in ("s1", "s2", "s3") for line in said.splitlines())


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
        before = {name: at_rest(site, name)["closed"] for name in ("round-four", "fast-four")}
        assert answered(site, 8080, 60) == 60
        assert site.client("c1").answered(url(VIP, 80), 200) == 200
        for name, number in (("round-four", 60), ("fast-four", 200)):
            wait_for_statistics(site, name, 15, closed=before[name] + number)
        time.sleep(1)
        for name, number in (("round-four", 60), ("fast-four", 200)):
            assert statistics(site, name)["closed"] == before[name] + number, "each once"
    finally:
        site.root.run("nft", "delete", "table", "inet", "loss")


def test_reordering_on_the_bus(site: Lab) -> None:
    """Some datagrams take another, slow way, and one in twenty is lost."""
    tc = ("tc", "class", "add", "dev", "lo", "parent", "1:", "classid")
    site.root.run("tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb", "default", "1")
    try:
        site.root.run(*tc, "1:1", "htb", "rate", "10gbit")
        site.root.run(*tc, "1:2", "htb", "rate", "500kbit", "burst", "500", "cburst", "500")
        site.root.run("nft", "-f", "-", stdin="""
table inet loss {
  chain out {
    type filter hook output priority 0; policy accept;
    oif lo meta l4proto udp numgen random mod 100 < 30 meta priority set 1:2
    oif lo meta l4proto udp numgen random mod 100 < 5 drop
  }
}
""")
        before = {name: at_rest(site, name) for name in ("round-four", "least-four", "fast-four")}
        for port in (8080, 8081, 80):
            assert answered(site, port, 50) == 50
        for name, was in before.items():
            wait_for_statistics(site, name, 15, closed=was["closed"] + 50, opened=was["opened"] + 50, active=0)
        delayed = site.root.run("tc", "-s", "class", "show", "dev", "lo", "classid", "1:2").stdout
        assert int(re.findall(r"Sent \d+ bytes (\d+) pkt", delayed)[0]) > 20, "many took the slow way"
        time.sleep(1)
        for name, was in before.items():
            assert statistics(site, name)["closed"] == was["closed"] + 50, "each once"
    finally:
        site.root.run("nft", "delete", "table", "inet", "loss", check=False)
        site.root.run("tc", "qdisc", "del", "dev", "lo", "root")


def test_a_partition_between_controller_and_agent(site: Lab) -> None:
    """Row 6: the bus is cut for 20 s, dead after 3 missed HELLOs. From then on first packets are packet-ins."""
    held = {way: Held(site.client("c1"), VIP, port) for way, port in WAYS.items()}
    ending = [Held(site.client("c1"), VIP, WAYS["least"]) for _ in range(3)]
    closed = at_rest(site, "fast-four", active=1)["closed"]
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
        begun, asked = time.monotonic(), 0
        for one in ending:
            one.close()
        while time.monotonic() < begun + 20:
            asked += site.client("c1").answered(url(VIP, 80), 30)
            for one in held.values():
                assert one.ask() == one.server
            if time.monotonic() > begun + 5:
                assert site.client("c2").who(url(VIP, 8080), 9) == {"s1": 3, "s2": 3, "s3": 3}, "by OpenFlow"
            time.sleep(0.5)
    finally:
        site.root.run("nft", "delete", "table", "inet", "cut")
    wait_for_statistics(site, "fast-four", 15, closed=closed + asked)
    wait_for_statistics(site, "least-four", active=1)
    for one in held.values():
        assert one.ask() == one.server
        one.close()
    wait_for_statistics(site, "least-four", active=0)
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
