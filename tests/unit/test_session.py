# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A session against a switch in memory: reading, reconciling, changing, failing."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import Algorithm, Configuration, Decision
from lbapp.control.messages import Host
from lbapp.dataflow import session as module
from lbapp.dataflow.openflow import (
    SEND_FLOW_REMOVED,
    Bucket,
    Flow,
    Output,
    SelectGroup,
    add_flow,
    encode_match,
    group_mod,
    message,
)
from lbapp.dataflow.pipeline import Kind, connection_cookie, cookie
from lbapp.dataflow.session import ProtocolError, SwitchSession, canonical_match
from tests import sites
from tests.fake_switch import FakeSwitch

SITE = sites.configuration(
    [sites.server(decision=Decision.SWITCH), sites.server("w", 2, port=81),
     sites.server("h", 3, port=82, translate_address=False, route_by_destination=False, next_hop="10.0.0.1"),
     sites.server("r", 4, "192.168.1.100")],
    [sites.pool()], (*sites.LAN, *sites.OUTSIDE))


class Wire:
    """A session and a switch, and the order in which their messages pass."""

    def __init__(self, switch: FakeSwitch | None = None, hosts: dict[str, Host] | None = None) -> None:
        self.switch = FakeSwitch() if switch is None else switch
        self.hosts = sites.reachable(SITE) if hosts is None else hosts
        self.session = SwitchSession(1, self.hosts, self.switch.receive)
        self.errors: list[bytes] = []

    def answer(self, count: int = 1 << 30) -> None:
        """Bring the switch's answers to the session."""
        while self.switch.outbox and count:
            data = self.switch.outbox.pop(0)
            count -= 1
            if data[1] == 19:
                assert self.session.on_multipart(data)
            elif data[1] == 4:
                assert self.session.on_bundle_reply(data)
            elif data[1] == 1:
                self.errors.append(data)
                self.session.on_error(data)

    def connect(self, configuration: Configuration = SITE) -> int:
        self.session.read()
        self.answer()
        assert self.session.was_read
        sent = sum(self.session.reconcile(configuration))
        self.answer()
        return sent

    def configure(self, configuration: Configuration) -> int:
        sent = sum(self.session.configure(configuration))
        self.answer()
        return sent

    def holds(self) -> bool:
        other = FakeSwitch()
        program = self.session.program
        other.receive(b"".join([*(group_mod(0, group) for group in program.groups()), *map(add_flow, program.flows())]))
        content = [{key: (rule.cookie, rule.instructions) for key, rule in switch.rules.items()
                    if rule.cookie >> 56 == 0x1B and rule.cookie >> 48 & 0xFF not in (8, 9)}
                   for switch in (self.switch, other)]
        ours = {number: buckets for number, buckets in self.switch.groups.items() if number >> 24 == 0x1B}
        return content[0] == content[1] and ours == other.groups


FOREIGN = Flow(0, 5, (("eth_type", 0x88CC),), (Output(1),), 0x77)
CONNECTION = Flow(12, 401, (("eth_type", 0x800), ("ip_proto", 6), ("tcp_src", 9)), (Output(2),),
                  connection_cookie(Kind.CONNECTION_IN, 5), None, 60, 0, SEND_FLOW_REMOVED)


@pytest.mark.parametrize("name", sites.covering())
def test_an_empty_switch_gets_all_and_an_identical_one_nothing(name):
    site = sites.covering()[name]
    wire = Wire(hosts=sites.reachable(site))
    assert wire.connect(site) == len(wire.switch.rules) + len(wire.switch.groups)
    assert wire.holds() and wire.session.ready and not wire.errors
    assert wire.configure(site) == 0
    assert wire.session.synchronised is site
    again = Wire(wire.switch, wire.hosts)
    assert again.connect(site) == 0
    assert again.holds()


def test_what_is_not_ours_stays_and_what_is_stale_goes():
    wire = Wire()
    stale = Flow(60, 77, (("eth_dst", bytes(6)),), (), cookie(Kind.BASE) | 5)
    kept = group_mod(0, SelectGroup(7, (Bucket(1, (Output(3),)),)))
    old = group_mod(0, SelectGroup(0x1B000063, (Bucket(1, (Output(3),)),)))
    wire.switch.receive(add_flow(FOREIGN) + add_flow(CONNECTION) + add_flow(stale) + kept + old)
    wire.connect()
    assert wire.holds()
    cookies = {rule.cookie for rule in wire.switch.rules.values()}
    assert {FOREIGN.cookie, CONNECTION.cookie} <= cookies and stale.cookie not in cookies
    assert 7 in wire.switch.groups and 0x1B000063 not in wire.switch.groups


