# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.ssmb, lbapp.bus.records: values ⇄ datagrams, and bytes that are none. What clients say is in
test_bus_application.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.bus import ssmb
from lbapp.bus.auth import Role
from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.bus.ssmb import Kind
from lbapp.control.messages import (
    Closed,
    Delete,
    Error,
    FlowSignature,
    Host,
    NewFlow,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Reset,
    Stats,
    Timeout,
    Translation,
)

SWITCH = 0x2A
KEY = bytes(range(32))
ROOM = ssmb.room()

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
mac = st.binary(min_size=6, max_size=6)
host = st.builds(Host, mac, u32)


def queries(size):
    address = st.binary(min_size=size, max_size=size)
    return st.builds(Query, u32, st.just(SWITCH), u32, mac,
                     st.builds(FlowSignature, address, u16, address, u16, u8, u8), u32, u16)


def translations(size):
    return st.builds(Translation, st.none() | st.binary(min_size=size, max_size=size), u16, host, st.booleans())


def of(size):
    offsets = st.tuples(u32, u32, st.integers(-128, 127)) | st.just((None, None, 0))
    return {
        Kind.QUERY: queries(size),
        Kind.REPLY: st.builds(Reply, queries(size), st.sampled_from(Error), u32, st.none() | translations(size),
                              st.booleans(), st.booleans()),
        Kind.NEWFLOW: st.builds(lambda q, m, t, k, o, *f: NewFlow(q, m, t, k, *o, *f), queries(size), u32,
                                translations(size), st.booleans(), offsets, st.booleans(), st.booleans()),
        Kind.DELETE: st.builds(Closed, u32, u32, u32, st.sampled_from(Reason), st.booleans(), st.booleans(), u64, u64,
                               st.integers(0, 2**40).map(lambda ms: ms / 1000)),
        Kind.REAP: st.builds(Reap, st.just(SWITCH), u32, u32, u32, st.booleans()),
        Kind.TIMEOUT: st.builds(Timeout, st.just(SWITCH), u32, u32),
        Kind.STATS: st.builds(Stats, st.just(SWITCH), u32, st.sampled_from(Error), u64, u64),
        Kind.REFUSED: st.builds(Refused, st.just(SWITCH), u32, u32),
    }


anything = st.sampled_from([4, 16]).flatmap(
    lambda size: st.sampled_from(sorted(of(size))).flatmap(
        lambda kind: st.tuples(st.just(kind), st.lists(of(size)[kind], min_size=1, max_size=90))))


def there_and_back(kind, messages):
    out = []
    for body in ssmb.pack(kind, messages, ROOM):
        assert len(body.payload) <= ROOM
        datagram = ssmb.seal(KEY, Role.DFS, body, 0x10, 5, 6, batch=9, back=1, ack=7)
        assert len(datagram) <= ssmb.LIMIT
        assert ssmb.authentic(KEY, datagram)
        head = ssmb.header(datagram)
        assert head == ssmb.Header(0x10, kind, body.flags, body.number, 1, 5, 6, 9, 7)
        out += ssmb.unpack(head.kind, head.flags, head.number, ssmb.payload(datagram), SWITCH)
    return out


@given(anything)
@settings(max_examples=150)
def test_what_is_packed_comes_back(case):
    kind, messages = case
    found = there_and_back(kind, messages)
    if kind is Kind.DELETE:
        assert [closed for delete in found for closed in delete.closed] == messages
        assert {delete.switch for delete in found} == {SWITCH}
    else:
        assert found == messages


@given(st.integers(0, 30), u8, u8, st.binary(max_size=200))
@settings(max_examples=600)
def test_any_bytes_are_messages_or_a_decode_error(kind, flags, number, records):
    try:
        messages = ssmb.unpack(kind, flags, number, records, SWITCH)
    except DecodeError as error:
        assert isinstance(error.fault, Fault)
    else:
        assert len(messages) in (number, 1)


