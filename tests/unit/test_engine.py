# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The control segment's answers to QUERY, as transcripts: every branch of the table in engine.py."""

from __future__ import annotations

from collections import Counter

import pytest

from lbapp.config.model import Algorithm, Decision, Network, Protocol, State
from lbapp.control.engine import ControlSegment
from lbapp.control.limits import Limits
from lbapp.control.messages import Error, Host, Live, Reply, SwitchDown, SwitchUp, Translation
from lbapp.control.statistics import Counters, Refusal
from tests.playbook import (
    ACK,
    ECE,
    FIN,
    PSH,
    RST,
    SYN,
    URG,
    Playbook,
    accepted,
    closed,
    host,
    member,
    no_room,
    query,
    refused,
    replied,
    seen,
    site,
    text,
    up,
)


def started(configuration, members: int = 3, limits: Limits | None = None) -> Playbook:
    """A playbook whose switch 1 has found everybody."""
    play = Playbook(configuration, limits)
    (play >> up(members)).ignore()
    for number in range(1, members + 1):
        play >> seen(number)
    return play


# ------------------------------------------------------------------ what is accepted


def test_round_robin():
    play = started(site(3))
    for serial in range(1, 8):
        play >> query(serial) << accepted(serial, (serial - 1) % 3 + 1)


def test_a_reply_holds_all_of_its_query():
    play = started(site(1))
    asked = query(7)
    play >> asked << Reply(asked, Error.OK, 1, Translation(bytes((10, 0, 0, 1)), 8080, host(1)), True, False)


def test_query_and_handle_are_the_same():
    one, two = started(site(3)).control, started(site(3)).control
    for serial in range(9):
        assert [one.query(query(serial), 0.0)] == two.handle(query(serial), 0.0)


@pytest.mark.parametrize(("algorithm", "tracked"), [
    (Algorithm.ROUND_ROBIN, False), (Algorithm.WEIGHTED_ROUND_ROBIN, False), (Algorithm.LEAST_CONNECTIONS, True),
    (Algorithm.SOURCE_IP, False), (Algorithm.CONSISTENT_HASH, False), (Algorithm.RANDOM_TWO_CHOICES, True),
])
def test_every_algorithm_serves_with_everybody_and_says_whether_it_counts(algorithm, tracked):
    play = started(site(3, algorithm=algorithm))
    replies = [replied(play.control, query(serial), 0.0) for serial in range(1, 301)]
    assert all(reply.error is Error.OK and reply.tracked is tracked and reply.install for reply in replies)
    shares = Counter(reply.member for reply in replies)
    assert set(shares) == {1, 2, 3}
    assert min(shares.values()) > 60
    again = started(site(3, algorithm=algorithm))
    assert [again.control.query(query(serial), 0.0) for serial in range(1, 301)] == replies, "nothing is random"


def test_weighted_round_robin():
    play = started(site(members=[member(1, weight=3), member(2)], algorithm=Algorithm.WEIGHTED_ROUND_ROBIN))
    assert "".join(str(replied(play.control, query(s), 0.0).member) for s in range(8)) == "11211121"


def test_least_connections_follows_what_opens_and_closes():
    play = started(site(2, algorithm=Algorithm.LEAST_CONNECTIONS), 2)
    play >> query(1) << accepted(1, 1, tracked=True)
    play >> query(2) << accepted(2, 2, tracked=True)
    play >> query(3) << accepted(3, 1, tracked=True)
    (play >> closed(1, 1)).none()
    (play >> closed(3, 1)).none()
    assert (play.control.active(1), play.control.active(2)) == (0, 1)
    play >> query(4) << accepted(4, 1, tracked=True)
    play >> query(5) << accepted(5, 2, tracked=True)


@pytest.mark.parametrize("fields", [{"weight": 0}, {"admin_state_up": False}, {"draining": True}])
def test_members_that_take_no_new_connections(fields):
    play = started(site(members=[member(1), member(2, **fields), member(3)]))
    for serial, number in enumerate((1, 3, 1, 3)):
        play >> query(serial) << accepted(serial, number)


def test_only_members_whose_next_hop_is_known_are_selected():
    play = Playbook(site(3))
    (play >> up(0)).ignore()
    play >> query(1) << refused(1, Error.NOTAVAIL)
    (play >> seen(2)).ignore()
    play >> query(2) << accepted(2, 2)
    (play >> seen(3)).ignore()
    play >> query(3) << accepted(3, 3)
    play >> query(4) << accepted(4, 2)


def test_a_member_that_is_lost_gets_nothing_until_it_is_found_elsewhere():
    play = started(site(2), 0)
    (play >> seen(1)).ignore()
    (play >> seen(2)).ignore()
    play >> query(1) << accepted(1, 1)
    while play.control.host(1, "10.0.0.1"):
        play.tick(round(play.now + 0.1, 6)).ignore()
        (play >> seen(2)).none()
    play >> query(2) << accepted(2, 2)
    play >> query(3) << accepted(3, 2)
    (play >> seen(1, host(9))).ignore()
    play >> query(4)
    play << "Reply 4 OK member 1 -> 10.0.0.1:8080 at 02:00:00:00:00:09/9"


