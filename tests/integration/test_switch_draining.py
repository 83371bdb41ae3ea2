# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Draining a whole switch: new connections are refused there at once and nowhere else, established ones are finished,
a deadline ends what is left; a controller that is killed meanwhile goes on with it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.handed_over import Site
from tests.integration.support import (
    ECHO_PORT,
    VIP,
    Download,
    Held,
    configure,
    downloads,
    lbapp,
    members,
    pool,
    refused,
    said,
    server,
    settle,
    unreachable,
)
from topologies.lab import Lab as RealLab
from topologies.lab import unavailable
from topologies.namespace import Namespace, end, wait_until
from topologies.single import SingleTopo

if TYPE_CHECKING:
    from topologies.lab import Lab

ONE = f"{1:016x}"
WAYS: dict[int, dict[str, Any]] = {
    80: {"decision": "switch"}, 8080: {"decision": "controller"}, 8081: {"state": "rules"},
    8082: {"application": "http", "binding": "splice"}, 8083: {"application": "http", "binding": "handoff"},
    8084: {"application": "http", "binding": "hybrid"}, 8085: {"application": "http", "binding": "relay"},
}
"""Every way in which a connection is held, by the port of its virtual server and its members."""
BARE = (80, 8080, 8081, 8085)
MORE = (8082, 8083, 8084, 8085)
UDP = {53: {"decision": "switch"}, 54: {"decision": "controller"}}
SIZE = 4_000_000
AT_ONCE = 3.0
"""Seconds: a client that is left without an answer tries again only after one, then three, of them."""


class Talking:
    """A client that goes on sending datagrams from one port."""

    def __init__(self, host: Namespace, port: int) -> None:
        with host.entered():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(3)
        self.socket.connect((VIP, port))
        self.server = self.ask()

    def ask(self) -> str:
        """Who answers."""
        self.socket.send(b"who")
        return self.socket.recv(100).decode().partition(" ")[0]


def drain(lab: Lab, *words: str) -> str:
    """``lbapp drain`` of the clients' switch, and everybody has heard of it."""
    text = said(lbapp(lab, "drain", "--switch", ONE, *words))
    names = [one["name"] for one in lab.rest.get("/v1/virtual-servers?limit=1000")["virtual_servers"]]
    settle(lab, names)
    return text


def status(lab: Lab, port: int) -> str:
    """HTTP's word for a new connection, ``000`` where there was none."""
    return lab.client("c2").run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5",
                                f"http://{VIP}:{port}/", check=False).stdout


def turned_away(lab: Lab, ports: Sequence[int]) -> None:
    """Assert that new connections are, at once."""
    for port in ports:
        begun = time.monotonic()
        if WAYS[port].get("application") == "http":
            assert status(lab, port) == "503", port
        else:
            refused(lab.client("c2"), VIP, port)
        assert time.monotonic() - begun < AT_ONCE, port


def let_in(lab: Lab, ports: Sequence[int]) -> None:
    """Assert that new connections are served."""
    for port in ports:
        wait_until(lambda: status(lab, port) == "200", 10, f"port {port} serves again")  # noqa: B023 (asked at once)


@contextlib.contextmanager
def busy(lab: Lab, ports: Sequence[int]) -> Iterator[tuple[list[Held], list[Download]]]:
    """For each port a connection that is held and a download that is under way."""
    with contextlib.ExitStack() as stack:
        going = stack.enter_context(downloads(lab.client("c1"), [f"http://{VIP}:{port}/some" for port in ports],
                                              lab.directory, "2M"))
        held = []
        for port in ports:
            held.append(Held(lab.client("c3"), VIP, port))
            stack.callback(held[-1].close)
        for one in going:
            one.progressed(200_000)
        yield held, going


def left(lab: Lab) -> int | None:
    """How many connections the clients' switch still has."""
    found = [one for one in lab.rest.get("/v1/draining?switch=1")["draining"] if one["kind"] == "switch"]
    assert len(found) == 1 and found[0]["switch"] == ONE
    count: int | None = found[0]["connections"]
    return count


