# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Proxied handshakes whose client's first data the fast path keeps for the member's SYN-ACK, as transcripts."""

from __future__ import annotations

import pytest

from lbapp.control.messages import Binding, Edit
from lbapp.dataflow import frames
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN
from lbapp.dataflow.proxy import LOOK_SECONDS
from tests.proxy_world import CLIENT_WIRE, COOKIE, ISN, MEMBER_ISN, OPTIONS, REQUEST, SYN_ACK, World


@pytest.fixture(params=[False, True], ids=["sent by the proxy", "gone with its entry"])
def world(request: pytest.FixtureRequest) -> World:
    made = World(request.param)
    made.fast.with_places(2)
    return made


def opened(world: World, payload: bytes = REQUEST, flags: int = ACK | PSH, options: Options = OPTIONS) -> int:
    """A client whose member has been sent a SYN; the number of what is kept for it."""
    asked = world.client(0, payload, flags, options=options)
    assert asked is not None
    assert not world.answer(asked.query)
    (syn,) = world.to_member()
    assert syn.flags == SYN
    return world.requests[-1]


def test_the_member_gets_it_and_nobody_is_asked(world: World) -> None:
    number = opened(world)
    assert (number, len(world.proxy)) == (1, 1)
    assert layout.REQUEST.unpack_from(world.fast.memory)[2:] == (
        ISN, COOKIE, int.from_bytes(REQUEST, "little") % 0xFFFF, 500, len(REQUEST), 7, ACK | PSH, 7)
    assert world.fast.give(number) == (101, REQUEST)
    world.proxy.flush(LOOK_SECONDS)
    assert not len(world.proxy) and not world.fast.injected and not world.fast.splices
    assert world.fast.requests.keep(1, 2, 3, None, 4, ACK, b"another's") == number, "its place is free"


def test_a_member_that_is_near_has_it_at_once(world: World) -> None:
    """The SYN-ACK comes, and takes it, while the SYN is being sent."""
    sent = world.fast.send

    def answered(ifindex: int, frame: bytes) -> bool:
        world.fast.give(1)
        return sent(ifindex, frame)

    world.fast.send = answered  # type: ignore[method-assign]
    assert opened(world) == 1
    assert not len(world.proxy)


def test_a_client_without_window_scale(world: World) -> None:
    opened(world, options=Options(536, None, False))
    assert layout.REQUEST.unpack_from(world.fast.memory)[7] == layout.NO_SCALE


@pytest.mark.parametrize(("payload", "flags"), [(REQUEST + bytes(1500), ACK), (REQUEST, ACK | FIN)])
def test_what_is_too_long_or_the_last_is_not_kept(world: World, payload: bytes, flags: int) -> None:
    assert opened(world, payload, flags) == 0
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert world.fast.splices and len(world.fast.injected) == 1


def test_no_place(world: World) -> None:
    world.fast.with_places(0)
    assert opened(world) == 0
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert len(world.fast.injected) == 1


def test_more_of_the_client_waits_for_the_syn_ack_with_the_rest(world: World) -> None:
    """What is kept is not all any more: the member's SYN-ACK comes up, and everything goes from here, in order."""
    number = opened(world)
    world.client(len(REQUEST), b"more")
    assert layout.REQUEST.unpack_from(world.fast.memory)[0] == 0, "taken back"
    world.member(1, SYN | ACK, options=SYN_ACK)
    assert world.fast.splices == {101: layout.Splice(MEMBER_ISN - COOKIE & 0xFFFFFFFF, 2)}
    (wire, frame), = world.fast.injected
    assert (wire, frames.segment(frame, frames.parse(frame)).payload) == (CLIENT_WIRE, REQUEST + b"more")
    assert not len(world.proxy) and number


def test_a_fin_of_its_own_waits_for_the_syn_ack_with_the_rest(world: World) -> None:
    opened(world)
    world.client(len(REQUEST), flags=ACK | FIN)
    assert layout.REQUEST.unpack_from(world.fast.memory)[0] == 0, "taken back"
    world.member(1, SYN | ACK, options=SYN_ACK)
    sent = [frames.segment(frame, frames.parse(frame)) for _, frame in world.fast.injected]
    assert sent[-1].flags & FIN and b"".join(one.payload for one in sent) == REQUEST


