# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.application: what clients say and are answered ⇄ records, whole or in parts, and bytes that are neither."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.bus import application, ssmb
from lbapp.bus.application import MOST_DATA, MOST_FAILED, Assembly, Part
from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.bus.ssmb import Kind
from lbapp.control.messages import (
    AppQuery,
    AppReply,
    Binding,
    Edit,
    Error,
    FlowSignature,
    Host,
    Query,
    Reply,
    Translation,
)

SWITCH = 0x2A
ROOM = ssmb.room()
u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
mac = st.binary(min_size=6, max_size=6)
large = st.integers(0, MOST_DATA).map(lambda size: (b"GET / HTTP/1.1\r\n" * (size // 16 + 1))[:size])
some = st.binary(max_size=3000) | large


def queries(size):
    address = st.binary(min_size=size, max_size=size)
    return st.builds(Query, u32, st.just(SWITCH), u32, mac,
                     st.builds(FlowSignature, address, u16, address, u16, u8, u8), u32, u16)


def app_queries(size):
    return st.builds(AppQuery, queries(size), u32, u32, st.binary(max_size=40), some,
                     st.lists(u32, max_size=MOST_FAILED).map(tuple), st.booleans())


def app_replies(size):
    translation = st.builds(Translation, st.none() | st.binary(min_size=size, max_size=size), u16,
                            st.builds(Host, mac, u32), st.booleans())
    decided = st.builds(
        lambda query, error, member, translation, install, tracked, binding, answer: AppReply(
            query, Reply(query, error, member, translation, install, tracked), binding, answer),
        queries(size), st.sampled_from(Error), u32, st.none() | translation, st.booleans(), st.booleans(),
        st.sampled_from(Binding), some)
    edits = st.builds(Edit, u32, u32, some.filter(lambda text: len(text) <= MOST_DATA - 8))
    edited = st.builds(lambda query, member, translation, edit: AppReply(query, Reply(
        query, Error.OK, member, translation), edit=edit), queries(size), u32, translation, edits)
    return decided | edited | queries(size).map(AppReply)


anything = st.sampled_from([4, 16]).flatmap(lambda size: st.tuples(
    st.just(Kind.APP_QUERY), st.lists(app_queries(size), min_size=1, max_size=5)) | st.tuples(
    st.just(Kind.APP_REPLY), st.lists(app_replies(size), min_size=1, max_size=5)))
"""Messages of one type and family."""


def unpack(kind, flags, data):
    return ssmb.unpack(kind, flags, 1, data, SWITCH)


def taken(bodies):
    """What a peer makes of these bodies."""
    assembly, out = Assembly(), []
    for body in bodies:
        found = ssmb.unpack(body.kind, body.flags, body.number, body.payload, SWITCH)
        if body.kind is Kind.PART:
            found = assembly.take(found[0], unpack)
        out += found
    return out


@given(anything, st.sampled_from([ROOM, ssmb.room(ssmb.LIMITS[0]), ssmb.room(ssmb.LIMITS[1])]))
@settings(max_examples=150)
def test_what_is_packed_comes_back(case, room):
    kind, messages = case
    bodies = ssmb.pack(kind, messages, room)
    assert all(len(body.payload) <= room for body in bodies)
    assert taken(bodies) == messages


@given(st.sampled_from([Kind.APP_QUERY, Kind.APP_REPLY, Kind.PART]), st.sampled_from([0, ssmb.SIX]), u8,
       st.binary(max_size=300))
@settings(max_examples=600)
def test_any_bytes_are_messages_or_a_decode_error(kind, flags, number, records):
    try:
        messages = ssmb.unpack(kind, flags, number, records, SWITCH)
    except DecodeError as error:
        assert isinstance(error.fault, Fault)
    else:
        assert len(messages) == number


@given(st.lists(st.builds(Part, st.sampled_from([2, 20]), st.sampled_from([0, 1]), st.integers(0, 3),
                          st.integers(2, 4), st.binary(min_size=1, max_size=90)), max_size=30))
@settings(max_examples=300)
def test_any_parts_are_messages_nothing_or_a_decode_error(parts):
    assembly = Assembly()
    for part in parts:
        try:
            messages = assembly.take(part, unpack)
        except DecodeError as error:
            assert isinstance(error.fault, Fault)
        else:
            assert all(isinstance(message, (AppQuery, AppReply)) for message in messages)


@given(anything, st.data())
@settings(max_examples=150)
def test_a_body_cut_short_or_with_more_behind_is_no_body(case, data):
    kind, messages = case
    body = next((one for one in ssmb.pack(kind, messages, ROOM) if one.kind is kind), None)
    if body is None:
        return  # all in parts: their ends show only together
    cut = data.draw(st.integers(0, len(body.payload) - 1))
    for records in (body.payload[:cut], body.payload + b"\x00"):
        with pytest.raises(DecodeError):
            ssmb.unpack(body.kind, body.flags, body.number, records, SWITCH)


# ------------------------------------------------------------------ bytes as documented

SIGNATURE = FlowSignature(b"\x0a\x00\x00\x01", 40000, b"\x0a\x01\x00\x01", 80, 6, 0)
QUERY = Query(7, SWITCH, 3, b"\x02\x00\x00\x00\x00\x01", SIGNATURE, 5, 2)
QUERY_HEX = "00000007" "00000003" "00000005" "0002" "06" "00" "020000000001" "0a000001" "0a010001" "9c40" "0050"
NOWHERE = "00000000" "0000" "000000000000" "00000000"
REPLY = Reply(QUERY, Error.OK, 9, Translation(b"\x0a\x00\x00\x09", 8080, Host(b"\x02" * 6, 4), True))

FIXTURES = [
    (Kind.APP_QUERY, AppQuery(QUERY, 1, 2, b"\x02\x04\x05\xb4", b"GET"),
     QUERY_HEX + "00000001" "00000002" "00" "00" "04" "00000003" "020405b4" "474554"),
    (Kind.APP_QUERY, AppQuery(QUERY, 1, 2, b"", b"GET", (9, 3), True),
     QUERY_HEX + "00000001" "00000002" "01" "02" "00" "00000003" "00000009" "00000003" "474554"),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, Binding.HANDOFF),
     QUERY_HEX + "00" "1d" "00000009" "0a000009" "1f90" "020202020202" "00000004" "02" "00000000"),
    (Kind.APP_REPLY, AppReply(QUERY, Reply(QUERY, Error.NOTAVAIL, install=False), answer=b"503"),
     QUERY_HEX + "02" "00" "00000000" + NOWHERE + "00" "00000003" "353033"),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, edit=Edit(258, 3, b"close")),
     QUERY_HEX + "00" "1d" "00000009" "0a000009" "1f90" "020202020202" "00000004" "04" "0000000d" "00000102" "00000003"
     "636c6f7365"),
    (Kind.APP_REPLY, AppReply(QUERY), QUERY_HEX + "00" "00" "00000000" + NOWHERE + "01" "00000000"),
]


