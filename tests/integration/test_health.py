# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Members that die, drown, refuse and come back: how long it takes to notice, and what clients see (faults 1 to 4)."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.probing import probing
from tests.integration.support import (
    VIP,
    VIP6,
    Held,
    configure,
    downloads,
    members,
    pool,
    refused,
    server,
    settle,
)
from tests.namespaces import EMPTY_SITE
from topologies.namespace import end, wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True
NETWORKS = [
    {"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254", "monitor_address": "10.0.0.250"},
    {"name": "lan6", "cidr": "fd00::/64", "address": "fd00::254", "monitor_address": "fd00::250"},
]
HTTP = {"type": "HTTP", "interval": 1, "fast_interval": 0.25, "timeout": 1, "rise": 2, "fall": 2}
"""A machine that stands still for less than two seconds is not to be taken for dead members."""
TCP = {**HTTP, "type": "TCP"}
BLACKHOLE = "table inet test_fault { chain in { type filter hook input priority 0; tcp dport 80 drop; }; }"
REJECT = ("table inet test_fault { chain in { type filter hook input priority 0; "
          "tcp dport 80 reject with tcp reset; }; }")


def fault(lab: Lab, name: str, rules: str | None) -> None:
    """Give a server rules of nftables, or none."""
    host = lab.server(name)
    host.run("nft", "delete table inet test_fault", check=False)
    if rules is not None:
        host.run("nft", rules)


def health(lab: Lab, name: str, of: str = "web") -> dict[str, Any]:
    """What is known of a member."""
    listed = lab.rest.get(f"/v1/pools/{of}/members")["members"]
    answer: dict[str, Any] = next(one for one in listed if one["name"] == name)
    return answer["health_status"] or {"state": None}


def becomes(lab: Lab, name: str, state: str, within: float, of: str = "web") -> float:
    """Wait until a member has a state; returns the seconds that took."""
    begun = time.monotonic()
    wait_until(lambda: health(lab, name, of)["state"] == state, within, f"{name} is {state}", every=0.02)
    return time.monotonic() - begun


@pytest.fixture
def watched(lab: Lab) -> Iterator[Lab]:
    """One pool, whose members are checked: 80 decided by hash, 8080 by the controller, 8081 spliced; 8088 is IPv6."""
    lab.start_servers()
    monitored = {"monitors": [HTTP]}
    configure(lab, [pool("web", "SOURCE_IP", members(lab), **monitored),
                    pool("least", "LEAST_CONNECTIONS", members(lab), **monitored),
                    pool("six", "WEIGHTED_ROUND_ROBIN", members(lab, six=True), monitors=[TCP])],
              [server("web", 80, "web"), server("least", 8080, "least"),
               server("l7", 8081, "least", application="http", binding="auto"),
               server("six", 80, "six", VIP6)], NETWORKS)
    for name in ("s1", "s2", "s3"):
        for of in ("web", "least", "six"):
            becomes(lab, name, "up", 15, of)
    try:
        yield lab
    finally:
        for host in lab.servers:
            fault(lab, host.name, None)
        lab.start_servers()
        lab.apply(EMPTY_SITE)  # nobody is checked any more


def test_members_are_checked_from_the_monitor_address(watched: Lab) -> None:
    fault(watched, "s1", "table inet test_fault { chain in { type filter hook input priority 0; "
          "ip saddr 10.0.0.250 tcp dport 80 tcp flags syn counter; "
          "ip6 saddr fd00::250 tcp dport 80 tcp flags syn counter; "
          "ip saddr != 10.0.0.250 counter; }; }")

    def counted() -> list[int]:
        listed = watched.server("s1").run("nft", "list", "table", "inet", "test_fault").stdout
        return [int(count) for count in re.findall(r"counter packets (\d+)", listed)]

    wait_until(lambda: min(counted()[:2]) > 2, 10, "checks come from there")
    assert counted()[2] == 0, "and from nowhere else"
    told = health(watched, "s1")
    assert (told["state"], told["monitors"]["http"]["state"]) == ("up", "up")


