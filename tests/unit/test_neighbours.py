# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Neighbours and their timers: when somebody is asked, found, moved, and given up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.control.limits import Limits
from lbapp.control.messages import Host, HostChanged, PortDown, Probe, SwitchDown, SwitchUp
from lbapp.control.neighbours import Neighbours
from lbapp.control.timers import Timed, Timers
from tests.playbook import Playbook, host, member, seen, site, up

A = "10.0.0.1"
PROBE = "Probe switch 1 10.0.0.1"
FOUND = f"HostChanged switch 1 10.0.0.1 {host(1).mac.hex(':')}/1"
LOST = "HostChanged switch 1 10.0.0.1 lost"


def probes(commands) -> list[str]:
    return [command.address for command in commands if isinstance(command, Probe)]


# ------------------------------------------------------------------ the life of a neighbour


def test_an_unresolved_neighbour_is_asked_at_once_and_then_less_and_less_often():
    play = Playbook(site(1))
    play >> up(0) << PROBE
    asked = []
    while play.now < 25:
        play.tick(round(play.now + 0.05, 6))
        asked += [play.now for _ in play.ignore()]
    assert asked == pytest.approx([0.25, 0.75, 1.75, 3.75, 7.75, 12.75, 17.75, 22.75])


def test_a_neighbour_that_answers_is_known_and_verified_every_five_seconds():
    play = Playbook(site(1))
    play >> up(0) << PROBE
    play.at(0.01) >> seen(1) << FOUND
    assert play.control.host(1, A) == host(1)
    times = []
    while play.now < 30:
        play.tick(round(play.now + 0.05, 6))
        if probes(play.ignore()):
            times.append(play.now)
            (play >> seen(1)).none()
    steps = {round(after - before, 3) for before, after in pairwise(times)}
    assert 2.5 <= times[0] <= 7.55
    assert steps == {5.0}


def test_three_unanswered_probes_a_second_apart_and_it_is_lost():
    play = Playbook(site(1))
    play >> up(1) << PROBE
    play.tick(1.0) << PROBE
    play.tick(2.0) << PROBE
    play.tick(2.9).none()
    play.tick(3.0) << LOST << PROBE
    assert play.control.host(1, A) is None
    play.tick(3.25) << PROBE
    play >> seen(1) << FOUND


def test_an_answer_in_between_starts_anew():
    play = Playbook(site(1))
    play >> up(1) << PROBE
    play.tick(1.0) << PROBE
    play.tick(2.0) << PROBE
    play.at(2.5) >> seen(1)
    play.tick(4.9).none()


def test_a_neighbour_that_moves_is_found_again():
    play = Playbook(site(1))
    play >> up(1) << PROBE
    play >> seen(1, host(7)) << "HostChanged switch 1 10.0.0.1 02:00:00:00:00:07/7"
    assert play.control.hosts(1) == {A: host(7)}
    play >> seen(1, Host(host(7).mac, 9)) << "HostChanged switch 1 10.0.0.1 02:00:00:00:00:07/9"
    # Its old port is nothing to it any more.
    (play >> PortDown(1, 7)).none()
    play >> PortDown(1, 9) << PROBE


def test_what_is_behind_a_port_that_goes_down_is_lost_in_two_seconds():
    play = Playbook(site(2))
    (play >> up(2)).ignore()
    for number in (1, 2):
        play >> seen(number)
    play.at(0.1) >> PortDown(1, 1) << PROBE
    play.tick(1.1) << PROBE
    play.tick(2.0).none()
    play.tick(2.1) << LOST << PROBE
    assert play.control.host(1, "10.0.0.2") == host(2)


def test_what_answers_by_another_port_is_not_lost():
    play = Playbook(site(1))
    play >> up(1) << PROBE
    play >> seen(1)
    play.at(1.0) >> PortDown(1, 1) << PROBE
    play.at(1.1) >> seen(1, host(5)) << "HostChanged switch 1 10.0.0.1 02:00:00:00:00:05/5"
    play.tick(3.4).none()


# ------------------------------------------------------------------ switches


def test_what_a_switch_says_is_believed_and_verified():
    play = Playbook(site(2))
    play >> up(1) << PROBE << "Probe switch 1 10.0.0.2"
    assert play.control.hosts(1) == {A: host(1)}


def test_a_switch_that_comes_back_empty_knows_nothing():
    play = Playbook(site(1))
    (play >> up(1)).ignore()
    play >> SwitchDown(1)
    assert play.control.host(1, A) == host(1), "a switch without controller goes on forwarding"
    play.until(60).none()
    (play >> seen(1, host(3))).none()
    play >> SwitchUp(1, {}) << PROBE
    assert play.control.host(1, A) is None


def test_a_host_on_a_switch_that_nobody_wants_is_verified_and_kept_while_it_answers():
    play = Playbook()
    play >> up(1) << PROBE
    assert play.control.host(1, A) == host(1)
    play.tick(1.0) << PROBE
    play.tick(2.0) << PROBE
    play.tick(3.0) << LOST << PROBE


def test_switches_see_different_things():
    play = Playbook(site(1))
    (play >> up(1)).ignore()
    play >> up(0, switch=2) << "Probe switch 2 10.0.0.1"
    assert play.control.host(2, A) is None
    play >> seen(1, host(8), switch=2) << "HostChanged switch 2 10.0.0.1 02:00:00:00:00:08/8"
    assert play.control.host(1, A) == host(1)
    assert play.control.hosts(3) == {}