@given(anything, st.data())
@settings(max_examples=150)
def test_a_body_cut_short_or_with_more_behind_is_no_body(case, data):
    kind, messages = case
    body = ssmb.pack(kind, messages, ROOM)[0]
    cut = data.draw(st.integers(0, len(body.payload) - 1))
    for records in (body.payload[:cut], body.payload + b"\x00"):
        with pytest.raises(DecodeError):
            ssmb.unpack(body.kind, body.flags, body.number, records, SWITCH)


@given(st.binary(max_size=120))
def test_any_datagram_has_a_header_or_is_too_short(datagram):
    if len(datagram) < ssmb.OVERHEAD:
        with pytest.raises(DecodeError) as caught:
            ssmb.header(datagram)
        assert caught.value.fault is Fault.SHORT
    else:
        ssmb.header(datagram)
        assert not ssmb.authentic(KEY, datagram)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_one_changed_bit_is_noticed(place, flip):
    body = ssmb.pack(Kind.TIMEOUT, [Timeout(SWITCH, 1, 60)], ROOM)[0]
    datagram = bytearray(ssmb.seal(KEY, Role.CS, body, 0x10, 5, 6))
    datagram[place % len(datagram)] ^= flip
    assert not ssmb.authentic(KEY, bytes(datagram))


# ------------------------------------------------------------------ bytes as documented

SIGNATURE = FlowSignature(b"\x0a\x00\x00\x01", 40000, b"\x0a\x01\x00\x01", 80, 6, 0)
QUERY = Query(7, SWITCH, 3, b"\x02\x00\x00\x00\x00\x01", SIGNATURE, 5, 2)
QUERY_HEX = "00000007" "00000003" "00000005" "0002" "06" "00" "020000000001" "0a000001" "0a010001" "9c40" "0050"

FIXTURES = [
    (Kind.QUERY, [QUERY], QUERY_HEX),
    (Kind.REPLY, [Reply(QUERY, Error.OK, 9, Translation(b"\x0a\x00\x00\x09", 8080, Host(b"\x02" * 6, 4), True))],
     QUERY_HEX + "00" "1d" "00000009" "0a000009" "1f90" "020202020202" "00000004"),
    (Kind.REPLY, [Reply(QUERY, Error.CONNLIMIT, install=False)],
     QUERY_HEX + "03" "00" "00000000" "00000000" "0000" "000000000000" "00000000"),
    (Kind.NEWFLOW, [NewFlow(QUERY, 9, Translation(None, 0, Host(b"\x02" * 6, 4)), True, 0x10, 0xFFFFFFF0)],
     QUERY_HEX + "00" "27" "00000009" "00000000" "0000" "020202020202" "00000004" "00000010" "fffffff0"),
    (Kind.NEWFLOW, [NewFlow(QUERY, 9, Translation(None, 0, Host(b"\x02" * 6, 4)), False, 0, 5, -3)],
     QUERY_HEX + "fd" "25" "00000009" "00000000" "0000" "020202020202" "00000004" "00000000" "00000005"),
    (Kind.NEWFLOW, [NewFlow(QUERY, 9, Translation(None, 0, Host(b"\x02" * 6, 4)), member_finished=True)],
     QUERY_HEX + "00" "85" "00000009" "00000000" "0000" "020202020202" "00000004" "00000000" "00000000"),
    (Kind.NEWFLOW, [NewFlow(QUERY, 9, Translation(None, 0, Host(b"\x02" * 6, 4)), client_finished=True)],
     QUERY_HEX + "00" "45" "00000009" "00000000" "0000" "020202020202" "00000004" "00000000" "00000000"),
    (Kind.REAP, [Reap(SWITCH, 7, 5, 9, True)], "00000007" "00000005" "00000009" "01"),
    (Kind.TIMEOUT, [Timeout(SWITCH, 7, 60)], "00000007" "0000003c"),
    (Kind.STATS, [Stats(SWITCH, 7, Error.CONNALIVE, 300, 5)], "00000007" "04" "ac02" "05"),
    (Kind.REFUSED, [Refused(SWITCH, 7, 5)], "00000007" "00000005"),
]


