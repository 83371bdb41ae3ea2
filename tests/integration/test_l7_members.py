# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Members that take less than most do: whoever shakes hands for them must not promise more. Every binding, IPv4 and
IPv6."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.handed_over import Site
from tests.integration.support import VIP, VIP6, configure, family_of, members, pool, server
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WEB_SERVER = Path(__file__).with_name("web_server.py")
WAYS = {"splice": (80, 9000), "handoff": (81, 9001), "hybrid": (82, 9002), "relay": (83, 9003)}
"""The virtual server's port, and the member's."""
MTU = 1400
BODY = os.urandom(1_000_000)
ALL = [(way, vip) for way in WAYS for vip in (VIP, VIP6)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("members")
    with contextlib.ExitStack() as running:
        lab = running.enter_context(Lab(SingleTopo(clients=1, servers=1), directory=directory / "lab",
                                        options=["--fastpath"]))
        for _, port in WAYS.values():
            running.callback(end, lab.server().popen(sys.executable, str(WEB_SERVER), "s1", str(port)))
        lab.start_controller()
        assert lab.has_fastpath
        pools, servers = [], []
        for way, (port, behind) in WAYS.items():
            for word, vip, mss in (("four", VIP, MTU - 40), ("six", VIP6, MTU - 60)):
                name = f"{way}-{word}"
                pools.append(pool(name, "ROUND_ROBIN", members(lab, behind, vip == VIP6), mss=mss))
                servers.append(server(name, port, name, vip, application="http", binding=way))
        configure(lab, pools, servers)
        made = Site(lab, [WAYS["handoff"][1]])
        running.callback(made.stop_agents)
        made.start_agents()
        yield made


@contextlib.contextmanager
def connected(site: Site, way: str, vip: str) -> Iterator[http.client.HTTPConnection]:
    with site.lab.client().entered():
        made = socket.socket(family_of(vip))
    with made:
        made.settimeout(10)
        made.connect((vip, WAYS[way][0]))
        connection = http.client.HTTPConnection(vip, WAYS[way][0])
        connection.sock = made
        yield connection


def digest_of(connection: http.client.HTTPConnection) -> str:
    connection.request("POST", "/", BODY)
    return connection.getresponse().read().decode().strip()


@pytest.mark.parametrize(("way", "vip"), ALL)
def test_a_member_behind_a_smaller_mtu_is_sent_no_more(site: Site, way: str, vip: str) -> None:
    host, before = site.lab.server(), site.shaken()
    host.run("ip", "link", "set", host.interface, "mtu", str(MTU))
    try:
        with connected(site, way, vip) as connection:
            for _ in range(2):
                assert digest_of(connection) == hashlib.sha256(BODY).hexdigest()
    finally:
        host.run("ip", "link", "set", host.interface, "mtu", "1500")
    wait_until(lambda: before()[0] == 1 and (before()[1] > 0) == (way != "handoff"), 5, "handshakes of this binding")


@pytest.mark.parametrize(("way", "vip"), [(way, vip) for way, vip in ALL if way != "handoff"])
def test_a_member_without_window_scaling_is_told_whole_windows(site: Site, way: str, vip: str) -> None:
    """It would take the client's for a hundredth of what is meant, and send a segment at a time. (Such a host takes
    nothing by handoff, docs/handoff.md.)"""
    host = site.lab.server()
    host.run("sysctl", "-qw", "net.ipv4.tcp_window_scaling=0")
    try:
        with connected(site, way, vip) as connection:
            for _ in range(2):
                connection.request("GET", "/bytes/1000192")
                assert connection.getresponse().read() == bytes(range(256)) * (1_000_192 // 256)
            told = host.run("ss", "-tniH", "state", "established", "sport", "=", f":{WAYS[way][1]}").stdout
            found = re.search(r"snd_wnd:(\d+)", told)
            assert found, told
            assert int(found[1]) > 20_000
            assert digest_of(connection) == hashlib.sha256(BODY).hexdigest()
    finally:
        host.run("sysctl", "-qw", "net.ipv4.tcp_window_scaling=1")
