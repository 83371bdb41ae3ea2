# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of every configuration: declared, unambiguous, forward only, few.

What is under test: lbapp/dataflow/facts.py, lbapp/dataflow/flows.py, lbapp/dataflow/serving.py and the pieces they
share in lbapp/dataflow/matches.py here.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from lbapp.config.model import Algorithm, Configuration, Decision, Protocol
from lbapp.dataflow import pipeline
from lbapp.dataflow.openflow import GROUP_ADD, Conntrack, Flow, Resubmit, SelectGroup, add_flow, group_mod
from lbapp.dataflow.pipeline import Kind, Table, kind_of, owner_of
from lbapp.dataflow.program import SwitchProgram
from lbapp.dataflow.serving import MAX_BLOCKS, SOURCE_HASH_BITS
from tests import sites
from tests.fake_switch import FakeSwitch

COVERING = sites.covering()


def rules(site: Configuration) -> tuple[list[Flow], list[SelectGroup]]:
    program = SwitchProgram(1, sites.reachable(site))
    program.begin(site)
    return list(program.flows()), list(program.groups())


def inspect(site: Configuration) -> None:
    flows, groups = rules(site)
    places: Counter[tuple] = Counter()
    for flow in flows:
        pipeline.check(flow)
        places[flow.table, flow.priority, frozenset(flow.match)] += 1
        nexts = [flow.goto] if flow.goto is not None else []
        nexts += [action.table for action in flow.actions if isinstance(action, Conntrack) and action.table is not None]
        assert all(table > flow.table for table in nexts)
        assert flow.cookie >> 56 == pipeline.COOKIE_MAGIC
        assert not flow.idle_timeout and not flow.hard_timeout
        punts = "Output(port=4294967293" in repr(flow.actions)
        assert punts == (kind_of(flow.cookie) in pipeline.PUNTS), flow
    assert max(places.values(), default=0) <= 1
    numbers = {server.number for server in site.virtual_servers.values()}
    members = {member.number for pool in site.pools.values() for member in pool.members}
    for flow in flows:
        if kind_of(flow.cookie) in (Kind.VIRTUAL_SERVER, Kind.QUERY):
            assert owner_of(flow.cookie) in numbers
        elif kind_of(flow.cookie) is Kind.FORWARD:
            assert owner_of(flow.cookie) in members | numbers
    for group in groups:
        assert pipeline.is_group_of_ours(group.group) and group.group & pipeline.OWNER_MASK in numbers
        for bucket in group.buckets:
            assert {type(action) for action in bucket.actions} <= pipeline.BUCKET_ACTIONS
            assert [a.table for a in bucket.actions if isinstance(a, Resubmit)] == [Table.BIND]


@pytest.mark.parametrize("name", COVERING)
def test_rules_are_as_declared(name):
    inspect(COVERING[name])


@given(sites.configurations())
@settings(max_examples=60)
def test_rules_of_any_configuration_are_as_declared(site):
    inspect(site)


@pytest.mark.parametrize("name", COVERING)
def test_a_virtual_server_with_five_members_has_60_rules_at_most(name):
    nothing = len(rules(sites.configuration(networks=COVERING[name].networks.values()))[0])
    count = len(rules(COVERING[name])[0]) - nothing
    assert count <= 60 * max(1, len(COVERING[name].virtual_servers))


@pytest.mark.parametrize("name", COVERING)
def test_a_switch_takes_all_rules(name):
    switch = FakeSwitch()
    flows, groups = rules(COVERING[name])
    switch.receive(b"".join([*(group_mod(GROUP_ADD, g) for g in groups), *map(add_flow, flows)]))
    assert not switch.outbox
    assert len(switch.rules) == len(flows)


def test_a_virtual_server_that_is_down_has_no_rules():
    down = sites.configuration([sites.server(admin_state_up=False)], [sites.pool()])
    assert len(rules(down)[0]) == len(rules(sites.configuration())[0])


@pytest.mark.parametrize("six", [False, True])
def test_noarp_mode_takes_only_the_answer_away(six):
    vip = "fd00::100" if six else "10.0.0.100"
    of = sites.pool(of=sites.members(six=six))
    loud, quiet = (set(rules(sites.configuration([sites.server(vip=vip, arp=arp)], [of]))[0]) for arp in (True, False))
    assert {flow.priority for flow in loud - quiet} == {pipeline.Priority.ANSWER}
    assert not quiet - loud


def test_maintenance_asks_the_controller():
    server = sites.server(decision=Decision.SWITCH, maintenance=True)
    flows, groups = rules(sites.configuration([server], [sites.pool()]))
    assert not groups
    assert sum(kind_of(flow.cookie) is Kind.QUERY for flow in flows) == 1


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (256, 1, 1, 1, 1), (100, 99, 98, 97, 96)])
def test_the_blocks_of_a_source_hash_cover_every_slot_once(weights):
    site = sites.configuration([sites.server()], [
        sites.pool(algorithm=Algorithm.SOURCE_IP, of=sites.members(5, weights=weights))])
    slots: Counter[int] = Counter()
    blocks = [flow for flow in rules(site)[0] if flow.table == Table.SOURCE_HASH]
    assert 0 < len(blocks) <= MAX_BLOCKS
    for flow in blocks:
        value, mask = (int(part) for part in flow.match[1][1:])
        slots.update(slot for slot in range(1 << SOURCE_HASH_BITS) if slot & mask == value)
    assert set(slots.values()) == {1} and len(slots) == 1 << SOURCE_HASH_BITS


@pytest.mark.parametrize("protocol", Protocol)
def test_weights_keep_within_the_256_values_of_a_hash(protocol):
    site = sites.configuration([sites.server(protocol=protocol)], [
        sites.pool(algorithm=Algorithm.WEIGHTED_ROUND_ROBIN, of=sites.members(5, weights=(256, 1, 1, 1, 1)))])
    flows, groups = rules(site)
    if protocol is Protocol.TCP:
        (group,) = groups
        assert sum(bucket.weight for bucket in group.buckets) <= 256
        assert min(bucket.weight for bucket in group.buckets) >= 1
    else:
        assert not groups and any(flow.table == Table.SOURCE_HASH for flow in flows)
