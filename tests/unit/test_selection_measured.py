# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Algorithms that go by statistics: their properties, the estimates they go by, and where these come from."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.config.model import SWITCH_ALGORITHMS, Algorithm, Configuration, Member, Pool, Protocol, State, VirtualServer
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import Closed, Delete, FlowSignature, Host, Live, Query, Reason, SwitchUp
from lbapp.control.selection import ALGORITHMS, COUNTING
from lbapp.control.selection.candidates import Candidate
from lbapp.control.selection.measured import BOUND, BoundedLoadHash, Fastest, LeastBytes, LeastResponseTime
from lbapp.control.statistics import (
    CHECK,
    CHECKED_SECONDS,
    DECAY,
    FALL,
    LEAST_SECONDS,
    RISE,
    Counts,
    Endings,
    Estimates,
)

NEW = (Algorithm.LEAST_RESPONSE_TIME, Algorithm.LEAST_BYTES, Algorithm.FASTEST, Algorithm.BOUNDED_LOAD_HASH)
TIMED = (LeastResponseTime, Fastest)


def candidates(*weights, numbers=None, seconds=(), active=()):
    loads = [Counts() for _ in weights]
    for load, value in zip(loads, seconds, strict=False):
        load.observed(value, 0.0)
    for load, value in zip(loads, active, strict=False):
        load.active = value
    return [Candidate(number, weight, load)
            for number, weight, load in zip(numbers or range(1, len(weights) + 1), weights, loads, strict=True)]


def signature(client=0, port=1024):
    return FlowSignature((0x0A000000 + client).to_bytes(4, "big"), port, b"\xc0\x00\x02\x01", 80, 6, 0)


def run(selector, members, seconds, count, every=0.01, start=0.0):
    """Connections that arrive evenly, last as long as their member takes, and are told of ten times a second.

    Args:
        seconds: of (index of a member, time), how long it takes then.

    Returns:
        the members' indices in the order they were selected, and the time afterwards.
    """
    picked: list[int] = []
    open_now: list[tuple[float, int, float]] = []
    told = start
    for serial in range(count):
        now = start + serial * every
        if now - told >= 0.1:
            told = now
            ended: Counter[int] = Counter()
            took: defaultdict[int, float] = defaultdict(float)
            while open_now and open_now[0][0] <= now:
                _, index, lasted = heapq.heappop(open_now)
                ended[index] += 1
                took[index] += lasted
            for index, number in ended.items():
                members[index].load.active -= number
                members[index].load.observed(took[index] / number, now)
        index = selector.pick(signature(serial), serial)
        picked.append(index)
        members[index].load.active += 1
        lasted = seconds(index, now)
        heapq.heappush(open_now, (now + lasted, index, lasted))
    return picked, start + count * every


# ------------------------------------------------------------------ all of them


def test_no_switch_can_do_what_needs_statistics():
    assert SWITCH_ALGORITHMS.isdisjoint(NEW)
    assert COUNTING.issuperset(NEW)
    assert set(ALGORITHMS) == set(Algorithm)


@given(st.data(), st.lists(st.integers(1, 256), min_size=1, max_size=12), st.sampled_from(NEW))
def test_picks_somebody_there_whatever_was_measured(data, weights, algorithm):
    members = candidates(*weights)
    for member in members:
        load = member.load
        load.active = data.draw(st.integers(0, 1000))
        for at in data.draw(st.lists(st.floats(0, 1e6), max_size=3).map(sorted)):
            load.observed(data.draw(st.floats(0, 1e5)), at)
            load.ended(data.draw(st.integers(0, 100)), data.draw(st.integers(0, 10**15)), at)
    selector = ALGORITHMS[algorithm]()
    for count in (len(weights), 1, len(weights)):
        selector.update(members[:count])
        for serial in range(5):
            assert 0 <= selector.pick(signature(serial), serial) < count


