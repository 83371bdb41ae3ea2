# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A controller that runs out of descriptors or disk, whose clock is set, or whose fast path is full (faults 14, 20)."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.support import (
    VIP,
    Held,
    addresses,
    ask_from,
    configure,
    downloads,
    held,
    members,
    pool,
    server,
    settle,
    statistics,
    tcp,
)
from tests.namespaces import require
from topologies.controller import ControllerProcess
from topologies.hosts import LabHost
from topologies.namespace import Namespace, wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

WAYS = {"switch": 80, "controller": 8080, "rules": 8081}
ALL = {"s1", "s2", "s3"}
IDLE = 200
NETWORKS = [{"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254", "monitor_address": "10.0.0.250"}]
MONITOR = {"type": "HTTP", "interval": 1, "fast_interval": 0.25, "timeout": 1, "rise": 1, "fall": 4}
FEW = 160
SPARE = 10
DISK = 6 << 20
HOUR = 3600
SHORTER = 600
"""Seconds for which clients are known: less than what the clock is set by."""
SMALLEST, MORE = 1024, 200


def site(lab: Lab, *more: dict[str, Any], **of_pool: Any) -> None:
    """TCP in the three ways, to a port of its own each: a client's port that comes back is another connection."""
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab)),
                    pool("known", "ROUND_ROBIN", members(lab, WAYS["controller"]), **of_pool),
                    pool("ruled", "ROUND_ROBIN", members(lab, WAYS["rules"]))],
              [server("switch", WAYS["switch"], "web"),
               server("controller", WAYS["controller"], "known", decision="controller"),
               server("rules", WAYS["rules"], "ruled", state="rules"), *more], NETWORKS)


@contextlib.contextmanager
def open_ones(lab: Lab) -> Iterator[Callable[[], None]]:
    """Connections in each way and a download; what is yielded asserts that all of them go on."""
    digest = lab.make_file("large", 8_000_000)
    with contextlib.ExitStack() as stack:
        made = [one for port in WAYS.values() for one in stack.enter_context(held(lab.client("c2"), VIP, port, 3))]
        (going,) = stack.enter_context(downloads(lab.client("c3"), [f"http://{VIP}:8080/large"], lab.directory, "2M"))
        going.progressed(100_000)

        def go_on() -> None:
            assert [one.ask() for one in made] == [one.server for one in made]
            assert going.running or going.digest() == digest

        yield go_on
        go_on()
        assert going.digest() == digest


def decides(lab: Lab) -> None:
    """New connections are given to members, in each way."""
    for port in WAYS.values():
        counted = lab.client("c1").who(f"http://{VIP}:{port}/", 12)
        assert set(counted) <= ALL and counted.total() == 12, (port, counted)


def logged(lab: Lab, since: int = 0) -> str:
    return lab.controller.log.read_bytes()[since:].decode(errors="replace")


def reconnects(lab: Lab) -> int:
    return int(lab.rest.get("/v1/stats")["switches"][0]["reconnects"])


# ------------------------------------------------------------------ descriptors


def descriptors(lab: Lab) -> int:
    assert lab.controller.process is not None
    return len(list(Path(f"/proc/{lab.controller.process.pid}/fd").iterdir()))


class WithFew(ControllerProcess):
    """Started with few descriptors."""

    @property
    def argv(self) -> list[str]:
        return ["prlimit", f"--nofile={FEW}:{FEW}", *super().argv]


