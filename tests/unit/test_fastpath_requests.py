# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What clients have said, kept for their members: the places, and the SYN-ACK that becomes the client's first data.

Programs: ``lbapp/dataflow/fastpath/splice.bpf.h``, ``answer.bpf.h``.
"""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import FlowKey, Result, Splice
from lbapp.dataflow.fastpath.requests import Requests, State
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import BOTH, FAMILIES, MEMBER_MAC, TCP, Bench, Seen, frame, packed
from tests.proxy_world import places

pytest_plugins = ["tests.fastpath_packets"]

WORD = 0xFFFFFFFF
SERIAL, ISN, COOKIE, MEMBER_ISN = 9, 0xFFFFFFF0, 0x9A000001, 0xFFFFFFFF
SAID = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
OWN = 3
"""The client's window scale."""
SCALED = b"\x02\x04\x05\xb4\x01\x01\x04\x02\x01\x03\x03\x09"


# ------------------------------------------------------------------ the places


def keep(requests: Requests, data: bytes = SAID, serial: int = SERIAL, scale: int | None = 7) -> int:
    return requests.keep(serial, ISN, COOKIE, scales(scale), 500, ACK | PSH, data)


def scales(told: int | None) -> tuple[int, int] | None:
    return None if told is None else (told, OWN)


def given(memory: bytearray, number: int) -> None:
    """As a program does it."""
    memory[(number - 1) * layout.REQUEST_SIZE] = State.GIVEN


def test_what_is_kept_lies_where_the_programs_look() -> None:
    requests, memory = places(2)
    assert (keep(requests), keep(requests, b"odd", 10, None), keep(requests)) == (1, 2, 0)
    total = sum(int.from_bytes(SAID[at:at + 2], "little") for at in range(0, len(SAID), 2))
    assert layout.REQUEST.unpack_from(memory) == (
        State.WAITING, SERIAL, ISN, COOKIE, total % 0xFFFF, 500, len(SAID), 7, ACK | PSH, OWN)
    assert memory[layout.REQUEST.size:][:len(SAID)] == SAID
    second = layout.REQUEST.unpack_from(memory, layout.REQUEST_SIZE)
    assert second[4:8] == ((ord("o") + (ord("d") << 8) + ord("d")) % 0xFFFF, 500, 3, layout.NO_SCALE)


def test_only_what_fits_is_kept() -> None:
    requests, _ = places(1)
    assert keep(requests, b"") == keep(requests, bytes(layout.REQUEST_DATA + 1)) == 0
    assert keep(requests, bytes(layout.REQUEST_DATA)) == 1
    assert keep(places(0)[0]) == 0


def test_a_place_is_free_once_its_member_has_it() -> None:
    requests, memory = places(1)
    number = keep(requests)
    assert not requests.given(number)
    given(memory, number)
    assert requests.given(number)
    assert requests.release(number)
    assert keep(requests) == number
    assert not requests.given(number)


def test_a_place_is_free_once_it_is_taken_back() -> None:
    requests, memory = places(1)
    number = keep(requests)
    assert not requests.release(number)
    assert layout.REQUEST.unpack_from(memory)[0] == State.NONE
    assert keep(requests) == number


def test_what_a_program_has_in_its_hands_is_given_a_moment_later() -> None:
    """Between the look and the call, a program takes it."""
    memory = bytearray(layout.REQUEST_SIZE)

    def too_late(_: int) -> int:
        memory[0] = State.GIVEN
        return State.TAKEN

    requests = Requests(memory, too_late)
    number = keep(requests)
    assert requests.release(number)
    assert keep(requests) == number


def test_a_program_that_finds_it_is_anothers_puts_it_back() -> None:
    memory, tries = bytearray(layout.REQUEST_SIZE), [State.TAKEN, State.WAITING]

    def revoke(_: int) -> int:
        was = tries.pop(0)
        memory[0] = State.WAITING if was is State.TAKEN else State.NONE
        return was

    requests = Requests(memory, revoke)
    assert not requests.release(keep(requests))
    assert tries == []


# ------------------------------------------------------------------ the SYN-ACK


def prepare(tables: Bench, family: int = 4, data: bytes = SAID, scale: int | None = 7, state: int = 0) -> int:
    """A splice whose member gets that."""
    number = tables.requests.keep(SERIAL, ISN, COOKIE, scales(scale), 500, ACK | PSH, data)
    assert number
    made = tables.connect(*FAMILIES[family], state=state | layout.SPLICE, serial=SERIAL, request=number)
    assert made is Result.OPENED
    return number


def answer(family: int = 4, flags: int = SYN | ACK, *, ack: int = ISN + 1, tcp_options: bytes = SCALED,
           **more: Any) -> bytes:
    client, _, member = FAMILIES[family]
    return frame(member, client, TCP, 8080, 40000, flags=flags, seq=MEMBER_ISN, ack=ack, eth_dst=VIRTUAL_MAC,
                 eth_src=MEMBER_MAC, tcp_options=tcp_options, **more)