@pytest.mark.parametrize("kind", [LeastResponseTime, LeastBytes, Fastest])
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=10), measured=st.booleans())
def test_equals_are_filled_in_proportion_to_weight(kind, weights, measured):
    members = candidates(*weights, seconds=[0.2] * len(weights) if measured else ())
    if measured:
        for member in members:
            member.load.ended(member.weight, 5000 * member.weight, 0.0)
    selector = kind()
    selector.update(members)
    for serial in range(20 * sum(weights)):
        members[selector.pick(signature(serial), serial)].load.active += 1
    for member in members:
        assert abs(member.load.active - 20 * member.weight) <= 3 + len(weights), [one.load.active for one in members]


@pytest.mark.parametrize("kind", [LeastResponseTime, LeastBytes, Fastest])
def test_what_was_learned_stays_when_members_change(kind):
    members = candidates(1, 1, 1, seconds=[0.5, 0.01, 0.5], active=[1, 1, 1])
    for member, size in zip(members, (9000, 10, 9000), strict=True):
        member.load.ended(1, size, 0.0)
    selector = kind()
    selector.update(members)
    assert selector.pick(signature(), 0) == 1
    selector.update(members[1:])
    assert selector.pick(signature(), 1) == 0
    selector.update([])
    selector.update(members)
    assert selector.pick(signature(), 2) == 1


def test_turns_go_on_after_a_change():
    for kind in (LeastResponseTime, LeastBytes, Fastest):
        members = candidates(1, 1, 1)
        selector = kind()
        selector.update(members)
        assert [selector.pick(signature(), 0) for _ in range(2)] == [0, 1]
        selector.update(members)
        assert selector.pick(signature(), 0) == 2


# ------------------------------------------------------------------ response times


@pytest.mark.parametrize("kind", TIMED)
def test_prefers_the_faster(kind):
    members = candidates(1, 1, 1, 1)
    selector = kind()
    selector.update(members)
    picked, _ = run(selector, members, lambda index, now: 1.0 if index == 2 else 0.02, 2000)
    shares = Counter(picked[200:])
    assert shares[2] <= 0.02 * 1800  # a fiftieth of the others' share, for the fastest alone
    assert min(shares[index] for index in (0, 1, 3)) > 300


@pytest.mark.parametrize("kind", TIMED)
def test_a_member_that_gets_well_is_found_out(kind):
    members = candidates(1, 1, 1, 1)
    selector = kind()
    selector.update(members)
    ill = 20.0
    picked, _ = run(selector, members, lambda index, now: 1.0 if index == 2 and now < ill else 0.02, 12_000)
    assert picked[500:2000].count(2) < 20
    assert picked[-2000:].count(2) > 350  # of 500 due


@pytest.mark.parametrize("kind", TIMED)
def test_a_member_that_falls_ill_is_left_within_seconds(kind):
    members = candidates(1, 1, 1, 1)
    selector = kind()
    selector.update(members)
    picked, _ = run(selector, members, lambda index, now: 0.5 if index == 1 and now > 10 else 0.02, 3000)
    assert picked[:1000].count(1) > 150
    assert picked[1300:].count(1) < 30


def test_a_member_whose_trial_does_not_end_is_not_tried_twice():
    members = candidates(1, 1, seconds=[2.0, 0.02])
    selector = LeastResponseTime()
    selector.update(members)
    picked, _ = run(selector, members, lambda index, now: 1e6 if index == 0 else 0.02, 10_000)
    assert picked.count(0) == 1


def test_least_response_time_weighs_time_and_connections():
    selector = LeastResponseTime()
    for seconds, active, weights, expected in (
            ([0.1, 0.1], [3, 2], (1, 1), 1), ([0.1, 0.3], [1, 1], (1, 1), 0), ([0.1, 0.3], [9, 1], (1, 1), 1),
            ([0.1, 0.1], [3, 2], (4, 1), 0), ([0.1, 0.4], [1, 1], (1, 4), 0)):
        selector.update(candidates(*weights, seconds=seconds, active=active))
        selector._turn = 0
        assert selector.pick(signature(), 0) == expected, (seconds, active, weights)


