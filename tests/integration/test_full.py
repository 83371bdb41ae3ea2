# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Full tables, and a controller that does not keep up: refused cleanly and counted, old flows live (faults 14)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import (
    LAN,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    configure,
    downloads,
    flows,
    held,
    members,
    pool,
    refused,
    server,
    settle,
    statistics,
    tcp,
)
from tests.namespaces import require
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

HELD = 8
BURST = 3000
RULES_RETURN, RULES = 1, 12


def _switch(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = lab.rest.get("/v1/stats")["switches"][0]
    return found


def _tracked(lab: Lab) -> int:
    return int(lab.ovs.appctl("dpctl/ct-get-nconns", "netdev@ovs-netdev"))


@contextlib.contextmanager
def conntrack_of(lab: Lab, more: int) -> Iterator[None]:
    """Room for so many connections more, for the time of the block."""
    before = lab.ovs.appctl("dpctl/ct-get-maxconns", "netdev@ovs-netdev").strip()
    lab.ovs.appctl("dpctl/flush-conntrack")
    try:
        lab.ovs.appctl("dpctl/ct-set-maxconns", "netdev@ovs-netdev", str(_tracked(lab) + more))
        yield
    finally:
        lab.ovs.appctl("dpctl/ct-set-maxconns", "netdev@ovs-netdev", before)


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("decision", ["switch", "controller"])
def test_conntrack_is_full(lab: Lab, vip: str, decision: str, told: Callable[[str], None]) -> None:
    six = ":" in vip
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab, six=six))], [server("web", 80, "web", vip,
                                                                                decision=decision)])
    client = lab.client("c1")
    digest = lab.make_file("large", 32_000_000)
    url = f"http://[{vip}]/large" if six else f"http://{vip}/large"
    with conntrack_of(lab, HELD + 1), downloads(lab.client("c2"), [url], lab.directory, "8M") as (going,):
        going.progressed(100_000)
        before = _switch(lab)["conntrack_full"]
        with held(client, vip, 80, HELD) as old:
            attempts = 5
            slowest = max(refused(client, vip, 80) for _ in range(attempts))
            assert slowest < REFUSED_WITHIN
            assert _switch(lab)["conntrack_full"] - before == attempts
            assert sum(statistics(lab, "web")["refused"].values()) == attempts
            assert [one.ask() for one in old] == [one.server for one in old], "the old ones live on"
            assert going.running
            lab.ovs.appctl("dpctl/ct-set-maxconns", "netdev@ovs-netdev", str(_tracked(lab) + 2))
            begun = time.monotonic()
            assert _admitted(lab, vip), "there is room again"
            told(f"refused in {slowest * 1000:.1f} ms at most; with room, served in {time.monotonic() - begun:.2f} s")
        assert going.digest() == digest


def _admitted(lab: Lab, vip: str = VIP) -> bool:
    try:
        Held(lab.client("c3"), vip, 80).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def flow_limit(lab: Lab, table: int, rules: int) -> Iterator[None]:
    """A table of the switch takes so many rules and no more, for the time of the block."""
    lab.ovs.vsctl("--", "--id=@ft", "create", "Flow_Table", f"flow_limit={rules}", "overflow_policy=refuse",
                  "--", "set", "Bridge", "lb1", f"flow_tables:{table}=@ft")
    try:
        yield
    finally:
        lab.ovs.vsctl("clear", "Bridge", "lb1", "flow_tables")


