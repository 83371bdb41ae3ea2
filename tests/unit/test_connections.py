# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The life of connections that are followed: repeated queries, DELETE, REAP, snapshots, bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.config.model import Algorithm, Protocol, State
from lbapp.control.connections import Connection
from lbapp.control.limits import Limits
from lbapp.control.messages import (
    Closed,
    Delete,
    Error,
    Live,
    PortDown,
    Query,
    Reap,
    Reason,
    Refused,
    Stats,
    SwitchDown,
    SwitchUp,
)
from lbapp.control.statistics import Counters
from tests.playbook import (
    ACK,
    FIN,
    SYN,
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
    up,
)

REAP = "Reap switch 1 serial 1 of 1/1 (final)"


def rules(count: int = 2, *, limits: Limits | None = None, **fields) -> Playbook:
    """A switch without conntrack, that has found everybody."""
    play = Playbook(site(count, state=State.RULES, idle_timeout=60, **fields), limits)
    (play >> up(count)).ignore()
    return play


def tracked(count: int = 2, **fields) -> Playbook:
    """A virtual server that counts its connections, with conntrack in the switch."""
    play = Playbook(site(count, algorithm=Algorithm.LEAST_CONNECTIONS, **fields))
    (play >> up(count)).ignore()
    return play


def pass_time(play: Playbook, until: float, step: float = 0.5, members: int = 2) -> list:
    """Go on in time while every member answers; all REAPs on the way."""
    heard = []
    while play.now < until:
        heard += [m for m in play.tick(min(until, play.now + step)).ignore() if type(m).__name__ == "Reap"]
        for number in range(1, members + 1):
            (play >> seen(number)).ignore()
    return heard


def states(play: Playbook) -> list[tuple[int, int, bool]]:
    return [(c.serial, c.member, c.ended) for c in play.control.connections()]


# ------------------------------------------------------------------ a packet that climbs again


def test_packets_that_overtake_the_rules_are_translated_and_install_nothing():
    play = rules()
    play >> query(1) << accepted(1, 1)
    play.at(0.4) >> query(2, client=1, flags=ACK) << accepted(1, 1, installed=True)
    play.at(1.0) >> query(3, client=1) << accepted(1, 1, installed=True)
    play >> query(1) << accepted(1, 1, installed=True)
    play >> query(4, client=1, tos=0x10, flags=ACK) << accepted(1, 1, installed=True)
    assert states(play) == [(1, 1, False)]
    assert play.control.virtual_server_counters(1) == Counters(1, 0, 1, 0, 0)


def test_a_known_flow_that_climbs_later_needs_its_rules_again():
    """003: a flow in the DFS may end before the TCP session, and then a new flow starts for it."""
    play = rules()
    play >> query(1) << accepted(1, 1)
    play.at(10) >> query(2, client=1, flags=ACK) << accepted(1, 1)
    play.at(11) >> query(3, client=1, flags=ACK) << accepted(1, 1, installed=True)
    assert play.control.virtual_server_counters(1).opened == 1


def test_a_direction_that_was_closed_for_idleness_is_installed_again_at_once():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play.at(1) >> closed(1, 1, Reason.IDLE)).none()
    play >> query(2, client=1, flags=ACK) << accepted(1, 1)
    (play >> closed(1, 1, Reason.OVERFLOW, outbound=True)).none()
    play >> query(3, client=1, flags=ACK) << accepted(1, 1)
    assert play.control.active(1) == 1


def test_a_syn_long_after_is_another_session():
    play = rules()
    play >> query(1) << accepted(1, 1)
    play.at(3.5) >> query(2, client=1) << REAP << accepted(2, 2)
    assert states(play) == [(2, 2, False)]
    assert play.control.virtual_server_counters(1) == Counters(2, 1, 1, 0, 0)


def test_a_syn_after_a_shutdown_is_another_session():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play.at(0.2) >> closed(1, 1, Reason.SHUTDOWN, packets=5, octets=50)).none()
    play.at(0.3) >> query(2, client=1) << REAP << accepted(2, 2)
    (play >> closed(1, 1, Reason.SHUTDOWN, outbound=True, packets=4, octets=40)).none()
    assert play.control.virtual_server_counters(1) == Counters(2, 1, 1, 9, 90)


def test_the_same_query_twice_is_never_another_session():
    play = rules()
    play >> query(1) << accepted(1, 1)
    play.at(5) >> query(1) << accepted(1, 1)
    assert play.control.virtual_server_counters(1).opened == 1


