# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.dataflow.fastpath.injector`` and the program ``again``: who deals with what an agent sends."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import build, injector, layout
from lbapp.dataflow.fastpath.injector import Injector, pair
from lbapp.dataflow.fastpath.tables import Tables
from lbapp.dataflow.frames import ACK, SYN, Segment
from tests.fastpath_packets import require_programs
from topologies.namespace import Namespace, wait_until

pytestmark = pytest.mark.integration

SO_RCVBUFFORCE = 33
BRIDGE = "a bridge"
MAC = bytes((2, 0, 0, 0, 0, 1))
ENDS = (bytes((10, 0, 0, 1)), 4000), (bytes((10, 0, 0, 2)), 80)
FIRST = frames.tcp(MAC, MAC, *ENDS, Segment(1, 0, SYN, 100, b"", b""))


class Place:
    """A namespace with a wire to nowhere: its far end, where whatever leaves by it is seen, and the way back."""

    def __init__(self, cleanup: ExitStack) -> None:
        self.namespace = Namespace.create("injector")
        cleanup.callback(self.namespace.close)
        self.namespace.run("ip", "link", "add", "w0", "mtu", "9000", "type", "veth", "peer", "name", "w1", "mtu",
                           "9000")
        for name in ("w0", "w1"):
            self.namespace.run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            self.namespace.run("ip", "link", "set", name, "arp", "off", "up")
        self._cleanup = cleanup
        self.wait_for("w0", "w1")
        with self.namespace.entered():
            self.tables = Tables(build.OBJECT, max_connections=1000, mac=bytes(6))
            cleanup.callback(self.tables.close)
            self.index = socket.if_nametoindex("w0")
            self.far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            cleanup.callback(self.far.close)
            self.far.bind(("w1", 0))
        self.far.settimeout(3)

    def injector(self, wait: bool = True) -> Injector:
        with self.namespace.entered():
            made = Injector(BRIDGE, self.tables.programs["again"])
        self._cleanup.callback(self.close, made)
        if wait:
            self.wait_for(*pair(BRIDGE))
        return made

    def wait_for(self, *names: str) -> None:
        """Until the kernel has noticed that both ends of a pair are up, it drops what is sent, and says nothing."""
        def states() -> dict[str, str]:
            return {link["ifname"]: link["operstate"] for link in json.loads(self.namespace.run(
                "ip", "-j", "link").stdout)}

        wait_until(lambda: {states()[name] for name in names} == {"UP"}, 5, f"{' and '.join(names)} are up")

    def close(self, made: Injector) -> None:
        with self.namespace.entered():
            made.close()

    def send(self, made: Injector, data: bytes, soon: bool = True) -> bool:
        with self.namespace.entered():
            return made.send(self.index, data, soon)

    def threads(self) -> list[str]:
        """The kernel's, of the far end of the pair."""
        found = []
        for comm in Path("/proc").glob("[0-9]*/comm"):
            try:
                found.append(comm.read_text().strip())
            except OSError:
                continue
        # The name is cut, and other bridges have pairs of other names.
        return [name for name in found if name.startswith(f"napi/{pair(BRIDGE)[1]}"[:14])]


@pytest.fixture
def place() -> Iterator[Place]:
    require_programs()
    with ExitStack() as cleanup:
        yield Place(cleanup)


def test_a_thread_of_the_kernel_deals_with_what_is_sent(place: Place) -> None:
    made = place.injector()
    assert len(place.threads()) == 1
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST
    place.close(made)
    wait_until(lambda: not place.threads(), 3, "its thread has gone with the pair")


def _no_tool(*_: object, **__: object) -> None:
    raise subprocess.CalledProcessError(1, "ethtool", stderr=b"it cannot be had\n")


def _no_sysfs() -> None:
    raise PermissionError(1, "sysfs cannot be had")


@pytest.mark.parametrize("failing", [("subprocess.run", _no_tool), ("_sysfs", _no_sysfs)], ids=["ethtool", "sysfs"])
def test_without_it_the_agent_deals_with_it_itself(place: Place, monkeypatch: pytest.MonkeyPatch,
                                                   failing: tuple[str, Callable[..., None]],
                                                   caplog: pytest.LogCaptureFixture) -> None:
    name, instead = failing
    with monkeypatch.context() as patched:
        patched.setattr(f"{injector.__name__}.{name}", instead)
        made = place.injector(wait=False)
    place.wait_for(*pair(BRIDGE))
    assert not place.threads()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cannot be had" in record.getMessage()
    place.far.setblocking(False)
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST, "when the call returns"


