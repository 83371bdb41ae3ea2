# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The cookie that is the initial sequence number of a proxied handshake.

Says to Python what ``cookie.bpf.h`` says to the programs. Pure::

    31   30..28   27..24         23     22..0
    key  MSS      window scale   SACK   low bits of SipHash-1-3(key; client's address, port, ISN, bits 31..23)

The hash is of three words of 64 bits, little-endian as everything here: the address (16 bytes, IPv4 mapped), and
ISN * 2**32 + bits 31..23 of the cookie * 2**16 + port. The destination is not in it, for translation changes it.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from lbapp.dataflow.fastpath.layout import NO_SCALE, mapped
from lbapp.dataflow.frames import tcp_options
from lbapp.values import Value

MSS = (536, 1220, 1280, 1360, 1400, 1440, 1460, 8960)
"""A client's is taken for the largest of these that is not larger."""
MAX_SCALE = 14
"""RFC 7323."""
_SHIFT = 23
_HASH = (1 << _SHIFT) - 1
_MASK = (1 << 64) - 1
_WORDS = struct.Struct("<QQ")


class Options(Value, frozen=True):
    """What a client offered in its SYN. ``mss`` is one of :data:`MSS`; ``window_scale`` None: none."""

    mss: int
    window_scale: int | None
    sack: bool

    @classmethod
    def of(cls, top: int) -> Options:
        """From the bits 31 to 23 of a cookie, as :func:`check` returns them."""
        scale = top >> 1 & 15
        return cls(MSS[top >> 5 & 7], None if scale == NO_SCALE else scale, bool(top & 1))

    @classmethod
    def offered(cls, packed: bytes) -> Options:
        """From the TCP options of a SYN or SYN-ACK, with the MSS as it is; what is malformed is as if it were not
        there."""
        return _offered(packed)

    def pack(self) -> int:
        """The bits 30 to 23 of a cookie. Any MSS and window scale will do; they are rounded down."""
        scale = NO_SCALE if self.window_scale is None else min(self.window_scale, MAX_SCALE)
        return max(bisect_right(MSS, self.mss) - 1, 0) << 5 | scale << 1 | self.sack


@lru_cache(256)
def _offered(packed: bytes) -> Options:
    """Members offer the same again and again."""
    mss, scale, sack = 536, None, False
    for at, kind, length in tcp_options(packed):
        if kind == 2 and length == 4:
            mss = int.from_bytes(packed[at + 2:at + 4], "big")
        elif kind == 3 and length == 3:
            scale = min(packed[at + 2], MAX_SCALE)
        elif kind == 4:
            sack = True
    return Options(max(mss, 64), scale, sack)


def make(keys: Sequence[bytes | None], current: int, address: bytes, port: int, isn: int, options: Options) -> int:
    """A client's cookie.

    Args:
        keys: two, of 16 bytes each.
        current: which of them makes it.
        address: the client's, 4 or 16 bytes.
        port: the client's.
        isn: the client's initial sequence number.
        options: what it offered.

    Raises:
        ValueError: there is no such key.
    """
    key = keys[current]
    if key is None:
        raise ValueError("there is no key")
    top = current << 8 | options.pack()
    return top << _SHIFT | _hash(key, address, port, isn, top)


def check(keys: Sequence[bytes | None], address: bytes, port: int, isn: int, cookie: int) -> int | None:
    """The bits 31 to 23 of a cookie that was made for this client with one of these keys; None for any other number."""
    top = cookie >> _SHIFT
    key = keys[top >> 8]
    if key is None or _hash(key, address, port, isn, top) != cookie & _HASH:
        return None
    return top


def _hash(key: bytes, address: bytes, port: int, isn: int, top: int) -> int:
    return siphash(key, [*_WORDS.unpack(mapped(address)), isn << 32 | top << 16 | port]) & _HASH


def siphash(key: bytes, words: Sequence[int]) -> int:
    """SipHash-1-3 of words of 64 bits (Aumasson, Bernstein: "SipHash: a fast short-input PRF")."""
    one, two = _WORDS.unpack(key)
    state = (one ^ 0x736F6D6570736575, two ^ 0x646F72616E646F6D, one ^ 0x6C7967656E657261, two ^ 0x7465646279746573)
    for word in (*words, (8 * len(words) & 0xFF) << 56):
        a, b, c, d = state
        a, b, c, d = _round(a, b, c, d ^ word)
        state = a ^ word, b, c, d
    a, b, c, d = state
    a, b, c, d = _round(*_round(*_round(a, b, c ^ 0xFF, d)))
    return a ^ b ^ c ^ d


def _round(a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
    a = a + b & _MASK
    b = _turned(b, 13) ^ a
    a = _turned(a, 32)
    c = c + d & _MASK
    d = _turned(d, 16) ^ c
    a = a + d & _MASK
    d = _turned(d, 21) ^ a
    c = c + b & _MASK
    b = _turned(b, 17) ^ c
    return a, b, _turned(c, 32), d


def _turned(value: int, bits: int) -> int:
    return (value << bits | value >> 64 - bits) & _MASK
