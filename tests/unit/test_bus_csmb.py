# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.csmb, lbapp.bus.counted: values ⇄ bytes of one message; lbapp.bus.holdings: what is wanted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.bus import counted, csmb
from lbapp.bus.auth import Role
from lbapp.bus.counted import Counters, Traffic
from lbapp.bus.csmb import (
    AddVs,
    Assist,
    Challenge,
    DeleteVs,
    Error,
    Flag,
    Greeting,
    Hash,
    Hello,
    HelloFlag,
    Keys,
    Kind,
    Limits,
    Mode,
    Response,
    SyncDone,
    Table,
    Target,
    TargetFlag,
    Version,
    VirtualServer,
    VsList,
    VsListRequest,
)
from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.bus.holdings import SERVER, TABLE, Desired

u4, u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (4, 8, 16, 32, 64))
MAPPED = bytes(10) + b"\xff\xff"
address = (st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)).filter(
    lambda value: not value.startswith(MAPPED))
optional = st.just(b"") | address.filter(lambda value: value != bytes(16))
flags = st.integers(0, 0x3FF).map(Flag)
rates = st.integers(-1, 2**31 - 1)
servers = st.builds(VirtualServer, u32, address, u16, u8, flags, st.sampled_from(Assist), st.sampled_from(Mode),
                    st.sampled_from(Hash), u16, u16, optional, st.binary(max_size=255))
greetings = st.builds(Greeting, u16, st.integers(0, 14), st.booleans(), u32)
limits = st.none() | st.builds(Limits, rates, u32, rates, u32, st.integers(0, 32))
servers = st.builds(lambda server, greeting, limits: server._replace(
    greeting=greeting if server.mode is Mode.PROXY else None, limits=limits,
    flags=server.flags | (Flag.LIMITED if limits is not None else Flag(0))), servers, greetings, limits)
targets = st.builds(Target, u32, address, u16, st.binary(min_size=6, max_size=6), u32, u16,
                    st.integers(0, 7).map(TargetFlag))
nonce = st.binary(min_size=32, max_size=32)
parts = st.tuples(u16, u16).filter(lambda pair: pair[0] < pair[1])
messages = st.one_of(
    st.builds(Hello, st.builds(Version, u4, u4), st.sampled_from(Role), u64, u64, u32, optional, u16, u16,
              st.integers(0, 3).map(HelloFlag), st.sampled_from(Error), optional, optional),
    st.builds(Challenge, nonce), st.builds(Response, nonce), st.builds(AddVs, servers), st.builds(DeleteVs, u32),
    st.just(VsListRequest()), st.builds(SyncDone, u32),
    st.builds(Keys, st.integers(0, 1), st.just(3), nonce),
    st.builds(lambda part, some: VsList(part[0], part[1], tuple(some)), parts, st.lists(servers, max_size=5)),
    st.builds(lambda number, generation, part, some: Table(number, generation, part[0], part[1], tuple(some)), u32, u32,
              parts, st.lists(targets, max_size=20)),
    st.builds(lambda part, parts, connections, named, rows: Counters(part, part + parts, connections, tuple(named),
                                                                     tuple(rows)),
              st.integers(0, 30), st.integers(1, 30), u32,
              st.lists(st.tuples(st.text(st.characters(codec="ascii"), min_size=1, max_size=64), u64), max_size=5),
              st.lists(st.builds(Traffic, u32, u32, u64, u64, u64, u64), max_size=20)),
)


@given(messages)
@settings(max_examples=300)
def test_what_is_encoded_comes_back(message):
    kind, body = csmb.encode(message)
    assert csmb.decode(kind, body) == message


@given(st.integers(0, 20), st.binary(max_size=300))
@settings(max_examples=600)
def test_any_bytes_are_a_message_or_a_decode_error(kind, body):
    try:
        csmb.decode(kind, body)
    except DecodeError as error:
        assert isinstance(error.fault, Fault)


@given(messages.filter(lambda message: not isinstance(message, Hello)), st.data())
@settings(max_examples=200)
def test_a_body_cut_short_or_with_more_behind_is_none(message, data):
    kind, body = csmb.encode(message)
    cut = body[:data.draw(st.integers(0, max(len(body) - 1, 0)))]
    for changed in (cut, body + b"\x00"):
        with pytest.raises(DecodeError):
            csmb.decode(kind, changed)


def test_hello_may_grow_but_not_shrink():
    """Its layout is the same in every version, so that every version can be refused."""
    hello = Hello(Version(1, 0), Role.CS, 1, 2, 1000, b"\x7f\0\0\1", 5000, 1400)
    kind, body = csmb.encode(hello)
    assert csmb.decode(kind, body + b"of a later version") == hello
    with pytest.raises(DecodeError) as caught:
        csmb.decode(kind, body[:-1])
    assert caught.value.fault is Fault.SHORT


SERVER_1 = VirtualServer(5, b"\x0a\x01\x00\x01", 80, 6, Flag.TRANSLATE_ADDR | Flag.COOKIE_PROXY, Assist.DFS_ASSIST,
                         Mode.PUNT, Hash.SOURCE, 60, 0, b"", b"id")
