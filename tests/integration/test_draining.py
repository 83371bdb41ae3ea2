# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Draining: what is established is finished, nothing new comes, a deadline ends it; a rolling upgrade under load."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.handed_over import Site
from tests.integration.support import VIP, Held, configure, lbapp, members, pool, said, server
from topologies.lab import Lab as RealLab
from topologies.lab import unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True
WAYS: dict[int, dict[str, Any]] = {
    80: {"decision": "switch"}, 8080: {"decision": "controller"}, 8081: {"state": "rules", "idle_timeout": 5},
    8082: {"application": "http", "binding": "splice"}, 8083: {"application": "http", "binding": "handoff"},
    8084: {"application": "http", "binding": "hybrid"}, 8085: {"application": "http", "binding": "relay"},
}
"""Every way in which a connection is held, by the port of its virtual server and its members."""
MORE = (8082, 8083, 8084, 8085)


@pytest.fixture
def site(lab: Lab) -> Lab:
    lab.start_servers()
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab))],
              [server(f"web-{port}", port, "web", **how)
               for port, how in WAYS.items() if port in (80, 8080, 8081)])
    return lab


@pytest.mark.parametrize("port", [80, 8080, 8081], ids=["switch", "controller", "rules"])
def test_what_is_established_is_finished(site: Lab, port: int) -> None:
    lab = site
    connection = Held(lab.client("c1"), VIP, port)
    waiting: subprocess.Popen[str] | None = None
    try:
        chosen = connection.ask()
        host = lab.server(chosen)
        waiting = lbapp(lab, "drain", "web", f"{host.address}:80", "--wait")
        wait_until(lambda: [one["connections"] for one in lab.rest.get("/v1/draining")["draining"]] == [1], 10,
                   "the connection is known")
        assert chosen not in lab.client("c2").who(f"http://{VIP}:{port}/", 20)
        assert connection.ask() == chosen
        assert waiting.poll() is None
        connection.close()
        assert "drained" in said(waiting)
    finally:
        connection.close()
        if waiting is not None:
            end(waiting)
    said(lbapp(lab, "drain", "web", f"{host.address}:80", "--undo"))
    wait_until(lambda: chosen in lab.client("c2").who(f"http://{VIP}:{port}/", 12), 10, "it is in use again")


@pytest.mark.parametrize("port", [80, 8080], ids=["switch", "controller"])
def test_a_deadline_resets_what_is_left(site: Lab, port: int) -> None:
    lab = site
    connection = Held(lab.client("c1"), VIP, port)
    try:
        chosen = connection.ask()
        text = said(lbapp(lab, "drain", "web", f"{lab.server(chosen).address}:80", "--timeout", "2", "--wait"))
        assert "drained" in text
        with pytest.raises(OSError):
            for _ in range(20):
                connection.ask()
                time.sleep(0.1)
    finally:
        connection.close()
    kinds = [one["text"] for one in lab.rest.get("/v1/events?limit=1000&pool=web")["events"]
             if one["kind"] in ("member_draining", "member_drained")]
    assert kinds[-2:] == ["draining, for at most 2 s", "its 2 s are over; what is left is reset"]


@pytest.fixture(scope="module")
def every_way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, dict[str, subprocess.Popen[Any]]]]:
    """A laboratory with all of them, and the servers' second nginx."""
    if unavailable() is not None:
        pytest.skip(str(unavailable()))
    with contextlib.ExitStack() as running:
        lab = running.enter_context(RealLab(SingleTopo(), directory=tmp_path_factory.mktemp("drain") / "lab",
                                            options=["--fastpath"]))
        agents = Site(lab, list(WAYS))
        more: dict[str, subprocess.Popen[Any]] = {}

        def end_more() -> None:
            for process in more.values():
                end(process)

        running.callback(end_more)
        lab.start_servers()
        lab.start_controller()
        assert lab.has_fastpath
        for host in lab.servers:
            host.one_cpu_a_flow()
            more[host.name] = host.nginx(ports=MORE)
        # Ports of their own: virtual servers that share one would meet on the servers with the same client's ports.
        configure(lab, [pool(f"web-{port}", "WEIGHTED_ROUND_ROBIN", members(lab, port), monitors=[
            {"type": "HTTP", "interval": 2, "fast_interval": 0.25, "timeout": 2}]) for port in WAYS],
            [server(f"web-{port}", port, f"web-{port}", **how) for port, how in WAYS.items()],
            [{"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254", "monitor_address": "10.0.0.250"}])
        running.callback(agents.stop_agents)
        agents.start_agents()
        yield lab, more


@pytest.mark.alone
def test_a_rolling_upgrade_loses_not_one_request(every_way: tuple[Lab, dict[str, subprocess.Popen[Any]]],
                                                 told: Callable[[str], None]) -> None:
    """wrk asks all the time, on every kind of virtual server; the servers are drained, stopped and started in turn."""
    lab, more = every_way
    loads = {port: lab.client(f"c{1 + index % 3}").popen(
        "wrk", "-t1", "-c2", "-d120s", "--timeout", "10s", "-H", "Connection: close", f"http://{VIP}:{port}/",
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for index, port in enumerate(WAYS)}
    try:
        time.sleep(1)
        for host in lab.servers:
            members_of = {f"/v1/pools/web-{port}/members/{host.address}:{port}" for port in WAYS}
            for drain in [lbapp(lab, "drain", f"web-{port}", f"{host.address}:{port}", "--wait") for port in WAYS]:
                assert "drained" in said(drain)
            http, _ = lab.services[host.name]
            host.kill(http)
            host.kill(more[host.name])
            _all_become(lab, members_of, "down")
            lab.start_servers()
            more[host.name] = host.nginx(ports=MORE)
            _all_become(lab, members_of, "up")
            for path in members_of:
                lab.rest.patch(path, {"draining": False})
            time.sleep(1)
        for process in loads.values():
            process.send_signal(signal.SIGINT)
        for port, process in loads.items():
            text = said(process)
            answered = re.search(r"(\d+) requests in", text)
            assert answered is not None and int(answered[1]) > 20, f"{WAYS[port]}: {text}"
            lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
            lost_requests = sum(map(int, lost.groups())) if lost is not None else 0
            told(f"{WAYS[port]}: {answered[1]} requests, {lost_requests} lost")
            assert lost_requests == 0 and "Non-2xx" not in text, f"{WAYS[port]}: {text}"
    finally:
        for process in loads.values():
            end(process)
    opened = {one["name"]: one["opened"] for one in lab.rest.get("/v1/stats")["virtual_servers"]}
    assert all(count > 20 for count in opened.values()), opened


def _all_become(lab: Lab, paths: set[str], state: str) -> None:
    wait_until(lambda: {lab.rest.get(path)["health_status"]["state"] for path in paths} == {state}, 30,
               f"they are {state}", every=0.2)