def test_query_can_leave_a_message_for_later():
    play = rules()
    play >> query(1) << accepted(1, 1)
    assert replied(play.control, query(2, client=1), 4.0).member == 2
    play.tick(4.0)
    play << REAP
    play.ignore()


def test_the_last_packets_of_an_ended_session_are_translated():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play >> closed(1, 1, Reason.SHUTDOWN)).none()
    play >> query(2, client=1, flags=FIN | ACK) << accepted(1, 1, installed=True)


def test_maintenance_and_the_limit_are_for_new_connections():
    play = rules(connection_limit=1)
    play >> query(1) << accepted(1, 1, tracked=True)
    play >> query(2) << refused(2, Error.CONNLIMIT)
    play.configure(site(2, state=State.RULES, connection_limit=1, maintenance=True)).none()
    play.at(8) >> query(3, client=1, flags=ACK) << accepted(1, 1, tracked=True)
    play >> query(4) << refused(4, Error.NOTAVAIL)


def test_a_draining_member_keeps_its_connections():
    play = rules()
    play >> query(1) << accepted(1, 1)
    play.configure(site(members=[member(1, draining=True), member(2)], state=State.RULES)).none()
    play.at(8) >> query(2, client=1, flags=ACK) << accepted(1, 1)
    play >> query(3) << accepted(3, 2)


def test_a_member_that_moved_gets_its_connections_there():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play >> seen(1, host(9))).ignore()
    play.at(8) >> query(2, client=1, flags=ACK) << "Reply 1 OK member 1 -> 10.0.0.1:8080 at 02:00:00:00:00:09/9"


def test_a_member_that_is_lost():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play >> PortDown(1, 1)).ignore()
    (play >> seen(2)).none()
    for at in (1.0, 2.0):
        play.tick(at).ignore()
    assert play.control.host(1, "10.0.0.1") is None
    play >> query(2, client=1, flags=ACK) << refused(2, Error.NOTAVAIL)
    play >> query(3, client=1) << REAP << accepted(3, 2)


def test_udp_from_one_port_is_one_flow():
    play = rules(protocol=Protocol.UDP)
    play >> query(1, protocol=17) << accepted(1, 1)
    play.at(1) >> query(2, client=1, protocol=17) << accepted(1, 1, installed=True)
    play.at(9) >> query(3, client=1, protocol=17) << accepted(1, 1)
    (play >> closed(1, 1)).none()
    (play >> closed(1, 1, outbound=True)).none()
    play >> query(4, client=1, protocol=17) << accepted(4, 2)


def test_with_conntrack_a_flow_that_climbs_again_is_committed_again():
    play = tracked()
    play >> query(1) << accepted(1, 1, tracked=True)
    play.at(1) >> query(2, client=1) << accepted(1, 1, tracked=True)
    assert play.control.active(1) == 1
    play.at(4) >> query(3, client=1) << accepted(3, 2, tracked=True)
    assert (play.control.active(1), play.control.active(2)) == (0, 1)


def test_a_serial_that_is_given_again_replaces_the_old_connection():
    play = tracked()
    play >> query(1) << accepted(1, 1, tracked=True)
    play >> query(1, client=9) << accepted(1, 2, tracked=True)
    assert states(play) == [(1, 2, False)]
    assert play.control.virtual_server_counters(1) == Counters(2, 1, 1, 0, 0)


# ------------------------------------------------------------------ DELETE


def test_both_directions_make_one_closed_connection():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play >> closed(1, 1, Reason.IDLE, packets=10, octets=1000)).none()
    assert play.control.active(1) == 1
    (play >> closed(1, 1, Reason.IDLE, outbound=True, packets=20, octets=9000)).none()
    everywhere = Counters(1, 1, 0, 30, 10_000)
    statistics = play.control.statistics()
    assert statistics.virtual_servers == statistics.switches == {1: everywhere}
    assert statistics.members == {1: everywhere, 2: Counters(0, 0, 0, 0, 0)}
    assert states(play) == []


def test_many_in_one_message():
    play = rules()
    for serial in range(1, 5):
        (play >> query(serial)).ignore()
    (play >> Delete(1, tuple(Closed(serial, 1, 2 - serial % 2, Reason.SHUTDOWN, outbound, True, 1, 60, 0.5)
                             for serial in range(1, 5) for outbound in (False, True)))).none()
    assert play.control.virtual_server_counters(1) == Counters(4, 4, 0, 8, 480)
    assert states(play) == []