def test_a_member_nobody_measured_yet_counts_as_the_fastest():
    selector = LeastResponseTime()
    members = candidates(1, 1, 1, seconds=[0.5, 0.1], active=[1, 1, 0])
    selector.update(members)
    picked = []
    for serial in range(4):
        picked.append(selector.pick(signature(), serial))
        members[picked[-1]].load.active += 1
    assert Counter(picked) == {1: 1, 2: 3} or Counter(picked) == {1: 2, 2: 2}


@given(st.lists(st.tuples(st.integers(1, 256), st.floats(0.001, 100), st.integers(1, 1000)), min_size=1, max_size=8))
def test_fastest_shares_by_speed_and_does_not_mind_connections(rows):
    weights, seconds, active = zip(*rows, strict=True)
    selector = Fastest()
    selector.update(candidates(*weights, seconds=seconds, active=active))
    shares = Counter(selector.pick(signature(), serial) for serial in range(500))
    speeds = [weight / took for weight, took, _ in rows]
    for index, speed in enumerate(speeds):
        assert abs(shares[index] - 500 * speed / sum(speeds)) <= 1 + len(rows)


def test_estimates_are_read_again_also_in_a_large_pool():
    for kind in TIMED:
        members = candidates(*[1] * 100, seconds=[0.1] * 100, active=[1] * 100)
        selector = kind()
        selector.update(members)
        selector.pick(signature(), 0)
        for member in members[1:]:
            member.load.observed(5.0, 1.0, connections=1000)
        picked = []
        for serial in range(76):
            picked.append(selector.pick(signature(), serial))
            members[picked[-1]].load.active += 1
        assert picked[:26].count(0) <= 1
        assert picked[26:].count(0) >= 10


# ------------------------------------------------------------------ bytes


def test_least_bytes_levels_bytes_and_not_connections():
    """Every fourth connection is a hundred times as large as the others."""
    members = candidates(1, 2, 1)
    selector = LeastBytes()
    selector.update(members)
    carried: Counter[int] = Counter()
    open_now: list[tuple[int, int]] = []
    for serial in range(6000):
        now = serial * 0.01
        if serial % 10 == 0:
            for index, size in open_now:
                members[index].load.active -= 1
                members[index].load.ended(1, size, now)
            open_now = []
        index = selector.pick(signature(), serial)
        size = 100_000 if serial % 4 == 0 else 1000
        members[index].load.active += 1
        open_now.append((index, size))
        carried[index] += size
    for member, index in zip(members, range(3), strict=True):
        assert carried[index] == pytest.approx(sum(carried.values()) * member.weight / 4, rel=0.05)


def test_least_bytes_expects_of_open_connections_what_others_had():
    selector = LeastBytes()
    members = candidates(1, 1, active=[3, 0])
    members[0].load.ended(10, 10_000, 0.0)
    members[1].load.ended(10, 12_500, 0.0)
    selector.update(members)
    assert selector.pick(signature(), 0) == 1    # 10 000 and 3 times 1125 against 12 500
    members[0].load.active = 2
    assert selector.pick(signature(), 0) == 0


# ------------------------------------------------------------------ bounded loads


@settings(max_examples=60)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=12), st.integers(1, 30), st.randoms(use_true_random=False))
def test_bounded_load_is_never_above_its_bound(weights, clients, random):
    members = candidates(*weights)
    selector = BoundedLoadHash()
    selector.update(members)
    total = sum(weights)
    open_now: list[int] = []
    for serial in range(300):
        if open_now and random.random() < 0.4:
            members[open_now.pop(random.randrange(len(open_now)))].load.active -= 1
        index = selector.pick(signature(random.randrange(clients)), serial)
        open_now.append(index)
        members[index].load.active += 1
        assert members[index].load.active <= math.ceil(BOUND * len(open_now) * weights[index] / total)