@contextlib.contextmanager
def idle(lab: Lab, port: int, count: int) -> Iterator[None]:
    """So many connections to the controller that say nothing. Not all of them may be accepted."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with lab.root.entered():
                one = stack.enter_context(socket.socket())
            one.setblocking(False)
            assert one.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
        yield


def test_descriptors_run_out(make_lab: Callable[..., Lab], told: Callable[[str], None]) -> None:
    """A controller that knew from the start that it has few; and one that loses what it had."""
    require("prlimit")
    lab = make_lab("single")
    plain = lab.controller
    lab.controller = WithFew(plain.namespace, plain.state, environment=plain.environment)
    try:
        lab.start_servers()
        lab.start_controller()
        site(lab)
        with open_ones(lab) as go_on:
            for known in (True, False):
                told(f"REST answers {_out_of_descriptors(lab, known, go_on):.2f} s after there are descriptors again")
        # The listener for switches lives as well.
        lab.ovs.set_controller("lb1", "tcp:127.0.0.1:1")
        wait_until(lambda: not lab.rest.get("/v1/switches")["switches"], 10, "the switch has left")
        lab.ovs.set_controller("lb1", "tcp:127.0.0.1:6653")
        lab.wait_connected()
        settle(lab)
        decides(lab)
    finally:
        lab.controller.stop()


def _out_of_descriptors(lab: Lab, known: bool, go_on: Callable[[], None]) -> float:
    connected, since, before = reconnects(lab), lab.controller.log.stat().st_size, descriptors(lab)
    assert lab.controller.process is not None
    process = lab.controller.process.pid
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    room = FEW if known else before + SPARE
    resource.prlimit(process, resource.RLIMIT_NOFILE, (room, limits[1]))
    with idle(lab, 8080, IDLE):
        if known:
            wait_until(lambda: descriptors(lab) >= FEW // 2, 10, "half of them are taken")
            assert descriptors(lab) < FEW, "the other half is not the REST interface's"
        else:
            wait_until(lambda: "cannot accept a connection" in logged(lab, since), 10, "there are no more")
        with idle(lab, 6653, 3):
            if not known:
                wait_until(lambda: "cannot accept a switch" in logged(lab, since), 10, "nor for a switch")
            decides(lab)
            go_on()
    begun = time.monotonic()
    wait_until(lab.rest.answers, 20, "the REST interface answers again")
    took = time.monotonic() - begun
    lab.rest.patch("/v1/pools/web", {"description": f"changed with {room}"})
    resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: descriptors(lab) <= before, 20, f"no more than {before} descriptors")
    assert reconnects(lab) == connected, "the switch was there all the time"
    told = logged(lab, since)
    assert "Traceback" not in told, told
    assert told.count("cannot accept") <= 20, "it is not told again and again"
    return took


# ------------------------------------------------------------------ the disk


class Aside(Namespace):
    """A network namespace as seen with mounts of its own: with a small disk."""

    def __init__(self, lab: Lab, directory: Path, size: int) -> None:
        directory.mkdir()
        self.holder = lab.root.popen(
            "unshare", "--mount", "--propagation", "private", "sh", "-c",
            f"mount -t tmpfs -o size={size},mode=700 lbapp-test '{directory}' && echo mounted && exec sleep infinity",
            stdout=subprocess.PIPE)
        super().__init__("a small disk", lab.root.pid)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"mounted\n":
            pytest.skip("no file systems can be mounted here")
        # Seen from here and from inside alike; gone with the process.
        self.directory = Path(f"/proc/{self.holder.pid}/root{directory}")

    @property
    def prefix(self) -> tuple[str, ...]:
        """See :class:`Namespace`."""
        return (*super().prefix, f"--mount=/proc/{self.holder.pid}/ns/mnt")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is left for the time of the block."""
        ballast = self.directory / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            assert os.statvfs(self.directory).f_bavail == 0
            yield
        finally:
            ballast.unlink()


def kept(disk: Aside) -> set[str]:
    """The clients that are on a disk, by a look from inside: SQLite would take another way to the file."""
    look = ("import sqlite3, sys\nfor (key,) in sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True)"
            ".execute('SELECT key FROM clients'): print('.'.join(map(str, key)))")
    return set(disk.run(sys.executable, "-c", look, str(disk.directory / "persistence.db")).stdout.split())


