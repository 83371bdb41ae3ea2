# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A spliced connection between two hosts' own TCP, with loss: what the tables of the other tests add up to.

Programs: ``lbapp/dataflow/fastpath/handshake.bpf.h``, ``splice.bpf.h``. The agent's part is played by a few lines.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import (
    Ask,
    Flow,
    FlowKey,
    Hash,
    Mode,
    QueryRecord,
    Result,
    Service,
    ServiceKey,
    Splice,
)
from lbapp.dataflow.fastpath.netlink import Netlink
from lbapp.dataflow.fastpath.removal import HANDLE, PRIORITY
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import CLIENT_MAC, MEMBER_MAC, SYN, TCP, Bench, entries, frame, packed, read
from tests.namespaces import require
from topologies.namespace import Namespace, wait_until

pytest_plugins = ["tests.fastpath_packets", "tests.namespaces"]
pytestmark = pytest.mark.integration

FAMILIES = {4: ("10.0.0.1", "10.0.0.100", "10.0.0.7", "24"), 6: ("fd00::1", "fd00::100", "fd00::7", "64")}
SCALE = 9
"""Told to clients; not the member's own, so windows have to be translated."""
LOSS = "add table inet lossy; add chain inet lossy in {{ type filter hook input priority 0; }}; " \
       "add rule inet lossy in tcp dport {port} numgen inc mod {every} {last} drop"


class Site:
    """A client and a member, and in between nothing but the program ``wire`` and what its agent would do."""

    def __init__(self, bench: Bench, make: Callable[[str], Namespace]) -> None:
        self.bench = bench
        self.switch, self.client, self.member = make("switch"), make("client"), make("member")
        self.wires: list[int] = []
        self.cookie = 0
        self.trouble: list[Exception] = []
        for host, name, mac in ((self.client, "wc", CLIENT_MAC), (self.member, "wm", MEMBER_MAC)):
            self.switch.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid),
                            "address", mac.hex(":"))
            self.switch.run("ip", "link", "set", name, "up", "arp", "off")
            host.run("ip", "link", "set", "eth0", "up")
            with self.switch.entered(), Netlink() as netlink:
                self.wires.append(netlink.links()[name].ifindex)
                netlink.add_clsact(self.wires[-1])
                netlink.set_program(self.wires[-1], PRIORITY, HANDLE, bench.programs["wire"], "test")
        for client, virtual, member, length in FAMILIES.values():
            for host, own, other in ((self.client, client, virtual), (self.member, member, client)):
                host.run("ip", "addr", "add", f"{own}/{length}", "dev", "eth0", *(["nodad"] if ":" in own else []))
                host.run("ip", "neigh", "replace", other, "lladdr", VIRTUAL_MAC.hex(":"), "dev", "eth0")
        # A namespace outlives its test for a while, and its TCP repeats what was not acknowledged.
        bench.set_cookies((secrets.token_bytes(16), None), 0)
        bench.set_services({ServiceKey(packed(virtual), 80, TCP): Service(5, Mode.PROXY, Hash.TURN, 100, (), 1400,
                                                                         SCALE, True)
                            for _, virtual, _, _ in FAMILIES.values()})

    @staticmethod
    def count(host: Namespace, group: str, name: str) -> int:
        """What a host's TCP has counted."""
        text = "".join(Path(f"/proc/{host.pid}/net/{file}").read_text(encoding="ascii") for file in ("snmp", "netstat"))
        names, values = (line.split()[1:] for line in text.splitlines() if line.startswith(f"{group}: "))
        return int(values[names.index(name)])

    def state(self) -> str:
        """For a message: what there is and what has happened."""
        lines = [repr(self.trouble), repr(self.bench.counted()), repr(self.bench.splice(9)),
                 repr(self.bench.flows(10))]
        for host in (self.client, self.member):
            lines += [host.run("ss", "-tin").stdout, repr([(name, self.count(host, "TcpExt", name)) for name in (
                "TCPTimeouts", "TCPSackRecovery", "TCPSACKDiscard", "TCPChallengeACK", "TCPOFODrop")])]
        return "\n".join(lines)

    @contextmanager
    def agent(self, family: int) -> Iterator[None]:
        """Answers what comes up the ring, for as long as the block lasts."""
        over = threading.Event()
        with self.switch.entered():
            to_member = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            to_member.bind(("wm", 0))

        def work() -> None:
            try:
                while not over.is_set():
                    for record in self.bench.queries():
                        self._take(record, FAMILIES[family], to_member)
                    time.sleep(0.001)
            except Exception as error:  # told of with everything else that is known
                self.trouble.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            to_member.close()

    def _take(self, record: QueryRecord, names: tuple[str, str, str, str], to_member: socket.socket) -> None:
        client, virtual, member, _ = names
        seen = read(record.frame, "any")
        key = FlowKey(packed(client), packed(virtual), seen.sport, 80, TCP)
        if record.kind == Ask.DATA and self.bench.lookup(key) is None:
            self.cookie = seen.ack - 1 & 0xFFFFFFFF
            entered = self.bench.install(entries([
                (key, Flow(key.source, packed(member), seen.sport, 80, MEMBER_MAC, layout.KEEP_MAC, self.wires[1],
                           layout.SPLICE, 9, 5, 77, 100)),
                (FlowKey(packed(member), key.source, 80, seen.sport, TCP),
                 Flow(key.destination, key.source, 80, seen.sport, CLIENT_MAC, VIRTUAL_MAC, self.wires[0],
                      layout.SPLICE | layout.OUTBOUND, 9, 5, 77, 100))]))
            assert entered == [Result.OPENED]
            self.bench.forget_pending([key])
            offered = Options.of(record.options)
            assert offered.sack and offered.window_scale is not None
            to_member.send(frame(client, member, TCP, seen.sport, 80, flags=SYN, seq=seen.seq - 1 & 0xFFFFFFFF, ack=0,
                                 window=64_240, eth_dst=MEMBER_MAC, eth_src=CLIENT_MAC, tcp_options=struct.pack(
                                     "!BBHBBBBBBBB", 2, 4, offered.mss, 4, 2, 1, 1, 1, 3, 3, offered.window_scale)))
        elif record.kind == Ask.MEMBER and seen.flags & SYN:
            scale = seen.tcp_options[seen.tcp_options.index(b"\x03\x03") + 2]
            self.bench.set_splices({9: Splice(seen.seq - self.cookie & 0xFFFFFFFF, scale - SCALE)})

    @contextmanager
    def listen(self, family: int, size: int) -> Iterator[None]:
        """The member's: gets so much, tells its digest, then sends it back."""
        with self.member.entered():
            listener = socket.create_server((FAMILIES[family][2], 80), family=_family(family))

        def work() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                data = _read(connection, size)
                connection.sendall(hashlib.sha256(data).digest() + data)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.close()
            thread.join(20)


