# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is known again (:mod:`lbapp.control.persistence`, :mod:`lbapp.control.choosing`), as transcripts."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from lbapp.config.model import Application, Configuration, L7Policy, PolicyAction, Pool, Protocol, State, VirtualServer
from lbapp.config.pool import Algorithm, Member, Override, Persistence, PersistenceType, Waiting
from lbapp.config.routing import Routes
from lbapp.control.choosing import admits
from lbapp.control.engine import ControlSegment, Limits
from lbapp.control.l7.values import missing, value
from lbapp.control.messages import AppQuery, AppReply, Error, Host, Query, SwitchUp
from lbapp.control.persistence import Clients, Kept, Keys
from lbapp.dataflow.distribution import distribution
from lbapp.dataflow.fastpath.layout import Mode
from tests.hellos import extension, hello, server_name
from tests.playbook import Playbook, accepted, closed, host, member, query, refused, replied, site, up

SOURCE = Persistence(type=PersistenceType.SOURCE_IP)


def started(count: int = 3, limits: Limits | None = None, persistence: Persistence | None = SOURCE,
            **fields: Any) -> Playbook:
    pool = {"persistence": persistence, **fields.pop("pool", {})}
    play = Playbook(site(count, pool=pool, **fields), limits)
    (play >> up(count)).ignore()
    return play


def changed(play: Playbook, *members: Member, persistence: Persistence | None = SOURCE, **pool: Any) -> Playbook:
    """The same site with these members."""
    play.configure(site(members=members, pool={"persistence": persistence, **pool})).ignore()
    return play


def from_address(serial: int, address: str, port: int = 5000, **fields: Any) -> Query:
    packed = ipaddress.ip_address(address).packed
    asked = query(serial, **fields)
    return asked._replace(signature=asked.signature._replace(source=packed, source_port=port))


# ------------------------------------------------------------------ by address


def test_a_client_meets_its_member_again_and_others_take_turns() -> None:
    play = started()
    play >> query(1, client=1) << accepted(1, 1)
    play >> query(2, client=2) << accepted(2, 2)
    play >> from_address(3, "198.51.100.1") << accepted(3, 1)
    play >> query(4, client=3) << accepted(4, 3)
    play >> from_address(5, "198.51.100.2") << accepted(5, 2)
    assert [(one.shown, one.member) for one in play.control.clients.listed()] == [
        ("198.51.100.1/32", 1), ("198.51.100.3/32", 3), ("198.51.100.2/32", 2)], "who was away longest is first"


def test_part_of_an_address() -> None:
    play = started(persistence=Persistence(type=PersistenceType.SOURCE_IP, prefix_length_v4=24))
    play >> from_address(1, "198.51.100.1") << accepted(1, 1)
    play >> from_address(2, "198.51.100.254") << accepted(2, 1)
    play >> from_address(3, "198.51.101.1") << accepted(3, 2)
    assert [one.shown for one in play.control.clients.listed()] == ["198.51.100.0/24", "198.51.101.0/24"]


@pytest.mark.parametrize(("length", "same", "other"), [
    (64, "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"), (56, "2001:db8:1:ff::1", "2001:db8:1:100::1"),
    (128, "2001:db8:1:2::1", "2001:db8:1:2::2"), (1, "7fff::1", "8000::1")])
def test_ipv6_prefixes(length: int, same: str, other: str) -> None:
    persistence = Persistence(type=PersistenceType.SOURCE_IP, prefix_length_v6=length)
    play = Playbook(site(members=[member(n, address=f"2001:db8::{n}") for n in (1, 2)],
                         vip_address="2001:db8:ffff::1", pool={"persistence": persistence}))
    (play >> SwitchUp(1, {f"2001:db8::{n}": Host(bytes((2, 0, 0, 0, 0, n)), n) for n in (1, 2)})).ignore()
    numbers = [replied(play.control, from_address(serial, address), 0.0).member
               for serial, address in enumerate(("2001:db8:1:2::1", same, other), 1)]
    assert numbers == [1, 1, 2]


def test_by_what_the_client_addressed() -> None:
    play = started(persistence=Persistence(type=PersistenceType.DESTINATION_IP), vip_address="0.0.0.0",
                   translate_address=False)
    found = []
    for serial, last in enumerate((1, 2, 1, 2, 3), 1):
        asked = query(serial)
        asked = asked._replace(signature=asked.signature._replace(destination=bytes((203, 0, 113, last))))
        found.append(replied(play.control, asked, 0.0).member)
    assert found == [1, 2, 1, 2, 3]


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, Mode.DECIDE), ({"persistence": SOURCE}, Mode.PUNT), ({"members": (member(1, connection_limit=5),)}, Mode.PUNT),
    ({"waiting": Waiting()}, Mode.DECIDE)])