def test_the_disk_is_full(make_lab: Callable[..., Lab], told: Callable[[str], None]) -> None:
    lab = make_lab("single")
    disk = Aside(lab, lab.directory / "disk", DISK)
    plain = lab.controller
    lab.controller = ControllerProcess(disk, disk.directory, environment=plain.environment)
    try:
        lab.start_servers()
        lab.start_controller()
        site(lab, persistence={"type": "SOURCE_IP"})
        client = lab.client("c1")
        with open_ones(lab) as go_on, addresses(client, "10.0.0.", 120, 20) as given:
            known = ask_from(client, VIP, 8080, given[0])
            since, before = lab.controller.log.stat().st_size, lab.rest.get("/v1/config")
            new = {"name": "new", "members": [{"address": f"10.0.0.{last}", "protocol_port": port}
                                              for last in range(51, 54) for port in range(1000, 1100)]}
            with disk.full():
                refused = lab.rest.request("POST", "/v1/pools", new)
                assert refused.status_code == 503, refused.text
                assert "No space left" in refused.json()["error"]["message"]
                assert lab.rest.get("/v1/config") == before
                first = {address: ask_from(client, VIP, 8080, address) for address in given}
                assert first[given[0]] == known
                wait_until(lambda: "clients cannot be kept" in logged(lab, since), 15, "it is told of")
                assert {address: ask_from(client, VIP, 8080, address) for address in given} == first
                decides(lab)
                go_on()
                lab.controller.kill()
                lab.start_controller()
                assert lab.rest.get("/v1/config") == before
                decides(lab)
                go_on()
                assert lab.rest.request("POST", "/v1/pools", new).status_code == 503
                first = {address: ask_from(client, VIP, 8080, address) for address in given}
            begun = time.monotonic()
            made = lab.rest.post("/v1/pools", new)
            assert len(made["members"]) == len(new["members"])
            wait_until(lambda: set(given) <= kept(disk), 20, "all are on disk", 0.2)
            told(f"all that was to be kept is on disk {time.monotonic() - begun:.2f} s after there is room")
            assert {address: ask_from(client, VIP, 8080, address) for address in given} == first
            assert lab.rest.get("/v1/pools/new")["id"] == made["id"]
            assert "Traceback" not in logged(lab)
    finally:
        lab.controller.stop()
        lab.controller = plain


# ------------------------------------------------------------------ the clock


class Clock:
    """The wall clock of a controller, and of what it starts; the other clocks go on as they are (wall_clock.c)."""

    def __init__(self, lab: Lab) -> None:
        require("clang")
        self._lab = lab
        library, self._file = lab.directory / "wall_clock.so", lab.directory / "ahead"
        subprocess.run(["clang", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library),
                        str(Path(__file__).with_name("wall_clock.c"))], check=True)
        self._file.write_bytes(struct.pack("=q", 0))
        lab.controller.environment.update(LD_PRELOAD=str(library), WALL_CLOCK=str(self._file))

    def shown(self) -> float:
        """How far the controller's clock is ahead, by the date that it answers with."""
        date = email.utils.parsedate_to_datetime(self._lab.rest.request("GET", "/v1/stats").headers["Date"])
        return date.timestamp() - time.time()

    def set(self, seconds: int) -> None:
        """Set it to so many seconds ahead of the right time."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds))
        assert abs(self.shown() - seconds) < 60


def becomes(lab: Lab, name: str, state: str) -> None:
    def known() -> bool:
        (found,) = [one for one in lab.rest.get("/v1/pools/known/members")["members"] if one["name"] == name]
        return (found["health_status"] or {}).get("state") == state

    wait_until(known, 20, f"{name} is {state}")


def test_the_clock_is_set(make_lab: Callable[..., Lab], told: Callable[[str], None]) -> None:
    """Forward by an hour, back by two: nothing is counted by this clock but what is for people, or on disk."""
    lab = make_lab("single", options=["--fastpath"])
    clock = Clock(lab)
    lab.start_servers()
    lab.start_controller()
    cookies = server("cookies", 8082, "web", application="http", binding="auto")
    site(lab, cookies, persistence={"type": "SOURCE_IP", "timeout": SHORTER}, monitors=[MONITOR])
    client = lab.client("c1")
    with open_ones(lab) as go_on, addresses(client, "10.0.0.", 150, 6) as given:
        first = {address: ask_from(client, VIP, 8080, address) for address in given}
        for offset in (HOUR, -HOUR):
            for name in ALL:
                becomes(lab, name, "up")
            since = lab.controller.log.stat().st_size
            event = lab.rest.get("/v1/events?limit=1000")["events"][-1]["number"]
            begun = time.monotonic()
            clock.set(offset)
            wait_until(lambda: "the clock was set" in logged(lab, since), 15, "it is told of")  # noqa: B023
            told(f"set by {offset} s: noticed after {time.monotonic() - begun:.2f} s, nobody was taken out")
            go_on()
            decides(lab)
            assert set(lab.client("c1").who(f"http://{VIP}:8082/", 12)) <= ALL
            assert {address: ask_from(client, VIP, 8080, address) for address in given} == first
            found = lab.rest.get(f"/v1/events?marker={event}")["events"]
            assert not [one for one in found if one["kind"] in ("member_down", "switch")], found
            if offset > 0:
                lab.controller.kill()
                lab.start_controller()
                assert abs(clock.shown() - offset) < 60
                assert {address: ask_from(client, VIP, 8080, address) for address in given} == first, "still known"
    LabHost.kill(lab.services["s3"][0])
    becomes(lab, "s3", "down")
    lab.start_servers()
    becomes(lab, "s3", "up")
    decides(lab)
    assert "Traceback" not in logged(lab)


# ------------------------------------------------------------------ the fast path


def _refused(lab: Lab) -> int:
    """0, or 1 where a new connection that the controller decides is refused. One without an answer raises."""
    try:
        Held(lab.client("c1"), VIP, WAYS["controller"]).close()
    except ConnectionRefusedError:
        return 1
    return 0


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Enough for all the clients."""
    limits = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if -1 < hard < 4 * SMALLEST:
        pytest.skip("not enough descriptors for the clients")
    if -1 < soft < 4 * SMALLEST:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4 * SMALLEST, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("many_descriptors")