@pytest.mark.parametrize("table", [RULES, RULES_RETURN], ids=["the inbound table", "the outbound table"])
def test_a_rule_table_is_full(lab: Lab, table: int, told: Callable[[str], None]) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))], [server("web", 80, "web", state="rules")])
    client = lab.client("c1")
    pairs = [flow for flow in flows(lab) if flow.startswith(("cookie=0x1b08", "cookie=0x1b09"))]
    wait_until(lambda: not [flow for flow in flows(lab) if flow.startswith(("cookie=0x1b08", "cookie=0x1b09"))], 15,
               f"{len(pairs)} rules of the tests before are gone")
    standing = len(flows(lab, f"table={table}"))
    before = _switch(lab)["table_full"]
    with flow_limit(lab, table, standing + HELD), held(client, VIP, 80, HELD) as old:
        slowest = 0.0
        for attempt in range(1, 6):
            slowest = max(slowest, refused(client, VIP, 80))
            assert slowest < REFUSED_WITHIN
            assert _switch(lab)["table_full"] - before == attempt
        assert sum(statistics(lab, "web")["refused"].values()) == 5
        assert statistics(lab, "web")["active"] == HELD, "what was refused is not active"
        assert [one.ask() for one in old] == [one.server for one in old], "the old ones live on"
        listed = flows(lab)
        for kind in ("cookie=0x1b08", "cookie=0x1b09"):
            assert len([flow for flow in listed if flow.startswith(kind)]) == HELD, "no half of a pair is left"
        old[0].close()
        begun = time.monotonic()
        wait_until(lambda: _admitted(lab), 12, "a pair that ended makes room")
        told(f"refused in {slowest * 1000:.1f} ms at most; room again in {time.monotonic() - begun:.2f} s")


@contextlib.contextmanager
def small_buffers(lab: Lab) -> Iterator[None]:
    """The controller's connection holds some 100 kB on its way: the kernel would let it be 10 MB."""
    names = ("net.ipv4.tcp_wmem", "net.ipv4.tcp_rmem")
    before = [lab.root.run("sysctl", "-n", name).stdout.strip() for name in names]
    for name in names:
        lab.root.run("sysctl", "-qw", f"{name}=4096 16384 65536")
    try:
        lab.controller.stop()
        lab.start_controller()
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            lab.root.run("sysctl", "-qw", f"{name}={value}")


@pytest.mark.parametrize("how", [{"decision": "controller"}, {"state": "rules"}], ids=["conntrack", "rules"])
def test_more_than_the_controller_can_take(lab: Lab, how: dict[str, Any]) -> None:
    """SYNs, more than sockets hold, while the controller stands still: the rest is dropped and counted, it goes on."""
    require("hping3")
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))], [
        server("web", 80, "web", **how), server("switch", 81, "web", decision="switch")], LAN)
    with small_buffers(lab):
        settle(lab)
        _overrun(lab)


def _overrun(lab: Lab) -> None:
    client, process = lab.client("c1"), lab.controller.process
    assert process is not None
    digest = lab.make_file("large", 32_000_000)
    with held(lab.client("c2"), VIP, 80, 5) as old, \
            downloads(lab.client("c2"), [f"http://{VIP}/large"], lab.directory, "5M") as (going,):
        going.progressed(1_000_000)
        lab.rest.get("/v1/stats")
        dropped, memory = _switch(lab)["queries_dropped"], lab.controller.rss()
        process.send_signal(signal.SIGSTOP)
        try:
            sent = client.run("hping3", "-q", "-S", "-p", "80", "-s", "10000", "-i", "u300", "-c", str(BURST), VIP,
                              check=False, timeout=20)
            assert f"{BURST} packets transmitted" in sent.stdout + sent.stderr, sent
            assert set(lab.client("c3").who(f"http://{VIP}:81/", 45)) == {"s1", "s2", "s3"}, "the switch's own go on"
            assert [one.ask() for one in old] == [one.server for one in old]
        finally:
            process.send_signal(signal.SIGCONT)
        begun = time.monotonic()
        fresh = wait_until(lambda: _quick(lab), 10, "new connections are taken again")
        took = time.monotonic() - begun
        assert fresh
        # Open vSwitch adds up once a second what its threads have counted.
        wait_until(lambda: _switch(lab)["queries_dropped"] > dropped, 5, "what the queue did not hold is counted")
        assert [one.ask() for one in old] == [one.server for one in old]
        assert going.digest() == digest
    assert took <= 10
    assert lab.controller.rss() - memory < 50_000_000
    counted: Counter[str] = lab.client("c2").who(f"http://{VIP}/", 30)
    assert set(counted) == {"s1", "s2", "s3"}


def _quick(lab: Lab) -> bool:
    try:
        tcp(lab.client("c3"), VIP, 80, timeout=0.5).close()
    except (TimeoutError, ConnectionRefusedError):
        return False
    return True
