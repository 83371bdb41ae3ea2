# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path on real interfaces: offloaded checksums, where frames go, and what is left behind.

``lbapp.dataflow.fastpath.fastpath``, with a bridge that is a learning switch and no controller.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import kernel, layout
from lbapp.dataflow.fastpath.fastpath import FastPath, FastPathUnavailable, remove
from lbapp.dataflow.fastpath.injector import pair
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Hash, Mode, Service, ServiceKey, Target
from lbapp.dataflow.ovs import Ovs, PrivateOvs
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import ACK, TCP, UDP, entries, frame, packed, read, require_programs
from tests.namespaces import require
from topologies.namespace import Namespace, wait_until

pytestmark = pytest.mark.integration

BRIDGE = "br0"
CLIENT, MEMBER, VIRTUAL = "10.9.0.1", "10.9.0.2", "10.9.0.100"
CLIENT6, MEMBER6, VIRTUAL6 = "fd09::1", "fd09::2", "fd09::100"
MACS = [bytes([2, 0, 0, 0, 9, number]) for number in (1, 2)]
PORT = 7000
SOL_PACKET, PACKET_VNET_HDR = 263, 15


class Site:
    """A bridge and two hosts, each in a namespace of its own."""

    def __init__(self, directory: Path, cleanup: ExitStack) -> None:
        self.root = Namespace.create("switch")
        cleanup.callback(self.root.close)
        self.hosts: list[Namespace] = []
        self.ovs = PrivateOvs(directory, self.root.prefix)
        cleanup.callback(self.ovs.stop)
        self.ovs.ensure_running()
        self.ovs.add_bridge(BRIDGE)
        self.ovs.ofctl("add-flow", BRIDGE, "priority=0,actions=NORMAL")
        for index, (four, six) in enumerate(((CLIENT, CLIENT6), (MEMBER, MEMBER6))):
            host = Namespace.create(f"h{index + 1}")
            cleanup.callback(host.close)
            self.hosts.append(host)
            self.root.run("ip", "link", "add", f"w{index + 1}", "type", "veth", "peer", "name", "eth0", "netns",
                          str(host.pid), "address", MACS[index].hex(":"))
            self.root.run("ip", "link", "set", f"w{index + 1}", "up")
            host.run("ip", "addr", "add", f"{four}/24", "dev", "eth0")
            host.run("ip", "addr", "add", f"{six}/64", "dev", "eth0", "nodad")
            host.run("ip", "link", "set", "eth0", "up")
            for address in (VIRTUAL, VIRTUAL6):
                host.run("ip", "neigh", "replace", address, "lladdr", VIRTUAL_MAC.hex(":"), "dev", "eth0")
            self.ovs.add_port(BRIDGE, f"w{index + 1}", index + 1)

    @contextmanager
    def fastpath(self, **options: Any) -> Iterator[FastPath]:
        with self.root.entered():
            made = FastPath.open(self.ovs, BRIDGE, **{"max_connections": 1000, **options})
            try:
                yield made
            finally:
                made.close()

    def serve(self, fastpath: FastPath, mode: Mode) -> None:
        wire = fastpath.ports[2]
        for number, (virtual, member) in enumerate(((VIRTUAL, MEMBER), (VIRTUAL6, MEMBER6)), 1):
            fastpath.set_targets({number: Target(packed(member), PORT, MACS[1], wire.ifindex, 50 + number)})
            fastpath.set_services({ServiceKey(packed(virtual), 80, protocol): Service(
                number, mode, Hash.TURN, 60, (number,)) for protocol in (TCP, UDP)})

    def flows(self, fastpath: FastPath, data: bytes) -> list[tuple[FlowKey, Flow]]:
        """The connection that a query asks for."""
        one = frames.parse(data).signature
        member = packed(MEMBER if len(one.source) == 4 else MEMBER6)
        return [(FlowKey(one.source, one.destination, one.source_port, one.destination_port, one.protocol),
                 Flow(one.source, member, one.source_port, PORT, MACS[1], layout.KEEP_MAC, fastpath.ports[2].ifindex, 0,
                      9, 1, 51, 60)),
                (FlowKey(member, one.source, PORT, one.source_port, one.protocol),
                 Flow(one.destination, one.source, one.destination_port, one.source_port, MACS[0], VIRTUAL_MAC,
                      fastpath.ports[1].ifindex, layout.OUTBOUND, 9, 1, 51, 60))]

    def syns_again(self) -> int:
        """How many SYNs the client has sent once more, because nobody answered."""
        text = Path(f"/proc/{self.hosts[0].pid}/net/netstat").read_text(encoding="ascii")
        names, values = (line.split() for line in text.splitlines() if line.startswith("TcpExt: "))
        return int(values[names.index("TCPSynRetrans")])

    def inside(self, host: int, make: Callable[[], socket.socket]) -> socket.socket:
        with self.hosts[host].entered():
            return make()

    @contextmanager
    def listen(self, address: str) -> Iterator[None]:
        """The member's: echoes a digest of what it got, then what it got."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = self.inside(1, lambda: socket.create_server((address, PORT), family=family))

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
            thread.join()
            listener.close()

    @staticmethod
    def _answer(connection: socket.socket) -> None:
        with connection:
            data = b""
            while some := connection.recv(1 << 20):
                data += some
            connection.sendall(hashlib.sha256(data).digest() + data)

    def exchange(self, virtual: str, size: int, pause: Callable[[], None] = lambda: None) -> None:
        """Send so much to the virtual server and get it back, whole."""
        family = socket.AF_INET6 if ":" in virtual else socket.AF_INET
        with self.inside(0, lambda: socket.socket(family, socket.SOCK_STREAM)) as client:
            client.settimeout(10)
            client.connect((virtual, 80))
            data = bytes(range(251)) * (size // 251 + 1)
            client.sendall(data[:len(data) // 2])
            pause()
            client.sendall(data[len(data) // 2:])
            client.shutdown(socket.SHUT_WR)
            got = bytearray()
            while some := client.recv(1 << 20):
                got += some
        assert bytes(got[:32]) == hashlib.sha256(data).digest()
        assert bytes(got[32:]) == data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require("ovs-vswitchd", "ovsdb-server", "ovs-vsctl")
    require_programs()
    with ExitStack() as cleanup:
        yield Site(tmp_path_factory.mktemp("wire"), cleanup)


@pytest.mark.parametrize(("virtual", "member"), [(VIRTUAL, MEMBER), (VIRTUAL6, MEMBER6)], ids=["ipv4", "ipv6"])
def test_decided_here_nothing_reaches_the_switch(site: Site, virtual: str, member: str) -> None:
    """Offloaded frames both ways, many times the MTU, and only what is no packet of ours is a miss."""
    with site.fastpath() as fastpath, site.listen(member):
        site.serve(fastpath, Mode.DECIDE)
        before = fastpath.counters()
        site.exchange(virtual, 8_000_000)
        found = wait_until(fastpath.closed, 5, "a record of its end")
        counted = fastpath.counters()
        assert counted["hits"] - before["hits"] > 200
        assert counted["miss_flow"] == before["miss_flow"] and counted["miss_malformed"] == before["miss_malformed"]
        assert counted["shot"] == 0
        (record,) = found
        assert record.reason == layout.Reason.SHUTDOWN and record.virtual_server in (1, 2)
        assert record.bytes_in > 8_000_000 and record.bytes_out > 8_000_000
        # Whole frames of many segments: no offload was lost on the way.
        assert (record.bytes_in + record.bytes_out) / (record.packets_in + record.packets_out) > 3000


@pytest.mark.parametrize(("virtual", "member"), [(VIRTUAL, MEMBER), (VIRTUAL6, MEMBER6)], ids=["ipv4", "ipv6"])
def test_asked_about_then_sent_once_more(site: Site, virtual: str, member: str) -> None:
    """PUNT, install, inject: the client notices nothing."""
    with site.fastpath() as fastpath, site.listen(member):
        site.serve(fastpath, Mode.PUNT)
        done = threading.Event()

        def agent() -> None:
            with site.root.entered():
                while not done.is_set():
                    for one in fastpath.queries():
                        whole = frames.with_checksum(one.frame, frames.parse(one.frame))
                        assert fastpath.install(entries(site.flows(fastpath, whole))) == [layout.Result.OPENED]
                        assert fastpath.inject(one.ifindex, whole)
                    time.sleep(0.001)

        thread = threading.Thread(target=agent)
        thread.start()
        try:
            before = site.syns_again()
            site.exchange(virtual, 100_000)
            assert site.syns_again() == before, "the first packet was lost"
        finally:
            done.set()
            thread.join()
        assert fastpath.counters()["queries"] == 1
        ((_, traffic),) = fastpath.service_stats().items()
        assert (traffic.opened, traffic.closed) == (1, 1)


@pytest.mark.parametrize(("client", "virtual", "member"), [(CLIENT, VIRTUAL, MEMBER), (CLIENT6, VIRTUAL6, MEMBER6)],
                         ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
def test_a_partial_checksum_stays_partial(site: Site, client: str, virtual: str, member: str, protocol: int) -> None:
    """What the receiver's stack would never verify: the field has to be the new pseudo-header's sum."""
    with site.fastpath() as fastpath:
        site.serve(fastpath, Mode.DECIDE)
        watcher = site.inside(1, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        with watcher:
            watcher.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            watcher.bind(("eth0", 3))
            watcher.settimeout(3)
            family = socket.AF_INET6 if ":" in client else socket.AF_INET
            kind = socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
            with site.inside(0, lambda: socket.socket(family, kind)) as sender:
                sender.setblocking(False)
                sender.connect_ex((virtual, 80))
                if protocol == UDP:
                    sender.send(b"datagram")
                while True:
                    data = watcher.recv(65535)
                    header, data = data[:10], data[10:]
                    if data[:6] == MACS[1] and packed(member) in data[14:54] and data[:12] != bytes(12):
                        try:
                            seen = read(data, "any")
                        except (AssertionError, struct.error):
                            continue
                        if (seen.destination, seen.dport) == (member, PORT):
                            break
        assert header[0] & 1, "the sender's stack left no partial checksum: nothing was tested"
        read(data, "partial")
        assert seen.eth_src == MACS[0]


def test_a_frame_sent_once_more_that_is_a_miss_goes_into_the_switch(site: Site) -> None:
    with site.fastpath() as fastpath, site.inside(1, lambda: socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
        receiver.bind((MEMBER, 9999))
        receiver.settimeout(3)
        data = frame(CLIENT, MEMBER, UDP, 1234, 9999, payload=b"by way of the bridge", eth_dst=MACS[1],
                     eth_src=MACS[0])
        assert fastpath.inject(fastpath.ports[1].ifindex, data)
        assert receiver.recv(100) == b"by way of the bridge"
        assert fastpath.counters()["hits"] == 0


def test_a_frame_out_on_a_wire(site: Site) -> None:
    with site.fastpath() as fastpath, site.inside(0, lambda: socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
        receiver.bind((CLIENT, 9998))
        receiver.settimeout(3)
        data = frame(VIRTUAL, CLIENT, UDP, 80, 9998, payload=b"refused", eth_dst=MACS[0], eth_src=VIRTUAL_MAC)
        assert fastpath.send(fastpath.ports[1].ifindex, data)
        assert receiver.recv(100) == b"refused"
        assert not fastpath.send(54321, data)
        assert not fastpath.send(fastpath.ports[1].ifindex, bytes(70_000))
        assert fastpath.send(fastpath.ports[1].ifindex, data)
        assert receiver.recv(100) == b"refused"


def test_a_tagged_frame_goes_into_the_switch(site: Site) -> None:
    """The kernel takes the tag out of the frame before the program sees it."""
    with site.fastpath() as fastpath:
        site.serve(fastpath, Mode.DECIDE)
        plain = frame(CLIENT, VIRTUAL, eth_src=MACS[0])
        tagged = plain[:12] + b"\x81\x00\x00\x05" + plain[12:]
        with site.inside(0, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as sender:
            sender.bind(("eth0", 0))
            sender.send(tagged)
        wait_until(lambda: fastpath.counters()["miss_vlan"] == 1, 3, "a miss")
        assert fastpath.counters()["opened_here"] == 0


def test_another_process_takes_over_under_load(site: Site) -> None:
    """Established connections go on without an agent, and with the next one."""
    with site.root.entered():
        first = FastPath.open(site.ovs, BRIDGE, max_connections=1000)
    opened: list[FastPath] = []

    def exchange_agents() -> None:
        first.close(keep=True)
        time.sleep(0.1)
        with site.root.entered():
            opened.append(FastPath.open(site.ovs, BRIDGE, max_connections=1000))

    with site.listen(MEMBER), site.root.entered():
        try:
            site.serve(first, Mode.DECIDE)
            site.exchange(VIRTUAL, 3_000_000, exchange_agents)
            assert opened[0].adopted and opened[0].services()
            assert [one.member for one in opened[0].closed()] == [51]
        finally:
            for fastpath in opened:
                fastpath.close()


def test_nothing_is_left_behind(site: Site) -> None:
    def pins() -> list[str]:
        """Of this namespace alone: other tests at the same time have theirs."""
        namespace = Path(f"/proc/{site.root.pid}/ns/net").stat().st_ino
        return sorted(map(str, (kernel.BPFFS / "lbapp").glob(f"*-{namespace:x}/*")))

    def everything() -> list[str]:
        names = sorted(line.split(":")[1].strip().split("@")[0]
                       for line in site.root.run("ip", "-o", "link").stdout.splitlines())
        return [*names, site.root.run("tc", "filter", "show", "dev", "w1", "ingress").stdout, *pins()]

    before = everything()
    with site.fastpath() as fastpath:
        assert sorted(fastpath.ports) == [1, 2]
        assert fastpath.port_of(fastpath.ports[2].ifindex) == 2 and fastpath.port_of(1) is None
        assert set(pair(BRIDGE)) < set(everything()) and pins()
    assert everything() == before
    with site.root.entered():
        FastPath.open(site.ovs, BRIDGE, max_connections=1000).close(keep=True)
        assert everything() != before
        assert sorted(remove(site.ovs, BRIDGE)) == ["w1", "w2"]
    assert everything() == before


def test_a_pair_that_somebody_removed_is_made_anew(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """By which the agent sends; until it looks, what it sends is lost."""
    data = frame(CLIENT, VIRTUAL)
    with site.fastpath() as fastpath:
        wire = fastpath.ports[2].ifindex
        site.root.run("ip", "link", "del", pair(BRIDGE)[0])
        assert not fastpath.inject(wire, data) and not fastpath.send(wire, data)
        fastpath.sync_ports()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert fastpath.door and fastpath.inject(wire, data) and fastpath.send(wire, data)
        fastpath.sync_ports()
        assert len(caplog.records) == 1, "it is there"


def test_connections_through_a_port_that_went_are_deleted(site: Site) -> None:
    with site.fastpath() as fastpath:
        data = frame(CLIENT, VIRTUAL, flags=ACK)
        assert fastpath.install(entries(site.flows(fastpath, data))) == [layout.Result.OPENED]
        assert fastpath.sync_ports().removed == {}
        site.ovs.vsctl("del-port", BRIDGE, "w2")
        try:
            assert set(fastpath.sync_ports().removed) == {2}
            assert fastpath.flows(10) == []
            assert [one.reason for one in fastpath.closed()] == [layout.Reason.DELETED]
        finally:
            site.ovs.add_port(BRIDGE, "w2", 2)
            assert set(fastpath.sync_ports().added) == {2}


def test_why_there_is_none(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.root.entered(), pytest.raises(FastPathUnavailable, match="nowhere"):
        FastPath.open(site.ovs, "nowhere")
    with site.root.entered(), pytest.raises(FastPathUnavailable):
        FastPath.open(Ovs(tmp_path), BRIDGE)
    with site.root.entered(), pytest.raises(FastPathUnavailable, match="no eBPF"):
        FastPath.open(site.ovs, BRIDGE, bpffs=tmp_path / "missing" / "bpf")
    monkeypatch.setattr("lbapp.dataflow.fastpath.kernel._LIBRARIES", ("libbpf.so.none",))
    monkeypatch.setattr("lbapp.dataflow.fastpath.kernel._loaded", [])
    with site.root.entered(), pytest.raises(FastPathUnavailable, match="libbpf1"):
        FastPath.open(site.ovs, BRIDGE)
