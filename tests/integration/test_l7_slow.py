# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that are slow on purpose (slowhttptest) against a virtual server that reads requests: nobody else notices.

A connection that says nothing costs nothing; one that says half a request is held until ``inspect_timeout``, and then
answered 408. What is slow later is between client and member: nothing of it is held here.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from tests.integration.l7_site import everything
from tests.integration.support import VIP, configure, members, pool, server
from topologies.lab import Lab, unavailable
from topologies.namespace import end
from topologies.single import SingleTopo

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(shutil.which("slowhttptest") is None, reason="not installed: slowhttptest")]

INSPECT_SECONDS = 2
SLOW = 400
"""Connections of an attack, all within a second or two."""
GROWTH = 50 << 20
SLOWEST = 2.0
"""Seconds for anybody else's request, on a machine that is busy."""
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(SingleTopo(clients=2, servers=2), directory=tmp_path_factory.mktemp("slow") / "lab",
             options=["--fastpath"]) as made:
        made.start_servers()
        made.make_file("big", 2_000_000)
        made.start_controller()
        assert made.has_fastpath
        configure(made, [pool("pool", "ROUND_ROBIN", members(made))],
                  [server("web", 80, "pool", application="http", inspect_timeout=INSPECT_SECONDS)])
        yield made


class Probe:
    """Somebody else's requests, one after another, each on a connection of its own, while the block runs."""

    def __init__(self, lab: Lab) -> None:
        self._client = lab.client("c1")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.served = 0
        self.slowest = 0.0
        self.failures: list[str] = []

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(20)

    def _run(self) -> None:
        self._client.enter()
        while not self._ending.wait(0.02):
            began = time.monotonic()
            try:
                with socket.create_connection((VIP, 80), 5) as it:
                    it.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
                    answer = b""
                    while part := it.recv(4096):
                        answer += part
                if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith((b"s1\n", b"s2\n"))):
                    self.failures.append(repr(answer))
                self.served += 1
            except OSError as error:
                self.failures.append(str(error))
            self.slowest = max(self.slowest, time.monotonic() - began)


def _asked(lab: Lab) -> int:
    return int(lab.rest.get("/v1/stats")["switches"][0]["fastpath"]["queries"])


def attack(lab: Lab, kind: str, seconds: int, *options: str, path: str = "/") -> tuple[str, int]:
    """Run slowhttptest from the second client, at most so long, and assert that the first one notices nothing.

    Returns:
        what it printed at its end, and how many messages to the control segment its connections cost.
    """
    before, memory = _asked(lab), lab.controller.rss()
    process = lab.client("c2").popen(
        "slowhttptest", kind, "-c", str(SLOW), "-r", str(SLOW), "-i", "1", "-l", str(seconds), "-p", "5", *options,
        "-u", f"http://{VIP}{path}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with Probe(lab) as probe:
            said = ESCAPE.sub("", process.communicate(timeout=seconds + 15)[0])
    finally:
        end(process)
    assert probe.failures == [] and probe.served > 50 and probe.slowest < SLOWEST, vars(probe)
    assert lab.controller.rss() - memory < GROWTH
    return said, _asked(lab) - before - probe.served


def test_slow_headers(lab: Lab) -> None:
    """All are gone when their time is over, long before the attack would end; none costs more than a few messages."""
    said, asked = attack(lab, "-H", 12)
    assert "No open connections left" in said, said
    assert SLOW <= asked <= 10 * SLOW


def test_what_slow_headers_are_answered(lab: Lab) -> None:
    """408, each of them; not before their time, and not long after it, though each says another bit now and then."""
    began = time.monotonic()
    clients = []
    with lab.client("c2").entered():
        for _ in range(100):
            clients.append(socket.create_connection((VIP, 80), 10))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n")
    answers: list[bytes] = []
    with Probe(lab) as probe:
        time.sleep(INSPECT_SECONDS / 2)
        for one in clients:
            one.sendall(b"X-More: 1\r\n")
        for one in clients:
            with one:
                answers.append(everything(one))
    assert all(one.startswith(b"HTTP/1.1 408 ") and one.endswith(b"408 Request Timeout\n") for one in answers), answers
    assert INSPECT_SECONDS <= time.monotonic() - began < INSPECT_SECONDS + 5
    assert probe.failures == []


@pytest.mark.parametrize("kind", ["body", "read"])
def test_what_is_slow_later_is_the_member_s(lab: Lab, kind: str) -> None:
    """One message a connection, as for any other; a member may have as much patience as it likes."""
    options = () if kind == "body" else ("-w", "10", "-y", "20", "-n", "1", "-z", "5")
    said, asked = attack(lab, "-B" if kind == "body" else "-X", 5, *options, path="/" if kind == "body" else "/big")
    assert re.search(rf"connected: +{SLOW}$", said, re.MULTILINE), said
    assert SLOW <= asked <= SLOW + 20, "slowhttptest's own probes are among them"
    assert lab.client("c1").who(f"http://{VIP}/", 10).keys() == {"s1", "s2"}
