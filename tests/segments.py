# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a host saw of one TCP connection, and what is wrong with it.

    parse      a frame as captured, to a segment; its checksums are computed anew
    View       one connection as one of its ends saw it, segment by segment; ``faults`` says what no TCP may do
    compare    the same connection at both ends: the same bytes, the same windows

Knows nothing of the load balancer but that it may give the member's numbers another beginning. Sockets and clocks are
none of its business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

FIN, SYN, RST, ACK = 1, 2, 4, 16
END, NOP, MSS, SCALE, SACK_PERMITTED, SACK, TIMESTAMPS = 0, 1, 2, 3, 4, 5, 8
_HALF, _WHOLE = 1 << 31, 1 << 32
FAULTS_MOST = 20


class Segment(NamedTuple):
    """A TCP segment.

    Attributes:
        sent: by the host where it was seen; else it came in.
        source, destination: packed addresses.
        wrong: what is wrong with it by itself.
    """

    sent: bool
    source: bytes
    destination: bytes
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    options: bytes
    payload: bytes
    wrong: tuple[str, ...] = ()


def _whole(data: bytes) -> bool:
    """Whether the ones' complement sum of 16-bit words, checksum included, is what it has to be (RFC 1071)."""
    return int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF == 0


def parse(frame: bytes, sent: bool) -> Segment | None:
    """Take a frame apart; None where it is no TCP over IPv4, or over IPv6 without extension headers."""
    wrong = []
    kind, ip = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and len(ip) >= 20 and ip[9] == 6:
        size = 4 * (ip[0] & 15)
        total = int.from_bytes(ip[2:4], "big")
        if not _whole(ip[:size]):
            wrong.append("the IPv4 header's checksum is wrong")
        if int.from_bytes(ip[6:8], "big") & 0x3FFF:
            wrong.append("a fragment")
        source, destination, body = ip[12:16], ip[16:20], ip[size:total]
        pseudo = source + destination + struct.pack("!HH", 6, len(body))
    elif kind == b"\x86\xdd" and len(ip) >= 40 and ip[6] == 6:
        total = 40 + int.from_bytes(ip[4:6], "big")
        source, destination, body = ip[8:24], ip[24:40], ip[40:total]
        pseudo = source + destination + struct.pack("!II", len(body), 6)
    else:
        return None
    if len(ip) < total or len(body) < 20 or not 20 <= (head := 4 * (body[12] >> 4)) <= len(body):
        return Segment(sent, source, destination, 0, 0, 0, 0, 0, 0, b"", b"", (*wrong, "cut short"))
    if not _whole(pseudo + body):
        wrong.append("the TCP checksum is wrong")
    sport, dport, seq, ack, _, flags, window = struct.unpack_from("!HHIIBBH", body)
    return Segment(sent, source, destination, sport, dport, seq, ack, flags, window, body[20:head], body[head:],
                   tuple(wrong))