def test_what_measuring_algorithms_know_is_told(watched: Lab) -> None:
    lab = watched
    wait_until(lambda: any("10.0.0.250/24" in one["addresses"] and one["checks"] and one["cpu_seconds"] > 0
                           for one in lab.rest.get("/v1/stats")["monitors"]), 20, "so is what checks cost")
    lab.rest.patch("/v1/pools/least", {"lb_algorithm": "LEAST_RESPONSE_TIME"})

    def told() -> dict[str, dict[str, Any]]:
        return {one["member"]: one for one in lab.rest.get("/v1/stats?pool=least")["members"]}

    wait_until(lambda: all(one["response_by"] == "monitors" for one in told().values()), 20, "checks were measured")
    for one in told().values():
        assert 0.001 <= one["response_seconds"] <= HTTP["timeout"] and one["response_age_seconds"] >= 0
        assert (one["active"], one["bytes_lately"], one["bytes_lately_age_seconds"]) == (0, None, None)
    connection = Held(lab.client("c1"), VIP, 8080)
    try:
        wait_until(lambda: sorted(one["active"] for one in told().values()) == [0, 0, 1], 15, "it is active")
    finally:
        connection.close()
    wait_until(lambda: all(one["active"] == 0 for one in told().values()), 20, "it has ended")
    if lab.controller.fastpath:  # conntrack alone does not tell of bytes (docs/rest.md)
        counted = [one for one in told().values() if one["bytes_lately"] is not None]
        assert len(counted) == 1 and counted[0]["bytes_lately"] > 0 and counted[0]["bytes_lately_age_seconds"] >= 0


@pytest.mark.parametrize("port", [8080, 8081], ids=["l4", "l7"])
def test_1_a_member_dies(watched: Lab, port: int, tmp_path: Any, told: Any) -> None:
    lab = watched
    digest = lab.make_file("long", 12_000_000)
    http, _ = lab.services["s2"]
    # Whoever downloads from s1 or s3 is not to notice anything.
    with downloads(lab.client("c2"), [f"http://{lab.server(name).address}/long" for name in ("s1", "s3")], tmp_path,
                   "3M") as others, probing(lab.client("c1"), VIP, port) as probe:
        probe.quiet(20, 15)
        begun = time.monotonic()
        lab.server("s2").kill(http)
        seconds = becomes(lab, "s2", "down", 3.0, "least")
        down = time.monotonic()
        probe.quiet(50, 15)
        after = probe.since(down + 0.1)
        assert all(one.error is None for one in after), [one for one in after if one.error]
        assert {one.name for one in after} == {"s1", "s3"}
        failed = sum(one.error is not None for one in probe.since(begun))
        assert [one.digest() for one in others] == [digest] * 2
        lab.start_servers()
        back = becomes(lab, "s2", "up", 10, "least")
        wait_until(lambda: "s2" in probe.names(time.monotonic() - 1.0), 10, "s2 has connections again")
        assert len(probe.stop()) > 50
    told(f"detected in {seconds:.2f} s, {failed} requests failed meanwhile; back in {back:.2f} s")
    kinds = [one["kind"] for one in lab.rest.get("/v1/events?limit=1000&pool=least")["events"]
             if one["member"] == "10.0.0.52:80"]
    assert kinds[-2:] == ["member_down", "member_up"]


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_2_a_member_drowns(watched: Lab, vip: str, told: Any) -> None:
    lab, of = watched, "six" if vip == VIP6 else "web"
    with probing(lab.client("c1"), vip, 80, rate=20) as probe:
        probe.quiet(10, 15)
        chosen = probe.names().most_common(1)[0][0]
        assert chosen is not None
        fault(lab, chosen, BLACKHOLE)
        seconds = becomes(lab, chosen, "down", 6.0, of)
        down = time.monotonic()
        probe.quiet(30, 20)
        after = probe.since(down + 0.1)
        assert chosen not in {one.name for one in after}
        assert all(one.error is None for one in after)
        fault(lab, chosen, None)
        back = becomes(lab, chosen, "up", 10, of)
    told(f"detected in {seconds:.2f} s; back in {back:.2f} s")
    assert "no answer within" in next(one["text"] for one in reversed(
        lab.rest.get(f"/v1/events?limit=1000&pool={of}")["events"]) if one["kind"] == "member_down")


