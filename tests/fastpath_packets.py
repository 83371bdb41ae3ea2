# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Frames for the fast path's tests, bit for bit as one wants them, and what comes out, checked from scratch.

``tables`` (a fixture; a test module names this one in ``pytest_plugins``) are loaded programs with empty maps.

PYTEST_DONT_REWRITE: what is imported as a module is imported before it is known to be a plug-in.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lbapp.control.buckets import Ration
from lbapp.dataflow.fastpath import build, kernel, layout
from lbapp.dataflow.fastpath.entries import Entry
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Hash, Mode, Service, ServiceKey, Target
from lbapp.dataflow.fastpath.tables import Tables
from lbapp.dataflow.pipeline import VIRTUAL_MAC

TCP, UDP = 6, 17
FIN, SYN, RST, ACK = 1, 2, 4, 16
SHOT, REDIRECT, PASS = 2, 7, 0
FAMILIES = {4: ("10.0.0.1", "10.0.0.100", "10.0.1.7"), 6: ("fd00::1", "fd00::100", "fd00:1::7")}
"""A client, a virtual server, a member."""
BOTH = pytest.mark.parametrize("family", [4, 6])
CLIENT_MAC, MEMBER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000007")
WIRE = 1
"""Test runs come in on the loopback interface."""
CHECKSUM_COMPLETE = 1 << 2
"""BPF_F_TEST_SKB_CHECKSUM_COMPLETE: the kernel verifies that what a card summed up stays true."""


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def entries(flows: Sequence[tuple[FlowKey, Flow]]) -> list[Entry]:
    """Connections of which both directions are told, one after the other."""
    return [Entry(key, flow, back.destination_mac, back.ifindex)
            for (key, flow), (_, back) in zip(flows[::2], flows[1::2], strict=True)]


def ones_sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) + len(data) % 2 >> 1}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!HH", protocol, length)
    return source + destination + struct.pack("!II", length, protocol)


def segment(source: str, destination: str, protocol: int = TCP, sport: int = 40000, dport: int = 80, *,
            flags: int = SYN, payload: bytes = b"", doff: int = 5, udp_length: int | None = None,
            checksum: int | str = "whole", seq: int = 1000, ack: int = 2000, window: int = 500,
            tcp_options: bytes = b"") -> bytes:
    """What follows the IP header. ``checksum``: "whole", "partial" (as offloading leaves it), or a number.

    ``tcp_options`` are filled up; without them, ``doff`` makes room for some that mean nothing.
    """
    if protocol == TCP:
        options = tcp_options + bytes(-len(tcp_options) % 4) or b"\x01" * max(0, doff * 4 - 20)
        doff = 5 + len(options) // 4 if tcp_options else doff
        body = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, doff << 4, flags, window, 0, 0) + options + payload
        place = 16
    else:
        length = 8 + len(payload) if udp_length is None else udp_length
        body = struct.pack("!HHHH", sport, dport, length, 0) + payload
        place = 6
    head = pseudo(packed(source), packed(destination), protocol, len(body))
    if checksum == "whole":
        value = ones_sum(head + body) ^ 0xFFFF
        if protocol == UDP and not value:
            value = 0xFFFF
    elif checksum == "partial":
        value = ones_sum(head)
    else:
        value = int(checksum)
    return body[:place] + struct.pack("!H", value) + body[place + 2:]


def wrap(source: str, destination: str, protocol: int, body: bytes, *, ttl: int = 64, eth_dst: bytes = VIRTUAL_MAC,
         eth_src: bytes = CLIENT_MAC, fragment: int | None = None, identification: int = 7, length: int | None = None,
         options: bytes = b"", check: int | None = None, tos: int = 0) -> bytes:
    """A frame. ``fragment``: offset in bytes, with 1 added where more follow; ``length`` in the IP header."""
    one, other = packed(source), packed(destination)
    if len(one) == 4:
        flags = 0 if fragment is None else (fragment >> 3) | (fragment & 1) << 13
        head = struct.pack("!BBHHHBBH4s4s", 0x45 + len(options) // 4, tos,
                           20 + len(options) + len(body) if length is None else length, identification, flags, ttl,
                           protocol, 0, one, other) + options
        value = ones_sum(head) ^ 0xFFFF if check is None else check
        return eth_dst + eth_src + b"\x08\x00" + head[:10] + struct.pack("!H", value) + head[12:] + body
    next_header = protocol
    if fragment is not None:
        body = struct.pack("!BBHI", protocol, 0, fragment, identification) + body
        next_header = 44
    head = struct.pack("!IHBB", 6 << 28 | tos << 20, len(body) if length is None else length, next_header, ttl)
    return eth_dst + eth_src + b"\x86\xdd" + head + one + other + options + body


