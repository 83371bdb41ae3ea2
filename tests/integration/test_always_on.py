# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Faults while all else is watched: a probe of 50 requests a second, 20 long transfers, what the controller uses.

Each fault's own rules are tested where its feature is. Here it is whether others notice: bodies are whole, transfers
arrive as they were sent, the controller neither grows nor keeps descriptors, and soon after all is as it was.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.integration.probing import Seen, probing
from tests.integration.support import VIP, configure, members, pool, server
from topologies.namespace import end, wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True
pytestmark = pytest.mark.alone
TRANSFERS, SIZE, RATE = 20, 2_000_000, 250_000
"""Eight seconds: longer than any fault below goes on."""
READER = Path(__file__).with_name("slow_reader.py")
GROWTH = 50_000_000
BACK_WITHIN = 10.0
SPARE_DESCRIPTORS = 8
"""Connections to switch and database may be made anew at the moment of either count."""
CHECK = {"type": "HTTP", "interval": 1, "fast_interval": 0.25, "timeout": 1, "rise": 2, "fall": 2}
NETWORK = {"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254", "monitor_address": "10.0.0.250"}
Fault = Callable[["Lab"], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def member_dies(lab: Lab) -> Iterator[None]:
    """Row 1."""
    lab.server("s3").kill(lab.services["s3"][0])
    try:
        yield
    finally:
        lab.start_servers()


@contextlib.contextmanager
def member_drowns(lab: Lab) -> Iterator[None]:
    """Row 2."""
    host = lab.server("s3")
    host.run("nft", "table inet test_fault { chain in { type filter hook input priority 0; tcp dport 80 drop; }; }")
    try:
        yield
    finally:
        host.run("nft", "delete table inet test_fault")


@contextlib.contextmanager
def controller_dies(lab: Lab) -> Iterator[None]:
    """Row 5."""
    lab.controller.kill()
    try:
        yield
    finally:
        lab.start_controller()


@contextlib.contextmanager
def _hping(lab: Lab, *words: str) -> Iterator[None]:
    flood = lab.client("c3").popen("hping3", "-q", "-p", "8081", "-i", "u100", *words, VIP,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        assert flood.poll() is None, "the flood went on all the time"
    finally:
        end(flood)


def flood_of_syns(lab: Lab) -> contextlib.AbstractContextManager[None]:
    """Row 12: from everywhere, at what is read first."""
    return _hping(lab, "-S", "--rand-source")


def flood_of_others(lab: Lab) -> contextlib.AbstractContextManager[None]:
    """Row 13."""
    return _hping(lab, "-F", "-P", "-U")


@contextlib.contextmanager
def abuse_of_rest(lab: Lab) -> Iterator[None]:
    """Row 17: senders that never come to an end, no tokens, bodies that are nothing."""
    with contextlib.ExitStack() as stack, lab.root.entered():
        for _ in range(100):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", 8080), timeout=5))
            slow.sendall(b"POST /v1/pools HTTP/1.1\r\nHost: a\r\nContent-Le")
        bodies: tuple[Any, ...] = ({"name": 1}, [[]], "x" * 100_000)
        answers = {lab.rest.request("POST", "/v1/pools", body, headers).status_code for body in bodies
                   for headers in ({"Authorization": "Bearer no"}, None)}
        assert answers <= {400, 401, 413, 422} and 401 in answers, answers
        yield


FAULTS: dict[str, tuple[Fault, float, bool]] = {
    "a member dies": (member_dies, 2.0, False), "a member drowns": (member_drowns, 3.0, False),
    "the controller dies": (controller_dies, 1.0, True), "a flood of SYNs": (flood_of_syns, 4.0, True),
    "a flood of other segments": (flood_of_others, 4.0, True), "abuse of REST": (abuse_of_rest, 2.0, True)}
"""The fault, for how many seconds, and whether the probe must see next to nothing of it."""


@pytest.fixture
def served(lab: Lab) -> tuple[Lab, str]:
    """80: all servers, decided by the switch; 8080: those that nothing happens to; 8081: one that reads requests."""
    lab.start_servers()
    digest = lab.make_file("long", SIZE)
    others = [member for member in members(lab) if member["name"] != "s3"]
    configure(lab, [pool("all", "WEIGHTED_ROUND_ROBIN", members(lab), monitors=[CHECK]),
                    pool("others", "ROUND_ROBIN", others), pool("read", "ROUND_ROBIN", others)],
              [server("all", 80, "all"), server("others", 8080, "others", decision="controller"),
               server("read", 8081, "read", application="http")], [NETWORK])
    wait_until(lambda: all(one["health_status"]["state"] == "up" for one in lab.rest.get("/v1/pools/all/members")[
        "members"]), 15, "all are found to be well")
    return lab, digest


def _process(lab: Lab) -> psutil.Process:
    assert lab.controller.process is not None
    return psutil.Process(lab.controller.process.pid)


def _share(seen: list[Seen]) -> float:
    return sum(one.error is None and one.name in ("s1", "s2", "s3") for one in seen) / len(seen)


@pytest.mark.parametrize("name", FAULTS)
def test_others_notice_nothing(served: tuple[Lab, str], name: str, told: Callable[[str], None]) -> None:
    (lab, digest), (fault, seconds, unseen) = served, FAULTS[name]
    process = _process(lab)
    memory, descriptors, used = process.memory_info().rss, process.num_fds(), sum(process.cpu_times()[:2])
    begun = time.monotonic()
    transfers = lab.client("c2").popen(sys.executable, "-S", str(READER), VIP, "8080", "/long", str(TRANSFERS),
                                       str(RATE), stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as running:
        running.callback(end, transfers)
        probe = running.enter_context(probing(lab.client("c1"), VIP, 80))
        wait_until(lambda: len(lab.rest.get("/v1/connections?virtual_server=others")["connections"]) == TRANSFERS, 10,
                   "they are under way")
        with fault(lab):
            time.sleep(seconds)
            assert transfers.poll() is None, "they are under way"
        healed = time.monotonic()
        probe.quiet(25, BACK_WITHIN)
        back = max(0.0, time.monotonic() - healed - 25 / 50)
        told_by, _ = transfers.communicate(timeout=60)
        assert [json.loads(line) for line in told_by.splitlines()] == [digest] * TRANSFERS
        probe.quiet(25, BACK_WITHIN)
        seen = probe.stop()
    after = _process(lab)
    spent = sum(after.cpu_times()[:2]) - (used if after == process else 0)
    if after == process:
        assert after.memory_info().rss - memory < GROWTH
        wait_until(lambda: after.num_fds() <= descriptors + SPARE_DESCRIPTORS, BACK_WITHIN, "no descriptor is kept")
    assert {one.name for one in seen if one.error is None} == {"s1", "s2", "s3"}, "bodies are whole, none is left out"
    if unseen:
        assert _share(seen) >= 0.99, [one for one in seen if one.error]
    told(f"{len(seen)} probes, {_share(seen):.1%} well; well again {back:.1f} s after its end; controller "
         f"{spent / (time.monotonic() - begun):.0%} of a core")