def test_a_shutdown_ends_a_connection_and_the_other_direction_is_waited_for():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play.at(1) >> closed(1, 1, Reason.SHUTDOWN)).none()
    assert play.control.active(1) == 0
    assert states(play) == [(1, 1, True)]
    assert pass_time(play, 5.5) == []
    assert [reap.serial for reap in pass_time(play, 6.0)] == [1]
    (play >> closed(1, 1, Reason.DELETED, outbound=True, packets=3, octets=30)).none()
    assert states(play) == []
    assert play.control.virtual_server_counters(1) == Counters(1, 1, 0, 3, 30)


def test_one_way_traffic_stays_alive():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play.at(60) >> closed(1, 1, Reason.IDLE)).none()
    assert play.control.active(1) == 1
    assert states(play) == [(1, 1, False)]


def test_one_that_is_not_known_leaves_its_traffic():
    play = rules()
    (play >> closed(77, 1, packets=7, octets=70)).none()
    assert play.control.virtual_server_counters(1) == Counters(0, 0, 0, 7, 70)


def test_the_switch_has_no_counters():
    play = tracked()
    play >> query(1) << accepted(1, 1, tracked=True)
    (play >> Delete(1, (Closed(1, 1, 1, Reason.SHUTDOWN, counted=False, packets=9),))).none()
    assert play.control.virtual_server_counters(1) == Counters(1, 1, 0, 0, 0)


# ------------------------------------------------------------------ REAP and STATS (003 FIGURE 19)


def test_an_idle_connection_is_asked_about_and_deleted():
    play = rules()
    play >> query(1) << accepted(1, 1)
    assert pass_time(play, 64.5) == []
    assert pass_time(play, 65.0) == [Reap(1, 1, 1, 1, final=False)]
    assert play.control.active(1) == 1, "003: the flow is active while waiting for the response"
    (play >> Delete(1, (Closed(1, 1, 1, Reason.DELETED), Closed(1, 1, 1, Reason.DELETED, True)))).none()
    assert states(play) == []
    assert pass_time(play, 80) == []


def test_a_connection_that_is_alive_has_its_timer_reset():
    play = rules()
    play >> query(1) << accepted(1, 1)
    assert len(pass_time(play, 65.0)) == 1
    (play >> Stats(1, 1, Error.CONNALIVE, 100, 5000)).none()
    assert pass_time(play, 129.5) == []
    assert len(pass_time(play, 130.0)) == 1
    (play >> Stats(1, 1, Error.CONNALIVE, 150, 7000)).none()
    (play >> closed(1, 1, Reason.SHUTDOWN, packets=90, octets=4000)).none()
    (play >> closed(1, 1, Reason.SHUTDOWN, outbound=True, packets=80, octets=4000)).none()
    assert play.control.virtual_server_counters(1) == Counters(1, 1, 0, 170, 8000), "nothing is counted twice"


def test_counters_alone_do_not_reset_the_timer():
    play = rules()
    play >> query(1) << accepted(1, 1)
    pass_time(play, 60.0)
    (play >> Stats(1, 1, Error.OK, 100, 5000)).none()
    assert play.control.virtual_server_counters(1).packets == 100
    assert len(pass_time(play, 65.0)) == 1
    (play >> Stats(1, 55, Error.CONNALIVE)).none()


def test_without_an_answer_it_is_asked_three_times_more_and_dropped():
    play = rules()
    play >> query(1) << accepted(1, 1)
    reaps = pass_time(play, 100.0)
    assert [r.serial for r in reaps] == [1, 1, 1, 1]
    assert states(play) == []
    assert play.control.statistics().unanswered == 1
    assert play.control.active(1) == 0


def test_a_switch_that_is_away_is_not_asked_and_nothing_is_concluded():
    play = rules()
    play >> query(1) << accepted(1, 1)
    play >> SwitchDown(1)
    assert pass_time(play, 1000.0, step=5) == []
    assert states(play) == [(1, 1, False)]
    (play >> SwitchUp(1, {"10.0.0.1": host(1)})).ignore()
    assert [r.serial for r in pass_time(play, 1070.0)][:1] == [1]