def test_3_a_member_refuses_after_the_handshake(watched: Lab, told: Any) -> None:
    """Nobody waits: who is given to a member that refuses is given to another one, before the monitors have noticed."""
    lab = watched
    with probing(lab.client("c1"), VIP, 8081, rate=30) as probe:
        probe.quiet(10, 15)
        fault(lab, "s1", REJECT)
        begun = time.monotonic()  # whoever had shaken hands with it before is refused, and rightly so
        seconds = becomes(lab, "s1", "down", 6.0, "least")
        probe.quiet(20, 15)
    seen = probe.since(begun)
    assert all(one.error is None for one in seen), [one for one in seen if one.error]
    told(f"detected in {seconds:.2f} s; the slowest answer took {max(one.seconds for one in seen):.2f} s")


def test_4_all_members_are_down(watched: Lab, told: Any) -> None:
    lab = watched
    for http, _ in list(lab.services.values()):
        lab.server("s1").kill(http)
    begun = time.monotonic()
    for name in ("s1", "s2", "s3"):
        becomes(lab, name, "down", 6.0)
        becomes(lab, name, "down", 6.0, "least")
    down = time.monotonic() - begun
    listed = lab.rest.get("/v1/virtual-servers")["virtual_servers"]
    wait_until(lambda: {one["operating_status"] for one in lab.rest.get("/v1/virtual-servers")["virtual_servers"]
                        if one["name"] != "six"} == {"OFFLINE"}, 5, "all are offline")
    assert listed
    for port in (80, 8080):
        assert refused(lab.client("c1"), VIP, port) < 2.0
    status = lab.client("c1").run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5",
                                  f"http://{VIP}:8081/").stdout
    assert status == "503"
    lab.start_servers()
    begun = time.monotonic()
    for name in ("s1", "s2", "s3"):
        becomes(lab, name, "up", 15, "least")
        becomes(lab, name, "up", 15)
    told(f"all noticed in {down:.2f} s, refused at once; healed in {time.monotonic() - begun:.2f} s")
    for port in (80, 8080, 8081):
        assert lab.client("c1").curl(f"http://{VIP}:{port}/").strip() in ("s1", "s2", "s3")


@pytest.mark.parametrize("on_down", ["keep", "reset"])
@pytest.mark.parametrize("port", [80, 8080])
def test_what_becomes_of_established_connections(watched: Lab, on_down: str, port: int) -> None:
    """The monitor is wrong: the member goes on serving. What is established goes on, or is reset, as the pool says."""
    lab = watched
    of = "web" if port == 80 else "least"
    lab.rest.patch(f"/v1/pools/{of}", {"on_down": on_down})
    connection = Held(lab.client("c1"), VIP, port)
    try:
        chosen = connection.ask()
        lab.rest.patch(f"/v1/pools/{of}", {"monitors": [{**HTTP, "expected_codes": "404"}]})
        becomes(lab, chosen, "down", 10, of)
        time.sleep(0.5)
        if on_down == "keep":
            assert [connection.ask() for _ in range(3)] == [chosen] * 3
        else:
            with pytest.raises(OSError):
                for _ in range(20):
                    connection.ask()
                    time.sleep(0.1)
    finally:
        connection.close()