@pytest.mark.parametrize(("kind", "message", "expected"), FIXTURES)
def test_records_are_as_documented(kind, message, expected):
    (body,) = ssmb.pack(kind, [message], ROOM)
    assert body.payload.hex() == expected
    assert ssmb.unpack(kind, 0, 1, bytes.fromhex(expected), SWITCH) == [message]


def test_parts_are_as_documented():
    message = AppQuery(QUERY, 1, 2, b"", b"x" * 2000)
    whole = QUERY_HEX + "00000001" "00000002" "00" "00" "00" "000007d0" + b"x".hex() * 2000
    first, second = ssmb.pack(Kind.APP_QUERY, [message], ROOM)
    assert (first.kind, first.number, first.flags) == (second.kind, second.number, second.flags) == (Kind.PART, 1, 0)
    step = ROOM - 3
    assert first.payload.hex() == "02" "00" "02" + whole[:2 * step]
    assert second.payload.hex() == "02" "01" "02" + whole[2 * step:]
    assert taken([first, second]) == [message]


# ------------------------------------------------------------------ bounds and faults


def test_the_most_that_is_kept_of_a_client_fits_whatever_the_limit_is():
    message = AppQuery(QUERY, 1, 2, bytes(40), bytes(68 << 10), tuple(range(MOST_FAILED)))
    for limit in ssmb.LIMITS:
        assert taken(ssmb.pack(Kind.APP_QUERY, [message], ssmb.room(limit))) == [message]


