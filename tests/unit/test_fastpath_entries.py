# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.dataflow.fastpath.entries`` and the program ``install``: what goes with a connection that is entered."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import build, injector, kernel, layout
from lbapp.dataflow.fastpath.entries import Batch, Departs, Departure, Entry, FirstFrame, Syn
from lbapp.dataflow.fastpath.injector import Injector, pair
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Result
from lbapp.dataflow.fastpath.tables import Tables
from lbapp.dataflow.frames import ACK, PSH, SYN, Segment
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import require_programs
from topologies.namespace import Namespace, wait_until

SO_RCVBUFFORCE = 33
BRIDGE = "departures"
CLIENT_MAC, MEMBER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000007")
ADDRESSES = {4: ("10.0.0.1", "10.0.0.100", "10.0.0.7"), 6: ("fd00::1", "fd00::100", "fd00::7")}
OPTIONS = bytes.fromhex("020405b4 01010402 01030307")
REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


class Place:
    """A namespace with one wire and its far end, and an injector; clients and members are both beyond that wire."""

    def __init__(self, cleanup: ExitStack) -> None:
        self.namespace = Namespace.create("departures")
        cleanup.callback(self.namespace.close)
        self.namespace.run("ip", "link", "add", "w0", "type", "veth", "peer", "name", "w1")
        for name in ("w0", "w1"):
            self.namespace.run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            self.namespace.run("ip", "link", "set", name, "arp", "off", "up")
        with self.namespace.entered():
            self.tables = Tables(build.OBJECT, max_connections=3000, mac=VIRTUAL_MAC)
            cleanup.callback(self.tables.close)
            self.wire = socket.if_nametoindex("w0")
            self.far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            cleanup.callback(self.far.close)
            self.far.bind(("w1", 0))
            self.injector = Injector(BRIDGE, self.tables.programs["again"])
            cleanup.callback(self._close)
        self.far.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self.tables.door = self.injector.door
        # What is sent before the kernel has noticed that a pair is up is dropped.
        wait_until(lambda: self.namespace.run("ip", "link").stdout.count("state UP") == 4, 5, "both pairs are up")

    def thread(self) -> int:
        """The kernel's, of the far end of the pair."""
        found = []
        for comm in Path("/proc").glob("[0-9]*/comm"):
            with suppress(OSError):  # others come and go
                if comm.read_text().startswith(f"napi/{pair(BRIDGE)[1]}"[:14]):
                    found.append(int(comm.parent.name))
        (one,) = found
        return one

    def _close(self) -> None:
        with self.namespace.entered():
            self.injector.close()

    def entry(self, port: int, departure: Departure | None, *, family: int = 4, routed: bool = False,
              state: int = 0) -> Entry:
        client, virtual, member = map(packed, ADDRESSES[family])
        mac = VIRTUAL_MAC if routed else layout.KEEP_MAC
        state |= layout.ROUTED if routed else 0
        return Entry(FlowKey(client, virtual, port, 80, 6),
                     Flow(client, member, port, 8080, MEMBER_MAC, mac, self.wire, state, port, 5, 7, 60), CLIENT_MAC,
                     self.wire, departure)

    def install(self, *entries: Entry) -> list[Result]:
        with self.namespace.entered():
            return self.tables.install(entries)

    def seen(self, number: int) -> list[bytes]:
        self.far.settimeout(3)
        return [self.far.recv(2000) for _ in range(number)]

    def nothing(self) -> bool:
        self.far.settimeout(0.2)
        try:
            return not self.far.recv(2000)
        except TimeoutError:
            return True


@pytest.fixture
def place() -> Iterator[Place]:
    require_programs()
    with ExitStack() as cleanup:
        yield Place(cleanup)


def first(family: int, port: int, payload: bytes = REQUEST, flags: int = ACK | PSH) -> bytes:
    """A client's frame, as it comes in."""
    client, virtual, _ = map(packed, ADDRESSES[family])
    return frames.tcp(VIRTUAL_MAC, CLIENT_MAC, (client, port), (virtual, 80), Segment(1, 9, flags, 500, b"", payload))