def test_bounded_load_sends_a_client_to_one_member_while_there_is_room():
    selector = BoundedLoadHash()
    members = candidates(1, 1, 1, 1, 1)
    selector.update(members)
    homes = {client: selector.pick(signature(client), 0) for client in range(300)}
    assert set(homes.values()) == set(range(5))
    assert all(selector.pick(signature(client, port), port) == home
               for client, home in homes.items() for port in (1, 2, 3))
    # An even load within the bound changes nothing.
    for member, active in zip(members, (98, 100, 102, 100, 100), strict=True):
        member.load.active = active
    assert {client: selector.pick(signature(client), 0) for client in range(300)} == homes
    # Who has to leave a full member spreads over the others; nobody else moves.
    full = homes[0]
    members[full].load.active = 1000
    moved = {client: selector.pick(signature(client), 0) for client in range(300)}
    assert all(moved[client] == home for client, home in homes.items() if home != full)
    assert {moved[client] for client, home in homes.items() if home == full} == set(range(5)) - {full}


def test_bounded_load_moves_few_clients_when_a_member_goes():
    selector = BoundedLoadHash()
    members = candidates(1, 1, 1, 1, 1)
    selector.update(members)
    before = [members[selector.pick(signature(client), 0)].number for client in range(4000)]
    selector.update([member for member in members if member.number != 3])
    left = [member for member in members if member.number != 3]
    after = [left[selector.pick(signature(client), 0)].number for client in range(4000)]
    moved = sum(one != two for one, two in zip(before, after, strict=True))
    assert before.count(3) <= moved <= before.count(3) + 0.05 * 4000


def test_bounded_load_finds_room_in_a_member_of_few_slots():
    """Most slots are of the member that is full, and may come many in a row."""
    selector = BoundedLoadHash()
    selector.update(candidates(3, 1, active=[20, 0]))
    assert {selector.pick(signature(client), 0) for client in range(500)} == {1}


# ------------------------------------------------------------------ estimates


def test_peaks_count_faster_than_calm():
    load = Counts()
    load.observed(0.1, 0.0)
    load.observed(1.0, 0.0, connections=RISE)
    assert load.latency == pytest.approx(10 ** (-1 / math.e))          # most of the way from 0.1 to 1, by factors
    high = load.latency
    load.observed(0.1, 0.0, connections=RISE)
    assert load.latency > 0.7 * high
    load.observed(0.1, 0.0, connections=20 * FALL)
    assert load.latency == pytest.approx(0.1)


def test_what_was_measured_long_ago_counts_less():
    load = Counts()
    load.observed(1.0, 0.0)
    load.observed(0.1, DECAY)
    assert load.latency == pytest.approx(10 ** (math.exp(-1 - 1 / FALL) - 1))
    load.observed(0.001, DECAY - 5)   # nobody's clock goes back; if it did, nothing would break
    assert 0.001 < load.latency < 0.1 * 10


def test_one_large_answer_among_many_tells_little():
    load = Counts()
    for batch in range(50):
        load.observed(0.02, batch * 0.1, connections=3)
    load.observed(20.0, 5.1)
    assert load.latency < 0.06


def test_nobody_is_faster_than_can_be_measured():
    load = Counts()
    load.observed(0.0, 0.0)
    assert load.latency == LEAST_SECONDS


def test_checks_have_the_word_while_there_are_any():
    load = Counts()
    load.observed(3.0, 0.0)
    load.observed(0.02, 1.0, checked=True)
    assert load.latency == 0.02   # another kind of figure: nothing of the old one stays
    load.observed(30.0, 2.0)
    assert load.latency == 0.02
    load.observed(0.05, 6.0, checked=True)
    assert load.latency == pytest.approx(0.05 * 0.4 ** math.exp(-5 / DECAY - CHECK / RISE))
    before = load.latency
    load.observed(30.0, 6.0 + CHECKED_SECONDS - 1)
    assert load.latency == before
    load.observed(0.5, 6.0 + CHECKED_SECONDS)
    assert load.latency == pytest.approx(0.5, rel=1e-3)