@pytest.mark.parametrize("port", [80, 8080, 8081])
def test_nobody_is_cut_off_by_a_fallback(watched: Lab, port: int) -> None:
    """Neither who has a connection when it takes over, nor who has one when the pool's own members are back."""
    lab, of = watched, "web" if port == 80 else "least"
    lab.rest.post("/v1/pools", {"name": "sorry", "members": members(lab, names=["s3"])})
    lab.rest.patch(f"/v1/pools/{of}", {"fallback_pool": "sorry"})
    for index in (2, 3):
        lab.rest.patch(f"/v1/pools/{of}/members/10.0.0.5{index}:80", {"health": "down"})
    path = f"/v1/pools/{of}/members/10.0.0.51:80"
    held: list[Held] = []
    turns = (("up", "s1"), ("down", "s3")) * 4
    with probing(lab.client("c2"), VIP, port, rate=200) as probe:
        for word, name in turns:
            lab.rest.patch(path, {"health": word})
            wait_until(lambda name=name: {one.name for one in probe.seen[-20:]} == {name}, 10,  # type: ignore[misc]
                       f"new connections go to {name}")
            held.append(Held(lab.client("c1"), VIP, port))
            assert [one.ask() for one in held] == [name for _, name in turns[:len(held)]]
        assert [one for one in probe.stop() if one.error] == []
    for one in held:
        one.close()


def test_an_operator_overrides_and_a_fallback_serves(watched: Lab) -> None:
    lab = watched
    lab.rest.post("/v1/pools", {"name": "sorry", "members": members(lab, names=["s3"])})
    lab.rest.patch("/v1/pools/least", {"fallback_pool": "sorry"})
    path = "/v1/pools/least/members/10.0.0.51:80"
    for index in (1, 2, 3):
        lab.rest.patch(f"/v1/pools/least/members/10.0.0.5{index}:80", {"health": "down"})
    with probing(lab.client("c1"), VIP, 8080) as probe:
        wait_until(lambda: len(probe.seen) > 20 and {one.name for one in probe.seen[-10:]} == {"s3"}, 10,
                   "the fallback serves")
        lab.rest.patch(path, {"health": "up"})
        wait_until(lambda: {one.name for one in probe.seen[-10:]} == {"s1"}, 10, "its own member serves again")
        assert [one for one in probe.stop() if one.error] == []
    texts = [one["text"] for one in lab.rest.get("/v1/events?limit=1000&kind=fallback&pool=least")["events"]]
    assert texts[-2:] == ["pool sorry is used", "its own members are used again"]
    overridden = lab.rest.get("/v1/events?limit=1000&kind=member_overridden&pool=least")["events"]
    assert [(one["member"], one["text"]) for one in overridden[-4:]] == [
        *((f"10.0.0.5{index}:80", "down, says an operator") for index in (1, 2, 3)),
        ("10.0.0.51:80", "up, says an operator")]


def test_a_lower_priority_steps_in_and_back(watched: Lab) -> None:
    """s3 is used while fewer than two of the others can be."""
    lab = watched
    ranked = [{**one, "priority": 0 if one["name"] == "s3" else 10} for one in members(lab)]
    lab.rest.patch("/v1/pools/least", {"members": ranked, "minimum_active": 2})
    settle(lab)
    with probing(lab.client("c1"), VIP, 8080) as probe:
        for health_of_s1, used in (("auto", {"s1", "s2"}), ("down", {"s2", "s3"}), ("auto", {"s1", "s2"})):
            lab.rest.patch("/v1/pools/least/members/10.0.0.51:80", {"health": health_of_s1})
            wait_until(lambda: len(probe.seen) > 20 and {one.name for one in probe.seen[-12:]} == used, 15,  # noqa: B023
                       f"{used} are used")
        assert all(one.error is None for one in probe.stop())
    assert any(one["kind"] == "priority" for one in lab.rest.get("/v1/events?limit=1000&pool=least")["events"])