def as_member_has_it(family: int, port: int, part: Segment) -> bytes:
    client, _, member = map(packed, ADDRESSES[family])
    return frames.tcp(MEMBER_MAC, CLIENT_MAC, (client, port), (member, 8080), part)


@pytest.mark.integration
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("routed", [False, True], ids=["switched", "routed"])
def test_a_syn_is_the_one_that_the_readable_version_makes(place: Place, family: int, routed: bool) -> None:
    chance = random.Random(family)
    client, _, member = map(packed, ADDRESSES[family])
    cases = [(chance.getrandbits(32), chance.randbytes(4 * words)) for words in range(11) for _ in range(20)]
    # Sums that are nothing, or all ones: there a checksum has two forms.
    cases += [(isn, options) for isn in (0, 0xFFFFFFFF) for options in (b"", bytes(4), b"\xff" * 40)]
    assert set(place.install(*(place.entry(1024 + at, Syn(*case), family=family, routed=routed)
                               for at, case in enumerate(cases)))) == {Result.GONE}
    assert place.seen(len(cases)) == [
        frames.tcp(MEMBER_MAC, VIRTUAL_MAC if routed else CLIENT_MAC, (client, 1024 + at), (member, 8080),
                   Segment(isn, 0, SYN, 64_240, options, b"")) for at, (isn, options) in enumerate(cases)]


@pytest.mark.integration
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 37, 700, 1440])
def test_a_frame_walks_as_its_connection_says(place: Place, family: int, size: int) -> None:
    """To where its new entry leads it, and counted there."""
    payload = bytes(range(256)) * 6
    place.tables.maps["inner"].update(place.wire.to_bytes(4, "little"), bytes(4))
    frame = first(family, 4000, payload[:size])
    one = place.entry(4000, FirstFrame(place.wire, frame), family=family)
    assert place.install(one) == [Result.GONE]
    assert place.seen(1) == [as_member_has_it(family, 4000, Segment(1, 9, ACK | PSH, 500, b"", payload[:size]))]
    found = place.tables.lookup(one.key)
    assert found is not None and (found.packets, found.bytes) == (1, len(frame))


@pytest.mark.integration
def test_what_is_held_lets_its_first_data_pass(place: Place) -> None:
    one = place.entry(4000, FirstFrame(place.wire, first(4, 4000)), state=layout.HELD)
    assert place.install(one) == [Result.GONE]
    place.seen(1)
    found = place.tables.lookup(one.key)
    assert found is not None and found.state & (layout.HELD | layout.ESTABLISHED) == layout.HELD | layout.ESTABLISHED


@pytest.mark.integration
def test_each_of_many_goes_with_its_own_connection(place: Place) -> None:
    """Whatever goes with it, and with some nothing does."""
    number = 2500
    departures: list[Departure | None] = [
        None if at % 3 == 0 else Syn(at, OPTIONS) if at % 3 == 1 else FirstFrame(place.wire, first(4, 1024 + at))
        for at in range(number)]
    results: list[Result] = []
    there: list[bytes] = []
    for start in range(0, number, 125):  # what comes out is read before the queue is full
        part = slice(start, start + 125)
        results += place.install(*(place.entry(1024 + start + at, one) for at, one in enumerate(departures[part])))
        there += place.seen(sum(one is not None for one in departures[part]))
    assert results == [Result.OPENED if one is None else Result.GONE for one in departures]
    parts = [frames.segment(frame, frames.parse(frame)) for frame in there]
    ports = [frames.parse(frame).signature.source_port for frame in there]
    assert ports == [1024 + at for at in range(number) if at % 3]
    assert [(part.flags, part.seq) for part in parts] == [(SYN, at) if at % 3 == 1 else (ACK | PSH, 1)
                                                         for at in range(number) if at % 3]