def test_checks_that_are_rare_keep_the_word_longer():
    load = Counts()
    load.observed(0.02, 1000.0, checked=True)
    load.observed(0.02, 1100.0, checked=True)
    load.observed(30.0, 1100.0 + 299, checked=False)
    assert load.latency == 0.02
    load.observed(30.0, 1100.0 + 301, checked=False)
    assert load.latency == pytest.approx(30.0, rel=1e-3)


def test_bytes_wear_off():
    load = Counts()
    load.ended(10, 1000, 0.0)
    load.ended(1, 100, DECAY)
    assert load.lately == pytest.approx(100 + 1000 / math.e)
    assert load.ended_lately == pytest.approx(1 + 10 / math.e)


def closed(serial, reason=Reason.SHUTDOWN, outbound=False, counted=True, packets=10, size=1000, duration=0.25):
    return Closed(serial, 1, 1, reason, outbound, counted, packets, size, duration)


@pytest.mark.parametrize(("one", "rules", "held", "latency", "ended", "size"), [
    (closed(1), False, 9.0, 0.25, 1, 1000),                          # the switch's own clock
    (closed(1, counted=False), False, 9.0, 9.0, 0, 0),               # conntrack: from the answer to the first FIN
    (closed(1, counted=False), False, None, 0, 0, 0),                # older than this controller
    (closed(1, reason=Reason.IDLE), False, 9.0, 0, 1, 1000),         # nobody knows when it was answered
    (closed(1, packets=2), False, 9.0, 0, 1, 1000),                  # refused: fast, but no response
    (closed(1), True, 9.0, 0, 0, 1000),                              # one direction, told of late
    (closed(1, outbound=True), True, 9.0, 0, 1, 1000),
])
def test_what_the_end_of_a_connection_tells(one, rules, held, latency, ended, size):
    load = Counts()
    endings = Endings()
    endings.add(load, one, rules, held)
    endings.settle(1.0)
    assert load.latency == pytest.approx(latency)
    assert (load.ended_lately, load.lately) == (ended, size)


def test_a_batch_is_one_observation():
    load = Counts()
    endings = Endings()
    for duration in (0.1, 1.0, 10.0):
        endings.add(load, closed(1, duration=duration), False, None)
    endings.settle(1.0)
    assert load.latency == pytest.approx(1.0)
    assert load.ended_lately == 3


# ------------------------------------------------------------------ in the control segment


def segment(algorithm, state=State.CONNTRACK):
    pool = Pool(name="p", lb_algorithm=algorithm, members=tuple(
        Member(address=f"10.0.0.{number}", protocol_port=80, number=number) for number in (1, 2, 3)))
    server = VirtualServer(name="v", vip_address="192.0.2.1", protocol=Protocol.TCP, protocol_port=80, number=1,
                           default_pool_id="p", state=state)
    control = ControlSegment(Configuration(virtual_servers={"v": server}, pools={"p": pool}))
    control.handle(SwitchUp(1, {f"10.0.0.{k}": Host(b"\2\0\0\0\0\1", k) for k in (1, 2, 3)}), 0.0)
    return control


def opened(control, serial, now):
    return control.query(Query(serial, 1, 1, b"\2\0\0\0\0\1", signature(serial, 1024 + serial), 1, 2), now).member