def options(packed: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each TCP option.

    Raises:
        ValueError: they are malformed.
    """
    at = 0
    while at < len(packed) and packed[at] != END:
        if packed[at] == NOP:
            at += 1
            continue
        size = packed[at + 1] if at + 1 < len(packed) else 0
        if size < 2 or at + size > len(packed):
            raise ValueError("TCP options that do not agree with their length")
        yield packed[at], packed[at + 2:at + size]
        at += size


@dataclass
class Way:
    """One direction of a connection, in numbers relative to its sender's initial one (the first byte has 1).

    Attributes:
        isn, mss, scale, sack, timestamps: what its sender's SYN said.
        stream: the bytes, as far as there is no gap.
        fin: the FIN's number.
        high: behind the highest number that was seen.
        acked: what the receiver has acknowledged.
        edge, offered: behind the highest number that the receiver has ever allowed, and has allowed first.
        windows: by what it acknowledged, the windows (bytes) that the receiver has given for this direction.
        ahead: what is still behind a gap, by its number.
        blocks: how many SACK blocks told of it.
    """

    isn: int | None = None
    mss: int = 536
    scale: int | None = None
    sack: bool = False
    timestamps: bool = False
    stream: bytearray = field(default_factory=bytearray)
    fin: int | None = None
    high: int = 0
    acked: int = 0
    edge: int = 0
    offered: int = 0
    windows: dict[int, set[int]] = field(default_factory=dict)
    ahead: dict[int, bytes] = field(default_factory=dict)
    blocks: int = 0

    @property
    def next(self) -> int:
        """The number that comes next, a FIN counted only if all before it is there."""
        behind = len(self.stream) + 1
        return behind + 1 if self.fin == behind else behind

    def number(self, absolute: int, near: int) -> int:
        """A sequence number of the wire as a relative one that does not wrap, the nearest to ``near``."""
        assert self.isn is not None
        return near + (absolute - self.isn - near + _HALF) % _WHOLE - _HALF

    def opened(self) -> Way:
        """Another one that begins the same."""
        return Way(self.isn, self.mss, self.scale, self.sack, self.timestamps, high=1, acked=1, edge=self.offered)


class View:
    """One connection as one of its ends saw it.

    Args:
        name: for the texts of faults.
        client: the client's packed address and port: tells the directions apart.
        opening: where this end sees no handshake (handoff), the view of the one that does.
        lossy: the wire loses and reorders; gaps may be there as long as they are filled.
    """

    def __init__(self, name: str, client: tuple[bytes, int], opening: View | None = None, lossy: bool = False) -> None:
        self.name = name
        self.faults: list[str] = []
        self.count = 0
        self._client = client
        self._lossy = lossy
        self._adopted = opening is not None
        self.up: Way = opening.up.opened() if opening else Way()
        self.down: Way = opening.down.opened() if opening else Way()

    def add(self, segments: Iterable[Segment]) -> None:
        """Look at segments, in the order in which they were seen; those of other connections are left out."""
        for one in segments:
            if self._client in ((one.source, one.sport), (one.destination, one.dport)):
                self.count += 1
                self._take(one)

    @property
    def ended(self) -> bool:
        """Both sides have finished, and know it of each other."""
        return all(way.fin is not None and way.next == way.fin + 1 == way.acked for way in (self.up, self.down))

    def close(self) -> list[str]:
        """All faults, those included that only the end shows."""
        for word, way in (("client's", self.up), ("member's", self.down)):
            if way.isn is None:
                self._fault(f"the {word} handshake was not seen")
            elif way.ahead:
                self._fault(f"a gap in the {word} numbers at {way.next} was never filled")
            elif way.fin is None:
                self._fault(f"the {word} FIN was not seen")
            elif way.acked != way.fin + 1:
                self._fault(f"the {word} FIN was not acknowledged")
        return self.faults

    def _fault(self, text: str) -> None:
        if len(self.faults) < FAULTS_MOST:
            self.faults.append(f"{self.name}, segment {self.count}: {text}")

    def _take(self, one: Segment) -> None:
        for text in one.wrong:
            self._fault(text)
        upward = (one.source, one.sport) == self._client
        way, back = (self.up, self.down) if upward else (self.down, self.up)
        if one.flags & RST and self._lossy and self.ended:
            return  # to a duplicate that came when its receiver had forgotten the connection already
        if one.flags & RST:
            self._fault(f"RST of the {'client' if upward else 'member'}")
            return
        try:
            told = list(options(one.options))
        except ValueError as error:
            self._fault(str(error))
            return
        if one.flags & SYN and not self._greet(one, way, told, upward):
            return
        if way.isn is None:
            self._fault("a segment before the handshake")
            return
        if not one.flags & SYN:
            if not one.flags & ACK:
                self._fault("neither SYN nor ACK")
            if not (way.timestamps and back.timestamps) and any(kind == TIMESTAMPS for kind, _ in told):
                self._fault("timestamps that were not agreed on")
            self._data(one, way, back)
        if one.flags & ACK:
            if back.isn is None:
                self._fault("an acknowledgement of nothing")
                return
            self._acknowledged(one, way, back, told)

    def _greet(self, one: Segment, way: Way, told: list[tuple[int, bytes]], upward: bool) -> bool:
        if self._adopted:
            self._fault("a SYN of a connection that was handed over")
            return False
        if way.isn is not None and way.isn != one.seq:
            self._fault(f"another initial number, {one.seq} after {way.isn}")
            return False
        if upward == bool(one.flags & ACK):
            self._fault("SYN-ACK of the client" if upward else "SYN of the member")
        if way.isn is not None:
            return True  # what a SYN says that comes again counts for nobody (RFC 9293, 3.10.7.4)
        way.isn, way.high = one.seq, max(way.high, 1)
        for kind, value in told:
            if kind == MSS:
                way.mss = int.from_bytes(value, "big")
            elif kind == SCALE:
                way.scale = value[0]
            elif kind == SACK_PERMITTED:
                way.sack = True
            elif kind == TIMESTAMPS:
                way.timestamps = True
        return True

    def _data(self, one: Segment, way: Way, back: Way) -> None:
        at = way.number(one.seq, way.high)
        behind = at + len(one.payload)
        fin = one.flags & FIN
        if at > way.high and not self._lossy:
            self._fault(f"a jump of {at - way.high} numbers")
        if not one.payload and not fin:
            return
        if len(one.payload) > back.mss:
            self._fault(f"{len(one.payload)} bytes, the MSS is {back.mss}")
        if at < 1:
            self._fault("data before the first number")
            return
        if behind > way.edge:
            self._fault(f"{behind - way.edge} bytes beyond the window")
        known = way.stream[at - 1:behind - 1]
        if known != one.payload[:len(known)]:
            self._fault("other bytes with the same numbers")
        end = way.fin if way.fin is not None else behind if fin else None
        if end is not None and (behind > end or (fin and behind != end) or way.high > end + 1):
            self._fault("data beyond the FIN")
            return
        if fin:
            way.fin = behind
        way.high = max(way.high, behind + (1 if fin else 0))
        way.ahead[at] = max(way.ahead.get(at, b""), one.payload, key=len)
        for start in sorted(way.ahead):
            if start - 1 > len(way.stream):
                break
            way.stream += way.ahead.pop(start)[len(way.stream) - start + 1:]

    def _acknowledged(self, one: Segment, way: Way, back: Way, told: list[tuple[int, bytes]]) -> None:
        ack = back.number(one.ack, back.acked)
        if ack > back.high:
            self._fault(f"{ack - back.high} numbers acknowledged that were never sent")
        back.acked = max(back.acked, ack)
        scaled = way.scale is not None and back.scale is not None and not one.flags & SYN
        window = one.window << (way.scale or 0 if scaled else 0)
        back.offered = back.offered or ack + window
        back.edge = max(back.edge, ack + window)
        if not one.flags & SYN:
            back.windows.setdefault(ack, set()).add(window)
        for kind, value in told:
            if kind == SACK:
                self._sack(value, ack, way, back)

    def _sack(self, value: bytes, ack: int, way: Way, back: Way) -> None:
        if not (way.sack and back.sack):
            self._fault("SACK that was not agreed on")
        if not value or len(value) % 8:
            self._fault("SACK of half a block")
            return
        edges = [back.number(edge, ack) for edge in struct.unpack(f"!{len(value) // 4}I", value)]
        blocks = list(zip(edges[::2], edges[1::2], strict=True))
        back.blocks += len(blocks)
        for index, (left, right) in enumerate(blocks):
            # RFC 2883: the first block may tell of something that came twice.
            double = index == 0 and (right <= ack or any(a <= left and right <= b for a, b in blocks[1:2]))
            if not 1 <= left < right or (left <= ack and not double):
                self._fault(f"a SACK block {left} to {right}, acknowledged {ack}")
            elif right > min(back.high, back.edge):
                self._fault(f"a SACK block to {right}, sent {back.high}, allowed {back.edge}")


def compare(client: View, member: View, spliced: bool) -> list[str]:
    """What is wrong between the two ends of one connection.

    Args:
        client, member: as each of them saw it, to its end.
        spliced: the member shook hands itself; else it was handed the client's handshake.
    """
    faults = []
    for word, one, other in (("client's", client.up, member.up), ("member's", client.down, member.down)):
        if one.stream != other.stream:
            faults.append(f"the {word} bytes: {len(one.stream)} at the client, {len(other.stream)} at the member, "
                          "not the same")
    if client.up.isn != member.up.isn:
        faults.append("the client's initial number is another one at the member")
    if not spliced and client.down.isn != member.down.isn:
        faults.append("the member's initial number is another one at the client")
    # Who gives windows for a direction is its receiver; the sender reads them with the scale it was told.
    for word, given, seen, scale in (("member", member.up, client.up, client.down.scale),
                                     ("client", client.down, member.down, member.up.scale)):
        wrong = _windows(given, seen, scale or 0)
        if wrong:
            faults.append(f"windows of the {word}: {wrong}")
    return faults


def _windows(given: Way, seen: Way, scale: int) -> str:
    """What the sender of data sees of each window given: the same, as far as 16 bits and its scale can say it."""
    common = given.windows.keys() & seen.windows.keys()
    if not common:
        return "none was seen at both ends"
    for ack in sorted(common):
        right = {min(window >> scale, 0xFFFF) << scale for window in given.windows[ack]}
        if not seen.windows[ack] <= right:
            return f"at {ack} the other end sees {sorted(seen.windows[ack])}, not {sorted(right)}"
    return ""
