# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Spliced connections, packet in, packet out: what is translated, what waits, and that nothing stays behind.

Programs: ``lbapp/dataflow/fastpath/splice.bpf.h``, ``connections.bpf.h``, ``sweep.bpf.h``.
"""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import pytest

from lbapp.dataflow.fastpath import kernel, layout
from lbapp.dataflow.fastpath import tables as tables_module
from lbapp.dataflow.fastpath.layout import Ask, FlowKey, Hash, Mode, Reason, Result, Service, ServiceKey, Splice
from lbapp.values import astuple
from tests.fastpath_packets import (
    ACK,
    BOTH,
    CHECKSUM_COMPLETE,
    FAMILIES,
    FIN,
    REDIRECT,
    RST,
    SHOT,
    SYN,
    TCP,
    UDP,
    WIRE,
    Bench,
    Seen,
    answer,
    frame,
    packed,
    request,
    require_programs,
    run_marked,
    segment,
    wrap,
)

pytest_plugins = ["tests.fastpath_packets"]

CLIENT, VIRTUAL, MEMBER = FAMILIES[4]
OFFSETS = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678]
WORD = 0xFFFFFFFF
SERIAL = 9
ELSEWHERE = 4711
"""A wire that is not where the tests' programs run."""
THERE = FlowKey(packed(CLIENT), packed(VIRTUAL), 40000, 80, TCP)
A_MOMENT_AGO = -10_000
"""However long this process is kept waiting."""


def open_one(tables: Bench, splice: Splice | None, family: int = 4, state: int = 0, serial: int = SERIAL) -> None:
    client, virtual, member = FAMILIES[family]
    assert tables.connect(client, virtual, member, state=state | layout.SPLICE, serial=serial) is Result.OPENED
    if splice is not None:
        assert tables.set_splices({serial: splice}) == set()


def counts(seen: Seen) -> tuple[int, int, int]:
    return seen.seq, seen.ack, seen.window