@pytest.mark.parametrize("queries", [True, False])
def test_neither_a_switch_nor_a_fast_path_decides(fields: dict[str, Any], expected: Mode, queries: bool) -> None:
    members = fields.get("members", (member(1), member(2)))
    made = site(members=members, algorithm=Algorithm.WEIGHTED_ROUND_ROBIN,
                pool={key: value for key, value in fields.items() if key != "members"})
    server, pool = made.virtual_servers["v"], made.pools["p"]
    assert server.switch_decides(pool) is (expected is Mode.DECIDE)
    told = distribution(server, pool, members, Routes(), {f"10.0.0.{n}": host(n) for n in (1, 2)}, queries=queries)
    assert told is not None
    assert told.mode is (expected if queries or expected is Mode.DECIDE else Mode.PASS)


def test_with_rule_pairs_too() -> None:
    play = started(state=State.RULES)
    assert [replied(play.control, from_address(n, "198.51.100.1", 5000 + n), 0.0).member for n in (1, 2, 3)] == [1] * 3


# ------------------------------------------------------------------ how long, and how many


def test_a_client_is_forgotten_after_its_time_and_refreshed_by_each_connection() -> None:
    play = started(persistence=Persistence(type=PersistenceType.SOURCE_IP, timeout=100))
    play >> query(1, client=1) << accepted(1, 1)
    play.at(99) >> from_address(2, "198.51.100.1") << accepted(2, 1)
    play.at(198) >> from_address(3, "198.51.100.1", 5001) << accepted(3, 1)
    play.at(298) >> from_address(4, "198.51.100.1", 5002) << accepted(4, 2), "100 seconds are over"


def test_time_makes_room_by_itself() -> None:
    play = started(persistence=Persistence(type=PersistenceType.SOURCE_IP, timeout=10))
    for serial in range(1, 6):
        play.at(serial) >> query(serial)
        play.ignore()
    play.tick(12.0).ignore()
    assert [one.shown for one in play.control.clients.listed()] == [f"198.51.100.{n}/32" for n in (3, 4, 5)]
    play.tick(100.0).ignore()
    assert len(play.control.clients) == 0


def test_who_was_away_longest_makes_room() -> None:
    play = started(persistence=Persistence(type=PersistenceType.SOURCE_IP, limit=2))
    play >> query(1, client=1) << accepted(1, 1)
    play >> query(2, client=2) << accepted(2, 2)
    play >> from_address(3, "198.51.100.1") << accepted(3, 1)
    play >> query(4, client=3) << accepted(4, 3), "2 had to go"
    play >> from_address(5, "198.51.100.1", 5001) << accepted(5, 1)
    play >> from_address(6, "198.51.100.2") << accepted(6, 1), "it is a new one, whose turn it is"
    assert len(play.control.clients) == 2


def test_all_pools_together_have_a_bound_too() -> None:
    clients = Clients(Limits(clients=3))
    clients.configure({name: Pool(name=name, persistence=SOURCE) for name in ("a", "b")})
    for number in range(3):
        clients.bind("a", bytes((1, 1, 1, number)), 1, float(number))
    clients.bind("b", b"\1\1\1\1", 2, 3.0)
    assert len(clients) == 3
    assert clients.member("a", bytes((1, 1, 1, 0)), 4.0) == 0, "the oldest of the largest"
    clients.bind("b", b"\1\1\1\2", 2, 5.0)
    assert clients.member("b", b"\1\1\1\1", 5.0) == 0, "the oldest of its own, where there is one"


def test_a_limit_that_is_lowered_holds_at_once() -> None:
    play = started()
    for serial in range(1, 6):
        (play >> query(serial)).ignore()
    changed(play, *(member(n) for n in (1, 2, 3)), persistence=Persistence(type=PersistenceType.SOURCE_IP, limit=2))
    assert [one.shown for one in play.control.clients.listed()] == ["198.51.100.4/32", "198.51.100.5/32"]


