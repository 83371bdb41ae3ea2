# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Proxied handshakes, packet in, packet out: SYN and SYN-ACK, cookies, the client's first data, refusals.

Programs: ``lbapp/dataflow/fastpath/handshake.bpf.h``, ``answer.bpf.h``, ``cookie.bpf.h``; and
``lbapp.dataflow.fastpath.cookies``.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.dataflow.fastpath import build, cookies, kernel, layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import Ask, FlowKey, Hash, Mode, Service, ServiceKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import (
    ACK,
    CHECKSUM_COMPLETE,
    CLIENT_MAC,
    FIN,
    REDIRECT,
    RST,
    SYN,
    TCP,
    UDP,
    WIRE,
    Bench,
    frame,
    ones_sum,
    packed,
    segment,
    wrap,
)

pytest_plugins = ["tests.fastpath_packets"]

CLIENT, VIRTUAL = "10.0.0.1", "10.0.0.100"
FAMILIES = {4: (CLIENT, VIRTUAL), 6: ("fd00::1", "fd00::100")}
BOTH = pytest.mark.parametrize("family", [4, 6])
KEYS = (bytes(range(16)), bytes(range(100, 116)))
ISN = 0xFFFFFFF0
MSS, SACK, SCALE = b"\x02\x04\x05\xb4", b"\x04\x02", b"\x03\x03\x07"
LINUX = MSS + SACK + b"\x08\x0a\0\0\0\x01\0\0\0\0" + b"\x01" + SCALE
PSH = 8
PLAIN = Options(536, None, False)


@pytest.fixture
def proxied(tables: Bench) -> Bench:
    """A virtual server of each family, number 12, whose members can do everything."""
    offer(tables)
    return tables


def offer(tables: Bench, mss: int = 1400, scale: int | None = 9, sack: bool = True,
          keys: tuple[bytes | None, bytes | None] = KEYS, current: int = 0) -> None:
    tables.set_cookies(keys, current)
    tables.set_services({ServiceKey(packed(virtual), 80, TCP): Service(12, Mode.PROXY, Hash.TURN, 100, (), mss, scale,
                                                                      sack) for _, virtual in FAMILIES.values()})


def cookie(client: str = CLIENT, port: int = 40000, isn: int = ISN, options: Options = PLAIN,
           current: int = 0, keys: tuple[bytes | None, bytes | None] = KEYS) -> int:
    return cookies.make(keys, current, packed(client), port, isn, options)


def said(payload: bytes = b"GET / HTTP/1.1\r\n\r\n", flags: int = ACK | PSH, isn: int = ISN, at: int = 0,
         by: int | None = None, client: str = CLIENT, virtual: str = VIRTUAL, **more: Any) -> bytes:
    """A segment of a client that was greeted. ``by``: the cookie; ``at``: bytes that it has sent before."""
    made = cookie(client, isn=isn) if by is None else by
    return frame(client, virtual, flags=flags, payload=payload, seq=isn + 1 + at & 0xFFFFFFFF,
                 ack=made + 1 & 0xFFFFFFFF, **more)


def pending(tables: Bench) -> dict[FlowKey, tuple[int, ...]]:
    return {FlowKey.unpack(key): layout.PENDING.unpack(value) for key, value in tables.maps["pending"].items()}


# ------------------------------------------------------------------ cookies


def test_the_reference_values_of_siphash() -> None:
    """Of the key 00 01 .. 0f and messages 00 01 .. of 0, 8 and 16 bytes, by the authors' own program."""
    words = [0x0706050403020100, 0x0F0E0D0C0B0A0908]
    assert [cookies.siphash(KEYS[0], words[:count]) for count in range(3)] == [
        0xABAC0158050FC4DC, 0x369095118D299A8E, 0xCC4FDD1A7D908B66]


@given(st.binary(min_size=16, max_size=16), st.sampled_from([0, 1]), st.one_of(
    st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)), st.integers(1, 0xFFFF),
    st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF), st.one_of(st.none(), st.integers(0, 255)), st.booleans())