def test_a_changed_rule_is_repaired_and_right_ones_keep_their_counters():
    wire = Wire()
    wire.connect()
    rules = list(wire.switch.rules.values())
    for rule in rules:
        rule.packets = 5
    rules[3].cookie ^= 1
    rules[4].instructions = b""  # a cookie digests the content; rules that others changed under it are not read
    again = Wire(wire.switch, wire.hosts)
    assert again.connect() == 1
    assert sum(rule.packets == 5 for rule in wire.switch.rules.values()) == len(rules) - 1


def test_a_changed_group_is_repaired():
    wire = Wire()
    wire.connect()
    (number,) = wire.switch.groups
    wire.switch.groups[number] = wire.switch.groups[number][:2]
    again = Wire(wire.switch, wire.hosts)
    assert again.connect() == 1
    assert again.holds()


def test_hosts_are_adopted_from_the_rules():
    for networks in ((), SITE.networks.values()):
        site = sites.configuration(SITE.virtual_servers.values(), SITE.pools.values(), networks)
        wire = Wire(hosts=sites.reachable(site))
        wire.connect(site)
        again = Wire(wire.switch, {})
        again.session.read()
        again.answer()
        assert again.session.adopted_hosts(site) == sites.reachable(site)


def test_a_program_that_changes_keeps_the_switch_right():
    wire = Wire()
    wire.connect()
    for site in sites.covering().values():
        wire.configure(site)
        for address, host in sites.reachable(site).items():
            wire.hosts[address] = host
            wire.session.host_changed(address)
        wire.answer()
        assert wire.holds() and not wire.errors
        assert wire.session.synchronised is site


def test_a_host_that_moves_and_goes():
    wire = Wire()
    wire.connect()
    wire.hosts["10.0.0.11"] = sites.host(99)
    wire.session.host_changed("10.0.0.11")
    assert wire.holds()
    del wire.hosts["10.0.0.11"]
    wire.session.host_changed("10.0.0.11")
    assert wire.holds()
    before = wire.session.flow_mods
    wire.session.host_changed("10.9.9.9")
    assert wire.session.flow_mods == before


def test_changes_are_cut_into_bundles():
    many = [sites.server(f"v{n}", n, f"10.1.{n // 250}.{n % 250 + 1}") for n in range(1, 400)]
    site = sites.configuration(many, [sites.pool()])
    wire = Wire()
    wire.session.read()
    wire.answer()
    sizes = list(wire.session.reconcile(site))
    assert sum(sizes) > 2 * module.BUNDLE_SIZE
    assert max(sizes) <= module.BUNDLE_SIZE + 1
    wire.answer()
    wire.configure(site)
    assert wire.holds()
    sizes = list(wire.session.configure(Configuration()))
    assert sum(sizes) > 2 * module.BUNDLE_SIZE and max(sizes) < 2 * module.BUNDLE_SIZE
    wire.answer()
    assert wire.holds()


# ------------------------------------------------------------------ failures


def test_a_bundle_that_fails_changes_nothing_and_wants_repair():
    wire = Wire()
    wire.connect()
    wire.configure(SITE)
    before = dict(wire.switch.rules)
    wire.switch.max_rules = len(before)
    more = sites.configuration([*SITE.virtual_servers.values(), sites.server("x", 9, port=99)], SITE.pools.values(),
                               SITE.networks.values())
    wire.configure(more)
    assert wire.switch.rules == before
    assert wire.session.needs_repair and wire.session.failed_bundles == 1
    assert wire.session.synchronised is SITE
    # Both the message that failed and the commit are answered with an error; the second one is nobody's any more.
    assert [data[8] << 8 | data[9] for data in wire.errors] == [5, 2300]


def test_the_answer_to_opening_a_bundle_is_not_its_success():
    wire = Wire()
    wire.connect()
    wire.configure(SITE)
    more = sites.configuration([*SITE.virtual_servers.values(), sites.server("x", 9, port=99)], SITE.pools.values(),
                               SITE.networks.values())
    list(wire.session.configure(more))
    wire.answer(1)
    assert wire.session.synchronised is SITE
    wire.answer()
    assert wire.session.synchronised is more


def test_other_errors_and_experimenters_are_not_ours():
    wire = Wire()
    wire.connect()
    assert not wire.session.on_error(message(1, bytes(4) + bytes(12), 77))
    assert not wire.session.on_bundle_reply(message(4, struct.pack("!IIII", 0x2320, 2300, 1, 5)))
    assert not wire.session.on_bundle_reply(message(4, bytes(8)))
    assert not wire.session.on_multipart(message(19, struct.pack("!HH4x", 1, 0), 77))
    assert not wire.session.needs_repair