# ------------------------------------------------------------------ what is translated


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("number", [0, 1, 2000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_numbers(tables: Bench, family: int, offset: int, number: int) -> None:
    """Client to member: ack. Member to client: seq. Modulo 2**32; nothing else."""
    open_one(tables, Splice(offset), family)
    seen = tables.walk(request(family, seq=number, ack=number, payload=b"question"))
    assert (*counts(seen), seen.payload) == (number, number + offset & WORD, 500, b"question")
    assert (seen.destination, seen.dport) == (FAMILIES[family][2], 8080)
    seen = tables.walk(answer(family, seq=number, ack=number, payload=b"the answer"))
    assert (*counts(seen), seen.payload) == (number - offset & WORD, number, 500, b"the answer")
    assert (seen.source, seen.sport) == (FAMILIES[family][1], 80)


@pytest.mark.parametrize("flags", [ACK | FIN, ACK | RST, RST, FIN, SYN, SYN | ACK, ACK | 8])
@pytest.mark.parametrize("offset", OFFSETS[1:])
def test_flags(tables: Bench, flags: int, offset: int) -> None:
    """An acknowledgment is one only where the flag says so; windows of SYN are never scaled (RFC 7323, 2.2)."""
    open_one(tables, Splice(offset, 2, 1))
    seen = tables.walk(request(flags=flags, seq=5, ack=6, window=7))
    assert counts(seen) == (5, 6 + (offset if flags & ACK else 0) & WORD, 7 if flags & SYN else 14)
    assert seen.flags == flags
    tables.reset()
    open_one(tables, Splice(offset, 2, 1))
    seen = tables.walk(answer(flags=flags, seq=5, ack=6, window=7))
    assert counts(seen) == (5 - offset & WORD, 6, 7 if flags & SYN else 28)


WINDOWS = [(0, 0, 0), (500, 0, 500), (500, 1, 1000), (0x7FFF, 1, 0xFFFE), (0x8000, 1, 0xFFFF), (1, 14, 0x4000),
           (0xFFFF, 14, 0xFFFF), (0xFFFF, -1, 0x7FFF), (0xFFFF, -14, 3), (127, -7, 0), (128, -7, 1), (0, 14, 0)]


@BOTH
@pytest.mark.parametrize(("window", "shift", "told"), WINDOWS)
def test_windows(tables: Bench, family: int, window: int, shift: int, told: int) -> None:
    """In the other side's units, and never more than is there."""
    open_one(tables, Splice(77, shift, 0), family)
    assert tables.walk(answer(family, window=window)).window == told
    assert tables.walk(request(family, window=window)).window == window
    tables.reset()
    open_one(tables, Splice(0, 0, shift), family)
    assert tables.walk(answer(family, window=window)).window == window
    assert tables.walk(request(family, window=window)).window == told


def sack(*edges: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    return before + bytes((5, 2 + 4 * len(edges))) + struct.pack(f"!{len(edges)}I", *edges) + behind


STAMPS = b"\x08\x0a\x11\x22\x33\x44\x55\x66\x77\x88"
PLACES = {"first": (b"", b""), "aligned": (b"\x01\x01", b""), "odd": (b"\x01", b"\x01"), "3": (b"\x01" * 3, b""),
          "behind others": (STAMPS, b""), "before others": (b"", b"\x01\x01" + STAMPS), "before the end": (b"", b"\0")}


@pytest.mark.parametrize(("family", "offset", "blocks", "place"), [
    one for one in product([4, 6], [1, 0xFFFFFFF0, 0x12345678], [1, 2, 3, 4], PLACES)
    if len(PLACES[one[3]][0] + PLACES[one[3]][1]) + 2 + 8 * one[2] <= 40])
def test_selective_acknowledgments(tables: Bench, family: int, offset: int, blocks: int, place: str) -> None:
    """RFC 2018: without their translation bulk transfers stall at the first loss. D-SACK blocks are like any other."""
    open_one(tables, Splice(offset), family)
    before, behind = PLACES[place]
    edges = [3000, 4460, 100, 1560, 0xFFFFFFFE, 0x1234, 0x80000000, 0x7FFFFFFF][:2 * blocks]
    data = request(family, ack=2000, tcp_options=sack(*edges, before=before, behind=behind), payload=b"x" * 5)
    seen = tables.walk(data)
    moved = [edge + offset & WORD for edge in edges]
    wanted = sack(*moved, before=before, behind=behind)
    assert seen.tcp_options == wanted + bytes(-len(wanted) % 4)
    assert (seen.ack, seen.payload) == (2000 + offset & WORD, b"x" * 5)
    # The member's blocks are of the client's own numbers.
    data = answer(family, ack=2000, tcp_options=sack(*edges, before=before, behind=behind))
    seen = tables.walk(data)
    wanted = sack(*edges, before=before, behind=behind)
    assert seen.tcp_options == wanted + bytes(-len(wanted) % 4)


@pytest.mark.parametrize("options", [
    b"\x05\x01\x01\x01", b"\x05\x00\x01\x01", b"\x05\x0a" + bytes(6), b"\x05\x09" + bytes(7) + b"\x01\x01\x01",
    b"\x00\x05\x0a" + bytes(9), b"\x05\x22" + bytes(30), b"\x05\x2a" + bytes(38), b"\xfd\x06\x05\x0a\0\0\x01\x01",
    b"\x01" * 39 + b"\x05", b"\x05\x02\x01\x01", b"\x13\x12" + b"\x05\x0a" * 8 + b"\x01\x01", bytes(40), b"\x01" * 40])
def test_what_is_no_selective_acknowledgment_is_left_alone(tables: Bench, options: bytes) -> None:
    """Also what says that it is one and cannot be."""
    open_one(tables, Splice(0x01020304))
    seen = tables.walk(request(ack=1, tcp_options=options))
    assert seen.tcp_options == options
    assert seen.ack == 0x01020305


@BOTH
@pytest.mark.parametrize("data", [{"tcp_options": sack(1, 2, before=b"\x01")}, {"window": 9}, {"payload": b"odd"}])
def test_what_a_card_summed_up_stays_true(tables: Bench, family: int, data: dict[str, Any]) -> None:
    open_one(tables, Splice(0x12345678, -3, 4), family, layout.ROUTED)
    for one in (request(family, **data), answer(family, **data)):
        try:
            verdict, _, _ = kernel.run(tables.programs["wire"], one, room=256, flags=CHECKSUM_COMPLETE)
        except kernel.KernelError as error:
            if error.errno == 22:
                pytest.skip("this kernel cannot test it")
            raise
        assert verdict == REDIRECT


def test_a_wrong_checksum_stays_wrong(tables: Bench) -> None:
    open_one(tables, Splice(0x12345678, 1, 1))
    for data in (request(checksum=0x1234, tcp_options=sack(1, 2)), answer(checksum=0x1234)):
        with pytest.raises(AssertionError, match="checksum"):
            tables.walk(data)


@BOTH
def test_a_first_fragment_is_translated_and_a_later_one_follows(tables: Bench, family: int) -> None:
    open_one(tables, Splice(1000), family)
    client, virtual, member = FAMILIES[family]
    payload = bytes(range(256)) * 4
    body = segment(client, virtual, TCP, flags=ACK, ack=50, payload=payload)
    outs = [kernel.run(tables.programs["wire"], wrap(client, virtual, TCP, part, fragment=offset), room=2048)[1]
            for part, offset in ((body[:512], 1), (body[512:], 512))]
    start = 34 if family == 4 else 62
    assert b"".join(out[start:] for out in outs) == segment(client, member, TCP, 40000, 8080, flags=ACK, ack=1050,
                                                            payload=payload)


def test_the_end_of_a_spliced_connection(tables: Bench) -> None:
    """Followed as any other's."""
    open_one(tables, Splice(5))
    tables.walk(request(payload=b"q"))
    tables.walk(answer(flags=FIN | ACK))
    tables.walk(request(flags=FIN | ACK))
    (told,) = tables.closed()
    assert (told.serial, told.reason, told.packets_in, told.packets_out) == (SERIAL, Reason.SHUTDOWN, 2, 1)
    assert tables.walk(request(ack=1)).ack == 6, "translated while it lingers"


# ------------------------------------------------------------------ what waits


@BOTH
def test_before_it_is_ready(tables: Bench, family: int) -> None:
    """Both sides' packets go to the agent, and nothing is counted of them."""
    open_one(tables, None, family)
    cookie = 0xA1234567
    made: dict[str, Any] = {"ack": cookie + 1}
    for data in (request(family, payload=b"first", **made), request(family, FIN | ACK, **made),
                 request(family, RST, **made), request(family, SYN)):
        assert tables.drop(data) == {"splice_wait": 1, "asked_data": 1}
        assert astuple(tables.queries()[0])[:4] == (WIRE, 5, data, Ask.LATER)
    tables.drop(request(family, payload=b"first", **made))
    assert [one.options for one in tables.queries()] == [cookie >> 23]
    assert tables.drop(request(family, **made)) == {"splice_wait": 1}, "an acknowledgment says nothing"
    for data in (answer(family, SYN | ACK), answer(family, RST | ACK), answer(family), answer(family, payload=b"220")):
        assert tables.drop(data) == {"splice_wait": 1, "asked_member": 1}
        assert tables.queries() == [layout.QueryRecord(WIRE, 5, data, Ask.MEMBER, 0)]
    assert all((flow.packets, flow.state & (layout.ESTABLISHED | layout.RST | layout.FIN)) == (0, 0)
               for _, flow in tables.flows(10))
    tables.set_splices({SERIAL: Splice(3)})
    assert tables.walk(request(family, payload=b"first", **made)).ack == cookie + 4
    assert tables.walk(answer(family, payload=b"220", seq=cookie + 4)).seq == cookie + 1


def there(family: int) -> FlowKey:
    client, virtual, _ = FAMILIES[family]
    return FlowKey(packed(client), packed(virtual), 40000, 80, TCP)


def hold(tables: Bench, family: int) -> None:
    tables.connect(*FAMILIES[family], state=layout.HELD)
    tables.age(there(family), A_MOMENT_AGO)


@BOTH
@pytest.mark.parametrize("says", [ACK, ACK | FIN, ACK | RST], ids=["ACK", "FIN", "RST"])
def test_what_is_handed_over_waits_for_its_member(tables: Bench, family: int, says: int) -> None:
    """What the client says meanwhile must not overtake that: it goes to the agent, which sends it behind."""
    hold(tables, family)
    for data in (request(family, payload=b"second"), request(family, FIN | ACK), request(family, RST)):
        assert tables.drop(data) == {"asked_data": 1}
        assert astuple(tables.queries()[0])[:4] == (WIRE, 5, data, Ask.LATER)
    assert tables.drop(request(family)) == {}, "an acknowledgment says nothing"
    assert all((flow.packets, flow.state & (layout.RST | layout.FIN)) == (0, 0) for _, flow in tables.flows(10))
    for data in (request(family, payload=b"first"), request(family, payload=b"second")):
        verdict, _ = run_marked(tables, data, ELSEWHERE)
        assert verdict == REDIRECT
        tables.age(there(family), A_MOMENT_AGO)
        assert tables.drop(request(family, payload=b"third")) == {"asked_data": 1}, "the first may not be there yet"
        assert [one.kind for one in tables.queries()] == [Ask.LATER]
    assert tables.walk(answer(family, says)).flags == says
    assert not any(flow.state & layout.HELD for _, flow in tables.flows(10))
    assert tables.walk(request(family, payload=b"third")).payload == b"third"
    assert tables.queries() == [], "nothing of the member's is anybody else's"


@BOTH
def test_what_has_passed_long_ago_is_not_waited_for(tables: Bench, family: int) -> None:
    """A member that says nothing: what its client repeats is not the agent's for ever."""
    hold(tables, family)
    assert run_marked(tables, request(family, payload=b"first"), ELSEWHERE)[0] == REDIRECT
    tables.age(there(family), 150)
    assert tables.walk(request(family, payload=b"first")).payload == b"first"
    assert tables.walk(request(family, payload=b"second")).payload == b"second"
    assert tables.walk(answer(family)).flags == ACK
    assert not any(flow.state & layout.HELD for _, flow in tables.flows(10))


@BOTH
def test_what_was_lost_is_not_waited_for(tables: Bench, family: int) -> None:
    """The first data never came: its client repeats it, and no agent needs to know of that any more."""
    hold(tables, family)
    tables.age(there(family), 150 - A_MOMENT_AGO)
    assert tables.walk(request(family, payload=b"first")).payload == b"first"


def established(tables: Bench, family: int, mode: Mode, splice: Splice | None) -> None:
    """A connection that both have used."""
    if splice is not None:
        open_one(tables, splice, family)
    else:
        tables.connect(*FAMILIES[family])
    tables.set_services({ServiceKey(packed(FAMILIES[family][1]), 80, TCP): Service(5, mode, Hash.TURN, 100, ())})
    for data in (request(family, payload=b"GET /"), answer(family, payload=b"200")):
        tables.walk(data)


@BOTH
@pytest.mark.parametrize(("splice", "mode"), [(Splice(9), Mode.PROXY), (None, Mode.PROXY), (Splice(9), Mode.PASS)],
                         ids=["splice", "handoff", "hybrid"])
def test_a_member_that_has_forgotten_begins_no_connection_unread(tables: Bench, family: int, splice: Splice | None,
                                                                 mode: Mode) -> None:
    established(tables, family, mode, splice)
    assert tables.walk(request(family, SYN, seq=77)).flags == SYN, "the member may know"
    assert tables.drop(answer(family, SYN | ACK, ack=78)) == {"closed_count": 1}
    assert [one.serial for one in tables.closed()] == [SERIAL if splice else 1]
    assert tables.drop(answer(family, SYN | ACK, ack=78)) == {}
    if mode is Mode.PASS:
        return  # the switch has it from here
    tables.set_cookies((bytes(16), None), 0)
    assert tables.answered(request(family, SYN, seq=77)).flags == SYN | ACK, "its client repeats it, and is asked"
    assert tables.flows(10) == []


@BOTH
def test_a_member_that_repeats_its_syn_ack_has_forgotten_nothing(tables: Bench, family: int) -> None:
    """Of the first data, and of a SYN of the client's that was long on its way, it may not have heard."""
    open_one(tables, Splice(9), family)
    tables.set_services({ServiceKey(packed(FAMILIES[family][1]), 80, TCP): Service(5, Mode.PROXY, Hash.TURN, 100, ())})
    for data in (request(family, payload=b"GET /"), request(family, SYN), answer(family, SYN | ACK)):
        tables.walk(data)
    assert tables.closed() == []


@BOTH
def test_a_member_that_remembers_says_so(tables: Bench, family: int) -> None:
    established(tables, family, Mode.PROXY, Splice(9))
    tables.walk(request(family, SYN, seq=77))
    assert tables.walk(answer(family, payload=b"more")).payload == b"more"
    assert tables.walk(request(family, RST)).flags == RST
    assert len(tables.closed()) == 1


@BOTH
def test_where_nobody_is_read_a_connection_may_begin_anew(tables: Bench, family: int) -> None:
    established(tables, family, Mode.DECIDE, None)
    assert tables.walk(request(family, SYN, seq=77)).flags == SYN
    assert tables.walk(answer(family, SYN | ACK, ack=78)).flags == SYN | ACK


def test_a_fragment_does_not_wait(tables: Bench) -> None:
    open_one(tables, None)
    body = segment(CLIENT, VIRTUAL, TCP, flags=ACK, payload=bytes(200))
    assert tables.drop(wrap(CLIENT, VIRTUAL, TCP, body[:80], fragment=1)) == {"splice_wait": 1}
    assert tables.queries() == []


def test_a_ring_without_room(tables: Bench) -> None:
    open_one(tables, None)
    data = answer(payload=bytes(2000))
    while tables.drop(data).get("asked_member"):
        pass
    assert tables.drop(data) == {"splice_wait": 1, "ask_lost": 1}
    assert tables.drop(request(payload=b"x" * 2000)) == {"splice_wait": 1, "ask_lost": 1}


def test_other_connections_are_as_they_were(tables: Bench) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER, serial=SERIAL)
    assert tables.set_splices({SERIAL: Splice(5)}) == {SERIAL}
    assert counts(tables.walk(request(ack=7))) == (1000, 7, 500)
    tables.connect(CLIENT, VIRTUAL, MEMBER, UDP)
    tables.walk(frame(CLIENT, VIRTUAL, UDP))


# ------------------------------------------------------------------ what stays behind: nothing


def spliced(tables: Bench) -> set[int]:
    return {int.from_bytes(key, "little") for key, _ in tables.maps["splices"].items()}


def test_a_translation_is_there_for_as_long_as_its_connection(tables: Bench) -> None:
    assert tables.set_splices({SERIAL: Splice(1), 10: Splice(2)}) == {SERIAL, 10}
    open_one(tables, None)
    assert spliced(tables) == {SERIAL} and tables.splice(SERIAL) is None
    assert tables.set_splices({SERIAL: Splice(1, -2, 3), 10: Splice(2)}) == {10}
    assert tables.splice(SERIAL) == Splice(1, -2, 3) and tables.splice(10) is None
    assert tables.delete(serial=SERIAL).deleted == 1
    assert spliced(tables) == set()
    assert tables.set_splices({SERIAL: Splice(1)}) == {SERIAL}
    open_one(tables, None)
    assert tables.drop(answer()) == {"splice_wait": 1, "asked_member": 1}, "the old offset is gone"


@pytest.mark.parametrize("how", ["idle", "closed", "evicted", "member", "wire", "everything", "handshake"])
def test_every_end_takes_it_along(tables: Bench, how: str) -> None:
    open_one(tables, Splice(1))
    if how != "handshake":
        tables.walk(request())
    if how == "closed":
        tables.walk(request(flags=RST))
    tables.age(THERE, 16_000 if how == "handshake" else 101_000 if how == "idle" else 6000)
    if how == "evicted":
        assert tables.sweep(evict_ms=1000).overflow == 1
    elif how == "member":
        tables.delete(member=77)
    elif how == "wire":
        tables.delete(ifindex=WIRE)
    elif how == "everything":
        tables.delete(everything=True)
    else:
        tables.sweep()
    assert tables.flows(10) == [] and spliced(tables) == set()


def test_a_client_that_begins_anew_takes_it_along(tables: Bench) -> None:
    open_one(tables, Splice(1))
    tables.walk(request(flags=RST))
    assert tables.miss(request(flags=SYN)) == "service"
    assert spliced(tables) == set()


def test_a_connection_that_takes_a_closed_ones_place(tables: Bench) -> None:
    """The member did not come; the next one gets a connection with a serial of its own."""
    open_one(tables, None)
    assert tables.close_flow(THERE)
    assert [(one.serial, one.reason) for one in tables.closed()] == [(SERIAL, Reason.SHUTDOWN)]
    assert not tables.close_flow(THERE)
    assert tables.drop(request(payload=b"again")) == {"splice_wait": 1, "asked_data": 1}
    assert tables.connect(CLIENT, VIRTUAL, "10.0.1.8", state=layout.SPLICE, serial=10) is Result.OPENED
    assert spliced(tables) == {10} and len(tables.flows(10)) == 2 and tables.closed() == []
    tables.set_splices({10: Splice(4)})
    assert tables.walk(request(ack=1)).destination == "10.0.1.8"


def test_closing_what_is_not_there(tables: Bench) -> None:
    assert not tables.close_flow(THERE)
    tables.connect(CLIENT, VIRTUAL, MEMBER, serial=3)
    assert not tables.close_flow(FlowKey(packed(MEMBER), packed(CLIENT), 8080, 40000, TCP)), "that is its way back"
    assert tables.close_flow(THERE)
    tables.sweep(0)
    assert tables.service_stats()[5, 77].closed == 1


def test_what_cannot_be_entered_leaves_nothing(tables: Bench) -> None:
    open_one(tables, Splice(1))
    assert tables.connect(CLIENT, VIRTUAL, "10.0.1.8", state=layout.SPLICE, serial=10) is Result.EXISTS
    assert tables.connect(CLIENT, "10.0.0.200", MEMBER, state=layout.SPLICE, serial=11) is Result.TAKEN
    assert tables.connect("10.0.0.2", VIRTUAL, MEMBER, state=layout.SPLICE, serial=SERIAL) is Result.TAKEN
    assert spliced(tables) == {SERIAL} and tables.splice(SERIAL) == Splice(1)
    assert len(tables.flows(10)) == 2


def test_a_full_table() -> None:
    require_programs()
    bench = Bench(max_connections=10)
    try:
        assert bench.maps["splices"].max_entries == 10
        results = [bench.connect(f"10.0.7.{index}", VIRTUAL, MEMBER, state=layout.SPLICE, serial=index)
                   for index in range(12)]
        assert results == [Result.OPENED] * 10 + [Result.FULL] * 2
        assert spliced(bench) == set(range(10))
        assert kernel.run(bench.programs["wire"], frame("10.0.7.3", VIRTUAL, flags=RST))[0] == SHOT
    finally:
        bench.close()


@pytest.mark.parametrize(("connections", "spliced"), [(10, 10), (65_536, 65_536), (100_000, 65_536),
                                                      (1 << 20, 1 << 18), (1_300_000, 325_000)])
def test_how_many_may_be_spliced(connections: int, spliced: int) -> None:
    assert tables_module._splices(connections) == spliced