def test_a_cookie_tells_what_was_offered(key: bytes, current: int, address: bytes, port: int, isn: int, mss: int,
                                         scale: int | None, sack: bool) -> None:
    keys = (key, KEYS[0]) if current == 0 else (KEYS[0], key)
    made = cookies.make(keys, current, address, port, isn, Options(mss, scale, sack))
    top = cookies.check(keys, address, port, isn, made)
    assert top is not None and top >> 8 == current
    read = Options.of(top)
    assert read.sack is sack and read.window_scale == (None if scale is None else min(scale, 14))
    assert read.mss in cookies.MSS and (read.mss <= mss or mss < 536)
    assert not any(read.mss < one <= mss for one in cookies.MSS)
    assert cookies.check(keys, address, port, isn ^ 1, made) is None or made >> 23 == top
    other: tuple[bytes | None, bytes | None] = (None, keys[1]) if current == 0 else (keys[0], None)
    assert cookies.check(other, address, port, isn, made) is None
    with pytest.raises(ValueError, match="no key"):
        cookies.make(other, current, address, port, isn, read)


WRAPPER = """
#include "cookie.bpf.h"
__u32 made(const struct fp_cookies *k, const __u8 *a, __u16 p, __u32 isn, __u32 mss, __u32 scale, int sack)
{ return cookie_make(k, a, p, isn, cookie_options(mss, scale, sack)); }
int checked(const struct fp_cookies *k, const __u8 *a, __u16 p, __u32 isn, __u32 c)
{ return cookie_check(k, a, p, isn, c); }
__u32 mss_of(__u32 top) { return cookie_mss_of(top); }
__u32 scale_of(__u32 top) { return cookie_scale_of(top); }
int sack_of(__u32 top) { return cookie_sack_of(top); }
"""


def test_the_header_says_the_same(tmp_path: Path) -> None:
    """``cookie.bpf.h`` alone, as another program takes it in, compiled for this machine."""
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if compiler is None:
        pytest.skip("no clang")
    source, library = tmp_path / "wrapper.c", tmp_path / "wrapper.so"
    source.write_text(WRAPPER, encoding="ascii")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", f"-I{build.HERE}", str(source), "-o", str(library)],
                   check=True)
    calls = ctypes.CDLL(str(library))
    calls.made.restype = ctypes.c_uint32
    chosen = random.Random(4)
    for _ in range(2000):
        keys, current = (chosen.randbytes(16), chosen.randbytes(16)), chosen.randrange(2)
        packed_keys = layout.COOKIES.pack(*keys, current, 3)
        address, port, isn = chosen.randbytes(16), chosen.randrange(1, 65536), chosen.getrandbits(32)
        options = Options(chosen.choice([*cookies.MSS, *range(500, 1500), 9000, 65535]),
                          chosen.choice([None, *range(15)]), chosen.random() < 0.5)
        made = cookies.make(keys, current, address, port, isn, options)
        scale = layout.NO_SCALE if options.window_scale is None else options.window_scale
        assert calls.made(packed_keys, address, port, isn, options.mss, scale, options.sack) == made
        forged = made ^ 1 << chosen.randrange(32)
        for one in (made, forged):
            expected = cookies.check(keys, address, port, isn, one)
            assert calls.checked(packed_keys, address, port, isn, one) == (-1 if expected is None else expected)
        one_key = layout.COOKIES.pack(*keys, current, 2 >> current)
        assert calls.checked(one_key, address, port, isn, made) == -1
    for top in range(512):
        told = Options.of(top)
        assert calls.mss_of(top) == told.mss and calls.sack_of(top) == told.sack
        assert calls.scale_of(top) == (layout.NO_SCALE if told.window_scale is None else told.window_scale)


# ------------------------------------------------------------------ greeting

OFFERS = {
    "nothing": (b"", Options(536, None, False), b""),
    "MSS": (MSS, Options(1460, None, False), b""),
    "as Linux does": (LINUX, Options(1460, 7, True), b"\x01\x01\x04\x02" b"\x01\x03\x03\x09"),
    "SACK": (b"\x02\x04\x05\x00" + SACK, Options(1280, None, True), b"\x01\x01\x04\x02"),
    "scale": (SCALE, Options(536, 7, False), b"\x01\x03\x03\x09"),
    "scale 15": (MSS + b"\x03\x03\x0f", Options(1460, 14, False), b"\x01\x03\x03\x09"),
    "scale 255": (b"\x03\x03\xff", Options(536, 14, False), b"\x01\x03\x03\x09"),
    "behind the end": (MSS + b"\0" + SCALE, Options(1460, None, False), b""),
    "40 bytes": (b"\x01" * 35 + b"\x02\x04\x23\x00" + b"\x01", Options(8960, None, False), b""),
    "length 0": (MSS + b"\x04\x00" + SCALE, Options(1460, None, False), b""),
    "length 1": (MSS + b"\x1e\x01" + SCALE, Options(1460, None, False), b""),
    "cut off": (b"\x01" * 37 + b"\x02\x04\x05", Options(536, None, False), b""),
    "a length that is none of theirs": (b"\x02\x03\x05\x04\x03\x00\x03\x04\x07\x00", Options(536, None, False), b""),
    "unknown ones": (b"\x1e\x0c" + bytes(10) + MSS + b"\xfe\x04ab" + SACK, Options(1460, None, True),
                     b"\x01\x01\x04\x02"),
    "a small one": (b"\x02\x04\x00\x40", Options(536, None, False), b""),
}


