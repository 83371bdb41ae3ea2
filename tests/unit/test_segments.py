# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The judge of captures (tests/segments.py): it finds nothing in a good connection, and each fault in a bad one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.fastpath_packets import frame
from tests.segments import ACK, FIN, RST, SYN, Segment, View, compare, parse

CLIENT, VIP, MEMBER = "10.0.0.1", "10.0.0.100", "10.0.0.51"
PORT = 40000
ISN, COOKIE, OTHER = 0xFFFFFFF0, 5000, 0xFFFFFF00
"""The client's numbers wrap, and the member's own do."""
SYN_OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x03\x03"
"""MSS 1460, SACK permitted, and a window scale, whose value follows."""


def name(address: str) -> tuple[bytes, int]:
    segment = parse(frame(address, VIP), True)
    assert segment is not None
    return segment.source, PORT


class Talk:
    """A connection at one end, to be spoilt: segments as (from client, flags, seq, ack, payload, window, options)."""

    def __init__(self, member: bool = False, spliced: bool = True) -> None:
        self.member = member
        self.isn = OTHER if member and spliced else COOKIE
        up, down = 7, 5
        self.rows: list[list[Any]] = [
            [True, SYN, 0, 0, b"", 64000, SYN_OPTIONS + bytes([up])],
            [False, SYN | ACK, 0, 1, b"", 14600, SYN_OPTIONS + bytes([down])],
            [True, ACK, 1, 1, b"", 500, b""],
            [True, ACK, 1, 1, b"a" * 100, 500, b""],
            [False, ACK, 1, 101, b"b" * 1460, 900, b""],
            [False, ACK, 1461, 101, b"c" * 1000, 900, b""],
            [True, ACK, 101, 2461, b"", 480, b""],
            [True, ACK | FIN, 101, 2461, b"", 480, b""],
            [False, ACK | FIN, 2461, 102, b"", 900, b""],
            [True, ACK, 102, 2462, b"", 480, b""]]
        if member and not spliced:
            del self.rows[:3]

    def segments(self) -> list[Segment]:
        found = []
        for up, flags, seq, ack, payload, window, options in self.rows:
            mine, other = (ISN, self.isn) if up else (self.isn, ISN)
            ends, ports = (CLIENT, MEMBER if self.member else VIP), (PORT, 80)
            blocks = options[2:]
            if options[:1] == b"\x05":  # relative
                options = options[:2] + struct.pack(f"!{len(blocks) // 4}I", *(
                    one + other & 0xFFFFFFFF for one in struct.unpack(f"!{len(blocks) // 4}I", blocks)))
            packet = frame(*(ends if up else ends[::-1]), 6, *(ports if up else ports[::-1]), flags=flags,
                           payload=payload, seq=mine + seq & 0xFFFFFFFF,
                           ack=(other + ack & 0xFFFFFFFF) if flags & ACK else 0, window=window, tcp_options=options)
            one = parse(packet, up is not self.member)
            assert one is not None
            found.append(one)
        return found

    def view(self, opening: View | None = None, lossy: bool = False) -> View:
        view = View("member" if self.member else "client", name(CLIENT), opening, lossy)
        view.add(self.segments())
        return view


@pytest.mark.parametrize("spliced", [True, False])
def test_a_good_connection(spliced: bool) -> None:
    client = Talk().view()
    member = Talk(True, spliced).view(None if spliced else client)
    assert client.close() == [] and member.close() == [] and compare(client, member, spliced) == []
    assert client.ended and member.ended and client.count == 10 and member.count == (10 if spliced else 7)
    assert client.up.stream == b"a" * 100 and client.down.stream == b"b" * 1460 + b"c" * 1000


def sack(*edges: int) -> bytes:
    return struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)


def put(row: int, column: int, value: Any) -> Callable[[Talk], None]:
    def change(talk: Talk) -> None:
        talk.rows[row][column] = value
    return change


def without(*rows: int) -> Callable[[Talk], None]:
    def change(talk: Talk) -> None:
        for row in sorted(rows, reverse=True):
            del talk.rows[row]
    return change


def insert(row: int, *columns: Any) -> Callable[[Talk], None]:
    return lambda talk: talk.rows.insert(row, list(columns))


def no_sack(talk: Talk) -> None:
    talk.rows[1][6] = b"\x02\x04\x05\xb4"
    talk.rows[6][6] = sack(1, 2)


def small_window(talk: Talk) -> None:
    talk.rows[2][5] = talk.rows[3][5] = 11  # scaled by 2**7: 1408


