# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The control segment's answers to APP_QUERY: what clients say, and every reason not to give them a member."""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.config.model import (
    Algorithm,
    Application,
    CompareType,
    Configuration,
    L7Policy,
    L7Rule,
    PolicyAction,
    Pool,
    Protocol,
    RuleType,
    VirtualServer,
)
from lbapp.config.model import Binding as Wanted
from lbapp.control.engine import Chosen, ControlSegment
from lbapp.control.limits import DEFAULTS
from lbapp.control.messages import AppQuery, AppReply, Binding, Closed, Delete, Edit, Error, Reason, SwitchUp
from lbapp.control.statistics import Refusal
from tests.playbook import host, member, query, replied, seen, up

GET = b"GET %s HTTP/1.1\r\nHost: shop.example\r\n\r\n"
IMAGES = L7Policy(name="images", action=PolicyAction.REDIRECT_TO_POOL, redirect_pool="img", rules=(
    L7Rule(type=RuleType.PATH, compare_type=CompareType.STARTS_WITH, value="/img"),))
AWAY = L7Policy(name="away", action=PolicyAction.REDIRECT_TO_URL, redirect_url="https://x.example/", rules=(
    L7Rule(type=RuleType.PATH, compare_type=CompareType.EQUAL_TO, value="/away"),))
NEVER = L7Policy(name="never", action=PolicyAction.REJECT, rules=(
    L7Rule(type=RuleType.PATH, compare_type=CompareType.EQUAL_TO, value="/never"),))


def configuration(*, image_fields: dict[str, Any] | None = None, algorithm: Algorithm = Algorithm.ROUND_ROBIN,
                  **fields: Any) -> Configuration:
    server = VirtualServer(**{"name": "web", "vip_address": "192.0.2.1", "protocol": Protocol.TCP, "protocol_port": 80,
                              "number": 1, "default_pool_id": "p", "application": Application.HTTP,
                              "l7_policies": (IMAGES, AWAY, NEVER), **fields})
    return Configuration(virtual_servers={"v": server}, pools={
        "p": Pool(name="web", members=(member(1), member(2)), lb_algorithm=algorithm),
        "i": Pool(name="img", members=(member(3),), lb_algorithm=algorithm, **(image_fields or {}))})


def control(made: Configuration | None = None, members: int = 3) -> ControlSegment:
    found = ControlSegment(made or configuration())
    found.handle(up(members), 0.0)
    for number in range(1, members + 1):
        found.handle(seen(number), 0.0)
    return found


def said(serial: int, path: bytes = b"/", **fields: Any) -> AppQuery:
    return AppQuery(query(serial), 1, 2, b"", **{"data": GET % path, **fields})


def chosen_member(reply: AppReply) -> int:
    assert reply.reply is not None
    assert reply.reply.error is Error.OK
    assert reply.binding is Binding.SPLICE
    assert reply.reply.translation is not None
    assert reply.reply.translation.host == host(reply.reply.member)
    return reply.reply.member


def test_the_policy_names_the_pool() -> None:
    segment = control()
    assert [chosen_member(segment.app_query(said(number), 0.0)) for number in (1, 3, 5)] == [1, 2, 1]
    assert [chosen_member(segment.app_query(said(number, b"/img/a"), 0.0)) for number in (7, 9)] == [3, 3]
    assert segment.chosen(1, 7) == Chosen("images", "GET shop.example/img/a", Binding.SPLICE)
    assert segment.chosen(1, 1) == Chosen("", "GET shop.example/", Binding.SPLICE)
    assert segment.chosen(1, 99) is None and segment.chosen(2, 7) is None
    ended = Closed(7, 1, 1, Reason.SHUTDOWN, False, True, 8, 900, 0.01)
    for switch in (2, 1):
        assert segment.chosen(1, 7) is not None
        segment.handle(Delete(switch, (ended, ended._replace(serial=99))), 0.0)
    assert segment.chosen(1, 7) is None and segment.chosen(1, 1) is not None, "only of those that are open"
    assert segment.virtual_server_counters(1).opened == 5
    assert segment.member_counters(3).opened == 2


