# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client and a member that are played, a fast path that remembers, a clock that is told: what the tests of
:mod:`lbapp.dataflow.proxy` have in common. Asserts nothing but that frames are whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lbapp.control.messages import AppQuery, AppReply, Binding, Edit, Error, Host, Query, Refused, Reply, Translation
from lbapp.dataflow import frames
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.entries import Departure, Entry, Syn
from lbapp.dataflow.fastpath.requests import Requests, State
from lbapp.dataflow.frames import ACK, SYN, Segment
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.dataflow.proxy import Proxy

SYN_ACK = b"\x02\x04\x05\x8c\x01\x01\x04\x02\x01\x03\x03\x09"
SWITCH, SERVICE = 5, 7
CLIENT, VIP, MEMBERS = (bytes((10, 0, 0, 1)), 40000), (bytes((10, 0, 0, 100)), 80), {
    3: (bytes((10, 0, 0, 13)), 8080), 4: (bytes((10, 0, 0, 14)), 8080)}
CLIENT_MAC, MEMBER_MAC = bytes((10, 0, 0, 0, 0, 1)), bytes((10, 0, 0, 0, 0, 3))
CLIENT_WIRE, MEMBER_WIRE = 101, 104
ISN, COOKIE, MEMBER_ISN = 0xFFFFFFF0, 0x9A000001, 0xFFFF0000
REQUEST = b"GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"
OPTIONS = Options(1460, 7, True)


class Wire(NamedTuple):
    ifindex: int


def places(count: int) -> tuple[Requests, bytearray]:
    """So many, and their memory; what is taken back is, for no program comes between."""
    memory = bytearray(count * layout.REQUEST_SIZE)

    def revoke(index: int) -> int:
        was, memory[index * layout.REQUEST_SIZE] = memory[index * layout.REQUEST_SIZE], State.NONE
        return was

    return Requests(memory, revoke), memory


class FakeFastPath:
    """With a ``door``, what is to go with a connection goes as it is entered; else it is left to the proxy."""

    def __init__(self, door: bool) -> None:
        self.door = door
        self.ports = {1: Wire(CLIENT_WIRE), 4: Wire(MEMBER_WIRE)}
        self.room = layout.Result.OPENED
        self.installed: list[Entry] = []
        self.splices: dict[int, layout.Splice] = {}
        self.closed: list[layout.FlowKey] = []
        self.injected: list[tuple[int, bytes]] = []
        self.soon: list[bool] = []
        self.sent: list[tuple[int, bytes]] = []
        self.pending_forgotten: list[layout.FlowKey] = []
        self.with_places(0)

    def with_places(self, count: int) -> None:
        """So many clients' first data can be kept for members' SYN-ACKs."""
        self.requests, self.memory = places(count)

    def give(self, number: int) -> tuple[int, bytes]:
        """A member's SYN-ACK came, and took what was kept: of which connection, and what."""
        at = (number - 1) * layout.REQUEST_SIZE
        state, serial, *_, size, _, _, _ = layout.REQUEST.unpack_from(self.memory, at)
        assert state == State.WAITING
        self.memory[at] = State.GIVEN
        data = at + layout.REQUEST.size
        return serial, bytes(self.memory[data:data + size])

    def port_of(self, ifindex: int) -> int | None:
        return next((number for number, wire in self.ports.items() if wire.ifindex == ifindex), None)

    def install(self, entries: Sequence[Entry]) -> list[layout.Result]:
        self.installed += entries
        if self.room is not layout.Result.OPENED or not self.door:
            return [self.room] * len(entries)
        for one in entries:
            goes = one.departure
            if isinstance(goes, Syn):
                self.send(MEMBER_WIRE, frames.tcp(MEMBER_MAC, CLIENT_MAC, CLIENT, MEMBERS[one.flow.member],
                                                  Segment(goes.isn, 0, SYN, 64_240, goes.options, b"")))
            elif goes is not None:
                self.inject(goes.ifindex, goes.frame, soon=True)
        return [layout.Result.OPENED if one.departure is None else layout.Result.GONE for one in entries]

    def lookup(self, key: layout.FlowKey) -> layout.Flow | None:
        return None if key in self.closed else next(
            (one.flow for one in self.installed if one.key == key), None)

    def set_splices(self, splices: dict[int, layout.Splice]) -> None:
        self.splices.update(splices)

    def close_flow(self, key: layout.FlowKey) -> None:
        self.closed.append(key)

    def forget_pending(self, keys: Sequence[layout.FlowKey]) -> None:
        self.pending_forgotten += keys

    def inject(self, ifindex: int, frame: bytes, soon: bool = False) -> bool:
        self.injected.append((ifindex, frame))
        self.soon.append(soon)
        return True

    def send(self, ifindex: int, frame: bytes) -> bool:
        self.sent.append((ifindex, frame))
        return True