def _family(family: int) -> socket.AddressFamily:
    return socket.AF_INET if family == 4 else socket.AF_INET6


def _read(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size and (some := connection.recv(1 << 20)):
        found += some
    return bytes(found)


@pytest.fixture
def site(tables: Bench, netns: Callable[[str], Namespace]) -> Iterator[Site]:
    """Its wires go with it: what a namespace still says would be counted among the next test's."""
    require("nft", "ethtool")
    made = Site(tables, netns)
    yield made
    with made.switch.entered(), Netlink() as netlink:
        for wire in made.wires:
            netlink.delete(wire)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("every", "segments"), [(0, True), (15, True), (50, False)],
                         ids=["no loss", "loss", "loss, no offload"])
def test_bulk_both_ways(site: Site, family: int, every: int, segments: bool) -> None:
    """Byte for byte, and no host meets a SACK block that is none of its own (without their translation: thousands)."""
    data = bytes(range(251)) * 16_000
    if not segments:
        for host in (site.client, site.member):
            host.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off", "gro", "off", "tx", "off")
    with site.listen(family, len(data)), site.agent(family):
        with site.client.entered():
            client = socket.create_connection((FAMILIES[family][1], 80), timeout=20)
        with client:
            for host, port in ((site.client, client.getsockname()[1]), (site.member, 80)):
                if every:
                    host.run("nft", LOSS.format(port=port, every=every, last=every - 1))
            began = time.monotonic()
            try:
                client.sendall(data)
                answer = _read(client, 32 + len(data))
            except OSError:
                pytest.fail(site.state())
            took = time.monotonic() - began
        hosts = (site.client, site.member)
        if every:
            for host in hosts:
                assert site.count(host, "TcpExt", "TCPSackRecovery") > 0, "nothing was lost: nothing was tested"
        assert [site.count(host, "TcpExt", "TCPSACKDiscard") for host in hosts] == [0, 0]
        assert answer[:32] == hashlib.sha256(data).digest() and answer[32:] == data
        assert took < 15 and site.trouble == []
        (told,) = wait_until(site.bench.closed, 15, "its end")
    assert (told.serial, told.reason) == (9, layout.Reason.SHUTDOWN)
    assert told.bytes_in > len(data) and told.bytes_out > len(data)