@pytest.mark.parametrize(("kind", "messages", "expected"), FIXTURES, ids=lambda case: getattr(case, "name", ""))
def test_records_are_as_documented(kind, messages, expected):
    (body,) = ssmb.pack(kind, messages, ROOM)
    assert body.payload.hex() == expected
    assert ssmb.unpack(kind, 0, 1, bytes.fromhex(expected), SWITCH) == messages


def test_deletes_are_as_documented():
    closed = [Closed(1000, 5, 9, Reason.SHUTDOWN, False, True, 6, 900, 0.25),
              Closed(1000, 5, 9, Reason.SHUTDOWN, True, True, 4, 90000, 0.25),
              Closed(998, 6, 9, Reason.IDLE, False, False)]
    (body,) = ssmb.pack(Kind.DELETE, closed, ROOM)
    assert body.payload.hex() == ("10" "d00f" "05" "09" "06" "8407" "fa01"
                                  "38" "00" "09" "04" "90bf05" "fa01"
                                  "01" "03" "06" "09" "00" "00" "00")
    assert ssmb.unpack(Kind.DELETE, 0, 3, body.payload, SWITCH) == [Delete(SWITCH, tuple(closed))]


def test_a_datagram_is_as_documented():
    body = ssmb.pack(Kind.TIMEOUT, [Timeout(SWITCH, 7, 60)], ROOM)[0]
    datagram = ssmb.seal(KEY, Role.CS, body, 0x10, 0x1122334455667788, 3, ack=9)
    assert datagram[:-16].hex() == ("10" "07" "02" "01" "0000" "1122334455667788" "0000000000000003"
                                    "0000000000000000" "0000000000000009" "00000007" "0000003c")
    # HMAC-SHA256 of the bytes above with the key, cut to 16 bytes.
    assert datagram[-16:].hex() == "a6d226c42fa1c226ff2448c388d8f9f2"


def test_reset_and_lost():
    body = ssmb.reset(3, 4)
    assert ssmb.unpack(body.kind, body.flags, body.number, body.payload, SWITCH) == [Reset(SWITCH)]
    assert ssmb.reset_floor(body.payload) == (3, 4)
    body = ssmb.lost(77)
    assert ssmb.unpack(body.kind, body.flags, body.number, body.payload, SWITCH) == [ssmb.Lost(SWITCH, 77)]
    with pytest.raises(DecodeError):
        ssmb.unpack(body.kind, 0, 2, body.payload * 2, SWITCH)


# ------------------------------------------------------------------ batches


def test_at_least_64_large_deletes_fit_in_one_datagram():
    """Long transfers, numbers of virtual servers and members of three bytes, serials in no order."""
    closed = [Closed(1_000_000 + index * 7919 % 8000, 70_000, 70_000 + index, Reason.SHUTDOWN, bool(index & 1), True,
                     2_000_000, 3_000_000_000, 36_000.5) for index in range(64)]
    assert len(ssmb.pack(Kind.DELETE, closed, ROOM)) == 1