def test_half_a_request_is_asked_about_again_and_not_for_ever() -> None:
    segment = control()
    assert segment.app_query(said(1, data=b"GET / HT"), 0.0) == AppReply(query(1))
    last = segment.app_query(said(1, data=b"GET / HT", timed_out=True), 0.0)
    assert last.answer.startswith(b"HTTP/1.1 408 ")
    assert last.reply is not None and last.reply.error is Error.NOTAVAIL
    assert segment.statistics().refused == {(1, Refusal.ANSWERED): 1}
    assert chosen_member(segment.app_query(said(3, timed_out=True), 0.0)) == 1, "it was all there"


def test_members_whose_hosts_adopt_connections_are_handed_them() -> None:
    segment = control()
    segment.adopting = frozenset({("10.0.0.2", 8080), ("10.0.0.3", 80)})
    found = {}
    for number in (1, 3):
        reply = segment.app_query(said(number), 0.0)
        assert reply.reply is not None
        found[reply.reply.member] = reply.binding
    assert found == {1: Binding.SPLICE, 2: Binding.HANDOFF}
    assert segment.chosen(1, 3) == Chosen("", "GET shop.example/", Binding.HANDOFF)
    assert segment.app_query(said(5, b"/img"), 0.0).binding is Binding.SPLICE, "announced for another port"
    told_otherwise = control(configuration(binding=Wanted.SPLICE))
    told_otherwise.adopting = segment.adopting
    assert {told_otherwise.app_query(said(number), 0.0).binding for number in (1, 3)} == {Binding.SPLICE}


def test_who_closes_after_the_first_answer_gets_a_changed_request_and_is_spliced() -> None:
    segment = control(configuration(close_after_first=True))
    segment.adopting = frozenset({("10.0.0.1", 80), ("10.0.0.2", 80), ("10.0.0.2", 8080), ("10.0.0.1", 8080)})
    found = segment.app_query(said(1), 0.0)
    assert (found.binding, found.edit) == (Binding.SPLICE, Edit(len(GET % b"/") - 2, 0, b"Connection: close\r\n"))
    assert segment.chosen(1, 1) == Chosen("", "GET shop.example/", Binding.SPLICE)
    found = segment.app_query(said(3, data=b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), 0.0)
    assert (found.binding, found.edit) == (Binding.HANDOFF, None), "nothing is to be changed"
    assert segment.app_query(said(5, b"/away"), 0.0).edit is None


def test_answers_and_rejections_reach_no_member() -> None:
    segment = control()
    assert b"Location: https://x.example/" in segment.app_query(said(1, b"/away"), 0.0).answer
    assert segment.app_query(said(3, data=b"\0\0\0\0\r\n\r\n"), 0.0).answer.startswith(b"HTTP/1.1 400 ")
    rejected = segment.app_query(said(5, b"/never"), 0.0)
    assert rejected.reply is not None and rejected.reply.error is Error.NOTAVAIL
    assert rejected.answer == b""
    assert segment.statistics().refused == {(1, Refusal.ANSWERED): 2, (1, Refusal.REJECTED): 1}
    assert segment.virtual_server_counters(1).opened == 0


def test_members_that_failed_are_not_selected_again() -> None:
    segment = control()
    assert chosen_member(segment.app_query(said(1), 0.0)) == 1
    assert chosen_member(segment.app_query(said(3, failed=(1,)), 0.0)) == 2
    none_left = segment.app_query(said(5, failed=(1, 2)), 0.0)
    assert none_left.answer.startswith(b"HTTP/1.1 503 ")
    few = control(members=3)
    few._limits = DEFAULTS._replace(attempts=1)
    assert few.app_query(said(1, failed=(1,)), 0.0).answer.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(("fields", "error"), [({"maintenance": True}, Error.NOTAVAIL),
                                                ({"connection_limit": 0}, Error.CONNLIMIT)])
