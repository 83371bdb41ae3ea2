# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections that stand in line (:mod:`lbapp.control.waiting`), as transcripts."""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.config.model import Application, Configuration, Pool, Protocol, VirtualServer
from lbapp.config.pool import Algorithm, Member, Persistence, PersistenceType, Waiting
from lbapp.control.engine import Chosen, ControlSegment, Limits
from lbapp.control.messages import AppQuery, AppReply, Binding, Delete, Error, Live, Refused, Reply, SwitchDown
from lbapp.control.statistics import Refusal
from lbapp.control.waiting import FOREMOST
from tests.playbook import Playbook, accepted, closed, member, query, refused, seen, site, text, up

LINE = Waiting(limit=3, timeout=5)


def one_at_a_time(*members: Member, line: Waiting | None = LINE, limits: Limits | None = None,
                  pool: dict[str, Any] | None = None, **fields: Any) -> Playbook:
    """A pool whose members have one connection each, and a line."""
    chosen = members or (member(1, connection_limit=1),)
    play = Playbook(site(members=chosen, pool={"waiting": line, **(pool or {})}, **fields), limits)
    (play >> up(3)).ignore()
    for number in range(1, len(chosen) + 1):
        play >> query(number) << accepted(number, number, tracked=True)
    return play


def answers(heard: list[Any]) -> list[str | AppReply]:
    """What those who waited are told; not what is asked or told about members meanwhile."""
    return [one if isinstance(one, AppReply) else text(one) for one in heard if isinstance(one, (Reply, AppReply))]


def late(heard: list[Any]) -> AppReply:
    """The only such answer."""
    (one,) = answers(heard)
    assert isinstance(one, AppReply)
    return one


# ------------------------------------------------------------------ in line


def test_one_after_the_other() -> None:
    play = one_at_a_time()
    for serial in (2, 3, 4):
        (play >> query(serial)).none()
    assert play.control.active(1) == 1
    (play >> closed(1, 1)) << accepted(2, 1, tracked=True)
    (play >> closed(2, 1)) << accepted(3, 1, tracked=True)
    play.tick(0.1).none()
    (play >> closed(3, 1)) << accepted(4, 1, tracked=True)
    (play >> closed(4, 1)).none()
    view = play.control.line("p", play.now)
    assert (view.now, view.waited, view.timed_out, view.refused) == (0, 3, 0, 0)
    assert play.control.statistics().refused == {}


def test_without_a_line_who_finds_all_members_full_is_refused() -> None:
    play = one_at_a_time(line=None)
    play >> query(2) << refused(2, Error.CONNLIMIT)
    assert play.control.line("p", 0.0).refused == 0
    assert play.control.statistics().refused == {(1, Refusal.CONNLIMIT): 1}


def test_a_line_has_an_end() -> None:
    play = one_at_a_time()
    for serial in (2, 3, 4):
        (play >> query(serial)).none()
    play >> query(5) << refused(5, Error.CONNLIMIT)
    assert play.control.line("p", 0.0).refused == 1


def test_all_lines_together_have_one_too() -> None:
    play = one_at_a_time(limits=Limits(waiting=1))
    (play >> query(2)).none()
    play >> query(3) << refused(3, Error.CONNLIMIT)


def test_nobody_waits_for_ever() -> None:
    play = one_at_a_time()
    (play.at(1) >> query(2)).none()
    (play.at(2) >> query(3)).none()
    assert answers(play.tick(5.9).ignore()) == []
    assert answers(play.tick(6.0).ignore()) == [refused(2, Error.CONNLIMIT)]
    assert answers(play.tick(6.9).ignore()) == []
    view = play.control.line("p", 6.9)
    assert (view.now, view.timed_out, round(view.longest, 6)) == (1, 1, 4.9)
    assert answers(play.tick(7.0).ignore()) == [refused(3, Error.CONNLIMIT)]