def test_what_pools_remember_has_nothing_to_do_with_each_other() -> None:
    server = VirtualServer(name="w", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=81, number=2,
                           default_pool_id="q")
    one = site(2, pool={"persistence": SOURCE})
    both = Configuration(virtual_servers={**one.virtual_servers, "w": server}, pools={
        **one.pools, "q": Pool(name="others", members=(member(3), member(4)), persistence=SOURCE)})
    play = Playbook(both)
    (play >> up(4)).ignore()
    play >> from_address(1, "198.51.100.1") << accepted(1, 1)
    play >> from_address(2, "198.51.100.1", virtual_server=2) << accepted(2, 3)
    play >> from_address(3, "198.51.100.9") << accepted(3, 2)
    play >> from_address(4, "198.51.100.1", 5001, virtual_server=2) << accepted(4, 3)
    assert play.control.clients.clear("p") == 2
    play >> from_address(5, "198.51.100.1", 5002, virtual_server=2) << accepted(5, 3)


# ------------------------------------------------------------------ members that are not what they were


def known_to_one() -> Playbook:
    play = started()
    play >> from_address(1, "198.51.100.1") << accepted(1, 1)
    return play


@pytest.mark.parametrize("fields", [{"draining": True}, {"weight": 0}])
def test_a_member_that_drains_lets_its_clients_in_where_the_pool_says_so(fields: dict[str, Any]) -> None:
    play = changed(known_to_one(), member(1, **fields), member(2), member(3))
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 1)
    play >> from_address(3, "198.51.100.7") << accepted(3, 2), "nobody else"
    strict = Persistence(type=PersistenceType.SOURCE_IP, while_draining=False)
    changed(play, member(1, **fields), member(2), member(3), persistence=strict)
    play >> from_address(4, "198.51.100.1", 5002) << accepted(4, 3)
    changed(play, member(1), member(2), member(3), persistence=strict)
    play >> from_address(5, "198.51.100.1", 5003) << accepted(5, 3), "it has another one now"


@pytest.mark.parametrize(("fields", "default", "strict", "stubborn"), [
    ({}, True, True, True), ({"draining": True}, True, False, True), ({"weight": 0}, True, False, True),
    ({"health": Override.DOWN}, False, False, True), ({"admin_state_up": False}, False, False, False),
    ({"health": Override.DOWN, "draining": True}, False, False, True)])
def test_whom_a_member_admits(fields: dict[str, Any], default: bool, strict: bool, stubborn: bool) -> None:
    kinds = [SOURCE, Persistence(type=PersistenceType.SOURCE_IP, while_draining=False),
             Persistence(type=PersistenceType.SOURCE_IP, while_down=True)]
    assert [admits(one, member(1, **fields)) for one in kinds] == [default, strict, stubborn]


def test_only_members_that_drain_are_left() -> None:
    play = changed(known_to_one(), member(1, draining=True))
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 1)
    play >> from_address(3, "198.51.100.7") << refused(3, Error.NOTAVAIL)


def test_never_to_a_member_that_is_down_unless_told_so() -> None:
    down = (member(1, health=Override.DOWN), member(2), member(3))
    play = changed(known_to_one(), *down)
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 2)
    stubborn = Persistence(type=PersistenceType.SOURCE_IP, while_down=True)
    play = changed(known_to_one(), *down, persistence=stubborn)
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 1)
    drained = Persistence(type=PersistenceType.SOURCE_IP, while_down=True, while_draining=False)
    play = changed(known_to_one(), member(1, health=Override.DOWN, draining=True), member(2), persistence=drained)
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 2)


def test_never_to_a_member_that_is_disabled() -> None:
    anything = Persistence(type=PersistenceType.SOURCE_IP, while_down=True, while_draining=True)
    play = changed(known_to_one(), member(1, admin_state_up=False), member(2), persistence=anything)
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 2)


def test_a_member_that_is_gone_or_cannot_be_reached() -> None:
    play = changed(known_to_one(), member(2), member(3))
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 2)
    play = known_to_one()
    (play >> SwitchUp(2, {"10.0.0.2": host(2)})).ignore()
    play >> from_address(2, "198.51.100.1", switch=2) << accepted(2, 2)


def test_another_kind_of_key_is_another_beginning() -> None:
    play = changed(known_to_one(), member(1), member(2), persistence=Persistence(
        type=PersistenceType.SOURCE_IP, prefix_length_v4=24))
    assert len(play.control.clients) == 0
    changed(play, member(1), member(2), persistence=None)
    assert play.control.clients.keys("p") is None
    (play >> from_address(2, "198.51.100.1", 5001)).ignore()
    assert len(play.control.clients) == 0