def asked(wire: Wire) -> bytes:
    """The transaction id of the request for rules."""
    wire.session.read()
    return next(data[4:8] for data in wire.switch.outbox if data[9] == 1)


@pytest.mark.parametrize("body", [
    b"\0", struct.pack("!HH4x", 1, 0) + b"\0\0", struct.pack("!HH4x", 1, 0) + bytes(8),
    struct.pack("!HH4x", 1, 0) + b"\0\7" + bytes(6), struct.pack("!HH4x", 1, 0) + b"\0\x38" + bytes(20),
    struct.pack("!HH4x", 1, 0) + b"\0\x10" + bytes(14),
    struct.pack("!HH4x", 1, 0) + b"\0\x38" + bytes(54),
    struct.pack("!HH4x", 1, 0) + b"\0\x38" + bytes(48) + b"\x01\x00" + bytes(4)])
def test_a_malformed_answer_is_a_protocol_error(body):
    wire = Wire()
    xid = asked(wire)
    data = bytearray(message(19, body))
    data[4:8] = xid
    with pytest.raises(ProtocolError):
        wire.session.on_multipart(bytes(data))


@given(st.data())
def test_no_answer_does_anything_but_be_read_or_refused(data):
    wire = Wire()
    wire.connect()
    again = Wire(wire.switch, wire.hosts)
    again.session.read()
    answers = list(wire.switch.outbox)
    wire.switch.outbox.clear()
    answer = bytearray(data.draw(st.sampled_from(answers)))
    for _ in range(data.draw(st.integers(1, 4))):
        answer[data.draw(st.integers(8, len(answer) - 1))] = data.draw(st.integers(0, 255))
    try:
        again.session.on_multipart(bytes(answer))
    except ProtocolError:
        return
    again.session.adopted_hosts(SITE)


# ------------------------------------------------------------------ counters and connections


def test_counters_are_read_when_asked_for():
    wire = Wire()
    wire.connect()
    for rule in wire.switch.rules.values():
        rule.packets, rule.octets = 2, 100
    wire.session.read_counters()
    wire.session.read_counters()
    assert wire.session.counting
    assert sum(data[1] == 19 and not data[11] & 1 for data in wire.switch.outbox) == 1
    wire.answer()
    assert not wire.session.counting
    assert wire.session.counters.rules == len(wire.switch.rules)
    assert wire.session.counters.bound == {(1, number): 2 for number in range(1, 6)}


def test_a_connection_is_asked_about():
    wire = Wire()
    wire.connect()
    wire.switch.receive(add_flow(CONNECTION))
    next(iter(rule for rule in wire.switch.rules.values() if rule.cookie == CONNECTION.cookie)).packets = 7
    for serial in (5, 6):
        wire.session.ask_connection(serial)
    wire.answer()
    answers = wire.session.answers()
    assert [(answer.serial, answer.rules, answer.packets) for answer in answers] == [(5, 1, 7), (6, 0, 0)]
    assert wire.session.answers() == []


def test_questions_about_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_ASKED", 3)
    wire = Wire()
    wire.connect()
    for serial in range(10):
        wire.session.ask_connection(serial)
    assert len(wire.switch.outbox) == 3
    wire.answer()
    wire.session.ask_connection(11)
    assert len(wire.switch.outbox) == 1


@given(st.permutations([("eth_type", 0x800), ("ip_proto", 6), ("ipv4_dst", 5), ("ct_mark", 3), ("tcp_dst", 80)]))
def test_the_order_of_fields_means_nothing(fields):
    expected = canonical_match(encode_match((("eth_type", 0x800), ("ip_proto", 6), ("ipv4_dst", 5), ("ct_mark", 3),
                                             ("tcp_dst", 80))))
    assert canonical_match(encode_match(tuple(fields))) == expected


def test_a_pool_whose_algorithm_changes_moves_between_switch_and_controller():
    wire = Wire()
    wire.connect()
    for algorithm in (*Algorithm, *reversed(Algorithm)):
        wire.configure(sites.configuration([sites.server()], [sites.pool(algorithm=algorithm)]))
        assert wire.holds() and not wire.errors


def test_an_error_in_answer_to_a_reading_ends_the_waiting():
    sent: list[bytes] = []
    session = SwitchSession(1, {}, sent.append)
    session.read_counters()
    xid = sent[-1][4:8]
    assert session.counting
    assert session.on_error(b"\x04\x01\0\x0c" + xid + bytes(4)) and not session.counting and not session.needs_repair
    session.read()
    assert session.on_error(b"\x04\x01\0\x0c" + sent[-1][4:8] + bytes(4)) and session.needs_repair
    assert not session.on_error(b"\x04\x01\0\x0c\0\0\0\1" + bytes(4))