def test_the_view_of_hosts_cannot_be_changed():
    play = Playbook(site(1))
    (play >> up(1)).ignore()
    with pytest.raises(TypeError):
        play.control.hosts(1)[A] = host(2)  # type: ignore[index]


# ------------------------------------------------------------------ configuration and demand


def test_configuration_says_who_is_wanted():
    play = Playbook(site(1))
    (play >> up(1)).ignore()
    play.configure(site(2)) << "Probe switch 1 10.0.0.2"
    play.configure(site(members=[member(2)])) << LOST
    assert play.control.hosts(1) == {}
    (play >> seen(1)).none()


def test_a_host_looked_up_on_demand_is_forgotten_unless_it_is_seen():
    play = Playbook()
    (play >> up(0)).none()
    play.want(1, A) << PROBE
    play.want(1, A).none()
    play >> seen(1) << FOUND
    while play.now < 400:
        play.tick(play.now + 1.0)
        if probes(play.ignore()):
            (play >> seen(1)).none()
    assert play.control.host(1, A) == host(1)
    heard = [message for _ in range(400) for message in play.tick(play.now + 1.0).ignore()]
    assert heard[-1] == Probe(1, A)
    assert [message for message in heard if isinstance(message, HostChanged)] == [HostChanged(1, A, None)]
    assert sum(isinstance(message, Probe) for message in heard) < 80, "300 s, then nobody asks any more"
    (play >> seen(1)).none()


def test_a_host_wanted_by_configuration_outlives_the_demand():
    play = Playbook()
    (play >> up(0)).none()
    play.want(1, A) << PROBE
    play.configure(site(1)).none()
    for _ in range(400):
        play.tick(play.now + 1.0).ignore()
    play >> seen(1) << FOUND


def test_hosts_on_demand_are_bounded_and_a_scan_does_not_drive_out_real_ones():
    play = Playbook(limits=Limits(asked_hosts=4))
    (play >> up(0)).none()
    play.want(1, A).ignore()
    play >> seen(1) << FOUND
    for number in range(2, 200):
        play.want(1, f"10.0.0.{number}").ignore()
    assert play.control.host(1, A) == host(1)
    for number in (196, 197, 198, 199):
        (play >> seen(number)).ignore()
    play.want(1, "10.0.0.2") << LOST
    assert len(play.control.hosts(1)) == 3
    play.ignore()


def test_a_full_table_of_unwanted_hosts_is_taken_off_the_switch():
    play = Playbook(limits=Limits(asked_hosts=2))
    play >> up(3) << "HostChanged switch 1 10.0.0.3 lost" << PROBE << "Probe switch 1 10.0.0.2"


def test_nobody_is_asked_on_a_switch_that_is_away():
    play = Playbook()
    play.want(1, A).none()
    (play >> up(0)).none()
    (play >> SwitchDown(1)).none()
    play.want(1, A).none()
    (play >> PortDown(1, 1)).none()


# ------------------------------------------------------------------ many


def test_many_neighbours_are_asked_a_bounded_number_at_a_time_and_spread():
    neighbours = Neighbours(Limits(probes_per_tick=500))
    addresses = [f"10.{n // 65536}.{n // 256 % 256}.{n % 256}" for n in range(10_000)]
    assert neighbours.configure(addresses, (), 0.0) == []
    asked = probes(neighbours.switch_up(1, {}, 0.0))
    assert len(asked) == 500
    ticks: Counter[int] = Counter()
    for step in range(1, 400):
        now = step / 10
        for address in asked:
            neighbours.seen(1, address, Host(b"\2\0\0\0\0\1", 1), now)
        asked = probes(neighbours.tick(now))
        ticks[step] = len(asked)
    assert max(ticks.values()) <= 500
    assert len(neighbours.hosts(1)) == 10_000
    steady = [ticks[step] for step in range(200, 400)]
    # 10 000 in 5 s are 200 a tick; the phases of a hash vary around that.
    assert 140 < min(steady) <= max(steady) < 260
    assert sum(steady) == pytest.approx(10_000 * 4, rel=0.02)


# ------------------------------------------------------------------ timers


class Item(Timed):
    pass


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["set", "cancel", "due"]), st.floats(0, 30)),
                max_size=60), st.sampled_from([0.05, 1.0]))
def test_timers_against_a_plain_list(steps, grain):
    """Due within a grain, once, earliest slot first; what was cancelled or moved is not."""
    timers: Timers[Item] = Timers(grain)
    items = [Item() for _ in range(6)]
    model: dict[Item, float] = {}
    now = 0.0
    for which, step, value in steps:
        if step == "set":
            timers.schedule(items[which], now + value)
            model[items[which]] = now + value
        elif step == "cancel":
            timers.cancel(items[which])
            model.pop(items[which], None)
        else:
            now += value / 10
            due = timers.due(now, 100)
            for item in due:
                assert model.pop(item) <= now + grain
            assert all(at > now for at in model.values())


def test_timers_take_a_bounded_number_and_leave_no_empty_slots_behind():
    timers: Timers[Item] = Timers(1.0)
    items = [Item() for _ in range(10)]
    for item in items:
        timers.schedule(item, 5.0)
    for _ in range(1000):
        timers.schedule(items[0], 6.0)
        timers.cancel(items[0])
        timers.schedule(items[0], 5.0)
    assert timers.due(4.9, 100) == []
    assert timers.due(5.0, 4) == items[1:5]
    assert timers.due(5.0, 4) == items[5:9]
    assert timers.due(9.0, 4) == [items[9], items[0]]
    assert timers.due(99.0, 4) == []
    assert not timers._slots
    assert not timers._order