# ------------------------------------------------------------------ members with limits


def test_members_that_are_full_are_passed_over() -> None:
    play = Playbook(site(members=[member(1, connection_limit=1), member(2), member(3, connection_limit=1)]))
    (play >> up(3)).ignore()
    for serial, number in enumerate((1, 2, 3, 2, 2, 2), 1):
        play >> query(serial) << accepted(serial, number, tracked=True)
    (play >> closed(1, 1)).none()
    play >> query(7) << accepted(7, 1, tracked=True)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_no_algorithm_gives_a_member_more_than_it_may_have(algorithm: Algorithm) -> None:
    play = Playbook(site(algorithm=algorithm, members=[
        member(1, connection_limit=3, weight=9), member(2, connection_limit=5), member(3, connection_limit=0)]))
    (play >> up(3)).ignore()
    for serial in range(1, 9):
        assert replied(play.control, query(serial), 0.0).error is Error.OK
    assert [play.control.active(number) for number in (1, 2, 3)] == [3, 5, 0]
    play >> query(9) << refused(9, Error.CONNLIMIT)


def test_a_known_client_of_a_full_member_goes_elsewhere_or_waits_for_it() -> None:
    members = (member(1, connection_limit=1), member(2))
    play = started(members=members)
    play >> from_address(1, "198.51.100.1") << accepted(1, 1, tracked=True)
    play >> from_address(2, "198.51.100.1", 5001) << accepted(2, 2, tracked=True)
    play = started(members=members, pool={"waiting": Waiting()})
    play >> from_address(1, "198.51.100.1") << accepted(1, 1, tracked=True)
    (play >> from_address(3, "198.51.100.1", 5001)).none()
    play >> from_address(5, "198.51.100.2") << accepted(5, 2, tracked=True), "others need not"
    play >> closed(1, 1) << accepted(3, 1, tracked=True)


# ------------------------------------------------------------------ by what clients say


def reading(application: Application, persistence: Persistence, **fields: Any) -> ControlSegment:
    server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                           default_pool_id="p", application=application, **fields)
    control = ControlSegment(Configuration(virtual_servers={"v": server}, pools={
        "p": Pool(name="web", members=tuple(member(n) for n in (1, 2, 3)), persistence=persistence)}))
    control.handle(up(3), 0.0)
    return control


def goes(control: ControlSegment, serial: int, data: bytes, now: float = 0.0, **fields: Any) -> int:
    reply = control.app_query(AppQuery(query(serial), 1, 2, b"", data, **fields), now)
    assert reply.reply is not None and reply.reply.error is Error.OK, reply
    return reply.reply.member


def get(*lines: str, target: str = "/") -> bytes:
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: a", *lines, "", "")).encode()


def test_the_first_request_with_a_cookie_binds_it() -> None:
    control = reading(Application.HTTP, Persistence(type=PersistenceType.APP_COOKIE, key="sid"))
    assert [goes(control, n, get()) for n in (1, 3, 5)] == [1, 2, 3], "no cookie yet"
    assert len(control.clients) == 0
    assert goes(control, 7, get("Cookie: a=b; sid=x")) == 1
    assert goes(control, 9, get("Cookie: sid=y")) == 2
    assert [goes(control, n, get("Cookie: sid=x")) for n in (11, 13)] == [1, 1]
    assert goes(control, 15, get("Cookie: sid=y; sid=x")) == 2, "the first one counts"
    assert goes(control, 17, get("Cookie: sid=")) == 3, "an empty one is none"
    assert [one.shown for one in control.clients.listed()] == ["x", "y"]


def test_a_member_that_failed_is_forgotten_for_the_next_one() -> None:
    control = reading(Application.HTTP, Persistence(type=PersistenceType.HEADER, key="X-User"))
    assert goes(control, 1, get("x-user: ann")) == 1
    other = goes(control, 3, get("x-user: ann"), failed=(1,))
    assert other != 1
    assert goes(control, 5, get("x-user: ann")) == other


def test_query_parameters() -> None:
    control = reading(Application.HTTP, Persistence(type=PersistenceType.QUERY, key="user"))
    assert [goes(control, n, get(target=f"/a?b=c&user={who}")) for n, who in enumerate(("a%20b", "z", "a+b"))] == [
        1, 2, 1]


