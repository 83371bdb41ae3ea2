# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A new configuration: what survives it, what goes, and that it costs what changed."""

from __future__ import annotations

import time

import msgspec
import pytest

from lbapp.config.model import Algorithm, Configuration, Member, Network, Pool, Protocol, State, VirtualServer
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import Error, SwitchUp
from lbapp.control.services import Change, Services
from lbapp.control.statistics import Counters, Refusal
from tests.playbook import ACK, Playbook, accepted, member, query, refused, seen, site, up


def started(configuration: Configuration, members: int = 3) -> Playbook:
    play = Playbook(configuration)
    (play >> up(members)).ignore()
    for number in range(1, members + 1):
        play >> seen(number)
    return play


def shop(*numbers: int, pool: str = "p", members: int = 2, **fields) -> Configuration:
    """Virtual servers of these numbers, all with one pool."""
    one = site(members, **fields)
    server = one.virtual_servers["v"]
    return msgspec.structs.replace(one, virtual_servers={
        f"v{n}": msgspec.structs.replace(server, name=f"web{n}", vip_address=f"192.0.2.{n}", number=n,
                                         default_pool_id=pool) for n in numbers})


# ------------------------------------------------------------------ what survives


def test_selection_goes_on_where_it_was():
    play = started(site(3))
    play >> query(1) << accepted(1, 1)
    play.configure(site(3, description="the same members")).none()
    play >> query(2) << accepted(2, 2)
    play.configure(site(3, pool={"description": "another pool object"})).none()
    play >> query(3) << accepted(3, 3)
    play.configure(site(2)) << "HostChanged switch 1 10.0.0.3 lost"
    play >> query(4) << accepted(4, 1)


def test_another_algorithm_begins_anew():
    play = started(site(3))
    play >> query(1) << accepted(1, 1)
    play.configure(site(3, algorithm=Algorithm.WEIGHTED_ROUND_ROBIN)).none()
    play >> query(2) << accepted(2, 1)


def test_counters_go_on():
    play = started(site(2), 2)
    play >> query(1) << accepted(1, 1)
    play >> query(2, flags=ACK) << refused(2, Error.UNKNOWN)
    play.configure(site(2, maintenance=True)).none()
    play >> query(3) << refused(3, Error.NOTAVAIL)
    assert play.control.virtual_server_counters(1) == Counters(1, 0, 0, 0, 0)
    assert play.control.statistics().refused == {(1, Refusal.UNKNOWN): 1, (1, Refusal.NOTAVAIL): 1}


@pytest.mark.parametrize("change", [
    {"maintenance": True}, {"admin_state_up": False}, {"connection_limit": 0}, {"default_pool_id": None},
    {"protocol_port": 81}, {"state": State.CONNTRACK, "connection_limit": 5}, {"pool": {"admin_state_up": False}},
    {"members": [member(1, admin_state_up=False), member(2)]}, {"members": [member(1, weight=0), member(2)]},
    {"algorithm": Algorithm.SOURCE_IP},
])
def test_established_connections_survive(change):
    play = started(site(2, state=State.RULES), 2)
    play >> query(1) << accepted(1, 1)
    play.configure(site(**({"count": 2, "state": State.RULES} | change))).ignore()
    assert [(c.serial, c.member) for c in play.control.connections()] == [(1, 1)]
    assert play.control.active(1) == 1


def test_the_same_configuration_in_other_objects_changes_nothing():
    play = started(site(2, state=State.RULES), 2)
    play >> query(1) << accepted(1, 1)
    play.configure(site(2, state=State.RULES)).none()
    play >> query(2) << accepted(2, 2)
    assert len(list(play.control.connections())) == 2


# ------------------------------------------------------------------ what goes


def test_a_virtual_server_that_is_removed_takes_its_rules_and_counters_along():
    play = started(shop(1, 2, state=State.RULES), 2)
    play >> query(1) << accepted(1, 1)
    play >> query(2, virtual_server=2) << accepted(2, 1)
    play >> query(3, flags=ACK) << refused(3, Error.UNKNOWN)
    play.configure(shop(2, state=State.RULES)) << "Reap switch 1 serial 1 of 1/1 (final)"
    assert [c.serial for c in play.control.connections()] == [2]
    play >> query(4) << refused(4, Error.UNKNOWN)
    statistics = play.control.statistics()
    assert set(statistics.virtual_servers) == {2}
    assert statistics.refused == {(0, Refusal.UNKNOWN): 1}
    assert play.control.active(1) == 1