BROKEN: dict[str, tuple[Callable[[Talk], None], str]] = {
    "a jump of data": (put(5, 2, 1462), "a jump of 1"),
    "a jump of a pure acknowledgement": (put(6, 2, 103), "a jump of 2"),
    "a lost segment": (without(4), "a jump of 1460"),
    "a lost segment at the end": (without(5), "a jump of 1000"),
    "too much acknowledged": (put(6, 3, 2462), "never sent"),
    "too much acknowledged to the client": (put(4, 3, 102), "never sent"),
    "RST": (insert(10, False, RST, 2462, 0, b"", 0, b""), "RST of the member"),
    "RST of the client": (insert(4, True, RST | ACK, 101, 1, b"", 0, b""), "RST of the client"),
    "other bytes": (insert(6, False, ACK, 1400, 101, b"d" * 61, 900, b""), "other bytes"),
    "beyond the window": (small_window, "bytes beyond the window"),
    "beyond the MSS": (put(4, 4, b"b" * 1461), "the MSS is 1460"),
    "data behind the FIN": (insert(9, False, ACK, 2461, 102, b"e", 900, b""), "beyond the FIN"),
    "a FIN within data": (insert(6, False, ACK | FIN, 1000, 101, b"", 900, b""), "beyond the FIN"),
    "no FIN": (without(7, 9), "FIN was not seen"),
    "a FIN that nobody acknowledges": (without(9), "the member's FIN was not acknowledged"),
    "another ISN": (insert(2, False, SYN | ACK, 7, 1, b"", 14600, SYN_OPTIONS + b"\x05"), "another initial number"),
    "no handshake": (without(0, 1, 2), "before the handshake"),
    "no ACK flag": (put(5, 1, 0), "neither SYN nor ACK"),
    "timestamps": (put(4, 6, b"\x01\x01\x08\x0a" + bytes(8)), "timestamps"),
    "options cut": (put(4, 6, b"\x01\x01\x01\x05"), "options"),
    "data before the first": (put(4, 2, 0), "before the first number"),
    "SACK beyond what was sent": (put(6, 6, sack(2461, 2500)), "SACK block"),
    "SACK of the wrong numbers": (put(6, 6, sack(100_000, 100_500)), "SACK block"),
    "SACK turned round": (put(6, 6, sack(2400, 2300)), "SACK block"),
    "SACK below, not the first": (put(6, 6, sack(1, 100, 200, 300)), "SACK block"),
    "SACK not agreed on": (no_sack, "not agreed"),
    "SACK of half a block": (put(6, 6, sack(1)), "half a block"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_connection(case: str) -> None:
    change, says = BROKEN[case]
    talk = Talk()
    change(talk)
    faults = talk.view().close()
    assert any(says in fault for fault in faults), faults


def test_what_is_allowed() -> None:
    """D-SACK, a duplicate, and where the wire loses: a gap that is filled, with SACK above it."""
    talk = Talk()
    talk.rows[6][6] = sack(1, 100)
    insert(6, False, ACK, 1, 101, b"b" * 1460, 900, b"")(talk)
    assert talk.view().close() == []
    talk = Talk()
    talk.rows[4], talk.rows[5] = talk.rows[5], talk.rows[4]
    insert(5, True, ACK, 101, 1, b"", 480, sack(1461, 2461))(talk)
    view = talk.view(lossy=True)
    assert view.close() == [] and view.down.blocks == 1
    assert any("a jump" in fault for fault in talk.view().close())
    talk = Talk()
    del talk.rows[4]
    assert any("never filled" in fault for fault in talk.view(lossy=True).close())


@pytest.mark.parametrize("place", range(14, 60))
@pytest.mark.parametrize("six", [False, True])
def test_a_damaged_frame(place: int, six: bool) -> None:
    ends = ("fd00::1", "fd00::100") if six else (CLIENT, VIP)
    whole = bytearray(frame(*ends, seq=7, payload=b"something"))
    assert parse(bytes(whole), True).wrong == ()  # type: ignore[union-attr]
    whole[place] ^= 4
    spoilt = parse(bytes(whole), True)
    if six and place in (*range(14, 18), 21):
        return  # no checksum covers traffic class, flow label and hop limit
    assert spoilt is None or spoilt.wrong


def test_partial_and_cut() -> None:
    partial = parse(frame(CLIENT, VIP, checksum="partial"), True)
    assert partial is not None and "TCP checksum" in partial.wrong[0]
    cut = parse(frame(CLIENT, VIP, payload=b"x" * 50)[:-1], True)
    assert cut is not None and "cut short" in cut.wrong
    assert parse(frame(CLIENT, VIP, 17), True) is None
    fragment = parse(frame(CLIENT, VIP, fragment=1), True)
    assert fragment is not None and "a fragment" in fragment.wrong


@pytest.mark.parametrize(("row", "column", "value", "says"), [
    (4, 4, b"B" * 1460, "the member's bytes"), (3, 4, b"A" * 100, "the client's bytes"),
    (5, 5, 901, "windows of the member"), (6, 5, 479, "windows of the client")])
def test_ends_that_disagree(row: int, column: int, value: Any, says: str) -> None:
    talk = Talk(True)
    talk.rows[row][column] = value
    if says == "windows of the member":
        talk.rows[4][5] = value
    if says == "windows of the client":
        talk.rows[7][5] = value
    found = compare(Talk().view(), talk.view(), True)
    assert len(found) == 1 and says in found[0]


def test_a_scale_that_one_end_does_not_know() -> None:
    """The member was told another scale than the client uses: each window is another one there."""
    talk = Talk(True)
    talk.rows[0][6] = SYN_OPTIONS + b"\x03"
    assert "windows of the client" in compare(Talk().view(), talk.view(), True)[0]


def test_a_handed_over_connection_has_one_numbering() -> None:
    client = Talk().view()
    assert "initial number" in compare(client, Talk(True).view(), False)[0]
    greeted = Talk(True, False)
    greeted.rows.insert(0, [True, SYN, 0, 0, b"", 64000, b""])
    assert "handed over" in greeted.view(client).close()[0]