def as_expected(seen: Seen, family: int, data: bytes, window: int = 500) -> bool:
    client, _, member = FAMILIES[family]
    return ((seen.source, seen.destination, seen.sport, seen.dport) == (client, member, 40000, 8080)
            and (seen.eth_dst, seen.eth_src) == (MEMBER_MAC, VIRTUAL_MAC)
            and (seen.seq, seen.ack, seen.flags, seen.window) == (ISN + 1, MEMBER_ISN + 1 & WORD, ACK | PSH, window)
            and (seen.payload, seen.tcp_options) == (data, b""))


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 20, 75, 1439, 1440, 1460])
@pytest.mark.parametrize("tcp_options", [b"", b"\x02\x04\x05\xb4", SCALED, b"\x02\x04\x05\xb4" + b"\x01" * 36])
def test_a_syn_ack_becomes_the_clients_first_data(tables: Bench, family: int, size: int, tcp_options: bytes) -> None:
    data = (bytes(range(1, 252)) * 6)[:size]
    number = prepare(tables, family, data)
    tables.counted()
    # A member that does not scale takes the client's windows literally.
    shift, shift_in = (9 - 7, 0) if tcp_options == SCALED else (-7, OWN)
    assert as_expected(tables.answered(answer(family, tcp_options=tcp_options)), family, data, 500 << shift_in)
    assert tables.counted()["given"] == 1
    assert tables.requests.given(number)
    assert tables.splice(SERIAL) == Splice(MEMBER_ISN - COOKIE & WORD, shift, shift_in)
    tables.requests.release(number)


@BOTH
def test_from_then_on_it_is_translated(tables: Bench, family: int) -> None:
    """And what the member got first is counted as the client's."""
    client, virtual, member = FAMILIES[family]
    number = prepare(tables, family, state=layout.ROUTED)
    seen = tables.answered(answer(family))
    flow = tables.lookup(FlowKey(packed(client), packed(virtual), 40000, 80, TCP))
    assert flow is not None
    size = len(SAID) + (54 if family == 4 else 74)
    assert (flow.packets, flow.bytes, flow.state & layout.ESTABLISHED) == (1, size, layout.ESTABLISHED)
    heard = tables.walk(frame(member, client, TCP, 8080, 40000, flags=ACK, seq=MEMBER_ISN + 1 & WORD,
                              ack=seen.seq + len(SAID) & WORD, payload=b"200", eth_dst=VIRTUAL_MAC, eth_src=MEMBER_MAC,
                              window=1))
    assert (heard.seq, heard.ack, heard.window) == (COOKIE + 1, ISN + 1 + len(SAID) & WORD, 4)
    again = tables.walk(frame(client, virtual, flags=ACK, seq=ISN + 1, ack=COOKIE + 1, payload=SAID))
    assert (again.seq, again.ack, again.payload) == (ISN + 1, MEMBER_ISN + 1 & WORD, SAID), "the client repeats itself"
    late = tables.walk(answer(family))
    assert (late.flags, late.seq) == (SYN | ACK, COOKIE), "and so does the member"
    tables.requests.release(number)


@BOTH
def test_a_damaged_syn_ack_opens_nothing(tables: Bench, family: int) -> None:
    """Its numbers would be those of the connection for ever."""
    number = prepare(tables, family)
    good = answer(family)
    for at in (-28, -18, -1):  # the sequence number, the window, its scale
        bad = bytearray(good)
        bad[at] ^= 4
        assert tables.drop(bytes(bad)) == {"splice_wait": 1, "asked_member": 1}
    assert not tables.requests.given(number) and tables.splice(SERIAL) is None
    assert as_expected(tables.answered(good), family, SAID)
    tables.queries()
    tables.requests.release(number)


@BOTH
def test_offloading_leaves_a_checksum_that_is_partial(tables: Bench, family: int) -> None:
    """As it is in memory: here nobody says that it is, so all of the difference is made to it."""
    number = prepare(tables, family)
    tables.answered(answer(family, checksum="partial"), checksum="any")
    assert tables.requests.given(number)
    tables.requests.release(number)


def test_a_splice_that_has_gone_is_not_made_ready(tables: Bench) -> None:
    number = prepare(tables)
    tables.maps["splices"].delete(SERIAL.to_bytes(4, "little"))
    assert tables.drop(answer()) == {"splice_wait": 1, "asked_member": 1}
    assert not tables.requests.release(number)
    tables.queries()


@pytest.mark.parametrize(("flags", "ack"), [(SYN | ACK, ISN), (SYN | ACK, ISN + 2), (SYN, ISN + 1), (ACK, ISN + 1),
                                            (RST | ACK, ISN + 1), (SYN | ACK | RST, ISN + 1),
                                            (SYN | ACK | FIN, ISN + 1)])
def test_anything_else_goes_to_the_agent(tables: Bench, flags: int, ack: int) -> None:
    number = prepare(tables)
    data = answer(flags=flags, ack=ack)
    assert tables.drop(data) == {"splice_wait": 1, "asked_member": 1}
    assert [one.frame for one in tables.queries()] == [data]
    assert not tables.requests.given(number)
    assert as_expected(tables.answered(answer()), 4, SAID), "it is still there for the right one"
    tables.requests.release(number)


def test_it_is_given_once(tables: Bench) -> None:
    """The place may be another connection's already; nobody gets what is that one's."""
    number = prepare(tables)
    tables.answered(answer())
    tables.requests.release(number)
    assert tables.requests.keep(SERIAL + 1, ISN, COOKIE, None, 1, ACK, b"another's") == number
    tables.set_splices({SERIAL: Splice(5)})
    assert tables.walk(answer()).payload == b""
    tables.reset()
    assert tables.connect(*FAMILIES[4], state=layout.SPLICE, serial=SERIAL, request=number) is Result.OPENED
    assert tables.drop(answer()) == {"splice_wait": 1, "asked_member": 1}
    assert not tables.requests.given(number)
    tables.queries()
    tables.requests.release(number)


def test_what_was_taken_back_is_not_given(tables: Bench) -> None:
    number = prepare(tables)
    assert not tables.requests.release(number)
    assert tables.drop(answer()) == {"splice_wait": 1, "asked_member": 1}
    assert tables.splice(SERIAL) is None