def test_a_hard_timeout_alone():
    play = Playbook(site(1, state=State.RULES, idle_timeout=0, hard_timeout=10))
    (play >> up(1)).ignore()
    play >> query(1) << accepted(1, 1)
    assert pass_time(play, 14.5, members=1) == []
    assert len(pass_time(play, 15.0, members=1)) == 1


def test_a_bounded_number_is_asked_about_in_one_tick():
    play = rules(limits=Limits(reaps_per_tick=10))
    for serial in range(1, 36):
        (play >> query(serial)).ignore()
    numbers = []
    for tick in range(4):
        heard = [m for m in play.tick(66.0 + tick / 10).ignore() if type(m).__name__ == "Reap"]
        numbers.append(len(heard))
    assert numbers == [10, 10, 10, 5]


# ------------------------------------------------------------------ snapshots of conntrack


def test_a_snapshot_brings_counts_back_after_a_restart():
    play = tracked()
    (play >> Live(1, ((11, 1, 1), (12, 1, 1), (13, 1, 2)))).none()
    assert (play.control.active(1), play.control.active(2)) == (2, 1)
    play >> query(1) << accepted(1, 2, tracked=True)
    (play.at(20) >> Live(1, ((11, 1, 1), (1, 1, 2)))).none()
    assert (play.control.active(1), play.control.active(2)) == (1, 1)
    assert {c.serial: c.signature is None for c in play.control.connections()} == {11: True, 1: False}


def test_a_connection_younger_than_an_interval_may_be_missing():
    play = tracked()
    play >> query(1) << accepted(1, 1, tracked=True)
    (play.at(9) >> Live(1, ())).none()
    assert play.control.active(1) == 1
    (play.at(19) >> Live(1, ())).none()
    assert play.control.active(1) == 0


def test_one_that_only_a_snapshot_told_of_goes_with_the_next():
    """Such as one that was closing while the snapshot was read."""
    play = tracked()
    (play.at(5) >> Live(1, ((5, 1, 1),))).none()
    assert play.control.active(1) == 1
    (play.at(14.9) >> Live(1, ())).none()
    assert play.control.active(1) == 0


def test_snapshots_are_needed_where_conntrack_holds_what_is_counted():
    play = tracked()
    assert play.control.counting
    play.configure(site(2)).none()
    assert not play.control.counting
    play.configure(site(2, connection_limit=4)).none()
    assert play.control.counting
    play.configure(site(2, connection_limit=4, state=State.RULES)).none()
    assert not play.control.counting


def test_snapshots_answer_instead_of_reap():
    play = tracked()
    play >> query(1) << accepted(1, 1, tracked=True)
    for at in range(10, 200, 10):
        assert pass_time(play, float(at)) == []
        (play >> Live(1, ((1, 1, 1),))).none()
    assert play.control.active(1) == 1
    heard = pass_time(play, 300.0)
    assert [r.serial for r in heard] == [1, 1, 1, 1], "snapshots stopped: asked, and dropped"
    assert play.control.active(1) == 0


def test_a_snapshot_without_the_fast_path_says_nothing_about_what_its_agent_gave():
    play = tracked()
    for serial in (1, 2):
        play >> query(serial) << accepted(serial, serial, tracked=True)
    (play.at(30) >> Live(1, (), agents=False)).none()
    assert [c.serial for c in play.control.connections()] == [1]
    (play.at(50) >> Live(1, (), agents=False)).none()
    heard = pass_time(play, 61.0)
    assert [r.serial for r in heard] == [1], "it has to be asked about"
    (play.at(62) >> Live(1, ())).none()
    assert play.control.active(1) == 0


def test_a_snapshot_adds_nothing_that_need_not_be_counted():
    play = tracked()
    (play >> Live(1, ((1, 2, 1), (2, 1, 99)))).none()
    plain = Playbook(site(1))
    (plain >> up(1)).ignore()
    (plain >> Live(1, ((1, 1, 1),))).none()
    assert states(play) == states(plain) == []


def test_a_snapshot_does_not_touch_connections_that_are_rules_or_another_switchs():
    play = rules()
    play >> query(1) << accepted(1, 1)
    (play >> up(2, switch=2)).ignore()
    play >> query(1, switch=2) << accepted(1, 1)
    (play.at(30) >> Live(1, ())).none()
    assert len(states(play)) == 2