def test_what_takes_no_connections_says_so(fields: dict[str, Any], error: Error) -> None:
    reply = control(configuration(**fields)).app_query(said(1), 0.0)
    assert reply.reply is not None and reply.reply.error is error
    assert reply.answer.startswith(b"HTTP/1.1 503 ")


def test_a_pool_without_members_and_a_disabled_one() -> None:
    assert control(configuration(image_fields={"admin_state_up": False})).app_query(
        said(1, b"/img"), 0.0).answer.startswith(b"HTTP/1.1 503 ")
    assert control(members=2).app_query(said(1, b"/img"), 0.0).answer.startswith(b"HTTP/1.1 503 ")
    assert control(configuration(default_pool_id=None)).app_query(said(1), 0.0).answer.startswith(b"HTTP/1.1 503 ")
    assert chosen_member(control(configuration(default_pool_id=None)).app_query(said(1, b"/img"), 0.0)) == 3


def test_unknown_virtual_servers_and_those_that_do_not_read() -> None:
    segment = control(configuration(application=Application.L4, l7_policies=()))
    reply = segment.app_query(said(1), 0.0)
    assert reply.reply is not None and reply.reply.error is Error.UNKNOWN
    assert replied(segment, query(3), 0.0).error is Error.OK
    # And a first packet alone is no answer where the request decides.
    assert replied(control(), query(1), 0.0).error is Error.NOTAVAIL
    unknown = control().app_query(said(1)._replace(query=query(1, virtual_server=9)), 0.0)
    assert unknown.reply is not None and unknown.reply.error is Error.UNKNOWN


def test_connections_are_counted_where_that_matters() -> None:
    segment = control(configuration(algorithm=Algorithm.LEAST_CONNECTIONS, connection_limit=2))
    assert {chosen_member(segment.app_query(said(number), 0.0)) for number in (1, 3)} == {1, 2}
    assert segment.app_query(said(5), 0.0).answer.startswith(b"HTTP/1.1 503 ")
    segment.handle(Delete(1, (Closed(1, 1, 1, Reason.SHUTDOWN),)), 1.0)
    assert chosen_member(segment.app_query(said(7), 1.0)) == 1
    # The client's port again: the old connection is over.
    again = said(9)._replace(query=query(9, client=7))
    assert chosen_member(segment.app_query(again, 2.0)) in (1, 2)
    assert segment.virtual_server_counters(1).active == 2


def test_another_pool_is_known_by_its_new_members_at_once() -> None:
    segment = control()
    assert chosen_member(segment.app_query(said(1, b"/img"), 0.0)) == 3
    changed = configuration()
    pools = {"p": Pool(name="web", members=(member(1),)), "i": Pool(name="img", members=(member(2), member(3)))}
    segment.configure(Configuration(virtual_servers=changed.virtual_servers, pools=pools), 1.0)
    found = {chosen_member(segment.app_query(said(number, b"/img"), 1.0)) for number in (11, 13, 15)}
    assert found == {2, 3}


def test_what_is_remembered_is_bounded() -> None:
    segment = control()
    segment._limits = DEFAULTS._replace(chosen=3)
    for number in range(1, 12, 2):
        segment.app_query(said(number), 0.0)
    assert [segment.chosen(1, number) is None for number in range(1, 12, 2)] == [True, True, True, False, False, False]


def test_a_switch_that_nobody_knows() -> None:
    segment = ControlSegment(configuration())
    assert segment.app_query(said(1), 0.0).answer.startswith(b"HTTP/1.1 503 ")
    segment.handle(SwitchUp(1, {}), 0.0)
    assert segment.app_query(said(3), 0.0).answer.startswith(b"HTTP/1.1 503 ")