def test_the_member_had_it_when_more_came(world: World) -> None:
    """A SYN-ACK takes it after the agent has looked, and before it takes it back."""
    number = opened(world)
    world.fast.requests._revoke = lambda index: world.fast.give(index + 1) and 2
    world.client(len(REQUEST), b"more")
    ((_, frame),) = world.fast.injected
    assert frames.segment(frame, frames.parse(frame)).payload == b"more", "and not the first data once more"
    assert not len(world.proxy) and number


def test_a_member_that_came_at_the_last_moment_is_not_given_up(world: World) -> None:
    opened(world)
    world.fast.requests._revoke = lambda index: world.fast.give(index + 1) and 2
    for now in (1.1, 3.2):
        assert world.proxy.tick(now) == []
    assert not len(world.proxy) and not world.fast.closed
    assert world.counters["proxy_member_failed"] == 0


def test_a_syn_ack_that_comes_up_after_another_one_took_what_was_kept(world: World) -> None:
    """Both came before the agent looked: the fast path has the connection already, with the first one's offset."""
    number = opened(world)
    world.fast.give(number)
    assert world.member(1, SYN | ACK, seq=MEMBER_ISN + 7, options=SYN_ACK) is None
    assert not len(world.proxy) and not world.fast.splices and not world.fast.injected
    assert not world.to_client() and not world.to_member() and not world.fast.closed
    assert world.client(len(REQUEST), b"more") is None
    assert [frames.segment(frame, frames.parse(frame)).payload for _, frame in world.fast.injected] == [b"more"]
    assert world.fast.requests.keep(1, 2, 3, None, 4, ACK, b"another's") == number, "its place is free"


def test_a_client_that_repeats_itself_changes_nothing(world: World) -> None:
    number = opened(world)
    assert world.client(0, REQUEST, kind=layout.Ask.LATER) is None
    assert world.fast.give(number) == (101, REQUEST)


def test_what_comes_after_it_was_given_follows(world: World) -> None:
    """Read from the ring when the splice was ready already."""
    number = opened(world)
    world.fast.give(number)
    world.client(len(REQUEST), b"more")
    ((wire, frame),) = world.fast.injected
    assert (wire, frames.segment(frame, frames.parse(frame)).payload) == (CLIENT_WIRE, b"more")
    assert not len(world.proxy)
    world.client(len(REQUEST) + 4, b"still more")
    assert len(world.fast.injected) == 2


def test_the_next_member_gets_it_too(world: World) -> None:
    number = opened(world)
    asked = world.member(1, RST | ACK)
    assert asked is not None and asked.failed == (3,)
    assert layout.REQUEST.unpack_from(world.fast.memory)[0] == 0
    assert not world.answer(asked.query, member=4)
    assert world.requests[-1] == number, "in the place that was free again"
    assert world.fast.give(world.requests[-1]) == (asked.query.serial, REQUEST)
    world.proxy.tick(LOOK_SECONDS)
    assert not len(world.proxy)


def test_a_silent_member_is_sent_another_syn(world: World) -> None:
    number = opened(world)
    world.proxy.tick(1.1)
    (syn,) = world.to_member()
    assert syn.flags == SYN
    world.fast.give(number)
    world.proxy.tick(1.2)
    assert not len(world.proxy)


def test_a_client_that_goes_away_takes_it_along(world: World) -> None:
    opened(world)
    world.client(len(REQUEST), flags=RST, kind=layout.Ask.LATER)
    assert layout.REQUEST.unpack_from(world.fast.memory)[0] == 0
    assert not len(world.proxy) and world.fast.closed


def test_nothing_is_kept_where_nobody_greets_the_member_or_the_words_are_changed(world: World) -> None:
    asked = world.client(0, REQUEST)
    assert asked is not None
    world.answer(asked.query, binding=Binding.HANDOFF)
    other = World()
    other.fast.with_places(1)
    asked = other.client(0, REQUEST)
    assert asked is not None
    other.change(asked.query, Edit(0, 3, b"PUT"))
    assert world.requests == other.requests == [0]