def test_every_switch_has_its_own_view():
    play = started(site(2), 2)
    (play >> SwitchUp(2, {"10.0.0.2": Host(host(2).mac, 77)})).ignore()
    play >> query(1, switch=2) << "Reply 1 OK member 2 -> 10.0.0.2:8080 at 02:00:00:00:00:02/77"
    play >> query(2) << accepted(2, 1)
    play >> query(3, switch=3) << refused(3, Error.NOTAVAIL)


def test_a_switch_that_is_away_is_answered_for_as_before():
    play = started(site(1), 1)
    play >> SwitchDown(1)
    play >> query(1) << accepted(1, 1)


# ------------------------------------------------------------------ translation


@pytest.mark.parametrize(("fields", "members", "translation"), [
    ({"translate_address": False}, [member(1)], "=:8080"),
    ({"translate_port": False}, [member(1)], "10.0.0.1:="),
    ({"translate_address": False, "translate_port": False}, [member(1)], "=:="),
    ({}, [member(1, protocol_port=0)], "10.0.0.1:="),
    ({"state": State.RULES}, [member(1)], "10.0.0.1:8080"),
])
def test_what_is_translated(fields, members, translation):
    play = started(site(members=members, **fields), 1)
    play >> query(1) << f"Reply 1 OK member 1 -> {translation} at 02:00:00:00:00:01/1"


def test_route_by_next_hop():
    play = Playbook(site(2, route_by_destination=False, next_hop="10.0.0.9"))
    play >> up(0) << "Probe switch 1 10.0.0.9"
    (play >> seen(9)).ignore()
    play >> query(1) << "Reply 1 OK member 1 -> 10.0.0.1:8080 at 02:00:00:00:00:09/9"


def test_route_by_gateway():
    network = Network(name="inside", cidr="10.0.9.0/24", address="10.0.9.1", gateway="10.0.9.254")
    play = Playbook(site(1, networks=[network]))
    play >> up(0) << "Probe switch 1 10.0.9.254"


def test_members_of_the_other_family_cannot_be_translated_to():
    six = member(2, address="2001:db8::2")
    play = Playbook(site(members=[member(1), six]))
    play >> up(0) << "Probe switch 1 10.0.0.1"
    play.configure(site(members=[member(1), six], translate_address=False))
    play << "Probe switch 1 2001:db8::2"


def test_ipv6():
    play = Playbook(site(members=[member(1, address="2001:db8::1")], vip_address="2001:db8:ffff::1"))
    (play >> SwitchUp(1, {"2001:db8::1": host(1)})).ignore()
    reply = replied(play.control, query(1), 0.0)
    assert reply.translation == Translation(bytes.fromhex("20010db8000000000000000000000001"), 8080, host(1))
    assert "[2001:0db8:0000:0000:0000:0000:0000:0001]:8080" in text(reply)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("fields", "pool", "error"), [
    ({"admin_state_up": False}, {}, Error.NOTAVAIL),
    ({"maintenance": True}, {}, Error.NOTAVAIL),
    ({"default_pool_id": None}, {}, Error.NOTAVAIL),
    ({"default_pool_id": "other"}, {}, Error.NOTAVAIL),
    ({}, {"admin_state_up": False}, Error.NOTAVAIL),
    ({"connection_limit": 0}, {}, Error.CONNLIMIT),
])
@pytest.mark.parametrize("state", State)
def test_refusals(fields, pool, error, state):
    play = started(site(3, pool=pool, state=state, **fields))
    play >> query(1) << refused(1, error)
    assert play.control.statistics().refused == {(1, Refusal(error.name.lower())): 1}


def test_a_port_that_nobody_serves():
    play = started(site(3))
    play >> query(1, virtual_server=0) << refused(1, Error.NOTAVAIL)
    play >> query(2, virtual_server=0, flags=ACK) << refused(2, Error.NOTAVAIL)
    assert play.control.statistics().refused == {(0, Refusal.NOTAVAIL): 2}


def test_a_virtual_server_that_is_not_configured():
    play = started(site(3))
    for serial, number in enumerate((2, 77, 2**24 - 1)):
        play >> query(serial, virtual_server=number) << refused(serial, Error.UNKNOWN)
    assert play.control.statistics().refused == {(0, Refusal.UNKNOWN): 3}, "a number nobody has needs no counter"


@pytest.mark.parametrize("flags", [0, ACK, SYN | ACK, FIN, FIN | ACK, RST, RST | ACK, SYN | FIN, SYN | RST,
                                   FIN | PSH | URG, ACK | PSH, 0xFF])