def frame(source: str, destination: str, protocol: int = TCP, sport: int = 40000, dport: int = 80, *,
          flags: int = SYN, payload: bytes = b"", doff: int = 5, udp_length: int | None = None,
          checksum: int | str = "whole", seq: int = 1000, ack: int = 2000, window: int = 500,
          tcp_options: bytes = b"", **ip: Any) -> bytes:
    """A whole TCP or UDP frame; see :func:`segment` and :func:`wrap`."""
    return wrap(source, destination, protocol, segment(source, destination, protocol, sport, dport, flags=flags,
                                                       payload=payload, doff=doff, udp_length=udp_length,
                                                       checksum=checksum, seq=seq, ack=ack, window=window,
                                                       tcp_options=tcp_options), **ip)


def request(family: int = 4, flags: int = ACK, **more: Any) -> bytes:
    """A client's segment; see :func:`frame`."""
    client, virtual, _ = FAMILIES[family]
    return frame(client, virtual, flags=flags, **more)


def answer(family: int = 4, flags: int = ACK, **more: Any) -> bytes:
    """A member's; see :func:`frame`."""
    client, _, member = FAMILIES[family]
    return frame(member, client, TCP, 8080, 40000, flags=flags, eth_dst=VIRTUAL_MAC, eth_src=MEMBER_MAC, **more)


class Seen(NamedTuple):
    """A frame that came out."""

    eth_dst: bytes
    eth_src: bytes
    source: str
    destination: str
    protocol: int
    sport: int
    dport: int
    ttl: int
    flags: int
    payload: bytes
    checksum: int
    seq: int = 0
    ack: int = 0
    window: int = 0
    tcp_options: bytes = b""


def read(data: bytes, checksum: str = "whole") -> Seen:
    """Take a frame apart; all of its checksums must be right, computed anew.

    ``checksum``: what TCP's or UDP's has to be, "whole", "partial", "any".
    """
    ip = data[14:]
    if data[12:14] == b"\x08\x00":
        assert ip[0] == 0x45
        assert ones_sum(ip[:20]) == 0xFFFF, "IPv4 header checksum"
        total, protocol, ttl = struct.unpack_from("!H", ip, 2)[0], ip[9], ip[8]
        source, destination, body = ip[12:16], ip[16:20], ip[20:total]
    else:
        assert data[12:14] == b"\x86\xdd"
        length, protocol, ttl = struct.unpack_from("!HBB", ip, 4)
        source, destination, body = ip[8:24], ip[24:40], ip[40:40 + length]
        if protocol == 44:
            protocol, body = body[0], body[8:]
    sport, dport = struct.unpack_from("!HH", body)
    place = 16 if protocol == TCP else 6
    field = struct.unpack_from("!H", body, place)[0]
    head = pseudo(source, destination, protocol, len(body))
    if checksum == "whole" and (field or protocol == TCP):
        assert ones_sum(head + body) == 0xFFFF, "checksum of TCP or UDP"
    elif checksum == "partial":
        assert field == ones_sum(head), "partial checksum"
    start = (body[12] >> 4) * 4 if protocol == TCP else 8
    seq, ack, window = struct.unpack_from("!IIxxH", body, 4) if protocol == TCP else (0, 0, 0)
    return Seen(data[:6], data[6:12], str(ipaddress.ip_address(source)), str(ipaddress.ip_address(destination)),
                protocol, sport, dport, ttl, body[13] if protocol == TCP else 0, body[start:], field, seq, ack, window,
                body[20:start] if protocol == TCP else b"")


