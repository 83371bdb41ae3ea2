# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.dataflow.tcp_frames`` says of every frame what :mod:`lbapp.dataflow.frames` says of it, step by step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.dataflow import frames, tcp_frames
from lbapp.dataflow.frames import TCP, MalformedError, Segment

MAC = bytes(range(6))
words = st.integers(0, 2**32 - 1)
ports = st.integers(0, 65535)


def stepwise(frame: bytes) -> Any:
    packet = frames.parse(frame)
    frame = frames.with_checksum(frame, packet)
    return frame, packet, frames.segment(frame, packet)


def said(how: Any, frame: bytes) -> Any:
    try:
        return how(frame)
    except MalformedError as error:
        return str(error)


@st.composite
def segments(draw: st.DrawFn) -> bytes:
    size = draw(st.sampled_from([4, 16]))
    here, there = draw(st.binary(min_size=size, max_size=size)), draw(st.binary(min_size=size, max_size=size))
    options = draw(st.sampled_from([b"", b"\x01\x01\x08\x0a" + bytes(8), b"\x02\x04\x05\xb4", bytes(40)]))
    made = frames.tcp(MAC, MAC[::-1], (here, draw(ports)), (there, draw(ports)), Segment(
        draw(words), draw(words), draw(st.integers(0, 255)), draw(ports), options, draw(st.binary(max_size=70))))
    kind = draw(st.sampled_from(["whole", "partial", "wrong", "trailer"]))
    if kind == "whole":
        return made
    offset = 34 if size == 4 else 54
    if kind == "trailer":
        return made + draw(st.binary(max_size=12))
    field = frames.pseudo_sum(here, there, TCP, len(made) - offset) if kind == "partial" else draw(ports)
    return made[:offset + 16] + field.to_bytes(2, "big") + made[offset + 18:]


@settings(max_examples=600)
@given(segments())
def test_what_hosts_send(frame: bytes) -> None:
    assert said(tcp_frames.read, frame) == said(stepwise, frame)


@settings(max_examples=1500)
@given(segments(), st.integers(12, 60), st.integers(0, 255))
def test_one_byte_is_another(frame: bytes, at: int, value: int) -> None:
    frame = frame[:at] + bytes((value,)) + frame[at + 1:]
    assert said(tcp_frames.read, frame) == said(stepwise, frame)


@settings(max_examples=300)
@given(st.sampled_from([4, 16]), st.data(), st.binary(max_size=40), st.integers(0, 5))
def test_what_is_made_is_what_it_says(size: int, data: st.DataObject, payload: bytes, words_of_options: int) -> None:
    """``frames.tcp``, taken apart again, header by header."""
    here, there = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    said = Segment(data.draw(words), data.draw(words), data.draw(st.integers(0, 255)), data.draw(ports),
                   data.draw(st.binary(min_size=4 * words_of_options, max_size=4 * words_of_options)), payload)
    made = frames.tcp(MAC, MAC[::-1], (here, 1), (there, 65535), said)
    packet = frames.parse(made)
    assert frames.with_checksum(made, packet) == made and frames.segment(made, packet) == said
    assert (made[:6], packet.source_mac, packet.end) == (MAC, MAC[::-1], len(made))
    it = packet.signature
    assert (it.source, it.source_port, it.destination, it.destination_port) == (here, 1, there, 65535)
    assert size == 16 or frames.ones_sum(made[14:34]) == 0xFFFF, "the checksum of IPv4's header"
    assert (made[22] if size == 4 else made[21]) == 64


@settings(max_examples=600)
@given(segments(), st.integers(0, 130))
def test_cut(frame: bytes, size: int) -> None:
    assert said(tcp_frames.read, frame[:size]) == said(stepwise, frame[:size])


@settings(max_examples=300)
@given(st.binary(max_size=120))
def test_anything(frame: bytes) -> None:
    assert said(tcp_frames.read, frame) == said(stepwise, frame)


def test_options_of_ipv4_and_a_part_of_a_packet() -> None:
    made = frames.tcp(MAC, MAC, (bytes(4), 1), (bytes(4), 2), Segment(1, 2, 16, 3, b"", b"said"))
    longer = made[:14] + b"\x46" + made[15:16] + (48).to_bytes(2, "big") + made[18:34] + b"\1\1\1\0" + made[34:]
    assert tcp_frames.read(longer) == stepwise(longer) and tcp_frames.read(longer)[1].offset == 38
    with pytest.raises(MalformedError, match="later fragment"):
        tcp_frames.read(made[:20] + b"\0\1" + made[22:])


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_what_hosts_mostly_send_is_read_in_one_go(monkeypatch: pytest.MonkeyPatch, size: int, partial: bool) -> None:
    made = frames.tcp(MAC, MAC, (bytes(size), 1), (bytes(size), 2), Segment(1, 2, 24, 3, b"", b"said"))
    if partial:
        offset = len(made) - 24
        made = made[:offset + 16] + frames.pseudo_sum(bytes(size), bytes(size), TCP, 24).to_bytes(2, "big") \
            + made[offset + 18:]
    wanted = stepwise(made)
    for name in ("parse", "with_checksum", "segment"):
        monkeypatch.delattr(frames, name)
    assert tcp_frames.read(made) == wanted