def test_the_fast_path_is_full(make_lab: Callable[..., Lab], told: Callable[[str], None]) -> None:
    """More silent connections than there is room: who is active lives, and who is new is served, or refused at once."""
    lab = make_lab("single", options=["--fastpath", "--max-connections", str(SMALLEST)])
    lab.start_servers()
    lab.start_controller()

    def fast() -> Any:
        return lab.rest.get("/v1/stats")["switches"][0]["fastpath"]

    if lab.controller.has_no_fastpath:
        pytest.skip("no fast path on this machine")
    site(lab)
    with open_ones(lab) as go_on, contextlib.ExitStack() as stack:
        silent: list[socket.socket] = []
        for number in range(SMALLEST + MORE):
            # What finds no room here is Open vSwitch's: everybody is served.
            silent.append(tcp(lab.client("c3"), VIP, WAYS["switch"]))
            stack.callback(silent[-1].close)
            if number % 100 == 0:
                go_on()
            if number == SMALLEST // 2:
                # Who is silent for longer is told to a factor of two: more of them are than will have to make room.
                until = time.monotonic() + 3
                while time.monotonic() < until:
                    go_on()
                    time.sleep(0.2)
        refused = sum(_refused(lab) for _ in range(10))
        go_on()

        def room() -> bool:
            nonlocal refused
            go_on()
            found = _refused(lab)
            refused += found
            return not found

        begun = time.monotonic()
        wait_until(room, 20, "the longest silent have made room", 0.2)
        told(f"{refused} refused at once; room after {time.monotonic() - begun:.2f} s")
        # There may be room for no more than a few: what the switch decides needs none of it.
        counted = lab.client("c1").who(f"http://{VIP}:{WAYS['switch']}/", 12)
        assert set(counted) <= ALL and counted.total() == 12, counted
        wait_until(lambda: statistics(lab, "switch")["opened"] >= SMALLEST + MORE, 10, "all are counted")
        assert statistics(lab, "controller")["refused"].get("OVERFLOW", 0) == refused
        counters = fast()
        assert counters["connections"] <= SMALLEST
        assert counters["misses"]["full"] or statistics(lab, "switch")["closed"], counters
        answers: Counter[str] = Counter()
        for one in silent:
            with contextlib.suppress(ConnectionError):
                one.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for one in silent:
            try:
                answers["served" if one.recv(4096).startswith(b"HTTP/1.1 200") else "ended"] += 1
            except ConnectionError:
                answers["ended"] += 1
        assert answers.total() == SMALLEST + MORE, "nobody waits for ever"
        assert answers["served"] >= SMALLEST * 3 // 4, answers
        go_on()
    assert "Traceback" not in logged(lab)
