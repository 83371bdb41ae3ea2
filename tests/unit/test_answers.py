# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Members that do not answer, or answer with errors of their own: lbapp.control.answers, and what tells it of that."""

from __future__ import annotations

from collections import deque

import pytest

from lbapp.config.model import Application, Configuration, Pool, Protocol, VirtualServer
from lbapp.config.monitor import Passive
from lbapp.control.answers import ANSWER, GRAIN, REPEATS, Answers
from lbapp.control.engine import ControlSegment
from lbapp.control.limits import DEFAULTS
from lbapp.control.messages import AppQuery, Closed, Delete, Error, Failed, Reap, Reason, Stats
from lbapp.dataflow.relayed import Connection
from tests.playbook import member, query, seen, up
from tests.relay_world import pair

UP = {1}
PATIENCE = 2.0
DUE = PATIENCE + 2 * GRAIN
"""By then it is asked about, what the grain of timers allows included."""


class World:
    """Answers of a pool of two members, of which one more pool minds nothing."""

    def __init__(self, passive: Passive | None = None, chosen: int = DEFAULTS.chosen) -> None:
        self.failures: deque[tuple[int, str]] = deque()
        self.answers = Answers(self.failures.append, DEFAULTS._replace(chosen=chosen))
        self.answers.configure({
            "p": Pool(name="p", members=(member(1), member(2)), passive=passive or Passive(first_byte=PATIENCE)),
            "q": Pool(name="q", members=(member(3),), passive=Passive()), "r": Pool(name="r", members=(member(4),))})

    def given(self, serial: int = 7, number: int = 1, now: float = 0.0) -> None:
        self.answers.given(1, serial, 1, number)
        assert self.answers.tick(now, UP) == []

    def asked(self, now: float) -> list[int]:
        return [one.serial for one in self.answers.tick(now, UP)]

    def alive(self, serial: int = 7, packets: int = 3, silent: bool = False) -> None:
        for error in (Error.NOTAVAIL, Error.CONNALIVE) if silent else (Error.CONNALIVE,):
            self.answers.heard(Stats(1, serial, error, packets, 900))


def test_who_has_answered_is_asked_about_once() -> None:
    world = World()
    world.given()
    assert world.asked(PATIENCE) == [], "not before its time"
    assert world.asked(DUE) == [7]
    world.alive()
    assert len(world.answers) == 0 and world.asked(DUE + 60) == [] and not world.failures


def test_who_is_silent_while_the_client_is_silent_too_has_failed() -> None:
    world = World()
    world.given()
    assert world.asked(DUE) == [7]
    world.alive(silent=True)
    assert not world.failures, "nobody knows yet whether the client was done"
    assert world.asked(DUE + PATIENCE) == [7]
    world.alive(silent=True)
    assert list(world.failures) == [(1, "no answer within 2 s")]
    assert len(world.answers) == 0 and world.asked(DUE + 60) == []


def test_a_client_that_is_still_sending_is_no_failure() -> None:
    world = World()
    world.given()
    for turn in range(10):
        assert world.asked(DUE + turn * PATIENCE) == [7]
        world.alive(silent=True, packets=3 + turn)
    assert not world.failures and len(world.answers) == 1
    assert world.asked(DUE + 10 * PATIENCE) == [7]
    world.alive(packets=20)
    assert not world.failures and len(world.answers) == 0, "now it has answered"


@pytest.mark.parametrize(("packets", "counted", "failed"), [(3, True, True), (4, True, True), (9, True, False),
                                                            (4, False, False)])
def test_a_client_that_gives_up(packets: int, counted: bool, failed: bool) -> None:
    """By a RST, after its member was found to be silent. More packets than that may have been an answer."""
    world = World()
    world.given()
    assert world.asked(DUE) == [7]
    world.alive(silent=True)
    world.answers.ended(1, [Closed(7, 1, 1, Reason.SHUTDOWN, False, counted, packets, 900, 4.0)])
    assert bool(world.failures) is failed and len(world.answers) == 0


