# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Raw data: the first bytes of any protocol, by place, by length and by expression."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.control.l7 import More, Reject, ToPool
from lbapp.control.l7.rules import field
from tests.l7_servers import policy, reader, rule, to_pool

# PROXY protocol 2, a CONNECT of MQTT with client id "meter-7", a start-up message of PostgreSQL for database "shop".
PROXY = bytes.fromhex("0d0a0d0a000d0a515549540a") + b"\x21\x11\x00\x0c" + bytes(12)
MQTT = b"\x10\x13\x00\x04MQTT\x04\x02\x00\x3c\x00\x07meter-7"
POSTGRES = b"\0\0\0\x28\0\3\0\0user\0me\0database\0shop\0\0"

RAW = reader(
    "raw",
    to_pool("proxy", rule("DATA", "STARTS_WITH", "hex:0d0a0d0a000d0a515549540a")),
    to_pool("meters", rule("DATA", "EQUAL_TO", "MQTT", "lp16:2"), rule("DATA", "STARTS_WITH", "meter-", "lp16:12")),
    to_pool("shop", rule("DATA", "STARTS_WITH", "hex:00030000", "4"),
            rule("DATA", "REGEX", r"\x00database\x00shop\x00")),
    policy("no", "REJECT", rule("DATA", "CONTAINS", "evil")),
    inspect_bytes=21)


@pytest.mark.parametrize(("data", "name"), [
    (PROXY, "proxy"), (MQTT, "meters"), (MQTT.replace(b"meter-7", b"lamp-77"), ""), (b"a" * 21, ""),
    (b"a" * 21 + b"evil", ""), (b"\xff" * 30, "")])
def test_rules_decide(data, name):
    outcome = RAW.read(data)
    assert isinstance(outcome, ToPool) and outcome.policy == name and outcome.pool == (f"{name}-pool" if name else None)
    assert outcome.key.startswith("21 bytes ") and outcome.key.isprintable()


def test_a_policy_can_reset():
    assert isinstance(RAW.read(b"this is evil, it seems"), Reject)


def test_it_waits_for_as_many_bytes_as_configured():
    for cut in range(21):
        assert RAW.read(MQTT[:cut]) == More()
    assert RAW.read(MQTT[:21]) == RAW.read(MQTT + b"more")


def test_who_says_less_is_decided_in_time():
    assert RAW.timed_out(PROXY[:12]).policy == "proxy"
    assert RAW.timed_out(b"") == ToPool(None, "", "0 bytes ")
    assert RAW.timed_out(MQTT[:20]).policy == ""
    assert RAW.unavailable() == b""


def test_a_start_up_message_needs_enough_bytes():
    wide = reader("raw", to_pool("shop", rule("DATA", "REGEX", r"\x00database\x00shop\x00")),
                  inspect_bytes=len(POSTGRES))
    assert wide.read(POSTGRES).policy == "shop" and RAW.read(POSTGRES).policy == ""


@pytest.mark.parametrize(("data", "key", "found"), [
    (b"abc", "", (b"abc",)), (b"abc", "0", (b"abc",)), (b"abc", "2", (b"c",)), (b"abc", "3", (b"",)), (b"abc", "4", ()),
    (b"\2abc", "lp8:0", (b"ab",)), (b"\3abc", "lp8:0", (b"abc",)), (b"\4abc", "lp8:0", ()),
    (b"x\0abc", "lp8:1", (b"",)),
    (b"", "lp8:0", ()), (b"\0", "lp8:1", ()), (b"\0\2abc", "lp16:0", (b"ab",)), (b"\0\4abc", "lp16:0", ()),
    (b"\0", "lp16:0", ()), (b"\1\0", "lp16:0", ()), (b"\0\0", "lp16:0", (b"",))])
def test_what_a_rule_looks_at(data, key, found):
    assert tuple(field(data, key)) == found


def test_an_inverted_rule_holds_where_the_field_is_missing():
    inverted = reader("raw", to_pool("x", rule("DATA", "EQUAL_TO", "a", "lp8:9", invert=True)), inspect_bytes=3)
    assert inverted.read(b"abc").policy == "x"


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_nothing_a_stranger_says_raises_or_depends_on_how_it_comes(data):
    whole = RAW.read(data)
    assert isinstance(whole, More) == (len(data) < 21)
    for cut in range(len(data)):
        outcome = RAW.read(data[:cut])
        assert isinstance(outcome, More) or outcome == whole
    assert not isinstance(RAW.timed_out(data), More)