def undone(lab: Lab) -> None:
    """Nothing is asked of any switch."""
    for one in lab.rest.get("/v1/switches")["switches"]:
        if one["draining"] or one["drain_timeout"]:
            lab.rest.delete(f"/v1/switches/{one['dpid']}")


def finishes(lab: Lab, ports: Sequence[int]) -> None:
    """A switch is drained under way: what is established ends well, nobody new comes, ``--wait`` ends with it."""
    digest = lab.make_file("some", SIZE)
    waiting: subprocess.Popen[str] | None = None
    with busy(lab, ports) as (held, going):
        try:
            drain(lab)
            waiting = lbapp(lab, "drain", "--switch", "0x1", "--wait")
            turned_away(lab, ports)
            assert (left(lab) or 0) >= len(held)
            assert [one.ask() for one in held] == [one.server for one in held]
            assert [one.digest() for one in going] == [digest] * len(ports)
            turned_away(lab, ports)
            assert [one.ask() for one in held] == [one.server for one in held]
            assert waiting.poll() is None, "something is left"
            for one in held:
                one.close()
            assert f"switch {ONE}: drained" in said(waiting)
            assert left(lab) == 0
        finally:
            if waiting is not None:
                end(waiting)
    assert "in use again" in drain(lab, "--undo")
    let_in(lab, ports)