def test_short_connections_fit_twice_as_often():
    closed = [Closed(5000 + index // 2, 5, 9, Reason.SHUTDOWN, bool(index & 1), True, 6, 900, 0.25)
              for index in range(500)]
    bodies = ssmb.pack(Kind.DELETE, closed, ROOM)
    assert bodies[0].number >= 128
    assert sum(body.number for body in bodies) == 500


def test_families_are_not_mixed_in_one_datagram():
    six = QUERY._replace(signature=SIGNATURE._replace(source=bytes(16), destination=bytes(16)))
    bodies = ssmb.pack(Kind.QUERY, [QUERY, six, QUERY], ROOM)
    assert [(body.flags, body.number) for body in bodies] == [(0, 2), (ssmb.SIX, 1)]


def test_full_is_what_fits():
    for kind in (Kind.QUERY, Kind.REPLY):
        message = QUERY if kind is Kind.QUERY else Reply(QUERY, Error.OK)
        assert [b.number for b in ssmb.pack(kind, [message] * ssmb.full(kind), ROOM)] == [ssmb.full(kind)]
        assert len(ssmb.pack(kind, [message] * (ssmb.full(kind) + 1), ROOM)) == 2
    assert ssmb.full(Kind.QUERY) >= 32


@pytest.mark.parametrize(("kind", "message"), [
    (Kind.QUERY, QUERY._replace(serial=2**32)),
    (Kind.QUERY, QUERY._replace(client_mac=b"short")),
    (Kind.QUERY, QUERY._replace(signature=SIGNATURE._replace(destination=bytes(16)))),
    (Kind.QUERY, QUERY._replace(in_port="1")),
    (Kind.REPLY, Reply(QUERY, Error.OK, 1, Translation(bytes(16), 1, Host(bytes(6), 1)))),
    (Kind.REPLY, QUERY),
    (Kind.NEWFLOW, NewFlow(QUERY, 1, Translation(None, 1, Host(bytes(6), 1)), False, 1, None)),
    (Kind.NEWFLOW, NewFlow(QUERY, 1, Translation(None, 1, Host(bytes(6), 1)), False, None, None, 1)),
    (Kind.NEWFLOW, NewFlow(QUERY, 1, Translation(None, 1, Host(bytes(6), 1)), False, 0, 1, 128)),
    (Kind.DELETE, Closed(-1, 0, 0, Reason.IDLE)),
    (Kind.DELETE, Closed(1, 0, 0, Reason.IDLE, packets=-1)),
    (Kind.DELETE, Closed(1, 0, 0, Reason.IDLE, duration=float("nan"))),
    (Kind.STATS, Stats(SWITCH, 1, Error.OK, 2**64)),
])
def test_what_cannot_be_carried_is_an_encode_error(kind, message):
    with pytest.raises(EncodeError):
        ssmb.pack(kind, [message], ROOM)


@pytest.mark.parametrize(("kind", "flags", "number", "records", "fault"), [
    (Kind.QUERY, 0, 0, "", Fault.LENGTH),
    (Kind.QUERY, 0, 2, QUERY_HEX, Fault.LENGTH),
    (Kind.QUERY, 0x80, 1, QUERY_HEX, Fault.VALUE),
    (Kind.QUERY, ssmb.SIX, 1, QUERY_HEX, Fault.LENGTH),
    (0, 0, 1, QUERY_HEX, Fault.KIND),
    (Kind.STATS, 0, 1, "00000007" "63" "00" "00", Fault.VALUE),
    (Kind.STATS, 0, 1, "00000007" "01" "8000" "00", Fault.VALUE),
    (Kind.STATS, 0, 1, "00000007" "01" "ffffffffffffffffffff01" "00", Fault.VALUE),
    (Kind.DELETE, 0, 1, "30" "00" "00" "00" "00" "00", Fault.VALUE),
    (Kind.DELETE, 0, 1, "17" "00" "00" "00" "00" "00" "00", Fault.VALUE),
    (Kind.DELETE, 0, 1, "10" "01" "00" "00" "00" "00" "00", Fault.VALUE),
    (Kind.REAP, 0, 1, "00000007" "00000005" "00000009" "02", Fault.VALUE),
    (Kind.ACK, 0, 0, "00", Fault.LENGTH),
])
def test_faults_have_names(kind, flags, number, records, fault):
    with pytest.raises(DecodeError) as caught:
        ssmb.unpack(kind, flags, number, bytes.fromhex(records), SWITCH)
    assert caught.value.fault is fault