def test_long_values_are_kept_as_digests() -> None:
    control = reading(Application.HTTP, Persistence(type=PersistenceType.APP_COOKIE, key="sid"))
    one, other = "x" * 2000 + "1", "x" * 2000 + "2"
    assert [goes(control, n, get(f"Cookie: sid={said}")) for n, said in enumerate((one, other, one))] == [1, 2, 1]
    kept = [entry.key for entry in control.clients.listed()]
    assert all(len(key) == 17 for key in kept)
    shown = next(entry.shown for entry in control.clients.listed(key=one))
    assert shown.startswith("digest:")
    assert control.clients.clear(key=shown) == 1
    assert control.clients.clear(key=other) == 1


def test_tls() -> None:
    control = reading(Application.TLS, Persistence(type=PersistenceType.SNI))
    assert [goes(control, n, hello(server_name(name)))
            for n, name in enumerate((b"a.example", b"b.example", b"A.example"))] == [1, 2, 1]
    control = reading(Application.TLS, Persistence(type=PersistenceType.TLS_SESSION_ID))
    ids = (b"1" * 32, b"2" * 32, b"1" * 32, b"")
    assert [goes(control, n, hello(session=one)) for n, one in enumerate(ids)] == [1, 2, 1, 3]
    assert len(control.clients) == 2, "who presents none is not remembered"


def test_a_ticket_counts_before_the_session_id() -> None:
    persistence = Persistence(type=PersistenceType.TLS_SESSION_ID)
    assert value(persistence, hello(extension(35, b"ticket" * 30), session=b"1" * 32)) == b"ticket" * 30
    assert value(persistence, hello(extension(35, b""), session=b"1" * 32)) == b"1" * 32
    assert value(persistence, hello()) is None
    assert value(persistence, b"GET / HTTP/1.0\r\n\r\n") is None


def test_first_bytes_that_lie_behind_those_that_decide() -> None:
    persistence = Persistence(type=PersistenceType.RAW, key="4:6")
    control = reading(Application.RAW, persistence, inspect_bytes=2)
    assert control.app_query(AppQuery(query(1), 1, 2, b"", b"ABCDabc"), 0.0) == AppReply(query(1)), "more is needed"
    assert [goes(control, n, b"ABCD" + said + b"more") for n, said in enumerate((b"abcdef", b"ABCDEF", b"abcdef"), 2)
            ] == [1, 2, 1]
    assert goes(control, 9, b"ABCDabc", timed_out=True) == 3, "it will say no more: nobody in particular"
    assert missing(persistence, b"123456789") and not missing(persistence, b"1234567890")
    assert [one.shown for one in control.clients.listed()] == ["ABCDEF", "abcdef"]


def test_policies_lead_to_pools_that_remember_or_do_not() -> None:
    policy = L7Policy(name="all", action=PolicyAction.REDIRECT_TO_POOL, redirect_pool="second")
    server = VirtualServer(name="web", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                           default_pool_id="p", application=Application.HTTP, l7_policies=(policy,))
    control = ControlSegment(Configuration(virtual_servers={"v": server}, pools={
        "p": Pool(name="web", members=(member(1),)),
        "q": Pool(name="second", members=(member(2), member(3)), persistence=SOURCE)}))
    control.handle(up(3), 0.0)
    asked = AppQuery(from_address(1, "198.51.100.1"), 1, 2, b"", get())
    for _ in range(3):
        reply = control.app_query(asked, 0.0).reply
        assert reply is not None and reply.member == 2


# ------------------------------------------------------------------ shown, cleared, kept


def test_keys_are_written_and_read_again() -> None:
    keys = Keys(Persistence(type=PersistenceType.APP_COOKIE, key="a"))
    for said in (b"plain", b"\0\1\2", b"hex:41", b"digest:x", b"x" * 33, "ü".encode()):
        key = keys.said(said)
        assert key is not None
        assert keys.typed(keys.shown(key)) == key, said
    assert keys.said(b"") is None and keys.said(None) is None
    assert keys.typed("hex:zz") == keys.said(b"hex:zz")
    assert keys.typed("digest:00") is None
    addresses = Keys(Persistence(type=PersistenceType.SOURCE_IP, prefix_length_v4=8, prefix_length_v6=32))
    assert addresses.typed("10.1.2.3") == b"\x0a\0\0\0" == addresses.typed("10.0.0.0/8")
    assert addresses.shown(bytes.fromhex("20010db8") + bytes(12)) == "2001:db8::/32"
    assert addresses.typed("nobody") is None


