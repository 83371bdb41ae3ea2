# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Counters out of flow statistics."""

from __future__ import annotations

import struct

from lbapp.config.model import Decision
from lbapp.dataflow.counters import ConnectionCounters, RuleCounters, request_body
from lbapp.dataflow.openflow import Flow, encode_match
from lbapp.dataflow.pipeline import ANY_CONNECTION, Kind, Priority, Table, connection_cookie
from lbapp.dataflow.program import SwitchProgram
from tests import sites


def entry(flow: Flow, packets: int, octets: int) -> bytes:
    body = struct.pack("!BxIIHHHH4xQQQ", flow.table, 1, 0, flow.priority, 0, 0, 0, flow.cookie, packets, octets)
    body += encode_match(flow.match) + flow.instructions()
    return struct.pack("!H", 2 + len(body)) + body


def rules(**more) -> list[Flow]:
    site = sites.configuration([sites.server(number=9, **more)], [sites.pool(of=sites.members(2))])
    program = SwitchProgram(1, sites.reachable(site))
    program.begin(site)
    return list(program.flows())


def read(flows: list[Flow]) -> RuleCounters:
    counters = RuleCounters()
    for number, flow in enumerate(flows, 1):
        counters.add(entry(flow, number, number * 100))
    return counters


def test_what_the_switch_decided_is_counted_by_member():
    flows = rules(decision=Decision.SWITCH)
    counters = read(flows)
    bound = {(9, flow.match[2][1]): number for number, flow in enumerate(flows, 1) if flow.table == Table.BIND}
    assert counters.bound == bound and len(bound) == 2
    assert counters.rules == len(flows)


def test_punts_and_what_was_forwarded():
    flows = rules()
    counters = read(flows)
    (query,) = [number for number, flow in enumerate(flows, 1) if flow.cookie >> 48 & 0xFF == Kind.QUERY]
    assert counters.punted == {9: query}
    forwarded = {flow.match[1][1]: (number, number * 100) for number, flow in enumerate(flows, 1)
                 if flow.cookie >> 48 & 0xFF == Kind.FORWARD}
    assert counters.forwarded == forwarded and set(forwarded) == {1, 2}


def test_several_rules_of_a_member_add_up_and_a_next_hops_rule_is_no_members():
    site = sites.configuration(
        [sites.server("a", 1), sites.server("b", 2, "192.168.1.100"),
         sites.server("c", 3, port=81, translate_address=False, route_by_destination=False, next_hop="10.0.0.1")],
        [sites.pool(of=sites.members(1))], (*sites.LAN, *sites.OUTSIDE))
    program = SwitchProgram(1, sites.reachable(site))
    program.begin(site)
    flows = [flow for flow in program.flows() if flow.cookie >> 48 & 0xFF == Kind.FORWARD]
    assert len(flows) == 4 and sum(flow.priority == Priority.SPECIAL for flow in flows) == 1
    counters = RuleCounters()
    for flow in flows:
        counters.add(entry(flow, 10, 1000))
    assert counters.forwarded == {1: (30, 3000)}


def test_one_connection():
    counters = ConnectionCounters(5)
    assert counters.rules == 0
    flow = rules()[0]
    counters.add(entry(flow, 3, 300))
    counters.add(entry(flow, 4, 400))
    assert (counters.rules, counters.packets, counters.octets) == (2, 7, 700)


def test_the_request_asks_for_ours_only():
    body = request_body()
    assert struct.unpack("!B3xII4xQQ", body[:32]) == (0xFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x1B << 56, 0xFF << 56)
    one = request_body(connection_cookie(Kind.CONNECTION_IN, 7), ANY_CONNECTION)
    assert struct.unpack("!QQ", one[16:32]) == (0x1B08000000000007, 0xFFFEFFFFFFFFFFFF)


def test_a_match_that_is_cut_short_names_no_member():
    counters = RuleCounters()
    flow = next(flow for flow in rules(decision=Decision.SWITCH) if flow.table == Table.BIND)
    counters.add(entry(flow, 3, 300)[:56])
    assert not counters.bound
