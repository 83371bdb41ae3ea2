# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on new connections, with and without a fast path, and with one beside the switch on another host.

Exercises lbapp.control.buckets, lbapp/dataflow/fastpath/limits.bpf.h and what tells them from end to end. A limit is
asserted by what can never be exceeded, however slow the machine: a bucket, and what was made since the first attempt.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration import beside
from tests.integration.support import (
    ECHO_PORT,
    VIP,
    VIP6,
    Held,
    addresses,
    configure,
    members,
    pool,
    reset,
    server,
    statistics,
    tcp,
)
from topologies.hosts import LabHost
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WITH_FASTPATH = True
RATE, BURST = 20, 20
SECONDS = 3.0


class Tried(NamedTuple):
    """What became of attempts to connect, one after the other, in so many seconds."""

    accepted: int
    refused: int
    silent: int
    seconds: float


def attempts(host: LabHost, address: str, port: int, seconds: float, source: str | None = None,
             pause: float = 0.0) -> Tried:
    """Connect again and again, each time from another port; what is accepted is reset at once."""
    begun, accepted, refused, silent = time.monotonic(), 0, 0, 0
    while time.monotonic() - begun < seconds:
        try:
            one = tcp(host, address, port, source)
        except ConnectionRefusedError:
            refused += 1
        except TimeoutError:
            silent += 1
        else:
            accepted += 1
            reset(one)
        time.sleep(pause)
    return Tried(accepted, refused, silent, time.monotonic() - begun)


def limited(lab: Lab, algorithm: str = "WEIGHTED_ROUND_ROBIN", protocol: str = "TCP", **limits: Any) -> Lab:
    """One virtual server of each family, on port 80 (UDP: 53)."""
    port, first = (80, 80) if protocol == "TCP" else (ECHO_PORT, 53)
    pools = [pool(f"pool{six:d}", algorithm, members(lab, port, six)) for six in (False, True)]
    configure(lab, pools, [server(f"web{six:d}", first, f"pool{six:d}", vip, protocol, **limits)
                           for six, vip in ((False, VIP), (True, VIP6))])
    return lab


def refused(lab: Lab, name: str = "web0") -> dict[str, int]:
    """What /v1/stats says was refused."""
    found: dict[str, int] = statistics(lab, name)["refused"]
    return found


