# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Proxied handshakes and spliced connections with frames as offloading leaves them: partial checksums, and segments
that are still to be cut up. On a veth pair, whose far end sends and sees them with their virtio headers.

Programs: ``lbapp/dataflow/fastpath/answer.bpf.h``, ``handshake.bpf.h``, ``splice.bpf.h``.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import Ask, Flow, FlowKey, Hash, Mode, Service, ServiceKey, Splice
from lbapp.dataflow.fastpath.netlink import Netlink
from lbapp.dataflow.fastpath.removal import HANDLE, PRIORITY
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import (
    ACK,
    BOTH,
    CLIENT_MAC,
    FAMILIES,
    MEMBER_MAC,
    RST,
    SYN,
    TCP,
    Bench,
    Seen,
    entries,
    frame,
    packed,
    read,
)
from topologies.namespace import Namespace, wait_until

pytest_plugins = ["tests.fastpath_packets", "tests.namespaces"]
pytestmark = pytest.mark.integration

SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING = 263, 15, 4
VIRTIO = struct.Struct("=BBHHHH")
NEEDS_CHECKSUM, DATA_VALID = 1, 2
GSO = {4: 1, 6: 4}
SEGMENT = 1400
LINUX = b"\x02\x04\x05\xb4\x04\x02\x01\x01\x01\x03\x03\x07"


class Came(NamedTuple):
    """A frame at the far end, and how it is to be finished."""

    flags: int
    gso: int
    segment: int
    start: int
    data: bytes

    @property
    def seen(self) -> Seen:
        """Taken apart; its checksum is partial."""
        assert self.flags == NEEDS_CHECKSUM
        assert self.start == (34 if self.data[12:14] == b"\x08\x00" else 54)
        return read(self.data, "partial")


class Line:
    """A pair whose near end the program ``wire`` reads."""

    def __init__(self, bench: Bench, namespace: Namespace) -> None:
        self.bench = bench
        with namespace.entered(), Netlink() as netlink:
            netlink.add_pair("near", "far", 1500, CLIENT_MAC)
            links = netlink.links()
            self.near = links["near"].ifindex
            for name in ("near", "far"):
                netlink.without_addresses(links[name].ifindex)
                netlink.change(links[name].ifindex, up=True, arp=False)
            netlink.add_clsact(self.near)
            netlink.set_program(self.near, PRIORITY, HANDLE, bench.programs["wire"], "test")
            wait_until(lambda: netlink.links()["far"].carrier, 3, "a carrier")
            self.far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.far.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self.far.bind(("far", 3))
            self.far.settimeout(3)
        self.namespace = namespace

    def send(self, data: bytes, size: int = 0) -> None:
        """A frame whose checksum is partial; ``size``: cut up into segments of so many bytes."""
        family = 4 if data[12:14] == b"\x08\x00" else 6
        start = 34 if family == 4 else 54
        header = start + (data[start + 12] >> 4) * 4
        self.far.send(VIRTIO.pack(NEEDS_CHECKSUM, GSO[family] if size else 0, header, size, start, 16) + data)

    def receive(self) -> Came:
        """What came back."""
        while True:
            data, address = self.far.recvfrom(1 << 17)
            if address[2] != PACKET_OUTGOING and data[22:24] in (b"\x08\x00", b"\x86\xdd"):
                flags, gso, _, size, start, _ = VIRTIO.unpack_from(data)
                return Came(flags, gso, size, start, data[VIRTIO.size:])

    def counted(self, name: str) -> None:
        """Wait for it."""
        wait_until(lambda: self.bench.counted().get(name), 3, name, every=0.005)

    def connect(self, family: int, splice: Splice | None, request: int = 0) -> None:
        """A spliced connection of two who are both at the far end; not ready yet without ``splice``."""
        client, virtual, member = map(packed, FAMILIES[family])
        self.bench.install(entries([
            (FlowKey(client, virtual, 40000, 80, TCP), Flow(client, member, 40000, 8080, MEMBER_MAC, layout.KEEP_MAC,
                                                            self.near, layout.SPLICE, 9, 5, 77, 100, request=request)),
            (FlowKey(member, client, 8080, 40000, TCP),
             Flow(virtual, client, 80, 40000, CLIENT_MAC, VIRTUAL_MAC, self.near, layout.SPLICE | layout.OUTBOUND, 9,
                  5, 77, 100))]))
        if splice is not None:
            self.bench.set_splices({9: splice})