def test_an_adopted_connection_can_be_closed_refused_and_meet_its_client_again():
    play = tracked()
    (play >> Live(1, ((5, 1, 1), (6, 1, 1), (5, 1, 1)))).none()
    (play >> closed(5, 1)).none()
    (play >> no_room(6)).none()
    assert play.control.active(1) == 0
    play >> query(1, flags=ACK) << refused(1, Error.UNKNOWN)


# ------------------------------------------------------------------ bounds


def test_the_oldest_makes_room():
    play = rules(limits=Limits(connections=3))
    (play >> up(2, switch=2)).ignore()
    play >> query(1, switch=2) << accepted(1, 1)
    for serial in range(2, 6):
        (play.at(float(serial)) >> query(serial)).ignore()
    assert [serial for serial, _, _ in states(play)] == [3, 4, 5]
    statistics = play.control.statistics()
    assert (statistics.connections, statistics.overflowed) == (3, 2)
    assert statistics.virtual_servers[1] == Counters(5, 2, 3, 0, 0)
    assert statistics.switches[2] == Counters(1, 1, 0, 0, 0)


def test_views_are_copies_and_survive_changes():
    play = rules()
    for serial in range(1, 4):
        (play >> query(serial)).ignore()
    views = play.control.connections()
    first = next(views)
    assert isinstance(first, Connection)
    assert (first.switch, first.serial, first.virtual_server, first.member, first.rules) == (1, 1, 1, 1, True)
    (play >> no_room(1)).none()
    (play >> no_room(2)).none()
    assert [view.serial for view in views] == [2, 3]


# ------------------------------------------------------------------ whatever happens

_serial = st.integers(1, 6)
_event = st.one_of(
    st.builds(lambda s, c, f, w: query(s, client=c, flags=f, switch=w), _serial, st.integers(1, 4),
              st.sampled_from([SYN, SYN, ACK, FIN | ACK]), st.integers(1, 2)),
    st.builds(lambda s, m, r, o, w, p: closed(s, m, r, outbound=o, switch=w, packets=p, octets=60 * p), _serial,
              st.integers(1, 3), st.sampled_from(Reason), st.booleans(), st.integers(1, 2), st.integers(0, 9)),
    st.builds(lambda s, w: Stats(w, s, Error.CONNALIVE, 3, 180), _serial, st.integers(1, 2)),
    st.builds(lambda s, w: no_room(s, w), _serial, st.integers(1, 2)),
    st.builds(lambda rows, w: Live(w, tuple((s, 1, m) for s, m in rows)),
              st.lists(st.tuples(_serial, st.integers(1, 4)), max_size=5), st.integers(1, 2)),
    st.builds(lambda n, p, w: seen(n, host(p), w), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)),
    st.builds(PortDown, st.integers(1, 2), st.integers(1, 4)),
    st.builds(SwitchDown, st.integers(1, 2)),
    st.builds(lambda n, w: up(n, w), st.integers(0, 3), st.integers(1, 2)),
    st.builds(lambda n, state, algorithm, limit: site(n, state=state, algorithm=algorithm, connection_limit=limit),
              st.integers(0, 3), st.sampled_from(State), st.sampled_from(Algorithm), st.sampled_from([-1, 0, 2, 5])),
    st.floats(0.1, 90.0),
)


@settings(max_examples=150)
@given(st.lists(_event, max_size=40))
def test_counts_agree_with_the_table_whatever_happens(events):
    """Never negative; active is what the table holds alive; opened less closed is active, where all is followed."""
    play = Playbook(site(3, state=State.RULES), Limits(connections=5))
    (play >> up(3)).ignore()
    (play >> up(3, switch=2)).ignore()
    for event in events:
        if isinstance(event, float):
            play.tick(play.now + event).ignore()
        elif isinstance(event, (Query, Delete, Stats, Refused, Live, PortDown, SwitchDown, SwitchUp)):
            (play >> event).ignore()
        elif hasattr(event, "virtual_servers"):
            play.configure(event).ignore()
        else:
            (play >> event).ignore()
        views = [view for view in play.control.connections() if not view.ended]
        statistics = play.control.statistics()
        assert statistics.connections <= 5
        every = [*statistics.virtual_servers.values(), *statistics.members.values(), *statistics.switches.values()]
        assert all(min(one.opened, one.closed, one.active, one.packets, one.bytes) >= 0 for one in every)
        assert sum(c.active for c in statistics.virtual_servers.values()) == len(views)
        assert sum(c.active for c in statistics.members.values()) == len(views)
        assert sum(c.active for c in statistics.switches.values()) == len(views)