@BOTH
@pytest.mark.parametrize(("offered", "seen", "answered"), OFFERS.values(), ids=OFFERS)
def test_a_syn_is_answered(proxied: Bench, family: int, offered: bytes, seen: Options, answered: bytes) -> None:
    client, virtual = FAMILIES[family]
    data = frame(client, virtual, flags=SYN, seq=ISN, ack=0, tcp_options=offered, tos=0x10, ttl=3,
                 identification=99)
    verdict, out, _ = kernel.run(proxied.programs["wire"], data, room=256)
    assert verdict == REDIRECT
    # Every bit of it, made from scratch.
    assert out == frame(virtual, client, TCP, 80, 40000, flags=SYN | ACK, seq=cookie(client, options=seen),
                        ack=ISN + 1, window=layout.WINDOW, tcp_options=b"\x02\x04\x05\x78" + answered,
                        eth_dst=CLIENT_MAC, eth_src=VIRTUAL_MAC, identification=0,
                        fragment=0x4000 << 3 if family == 4 else None)
    assert proxied.counted() == {"greeted": 1}
    assert proxied.flows(10) == [] and proxied.queries() == [] and not pending(proxied)


@BOTH
@pytest.mark.parametrize(("sack", "scale", "answered"), [
    (False, 9, b"\x01\x03\x03\x09"), (True, None, b"\x01\x01\x04\x02"), (False, None, b""),
    (True, 0, b"\x01\x01\x04\x02" b"\x01\x03\x03\x00")])
def test_nothing_is_offered_that_members_lack(proxied: Bench, family: int, sack: bool, scale: int | None,
                                              answered: bytes) -> None:
    offer(proxied, 9000, scale, sack)
    client, virtual = FAMILIES[family]
    seen = proxied.answered(frame(client, virtual, seq=ISN, tcp_options=LINUX))
    assert seen.tcp_options == b"\x02\x04\x23\x28" + answered
    # What the client offered is in the cookie all the same.
    assert seen.seq == cookie(client, options=Options(1460, 7, True))


@BOTH
@pytest.mark.parametrize("size", [1, 2, 63, 64, 500, 1400])
def test_data_in_a_syn_is_not_acknowledged(proxied: Bench, family: int, size: int) -> None:
    """TCP fast open: the client sends it again."""
    client, virtual = FAMILIES[family]
    data = frame(client, virtual, seq=7, tcp_options=LINUX, payload=(bytes(range(5, 255)) * 6)[:size])
    seen = proxied.answered(data)
    assert (seen.flags, seen.ack, seen.payload) == (SYN | ACK, 8, b"")


@pytest.mark.parametrize("flags", [SYN | 0xC0, SYN | PSH, SYN | 0x20])
def test_explicit_congestion_notification_is_not_agreed_upon(proxied: Bench, flags: int) -> None:
    assert proxied.answered(frame(CLIENT, VIRTUAL, flags=flags)).flags == SYN | ACK


def test_what_ethernet_padded_is_cut_off(proxied: Bench) -> None:
    seen = proxied.answered(frame(CLIENT, VIRTUAL, seq=ISN) + b"\xee" * 6)
    assert seen.flags == SYN | ACK
    _, out, _ = kernel.run(proxied.programs["wire"], frame(CLIENT, VIRTUAL, seq=ISN) + b"\xee" * 6, room=256)
    assert len(out) == 58


def _error(data: bytes) -> int:
    """What all words of a segment and its pseudo-header add up to; right is 0xffff."""
    four = data[12:14] == b"\x08\x00"
    length = struct.unpack_from("!H", data, 16)[0] - 20 if four else struct.unpack_from("!H", data, 18)[0]
    addresses = data[26:34] if four else data[22:54]
    start = 34 if four else 54
    return ones_sum(addresses + struct.pack("!HH", TCP, length) + data[start:start + length])