def was_reset(one: Held) -> bool:
    """Whether a connection that is used soon is; else it went on, or was left without an answer."""
    one.socket.settimeout(20)
    try:
        for _ in range(20):
            one.ask()
            time.sleep(0.1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def ends(lab: Lab, ports: Sequence[int]) -> None:
    """With a deadline, what is left is reset."""
    with contextlib.ExitStack() as stack:
        held = []
        for port in ports:
            held.append(Held(lab.client("c1"), VIP, port))
            stack.callback(held[-1].close)
        assert f"switch {ONE}: drained" in said(lbapp(lab, "drain", "--switch", ONE, "--timeout", "2", "--wait"))
        view = lab.rest.get("/v1/switches/1")
        assert (view["draining"], view["drain_timeout"], view["ended"], view["connections"]) == (True, 2, True, 0)
        with ThreadPoolExecutor(len(held)) as asking:
            assert dict(zip(ports, asking.map(was_reset, held), strict=True)) == dict.fromkeys(ports, True)
    drain(lab, "--undo")
    let_in(lab, ports)
    told = [one["text"] for one in lab.rest.get("/v1/events?limit=1000")["events"]
            if one["kind"] in ("switch_draining", "switch_drained")]
    assert told[-3:] == [f"switch {ONE}: {text}" for text in (
        "draining, for at most 2 s", "its 2 s are over; what is left is reset", "no longer draining")]


# ------------------------------------------------------------------ two switches, nothing but Open vSwitch


@pytest.fixture
def site(two_switches_lab: Lab) -> Iterator[Lab]:
    """Clients on the first switch, servers on the second; every way that there is without a fast path."""
    lab = two_switches_lab
    undone(lab)
    lab.start_servers()
    more = [lab.server(name).nginx(lab.directory / "files", ports=(8085,)) for name in ("s2", "s3")]
    try:
        # s1 is a client as well: it must not meet itself.
        configure(lab, [*(pool(f"web-{port}", "WEIGHTED_ROUND_ROBIN", members(lab, port, names=("s2", "s3")))
                          for port in BARE), pool("echo", "ROUND_ROBIN", members(lab, ECHO_PORT, names=("s2", "s3")))],
                  [*(server(f"web-{port}", port, f"web-{port}", **WAYS[port]) for port in BARE),
                   *(server(f"udp-{port}", port, "echo", protocol="UDP", **how) for port, how in UDP.items())])
        wanted = {lab.server(name).address for name in ("s2", "s3")}
        wait_until(lambda: all(wanted <= set(one["hosts"]) for one in lab.rest.get("/v1/switches")["switches"]), 10,
                   "both switches know all members")
        yield lab
        undone(lab)
    finally:
        for process in more:
            end(process)


def test_what_is_established_is_finished(site: Lab) -> None:
    finishes(site, BARE)


def test_the_other_switch_takes_no_part_and_addresses_are_answered(site: Lab) -> None:
    lab = site
    with contextlib.ExitStack() as stack:
        held = Held(lab.client("c1"), VIP, 80)
        stack.callback(held.close)
        talking = [Talking(lab.client("c1"), port) for port in UDP]
        for one in talking:
            stack.callback(one.socket.close)
        drain(lab)
        turned_away(lab, BARE)
        for port in UDP:
            assert unreachable(lab.client("c2"), VIP, port) < AT_ONCE
        assert [one.ask() for one in talking] == [one.server for one in talking], "what it has, datagrams included"
        lab.client("c1").run("ip", "neigh", "flush", "dev", lab.client("c1").interface)
        assert held.ask() == held.server, "the virtual address is still answered for"
        for port in (80, 8080, 8081):
            assert set(lab.server("s1").who(f"http://{VIP}:{port}/", 24)) == {"s2", "s3"}, "through the second switch"
        assert set(lab.server("s1").udp(VIP, 53, 24)) == {"s2", "s3"}
        assert lab.rest.get("/v1/switches/2")["draining"] is False
    drain(lab, "--undo")
    let_in(lab, BARE)
    assert None not in lab.client("c2").udp(VIP, 53, 4) + lab.client("c2").udp(VIP, 54, 4)


def test_a_deadline_resets_what_is_left(site: Lab) -> None:
    ends(site, BARE)


def test_a_controller_that_is_killed_goes_on_with_it(site: Lab) -> None:
    lab, kept = site, (80, 8080, 8081)  # what is relayed goes through the controller
    digest = lab.make_file("some", SIZE)
    with busy(lab, kept) as (held, going):
        drain(lab)
        lab.controller.kill()
        assert [one.ask() for one in held] == [one.server for one in held]
        lab.start_controller()
        names = [one["name"] for one in lab.rest.get("/v1/virtual-servers?limit=1000")["virtual_servers"]]
        settle(lab, names)
        assert lab.rest.get("/v1/switches/1")["draining"] is True
        turned_away(lab, BARE)
        assert [one.ask() for one in held] == [one.server for one in held]
        assert [one.digest() for one in going] == [digest] * len(kept)
        wait_until(lambda: (left(lab) or 0) >= len(held), 10, "it knows of those that are older than itself")
        for one in held:
            one.close()
        wait_until(lambda: left(lab) == 0, 30, "nothing is left", every=0.5)
    drain(lab, "--undo")
    let_in(lab, BARE)


# ------------------------------------------------------------------ a fast path in front


@pytest.fixture(scope="module")
def every_way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A fast path that the controller runs itself, servers whose hosts adopt connections."""
    if unavailable() is not None:
        pytest.skip(str(unavailable()))
    with contextlib.ExitStack() as running:
        lab = running.enter_context(RealLab(SingleTopo(), directory=tmp_path_factory.mktemp("switch") / "lab",
                                            options=["--fastpath"]))
        agents = Site(lab, list(WAYS))
        lab.start_servers()
        lab.start_controller()
        assert lab.has_fastpath
        for host in lab.servers:
            running.callback(end, host.nginx(lab.directory / "files", ports=MORE))
        configure(lab, [pool(f"web-{port}", "WEIGHTED_ROUND_ROBIN", members(lab, port)) for port in WAYS],
                  [server(f"web-{port}", port, f"web-{port}", **how) for port, how in WAYS.items()])
        running.callback(agents.stop_agents)
        agents.start_agents()
        yield lab


def test_every_binding_is_finished(every_way: Lab) -> None:
    finishes(every_way, list(WAYS))


def test_every_binding_has_a_deadline(every_way: Lab) -> None:
    ends(every_way, list(WAYS))