def test_who_asks_again_keeps_its_place_and_is_answered_as_it_asked_last() -> None:
    play = one_at_a_time()
    (play >> query(2)).none()
    (play >> query(3)).none()
    (play.at(3) >> query(20, client=2)).none(), "a SYN again, as a switch tells of it"
    (play.at(3) >> query(3)).none(), "a question again, as an agent asks it"
    view = play.control.line("p", 4.0)
    assert [(one.position, one.query.serial, one.seconds) for one in view.foremost] == [(1, 20, 4.0), (2, 3, 4.0)]
    (play >> closed(1, 1)) << accepted(20, 1, tracked=True)
    assert answers(play.tick(5.0).ignore()) == [refused(3, Error.CONNLIMIT)]


def test_the_first_of_a_long_line_are_told_of() -> None:
    play = one_at_a_time(line=Waiting(limit=100))
    for serial in range(2, 60):
        (play >> query(serial)).none()
    view = play.control.line("p", 0.0)
    assert view.now == 58 and [one.query.serial for one in view.foremost] == list(range(2, 2 + FOREMOST))


def test_udp_waits_too() -> None:
    play = Playbook(site(members=[member(1, connection_limit=1)], protocol=Protocol.UDP, pool={"waiting": LINE}))
    (play >> up(1)).ignore()
    play >> query(1, protocol=17) << accepted(1, 1, tracked=True)
    (play >> query(2, protocol=17)).none()
    (play >> query(4, client=2, protocol=17)).none()
    (play >> closed(1, 1)) << accepted(4, 1, tracked=True)


# ------------------------------------------------------------------ what makes room


def test_several_ends_at_once_make_room_for_several() -> None:
    play = one_at_a_time(*(member(n, connection_limit=1) for n in (1, 2, 3)))
    for serial in (4, 5, 6):
        (play >> query(serial)).none()
    both = Delete(1, closed(1, 1).closed + closed(3, 3).closed)
    (play >> both) << accepted(4, 1, tracked=True)
    play << accepted(5, 3, tracked=True)
    play.none()


def test_a_snapshot_makes_room() -> None:
    play = one_at_a_time()
    (play.at(30) >> query(2)).none()
    play >> Live(1, ()) << accepted(2, 1, tracked=True)


def test_a_flow_that_could_not_be_held_makes_room() -> None:
    play = one_at_a_time()
    (play >> query(2)).none()
    play >> Refused(1, 1, 1) << accepted(2, 1, tracked=True)


def test_a_higher_limit_or_another_member_makes_room() -> None:
    play = one_at_a_time()
    for serial in (2, 3):
        (play >> query(serial)).none()
    play.configure(site(members=[member(1, connection_limit=2)], pool={"waiting": LINE}))
    play << accepted(2, 1, tracked=True)
    play.configure(site(members=[member(1, connection_limit=2), member(2, connection_limit=1)],
                        pool={"waiting": LINE}))
    play << accepted(3, 2, tracked=True)


def test_a_member_that_is_found_makes_room() -> None:
    play = Playbook(site(members=[member(1, connection_limit=1), member(2, connection_limit=1)],
                         pool={"waiting": LINE}))
    (play >> up(1)).ignore()
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> query(2)).none()
    assert answers((play >> seen(2)).ignore()) == [accepted(2, 2, tracked=True)]


def test_without_the_line_or_the_virtual_server_nobody_waits_any_more() -> None:
    play = one_at_a_time()
    (play >> query(2)).none()
    play.configure(site(members=[member(1, connection_limit=1)])) << refused(2, Error.CONNLIMIT)
    play = one_at_a_time()
    (play >> query(2)).none()
    play.configure(site(members=[member(1, connection_limit=1)], pool={"waiting": LINE}, maintenance=True))
    play << refused(2, Error.NOTAVAIL)
    play = one_at_a_time()
    (play >> query(2)).none()
    assert answers(play.configure(Configuration()).ignore()) == [refused(2, Error.NOTAVAIL)]
    assert play.control.line("p", 0.0).waited == 1
    play.configure(Configuration()).none()
    assert play.control.line("p", 0.0).waited == 0, "its counters went with it"