@BOTH
@pytest.mark.parametrize("offered", [b"", LINUX])
@pytest.mark.parametrize("payload", [b"", b"some data", bytes(range(200))])
def test_a_wrong_checksum_stays_wrong(proxied: Bench, family: int, offered: bytes, payload: bytes) -> None:
    """By exactly as much: the client drops the answer, as a host would have dropped the question."""
    client, virtual = FAMILIES[family]
    data = frame(client, virtual, seq=ISN, tcp_options=offered, checksum=0x1234, payload=payload)
    _, out, _ = kernel.run(proxied.programs["wire"], data, room=600)
    assert _error(data) != 0xFFFF
    assert _error(out) == _error(data)
    reset = said(payload or b"x", by=0x12345678, client=client, virtual=virtual, checksum=0x1234)
    kernel.run(proxied.programs["wire"], reset)
    _doubt(proxied, client, virtual, 4000)
    verdict, out, _ = kernel.run(proxied.programs["wire"], reset, room=600)
    assert verdict == REDIRECT
    assert _error(out) == _error(reset) != 0xFFFF


def test_a_wrong_header_checksum_stays_wrong(proxied: Bench) -> None:
    with pytest.raises(AssertionError, match="header checksum"):
        proxied.answered(frame(CLIENT, VIRTUAL, tcp_options=LINUX, check=0x1111))


@BOTH
@pytest.mark.parametrize("offered", [MSS, MSS + SACK + b"\x01\x01", MSS + SCALE + b"\x01" + SACK])
def test_what_a_card_summed_up_stays_true(proxied: Bench, family: int, offered: bytes) -> None:
    """CHECKSUM_COMPLETE: the kernel itself compares after the run. (It drops what it has when a length changes.)"""
    client, virtual = FAMILIES[family]
    data = frame(client, virtual, seq=ISN, tcp_options=offered, tos=0x10, ttl=7)
    try:
        verdict, _, _ = kernel.run(proxied.programs["wire"], data, room=600, flags=CHECKSUM_COMPLETE)
    except kernel.KernelError as error:
        if error.errno == 22:
            pytest.skip("this kernel cannot test it")
        raise
    assert verdict == REDIRECT
    assert proxied.counted() == {"greeted": 1}


@pytest.mark.parametrize("flags", [SYN, ACK])
@pytest.mark.parametrize(("client", "virtual", "mac"), [
    (CLIENT, VIRTUAL, b"\x03" + CLIENT_MAC[1:]), ("224.0.0.1", VIRTUAL, CLIENT_MAC),
    ("255.255.255.255", VIRTUAL, CLIENT_MAC), ("0.0.0.0", VIRTUAL, CLIENT_MAC), ("ff02::1", "fd00::100", CLIENT_MAC),
    ("::", "fd00::100", CLIENT_MAC)])
def test_what_nobody_can_have_sent_is_dropped(proxied: Bench, client: str, virtual: str, mac: bytes,
                                              flags: int) -> None:
    """The switch would ask the controller about each of them."""
    assert proxied.drop(frame(client, virtual, flags=flags, eth_src=mac)) == {"shot": 1}


@pytest.mark.parametrize(("data", "reason"), [
    (frame(VIRTUAL, VIRTUAL), "malformed"),
    (frame(CLIENT, VIRTUAL, options=b"\x94\x04\0\0"), "options"),
    (frame(CLIENT, VIRTUAL, dport=81), "service"), (frame(CLIENT, VIRTUAL, dport=81, flags=ACK), "flow"),
    (frame(CLIENT, VIRTUAL, UDP), "service"),
    (wrap(CLIENT, VIRTUAL, TCP, segment(CLIENT, VIRTUAL, payload=bytes(64)), fragment=1), "fragment"),
    (wrap("fd00::1", "fd00::100", TCP, segment("fd00::1", "fd00::100"), fragment=0), "fragment"),
])
def test_what_cannot_be_answered_goes_into_the_switch(proxied: Bench, data: bytes, reason: str) -> None:
    assert proxied.miss(data) == reason


def test_without_a_key_nothing_is_answered(proxied: Bench) -> None:
    proxied.set_cookies((None, KEYS[1]), 0)
    assert proxied.miss(frame(CLIENT, VIRTUAL)) == "pass"
    proxied.set_cookies((None, None), 0)
    assert proxied.miss(frame(CLIENT, VIRTUAL)) == "pass"
    assert proxied.miss(frame(CLIENT, VIRTUAL, flags=ACK)) == "flow"