@pytest.mark.parametrize("algorithm", [Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST])
@pytest.mark.parametrize("counted", [True, False], ids=["fast path", "conntrack"])
def test_the_control_segment_learns_from_connections(algorithm, counted):
    control = segment(algorithm)
    took = {1: 0.1, 2: 0.4, 3: 0.4}
    given: Counter[int] = Counter()
    for serial in range(1, 301):
        now = float(serial)
        member = opened(control, serial, now)
        given[member] += serial > 3
        control.handle(Delete(1, (Closed(serial, 1, member, Reason.SHUTDOWN, False, counted, 9 * counted,
                                         900 * counted, took[member] * counted),)), now + took[member])
    assert given[1] > 150
    assert given[2] > 0
    assert given[3] > 0
    assert control.active(1) == control.active(2) == control.active(3) == 0


@pytest.mark.parametrize("algorithm", [Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST])
def test_the_control_segment_learns_from_checks(algorithm):
    control = segment(algorithm, State.RULES)
    control.response_times([(1, 0.3), (2, 0.02), (3, 0.3), (77, 0.1), (1, float("nan")), (1, -1.0)], 1.0)
    assert control.member_counters(77).opened == 0
    assert 77 not in control.statistics().members
    assert {opened(control, serial, 1.0) for serial in range(1, 6)} == {2}


@pytest.mark.parametrize("algorithm", [Algorithm.LEAST_RESPONSE_TIME, Algorithm.FASTEST, Algorithm.LEAST_BYTES])
def test_what_was_measured_can_be_told(algorithm):
    control = segment(algorithm)
    member, other = opened(control, 1, 10.0), opened(control, 2, 10.0)
    known = control.member_counters(member)
    assert (known.active, known.estimates) == (1, Estimates())
    assert known.estimates.lately_by(99.0) is None
    control.handle(Delete(1, (Closed(1, 1, member, Reason.SHUTDOWN, False, True, 9, 9000, 0.25),)), 12.0)
    known = control.member_counters(member)
    assert known.active == 0
    assert known.estimates.response == pytest.approx(0.25)
    assert known.estimates[1:] == (12.0, False, 9000.0, 12.0)
    assert known.estimates.lately_by(12.0 + DECAY) == pytest.approx(9000 / math.e)
    assert known.estimates.lately_by(11.0) == 9000.0
    control.response_times([(member, 0.02), (other, 0.03)], 13.0)
    assert control.member_counters(member).estimates == Estimates(0.02, 13.0, True, 9000.0, 12.0)
    assert control.member_counters(other).estimates == Estimates(0.03, 13.0, True)
    assert control.statistics().members[other].estimates.response == 0.03


def test_the_control_segment_levels_bytes():
    control = segment(Algorithm.LEAST_BYTES)
    first = [opened(control, serial, 0.0) for serial in (1, 2, 3)]
    assert sorted(first) == [1, 2, 3]
    control.handle(Delete(1, tuple(Closed(serial, 1, member, Reason.SHUTDOWN, False, True, 50, size, 0.1)
                                   for serial, member, size in zip((1, 2, 3), first, (90_000, 100, 90_000),
                                                                   strict=True))), 0.1)
    assert opened(control, 4, 0.2) == first[1]


def test_connections_older_than_the_controller_say_nothing_of_time():
    control = segment(Algorithm.LEAST_RESPONSE_TIME)
    control.handle(Live(1, ((9, 1, 2),)), 50.0)
    assert control.active(2) == 1
    control.handle(Delete(1, (Closed(9, 1, 2, Reason.SHUTDOWN, False, False),)), 51.0)
    assert control.active(2) == 0
    assert {opened(control, serial, 52.0) for serial in (21, 22, 23)} == {1, 2, 3}


def test_bounded_loads_in_the_control_segment():
    control = segment(Algorithm.BOUNDED_LOAD_HASH)
    members = Counter(control.query(Query(serial, 1, 1, b"\2\0\0\0\0\1", signature(7, 1024 + serial), 1, 2), 0.0).member
                      for serial in range(30))
    assert max(members.values()) <= math.ceil(BOUND * 30 / 3)
    assert sum(members.values()) == 30
