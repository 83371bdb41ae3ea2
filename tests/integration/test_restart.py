# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Controller and switch end without warning, and come back; what was established goes on (faults 5, 8, 9)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.support import (
    ECHO_PORT,
    LAN,
    VIP,
    VIP6,
    Download,
    change_member,
    configure,
    downloads,
    flows,
    held,
    members,
    packets,
    pool,
    server,
    settle,
    statistics,
)
from topologies.controller import ControllerProcess
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

ALL = {"s1", "s2", "s3"}
PORTS = {"switch": 80, "controller": 8080, "rules": 8081}
SIZE = 24_000_000
BACK_WITHIN = 5.0


@pytest.fixture
def site(lab: Lab) -> Lab:
    """TCP in the three ways, IPv6, UDP, networks."""
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab)),
                    pool("web6", "SOURCE_IP", members(lab, six=True)),
                    pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT))],
              [server("switch", 80, "web"), server("controller", 8080, "web", decision="controller"),
               server("rules", 8081, "web", state="rules"), server("switch6", 80, "web6", VIP6),
               server("echo", 53, "echo", protocol="UDP")], LAN)
    return lab


@contextlib.contextmanager
def fetching(lab: Lab, size: int = SIZE) -> Iterator[tuple[list[Download], str]]:
    """A download in each of the three ways under way, and what they have to come to."""
    digest = lab.make_file("large", size)
    with downloads(lab.client("c1"), [f"http://{VIP}:{port}/large" for port in PORTS.values()],
                   lab.directory) as going:
        for one in going:
            one.progressed(2_000_000)
        yield going, digest


def decided_again(lab: Lab, begun: float) -> float:
    """Wait until each way gives new connections, and return the seconds since ``begun``."""
    client = lab.client("c2")
    for port in PORTS.values():
        ask = partial(client.run, "curl", "-sf", "--max-time", "0.5", f"http://{VIP}:{port}/", check=False)
        wait_until(lambda: ask().returncode == 0, 15, f"port {port} serves", 0.02)  # noqa: B023 (asked at once)
    return time.monotonic() - begun


def standing(lab: Lab) -> dict[str, tuple[float, int]]:
    """Age and packets of each rule that is no connection's, by its text without counters."""
    found = {}
    for flow in flows(lab):
        if not flow.startswith(("cookie=0x1b08", "cookie=0x1b09")):
            age = re.search(r"duration=([\d.]+)s", flow)
            assert age is not None
            text = re.sub(r"(duration|n_packets|n_bytes|idle_age|hard_age)=[^,]*?(, | )", "", flow)
            found[text] = float(age.group(1)), packets(flow)
    return found


def _kill(lab: Lab, database: bool) -> None:
    """Kill the controller, and with ``database`` the database process that it started as well."""
    lab.controller.kill()
    if database:
        for file in lab.controller.state.glob("*.pid"):
            pid = int(file.read_text())
            assert str(lab.controller.state).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            os.kill(pid, signal.SIGKILL)


@pytest.mark.alone
@pytest.mark.parametrize("alone", [False, True], ids=["with its database", "alone"])
def test_the_controller_dies_and_comes_back(site: Lab, alone: bool) -> None:
    lab = site
    lab.client("c1").who(f"http://{VIP}/", 30)
    document = lab.rest.get("/v1/config")
    with held(lab.client("c3"), VIP, 8080, 4) as punted, held(lab.client("c3"), VIP, 8081, 4) as rules, \
            fetching(lab) as (going, digest):
        rules_before = standing(lab)
        _kill(lab, database=not alone)
        sizes = [one.size for one in going]
        wait_until(lambda: not any(map(lab.ovs.connected, lab.bridges)), 10, "the switch has noticed")
        for client in lab.clients:
            assert set(client.who(f"http://{VIP}/", 45)) == ALL, "the switch goes on deciding"
            assert client.answered(f"http://[{VIP6}]/", 10) == 10
        assert [one.ask() for one in (*punted, *rules)] == [one.server for one in (*punted, *rules)]
        begun = time.monotonic()
        lab.start_controller()
        took = decided_again(lab, begun)
        assert [one.ask() for one in (*punted, *rules)] == [one.server for one in (*punted, *rules)]
        settle(lab)
        rules_after = standing(lab)
        assert all(one.running or one.size == SIZE for one in going)
        assert all(one.size > size for one, size in zip(going, sizes, strict=True))
        assert [one.digest() for one in going] == [digest] * 3
    assert took <= BACK_WITHIN, f"{took:.1f} s from the start of the process"
    assert lab.rest.get("/v1/config") == document
    assert rules_after.keys() == rules_before.keys()
    for text, (age, counted) in rules_before.items():
        assert rules_after[text][0] > age, f"made anew: {text}"
        assert rules_after[text][1] >= counted, f"lost its counters: {text}"


def test_a_configuration_made_just_before_a_crash_is_there(site: Lab) -> None:
    """Durable before the answer: what got a 2xx survives kill -9 of controller and database in the next instant."""
    lab = site
    for round_ in range(3):
        lab.rest.patch("/v1/pools/web", {"description": f"round {round_}"})
        _kill(lab, database=True)
        lab.start_controller()
        assert lab.rest.get("/v1/pools/web")["description"] == f"round {round_}"
    settle(lab)
    assert set(lab.client("c1").who(f"http://{VIP}:8080/", 9)) == ALL