def test_what_came_in_on_a_wire_is_not_what_leaves_by_it(place: Place) -> None:
    """Of no wire of a fast path: nobody but the switch must see it, and there is none."""
    made = place.injector()
    before = place.tables.counters()["shot"]
    with place.namespace.entered():
        assert made.inject(place.index, FIRST)
        assert place.tables.counters()["shot"] == before + 1, "when the call returns"
        assert made.inject(place.index, FIRST, soon=True)
    wait_until(lambda: place.tables.counters()["shot"] == before + 2, 3, "in its turn")
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST
    place.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        place.far.recv(2000)
    assert place.send(made, FIRST, soon=False) and place.far.recv(2000) == FIRST, "when the call returns"


@pytest.mark.parametrize("soon", [True, False], ids=["soon", "at once"])
@pytest.mark.parametrize("size", [1460, 8000, 50_000])
def test_what_is_long_arrives_in_order(place: Place, size: int, soon: bool) -> None:
    """In pieces that every path carries, or as it is: whoever receives it says."""
    made = place.injector()
    said = bytes(range(250)) * (size // 250)
    assert place.send(made, frames.tcp(MAC, MAC, *ENDS, Segment(7, 8, ACK, 100, b"", said)), soon)
    got = b""
    while len(got) < len(said):
        data = place.far.recv(70_000)
        part = frames.segment(data, frames.parse(data))
        assert part.seq == 7 + len(got)
        got += part.payload
    assert got == said


def test_many_at_once_keep_their_order(place: Place) -> None:
    made = place.injector()
    sent = [frames.tcp(MAC, MAC, *ENDS, Segment(number, 0, SYN, 100, b"", b"")) for number in range(200)]
    with place.namespace.entered():
        assert all(made.send(place.index, data, soon=True) for data in sent)
    assert [place.far.recv(2000) for _ in sent] == sent


class Full:
    """A socket that has no room, or whatever else it is."""

    def __init__(self, error: int) -> None:
        self.error, self.closed = error, False

    def send(self, _: bytes) -> int:
        raise OSError(self.error, "says the kernel")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS])
def test_what_finds_the_queue_full_goes_at_once(place: Place, error: int) -> None:
    """So whoever sends too much is slowed down, and nothing is lost."""
    made, full = place.injector(), Full(error)
    made._sockets[place.index | layout.OUT_MARK, True] = full  # type: ignore[assignment]
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST
    assert not full.closed
    made._sockets[place.index | layout.OUT_MARK, False] = full  # type: ignore[assignment]
    assert not place.send(made, FIRST) and not full.closed, "there is no room anywhere"


def test_more_than_any_queue_holds_arrives(place: Place) -> None:
    place.far.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    made = place.injector()
    with place.namespace.entered():
        assert all(made.send(place.index, FIRST, soon=True) for _ in range(5000))
    assert [place.far.recv(2000) for _ in range(5000)] == [FIRST] * 5000


def test_a_socket_whose_interface_has_gone_is_made_anew(place: Place) -> None:
    made, gone = place.injector(), Full(errno.ENXIO)
    made._sockets[place.index | layout.OUT_MARK, True] = gone  # type: ignore[assignment]
    assert not place.send(made, FIRST) and gone.closed
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST


def test_only_the_sockets_of_what_has_gone_are_forgotten(place: Place) -> None:
    made = place.injector()
    with place.namespace.entered():
        for send in (made.send, made.inject):
            assert send(place.index, FIRST) and send(place.index + 1, FIRST)
    assert len(made._sockets) == 4
    made.forget([place.index])
    assert {mark & ~layout.OUT_MARK for mark, _ in made._sockets} == {place.index + 1}


def test_two_sizes_keep_their_order(place: Place) -> None:
    """The kernel gathers segments of a connection (GRO): of one socket alone, in their order."""
    made, at = place.injector(), 0
    with place.namespace.entered():
        for size in (3000, 10, 1400, 5000, 1):
            said = Segment(at, 8, ACK, 100, b"", bytes(size))
            assert made.send(place.index, frames.tcp(MAC, MAC, *ENDS, said), soon=True)
            at += size
    got = 0
    while got < at:
        data = place.far.recv(70_000)
        part = frames.segment(data, frames.parse(data))
        assert part.seq == got
        got += len(part.payload)


def test_a_pair_that_was_left_behind_is_replaced(place: Place) -> None:
    """By a process that was killed."""
    place.injector()
    made = place.injector()
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST


def test_an_interface_that_is_not_there(place: Place) -> None:
    made = place.injector()
    with place.namespace.entered():
        assert made.send(54_321, FIRST, soon=True), "nobody hears of it, as of any frame that is lost"
        assert not made.send(place.index, bytes(70_000)), "longer than any frame"
    assert place.send(made, FIRST) and place.far.recv(2000) == FIRST