def test_other_virtual_servers_are_as_they_were(proxied: Bench) -> None:
    """Keys are there, yet an L4 virtual server's packets go as without."""
    proxied.serve("10.0.0.101", ["10.0.1.1"])
    proxied.serve("10.0.0.102", [], mode=Mode.PUNT, number=13)
    proxied.serve("10.0.0.103", [], mode=Mode.PASS)
    proxied.serve(VIRTUAL, ["10.0.1.1"], protocol=UDP)
    assert proxied.miss(frame("10.0.0.7", "10.0.0.101", flags=ACK)) == "flow"
    assert proxied.walk(frame(CLIENT, "10.0.0.101")).destination == "10.0.1.1"
    assert proxied.drop(frame(CLIENT, "10.0.0.102")) == {"queries": 1}
    assert proxied.queries() == [layout.QueryRecord(WIRE, 13, frame(CLIENT, "10.0.0.102"), Ask.FIRST, 0)]
    assert proxied.miss(frame(CLIENT, "10.0.0.103")) == "pass"
    assert proxied.walk(frame(CLIENT, VIRTUAL, UDP)).destination == "10.0.1.1"


# ------------------------------------------------------------------ what follows

OFFERED = Options(1460, 7, True)


@BOTH
@pytest.mark.parametrize("checksum", ["whole", "partial"])
@pytest.mark.parametrize("size", [1, 40, 105 - 54, 400, 512 - 54, 1448, 2048 - 54, 3000])
def test_the_first_data_goes_to_the_agent(proxied: Bench, family: int, checksum: str, size: int) -> None:
    client, virtual = FAMILIES[family]
    made = proxied.answered(frame(client, virtual, seq=ISN, tcp_options=LINUX)).seq
    assert proxied.drop(said(b"", ACK, by=made, client=client, virtual=virtual)) == {"greeted_ack": 1}
    assert not pending(proxied)
    data = said(b"p" * size, by=made, client=client, virtual=virtual, checksum=checksum)
    assert proxied.drop(data) == {"asked_data": 1}
    record = proxied.queries()[0]
    assert Options.of(record.options) == OFFERED
    assert record == layout.QueryRecord(WIRE, 12, data, Ask.DATA, made >> 23)
    assert pending(proxied) == {FlowKey(packed(client), packed(virtual), 40000, 80, TCP): (ISN, made)}
    assert proxied.flows(10) == []


@pytest.mark.parametrize("bit", range(32))
def test_a_cookie_that_is_wrong_in_one_bit(proxied: Bench, bit: int) -> None:
    """Also in what it says, or in the key's number."""
    assert proxied.drop(said(by=cookie() ^ 1 << bit)) == {"cookie_bad": 1}
    assert proxied.queries() == [] and not pending(proxied)


@pytest.mark.parametrize("data", [
    said(client="10.0.0.2", by=cookie()), said(by=cookie(), sport=40001), said(by=cookie(isn=ISN + 1)),
    said(by=cookie(keys=KEYS[::-1])), said(by=cookie("fd00::1"))],
    ids=["another client", "another port", "another ISN", "another key", "another family"])
def test_a_cookie_of_another_connection(proxied: Bench, data: bytes) -> None:
    assert proxied.drop(data) == {"cookie_bad": 1}


@BOTH
def test_keys_are_replaced(proxied: Bench, family: int) -> None:
    """The other slot first, then it is current; a cookie is void when its own slot has been written."""
    client, virtual = FAMILIES[family]
    syn = frame(client, virtual, seq=ISN)
    first = proxied.answered(syn).seq
    new, newest = b"new".ljust(16), b"newest".ljust(16)
    proxied.set_cookies((KEYS[0], new), 0)
    assert proxied.answered(syn).seq == first
    proxied.set_cookies((KEYS[0], new), 1)
    second = proxied.answered(syn).seq
    assert second >> 31 == 1 and first >> 31 == 0
    for made in (first, second):
        assert proxied.drop(said(b"", ACK, by=made, client=client, virtual=virtual)) == {"greeted_ack": 1}
    proxied.set_cookies((newest, new), 1)
    assert proxied.drop(said(b"", ACK, by=second, client=client, virtual=virtual)) == {"greeted_ack": 1}
    assert proxied.drop(said(b"", ACK, by=first, client=client, virtual=virtual)) == {"cookie_bad": 1}
    proxied.set_cookies((None, new), 1)
    assert proxied.drop(said(b"", ACK, by=first, client=client, virtual=virtual)) == {"cookie_bad": 1}
    zero = cookie(client, keys=(bytes(16), None))
    assert proxied.drop(said(b"", ACK, by=zero, client=client, virtual=virtual)) == {"cookie_bad": 1}