@pytest.fixture
def line(netns: Callable[[str], Namespace], tables: Bench) -> Iterator[Line]:
    made = Line(tables, netns("line"))
    # A namespace outlives its test for a while, and its TCP repeats what was not acknowledged.
    tables.set_cookies((secrets.token_bytes(16), None), 0)
    tables.set_services({ServiceKey(packed(virtual), 80, TCP): Service(12, Mode.PROXY, Hash.TURN, 100, (), 1400, 9,
                                                                            True)
                         for _, virtual, _ in FAMILIES.values()})
    yield made
    made.far.close()
    with made.namespace.entered(), Netlink() as netlink:
        netlink.delete(made.near)  # what the namespace still says would be counted among the next test's


def request(family: int, flags: int = ACK, **more: Any) -> bytes:
    client, virtual, _ = FAMILIES[family]
    return frame(client, virtual, flags=flags, checksum="partial", **more)


def greet(line: Line, family: int, **more: Any) -> Seen:
    line.send(request(family, SYN, seq=99, tcp_options=LINUX, **more))
    return line.receive().seen


@BOTH
@pytest.mark.parametrize("payload", [b"", b"fast open", bytes(1000)])
def test_a_syn_is_answered(line: Line, family: int, payload: bytes) -> None:
    client, virtual, _ = FAMILIES[family]
    seen = greet(line, family, payload=payload)
    assert (seen.source, seen.destination, seen.sport, seen.dport) == (virtual, client, 80, 40000)
    assert (seen.eth_dst, seen.eth_src, seen.ttl) == (CLIENT_MAC, VIRTUAL_MAC, 64)
    assert (seen.flags, seen.ack, seen.window, seen.payload) == (SYN | ACK, 100, layout.WINDOW, b"")
    assert seen.tcp_options == bytes.fromhex("02040578 01010402 01030309")


@BOTH
@pytest.mark.parametrize("size", [3000, layout.WINDOW])
def test_the_first_flight_in_one_piece(line: Line, family: int, size: int) -> None:
    made = greet(line, family).seq
    data = request(family, seq=100, ack=made + 1, payload=(bytes(range(251)) * 60)[:size])
    line.send(data, SEGMENT)
    record = wait_until(line.bench.queries, 3, "a query", every=0.005)[0]
    assert record == layout.QueryRecord(line.near, 12, data, Ask.DATA, made >> 23)


@BOTH
def test_more_than_the_window(line: Line, family: int) -> None:
    """Dropped and counted; and nothing of it is remembered."""
    made = greet(line, family).seq
    for size, name in ((layout.FRAME_LARGE - 1000, "asked_data"), (layout.FRAME_LARGE, "ask_lost"),
                       (60_000, "ask_lost")):
        line.send(request(family, seq=100, ack=made + 1, payload=bytes(size)), SEGMENT)
        line.counted(name)
        line.bench.forget_pending(FlowKey.unpack(key) for key, _ in line.bench.maps["pending"].items())
    assert len(line.bench.queries()) == 1


@BOTH
def test_a_connection_that_is_none_is_reset(line: Line, family: int) -> None:
    data = request(family, seq=5, ack=0x01234568, payload=bytes(30_000))
    line.send(data, SEGMENT)
    line.counted("cookie_bad")
    ((key, first),) = line.bench.maps["doubts"].items()
    since, acknowledged = struct.unpack("=II", first)
    line.bench.maps["doubts"].update(key, struct.pack("=II", since - layout.ticks(4000), acknowledged))
    line.send(data, SEGMENT)
    came = line.receive()
    assert came.gso == 0
    assert (came.seen.flags, came.seen.seq, came.seen.ack, came.seen.payload) == (RST, 0x01234568, 0, b"")
    assert len(came.data) == (54 if family == 4 else 74)