class Bench(Tables):
    """Tables with what tests ask again and again."""

    def __init__(self, pins: Path | None = None, **options: Any) -> None:
        super().__init__(build.OBJECT, pins, mac=VIRTUAL_MAC, **options)
        self._before: Counter[str] = Counter()
        self.maps["inner"].update(WIRE.to_bytes(4, "little"), WIRE.to_bytes(4, "little"))

    def reset(self) -> None:
        """Everything is empty, and counts from 0."""
        for name in ("flows", "services", "targets", "fragments", "service_stats", "wanted", "splices", "pending",
                     "doubts", "rates", "clients", "lately"):
            table = self.maps[name]
            table.delete_all([key for key, _ in table.items()])
        self.set_cookies((None, None), 0)
        self._told.clear()
        while self.closed() or self.queries():
            pass
        self._before = Counter(self.counters())

    def counted(self) -> dict[str, int]:
        """What was counted since the last call or reset, without zeros."""
        now = Counter(self.counters())
        changed = {name: now[name] - self._before[name] for name in now if now[name] != self._before[name]}
        self._before = now
        return changed

    def walk(self, data: bytes, *, checksum: str = "whole", program: str = "wire", verify: bool = True) -> Seen:
        """Let a frame walk; it must have been forwarded here (and not as a miss), and rightly."""
        hits = self.counters()["hits"]
        verdict, out, _ = kernel.run(self.programs[program], data, room=len(data) + 256)
        assert verdict == REDIRECT
        assert self.counters()["hits"] == hits + 1
        assert len(out) == len(data)
        return read(out, checksum if verify else "any")

    def miss(self, data: bytes, program: str = "wire") -> str:
        """Let a frame walk; it must have been led on into the switch untouched. Returns the reason."""
        before = Counter(self.counters())
        verdict, out, _ = kernel.run(self.programs[program], data, room=len(data) + 256)
        assert verdict == REDIRECT
        assert out == data, "a miss was touched"
        changed = [name for name, value in self.counters().items() if value != before[name]]
        reasons = [name for name in changed if name.startswith("miss_")]
        assert len(reasons) == 1 and "hits" not in changed, changed
        return reasons[0].removeprefix("miss_")

    def drop(self, data: bytes) -> dict[str, int]:
        """Let a frame walk; it must have ended here. Returns what was counted."""
        self.counted()
        assert kernel.run(self.programs["wire"], data)[0] == SHOT
        return self.counted()

    def answered(self, data: bytes, *, checksum: str = "whole") -> Seen:
        """Let a frame walk; it must have been answered, and rightly."""
        verdict, out, _ = kernel.run(self.programs["wire"], data, room=2048)
        assert verdict == REDIRECT
        return read(out, checksum)

    def connect(self, client: str, virtual: str, member: str, protocol: int = TCP, sport: int = 40000, *,
                dport: int = 80, mport: int = 8080, state: int = 0, serial: int = 1, number: int = 5,
                idle: int = 100, request: int = 0) -> layout.Result:
        """Install a connection."""
        c, v, m = packed(client), packed(virtual), packed(member)
        keep = VIRTUAL_MAC if state & layout.ROUTED else layout.KEEP_MAC
        return self.install(entries([
            (FlowKey(c, v, sport, dport, protocol),
             Flow(c, m, sport, mport, MEMBER_MAC, keep, WIRE, state, serial, number, 77, idle, request=request)),
            (FlowKey(m, c, mport, sport, protocol),
             Flow(v, c, dport, sport, CLIENT_MAC, VIRTUAL_MAC, WIRE, state | layout.OUTBOUND, serial, number, 77,
                  idle))]))[0]

    def serve(self, virtual: str, members: list[str], *, mode: Mode = Mode.DECIDE, pick: Hash = Hash.TURN,
              slots: tuple[int, ...] | None = None, protocol: int = TCP, port: int = 80, mport: int = 8080,
              routed: bool = False, number: int = 5, first: int = 1, ration: Ration | None = None) -> ServiceKey:
        """Tell of a virtual server. Members' targets are numbered from ``first``."""
        self.set_targets({first + index: Target(packed(member), mport, MEMBER_MAC[:5] + bytes([first + index]), WIRE,
                                                100 + first + index, routed) for index, member in enumerate(members)})
        key = ServiceKey(packed(virtual), port, protocol)
        table = tuple(range(first, first + len(members))) if slots is None else slots
        self.set_services({key: Service(number, mode, pick, 100, table, ration=ration)})
        return key

    def age(self, key: FlowKey, milliseconds: float) -> None:
        """Both directions of a connection were last used so long ago."""
        flow = self.lookup(key)
        assert flow is not None
        back = FlowKey(flow.destination, flow.source, flow.destination_port, flow.source_port, key.protocol)
        for one in (key, back):
            there = self.lookup(one)
            assert there is not None
            used = (there.used - layout.ticks(milliseconds)) & 0xFFFFFFFF
            self._flows.update(one.pack(), there._replace(used=used).pack(), kernel.EXIST)


def require_programs() -> None:
    """Skip only where the machine really cannot."""
    if os.geteuid() != 0:
        pytest.skip("eBPF needs root")
    try:
        build.build()
    except build.BuildError as error:
        pytest.skip(f"eBPF programs cannot be compiled: {error}")
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel has no type information for eBPF")


@pytest.fixture(scope="session")
def loaded() -> Iterator[Bench]:
    require_programs()
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture
def tables(loaded: Bench) -> Bench:
    loaded.reset()
    return loaded


def run_marked(bench: Bench, data: bytes, mark: int) -> tuple[int, bytes]:
    """Run ``again`` with a mark."""
    context = (ctypes.c_uint32 * 48)()
    context[2] = mark  # struct __sk_buff
    verdict, out, _ = kernel.run(bench.programs["again"], data, context, room=len(data) + 256)
    return verdict, out