def test_further_segments_of_a_client_that_is_being_read(proxied: Bench) -> None:
    """Its retransmissions, what follows, also out of order, its FIN and RST; nothing that only acknowledges."""
    proxied.drop(said(b"first"))
    made = cookie()
    for data in (said(b"first"), said(b"second", at=5), said(b"fourth", at=40), said(b"third", at=20),
                 said(b"", FIN | ACK, at=46), said(b"last", FIN | ACK, at=46),
                 frame(CLIENT, VIRTUAL, flags=ACK, seq=ISN + 47 & 0xFFFFFFFF, ack=made + 1 + 700, payload=b"more"),
                 said(b"far", at=0x1FFFF)):
        assert proxied.drop(data) == {"asked_data": 1}
        kind = Ask.DATA if data == said(b"first") else Ask.LATER
        assert proxied.queries()[-1] == layout.QueryRecord(WIRE, 12, data, kind, made >> 23)
    for data in (said(b"", ACK, at=5), said(b"", ACK | PSH), frame(CLIENT, VIRTUAL, flags=ACK, seq=ISN + 1,
                                                                    ack=made + 1 + 700)):
        assert proxied.drop(data) == {"greeted_ack": 1}
    for data in (said(b"too far", at=0x20001), said(b"before", at=-2),
                 frame(CLIENT, VIRTUAL, flags=ACK, seq=ISN + 1, ack=made, payload=b"x"),
                 frame(CLIENT, VIRTUAL, flags=PSH, seq=ISN + 1, payload=b"x"),
                 frame(CLIENT, VIRTUAL, flags=RST, seq=ISN - 5), frame(CLIENT, VIRTUAL, flags=SYN | ACK, seq=ISN + 1)):
        assert proxied.drop(data) == {"cookie_bad": 1}, data
    assert proxied.queries() == []
    reset = frame(CLIENT, VIRTUAL, flags=RST, seq=ISN + 6 & 0xFFFFFFFF, ack=0)
    assert proxied.drop(reset) == {"asked_data": 1}
    assert proxied.queries()[-1] == layout.QueryRecord(WIRE, 12, reset, Ask.LATER, made >> 23)
    assert not pending(proxied)
    assert proxied.drop(reset) == {"cookie_bad": 1}


def test_a_syn_forgets_what_was_before_it(proxied: Bench) -> None:
    proxied.drop(said(b"first"))
    # A duplicate of the SYN does not: the client goes on.
    proxied.set_cookies(KEYS, 1)
    assert proxied.answered(frame(CLIENT, VIRTUAL, seq=ISN)).seq == cookie()
    assert proxied.drop(said(b"second", at=5)) == {"asked_data": 1}
    assert proxied.answered(frame(CLIENT, VIRTUAL, seq=77)).seq == cookie(isn=77, current=1)
    assert not pending(proxied)
    assert proxied.drop(said(b"second", at=5)) == {"cookie_bad": 1}


def test_what_is_forgotten_by_the_agent(proxied: Bench) -> None:
    proxied.drop(said(b"first"))
    proxied.forget_pending([FlowKey(packed(CLIENT), packed(VIRTUAL), 40000, 80, TCP)])
    assert not pending(proxied)
    proxied.forget_pending(FlowKey(packed(CLIENT), packed(VIRTUAL), port, 80, TCP) for port in (40000, 1))


# ------------------------------------------------------------------ refusals


def _doubt(tables: Bench, client: str, virtual: str, milliseconds: int) -> None:
    """It was so long ago that this client sent something unknown."""
    key = FlowKey(packed(client), packed(virtual), 40000, 80, TCP).pack()
    doubts = tables.maps["doubts"]
    since, acknowledged = struct.unpack("=II", doubts.lookup(key) or b"")
    doubts.update(key, struct.pack("=II", since - layout.ticks(milliseconds) & 0xFFFFFFFF, acknowledged))


