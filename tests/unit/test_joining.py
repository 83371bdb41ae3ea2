# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Joining of segments (lbapp/dataflow/joining.py): the same bytes in the same order, and frames that are right."""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.config.pool import LEAST_MSS
from lbapp.dataflow import frames
from lbapp.dataflow.joining import LARGEST, join
from tests.fastpath_packets import ACK, FIN, RST, TCP, frame, read

PSH = 8
SEQ = 0xFFFFFFFF - 3000
"""They wrap."""


def said(offset: int, size: int, six: bool = False, flags: int = ACK, **more: Any) -> bytes:
    ends = ("fd00::1", "fd00::100") if six else ("10.0.0.1", "10.0.0.100")
    return frame(*ends, TCP, 40000, 80, flags=flags, seq=SEQ + offset & 0xFFFFFFFF, payload=bytes(
        (offset + index) % 251 for index in range(size)), **more)


@pytest.mark.parametrize("six", [False, True])
def test_a_flight_is_one_frame(six: bool) -> None:
    flight = [said(1400 * index, 1400, six, ACK | (PSH if index == 4 else 0), ack=7 + index, window=500 + index)
              for index in range(10)]
    (whole,) = join(flight, 1400)
    told = read(whole)
    assert told.payload == b"".join(read(one).payload for one in flight)
    assert (told.seq, told.ack, told.window, told.flags) == (SEQ, 16, 509, ACK | PSH)
    first = read(flight[0])
    assert told._replace(payload=b"", seq=0, ack=0, window=0, flags=0, checksum=0) == first._replace(
        payload=b"", seq=0, ack=0, window=0, flags=0, checksum=0), "all else is the first one's"


def test_a_fin_is_the_last() -> None:
    (whole,) = join([said(0, 1000), said(1000, 1000), said(2000, 0, flags=FIN | ACK)], 1460)
    assert read(whole).flags == FIN | ACK and len(read(whole).payload) == 2000
    assert len(join([said(0, 1000, flags=FIN | ACK), said(1000, 1000)], 1460)) == 2


@pytest.mark.parametrize("second", [
    said(1001, 1000), said(999, 1000), said(1000, 1000, eth_src=bytes(6)), said(1000, 1000, True),
    said(1000, 1000, flags=RST | ACK), said(1000, 1000, flags=ACK | 32),
    said(1000, 1000, tcp_options=b"\x01\x01\x05\x0a" + bytes(8)),
    frame("10.0.0.1", "10.0.0.100", TCP, 40001, 80, flags=ACK, seq=SEQ + 1000, payload=b"x" * 1000)],
    ids=["gap", "overlap", "host", "family", "rst", "urgent", "options", "connection"])
def test_what_does_not_belong_together_stays_apart(second: bytes) -> None:
    assert join([said(0, 1000), second], 1460) == [said(0, 1000), second]


def test_who_takes_little_gets_the_segments_as_they_were() -> None:
    """A frame that needs not be cut up must not hold more than its receiver takes; nor must the pieces."""
    small = [said(700 * index, 700) for index in range(2)]
    assert join(small, 1300) == small and len(join(small, 1400)) == 1
    many = [said(536 * index, 536) for index in range(20)]
    assert join(many, 536) == many and join(many, 1219) == many and len(join(many, LEAST_MSS)) == 1


def test_a_frame_has_a_length_of_16_bits() -> None:
    flight = [said(1460 * index, 1460) for index in range(60)]
    joined = join(flight, 1460)
    assert len(joined) == 2 and all(len(one) <= LARGEST + 100 for one in joined)
    assert b"".join(read(one).payload for one in joined) == b"".join(read(one).payload for one in flight)
    assert all(frames.whole(one)[0] == one for one in joined)


def test_nothing_and_one() -> None:
    assert join([], 1460) == [] and join([said(0, 5)], 1460) == [said(0, 5)]
