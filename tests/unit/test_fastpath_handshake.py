# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Proxied handshakes, packet in, packet out: SYN and SYN-ACK, cookies, the client's first data, refusals.

Programs: ``lbapp/dataflow/fastpath/handshake.bpf.h``, ``answer.bpf.h``, ``cookie.bpf.h``; and
``lbapp.dataflow.fastpath.cookies``.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.dataflow.fastpath import cookies, kernel, layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import FlowKey, Hash, Mode, Service, ServiceKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import (
    ACK,
    CLIENT_MAC,
    REDIRECT,
    SYN,
    TCP,
    Bench,
    frame,
    packed,
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