@pytest.mark.parametrize(("kind", "message", "fault"), [
    (Kind.APP_QUERY, AppQuery(QUERY, 1, 2, b"", bytes(MOST_DATA + 1)), Fault.LONG),
    (Kind.APP_QUERY, AppQuery(QUERY, 1, 2, b"", b"", (1,) * (MOST_FAILED + 1)), Fault.LONG),
    (Kind.APP_QUERY, AppQuery(QUERY, 1, 2, bytes(256), b""), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, Binding.SPLICE, bytes(MOST_DATA + 1)), Fault.LONG),
    (Kind.APP_REPLY, AppReply(QUERY, answer=b"too early"), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY._replace(serial=8), REPLY), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, Binding.HANDOFF, edit=Edit(0, 0, b"x")), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, answer=b"x", edit=Edit(0, 0, b"x")), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY, edit=Edit(0, 0, b"x")), Fault.VALUE),
    (Kind.APP_REPLY, AppReply(QUERY, REPLY, edit=Edit(0, 0, bytes(MOST_DATA))), Fault.LONG),
    (Kind.APP_REPLY, REPLY, Fault.VALUE),
])
def test_what_cannot_be_carried_is_an_encode_error(kind, message, fault):
    with pytest.raises(EncodeError) as caught:
        ssmb.pack(kind, [message], ROOM)
    assert caught.value.fault is fault


@pytest.mark.parametrize(("kind", "records", "fault"), [
    (Kind.APP_QUERY, QUERY_HEX + "00000001" "00000002" "02" "00" "00" "00000000", Fault.VALUE),
    (Kind.APP_QUERY, QUERY_HEX + "00000001" "00000002" "00" "21" "00" "00000000", Fault.VALUE),
    (Kind.APP_QUERY, QUERY_HEX + "00000001" "00000002" "00" "00" "00" "ffffffff", Fault.VALUE),
    (Kind.APP_QUERY, QUERY_HEX + "00000001" "00000002" "00" "01" "00" "00000000" "0000", Fault.SHORT),
    (Kind.APP_REPLY, QUERY_HEX + "00" "20" "00000000" + NOWHERE + "00" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "00" "00" "00000000" + NOWHERE + "03" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "02" "00" "00000000" + NOWHERE + "01" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "00" "00" "00000000" + NOWHERE + "05" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "00" "00" "00000000" + NOWHERE + "08" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "00" "00" "00000000" + NOWHERE + "04" "00000007" "00000000000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "02" "00" "00000000" + NOWHERE + "04" "00000008" "0000000000000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "09" "00" "00000000" + NOWHERE + "00" "00000000", Fault.VALUE),
    (Kind.APP_REPLY, QUERY_HEX + "00" "00" "00000000" + NOWHERE + "00" "00000001", Fault.SHORT),
    (Kind.PART, "020002", Fault.SHORT), (Kind.PART, "02020200", Fault.VALUE), (Kind.PART, "02000100", Fault.VALUE),
    (Kind.PART, "01000200", Fault.VALUE), (Kind.PART, "13000200", Fault.VALUE),
])
def test_faults_have_names(kind, records, fault):
    with pytest.raises(DecodeError) as caught:
        ssmb.unpack(kind, 0, 1, bytes.fromhex(records), SWITCH)
    assert caught.value.fault is fault


def test_what_is_not_begun_or_not_continued_is_no_message():
    pieces = [ssmb.unpack(body.kind, 0, 1, body.payload, SWITCH)[0]
              for body in ssmb.pack(Kind.APP_QUERY, [AppQuery(QUERY, 1, 2, b"", b"x" * 4000)], ROOM)]
    assert len(pieces) == 4
    assembly = Assembly()
    for piece in pieces[2:]:
        assert assembly.take(piece, unpack) == [], "its beginning was said to somebody else"
    for piece in (pieces[0], pieces[1], pieces[3]):
        assert assembly.take(piece, unpack) == [], "one is missing"
    for piece in pieces[:3]:
        assert assembly.take(piece, unpack) == []
    assert assembly.take(pieces[3], unpack)[0].data == b"x" * 4000


def test_what_arrives_is_bounded():
    assembly = Assembly()
    with pytest.raises(DecodeError) as caught:
        for number in range(255):
            assembly.take(Part(Kind.APP_QUERY, 0, number, 255, bytes(8000)), unpack)
    assert caught.value.fault is Fault.LONG
    assert number == application.LONGEST // 8000
    with pytest.raises(DecodeError):
        assembly.take(Part(Kind.APP_QUERY, 0, 0, 2, b"no"), unpack)
        assembly.take(Part(Kind.APP_QUERY, 0, 1, 2, b"message"), unpack)