TARGET = Target(9, b"\x0a\x00\x00\x09", 8080, b"\x02" * 6, 4, 100, TargetFlag.TRANSLATE_ADDR | TargetFlag.ROUTED)
NONE = "00" * 16
FIXTURES = [
    (Hello(Version(1, 0), Role.DFS, 0x2A, 7, 1000, b"\x7f\0\0\1", 5000, 1400, HelloFlag.APP_PROXY, Error.VERS_NEW),
     "01" "00" "0002" "01" "02" "0578" "000000000000002a" "0000000000000007" "000003e8"
     "00000000000000000000ffff7f000001" + NONE + NONE + "1388"),
    (Challenge(bytes(32)), "01" + "00" * 32),
    (Response(b"\x11" * 32), "02" + "11" * 32),
    (AddVs(SERVER_1), "00000005" "00000000000000000000ffff0a010001" + NONE +
     "0050" "0081" "003c" "0000" "06" "01" "02" "00" "02" "6964"),
    (AddVs(SERVER_1._replace(mode=Mode.PROXY, flags=Flag.RAW_PROXY, greeting=Greeting(1460, 7, True, 10_000))),
     "00000005" "00000000000000000000ffff0a010001" + NONE +
     "0050" "0200" "003c" "0000" "06" "01" "03" "00" "02" "6964" "05b4" "07" "01" "00002710"),
    (AddVs(SERVER_1._replace(flags=Flag.LIMITED, limits=Limits(1000, 0, -1, 7, 24))),
     "00000005" "00000000000000000000ffff0a010001" + NONE +
     "0050" "0400" "003c" "0000" "06" "01" "02" "00" "02" "6964" "000003e8" "00000000" "ffffffff" "00000007" "18"),
    (Keys(1, 3, bytes(range(32))), "01" "03" + bytes(range(32)).hex()),
    (DeleteVs(5), "00000005"),
    (VsListRequest(), "01"),
    (VsList(0, 1, ()), "02" "0000" "0001" "0000"),
    (Table(5, 3, 0, 2, (TARGET,)), "00000005" "00000003" "0000" "0002" "0001"
     "00000009" "00000000000000000000ffff0a000009" "1f90" "020202020202" "00000004" "0064" "03"),
    (SyncDone(5), "00000005"),
    (Counters(0, 1, 3, (("hits", 258),), (Traffic(5, 9, 4, 1, 40, 4000),)), "0000" "0001" "00000003" "0001" "0001"
     "04" "68697473" "0000000000000102"
     "00000005" "00000009" "0000000000000004" "0000000000000001" "0000000000000028" "0000000000000fa0"),
]


@pytest.mark.parametrize(("message", "expected"), FIXTURES, ids=lambda case: type(case).__name__)
def test_bodies_are_as_documented(message, expected):
    kind, body = csmb.encode(message)
    assert body.hex() == expected
    assert csmb.decode(kind, bytes.fromhex(expected)) == message


@pytest.mark.parametrize("message", [
    AddVs(SERVER_1._replace(mode=Mode.PROXY)), AddVs(SERVER_1._replace(greeting=Greeting(1460, 7, True, 1))),
    AddVs(SERVER_1._replace(mode=Mode.PROXY, greeting=Greeting(1 << 16, 7, True, 1))), Keys(0, 1, b"short"),
    AddVs(SERVER_1._replace(flags=Flag.LIMITED)), AddVs(SERVER_1._replace(limits=Limits(1, 1, 1, 1, 32))),
    AddVs(SERVER_1._replace(port=65536)), AddVs(SERVER_1._replace(address=b"")),
    AddVs(SERVER_1._replace(address=MAPPED + bytes(4))), AddVs(SERVER_1._replace(app_data=bytes(256))),
    Table(5, 3, 2, 2, ()), Table(5, 3, 0, 1, (TARGET._replace(mac=b""),)), Challenge(b"short"),
    Hello(Version(16, 0), Role.DFS, 1, 1, 1, b"", 1, 1), DeleteVs(2**32), "no message",
    Counters(0, 1, 0, (("", 1),), ()), Counters(0, 1, 0, (("x" * 65, 1),), ()), Counters(0, 1, 0, (("é", 1),), ()),
    Counters(1, 1, 0, (), ()), Counters(0, 1, 0, (("x", 2**64),), ()),
])
def test_what_cannot_be_carried_is_an_encode_error(message):
    with pytest.raises(EncodeError):
        csmb.encode(message)