def test_a_member_that_is_removed_takes_its_rules_along():
    play = started(site(2, state=State.RULES), 2)
    for serial in range(1, 5):
        (play >> query(serial)).ignore()
    play.configure(site(members=[member(2)], state=State.RULES))
    play << "Reap switch 1 serial 1 of 1/1 (final)" << "Reap switch 1 serial 3 of 1/1 (final)"
    play << "HostChanged switch 1 10.0.0.1 lost"
    assert set(play.control.statistics().members) == {2}
    play >> query(5) << accepted(5, 2)


def test_a_member_is_removed_from_a_pool_that_its_virtual_server_left():
    one, other = site(2, state=State.RULES), site(1, members=[member(3)])
    both = {"p": one.pools["p"], "q": other.pools["p"]}
    left = msgspec.structs.replace(one.virtual_servers["v"], default_pool_id="q")
    play = started(msgspec.structs.replace(one, pools=both))
    play >> query(1) << accepted(1, 1)
    play.configure(msgspec.structs.replace(one, virtual_servers={"v": left}, pools=both)).ignore()
    assert play.control.active(1) == 1
    play.configure(msgspec.structs.replace(one, virtual_servers={"v": left}, pools={"q": both["q"]}))
    play << "Reap switch 1 serial 1 of 1/1 (final)"
    play.ignore()


def test_with_conntrack_nothing_is_reaped():
    play = started(site(2, connection_limit=9), 2)
    play >> query(1) << accepted(1, 1, tracked=True)
    play.configure(Configuration()).ignore()
    assert list(play.control.connections()) == []
    assert play.control.statistics().virtual_servers == {}


def test_what_need_not_be_counted_any_more_is_not():
    play = started(site(2, connection_limit=9), 2)
    play >> query(1) << accepted(1, 1, tracked=True)
    play.configure(site(2)).none()
    assert play.control.active(1) == 0
    play >> query(2) << accepted(2, 2)


def test_a_number_that_another_virtual_server_gets_begins_at_zero():
    play = started(shop(1, state=State.RULES), 2)
    play >> query(1) << accepted(1, 1)
    play.configure(msgspec.structs.replace(shop(1), virtual_servers={"new": shop(1).virtual_servers["v1"]}))
    play << "Reap switch 1 serial 1 of 1/1 (final)"
    assert play.control.virtual_server_counters(1) == Counters(0, 0, 0, 0, 0)
    play >> query(2) << accepted(2, 1)


def test_a_virtual_server_may_get_another_number():
    play = started(shop(1), 2)
    play >> query(1) << accepted(1, 1)
    renumbered = {"v1": msgspec.structs.replace(shop(1).virtual_servers["v1"], number=5)}
    play.configure(msgspec.structs.replace(shop(1), virtual_servers=renumbered)).none()
    play >> query(2) << refused(2, Error.UNKNOWN)
    play >> query(3, virtual_server=5) << accepted(3, 1)


# ------------------------------------------------------------------ next hops


def test_a_next_hop_stays_while_anybody_needs_it():
    play = started(shop(1, 2), 2)
    play.configure(shop(2)).none()
    assert set(play.control.hosts(1)) == {"10.0.0.1", "10.0.0.2"}
    play.configure(Configuration())
    play << "HostChanged switch 1 10.0.0.1 lost" << "HostChanged switch 1 10.0.0.2 lost"


def test_networks_change_who_is_next():
    inside = Network(name="inside", cidr="10.0.9.0/24", address="10.0.9.1", gateway="10.0.9.254")
    play = started(site(1), 1)
    play.configure(site(1, networks=[inside])) << "HostChanged switch 1 10.0.0.1 lost" << "Probe switch 1 10.0.9.254"
    play >> query(1) << refused(1, Error.NOTAVAIL)
    play.configure(site(1)) << "Probe switch 1 10.0.0.1"
    (play >> seen(1)).ignore()
    play >> query(2) << accepted(2, 1)