def test_a_change_made_while_a_switch_was_away_reaches_it(site: Lab) -> None:
    lab = site
    lab.ovs.set_controller("lb1", "tcp:127.0.0.1:1")
    try:
        wait_until(lambda: not lab.rest.get("/v1/switches")["switches"], 10, "the switch is not connected")
        path = next(f"/v1/pools/web/members/{one['id']}" for one in lab.rest.get("/v1/pools/web/members")["members"]
                    if one["name"] == "s1")
        lab.rest.patch(path, {"admin_state_up": False})
        lab.rest.delete("/v1/virtual-servers/echo")
        assert "s1" in lab.client("c1").who(f"http://{VIP}/", 45), "it has not heard of it yet"
    finally:
        lab.ovs.set_controller("lb1", "tcp:127.0.0.1:6653")
    lab.wait_connected()
    settle(lab)
    assert set(lab.client("c1").who(f"http://{VIP}/", 40)) == {"s2", "s3"}
    with pytest.raises(ConnectionRefusedError):
        lab.client("c1").udp(VIP, 53)


@pytest.mark.alone
def test_the_switch_dies_and_comes_back(site: Lab) -> None:
    lab = site
    before = set(standing(lab))
    lab.ovs.kill_switch()
    time.sleep(1)
    begun = time.monotonic()
    lab.ovs.ensure_running()
    took = decided_again(lab, begun)
    settle(lab)
    assert took <= BACK_WITHIN, f"{took:.1f} s from the start of ovs-vswitchd"
    assert set(standing(lab)) == before, "all rules are there again, and no other"
    for client in lab.clients:
        assert set(client.who(f"http://{VIP}/", 45)) == ALL
        assert None not in client.udp(VIP, 53, 6)


def test_another_controller_takes_over_without_a_flush(site: Lab) -> None:
    """The switch's target changes to a second controller on the same database: no rule is made anew."""
    lab = site
    other = ControllerProcess(lab.root, lab.directory / "other-state", options=[
        "--listen", "127.0.0.1:6654", "--api", "127.0.0.1:8081",
        "--database", f"unix:{lab.controller.state}/db.sock"], environment=lab.ovs.environment)
    other.rest.base = "http://127.0.0.1:8081"
    try:
        other.start(20)
        with held(lab.client("c3"), VIP, 8080, 4) as punted, fetching(lab) as (going, digest):
            before = standing(lab)
            lab.ovs.set_controller("lb1", "tcp:127.0.0.1:6654")
            wait_until(lambda: other.rest.get("/v1/switches")["switches"], 10, "the switch found the other one")
            wait_until(lambda: not lab.rest.get("/v1/switches")["switches"], 10, "and left the first")
            decided_again(lab, 0)
            assert [one.ask() for one in punted] == [one.server for one in punted]
            listed = other.rest.get("/v1/virtual-servers")["virtual_servers"]
            wait_until(lambda: all(one["operating_status"] == "ONLINE" for one in
                                   other.rest.get("/v1/virtual-servers")["virtual_servers"]), 10, "all is found")
            assert {one["name"] for one in listed} == {"switch", "controller", "rules", "switch6", "echo"}
            after = standing(lab)
            assert after.keys() == before.keys()
            assert all(after[text][0] > age for text, (age, _) in before.items()), "nothing was made anew"
            assert [one.digest() for one in going] == [digest] * 3
    finally:
        lab.ovs.set_controller("lb1", "tcp:127.0.0.1:6653")
        other.stop()
    lab.wait_connected()
    assert set(lab.client("c1").who(f"http://{VIP}:8080/", 30)) == ALL


def test_changes_by_rest_do_not_break_what_is_established(site: Lab) -> None:
    lab = site
    with held(lab.client("c3"), VIP, 80, 12) as open_ones, fetching(lab) as (going, digest):
        serving = {one.server for one in open_ones}
        assert len(serving) >= 2
        for name, fields in (("s1", {"weight": 7}), ("s2", {"admin_state_up": False}), ("s3", {"draining": True}),
                             ("s2", {"admin_state_up": True}), ("s3", {"draining": False})):
            change_member(lab, "web", name, **fields)
        lab.rest.post("/v1/virtual-servers", {"name": "new", "vip_address": "10.0.0.105", "protocol": "TCP",
                                              "protocol_port": 80,
                                              "default_pool_id": lab.rest.get("/v1/pools/web")["id"]})
        lab.rest.patch("/v1/pools/web", {"lb_algorithm": "SOURCE_IP"})
        lab.rest.delete("/v1/virtual-servers/echo")
        lab.rest.patch("/v1/virtual-servers/switch", {"description": "changed", "maintenance": True})
        settle(lab, ["switch"])
        lab.rest.patch("/v1/virtual-servers/switch", {"maintenance": False, "decision": "controller"})
        settle(lab)
        assert lab.client("c1").curl("http://10.0.0.105/").startswith("s")
        assert [one.ask() for one in open_ones] == [one.server for one in open_ones]
        assert [one.digest() for one in going] == [digest] * 3
    assert statistics(lab, "new")["opened"] >= 1
