# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Selection: each algorithm by itself, the shared tables by their properties, the hashes by chi-square."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.config.model import Algorithm
from lbapp.control.messages import FlowSignature
from lbapp.control.selection import ALGORITHMS
from lbapp.control.selection.candidates import Candidate
from lbapp.control.selection.plain import (
    ConsistentHash,
    LeastConnections,
    RandomTwoChoices,
    RoundRobin,
    SourceIP,
    WeightedRoundRobin,
)
from lbapp.control.selection.tables import (
    flow_hash,
    maglev_table,
    mix,
    slot_blocks,
    source_hash,
    table_size,
)
from lbapp.control.statistics import Counts


def candidates(*weights: int, numbers: list[int] | None = None, active: list[int] | None = None) -> list[Candidate]:
    loads = [Counts() for _ in weights]
    for load, count in zip(loads, active or [], strict=False):
        load.active = count
    return [Candidate(number, weight, load)
            for number, weight, load in zip(numbers or range(1, len(weights) + 1), weights, loads, strict=True)]


def signature(client: int = 0, port: int = 1024, tos: int = 0) -> FlowSignature:
    return FlowSignature((0x0A000000 + client).to_bytes(4, "big"), port, b"\xc0\x00\x02\x01", 80, 6, tos)


def picks(selector, count: int) -> str:
    """The first picks, as letters."""
    return "".join("abcdefgh"[selector.pick(signature(serial), serial)] for serial in range(count))


# ------------------------------------------------------------------ round robin


def test_round_robin_is_strict_and_ignores_weights():
    selector = RoundRobin()
    selector.update(candidates(5, 1, 100))
    assert picks(selector, 7) == "abcabca"


@pytest.mark.parametrize(("numbers", "following"), [
    ([1, 3], 3),        # 2 was next and is gone: whoever came after it
    ([2, 3, 4], 2),
    ([9, 2], 2),
    ([1], 1),
    ([7, 8], 7),        # nobody stayed: from the beginning
])
def test_round_robin_keeps_its_place_when_members_change(numbers, following):
    selector = RoundRobin()
    selector.update(candidates(1, 1, 1))
    assert picks(selector, 1) == "a"
    selector.update(candidates(*[1] * len(numbers), numbers=numbers))
    assert numbers[selector.pick(signature(), 0)] == following


def test_weighted_round_robin_is_smooth():
    selector = WeightedRoundRobin()
    selector.update(candidates(5, 1, 1))
    assert picks(selector, 14) == "aabacaa" * 2


def test_weighted_round_robin_is_exact_over_each_cycle():
    selector = WeightedRoundRobin()
    selector.update(candidates(256, 1, 17, 4))
    assert Counter(picks(selector, 278)) == {"a": 256, "b": 1, "c": 17, "d": 4}


def test_weighted_round_robin_keeps_its_credit_when_a_weight_changes():
    selector = WeightedRoundRobin()
    selector.update(candidates(1, 1))
    assert picks(selector, 1) == "a"
    selector.update(candidates(1, 1))
    assert picks(selector, 1) == "b"


# ------------------------------------------------------------------ by load


@pytest.mark.parametrize(("weights", "active", "letter"), [
    ((1, 1, 1), [3, 2, 5], "b"),
    ((10, 1, 1), [9, 1, 1], "a"),      # 0.9 of its weight against 1
    ((10, 1, 1), [11, 1, 1], "b"),
    ((1, 1, 1), [0, 0, 0], "a"),
])
def test_least_connections_in_proportion_to_weight(weights, active, letter):
    selector = LeastConnections()
    selector.update(candidates(*weights, active=active))
    assert picks(selector, 1) == letter


def test_least_connections_equals_take_turns():
    selector = LeastConnections()
    selector.update(candidates(1, 1, 1))
    assert picks(selector, 6) == "abcabc"


def test_least_connections_levels_what_it_is_given():
    selector = LeastConnections()
    members = candidates(1, 3, active=[40, 0])
    selector.update(members)
    for serial in range(200):
        members[selector.pick(signature(), serial)].load.active += 1
    assert [member.load.active for member in members] == [60, 180]


def test_two_choices_takes_the_less_loaded_of_two_different_members():
    selector = RandomTwoChoices()
    selector.update(candidates(1, 1, active=[5, 4]))
    assert set(picks(selector, 200)) == {"b"}


def test_two_choices_alone():
    selector = RandomTwoChoices()
    selector.update(candidates(7))
    assert picks(selector, 5) == "aaaaa"


def test_two_choices_draws_by_weight_and_levels_the_load():
    selector = RandomTwoChoices()
    members = candidates(1, 2, 4, 8, 1)
    selector.update(members)
    for serial in range(8000):
        members[selector.pick(signature(), serial)].load.active += 1
    for member in members:
        assert member.load.active == pytest.approx(8000 * member.weight / 16, abs=12)