@pytest.mark.integration
def test_nothing_goes_with_what_is_not_entered(place: Place) -> None:
    assert place.install(place.entry(4000, None)) == [Result.OPENED]
    for again in (Syn(1, OPTIONS), FirstFrame(place.wire, first(4, 4000))):
        assert place.install(place.entry(4000, again)) == [Result.EXISTS]
    assert place.nothing()


@pytest.mark.integration
def test_what_cannot_go_is_left_to_the_caller(place: Place) -> None:
    """The connection is there all the same."""
    long = FirstFrame(place.wire, first(4, 4000, bytes(1461)))
    assert place.install(place.entry(4000, long)) == [Result.OPENED]
    assert place.install(place.entry(4001, Syn(1, b"\1" * 44))) == [Result.OPENED]
    place.namespace.run("ip", "link", "set", pair(BRIDGE)[0], "down")
    assert place.install(place.entry(4002, Syn(1, OPTIONS))) == [Result.OPENED]
    assert place.nothing() and len(place.tables.flows(100)) == 6


@pytest.mark.integration
def test_more_than_the_queue_holds_is_left_to_the_caller(place: Place) -> None:
    """The thread that works through the queue has to wait for the processor that fills it."""
    number = 1000
    one = min(os.sched_getaffinity(0))
    os.sched_setaffinity(place.thread(), {one})
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {one})
    try:
        results = place.install(*(place.entry(1024 + at, Syn(at, OPTIONS)) for at in range(number)))
    finally:
        os.sched_setaffinity(0, before)
    gone = [at for at, result in enumerate(results) if result is Result.GONE]
    assert set(results) == {Result.GONE, Result.OPENED} and 200 <= len(gone) <= 300
    assert [frames.segment(frame, frames.parse(frame)).seq for frame in place.seen(len(gone))] == gone
    assert place.nothing() and len(place.tables.flows(3 * number)) == 2 * number


@pytest.mark.integration
def test_more_than_a_call_holds(place: Place) -> None:
    """Each with its own connection, whatever was in its place before."""
    goes = {0, 5, 1022, 1023, 1024, 1030, 2047, 2048, 2060}
    results = place.install(*(place.entry(1024 + at, Syn(at, OPTIONS) if at in goes else None) for at in range(2100)))
    assert {at for at, result in enumerate(results) if result is Result.GONE} == goes
    assert [frames.segment(frame, frames.parse(frame)).seq for frame in place.seen(len(goes))] == sorted(goes)
    assert place.nothing()


@pytest.mark.integration
def test_without_a_thread_it_goes_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: str) -> None:
        raise OSError("there is none")

    require_programs()
    with ExitStack() as cleanup, monkeypatch.context() as patched:
        patched.setattr(f"{injector.__name__}._give_thread", none)
        place = Place(cleanup)
        assert place.install(*(place.entry(1024 + at, Syn(at, OPTIONS)) for at in range(200))) == [Result.GONE] * 200
        assert [frames.segment(frame, frames.parse(frame)).seq for frame in place.seen(200)] == list(range(200))


@pytest.mark.integration
def test_a_door_that_somebody_removed(place: Place) -> None:
    place.namespace.run("ip", "link", "del", pair(BRIDGE)[0])
    for port in (4000, 4001):
        assert place.install(place.entry(port, Syn(1, OPTIONS))) == [Result.OPENED]
        assert place.tables.door == 0