@pytest.mark.parametrize("fields", [{}, {"state": State.RULES}, {"connection_limit": 10}])
def test_tcp_that_does_not_open_a_connection_and_belongs_to_none(flags, fields):
    play = started(site(3, **fields))
    play >> query(1, flags=flags) << refused(1, Error.UNKNOWN)
    assert list(play.control.connections()) == []


def test_a_syn_with_congestion_notification_opens_a_connection():
    play = started(site(3))
    play >> query(1, flags=SYN | ECE | 0x80) << accepted(1, 1)


def test_udp_has_no_flags():
    play = started(site(3, protocol=Protocol.UDP))
    play >> query(1, protocol=17) << accepted(1, 1)
    play >> query(2, protocol=17) << accepted(2, 2)


def test_the_connection_limit_covers_all_switches():
    play = started(site(1, connection_limit=2), 1)
    (play >> up(1, switch=2)).ignore()
    play >> query(1) << accepted(1, 1, tracked=True)
    play >> query(1, switch=2) << accepted(1, 1, tracked=True)
    play >> query(3) << refused(3, Error.CONNLIMIT)
    play >> query(4, switch=2) << refused(4, Error.CONNLIMIT)
    (play >> closed(1, 1, switch=2)).none()
    play >> query(5) << accepted(5, 1, tracked=True)
    play >> query(6) << refused(6, Error.CONNLIMIT)


def test_refused_by_the_switch():
    play = started(site(1, connection_limit=1), 1)
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> no_room(1)).none()
    assert list(play.control.connections()) == []
    assert play.control.statistics().refused == {(1, Refusal.OVERFLOW): 1}
    play >> query(2) << accepted(2, 1, tracked=True)


def test_refused_by_the_switch_for_a_connection_nobody_follows():
    play = started(site(1), 1)
    play >> query(1) << accepted(1, 1)
    (play >> no_room(1)).none()
    assert play.control.statistics().refused == {(1, Refusal.OVERFLOW): 1}


def test_no_other_message_is_taken():
    with pytest.raises(TypeError, match="got Reply"):
        ControlSegment().handle(Reply(query(1), Error.OK), 0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got tuple"):
        ControlSegment().handle((), 0.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------ counters and views


def test_counters_without_following():
    play = started(site(2), 2)
    for serial in range(4):
        play >> query(serial) << accepted(serial, serial % 2 + 1)
    (play >> closed(0, 1, packets=10, octets=1000)).none()
    statistics = play.control.statistics()
    assert statistics.virtual_servers == {1: Counters(4, 1, 0, 10, 1000)}
    assert statistics.members == {1: Counters(2, 1, 0, 10, 1000), 2: Counters(2, 0, 0, 0, 0)}
    assert statistics.switches == {1: Counters(4, 1, 0, 10, 1000)}
    assert play.control.virtual_server_counters(1) == statistics.virtual_servers[1]
    assert play.control.member_counters(2) == statistics.members[2]
    assert play.control.member_counters(99) == play.control.virtual_server_counters(99) == Counters(0, 0, 0, 0, 0)


def test_nobody_can_make_counters_of_what_is_not_configured():
    play = started(site(1), 1)
    (play >> closed(5, 88, virtual_server=77, packets=1)).none()
    (play >> closed(5, 88, virtual_server=77, packets=1, switch=66)).none()
    (play >> no_room(9, switch=66)).none()
    (play >> Live(66, ((1, 1, 1),))).none()
    statistics = play.control.statistics()
    assert (set(statistics.virtual_servers), set(statistics.members), set(statistics.switches)) == (set(), set(), {1})


def test_eligible():
    configuration = site(members=[member(1), member(2, draining=True), member(3), member(4, address="2001:db8::4")],
                         decision=Decision.SWITCH)
    server, pool = configuration.virtual_servers["v"], configuration.pools["p"]
    play = started(configuration, 2)
    assert [m.number for m in play.control.eligible(1, server, pool)] == [1]
    (play >> seen(3)).ignore()
    assert [m.number for m in play.control.eligible(1, server, pool)] == [1, 3]
    assert play.control.eligible(2, server, pool) == ()
    assert play.control.eligible(1, server, None) == ()
    # A pool that is not the running configuration's is looked at as it is.
    other = site(3)
    assert [m.number for m in play.control.eligible(1, other.virtual_servers["v"], other.pools["p"])] == [1, 2, 3]
    disabled = site(3, pool={"admin_state_up": False})
    assert play.control.eligible(1, disabled.virtual_servers["v"], disabled.pools["p"]) == ()


def test_switches_remembered_are_bounded():
    play = started(site(1, connection_limit=9), 1, Limits(switches=2))
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> up(1, switch=2)).ignore()
    play >> SwitchDown(1)
    assert play.control.active(1) == 1
    (play >> up(1, switch=3)).ignore()
    assert play.control.active(1) == 0
    assert set(play.control.statistics().switches) == {2, 3}
    assert play.control.hosts(1) == {}
    play >> query(2) << refused(2, Error.NOTAVAIL)