class World:
    """The proxy, and both ends of a connection."""

    def __init__(self, door: bool = False) -> None:
        self.fast, self.counters = FakeFastPath(door), Counter[str]()
        self.greeting: Greeting | None = Greeting(seconds=10.0)
        self.proxy = Proxy(self.fast, SWITCH, itertools.count(101, 2), self.entry, lambda _: self.greeting,
                           self.counters)
        self.states: list[int] = []
        self.requests: list[int] = []

    def entry(self, reply: Reply, state: int, request: int, departure: Departure | None) -> Entry | None:
        self.states.append(state)
        self.requests.append(request)
        if reply.translation is None or reply.translation.host.port not in self.fast.ports:
            return None
        address, port = MEMBERS[reply.member]
        return Entry(layout.FlowKey(CLIENT[0], VIP[0], CLIENT[1], VIP[1], 6),
                     layout.Flow(CLIENT[0], address, CLIENT[1], port, MEMBER_MAC, layout.KEEP_MAC, MEMBER_WIRE, state,
                                 reply.query.serial, SERVICE, reply.member, 60, request=request),
                     CLIENT_MAC, CLIENT_WIRE, departure)

    def client(self, at: int = 0, payload: bytes = b"", flags: int = ACK, *, kind: int | None = None,
               now: float = 0.0, ack: int = COOKIE + 1, options: Options = OPTIONS,
               isn: int = ISN) -> AppQuery | None:
        """The client sends, from that offset of its data."""
        frame = frames.tcp(VIRTUAL_MAC, CLIENT_MAC, CLIENT, VIP, Segment(isn + 1 + at, ack, flags, 500, b"", payload))
        if kind is None:
            kind = layout.Ask.LATER if at or not payload else layout.Ask.DATA
        self.proxy.from_client(layout.QueryRecord(CLIENT_WIRE, SERVICE, frame, kind, options.pack()), now)
        return self.asked(now)

    def asked(self, now: float) -> AppQuery | None:
        questions = self.proxy.flush(now)
        assert len(questions) <= 1
        return questions[0] if questions else None

    def member(self, ack: int, flags: int = ACK, payload: bytes = b"", *, member: int = 3, seq: int = MEMBER_ISN,
               options: bytes = b"", now: float = 0.0) -> AppQuery | None:
        """The member sends; ``ack`` counts from the client's initial sequence number."""
        frame = frames.tcp(VIRTUAL_MAC, MEMBER_MAC, MEMBERS[member], CLIENT,
                           Segment(seq, ISN + ack, flags, 500, options, payload))
        self.proxy.from_member(layout.QueryRecord(MEMBER_WIRE, SERVICE, frame, layout.Ask.MEMBER, 0), now)
        return self.asked(now)

    def answer(self, query: Query, member: int = 3, binding: Binding = Binding.SPLICE, port: int = 4,
               now: float = 0.0) -> list[Refused]:
        address, number = MEMBERS[member]
        return self.proxy.reply([AppReply(query, Reply(query, Error.OK, member, Translation(
            address, number, Host(MEMBER_MAC, port))), binding)], now)

    def change(self, query: Query, edit: Edit, member: int = 3, now: float = 0.0) -> list[Refused]:
        address, number = MEMBERS[member]
        return self.proxy.reply([AppReply(query, Reply(query, Error.OK, member, Translation(
            address, number, Host(MEMBER_MAC, 4))), edit=edit)], now)

    def more(self, query: Query, now: float = 0.0) -> None:
        assert self.proxy.reply([AppReply(query)], now) == []

    def to_client(self) -> list[Segment]:
        return self._sent(CLIENT_WIRE, VIP, CLIENT, CLIENT_MAC)

    def to_member(self, member: int = 3) -> list[Segment]:
        return self._sent(MEMBER_WIRE, CLIENT, MEMBERS[member], MEMBER_MAC)

    def _sent(self, wire: int, source: tuple[bytes, int], destination: tuple[bytes, int], mac: bytes) -> list[Segment]:
        there, self.fast.sent = [frame for where, frame in self.fast.sent if where == wire], [
            one for one in self.fast.sent if one[0] != wire]
        found = []
        for frame in there:
            packet = frames.parse(frame)
            assert frames.with_checksum(frame, packet) == frame
            assert frame[:6] == mac
            assert packet.signature.five[:4] == (*source, *destination)
            found.append(frames.segment(frame, packet))
        return found