def test_another_pool_takes_the_place_of_the_one_that_is_waited_for() -> None:
    play = one_at_a_time()
    for serial in (2, 3):
        (play >> query(serial)).none()
    first = site(members=[member(1, connection_limit=1)], pool={"waiting": LINE}, default_pool_id="q")
    other = Pool(name="other", members=(member(2, connection_limit=1),), waiting=LINE)
    told = play.configure(Configuration(virtual_servers=first.virtual_servers, pools={**first.pools, "q": other}))
    assert answers(told.ignore()) == [accepted(2, 2, tracked=True)]
    assert (play.control.line("p", 0.0).now, play.control.line("q", 0.0).now) == (0, 1)
    (play >> closed(2, 2)) << accepted(3, 2, tracked=True)


def test_nobody_can_be_reached_any_more() -> None:
    play = one_at_a_time()
    (play >> query(2)).none()
    play.configure(site(members=[member(1, connection_limit=1, draining=True)], pool={"waiting": LINE}))
    play << refused(2, Error.NOTAVAIL)


def test_a_switch_that_is_away_cannot_be_answered() -> None:
    play = one_at_a_time()
    (play >> up(3, switch=2)).ignore()
    (play >> query(2)).none()
    (play >> query(3, switch=2)).none()
    (play >> SwitchDown(2)).none()
    assert play.control.line("p", 0.0).now == 1
    (play >> closed(1, 1)) << accepted(2, 1, tracked=True)
    (play >> closed(2, 1)).none()


# ------------------------------------------------------------------ a virtual server's own limit


def test_a_virtual_servers_limit_leads_to_the_line_as_well() -> None:
    play = Playbook(site(2, connection_limit=1, pool={"waiting": LINE}))
    (play >> up(2)).ignore()
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> query(2)).none()
    (play >> closed(1, 1)) << accepted(2, 2, tracked=True)
    play = Playbook(site(2, connection_limit=1))
    (play >> up(2)).ignore()
    play >> query(1) << accepted(1, 1, tracked=True)
    play >> query(2) << refused(2, Error.CONNLIMIT)


def test_another_virtual_server_of_the_pool_does_not_wait_for_the_first_ones_limit() -> None:
    one = site(members=[member(1, connection_limit=2)], connection_limit=1, pool={"waiting": LINE})
    other = VirtualServer(name="w", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=81, number=2,
                          default_pool_id="p")
    play = Playbook(Configuration(virtual_servers={**one.virtual_servers, "w": other}, pools=one.pools))
    (play >> up(1)).ignore()
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> query(2)).none()
    play >> query(3, virtual_server=2) << accepted(3, 1, tracked=True)
    (play >> query(4, virtual_server=2)).none()
    (play >> closed(3, 1, virtual_server=2)) << accepted(4, 1, tracked=True), "2 still may not"
    (play >> closed(1, 1)) << accepted(2, 1, tracked=True)


# ------------------------------------------------------------------ known clients


def test_who_waits_for_one_member_does_not_hold_up_others() -> None:
    play = one_at_a_time(*(member(n, connection_limit=1) for n in (1, 2)), pool={
        "persistence": Persistence(type=PersistenceType.SOURCE_IP)})
    again = query(21, client=1)
    (play >> again._replace(signature=again.signature._replace(source_port=9))).none()
    (play >> query(3)).none()
    (play >> closed(2, 2)) << accepted(3, 2, tracked=True), "member 2 is not the one that 1 waits for"
    (play >> query(4)).none()
    (play >> closed(1, 1)) << accepted(21, 1, tracked=True), "it came before"
    (play >> closed(21, 1)) << accepted(4, 1, tracked=True)


def test_the_member_that_it_waits_for_goes_down() -> None:
    persistence = {"persistence": Persistence(type=PersistenceType.SOURCE_IP, while_draining=False), "waiting": LINE}
    play = one_at_a_time(*(member(n, connection_limit=1) for n in (1, 2)), pool=persistence)
    again = query(21, client=1)
    (play >> again._replace(signature=again.signature._replace(source_port=9))).none()
    play.configure(site(members=[member(1, connection_limit=1, draining=True), member(2, connection_limit=1)],
                        pool=persistence)).none()
    (play >> closed(2, 2)) << accepted(21, 2, tracked=True)