@BOTH
@pytest.mark.parametrize("size", [0, 50_000])
def test_a_spliced_connection(line: Line, family: int, size: int) -> None:
    """What is cut up later keeps its size of segments; every piece gets the numbers that follow from these."""
    client, virtual, member = FAMILIES[family]
    line.connect(family, Splice(0xFFFFFFF0, 1, -1))
    payload = bytes(range(250)) * (size // 250)
    edges = bytes((1, 1, 5, 18)) + struct.pack("!4I", 10, 20, 0x80000000, 0x80000010)
    line.send(request(family, seq=7, ack=0x20, payload=payload, tcp_options=edges), SEGMENT if size else 0)
    came = line.receive()
    seen = came.seen
    assert (seen.source, seen.destination, seen.dport, seen.payload) == (client, member, 8080, payload)
    assert (seen.seq, seen.ack, seen.window) == (7, 0x10, 250)
    assert seen.tcp_options == edges[:4] + struct.pack("!4I", 0xFFFFFFFA, 4, 0x7FFFFFF0, 0x80000000)
    assert (came.gso, came.segment) == ((GSO[family], SEGMENT) if size else (0, 0))
    line.send(frame(member, client, TCP, 8080, 40000, flags=ACK, seq=0x10, ack=7, payload=payload, eth_dst=VIRTUAL_MAC,
                    eth_src=MEMBER_MAC, checksum="partial", tcp_options=edges), SEGMENT if size else 0)
    came = line.receive()
    seen = came.seen
    assert (seen.source, seen.destination, seen.sport, seen.payload) == (virtual, client, 80, payload)
    assert (seen.seq, seen.ack, seen.window, seen.tcp_options) == (0x20, 7, 1000, edges)
    assert (came.gso, came.segment) == ((GSO[family], SEGMENT) if size else (0, 0))


@BOTH
@pytest.mark.parametrize("size", [3, 700, 1440])
def test_a_syn_ack_becomes_the_clients_first_data(line: Line, family: int, size: int) -> None:
    client, _, member = FAMILIES[family]
    data = (bytes(range(1, 252)) * 6)[:size]
    number = line.bench.requests.keep(9, 99, 0x9A000000, (7, 7), 321, ACK, data)
    line.connect(family, None, number)
    line.send(frame(member, client, TCP, 8080, 40000, flags=SYN | ACK, seq=0xFFFFFFFF, ack=100, eth_dst=VIRTUAL_MAC,
                    eth_src=MEMBER_MAC, checksum="partial", tcp_options=LINUX))
    came = line.receive()
    seen = came.seen
    assert (seen.source, seen.destination, seen.dport, seen.payload) == (client, member, 8080, data)
    assert (seen.seq, seen.ack, seen.window, seen.flags, seen.tcp_options) == (100, 0, 321, ACK, b"")
    assert (came.gso, line.bench.requests.given(number)) == (0, True)
    assert line.bench.splice(9) == Splice(0x65FFFFFF, 0)
    line.bench.requests.release(number)


@BOTH
def test_a_host_takes_the_handshake_for_a_listeners(line: Line, family: int) -> None:
    """A real client: connected at once, all that it may send at once in one piece, and a refusal is one."""
    client, virtual, _ = FAMILIES[family]
    run = line.namespace.run
    run("ip", "addr", "add", f"{client}/{24 if family == 4 else 64}", "dev", "far", *(["nodad"] if family == 6 else []))
    run("ip", "link", "set", "far", "arp", "on")
    run("ip", "neigh", "replace", virtual, "lladdr", VIRTUAL_MAC.hex(":"), "dev", "far")
    with line.namespace.entered():
        client_socket = socket.create_connection((virtual, 80), timeout=3)
    with client_socket:
        client_socket.sendall(bytes(30_000))
        record = wait_until(line.bench.queries, 3, "a query", every=0.005)[0]
        offered = Options.of(record.options)
        assert (offered.mss, offered.sack) == (1440 if family == 6 else 1460, True) and offered.window_scale is not None
        assert 1300 < len(record.frame) - (54 if family == 4 else 74) <= layout.WINDOW
        assert line.bench.counted()["greeted"] == 1
    with line.namespace.entered():
        other = socket.create_connection((virtual, 80), timeout=3)
    with other:
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