def test_what_ends_in_time_is_not_asked_about() -> None:
    world = World()
    for serial in range(1, 9):
        world.given(serial)
    world.answers.ended(1, [Closed(serial, 1, 1, Reason.SHUTDOWN) for serial in range(1, 8)])
    world.answers.ended(2, [Closed(8, 1, 1, Reason.SHUTDOWN)])
    assert world.asked(DUE) == [8] and not world.failures, "another switch's is another one"


def test_nobody_is_blamed_for_questions_that_are_not_answered() -> None:
    world = World()
    world.given()
    assert [world.asked(DUE + turn * (ANSWER + GRAIN)) for turn in range(REPEATS + 1)] == [[7]] * REPEATS + [[]]
    assert len(world.answers) == 0 and not world.failures
    world.given(9, now=100.0)
    assert world.answers.tick(100.0 + DUE, set()) == [] and len(world.answers) == 0, "its switch is away"


def test_only_members_of_pools_that_mind_are_watched_and_not_too_many() -> None:
    world = World(chosen=3)
    world.given(1, number=3)
    world.given(2, number=4)
    assert len(world.answers) == 0
    for serial in range(5):
        world.given(serial)
    assert len(world.answers) == 3
    assert world.asked(DUE) == [2, 3, 4], "the oldest are no longer watched"
    world.alive(99, silent=True)
    world.answers.configure({})
    world.given(50)
    assert len(world.answers) == 3, "what is watched already still is; nothing is added"


def test_server_errors_count_where_the_pool_says_so() -> None:
    for minds in (False, True):
        world = World(Passive(server_errors=minds))
        for number in (1, 3):
            assert world.answers.failed(Failed(1, 7, 1, number, 503), 0.0) == ()
        assert list(world.failures) == ([(1, "status 503")] if minds else [])


def test_the_control_segment_watches_those_that_were_read() -> None:
    server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                           default_pool_id="p", application=Application.HTTP)
    pool = Pool(name="p", members=(member(1), member(2)), passive=Passive(first_byte=PATIENCE, server_errors=True))
    control = ControlSegment(Configuration(virtual_servers={"v": server}, pools={"p": pool}))
    control.handle(up(2), 0.0)
    for number in (1, 2):
        control.handle(seen(number), 0.0)
    given = {}
    for serial in (1, 3, 5):
        reply = control.app_query(AppQuery(query(serial), 1, 2, b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), 0.0).reply
        assert reply is not None
        given[serial] = reply.member
    control.tick(0.0)
    control.handle(Delete(1, (Closed(5, 1, given[5], Reason.SHUTDOWN, False, True, 9, 900, 0.1),)), 1.0)
    for now in (DUE, DUE + PATIENCE):
        asked = [one for one in control.tick(now) if isinstance(one, Reap)]
        assert {(one.serial, one.member, one.final) for one in asked} == {
            (serial, given[serial], False) for serial in ((1, 3) if now == DUE else (3,))}
        control.handle(Stats(1, 1, Error.CONNALIVE, 8, 900), now)
        for error in (Error.NOTAVAIL, Error.CONNALIVE):
            control.handle(Stats(1, 3, error, 3, 300), now)
    control.handle(Failed(1, 1, 1, given[1], 500), DUE)
    assert list(control.failures) == [(given[3], "no answer within 2 s"), (given[1], "status 500")]


@pytest.mark.parametrize(("payload", "status"), [
    (b"HTTP/1.1 503 Service Unavailable\r\n", 503), (b"HTTP/1.0 500 \r\n", 500), (b"HTTP/1.1 200 OK\r\n", 0),
    (b"HTTP/1.1 5", 0), (b"HTTP/1.1 5x0 ", 0), (b"SSH-2.0-x 500", 0)])
def test_what_begins_an_answer(payload: bytes, status: int) -> None:
    (there, inbound), (back, outbound) = pair()
    one = Connection((there, back), (inbound, outbound), 0.0)
    assert one.said(0, b"GET / HTTP/1.1\r\n") == 0 and not one.answered
    assert one.said(1, payload) == status and one.answered
    assert one.said(1, b"HTTP/1.1 503 in the body of it\r\n") == 0, "the client has asked nothing since"
    one.said(0, b"GET /again HTTP/1.1\r\n")
    assert one.said(1, b"HTTP/1.1 502 Bad Gateway\r\n") == 502, "a later answer of the same connection"