# ------------------------------------------------------------------ what clients say


def reading(**fields: Any) -> ControlSegment:
    server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                           default_pool_id="p", application=Application.HTTP, **fields)
    control = ControlSegment(Configuration(virtual_servers={"v": server}, pools={
        "p": Pool(name="web", members=(member(1, connection_limit=1),), waiting=LINE,
                  lb_algorithm=Algorithm.CONSISTENT_HASH)}))
    control.handle(up(1), 0.0)
    return control


def said(serial: int, what: bytes = b"GET", client: int | None = None, **fields: Any) -> AppQuery:
    return AppQuery(query(serial, client), 1, 2, b"", what + b" / HTTP/1.1\r\nHost: a\r\n\r\n", **fields)


def test_who_was_read_waits_and_is_told_that_its_words_have_arrived() -> None:
    control = reading()
    first = control.app_query(said(1), 0.0)
    assert first.reply is not None and first.reply.member == 1
    assert control.app_query(said(3), 0.0) == AppReply(query(3))
    assert control.app_query(said(3, timed_out=True), 0.5) == AppReply(query(3)), "asked again"
    assert control.line("p", 0.0).now == 1
    told = late(control.handle(closed(1, 1), 1.0))
    assert told.reply is not None
    assert (told.reply.error, told.reply.member, told.binding) == (Error.OK, 1, Binding.SPLICE)
    assert control.chosen(1, 3) == Chosen("", "GET a/", Binding.SPLICE)


def test_who_was_read_is_answered_when_its_time_is_over() -> None:
    control = reading()
    control.app_query(said(1), 0.0)
    control.app_query(said(3), 0.0)
    control.app_query(said(5, b"HEAD"), 0.0)
    one, two = answers(control.tick(5.0))
    assert isinstance(one, AppReply) and isinstance(two, AppReply)
    assert one.reply is not None and one.reply.error is Error.CONNLIMIT
    assert one.answer.startswith(b"HTTP/1.1 503 ") and one.answer.endswith(b"Unavailable\n")
    assert two.answer.endswith(b"\r\n\r\n"), "HEAD has no body"


def test_who_was_read_and_whose_virtual_server_is_gone() -> None:
    control = reading()
    control.app_query(said(1), 0.0)
    control.app_query(said(3), 0.0)
    assert late(control.configure(Configuration(), 0.0)).answer.startswith(b"HTTP/1.1 503 ")


def test_a_full_line_and_a_limit_of_the_virtual_server() -> None:
    control = reading(connection_limit=1)
    control.app_query(said(1), 0.0)
    for serial in (3, 5, 7):
        assert control.app_query(said(serial), 0.0) == AppReply(query(serial))
    found = control.app_query(said(9), 0.0)
    assert found.reply is not None and found.reply.error is Error.CONNLIMIT
    assert found.answer.startswith(b"HTTP/1.1 503 ")


def test_after_a_member_that_failed_nobody_waits() -> None:
    control = ControlSegment(Configuration(virtual_servers=reading_server(), pools={
        "p": Pool(name="web", members=(member(1, connection_limit=1), member(2)), waiting=LINE)}))
    control.handle(up(2), 0.0)
    control.app_query(said(1), 0.0)
    found = control.app_query(said(3, failed=(2,)), 0.0)
    assert found.reply is not None and found.reply.error is Error.CONNLIMIT


def reading_server() -> dict[str, VirtualServer]:
    return {"v": VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                               default_pool_id="p", application=Application.HTTP)}


@pytest.mark.parametrize("connections", [1, 5])
def test_a_line_of_many_is_served_in_order(connections: int) -> None:
    play = Playbook(site(members=[member(1, connection_limit=connections)], pool={"waiting": Waiting(limit=500)}))
    (play >> up(1)).ignore()
    for serial in range(1, 301):
        play.control.query(query(serial), 0.0)
    order = []
    for serial in range(1, 301):
        order += [reply.query.serial for reply in (play >> closed(serial, 1)).ignore()]
    assert order == list(range(connections + 1, 301))
