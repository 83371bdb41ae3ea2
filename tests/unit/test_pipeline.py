# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The declaration itself: what it refuses, cookies, zones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.dataflow import pipeline
from lbapp.dataflow.openflow import Conntrack, Load, Output, SetField
from lbapp.dataflow.pipeline import Kind, Priority, Table, UndeclaredError, check, rule


@pytest.mark.parametrize(("flow", "why"), [
    (rule(Table.L2, Priority.NORMAL, (("tcp_dst", 80),), kind=Kind.BASE), "L2: may not match tcp_dst"),
    (rule(Table.L2, Priority.NORMAL, (), (SetField("eth_src", 1),), kind=Kind.BASE), "L2: may not do SetField"),
    (rule(Table.L2, Priority.NORMAL, (), kind=Kind.BASE, goto=Table.CLASSIFY), "L2: may not go to CLASSIFY"),
    (rule(Table.SNAT, Priority.NORMAL, (), (Conntrack(1, table=Table.SERVE),), kind=Kind.BASE),
     "SNAT: goes back to table 20"),
    (rule(Table.L2, Priority.NORMAL, (), kind=Kind.BASE)._replace(cookie=7), "L2: rule without a cookie of ours"),
])
def test_what_is_not_declared_is_refused(flow, why):
    with pytest.raises(UndeclaredError, match=why):
        check(flow)


def test_every_way_on_leads_forward():
    for table, declared in pipeline.DECLARATION.items():
        assert all(after > table for after in declared.goto)
    assert set(pipeline.DECLARATION) == set(Table)


@given(st.sampled_from(Kind), st.integers(0, pipeline.OWNER_MASK), st.integers(0, 2**24 - 1))
def test_a_cookie_tells_kind_and_owner(kind, owner, digest):
    value = pipeline.cookie(kind, owner) | digest
    assert pipeline.kind_of(value) is kind
    assert pipeline.owner_of(value) == owner


def test_other_cookies_are_not_ours():
    assert pipeline.kind_of(0) is None
    assert pipeline.kind_of(pipeline.COOKIE_MAGIC << 56 | 0xFF << 48) is None
    assert pipeline.kind_of(0x1C << 56 | Kind.BASE << 48) is None


@given(st.integers(0, 2**32 - 1))
def test_one_mask_takes_both_directions_of_a_connection_and_no_other(serial):
    inbound, outbound = (pipeline.connection_cookie(kind, serial) for kind in (Kind.CONNECTION_IN, Kind.CONNECTION_OUT))
    assert not (inbound ^ outbound) & pipeline.ANY_CONNECTION
    assert (inbound ^ pipeline.connection_cookie(Kind.CONNECTION_IN, serial ^ 1)) & pipeline.ANY_CONNECTION
    assert (inbound ^ pipeline.cookie(Kind.QUERY)) & pipeline.ANY_CONNECTION


def test_a_rule_of_other_content_has_another_cookie():
    one = rule(Table.L2, Priority.NORMAL, (), (Output(1),), kind=Kind.BASE)
    other = rule(Table.L2, Priority.NORMAL, (), (Output(2),), kind=Kind.BASE)
    assert one.cookie != other.cookie
    assert rule(Table.SERVE, Priority.NEW, (), (Load("reg1", 1),), kind=Kind.BASE, owner=5).cookie >> 24 & 0xFFFFFF == 5


@given(st.integers(0, 2**64 - 1))
def test_zones_are_two_neighbours_and_never_the_default_one(switch):
    zones = pipeline.zones(switch)
    assert 0 < zones.service < 65536 and 0 < zones.snat < 65536
    assert zones.snat == zones.service + 1 and not zones.service & 1


@given(st.integers(0, 2**64 - 1))
def test_a_probe_mac_is_local_unicast_and_not_the_virtual_one(switch):
    mac = pipeline.probe_mac(switch)
    assert len(mac) == 6 and mac[0] & 3 == 2 and mac != pipeline.VIRTUAL_MAC


def test_groups_have_numbers_of_their_own():
    assert pipeline.is_group_of_ours(pipeline.group_number(5))
    assert not pipeline.is_group_of_ours(5)