def test_two_choices_is_a_function_of_the_serial():
    one, two = RandomTwoChoices(), RandomTwoChoices()
    for selector in (one, two):
        selector.update(candidates(1, 1, 1, 1, 1))
    assert picks(one, 500) == picks(two, 500)
    assert len(set(picks(one, 500))) == 5


@given(st.lists(st.integers(1, 256), min_size=1, max_size=12), st.integers(0, 2**64 - 1), st.data())
def test_every_algorithm_picks_somebody_who_is_there(weights, serial, data):
    numbers = data.draw(st.lists(st.integers(1, 2**24 - 1), min_size=len(weights), max_size=len(weights), unique=True))
    for algorithm in Algorithm:
        selector = ALGORITHMS[algorithm]()
        for count in (len(weights), 1, len(weights)):
            selector.update(candidates(*weights[:count], numbers=numbers[:count]))
            assert 0 <= selector.pick(signature(serial % 2**20), serial) < count


# ------------------------------------------------------------------ slots


@given(st.lists(st.integers(0, 256), max_size=60), st.integers(6, 9))
def test_slots_are_covered_once_and_in_proportion(weights, bits):
    members = [(1000 + index, weight) for index, weight in enumerate(weights)]
    blocks = slot_blocks(members, bits)
    slots = 1 << bits
    owners = [[key for value, mask, key in blocks if slot & mask == value] for slot in range(slots)]
    served = {key: weight for key, weight in members if weight}
    if not served:
        assert blocks == []
        return
    assert all(len(keys) == 1 for keys in owners)
    shares = Counter(keys[0] for keys in owners)
    assert set(shares) == set(served)
    due = {key: weight * slots / sum(served.values()) for key, weight in served.items()}
    if min(due.values()) >= 1:
        assert all(abs(shares[key] - due[key]) < 1 for key in served)
    # No fewer blocks can make these shares: a block is a power of two.
    assert len(blocks) == sum(share.bit_count() for share in shares.values())


def test_slot_blocks_examples():
    assert slot_blocks([(7, 3), (8, 1)]) == [(0, 0x80, 7), (128, 0xC0, 7), (192, 0xC0, 8)]
    assert slot_blocks([(7, 1)]) == [(0, 0, 7)]
    assert slot_blocks([(7, 1), (8, 0)], bits=2) == [(0, 0, 7)]


def test_light_members_are_served_at_the_expense_of_the_heaviest():
    shares: Counter[int] = Counter()
    for _, mask, key in slot_blocks([(0, 256)] + [(n, 1) for n in range(1, 101)]):
        shares[key] += 256 - mask
    assert shares[0] == 156
    assert all(shares[n] == 1 for n in range(1, 101))


def test_slots_refuse_what_they_cannot_hold():
    assert len(slot_blocks([(n, 1) for n in range(256)])) == 256
    with pytest.raises(ValueError, match="at most 256, got 257"):
        slot_blocks([(n, 1) for n in range(257)])
    with pytest.raises(ValueError, match="weight"):
        slot_blocks([(1, -1)])


# ------------------------------------------------------------------ Maglev


def maglev_shares(weights: Mapping[int, int], size: int) -> dict[int, range]:
    """How many slots of a Maglev table each member may have: those of all turns but the last, and perhaps one more.

    On the first turn everybody claims one; after that the heaviest one each turn, the others in proportion.
    """
    served = {key: weight for key, weight in weights.items() if weight}
    heaviest = max(served.values())

    def claimed(weight: int, turns: int) -> int:
        return 1 + (turns - 1) * weight // heaviest

    turns = next(turns for turns in itertools.count(1)
                 if sum(claimed(weight, turns) for weight in served.values()) >= size)
    return {key: range(claimed(weight, turns - 1), claimed(weight, turns) + 1) for key, weight in served.items()}


@settings(max_examples=50)
@given(st.dictionaries(st.integers(1, 2**24 - 1), st.integers(0, 256), max_size=20), st.randoms())
def test_maglev_shares_follow_weights_and_order_does_not_matter(members, random):
    rows = list(members.items())
    table = maglev_table(rows)
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert maglev_table(shuffled) == table
    if not any(members.values()):
        assert table == ()
        return
    shares = Counter(table)
    assert len(table) == 251
    assert set(shares) == {key for key, weight in rows if weight}
    assert all(shares[key] in allowed for key, allowed in maglev_shares(members, 251).items())