@contextlib.contextmanager
def flood(host: LabHost, address: str, port: int, microseconds: int = 3000) -> Iterator[subprocess.Popen[Any]]:
    """SYNs of a host's own address that nobody means, for the time of the block."""
    process = host.popen("hping3", "-q", "-S", "-p", str(port), "-i", f"u{microseconds}", address,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        end(process)


# ------------------------------------------------------------------ of a virtual server


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("algorithm", ["WEIGHTED_ROUND_ROBIN", "LEAST_CONNECTIONS"], ids=["decided", "asked"])
def test_no_more_connections_than_the_limit(lab: Lab, algorithm: str, vip: str) -> None:
    limited(lab, algorithm, rate_limit=RATE, rate_burst=BURST)
    tried = attempts(lab.client("c1"), vip, 80, SECONDS)
    asked = tried.accepted + tried.refused + tried.silent
    assert tried.accepted <= BURST + RATE * tried.seconds + 2, tried
    assert tried.accepted >= min(asked, BURST + RATE * tried.seconds) / 2, tried
    assert tried.refused and not tried.silent, "told at once"
    name = f"web{vip == VIP6:d}"
    wait_until(lambda: refused(lab, name).get("RATE", 0) >= tried.refused, 5, "they are counted")
    # With time there are new ones.
    wait_until(lambda: attempts(lab.client("c1"), vip, 80, 0.0001).accepted, 10, "one more")


def test_established_connections_go_on(lab: Lab) -> None:
    limited(lab, rate_limit=1, rate_burst=3)
    one = Held(lab.client("c1"), VIP, 80)
    assert attempts(lab.client("c2"), VIP, 80, 1.0).refused
    for _ in range(20):
        assert one.ask() == one.server
    one.close()


def test_nothing_at_all(lab: Lab) -> None:
    limited(lab, rate_limit=0)
    tried = attempts(lab.client("c1"), VIP, 80, 0.5)
    assert tried.accepted == 0 and tried.refused


def test_a_limit_is_changed_and_lifted(lab: Lab) -> None:
    limited(lab, rate_limit=1, rate_burst=1)
    assert attempts(lab.client("c1"), VIP, 80, 1.0).refused
    limited(lab)
    tried = attempts(lab.client("c1"), VIP, 80, 1.0)
    assert tried.accepted and not tried.refused and not tried.silent
    limited(lab, rate_limit=0)
    assert not attempts(lab.client("c1"), VIP, 80, 0.5).accepted


# ------------------------------------------------------------------ of clients' networks


def test_who_floods_does_not_take_the_others_share(lab: Lab) -> None:
    """One client at thirty times its limit; another one below its own."""
    limited(lab, client_rate_limit=10, client_rate_burst=10, rate_limit=100)
    result: list[Tried] = []
    with flood(lab.client("c1"), VIP, 80):
        also = threading.Thread(target=lambda: result.append(attempts(lab.client("c1"), VIP, 80, SECONDS)))
        also.start()
        other = attempts(lab.client("c2"), VIP, 80, SECONDS, pause=0.2)
        also.join()
    assert other.accepted >= 3 and not other.refused and not other.silent, other
    greedy = result[0]
    assert greedy.accepted <= 10 + 10 * (greedy.seconds + 1) + 2, greedy
    assert greedy.refused
    wait_until(lambda: refused(lab).get("CLIENT_RATE", 0) >= greedy.refused, 5, "they are counted")
    assert "RATE" not in refused(lab)


def test_a_network_is_one_client(lab: Lab) -> None:
    limited(lab, client_rate_limit=1, client_rate_burst=3, client_prefix_v4=28)
    client = lab.client("c1")
    # Three of 10.0.0.208/28, and one of 10.0.0.224/28.
    with addresses(client, "10.0.0.", 210, 3) as three, addresses(client, "10.0.0.", 230, 1) as other:
        begun = time.monotonic()
        got = [attempts(client, VIP, 80, 0.4, source) for source in three]
        assert sum(one.accepted for one in got) <= 3 + (time.monotonic() - begun) + 1
        assert sum(one.refused for one in got)
        assert attempts(client, VIP, 80, 0.1, other[0]).accepted


# ------------------------------------------------------------------ UDP


def datagrams(host: LabHost, count: int, port: int = 53, each: int = 1) -> tuple[list[int], float]:
    """Flows of so many datagrams at once; how many answers each got, and the seconds from the first
    datagram to the last answer."""
    with contextlib.ExitStack() as stack:
        begun, endpoints = time.monotonic(), []
        for _ in range(count):
            with host.entered():
                endpoint = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            endpoint.connect((VIP, port))
            for index in range(each):
                with contextlib.suppress(ConnectionRefusedError):
                    endpoint.send(b"%d" % index)
            endpoints.append(endpoint)
            endpoint.setblocking(False)
        answers, last = [0] * count, time.monotonic()
        while time.monotonic() < last + 2:
            for number, endpoint in enumerate(endpoints):
                with contextlib.suppress(OSError):
                    answers[number] += bool(endpoint.recv(100))
                    last = time.monotonic()
            time.sleep(0.02)
        return answers, last - begun


@pytest.mark.parametrize("algorithm", ["WEIGHTED_ROUND_ROBIN", "ROUND_ROBIN"], ids=["decided", "asked"])
def test_udp_flows(lab: Lab, algorithm: str) -> None:
    limited(lab, algorithm, "UDP", rate_limit=2, rate_burst=10)
    answers, took = datagrams(lab.client("c1"), 100)
    assert 5 <= sum(answers) <= 10 + 2 * took + 2
    wait_until(lambda: refused(lab).get("RATE", 0) >= 50, 5, "they are counted")


@pytest.mark.parametrize("algorithm", ["WEIGHTED_ROUND_ROBIN", "ROUND_ROBIN"], ids=["decided", "asked"])
def test_the_datagrams_of_a_flow_need_one_token(lab: Lab, algorithm: str) -> None:
    limited(lab, algorithm, "UDP", rate_limit=1, rate_burst=1)
    answers, _ = datagrams(lab.client("c1"), 1, each=4)
    # Without a fast path each is asked about by itself, and may be sent to a member of its own.
    assert 1 <= answers[0] <= 4
    assert not refused(lab)


# ------------------------------------------------------------------ handshakes that are proxied


def test_syns_that_nobody_means_cost_honest_clients_nothing(lab: Lab) -> None:
    """The token is taken by what a client says, which it can say only if it heard the cookie."""
    limited(lab, "ROUND_ROBIN", application="http", rate_limit=1, rate_burst=10)
    client = lab.client("c2")
    with flood(lab.client("c1"), VIP, 80):
        time.sleep(0.5)
        for _ in range(5):
            assert set(client.who(f"http://{VIP}/", 1)) <= {"s1", "s2", "s3"}
    assert not refused(lab)
    asked = 60
    begun = time.monotonic()
    found = client.who(f"http://{VIP}/", asked)
    served = sum(count for name, count in found.items() if name in ("s1", "s2", "s3"))
    assert served <= 10 + (time.monotonic() - begun) + 5
    wait_until(lambda: refused(lab).get("RATE", 0) >= asked - served, 5, "they are counted")


# ------------------------------------------------------------------ an agent beside the switch


@pytest.fixture(scope="module")
def distant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A laboratory whose fast path is told over the buses."""
    key: Path = beside.shared_key(tmp_path_factory)
    for lab in beside.laboratory(key):
        for _ in beside.beside(lab, key):
            wait_until(lambda lab=lab: beside.fastpath(lab) is not None, 15, "the agent is connected")  # type: ignore[misc]
            yield lab


@pytest.mark.parametrize("algorithm", ["WEIGHTED_ROUND_ROBIN", "LEAST_CONNECTIONS"], ids=["decided", "asked"])
def test_an_agent_elsewhere_keeps_the_limit(distant: Lab, algorithm: str) -> None:
    limited(distant, algorithm, rate_limit=RATE, rate_burst=BURST, client_rate_limit=1000)
    time.sleep(1)  # CSMB carries it to the agent
    before = refused(distant).get("RATE", 0)
    tried = attempts(distant.client("c1"), VIP, 80, SECONDS)
    asked = tried.accepted + tried.refused + tried.silent
    assert tried.accepted <= BURST + RATE * tried.seconds + 2, tried
    assert tried.accepted >= min(asked, BURST + RATE * tried.seconds) / 2, tried
    assert tried.refused
    # What the agent refused itself, it tells of once a second.
    wait_until(lambda: refused(distant).get("RATE", 0) - before >= tried.refused, 10, "they are counted")
    assert statistics(distant, "web0")["messages_to_controller"] <= (
        0 if algorithm == "WEIGHTED_ROUND_ROBIN" else tried.accepted + tried.silent + 5)