@pytest.mark.parametrize(("kind", "body", "fault"), [
    (Kind.KEYS, "01" "01" + "00" * 32, Fault.VALUE), (Kind.KEYS, "02" "07" + "00" * 32, Fault.VALUE),
    (Kind.KEYS, "00" "03" + "00" * 31, Fault.LENGTH),
    (99, "", Fault.KIND), (Kind.AUTH, "03" + "00" * 32, Fault.VALUE), (Kind.AUTH, "01", Fault.LENGTH),
    (Kind.VS_LIST, "", Fault.VALUE), (Kind.VS_LIST, "02" "0001" "0001" "0000", Fault.VALUE),
    (Kind.TABLE, "00000005" "00000003" "0000" "0001" "ffff", Fault.LENGTH), (Kind.SYNC_DONE, "", Fault.LENGTH),
    (Kind.VS_LIST, "02" "0000" "0001" "ffff", Fault.SHORT),
    (Kind.COUNTERS, "", Fault.SHORT), (Kind.COUNTERS, "0000" "0001" "00000000" "0000" "0001", Fault.LENGTH),
    (Kind.COUNTERS, "0000" "0001" "00000000" "0001" "0000" "00" + "00" * 8, Fault.LENGTH),
    (Kind.COUNTERS, "0000" "0001" "00000000" "0001" "0000" "01" "ff" + "00" * 8, Fault.VALUE),
    (Kind.COUNTERS, "0000" "0001" "00000000" "00ff" "0000", Fault.LIMIT),
    (Kind.COUNTERS, "0000" "ffff" "00000000" "0000" "0000", Fault.LIMIT),
])
def test_faults_have_names(kind, body, fault):
    with pytest.raises(DecodeError) as caught:
        csmb.decode(kind, bytes.fromhex(body))
    assert caught.value.fault is fault


def test_a_large_distribution_is_several_messages():
    targets = tuple(TARGET._replace(member=member) for member in range(1200))
    found = csmb.tables(5, 3, targets)
    assert [(table.part, table.parts) for table in found] == [(0, 3), (1, 3), (2, 3)]
    assert sum((table.targets for table in found), ()) == targets
    for table in found:
        _, body = csmb.encode(table)
        assert len(body) <= csmb.LONGEST - 24
    with pytest.raises(EncodeError) as caught:
        csmb.tables(5, 3, (TARGET,) * (csmb.MOST_TARGETS + 1))
    assert caught.value.fault is Fault.LIMIT


def test_what_was_counted_is_cut_into_messages_and_bounded():
    rows = [Traffic(number, 1, 2, 3, 4, 5) for number in range(counted.MOST_TRAFFIC + 10)]
    found = counted.counters(7, {f"name {number:059}": number for number in range(500)}, rows)
    assert [(one.part, one.parts, one.connections) for one in found] == [(part, 64, 7) for part in range(64)]
    assert [len(one.counters) for one in found] == [counted.MOST_COUNTERS] + [0] * 63
    assert [row for one in found for row in one.traffic] == rows[:counted.MOST_TRAFFIC]
    for one in found[:2]:
        assert csmb.decode(*csmb.encode(one)) == one
    assert counted.counters(0, {}, []) == [Counters(0, 1, 0, (), ())]


@given(st.lists(servers, min_size=0, max_size=300))
@settings(max_examples=10)
def test_the_largest_answers_fit_in_a_message(some):
    for part in csmb.lists([server._replace(app_data=bytes(255)) for server in some]):
        csmb.encode(part)


class TestDesired:
    def test_only_differences_are_said(self):
        desired = Desired()
        desired.replace([SERVER_1], {5: [TARGET]})
        assert desired.dirty == {}  # there is nobody yet
        desired.all_again()
        assert desired.dirty == {5: SERVER | TABLE}
        desired.dirty.clear()
        desired.replace([SERVER_1], {5: [TARGET]})
        assert desired.dirty == {}
        desired.replace([SERVER_1], {5: [TARGET._replace(weight=0)]})
        assert desired.dirty == {5: TABLE}
        assert desired.tables[5][0] == 2

    def test_a_removed_one_takes_its_distribution_along(self):
        desired = Desired()
        desired.replace([SERVER_1], {5: [TARGET]})
        desired.all_again()
        desired.replace([], {})
        assert not desired.servers and not desired.tables and desired.dirty == {5: SERVER | TABLE}
        desired.silence()
        assert desired.dirty == {}

    def test_what_cannot_be_said_is_refused_at_once(self):
        desired = Desired()
        with pytest.raises(EncodeError):
            desired.put(SERVER_1._replace(port=-1))
        with pytest.raises(EncodeError):
            desired.distribute(5, [TARGET])
        desired.put(SERVER_1)
        with pytest.raises(EncodeError):
            desired.distribute(5, [TARGET._replace(weight=70000)])
        assert desired.tables == {}

    @pytest.mark.parametrize(("keys", "current"), [
        ((b"a" * 16, None), 1), ((None, None), 0), ((b"a" * 15, None), 0), ((b"a" * 16, b"b" * 17), 0),
        ((b"a" * 16, b"b" * 16), 2)])
    def test_keys_that_cannot_be_said_are_not_taken(self, keys, current):
        desired = Desired()
        desired.greet((b"k" * 16, None), 0)
        with pytest.raises(EncodeError):
            desired.greet(keys, current)
        desired.all_again()
        assert desired.keys == ((b"k" * 16, None), 0) and desired.keys_dirty
        desired.silence()
        assert not desired.keys_dirty
