# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a member is told instead of what the client said (``Edit``), from :mod:`lbapp.dataflow.proxy` and its
:mod:`lbapp.dataflow.handshake`; as transcripts."""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.control.messages import Edit
from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.frames import ACK, RST, SYN, Segment
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.proxy_world import (
    CLIENT,
    CLIENT_WIRE,
    COOKIE,
    ISN,
    MEMBER_ISN,
    MEMBER_MAC,
    MEMBER_WIRE,
    MEMBERS,
    REQUEST,
    SERVICE,
    SYN_ACK,
    VIP,
    World,
)


@pytest.fixture(params=[False, True], ids=["sent by the proxy", "gone with its entry"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


CLOSE = Edit(len(REQUEST) - 2, 0, b"Connection: close\r\n")
SHORTER = Edit(0, 4, b"X")


@pytest.mark.parametrize("edit", [CLOSE, SHORTER], ids=["longer", "shorter"])
def test_what_the_member_is_told_instead_leaves_what_follows_its_numbers(world: World, edit: Edit) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    assert not world.change(asked.query, edit)
    assert world.states == [layout.SPLICE]
    more = len(edit.text) - edit.removed
    (syn,) = world.to_member()
    assert syn == Segment(ISN - more & 0xFFFFFFFF, 0, SYN, 64240, syn.options, b"")
    # Its client sends what follows the request; then it says all of it again.
    assert world.client(len(REQUEST), b"body") is None
    assert world.client(0, REQUEST + b"body") is None
    world.member(1 - more, SYN | ACK, options=SYN_ACK)
    told = REQUEST[:edit.at] + edit.text + REQUEST[edit.at + edit.removed:] + b"body"
    (sent,) = world.to_member()
    assert (sent.seq, sent.payload) == (ISN + 1 - more & 0xFFFFFFFF, told)
    assert world.client(0, REQUEST + b"body") is None and not world.fast.injected, "not by the client's segments"
    world.member(5 - more)
    assert [part.payload for part in world.to_member()] == [told[4:]]
    world.member(1 + len(REQUEST) + 4, payload=b"HTTP/1.1 200 OK")
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, 2)}, "nothing but the member's"
    ((wire, frame),) = world.fast.injected
    assert (wire, frames.segment(frame, frames.parse(frame)).payload) == (MEMBER_WIRE, b"HTTP/1.1 200 OK")
    assert not len(world.proxy) and not world.to_client()


def test_the_next_member_is_asked_for_with_what_the_client_said(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.change(asked.query, CLOSE)
    world.to_member()
    again = world.member(1 - len(CLOSE.text), RST | ACK, seq=0)
    assert again is not None
    assert (again.data, again.seq, again.failed) == (REQUEST, ISN + 1 & 0xFFFFFFFF, (3,))
    world.change(again.query, CLOSE, member=4)
    assert world.to_member(4)[0].seq == ISN - len(CLOSE.text) & 0xFFFFFFFF
    # No SYN but another one than the client's own begins anew.
    world.client(-1, b"", SYN, kind=layout.Ask.LATER)
    assert len(world.proxy) == 1
    world.client(-20, b"", SYN, kind=layout.Ask.LATER)
    assert len(world.proxy) == 0


def test_a_change_beyond_what_was_said_is_refused(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    (refused,) = world.change(asked.query, Edit(len(REQUEST), 1, b""))
    assert refused.serial == asked.query.serial
    assert world.to_client()[-1].flags & RST and not world.fast.installed
    assert not len(world.proxy) and not world.proxy._bytes


def test_an_answer_of_several_segments_is_passed_on_whole(world: World) -> None:
    """Those of the same batch, those that were read late, and what the client says meanwhile."""
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.change(asked.query, CLOSE)
    world.member(1 - len(CLOSE.text), SYN | ACK, options=SYN_ACK)
    end = 1 + len(REQUEST)

    def record(source: tuple[bytes, int], to: tuple[bytes, int], wire: int, kind: int, part: Segment) -> Any:
        return layout.QueryRecord(wire, SERVICE, frames.tcp(VIRTUAL_MAC, MEMBER_MAC, source, to, part), kind, 0)

    def of_member(at: int, payload: bytes, flags: int = ACK) -> Any:
        return record(MEMBERS[3], CLIENT, MEMBER_WIRE, layout.Ask.MEMBER,
                      Segment(MEMBER_ISN + 1 + at, ISN + end, flags, 500, b"", payload))

    for at, payload, flags in ((0, b"one", ACK), (3, b"two", ACK), (6, b"", ACK | RST)):
        world.proxy.from_member(of_member(at, payload, flags), 0.0)
    world.proxy.from_client(record(CLIENT, VIP, CLIENT_WIRE, layout.Ask.LATER, Segment(
        ISN + end, COOKIE + 1, ACK, 500, b"", b"next")), 0.0)
    assert world.asked(0.0) is None
    passed = [(wire, frames.segment(frame, frames.parse(frame))) for wire, frame in world.fast.injected]
    assert [(wire, part.payload, part.flags & RST) for wire, part in passed] == [
        (MEMBER_WIRE, b"onetwo", 0), (MEMBER_WIRE, b"", RST), (CLIENT_WIRE, b"next", 0)]
    world.proxy.from_member(of_member(6, b"late"), 0.1)
    assert world.asked(0.1) is None
    assert frames.segment(world.fast.injected[-1][1], frames.parse(world.fast.injected[-1][1])).payload == b"late"
    assert not world.counters["proxy_stray"] and not world.proxy._bytes
