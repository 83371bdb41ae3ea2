# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The scene of ``make demo`` in which a member dies and comes back, and another one is drained."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

if TYPE_CHECKING:
    from topologies.scenes import Demo

VIP = SingleTopo.VIP
POOL = "web-pool"
MONITOR_ADDRESS = "10.0.0.250"


def play(demo: Demo) -> None:
    """A monitor from an address in the members' network; kill -9 of a server; a drain that waits."""
    demo.story.scene("A member dies and comes back; another one is drained")
    demo.rest("POST", "/v1/networks", {"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254",
                                       "monitor_address": MONITOR_ADDRESS}, show=("name", "monitor_address"))
    demo.rest("PATCH", f"/v1/pools/{POOL}", {"monitors": [
        {"type": "HTTP", "interval": 0.5, "fast_interval": 0.2, "timeout": 0.5, "fall": 2}]}, show=("name",))
    for name in ("s1", "s2", "s3"):
        _becomes(demo, name, "up")
    _dies(demo)
    _drains(demo)


def _health(demo: Demo, name: str) -> dict[str, Any]:
    listed = demo.lab.rest.get(f"/v1/pools/{POOL}/members")["members"]
    found: dict[str, Any] = next(one for one in listed if one["name"] == name)
    return found["health_status"] or {"state": None}


def _becomes(demo: Demo, name: str, state: str) -> float:
    begun = time.monotonic()
    wait_until(lambda: _health(demo, name)["state"] == state, 15, f"{name} is {state}", every=0.02)
    return time.monotonic() - begun


def _served(demo: Demo, count: int) -> Counter[str]:
    return sum(demo.ask(f"http://{VIP}/", count).values(), Counter())


def _dies(demo: Demo) -> None:
    story, lab = demo.story, demo.lab
    http, _ = lab.services["s2"]
    story.command("s2", "kill -9 $(pidof nginx)")
    lab.server("s2").kill(http)
    seconds = _becomes(demo, "s2", "down")
    totals = _served(demo, 40)
    story.check(set(totals) == {"s1", "s3"}, f"noticed after {seconds:.1f} s; then 120 connections, none failed, "
                f"none to s2: {dict(totals)}", str(dict(totals)))
    lab.start_servers()
    seconds = _becomes(demo, "s2", "up")
    totals = _served(demo, 40)
    story.check(set(totals) == {"s1", "s2", "s3"}, f"nginx is started again: up after {seconds:.1f} s, and in use",
                str(dict(totals)))
    story.command("operator", f"lbapp show events {POOL}")
    for event in demo.lab.rest.get(f"/v1/events?pool={POOL}")["events"][-2:]:
        story.answer(f"{event['at'][11:19]}  {event['kind']:12} {event['member']}  {event['text']}")


def _drains(demo: Demo) -> None:
    story, lab = demo.story, demo.lab
    member = f"{lab.server('s1').address}:80"
    slow: list[subprocess.Popen[Any]] = []

    def some() -> bool:
        """Who gets a download is for the weights, and for chance: nine, and more until s1 has one."""
        while len(slow) < 9:
            slow.append(lab.client("c1").popen("curl", "-sSf", "--limit-rate", "10M", "-o", "/dev/null",
                                               f"http://{VIP}/big"))
        time.sleep(0.2)
        if "ESTAB" in lab.server("s1").run("ss", "-tn", "sport = :80").stdout:
            return True
        slow.append(lab.client("c1").popen("curl", "-sSf", "--limit-rate", "10M", "-o", "/dev/null",
                                           f"http://{VIP}/big"))
        return False

    draining: subprocess.Popen[str] | None = None
    try:
        wait_until(some, 10, "s1 has some of the downloads")
        words = ("drain", POOL, member, "--wait")
        story.command("operator", f"lbapp {' '.join(words)}")
        begun = time.monotonic()
        draining = lab.root.popen(lab.controller.command, "--token-file", str(lab.controller.state / "token"), *words,
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        left = wait_until(lambda: next((one["connections"] for one in demo.lab.rest.get("/v1/draining")["draining"]),
                                       None), 10, "it is draining, and what is left is known")
        totals = _served(demo, 20)
        said, _ = draining.communicate(timeout=60)
        seconds = time.monotonic() - begun
        story.answer(said.strip())
        codes = [process.wait(timeout=60) for process in slow]
        story.check(draining.returncode == 0 and not totals["s1"] and not any(codes),
                    f"{left} downloads from s1 were finished in {seconds:.0f} s, none of {len(slow)} was cut; then "
                    f"60 new ones went elsewhere", f"{said} {totals} {codes}")
    finally:
        for process in [*slow, *([draining] if draining is not None else [])]:
            end(process)
    lab.rest.patch(f"/v1/pools/{POOL}/members/{member}", {"draining": False})
    wait_until(lambda: _served(demo, 10)["s1"], 10, "s1 is in use again")