def test_a_virtual_server_that_is_added_finds_members_that_others_have():
    play = started(shop(1), 2)
    play.configure(shop(1, 2)).none()
    play >> query(1, virtual_server=2) << accepted(1, 1)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("configuration", "words"), [
    (shop(0), "virtual server web0 has no number"),
    (site(members=[member(0, address="10.0.0.1")]), "member 10.0.0.1 has no number"),
    (site(members=[member(1), member(1, address="10.0.0.9")]), "member number 1 is taken"),
    (Configuration(virtual_servers={"a": shop(4).virtual_servers["v4"], "b": shop(4).virtual_servers["v4"]}),
     "number 4 is taken"),
    (Configuration(virtual_servers={"v1": shop(1).virtual_servers["v1"], "b": shop(1).virtual_servers["v1"]}),
     "number 1 is taken"),
])
def test_resources_without_a_number_of_their_own_change_nothing(configuration, words):
    play = started(shop(1), 2)
    with pytest.raises(ValueError, match=words):
        play.control.configure(configuration, 0.0)
    play >> query(1) << accepted(1, 1)
    play.configure(shop(1, 2)).none()


# ------------------------------------------------------------------ what is compared


def test_a_change_says_no_more_than_what_changed():
    services = Services()
    first = services.update(shop(1, 2))
    assert (sorted(first.changed), first.wanted, first.unwanted) == ([1, 2], ["10.0.0.1", "10.0.0.2"], [])
    assert services.update(shop(1, 2)) == Change([], [], set(), set(), [], []), "equal values are the same"
    assert services.update(shop(1, 2, members=3)) == Change([], [1, 2], set(), set(), ["10.0.0.3"], [])
    moved = shop(1, 2, members=3)
    moved = msgspec.structs.replace(moved, virtual_servers={
        **moved.virtual_servers, "v2": msgspec.structs.replace(moved.virtual_servers["v2"], description="x")})
    assert services.update(moved) == Change([], [2], set(), set(), [], [])
    assert services.update(shop(1)) == Change([2], [1], set(), {3}, [], ["10.0.0.3"])
    assert list(services.users("10.0.0.1")) == [1]
    assert services.update(Configuration()) == Change([1], [], set(), {1, 2}, [], ["10.0.0.1", "10.0.0.2"])
    assert list(services.users("10.0.0.1")) == []


# ------------------------------------------------------------------ what it costs


def many(count: int) -> Configuration:
    pools, servers = {}, {}
    for n in range(count):
        pools[f"p{n}"] = Pool(name=f"p{n}", members=tuple(
            Member(address=f"10.{n // 250}.{n % 250}.{k}", protocol_port=80, number=5 * n + k) for k in range(1, 6)))
        servers[f"v{n}"] = VirtualServer(name=f"v{n}", vip_address=f"192.{n // 65536}.{n // 256 % 256}.{n % 256 or 1}",
                                         protocol=Protocol.TCP, protocol_port=80, number=n + 1, default_pool_id=f"p{n}")
    return Configuration(virtual_servers=servers, pools=pools)


def test_one_change_among_ten_thousand_virtual_servers():
    """It costs some milliseconds, where all of it takes half a second: compared with that, for machines differ."""
    configuration = many(10_000)
    begin = time.perf_counter()
    control = ControlSegment(configuration)
    whole = time.perf_counter() - begin
    control.handle(SwitchUp(1, {}), 0.0)
    took = []
    for turn in range(7):
        pools = dict(configuration.pools)
        pools["p77"] = Pool(name="p77", members=pools["p77"].members[turn % 2:])
        servers = dict(configuration.virtual_servers)
        servers["v99"] = msgspec.structs.replace(servers["v99"], description=str(turn))
        following = Configuration(virtual_servers=servers, pools=pools)
        begin = time.perf_counter()
        control.configure(following, 0.0)
        took.append(time.perf_counter() - begin)
    assert min(took) < whole / 20, (took, whole)