@BOTH
@pytest.mark.parametrize("payload", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 40, bytes(range(256)) * 12])
@pytest.mark.parametrize("flags", [ACK, FIN | ACK, SYN | ACK])
def test_a_connection_that_is_none_is_reset_in_the_end(proxied: Bench, family: int, payload: bytes,
                                                       flags: int) -> None:
    """Not at once: its first data may have been lost, or may still come."""
    client, virtual = FAMILIES[family]
    data = said(payload, flags, by=0x01234567, client=client, virtual=virtual, tcp_options=b"\x01" * 12, tos=4, ttl=9)
    assert proxied.drop(data) == {"cookie_bad": 1}
    _doubt(proxied, client, virtual, 2900)
    assert proxied.drop(data) == {"cookie_bad": 1}
    _doubt(proxied, client, virtual, 200)
    verdict, out, _ = kernel.run(proxied.programs["wire"], data, room=len(data) + 100)
    assert verdict == REDIRECT
    assert out == frame(virtual, client, TCP, 80, 40000, flags=RST, seq=0x01234568, ack=0, window=0,
                        eth_dst=CLIENT_MAC, eth_src=VIRTUAL_MAC, identification=0,
                        fragment=0x4000 << 3 if family == 4 else None)
    assert proxied.counted() == {"cookie_bad": 1, "reset_sent": 1}
    _doubt(proxied, client, virtual, 60_000)
    assert proxied.drop(data) == {"cookie_bad": 1}
    assert proxied.drop(data) == {"cookie_bad": 1}


def test_the_second_segment_before_the_first(proxied: Bench) -> None:
    assert proxied.drop(said(b"second", at=5)) == {"cookie_bad": 1}
    assert proxied.drop(said(b"first")) == {"asked_data": 1}
    assert proxied.drop(said(b"second", at=5)) == {"asked_data": 1}


def test_doubts_about_one_connection_are_none_about_the_next(proxied: Bench) -> None:
    assert proxied.drop(said(b"second", at=5)) == {"cookie_bad": 1}
    _doubt(proxied, CLIENT, VIRTUAL, 4000)
    other = cookie(isn=5)
    assert proxied.drop(said(b"second", isn=5, at=5, by=other)) == {"cookie_bad": 1}
    assert proxied.drop(said(b"second", at=5)) == {"cookie_bad": 1}
    assert proxied.drop(said(b"first", isn=5, by=other)) == {"asked_data": 1}


@BOTH
def test_who_leaves_without_a_word_is_reset(proxied: Bench, family: int) -> None:
    client, virtual = FAMILIES[family]
    made = cookie(client)
    seen = proxied.answered(said(b"", FIN | ACK, client=client, virtual=virtual))
    assert (seen.flags, seen.seq, seen.ack, seen.window) == (RST, made + 1, 0, 0)
    assert proxied.counted() == {"reset_sent": 1}
    assert proxied.queries() == [] and not pending(proxied)


@pytest.mark.parametrize("flags", [RST, RST | ACK, RST | SYN, 0, FIN, PSH, FIN | PSH | 0x20, SYN | FIN, 0xEF & ~ACK])
def test_what_gets_no_answer(proxied: Bench, flags: int) -> None:
    for _ in range(2):
        assert proxied.drop(said(b"data", flags)) == {"cookie_bad": 1}
    assert proxied.queries() == [] and list(proxied.maps["doubts"].items()) == []


@BOTH
@pytest.mark.parametrize(("scale", "options", "window"), [(7, OFFERED, 114), (None, OFFERED, 14_600),
                                                          (7, PLAIN, 14_600)])
def test_somebody_who_asks_whether_we_are_there(proxied: Bench, family: int, scale: int | None, options: Options,
                                                window: int) -> None:
    """A keep-alive probe before anything was said (RFC 1122, 4.2.3.6): one byte before the next one."""
    offer(proxied, scale=scale)
    client, virtual = FAMILIES[family]
    made = cookie(client, options=options)
    seen = proxied.answered(said(b"", ACK, at=-1, by=made, client=client, virtual=virtual))
    assert (seen.flags, seen.seq, seen.ack, seen.window, seen.payload) == (ACK, made + 1, ISN + 1, window, b"")
    assert proxied.counted() == {"greeted_ack": 1}


def test_a_full_ring(proxied: Bench) -> None:
    """Nothing reaches the switch, and nothing is remembered: the client sends it again."""
    while proxied.drop(said(bytes(3000), client="10.0.0.9")) == {"asked_data": 1}:
        pass
    assert proxied.drop(said(bytes(3000))) == {"ask_lost": 1}
    assert FlowKey(packed(CLIENT), packed(VIRTUAL), 40000, 80, TCP) not in pending(proxied)
    assert len(proxied.queries(9999)) > 200
    assert proxied.drop(said(bytes(3000))) == {"asked_data": 1}