def test_clients_are_told_that_nobody_is_there(watched: Lab) -> None:
    lab = watched
    lab.rest.patch("/v1/pools/least", {"sorry": {"status": 503, "body": "closed for today\n"}})
    for index in (1, 2, 3):
        lab.rest.patch(f"/v1/pools/least/members/10.0.0.5{index}:80", {"health": "down"})

    def answer() -> str:
        return lab.client("c1").run("curl", "-sS", "--max-time", "5", "-w", "%{http_code}", f"http://{VIP}:8081/",
                                    check=False).stdout

    wait_until(lambda: answer() == "closed for today\n503", 10, "the sorry page")
    lab.rest.patch("/v1/pools/least/members/10.0.0.52:80", {"health": "auto"})
    wait_until(lambda: answer() == "s2\n200", 10, "a member serves again")


def test_a_member_that_comes_back_starts_slowly(watched: Lab) -> None:
    lab = watched
    lab.rest.patch("/v1/pools/least", {"slow_start": 8, "lb_algorithm": "WEIGHTED_ROUND_ROBIN",
                                       "members": [{**one, "weight": 100} for one in members(lab)]})
    settle(lab)
    fault(lab, "s1", REJECT)
    becomes(lab, "s1", "down", 15, "least")
    fault(lab, "s1", None)
    becomes(lab, "s1", "up", 15, "least")
    weights: list[float] = []

    def full() -> bool:
        now = {one["name"]: one["effective_weight"] for one in lab.rest.get("/v1/pools/least/members")["members"]}
        weights.append(now["s1"] / now["s2"])
        return weights[-1] == 1

    wait_until(full, 25, "its whole weight", every=0.2)
    assert weights == sorted(weights)
    assert len(set(weights)) > 5, weights
    assert set(lab.client("c1").who(f"http://{VIP}:8080/", 30)) == {"s1", "s2", "s3"}


def test_a_member_that_comes_and_goes_stays_out_until_it_is_well(watched: Lab) -> None:
    lab = watched
    lab.rest.patch("/v1/pools/least", {"damping": {"changes": 4, "window": 120, "hold": 5}})

    def damped() -> bool:
        listed = lab.rest.get("/v1/events?limit=1000&pool=least&kind=member_damped")["events"]
        return bool(listed)

    for _ in range(4):
        fault(lab, "s1", REJECT)
        becomes(lab, "s1", "down", 15, "least")
        fault(lab, "s1", None)
        wait_until(lambda: damped() or health(lab, "s1", "least")["state"] == "up", 15, "it is up, or held down")
        if damped():
            break
    begun = time.monotonic()
    assert damped()
    assert health(lab, "s1", "least")["state"] == "down"
    assert "s1" not in lab.client("c1").who(f"http://{VIP}:8080/", 12)
    becomes(lab, "s1", "up", 30, "least")
    assert time.monotonic() - begun > 2


@pytest.mark.parametrize("port", [8080, 8081], ids=["l4", "l7"])
def test_clients_failures_tell_of_a_member(watched: Lab, port: int, told: Any) -> None:
    """Without monitors: who refuses clients is left out for a while, and then tried again."""
    lab = watched
    lab.rest.patch("/v1/pools/least", {"monitors": [], "passive": {"failures": 3, "window": 30, "hold": 5},
                                       "lb_algorithm": "ROUND_ROBIN"})
    with probing(lab.client("c1"), VIP, port, rate=30) as probe:
        probe.quiet(10, 15)
        fault(lab, "s1", REJECT)
        begun = time.monotonic()
        if port == 8080 and not lab.controller.fastpath:
            # Open vSwitch alone does not tell a RST from a FIN (docs/health.md).
            wait_until(lambda: sum(one.error is not None for one in probe.since(begun)) > 9, 15, "clients are refused")
            assert health(lab, "s1", "least")["state"] != "down"
            return
        wait_until(lambda: health(lab, "s1", "least")["state"] == "down", 15, "clients have noticed", every=0.02)
        down = time.monotonic()
        fault(lab, "s1", None)
        probe.quiet(30, 15)
        assert "s1" not in {one.name for one in probe.since(down + 0.5) if one.at < down + 4}
        wait_until(lambda: "s1" in probe.names(time.monotonic() - 1.0), 20, "s1 is tried again")
        failed = sum(one.error is not None for one in probe.since(begun))
    told(f"left out after {down - begun:.2f} s and {failed} failed requests")
    assert failed == 0 or port == 8080
    reason = next(one["text"] for one in reversed(lab.rest.get("/v1/events?limit=1000&pool=least")["events"])
                  if one["kind"] == "member_failed")
    assert reason.startswith("3 connections of clients failed within 30 s (refused")