@pytest.mark.parametrize(("count", "size", "beyond"), [(5, 251, 0.08), (5, 5003, 0.05), (50, 5003, 0.03)])
def test_maglev_moves_little_beyond_the_share_of_a_member_that_goes(count, size, beyond):
    """With 1 of n gone, at least its share moves; the rest is what Maglev pays for even tables."""
    members = [(key, 1) for key in range(1, count + 1)]
    before = maglev_table(members, size)
    moved = []
    for gone in range(1, count + 1):
        after = maglev_table([row for row in members if row[0] != gone], size)
        assert gone not in after
        moved.append(sum(one != two for one, two in zip(before, after, strict=True)) / size)
    assert all(share >= 1 / count - 2 / size for share in moved)
    assert max(moved) <= 1 / count + beyond, max(moved)


def test_maglev_table_is_even():
    shares = Counter(maglev_table([(key, 1) for key in range(1, 51)], 5003))
    assert max(shares.values()) - min(shares.values()) <= 1


def test_maglev_is_the_same_everywhere():
    """Golden: a table that changes with the version would move every connection at an upgrade."""
    assert maglev_table([(1, 1), (2, 2), (3, 1)], 13) == GOLDEN


GOLDEN = (1, 1, 3, 2, 3, 1, 2, 2, 2, 3, 1, 2, 2)


def test_maglev_refuses():
    with pytest.raises(ValueError, match="prime, got 250"):
        maglev_table([(1, 1)], 250)
    with pytest.raises(ValueError, match="at most 3, got 4"):
        maglev_table([(n, 1) for n in range(4)], 3)


@pytest.mark.parametrize(("members", "size"), [
    (1, 5003), (50, 5003), (51, 16_381), (163, 16_381), (164, 65_537), (20_000, 65_537), (70_000, 140_009),
])
def test_table_grows_with_the_pool(members, size):
    assert table_size(members) == size


# ------------------------------------------------------------------ hashing


def chi_square(values: list[int], cells: int) -> float:
    """The chi-square statistic, divided by its degrees of freedom: near 1 for an even spread."""
    expected = len(values) / cells
    counts = Counter(values)
    return sum((counts[cell] - expected) ** 2 / expected for cell in range(cells)) / (cells - 1)


@pytest.mark.parametrize("stride", [1, 2, 16, 256, 4096, 65536])
def test_source_hash_spreads_regular_addresses(stride):
    values = [source_hash(signature(index * stride % 2**24 + index * stride // 2**24)) & 255 for index in range(10_000)]
    assert 0.6 < chi_square(values, 256) < 1.4


@pytest.mark.parametrize("modulus", [251, 5003])
def test_flow_hash_spreads_ports_of_one_client(modulus):
    values = [flow_hash(signature(7, port)) % modulus for port in range(1024, 61024)]
    assert 0.6 < chi_square(values, modulus) < 1.4


def test_mix_changes_half_the_bits():
    changed = [(mix(value) ^ mix(value ^ 1 << bit)).bit_count() for value in range(100) for bit in range(64)]
    assert 31 < sum(changed) / len(changed) < 33
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64


def test_source_ip_sends_a_client_to_one_member_whatever_its_port():
    selector = SourceIP()
    selector.update(candidates(1, 1, 1, 1, 1))
    assert len({selector.pick(signature(9, port), port) for port in range(200)}) == 1
    shares = Counter(selector.pick(signature(client), 0) for client in range(10_000))
    assert all(1700 < shares[index] < 2300 for index in range(5))


def test_source_ip_takes_more_members_than_a_switch_has_slots():
    selector = SourceIP()
    selector.update(candidates(*[1] * 300))
    assert len({selector.pick(signature(client), 0) for client in range(20_000)}) == 300


def test_consistent_hash_ignores_tos_and_moves_only_the_flows_of_a_member_that_goes():
    selector = ConsistentHash()
    selector.update(candidates(1, 1, 1, 1, 1))
    flows = [signature(client, 1024 + client) for client in range(4000)]
    before = [selector.pick(flow, 0) for flow in flows]
    assert before == [selector.pick(flow._replace(tos=0xB8), 1) for flow in flows]
    assert all(700 < before.count(index) < 900 for index in range(5))
    selector.update(candidates(1, 1, 1, 1, numbers=[1, 2, 4, 5]))
    numbers = [1, 2, 4, 5]
    moved = sum(numbers[selector.pick(flow, 0)] != index + 1 for flow, index in zip(flows, before, strict=True))
    assert before.count(2) <= moved <= before.count(2) + 0.05 * len(flows)


def test_consistent_hash_has_a_large_table_for_many_members():
    selector = ConsistentHash()
    selector.update(candidates(*[1] * 300))
    assert len({selector.pick(signature(client, client % 60000), 0) for client in range(20_000)}) == 300