def test_a_flood_leaves_nothing(proxied: Bench) -> None:
    for index in range(5000):
        kernel.run(proxied.programs["wire"], frame(f"10.4.{index >> 8}.{index & 255}", VIRTUAL, tcp_options=LINUX))
        kernel.run(proxied.programs["wire"], frame(f"10.5.{index >> 8}.{index & 255}", VIRTUAL, flags=ACK))
    counted = proxied.counted()
    assert counted == {"greeted": 5000, "cookie_bad": 5000}
    assert proxied.flows(10) == [] and proxied.queries() == [] and not pending(proxied)


def test_a_new_connection_where_one_has_ended(proxied: Bench) -> None:
    proxied.connect(CLIENT, VIRTUAL, "10.0.1.7", state=layout.SPLICE, serial=9)
    proxied.set_splices({9: layout.Splice(5)})
    proxied.walk(frame("10.0.1.7", CLIENT, TCP, 8080, 40000, flags=RST))
    assert proxied.answered(frame(CLIENT, VIRTUAL, seq=ISN)).seq == cookie()
    assert proxied.flows(10) == [] and proxied.splice(9) is None


# ------------------------------------------------------------------ what is said once more


@BOTH
@pytest.mark.parametrize("state", [layout.SPLICE, layout.HELD])
def test_who_replays_a_handshake_begins_nothing_until_its_connection_has_gone(proxied: Bench, family: int,
                                                                              state: int) -> None:
    """A cookie is good for as long as its key, and nothing is remembered of who used it: what a replay meets is the
    connection, then its remains, and only then it is as good as the first time, until the key has gone."""
    client, virtual = FAMILIES[family]
    member = {4: "10.0.1.7", 6: "fd00:1::7"}[family]
    made = proxied.answered(frame(client, virtual, seq=ISN, tcp_options=LINUX)).seq
    ack, first = (said(payload, flags, by=made, client=client, virtual=virtual)
                  for payload, flags in ((b"", ACK), (b"GET / HTTP/1.1\r\n\r\n", ACK | PSH)))
    asked = layout.QueryRecord(WIRE, 12, first, Ask.DATA, made >> 23)
    for _ in range(2):
        assert (proxied.drop(ack), proxied.drop(first)) == ({"greeted_ack": 1}, {"asked_data": 1})
        assert proxied.queries() == [asked], "it is being read: one connection, as the agent knows by its numbers"
    proxied.connect(client, virtual, member, state=state, serial=9, number=12)
    if state == layout.SPLICE:
        proxied.set_splices({9: layout.Splice(5)})
    else:
        proxied.walk(frame(member, client, TCP, 8080, 40000, flags=ACK, payload=b"x"))
    for _ in range(2):
        assert {proxied.walk(one).destination for one in (ack, first)} == {member}, "it lives: its member knows better"
    proxied.walk(frame(member, client, TCP, 8080, 40000, flags=RST | ACK))
    proxied.walk(first)
    assert len(proxied.closed()) == 1 and not proxied.queries(), "its remains take it"
    proxied.sweep(linger_ms=0)
    for remembered in (True, False):
        assert proxied.flows(10) == [] and bool(pending(proxied)) is remembered
        assert (proxied.drop(ack), proxied.drop(first)) == ({"greeted_ack": 1}, {"asked_data": 1})
        assert proxied.queries() == [asked], "nothing is left that knew it"
        proxied.forget_pending(list(pending(proxied)))
    proxied.drop(first)
    assert proxied.queries() == [asked]
    proxied.set_cookies((b"another".ljust(16), KEYS[1]), 1)
    for remembered in (True, False):
        assert bool(pending(proxied)) is remembered
        assert proxied.drop(first) == {"cookie_bad": 1}
        assert proxied.drop(ack) == {"greeted_ack" if remembered else "cookie_bad": 1}
        proxied.forget_pending(list(pending(proxied)))
    assert proxied.flows(10) == [] and proxied.queries() == [] and not pending(proxied)


def test_a_replay_takes_the_place_of_what_is_being_read(proxied: Bench) -> None:
    """Of a later connection of the same port. Its client's first data, repeated, has the place again."""
    key = FlowKey(packed(CLIENT), packed(VIRTUAL), 40000, 80, TCP)
    earlier, later = said(b"earlier", isn=5, by=cookie(isn=5)), said(b"later")
    for data, isn in ((later, ISN), (earlier, 5), (later, ISN)):
        assert proxied.drop(data) == {"asked_data": 1}
        assert pending(proxied) == {key: (isn, cookie(isn=isn))}
    assert [record.kind for record in proxied.queries()] == [Ask.DATA] * 3