BROKEN = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer(("", 8098), Handler).serve_forever()
"""


def instead(lab: Lab, port: int, passive: dict[str, Any], **more: Any) -> None:
    """A pool of s1 at another port, and of s2; and a virtual server of it that reads."""
    passive = {"failures": 3, "window": 60, "hold": 60, **passive}
    lab.rest.post("/v1/pools", pool("odd", "ROUND_ROBIN", [*members(lab, port, names=["s1"]),
                                                          *members(lab, names=["s2"])], passive=passive))
    lab.rest.post("/v1/virtual-servers", server("odd", 8086, "odd", application="http", **more))
    settle(lab)


def reason_of(lab: Lab, of: str) -> str:
    text: str = next(one["text"] for one in reversed(lab.rest.get(f"/v1/events?limit=1000&pool={of}")["events"])
                     if one["kind"] == "member_failed")
    return text


@pytest.mark.parametrize("binding", ["auto", "relay"])
def test_who_takes_requests_and_does_not_answer(watched: Lab, binding: str, told: Any) -> None:
    """Its kernel takes connections and what clients say; nobody reads it."""
    lab, host = watched, watched.server("s1")
    with host.entered():
        silent = socket.socket()
    with contextlib.ExitStack() as asking:
        asking.callback(silent.close)
        silent.bind((host.address, 8099))
        silent.listen(64)
        instead(lab, 8099, {"first_byte": 1}, binding=binding)
        begun = time.monotonic()
        for _ in range(8):
            asking.callback(end, lab.client("c1").popen("curl", "-s", "-o", "/dev/null", "--max-time", "60",
                                                        f"http://{VIP}:8086/"))
        wait_until(lambda: health(lab, "s1", "odd")["state"] == "down", 30, "clients have waited in vain")
        seconds = time.monotonic() - begun
        assert seconds >= 1.0
        assert set(lab.client("c2").who(f"http://{VIP}:8086/", 8)) == {"s2"}
    told(f"left out after {seconds:.2f} s")
    assert reason_of(lab, "odd") == "3 connections of clients failed within 60 s (no answer within 1 s)"


def test_who_answers_with_errors_of_its_own(watched: Lab, told: Any) -> None:
    lab = watched
    broken = lab.server("s1").popen(sys.executable, "-c", BROKEN)
    try:
        wait_until(lambda: lab.server("s1").run("curl", "-s", "-o", "/dev/null", "http://127.0.0.1:8098/",
                                                check=False).returncode == 0, 15, "it answers")
        instead(lab, 8098, {"server_errors": True}, binding="relay")
        begun, statuses = time.monotonic(), []
        for _ in range(6):
            statuses.append(lab.client("c1").run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time",
                                                 "10", f"http://{VIP}:8086/").stdout)
        wait_until(lambda: health(lab, "s1", "odd")["state"] == "down", 15, "its errors count")
        seconds = time.monotonic() - begun
        assert statuses.count("503") == 3 and statuses.count("200") == 3, statuses
        assert set(lab.client("c2").who(f"http://{VIP}:8086/", 8)) == {"s2"}
    finally:
        end(broken)
    told(f"left out after {seconds:.2f} s")
    assert reason_of(lab, "odd") == "3 connections of clients failed within 60 s (status 503)"