@pytest.mark.integration
def test_what_the_kernel_refuses_is_full(place: Place, monkeypatch: pytest.MonkeyPatch,
                                         caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for it, and it is said once."""
    one = place.entry(4000, Syn(1, OPTIONS))
    with monkeypatch.context() as patched:
        patched.setattr(place.tables, "_install", kernel.Prepared(-1, 128))
        for _ in range(2):
            assert place.install(one, one) == [Result.FULL] * 2
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "Bad file descriptor" in record.getMessage()
    assert place.install(one) == [Result.GONE]


@pytest.mark.integration
@pytest.mark.parametrize("state", [0, layout.SPLICE])
@pytest.mark.parametrize("order", [(layout.FIN, layout.PEER_FIN), (layout.PEER_FIN, layout.FIN)])
def test_who_has_finished_may_be_told(place: Place, state: int, order: tuple[int, int]) -> None:
    """With the connection, or later; the second one ends it, once."""
    one = place.entry(4000, None, state=state)

    def told(bits: int) -> Entry:
        return one._replace(flow=one.flow._replace(state=state | bits))

    def sides() -> list[int]:
        found = [place.tables.lookup(key) for key in (one.key, one.back()[0])]
        return [flow.state & (layout.FIN | layout.PEER_FIN | layout.CLOSED) for flow in found if flow is not None]

    mirrored = {layout.FIN: layout.PEER_FIN, layout.PEER_FIN: layout.FIN}
    assert place.install(told(order[0])) == [Result.OPENED]
    assert sides() == [order[0], mirrored[order[0]]] and place.tables.closed() == []
    assert place.install(told(order[0])) == [Result.EXISTS]
    assert place.tables.closed() == []
    assert place.install(told(order[1])) == [Result.EXISTS]
    assert sides() == [layout.FIN | layout.PEER_FIN | layout.CLOSED] * 2
    assert [closed.serial for closed in place.tables.closed()] == [4000]
    for bits in (*order, sum(order)):
        assert place.install(told(bits)) == [Result.EXISTS], "its end is told of; it is not entered anew"
    assert place.tables.closed() == []


@pytest.mark.integration
def test_what_is_said_of_another_connection_changes_nothing(place: Place) -> None:
    one = place.entry(4000, None)
    assert place.install(one) == [Result.OPENED]
    other = one._replace(flow=one.flow._replace(serial=9, state=layout.FIN | layout.PEER_FIN))
    assert place.install(other) == [Result.EXISTS]
    found = place.tables.lookup(one.key)
    assert found is not None and found.state == 0 and place.tables.closed() == []


def test_an_object_of_another_version_is_refused() -> None:
    require_programs()
    with pytest.raises(kernel.KernelError, match=r"not of this version: it has no .*departures.*install"):
        Tables(build.HERE.parent.parent / "server_agent" / "adopt.bpf.o", mac=VIRTUAL_MAC)


def test_each_has_its_own_place() -> None:
    installs, departures = bytearray(b"\xff" * 2 * layout.INSTALL.size), bytearray(b"\xff" * 2 * layout.DEPARTURE_SIZE)
    batch = Batch(installs, departures)
    key = FlowKey(bytes(4), bytes(4), 1, 2, 6)
    one = Entry(key, Flow(bytes(4), bytes(4), 1, 2, bytes(6), bytes(6), 3, 0, 1, 5, 7, 60), bytes(6), 4)
    for departure, kind in ((Syn(1, OPTIONS), Departs.SYN_GOES), (FirstFrame(3, bytes(1514)), Departs.FRAME_GOES),
                            (None, Departs.NOTHING), (FirstFrame(3, bytes(1515)), Departs.NOTHING)):
        batch.put(1, one._replace(departure=departure), 9)
        assert layout.DEPARTURE.unpack_from(departures, layout.DEPARTURE_SIZE)[3] == kind
    assert departures[:layout.DEPARTURE_SIZE] == b"\xff" * layout.DEPARTURE_SIZE, "another one's place"
    assert installs[:layout.INSTALL.size] == b"\xff" * layout.INSTALL.size


@pytest.mark.integration
def test_the_way_back_is_the_one_that_the_program_makes(place: Place) -> None:
    for family, routed in ((4, False), (6, True)):
        one = place.entry(4000, None, family=family, routed=routed, state=layout.HELD | layout.TRACKED)
        place.install(one)
        key, back = one.back()
        found = place.tables.lookup(key)
        assert found is not None and found._replace(used=0, opened=0) == back