def test_clearing() -> None:
    play = started()
    for serial in range(1, 7):
        (play >> query(serial)).ignore()
    clients = play.control.clients
    assert clients.clear(key="198.51.100.9") == 0
    assert clients.clear(member=2, key="198.51.100.1") == 0
    assert clients.clear(key="198.51.100.1") == 1
    assert clients.clear("p", 2) == 2
    assert clients.clear("nobody") == 0
    assert [one.member for one in clients.listed()] == [3, 1, 3]
    assert [one.shown for one in clients.listed("p", 3, "198.51.100.3")] == ["198.51.100.3/32"]
    assert list(clients.listed("q")) == [] == list(clients.listed(key="nobody"))
    assert clients.clear() == 3 and len(clients) == 0


def test_what_changed_is_told_once_and_restored() -> None:
    persistence = Persistence(type=PersistenceType.SOURCE_IP, timeout=100)
    play = started(persistence=persistence)
    for serial in (1, 2, 3):
        play.at(serial) >> query(serial)
        play.ignore()
    first = play.control.clients.changes(3.0)
    assert first.cleared == () and [(one.member, one.age) for one in first.entries] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert play.control.clients.changes(3.0).entries == ()
    play.at(5) >> from_address(4, "198.51.100.1", 5001) << accepted(4, 1)
    assert play.control.clients.changes(5.0).entries == (), "a tenth of its time is soon over"
    play.at(20) >> from_address(5, "198.51.100.1", 5002) << accepted(5, 1)
    assert [one.age for one in play.control.clients.changes(20.0).entries] == [0.0]
    again = started(persistence=persistence)
    assert again.control.clients.restore(first.entries, 0.0) == 3
    play = again
    play >> from_address(1, "198.51.100.3", 5003) << accepted(1, 3)
    play >> from_address(2, "198.51.100.9", 5003) << accepted(2, 1), "the algorithm begins anew"
    play.at(98.5) >> from_address(3, "198.51.100.1", 5003) << accepted(3, 2), "its age was kept as well"


def test_what_is_not_restored() -> None:
    clients = Clients()
    clients.configure({"p": Pool(name="p", persistence=Persistence(type=PersistenceType.SOURCE_IP, timeout=100,
                                                                   limit=2))})
    keys = clients.keys("p")
    assert keys is not None
    good = Kept("p", b"\1\1\1\1", keys.kind, 1, 5.0, 100)
    assert clients.restore([good._replace(pool="q"), good._replace(kind="APP_COOKIE a"), good._replace(age=100.0),
                            good._replace(member=0)], 0.0) == 0
    assert clients.restore([good, good], 0.0) == 1, "once"
    old = good._replace(key=b"\2\2\2\2", age=50.0)
    assert clients.restore([good._replace(key=b"\3\3\3\3", age=-7.0), old], 0.0) == 2
    assert {one.key for one in clients.listed()} == {b"\2\2\2\2", b"\3\3\3\3"}, "no more than there may be"


def test_what_is_cleared_is_told_before_what_came_since() -> None:
    play = started()
    (play >> query(1, client=1)).ignore()
    play.control.clients.changes(0.0)
    play.control.clients.clear(member=1)
    (play >> query(2, client=2)).ignore()
    told = play.control.clients.changes(0.0)
    assert told.cleared == (("", 1),) and [one.member for one in told.entries] == [2]
    play.control.clients.clear(key="198.51.100.2")
    assert [one.member for one in play.control.clients.changes(0.0).entries] == [0]
    play.configure(Configuration()).ignore()
    assert play.control.clients.changes(0.0) == ((("p", 0),), ())


def test_what_nobody_keeps_is_bounded() -> None:
    clients = Clients(Limits(changes=2))
    clients.configure({"p": Pool(name="p", persistence=SOURCE)})
    for number in range(5):
        clients.bind("p", bytes((1, 1, 1, number)), 1, 0.0)
    assert clients.unkept == 3 and len(clients.changes(0.0).entries) == 2


def test_a_client_is_the_same_on_every_switch() -> None:
    play = started()
    (play >> up(3, switch=2)).ignore()
    play >> from_address(1, "198.51.100.1") << accepted(1, 1)
    play >> from_address(2, "198.51.100.1", switch=2) << accepted(2, 1)
